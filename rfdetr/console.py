"""What the scripts share about the command line: errors, flags, packages and printing."""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import platform
import re
import shlex
import signal
import stat
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TextIO

TICK, WARN = "✓", "⚠"
MOST = 10**9  # that a flag may say: what is larger is a slip, and no library takes it
GRACE = 8.0  # seconds from SIGTERM to the end of a script that hangs

OUT_OF_MEMORY_ADVICE = (
    "What is left: a smaller --batch, --resolution or --size, --grad_checkpoint 1, --multi_scale 0, --amp bf16 where "
    "the hardware has it, or --device cpu"
)


class UserError(Exception):
    """Bad input: the message is one paragraph saying what, where and the next command to type."""


class Stopped(BaseException):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved its state; `code` is the exit status.

    It may be raised anywhere by a signal, so that no `except Exception` on the way may take it for an error.
    """

    def __init__(self, code: int):
        super().__init__(f"stopped with exit status {code}")
        self.code = code


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the main memory had no more: CUDA, cuBLAS, MPS, torch on Linux and Windows, NumPy."""
    texts = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or isinstance(error, RuntimeError)
        and any(t in str(error) for t in texts)
    )


def boolean(text: str) -> bool:
    """argparse type of the guide's 0|1 flags; also takes true/false and yes/no."""
    value = text.strip().lower()
    if value in ("1", "true", "yes"):
        return True
    if value in ("0", "false", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected 0, 1, true, false, yes or no, got {text!r}")


def number(kind: type, low: float = -MOST, high: float = MOST) -> Callable[[str], float]:
    """argparse type: an int or float within [low, high]; the error names the accepted range."""

    def parse(text: str):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:  # never true of nan
                return value
        raise argparse.ArgumentTypeError(
            f"expected {kind.__name__} >= {low} and <= {high}, got {text!r}"
        )

    return parse


def packages(requirements: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    """({name: installed version} of this Python and each line "name>=version" of that file, {name: the least that it
    needs} of those that are missing or older)."""

    def release(
        version: str,
    ) -> list[int]:  # the leading numbers, padded: "2.10.0+cpu" -> [2, 10, 0, 0, 0, 0]
        numbers = [int(number or 0) for number in re.match(r"[\d.]*", version).group().split(".")]
        return numbers + [0] * (6 - len(numbers))

    lines = Path(requirements).read_text(encoding="utf-8")
    needed, found = dict(re.findall(r"^([\w-]+)>=([\d.]+)", lines, re.MULTILINE)), {}
    for name in needed:
        try:
            found[name] = metadata.version(name) or "damaged"  # None for a package half removed
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    found, needed = {"python": platform.python_version(), **found}, {"python": "3.10", **needed}
    return found, {
        name: least for name, least in needed.items() if release(found[name]) < release(least)
    }


def is_special_file(path: str | Path) -> bool:
    """Whether a pipe, a socket or a device is there: opening or reading one may wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # nothing there, no rights, no path
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def keep_flags(names: list[str]) -> str:
    """shrink_head.py's --keep for these classes in this order, to be pasted into a shell.

    A name that looks like a flag is given with an =, which argparse takes for a value.
    """
    words, listing = [], False
    for name in names:
        if name.startswith("-"):
            words.append(shlex.quote(f"--keep={name}"))
            listing = False
            continue
        if not listing:
            words.append("--keep")
        words.append(f'"{name}"' if re.fullmatch(r"[\w .-]+", name) else shlex.quote(name))
        listing = True
    return " ".join(words)


def first_to_say(what: str) -> bool:
    """Whether no other process of the run has said this yet; True where it cannot be told."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from torch.distributed import TCPStore  # this module is read where torch is missing, too

    with contextlib.suppress(KeyError, ValueError, RuntimeError):
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"said {os.environ.get('TORCHELASTIC_RESTART_COUNT')} {what}", 1) == 1
    return True


def is_control(character: str) -> bool:
    """Whether a character moves a cursor, breaks a line or cannot be written at all (half a surrogate pair)."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def printable(text: object) -> str:
    """As text on one line, control characters as escapes: names in a dataset or on a disk may hold anything."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if is_control(c) else c for c in text)


def tick(message: str) -> None:
    if first_to_say(message):
        print(f"{TICK} {printable(message)}", flush=True)


def warn(message: str) -> None:
    if first_to_say(message):
        print(f"{WARN} {printable(message)}", flush=True)


def say(text: str) -> None:
    """Print once for all processes of a run."""
    if first_to_say(text):
        print(text, flush=True)


def banner(title: str, rows: dict[str, object]) -> None:
    """Print a stage's banner and its `Name: value` rows."""
    width = max(len(title) + 4, 60)
    print("=" * width + f"\n  {title}\n" + "=" * width)
    for name, value in rows.items():
        print(f"{name + ':':<13} {printable(value)}")
    print(flush=True)


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


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)  # files are closed on the way


def _kill_loaders() -> None:
    """End the processes that load data, which have nothing to keep: one that hangs would hold up the end."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for an error
    for child in children:
        child.kill()


@functools.cache
def _watch_sigterm() -> None:
    """Have a thread end the process GRACE seconds after a SIGTERM that _leave has not ended it by.

    The main thread may be in a C call, where no handler runs, or wait for another thread on its way out.
    """
    if not hasattr(os, "fork"):  # on Windows a process is ended from outside, at once
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(
        after_in_child=lambda: signal.set_wakeup_fd(-1)
    )  # the loader's processes get signals, too

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _leave:
                time.sleep(GRACE)
                if signal.getsignal(signal.SIGTERM) is _leave:
                    for child in multiprocessing.active_children():
                        child.kill()
                    os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def run_script(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Run a script's main(argv) and leave with its exit status.

    UserError: one paragraph on stderr, 2. Ctrl-C: 130, SIGTERM: 143, after GRACE seconds at the latest. Stopped: its
    own code. `--debug` shows tracebacks. A console that goes away changes nothing.
    """
    with lasting_output():  # first: a pipe of ours is no console
        signal.signal(signal.SIGTERM, _leave)
        _watch_sigterm()
        try:
            _run(main, argv)
        except SystemExit:
            _kill_loaders()
            raise


def _run(main: Callable[[list[str] | None], None], argv: list[str] | None) -> None:
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        main(argv)
    except (UserError, OSError) as error:  # the system's refusals name their file
        if debug:
            traceback.print_exc()
        if first_to_say("why it ends"):
            # one paragraph, whatever names hold
            lines = [printable(line) for line in str(error).splitlines() if line.strip()]
            print(*lines, sep="\n", file=sys.stderr, flush=True)
        sys.exit(2)
    except Stopped as stopped:
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        if first_to_say("why it ends"):
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        reason, status = " ".join(str(error).split()), 1
        message = f"error: unexpected {type(error).__name__}: {reason}"
        advice = "This is a defect of the program. Run the command again with --debug to see where it happened."
        if is_out_of_memory(error):
            message, advice, status = (
                f"out of memory ({reason or 'main memory'})",
                OUT_OF_MEMORY_ADVICE,
                2,
            )
        if first_to_say("why it ends"):
            print(message, advice, sep="\n", file=sys.stderr, flush=True)
        sys.exit(status)
