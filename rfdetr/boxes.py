"""Box geometry on tensors.

`cxcywh` and `xyxy` name the format; units are the caller's (pixels or 0..1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre-size -> (..., 4) corners; negative sizes count as zero."""
    centre = boxes[..., :2]
    half = boxes[..., 2:].clamp(min=0) / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def _area(boxes: Tensor) -> Tensor:
    # (..., 4) xyxy -> (...)
    width = boxes[..., 2] - boxes[..., 0]
    height = boxes[..., 3] - boxes[..., 1]
    return width * height


def box_iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU (arXiv:1902.09630) of xyxy boxes that broadcast against each other.

    (n, 4) with (n, 4) gives n elementwise values; (q, 1, 4) with (1, t, 4) gives the (q, t) matrix.
    """
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = _area(a) + _area(b) - intersection
    iou = intersection / union.clamp(min=1e-9)
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)  # area of the smallest box around both
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)
