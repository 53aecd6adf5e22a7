"""A console that may go away; standard library only."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO


class _LastingStream:
    """A text stream whose words go nowhere once nobody reads them: a closed pipe or terminal, a full disk."""

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
        except UnicodeError:
            raise
        except (OSError, ValueError):  # a stream that Python has closed gives ValueError
            # what it still holds would fail once more when the interpreter ends
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, a console that is or goes away (`>&-`, `| head`, a closed terminal) ends nothing."""
    for number in range(3):
        try:
            os.fstat(number)
        except (
            OSError
        ):  # closed: the next file that is opened would get what is meant for the console
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    streams = sys.stdout, sys.stderr
    lasting = [
        _LastingStream(stream or open(os.devnull, "w", encoding="utf-8")) for stream in streams
    ]
    for one in lasting:
        if hasattr(one.stream, "reconfigure"):  # a Windows console's code page may lack the tick
            one.stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for one in lasting:
            one.flush()
        sys.stdout, sys.stderr = streams
