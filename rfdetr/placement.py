"""Where a model's input lies in its original image: one geometry for a plain resize, a tile and a letterbox."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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

    def to_original(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) xyxy in 0..1 of the input -> (n, 4) xyxy in pixels, not clipped."""
        scale = boxes.new_tensor(np.diagonal(self.matrix)).repeat(2)
        shift = boxes.new_tensor(self.matrix[:, 2]).repeat(2)
        return boxes * scale + shift

    def clip(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) xyxy in pixels, cut down to what is visible; NaN stays NaN."""
        whole_input = self.to_original(torch.tensor([0.0, 0.0, 1.0, 1.0]))
        lowest = whole_input.clamp(min=0)
        highest = whole_input.clamp(max=torch.tensor([self.width, self.height] * 2))
        low = lowest[:2].repeat(2).to(boxes)
        high = highest[2:].repeat(2).to(boxes)
        return boxes.clamp(low, high)

    def visible_pixels(self, box: list[float]) -> tuple[slice, slice]:
        """The rows and columns of the visible pixels whose centres lie in a box xyxy in pixels."""
        x0, y0, x1, y1 = box
        (x_scale, _, x_shift), (_, y_scale, y_shift) = self.matrix.tolist()
        columns = _centres_between(max(x0, x_shift, 0), min(x1, x_shift + x_scale, self.width))
        rows = _centres_between(max(y0, y_shift, 0), min(y1, y_shift + y_scale, self.height))
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
