"""Is an image in tiles done as well as its parts by themselves?  A mosaic against its originals.

python benchmarks/tiles.py --dataset nuclei --checkpoint RUN [--side 2048] [--tile auto]

The valid images, the crowded ones first, are laid side by side into one picture of `--side` pixels;
with `--only 256` those of 256 x 256 pixels alone, which are more alike; with `--order file` in the
order of the dataset, with `--order alike` by their mean brightness, so that like lies beside like.
Originals and mosaic are predicted with the same threshold, and both are matched with the drawn
objects, one to one at IoU .5 of masks (of boxes without a mask head), better scores first.
`found` has the mosaic's objects over the originals' in brackets, of all and of those that do not
touch a border of their picture, where no object of a real image would be cut; `duplicates` are
further detections of an object that is found already (IoU of .5 and more). `mAP` is COCO's, with as
many detections as there are, of masks (of boxes without a mask head), from predictions without a
threshold and without the suppression of overlapping boxes, as evaluate.py scores; away from borders
it leaves out the objects there, and detections on them. `mirrored` is each image by itself again,
in tiles, going on in its mirror image for MIRRORED pixels beyond its borders: what tiles cost where
no strange picture lies beside. Seconds and peak memory are of a process of its own that predicts
the mosaic alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rfdetr.data.coco import read_dataset  # noqa: E402
from rfdetr.data.images import load_image  # noqa: E402
from rfdetr.data.records import CocoSplit  # noqa: E402
from rfdetr.detr import RFDETR  # noqa: E402
from rfdetr.inference.prediction import Prediction  # noqa: E402
from rfdetr.masks import to_rle  # noqa: E402
from rfdetr.metrics.coco_eval import CocoEvaluator  # noqa: E402
from rfdetr.runs.environment import environment  # noqa: E402
from rfdetr.settings import TILE_OVERLAP  # noqa: E402

MATCHED = 0.5
GROUND = 128  # gray where no image lies
ORDERS = ("crowded", "file", "alike")
MIRRORED = 100  # pixels beyond each border, so that the tiles of an image cut it anywhere
ALL = 1_000_000  # detections that the mAP looks at

ALONE = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
from rfdetr.detr import RFDETR
_, _, checkpoint, image, tile, overlap, threshold = sys.argv
tile = tile if tile == "auto" else int(tile)
model = RFDETR.from_checkpoint(checkpoint, device="cpu")
begin = time.perf_counter()
prediction = model.predict(image, float(threshold), tile=tile, tile_overlap=float(overlap))
seconds = time.perf_counter() - begin
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "peak_mb": peak, "objects": len(prediction)}))
"""


@dataclass
class Pictures:
    """Some pictures with their drawn objects, and what is detected there."""

    pixels: list[np.ndarray]
    drawn: list[list[dict]]  # RLEs of each picture
    labels: list[list[int]]  # category ids
    inner: list[list[bool]]  # the object does not touch a border of its own picture
    sure: list[Prediction] = field(default_factory=list)  # with the threshold
    all: list[Prediction] = field(default_factory=list)  # without one

    def predict(
        self, model: RFDETR, threshold: float, tile: int | str = 0, overlap: float = 0.0
    ) -> None:
        for pixels in self.pixels:
            sure = model.predict(pixels, threshold, tile=tile, tile_overlap=overlap)
            self.sure.append(sure)
            self.all.append(model.predict(pixels, 0.0, nms=0.0, tile=tile, tile_overlap=overlap))

    @property
    def objects(self) -> int:
        return sum(len(rles) for rles in self.drawn)

    @property
    def detections(self) -> int:
        return sum(len(prediction) for prediction in self.sure)

    def found(self) -> tuple[int, int, int]:
        """(objects that are found, those of them that touch no border, further detections)."""
        objects = 0
        inner_ones = 0
        further = 0
        for i, prediction in enumerate(self.sure):
            rles = as_rles(prediction, *self.pixels[i].shape[:2])
            found, again = matched(rles, self.drawn[i])
            objects += len(found)
            inner_ones += sum(self.inner[i][object_] for object_ in found)
            further += again
        return objects, inner_ones, further

    def mean_average_precision(self, inner_alone: bool = False) -> float:
        """inner_alone: what touches a border of its picture counts neither for nor against."""
        images = []
        annotations = []
        for number, pixels in enumerate(self.pixels, 1):
            height, width = pixels.shape[:2]
            images.append({"id": number, "height": height, "width": width})
            for rle, category_id, is_crowd in self.annotated(number - 1, inner_alone):
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category_id,
                    "bbox": mask_api.toBbox(rle).tolist(),
                    "area": float(mask_api.area(rle)),
                    "segmentation": rle,
                    "iscrowd": int(is_crowd),
                }
                annotations.append(annotation)
        table = self.all[0].table
        categories = [{"id": key, "name": name} for key, name in zip(table.ids, table.names)]
        truth = {"images": images, "annotations": annotations, "categories": categories}
        has_masks = self.all[0].rles is not None
        evaluator = CocoEvaluator(truth, has_masks, max_detections=ALL)
        for number, one in enumerate(self.all, 1):
            labels = np.asarray(table.ids)[one.labels]
            evaluator.add(number, one.boxes, one.scores, labels, one.rles, one.mask_scores)
        return evaluator.summary()["segm" if has_masks else "bbox"][f"mAP@{ALL}"]

    def mirrored(
        self, model: RFDETR, threshold: float, tile: int | str, overlap: float
    ) -> Pictures:
        """The same pictures and objects, predicted in tiles of pictures that go on beyond."""
        sure = []
        everything = []
        around = ((MIRRORED, MIRRORED), (MIRRORED, MIRRORED), (0, 0))
        for pixels in self.pixels:
            larger = np.pad(pixels, around, mode="reflect")
            size = pixels.shape[:2]
            found = model.predict(larger, threshold, tile=tile, tile_overlap=overlap)
            sure.append(cut_back(found, *size))
            found = model.predict(larger, 0.0, nms=0.0, tile=tile, tile_overlap=overlap)
            everything.append(cut_back(found, *size))
        return replace(self, sure=sure, all=everything)

    def annotated(self, index: int, inner_alone: bool) -> Iterator[tuple[dict, int, bool]]:
        """(RLE, category id, whether it is a crowd) of the drawn objects of a picture.

        inner_alone: those at borders are one crowd for each class, so that a detection that spans
        two pictures' objects lies in it.
        """
        at_borders: dict[int, list[dict]] = {}
        for rle, category_id, inner in zip(
            self.drawn[index], self.labels[index], self.inner[index]
        ):
            if inner or not inner_alone:
                yield rle, category_id, False
            else:
                at_borders.setdefault(category_id, []).append(rle)
        for category_id, rles in at_borders.items():
            yield mask_api.merge(rles), category_id, True


def cut_back(prediction: Prediction, height: int, width: int) -> Prediction:
    """What lies in the middle, height x width pixels, by more than half of its mask or box."""
    original = prediction.original
    kept = []
    rles = []
    for index, rle in enumerate(as_rles(prediction, original.height, original.width)):
        inside = mask_api.decode(rle)[MIRRORED:-MIRRORED, MIRRORED:-MIRRORED]
        if inside.sum() > mask_api.area(rle) / 2:
            kept.append(index)
            rles.append(mask_api.encode(np.asfortranarray(inside)))
    boxes = (prediction.boxes[kept] - MIRRORED).clip(0, [width, height, width, height])
    has_masks = prediction.rles is not None
    return replace(
        prediction,
        boxes=boxes,
        scores=prediction.scores[kept],
        labels=prediction.labels[kept],
        rles=rles if has_masks else None,
        mask_scores=prediction.mask_scores[kept] if has_masks else None,
    )


def lay_out(
    split: CocoSplit, side: int, only: int | None = None, order: str = "crowded"
) -> list[tuple[int, int, int]]:
    """(index, left, top) of images in rows, until the picture is full.

    only: images of only x only pixels alone, each as often as there is room.
    order: one of ORDERS.
    """
    numbers = list(range(len(split.images)))
    if order == "crowded":
        areas = split.images.sizes.prod(axis=1)
        numbers.sort(key=lambda i: -len(split.images[i].labels) / areas[i])
    elif order == "alike":
        numbers.sort(key=lambda i: load_image(split.images[i]).mean())
    if only:
        alike = [i for i in numbers if split.images.sizes[i].tolist() == [only, only]]
        numbers = alike * ((side // only) ** 2 // len(alike) + 1)
        if order == "alike":  # copies beside each other
            numbers = sorted(numbers[: (side // only) ** 2], key=alike.index)
    places = []
    left = 0
    top = 0
    row_height = 0
    for index in numbers:
        width, height = split.images.sizes[index].tolist()
        if left + width > side:
            left = 0
            top += row_height
            row_height = 0
        if width > side or top + height > side:
            continue
        places.append((index, left, top))
        left += width
        row_height = max(row_height, height)
    return places


def originals_and_mosaic(
    split: CocoSplit, side: int, places: list[tuple[int, int, int]]
) -> tuple[Pictures, Pictures]:
    """The images at these places, and the one picture of side x side pixels made of them."""
    originals = Pictures([], [], [], [])
    mosaic = np.full((side, side, 3), GROUND, dtype=np.uint8)
    moved = []
    for index, left, top in places:
        record = split.images[index]
        pixels = load_image(record)
        height, width = pixels.shape[:2]
        mosaic[top : top + height, left : left + width] = pixels
        drawn = [to_rle(shape, height, width) for shape in record.segmentations]
        labels = [split.category_ids[label] for label in record.labels]
        originals.pixels.append(pixels)
        originals.drawn.append(drawn)
        originals.labels.append(labels)
        originals.inner.append([is_inner(rle) for rle in drawn])
        for rle in drawn:
            canvas = np.zeros((side, side), dtype=np.uint8, order="F")
            canvas[top : top + height, left : left + width] = mask_api.decode(rle)
            moved.append(mask_api.encode(canvas))
    labels = [sum(originals.labels, [])]
    inner = [sum(originals.inner, [])]
    return originals, Pictures([mosaic], [moved], labels, inner)


def is_inner(rle: dict) -> bool:
    """Whether a mask keeps clear of its picture's borders by two pixels."""
    height, width = rle["size"]
    left, top, box_width, box_height = mask_api.toBbox(rle)
    far = min(width - left - box_width, height - top - box_height)
    return min(left, top, far) >= 2


def matched(found: list[dict], truth: list[dict]) -> tuple[set[int], int]:
    """(the objects that are found, further detections of those); found: best first."""
    if not found or not truth:
        return set(), 0
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
    return taken, again


def as_rles(prediction: Prediction, height: int, width: int) -> list[dict]:
    if prediction.rles is not None:
        return prediction.rles
    boxes = np.concatenate(
        [prediction.boxes[:, :2], prediction.boxes[:, 2:] - prediction.boxes[:, :2]], axis=1
    )
    return mask_api.frPyObjects(boxes.astype(float), height, width) if len(boxes) else []


def predicted_alone(mosaic: np.ndarray, folder: Path, words: list[str]) -> dict:
    """Seconds and memory of a process of its own; words: checkpoint, then tile to threshold."""
    image = folder / "mosaic.png"
    Image.fromarray(mosaic).save(image)
    command = [sys.executable, "-c", ALONE, str(ROOT), words[0], str(image), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--only", type=int, help="of images with this side alone, repeated")
    parser.add_argument("--order", choices=ORDERS, default=ORDERS[0])
    parser.add_argument("--tile", default="auto")
    parser.add_argument("--tile_overlap", type=float, default=TILE_OVERLAP)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--keep", type=Path, help="write the mosaic and its picture here")
    args = parser.parse_args()

    info = environment()
    print(
        f"{info['cpu']}, {info['threads']} threads, torch {info['torch']}, commit {info['commit']}"
    )
    split = read_dataset(args.dataset)["valid"]
    model = RFDETR.from_checkpoint(args.checkpoint, device="cpu")
    places = lay_out(split, args.side, args.only, args.order)
    originals, mosaic = originals_and_mosaic(split, args.side, places)
    begin = time.perf_counter()
    originals.predict(model, args.threshold)
    print(f"{len(places)} images by themselves, twice: {time.perf_counter() - begin:.1f} s")
    tile = args.tile if args.tile == "auto" else int(args.tile)
    mosaic.predict(model, args.threshold, tile, args.tile_overlap)
    mirrored = originals.mirrored(model, args.threshold, tile, args.tile_overlap)
    words = [args.checkpoint, args.tile, args.tile_overlap, args.threshold]
    with tempfile.TemporaryDirectory() as folder:
        file = args.keep or Path(folder)
        file.mkdir(parents=True, exist_ok=True)
        alone = predicted_alone(mosaic.pixels[0], file, [str(word) for word in words])
    if args.keep:
        mosaic.sure[0].picture().save(args.keep / "found.png")
    print_table(originals, mirrored, mosaic)
    print(f"mosaic: {alone['seconds']:.1f} s, {alone['peak_mb']:.0f} MB at most")


def print_table(originals: Pictures, mirrored: Pictures, mosaic: Pictures) -> None:
    """In Markdown; what is compared with the originals has their share or distance beside it."""
    base_found, base_inner, base_again = originals.found()
    base_map = originals.mean_average_precision()
    base_inner_map = originals.mean_average_precision(inner_alone=True)
    rows = {
        "drawn objects": [str(originals.objects)],
        "detections": [str(originals.detections)],
        "found": [str(base_found)],
        "found, away from borders": [str(base_inner)],
        "duplicates": [str(base_again)],
        "mAP": [f"{base_map:.3f}"],
        "mAP, away from borders": [f"{base_inner_map:.3f}"],
    }
    for tiled in (mirrored, mosaic):
        found, inner, again = tiled.found()
        more = tiled.detections / max(originals.detections, 1) - 1
        precision = tiled.mean_average_precision()
        inner_precision = tiled.mean_average_precision(inner_alone=True)
        rows["drawn objects"].append(str(tiled.objects))
        rows["detections"].append(f"{tiled.detections} ({more:+.1%})")
        rows["found"].append(f"{found} ({found / max(base_found, 1):.3f})")
        rows["found, away from borders"].append(f"{inner} ({inner / max(base_inner, 1):.3f})")
        rows["duplicates"].append(f"{again} ({again / max(found, 1):.2%})")
        rows["mAP"].append(f"{precision:.3f} ({precision - base_map:+.3f})")
        distance = inner_precision - base_inner_map
        rows["mAP, away from borders"].append(f"{inner_precision:.3f} ({distance:+.3f})")
    print("| | originals | mirrored | mosaic |\n|---|---|---|---|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
