"""What is wrong with a dataset: every fault at once, with stable codes, before any of it reaches C code or a model.

pycocotools reads uninitialised memory or hangs on numbers it does not expect, so nothing here calls it. The same pass
decides what is dropped or clipped (`SplitCheck.annotations`); `coco.py` builds its records from that and looks no more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from rfdetr.console import UserError, tick, warn

if TYPE_CHECKING:
    from rfdetr.data.coco import CocoSplit

LIMIT = 1e7  # pixels; beyond it a coordinate is absurd, and pycocotools would allocate in proportion to it
SLACK = 0.1  # pixels a box may stand out before it is worth a word: many tools round to one decimal
THINNEST = 1e-3  # pixels; thinner boxes vanish in float32
PLACES = 20  # listed per problem
QUERIES = 300  # objects that the official sizes can find in one image
ORIENTATION = 0x0112  # EXIF tag: 2-4 mirror or turn by 180 degrees, 5-8 also swap width and height
NO_MASKS = "No segmentation masks found in COCO annotations"

# Above this Pillow warns, above twice this it raises, and only that counts as a decompression bomb here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# code: (severity, "3 annotations ...", what to do or what was done). The noun comes from the code's first word.
CODES: dict[str, tuple[str, str, str]] = {
    "JSON_STRUCTURE": ("error", "where COCO has something else", "compare the file with the COCO format"),
    "CAT_INVALID": ("error", "without a whole number as id or without a text as name", "give it both"),
    "CAT_ID_DUPLICATE": ("error", "with the id of another", "give each its own id"),
    "CAT_NAME_DUPLICATE": ("error", "with the name of another", "merge or rename them"),
    "IMG_ID_INVALID": ("error", "without a whole number or a text as id", "give each its own id"),
    "IMG_ID_DUPLICATE": ("error", "with the id of another", "give each its own id"),
    "IMG_FILE_DUPLICATE": ("warning", "with the file of another", "merge the entries and their annotations"),
    "IMG_PATH": ("error", "whose file_name is no plain path inside the dataset", "write it relative, without .."),
    "IMG_MISSING": ("error", "whose file is missing", "put the files there or delete their entries"),
    "IMG_CORRUPT": ("warning", "that cannot be read", "replace the files or delete their entries; training skips them"),
    "IMG_BOMB": ("error", "with too many pixels (a decompression bomb?)", "scale them down or delete their entries"),
    "IMG_SIZE_INVALID": ("error", "whose width or height is no whole number above 0", "write the image's size"),
    "IMG_SIZE": ("error", "of another size than the annotations say", "export them again from the same images"),
    "IMG_EXIF": ("warning", "with an EXIF rotation that agrees with the annotated size", "rotated when read"),
    "IMG_LINK": ("warning", "behind symbolic links", "followed"),
    "IMG_MANY_OBJECTS": ("warning", f"with more than {QUERIES} objects", "no size finds more in one image"),
    "IMG_SHARED": ("warning", "that train has too (equal content)", "scores on them say little"),
    "ANN_ID_INVALID": ("error", "without a whole number as id", "give each its own id"),
    "ANN_ID_DUPLICATE": ("error", "with the id of another", "give each its own id"),
    "ANN_DUPLICATE": ("warning", "identical to another", "one of each is kept"),
    "ANN_IMAGE_UNKNOWN": ("error", "of an image_id that is not under images", "add the image or delete them"),
    "ANN_CATEGORY_UNKNOWN": ("error", "of a category_id that is not under categories", "add the category"),
    "ANN_CROWD_INVALID": ("error", "with an iscrowd other than 0 or 1", "write 0 or 1"),
    "ANN_AREA_INVALID": ("error", "with an area that is no finite number", "correct it or leave it out"),
    "ANN_AREA_EMPTY": ("warning", "with an area of 0 or less", "dropped"),
    "ANN_BBOX_TYPE": ("error", "whose bbox is not a list of 4 numbers", "write [x, y, width, height] in pixels"),
    "ANN_BBOX_NAN": ("error", "with a NaN, infinite or absurd (> 1e7) bbox", "correct or delete them"),
    "ANN_BBOX_EMPTY": ("warning", "with a bbox of no width or height", "dropped"),
    "ANN_BBOX_OUTSIDE": ("warning", "with a bbox wholly outside the image", "dropped"),
    "ANN_BBOX_CLIPPED": ("warning", "with a bbox partly outside the image", "clipped"),
    "ANN_SEG_TYPE": ("error", "whose segmentation is neither lists of numbers nor an RLE", "export the masks again"),
    "ANN_SEG_NAN": ("error", "with a NaN, infinite or absurd (> 1e7) polygon", "correct or delete them"),
    "ANN_POLYGON_SHORT": ("warning", "with a polygon of less than 3 points", "the polygon is dropped"),
    "ANN_POLYGON_ODD": ("warning", "with a polygon of an odd number of coordinates", "the polygon is dropped"),
    "ANN_POLYGON_FAR": ("warning", "with a polygon that leads far outside the image", "its points are moved closer"),
    "ANN_RLE_SIZE": ("error", "with an RLE of another size than the image", "export the masks again"),
    "ANN_RLE_COUNTS": ("error", "with RLE runs that do not sum to height x width", "export the masks again"),
    "ANN_RLE_TYPE": ("error", "whose RLE counts are neither a text nor whole numbers", "export the masks again"),
    "ANN_NO_MASK": ("warning", "without a usable mask", "they give no mask loss"),
    "SPLIT_EMPTY": ("warning", "without a usable object", "it gives nothing to train on and no scores"),
    "SPLIT_FRACTION_UNUSED": ("warning", "that exists already", "--val_fraction is not used"),
    "CLASS_NOT_IN_TRAIN": ("warning", "without an annotation in train", "nothing can learn them"),
}
NOUNS = {
    "JSON": ("place", "places"),
    "CAT": ("category", "categories"),
    "IMG": ("image", "images"),
    "ANN": ("annotation", "annotations"),
    "CLASS": ("class", "classes"),
    "SPLIT": ("split", "splits"),
}
Progress = Callable[[list], Iterable]  # wraps a list as tqdm does


@dataclass(frozen=True)
class Problem:
    """One kind of fault in one file: a stable `code`, "error" or "warning", a sentence, how often and where first."""

    code: str
    severity: str
    message: str
    count: int = 1
    places: list[str] = field(default_factory=list)


class Findings:
    """The faults of one file: code -> places."""

    def __init__(self, file: Path):
        self.file = file
        self.places: dict[str, list[str]] = {}
        self.raised: set[str] = set()  # codes that are errors here though CODES says warning

    def add(self, code: str, place: str) -> None:
        self.places.setdefault(code, []).append(place[:200])

    def problems(self) -> list[Problem]:
        """Worded, errors first."""
        out = []
        for code, places in self.places.items():
            severity, what, then = CODES[code]
            noun = NOUNS[code.split("_")[0]][len(places) > 1]
            first = ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")
            message = f"{self.file}: {len(places)} {noun} {what} ({first}): {then}"
            severity = "error" if code in self.raised else severity
            out.append(Problem(code, severity, message, len(places), places[:PLACES]))
        return sorted(out, key=lambda problem: problem.severity)


@dataclass
class ImageFile:
    """One image entry. Pixels as the annotations mean them, None while unknown; `exif`: rotate when reading."""

    id: int | str
    file_name: str
    width: int | None
    height: int | None
    path: Path = Path()
    exif: bool = False


class Annotation(NamedTuple):
    """A sound annotation: xyxy pixels inside the image, or None where it is dropped; None where it has no mask.

    Dropped ones stay in the evaluator's ground truth, so that pycocotools gives the same figures on the original file.
    """

    entry: dict
    box: tuple[float, float, float, float] | None
    segmentation: list | dict | None


@dataclass
class SplitCheck:
    """What one annotation file holds once its faults are known. Unreadable images are left out already."""

    name: str
    found: Findings
    categories: list[dict]
    images: dict[int | str, ImageFile]
    annotations: list[Annotation]

    def objects(self) -> list[Annotation]:
        """The annotations to train on: neither dropped nor crowd regions."""
        return [item for item in self.annotations if item.box is not None and not item.entry.get("iscrowd")]

    def sound(self) -> bool:
        """Whether no error was found so far."""
        return all(problem.severity == "warning" for problem in self.found.problems())

    def class_counts(self) -> Counter[str]:
        """Class name -> objects."""
        names = {entry["id"]: entry["name"] for entry in self.categories}
        return Counter(names[item.entry["category_id"]] for item in self.objects())

    def mask_count(self) -> int:
        """Objects with a mask."""
        return sum(item.segmentation is not None for item in self.objects())


def read_json(path: Path) -> dict:
    """A COCO annotation file; any Unicode encoding, with or without BOM.  Raises UserError with line and column."""
    position, fault = (1, 1), ""
    try:
        raw = Path(path).read_bytes()
        data = json.loads(raw)
        fault = "" if isinstance(data, dict) else f"it holds a {type(data).__name__} instead of an object"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        position, fault = (error.lineno, error.colno), error.msg if raw.strip() else "the file is empty"
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        position, fault = (before.count(b"\n") + 1, len(before) - before.rfind(b"\n")), f"not {error.encoding} text"
    except (ValueError, RecursionError) as error:  # an endless number, endless brackets
        fault = str(error).split(";")[0]
    if fault:
        line, column = position
        raise UserError(
            f"{path}: line {line}, column {column}: not a COCO annotation file: {fault}. "
            "Was the export or download cut off? Export it again."
        )
    return data


def find_splits(root: str | Path) -> dict[str, tuple[Path, Path]]:
    """Split name -> (annotation file, image folder), of "train", "valid" and "test" those that exist.

    Takes ROOT/{train,valid,test}/_annotations.coco.json, else the standard COCO layout with its newest year.
    Raises UserError where there is neither.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"dataset folder {root} {'is a file' if root.exists() else 'not found'}: name it with --dataset"
        )
    found = {}
    for split in ("train", "valid", "test"):
        file = root / split / "_annotations.coco.json"
        if file.is_file():
            found[split] = (file, file.parent)
    if found:
        return found
    for split, short in (("train", "train"), ("valid", "val"), ("test", "test")):
        for file in sorted((root / "annotations").glob(f"instances_{short}*.json")):
            folder = file.stem.removeprefix("instances_")
            for images in (root / "images" / folder, root / folder):
                if images.is_dir():
                    found[split] = (file, images)
    if not found:
        inside = ", ".join(sorted(entry.name for entry in root.iterdir())[:10]) or "nothing"
        raise UserError(
            f"no COCO dataset in {root}: expected train/_annotations.coco.json beside the images, or "
            f"annotations/instances_train2017.json and train2017/. There is: {inside}"
        )
    return found


def check_annotations(data: dict, file: str | Path) -> list[Problem]:
    """Every fault of a parsed COCO file that shows without its images (sizes are believed), errors first."""
    return _inspect(data, "", Findings(Path(file))).found.problems()


def check_dataset(
    root: str | Path, val_fraction: float | None = None, need_masks: bool = False, check_images: bool = False
) -> list[Problem]:
    """Every problem of a dataset, errors first.  Arguments as `inspect_dataset`; a missing dataset is a problem too."""
    try:
        return inspect_dataset(root, val_fraction, need_masks, check_images)[1]
    except UserError as error:
        return [Problem("DATASET_LAYOUT", "error", str(error), 1, [str(root)])]


def inspect_dataset(
    root: str | Path,
    val_fraction: float | None = None,
    need_masks: bool = False,
    check_images: bool = False,
    progress: Progress = iter,
) -> tuple[dict[str, SplitCheck], list[Problem]]:
    """Check all splits once: (split name -> what is usable, all problems with errors first).

    `val_fraction` makes a missing valid/ no error; `need_masks` makes missing masks one; `check_images` decodes every
    image and compares contents between splits.  Raises UserError only where `root` holds no dataset at all.
    """
    checks: dict[str, SplitCheck] = {}
    problems: list[Problem] = []

    def problem(code: str, severity: str, message: str) -> None:
        problems.append(Problem(code, severity, message, 1, [str(root)]))

    files = find_splits(root)
    for name, (file, folder) in files.items():
        try:
            checks[name] = inspect_split(file, folder, name, check_images, progress)
        except UserError as error:
            problem("JSON_INVALID", "error", str(error))
    if "train" not in files:
        problem("SPLIT_TRAIN_MISSING", "error", f"{root} has no train split: training needs one")
    if "valid" not in files and not val_fraction:
        advice = "add valid/_annotations.coco.json, or split train/ with --val_fraction 0.1"
        problem("SPLIT_VALID_MISSING", "error", f"{root} has no valid split: {advice}")
    sound_train = "train" in checks and checks["train"].sound()  # else what is missing there is another fault's effect
    for split, check in checks.items():
        found, objects = check.found, check.objects()
        if need_masks and objects and not check.mask_count():
            problem("MASKS_NONE", "error", _no_masks(found.file, len(objects)))
        if split == "valid" and val_fraction:
            found.add("SPLIT_FRACTION_UNUSED", split)
        if not objects and check.sound():
            found.add("SPLIT_EMPTY", f"{split}: {len(check.images)} images")
            if split == "train":
                found.raised.add("SPLIT_EMPTY")
        if split != "train" and sound_train:
            for name in sorted(check.class_counts().keys() - checks["train"].class_counts().keys()):
                found.add("CLASS_NOT_IN_TRAIN", repr(name))
        if split != "train" and "train" in checks and check_images:
            for path in _shared(checks["train"], check):
                found.add("IMG_SHARED", path.name)
    problems = [item for check in checks.values() for item in check.found.problems()] + problems
    return checks, sorted(problems, key=lambda item: item.severity)


def inspect_split(
    annotation_file: Path, image_dir: Path, name: str, decode: bool = False, progress: Progress = iter
) -> SplitCheck:
    """Check one annotation file and the headers (`decode`: all pixels) of its images.  Raises UserError if no JSON."""
    return _inspect(read_json(annotation_file), name, Findings(annotation_file), Path(image_dir), decode, progress)


def raise_errors(problems: list[Problem], root: Path) -> None:
    """Raise one UserError for the first error, with the number of other kinds and the command that lists them."""
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        others = f"; and {len(errors) - 1} more kinds of errors" if len(errors) > 1 else ""
        place = f'"{root}"' if " " in str(root) else root
        see = f"To see everything at once run: python validate_setup.py --dataset {place}"
        raise UserError(f"{errors[0].message.rstrip('.')}{others}. {see}")


def require_masks(split: CocoSplit) -> None:
    """Print how many of up to 10 sampled annotations have masks, warn where some lack them; UserError if all do."""
    masks = [
        seg is not None for i in split.images for seg, crowd in zip(i.segmentations, i.crowd, strict=True) if not crowd
    ]
    if not any(masks):
        raise UserError(_no_masks(split.annotation_file, len(masks)))
    sample = [masks[i] for i in np.linspace(0, len(masks) - 1, min(10, len(masks))).astype(int)]
    tick(f"Validated: {sum(sample)}/{len(sample)} sample annotations contain segmentation masks")
    lacking = len(masks) - sum(masks)
    if lacking:
        warn(f"{split.annotation_file}: {lacking} of {len(masks)} annotations have no mask: they give no mask loss")


def _no_masks(file: Path, objects: int) -> str:
    return (
        f"{NO_MASKS}: {file}: 0 of {objects} annotations have a usable segmentation. Stage 2 and single-stage training "
        "need polygons or RLE: export the dataset with masks. Stage 1 works on boxes alone."
    )


def _inspect(
    data: dict, name: str, found: Findings, folder: Path | None = None, decode: bool = False, progress: Progress = iter
) -> SplitCheck:
    """All checks of one parsed file in their order; without `folder` no image is opened."""
    tables = []
    for key in ("categories", "images", "annotations"):
        entries = data.get(key)
        if not isinstance(entries, list):
            found.add("JSON_STRUCTURE", f"no list {key!r}")
            entries = []
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                found.add("JSON_STRUCTURE", f"{key}[{index}] is a {type(entry).__name__}")
        tables.append([entry for entry in entries if isinstance(entry, dict)])
    categories, images = _check_categories(tables[0], tables[2], found), _check_images(tables[1], found)
    unreadable = set() if folder is None else _check_files(images, folder, found, decode, progress)
    annotations = _check_annotations(tables[2], images, unreadable, {entry["id"] for entry in categories}, found)
    images = {key: image for key, image in images.items() if key not in unreadable}
    check = SplitCheck(name, found, categories, images, annotations)
    _check_objects(check.objects(), found)
    return check


def _whole(value: object) -> bool:
    """A whole number that float64 holds exactly: pycocotools keeps ids in such arrays. Excludes true and false."""
    return type(value) is int and abs(value) < 2**53


def placeholders(categories: Iterable[dict], used: set[int]) -> set[tuple[int, str]]:
    """(id, name) of the categories whose id is not in `used` and that are the supercategory of another one."""
    parents = {(entry["id"], entry["name"]): str(entry.get("supercategory")) for entry in categories}
    children = Counter(parents.values())
    return {
        (key, name)
        for (key, name), parent in parents.items()
        if key not in used and children[name] > (parent == name)  # its own supercategory does not count
    }


def _check_categories(entries: list[dict], annotations: list[dict], found: Findings) -> list[dict]:
    good: dict[int, dict] = {}
    for index, entry in enumerate(entries):
        if not _whole(entry.get("id")) or not isinstance(entry.get("name"), str):
            found.add("CAT_INVALID", f"categories[{index}]: id {entry.get('id')!r}, name {entry.get('name')!r}")
        elif entry["id"] in good:
            found.add("CAT_ID_DUPLICATE", f"id {entry['id']}")
        else:
            good[entry["id"]] = entry
    # Labelling tools give the placeholder the name of the class where there is but one, so it does not count.
    used = {entry.get("category_id") for entry in annotations if _whole(entry.get("category_id"))}
    left_out = placeholders(good.values(), used)
    names = Counter(entry["name"] for key, entry in good.items() if (key, entry["name"]) not in left_out)
    for name in (name for name, times in names.items() if times > 1):
        found.add("CAT_NAME_DUPLICATE", repr(name))
    return list(good.values())


def _check_images(entries: list[dict], found: Findings) -> dict[int | str, ImageFile]:
    images: dict[int | str, ImageFile] = {}
    files: set[str] = set()
    for index, entry in enumerate(entries):
        key, file = entry.get("id"), entry.get("file_name")
        place = f"image {key!r} {file!r}"
        if not _whole(key) and type(key) is not str:
            found.add("IMG_ID_INVALID", f"images[{index}] {file!r}")
            continue
        if key in images:
            found.add("IMG_ID_DUPLICATE", place)
        if type(file) is not str or not file or _leads_outside(file):
            found.add("IMG_PATH", place)
        elif file in files:
            found.add("IMG_FILE_DUPLICATE", place)
        sides = []
        for side in (entry.get("width"), entry.get("height")):
            if isinstance(side, float) and side.is_integer():
                side = int(side)
            if side is not None and not (_whole(side) and side > 0):
                found.add("IMG_SIZE_INVALID", place)
                side = None
            sides.append(side)
        files.add(str(file))
        images[key] = ImageFile(key, str(file), *sides)
    return images


def _leads_outside(name: str) -> bool:
    """True for `..`, absolute and UNC paths and drive letters, as any system would read them."""
    return ".." in re.split(r"[\\/]", name) or bool(re.match(r"[\\/]|[A-Za-z]:", name)) or "\0" in name


def _check_files(
    images: dict[int | str, ImageFile], folder: Path, found: Findings, decode: bool, progress: Progress
) -> set[int | str]:
    """Open every image: fills `path`, `exif` and missing sizes in, returns the ids of those that cannot be read."""
    safe = [image for image in images.values() if image.file_name and not _leads_outside(image.file_name)]
    for image in safe:
        image.path = folder / image.file_name
        if "\\" in image.file_name and not image.path.exists():
            image.path = folder / image.file_name.replace("\\", "/")
    unreadable, linked = set(), folder.is_symlink()
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        headers = pool.map(lambda image: _read_header(image, decode), safe)
        for image, header in zip(progress(safe), headers, strict=True):
            place = f"{image.path}"
            if linked or image.path.is_symlink():
                found.add("IMG_LINK", place)
            if isinstance(header, Exception):
                if isinstance(header, FileNotFoundError | NotADirectoryError):
                    found.add("IMG_MISSING", place)
                elif isinstance(header, Image.DecompressionBombError):
                    found.add("IMG_BOMB", place)
                else:
                    found.add("IMG_CORRUPT", f"{place}: {header}")
                unreadable.add(image.id)
                continue
            width, height, orientation = header
            turned = (height, width) if orientation >= 5 else (width, height)
            image.exif = orientation > 1 and (image.width or turned[0], image.height or turned[1]) == turned
            if image.exif:
                found.add("IMG_EXIF", place)
                width, height = turned
            image.width, image.height = image.width or width, image.height or height
            if (image.width, image.height) != (width, height):
                found.add("IMG_SIZE", f"{place}: {image.width}x{image.height}, the file has {width}x{height}")
    corrupt = len(found.places.get("IMG_CORRUPT", ()))
    if decode or (corrupt > 3 and corrupt > len(images) / 100):
        found.raised.add("IMG_CORRUPT")
    return unreadable


def _read_header(image: ImageFile, decode: bool) -> tuple[int, int, int] | Exception:
    """(width, height, EXIF orientation) as stored, or what went wrong; `decode` reads all pixels too."""
    try:
        with Image.open(image.path) as picture:
            size, orientation = picture.size, 1
            # Pillow turns TIFFs by itself. For a PNG without EXIF in front of its pixels getexif() decodes them all.
            if picture.format != "TIFF" and ("exif" in picture.info or (image.width, image.height) != size):
                try:
                    orientation = picture.getexif().get(ORIENTATION, 1)
                except Exception:  # damaged EXIF in a sound image
                    orientation = 1
            if decode:
                picture.load()
        return *size, orientation if orientation in range(1, 9) else 1
    except Exception as error:  # Pillow's readers raise anything from OSError to struct.error on damaged files
        return error


def _shared(train: SplitCheck, other: SplitCheck) -> list[Path]:
    """The files of `other` whose bytes are also in train; only files of equal length and size are read."""

    def by_size(check: SplitCheck) -> dict[tuple, list[Path]]:
        groups: dict[tuple, list[Path]] = {}
        for image in check.images.values():
            if image.path.is_file():
                groups.setdefault((image.path.stat().st_size, image.width, image.height), []).append(image.path)
        return groups

    mine, shared = by_size(train), []
    for key, paths in by_size(other).items():
        hashes = {hashlib.sha256(path.read_bytes()).digest() for path in mine.get(key, [])}
        shared += [path for path in paths if hashes and hashlib.sha256(path.read_bytes()).digest() in hashes]
    return shared


def _check_annotations(
    entries: list[dict], images: dict, unreadable: set[int | str], categories: set[int], found: Findings
) -> list[Annotation]:
    """The sound annotations; those of unreadable images are left out."""
    good: list[Annotation] = []
    ids: dict[int, dict] = {}
    twins: dict[tuple, dict] = {}
    for entry in entries:
        key, image_id = entry.get("id"), entry.get("image_id")
        place = f"annotation {key} of image {image_id}"
        if not _whole(key):
            found.add("ANN_ID_INVALID", place)
        elif ids.setdefault(key, entry) is not entry:
            if ids[key] == entry:
                found.add("ANN_DUPLICATE", place)
                continue
            found.add("ANN_ID_DUPLICATE", place)
        if entry.get("iscrowd") not in (0, 1, None):
            found.add("ANN_CROWD_INVALID", place)
        category = entry.get("category_id")
        if type(category) is not int or category not in categories:
            category = None
            found.add("ANN_CATEGORY_UNKNOWN", place)
        image = images.get(image_id) if type(image_id) in (int, str) else None
        if image is None:
            found.add("ANN_IMAGE_UNKNOWN", place)
        box, fault = _clip(entry, image)
        if fault:
            found.add(fault, place)
        segmentation = _usable_segmentation(entry.get("segmentation"), image, place, found)
        if fault and CODES[fault][0] == "error" or category is None or image is None or image_id in unreadable:
            continue
        twin = twins.setdefault((image_id, category, *entry["bbox"]), entry)
        if twin is not entry and all(twin.get(name) == entry.get(name) for name in ("segmentation", "iscrowd")):
            found.add("ANN_DUPLICATE", place)
            box = None
        good.append(Annotation(entry, box, segmentation))
    return good


def _check_objects(objects: list[Annotation], found: Findings) -> None:
    """What shows only in all objects together."""
    if any(item.segmentation is not None for item in objects):
        for entry in (item.entry for item in objects if item.segmentation is None):
            found.add("ANN_NO_MASK", f"annotation {entry.get('id')} of image {entry['image_id']}")
    for image_id, count in Counter(item.entry["image_id"] for item in objects).items():
        if count > QUERIES:
            found.add("IMG_MANY_OBJECTS", f"image {image_id}: {count}")


def _number_fault(values: list) -> str | None:
    """ "TYPE" where something is no number, "NAN" where one is not finite or absurd.  `values` is not empty."""
    try:
        finite = -math.inf < sum(values) < math.inf  # NaN and inf survive a sum; min and max alone may miss NaN
        return None if finite and -LIMIT <= min(values) and max(values) <= LIMIT else "NAN"
    except TypeError:
        return "TYPE"
    except OverflowError:  # a whole number beyond float64
        return "NAN"


def _clip(entry: dict, image: ImageFile | None) -> tuple[tuple[float, float, float, float] | None, str | None]:
    """(xyxy box inside the image, or None where the annotation falls out; fault code, if any)."""
    box, area = entry.get("bbox"), entry.get("area")
    fault = _number_fault(box) if type(box) is list and len(box) == 4 else "TYPE"
    if fault:
        return None, f"ANN_BBOX_{fault}"
    x, y, w, h = box
    if w < THINNEST or h < THINNEST:
        return None, "ANN_BBOX_EMPTY"
    if area is not None:
        if type(area) not in (int, float) or not abs(area) <= LIMIT**2:
            return None, "ANN_AREA_INVALID"
        if area <= 0:
            return None, "ANN_AREA_EMPTY"
    right, bottom = (image and image.width) or math.inf, (image and image.height) or math.inf
    clipped = max(x, 0), max(y, 0), min(x + w, right), min(y + h, bottom)
    if clipped[2] - clipped[0] < THINNEST or clipped[3] - clipped[1] < THINNEST:
        return None, "ANN_BBOX_OUTSIDE"
    stands_out = max(-x, -y, x + w - right, y + h - bottom) > SLACK
    return clipped, "ANN_BBOX_CLIPPED" if stands_out else None


def _usable_segmentation(
    segmentation: object, image: ImageFile | None, place: str, found: Findings
) -> list | dict | None:
    """The sound part of a segmentation, None if nothing is."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        faults = [_polygon_fault(polygon) for polygon in segmentation]
        good = [polygon for polygon, fault in zip(segmentation, faults, strict=True) if not fault]
        # pycocotools walks along every edge, which takes gigabytes for one that leads millions of pixels away.
        far = 2 * max(image.width, image.height) if image and image.width and image.height else math.inf
        if any(max(polygon) > far or min(polygon) < -far for polygon in good):
            faults.append("ANN_POLYGON_FAR")
            good = [[min(max(value, -far), far) for value in polygon] for polygon in good]
    else:
        faults = [_rle_fault(segmentation, image) if isinstance(segmentation, dict) else "ANN_SEG_TYPE"]
        good = None if faults[0] else segmentation
    for fault in set(faults) - {None}:
        found.add(fault, place)
    return good or None


def _polygon_fault(polygon: object) -> str | None:
    if type(polygon) is not list:
        return "ANN_SEG_TYPE"
    if len(polygon) % 2:
        return "ANN_POLYGON_ODD"
    if len(polygon) < 6:  # pycocotools would take 4 numbers for a box
        return "ANN_POLYGON_SHORT"
    fault = _number_fault(polygon)
    return fault and f"ANN_SEG_{fault}"


def _rle_fault(rle: dict, image: ImageFile | None) -> str | None:
    size, runs = rle.get("size"), rle.get("counts")
    if type(size) is not list or len(size) != 2 or not all(_whole(side) and side > 0 for side in size):
        return "ANN_RLE_SIZE"
    if image and image.width and image.height and size != [image.height, image.width]:
        return "ANN_RLE_SIZE"
    if type(runs) is str:
        runs = decompress_runs(runs)
    elif type(runs) is not list or any(type(run) is not int for run in runs):
        return "ANN_RLE_TYPE"
    return None if runs and min(runs) >= 0 and sum(runs) == size[0] * size[1] else "ANN_RLE_COUNTS"


def decompress_runs(counts: str) -> list[int]:
    """The runs of a compressed COCO RLE, in no particular order; empty where the text is none.

    Numbers of 5 bits a character, lowest first, offset 48; bit 5: goes on; bit 4 of the last: sign. From the fourth on
    a number is the difference to the run two before.  Source of the format: pycocotools' maskApi.c, rleFrString.
    """
    numbers = _RLE_NUMBER.findall(counts)
    if not numbers or sum(map(len, numbers)) != len(counts):
        return []
    values = list(map(_RLE_VALUES.__getitem__, numbers))
    return [values[0], *accumulate(values[1::2]), *accumulate(values[2::2])]


# At most 6 characters, 30 bits: the C code's shifts hold no more.
_RLE_NUMBER = re.compile(r"[P-o]{0,5}[0-O]")


class _RleValues(dict):
    """Text of a number -> its value, short ones kept: several times quicker than decoding each character."""

    def __missing__(self, number: str) -> int:
        bits = [ord(char) - 48 for char in number]
        value = sum((bit & 31) << 5 * place for place, bit in enumerate(bits))
        value -= 1 << 5 * len(bits) if bits[-1] & 16 else 0
        if len(number) <= 3:
            self[number] = value
        return value


_RLE_VALUES = _RleValues()
