"""Detect objects in images, folders, globs and videos: pictures, and boxes and masks as JSON.

python predict.py --checkpoint runs/segmentation_nano_384_1/best.pt
    --input photos/ clip.mp4 --output found
"""

from __future__ import annotations

from rfdetr.sigterm import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # while modules are imported

from rfdetr.cli import check_command, script_settings
from rfdetr.tool_settings import PredictionSettings

# before torch, whose import takes seconds
check_command(PredictionSettings, __doc__, __name__)

import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from rfdetr.console import Stopped, UserError, run_script, say, tick, warn
from rfdetr.data.image_files import headers_of
from rfdetr.data.images import GrayWindow
from rfdetr.data.large_images import Pixels
from rfdetr.data.statistics import image_warnings
from rfdetr.detr import RFDETR
from rfdetr.device import compile_in_place
from rfdetr.files import make_folder, write_json, writing_to
from rfdetr.inference.batches import in_batches
from rfdetr.inference.detections import tell_few_queries
from rfdetr.inference.image_paths import IMAGE_SUFFIXES as IMAGES
from rfdetr.inference.image_paths import VIDEO_SUFFIXES as VIDEOS
from rfdetr.inference.image_paths import none_read, some_unread
from rfdetr.inference.inputs import collect, free_name, names_of_inputs, refuse_output_among_inputs
from rfdetr.inference.originals import Page, file_of, pages_of, read_or_warn
from rfdetr.inference.prediction import Prediction
from rfdetr.inference.records import as_records
from rfdetr.inference.tracking import UNSURE_SCORE, Tracker, lost_at_once
from rfdetr.inference.videos import predict_video
from rfdetr.progress import ProgressBar
from rfdetr.text import counted, rounded_down
from rfdetr.tiling import tell_tiles

RECORDS = "predictions.json"
JPEG_QUALITY = 92  # Pillow's scale up to 95


class Model(RFDETR):
    in_python = False  # messages name flags


def main(argv: list[str] | None = None) -> None:
    settings = script_settings(PredictionSettings, __doc__, argv)
    results = Results()
    try:
        predict_all(settings, results)
    except KeyboardInterrupt:
        tell_interrupted(settings.output, results)
        raise Stopped(130) from None


def predict_all(settings: PredictionSettings, results: Results) -> None:
    """Look at all inputs, write what is found and tell it."""
    paths = collect(settings.input)
    images = [path for path in paths if path.suffix.lower() in IMAGES]
    videos = [path for path in paths if path.suffix.lower() in VIDEOS]
    suffix = None if settings.pictures == "0" else f".{settings.pictures}"
    names = []  # of the pictures and videos to be written
    if suffix:
        names = [path.stem + suffix for path in images] + [f"{path.stem}.mp4" for path in videos]
    refuse_output_among_inputs(settings.output, settings.input, names)
    model = Model(settings.checkpoint, settings.device, settings.amp, settings.resolution)
    model.exif = settings.exif or model.exif
    if settings.compile:
        compile_in_place(model.model.encoder, model.precision.device, weights_stay=True)
    tiling = model.tiling(settings.tile, settings.tile_overlap, settings.tile_full)
    headers = headers_of(images)
    side = None
    if tiling:
        side = tiling.side
        longest = max((max(header.size) for header in headers.values()), default=0)
        tell_tiles(model.trained_with, tiling, None if videos else longest)
    else:
        tell_few_queries(settings.max_detections, model.model.size.queries)
    model.letterboxed(settings.letterbox)  # warns before the work
    block = model.model.size.block
    for message in image_warnings(
        headers, model.resolution, block, model.trained_with, settings.pages, side
    ):
        warn(message)
    lowest = settings.threshold
    new_tracker = None
    if settings.track:
        lowest = min(lowest, UNSURE_SCORE)
        new_tracker = partial(Tracker, settings.threshold, ids=itertools.count(1))
    predictor = Predictor(model, replace(settings, threshold=lowest), tiling is not None)
    is_new = not settings.output.exists()
    make_folder(settings.output, "--output")
    has_earlier = (settings.output / RECORDS).exists()
    if has_earlier:
        say(
            f"{settings.output} has earlier results: files of the same names are replaced, "
            "others stay"
        )
    taken_names = names_of_inputs(settings.output, paths)  # no input is overwritten

    singles = images
    if settings.pages:
        singles = [page for path in images for page in pages_of(path)]
    window = model.gray_window(singles, settings.gray)
    model.gray = None  # what it is given from here on has been read
    predict_images(
        predictor, singles, window, settings.output, suffix, taken_names, results, new_tracker
    )
    predict_videos(predictor, videos, settings.output, suffix, taken_names, results, new_tracker)
    unread = [path for path in paths if path not in results.read_files]
    if len(unread) == len(paths):
        if is_new and not next(settings.output.iterdir(), None):
            settings.output.rmdir()
        raise UserError(none_read(len(paths)))
    write_json(settings.output / RECORDS, results.records)
    results.are_written = True
    tell(settings, results, len(paths), model.best_score)
    if results.records and model.model.head is None:
        say("  boxes alone: this model has no mask head, which stage 2 trains on it")
    if has_earlier:
        tell_earlier(settings.output, taken_names)
    tell_lacks(settings, results, unread, len(paths))


def tell(settings: PredictionSettings, results: Results, files: int, best_score: float) -> None:
    """What was found and where it is; files: that were asked for; best_score: of any detection."""
    written = RECORDS if settings.pictures == "0" else f"pictures and {RECORDS}"
    followed = ""
    if settings.track:
        tracks = {record["track"] for record in results.records}
        followed = f" on {counted(len(tracks), 'track')}"
    if results.pages:
        followed += f" on {counted(results.pages, 'page')}"
    objects = counted(len(results.records), "object")
    read = len(results.read_files)
    where = counted(files, "file") if read == files else f"{read} of {counted(files, 'file')}"
    tick(f"{objects}{followed} in {where}: {settings.output} ({written})")
    if settings.track:
        lost = lost_at_once((record["track"] for record in results.records), settings.threshold)
        if lost:
            warn(lost)
    if not results.records and best_score < settings.threshold:
        say(
            f"  no score reaches --threshold {settings.threshold:g}, the best is "
            f"{best_score:.2g}: --threshold {rounded_down(best_score)} shows more. Where even the "
            "best scores are low, the model has not learned such objects"
        )


def tell_earlier(output: Path, own_names: set[str]) -> None:
    """How many pictures of earlier results lie among these; own_names: casefolded, of these and of
    the inputs.
    """
    files = [path for path in output.iterdir() if path.suffix.lower() in IMAGES | VIDEOS]
    earlier = [path for path in files if path.name.casefold() not in own_names]
    if earlier:
        count = counted(len(earlier), "picture")
        say(f"  {count} there from before, which {RECORDS} does not name")


def tell_lacks(
    settings: PredictionSettings, results: Results, unread: list[Path], files: int
) -> None:
    """Say what could not be read; exit with status 1 for videos that lack frames, and for files
    that --input names, not a folder or a pattern.

    files: that were asked for.
    """
    named = {Path(text) for text in settings.input}
    status = 1 if results.lacks_frames or named & set(unread) else 0
    if results.damaged:
        print(
            f"Damaged: {', '.join(map(str, results.damaged))}. What could be decoded is in "
            f"{settings.output}. For the rest, copy or convert the video again, and run this again",
            file=sys.stderr,
        )
    if unread:
        message = some_unread(len(unread), files)
        if status:
            print(message, file=sys.stderr)
        else:
            warn(message)
    if status:
        sys.exit(status)


def tell_interrupted(output: Path, results: Results) -> None:
    """What an interrupted run leaves, and how to go on."""
    if results.are_written:
        print(f"interrupted: all is written to {output}", file=sys.stderr)
        return
    if results.pictures:
        records = "is from before" if (output / RECORDS).exists() else "is not written"
        left = f"{counted(results.pictures, 'picture')} in {output}, {RECORDS} {records}"
    else:
        left = "nothing is written"
    print(f"interrupted: {left}. The same command begins again from the start", file=sys.stderr)


@dataclass
class Results:
    """What has been found so far.

    records: of predictions.json; read_files: those of which something could be read; pages: of
    files that have several; pictures: how many are written, videos too; damaged: videos of which
    less than what they announce could be decoded; lacks_frames: whether there are such, or ones of
    which nothing could be; are_written: to predictions.json.
    """

    records: list[dict] = field(default_factory=list)
    read_files: set[Path] = field(default_factory=set)
    pages: int = 0
    pictures: int = 0
    damaged: list[Path] = field(default_factory=list)
    lacks_frames: bool = False
    are_written: bool = False


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


# ---------------------------------------------------------------- images


def predict_images(
    predictor: Predictor,
    images: list[Path | Page],
    window: GrayWindow | None,
    output: Path,
    suffix: str | None,
    taken_names: set[str],
    results: Results,
    new_tracker: Callable[[], Tracker] | None = None,
) -> None:
    """Save a picture of each image; add what is found to the results.

    window: as in `read_image`.  suffix: of the pictures; None: there are none.  new_tracker: to
    take each folder, and each file of several pages, for a stack.
    """
    trackers: dict[Path, Tracker] = defaultdict(new_tracker)  # by folder or file of pages
    if new_tracker:
        images = in_stacks(images)
    saving: list[Future] = []
    batches = list(in_batches(iter(images), predictor.images_at_once))
    turn = predictor.model.exif == "apply"
    read_one = partial(read_or_warn, turn=turn, window=window, in_tiles=predictor.in_tiles)
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
                results.read_files.add(path)
                prediction = next(predictions)
                if new_tracker:
                    prediction = prediction.tracked(trackers[stack_of(image)])
                page = image.number if isinstance(image, Page) else None
                stem = path.stem
                if page:
                    stem += f"_page{page}"
                    results.pages += 1
                picture = suffix and free_name(stem, suffix, taken_names)
                if picture:
                    saving.append(pool.submit(save_picture, prediction, output / picture))
                    results.pictures += 1
                results.records += as_records(path, picture, prediction, page=page)
        wait_for(saving)


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


def save_picture(prediction: Prediction, file: Path) -> None:
    with writing_to(file.parent, "--output"):
        file.unlink(missing_ok=True)  # a link would be written through
        prediction.save_picture(file, JPEG_QUALITY)


# ---------------------------------------------------------------- videos


def predict_videos(
    predictor: Predictor,
    videos: list[Path],
    output: Path,
    suffix: str | None,
    taken_names: set[str],
    results: Results,
    new_tracker: Callable[[], Tracker] | None = None,
) -> None:
    """Save a copy of each video with everything drawn in, as predict_images does of images."""
    batch = predictor.settings.batch
    for path in videos:
        name = suffix and free_name(path.stem, ".mp4", taken_names)
        tracker = new_tracker and new_tracker()
        video = predict_video(predictor.predict, batch, path, output, name, tracker)
        results.records += video.records
        if not video.is_whole:
            results.lacks_frames = True
        if video.frames == 0:
            continue
        results.read_files.add(path)
        if name:
            results.pictures += 1
        if not video.is_whole:
            results.damaged.append(path)


if __name__ == "__main__":
    run_script(main)
