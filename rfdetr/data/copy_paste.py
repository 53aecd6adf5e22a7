"""Objects of one image pasted on another, which they cover.

Source of the method: "Simple Copy-Paste", arXiv:2012.07177, without its blending of edges.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from rfdetr.data.augment import LEAST_SIDE
from rfdetr.masks import extent_of_pixels

CHANCE = 0.5  # of each object with a mask to be pasted
LEAST_SEEN = 0.1  # of an object: with less of it in sight it is gone


def paste(sample: dict, other: dict) -> dict:
    """A dataset's sample with some objects of another one's on top; both with masks.

    The pixels they cover leave the masks below, whose boxes follow. An object without a mask keeps
    its box as long as LEAST_SEEN of that is free. torch's global generator draws.
    """
    theirs = other["target"]
    lies_there = theirs["has_mask"] & theirs["masks"].flatten(1).bool().any(1)
    chosen = lies_there & (torch.rand(len(lies_there)) < CHANCE)
    unread = sample["unread"] | other["unread"]
    if not chosen.any():
        return sample | {"unread": unread}
    covered = theirs["masks"][chosen].bool().any(0)  # (R, R)
    below = hidden(sample["target"], covered)
    target = {"index": sample["target"]["index"]}
    for name in ("boxes", "labels", "has_mask", "masks"):
        target[name] = torch.cat([below[name], theirs[name][chosen]])
    image = torch.where(covered, other["image"], sample["image"])
    return {"image": image, "target": target, "unread": unread}


def hidden(target: dict, covered: Tensor) -> dict[str, Tensor]:
    """What is left of a target's objects under the pixels that are covered (R, R) bool."""
    side = len(covered)
    masks = target["masks"] * ~covered
    boxes = target["boxes"].clone()
    corners = box_convert(boxes, "cxcywh", "xyxy") * side
    kept = torch.ones(len(boxes), dtype=torch.bool)
    before = target["masks"].sum((1, 2), dtype=torch.int64).tolist()
    after = masks.sum((1, 2), dtype=torch.int64).tolist()
    for i, (x1, y1, x2, y2) in enumerate(corners.tolist()):
        if not target["has_mask"][i]:
            part = covered[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)]
            kept[i] = 1 - part.float().mean() >= LEAST_SEEN
        elif after[i] < before[i]:
            seen = np.array(extent_of_pixels(masks[i].numpy()), dtype=np.float32)
            is_seen = (seen[2:] - seen[:2] >= LEAST_SIDE).all()
            kept[i] = bool(is_seen) and after[i] >= LEAST_SEEN * before[i]
            within = torch.from_numpy(seen).clamp(
                corners[i, [0, 1, 0, 1]], corners[i, [2, 3, 2, 3]]
            )
            boxes[i] = box_convert(within[None] / side, "xyxy", "cxcywh")[0]
    left = {"boxes": boxes, "labels": target["labels"], "has_mask": target["has_mask"]}
    return {name: values[kept] for name, values in (left | {"masks": masks}).items()}
