"""Starting on a dataset of COCO's size: 118,000 images, 862,000 polygons, a JSON of 400 MB.

python benchmarks/large_dataset.py [--images 12000] [--folder DIR]

Makes the set (the images are hard links to 50 JPEGs of the demo generator), then reads it as
training does, each time in a process of its own: once with `json.load` alone, once with an empty
cache, once with the image files known from an earlier start but not the annotations, and once
again. Seconds are of CPU; "x" is the ratio to json.load. Memory is the process's peak above what
it has after its imports. A worker's memory is what it alone holds (Linux: Private_*), above that
of a worker of an empty dataset, with `fork` and with `spawn`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FILES = 50
SIDE = 320
OBJECTS = 7.3  # an image
CORNERS = 22
CLASSES = 80
SAMPLES = 20  # images that a worker reads before it is measured


def make_set(folder: Path, images: int) -> None:
    """A train split of so many images and a valid split of 50, unless they are there already."""
    from PIL import Image

    from rfdetr.data.demo import make_demo

    if (folder / "data" / "train" / "_annotations.coco.json").exists():
        return
    make_demo(folder / "demo", train=FILES, valid=1, test=1, size=SIDE)
    sources = []
    for file in sorted((folder / "demo" / "train").glob("*.png")):
        sources.append(file.with_suffix(".jpg"))
        Image.open(file).convert("RGB").save(sources[-1], quality=85)
    for name, count in (("valid", FILES), ("train", images)):
        target = folder / "data" / name
        target.mkdir(parents=True)
        for number in range(count):
            os.link(sources[number % FILES], target / f"{number:012d}.jpg")
        write_annotations(target / "_annotations.coco.json", count)


def write_annotations(file: Path, images: int) -> None:
    rng = np.random.default_rng(images)
    entries = []
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    per_image = rng.poisson(OBJECTS, images)
    for image, count in enumerate(per_image):
        for _ in range(count):
            centre = rng.uniform(60, SIDE - 60, 2)
            radius = rng.uniform(8, 50) * rng.uniform(0.8, 1, CORNERS)
            corners = centre + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
            low = corners.min(0)
            width, height = corners.max(0) - low
            entries.append(
                {
                    "segmentation": [corners.round(2).ravel().tolist()],
                    "area": round(float(width * height * 0.7), 4),
                    "iscrowd": 0,
                    "image_id": image,
                    "bbox": [round(float(value), 2) for value in (*low, width, height)],
                    "category_id": int(rng.integers(1, CLASSES + 1)),
                    "id": len(entries) + 1,
                }
            )
    named = [
        {"id": number, "file_name": f"{number:012d}.jpg", "width": SIDE, "height": SIDE}
        for number in range(images)
    ]
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    content = {"images": named, "annotations": entries, "categories": categories}
    file.write_text(json.dumps(content), encoding="utf-8")


# ---------------------------------------------------------------- each in a process of its own


def peak_mb() -> float:
    """The most that this process has held; getrusage would count its parent's, too."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split("VmHWM:")[1].split()[0]) / 1024


def private_mb() -> float:
    """What this process alone holds."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    sizes = [line.split() for line in text.splitlines()]
    return sum(int(words[1]) for words in sizes if words[0].startswith("Private")) / 1024


def json_alone(folder: Path) -> None:
    for file in sorted(folder.glob("data/*/_annotations.coco.json")):
        with open(file, "rb") as opened:
            json.load(opened)


def start(folder: Path) -> None:
    """What a training script does before its first batch."""
    from rfdetr.data.coco import read_dataset
    from rfdetr.data.dataset import SplitDataset
    from rfdetr.data.loaders import EpochSampler
    from rfdetr.data.mask_source import choose_masks, images_with_drawn_masks
    from rfdetr.data.sampling import make_mix
    from rfdetr.data.statistics import shrink_problems

    split = read_dataset(folder / "data")["train"]
    shrink_problems(split, 384, 32)
    dataset = SplitDataset(split, 384, "crops", masks=True, guess=choose_masks(split, "auto"))
    EpochSampler(len(dataset), 4, 0, 1, mix=make_mix(split, images_with_drawn_masks(split)))
    assert len(split.content_hashes) == len(dataset)


class Probe:
    """A dataset whose samples are the MB that the process which reads them alone holds."""

    def __init__(self, dataset: object):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> float:
        for number in range(index, index + SAMPLES):
            self.dataset[number % len(self), number]
        return private_mb()


def worker_memory(folder: Path, split: str, method: str) -> float:
    """MB that a worker alone holds after it has read a few images."""
    from torch.utils.data import DataLoader

    from rfdetr.data.coco import read_dataset
    from rfdetr.data.dataset import SplitDataset

    dataset = SplitDataset(read_dataset(folder / "data")[split], 384, "crops", masks=True)
    dataset.cache = None
    loader = DataLoader(Probe(dataset), num_workers=1, multiprocessing_context=method)
    return float(next(iter(loader)))


def measured(*what: str, folder: Path) -> dict:
    """The figures of a part, from a process of its own."""
    words = [sys.executable, __file__, "--folder", str(folder), "--part", *what]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def run_part(what: str, *words: str, folder: Path) -> dict:
    import torch  # noqa: F401  counted among the imports

    import rfdetr.data.coco
    import rfdetr.data.loaders
    import rfdetr.data.mask_source
    import rfdetr.data.statistics  # noqa: F401

    if what == "worker":
        return {"mb": worker_memory(folder, *words)}
    before = peak_mb()
    began = time.process_time()
    wall = time.perf_counter()
    {"json": json_alone, "start": start}[what](folder)
    return {
        "cpu": time.process_time() - began,
        "wall": time.perf_counter() - wall,
        "peak_mb": peak_mb() - before,
        "process_mb": peak_mb(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--folder", type=Path, help="where the set is made, or is from before")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(run_part(*args.part, folder=args.folder)))
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="large_dataset_"))
    make_set(folder, args.images)
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["RFDETR_CACHE"] = str(cache)
    alone = measured("json", folder=folder)
    report("json.load", alone, alone)
    report("first start", measured("start", folder=folder), alone)
    shutil.rmtree(cache / "indices")
    report("first start, images known", measured("start", folder=folder), alone)
    report("later start", measured("start", folder=folder), alone)
    for method in ("fork", "spawn"):
        large, small = (
            measured("worker", split, method, folder=folder)["mb"] for split in ("train", "valid")
        )
        print(f"a worker's own memory, {method:5}: {large - small:6.1f} MB more than of 50 images")


def report(title: str, figures: dict, alone: dict) -> None:
    ratio = figures["cpu"] / alone["cpu"]
    print(
        f"{title:40} {figures['cpu']:7.2f} s  {ratio:5.2f} x  {figures['wall']:7.2f} s of wall  "
        f"{figures['peak_mb']:6.0f} MB above imports, {figures['process_mb']:6.0f} MB in all",
        flush=True,
    )


if __name__ == "__main__":
    main()
