"""One process a run."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import secrets
import time
from pathlib import Path

import psutil

from rfdetr.console import UserError, warn
from rfdetr.files import writing_to

LOCK = "run.lock"  # in a run's folder: the process that writes there


SAME_START = 10.0  # seconds by which two readings of a process's start may differ


def lock_run(folder: Path) -> None:
    """Make this process the only one that writes to a run's folder, until unlock_run or its end.

    A lock that a killed process of this machine has left is taken over, and said.  Raises UserError where another
    process has it, or where that cannot be told from here.
    """
    lock = Path(folder) / LOCK
    own = {"pid": os.getpid(), "host": platform.node(), "started": psutil.Process().create_time()}
    with writing_to(folder):
        while True:
            with contextlib.suppress(FileExistsError):
                with open(lock, "x", encoding="utf-8") as file:
                    json.dump(own, file)
                atexit.register(unlock_run, lock.parent.absolute())
                return
            holder = _holder(lock)
            if (holder.get("pid"), holder.get("host")) == (
                own["pid"],
                own["host"],
            ):  # of an earlier call
                return
            _require_gone(holder, lock, own["host"])
            # renamed first: of two processes that find it, one gets it
            aside = lock.with_name(f"{LOCK}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
            with contextlib.suppress(FileNotFoundError):
                lock.rename(aside)
                if _holder(aside) != holder:  # somebody was faster, and this is the new one
                    aside.rename(lock)
                    continue
                aside.unlink()
                warn(
                    f"{folder} was locked by process {holder.get('pid', '(unknown)')}, which is gone: taken over"
                )


def unlock_run(folder: Path) -> None:
    """Give a folder back that this process has locked; a second call does nothing."""
    lock = Path(folder) / LOCK
    if _holder(lock).get("pid") == os.getpid():
        with contextlib.suppress(OSError):
            lock.unlink()


def _holder(lock: Path) -> dict:
    """What a lock says of its process; {} for one that is gone or, a while after, still half written."""
    for wait in (0.05, 0.2, 0.5, 0):  # seconds: it is made first and written then
        with contextlib.suppress(FileNotFoundError, ValueError):
            holder = json.loads(lock.read_bytes())
            return holder if isinstance(holder, dict) else {}
        if not lock.exists():
            return {}
        time.sleep(wait)
    return {}


def _require_gone(holder: dict, lock: Path, host: str) -> None:
    """Raise UserError where the process of a lock may still be there; `host` is this machine's name."""
    pid, other, started = (holder.get(key) for key in ("pid", "host", "started"))
    if type(pid) is not int or pid <= 0 or type(other) is not str or type(started) is not float:
        return  # killed while it wrote
    if other != host:
        raise UserError(
            f"{lock.parent} belongs to process {pid} on {other}, and two cannot write to one run. If it has ended, "
            f"delete {lock} and run the command again"
        )
    try:
        process = psutil.Process(pid)
        # a later process may have got the number; clocks are set meanwhile
        running = (
            abs(process.create_time() - started) < SAME_START
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        running = False
    except psutil.AccessDenied:
        running = True
    if running:
        raise UserError(
            f"{lock.parent} belongs to process {pid} on {other}, which is running, and two cannot write to one run: "
            "wait for its end or stop it, or train a new run with another --output_dir"
        )
