"""A checked split kept in the cache, so that large annotation files are read and checked once.

An index belongs to one content of the annotation file and to unchanged image files. What is
damaged or no longer true is as good as none, and where the cache cannot be written there is none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from rfdetr.console import UserError, tick
from rfdetr.data.array_file import (
    DamagedFile,
    check_arrays,
    map_arrays,
    read_header,
    refusing_damage,
    write_arrays,
)
from rfdetr.data.checks import CheckedSplit
from rfdetr.data.columns import Columns, map_columns
from rfdetr.data.exif import ExifDecision
from rfdetr.data.faults import Faults
from rfdetr.data.flat import count_values
from rfdetr.data.image_cache import SETTLED, cache_folder, stamp_of
from rfdetr.files import file_sha256, free_disk

FORMAT = 6  # raise it when the checks or the columns change their form or meaning
LEAST_BYTES = 8 << 20  # of an annotation file; smaller ones are read in a second
MOST_BYTES = 8 << 30  # of an index
LARGE = 100e6  # bytes of an index that is told of
UNUSED_DAYS = 30  # then an index is deleted when another one is written


def index_file(annotation_file: Path, folder: Path, sha256: str) -> Path:
    """The place of the index of an annotation file with this content and images in `folder`."""
    places = [os.path.abspath(annotation_file), str(annotation_file), str(folder)]
    key = "\n".join([str(FORMAT), *places, sha256])
    name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return cache_folder() / "indices" / f"{name}.bin"


def read_index(annotation_file: Path, folder: Path) -> CheckedSplit | None:
    """What was found of a split whose files are as they were; None where that is not known."""
    with contextlib.suppress(OSError, DamagedFile):
        if annotation_file.stat().st_size < LEAST_BYTES:
            return None
        path = index_file(annotation_file, folder, file_sha256(annotation_file))
        header, begin, token = read_header(path)
        check_arrays(path, header, begin)
        arrays = map_arrays(path, header, begin)
        with refusing_damage():
            stamps = arrays.pop("stamps")
            columns = Columns(**arrays, source=(str(path), token))
            if not is_unchanged(columns, stamps):
                return None
            meta = header["meta"]
            split = CheckedSplit(
                annotation_file=annotation_file,
                categories=meta["categories"],
                listed={},
                annotated=count_values(columns.categories[~columns.is_crowd]),
                columns=columns,
                exif=ExifDecision(meta["apply_exif"], frozenset(meta["dataset_proofs"])),
                proofs=frozenset(meta["proofs"]),
                faults=Faults.from_plain(annotation_file, meta["faults"]),
            )
        with contextlib.suppress(OSError):
            os.utime(path)
        return split
    return None


def is_unchanged(columns: Columns, stamps: np.ndarray) -> bool:
    """Whether the image files have the sizes and times that they had."""
    for path, stamp in zip(columns.all_texts("path"), stamps.tolist()):
        if stamp_of(path) != tuple(stamp):
            return False
    return True


def keep_index(split: CheckedSplit, folder: Path, sha256: str) -> CheckedSplit:
    """Write the index of a split without errors; returns the same split, mapped from there.

    sha256: of what was read.  Without an index, where none is possible or worth it, the split stays
    as it is.
    """
    columns = split.columns
    try:
        size = split.annotation_file.stat().st_size
    except OSError:
        return split
    is_whole = len(columns.sizes) == len(split.listed)
    if size < LEAST_BYTES or columns.bytes > MOST_BYTES or not is_whole:
        return split
    if split.faults.has_errors or split.faults.count("IMG_UNREADABLE"):
        return split
    stamps = stamps_of(columns)
    if stamps is None:
        return split
    path = index_file(split.annotation_file, folder, sha256)
    meta = {
        "categories": split.categories,
        "apply_exif": split.exif.apply,
        "dataset_proofs": sorted(split.exif.proofs),
        "proofs": sorted(split.proofs),
        "faults": split.faults.as_plain(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        delete_unused(path.parent)
        if free_disk(path.parent) < 2 * columns.bytes:
            return split
        write_arrays(path, columns.arrays() | {"stamps": stamps}, meta)
        mapped = map_columns(str(path))
    except (OSError, UserError, DamagedFile):
        return split
    if columns.bytes > LARGE:
        megabytes = columns.bytes / 1e6
        tick(f"Kept for the next start: {path} ({megabytes:.0f} MB; it may be deleted)")
    return replace(split, columns=mapped)


def stamps_of(columns: Columns) -> np.ndarray | None:
    """(m, 2) int64 bytes and time of each image file; None where one is missing or very young.

    Such a file may change again within one tick of its disk's clock, unnoticed.
    """
    stamps = [stamp_of(path) for path in columns.all_texts("path")]
    if None in stamps:
        return None
    array = np.array(stamps, np.int64).reshape(-1, 2)
    newest = array[:, 1].max(initial=0)
    return array if time.time_ns() - newest > SETTLED else None


def delete_unused(folder: Path) -> None:
    """Delete the indices that no start has used for long."""
    for file in folder.glob("*.bin"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > UNUSED_DAYS * 86400:
                file.unlink()
