"""Where the files of a dataset lie, and what an annotation file holds."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from rfdetr.console import UserError
from rfdetr.data.formats.detect import conversion_of, find_form
from rfdetr.data.image_files import kind_of_file
from rfdetr.files import what_it_holds
from rfdetr.text import command_line
from rfdetr.tool_settings import FORMS

SPLITS = ("train", "valid", "test")
ANNOTATIONS = "_annotations.coco.json"
FEW = 3  # datasets that a message names
COCO_NAMES = {"train": "train", "valid": "val", "test": "test"}  # in instances_val2017.json


def find_splits(root: str | Path) -> dict[str, tuple[Path, Path]]:
    """Split name -> (annotation file, image folder), for "train", "valid" and "test".

    Takes ROOT/{train,valid,test}/_annotations.coco.json, else the standard COCO layout with its
    newest year.  Raises UserError where there is neither.
    """
    root = Path(root)
    splits = {}
    for name in SPLITS:
        file = root / name / ANNOTATIONS
        if file.exists():
            splits[name] = (file, file.parent)
    if not splits:
        splits = find_coco_splits(root)
    if not splits:
        raise UserError(no_dataset_message(root))
    return splits


def no_dataset_message(root: Path) -> str:
    """What lies in a folder instead of a dataset, and what to type or do."""
    message = f"no COCO dataset in {root}"
    near = nearby_datasets(root)
    if near:
        names = " or ".join(command_line("--dataset", folder) for folder in near)
        return f"{message}. There is one nearby: run the same command with {names}"
    form = find_form(root)
    if form:
        return f"{message} (it is {FORMS[form]}). Write it as COCO: {conversion_of(root)}"
    return (
        f"{message} ({describe_folder(root)}): expected train/_annotations.coco.json beside the "
        "images, or annotations/instances_train2017.json and train2017/. Name the right folder "
        "with --dataset"
    )


def nearby_datasets(root: Path) -> list[Path]:
    """Datasets in the folders above (a split or a file was named) or else just below `root`."""
    above = [folder for folder in list(root.parents)[:2] if holds_dataset(folder)]
    if above and root.exists():
        return above[:1]
    if not root.is_dir():
        return []
    below = [folder for folder in sorted(root.iterdir()) if holds_dataset(folder)]
    return below if len(below) <= FEW else []


def holds_dataset(folder: Path) -> bool:
    # os.path: a folder that may not be read is none
    has_split = any(os.path.exists(folder / name / ANNOTATIONS) for name in SPLITS)
    return has_split or bool(find_coco_splits(folder))


def find_coco_splits(root: Path) -> dict[str, tuple[Path, Path]]:
    """As find_splits: annotations/instances_train2017.json with (images/)train2017/."""
    splits = {}
    for name, coco_name in COCO_NAMES.items():
        for file in sorted((root / "annotations").glob(f"instances_{coco_name}*.json")):
            folder_name = file.stem.removeprefix("instances_")
            for folder in (root / "images" / folder_name, root / folder_name):
                if folder.is_dir():
                    splits[name] = (file, folder)  # of several years the last one stays
    return splits


def describe_folder(folder: Path) -> str:
    if not folder.is_dir():
        return "not a folder" if folder.exists() else "there is no such folder"
    return what_it_holds(folder)


def read_json(path: str | Path) -> dict:
    """A COCO annotation file in any Unicode encoding, with or without BOM.

    Raises UserError with line and column where it is no JSON object.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # reading a pipe would never end
            kind = kind_of_file(mode)
            raise UserError(f"{path}: not read, it is {kind}: put the annotation file there")
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:  # the latter: endless brackets
        before = raw[: getattr(error, "start", 0)]
        line = getattr(error, "lineno", before.count(b"\n") + 1)
        column = getattr(error, "colno", len(before) - before.rfind(b"\n"))
        raise no_annotation_file(path, line, column, str(error).split(":")[0]) from error
    if not isinstance(data, dict):
        fault = f"it holds a {type(data).__name__} instead of an object"
        raise no_annotation_file(path, 1, 1, fault)
    return data


def no_annotation_file(path: str | Path, line: int, column: int, fault: str) -> UserError:
    return UserError(
        f"{path}: line {line}, column {column}: not a COCO annotation file: {fault}. "
        "Was the export or download cut off? Export it again."
    )
