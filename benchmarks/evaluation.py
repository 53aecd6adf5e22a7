"""COCO evaluation: ours against plain pycocotools on generated data; the figures must agree.

python benchmarks/evaluation.py   (2000 images, 200,000 detections, 13 to 30 s a round)
python benchmarks/evaluation.py --pairs 1 --images 200

Timed from detections in memory (arrays and RLEs) to the figures. Ours gives besides, where there
are masks, the overlap figures of masks (gIoU, cIoU, Dice) and each class's own. The last line of a
case: how far the figures differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from common import Case, run

HEIGHT = 480
WIDTH = 640
CLASSES = 20
OBJECTS = 8
DETECTIONS = 100
FIGURES = "mAP mAP50 mAP75 mAP_small mAP_medium mAP_large".split()
FIGURES += "AR1 AR10 AR100 AR_small AR_medium AR_large".split()


def objects_and_detections(images: int, masks: bool) -> tuple[dict, list[tuple]]:
    """A COCO ground truth, and the detections in each image.

    Of an image: id, boxes (n, 4) xywh, scores (n,), category ids (n,), n RLEs or None.

    Half of an image's detections are its objects moved a little, the rest lies anywhere; masks are
    ellipses.
    """
    from pycocotools import mask as mask_api

    rng = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)

    def rles(boxes: np.ndarray) -> list[dict]:
        centre = boxes[:, :2] + boxes[:, 2:] / 2
        radius = boxes[:, 2:] / 2
        corners = centre[:, None] + radius[:, None] * np.stack(
            (np.cos(angle), np.sin(angle)), axis=1
        )
        found = mask_api.frPyObjects(corners.reshape(len(boxes), -1).tolist(), HEIGHT, WIDTH)
        return [rle | {"counts": rle["counts"].decode()} for rle in found]

    def boxes_anywhere(count: int) -> np.ndarray:
        side = np.exp(rng.uniform(np.log(12), np.log(220), (count, 2)))
        return np.concatenate(
            (rng.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - side), side), axis=1
        )

    truth = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": str(i)} for i in range(1, CLASSES + 1)],
    }
    found = []
    for image in range(1, images + 1):
        boxes = boxes_anywhere(OBJECTS)
        labels = rng.integers(1, CLASSES + 1, OBJECTS)
        truth["images"].append(
            {"id": image, "width": WIDTH, "height": HEIGHT, "file_name": f"{image}.jpg"}
        )
        shapes = rles(boxes) if masks else [None] * OBJECTS
        for box, label, shape in zip(boxes.tolist(), labels.tolist(), shapes):
            row = {
                "id": len(truth["annotations"]) + 1,
                "image_id": image,
                "bbox": box,
                "category_id": label,
            }
            row |= {"area": box[2] * box[3], "iscrowd": 0} | (
                {"segmentation": shape} if masks else {}
            )
            truth["annotations"].append(row)
        near = rng.integers(0, OBJECTS, DETECTIONS // 2)
        moved = boxes[near] + rng.normal(0, 0.08, (len(near), 4)) * np.tile(boxes[near][:, 2:], 2)
        moved[:, 2:] = moved[:, 2:].clip(1)
        every = np.concatenate((moved, boxes_anywhere(DETECTIONS - len(near))))
        classes = np.concatenate(
            (labels[near], rng.integers(1, CLASSES + 1, DETECTIONS - len(near)))
        )
        found.append(
            (image, every, rng.uniform(0, 1, DETECTIONS), classes, rles(every) if masks else None)
        )
    return truth, found


def ours(settings: dict, device: torch.device) -> Callable[[], dict]:
    from rfdetr.metrics.coco_eval import CocoEvaluator

    masks = settings["masks"]
    truth, found = objects_and_detections(settings["images"], masks)

    def step() -> dict:
        evaluator = CocoEvaluator(truth, masks)
        for image, boxes, scores, labels, rles in found:
            corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
            evaluator.add(image, corners, scores, labels, rles)
        summary = evaluator.summary()
        values = [
            summary[kind][name]
            for kind in (("bbox", "segm") if masks else ("bbox",))
            for name in FIGURES
        ]
        return {"units": 1, "values": [-1.0 if value is None else value for value in values]}

    return step


def pycocotools(settings: dict, device: torch.device) -> Callable[[], dict]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = objects_and_detections(settings["images"], settings["masks"])

    def results(kind: str) -> list[dict]:
        rows = []
        for image, boxes, scores, labels, rles in found:
            shapes = (
                [{"bbox": box} for box in boxes.tolist()]
                if kind == "bbox"
                else [{"segmentation": r} for r in rles]
            )
            for shape, score, label in zip(shapes, scores.tolist(), labels.tolist()):
                rows.append({"image_id": image, "category_id": label, "score": score} | shape)
        return rows

    def step() -> dict:
        values = []
        for kind in ("bbox", "segm") if settings["masks"] else ("bbox",):
            api = COCO()
            api.dataset = truth
            api.createIndex()
            evaluation = COCOeval(api, api.loadRes(results(kind)), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            values += evaluation.stats[:12].tolist()
        return {"units": 1, "values": values}

    return step


if __name__ == "__main__":
    count = 2000
    if "--images" in sys.argv:
        at = sys.argv.index("--images")
        count = int(sys.argv.pop(at + 1))
        sys.argv.pop(at)
    cases = [
        Case(f"evaluation, {name}", ("ours", settings), ("pycocotools", settings), 0.12)
        for name, settings in (
            ("boxes", {"masks": False, "images": count}),
            ("boxes and masks", {"masks": True, "images": count}),
        )
    ]
    run(__doc__, cases, {"ours": ours, "pycocotools": pycocotools})
