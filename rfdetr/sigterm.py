"""SIGTERM ends a script, whatever it waits for; standard library only."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time

GRACE = 8.0  # seconds from SIGTERM to the end of a script that hangs


def leave(number: int, frame: object) -> None:
    sys.exit(128 + number)  # files are closed on the way


def kill_loaders() -> None:
    """End the processes that load data, which have nothing to keep: one that hangs would hold up the end."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for an error
    for child in children:
        child.kill()


@functools.cache
def watch_sigterm() -> None:
    """Have a thread end the process GRACE seconds after a SIGTERM that leave has not ended it by.

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
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is leave:
                time.sleep(GRACE)
                if signal.getsignal(signal.SIGTERM) is leave:
                    for child in multiprocessing.active_children():
                        child.kill()
                    os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
