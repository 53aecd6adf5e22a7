"""One image's detections from those in its tiles: each object once, whole, with its own score.

Where two tiles overlap, both looked: detections of one class that agree there are one object. What
no tile's edge cuts stands as it is, and weaker ones that show the same are left out. What an edge
cuts is joined with what goes on beyond it; it is left out where the next tile shows it away from
its own edges, and so has seen what lies beyond.

Better scores go first, and nothing that scores less than COMPARABLE of an object changes it.
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
INSIDE = 0.7  # a cut detection of which so much lies in another one of its class is a part of it
COMPARABLE = 0.25  # of the best score among an object's parts: what scores less is not one of them
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


def merge(tiles: list[DetectedInWindow], height: int, width: int, threshold: float = 0.0) -> Merged:
    """The objects of an image of height x width pixels, from the detections in its tiles.

    threshold: objects that score less are left out. The others depend on no detection that scores
    less than threshold * COMPARABLE.
    """
    pieces = Pieces(tiles, height, width)
    kept = [one for one in pieces.objects() if one.score >= threshold]
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


@dataclass(frozen=True)
class WholeObject:
    """What one piece shows, or the joined parts of an object."""

    box: np.ndarray
    score: float
    label: int
    mask: PixelMask | None
    mask_score: float


@dataclass(frozen=True)
class Link:
    """Two pieces of one class, of two tiles, that show the same; the better one comes first.

    agreement: the IoU of what they show where both tiles looked; 0 where that is too little, but
    one of them, which an edge cuts, lies in the other one.
    """

    better: int
    weaker: int
    agreement: float


class Pieces:
    """The detections of all tiles of an image, one after another."""

    def __init__(self, tiles: list[DetectedInWindow], height: int, width: int):
        self.windows = [tile.window for tile in tiles]
        self.boxes = np.concatenate([tile.boxes for tile in tiles])
        self.scores = np.concatenate([tile.scores for tile in tiles])
        self.labels = np.concatenate([tile.labels for tile in tiles])
        counts = [len(tile.scores) for tile in tiles]
        self.tile = np.repeat(np.arange(len(tiles)), counts)
        self.of_tile = np.split(np.arange(len(self.scores)), np.cumsum(counts)[:-1])
        self.masks = None
        self.mask_scores = np.zeros_like(self.scores)
        if tiles[0].masks is not None:
            self.masks = [mask for tile in tiles for mask in tile.masks]
            self.mask_scores = np.concatenate([tile.mask_scores for tile in tiles])
        image = Window(0, 0, width, height)
        cut = [cut_by_edges(tile.boxes, tile.window, image) for tile in tiles]
        self.cut = np.concatenate(cut)
        self.pairs = list(overlapping(tiles))
        self.left_out = np.zeros(len(self.scores), dtype=bool)
        for a, b in self.pairs:
            for own, beside in ((a, b), (b, a)):
                window = self.windows[beside]
                ours = self.of_tile[own]
                if is_no_larger(window, self.windows[own]):
                    cut_there = cut_by_edges(self.boxes[ours], window, image)
                    self.left_out[ours] |= self.cut[ours] & ~cut_there

    def objects(self) -> list[WholeObject]:
        """Each from its parts; from the best scores down, so that none depends on lower ones."""
        groups = [[i] for i in range(len(self.scores))]  # pieces of one object share one list
        for link in self.links():
            if self.left_out[[link.better, link.weaker]].any():
                continue
            group = groups[link.better] + groups[link.weaker]
            alone = len(groups[link.weaker]) == 1
            if alone and not link.agreement and self.is_part(link.weaker, link.better):
                self.left_out[link.weaker] = True
                continue
            if not self.of_several_tiles(group):
                continue
            if alone and self.adds_nothing(link):
                self.left_out[link.weaker] = True
            elif not (self.goes_on(link) and self.comparable(group)):
                continue
            for i in group:
                groups[i] = group
        first_ones = [i for i, group in enumerate(groups) if i == group[0] and not self.left_out[i]]
        return [self.as_one(self.parts(groups[i])) for i in first_ones]

    def links(self) -> list[Link]:
        """Better weaker ones first, then those with what no edge cuts, then by agreement."""
        rank = np.empty(len(self.scores), dtype=int)
        rank[np.argsort(-self.scores, kind="stable")] = np.arange(len(rank))
        links = []
        for a, b in self.pairs:
            for i, j, agreement in self.same_objects(a, b):
                better, weaker = sorted((i, j), key=lambda piece: rank[piece])
                links.append(Link(better, weaker, agreement))
        links.sort(key=lambda link: (rank[link.weaker], self.cut[link.better], -link.agreement))
        return links

    def same_objects(self, a: int, b: int) -> Iterator[tuple[int, int, float]]:
        """Pairs of pieces, of tile a and of tile b, that may be one object, and their agreement."""
        window = self.windows[a].common(self.windows[b])
        ours = self.seen_in(self.of_tile[a], window)
        theirs = self.seen_in(self.of_tile[b], window)
        agreement = self.agreement(ours, theirs, window)
        for i, j in np.argwhere(agreement > 0):
            first, second = int(ours[i]), int(theirs[j])
            if agreement[i, j] > AGREEMENT:
                yield first, second, agreement[i, j]
            elif self.is_part(first, second) or self.is_part(second, first):
                yield first, second, 0.0

    def seen_in(self, pieces: np.ndarray, window: Window) -> np.ndarray:
        """Those of the pieces of which a pixel or more lies in a window, if not left out."""
        clipped = clip(self.boxes[pieces], window)
        seen = ((clipped[:, 2:] - clipped[:, :2]) >= 1).all(axis=1)
        return pieces[seen & ~self.left_out[pieces]]

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

    def is_part(self, piece: int, other: int) -> bool:
        """Whether an edge cuts a piece, and most of it lies in another one."""
        return bool(self.cut[piece]) and self.share_inside(piece, other) > INSIDE

    def goes_on(self, link: Link) -> bool:
        """Whether an edge cuts the better piece beyond which the weaker one's tile looks."""
        own, other = (self.windows[self.tile[piece]] for piece in (link.better, link.weaker))
        return bool(cut_by_edges(self.boxes[[link.better]], own, other)[0])

    def adds_nothing(self, link: Link) -> bool:
        """Whether the weaker piece shows no more of an object than the better one does."""
        if self.goes_on(link) and self.comparable([link.better, link.weaker]):
            return False
        return self.share_inside(link.weaker, link.better) > 1 / 2

    def parts(self, group: list[int]) -> list[int]:
        """Those of a group that are not left out."""
        return [i for i in group if not self.left_out[i]]

    def of_several_tiles(self, group: list[int]) -> bool:
        """Whether no two are of one tile, which shows an object once."""
        return len(set(self.tile[group].tolist())) == len(group)

    def comparable(self, group: list[int]) -> bool:
        scores = self.scores[self.parts(group)]
        return scores.min() >= COMPARABLE * scores.max()

    def as_one(self, parts: list[int]) -> WholeObject:
        """The best part that no edge cuts, if the others lie in it, or all parts joined; with the
        best score among them.
        """
        best = max(parts, key=lambda i: self.scores[i])
        shown = parts
        whole = [i for i in parts if not self.cut[i]]
        if whole:
            best_whole = max(whole, key=lambda i: self.scores[i])
            if all(self.share_inside(i, best_whole) > 1 / 2 for i in parts):
                shown = [best_whole]
        corners = self.boxes[shown]
        return WholeObject(
            box=np.concatenate([corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)]),
            score=self.scores[best],
            label=self.labels[best],
            mask=joined([self.masks[i] for i in shown]) if self.masks else None,
            mask_score=self.mask_scores[parts].max(),
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


def is_no_larger(window: Window, other: Window) -> bool:
    """A larger tile shows small objects less well."""
    return window.width <= other.width and window.height <= other.height


def cut_by_edges(boxes: np.ndarray, window: Window, bounds: Window) -> np.ndarray:
    """(n,) bool: which boxes (n, 4) end at an edge of the window inside the bounds."""
    near = max(NEAR_EDGE * max(window.width, window.height), LEAST_NEAR)
    left, top, right, bottom = boxes.T
    return (
        ((left < window.left + near) & (window.left > bounds.left))
        | ((top < window.top + near) & (window.top > bounds.top))
        | ((right > window.right - near) & (window.right < bounds.right))
        | ((bottom > window.bottom - near) & (window.bottom < bounds.bottom))
    )
