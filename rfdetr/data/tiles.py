"""A split whose images are the tiles of its images, for training and scoring in tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from rfdetr.data.faults import PLACES_KEPT, Problem, first_few
from rfdetr.data.records import CocoSplit, FromRecords, ImageList, ImageRecord, ImageTable
from rfdetr.text import printable
from rfdetr.tiling import AUTO, LEAST_TILE, Tiling, Window, checked_side, tiles_like

VISIBLE = 0.25  # of an object's box: with less of it in a tile it is not learnt there
SMALL_OBJECTS = 0.1  # the share of objects that may be smaller than ...
SEEN_WELL = 16  # ... so many pixels of the model's input, by "auto"
OBJECTS_A_SIDE = 4  # the largest objects fit so many times into a tile's side, by "auto"
WORTH_IT = 0.8  # of an image's longer side: with larger tiles "auto" takes none
STEP = 32  # pixels that "auto" rounds to


def places_of_tiles(images: ImageTable | ImageList, tiling: Tiling) -> list[tuple[int, Window]]:
    """(number of the image, tile) of all tiles."""
    return [
        (number, window)
        for number, (width, height) in enumerate(images.sizes.tolist())
        for window in tiling.windows(height, width)
    ]


def images_an_epoch(images: ImageTable | ImageList, tiling: Tiling | None) -> int:
    """How many images, or their tiles, there are to be trained on."""
    return len(places_of_tiles(images, tiling)) if tiling else len(images)


class TileTable(FromRecords, Sequence):
    """The tiles of images, as records of them with a window and the objects that are seen in it."""

    def __init__(self, images: ImageTable | ImageList, tiling: Tiling):
        self.images = images
        self.tiling = tiling
        self.places = places_of_tiles(images, tiling)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> ImageRecord:
        number, window = self.places[index]
        return part_of(self.images[number], window)

    def moved(self, index: int, seed: int) -> ImageRecord:
        """The same tile at a place near by, which the seed alone decides, so that in training edges
        lie elsewhere each time.
        """
        number, window = self.places[index]
        image = self.images[number]
        generator = torch.Generator().manual_seed(seed)
        most = (self.tiling.side - round(self.tiling.side * self.tiling.overlap)) // 2
        dx, dy = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
        dx = min(max(dx, -window.left), image.width - window.right)
        dy = min(max(dy, -window.top), image.height - window.bottom)
        left, top, right, bottom = window
        return part_of(image, Window(left + dx, top + dy, right + dx, bottom + dy))


def in_tiles(split: CocoSplit, tiling: Tiling | None) -> CocoSplit:
    """The split with its tiles in place of its images; without `tiling` the split itself."""
    return split if tiling is None else replace(split, images=TileTable(split.images, tiling))


def tiles_with_masks(tiles: TileTable, images: list[int]) -> list[int]:
    """The positions of the tiles of some images, by number, that show an object with a mask."""
    boxes = tiles.images.boxes
    has_mask = tiles.images.has_mask
    ends = np.cumsum(tiles.images.object_counts)
    wanted = set(images)
    masked = {}
    for number, own in enumerate(np.split(np.arange(len(boxes)), ends[:-1])):
        if number in wanted:
            masked[number] = boxes[own][has_mask[own]]
    return [
        index
        for index, (number, window) in enumerate(tiles.places)
        if number in wanted and len(visible_boxes(masked[number], window))
    ]


def visible_objects(image: ImageRecord, window: Window) -> np.ndarray:
    """The numbers of an image's objects of which enough lies in a window."""
    return visible_boxes(image.boxes, window)


def visible_boxes(boxes: np.ndarray, window: Window) -> np.ndarray:
    """The numbers of an image's boxes (n, 4) xyxy of which enough lies in a window."""
    low = np.maximum(boxes[:, :2], [window.left, window.top])
    high = np.minimum(boxes[:, 2:], [window.right, window.bottom])
    seen = (high - low).clip(0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.flatnonzero((seen > 0) & (seen >= VISIBLE * areas))


def part_of(image: ImageRecord, window: Window) -> ImageRecord:
    """What lies in a window of an image: coordinates and sizes stay those of the image, boxes end
    at the window.
    """
    kept = visible_objects(image, window)
    left, top, right, bottom = np.array(window, dtype=np.float32)
    return replace(
        image,
        boxes=image.boxes[kept].clip([left, top, left, top], [right, bottom, right, bottom]),
        labels=image.labels[kept],
        segmentations=[image.segmentations[i] for i in kept],
        window=window,
    )


def cut_objects(image: ImageRecord) -> np.ndarray:
    """The numbers of an image's objects that the edges of its window cut, of a tile; else none."""
    if image.window is None:
        return np.zeros(0, int)
    left, top, right, bottom = image.window
    boxes = image.boxes
    is_cut = (boxes[:, 0] <= left) & (left > 0)
    is_cut |= (boxes[:, 1] <= top) & (top > 0)
    is_cut |= (boxes[:, 2] >= right) & (right < image.width)
    is_cut |= (boxes[:, 3] >= bottom) & (bottom < image.height)
    return np.flatnonzero(is_cut)


def training_tiling(
    split: CocoSplit,
    resolution: int,
    tile: int | str | None,
    overlap: float | None,
    full: bool | None,
    content: dict | None = None,
) -> Tiling | None:
    """The tiles to train on, None for none; tile, overlap, full: as the flags.

    resolution: of the input.  content: of the checkpoint that the training begins with.  "auto": so
    large that 9 of 10 objects have SEEN_WELL pixels of the input and more, and that the largest fit
    several times.  Raises UserError for a tile that is too small.
    """
    side = suggested_tile(split, resolution) if tile == AUTO else checked_side(tile or 0)
    return tiles_like(content or {}, side, overlap, full) if side else None


def suggested_tile(split: CocoSplit, resolution: int) -> int:
    """The side in pixels that "auto" takes; 0 where images need no tiles."""
    boxes = split.images.boxes
    if not len(boxes):
        return 0
    sides = boxes[:, 2:] - boxes[:, :2]
    small = float(np.quantile(np.sqrt(sides.prod(axis=1)), SMALL_OBJECTS))
    large = float(np.quantile(sides.max(axis=1), 1 - SMALL_OBJECTS / 2))
    wanted = max(resolution * small / SEEN_WELL, OBJECTS_A_SIDE * large, LEAST_TILE)
    side = -int(-wanted // STEP) * STEP  # rounded up
    longest = float(np.median(split.images.sizes.max(axis=1)))
    return side if side < WORTH_IT * longest else 0


def objects_in_no_tile(images: ImageTable | ImageList, tiling: Tiling) -> np.ndarray:
    """(objects,) bool: of which no tile shows enough to be learnt there."""
    boxes = images.boxes
    if tiling.with_whole:
        return np.zeros(len(boxes), bool)
    sizes = np.repeat(images.sizes, images.object_counts, axis=0)
    # tiles are a grid: the one that shows most of an object shows most of it along both axes
    seen = [most_seen(boxes[:, axis::2], sizes[:, axis], tiling) for axis in (0, 1)]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.prod(seen, axis=0) < VISIBLE * areas


def most_seen(spans: np.ndarray, lengths: np.ndarray, tiling: Tiling) -> np.ndarray:
    """(objects,) how much of each span (objects, 2) of an axis the best tile shows, in pixels.

    lengths: (objects,) of the images along this axis.
    """
    seen = np.zeros(len(spans))
    order = np.argsort(lengths, kind="stable")
    values, first = np.unique(lengths[order], return_index=True)
    for length, members in zip(values.tolist(), np.split(order, first[1:])):
        low, high = spans[members].T
        for start in tiling.starts(length):
            end = min(start + tiling.side, length)
            part = np.minimum(high, end) - np.maximum(low, start)
            seen[members] = np.maximum(seen[members], part)
    return seen


def tile_problems(split: CocoSplit, tiling: Tiling) -> list[Problem]:
    """A warning where no tile shows enough of an object, an error where that is so of all."""
    unseen = np.flatnonzero(objects_in_no_tile(split.images, tiling))
    if not len(unseen):
        return []
    labels = split.images.labels
    counts = np.bincount(labels[unseen], minlength=len(split.class_names))
    classes = [
        f"{printable(name)} {count} of {total}"
        for name, count, total in zip(split.class_names, counts, split.objects_per_class)
        if count
    ]
    boxes = split.images.boxes[unseen]
    longest = math.ceil((boxes[:, 2:] - boxes[:, :2]).max())
    headline = (
        f"{split.annotation_file}: no tile of {tiling.side} px shows a quarter of "
        f"{len(unseen)} of {len(labels)} objects"
    )
    message = (
        f"{headline} ({first_few(classes)}; up to {longest} px long): they are not learnt, and "
        "what tiles show of them counts as background. --tile_full 1 shows each image as a whole, "
        "too; or give a larger --tile"
    )
    places = []
    for place in split.places[unseen[:PLACES_KEPT]].tolist():
        image = split.images[place]
        places.append(f"image {image.id} ({image.file_name})")
    severity = "error" if len(unseen) == len(labels) else "warning"
    return [Problem("ANN_NO_TILE", severity, message, len(unseen), places, headline)]
