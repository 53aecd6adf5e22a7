"""COCO datasets: one record per image, labels 0..N-1, the ground truth for scoring, pixels and masks.

The faults are found by `validation.py` in one pass; what is built here is sound.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils

from rfdetr.console import UserError
from rfdetr.data.validation import (
    Annotation,
    ImageFile,
    SplitCheck,
    find_splits,
    inspect_dataset,
    inspect_split,
    placeholders,
    raise_errors,
    read_json,
)

__all__ = [
    "CocoSplit",
    "ImageRecord",
    "class_table",
    "find_splits",
    "load_image",
    "rasterise",
    "read_dataset",
    "read_json",
    "read_split",
    "to_rgb_array",
]


@dataclass
class ImageRecord:
    """One image and its objects. Sizes and boxes in pixels as the annotations mean them."""

    id: int | str  # the dataset's own
    path: Path
    width: int
    height: int
    boxes: np.ndarray  # (n, 4) float32 xyxy, inside the image
    labels: np.ndarray  # (n,) int64, 0..N-1
    crowd: np.ndarray  # (n,) bool
    segmentations: list[list | dict | None]  # n raw COCO polygons or RLE, None where missing or unusable
    annotation_ids: np.ndarray  # (n,) int64
    exif: bool = False  # the file is stored rotated or mirrored; load_image undoes it


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

    @property
    def object_count(self) -> int:
        """Annotations to train on, crowd regions not counted."""
        return sum(int((~image.crowd).sum()) for image in self.images)

    @property
    def mask_count(self) -> int:
        """Those of them that have a mask."""
        pairs = (zip(image.segmentations, image.crowd, strict=True) for image in self.images)
        return sum(seg is not None and not crowd for pair in pairs for seg, crowd in pair)

    @property
    def has_masks(self) -> bool:
        return self.mask_count > 0


def read_split(annotation_file: str | Path, image_dir: str | Path, name: str) -> CocoSplit:
    """Read one annotation file alone; `read_dataset` also makes the classes of all splits agree.

    Raises UserError for any error of faults.md, with the command that lists them all.
    """
    check = inspect_split(Path(annotation_file), Path(image_dir), name)
    # Both layouts keep the file two levels below the dataset.
    raise_errors(check.found.problems(), Path(annotation_file).parent.parent)
    return _splits({name: check})[name]


def read_dataset(root: str | Path, val_fraction: float | None = None) -> dict[str, CocoSplit]:
    """Check and read all splits of a dataset: "train", "valid" and, where it exists, "test".

    Without a valid split `val_fraction` (0..1, exclusive) of train's images become one, chosen by a hash of their
    names, so that the choice stays when the file is written in another order.  Raises UserError, as `read_split`.
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction {val_fraction}: expected a number above 0 and below 1, 0.1 for example")
    checks, problems = inspect_dataset(root, val_fraction)
    raise_errors(problems, Path(root))
    splits = _splits(checks)
    if "valid" not in splits:
        train, valid = _divide(splits["train"], val_fraction)
        splits = {**splits, "train": train, "valid": valid}
    return {name: splits[name] for name in ("train", "valid", "test") if name in splits}


def class_table(checks: dict[str, SplitCheck]) -> tuple[list[str], dict[str, list[int]], list[str]]:
    """(label -> name, split -> its label -> category id, names of placeholders left out).

    Labels follow the first split's ascending category ids; classes that only later splits annotate come after. Splits
    are matched by name, they may number their categories differently. A placeholder has no annotation in any split.
    """
    used = {split: {item.entry["category_id"] for item in check.annotations} for split, check in checks.items()}
    listed = [entry for check in checks.values() for entry in check.categories]
    left_out = placeholders(listed, set().union(*used.values()))
    names: list[str] = []
    own: dict[str, dict[str, int]] = {}  # split -> name -> id
    for split, check in checks.items():
        pairs = sorted({(entry["id"], entry["name"]) for entry in check.categories} - left_out)
        names += [name for key, name in pairs if name not in names and (not own or key in used[split])]
        own[split] = {name: key for key, name in pairs}
    spare = 1 + max((entry["id"] for entry in listed), default=0)
    ids = {split: [own[split].get(name, spare + label) for label, name in enumerate(names)] for split in checks}
    return names, ids, sorted({name for _, name in left_out})


def _splits(checks: dict[str, SplitCheck]) -> dict[str, CocoSplit]:
    """Build the records and the ground truth of checked splits."""
    names, ids, left_out = class_table(checks)
    splits = {}
    for split, check in checks.items():
        label_of = {key: label for label, key in enumerate(ids[split])}
        by_image: dict[int | str, list[Annotation]] = defaultdict(list)
        for item in check.annotations:
            by_image[item.entry["image_id"]].append(item)
        ground_truth = {
            "images": [
                {"id": image.id, "file_name": image.file_name, "width": image.width, "height": image.height}
                for image in check.images.values()
            ],
            "annotations": [_truth(item, check.images[item.entry["image_id"]]) for item in check.annotations],
            "categories": [{"id": key, "name": name} for key, name in zip(ids[split], names, strict=True)],
        }
        splits[split] = CocoSplit(
            name=split,
            annotation_file=check.found.file,
            class_names=list(names),
            category_ids=ids[split],
            left_out=left_out,
            images=[_record(image, by_image[image.id], label_of) for image in check.images.values()],
            ground_truth=ground_truth,
            # require_masks tells of missing masks, where they matter
            warnings=[problem.message for problem in check.found.problems() if problem.code != "ANN_NO_MASK"],
        )
    return splits


def _record(image: ImageFile, items: list[Annotation], label_of: dict[int, int]) -> ImageRecord:
    items = [item for item in items if item.box is not None]
    return ImageRecord(
        id=image.id,
        path=image.path,
        width=image.width,
        height=image.height,
        boxes=np.array([item.box for item in items], np.float32).reshape(-1, 4),
        labels=np.array([label_of[item.entry["category_id"]] for item in items], np.int64),
        crowd=np.array([bool(item.entry.get("iscrowd")) for item in items], bool),
        segmentations=[item.segmentation for item in items],
        annotation_ids=np.array([item.entry["id"] for item in items], np.int64),
        exif=image.exif,
    )


def _truth(item: Annotation, image: ImageFile) -> dict:
    """The annotation as pycocotools wants it: the file's own values, plus an area where it has none."""
    entry, segmentation = item.entry, item.segmentation
    truth = {name: entry[name] for name in ("id", "image_id", "category_id", "bbox")}
    truth["iscrowd"] = int(entry.get("iscrowd") or 0)
    truth["area"] = entry.get("area")
    if truth["area"] is None:
        if segmentation is None:
            truth["area"] = entry["bbox"][2] * entry["bbox"][3]
        else:
            truth["area"] = float(mask_utils.area(_encode(segmentation, image.height, image.width)))
    if segmentation is not None:
        truth["segmentation"] = segmentation
    return truth


def _divide(split: CocoSplit, fraction: float) -> tuple[CocoSplit, CocoSplit]:
    """(train, valid) parts of a split: those images whose names' hashes come first are valid. Train keeps one."""
    names = {entry["id"]: entry["file_name"].encode(errors="replace") for entry in split.ground_truth["images"]}
    order = sorted(names, key=lambda image_id: hashlib.sha256(names[image_id]).digest())
    count = min(max(round(fraction * len(order)), 1), len(order) - 1)
    chosen = set(order[:count])

    def part(name: str, inside: bool, warnings: list[str]) -> CocoSplit:
        truth = split.ground_truth
        return replace(
            split,
            name=name,
            images=[image for image in split.images if (image.id in chosen) == inside],
            ground_truth={
                "images": [entry for entry in truth["images"] if (entry["id"] in chosen) == inside],
                "annotations": [entry for entry in truth["annotations"] if (entry["image_id"] in chosen) == inside],
                "categories": truth["categories"],
            },
            warnings=warnings,
        )

    notes = [] if count else [f"{split.annotation_file}: too few images for a valid split: it is empty"]
    return part("train", False, split.warnings), part("valid", True, notes)


def load_image(record: ImageRecord) -> np.ndarray:
    """The pixels, (H, W, 3) uint8 RGB, turned as `record.exif` says; of animated images the first frame.

    Raises UserError naming the file where it cannot be decoded or has changed its size since it was checked.
    """
    try:
        with Image.open(record.path) as image:
            pixels = to_rgb_array(ImageOps.exif_transpose(image) if record.exif else image)
    except Exception as error:  # Pillow's readers raise anything from OSError to struct.error on damaged files
        raise UserError(
            f"{record.path}: cannot be read as an image: {error}. Replace it or delete its entry"
        ) from error
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
        return mask_utils.decode(_encode(polygons, out_height, out_width))
    mask = mask_utils.decode(_encode(segmentation, height, width))
    if (height, width) == (out_height, out_width):
        return mask
    resized = Image.fromarray(mask * np.uint8(255)).resize((out_width, out_height), Image.Resampling.BOX)
    return (np.asarray(resized) >= 128).astype(np.uint8)


def _encode(segmentation: list | dict, height: int, width: int) -> dict:
    """A sound segmentation as one compressed RLE."""
    if isinstance(segmentation, list):
        return mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_utils.frPyObjects(segmentation, height, width)
    return segmentation
