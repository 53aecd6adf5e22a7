"""Which form a folder of labelled images has, told by what lies in it.

A form is one of `tool_settings.FORMS`, or None where none is known. Only a few levels of folders
are looked at, so that a message can name the form at once; the readers look at everything.
"""

from __future__ import annotations

import os
import re
from glob import escape
from itertools import islice
from pathlib import Path

from rfdetr.text import command_line

SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}
MOST_PEEKED = 20  # files of a folder that are opened
MOST_FOLDERS = 50  # of those in a folder that are looked into
PEEK = 1 << 20  # bytes at either end of a file: LabelMe may keep the image between its texts
YOLO_LINE = re.compile(rb"\d+(\.0*)?([ \t]+-?[\d.]+([eE]-?\d+)?){4,}\s*")


def find_form(root: Path) -> str | None:
    """The form of the dataset in a folder."""
    if not root.is_dir():
        return None
    return form_within(root, [root, *split_folders(root)])


def own_form(root: Path) -> str | None:
    """As find_form, of what lies in the folder itself and in those called train, val, test."""
    if not root.is_dir():
        return None
    return form_within(root, split_folders(root))


def form_within(root: Path, parents: list[Path]) -> str | None:
    """The form of `root` and its splits; parents: those whose folders are looked into as well."""
    folders = [root, *split_folders(root)]
    within = [folder for one in parents for folder in subfolders(one)[:MOST_FOLDERS]]
    if find_yaml(root) or any(map(has_yolo_labels, folders)):
        return "yolo"
    if any(map(has_voc_labels, [*folders, *within])):
        return "voc"
    if any(map(has_labelme_labels, [*folders, *within])):
        return "labelme"
    if any(map(has_masks, [*folders, *within])):
        return "masks"
    return None


def datasets_below(root: Path) -> dict[Path, str]:
    """The forms of the folders in one that is no dataset itself."""
    if own_form(root):
        return {}
    forms = {folder: find_form(folder) for folder in subfolders(root)[:MOST_FOLDERS]}
    return {folder: form for folder, form in forms.items() if form}


def dataset_above(root: Path) -> Path | None:
    """The dataset that a folder is a part of, as images/train is; with all of its splits."""
    above = next((folder for folder in list(root.parents)[:2] if own_form(folder)), None)
    if above and split_named(above.name) and own_form(above.parent):
        return above.parent
    return above


def conversion_of(root: Path) -> str:
    """The command that writes the dataset in a folder as COCO."""
    target = free_output(root)
    return command_line("python", "convert_dataset.py", "--input", root, "--output", target)


def free_output(root: Path) -> Path:
    """Where to write the dataset in a folder as COCO: dataset/, where there is none yet."""
    return Path(f"{root.name or 'dataset'}_coco" if Path("dataset").exists() else "dataset")


def split_named(name: str) -> str | None:
    """The split that a folder's or list's name means, such as "valid" for "val2017"."""
    plain = re.sub(r"_?\d{4}$", "", name.lower())
    for split, names in SPLIT_NAMES.items():
        if plain in names:
            return split
    return None


def find_yaml(root: Path) -> Path | None:
    """The file that describes a YOLO dataset: data.yaml, or the only one with names and train."""
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (root / name).is_file():
            return root / name
    files = [file for file in islice(root.glob("*.y*ml"), MOST_PEEKED) if file.is_file()]
    described = []
    for file in files:
        keys = re.findall(rb"(?m)^(train|names)\s*:", peek(file))
        if len(set(keys)) == 2:
            described.append(file)
    return described[0] if len(described) == 1 else None


def split_folders(root: Path) -> list[Path]:
    return [folder for folder in subfolders(root) if split_named(folder.name)]


def subfolders(root: Path) -> list[Path]:
    """Folders in a folder, hidden ones left out; none of one that may not be read."""
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return []
    return [root / name for name in names if name[0] != "." and os.path.isdir(root / name)]


def has_files(folder: Path, *patterns: str) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def has_yolo_labels(folder: Path) -> bool:
    if has_files(folder, "labels/*.txt", "labels/*/*.txt"):
        return True
    return any(YOLO_LINE.match(peek(file)) for file in islice(folder.glob("*.txt"), MOST_PEEKED))


def has_voc_labels(folder: Path) -> bool:
    if has_files(folder, "Annotations/*.xml", "annotations/*.xml", "SegmentationObject/*.png"):
        return True
    for file in islice(folder.glob("*.xml"), MOST_PEEKED):
        beside = set(folder.glob(f"{escape(file.stem)}.*")) - {file}
        if beside:
            return True
    return False


def has_labelme_labels(folder: Path) -> bool:
    files = islice(folder.glob("*.json"), MOST_PEEKED)
    return any(re.search(rb'"shapes"\s*:', peek(file)) for file in files)


def has_masks(folder: Path) -> bool:
    return has_files(folder, "masks/*.*", "masks/*/*.*") and (folder / "images").is_dir()


def peek(file: Path) -> bytes:
    """The beginning and the end of a plain file; nothing of one that cannot be read."""
    try:
        if not file.is_file():  # a pipe would never end
            return b""
        with open(file, "rb") as opened:
            content = opened.read(PEEK)
            if len(content) == PEEK:
                opened.seek(max(PEEK, file.stat().st_size - PEEK))
                content += opened.read(PEEK)
            return content
    except OSError:
        return b""
