"""From a COCO split to batches: one dataset, one sampler whose order depends on seed and epoch alone."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing.queues
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.ops import box_convert
from torchvision.transforms import v2

from rfdetr.console import UserError, warn
from rfdetr.data.augment import LEAST_SIDE, place_boxes, random_view
from rfdetr.data.checks import CocoSplit
from rfdetr.data.images import load_image
from rfdetr.masks import rasterise

# of a user, a job scheduler, a terminal that goes away
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
RAM_CACHE_BYTES = 2 << 30  # decoded, resized images of small sets stay in memory


@dataclass
class Batch:
    """images uint8 (n, 3, R, R); targets, one an image: boxes (t, 4) cxcywh 0..1, labels (t,), has_mask (t,) bool,
    masks uint8 (t, R, R) where the dataset was asked for them, index (position in the split); unread: the images that
    could not be read, index -> message."""

    images: Tensor
    targets: list[dict]
    unread: dict[int, str] = field(default_factory=dict)

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
        return Batch(self.images.pin_memory(), self.targets, self.unread)


class SplitDataset(Dataset):
    """A split's images at one resolution.

    Keys are (index, seed): the seed alone decides the augmentation, so that neither the number of workers nor a resume
    changes what is seen; None means no augmentation. Where an image cannot be read, the next one of the split stands
    in for it, with the same seed, and the sample's "unread" has the reason.
    """

    def __init__(self, split: CocoSplit, resolution: int, augment: str | None, masks: bool):
        self.split, self.resolution, self.augment, self.masks = split, resolution, augment, masks
        fits = len(split.images) * 3 * resolution**2 <= RAM_CACHE_BYTES
        self.cache: dict[int, Tensor] | None = {} if fits else None  # index -> the resized image
        self.reading: Tensor | None = (
            None  # of each worker: its process id, and the image that it took last
        )

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, key: tuple[int, int | None]) -> dict:
        index, seed = key
        # crops are taken from the whole image, everything else from the resized one, which is worth keeping
        index, image, unread = self.image(index, whole=self.augment == "crops" and seed is not None)
        record, side = self.split.images[index], self.resolution
        (height, width), place = image.shape[-2:], np.eye(2, 3)
        if self.augment and seed is not None:
            # the CPU generator alone: torch.manual_seed would reach for the GPUs', at 2 ms a call
            state = torch.get_rng_state()
            torch.default_generator.manual_seed(seed)
            image, place = random_view(image, self.augment, side)
            torch.set_rng_state(state)
        place = place * [width / record.width, height / record.height, 1]
        boxes = place_boxes(record.boxes, place, side)
        kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(1))
        segmentations = [record.segmentations[i] for i in kept]
        target = {
            "boxes": box_convert(torch.from_numpy(boxes[kept] / side).float(), "xyxy", "cxcywh"),
            "labels": torch.from_numpy(record.labels[kept]),
            "has_mask": torch.tensor([s is not None for s in segmentations], dtype=torch.bool),
            "index": index,
        }
        if self.masks:
            target["masks"] = torch.zeros(len(kept), side, side, dtype=torch.uint8)
            for mask, segmentation in zip(target["masks"].numpy(), segmentations):
                if segmentation is not None:
                    rasterise(segmentation, record.height, record.width, place, mask)
        return {"image": image, "target": target, "unread": unread}

    def image(self, index: int, whole: bool = False) -> tuple[int, Tensor, dict[int, str]]:
        """The first image from `index` on that can be read: its number, its pixels, and what befell those before.

        Pixels uint8 (3, R, R), or, where the `whole` image is asked for, (3, H, W).
        """
        unread: dict[int, str] = {}
        while len(unread) < len(self):
            if self.reading is not None and (worker := get_worker_info()):
                self.reading[worker.id] = torch.tensor([os.getpid(), index])
            try:
                return index, self._read(index) if whole else self._resized(index), unread
            except UserError as error:
                unread[index] = str(error)
                index = (index + 1) % len(self)
        raise UserError(
            f"{self.split.annotation_file}: none of its images can be read. {unread[index]}"
        )

    def _resized(self, index: int) -> Tensor:
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        image = v2.functional.resize(
            self._read(index), [self.resolution] * 2, antialias=True
        ).contiguous()
        if self.cache is not None:
            self.cache[index] = image
        return image

    def _read(self, index: int) -> Tensor:
        return torch.from_numpy(load_image(self.split.images[index])).permute(2, 0, 1)  # (3, H, W)


def collate(samples: list[dict]) -> Batch:
    unread = {index: message for sample in samples for index, message in sample["unread"].items()}
    return Batch(torch.stack([s["image"] for s in samples]), [s["target"] for s in samples], unread)


def collate_without_stand_ins(samples: list[dict]) -> Batch:
    """A batch that lacks the images that could not be read."""
    batch, own = collate(samples), [not sample["unread"] for sample in samples]
    targets = [target for target, is_own in zip(batch.targets, own) if is_own]
    return batch if all(own) else Batch(batch.images[own], targets, batch.unread)


def note_unread(found: dict[int, str], known: list[int]) -> None:
    """Warn of images that could not be read, once each; their numbers are added to `known`."""
    for index in sorted(found.keys() - set(known)):
        warn(f"skipped: {found[index]}")
        known.append(index)


def check_unread(known: list[int], split: CocoSplit) -> None:
    """Raises UserError if more than 3 images and more than 1 % of a split could not be read."""
    if len(known) > max(3, len(split.images) / 100):
        files = ", ".join(split.images[index].path.name for index in known[:3])
        raise UserError(
            f"{split.annotation_file}: {len(known)} of {len(split.images)} images cannot be read ({files}, ...): too "
            "many to go on without them. python validate_setup.py --check_images 1 lists them all: replace the files "
            "or delete their entries"
        )


class EpochSampler(Sampler):
    """Lists of (index, augmentation seed), one list an optimizer step and rank.

    Each epoch is a fresh shuffle; a set with fewer than `min_steps` steps is repeated until the epoch is worth it. The
    order depends on (seed, epoch) alone; `start_step` skips what a resumed epoch has done. The incomplete last step is
    dropped.
    """

    def __init__(
        self, images: int, per_step: int, seed: int, min_steps: int, rank: int = 0, world: int = 1
    ):
        self.images, self.per_step, self.seed = images, per_step, seed
        self.rank, self.world = rank, world
        self.steps = max(images // (per_step * world), min_steps, 1)
        self.epoch, self.start_step = 0, 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return max(self.steps - self.start_step, 0)  # more processes than before have fewer steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        wanted = self.steps * self.per_step * self.world
        rounds = -(-wanted // self.images)
        order = torch.cat(
            [torch.randperm(self.images, generator=generator) for _ in range(rounds)]
        )[:wanted]
        seeds = torch.randint(2**62, (wanted,), generator=generator)
        for step in range(self.start_step, self.steps):
            first = (step * self.world + self.rank) * self.per_step
            own = slice(first, first + self.per_step)
            yield list(zip(order[own].tolist(), seeds[own].tolist()))


def outlive_one_signal(worker: int) -> None:
    """For a loader's process: Ctrl-C, torchrun and job schedulers signal it too, while the main process still needs
    its batches, up to the end of the step, and then saves. A second signal ends it."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def begin_worker(worker: int) -> None:
    """For a loader's process: one signal is outlived, and what cannot be handed on ends it.

    Batches are handed on by threads whose errors Python prints and forgets: the main process would wait for ever.
    """

    def end(error: BaseException) -> None:
        print(f"a data worker cannot hand on its images: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    def excepthook(kind: type, error: BaseException, trace: TracebackType | None) -> None:
        if is_short_of_files(error):
            end(error)
        sys.__excepthook__(kind, error, trace)

    outlive_one_signal(worker)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(
        lambda error, batch: end(error)
    )
    sys.excepthook = excepthook


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
    dataset: SplitDataset, batch: int, workers: int, rank: int = 0, world: int = 1
) -> DataLoader:
    """The split in order, without augmentation, every `world`-th image of it; without those that cannot be read."""
    keys = [(index, None) for index in range(rank, len(dataset), world)]
    batches = [keys[i : i + batch] for i in range(0, len(keys), batch)]
    return make_loader(dataset, batches, workers, collate_fn=collate_without_stand_ins)


def make_loader(
    dataset: SplitDataset,
    batches: Sampler | list,
    workers: int,
    reader: Dataset | None = None,
    **options,
) -> DataLoader:
    """A DataLoader over `dataset`, or a `reader` of it."""
    if workers:
        dataset.reading = torch.full((workers, 2), -1).share_memory_()
        if (
            len(dataset) * workers * 3 * dataset.resolution**2 > RAM_CACHE_BYTES
        ):  # each would keep its own
            dataset.cache = None
    # a loader draws from the global generator, which a resumed run must find as it was
    options |= {"worker_init_fn": begin_worker, "generator": torch.Generator()}
    return DataLoader(reader or dataset, batch_sampler=batches, num_workers=workers, **options)


def is_short_of_files(error: BaseException) -> bool:
    """Whether the system refused a process one more open file; between processes the reason comes as text alone."""
    texts = ("Too many open files", "items of ancdata")
    code = getattr(error, "errno", None)
    return code in (errno.EMFILE, errno.ENFILE) or any(text in str(error) for text in texts)


@contextlib.contextmanager
def naming_workers(dataset: SplitDataset) -> Iterator[None]:
    """Ends with a UserError that names the image where a worker of the dataset's loader dies, or what it lacks.

    torch notices that by a signal, wherever the main process is.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if is_short_of_files(error):
            raise UserError(
                f"too many files are open at once ({reason}): go on with fewer --workers, or --workers 0, or allow "
                "more in this shell with ulimit -n 4096"
            ) from error
        if not re.search(r"DataLoader worker \(pid|shared memory|\bshm\b|</torch_", str(error)):
            raise
        numbers = re.findall(r"\d+", str(error))  # its process id among them
        taken = [] if dataset.reading is None else dataset.reading.tolist()
        files = [
            str(dataset.split.images[index].path)
            for process, index in taken
            if str(process) in numbers
        ]
        raise UserError(
            f"a data worker died ({reason}) at the image {' or '.join(files) or '(unknown)'}. "
            "Either the image crashes its decoder, or memory, shared memory (/dev/shm) or file handles (ulimit -n) ran "
            "out: go on with fewer --workers, or with --workers 0"
        ) from error
