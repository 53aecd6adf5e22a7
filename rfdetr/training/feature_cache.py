"""What a frozen detector gives the mask head, computed once and kept.

The detector never changes in stage 2, so one look at a few fixed views of each image (flips) serves
every epoch and every later run: feature maps, the queries matched to objects, their boxes, and the
objects' masks on the grid the loss looks at. A view is computed when an epoch first draws it.
Images are not kept: they are read and flipped.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rfdetr import distributed
from rfdetr.console import UserError, tick, warn
from rfdetr.data import guess
from rfdetr.data.loaders import EpochSampler, SplitDataset, collate, make_loader
from rfdetr.data.records import CocoSplit
from rfdetr.device import free_memory_mb
from rfdetr.files import free_disk
from rfdetr.models.projector import LEVEL_SCALE
from rfdetr.models.segmentation import ENLARGE, GRID
from rfdetr.progress import ProgressBar
from rfdetr.sizes import ModelSize
from rfdetr.training import frozen
from rfdetr.training.frozen import FrozenBatch, MaskObjective, apply_view, flipped, freeze
from rfdetr.weights import checkpoint

FORMAT = 1  # of the cache's file, and of how its content is computed
SAMPLES = 8  # blocks that are read of an image's file to know it again
BLOCK = 8 << 10  # bytes
SPARE_DISK = 64 << 20  # bytes to leave free


def sample_of_file(path: Path) -> bytes:
    """sha256 of a file's content: all of a small one, of a larger one SAMPLES blocks from its
    beginning to its end.

    Size and time alone are not enough: they are often restored with a copy. Empty where the file
    cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= SAMPLES * BLOCK:
                digest.update(file.read())
                return digest.digest()
            for block in range(SAMPLES):
                file.seek(block * (size - BLOCK) // (SAMPLES - 1))
                digest.update(file.read(BLOCK))
    except OSError:  # training reads it later, and says so
        return b""
    return digest.digest()


def in_mb(size: int) -> str:
    return f"{math.ceil(size / 1e6):,} MB"


@dataclass(frozen=True)
class CacheChoice:
    """Where the features go, "ram", "disk" or "off", and why, for the user."""

    where: str
    why: str


def choose_cache(mode: str, cache: FeatureCache, multi_scale: bool) -> CacheChoice:
    """What becomes of `--cache`.

    auto: disk while it has twice what is missing there (the system keeps in memory what fits), else
    RAM while half of what is free suffices for every rank, else off.  Raises UserError where what
    was asked for cannot be.
    """
    if multi_scale:
        if mode in ("ram", "disk"):
            raise UserError(
                f"--cache {mode} keeps features of one scale: use it with --multi_scale 0, "
                "or --cache off"
            )
        return CacheChoice("off", "off, since --multi_scale 1 asks for new features at every step")
    if mode == "off":
        return CacheChoice("off", "off, as asked")
    views, _, missing = cache.saved()
    folder = cache.path.parent
    disk = free_disk(folder)
    short = f"the disk of {folder.parent} has {in_mb(disk)} free, {in_mb(missing)} are missing"
    if mode == "disk" and disk < missing + SPARE_DISK:
        raise UserError(
            f"--cache disk: {short}. Free some space there, or use --cache ram or --cache off"
        )
    if mode == "disk" or (mode == "auto" and 2 * missing + SPARE_DISK < disk):
        asked = ", as asked" if mode == "disk" else ""
        whole = in_mb(cache.bytes)
        total = f"{views:,} of {len(cache.states):,} views there, about {whole} in all"
        return CacheChoice("disk", f"on disk{asked}, {folder}, {total}")
    needed = cache.bytes * distributed.world_size()
    if mode == "ram":
        return CacheChoice("ram", f"in RAM, as asked, about {in_mb(needed)}")
    if needed < free_memory_mb() * 2**20 / 2:
        return CacheChoice("ram", f"in RAM, about {in_mb(needed)}: {short}")
    return CacheChoice(
        "off", f"off: half of the free RAM is less than about {in_mb(needed)}, and {short}"
    )


def feature_shape(size: ModelSize, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of the finest feature map, which mask heads read."""
    side = int(resolution // size.patch * LEVEL_SCALE[size.levels[0]])
    return size.hidden, side, side


def fits_in_memory(split: CocoSplit, size: ModelSize, resolution: int) -> bool:
    """Whether a frozen detector's outputs on a whole split may be kept: a quarter of the free
    memory.
    """
    features = 4 * math.prod(feature_shape(size, resolution))  # fp32
    queries = 4 * size.hidden * size.select
    pixels = 3 * resolution**2
    return len(split.images) * (features + queries + pixels) < free_memory_mb() * 2**20 / 4


class FeatureCache:
    """`views` fixed views of every image of a dataset (unaugmented, with masks), as the mask head
    learns from them.

    They lie in memory, or in a file in a folder of `parent` that is named after all that they
    depend on. First comes a state (int64) a view: 0 until it is there, then (objects + 1) << 32 |
    crc32. Then the records, each at its own offset: features fp16 (C, h, w), matched objects
    (`item`), and room for more, up to all that have a mask. The state is written last, so that a
    kill costs no more than one view, and processes that fill a file at once only do the same work
    twice. The file is read, not mapped: writing to a full disk is an error then, and no crash.
    """

    def __init__(self, objective: MaskObjective, dataset: SplitDataset, views: int, parent: Path):
        self.objective = objective
        self.dataset = dataset
        self.views = views
        size = objective.detector.size
        self.shape = feature_shape(size, dataset.resolution)
        packed_grid = math.ceil(GRID**2 / 8)  # bytes
        self.item = np.dtype(
            [("box", "<f4", 4), ("query", "<f2", size.hidden), ("grid", "u1", packed_grid)]
        )
        rooms = []  # bytes of each view's place
        for image in dataset.split.images:
            masks = len(image.segmentations)
            if not dataset.guess:
                masks -= image.segmentations.count(None)
            rooms += [self.record_bytes(min(masks, size.queries))] * views
        self.offsets = np.cumsum([8 * len(rooms), *rooms])  # where each view begins, and the end
        self.bytes = int(self.offsets[-1])
        self.key = distributed.from_main(self._key() if distributed.is_main() else None)
        name = hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:16]
        self.path = parent / name / "views.bin"
        self.full = False  # the disk
        # views that this process has written, or read and compared
        self.checked = np.zeros(len(rooms), dtype=bool)
        self.states = torch.from_numpy(self._saved_states())

    def record_bytes(self, objects: int) -> int:
        return 2 * math.prod(self.shape) + objects * self.item.itemsize

    def _key(self) -> dict:
        """What the views depend on, as plain values."""
        split = self.dataset.split
        precision = self.objective.precision
        images = hashlib.sha256()
        with ThreadPoolExecutor(16) as threads:  # they wait for the disk
            samples = threads.map(sample_of_file, [image.path for image in split.images])
            shown = ProgressBar(samples, "looking for kept features", total=len(split.images))
            for sample, image in zip(shown, split.images):
                file = image.path.stat()
                told_by = (image.file_name, file.st_size, file.st_mtime_ns, image.apply_exif)
                images.update(repr(told_by).encode())
                images.update(sample + image.boxes.tobytes() + image.labels.tobytes())
        key = {
            "what": "a frozen detector's features, for stage 2; the folder may be deleted",
            "format": FORMAT,
            "detector": checkpoint.fingerprint(self.objective.detector),
            "size": asdict(self.objective.detector.size) | {"recipe": None},
            "class_rows": self.objective.table.rows,
            "annotations": checkpoint.file_sha256(split.annotation_file),
            "images": f"{len(split.images)}, {images.hexdigest()}",
            "resolution": self.dataset.resolution,
            "views": self.views,
            "grid, enlarge, match_iou": [GRID, ENLARGE, frozen.MATCH_IOU],
            "computed in": [str(precision.dtype), precision.device.type],
        }
        if self.dataset.guess:
            key["guessed masks"] = guess.VERSION
        if split.gray and split.gray.window:
            key["gray"] = split.gray.window
        return key

    def saved(self) -> tuple[int, int, int]:
        """How many views are in the folder, their bytes, and the bytes that the others may take."""
        states = self._saved_states()
        there = states != 0
        objects = (states[there] >> 32) - 1
        size = len(objects) * self.record_bytes(0) + int(objects.sum()) * self.item.itemsize
        return len(objects), size, int(np.diff(self.offsets)[~there].sum())

    def _saved_states(self) -> np.ndarray:
        """The states in the folder's file; all zero where there is none of the right size."""
        views = len(self.checked)
        if self.path.is_file() and self.path.stat().st_size == self.bytes:
            return np.fromfile(self.path, "<i8", views)
        return np.zeros(views, "<i8")

    def open(self, on_disk: bool) -> FeatureCache:
        """Get ready to read and fill memory, or the folder's file, which all ranks of a machine
        share.

        A file of a wrong size is made anew.  Raises UserError where the disk refuses.
        """
        if not on_disk:
            self.file = mmap.mmap(-1, self.bytes)
            self.states.zero_()
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if distributed.local_rank() == 0:
                self._remove_damaged_file()
            distributed.gather_objects(None)  # the others take the new file
            with open(self.path, "ab") as file:
                file.truncate(self.bytes)  # zeros, where it is new: no view is there
            self.file = open(self.path, "r+b", buffering=0)
            key_file = self.path.with_name("key.json")
            key_file.write_text(json.dumps(self.key, indent=1), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot make the feature cache {self.path}, {in_mb(self.bytes)} "
                f"({error.strerror}): free some space there, or use --cache ram or --cache off"
            ) from error
        return self

    def _remove_damaged_file(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size not in (0, self.bytes):
            warn(
                f"Feature cache {self.path} is damaged ({size:,} bytes, not {self.bytes:,}): "
                "made anew"
            )
            self.path.unlink()

    def close(self, keep: bool) -> None:
        """Be done with the file: say what is in it, or remove it with its folder."""
        self.file.close()
        distributed.gather_objects(None)  # every rank is done
        if not keep:
            if distributed.local_rank() == 0:
                # Windows forbids it while another run reads
                shutil.rmtree(self.path.parent, ignore_errors=True)
            return
        views, size, _ = self.saved()
        tick(
            f"Feature cache kept for later runs: {self.path.parent}, {views:,} of "
            f"{len(self.states):,} views, {in_mb(size)}. The folder may be deleted; --keep_cache 0 "
            "does it at the end of a run"
        )

    def _read(self, offset: int, size: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(size)

    def _write(self, offset: int, data: bytes) -> None:
        self.file.seek(offset)
        if self.file.write(data) != len(data):
            raise OSError("no space left")

    def _load(self, number: int) -> bytes | None:
        """A view's record; None where it is not there or not what was written."""
        if not self.states[number]:  # another run may have computed it
            self.states[number] = int.from_bytes(self._read(8 * number, 8), "little")
        count, checksum = divmod(int(self.states[number]), 1 << 32)
        begin, end = self.offsets[number : number + 2].tolist()
        size = self.record_bytes(count - 1)
        record = b""
        if count > 0 and size <= end - begin:
            record = self._read(begin, size)
        is_sound = self.checked[number] or zlib.crc32(record) == checksum
        if not record or not is_sound:
            self.states[number] = 0
            return None
        self.checked[number] = True
        return record

    def _compute(self, number: int, sample: dict) -> bytes:
        """Run the detector on one view, keep its record and return it.

        One at a time, so that no bit depends on which views were computed together: a CPU is as
        fast that way.
        """
        objective = self.objective
        model = objective.detector.eval()
        view = freeze(model, collate([sample]), objective.table, objective.precision, None)
        objects = np.empty(len(view.boxes[0]), self.item)
        objects["box"] = view.boxes[0].cpu()
        objects["query"] = view.queries[0].half().cpu()
        objects["grid"] = np.packbits(view.grids[0].flatten(1).cpu(), axis=1)
        record = view.features.half().cpu().numpy().tobytes() + objects.tobytes()
        if not self.full:
            self._keep(number, record, len(objects))
        return record

    def _keep(self, number: int, record: bytes, objects: int) -> None:
        """Write a view's record, then its state; a full disk is said once."""
        state = (objects + 1) << 32 | zlib.crc32(record)
        try:
            self._write(int(self.offsets[number]), record)
            self._write(8 * number, state.to_bytes(8, "little"))
        except OSError as error:
            self.full = True
            warn(
                f"Feature cache {self.path} takes no more ({error}): "
                "the missing views are computed every time"
            )
            return
        self.states[number] = state
        self.checked[number] = True

    def batch(self, items: list[tuple[int, dict]]) -> FrozenBatch:
        """The batch of what Views gave; the detector runs on the views that are missing."""
        samples = []
        features = []
        objects = []
        for view, sample in items:
            index = sample["target"]["index"]
            number = index * self.views + view
            record = self._load(number)
            if record is None:
                if "masks" not in sample["target"]:  # its record is damaged
                    sample = flipped(self.dataset[index, None], view)
                record = self._compute(number, sample)
            samples.append(sample)
            values = np.frombuffer(record, "<f2", math.prod(self.shape))
            features.append(values.reshape(self.shape))
            objects.append(np.frombuffer(record, self.item, offset=self.record_bytes(0)))
        batch = collate(samples)
        images = self.dataset.split.images
        return FrozenBatch(
            images=batch.images,
            features=torch.from_numpy(np.stack(features)),
            queries=[torch.from_numpy(one["query"].copy()) for one in objects],
            boxes=[torch.from_numpy(one["box"].copy()) for one in objects],
            grids=[unpack_grids(one["grid"]) for one in objects],
            counts=[len(images[index].labels) for index in batch.indices],
            indices=batch.indices,
            unread=batch.unread,
        )


def unpack_grids(packed: np.ndarray) -> Tensor:
    """Bits (m, bytes) -> uint8 (m, GRID, GRID)."""
    bits = np.unpackbits(packed, axis=1, count=GRID**2)
    return torch.from_numpy(bits.reshape(-1, GRID, GRID))


@dataclass
class Views(Dataset):
    """What the loader's processes read: views with their samples, without objects where the cache
    has the view.
    """

    dataset: SplitDataset
    views: int
    states: Tensor  # of the cache's views: 0 where one is missing

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, dict]:
        """`key`: image index and any number, whose remainder chooses the view."""
        index, number = key
        view = number % self.views
        if not self.states[index * self.views + view]:
            return view, flipped(self.dataset[index, None], view)
        index, image, unread = self.dataset.image(index)
        return view, {
            "image": apply_view(image, view),
            "target": {"index": index},
            "unread": unread,
        }


class CachedLoader:
    """FrozenBatches in a sampler's order. Where memory does not hold the images, `workers`
    processes read them.
    """

    def __init__(self, cache: FeatureCache, sampler: EpochSampler, workers: int = 0):
        if cache.dataset.cache is not None:
            workers = 0
        if workers:
            cache.states.share_memory_()  # they see what has been computed since
        self.cache = cache
        self.dataset = cache.dataset
        self.batch_sampler = sampler
        self.reader = Views(cache.dataset, cache.views, cache.states)
        self.items = make_loader(
            cache.dataset,
            sampler,
            workers,
            self.reader,
            collate_fn=list,
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[FrozenBatch]:
        return map(self.cache.batch, self.items)
