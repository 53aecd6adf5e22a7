"""Videos: their frames in batches to a model, and back as a video with everything drawn in."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from rfdetr.console import UserError, warn
from rfdetr.files import writing_to
from rfdetr.inference.batches import in_batches
from rfdetr.inference.prediction import Prediction
from rfdetr.inference.records import as_records
from rfdetr.progress import ProgressBar
from rfdetr.text import command_line

VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}
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
    predict: Predict, batch: int, path: Path, output: Path, name: str | None
) -> VideoResult:
    """Write a copy of a video with everything drawn in, where it has a name; warns of damage."""
    if name is None:
        result = predict_frames(predict, batch, path, None)
    else:
        result = write_video(predict, batch, path, output / name)
    if result.frames == 0:
        warn(f"{path} cannot be read as a video: it has no frames. {advice_on_video(path)}")
    elif result.frames < result.announced:
        warn(
            f"{path} is damaged: {result.frames} of the {result.announced} frames that it "
            "announces could be decoded"
        )
    return result


def write_video(predict: Predict, batch: int, path: Path, target: Path) -> VideoResult:
    """Write a copy of a video with everything drawn in, if there are frames."""
    output = target.parent
    with writing_to(output, "--output"), tempfile.TemporaryDirectory(dir=output) as folder:
        temporary = Path(folder) / target.name  # a link at the target would be written through
        result = predict_frames(predict, batch, path, temporary)
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


def advice_on_video(path: Path) -> str:
    if path.suffix.lower() == ".mp4":
        words = ["ffmpeg", "-i", path, "-c:v", "libx264", path.with_stem(path.stem + "_new")]
        return f"Copy or download it again, or write it anew: {command_line(*words)}"
    return "Convert it to .mp4 and try again"


def predict_frames(predict: Predict, batch: int, path: Path, file: Path | None) -> VideoResult:
    """Write the frames of a video with everything drawn in as .mp4, if there are any.

    file: None: they are not drawn.
    """
    video = cv2.VideoCapture(str(path))
    announced = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    rate = video.get(cv2.CAP_PROP_FPS) or UNKNOWN_RATE
    result = VideoResult(records=[], frames=0, announced=announced)
    writer = None
    batches = in_batches(read_video(video), batch)
    total = math.ceil(max(announced, 0) / batch)
    for frames in ProgressBar(batches, path.name, "batches", total):
        for prediction in predict(frames):
            if file and writer is None:
                codec = cv2.VideoWriter_fourcc(*"mp4v")
                size = prediction.image.shape[1::-1]
                writer = cv2.VideoWriter(str(file), codec, rate, size)
            if writer is not None:
                writer.write(cv2.cvtColor(np.asarray(prediction.picture()), cv2.COLOR_RGB2BGR))
            name = file.name if file else None
            result.records += as_records(path, name, prediction, result.frames)
            result.frames += 1
    if writer is not None:
        writer.release()
    return result


def read_video(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """A video's frames, (H, W, 3) uint8 RGB."""
    while (frame := video.read()[1]) is not None:
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
