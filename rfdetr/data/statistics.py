"""Sizes of objects."""

from __future__ import annotations

import numpy as np

from rfdetr.data.checks import CocoSplit
from rfdetr.data.faults import Problem

SEEN = 8  # pixels: smaller objects, half a patch of most sizes, are hardly seen


SMALL_SHARE = 0.2  # of a split's objects; more are worth a warning


COCO_SIDES = {
    "small": 32,
    "medium": 96,
    "large": np.inf,
}  # pixels, up to where COCO calls an object so


def object_sides(split: CocoSplit, resolution: int) -> np.ndarray:
    """(objects,) the square roots of the boxes' areas in pixels, once the images are `resolution` pixels square."""
    scaled = [
        (r.boxes[:, 2:] - r.boxes[:, :2]) * (resolution / np.array([r.width, r.height]))
        for r in split.images
    ]
    return np.sqrt(np.concatenate([np.zeros((0, 2)), *scaled]).prod(axis=1))


def small_objects(split: CocoSplit, resolution: int, step: int) -> list[Problem]:
    """A warning where many objects are too small to be seen, with the resolution, a multiple of `step`, that helps."""
    sides = object_sides(split, resolution)
    if not len(sides) or (share := (sides < SEEN).mean()) <= SMALL_SHARE:
        return []
    better = (
        -int(-resolution * SEEN / np.quantile(sides, SMALL_SHARE, method="higher") // step) * step
    )
    objects = [(entry, image) for image in split.images for entry in image.objects]
    small = np.flatnonzero(sides < SEEN)
    message = (
        f"{split.annotation_file}: {len(small)} annotations ({share:.0%}) are smaller than {SEEN} x {SEEN} pixels at "
        f"{resolution} px, hardly seen: --resolution {better} leaves {SMALL_SHARE:.0%} so; tiles of the images help too"
    )
    places = [
        f"annotation {entry['id']} of image {image.id} ({image.file_name}): {sides[i]:.1f} px"
        for i, (entry, image) in ((i, objects[i]) for i in small[:20])
    ]
    return [Problem("ANN_SMALL", "warning", message, len(small), places)]
