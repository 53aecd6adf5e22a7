"""A cleaned copy of a dataset: what training drops is dropped, what can be put right without a guess is put right.

The images are not copied but linked to. The original is only read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

from rfdetr.console import UserError, is_control
from rfdetr.data.annotations import clip_box, is_whole, usable_part
from rfdetr.data.checks import CocoSplit
from rfdetr.data.exif import exif_rule
from rfdetr.data.image_files import find_image, is_regular_file, stays_inside
from rfdetr.data.layout import find_splits, read_json
from rfdetr.masks import object_area

ROUNDS = (
    6  # a repair may bring another fault to light: two boxes may be the same once they are clipped
)
# not what the system refuses to read for the moment
UNREADABLE = {"IMG_MISSING", "IMG_TYPE", "IMG_CORRUPT", "IMG_BOMB"}
UNUSABLE = {  # annotations of which nothing is left to learn from
    *(
        "ANN_IMAGE_UNKNOWN",
        "ANN_CATEGORY_UNKNOWN",
        "ANN_CROWD_INVALID",
        "ANN_AREA_EMPTY",
        "ANN_DUPLICATE",
    ),
    *("ANN_BBOX_TYPE", "ANN_BBOX_NAN", "ANN_BBOX_EMPTY", "ANN_BBOX_OUTSIDE"),
}
NO_MASK_LEFT = {"ANN_SEG_TYPE", "ANN_SEG_NAN", "ANN_RLE_SIZE", "ANN_RLE_COUNTS", "ANN_RLE_TYPE"}
POLYGONS = {"ANN_POLYGON_SHORT", "ANN_POLYGON_ODD", "ANN_POLYGON_FAR"}


def fix_dataset(
    root: Path, out: Path, decode: bool, exif: str | None = None
) -> dict[str, dict[str, int]]:
    """Write OUT/<split>/_annotations.coco.json for all splits of `root`, with links to the images beside it.

    exif: as for coco.inspect_dataset; sizes that are written follow from it.
    Returns split -> {"CODE: what was done": how often}. What could not be repaired is still in the copy: check it.
    Raises UserError where `out` holds files or an annotation file is no JSON (then nothing is written), and OSError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--fix {out}: it exists already and is never written over: name a new or empty folder"
        )
    files = find_splits(root)
    rule = exif_rule([CocoSplit(*place) for place in files.values()], exif)
    cleaned = {name: clean(*files[name], decode, rule) for name in files}
    for name, (data, _) in cleaned.items():
        folder = files[name][1]
        (out / name).mkdir(parents=True)
        images = data["images"] if isinstance(data.get("images"), list) else []
        for entry in (entry for entry in images if isinstance(entry, dict)):
            file = entry.get("file_name")
            if stays_inside(file) and is_regular_file(source := find_image(folder, file)):
                entry["file_name"] = source.relative_to(folder).as_posix()
                link(source, out / name / entry["file_name"])
        with open(
            out / name / "_annotations.coco.json", "x", encoding="utf-8"
        ) as file:  # x: never through a link
            json.dump(data, file)
    return {name: dict(done) for name, (_, done) in cleaned.items()}


def clean(file: Path, folder: Path, decode: bool, exif: str = "apply") -> tuple[dict, Counter]:
    """(the repaired content of an annotation file, what was done how often).  exif: as for CocoSplit."""
    data, done = read_json(file), Counter()
    for turn in range(ROUNDS):
        before = done.total()
        split = CocoSplit(file, folder, decode and not turn, data, exif)
        if not all(
            isinstance(data.get(key), list) for key in ("categories", "images", "annotations")
        ):
            break
        for key in ("categories", "images", "annotations"):
            whole = [entry for entry in data[key] if isinstance(entry, dict)]
            done["JSON_STRUCTURE: dropped"] += len(data[key]) - len(whole)
            data[key] = whole
        _repair_categories(data, split, done)
        gone = _repair_images(data, split, folder, done)
        _repair_annotations(data, split, gone, done)
        if done.total() == before:
            break
    return data, +done


def link(source: Path, target: Path) -> None:
    """Make `target` a symbolic link to `source`, where the system has none a hard link, else a copy."""
    if os.path.lexists(target):  # two entries of one file
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    for make in (os.symlink, os.link):
        with contextlib.suppress(OSError, NotImplementedError):
            return make(source.resolve(), target)
    shutil.copyfile(source, target)


def _named(data: dict, table: str, key: str) -> set[str]:
    """The values of a key over a table, as text: they may be anything."""
    return {repr(entry.get(key)) for entry in data[table]}


def same_file_inside(folder: Path, name: object) -> str | None:
    """The plain path inside the folder of the very file that an odd file_name leads to; None where it leads elsewhere.

    Another file of the same name is never taken for it.
    """
    if type(name) is not str:
        return None
    try:
        file = find_image(folder, name)
        file = file.parent.resolve() / file.name
        plain = file.relative_to(folder.resolve()).as_posix()
    except (OSError, ValueError, RuntimeError):  # outside; a NUL in it; links that go round
        return None
    return plain if stays_inside(plain) and is_regular_file(file) else None


def _repair_categories(data: dict, split: CocoSplit, done: Counter) -> None:
    """Blanks in the place of what control characters a name holds, in those of parents alike."""
    for entry in data["categories"]:
        if "CAT_NAME_CONTROL" in split.blame.get(id(entry), ()):
            done["CAT_NAME_CONTROL: blanks are written"] += 1
            entry["name"] = without_controls(entry["name"])
        if isinstance(parent := entry.get("supercategory"), str) and any(map(is_control, parent)):
            entry["supercategory"] = without_controls(parent)


def without_controls(name: str) -> str:
    return " ".join(
        "".join(" " if is_control(character) else character for character in name).split()
    )


def _repair_images(data: dict, split: CocoSplit, folder: Path, done: Counter) -> set[int | str]:
    """Repair or drop the entries of images; returns the ids of the dropped ones."""
    kept, gone, known, used = [], set(), set(), _named(data, "annotations", "image_id")
    spare = 1 + max(
        (entry["id"] for entry in data["images"] if is_whole(entry.get("id"))), default=0
    )
    for entry in data["images"]:
        key = entry.get("id")
        record = split.listed.get(key) if type(key) in (int, str) else None
        if record and record.file_name != entry.get(
            "file_name"
        ):  # that of another entry with the same id
            record = None
        codes = split.blame.get(id(entry), set()) | split.blame.get(id(record), set())
        if "IMG_ID_DUPLICATE" in codes:
            if repr(entry) in known:
                done["IMG_ID_DUPLICATE: dropped, identical to another"] += 1
                continue
            if repr(key) not in used:
                done["IMG_ID_DUPLICATE: renumbered, no annotation uses them"] += 1
                entry["id"], spare = spare, spare + 1
        elif codes & UNREADABLE:
            done[f"{min(codes & UNREADABLE)}: dropped"] += 1
            gone.add(key)
            continue
        elif "IMG_ID_INVALID" in codes and repr(key) not in used:
            done["IMG_ID_INVALID: dropped, no annotation uses them"] += 1
            continue
        elif "IMG_PATH" in codes:
            name = same_file_inside(folder, entry.get("file_name"))
            if name:
                done["IMG_PATH: the same file's plain path is written"] += 1
                entry["file_name"] = name
        elif record and (
            "IMG_SIZE_INVALID" in codes or None in (entry.get("width"), entry.get("height"))
        ):
            done["Images without a size: the file's is written"] += 1
            entry["width"], entry["height"] = record.width, record.height
        kept.append(entry)
        known.add(repr(entry))
    data["images"] = kept
    return gone


def _repair_annotations(data: dict, split: CocoSplit, gone: set[int | str], done: Counter) -> None:
    kept, images, categories = [], _named(data, "images", "id"), _named(data, "categories", "id")
    spare = 1 + max(
        (entry["id"] for entry in data["annotations"] if is_whole(entry.get("id"))), default=0
    )
    for entry in data["annotations"]:
        codes, image_id = split.blame.get(id(entry), set()), entry.get("image_id")
        if type(image_id) in (int, str) and image_id in gone:
            done["Annotations of dropped images: dropped"] += 1
            continue
        if "ANN_CROWD_INVALID" in codes and entry["iscrowd"] in ("0", "1"):
            done["ANN_CROWD_INVALID: written as a number"] += 1
            entry["iscrowd"], codes = int(entry["iscrowd"]), codes - {"ANN_CROWD_INVALID"}
        # what its number belongs to is there, only not sound: the annotation is not to blame
        if repr(image_id) in images:
            codes = codes - {"ANN_IMAGE_UNKNOWN"}
        if repr(entry.get("category_id")) in categories:
            codes = codes - {"ANN_CATEGORY_UNKNOWN"}
        if codes & UNUSABLE:
            done[f"{min(codes & UNUSABLE)}: dropped"] += 1
            continue
        kept.append(entry)
        record = split.listed.get(image_id) if type(image_id) in (int, str) else None
        if not codes or record is None:
            continue
        for code in codes & {"ANN_ID_INVALID", "ANN_ID_DUPLICATE"}:
            done[f"{code}: renumbered"] += 1
            entry["id"], spare = spare, spare + 1
        for code in codes & NO_MASK_LEFT:
            done[f"{code}: the mask is dropped, the box stays"] += 1
            entry["segmentation"] = []
        for code in codes & POLYGONS:
            done[f"{code}: the polygon is dropped"] += 1
        if codes & POLYGONS:
            entry["segmentation"] = (
                usable_part(entry["segmentation"], record.width, record.height, {})[0] or []
            )
        if "ANN_BBOX_CLIPPED" in codes:
            done["ANN_BBOX_CLIPPED: clipped"] += 1
            x, y, right, bottom = clip_box(entry, record.width, record.height)[0]
            entry["bbox"] = [x, y, right - x, bottom - y]
        if "ANN_AREA_INVALID" in codes or (
            "ANN_BBOX_CLIPPED" in codes and not entry.get("segmentation")
        ):
            done["ANN_AREA_INVALID: computed"] += "ANN_AREA_INVALID" in codes
            entry["area"] = object_area(entry, record.height, record.width)
    data["annotations"] = kept
