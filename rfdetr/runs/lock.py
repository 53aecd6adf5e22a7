"""One process a run: a lock that the system releases when its holder ends, however it ends."""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import platform
import time
from pathlib import Path

import psutil
from filelock import BaseFileLock, FileLock, Timeout

from rfdetr.console import UserError, warn
from rfdetr.files import write_json, writing_to

LOCK = "run.lock"  # locked as long as its process lives; empty
HOLDER = "run.lock.json"  # which process that is: its pid, host and start time

# Forked loader processes of a killed run notice its end a few seconds later, and may hold its lock
# until then (filelock before 4.0).
ORPHANS = 10.0  # seconds
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems

_locks: dict[Path, BaseFileLock] = {}  # of this process, by resolved folder


def lock_run(folder: Path) -> None:
    """Make this process the only one that writes to a run's folder, until unlock_run or its end.

    What a killed process of this machine has left is taken over, with a warning.  Raises UserError
    where another process has the run, or where a process of another machine may have it.
    """
    folder = Path(folder)
    key = folder.resolve()
    if key in _locks:
        return
    lock = FileLock(folder / LOCK, thread_local=False)
    with writing_to(folder):
        _acquire(lock, folder)
        holder = _read_holder(folder)
        if holder and holder["host"] != platform.node():
            # not every network file system tells one machine of another's locks
            lock.release()
            raise UserError(
                f"{_belongs_to(folder, holder)}. If it has ended, delete {folder / HOLDER} and run "
                "the command again"
            )
        if holder is not None:
            pid = holder.get("pid", "(unknown)")
            warn(f"{folder} was locked by process {pid}, which is gone: taken over")
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        own = {"pid": os.getpid(), "host": platform.node(), "started": started}
        write_json(folder / HOLDER, own)
    _locks[key] = lock
    atexit.register(unlock_run, key)


def unlock_run(folder: Path) -> None:
    """Give a folder back that this process has locked; a second call does nothing."""
    folder = Path(folder).resolve()
    lock = _locks.pop(folder, None)
    if lock is None:
        return
    with contextlib.suppress(OSError):
        (folder / HOLDER).unlink(missing_ok=True)
        if os.name != "nt":  # Windows forbids it, and filelock does it there after the release
            (folder / LOCK).unlink(missing_ok=True)
    lock.release()


def _acquire(lock: BaseFileLock, folder: Path) -> None:
    """Raises UserError where a process that is still there has the lock."""
    try:
        lock.acquire(timeout=0)
        return
    except Timeout:
        file_system_locks = True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        file_system_locks = False
    holder = _read_holder(folder)
    if file_system_locks and _has_ended(holder):
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=ORPHANS)
            return
    if not file_system_locks and (not holder or _has_ended(holder)):
        warn(f"the file system of {folder} has no locks: let no other process train this run")
        return
    raise UserError(
        f"{_belongs_to(folder, holder)}: wait for its end or stop it, or train a new run with "
        "another --output_dir"
    )


def _has_ended(holder: dict | None) -> bool:
    """Whether the holder is known to have ended; False where it cannot be told from here."""
    if not holder or holder["host"] != platform.node():
        return False
    return not psutil.pid_exists(holder["pid"])


def _belongs_to(folder: Path, holder: dict | None) -> str:
    if not holder:
        return f"{folder} belongs to another process, and two cannot write to one run"
    process = f"process {holder['pid']} on {holder['host']}"
    return f"{folder} belongs to {process}, and two cannot write to one run"


def _read_holder(folder: Path) -> dict | None:
    """pid, host and start of the process that locked a folder last.

    None where it has unlocked it; {} for a damaged file, of a process killed while it wrote.
    """
    try:
        holder = json.loads((folder / HOLDER).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    if not isinstance(holder, dict):
        return {}
    is_whole = type(holder.get("pid")) is int and holder["pid"] > 0
    return holder if is_whole and type(holder.get("host")) is str else {}
