"""How large images and their objects are at a model's input, and whether it sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rfdetr.data.faults import PLACES_KEPT, Problem, first_few
from rfdetr.data.image_files import read_header
from rfdetr.data.records import CocoSplit, ImageRecord

HARDLY_SEEN = 8  # pixels: the side of objects of half a patch of most sizes
MOST_SIDE = 2048  # pixels: larger inputs are no way out
MOST_SHRUNK = 4  # times, to the model's input; beyond it small things vanish
COCO_AREAS = {"small": 32**2, "medium": 96**2, "large": np.inf}  # up to so many pixels each


def count_by_size(split: CocoSplit) -> dict[str, int]:
    """How many objects are small, medium and large as evaluate.py scores them: by their area."""
    areas = [entry["area"] for image in split.images for entry in image.objects]
    size_classes = np.searchsorted(list(COCO_AREAS.values()), areas, side="right")
    return {name: int((size_classes == i).sum()) for i, name in enumerate(COCO_AREAS)}


def object_sides(split: CocoSplit, resolution: int) -> np.ndarray:
    """(objects,) square roots of the boxes' areas in pixels of the `resolution` px square input."""
    sides = [np.zeros((0, 2))]
    for image in split.images:
        scale = resolution / np.array([image.width, image.height])
        sides.append((image.boxes[:, 2:] - image.boxes[:, :2]) * scale)
    return np.sqrt(np.concatenate(sides).prod(axis=1))


def shrink_problems(split: CocoSplit, resolution: int, step: int) -> list[Problem]:
    """A warning where a split's images are shrunk so much that objects are lost, if they are.

    step: what a resolution must be a multiple of.
    """
    objects = [(entry, image) for image in split.images for entry in image.objects]
    sides = object_sides(split, resolution)
    image_sides = [max(image.width, image.height) for image in split.images]
    message = shrink_warning(image_sides, resolution, step, sides)
    if not message:
        return []
    small = np.flatnonzero(sides < HARDLY_SEEN)
    if is_hardly_seen(sides):
        code = "ANN_SMALL"
        places = []
        for index in small[:PLACES_KEPT]:
            entry, image = objects[index]
            place = f"annotation {entry['id']} of image {image.id} ({image.file_name})"
            places.append(f"{place}: {sides[index]:.1f} px")
        count = len(small)
    else:
        code = "IMG_SHRUNK"
        shrunk = [image for image in split.images if is_shrunk(image, resolution)]
        places = [f"{image.file_name}: {image.width}x{image.height}" for image in shrunk]
        count = len(places)
    message = f"{split.annotation_file}: {message}"
    return [Problem(code, "warning", message, count, places[:PLACES_KEPT])]


def is_hardly_seen(sides: np.ndarray) -> bool:
    """sides: of objects, in pixels of the model's input."""
    return len(sides) > 0 and float(np.median(sides)) < HARDLY_SEEN


def is_shrunk(image: ImageRecord, resolution: int) -> bool:
    return max(image.width, image.height) > MOST_SHRUNK * resolution


def shrink_warning(
    image_sides: Sequence[int], resolution: int, step: int, object_sides: np.ndarray | None = None
) -> str:
    """What is lost where images are shrunk to the model's input, and the way out; "" for nothing.

    image_sides: the images' longer sides in pixels.  resolution: the input's side, a multiple of
    `step`.  object_sides: of the objects' boxes in pixels of the input, where they are known.
    """
    if not image_sides:
        return ""
    longest = max(image_sides)
    factor = longest / resolution
    shrunk = sum(side > MOST_SHRUNK * resolution for side in image_sides)
    median = np.inf
    if object_sides is not None and is_hardly_seen(object_sides):
        median = float(np.median(object_sides))
    if not shrunk and median == np.inf:
        return ""
    facts = []
    wanted = longest / MOST_SHRUNK if shrunk else 0
    if shrunk:
        facts.append(
            f"{shrunk} of {len(image_sides)} images are shrunk more than {MOST_SHRUNK} times to "
            f"the model's {resolution} px (the largest {factor:.1f} times)"
        )
    if median < np.inf:
        facts.append(
            f"{int((object_sides < HARDLY_SEEN).sum())} of {len(object_sides)} annotations are "
            f"smaller than {HARDLY_SEEN} x {HARDLY_SEEN} pixels at {resolution} px (the median "
            f"{median:.1f})"
        )
        wanted = resolution * HARDLY_SEEN / max(median, 0.1)
    better = -int(-wanted // step) * step  # rounded up
    way_out = (
        f"train with --resolution {better} (memory and time grow with its square), or cut the "
        "images into tiles beforehand"
    )
    if better > MOST_SIDE:
        way_out = f"cut the images into tiles beforehand: it would take --resolution {better}"
    return f"{'; '.join(facts)}: hardly seen; {way_out}"


def image_warnings(
    files: Sequence[Path], resolution: int, step: int, pages: bool = False
) -> list[str]:
    """What is to be said of image files without annotations: too large, or of several pages.

    resolution, step: as in shrink_warning. pages: each page is seen. Files that cannot be read are
    passed over.
    """
    headers = {file: read_header(file) for file in files}
    image_sides = [max(header.size) for header in headers.values() if header]
    messages = [shrink_warning(image_sides, resolution, step)]
    several = [
        f"{file}: {header.pages}" for file, header in headers.items() if header and header.pages > 1
    ]
    if several and not pages:
        noun = "image has" if len(several) == 1 else "images have"
        what = f"{len(several)} {noun} several pages or frames ({first_few(several)})"
        messages.append(f"{what}: the first of each is read, --pages 1 sees them all")
    return [message for message in messages if message]
