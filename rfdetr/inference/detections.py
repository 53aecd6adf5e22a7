"""From images to detections, and from those to boxes and masks in the pixels of the originals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms

from rfdetr.boxes import cxcywh_to_xyxy
from rfdetr.classes import ClassTable
from rfdetr.console import UserError, warn
from rfdetr.data.augment import to_model_input
from rfdetr.device import Precision, unless_out_of_memory
from rfdetr.inference.visualise import class_colours, draw
from rfdetr.masks import encode_window
from rfdetr.models.detector import Detector, select_detections
from rfdetr.models.segmentation import MaskHead, OfficialMaskHead
from rfdetr.placement import Placement

AnyMaskHead = MaskHead | OfficialMaskHead


@dataclass
class Detections:
    """The detections in a batch of B images, best first, and what a mask head draws them from.

    indices: B positions in the split; placements: where each of the B images lies in its original;
    scores, labels (B, k); boxes (B, k, 4) cxcywh 0..1 of the image; queries (B, k, C);
    features (B, C, h, w); images uint8 (B, 3, R, R).
    """

    indices: list[int]
    placements: list[Placement]
    scores: Tensor
    labels: Tensor
    boxes: Tensor
    queries: Tensor
    features: Tensor
    images: Tensor

    def __getitem__(self, part: slice) -> Detections:
        return Detections(
            indices=self.indices[part],
            placements=self.placements[part],
            scores=self.scores[part],
            labels=self.labels[part],
            boxes=self.boxes[part],
            queries=self.queries[part],
            features=self.features[part],
            images=self.images[part],
        )

    def on(self, device: torch.device) -> Detections:
        """The same with all tensors on `device`."""
        return Detections(
            indices=self.indices,
            placements=self.placements,
            scores=self.scores.to(device),
            labels=self.labels.to(device),
            boxes=self.boxes.to(device),
            queries=self.queries.to(device),
            features=self.features.to(device),
            images=self.images.to(device),
        )

    def boxes_in_original(self, i: int) -> np.ndarray:
        """Image i's boxes, (k, 4) xyxy in pixels of its original, clipped to what is visible.

        The same boxes are scored, saved and delivered; the official package clips its boxes, too.
        """
        placement = self.placements[i]
        boxes = cxcywh_to_xyxy(self.boxes[i].float().cpu())
        return placement.clip(placement.to_original(boxes)).numpy()


class DetectionRunner:
    """Runs detectors on batches; where memory runs out, on smaller parts of them from then on."""

    def __init__(self, table: ClassTable, precision: Precision):
        self.precision = precision
        # (N,): the row of each label in the class head
        self.class_rows = torch.tensor(table.rows, device=precision.device)
        self.images_at_once: int | None = None  # None: as many as are given

    def run(
        self, model: Detector, images: Tensor, placements: list[Placement], indices: list[int]
    ) -> Iterator[Detections]:
        """Detections in uint8 images (B, 3, R, R), in one part or in several, in their order.

        placements, indices: B each, as in Detections. Raises UserError where not even one image
        fits in memory.
        """
        model.eval()
        first = 0
        while first < len(images):
            part = slice(first, first + (self.images_at_once or len(images)))
            detect = partial(self._detect, model, images[part], placements[part], indices[part])
            detections = unless_out_of_memory(detect, self.precision.device)
            if detections is None:
                self._step_down(len(images[part]))
                continue
            yield detections
            first += len(detections.indices)

    @torch.inference_mode()
    def _detect(
        self, model: Detector, images: Tensor, placements: list[Placement], indices: list[int]
    ) -> Detections:
        with self.precision.autocast():
            outputs = model(to_model_input(images, self.precision.device))
        scores, labels, boxes, chosen = select_detections(
            outputs, self.class_rows, model.size.select
        )
        queries = outputs["queries"]  # (B, Q, C)
        chosen = chosen[..., None].expand(-1, -1, queries.shape[-1])  # (B, k, C)
        return Detections(
            indices=indices,
            placements=placements,
            scores=scores,
            labels=labels,
            boxes=boxes,
            queries=queries.gather(1, chosen).float(),
            features=outputs["features"].float(),
            images=images,
        )

    def _step_down(self, images: int) -> None:
        """Halve the number of images in a pass, after `images` did not fit."""
        if images == 1:
            raise UserError(
                "out of memory with a single image: use --device cpu, or a model of a smaller "
                "--resolution"
            )
        self.images_at_once = (images + 1) // 2
        warn(f"out of memory: detecting in {self.images_at_once} images at a time from now on")


@torch.inference_mode()
def draw_masks(
    head: AnyMaskHead, detections: Detections, chosen: list[np.ndarray], precision: Precision
) -> list[tuple[list[dict], np.ndarray]]:
    """Of each image i COCO RLEs, of the original's size, of the detections chosen[i] (n,), and
    their mask scores (n,): the class score times the mask's expected IoU.

    Memory does not grow with the number of detections: a head draws a few at a time.
    """
    head.eval()
    drawn = []
    for i, placement in enumerate(detections.placements):
        one = detections[i : i + 1].on(precision.device)  # one image's pixel maps are large enough
        with precision.autocast():
            images = to_model_input(one.images, precision.device)
            pixels = head.pixels(one.features, images)[0]
        masks = head.paste(pixels, one.queries[0, chosen[i]], one.boxes[0, chosen[i]], placement)
        height = placement.height
        width = placement.width
        rles = []
        ious = []
        for left, top, mask, iou in masks:
            rles.append(encode_window(left, top, mask, height, width))
            ious.append(iou)
        scores = one.scores[0].cpu().numpy()[chosen[i]]
        drawn.append((rles, scores * np.array(ious, dtype=scores.dtype)))
    return drawn


@dataclass
class Prediction:
    """The n detections in one image, best first.

    image (H, W, 3) uint8 RGB; boxes (n, 4) xyxy in its pixels; masks n COCO RLE dicts of its size,
    or None without a mask head; scores (n,) 0..1; labels (n,) in the checkpoint's class order;
    names n class names; mask_scores (n,) as draw_masks gives them, where there are masks.
    """

    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    masks: list[dict] | None
    mask_scores: np.ndarray | None = None

    def without_duplicates(self, iou: float = 0.7) -> Prediction:
        """Leave out each box that overlaps a better one of its class by an IoU of more than `iou`.

        For pictures: DETR's figures are computed without it.
        """
        boxes = torch.as_tensor(self.boxes).float()
        scores = torch.as_tensor(self.scores).float()
        chosen = batched_nms(boxes, scores, torch.as_tensor(self.labels), iou).numpy()
        masks = None
        if self.masks is not None:
            masks = [self.masks[i] for i in chosen]
        return Prediction(
            image=self.image,
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            names=[self.names[i] for i in chosen],
            masks=masks,
            mask_scores=None if masks is None else self.mask_scores[chosen],
        )

    def picture(self, class_names: list[str]) -> Image.Image:
        """The image with everything drawn in; `class_names`: all classes, for their colours."""
        colours = class_colours(class_names)
        return draw(self.image, self.boxes, self.names, self.scores.tolist(), self.masks, colours)


def make_predictions(
    detections: Detections,
    originals: list[np.ndarray],
    threshold: float,
    head: AnyMaskHead | None,
    class_names: list[str],
    precision: Precision,
) -> list[Prediction]:
    """The detections that score `threshold` or more, in pixels of the originals (H, W, 3) uint8.

    class_names: by label. There are masks where there is a `head`.
    """
    scores = detections.scores.cpu().numpy()
    labels = detections.labels.cpu().numpy()
    chosen = [np.flatnonzero(of_image >= threshold) for of_image in scores]
    drawn: list = [(None, None)] * len(originals)
    if head is not None:
        drawn = draw_masks(head, detections, chosen, precision)
    return [
        Prediction(
            image=original,
            boxes=detections.boxes_in_original(i)[chosen[i]],
            scores=scores[i, chosen[i]],
            labels=labels[i, chosen[i]],
            names=[class_names[label] for label in labels[i, chosen[i]]],
            masks=drawn[i][0],
            mask_scores=drawn[i][1],
        )
        for i, original in enumerate(originals)
    ]
