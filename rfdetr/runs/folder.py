"""A run's folder: its number, metrics.json, TensorBoard events and log, and the atomic writing behind them."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

from rfdetr.console import UserError
from rfdetr.files import free_disk, make_folder, writing_to


def new_run(parent: Path, stem: str) -> Path:
    """Make PARENT/<stem>_<n>, n the first free number; runs that start at once get two folders.  Raises UserError."""
    with writing_to(parent):
        Path(parent).mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):
            with contextlib.suppress(FileExistsError):
                (
                    folder := Path(parent, f"{stem}_{n}")
                ).mkdir()  # fails where it exists: that is the lock
                return folder


def given_run(folder: Path) -> Path:
    """Make the folder that the user named for a new run.  Raises UserError where it cannot, or holds files."""
    make_folder(folder)
    if first := next(Path(folder).iterdir(), None):
        raise UserError(
            f"{folder} is not empty (it holds {first.name}): name another --output_dir, or --resume it"
        )
    return Path(folder)


def check_free_disk(folder: Path, needed: int) -> None:
    """Raise UserError where the disk of `folder` has less than `needed` bytes free."""
    if (free := free_disk(folder)) < needed:
        sizes = f"{free / 1e9:.1f} GB free and this run needs about {needed / 1e9:.1f} GB"
        raise UserError(
            f"the disk of {folder} has {sizes}: free some space, or name another disk with --output_dir"
        )


def start_command(folder: Path) -> str | None:
    """What a run was started with, from its log; None where there is no log."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return (
            "python "
            + (folder / "log.txt").read_text(encoding="utf-8").splitlines()[0].split(" ", 3)[3]
        )
