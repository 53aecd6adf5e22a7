"""What a frozen detector gives the mask head, computed once and kept.

The detector never changes in stage 2, so one look at a few fixed views of each image (flips) serves every epoch and
every later run: feature maps, the queries matched to objects, their boxes, and the objects' masks on the grid the loss
looks at. A view is computed when an epoch first draws it. Images are not kept: they are read and flipped.
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
from rfdetr.data.loaders import EpochSampler, SplitDataset, collate, make_loader
from rfdetr.device import free_memory_mb
from rfdetr.files import free_disk
from rfdetr.models.projector import LEVEL_SCALE
from rfdetr.models.segmentation import ENLARGE, GRID
from rfdetr.training import frozen
from rfdetr.training.frozen import FrozenBatch, MaskObjective, apply_view, flipped, freeze
from rfdetr.weights import checkpoint

FORMAT = 1  # of the cache's file, and of how its content is computed
SAMPLES, BLOCK = (
    8,
    8 << 10,
)  # what is read of an image's file to know it again: blocks, and bytes of each
SPARE_DISK = 64 << 20  # bytes to leave free


def sample_of_file(path: Path) -> bytes:
    """sha256 of a file's content: all of a small one, of a larger one SAMPLES blocks from its beginning to its end.

    Size and time alone are not enough: they are often restored with a copy. Empty where the file cannot be read.
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


def choose_cache(mode: str, cache: FeatureCache, multi_scale: bool) -> tuple[str, str]:
    """What becomes of `--cache`: ("ram" | "disk" | "off", why, for the user).

    auto: disk while it has twice what is missing there (the system keeps in memory what fits), else RAM while half of
    what is free suffices for every rank, else off.  Raises UserError where what was asked for cannot be.
    """
    if multi_scale:
        if mode in ("ram", "disk"):
            raise UserError(
                f"--cache {mode} keeps features of one scale: use it with --multi_scale 0, or --cache off"
            )
        return "off", "off, since --multi_scale 1 asks for new features at every step"
    (views, _, missing), folder = cache.there(), cache.path.parent
    needed = cache.bytes * distributed.world_size()
    ram, disk = free_memory_mb(), free_disk(folder)
    short = f"the disk of {folder.parent} has {in_mb(disk)} free, {in_mb(missing)} are missing"
    if mode == "disk" and disk < missing + SPARE_DISK:
        raise UserError(
            f"--cache disk: {short}. Free some space there, or use --cache ram or --cache off"
        )
    asked = ", as asked" if mode != "auto" else ""
    if mode == "disk" or mode == "auto" and 2 * missing + SPARE_DISK < disk:
        total = f"{views:,} of {len(cache.table):,} views there, about {in_mb(cache.bytes)} in all"
        return "disk", f"on disk{asked}, {folder}, {total}"
    size = f"about {in_mb(needed)}"
    if mode == "ram" or mode == "auto" and needed < ram * 2**20 / 2:
        return "ram", f"in RAM{asked}, {size}" + ("" if asked else f": {short}")
    return (
        "off",
        "off, as asked" if asked else f"off: half of the free RAM is less than {size}, and {short}",
    )


class FeatureCache:
    """`views` fixed views of every image of a dataset (unaugmented, with masks), as the mask head learns from them.

    They lie in memory, or in a file in a folder of `parent` that is named after all that they depend on.  First an
    int64 a view: 0 until it is there, then (objects + 1) << 32 | crc32.  Then the views, each at its own place:
    features fp16 (C, h, w), matched objects (`item`), and room for more, up to all that have a mask.  The int64 is
    written last, so that a kill costs no more than one view, and processes that fill a file at once only do the same
    work twice.  The file is read, not mapped: writing to a full disk is an error then, and no crash.
    """

    def __init__(self, objective: MaskObjective, dataset: SplitDataset, views: int, parent: Path):
        self.objective, self.dataset, self.views = objective, dataset, views
        size = objective.detector.size
        side = dataset.resolution // size.patch * LEVEL_SCALE[size.levels[0]]
        self.shape = (size.hidden, int(side), int(side))
        self.item = np.dtype(
            [("box", "<f4", 4), ("query", "<f2", size.hidden), ("grid", "u1", -(-(GRID**2) // 8))]
        )
        masks = [
            sum(s is not None for s in record.segmentations) for record in dataset.split.images
        ]
        rooms = [
            self.record_bytes(min(count, size.queries)) for count in masks for _ in range(views)
        ]
        self.places = np.cumsum([8 * len(rooms), *rooms])  # where each view begins, and the end
        self.bytes = int(self.places[-1])
        self.contents = distributed.from_main(self._contents() if distributed.is_main() else None)
        key = hashlib.sha256(json.dumps(self.contents).encode()).hexdigest()[:16]
        self.path = parent / key / "views.bin"
        self.full = False
        self.checked = np.zeros(
            len(rooms), dtype=bool
        )  # views that this process has written, or read and compared
        self.table = torch.from_numpy(self._saved())

    def record_bytes(self, objects: int) -> int:
        return 2 * math.prod(self.shape) + objects * self.item.itemsize

    def _contents(self) -> dict:
        """What the views depend on, as plain values."""
        split, precision, images = self.dataset.split, self.objective.precision, hashlib.sha256()
        with ThreadPoolExecutor(16) as threads:  # they wait for the disk
            samples = threads.map(sample_of_file, [record.path for record in split.images])
            for record, sample in zip(split.images, samples):
                file = record.path.stat()
                images.update(
                    repr((record.file_name, file.st_size, file.st_mtime_ns, record.apply_exif)).encode()
                )
                images.update(sample + record.boxes.tobytes() + record.labels.tobytes())
        return {
            "what": "a frozen detector's features for train_seg_stage2.py; the folder may be deleted",
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

    def there(self) -> tuple[int, int, int]:
        """How many views are in the folder, their bytes, and the bytes that the others may take."""
        table = self._saved()
        objects = (table[table != 0] >> 32) - 1
        size = len(objects) * self.record_bytes(0) + int(objects.sum()) * self.item.itemsize
        return len(objects), size, int(np.diff(self.places)[table == 0].sum())

    def _saved(self) -> np.ndarray:
        """The table of the folder's file; all zero where there is none of the right size."""
        count, sound = (
            len(self.checked),
            self.path.is_file() and self.path.stat().st_size == self.bytes,
        )
        return np.fromfile(self.path, "<i8", count) if sound else np.zeros(count, "<i8")

    def open(self, on_disk: bool) -> FeatureCache:
        """Get ready to read and fill memory, or the folder's file, which all ranks of a machine share.

        A file of a wrong size is made anew.  Raises UserError where the disk refuses.
        """
        if not on_disk:
            self.file = mmap.mmap(-1, self.bytes)
            self.table.zero_()
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if distributed.local_rank() == 0 and self.path.exists():
                if (size := self.path.stat().st_size) not in (0, self.bytes):
                    warn(
                        f"Feature cache {self.path} is damaged ({size:,} bytes, not {self.bytes:,}): made anew"
                    )
                    self.path.unlink()
            distributed.gather_objects(None)  # the others take the new file
            with open(self.path, "ab") as file:
                file.truncate(self.bytes)  # zeros, where it is new: no view is there
            self.file = open(self.path, "r+b", buffering=0)
            self.path.with_name("key.json").write_text(
                json.dumps(self.contents, indent=1), encoding="utf-8"
            )
        except OSError as error:
            raise UserError(
                f"cannot make the feature cache {self.path}, {in_mb(self.bytes)} ({error.strerror}): free some space "
                "there, or use --cache ram or --cache off"
            ) from error
        return self

    def close(self, keep: bool) -> None:
        """Be done with the file: say what is in it, or remove it with its folder."""
        self.file.close()
        distributed.gather_objects(None)  # every rank is done
        if distributed.local_rank() == 0 and not keep:
            shutil.rmtree(
                self.path.parent, ignore_errors=True
            )  # Windows forbids it while another run reads
        elif distributed.is_main():
            views, size, _ = self.there()
            tick(
                f"Feature cache kept for later runs: {self.path.parent}, {views:,} of {len(self.table):,} views, "
                f"{in_mb(size)}. The folder may be deleted; --keep_cache 0 does it at the end of a run"
            )

    def _read(self, place: int, size: int) -> bytes:
        self.file.seek(place)
        return self.file.read(size)

    def _write(self, place: int, data: bytes) -> None:
        self.file.seek(place)
        if self.file.write(data) != len(data):
            raise OSError("no space left")

    def _load(self, number: int) -> bytes | None:
        """A view's record; None where it is not there or not what was written."""
        if not self.table[number]:  # another run may have computed it
            self.table[number] = int.from_bytes(self._read(8 * number, 8), "little")
        count, crc = divmod(int(self.table[number]), 1 << 32)
        place, end = self.places[number : number + 2].tolist()
        size = self.record_bytes(count - 1)
        record = self._read(place, size) if count > 0 and size <= end - place else b""
        if not record or not self.checked[number] and zlib.crc32(record) != crc:
            self.table[number] = 0
            return None
        self.checked[number] = True
        return record

    def _compute(self, number: int, sample: dict) -> bytes:
        """Run the detector on one view, keep its record and return it.

        One at a time, so that no bit depends on which views were computed together: a CPU is as fast that way.
        """
        model, precision = self.objective.detector.eval(), self.objective.precision
        frozen = freeze(model, collate([sample]), self.objective.table, precision, None)
        objects = np.empty(len(frozen.boxes[0]), self.item)
        objects["box"], objects["query"] = frozen.boxes[0].cpu(), frozen.queries[0].half().cpu()
        objects["grid"] = np.packbits(frozen.grids[0].flatten(1).cpu(), axis=1)
        record = frozen.features.half().cpu().numpy().tobytes() + objects.tobytes()
        state = (len(objects) + 1) << 32 | zlib.crc32(record)
        try:
            if not self.full:
                self._write(int(self.places[number]), record)
                self._write(8 * number, state.to_bytes(8, "little"))
                self.table[number], self.checked[number] = state, True
        except OSError as error:
            self.full = True
            warn(
                f"Feature cache {self.path} takes no more ({error}): the missing views are computed every time"
            )
        return record

    def batch(self, items: list[tuple[int, dict]]) -> FrozenBatch:
        """The batch of what Views gave; the detector runs on the views that are missing."""
        samples, features, objects = [], [], []
        for view, sample in items:
            record = self._load(sample["target"]["index"] * self.views + view)
            if record is None:
                if "masks" not in sample["target"]:  # its record is damaged
                    sample = flipped(self.dataset[sample["target"]["index"], None], view)
                record = self._compute(sample["target"]["index"] * self.views + view, sample)
            samples.append(sample)
            features.append(np.frombuffer(record, "<f2", math.prod(self.shape)).reshape(self.shape))
            objects.append(np.frombuffer(record, self.item, offset=self.record_bytes(0)))
        images, targets, unread = vars(collate(samples)).values()
        indices = [target["index"] for target in targets]
        grids = [
            np.unpackbits(o["grid"], axis=1, count=GRID**2).reshape(-1, GRID, GRID) for o in objects
        ]
        return FrozenBatch(
            images=images,
            features=torch.from_numpy(np.stack(features)),
            queries=[torch.from_numpy(o["query"].copy()) for o in objects],
            boxes=[torch.from_numpy(o["box"].copy()) for o in objects],
            grids=[torch.from_numpy(grid) for grid in grids],
            counts=[len(self.dataset.split.images[index].labels) for index in indices],
            indices=indices,
            unread=unread,
        )


@dataclass
class Views(Dataset):
    """What the loader's processes read: views with their samples, without objects where `table` has the view."""

    dataset: SplitDataset
    views: int
    table: Tensor

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, dict]:
        """`key`: image index and any number, whose remainder chooses the view."""
        index, view = key[0], key[1] % self.views
        if not self.table[index * self.views + view]:
            return view, flipped(self.dataset[index, None], view)
        index, image, unread = self.dataset.image(index)
        return view, {
            "image": apply_view(image, view),
            "target": {"index": index},
            "unread": unread,
        }


class CachedLoader:
    """FrozenBatches in a sampler's order. Where memory does not hold the images, `workers` processes read them."""

    def __init__(self, cache: FeatureCache, sampler: EpochSampler, workers: int = 0):
        workers = workers if cache.dataset.cache is None else 0
        if workers:
            cache.table.share_memory_()  # they see what has been computed since
        self.cache, self.dataset, self.batch_sampler = cache, cache.dataset, sampler
        self.reader = Views(cache.dataset, cache.views, cache.table)
        options = {"collate_fn": list, "persistent_workers": workers > 0}
        self.items = make_loader(cache.dataset, sampler, workers, self.reader, **options)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[FrozenBatch]:
        return map(self.cache.batch, self.items)
