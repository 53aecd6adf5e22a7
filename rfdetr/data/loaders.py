"""From a COCO split to batches: one dataset, one sampler whose order depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2

from rfdetr.data.coco import CocoSplit, load_image, rasterise
from rfdetr.data.transforms import training_transform

RAM_CACHE_BYTES = 2 << 30  # decoded, resized images of small sets stay in memory


@dataclass
class Batch:
    """images uint8 (n, 3, R, R); targets, one an image: boxes (t, 4) cxcywh 0..1, labels (t,), has_mask (t,) bool,
    masks uint8 (t, R, R) where the dataset was asked for them, index (position in the split)."""

    images: Tensor
    targets: list[dict]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.images[part], self.targets[part])

    @property
    def objects(self) -> int:
        return sum(len(target["labels"]) for target in self.targets)

    @property
    def indices(self) -> list[int]:
        return [target["index"] for target in self.targets]

    def pin_memory(self) -> Batch:
        return Batch(self.images.pin_memory(), self.targets)


class SplitDataset(Dataset):
    """A split's images at one resolution.

    Keys are (index, seed): the seed alone decides the augmentation, so that neither the number of workers nor a resume
    changes what is seen; None means no augmentation.
    """

    def __init__(self, split: CocoSplit, resolution: int, augment: str | None, masks: bool):
        self.split, self.resolution, self.masks = split, resolution, masks
        self.augment = training_transform(augment, resolution) if augment else None
        # everything but crops works on the resized image
        self.resize_first = augment != "crops"
        fits = len(split.images) * 3 * resolution**2 <= RAM_CACHE_BYTES
        self.cache: dict[int, Tensor] | None = {} if fits else None  # index -> what image() returns

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, key: tuple[int, int | None]) -> dict:
        index, seed = key
        sample = self._read(index)
        if self.augment is not None and seed is not None:
            # the CPU generator alone: torch.manual_seed would reach for the GPUs', at 2 ms a call
            state = torch.get_rng_state()
            torch.default_generator.manual_seed(seed)
            sample = self.augment(sample)
            torch.set_rng_state(state)
        elif not self.resize_first:  # an image that is otherwise cropped, as a whole
            sample = v2.Resize((self.resolution, self.resolution), antialias=True)(sample)
        height, width = sample["image"].shape[-2:]
        boxes = box_convert(torch.as_tensor(sample["boxes"]).float(), "xyxy", "cxcywh")
        target = {key: torch.as_tensor(sample[key]) for key in ("labels", "has_mask", "masks") if key in sample}
        target |= {"boxes": boxes / torch.tensor([width, height, width, height]), "index": index}
        return {"image": torch.as_tensor(sample["image"]), "target": target}

    def image(self, index: int) -> Tensor:
        """The resized picture alone, uint8 (3, R, R); small sets' stay in memory.  Raises UserError as load_image."""
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        picture = torch.from_numpy(load_image(self.split.images[index])).permute(2, 0, 1)
        picture = v2.functional.resize(picture, [self.resolution] * 2, antialias=True).contiguous()
        if self.cache is not None:
            self.cache[index] = picture
        return picture

    def _read(self, index: int) -> dict:
        """The decoded sample: image uint8 (3, H, W), boxes xyxy pixels, labels, masks."""
        record = self.split.images[index]
        height, width = record.height, record.width
        boxes = torch.from_numpy(record.boxes).float()
        if self.resize_first:
            image = self.image(index)
            boxes = boxes * self.resolution / torch.tensor([width, height, width, height])
        else:
            image = torch.from_numpy(load_image(record)).permute(2, 0, 1).contiguous()
        side = tuple(image.shape[-2:])
        sample = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(boxes.reshape(-1, 4), format="XYXY", canvas_size=side),
            "labels": torch.from_numpy(record.labels),
            "has_mask": torch.tensor([s is not None for s in record.segmentations], dtype=torch.bool),
        }
        if self.masks:
            masks = np.zeros((len(record.labels), *side), dtype=np.uint8)
            for i, segmentation in enumerate(record.segmentations):
                if segmentation is not None:
                    masks[i] = rasterise(segmentation, height, width, *side)
            sample["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return sample


def collate(samples: list[dict]) -> Batch:
    return Batch(torch.stack([s["image"] for s in samples]), [s["target"] for s in samples])


class EpochSampler(Sampler):
    """Lists of (index, augmentation seed), one list an optimizer step and rank.

    Each epoch is a fresh shuffle; a set with fewer than `min_steps` steps is repeated until the epoch is worth it. The
    order depends on (seed, epoch) alone; `start_step` skips what a resumed epoch has done. The incomplete last step is
    dropped.
    """

    def __init__(self, images: int, per_step: int, seed: int, min_steps: int, rank: int = 0, world: int = 1):
        self.images, self.per_step, self.seed = images, per_step, seed
        self.rank, self.world = rank, world
        self.steps = max(images // (per_step * world), min_steps, 1)
        self.epoch, self.start_step = 0, 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        wanted = self.steps * self.per_step * self.world
        rounds = -(-wanted // self.images)
        order = torch.cat([torch.randperm(self.images, generator=generator) for _ in range(rounds)])[:wanted]
        seeds = torch.randint(2**62, (wanted,), generator=generator)
        keys = list(zip(order.tolist(), seeds.tolist()))
        for step in range(self.start_step, self.steps):
            first = (step * self.world + self.rank) * self.per_step
            yield keys[first : first + self.per_step]


def training_loader(dataset: SplitDataset, sampler: EpochSampler, workers: int, pin: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # a loader draws from the global one, which a resumed run must find as it was
    )


def evaluation_loader(dataset: SplitDataset, batch: int, workers: int, rank: int = 0, world: int = 1) -> DataLoader:
    """The split in order, without augmentation, every `world`-th image of it."""
    keys = [(index, None) for index in range(rank, len(dataset), world)]
    batches = [keys[i : i + batch] for i in range(0, len(keys), batch)]
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, generator=torch.Generator()
    )
