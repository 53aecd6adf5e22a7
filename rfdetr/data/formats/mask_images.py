"""Masks as images: the numbers of an image's objects, pixel by pixel, or one image an object.

    images/a.png and masks/a.png: pixels hold the number of their object, 0 is ground
    ID/images/a.png and ID/masks/*.png: each mask is one object (Data Science Bowl 2018)

Numbers have 8 or 16 bits; in RGB each colour is an object, and black is ground.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import find_objects, label

from rfdetr.data.formats.source import (
    LabelledImage,
    LabelledObject,
    Notes,
    Unusable,
    agreed_size,
    files_below,
    is_image_name,
    read_image,
    replaced_folder,
    split_of,
)
from rfdetr.data.image_files import is_regular_file
from rfdetr.data.images import open_image
from rfdetr.masks import encode_window

UNREADABLE = "images whose mask cannot be read"
SCATTERED = (
    "masks most of whose values lie in several places, and become one object each (are they "
    "classes, or soft edges? Give each object a value of its own)"
)
EIGHT_NEIGHBOURS = np.ones((3, 3), bool)
MOST_OBJECTS = 10_000  # of an image: a photograph has more values


class Part(NamedTuple):
    """The pixels of one number in an image of numbers."""

    number: int
    left: int
    top: int
    pixels: np.ndarray  # (h, w) bool, the smallest window that holds them

    @property
    def box(self) -> tuple[int, int, int, int]:
        height, width = self.pixels.shape
        return self.left, self.top, self.left + width, self.top + height


class MaskedImage(NamedTuple):
    image: Path
    masks: list[Path]
    is_one_each: bool  # each mask is one object; else the only one holds numbers


class MasksReader:
    """Images with mask images in the folder `root`, of one class."""

    def __init__(self, root: Path, class_name: str, notes: Notes):
        self.class_names = [class_name]
        self.notes = notes
        self.splits: dict[str, list[MaskedImage]] = {}
        for item in find_masks(root, notes):
            self.splits.setdefault(split_of(item.image, root), []).append(item)

    def place(self, item: MaskedImage) -> Path:
        return item.image if item.is_one_each else item.masks[0]

    def read(self, item: MaskedImage) -> LabelledImage:
        file = read_image(item.image)
        objects = []
        size = file.stored_size
        for path in item.masks:
            numbers = read_numbers(path)
            height, width = numbers.shape
            size = agreed_size(file, width, height)
            if item.is_one_each:
                numbers = numbers != 0
            found = list(parts(numbers))
            if not found and item.is_one_each:
                self.notes.add("masks without a pixel, left out", path)
            if len(found) == 1 and not item.is_one_each:
                self.notes.add("masks of one value, whose objects become one", path)
            if len(found) > 1 and not item.is_one_each and are_scattered(found):
                self.notes.add(SCATTERED, path)
            objects += [self._object_of(part, height, width) for part in found]
        return LabelledImage(item.image, *size, objects)

    def _object_of(self, part: Part, height: int, width: int) -> LabelledObject:
        rle = encode_window(part.left, part.top, part.pixels, height, width)
        return LabelledObject(self.class_names[0], part.box, rle)


def are_scattered(found: list[Part]) -> bool:
    """Whether most parts lie in several places: they are no objects, or pieces of several."""
    scattered = [part for part in found if label(part.pixels, EIGHT_NEIGHBOURS)[1] > 1]
    return 2 * len(scattered) > len(found)


def find_masks(root: Path, notes: Notes) -> Iterator[MaskedImage]:
    """The images below a folder called images that have masks in its sister called masks.

    Images without masks, and masks without an image, are noted.
    """
    images = []
    masks: dict[Path, list[Path]] = {}  # folder -> files
    for file in filter(is_image_name, files_below(root)):
        folders = [part.lower() for part in file.relative_to(root).parts[:-1]]
        if "masks" in folders:
            masks.setdefault(file.parent, []).append(file)
        elif "images" in folders:
            images.append(file)
    numbered = {file.with_suffix(""): file for files in masks.values() for file in files}
    neighbours: dict[Path, int] = {}
    for image in images:
        neighbours[image.parent] = neighbours.get(image.parent, 0) + 1
    used: set[Path] = set()
    for image in images:
        twin = replaced_folder(image, root, "images", "masks")
        of_folder = masks.get(twin.parent, [])
        if twin.with_suffix("") in numbered:
            taken = [numbered[twin.with_suffix("")]]
            yield MaskedImage(image, taken, is_one_each=False)
        elif of_folder and neighbours[image.parent] == 1:
            taken = of_folder
            yield MaskedImage(image, taken, is_one_each=True)
        else:
            taken = []
            notes.add("images without a mask, left out", image)
        used.update(taken)
    note_missing_images(masks, used, notes)


def note_missing_images(masks: dict[Path, list[Path]], used: set[Path], notes: Notes) -> None:
    """masks: folder -> its masks; used: those whose image is there.

    A folder of which none is may hold one image's masks or many images'.
    """
    for folder, files in masks.items():
        without = [file for file in files if file not in used]
        if len(without) == len(files):
            notes.add("folders of masks without an image, left out", folder)
            continue
        for file in without:
            notes.add("images that are missing, left out", file)


def read_numbers(path: Path) -> np.ndarray:
    """The numbers in a mask image, (H, W) integers or bool; a colour is the number 0xRRGGBB.

    Of a palette's images the indices are taken.  Raises Unusable.
    """
    if not is_regular_file(path):
        raise Unusable(UNREADABLE, "no plain file")
    try:
        with open_image(path) as image:
            if image.format in ("JPEG", "MPO"):
                raise Unusable("images whose mask is a JPEG, which changes numbers", "use PNG")
            pixels = np.asarray(image)
    except Unusable:
        raise
    except Exception as error:  # on damaged files Pillow raises OSError, struct.error and others
        raise Unusable(UNREADABLE, error) from error
    if pixels.ndim == 3 and pixels.shape[2] == 2:  # gray and transparency
        pixels = pixels[:, :, 0]
    if pixels.ndim == 3:
        red, green, blue = np.moveaxis(pixels[:, :, :3].astype(np.int32), 2, 0)
        pixels = red << 16 | green << 8 | blue
    if pixels.dtype.kind == "f":
        if not (np.isfinite(pixels).all() and (pixels == pixels.round()).all()):
            raise Unusable(UNREADABLE, "its values are no whole numbers")
        pixels = pixels.astype(np.int64)
    return pixels


def parts(numbers: np.ndarray, ground: tuple[int, ...] = (0,)) -> Iterator[Part]:
    """Each number in an image of numbers (H, W) but for those of the ground.  Raises Unusable."""
    values, places = np.unique(numbers, return_inverse=True)
    if len(values) > MOST_OBJECTS:
        raise Unusable(UNREADABLE, f"{len(values)} values are no numbers of objects")
    places = places.reshape(numbers.shape)
    for index, (rows, columns) in enumerate(find_objects(places + 1)):
        number = int(values[index])
        if number not in ground:
            yield Part(number, columns.start, rows.start, places[rows, columns] == index)
