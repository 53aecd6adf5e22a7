"""What the scripts share about the command line: errors, flags, packages and printing."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta

from rfdetr.memory import OUT_OF_MEMORY_ADVICE, is_out_of_memory
from rfdetr.sigterm import kill_loaders, leave, watch_sigterm
from rfdetr.streams import lasting_output
from rfdetr.text import printable

TICK, WARN = "✓", "⚠"
MOST = 10**9  # that a flag may say: what is larger is a slip, and no library takes it


class UserError(Exception):
    """Bad input: the message is one paragraph saying what, where and the next command to type."""


class Stopped(BaseException):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved its state; `code` is the exit status.

    It may be raised anywhere by a signal, so that no `except Exception` on the way may take it for an error.
    """

    def __init__(self, code: int):
        super().__init__(f"stopped with exit status {code}")
        self.code = code


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


def tick(message: str) -> None:
    if first_to_say(message):
        print(f"{TICK} {printable(message)}", flush=True)


def warn(message: str) -> None:
    if first_to_say(message):
        print(f"{WARN} {printable(message)}", flush=True)


def banner(title: str, rows: dict[str, object]) -> None:
    """Print a stage's banner and its `Name: value` rows."""
    width = max(len(title) + 4, 60)
    print("=" * width + f"\n  {title}\n" + "=" * width)
    for name, value in rows.items():
        print(f"{name + ':':<13} {printable(value)}")
    print(flush=True)


def run_script(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Run a script's main(argv) and leave with its exit status.

    UserError: one paragraph on stderr, 2. Ctrl-C: 130, SIGTERM: 143, after GRACE seconds at the latest. Stopped: its
    own code. `--debug` shows tracebacks. A console that goes away changes nothing.
    """
    with lasting_output():  # first: a pipe of ours is no console
        signal.signal(signal.SIGTERM, leave)
        watch_sigterm()
        try:
            _run(main, argv)
        except SystemExit:
            kill_loaders()
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
