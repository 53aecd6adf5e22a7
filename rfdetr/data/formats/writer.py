"""Labelled images as a COCO dataset: OUT/<split>/_annotations.coco.json, the images beside it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import TextIO

from rfdetr.data.annotation_checks import THINNEST, check_segmentation
from rfdetr.data.formats.source import Box, LabelledImage, LabelledObject, Notes, plain_name
from rfdetr.data.layout import ANNOTATIONS, SPLITS
from rfdetr.files import require_free
from rfdetr.masks import annotation_area
from rfdetr.text import is_control

TABLE_CLASSES = 40  # more are counted, not listed
TABLE_LETTERS = 30  # of a class name
DECIMALS = 4  # of a pixel
NOT_IN_NAMES = re.compile(r'[\\/:*?"<>|]')  # some system takes them for more than letters


@contextlib.contextmanager
def new_folder(out: Path, flag: str) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; nothing is left after an error.

    Raises UserError as files.require_free.
    """
    require_free(out, flag)
    out = Path(os.path.realpath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            out.rmdir()  # Windows renames over no folder
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class CocoWriter(contextlib.AbstractContextManager):
    """Writes images with their objects into a new folder, a split at a time or in turn.

    Annotations go to their file at once, so that memory holds only what images are called.
    class_names: categories that are written whether they have objects or not.
    """

    def __init__(self, folder: Path, class_names: list[str], copies: bool, notes: Notes):
        self.folder = folder
        self.copies = copies
        self.notes = notes
        self.splits: dict[str, SplitWriter] = {}
        self.categories: dict[str, int] = {}
        for name in class_names:
            self._category(name)

    def __exit__(self, *error: object) -> None:
        for split in self.splits.values():
            split.file.close()

    def add(self, split: str, image: LabelledImage) -> None:
        """Write an image and its objects.  Raises OSError where it cannot be copied."""
        if split not in self.splits:
            self.splits[split] = SplitWriter(self.folder / split)
        writer = self.splits[split]
        writer.add_image(image, self.copies)
        for entry in image.objects:
            coco = coco_object(entry, image, self.notes)
            if coco:
                writer.add_object(coco, self._category(entry.name))

    def finish(self) -> None:
        names = {number: name for name, number in self.categories.items()}
        for split in self.splits.values():
            split.finish([{"id": number, "name": name} for number, name in names.items()])

    def _category(self, name: str) -> int:
        name = plain_name(name)
        return self.categories.setdefault(name, len(self.categories) + 1)

    # ------------------------------------------------------------ what was written

    @property
    def taught(self) -> dict[str, int]:
        """Class name -> its objects in train."""
        objects = self.splits["train"].objects if "train" in self.splits else Counter()
        return {name: objects[number] for name, number in self.categories.items()}

    def table(self) -> list[str]:
        """Lines: images, objects and masks of each split, then the objects of each class."""
        splits = [name for name in SPLITS if name in self.splits]
        shown = {name: f"  {shortened(name)}" for name in list(self.categories)[:TABLE_CLASSES]}
        width = max(12, *map(len, shown.values()))
        lines = [f"{'':<{width}}" + "".join(f"{name:>9}" for name in splits)]
        counts = {
            "images": [len(self.splits[name].images) for name in splits],
            "objects": [self.splits[name].written for name in splits],
            "with masks": [self.splits[name].masks for name in splits],
        }
        rows = list(counts.items())
        for name, title in shown.items():
            number = self.categories[name]
            rows.append((title, [self.splits[split].objects[number] for split in splits]))
        for title, cells in rows:
            lines.append(f"{title:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
        if len(self.categories) > TABLE_CLASSES:
            lines.append(f"  ... and {len(self.categories) - TABLE_CLASSES} classes more")
        return lines


class SplitWriter:
    """One split: a folder of images, and its annotation file as far as it is written."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder = folder
        self.file: TextIO = open(folder / ANNOTATIONS, "x", encoding="utf-8")
        self.file.write('{"annotations": [')
        self.images: list[dict] = []
        self.objects: Counter[int] = Counter()  # category id -> how many
        self.written = 0  # of all categories
        self.masks = 0
        self.names: set[str] = set()

    def add_image(self, image: LabelledImage, copies: bool) -> None:
        name = self._free_name(image)
        target = self.folder / name
        if image.content is not None:
            target.write_bytes(image.content)
        else:
            link_or_copy(image.path, target, copies)
        entry = {"id": len(self.images) + 1, "file_name": name}
        self.images.append(entry | {"width": image.width, "height": image.height})

    def add_object(self, entry: dict, category: int) -> None:
        """Write an object of the last image."""
        self.written += 1
        ids = {"id": self.written, "image_id": len(self.images), "category_id": category}
        self.file.write(",\n" if self.written > 1 else "\n")
        self.file.write(json.dumps(ids | entry))
        self.objects[category] += 1
        self.masks += bool(entry["segmentation"])

    def finish(self, categories: list[dict]) -> None:
        rest = {"images": self.images, "categories": categories}
        self.file.write("\n], " + json.dumps(rest)[1:])
        self.file.close()

    def _free_name(self, image: LabelledImage) -> str:
        """The image's name; where another folder's has it already, its folder's in front."""
        name = safe_name(image.path.name)
        if folded(name) in self.names:
            folders = [folder.name for folder in image.path.parents]
            own = next(name for name in folders if name.lower() not in ("images", "jpegimages"))
            longer = f"{safe_name(own)}_{name}"
            numbered = (f"{number}_{longer}" for number in count(2))
            names = chain([longer], numbered)
            name = next(name for name in names if folded(name) not in self.names)
        self.names.add(folded(name))
        return name


def coco_object(entry: LabelledObject, image: LabelledImage, notes: Notes) -> dict | None:
    """The COCO annotation of an object but for its ids; None where nothing of it is left."""
    box = clipped(entry.box, image.width, image.height)
    if box is None:
        notes.add("objects without area or outside of their image, left out", image.path)
        return None
    segmentation = entry.segmentation
    if isinstance(segmentation, list):
        outlines = [[round(side, DECIMALS) for side in outline] for outline in segmentation]
        segmentation = check_segmentation(outlines, image.width, image.height, sums={}).usable
        if not segmentation:
            notes.add("objects whose outline is none: the box stays", image.path)
    left, top, right, bottom = box
    coco = {"bbox": [left, top, round(right - left, DECIMALS), round(bottom - top, DECIMALS)]}
    coco |= {"iscrowd": int(entry.is_crowd), "segmentation": segmentation or []}
    coco["area"] = annotation_area(coco, image.height, image.width)
    return coco


def clipped(box: Box, width: int, height: int) -> Box | None:
    """The part of a box that lies in its image; None where there is none."""
    left, right = (round(min(max(side, 0), width), DECIMALS) for side in box[::2])
    top, bottom = (round(min(max(side, 0), height), DECIMALS) for side in box[1::2])
    if right - left < THINNEST or bottom - top < THINNEST:
        return None
    return left, top, right, bottom


def link_or_copy(source: Path, target: Path, copies: bool) -> None:
    """A hard link, or a copy where it is asked for or the file system has no links to there."""
    if not copies:
        with contextlib.suppress(OSError, NotImplementedError):
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)


def shortened(name: str) -> str:
    return name if len(name) <= TABLE_LETTERS else name[: TABLE_LETTERS - 3] + "..."


def safe_name(name: str) -> str:
    """A file's name that every system takes for a name, and every JSON reader for a text."""
    letters = ["_" if is_control(letter) else letter for letter in name]
    return NOT_IN_NAMES.sub("_", "".join(letters))


def folded(name: str) -> str:
    """What names have in common that some file system takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()
