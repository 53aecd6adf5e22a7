"""Is an image in tiles done as well as its parts by themselves?  A mosaic against its originals.

python benchmarks/tiles.py --dataset nuclei --checkpoint RUN [--side 2048] [--tile auto]

The valid images, the crowded ones first, are laid side by side into one picture of `--side` pixels;
with `--only 256` those of 256 x 256 pixels alone, which are more alike.
Originals and mosaic are predicted with the same threshold, and both are matched with the drawn
objects, one to one at IoU .5 of masks (of boxes without a mask head), better scores first.
`recall` is the mosaic's found objects over the originals'; `duplicates` are further detections of
an object that is found already (IoU of .5 and more). Seconds and peak memory are of a process of
its own that predicts the mosaic alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MATCHED = 0.5

ALONE = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
from rfdetr.detr import RFDETR
_, _, checkpoint, image, tile, threshold = sys.argv[:6]
tile = tile if tile == "auto" else int(tile)
model = RFDETR.from_checkpoint(checkpoint, device="cpu")
begin = time.perf_counter()
prediction = model.predict(image, float(threshold), tile=tile)
seconds = time.perf_counter() - begin
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "peak_mb": peak, "objects": len(prediction)}))
"""


def lay_out(split, side: int, only: int | None) -> list[tuple[int, int, int]]:
    """(index, left, top) of images in rows, until the picture is full; crowded images first.

    only: images of only x only pixels alone, each as often as there is room.
    """
    density = [-len(image.labels) / (image.height * image.width) for image in split.images]
    places = []
    left = 0
    top = 0
    row_height = 0
    order = np.argsort(density, kind="stable").tolist()
    if only:
        alike = [i for i in order if split.images[i].width == split.images[i].height == only]
        order = alike * ((side // only) ** 2 // len(alike) + 1)
    for index in order:
        image = split.images[index]
        if left + image.width > side:
            left = 0
            top += row_height
            row_height = 0
        if image.width > side or top + image.height > side:
            continue
        places.append((index, left, top))
        left += image.width
        row_height = max(row_height, image.height)
    return places


def matched(found: list[dict], truth: list[dict]) -> tuple[int, int]:
    """(objects that are found, further detections of those); found: best first."""
    if not found or not truth:
        return 0, 0
    ious = np.asarray(mask_api.iou(found, truth, [0] * len(truth))).reshape(len(found), -1)
    taken: set[int] = set()
    again = 0
    for row in ious:
        near = np.flatnonzero(row >= MATCHED)
        free = [object_ for object_ in near.tolist() if object_ not in taken]
        if free:
            taken.add(max(free, key=lambda object_: row[object_]))
        elif len(near):
            again += 1
    return len(taken), again


def as_rles(prediction, height: int, width: int) -> list[dict]:
    if prediction.rles is not None:
        return prediction.rles
    boxes = np.concatenate(
        [prediction.boxes[:, :2], prediction.boxes[:, 2:] - prediction.boxes[:, :2]], axis=1
    )
    return mask_api.frPyObjects(boxes.astype(float), height, width) if len(boxes) else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--only", type=int, help="of images with this side alone, repeated")
    parser.add_argument("--tile", default="auto")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--keep", type=Path, help="write the mosaic and its picture here")
    args = parser.parse_args()

    from rfdetr.data.coco import read_dataset
    from rfdetr.data.images import load_image
    from rfdetr.detr import RFDETR
    from rfdetr.masks import to_rle
    from rfdetr.runs.environment import environment

    info = environment()
    print(
        f"{info['cpu']}, {info['threads']} threads, torch {info['torch']}, commit {info['commit']}"
    )
    split = read_dataset(args.dataset)["valid"]
    model = RFDETR.from_checkpoint(args.checkpoint, device="cpu")
    mosaic = np.full((args.side, args.side, 3), 128, dtype=np.uint8)
    single = {"drawn": 0, "detections": 0, "found": 0, "again": 0, "seconds": 0.0}
    truth = []
    for index, left, top in lay_out(split, args.side, args.only):
        record = split.images[index]
        pixels = load_image(record)
        height, width = pixels.shape[:2]
        mosaic[top : top + height, left : left + width] = pixels
        begin = time.perf_counter()
        prediction = model.predict(pixels, args.threshold)
        single["seconds"] += time.perf_counter() - begin
        drawn = [to_rle(shape, height, width) for shape in record.segmentations]
        found, again = matched(as_rles(prediction, height, width), drawn)
        single["drawn"] += len(drawn)
        single["detections"] += len(prediction)
        single["found"] += found
        single["again"] += again
        for rle in drawn:
            canvas = np.zeros((args.side, args.side), dtype=np.uint8, order="F")
            canvas[top : top + height, left : left + width] = mask_api.decode(rle)
            truth.append(mask_api.encode(canvas))
    tile = args.tile if args.tile == "auto" else int(args.tile)
    prediction = model.predict(mosaic, args.threshold, tile=tile)
    found, again = matched(as_rles(prediction, args.side, args.side), truth)
    with tempfile.TemporaryDirectory() as folder:
        file = args.keep or Path(folder)
        file.mkdir(parents=True, exist_ok=True)
        image = file / "mosaic.png"
        Image.fromarray(mosaic).save(image)
        if args.keep:
            prediction.picture().save(file / "found.png")
        words = [str(ROOT), str(args.checkpoint), str(image), str(args.tile), str(args.threshold)]
        command = [sys.executable, "-c", ALONE, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        alone = json.loads(done.stdout.splitlines()[-1])
    print("| | originals | mosaic |\n|---|---|---|")
    print(f"| drawn objects | {single['drawn']} | {len(truth)} |")
    print(f"| detections | {single['detections']} | {len(prediction)} |")
    print(f"| found | {single['found']} | {found} ({found / max(single['found'], 1):.3f}) |")
    print(f"| duplicates | {single['again']} | {again} ({again / max(found, 1):.3%}) |")
    print(f"| seconds | {single['seconds']:.1f} | {alone['seconds']:.1f} |")
    print(f"| peak memory, MB | | {alone['peak_mb']:.0f} |")


if __name__ == "__main__":
    main()
