"""YOLO: a .txt for each image, a line for each object, in shares of the image's sides.

A line is `class x_centre y_centre width height`, or `class x y x y x y ...` for an outline. Images
without a .txt show nothing. data.yaml has the class names and says where the splits lie, as
Ultralytics' documentation of datasets tells; without it folders called train, val and test do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from rfdetr.console import UserError
from rfdetr.data.exif import turned
from rfdetr.data.formats.detect import SPLIT_NAMES, YOLO_LINE, peek
from rfdetr.data.formats.source import (
    LabelledImage,
    LabelledObject,
    Notes,
    Unusable,
    bounds,
    files_below,
    inside,
    is_image_name,
    joined,
    plain_name,
    read_image,
    read_text,
    replaced_folder,
    split_of,
)
from rfdetr.text import counted

NO_YOLO = "images whose .txt is not YOLO's"
CLASS_LISTS = ("classes.txt", "labels/classes.txt", "obj.names")  # a name a line
MOST_CLASSES = 10_000
STRAY = 0.5  # how far beyond 0..1 a coordinate may lie; pixels lie much further


class LabelledPath(NamedTuple):
    image: Path
    labels: Path | None  # no such file: nothing is to be seen


class YoloReader:
    """A YOLO dataset in the folder `root`, an absolute path.  Raises UserError and Unusable.

    described: its data.yaml, if it has one.
    """

    def __init__(self, root: Path, described: Path | None, notes: Notes):
        self.root = root
        self.notes = notes
        self.yaml = described
        self.config = read_config(self.yaml) if self.yaml else {}
        self.class_list = self._find_class_list()
        self.names = self._find_names()
        self._note_equal_names()
        self.nameless = without_name(len(self.names), self.class_list or self.yaml)
        self.class_names = [self.names[number] for number in sorted(self.names)]
        images = self._described_images()
        if not images:
            images = self._found_images()
        self.splits = self._with_labels(images)
        self._note_missing_images()

    def place(self, item: LabelledPath) -> Path:
        return item.image

    def read(self, item: LabelledPath) -> LabelledImage:
        width, height = turned(read_image(item.image))
        objects = []
        if item.labels:
            text = read_text(item.labels, "images whose .txt cannot be read")
            for number, line in enumerate(text.splitlines(), start=1):
                if line.strip():
                    where = f"line {number}"
                    objects.append(self._object_of(line, width, height, where))
        for one in objects:
            if one.name not in self.class_names:
                self.notes.add(self.nameless, item.labels, one.name)
        return LabelledImage(item.image, width, height, objects)

    def _object_of(self, line: str, width: int, height: int, where: str) -> LabelledObject:
        words = line.split()
        if "kpt_shape" in self.config:  # a dataset of poses: their points follow the box
            words = words[:5]
        try:
            values = read_numbers(words)
        except ValueError as error:
            raise Unusable(NO_YOLO, f"{where}: {error}") from error
        label = int(values[0])
        name = self.names.get(label, f"class_{label}")
        points = values[1:]
        if len(points) == 4:
            x, y, w, h = points
            box = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width
            return LabelledObject(name, (*box, (y + h / 2) * height))
        if len(points) < 6 or len(points) % 2:
            raise Unusable(NO_YOLO, f"{where}: {len(values)} numbers")
        outline = [value * side for value, side in zip(points, (width, height) * len(points))]
        return LabelledObject(name, bounds(outline), [outline])

    # ------------------------------------------------------------ names

    def _find_class_list(self) -> Path | None:
        """The file of class names, where data.yaml has none."""
        if self.config.get("names") is not None:
            return None
        files = [self.root / name for name in CLASS_LISTS]
        return next((file for file in files if file.is_file()), None)

    def _find_names(self) -> dict[int, str]:
        """Class number -> name, as far as the dataset tells."""
        names = self.config.get("names")
        if self.class_list:
            lines = read_text(self.class_list, str(self.class_list)).splitlines()
            numbered = enumerate(line.strip() for line in lines)
            names = {number: name for number, name in numbered if name}  # a class number a line
        if names is None:
            return {}
        if not isinstance(names, (list, dict)):
            names = [names] if isinstance(names, str) else [None]
        numbered = names.items() if isinstance(names, dict) else enumerate(names)
        try:
            return {int(number): read_name(name) for number, name in numbered}
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.yaml}: names: expected a list of class names, or lines of `0: name`"
            ) from error

    def _note_equal_names(self) -> None:
        numbers: dict[str, list[int]] = {}
        for number in sorted(self.names):
            numbers.setdefault(self.names[number], []).append(number)
        for name, equal in numbers.items():
            if len(equal) > 1:
                listed = f"{name!r} is {' and '.join(map(str, equal))}"
                what = "names of several class numbers, whose objects become one class"
                self.notes.add(what, self.class_list or self.yaml, listed)

    # ------------------------------------------------------------ images

    def _described_images(self) -> dict[str, list[Path]]:
        """The images that the splits of data.yaml name; none where it names no split."""
        described = {}
        not_there = []
        for split, keys in SPLIT_NAMES.items():
            key = next((key for key in keys if self.config.get(key)), None)
            if key is None:
                continue
            named = self.config[key]
            entries = named if isinstance(named, list) else [named]
            images = [image for entry in entries for image in self._images_of(key, entry)]
            if images:
                described[split] = list(dict.fromkeys(images))
            elif split == "train":
                raise UserError(
                    f"{self.yaml}: train: {', '.join(map(str, entries))}: there are no images. "
                    f"Write the folder as it is called from {self.root}, such as images/train"
                )
            else:
                not_there.append(split)
        if described:
            self._look_for_other_splits(described, not_there)
        return described

    def _look_for_other_splits(
        self, described: dict[str, list[Path]], not_there: list[str]
    ) -> None:
        """Add the splits whose folders data.yaml names wrongly from the folders called like them,
        and note those that it does not name.
        """
        taken = {image for images in described.values() for image in images}
        for split, images in self._found_images().items():
            if split in described or not taken.isdisjoint(images):
                continue
            if split in not_there:
                described[split] = images
                what = f"images of {split}, taken from the folder of that name"
            else:
                what = f"images of {split}, which {self.yaml.name} does not name, left out"
            self.notes.add(what, images[0], count=len(images))

    def _images_of(self, key: str, entry: object) -> list[Path]:
        """The images that an entry of data.yaml means: a folder, a list of images, or an image."""
        if not isinstance(entry, str):
            raise UserError(f"{self.yaml}: {key}: expected a folder or a list of folders")
        place = self._find(entry, f"{self.yaml}: {key}: {entry}", self._bases())
        if place is None:
            self.notes.add("folders of data.yaml that do not exist", self.yaml, f"{key}: {entry}")
            return []
        if place.suffix.lower() == ".txt":
            return list(self._listed_images(place))
        files = [place] if place.is_file() else files_below(place)
        return [file for file in files if is_image_name(file)]

    def _listed_images(self, file: Path) -> Iterator[Path]:
        bases = [file.parent, *self._bases()]
        for line in read_text(file, str(file)).splitlines():
            name = line.strip()
            if not name:
                continue
            place = self._find(name, f"{file}: {name}", bases)
            if place is None:
                self.notes.add("listed images that are missing", file, name)
            elif is_image_name(place):
                yield place

    def _bases(self) -> list[Path]:
        """The folders that paths in data.yaml may be relative to: its own, and before it `path`,
        which may be another machine's.
        """
        named = self.config.get("path")
        return [joined(self.root, named), self.root] if isinstance(named, str) else [self.root]

    def _find(self, name: str, where: str, bases: list[Path]) -> Path | None:
        """What a path in data.yaml or in a list means; None where there is no such file.

        Roboflow writes ../train/images for what lies beside data.yaml.  Raises UserError where
        it lies outside of the dataset.
        """
        beside = name.removeprefix("../")
        places = [joined(base, one) for one in (name, beside) for base in bases]
        there = [place for place in places if os.path.exists(place)]
        for place in there:
            if inside(place, self.root):
                return place
        if not there:
            return None
        raise UserError(
            f"{where} lies outside of {self.root}, where nothing is read: give the folder that "
            "holds both with --input, or copy the images into the dataset"
        )

    def _found_images(self) -> dict[str, list[Path]]:
        """Without data.yaml: images/ with a labels/ beside it, else images with a .txt beside."""
        images = [file for file in files_below(self.root) if is_image_name(file)]
        kept = [file for file in images if replaced_folder(file, self.root, "images", "labels")]
        if not kept:
            folders = {file.parent for file in images if file.with_suffix(".txt").is_file()}
            kept = [file for file in images if file.parent in folders]
        found = {}
        for file in kept:
            found.setdefault(split_of(file, self.root), []).append(file)
        return found

    def _with_labels(self, images: dict[str, list[Path]]) -> dict[str, list[LabelledPath]]:
        """Leaves out splits without any label file: their images are not known to show nothing."""
        splits = {}
        for split, files in images.items():
            items = [LabelledPath(file, self._labels_of(file)) for file in files]
            if any(item.labels for item in items):
                splits[split] = items
            elif items:
                what = f"images of {split}, where no image has a .txt, left out"
                self.notes.add(what, files[0], count=len(files))
        return splits

    def _note_missing_images(self) -> None:
        """Note the label files, in folders called labels or beside images, without an image."""
        files = files_below(self.root)
        images = {folded_stem(file) for file in files if is_image_name(file)}
        items = [item for items in self.splits.values() for item in items if item.labels]
        beside = {item.image.parent for item in items if item.labels.parent == item.image.parent}
        for file in files:
            if file.suffix != ".txt" or folded_stem(file) in images:
                continue
            moved = replaced_folder(file, self.root, "labels", "images")
            is_expected = moved or file.parent in beside
            if is_expected and folded_stem(moved or file) not in images:
                if YOLO_LINE.match(peek(file)):
                    self.notes.add("images that are missing, left out", file)

    def _labels_of(self, image: Path) -> Path | None:
        """labels/.../a.txt of images/.../a.jpg, or the .txt beside it."""
        root = self.root if image.is_relative_to(self.root) else Path(os.path.realpath(self.root))
        moved = replaced_folder(image, root, "images", "labels")
        for file in (moved, image):
            if file and file.with_suffix(".txt").is_file():
                return file.with_suffix(".txt")
        return None


def folded_stem(file: Path) -> str:
    """A path without its suffix, whatever the case of its letters."""
    return str(file.with_suffix("")).casefold()


def without_name(named: int, list_file: Path | None) -> str:
    """What to say of objects of a class without a name, where so many classes have one."""
    where = list_file.name if list_file else "classes.txt"
    advice = f'names in {where} would name it; so does --rename "class_0=NAME" later'
    if named:
        advice = (
            f"{where} names {counted(named, 'class')}; it is kept as one more: name it there or "
            "delete its lines, and convert again; or let --rename join it to another later"
        )
    return f"objects of a class that has a number only ({advice})"


def read_config(file: Path) -> dict:
    """The content of data.yaml; class names as they are written there.  Raises UserError."""
    text = read_text(file, str(file))
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is no YAML: {reason}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected lines such as `train: images/train` and `names: [...]`")
    if isinstance(config.get("names"), (list, dict)):  # where `yes` is a name, not true
        config["names"] = yaml.load(text, yaml.BaseLoader)["names"]
    return config


def read_name(name: object) -> str:
    """A class name as it is written.  ValueError where it is none."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r} is no name")
    return plain_name(name)


def read_numbers(words: list[str]) -> list[float]:
    """The numbers of a line: a class number, and coordinates in or near 0..1.  ValueError."""
    values = [float(word) for word in words]
    label = values[0]
    if label not in range(MOST_CLASSES):
        raise ValueError(f"{label} is no class number")
    for value in values[1:]:
        if not -STRAY <= value <= 1 + STRAY:
            raise ValueError(f"{value} is not in 0..1")
    return values
