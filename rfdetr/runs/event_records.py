"""The records of TensorBoard's event files: reading them, and leaving some out."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import masked_crc32c

from rfdetr.files import atomic_write

CHECKED = 1 << 16  # bytes; checksums are computed in Python, so those of larger records are not
HEAD = struct.Struct("<QI")  # of a record: its size, checksum of the size; data and theirs follow
CHECKSUM = struct.Struct("<I")


def read_records(events: Path) -> Iterator[tuple[bytes, bytes]]:
    """Each record as it is stored, and its data; the last one may be cut short, and is left out.

    Raises ValueError where the file is damaged.
    """
    with open(events, "rb") as file:
        while True:
            head = file.read(HEAD.size)
            if len(head) < HEAD.size:
                return
            size, checksum = HEAD.unpack(head)
            if checksum != masked_crc32c(head[:8]):
                raise ValueError(f"{events} is damaged")
            if size > os.fstat(file.fileno()).st_size:
                return
            data = file.read(size)
            tail = file.read(CHECKSUM.size)
            if len(tail) < CHECKSUM.size:
                return
            if size <= CHECKED and CHECKSUM.unpack(tail)[0] != masked_crc32c(data):
                raise ValueError(f"{events} is damaged")
            yield head + data + tail, data


def is_readable(events: Path) -> bool:
    """Whether TensorBoard can read a file to its end, where the last record may be cut short."""
    try:
        for _ in read_records(events):
            pass
    except ValueError:
        return False
    return True


def keep_events(events: Path, wanted: Callable[[Event], bool]) -> None:
    """Rewrite a file without the events that are not wanted, if it has any.

    Raises UserError where the file cannot be replaced.
    """

    def is_kept(data: bytes) -> bool:
        try:
            return wanted(Event.FromString(data))
        except DecodeError:
            return False

    if all(is_kept(data) for _, data in read_records(events)):
        return
    kept = (stored for stored, data in read_records(events) if is_kept(data))
    atomic_write(events, lambda file: file.writelines(kept))
