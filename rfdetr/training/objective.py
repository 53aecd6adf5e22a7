"""What a detector is trained for: its losses on a batch of images, and its mask head's where it has
one.
"""

from __future__ import annotations

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
        """The batch's targets with the class head's row of each object."""
        rows = torch.tensor(self.table.rows, device=device)
        targets = []
        for target in batch.targets:
            tensors = {key: value.to(device) for key, value in target.items() if key != "index"}
            targets.append(tensors | {"rows": rows[tensors["labels"]]})
        return targets

    def matched_masks(
        self, model: Detector, images: Tensor, outputs: dict, targets: list[dict], matches: tuple
    ) -> tuple[Tensor, Tensor]:
        """Mask logits and true masks (M, GRID, GRID) of the matched queries whose objects have a
        mask.
        """
        image, query, obj = matches
        has_mask = torch.cat([target["has_mask"] for target in targets])[obj]
        image = image[has_mask]
        query = query[has_mask]
        obj = obj[has_mask]
        masks = torch.cat([target["masks"] for target in targets])
        boxes = outputs["pred_boxes"].detach()[image, query]
        truth = sample_in_boxes(masks[:, None], boxes, obj)[:, 0]
        with self.precision.autocast():
            pixels = model.mask_head.pixels(outputs["features"], images)
            queries = outputs["queries"][image, query]
            logits = model.mask_head.grid_logits(pixels, queries, boxes, image)
        return logits, truth


def input_sides(settings: TrainingSettings, size: ModelSize, resolution: int) -> tuple[int, ...]:
    """What multi-scale training draws each step's side from; empty: the side stays the same."""
    if not settings.multi_scale:
        return ()
    return tuple(multi_scale_sides(size, resolution, settings.expanded_scales))
