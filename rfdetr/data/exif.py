"""Whether the EXIF orientation of images counts: one decision a dataset."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rfdetr.data.checks import CocoSplit


def exif_rule(splits: Iterable[CocoSplit], wanted: str | None) -> str:
    """ "apply" or "ignore": what holds for the EXIF orientation of all of a dataset's images whose size does not tell.

    It is what the sizes of its other images prove; else `wanted`, by default to apply it.
    """
    proofs = _exif_proofs(splits)
    if len(proofs) == 1:
        return "apply" if proofs == {True} else "ignore"
    return wanted or "apply"


def _exif_proofs(splits: Iterable[CocoSplit]) -> set[bool]:
    return {image.exif_proof for split in splits for image in split.images} - {None}


def settle_exif(
    splits: dict[str, CocoSplit], folders: dict[str, Path], decode: bool, wanted: str | None
) -> None:
    """Decide for a whole dataset what its images' EXIF orientation means, as `exif_rule`, and note what is doubtful.

    A split is read again where sizes that its file leaves out follow from that.
    """
    rule, proofs = exif_rule(splits.values(), wanted), _exif_proofs(splits.values())
    for name, split in splits.items():
        turned = [
            image for image in split.images if image.orientation > 1 and image.exif_proof is None
        ]
        sizeless = any(image.orientation >= 5 and image.width != image.height for image in turned)
        if sizeless and rule != split.exif:
            splits[name] = split = CocoSplit(
                split.annotation_file, folders[name], decode, exif=rule
            )
        split.exif = rule
        for image in (image for image in split.images if image.orientation > 1):
            if image.exif_proof is None:
                image.exif = rule == "apply"
            place = f"{image.path}: orientation {image.orientation}, {'applied' if image.exif else 'ignored'}"
            split.fault("IMG_EXIF_UNKNOWN", place, image.exif_proof is None and len(proofs) != 1)
            split.fault("IMG_EXIF_MIXED", place, image.exif_proof is False and len(proofs) == 2)


def exif_note(splits: dict[str, CocoSplit], wanted: str | None) -> str:
    """One sentence on what was decided about EXIF orientation; empty where no image has one."""
    turned = [image for split in splits.values() for image in split.images if image.orientation > 1]
    if not turned:
        return ""
    rule = next(iter(splits.values())).exif
    done = {"apply": "applied", "ignore": "ignored"}[rule]
    note = f"EXIF orientation: {len(turned)} images have one, "
    if len(_exif_proofs(splits.values())) != 1:
        return note + f"it is {done} where sizes do not tell (--exif {rule})"
    proven = sum(image.exif_proof is not None for image in turned)
    note += f"the sizes of {proven} prove that it is to be {done}: so it is for all"
    return note + (f" (--exif {wanted} is not used)" if wanted not in (None, rule) else "")
