"""Printing goes on when nobody reads any more; standard library only."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO


class _LastingStream:
    """A text stream that drops what cannot be written: a closed pipe or terminal, a full disk."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, method: Callable, *values: str) -> None:
        try:
            method(*values)
        except UnicodeError:  # a ValueError too, but a defect of ours
            raise
        except (OSError, ValueError):  # ValueError: Python has closed the stream
            self._discard()

    def _discard(self) -> None:
        """Send what the stream still buffers to nowhere: Python flushes it once more at its end."""
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, a console that is closed or goes away (`>&-`, `| head`) ends nothing."""
    _open_closed_descriptors()
    before = (sys.stdout, sys.stderr)
    sys.stdout = _LastingStream(_open_stream(sys.stdout))
    sys.stderr = _LastingStream(_open_stream(sys.stderr))
    lasting = (sys.stdout, sys.stderr)
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()
        sys.stdout, sys.stderr = before


def _open_closed_descriptors() -> None:
    """Open 0, 1 and 2 where they are closed: else the next file opened gets console output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _open_stream(stream: TextIO | None) -> TextIO:
    """The stream, or one to nowhere for None; it replaces what it cannot encode."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        # the code page of a Windows console may lack the tick
        stream.reconfigure(errors="replace")
    return stream
