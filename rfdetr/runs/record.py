"""metrics.json and TensorBoard."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import shlex
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter, masked_crc32c
from torch.utils.tensorboard import summary

from rfdetr.console import UserError, warn
from rfdetr.files import write_json, writing_to
from rfdetr.runs.lock import lock_run, unlock_run
from rfdetr.runs.log import _Tee

PICTURE_SIDE = 1024  # pixels; larger pictures would swell TensorBoard's files


def test_is_scored(folder: Path) -> bool:
    """Whether a run's metrics.json has the scores of its test split, the last thing that a run writes."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return "test" in json.loads((folder / "metrics.json").read_bytes())
    return False


def best_of_each(run: Path) -> dict[str, float] | None:
    """The best valid bbox/mAP of a run's regular and of its averaged weights; None where its file does not tell."""
    best = {}
    try:
        epochs = json.loads((run / "metrics.json").read_bytes())["epochs"]
        for weights, key in (("regular", "valid"), ("ema", "valid_ema")):
            scores = [epoch[key]["bbox"]["mAP"] for epoch in epochs if epoch.get(key)]
            best[weights] = max(score for score in scores if score is not None)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return best


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
            self._log = open(
                self.folder / "log.txt",
                "a",
                encoding="utf-8",
                errors="backslashreplace",
                buffering=1,
            )
            self._log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(sys.argv)}\n")
        self._tees = sys.stdout, sys.stderr = (
            _Tee(sys.stdout, self._log),
            _Tee(sys.stderr, self._log),
        )
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
        self.metrics.update(
            {name: value for name, value in (("best", best), ("test", test)) if value is not None}
        )
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
                warn(
                    f"{self.folder / 'tb'} takes no more ({error}): the curves go on in metrics.json alone"
                )

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
        warn(
            f"{path} is damaged: kept as {aside.name}, a new one begins at epoch {done_epochs + 1}"
        )

    def _take_over(self, path: Path, done_epochs: int) -> None:
        """Take epochs 1..done_epochs and their best from an earlier metrics.json; a damaged one is set aside."""
        if not path.exists():
            return
        try:
            earlier = json.loads(path.read_bytes())
            best, epochs = (
                earlier["best"],
                [record for record in earlier["epochs"] if record["epoch"] <= done_epochs],
            )
            best = best if best and best["epoch"] <= done_epochs else None
            self.metrics.update(epochs=epochs, best=best)
        except (ValueError, KeyError, TypeError, RecursionError, IsADirectoryError):
            self._set_aside(path, "metrics.damaged-{}.json", done_epochs)
