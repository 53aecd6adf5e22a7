"""Where a picture has room for its objects' names and scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rfdetr.data.rle import outermost_pixels
from rfdetr.inference.fonts import font_for

if TYPE_CHECKING:
    from rfdetr.inference.visualise import Colour, DrawnObject

LEAST_FONT = 10  # pixels
LABEL_HEIGHT = 1.35  # of a label, times its font's size
MOST_OF_OBJECT = 2 / 3  # of an object's short side: its label is no higher
MANY = 12  # objects; with more of them, or one class, a long name is written once for each class
MAX_HIDDEN = 0.15  # of an object: labels hide no more of it
MOST_OF_PICTURE = 0.1  # that one label covers: it would hide most of a tiny picture
MOST_LABELLED = 1000  # objects, the best ones: time grows with the square of their number
BLACK = (0, 0, 0)
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Label:
    """A text on a rectangle xyxy in pixels of the picture, `pad` from its left side."""

    rectangle: tuple[float, float, float, float]
    text: str
    colour: Colour
    font: ImageFont.FreeTypeFont
    pad: int


def place_labels(objects: list[DrawnObject], size: tuple[int, int], scale: float) -> list[Label]:
    """Names and scores at their objects, where they hide no other label and little of the objects.

    The best object comes first. Where its name finds no room, its score is tried alone. A label has
    at most MOST_OF_OBJECT of its object's short side as its height, down to LEAST_FONT, and no more
    than suits the picture as a whole: what stands at small objects of a large picture is for a look
    at its full size. Of many objects, those lower than the smallest label get none, but for the
    first of each class. No label covers more than MOST_OF_PICTURE.
    size: (width, height) of the picture, which is `scale` times the image.
    """
    if not objects:
        return []
    is_one_class = len({one.name for one in objects}) == 1
    crowded = len(objects) > MANY or is_one_class
    largest_font = max(LEAST_FONT, max(size) / (52 if crowded else 44))
    boxes = np.array([one.box for one in objects])
    taken = np.zeros((0, 4))  # by labels so far, xyxy
    labels = []
    named = set()
    for one in _best_first(objects)[:MOST_LABELLED]:
        box_width, box_height = one.box[2:] - one.box[:2]
        short_side = min(box_width, box_height)
        is_repeated = crowded and one.name in named
        if is_repeated and len(objects) > MANY and short_side < LEAST_FONT * LABEL_HEIGHT:
            continue
        font_size = _font_size(short_side, largest_font)
        pad = round(font_size / 4)
        height = font_size * 1.1 + pad
        texts = one.labels[1:] if is_repeated and is_one_class else one.labels
        for wanted in texts:
            font, text = font_for(wanted, font_size)
            width = font.getlength(text, "L") + 2 * pad
            if not text or (is_repeated and not is_one_class and width > 1.5 * box_width):
                continue
            if width * height > MOST_OF_PICTURE * size[0] * size[1]:
                continue
            places = _places_at(one, width, height, size, scale)
            rectangle = _free_rectangle(places, size, taken, boxes)
            if rectangle is None:
                continue
            labels.append(Label(tuple(rectangle), text, one.colour, font, pad))
            taken = np.vstack([taken, rectangle])
            if wanted == one.labels[0]:
                named.add(one.name)
            break
    return labels


def _font_size(short_side: float, largest: float) -> float:
    """Of a label at an object whose short side is given, all in pixels; in a few steps, so that
    the labels of similar objects are alike.
    """
    size = largest
    while size > LEAST_FONT and size * LABEL_HEIGHT > short_side * MOST_OF_OBJECT:
        size /= 2**0.5
    return max(LEAST_FONT, size)


def write_labels(picture: Image.Image, top: int, labels: list[Label]) -> None:
    """Write labels on a picture, or on its rows from `top` on."""
    pen = ImageDraw.Draw(picture)
    for label in labels:
        x1, y1, x2, y2 = label.rectangle
        if y2 + 1 < top or y1 - 1 > top + picture.height:
            continue
        y1 -= top
        y2 -= top
        pen.rounded_rectangle((x1, y1, x2, y2), radius=label.pad, fill=label.colour)
        ink = BLACK if _is_light(label.colour) else WHITE
        start = (x1 + label.pad, (y1 + y2) / 2)
        pen.text(start, label.text, font=label.font, fill=ink, anchor="lm")


def _best_first(objects: list[DrawnObject]) -> list[DrawnObject]:
    """By score, NaN last; ground truth in its own order."""
    if objects[0].score is None:
        return objects
    scores = np.array([one.score for one in objects])
    return [objects[i] for i in np.argsort(-scores, kind="stable")]


def _is_light(colour: Colour) -> bool:
    """By ITU-R BT.601 luma."""
    return np.dot(colour, (0.299, 0.587, 0.114)) > 140


def _places_at(
    one: DrawnObject, width: float, height: float, size: tuple[int, int], scale: float
) -> np.ndarray:
    """Rectangles (5, 4) xyxy of width x height at an object's visible box or, where it has one, its
    mask: above it, at its top, at its bottom, below and beside it.

    size, scale: as in place_labels.
    """
    x1, y1, x2, y2 = one.box.clip(0, np.tile(size, 2))
    x_above = x_below = x1
    y_beside = y1
    if one.has_mask:
        highest, lowest, rightmost = np.array(outermost_pixels(one.mask)) * scale
        x_above = highest[0] - width / 2
        y1 = highest[1]
        x_below = lowest[0] - width / 2
        y2 = lowest[1] + scale
        x2 = rightmost[0] + scale
        y_beside = rightmost[1] - height / 2
    x_above, x_below = np.clip((x_above, x_below), 0, max(0, size[0] - width))
    above = (x_above, y1 - height)
    at_the_top = (x_above, y1)
    at_the_bottom = (x_below, y2 - height)
    below = (x_below, y2)
    beside = (x2, y_beside)
    corners = np.array([above, at_the_top, at_the_bottom, below, beside])
    return np.hstack([corners, corners + (width, height)])


def _free_rectangle(
    places: np.ndarray, size: tuple[int, int], labels: np.ndarray, boxes: np.ndarray
) -> np.ndarray | None:
    """The first of the places (n, 4) that lies in the picture, over none of the labels (m, 4) and
    over at most MAX_HIDDEN of each of the boxes (k, 4), or None.

    All of them xyxy in pixels of the picture, whose (width, height) is `size`.
    """
    inside = (places >= 0).all(axis=1) & (places[:, 2:] <= size).all(axis=1)
    over_no_label = _largest_share_hidden(labels, places) == 0
    hides_little = _largest_share_hidden(boxes, places) < MAX_HIDDEN
    free = np.flatnonzero(inside & over_no_label & hides_little)
    return places[free[0]] if len(free) else None


def _largest_share_hidden(boxes: np.ndarray, rectangles: np.ndarray) -> np.ndarray:
    """For each rectangle (n, 4) the largest share of one of the boxes (m, 4) that it hides.

    All xyxy; (n,), 0 for no boxes.
    """
    corner = np.maximum(rectangles[:, None, :2], boxes[:, :2])
    opposite = np.minimum(rectangles[:, None, 2:], boxes[:, 2:])
    hidden = np.prod(np.maximum(opposite - corner, 0), axis=2)  # (n, m)
    areas = np.maximum(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), 1e-9)
    return (hidden / areas).max(axis=1, initial=0)
