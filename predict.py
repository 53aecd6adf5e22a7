"""Find objects in images, folders, globs and videos: pictures, and predictions.json with boxes and masks.

python predict.py --checkpoint runs/segmentation_nano_384_1/best.pt --input photos/ clip.mp4 --output found
"""

from __future__ import annotations

import glob
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from rfdetr.cli import script_settings
from rfdetr.console import UserError, run_script, tick, warn
from rfdetr.detr import RFDETR, read_image
from rfdetr.device import compile_in_place
from rfdetr.files import is_special_file, make_folder, write_json, writing_to
from rfdetr.inference.detections import Prediction
from rfdetr.settings import PredictionSettings

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}
WHOLE = 0.95  # of a video's announced frames; a video with fewer is damaged


def main(argv: list[str] | None = None) -> None:
    args = script_settings(PredictionSettings, __doc__, argv)

    files = collect(args.input)
    model = RFDETR.from_checkpoint(args.checkpoint, args.device, args.amp, args.resolution)
    model.exif = args.exif or model.exif
    turn = itertools.repeat(model.exif == "apply")
    if args.compile:
        compile_in_place(model.model.encoder, model.precision.device)
    make_folder(args.output, "--output")
    images, videos = (
        [path for path in files if path.suffix.lower() in kind] for kind in (IMAGES, VIDEOS)
    )
    taken = names_of_inputs(args.output, files)  # no input is overwritten
    chunks = [images[i : i + args.batch] for i in range(0, len(images), args.batch)] or [[]]
    results, unread, names = [], 0, itertools.repeat(model.class_names)
    with (
        ThreadPoolExecutor() as pool
    ):  # reads the next images and writes the last pictures while the model works
        reading, saving = pool.map(read, chunks[0], turn), []
        for chunk, following in zip(tqdm(chunks, desc="images", leave=False), [*chunks[1:], []]):
            pixels, reading = list(reading), pool.map(read, following, turn)
            list(saving)  # raises what went wrong
            readable = [(path, image) for path, image in zip(chunk, pixels) if image is not None]
            unread += len(chunk) - len(readable)
            found = find(model, [image for _, image in readable], args)
            targets = [args.output / free_name(path.stem, ".png", taken) for path, _ in readable]
            saving = pool.map(save_picture, found, names, targets)
            for (path, _), one in zip(readable, found):
                results += as_records(str(path), one)
        list(saving)
    damaged = []
    for path in videos:
        target = args.output / free_name(path.stem, ".mp4", taken)
        found, sound = predict_video(model, path, target, args)
        unread += found is None
        results += found or []
        damaged += [] if sound else [str(path)]
    if unread == len(files):
        raise UserError(f"none of the {unread} files could be read (the warnings above name them)")
    write_json(args.output / "predictions.json", results)
    tick(
        f"{len(results)} objects in {len(files) - unread} files: {args.output} (pictures and predictions.json)"
    )
    if damaged:
        print(
            f"Not whole: {', '.join(damaged)}. What could be decoded is in {args.output}; for the rest copy or convert "
            "the video anew, and run this again",
            file=sys.stderr,
        )
        sys.exit(1)


def collect(inputs: list[str]) -> list[Path]:
    """All image and video files that the arguments name, sorted inside folders, each once.  Raises UserError."""
    found: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            paths = path.iterdir()
        else:
            paths = [path] if path.is_file() else map(Path, glob.glob(text, recursive=True))
        usable = sorted(path for path in paths if path.suffix.lower() in IMAGES | VIDEOS)
        special = [path for path in usable if is_special_file(path)]
        for path in special:
            warn(f"{path} is a pipe, a socket or a device, no file: left out")
        usable = [path for path in usable if path not in special]
        if not usable:
            raise UserError(
                f"--input {text}: no images or videos there ({', '.join(sorted(IMAGES | VIDEOS))})"
            )
        found += usable
    return list(dict.fromkeys(found))


def names_of_inputs(folder: Path, inputs: list[Path]) -> set[str]:
    """The casefolded names in a folder that lead to an input, by whatever link."""
    known = {_identity(path) for path in inputs}
    return {
        path.name.casefold()
        for path in folder.iterdir()
        if path.exists() and _identity(path) in known
    }


def free_name(stem: str, suffix: str, taken: set[str]) -> str:
    """A file name for a picture or video that is not `taken` yet, with a number where need be; it is taken then.

    `taken` has casefolded names: on most Windows and macOS disks a.PNG is a.png.
    """
    names = itertools.chain([stem + suffix], (f"{stem}_{n}{suffix}" for n in itertools.count(2)))
    name = next(name for name in names if name.casefold() not in taken)
    taken.add(name.casefold())
    return name


def _identity(path: Path) -> tuple[int, int] | None:
    """What all names and links of one file have in common; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def read(path: Path, turn: bool) -> np.ndarray | None:
    """An image as (H, W, 3) uint8 RGB; None, with a warning, for a file that cannot be read.  turn: by its EXIF."""
    try:
        return read_image(path, turn)
    except UserError as error:
        warn(str(error))
        return None


def find(model: RFDETR, images: list[np.ndarray], args: PredictionSettings) -> list[Prediction]:
    """Predictions of a few images or frames."""
    found = model.predict(images, args.threshold)
    return found if args.nms is None else [one.without_duplicates(args.nms) for one in found]


def save_picture(found: Prediction, class_names: list[str], file: Path) -> None:
    with writing_to(file.parent, "--output"):
        file.unlink(missing_ok=True)  # a link would be written through
        found.picture(class_names).save(file, compress_level=1)


def as_records(file: str, found: Prediction, frame: int | None = None) -> list[dict]:
    """predictions.json's entries: bbox xywh in pixels of the original, mask as COCO RLE or null."""
    masks = found.masks or [None] * len(found.names)
    rows = zip(found.boxes.tolist(), found.names, found.scores.tolist(), masks)
    extra = {} if frame is None else {"frame": frame}
    return [
        {
            "file": file,
            "class": name,
            "score": score,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "mask": mask,
            **extra,
        }
        for (x0, y0, x1, y1), name, score, mask in rows
    ]


def read_video(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """A video's frames, (H, W, 3) uint8 RGB."""
    while (frame := video.read()[1]) is not None:
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def predict_video(
    model: RFDETR, path: Path, target: Path, args: PredictionSettings
) -> tuple[list[dict] | None, bool]:
    """Write a copy of a video with everything drawn in to `target`.

    Returns its records with frame numbers, None with a warning for a file that cannot be read; and whether as many
    frames could be decoded as the file announces, with a warning where some are missing.
    """
    video = cv2.VideoCapture(str(path))
    announced = int(video.get(cv2.CAP_PROP_FRAME_COUNT))  # 0 or less: unknown
    frames, rate = read_video(video), video.get(cv2.CAP_PROP_FPS) or 25.0
    writer, records, count = None, [], 0
    with (
        writing_to(target.parent, "--output"),
        tempfile.TemporaryDirectory(dir=target.parent) as folder,
    ):
        made = Path(folder) / target.name  # a link at the target would be written through
        for chunk in tqdm(
            iter(lambda: list(itertools.islice(frames, args.batch)), []),
            desc=path.name,
            leave=False,
        ):
            for found in find(model, chunk, args):
                picture = cv2.cvtColor(
                    np.asarray(found.picture(model.class_names)), cv2.COLOR_RGB2BGR
                )
                if writer is None:
                    codec = cv2.VideoWriter_fourcc(*"mp4v")
                    writer = cv2.VideoWriter(str(made), codec, rate, picture.shape[1::-1])
                writer.write(picture)
                records += as_records(str(path), found, count)
                count += 1
        if writer is None:
            warn(
                f"{path} is not a video that can be read: it has no frames. Convert it to .mp4 and try again"
            )
            return None, announced <= 0
        writer.release()
        if (
            cv2.VideoCapture(str(made)).get(cv2.CAP_PROP_FRAME_COUNT) != count
        ):  # OpenCV writes without a word
            raise UserError(
                f"could not write all of {target}. Free some space there, or name another --output"
            )
        os.replace(made, target)
    if count < announced:
        warn(
            f"{path} is damaged: {count} of the {announced} frames that it announces could be decoded"
        )
    return records, count >= WHOLE * announced


if __name__ == "__main__":
    run_script(main)
