"""How much memory does predict.py take for an image of 20,000 x 20,000 pixels?

python benchmarks/huge_image.py --dataset nuclei --checkpoint RUN --side 20000 --tile 256

The dataset's valid images are laid side by side, again and again, into one image of `--side`
pixels, which is written as each of `--kinds` and predicted by a predict.py of its own, with its
picture and predictions.json. Peak memory is that process's, and that of the process that decodes
what has to be decoded as a whole, where it is more. What follows `--` goes to predict.py as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from command_words import own_and_more
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Image.MAX_IMAGE_PIXELS = None
KINDS = {  # suffix, Pillow's options; gray where the name says so
    "tiff": (".tif", {}),
    "tiff_lzw": (".tif", {"compression": "tiff_lzw"}),
    "tiff_deflate": (".tif", {"compression": "tiff_adobe_deflate"}),
    "png": (".png", {"compress_level": 1}),
    "jpeg": (".jpg", {"quality": 92}),
    "bmp": (".bmp", {}),
    "gray_tiff_lzw": (".tif", {"compression": "tiff_lzw"}),
    "gray_png": (".png", {"compress_level": 1}),
    "gray_jpeg": (".jpg", {"quality": 92}),
}

# predict.py, which prints its peak memory and that of its children at its end
ALONE = """
import resource, runpy, sys
root = sys.argv[1]
sys.path.insert(0, root)
sys.argv = [root + "/predict.py", *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (0, resource.RUSAGE_CHILDREN)]
if sys.platform == "linux":  # where the first counts the memory of what started the process, too
    lines = open("/proc/self/status").read().splitlines()
    peaks[0] = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
print("PEAKS", *peaks)
"""


def images_again_and_again(split) -> Iterator[np.ndarray]:
    from rfdetr.data.images import load_image

    while True:
        for record in split.images:
            yield load_image(record)


def mosaic(split, side: int, mode: str) -> Image.Image:
    """The images in rows, each as high as its lowest one; what is larger is cut."""
    canvas = Image.new(mode, (side, side), "gray")
    images = images_again_and_again(split)
    top = 0
    while top < side:
        left = 0
        row = []
        while left < side:
            row.append((left, next(images)))
            left += row[-1][1].shape[1]
        height = min(len(pixels) for _, pixels in row)
        for left, pixels in row:
            part = Image.fromarray(pixels[:height])
            canvas.paste(ImageOps.grayscale(part) if mode == "L" else part, (left, top))
        top += height
    return canvas


def predicted(file: Path, args: argparse.Namespace, more: list[str]) -> dict:
    """Seconds, peaks in MB and objects of predict.py on one file."""
    with tempfile.TemporaryDirectory(dir=file.parent) as output:
        words = ["--checkpoint", args.checkpoint, "--input", file, "--output", output]
        words += ["--tile", args.tile, "--device", "cpu", *more]
        command = [sys.executable, "-c", ALONE, ROOT, *words]
        begin = time.perf_counter()
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise SystemExit(f"predict.py ended with {done.returncode}:\n{done.stderr[-2000:]}")
        peaks = done.stdout.splitlines()[-1].split()[1:]
        records = json.loads((Path(output) / "predictions.json").read_text(encoding="utf-8"))
    own, children = map(float, peaks)
    return {"seconds": seconds, "own": own, "children": children, "objects": len(records)}


def main() -> None:
    own, more = own_and_more()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--tile", default="256")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--work", type=Path, help="a folder for the images (default: temporary)")
    args = parser.parse_args(own)
    from rfdetr.data.coco import read_dataset
    from rfdetr.runs.environment import environment

    info = environment()
    print(
        f"{info['cpu']}, {info['threads']} threads, torch {info['torch']}, Pillow "
        f"{Image.__version__}, commit {info['commit']}"
    )
    print("| kind | side | file, MB | seconds | peak, MB | of its decoder, MB | objects |")
    print("|---|---|---|---|---|---|---|", flush=True)
    split = read_dataset(args.dataset)["valid"]
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for kind in args.kinds:
            suffix, options = KINDS[kind]
            file = Path(folder) / f"mosaic{suffix}"
            mosaic(split, args.side, "L" if kind.startswith("gray") else "RGB").save(
                file, **options
            )
            result = predicted(file, args, more)
            # a process that is started counts with its parent's memory until it has begun
            decoder = "-"
            if result["children"] > result["own"]:
                decoder = f"{result['children']:.0f}"
            print(
                f"| {kind} | {args.side} | {file.stat().st_size / 1e6:.0f} | "
                f"{result['seconds']:.0f} | {result['own']:.0f} | {decoder} | "
                f"{result['objects']} |",
                flush=True,
            )
            file.unlink()


if __name__ == "__main__":
    main()
