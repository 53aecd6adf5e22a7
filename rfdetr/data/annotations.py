"""Checks of annotations: boxes, polygons and RLEs."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from rfdetr.data.records import ImageRecord

LIMIT = 1e7  # pixels; beyond it a coordinate is absurd, and pycocotools would allocate in proportion to it


SLACK = 0.1  # pixels a box may stand out before it is worth a word: many tools round to one decimal


THINNEST = 1e-3  # pixels; thinner boxes vanish in float32


NUMBERS = {int, float}


SEVERAL = 3  # annotations; fewer prove nothing about what they are measured in or where masks lie


MOST = 0.9  # of a split's boxes or polygons in 0..1: it is not in pixels


ONE = 1.001  # the largest coordinate of what is in 0..1, with what rounding adds


FEW_PIXELS = 8  # an image's side up to which a box may well lie within its first pixel


OFF_WARNING, OFF_ERROR = 0.05, 0.5  # of a split's masks that do not lie on their boxes


MARGIN, MARGIN_PIXELS = (
    0.1,
    2.0,
)  # a mask may stand out of its box by this share of a side, and by so many pixels


class Frames:
    """Where the boxes and masks of a split lie: in pixels or in 0..1, and the masks on their boxes or not.

    Boxes are COCO's (x, y, width, height), extents of masks (left, top, right, bottom).
    """

    def __init__(self):
        self.boxes = self.masks = 0
        self.tiny_boxes: list[str] = []  # places of those that lie in 0..1
        self.tiny_masks: list[str] = []
        self.off: list[str] = []  # places of masks that do not lie on their boxes

    def note_box(self, box: list[float], image: ImageRecord, place: str) -> None:
        self.boxes += 1
        x, y, width, height = box
        if x + width <= ONE and y + height <= ONE and min(image.width, image.height) > FEW_PIXELS:
            self.tiny_boxes.append(place)

    def note_mask(self, extent: tuple, box: list[float], image: ImageRecord, place: str) -> None:
        self.masks += 1
        left, top, right, bottom = extent
        if right <= ONE and bottom <= ONE and min(image.width, image.height) > FEW_PIXELS:
            self.tiny_masks.append(place)
        x, y, width, height = box
        # what of the mask's extent, at least a pixel each way, lies inside the box with its margin
        right = max(right, left + 1)
        bottom = max(bottom, top + 1)
        beside = MARGIN * width + MARGIN_PIXELS
        above = MARGIN * height + MARGIN_PIXELS
        inside_x = min(right, x + width + beside) - max(left, x - beside)
        inside_y = min(bottom, y + height + above) - max(top, y - above)
        inside = max(inside_x, 0) * max(inside_y, 0)
        if inside < 0.5 * (right - left) * (bottom - top):
            self.off.append(place)

    def faults(self) -> Iterator[tuple[str, str, list[str]]]:
        """(code, severity, places) of what is beyond its share; masks are not compared with boxes of another unit."""
        units = (
            ("ANN_BBOX_NORMALISED", self.tiny_boxes, self.boxes),
            ("ANN_POLYGON_NORMALISED", self.tiny_masks, self.masks),
        )
        wrong = [
            (code, "error", places)
            for code, places, of in units
            if len(places) >= max(SEVERAL, MOST * of)
        ]
        yield from wrong
        if not wrong and len(self.off) >= SEVERAL and len(self.off) > OFF_WARNING * self.masks:
            yield (
                "ANN_MASK_OFF_BOX",
                "error" if len(self.off) > OFF_ERROR * self.masks else "warning",
                self.off,
            )


def is_whole(value: object) -> bool:
    """A whole number that float64 holds exactly: pycocotools keeps ids in such arrays. Excludes true and false."""
    return type(value) is int and abs(value) < 2**53


def _number_fault(values: list, limit: float = LIMIT) -> str | None:
    """ "TYPE" where something is no number, "NAN" where one is not finite or absurd.  `values` is not empty."""
    if not set(map(type, values)) <= NUMBERS:
        return "TYPE"
    # comparisons alone may miss NaN, a sum does not
    sound = -limit <= min(values) and max(values) <= limit and sum(values) == sum(values)
    return None if sound else "NAN"


def clip_box(
    entry: dict, right: float, bottom: float
) -> tuple[tuple[float, float, float, float] | None, str | None]:
    """(xyxy box inside the image, or None where the annotation falls out; fault code, if any)."""
    box, area = entry.get("bbox"), entry.get("area")
    fault = _number_fault(box) if type(box) is list and len(box) == 4 else "TYPE"
    if fault:
        return None, f"ANN_BBOX_{fault}"
    x, y, w, h = box
    if w < THINNEST or h < THINNEST:
        return None, "ANN_BBOX_EMPTY"
    if type(area) in (int, float) and area <= 0:
        return None, "ANN_AREA_EMPTY"
    clipped = max(x, 0), max(y, 0), min(x + w, right), min(y + h, bottom)
    if clipped[2] - clipped[0] < THINNEST or clipped[3] - clipped[1] < THINNEST:
        return None, "ANN_BBOX_OUTSIDE"
    stands_out = max(-x, -y, x + w - right, y + h - bottom) > SLACK
    return clipped, "ANN_BBOX_CLIPPED" if stands_out else None


def usable_part(
    segmentation: object, width: float, height: float, sums: dict[str, int]
) -> tuple[list | dict | None, set[str | None], tuple | None]:
    """(the sound part of a segmentation, None if nothing is; fault codes; of polygons left, top, right, bottom).

    sums: run_sums of the RLEs.
    """
    if not segmentation:
        return None, set(), None
    if not isinstance(segmentation, list):
        fault = _rle_fault(segmentation, width, height, sums)
        return (None if fault else segmentation), {fault}, None
    far = 2 * max(width, height)
    judged = [_judge_polygon(polygon, far) for polygon in segmentation]
    sound = [polygon for polygon, (fault, _) in zip(segmentation, judged) if not fault]
    faults = {fault for fault, _ in judged}
    extents = [extent for _, extent in judged if extent]
    if len(extents) > 1:
        lefts, tops, rights, bottoms = zip(*extents)
        extents = [(min(lefts), min(tops), max(rights), max(bottoms))]
    return sound or None, faults, extents[0] if extents else None


def _judge_polygon(polygon: object, far: float) -> tuple[str | None, tuple | None]:
    """(fault code, None) or (None, (left, top, right, bottom))."""
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
    extent = left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    low = left if left < top else top
    high = right if right > bottom else bottom
    # comparisons alone may miss NaN, a sum does not
    if not (-LIMIT <= low and high <= LIMIT) or (total := sum(polygon)) != total:
        return "ANN_SEG_NAN", None
    # pycocotools walks along every edge, which takes gigabytes for one that leads millions of pixels away
    if high > far or low < -far:
        return "ANN_POLYGON_FAR", None
    return None, extent


def _rle_fault(rle: object, width: float, height: float, sums: dict[str, int]) -> str | None:
    if not isinstance(rle, dict):
        return "ANN_SEG_TYPE"
    size, runs, known = rle.get("size"), rle.get("counts"), (height, width)
    sound = (
        type(size) is list and len(size) == 2 and all(is_whole(side) and side > 0 for side in size)
    )
    if not sound or any(theirs not in (own, inf) for own, theirs in zip(size, known)):
        return "ANN_RLE_SIZE"
    if type(runs) is str:
        total = sums[runs]
    elif type(runs) is not list or any(type(run) is not int for run in runs):
        return "ANN_RLE_TYPE"
    else:
        total = sum(runs) if min(runs, default=-1) >= 0 and 0 not in runs[1:-1] else -1
    return None if total == size[0] * size[1] else "ANN_RLE_COUNTS"
