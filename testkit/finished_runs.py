"""What a run left in its folder: whether two runs are the same, and whether its files load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from rfdetr.runs.metrics_file import read_metrics
from rfdetr.weights import checkpoint

MEASURED = {"images_per_s", "data_s", "compute_s", "epoch_s", "evaluation_s", "peak_memory_mb"}
COMPARED = {"last.pt": ("model", "ema", "training"), "best.pt": ("model", "weights", "epoch")}


def plain(value: object) -> object:
    """Nested checkpoint content with tensors as lists, so that == compares bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.flatten().tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def figures(run: Path) -> dict:
    """metrics.json without the command, and without what is measured: times, rates and memory."""
    metrics = read_metrics(run)
    for record in metrics["epochs"]:
        for name in MEASURED:
            record["train"].pop(name, None)
    return {key: metrics.get(key) for key in ("epochs", "best", "test", "class_names", "stage")}


def differences(one: Path, other: Path) -> list[str]:
    """Where two finished runs are not the same, bit for bit."""
    different = []
    for file, keys in COMPARED.items():
        mine = torch.load(one / file)
        theirs = torch.load(other / file)
        for key in keys:
            if plain(mine[key]) != plain(theirs[key]):
                different.append(f"{file}: {key}")
    mine = figures(one)
    theirs = figures(other)
    different += [f"metrics.json: {key}" for key in mine if mine[key] != theirs[key]]
    return different


def damaged(run: Path) -> list[str]:
    """Files of a run that do not load, whatever moment it ended at.

    Half written ones do not count: they have a name of their own.
    """
    unloadable = []
    for path in run.iterdir():
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix in (".pt", ".pth"):
                checkpoint.load(path)
        except Exception as error:
            unloadable.append(f"{path.name}: {error}")
    return unloadable


def number_of(run: Path) -> int:
    return int(run.name.rsplit("_", 1)[1])


def runs_in(folder: Path) -> list[Path]:
    """The run folders, oldest first."""
    folders = [path for path in folder.glob("runs/*_*_*") if re.search(r"_\d+$", path.name)]
    return sorted(folders, key=number_of)
