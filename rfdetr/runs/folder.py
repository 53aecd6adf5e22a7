"""A run's folder: its number, its disk, damaged files in it."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

from rfdetr.console import UserError, warn
from rfdetr.files import disk_usage, make_folder, writing_to
from rfdetr.runs.places import STATES, first_file


def new_run(parent: Path, stem: str) -> Path:
    """Make PARENT/<stem>_<n>, n the first free number; runs that start at once get two folders.

    Raises UserError where the folder cannot be written.
    """
    with writing_to(parent):
        Path(parent).mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):
            folder = Path(parent, f"{stem}_{n}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()  # fails where it exists, whoever was faster
                return folder


def given_run(folder: Path) -> Path:
    """Make the folder that the user named for a new run.

    Raises UserError where it cannot be written or holds files.
    """
    make_folder(folder)
    held = sorted(entry.name for entry in Path(folder).iterdir())
    if held:
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        go_on = ", or --resume it" if first_file(Path(folder), STATES) else ""
        raise UserError(
            f"{folder} is not empty (it holds {held[0]}{more}): name another --output_dir{go_on}"
        )
    return Path(folder)


def check_free_disk(folder: Path, needed: int) -> None:
    """Raise UserError where the disk of `folder` has less than `needed` bytes free.

    Of what is no disk (/proc) nothing is said: writing there tells.
    """
    total, _, free = disk_usage(folder)
    if total and free < needed:
        raise UserError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free and this run needs about "
            f"{needed / 1e9:.1f} GB: free some space, or name another disk with --output_dir"
        )


def set_aside(path: Path, name: Path, next_epoch: int) -> None:
    """Rename a damaged file to `name` with the first free number for its {}, and say so."""
    for n in itertools.count(1):
        aside = name.with_name(name.name.format(n))
        if not aside.exists():
            break
    path.rename(aside)
    warn(f"{path} is damaged: kept as {aside.name}, a new one begins at epoch {next_epoch}")
