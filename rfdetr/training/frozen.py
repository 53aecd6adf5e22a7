"""What a frozen detector gives the mask head, and what the head learns from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rfdetr.boxes import box_iou_and_giou, cxcywh_to_xyxy
from rfdetr.classes import ClassTable
from rfdetr.data.augment import draw_side, to_model_input
from rfdetr.data.loaders import Batch
from rfdetr.device import Precision
from rfdetr.losses.criterion import mask_losses
from rfdetr.losses.matcher import match
from rfdetr.models.detector import Detector
from rfdetr.models.segmentation import MaskHead, sample_in_boxes
from rfdetr.sizes import LossWeights
from rfdetr.training.engine import Progress

MATCH_IOU = 0.5  # a query that misses its object by more teaches the mask head nothing


@dataclass
class FrozenBatch:
    """A batch as the mask head sees it.

    images uint8 (n, 3, R, R); features (n, C, h, w); one list entry an image: queries (m, C), boxes (m, 4) cxcywh
    0..1 as predicted, grids uint8 (m, GRID, GRID), the object's mask inside the enlarged box; counts: of all objects,
    found by a query or not; indices: in the split; unread: as in Batch.
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
            **{name: value[part] for name, value in vars(self).items() if name != "unread"}
        )

    @property
    def objects(self) -> int:
        return sum(self.counts)


@torch.no_grad()
def freeze(
    model: Detector, batch: Batch, table: ClassTable, precision: Precision, side: int | None
) -> FrozenBatch:
    """Run the frozen detector on a batch with masks and keep what the mask head learns from.

    Objects are matched to queries as in training; matches below MATCH_IOU and objects without a mask are left out.
    """
    device = precision.device
    with precision.autocast():
        outputs = model(to_model_input(batch.images, device, side))
    rows = torch.tensor(table.rows, device=device)
    labels, truth, has_mask, masks = (
        torch.cat([t[key] for t in batch.targets]).to(device)
        for key in ("labels", "boxes", "has_mask", "masks")
    )
    counts = [len(t["labels"]) for t in batch.targets]
    ((image, query, obj),) = match([outputs], rows[labels], truth, counts, groups=1)
    boxes = outputs["pred_boxes"].float()[image, query]
    iou, _ = box_iou_and_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth[obj]))
    good = (iou > MATCH_IOU) & has_mask[obj]
    image, query, obj, boxes = image[good], query[good], obj[good], boxes[good]
    grids = (sample_in_boxes(masks[:, None], boxes, obj)[:, 0] > 0.5).to(torch.uint8)
    per_image = torch.bincount(image, minlength=len(batch)).tolist()
    queries = outputs["queries"].float()[image, query]
    lists = (list(values.split(per_image)) for values in (queries, boxes, grids))
    return FrozenBatch(batch.images, outputs["features"].float(), *lists, counts, batch.indices)


def apply_view(images: Tensor, view: int) -> Tensor:
    """Flip (..., H, W) images: bit 0 of `view` left-right, bit 1 up-down."""
    axes = [axis for bit, axis in ((1, -1), (2, -2)) if view & bit]
    return images.flip(axes) if axes else images


def flipped(sample: dict, view: int) -> dict:
    """A dataset's sample with masks under one of the views; boxes are cxcywh 0..1."""
    target, (x, y, *sides) = sample["target"], sample["target"]["boxes"].unbind(1)
    boxes = torch.stack([1 - x if view & 1 else x, 1 - y if view & 2 else y, *sides], dim=1)
    masks = apply_view(target["masks"], view)
    return sample | {
        "image": apply_view(sample["image"], view),
        "target": target | {"boxes": boxes, "masks": masks},
    }


@dataclass(frozen=True)
class MaskObjective:
    """The mask head's losses on a cached batch, or on a fresh one that the frozen detector is run on first.

    Beside them it counts the batch's objects, and those that the detector has matched: all that teaches anything.
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
        image_index = torch.repeat_interleave(torch.arange(len(batch)), counts).to(device)
        queries = torch.cat(batch.queries).to(device).float()
        boxes = torch.cat(batch.boxes).to(device)
        with self.precision.autocast():
            pixels = head.pixels(
                batch.features.to(device).float(), to_model_input(batch.images, device)
            )
            logits = head.grid_logits(pixels, queries, boxes, image_index)
        losses = mask_losses(logits, torch.cat(batch.grids).to(device), objects, self.weights)
        found = {"objects": sum(batch.counts), "matched_objects": len(queries)}
        return losses | {
            name: torch.tensor(float(count), device=device) for name, count in found.items()
        }
