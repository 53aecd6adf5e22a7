"""One image's detections from those in its tiles: each object once, whole, with its own score.

Where two tiles overlap, both looked: detections of one class that agree there are one object. The
one that no tile's edge cuts is taken; where edges cut all of them, the parts are joined. What an
edge cuts is left out where the next tile shows it away from its own edges and detects nothing that
agrees: it has seen what lies beyond.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rfdetr.classes import ClassTable
from rfdetr.device import Precision
from rfdetr.inference.detections import AnyMaskHead, Detections, paste_masks
from rfdetr.inference.originals import Original
from rfdetr.inference.overlaps import PixelMask, box_ious, clip, inside_shares, joined
from rfdetr.inference.prediction import Prediction
from rfdetr.masks import encode_window
from rfdetr.tiling import Window

AGREEMENT = 0.5  # the IoU, where both tiles looked, from which two detections are one object
INSIDE = 0.7  # a cut detection of which so much lies in a whole one of its class is a part of it
NEAR_EDGE = 0.01  # of a tile's side: a box that ends so near an inner edge is cut by it
LEAST_NEAR = 2.0  # pixels of the original


@dataclass(frozen=True)
class DetectedInWindow:
    """n detections in one window of an image, in pixels of the original.

    boxes (n, 4) xyxy, inside the window; scores, labels (n,); masks: n, or None without a mask
    head; mask_scores (n,), 0..1, where there are masks.
    """

    window: Window
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[PixelMask] | None = None
    mask_scores: np.ndarray | None = None


@dataclass(frozen=True)
class Merged:
    """n objects of an image of height x width pixels, best first; fields as in DetectedInWindow."""

    height: int
    width: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[PixelMask] | None
    mask_scores: np.ndarray | None

    def as_prediction(self, original: Original, table: ClassTable) -> Prediction:
        return Prediction(
            original=original,
            table=table,
            boxes=self.boxes,
            scores=self.scores,
            labels=self.labels,
            rles=self.rles(),
            mask_scores=self.mask_scores,
        )

    def rles(self) -> list[dict] | None:
        """The masks as COCO RLEs of the image's size."""
        if self.masks is None:
            return None
        return [
            encode_window(mask.left, mask.top, mask.pixels, self.height, self.width)
            for mask in self.masks
        ]


def in_windows(
    detections: Detections,
    windows: list[Window],
    chosen: list[np.ndarray],
    head: AnyMaskHead | None,
    precision: Precision,
) -> list[DetectedInWindow]:
    """Of each image i of the batch, which is a window, the detections chosen[i], with masks where
    there is a head.
    """
    seen = []
    for i, window in enumerate(windows):
        scores = detections.scores[i].numpy()[chosen[i]]
        masks = None
        mask_scores = None
        if head is not None:
            pasted = list(paste_masks(head, detections, i, chosen[i], precision))
            masks = [PixelMask(one.left, one.top, one.mask.numpy()) for one in pasted]
            ious = np.array([one.iou for one in pasted], dtype=scores.dtype)
            mask_scores = scores * ious
        seen.append(
            DetectedInWindow(
                window=window,
                boxes=detections.boxes_in_original(i)[chosen[i]],
                scores=scores,
                labels=detections.labels[i].numpy()[chosen[i]],
                masks=masks,
                mask_scores=mask_scores,
            )
        )
    return seen


def merge(tiles: list[DetectedInWindow], height: int, width: int) -> Merged:
    """The objects of an image of height x width pixels, from the detections in its tiles."""
    if len(tiles) == 1:
        one = tiles[0]
        return Merged(height, width, one.boxes, one.scores, one.labels, one.masks, one.mask_scores)
    pieces = Pieces(tiles, height, width)
    groups = Groups(len(pieces.scores))
    pairs = list(overlapping(tiles))
    for a, b in pairs:
        for first, second in pieces.same_objects(a, b):
            groups.join(first, second)
    objects = [pieces.as_one(members) for members in groups.members()]
    kept = pieces.without_parts(objects, pairs)
    kept.sort(key=lambda one: -one.score)
    return Merged(
        height=height,
        width=width,
        boxes=np.array([one.box for one in kept], dtype=pieces.boxes.dtype).reshape(-1, 4),
        scores=np.array([one.score for one in kept], dtype=pieces.scores.dtype),
        labels=np.array([one.label for one in kept], dtype=pieces.labels.dtype),
        masks=None if pieces.masks is None else [one.mask for one in kept],
        mask_scores=None
        if pieces.masks is None
        else np.array([one.mask_score for one in kept], dtype=pieces.scores.dtype),
    )


def overlapping(tiles: list[DetectedInWindow]) -> Iterator[tuple[int, int]]:
    """The pairs of tiles that have pixels in common."""
    by_row = sorted(range(len(tiles)), key=lambda i: tiles[i].window.top)
    open_tiles: list[int] = []
    for b in by_row:
        top = tiles[b].window.top
        open_tiles = [a for a in open_tiles if tiles[a].window.bottom > top]
        for a in open_tiles:
            if tiles[a].window.common(tiles[b].window):
                yield a, b
        open_tiles.append(b)


class Groups:
    """Which of n pieces belong together (union and find)."""

    def __init__(self, count: int):
        self.parent = list(range(count))

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        self.parent[self.root(j)] = self.root(i)

    def members(self) -> list[list[int]]:
        members: dict[int, list[int]] = {}
        for i in range(len(self.parent)):
            members.setdefault(self.root(i), []).append(i)
        return list(members.values())


@dataclass(frozen=True)
class WholeObject:
    """What a group of pieces shows; `cut`: by a tile's edge, and nothing goes on beyond it."""

    box: np.ndarray
    score: float
    label: int
    mask: PixelMask | None
    mask_score: float
    cut: bool
    tiles: frozenset[int]

    def holds(self, other: WholeObject) -> bool:
        """Whether most of another one lies in this one."""
        if inside_shares(other.box[None], self.box[None])[0, 0] <= INSIDE:
            return False
        if self.mask is None:
            return True
        area = other.mask.area
        return self.mask.area_common(other.mask, other.mask.window) > INSIDE * area


class Pieces:
    """The detections of all tiles of an image, one after another."""

    def __init__(self, tiles: list[DetectedInWindow], height: int, width: int):
        self.height = height
        self.width = width
        self.windows = [tile.window for tile in tiles]
        self.boxes = np.concatenate([tile.boxes for tile in tiles])
        self.scores = np.concatenate([tile.scores for tile in tiles])
        self.labels = np.concatenate([tile.labels for tile in tiles])
        counts = [len(tile.scores) for tile in tiles]
        self.tile = np.repeat(np.arange(len(tiles)), counts)
        self.ends = np.cumsum(counts)
        self.masks = None
        self.mask_scores = np.zeros_like(self.scores)
        if tiles[0].masks is not None:
            self.masks = [mask for tile in tiles for mask in tile.masks]
            self.mask_scores = np.concatenate([tile.mask_scores for tile in tiles])
        cut = [cut_by_edges(tile.boxes, tile.window, height, width) for tile in tiles]
        self.cut = np.concatenate(cut)

    def of_tile(self, tile: int) -> np.ndarray:
        """The numbers of the pieces of a tile."""
        first = self.ends[tile - 1] if tile else 0
        return np.arange(first, self.ends[tile])

    def same_objects(self, a: int, b: int) -> list[tuple[int, int]]:
        """Pairs of pieces, of tile a and of tile b, that are one object; each in one pair at most.

        Better scores choose first.
        """
        window = self.windows[a].common(self.windows[b])
        ours = self.seen_in(self.of_tile(a), window)
        theirs = self.seen_in(self.of_tile(b), window)
        if not len(ours) or not len(theirs):
            return []
        agreement = self.agreement(ours, theirs, window)
        rows, columns = np.nonzero(agreement > AGREEMENT)
        scores = np.maximum(self.scores[ours[rows]], self.scores[theirs[columns]])
        order = np.lexsort((-agreement[rows, columns], -scores))
        taken: set[int] = set()
        pairs = []
        for first, second in zip(ours[rows[order]].tolist(), theirs[columns[order]].tolist()):
            if first not in taken and second not in taken:
                pairs.append((first, second))
                taken |= {first, second}
        return pairs

    def seen_in(self, pieces: np.ndarray, window: Window) -> np.ndarray:
        """Those of the pieces of which a pixel or more lies in a window."""
        clipped = clip(self.boxes[pieces], window)
        return pieces[((clipped[:, 2:] - clipped[:, :2]) >= 1).all(axis=1)]

    def agreement(self, ours: np.ndarray, theirs: np.ndarray, window: Window) -> np.ndarray:
        """(m, n): the IoU of what pieces of one class show in a window; 0 for other classes.

        Of the masks where there are masks and the boxes meet, else of the boxes.
        """
        ious = box_ious(clip(self.boxes[ours], window), clip(self.boxes[theirs], window))
        ious[self.labels[ours][:, None] != self.labels[theirs]] = 0
        if self.masks is None:
            return ious
        for i, j in zip(*np.nonzero(ious)):
            one = self.masks[ours[i]]
            other = self.masks[theirs[j]]
            common = one.area_common(other, window)
            both = one.area_inside(window) + other.area_inside(window) - common
            ious[i, j] = common / both if both else 0
        return ious

    def as_one(self, members: list[int]) -> WholeObject:
        """What the pieces of one object show: the best one that is not cut, or all joined."""
        whole = [i for i in members if not self.cut[i]]
        if whole:
            best = max(whole, key=lambda i: self.scores[i])
            if all(self.share_inside(i, best) > 1 / 2 for i in members):
                return self.alone(best, cut=False)
        best = max(members, key=lambda i: self.scores[i])
        if len(members) == 1:
            return self.alone(best, cut=bool(self.cut[best]))
        corners = self.boxes[members]
        return WholeObject(
            box=np.concatenate([corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)]),
            score=self.scores[best],
            label=self.labels[best],
            mask=joined([self.masks[i] for i in members]) if self.masks else None,
            mask_score=self.mask_scores[members].max(),
            cut=False,
            tiles=frozenset(self.tile[members].tolist()),
        )

    def alone(self, piece: int, cut: bool) -> WholeObject:
        return WholeObject(
            box=self.boxes[piece],
            score=self.scores[piece],
            label=self.labels[piece],
            mask=self.masks[piece] if self.masks else None,
            mask_score=self.mask_scores[piece],
            cut=cut,
            tiles=frozenset([int(self.tile[piece])]),
        )

    def share_inside(self, piece: int, other: int) -> float:
        """How much of a piece, as far as the other's tile shows it, lies in the other, 0..1.

        What lies beyond that tile counts as outside.
        """
        if self.masks:
            area = self.masks[piece].area
            window = self.windows[self.tile[other]]
            common = self.masks[piece].area_common(self.masks[other], window)
            return common / area if area else 1.0
        return float(inside_shares(self.boxes[[piece]], self.boxes[[other]])[0, 0])

    def without_parts(
        self, objects: list[WholeObject], pairs: list[tuple[int, int]]
    ) -> list[WholeObject]:
        """Without what an edge cut, where a tile beside knows better.

        Either most of it lies in a whole object there, a part that did not agree with the whole
        where both tiles looked; or that tile shows all of it and detects nothing that agrees.
        pairs: the tiles that overlap.
        """
        beside: dict[int, list[int]] = {}
        for a, b in pairs:
            beside.setdefault(a, []).append(b)
            beside.setdefault(b, []).append(a)
        whole_ones: dict[int, list[WholeObject]] = {}
        for one in objects:
            for tile in () if one.cut else one.tiles:
                whole_ones.setdefault(tile, []).append(one)
        kept = []
        for one in objects:
            near: list[WholeObject] = []
            if one.cut:
                (tile,) = one.tiles
                neighbours = beside.get(tile, [])
                if any(self.shows_more(b, tile, one.box) for b in neighbours):
                    continue
                near = [other for b in neighbours for other in whole_ones.get(b, ())]
            if not any(other.label == one.label and other.holds(one) for other in near):
                kept.append(one)
        return kept

    def shows_more(self, tile: int, own_tile: int, box: np.ndarray) -> bool:
        """Whether a tile, no larger than the one a box was detected in, shows all of the box and
        what is around it. A larger one shows small objects less well.
        """
        window = self.windows[tile]
        own = self.windows[own_tile]
        if window.width > own.width or window.height > own.height:
            return False
        return not cut_by_edges(box[None], window, self.height, self.width)[0]


def cut_by_edges(boxes: np.ndarray, window: Window, height: int, width: int) -> np.ndarray:
    """(n,) bool: which boxes (n, 4) end at an edge of the window inside the image."""
    near = max(NEAR_EDGE * max(window.width, window.height), LEAST_NEAR)
    left, top, right, bottom = boxes.T
    return (
        ((left < window.left + near) & (window.left > 0))
        | ((top < window.top + near) & (window.top > 0))
        | ((right > window.right - near) & (window.right < width))
        | ((bottom > window.bottom - near) & (window.bottom < height))
    )
