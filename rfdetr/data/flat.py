"""The annotations of a file as columns, in its order, before they are checked.

A dictionary of Python takes ten times the memory of what it says. Here each entry is looked at
once and forgotten; entries that are not of the usual types are marked `odd`, to be read again and
judged one by one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from rfdetr.data.rle import AT_ONCE, rle_extents, run_sums
from rfdetr.ids import WHOLE, is_whole, whole_id

NUMBERS = {int, float}
IDS = {int, str}
LIMIT = 1e7  # pixels; for larger coordinates pycocotools would allocate in proportion to them
NO_CATEGORY = WHOLE
NO_BOX = [np.nan] * 4
NO_EXTENT = (np.nan,) * 4

ROWS = 1 << 16  # of columns that are worked on at once: what that needs is small beside them

NO_MASK, POLYGONS, RLE_TEXT, RLE_RUNS = range(4)  # kinds of masks


class Entries(Protocol):
    """The annotations as the file has them; they are read anew where they are not in memory."""

    in_memory: bool

    def read(self, indices: Sequence[int]) -> list[dict]: ...


class ListedEntries:
    """Entries that are in memory."""

    in_memory = True

    def __init__(self, entries: list[dict]):
        self.entries = entries

    def read(self, indices: Sequence[int]) -> list[dict]:
        return [self.entries[index] for index in indices]


class FlatAnnotations:
    """n annotations; what an odd entry lacks is 0, NaN, -1 or NO_CATEGORY.

    mask_kinds (n,) say what `spans` (n, 2) mean: for POLYGONS the first of its rows in `parts` and
    the one after its last, for RLE_TEXT a range of `texts`, for RLE_RUNS one of `numbers`. A row
    (begin, end) of `parts` is a polygon's range of `numbers`.
    """

    def __init__(self):
        self.entries: Entries = ListedEntries([])
        self.odd = array("b")
        self.ids = array("q")
        self.image_numbers = array("i")  # of image_ids
        self.image_ids: dict[int | str, int] = {}  # id -> its number
        self.categories = array("q")
        self.crowd = array("b")
        self.areas = array("d")  # NaN where none is given
        self.boxes = array("d")  # x, y, width, height in pixels of each
        self.mask_kinds = array("b")
        self.spans = array("q")
        self.parts = array("q")
        self.numbers = array("d")
        self.texts = bytearray()  # the counts of compressed RLEs
        self.rle_indices = array("q")  # of the entries with such a mask
        self.rle_sizes = array("q")  # height and width of each
        self.rle_sums = array("q")  # of its runs; -1 where they are not sound
        self.rle_extents = array("d")  # left, top, right, bottom; NaN where no pixel is set
        self._rles: list[dict] = []  # those that are not measured yet

    @classmethod
    def of(cls, entries: list[dict], shown: Iterable[dict] | None = None) -> FlatAnnotations:
        """Columns of entries in memory.  shown: the same entries where their progress is shown."""
        flat = cls()
        for entry in shown or entries:
            flat.add(entry)
        flat.finish(ListedEntries(entries))
        return flat

    def __len__(self) -> int:
        return len(self.odd)

    @property
    def category_ids(self) -> set[int]:
        """Those that annotations have and that are whole numbers."""
        return {*np.unique(as_array(self.categories, np.int64)).tolist()} - {NO_CATEGORY}

    @property
    def object_counts(self) -> dict[int, int]:
        """Category id -> how many annotations have it that are no crowd regions."""
        is_object = as_array(self.crowd, np.int8) == 0
        counts = count_values(as_array(self.categories, np.int64)[is_object])
        counts.pop(NO_CATEGORY, None)
        return counts

    def add(self, entry: dict) -> None:
        """Add the next entry of the file."""
        get = entry.get
        annotation_id = get("id")
        image_id = get("image_id")
        category_id = get("category_id")
        crowd = get("iscrowd")
        area = get("area")
        box = get("bbox")
        is_usual = (
            type(annotation_id) is int
            and -WHOLE < annotation_id < WHOLE
            and type(image_id) in IDS
            and type(category_id) is int
            and -WHOLE < category_id < WHOLE
            and (crowd is None or (type(crowd) is int and crowd in (0, 1)))
            and (area is None or (type(area) in NUMBERS and 0 < area <= LIMIT**2))
            and is_box(box)
        )
        if not is_usual:
            annotation_id = annotation_id if is_whole(annotation_id) else 0
            category_id = whole_id(category_id)
            category_id = NO_CATEGORY if category_id is None else category_id
            crowd = crowd if type(crowd) is int and crowd in (0, 1) else None
            area = None
            box = box if is_box(box) else NO_BOX
        self.ids.append(annotation_id)
        number = -1
        if type(image_id) in IDS:
            number = self.image_ids.setdefault(image_id, len(self.image_ids))
        self.image_numbers.append(number)
        self.categories.append(category_id)
        self.crowd.append(crowd or 0)
        self.areas.append(np.nan if area is None else area)
        self.boxes.fromlist(box)
        has_usual_mask = self._add_mask(get("segmentation"))
        self.odd.append(not (is_usual and has_usual_mask))

    def finish(self, entries: Entries) -> None:
        """After the last entry.  entries: all of them, to be read again."""
        self._measure_rles()
        self.entries = entries

    def _add_mask(self, segmentation: object) -> bool:
        """Add the mask of the next entry; whether it is of a usual form."""
        if not segmentation:
            self._set_span(NO_MASK, 0, 0)
            return True
        if type(segmentation) is list:
            first = len(self.parts) // 2
            usual = [self.add_polygon(polygon) for polygon in segmentation]
            self._set_span(POLYGONS, first, len(self.parts) // 2)
            return all(usual)
        if not is_compressed(segmentation):
            self._set_span(NO_MASK, 0, 0)
            return False
        self._rles.append(segmentation)
        self.rle_indices.append(len(self.mask_kinds))
        self._set_span(RLE_TEXT, *self.add_text(segmentation["counts"]))
        if len(self._rles) == AT_ONCE:
            self._measure_rles()
        return True

    def _set_span(self, kind: int, begin: int, end: int) -> None:
        self.mask_kinds.append(kind)
        self.spans.append(begin)
        self.spans.append(end)

    def add_polygon(self, polygon: object) -> bool:
        """Add what may be a polygon to `parts`; False where its type or length is no polygon's."""
        if type(polygon) is not list or len(polygon) < 6 or len(polygon) % 2:
            return False
        if not set(map(type, polygon)) <= NUMBERS:
            return False
        begin = len(self.numbers)
        try:
            self.numbers.fromlist(polygon)
        except OverflowError:  # a whole number beyond all floats
            del self.numbers[begin:]
            return False
        self.parts.append(begin)
        self.parts.append(len(self.numbers))
        return True

    def add_text(self, counts: str) -> tuple[int, int]:
        """Add the counts of a compressed RLE; returns their range of `texts`."""
        begin = len(self.texts)
        self.texts += counts.encode("utf-8", "surrogatepass")
        return begin, len(self.texts)

    def add_runs(self, counts: list[int]) -> tuple[int, int]:
        """Add the counts of another RLE; returns their range of `numbers`."""
        begin = len(self.numbers)
        self.numbers.fromlist(counts)
        return begin, len(self.numbers)

    def _measure_rles(self) -> None:
        sums = run_sums([rle["counts"] for rle in self._rles])
        sound = []
        for rle in self._rles:
            height, width = rle["size"]
            self.rle_sizes.fromlist([height, width])
            self.rle_sums.append(sums[rle["counts"]])
            if sums[rle["counts"]] == height * width:
                sound.append(rle)
        extents = iter(rle_extents(sound))
        for rle in self._rles:
            height, width = rle["size"]
            extent = next(extents) if sums[rle["counts"]] == height * width else None
            self.rle_extents.extend(extent or NO_EXTENT)
        self._rles = []


def as_array(values: array | bytearray, dtype: type) -> np.ndarray:
    """A view of the memory of `values`, which cannot grow while there is one."""
    return np.frombuffer(values, dtype) if len(values) else np.zeros(0, dtype)


def count_values(values: np.ndarray) -> dict[int, int]:
    """Each whole number in an array -> how often it is there."""
    numbers, counts = np.unique(values, return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist()))


def row_slices(count: int) -> Iterator[slice]:
    """So many rows, ROWS at a time."""
    for begin in range(0, count, ROWS):
        yield slice(begin, begin + ROWS)


def is_box(box: object) -> bool:
    """Whether it is a list of four numbers; NaN may be among them."""
    if type(box) is not list or len(box) != 4 or not set(map(type, box)) <= NUMBERS:
        return False
    return -LIMIT <= min(box) and max(box) <= LIMIT


def is_compressed(rle: object) -> bool:
    """Whether it has the form of an RLE whose counts are a text."""
    if type(rle) is not dict or type(rle.get("counts")) is not str:
        return False
    size = rle.get("size")
    if type(size) is not list or len(size) != 2:
        return False
    return all(type(side) is int and 0 < side < 2**31 for side in size)
