"""COCO box and mask figures, computed by faster-coco-eval, or by pycocotools where that cannot be imported."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path

import numpy as np
from numpy import ndarray as Array
from pycocotools import mask as mask_api

from rfdetr.metrics.overlap import mask_overlap, to_rle

try:
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval

    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

# figure -> (array, IoU thresholds of 0.50, 0.55 ... 0.95, area of all/small/medium/large, detections of 1/10/100)
_EVERY, _AT50, _AT75, _SIZES = slice(None), slice(0, 1), slice(5, 6), ("small", "medium", "large")
_FIGURES = {
    **{name: ("precision", ious, 0, 2) for name, ious in (("mAP", _EVERY), ("mAP50", _AT50), ("mAP75", _AT75))},
    **{f"mAP_{size}": ("precision", _EVERY, area, 2) for area, size in enumerate(_SIZES, start=1)},
    **{name: ("recall", _EVERY, 0, limit) for limit, name in enumerate(("AR1", "AR10", "AR100"))},
    **{f"AR_{size}": ("recall", _EVERY, area, 2) for area, size in enumerate(_SIZES, start=1)},
}
TABLE_COLUMNS = ("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large", "AR100")
TABLE_CLASSES = 12


class CocoEvaluator:
    """Collects the detections of a split and scores them as pycocotools does.

    ground_truth: a COCO dict (images, annotations with id, bbox xywh in pixels, area, categories). Where `masks`,
    images need height and width, and segmentations (polygons or RLE) must be valid: the C library does not check.
    An annotation without a segmentation is, for the masks only, a crowd region the size of its box: nobody can say
    how good a mask for that object is, so finding it is neither rewarded nor punished, and missing it costs nothing.

    `found` maps image id -> (boxes xywh, scores, category ids, RLEs). Adding an image again replaces it, so that the
    repeated images of a padded distributed sampler count once; ranks are joined by `found.update(other.found)`, and
    `found.clear()` makes the object ready for the next epoch.
    """

    def __init__(self, ground_truth: dict, masks: bool):
        self.masks = masks
        self.found: dict[int | str, tuple[Array, Array, Array, list[dict]]] = {}
        # Numbered in ascending order: the C++ code wants small integers and knows no string ids, and the order of
        # images decides between equal scores.
        images = sorted(ground_truth["images"], key=lambda image: (isinstance(image["id"], str), image["id"]))
        self._images = {image["id"]: {**image, "id": number} for number, image in enumerate(images, start=1)}
        categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
        self._names = [category["name"] for category in categories]
        self._classes = {category["id"]: number for number, category in enumerate(categories, start=1)}
        self._truth = {"bbox": [], "segm": []}
        for number, annotation in enumerate(ground_truth["annotations"], start=1):
            if annotation["image_id"] in self._images and annotation["category_id"] in self._classes:
                self._add_truth(number, annotation)

    def _add_truth(self, number: int, annotation: dict) -> None:
        image = self._images[annotation["image_id"]]
        row = {
            # pycocotools takes a match with annotation 0 for no match; the figures are to be the same as its own
            "id": number if annotation["id"] != 0 else 0,
            "image_id": image["id"],
            "category_id": self._classes[annotation["category_id"]],
            "bbox": annotation["bbox"],
            "area": annotation["area"],
            "iscrowd": int(annotation.get("iscrowd", 0)),
        }
        self._truth["bbox"].append(row)
        if self.masks:
            segmentation = annotation.get("segmentation")
            rle = to_rle(segmentation or np.array([row["bbox"]], dtype=float), image["height"], image["width"])
            row = {**row, "segmentation": rle, "iscrowd": int(row["iscrowd"] or not segmentation)}
            self._truth["segm"].append(row)

    def add(self, image_id: int | str, boxes: Array, scores: Array, labels: Array, rles: list[dict] | None = None):
        """Keep the n detections of one image; an image that the ground truth has not is left out.

        image_id as in the dataset; boxes (n, 4) xyxy in pixels of the original image, scores (n,), labels (n,)
        category ids of the dataset, rles n compressed RLEs of the original's size (needed where `masks`). Detections
        that are not finite are dropped. Raises ValueError for unknown category ids and masks of another size.
        """
        if image_id not in self._images:
            return
        boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
        if unknown := set(labels.tolist()) - self._classes.keys():
            raise ValueError(f"image {image_id}: category ids {sorted(unknown)}, the dataset has {list(self._classes)}")
        boxes[:, 2:] -= boxes[:, :2]
        good = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
        rles = [rle for rle, keep in zip(rles, good, strict=True) if keep] if self.masks else []
        size = [self._images[image_id].get("height"), self._images[image_id].get("width")]
        if wrong := [rle["size"] for rle in rles if list(rle["size"]) != size]:
            raise ValueError(f"image {image_id}: a mask of (height, width) {wrong[0]}, the image has {size}")
        self.found[image_id] = (boxes[good], scores[good], labels[good], rles)

    @property
    def bbox_results(self) -> list[dict]:
        """COCO results with the dataset's own ids; bbox is xywh in pixels."""
        return [
            {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
            for image_id, (boxes, scores, labels, _) in self.found.items()
            for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
        ]

    @property
    def segm_results(self) -> list[dict]:
        """COCO results with the dataset's own ids and no `bbox`, so that areas are those of the masks."""
        return [
            {"image_id": image_id, "category_id": label, "segmentation": rle, "score": score}
            for image_id, (_, scores, labels, rles) in self.found.items()
            for rle, score, label in zip(rles, scores.tolist(), labels.tolist(), strict=self.masks)
        ]

    def save(self, folder: str | Path) -> None:
        """Write folder/bbox.json and, with masks, folder/segm.json, as pycocotools' loadRes reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bbox.json").write_text(json.dumps(self.bbox_results), encoding="utf-8")
        if self.masks:
            (folder / "segm.json").write_text(json.dumps(self.segm_results), encoding="utf-8")

    def summary(self) -> dict:
        """The twelve COCO figures, 0..1, and `per_class` {name: {"mAP", "mAP50"}} under "bbox" and, with masks, "segm",
        with masks also "mask": {"giou", "ciou", "dice"}.  What does not exist (no objects of a size, say) is None.
        """
        summary = {"bbox": self._score("bbox", self._numbered(self.bbox_results))}
        if self.masks:
            detections = self._numbered(self.segm_results)
            summary["segm"] = self._score("segm", detections)
            summary["mask"] = mask_overlap(detections, self._truth["segm"])
        return summary

    def _numbered(self, results: list[dict]) -> list[dict]:
        """The results as annotations with this object's numbers for ids, which is what loadRes would make of them."""
        for number, result in enumerate(results, start=1):
            result["id"], result["iscrowd"] = number, 0
            result["image_id"] = self._images[result["image_id"]]["id"]
            result["category_id"] = self._classes[result["category_id"]]
            box = result.get("bbox")
            result["area"] = box[2] * box[3] if box else int(mask_api.area(result["segmentation"]))
        return results

    def _score(self, kind: str, detections: list[dict]) -> dict:
        # (IoU, recall, class, area, limit) and (IoU, class, area, limit); -1 is "no objects"
        arrays = {"precision": np.full((10, 101, 0, 4, 3), -1.0), "recall": np.full((10, 0, 4, 3), -1.0)}
        if self._images and self._names:
            images, categories = list(self._images.values()), [{"id": number} for number in self._classes.values()]
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                apis = COCO(), COCO()
                for api, annotations in zip(apis, (self._truth[kind], detections), strict=True):
                    api.dataset = {"images": images, "categories": categories, "annotations": annotations}
                    api.createIndex()
                evaluation = COCOeval(*apis, kind)
                evaluation.evaluate()
                evaluation.accumulate()
            arrays = evaluation.eval

        def figure(array: str, ious: slice, area: int, limit: int, classes: slice = slice(None)) -> float | None:
            values = arrays[array][ious, ..., classes, area, limit]
            values = values[values > -1]
            return float(values.mean()) if values.size else None

        per_class = {
            name: {key: figure(*_FIGURES[key], slice(row, row + 1)) for key in ("mAP", "mAP50")}
            for row, name in enumerate(self._names)
        }
        return {**{key: figure(*where) for key, where in _FIGURES.items()}, "per_class": per_class}


def format_table(summary: dict) -> str:
    """A summary() as lines for the console: the split's figures, then mAP50 of the first TABLE_CLASSES classes."""
    kinds = {title: summary[kind] for title, kind in (("box", "bbox"), ("mask", "segm")) if kind in summary}
    names = list(summary["bbox"]["per_class"])
    shown = {name: name if len(name) <= 30 else name[:27] + "..." for name in names[:TABLE_CLASSES]}
    width = max([7, *map(len, shown.values())])

    def row(head: str, cells: list[str | float | None]) -> str:
        texts = (cell if isinstance(cell, str) else "-" if cell is None else f"{cell:.3f}" for cell in cells)
        return f"{head:<{width}}" + "".join(f"{text:>8}" for text in texts)

    lines = [row("", [key.removeprefix("mAP_") for key in TABLE_COLUMNS])]
    lines += [row(title, [figures[key] for key in TABLE_COLUMNS]) for title, figures in kinds.items()]
    if "mask" in summary:
        overlap = summary["mask"]
        lines += [row("", ["gIoU", "cIoU", "Dice"]), row("overlap", [overlap[key] for key in ("giou", "ciou", "dice")])]
    lines.append(row("mAP50", list(kinds)))
    for name, short in shown.items():
        lines.append(row(short, [figures["per_class"][name]["mAP50"] for figures in kinds.values()]))
    return "\n".join(lines + [f"... and {len(names) - len(shown)} more"] * (len(names) > len(shown)))
