"""A run's folder: its number, metrics.json, TensorBoard events and log, and the atomic writing behind them."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
import torch
import torchvision
from PIL import Image
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.tensorboard import SummaryWriter

from rfdetr.console import UserError, warn

REPOSITORY = Path(__file__).resolve().parent.parent


def new_run(parent: Path, stem: str) -> Path:
    """Make PARENT/<stem>_<n>, n the first free number from 1; two runs that start at once get two folders.

    Raises UserError where it cannot be made.
    """
    try:
        Path(parent).mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):
            try:
                (folder := Path(parent, f"{stem}_{n}")).mkdir()  # fails where it exists: that is the lock
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise _unwritable(parent, error) from error


def given_run(folder: Path) -> Path:
    """Make the folder that the user named for a new run.  Raises UserError where it cannot, or holds files."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        first = next(Path(folder).iterdir(), None)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if first:
        raise UserError(f"{folder} is not empty (it holds {first.name}): name another --output_dir, or --resume it")
    return Path(folder)


def _unwritable(folder: Path, error: OSError) -> UserError:
    reason = f"{error.strerror or error} ({error.filename or folder})"
    return UserError(f"cannot write to the folder {folder}: {reason}. Name another with --output_dir, or mend this one")


def check_free_disk(folder: Path, needed: int) -> None:
    """Raise UserError where the disk of `folder` (which may not exist yet) has less than `needed` bytes free."""
    folder = Path(folder).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < needed:
        raise UserError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free and this run needs about {needed / 1e9:.1f} GB: "
            "free some space, or name a folder on another disk with --output_dir"
        )


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write(file)` fill a temporary file beside `path`, bring it to the disk, then put it in the place of `path`.

    Whatever goes wrong, even a kill -9, the old file stays whole. Raises UserError where the disk refuses
    (torch.save turns a full disk into a RuntimeError, so that counts too).
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except PermissionError:  # Windows, for the moment in which another program reads the old file
            time.sleep(0.5)
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not write {path} ({error}); an earlier file is kept. Free some space there") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: dict | list) -> None:
    """Write `data` atomically as JSON: NaN and infinity as null, tensors, arrays and NumPy scalars as plain numbers.

    Raises UserError where the disk refuses, TypeError for a value that JSON has no form for.
    """
    text = json.dumps(_plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(Path(path), lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def _plain(value):
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, (Path, torch.device, torch.dtype)) else value


def environment(device: torch.device | str = "cpu") -> dict:
    """What a result must be read with: versions, hardware, threads, the repository's commit and the command."""
    device = torch.device(device)
    # the full hash, "-dirty" after it where tracked files differ (no tag has the name "")
    describe = ("git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=40", "--match=", "--dirty")
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8") if info.exists() else "")
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cpu": cpu[1] if cpu else _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor(),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        # no .git here: an archive, unpacked perhaps inside somebody else's repository
        "commit": _output(*describe) if (REPOSITORY / ".git").exists() else None,
        "command": shlex.join(sys.argv),
    }


def _output(*command: str) -> str | None:
    """What a command prints, stripped; None where it is missing, fails or prints nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


class _Tee:
    """A stream that hands its finished lines to a log file too; of a progress bar's line only the last state."""

    def __init__(self, stream: TextIO, log: TextIO):
        self.stream, self.log, self.line = stream, log, ""

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        *lines, line = (self.line + text).split("\n")
        for finished in lines:
            self.keep(finished)
        self.line = _last_state(line) + "\r" * line.endswith("\r")  # forget the states that a later one has replaced
        return self.stream.write(text)

    def keep(self, line: str) -> None:
        try:
            self.log.write(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", _last_state(line)) + "\n")  # no cursor moves
        except (OSError, ValueError):  # full disk, closed log: the console has the line, and printing must not fail
            pass


def _last_state(line: str) -> str:
    return next((state for state in reversed(line.split("\r")) if state.strip()), "")


class Run:
    """An open run folder: log.txt takes what the console says, metrics.json and tb/ take the figures.

    `header` holds metrics.json's fields before "epochs" (stage, size, ..., environment). In a folder with an earlier
    metrics.json its first `done_epochs` epochs are kept. Use it in a `with`, or call close(). Raises UserError.
    """

    def __init__(self, folder: Path, header: dict, done_epochs: int = 0):
        self.folder = Path(folder)
        self.metrics = {"format": 1, **header, "epochs": [], "best": None}
        try:
            self._log = open(self.folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace", buffering=1)
            notes = self._resume(done_epochs)
            # on resume TensorBoard is told to forget what the stopped run wrote of the epochs that are run again
            self._writer = SummaryWriter(self.folder / "tb", purge_step=done_epochs + 1 if done_epochs else None)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._write()
        self._log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(sys.argv)}\n")
        self._tees = sys.stdout, sys.stderr = _Tee(sys.stdout, self._log), _Tee(sys.stderr, self._log)
        for note in notes:
            warn(note)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:  # the message itself is printed when the log is closed already
            self._tees[0].keep(f"ended by {kind.__name__}: {error}")
        self.close()

    def add_epoch(self, record: dict) -> None:
        """Append an epoch's record ({"epoch": n, "train": ..., "valid": ...}) and rewrite metrics.json."""
        self.metrics["epochs"].append(record)
        self._write()

    def set(self, best: dict | None = None, test: dict | None = None) -> None:
        """Set the entry of the best epoch, the scores of the test split, or both, and rewrite metrics.json."""
        self.metrics.update({name: value for name, value in (("best", best), ("test", test)) if value is not None})
        self._write()

    def scalars(self, prefix: str, values: dict, step: int) -> None:
        """Write nested numbers to TensorBoard as PREFIX/name/...; None is left out.  `step` is the epoch, from 1."""
        for name, value in values.items():
            if isinstance(value, dict):
                self.scalars(f"{prefix}/{name}", value, step)
            elif value is not None:
                self._writer.add_scalar(f"{prefix}/{name}", float(value), step)

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Write a picture to TensorBoard; `step` is the epoch, from 1."""
        self._writer.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Give the console back and close the files; a second call does nothing."""
        for name, tee in zip(("stdout", "stderr"), self._tees, strict=True):
            if getattr(sys, name) is tee:  # whoever replaced the stream after us keeps it
                setattr(sys, name, tee.stream)
            if tee.line:
                tee.keep(tee.line)
                tee.line = ""
        self._writer.close()
        self._log.close()

    def _write(self) -> None:
        write_json(self.folder / "metrics.json", self.metrics)

    def _take_over(self, metrics: Path, done_epochs: int) -> None:
        """Take epochs 1..done_epochs and their best from an earlier metrics.json."""
        earlier = json.loads(metrics.read_bytes())
        epochs = [record for record in earlier["epochs"] if record["epoch"] <= done_epochs]
        best = earlier["best"] if earlier["best"] and earlier["best"]["epoch"] <= done_epochs else None
        self.metrics.update(epochs=epochs, best=best)

    def _resume(self, done_epochs: int) -> list[str]:
        """Continue an earlier run's metrics.json and tb/, damaged files set aside; returns what to say."""
        notes = []
        for path in (*self.folder.glob("metrics.json"), *sorted(self.folder.glob("tb/*tfevents*"))):
            try:
                if path.name == "metrics.json":
                    self._take_over(path, done_epochs)
                else:
                    _check_events(path)
            except (ValueError, KeyError, TypeError):
                kind = path.name.split(".")[0]  # TensorBoard reads whatever has "tfevents" in its name
                names = (path.with_name(f"{kind}.damaged-{k}{path.suffix}") for k in itertools.count(1))
                aside = path.rename(next(name for name in names if not name.exists()))
                notes.append(f"{path} is damaged: kept as {aside.name}, a new one begins at epoch {done_epochs + 1}")
        return notes


def _check_events(events: Path) -> None:
    """Raise ValueError for a broken record; an unfinished last one, which a killed run leaves, is harmless."""
    with open(events, "rb") as file:
        while len(head := file.read(12)) == 12:  # uint64 length, uint32 its checksum, then the data and its checksum
            length, checksum = struct.unpack("<QI", head)
            if masked_crc32c(head[:8]) != checksum:
                raise ValueError(f"{events}: broken before byte {file.tell()}")
            file.seek(length + 4, os.SEEK_CUR)
