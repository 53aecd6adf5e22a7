"""What a frozen detector gives the mask head, computed once and kept.

The detector never changes in stage 2, so one look at a few fixed views of each image (flips) serves
every epoch and every later run: feature maps, the queries matched to objects, their boxes, the
objects' masks on the grid the loss looks at, and the resized picture, of which each view is a flip.
A view is computed when an epoch first draws it.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rfdetr import distributed
from rfdetr.console import UserError, tick
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.loaders import EpochSampler, collate, make_loader
from rfdetr.device import unless_out_of_memory
from rfdetr.models.segmentation import GRID
from rfdetr.training.engine import lower_micro_batch
from rfdetr.training.feature_file import RecordFile
from rfdetr.training.feature_key import cache_key, caches_of_other_formats, folder_name
from rfdetr.training.feature_room import feature_shape, in_mb
from rfdetr.training.frozen import (
    FrozenBatch,
    MaskObjective,
    apply_view,
    flipped,
    flipped_axes,
    freeze,
)

AHEAD = 2  # batches that are read and pinned while a GPU works on an earlier one


class FeatureCache:
    """`views` fixed views of every image of a dataset (unaugmented, with masks), as the mask head
    learns from them, and its resized picture.

    They lie in memory, or in a file in a folder of `parent` that is named after all that they
    depend on (RecordFile). An image's views come first, then its picture, uint8 (3, R, R). A view
    is features fp16 (C, h, w) and its matched objects (`item`), with room for all that have a mask.
    """

    def __init__(self, objective: MaskObjective, dataset: SplitDataset, views: int, parent: Path):
        self.objective = objective
        self.dataset = dataset
        self.views = views
        self.kept_images = len(dataset)  # the first of the split
        size = objective.detector.size
        self.shape = feature_shape(size, dataset.resolution)
        self.picture_shape = (3, dataset.resolution, dataset.resolution)
        packed_grid = math.ceil(GRID**2 / 8)  # bytes
        self.item = np.dtype(
            [("box", "<f4", 4), ("query", "<f2", size.hidden), ("grid", "u1", packed_grid)]
        )
        rooms = []  # bytes of each record's place
        for image in dataset.split.images:
            masks = len(image.segmentations)
            if not dataset.guess:
                masks -= image.segmentations.count(None)
            rooms += [self.record_bytes(min(masks, size.queries))] * views
            rooms.append(math.prod(self.picture_shape))
        is_main = distributed.is_main()
        self.key = distributed.from_main(cache_key(objective, dataset, views) if is_main else None)
        self.path = parent / folder_name(self.key) / "views.bin"
        self.records = RecordFile(self.path, rooms)

    def record_bytes(self, objects: int) -> int:
        """Of a view."""
        return 2 * math.prod(self.shape) + objects * self.item.itemsize

    def number(self, index: int, view: int) -> int:
        """The record of an image's view, or of its picture: `view` is then the number of views."""
        return index * (self.views + 1) + view

    # ------------------------------------------------------------ its size

    @property
    def bytes(self) -> int:
        return self.records.bytes

    @property
    def memory_bytes(self) -> int:
        """In memory, where the dataset may hold the images a second time."""
        images = 0 if self.dataset.cache is None else self.dataset.bytes_of_images
        return self.bytes + images

    @property
    def view_count(self) -> int:
        return len(self.dataset) * self.views

    def saved(self) -> tuple[int, int, int]:
        """How many views are in the folder, the bytes of all that is there, and the bytes that the
        rest may take.
        """
        saved = self.records.saved_bytes()
        views = saved.reshape(-1, self.views + 1)[:, :-1]
        rooms = np.diff(self.records.offsets)
        return int((views >= 0).sum()), int(saved.clip(0).sum()), int(rooms[saved < 0].sum())

    def images_within(self, room: int) -> int:
        """How many images, from the first, `room` bytes more hold with all their views."""
        rooms = np.diff(self.records.offsets)
        missing = rooms * (self.records.saved_bytes() < 0)
        of_images = missing.reshape(-1, self.views + 1).sum(1)
        return int(np.searchsorted(of_images.cumsum(), room, side="right"))

    def offset_of(self, images: int) -> int:
        """The bytes of the file up to the end of so many images."""
        return int(self.records.offsets[self.number(images, 0)])

    def seconds_a_view(self) -> float:
        """Of the detector on one view, measured."""
        target = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.long),
            "has_mask": torch.zeros(0, dtype=torch.bool),
            "masks": torch.zeros(0, *self.picture_shape[1:], dtype=torch.uint8),
            "index": 0,
        }
        image = torch.zeros(self.picture_shape, dtype=torch.uint8)
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            self._detect([{"image": image, "target": target, "unread": {}}])
            seconds = time.perf_counter() - begin
        return seconds

    # ------------------------------------------------------------ its file

    def open(self, on_disk: bool, images: int | None = None) -> FeatureCache:
        """Get ready to read and fill memory, or the folder's file, which all ranks of a machine
        share; of the first `images` alone, where that is given.

        A file of a wrong size is made anew.  Raises UserError where the disk refuses.
        """
        if images is not None:
            self.kept_images = images
        if not on_disk:
            self.records.open_in_memory()
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if distributed.local_rank() == 0:
                self.records.remove_if_damaged()
            distributed.gather_objects(None)  # the others take the new file
            self.records.open()
            key_file = self.path.with_name("key.json")
            key_file.write_text(json.dumps(self.key, indent=1), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot make the feature cache {self.path}, {in_mb(self.bytes)} "
                f"({error.strerror}): free some space there, or use --cache ram or --cache off"
            ) from error
        for folder, version in caches_of_other_formats(self.path.parent.parent, self.key):
            tick(
                f"Feature cache {folder} has an earlier form ({version}, now "
                f"{self.key['format']}: pictures are kept too) and is not read: its views are "
                "computed anew. The folder may be deleted"
            )
        return self

    def close(self, keep: bool) -> None:
        """Be done with the file: say what is in it, or remove it with its folder."""
        self.records.file.close()
        distributed.gather_objects(None)  # every rank is done
        if not keep:
            if distributed.local_rank() == 0:
                # Windows forbids it while another run reads
                shutil.rmtree(self.path.parent, ignore_errors=True)
            return
        views, size, _ = self.saved()
        tick(
            f"Feature cache kept for later runs: {self.path.parent}, {views:,} of "
            f"{self.view_count:,} views, {in_mb(size)}. The folder may be deleted; --keep_cache 0 "
            "does it at the end of a run"
        )

    def _keep(self, index: int, view: int, record: bytes) -> None:
        if index < self.kept_images:
            self.records.keep(self.number(index, view), record)

    # ------------------------------------------------------------ its views

    def _detect(self, samples: list[dict]) -> list[bytes]:
        """Run the detector on views together: their records."""
        objective = self.objective
        model = objective.detector.eval()
        batch = freeze(model, collate(samples), objective.table, objective.precision, None)
        features = batch.features.half().cpu().numpy()
        counts = [len(boxes) for boxes in batch.boxes]
        objects = np.empty(sum(counts), self.item)
        objects["box"] = torch.cat(batch.boxes).cpu()
        objects["query"] = torch.cat(batch.queries).half().cpu()
        objects["grid"] = np.packbits(torch.cat(batch.grids).flatten(1).cpu(), axis=1)
        of_views = np.split(objects, np.cumsum(counts)[:-1])
        return [one.tobytes() + own.tobytes() for one, own in zip(features, of_views)]

    def _compute(self, samples: list[dict]) -> list[bytes]:
        """The records of views, in batches on a GPU.

        Elsewhere one at a time, so that no bit depends on which views were computed together: a
        CPU is as fast that way.
        """
        progress = self.objective.progress
        device = self.objective.precision.device
        records: list[bytes] = []
        while len(records) < len(samples):
            at_once = max(progress.micro_batch, 1) if device.type == "cuda" else 1
            part = samples[len(records) : len(records) + at_once]
            computed = unless_out_of_memory(lambda: self._detect(part), device)  # noqa: B023
            if computed is None:
                lower_micro_batch(progress, len(part))
            else:
                records += computed
        return records

    def _keep_picture(self, index: int, image: Tensor) -> None:
        """The image as it is: a flip has undone itself."""
        if not self.records.states[self.number(index, self.views)]:
            self._keep(index, self.views, image.numpy().tobytes())

    def _picture(self, index: int, view: int) -> Tensor | None:
        """An image under one of the views; None where its picture is not kept."""
        record = self.records.load(self.number(index, self.views))
        if record is None:
            return None
        picture = np.frombuffer(record, np.uint8).reshape(self.picture_shape)
        return torch.from_numpy(np.flip(picture, flipped_axes(view)).copy())

    def _look_up(self, view: int, sample: dict) -> tuple[dict, bytes | None]:
        """The sample with its image, and its record; with its objects, where there is none."""
        index = sample["target"]["index"]
        record = self.records.load(self.number(index, view))
        if sample["image"] is None:
            sample = sample | {"image": self._picture(index, view)}
        is_whole = record is not None or "masks" in sample["target"]
        if sample["image"] is None or not is_whole:  # a record is damaged
            sample = flipped(self.dataset[index, None], view)
            record = self.records.load(self.number(sample["target"]["index"], view))
        return sample, record

    def batch(self, items: list[tuple[int, dict]]) -> FrozenBatch:
        """The batch of what Views gave; the detector runs on the views that are missing."""
        looked_up = [self._look_up(view, sample) for view, sample in items]
        samples = [sample for sample, _ in looked_up]
        records = [record for _, record in looked_up]
        places = [(sample["target"]["index"], view) for sample, (view, _) in zip(samples, items)]
        missing = {}
        for place, sample, record in zip(places, samples, records):
            if record is None:
                missing[place] = sample
        computed = dict(zip(missing, self._compute(list(missing.values()))))
        for (index, view), record in computed.items():
            self._keep(index, view, record)
        for view, given in items:
            if given["image"] is not None:
                self._keep_picture(given["target"]["index"], apply_view(given["image"], view))
        records = [record or computed[place] for place, record in zip(places, records)]
        return self._assembled(samples, records)

    def batch_if_kept(self, items: list[tuple[int, dict]]) -> FrozenBatch | None:
        """The batch in pinned memory, if nothing has to be computed for it."""
        looked_up = []
        for view, sample in items:
            index = sample["target"]["index"]
            record = self.records.load(self.number(index, view))
            image = sample["image"]
            if image is None:
                image = self._picture(index, view)
            if record is None or image is None:
                return None
            looked_up.append((sample | {"image": image}, record))
        samples = [sample for sample, _ in looked_up]
        return self._assembled(samples, [record for _, record in looked_up]).pin_memory()

    def _assembled(self, samples: list[dict], records: list[bytes]) -> FrozenBatch:
        features = []
        objects = []
        for record in records:
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
    """What the loader's processes read: of a view that the cache lacks the sample, else its image
    alone, and no image (None) where the cache has the picture, too.
    """

    dataset: SplitDataset
    views: int
    states: Tensor  # of the cache's records: 0 where one is missing

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, dict]:
        """`key`: image index and any number, whose remainder chooses the view."""
        index, number = key
        view = number % self.views
        first = index * (self.views + 1)
        if not self.states[first + view]:
            return view, flipped(self.dataset[index, None], view)
        if self.states[first + self.views]:
            return view, {"image": None, "target": {"index": index}, "unread": {}}
        index, image, unread, _ = self.dataset.image(index)
        return view, {
            "image": apply_view(image, view),
            "target": {"index": index},
            "unread": unread,
        }


class CachedLoader:
    """FrozenBatches in a sampler's order. Where memory does not hold the images, `workers`
    processes read them; a thread reads ahead for a GPU.
    """

    def __init__(self, cache: FeatureCache, sampler: EpochSampler, workers: int = 0):
        if cache.dataset.cache is not None:
            workers = 0
        if workers:
            cache.records.states.share_memory_()  # they see what has been computed since
        self.cache = cache
        self.dataset = cache.dataset
        self.batch_sampler = sampler
        self.reader = Views(cache.dataset, cache.views, cache.records.states)
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
        if self.cache.objective.precision.device.type == "cuda":
            return self._read_ahead(iter(self.items))
        return map(self.cache.batch, self.items)

    def _read_ahead(self, items: Iterator[list]) -> Iterator[FrozenBatch]:
        """Batches in pinned memory, AHEAD of their use; what is missing is computed here."""

        def read_next() -> tuple[list, FrozenBatch | None] | None:
            own = next(items, None)
            return None if own is None else (own, self.cache.batch_if_kept(own))

        thread = ThreadPoolExecutor(1)
        try:
            coming = deque(thread.submit(read_next) for _ in range(AHEAD))
            while (read := coming.popleft().result()) is not None:
                coming.append(thread.submit(read_next))
                own, batch = read
                yield self.cache.batch(own).pin_memory() if batch is None else batch
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
