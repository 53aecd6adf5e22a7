"""Checks of annotations: what is sound, what is dropped or clipped, and where masks lie.

pycocotools reads uninitialised memory or hangs on numbers that it does not expect, so nothing here
calls it: what passes is safe to give it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import NamedTuple

from rfdetr.data.exif import SizedImage
from rfdetr.data.faults import CODES, Faults
from rfdetr.data.rle import rle_extents, run_sums
from rfdetr.progress import ProgressBar

Box = tuple[float, float, float, float]  # xyxy in pixels
Extent = tuple[float, float, float, float]  # of a mask: left, top, right, bottom in pixels

LIMIT = 1e7  # pixels; for larger coordinates pycocotools would allocate in proportion to them
SLACK = 0.1  # pixels that a box may stand out unsaid: many tools round to one decimal
THINNEST = 1e-3  # pixels; thinner boxes vanish in float32
NUMBERS = {int, float}

SEVERAL = 3  # annotations; fewer prove nothing about their unit or about where masks lie
MOST = 0.9  # of a split's boxes or polygons in 0..1: then it is not in pixels
ONE = 1.001  # the largest coordinate of what is in 0..1, with what rounding adds
MOST_AREA = 1.5  # times what an object's box or mask can cover; more is no area of it in pixels
FEW_PIXELS = 8  # an image's side up to which a box may well lie within its first pixel
OFF_WARNING = 0.05  # share of a split's masks that do not lie on their boxes
OFF_ERROR = 0.5
MARGIN = 0.1  # share of a box's side that its mask may stand out by,
MARGIN_PIXELS = 2.0  # and so many pixels more


class SoundAnnotation(NamedTuple):
    """A sound entry, and what of it is to be learnt."""

    entry: dict  # with area, iscrowd and segmentation: what of it is usable, or None
    box: Box | None  # clipped to the image; None where the entry is dropped


class CheckedMask(NamedTuple):
    """What a segmentation is good for."""

    usable: list | dict | None  # its sound polygons, or the RLE; None where nothing is left
    faults: set[str]
    extent: Extent | None  # of the sound polygons


NO_MASK = CheckedMask(None, set(), None)
NOT_LISTED = SizedImage("", "not listed", inf, inf)


def check_annotations(
    entries: list[dict], images: dict[int | str, SizedImage], category_ids: set[int], faults: Faults
) -> dict[int | str, list[SoundAnnotation]]:
    """Note the faults of annotations and return the sound ones by image id.

    images: all that the file lists, those that cannot be read, too.
    """
    sums = run_sums(compressed_counts(entries))
    coordinates = CoordinateCheck()
    first_with_id: dict[int, dict] = {}
    first_with_box: dict[tuple, dict] = {}
    sound: dict[int | str, list[SoundAnnotation]] = {}
    for entry in ProgressBar(entries, "checking annotations", "annotations"):
        image_id = entry.get("image_id")
        # ids of other types may not be hashable
        known = type(image_id) in (int, str) and image_id in images
        image = images[image_id] if known else NOT_LISTED
        place = f"annotation {entry.get('id')} of image {image_id} ({image.file_name})"
        box, box_fault = clip_box(entry, image.width, image.height)
        mask = check_segmentation(entry.get("segmentation"), image.width, image.height, sums)
        codes = entry_faults(entry, known, category_ids, first_with_id)
        wrong_area = area_is_wrong(entry, box, mask)
        if wrong_area:
            codes.append("ANN_AREA_INVALID")
        shape_faults = mask.faults | {box_fault} if box_fault else mask.faults
        if shape_faults:
            codes += sorted(shape_faults)
        for code in codes:
            faults.note(code, place, entry)
        if any(CODES[code].severity == "error" for code in codes):
            continue
        is_crowd = int(entry.get("iscrowd") or 0)
        coordinates.add_box(entry["bbox"], image, place)
        if box and not is_crowd:
            coordinates.add_mask(mask, entry["bbox"], image, place)
        key = (image_id, entry["category_id"], *entry["bbox"])
        twin = first_with_box.setdefault(key, entry)
        if box and twin is not entry and is_identical(twin, entry):
            faults.note("ANN_DUPLICATE", place, entry)
            box = None
        if box and not is_crowd and not mask.usable:
            faults.note("ANN_NO_MASK", place)
        area = None if wrong_area else entry.get("area")
        clean = {"area": area, "iscrowd": is_crowd, "segmentation": mask.usable}
        sound.setdefault(image_id, []).append(SoundAnnotation(entry | clean, box))
    coordinates.note_faults(faults)
    return sound


def compressed_counts(entries: list[dict]) -> list[str]:
    """The texts of all compressed RLEs."""
    masks = [entry.get("segmentation") for entry in entries]
    counts = [mask.get("counts") for mask in masks if isinstance(mask, dict)]
    return [text for text in counts if type(text) is str]


def entry_faults(
    entry: dict, image_known: bool, category_ids: set[int], first_with_id: dict[int, dict]
) -> list[str]:
    """The codes of an annotation's numbers, its box and mask aside.

    first_with_id: id -> the first entry that has it; this entry is added.
    """
    codes = []
    annotation_id = entry.get("id")
    category_id = entry.get("category_id")
    if not is_whole(annotation_id):
        codes.append("ANN_ID_INVALID")
    elif first_with_id.setdefault(annotation_id, entry) != entry:
        codes.append("ANN_ID_DUPLICATE")
    if entry.get("iscrowd") not in (0, 1, None):
        codes.append("ANN_CROWD_INVALID")
    if not is_whole(category_id) or category_id not in category_ids:
        codes.append("ANN_CATEGORY_UNKNOWN")
    if not image_known:
        codes.append("ANN_IMAGE_UNKNOWN")
    return codes


def area_is_wrong(entry: dict, box: Box | None, mask: CheckedMask) -> bool:
    """Whether an area is given that is no number of pixels which this object can cover.

    box, mask: what clip_box and check_segmentation say of the entry. Areas of boxes and of masks
    are both usual, so only what neither can be is wrong.
    """
    area = entry.get("area")
    if area is None:
        return False
    if number_fault([area], LIMIT**2) or area <= 0:
        return True
    if box is None:  # nothing to compare it with
        return False
    _, _, width, height = entry["bbox"]
    covered = width * height
    most = (width + 1) * (height + 1)  # drawn masks touch pixels that they cover in part
    if mask.extent:
        left, top, right, bottom = mask.extent
        most = max(most, (right - left + 1) * (bottom - top + 1))
    elif mask.usable:
        rows, columns = mask.usable["size"]
        most = max(most, rows * columns)
    is_share = area < 1 and covered > FEW_PIXELS
    return is_share or area > MOST_AREA * most


def is_identical(one: dict, other: dict) -> bool:
    """Whether two annotations of the same image, category and box are the same."""
    fields = ("segmentation", "iscrowd")
    return all(one.get(name) == other.get(name) for name in fields)


def is_whole(value: object) -> bool:
    """Whether it is a whole number that float64 holds: pycocotools keeps ids in such arrays.

    True and false are none.
    """
    return type(value) is int and abs(value) < 2**53


def number_fault(values: list, limit: float = LIMIT) -> str | None:
    """ "TYPE" where something is no number, "NAN" where one is not finite or absurd.

    `values` must not be empty.
    """
    if not set(map(type, values)) <= NUMBERS:
        return "TYPE"
    if not (-limit <= min(values) and max(values) <= limit):
        return "NAN"
    total = sum(values)
    return "NAN" if total != total else None  # comparisons alone may miss NaN


def clip_box(entry: dict, width: float, height: float) -> tuple[Box | None, str | None]:
    """(the part of an annotation's box inside a (width, height) image, the fault code if any).

    None for a box where nothing of the annotation is left to learn.
    """
    bbox = entry.get("bbox")
    fault = number_fault(bbox) if type(bbox) is list and len(bbox) == 4 else "TYPE"
    if fault:
        return None, f"ANN_BBOX_{fault}"
    x, y, w, h = bbox
    if w < THINNEST or h < THINNEST:
        return None, "ANN_BBOX_EMPTY"
    left = max(x, 0)
    top = max(y, 0)
    right = min(x + w, width)
    bottom = min(y + h, height)
    if right - left < THINNEST or bottom - top < THINNEST:
        return None, "ANN_BBOX_OUTSIDE"
    stands_out = max(-x, -y, x + w - width, y + h - height) > SLACK
    return (left, top, right, bottom), "ANN_BBOX_CLIPPED" if stands_out else None


def check_segmentation(
    segmentation: object, width: float, height: float, sums: dict[str, int]
) -> CheckedMask:
    """Check the mask of a (width, height) image.  sums: run_sums of the file's RLEs."""
    if not segmentation:
        return NO_MASK
    if not isinstance(segmentation, list):
        fault = rle_fault(segmentation, width, height, sums)
        return CheckedMask(None, {fault}, None) if fault else CheckedMask(segmentation, set(), None)
    far = 2 * max(width, height)
    sound = []
    extents = []
    faults = set()
    for polygon in segmentation:
        fault, extent = check_polygon(polygon, far)
        if fault:
            faults.add(fault)
        else:
            sound.append(polygon)
            extents.append(extent)
    if not sound:
        return CheckedMask(None, faults, None)
    if len(extents) == 1:
        return CheckedMask(sound, faults, extents[0])
    lefts, tops, rights, bottoms = zip(*extents)
    return CheckedMask(sound, faults, (min(lefts), min(tops), max(rights), max(bottoms)))


def check_polygon(polygon: object, far: float) -> tuple[str | None, Extent | None]:
    """(fault code, None) or (None, extent).  far: pixels that it may lead away from the corner."""
    if type(polygon) is not list:
        return "ANN_SEG_TYPE", None
    if len(polygon) % 2:
        return "ANN_POLYGON_ODD", None
    if len(polygon) < 6:  # pycocotools would take 4 numbers for a box
        return "ANN_POLYGON_SHORT", None
    if not set(map(type, polygon)) <= NUMBERS:
        return "ANN_SEG_TYPE", None
    xs = polygon[::2]
    ys = polygon[1::2]
    left = min(xs)
    top = min(ys)
    right = max(xs)
    bottom = max(ys)
    low = left if left < top else top
    high = right if right > bottom else bottom
    if not (-LIMIT <= low and high <= LIMIT):
        return "ANN_SEG_NAN", None
    total = sum(polygon)
    if total != total:  # comparisons alone may miss NaN
        return "ANN_SEG_NAN", None
    # pycocotools walks along every edge: gigabytes for one that leads millions of pixels away
    if high > far or low < -far:
        return "ANN_POLYGON_FAR", None
    return None, (left, top, right, bottom)


def rle_fault(rle: object, width: float, height: float, sums: dict[str, int]) -> str | None:
    """The fault code of what should be an RLE of a (width, height) image, if any."""
    if not isinstance(rle, dict):
        return "ANN_SEG_TYPE"
    size = rle.get("size")
    counts = rle.get("counts")
    if type(size) is not list or len(size) != 2:
        return "ANN_RLE_SIZE"
    for side, known in zip(size, (height, width)):
        if not is_whole(side) or side <= 0 or known not in (side, inf):
            return "ANN_RLE_SIZE"
    if type(counts) is str:
        total = sums[counts]
    elif type(counts) is not list or any(type(run) is not int for run in counts):
        return "ANN_RLE_TYPE"
    elif min(counts, default=-1) < 0 or 0 in counts[1:-1]:
        return "ANN_RLE_COUNTS"
    else:
        total = sum(counts)
    return None if total == size[0] * size[1] else "ANN_RLE_COUNTS"


class CoordinateCheck:
    """Whether a split's boxes and masks are in pixels, and its masks lie on their boxes."""

    def __init__(self):
        self.boxes = 0
        self.masks = 0
        self.tiny_boxes: list[str] = []  # places of those that lie in 0..1
        self.tiny_masks: list[str] = []
        self.off_box: list[str] = []  # places of masks that do not lie on their boxes
        self.rles: list[tuple[dict, list[float], SizedImage, str]] = []  # to be measured together

    def add_box(self, bbox: list[float], image: SizedImage, place: str) -> None:
        """bbox: COCO's (x, y, width, height) in pixels."""
        self.boxes += 1
        x, y, width, height = bbox
        if x + width <= ONE and y + height <= ONE and image.shorter_side > FEW_PIXELS:
            self.tiny_boxes.append(place)

    def add_mask(self, mask: CheckedMask, bbox: list[float], image: SizedImage, place: str) -> None:
        if mask.extent:
            self.add_extent(mask.extent, bbox, image, place)
        elif mask.usable:
            self.rles.append((mask.usable, bbox, image, place))

    def add_extent(self, extent: Extent, bbox: list[float], image: SizedImage, place: str) -> None:
        self.masks += 1
        left, top, right, bottom = extent
        if right <= ONE and bottom <= ONE and image.shorter_side > FEW_PIXELS:
            self.tiny_masks.append(place)
        x, y, width, height = bbox
        # what of the mask's extent, at least a pixel each way, lies inside the box with its margin
        right = max(right, left + 1)
        bottom = max(bottom, top + 1)
        beside = MARGIN * width + MARGIN_PIXELS
        above = MARGIN * height + MARGIN_PIXELS
        inside_x = min(right, x + width + beside) - max(left, x - beside)
        inside_y = min(bottom, y + height + above) - max(top, y - above)
        inside = max(inside_x, 0) * max(inside_y, 0)
        if inside < 0.5 * (right - left) * (bottom - top):
            self.off_box.append(place)

    def note_faults(self, faults: Faults) -> None:
        """Note what is beyond its share of the split."""
        extents = rle_extents([rle for rle, _, _, _ in self.rles])
        for extent, (_, bbox, image, place) in zip(extents, self.rles):
            if extent:
                self.add_extent(extent, bbox, image, place)
        for code, severity, places in self.judged():
            for place in places:
                faults.note(code, place)
            if severity == "error":
                faults.make_error(code)

    def judged(self) -> Iterator[tuple[str, str, list[str]]]:
        """(code, severity, places).  Masks are not compared with boxes of another unit."""
        wrong_unit = False
        if len(self.tiny_boxes) >= max(SEVERAL, MOST * self.boxes):
            wrong_unit = True
            yield "ANN_BBOX_NORMALISED", "error", self.tiny_boxes
        if len(self.tiny_masks) >= max(SEVERAL, MOST * self.masks):
            wrong_unit = True
            yield "ANN_POLYGON_NORMALISED", "error", self.tiny_masks
        off = len(self.off_box)
        if not wrong_unit and off >= SEVERAL and off > OFF_WARNING * self.masks:
            severity = "error" if off > OFF_ERROR * self.masks else "warning"
            yield "ANN_MASK_OFF_BOX", severity, self.off_box
