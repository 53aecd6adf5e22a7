"""One-to-one assignment of queries to objects.

Source: DETR, arXiv:2005.12872, with LW-DETR's focal class cost.  Letters: B images, G groups, Q
queries per group, K class rows, T objects of all images, t of one image.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rfdetr.boxes import box_iou_and_giou, cxcywh_to_xyxy
from rfdetr.device import to_device

try:
    from lap import lapjvr_batch  # of lapx
except ImportError:
    lapjvr_batch = None

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


class Matches(NamedTuple):
    """Pairs of a query and an object: long tensors (M,) on the CPU, sorted by image."""

    image: Tensor
    query: Tensor
    object: Tensor  # among those of all images

    def where(self, chosen: Tensor) -> Matches:
        """The pairs that `chosen` (M,) bool says."""
        return Matches(*(indices[chosen] for indices in self))


def on_device(all_matches: list[Matches], device: torch.device) -> list[Matches]:
    """The same indices on `device`, in one copy for all."""
    counts = [len(matches.image) for matches in all_matches]
    indices = torch.cat([torch.stack(matches) for matches in all_matches], dim=1)  # (3, all M)
    return [Matches(*part) for part in to_device(indices, device).split(counts, dim=1)]


@torch.no_grad()
def match(
    predictions: list[dict],
    rows: Tensor,
    boxes: Tensor,
    counts: list[int],
    groups: int,
    more_costs: list[Tensor] | None = None,
) -> list[Matches]:
    """Hungarian matching of every prediction (decoder layers and proposals) at once.

    predictions: pred_logits (B, G*Q, K) and pred_boxes (B, G*Q, 4) cxcywh 0..1 each. rows (T,) and
    boxes (T, 4) of all images' objects, image after image; counts: objects per image. Each group is
    matched on its own. more_costs: (T, G*Q) for each prediction, added to its cost.
    Returns for each prediction G times min(t, Q) pairs for each image.
    """
    image_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    image_of = to_device(image_of, boxes.device)
    corners = cxcywh_to_xyxy(boxes)[:, None]  # (T, 1, 4)
    costs = []
    for prediction in predictions:
        # one row for each object, against the queries of its own image
        logits = prediction["pred_logits"].float()[image_of, :, rows]  # (T, G*Q)
        predicted = prediction["pred_boxes"].float()[image_of]  # (T, G*Q, 4)
        _, giou = box_iou_and_giou(cxcywh_to_xyxy(predicted), corners)
        distance = (predicted - boxes[:, None]).abs().sum(-1)
        costs.append(COST_CLASS * class_cost(logits) + COST_BOX * distance - COST_GIOU * giou)
    if more_costs is not None:
        costs = [cost + more for cost, more in zip(costs, more_costs)]
    widths = [cost.shape[1] for cost in costs]
    # a cost that is not finite must not stop the assignment
    all_costs = torch.nan_to_num(torch.cat(costs, dim=1), nan=1e6).clamp(-1e6, 1e6)
    all_costs = all_costs.cpu()  # the one CPU-GPU sync point of a forward pass
    matches = []
    first = 0
    for width, same in groupby(widths):
        layers = len(list(same))
        end = first + layers * width
        matches += assign(all_costs[:, first:end], counts, groups, layers)
        first = end
    return matches


def assign(cost: Tensor, counts: list[int], groups: int, layers: int = 1) -> list[Matches]:
    """The cheapest assignment in each image, layer and group, by cost (T, L*G*Q) on the CPU."""
    problems_of_image = layers * groups
    queries = cost.shape[1] // problems_of_image
    first_query = np.arange(groups)[:, None] * queries  # (G, 1)
    parts = [np.zeros((3, layers, 0), dtype=np.int64)]
    first_object = 0
    for image, count in enumerate(counts):
        if count == 0:
            continue
        own = cost[first_object : first_object + count]  # (t, L*G*Q)
        problems = own.unflatten(1, (problems_of_image, queries)).transpose(0, 1)  # (L*G, t, Q)
        problems = problems.to(torch.double, memory_format=torch.contiguous_format)
        objects, chosen = cheapest(problems.numpy())
        chosen = chosen.reshape(layers, groups, -1) + first_query  # (L, G, min(t, Q))
        objects = objects.reshape(chosen.shape) + first_object
        pairs = np.stack((np.full_like(objects, image), chosen, objects))
        parts.append(pairs.reshape(3, layers, -1))
        first_object += count
    indices = torch.from_numpy(np.concatenate(parts, axis=2))  # (3, L, M)
    return [Matches(*of_layer) for of_layer in indices.unbind(1)]


def cheapest(problems: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each problem's cheapest assignment: rows (N, n), ascending, and their columns (N, n).

    problems (N, rows, columns) float64; n = min(rows, columns). lapx's solver, where it is
    installed, takes a fourth of the time of scipy's; both find the same least cost, in another
    assignment at most where several have it.
    """
    if lapjvr_batch is not None:
        solved = zip(*lapjvr_batch(problems, extend_cost=True, return_cost=False, n_threads=1))
    else:
        solved = map(linear_sum_assignment, problems)
    rows, columns = zip(*solved)
    return np.stack(rows), np.stack(columns)
