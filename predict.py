"""Find objects in images, folders, globs and videos: pictures, and predictions.json with boxes and masks.

python predict.py --checkpoint runs/segmentation_nano_384_1/best.pt --input photos/ clip.mp4 --output found
"""

from __future__ import annotations

import argparse
import glob
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from rfdetr.console import UserError, number, run_script, tick, warn
from rfdetr.detr import RFDETR, Found
from rfdetr.rundir import write_json

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a file of this repository, or an official one")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="images, folders, globs, videos")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for pictures and JSON")
    parser.add_argument("--threshold", type=number(float, 0, 1), default=0.5, help="lowest score (default: 0.5)")
    parser.add_argument(
        "--nms", type=number(float, 0, 1), metavar="IOU", help="drop duplicates of a class above this IoU"
    )
    parser.add_argument("--batch", type=number(int, 1), default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="off")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)

    files = collect(args.input)
    model = RFDETR.from_checkpoint(args.checkpoint, args.device, args.amp)
    make_folder(args.output)
    results: list[dict] = []
    images = [path for path in files if path.suffix.lower() in IMAGES]
    names = output_names(images)
    skipped = 0
    for first in tqdm(range(0, len(images), args.batch), desc="images", leave=False):
        chunk = images[first : first + args.batch]
        for path, found in zip(chunk, predict_some(model, chunk, args.threshold)):
            if found is None:
                skipped += 1
                continue
            found = found.without_duplicates(args.nms) if args.nms is not None else found
            found.picture(model.class_names).save(args.output / names[path])
            results += as_records(str(path), found)
    if skipped and skipped == len(files):
        raise UserError(f"none of the {skipped} images could be read (the warnings above name them)")
    for path in [path for path in files if path.suffix.lower() in VIDEOS]:
        results += predict_video(model, path, args)
    write_json(args.output / "predictions.json", results)
    tick(f"{len(results)} objects in {len(files) - skipped} files: {args.output} (pictures and predictions.json)")


def collect(inputs: list[str]) -> list[Path]:
    """All image and video files that the arguments name, sorted inside folders, each once.  Raises UserError."""
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            paths = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES | VIDEOS)
        elif path.is_file():
            paths = [path]
        else:
            paths = [
                Path(p) for p in sorted(glob.glob(text, recursive=True)) if Path(p).suffix.lower() in IMAGES | VIDEOS
            ]
        if not paths:
            raise UserError(f"--input {text}: no images or videos there ({', '.join(sorted(IMAGES | VIDEOS))})")
        for p in paths:
            if p.suffix.lower() not in IMAGES | VIDEOS:
                raise UserError(f"--input {p}: not an image or video ({', '.join(sorted(IMAGES | VIDEOS))})")
            found[p] = None
    return list(found)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be made: {error.strerror or error}") from error


def output_names(images: list[Path]) -> dict[Path, str]:
    """A picture's file name for each image; images of one name in several folders get numbers."""
    names: dict[Path, str] = {}
    for path in images:
        name, n = f"{path.stem}.png", 1
        while name in names.values():
            n += 1
            name = f"{path.stem}_{n}.png"
        names[path] = name
    return names


def predict_some(model: RFDETR, paths: list[Path], threshold: float) -> list[Found | None]:
    """Predictions of a few images; None, with a warning, for one that cannot be read."""
    try:
        return model.predict(list(paths), threshold)
    except UserError as error:
        if len(paths) == 1:
            warn(str(error))
            return [None]
        return [predict_some(model, [path], threshold)[0] for path in paths]


def as_records(file: str, found: Found, frame: int | None = None) -> list[dict]:
    """predictions.json's entries: bbox xywh in pixels of the original, mask as COCO RLE or null."""
    records = []
    for i, (x0, y0, x1, y1) in enumerate(found.boxes.tolist()):
        record = {
            "file": file,
            "class": found.names[i],
            "score": float(found.scores[i]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "mask": found.masks[i] if found.masks is not None else None,
        }
        records.append(record if frame is None else record | {"frame": frame})
    return records


def read_video(path: Path, batch: int) -> Iterator[list[np.ndarray]]:
    """A video's frames, (H, W, 3) uint8 RGB, a few at a time."""
    video = cv2.VideoCapture(str(path))
    frames = []
    while True:
        more, frame = video.read()
        if more:
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        if len(frames) == batch or (not more and frames):
            yield frames
            frames = []
        if not more:
            video.release()
            return


def predict_video(model: RFDETR, path: Path, args: argparse.Namespace) -> list[dict]:
    """Write a copy of a video with everything drawn in, OUTPUT/<name>.mp4; returns its records with frame numbers."""
    rate = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS) or 25.0
    writer, records, count = None, [], 0
    for frames in tqdm(read_video(path, args.batch), desc=path.name, leave=False):
        for found in model.predict(frames, args.threshold):
            found = found.without_duplicates(args.nms) if args.nms is not None else found
            picture = cv2.cvtColor(np.asarray(found.picture(model.class_names)), cv2.COLOR_RGB2BGR)
            if writer is None:
                target = str(args.output / f"{path.stem}.mp4")
                writer = cv2.VideoWriter(target, cv2.VideoWriter_fourcc(*"mp4v"), rate, picture.shape[1::-1])
            writer.write(picture)
            records += as_records(str(path), found, count)
            count += 1
    if writer is None:
        raise UserError(f"{path} is not a video that can be read: it has no frames. Convert it to .mp4 and try again")
    writer.release()
    return records


if __name__ == "__main__":
    run_script(main)
