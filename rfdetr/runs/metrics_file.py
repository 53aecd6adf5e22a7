"""Reading metrics.json, the record of a run; standard library only.  record.py writes it.

{"format": 1, "stage", "size", "resolution", "class_names", "args", "environment",
 "commands": [{"command", "when", "first_epoch": 1, "changed": {"lr": [0.0001, 0.001], ...}}, ...],
 "epochs": [{"epoch": 1, "train": {...}, "valid": {...}, "valid_ema": {...}}, ...],
 "best": {"epoch", "metric", "value", "weights": "regular" or "ema"} or null, "test": {...}}

args are the newest; commands tells what each --resume changed, and from which epoch on.
"""

from __future__ import annotations

import json
from pathlib import Path

METRICS = "metrics.json"
SCORES_OF = {"regular": "valid", "ema": "valid_ema"}  # weights -> an epoch's key


def read_metrics(folder: str | Path) -> dict:
    """The content of a run's metrics.json.  Raises OSError, or ValueError for another file."""
    metrics = json.loads(Path(folder, METRICS).read_bytes())
    if not isinstance(metrics, dict):
        raise ValueError(f"{Path(folder, METRICS)} is no record of a run")
    return metrics


def has_test_scores(folder: Path) -> bool:
    """Whether a run has scored its test split, which is the last thing that it does."""
    try:
        return "test" in read_metrics(folder)
    except (OSError, ValueError):
        return False


def first_epochs(folder: Path, count: int) -> tuple[list[dict], dict | None]:
    """A run's epochs 1..count, and its best epoch where that is among them.

    Raises FileNotFoundError, or ValueError for a damaged file.
    """
    try:
        metrics = read_metrics(folder)
        epochs = [record for record in metrics["epochs"] if record["epoch"] <= count]
        best = metrics["best"]
        if best and best["epoch"] > count:
            best = None
    except (KeyError, TypeError, RecursionError, IsADirectoryError) as error:
        raise ValueError(f"{Path(folder, METRICS)} is damaged") from error
    return epochs, best or None


def earlier_commands(folder: Path) -> list[dict]:
    """The commands that have trained a run so far; [] where metrics.json does not tell.

    A run of an earlier version tells its last one alone.
    """
    try:
        metrics = read_metrics(folder)
        if "commands" in metrics:
            return [dict(entry, changed=dict(entry["changed"])) for entry in metrics["commands"]]
        command = metrics["environment"]["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [{"command": command, "when": None, "first_epoch": None, "changed": {}}]


def best_scores(folder: str | Path) -> tuple[str, dict]:
    """The weights that scored best ("regular" or "ema"), and the scores of their best epoch.

    ("regular", {}) for a run whose valid split is empty.  Raises as read_metrics.
    """
    metrics = read_metrics(folder)
    best = metrics["best"]
    if best is None:
        return "regular", {}
    weights = best["weights"]
    for record in metrics["epochs"]:
        if record["epoch"] == best["epoch"]:
            return weights, record.get(SCORES_OF[weights]) or {}
    return weights, {}


def highest_box_map(folder: Path) -> dict[str, float]:
    """The highest valid bbox/mAP, 0..1, of "regular" and of "ema" weights, of those that have one.

    {} where there is no metrics.json, or another kind of file.
    """
    return {weights: value for weights, (value, _) in best_box_epochs(folder).items()}


def best_box_epochs(folder: Path) -> dict[str, tuple[float, int]]:
    """As highest_box_map, each with the first epoch that had it."""
    try:
        records = read_metrics(folder)["epochs"]
        best = {}
        for weights, key in SCORES_OF.items():
            for record in records:
                value = record[key]["bbox"]["mAP"] if record.get(key) else None
                if value is not None and (weights not in best or value > best[weights][0]):
                    best[weights] = (value, record["epoch"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return best
