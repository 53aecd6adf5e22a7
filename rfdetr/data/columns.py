"""A checked split as columns: a few large arrays instead of a dictionary for each annotation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from rfdetr.console import UserError
from rfdetr.data.array_file import map_arrays, read_header
from rfdetr.data.checked_annotations import SoundAnnotations
from rfdetr.data.exif import SizedImage
from rfdetr.data.flat import NO_MASK, POLYGONS, RLE_TEXT, as_array
from rfdetr.data.image_files import NOT_INSPECTED, ImageFile

PROOFS = {None: -1, False: 0, True: 1}
PROOF_OF = {number: proof for proof, number in PROOFS.items()}


@dataclass(frozen=True, eq=False)
class Columns:
    """The m images of a split that can be used, with their n sound annotations, image by image.

    A text column is `..._data`, all texts as UTF-8 one after the other, and `..._ends`. Sizes and
    boxes are in pixels of the image as its annotations mean it.
    """

    id_data: np.ndarray  # the images' ids as JSON
    id_ends: np.ndarray
    name_data: np.ndarray  # file_name as the annotations have it
    name_ends: np.ndarray
    path_data: np.ndarray  # of the file
    path_ends: np.ndarray
    sizes: np.ndarray  # (m, 2) int64: width, height
    orientations: np.ndarray  # (m,) uint8: the EXIF tag, 1..8
    exif_proofs: np.ndarray  # (m,) int8: -1 none, else whether orientation counts
    apply_exif: np.ndarray  # (m,) bool
    content_hashes: np.ndarray  # (m,) int64
    has_hash: np.ndarray  # (m,) bool
    sha256: np.ndarray  # (m, 32) uint8; zeros where the file was not decoded
    first: np.ndarray  # (m + 1,) int64: image i has the annotations first[i] to first[i + 1]
    ids: np.ndarray  # (n,) int64
    categories: np.ndarray  # (n,) int64: category ids
    is_crowd: np.ndarray  # (n,) bool
    is_learnt: np.ndarray  # (n,) bool: neither a crowd nor dropped
    areas: np.ndarray  # (n,) float64; NaN where they are to be computed
    boxes: np.ndarray  # (n, 4) float64: x, y, width, height as in the file
    clipped: np.ndarray  # (n, 4) float32: xyxy inside the image
    mask_kinds: np.ndarray  # (n,) uint8 and
    spans: np.ndarray  # (n, 2) int64: as in FlatAnnotations, like
    parts: np.ndarray  # (p, 2) int64,
    numbers: np.ndarray  # float64
    texts: np.ndarray  # and uint8
    source: tuple[str, str] | None = None  # path and token of the index that they are mapped from

    def __reduce__(self) -> tuple:
        """Another process maps the same file."""
        if self.source:
            return map_columns, self.source
        return Columns, (*self.arrays().values(),)

    def arrays(self) -> dict[str, np.ndarray]:
        """The columns by name."""
        names = [field.name for field in fields(self) if field.name != "source"]
        return {name: getattr(self, name) for name in names}

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def text(self, name: str, index: int) -> str:
        """One text of the text column of this name."""
        data = getattr(self, f"{name}_data")
        ends = getattr(self, f"{name}_ends")
        begin = ends[index - 1] if index else 0
        return data[begin : ends[index]].tobytes().decode("utf-8", "surrogatepass")

    def all_texts(self, name: str) -> Iterator[str]:
        """All texts of the text column of this name."""
        data = getattr(self, f"{name}_data").tobytes()
        begin = 0
        for end in getattr(self, f"{name}_ends").tolist():
            yield data[begin:end].decode("utf-8", "surrogatepass")
            begin = end

    def mask(self, index: int, height: int, width: int) -> list | dict | None:
        """The usable segmentation of an annotation in a (height, width) image."""
        kind = self.mask_kinds[index]
        begin, end = self.spans[index]
        if kind == NO_MASK:
            return None
        if kind == POLYGONS:
            return [self.numbers[i:j].tolist() for i, j in self.parts[begin:end].tolist()]
        if kind == RLE_TEXT:
            counts = self.texts[begin:end].tobytes().decode("ascii")
        else:
            counts = self.numbers[begin:end].astype(np.int64).tolist()
        return {"size": [height, width], "counts": counts}

    def entry(self, index: int, image_id: int | str, height: int, width: int) -> dict:
        """An annotation as in COCO, its mask being what is usable of it."""
        return {
            "id": int(self.ids[index]),
            "image_id": image_id,
            "category_id": int(self.categories[index]),
            "bbox": self.boxes[index].tolist(),
            "area": float(self.areas[index]),
            "iscrowd": int(self.is_crowd[index]),
            "segmentation": self.mask(index, height, width),
        }


def map_columns(path: str, token: str | None = None) -> Columns:
    """The columns that were written to an index; `token`: what it had when it was opened before.

    Raises OSError, DamagedFile, and UserError where the index is no longer that one.
    """
    header, begin, found = read_header(Path(path))
    if token not in (None, found):
        raise UserError(f"{path}: the dataset changed while it was in use: start the run again")
    arrays = map_arrays(Path(path), header, begin)
    del arrays["stamps"]
    return Columns(**arrays, source=(path, found))


def build_columns(
    images: Sequence[SizedImage], files: dict[int | str, ImageFile], sound: SoundAnnotations
) -> Columns:
    """The columns of these images, whose sizes are known; files: by id, of those looked for.

    They take the memory of the columns of `sound`, which mean nothing afterwards.
    """
    flat = sound.flat
    row_of_number = np.full(len(flat.image_ids) + 1, -1, np.int32)
    for row, image in enumerate(images):
        if image.id in flat.image_ids:
            row_of_number[flat.image_ids[image.id]] = row
    rows = row_of_number[as_array(flat.image_numbers, np.int32)]
    kept = np.flatnonzero(sound.is_sound & (rows >= 0))
    kept = kept[np.argsort(rows[kept], kind="stable")]
    is_crowd = ordered(sound.is_crowd, kept)
    clipped = ordered(sound.clipped, kept)
    return Columns(
        **image_columns(images, [files.get(image.id, NOT_INSPECTED) for image in images]),
        first=np.searchsorted(rows[kept], np.arange(len(images) + 1)),
        ids=ordered(sound.ids, kept),
        categories=ordered(sound.categories, kept),
        is_crowd=is_crowd,
        is_learnt=~is_crowd & np.isfinite(clipped[:, 0]),
        areas=ordered(sound.areas, kept),
        boxes=ordered(sound.boxes, kept),
        clipped=clipped,
        mask_kinds=ordered(sound.mask_kinds, kept),
        spans=ordered(sound.spans, kept),
        parts=as_array(flat.parts, np.int64).reshape(-1, 2),
        numbers=as_array(flat.numbers, np.float64),
        texts=as_array(flat.texts, np.uint8),
    )


def ordered(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """These rows of a column, in this order, written over what it was."""
    for values in np.atleast_2d(column.T):  # one by one: little memory is taken for the moment
        values[: len(rows)] = values[rows]
    return column[: len(rows)]


def image_columns(images: Sequence[SizedImage], files: list[ImageFile]) -> dict[str, np.ndarray]:
    """The columns of Columns that have a row an image."""
    hashes = [file.content_hash for file in files]
    digests = b"".join(file.file_sha256 or bytes(32) for file in files)
    columns = {
        "sizes": np.array([(image.width, image.height) for image in images], np.int64),
        "orientations": np.array([file.orientation for file in files], np.uint8),
        "exif_proofs": np.array([PROOFS[image.exif_proof] for image in images], np.int8),
        "apply_exif": np.array([image.apply_exif for image in images], bool),
        "content_hashes": np.array([value or 0 for value in hashes], np.int64),
        "has_hash": np.array([value is not None for value in hashes], bool),
        "sha256": np.frombuffer(digests, np.uint8).reshape(-1, 32),
    }
    columns["sizes"] = columns["sizes"].reshape(-1, 2)
    columns |= text_column("id", (json.dumps(image.id) for image in images))
    columns |= text_column("name", (image.file_name for image in images))
    columns |= text_column("path", (file.path for file in files))
    return columns


def text_column(name: str, texts: Iterable[str]) -> dict[str, np.ndarray]:
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return {
        f"{name}_data": np.frombuffer(b"".join(encoded), np.uint8),
        f"{name}_ends": np.cumsum([len(text) for text in encoded], dtype=np.int64),
    }
