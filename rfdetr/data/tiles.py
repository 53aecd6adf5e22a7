"""A split whose images are the tiles of its images, for training and scoring in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from rfdetr.data.records import CocoSplit, FromRecords, ImageList, ImageRecord, ImageTable
from rfdetr.tiling import AUTO, LEAST_TILE, Tiling, Window, checked_side

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


def visible_objects(image: ImageRecord, window: Window) -> np.ndarray:
    """The numbers of an image's objects of which enough lies in a window."""
    boxes = image.boxes
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


def training_tiling(
    split: CocoSplit, resolution: int, tile: int | str | None, overlap: float, full: bool
) -> Tiling | None:
    """The tiles to train on, None for none; tile: as in --tile.  resolution: of the input.

    "auto": so large that 9 of 10 objects have SEEN_WELL pixels of the input and more, and that the
    largest fit several times. Raises UserError for a tile that is too small.
    """
    if tile == AUTO:
        tile = suggested_tile(split, resolution)
    side = checked_side(tile or 0)
    return Tiling(side, overlap, full) if side else None


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
