"""A run's folder: its number, metrics.json, TensorBoard events and log, and the atomic writing behind them."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
import psutil
import torch
import torchvision
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter, masked_crc32c
from torch.utils.tensorboard import summary

from rfdetr.console import UserError, warn

REPOSITORY = Path(__file__).resolve().parent.parent
LOCK = "run.lock"  # in a run's folder: the process that writes there
SAME_START = 10.0  # seconds by which two readings of a process's start may differ
PICTURE_SIDE = 1024  # pixels; larger pictures would swell TensorBoard's files


@contextlib.contextmanager
def writing_to(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Turn an OSError into the UserError that names the folder, the reason and the flag to change it with."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or folder})"
        raise UserError(f"cannot write to the folder {folder}: {reason}. Name another with {flag}") from error


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


def new_run(parent: Path, stem: str) -> Path:
    """Make PARENT/<stem>_<n>, n the first free number; runs that start at once get two folders.  Raises UserError."""
    with writing_to(parent):
        Path(parent).mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):
            with contextlib.suppress(FileExistsError):
                (folder := Path(parent, f"{stem}_{n}")).mkdir()  # fails where it exists: that is the lock
                return folder


def given_run(folder: Path) -> Path:
    """Make the folder that the user named for a new run.  Raises UserError where it cannot, or holds files."""
    make_folder(folder)
    if first := next(Path(folder).iterdir(), None):
        raise UserError(f"{folder} is not empty (it holds {first.name}): name another --output_dir, or --resume it")
    return Path(folder)


def free_disk(folder: Path) -> int:
    """Bytes free on the disk of `folder`, which may not exist yet."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next((path for path in (folder, *folder.parents) if path.exists()), folder)).free


def check_free_disk(folder: Path, needed: int) -> None:
    """Raise UserError where the disk of `folder` has less than `needed` bytes free."""
    if (free := free_disk(folder)) < needed:
        sizes = f"{free / 1e9:.1f} GB free and this run needs about {needed / 1e9:.1f} GB"
        raise UserError(f"the disk of {folder} has {sizes}: free some space, or name another disk with --output_dir")


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Put what `write(file)` writes in the place of `path`, whole or not at all.  Raises UserError for a full disk."""
    temporary = path.parent / f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"  # no other writer has it
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for wait in (0.1, 0.4, 2, 10, 60):  # seconds: on Windows another program may be reading the old file
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


def lock_run(folder: Path) -> None:
    """Make this process the only one that writes to a run's folder, until unlock_run or its end.

    A lock that a killed process of this machine has left is taken over, and said.  Raises UserError where another
    process has it, or where that cannot be told from here.
    """
    lock = Path(folder) / LOCK
    own = {"pid": os.getpid(), "host": platform.node(), "started": psutil.Process().create_time()}
    with writing_to(folder):
        while True:
            with contextlib.suppress(FileExistsError):
                with open(lock, "x", encoding="utf-8") as file:
                    json.dump(own, file)
                atexit.register(unlock_run, lock.parent.absolute())
                return
            holder = _holder(lock)
            if (holder.get("pid"), holder.get("host")) == (own["pid"], own["host"]):  # of an earlier call
                return
            _require_gone(holder, lock, own["host"])
            # renamed first: of two processes that find it, one gets it
            aside = lock.with_name(f"{LOCK}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
            with contextlib.suppress(FileNotFoundError):
                lock.rename(aside)
                if _holder(aside) != holder:  # somebody was faster, and this is the new one
                    aside.rename(lock)
                    continue
                aside.unlink()
                warn(f"{folder} was locked by process {holder.get('pid', '(unknown)')}, which is gone: taken over")


def unlock_run(folder: Path) -> None:
    """Give a folder back that this process has locked; a second call does nothing."""
    lock = Path(folder) / LOCK
    if _holder(lock).get("pid") == os.getpid():
        with contextlib.suppress(OSError):
            lock.unlink()


def _holder(lock: Path) -> dict:
    """What a lock says of its process; {} for one that is gone or, a while after, still half written."""
    for wait in (0.05, 0.2, 0.5, 0):  # seconds: it is made first and written then
        with contextlib.suppress(FileNotFoundError, ValueError):
            holder = json.loads(lock.read_bytes())
            return holder if isinstance(holder, dict) else {}
        if not lock.exists():
            return {}
        time.sleep(wait)
    return {}


def _require_gone(holder: dict, lock: Path, host: str) -> None:
    """Raise UserError where the process of a lock may still be there; `host` is this machine's name."""
    pid, other, started = (holder.get(key) for key in ("pid", "host", "started"))
    if type(pid) is not int or pid <= 0 or type(other) is not str or type(started) is not float:
        return  # killed while it wrote
    if other != host:
        raise UserError(
            f"{lock.parent} belongs to process {pid} on {other}, and two cannot write to one run. If it has ended, "
            f"delete {lock} and run the command again"
        )
    try:
        process = psutil.Process(pid)
        # a later process may have got the number; clocks are set meanwhile
        running = abs(process.create_time() - started) < SAME_START and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        running = False
    except psutil.AccessDenied:
        running = True
    if running:
        raise UserError(
            f"{lock.parent} belongs to process {pid} on {other}, which is running, and two cannot write to one run: "
            "wait for its end or stop it, or train a new run with another --output_dir"
        )


def write_json(path: Path, data: dict | list) -> None:
    """Write `data` atomically as strict JSON; TypeError for a value that it has no form for, else as atomic_write."""
    finite = json.loads(json.dumps(data, default=_plain), parse_constant=lambda name: None)  # NaN, Infinity
    text = json.dumps(finite, indent=1, ensure_ascii=False) + "\n"
    atomic_write(Path(path), lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def _plain(value):
    """Tensors, arrays and NumPy scalars as plain numbers; paths and torch names as text."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (Path, torch.device, torch.dtype)):
        return str(value)
    raise TypeError(f"{value!r} has no form in JSON")


def environment(device: torch.device | str = "cpu") -> dict:
    """What a result must be read with: versions, hardware, threads, the repository's commit and the command."""
    device = torch.device(device)
    # the full hash, "-dirty" after it where tracked files differ (no tag has the name "")
    describe = ("git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=40", "--match=", "--dirty")
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8") if info.exists() else "")
    return {
        **{module.__name__: module.__version__ for module in (torch, torchvision, np)},
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
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None


def test_is_scored(folder: Path) -> bool:
    """Whether a run's metrics.json has the scores of its test split, the last thing that a run writes."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return "test" in json.loads((folder / "metrics.json").read_bytes())
    return False


def start_command(folder: Path) -> str | None:
    """What a run was started with, from its log; None where there is no log."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return "python " + (folder / "log.txt").read_text(encoding="utf-8").splitlines()[0].split(" ", 3)[3]


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
        with contextlib.suppress(OSError, ValueError):  # full disk, closed log: printing must not fail
            self.log.write(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", _last_state(line)) + "\n")  # no cursor moves


def _last_state(line: str) -> str:
    return next((state for state in reversed(line.split("\r")) if state.strip()), "")


def _whole(events: Path) -> bool:
    """Whether TensorBoard can read a file's records (of pictures, whether it finds them); the last may be cut short."""
    with open(events, "rb") as file:
        while len(head := file.read(12)) == 12:
            size, check = struct.unpack("<QI", head)
            if check != masked_crc32c(head[:8]):
                return False
            if size > 1 << 16:  # the checksum is computed in Python
                file.seek(size + 4, os.SEEK_CUR)
            elif len(data := file.read(size + 4)) == size + 4:
                if struct.unpack("<I", data[-4:])[0] != masked_crc32c(data[:-4]):
                    return False
    return True


class Run(contextlib.AbstractContextManager):
    """An open run folder, locked: log.txt takes what the console says, metrics.json and tb/ take the figures.

    `header`: metrics.json's fields before "epochs"; of an earlier file the first `done_epochs` epochs are kept. What a
    killed run left half written is removed, and what is damaged is set aside.
    """

    def __init__(self, folder: Path, header: dict, done_epochs: int = 0, tensorboard: bool = True):
        self.folder = Path(folder)
        self.metrics = {"format": 1, **header, "epochs": [], "best": None}
        self._events: RecordWriter | None = None
        self._failed: set[str] = set()
        lock_run(folder)
        with writing_to(folder):
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink()
            self._log = open(self.folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace", buffering=1)
            self._log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(sys.argv)}\n")
        self._tees = sys.stdout, sys.stderr = _Tee(sys.stdout, self._log), _Tee(sys.stderr, self._log)
        try:
            with writing_to(folder):
                self._take_over(self.folder / "metrics.json", done_epochs)
            self.set()
            if tensorboard:
                with self.optional(f"opening {self.folder / 'tb'} for TensorBoard"):
                    self._open_events(self.folder / "tb", done_epochs)
        except UserError:
            self.close()
            raise

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:  # the message itself is printed when the log is closed already
            self._tees[0].keep(f"ended by {kind.__name__}: {error}")
        self.close()

    def add_epoch(self, record: dict) -> None:
        """Append an epoch's record ({"epoch": n, "train": ..., "valid": ...}) and rewrite metrics.json."""
        self.metrics["epochs"].append(record)
        self.set()

    def set(self, best: dict | None = None, test: dict | None = None) -> None:
        """Set the entry of the best epoch or the scores of the test split, where given, and rewrite metrics.json."""
        self.metrics.update({name: value for name, value in (("best", best), ("test", test)) if value is not None})
        write_json(self.folder / "metrics.json", self.metrics)

    def scalars(self, prefix: str, values: dict, step: int) -> None:
        """Write nested numbers to TensorBoard as PREFIX/name/...; None is left out.  `step` is the epoch, from 1."""
        for name, value in values.items():
            if isinstance(value, dict):
                self.scalars(f"{prefix}/{name}", value, step)
            elif value is not None:
                self._event(step=step, summary=summary.scalar(f"{prefix}/{name}", float(value)))

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Write a picture to TensorBoard, shrunk to PICTURE_SIDE; `step` is the epoch, from 1."""
        small = picture.convert("RGB")
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        self._event(step=step, summary=summary.image(tag, np.asarray(small), dataformats="HWC"))

    @contextlib.contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """Around what a run can do without: any error in it is a warning, once for each `what`, and no end."""
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                reason = " ".join(str(error).split())
                warn(f"{what} failed ({type(error).__name__}: {reason}): training goes on without")

    def _event(self, **fields) -> None:
        """Write one event at once: a thread of its own, as SummaryWriter has, could not say that the disk is full."""
        if self._events is not None:
            try:
                self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())
                self._events.flush()
            except OSError as error:
                self._events = None
                warn(f"{self.folder / 'tb'} takes no more ({error}): the curves go on in metrics.json alone")

    def close(self) -> None:
        """Give the console back and close the files; a second call does nothing."""
        for name, tee in zip(("stdout", "stderr"), self._tees, strict=True):
            if getattr(sys, name) is tee:  # whoever replaced the stream after us keeps it
                setattr(sys, name, tee.stream)
            if tee.line:
                tee.keep(tee.line)
        for file in (self._events, self._log):
            with contextlib.suppress(OSError):  # a full disk, which the run has met before
                if file is not None:
                    file.close()
        unlock_run(self.folder)

    def _open_events(self, folder: Path, done_epochs: int) -> None:
        """A new file in tb/, which tells TensorBoard to forget what a stopped run wrote of the epochs run again."""
        for path in folder.iterdir() if folder.is_dir() else [folder] * folder.exists():
            if path == folder or path.is_file() and not _whole(path):
                self._set_aside(path, "tb.damaged-{}", done_epochs)
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        self._events = RecordWriter(open(folder / name, "wb"))
        self._event(file_version="brain.Event:2")
        self._event(step=done_epochs + 1, session_log=SessionLog(status=SessionLog.START))

    def _set_aside(self, path: Path, name: str, done_epochs: int) -> None:
        """Rename a damaged file, {} in its new name being a number, and say so."""
        names = (self.folder / name.format(n) for n in itertools.count(1))
        aside = path.rename(next(name for name in names if not name.exists()))
        warn(f"{path} is damaged: kept as {aside.name}, a new one begins at epoch {done_epochs + 1}")

    def _take_over(self, path: Path, done_epochs: int) -> None:
        """Take epochs 1..done_epochs and their best from an earlier metrics.json; a damaged one is set aside."""
        if not path.exists():
            return
        try:
            earlier = json.loads(path.read_bytes())
            best, epochs = earlier["best"], [record for record in earlier["epochs"] if record["epoch"] <= done_epochs]
            best = best if best and best["epoch"] <= done_epochs else None
            self.metrics.update(epochs=epochs, best=best)
        except (ValueError, KeyError, TypeError, RecursionError, IsADirectoryError):
            self._set_aside(path, "metrics.damaged-{}.json", done_epochs)
