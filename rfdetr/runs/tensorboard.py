"""tb/ in a run's folder: curves, settings and pictures for TensorBoard."""

from __future__ import annotations

import io
import os
import platform
import time
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from rfdetr.console import UserError, warn
from rfdetr.runs.curves import is_by_step
from rfdetr.runs.event_records import is_readable, keep_events
from rfdetr.runs.folder import set_aside

PICTURE_SIDE = 1024  # pixels; larger pictures would swell TensorBoard's files
PICTURE_QUALITY = 85  # of JPEG, for the same reason
REWRITTEN = ("settings/", "_hparams_/")  # tags that every process of a run writes anew


class EventFile:
    """A new file of events in `folder`.

    What a stopped run wrote after `done_epochs` epochs and `done_steps` optimizer steps, which are
    run again, is taken out of its files: TensorBoard's own way to forget knows one kind of step
    alone. A damaged file of an earlier process is set aside. Every event is written at once:
    SummaryWriter's thread could not report a full disk.
    """

    def __init__(self, folder: Path, done_epochs: int, done_steps: int):
        self.folder = Path(folder)
        self._set_damaged_aside(done_epochs + 1)
        self.folder.mkdir(exist_ok=True)
        self._forget_after(done_epochs, done_steps)
        name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        self._writer: RecordWriter | None = RecordWriter(open(self.folder / name, "wb"))
        self._end: Summary | None = None
        self._write(file_version="brain.Event:2")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write a number by tag; `step`: the epoch, from 1, or for tags by step the step."""
        points = [summary.scalar(tag, float(value)).value[0] for tag, value in values.items()]
        if points:
            self._write(step=step, summary=Summary(value=points))

    def text(self, tag: str, text: str) -> None:
        """Write a text as it is, in one width; tags begin with settings/."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown's for code
        written = summary.text(tag, indented)
        written.value[0].tag = tag  # without torch's ending
        self._write(summary=written)

    def hparams(self, settings: dict[str, object], metrics: list[str]) -> None:
        """Give the HParams tab a run's settings, and the tags whose last numbers it shows."""
        values = {}
        for name, value in settings.items():
            if value is not None:
                values[name] = value if type(value) in (bool, int, float) else str(value)
        experiment, start, self._end = summary.hparams(values, dict.fromkeys(metrics, 0.0))
        self._write(summary=experiment)
        self._write(summary=start)

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Write a picture, shrunk to PICTURE_SIDE; `step` is the epoch, from 1."""
        small = picture.convert("RGB")
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        jpeg = io.BytesIO()
        small.save(jpeg, "JPEG", quality=PICTURE_QUALITY)
        image = Summary.Image(
            width=small.width,
            height=small.height,
            colorspace=3,  # RGB
            encoded_image_string=jpeg.getvalue(),
        )
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def close(self, finished: bool) -> None:
        """finished: the run has reached its end, for the HParams tab."""
        if finished and self._end is not None:
            self._write(summary=self._end)
        if self._writer is not None:
            self._writer.close()

    def _write(self, **fields) -> None:
        if self._writer is None:
            return
        event = Event(wall_time=time.time(), **fields)
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:
            self._writer = None
            warn(f"{self.folder} takes no more ({error}): metrics.json alone goes on")

    def _set_damaged_aside(self, next_epoch: int) -> None:
        """Set aside what is in the way of the folder, and files in it that cannot be read."""
        if not self.folder.exists():
            return
        name = self.folder.with_name("tb.damaged-{}")
        if not self.folder.is_dir():
            set_aside(self.folder, name, next_epoch)
            return
        for path in list(self.folder.iterdir()):
            if path.is_file() and not is_readable(path):
                set_aside(path, name, next_epoch)

    def _forget_after(self, epochs: int, steps: int) -> None:
        """Take out of earlier files what is run again, and what is written anew."""

        def stands(event: Event) -> bool:
            for value in event.summary.value:
                if value.tag.startswith(REWRITTEN):
                    return False
                if event.step > (steps if is_by_step(value.tag) else epochs):
                    return False
            return True

        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        for path in sorted(self.folder.glob("*tfevents*")):
            try:
                keep_events(path, stands)
            except UserError as error:  # on Windows, while TensorBoard reads it
                warn(f"{error}. Until then TensorBoard shows points after epoch {epochs} twice")
