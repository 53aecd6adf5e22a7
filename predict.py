"""Detect objects in images, folders, globs and videos: pictures, and boxes and masks as JSON.

python predict.py --checkpoint runs/segmentation_nano_384_1/best.pt
    --input photos/ clip.mp4 --output found
"""

from __future__ import annotations

from rfdetr.cli import check_command, script_settings
from rfdetr.settings import PredictionSettings

# before torch, whose import takes seconds
check_command(PredictionSettings, __doc__, __name__)

import glob
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from rfdetr.console import UserError, run_script, tick, warn
from rfdetr.data.images import Window
from rfdetr.data.statistics import image_warnings
from rfdetr.detr import RFDETR
from rfdetr.device import compile_in_place
from rfdetr.files import is_special_file, make_folder, write_json, writing_to
from rfdetr.inference.originals import IMAGE_SUFFIXES as IMAGES
from rfdetr.inference.originals import Page, pages_of, read_image
from rfdetr.inference.prediction import Prediction
from rfdetr.progress import ProgressBar
from rfdetr.runs.places import what_is_there
from rfdetr.text import command_line, quoted

VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}
WHOLE = 0.95  # of a video's announced frames: a video with fewer is damaged
JPEG_QUALITY = 92  # Pillow's scale up to 95
UNKNOWN_RATE = 25.0  # frames a second, where a video does not tell


def main(argv: list[str] | None = None) -> None:
    settings = script_settings(PredictionSettings, __doc__, argv)
    paths = collect(settings.input)
    model = RFDETR.from_checkpoint(
        settings.checkpoint, settings.device, settings.amp, settings.resolution
    )
    model.exif = settings.exif or model.exif
    if settings.compile:
        compile_in_place(model.model.encoder, model.precision.device)
    predictor = Predictor(
        model, settings.threshold, settings.nms, settings.batch, settings.max_detections
    )
    is_new = not settings.output.exists()
    make_folder(settings.output, "--output")
    taken_names = names_of_inputs(settings.output, paths)  # no input is overwritten
    suffix = None if settings.pictures == "0" else f".{settings.pictures}"

    images = [path for path in paths if path.suffix.lower() in IMAGES]
    singles = images
    if settings.pages:
        singles = [page for path in images for page in pages_of(path)]
    window = model.gray_window(singles, settings.gray)
    model.gray = None  # what it is given from here on has been read
    records, read_files = predict_images(
        predictor, singles, window, settings.output, suffix, taken_names
    )
    unreadable = len(set(images) - read_files)
    damaged = []
    for path in paths:
        if path.suffix.lower() not in VIDEOS:
            continue
        name = suffix and free_name(path.stem, ".mp4", taken_names)
        video = predict_video(predictor, path, settings.output, name)
        records += video.records
        if video.frames == 0:
            unreadable += 1
        if not video.is_whole:
            damaged.append(str(path))
    if unreadable == len(paths):
        which = "the file" if unreadable == 1 else f"none of the {unreadable} files"
        verb = "could not" if unreadable == 1 else "could"
        if is_new and not next(settings.output.iterdir(), None):
            settings.output.rmdir()
        raise UserError(f"{which} {verb} be read: see the warnings above")
    block = model.model.size.block
    for message in image_warnings(images, model.resolution, block, settings.pages):
        warn(message)
    write_json(settings.output / "predictions.json", records)
    written = "pictures and predictions.json" if suffix else "predictions.json"
    tick(
        f"{len(records)} objects in {len(paths) - unreadable} files: {settings.output} ({written})"
    )
    if damaged:
        print(
            f"Damaged: {', '.join(damaged)}. What could be decoded is in {settings.output}. "
            "For the rest, copy or convert the video again, and run this again",
            file=sys.stderr,
        )
        sys.exit(1)


@dataclass(frozen=True)
class Predictor:
    """A model, what of its detections counts, and how many images it gets at a time.

    threshold, nms, batch, max_detections: as in RFDETR.predict.
    """

    model: RFDETR
    threshold: float
    nms: float
    batch: int
    max_detections: int | None = None

    def predict(self, images: list[np.ndarray]) -> list[Prediction]:
        """Of a few images (H, W, 3) uint8 RGB."""
        return self.model.predict(
            images,
            self.threshold,
            nms=self.nms,
            batch=self.batch,
            max_detections=self.max_detections,
        )


# ---------------------------------------------------------------- files


def collect(inputs: list[str]) -> list[Path]:
    """All image and video files that --input names, sorted inside folders, each once.

    Raises UserError where a name leads to none.
    """
    paths: list[Path] = []
    for text in inputs:
        usable = []
        for path in files_named_by(text):
            if is_special_file(path):
                warn(f"{path} is a pipe, a socket or a device, not a file: left out")
            else:
                usable.append(path)
        if not usable:
            raise UserError(f"--input {text}: {what_is_there_instead(Path(text))}")
        paths += usable
    return list(dict.fromkeys(paths))


def files_named_by(text: str) -> list[Path]:
    """The images and videos that a file, folder or glob names, sorted."""
    path = Path(text)
    if path.is_dir():
        paths = list(path.iterdir())
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(match) for match in glob.glob(text, recursive=True)]
    return sorted(path for path in paths if path.suffix.lower() in IMAGES | VIDEOS)


def what_is_there_instead(path: Path) -> str:
    """Of a path without images: what it is, and how to name what lies below it or near it."""
    below = path.glob("*/**/*") if path.is_dir() else ()
    deeper = next((file for file in below if file.suffix.lower() in IMAGES), None)
    if deeper:
        pattern = quoted(str(path / "**" / f"*{deeper.suffix}"))
        return f"no images or videos there, but in folders below: --input {pattern}"
    if not path.exists() and not glob.has_magic(str(path)):
        return what_is_there(path)
    return f"no images or videos there ({', '.join(sorted(IMAGES | VIDEOS))})"


def names_of_inputs(folder: Path, inputs: list[Path]) -> set[str]:
    """The casefolded names in a folder that lead to an input, by whatever link."""
    identities = {_identity(path) for path in inputs}
    return {
        path.name.casefold()
        for path in folder.iterdir()
        if path.exists() and _identity(path) in identities
    }


def _identity(path: Path) -> tuple[int, int] | None:
    """What all names and links of one file have in common; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def free_name(stem: str, suffix: str, taken: set[str]) -> str:
    """A name for a picture or video that is not in `taken` yet, numbered where need be.

    It is added to `taken`, whose names are casefolded: on most Windows and macOS disks a.PNG is
    a.png.
    """
    name = stem + suffix
    count = 1
    while name.casefold() in taken:
        count += 1
        name = f"{stem}_{count}{suffix}"
    taken.add(name.casefold())
    return name


# ---------------------------------------------------------------- images


def predict_images(
    predictor: Predictor,
    images: list[Path | Page],
    window: Window | None,
    output: Path,
    suffix: str | None,
    taken_names: set[str],
) -> tuple[list[dict], set[Path]]:
    """Save a picture of each image; returns their records and the files that could be read.

    window: as in `read_image`.  suffix: of the pictures; None: there are none.
    """
    records = []
    read_files = set()
    saving: list[Future] = []
    batches = list(in_batches(iter(images), predictor.batch))
    # the pool reads the next images and saves the last pictures while the model works
    with ThreadPoolExecutor() as pool:
        turn = predictor.model.exif == "apply"
        reading = read_ahead(pool, batches, turn, window)
        shown = ProgressBar(reading, "predicting", "batches", total=len(batches))
        for pixels, batch in zip(shown, batches):
            wait_for(saving)
            readable = [image for image, array in zip(batch, pixels) if array is not None]
            predictions = predictor.predict([array for array in pixels if array is not None])
            saving = []
            for image, prediction in zip(readable, predictions):
                page = image.number if isinstance(image, Page) else None
                path = image.path if page else image
                read_files.add(path)
                stem = f"{path.stem}_page{page}" if page else path.stem
                picture = suffix and free_name(stem, suffix, taken_names)
                if picture:
                    saving.append(pool.submit(save_picture, prediction, output / picture))
                records += as_records(path, picture, prediction, page=page)
        wait_for(saving)
    return records, read_files


def in_batches(items: Iterator, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter; none for no items."""
    while batch := list(itertools.islice(items, size)):
        yield batch


def read_ahead(
    pool: ThreadPoolExecutor, batches: list[list[Path | Page]], turn: bool, window: Window | None
) -> Iterator[list[np.ndarray | None]]:
    """The images of each batch, as `read` gives them; the next batch is read meanwhile."""
    reading: list[Future] = []
    for batch in [*batches, []]:
        previous = reading
        reading = [pool.submit(read, image, turn, window) for image in batch]
        if previous:
            yield wait_for(previous)


def wait_for(futures: list[Future]) -> list:
    """Their results; raises what went wrong in one of them."""
    return [future.result() for future in futures]


def read(image: Path | Page, turn: bool, window: Window | None) -> np.ndarray | None:
    """An image as (H, W, 3) uint8 RGB; None, with a warning, for a file that cannot be read.

    turn, window: as in `read_image`.
    """
    try:
        return read_image(image, turn, window)
    except UserError as error:
        warn(str(error))
        return None


def save_picture(prediction: Prediction, file: Path) -> None:
    with writing_to(file.parent, "--output"):
        file.unlink(missing_ok=True)  # a link would be written through
        prediction.picture().save(file, compress_level=1, quality=JPEG_QUALITY)


def as_records(
    path: Path,
    picture: str | None,
    prediction: Prediction,
    frame: int | None = None,
    page: int | None = None,
) -> list[dict]:
    """predictions.json's entries: bbox xywh in pixels of the original, mask as COCO RLE or null.

    frame: of a video, from 0 on; page: of a file with several, from 1 on.
    picture: the picture's or video's name in --output, or None.
    """
    records = []
    for i, (x0, y0, x1, y1) in enumerate(prediction.boxes.tolist()):
        record = {
            "file": str(path),
            "picture": picture,
            "class": prediction.names[i],
            "score": prediction.scores[i].item(),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "mask": prediction.rles[i] if prediction.rles else None,
        }
        if prediction.mask_scores is not None:
            record["mask_score"] = prediction.mask_scores[i].item()
        if frame is not None:
            record["frame"] = frame
        if page is not None:
            record["page"] = page
        records.append(record)
    return records


# ---------------------------------------------------------------- videos


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


def predict_video(predictor: Predictor, path: Path, output: Path, name: str | None) -> VideoResult:
    """Write a copy of a video with everything drawn in, where it has a name; warns of damage."""
    if name is None:
        result = predict_frames(predictor, path, None)
    else:
        result = write_video(predictor, path, output / name)
    if result.frames == 0:
        warn(f"{path} cannot be read as a video: it has no frames. {advice_on_video(path)}")
    elif result.frames < result.announced:
        warn(
            f"{path} is damaged: {result.frames} of the {result.announced} frames that it "
            "announces could be decoded"
        )
    return result


def write_video(predictor: Predictor, path: Path, target: Path) -> VideoResult:
    """Write a copy of a video with everything drawn in, if there are frames."""
    output = target.parent
    with writing_to(output, "--output"), tempfile.TemporaryDirectory(dir=output) as folder:
        temporary = Path(folder) / target.name  # a link at the target would be written through
        result = predict_frames(predictor, path, temporary)
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


def predict_frames(predictor: Predictor, path: Path, file: Path | None) -> VideoResult:
    """Write the frames of a video with everything drawn in as .mp4, if there are any.

    file: None: they are not drawn.
    """
    video = cv2.VideoCapture(str(path))
    announced = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    rate = video.get(cv2.CAP_PROP_FPS) or UNKNOWN_RATE
    result = VideoResult(records=[], frames=0, announced=announced)
    writer = None
    batches = in_batches(read_video(video), predictor.batch)
    total = math.ceil(max(announced, 0) / predictor.batch)
    for frames in ProgressBar(batches, path.name, "batches", total):
        for prediction in predictor.predict(frames):
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


if __name__ == "__main__":
    run_script(main)
