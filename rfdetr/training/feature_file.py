"""Numbered records of bytes in one file, or in memory: whatever is read is what was written."""

from __future__ import annotations

import mmap
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rfdetr.console import warn


class RecordFile:
    """Records, each at its own place, in memory or in a file that several processes fill and read.

    First comes a state (int64) a record: 0 until it is there, then (its bytes + 1) << 32 | crc32.
    Then come the places, as large as the records may be. While a record is written its state is
    zero, so that a kill costs no more than one record, and processes that fill a file at once only
    do the same work twice. The file is read, not mapped: writing to a full disk is an error then,
    and no crash.
    """

    def __init__(self, path: Path, rooms: Sequence[int]):
        """rooms: bytes of each record's place."""
        self.path = path
        self.offsets = np.cumsum([8 * len(rooms), *rooms])  # where each place begins, and the end
        self.bytes = int(self.offsets[-1])
        self.full = False  # the disk
        # records that this process has written, or read and compared
        self.checked = np.zeros(len(rooms), dtype=bool)
        self.states = torch.from_numpy(self.saved_states())
        self._lock = threading.Lock()  # a thread may read ahead

    def saved_states(self) -> np.ndarray:
        """The states in the file; all zero where there is none of the right size."""
        count = len(self.checked)
        if self.path.is_file() and self.path.stat().st_size == self.bytes:
            return np.fromfile(self.path, "<i8", count)
        return np.zeros(count, "<i8")

    def saved_bytes(self) -> np.ndarray:
        """Of each record in the file; -1 where it is not there."""
        return (self.saved_states() >> 32) - 1

    def open_in_memory(self) -> None:
        self.file = mmap.mmap(-1, self.bytes)
        self.states.zero_()

    def open(self) -> None:
        """Raises OSError where the disk refuses."""
        with open(self.path, "ab") as file:
            file.truncate(self.bytes)  # zeros, where it is new: no record is there
        self.file = open(self.path, "r+b", buffering=0)

    def remove_if_damaged(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size not in (0, self.bytes):
            warn(
                f"Feature cache {self.path} is damaged ({size:,} bytes, not {self.bytes:,}): "
                "made anew"
            )
            self.path.unlink()

    def _read(self, offset: int, size: int) -> bytes:
        with self._lock:
            self.file.seek(offset)
            return self.file.read(size)

    def _write(self, offset: int, data: bytes) -> None:
        with self._lock:
            self.file.seek(offset)
            if self.file.write(data) != len(data):
                raise OSError("no space left")

    def _saved_state(self, number: int) -> int:
        return int.from_bytes(self._read(8 * number, 8), "little", signed=True)

    def load(self, number: int) -> bytes | None:
        """A record; None where it is not there or not what was written."""
        state = self._saved_state(number)
        if state != self.states[number]:  # another run has written it
            self.states[number] = state
            self.checked[number] = False
        size, checksum = divmod(state, 1 << 32)
        size -= 1
        begin, end = self.offsets[number : number + 2].tolist()
        record = b""
        if 0 < size <= end - begin:
            record = self._read(begin, size)
        # another run may have been writing it just now
        is_known = self.checked[number] and self._saved_state(number) == state
        if not record or not (is_known or zlib.crc32(record) == checksum):
            self.states[number] = 0
            return None
        self.checked[number] = True
        return record

    def keep(self, number: int, record: bytes) -> None:
        """Write a record, then its state, which is zero meanwhile; a full disk is said once."""
        if self.full:
            return
        state = (len(record) + 1) << 32 | zlib.crc32(record)
        try:
            self._write(8 * number, bytes(8))
            self._write(int(self.offsets[number]), record)
            self._write(8 * number, state.to_bytes(8, "little"))
        except OSError as error:
            self.full = True
            warn(
                f"Feature cache {self.path} takes no more ({error}): "
                "the missing views are computed every time"
            )
            return
        self.states[number] = state
        self.checked[number] = True
