"""Generated demo data: histology-like images with cells, blood vessels and glomeruli, in the layout of `dataset/`.

    python -m rfdetr.data.demo dataset_demo

Tissue is painted as amounts of two dyes per pixel, (h, w, 2): blue for nuclei, pink for the rest. They absorb light as
on a stained slide (Beer-Lambert; vectors after Ruifrok & Johnston 2001). Image i of a split depends on (seed, split, i,
size) alone, so the first images are the same whatever the counts. Lengths are in `unit`s, pixels of a 192-pixel image.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from rfdetr.console import UserError, number, run_script, tick

CLASS_NAMES = ("cells", "blood_vessel", "glomerulus")  # category ids 1, 2, 3
SPLITS = ("train", "valid", "test")
ANNOTATIONS = "_annotations.coco.json"
DESCRIPTION = "rfdetr demo data"  # in "info": tells an earlier demo from somebody's own folder
MAX_OVERLAP, MIN_INSIDE = (
    0.3,
    0.8,
)  # of the smaller object of a pair; of an object, not cut off by the image's border
HAEMATOXYLIN, EOSIN, PAS = np.array(
    [(0.65, 0.70, 0.29), (0.08, 0.92, 0.36), (0.22, 0.96, 0.14)]
)  # of R, G, B
MARGIN = 4  # pixels around an object in its window, for the pale cleft beside it

# An object in a window of its own: polygon (n, 2) x, y in pixels from the window's corner, dense enough to be clipped
# by clamping; depth (h, w) of each pixel's centre below the outline in pixels, negative outside; dyes (h, w, 2).
Shape = tuple[np.ndarray, np.ndarray, np.ndarray]


def _noise(rng: np.random.Generator, shape: tuple[int, int], bumps: int) -> np.ndarray:
    """Smooth noise (h, w) in about -1..1: a coarse random grid, enlarged."""
    grid = Image.fromarray(rng.uniform(-1, 1, (bumps + 1, bumps + 1)).astype(np.float32))
    return np.asarray(grid.resize(shape[::-1], Image.Resampling.BICUBIC))


def _ramp(value: np.ndarray, width: float = 1.0) -> np.ndarray:
    """0 where value is negative, 1 where positive, and an antialiased edge `width` pixels wide between."""
    return np.clip(value / width + 0.5, 0, 1)


def _direction(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _distances(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Distances (n, h, w) from points (n, 2) to the pixels' centres."""
    points = points.astype(np.float32)[..., None]
    x, y = (np.arange(extent, dtype=np.float32) + 0.5 for extent in shape[::-1])
    return np.sqrt(((x - points[:, 0]) ** 2)[:, None, :] + ((y - points[:, 1]) ** 2)[:, :, None])


def _disc(
    rng: np.random.Generator, radius: float, wobble: float, vertices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Outline (vertices, 2) and depth (h, w) of a roundish object."""
    waves = [
        (wobble * rng.uniform(-1, 1) / k**2, k, rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5)
    ]

    def edge(angle: np.ndarray) -> np.ndarray:
        return radius * (1 + sum(height * np.cos(k * angle + phase) for height, k, phase in waves))

    angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    outline = edge(angle)[:, None] * _direction(angle)
    centre = math.ceil(np.abs(outline).max()) + MARGIN + rng.uniform(0, 1, 2).astype(np.float32)
    y, x = np.mgrid[: int(2 * centre.max()), : int(2 * centre.max())].astype(np.float32) + 0.5
    x, y = x - centre[0], y - centre[1]
    return outline + centre, edge(np.arctan2(y, x)) - np.sqrt(x * x + y * y)


def _tube(rng: np.random.Generator, length: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Outline (n, 2) and depth (h, w) of a bent tube with round ends: the union of discs along a curved line."""
    along = np.linspace(-0.5, 0.5, 33)
    curl = min(
        3.0, 0.75 * length / radius
    )  # radians along the tube, few enough that its sides do not cross
    heading = rng.uniform(0, 2 * np.pi) + rng.uniform(-0.65, 0.65) * curl * along
    heading += (
        rng.uniform(0, 0.35) * curl / (2 * np.pi) * np.sin(2 * np.pi * (along + rng.uniform()))
    )
    line = np.cumsum(_direction(heading), axis=0) * length / 32
    radii = radius * (
        1 + 0.12 * np.sin(2 * np.pi * (along * rng.uniform(0.7, 1.5) + rng.uniform()))
    )
    quarter, cap, index = np.pi / 2, np.linspace(-np.pi / 2, np.pi / 2, 9), np.arange(33)
    angle = np.concatenate(
        [heading - quarter, heading[-1] + cap, heading[::-1] + quarter, heading[0] + np.pi + cap]
    )
    at = np.concatenate([index, np.full(9, 32), index[::-1], np.zeros(9, int)])
    outline = line[at] + radii[at, None] * _direction(angle)
    origin = outline.min(axis=0) - MARGIN - rng.uniform(0, 1, 2)
    width, height = np.ceil(outline.max(axis=0) - origin).astype(int) + MARGIN
    distances = _distances(line - origin, (height, width))
    return outline - origin, (radii.astype(np.float32)[:, None, None] - distances).max(axis=0)


def _cell(rng: np.random.Generator, unit: float) -> Shape:
    """A round cell: a rim of pink cytoplasm around a dark nucleus with clumped chromatin."""
    radius = unit * rng.uniform(6.5, 10.5)
    polygon, depth = _disc(rng, radius, 0.5, 32)
    nucleus = _ramp(depth - rng.uniform(0.22, 0.36) * radius)
    chromatin = 1.3 + 0.55 * _noise(rng, depth.shape, 9) + 0.3 * (depth < 0.45 * radius)
    blue = 0.12 + 0.2 * (depth < 1.2 * unit) + nucleus * chromatin * rng.uniform(0.8, 1.1)
    return polygon, depth, np.stack([blue, 0.75 - 0.4 * nucleus], axis=-1)


def _vessel(rng: np.random.Generator, unit: float) -> Shape:
    """A bent tube: a wall of muscle layers with flat nuclei around a pale lumen, some with blood in it."""
    radius = unit * rng.uniform(8, 12)
    polygon, depth = _tube(rng, unit * rng.uniform(34, 64), radius)
    thickness = radius * rng.uniform(0.42, 0.52)
    lumen = _ramp(depth - thickness)
    nuclei = polygon[rng.integers(0, len(polygon), 14)] + rng.normal(0, 0.12 * radius, (14, 2))
    nuclei = _ramp(1.6 * unit - _distances(nuclei, depth.shape).min(axis=0)) * (depth > 0.8 * unit)
    lining = np.exp(-(((depth - thickness + unit) / unit) ** 2))
    muscle = (
        1.05 + 0.22 * np.cos(depth * 2 * np.pi / (2.6 * unit)) + 0.2 * _noise(rng, depth.shape, 8)
    )
    blood = 0.9 * (_noise(rng, depth.shape, 12) > 0.45) * (rng.uniform() < 0.6)
    blue, pink = (
        (0.15 + 0.9 * nuclei + 0.55 * lining) * (1 - lumen),
        muscle * (1 - lumen) + (0.06 + blood) * lumen,
    )
    return polygon, depth, np.stack([blue, pink], axis=-1)


def _glomerulus(rng: np.random.Generator, unit: float) -> Shape:
    """A large disc: thin capsule, pale Bowman's space, and a lobed tuft dotted with nuclei."""
    radius = unit * rng.uniform(24, 34)
    polygon, depth = _disc(rng, radius, 0.4, 64)
    tuft = _ramp(depth - unit * (6 + 1.5 * _noise(rng, depth.shape, 5)), 1.5 * unit)
    spread = rng.uniform(0, 1, (46, 1)) ** 0.5 * (radius - 7 * unit)
    spots = polygon.mean(axis=0) + spread * _direction(rng.uniform(0, 2 * np.pi, 46))
    distances = _distances(spots, depth.shape)
    gaps = (
        np.clip(distances[:18].min(axis=0) / (6 * unit), 0, 1) ** 2
    )  # pale, between the capillary loops
    dots, capsule = _ramp(2.1 * unit - distances[18:].min(axis=0)), _ramp(1.8 * unit - depth)
    blue = tuft * (0.25 + 1.35 * dots) + 0.5 * capsule
    pink = tuft * (0.95 - 0.55 * gaps + 0.2 * _noise(rng, depth.shape, 14)) + 0.8 * capsule + 0.04
    return polygon, depth, np.stack([blue, pink], axis=-1)


def _stroma(rng: np.random.Generator, size: int, unit: float) -> np.ndarray:
    """Background (size, size, 2): three octaves of noise, wavy bundles, and distractors: fibres and thin nuclei."""
    octaves = [_noise(rng, (size, size), bumps) for bumps in (4, 9, 22)]
    cloud = octaves[0] * 0.5 + octaves[1] * 0.3 + octaves[2] * 0.2
    y, x = np.mgrid[:size, :size].astype(np.float32) / np.float32(unit)
    turn = rng.uniform(0, np.pi)
    across = x * math.cos(turn) + y * math.sin(turn)
    bundles = np.sin(across / rng.uniform(1.8, 2.6) + 5 * octaves[0] + 2.5 * octaves[1])
    layers = [
        Image.new("L", (2 * size, 2 * size)) for _ in range(2)
    ]  # thin nuclei, fibres; drawn at twice the size
    for index in range(int(rng.integers(14, 30))):
        fibre = index % 2
        heading = turn + np.pi / 2 + rng.normal(0, 0.5) + np.cumsum(rng.normal(0, 0.12, 12))
        step = unit * rng.uniform(40, 110) / 6 if fibre else unit * rng.uniform(7, 11) / 6
        path = np.cumsum(_direction(heading), axis=0) * step + rng.uniform(-0.2, 2, 2) * size
        shade, width = int(rng.uniform(60, 160)), round(unit * rng.uniform(2, 6))
        ImageDraw.Draw(layers[fibre]).line(path.ravel().tolist(), shade, width)
    thin, fibres = (np.asarray(layer.reduce(2), np.float32) / 255 for layer in layers)
    pink = 0.34 + 0.2 * cloud + 0.09 * bundles * octaves[2] + 0.03 * bundles + 0.4 * fibres
    return np.clip(np.stack([0.05 + 0.05 * cloud + 0.9 * thin, pink], axis=-1), 0, None)


def _lay(
    rng: np.random.Generator, canvas: np.ndarray, masks: list, shape: Shape, unit: float
) -> np.ndarray | None:
    """Paint a shape on canvas (size, size, 2) where there is room; adds its mask, gives its polygon in the image."""
    polygon, depth, dyes = shape
    size, inside, pixels = len(canvas), depth > 0, np.count_nonzero
    for _ in range(40):
        x, y = (
            int(rng.integers(-extent // 3, size - extent + extent // 3 + 1))
            for extent in inside.shape[::-1]
        )
        there = np.s_[max(y, 0) : y + inside.shape[0], max(x, 0) : x + inside.shape[1]]
        here = np.s_[max(-y, 0) : size - y, max(-x, 0) : size - x]
        part, area = inside[here], pixels(inside[here])
        crowded = any(
            pixels(mask[there] & part) > MAX_OVERLAP * min(area, pixels(mask)) for mask in masks
        )
        if crowded or area < MIN_INSIDE * pixels(inside):
            continue
        masks.append(np.zeros((size, size), bool))
        masks[-1][there] = part
        under, below = canvas[there], depth[here][..., None]
        under *= 1 - 0.45 * np.exp(
            -((below / (1.5 * unit)) ** 2)
        )  # fixed tissue shrinks: a pale cleft around it
        under += _ramp(below) * (dyes[here] - under)
        return np.clip(polygon + (x, y), 0, size).round(2)
    return None


def _render(rng: np.random.Generator, size: int, empty: bool) -> tuple[Image.Image, list[dict]]:
    """One image and its objects' COCO annotations without ids, the lowest first."""
    unit, annotations, masks = size / 192, [], []
    canvas = _stroma(rng, size, unit)
    counts = (0, 0, 0) if empty else rng.integers((0, 1, 3), (3, 4, 9))
    for category, make, count in zip((3, 2, 1), (_glomerulus, _vessel, _cell), counts, strict=True):
        for shape in [make(rng, unit) for _ in range(count)]:
            polygon = _lay(rng, canvas, masks, shape, unit)
            if polygon is not None:
                x, y = polygon.T
                area = round(float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2), 2)
                box = (
                    np.concatenate([polygon.min(axis=0), np.ptp(polygon, axis=0)]).round(2).tolist()
                )
                row = {"category_id": category, "bbox": box, "area": area, "iscrowd": 0}
                annotations.append(row | {"segmentation": [polygon.ravel().tolist()]})
    counterstain = EOSIN + rng.uniform() * (PAS - EOSIN)  # H&E pink to PAS magenta
    dyes = (
        np.stack([HAEMATOXYLIN, counterstain])
        * rng.uniform(0.85, 1.2, (2, 1))
        * rng.uniform(0.93, 1.07, (2, 3))
    )
    canvas = gaussian_filter(canvas, (*[unit * rng.uniform(0.45, 0.85)] * 2, 0))
    passed = np.exp(-canvas.reshape(-1, 2) @ dyes.astype(np.float32)).reshape(size, size, 3)
    light = rng.uniform(236, 250, 3).astype(np.float32) * (
        1 + 0.03 * _noise(rng, (size, size), 1)[..., None]
    )
    grain = rng.standard_normal((size, size, 3), np.float32) * np.float32(rng.uniform(1.5, 4))
    return Image.fromarray(
        np.clip(light * passed + grain + 0.5, 0, 255).astype(np.uint8)
    ), annotations


def _clear(out: Path) -> None:
    """Remove an earlier demo, finished or not, from `out`.  Raises UserError, removing nothing, for other contents."""
    folders = [out / split for split in SPLITS]
    for path in out.rglob("*") if out.is_dir() else [out] * out.exists():
        ours = path.name == ANNOTATIONS and DESCRIPTION.encode() in path.read_bytes()[:100]
        ours = path.parent in folders and (ours or re.fullmatch(r"demo_\d{5,}\.png", path.name))
        if not (ours or path in folders or path.name.startswith(".")):
            raise UserError(
                f"{path} is in the way: {out} is neither empty nor an earlier demo. Name another folder."
            )
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def make_demo(
    out: Path, train: int = 200, valid: int = 50, test: int = 0, size: int = 192, seed: int = 0
) -> None:
    """Write OUT/{train,valid,test}/_annotations.coco.json and that many size x size PNG images beside each.

    Polygons are whole where another object covers them, and clipped to the image. An earlier demo is replaced;
    UserError where the folder holds anything else.
    """
    _clear(out := Path(out))
    categories = [
        {"id": i, "name": name, "supercategory": "tissue"}
        for i, name in enumerate(CLASS_NAMES, start=1)
    ]
    for which, (split, count) in enumerate(zip(SPLITS, (train, valid, test))):
        table = {
            "info": {"description": DESCRIPTION},
            "images": [],
            "annotations": [],
            "categories": categories,
        }
        for index in range(count):
            rng = np.random.default_rng([seed, which, index])
            image, objects = _render(rng, size, empty=index % 25 == 5)  # one in 25 shows no object
            name, first = f"demo_{index:05d}.png", len(table["annotations"]) + 1
            table["images"].append(
                {"id": index + 1, "file_name": name, "width": size, "height": size}
            )
            table["annotations"] += [
                {"id": i, "image_id": index + 1, **row} for i, row in enumerate(objects, first)
            ]
            (out / split).mkdir(parents=True, exist_ok=True)
            # zlib's run-length mode: with this grain smaller and faster than the default
            image.save(out / split / name, compress_type=3)
        if count:
            (out / split / ANNOTATIONS).write_text(json.dumps(table), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rfdetr.data.demo", description="Write a generated demo dataset."
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="a new or empty folder, or an earlier demo to replace"
    )
    for split, least, default in (("train", 1, 200), ("valid", 0, 50), ("test", 0, 0)):
        parser.add_argument(
            f"--{split}", type=number(int, least), default=default, help="number of images"
        )
    parser.add_argument(
        "--size", type=number(int, 64, 2048), default=192, help="side of the images in pixels"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    try:
        make_demo(args.out, args.train, args.valid, args.test, args.size, args.seed)
    except OSError as error:
        raise UserError(f"Cannot write to {args.out} ({error}). Name another folder.") from error
    tick(f"Wrote {args.train} train, {args.valid} valid and {args.test} test images to {args.out}")
    print(f'Next: python validate_setup.py --dataset "{args.out}"')


if __name__ == "__main__":
    run_script(main)
