"""Four views in one, which meet at a random point: how training learns what lies beside a seam.

Source of the idea: YOLOv4 (arXiv:2004.10934). Here each view keeps its scale, so that a mosaic
looks like a tile of pictures that were laid side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rfdetr.tiling import Window

NOWHERE = Window(0, 0, 0, 0)
MARGIN = 0.2  # share of the side: no seam lies nearer to the rim


class Part(NamedTuple):
    """Where one of the views is seen."""

    window: Window  # of the mosaic's pixels
    right: int  # pixels that the view is moved there, negative: to the left
    down: int

    def take(
        self, image: Tensor, matrix: np.ndarray, shown: Window
    ) -> tuple[Tensor, np.ndarray, Window]:
        """A view (3, R, R), the matrix (2, 3) into it and the window that shows its image, moved.

        Of the view only what lies in `window` is right; the moved `shown` ends there.
        """
        image = image.roll((self.down, self.right), (1, 2))
        matrix = matrix + [[0, 0, self.right], [0, 0, self.down]]
        left, top, right, bottom = shown
        moved = Window(left + self.right, top + self.down, right + self.right, bottom + self.down)
        return image, matrix, moved.common(self.window) or NOWHERE


def draw_parts(side: int) -> list[Part]:
    """The four parts of a mosaic of side x side pixels, in random order.

    torch's global generator draws.
    """
    x, y = (side * (MARGIN + (1 - 2 * MARGIN) * torch.rand(2))).round().int().tolist()
    upper_left = Part(Window(0, 0, x, y), x - side, y - side)
    upper_right = Part(Window(x, 0, side, y), x, y - side)
    lower_left = Part(Window(0, y, x, side), x - side, y)
    lower_right = Part(Window(x, y, side, side), x, y)
    parts = [upper_left, upper_right, lower_left, lower_right]
    return [parts[i] for i in torch.randperm(4)]


def join(samples: list[dict], parts: list[Part]) -> dict:
    """A dataset's samples, each of which has been moved to its part and shows objects there alone,
    as one. It has the index of the first one.
    """
    image = torch.empty_like(samples[0]["image"])
    target = {"index": samples[0]["target"]["index"]}
    unread = {}
    for sample, part in zip(samples, parts, strict=True):
        left, top, right, bottom = part.window
        image[:, top:bottom, left:right] = sample["image"][:, top:bottom, left:right]
        unread |= sample["unread"]
    for name in samples[0]["target"]:
        if name != "index":
            target[name] = torch.cat([sample["target"][name] for sample in samples])
    return {"image": image, "target": target, "unread": unread}
