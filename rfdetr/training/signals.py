"""Ctrl-C, SIGTERM and a terminal that goes away: the run ends its step, saves, and says how to go
on.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from rfdetr import distributed
from rfdetr.console import Stopped
from rfdetr.data.workers import STOP_SIGNALS
from rfdetr.sigterm import GRACE

LOOK_AGAIN = 1.0  # seconds between two looks at whether a run waits for a batch that does not come


class StopSignals:
    """Inside `with`, a first signal stops the run after the step; a second one ends it at once.

    `save` is called before Stopped is raised: it keeps the state and says how to go on.
    """

    def __init__(self, save: Callable[[], None]):
        self.save = save
        self.received: int | None = None
        self.at_once = False  # nothing of the run's state changes: a signal need not wait
        self.waiting = False  # for a batch
        self._before: dict[int, object] = {}
        alone = distributed.world_size() == 1
        self._has_timer = hasattr(signal, "setitimer") and alone

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._before[number] = signal.getsignal(number)
            if self._before[number] is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._receive)
        if self._has_timer:
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._look_at_loader)
        return self

    def __exit__(self, *error: object) -> None:
        if self._has_timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if distributed.world_size() == 1:  # torchrun hands a signal on that came here already
            signal.signal(number, signal.SIG_DFL)
        if self.at_once:
            self.stop()
        if self._has_timer:
            signal.setitimer(signal.ITIMER_REAL, GRACE / 2, LOOK_AGAIN)

    def _look_at_loader(self, number: int, frame: FrameType | None) -> None:
        """A step whose batch does not come, from a loader process that hangs, is not waited for."""
        if self.waiting:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.stop()

    @contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """For what takes long and changes nothing of the run's state."""
        self.stop_if_asked()
        self.at_once = True
        try:
            if self.received:  # it came between the two lines above
                self.stop()
            yield
        finally:
            self.at_once = False

    def stop_if_asked(self) -> None:
        """Any rank's signal stops them all, at the same step."""
        if distributed.sum_over_ranks(self.received or 0):
            self.stop()

    def stop(self) -> None:
        self.at_once = False
        self.save()
        raise Stopped(128 + (self.received or signal.SIGTERM))


@dataclass(frozen=True)
class WatchedLoader:
    """A loader that tells when one of its batches is waited for."""

    loader: Iterable
    signals: StopSignals

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while True:
            self.signals.waiting = True
            try:
                batch = next(batches, None)
            finally:
                self.signals.waiting = False
            if batch is None:
                return
            yield batch
