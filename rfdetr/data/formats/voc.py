"""Pascal VOC: an .xml for each image; in the development kit's folders, or beside the images.

Boxes: the original files (`<source>` names PASCAL VOC) count pixels from 1 and include the last
one, as the development kit's documentation says (Everingham and Winn, 2012): xmin and ymin are one
less here. Files of tools (LabelImg, CVAT, Roboflow) hold corners counted from 0, and are taken as
they are; where a tool counts from 1, that is an error of a pixel on two sides.

Masks: SegmentationObject/ID.png has the numbers of objects (0 ground, 255 border). An object's
class is that of the box that lies around it, else that of its pixels in SegmentationClass/ID.png,
whose colours labelmap.txt names or else are those of the original's twenty classes.

Objects marked difficult become crowd regions: VOC's scores ignore them, as COCO's do crowds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from pycocotools import mask as mask_api

from rfdetr.data.formats.detect import split_named
from rfdetr.data.formats.mask_images import Part, parts, read_numbers
from rfdetr.data.formats.source import (
    Box,
    LabelledImage,
    LabelledObject,
    Notes,
    Unusable,
    agreed_size,
    files_below,
    is_image_name,
    read_bytes,
    read_image,
    read_text,
    replaced_folder,
    split_of,
)
from rfdetr.masks import encode_window

NO_VOC = "images whose .xml is not Pascal VOC's"
LABEL_FOLDERS = ("annotations", "segmentationobject")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", ".")  # beside those
LIST_FOLDERS = ("Main", "Segmentation", "Layout")  # of ImageSets; the first that has lists counts
NAMES = """
aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
pottedplant sheep sofa train tvmonitor
""".split()
BORDER = 255
SAME = 0.5  # IoU of an object's box and of its mask's


class VocImage(NamedTuple):
    """An image of a dataset, by what labels it."""

    label: Path  # an .xml or, where there is none, an image of numbers
    folder: Path  # holds Annotations, JPEGImages, ...; of an .xml beside its image both

    @property
    def is_xml(self) -> bool:
        return self.label.suffix.lower() == ".xml"


class VocReader:
    """A Pascal VOC dataset in the folder `root`."""

    def __init__(self, root: Path, notes: Notes):
        self.root = root
        self.notes = notes
        self.class_names: list[str] = []
        files = files_below(root)
        self.files = set(files)
        self.images = {file.with_suffix(""): file for file in files if is_image_name(file)}
        self.names: dict[Path, dict[int, str]] = {}  # folder -> class_numbers of it
        self.splits = self._find(files)

    def place(self, item: VocImage) -> Path:
        return item.label

    def read(self, item: VocImage) -> LabelledImage:
        root = read_xml(item.label) if item.is_xml else ElementTree.Element("annotation")
        path = self._image_of(item, root.findtext("filename") or "")
        if path is None:
            raise Unusable("images that are missing")
        file = read_image(path)
        width = whole(root.findtext("size/width"))
        height = whole(root.findtext("size/height"))
        size = agreed_size(file, width, height) if width and height else file.stored_size
        objects = [read_object(entry, root) for entry in root.iterfind("object")]
        numbers = item.folder / "SegmentationObject" / f"{item.label.stem}.png"
        if numbers in self.files:
            objects = self._with_masks(objects, item, numbers, size)
        difficult = sum(entry.is_crowd for entry in objects)
        if difficult:
            what = "difficult objects, written as crowds, which training and scores ignore"
            self.notes.add(what, item.label, count=difficult)
        return LabelledImage(path, *size, objects)

    def _find(self, files: list[Path]) -> dict[str, list[VocImage]]:
        items = {}
        for file in files:
            is_numbers = file.parent.name == "SegmentationObject" and file.suffix == ".png"
            if is_numbers or file.suffix.lower() == ".xml":
                item = VocImage(file, home_of(file, self.root))
                key = (item.folder, file.stem)
                if item.is_xml or key not in items:
                    items[key] = item
        self._note_unlabelled(items.values())
        lists = {folder: read_lists(folder) for folder in {item.folder for item in items.values()}}
        splits = {}
        for item in items.values():
            split = split_of(item.label, self.root)
            if lists[item.folder]:
                split = lists[item.folder].get(item.label.stem)
            if split:
                splits.setdefault(split, []).append(item)
            else:
                self.notes.add("images that no list in ImageSets names, left out", item.label)
        return splits

    def _note_unlabelled(self, items: Iterable[VocImage]) -> None:
        """Note the images in folders of labelled ones that no .xml and no mask is of."""
        labelled = {item.label for item in items}
        folders = set()
        for item in items:
            image = self._image_of(item, "")
            if image is None and item.is_xml:
                with suppress(Unusable):  # told when it is read
                    image = self._image_of(item, read_xml(item.label).findtext("filename") or "")
            if image:
                labelled.add(image)
                folders.add(image.parent)
        for image in self.images.values():
            if image.parent in folders and image not in labelled:
                self.notes.add("images without an .xml or a mask, left out", image)

    def _image_of(self, item: VocImage, name: str) -> Path | None:
        """The image called as its label, else as the .xml says, beside it or in JPEGImages."""
        places = [item.label]
        for old in LABEL_FOLDERS:
            moved = [replaced_folder(item.label, self.root, old, new) for new in IMAGE_FOLDERS]
            places += [place for place in moved if place]
        named = name.replace("\\", "/").rpartition("/")[2]
        for stem in (item.label.stem, Path(named).stem):
            for place in places:
                path = self.images.get(place.parent / stem)
                if path and path != item.label:
                    return path
        return None

    # ------------------------------------------------------------ masks

    def _with_masks(
        self, objects: list[LabelledObject], item: VocImage, numbers: Path, size: tuple[int, int]
    ) -> list[LabelledObject]:
        """The objects of an image with their masks, and those that only masks show."""
        pixels = read_numbers(numbers)
        height, width = pixels.shape
        if (width, height) != size:
            raise Unusable("images whose masks have another size", f"{width}x{height}")
        found = list(parts(pixels, (0, BORDER, colour(BORDER))))
        pairs = match([part.box for part in found], [entry.box for entry in objects])
        joined = list(objects)
        for index, part in enumerate(found):
            rle = encode_window(part.left, part.top, part.pixels, height, width)
            if index in pairs:
                joined[pairs[index]] = replace(joined[pairs[index]], segmentation=rle)
                continue
            name = self._class_of(part, item)
            if name:
                joined.append(LabelledObject(name, part.box, rle))
            else:
                self.notes.add(
                    "masks that fit no box and whose class nothing tells, left out", numbers
                )
        return joined

    def _class_of(self, part: Part, item: VocImage) -> str | None:
        """The class that most of an object's pixels have in SegmentationClass."""
        path = item.folder / "SegmentationClass" / f"{item.label.stem}.png"
        if path not in self.files:
            return None
        if item.folder not in self.names:
            self.names[item.folder] = class_numbers(item.folder / "labelmap.txt")
        height, width = part.pixels.shape
        rows = slice(part.top, part.top + height)
        values = read_numbers(path)[rows, part.left : part.left + width]
        if values.shape != part.pixels.shape:
            return None
        ((number, _),) = Counter(values[part.pixels].tolist()).most_common(1)
        return self.names[item.folder].get(number)


def read_lists(folder: Path) -> dict[str, str]:
    """An image's name -> its split as the lists in ImageSets say, those of one class left out."""
    for name in LIST_FOLDERS:
        split_of_name = {}
        files = [f for f in (folder / "ImageSets" / name).glob("*.txt") if "_" not in f.stem]
        # trainval.txt and lists of tools (default.txt) say the least
        for file in sorted(files, key=lambda f: (split_named(f.stem) is None, f)):
            split = split_named(file.stem) or "train"
            for line in read_text(file, str(file)).splitlines():
                words = line.split()
                if words:
                    split_of_name.setdefault(Path(words[0]).name, split)
                    split_of_name.setdefault(Path(words[0]).stem, split)
        if split_of_name:
            return split_of_name
    return {}


def home_of(label: Path, root: Path) -> Path:
    """The folder that holds a label's Annotations, else its own."""
    for folder in label.relative_to(root).parents:
        if folder.name.lower() in LABEL_FOLDERS:
            return root / folder.parent
    return label.parent


# ---------------------------------------------------------------- .xml


def read_xml(file: Path) -> ElementTree.Element:
    """The root of an .xml of this format.  Raises Unusable.

    Entities, with which a small file can fill the memory, need a DOCTYPE: files with one are
    refused before they are parsed. Every encoding that the parser takes writes it in ASCII, or
    with a zero beside each letter.
    """
    raw = read_bytes(file, "images whose .xml cannot be read")
    if b"<!DOCTYPE" in raw.replace(b"\0", b""):
        raise Unusable("images whose .xml has a DOCTYPE, which may hide a bomb")
    try:
        root = ElementTree.fromstring(raw)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # unknown encodings, too
        raise Unusable("images whose .xml is damaged", error) from error
    if root.tag != "annotation":
        raise Unusable(NO_VOC, f"<{root.tag}> instead of <annotation>")
    return root


def read_object(entry: ElementTree.Element, root: ElementTree.Element) -> LabelledObject:
    """An <object> of an .xml file; its parts have boxes of their own, which do not count."""
    name = (entry.findtext("name") or "").strip()
    if not name:
        raise Unusable(NO_VOC, "an object without a name")
    sides = [number(entry.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
    if any(math.isnan(side) for side in sides):
        raise Unusable(NO_VOC, f"{name}: no bndbox with xmin, ymin, xmax, ymax")
    left, right = sorted(sides[::2])
    top, bottom = sorted(sides[1::2])
    if "PASCAL VOC" in (root.findtext("source/annotation") or "").upper():
        left -= 1
        top -= 1
    is_difficult = whole(entry.findtext("difficult")) == 1
    return LabelledObject(name, (left, top, right, bottom), is_crowd=is_difficult)


def number(text: str | None) -> float:
    """A finite number, else NaN."""
    try:
        value = float(text or "")
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def whole(text: str | None) -> int | None:
    value = number(text)
    return int(value) if value == value else None


# ---------------------------------------------------------------- masks


def colour(index: int) -> int:
    """0xRRGGBB of a number in the palette of VOC's masks: its bits, dealt to the three in turn."""
    code = 0
    for place in range(7, -1, -1):
        for shift in (16, 8, 0):
            code |= (index & 1) << place + shift
            index >>= 1
    return code


def class_numbers(labelmap: Path) -> dict[int, str]:
    """What stands for a class in SegmentationClass, index or 0xRRGGBB -> its name.

    labelmap: lines of `name:red,green,blue:parts:actions`, in the order of the indices.
    """
    if not labelmap.is_file():
        numbers = dict(enumerate(NAMES, start=1))
        return numbers | {colour(index): name for index, name in numbers.items()}
    lines = read_text(labelmap, "images whose labelmap.txt cannot be read").splitlines()
    rows = [line.split(":") for line in lines if line.strip() and not line.startswith("#")]
    numbers = {}
    for index, (name, *rest) in enumerate(rows):
        shades = rest[0].split(",") if rest else []
        numbers[index] = name
        if len(shades) == 3 and all(shade.strip().isdecimal() for shade in shades):
            red, green, blue = map(int, shades)
            numbers[red << 16 | green << 8 | blue] = name
    return numbers


def match(boxes: list[Box], others: list[Box]) -> dict[int, int]:
    """Index of a box -> index of the other that it fits; the best pairs first, each in one."""
    if not boxes or not others:
        return {}
    corners = [np.array(one, dtype=float) for one in (boxes, others)]
    xywh = [np.hstack([one[:, :2], one[:, 2:] - one[:, :2]]) for one in corners]
    overlaps = mask_api.iou(*xywh, [False] * len(others))
    pairs = {}
    for flat in np.argsort(-overlaps, axis=None, kind="stable").tolist():
        index, other = divmod(flat, len(others))
        if overlaps[index, other] < SAME:
            break
        if index not in pairs and other not in pairs.values():
            pairs[index] = other
    return pairs
