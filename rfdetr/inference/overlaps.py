"""What boxes and masks of one image have in common."""

from __future__ import annotations

import numpy as np

from rfdetr.tiling import Window


class PixelMask:
    """A mask's pixels: bool (h, w), with its corner at (left, top) of the original.

    They are kept as bits: those of a large image's tiles are in memory together.
    """

    def __init__(self, left: int, top: int, pixels: np.ndarray):
        self.left = left
        self.top = top
        self.shape = pixels.shape
        self.area = int(pixels.sum())
        self._bits = np.packbits(pixels)

    @property
    def pixels(self) -> np.ndarray:
        height, width = self.shape
        flat = np.unpackbits(self._bits, count=height * width)
        return flat.view(bool).reshape(height, width)

    @property
    def window(self) -> Window:
        height, width = self.shape
        return Window(self.left, self.top, self.left + width, self.top + height)

    def inside(self, window: Window) -> np.ndarray:
        """Its pixels in a window that lies within its own, (h, w)."""
        rows = slice(window.top - self.top, window.bottom - self.top)
        columns = slice(window.left - self.left, window.right - self.left)
        return self.pixels[rows, columns]

    def area_inside(self, window: Window) -> int:
        both = self.window.common(window)
        return int(self.inside(both).sum()) if both else 0

    def area_common(self, other: PixelMask, window: Window) -> int:
        """Pixels of both in a window."""
        both = self.window.common(other.window)
        both = both and both.common(window)
        return int((self.inside(both) & other.inside(both)).sum()) if both else 0


def clip(boxes: np.ndarray, window: Window) -> np.ndarray:
    """Boxes (n, 4) xyxy cut down to a window; empty ones have no positive side."""
    low = [window.left, window.top]
    high = [window.right, window.bottom]
    return np.concatenate([np.maximum(boxes[:, :2], low), np.minimum(boxes[:, 2:], high)], axis=1)


def areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2:] - boxes[..., :2]).clip(0).prod(axis=-1)


def common_areas(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Boxes (m, 4) and (n, 4) xyxy -> (m, n): what they have in common."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    return (high - low).clip(0).prod(axis=-1)


def box_ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Boxes (m, 4) and (n, 4) xyxy -> (m, n); 0 for empty ones."""
    common = common_areas(boxes, others)
    both = areas(boxes)[:, None] + areas(others) - common
    return np.divide(common, both, out=np.zeros_like(common), where=both > 0)


def inside_shares(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Boxes (m, 4) and (n, 4) xyxy -> (m, n): how much of each box lies in each other one, 0..1."""
    common = common_areas(boxes, others)
    own = areas(boxes)[:, None]
    return np.divide(common, own, out=np.ones_like(common), where=own > 0)


def joined(masks: list[PixelMask]) -> PixelMask:
    """All pixels of some masks."""
    windows = np.array([mask.window for mask in masks])
    left, top = windows[:, :2].min(axis=0).tolist()
    right, bottom = windows[:, 2:].max(axis=0).tolist()
    pixels = np.zeros((bottom - top, right - left), dtype=bool)
    for mask in masks:
        height, width = mask.shape
        rows = slice(mask.top - top, mask.top - top + height)
        columns = slice(mask.left - left, mask.left - left + width)
        pixels[rows, columns] |= mask.pixels
    return PixelMask(left, top, pixels)
