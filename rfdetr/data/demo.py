"""Generated demo data: histology-like images with cells, blood vessels and glomeruli.

    python -m rfdetr.data.demo dataset_demo
    python -m rfdetr.data.demo dataset_thin --kind thin    (to measure masks: demo_measuring.py)

They lie as in `dataset/`. Tissue is painted as amounts of two dyes per pixel, (h, w, 2): blue for
nuclei, pink for the rest. They absorb light as on a stained slide (Beer-Lambert; vectors after
Ruifrok & Johnston 2001). Image i of a split depends on (kind, seed, split, i, size) alone, so the
first images are the same whatever the counts. The order in which random numbers are drawn is part
of that: every draw below has its place. Lengths are in `unit`s, pixels of a 192-pixel image.
"""

from __future__ import annotations

from rfdetr.packages import check_packages

check_packages(__name__)

import argparse
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from rfdetr.console import UserError, run_script, tick
from rfdetr.data.demo_drawing import (
    FULL_TURN,
    bent_tube,
    describe_object,
    direction,
    distances_to,
    find_place,
    roundish,
    smooth_noise,
    soft_step,
)
from rfdetr.data.demo_measuring import (
    HARD_NAMES,
    LONGTAIL_NAMES,
    THIN_NAMES,
    render_hard,
    render_longtail,
    render_thin,
)
from rfdetr.data.layout import ANNOTATIONS, SPLITS
from rfdetr.fields import MOST, number
from rfdetr.parser import Parser
from rfdetr.text import command_line

CLASS_NAMES = ("cells", "blood_vessel", "glomerulus")  # category ids 1, 2, 3
DESCRIPTION = "rfdetr demo data"  # in "info": tells an earlier demo from somebody's own folder
EMPTY_EVERY = 25  # one image in so many shows no object
HAEMATOXYLIN = np.array((0.65, 0.70, 0.29))  # how much each dye absorbs of R, G, B
EOSIN = np.array((0.08, 0.92, 0.36))
PAS = np.array((0.22, 0.96, 0.14))


class Shape(NamedTuple):
    """An object in a window (h, w) of its own."""

    # (n, 2) x, y in pixels from the window's corner; so dense that clamping it to the image clips
    polygon: np.ndarray
    depth: np.ndarray  # (h, w) pixels from each pixel's centre to the outline, negative outside
    dyes: np.ndarray  # (h, w, 2)


# ---------------------------------------------------------------- objects


def make_cell(rng: np.random.Generator, unit: float) -> Shape:
    """A round cell: a rim of pink cytoplasm around a dark nucleus with clumped chromatin."""
    radius = unit * rng.uniform(6.5, 10.5)
    polygon, depth = roundish(rng, radius, wobble=0.5, vertices=32)
    nucleus = soft_step(depth - rng.uniform(0.22, 0.36) * radius)
    clumps = smooth_noise(rng, depth.shape, bumps=9)
    chromatin = 1.3 + 0.55 * clumps + 0.3 * (depth < 0.45 * radius)
    membrane = depth < 1.2 * unit
    blue = 0.12 + 0.2 * membrane + nucleus * chromatin * rng.uniform(0.8, 1.1)
    pink = 0.75 - 0.4 * nucleus
    return Shape(polygon, depth, np.stack([blue, pink], axis=-1))


def make_vessel(rng: np.random.Generator, unit: float) -> Shape:
    """A bent tube: muscle layers with flat nuclei around a pale lumen, some with blood in it."""
    radius = unit * rng.uniform(8, 12)
    polygon, depth = bent_tube(rng, unit * rng.uniform(34, 64), radius)
    thickness = radius * rng.uniform(0.42, 0.52)
    lumen = soft_step(depth - thickness)
    spots = polygon[rng.integers(0, len(polygon), 14)] + rng.normal(0, 0.12 * radius, (14, 2))
    nearest = distances_to(spots, depth.shape).min(axis=0)
    nuclei = soft_step(1.6 * unit - nearest) * (depth > 0.8 * unit)
    lining = np.exp(-(((depth - thickness + unit) / unit) ** 2))
    layers = np.cos(depth * 2 * np.pi / (2.6 * unit))
    muscle = 1.05 + 0.22 * layers + 0.2 * smooth_noise(rng, depth.shape, bumps=8)
    clots = smooth_noise(rng, depth.shape, bumps=12) > 0.45
    blood = 0.9 * clots * (rng.uniform() < 0.6)
    blue = (0.15 + 0.9 * nuclei + 0.55 * lining) * (1 - lumen)
    pink = muscle * (1 - lumen) + (0.06 + blood) * lumen
    return Shape(polygon, depth, np.stack([blue, pink], axis=-1))


def make_glomerulus(rng: np.random.Generator, unit: float) -> Shape:
    """A large disc: thin capsule, pale Bowman's space, and a lobed tuft dotted with nuclei."""
    radius = unit * rng.uniform(24, 34)
    polygon, depth = roundish(rng, radius, wobble=0.4, vertices=64)
    lobes = unit * (6 + 1.5 * smooth_noise(rng, depth.shape, bumps=5))
    tuft = soft_step(depth - lobes, 1.5 * unit)
    spread = rng.uniform(0, 1, (46, 1)) ** 0.5 * (radius - 7 * unit)
    spots = polygon.mean(axis=0) + spread * direction(rng.uniform(0, FULL_TURN, 46))
    distances = distances_to(spots, depth.shape)
    # pale between the capillary loops, around the first spots; nuclei on the others
    gaps = np.clip(distances[:18].min(axis=0) / (6 * unit), 0, 1) ** 2
    nuclei = soft_step(2.1 * unit - distances[18:].min(axis=0))
    capsule = soft_step(1.8 * unit - depth)
    blue = tuft * (0.25 + 1.35 * nuclei) + 0.5 * capsule
    texture = 0.2 * smooth_noise(rng, depth.shape, bumps=14)
    pink = tuft * (0.95 - 0.55 * gaps + texture) + 0.8 * capsule + 0.04
    return Shape(polygon, depth, np.stack([blue, pink], axis=-1))


# ---------------------------------------------------------------- images


def make_stroma(rng: np.random.Generator, size: int, unit: float) -> np.ndarray:
    """Background (size, size, 2): noise, wavy bundles, and distractors: fibres and thin nuclei."""
    coarse, middle, fine = (smooth_noise(rng, (size, size), bumps) for bumps in (4, 9, 22))
    cloud = coarse * 0.5 + middle * 0.3 + fine * 0.2
    y, x = np.mgrid[:size, :size].astype(np.float32) / np.float32(unit)
    turn = rng.uniform(0, np.pi)
    across = x * math.cos(turn) + y * math.sin(turn)
    bundles = np.sin(across / rng.uniform(1.8, 2.6) + 5 * coarse + 2.5 * middle)
    thin_nuclei, fibres = draw_fibres(rng, size, unit, turn)
    blue = 0.05 + 0.05 * cloud + 0.9 * thin_nuclei
    pink = 0.34 + 0.2 * cloud + 0.09 * bundles * fine + 0.03 * bundles + 0.4 * fibres
    return np.clip(np.stack([blue, pink], axis=-1), 0, None)


def draw_fibres(
    rng: np.random.Generator, size: int, unit: float, turn: float
) -> tuple[np.ndarray, np.ndarray]:
    """(thin nuclei, fibres), each (size, size) in 0..1: lines about along the bundles."""
    # drawn at twice the size, which makes their edges smooth
    layers = [Image.new("L", (2 * size, 2 * size)) for _ in range(2)]
    for index in range(int(rng.integers(14, 30))):
        is_fibre = index % 2
        heading = turn + np.pi / 2 + rng.normal(0, 0.5) + np.cumsum(rng.normal(0, 0.12, 12))
        length = unit * (rng.uniform(40, 110) if is_fibre else rng.uniform(7, 11))
        start = rng.uniform(-0.2, 2, 2) * size
        path = np.cumsum(direction(heading), axis=0) * (length / 6) + start
        shade = int(rng.uniform(60, 160))
        width = round(unit * rng.uniform(2, 6))
        ImageDraw.Draw(layers[is_fibre]).line(path.ravel().tolist(), shade, width)
    thin_nuclei, fibres = (np.asarray(layer.reduce(2), np.float32) / 255 for layer in layers)
    return thin_nuclei, fibres


def lay(
    rng: np.random.Generator, canvas: np.ndarray, masks: list[np.ndarray], shape: Shape, unit: float
) -> np.ndarray | None:
    """Paint a shape on a canvas (size, size, 2) and add its mask to those of the other objects.

    Returns its polygon in the image, or None where there is no room.
    """
    size = len(canvas)
    place = find_place(rng, size, masks, shape.depth > 0)
    if place is None:
        return None
    paint(canvas[place.there], shape.depth[place.here][..., None], shape.dyes[place.here], unit)
    return np.clip(shape.polygon + place.corner, 0, size).round(2)


def paint(canvas: np.ndarray, depth: np.ndarray, dyes: np.ndarray, unit: float) -> None:
    """Paint dyes (h, w, 2) on a part of the canvas, down to the outline of depth (h, w, 1)."""
    # fixed tissue shrinks: a pale cleft is around it
    canvas *= 1 - 0.45 * np.exp(-((depth / (1.5 * unit)) ** 2))
    canvas += soft_step(depth) * (dyes - canvas)


def render(rng: np.random.Generator, size: int, empty: bool) -> tuple[Image.Image, list[dict]]:
    """One image and its objects' COCO annotations without ids, the lowest object first."""
    unit = size / 192
    annotations = []
    masks: list[np.ndarray] = []
    canvas = make_stroma(rng, size, unit)
    counts = (0, 0, 0) if empty else rng.integers((0, 1, 3), (3, 4, 9))
    makers: tuple[Callable, ...] = (make_glomerulus, make_vessel, make_cell)
    for category_id, make, count in zip((3, 2, 1), makers, counts, strict=True):
        for shape in [make(rng, unit) for _ in range(count)]:
            polygon = lay(rng, canvas, masks, shape, unit)
            if polygon is not None:
                annotations.append(describe_object(category_id, polygon))
    return stain(rng, canvas, unit), annotations


def stain(rng: np.random.Generator, canvas: np.ndarray, unit: float) -> Image.Image:
    """The light that passes a canvas (size, size, 2) of dyes, out of focus, uneven and noisy."""
    size = len(canvas)
    counterstain = EOSIN + rng.uniform() * (PAS - EOSIN)  # H&E pink to PAS magenta
    strength = rng.uniform(0.85, 1.2, (2, 1))
    shift = rng.uniform(0.93, 1.07, (2, 3))
    dyes = np.stack([HAEMATOXYLIN, counterstain]) * strength * shift
    blur = unit * rng.uniform(0.45, 0.85)
    canvas = gaussian_filter(canvas, (blur, blur, 0))
    passed = np.exp(-canvas.reshape(-1, 2) @ dyes.astype(np.float32)).reshape(size, size, 3)
    white = rng.uniform(236, 250, 3).astype(np.float32)
    light = white * (1 + 0.03 * smooth_noise(rng, (size, size), bumps=1)[..., None])
    noise = rng.standard_normal((size, size, 3), np.float32)
    grain = noise * np.float32(rng.uniform(1.5, 4))
    pixels = np.clip(light * passed + grain + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


# ---------------------------------------------------------------- datasets


class Kind(NamedTuple):
    """What a dataset shows."""

    # (random generator, side in pixels, whether it shows no object) -> image and annotations
    render: Callable[[np.random.Generator, int, bool], tuple[Image.Image, list[dict]]]
    class_names: tuple[str, ...]  # of category ids 1, 2 ...
    supercategory: str


KINDS = {
    "tissue": Kind(render, CLASS_NAMES, "tissue"),
    "thin": Kind(render_thin, THIN_NAMES, "thin"),
    "hard": Kind(render_hard, HARD_NAMES, "hard"),
    "longtail": Kind(render_longtail, LONGTAIL_NAMES, "longtail"),
}


def make_demo(
    out: Path,
    train: int = 200,
    valid: int = 50,
    test: int = 0,
    size: int = 192,
    seed: int = 0,
    kind: str = "tissue",
) -> None:
    """Write OUT/{train,valid,test}/_annotations.coco.json and so many size x size PNGs beside each.

    Polygons are whole where another object covers them, and clipped to the image. An earlier demo
    is replaced; UserError where the folder holds anything else.
    """
    out = Path(out)
    remove_earlier_demo(out)
    for number_of_split, (split, count) in enumerate(zip(SPLITS, (train, valid, test))):
        if count:
            write_split(out / split, count, size, [seed, number_of_split], KINDS[kind])


def write_split(folder: Path, count: int, size: int, seed: list[int], kind: Kind) -> None:
    """Write one split of so many images; `seed` and an image's number decide what it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    annotations = []
    for index in range(count):
        rng = np.random.default_rng([*seed, index])
        image, objects = kind.render(rng, size, index % EMPTY_EVERY == 5)
        name = f"demo_{index:05d}.png"
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for entry in objects:
            ids = {"id": len(annotations) + 1, "image_id": index + 1}
            annotations.append(ids | entry)
        # zlib's run-length mode: with this grain smaller and faster than the default
        image.save(folder / name, compress_type=3)
    content = {
        "info": {"description": DESCRIPTION},
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": category_id, "name": name, "supercategory": kind.supercategory}
            for category_id, name in enumerate(kind.class_names, start=1)
        ],
    }
    (folder / ANNOTATIONS).write_text(json.dumps(content), encoding="utf-8")


def remove_earlier_demo(out: Path) -> None:
    """Remove an earlier demo, finished or not, from `out`.

    Raises UserError, removing nothing, where the folder holds anything else.
    """
    folders = [out / split for split in SPLITS]
    paths = []
    if out.is_dir():
        paths = list(out.rglob("*"))
    elif out.exists():
        paths = [out]
    for path in paths:
        if path in folders or path.name.startswith(".") or is_demo_file(path, folders):
            continue
        raise UserError(
            f"{path} is in the way: {out} is neither empty nor an earlier demo. "
            "Name another folder."
        )
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def is_demo_file(path: Path, folders: list[Path]) -> bool:
    if path.parent not in folders:
        return False
    if path.name == ANNOTATIONS:
        return DESCRIPTION.encode() in path.read_bytes()[:100]
    return re.fullmatch(r"demo_\d{5,}\.png", path.name) is not None


def within(low: int, high: int = MOST) -> Callable[[str], int]:
    """An argparse type: a whole number in the range."""
    read = number(int, low, high)

    def parse(text: str) -> int:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def main(argv: list[str] | None = None) -> None:
    parser = Parser("OUT ", prog="-m rfdetr.data.demo", description="Write a generated dataset.")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="a new or empty folder, or an earlier demo to replace"
    )
    for split, least, default in (("train", 1, 200), ("valid", 0, 50), ("test", 0, 0)):
        parser.add_argument(
            f"--{split}",
            type=within(least),
            default=default,
            help="number of images (default: %(default)s)",
        )
    parser.add_argument(
        "--size",
        type=within(64, 2048),
        default=192,
        help="side of the images in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=within(0), default=0, help="other images for each (default: %(default)s)"
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="tissue",
        help="tissue; to measure masks: thin (rods and blobs), hard (textures on textures); to "
        "measure rare classes: longtail (two common and two rare ones) (default: %(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    try:
        make_demo(args.out, args.train, args.valid, args.test, args.size, args.seed, args.kind)
    except OSError as error:
        raise UserError(f"Cannot write to {args.out} ({error}). Name another folder.") from error
    tick(f"Wrote {args.train} train, {args.valid} valid and {args.test} test images to {args.out}")
    print(
        "Next:",
        command_line("python", "validate_setup.py", "--dataset", args.out, "--size", "tiny"),
    )


if __name__ == "__main__":
    run_script(main)
