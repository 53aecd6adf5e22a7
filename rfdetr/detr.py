"""The Python door: load a model by size or checkpoint, and predict.

from rfdetr.detr import RFDETRNano
prediction = RFDETRNano(checkpoint="runs/.../best.pt").predict("image.jpg", threshold=0.5)
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from rfdetr.console import UserError
from rfdetr.data.image_files import is_regular_file
from rfdetr.data.images import oriented, read_pixels, to_rgb_array
from rfdetr.device import pick_device, pick_precision
from rfdetr.inference.detections import DetectionRunner, Detections, Prediction, make_predictions
from rfdetr.placement import Placement
from rfdetr.sizes import SIZES
from rfdetr.weights.checkpoint import build_model, input_side, load, require_size
from rfdetr.weights.download import find_weights

ImageInput = str | Path | Image.Image | np.ndarray


class RFDETR:
    """A detector, with masks where its checkpoint has a mask head.

    `model` is the plain torch module; `exif` ("apply" or "ignore") how image files are turned.
    """

    size_name: str | None = None  # the official weights a subclass starts from

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        device: str = "auto",
        amp: str = "off",
        resolution: int | None = None,
    ):
        """checkpoint: a file of this repository or an official one; None: the official weights of
        the size, downloaded. resolution: the input side in pixels; None: the checkpoint's own.

        Raises UserError for a file that is missing, damaged or of another size, and for a side
        that does not fit.
        """
        self.precision = pick_precision(amp, pick_device(device))
        size = SIZES.get(self.size_name)
        if checkpoint is None and size is None:
            raise UserError(
                "RFDETR needs a checkpoint; the sizes' own classes (RFDETRNano ...) have official "
                "weights"
            )
        path = Path(checkpoint or find_weights("auto", size))
        content = load(path)
        if size is not None:
            require_size(content, size, path)
        self.resolution = input_side(content, resolution, path)
        model, self.table = build_model(content)
        self.model = model.to(self.precision.device)
        self.runner = DetectionRunner(self.table, self.precision)
        self.exif = content.get("exif") or "apply"  # as the images it was trained on were read

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str = "auto", amp: str = "off", resolution: int | None = None
    ) -> RFDETR:
        """Any checkpoint, whatever its size."""
        return RFDETR(path, device, amp, resolution)

    @property
    def class_names(self) -> list[str]:
        return list(self.table.names)

    def predict(
        self, images: ImageInput | list[ImageInput], threshold: float = 0.5
    ) -> Prediction | list[Prediction]:
        """Detect objects with a score of at least `threshold` in one image or in each of a list.

        An image is a path, a PIL image, or an array (H, W, 3) uint8 RGB. Returns a Prediction, or a
        list of them for a list. Raises UserError for an image that cannot be read, and where the
        model gives NaN.
        """
        if not isinstance(images, list):
            return self.predict([images], threshold)[0]
        if not images:
            return []
        originals = [read_image(image, self.exif == "apply") for image in images]
        inputs = torch.stack([self._resized(original) for original in originals])
        placements = [Placement.resized(*original.shape[:2]) for original in originals]
        indices = list(range(len(originals)))
        predictions = []
        for detections in self.runner.run(self.model, inputs, placements, indices):
            require_finite(detections)
            predictions += make_predictions(
                detections,
                [originals[i] for i in detections.indices],
                threshold,
                self.model.head,
                self.class_names,
                self.precision,
            )
        return predictions

    def _resized(self, original: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 -> the model's input, (3, R, R) uint8."""
        pixels = torch.tensor(original).permute(2, 0, 1)
        return v2.functional.resize(pixels, [self.resolution, self.resolution], antialias=True)


def require_finite(detections: Detections) -> None:
    """Raise UserError where a score or a box is NaN or infinite."""
    if detections.scores.isfinite().all() and detections.boxes.isfinite().all():
        return
    raise UserError(
        "the model's scores or boxes are NaN or infinite. Run again with --amp off; if it is off "
        "already, the checkpoint is damaged: use another"
    )


def read_image(image: ImageInput, turn: bool = True) -> np.ndarray:
    """Any accepted input as (H, W, 3) uint8 RGB; turn: make it upright by its EXIF orientation.

    Raises UserError for what is no image or cannot be read.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(
                "an image array must be (H, W, 3) uint8 RGB, this one is "
                f"{image.shape} {image.dtype}"
            )
        return image
    if isinstance(image, (str, Path)):
        if os.path.exists(image) and not is_regular_file(image):
            raise UserError(f"{image} is not an image file, but a folder, pipe, socket or device")
        return read_pixels(image, turn)
    return to_rgb_array(oriented(image, turn))


def _of_size(size: str) -> type[RFDETR]:
    """The class of one size, which starts from its official weights."""
    name = "RFDETR" + size.title().replace("-", "").replace("Xl", "XL")
    return type(name, (RFDETR,), {"size_name": size})


RFDETRNano = _of_size("nano")
RFDETRSmall = _of_size("small")
RFDETRMedium = _of_size("medium")
RFDETRBase = _of_size("base")
RFDETRLarge = _of_size("large")
RFDETRLarge2026 = _of_size("large-2026")
RFDETRSegNano = _of_size("seg-nano")
RFDETRSegSmall = _of_size("seg-small")
RFDETRSegMedium = _of_size("seg-medium")
RFDETRSegLarge = _of_size("seg-large")
RFDETRSegXLarge = _of_size("seg-xlarge")
RFDETRSeg2XLarge = _of_size("seg-2xlarge")
