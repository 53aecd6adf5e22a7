"""The processes that read images: what signals do to them, and which image one died at."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing.queues
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from types import TracebackType

from rfdetr.console import UserError

# sent by a user, a job scheduler, a terminal that goes away; Windows has not all of them
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
DEAD_WORKER = re.compile(r"DataLoader worker \(pid|shared memory|\bshm\b|</torch_")
OUT_OF_FILES = ("Too many open files", "items of ancdata")


def begin_worker(worker: int) -> None:
    """Prepare a loader's process: it outlives one signal, and ends where it cannot send a batch.

    Batches are sent by threads whose errors Python prints and forgets: the main process would
    wait for ever.
    """

    def end(error: BaseException) -> None:
        print(f"a data worker cannot send its images: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    def excepthook(kind: type, error: BaseException, trace: TracebackType | None) -> None:
        if is_out_of_files(error):
            end(error)
        sys.__excepthook__(kind, error, trace)

    def feeder_error(error: BaseException, batch: object) -> None:
        end(error)

    outlive_one_signal()
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(feeder_error)
    sys.excepthook = excepthook


def outlive_one_signal() -> None:
    """Let the first signal to stop pass by; a second one ends this process.

    Ctrl-C, torchrun and job schedulers signal workers too, while the main process still needs
    their batches up to the end of the step, and then saves.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def is_out_of_files(error: BaseException) -> bool:
    """Whether the system refused a process one more open file.

    From another process the reason comes as text alone.
    """
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return True
    return any(text in str(error) for text in OUT_OF_FILES)


@contextlib.contextmanager
def naming_workers(images_in_work: Callable[[set[int]], list[str]]) -> Iterator[None]:
    """Raise a UserError where a loader's worker dies: at which image, and why.

    images_in_work: the files that the processes of these numbers took last.

    torch notices that by a signal, wherever the main process is.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        text = str(error)
        reason = (text.strip() or type(error).__name__).splitlines()[-1]
        if is_out_of_files(error):
            raise UserError(
                f"too many files are open at once ({reason}): go on with fewer --workers, or "
                "--workers 0, or allow more in this shell with ulimit -n 4096"
            ) from error
        if not DEAD_WORKER.search(text):
            raise
        numbers = {int(number) for number in re.findall(r"\d+", text)}  # with its process id
        images = images_in_work(numbers)
        raise UserError(
            f"a data worker died ({reason}) at the image {' or '.join(images) or '(unknown)'}. "
            "Either the image crashes its decoder, or memory, shared memory (/dev/shm) or file "
            "handles (ulimit -n) ran out: go on with fewer --workers, or with --workers 0"
        ) from error
