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

import train_detector_stage1
from rfdetr.classes import ClassTable, assign_rows, coco_table
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
from testkit.forms import (
    write_bowl,
    write_labelme,
    write_masks,
    write_voc,
    write_voc_beside,
    write_yolo,
)
from testkit.in_process import output_of

SMALL = [
    *"--size tiny --resolution 64 --device cpu --workers 0 --batch 1 --accum 2".split(),
    *"--min_steps 1 --tensorboard 0 --fast_dev_run 1".split(),
]
TRAINING = ("train_detector_stage1", "train_seg_stage2", "train_seg_single_stage")
OTHERS = ("predict", "shrink_head", "export")
WRITERS = (write_yolo, write_voc, write_voc_beside, write_labelme, write_masks, write_bowl)
MODULES = ("rfdetr.data.demo", "rfdetr.weights.download")
WORDS = [
    *("", "0", "1", "2", "-1", "1.5", "nan", "inf", "-inf", "1e400", "9" * 400, "9" * 5000),
    *("1000000000000", "100000000", "abc", "é血", "\udce9", "x" * 300, "x" * 5000, "a\nb", "/"),
    *(".", "..", "~", "*", "[", "**", "--", "-", "auto", "none", "true", "no", "cpu", "cuda:99"),
    *("meta", "mps", "cpu:7", "../data", "../data/train", "there.txt", "nowhere/x/y"),
    *("there.txt/x", "tiny", "nano", "64", "http://", "http://[", "file:///etc/passwd"),
    *("\x1b[2J", "cells", "%s", "{}"),
]


@dataclass
class Command:
    """What a case runs: a script's name and its words, in the folder `out`."""

    script: str
    argv: list[str] = field(default_factory=list)


class Materials:
    """A sound dataset, checkpoints of every kind and a run, made once; the cases damage copies."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = folder / "data"
        self.run = folder / "run"
        make_demo(self.data, train=3, valid=1, test=1, size=SIDE, seed=2)
        self.documents = {}
        for name in ("train", "valid", "test"):
            file = self.data / name / "_annotations.coco.json"
            self.documents[name] = json.loads(file.read_text(encoding="utf-8"))
        self.contents = checkpoint_contents()
        for name, value in self.contents.items():
            torch.save(value, folder / name)
        self.backbone = encoder_weights(self.contents["official.pth"]["model"])
        save_file(self.backbone, folder / "backbone.safetensors")
        words = [*SMALL, "--dataset", str(self.data), "--output_dir", str(self.run)]
        with contextlib.redirect_stderr(io.StringIO()):
            output_of(train_detector_stage1.main, *words, "--pretrain_weights", "none")
        self.state = torch.load(self.run / "last.pt", weights_only=True)


def checkpoint_contents() -> dict[str, dict]:
    """File name -> content: our own kinds of checkpoints, and two of other programs."""
    torch.manual_seed(0)
    size = SIZES["tiny"]
    names = list(CLASS_NAMES)
    own = assign_rows(names, [1, 2, 3], "dataset")
    coco91 = assign_rows(names, [1, 2, 3], "coco91")

    def content(stage: str, table: ClassTable, head: str | None) -> dict:
        state = Detector(size, table.rows_total, table.background_last, head).state_dict()
        return make_content(stage, size, SIDE, table, head, state) | {"args": {}}

    detector = content("detector", own, None)
    official = to_official(content("detector", coco_table(), None)["model"])
    lightning = {f"model.{name}": tensor for name, tensor in official.items()}
    return {
        "detector.pt": detector,
        "mask.pt": content("segmentation", own, "nano"),
        "coco91.pt": content("detector", coco91, None),
        "official.pth": {"model": official, "args": {"class_names": []}},
        "lightning.ckpt": {"state_dict": lightning, "hyper_parameters": {}},
    }


def encoder_weights(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's alone, under Hugging Face's names."""
    prefix = "backbone.0.encoder.encoder."
    weights = {}
    for name, tensor in official.items():
        if prefix in name:
            weights[name.removeprefix(prefix)] = tensor.contiguous()
    return weights


# ---------------------------------------------------------------- the kinds of cases


def on_dataset(rng: random.Random, base: Materials) -> Command:
    """Some script that reads the dataset beside the folder it runs in."""
    script = rng.choice(["validate_setup"] * 4 + ["evaluate"] * 2 + list(TRAINING))
    words = ["--dataset", "../data"]
    if script == "validate_setup":
        words += ["--size", "tiny", "--device", "cpu", "--json", "report.json"]
        unusual = ["--check_images", "0"], ["--need_masks", "1"], ["--val_fraction", "0.5"]
        words += rng.choice([[], *unusual])
        return Command(script, words)
    if script == "evaluate":
        checkpoint = base.folder / rng.choice(["mask.pt", "detector.pt"])
        words += ["--checkpoint", str(checkpoint), "--json", "scores.json"]
        words += ["--device", "cpu", "--results", "results"]
        words += ["--split", rng.choice(["train", "valid", "test"])]
        return Command(script, words)
    words += [*SMALL, "--ema", rng.choice("01"), "--run_test", rng.choice("01")]
    if script == "train_seg_stage2":
        words += ["--checkpoint", str(base.folder / "detector.pt")]
        words += ["--cache", rng.choice(["ram", "disk", "off"])]
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
    annotations = document["annotations"]
    count = min(len(annotations), rng.choice([1, 1, 3]))
    for entry in rng.sample(annotations, count):
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
            if rng.random() < 0.5:
                file.mkdir()
        elif suffix != file.suffix and rng.random() < 0.3:
            file.with_suffix(suffix).write_bytes(raw)
    if rng.random() < 0.3:
        words = ["--checkpoint", str(base.folder / "mask.pt"), "--input", f"../data/{split}"]
        words += ["--output", "found", "--device", "cpu"]
        words += ["--threshold", rng.choice(["0", "0.02", "0.5"])]
        return Command("predict", words)
    return on_dataset(rng, base)


def checkpoint_case(rng: random.Random, base: Materials, place: Path) -> Command:
    """A checkpoint, or the state that a run is resumed from."""
    way = rng.randrange(10)
    if way == 0:
        return damaged_state_case(rng, base, place)
    if way == 1:
        return damaged_run_case(rng, base, place)
    if way == 2:
        return damaged_backbone_case(rng, base, place)
    name = rng.choice(sorted(base.contents))
    raw = (base.folder / name).read_bytes()
    given = place / "data/given.pt"
    given.write_bytes(damaged_checkpoint(rng, raw, base.contents[name]))
    return on_checkpoint(rng.choice(["evaluate", *OTHERS, *TRAINING]), "../data/given.pt")


def resume_run() -> Command:
    return Command("train_detector_stage1", ["--resume", "run", "--epochs", "2"])


def damaged_state_case(rng: random.Random, base: Materials, place: Path) -> Command:
    """Values inside what a run goes on from."""
    content = copy_of(base.state)
    damage_values(rng, content["training"], [*VALUES, *tensor_values(rng)[:-3]])
    shutil.copytree(base.run, place / "out/run")
    for name in ("last.pt", "checkpoint.pt"):
        torch.save(content, place / "out/run" / name)
    return resume_run()


def damaged_run_case(rng: random.Random, base: Materials, place: Path) -> Command:
    """Bytes of a run's files."""
    shutil.copytree(base.run, place / "out/run")
    all_of_them = ["last.pt", "checkpoint.pt", "metrics.json"]
    for name in rng.choice([["last.pt"], ["checkpoint.pt"], all_of_them]):
        file = place / "out/run" / name
        raw = damage_bytes(rng, file.read_bytes())
        file.unlink()  # both names may be one file
        file.write_bytes(raw)
    return resume_run()


def damaged_backbone_case(rng: random.Random, base: Materials, place: Path) -> Command:
    """A file of DINOv2's weights."""
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


def on_checkpoint(script: str, file: str) -> Command:
    """A script that reads a file of weights."""
    own = ["--checkpoint", file]
    training = [*SMALL, "--dataset", "../data", "--ema", "0"]
    images = ["--input", "../data/valid", "--threshold", "0.02"]
    words = {
        "evaluate": [*own, "--dataset", "../data", "--device", "cpu", "--json", "scores.json"],
        "predict": [*own, *images, "--output", "found", "--device", "cpu"],
        "shrink_head": ["--in_ckpt", file, "--out_ckpt", "small.pt"],
        "export": [*own, "--out", "exported.pth"],
        "train_detector_stage1": [*training, "--pretrain_weights", file],
        "train_seg_stage2": [*training, *own, "--auto_shrink", "1"],
        "train_seg_single_stage": [*training, "--init_ckpt", file],
    }
    return Command(script, words[script])


@functools.cache
def flags_of(script: str) -> tuple[str, ...]:
    """The flags that --help names, without those that start compilers or whole jobs."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(script).main(["--help"])
    flags = set(re.findall(r"--\w+", printed.getvalue()))
    return tuple(sorted(flags - {"--compile", "--debug"}))


def sound_command(script: str, checkpoint: str) -> list[str]:
    """Words that a script without a dataset runs with."""
    images = ["--input", "../data/valid"]
    demo = ["demo", "--train", "1", "--valid", "1", "--test", "1", "--size", "64"]
    words = {
        "predict": ["--checkpoint", checkpoint, *images, "--output", "found", "--device", "cpu"],
        "shrink_head": ["--in_ckpt", checkpoint, "--out_ckpt", "small.pt", "--keep", "cells"],
        "export": ["--checkpoint", checkpoint, "--out", "exported.pth"],
        "rfdetr.data.demo": demo,
        "rfdetr.weights.download": ["list"],
    }
    return words[script]


def command_case(rng: random.Random, base: Materials, place: Path) -> Command:
    """A sound command line with some words replaced, added and removed."""
    (place / "out/there.txt").write_text("there")
    command = on_dataset(rng, base)
    script = rng.choice([command.script, *OTHERS, *MODULES])
    if script != command.script:
        command = Command(script, sound_command(script, str(base.folder / "mask.pt")))
    argv = command.argv
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(argv) + 1)
        word = rng.choice(WORDS)
        way = rng.randrange(6)
        if way < 2:
            argv[at : at + 1] = [word]
        elif way < 4:
            argv += [rng.choice(flags_of(script) or ("--x",)), word]
        elif way == 4:
            del argv[at : at + 1]
        else:
            unusual = [word, "--no_such_flag", "-x", "--size=", "--dataset=../data"]
            argv.insert(at, rng.choice(unusual))
    if script in TRAINING and "--workers" in argv:  # dozens of processes take longer
        argv += ["--workers", rng.choice(["-1", "0", "1e9", "9" * 30])]
    if "--size" in argv and "tiny" not in argv:  # so do a large model's weights
        argv += ["--size", "tiny"]
    return command


def form_case(rng: random.Random, base: Materials, place: Path) -> Command:
    """Bytes of the files of a dataset in another form, or words and numbers in their texts."""
    root = place / "data/theirs"
    rng.choice(WRITERS)(base.data, root)
    files = sorted(file for file in root.rglob("*") if file.is_file())
    texts = [file for file in files if file.suffix in (".txt", ".xml", ".json", ".yaml")]
    for file in rng.choices(texts or files, k=rng.choice([1, 1, 3])):
        if rng.random() < 0.5 or not texts:
            file.write_bytes(damage_bytes(rng, file.read_bytes()))
            continue
        words = re.split(r"([\w.+-]+)", file.read_text("utf-8", "replace"))
        words[rng.randrange(len(words))] = str(rng.choice([*WORDS, *VALUES]))
        file.write_text("".join(words), "utf-8", "replace")
    form = rng.choice(["auto", "auto", "auto", "yolo", "voc", "labelme", "masks"])
    words = ["--input", "../data/theirs", "--output", "coco", "--format", form]
    return Command("convert_dataset", words)


KINDS: dict[str, Callable[[random.Random, Materials, Path], Command]] = {
    "annotations": annotations_case,
    "rle": rle_case,
    "polygon": polygon_case,
    "image": image_case,
    "checkpoint": checkpoint_case,
    "command": command_case,
    "form": form_case,
}
