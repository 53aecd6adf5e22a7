"""What predict.py's --input names, and which --output is not in its way."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from rfdetr.console import UserError
from rfdetr.data.layout import ANNOTATIONS
from rfdetr.inference.image_paths import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    files_named_by,
    warn_of_deeper,
    what_is_there_instead,
)
from rfdetr.text import EMPTY


def collect(inputs: list[str]) -> list[Path]:
    """All image and video files that --input names, sorted inside folders, each once.

    Raises UserError where a name leads to none.
    """
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    paths: list[Path] = []
    for text in inputs:
        if not text:
            raise UserError(f"--input is {EMPTY}")
        files = files_named_by(text, suffixes)
        if not files:
            instead = what_is_there_instead(Path(text), suffixes, "images or videos", "--input ")
            raise UserError(f"--input {text}: {instead}")
        paths += files
    taken = dict.fromkeys(paths)
    for folder in filter(Path.is_dir, map(Path, inputs)):
        warn_of_deeper(folder, taken, "--input ")
    return list(taken)


def refuse_output_among_inputs(output: Path, inputs: list[str], names: Iterable[str]) -> None:
    """Raise UserError for an --output folder whose pictures --input would take the next time.

    Nor do they belong into a dataset, whose folder holds annotations.  names: of the pictures and
    videos to be written.
    """
    advice = "Name a folder of their own: --output found, say"
    for folder in (output, *output.absolute().parents):
        if (folder / ANNOTATIONS).exists():
            raise UserError(
                f"--output {output} lies in a dataset's folder ({folder} holds {ANNOTATIONS}): "
                f"predictions do not belong among its images. {advice}"
            )
    for text in inputs:
        if any(is_named_by(output / name, text) for name in names):
            raise UserError(
                f"--output {output} lies where --input {text} looks: the next time the pictures "
                f"would be taken for images. {advice}"
            )


def is_named_by(file: Path, text: str) -> bool:
    """Whether a folder or glob leads to a file, which need not exist yet."""
    if os.path.isdir(text):
        return os.path.realpath(text) == os.path.realpath(file.parent)
    if not glob.has_magic(text):
        return False
    here = glob.escape(os.getcwd())
    pattern = Path(os.path.normpath(os.path.join(here, text)))
    return _matches(Path(os.path.abspath(file)).parts, pattern.parts)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the parts of a path match those of a glob, of which ** is any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def names_of_inputs(folder: Path, inputs: list[Path]) -> set[str]:
    """The casefolded names in a folder that lead to an input, by whatever link."""
    identities = {_identity(path) for path in inputs}
    return {
        path.name.casefold()
        for path in folder.iterdir()
        if path.exists() and _identity(path) in identities
    }


def _identity(path: Path) -> tuple[int, int] | None:
    """What all names and links of one file have in common; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def free_name(stem: str, suffix: str, taken: set[str]) -> str:
    """A name for a picture or video that is not in `taken` yet, numbered where need be.

    It is added to `taken`, whose names are casefolded: on most Windows and macOS disks a.PNG is
    a.png.
    """
    name = stem + suffix
    count = 1
    while name.casefold() in taken:
        count += 1
        name = f"{stem}_{count}{suffix}"
    taken.add(name.casefold())
    return name
