"""One-to-one assignment of queries to objects.

Source: DETR, arXiv:2005.12872, with LW-DETR's focal class cost.  Letters: B images, G groups, Q
queries per group, K class rows, T objects of all images, t of one image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rfdetr.boxes import box_iou_and_giou, cxcywh_to_xyxy

COST_CLASS = 2.0
COST_BOX = 5.0
COST_GIOU = 2.0
ALPHA = 0.25


def class_cost(logits: Tensor) -> Tensor:
    """Focal cost of calling a query the class of each logit (gamma 2); any shape."""
    p = logits.sigmoid()
    positive = ALPHA * (1 - p) ** 2 * F.softplus(-logits)
    negative = (1 - ALPHA) * p**2 * F.softplus(logits)
    return positive - negative


@torch.no_grad()
def match(
    predictions: list[dict],
    rows: Tensor,
    boxes: Tensor,
    counts: list[int],
    groups: int,
    more_costs: list[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Hungarian matching of every prediction (decoder layers and proposals) at once.

    predictions: pred_logits (B, G*Q, K) and pred_boxes (B, G*Q, 4) cxcywh 0..1 each. rows (T,) and
    boxes (T, 4) of all images' objects, image after image; counts: objects per image. Each group is
    matched on its own. more_costs: (T, G*Q) for each prediction, added to its cost.
    Returns for each prediction image, query and object indices, long tensors on the device of the
    boxes, G times min(t, Q) for each image.
    """
    device = boxes.device
    image_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
    costs = []
    for prediction in predictions:
        # one row for each object, against the queries of its own image
        logits = prediction["pred_logits"].float()[image_of, :, rows]  # (T, G*Q)
        predicted = prediction["pred_boxes"].float()[image_of]  # (T, G*Q, 4)
        _, giou = box_iou_and_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes)[:, None])
        distance = (predicted - boxes[:, None]).abs().sum(-1)
        costs.append(COST_CLASS * class_cost(logits) + COST_BOX * distance - COST_GIOU * giou)
    if more_costs is not None:
        costs = [cost + more for cost, more in zip(costs, more_costs)]
    widths = [cost.shape[1] for cost in costs]
    # a cost that is not finite must not stop the assignment
    all_costs = torch.nan_to_num(torch.cat(costs, dim=1), nan=1e6).clamp(-1e6, 1e6)
    all_costs = all_costs.cpu()  # the one CPU-GPU sync point of a step
    matches = []
    for cost in all_costs.split(widths, dim=1):
        indices = assign(cost, counts, groups)
        image, query, obj = (torch.tensor(i, dtype=torch.long, device=device) for i in indices)
        matches.append((image, query, obj))
    return matches


def assign(cost: Tensor, counts: list[int], groups: int) -> tuple[list[int], list[int], list[int]]:
    """The cheapest assignment in each image and group, by cost (T, G*Q).

    Returns image, query and object indices.
    """
    group_size = cost.shape[1] // groups
    images: list[int] = []
    queries: list[int] = []
    objects: list[int] = []
    first_object = 0
    for image, count in enumerate(counts):
        if count == 0:
            continue
        own_costs = cost[first_object : first_object + count]  # (t, G*Q)
        for group, group_costs in enumerate(own_costs.split(group_size, dim=1)):
            chosen_objects, chosen_queries = linear_sum_assignment(group_costs)
            images += [image] * len(chosen_objects)
            queries += (chosen_queries + group * group_size).tolist()
            objects += (chosen_objects + first_object).tolist()
        first_object += count
    return images, queries, objects
