"""Where the files of a dataset lie, and the content of an annotation file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from rfdetr.console import UserError
from rfdetr.data.image_files import kind_of_file


def read_json(path: str | Path) -> dict:
    """A COCO annotation file; any Unicode encoding, with or without BOM.  Raises UserError with line and column."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a pipe would never end
            raise UserError(
                f"{path}: not read, it is {kind_of_file(mode)}: put the annotation file there"
            )
        raw = Path(path).read_bytes()
        data = json.loads(raw)
        if isinstance(data, dict):
            return data
        line, column, fault = 1, 1, f"it holds a {type(data).__name__} instead of an object"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # the latter: endless brackets
        before, fault = raw[: getattr(error, "start", 0)], str(error).split(":")[0]
        line = getattr(error, "lineno", before.count(b"\n") + 1)
        column = getattr(error, "colno", len(before) - before.rfind(b"\n"))
    advice = "Was the export or download cut off? Export it again."
    raise UserError(
        f"{path}: line {line}, column {column}: not a COCO annotation file: {fault}. {advice}"
    )


def find_splits(root: str | Path) -> dict[str, tuple[Path, Path]]:
    """Split name -> (annotation file, image folder), of "train", "valid" and "test" those that exist.

    Takes ROOT/{train,valid,test}/_annotations.coco.json, else the standard COCO layout with its newest year.
    Raises UserError where there is neither.
    """
    root, found = Path(root), {}
    for split in ("train", "valid", "test"):
        if (file := root / split / "_annotations.coco.json").exists():
            found[split] = file, file.parent
    for split, short in () if found else (("train", "train"), ("valid", "val"), ("test", "test")):
        for file in sorted((root / "annotations").glob(f"instances_{short}*.json")):
            name = file.stem.removeprefix("instances_")
            for folder in filter(Path.is_dir, (root / "images" / name, root / name)):
                found[split] = file, folder
    if not found:
        names = sorted(entry.name for entry in root.iterdir())[:10] if root.is_dir() else []
        state = f"there is: {', '.join(names) or 'nothing'}" if root.is_dir() else "not a folder"
        raise UserError(
            f"no COCO dataset in {root} ({state}): expected train/_annotations.coco.json beside the images, or "
            "annotations/instances_train2017.json and train2017/. Another folder is named with --dataset"
        )
    return found
