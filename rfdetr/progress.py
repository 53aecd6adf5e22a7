"""How far something long has come: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Generic, TypeVar

from tqdm import tqdm

from rfdetr.console import is_main_process
from rfdetr.text import printable

DELAY = 2.0  # seconds: what ends sooner shows no bar
LINE_EVERY = 30.0  # seconds; what ends sooner prints no line

Item = TypeVar("Item")


class ProgressBar(Generic[Item]):
    """`items` as they are, while stderr shows how many are done; of several ranks, the first's.

    A file or a pipe gets whole lines without carriage returns. title: what is done; `unit`: what
    is counted. total: how many there are, where `items` cannot tell. at_once: show the bar before
    the first item is there. before: how many more were done already, which count as done, too.
    clock: seconds.
    """

    def __init__(
        self,
        items: Iterable[Item],
        title: str,
        unit: str = "images",
        total: int | None = None,
        at_once: bool = False,
        before: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.items = items
        self.title = printable(title)
        self.unit = unit
        self.total = len(items) if total is None and hasattr(items, "__len__") else total
        if self.total is not None:
            self.total += before
        self.before = before
        self.at_once = at_once
        self.clock = clock
        self.text = ""

    def note(self, text: str) -> None:
        """What to show beside the count from now on, losses for example."""
        self.text = text

    def __iter__(self) -> Iterator[Item]:
        if not is_main_process():
            return iter(self.items)
        if sys.stderr.isatty():
            return self._with_bar()
        return self._with_lines()

    def _with_bar(self) -> Iterator[Item]:
        delay = 0 if self.at_once else DELAY
        unit = f" {self.unit}"
        bar = tqdm(
            self.items,
            self.title,
            self.total,
            leave=False,
            unit=unit,
            delay=delay,
            initial=self.before,
        )
        with bar:
            for item in bar:
                yield item
                bar.set_postfix_str(self.text, refresh=False)

    def _with_lines(self) -> Iterator[Item]:
        begin = self.clock()
        last = begin
        done = 0
        said = 0
        for item in self.items:
            yield item
            done += 1
            now = self.clock()
            if now - last >= LINE_EVERY:
                self._say(done, now - begin)
                last = now
                said = done
        if 0 < said < done:
            self._say(done, self.clock() - begin)

    def _say(self, done: int, seconds: float) -> None:
        """done: in these seconds."""
        in_all = self.before + done
        count = f"{in_all} {self.unit}"
        times = f"{in_hours(seconds)} elapsed"
        if self.total:
            count = f"{in_all}/{self.total} {self.unit} ({in_all / self.total:.0%})"
            left = seconds / done * max(self.total - in_all, 0)
            times += f", {in_hours(left)} left"
        parts = [count, self.text, times]
        line = ", ".join(part for part in parts if part)
        print(f"{self.title}: {line}", file=sys.stderr, flush=True)


def in_hours(seconds: float) -> str:
    """h:mm:ss"""
    return str(timedelta(seconds=round(seconds)))
