"""Which detections in the frames of a video or stack are the same object: ids over time.

Two-stage association on boxes and masks. Idea: ByteTrack, arXiv:2110.06864: sure detections find
their tracks first, then the unsure ones those that are left over, so that an object that is half
hidden keeps its id.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from pycocotools import mask as mask_api
from scipy.optimize import linear_sum_assignment

from rfdetr.arguments import require_share
from rfdetr.inference.overlaps import box_ious
from rfdetr.text import counted

UNSURE_SCORE = 0.1  # detections that score less are never looked at
KEPT_FRAMES = 30  # for so many frames an object may be hidden
LEAST_IOU = 0.2  # of a sure detection with where its track is expected
LEAST_IOU_UNSURE = 0.5  # of an unsure one
NEWEST_SHARE = 0.1  # of the last displacement in a track's velocity, at least


@dataclass
class Shape:
    """A detection: box (4,) xyxy in pixels; mask (h, w) bool, cut out at corner (2,) x, y, or None.

    A mask that covers no pixel counts as none.
    """

    box: np.ndarray
    mask: np.ndarray | None = None
    corner: np.ndarray | None = None

    @classmethod
    def of(cls, box: np.ndarray, rle: dict | None) -> Shape:
        """rle: COCO RLE of the frame's size."""
        if rle is None:
            return cls(box)
        left, top, width, height = mask_api.toBbox(rle).astype(int)
        if width == 0 or height == 0:
            return cls(box)
        window = mask_api.decode(rle)[top : top + height, left : left + width]
        return cls(box, window.astype(bool), np.array([left, top]))

    def moved(self, shift: np.ndarray) -> Shape:
        """By (2,) x, y; a mask by whole pixels."""
        corner = None if self.corner is None else self.corner + np.rint(shift).astype(int)
        return Shape(self.box + np.tile(shift, 2), self.mask, corner)


@dataclass
class Track:
    """An object that was seen before: as it was last, how it moves, for how long it is unseen.

    velocity (2,): of its box's centre, x, y in pixels a frame: the mean of its `displacements`, of
    which the newest keeps a share, so that it can turn.
    """

    id: int
    label: int
    shape: Shape
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(2))
    displacements: int = 0
    unseen: int = 0

    def expected(self) -> Shape:
        """As it is to be in the next frame if it goes on as before."""
        return self.shape.moved(self.velocity * (self.unseen + 1))

    def seen_as(self, shape: Shape) -> None:
        newest = (_centre(shape.box) - _centre(self.shape.box)) / (self.unseen + 1)
        self.displacements += 1
        share = max(1 / self.displacements, NEWEST_SHARE)
        self.velocity = self.velocity + share * (newest - self.velocity)
        self.shape = shape
        self.unseen = 0


class Tracker:
    """Follows the objects of one video or stack.

    threshold: detections that score as much begin a track if they continue none; those below, down
    to UNSURE_SCORE, continue tracks that no sure detection continues. ids: the numbers that tracks
    get; several trackers that share them give none twice. Raises UserError for a threshold that is
    no number in 0..1.
    """

    def __init__(self, threshold: float, ids: Iterator[int] | None = None):
        require_share("threshold", threshold)
        self.threshold = threshold
        self.ids = itertools.count(1) if ids is None else ids
        self.tracks: list[Track] = []

    def update(
        self,
        boxes: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        rles: list[dict] | None = None,
    ) -> np.ndarray:
        """The track of each of the next frame's n detections: ids (n,) int, 0 for none.

        boxes (n, 4) xyxy in pixels, scores and labels (n,); rles: COCO RLEs of the frame's size.
        Every detection of at least `threshold` has a track. No two have the same, and all of a
        track have one label.
        """
        boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
        shapes = [Shape.of(box, rles[i] if rles else None) for i, box in enumerate(boxes)]
        is_sure = np.asarray(scores) >= self.threshold
        is_unsure = ~is_sure & (np.asarray(scores) >= UNSURE_SCORE)
        found: dict[int, Track] = {}  # by the detection's index
        waiting = self.tracks
        for part, least_iou in ((is_sure, LEAST_IOU), (is_unsure, LEAST_IOU_UNSURE)):
            indices = np.flatnonzero(part)
            candidates = [shapes[i] for i in indices]
            ious = overlaps(waiting, candidates, np.asarray(labels)[indices])
            rows, columns = best_pairs(ious, least_iou)
            found |= {int(indices[j]): waiting[i] for i, j in zip(rows, columns)}
            taken = set(rows.tolist())
            waiting = [track for i, track in enumerate(waiting) if i not in taken]
        self._miss(waiting)
        for i, track in found.items():
            track.seen_as(shapes[i])
        for i in np.flatnonzero(is_sure):
            if i not in found:
                found[int(i)] = Track(next(self.ids), int(labels[i]), shapes[i])
                self.tracks.append(found[int(i)])
        return np.array([found[i].id if i in found else 0 for i in range(len(boxes))], dtype=int)

    def skip(self) -> None:
        """Let the next frame pass without a look at it."""
        self._miss(self.tracks)

    def _miss(self, tracks: list[Track]) -> None:
        for track in tracks:
            track.unseen += 1
        self.tracks = [track for track in self.tracks if track.unseen <= KEPT_FRAMES]


def lost_at_once(tracks: Iterable[int], threshold: float) -> str:
    """A warning where most tracks have a single detection, "" where not.

    tracks: of each detection of a run; threshold: as in Tracker.
    """
    lengths = Counter(tracks)
    single = sum(length == 1 for length in lengths.values())
    if 2 * single <= len(lengths):
        return ""
    have = "has" if single == 1 else "have"
    return (
        f"{single} of {counted(len(lengths), 'track')} {have} one frame alone: what is there was "
        "found in no other. --track 1 wants the frames of one scene, so close in "
        "time that an object overlaps itself from one to the next; a lower --threshold (it is "
        f"{threshold:g}) where objects are missed in between, a higher one where there are none"
    )


def overlaps(tracks: list[Track], shapes: list[Shape], labels: np.ndarray) -> np.ndarray:
    """IoU of m tracks, where they are expected, and n detections (m, n); 0 for another class.

    Of the masks where both have one and the boxes overlap, else of the boxes.
    """
    expected = [track.expected() for track in tracks]
    ious = box_ious(_boxes(expected), _boxes(shapes))
    ious *= np.array([track.label for track in tracks]).reshape(-1, 1) == labels.reshape(1, -1)
    for i, j in np.argwhere(ious > 0):
        if expected[i].mask is not None and shapes[j].mask is not None:
            ious[i, j] = mask_iou(expected[i], shapes[j])
    return ious


def best_pairs(ious: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of ious (m, n) that belong together: in all the largest overlap.

    No pair overlaps by less than `least`; one that barely reaches it counts for little, so that it
    takes no other track's detection.
    """
    gains = np.maximum(ious - least, 0)
    rows, columns = linear_sum_assignment(gains, maximize=True)
    is_pair = gains[rows, columns] > 0
    return rows[is_pair], columns[is_pair]


def mask_iou(first: Shape, second: Shape) -> float:
    """Of two shapes that have masks."""
    corner = np.maximum(first.corner, second.corner)
    opposite = np.minimum(_opposite(first), _opposite(second))
    if (opposite <= corner).any():
        return 0.0
    parts = []
    for shape in (first, second):
        left, top = corner - shape.corner
        right, bottom = opposite - shape.corner
        parts.append(shape.mask[top:bottom, left:right])
    common = np.count_nonzero(parts[0] & parts[1])
    return common / (np.count_nonzero(first.mask) + np.count_nonzero(second.mask) - common)


def _opposite(shape: Shape) -> np.ndarray:
    """The corner (2,) x, y, at which the mask's window ends."""
    return shape.corner + shape.mask.shape[::-1]


def _boxes(shapes: list[Shape]) -> np.ndarray:
    return np.array([shape.box for shape in shapes], dtype=float).reshape(-1, 4)


def _centre(box: np.ndarray) -> np.ndarray:
    return (box[:2] + box[2:]) / 2
