"""How large images and their objects are at a model's input, and whether it sees them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from rfdetr.data.faults import PLACES_KEPT, Problem, first_few
from rfdetr.data.image_files import ImageHeader
from rfdetr.data.records import CocoSplit
from rfdetr.fields import LEAST_TILE
from rfdetr.settings import VAL_FRACTION
from rfdetr.tiling import AUTO, Tiling

HARDLY_SEEN = 8  # pixels: the side of objects of half a patch of most sizes
MOST_SIDE = 2048  # pixels: larger inputs are no way out
MOST_SHRUNK = 4  # times, to the model's input; beyond it small things vanish
COCO_AREAS = {"small": 32**2, "medium": 96**2, "large": np.inf}  # up to so many pixels each


def count_by_size(split: CocoSplit) -> dict[str, int]:
    """How many objects are small, medium and large as evaluate.py scores them: by their area."""
    areas = split.images.areas
    size_classes = np.searchsorted(list(COCO_AREAS.values()), areas, side="right")
    return {name: int((size_classes == i).sum()) for i, name in enumerate(COCO_AREAS)}


def without_scores(splits: dict[str, CocoSplit]) -> str:
    """What it means that the valid split shows no object, and the way out; "" where it shows some.

    splits: those of a training, by name.
    """
    valid = splits["valid"]
    if valid.object_count:
        return ""
    lack = "has no objects" if valid.images else "is empty"
    if valid.annotation_file == splits["train"].annotation_file:
        way_out = "Take another --val_fraction"
    else:
        first = "Annotate a few of its images" if valid.images else "Put images there"
        way_out = f"{first}, or remove that split and add --val_fraction {VAL_FRACTION}"
    return (
        f"the valid split {lack}: there are no scores, and best.pt holds the last epoch's weights. "
        f"{way_out}"
    )


def object_sides(
    split: CocoSplit, resolution: int, letterbox: bool = False, tiling: Tiling | None = None
) -> np.ndarray:
    """(objects,) square roots of the boxes' areas in pixels of the `resolution` px square input.

    letterbox: images keep their proportions there.  tiling: the input is a tile of an image.
    """
    images = split.images
    sizes = images.sizes
    if tiling:
        sizes = np.minimum(sizes, tiling.side)
    if letterbox:
        sizes = sizes.max(axis=1, keepdims=True)
    scales = np.repeat(resolution / sizes, images.object_counts, axis=0)
    boxes = images.boxes
    return np.sqrt(((boxes[:, 2:] - boxes[:, :2]) * scales).prod(axis=1))


def shrink_problems(
    split: CocoSplit,
    resolution: int,
    step: int,
    letterbox: bool = False,
    trained_with: dict | None = None,
    is_frozen: bool = False,
) -> list[Problem]:
    """A warning where a split's images are shrunk so much that objects are lost, if they are.

    step, trained_with, is_frozen: as in shrink_warning; letterbox: as in object_sides.
    """
    images = split.images
    sides = object_sides(split, resolution, letterbox)
    image_sides = images.sizes.max(axis=1, initial=0)
    message = shrink_warning(image_sides, resolution, step, sides, trained_with, is_frozen)
    if not message:
        return []
    if is_hardly_seen(sides):
        code = "ANN_SMALL"
        small = np.flatnonzero(sides < HARDLY_SEEN)
        places_of = split.places
        annotation_ids = images.annotation_ids
        places = []
        for index in small[:PLACES_KEPT].tolist():
            image = images[places_of[index]]
            place = f"image {image.id} ({image.file_name}): {sides[index]:.1f} px"
            places.append(f"annotation {annotation_ids[index]} of {place}")
        count = len(small)
    else:
        code = "IMG_SHRUNK"
        shrunk = np.flatnonzero(is_shrunk(image_sides, resolution))
        kept = [images[index] for index in shrunk[:PLACES_KEPT].tolist()]
        places = [f"{image.file_name}: {image.width}x{image.height}" for image in kept]
        count = len(shrunk)
    message = f"{split.annotation_file}: {message}"
    return [Problem(code, "warning", message, count, places)]


def is_hardly_seen(sides: np.ndarray) -> bool:
    """sides: of objects, in pixels of the model's input."""
    return len(sides) > 0 and float(np.median(sides)) < HARDLY_SEEN


def is_shrunk(image_sides: np.ndarray, resolution: int) -> np.ndarray:
    """(images,) bool; image_sides: the images' longer sides in pixels."""
    return image_sides > MOST_SHRUNK * resolution


def shrink_warning(
    image_sides: Sequence[int] | np.ndarray,
    resolution: int,
    step: int,
    object_sides: np.ndarray | None = None,
    trained_with: dict | None = None,
    is_frozen: bool = False,
) -> str:
    """What is lost where images are shrunk to the model's input, and the way out; "" for nothing.

    image_sides: the images' longer sides in pixels.  resolution: the input's side, a multiple of
    `step`.  object_sides: of the objects' boxes in pixels of the input, where they are known.
    trained_with: what the checkpoint of a trained model says of its training; None: it is to come.
    is_frozen: it is a detector that stage 2 leaves as it is.
    """
    if len(image_sides) == 0:
        return ""
    image_sides = np.array(image_sides)
    longest = int(image_sides.max())
    factor = longest / resolution
    shrunk = int(is_shrunk(image_sides, resolution).sum())
    median = np.inf
    if object_sides is not None and is_hardly_seen(object_sides):
        median = float(np.median(object_sides))
    if not shrunk and median == np.inf:
        return ""
    facts = []
    wanted = longest / MOST_SHRUNK if shrunk else 0
    if shrunk and len(image_sides) == 1:
        facts.append(f"the image is shrunk {factor:.1f} times to the model's {resolution} px")
    elif shrunk:
        verb = "is" if shrunk == 1 else "are"
        facts.append(
            f"{shrunk} of {len(image_sides)} images {verb} shrunk more than {MOST_SHRUNK} times to "
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
    way_out = way_out_in_training(better)
    if is_frozen:
        larger = "" if better > MOST_SIDE else f", or with --resolution {better},"
        way_out = f"a detector that stage 1 trains with --tile auto{larger} sees more"
    elif trained_with is not None:
        way_out = way_out_of_trained(trained_with, resolution, longest, better)
    return f"{'; '.join(facts)}: hardly seen; {way_out}"


def way_out_in_training(better: int) -> str:
    """better: the resolution with which images are not shrunk too much."""
    way_out = f"train with --resolution {better} (memory and time grow with its square)"
    if better > MOST_SIDE:
        way_out = f"it would take --resolution {better}"
    return f"--tile auto looks at parts of them, best in training, too; or {way_out}"


def way_out_of_trained(trained_with: dict, resolution: int, longest: int, better: int) -> str:
    """What a trained model can do; the arguments as in tile_to_see_more and way_out_in_training."""
    tile = tile_to_see_more(trained_with, resolution, longest)
    if tile and trained_with.get("tile"):
        return f"--tile {tile} looks at parts of them, as its training did"
    now = f"--tile {tile} looks at parts of them; " if tile else ""
    larger = "" if better > MOST_SIDE else f", or with --resolution {better},"
    return f"{now}a model trained with --tile auto{larger} sees more"


def tile_to_see_more(trained_with: dict, resolution: int, longest: int) -> str:
    """The --tile with which a trained model sees more of an image that it sees shrunk; "" where its
    training images were shrunk as much: parts of an image would show objects larger than then.

    longest: side of the images, in pixels.
    """
    known = trained_with.get("tile") or trained_with.get("image_side")
    if known:
        return AUTO if known < min(longest, MOST_SHRUNK * resolution) else ""
    tile = max(min(2 * resolution, longest // 2), LEAST_TILE)
    return str(tile) if tile < longest else ""


def image_warnings(
    headers: dict[Path, ImageHeader],
    resolution: int,
    step: int,
    trained_with: dict,
    pages: bool = False,
    tile: int | None = None,
) -> list[str]:
    """What is to be said of image files without annotations: too large, or of several pages.

    headers: of those that can be read. resolution, step, trained_with: as in shrink_warning.
    pages: each page is seen. tile: the side of the tiles that are looked at, in pixels.
    """
    image_sides = [max(header.size) for header in headers.values()]
    if tile:
        image_sides = [min(side, tile) for side in image_sides]
    messages = [shrink_warning(image_sides, resolution, step, trained_with=trained_with)]
    if not pages:
        messages.append(pages_warning(headers, "--pages 1"))
    return [message for message in messages if message]


def pages_warning(headers: dict[Path, ImageHeader], way_out: str) -> str:
    """What to say of image files of several pages, "" where there are none; way_out: to all."""
    several = [f"{file}: {header.pages}" for file, header in headers.items() if header.pages > 1]
    if not several:
        return ""
    noun = "image has" if len(several) == 1 else "images have"
    what = f"{len(several)} {noun} several pages or frames ({first_few(several)})"
    return f"{what}: the first of each is read, {way_out} sees them all"


def words_on_trained(split: CocoSplit, name: str, trained_on: Collection[int]) -> str | None:
    """What to warn of where images of a split, by their content, are among those that a model was
    trained on.
    """
    files = [image.file_name for image in split.images if image.content_hash in trained_on]
    if not files:
        return None
    return (
        f"{len(files)} of the {len(split.images)} images of {name} were trained on, by their "
        f"content ({first_few(files)}): scores on them say little"
    )


def typical_side(split: CocoSplit, letterbox: bool = False) -> int:
    """The median side in pixels of a square that would be shrunk to the input as its image is: one
    of the same area, or with a letterbox of its longer side.
    """
    sides = split.images.sizes.max(axis=1) if letterbox else split.images.sizes.prod(axis=1) ** 0.5
    return round(float(np.median(sides)))
