"""tb/ in a run's folder: curves and pictures for TensorBoard."""

from __future__ import annotations

import os
import platform
import struct
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter, masked_crc32c
from torch.utils.tensorboard import summary

from rfdetr.console import warn
from rfdetr.runs.folder import set_aside

PICTURE_SIDE = 1024  # pixels; larger pictures would swell TensorBoard's files
CHECKED = 1 << 16  # bytes; checksums are computed in Python, so those of larger records are not
HEAD = struct.Struct("<QI")  # of a record: its size, checksum of the size; data and theirs follow
CHECKSUM = struct.Struct("<I")


class EventFile:
    """A new file of events in `folder`.

    TensorBoard is told to forget what a stopped run wrote of the epochs after `done_epochs`, which
    are run again. A damaged file of an earlier process is set aside. Every event is written at
    once: SummaryWriter's thread could not report a full disk.
    """

    def __init__(self, folder: Path, done_epochs: int):
        self.folder = Path(folder)
        self._set_damaged_aside(done_epochs + 1)
        self.folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        self._writer: RecordWriter | None = RecordWriter(open(self.folder / name, "wb"))
        self._write(file_version="brain.Event:2")
        self._write(step=done_epochs + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, prefix: str, values: dict, step: int) -> None:
        """Write nested numbers as PREFIX/name/..., None left out; `step` is the epoch, from 1."""
        for name, value in values.items():
            tag = f"{prefix}/{name}"
            if isinstance(value, dict):
                self.scalars(tag, value, step)
            elif value is not None:
                self._write(step=step, summary=summary.scalar(tag, float(value)))

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Write a picture, shrunk to PICTURE_SIDE; `step` is the epoch, from 1."""
        small = picture.convert("RGB")
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        self._write(step=step, summary=summary.image(tag, np.asarray(small), dataformats="HWC"))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, **fields) -> None:
        if self._writer is None:
            return
        event = Event(wall_time=time.time(), **fields)
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:
            self._writer = None
            warn(f"{self.folder} takes no more ({error}): metrics.json alone goes on")

    def _set_damaged_aside(self, next_epoch: int) -> None:
        """Set aside what is in the way of the folder, and files in it that cannot be read."""
        if not self.folder.exists():
            return
        name = self.folder.with_name("tb.damaged-{}")
        if not self.folder.is_dir():
            set_aside(self.folder, name, next_epoch)
            return
        for path in list(self.folder.iterdir()):
            if path.is_file() and not _is_readable(path):
                set_aside(path, name, next_epoch)


def _is_readable(events: Path) -> bool:
    """Whether TensorBoard can read a file to its end, where the last record may be cut short."""
    with open(events, "rb") as file:
        while True:
            head = file.read(HEAD.size)
            if len(head) < HEAD.size:
                return True
            size, checksum = HEAD.unpack(head)
            if checksum != masked_crc32c(head[:8]):
                return False
            if size > CHECKED:
                file.seek(size + CHECKSUM.size, os.SEEK_CUR)
                continue
            data = file.read(size)
            tail = file.read(CHECKSUM.size)
            if len(tail) == CHECKSUM.size and CHECKSUM.unpack(tail)[0] != masked_crc32c(data):
                return False
