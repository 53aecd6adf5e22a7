"""From a split to scores and pictures: detections, masks where they count, COCO evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from rfdetr import distributed
from rfdetr.classes import ClassTable
from rfdetr.data.gray import window_of
from rfdetr.data.images import load_image
from rfdetr.data.large_images import ImageOnDisk, Pixels, load_for_tiles
from rfdetr.data.loaders import note_unread
from rfdetr.data.records import CocoSplit, ImageRecord
from rfdetr.data.workers import naming_workers
from rfdetr.device import Precision
from rfdetr.inference.detections import (
    AnyMaskHead,
    DetectionRunner,
    Detections,
    draw_masks,
    make_predictions,
    sure_detections,
)
from rfdetr.inference.originals import Original
from rfdetr.inference.prediction import Prediction
from rfdetr.inference.tiles import COMPARABLE, DetectedInWindow, in_windows, merge
from rfdetr.inference.visualise import MIN_SIDE, draw, draw_shrunk, picture_colours, side_by_side
from rfdetr.masks import to_rle
from rfdetr.metrics.coco_eval import CocoEvaluator, counting
from rfdetr.models.detector import Detector
from rfdetr.progress import ProgressBar
from rfdetr.tool_settings import PredictionSettings

DRAW_THRESHOLD = 0.5  # the lowest score that is drawn in pictures


@dataclass
class ImageDetections:
    """The detections in one image as CocoEvaluator.add takes them."""

    image_id: int | str
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    rles: list[dict] | None
    mask_scores: np.ndarray | None


class SplitEvaluator:
    """Scores a model on a split and draws its detections.

    With a `frozen` detector, the model is a mask head alone. That detector's detections are then
    computed once, and kept in main memory as long as `keep_detections` is True.
    """

    def __init__(
        self,
        loader: DataLoader,
        table: ClassTable,
        precision: Precision,
        masks: bool,
        frozen: Detector | None = None,
        max_detections: int | None = None,
    ):
        """masks: score a whole model's masks as well as its boxes.  max_detections: of an image;
        None: as many as the model keeps.
        """
        self.loader = loader
        self.split: CocoSplit = loader.dataset.split
        # with the images themselves, where those of `split` are tiles
        self.whole_split: CocoSplit = loader.dataset.whole_split
        self.table = table
        self.runner = DetectionRunner(table, precision, max_detections)
        self.precision = precision
        self.masks = masks
        self.max_detections = max_detections
        self.frozen = frozen
        self.keep_detections = frozen is not None
        self.unread: list[int] = []  # numbers of images that cannot be read: no detections there
        self._kept_detections: list[Detections] | None = None

    def evaluate(self, model: nn.Module) -> dict:
        """The figures of metrics.json's "valid" (CocoEvaluator.summary), on every rank."""
        evaluator = self.collect(model)
        return distributed.from_main(evaluator.summary() if distributed.is_main() else None)

    def collect(self, model: nn.Module) -> CocoEvaluator:
        """The detections of all ranks in the split, ready to be scored or saved.

        With masks where there is a mask head; detections that no figure depends on (`counting`)
        are then left out, as drawing them takes time.
        """
        head = self._head(model)
        evaluator = CocoEvaluator(
            self.whole_split.ground_truth,
            masks=head is not None,
            max_detections=self.max_detections,
        )
        images = []
        with naming_workers(self.loader.dataset.images_in_work):
            if self.loader.dataset.tiling:
                choose = partial(self._counting, evaluator.most_counted)
                for number, tiles in self._tiles_by_image(model, head, choose):
                    images.append(self._merged(number, tiles))
            else:
                for detections in self.detections(model):
                    images += self._in_originals(detections, head, evaluator.most_counted)
        for of_rank in distributed.gather_objects(images):
            for image in of_rank:
                evaluator.add(
                    image.image_id,
                    image.boxes,
                    image.scores,
                    image.labels,
                    image.rles,
                    image.mask_scores,
                )
        return evaluator

    def pictures(self, model: nn.Module, count: int) -> Iterator[tuple[str, Image.Image]]:
        """The names and pictures of the first `count` images: ground truth beside prediction."""
        head = self._head(model)
        if self.loader.dataset.tiling:
            yield from self._pictures_of_tiles(model, head, count)
            return
        for detections in self.detections(model):
            for i, index in enumerate(detections.indices[:count]):
                yield self.split.images[index].path.stem, self._picture(detections[i : i + 1], head)
            count -= len(detections.indices)
            if count <= 0:
                return

    def detections(self, model: nn.Module) -> Iterable[Detections]:
        """This rank's part of the split, batch by batch."""
        if self._kept_detections is not None:
            return self._kept_detections
        detections = self._detect(self.frozen or model)
        if not self.keep_detections:
            return detections
        # in main memory, which is larger than a GPU's
        self._kept_detections = [batch.on(torch.device("cpu")) for batch in detections]
        return self._kept_detections

    def _detect(self, model: Detector) -> Iterator[Detections]:
        self.runner.forget_weights()
        if self.max_detections and self.loader.dataset.tiling:  # of an image, not of a tile
            self.runner.max_detections = max(self.max_detections, model.size.select)
        for batch in ProgressBar(self.loader, "detecting", "batches"):
            note_unread(batch.unread, self.unread)
            records = [self.split.images[index] for index in batch.indices]
            dataset = self.loader.dataset
            placements = [dataset.placement(record, dataset.letterbox) for record in records]
            yield from self.runner.run(model, batch.images, placements, batch.indices)

    def _head(self, model: nn.Module) -> AnyMaskHead | None:
        if self.frozen is not None:
            return model
        return model.head if self.masks else None

    def _in_originals(
        self, detections: Detections, head: AnyMaskHead | None, most_counted: int
    ) -> list[ImageDetections]:
        """A batch's detections by image, with masks where there is a head.

        most_counted: of a class and image, by any figure.
        """
        scores = detections.scores.numpy()
        labels = np.asarray(self.split.category_ids)[detections.labels.numpy()]
        images = range(len(detections.indices))
        masks: list = [(None, None) for _ in images]
        if head is None:
            chosen = [detections.in_sight(i) for i in images]
        else:
            chosen = self._counting(most_counted, detections)
            masks = draw_masks(head, detections, chosen, self.precision)
        return [
            ImageDetections(
                image_id=self.split.images[detections.indices[i]].id,
                boxes=detections.boxes_in_original(i)[chosen[i]],
                scores=scores[i][chosen[i]],
                labels=labels[i][chosen[i]],
                rles=masks[i][0],
                mask_scores=masks[i][1],
            )
            for i in images
        ]

    def _counting(self, most_counted: int, detections: Detections) -> list[np.ndarray]:
        """Of each image the detections that a figure can depend on.

        most_counted: of a class and image, by any figure.
        """
        scores = detections.scores.numpy()
        labels = detections.labels.numpy()
        chosen = []
        for i in range(len(detections.indices)):
            seen = np.flatnonzero(detections.in_sight(i))
            boxes = detections.boxes_in_original(i)[seen]
            chosen.append(seen[counting(boxes, scores[i][seen], labels[i][seen], most_counted)])
        return chosen

    def _tiles_by_image(
        self,
        model: nn.Module,
        head: AnyMaskHead | None,
        choose: Callable[[Detections], list[np.ndarray]],
    ) -> Iterator[tuple[int, list[DetectedInWindow]]]:
        """What is seen in the tiles of one image after the other, with its number in the split.

        choose: which detections.
        """
        tiles = self._tiles(model, head, choose)
        for number, of_image in itertools.groupby(tiles, key=itemgetter(0)):
            yield number, [tile for _, tile in of_image]

    def _tiles(
        self,
        model: nn.Module,
        head: AnyMaskHead | None,
        choose: Callable[[Detections], list[np.ndarray]],
    ) -> Iterator[tuple[int, DetectedInWindow]]:
        for detections in self.detections(model):
            places = [self.split.images.places[index] for index in detections.indices]
            windows = [window for _, window in places]
            seen = in_windows(detections, windows, choose(detections), head, self.precision)
            for (number, _), tile in zip(places, seen):
                yield number, tile

    def _merged(self, number: int, tiles: list[DetectedInWindow]) -> ImageDetections:
        record = self.whole_split.images[number]
        merged = merge(tiles, record.height, record.width)
        best = slice(self.max_detections)
        rles = merged.rles()
        return ImageDetections(
            image_id=record.id,
            boxes=merged.boxes[best],
            scores=merged.scores[best],
            labels=np.asarray(self.split.category_ids)[merged.labels[best]],
            rles=None if rles is None else rles[best],
            mask_scores=None if rles is None else merged.mask_scores[best],
        )

    def _pictures_of_tiles(
        self, model: nn.Module, head: AnyMaskHead | None, count: int
    ) -> Iterator[tuple[str, Image.Image]]:
        """As `pictures`, of whole images."""
        nms = PredictionSettings.nms

        def choose(detections: Detections) -> list[np.ndarray]:
            return sure_detections(detections, DRAW_THRESHOLD * COMPARABLE, nms)

        by_image = self._tiles_by_image(model, head, choose)
        for number, tiles in itertools.islice(by_image, count):
            record = self.whole_split.images[number]
            image = load_for_tiles(record, window_of(self.split.gray))
            original = Original(record.height, record.width, pixels=image)
            merged = merge(tiles, record.height, record.width, DRAW_THRESHOLD)
            prediction = merged.as_prediction(original, self.table).without_duplicates(nms)
            yield record.path.stem, self._beside_truth(record, image, prediction, head)

    def _picture(self, detections: Detections, head: AnyMaskHead | None) -> Image.Image:
        """Ground truth at the left, the detections in this one image at the right."""
        record = self.split.images[detections.indices[0]]
        image = load_image(record, window_of(self.split.gray))
        original = Original(record.height, record.width, pixels=image)
        (prediction,) = make_predictions(
            detections,
            [original],
            DRAW_THRESHOLD,
            head,
            self.table,
            self.precision,
            nms=PredictionSettings.nms,
        )
        return self._beside_truth(record, image, prediction, head)

    def _beside_truth(
        self, record: ImageRecord, image: Pixels, prediction: Prediction, head: AnyMaskHead | None
    ) -> Image.Image:
        """Large images are shrunk."""
        true_masks = None
        if head is not None:
            true_masks = [
                shape and to_rle(shape, record.height, record.width)
                for shape in record.segmentations
            ]
        true_names = [self.split.class_names[label] for label in record.labels]
        colours = picture_colours(self.split.class_names)
        if isinstance(image, ImageOnDisk):
            truth = draw_shrunk(image, record.boxes, true_names, None, true_masks, colours)
            found = prediction.scores.tolist()
            picture = draw_shrunk(
                image, prediction.boxes, prediction.names, found, prediction.rles, colours
            )
        else:
            truth = draw(image, record.boxes, true_names, None, true_masks, colours, MIN_SIDE)
            picture = prediction.picture(MIN_SIDE)
        return side_by_side(truth, picture, ("ground truth", "prediction"))
