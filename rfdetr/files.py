"""Files and folders: written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
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

from rfdetr.console import UserError

BLOCK = 1 << 22  # bytes of a file that are read at once
MOST_NAMED = 10  # entries of a folder, in a message


@contextlib.contextmanager
def writing_to(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Turn an OSError into a UserError with the folder, the reason and the flag to change it."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or folder})"
        in_the_way = next((place for place in (folder, *folder.parents) if place.is_file()), None)
        if in_the_way:
            reason = f"the file {in_the_way} is in the way"
        raise UserError(
            f"cannot write to the folder {folder}: {reason}. Name another with {flag}"
        ) from error


def note_of_earlier(path: Path) -> str:
    """For the message on a file to be written: that one of this name is replaced, if there is."""
    return ", in place of an earlier file" if path.exists() else ""


def make_folder(folder: Path, flag: str = "--output_dir") -> None:
    """Make a folder, if missing, and try to write a file there.  UserError as writing_to."""
    with writing_to(folder, flag):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def make_place(file: Path, flag: str) -> None:
    """Make the folder of a file to be written later.

    UserError as make_folder, or where `file` is a folder itself.
    """
    make_folder(file.parent, flag)
    if file.is_dir():
        raise UserError(f"{flag} {file} is a folder: name a file in it")


def require_earlier_report(file: Path, flag: str, key: str) -> None:
    """UserError where a JSON file to be written would replace anything but an earlier one of its
    kind, an object that has `key`.
    """
    if not file.is_file() or file.stat().st_size == 0:
        return
    with contextlib.suppress(ValueError, OSError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and key in content:
            return
    raise UserError(
        f"{flag} {file} is a file of another kind, which is not replaced: name a new one"
    )


def refuse_same_file(target: Path, flag: str, source: Path, source_flag: str) -> None:
    """Raise UserError where an output is the input, by whatever name."""
    if target.exists() and target.samefile(source):
        raise UserError(
            f"{flag} is {source_flag} ({source}): name another file, the input is never overwritten"
        )


def require_free(out: Path, flag: str) -> None:
    """UserError where there is something in `out`, a folder to be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = what_it_holds(out) if out.is_dir() else "it is a file"
        raise UserError(
            f"{flag} {out} exists already ({what}) and is never written over: name a new or empty "
            "folder"
        )


def what_it_holds(folder: Path) -> str:
    """The first entries of a folder, for a message."""
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"it holds {', '.join(names[:MOST_NAMED])}{more}" if names else "it is empty"


def file_sha256(path: Path) -> str:
    """In hex, of the whole file; large files are read a block at a time.  Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def free_disk(folder: Path) -> int:
    """Bytes free on the disk of `folder`, which may not exist yet."""
    return disk_usage(folder)[2]


def disk_usage(folder: Path) -> tuple[int, int, int]:
    """Bytes in all, used and free of the disk of `folder`, which may not exist yet."""
    folder = Path(folder).absolute()
    for path in (folder, *folder.parents):
        if path.exists():
            return shutil.disk_usage(path)
    return shutil.disk_usage(folder)  # a drive that is missing: raises the system's error


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` by what `write(file)` writes, whole or not at all.

    Raises UserError where the disk is full or the folder cannot be written.
    """
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"  # two processes may write the same file
    temporary = path.with_name(f"{path.name}.{unique}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(
            f"could not write {path} ({error}); an earlier file is kept. Free some space there, "
            "or name another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # where the folder is a file
            temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """Rename over `path`; Windows forbids it while another program reads the old file."""
    if os.name == "nt":
        for seconds in (0.1, 0.4, 2, 10, 60):
            with contextlib.suppress(PermissionError):
                os.replace(temporary, path)
                return
            time.sleep(seconds)
    os.replace(temporary, path)


def write_json(path: Path, data: dict | list) -> None:
    """Write `data` atomically as strict JSON: NaN and infinite numbers become null.

    Raises TypeError for a value that JSON has no form for, else as atomic_write.
    """
    not_strict = json.dumps(data, default=_plain)
    finite = json.loads(not_strict, parse_constant=lambda name: None)
    text = json.dumps(finite, indent=1, ensure_ascii=False) + "\n"
    content = text.encode("utf-8", "backslashreplace")
    atomic_write(Path(path), lambda file: file.write(content))


def _plain(value: object) -> object:
    """Tensors, arrays and NumPy scalars as plain numbers; paths and torch names as text."""
    import numpy as np  # here, so that a script answers --help without them
    import torch

    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (Path, torch.device, torch.dtype)):
        return str(value)
    raise TypeError(f"{value!r} has no form in JSON")


def is_special_file(path: str | Path) -> bool:
    """Whether a pipe, a socket or a device is there: to open or read one may take for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # nothing there, no rights, no path
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
