"""COCO datasets: one record per image, labels 0..N-1, the ground truth for scoring, pixels and masks.

The faults of each file are found by `validation.py` in one pass; what is built here is sound.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from copy import copy
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rfdetr.console import UserError, tick
from rfdetr.data import faults as validation
from rfdetr.data.faults import CocoSplit, ImageRecord, Problem
from rfdetr.masks import object_area
from rfdetr.text import printable

SEEN = 8  # pixels: smaller objects, half a patch of most sizes, are hardly seen
SMALL_SHARE = 0.2  # of a split's objects; more are worth a warning
COCO_SIDES = {
    "small": 32,
    "medium": 96,
    "large": np.inf,
}  # pixels, up to where COCO calls an object so


UNTURN = {  # EXIF orientation -> what undoes its being applied
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def read_dataset(
    root: str | Path, val_fraction: float | None = None, queries: int = 300, exif: str | None = None
) -> dict[str, CocoSplit]:
    """Check and read all splits of a dataset: "train", "valid" and, where it exists, "test".

    Without a valid split `val_fraction` (0..1, exclusive) of train's images become one, chosen by a hash of their
    names, so that the choice stays when the file is written in another order.  `queries`: the objects that the model
    can find in one image.  exif: as for inspect_dataset; what was decided is printed where images are turned or
    mirrored.  Raises UserError for any error of the data, with the command that lists them all.
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(
            f"--val_fraction {val_fraction}: expected a number above 0 and below 1, 0.1 for example"
        )
    splits, problems = inspect_dataset(root, val_fraction, queries=queries, exif=exif)
    validation.raise_errors(problems, root)
    if note := exif_note(splits, exif):
        tick(note)
    return {name: splits[name] for name in ("train", "valid", "test") if name in splits}


def inspect_dataset(
    root: Path,
    val_fraction: float | None = None,
    need_masks: bool = False,
    decode: bool = False,
    queries: int = 300,
    exif: str | None = None,
) -> tuple[dict[str, CocoSplit], list[Problem]]:
    """Check all splits once: (split name -> what is usable, all problems with errors first).

    `val_fraction` makes a missing valid/ no error; `need_masks` makes missing masks one; `decode`: open images
    wholly and compare contents between splits; `queries`: the objects that the model can find in one image; exif:
    "apply" or "ignore" the EXIF orientation of images where no size of the dataset tells, by default apply.
    """
    splits: dict[str, CocoSplit] = {}
    problems: list[Problem] = []

    def error(code: str, message: object) -> None:
        problems.append(Problem(code, "error", str(message), 1, [str(root)]))

    try:
        files = validation.find_splits(root)
    except UserError as fault:
        error("DATASET_LAYOUT", fault)
        return {}, problems
    for name, (file, folder) in files.items():
        try:
            splits[name] = CocoSplit(file, folder, decode)
        except UserError as fault:
            error("JSON_INVALID", fault)
    if "train" not in files:
        error("SPLIT_TRAIN_MISSING", f"{root} has no train split: training needs one")
    if "valid" not in files and not val_fraction:
        error(
            "SPLIT_VALID_MISSING",
            f"{root} has no valid split: add one, or split train/ with --val_fraction 0.1",
        )
    settle_exif(splits, {name: folder for name, (_, folder) in files.items()}, decode, exif)
    number_classes(splits)
    if val_fraction and "train" in splits and "valid" not in files:
        splits["train"], splits["valid"] = _divide(splits["train"], val_fraction)
    train = splits.get("train")
    for name, split in splits.items():
        if not split.mask_count:  # boxes alone may be all that is wanted
            split.places.pop("ANN_NO_MASK", None)
            if need_masks and split.object_count:
                error(
                    "MASKS_NONE",
                    validation.NO_MASKS.format(split.annotation_file, split.object_count),
                )
        for image, count in zip(split.images, split.per_image):
            place = f"image {image.id} ({image.file_name}): {count}, queries: {queries}"
            split.fault("IMG_MANY_OBJECTS", place, count > queries)
        split.fault(
            "SPLIT_FRACTION_UNUSED",
            name,
            name == "valid" and name in files and val_fraction is not None,
        )
        split.fault(
            "SPLIT_EMPTY",
            f"{name}: {len(split.images)} images",
            not split.object_count and split.sound,
        )
        if split is train:
            split.raised.add("SPLIT_EMPTY")
        elif train:
            # where train has errors, what is missing there may be their effect
            for class_name, here, there in zip(split.class_names, split.per_class, train.per_class):
                split.fault(
                    "CLASS_NOT_IN_TRAIN", repr(class_name), here and not there and train.sound
                )
            known = {image.digest: image.file_name for image in train.images if image.digest}
            for image in split.images:
                place = f"{image.file_name} = train's {known.get(image.digest)}"
                split.fault("IMG_SHARED", place, image.digest in known)
    problems += [problem for split in splits.values() for problem in split.problems]
    return splits, sorted(problems, key=lambda problem: problem.severity)


def number_classes(splits: dict[str, CocoSplit]) -> None:
    """Number the classes of checked splits, and make the arrays of their images' objects.

    Labels follow the first split's ascending category ids; classes that only later splits annotate come after. Splits
    are matched by name, they may number their categories differently. A placeholder has no annotation in any split.
    """
    used = {
        n: {a["category_id"] for image in split.images for a in image.annotations}
        for n, split in splits.items()
    }
    listed = [entry for split in splits.values() for entry in split.categories]
    left_out = validation.placeholders(listed, set().union(*used.values()))
    names: list[str] = []
    own: dict[str, dict[str, int]] = {}  # split -> name -> id
    for name, split in splits.items():
        pairs = sorted({(entry["id"], entry["name"]) for entry in split.categories} - left_out)
        names += [
            title for key, title in pairs if title not in names and (not own or key in used[name])
        ]
        own[name] = {title: key for key, title in pairs}
    spare = 1 + max((entry["id"] for entry in listed), default=0)
    for name, split in splits.items():
        split.class_names, split.left_out = names, sorted({title for _, title in left_out})
        split.category_ids = [
            own[name].get(title, spare + label) for label, title in enumerate(names)
        ]
        label_of = {
            entry["id"]: names.index(entry["name"])
            for entry in split.categories
            if entry["name"] in names
        }
        for image in split.images:
            for entry in (entry for entry in image.annotations if entry["area"] is None):
                entry["area"] = object_area(entry, image.height, image.width)
            image.boxes = np.array([entry["box"] for entry in image.objects], np.float32).reshape(
                -1, 4
            )
            image.labels = np.array(
                [label_of[entry["category_id"]] for entry in image.objects], np.int64
            )
            image.segmentations = [entry["segmentation"] for entry in image.objects]
        split.count()


def object_sides(split: CocoSplit, resolution: int) -> np.ndarray:
    """(objects,) the square roots of the boxes' areas in pixels, once the images are `resolution` pixels square."""
    scaled = [
        (r.boxes[:, 2:] - r.boxes[:, :2]) * (resolution / np.array([r.width, r.height]))
        for r in split.images
    ]
    return np.sqrt(np.concatenate([np.zeros((0, 2)), *scaled]).prod(axis=1))


def small_objects(split: CocoSplit, resolution: int, step: int) -> list[Problem]:
    """A warning where many objects are too small to be seen, with the resolution, a multiple of `step`, that helps."""
    sides = object_sides(split, resolution)
    if not len(sides) or (share := (sides < SEEN).mean()) <= SMALL_SHARE:
        return []
    better = (
        -int(-resolution * SEEN / np.quantile(sides, SMALL_SHARE, method="higher") // step) * step
    )
    objects = [(entry, image) for image in split.images for entry in image.objects]
    small = np.flatnonzero(sides < SEEN)
    message = (
        f"{split.annotation_file}: {len(small)} annotations ({share:.0%}) are smaller than {SEEN} x {SEEN} pixels at "
        f"{resolution} px, hardly seen: --resolution {better} leaves {SMALL_SHARE:.0%} so; tiles of the images help too"
    )
    places = [
        f"annotation {entry['id']} of image {image.id} ({image.file_name}): {sides[i]:.1f} px"
        for i, (entry, image) in ((i, objects[i]) for i in small[:20])
    ]
    return [Problem("ANN_SMALL", "warning", message, len(small), places)]


def _divide(split: CocoSplit, fraction: float) -> tuple[CocoSplit, CocoSplit]:
    """(train, valid) parts of a split: those images whose names' hashes come first are valid. Train keeps one.

    All entries of one file are in the same part, where the first of them by its hash belongs.
    """
    hashed = [
        (hashlib.sha256(i.file_name.encode(errors="replace")).digest(), i) for i in split.images
    ]
    hashed.sort(key=lambda pair: pair[0])
    files: dict[object, list[ImageRecord]] = {}
    for _, image in hashed:
        files.setdefault(_file_of(image), []).append(image)
    count = min(max(round(fraction * len(hashed)), 1), len(hashed) - 1)
    order, groups = [], list(files.values())
    while len(groups) > 1 and len(order) < count:
        order += groups.pop(0)
    count = len(order)
    order += [image for group in groups for image in group]
    train, valid = copy(split), copy(split)
    train.images, valid.images, valid.places, valid.raised = order[count:], order[:count], {}, set()
    for part in (train, valid):
        part.count()
    return train, valid


def _file_of(image: ImageRecord) -> object:
    """What two entries of one file have in common, under whatever names and links."""
    try:
        status = image.path.stat()
    except OSError:
        return os.path.normpath(image.path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(image.path)


def exif_rule(splits: Iterable[CocoSplit], wanted: str | None) -> str:
    """ "apply" or "ignore": what holds for the EXIF orientation of all of a dataset's images whose size does not tell.

    It is what the sizes of its other images prove; else `wanted`, by default to apply it.
    """
    proofs = _exif_proofs(splits)
    if len(proofs) == 1:
        return "apply" if proofs == {True} else "ignore"
    return wanted or "apply"


def _exif_proofs(splits: Iterable[CocoSplit]) -> set[bool]:
    return {image.exif_proof for split in splits for image in split.images} - {None}


def settle_exif(
    splits: dict[str, CocoSplit], folders: dict[str, Path], decode: bool, wanted: str | None
) -> None:
    """Decide for a whole dataset what its images' EXIF orientation means, as `exif_rule`, and note what is doubtful.

    A split is read again where sizes that its file leaves out follow from that.
    """
    rule, proofs = exif_rule(splits.values(), wanted), _exif_proofs(splits.values())
    for name, split in splits.items():
        turned = [
            image for image in split.images if image.orientation > 1 and image.exif_proof is None
        ]
        sizeless = any(image.orientation >= 5 and image.width != image.height for image in turned)
        if sizeless and rule != split.exif:
            splits[name] = split = CocoSplit(
                split.annotation_file, folders[name], decode, exif=rule
            )
        split.exif = rule
        for image in (image for image in split.images if image.orientation > 1):
            if image.exif_proof is None:
                image.exif = rule == "apply"
            place = f"{image.path}: orientation {image.orientation}, {'applied' if image.exif else 'ignored'}"
            split.fault("IMG_EXIF_UNKNOWN", place, image.exif_proof is None and len(proofs) != 1)
            split.fault("IMG_EXIF_MIXED", place, image.exif_proof is False and len(proofs) == 2)


def exif_note(splits: dict[str, CocoSplit], wanted: str | None) -> str:
    """One sentence on what was decided about EXIF orientation; empty where no image has one."""
    turned = [image for split in splits.values() for image in split.images if image.orientation > 1]
    if not turned:
        return ""
    rule = next(iter(splits.values())).exif
    done = {"apply": "applied", "ignore": "ignored"}[rule]
    note = f"EXIF orientation: {len(turned)} images have one, "
    if len(_exif_proofs(splits.values())) != 1:
        return note + f"it is {done} where sizes do not tell (--exif {rule})"
    proven = sum(image.exif_proof is not None for image in turned)
    note += f"the sizes of {proven} prove that it is to be {done}: so it is for all"
    return note + (f" (--exif {wanted} is not used)" if wanted not in (None, rule) else "")


def load_image(record: ImageRecord) -> np.ndarray:
    """The pixels, (H, W, 3) uint8 RGB, turned as `record.exif` says; of animated images the first frame.

    Raises UserError naming the file where it cannot be decoded or has changed its size since it was checked.
    """
    pixels = read_pixels(record.path, record.exif)
    if pixels.shape[:2] != (record.height, record.width):
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise UserError(
            f"{printable(record.path)}: {size} pixels, the annotations say {record.width}x{record.height}"
        )
    return pixels


def read_pixels(path: str | Path, turn: bool) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB; turn: as for `oriented`.  UserError if it is unreadable."""
    try:
        with Image.open(path, formats=validation.FORMATS) as image:
            return to_rgb_array(oriented(image, turn))
    except (
        Exception
    ) as error:  # Pillow's readers raise anything from OSError to struct.error on damaged files
        message = f"{printable(path)}: cannot be read as an image: {error}. Replace it or delete its entry"
        raise UserError(message) from error


def oriented(image: Image.Image, turn: bool) -> Image.Image:
    """An image upright by its EXIF orientation where `turn` is True, else with its pixels as they are stored."""
    if turn:
        return ImageOps.exif_transpose(image)
    orientation = image.tag_v2.get(validation.ORIENTATION) if image.format == "TIFF" else 1
    if orientation not in UNTURN:
        return image
    image.load()  # Pillow turns TIFFs while it loads them
    return image.transpose(UNTURN[orientation])


def to_rgb_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8. Gray of more than 8 bits is scaled by its range: 0..1, 0..255, 0..65535 or its own maximum."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        gray = np.nan_to_num(np.asarray(image, np.float64).clip(0))
        top = gray.max(initial=0)
        full = (
            65535
            if image.mode.startswith("I;16")
            else next((n for n in (1, 255, 65535) if top <= n), top)
        )
        gray = (gray * (255 / full)).round().clip(0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("P", "PA"):  # a palette's transparency may be bytes, which only RGBA takes
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
