"""Pictures of detections: translucent masks with contours, boxes, names and scores; side by side and in sheets."""

from __future__ import annotations

import colorsys
import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torchvision.ops import batched_nms

Colour = tuple[int, int, int]

MIN_SIDE = 512  # pixels: smaller images are enlarged before drawing, else no text fits
SMOOTH_SIDE = 1600  # pixels: up to here shapes are drawn at twice the size and shrunk, which smooths their edges
MASK_OPACITY = 0.38
BACKGROUND = (24, 26, 31)
# Told apart at a glance, on gray microscopy as on photographs, and by most colour-blind people for the first few.
PALETTE: list[Colour] = [
    (255, 176, 0), (0, 158, 255), (255, 64, 129), (0, 200, 140), (160, 100, 255), (255, 110, 40),
    (60, 220, 235), (190, 215, 40), (235, 70, 70), (90, 120, 255), (240, 130, 220), (70, 190, 70),
]  # fmt: skip


def class_colours(names: list[str]) -> dict[str, Colour]:
    """A colour for each class by its place in `names`: always the same for the same list, distinct for any length."""
    colours = {}
    for index, name in enumerate(names):
        if index < len(PALETTE):
            colours[name] = PALETTE[index]
        else:  # steps of the golden ratio never land close together on the colour circle
            rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.6 + 0.35 * (index % 2), 0.95 - 0.15 * (index % 3))
            colours[name] = tuple(round(255 * value) for value in rgb)
    return colours


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    names: list[str],
    scores: list[float] | None = None,
    masks: list[dict | None] | None = None,
    colours: dict[str, Colour] | None = None,
) -> Image.Image:
    """Draw n objects on a copy of an image whose long side is MIN_SIDE or more afterwards.

    image (H, W, 3) uint8 RGB; boxes (n, 4) xyxy in its pixels; names n class names; scores n or None (ground truth);
    masks n compressed RLEs of H x W or Nones; colours class name -> RGB as from class_colours, other classes get one
    by their name. Large objects are drawn first. Labels hide no label and at most a third of an object: without room,
    and in crowded pictures once a class has been named, only the score is written, or nothing.
    """
    height, width = image.shape[:2]
    scale = max(1.0, MIN_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC)
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4) * scale
    inks = [(colours or {}).get(name) or PALETTE[zlib.crc32(name.encode()) % len(PALETTE)] for name in names]
    order = np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")

    smooth = 2 if max(size) <= SMOOTH_SIDE else 1
    line = max(1, round(smooth * max(size) / 350))
    shapes = Image.new("RGBA", (size[0] * smooth, size[1] * smooth), (0, 0, 0, 0))
    pen = ImageDraw.Draw(shapes)
    for index in order:
        x1, y1, x2, y2 = np.clip(boxes[index] * smooth, 0, np.tile(shapes.size, 2) - 1)
        if x2 > x1 and y2 > y1:
            radius = min(3 * line, (x2 - x1) / 3, (y2 - y1) / 3)
            # beside a contour the box is a hint
            pen.rounded_rectangle((x1, y1, x2, y2), radius, outline=(*inks[index], 130 if masks else 255), width=line)
    if masks:
        pixels = np.array(shapes)
        for index in (i for i in order if masks[i]):
            _paint_mask(pixels, masks[index], inks[index], scale * smooth, line)
        shapes = Image.fromarray(pixels)
    picture = Image.alpha_composite(picture.convert("RGBA"), shapes.reduce(smooth)).convert("RGB")
    _write_labels(picture, boxes, names, scores, inks)
    return picture


def decode_columns(rle: dict) -> tuple[int, np.ndarray]:
    """(x, mask): the columns x .. x + w that a compressed RLE covers, mask (H, w) of bool; w = 0 if it is empty.

    Only these columns are decoded, which for an object in a large picture is many times faster than the whole.
    Format: pycocotools' rleToString, run lengths in column order as differences to the run before last.
    """
    height, counts = rle["size"][0], rle["counts"]
    codes = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)  # bit 5: the number goes on in the next character
    starts = np.append(0, ends[:-1] + 1)
    places = np.arange(codes.size) - np.repeat(starts, ends - starts + 1)
    runs = np.add.reduceat((codes & 31) << (5 * places), starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * (places[ends] + 1)), 0)  # bit 4 of the last: the sign
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    runs = runs[: runs.size // 2 * 2]  # background, object, background, object ...
    if not runs[1::2].any():
        return 0, np.zeros((height, 0), dtype=bool)
    first = runs[0] // height
    runs[0] -= first * height
    flat = np.repeat(np.arange(runs.size) % 2 == 1, runs)
    return int(first), np.pad(flat, (0, -flat.size % height)).reshape(-1, height).T


def _paint_mask(pixels: np.ndarray, rle: dict, colour: Colour, scale: float, line: int) -> None:
    """Fill a mask into pixels (H * scale, W * scale, 4) RGBA, opaque along its border of `line` pixels."""
    left, mask = decode_columns(rle)
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return
    # one empty pixel around: masks that touch the picture's edge get a contour there too
    mask = np.pad(mask[rows[0] : rows[-1] + 1], 1)
    x, y = round((left - 1) * scale), round((rows[0] - 1) * scale)
    large = (max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale)))
    soft = Image.fromarray(mask.astype(np.uint8) * 255).resize(large, Image.Resampling.BILINEAR)
    if scale > 1:  # round the steps of enlarged pixels
        soft = soft.filter(ImageFilter.GaussianBlur(0.45 * scale))
    border = soft.point(lambda value: 255 * (value > 110))
    inside = np.array(border) > 0
    core = np.array(border.filter(ImageFilter.BoxBlur(line))) == 255  # everything within `line` pixels is inside
    top, left = max(0, -y), max(0, -x)
    target = pixels[y + top : y + inside.shape[0], x + left : x + inside.shape[1]]
    cut = slice(top, top + target.shape[0]), slice(left, left + target.shape[1])
    target[inside[cut]] = (*colour, 255)
    target[core[cut], 3] = round(255 * MASK_OPACITY)


def _write_labels(picture: Image.Image, boxes: np.ndarray, names: list[str], scores: list | None, inks: list[Colour]):
    """Write name and score at each box, best first: above it, else inside, below or at its right."""
    crowded = len(boxes) > 12
    font = ImageFont.load_default(size=max(12, max(picture.size) / (52 if crowded else 44)))
    pad, high = round(font.size / 4), font.size * 1.1 + round(font.size / 4)
    pen, taken, named = ImageDraw.Draw(picture), np.zeros((0, 4)), set()
    for index in range(len(boxes)) if scores is None else np.argsort(-np.asarray(scores), kind="stable"):
        x1, y1, x2, y2 = boxes[index]
        score = "" if scores is None else f"{scores[index]:.2f}"
        for text in (f"{names[index]} {score}".strip(), score):
            wide = pen.textlength(text, font=font) + 2 * pad
            if not text or (crowded and wide > 1.5 * (x2 - x1) and names[index] in named):
                continue
            x = min(max(0, x1), picture.width - wide)
            corners = [(x, y1 - high), (x, y1), (x, y2 - high), (x, y2), (x2, y1)]
            spots = np.array([(left, top, left + wide, top + high) for left, top in corners])
            inside = (spots >= 0).all(axis=1) & (spots[:, 2:] <= picture.size).all(axis=1)
            free = inside & (_covered(spots, taken) == 0) & (_covered(spots, boxes) < 1 / 3)
            if free.any():
                spot = spots[free.argmax()]
                taken = np.vstack([taken, spot])
                named.add(names[index])
                pen.rounded_rectangle(tuple(spot), radius=pad, fill=inks[index])
                # ITU-R BT.601 luma: dark text on light colours
                dark = np.dot(inks[index], (0.299, 0.587, 0.114)) > 140
                middle = spot[0] + pad, (spot[1] + spot[3]) / 2
                pen.text(middle, text, font=font, fill=(0, 0, 0) if dark else (255, 255, 255), anchor="lm")
                break


def _covered(spots: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """For each spot (n, 4) the largest share of one of the boxes (m, 4) that it hides; 0 for no boxes."""
    sides = np.minimum(spots[:, None, 2:], boxes[:, 2:]) - np.maximum(spots[:, None, :2], boxes[:, :2])
    area = np.maximum(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), 1e-9)
    return (np.prod(np.maximum(sides, 0), axis=2) / area).max(axis=1, initial=0)


def side_by_side(left: Image.Image, right: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Two pictures of one height with a title over each; the right one is resized to the left one's height."""
    right = right.resize((max(1, round(right.width * left.height / right.height)), left.height))
    gap = max(4, left.height // 64)
    font = ImageFont.load_default(size=max(12, left.height / 28))
    top = round(font.size * 2)
    sheet = Image.new("RGB", (left.width + gap + right.width, top + left.height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for picture, title, x in ((left, titles[0], 0), (right, titles[1], left.width + gap)):
        sheet.paste(picture, (x, top))
        pen.text((x + picture.width / 2, top / 2), title, font=font, fill=(235, 235, 235), anchor="mm")
    return sheet


def contact_sheet(pictures: list[Image.Image], columns: int, cell: int = 640) -> Image.Image:
    """Pictures in rows of `columns`, each shrunk to at most `cell` pixels a side and centred.  ValueError for none."""
    if not pictures:
        raise ValueError("contact_sheet needs at least one picture")
    small = [picture.copy() for picture in pictures]
    for picture in small:
        picture.thumbnail((cell, cell))
    width, height, gap = max(p.width for p in small), max(p.height for p in small), max(4, cell // 80)
    columns, rows = min(columns, len(small)), -(-len(small) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), BACKGROUND)
    for index, picture in enumerate(small):
        x, y = gap + index % columns * (width + gap), gap + index // columns * (height + gap)
        sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
    return sheet


def nms_for_drawing(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou: float = 0.7) -> np.ndarray:
    """Indices of the detections to draw, best first: of two of one class that overlap more than `iou`, the better.

    boxes (n, 4) xyxy, scores (n,), labels (n,). For pictures only: DETR's scores are computed without it.
    """
    boxes, scores = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.as_tensor(scores)
    return batched_nms(boxes, scores.float(), torch.as_tensor(labels), iou).numpy()
