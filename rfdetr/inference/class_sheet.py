"""A sheet of a dataset's classes: some objects of each, cut out of their images."""

from __future__ import annotations

import contextlib
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_api

from rfdetr.console import UserError
from rfdetr.data.images import load_image
from rfdetr.data.records import CocoSplit, ImageRecord
from rfdetr.inference.visualise import BACKGROUND, MIN_SIDE, Colour, class_colours, draw, one_line
from rfdetr.masks import to_rle

EXAMPLES = 4  # objects of each class
SHEET_CLASSES = 200  # the rarest of more: a sheet has to open
COLUMN_WIDTH = 1440  # pixels, of all columns together
TITLE_HEIGHT = 30  # pixels
GAP = 6  # pixels between examples
SURROUNDINGS = 4  # sides of an object that its example shows
MIN_CUT = 96  # pixels of the image that an example shows at least


def class_sheet(split: CocoSplit) -> Image.Image:
    """A row for each class of a split: its name, its count and EXAMPLES of its objects.

    An example is cut out of its image with its surroundings, so that small objects are seen too,
    and shows all annotated objects there. Images that cannot be read are left out.
    """
    labels = sorted(range(len(split.class_names)), key=split.objects_per_class.__getitem__)
    labels = sorted(labels[:SHEET_CLASSES])
    columns = 1 + (len(labels) > 6) + (len(labels) > 40)
    rows = max(1, math.ceil(len(labels) / columns))
    side = COLUMN_WIDTH // EXAMPLES // columns
    row_height = side + TITLE_HEIGHT
    sheet = Image.new("RGB", (columns * EXAMPLES * side, rows * row_height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    colours = class_colours(split.class_names)
    font = ImageFont.load_default(size=16)
    for position, label in enumerate(labels):
        x = position // rows * EXAMPLES * side
        y = position % rows * row_height
        name = split.class_names[label]
        title = f"{one_line(name)}: {split.objects_per_class[label]}"
        pen.text((x + GAP, y + TITLE_HEIGHT / 2), title, colours[name], font, "lm")
        for image in _spread_examples(split, label):
            index = np.flatnonzero(image.labels == label)[0]
            with contextlib.suppress(UserError):
                example = _cut_out(image, index, split.class_names, colours)
                example = example.resize((side - GAP, side - GAP), Image.Resampling.LANCZOS)
                sheet.paste(example, (x + GAP // 2, y + TITLE_HEIGHT))
                x += side
    return sheet


def _spread_examples(split: CocoSplit, label: int) -> list[ImageRecord]:
    """Up to EXAMPLES images that have the class, from all over the split."""
    images = [image for image in split.images if label in image.labels]
    if not images:
        return []
    numbers = np.linspace(0, len(images) - 1, EXAMPLES).astype(int)
    return [images[number] for number in np.unique(numbers)]


def _cut_out(
    image: ImageRecord, index: int, names: list[str], colours: dict[str, Colour]
) -> Image.Image:
    """A square around an object of an image, with all objects in it drawn; dark beyond the image.

    index: of the object; names: of the classes, by label.
    """
    x1, y1, x2, y2 = image.boxes[index]
    side = max(SURROUNDINGS * max(x2 - x1, y2 - y1), MIN_CUT)
    side = int(min(side, max(image.width, image.height)))
    left = _start_of_cut((x1 + x2) / 2, side, image.width)
    top = _start_of_cut((y1 + y2) / 2, side, image.height)
    window = np.s_[top : top + side, left : left + side]
    pixels = Image.fromarray(load_image(image)[window])
    scale = min(1, 2 * MIN_SIDE / side)
    size = [max(1, round(extent * scale)) for extent in pixels.size]
    pixels = pixels.resize(size, Image.Resampling.BOX)

    boxes = (image.boxes - [left, top, left, top]) * scale
    begins_inside = (boxes[:, :2] < pixels.size).all(axis=1)
    ends_inside = (boxes[:, 2:] > 0).all(axis=1)
    inside = np.flatnonzero(begins_inside & ends_inside)
    masks = [_cut_mask(image, i, window, size) for i in inside]
    picture = draw(
        np.asarray(pixels),
        boxes[inside],
        [names[image.labels[i]] for i in inside],
        masks=masks if any(masks) else None,
        colours=colours,
    )
    longest = max(picture.size)
    square = Image.new("RGB", (longest, longest), BACKGROUND)
    square.paste(picture)
    return square


def _start_of_cut(centre: float, side: int, image_side: int) -> int:
    """Where `side` pixels around a centre begin, moved into the image where they fit there."""
    return int(np.clip(centre - side / 2, 0, max(0, image_side - side)))


def _cut_mask(image: ImageRecord, index: int, window: tuple, size: list[int]) -> dict | None:
    """An object's mask in a window of its image, as RLE at the window's (width, height) `size`."""
    segmentation = image.segmentations[index]
    if not segmentation:
        return None
    mask = mask_api.decode(to_rle(segmentation, image.height, image.width))[window]
    resized = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
    return mask_api.encode(np.asfortranarray(resized))
