"""Where the features of stage 2 go: disk, memory or nowhere, by the room there is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rfdetr import distributed
from rfdetr.console import UserError
from rfdetr.data.records import CocoSplit
from rfdetr.device import free_memory_mb
from rfdetr.files import free_disk
from rfdetr.models.projector import LEVEL_SCALE
from rfdetr.progress import in_hours
from rfdetr.sizes import ModelSize

if TYPE_CHECKING:
    from rfdetr.training.feature_cache import FeatureCache

SPARE_DISK = 64 << 20  # bytes to leave free
LEAST_SHARE = 0.1  # of the images: a cache of fewer is not worth its disk


def in_mb(size: int) -> str:
    """Rounded up, since it is what is needed: to a tenth, from 10 MB on to a whole one."""
    if size < 1e7:
        return f"{math.ceil(size / 1e5) / 10:.1f} MB"
    return f"{math.ceil(size / 1e6):,} MB"


@dataclass(frozen=True)
class CacheChoice:
    """Where the features go, "ram", "disk" or "off", and why, for the user.

    images: those that are kept, the first of the split; None: all.
    """

    where: str
    why: str
    images: int | None = None


def choose_cache(mode: str, cache: FeatureCache, multi_scale: bool) -> CacheChoice:
    """What becomes of `--cache`.

    auto: disk while it has twice what is missing there (the system keeps in memory what fits), else
    RAM while half of what is free suffices for every rank, else as many images as half of the disk
    holds, else off.  Raises UserError where what was asked for cannot be.
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
            f"--cache disk: {short}. Free some space there, or use --cache auto, which keeps what "
            "fits, --cache ram or --cache off"
        )
    if mode == "disk" or (mode == "auto" and 2 * missing + SPARE_DISK < disk):
        asked = ", as asked" if mode == "disk" else ""
        total = f"{views:,} of {cache.view_count:,} views there, about {in_mb(cache.bytes)} in all"
        return CacheChoice("disk", f"on disk{asked}, {folder}, {total}")
    needed = cache.memory_bytes * distributed.world_size()
    if mode == "ram":
        return CacheChoice("ram", f"in RAM, as asked, about {in_mb(needed)}")
    if needed < free_memory_mb() * 2**20 / 2:
        return CacheChoice("ram", f"in RAM, about {in_mb(needed)}: {short}")
    why = f"half of the free RAM is less than about {in_mb(needed)}, and {short}"
    return _part_on_disk(cache, (disk - SPARE_DISK) // 2, why)


def _part_on_disk(cache: FeatureCache, room: int, why: str) -> CacheChoice:
    """The images that `room` bytes hold, and what the others cost."""
    total = len(cache.dataset)
    images = cache.images_within(room)
    if images < LEAST_SHARE * total:
        images = 0
    seconds = (total - images) * cache.seconds_a_view() / distributed.world_size()
    cost = f"computed anew each time, about {in_hours(seconds)} (h:mm:ss) an epoch"
    if images == 0:
        return CacheChoice("off", f"off: {why}. All views are {cost}")
    kept = f"{images:,} of {total:,} images, at most {in_mb(cache.offset_of(images))}"
    where = f"on disk in part, {cache.path.parent}, {kept}"
    return CacheChoice("disk", f"{where}: {why}. The views of the others are {cost}", images)


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
