"""SIGTERM ends a script, whatever it waits for, and Ctrl-C its imports; standard library only."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time

GRACE = 8.0  # seconds from SIGTERM to the end of a script that hangs
TOO_EARLY = "interrupted before anything was done"

_scripts_begun = 0  # in this process; tests begin many


def end_on_sigterm() -> None:
    """Let SIGTERM end the script that begins now, whatever it waits for."""
    global _scripts_begun
    _scripts_begun += 1
    signal.signal(signal.SIGTERM, leave)
    watch_sigterm()


def leave(number: int, frame: object) -> None:
    """Signal handler: end with exit status 128 + number; open files are closed on the way."""
    sys.exit(128 + number)


def end_on_ctrl_c() -> None:
    """Let Ctrl-C end the process at once while modules are imported, where nothing is to be saved.

    A KeyboardInterrupt may come up in a module's C++ code, which aborts the process.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not so under nohup
        signal.signal(signal.SIGINT, _end_interrupted)


def raise_on_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end_interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_interrupted(number: int, frame: object) -> None:
    with contextlib.suppress(OSError):  # a console that has gone
        os.write(2, f"{TOO_EARLY}\n".encode())
    os._exit(128 + number)


def kill_loaders() -> None:
    """Kill the processes that load data: they have nothing to save, and one may hang."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for an error
    for child in children:
        child.kill()


@functools.cache
def watch_sigterm() -> None:
    """Start a thread that ends the process GRACE seconds after a SIGTERM, if `leave` has not.

    `leave` runs in the main thread, which may be in a C call or wait for another thread.
    """
    if not hasattr(os, "fork"):  # on Windows a process is ended from outside, at once
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # a forked loader process gets signals of its own, which must not reach our pipe
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_end_after_sigterm, args=(reader,), daemon=True).start()


def _end_after_sigterm(reader: int) -> None:
    """Read signal numbers from a pipe, for ever."""
    while True:
        number = os.read(reader, 1)
        if not number:
            return
        if number[0] != signal.SIGTERM or not _leaves_on_sigterm():
            continue
        script = _scripts_begun
        time.sleep(GRACE)
        # a run may have begun to save its state meanwhile, or another script have begun here
        if _leaves_on_sigterm() and _scripts_begun == script:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + signal.SIGTERM)


def _leaves_on_sigterm() -> bool:
    return signal.getsignal(signal.SIGTERM) is leave
