"""Files with weights, opened safely: nothing in them is run, and what they hold is judged first."""

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

from rfdetr.console import UserError, is_special_file


def read_file(path: Path) -> dict:
    """The dict in a file of torch's: nothing of it is run, and it takes no more memory than the file has bytes."""
    require_file(path)
    try:
        try:
            content = _read_once(path)
        except FileReplaced:
            content = _read_once(path)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"it wants to run {wanted[1]}"
            if wanted
            else "it is damaged or holds more than tensors and plain values"
        )
        raise UserError(
            f"{path} was refused, nothing of it was run: {why}. Use a checkpoint you trust"
        ) from error
    except OSError as error:  # rights, a network disk
        raise UserError(
            f"cannot read {path} ({error.strerror or error}). It is not touched: try again"
        ) from error
    except Exception as error:  # damaged bytes make torch's reader raise nearly anything
        raise UserError(
            f"{path} is damaged or no checkpoint ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


class FileReplaced(Exception):
    """What was read is no longer what the path names."""


def _read_once(path: Path) -> object:
    """What one file holds, judged and read through the same handle.  FileReplaced where that failed meanwhile."""
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        try:
            _require_stored(file)
            file.seek(0)
            # the package keeps its settings in one of these
            with torch.serialization.safe_globals([Namespace, SimpleNamespace]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            now = os.stat(path)
            if any(
                getattr(before, name) != getattr(now, name)
                for name in ("st_ino", "st_size", "st_mtime_ns")
            ):
                raise FileReplaced(f"{path} is being written by another program") from error
            raise


def _require_stored(file: BinaryIO) -> None:
    """Raise ValueError for an archive that may unpack to more than the file has bytes.

    Torch's reader trusts the directory of records that the end of the file points to. It has to be the one and only:
    right before that end, nothing after it, nothing before the first record.
    """
    if file.read(4) != b"PK\3\4":  # torch reads everything else as one pickle
        return
    size = file.seek(0, os.SEEK_END)
    end, long_end = size - 22, size - 98  # of the directory; the second where sizes have 64 bits
    file.seek(max(long_end, 0))
    tail = file.read()
    mark, *_, length, start, comment = struct.unpack("<4s4H2LH", tail[-22:])
    if tail[-42:-38] == b"PK\6\7":
        length, start, _, _, end = struct.unpack("<2Q2LQ", tail[-58:-26])
        mark = mark if end == long_end and tail[:4] == b"PK\6\6" else b""
    if mark != b"PK\5\6" or comment or start + length != end:
        raise ValueError("its end is missing, or other bytes follow")
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if min((record.header_offset for record in records), default=0):
        raise ValueError("other bytes stand before its first record")
    packed = any(
        record.compress_type != zipfile.ZIP_STORED for record in records
    )  # torch packs nothing
    if packed or sum(record.file_size for record in records) > size:
        raise ValueError("it would unpack to more than it is")


def require_file(path: Path) -> None:
    if is_special_file(path):
        raise UserError(f"{path} is a pipe, a socket or a device: weights are read from files")
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}{_neighbours(path)}")


def _neighbours(path: Path) -> str:
    near = (
        sorted(p.name for p in path.parent.glob("*.p*") if p.suffix in (".pt", ".pth"))
        if path.parent.is_dir()
        else []
    )
    return f". In {path.parent}: {', '.join(near)}" if near else ""


def require_plain(state: dict) -> None:
    """Raise ValueError where an entry is anything but a name and a plain tensor all of which is in the file."""
    for name, tensor in state.items():
        plain = type(name) is str and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        if not plain or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
            raise ValueError(f"{str(name)[:100]!r} is no plain tensor")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name[:100]!r} is larger than what is stored of it")


def require_finite(content: dict, path: Path) -> None:
    """Raise UserError where a weight, or what a run goes on with, is NaN or infinite."""
    states = {name: content.get(name) for name in ("model", "ema", "training")}
    broken = [name for name, tensor in _tensors(states) if not tensor.isfinite().all()]
    if not broken:
        return
    if content.get("training"):
        best = path.with_name("best.pt")
        advice = f"The run has diverged: begin a new one from {best}, if that is sound, with a lower --lr or --amp off"
    else:
        advice = "Use another checkpoint, or train again with a lower --lr or --amp off"
    shown = ", ".join(broken[:3]) + (" ..." if len(broken) > 3 else "")
    raise UserError(
        f"{path} holds NaN or infinite values in {len(broken)} tensors ({shown}). {advice}"
    )


def _tensors(values: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in nested dicts that are whole in the file, with their names: model.bias ..."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{key}.")
        elif (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.layout is torch.strided
        ):
            if (
                value.nbytes <= value.untyped_storage().nbytes()
            ):  # else small in the file and huge when read
                yield prefix + str(key), value
