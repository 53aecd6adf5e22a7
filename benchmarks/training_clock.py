"""What the peers of peers_at_equal_time.py share: a clock of CPU seconds, and how they hand in.

A peer is a script that trains until its clock is over and hands in what its model finds in the
valid split, again and again on the way. It runs in an environment of its own, so that this file
needs numpy and pycocotools alone. A folder of a peer's run holds

    points.json   [{"seconds": CPU seconds of training, "bbox": file, "segm": file or null}, ...]
    facts.json    what was trained: "parameters", "images" (trained on, in all), "taken" (a line)

and the COCO results that points.json names, with the dataset's own image and category ids.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_api

ANNOTATIONS = "_annotations.coco.json"
POINTS = "points.json"
FACTS = "facts.json"
PARTS = 4  # a curve has so many points, but where epochs make them


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def peer_arguments(doc: str) -> argparse.ArgumentParser:
    """The command line that every peer takes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", type=Path, required=True, help=f"train/ and valid/, {ANNOTATIONS} in each")
    add("--out", type=Path, required=True, help="folder of the results; made here")
    add("--minutes", type=float, required=True, help="CPU minutes of training")
    add("--seed", type=int, default=0)
    add("--side", type=int, default=160, help="side of the model's input in pixels")
    return parser


class TrainingClock:
    """CPU seconds since the process began, without those spent in `paused`."""

    def __init__(self, out: Path, minutes: float, spent: float = 0.0):
        """spent: seconds of training in processes before this one."""
        self.out = out
        self.budget = minutes * 60
        self.not_counted = -spent
        self.points = json.loads((out / POINTS).read_text()) if (out / POINTS).exists() else []
        self.next_part = 1
        self.paused_at: float | None = None

    @property
    def seconds(self) -> float:
        now = cpu_seconds() if self.paused_at is None else self.paused_at
        return now - self.not_counted

    @property
    def share(self) -> float:
        """Of the budget that is spent, 0..1."""
        return min(self.seconds / self.budget, 1.0)

    @property
    def over(self) -> bool:
        return self.seconds >= self.budget

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training: conversion of data, predictions."""
        self.paused_at = cpu_seconds()
        try:
            yield
        finally:
            self.not_counted += cpu_seconds() - self.paused_at
            self.paused_at = None

    def due(self) -> bool:
        """Whether it is time to hand in: once in each quarter of the budget."""
        if self.seconds < self.next_part * self.budget / PARTS:
            return False
        self.next_part = int(self.seconds / self.budget * PARTS) + 1
        return True

    def hand_in(self, boxes: list[dict], masks: list[dict] | None) -> None:
        """COCO results of the valid split, as the model finds them now; call it while paused."""
        self.out.mkdir(parents=True, exist_ok=True)
        point = {"seconds": self.seconds, "bbox": None, "segm": None}
        for kind, results in (("bbox", boxes), ("segm", masks)):
            if results is not None:
                point[kind] = f"{kind}_{len(self.points):02d}.json"
                (self.out / point[kind]).write_text(json.dumps(results))
        self.points.append(point)
        (self.out / POINTS).write_text(json.dumps(self.points))


def write_facts(out: Path, parameters: int, images: int, taken: str) -> None:
    facts = {"parameters": parameters, "images": images, "taken": taken}
    (out / FACTS).write_text(json.dumps(facts))


def coco_results(
    image_id: int, boxes: np.ndarray, scores: np.ndarray, categories: list[int], masks: np.ndarray
) -> tuple[list[dict], list[dict]]:
    """One image's detections as COCO results of boxes and of masks.

    boxes (n, 4) xyxy in pixels of the original, masks (n, H, W) bool, of the original's size.
    """
    corners = np.asarray(boxes, dtype=float).reshape(-1, 4)
    xywh = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1)
    of_boxes = []
    of_masks = []
    for box, score, category, mask in zip(xywh.tolist(), scores, categories, masks, strict=True):
        common = {"image_id": image_id, "category_id": int(category), "score": float(score)}
        rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
        rle["counts"] = rle["counts"].decode()
        of_boxes.append(common | {"bbox": box})
        of_masks.append(common | {"segmentation": rle})
    return of_boxes, of_masks
