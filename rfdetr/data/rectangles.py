"""Masks that are no more than a box: some tools export the boxes of a detection dataset so."""

from __future__ import annotations

import numpy as np

from rfdetr.data.flat import NUMBERS, POLYGONS, FlatAnnotations, as_array, row_slices

LENGTHS = (8, 10)  # numbers of a polygon of four corners; of one that ends where it begins
SLACK = 0.5  # pixels that a corner may be off
SEVERAL = 10  # masks; fewer may well be of objects that are so
MOST = 0.5  # of a split's masks


def rectangular_masks(
    flat: FlatAnnotations, mask_kinds: np.ndarray, spans: np.ndarray, is_mask: np.ndarray
) -> np.ndarray:
    """(r,) indices of a split's masks that are upright rectangles; none where they are the lesser
    part of it.

    flat: its n annotations.  mask_kinds (n,) and spans (n, 2): as in FlatAnnotations, of what is
    usable.  is_mask (n,): which masks count.
    """
    parts = as_array(flat.parts, np.int64).reshape(-1, 2)
    numbers = as_array(flat.numbers, np.float64)
    found = [np.empty(0, np.int64)]
    for rows in row_slices(len(flat)):
        first, end = spans[rows].T
        is_single = is_mask[rows] & (mask_kinds[rows] == POLYGONS) & (end - first == 1)
        indices = np.flatnonzero(is_single)
        begins, ends = parts[first[indices]].T
        for length in LENGTHS:
            fits = ends - begins == length
            coordinates = numbers[begins[fits, None] + np.arange(length)]
            found.append(rows.start + indices[fits][are_rectangles(coordinates)])
    indices = np.sort(np.concatenate(found))
    return indices if len(indices) >= max(SEVERAL, MOST * is_mask.sum()) else indices[:0]


def are_rectangles(polygons: np.ndarray) -> np.ndarray:
    """(k,) bool: which of k polygons (k, 8 or 10), x and y in turn, go from corner to corner of
    their boxes.
    """
    points = polygons.reshape(len(polygons), polygons.shape[1] // 2, 2)
    is_closed = np.abs(points[:, 4:] - points[:, :1]).max(axis=(1, 2), initial=0) <= SLACK
    points = points[:, :4]
    low = points.min(axis=1, keepdims=True)
    high = points.max(axis=1, keepdims=True)
    is_high = np.abs(points - high) <= np.abs(points - low)  # (k, 4, 2)
    off = np.abs(points - np.where(is_high, high, low)).max(axis=(1, 2), initial=0)
    corners = is_high @ np.array([1, 2])
    has_all = (np.sort(corners, axis=1) == np.arange(4)).all(axis=1)
    # each corner differs from the next in one side alone: round the box, not across it
    goes_round = (is_high != np.roll(is_high, -1, axis=1)).sum(axis=2) == 1
    return is_closed & (off <= SLACK) & has_all & goes_round.all(axis=1)


def is_rectangle(segmentation: object) -> bool:
    """Whether an annotation's segmentation is one upright rectangle."""
    if not isinstance(segmentation, list) or len(segmentation) != 1:
        return False
    polygon = segmentation[0]
    if not isinstance(polygon, list) or len(polygon) not in LENGTHS:
        return False
    if not set(map(type, polygon)) <= NUMBERS:
        return False
    return bool(are_rectangles(np.array([polygon], np.float64))[0])
