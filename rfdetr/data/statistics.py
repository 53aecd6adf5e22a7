"""How large a split's objects are, and whether a model sees them."""

from __future__ import annotations

import numpy as np

from rfdetr.data.faults import PLACES_KEPT, Problem
from rfdetr.data.records import CocoSplit

HARDLY_SEEN = 8  # pixels: the side of objects of half a patch of most sizes
SMALL_SHARE = 0.2  # of a split's objects; more of these are worth a warning
# pixels, up to where COCO calls an object so
COCO_SIDES = {"small": 32, "medium": 96, "large": np.inf}


def object_sides(split: CocoSplit, resolution: int) -> np.ndarray:
    """(objects,) square roots of the boxes' areas in pixels of the `resolution` px square input."""
    sides = [np.zeros((0, 2))]
    for image in split.images:
        scale = resolution / np.array([image.width, image.height])
        sides.append((image.boxes[:, 2:] - image.boxes[:, :2]) * scale)
    return np.sqrt(np.concatenate(sides).prod(axis=1))


def small_objects(split: CocoSplit, resolution: int, step: int) -> list[Problem]:
    """A warning where many objects are hardly seen, with the resolution that helps.

    step: what a resolution must be a multiple of.
    """
    sides = object_sides(split, resolution)
    small = np.flatnonzero(sides < HARDLY_SEEN)
    share = len(small) / max(len(sides), 1)
    if share <= SMALL_SHARE:
        return []
    quantile = np.quantile(sides, SMALL_SHARE, method="higher")
    better = -int(-resolution * HARDLY_SEEN / quantile // step) * step  # rounded up
    message = (
        f"{split.annotation_file}: {len(small)} annotations ({share:.0%}) are "
        f"smaller than {HARDLY_SEEN} x {HARDLY_SEEN} pixels at {resolution} px, hardly seen: "
        f"--resolution {better} leaves {SMALL_SHARE:.0%} so; tiles of the images help too"
    )
    objects = [(entry, image) for image in split.images for entry in image.objects]
    places = []
    for index in small[:PLACES_KEPT]:
        entry, image = objects[index]
        place = f"annotation {entry['id']} of image {image.id} ({image.file_name})"
        places.append(f"{place}: {sides[index]:.1f} px")
    return [Problem("ANN_SMALL", "warning", message, len(small), places)]
