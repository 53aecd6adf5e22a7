"""Whether a split's boxes and masks are in pixels, and its masks lie on their boxes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rfdetr.data.flat import row_slices

SEVERAL = 3  # annotations; fewer prove nothing about all others
MOST = 0.9  # of a split's boxes or polygons in 0..1: then it is not in pixels
ONE = 1.001  # the largest coordinate of what is in 0..1, with what rounding adds
FEW_PIXELS = 8  # an image's side up to which a box may well lie within its first pixel
OFF_ERROR = 0.5  # share of a split's masks that do not lie on their boxes
CORNERS_ERROR = 0.5  # share of a split's masks whose boxes are corners
MARGIN = 0.1  # share of a box's side that its mask may stand out by,
MARGIN_PIXELS = 2.0  # and so many pixels more


def coordinate_faults(
    boxes: np.ndarray, extents: np.ndarray, shorter_sides: np.ndarray, is_box: np.ndarray
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(code, severity, indices) of what is beyond its share of a split's n annotations.

    boxes (n, 4): x, y, width, height in pixels.  extents (n, 4): left, top, right, bottom of masks,
    NaN where there is none to be judged.  shorter_sides (n,): of their images.  is_box (n,): which
    boxes count.  Masks are not compared with boxes of another unit.
    """
    is_mask = np.isfinite(extents[:, 0])
    can_tell = shorter_sides > FEW_PIXELS
    x, y, width, height = boxes.T
    _, _, right, bottom = extents.T
    tiny_boxes = np.flatnonzero(is_box & can_tell & (x + width <= ONE) & (y + height <= ONE))
    tiny_masks = np.flatnonzero(is_mask & can_tell & (right <= ONE) & (bottom <= ONE))
    wrong_unit = False
    if len(tiny_boxes) >= max(SEVERAL, MOST * is_box.sum()):
        wrong_unit = True
        yield "ANN_BBOX_NORMALISED", "error", tiny_boxes
    if len(tiny_masks) >= max(SEVERAL, MOST * is_mask.sum()):
        wrong_unit = True
        yield "ANN_POLYGON_NORMALISED", "error", tiny_masks
    is_off = is_mask.copy()
    is_corners = is_mask.copy()
    for rows in row_slices(len(is_off)):
        is_off[rows] &= lies_off(boxes[rows], extents[rows])
        is_corners[rows] &= are_corners(boxes[rows], extents[rows])
    corners = np.flatnonzero(is_corners)
    if not wrong_unit and len(corners) >= max(SEVERAL, CORNERS_ERROR * is_mask.sum()):
        yield "ANN_BBOX_CORNERS", "error", corners
    off_box = np.flatnonzero(is_off)
    if not wrong_unit and len(off_box) >= SEVERAL:
        severity = "error" if len(off_box) > OFF_ERROR * is_mask.sum() else "warning"
        yield "ANN_MASK_OFF_BOX", severity, off_box


def lies_off(boxes: np.ndarray, extents: np.ndarray) -> np.ndarray:
    """Which masks lie, for the most part, outside their boxes.  Arguments as above."""
    left, top, right, bottom = extents.T
    x, y, width, height = boxes.T
    # what of the mask's extent, at least a pixel each way, lies inside the box with its margin
    right = np.maximum(right, left + 1)
    bottom = np.maximum(bottom, top + 1)
    beside = MARGIN * width + MARGIN_PIXELS
    above = MARGIN * height + MARGIN_PIXELS
    inside_x = np.minimum(right, x + width + beside) - np.maximum(left, x - beside)
    inside_y = np.minimum(bottom, y + height + above) - np.maximum(top, y - above)
    inside = np.maximum(inside_x, 0) * np.maximum(inside_y, 0)
    return inside < 0.5 * (right - left) * (bottom - top)


def are_corners(boxes: np.ndarray, extents: np.ndarray) -> np.ndarray:
    """Which boxes hold the corners x1, y1, x2, y2 of their masks.  Arguments as above.

    At the image's own corner, where both forms are the same, none do.
    """
    left, top, _, _ = extents.T
    sides = np.maximum(extents[:, 2:] - extents[:, :2], 1)
    slack = np.tile(MARGIN * sides + MARGIN_PIXELS, 2)
    fits = (np.abs(boxes - extents) <= slack).all(axis=1)
    return fits & (np.maximum(left, top) > 2 * slack.max(axis=1, initial=0))
