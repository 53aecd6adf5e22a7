"""An open run: its lock, log, metrics.json and TensorBoard events in one folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from rfdetr.console import warn
from rfdetr.files import write_json, writing_to
from rfdetr.runs.curves import FINAL_SCORES
from rfdetr.runs.folder import set_aside
from rfdetr.runs.lock import lock_run, unlock_run
from rfdetr.runs.log import ConsoleLog
from rfdetr.runs.metrics_file import METRICS, first_epochs
from rfdetr.runs.tensorboard import EventFile


class Run(contextlib.AbstractContextManager):
    """An open, locked run folder: log.txt takes the console output, metrics.json and tb/ the rest.

    `header`: metrics.json's fields before "epochs". Of an earlier file the first `done_epochs`
    epochs are kept, of TensorBoard's curves also the first `done_steps` optimizer steps. What a
    killed run left half written is removed, and what is damaged is set aside. `waits`: metrics.json
    stays as it is until `begin`.

    Raises UserError where another process has the run or the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        header: dict,
        done_epochs: int = 0,
        tensorboard: bool = True,
        done_steps: int = 0,
        waits: bool = False,
    ):
        self.folder = Path(folder)
        self.metrics = {"format": 1, **header, "epochs": [], "best": None}
        self.waits = waits
        self._events: EventFile | None = None
        self._failed: set[str] = set()  # what has been warned of
        lock_run(self.folder)
        with contextlib.ExitStack() as opened:  # closes what is open if a step fails
            opened.callback(unlock_run, self.folder)
            with writing_to(self.folder):
                for leftover in self.folder.glob("*.tmp"):
                    leftover.unlink()
                self._log = ConsoleLog(self.folder)
                opened.callback(self._log.close)
                self._take_over(done_epochs)
            self.set()
            if tensorboard:
                with self.optional(f"opening {self.folder / 'tb'} for TensorBoard"):
                    self._events = EventFile(self.folder / "tb", done_epochs, done_steps)
            self._opened = opened.pop_all()

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:  # its message is printed after the log is closed
            self._log.note(f"ended by {kind.__name__}: {error}")
        self.close(finished=error is None)

    def close(self, finished: bool = False) -> None:
        """Give the console back, close the files, unlock the folder; a second call does nothing."""
        if self._events is not None:
            with contextlib.suppress(OSError):  # a full disk, which has been warned of
                self._events.close(finished)
            self._events = None
        self._opened.close()

    def begin(self) -> None:
        """Write metrics.json, now and from here on."""
        self.waits = False
        self.set()

    def add_epoch(self, record: dict) -> None:
        """Append {"epoch": n, "train": ..., "valid": ...} and rewrite metrics.json."""
        self.metrics["epochs"].append(record)
        self.set()

    def set(self, best: dict | None = None, test: dict | None = None) -> None:
        """Set the best epoch's entry or the test split's scores, if given; rewrite metrics.json."""
        if best is not None:
            self.metrics["best"] = best
        if test is not None:
            self.metrics["test"] = test
        if not self.waits:
            write_json(self.folder / METRICS, self.metrics)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write numbers to TensorBoard by tag (curves.py); what fails is a warning."""
        if self._events is not None:
            with self.optional(f"writing curves to {self._events.folder}"):
                self._events.scalars(values, step)

    def describe(self, settings: dict[str, object], texts: dict[str, str]) -> None:
        """Write a run's settings to TensorBoard: texts by tag, and for its HParams tab."""
        if self._events is not None:
            with self.optional(f"writing settings to {self._events.folder}"):
                self._events.hparams(settings, FINAL_SCORES)
                for name, text in texts.items():
                    self._events.text(f"settings/{name}", text)

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Write a picture to TensorBoard; `step` is the epoch, from 1."""
        if self._events is not None:
            self._events.image(tag, picture, step)

    @contextlib.contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """Around what a run can do without: an error is a warning, once for each `what`."""
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                reason = " ".join(str(error).split())
                warn(f"{what} failed ({type(error).__name__}: {reason}): training goes on without")

    def _take_over(self, done_epochs: int) -> None:
        """Take epochs 1..done_epochs of an earlier metrics.json; a damaged one is set aside."""
        try:
            epochs, best = first_epochs(self.folder, done_epochs)
        except FileNotFoundError:
            return
        except ValueError:
            name = self.folder / "metrics.damaged-{}.json"
            set_aside(self.folder / METRICS, name, done_epochs + 1)
            return
        self.metrics["epochs"] = epochs
        self.metrics["best"] = best
