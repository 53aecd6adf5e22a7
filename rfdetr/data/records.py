"""What is known of a dataset's images once they are checked: a split and its records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from rfdetr.data.columns import PROOF_OF, Columns
from rfdetr.data.faults import Problem
from rfdetr.data.flat import NO_MASK
from rfdetr.data.gray import GrayScale
from rfdetr.renaming import NO_RENAMES, Renames
from rfdetr.tiling import Window


@dataclass
class ImageRecord:
    """One image with its n objects; crowd regions are no objects.

    Sizes and boxes are in pixels of the image as its annotations mean it, which is the stored one
    turned by its EXIF orientation where `apply_exif` is True.
    """

    id: int | str  # the dataset's own
    file_name: str  # as the annotations have it
    path: Path
    width: int
    height: int
    boxes: np.ndarray  # (n, 4) float32 xyxy, clipped to the image
    labels: np.ndarray  # (n,) int64, 0..N-1
    segmentations: list[list | dict | None]  # polygons or RLE; None where missing or unusable
    orientation: int  # the EXIF tag, 1..8
    exif_proof: bool | None  # whether that counts, where the annotated size proves it
    apply_exif: bool  # whether load_image turns or mirrors the stored pixels
    file_sha256: bytes  # of the whole file where the check decoded it, else empty
    content_hash: int | None  # image_files.content_hash; None where the file cannot be read
    window: Window | None = None  # of a tile: the part of the image that is seen


class ImageTable(Sequence):
    """Images of a split; the record of each is made when it is asked for.

    Processes that get a copy map the same file where the columns lie in one.
    """

    def __init__(self, columns: Columns, labels: dict[int, int], rows: np.ndarray | None = None):
        """labels: category id -> label.  rows: which images of the columns; by default all."""
        self.columns = columns
        self.label_of = labels
        self.rows = np.arange(len(columns.sizes)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, index: slice | np.ndarray) -> ImageTable: ...

    def __getitem__(self, index):
        if isinstance(index, (slice, np.ndarray)):
            return ImageTable(self.columns, self.label_of, self.rows[index])
        row = int(self.rows[index])
        columns = self.columns
        learnt = self._annotations_of(row, learnt=True)
        width, height = columns.sizes[row].tolist()
        sha256 = columns.sha256[row].tobytes()
        return ImageRecord(
            id=json.loads(columns.text("id", row)),
            file_name=columns.text("name", row),
            path=Path(columns.text("path", row)),
            width=width,
            height=height,
            boxes=np.array(columns.clipped[learnt]),
            labels=self._labels_of(learnt),
            segmentations=[columns.mask(i, height, width) for i in learnt.tolist()],
            orientation=int(columns.orientations[row]),
            exif_proof=PROOF_OF[int(columns.exif_proofs[row])],
            apply_exif=bool(columns.apply_exif[row]),
            file_sha256=sha256 if any(sha256) else b"",
            content_hash=int(columns.content_hashes[row]) if columns.has_hash[row] else None,
        )

    def _annotations_of(self, row: int, learnt: bool) -> np.ndarray:
        """The annotations of an image of the columns, or those of them that are objects."""
        begin, end = self.columns.first[row : row + 2].tolist()
        indices = np.arange(begin, end)
        return indices[self.columns.is_learnt[begin:end]] if learnt else indices

    def _labels_of(self, annotations: np.ndarray) -> np.ndarray:
        categories = self.columns.categories[annotations].tolist()
        return np.array([self.label_of[category] for category in categories], np.int64)

    def file_name(self, index: int) -> str:
        return self.columns.text("name", int(self.rows[index]))

    def path(self, index: int) -> Path:
        return Path(self.columns.text("path", int(self.rows[index])))

    def annotations(self, index: int) -> list[dict]:
        """COCO entries of an image: all that are sound, those that training drops, too."""
        row = int(self.rows[index])
        image_id = json.loads(self.columns.text("id", row))
        width, height = self.columns.sizes[row].tolist()
        return [
            self.columns.entry(annotation, image_id, height, width)
            for annotation in self._annotations_of(row, learnt=False).tolist()
        ]

    # ---- of all images at once

    @property
    def sizes(self) -> np.ndarray:
        """(images, 2) int64: width, height."""
        return self.columns.sizes[self.rows]

    @property
    def is_decoded(self) -> bool:
        """Whether any file was read as a whole, so that its sha256 is known."""
        return bool(self.columns.sha256[self.rows].any())

    @property
    def content_hashes(self) -> list[int]:
        """Of those that can be read."""
        rows = self.rows[self.columns.has_hash[self.rows]]
        return self.columns.content_hashes[rows].tolist()

    @property
    def exif_proofs(self) -> list[bool | None]:
        """Of the images that have an orientation."""
        rows = self.rows[self.columns.orientations[self.rows] > 1]
        return [PROOF_OF[number] for number in self.columns.exif_proofs[rows].tolist()]

    @property
    def object_counts(self) -> np.ndarray:
        """(images,)"""
        learnt_before = np.concatenate([[0], np.cumsum(self.columns.is_learnt)])
        begins = learnt_before[self.columns.first[self.rows]]
        return learnt_before[self.columns.first[self.rows + 1]] - begins

    @property
    def crowd_count(self) -> int:
        """How many annotations are crowd regions, which are no objects."""
        crowds_before = np.concatenate([[0], np.cumsum(self.columns.is_crowd)])
        begins = crowds_before[self.columns.first[self.rows]]
        return int((crowds_before[self.columns.first[self.rows + 1]] - begins).sum())

    @property
    def labels(self) -> np.ndarray:
        """(objects,)"""
        ids, inverse = np.unique(self.columns.categories[self._objects], return_inverse=True)
        return np.array([self.label_of[category] for category in ids.tolist()], int)[inverse]

    @property
    def has_mask(self) -> np.ndarray:
        """(objects,) bool"""
        return self.columns.mask_kinds[self._objects] != NO_MASK

    @property
    def boxes(self) -> np.ndarray:
        """(objects, 4) float32 xyxy"""
        return self.columns.clipped[self._objects]

    @property
    def areas(self) -> np.ndarray:
        """(objects,) float64: in pixels, as the annotations have them."""
        return self.columns.areas[self._objects]

    @property
    def annotation_ids(self) -> np.ndarray:
        """(objects,) int64"""
        return self.columns.ids[self._objects]

    @property
    def _objects(self) -> np.ndarray:
        """(objects,) rows of the columns, image by image."""
        begins = self.columns.first[self.rows]
        counts = self.columns.first[self.rows + 1] - begins
        before = np.cumsum(counts) - counts
        annotations = np.arange(counts.sum()) + np.repeat(begins - before, counts)
        return annotations[self.columns.is_learnt[annotations]]


class FromRecords:
    """What an ImageTable tells of all images at once, of a sequence of records."""

    @property
    def sizes(self) -> np.ndarray:
        return np.array([(image.width, image.height) for image in self], int).reshape(-1, 2)

    @property
    def object_counts(self) -> np.ndarray:
        return np.array([len(image.labels) for image in self], int)

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, int), *(image.labels for image in self)])

    @property
    def boxes(self) -> np.ndarray:
        return np.concatenate([np.zeros((0, 4), np.float32), *(image.boxes for image in self)])

    @property
    def has_mask(self) -> np.ndarray:
        masks = [mask for image in self for mask in image.segmentations]
        return np.array([mask is not None for mask in masks], bool)


class ImageList(FromRecords, list):
    """Records that were chosen or changed one by one, as an ImageTable to look at."""

    def path(self, index: int) -> Path:
        return self[index].path

    def file_name(self, index: int) -> str:
        return self[index].file_name

    @property
    def content_hashes(self) -> list[int]:
        hashes = [image.content_hash for image in self]
        return [value for value in hashes if value is not None]


@dataclass
class CocoSplit:
    """One split of a dataset, its images in the order of the annotation file."""

    annotation_file: Path
    images: ImageTable | ImageList
    class_names: list[str]  # by label, the same in all splits of a dataset
    category_ids: list[int]  # by label, this file's own; an unused number where it lacks a class
    # class that this file lists -> its annotations, usable or not, crowd regions aside
    annotated: dict[str, int]
    left_out: list[str]  # names of placeholder categories
    exif: str  # "apply" or "ignore" the orientation of images whose size does not tell
    problems: list[Problem]  # errors first
    gray: GrayScale | None = None  # how gray of more than 8 bits is read; None: by its bits
    unlisted: frozenset[int] = frozenset()  # category ids of annotations that the file lacks
    renames: Renames = NO_RENAMES  # that were asked for, of all splits

    def __post_init__(self):
        if isinstance(self.images, list):
            self.images = ImageList(self.images)

    @property
    def file_names(self) -> list[str]:
        return [self.images.file_name(index) for index in range(len(self.images))]

    @property
    def objects_per_image(self) -> list[int]:
        return self.images.object_counts.tolist()

    @property
    def objects_per_class(self) -> list[int]:
        """By label."""
        return np.bincount(self.images.labels, minlength=len(self.class_names)).tolist()

    @property
    def places(self) -> np.ndarray:
        """(objects,) the index of each object's image."""
        return np.repeat(np.arange(len(self.images)), self.images.object_counts)

    def places_of_class(self, label: int) -> np.ndarray:
        """The indices of the images with an object of this label."""
        return np.unique(self.places[self.images.labels == label])

    @property
    def object_count(self) -> int:
        return len(self.images.has_mask)

    @property
    def mask_count(self) -> int:
        """How many objects have a usable mask."""
        return int(self.images.has_mask.sum())

    @property
    def content_hashes(self) -> list[int]:
        """image_files.content_hash of the images that can be read."""
        return self.images.content_hashes

    @property
    def warnings(self) -> list[str]:
        """What to say before training. Missing masks are not in it: require_masks tells of them."""
        return [problem.message for problem in self.problems if problem.code != "ANN_NO_MASK"]

    @property
    def ground_truth(self) -> dict:
        """COCO dict for the evaluator: pycocotools gives the same figures on it and on the file."""
        fields = ("id", "file_name", "width", "height")
        numbers = range(len(self.images))
        return {
            "images": [{name: getattr(image, name) for name in fields} for image in self.images],
            "annotations": [
                entry for number in numbers for entry in self.images.annotations(number)
            ],
            "categories": [
                {"id": category_id, "name": name}
                for category_id, name in zip(self.category_ids, self.class_names)
            ],
        }
