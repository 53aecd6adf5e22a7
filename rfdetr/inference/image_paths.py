"""The files that a folder or a pattern names, and what to say where there are none.

One way for predict.py and for Python.
"""

from __future__ import annotations

import glob
from collections.abc import Collection
from itertools import islice
from pathlib import Path

from rfdetr.console import warn
from rfdetr.files import is_special_file
from rfdetr.runs.places import what_is_there
from rfdetr.text import quoted

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
LOOKED_AT = 10_000  # files in folders below one that is searched
VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}


def files_named_by(text: str, suffixes: Collection[str]) -> list[Path]:
    """The files with one of these suffixes that a file, folder or glob names, sorted.

    Hidden ones of a folder, such as macOS' ._a.png, are left out, and with a warning what is no
    plain file.
    """
    path = Path(text)
    if path.is_dir():
        paths = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    elif path.exists():
        paths = [path]
    else:
        paths = [Path(match) for match in glob.glob(text, recursive=True)]
    files = []
    for path in sorted(paths):
        if path.suffix.lower() not in suffixes:
            continue
        if is_special_file(path):
            warn(f"{path} is a pipe, a socket or a device, not a file: left out")
        elif not path.is_dir():
            files.append(path)
    return files


def warn_of_deeper(folder: Path, taken: Collection[Path], flag: str = "") -> None:
    """Warn where folders below one that has images hold images that are not among those taken."""
    below = first_image_below(folder)
    if below and below not in taken:
        pattern = quoted(str(folder / "**" / "*"))
        warn(f"{folder}: images in folders below it are left out. All of them: {flag}{pattern}")


def first_image_below(folder: Path) -> Path | None:
    """An image in a folder of `folder`, among the first that lie there."""
    below = glob.iglob(f"{glob.escape(str(folder))}/*/**/*", recursive=True)
    return next((file for file in map(Path, islice(below, LOOKED_AT)) if is_image(file)), None)


def what_is_there_instead(path: Path, suffixes: Collection[str], what: str, flag: str = "") -> str:
    """Of a path without files: what it is, and how to name what lies below it or near it.

    what: in words, "images"; flag: what stands before a path.
    """
    deeper = first_image_below(path)
    if deeper:
        pattern = quoted(str(path / "**" / f"*{deeper.suffix}"))
        return f"no {what} there, but in folders below: {flag}{pattern}"
    if not path.exists() and not glob.has_magic(str(path)):
        return what_is_there(path)
    endings = ", ".join(sorted(suffixes))
    if path.is_file():
        return f"a file that is none of the {what} by its ending ({endings})"
    return f"no {what} there ({endings})"


def is_image(file: Path) -> bool:
    """By its name."""
    return file.suffix.lower() in IMAGE_SUFFIXES


def none_read(files: int) -> str:
    """What to say where none of so many files could be read."""
    which = "the file could not" if files == 1 else f"none of the {files} files could"
    return f"{which} be read: see the warnings above"


def some_unread(unread: int, files: int) -> str:
    """What to say where so many of the files could not be read."""
    return f"{unread} of {files} inputs could not be read: see the warnings above"
