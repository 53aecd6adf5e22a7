"""One-to-one assignment of queries to objects.  Source: DETR, arXiv:2005.12872, with LW-DETR's focal class cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rfdetr.boxes import box_iou_and_giou, cxcywh_to_xyxy

COST_CLASS, COST_BOX, COST_GIOU = 2.0, 5.0, 2.0
ALPHA = 0.25


def class_cost(logits: Tensor) -> Tensor:
    """Focal cost of calling a query the class of each logit (gamma 2); any shape."""
    p = logits.sigmoid()
    return ALPHA * (1 - p) ** 2 * F.softplus(-logits) - (1 - ALPHA) * p**2 * F.softplus(logits)


@torch.no_grad()
def match(
    predictions: list[dict],
    rows: Tensor,
    boxes: Tensor,
    counts: list[int],
    groups: int,
    further: list[Tensor] | None = None,
) -> list[tuple]:
    """Hungarian matching of every prediction (decoder layers and proposals) at once.

    predictions: pred_logits (B, G*Q, K) and pred_boxes (B, G*Q, 4) cxcywh 0..1 each. rows (T,), boxes (T, 4): class
    rows and boxes of all images' objects in a row; counts: objects per image; each group is matched on its own.
    further: (T, G*Q) costs for each prediction that are added.
    Returns for each prediction (image index, query index, object index), (G*T,) long tensors on the device.
    """
    device = boxes.device
    image_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
    costs = []
    for prediction in predictions:
        # rows of the matrix: objects, each against the queries of its own image, (T, G*Q)
        logits = prediction["pred_logits"].float()[image_of, :, rows]
        guess = prediction["pred_boxes"].float()[image_of]
        _, giou = box_iou_and_giou(cxcywh_to_xyxy(guess), cxcywh_to_xyxy(boxes)[:, None])
        distance = (guess - boxes[:, None]).abs().sum(-1)
        costs.append(COST_CLASS * class_cost(logits) + COST_BOX * distance - COST_GIOU * giou)
    if further is not None:
        costs = [cost + more for cost, more in zip(costs, further)]
    # the one CPU-GPU sync point of a step; a non-finite cost must not stop the assignment
    widths = [cost.shape[1] for cost in costs]
    table = torch.nan_to_num(torch.cat(costs, dim=1), nan=1e6).clamp(-1e6, 1e6).cpu()
    matches = []
    for cost in table.split(widths, dim=1):
        per_group = cost.shape[1] // groups
        images, queries, objects, start = [], [], [], 0
        for image, count in enumerate(counts):
            for group in range(groups) if count else ():
                low = group * per_group
                found, taken = linear_sum_assignment(
                    cost[start : start + count, low : low + per_group]
                )
                images += [image] * len(found)
                queries += (taken + low).tolist()
                objects += (found + start).tolist()
            start += count
        parts = (images, queries, objects)
        matches.append(tuple(torch.tensor(part, dtype=torch.long, device=device) for part in parts))
    return matches
