"""Masks as RLE and pixels."""

from __future__ import annotations

import math

import numpy as np
import pycocotools.mask
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools import mask as mask_utils
from torch import Tensor


def encode(left: int, top: int, mask: Tensor, height: int, width: int) -> dict:
    """COCO RLE of an image-sized mask that is `mask` (h, w) at (left, top) and empty elsewhere; reads `mask` alone."""
    columns = np.zeros((mask.shape[1], mask.shape[0] + 2), dtype=np.int8)
    columns[:, 1:-1] = mask.numpy().T
    column, row = np.nonzero(
        np.diff(columns)
    )  # where pixels begin and end, down each column in turn
    edges = (left + column) * height + top + row
    # a run that reaches the bottom goes on at the top of the next column: there an end and a beginning cancel out
    edges, times = np.unique(edges, return_counts=True)
    counts = np.diff(edges[times == 1], prepend=0, append=height * width)
    counts = counts if counts[-1] else counts[:-1]  # as pycocotools writes it
    rle = pycocotools.mask.frPyObjects(
        {"size": [height, width], "counts": counts.tolist()}, height, width
    )
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def to_rle(segmentation, height: int, width: int) -> dict:
    """COCO polygons, an array (n, 4) of xywh boxes, uncompressed or compressed RLE -> compressed RLE of the image."""
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return segmentation
    rle = mask_api.frPyObjects(segmentation, height, width)
    return mask_api.merge(rle) if isinstance(rle, list) else rle


def object_area(entry: dict, height: int, width: int) -> float:
    """Of a sound annotation's mask, else of its box, in pixels of its (height, width) image."""
    if mask := entry.get("segmentation"):
        return float(mask_utils.area(to_rle(mask, height, width)))
    return float(entry["bbox"][2] * entry["bbox"][3])


def rasterise(
    segmentation: list | dict, height: int, width: int, place: np.ndarray, out: np.ndarray
) -> None:
    """Draw a sound COCO segmentation of a (height, width) image into `out`, uint8 (h, w) zeros, as ones.

    place (2, 3): the matrix that takes (x, y, 1), pixels of the image, along the axes to those of `out`. Polygons are
    placed first and drawn there. RLEs are decoded and averaged over each output pixel's area: set from a half on.
    """
    turn, shift = place[:, :2], place[:, 2]
    if polygons := isinstance(segmentation, list):
        shapes = [np.reshape(polygon, (-1, 2)) @ turn.T + shift for polygon in segmentation]
        corners = np.concatenate(shapes)
    else:
        rle = to_rle(segmentation, height, width)
        x, y, w, h = mask_utils.toBbox(rle)
        corners = np.array([[x, y], [x + w, y + h]]) @ turn.T + shift
    # nothing outside the object's own rectangle is looked at
    left, top = (max(int(least), 0) for least in corners.min(0))
    right, bottom = (
        min(math.ceil(most), side) for most, side in zip(corners.max(0), out.shape[::-1])
    )
    if left >= right or top >= bottom:
        return
    part, (w, h) = out[top:bottom, left:right], (right - left, bottom - top)
    if polygons:
        part[:] = mask_utils.decode(
            to_rle([(shape - (left, top)).ravel().tolist() for shape in shapes], h, w)
        )
        return
    seen = np.array([[left, top], [right, bottom]]) - shift
    source = np.sort(np.linalg.solve(turn, seen.T)).clip(
        0, [[width], [height]]
    )  # x x, y y in the image
    (x0, y0), (x1, y1) = np.floor(source[:, 0]).astype(int), np.ceil(source[:, 1]).astype(int)
    pixels, transposed = (
        Image.fromarray(mask_utils.decode(rle)[y0:y1, x0:x1] * np.uint8(255)),
        turn[0, 0] == 0,
    )
    source = (source.T - (x0, y0)).ravel().tolist()
    pixels = pixels.resize((h, w) if transposed else (w, h), Image.Resampling.BOX, source)
    pixels = np.asarray(pixels).T if transposed else np.asarray(pixels)
    x_step, y_step = np.sign(turn.sum(1)).astype(int)
    part[:] = pixels[::y_step, ::x_step] >= 128
