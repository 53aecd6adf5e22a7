"""From images to detections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms

from rfdetr.boxes import cxcywh_to_xyxy
from rfdetr.classes import ClassTable
from rfdetr.console import UserError, is_out_of_memory, warn
from rfdetr.data.augment import to_model_input
from rfdetr.device import Precision, release_memory
from rfdetr.inference.visualise import class_colours, draw
from rfdetr.masks import encode_window
from rfdetr.models.detector import Detector, select_detections
from rfdetr.models.segmentation import MaskHead, OfficialMaskHead

AnyMaskHead = MaskHead | OfficialMaskHead


@dataclass
class Detections:
    """What a detector found in a batch, best first, and what a mask head needs to draw it.

    index: positions in the split; scores, labels (B, k); boxes (B, k, 4) cxcywh 0..1; queries (B, k, C);
    features (B, C, h, w); images uint8 (B, 3, R, R).
    """

    index: list[int]
    scores: Tensor
    labels: Tensor
    boxes: Tensor
    queries: Tensor
    features: Tensor
    images: Tensor

    def __getitem__(self, part: slice) -> Detections:
        return Detections(**{name: value[part] for name, value in vars(self).items()})

    def on(self, device: torch.device) -> Detections:
        """The same with all tensors on `device`."""
        values = {
            name: v.to(device) if isinstance(v, Tensor) else v for name, v in vars(self).items()
        }
        return Detections(**values)

    def pixel_boxes(self, i: int, height: int, width: int) -> np.ndarray:
        """Image i's boxes as (k, 4) xyxy in pixels of a height x width original, clipped to it.

        These are scored, saved and delivered alike; the official package clips its own, too.
        """
        boxes = cxcywh_to_xyxy(self.boxes[i].float().cpu()).numpy()
        sides = np.array([width, height] * 2, dtype=np.float32)
        return (boxes * sides).clip(0, sides)


class DetectionRunner:
    """Runs detectors on batches; where memory runs out, on smaller parts of them from then on."""

    def __init__(self, table: ClassTable, precision: Precision):
        self.precision = precision
        self.rows = torch.tensor(
            table.rows, device=precision.device
        )  # of each label in the class head
        self.at_once: int | None = None  # images; None: as many as are given

    def __call__(self, model: Detector, images: Tensor, index: list[int]) -> Iterator[Detections]:
        """Detections in uint8 (B, 3, R, R) images, in one part or several, in order; `index`: the images' numbers.

        Raises UserError where not even one image fits.
        """
        model.eval()
        first = 0
        while first < len(images):
            part = slice(first, first + (self.at_once or len(images)))
            try:
                found = self._detect(model, images[part], index[part])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                found = None
            if (
                found is None
            ):  # outside the handler, where the failed pass's tensors are no longer referenced
                self._step_down(len(images[part]))
                continue
            yield found
            first += len(found.index)

    @torch.inference_mode()
    def _detect(self, model: Detector, images: Tensor, index: list[int]) -> Detections:
        with self.precision.autocast():
            outputs = model(to_model_input(images, self.precision.device))
        scores, labels, boxes, chosen = select_detections(outputs, self.rows, model.size.select)
        queries = outputs["queries"].gather(
            1, chosen[..., None].expand(-1, -1, outputs["queries"].shape[-1])
        )
        return Detections(
            index, scores, labels, boxes, queries.float(), outputs["features"].float(), images
        )

    def _step_down(self, images: int) -> None:
        if images == 1:
            raise UserError(
                "out of memory with a single image: use --device cpu, or a model of a smaller --resolution"
            )
        self.at_once = -(-images // 2)
        warn(f"out of memory: detecting in {self.at_once} images at a time from now on")
        release_memory(self.precision.device)


@torch.inference_mode()
def draw_masks(
    head: AnyMaskHead,
    found: Detections,
    sizes: list[tuple[int, int]],
    chosen: list[np.ndarray],
    precision: Precision,
) -> list[list[dict]]:
    """COCO RLEs of the detections chosen[i] (n,) of image i at its original (height, width).

    Memory does not grow with the number of detections: a head draws a few at a time.
    """
    head.eval()
    rles = []
    for i, ((height, width), own) in enumerate(zip(sizes, chosen)):
        one = found[i : i + 1].on(precision.device)  # pixel maps are large: one image's at a time
        with precision.autocast():
            pixels = head.pixels(one.features, to_model_input(one.images, precision.device))[0]
        masks = head.paste(pixels, one.queries[0, own], one.boxes[0, own], height, width)
        rles.append([encode_window(*mask, height, width) for mask in masks])
    return rles


@dataclass
class Prediction:
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

    def without_duplicates(self, iou: float = 0.7) -> Prediction:
        """The same without lower-scored boxes of one class that overlap a better one by more than `iou`.

        For pictures: DETR's figures are computed without it.
        """
        boxes, scores, labels = map(torch.as_tensor, (self.boxes, self.scores, self.labels))
        chosen = batched_nms(boxes.float(), scores.float(), labels, iou).numpy()
        masks = None if self.masks is None else [self.masks[i] for i in chosen]
        names = [self.names[i] for i in chosen]
        return Prediction(
            self.image, self.boxes[chosen], self.scores[chosen], self.labels[chosen], names, masks
        )

    def picture(self, class_names: list[str]) -> Image.Image:
        """The image with everything drawn in."""
        colours = class_colours(class_names)
        return draw(self.image, self.boxes, self.names, self.scores.tolist(), self.masks, colours)


def in_originals(
    found: Detections,
    images: list[np.ndarray],
    threshold: float,
    head: AnyMaskHead | None,
    names: list[str],
    precision: Precision,
) -> list[Prediction]:
    """What scores `threshold` or more, in pixels of the original images (H, W, 3); `names` of the classes by label."""
    sizes = [image.shape[:2] for image in images]
    chosen = [np.flatnonzero(scores >= threshold) for scores in found.scores.cpu().numpy()]
    masks = (
        draw_masks(head, found, sizes, chosen, precision)
        if head is not None
        else [None] * len(images)
    )
    answer = []
    for i, (image, (height, width), own) in enumerate(zip(images, sizes, chosen)):
        boxes = found.pixel_boxes(i, height, width)[own]
        scores, labels = (values[i].cpu().numpy()[own] for values in (found.scores, found.labels))
        answer.append(
            Prediction(image, boxes, scores, labels, [names[label] for label in labels], masks[i])
        )
    return answer
