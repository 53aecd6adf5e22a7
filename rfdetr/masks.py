"""Masks as COCO RLE and as pixels.

Masks must be sound: pycocotools' C code checks nothing.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from rfdetr.tiling import Window

PIXELS_AT_ONCE = 1 << 24  # of a mask that is encoded


def to_rle(segmentation: list | dict | np.ndarray, height: int, width: int) -> dict:
    """The mask of a (height, width) image as one compressed RLE.

    segmentation: COCO polygons, an array (n, 4) of xywh boxes, uncompressed or compressed RLE.
    """
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return segmentation
    rle = mask_api.frPyObjects(segmentation, height, width)
    return mask_api.merge(rle) if isinstance(rle, list) else rle


def encode_window(left: int, top: int, window: np.ndarray, height: int, width: int) -> dict:
    """COCO RLE of a (height, width) mask that is empty but for a window; reads the window alone.

    window (h, w): bool or 0 and 1, an array or a CPU tensor; its corner lies at (left, top).
    """
    window = np.asarray(window)
    step = max(PIXELS_AT_ONCE // max(window.shape[0], 1), 1)
    parts = [np.empty(0, dtype=np.int64)]
    for first in range(0, window.shape[1], step):
        part = window[:, first : first + step]
        columns = np.zeros((part.shape[1], part.shape[0] + 2), dtype=np.int8)
        columns[:, 1:-1] = part.T
        # where runs of pixels begin and end, down one column after the other
        column, row = np.nonzero(np.diff(columns))
        parts.append((left + first + column) * height + top + row)
    edges = np.concatenate(parts)
    # A run that reaches the bottom goes on at the top of the next column: there an end and a
    # beginning cancel out.
    edges, times = np.unique(edges, return_counts=True)
    counts = np.diff(edges[times == 1], prepend=0, append=height * width)
    if counts[-1] == 0:  # pycocotools writes no empty last run
        counts = counts[:-1]
    size = [height, width]
    rle = mask_api.frPyObjects({"size": size, "counts": counts.tolist()}, height, width)
    return {"size": size, "counts": rle["counts"].decode("ascii")}


def to_polygons(rle: dict) -> list[np.ndarray]:
    """The outlines of a mask's parts, (k, 2) x, y in pixels each; holes are filled."""
    import cv2  # here: nothing in training needs it

    left, top, width, height = mask_api.toBbox(rle).astype(int)
    if not width:
        return []
    window = mask_api.decode(rle)[top : top + height, left : left + width]
    # OpenCV's contours lead through the centres of pixels: of halves of ours, or thin parts vanish
    halves = window.repeat(2, axis=0).repeat(2, axis=1)
    outlines, _ = cv2.findContours(halves, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    corner = np.array([left, top], dtype=float)
    return [corner + (outline.reshape(-1, 2) + 0.5) / 2 for outline in outlines]


def annotation_area(entry: dict, height: int, width: int) -> float:
    """Pixels of a sound annotation's mask in its (height, width) image, else of its box.

    A mask so thin that it covers no pixel counts as none.
    """
    mask = entry.get("segmentation")
    pixels = mask_api.area(to_rle(mask, height, width)) if mask else 0
    _, _, box_width, box_height = entry["bbox"]
    return float(pixels or box_width * box_height)


def rasterise(
    segmentation: list | dict, height: int, width: int, matrix: np.ndarray, out: np.ndarray
) -> None:
    """Draw a segmentation of a (height, width) image into `out`, uint8 (h, w) zeros, as ones.

    matrix (2, 3): takes (x, y, 1) in pixels of the image to (x, y) in those of `out`.
    """
    if isinstance(segmentation, list):
        draw_polygons(segmentation, matrix, out)
        return
    rle = to_rle(segmentation, height, width)
    if is_turned(matrix):
        draw_turned_rle(rle, matrix, out)
    else:
        draw_rle(rle, matrix, out)


def draw_masks(
    segmentations: list[list | dict | None], height: int, width: int, matrix: np.ndarray, side: int
) -> np.ndarray:
    """n segmentations, each as `rasterise` draws it, uint8 (n, side, side); zeros for None."""
    masks = np.zeros((len(segmentations), side, side), np.uint8)
    for mask, segmentation in zip(masks, segmentations):
        if segmentation is not None:
            rasterise(segmentation, height, width, matrix, mask)
    return masks


def is_turned(matrix: np.ndarray) -> bool:
    """Whether a matrix (2, 3) does more than scale, move, mirror, and swap x and y."""
    return np.count_nonzero(matrix[:, :2]) > 2


def inside_window(
    segmentation: list | dict | None, height: int, width: int, window: Window
) -> list | dict | None:
    """What lies in a window of its (height, width) image; polygons that lie beyond it are gone.

    What is turned ends there; what is not turned ends where its view does.
    """
    left, top, right, bottom = window
    if isinstance(segmentation, list):
        clipped = [clip_polygon(np.reshape(one, (-1, 2)), window) for one in segmentation]
        return [polygon.ravel().tolist() for polygon in clipped if len(polygon)]
    if segmentation is None or window == (0, 0, width, height):
        return segmentation
    pixels = mask_api.decode(to_rle(segmentation, height, width))[top:bottom, left:right]
    return encode_window(left, top, pixels, height, width)


def clip_polygon(corners: np.ndarray, window: Window) -> np.ndarray:
    """The part of a polygon (k, 2) x, y in pixels that lies in a window, (m, 2); m = 0: none.

    Where it falls apart, its parts are joined along the window's rim.  Source: Sutherland and
    Hodgman, Reentrant Polygon Clipping, CACM 1974.
    """
    for axis, rim, inwards in (
        (0, window.left, 1),
        (1, window.top, 1),
        (0, window.right, -1),
        (1, window.bottom, -1),
    ):
        inside = inwards * (corners[:, axis] - rim) >= 0
        if inside.all():
            continue
        kept = []
        for i in range(len(corners)):  # the edge from the corner before it
            if inside[i] != inside[i - 1]:
                start = corners[i - 1]
                step = corners[i] - start
                kept.append(start + step * ((rim - start[axis]) / step[axis]))
            if inside[i]:
                kept.append(corners[i])
        corners = np.array(kept).reshape(-1, 2)
    return corners


def extent(
    segmentation: list | dict, matrix: np.ndarray, drawn: np.ndarray
) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) of a segmentation that `rasterise` has `drawn`: what is seen of it there.

    All zero where nothing is.  Polygons that lie in it wholly give it more exactly than pixels.
    """
    if isinstance(segmentation, list) and segmentation:
        corners = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
        corners = corners @ matrix[:, :2].T + matrix[:, 2]
        least = corners.min(0)
        most = corners.max(0)
        if (least >= 0).all() and (most <= drawn.shape[::-1]).all():
            left, top, right, bottom = extent_of_pixels(drawn)
            if right:  # clipped parts are joined along a rim, which is not seen
                least = np.maximum(least, (left - 1, top - 1))
                most = np.minimum(most, (right + 1, bottom + 1))
            return (*least.tolist(), *most.tolist())
    return extent_of_pixels(drawn)


def extent_of_pixels(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the set pixels of a mask (h, w), all 0 where there are none."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return 0, 0, 0, 0
    columns = np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def draw_polygons(polygons: list[list[float]], matrix: np.ndarray, out: np.ndarray) -> None:
    """As rasterise: polygons are moved first, and drawn where they then lie."""
    moved = [np.reshape(polygon, (-1, 2)) @ matrix[:, :2].T + matrix[:, 2] for polygon in polygons]
    if not moved:
        return
    window = window_around(np.concatenate(moved), out)
    if window is None:
        return
    left, top, right, bottom = window
    inside = [(corners - (left, top)).ravel().tolist() for corners in moved]
    rle = to_rle(inside, bottom - top, right - left)
    out[top:bottom, left:right] = mask_api.decode(rle)


def draw_rle(rle: dict, matrix: np.ndarray, out: np.ndarray) -> None:
    """As rasterise, along the axes: a pixel of `out` is set where at least half of its area is in
    the mask.
    """
    height, width = rle["size"]
    scale = matrix[:, :2]
    shift = matrix[:, 2]
    x, y, w, h = mask_api.toBbox(rle)
    corners = np.array([[x, y], [x + w, y + h]]) @ scale.T + shift
    window = window_around(corners, out)
    if window is None:
        return
    left, top, right, bottom = window
    # the part of the image under the window: [[x, x], [y, y]], ascending
    ends = np.array([[left, top], [right, bottom]]) - shift
    source = np.sort(np.linalg.solve(scale, ends.T)).clip(0, [[width], [height]])
    x0, y0 = np.floor(source[:, 0]).astype(int)
    x1, y1 = np.ceil(source[:, 1]).astype(int)
    pixels = Image.fromarray(mask_api.decode(rle)[y0:y1, x0:x1] * np.uint8(255))
    part = (source.T - (x0, y0)).ravel().tolist()
    swaps_axes = scale[0, 0] == 0
    size = (right - left, bottom - top)
    if swaps_axes:
        size = (bottom - top, right - left)
    drawn = np.asarray(pixels.resize(size, Image.Resampling.BOX, part))
    if swaps_axes:
        drawn = drawn.T
    x_step, y_step = np.sign(scale.sum(1)).astype(int)  # -1 where the axis is mirrored
    out[top:bottom, left:right] = drawn[::y_step, ::x_step] >= 128


def draw_turned_rle(rle: dict, matrix: np.ndarray, out: np.ndarray) -> None:
    """As rasterise: a pixel of `out` is set where its centre is in the mask."""
    x, y, w, h = mask_api.toBbox(rle)
    corners = np.array([[x, y], [x + w, y], [x, y + h], [x + w, y + h]])
    window = window_around(corners @ matrix[:, :2].T + matrix[:, 2], out)
    if window is None:
        return
    left, top, right, bottom = window
    centres = np.mgrid[top:bottom, left:right][::-1].reshape(2, -1) + 0.5
    sources = np.linalg.solve(matrix[:, :2], centres - matrix[:, 2:])
    columns, rows = np.floor(sources).astype(int)
    height, width = rle["size"]
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    drawn = np.zeros(centres.shape[1], dtype=np.uint8)
    drawn[inside] = mask_api.decode(rle)[rows[inside], columns[inside]]
    out[top:bottom, left:right] = drawn.reshape(bottom - top, right - left)


def window_around(points: np.ndarray, out: np.ndarray) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) of the pixels of `out` around points (n, 2) x, y; None: none.

    Nothing outside an object's own window is looked at, which is what makes drawing fast.
    """
    height, width = out.shape
    left, top = (max(int(least), 0) for least in points.min(0))
    most_x, most_y = points.max(0)
    right = min(math.ceil(most_x), width)
    bottom = min(math.ceil(most_y), height)
    if left >= right or top >= bottom:
        return None
    return left, top, right, bottom
