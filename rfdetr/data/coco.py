"""COCO datasets: one record per image, labels 0..N-1, the ground truth for scoring."""

from __future__ import annotations

import hashlib
import os
from copy import copy
from pathlib import Path

import numpy as np

from rfdetr.console import UserError, tick, warn
from rfdetr.data.checks import CocoSplit
from rfdetr.data.exif import exif_note, settle_exif
from rfdetr.data.faults import NO_MASKS, Problem, raise_errors
from rfdetr.data.labels import number_classes
from rfdetr.data.layout import find_splits
from rfdetr.data.records import ImageRecord


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
    raise_errors(problems, root)
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
        files = find_splits(root)
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
                error("MASKS_NONE", NO_MASKS.format(split.annotation_file, split.object_count))
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


def require_masks(split: CocoSplit) -> None:
    """Print how many of up to 10 sampled annotations have masks, warn where some lack them; UserError if all do."""
    masks = [mask is not None for image in split.images for mask in image.segmentations]
    if not any(masks):
        raise UserError(NO_MASKS.format(split.annotation_file, len(masks)))
    sample = [masks[i] for i in np.linspace(0, len(masks) - 1, min(10, len(masks))).astype(int)]
    tick(f"Validated: {sum(sample)}/{len(sample)} sample annotations contain segmentation masks")
    if lacking := len(masks) - sum(masks):
        warn(
            f"{split.annotation_file}: {lacking} of {len(masks)} annotations have no mask: they give no mask loss"
        )
