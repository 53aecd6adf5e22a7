"""What the scripts say and how they end: messages, exit codes, types of flags.

One voice under torchrun, where every process runs the same code: `say`, `tick` and `banner` are the
main process's, and so is progress.py's. What `warn` and an error say may concern one process alone:
the first process to say it prints it, and no other repeats it. No caller asks who it is.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

from rfdetr.memory import OUT_OF_MEMORY_ADVICE, is_out_of_memory
from rfdetr.sigterm import end_on_sigterm, kill_loaders, raise_on_ctrl_c
from rfdetr.streams import lasting_output
from rfdetr.text import printable

TICK = "✓"
FIXED = (  # messages that are known by how they begin
    "Frozen detector head out_dim",
    "No checkpoint found in Stage-1 directory",
    "No segmentation masks found in COCO annotations",
)


class UserError(Exception):
    """Bad input: the message is one paragraph saying what, where and the next command to type."""


class Stopped(BaseException):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved its state; `code`: exit status.

    A BaseException: a signal may raise it anywhere, and no `except Exception` may swallow it.
    """

    def __init__(self, code: int):
        super().__init__(f"stopped with exit status {code}")
        self.code = code


# ---------------------------------------------------------------- messages


def say(text: str = "") -> None:
    """Print text of one or several lines as it is."""
    if is_main_process():
        print(text, flush=True)


def tick(message: str) -> None:
    """Print `message` after a tick, on one line."""
    say(f"{TICK} {printable(message)}")


def warn(message: str) -> None:
    """Print `message` as a warning, on one line."""
    if _is_first_to_say(message):
        # the line's end with it: threads warn, too
        print(f"warning: {printable(message)}\n", end="", flush=True)


def banner(title: str, rows: dict[str, object]) -> None:
    """Print a stage's title and its `Name: value` rows."""
    line = "=" * max(len(title) + 4, 60)
    say(f"{line}\n  {title}\n{line}")
    for name, value in rows.items():
        say(f"{name + ':':<13} {printable(value)}")
    say()


def _is_only_process() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1"


def is_main_process() -> bool:
    """Whether what concerns all processes of a run is this one's to say."""
    # torchrun's variables: there is something to say before torch.distributed has started
    return _is_only_process() or os.environ.get("RANK", "0") == "0"


def _is_first_to_say(message: str) -> bool:
    """Whether no other process of the run has said this yet; True where that is unknown."""
    if _is_only_process():
        return True
    from torch.distributed import TCPStore  # here: this module has to load without torch

    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    try:
        host = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        times = store.add(f"said {restart} {message}", 1)
    except (KeyError, ValueError, RuntimeError):  # the agent that keeps the store has gone
        return True
    return times == 1


# ---------------------------------------------------------------- the end of a script


def run_script(
    main: Callable[[list[str] | None], None],
    argv: list[str] | None = None,
    interrupted: str = "interrupted",
) -> None:
    """Run a script's main(argv) and leave with its exit status.

    interrupted: what Ctrl-C leaves, and how to go on.
    UserError and OSError: one paragraph on stderr, 2. Ctrl-C: 130. SIGTERM: 143, after GRACE
    seconds at the latest. Stopped: its own code. Any other error: 1. `--debug` shows tracebacks.
    A console that goes away changes nothing.
    """
    with lasting_output():  # first: the pipe of watch_sigterm is no console
        end_on_sigterm()
        raise_on_ctrl_c()
        try:
            _run(main, argv, interrupted)
        except SystemExit:
            kill_loaders()
            raise


def _run(
    main: Callable[[list[str] | None], None], argv: list[str] | None, interrupted: str
) -> None:
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        main(argv)
    except (UserError, OSError) as error:  # an OSError names its file
        if debug:
            traceback.print_exc()
        lines = [printable(line) for line in str(error).splitlines() if line.strip()]
        _end(as_error("\n".join(lines)), 2)
    except Stopped as stopped:
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        _end(interrupted, 130)
    except Exception as error:
        if debug:
            raise
        reason = " ".join(str(error).split())
        if is_out_of_memory(error):
            _end(f"error: out of memory ({reason or 'main memory'})\n{OUT_OF_MEMORY_ADVICE}", 2)
        _end(
            f"error: unexpected {type(error).__name__}: {reason}\nThis is a defect of the program. "
            "Run the command again with --debug to see where it happened.",
            1,
        )


def as_error(message: str) -> str:
    """The message as it is printed."""
    return message if message.startswith(FIXED) else f"error: {message}"


def _end(reason: str, status: int) -> NoReturn:
    """Exit; of several processes that end, each for a reason of its own, the first one tells it."""
    if _is_first_to_say("why it ends"):
        print(reason, file=sys.stderr, flush=True)
    sys.exit(status)
