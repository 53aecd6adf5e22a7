"""Whether the EXIF orientation of images counts: one decision for a whole dataset.

Some tools annotate images as they are stored, others as they are shown. Where an image's stored
and turned sizes differ, its annotated size proves which; what is proven holds for all images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rfdetr.data.image_files import ImageEntry, ImageFile
from rfdetr.text import counted

if TYPE_CHECKING:
    from rfdetr.data.records import CocoSplit


@dataclass(frozen=True)
class ExifDecision:
    """What holds for images whose annotated size does not tell."""

    apply: bool
    proofs: frozenset[bool]  # what sizes of the dataset prove: that orientation counts, or not

    @property
    def name(self) -> str:
        """ "apply" or "ignore": a value of --exif, and what checkpoints keep."""
        return "apply" if self.apply else "ignore"


@dataclass(frozen=True, slots=True)
class SizedImage:
    """An image that the annotations list, with the size in pixels that they mean.

    Width and height are infinite where neither the entry nor the file tells them.
    """

    id: int | str
    file_name: str  # empty where it is no plain path inside the folder
    width: float
    height: float
    exif_proof: bool | None = None  # as of exif_proof()
    apply_exif: bool = False  # whether the stored pixels are to be turned

    @property
    def shorter_side(self) -> float:
        return min(self.width, self.height)


def decide_exif(proofs: Iterable[bool], wanted: str | None = None) -> ExifDecision:
    """What the sizes of a dataset's images prove; else `wanted`, "apply" or "ignore", or apply."""
    proofs = frozenset(proofs)
    if len(proofs) == 1:
        apply = True in proofs
    else:
        apply = wanted != "ignore"
    return ExifDecision(apply, proofs)


def exif_proofs(images: Iterable[tuple[ImageEntry, ImageFile]]) -> frozenset[bool]:
    """What the annotated sizes of images prove."""
    return frozenset({exif_proof(entry, file) for entry, file in images} - {None})


def exif_proof(entry: ImageEntry, file: ImageFile) -> bool | None:
    """Whether the annotated size proves that the orientation counts; None: it tells nothing."""
    if file.orientation == 1 or file.stored_size is None:
        return None
    turned_size = turned(file)
    if turned_size == file.stored_size or entry.size not in (file.stored_size, turned_size):
        return None
    return entry.size == turned_size


def settle_size(entry: ImageEntry, file: ImageFile, decision: ExifDecision) -> SizedImage:
    """The image of an entry and its file once the decision is taken; the file's size counts."""
    proof = exif_proof(entry, file)
    apply_exif = decision.apply if proof is None else proof
    apply_exif = apply_exif and file.orientation > 1
    width, height = entry.size
    if file.stored_size is not None:
        width, height = turned(file) if apply_exif else file.stored_size
    return SizedImage(entry.id, entry.file_name, width, height, proof, apply_exif)


def size_is_wrong(entry: ImageEntry, file: ImageFile) -> bool:
    """Whether the annotated size is neither that of the stored nor that of the turned image."""
    if file.stored_size is None or not entry.has_size:
        return False
    return entry.size not in (file.stored_size, turned(file))


def turned(file: ImageFile) -> tuple[int, int]:
    """(width, height) of a file's image once its orientation is applied."""
    width, height = file.stored_size
    return (height, width) if file.orientation >= 5 else (width, height)


def exif_note(splits: dict[str, CocoSplit], wanted: str | None) -> str:
    """One sentence on what was decided; empty where no image has an orientation.

    wanted: the --exif that was given, if any.
    """
    proofs = [proof for split in splits.values() for proof in split.images.exif_proofs]
    if not proofs:
        return ""
    decision = next(iter(splits.values())).exif
    done = {"apply": "applied", "ignore": "ignored"}[decision]
    has = "has" if len(proofs) == 1 else "have"
    note = f"EXIF orientation: {counted(len(proofs), 'image')} {has} one, "
    if len(set(proofs) - {None}) != 1:
        return note + f"it is {done} where sizes do not tell (--exif {decision})"
    proven = sum(proof is not None for proof in proofs)
    note += f"the sizes of {proven} prove that it is to be {done}: so it is for all"
    if wanted not in (None, decision):
        note += f" (--exif {wanted} is not used)"
    return note
