"""Where a model's input lies in its original image: as a whole, as a tile or in a letterbox."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rfdetr.tiling import Window


def letterbox_borders(height: int, width: int, side: int) -> tuple[int, int]:
    """(beside, above): the pixels between an image and the rim of the square input of `side` pixels
    that it is centred in as large as its proportions allow.

    Equal at both ends, so that flips leave them: the shorter side is right to a pixel.
    """
    longest = max(height, width)
    most = (side - 1) // 2  # something is left of the thinnest image
    beside = min(round((side - side * width / longest) / 2), most)
    above = min(round((side - side * height / longest) / 2), most)
    return beside, above


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the input of a model lies in its original image of height x width pixels.

    matrix (2, 3): takes (x, y, 1), in 0..1 of the input, to pixels of the original. It scales by
    positive factors and shifts, along the axes; anything else is a ValueError. A pixel's centre
    lies half a pixel from its corner.
    "Visible" is what lies in both: beyond the input nothing was looked at (a tile), and beyond the
    original is a border (a letterbox).
    """

    matrix: np.ndarray
    height: int
    width: int

    def __post_init__(self) -> None:
        (x_scale, y_to_x, _), (x_to_y, y_scale, _) = self.matrix
        if y_to_x or x_to_y or not (x_scale > 0 and y_scale > 0):
            raise ValueError(f"{self.matrix} does more than scale and shift along the axes")

    @classmethod
    def resized(cls, height: int, width: int) -> Placement:
        """Of an original that is resized as a whole, whatever the input's sides."""
        return cls(np.array([[width, 0.0, 0.0], [0.0, height, 0.0]]), height, width)

    @classmethod
    def of_window(cls, window: Window, height: int, width: int) -> Placement:
        """Of a part of an original that is resized by itself: a tile."""
        matrix = np.array([[window.width, 0.0, window.left], [0.0, window.height, window.top]])
        return cls(matrix, height, width)

    @classmethod
    def of_input(
        cls, window: Window, height: int, width: int, side: int, letterbox: bool
    ) -> Placement:
        """Of a part of an original, or of all of it, in an input of side x side pixels, where it is
        resized or keeps its proportions (`letterbox`).
        """
        if not letterbox:
            return cls.of_window(window, height, width)
        beside, above = letterbox_borders(window.height, window.width, side)
        inner_width = side - 2 * beside
        inner_height = side - 2 * above
        left = window.left - beside * window.width / inner_width
        top = window.top - above * window.height / inner_height
        x_scale = side * window.width / inner_width
        y_scale = side * window.height / inner_height
        return cls(np.array([[x_scale, 0.0, left], [0.0, y_scale, top]]), height, width)

    def to_input(self, height: int, width: int) -> np.ndarray:
        """(3, 3): from pixels of the original to those of an input of height x width."""
        x_scale = width / self.matrix[0, 0]
        y_scale = height / self.matrix[1, 1]
        left, top = self.matrix[:, 2]
        return np.array([[x_scale, 0, -left * x_scale], [0, y_scale, -top * y_scale], [0, 0, 1]])

    def to_original(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) xyxy in 0..1 of the input -> (n, 4) xyxy in pixels, not clipped."""
        scale = boxes.new_tensor(np.diagonal(self.matrix)).repeat(2)
        shift = boxes.new_tensor(self.matrix[:, 2]).repeat(2)
        return boxes * scale + shift

    @property
    def visible(self) -> list[float]:
        """The visible part of the original, xyxy in pixels."""
        left, top = self.matrix[:, 2].tolist()
        right = left + self.matrix[0, 0].item()
        bottom = top + self.matrix[1, 1].item()
        return [max(left, 0), max(top, 0), min(right, self.width), min(bottom, self.height)]

    @property
    def has_border(self) -> bool:
        """Whether a part of the input lies beyond the original."""
        left, top = self.matrix[:, 2]
        right = left + self.matrix[0, 0]
        bottom = top + self.matrix[1, 1]
        return bool(left < 0 or top < 0 or right > self.width or bottom > self.height)

    def clip(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) xyxy in pixels, cut down to what is visible; NaN stays NaN."""
        visible = boxes.new_tensor(self.visible)
        return boxes.clamp(visible[:2].repeat(2), visible[2:].repeat(2))

    def visible_pixels(self, box: list[float]) -> tuple[slice, slice]:
        """The rows and columns of the visible pixels whose centres lie in a box xyxy in pixels."""
        x0, y0, x1, y1 = box
        left, top, right, bottom = self.visible
        rows = _centres_between(max(y0, top), min(y1, bottom))
        columns = _centres_between(max(x0, left), min(x1, right))
        return rows, columns

    def column_positions(self, cells: int) -> Tensor:
        """Where the centre of each of the original's columns lies on the input, in 0..cells."""
        return _positions(self.width, self.matrix[0, 0], self.matrix[0, 2], cells)

    def row_positions(self, cells: int) -> Tensor:
        """Where the centre of each of the original's rows lies on the input, in 0..cells."""
        return _positions(self.height, self.matrix[1, 1], self.matrix[1, 2], cells)


def _centres_between(low: float, high: float) -> slice:
    """The pixels along an axis whose centres lie in low..high; empty where there are none."""
    end = max(math.floor(high + 0.5), 0)
    first = min(math.ceil(low - 0.5), end)
    return slice(first, end)


def _positions(pixels: int, scale: float, shift: float, cells: int) -> Tensor:
    # in double precision, which not every device has: a tile's offset may be large
    centres = torch.arange(pixels, dtype=torch.float64) + 0.5
    return ((centres - shift) * cells / scale).float()
