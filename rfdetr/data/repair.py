"""A cleaned copy of a dataset: what training drops is dropped, what needs no guess is put right.

The images are not copied but linked to. The original is only read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from math import inf
from pathlib import Path

from rfdetr.data.annotation_checks import check_segmentation, clip_box
from rfdetr.data.checks import CheckedSplit, check_file, list_split
from rfdetr.data.exif import ExifDecision, SizedImage, decide_exif
from rfdetr.data.image_files import find_image, is_regular_file, near_file, stays_inside
from rfdetr.data.layout import ANNOTATIONS, COPY_NOTE, find_splits, read_json
from rfdetr.data.rectangles import is_rectangle
from rfdetr.files import require_free
from rfdetr.ids import is_whole, other_form
from rfdetr.masks import annotation_area
from rfdetr.renaming import class_names_of, entries_of, read_renames, rename_classes
from rfdetr.text import is_control, without_controls

# A repair may bring another fault to light: two boxes may be the same once they are clipped.
ROUNDS = 6
TABLES = ("categories", "images", "annotations")
# images that can never be read; not what the system refuses for the moment
UNREADABLE = {"IMG_MISSING", "IMG_TYPE", "IMG_CORRUPT", "IMG_BOMB"}
UNUSABLE = {  # annotations of which nothing is left to learn from
    "ANN_IMAGE_UNKNOWN",
    "ANN_CATEGORY_UNKNOWN",
    "ANN_CROWD_INVALID",
    "ANN_DUPLICATE",
    "ANN_BBOX_TYPE",
    "ANN_BBOX_NAN",
    "ANN_BBOX_EMPTY",
    "ANN_BBOX_OUTSIDE",
}
# where these are left, nobody knows what annotations of other ids belong to
CATEGORIES_IN_DOUBT = {"CAT_INVALID", "CAT_ID_DUPLICATE"}
IMAGES_IN_DOUBT = {"IMG_ID_INVALID", "IMG_ID_DUPLICATE"}
WRONG_ID = {"ANN_ID_INVALID", "ANN_ID_DUPLICATE"}
NO_MASK_LEFT = {"ANN_SEG_TYPE", "ANN_SEG_NAN", "ANN_RLE_SIZE", "ANN_RLE_COUNTS", "ANN_RLE_TYPE"}
POLYGONS = {"ANN_POLYGON_SHORT", "ANN_POLYGON_ODD", "ANN_POLYGON_FAR"}
REPAIRED = {  # all or some of what has these codes
    *UNREADABLE,
    *UNUSABLE,
    *WRONG_ID,
    *NO_MASK_LEFT,
    *POLYGONS,
    "JSON_STRUCTURE",
    "CAT_ID_TYPE",
    "CAT_NAME_CONTROL",
    "ANN_CATEGORY_TYPE",
    "ANN_IMAGE_TYPE",
    "IMG_ID_INVALID",
    "IMG_ID_TYPE",
    "IMG_ID_DUPLICATE",
    "IMG_PATH",
    "IMG_SIZE_INVALID",
}


def fix_dataset(
    root: Path,
    out: Path,
    decode: bool,
    exif: str | None = None,
    rename: Sequence[str] = (),
    drop_rectangles: bool = False,
) -> dict[str, dict[str, int]]:
    """Write OUT/<split>/_annotations.coco.json for all splits, with links to the images beside it.

    decode: read images as a whole, to drop the damaged ones.  exif, rename: as for
    coco.inspect_dataset; sizes and names that are written follow from them.  drop_rectangles:
    masks that are rectangles are left out.  Returns split ->
    {"CODE: what was done": how often}. What could not be repaired is still in the copy: check it.
    Raises UserError where `out` holds files, an annotation file is no JSON or `rename` names no
    class (then nothing is written), and OSError.
    """
    require_free(out, "--fix")
    files = find_splits(root)
    contents = {name: read_json(file) for name, (file, _) in files.items()}
    renames = read_renames(rename, {name: class_names_of(data) for name, data in contents.items()})
    listed = [list_split(*files[name], data=data) for name, data in contents.items()]
    decision = decide_exif(frozenset().union(*(split.proofs for split in listed)), exif)
    cleaned = {
        name: clean(contents.pop(name), *places, decode, decision, renames.new_of)
        for name, places in files.items()
    }
    for name, (data, done) in cleaned.items():
        if drop_rectangles:
            leave_out_rectangles(data, done)
        _, folder = files[name]
        write_split(data, folder, out / name, done)
    note = f"A cleaned copy of {root.absolute()}. Its images are links to those, not copies.\n"
    (out / COPY_NOTE).write_text(note, encoding="utf-8", errors="backslashreplace")
    return {name: dict(done) for name, (_, done) in cleaned.items()}


def leave_out_rectangles(data: dict, done: Counter) -> None:
    """Empty the segmentations that are one upright rectangle."""
    for entry in entries_of(data, "annotations"):
        if is_rectangle(entry.get("segmentation")):
            done["ANN_MASK_RECTANGLE: the mask is dropped, the box stays"] += 1
            entry["segmentation"] = []


def can_repair(codes: set[str]) -> bool:
    """Whether fix_dataset would change something in a dataset with faults of these codes."""
    consequences = set()  # of categories in doubt, which are left as they are
    if codes & CATEGORIES_IN_DOUBT:
        consequences = {"ANN_CATEGORY_UNKNOWN", "ANN_CATEGORY_TYPE"}
    return bool(codes & REPAIRED - consequences)


def write_split(data: dict, folder: Path, out: Path, done: Counter) -> None:
    """Write an annotation file into the new folder `out`, with links to its images in `folder`.

    done: what was done how often, as in `clean`.
    """
    out.mkdir(parents=True)
    images = data["images"] if isinstance(data.get("images"), list) else []
    for entry in images:
        if not isinstance(entry, dict) or not stays_inside(entry.get("file_name")):
            continue
        source = find_image(folder, entry["file_name"])
        if is_regular_file(source):
            plain = source.relative_to(folder).as_posix()
            if plain != entry["file_name"]:
                done["File names: written plainly, with /"] += 1
            entry["file_name"] = plain
            link(source, out / plain)
    with open(out / ANNOTATIONS, "x", encoding="utf-8") as file:  # x: never through a link
        json.dump(data, file)


def link(source: Path, target: Path) -> None:
    """Make `target` a link to `source`: symbolic, else hard, else a copy where there is neither."""
    if os.path.lexists(target):  # two entries of one file
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    for make_link in (os.symlink, os.link):
        with contextlib.suppress(OSError, NotImplementedError):
            make_link(source.resolve(), target)
            return
    shutil.copyfile(source, target)


def clean(
    data: dict,
    file: Path,
    folder: Path,
    decode: bool,
    exif: ExifDecision | None = None,
    renames: dict[str, str] | None = None,
) -> tuple[dict, Counter]:
    """(the content of an annotation file, repaired in place, what was done how often).

    exif: as for checks.check_file.  renames: old class name -> new class name.
    """
    done = Counter()
    if renames:
        done["--rename: categories with their new name"] += rename_classes(data, renames)
    for number in range(ROUNDS):
        before = done.total()
        is_first = number == 0
        split = check_file(file, folder, decode and is_first, data, exif)
        if not all(isinstance(data.get(key), list) for key in TABLES):
            break
        for key in TABLES:
            objects = [entry for entry in data[key] if isinstance(entry, dict)]
            done["JSON_STRUCTURE: dropped"] += len(data[key]) - len(objects)
            data[key] = objects
        repair_categories(data["categories"], split, done)
        dropped = repair_images(data, split, folder, done)
        repair_annotations(data, split, dropped, done)
        if done.total() == before:
            break
    return data, +done  # +: without zeros


def texts_of(table: list[dict], key: str) -> set[str]:
    """The values of a key over a table, as text: they may be anything."""
    return {repr(entry.get(key)) for entry in table}


def next_id(table: list[dict]) -> int:
    """The first of the numbers that no entry of a table has as its id."""
    ids = [entry["id"] for entry in table if is_whole(entry.get("id"))]
    return 1 + max(ids, default=0)


# ---------------------------------------------------------------- categories


def repair_categories(categories: list[dict], split: CheckedSplit, done: Counter) -> None:
    """Write numbers for ids that are texts or decimals, blanks for control characters in names,
    and in the names of parents, too.
    """
    is_clear = not split.faults.count("CAT_ID_DUPLICATE")  # else 1 and "1" may be two classes
    for entry in categories:
        if is_clear and "CAT_ID_TYPE" in split.faults.codes_of(entry):
            done["CAT_ID_TYPE: the number is written"] += 1
            entry["id"] = other_form(entry["id"])
        if "CAT_NAME_CONTROL" in split.faults.codes_of(entry):
            done["CAT_NAME_CONTROL: blanks are written"] += 1
            entry["name"] = without_controls(entry["name"])
        parent = entry.get("supercategory")
        if isinstance(parent, str) and any(map(is_control, parent)):
            entry["supercategory"] = without_controls(parent)


# ---------------------------------------------------------------- images


def repair_images(data: dict, split: CheckedSplit, folder: Path, done: Counter) -> set[int | str]:
    """Repair or drop the entries of images; returns the ids of those whose file cannot be read."""
    kept = []
    dropped = set()
    kept_texts = set()
    used_ids = texts_of(data["annotations"], "image_id")
    used_ids |= {repr(other_form(entry.get("image_id"))) for entry in data["annotations"]}
    listed_names = texts_of(data["images"], "file_name")
    spare_id = next_id(data["images"])
    for entry in data["images"]:
        if "IMG_ID_TYPE" in split.faults.codes_of(entry):
            done["IMG_ID_TYPE: the number is written"] += 1
            entry["id"] = other_form(entry["id"])
        image_id = entry.get("id")
        is_used = repr(image_id) in used_ids
        image = listed_image(split, entry)
        codes = split.faults.codes_of(entry) | split.faults.codes_of(image)
        near = near_name(folder, entry["file_name"]) if "IMG_MISSING" in codes else None
        if "IMG_ID_DUPLICATE" in codes:
            if repr(entry) in kept_texts:
                done["IMG_ID_DUPLICATE: dropped, identical to another"] += 1
                continue
            if not is_used:
                done["IMG_ID_DUPLICATE: renumbered, no annotation uses them"] += 1
                entry["id"] = spare_id
                spare_id += 1
        elif near and repr(near) not in listed_names:
            done["IMG_MISSING: the name of the file that is there is written"] += 1
            entry["file_name"] = near
            listed_names.add(repr(near))
        elif codes & UNREADABLE:
            done[f"{min(codes & UNREADABLE)}: dropped"] += 1
            dropped.add(image_id)
            continue
        elif "IMG_ID_INVALID" in codes and not is_used:
            done["IMG_ID_INVALID: dropped, no annotation uses them"] += 1
            continue
        elif "IMG_PATH" in codes:
            repair_file_name(entry, folder, done)
        elif image is not None:
            repair_size(entry, image, codes, done)
        kept.append(entry)
        kept_texts.add(repr(entry))
    data["images"] = kept
    return dropped


def near_name(folder: Path, file_name: str) -> str | None:
    """What a missing file's name would be if it were written as that of a file beside it."""
    missing = find_image(folder, file_name)
    near = near_file(missing)
    return near and missing.with_name(near).relative_to(folder).as_posix()


def listed_image(split: CheckedSplit, entry: dict) -> SizedImage | None:
    """The image of an entry; None where its id is another entry's."""
    image_id = entry.get("id")
    if type(image_id) not in (int, str):
        return None
    image = split.listed.get(image_id)
    if image is None or image.file_name != entry.get("file_name"):
        return None
    return image


def repair_file_name(entry: dict, folder: Path, done: Counter) -> None:
    name = same_file_inside(folder, entry.get("file_name"))
    if name:
        done["IMG_PATH: the same file's plain path is written"] += 1
        entry["file_name"] = name


def same_file_inside(folder: Path, name: object) -> str | None:
    """The plain path of the very file that an odd file_name leads to; None where it leads outside.

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


def repair_size(entry: dict, image: SizedImage, codes: set[str], done: Counter) -> None:
    lacks_a_side = None in (entry.get("width"), entry.get("height"))
    if lacks_a_side or "IMG_SIZE_INVALID" in codes:
        done["Images without a usable size: the file's is written"] += 1
        entry["width"] = image.width
        entry["height"] = image.height


# ---------------------------------------------------------------- annotations


def repair_annotations(
    data: dict, split: CheckedSplit, dropped: set[int | str], done: Counter
) -> None:
    """Repair or drop annotations; `dropped`: ids of images that are no longer there."""
    kept = []
    image_ids = texts_of(data["images"], "id")
    category_ids = texts_of(data["categories"], "id")
    spare_id = next_id(data["annotations"])
    wrong_image_ids = has_any(split, IMAGES_IN_DOUBT)
    wrong_category_ids = has_any(split, CATEGORIES_IN_DOUBT)
    for entry in data["annotations"]:
        codes = set(split.faults.codes_of(entry))
        if "ANN_CATEGORY_TYPE" in codes and not wrong_category_ids:
            done["ANN_CATEGORY_TYPE: the number is written"] += 1
            entry["category_id"] = other_form(entry["category_id"])
        if "ANN_IMAGE_TYPE" in codes and not wrong_image_ids:
            done["ANN_IMAGE_TYPE: the image's id is written"] += 1
            entry["image_id"] = other_form(entry["image_id"])
        image_id = entry.get("image_id")
        can_be_id = type(image_id) in (int, str)
        if can_be_id and image_id in dropped:
            done["Annotations of dropped images: dropped"] += 1
            continue
        if "ANN_CROWD_INVALID" in codes and entry["iscrowd"] in ("0", "1"):
            done["ANN_CROWD_INVALID: written as a number"] += 1
            entry["iscrowd"] = int(entry["iscrowd"])
            codes.remove("ANN_CROWD_INVALID")
        # what its id belongs to is there, only not sound, or may be: it is not to blame
        if repr(image_id) in image_ids or wrong_image_ids:
            codes.discard("ANN_IMAGE_UNKNOWN")
        if repr(entry.get("category_id")) in category_ids or wrong_category_ids:
            codes.discard("ANN_CATEGORY_UNKNOWN")
        if codes & UNUSABLE:
            done[f"{min(codes & UNUSABLE)}: dropped"] += 1
            continue
        kept.append(entry)
        image = split.listed.get(image_id) if can_be_id else None
        if not codes or image is None:
            continue
        for code in sorted(codes & WRONG_ID):
            done[f"{code}: renumbered"] += 1
            entry["id"] = spare_id
            spare_id += 1
        repair_mask(entry, image, codes, done)
        repair_box_and_area(entry, image, codes, done)
    data["annotations"] = kept


def has_any(split: CheckedSplit, codes: set[str]) -> bool:
    return any(split.faults.count(code) for code in codes)


def repair_mask(entry: dict, image: SizedImage, codes: set[str], done: Counter) -> None:
    for code in sorted(codes & NO_MASK_LEFT):
        done[f"{code}: the mask is dropped, the box stays"] += 1
        entry["segmentation"] = []
    for code in sorted(codes & POLYGONS):
        done[f"{code}: the polygon is dropped"] += 1
    if codes & POLYGONS:
        mask = check_segmentation(entry["segmentation"], image.width, image.height, sums={})
        entry["segmentation"] = mask.usable or []


def repair_box_and_area(entry: dict, image: SizedImage, codes: set[str], done: Counter) -> None:
    is_clipped = "ANN_BBOX_CLIPPED" in codes
    is_invalid = "ANN_AREA_INVALID" in codes
    if is_clipped:
        done["ANN_BBOX_CLIPPED: clipped"] += 1
        (x, y, right, bottom), _ = clip_box(entry, image.width, image.height)
        entry["bbox"] = [x, y, right - x, bottom - y]
    if is_invalid:
        done["ANN_AREA_INVALID: computed"] += 1
    if is_invalid and image.shorter_side == inf:  # to be computed where the size is known
        del entry["area"]
    elif is_invalid or (is_clipped and not entry.get("segmentation")):
        entry["area"] = annotation_area(entry, image.height, image.width)
