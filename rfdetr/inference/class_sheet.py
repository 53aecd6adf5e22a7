"""A sheet of a dataset's classes: objects of each, cut out of their images."""

from __future__ import annotations

import contextlib
import math

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api

from rfdetr.console import UserError
from rfdetr.data.gray import window_of
from rfdetr.data.large_images import Pixels, load_for_tiles
from rfdetr.data.records import CocoSplit, ImageRecord
from rfdetr.data.rle import columns_of
from rfdetr.inference.fonts import font_for
from rfdetr.inference.visualise import (
    BACKGROUND,
    MIN_SIDE,
    Colour,
    class_colours,
    draw,
    one_line,
    picture_colours,
)
from rfdetr.masks import to_rle

EXAMPLES = 4  # objects in a row of a class
MANY_EXAMPLES = 6  # in each row of a single class
ROWS = 4  # of examples in a column, shared by its classes: each has one at least
SHEET_CLASSES = 200  # the rarest of more: a sheet has to open
COLUMN_WIDTH = 1440  # pixels, of all columns together
TITLE_HEIGHT = 30  # pixels
TITLE_SIZE = 16  # pixels, of its letters
GAP = 6  # pixels between examples
SURROUNDINGS = 4  # sides of an object that its example shows
MIN_CUT = 96  # pixels of the image that an example shows at least


def class_sheet(split: CocoSplit, remark: str = "") -> Image.Image:
    """Rows for each class of a split: its name, its count, a remark and examples of its objects.

    An example is cut out of its image with its surroundings, so that small objects are seen too,
    and shows all annotated objects there. A row is EXAMPLES wide; few classes have more rows each.
    Images that cannot be read are left out.
    """
    labels = sorted(range(len(split.class_names)), key=split.objects_per_class.__getitem__)
    labels = sorted(labels[:SHEET_CLASSES])
    columns = 1 + (len(labels) > 6) + (len(labels) > 40)
    classes_in_column = max(1, math.ceil(len(labels) / columns))
    examples = EXAMPLES if len(labels) > 1 else MANY_EXAMPLES
    most = max((split.objects_per_class[label] for label in labels), default=0)
    rows = max(1, min(ROWS // classes_in_column, math.ceil(most / examples)))
    side = COLUMN_WIDTH // examples // columns
    class_height = rows * side + TITLE_HEIGHT
    size = (columns * examples * side, classes_in_column * class_height)
    sheet = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    title_colours = class_colours(split.class_names)
    colours = picture_colours(split.class_names)
    names_on_objects = split.class_names if len(split.class_names) > 1 else [""]
    for position, label in enumerate(labels):
        x = position // classes_in_column * examples * side
        y = position % classes_in_column * class_height
        name = split.class_names[label]
        title = f"{one_line(name)}: {split.objects_per_class[label]}{remark}"
        font, title = font_for(title, TITLE_SIZE)
        pen.text((x + GAP, y + TITLE_HEIGHT / 2), title, title_colours[name], font, "lm")
        drawn = 0
        for image, index in _spread_examples(split, label, rows * examples):
            with contextlib.suppress(UserError):
                pixels = load_for_tiles(image, window_of(split.gray))
                example = _cut_out(image, pixels, index, names_on_objects, colours)
                example = example.resize((side - GAP, side - GAP), Image.Resampling.LANCZOS)
                row, column = divmod(drawn, examples)
                corner = (x + GAP // 2 + column * side, y + TITLE_HEIGHT + row * side)
                sheet.paste(example, corner)
                drawn += 1
    return sheet


def _spread_examples(split: CocoSplit, label: int, count: int) -> list[tuple[ImageRecord, int]]:
    """Up to `count` objects of a class, as (image, index in it), from all over the split.

    Those of one image are as few as there are images for, and spread over it too.
    """
    places = split.places_of_class(label)
    if not len(places):
        return []
    examples = []
    numbers = np.unique(np.linspace(0, len(places) - 1, count).astype(int))
    images = [split.images[place] for place in places[numbers].tolist()]
    indices = [np.flatnonzero(image.labels == label) for image in images]
    each = math.ceil(count / len(numbers))
    for image, of_image in zip(images, indices):
        chosen = np.unique(np.linspace(0, len(of_image) - 1, each).astype(int))
        examples += [(image, of_image[i]) for i in chosen]
    return examples[:count]


def _cut_out(
    image: ImageRecord,
    pixels: Pixels,
    index: int,
    names: list[str],
    colours: dict[str, Colour] | None,
) -> Image.Image:
    """A square around an object of an image, with all objects in it drawn; dark beyond the image.

    pixels: of the image, (H, W, 3); index: of the object; names: of the classes, by label.
    """
    x1, y1, x2, y2 = image.boxes[index]
    side = max(SURROUNDINGS * max(x2 - x1, y2 - y1), MIN_CUT)
    side = int(min(side, max(image.width, image.height)))
    left = _start_of_cut((x1 + x2) / 2, side, image.width)
    top = _start_of_cut((y1 + y2) / 2, side, image.height)
    window = np.s_[top : top + side, left : left + side]
    cut = Image.fromarray(pixels[window])
    scale = min(1, 2 * MIN_SIDE / side)
    size = [max(1, round(extent * scale)) for extent in cut.size]
    cut = cut.resize(size, Image.Resampling.BOX)

    boxes = (image.boxes - [left, top, left, top]) * scale
    begins_inside = (boxes[:, :2] < cut.size).all(axis=1)
    ends_inside = (boxes[:, 2:] > 0).all(axis=1)
    seen = []
    masks = []
    for i in np.flatnonzero(begins_inside & ends_inside):
        mask = _cut_mask(image, i, window)
        if mask is not None and not mask.any():  # only an empty corner of its box is in the cut
            continue
        seen.append(i)
        masks.append(None if mask is None else _resized_rle(mask, size))
    picture = draw(
        np.asarray(cut),
        boxes[seen],
        [names[image.labels[i]] for i in seen],
        masks=masks if any(masks) else None,
        colours=colours,
        min_side=MIN_SIDE,
    )
    longest = max(picture.size)
    square = Image.new("RGB", (longest, longest), BACKGROUND)
    square.paste(picture)
    return square


def _start_of_cut(centre: float, side: int, image_side: int) -> int:
    """Where `side` pixels around a centre begin, moved into the image where they fit there."""
    return int(np.clip(centre - side / 2, 0, max(0, image_side - side)))


def _cut_mask(image: ImageRecord, index: int, window: tuple) -> np.ndarray | None:
    """An object's mask (h, w) in a window of its image; None where it has none."""
    segmentation = image.segmentations[index]
    if not segmentation:
        return None
    rows, columns = window
    right = min(columns.stop, image.width)
    rle = to_rle(segmentation, image.height, image.width)
    return columns_of(rle, columns.start, right)[rows].astype(np.uint8)


def _resized_rle(mask: np.ndarray, size: list[int]) -> dict:
    """A mask (h, w) as RLE at another (width, height)."""
    resized = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
    return mask_api.encode(np.asfortranarray(resized))
