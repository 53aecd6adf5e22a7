"""What a frozen detector gives the mask head, computed once and kept.

The detector never changes in stage 2, so one pass over a few fixed views of each image (flips) serves every epoch:
feature maps, the queries matched to objects, their boxes, and the objects' masks on the grid the loss looks at.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from rfdetr import distributed
from rfdetr.auto_batch import free_memory_mb
from rfdetr.boxes import box_iou_and_giou, cxcywh_to_xyxy
from rfdetr.classes import ClassTable
from rfdetr.console import UserError
from rfdetr.data.loaders import Batch, EpochSampler, SplitDataset, collate
from rfdetr.data.transforms import draw_side, to_model_input
from rfdetr.engine import Progress
from rfdetr.losses.criterion import LossWeights, mask_losses
from rfdetr.losses.matcher import match
from rfdetr.models.detector import Detector
from rfdetr.models.projector import LEVEL_SCALE
from rfdetr.models.segmentation import GRID, MaskHead, sample_in_boxes
from rfdetr.precision import Precision

MATCH_IOU = 0.5  # a query that misses its object by more teaches the mask head nothing


@dataclass
class FrozenBatch:
    """A batch as the mask head sees it.

    images uint8 (n, 3, R, R); features (n, C, h, w); one list entry an image: queries (m, C), boxes (m, 4) cxcywh
    0..1 as predicted, grids uint8 (m, GRID, GRID), the object's mask inside the enlarged box; index: in the split.
    """

    images: Tensor
    features: Tensor
    queries: list[Tensor]
    boxes: list[Tensor]
    grids: list[Tensor]
    indices: list[int]
    unread: ClassVar[dict] = {}  # the images are read when the cache is made

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice) -> FrozenBatch:
        return FrozenBatch(**{name: value[part] for name, value in vars(self).items()})

    @property
    def objects(self) -> int:
        return sum(len(boxes) for boxes in self.boxes)


@torch.no_grad()
def freeze(model: Detector, batch: Batch, table: ClassTable, precision: Precision, side: int | None) -> FrozenBatch:
    """Run the frozen detector on a batch with masks and keep what the mask head learns from.

    Objects are matched to queries as in training; matches below MATCH_IOU and objects without a mask are left out.
    """
    device = precision.device
    with precision.autocast():
        outputs = model(to_model_input(batch.images, device, side))
    rows = torch.tensor(table.rows, device=device)
    labels, truth, has_mask, masks = (
        torch.cat([t[key] for t in batch.targets]).to(device) for key in ("labels", "boxes", "has_mask", "masks")
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
    return FrozenBatch(batch.images, outputs["features"].float(), *lists, batch.indices)


def apply_view(images: Tensor, view: int) -> Tensor:
    """Flip (..., H, W) images: bit 0 of `view` left-right, bit 1 up-down."""
    axes = [axis for bit, axis in ((1, -1), (2, -2)) if view & bit]
    return images.flip(axes) if axes else images


def flipped(sample: dict, view: int) -> dict:
    """A dataset's sample with masks under one of the views; boxes are cxcywh 0..1."""
    target, (x, y, *sides) = sample["target"], sample["target"]["boxes"].unbind(1)
    boxes = torch.stack([1 - x if view & 1 else x, 1 - y if view & 2 else y, *sides], dim=1)
    masks = apply_view(target["masks"], view)
    return sample | {"image": apply_view(sample["image"], view), "target": target | {"boxes": boxes, "masks": masks}}


def bytes_needed(images: int, resolution: int, views: int, model: Detector) -> int:
    """What a cache would take, with about ten objects an image."""
    side = resolution // model.size.patch * LEVEL_SCALE[model.size.levels[0]]
    view = 2 * model.size.hidden * (side**2 + 10) + 10 * GRID**2
    return int(images * (views * view + 3 * resolution**2))


def choose_cache(mode: str, needed: int, folder: Path, multi_scale: bool) -> tuple[str, str]:
    """What becomes of `--cache`: ("ram" | "disk" | "off", why, for the user).

    auto: RAM while half of what is free suffices, else the disk of `folder`, else off.
    """
    size = f"{needed / 1e6:,.0f} MB"
    if multi_scale:
        if mode in ("ram", "disk"):
            raise UserError(f"--cache {mode} keeps features of one scale: use it with --multi_scale 0, or --cache off")
        return "off", "off, since --multi_scale 1 asks for new features at every step"
    if mode != "auto":
        return mode, "off, as asked" if mode == "off" else f"{mode}, as asked, about {size}"
    free = free_memory_mb()
    if free is None or needed < free * 2**20 / 2:
        return "ram", f"in RAM, about {size}"
    if needed < shutil.disk_usage(folder).free / 2:
        return "disk", f"on disk, about {size} (more than half of the free RAM)"
    return "off", f"off: {size} fit neither RAM nor disk"


class FeatureCache:
    """FrozenBatches of `views` fixed views of every image of a dataset.

    The features lie in RAM or, with a `folder`, in a memory-mapped file there that goes with the cache; images are kept
    once each and flipped when read.
    """

    def __init__(self, objective: MaskObjective, dataset: SplitDataset, views: int, folder: Path | None):
        model, table, precision = objective.detector, objective.table, objective.precision
        self.views = views
        self.folder = tempfile.TemporaryDirectory(dir=folder, prefix="cache_") if folder else None
        self.features: Tensor | None = None
        self.images: list[Tensor] = []
        self.objects: list[list[tuple[Tensor, ...]]] = []  # per image and view: queries fp16, boxes, grids
        model.eval()
        for index in tqdm(range(len(dataset)), desc="caching", disable=not distributed.is_main(), leave=False):
            sample = dataset[index, None]
            self.images.append(sample["image"])
            frozen = freeze(model, collate([flipped(sample, view) for view in range(views)]), table, precision, None)
            if self.features is None:
                self.features = self._allocate(len(dataset) * views, frozen.features.shape[1:])
            self.features[index * views : (index + 1) * views] = frozen.features.half().cpu()
            parts = zip(frozen.queries, frozen.boxes, frozen.grids)
            self.objects.append([(queries.half().cpu(), boxes.cpu(), grids.cpu()) for queries, boxes, grids in parts])

    def _allocate(self, count: int, shape: torch.Size) -> Tensor:
        if self.folder is None:
            return torch.empty(count, *shape, dtype=torch.float16)
        path = str(Path(self.folder.name) / "features.f16")
        flat = torch.from_file(path, shared=True, size=count * shape.numel(), dtype=torch.float16)
        return flat.view(count, *shape)

    def loader(self, sampler: EpochSampler) -> DataLoader:
        """FrozenBatches in a sampler's order."""
        return DataLoader(self, batch_sampler=sampler, collate_fn=lambda batch: batch, generator=torch.Generator())

    def __getitems__(self, keys: list[tuple[int, int]]) -> FrozenBatch:
        """The batch of (image index, any number); the number's remainder chooses the view."""
        views = [(index, seed % self.views) for index, seed in keys]
        objects = [self.objects[index][view] for index, view in views]
        images = torch.stack([apply_view(self.images[index], view) for index, view in views])
        features = self.features[[index * self.views + view for index, view in views]]
        return FrozenBatch(images, features, *map(list, zip(*objects)), [index for index, _ in views])


@dataclass(frozen=True)
class MaskObjective:
    """The mask head's losses on a cached batch, or on a fresh one that the frozen detector is run on first."""

    detector: Detector
    table: ClassTable
    weights: LossWeights
    precision: Precision
    sides: tuple[int, ...]  # multi-scale: the input sides to draw from
    seed: int
    progress: Progress

    def __call__(self, head: MaskHead, batch: Batch | FrozenBatch, objects: float) -> dict[str, Tensor]:
        device = self.precision.device
        if isinstance(batch, Batch):
            side = draw_side(self.sides, self.seed, self.progress.step) if self.sides else None
            batch = freeze(self.detector, batch, self.table, self.precision, side)
        counts = torch.tensor([len(boxes) for boxes in batch.boxes])
        image_index = torch.repeat_interleave(torch.arange(len(batch)), counts).to(device)
        queries = torch.cat(batch.queries).to(device).float()
        boxes = torch.cat(batch.boxes).to(device)
        with self.precision.autocast():
            pixels = head.pixels(batch.features.to(device).float(), to_model_input(batch.images, device))
            logits = head.grid_logits(pixels, queries, boxes, image_index)
        return mask_losses(logits, torch.cat(batch.grids).to(device), objects, self.weights)
