"""LabelMe: a .json for each image, with the shapes that were drawn, in pixels.

Polygons, rectangles, circles and painted masks become objects; what has no area is left out.
Shapes of one label and one group_id are the parts of one object. Rectangles are boxes without a
mask, unless they are parts of an object that has drawn ones.

LabelMe shows images turned by their EXIF orientation; imageWidth and imageHeight tell.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from rfdetr.data.exif import turned
from rfdetr.data.formats.source import (
    Box,
    LabelledImage,
    LabelledObject,
    Notes,
    Unusable,
    agreed_size,
    bounds,
    files_below,
    inside,
    is_image_name,
    joined,
    read_bytes,
    read_image,
    split_of,
)
from rfdetr.data.image_files import ImageFile, is_regular_file
from rfdetr.data.images import FORMATS
from rfdetr.masks import encode_window, extent_of_pixels, to_rle

NO_LABELME = "images whose .json is not LabelMe's"
NO_AREA = ("point", "points", "line", "linestrip")
IGNORED = ("__ignore__", "_background_")  # labels of LabelMe's own examples
CORNERS = 64  # of a circle's polygon, whose area is .998 of the circle's
FAR = 2  # sides of the image: points that lie further away are wrong


class Shape(NamedTuple):
    box: Box
    outline: list[float] | dict  # x, y, x, y, ... or an RLE
    is_drawn: bool  # else it is only a box


class LabelMeReader:
    """The images in the folder `root` that have a LabelMe file."""

    def __init__(self, root: Path, notes: Notes):
        self.root = root
        self.notes = notes
        self.class_names: list[str] = []
        files = files_below(root)
        self.images: dict[Path, list[Path]] = {}  # path without suffix -> files
        for file in filter(is_image_name, files):
            self.images.setdefault(file.with_suffix(""), []).append(file)
        self.splits: dict[str, list[Path]] = {}
        for file in files:
            if file.suffix.lower() == ".json":
                self.splits.setdefault(split_of(file, root), []).append(file)
        self._note_unlabelled()

    def _note_unlabelled(self) -> None:
        labelled = {file.with_suffix("") for items in self.splits.values() for file in items}
        folders = {file.parent for file in labelled}
        for stem, files in self.images.items():
            if stem not in labelled and stem.parent in folders:
                self.notes.add("images without a .json, left out", files[0])

    def place(self, item: Path) -> Path:
        return item

    def read(self, item: Path) -> LabelledImage:
        data = read_json(item)
        path, content = self._image_of(item, data)
        if content:
            path, file = embedded_image(path, content)
        else:
            file = read_image(path)
        width = data.get("imageWidth")
        height = data.get("imageHeight")
        if width and height:
            size = agreed_size(file, width, height)
        else:
            size = turned(file)
        objects = self._objects_of(data["shapes"], *size, item)
        return LabelledImage(path, *size, objects, content)

    def _image_of(self, item: Path, data: dict) -> tuple[Path, bytes | None]:
        """(the image's path, its bytes where it lies in the .json): the file that imagePath means
        inside of the dataset, else the one beside the .json, else what the .json holds.
        """
        name = data.get("imagePath")
        name = name if isinstance(name, str) and "\0" not in name else ""
        place = joined(item.parent, name)
        is_inside = inside(place, self.root)
        if name and is_inside and is_regular_file(place):
            return place, None
        beside = self.images.get(item.with_suffix(""))
        if beside:
            return beside[0], None
        encoded = data.get("imageData")
        if isinstance(encoded, str) and encoded:
            try:
                content = base64.b64decode(encoded, validate=True)
            except (binascii.Error, ValueError) as error:
                raise Unusable("images that lie damaged in their .json", error) from error
            return item, content
        if not is_inside:
            raise Unusable("images outside of the dataset", name)
        raise Unusable("images that are missing", name)

    def _objects_of(
        self, shapes: list, width: int, height: int, file: Path
    ) -> list[LabelledObject]:
        groups: dict[object, list[Shape]] = {}
        for index, entry in enumerate(shapes):
            if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
                raise Unusable(NO_LABELME, f"shape {index + 1} has no label")
            label = entry["label"]
            kind = entry.get("shape_type") or "polygon"
            if kind in NO_AREA or label in IGNORED:
                what = f"shapes of type {kind}" if kind in NO_AREA else f"shapes called {label}"
                self.notes.add(f"{what}, left out", file)
                continue
            points = entry.get("points")
            if kind == "polygon" and isinstance(points, list) and len(points) < 3:
                self.notes.add("polygons of fewer than 3 points, left out", file)
                continue
            group = entry.get("group_id")
            part_of = index if group is None else f"group {group}"
            shape = read_shape(kind, entry, width, height)
            groups.setdefault((label, part_of), []).append(shape)
        return [join(label, parts, height, width) for (label, _), parts in groups.items()]


# ---------------------------------------------------------------- the file


def read_json(file: Path) -> dict:
    """The content of a LabelMe file.  Raises Unusable."""
    try:
        data = json.loads(read_bytes(file, "images whose .json cannot be read"))
    except (ValueError, RecursionError) as error:  # the latter: endless brackets
        raise Unusable("images whose .json is damaged", error) from error
    if not isinstance(data, dict) or not isinstance(data.get("shapes"), list):
        raise Unusable(NO_LABELME, "no shapes")
    return data


def embedded_image(label: Path, content: bytes) -> tuple[Path, ImageFile]:
    """(how to call an image that lies in the file `label`, its size); LabelMe has turned it."""
    image = open_content(content, FORMATS)
    suffix = ".jpg" if image.format == "JPEG" else f".{image.format.lower()}"
    return label.with_suffix(suffix), ImageFile(stored_size=image.size)


def open_content(content: bytes, formats: list[str]) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=formats)
    except Exception as error:  # on damaged files Pillow raises OSError, struct.error and others
        raise Unusable("images that lie damaged in their .json", error) from error


# ---------------------------------------------------------------- shapes


def read_shape(kind: str, entry: dict, width: int, height: int) -> Shape:
    """A shape of a (height, width) image.  Raises Unusable."""
    points = read_points(entry.get("points"), FAR * max(width, height))
    if kind == "polygon" and len(points) >= 3:
        outline = [side for point in points for side in point]
        return Shape(bounds(outline), outline, is_drawn=True)
    if kind == "rectangle" and len(points) in (2, 4):
        left, top, right, bottom = box = bounds([side for point in points for side in point])
        outline = [left, top, right, top, right, bottom, left, bottom]
        return Shape(box, outline, is_drawn=False)
    if kind == "circle" and len(points) == 2:
        (x, y), rim = points
        radius = math.dist((x, y), rim)
        angles = [2 * math.pi * corner / CORNERS for corner in range(CORNERS)]
        outline = []
        for angle in angles:
            outline += [x + radius * math.cos(angle), y + radius * math.sin(angle)]
        return Shape((x - radius, y - radius, x + radius, y + radius), outline, is_drawn=True)
    if kind == "mask" and len(points) == 2 and isinstance(entry.get("mask"), str):
        return painted_shape(points[0], entry["mask"], width, height)
    raise Unusable(NO_LABELME, f"{kind} of {len(points)} points")


def read_points(points: object, limit: float) -> list[tuple[float, float]]:
    """Pairs of numbers within the limit.  Raises Unusable."""
    read = []
    for point in points if isinstance(points, list) else []:
        numbers = point if isinstance(point, list) else []
        if len(numbers) != 2 or any(type(side) not in (int, float) for side in numbers):
            raise Unusable(NO_LABELME, "a point is no pair of numbers")
        if not all(-limit < side < limit for side in numbers):  # never true of NaN
            raise Unusable(NO_LABELME, f"a point lies at {numbers}")
        read.append((numbers[0], numbers[1]))
    return read


def painted_shape(corner: tuple[float, float], encoded: str, width: int, height: int) -> Shape:
    """A mask that was painted: a PNG of its window, whose upper left pixel is `corner`."""
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable(NO_LABELME, f"a painted mask is damaged: {error}") from error
    image = open_content(content, ["PNG"])
    left, top = (round(side) for side in corner)
    right = min(left + image.width, width)
    bottom = min(top + image.height, height)
    if not (0 <= left < right and 0 <= top < bottom):
        raise Unusable(NO_LABELME, "a painted mask lies outside of its image")
    try:
        window = np.asarray(image)[: bottom - top, : right - left] > 0
    except Exception as error:  # on damaged files Pillow raises OSError, struct.error and others
        raise Unusable(NO_LABELME, f"a painted mask is damaged: {error}") from error
    if window.ndim != 2:
        raise Unusable(NO_LABELME, "a painted mask has colours")
    if not window.any():
        raise Unusable(NO_LABELME, "a painted mask is empty")
    x1, y1, x2, y2 = extent_of_pixels(window)
    rle = encode_window(left, top, window, height, width)
    return Shape((left + x1, top + y1, left + x2, top + y2), rle, is_drawn=True)


def join(label: str, shapes: list[Shape], height: int, width: int) -> LabelledObject:
    """The object of a (height, width) image that shapes are the parts of."""
    lefts, tops, rights, bottoms = zip(*(shape.box for shape in shapes))
    box = (min(lefts), min(tops), max(rights), max(bottoms))
    outlines = [shape.outline for shape in shapes]
    if not any(shape.is_drawn for shape in shapes):
        return LabelledObject(label, box)
    if all(isinstance(outline, list) for outline in outlines):
        return LabelledObject(label, box, outlines)
    rles = [to_rle([one] if isinstance(one, list) else one, height, width) for one in outlines]
    rle = mask_api.merge(rles)
    return LabelledObject(label, box, rle | {"counts": rle["counts"].decode("ascii")})
