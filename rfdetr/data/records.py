"""What one image of a split holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class ImageRecord:
    """One image and its n objects, crowd regions left out. Sizes and boxes in pixels as the annotations mean them."""

    id: int | str  # the dataset's own
    file_name: str  # as the annotations have it
    width: int
    height: int
    # The sound entries, dropped ones too, so that pycocotools gives the same figures as on the file. "box": what of the
    # bbox is to be learnt, xyxy, or None
    annotations: list[dict] = field(default_factory=list)
    path: Path = Path()
    orientation: int = 1  # the file's own EXIF tag, 1..8
    exif_proof: bool | None = None  # whether that counts, where width and height prove it
    exif: bool = False  # the file is stored rotated or mirrored; load_image undoes it
    digest: bytes = b""  # of the file, where the check decoded it
    sample: int | None = None  # seen.content_hash of the file, where it can be read
    boxes: np.ndarray = field(init=False)  # (n, 4) float32 xyxy, inside the image
    labels: np.ndarray = field(init=False)  # (n,) int64, 0..N-1
    segmentations: list[list | dict | None] = field(
        init=False
    )  # raw polygons or RLE, None where missing or unusable

    @property
    def objects(self) -> list[dict]:
        """The annotations that are to be learnt, in the order of the arrays."""
        return [entry for entry in self.annotations if entry["box"] and not entry["iscrowd"]]
