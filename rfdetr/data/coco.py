"""COCO datasets: from the files of a folder to checked splits with labels 0..N-1.

Each file is listed, the EXIF orientation decided, the rest checked, classes numbered, and only
then are the splits built, complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np

from rfdetr.console import UserError, tick
from rfdetr.data.checks import CheckedSplit, ListedSplit, check_split, list_split
from rfdetr.data.class_checks import class_problems
from rfdetr.data.columns import Columns
from rfdetr.data.exif import ExifDecision, decide_exif, exif_note
from rfdetr.data.faults import GUESSED_INSTEAD, NO_MASKS, Faults, Problem, raise_errors
from rfdetr.data.index import keep_index, read_index
from rfdetr.data.json_stream import NotStreamable, stream_json
from rfdetr.data.labels import number_classes
from rfdetr.data.layout import SPLITS, find_splits, has_val_folder, read_json
from rfdetr.data.records import CocoSplit, ImageTable
from rfdetr.masks import annotation_area
from rfdetr.renaming import NO_RENAMES, Renames, class_names_of, read_renames, rename_classes
from rfdetr.text import counted

NEEDED = ("train", "valid")  # splits, for training
ROUND_QUERIES = 100  # to whose multiple the advised number of queries is rounded up


def read_dataset(
    root: str | Path,
    val_fraction: float | None = None,
    queries: int = 300,
    exif: str | None = None,
    rename: Sequence[str] = (),
    needed: Sequence[str] = NEEDED,
    judged: Collection[str] = SPLITS,
) -> dict[str, CocoSplit]:
    """Check and read the splits of a dataset: "train", "valid" and, where it exists, "test".

    Without a valid split `val_fraction` (0..1, exclusive) of train's images become one, chosen by
    a hash of their names, so that the choice stays when the file is written in another order.
    queries: the objects that the model can find in one image.  exif, rename, needed: as for
    inspect_dataset; what was decided is printed where images have an orientation.  judged: the
    splits whose errors count; of the others what is sound is read.  Raises UserError for any error
    of the data, with the command that lists them all.
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(
            f"--val_fraction {val_fraction}: expected a number above 0 and below 1, 0.1 for example"
        )
    splits, problems = inspect_dataset(
        root, val_fraction, queries=queries, exif=exif, rename=rename, needed=needed
    )
    data = {"dataset": root, "val_fraction": val_fraction, "exif": exif, "rename": list(rename)}
    unjudged = [
        problem
        for name, split in splits.items()
        if name not in judged
        for problem in split.problems
    ]
    raise_errors([problem for problem in problems if problem not in unjudged], data)
    note = exif_note(splits, exif)
    if note:
        tick(note)
    return {name: splits[name] for name in SPLITS if name in splits}


def inspect_dataset(
    root: str | Path,
    val_fraction: float | None = None,
    need_masks: bool = False,
    decode: bool = False,
    queries: int = 300,
    exif: str | None = None,
    rename: Sequence[str] = (),
    needed: Sequence[str] = NEEDED,
) -> tuple[dict[str, CocoSplit], list[Problem]]:
    """Check all splits once: (split name -> what is usable of it, all problems, errors first).

    With `val_fraction` a missing valid split is no error, with `need_masks` missing masks are one.
    decode: open images as a whole, and compare contents between splits.  queries: the objects that
    the model can find in one image.  exif: "apply" or "ignore" the EXIF orientation of images where
    no size of the dataset tells; by default it is applied.  rename: values of --rename, OLD=NEW.
    needed: the splits without which there is an error.  Raises UserError where `rename` names no
    class.
    """
    try:
        files = find_splits(root)
    except UserError as error:
        return {}, [dataset_error("DATASET_LAYOUT", str(error), root)]
    listed, problems, renames = list_files(files, decode, root, rename)
    problems += missing_splits(needed, files, val_fraction, root)
    decision = decide_exif(frozenset().union(*(split.proofs for split in listed.values())), exif)
    checked = {name: check_listed(listed.pop(name), *files[name], decision) for name in [*listed]}
    splits = build_splits(checked, renames)
    faults = {name: split.faults for name, split in checked.items()}
    is_divided = bool(val_fraction) and "train" in splits and "valid" not in files
    if is_divided:
        splits["train"], splits["valid"] = divide(splits["train"], val_fraction)
        faults["valid"] = Faults(splits["valid"].annotation_file)
    for name, split in splits.items():
        if split.mask_count == 0:
            faults[name].forget("ANN_NO_MASK")  # boxes alone may be all that is wanted
            if need_masks and split.object_count:
                problems.append(no_masks_problem(name, split, root))
        note_too_many_objects(split, queries, faults[name])
        note_repeated_images(split, faults[name])
        if name == "valid" and name in files and val_fraction is not None:
            faults[name].note("SPLIT_FRACTION_UNUSED", name)
        of_file = faults["train"] if is_divided and name == "valid" else faults[name]
        if split.object_count == 0 and not of_file.has_errors:
            faults[name].note("SPLIT_EMPTY", f"{name}: {counted(len(split.images), 'image')}")
        if name == "train":
            faults[name].make_error("SPLIT_EMPTY")
        elif "train" in splits:
            note_shared_images(split, splits["train"], faults[name])
    own_problems = {name: split_faults.problems() for name, split_faults in faults.items()}
    if "train" in splits:
        for name in splits.keys() - {"train"}:
            own_problems[name] += class_problems(splits[name], splits["train"])
    splits = {
        name: replace(split, problems=sorted(own_problems[name], key=attrgetter("severity")))
        for name, split in splits.items()
    }
    problems += [problem for split in splits.values() for problem in split.problems]
    return splits, sorted(problems, key=attrgetter("severity"))


# ---------------------------------------------------------------- files


def list_files(
    files: dict[str, tuple[Path, Path]], decode: bool, root: str | Path, rename: Sequence[str]
) -> tuple[dict[str, ListedSplit | CheckedSplit], list[Problem], Renames]:
    """What the annotation files list, a problem for each that is no JSON, and the renames.

    Splits that are known from an earlier start are checked already.
    """
    contents = {}
    problems = []
    listed = {}
    renames = NO_RENAMES
    for name, (file, folder) in files.items():
        known = None if decode or rename else read_index(file, folder)
        if known is not None:
            listed[name] = known
            continue
        try:
            contents[name] = read_annotation_file(file, streamed=not rename)
        except UserError as error:
            problems.append(dataset_error("JSON_INVALID", str(error), root))
    if rename and not problems:
        names = {name: class_names_of(data) for name, (data, _) in contents.items()}
        renames = read_renames(rename, names)
        for data, _ in contents.values():
            rename_classes(data, renames.new_of)
    for name in list(contents):
        file, folder = files[name]
        sha256 = "" if decode else contents[name][1]
        listed[name] = list_split(file, folder, decode, contents.pop(name)[0], sha256)
    return {name: listed[name] for name in files if name in listed}, problems, renames


def read_annotation_file(file: Path, streamed: bool) -> tuple[dict, str]:
    """(what an annotation file holds, its sha256 or "" where an index of it is of no use).

    streamed: the annotations come as columns, where the file is written as usual.  Raises UserError
    as read_json.
    """
    if streamed:
        with contextlib.suppress(NotStreamable, OSError):
            return stream_json(file)
    return read_json(file), ""


def check_listed(
    split: ListedSplit | CheckedSplit, file: Path, folder: Path, exif: ExifDecision
) -> CheckedSplit:
    """A split with all its checks done, from an index where there is one or can be one."""
    if isinstance(split, CheckedSplit):
        if split.exif == exif:
            return split
        split = list_split(file, folder, False, *read_annotation_file(file, streamed=True))
    checked = check_split(split, exif)
    compute_areas(checked.columns)
    return keep_index(checked, folder, split.sha256) if split.sha256 else checked


def missing_splits(
    needed: Sequence[str],
    files: dict[str, tuple[Path, Path]],
    val_fraction: float | None,
    root: str | Path,
) -> list[Problem]:
    problems = []
    if "train" in needed and "train" not in files:
        message = (
            f"{root} has no train split, only {' and '.join(files)}: training needs one, the "
            "images and annotations to learn from in train/"
        )
        problems.append(dataset_error("SPLIT_TRAIN_MISSING", message, root))
    if "valid" in needed and "valid" not in files and not val_fraction:
        message = f"{root} has no valid split: add one, or split train/ with --val_fraction 0.1"
        if "train" not in files:
            message = f"{root} has no valid split: --val_fraction 0.1 will split train/"
        if has_val_folder(root):
            message = f"{root} has no valid split, but val/: call that folder valid/"
        problems.append(dataset_error("SPLIT_VALID_MISSING", message, root))
    return problems


def no_masks_problem(name: str, split: CocoSplit, root: str | Path) -> Problem:
    follows = GUESSED_INSTEAD if name == "train" else "there are no mask scores then"
    instead = f"--need_masks 1: {follows}"
    message = NO_MASKS.format(split.annotation_file, split.object_count, instead)
    return dataset_error("MASKS_NONE", message, root)


def dataset_error(code: str, message: str, root: str | Path) -> Problem:
    """An error of the dataset as a whole."""
    return Problem(code, "error", message, 1, [str(root)], message.split(". ")[0])


# ---------------------------------------------------------------- building


def build_splits(
    checked: dict[str, CheckedSplit], renames: Renames = NO_RENAMES
) -> dict[str, CocoSplit]:
    """The splits of a dataset with their classes numbered, each with its file's own problems.

    renames: that were asked for.
    """
    classes = number_classes(checked)
    splits = {}
    for name, split in checked.items():
        labels = classes.labels[name]
        annotated = Counter()
        for entry in split.categories:
            annotated[entry["name"]] += split.annotated.get(entry["id"], 0)
        splits[name] = CocoSplit(
            annotation_file=split.annotation_file,
            images=ImageTable(split.columns, labels),
            class_names=classes.class_names,
            category_ids=classes.category_ids[name],
            annotated=dict(annotated),
            left_out=classes.left_out,
            exif=split.exif.name,
            problems=split.faults.problems(),
            unlisted=frozenset(
                split.annotated.keys() - {entry["id"] for entry in split.categories}
            ),
            renames=renames,
        )
    return splits


def compute_areas(columns: Columns) -> None:
    """Set the areas that are missing."""
    missing = np.flatnonzero(np.isnan(columns.areas))
    rows = np.searchsorted(columns.first, missing, side="right") - 1  # of their images
    for index, row in zip(missing.tolist(), rows.tolist()):
        width, height = columns.sizes[row].tolist()
        entry = columns.entry(index, 0, height, width)
        columns.areas[index] = annotation_area(entry, height, width)


def divide(split: CocoSplit, fraction: float) -> tuple[CocoSplit, CocoSplit]:
    """(train, valid) parts of a split: the images whose names' hashes come first are valid.

    All entries of one file are in the same part, that of the first of them by its hash. Train
    keeps at least one file.
    """
    images = split.images
    names = split.file_names
    places = sorted(range(len(images)), key=lambda place: name_hash(names[place]))
    places_of_file: dict[object, list[int]] = {}
    for place in places:
        places_of_file.setdefault(file_identity(images.path(place)), []).append(place)
    wanted = min(max(round(fraction * len(places)), 1), len(places) - 1)
    groups = list(places_of_file.values())
    valid = []
    while len(groups) > 1 and len(valid) < wanted:
        valid += groups.pop(0)
    train = [place for group in groups for place in group]
    return tuple(replace(split, images=images[np.array(part, np.int64)]) for part in (train, valid))


def name_hash(file_name: str) -> bytes:
    return hashlib.sha256(file_name.encode(errors="replace")).digest()


def file_identity(path: Path) -> object:
    """The same for all entries of one file, under whatever names and links."""
    try:
        status = path.stat()
    except OSError:
        return os.path.normpath(path)
    if status.st_ino:
        return (status.st_dev, status.st_ino)
    return os.path.realpath(path)


# ---------------------------------------------------------------- faults of whole splits


def note_too_many_objects(split: CocoSplit, queries: int, faults: Faults) -> None:
    counts = split.images.object_counts
    for number in np.flatnonzero(counts > queries).tolist():
        image = split.images[number]
        place = f"image {image.id} ({image.file_name}): {counts[number]}, queries: {queries}"
        faults.note("IMG_MANY_OBJECTS", place)
    if faults.count("IMG_MANY_OBJECTS"):
        enough = ROUND_QUERIES * (int(counts.max()) // ROUND_QUERIES + 1)
        faults.advise("IMG_MANY_OBJECTS", f"train with more: --num_queries {enough}")


def note_repeated_images(split: CocoSplit, faults: Faults) -> None:
    """Images that are listed more than once, by name or, where files were decoded, by content; if
    they show objects.
    """
    names = split.file_names
    keys = names
    if split.images.is_decoded:
        keys = [image.file_sha256 or image.file_name for image in split.images]
    counts = split.objects_per_image
    first: dict[str | bytes, int] = {}
    for index, key in enumerate(keys):
        twin = first.setdefault(key, index)
        if twin != index and (counts[twin] or counts[index]):
            objects = f"{counts[twin]} and {counts[index]} objects"
            faults.note("IMG_TWICE", f"{names[index]} = {names[twin]}: {objects}")


def note_shared_images(split: CocoSplit, train: CocoSplit, faults: Faults) -> None:
    if not (split.images.is_decoded and train.images.is_decoded):
        return
    train_files = {
        image.file_sha256: image.file_name for image in train.images if image.file_sha256
    }
    for image in split.images:
        twin = train_files.get(image.file_sha256)
        if twin is not None:
            faults.note("IMG_SHARED", f"{image.file_name} = train's {twin}")
