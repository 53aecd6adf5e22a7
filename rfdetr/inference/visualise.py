"""Pictures of detections: translucent masks with contours, boxes, names and scores; side by side and in sheets."""

from __future__ import annotations

import colorsys
import contextlib
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as mask_api

from rfdetr.console import UserError
from rfdetr.data.images import load_image
from rfdetr.data.records import CocoSplit, ImageRecord
from rfdetr.masks import to_rle

Colour = tuple[int, int, int]

MIN_SIDE = 512  # pixels: smaller images are enlarged before drawing, else no text fits
SMOOTH_SIDE = 1600  # pixels: up to here shapes are drawn at twice the size and shrunk, which smooths their edges
MASK_OPACITY = 0.38
FAR = 1e7  # pixels: farther corners, infinite ones among them, are taken for this far
MOST_LETTERS = 60  # of a class name
BACKGROUND = (24, 26, 31)
EXAMPLES = 4  # objects of each class on a sheet of classes
SHEET_CLASSES = 200  # the rarest of more: a sheet has to open
# Told apart at a glance, on gray microscopy as on photographs, and by most colour-blind people for the first few.
PALETTE: list[Colour] = [
    (255, 176, 0), (0, 158, 255), (255, 64, 129), (0, 200, 140), (160, 100, 255), (255, 110, 40),
    (60, 220, 235), (190, 215, 40), (235, 70, 70), (90, 120, 255), (240, 130, 220), (70, 190, 70),
]  # fmt: skip


def class_colours(names: list[str]) -> dict[str, Colour]:
    """A colour for each class by its place in `names`: always the same for the same list, distinct for any length."""
    colours = list(PALETTE)
    for index in range(
        len(PALETTE), len(names)
    ):  # steps of the golden ratio never land close on the colour circle
        rgb = colorsys.hsv_to_rgb(
            index * 0.618034 % 1, 0.6 + 0.35 * (index % 2), 0.95 - 0.15 * (index % 3)
        )
        colours.append(tuple(round(255 * value) for value in rgb))
    return dict(zip(names, colours))


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    names: list[str],
    scores: list[float] | None = None,
    masks: list[dict | None] | None = None,
    colours: dict[str, Colour] | None = None,
) -> Image.Image:
    """Draw n objects on a copy of an image, the large ones first; its long side is MIN_SIDE or more afterwards.

    image (H, W, 3) uint8 RGB; boxes (n, 4) xyxy in its pixels; names n class names; scores n or None (ground truth);
    masks n compressed RLEs of H x W or Nones; colours class name -> RGB, other classes get one by their name.
    Objects whose box has a NaN are left out.
    """
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    known = np.flatnonzero(~np.isnan(boxes).any(axis=1))
    if len(known) < len(boxes):
        boxes, names = boxes[known], [names[i] for i in known]
        scores = None if scores is None else [scores[i] for i in known]
        masks = [masks[i] for i in known] if masks else masks
    scale = max(1.0, MIN_SIDE / max(image.shape[:2]))
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    picture = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC)
    boxes = boxes.clip(-FAR, FAR) * scale
    inks = [(colours or {}).get(name) or _colour_of(name) for name in names]
    order = np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")
    smooth = 2 if max(size) <= SMOOTH_SIDE else 1
    line = max(1, round(smooth * max(size) / 350))
    shapes = Image.new("RGBA", (size[0] * smooth, size[1] * smooth), (0, 0, 0, 0))
    pen = ImageDraw.Draw(shapes)
    for index in order:
        x1, y1, x2, y2 = np.clip(boxes[index] * smooth, 0, np.tile(shapes.size, 2) - 1)
        if x2 > x1 and y2 > y1:
            _outline(pen, (x1, y1, x2, y2), line, (*inks[index], 130 if masks else 255))
    pixels = np.array(shapes)
    for index in (i for i in order if masks and masks[i]):
        _paint_mask(pixels, masks[index], inks[index], scale * smooth, line)
    shapes = Image.fromarray(pixels).reduce(smooth)
    picture = Image.alpha_composite(picture.convert("RGBA"), shapes).convert("RGB")
    _write_labels(picture, boxes, names, scores, inks)
    return picture


def _colour_of(name: str) -> Colour:
    return PALETTE[zlib.crc32(name.encode("utf-8", "surrogatepass")) % len(PALETTE)]


def _outline(pen: ImageDraw.ImageDraw, box: tuple, line: int, ink: tuple) -> None:
    """A box's outline, thinner and with sharp corners where it is small; `line` and box (xyxy) in the pen's pixels."""
    x1, y1, x2, y2 = (round(float(value)) for value in box)
    short = min(x2 - x1, y2 - y1)
    line = max(1, min(line, short // 4))  # a line that is wider than the box would lie outside
    radius = min(3 * line, short // 3)
    if (
        short > 2 * max(radius, line) + 2
    ):  # between its corners Pillow needs room for what it draws there
        pen.rounded_rectangle((x1, y1, x2, y2), radius, outline=ink, width=line)
    else:
        pen.rectangle((x1, y1, x2, y2), outline=ink, width=line)


def _written(name: str) -> str:
    """A class name as one short line that a font can write."""
    line = "".join(letter if letter.isprintable() else " " for letter in name[: 2 * MOST_LETTERS])
    line = " ".join(line.split())
    return line if len(line) <= MOST_LETTERS else line[: MOST_LETTERS - 3] + "..."


def _paint_mask(pixels: np.ndarray, rle: dict, colour: Colour, scale: float, line: int) -> None:
    """Fill a mask into pixels (H * scale, W * scale, 4) RGBA, opaque along its border of `line` pixels."""
    x, y, width, height = mask_api.toBbox(rle).astype(int)
    if not width:
        return
    # one empty pixel around: masks that touch the picture's edge get a contour there too
    mask = np.pad(mask_api.decode(rle)[y : y + height, x : x + width], 1)
    x, y = round((x - 1) * scale), round((y - 1) * scale)
    large = [max(1, round(side * scale)) for side in mask.shape[::-1]]
    soft = Image.fromarray(mask * np.uint8(255)).resize(large, Image.Resampling.BILINEAR)
    if scale > 1:  # round the steps of enlarged pixels
        soft = soft.filter(ImageFilter.GaussianBlur(0.45 * scale))
    border = soft.point(lambda value: 255 * (value > 110))
    core = border.filter(
        ImageFilter.BoxBlur(line)
    )  # 255 where everything within `line` pixels is inside
    cut = np.s_[max(0, -y) : pixels.shape[0] - y, max(0, -x) : pixels.shape[1] - x]
    inside, core = np.array(border)[cut] > 0, np.array(core)[cut] == 255
    target = pixels[max(0, y) :, max(0, x) :][: inside.shape[0], : inside.shape[1]]
    target[inside] = (*colour, 255)
    target[core, 3] = round(255 * MASK_OPACITY)


def _write_labels(
    picture: Image.Image,
    boxes: np.ndarray,
    names: list[str],
    scores: list | None,
    inks: list[Colour],
):
    """Write name and score, else the score, where they hide no other and at most a third of an object; best first."""
    crowded = len(boxes) > 12  # then a long name is written for its class once
    font = ImageFont.load_default(size=max(12, max(picture.size) / (52 if crowded else 44)))
    pad, high = round(font.size / 4), font.size * 1.1 + round(font.size / 4)
    pen, taken, named = ImageDraw.Draw(picture), np.zeros((0, 4)), set()
    for index in (
        range(len(boxes)) if scores is None else np.argsort(-np.asarray(scores), kind="stable")
    ):
        x1, y1, x2, y2 = boxes[index]
        score = "" if scores is None else f"{scores[index]:.2f}"
        for text in (f"{_written(names[index])} {score}".strip(), score):
            wide = pen.textlength(text, font=font) + 2 * pad
            if not text or (crowded and wide > 1.5 * (x2 - x1) and names[index] in named):
                continue
            x = min(max(0, x1), picture.width - wide)
            corners = [
                (x, y1 - high),
                (x, y1),
                (x, y2 - high),
                (x, y2),
                (x2, y1),
            ]  # above, inside, below, beside
            spots = np.array([(left, top, left + wide, top + high) for left, top in corners])
            inside = (spots >= 0).all(axis=1) & (spots[:, 2:] <= picture.size).all(axis=1)
            free = inside & (_covered(spots, taken) == 0) & (_covered(spots, boxes) < 1 / 3)
            if free.any():
                spot = spots[free.argmax()]
                taken = np.vstack([taken, spot])
                named.add(names[index])
                pen.rounded_rectangle(tuple(spot), radius=pad, fill=inks[index])
                # ITU-R BT.601 luma: dark text on light colours
                ink = (
                    (0, 0, 0)
                    if np.dot(inks[index], (0.299, 0.587, 0.114)) > 140
                    else (255, 255, 255)
                )
                pen.text(
                    (spot[0] + pad, (spot[1] + spot[3]) / 2), text, font=font, fill=ink, anchor="lm"
                )
                break


def _covered(spots: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """For each spot (n, 4) the largest share of one of the boxes (m, 4) that it hides; 0 for no boxes."""
    sides = np.minimum(spots[:, None, 2:], boxes[:, 2:]) - np.maximum(
        spots[:, None, :2], boxes[:, :2]
    )
    area = np.maximum(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), 1e-9)
    return (np.prod(np.maximum(sides, 0), axis=2) / area).max(axis=1, initial=0)


def side_by_side(left: Image.Image, right: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Two pictures of one height with a title over each; the right one is resized to the left one's height."""
    right = right.resize((max(1, round(right.width * left.height / right.height)), left.height))
    font, gap = ImageFont.load_default(size=max(12, left.height / 28)), max(4, left.height // 64)
    top = round(font.size * 2)
    sheet = Image.new("RGB", (left.width + gap + right.width, top + left.height), BACKGROUND)
    for picture, title, x in ((left, titles[0], 0), (right, titles[1], left.width + gap)):
        sheet.paste(picture, (x, top))
        ImageDraw.Draw(sheet).text(
            (x + picture.width / 2, top / 2), title, (235, 235, 235), font, anchor="mm"
        )
    return sheet


def class_sheet(split: CocoSplit) -> Image.Image:
    """A row of examples for each class of a split, with all that is annotated around them, the name and the count.

    An example is cut out of its image at four times the object's size, so that small objects are seen too. Images that
    cannot be read are left out.
    """
    shown = sorted(
        sorted(range(len(split.class_names)), key=split.objects_per_class.__getitem__)[:SHEET_CLASSES]
    )
    columns = 1 + (len(shown) > 6) + (len(shown) > 40)
    tile, top, rows = 360 // columns, 30, max(1, -(-len(shown) // columns))
    sheet = Image.new("RGB", (columns * EXAMPLES * tile, rows * (tile + top)), BACKGROUND)
    colours, font = class_colours(split.class_names), ImageFont.load_default(size=16)
    for place, label in enumerate(shown):
        x, y = place // rows * EXAMPLES * tile, place % rows * (tile + top)
        name, title = (
            split.class_names[label],
            f"{_written(split.class_names[label])}: {split.objects_per_class[label]}",
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
