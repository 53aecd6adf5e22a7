"""The kinds of faults a dataset can have, collected and worded.

Codes, severities and counts are what validate_setup.py --json writes, and what users search for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rfdetr.commands import DATA_FLAGS, flags_of
from rfdetr.console import UserError
from rfdetr.text import command_line, counted, printable

PLACES_KEPT = 20  # of each kind of fault, for the report
PLACES_NAMED = 3  # in its sentence
PLACE_LENGTH = 200  # characters
FEW_OBJECTS = 10  # of a class: fewer teach little
FEW_SKIPPED = 3  # unreadable images, or 1 % of the split: more are an error
NO_MASKS = (
    "No segmentation masks found in COCO annotations: {}: 0 of {} annotations have a usable "
    "segmentation. Export the dataset with masks (polygons or RLE), or leave out {}"
)
GUESSED_INSTEAD = "stage 2 and single-stage training then guess masks from the boxes"
WRITE_NUMBERS = "write whole numbers; validate_setup.py --fix DIR writes a copy with them"
SKIPS = f"training skips up to {FEW_SKIPPED} of a split, or 1 %, and refuses more"


class FaultKind(NamedTuple):
    """What a code means: "3 annotations <what> (<places>): <advice>"."""

    severity: str  # "error" or "warning"
    what: str
    advice: str  # what to do, or what was done


CODES: dict[str, FaultKind] = {
    "JSON_STRUCTURE": FaultKind(
        "error", "where COCO has something else", "compare the file with the COCO format"
    ),
    "CAT_INVALID": FaultKind(
        "error", "without a whole number as id or without a text as name", "give it both"
    ),
    "CAT_ID_TYPE": FaultKind("error", "whose id is a text or a decimal", WRITE_NUMBERS),
    "CAT_NAME_CONTROL": FaultKind(
        "error",
        "whose name holds a line break, another control character or half a surrogate pair",
        "rename them; validate_setup.py --fix DIR writes a copy with blanks there",
    ),
    "CAT_ID_DUPLICATE": FaultKind("error", "with the id of another", "give each its own id"),
    "CAT_NAME_DUPLICATE": FaultKind("error", "with the name of another", "merge or rename them"),
    "IMG_ID_INVALID": FaultKind(
        "error", "without a whole number or a text as id", "give each its own id"
    ),
    "IMG_ID_TYPE": FaultKind("error", "whose id is a decimal", WRITE_NUMBERS),
    "IMG_ID_DUPLICATE": FaultKind("error", "with the id of another", "give each its own id"),
    "IMG_PATH": FaultKind(
        "error",
        "whose file_name is no plain path inside the dataset",
        "write it relative, without parent folders (..)",
    ),
    "IMG_MISSING": FaultKind(
        "error",
        "whose file is missing",
        "put the files there, or write the names as the files have them (--fix DIR does, and drops "
        "images that have no file)",
    ),
    "IMG_TYPE": FaultKind(
        "error",
        "whose file is a folder, pipe, socket or device",
        "put images there or delete their entries",
    ),
    "IMG_UNREADABLE": FaultKind(
        "warning",
        "that the system refuses to read (rights, disk, network)",
        f"mend that and run this again; {SKIPS}",
    ),
    "IMG_CORRUPT": FaultKind(
        "warning",
        "that cannot be read",
        "replace the files or delete their entries (validate_setup.py --fix DIR writes a copy "
        f"without them); {SKIPS}",
    ),
    "IMG_BOMB": FaultKind(
        "error",
        "with too many pixels (a decompression bomb?)",
        "scale them down or delete their entries",
    ),
    "IMG_SIZE_INVALID": FaultKind(
        "error", "whose width or height is no whole number above 0", "write the image's size"
    ),
    "IMG_SIZE": FaultKind(
        "error",
        "of another size than the annotations say",
        "export them again from the same images",
    ),
    "IMG_EXIF_UNKNOWN": FaultKind(
        "warning",
        "with an EXIF orientation that their annotated size neither proves nor denies",
        "--exif apply turns such images, --exif ignore leaves them as they are stored; look with "
        "--preview",
    ),
    "IMG_EXIF_MIXED": FaultKind(
        "warning",
        "annotated as stored where other images' sizes prove that their EXIF orientation counts",
        "each of them is read as its size says",
    ),
    "IMG_PAGES": FaultKind(
        "warning", "with several pages or frames", "the first page of each is read"
    ),
    "IMG_ALPHA": FaultKind(
        "warning",
        "with transparent parts",
        "a model sees the colours that lie under them; where these mean nothing, save the images "
        "without transparency, on one colour",
    ),
    "IMG_LINK": FaultKind("warning", "behind symbolic links", "followed"),
    "IMG_MANY_OBJECTS": FaultKind(
        "warning", "with more objects than the model has queries", "train with more: --num_queries"
    ),
    "IMG_TWICE": FaultKind(
        "warning",
        "listed again (same name or equal content)",
        "what one entry lacks of the other's objects is learnt as background: join such entries",
    ),
    "IMG_SHARED": FaultKind(
        "warning", "that train has too (equal content)", "scores on them say little"
    ),
    "ANN_ID_INVALID": FaultKind("error", "without a whole number as id", "give each its own id"),
    "ANN_ID_DUPLICATE": FaultKind("error", "with the id of another", "give each its own id"),
    "ANN_DUPLICATE": FaultKind("warning", "identical to another", "one of each is kept"),
    "ANN_IMAGE_UNKNOWN": FaultKind(
        "error", "of an image_id that is not under images", "add the image or delete them"
    ),
    "ANN_CATEGORY_UNKNOWN": FaultKind(
        "error", "of a category_id that is not under categories", "add the category"
    ),
    "ANN_IMAGE_TYPE": FaultKind(
        "error",
        "whose image_id is a decimal, or a text where the image's id is a number, or the other way "
        "round",
        "write it as images has it; validate_setup.py --fix DIR writes such a copy",
    ),
    "ANN_CATEGORY_TYPE": FaultKind(
        "error", "whose category_id is a text or a decimal", WRITE_NUMBERS
    ),
    "ANN_CROWD_INVALID": FaultKind("error", "with an iscrowd other than 0 or 1", "write 0 or 1"),
    "ANN_AREA_INVALID": FaultKind(
        "warning",
        "with an area that is 0 or less, no number, or not in pixels",
        "computed from the mask, else the bbox",
    ),
    "ANN_BBOX_TYPE": FaultKind(
        "error", "whose bbox is not a list of 4 numbers", "write [x, y, width, height] in pixels"
    ),
    "ANN_BBOX_NAN": FaultKind(
        "error", "with a NaN, infinite or absurd (> 1e7) bbox", "correct or delete them"
    ),
    "ANN_BBOX_EMPTY": FaultKind("warning", "with a bbox of no width or height", "dropped"),
    "ANN_BBOX_OUTSIDE": FaultKind("warning", "with a bbox wholly outside the image", "dropped"),
    "ANN_BBOX_CLIPPED": FaultKind("warning", "with a bbox partly outside the image", "clipped"),
    "ANN_BBOX_NORMALISED": FaultKind(
        "error",
        "with a bbox in 0..1",
        "COCO boxes are in pixels: multiply x and width by the image's width, y and height by its "
        "height",
    ),
    "ANN_BBOX_CORNERS": FaultKind(
        "error",
        "whose bbox is the corners x1, y1, x2, y2 of its mask",
        "COCO boxes are x, y, width, height: subtract x1 from x2 and y1 from y2",
    ),
    "ANN_POLYGON_NORMALISED": FaultKind(
        "error",
        "with polygons in 0..1",
        "COCO polygons are in pixels: multiply x by the image's width, y by its height",
    ),
    "ANN_MASK_OFF_BOX": FaultKind(
        "warning",
        "whose mask does not lie on its bbox",
        "x and y swapped, shifted or scaled? Look with validate_setup.py --preview, and export "
        "them again",
    ),
    "ANN_MASK_RECTANGLE": FaultKind(
        "warning",
        "whose mask is a rectangle",
        "are these boxes that were exported as outlines? Masks will be rectangles, too. "
        "validate_setup.py --fix NEW_DIR --drop_rectangles 1 writes a copy without them, and "
        "stage 2 guesses masks from its boxes",
    ),
    "ANN_SEG_TYPE": FaultKind(
        "error",
        "whose segmentation is neither lists of numbers nor an RLE",
        "export the masks again",
    ),
    "ANN_SEG_NAN": FaultKind(
        "error", "with a NaN, infinite or absurd (> 1e7) polygon", "correct or delete them"
    ),
    "ANN_POLYGON_SHORT": FaultKind(
        "warning", "with a polygon of less than 3 points", "the polygon is dropped"
    ),
    "ANN_POLYGON_ODD": FaultKind(
        "warning", "with a polygon of an odd number of coordinates", "the polygon is dropped"
    ),
    "ANN_POLYGON_FAR": FaultKind(
        "warning", "with a polygon that leads far outside the image", "the polygon is dropped"
    ),
    "ANN_RLE_SIZE": FaultKind(
        "error", "with an RLE of another size than the image", "export the masks again"
    ),
    "ANN_RLE_COUNTS": FaultKind(
        "error",
        "with RLE runs that are empty or do not sum to height x width",
        "export the masks again",
    ),
    "ANN_RLE_TYPE": FaultKind(
        "error", "whose RLE counts are neither a text nor whole numbers", "export the masks again"
    ),
    "ANN_NO_MASK": FaultKind(
        "warning",
        "without a usable mask",
        "they give no mask loss; --masks boxes (stage 2, single stage) guesses theirs",
    ),
    "SPLIT_EMPTY": FaultKind(
        "warning", "without a usable object", "it gives nothing to train on and no scores"
    ),
    "SPLIT_FRACTION_UNUSED": FaultKind(
        "warning", "that exists already", "--val_fraction is not used"
    ),
    "CLASS_NOT_IN_TRAIN": FaultKind(
        "warning", "without a usable object in train", "nothing can learn them"
    ),
    "CLASS_FEW": FaultKind(
        "warning",
        f"with fewer than {FEW_OBJECTS} objects in train",
        "little can be learnt of them: label more",
    ),
    "CLASS_NOT_SCORED": FaultKind(
        "warning", "of train without an object in valid", "no score tells how well they are found"
    ),
}
NOUNS = {  # first word of a code -> what it counts
    "JSON": ("place", "places"),
    "CAT": ("category", "categories"),
    "IMG": ("image", "images"),
    "ANN": ("annotation", "annotations"),
    "CLASS": ("class", "classes"),
    "SPLIT": ("split", "splits"),
}


@dataclass(frozen=True)
class Problem:
    """All faults of one kind in one file."""

    code: str
    severity: str  # "error" or "warning"
    message: str
    count: int
    places: list[str]  # the first PLACES_KEPT of them
    headline: str = ""  # the message without examples and advice
    renames: list[str] = field(default_factory=list)  # OLD=NEW of --rename that may mend it ...
    renames_replaced: list[str] = field(default_factory=list)  # ... in place of these given ones


class Faults:
    """Collects the faults of one annotation file: for each code, where it was found."""

    def __init__(self, annotation_file: Path):
        self.annotation_file = annotation_file
        # by code, in the order of their first fault: how many there are, and the first places
        self._counts: dict[str, int] = {}
        self._places: dict[str, list[str]] = {}
        self._codes: dict[int, set[str]] = {}  # id() of what is at fault -> its codes
        self._advice: dict[str, str] = {}  # by code, what to do in place of what CODES says
        self._errors: set[str] = set()  # codes that are errors here although CODES says warning

    def note(self, code: str, place: str, of: object = None) -> None:
        """Add a fault; `of`: the entry that has it, for `codes_of`."""
        places = self._places.setdefault(code, [])
        self._counts[code] = self._counts.get(code, 0) + 1
        if len(places) < PLACES_KEPT:
            places.append(printable(place[:PLACE_LENGTH]))
        if of is not None:
            self._codes.setdefault(id(of), set()).add(code)

    def forget(self, code: str) -> None:
        self._places.pop(code, None)
        self._counts.pop(code, None)

    def make_error(self, code: str) -> None:
        """Let what CODES calls a warning be an error in this file."""
        self._errors.add(code)

    def advise(self, code: str, advice: str) -> None:
        """Let the message on this code end with another advice than that of CODES."""
        self._advice[code] = advice

    def count(self, code: str) -> int:
        return self._counts.get(code, 0)

    def codes_of(self, entry: object) -> set[str]:
        """The codes that were noted of this very object."""
        return self._codes.get(id(entry), set())

    @property
    def has_errors(self) -> bool:
        return any(self._severity(code) == "error" for code in self._places)

    def problems(self) -> list[Problem]:
        """What was noted so far, one Problem a code, errors first."""
        problems = []
        for code, places in self._places.items():
            severity = self._severity(code)
            count = self._counts[code]
            headline = self._headline(code, count)
            advice = self._advice.get(code, CODES[code].advice)
            message = f"{headline} ({first_few(places)}): {advice}"
            problems.append(Problem(code, severity, message, count, list(places), headline))
        return sorted(problems, key=lambda problem: problem.severity)

    def as_plain(self) -> dict:
        """What was noted, as JSON holds it; not which entry has which fault."""
        errors = sorted(self._errors)
        return {
            "counts": self._counts,
            "places": self._places,
            "errors": errors,
            "advice": self._advice,
        }

    @classmethod
    def from_plain(cls, annotation_file: Path, plain: dict) -> Faults:
        faults = cls(annotation_file)
        faults._counts = dict(plain["counts"])
        faults._places = {code: list(places) for code, places in plain["places"].items()}
        faults._errors = set(plain["errors"])
        faults._advice = dict(plain["advice"])
        return faults

    def _severity(self, code: str) -> str:
        return "error" if code in self._errors else CODES[code].severity

    def _headline(self, code: str, count: int) -> str:
        singular, plural = NOUNS[code.split("_")[0]]
        noun = singular if count == 1 else plural
        return f"{self.annotation_file}: {count} {noun} {CODES[code].what}"


def first_few(texts: list[str], count: int = PLACES_NAMED) -> str:
    """The first `count` of some texts, separated by commas, and whether there are more."""
    more = ", ..." if len(texts) > count else ""
    return ", ".join(texts[:count]) + more


def raise_errors(problems: list[Problem], data: dict[str, object]) -> None:
    """Raise a UserError for the first error of a dataset, with the command that lists them all.

    data: the settings that say how it is read, by name.
    """
    errors = [problem for problem in problems if problem.severity == "error"]
    if not errors:
        return
    if errors[0].code == "DATASET_LAYOUT":  # there is nothing else to see
        raise UserError(errors[0].message)
    message = errors[0].message.rstrip(".")
    if len(errors) > 1:
        message += f"; and {counted(len(errors) - 1, 'more kind')} of errors"
    command = command_line("python", "validate_setup.py", *flags_of(data, *DATA_FLAGS))
    raise UserError(f"{message}. To see everything at once run: {command}")
