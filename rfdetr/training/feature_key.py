"""By what a cache of features is known again: everything that its views depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rfdetr.data import guess
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.records import CocoSplit
from rfdetr.files import file_sha256
from rfdetr.models.segmentation import ENLARGE, GRID
from rfdetr.progress import ProgressBar
from rfdetr.training import frozen
from rfdetr.training.frozen import MaskObjective
from rfdetr.weights import checkpoint

FORMAT = 3  # of the cache's file, and of how its content is computed
SAMPLES = 8  # blocks that are read of an image's file to know it again
BLOCK = 8 << 10  # bytes


def cache_key(objective: MaskObjective, dataset: SplitDataset, views: int) -> dict:
    """What the views and pictures depend on, as plain values."""
    split = dataset.split
    precision = objective.precision
    size = objective.detector.size
    key = {
        "what": "a frozen detector's features, for stage 2; the folder may be deleted",
        "format": FORMAT,
        "detector": checkpoint.fingerprint(objective.detector),
        "size": asdict(size) | {"recipe": None},
        "class_rows": objective.table.rows,
        "annotations": file_sha256(split.annotation_file),
        "images": f"{len(split.images)}, {digest_of_images(split)}",
        "resolution": dataset.resolution,
        "views": views,
        "grid, enlarge, match_iou": [GRID, ENLARGE, frozen.MATCH_IOU],
        "computed in": [str(precision.dtype), precision.device.type],
    }
    if dataset.guess:
        key["guessed masks"] = guess.VERSION
    if dataset.letterbox:
        key["letterbox"] = True
    if dataset.tiling:
        key["boxes that a tile cuts"] = "of what is seen of the mask"
    if split.gray and split.gray.window:
        key["gray"] = split.gray.window
    return key


def digest_of_images(split: CocoSplit) -> str:
    """sha256 of names, files and objects."""
    images = hashlib.sha256()
    with ThreadPoolExecutor(16) as threads:  # they wait for the disk
        samples = threads.map(sample_of_file, [image.path for image in split.images])
        shown = ProgressBar(samples, "looking for kept features", total=len(split.images))
        for sample, image in zip(shown, split.images):
            file = image.path.stat()
            told_by = (image.file_name, file.st_size, file.st_mtime_ns, image.apply_exif)
            if image.window:
                told_by += tuple(image.window)
            images.update(repr(told_by).encode())
            images.update(sample + image.boxes.tobytes() + image.labels.tobytes())
    return images.hexdigest()


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


def folder_name(key: dict) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def caches_of_other_formats(parent: Path, key: dict) -> Iterator[tuple[Path, int]]:
    """The folders in `parent` that differ from `key` in nothing but their format, and that."""
    own = json.loads(json.dumps(key)) | {"format": None}
    for file in sorted(parent.glob("*/key.json")):
        try:
            other = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # another run may have removed it, or be writing it
            continue
        if isinstance(other, dict) and other | {"format": None} == own:
            if other.get("format") != FORMAT:
                yield file.parent, other.get("format")
