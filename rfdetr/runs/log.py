"""log.txt: what the console said."""

from __future__ import annotations

import contextlib
import re
from typing import TextIO


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
        self.line = _last_state(line) + "\r" * line.endswith(
            "\r"
        )  # forget the states that a later one has replaced
        return self.stream.write(text)

    def keep(self, line: str) -> None:
        with contextlib.suppress(
            OSError, ValueError
        ):  # full disk, closed log: printing must not fail
            self.log.write(
                re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", _last_state(line)) + "\n"
            )  # no cursor moves


def _last_state(line: str) -> str:
    return next((state for state in reversed(line.split("\r")) if state.strip()), "")
