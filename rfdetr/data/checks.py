"""Checks of an annotation file and its images; every fault is noted, in one pass.

What the file lists comes first (`list_split`), so that the EXIF orientation can be decided for the
whole dataset; then its images and annotations are checked (`check_split`).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from math import inf
from pathlib import Path

from rfdetr.data.checked_annotations import check_annotations
from rfdetr.data.columns import Columns, build_columns
from rfdetr.data.exif import ExifDecision, SizedImage, exif_proofs, settle_size, size_is_wrong
from rfdetr.data.faults import FEW_SKIPPED, Faults
from rfdetr.data.flat import FlatAnnotations
from rfdetr.data.image_cache import ImageCache
from rfdetr.data.image_files import (
    NOT_INSPECTED,
    ImageEntry,
    ImageFile,
    inspect_image_file,
    stays_inside,
)
from rfdetr.data.layout import COPY_NOTE, read_json
from rfdetr.data.rle import chunks
from rfdetr.ids import is_whole, whole_id
from rfdetr.progress import ProgressBar
from rfdetr.text import is_control, with_article

NOT_USABLE = {"IMG_MISSING", "IMG_TYPE", "IMG_BOMB"}  # images with these are left out
SKIPPED = ("IMG_CORRUPT", "IMG_UNREADABLE")  # training goes on without a few of these
MANY_HEADERS = 64  # images that a thread looks at in one go,
FEW_DECODED = 4  # and that it reads as a whole
LONG_WAIT = 1e-3  # seconds for an image's header: the disk is slow
UNTIL_NEXT_LOOK = 100  # parts that threads read before it is clocked again


@dataclass(frozen=True)
class ListedSplit:
    """What an annotation file lists and the image files tell, before annotations are checked."""

    annotation_file: Path
    categories: list[dict]  # the sound entries
    entries: dict[int | str, ImageEntry]  # by id
    files: dict[int | str, ImageFile] | None  # by id; None: images are not looked for
    decoded: bool  # whether the files were read as a whole
    annotations: FlatAnnotations  # not checked
    annotated: dict[int, int]  # category id -> its annotations, crowd regions aside
    faults: Faults
    sha256: str = ""  # of the annotation file, where an index of it may be kept

    def images(self) -> Iterator[tuple[ImageEntry, ImageFile]]:
        """Each entry with its file."""
        files = self.files or {}
        for image_id, entry in self.entries.items():
            yield entry, files.get(image_id, NOT_INSPECTED)

    @property
    def proofs(self) -> frozenset[bool]:
        """What the images' sizes prove of their EXIF orientation."""
        return exif_proofs(self.images())


@dataclass(frozen=True)
class CheckedSplit:
    """An annotation file after all checks of its own: what of it is usable, and its faults."""

    annotation_file: Path
    categories: list[dict]  # the sound entries
    # by id, those that cannot be read, too; empty where the split is known from an earlier start
    listed: dict[int | str, SizedImage]
    annotated: dict[int, int]  # category id -> the same, usable or not
    columns: Columns  # of the usable ones
    exif: ExifDecision
    proofs: frozenset[bool]  # what this file's images add to it
    faults: Faults


def check_file(
    file: str | Path,
    folder: Path | None = None,
    decode: bool = False,
    data: dict | None = None,
    exif: ExifDecision | None = None,
) -> CheckedSplit:
    """`list_split` and `check_split` of one file alone; without `exif` orientation is applied."""
    if exif is None:
        exif = ExifDecision(apply=True, proofs=frozenset())
    return check_split(list_split(file, folder, decode, data), exif)


def list_split(
    file: str | Path,
    folder: Path | None = None,
    decode: bool = False,
    data: dict | None = None,
    sha256: str = "",
) -> ListedSplit:
    """Check the tables, categories and image entries of an annotation file.

    data: what the file holds, where it was read before.  folder: where its images are looked for;
    `decode`: read them as a whole, not their headers alone.  sha256: as in ListedSplit.  Raises
    UserError for no JSON.
    """
    if data is None:
        data = read_json(file)
    faults = Faults(Path(file))
    categories = table_of(data, "categories", faults)
    images = table_of(data, "images", faults)
    annotations = flat_annotations(data, faults)
    sound_categories = check_categories(categories, annotations.category_ids, faults)
    entries = check_image_entries(images, faults)
    del data, images  # of large files, as much memory as all that is found of them
    files = None
    if folder is not None:
        files = inspect_images(entries, folder, decode)
    return ListedSplit(
        annotation_file=Path(file),
        categories=sound_categories,
        entries=entries,
        files=files,
        decoded=decode,
        annotations=annotations,
        annotated=annotations.object_counts,
        faults=faults,
        sha256=sha256,
    )


def check_split(split: ListedSplit, exif: ExifDecision) -> CheckedSplit:
    """Check the images and annotations of a listed split; the faults are added to its own."""
    listed = {entry.id: settle_size(entry, file, exif) for entry, file in split.images()}
    if split.files is None:
        usable = [image for image in listed.values() if image.width < inf]
    else:
        usable = check_image_files(split, listed)
    category_ids = {entry["id"] for entry in split.categories}
    sound = check_annotations(split.annotations, listed, category_ids, split.faults)
    files = split.files or {}
    note_exif_doubts(usable, files, exif, split.faults)
    return CheckedSplit(
        annotation_file=split.annotation_file,
        categories=split.categories,
        listed=listed,
        annotated=split.annotated,
        columns=build_columns(usable, files, sound),
        exif=exif,
        proofs=split.proofs,
        faults=split.faults,
    )


def table_of(data: dict, key: str, faults: Faults) -> list[dict]:
    """The entries under a key of an annotation file that are objects."""
    entries = data.get(key)
    if not isinstance(entries, list):
        faults.note("JSON_STRUCTURE", f"no list {key!r}")
        return []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            faults.note("JSON_STRUCTURE", f"{key}[{index}] is {with_article(type(entry).__name__)}")
    return [entry for entry in entries if isinstance(entry, dict)]


def flat_annotations(data: dict, faults: Faults) -> FlatAnnotations:
    """The annotations of a file as columns, which they may be already."""
    annotations = data.get("annotations")
    if isinstance(annotations, FlatAnnotations):
        return annotations
    entries = table_of(data, "annotations", faults)
    shown = ProgressBar(entries, "checking annotations", "annotations")
    return FlatAnnotations.of(entries, shown)


# ---------------------------------------------------------------- categories


def check_categories(entries: list[dict], used: set[int], faults: Faults) -> list[dict]:
    """The entries with an id, one an id; a name that is no text is written as JSON.

    used: the category ids that have annotations.
    """
    sound: dict[int, dict] = {}
    for index, entry in enumerate(entries):
        name = entry.get("name")
        place = f"categories[{index}]: id {entry.get('id')!r}, name {name!r}"
        category_id = whole_id(entry.get("id"))
        if category_id is None or not isinstance(name, str):
            faults.note("CAT_INVALID", place, entry)
        if category_id is None:
            continue
        if not isinstance(name, str):  # its annotations are of a category that is there
            name = json.dumps(name)
        if category_id in sound:
            faults.note("CAT_ID_DUPLICATE", place, entry)
        elif not is_whole(entry["id"]):
            faults.note("CAT_ID_TYPE", place, entry)
        sound.setdefault(category_id, entry | {"id": category_id, "name": name})
        if any(map(is_control, name)):
            faults.note("CAT_NAME_CONTROL", place, entry)
    # Labelling tools give the placeholder the name of the class where there is only one class:
    # that is no duplicate.
    left_out = placeholders(sound.values(), used)
    names = Counter(
        entry["name"]
        for category_id, entry in sound.items()
        if (category_id, entry["name"]) not in left_out
    )
    for name, times in names.items():
        if times > 1:
            faults.note("CAT_NAME_DUPLICATE", repr(name))
    return list(sound.values())


def placeholders(categories: Iterable[dict], used: set[int]) -> set[tuple[int, str]]:
    """(id, name) of the categories that are another one's supercategory and not in `used`.

    used: the category ids that have annotations.
    """
    parents: dict[tuple[int, str], set[str]] = {}  # several where splits differ, or leave it out
    for entry in categories:
        own = parents.setdefault((entry["id"], entry["name"]), set())
        own.add(str(entry.get("supercategory")))
    children = Counter(parent for own in parents.values() for parent in own)
    left_out = set()
    for (category_id, name), own in parents.items():
        is_own_parent = name in own
        if category_id not in used and children[name] > is_own_parent:
            left_out.add((category_id, name))
    return left_out


# ---------------------------------------------------------------- images


def check_image_entries(entries: list[dict], faults: Faults) -> dict[int | str, ImageEntry]:
    """The entries with a sound id; of several with the same one, the last."""
    images: dict[int | str, ImageEntry] = {}
    for index, entry in enumerate(entries):
        image_id = entry.get("id")
        file_name = entry.get("file_name")
        place = f"images[{index}]: id {image_id!r}, file {file_name!r}"
        if type(image_id) is float and whole_id(image_id) is not None:
            faults.note("IMG_ID_TYPE", place, entry)
            image_id = whole_id(image_id)
        if not is_whole(image_id) and type(image_id) is not str:
            faults.note("IMG_ID_INVALID", place, entry)
            continue
        if image_id in images:
            faults.note("IMG_ID_DUPLICATE", place, entry)
        if not stays_inside(file_name):
            faults.note("IMG_PATH", place, entry)
            file_name = ""
        sides = [as_whole(entry.get("width")), as_whole(entry.get("height"))]
        if any(side is not None and not (is_whole(side) and side > 0) for side in sides):
            faults.note("IMG_SIZE_INVALID", place, entry)
            sides = [inf, inf]
        elif None in sides:
            sides = [inf, inf]
        images[image_id] = ImageEntry(image_id, file_name, *sides)
    return images


def as_whole(side: object) -> object:
    """640.0 is 640; anything else stays."""
    return int(side) if isinstance(side, float) and side.is_integer() else side


def inspect_images(
    entries: dict[int | str, ImageEntry], folder: Path, decode: bool
) -> dict[int | str, ImageFile]:
    """Read the images' files, several at once; those without a sound file_name are left out."""
    named = [entry for entry in entries.values() if entry.file_name]
    with ImageCache(folder) as cache:

        def inspect(part: list[ImageEntry]) -> list[ImageFile]:
            return [inspect_image_file(entry, folder, decode, cache) for entry in part]

        if decode:
            parts = in_threads(inspect, chunks(named, FEW_DECODED))
        else:
            parts = in_threads_if_slow(inspect, chunks(named, MANY_HEADERS))
        files = (file for part in parts for file in part)
        title = f"reading the images of {folder}"
        shown = ProgressBar(files, title, total=len(named))
        return {entry.id: file for file, entry in zip(shown, named)}


def in_threads(work: Callable[[list], list], parts: Iterable[list]) -> Iterator[list]:
    """The results of `parts` in their order, several being worked on at once."""
    with ThreadPoolExecutor() as threads:
        yield from threads.map(work, parts)


def in_threads_if_slow(work: Callable[[list], list], parts: Iterator[list]) -> Iterator[list]:
    """As in_threads, but one by one where none of them has to wait for its disk.

    Headers that memory holds are read in so little time that threads, which take turns in Python,
    would make them cost two to three times as much.
    """
    for part in parts:
        began = time.perf_counter()
        cpu_began = time.thread_time()
        results = work(part)
        waited = time.perf_counter() - began - (time.thread_time() - cpu_began)
        yield results
        if waited > LONG_WAIT * len(part):
            yield from in_threads(work, islice(parts, UNTIL_NEXT_LOOK))


def check_image_files(split: ListedSplit, listed: dict[int | str, SizedImage]) -> list[SizedImage]:
    """The usable images: those whose size is known and whose file may be read.

    One that cannot be decoded stays: it counts as missed in scoring.
    """
    faults = split.faults
    usable = []
    for image_id, file in split.files.items():
        entry = split.entries[image_id]
        image = listed[image_id]
        for code, more in file.faults.items():
            faults.note(code, f"{file.path}{more}", image)
        if size_is_wrong(entry, file):
            sizes = f"{entry.width}x{entry.height}, the file has {image.width}x{image.height}"
            faults.note("IMG_SIZE", f"{file.path}: {sizes}", image)
        if not file.faults.keys() & NOT_USABLE and image.width < inf:
            usable.append(image)
    for code in SKIPPED:
        if split.decoded or faults.count(code) > max(FEW_SKIPPED, len(listed) / 100):
            faults.make_error(code)
    if (split.annotation_file.parent.parent / COPY_NOTE).is_file():  # whose images are links
        faults.forget("IMG_LINK")
    return usable


def note_exif_doubts(
    images: list[SizedImage], files: dict[int | str, ImageFile], exif: ExifDecision, faults: Faults
) -> None:
    """Note the images whose orientation is a guess, and those that contradict the others."""
    for image in images:
        file = files.get(image.id, NOT_INSPECTED)
        if file.orientation == 1:
            continue
        done = "applied" if image.apply_exif else "ignored"
        place = f"{file.path}: orientation {file.orientation}, {done}"
        if image.exif_proof is None and len(exif.proofs) != 1:
            faults.note("IMG_EXIF_UNKNOWN", place)
        if image.exif_proof is False and len(exif.proofs) == 2:
            faults.note("IMG_EXIF_MIXED", place)
