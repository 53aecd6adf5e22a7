"""What was detected in one image: to look at, to choose from, and to hand on in other formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_api
from torchvision.ops import batched_nms, nms

from rfdetr.arguments import require_share
from rfdetr.classes import ClassTable
from rfdetr.console import UserError
from rfdetr.data.large_images import ImageOnDisk
from rfdetr.inference.originals import Original
from rfdetr.inference.picture_files import JPEG_STEP, write_jpeg, write_png
from rfdetr.inference.tracking import Tracker
from rfdetr.inference.visualise import draw, draw_in_bands, picture_colours
from rfdetr.masks import to_polygons
from rfdetr.text import counted
from rfdetr.tool_settings import PredictionSettings

if TYPE_CHECKING:
    import supervision

# The IoU above which boxes of two classes are one object, where that within a class is lower. Real
# objects of two classes may lie in each other, a cell and its nucleus; they hardly coincide.
ACROSS_CLASSES = 0.85
NAMED_CLASSES = 5  # in a Prediction's repr


@dataclass(frozen=True, eq=False)
class DetectedObject:
    """One of a Prediction's: box (4,) xyxy in pixels, score 0..1, rle as COCO, None without.

    track: its id over the frames of a video or stack, None where it was not followed.
    """

    box: np.ndarray
    score: float
    label: int
    name: str
    rle: dict | None
    track: int | None = None

    @property
    def mask(self) -> np.ndarray | None:
        """(H, W) bool, made anew each time; None without a mask head."""
        return None if self.rle is None else mask_api.decode(self.rle).astype(bool)

    def __repr__(self) -> str:
        box = ", ".join(f"{value:.0f}" for value in self.box)
        return f"DetectedObject({self.name} {self.score:.2f}, box {box})"


@dataclass(repr=False, eq=False)
class Prediction:
    """The n detections in one image, best first.

    boxes (n, 4) xyxy in pixels of the image; scores (n,) 0..1; labels (n,) in the checkpoint's
    class order, which `table` has; rles: n masks as COCO RLE dicts of the image's size, or None
    without a mask head; mask_scores (n,): the score times the IoU that a mask expects of itself,
    where there are masks; tracks (n,): their ids over the frames of a video or stack, or None where
    they were not followed. An index gives one object; a slice, numbers or booleans a Prediction.
    """

    original: Original
    table: ClassTable
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    rles: list[dict] | None
    mask_scores: np.ndarray | None = None
    tracks: np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        """The class name of each object."""
        return [self.table.names[label] for label in self.labels]

    @property
    def class_names(self) -> list[str]:
        """All that the model knows, by label."""
        return list(self.table.names)

    @property
    def path(self) -> Path | None:
        """The image's file; None where it was none."""
        return self.original.path

    @property
    def page(self) -> int | None:
        """Its number in a file of several pages, from 1 on; None elsewhere."""
        return self.original.page

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB; a file is read again each time."""
        return self.original.read()

    @property
    def masks(self) -> np.ndarray | None:
        """(n, H, W) bool, made anew each time; None without a mask head."""
        if self.rles is None:
            return None
        masks = np.zeros((len(self), self.original.height, self.original.width), dtype=bool)
        for mask, rle in zip(masks, self.rles):
            mask[:] = mask_api.decode(rle)
        return masks

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[DetectedObject]:
        return (self[i] for i in range(len(self)))

    def __getitem__(
        self, chosen: int | slice | Sequence[int | bool] | np.ndarray
    ) -> DetectedObject | Prediction:
        if not isinstance(chosen, slice):
            chosen = _as_index(chosen)
        if isinstance(chosen, int):
            return DetectedObject(
                box=self.boxes[chosen],
                score=float(self.scores[chosen]),
                label=int(self.labels[chosen]),
                name=self.table.names[self.labels[chosen]],
                rle=None if self.rles is None else self.rles[chosen],
                track=None if self.tracks is None else int(self.tracks[chosen]),
            )
        indices = np.arange(len(self))[chosen]
        return replace(
            self,
            boxes=self.boxes[indices],
            scores=self.scores[indices],
            labels=self.labels[indices],
            rles=None if self.rles is None else [self.rles[i] for i in indices],
            mask_scores=None if self.mask_scores is None else self.mask_scores[indices],
            tracks=None if self.tracks is None else self.tracks[indices],
        )

    def __repr__(self) -> str:
        counts = Counter(self.names).most_common()
        named = ", ".join(f"{count} {name}" for name, count in counts[:NAMED_CLASSES])
        if len(counts) > NAMED_CLASSES:
            named += f", {len(counts) - NAMED_CLASSES} more classes"
        objects = counted(len(self), "object")
        parts = [f"{objects}: {named}" if named else objects]
        parts.append(f"{self.original.width}x{self.original.height}")
        if self.rles is not None:
            parts.append("masks")
        return f"Prediction({', '.join(parts)})"

    def without_duplicates(self, iou: float = PredictionSettings.nms) -> Prediction:
        """The same without the boxes that `without_overlaps` drops.

        Raises UserError for an iou that is not in 0..1.
        """
        require_share("iou", iou)
        return self[without_overlaps(self.boxes, self.scores, self.labels, iou)]

    def tracked(self, tracker: Tracker) -> Prediction:
        """The objects with a track, in the frame that follows the tracker's last one.

        Raises UserError for what is no Tracker.
        """
        if not isinstance(tracker, Tracker):
            raise UserError(
                "tracked() takes the tracker of one video, tracker = Tracker(threshold=0.5) of "
                f"rfdetr.inference.tracking, got {tracker!r}"
            )
        ids = tracker.update(self.boxes, self.scores, self.labels, self.rles)
        return replace(self, tracks=ids)[ids > 0]

    def polygons(self) -> list[list[np.ndarray]]:
        """For each object its outlines, one for each of its parts: (k, 2) x, y in pixels.

        Holes are filled, as COCO's polygons have none. Raises UserError without a mask head.
        """
        if self.rles is None:
            raise UserError(
                "this model has no mask head, so there are no polygons: .boxes has the boxes"
            )
        return [to_polygons(rle) for rle in self.rles]

    def to_coco(self, image_id: int | str) -> list[dict]:
        """The objects as COCO results: bbox xywh in pixels, segmentation as RLE where there is one.

        category_id: the ids of the dataset that the checkpoint was trained on.
        """
        results = []
        for i, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            result = {
                "image_id": image_id,
                "category_id": self.table.ids[self.labels[i]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(self.scores[i]),
            }
            if self.rles is not None:
                result["segmentation"] = self.rles[i]
            results.append(result)
        return results

    def to_supervision(self) -> supervision.Detections:
        """For the package supervision: class_id are labels, data["class_name"] the names.

        Raises UserError where it is not installed.
        """
        try:
            import supervision  # here: no requirement of this repository
        except ImportError as error:
            raise UserError(
                f"to_supervision() needs another package ({error}): pip install supervision"
            ) from error
        return supervision.Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels.astype(int),
            tracker_id=self.tracks,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def save_picture(self, file: str | Path, quality: int = 92) -> None:
        """Write the image with all objects drawn in, of its own size, as the file's name says.

        Large images are read, drawn and written (.png, .jpg) some rows at a time: memory does not
        grow with them.  quality: of a JPEG, Pillow's scale up to 95.  The folder is made where
        there is none.  Raises UserError for a name that says no kind of picture, and OSError.
        """
        file = Path(file)
        if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
            raise UserError(
                f"{file}: the end of its name is no kind of picture: call it "
                f"{file.with_suffix('.png')}"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        large = None
        if self.original.is_large and file.suffix.lower() in (".png", ".jpg", ".jpeg"):
            large = self.original.read_parts()
        if not isinstance(large, ImageOnDisk):
            self.picture().save(file, compress_level=1, quality=quality)
            return
        height, width = large.shape[:2]
        bands = draw_in_bands(
            large,
            self.boxes,
            self.names,
            self.scores.tolist(),
            self.rles,
            picture_colours(self.class_names),
            None if self.tracks is None else self.tracks.tolist(),
            step=JPEG_STEP,
        )
        if file.suffix.lower() == ".png":
            write_png(file, bands, height, width)
        else:
            write_jpeg(file, bands, height, width, quality)

    def picture(self, min_side: int = 1) -> Image.Image:
        """The image with all objects drawn in, of its own size.

        min_side: pixels; an image whose long side is shorter is enlarged first.
        """
        return draw(
            self.image,
            self.boxes,
            self.names,
            self.scores.tolist(),
            self.rles,
            picture_colours(self.class_names),
            min_side,
            None if self.tracks is None else self.tracks.tolist(),
        )


def _as_index(chosen: int | Sequence[int | bool] | np.ndarray) -> int | np.ndarray:
    """The index of one object, or numbers or booleans.  Raises TypeError for anything else."""
    array = np.asarray(chosen)
    if not array.size and array.dtype != bool:
        array = array.astype(int)  # an empty list makes an array of floats
    if array.dtype.kind in "iu":
        return array if array.ndim else int(array)
    if array.dtype == bool and array.ndim:
        return array
    raise TypeError(
        f"the index of a Prediction is a number, a slice, or a list of numbers or booleans, got "
        f"{chosen!r}. To choose by class, compare each: "
        "prediction[[name == 'cells' for name in prediction.names]]"
    )


def without_overlaps(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou: float
) -> np.ndarray:
    """The indices, best first, of the boxes that overlap no better one of their class by > `iou`.

    Nor one of any class by more than ACROSS_CLASSES, or `iou` where that is higher. boxes (n, 4)
    xyxy, scores (n,), labels (n,); iou 0: all of them. For people to look at: DETR's figures are
    computed without it, and the official package does none.
    """
    if not iou:
        return np.arange(len(boxes))
    boxes = torch.as_tensor(boxes).float()
    scores = torch.as_tensor(scores).float()
    kept = batched_nms(boxes, scores, torch.as_tensor(labels), iou)
    kept = kept[nms(boxes[kept], scores[kept], max(iou, ACROSS_CLASSES))]
    return kept.numpy()
