"""All annotations of a file checked at once; those in doubt are read again, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from math import inf

import numpy as np

from rfdetr.data.annotation_checks import (
    MOST_AREA,
    SLACK,
    THINNEST,
    area_is_wrong,
    check_segmentation,
    clip_box,
    entry_faults,
    is_identical,
)
from rfdetr.data.coordinates import FEW_PIXELS, coordinate_faults
from rfdetr.data.exif import SizedImage
from rfdetr.data.faults import CODES, Faults
from rfdetr.data.flat import (
    LIMIT,
    NO_EXTENT,
    NO_MASK,
    POLYGONS,
    RLE_RUNS,
    RLE_TEXT,
    FlatAnnotations,
    as_array,
    row_slices,
)
from rfdetr.data.rectangles import rectangular_masks
from rfdetr.data.rle import rle_extents, run_sums
from rfdetr.ids import other_form

Note = tuple[int, str, str, object]  # of a fault: index, code, place, the entry or None

MANY_CLIPPED = 0.5  # share of the sound boxes
PERHAPS_CORNERS = (
    "as so many are, are they x1, y1, x2, y2 where COCO has x, y, width, height? Look with "
    "validate_setup.py --preview"
)
AT_ONCE = 1000  # entries in doubt that are read together
NOT_LISTED = SizedImage("", "not listed", inf, inf)


@dataclass
class SoundAnnotations:
    """The n annotations of a file: which are sound, and what of them is to be learnt.

    Columns in the order of the file, most of them in the memory of `flat`; those of unsound ones
    mean nothing.
    """

    flat: FlatAnnotations
    is_sound: np.ndarray  # (n,) bool
    ids: np.ndarray  # (n,) int64
    categories: np.ndarray  # (n,) int64
    is_crowd: np.ndarray  # (n,) bool
    areas: np.ndarray  # (n,) float64; NaN where they are to be computed
    boxes: np.ndarray  # (n, 4) float64 x, y, width, height as in the file
    clipped: np.ndarray  # (n, 4) float32 xyxy inside the image; NaN where the entry is dropped
    mask_kinds: np.ndarray  # (n,) uint8, as in FlatAnnotations; NO_MASK where none is usable
    spans: np.ndarray  # (n, 2) int64


def check_annotations(
    flat: FlatAnnotations,
    images: dict[int | str, SizedImage],
    category_ids: set[int],
    faults: Faults,
) -> SoundAnnotations:
    """Note the faults of annotations and tell the sound ones.

    images: all that the file lists, those that cannot be read, too.  What the columns prove to be
    without a fault is not looked at again; the others are read and judged one by one.
    """
    sizes = image_sizes(flat, images)
    sound = columns_of(flat)
    extents = mask_extents(sound)
    judged = np.flatnonzero(is_doubtful(sound, extents, sizes, category_ids))
    usual = np.ones(len(flat), dtype=bool)
    usual[judged] = False
    sound.is_sound[:] = usual
    shorter_sides = sizes.min(axis=1)
    del sizes
    lacks_mask = usual & (sound.mask_kinds == NO_MASK) & ~sound.is_crowd
    entries = EntryCheck(sound, extents, images, category_ids)
    notes = [entries.judge(judged), entries.without_mask(lacks_mask)]
    for _, code, place, entry in merge(*notes, key=lambda note: note[0]):
        faults.note(code, place, entry)
    with np.errstate(invalid="ignore", over="ignore"):
        extents[~sound.is_sound | sound.is_crowd] = np.nan
        found = coordinate_faults(sound.boxes, extents, shorter_sides, sound.is_sound)
        for code, severity, indices in found:
            for index in indices.tolist():
                faults.note(code, entries.place(index))
            if severity == "error":
                faults.make_error(code)
        is_mask = np.isfinite(extents[:, 0])
        for index in rectangular_masks(flat, sound.mask_kinds, sound.spans, is_mask).tolist():
            faults.note("ANN_MASK_RECTANGLE", entries.place(index))
    if faults.count("ANN_BBOX_CLIPPED") > MANY_CLIPPED * sound.is_sound.sum():
        faults.advise("ANN_BBOX_CLIPPED", f"{CODES['ANN_BBOX_CLIPPED'].advice}; {PERHAPS_CORNERS}")
    return sound


# ---------------------------------------------------------------- all at once


def columns_of(flat: FlatAnnotations) -> SoundAnnotations:
    """The columns as the file has them: views, but of what `flat` lacks."""
    count = len(flat)
    return SoundAnnotations(
        flat=flat,
        is_sound=np.zeros(count, dtype=bool),
        ids=as_array(flat.ids, np.int64),
        categories=as_array(flat.categories, np.int64),
        is_crowd=as_array(flat.crowd, bool),
        areas=as_array(flat.areas, np.float64),
        boxes=as_array(flat.boxes, np.float64).reshape(-1, 4),
        clipped=np.full((count, 4), np.nan, np.float32),
        mask_kinds=as_array(flat.mask_kinds, np.uint8),
        spans=as_array(flat.spans, np.int64).reshape(-1, 2),
    )


def image_sizes(flat: FlatAnnotations, images: dict[int | str, SizedImage]) -> np.ndarray:
    """(n, 2) width and height of each annotation's image in pixels; NaN for an unknown image.

    Infinite where neither the entry nor the file tells them.
    """
    sizes = np.full((len(flat.image_ids) + 1, 2), np.nan)
    for image_id, number in flat.image_ids.items():
        image = images.get(image_id)
        if image is not None:
            sizes[number] = image.width, image.height
    return sizes[as_array(flat.image_numbers, np.int32)]  # -1 is the last row


def mask_extents(sound: SoundAnnotations) -> np.ndarray:
    """(n, 4) float64 xyxy of polygons and compressed RLEs; NaN for other annotations."""
    flat = sound.flat
    parts = as_array(flat.parts, np.int64).reshape(-1, 2)
    numbers = as_array(flat.numbers, np.float64)
    extents = np.full((len(flat), 4), np.nan)
    for rows in row_slices(len(flat)):
        spans = sound.spans[rows]
        has_parts = (sound.mask_kinds[rows] == POLYGONS) & (spans[:, 1] > spans[:, 0])
        spans = spans[has_parts]
        if len(spans):
            begin = spans[0, 0]
            extents[rows][has_parts] = polygon_extents(
                numbers, parts[begin : spans[-1, 1]], spans[:, 0] - begin
            )
    if len(flat.rle_indices):
        rle_extents = as_array(flat.rle_extents, np.float64).reshape(-1, 4)
        extents[as_array(flat.rle_indices, np.int64)] = rle_extents
    return extents


def polygon_extents(numbers: np.ndarray, parts: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(k, 4) xyxy of k masks whose polygons lie one after another.

    parts: the polygons' ranges of `numbers`; first (k,): where the parts of each mask begin.
    """
    coordinates = numbers[parts[0, 0] : parts[-1, 1]]
    begins = (parts[:, 0] - parts[0, 0]) // 2  # all have an even number of coordinates
    extents = np.empty((len(first), 4))
    for axis in (0, 1):
        values = coordinates[axis::2]
        extents[:, axis] = np.minimum.reduceat(np.minimum.reduceat(values, begins), first)
        extents[:, 2 + axis] = np.maximum.reduceat(np.maximum.reduceat(values, begins), first)
    return extents


def is_doubtful(
    sound: SoundAnnotations, extents: np.ndarray, sizes: np.ndarray, category_ids: set[int]
) -> np.ndarray:
    """(n,) which annotations may have a fault; the boxes of the others are clipped.

    extents (n, 4): of their masks; sizes (n, 2): of their images.  A mask that is missing is no
    doubt.
    """
    flat = sound.flat
    doubtful = np.array(flat.odd, bool)
    pixels = np.zeros(len(flat))  # of compressed RLEs
    if len(flat.rle_indices):
        indices = as_array(flat.rle_indices, np.int64)
        heights, widths = as_array(flat.rle_sizes, np.int64).reshape(-1, 2).T
        pixels[indices] = heights * widths
        with np.errstate(invalid="ignore"):
            fits = np.isin(sizes[indices, 0] - widths, (0, inf))
            fits &= np.isin(sizes[indices, 1] - heights, (0, inf))
        fits &= as_array(flat.rle_sums, np.int64) == heights * widths
        fits &= np.isfinite(extents[indices, 0])  # else no pixel is set
        doubtful[indices] |= ~fits
    known = list(category_ids)
    for rows in row_slices(len(flat)):
        doubtful[rows] |= ~np.isin(sound.categories[rows], known)
        with np.errstate(invalid="ignore", over="ignore"):
            doubtful[rows] |= clip_usual(sound, rows, extents[rows], sizes[rows], pixels[rows])
    return doubtful | is_repeated(sound.ids) | is_repeated(twin_keys(sound))


def clip_usual(
    sound: SoundAnnotations, rows: slice, extents: np.ndarray, sizes: np.ndarray, pixels: np.ndarray
) -> np.ndarray:
    """Clip the boxes of these rows; returns which of their boxes, polygons or areas are doubtful.

    extents, sizes, pixels: of the rows, as in is_doubtful.
    """
    boxes = sound.boxes[rows]
    _, _, width, height = boxes.T
    low = np.maximum(boxes[:, :2], 0)
    far_corner = boxes[:, :2] + boxes[:, 2:]
    high = np.minimum(far_corner, sizes)
    sound.clipped[rows] = np.hstack([low, high])
    out = np.hstack([-boxes[:, :2], far_corner - sizes])
    fits = (width >= THINNEST) & (height >= THINNEST) & (high - low >= THINNEST).all(1)
    fits &= out.max(axis=1, initial=-inf) <= SLACK
    left, top, right, bottom = extents.T
    is_polygon = sound.mask_kinds[rows] == POLYGONS
    far = np.minimum(2 * sizes.max(axis=1), LIMIT)
    near = (np.minimum(left, top) >= -far) & (np.maximum(right, bottom) <= far)
    most = (width + 1) * (height + 1)
    around = (right - left + 1) * (bottom - top + 1)
    most = np.where(is_polygon, np.maximum(most, around), np.maximum(most, pixels))
    areas = sound.areas[rows]
    is_share = (areas < 1) & (width * height > FEW_PIXELS)
    return ~fits | (is_polygon & ~near) | is_share | (areas > MOST_AREA * most)


def is_repeated(values: np.ndarray) -> np.ndarray:
    """(n,) which of some whole numbers occur more than once."""
    in_order = np.sort(values)
    return np.isin(values, in_order[1:][in_order[1:] == in_order[:-1]])


def twin_keys(sound: SoundAnnotations) -> np.ndarray:
    """(n,) uint64, equal for annotations of the same image, category and box; seldom for others."""
    keys = np.array(sound.flat.image_numbers, np.int64).view(np.uint64)
    for rows in row_slices(len(keys)):
        boxes = sound.boxes[rows] + 0.0  # -0.0 equals 0.0
        key = keys[rows]
        for column in (sound.categories[rows], *boxes.T):
            key = (key ^ key >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
            key ^= np.ascontiguousarray(column).view(np.uint64)
        keys[rows] = key
    return keys


# ---------------------------------------------------------------- one by one


class EntryCheck:
    """Judges entries that are not plainly sound, in the order of the file."""

    def __init__(
        self,
        sound: SoundAnnotations,
        extents: np.ndarray,
        images: dict[int | str, SizedImage],
        category_ids: set[int],
    ):
        """extents: of the masks, (n, 4) xyxy; rows of what is judged are set."""
        self.sound = sound
        self.extents = extents
        self.images = images
        self.category_ids = category_ids
        self.first_with_id: dict[int, dict] = {}
        self.first_with_box: dict[tuple, dict] = {}
        self.places: dict[int, str] = {}  # of the entries that were judged
        self.image_ids = list(sound.flat.image_ids)
        self.rles: dict[int, dict] = {}  # by index, those that are to be measured

    def place(self, index: int) -> str:
        """Where an annotation is, for a message."""
        if index in self.places:
            return self.places[index]
        image_id = self.image_ids[self.sound.flat.image_numbers[index]]
        image = self.images[image_id]
        return f"annotation {self.sound.ids[index]} of image {image_id} ({image.file_name})"

    def without_mask(self, lacks_mask: np.ndarray) -> Iterator[Note]:
        for index in np.flatnonzero(lacks_mask).tolist():
            yield index, "ANN_NO_MASK", self.place(index), None

    def judge(self, indices: np.ndarray) -> Iterator[Note]:
        """The faults of these entries; their rows of the columns are set."""
        entries = self.sound.flat.entries
        for start in range(0, len(indices), AT_ONCE):
            part = indices[start : start + AT_ONCE].tolist()
            read = entries.read(part)
            sums = run_sums(compressed_counts(read))
            checked = [self._check(*pair, sums) for pair in zip(part, read)]
            self._measure_rles()
            for index, entry, (place, codes) in zip(part, read, checked):
                for code in codes:
                    yield index, code, place, entry if entries.in_memory else None

    def _check(self, index: int, entry: dict, sums: dict[str, int]) -> tuple[str, list[str]]:
        """(the place, the codes of its faults) of one entry; its row of the columns is set."""
        sound = self.sound
        image_id = entry.get("image_id")
        # ids of other types may not be hashable
        known = type(image_id) in (int, str) and image_id in self.images
        meant = image_id if known else other_form(image_id)
        image = self.images.get(meant, NOT_LISTED)
        image_fault = None
        if not known:
            image_fault = "ANN_IMAGE_TYPE" if meant in self.images else "ANN_IMAGE_UNKNOWN"
        place = f"annotation {entry.get('id')} of image {image_id} ({image.file_name})"
        box, box_fault = clip_box(entry, image.width, image.height)
        mask = check_segmentation(entry.get("segmentation"), image.width, image.height, sums)
        codes = entry_faults(entry, image_fault, self.category_ids, self.first_with_id)
        wrong_area = area_is_wrong(entry, box, mask)
        if wrong_area and box:  # what is dropped needs none
            codes.append("ANN_AREA_INVALID")
        shape_faults = mask.faults | {box_fault} if box_fault else mask.faults
        codes += sorted(shape_faults)
        self.extents[index] = np.nan
        if any(CODES[code].severity == "error" for code in codes):
            return place, codes
        self.places[index] = place
        is_crowd = int(entry.get("iscrowd") or 0)
        if box and not is_crowd and mask.usable:
            if mask.extent:
                self.extents[index] = mask.extent
            else:
                self.rles[index] = mask.usable
        key = (image_id, entry["category_id"], *entry["bbox"])
        twin = self.first_with_box.setdefault(key, entry)
        if box and twin is not entry and is_identical(twin, entry):
            codes.append("ANN_DUPLICATE")
            box = None
        if box and not is_crowd and not mask.usable:
            codes.append("ANN_NO_MASK")
        area = None if wrong_area else entry.get("area")
        sound.is_sound[index] = True
        sound.is_crowd[index] = is_crowd
        sound.areas[index] = np.nan if area is None else area
        sound.clipped[index] = box or np.nan
        self._set_mask(index, mask.usable)
        return place, codes

    def _measure_rles(self) -> None:
        extents = rle_extents(list(self.rles.values()))
        for index, extent in zip(self.rles, extents):
            self.extents[index] = extent or NO_EXTENT
        self.rles = {}

    def _set_mask(self, index: int, usable: list | dict | None) -> None:
        """Set what is usable of an entry's mask."""
        flat = self.sound.flat
        kind = NO_MASK
        span = (0, 0)
        if isinstance(usable, list):
            kind = POLYGONS
            first = len(flat.parts) // 2
            for polygon in usable:
                flat.add_polygon(polygon)
            span = (first, len(flat.parts) // 2)
        elif usable and type(usable["counts"]) is str:
            kind = RLE_TEXT
            span = flat.add_text(usable["counts"])
        elif usable:
            kind = RLE_RUNS
            span = flat.add_runs(usable["counts"])
        self.sound.mask_kinds[index] = kind
        self.sound.spans[index] = span


def compressed_counts(entries: list[dict]) -> list[str]:
    """The texts of all compressed RLEs."""
    masks = [entry.get("segmentation") for entry in entries]
    counts = [mask.get("counts") for mask in masks if isinstance(mask, dict)]
    return [text for text in counts if type(text) is str]
