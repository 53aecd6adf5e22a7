"""An image's objects as a view of it shows them: boxes, and masks where they are wanted."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.ops import box_convert

from rfdetr.data.augment import LEAST_SIDE, move_boxes
from rfdetr.data.records import ImageRecord
from rfdetr.data.tiles import cut_objects, visible_boxes
from rfdetr.masks import draw_masks, extent, inside_window, is_turned
from rfdetr.tiling import Window

CUT = 0.5  # pixels of the view by which a box has to stand out of it to be cut


def seen_of(record: ImageRecord) -> Window:
    """What is seen of an image: a tile, or all of it."""
    return record.window or Window(0, 0, record.width, record.height)


def target_of(
    record: ImageRecord,
    matrix: np.ndarray,
    side: int,
    shown: Window,
    in_part: bool,
    with_masks: bool,
) -> dict:
    """The objects in a view of side x side pixels, as dataset.Batch has them, but for the index.

    matrix (2, 3): from the image's pixels to the view's. shown: where the view shows the image.
    in_part: that is a part of a mosaic, where objects are learnt of which enough is seen.
    """
    size = (record.height, record.width)
    window = seen_of(record)
    segmentations = record.segmentations
    has_mask = np.array([segmentation is not None for segmentation in segmentations], bool)
    boxes = move_boxes(record.boxes, matrix)
    kept = np.ones(len(boxes), bool)
    if in_part:
        kept[:] = False
        kept[visible_boxes(boxes, shown)] = True
    masks = None
    if is_turned(matrix):  # what is seen of a mask then tells the box
        segmentations = [inside_window(one, *size, window) for one in segmentations]
        masks = draw_masks(segmentations, *size, matrix, side)
        clear_outside(masks, shown)
        for i in np.flatnonzero(has_mask):
            boxes[i] = extent(segmentations[i], matrix, masks[i])
    else:
        cut = np.zeros(len(boxes), bool)
        cut[cut_objects(record)] = True
        cut |= np.abs(clipped(boxes, shown) - boxes).max(axis=1, initial=0) > CUT
        for i in np.flatnonzero(cut & has_mask & kept):
            seen = inside_window(segmentations[i], *size, window)
            drawn = draw_masks([seen], *size, matrix, side)
            clear_outside(drawn, shown)
            boxes[i] = extent(seen, matrix, drawn[0])
    boxes = clipped(boxes, shown)
    kept &= (boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(1)
    kept = np.flatnonzero(kept)
    relative = torch.from_numpy(boxes[kept] / side).float()
    target = {
        "boxes": box_convert(relative, "xyxy", "cxcywh"),
        "labels": torch.from_numpy(record.labels[kept]),
        "has_mask": torch.from_numpy(has_mask[kept]),
    }
    if with_masks:
        if masks is None:
            masks = draw_masks([segmentations[i] for i in kept], *size, matrix, side)
            clear_outside(masks, shown)
        else:
            masks = masks[kept]
        target["masks"] = torch.from_numpy(masks)
    return target


def clipped(boxes: np.ndarray, window: Window) -> np.ndarray:
    """Boxes (n, 4) xyxy that end at a window; zero wide or high where they lie beyond it."""
    left, top, right, bottom = window
    return boxes.clip([left, top, left, top], [right, bottom, right, bottom])


def clear_outside(masks: np.ndarray, window: Window) -> None:
    """Take what lies outside a window of the views out of their masks (n, R, R)."""
    left, top, right, bottom = window
    masks[:, :top] = 0
    masks[:, bottom:] = 0
    masks[:, :, :left] = 0
    masks[:, :, right:] = 0
