"""From images to detections, and from those to boxes and masks in the pixels of the originals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rfdetr.boxes import cxcywh_to_xyxy
from rfdetr.classes import ClassTable
from rfdetr.console import UserError, warn
from rfdetr.data.augment import to_model_input
from rfdetr.device import Precision, copied_by_next_wait, to_device, unless_out_of_memory
from rfdetr.inference.originals import Original
from rfdetr.inference.prediction import Prediction, without_overlaps
from rfdetr.masks import encode_window
from rfdetr.models.cpu_copy import CpuCopies
from rfdetr.models.detector import Detector, select_detections
from rfdetr.models.official_masks import OfficialMaskHead
from rfdetr.models.segmentation import MaskHead, PastedMask
from rfdetr.placement import Placement

PIXELS_AT_ONCE = 1 << 26  # of masks on their way from a GPU to the CPU
AnyMaskHead = MaskHead | OfficialMaskHead


@dataclass
class Detections:
    """The detections in a batch of B images, best first, and what a mask head draws them from.

    indices: B positions in the split; placements: where each of the B images lies in its original;
    on the CPU scores, labels (B, k) and boxes (B, k, 4) cxcywh 0..1 of the image; where they were
    computed queries (B, k, C) and features (B, C, h, w); images uint8 (B, 3, R, R).
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
        """The same with what masks are drawn from on `device`."""
        return Detections(
            indices=self.indices,
            placements=self.placements,
            scores=self.scores,
            labels=self.labels,
            boxes=self.boxes,
            queries=to_device(self.queries, device),
            features=to_device(self.features, device),
            images=to_device(self.images, device),
        )

    def boxes_in_original(self, i: int) -> np.ndarray:
        """Image i's boxes, (k, 4) xyxy in pixels of its original, clipped to what is visible.

        The same boxes are scored, saved and delivered; the official package clips its boxes, too.
        """
        placement = self.placements[i]
        boxes = cxcywh_to_xyxy(self.boxes[i].float())
        return placement.clip(placement.to_original(boxes)).numpy()

    def in_sight(self, i: int) -> np.ndarray:
        """Which of image i's detections (k,) have a part in the image: all but those that lie in
        the border of a letterbox.
        """
        if not self.placements[i].has_border:
            return np.ones(self.scores.shape[1], dtype=bool)
        boxes = self.boxes_in_original(i)
        return (boxes[:, 2:] > boxes[:, :2]).all(axis=1)


class DetectionRunner:
    """Runs detectors on batches; where memory runs out, on smaller parts of them from then on."""

    def __init__(self, table: ClassTable, precision: Precision, max_detections: int | None = None):
        """max_detections: of an image; None: as many as the model keeps."""
        self.precision = precision
        self.max_detections = max_detections
        # (N,): the row of each label in the class head
        self.class_rows = torch.tensor(table.rows, device=precision.device)
        self.images_at_once: int | None = None  # None: as many as are given
        self.copies: CpuCopies | None = None
        if precision.device.type == "cpu":
            self.copies = CpuCopies(precision.dtype)

    def run(
        self, model: Detector, images: Tensor, placements: list[Placement], indices: list[int]
    ) -> Iterator[Detections]:
        """Detections in uint8 images (B, 3, R, R), in one part or in several, in their order.

        placements, indices: B each, as in Detections. Raises UserError where not even one image
        fits in memory.
        """
        if model.training:
            self.forget_weights()
        model.eval()
        if self.copies is not None:
            model = self.copies.of(model)
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

    def forget_weights(self) -> None:
        """Keep nothing that was made of weights: they may have been trained since."""
        if self.copies is not None:
            self.copies.forget()

    @torch.inference_mode()
    def _detect(
        self, model: Detector, images: Tensor, placements: list[Placement], indices: list[int]
    ) -> Detections:
        with self.precision.autocast():
            outputs = model(to_model_input(images, self.precision.device))
        scores, labels, boxes, chosen = select_detections(
            outputs, self.class_rows, self.max_detections or model.size.select
        )
        queries = outputs["queries"]  # (B, Q, C)
        chosen = chosen[..., None].expand(-1, -1, queries.shape[-1])  # (B, k, C)
        labels = copied_by_next_wait(labels)
        boxes = copied_by_next_wait(boxes)
        scores = scores.cpu()  # the one CPU-GPU sync point
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


def draw_masks(
    head: AnyMaskHead, detections: Detections, chosen: list[np.ndarray], precision: Precision
) -> list[tuple[list[dict], np.ndarray]]:
    """Of each image i COCO RLEs, of the original's size, of the detections chosen[i] (n,), and
    their mask scores (n,): the class score times the mask's expected IoU.

    Memory does not grow with the number of detections: a head draws a few at a time.
    """
    drawn = []
    for i, placement in enumerate(detections.placements):
        rles = []
        ious = []
        for left, top, mask, iou in paste_masks(head, detections, i, chosen[i], precision):
            rles.append(encode_window(left, top, mask, placement.height, placement.width))
            ious.append(iou)
        scores = detections.scores[i].numpy()[chosen[i]]
        drawn.append((rles, scores * np.array(ious, dtype=scores.dtype)))
    return drawn


@torch.inference_mode()
def paste_masks(
    head: AnyMaskHead, detections: Detections, i: int, chosen: np.ndarray, precision: Precision
) -> Iterator[PastedMask]:
    """The masks of image i's detections chosen (n,), on the CPU, a few at a time."""
    head.eval()
    one = detections[i : i + 1].on(precision.device)  # one image's pixel maps are large enough
    with precision.autocast():
        images = to_model_input(one.images, precision.device)
        pixels = head.pixels(one.features, images)[0]
    indices = torch.from_numpy(chosen)
    queries = one.queries[0, to_device(indices, precision.device)]
    masks = head.paste(pixels, queries, one.boxes[0, indices], detections.placements[i])
    yield from on_cpu(masks)


def on_cpu(masks: Iterable[PastedMask]) -> Iterator[PastedMask]:
    """The same masks on the CPU, which waits for a GPU once in so many pixels, not for each."""
    waiting: list[PastedMask] = []
    pixels = 0
    for one in masks:
        if one.mask.device.type == "cpu":
            yield one
            continue
        waiting.append(one)
        pixels += one.mask.numel()
        if pixels > PIXELS_AT_ONCE:
            yield from _brought_together(waiting)
            waiting = []
            pixels = 0
    if waiting:
        yield from _brought_together(waiting)


def _brought_together(masks: list[PastedMask]) -> Iterator[PastedMask]:
    """On the CPU, by one copy of the bytes of all of them."""
    ious = torch.stack([one.iou for one in masks]).float().view(torch.uint8)
    flat = [one.mask.flatten().view(torch.uint8) for one in masks]
    own_ious, *parts = torch.cat([ious, *flat]).cpu().split([len(ious), *map(len, flat)])
    own_ious = own_ious.clone().view(torch.float32)
    for one, part, iou in zip(masks, parts, own_ious):
        yield PastedMask(one.left, one.top, part.view(torch.bool).view(one.mask.shape), iou)


def sure_detections(detections: Detections, threshold: float, nms: float) -> list[np.ndarray]:
    """Of each image, best first, which score `threshold` or more; nms: as in without_overlaps."""
    chosen = []
    for i in range(len(detections.indices)):
        scores = detections.scores[i].numpy()
        labels = detections.labels[i].numpy()
        sure = np.flatnonzero((scores >= threshold) & detections.in_sight(i))
        boxes = detections.boxes_in_original(i)[sure]
        chosen.append(sure[without_overlaps(boxes, scores[sure], labels[sure], nms)])
    return chosen


def make_predictions(
    detections: Detections,
    originals: list[Original],
    threshold: float,
    head: AnyMaskHead | None,
    table: ClassTable,
    precision: Precision,
    nms: float = 0.0,
    max_detections: int | None = None,
) -> list[Prediction]:
    """The detections that score `threshold` or more, in pixels of the B originals.

    There are masks where there is a `head`. nms: as in `without_overlaps`, 0 for none.
    max_detections: of an image, the best ones; None: all.
    """
    scores = detections.scores.numpy()
    labels = detections.labels.numpy()
    boxes = [detections.boxes_in_original(i) for i in range(len(originals))]
    chosen = [of_image[:max_detections] for of_image in sure_detections(detections, threshold, nms)]
    drawn: list = [(None, None)] * len(originals)
    if head is not None:
        drawn = draw_masks(head, detections, chosen, precision)
    return [
        Prediction(
            original=original,
            table=table,
            boxes=boxes[i][chosen[i]],
            scores=scores[i, chosen[i]],
            labels=labels[i, chosen[i]],
            rles=drawn[i][0],
            mask_scores=drawn[i][1],
        )
        for i, original in enumerate(originals)
    ]


def tell_few_queries(max_detections: int | None, queries: int) -> None:
    """Warn where more detections of an image are asked for than a model has boxes for one."""
    if max_detections is not None and max_detections > queries:
        warn(
            f"--max_detections {max_detections}: the model has {queries} queries, which is how "
            "many objects it finds in an image at most. With --tile it is as many in each tile; "
            "else train with more --num_queries"
        )


def require_finite(detections: Detections, precision: Precision) -> None:
    """Raise UserError where a score or a box is NaN or infinite."""
    if detections.scores.isfinite().all() and detections.boxes.isfinite().all():
        return
    advice = "The checkpoint is damaged: use another"
    if precision.dtype is not None:
        advice = "Run again with --amp off"
    raise UserError(f"the model's scores or boxes are NaN or infinite. {advice}")
