"""What a detector is trained for: its losses on a batch, and its mask head's where it has one."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from rfdetr.classes import ClassTable
from rfdetr.data.augment import draw_side, multi_scale_sides, to_model_input
from rfdetr.data.loaders import Batch
from rfdetr.device import Precision
from rfdetr.losses.criterion import detection_losses, mask_losses
from rfdetr.models.detector import Detector
from rfdetr.models.segmentation import sample_in_boxes
from rfdetr.sizes import SIZES, LossWeights
from rfdetr.training.engine import Progress


@dataclass(frozen=True)
class Objective:
    """The detector's losses on a batch of images, and its mask head's, where it has one, on the matched queries."""

    table: ClassTable
    weights: LossWeights
    precision: Precision
    sides: tuple[int, ...]  # multi-scale: the input sides to draw from
    seed: int
    progress: Progress

    def __call__(self, model: Detector, batch: Batch, objects: float) -> dict[str, Tensor]:
        device = self.precision.device
        side = draw_side(self.sides, self.seed, self.progress.step) if self.sides else None
        images = to_model_input(batch.images, device, side)
        rows = torch.tensor(self.table.rows, device=device)
        targets = [{k: v.to(device) for k, v in t.items() if k != "index"} for t in batch.targets]
        targets = [target | {"rows": rows[target["labels"]]} for target in targets]
        with self.precision.autocast():
            outputs = model(images)
        groups = model.transformer.groups
        losses, (image, query, obj) = detection_losses(
            outputs, targets, groups, objects * groups, self.weights
        )
        if model.mask_head is not None:
            has_mask = torch.cat([t["has_mask"] for t in targets])[obj]
            image, query, obj = image[has_mask], query[has_mask], obj[has_mask]
            truth = torch.cat([t["masks"] for t in targets])
            boxes = outputs["pred_boxes"].detach()[image, query]
            target = sample_in_boxes(truth[:, None], boxes, obj)[:, 0]
            with self.precision.autocast():
                pixels = model.mask_head.pixels(outputs["features"], images)
                logits = model.mask_head.grid_logits(
                    pixels, outputs["queries"][image, query], boxes, image
                )
            losses |= mask_losses(logits, target, objects * groups, self.weights)
        return losses


def input_sides(args: argparse.Namespace) -> tuple[int, ...]:
    """What multi-scale training draws each step's side from; empty where the side stays the same."""
    if not args.multi_scale:
        return ()
    return tuple(multi_scale_sides(SIZES[args.size], args.resolution, args.expanded_scales))
