"""Detect objects in images, folders, globs and videos: pictures, and boxes and masks as JSON.

python predict.py --checkpoint runs/segmentation_nano_384_1/best.pt
    --input photos/ clip.mp4 --output found
"""

from __future__ import annotations

from rfdetr.cli import check_command, script_settings
from rfdetr.tool_settings import PredictionSettings

# before torch, whose import takes seconds
check_command(PredictionSettings, __doc__, __name__)

import glob
import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rfdetr.console import UserError, run_script, say, tick, warn
from rfdetr.data.images import GrayWindow
from rfdetr.data.large_images import Pixels
from rfdetr.data.statistics import image_warnings
from rfdetr.detr import RFDETR
from rfdetr.device import compile_in_place
from rfdetr.files import is_special_file, make_folder, write_json, writing_to
from rfdetr.inference.batches import in_batches
from rfdetr.inference.originals import IMAGE_SUFFIXES as IMAGES
from rfdetr.inference.originals import Page, pages_of, read_image
from rfdetr.inference.prediction import Prediction
from rfdetr.inference.records import as_records
from rfdetr.inference.tracking import UNSURE_SCORE, Tracker
from rfdetr.inference.videos import VIDEO_SUFFIXES as VIDEOS
from rfdetr.inference.videos import predict_video
from rfdetr.progress import ProgressBar
from rfdetr.runs.places import what_is_there
from rfdetr.text import counted, quoted
from rfdetr.tiling import tell_tiles

RECORDS = "predictions.json"
JPEG_QUALITY = 92  # Pillow's scale up to 95


def main(argv: list[str] | None = None) -> None:
    settings = script_settings(PredictionSettings, __doc__, argv)
    paths = collect(settings.input)
    model = RFDETR.from_checkpoint(
        settings.checkpoint, settings.device, settings.amp, settings.resolution
    )
    model.exif = settings.exif or model.exif
    if settings.compile:
        compile_in_place(model.model.encoder, model.precision.device, weights_stay=True)
    tiling = model.tiling(settings.tile, settings.tile_overlap, settings.tile_full)
    tell_tiles(model.trained_with, tiling)
    model.letterboxed(settings.letterbox)  # warns before the work
    lowest = settings.threshold
    new_tracker = None
    if settings.track:
        lowest = min(lowest, UNSURE_SCORE)
        new_tracker = partial(Tracker, settings.threshold, ids=itertools.count(1))
    predictor = Predictor(model, replace(settings, threshold=lowest), tiling is not None)
    is_new = not settings.output.exists()
    make_folder(settings.output, "--output")
    if (settings.output / RECORDS).exists():
        say(f"{settings.output} has earlier results: files of the same names are replaced")
    taken_names = names_of_inputs(settings.output, paths)  # no input is overwritten
    suffix = None if settings.pictures == "0" else f".{settings.pictures}"

    images = [path for path in paths if path.suffix.lower() in IMAGES]
    singles = images
    if settings.pages:
        singles = [page for path in images for page in pages_of(path)]
    window = model.gray_window(singles, settings.gray)
    model.gray = None  # what it is given from here on has been read
    records, read_files = predict_images(
        predictor, singles, window, settings.output, suffix, taken_names, new_tracker
    )
    unreadable = len(set(images) - read_files)
    damaged = []
    for path in paths:
        if path.suffix.lower() not in VIDEOS:
            continue
        name = suffix and free_name(path.stem, ".mp4", taken_names)
        tracker = new_tracker and new_tracker()
        video = predict_video(
            predictor.predict, settings.batch, path, settings.output, name, tracker
        )
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
    side = tiling.side if tiling else None
    block = model.model.size.block
    for message in image_warnings(images, model.resolution, block, settings.pages, side):
        warn(message)
    write_json(settings.output / RECORDS, records)
    written = f"pictures and {RECORDS}" if suffix else RECORDS
    followed = ""
    if settings.track:
        tracks = {record["track"] for record in records}
        followed = f" on {counted(len(tracks), 'track')}"
    objects = counted(len(records), "object")
    files = len(paths) - unreadable
    tick(f"{objects}{followed} in {counted(files, 'file')}: {settings.output} ({written})")
    if damaged:
        print(
            f"Damaged: {', '.join(damaged)}. What could be decoded is in {settings.output}. "
            "For the rest, copy or convert the video again, and run this again",
            file=sys.stderr,
        )
        sys.exit(1)


@dataclass(frozen=True)
class Predictor:
    """A model, and how predict.py is asked to use it; in_tiles: it looks at images in tiles."""

    model: RFDETR
    settings: PredictionSettings
    in_tiles: bool

    @property
    def images_at_once(self) -> int:
        """With tiles a batch is of one image's tiles."""
        return 1 if self.in_tiles else self.settings.batch

    def predict(self, images: list[Pixels]) -> list[Prediction]:
        """Of a few images (H, W, 3) uint8 RGB."""
        settings = self.settings
        return self.model.predict(
            images,
            settings.threshold,
            nms=settings.nms,
            batch=settings.batch,
            max_detections=settings.max_detections,
            tile=settings.tile,
            tile_overlap=settings.tile_overlap,
            tile_full=settings.tile_full,
            letterbox=settings.letterbox,
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
    window: GrayWindow | None,
    output: Path,
    suffix: str | None,
    taken_names: set[str],
    new_tracker: Callable[[], Tracker] | None = None,
) -> tuple[list[dict], set[Path]]:
    """Save a picture of each image; returns their records and the files that could be read.

    window: as in `read_image`.  suffix: of the pictures; None: there are none.  new_tracker: to
    take each folder, and each file of several pages, for a stack.
    """
    records = []
    read_files = set()
    trackers: dict[Path, Tracker] = defaultdict(new_tracker)  # by folder or file of pages
    if new_tracker:
        images = in_stacks(images)
    saving: list[Future] = []
    batches = list(in_batches(iter(images), predictor.images_at_once))
    turn = predictor.model.exif == "apply"
    read_one = partial(read, turn=turn, window=window, in_tiles=predictor.in_tiles)
    # the pool reads the next images and saves the last pictures while the model works
    with ThreadPoolExecutor() as pool:
        reading = read_ahead(pool, batches, read_one)
        shown = ProgressBar(reading, "predicting", "batches", total=len(batches))
        for pixels, batch in zip(shown, batches):
            wait_for(saving)
            readable = [array for array in pixels if array is not None]
            predictions = iter(predictor.predict(readable))
            saving = []
            for image, array in zip(batch, pixels):
                path = file_of(image)
                if array is None:
                    if new_tracker:
                        trackers[stack_of(image)].skip()
                    continue
                read_files.add(path)
                prediction = next(predictions)
                if new_tracker:
                    prediction = prediction.tracked(trackers[stack_of(image)])
                page = image.number if isinstance(image, Page) else None
                stem = f"{path.stem}_page{page}" if page else path.stem
                picture = suffix and free_name(stem, suffix, taken_names)
                if picture:
                    saving.append(pool.submit(save_picture, prediction, output / picture))
                records += as_records(path, picture, prediction, page=page)
        wait_for(saving)
    return records, read_files


def file_of(image: Path | Page) -> Path:
    return image.path if isinstance(image, Page) else image


def stack_of(image: Path | Page) -> Path:
    """What its objects are followed through: its file's pages, else its folder's images."""
    return image.path if isinstance(image, Page) else image.parent


def in_stacks(images: list[Path | Page]) -> list[Path | Page]:
    """Each folder's images together, in the order of the numbers in their names: 2 before 10."""
    folders = {file_of(image).parent: None for image in images}
    place = {folder: i for i, folder in enumerate(folders)}

    def key(image: Path | Page) -> tuple:
        path = file_of(image)
        page = image.number if isinstance(image, Page) else 0
        return place[path.parent], words_and_numbers(path.name), page

    return sorted(images, key=key)


def words_and_numbers(name: str) -> list[str | int]:
    """To sort names by: words at even positions, numbers at odd ones."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def read_ahead(
    pool: ThreadPoolExecutor,
    batches: list[list[Path | Page]],
    read_one: Callable[[Path | Page], Pixels | None],
) -> Iterator[list[Pixels | None]]:
    """The images of each batch, as `read_one` gives them; the next batch is read meanwhile."""
    reading: list[Future] = []
    for batch in [*batches, []]:
        previous = reading
        reading = [pool.submit(read_one, image) for image in batch]
        if previous:
            yield wait_for(previous)


def wait_for(futures: list[Future]) -> list:
    """Their results; raises what went wrong in one of them."""
    return [future.result() for future in futures]


def read(
    image: Path | Page, turn: bool, window: GrayWindow | None, in_tiles: bool
) -> Pixels | None:
    """An image as (H, W, 3) uint8 RGB; None, with a warning, for a file that cannot be read.

    turn, window, in_tiles: as in `read_image`.
    """
    try:
        return read_image(image, turn, window, in_tiles)
    except UserError as error:
        warn(str(error))
        return None


def save_picture(prediction: Prediction, file: Path) -> None:
    with writing_to(file.parent, "--output"):
        file.unlink(missing_ok=True)  # a link would be written through
        prediction.save_picture(file, JPEG_QUALITY)


if __name__ == "__main__":
    run_script(main)
