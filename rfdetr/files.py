"""Files and folders to be written: whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from rfdetr.console import UserError


def is_special_file(path: str | Path) -> bool:
    """Whether a pipe, a socket or a device is there: opening or reading one may wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # nothing there, no rights, no path
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def writing_to(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Turn an OSError into the UserError that names the folder, the reason and the flag to change it with."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or folder})"
        raise UserError(
            f"cannot write to the folder {folder}: {reason}. Name another with {flag}"
        ) from error


def make_folder(folder: Path, flag: str = "--output_dir") -> None:
    """Make a folder where it is missing, and see whether a file can be written there.  UserError as writing_to."""
    with writing_to(folder, flag):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def make_place(file: Path, flag: str) -> None:
    """Make the folder of a file to be written at the end.  UserError as make_folder, or where it is a folder itself."""
    make_folder(file.parent, flag)
    if file.is_dir():
        raise UserError(f"{flag} {file} is a folder: name a file in it")


def free_disk(folder: Path) -> int:
    """Bytes free on the disk of `folder`, which may not exist yet."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(
        next((path for path in (folder, *folder.parents) if path.exists()), folder)
    ).free


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Put what `write(file)` writes in the place of `path`, whole or not at all.  Raises UserError for a full disk."""
    temporary = (
        path.parent / f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    )  # no other writer has it
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for wait in (
            0.1,
            0.4,
            2,
            10,
            60,
        ):  # seconds: on Windows another program may be reading the old file
            with contextlib.suppress(PermissionError if os.name == "nt" else ()):
                os.replace(temporary, path)
                break
            time.sleep(wait)
        else:
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(
            f"could not write {path} ({error}); an earlier file is kept. Free some space there, or name another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # where the folder is a file
            temporary.unlink(missing_ok=True)


def write_json(path: Path, data: dict | list) -> None:
    """Write `data` atomically as strict JSON; TypeError for a value that it has no form for, else as atomic_write."""
    finite = json.loads(
        json.dumps(data, default=_plain), parse_constant=lambda name: None
    )  # NaN, Infinity
    text = json.dumps(finite, indent=1, ensure_ascii=False) + "\n"
    atomic_write(Path(path), lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def _plain(value):
    """Tensors, arrays and NumPy scalars as plain numbers; paths and torch names as text."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (Path, torch.device, torch.dtype)):
        return str(value)
    raise TypeError(f"{value!r} has no form in JSON")
