"""Masks guessed from boxes: what a mask head learns from where nobody has drawn any.

An image's own colours tell its objects from their ground: pixels outside every box are ground,
those in the ellipses inside a class's boxes are mostly that class, and a linear discriminant of
the colours and their products separates the two. A pixel of a box then belongs to its object where
the discriminant and the ellipse together say so, unless it lies nearer to another box's centre.
How far a mask may go is settled by its box, whose columns and rows it must touch (the box tightness
of Hsu et al., NeurIPS 2019; BoxInst, arXiv:2012.02310). At last its holes are filled, and of
several pieces the largest is kept. Where the colours leave next to nothing of an object, as of one
that looks like the ground, the ellipse alone decides.

Where some masks are drawn, they tell how much each of these counts (guess_weights.py).

IoU with drawn masks on training images: nuclei .88 (boxes moved by 7 %: .84), demo .94 (.88); with
the weights of ten drawn images .90 and .96.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from rfdetr.data.records import ImageRecord
from rfdetr.masks import encode_window

VERSION = 4  # of the recipe: a cache of guessed masks is of no use to another one

ELLIPSE = 0.9  # of a box's half sides: inside it most pixels are the object's
RIDGE = 0.01  # keeps the discriminant's equations solvable
LEAST_DEVIATION = 1.0  # of a colour, in levels of 0..255: an image of one colour tells nothing
LEAST_OBJECT = 20  # pixels of a class, and of the ground, from which colours are learnt
LEAST_GROUND = 50
SHAPE = 0.3  # weight of the ellipse beside the discriminant
RIVAL = 3.0  # weight of being nearer to another box
TIGHTNESS = 0.5  # weight of the box's sides in how far a mask goes
LARGEST_BIAS = 0.6
# Share of a box: masks that fill less are of objects that the colours miss. Textures on textures
# (demo.py --kind hard): their IoU is .09, that of the ellipse .70.
LEAST_FILL = 0.1
GUESSING_SIDE = 320  # pixels of the image to guess in: boundaries are lost in a smaller one

# What is known of a pixel of a box: the colours, the ellipse and rivals; and of the box as a whole:
# how far its mask may go, mean and deviation of its colours' scores, size, a constant.
EVIDENCE = ("colour", "shape", "tightness", "mean", "deviation", "size", "one")
UNLEARNT = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # weights where no mask is drawn


@dataclass
class Evidence:
    """Of the pixels of one box."""

    rows: slice  # of the original
    columns: slice
    colour: np.ndarray  # (bh, bw)
    shape: np.ndarray  # (bh, bw): of the boxes alone
    of_box: list[float]  # the others of EVIDENCE


def guess_masks(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    height: int,
    width: int,
    weights: np.ndarray = UNLEARNT,
) -> list[dict]:
    """One guessed mask for each box, as COCO RLE of the (height, width) original.

    image: uint8 (h, w, 3), the original at any size; boxes (n, 4) xyxy in pixels of the original;
    labels (n,); weights (len(EVIDENCE),).
    """
    rles = []
    for known in evidence_of(image, boxes, labels, height, width):
        of_box = np.dot(weights[2:], known.of_box)
        mask = tidy(weights[0] * known.colour + weights[1] * known.shape + of_box > 0)
        if mask.mean() < LEAST_FILL:
            mask = tidy(known.shape + tight_bias(known.shape) > 0)
        rles.append(encode_window(known.columns.start, known.rows.start, mask, height, width))
    return rles


def with_guesses(
    record: ImageRecord, image: np.ndarray, weights: np.ndarray = UNLEARNT
) -> list[list | dict]:
    """The segmentations of an image's objects, guessed where there is none.

    image: its pixels, uint8 (h, w, 3) at any size; weights (len(EVIDENCE),).
    """
    size = (record.height, record.width)
    guesses = guess_masks(image, record.boxes, record.labels, *size, weights)
    return [drawn or guess for drawn, guess in zip(record.segmentations, guesses)]


def evidence_of(
    image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, height: int, width: int
) -> Iterator[Evidence]:
    """What is known of the pixels of each box; arguments as of guess_masks."""
    h, w = image.shape[:2]
    scaled = boxes * [w / width, h / height, w / width, h / height]
    scores = colour_scores(image, scaled, labels)
    for i, box in enumerate(boxes):
        rows, columns = window(box, height, width)
        shape = shape_evidence(i, boxes, rows, columns)
        colour = sample(scores[labels[i]], rows, columns, height, width)
        of_box = [tight_bias(colour + shape), colour.mean(), colour.std(), np.log(shape.size), 1.0]
        yield Evidence(rows, columns, colour, shape, of_box)


def colour_scores(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> dict:
    """For each label, how much each pixel (h, w) looks like its objects: above 0 more than like the
    ground.

    boxes (n, 4) xyxy in pixels of `image`, uint8 (h, w, 3).
    """
    h, w = image.shape[:2]
    pixels = colour_products(image)  # (h*w, 10)
    ground = np.ones((h, w), dtype=bool)
    objects = {label: np.zeros((h, w), dtype=bool) for label in np.unique(labels)}
    for box, label in zip(boxes, labels):
        rows, columns = window(box, h, w)
        ground[rows, columns] = False
        objects[label][rows, columns] |= radius(box, rows, columns) <= ELLIPSE
    outside = pixels[ground.ravel()]
    scores = {}
    for label, inside in objects.items():
        inside = pixels[inside.ravel()]
        weights = np.zeros(pixels.shape[1])
        if len(inside) >= LEAST_OBJECT and len(outside) > LEAST_GROUND:
            weights = discriminant(inside, outside)
        scores[label] = (pixels @ weights).reshape(h, w)
    return scores


def colour_products(image: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) -> (h*w, 10): 1, the standardised colours, and the products of two each."""
    colours = image.reshape(-1, 3).astype(np.float64)
    colours = (colours - colours.mean(0)) / np.maximum(colours.std(0), LEAST_DEVIATION)
    first, second = np.triu_indices(3)
    ones = np.ones((len(colours), 1))
    return np.hstack([ones, colours, colours[:, first] * colours[:, second]])


def discriminant(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Least squares' weights (F,) for +1 on `inside` (n, F) and -1 on `outside` (m, F), both of
    which count the same.
    """
    moments = inside.T @ inside / len(inside) + outside.T @ outside / len(outside)
    moments += RIDGE * np.eye(len(moments))
    return np.linalg.solve(moments, inside.mean(0) - outside.mean(0))


def window(box: np.ndarray, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels of a (height, width) image that a box xyxy touches: at least
    one of each.
    """
    left, top = np.floor(box[:2]).astype(int)
    right, bottom = np.ceil(box[2:]).astype(int)
    left = min(max(left, 0), width - 1)
    top = min(max(top, 0), height - 1)
    rows = slice(top, min(max(bottom, top + 1), height))
    columns = slice(left, min(max(right, left + 1), width))
    return rows, columns


def radius(box: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """Elliptic radius (rows, columns) of the pixels' centres: 1 on the ellipse inscribed in a box
    xyxy.
    """
    x0, y0, x1, y1 = box
    u = (np.arange(columns.start, columns.stop) + 0.5 - (x0 + x1) / 2) / (max(x1 - x0, 1e-6) / 2)
    v = (np.arange(rows.start, rows.stop) + 0.5 - (y0 + y1) / 2) / (max(y1 - y0, 1e-6) / 2)
    return np.hypot(u[None], v[:, None])


def shape_evidence(i: int, boxes: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """What the boxes (n, 4) xyxy alone say of the pixels of box i: positive inside its ellipse, and
    less where another box's centre is nearer.
    """
    own = radius(boxes[i], rows, columns)
    evidence = SHAPE * np.clip(1 - own**2, -1, 1)
    x0, y0, x1, y1 = boxes.T
    left, top, right, bottom = boxes[i]
    touching = (x0 < right) & (x1 > left) & (y0 < bottom) & (y1 > top)
    touching[i] = False
    for rival in boxes[touching]:
        other = radius(rival, rows, columns)
        evidence -= RIVAL * np.where(other < 1, np.clip(own - other, 0, 1), 0)
    return evidence


def tight_bias(evidence: np.ndarray) -> float:
    """What to add to a box's evidence (bh, bw) so that the mask, where it is above 0, touches the
    box's sides.

    Half of what would make it just touch the sides, whose median counts: a box may be drawn badly.
    """
    sides = evidence[0].max(), evidence[-1].max(), evidence[:, 0].max(), evidence[:, -1].max()
    bias = -TIGHTNESS * np.median(sides)
    return float(np.clip(bias, -LARGEST_BIAS, LARGEST_BIAS))


def tidy(mask: np.ndarray) -> np.ndarray:
    """The largest piece of a mask, without holes."""
    pieces, count = ndimage.label(mask)
    if count > 1:
        sizes = np.bincount(pieces.ravel())
        mask = pieces == 1 + sizes[1:].argmax()
    return ndimage.binary_fill_holes(mask)


def sample(scores: np.ndarray, rows: slice, columns: slice, height: int, width: int) -> np.ndarray:
    """scores (h, w) of an image, bilinear at these pixels of the original (height, width)."""
    h, w = scores.shape
    y = (np.arange(rows.start, rows.stop) + 0.5) * h / height - 0.5
    x = (np.arange(columns.start, columns.stop) + 0.5) * w / width - 0.5
    places = np.meshgrid(y, x, indexing="ij")
    return ndimage.map_coordinates(scores, places, order=1, mode="nearest")
