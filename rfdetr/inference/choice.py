"""What predict() is asked for, in one object."""

from __future__ import annotations

from dataclasses import dataclass

from rfdetr.data.images import GrayWindow
from rfdetr.tiling import Tiling


@dataclass(frozen=True)
class Choice:
    """Its arguments, checked; window: what is black and white in gray of many bits."""

    threshold: float
    nms: float
    batch: int
    max_detections: int | None
    window: GrayWindow | None
    tiling: Tiling | None
    letterbox: bool
