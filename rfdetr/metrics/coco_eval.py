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

# in the order of COCOeval.stats
FIGURES = "mAP mAP50 mAP75 mAP_small mAP_medium mAP_large AR1 AR10 AR100 AR_small AR_medium AR_large".split()
TABLE_COLUMNS = (*FIGURES[:6], "AR100")
TABLE_CLASSES = 12


class CocoEvaluator:
    """Collects the detections of a split and scores them as pycocotools does.

    ground_truth: a COCO dict (images, annotations with id, bbox xywh in pixels, area, categories). Where `masks`,
    images need height and width, and segmentations (polygons or RLE) must be valid: the C library does not check.
    An annotation without one is, for the masks only, a crowd region the size of its box, neither rewarded nor punished.

    `found` maps image id -> (category ids, scores, {"bbox": boxes xywh, "segm": RLEs}). Adding an image again replaces
    it: the repeated images of a padded distributed sampler count once.
    """

    def __init__(self, ground_truth: dict, masks: bool):
        self.masks = masks
        self.found: dict[int | str, tuple[list[int], list[float], dict[str, list]]] = {}
        # Numbered in ascending order: the C++ code wants small integers and knows no string ids, and the order of
        # images decides between equal scores.
        images = sorted(ground_truth["images"], key=lambda image: (isinstance(image["id"], str), image["id"]))
        self._images = {image["id"]: {**image, "id": number} for number, image in enumerate(images, start=1)}
        categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
        self._names = [category["name"] for category in categories]
        self._classes = {category["id"]: number for number, category in enumerate(categories, start=1)}
        self._truth = {"bbox": [], "segm": []}
        for number, annotation in enumerate(ground_truth["annotations"], start=1):
            image, shape = self._images[annotation["image_id"]], annotation.get("segmentation")
            row = {"image_id": image["id"], "category_id": self._classes[annotation["category_id"]]}
            row |= {"bbox": annotation["bbox"], "area": annotation["area"], "iscrowd": annotation.get("iscrowd", 0)}
            # pycocotools takes a match with annotation 0 for no match; the figures are to be the same as its own
            row["id"] = number if annotation["id"] != 0 else 0
            self._truth["bbox"].append(row)
            if masks:
                rle = to_rle(shape or np.array([row["bbox"]], dtype=float), image["height"], image["width"])
                crowd = row["iscrowd"] if shape else 1
                self._truth["segm"].append({**row, "segmentation": rle, "iscrowd": crowd})

    def add(self, image_id: int | str, boxes: Array, scores: Array, labels: Array, rles: list[dict] | None = None):
        """Keep the n detections of one image; unknown images and what is not finite are left out.

        image_id as in the dataset; boxes (n, 4) xyxy in pixels of the original image, scores (n,), labels (n,) category
        ids of the dataset, rles n compressed RLEs of the original's size (needed where `masks`). Raises ValueError.
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
        shapes = {"bbox": boxes[good].tolist(), "segm": rles}
        self.found[image_id] = labels[good].tolist(), scores[good].tolist(), shapes

    def results(self, kind: str) -> list[dict]:
        """COCO results with the dataset's own ids: "bbox" with boxes xywh in pixels, "segm" with RLEs alone."""
        field = {"bbox": "bbox", "segm": "segmentation"}[kind]
        return [
            {"image_id": image_id, "category_id": label, field: shape, "score": score}
            for image_id, (labels, scores, shapes) in self.found.items()
            for label, score, shape in zip(labels, scores, shapes[kind])
        ]

    def save(self, folder: str | Path) -> None:
        """Write folder/bbox.json and, with masks, folder/segm.json, as pycocotools' loadRes reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for kind in ("bbox", "segm") if self.masks else ("bbox",):
            Path(folder, f"{kind}.json").write_text(json.dumps(self.results(kind)), encoding="utf-8")

    def summary(self) -> dict:
        """The twelve COCO figures, 0..1, and `per_class` {name: {"mAP", "mAP50"}} under "bbox" and, with masks, "segm",
        with masks also "mask": {"giou", "ciou", "dice"}.  What does not exist (no objects of a size, say) is None.
        """
        summary = {"bbox": self._score("bbox", self._numbered("bbox"))}
        if self.masks:
            detections = self._numbered("segm")
            summary["segm"] = self._score("segm", detections)
            summary["mask"] = mask_overlap(detections, self._truth["segm"])
        return summary

    def _numbered(self, kind: str) -> list[dict]:
        """The results as annotations with this object's numbers for ids, which is what loadRes would make of them."""
        results = self.results(kind)
        for number, result in enumerate(results, start=1):
            area = result["bbox"][2] * result["bbox"][3] if "bbox" in result else mask_api.area(result["segmentation"])
            result.update(id=number, iscrowd=0, area=float(area))
            result["image_id"] = self._images[result["image_id"]]["id"]
            result["category_id"] = self._classes[result["category_id"]]
        return results

    def _score(self, kind: str, detections: list[dict]) -> dict:
        stats, precision = np.full(12, -1.0), np.full((10, 101, len(self._names)), -1.0)  # -1 is "no objects"
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
                evaluation.summarize()
            stats, precision = evaluation.stats[:12], evaluation.eval["precision"][..., 0, 2]  # (IoU, recall, class)

        def mean(values: Array) -> float | None:
            values = values[values > -1]
            return float(values.mean()) if values.size else None

        classes = [{"mAP": mean(precision[..., i]), "mAP50": mean(precision[0, :, i])} for i in range(len(self._names))]
        figures = {name: mean(value) for name, value in zip(FIGURES, stats)}
        return figures | {"per_class": dict(zip(self._names, classes))}


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
    if overlap := summary.get("mask"):
        lines += [row("", ["gIoU", "cIoU", "Dice"]), row("overlap", [overlap[key] for key in ("giou", "ciou", "dice")])]
    lines.append(row("mAP50", list(kinds)))
    lines += [row(shown[name], [f["per_class"][name]["mAP50"] for f in kinds.values()]) for name in shown]
    return "\n".join(lines + [f"... and {len(names) - len(shown)} more"] * (len(names) > len(shown)))
