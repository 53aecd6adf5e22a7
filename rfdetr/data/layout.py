"""Where the files of a dataset lie, and what an annotation file holds."""

from __future__ import annotations

import difflib
import json
import os
import stat
from pathlib import Path

from rfdetr.console import UserError
from rfdetr.data.formats.detect import conversion_of, find_form, subfolders
from rfdetr.data.image_files import kind_of_file
from rfdetr.files import what_it_holds
from rfdetr.text import command_line, with_article
from rfdetr.tool_settings import FORMS

SPLITS = ("train", "valid", "test")
ANNOTATIONS = "_annotations.coco.json"
COPY_NOTE = "cleaned_copy.txt"  # in a folder that --fix has written
FEW = 3  # datasets that a message names
JSON_FAULTS = {  # what Python's json says -> the same in words
    "Unterminated string starting": "the text that begins there does not end",
    "Invalid control character": "a line break or another control character inside a text",
    "Invalid \\escape": "a backslash inside a text that is not written as two",
    "Invalid \\uXXXX escape": "a \\u without four hexadecimal digits",
    "Expecting value": "a value is missing, or what stands there is none",
    "Expecting ',' delimiter": "a comma or a closing bracket is missing",
    "Expecting ':' delimiter": "a colon is missing",
    "Expecting property name enclosed in double quotes": "a name in double quotes is missing",
    "Illegal trailing comma before end of array": "a comma without anything behind it",
    "Illegal trailing comma before end of object": "a comma without anything behind it",
    "Extra data": "there is more behind its end",
}
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


def has_val_folder(root: str | Path) -> bool:
    """Whether a valid split is there under the name that other programs give it."""
    return (Path(root) / "val" / ANNOTATIONS).exists()


def no_dataset_message(root: Path) -> str:
    """What lies in a folder instead of a dataset, and what to type or do."""
    if root.name in ("", ".."):  # a dot alone is hard to tell from the end of the sentence
        root = Path(os.path.abspath(root))
    message = f"no COCO dataset in {root}"
    meant = similar_datasets(root)
    if meant:
        names = " or ".join(command_line("--dataset", folder) for folder in meant)
        return f"{message} ({describe_folder(root)}). Did you mean {names}?"
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


def similar_datasets(root: Path) -> list[Path]:
    """Datasets beside a folder that does not exist, with a name like its own."""
    if root.exists():
        return []
    names = [folder.name for folder in subfolders(root.parent) if holds_dataset(folder)]
    return [root.parent / name for name in difflib.get_close_matches(root.name, names, n=FEW)]


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
        raise no_annotation_file(path, line, column, in_words(error)) from error
    if not isinstance(data, dict):
        fault = f"it holds {with_article(type(data).__name__)} instead of an object"
        raise no_annotation_file(path, 1, 1, fault)
    return data


def in_words(error: ValueError | RecursionError) -> str:
    """What is wrong with a file that json does not read, without the place."""
    if isinstance(error, json.JSONDecodeError):
        fault = JSON_FAULTS.get(error.msg.removesuffix(" at"), error.msg)
        is_at_the_end = not error.doc[error.pos :].strip()
        return f"{fault} (the file ends there)" if is_at_the_end else fault
    if isinstance(error, UnicodeDecodeError):
        return f"its bytes are no {error.encoding} text there: {error.reason}"
    if isinstance(error, RecursionError):
        return "its brackets are nested too deep"
    return str(error).split(":")[0]


def no_annotation_file(path: str | Path, line: int, column: int, fault: str) -> UserError:
    return UserError(
        f"{path}: line {line}, column {column}: not a COCO annotation file: {fault}. "
        "Was the export or download cut off? Export it again."
    )
