"""Random evaluations: our figures against those of plain pycocotools on the same lists.

python benchmarks/fuzz.py --evaluation 1200
python benchmarks/fuzz.py --evaluation 1 --seed 0 --first 4711     (one of them again)

A set is made from (seed, number) alone: a COCO ground truth and the detections in each of its
images, with everything that decides a figure: none to hundreds of objects and detections, crowds,
objects without a mask, equal scores, boxes and masks that are equal or empty, areas at COCO's
limits, images with nothing in them, numbers that are not finite, ids that are 0, negative, huge or
texts.  Ours gets the detections that can count (`counting`), as in an evaluation; pycocotools gets
all of them.
"""

from __future__ import annotations

import contextlib
import copy
import io

import numpy as np
from numpy import ndarray as Array
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rfdetr.metrics.coco_eval import FIGURES, CocoEvaluator, counting

LIMIT = 1e-9
GRID = 4  # coordinates are multiples of 1 / GRID pixel, so that x + width - x is exact
DENSE = 0.15  # share of the sets with hundreds of objects or detections in an image
CORNERS = np.array([[0, 0], [0, 1], [1, 1], [1, 0]])
DIAMOND = np.array([[0, 0.5], [0.5, 0], [1, 0.5], [0.5, 1]])


class RandomSet:
    """`truth`: a COCO dict; `found`, of some images: id, boxes (n, 4) xyxy in pixels, scores (n,),
    category ids (n,), n RLEs."""

    def __init__(self, number: int, seed: int):
        self.rng = np.random.default_rng([seed, number])
        self.dense = self.rng.random() < DENSE
        classes = self.rng.choice([2, 3, 7] if self.dense else [1, 1, 2, 3, 20])
        self.classes = self.some_ids(classes, texts=False)
        self.truth = {
            "images": [],
            "annotations": [],
            "categories": [{"id": key, "name": f"class {key}"} for key in self.classes],
        }
        self.annotation_id = int(self.rng.choice([0, 0, 1, 1, 1, 1, 500, -3, 2**50]))
        self.found = []
        for image_id in self.some_ids(1 if self.dense else self.rng.integers(1, 6), texts=True):
            self.add_image(image_id)

    def some_ids(self, count: int, texts: bool) -> list:
        """Different ids in any order: from 0, with holes, huge, or texts."""
        kind = self.rng.choice(["small", "holes", "huge"] + ["texts"] * texts)
        keys = self.rng.permutation(count)
        if kind == "holes":
            keys = self.rng.choice(20 * count, count, replace=False)
        elif kind == "huge":
            keys = keys + 2**40
        return [str(key) if kind == "texts" else int(key) for key in keys]

    def add_image(self, image_id: int | str) -> None:
        rng = self.rng
        low, high = rng.choice([[1, 40], [40, 130], [110, 260]])
        height, width = rng.integers(low, high, 2).tolist()
        image = {"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width}
        self.truth["images"].append(image)
        count = rng.integers(100, 250) if self.dense else rng.choice([0, 0, 1, 3, 8, 20])
        boxes = self.boxes(count, height, width)
        labels = rng.choice(self.classes, count)
        for box, label in zip(boxes, labels):
            self.add_object(image, box, int(label))
        if rng.random() < 0.85:
            self.add_detections(image, boxes, labels)

    def boxes(self, count: int, height: int, width: int) -> Array:
        """(count, 4) xyxy in the image, from nothing to all of it, now and then the same ones."""
        spread = self.rng.choice([0.1, 1, 4])
        side = np.exp(self.rng.uniform(-1, 0, (count, 2)) * spread) * [width, height]
        start = self.rng.uniform(0, 1, (count, 2)) * ([width, height] - side)
        coarse = self.rng.choice([1, GRID, 8 * GRID])  # of a pixel, or 8 whole ones
        boxes = np.concatenate((start, start + side), axis=1)
        boxes = np.round(boxes * GRID / coarse) * coarse / GRID
        return boxes.clip(0, [width, height] * 2)

    def rle(self, box: Array, height: int, width: int) -> dict:
        """The box, the diamond in it, or (sometimes) nothing, as a compressed RLE."""
        corners = box[:2] + self.rng.choice([CORNERS, DIAMOND, DIAMOND]) * (box[2:] - box[:2])
        if self.rng.random() < 0.05:
            corners = np.zeros((4, 2))
        (rle,) = mask_api.frPyObjects([corners.ravel().tolist()], height, width)
        return {"size": [height, width], "counts": rle["counts"].decode()}

    def add_object(self, image: dict, box: Array, label: int) -> None:
        rng = self.rng
        height = image["height"]
        width = image["width"]
        rle = self.rle(box, height, width)
        corners = box[:2] + DIAMOND * (box[2:] - box[:2])
        shapes = [rle, uncompressed(rle), [corners.ravel().tolist()], [], None]
        segmentation = shapes[rng.choice(5, p=[0.3, 0.2, 0.4, 0.05, 0.05])]
        xywh = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
        areas = [float(mask_api.area(rle)), xywh[2] * xywh[3], 32.0**2, 96.0**2]
        entry = {
            "id": self.annotation_id,
            "image_id": image["id"],
            "category_id": label,
            "bbox": xywh,
            "area": areas[rng.choice(4, p=[0.6, 0.3, 0.05, 0.05])],
            "iscrowd": int(rng.random() < 0.1),
            "segmentation": segmentation,
        }
        if rng.random() < 0.05:
            entry["ignore"] = 1  # which pycocotools overwrites
        self.truth["annotations"].append(entry)
        self.annotation_id += int(rng.integers(1, 3))

    def add_detections(self, image: dict, objects: Array, object_labels: Array) -> None:
        """Some on an object or a little beside it, the others anywhere; in any order of scores."""
        rng = self.rng
        height = image["height"]
        width = image["width"]
        count = int(rng.choice([101, 250, 400]) if self.dense else rng.choice([0, 1, 10, 30, 130]))
        boxes = self.boxes(count, height, width)
        labels = rng.choice(self.classes, count)
        if len(objects):
            near = np.flatnonzero(rng.random(count) < rng.choice([0.3, 0.9]))
            target = rng.integers(0, len(objects), len(near))
            shift = rng.integers(-2, 3, (len(near), 4)) * rng.choice([0, 1, GRID]) / GRID
            boxes[near] = objects[target] + shift
            boxes[near, 2:] = np.maximum(boxes[near, 2:], boxes[near, :2])
            same = rng.random(len(near)) < 0.9
            labels[near[same]] = object_labels[target[same]]
        rles = [self.rle(box, height, width) for box in boxes]
        scores = rng.random(count).astype(rng.choice([np.float32, np.float64]))
        way = rng.integers(5)
        if way == 0:
            scores = np.round(scores * 5) / 5
        elif way == 1:
            scores[:] = rng.choice([0, 0.5, 1])
        elif way == 2:
            scores = scores * 1e-9
        elif way == 3:
            scores = np.sort(scores)[::-1].copy()
        if count and rng.random() < 0.1:
            boxes[rng.integers(count), rng.integers(4)] = rng.choice([np.nan, np.inf, -np.inf])
            scores[rng.integers(count)] = rng.choice([np.nan, np.inf])
        self.found.append((image["id"], boxes, scores, labels, rles))

    def results(self, kind: str) -> list[dict]:
        """All that was found, as pycocotools' loadRes takes it, but for what is not finite."""
        rows = []
        for image_id, boxes, scores, labels, rles in self.found:
            xywh = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)
            columns = zip(xywh.tolist(), scores.tolist(), labels.tolist(), rles)
            for box, score, label, rle in columns:
                if np.isfinite([*box, score]).all():
                    row = {"image_id": image_id, "category_id": label, "score": score}
                    rows.append(row | ({"bbox": box} if kind == "bbox" else {"segmentation": rle}))
        return rows


def uncompressed(rle: dict) -> dict:
    """The same with a list of runs, the first of zeros."""
    flat = mask_api.decode(rle).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    return rle | {"counts": np.diff(edges, prepend=0, append=flat.size).tolist()}


def masks_for_all(truth: dict) -> dict:
    """Our rule, written as COCO: an object without a mask is a crowd region the size of its box."""
    truth = copy.deepcopy(truth)
    for entry in truth["annotations"]:
        if not entry["segmentation"]:
            x, y, width, height = entry["bbox"]
            corners = np.array([x, y]) + CORNERS * [width, height]
            entry |= {"segmentation": [corners.ravel().tolist()], "iscrowd": 1}
    return truth


def plain_pycocotools(truth: dict, results: list[dict], kind: str) -> dict[str, float]:
    """The twelve figures, and mAP and mAP50 of each class; -1 for what does not exist."""
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = copy.deepcopy(truth)
        true.createIndex()
        if results:
            found = true.loadRes(copy.deepcopy(results))
        else:  # loadRes looks at the first result
            found = COCO()
            found.dataset = {**true.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(true, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = dict(zip(FIGURES, evaluation.stats.tolist(), strict=True))
    for row, key in enumerate(evaluation.params.catIds):
        for name, thresholds in (("mAP", slice(None)), ("mAP50", slice(1))):
            values = evaluation.eval["precision"][thresholds, :, row, 0, 2]
            values = values[values > -1]
            figures[f"class {key} {name}"] = values.mean() if values.size else -1.0
    return figures


def flat(summary: dict) -> dict[str, float]:
    """One kind of CocoEvaluator.summary in the form of plain_pycocotools."""
    figures = {name: summary[name] for name in FIGURES}
    for name, own in summary["per_class"].items():
        figures |= {f"{name} {key}": value for key, value in own.items()}
    return {name: -1.0 if value is None else value for name, value in figures.items()}


def differences(case: RandomSet) -> dict[str, float]:
    """How far each of our figures lies from pycocotools'; the overlap, from that of all."""
    full = CocoEvaluator(copy.deepcopy(case.truth), masks=True)
    ours = CocoEvaluator(copy.deepcopy(case.truth), masks=True)
    for image_id, boxes, scores, labels, rles in case.found:
        full.add(image_id, boxes, scores, labels, rles)
        own = np.flatnonzero(counting(boxes, scores, labels))
        ours.add(image_id, boxes[own], scores[own], labels[own], [rles[i] for i in own])
    summary = ours.summary()
    found = {}
    for kind, truth in (("bbox", case.truth), ("segm", masks_for_all(case.truth))):
        figures = flat(summary[kind])
        plain = plain_pycocotools(truth, case.results(kind), kind)
        assert figures.keys() == plain.keys()
        found |= {f"{kind} {name}": abs(figures[name] - value) for name, value in plain.items()}
    for name, value in full.summary()["mask"].items():
        own = summary["mask"][name]
        if value is None or own is None:
            found[f"mask {name}"] = float(own is not value)
        else:
            found[f"mask {name}"] = abs(own - value)
    return found


def run_sets(first: int, count: int, seed: int) -> int:
    """Compare the sets `first`, `first` + 1, ...; prints and counts those outside LIMIT."""
    outside = 0
    largest = 0.0
    for number in range(first, first + count):
        found = differences(RandomSet(number, seed))
        largest = max(largest, *found.values())
        wrong = [f"{name} by {value:.1e}" for name, value in found.items() if not value <= LIMIT]
        if wrong:
            outside += 1
            print(f"--evaluation 1 --first {number}: {', '.join(wrong)}", flush=True)
    print(
        f"{count} evaluations against pycocotools: largest difference {largest:.1e}, "
        f"{outside} over {LIMIT}"
    )
    return outside
