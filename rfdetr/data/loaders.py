"""From a dataset to batches, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rfdetr.console import UserError, warn
from rfdetr.data.dataset import Batch, SplitDataset
from rfdetr.data.faults import FEW_SKIPPED
from rfdetr.data.records import CocoSplit
from rfdetr.data.sampling import Mix, Pool
from rfdetr.data.workers import begin_worker
from rfdetr.text import command_line


class EpochSampler(Sampler):
    """Lists of (index, augmentation seed), one list an optimizer step and rank.

    Each epoch is a fresh shuffle; a set with fewer than `min_steps` steps is repeated until the
    epoch is worth it. A `mix` says which images it is made of; its length stays that of all images
    once. The order depends on (seed, epoch) alone; `start_step` skips what a resumed epoch has
    done. The incomplete last step is dropped.
    """

    def __init__(
        self,
        images: int,
        per_step: int,
        seed: int,
        min_steps: int,
        rank: int = 0,
        world: int = 1,
        mix: Mix | None = None,
    ):
        self.mix = mix or Mix(Pool(torch.arange(images)))
        self.per_step = per_step
        self.seed = seed
        self.rank = rank
        self.world = world
        self.steps = max(images // (per_step * world), min_steps, 1)
        self.epoch = 0
        self.start_step = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch = epoch
        self.start_step = start_step

    def __len__(self) -> int:
        return max(self.steps - self.start_step, 0)  # more processes than before have fewer steps

    def order(self) -> tuple[Tensor, Tensor]:
        """(indices, seeds) of the epoch's images, those of all ranks."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        wanted = self.steps * self.per_step * self.world
        order = self.mix.draw(wanted, generator)
        return order, torch.randint(2**62, (wanted,), generator=generator)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, seeds = self.order()
        for step in range(self.start_step, self.steps):
            first = (step * self.world + self.rank) * self.per_step
            own = slice(first, first + self.per_step)
            yield list(zip(order[own].tolist(), seeds[own].tolist()))


# ---------------------------------------------------------------- loaders


def training_loader(
    dataset: SplitDataset, sampler: EpochSampler, workers: int, pin: bool
) -> DataLoader:
    return make_loader(
        dataset,
        sampler,
        workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=workers > 0,
    )


def evaluation_loader(
    dataset: SplitDataset,
    batch: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> DataLoader:
    """The split in order, without augmentation, every `world`-th image of it.

    Images that cannot be read are left out.
    """
    keys = [(index, None) for index in dataset.share_of(rank, world)]
    batches = [keys[start : start + batch] for start in range(0, len(keys), batch)]
    return make_loader(
        dataset,
        batches,
        workers,
        collate_fn=collate_without_stand_ins,
        pin_memory=pin,
        persistent_workers=workers > 0,
    )


def make_loader(
    dataset: SplitDataset,
    batches: Sampler | list,
    workers: int,
    reader: Dataset | None = None,
    *,
    collate_fn: Callable[[list], object],
    pin_memory: bool = False,
    persistent_workers: bool = False,
) -> DataLoader:
    """A DataLoader over `dataset`, or over a `reader` of it.  batches: lists of keys."""
    if workers:
        dataset.prepare_for_workers(workers)
    return DataLoader(
        reader or dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate_fn,
        pin_memory=pin_memory,
        persistent_workers=persistent_workers,
        worker_init_fn=begin_worker,
        # its own: from the global one, which a resumed run must find as it was, it would draw
        generator=torch.Generator(),
    )


def collate(samples: list[dict]) -> Batch:
    unread = {index: message for sample in samples for index, message in sample["unread"].items()}
    images = torch.stack([sample["image"] for sample in samples])
    return Batch(images, [sample["target"] for sample in samples], unread)


def collate_without_stand_ins(samples: list[dict]) -> Batch:
    """A batch that lacks the images that could not be read."""
    batch = collate(samples)
    is_own = [not sample["unread"] for sample in samples]
    if all(is_own):
        return batch
    targets = [target for target, own in zip(batch.targets, is_own) if own]
    return Batch(batch.images[is_own], targets, batch.unread)


# ---------------------------------------------------------------- images that cannot be read


def note_unread(unread: dict[int, str], known: list[int]) -> None:
    """Warn of images that could not be read (number in the whole split -> why), once each.

    Their numbers are added to `known`.
    """
    for number in sorted(unread.keys() - set(known)):
        warn(f"skipped: {unread[number]}")
        known.append(number)


def check_unread(known: list[int], split: CocoSplit) -> None:
    """Raise UserError if more than 3 images and more than 1 % of a split could not be read.

    known: their numbers in the split, which is one of whole images.
    """
    if len(known) <= max(FEW_SKIPPED, len(split.images) / 100):
        return
    files = ", ".join(split.images[number].path.name for number in known[:3])
    dataset = split.annotation_file.parent.parent
    command = command_line("python", "validate_setup.py", "--dataset", dataset)
    raise UserError(
        f"{split.annotation_file}: {len(known)} of {len(split.images)} images cannot be read "
        f"({files}, ...): too many to go on without them. "
        f"{command} lists them all: replace the files or delete their entries, or add --fix "
        "NEW_DIR for a copy without them"
    )
