"""Opening a file of weights safely: nothing in it is run, and what it holds is checked first."""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import torch
from torch import Tensor

from rfdetr.commands import steadier
from rfdetr.console import UserError
from rfdetr.runs.places import require_file
from rfdetr.text import with_article


class FileReplaced(Exception):
    """Another program replaced or changed the file while it was read."""


def read_file(path: Path) -> dict:
    """The dict in a file that torch saved, on the CPU.

    Nothing in the file is run, and reading it takes no more memory than the file has bytes.
    Raises UserError for a file that is missing, cannot be read, is damaged or wants to run code.
    """
    require_file(path)
    try:
        try:
            content = _read_once(path)
        except FileReplaced:
            content = _read_once(path)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = "it is damaged or holds more than tensors and plain values"
        if code:
            reason = f"it wants to run {code[1]}"
        raise UserError(
            f"{path} was refused, nothing in it was run: {reason}. Use a checkpoint you trust"
        ) from error
    except OSError as error:  # rights, a network disk
        raise UserError(
            f"cannot read {path} ({error.strerror or error}). It is not touched: try again"
        ) from error
    except Exception as error:  # damaged bytes make torch's reader raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or no checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint: it holds {with_article(type(content).__name__)}")
    return content


def _read_once(path: Path) -> object:
    """What one file holds, checked and read through the same handle.

    Raises FileReplaced where that failed and the path names another file by now.
    """
    with open(path, "rb") as file:
        before = _version(os.fstat(file.fileno()))
        try:
            _require_stored(file)
            file.seek(0)
            # the package keeps its settings in one of these
            with torch.serialization.safe_globals([Namespace, SimpleNamespace]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            if _version(os.stat(path)) != before:
                raise FileReplaced(f"{path} is being written by another program") from error
            raise


def _version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _require_stored(file: BinaryIO) -> None:
    """Raise ValueError for an archive that may unpack to more than the file has bytes.

    Torch's reader trusts the directory of records that the end of the file points to. It has to be
    the only one: right before that end, nothing after it, nothing before the first record.
    """
    if file.read(4) != b"PK\3\4":  # torch reads everything else as one pickle
        return
    size = file.seek(0, os.SEEK_END)
    _require_one_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if min((record.header_offset for record in records), default=0) > 0:
        raise ValueError("other bytes stand before its first record")
    # torch never compresses
    compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if compressed or sum(record.file_size for record in records) > size:
        raise ValueError("it would unpack to more than it is")


def _require_one_directory(file: BinaryIO, size: int) -> None:
    """Raise ValueError where an archive of `size` bytes does not end right after its directory."""
    file.seek(max(size - 98, 0))
    tail = file.read()
    # the last 22 bytes: signature, numbers of disks and records, the directory, a comment's length
    end_record = struct.unpack("<4s4H2LH", tail[-22:])
    signature, *_, directory_size, directory_start, comment = end_record
    directory_end = size - 22
    sound = signature == b"PK\5\6" and comment == 0
    if tail[-42:-38] == b"PK\6\7":
        # sizes of 64 bits: a record of 56 bytes that ends with the directory's size and start, and
        # 20 bytes that tell where this record starts
        directory_end = size - 98
        directory_size, directory_start = struct.unpack("<2Q", tail[-58:-42])
        (record_start,) = struct.unpack("<Q", tail[-34:-26])
        sound = sound and tail[:4] == b"PK\6\6" and record_start == directory_end
    if not sound or directory_start + directory_size != directory_end:
        raise ValueError("its end is missing, or other bytes follow")


def require_plain(state: dict) -> None:
    """Raise ValueError where an entry is not a name with a plain tensor, whole in the file."""
    for name, tensor in state.items():
        if not (type(name) is str and isinstance(tensor, Tensor) and _is_plain(tensor)):
            raise ValueError(f"{str(name)[:100]!r} is no plain tensor")
        if not _is_whole(tensor):
            raise ValueError(f"{name[:100]!r} is larger than what is stored of it")


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return not tensor.is_quantized and not tensor.is_complex()


def _is_whole(tensor: Tensor) -> bool:
    """Whether all of it is stored; strides can make a few stored bytes a huge tensor."""
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def require_finite(content: dict, path: Path) -> None:
    """Raise UserError where a weight, or what a run is resumed with, is NaN or infinite."""
    states = {name: content.get(name) for name in ("model", "ema", "training")}
    broken = [name for name, tensor in _float_tensors(states) if not tensor.isfinite().all()]
    if not broken:
        return
    amp_is_off = (content.get("args") or {}).get("amp") == "off"
    changes = steadier(content.get("stage"), amp_is_off)
    advice = f"Use another checkpoint, or train again with {changes}"
    if content.get("training"):
        best = path.with_name("best.pt")
        advice = (
            f"The run has diverged: begin a new one from {best}, if that is sound, with {changes}"
        )
    shown = ", ".join(broken[:3]) + (" ..." if len(broken) > 3 else "")
    raise UserError(
        f"{path} holds NaN or infinite values in {len(broken)} tensors ({shown}). {advice}"
    )


def _float_tensors(values: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The whole floating-point tensors in nested dicts, with their names: model.bias ..."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _float_tensors(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor) and value.is_floating_point():
            if value.layout is torch.strided and _is_whole(value):
                yield prefix + str(key), value
