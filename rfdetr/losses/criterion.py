"""The losses.

Sources: DETR (arXiv:2005.12872), LW-DETR's IoU-aware classification (arXiv:2406.03459),
Mask2Former's mask losses (arXiv:2112.01527) on a grid inside each box.

All are sums over objects divided by `num_boxes`, the objects of the whole effective batch (times
groups), so that batch 1 x accum 4 gives the same gradient as batch 4 x accum 1.

Letters: B images, G groups, Q queries per group, K class rows, T objects of all images, M matched
queries, P points, R side of the true masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rfdetr.boxes import box_iou_and_giou, cxcywh_to_xyxy
from rfdetr.device import to_device
from rfdetr.losses.matcher import Matches, match, on_device
from rfdetr.losses.points import mask_costs, sample_matched_masks
from rfdetr.sizes import LossWeights

ALPHA = 0.25


def class_loss(logits: Tensor, matched: tuple[Tensor, Tensor], rows: Tensor, iou: Tensor) -> Tensor:
    """IoU-aware BCE, summed.

    logits (B, Q, K); matched: image and query indices (M,) of the matched queries; rows (M,) their
    class rows; iou (M,) with their objects. The target of a matched query is p^0.25 * iou^0.75 at
    its row; everything else is a negative, weighted by p^2.
    """
    p = logits.sigmoid()
    index = (*matched, rows)
    target = p[index].detach() ** ALPHA * iou.detach() ** (1 - ALPHA)  # (M,)
    target = target.clamp(min=0.01)
    positive = torch.zeros_like(logits).index_put(index, target)  # (B, Q, K)
    negative = (p**2).index_put(index, 1 - target)
    return (positive * F.softplus(-logits) + negative * F.softplus(logits)).sum()


def detection_losses(
    outputs: dict, targets: list[dict], groups: int, num_boxes: float, weights: LossWeights
) -> tuple[dict[str, Tensor], Matches]:
    """Weighted losses of every decoder layer and of the proposals, and the last layer's matches.

    outputs: a training forward of the Detector.
    targets, one an image: rows (t,) of the class head, boxes (t, 4) cxcywh 0..1, and for an
    official mask head, whose masks then count in the matching too, masks (t, R, R) and, on the CPU,
    has_mask (t,) bool.
    Returns ({name: scalar}, matches); names end in _0, _1 ... for the earlier layers and in _enc
    for the proposals.
    """
    predictions = {"": outputs}
    for i, earlier_layer in enumerate(outputs.get("aux_outputs", ())):
        predictions[f"_{i}"] = earlier_layer
    if "enc_outputs" in outputs:
        predictions["_enc"] = outputs["enc_outputs"]
    layers = list(predictions.values())
    rows = torch.cat([target["rows"] for target in targets])  # (T,)
    boxes = torch.cat([target["boxes"] for target in targets])  # (T, 4)
    counts = [len(target["rows"]) for target in targets]
    with_masks = "pixels" in outputs
    costs = None
    if with_masks:
        masks = torch.cat([target["masks"] for target in targets])  # (T, R, R)
        has_mask = torch.cat([target["has_mask"] for target in targets])  # (T,)
        costs = [
            mask_costs(layer, masks, to_device(has_mask, boxes.device), counts, weights)
            for layer in layers
        ]
    matches = match(layers, rows, boxes, counts, groups, costs)
    of_layers = matched_losses(layers, matches, rows, boxes, num_boxes, weights)
    if with_masks:
        labelled = [pairs.where(has_mask[pairs.object]) for pairs in matches]
        for losses, layer, pairs in zip(of_layers, layers, labelled):
            logits, truth = sample_matched_masks(layer, pairs, masks)  # (M, P) each
            losses |= mask_losses(logits, truth, num_boxes, weights)
    named = {}
    for suffix, losses in zip(predictions, of_layers):
        for name, loss in losses.items():
            named[name + suffix] = loss
    return named, matches[0]


def matched_losses(
    layers: list[dict],
    matches: list[Matches],
    rows: Tensor,
    boxes: Tensor,
    num_boxes: float,
    weights: LossWeights,
) -> list[dict[str, Tensor]]:
    """The weighted class, box and GIoU losses of each layer.

    rows (T,), boxes (T, 4) cxcywh 0..1: of all objects. Boxes are compared in all layers at once.
    """
    matches = on_device(matches, boxes.device)
    counts = [len(pairs.image) for pairs in matches]
    predicted = torch.cat(
        [
            layer["pred_boxes"].float()[pairs.image, pairs.query]
            for layer, pairs in zip(layers, matches)
        ]
    )  # (M of all layers, 4)
    objects = torch.cat([pairs.object for pairs in matches])
    true = boxes[objects]
    true_rows = rows[objects].split(counts)
    iou, giou = box_iou_and_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(true))
    distances = (predicted - true).abs().split(counts)
    misses = (1 - giou).split(counts)
    losses = []
    for i, (layer, pairs, own_iou) in enumerate(zip(layers, matches, iou.split(counts))):
        matched = (pairs.image, pairs.query)
        classes = class_loss(layer["pred_logits"].float(), matched, true_rows[i], own_iou)
        losses.append(
            {
                "loss_class": weights.cls * classes / num_boxes,
                "loss_box": weights.bbox * distances[i].sum() / num_boxes,
                "loss_giou": weights.giou * misses[i].sum() / num_boxes,
            }
        )
    return losses


def mask_losses(
    logits: Tensor, target: Tensor, num_masks: float, weights: LossWeights
) -> dict[str, Tensor]:
    """BCE and dice of mask logits (M, ...) against targets (M, ...) in 0..1 at the same points."""
    logits = logits.float().flatten(1)  # (M, P)
    target = target.float().flatten(1)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)  # (M,)
    p = logits.sigmoid()
    overlap = 2 * (p * target).sum(1) + 1
    dice = 1 - overlap / (p.sum(1) + target.sum(1) + 1)  # (M,)
    return {
        "loss_mask": weights.mask * bce.sum() / num_masks,
        "loss_dice": weights.dice * dice.sum() / num_masks,
    }
