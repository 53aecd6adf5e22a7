"""COCO box and mask figures, computed by hotcoco, or by pycocotools where there is no hotcoco or it would differ."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import warnings
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
FIGURES = "mAP mAP50 mAP75 mAP_small mAP_medium mAP_large AR1 AR10 AR100 AR_small AR_medium AR_large".split()
TABLE_COLUMNS = (*FIGURES[:6], "AR100")
TABLE_CLASSES = 12
MAX_DETECTIONS = 100  # of a class and image, that COCO's figures look at


def counting(boxes: Array, scores: Array, labels: Array) -> Array:
    """Which of an image's n detections a figure of CocoEvaluator.summary can depend on: (n,) bool.

    COCO looks at the MAX_DETECTIONS best of each class (of equal scores the first), mask_overlap
    at what scores SCORE_THRESHOLD or more; what is not finite is left out.
    boxes (n, 4) in any format, scores (n,), labels (n,).
    """
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    chosen = finite & (scores >= SCORE_THRESHOLD)
    for label in np.unique(labels):
        own = np.flatnonzero(finite & (labels == label))
        best = np.argsort(-scores[own], kind="stable")[:MAX_DETECTIONS]
        chosen[own[best]] = True
    return chosen


class CocoEvaluator:
    """Collects the detections of a split and scores them as pycocotools does.

    ground_truth: a COCO dict (images, annotations with id, bbox xywh in pixels, area, categories). Where `masks`,
    images need height and width, and segmentations (polygons or RLE) must be valid: the C library does not check.
    An annotation without one is, for the masks only, a crowd region the size of its box, neither rewarded nor punished.

    `found` maps image id -> (rows (n, 7) of image number, box xywh, score, class number; RLEs). Adding an image again
    replaces it: the repeated images of a padded distributed sampler count once.
    """

    def __init__(self, ground_truth: dict, masks: bool):
        self.masks = masks
        self.found: dict[int | str, tuple[Array, list[dict]]] = {}
        # Numbered in ascending order: the libraries want small integers, and the order of images decides between equal
        # scores.
        images = sorted(
            ground_truth["images"], key=lambda image: (isinstance(image["id"], str), image["id"])
        )
        self._images = {
            image["id"]: {**image, "id": number} for number, image in enumerate(images, start=1)
        }
        categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
        self._names = [category["name"] for category in categories]
        self._classes = {
            category["id"]: number for number, category in enumerate(categories, start=1)
        }
        self._truth = {"bbox": [], "segm": []}
        for number, annotation in enumerate(ground_truth["annotations"], start=1):
            image, shape = self._images[annotation["image_id"]], annotation.get("segmentation")
            row = {
                "id": number if annotation["id"] != 0 else 0,
                "image_id": image["id"],
                "area": annotation["area"],
            }
            row |= {
                "bbox": annotation["bbox"],
                "category_id": self._classes[annotation["category_id"]],
            }
            row["iscrowd"] = annotation.get("iscrowd", 0)
            self._truth["bbox"].append(row)
            if masks:
                rle = to_rle(
                    shape or np.array([row["bbox"]], dtype=float), image["height"], image["width"]
                )
                crowd = row["iscrowd"] if shape else 1
                self._truth["segm"].append({**row, "segmentation": rle, "iscrowd": crowd})

    def add(
        self,
        image_id: int | str,
        boxes: Array,
        scores: Array,
        labels: Array,
        rles: list[dict] | None = None,
    ):
        """Keep the n detections of one image; unknown images and what is not finite are left out.

        image_id as in the dataset; boxes (n, 4) xyxy in pixels of the original image, scores (n,), labels (n,) category
        ids of the dataset, rles n compressed RLEs of the original's size (needed where `masks`). Raises ValueError.
        """
        if image_id not in self._images:
            return
        boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
        if unknown := set(labels.tolist()) - self._classes.keys():
            raise ValueError(
                f"image {image_id}: category ids {sorted(unknown)}, the dataset has {list(self._classes)}"
            )
        boxes[:, 2:] -= boxes[:, :2]
        good = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
        rles = [rle for rle, keep in zip(rles, good, strict=True) if keep] if self.masks else []
        size = [self._images[image_id].get("height"), self._images[image_id].get("width")]
        if wrong := [rle["size"] for rle in rles if list(rle["size"]) != size]:
            raise ValueError(
                f"image {image_id}: a mask of (height, width) {wrong[0]}, the image has {size}"
            )
        numbers = np.searchsorted(list(self._classes), labels) + 1
        image = np.full(len(boxes), self._images[image_id]["id"])
        self.found[image_id] = np.column_stack((image, boxes, scores, numbers))[good], rles

    def results(self, kind: str) -> list[dict]:
        """COCO results with the dataset's own ids: "bbox" with boxes xywh in pixels, "segm" with RLEs alone."""
        field, ids = {"bbox": "bbox", "segm": "segmentation"}[kind], list(self._classes)
        return [
            {
                "image_id": image_id,
                "category_id": ids[int(number) - 1],
                field: shape,
                "score": score,
            }
            for image_id, (rows, rles) in self.found.items()
            for shape, (score, number) in zip(
                rles if kind == "segm" else rows[:, 1:5].tolist(), rows[:, 5:].tolist()
            )
        ]

    def save(self, folder: str | Path) -> None:
        """Write folder/bbox.json and, with masks, folder/segm.json, as pycocotools' loadRes reads them.

        Each is whole or, after an OSError, as it was before.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        for kind in ("bbox", "segm") if self.masks else ("bbox",):
            temporary = Path(folder, f"{kind}.json.{os.getpid()}-{secrets.token_hex(4)}.tmp")
            try:
                temporary.write_text(json.dumps(self.results(kind)), encoding="utf-8")
                os.replace(temporary, Path(folder, f"{kind}.json"))
            finally:
                temporary.unlink(missing_ok=True)

    def summary(self) -> dict:
        """The twelve COCO figures, 0..1, and `per_class` {name: {"mAP", "mAP50"}} under "bbox" and, with masks, "segm",
        with masks also "mask": {"giou", "ciou", "dice"}.  What does not exist (no objects of a size, say) is None.
        """
        rows = np.concatenate([np.empty((0, 7)), *(rows for rows, _ in self.found.values())])
        summary = {"bbox": self._score("bbox", rows, rows[:, 3] * rows[:, 4], None)}
        if self.masks:
            rles = [rle for _, rles in self.found.values() for rle in rles]
            summary["segm"] = self._score(
                "segm", rows, np.array([mask_api.area(rle) for rle in rles], float), rles
            )
            summary["mask"] = mask_overlap(rows, rles, self._truth["segm"])
        return summary

    def _score(self, kind: str, rows: Array, areas: Array, rles: list[dict] | None) -> dict:
        stats, precision = (
            np.full(12, -1.0),
            np.full((10, 101, len(self._names)), -1.0),
        )  # -1 is "no objects"
        if self._images and self._names:
            truth = {"images": list(self._images.values()), "annotations": self._truth[kind]}
            truth["categories"] = [
                {"id": number, "name": name} for number, name in enumerate(self._names, start=1)
            ]
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                evaluation = _prepare(kind, truth, rows, areas, rles)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            stats, precision = (
                evaluation.stats[:12],
                evaluation.eval["precision"][..., 0, 2],
            )  # (IoU, recall, class)

        def mean(values: Array) -> float | None:
            values = values[values > -1]
            return float(values.mean()) if values.size else None

        classes = [
            {"mAP": mean(precision[..., i]), "mAP50": mean(precision[0, :, i])}
            for i in range(len(self._names))
        ]
        figures = {name: mean(value) for name, value in zip(FIGURES, stats)}
        return figures | {"per_class": dict(zip(self._names, classes))}


def _prepare(
    kind: str, truth: dict, rows: Array, areas: Array, rles: list[dict] | None
) -> COCOeval:
    """A COCOeval of a COCO ground truth and n detections: rows (n, 7) as CocoEvaluator.found has them, areas (n,)."""
    # pycocotools takes a match with annotation 0 for no match; the figures are to be the same as its own
    if hotcoco and all(annotation["id"] for annotation in truth["annotations"]):
        true = hotcoco.COCO(truth)
        found = true.loadRes(rows, segmentation=rles)
        found.update_anns(ids=np.arange(1, len(rows) + 1), area=areas)
        return hotcoco.COCOeval(true, found, kind)
    true, found = COCO(), COCO()
    true.dataset, found.dataset = truth, truth | {"annotations": []}
    for number, (row, area) in enumerate(zip(rows.tolist(), areas.tolist()), start=1):
        entry = {
            "id": number,
            "image_id": int(row[0]),
            "bbox": row[1:5],
            "score": row[5],
            "category_id": int(row[6]),
        }
        entry |= {"area": area, "iscrowd": 0, "segmentation": rles and rles[number - 1]}
        found.dataset["annotations"].append(entry)
    true.createIndex()
    found.createIndex()
    return COCOeval(true, found, kind)


def format_table(summary: dict) -> str:
    """A summary() as lines for the console: the split's figures, then mAP50 of the first TABLE_CLASSES classes."""
    kinds = {
        title: summary[kind]
        for title, kind in (("box", "bbox"), ("mask", "segm"))
        if kind in summary
    }
    names = list(summary["bbox"]["per_class"])
    shown = {name: name if len(name) <= 30 else name[:27] + "..." for name in names[:TABLE_CLASSES]}
    width = max([7, *map(len, shown.values())])

    def row(head: str, cells: list[str | float | None]) -> str:
        texts = (
            cell if isinstance(cell, str) else "-" if cell is None else f"{cell:.3f}"
            for cell in cells
        )
        return f"{head:<{width}}" + "".join(f"{text:>8}" for text in texts)

    lines = [row("", [key.removeprefix("mAP_") for key in TABLE_COLUMNS])]
    lines += [
        row(title, [figures[key] for key in TABLE_COLUMNS]) for title, figures in kinds.items()
    ]
    if overlap := summary.get("mask"):
        lines += [
            row("", ["gIoU", "cIoU", "Dice"]),
            row("overlap", [overlap[key] for key in ("giou", "ciou", "dice")]),
        ]
    lines.append(row("mAP50", list(kinds)))
    lines += [
        row(shown[name], [f["per_class"][name]["mAP50"] for f in kinds.values()]) for name in shown
    ]
    return "\n".join(
        lines + [f"... and {len(names) - len(shown)} more"] * (len(names) > len(shown))
    )
