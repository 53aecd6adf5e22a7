"""Damaged bytes, JSON, RLEs, polygons and images, made from a `random.Random` alone."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import math
import random
import re
import struct
import zlib

from PIL import Image
from pycocotools import mask

SIDE = 64


# at the limits of what types, files and C libraries hold
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 300, 2**31, 2**53, 2**63, 10**30, 10**400, -0.0, 0.5),
    *(1e-320, 1e7, 1e300, math.nan, math.inf, -math.inf, "", "x", "1", "é血", "\ud800", "../.."),
    *("/etc/passwd", "C:\\x", "a\nb\n\nc", "\x1b[2J", "x" * 5000, [], {}, [[]], [None], {"id": 1}),
    *([1, 2, 3, 4], [0.5] * 6, ["1"] * 4, [math.nan] * 4, [1e300] * 6, list(range(5000))),
]


def damage_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Cut, flipped, overwritten, with something before or behind, or something else altogether."""
    at = rng.randrange(len(raw) + 1)
    length = rng.choice([1, 2, 8, 100, 5000])
    way = rng.randrange(9)
    if way == 0:
        return raw[:at]
    if way == 1:
        flipped = bytearray(raw)
        for _ in range(rng.choice([1, 1, 3, 30])):
            flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if way == 2:
        return raw[:at] + rng.randbytes(length) + raw[at + length :]
    if way == 3:
        return raw[:at] + raw[at + length :]
    if way == 4:
        return raw[:at] + raw[max(0, at - length) : at] * 3 + raw[at:]
    if way == 5:
        return bytes([rng.choice([0, 10, 32, 255])]) * length + raw
    if way == 6:
        return raw + rng.randbytes(length)
    if way == 7:
        return raw[:at] + bytes(len(raw) - at)
    return rng.choice(
        [
            b"",
            b"\0",
            b"\0" * 4096,
            rng.randbytes(300),
            b"<html>404</html>",
            b"version https://git-lfs",
        ]
    )


def places(value: object, prefix: tuple = ()) -> list[tuple]:
    """The paths of everything inside nested lists and dicts, 50 deep."""
    if len(prefix) == 50:
        return []
    items = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    paths = []
    for key, inner in items:
        path = (*prefix, key)
        paths.append(path)
        paths += places(inner, path)
    return paths


def inside(data: dict | list, path: list) -> dict | list:
    """What lies at a path of keys and indices."""
    for key in path:
        data = data[key]
    return data


def damage_values(rng: random.Random, data: dict | list, values: list = VALUES) -> None:
    """Replace, remove, repeat or move some of what is in there, in place."""
    for _ in range(rng.choice([1, 1, 1, 2, 4, 10])):
        paths = places(data)
        if not paths:
            return
        # the tables and fields as often as the many numbers of polygons
        depth = rng.choice(sorted({len(path) for path in paths}))
        *way, key = rng.choice([path for path in paths if len(path) == depth])
        parent = inside(data, way)
        action = rng.randrange(6)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, list):
            parent[key:key] = [copy.deepcopy(parent[key]) for _ in range(rng.choice([1, 2, 300]))]
        elif action == 2:
            *way, other_key = rng.choice(paths)
            # it may lie inside what this very action has moved
            with contextlib.suppress(KeyError, IndexError, TypeError):
                parent[key] = copy.deepcopy(inside(data, way)[other_key])
        elif action == 3 and type(parent[key]) in (int, float):
            parent[key] *= rng.choice([-1, 0, 1e6, 0.001, 10**9])
            parent[key] += rng.choice([0, 0.5, 1])
        elif action == 4 and isinstance(parent, dict) and isinstance(key, str):
            parent[rng.choice([key.upper(), key + "s", "", "id"])] = parent.pop(key)
        else:
            # a copy, so that the next case finds the values unchanged
            parent[key] = copy.deepcopy(rng.choice(values))


ODD_NUMBERS = ["9" * 4000, "9" * 5000, "1e999", "-1e999", "1E-999", "NaN", "-Infinity", "01", "1."]
ODD_NUMBERS += ["0x10"]
KEYS = ["images", "annotations", "categories", "bbox", "id", "segmentation", "width"]


def damaged_json(rng: random.Random, document: dict) -> bytes:
    """The bytes of an annotation file with damage that JSON itself can have.

    Wrong encodings, endless nesting, repeated keys, numbers beyond all types.
    """
    text = json.dumps(document)
    way = rng.randrange(8)
    if way == 0:
        return text.encode(rng.choice(["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp037"]))
    if way == 1:
        renamed = text.replace("cells", "Gefäß")
        return renamed.encode(rng.choice(["latin-1", "utf-8", "utf-16"]))
    if way == 2:
        return deeply_nested(rng, text)
    if way == 3:
        key = rng.choice(KEYS)
        value = rng.choice(["1", "[]", "null", "{}"])
        return text.replace(f'"{key}":', f'"{key}": {value}, "{key}":').encode()
    if way == 4:
        number = rng.choice(ODD_NUMBERS)
        numbers = list(re.finditer(r"-?\d+(\.\d+)?", text))
        chosen = rng.choice(numbers)
        return (text[: chosen.start()] + number + text[chosen.end() :]).encode()
    if way == 5:
        old = rng.choice([": ", ", ", "{", "]"])
        new = rng.choice(["", "\r\n", "\0", "//x\n", ",,"])
        return text.replace(old, new).encode()
    return damage_bytes(rng, text.encode())


def deeply_nested(rng: random.Random, text: str) -> bytes:
    depth = rng.choice([50, 3000, 200_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    core = rng.choice(["1", ""])
    nested = opening * depth + core + closing * rng.choice([depth, depth - 1, 0])
    start = '"annotations": ['
    return text.replace(start, f"{start}{nested},", rng.choice([0, 1])).encode()


def some_rle(rng: random.Random, height: int, width: int) -> object:
    """An RLE, sound or damaged: text, runs, size."""
    runs = []
    left = height * width
    while left and len(runs) < 400:
        runs.append(rng.randint(0, max(1, min(left, rng.choice([3, 50, left])))))
        left -= runs[-1]
    runs.append(left)
    size: object = [height, width]
    counts: object = runs
    way = rng.randrange(12)
    if way < 4:
        counts = mask.frPyObjects({"size": size, "counts": runs}, height, width)["counts"].decode()
        if way == 0:
            counts = damage_bytes(rng, counts.encode()).decode("latin-1")
        elif way == 1:
            counts = "".join(chr(rng.randint(48, 111)) for _ in range(rng.choice([1, 5, 50, 5000])))
        elif way == 2:
            at = rng.randrange(len(counts) + 1)
            counts = (
                counts[:at]
                + rng.choice(["o" * 7, "P" * 40, "0", "\0", "é", " ", "oooooo0"])
                + counts[at:]
            )
    elif way == 4:
        counts = [rng.choice([-1, 1]) * run for run in runs]
    elif way == 5:
        counts = [rng.choice([run, float(run), str(run), True, None, [run]]) for run in runs]
    elif way == 6:
        size = [10**9, 10**9]
        counts = [10**18]
    elif way == 7:
        counts = [2**32 + height * width, -(2**32)]
    elif way == 8:
        counts = [0] * rng.choice([1, 100_000]) + [height * width]
    elif way == 9:
        size = rng.choice(
            [
                [width + 1, height],
                [height],
                [0, 0],
                [-height, -width],
                None,
                "64",
                [height, width, 3],
            ]
        )
    elif way == 10:
        counts = copy.deepcopy(rng.choice(VALUES))
    return {"size": size, "counts": counts}


def some_polygons(rng: random.Random, height: int, width: int) -> object:
    """Polygons, sound or not: odd, short, far away, endless, no numbers, wrongly nested."""

    def points(count: int, low: float = -0.2, high: float = 1.2) -> list[float]:
        return [rng.uniform(low, high) * side for _ in range(count) for side in (width, height)]

    way = rng.randrange(12)
    if way == 0:
        return [points(rng.choice([3, 4, 50])) for _ in range(rng.choice([1, 2, 30]))]
    if way == 1:
        return [points(rng.randint(0, 4))[: rng.randint(0, 8)]]
    if way == 2:
        polygon = points(6)
        polygon[rng.randrange(12)] = rng.choice([v for v in VALUES if type(v) is not list])
        return [polygon, points(3)]
    if way == 3:
        return [points(rng.choice([3000, 20_000]))]
    if way == 4:
        return rng.choice(
            [
                points(4),
                [[points(4)]],
                [points(4), 5],
                [points(4), some_rle(rng, height, width)],
                {"0": 1},
            ]
        )
    if way == 5:
        return [points(4, -rng.choice([1, 1.9, 10, 1e4, 1e6]), rng.choice([1, 1.9, 10, 1e4, 1e6]))]
    if way == 6:
        return [[rng.uniform(0, width), rng.uniform(0, height)] * rng.choice([3, 100])]
    if way == 7:
        return [[float(rng.randint(0, 2) * width // 2) for _ in range(8)]]
    if way == 8:
        return [points(3, 0, 1e-9), points(3, 1 - 1e-9, 1)]
    if way == 9:
        return [points(3)] * rng.choice([2000, 5000])
    if way == 10:
        return [[int(value) for value in points(5)], [True] * 6]
    return copy.deepcopy(rng.choice(VALUES))


def damaged_image(rng: random.Random, raw: bytes) -> tuple[bytes, str]:
    """(bytes, suffix) of an image file: cut, of another kind, of absurd size, in any mode."""
    suffix = rng.choice([".png", ".png", ".jpg", ".gif", ".tif", ".webp", ".bmp"])
    way = rng.randrange(8)
    if way == 0:
        return raw[: rng.randrange(len(raw))], ".png"
    if way == 1:
        sides = rng.choice(
            [
                (10**9, 10**9),
                (2**31 - 1, 1),
                (0, 0),
                (1, 178_000_000),
                (13_000, 13_000),
                (65, 64),
                (0, 9),
            ]
        )
        header = struct.pack(
            ">IIBBBBB", *sides, rng.choice([8, 16, 1]), rng.choice([0, 2, 3, 6]), 0, 0, 0
        )
        chunk = b"IHDR" + header
        return raw[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + raw[33:], ".png"
    if way == 2:
        return gzip.compress(raw), ".png"
    if way == 3:
        text = rng.choice(
            [
                b"",
                b"\0" * 500,
                b"<svg/>",
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
                b"%PDF",
            ]
        )
        return text, suffix
    mode = rng.choice(["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr"])
    sides = rng.choice([(SIDE, SIDE), (SIDE, SIDE), (1, 1), (1, 500), (20_000, 2), (63, 64)])
    image = Image.new("RGB", sides, (9, 90, 200)).convert("L" if mode == "I;16" else mode)
    out = io.BytesIO()
    image = image.convert("I").convert("I;16") if mode == "I;16" else image
    kinds = {
        ".png": "PNG",
        ".jpg": "JPEG",
        ".gif": "GIF",
        ".tif": "TIFF",
        ".webp": "WEBP",
        ".bmp": "BMP",
    }
    try:
        image.save(out, kinds[suffix])
    except (OSError, ValueError):  # a kind that has not this mode
        image.save(out, "TIFF")
    raw = out.getvalue()
    return (damage_bytes(rng, raw) if way == 4 else raw), rng.choice(
        [suffix, suffix, ".png", ".jpg"]
    )
