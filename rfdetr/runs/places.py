"""Which file or run a path means, and what to say of one that leads nowhere; standard library only,
so that a script can tell before it imports torch.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from rfdetr.commands import TRAIN_DETECTOR
from rfdetr.console import UserError
from rfdetr.files import is_special_file, what_it_holds
from rfdetr.runs.log import start_command
from rfdetr.text import DOWNLOAD_FIRST, is_url

WEIGHTS = ("best.pt", "last.pt")  # what a run's folder means where a checkpoint is asked for
TEXTS = (".json", ".yaml", ".yml", ".txt", ".csv", ".md", ".log")
CONFIG = "config.yaml"  # of a run, its settings
STATES = ("last.pt", "checkpoint.pt")  # what a run can go on from


def find_checkpoint(path: Path) -> Path:
    """The file that `path` means: itself, or of a run's folder its best.pt, else its last.pt.

    Raises UserError, naming what lies near, where there is none.
    """
    if path.is_dir():
        found = first_file(path, WEIGHTS)
        if found:
            return found
        raise UserError(f"there is no checkpoint in {path}: {what_is_there(path, WEIGHTS)}")
    require_file(path)
    return path


def require_file(path: Path) -> None:
    """Raise UserError where `path` is no regular file, naming what lies near."""
    if path.suffix.lower() in TEXTS and path.is_file():
        weights = first_file(path.parent, WEIGHTS)
        meant = f". Did you mean {weights}?" if weights else ""
        raise UserError(f"{path} is a text file, which holds no weights{meant}")
    if is_special_file(path):
        raise UserError(f"{path} is a pipe, a socket or a device: weights are read from files")
    if path.is_file():
        return
    message = f"there is no checkpoint {path}: {what_is_there(path, WEIGHTS)}"
    if path.parent.is_dir():
        beside = sorted(p.name for p in path.parent.glob("*.p*") if p.suffix in (".pt", ".pth"))
        if beside:
            message += f" In {path.parent}: {', '.join(beside)}"
    raise UserError(message)


def detector_of_run(run: Path, train: str = f"python {TRAIN_DETECTOR}") -> Path:
    """The best.pt of a stage-1 run, else its last.pt; train: the command that makes such a run.

    Raises UserError.
    """
    found = first_file(run, WEIGHTS)
    if found:
        return found
    raise UserError(
        f"No checkpoint found in Stage-1 directory {run}: {what_is_there(run, WEIGHTS)} "
        f"Name another run, or a file with --checkpoint, or train one: {train}"
    )


def data_of_run(checkpoint: Path) -> dict[str, object]:
    """The "dataset" that the run of a checkpoint was trained on, and its "rename"; {} where its
    folder has no config.yaml that can be read.
    """
    import yaml  # here, so that --help works where packages are missing

    try:
        config = yaml.safe_load((checkpoint.parent / CONFIG).read_text(encoding="utf-8"))
        dataset = config["dataset"]
        rename = [str(pair) for pair in config.get("rename") or ()]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return {}
    return {"dataset": Path(dataset), "rename": tuple(rename)} if isinstance(dataset, str) else {}


def newest_run(stem: str) -> Path:
    """The run under runs/ that was changed last, its folder beginning with `stem`; UserError where
    there is none.
    """
    runs = [run for run in Path("runs").glob(f"{stem}_*") if first_file(run, STATES)]
    if not runs:
        raise UserError(
            f"--resume auto: no run under runs/{stem}_* has a last.pt or checkpoint.pt. "
            "Name the run's folder."
        )
    return max(runs, key=lambda folder: folder.stat().st_mtime)


def require_state(run: Path) -> None:
    """Raise UserError where `run` has nothing to go on from."""
    if first_file(run, STATES):
        return
    command = start_command(run)
    if command:
        raise UserError(
            f"--resume: there is no last.pt or checkpoint.pt in {run}: the run ended before its "
            f"first save. Start anew, in another folder:\n  {command}"
        )
    raise UserError(
        f"--resume: there is no last.pt or checkpoint.pt in {run}: {what_is_there(run, STATES)}"
    )


def first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files that a folder has."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def what_is_there(path: Path, files: tuple[str, ...] = ()) -> str:
    """What is at a path instead of `files`, and which other path may be meant, in sentences."""
    if path.is_dir():
        there = what_it_holds(path)
    elif path.exists():
        there = "it is a file"
    else:
        there = missing(path)
    meant = [] if path.exists() else names_near(path)
    meant = meant or runs_near(path, files)
    if not meant:
        return f"{there}."
    return f"{there}. Did you mean {' or '.join(str(near) for near in meant)}?"


def missing(path: Path) -> str:
    """How far a path that leads nowhere exists."""
    if is_url(path):
        return f"it {DOWNLOAD_FIRST}"
    for folder in reversed(path.parents):
        if not folder.exists():
            return f"there is no folder {folder}"
    return "there is no such file or folder"


def runs_near(path: Path, files: tuple[str, ...]) -> list[Path]:
    """Folders with one of `files` above `path`, else the three newest below."""
    for folder in path.parents[:2]:
        if first_file(folder, files):
            return [folder]
    if not path.is_dir():
        return []
    runs = []
    for depth in ("*", "*/*"):
        runs = runs or [run for run in path.glob(depth) if first_file(run, files)]
    return sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True)[:3]


def names_near(path: Path) -> list[Path]:
    """What a missing path may have meant: names like its own where it leaves what exists."""
    for step in [*reversed(path.parents), path]:
        if not step.exists():
            if not step.parent.is_dir():
                return []
            names = [entry.name for entry in step.parent.iterdir()]
            near = difflib.get_close_matches(step.name, names, n=2)
            return [step.parent / name for name in near]
    return []
