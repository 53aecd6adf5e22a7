"""Large images in parts: where the tiles of an image lie.

Slicing an image and merging what its parts show is the idea of SAHI (arXiv:2202.06934).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rfdetr.console import UserError, tick, warn
from rfdetr.fields import LEAST_TILE
from rfdetr.settings import MOST_TILE_OVERLAP, TILE_OVERLAP

AUTO = "auto"
UNLIKE = 1.5  # times larger or smaller than in training: objects are then found badly


class Window(NamedTuple):
    """A rectangle of whole pixels of an image, from its corner up to right and bottom."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def common(self, other: Window) -> Window | None:
        """What lies in both; None where nothing does."""
        both = Window(
            max(self.left, other.left),
            max(self.top, other.top),
            min(self.right, other.right),
            min(self.bottom, other.bottom),
        )
        return both if both.left < both.right and both.top < both.bottom else None


@dataclass(frozen=True)
class Tiling:
    """Tiles of side x side pixels, neighbours having at least the share `overlap` in common.

    with_whole: the whole image is looked at as one more tile, for objects larger than a tile.
    Raises UserError for a share that makes too many tiles.
    """

    side: int
    overlap: float = TILE_OVERLAP
    with_whole: bool = False

    def __post_init__(self):
        if not 0 <= self.overlap <= MOST_TILE_OVERLAP:  # never true of NaN
            raise UserError(
                f"--tile_overlap must be a number in 0..{MOST_TILE_OVERLAP}, got {self.overlap!r}"
            )

    def told(self) -> str:
        whole = ", and each image as a whole" if self.with_whole else ""
        return f"Tiles of {self.side} px, {self.overlap:.0%} in common{whole}"

    def windows(self, height: int, width: int) -> list[Window]:
        """The tiles of an image, which they cover evenly; one of it all where it is no larger."""
        whole = Window(0, 0, width, height)
        tiles = [
            Window(left, top, min(left + self.side, width), min(top + self.side, height))
            for top in self.starts(height)
            for left in self.starts(width)
        ]
        if self.with_whole and tiles != [whole]:
            tiles.append(whole)
        return tiles

    def starts(self, pixels: int) -> list[int]:
        """Where the tiles begin along an axis."""
        if pixels <= self.side:
            return [0]
        common = min(round(self.side * self.overlap), self.side - 1)
        count = math.ceil((pixels - common) / (self.side - common))
        last = pixels - self.side
        return [round(last * i / (count - 1)) for i in range(count)]


def crop(pixels: np.ndarray, window: Window) -> np.ndarray:
    """The part (h, w, C) of an image (H, W, C), an array or what is indexed like one."""
    return pixels[window.top : window.bottom, window.left : window.right]


def choose_tile(tile: int | str | None, trained_tile: int, trained_side: int | None) -> int:
    """The side of a tile in pixels to predict or score with; 0 for none.

    tile: 0, a side, "auto" or None, as in --tile; trained_tile: of the training's tiles, 0 for
    none; trained_side: of a typical training image. Raises UserError.
    """
    if tile is None:
        return trained_tile
    if isinstance(tile, str) and tile == AUTO:
        if trained_tile or trained_side:
            return trained_tile or trained_side
        raise UserError(
            "--tile auto: this checkpoint does not say how large its training images were: give "
            "their usual side in pixels, such as --tile 640"
        )
    return checked_side(tile)


def checked_side(tile: int) -> int:
    """The side of a tile in pixels, 0 for none.  Raises UserError for what is neither."""
    is_number = isinstance(tile, (int, np.integer)) and not isinstance(tile, bool)
    if not is_number or tile and tile < LEAST_TILE:
        raise UserError(f"--tile must be 0, auto, or {LEAST_TILE} pixels or more, got {tile!r}")
    return int(tile)


def tiling_of(
    content: dict, tile: int | str | None, overlap: float | None, full: bool | None
) -> Tiling | None:
    """The tiles to predict or score with, None for none; tile, overlap, full: as the flags.

    content: of the checkpoint. Raises UserError.
    """
    side = choose_tile(tile, content.get("tile") or 0, content.get("image_side"))
    return tiles_like(content, side, overlap, full) if side else None


def tiles_like(content: dict, side: int, overlap: float | None, full: bool | None) -> Tiling:
    """Tiles of this side; what is None is as in training, where that was in tiles.

    content: of the checkpoint; those of earlier versions have it among their settings.
    """
    trained = {}
    if content.get("tile"):
        trained = content if "tile_overlap" in content else content.get("args") or {}
    if overlap is None:
        overlap = trained.get("tile_overlap", TILE_OVERLAP)
    if full is None:
        full = trained.get("tile_full", False)
    return Tiling(side, overlap, full)


def idle_flags(tiling: Tiling | None, overlap: float | None, full: bool | None) -> list[str]:
    """What to warn of --tile_overlap and --tile_full where there are no tiles."""
    given = {"--tile_overlap": overlap is not None, "--tile_full 1": bool(full)}
    return [
        f"{flag} changes nothing without tiles, which --tile asks for"
        for flag, is_given in given.items()
        if is_given and tiling is None
    ]


def tell_idle_flags(tiling: Tiling | None, overlap: float | None, full: bool | None) -> None:
    for warning in idle_flags(tiling, overlap, full):
        warn(warning)


def tell_tiles(content: dict, tiling: Tiling | None, longest_side: int | None = None) -> None:
    """Say which tiles are looked at, and warn where they show objects at another scale than
    training did.

    content: as in tiling_of; longest_side: of all images, in pixels, where it is known.
    """
    if tiling is None:
        return
    if longest_side and longest_side <= tiling.side:
        tick(f"Tiles of {tiling.side} px: no image is larger, each is looked at as a whole")
    else:
        tick(tiling.told())
    warning = unlike_training(content, tiling, longest_side)
    if warning:
        warn(warning)


def unlike_training(content: dict, tiling: Tiling | None, longest_side: int | None = None) -> str:
    """A warning where tiles show objects at another scale than training did, else "".

    content, longest_side: as in tell_tiles.
    """
    known = content.get("tile") or content.get("image_side")
    if not known or tiling is None or tiling.with_whole:
        return ""
    factor = known / min(tiling.side, longest_side or tiling.side)
    if 1 / UNLIKE <= factor <= UNLIKE:
        return ""
    return (
        f"--tile {tiling.side}: the model was trained on images or tiles of {known} px, so that it "
        f"sees objects {factor:.1f} times as large as then and may miss them; --tile auto keeps "
        "their size"
    )
