"""The fuzzer's cases: a folder with damaged input, and the command that reads it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from rfdetr.classes import assign_rows, coco_table
from rfdetr.data.demo import CLASS_NAMES, make_demo
from rfdetr.models.detector import Detector
from rfdetr.sizes import SIZES
from rfdetr.weights.checkpoint import make_content
from rfdetr.weights.official import to_official
from testkit.damage import (
    SIDE,
    VALUES,
    damage_bytes,
    damage_values,
    damaged_image,
    damaged_json,
    some_polygons,
    some_rle,
)
from testkit.damaged_checkpoints import copy_of, damage_tensors, damaged_checkpoint, tensor_values
from testkit.in_process import restored_signals

SMALL = "--size tiny --resolution 64 --device cpu --workers 0 --batch 1 --accum 2 --min_steps 1 --tensorboard 0".split()


SMALL += ["--fast_dev_run", "1"]


SCRIPTS = (
    "validate_setup", "evaluate", "predict", "shrink_head", "export", "train_detector_stage1", "train_seg_stage2",
    "train_seg_single_stage",
)  # fmt: skip


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
            restored_signals(),
        ):
            importlib.import_module("train_detector_stage1").main(words)
        self.state = torch.load(self.run / "last.pt", weights_only=True)


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
    (place / "data/given.pt").write_bytes(
        damaged_checkpoint(rng, (base.folder / name).read_bytes(), base.contents[name])
    )
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
