"""What a run left in its folder: whether two runs are the same, and whether its files load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from rfdetr.weights import checkpoint

MEASURED = {"images_per_s", "data_s", "compute_s", "epoch_s", "evaluation_s", "peak_memory_mb"}


def plain(value):
    """Nested checkpoint content with tensors as lists, so that == compares bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.flatten().tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def figures(run: Path) -> dict:
    """metrics.json without the command, and without what is measured: times, rates and memory."""
    metrics = json.loads((run / "metrics.json").read_bytes())
    for record in metrics["epochs"]:
        record["train"] = {
            name: value for name, value in record["train"].items() if name not in MEASURED
        }
    return {key: metrics.get(key) for key in ("epochs", "best", "test", "class_names", "stage")}


def differences(one: Path, other: Path) -> list[str]:
    """Where two finished runs are not the same, bit for bit."""
    found = []
    for file, keys in (
        ("last.pt", ("model", "ema", "training")),
        ("best.pt", ("model", "weights", "epoch")),
    ):
        a, b = (torch.load(run / file) for run in (one, other))
        found += [f"{file}: {key}" for key in keys if plain(a[key]) != plain(b[key])]
    a, b = figures(one), figures(other)
    return found + [f"metrics.json: {key}" for key in a if a[key] != b[key]]


def damaged(run: Path) -> list[str]:
    """Files of a run, whatever moment it ended at, that do not load; half written ones have a name of their own."""
    found = []
    for path in (path for path in run.iterdir() if path.suffix in (".pt", ".pth", ".json")):
        try:
            json.loads(path.read_bytes()) if path.suffix == ".json" else checkpoint.load(path)
        except Exception as error:
            found.append(f"{path.name}: {error}")
    return found


def runs_in(folder: Path) -> list[Path]:
    """The run folders, oldest first."""
    found = [path for path in folder.glob("runs/*_*_*") if re.search(r"_\d+$", path.name)]
    return sorted(found, key=lambda path: int(path.name.rsplit("_", 1)[1]))
