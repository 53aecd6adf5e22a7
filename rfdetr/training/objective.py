"""What a detector is trained for: its losses on a batch of images, and its mask head's where it has
one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfdetr.classes import ClassTable
from rfdetr.data.augment import draw_side, multi_scale_sides, to_model_input
from rfdetr.data.dataset import Batch
from rfdetr.device import Precision, to_device
from rfdetr.losses.criterion import detection_losses, mask_losses
from rfdetr.losses.matcher import Matches, on_device
from rfdetr.models.detector import Detector
from rfdetr.models.segmentation import sample_in_boxes
from rfdetr.settings import TrainingSettings
from rfdetr.sizes import LossWeights, ModelSize
from rfdetr.training.engine import Progress


@dataclass(frozen=True)
class DetectorObjective:
    """losses(model, batch, objects) -> {name: weighted scalar}; a mask head learns on the matched
    queries.
    """

    table: ClassTable
    weights: LossWeights
    precision: Precision
    sides: tuple[int, ...]  # multi-scale: the input sides to draw from; empty: the images' own
    seed: int
    progress: Progress

    def __call__(self, model: Detector, batch: Batch, objects: float) -> dict[str, Tensor]:
        device = self.precision.device
        side = draw_side(self.sides, self.seed, self.progress.step) if self.sides else None
        images = to_model_input(batch.images, device, side)
        targets = self.targets_on(device, batch)
        with self.precision.autocast():
            outputs = model(images)
        groups = model.transformer.groups
        losses, matches = detection_losses(outputs, targets, groups, objects * groups, self.weights)
        if model.mask_head is not None:
            logits, truth = self.matched_masks(model, images, outputs, targets, matches)
            losses |= mask_losses(logits, truth, objects * groups, self.weights)
        return losses

    def targets_on(self, device: torch.device, batch: Batch) -> list[dict[str, Tensor]]:
        """The batch's targets as detection_losses takes them; has_mask stays on the CPU."""
        counts = [len(target["labels"]) for target in batch.targets]
        labels = torch.cat([target["labels"] for target in batch.targets])
        rows = torch.tensor(self.table.rows)[labels]
        boxes = torch.cat([target["boxes"] for target in batch.targets])
        rows_of_images = to_device(rows, device).split(counts)
        boxes_of_images = to_device(boxes, device).split(counts)
        targets = []
        for i, target in enumerate(batch.targets):
            own = {"rows": rows_of_images[i], "boxes": boxes_of_images[i]}
            own["has_mask"] = target["has_mask"]
            if "masks" in target:
                own["masks"] = to_device(target["masks"], device)
            targets.append(own)
        return targets

    def matched_masks(
        self, model: Detector, images: Tensor, outputs: dict, targets: list[dict], matches: Matches
    ) -> tuple[Tensor, Tensor]:
        """Mask logits and true masks (M, GRID, GRID) of the matched queries whose objects have a
        mask.
        """
        has_mask = torch.cat([target["has_mask"] for target in targets])
        labelled = matches.where(has_mask[matches.object])
        (there,) = on_device([labelled], images.device)
        masks = torch.cat([target["masks"] for target in targets])
        boxes = outputs["pred_boxes"].detach()[there.image, there.query]
        truth = sample_in_boxes(masks[there.object], boxes)
        with self.precision.autocast():
            pixels = model.mask_head.pixels(outputs["features"], images)
            queries = outputs["queries"][there.image, there.query]
            logits = model.mask_head.grid_logits(pixels, queries, boxes, labelled.image)
        return logits, truth


def input_sides(settings: TrainingSettings, size: ModelSize, resolution: int) -> tuple[int, ...]:
    """What multi-scale training draws each step's side from; empty: the side stays the same."""
    if not settings.multi_scale:
        return ()
    return tuple(multi_scale_sides(size, resolution, settings.expanded_scales))
