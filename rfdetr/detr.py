"""The Python door: load a model by size or checkpoint, and predict.

from rfdetr import RFDETRNano
found = RFDETRNano(checkpoint="runs/.../best.pt").predict("image.jpg", threshold=0.5)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from rfdetr import checkpoint
from rfdetr.console import UserError
from rfdetr.data.coco import read_pixels, to_rgb_array
from rfdetr.evaluation import Detections, Finder, draw_masks
from rfdetr.precision import pick_device, pick_precision
from rfdetr.sizes import SIZES
from rfdetr.visualise import class_colours, draw, nms_for_drawing
from rfdetr.weights import find_weights

ImageInput = str | Path | Image.Image | np.ndarray


@dataclass
class Found:
    """What was found in one image, best first.

    boxes (n, 4) xyxy and masks (COCO RLE dicts, or None without a mask head) in pixels of the original, scores (n,)
    0..1, labels (n,) in the checkpoint's class order, names n strings; image (H, W, 3) uint8 RGB.
    """

    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    masks: list[dict] | None

    def keep(self, chosen: np.ndarray) -> Found:
        masks = None if self.masks is None else [self.masks[i] for i in chosen]
        names = [self.names[i] for i in chosen]
        return Found(self.image, self.boxes[chosen], self.scores[chosen], self.labels[chosen], names, masks)

    def without_duplicates(self, iou: float = 0.7) -> Found:
        """The same without lower-scored boxes of one class that overlap a better one by more than `iou`."""
        return self.keep(nms_for_drawing(self.boxes, self.scores, self.labels, iou))

    def picture(self, class_names: list[str]) -> Image.Image:
        colours = class_colours(class_names)
        return draw(self.image, self.boxes, self.names, self.scores.tolist(), self.masks, colours)


class RFDETR:
    """A detector, with masks where its checkpoint has a mask head.  `model` is the plain torch module."""

    size_name: str | None = None  # the official weights a subclass starts from

    def __init__(self, checkpoint: str | Path | None = None, device: str = "auto", amp: str = "off"):
        """`checkpoint`: a file of this repository or an official one; None downloads the size's official weights.

        Raises UserError for a file that is missing, damaged or of another size.
        """
        self.precision = pick_precision(amp, pick_device(device))
        if checkpoint is None:
            if self.size_name is None:
                raise UserError(
                    "RFDETR needs a checkpoint; the sizes' own classes (RFDETRNano ...) have official weights"
                )
            checkpoint = find_weights("auto", SIZES[self.size_name])
        self._load(Path(checkpoint))

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str = "auto", amp: str = "off") -> RFDETR:
        """Any checkpoint, whatever its size."""
        return RFDETR(path, device, amp)

    def _load(self, path: Path) -> None:
        content = checkpoint.load(path)
        if self.size_name is not None:
            checkpoint.require_size(content, SIZES[self.size_name], path)
        model, self.table = checkpoint.build_model(content)
        self.model = model.to(self.precision.device)
        self.finder = Finder(self.table, self.precision)
        self.resolution = content["resolution"]

    @property
    def class_names(self) -> list[str]:
        return list(self.table.names)

    def predict(self, images: ImageInput | list[ImageInput], threshold: float = 0.5) -> Found | list[Found]:
        """Find objects with a score of at least `threshold` in a path, PIL image, array (H, W, 3) uint8 RGB, or a list.

        Returns one Found, or a list of them for a list.
        """
        if not isinstance(images, list):
            return self.predict([images], threshold)[0]
        if not images:
            return []
        arrays = [read_image(image) for image in images]
        square = [self.resolution, self.resolution]
        tensors = [v2.functional.resize(torch.tensor(a).permute(2, 0, 1), square, antialias=True) for a in arrays]
        parts = self.finder(self.model, torch.stack(tensors), list(range(len(arrays))))
        return [one for part in parts for one in self._found([arrays[i] for i in part.index], part, threshold)]

    def _found(self, arrays: list[np.ndarray], found: Detections, threshold: float) -> list[Found]:
        sizes = [array.shape[:2] for array in arrays]
        counts = (found.scores >= threshold).sum(1).tolist()
        masks: list = [None] * len(arrays)
        if self.model.head is not None:
            masks = draw_masks(self.model.head, found, sizes, counts, self.precision)
        return [self._one(arrays[i], found, i, counts[i], masks[i]) for i in range(len(arrays))]

    def _one(self, image: np.ndarray, found: Detections, i: int, count: int, masks: list | None) -> Found:
        labels = found.labels[i, :count].cpu().numpy()
        height, width = image.shape[:2]
        boxes = found.pixel_boxes(i, height, width)[:count].clip(0, [width, height, width, height])
        names = [self.table.names[label] for label in labels]
        return Found(image, boxes, found.scores[i, :count].cpu().numpy(), labels, names, masks)


def read_image(image: ImageInput) -> np.ndarray:
    """Any accepted input as (H, W, 3) uint8 RGB, upright by its EXIF orientation.  Raises UserError."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"an image array must be (H, W, 3) uint8 RGB, this one is {image.shape} {image.dtype}")
        return image
    if isinstance(image, (str, Path)):
        return read_pixels(image, turn=True)
    return to_rgb_array(ImageOps.exif_transpose(image))


class RFDETRNano(RFDETR):
    size_name = "nano"


class RFDETRSmall(RFDETR):
    size_name = "small"


class RFDETRMedium(RFDETR):
    size_name = "medium"


class RFDETRBase(RFDETR):
    size_name = "base"


class RFDETRLarge(RFDETR):
    size_name = "large"


class RFDETRLarge2026(RFDETR):
    size_name = "large-2026"


class RFDETRSegNano(RFDETR):
    size_name = "seg-nano"


class RFDETRSegSmall(RFDETR):
    size_name = "seg-small"


class RFDETRSegMedium(RFDETR):
    size_name = "seg-medium"


class RFDETRSegLarge(RFDETR):
    size_name = "seg-large"


class RFDETRSegXLarge(RFDETR):
    size_name = "seg-xlarge"


class RFDETRSeg2XLarge(RFDETR):
    size_name = "seg-2xlarge"
