"""A sheet of training images as an augmentation preset shows them."""

from __future__ import annotations

import contextlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_api
from torchvision.ops import box_convert

from rfdetr.console import UserError
from rfdetr.data.augment import Preset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.records import CocoSplit
from rfdetr.inference.visualise import BACKGROUND, TITLE_COLOUR, draw, picture_colours

ROWS = 4  # images
COLUMNS = 5  # each as it is, and varied
SIDE = 288  # pixels of a sample on the sheet
GAP = 6
TITLE_HEIGHT = 30


def augment_sheet(
    split: CocoSplit, preset: Preset, title: str, resolution: int, letterbox: bool = False
) -> Image.Image:
    """A row an image of the split's: as it is, then as training may see it, with its objects.

    resolution: side of the model's input; letterbox: images keep their proportions there.  Images
    that cannot be read are left out.
    """
    dataset = SplitDataset(split, resolution, preset, masks=True, letterbox=letterbox)
    with_objects = np.flatnonzero(split.objects_per_image)
    chosen = with_objects[np.linspace(0, len(with_objects) - 1, ROWS).astype(int)]
    size = (COLUMNS * (SIDE + GAP), ROWS * (SIDE + GAP) + TITLE_HEIGHT)
    sheet = Image.new("RGB", size, BACKGROUND)
    font = ImageFont.load_default(size=16)
    middle = (GAP, TITLE_HEIGHT / 2)
    ImageDraw.Draw(sheet).text(middle, f"{title}; on the left as it is", TITLE_COLOUR, font, "lm")
    for row, index in enumerate(np.unique(chosen).tolist()):
        for column in range(COLUMNS):
            seed = column + COLUMNS * row if column else None
            with contextlib.suppress(UserError):
                picture = draw_sample(dataset[index, seed], split.class_names)
                corner = (column * (SIDE + GAP), TITLE_HEIGHT + row * (SIDE + GAP))
                sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), corner)
    return sheet


def draw_sample(sample: dict, class_names: list[str]) -> Image.Image:
    """A dataset's sample with its objects drawn on it."""
    target = sample["target"]
    pixels = sample["image"].permute(1, 2, 0).numpy()
    boxes = box_convert(target["boxes"], "cxcywh", "xyxy").numpy() * len(pixels)
    masks = []
    for mask in target["masks"].numpy():
        masks.append(mask_api.encode(np.asfortranarray(mask)) if mask.any() else None)
    names = [class_names[label] if len(class_names) > 1 else "" for label in target["labels"]]
    return draw(
        pixels, boxes, names, masks=masks, colours=picture_colours(class_names), min_side=SIDE
    )
