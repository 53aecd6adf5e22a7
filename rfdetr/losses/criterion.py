"""The losses.  Sources: DETR (arXiv:2005.12872), LW-DETR's IoU-aware classification (arXiv:2406.03459), Mask2Former's
mask losses (arXiv:2112.01527) on a grid inside each box.

All are sums over objects divided by `num_boxes`, the objects of the whole effective batch (times groups), so that
batch 1 x accum 4 gives the same gradient as batch 4 x accum 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rfdetr.boxes import box_iou_and_giou, cxcywh_to_xyxy
from rfdetr.losses.matcher import match
from rfdetr.losses.points import at_points, mask_costs
from rfdetr.sizes import LossWeights

ALPHA = 0.25


def class_loss(logits: Tensor, at: tuple[Tensor, Tensor], rows: Tensor, iou: Tensor) -> Tensor:
    """IoU-aware BCE, summed.

    logits (B, Q, K); at: (image, query) indices of the matched queries; rows (n,) their class rows, iou (n,) with
    their objects. A matched query's target is p^0.25 * iou^0.75, everything else is a negative weighted by p^2.
    """
    p = logits.sigmoid()
    place = (*at, rows)
    target = (p[place].detach() ** ALPHA * iou.detach() ** (1 - ALPHA)).clamp(min=0.01)
    positive = torch.zeros_like(logits).index_put(place, target)
    negative = (p**2).index_put(place, 1 - target)
    return (positive * F.softplus(-logits) + negative * F.softplus(logits)).sum()


def detection_losses(
    outputs: dict, targets: list[dict], groups: int, num_boxes: float, weights: LossWeights
) -> tuple:
    """Weighted losses of every decoder layer and of the proposals, and the last layer's matches.

    outputs: a training forward of the Detector. targets, one an image: rows (t,) head rows, boxes (t, 4) cxcywh 0..1,
    and for an official mask head, whose masks then count in the matching too, masks (t, R, R) and has_mask (t,).
    Returns ({name: scalar}, (image index, query index, object index)); names end in _0, _1 ... for the earlier layers
    and in _enc for the proposals.
    """
    predictions = {"": outputs}
    predictions |= {f"_{i}": aux for i, aux in enumerate(outputs.get("aux_outputs", ()))}
    if "enc_outputs" in outputs:
        predictions["_enc"] = outputs["enc_outputs"]
    rows = torch.cat([t["rows"] for t in targets])
    boxes = torch.cat([t["boxes"] for t in targets])
    counts, costs = [len(t["rows"]) for t in targets], None
    with_masks = "pixels" in outputs
    if with_masks:
        masks, has_mask = (torch.cat([t[key] for t in targets]) for key in ("masks", "has_mask"))
        costs = [
            mask_costs(p, masks, has_mask, counts, weights.mask, weights.dice)
            for p in predictions.values()
        ]
    matches = match(list(predictions.values()), rows, boxes, counts, groups, costs)
    losses = {}
    for (suffix, prediction), (image, query, obj) in zip(predictions.items(), matches):
        guess, truth = prediction["pred_boxes"].float()[image, query], boxes[obj]
        iou, giou = box_iou_and_giou(cxcywh_to_xyxy(guess), cxcywh_to_xyxy(truth))
        cls = class_loss(prediction["pred_logits"].float(), (image, query), rows[obj], iou)
        losses[f"loss_class{suffix}"] = weights.cls * cls / num_boxes
        losses[f"loss_box{suffix}"] = weights.bbox * (guess - truth).abs().sum() / num_boxes
        losses[f"loss_giou{suffix}"] = weights.giou * (1 - giou).sum() / num_boxes
        if with_masks:
            image, query, obj = (index[has_mask[obj]] for index in (image, query, obj))
            points = at_points(prediction, image, query, obj, masks)
            losses |= {
                name + suffix: loss
                for name, loss in mask_losses(*points, num_boxes, weights).items()
            }
    return losses, matches[0]


def mask_losses(
    logits: Tensor, target: Tensor, num_masks: float, weights: LossWeights
) -> dict[str, Tensor]:
    """BCE and dice of mask logits (M, ...) against targets (M, ...) in 0..1, sampled in the same places."""
    logits, target = logits.float().flatten(1), target.float().flatten(1)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)
    return {
        "loss_mask": weights.mask * bce.sum() / num_masks,
        "loss_dice": weights.dice * dice.sum() / num_masks,
    }
