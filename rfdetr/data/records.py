"""A split of a dataset as it is trained on and scored.

Both records are complete when they are built: nothing fills them in later. To change one, take
`dataclasses.replace`; all counts are derived from the images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfdetr.data.faults import Problem
from rfdetr.data.gray import GrayScale


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
    # Every sound entry, those that training drops too: pycocotools gives the same figures on them
    # as on the file itself.
    annotations: list[dict]
    objects: list[dict]  # the n entries of them that are learnt, in the order of the next three
    boxes: np.ndarray  # (n, 4) float32 xyxy, clipped to the image
    labels: np.ndarray  # (n,) int64, 0..N-1
    segmentations: list[list | dict | None]  # polygons or RLE; None where missing or unusable
    orientation: int  # the EXIF tag, 1..8
    exif_proof: bool | None  # whether that counts, where the annotated size proves it
    apply_exif: bool  # whether load_image turns or mirrors the stored pixels
    file_sha256: bytes  # of the whole file where the check decoded it, else empty
    content_hash: int | None  # image_files.content_hash; None where the file cannot be read


@dataclass
class CocoSplit:
    """One split of a dataset, its images in the order of the annotation file."""

    annotation_file: Path
    images: list[ImageRecord]
    class_names: list[str]  # by label, the same in all splits of a dataset
    category_ids: list[int]  # by label, this file's own; an unused number where it lacks a class
    left_out: list[str]  # names of placeholder categories
    exif: str  # "apply" or "ignore" the orientation of images whose size does not tell
    problems: list[Problem]  # errors first
    gray: GrayScale | None = None  # how gray of more than 8 bits is read; None: by its bits

    @property
    def objects_per_image(self) -> list[int]:
        return [len(image.labels) for image in self.images]

    @property
    def objects_per_class(self) -> list[int]:
        """By label."""
        labels = np.concatenate([np.zeros(0, int), *(image.labels for image in self.images)])
        return np.bincount(labels, minlength=len(self.class_names)).tolist()

    @property
    def object_count(self) -> int:
        return sum(self.objects_per_image)

    @property
    def mask_count(self) -> int:
        """How many objects have a usable mask."""
        return sum(mask is not None for image in self.images for mask in image.segmentations)

    @property
    def content_hashes(self) -> list[int]:
        """image_files.content_hash of the images that can be read."""
        hashes = [image.content_hash for image in self.images]
        return [value for value in hashes if value is not None]

    @property
    def warnings(self) -> list[str]:
        """What to say before training. Missing masks are not in it: require_masks tells of them."""
        return [problem.message for problem in self.problems if problem.code != "ANN_NO_MASK"]

    @property
    def ground_truth(self) -> dict:
        """COCO dict for the evaluator: pycocotools gives the same figures on it and on the file."""
        fields = ("id", "file_name", "width", "height")
        return {
            "images": [{name: getattr(image, name) for name in fields} for image in self.images],
            "annotations": [entry for image in self.images for entry in image.annotations],
            "categories": [
                {"id": category_id, "name": name}
                for category_id, name in zip(self.category_ids, self.class_names)
            ],
        }
