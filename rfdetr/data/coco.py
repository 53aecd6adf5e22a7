"""COCO datasets: one record per image, labels 0..N-1, the ground truth for scoring, pixels and masks.

The faults of each file are found by `validation.py` in one pass; what is built here is sound.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils

from rfdetr.console import UserError
from rfdetr.data.validation import NO_MASKS, ImageRecord, Problem, SplitCheck, find_splits, placeholders, raise_errors
from rfdetr.metrics.overlap import to_rle


@dataclass
class CocoSplit:
    """One split. Labels index `class_names` and `category_ids`; all splits of a dataset have the same `class_names`."""

    name: str  # "train", "valid" or "test"
    annotation_file: Path
    class_names: list[str]
    category_ids: list[int]  # this split's own; an unused number for a class that its file does not list
    left_out: list[str]  # placeholder categories
    images: list[ImageRecord]
    ground_truth: dict  # COCO dict for the evaluator: pycocotools gives the same figures on it and on the file
    warnings: list[str]

    def __post_init__(self):
        """Count the objects to train on, crowd regions left out: per image, per class, all, with masks."""
        triples = [zip(image.labels, image.segmentations, image.crowd) for image in self.images]
        objects = [[(label, mask) for label, mask, crowd in image if not crowd] for image in triples]
        self.per_image = [len(image) for image in objects]
        labels = Counter(label for image in objects for label, _ in image)
        self.per_class = [labels[label] for label in range(len(self.class_names))]
        self.object_count = sum(self.per_image)
        self.mask_count = sum(mask is not None for image in objects for _, mask in image)


def read_dataset(root: str | Path, val_fraction: float | None = None) -> dict[str, CocoSplit]:
    """Check and read all splits of a dataset: "train", "valid" and, where it exists, "test".

    Without a valid split `val_fraction` (0..1, exclusive) of train's images become one, chosen by a hash of their
    names, so that the choice stays when the file is written in another order.  Raises UserError for any error of the
    data, with the command that lists them all.
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction {val_fraction}: expected a number above 0 and below 1, 0.1 for example")
    splits, problems = inspect_dataset(root, val_fraction)
    raise_errors(problems, root)
    if "valid" not in splits:
        splits["train"], splits["valid"] = _divide(splits["train"], val_fraction)
    return {name: splits[name] for name in ("train", "valid", "test") if name in splits}


def inspect_dataset(
    root: Path, val_fraction: float | None = None, need_masks: bool = False, decode: bool = False, queries: int = 300
) -> tuple[dict[str, CocoSplit], list[Problem]]:
    """Check all splits once: (split name -> what is usable, all problems with errors first).

    `val_fraction` makes a missing valid/ no error; `need_masks` makes missing masks one; `decode`: open images
    wholly and compare contents between splits; `queries`: the objects that the model can find in one image.
    """
    checks: dict[str, SplitCheck] = {}
    problems: list[Problem] = []

    def error(code: str, message: object) -> None:
        problems.append(Problem(code, "error", str(message), 1, [str(root)]))

    try:
        files = find_splits(root)
    except UserError as fault:
        error("DATASET_LAYOUT", fault)
        return {}, problems
    for name, (file, folder) in files.items():
        try:
            checks[name] = SplitCheck(file, folder, decode)
        except UserError as fault:
            error("JSON_INVALID", fault)
    if "train" not in files:
        error("SPLIT_TRAIN_MISSING", f"{root} has no train split: training needs one")
    if "valid" not in files and not val_fraction:
        error("SPLIT_VALID_MISSING", f"{root} has no valid split: add one, or split train/ with --val_fraction 0.1")
    splits = build_splits(checks)
    for name, split in splits.items():
        check, train, objects = checks[name], splits.get("train"), split.object_count
        if need_masks and objects and not split.mask_count:
            error("MASKS_NONE", NO_MASKS.format(split.annotation_file, objects))
        for image, count in zip(split.images, split.per_image):
            check.fault("IMG_MANY_OBJECTS", f"image {image.id}: {count}, queries: {queries}", count > queries)
        check.fault("SPLIT_FRACTION_UNUSED", name, name == "valid" and val_fraction is not None)
        check.fault("SPLIT_EMPTY", f"{name}: {len(split.images)} images", not objects and check.sound)
        if split is train:
            check.raised.add("SPLIT_EMPTY")
        elif train:
            # where train has errors, what is missing there may be their effect
            for class_name, here, there in zip(split.class_names, split.per_class, train.per_class):
                check.fault("CLASS_NOT_IN_TRAIN", repr(class_name), here and not there and checks["train"].sound)
            known = {image.digest for image in train.images if image.digest}
            for image in split.images:
                check.fault("IMG_SHARED", image.path.name, image.digest in known)
        split.warnings = check.warnings
    problems = [item for check in checks.values() for item in check.problems] + problems
    return splits, sorted(problems, key=lambda item: item.severity)


def build_splits(checks: dict[str, SplitCheck]) -> dict[str, CocoSplit]:
    """Number the classes, and give the checks' records labels, and arrays for lists.

    Labels follow the first split's ascending category ids; classes that only later splits annotate come after. Splits
    are matched by name, they may number their categories differently. A placeholder has no annotation in any split.
    """
    used = {split: {entry["category_id"] for entry in check.annotations} for split, check in checks.items()}
    listed = [entry for check in checks.values() for entry in check.categories]
    left_out = placeholders(listed, set().union(*used.values()))
    names: list[str] = []
    own: dict[str, dict[str, int]] = {}  # split -> name -> id
    for split, check in checks.items():
        pairs = sorted({(entry["id"], entry["name"]) for entry in check.categories} - left_out)
        names += [name for key, name in pairs if name not in names and (not own or key in used[split])]
        own[split] = {name: key for key, name in pairs}
    spare = 1 + max((entry["id"] for entry in listed), default=0)
    splits = {}
    for split, check in checks.items():
        ids = [own[split].get(name, spare + label) for label, name in enumerate(names)]
        label_of = {entry["id"]: names.index(entry["name"]) for entry in check.categories if entry["name"] in names}
        images = list(check.images.values())
        for image in images:
            image.boxes = np.array(image.boxes, np.float32).reshape(-1, 4)
            image.labels = np.array([label_of[category] for category in image.labels], np.int64)
            image.crowd = np.array(image.crowd, bool)
        for entry in (entry for entry in check.annotations if entry["area"] is None):
            image, mask = check.images[entry["image_id"]], entry.get("segmentation")
            width, height = entry["bbox"][2:]
            entry["area"] = float(mask_utils.area(to_rle(mask, image.height, image.width))) if mask else width * height
        truth = {
            "images": [{key: getattr(i, key) for key in ("id", "file_name", "width", "height")} for i in images],
            "annotations": check.annotations,
            "categories": [{"id": key, "name": name} for key, name in zip(ids, names)],
        }
        unused = sorted({name for _, name in left_out})
        splits[split] = CocoSplit(split, check.file, names, ids, unused, images, truth, check.warnings)
    return splits


def _divide(split: CocoSplit, fraction: float) -> tuple[CocoSplit, CocoSplit]:
    """(train, valid) parts of a split: those images whose names' hashes come first are valid. Train keeps one."""

    def part(name: str, images: list[ImageRecord], warnings: list[str]) -> CocoSplit:
        ids, truth = {image.id for image in images}, dict(split.ground_truth)
        for table, key in (("images", "id"), ("annotations", "image_id")):
            truth[table] = [entry for entry in truth[table] if entry[key] in ids]
        return replace(split, name=name, images=images, ground_truth=truth, warnings=warnings)

    order = sorted(split.images, key=lambda i: hashlib.sha256(i.file_name.encode(errors="replace")).digest())
    count = min(max(round(fraction * len(order)), 1), len(order) - 1)
    notes = [] if count else [f"{split.annotation_file}: too few images for a valid split: it is empty"]
    return part("train", order[count:], split.warnings), part("valid", order[:count], notes)


def load_image(record: ImageRecord) -> np.ndarray:
    """The pixels, (H, W, 3) uint8 RGB, turned as `record.exif` says; of animated images the first frame.

    Raises UserError naming the file where it cannot be decoded or has changed its size since it was checked.
    """
    try:
        with Image.open(record.path) as image:
            pixels = to_rgb_array(ImageOps.exif_transpose(image) if record.exif else image)
    except Exception as error:  # Pillow's readers raise anything from OSError to struct.error on damaged files
        message = f"{record.path}: cannot be read as an image: {error}. Replace it or delete its entry"
        raise UserError(message) from error
    if pixels.shape[:2] != (record.height, record.width):
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise UserError(f"{record.path}: {size} pixels, the annotations say {record.width}x{record.height}")
    return pixels


def to_rgb_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8. Gray of more than 8 bits is scaled by its range: 0..1, 0..255, 0..65535 or its own maximum."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        gray = np.nan_to_num(np.asarray(image, np.float64).clip(0))
        top = gray.max(initial=0)
        full = 65535 if image.mode.startswith("I;16") else next((n for n in (1, 255, 65535) if top <= n), top)
        gray = (gray * (255 / full)).round().clip(0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("P", "PA"):  # a palette's transparency may be bytes, which only RGBA takes
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def rasterise(segmentation: list | dict, height: int, width: int, out_height: int, out_width: int) -> np.ndarray:
    """A sound COCO segmentation of a (height, width) image as (out_height, out_width) uint8 0/1.

    Polygons are scaled first and drawn at the output's size. RLEs are decoded and averaged over each output pixel's
    area, which is set from a half on.
    """
    if isinstance(segmentation, list):
        scale = np.array([out_width / width, out_height / height])
        polygons = [(np.reshape(polygon, (-1, 2)) * scale).ravel().tolist() for polygon in segmentation]
        return mask_utils.decode(to_rle(polygons, out_height, out_width))
    mask = mask_utils.decode(to_rle(segmentation, height, width))
    if (height, width) == (out_height, out_width):
        return mask
    resized = Image.fromarray(mask * np.uint8(255)).resize((out_width, out_height), Image.Resampling.BOX)
    return (np.asarray(resized) >= 128).astype(np.uint8)
