"""What predict.py's --input names, and which --output is not in its way."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from rfdetr.console import UserError, warn
from rfdetr.data.layout import ANNOTATIONS
from rfdetr.files import is_special_file
from rfdetr.inference.originals import IMAGE_SUFFIXES as IMAGES
from rfdetr.inference.videos import VIDEO_SUFFIXES as VIDEOS
from rfdetr.runs.places import what_is_there
from rfdetr.text import quoted


def collect(inputs: list[str]) -> list[Path]:
    """All image and video files that --input names, sorted inside folders, each once.

    Raises UserError where a name leads to none.
    """
    paths: list[Path] = []
    for text in inputs:
        usable = []
        for path in files_named_by(text):
            if is_special_file(path):
                warn(f"{path} is a pipe, a socket or a device, not a file: left out")
            else:
                usable.append(path)
        if not usable:
            raise UserError(f"--input {text}: {what_is_there_instead(Path(text))}")
        paths += usable
    return list(dict.fromkeys(paths))


def files_named_by(text: str) -> list[Path]:
    """The images and videos that a file, folder or glob names, sorted."""
    path = Path(text)
    if path.is_dir():
        paths = list(path.iterdir())
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(match) for match in glob.glob(text, recursive=True)]
    return sorted(path for path in paths if path.suffix.lower() in IMAGES | VIDEOS)


def what_is_there_instead(path: Path) -> str:
    """Of a path without images: what it is, and how to name what lies below it or near it."""
    below = path.glob("*/**/*") if path.is_dir() else ()
    deeper = next((file for file in below if file.suffix.lower() in IMAGES), None)
    if deeper:
        pattern = quoted(str(path / "**" / f"*{deeper.suffix}"))
        return f"no images or videos there, but in folders below: --input {pattern}"
    if not path.exists() and not glob.has_magic(str(path)):
        return what_is_there(path)
    return f"no images or videos there ({', '.join(sorted(IMAGES | VIDEOS))})"


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
