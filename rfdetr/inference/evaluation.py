"""From a split to scores and pictures: detections, masks for the kept ones, COCO evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from rfdetr import distributed
from rfdetr.classes import ClassTable
from rfdetr.data.images import load_image
from rfdetr.data.loaders import note_unread
from rfdetr.data.records import CocoSplit
from rfdetr.data.workers import naming_workers
from rfdetr.device import Precision
from rfdetr.inference.detections import (
    AnyMaskHead,
    DetectionRunner,
    Detections,
    draw_masks,
    in_originals,
)
from rfdetr.inference.visualise import class_colours, draw, side_by_side
from rfdetr.masks import to_rle
from rfdetr.metrics.coco_eval import CocoEvaluator, counting
from rfdetr.models.detector import Detector

DRAW_THRESHOLD = 0.5


class SplitEvaluator:
    """Scores a model on a split and draws what it finds.

    With `frozen`, the trained module is a mask head on that detector, whose detections are computed once where `keep`.
    """

    def __init__(
        self,
        loader: DataLoader,
        table: ClassTable,
        precision: Precision,
        masks: bool,
        frozen: Detector | None = None,
    ):
        self.loader, self.finder, self.precision = (
            loader,
            DetectionRunner(table, precision),
            precision,
        )
        self.masks, self.frozen = masks, frozen
        self.split: CocoSplit = loader.dataset.split
        self.keep, self.kept = frozen is not None, None
        self.unread: list[
            int
        ] = []  # numbers of images that cannot be read: nothing is found in them

    def detections(self, model: nn.Module) -> Iterable[Detections]:
        if self.kept is not None:
            return self.kept
        found = self._detect(self.frozen or model)
        if self.keep:
            found = self.kept = [
                part.on(torch.device("cpu")) for part in found
            ]  # main memory is the larger one
        return found

    def _detect(self, model: Detector) -> Iterator[Detections]:
        for batch in tqdm(
            self.loader, desc="detecting", disable=not distributed.is_main(), leave=False
        ):
            note_unread(batch.unread, self.unread)
            yield from self.finder(model, batch.images, batch.indices)

    def head(self, model: nn.Module) -> AnyMaskHead | None:
        return model if self.frozen is not None else model.head if self.masks else None

    def evaluator(self, model: nn.Module) -> CocoEvaluator:
        """All ranks' detections of the split, ready to be summed up or saved.

        With a mask head, with masks: then what no figure can depend on is left out (`counting`).
        """
        head, found = self.head(model), []
        with naming_workers(self.loader.dataset):
            for batch in self.detections(model):
                found += self._records(batch, head)
        evaluator = CocoEvaluator(self.split.ground_truth, masks=head is not None)
        for part in distributed.gather_objects(found):
            for one in part:
                evaluator.add(*one)
        return evaluator

    def _records(self, batch: Detections, head: AnyMaskHead | None) -> list[tuple]:
        """What CocoEvaluator.add takes of each image of a batch."""
        records = [self.split.images[i] for i in batch.index]
        sizes = [(record.height, record.width) for record in records]
        scores = batch.scores.cpu().numpy()
        labels = np.asarray(self.split.category_ids)[batch.labels.cpu().numpy()]
        boxes = [batch.pixel_boxes(i, *size) for i, size in enumerate(sizes)]
        if head is None:
            return [(record.id, *one) for record, *one in zip(records, boxes, scores, labels)]
        chosen = [np.flatnonzero(counting(*one)) for one in zip(boxes, scores, labels)]
        rles = draw_masks(head, batch, sizes, chosen, self.precision)
        return [
            (record.id, boxes[i][own], scores[i][own], labels[i][own], rles[i])
            for i, (record, own) in enumerate(zip(records, chosen))
        ]

    def __call__(self, model: nn.Module) -> dict:
        """The summary of metrics.json's "valid", on every rank."""
        evaluator = self.evaluator(model)
        return distributed.from_main(evaluator.summary() if distributed.is_main() else None)

    def pictures(self, model: nn.Module, count: int) -> Iterator[tuple[str, Image.Image]]:
        """(name, ground truth beside prediction) of the first `count` images."""
        for found in self.detections(model):
            for i in range(min(count, len(found.index))):
                yield (
                    self.split.images[found.index[i]].path.stem,
                    self.picture(found[i : i + 1], self.head(model)),
                )
            count -= len(found.index)
            if count <= 0:
                return

    def picture(self, found: Detections, head: AnyMaskHead | None) -> Image.Image:
        """Ground truth at the left, what was found in this one image at the right."""
        record, names = self.split.images[found.index[0]], self.split.class_names
        image, masks = load_image(record), None
        (one,) = in_originals(found, [image], DRAW_THRESHOLD, head, names, self.precision)
        if head is not None:
            masks = [s and to_rle(s, record.height, record.width) for s in record.segmentations]
        labelled = [names[label] for label in record.labels]
        truth = draw(image, record.boxes, labelled, None, masks, class_colours(names))
        return side_by_side(
            truth, one.without_duplicates().picture(names), ("ground truth", "prediction")
        )
