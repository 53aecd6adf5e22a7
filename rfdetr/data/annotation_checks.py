"""Checks of annotations: what is sound, what is dropped or clipped, and where masks lie.

pycocotools reads uninitialised memory or hangs on numbers that it does not expect, so nothing here
calls it: what passes is safe to give it.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from rfdetr.data.coordinates import FEW_PIXELS
from rfdetr.data.flat import LIMIT, NUMBERS
from rfdetr.data.rle import is_blank
from rfdetr.ids import is_whole, whole_id

Box = tuple[float, float, float, float]  # xyxy in pixels
Extent = tuple[float, float, float, float]  # of a mask: left, top, right, bottom in pixels

SLACK = 0.1  # pixels that a box may stand out unsaid: many tools round to one decimal
THINNEST = 1e-3  # pixels; thinner boxes vanish in float32
MOST_AREA = 1.5  # times what an object's box or mask can cover; more is no area of it in pixels


class CheckedMask(NamedTuple):
    """What a segmentation is good for."""

    usable: list | dict | None  # its sound polygons, or the RLE; None where nothing is left
    faults: set[str]
    extent: Extent | None  # of the sound polygons


NOTHING = CheckedMask(None, set(), None)


def entry_faults(
    entry: dict, image_fault: str | None, category_ids: set[int], first_with_id: dict[int, dict]
) -> list[str]:
    """The codes of an annotation's numbers, its box and mask aside.

    image_fault: that of its image_id, if any.
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
    if whole_id(category_id) not in category_ids:
        codes.append("ANN_CATEGORY_UNKNOWN")
    elif not is_whole(category_id):
        codes.append("ANN_CATEGORY_TYPE")
    if image_fault:
        codes.append(image_fault)
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
        return NOTHING
    if not isinstance(segmentation, list):
        fault = rle_fault(segmentation, width, height, sums)
        if fault:
            return CheckedMask(None, {fault}, None)
        return NOTHING if is_blank(segmentation) else CheckedMask(segmentation, set(), None)
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
    if type(polygon) is not list or not set(map(type, polygon)) <= NUMBERS:
        return "ANN_SEG_TYPE", None
    if len(polygon) % 2:
        return "ANN_POLYGON_ODD", None
    if len(polygon) < 6:  # pycocotools would take 4 numbers for a box
        return "ANN_POLYGON_SHORT", None
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
