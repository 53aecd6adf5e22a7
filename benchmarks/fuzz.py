"""Damaged and hostile input for the scripts: every case has to end in success or in one paragraph and exit status 2.

python benchmarks/fuzz.py --cases 10000 --seed 0
python benchmarks/fuzz.py --cases 1 --seed 0 --first 4711 --kinds checkpoint --keep     (one case again, to look at)
python benchmarks/fuzz.py --evaluation 1200     (instead: random evaluations against pycocotools, fuzz_evaluation.py)

A case is made from (seed, kind, number) alone and runs in this process, through the script's main(argv), in a folder of
its own. No traceback, no "defect of the program", at most 5 s of CPU time and 2 GB of memory, strict JSON in every
file written, nothing changed outside what the command names as output.
"""

# ruff: noqa: E402 (the repository is put on the path first)
from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import functools
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.fuzz_evaluation import run_sets
from rfdetr.classes import assign_rows, coco_table
from rfdetr.console import run_script
from rfdetr.data.demo import CLASS_NAMES, make_demo
from rfdetr.device import memory_mb
from rfdetr.models.detector import Detector
from rfdetr.runs import environment as run_environment
from rfdetr.sizes import SIZES
from rfdetr.weights.official import to_official

SECONDS, MEGABYTES = 5.0, 2048.0
SIDE = 64
SMALL = "--size tiny --resolution 64 --device cpu --workers 0 --batch 1 --accum 2 --min_steps 1 --tensorboard 0".split()
SMALL += ["--fast_dev_run", "1"]
SCRIPTS = (
    "validate_setup", "evaluate", "predict", "shrink_head", "export", "train_detector_stage1", "train_seg_stage2",
    "train_seg_single_stage",
)  # fmt: skip
OUTPUT_FLAGS = (
    "--output",
    "--output_dir",
    "--json",
    "--results",
    "--out",
    "--out_ckpt",
    "--fix",
    "--preview",
)
# at the limits of what types, files and C libraries hold
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 300, 2**31, 2**53, 2**63, 10**30, 10**400, -0.0, 0.5, 1e-320, 1e7, 1e300,
    math.nan, math.inf, -math.inf, "", "x", "1", "é血", "\ud800", "../..", "/etc/passwd", "C:\\x", "a\nb\n\nc",
    "\x1b[2J", "x" * 5000, [], {}, [[]], [None], {"id": 1}, [1, 2, 3, 4], [0.5] * 6, ["1"] * 4, [math.nan] * 4,
    [1e300] * 6, list(range(5000)),
]  # fmt: skip
WORDS = [
    "", "0", "1", "2", "-1", "1.5", "nan", "inf", "-inf", "1e400", "9" * 400, "9" * 5000, "1000000000000", "100000000",
    "abc", "é血", "\udce9", "x" * 300, "x" * 5000, "a\nb", "/", ".", "..", "~", "*", "[", "**", "--", "-", "auto",
    "none",
    "true", "no", "cpu", "cuda:99", "meta", "mps", "cpu:7", "../data", "../data/train", "there.txt", "nowhere/x/y",
    "there.txt/x", "tiny", "nano", "64", "http://", "http://[", "file:///etc/passwd", "\x1b[2J", "cells", "%s", "{}",
]  # fmt: skip


@dataclass
class Command:
    """What a case runs: a script's name and its words, in the folder `out`."""

    script: str
    argv: list[str] = field(default_factory=list)


class Materials:
    """A sound dataset, checkpoints of every kind and a run, made once; the cases damage copies."""

    def __init__(self, folder: Path):
        self.data, self.run = folder / "data", folder / "run"
        make_demo(self.data, train=3, valid=1, test=1, size=SIDE, seed=2)
        self.documents = {
            name: json.loads(
                (self.data / name / "_annotations.coco.json").read_text(encoding="utf-8")
            )
            for name in ("train", "valid", "test")
        }
        from rfdetr.weights.checkpoint import make_content

        torch.manual_seed(0)
        size, own = SIZES["tiny"], assign_rows(list(CLASS_NAMES), [1, 2, 3], "dataset")

        def content(stage: str, table, head: str | None) -> dict:
            state = Detector(size, table.rows_total, table.background_last, head).state_dict()
            return make_content(stage, size, SIDE, table, head, state) | {"args": {}}

        detector = content("detector", own, None)
        official = to_official(content("detector", coco_table(), None)["model"])
        self.contents = {
            "detector.pt": detector,
            "mask.pt": content("segmentation", own, "nano"),
            "coco91.pt": content(
                "detector", assign_rows(list(CLASS_NAMES), [1, 2, 3], "coco91"), None
            ),
            "official.pth": {"model": official, "args": {"class_names": []}},
            "lightning.ckpt": {
                "state_dict": {f"model.{k}": v for k, v in official.items()},
                "hyper_parameters": {},
            },
        }
        for name, value in self.contents.items():
            torch.save(value, folder / name)
        encoder = "backbone.0.encoder.encoder."
        self.backbone = {
            k.removeprefix(encoder): v.contiguous() for k, v in official.items() if encoder in k
        }
        save_file(self.backbone, folder / "backbone.safetensors")
        self.folder = folder
        words = [
            *SMALL,
            "--dataset",
            str(self.data),
            "--output_dir",
            str(self.run),
            "--pretrain_weights",
            "none",
        ]
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            own_signals(),
        ):
            importlib.import_module("train_detector_stage1").main(words)
        self.state = torch.load(self.run / "last.pt", weights_only=True)


@contextlib.contextmanager
def own_signals():
    """Put back the signal handlers that a script set."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- what is damaged, and how


def damage_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Cut, flipped, overwritten, with something before or behind, or something else altogether."""
    at, length = rng.randrange(len(raw) + 1), rng.choice([1, 2, 8, 100, 5000])
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
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    if len(prefix) == 50:
        return []
    return [
        place for key, inner in items for place in ((*prefix, key), *places(inner, (*prefix, key)))
    ]


def damage_values(rng: random.Random, data: dict | list, values: list = VALUES) -> None:
    """Replace, remove, repeat or move some of what is in there, in place."""
    for _ in range(rng.choice([1, 1, 1, 2, 4, 10])):
        found = places(data)
        if not found:
            return
        # the tables and fields as often as the many numbers of polygons
        depth = rng.choice(sorted({len(place) for place in found}))
        *way, key = rng.choice([place for place in found if len(place) == depth])
        parent = functools.reduce(lambda inner, step: inner[step], way, data)
        action = rng.randrange(6)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, list):
            parent[key:key] = [copy.deepcopy(parent[key]) for _ in range(rng.choice([1, 2, 300]))]
        elif action == 2:
            *way, key_2 = rng.choice(found)
            with contextlib.suppress(
                KeyError, IndexError, TypeError
            ):  # inside what this very action has moved
                other = functools.reduce(lambda inner, step: inner[step], way, data)
                parent[key] = copy.deepcopy(other[key_2])
        elif action == 3 and type(parent[key]) in (int, float):
            parent[key] = parent[key] * rng.choice([-1, 0, 1e6, 0.001, 10**9]) + rng.choice(
                [0, 0.5, 1]
            )
        elif action == 4 and isinstance(parent, dict) and isinstance(key, str):
            parent[rng.choice([key.upper(), key + "s", "", "id"])] = parent.pop(key)
        else:
            parent[key] = copy.deepcopy(
                rng.choice(values)
            )  # the next case finds the values unchanged


def damaged_json(rng: random.Random, document: dict) -> bytes:
    """The bytes of an annotation file: wrong encodings, endless nesting, repeated keys, numbers beyond all types."""
    text = json.dumps(document)
    way = rng.randrange(8)
    if way == 0:
        return text.encode(rng.choice(["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp037"]))
    if way == 1:
        return text.replace("cells", "Gefäß").encode(rng.choice(["latin-1", "utf-8", "utf-16"]))
    if way == 2:
        depth, (open_, close) = (
            rng.choice([50, 3000, 200_000]),
            rng.choice([("[", "]"), ('{"a":', "}")]),
        )
        nested = open_ * depth + rng.choice(["1", ""]) + close * rng.choice([depth, depth - 1, 0])
        return (
            text.replace(
                '"annotations": [', f'"annotations": [{nested},', rng.choice([0, 1])
            ).encode()
            or b"["
        )
    if way == 3:
        key = rng.choice(
            ["images", "annotations", "categories", "bbox", "id", "segmentation", "width"]
        )
        return text.replace(
            f'"{key}":', f'"{key}": {rng.choice(["1", "[]", "null", "{}"])}, "{key}":'
        ).encode()
    if way == 4:
        number = rng.choice(
            [
                "9" * 4000,
                "9" * 5000,
                "1e999",
                "-1e999",
                "1E-999",
                "NaN",
                "-Infinity",
                "01",
                "1.",
                "0x10",
            ]
        )
        numbers = list(re.finditer(r"-?\d+(\.\d+)?", text))
        chosen = rng.choice(numbers)
        return (text[: chosen.start()] + number + text[chosen.end() :]).encode()
    if way == 5:
        return text.replace(
            rng.choice([": ", ", ", "{", "]"]), rng.choice(["", "\r\n", "\0", "//x\n", ",,"])
        ).encode()
    return damage_bytes(rng, text.encode())


def some_rle(rng: random.Random, height: int, width: int) -> object:
    """An RLE, sound or damaged: text, runs, size."""
    runs, left = [], height * width
    while left and len(runs) < 400:
        runs.append(rng.randint(0, max(1, min(left, rng.choice([3, 50, left])))))
        left -= runs[-1]
    runs.append(left)
    size: object = [height, width]
    counts: object = runs
    way = rng.randrange(12)
    if way < 4:
        from pycocotools import mask

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
        size, counts = [10**9, 10**9], [10**18]
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
    """Polygons, sound or not: odd, short, far away, endless, with what is no number, wrongly nested."""

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
    """(bytes, suffix) of an image file: cut, of another kind, of absurd or the least size, in any mode."""
    suffix, way = (
        rng.choice([".png", ".png", ".jpg", ".gif", ".tif", ".webp", ".bmp"]),
        rng.randrange(8),
    )
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
    image, out = (
        Image.new("RGB", sides, (9, 90, 200)).convert("L" if mode == "I;16" else mode),
        io.BytesIO(),
    )
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


class Trap:
    """A pickle that would write a file if it were run."""

    def __reduce__(self):
        return open, ("pwned", "w")


def tensor_values(rng: random.Random) -> list:
    """What may stand in the place of a checkpoint's tensor."""
    return [
        torch.full((3,), math.nan), torch.zeros(0), torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.bool),
        torch.zeros(1).expand(10**9), torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64), [1.0], 3.0,
        torch.zeros(4, dtype=torch.float64), torch.tensor(1.0), torch.zeros(2, 3, device="meta"), "x", None,
    ]  # fmt: skip


def damage_tensors(rng: random.Random, state: dict) -> None:
    """Change some of a state dict's tensors, in place: values, kinds, shapes, names."""
    for name in rng.sample(sorted(state), min(len(state), rng.choice([1, 1, 3, len(state)]))):
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            continue
        way = rng.randrange(9)
        if way == 0:
            state[name] = torch.full_like(tensor, rng.choice([math.nan, math.inf, 1e38, 0.0]))
        elif way == 1:
            state[name] = rng.choice(tensor_values(rng))
        elif way == 2:
            state[name] = tensor.to(
                rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool])
            )
        elif way == 3:
            state[name] = tensor[: len(tensor) // 2] if tensor.dim() else tensor[None]
        elif way == 4:
            state[name] = (
                tensor.flatten()
                if rng.random() < 0.5
                else tensor.mT
                if tensor.dim() > 1
                else tensor[None]
            )
        elif way == 5:
            state[name] = torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)
        elif way == 6:
            del state[name]
        elif way == 7:
            state[rng.choice(["", "x", name + ".weight", "class_embed.3.bias", "a" * 5000])] = (
                state.pop(name)
            )
        else:
            state[name] = tensor * rng.choice([1e30, -1e5, 1e-40])


def damaged_checkpoint(rng: random.Random, base: Materials, name: str) -> bytes:
    """The bytes of a checkpoint file."""
    raw, way, out = (base.folder / name).read_bytes(), rng.randrange(10), io.BytesIO()
    if way < 2:
        return damage_bytes(rng, raw)
    if way == 2:
        harm = rng.choice(
            [
                Trap(),
                {"model": Trap()},
                {"model": {"a": np.zeros(3)}},
                [1],
                "x",
                {1: 2},
                {"model": {}},
                None,
            ]
        )
        protocol = rng.randrange(6)
        harmful = rng.random() < 0.5
        if harmful:
            return pickle.dumps(harm, protocol)
        torch.save(harm, out, _use_new_zipfile_serialization=rng.random() < 0.5)
        return out.getvalue()
    if way == 3:
        with zipfile.ZipFile(
            out, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        ) as archive:
            for member in rng.choice(
                [
                    ["x.txt"],
                    ["a/data.pkl"],
                    ["a/data.pkl", "a/version", "a/data/0"],
                    ["../../x"],
                    [],
                ]
            ):
                archive.writestr(
                    member,
                    rng.choice([b"", pickle.dumps({"model": {}}, 2), b"3\n", rng.randbytes(99)]),
                )
        return out.getvalue()
    content = copy_of(base.contents[name])
    table = next(key for key in ("model", "state_dict") if key in content)
    if way < 7:
        tables = {key: value for key, value in content.items() if key != table}
        values = [*VALUES, *tensor_values(rng)[:-3]]
        if tables and way < 6:
            damage_values(rng, tables, values)
            content = {table: content[table], **tables} if rng.random() < 0.95 else tables
        else:
            content[table] = rng.choice(
                [rng.choice(values), {}, {"x": torch.zeros(2)}, dict.fromkeys(content[table])]
            )
    else:
        damage_tensors(rng, content[table])
    torch.save(content, out, _use_new_zipfile_serialization=rng.random() < 0.9)
    return out.getvalue()


def copy_of(value):
    """Nested dicts and lists anew, with the same tensors."""
    if isinstance(value, dict):
        return {key: copy_of(inner) for key, inner in value.items()}
    return [copy_of(inner) for inner in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------- the kinds of cases


def on_dataset(rng: random.Random, base: Materials) -> Command:
    """Some script that reads the dataset beside the folder it runs in."""
    script = rng.choice(["validate_setup"] * 4 + ["evaluate"] * 2 + list(SCRIPTS[5:]))
    words = ["--dataset", "../data"]
    if script == "validate_setup":
        words += ["--size", "tiny", "--device", "cpu", "--json", "report.json"]
        words += rng.choice(
            [[], ["--check_images", "0"], ["--need_masks", "1"], ["--val_fraction", "0.5"]]
        )
    elif script == "evaluate":
        words += [
            "--checkpoint",
            str(base.folder / rng.choice(["mask.pt", "detector.pt"])),
            "--json",
            "scores.json",
        ]
        words += [
            "--device",
            "cpu",
            "--results",
            "results",
            "--split",
            rng.choice(["train", "valid", "test"]),
        ]
    else:
        words += [*SMALL, "--ema", rng.choice("01"), "--run_test", rng.choice("01")]
        words += (
            ["--checkpoint", str(base.folder / "detector.pt")]
            if script == "train_seg_stage2"
            else []
        )
        words += (
            ["--cache", rng.choice(["ram", "disk", "off"])] if script == "train_seg_stage2" else []
        )
    return Command(script, words)


def annotation_file(data: Path, rng: random.Random) -> tuple[str, Path]:
    split = rng.choice(["train", "train", "train", "valid", "test"])
    return split, data / split / "_annotations.coco.json"


def annotations_case(rng: random.Random, base: Materials, place: Path) -> Command:
    """The bytes of an annotation file, or fields of it."""
    split, file = annotation_file(place / "data", rng)
    document = json.loads(json.dumps(base.documents[split]))
    if rng.random() < 0.3:
        file.write_bytes(damaged_json(rng, document))
    else:
        damage_values(rng, document)
        file.write_text(json.dumps(document), encoding="utf-8")
    return on_dataset(rng, base)


def masks_case(rng: random.Random, base: Materials, place: Path, make: Callable) -> Command:
    """Segmentations of some annotations."""
    split, file = annotation_file(place / "data", rng)
    document = json.loads(json.dumps(base.documents[split]))
    for entry in rng.sample(
        document["annotations"], min(len(document["annotations"]), rng.choice([1, 1, 3]))
    ):
        entry["segmentation"] = make(rng, SIDE, SIDE)
        entry.update(rng.choice([{}, {}, {"iscrowd": 1}, {"area": None}]))
    if rng.random() < 0.1:
        for image in document["images"]:
            image.pop("width")
    file.write_text(json.dumps(document), encoding="utf-8")
    return on_dataset(rng, base)


def rle_case(rng: random.Random, base: Materials, place: Path) -> Command:
    return masks_case(rng, base, place, some_rle)


def polygon_case(rng: random.Random, base: Materials, place: Path) -> Command:
    return masks_case(rng, base, place, some_polygons)


def image_case(rng: random.Random, base: Materials, place: Path) -> Command:
    """Files in the place of images."""
    split, _ = annotation_file(place / "data", rng)
    files = sorted((place / "data" / split).glob("*.[jp]*g"))
    for file in rng.sample(files, rng.choice([1, len(files)])):
        raw, suffix = damaged_image(rng, file.read_bytes())
        file.write_bytes(raw)
        if rng.random() < 0.1:
            file.unlink()
            file.mkdir() if rng.random() < 0.5 else None
        elif suffix != file.suffix and rng.random() < 0.3:
            file.with_suffix(suffix).write_bytes(raw)
    if rng.random() < 0.3:
        words = [
            "--checkpoint",
            str(base.folder / "mask.pt"),
            "--input",
            f"../data/{split}",
            "--output",
            "found",
        ]
        return Command(
            "predict", [*words, "--device", "cpu", "--threshold", rng.choice(["0", "0.02", "0.5"])]
        )
    return on_dataset(rng, base)


def checkpoint_case(rng: random.Random, base: Materials, place: Path) -> Command:
    """A checkpoint, or the state that a run is resumed from."""
    way = rng.randrange(10)
    if way == 0:
        content = copy_of(base.state)
        damage_values(rng, content["training"], [*VALUES, *tensor_values(rng)[:-3]])
        shutil.copytree(base.run, place / "out/run")
        for name in ("last.pt", "checkpoint.pt"):
            torch.save(content, place / "out/run" / name)
        return Command("train_detector_stage1", ["--resume", "run", "--epochs", "2"])
    if way == 1:
        shutil.copytree(base.run, place / "out/run")
        for name in rng.choice(
            [["last.pt"], ["checkpoint.pt"], ["last.pt", "checkpoint.pt", "metrics.json"]]
        ):
            file = place / "out/run" / name
            raw = damage_bytes(rng, file.read_bytes())
            file.unlink()  # both names may be one file
            file.write_bytes(raw)
        return Command("train_detector_stage1", ["--resume", "run", "--epochs", "2"])
    if way == 2:
        raw = damage_bytes(rng, (base.folder / "backbone.safetensors").read_bytes())
        if rng.random() < 0.7:
            state = dict(base.backbone)
            damage_tensors(rng, state)
            out = io.BytesIO()
            torch.save(state, out)
            raw = out.getvalue()
        file = place / "data" / f"given{rng.choice(['.safetensors', '.bin'])}"
        file.write_bytes(raw)
        words = [*SMALL, "--dataset", "../data", "--backbone_weights", str(file), "--ema", "0"]
        return Command("train_detector_stage1", words)
    name = rng.choice(sorted(base.contents))
    (place / "data/given.pt").write_bytes(damaged_checkpoint(rng, base, name))
    script = rng.choice(["evaluate", "predict", "shrink_head", "export", *SCRIPTS[5:]])
    file = ["--checkpoint", "../data/given.pt"]
    return Command(
        script,
        {
            "evaluate": [*file, "--dataset", "../data", "--device", "cpu", "--json", "scores.json"],
            "predict": [
                *file,
                "--input",
                "../data/valid",
                "--output",
                "found",
                "--device",
                "cpu",
                "--threshold",
                "0.02",
            ],
            "shrink_head": ["--in_ckpt", "../data/given.pt", "--out_ckpt", "small.pt"],
            "export": [*file, "--out", "exported.pth"],
            "train_detector_stage1": [
                *SMALL,
                "--dataset",
                "../data",
                "--pretrain_weights",
                file[1],
                "--ema",
                "0",
            ],
            "train_seg_stage2": [
                *SMALL,
                "--dataset",
                "../data",
                *file,
                "--auto_shrink",
                "1",
                "--ema",
                "0",
            ],
            "train_seg_single_stage": [
                *SMALL,
                "--dataset",
                "../data",
                "--init_ckpt",
                file[1],
                "--ema",
                "0",
            ],
        }[script],
    )


@functools.cache
def flags_of(script: str) -> tuple[str, ...]:
    """The flags that --help names, without those that start compilers or whole jobs."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(script).main(["--help"])
    return tuple(sorted(set(re.findall(r"--\w+", said.getvalue())) - {"--compile", "--debug"}))


def command_case(rng: random.Random, base: Materials, place: Path) -> Command:
    """A sound command line with some words replaced, added and removed."""
    (place / "out/there.txt").write_text("there")
    sound = on_dataset(rng, base)
    script = rng.choice(
        [sound.script, *SCRIPTS[2:5], "rfdetr.data.demo", "rfdetr.weights.download"]
    )
    checkpoint = str(base.folder / "mask.pt")
    argv = sound.argv if script == sound.script else {
        "predict": ["--checkpoint", checkpoint, "--input", "../data/valid", "--output", "found", "--device", "cpu"],
        "shrink_head": ["--in_ckpt", checkpoint, "--out_ckpt", "small.pt", "--keep", "cells"],
        "export": ["--checkpoint", checkpoint, "--out", "exported.pth"],
        "rfdetr.data.demo": ["demo", "--train", "1", "--valid", "1", "--test", "1", "--size", "64"],
        "rfdetr.weights.download": ["list"],
    }[script]  # fmt: skip
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, word = rng.randrange(len(argv) + 1), rng.choice(WORDS)
        way = rng.randrange(6)
        if way < 2:
            argv[at : at + 1] = [word]
        elif way < 4:
            argv += [rng.choice(flags_of(script) or ("--x",)), word]
        elif way == 4:
            del argv[at : at + 1]
        else:
            argv.insert(
                at, rng.choice([word, "--no_such_flag", "-x", "--size=", "--dataset=../data"])
            )
    if script.startswith("train") and "--workers" in argv:  # dozens of processes take longer
        argv += ["--workers", rng.choice(["-1", "0", "1e9", "9" * 30])]
    if (
        "--size" in argv and "tiny" not in argv
    ):  # a large model's weights take longer than what is looked for
        argv += ["--size", "tiny"]
    return Command(script, argv)


KINDS: dict[str, Callable[[random.Random, Materials, Path], Command]] = {
    "annotations": annotations_case,
    "rle": rle_case,
    "polygon": polygon_case,
    "image": image_case,
    "checkpoint": checkpoint_case,
    "command": command_case,
}


# ---------------------------------------------------------------- running them


def refuse_network(*_, **__):
    raise urllib.error.URLError("the fuzzer has no network")


class Watchdog(threading.Thread):
    """Interrupts the main thread where a case takes more CPU time than it may; ends the process if it stays stuck."""

    def __init__(self):
        super().__init__(daemon=True)
        self.begin: float | None = None
        self.hung = False
        self.start()

    def run(self) -> None:
        while True:
            time.sleep(0.2)
            begin = self.begin
            if begin is None or time.process_time() - begin < SECONDS:
                continue
            if not self.hung:
                self.hung = True
                faulthandler.dump_traceback(sys.__stderr__)
                signal.raise_signal(signal.SIGINT)
            elif time.process_time() - begin > 12 * SECONDS:
                os._exit(3)  # in C code, which no exception ends


class Fuzzer:
    """A folder with materials in which cases are run one after another."""

    def __init__(self, folder: Path):
        folder = Path(folder).resolve()
        self.folder, self.place = folder, folder / "far/down/case"
        (folder / "base").mkdir(parents=True)
        self.base, self.watchdog = Materials(folder / "base"), Watchdog()
        self.output = functools.cache(run_environment._output)

    @contextlib.contextmanager
    def surroundings(self):
        """No network, the case's folder as the current one, a home and a cache of its own."""
        before, opener, output, environment = (
            Path.cwd(),
            urllib.request.urlopen,
            run_environment._output,
            os.environ.copy(),
        )
        home = str(self.place / "home")
        os.environ.update(
            dict.fromkeys(("HOME", "TORCH_HOME", "XDG_CACHE_HOME", "RFDETR_CACHE"), home)
        )
        urllib.request.urlopen, run_environment._output = (
            refuse_network,
            self.output,
        )  # git is asked once
        os.chdir(self.place / "out")
        try:
            with own_signals():
                yield
        finally:
            os.chdir(before)
            urllib.request.urlopen, run_environment._output = opener, output
            os.environ.clear()
            os.environ.update(environment)

    def case(self, kind: str, number: int, seed: int) -> Command:
        """Make the case's folder; returns its command."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.base.data, self.place / "data")
        (self.place / "out").mkdir()
        rng = random.Random(f"{seed} {kind} {number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return KINDS[kind](rng, self.base, self.place)

    def run(self, kind: str, number: int, seed: int) -> tuple[Command, int, list[str]]:
        """(command, exit status, what was wrong) of one case."""
        command = self.case(kind, number, seed)
        main = importlib.import_module(command.script).main
        before, resident = self.listing(command), memory_mb(torch.device("cpu"))
        given = {path: path.stat().st_mtime_ns for path in (self.place / "out").rglob("*.json")}
        said = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
        streams, argv = (sys.stdout, sys.stderr), sys.argv
        status = 0
        with self.surroundings(), warnings.catch_warnings():
            sys.stdout, sys.stderr = said
            sys.argv = [f"{command.script}.py", *command.argv]
            self.watchdog.hung, self.watchdog.begin = False, time.process_time()
            try:
                run_script(main, command.argv)
            except SystemExit as left:
                status = left.code or 0
            except BaseException as error:  # what run_script lets through is a finding too
                status, problem = 1, f"{type(error).__name__}: {error}"
                print(problem, file=sys.stderr)
            finally:
                self.watchdog.begin = None
                (sys.stdout, sys.stderr), sys.argv = streams, argv
        for stream in said:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in said)
        wrong = self.faults(status, out, err)
        if self.watchdog.hung:
            wrong.append(f"more than {SECONDS} s")
        grown = memory_mb(torch.device("cpu")) - resident
        wrong += [f"{grown:.0f} MB more"] * (grown > MEGABYTES)
        after = self.listing(command)
        changed = sorted(
            str(path)
            for path in before.keys() | after.keys()
            if before.get(path) != after.get(path)
        )
        wrong += [f"changed outside its outputs: {', '.join(changed[:5])}"] * bool(changed)
        return command, status, wrong + self.loose_json(given)

    def faults(self, status: int, out: str, err: str) -> list[str]:
        """What is wrong with the way a script ended and what it said."""
        # progress bars are printed over, a class may be called "Traceback"
        said = "\n".join(line.rsplit("\r", 1)[-1] for line in err.split("\n")).strip()
        wrong = []
        if status not in (0, 2):
            wrong.append(f"exit status {status}: {said[-600:]}")
        if "Traceback (most recent" in out + err:
            wrong.append(f"a traceback: {said[-600:]}")
        if status == 2 and (not said or "\n\n" in said):
            wrong.append(f"not one paragraph on stderr: {said[-600:]!r}")
        if "out of memory" in said:
            wrong.append(f"memory: {said[-300:]}")
        return wrong

    def listing(self, command: Command) -> dict[Path, tuple]:
        """All files of the temporary tree but the case's outputs: size, time of change, and content of the dataset."""
        given = [
            word
            for flag, word in zip(command.argv, command.argv[1:])
            if flag in OUTPUT_FLAGS and word
        ]
        given += [
            word.split("=", 1)[1]
            for word in command.argv
            if word.startswith(tuple(f"{f}=" for f in OUTPUT_FLAGS))
        ]
        own = [
            self.place / "out",
            self.place / "home",
            *(Path(os.path.normpath(self.place / "out" / word)) for word in given),
        ]
        found = {}
        for folder, _, files in os.walk(self.folder):
            folder = Path(folder)
            if any(path == folder or path in folder.parents for path in own):
                continue
            found[folder] = ()
            for path in (folder / name for name in files):
                if path not in own:
                    state = path.stat()
                    digest = (
                        hashlib.sha1(path.read_bytes()).digest()
                        if self.place in path.parents
                        else b""
                    )
                    found[path] = (state.st_size, state.st_mtime_ns, digest)
        return found

    def loose_json(self, given: dict[Path, int]) -> list[str]:
        """The written files that are no strict JSON: NaN, or cut off. `given`: what was there, and when it changed."""

        def refuse(name: str) -> None:
            raise ValueError(name)

        wrong = []
        for path in (self.place / "out").rglob("*.json"):
            if (
                not path.is_file()
                or "damaged" in path.name
                or given.get(path) == path.stat().st_mtime_ns
            ):
                continue
            try:
                json.loads(path.read_bytes(), parse_constant=refuse)
            except ValueError as error:
                wrong.append(f"{path.name}: {error}")
        return wrong


def run_cases(kinds: list[str], first: int, count: int, seed: int, keep: bool = False) -> int:
    """Run cases `first`, `first` + 1, ... of the kinds in turn, and print those with faults; returns how many had."""
    warnings.simplefilter("ignore")
    faulthandler.enable()
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    fuzzer, ends, found = Fuzzer(folder / "tree"), Counter(), 0
    begin = time.perf_counter()
    for number in range(first, first + count):
        kind = kinds[number % len(kinds)]
        (folder / "case").write_text(
            f"--kinds {kind} --first {number}\n"
        )  # to be found where the process dies
        command, status, wrong = fuzzer.run(kind, number, seed)
        ends[kind, status] += 1
        if wrong:
            found += 1
            words = " ".join(word if len(word) < 80 else word[:80] + "..." for word in command.argv)
            print(
                f"--kinds {kind} --first {number}: {command.script} {words!r}",
                *wrong,
                sep="\n    ",
                flush=True,
            )
        if (number - first) % 1000 == 999:
            print(
                f"{number - first + 1} cases, {found} with faults; the running one is in {folder / 'case'}",
                flush=True,
            )
    print(
        "kind, exit status, cases:",
        *(f"{kind} {status}: {n}" for (kind, status), n in sorted(ends.items())),
        sep="\n",
    )
    print(f"{count} cases in {time.perf_counter() - begin:.0f} s, {found} with faults")
    if keep:
        print(f"the last case: {fuzzer.place}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument(
        "--keep", action="store_true", help="keep the last case's folder, and say where it is"
    )
    parser.add_argument(
        "--evaluation", type=int, metavar="N", help="instead: N evaluations against pycocotools"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.evaluation:
        found = run_sets(args.first, args.evaluation, args.seed)
    else:
        found = run_cases(args.kinds, args.first, args.cases, args.seed, args.keep)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
