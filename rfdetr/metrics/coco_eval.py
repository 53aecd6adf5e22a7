"""COCO box and mask figures, computed by hotcoco; by pycocotools where the two would differ."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rfdetr.masks import to_rle
from rfdetr.metrics.overlap import SCORE_THRESHOLD, mask_overlap

try:
    import hotcoco
except ImportError:
    hotcoco = None

# in the order of COCOeval.stats
FIGURES = [
    "mAP",
    "mAP50",
    "mAP75",
    "mAP_small",
    "mAP_medium",
    "mAP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
]
MAX_DETECTIONS = 100  # of a class and image, that COCO's figures look at
CROWDED = (300, 1000)  # the same of the figures beside them, where an image has more objects


def counting(
    boxes: Array, scores: Array, labels: Array, most_counted: int = MAX_DETECTIONS
) -> Array:
    """Which of an image's n detections a figure of CocoEvaluator.summary can depend on: (n,) bool.

    COCO looks at the `most_counted` best of each class (of equal scores the first), mask_overlap
    at what scores SCORE_THRESHOLD or more; what is not finite is left out.
    boxes (n, 4) in any format, scores (n,), labels (n,).
    """
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    chosen = finite & (scores >= SCORE_THRESHOLD)
    for label in np.unique(labels):
        of_label = np.flatnonzero(finite & (labels == label))
        best = np.argsort(-scores[of_label], kind="stable")[:most_counted]
        chosen[of_label[best]] = True
    return chosen


@dataclass(frozen=True)
class DetectionTable:
    """n detections of an image or of many, with images and classes numbered from 1 on.

    images, scores, classes (n,); boxes (n, 4) xywh in pixels; rles: n compressed RLEs, or none
    where no masks are scored; mask_scores (n,): what ranks the masks.
    """

    images: Array
    boxes: Array
    scores: Array
    classes: Array
    rles: list[dict]
    mask_scores: Array

    @classmethod
    def joined(cls, tables: list[DetectionTable]) -> DetectionTable:
        return cls(
            images=np.concatenate([np.empty(0), *(table.images for table in tables)]),
            boxes=np.concatenate([np.empty((0, 4)), *(table.boxes for table in tables)]),
            scores=np.concatenate([np.empty(0), *(table.scores for table in tables)]),
            classes=np.concatenate([np.empty(0), *(table.classes for table in tables)]),
            rles=[rle for table in tables for rle in table.rles],
            mask_scores=np.concatenate([np.empty(0), *(table.mask_scores for table in tables)]),
        )

    def ranked_by_masks(self) -> DetectionTable:
        return replace(self, scores=self.mask_scores)

    def __len__(self) -> int:
        return len(self.scores)


class CocoEvaluator:
    """Collects the detections of a split and scores them as pycocotools does.

    `detections` maps the dataset's image ids to the detections there. Adding an image again
    replaces it: the repeated images of a padded distributed sampler count once.
    """

    def __init__(self, ground_truth: dict, masks: bool, max_detections: int | None = None):
        """ground_truth: a COCO dict (images, annotations, categories); an annotation has id, area
        and bbox xywh in pixels.

        With `masks`, images need height and width, and segmentations (polygons or RLE) must be
        valid: the C library does not check. For the mask figures, an annotation without one is a
        crowd region of its box's size, neither rewarded nor punished; images that have no other
        annotations of a class do not count in its overlap. max_detections: how many an image may
        have; None: any number.
        """
        self.masks = masks
        self.detections: dict[int | str, DetectionTable] = {}
        # The libraries want small integers. Ascending order, as the order of images decides
        # between equal scores.
        images = sorted(
            ground_truth["images"], key=lambda image: (isinstance(image["id"], str), image["id"])
        )
        self._images = {
            image["id"]: image | {"id": number} for number, image in enumerate(images, start=1)
        }
        categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
        self._category_ids = [category["id"] for category in categories]
        self._class_numbers = {
            key: number for number, key in enumerate(self._category_ids, start=1)
        }
        self._names = [category["name"] for category in categories]
        self._listed = [category["name"] for category in ground_truth["categories"]]
        self._true_boxes = []
        self._true_masks = []
        # (image, class) by number, of objects with a mask and of those without
        self._drawn: set[tuple[int, int]] = set()
        self._undrawn: set[tuple[int, int]] = set()
        for number, annotation in enumerate(ground_truth["annotations"], start=1):
            self._add_annotation(number, annotation)
        self.limits = self._limits(max_detections)

    def _limits(self, max_detections: int | None) -> tuple[int, ...]:
        """What further figures look at, of a class and image: `max_detections`, else CROWDED where
        an image has more objects than COCO's look at.
        """
        if max_detections is not None:
            return (max_detections,) if max_detections > MAX_DETECTIONS else ()
        objects = Counter(box["image_id"] for box in self._true_boxes if not box["iscrowd"])
        return CROWDED if max(objects.values(), default=0) > MAX_DETECTIONS else ()

    @property
    def most_counted(self) -> int:
        """How many detections of a class and image any figure looks at."""
        return max((MAX_DETECTIONS, *self.limits))

    def _add_annotation(self, number: int, annotation: dict) -> None:
        image = self._images[annotation["image_id"]]
        box = {
            # 0 stays: pycocotools has its own view of it (see _prepare)
            "id": number if annotation["id"] != 0 else 0,
            "image_id": image["id"],
            "category_id": self._class_numbers[annotation["category_id"]],
            "bbox": annotation["bbox"],
            "area": annotation["area"],
            "iscrowd": annotation.get("iscrowd", 0),
        }
        self._true_boxes.append(box)
        if not self.masks:
            return
        shape = annotation.get("segmentation")
        pairs = self._drawn if shape else self._undrawn
        pairs.add((box["image_id"], box["category_id"]))
        mask = dict(box)
        if not shape:
            shape = np.array([annotation["bbox"]], dtype=float)
            mask["iscrowd"] = 1
        mask["segmentation"] = to_rle(shape, image["height"], image["width"])
        self._true_masks.append(mask)

    def add(
        self,
        image_id: int | str,
        boxes: Array,
        scores: Array,
        labels: Array,
        rles: list[dict] | None = None,
        mask_scores: Array | None = None,
    ) -> None:
        """Keep the n detections of one image; unknown images and what is not finite are left out.

        image_id: the dataset's; boxes (n, 4) xyxy in pixels of the original; scores (n,);
        labels (n,): the dataset's category ids; rles: n compressed RLEs of the original's size,
        needed with `masks`; mask_scores (n,): what ranks the masks, the scores where they are not
        given. Raises ValueError for other categories, sizes or numbers of RLEs.
        """
        if image_id not in self._images:
            return
        boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        scores = np.asarray(scores, dtype=np.float64)
        mask_scores = np.asarray(scores if mask_scores is None else mask_scores, dtype=np.float64)
        labels = np.asarray(labels, dtype=np.int64)
        unknown = set(labels.tolist()) - self._class_numbers.keys()
        if unknown:
            raise ValueError(
                f"image {image_id}: category ids {sorted(unknown)}, the dataset has "
                f"{self._category_ids}"
            )
        boxes[:, 2:] -= boxes[:, :2]
        finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
        finite_rles = []
        if self.masks:
            finite_rles = [rle for rle, is_finite in zip(rles, finite, strict=True) if is_finite]
        self._check_sizes(image_id, finite_rles)
        classes = np.searchsorted(self._category_ids, labels) + 1
        self.detections[image_id] = DetectionTable(
            images=np.full(finite.sum(), self._images[image_id]["id"]),
            boxes=boxes[finite],
            scores=scores[finite],
            classes=classes[finite],
            rles=finite_rles,
            mask_scores=mask_scores[finite],
        )

    def _check_sizes(self, image_id: int | str, rles: list[dict]) -> None:
        image = self._images[image_id]
        size = [image.get("height"), image.get("width")]
        for rle in rles:
            if list(rle["size"]) != size:
                raise ValueError(
                    f"image {image_id}: a mask of (height, width) {rle['size']}, the image has "
                    f"{size}"
                )

    def results(self, kind: str) -> list[dict]:
        """COCO results with the dataset's ids: "bbox": boxes xywh in pixels, "segm": RLEs."""
        results = []
        for image_id, table in self.detections.items():
            shapes = table.boxes.tolist()
            if kind == "segm":
                table = table.ranked_by_masks()
                shapes = table.rles
            for shape, score, number in zip(shapes, table.scores.tolist(), table.classes.tolist()):
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": self._category_ids[number - 1],
                        "segmentation" if kind == "segm" else "bbox": shape,
                        "score": score,
                    }
                )
        return results

    def save(self, folder: str | Path) -> None:
        """Write folder/bbox.json and, with masks, folder/segm.json, as pycocotools' loadRes reads.

        Each is whole or, after an OSError, as it was before.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ["bbox", "segm"] if self.masks else ["bbox"]:
            temporary = folder / f"{kind}.json.{os.getpid()}-{secrets.token_hex(4)}.tmp"
            try:
                temporary.write_text(json.dumps(self.results(kind)), encoding="utf-8")
                os.replace(temporary, folder / f"{kind}.json")
            finally:
                temporary.unlink(missing_ok=True)

    def best_score(self) -> float:
        """Of all detections; 0 where there are none."""
        best = [float(table.scores.max(initial=0)) for table in self.detections.values()]
        return max(best, default=0.0)

    def summary(self) -> dict:
        """The figures of boxes as "bbox", and with masks those of masks as "segm" and "mask".

        "bbox" and "segm": the twelve COCO figures, 0..1, and "per_class" {name: {"mAP", "mAP50"}},
        in the order of the categories.
        Where there are further limits, "mAP@300" and "AR@300" are the same at 300 detections of a
        class and image instead of 100.
        "mask": {"giou", "ciou", "dice"}. What does not exist (no objects of a size, say) is None.
        """
        table = DetectionTable.joined(list(self.detections.values()))
        box_areas = table.boxes[:, 2] * table.boxes[:, 3]
        summary = {"bbox": self._score("bbox", table, box_areas)}
        if self.masks:
            mask_areas = np.array([mask_api.area(rle) for rle in table.rles], dtype=float)
            summary["segm"] = self._score("segm", table.ranked_by_masks(), mask_areas)
            summary["mask"] = self._mask_overlap(table)
        return summary

    def _mask_overlap(self, table: DetectionTable) -> dict[str, float | None]:
        if all(mask["iscrowd"] for mask in self._true_masks):
            return dict.fromkeys(("giou", "ciou", "dice"))  # none is drawn
        known = self._known_masks(table)
        return mask_overlap(
            table.images[known],
            table.classes[known],
            table.scores[known],
            [table.rles[i] for i in known],
            self._true_masks,
        )

    def _known_masks(self, table: DetectionTable) -> Array:
        """The indices of detections in images where the masks of their class are not all missing:
        a good one reaches a little over its object's box, and would count as wrong there.
        """
        unknown = self._undrawn - self._drawn
        pairs = zip(table.images.tolist(), table.classes.tolist())
        return np.array([i for i, pair in enumerate(pairs) if pair not in unknown], dtype=int)

    def _score(self, kind: str, table: DetectionTable, areas: Array) -> dict:
        """The figures of one kind; areas (n,) of the detections, for small, medium and large."""
        if not self._images or not self._names:
            per_class = {name: {"mAP": None, "mAP50": None} for name in self._listed}
            further = [f"{name}@{limit}" for limit in self.limits for name in ("mAP", "AR")]
            return dict.fromkeys([*FIGURES, *further]) | {"per_class": per_class}
        truth = {
            "images": list(self._images.values()),
            "annotations": self._true_masks if kind == "segm" else self._true_boxes,
            "categories": [
                {"id": number, "name": name} for number, name in enumerate(self._names, start=1)
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluation = _prepare(kind, truth, table, areas)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            further = {}
            if self.limits:
                further = self._at_further_limits(_prepare(kind, truth, table, areas))
        figures = {name: _mean(value) for name, value in zip(FIGURES, evaluation.stats)}
        # (10 IoU thresholds, 101 recalls, classes): objects of all sizes, MAX_DETECTIONS
        precision = evaluation.eval["precision"][..., 0, 2]
        per_class = {
            name: {"mAP": _mean(precision[..., i]), "mAP50": _mean(precision[0, :, i])}
            for i, name in enumerate(self._names)
        }
        figures["per_class"] = {name: per_class[name] for name in self._listed}
        return figures | further

    def _at_further_limits(self, evaluation: COCOeval) -> dict[str, float | None]:
        """mAP and AR at each of `limits`; in a run of its own, as hotcoco takes the last limit for
        all of its twelve figures.
        """
        evaluation.params.maxDets = list(self.limits)
        evaluation.evaluate()
        evaluation.accumulate()
        figures = {}
        for i, limit in enumerate(self.limits):  # objects of all sizes
            figures[f"mAP@{limit}"] = _mean(evaluation.eval["precision"][..., 0, i])
            figures[f"AR@{limit}"] = _mean(evaluation.eval["recall"][..., 0, i])
        return figures


def _mean(values: Array) -> float | None:
    """The mean of the values that exist: pycocotools writes -1 where there are no objects."""
    existing = values[values > -1]
    return float(existing.mean()) if existing.size else None


def _prepare(kind: str, truth: dict, table: DetectionTable, areas: Array) -> COCOeval:
    """A COCOeval of a COCO ground truth and n detections of the given areas (n,)."""
    # pycocotools takes a match with annotation 0 for no match; the figures are to be its own
    if hotcoco and all(annotation["id"] for annotation in truth["annotations"]):
        return _prepare_hotcoco(kind, truth, table, areas)
    true = COCO()
    true.dataset = truth
    true.createIndex()
    detected = COCO()
    detected.dataset = truth | {"annotations": []}
    for i in range(len(table)):
        detected.dataset["annotations"].append(
            {
                "id": i + 1,
                "image_id": int(table.images[i]),
                "category_id": int(table.classes[i]),
                "bbox": table.boxes[i].tolist(),
                "segmentation": table.rles[i] if kind == "segm" else None,
                "score": float(table.scores[i]),
                "area": float(areas[i]),
                "iscrowd": 0,
            }
        )
    detected.createIndex()
    return COCOeval(true, detected, kind)


def _prepare_hotcoco(kind: str, truth: dict, table: DetectionTable, areas: Array) -> COCOeval:
    rows = np.column_stack((table.images, table.boxes, table.scores, table.classes))  # (n, 7)
    true = hotcoco.COCO(truth)
    detected = true.loadRes(rows, segmentation=table.rles if kind == "segm" else None)
    detected.update_anns(ids=np.arange(1, len(table) + 1), area=areas)
    return hotcoco.COCOeval(true, detected, kind)
