"""What every form of dataset is read into, and what its readers share.

Boxes are x1, y1, x2, y2 in pixels from the image's corner, and pixel (0, 0) reaches from 0 to 1.

EXIF orientation: the size that is written is the one that the labels were drawn on, and tells
training (`data/exif.py`) whether to turn the image. An annotation's own size decides where it has
one (VOC, LabelMe, the masks themselves). YOLO's labels have none; they are of the image as it is
shown, because that is how YOLO's own training reads it.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from PIL import Image

from rfdetr.data.exif import turned
from rfdetr.data.formats.detect import split_named
from rfdetr.data.image_files import ImageFile, fault_of, is_regular_file, read_orientation
from rfdetr.data.images import FORMATS, open_image
from rfdetr.text import printable, without_controls

EXAMPLES = 3  # files that a note names
MOST_BYTES = 1 << 28  # of a label file: LabelMe's may hold an image
IMAGE_SUFFIXES = {
    suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS
}
Box = tuple[float, float, float, float]
Item = TypeVar("Item")


class Unusable(Exception):
    """What an image is left out for: `what` counts such images, `detail` is about this one.

    Of a file that the whole dataset needs, `what` is its path.
    """

    def __init__(self, what: str, detail: object = ""):
        super().__init__(what)
        self.what = what
        self.detail = str(detail)


@dataclass(frozen=True)
class LabelledObject:
    name: str  # of its class
    box: Box
    segmentation: list | dict | None = None  # as in COCO: polygons or one RLE
    is_crowd: bool = False


@dataclass(frozen=True)
class LabelledImage:
    path: Path  # where `content` is given, only its name counts
    width: int
    height: int
    objects: list[LabelledObject]
    content: bytes | None = None  # of an image that lies in its label file


class Reader(Protocol, Generic[Item]):
    """A dataset in one form."""

    splits: dict[str, list[Item]]  # split name -> what `read` takes, one for each image
    class_names: list[str]  # those that the dataset lists, in their order; others may come

    def read(self, item: Item) -> LabelledImage:
        """Raises Unusable."""

    def place(self, item: Item) -> Path:
        """The file to name where `read` raises."""


class Notes:
    """What was left out, or done otherwise than labelled: counts, with the first examples."""

    def __init__(self, root: Path):
        self.root = root
        self.counts = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, what: str, file: Path, detail: str = "", count: int = 1) -> None:
        self.counts[what] += count
        examples = self.examples.setdefault(what, [])
        if len(examples) < EXAMPLES:
            name = os.path.relpath(file, self.root)
            examples.append(printable(f"{name}: {detail}" if detail else name))

    def lines(self) -> list[str]:
        """One text for each kind, such as "images that are missing: 2 (a.png; b.png)"."""
        told = []
        for what, count in self.counts.items():
            examples = "; ".join(self.examples[what])
            more = "; ..." if count > len(self.examples[what]) else ""
            told.append(f"{what}: {count} ({examples}{more})")
        return told


def plain_name(name: str) -> str:
    """A class name as it is written: without control characters, and with single blanks."""
    return without_controls(name) or "unnamed"


# ---------------------------------------------------------------- folders


def files_below(root: Path) -> list[Path]:
    """All files of a folder and of those in it, in order, hidden ones left out.

    Links to folders are followed, to each folder once.  Raises OSError.
    """
    seen = set()
    found = []
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return found


def _raise(error: OSError) -> None:
    raise error


def is_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def split_of(file: Path, root: Path) -> str:
    """The split that the folders between `root` and a file name, train where none does."""
    for name in file.relative_to(root).parts[:-1]:
        split = split_named(name)
        if split:
            return split
    return "train"


def replaced_folder(file: Path, root: Path, old: str, new: str) -> Path | None:
    """`file` with the last folder below `root` that is called `old` called `new`; None: no such."""
    parts = list(file.relative_to(root).parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index].lower() == old:
            parts[index] = new
            return root.joinpath(*parts)
    return None


def inside(path: Path, root: Path) -> bool:
    """Whether a path lies in a folder, however `..` and links in front of it lead there.

    Links below the folder count as what they are called: people link large sets.
    """
    place = Path(os.path.abspath(path))
    return place.is_relative_to(os.path.abspath(root)) or place.is_relative_to(
        os.path.realpath(root)
    )


def joined(folder: Path, name: str) -> Path:
    """The path that a text in a file means, seen from a folder; Windows' separators, too."""
    return Path(os.path.normpath(os.path.join(folder, name.replace("\\", "/"))))


# ---------------------------------------------------------------- files


def require_plain_file(path: Path, what: str) -> None:
    """Unusable(what, why) for what is none."""
    if not is_regular_file(path):
        raise Unusable(what, "no plain file" if os.path.lexists(path) else "missing")


def read_bytes(path: Path, what: str) -> bytes:
    """The content of a label file.  Raises Unusable(what, why)."""
    require_plain_file(path, what)
    try:
        if os.path.getsize(path) > MOST_BYTES:
            raise Unusable(what, f"larger than {MOST_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise Unusable(what, error.strerror or error) from error


def read_text(path: Path, what: str) -> str:
    """The same as text, with or without BOM."""
    try:
        return read_bytes(path, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(what, "no UTF-8 text") from error


def read_image(path: Path) -> ImageFile:
    """The sizes and orientation of an image file, from its header.  Raises Unusable."""
    what = "images that cannot be read"
    require_plain_file(path, what)
    try:
        with open_image(path) as image:
            orientation, stored_size = read_orientation(image, image.size)
    except Exception as error:  # on damaged files Pillow raises OSError, struct.error and others
        ((code, detail),) = fault_of(error).items()
        raise Unusable(what, detail.removeprefix(": ") or code) from error
    return ImageFile(str(path), orientation=orientation, stored_size=stored_size)


def agreed_size(file: ImageFile, width: int, height: int) -> tuple[int, int]:
    """The size that the labels have, which must be the image's, stored or turned by its EXIF."""
    sizes = dict.fromkeys((file.stored_size, turned(file)))
    for size in sizes:
        if size == (width, height):
            return size
    real = " or ".join(f"{w}x{h}" for w, h in sizes)
    raise Unusable(
        "images of another size than their labels say", f"{width}x{height}, it is {real}"
    )


def bounds(points: list[float]) -> Box:
    """The box around x, y, x, y, ..."""
    return min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])
