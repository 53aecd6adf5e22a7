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
from rfdetr.losses.matcher import match
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
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Weighted losses of every decoder layer and of the proposals, and the last layer's matches.

    outputs: a training forward of the Detector.
    targets, one an image: rows (t,) of the class head, boxes (t, 4) cxcywh 0..1, and for an
    official mask head, whose masks then count in the matching too, masks (t, R, R), has_mask (t,).
    Returns ({name: scalar}, (image index, query index, object index)); names end in _0, _1 ... for
    the earlier layers and in _enc for the proposals.
    """
    predictions = {"": outputs}
    for i, earlier_layer in enumerate(outputs.get("aux_outputs", ())):
        predictions[f"_{i}"] = earlier_layer
    if "enc_outputs" in outputs:
        predictions["_enc"] = outputs["enc_outputs"]
    rows = torch.cat([target["rows"] for target in targets])  # (T,)
    boxes = torch.cat([target["boxes"] for target in targets])  # (T, 4)
    counts = [len(target["rows"]) for target in targets]
    with_masks = "pixels" in outputs
    costs = None
    if with_masks:
        masks = torch.cat([target["masks"] for target in targets])  # (T, R, R)
        has_mask = torch.cat([target["has_mask"] for target in targets])  # (T,)
        costs = [
            mask_costs(prediction, masks, has_mask, counts, weights)
            for prediction in predictions.values()
        ]
    matches = match(list(predictions.values()), rows, boxes, counts, groups, costs)
    losses = {}
    for (suffix, prediction), (image, query, obj) in zip(predictions.items(), matches):
        parts = matched_losses(
            prediction, (image, query), rows[obj], boxes[obj], num_boxes, weights
        )
        if with_masks:
            labelled = has_mask[obj]
            matched = (image[labelled], query[labelled], obj[labelled])
            logits, truth = sample_matched_masks(prediction, matched, masks)  # (M, P) each
            parts |= mask_losses(logits, truth, num_boxes, weights)
        for name, loss in parts.items():
            losses[name + suffix] = loss
    return losses, matches[0]


def matched_losses(
    prediction: dict,
    matched: tuple[Tensor, Tensor],
    rows: Tensor,
    boxes: Tensor,
    num_boxes: float,
    weights: LossWeights,
) -> dict[str, Tensor]:
    """The weighted class, box and GIoU losses of one layer.

    matched: image and query indices (M,); rows (M,) and boxes (M, 4) cxcywh 0..1: their objects'.
    """
    predicted = prediction["pred_boxes"].float()[matched]  # (M, 4)
    iou, giou = box_iou_and_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes))
    classes = class_loss(prediction["pred_logits"].float(), matched, rows, iou)
    return {
        "loss_class": weights.cls * classes / num_boxes,
        "loss_box": weights.bbox * (predicted - boxes).abs().sum() / num_boxes,
        "loss_giou": weights.giou * (1 - giou).sum() / num_boxes,
    }


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
