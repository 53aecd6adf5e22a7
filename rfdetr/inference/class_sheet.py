"""A sheet of a dataset's classes: some objects of each, cut out of their images."""

from __future__ import annotations

import contextlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_api

from rfdetr.console import UserError
from rfdetr.data.coco import load_image
from rfdetr.data.faults import CocoSplit, ImageRecord
from rfdetr.inference.visualise import (
    BACKGROUND,
    MIN_SIDE,
    Colour,
    _written,
    class_colours,
    draw,
)
from rfdetr.masks import to_rle

EXAMPLES = 4  # objects of each class on a sheet of classes
SHEET_CLASSES = 200  # the rarest of more: a sheet has to open


def class_sheet(split: CocoSplit) -> Image.Image:
    """A row of examples for each class of a split, with all that is annotated around them, the name and the count.

    An example is cut out of its image at four times the object's size, so that small objects are seen too. Images that
    cannot be read are left out.
    """
    shown = sorted(
        sorted(range(len(split.class_names)), key=split.per_class.__getitem__)[:SHEET_CLASSES]
    )
    columns = 1 + (len(shown) > 6) + (len(shown) > 40)
    tile, top, rows = 360 // columns, 30, max(1, -(-len(shown) // columns))
    sheet = Image.new("RGB", (columns * EXAMPLES * tile, rows * (tile + top)), BACKGROUND)
    colours, font = class_colours(split.class_names), ImageFont.load_default(size=16)
    for place, label in enumerate(shown):
        x, y = place // rows * EXAMPLES * tile, place % rows * (tile + top)
        name, title = (
            split.class_names[label],
            f"{_written(split.class_names[label])}: {split.per_class[label]}",
        )
        ImageDraw.Draw(sheet).text((x + 6, y + top / 2), title, colours[name], font, "lm")
        holders = [image for image in split.images if label in image.labels]
        for number in (
            np.unique(np.linspace(0, len(holders) - 1, EXAMPLES).astype(int)) if holders else ()
        ):
            with contextlib.suppress(UserError):
                index = np.flatnonzero(holders[number].labels == label)[0]
                example = _cut_out(holders[number], index, split.class_names, colours)
                sheet.paste(
                    example.resize((tile - 6, tile - 6), Image.Resampling.LANCZOS), (x + 3, y + top)
                )
                x += tile
    return sheet


def _cut_out(
    image: ImageRecord, index: int, names: list[str], colours: dict[str, Colour]
) -> Image.Image:
    """A square around an object of an image, with all objects in it drawn; dark where the image ends."""
    x1, y1, x2, y2 = image.boxes[index]
    side = int(min(max(4 * max(x2 - x1, y2 - y1), 96), max(image.width, image.height)))
    spans = (x1, x2, image.width), (y1, y2, image.height)
    corner = np.array(
        [int(np.clip((low + high - side) / 2, 0, max(0, end - side))) for low, high, end in spans]
    )
    window = np.s_[corner[1] : corner[1] + side, corner[0] : corner[0] + side]
    pixels, scale = Image.fromarray(load_image(image)[window]), min(1, 2 * MIN_SIDE / side)
    pixels = pixels.resize(
        [max(1, round(extent * scale)) for extent in pixels.size], Image.Resampling.BOX
    )
    boxes, masks = (image.boxes - np.tile(corner, 2)) * scale, []
    inside = np.flatnonzero((boxes[:, :2] < pixels.size).all(1) & (boxes[:, 2:] > 0).all(1))
    for segmentation in (image.segmentations[i] for i in inside):
        mask = (
            segmentation
            and mask_api.decode(to_rle(segmentation, image.height, image.width))[window]
        )
        mask = mask is not None and np.asarray(
            Image.fromarray(mask).resize(pixels.size, Image.Resampling.NEAREST)
        )
        masks.append(mask_api.encode(np.asfortranarray(mask)) if segmentation else None)
    named = [names[image.labels[i]] for i in inside]
    picture = draw(
        np.asarray(pixels),
        boxes[inside],
        named,
        masks=masks if any(masks) else None,
        colours=colours,
    )
    square = Image.new("RGB", (max(picture.size),) * 2, BACKGROUND)
    square.paste(picture)
    return square
