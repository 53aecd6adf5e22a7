"""The kinds of faults a dataset can have, and how they are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rfdetr.console import UserError

NO_MASKS = (
    "No segmentation masks found in COCO annotations: {}: 0 of {} annotations have a usable segmentation. Stage 2 and "
    "single-stage training need polygons or RLE: export the dataset with masks. Stage 1 works on boxes alone."
)


# code: (severity, "3 annotations ...", what to do or what was done). The noun comes from the code's first word.
CODES: dict[str, tuple[str, str, str]] = {
    "JSON_STRUCTURE": (
        "error",
        "where COCO has something else",
        "compare the file with the COCO format",
    ),
    "CAT_INVALID": (
        "error",
        "without a whole number as id or without a text as name",
        "give it both",
    ),
    "CAT_NAME_CONTROL": (
        "error",
        "whose name holds a line break, another control character or half a surrogate pair",
        "rename them; validate_setup.py --fix DIR writes a copy with blanks there",
    ),
    "CAT_ID_DUPLICATE": ("error", "with the id of another", "give each its own id"),
    "CAT_NAME_DUPLICATE": ("error", "with the name of another", "merge or rename them"),
    "IMG_ID_INVALID": ("error", "without a whole number or a text as id", "give each its own id"),
    "IMG_ID_DUPLICATE": ("error", "with the id of another", "give each its own id"),
    "IMG_PATH": (
        "error",
        "whose file_name is no plain path inside the dataset",
        "write it relative, without ..",
    ),
    "IMG_MISSING": (
        "error",
        "whose file is missing",
        "put the files there or delete their entries",
    ),
    "IMG_TYPE": (
        "error",
        "whose file is a folder, pipe, socket or device",
        "put images there or delete their entries",
    ),
    "IMG_UNREADABLE": (
        "warning",
        "that the system refuses to read (rights, disk, network)",
        "mend that and run this again; training skips them",
    ),
    "IMG_CORRUPT": (
        "warning",
        "that cannot be read",
        "replace the files or delete their entries; training skips them",
    ),
    "IMG_BOMB": (
        "error",
        "with too many pixels (a decompression bomb?)",
        "scale them down or delete their entries",
    ),
    "IMG_SIZE_INVALID": (
        "error",
        "whose width or height is no whole number above 0",
        "write the image's size",
    ),
    "IMG_SIZE": (
        "error",
        "of another size than the annotations say",
        "export them again from the same images",
    ),
    "IMG_EXIF_UNKNOWN": (
        "warning",
        "with an EXIF orientation that their annotated size neither proves nor denies",
        "--exif apply turns such images, --exif ignore leaves them as they are stored; look with --preview",
    ),
    "IMG_EXIF_MIXED": (
        "warning",
        "annotated as stored where other images' sizes prove that their EXIF orientation counts",
        "each of them is read as its size says",
    ),
    "IMG_LINK": ("warning", "behind symbolic links", "followed"),
    "IMG_MANY_OBJECTS": (
        "warning",
        "with more objects than the model has queries",
        "it cannot find them all",
    ),
    "IMG_SHARED": ("warning", "that train has too (equal content)", "scores on them say little"),
    "ANN_ID_INVALID": ("error", "without a whole number as id", "give each its own id"),
    "ANN_ID_DUPLICATE": ("error", "with the id of another", "give each its own id"),
    "ANN_DUPLICATE": ("warning", "identical to another", "one of each is kept"),
    "ANN_IMAGE_UNKNOWN": (
        "error",
        "of an image_id that is not under images",
        "add the image or delete them",
    ),
    "ANN_CATEGORY_UNKNOWN": (
        "error",
        "of a category_id that is not under categories",
        "add the category",
    ),
    "ANN_CROWD_INVALID": ("error", "with an iscrowd other than 0 or 1", "write 0 or 1"),
    "ANN_AREA_INVALID": (
        "error",
        "with an area that is no finite number",
        "correct it or leave it out",
    ),
    "ANN_AREA_EMPTY": ("warning", "with an area of 0 or less", "dropped"),
    "ANN_BBOX_TYPE": (
        "error",
        "whose bbox is not a list of 4 numbers",
        "write [x, y, width, height] in pixels",
    ),
    "ANN_BBOX_NAN": (
        "error",
        "with a NaN, infinite or absurd (> 1e7) bbox",
        "correct or delete them",
    ),
    "ANN_BBOX_EMPTY": ("warning", "with a bbox of no width or height", "dropped"),
    "ANN_BBOX_OUTSIDE": ("warning", "with a bbox wholly outside the image", "dropped"),
    "ANN_BBOX_CLIPPED": ("warning", "with a bbox partly outside the image", "clipped"),
    "ANN_BBOX_NORMALISED": (
        "error",
        "with a bbox in 0..1",
        "COCO boxes are in pixels: multiply x and width by the image's width, y and height by its height",
    ),
    "ANN_POLYGON_NORMALISED": (
        "error",
        "with polygons in 0..1",
        "COCO polygons are in pixels: multiply x by the image's width, y by its height",
    ),
    "ANN_MASK_OFF_BOX": (
        "warning",
        "whose mask does not lie on its bbox",
        "x and y swapped, shifted or scaled? Look with validate_setup.py --preview, and export them again",
    ),
    "ANN_SEG_TYPE": (
        "error",
        "whose segmentation is neither lists of numbers nor an RLE",
        "export the masks again",
    ),
    "ANN_SEG_NAN": (
        "error",
        "with a NaN, infinite or absurd (> 1e7) polygon",
        "correct or delete them",
    ),
    "ANN_POLYGON_SHORT": (
        "warning",
        "with a polygon of less than 3 points",
        "the polygon is dropped",
    ),
    "ANN_POLYGON_ODD": (
        "warning",
        "with a polygon of an odd number of coordinates",
        "the polygon is dropped",
    ),
    "ANN_POLYGON_FAR": (
        "warning",
        "with a polygon that leads far outside the image",
        "the polygon is dropped",
    ),
    "ANN_RLE_SIZE": (
        "error",
        "with an RLE of another size than the image",
        "export the masks again",
    ),
    "ANN_RLE_COUNTS": (
        "error",
        "with RLE runs that are empty or do not sum to height x width",
        "export the masks again",
    ),
    "ANN_RLE_TYPE": (
        "error",
        "whose RLE counts are neither a text nor whole numbers",
        "export the masks again",
    ),
    "ANN_NO_MASK": ("warning", "without a usable mask", "they give no mask loss"),
    "SPLIT_EMPTY": (
        "warning",
        "without a usable object",
        "it gives nothing to train on and no scores",
    ),
    "SPLIT_FRACTION_UNUSED": ("warning", "that exists already", "--val_fraction is not used"),
    "CLASS_NOT_IN_TRAIN": ("warning", "without an annotation in train", "nothing can learn them"),
}


NOUNS = dict(
    JSON="place places", CAT="category categories", IMG="image images", ANN="annotation annotations"
)


NOUNS |= dict(CLASS="class classes", SPLIT="split splits")


@dataclass(frozen=True)
class Problem:
    """One kind of fault in one file: a stable code, "error" or "warning", a sentence, count, the first 20 places."""

    code: str
    severity: str
    message: str
    count: int
    places: list[str]


def raise_errors(problems: list[Problem], root: str | Path) -> None:
    """Raise one UserError for the first error, with the number of other kinds and the command that lists them."""
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        others = f"; and {len(errors) - 1} more kinds of errors" if len(errors) > 1 else ""
        see = f'To see everything at once run: python validate_setup.py --dataset "{root}"'
        raise UserError(f"{errors[0].message.rstrip('.')}{others}. {see}")
