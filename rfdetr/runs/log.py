"""log.txt: what the console said, and when."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TextIO

LOG = "log.txt"
TIME = "%Y-%m-%d %H:%M:%S"
CURSOR_MOVES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class ConsoleLog:
    """Writes to a run's log.txt what stdout and stderr print, until close()."""

    def __init__(self, folder: Path):
        path = Path(folder, LOG)
        self.file = open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
        self.file.write(f"--- {time.strftime(TIME)} {shlex.join(sys.argv)}\n")
        self.streams = {
            "stdout": _Tee(sys.stdout, self.file),
            "stderr": _Tee(sys.stderr, self.file),
        }
        for name, stream in self.streams.items():
            setattr(sys, name, stream)

    def note(self, line: str) -> None:
        """Write a line to the log alone."""
        self.streams["stdout"].keep(line)

    def close(self) -> None:
        """Give the console back and close the file."""
        for name, stream in self.streams.items():
            if getattr(sys, name) is stream:  # else somebody has replaced ours, and keeps it
                setattr(sys, name, stream.stream)
            if stream.line:
                stream.keep(stream.line)
        with contextlib.suppress(OSError):  # a full disk
            self.file.close()


class _Tee:
    """A stream that copies its finished lines to a log; of a progress bar only the last state."""

    def __init__(self, stream: TextIO, log: TextIO):
        self.stream = stream
        self.log = log
        self.line = ""  # begun, not finished

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        *finished, begun = (self.line + text).split("\n")
        for line in finished:
            self.keep(line)
        # forget the states of a bar that a later one has replaced
        self.line = _last_state(begun)
        if begun.endswith("\r"):
            self.line += "\r"
        return self.stream.write(text)

    def keep(self, line: str) -> None:
        """Write a line to the log, with the time."""
        text = CURSOR_MOVES.sub("", _last_state(line))
        with contextlib.suppress(OSError, ValueError):  # full disk, closed log: printing goes on
            self.log.write(f"{time.strftime(TIME)} {text}".rstrip() + "\n")


def _last_state(line: str) -> str:
    """What a console shows of a line in the end: the text after its last carriage return."""
    for state in reversed(line.split("\r")):
        if state.strip():
            return state
    return ""


def start_command(folder: Path) -> str | None:
    """The command that a run was started with, from its log; None where there is no log."""
    try:
        first_line = Path(folder, LOG).read_text(encoding="utf-8").splitlines()[0]
        _, _, _, command = first_line.split(" ", 3)  # ---, date, time
    except (OSError, ValueError, IndexError):
        return None
    return f"python {command}"
