"""What a frozen detector gives the mask head, and what the head learns from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rfdetr.boxes import box_iou_and_giou, cxcywh_to_xyxy
from rfdetr.classes import ClassTable
from rfdetr.data.augment import draw_side, to_model_input
from rfdetr.data.dataset import Batch
from rfdetr.device import Precision, copied_by_next_wait, to_device
from rfdetr.losses.criterion import mask_losses
from rfdetr.losses.matcher import match, on_device
from rfdetr.models.detector import Detector
from rfdetr.models.segmentation import MaskHead, sample_in_boxes
from rfdetr.sizes import LossWeights
from rfdetr.training.engine import Progress

MATCH_IOU = 0.5  # a query that misses its object by more teaches the mask head nothing


@dataclass
class FrozenBatch:
    """A batch as the mask head sees it.

    images uint8 (n, 3, R, R); features (n, C, h, w); one list entry an image: queries (m, C), boxes
    (m, 4) cxcywh 0..1 as predicted, grids uint8 (m, GRID, GRID), the object's mask inside the
    enlarged box; counts: of all objects, found by a query or not; indices: in the split; unread: as
    in Batch.
    """

    images: Tensor
    features: Tensor
    queries: list[Tensor]
    boxes: list[Tensor]
    grids: list[Tensor]
    counts: list[int]
    indices: list[int]
    unread: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice) -> FrozenBatch:
        return FrozenBatch(
            images=self.images[part],
            features=self.features[part],
            queries=self.queries[part],
            boxes=self.boxes[part],
            grids=self.grids[part],
            counts=self.counts[part],
            indices=self.indices[part],
        )

    @property
    def objects(self) -> int:
        return sum(self.counts)

    def pin_memory(self) -> FrozenBatch:
        """With images and features where a GPU reads them by itself; the rest is small."""
        images = self.images.pin_memory()
        return replace(self, images=images, features=self.features.pin_memory())


@torch.no_grad()
def freeze(
    model: Detector, batch: Batch, table: ClassTable, precision: Precision, side: int | None
) -> FrozenBatch:
    """Run the frozen detector on a batch with masks and keep what the mask head learns from.

    Objects are matched to queries as in training; matches below MATCH_IOU and objects without a
    mask are left out.
    """
    device = precision.device
    with precision.autocast():
        outputs = model(to_model_input(batch.images, device, side))
    predicted = outputs["pred_boxes"].float()  # (B, Q, 4)
    predicted_on_cpu = copied_by_next_wait(predicted)  # match waits for its costs
    labels = torch.cat([target["labels"] for target in batch.targets])
    rows = torch.tensor(table.rows)[labels]
    true_boxes = torch.cat([target["boxes"] for target in batch.targets])
    has_mask = torch.cat([target["has_mask"] for target in batch.targets])
    masks = torch.cat([to_device(target["masks"], device) for target in batch.targets])
    counts = [len(target["labels"]) for target in batch.targets]
    (matches,) = match(
        [outputs], to_device(rows, device), to_device(true_boxes, device), counts, groups=1
    )
    boxes = predicted_on_cpu[matches.image, matches.query]
    objects = true_boxes[matches.object]
    iou, _ = box_iou_and_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(objects))
    kept = matches.where((iou > MATCH_IOU) & has_mask[matches.object])
    per_image = torch.bincount(kept.image, minlength=len(batch)).tolist()
    (there,) = on_device([kept], device)
    boxes = predicted[there.image, there.query]
    grids = sample_in_boxes(masks[there.object], boxes) > 0.5  # (m, GRID, GRID)
    queries = outputs["queries"].float()[there.image, there.query]
    return FrozenBatch(
        images=batch.images,
        features=outputs["features"].float(),
        queries=list(queries.split(per_image)),
        boxes=list(boxes.split(per_image)),
        grids=list(grids.to(torch.uint8).split(per_image)),
        counts=counts,
        indices=batch.indices,
    )


LEFT_RIGHT = 1  # bits of a view's number
UP_DOWN = 2


def flipped_axes(view: int) -> tuple[int, ...]:
    """The axes of (..., H, W) images that the bits of `view` flip."""
    axes = []
    if view & LEFT_RIGHT:
        axes.append(-1)
    if view & UP_DOWN:
        axes.append(-2)
    return tuple(axes)


def apply_view(images: Tensor, view: int) -> Tensor:
    """Flip (..., H, W) images as the bits of `view` say."""
    axes = flipped_axes(view)
    return images.flip(axes) if axes else images


def flipped(sample: dict, view: int) -> dict:
    """A dataset's sample with masks under one of the views; boxes are cxcywh 0..1."""
    target = sample["target"]
    x, y, width, height = target["boxes"].unbind(1)
    if view & LEFT_RIGHT:
        x = 1 - x
    if view & UP_DOWN:
        y = 1 - y
    boxes = torch.stack([x, y, width, height], dim=1)
    masks = apply_view(target["masks"], view)
    image = apply_view(sample["image"], view)
    return sample | {"image": image, "target": target | {"boxes": boxes, "masks": masks}}


@dataclass(frozen=True)
class MaskObjective:
    """The mask head's losses on a cached batch, or on a fresh one that the frozen detector is run
    on first.

    Beside them it counts the batch's objects, and those that the detector has matched: all that
    teaches anything.
    """

    detector: Detector
    table: ClassTable
    weights: LossWeights
    precision: Precision
    sides: tuple[int, ...]  # multi-scale: the input sides to draw from
    seed: int
    progress: Progress

    def __call__(
        self, head: MaskHead, batch: Batch | FrozenBatch, objects: float
    ) -> dict[str, Tensor]:
        device = self.precision.device
        if isinstance(batch, Batch):
            side = draw_side(self.sides, self.seed, self.progress.step) if self.sides else None
            batch = freeze(self.detector, batch, self.table, self.precision, side)
        counts = torch.tensor([len(boxes) for boxes in batch.boxes])
        image_index = torch.repeat_interleave(torch.arange(len(batch)), counts)
        queries = to_device(torch.cat(batch.queries), device).float()
        boxes = to_device(torch.cat(batch.boxes), device)
        truth = to_device(torch.cat(batch.grids), device)
        features = to_device(batch.features, device).float()
        images = to_model_input(batch.images, device)
        with self.precision.autocast():
            pixels = head.pixels(features, images)
            logits = head.grid_logits(pixels, queries, boxes, image_index)
        losses = mask_losses(logits, truth, objects, self.weights)
        losses["objects"] = torch.full((), float(batch.objects), device=device)
        losses["matched_objects"] = torch.full((), float(len(queries)), device=device)
        return losses
