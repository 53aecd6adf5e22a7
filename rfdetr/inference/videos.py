"""Videos: their frames in batches to a model, and back as a video with everything drawn in."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from rfdetr.console import UserError, warn
from rfdetr.files import writing_to
from rfdetr.inference.batches import in_batches, one_ahead
from rfdetr.inference.prediction import Prediction
from rfdetr.inference.records import as_records
from rfdetr.inference.tracking import Tracker
from rfdetr.progress import ProgressBar
from rfdetr.text import command_line

# where in a file, and what, tells a container of videos: MP4 and MOV, AVI, Matroska and WebM, MPEG,
# Ogg, ASF, Flash
VIDEO_SIGNS = [(4, name) for name in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")]
VIDEO_SIGNS += [(0, b"RIFF"), (0, b"\x1a\x45\xdf\xa3"), (0, b"\x00\x00\x01")]
VIDEO_SIGNS += [(0, b"OggS"), (0, b"\x30\x26\xb2\x75"), (0, b"FLV")]
LONGEST_SIGN = 8  # bytes, from the file's begin
WHOLE = 0.95  # of a video's announced frames: a video with fewer is damaged
UNKNOWN_RATE = 25.0  # frames a second, where a video does not tell
Predict = Callable[[list[np.ndarray]], list[Prediction]]  # of images (H, W, 3) uint8 RGB


@dataclass
class VideoResult:
    """The records of a video's objects, with frame numbers, and how many frames were decoded.

    announced: frames that the file says it has; 0 or less: it does not say.
    """

    records: list[dict]
    frames: int
    announced: int

    @property
    def is_whole(self) -> bool:
        return self.frames >= WHOLE * self.announced


def predict_video(
    predict: Predict,
    batch: int,
    path: Path,
    output: Path,
    name: str | None,
    tracker: Tracker | None = None,
) -> VideoResult:
    """Write a copy of a video with everything drawn in, where it has a name; warns of damage.

    tracker: a new one, to follow objects over its frames.
    """
    if name is None:
        result = predict_frames(predict, batch, path, None, tracker)
    else:
        result = write_video(predict, batch, path, output / name, tracker)
    if result.frames == 0:
        warn(f"{path} cannot be read as a video: {why_without_frames(path)}")
    elif result.frames < result.announced:
        warn(
            f"{path} is damaged: {result.frames} of the {result.announced} frames that it "
            "announces could be decoded"
        )
    return result


def write_video(
    predict: Predict, batch: int, path: Path, target: Path, tracker: Tracker | None
) -> VideoResult:
    """Write a copy of a video with everything drawn in, if there are frames."""
    output = target.parent
    with writing_to(output, "--output"), tempfile.TemporaryDirectory(dir=output) as folder:
        temporary = Path(folder) / target.name  # a link at the target would be written through
        result = predict_frames(predict, batch, path, temporary, tracker)
        if result.frames == 0:
            return result
        # OpenCV does not tell when it cannot write
        written = cv2.VideoCapture(str(temporary)).get(cv2.CAP_PROP_FRAME_COUNT)
        if written != result.frames:
            raise UserError(
                f"could not write all of {target}. Free some space there, or name another --output"
            )
        os.replace(temporary, target)
    return result


def why_without_frames(path: Path) -> str:
    """What to say, and to do, of a file of which no frame could be decoded."""
    with open(path, "rb") as file:
        begin = file.read(LONGEST_SIGN)
    if not begin:
        return "the file is empty. Copy or download it again"
    if not any(begin[place : place + len(sign)] == sign for place, sign in VIDEO_SIGNS):
        return "by its content it is no video, whatever its name says"
    return f"it has no frames. {advice_on_video(path)}"


def advice_on_video(path: Path) -> str:
    if path.suffix.lower() == ".mp4":
        words = ["ffmpeg", "-i", path, "-vcodec", "libx264", path.with_stem(path.stem + "_new")]
        return f"Copy or download it again, or write it anew: {command_line(*words)}"
    return "Convert it to .mp4 and try again"


def predict_frames(
    predict: Predict, batch: int, path: Path, file: Path | None, tracker: Tracker | None
) -> VideoResult:
    """Write the frames of a video with everything drawn in as .mp4, if there are any.

    file: None: they are not drawn. Frames are read, and drawn, in threads while the model works.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what it would print is said here
    video = cv2.VideoCapture(str(path))
    announced = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    rate = video.get(cv2.CAP_PROP_FPS) or UNKNOWN_RATE
    name = file.name if file else None
    result = VideoResult(records=[], frames=0, announced=announced)
    batches = one_ahead(in_batches(read_video(video), batch))
    total = math.ceil(max(announced, 0) / batch)
    with VideoDrawer(file, rate) as drawer:
        for frames in ProgressBar(batches, path.name, "batches", total):
            predictions = predict(frames)
            if tracker:
                predictions = [prediction.tracked(tracker) for prediction in predictions]
            drawer.add(predictions)
            for prediction in predictions:
                result.records += as_records(path, name, prediction, result.frames)
                result.frames += 1
    return result


class VideoDrawer:
    """Draws predictions of frames into an .mp4 in a thread of its own, one batch at a time.

    file: made with the first frame, whose size it has; None: nothing is drawn.
    """

    def __init__(self, file: Path | None, rate: float):
        self.file = file
        self.rate = rate
        self.writer: cv2.VideoWriter | None = None
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.drawing: Future | None = None

    def __enter__(self) -> VideoDrawer:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.pool.shutdown()
        if self.writer is not None:
            self.writer.release()
        if self.drawing and kind is None:
            self.drawing.result()

    def add(self, predictions: list[Prediction]) -> None:
        """The next frames; waits for those before, and raises what went wrong with them."""
        if self.file is None:
            return
        if self.drawing:
            self.drawing.result()
        self.drawing = self.pool.submit(self._draw, predictions)

    def _draw(self, predictions: list[Prediction]) -> None:
        for prediction in predictions:
            if self.writer is None:
                codec = cv2.VideoWriter_fourcc(*"mp4v")
                size = prediction.image.shape[1::-1]
                self.writer = cv2.VideoWriter(str(self.file), codec, self.rate, size)
            picture = np.asarray(prediction.picture())
            self.writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))


def read_video(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """A video's frames, (H, W, 3) uint8 RGB."""
    while (frame := video.read()[1]) is not None:
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
