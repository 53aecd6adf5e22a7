"""What is wrong with a dataset: every fault at once, with stable codes, before any of it reaches C code or a model.

pycocotools reads uninitialised memory or hangs on numbers it does not expect, so nothing here calls it. The same pass
decides what is dropped or clipped; `coco.py` numbers the classes and looks no more.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.contrib.concurrent import thread_map

from rfdetr.console import UserError, tick, warn
from rfdetr.data.image_cache import (
    ImageCache,
    content_hash,
    find_image,
    is_passing,
    kind_of_file,
    stamp_of,
    stays_inside,
)
from rfdetr.text import is_control, printable

LIMIT = 1e7  # pixels; beyond it a coordinate is absurd, and pycocotools would allocate in proportion to it
SLACK = 0.1  # pixels a box may stand out before it is worth a word: many tools round to one decimal
THINNEST = 1e-3  # pixels; thinner boxes vanish in float32
NO_MASKS = (
    "No segmentation masks found in COCO annotations: {}: 0 of {} annotations have a usable segmentation. Stage 2 and "
    "single-stage training need polygons or RLE: export the dataset with masks. Stage 1 works on boxes alone."
)
ORIENTATION = 0x0112  # EXIF tag: 2-4 mirror or turn by 180 degrees, 5-8 also swap width and height
TIFF_SIDES = 256, 257  # tags: width and height as they are stored

SEVERAL = 3  # annotations; fewer prove nothing about what they are measured in or where masks lie
MOST = 0.9  # of a split's boxes or polygons in 0..1: it is not in pixels
ONE = 1.001  # the largest coordinate of what is in 0..1, with what rounding adds
FEW_PIXELS = 8  # an image's side up to which a box may well lie within its first pixel
OFF_WARNING, OFF_ERROR = 0.05, 0.5  # of a split's masks that do not lie on their boxes
MARGIN, MARGIN_PIXELS = (
    0.1,
    2.0,
)  # a mask may stand out of its box by this share of a side, and by so many pixels

# Only these are decoded: for others Pillow would call a program (Ghostscript for EPS), whatever the file's name says.
FORMATS = (
    "JPEG PNG TIFF BMP WEBP GIF PPM JPEG2000 AVIF DIB PCX ICO TGA".split()
)  # JPEG: cameras' MPO too
Image.init()
FORMATS = [name for name in FORMATS if name in Image.OPEN]  # AVIF: from Pillow 11.3 on

# Above this Pillow warns, above twice this it raises, and only that counts as a decompression bomb here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

NUMBERS = {int, float}

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


@dataclass
class ImageRecord:
    """One image and its n objects, crowd regions left out. Sizes and boxes in pixels as the annotations mean them."""

    id: int | str  # the dataset's own
    file_name: str  # as the annotations have it
    width: int
    height: int
    # The sound entries, dropped ones too, so that pycocotools gives the same figures as on the file. "box": what of the
    # bbox is to be learnt, xyxy, or None
    annotations: list[dict] = field(default_factory=list)
    path: Path = Path()
    orientation: int = 1  # the file's own EXIF tag, 1..8
    exif_proof: bool | None = None  # whether that counts, where width and height prove it
    exif: bool = False  # the file is stored rotated or mirrored; load_image undoes it
    digest: bytes = b""  # of the file, where the check decoded it
    sample: int | None = None  # seen.content_hash of the file, where it can be read
    boxes: np.ndarray = field(init=False)  # (n, 4) float32 xyxy, inside the image
    labels: np.ndarray = field(init=False)  # (n,) int64, 0..N-1
    segmentations: list[list | dict | None] = field(
        init=False
    )  # raw polygons or RLE, None where missing or unusable

    @property
    def objects(self) -> list[dict]:
        """The annotations that are to be learnt, in the order of the arrays."""
        return [entry for entry in self.annotations if entry["box"] and not entry["iscrowd"]]


class CocoSplit:
    """One split: the faults of its annotation file, and what of it is usable.

    categories: the sound entries.  images: the records of those that are there.  `coco.number_classes` adds
    class_names (by label, the same in all splits of a dataset), category_ids (by label, this split's own; an unused
    number for a class that its file does not list) and left_out (placeholder categories), and counts the objects.
    """

    def __init__(
        self,
        file: str | Path,
        folder: Path | None = None,
        decode: bool = False,
        data: dict | None = None,
        exif: str = "apply",
    ):
        """Check `data`, else what `file` holds (UserError for no JSON), and the images where `folder` is given.

        exif: "apply" or "ignore" the orientation of images whose annotated size does not tell.
        """
        self.annotation_file, data = Path(file), read_json(file) if data is None else data
        self.exif = exif
        self.places: dict[str, list[str]] = {}  # code -> where
        self.blame: dict[
            int, set[str]
        ] = {}  # id() of an entry of `data`, or of an ImageRecord -> codes
        self.raised: set[str] = set()  # codes that are errors here though CODES says warning
        categories, images, annotations = (
            self._table(data, key) for key in ("categories", "images", "annotations")
        )
        self.categories = self._check_categories(categories, annotations)
        self.listed = self._check_images(images)  # by id, those that cannot be read too
        self.images = (
            list(self.listed.values()) if folder is None else self._check_files(folder, decode)
        )
        self._check_annotations(annotations)

    def count(self) -> None:
        """Count the objects: per image, per class, all, with masks."""
        self.per_image = [len(image.labels) for image in self.images]
        labels = Counter(label for image in self.images for label in image.labels.tolist())
        self.per_class = [labels[label] for label in range(len(self.class_names))]
        self.object_count = sum(self.per_image)
        self.mask_count = sum(
            mask is not None for image in self.images for mask in image.segmentations
        )

    @property
    def ground_truth(self) -> dict:
        """COCO dict for the evaluator: pycocotools gives the same figures on it and on the file."""
        fields = ("id", "file_name", "width", "height")
        return {
            "images": [{name: getattr(image, name) for name in fields} for image in self.images],
            "annotations": [entry for image in self.images for entry in image.annotations],
            "categories": [
                {"id": key, "name": name} for key, name in zip(self.category_ids, self.class_names)
            ],
        }

    @property
    def samples(self) -> list[int]:
        """seen.content_hash of the images that can be read."""
        return [image.sample for image in self.images if image.sample is not None]

    def fault(self, code: str, place: str, found: bool = True, of: object = None) -> bool:
        """Note a fault, if it is one, and the entry or record that has it; returns whether."""
        if found:
            self.places.setdefault(code, []).append(printable(place[:200]))
            if of is not None:
                self.blame.setdefault(id(of), set()).add(code)
        return found

    @property
    def problems(self) -> list[Problem]:
        """All faults found so far, worded, errors first."""
        out = []
        for code, places in self.places.items():
            severity, what, then = CODES[code]
            noun = NOUNS[code.split("_")[0]].split()[len(places) > 1]
            first = ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")
            message = f"{self.annotation_file}: {len(places)} {noun} {what} ({first}): {then}"
            out.append(
                Problem(
                    code,
                    "error" if code in self.raised else severity,
                    message,
                    len(places),
                    places[:20],
                )
            )
        return sorted(out, key=lambda problem: problem.severity)

    @property
    def sound(self) -> bool:
        """Whether no error was found so far."""
        return all(problem.severity == "warning" for problem in self.problems)

    @property
    def warnings(self) -> list[str]:
        """What to tell before training; `require_masks` tells of missing masks, where they matter."""
        return [problem.message for problem in self.problems if problem.code != "ANN_NO_MASK"]

    def _table(self, data: dict, key: str) -> list[dict]:
        entries = data.get(key)
        if self.fault("JSON_STRUCTURE", f"no list {key!r}", not isinstance(entries, list)):
            return []
        for index, entry in enumerate(entries):
            self.fault(
                "JSON_STRUCTURE",
                f"{key}[{index}] is a {type(entry).__name__}",
                not isinstance(entry, dict),
            )
        return [entry for entry in entries if isinstance(entry, dict)]

    def _check_categories(self, entries: list[dict], annotations: list[dict]) -> list[dict]:
        good: dict[int, dict] = {}
        for index, entry in enumerate(entries):
            key, name = entry.get("id"), entry.get("name")
            place = f"categories[{index}]: id {key!r}, name {name!r}"
            if not self.fault(
                "CAT_INVALID", place, not is_whole(key) or not isinstance(name, str), entry
            ):
                self.fault(
                    "CAT_ID_DUPLICATE", place, good.setdefault(key, entry) is not entry, entry
                )
                self.fault("CAT_NAME_CONTROL", place, any(map(is_control, name)), entry)
        # Labelling tools give the placeholder the name of the class where there is but one, so it does not count.
        used = {
            entry.get("category_id") for entry in annotations if is_whole(entry.get("category_id"))
        }
        left_out = placeholders(good.values(), used)
        names = Counter(
            entry["name"] for key, entry in good.items() if (key, entry["name"]) not in left_out
        )
        for name, times in names.items():
            self.fault("CAT_NAME_DUPLICATE", repr(name), times > 1)
        return list(good.values())

    def _check_images(self, entries: list[dict]) -> dict[int | str, ImageRecord]:
        images: dict[int | str, ImageRecord] = {}
        for index, entry in enumerate(entries):
            key, file, sides = (
                entry.get("id"),
                entry.get("file_name"),
                [entry.get("width"), entry.get("height")],
            )
            place = f"images[{index}]: id {key!r}, file {file!r}"
            if self.fault(
                "IMG_ID_INVALID", place, not is_whole(key) and type(key) is not str, entry
            ):
                continue
            self.fault("IMG_ID_DUPLICATE", place, key in images, entry)
            if self.fault("IMG_PATH", place, not stays_inside(file), entry):
                file = ""
            sides = [
                int(side) if isinstance(side, float) and side.is_integer() else side
                for side in sides
            ]
            wrong = any(side is not None and not (is_whole(side) and side > 0) for side in sides)
            if self.fault("IMG_SIZE_INVALID", place, wrong, entry) or None in sides:
                sides = [inf, inf]  # until the file tells
            images[key] = ImageRecord(key, file, *sides)
        return images

    def _check_files(self, folder: Path, decode: bool) -> list[ImageRecord]:
        """The images that are there; one that cannot be read counts as missed in scoring where its size is known."""
        images, usable = [image for image in self.listed.values() if image.file_name], []
        bar = {
            "desc": "Images",
            "unit": "image",
            "leave": False,
            "disable": None if decode else True,
        }
        with ImageCache(folder) as seen:
            found = thread_map(
                lambda image: _look(image, folder, decode, seen, self.exif), images, **bar
            )
        for image, faults in zip(images, found):
            for code in faults:
                self.fault(code, faults[code], of=image)
            if not faults.keys() & {"IMG_MISSING", "IMG_TYPE", "IMG_BOMB"} and image.width < inf:
                usable.append(image)
        for code in ("IMG_CORRUPT", "IMG_UNREADABLE"):
            if decode or len(self.places.get(code, ())) > max(3, len(self.listed) / 100):
                self.raised.add(code)
        return usable

    def _check_annotations(self, entries: list[dict]) -> None:
        """Give the images their sound annotations."""
        ids, twins, nowhere = {}, {}, ImageRecord("", "not listed", inf, inf)
        frames, rles = Frames(), []
        categories = {entry["id"] for entry in self.categories}
        masks = (entry.get("segmentation") for entry in entries)
        texts = [mask.get("counts") for mask in masks if isinstance(mask, dict)]
        sums = run_sums([text for text in texts if type(text) is str])
        for entry in entries:
            key, image_id, category = (
                entry.get("id"),
                entry.get("image_id"),
                entry.get("category_id"),
            )
            image = self.listed.get(image_id, nowhere) if type(image_id) in (int, str) else nowhere
            place = f"annotation {key} of image {image_id} ({image.file_name})"
            box, box_fault = clip_box(entry, image.width, image.height)
            segmentation, faults, extent = usable_part(
                entry.get("segmentation"), image.width, image.height, sums
            )
            tests = {
                "ANN_ID_INVALID": not is_whole(key),
                "ANN_ID_DUPLICATE": is_whole(key) and ids.setdefault(key, entry) != entry,
                "ANN_CROWD_INVALID": entry.get("iscrowd") not in (0, 1, None),
                "ANN_CATEGORY_UNKNOWN": not is_whole(category) or category not in categories,
                "ANN_IMAGE_UNKNOWN": image is nowhere,
                "ANN_AREA_INVALID": entry.get("area") is not None
                and _number_fault([entry["area"]], LIMIT**2),
            }
            wrong = [code for code in tests if tests[code]] + sorted({*faults, box_fault} - {None})
            for code in wrong:
                self.fault(code, place, of=entry)
            if any(CODES[code][0] == "error" for code in wrong):
                continue
            frames.note_box(entry["bbox"], image, place)
            if box and extent and not entry.get("iscrowd"):
                frames.note_mask(extent, entry["bbox"], image, place)
            elif box and segmentation and not entry.get("iscrowd"):
                rles.append((segmentation, entry["bbox"], image, place))
            twin = twins.setdefault((image_id, category, *entry["bbox"]), entry)
            same = twin is not entry and all(
                twin.get(name) == entry.get(name) for name in ("segmentation", "iscrowd")
            )
            if box and self.fault("ANN_DUPLICATE", place, same, entry):
                box = None
            clean = {
                "area": entry.get("area"),
                "iscrowd": int(entry.get("iscrowd") or 0),
                "segmentation": segmentation,
            }
            self.fault("ANN_NO_MASK", place, box and not clean["iscrowd"] and not segmentation)
            image.annotations.append(entry | clean | {"box": box})
        for extent, (_, bbox, image, place) in zip(rle_extents([rle[0] for rle in rles]), rles):
            if extent:
                frames.note_mask(extent, bbox, image, place)
        for code, severity, places in frames.faults():
            self.places[code] = [printable(place[:200]) for place in places]
            if severity == "error":
                self.raised.add(code)


class Frames:
    """Where the boxes and masks of a split lie: in pixels or in 0..1, and the masks on their boxes or not.

    Boxes are COCO's (x, y, width, height), extents of masks (left, top, right, bottom).
    """

    def __init__(self):
        self.boxes = self.masks = 0
        self.tiny_boxes: list[str] = []  # places of those that lie in 0..1
        self.tiny_masks: list[str] = []
        self.off: list[str] = []  # places of masks that do not lie on their boxes

    def note_box(self, box: list[float], image: ImageRecord, place: str) -> None:
        self.boxes += 1
        x, y, width, height = box
        if x + width <= ONE and y + height <= ONE and min(image.width, image.height) > FEW_PIXELS:
            self.tiny_boxes.append(place)

    def note_mask(self, extent: tuple, box: list[float], image: ImageRecord, place: str) -> None:
        self.masks += 1
        left, top, right, bottom = extent
        if right <= ONE and bottom <= ONE and min(image.width, image.height) > FEW_PIXELS:
            self.tiny_masks.append(place)
        x, y, width, height = box
        # what of the mask's extent, at least a pixel each way, lies inside the box with its margin
        right = max(right, left + 1)
        bottom = max(bottom, top + 1)
        beside = MARGIN * width + MARGIN_PIXELS
        above = MARGIN * height + MARGIN_PIXELS
        inside_x = min(right, x + width + beside) - max(left, x - beside)
        inside_y = min(bottom, y + height + above) - max(top, y - above)
        inside = max(inside_x, 0) * max(inside_y, 0)
        if inside < 0.5 * (right - left) * (bottom - top):
            self.off.append(place)

    def faults(self) -> Iterator[tuple[str, str, list[str]]]:
        """(code, severity, places) of what is beyond its share; masks are not compared with boxes of another unit."""
        units = (
            ("ANN_BBOX_NORMALISED", self.tiny_boxes, self.boxes),
            ("ANN_POLYGON_NORMALISED", self.tiny_masks, self.masks),
        )
        wrong = [
            (code, "error", places)
            for code, places, of in units
            if len(places) >= max(SEVERAL, MOST * of)
        ]
        yield from wrong
        if not wrong and len(self.off) >= SEVERAL and len(self.off) > OFF_WARNING * self.masks:
            yield (
                "ANN_MASK_OFF_BOX",
                "error" if len(self.off) > OFF_ERROR * self.masks else "warning",
                self.off,
            )


def read_json(path: str | Path) -> dict:
    """A COCO annotation file; any Unicode encoding, with or without BOM.  Raises UserError with line and column."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a pipe would never end
            raise UserError(
                f"{path}: not read, it is {kind_of_file(mode)}: put the annotation file there"
            )
        raw = Path(path).read_bytes()
        data = json.loads(raw)
        if isinstance(data, dict):
            return data
        line, column, fault = 1, 1, f"it holds a {type(data).__name__} instead of an object"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # the latter: endless brackets
        before, fault = raw[: getattr(error, "start", 0)], str(error).split(":")[0]
        line = getattr(error, "lineno", before.count(b"\n") + 1)
        column = getattr(error, "colno", len(before) - before.rfind(b"\n"))
    advice = "Was the export or download cut off? Export it again."
    raise UserError(
        f"{path}: line {line}, column {column}: not a COCO annotation file: {fault}. {advice}"
    )


def find_splits(root: str | Path) -> dict[str, tuple[Path, Path]]:
    """Split name -> (annotation file, image folder), of "train", "valid" and "test" those that exist.

    Takes ROOT/{train,valid,test}/_annotations.coco.json, else the standard COCO layout with its newest year.
    Raises UserError where there is neither.
    """
    root, found = Path(root), {}
    for split in ("train", "valid", "test"):
        if (file := root / split / "_annotations.coco.json").exists():
            found[split] = file, file.parent
    for split, short in () if found else (("train", "train"), ("valid", "val"), ("test", "test")):
        for file in sorted((root / "annotations").glob(f"instances_{short}*.json")):
            name = file.stem.removeprefix("instances_")
            for folder in filter(Path.is_dir, (root / "images" / name, root / name)):
                found[split] = file, folder
    if not found:
        names = sorted(entry.name for entry in root.iterdir())[:10] if root.is_dir() else []
        state = f"there is: {', '.join(names) or 'nothing'}" if root.is_dir() else "not a folder"
        raise UserError(
            f"no COCO dataset in {root} ({state}): expected train/_annotations.coco.json beside the images, or "
            "annotations/instances_train2017.json and train2017/. Another folder is named with --dataset"
        )
    return found


def raise_errors(problems: list[Problem], root: str | Path) -> None:
    """Raise one UserError for the first error, with the number of other kinds and the command that lists them."""
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        others = f"; and {len(errors) - 1} more kinds of errors" if len(errors) > 1 else ""
        see = f'To see everything at once run: python validate_setup.py --dataset "{root}"'
        raise UserError(f"{errors[0].message.rstrip('.')}{others}. {see}")


def require_masks(split: CocoSplit) -> None:
    """Print how many of up to 10 sampled annotations have masks, warn where some lack them; UserError if all do."""
    masks = [mask is not None for image in split.images for mask in image.segmentations]
    if not any(masks):
        raise UserError(NO_MASKS.format(split.annotation_file, len(masks)))
    sample = [masks[i] for i in np.linspace(0, len(masks) - 1, min(10, len(masks))).astype(int)]
    tick(f"Validated: {sum(sample)}/{len(sample)} sample annotations contain segmentation masks")
    if lacking := len(masks) - sum(masks):
        warn(
            f"{split.annotation_file}: {lacking} of {len(masks)} annotations have no mask: they give no mask loss"
        )


def placeholders(categories: Iterable[dict], used: set[int]) -> set[tuple[int, str]]:
    """(id, name) of the categories whose id is not in `used` and that are the supercategory of another one."""
    parents = {
        (entry["id"], entry["name"]): str(entry.get("supercategory")) for entry in categories
    }
    children = Counter(parents.values())
    # its own supercategory does not count
    return {
        key
        for key, parent in parents.items()
        if key[0] not in used and children[key[1]] > (parent == key[1])
    }


def is_whole(value: object) -> bool:
    """A whole number that float64 holds exactly: pycocotools keeps ids in such arrays. Excludes true and false."""
    return type(value) is int and abs(value) < 2**53


def _look(
    image: ImageRecord, folder: Path, decode: bool, seen: ImageCache, exif: str
) -> dict[str, str]:
    """Find the image's file and fill in what it tells, as it was seen before where it is still the same file.

    `decode`: as a whole, not the header alone.  exif: as for CocoSplit.  Returns {code: place} of the faults.
    """
    image.path = find_image(folder, image.file_name)
    way = [image.path, *image.path.parents][
        : len(image.path.relative_to(folder).parts) + 1
    ]  # up to the split's folder
    links = {"IMG_LINK": str(image.path)} if any(map(os.path.islink, way)) else {}
    name, stamp = f"{image.file_name} {image.width}x{image.height}", stamp_of(image.path)
    known = seen.get(f"{name} decoded", stamp)
    if not decode and (known is None or "IMG_CORRUPT" in known[0]):  # its header may be sound
        known = seen.get(name, stamp)
    if known is None:
        faults, stored = _open(image, decode)
        known = [faults, image.orientation, stored, image.digest.hex(), image.sample]
        if "IMG_UNREADABLE" not in faults:
            seen.put(name + " decoded" * decode, stamp, known)
    faults, image.orientation, stored, digest, image.sample = known
    image.digest = bytes.fromhex(digest)
    faults = faults | (_settle_size(image, tuple(stored), exif == "apply") if stored else {})
    return links | {code: f"{image.path}{more}" for code, more in faults.items()}


def _open(image: ImageRecord, decode: bool) -> tuple[dict[str, str], tuple[int, int] | None]:
    """Read the image's header, or all of it, and fill in what does not depend on the annotations.

    Returns ({code: what to add to the path} of the faults, (width, height) as stored or None where that is unknown).
    """
    try:
        mode = os.stat(image.path).st_mode
        if not stat.S_ISREG(mode):
            return {"IMG_TYPE": f": {kind_of_file(mode)}"}, None
        with Image.open(image.path, formats=FORMATS) as picture:
            image.orientation, stored = _orientation(picture, (image.width, image.height))
            if decode:
                picture.load()
                image.digest = hashlib.sha256(image.path.read_bytes()).digest()
        image.sample = content_hash(image.path)
        return {}, stored
    except Image.DecompressionBombError:
        return {"IMG_BOMB": ""}, None
    except (
        Exception
    ) as error:  # Pillow's readers raise anything from OSError to struct.error on damaged files
        if getattr(error, "errno", None) in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return {"IMG_MISSING": ""}, None
        if is_passing(error):
            return {"IMG_UNREADABLE": f": {error.strerror}"}, None
        return {"IMG_CORRUPT": f": {error}"}, None


def _orientation(picture: Image.Image, said: tuple[float, float]) -> tuple[int, tuple[int, int]]:
    """(EXIF orientation, 1..8, (width, height) as stored) of an opened image whose annotated size is `said`."""
    if picture.format == "TIFF":  # Pillow turns it while it loads
        orientation, stored = (
            picture.tag_v2.get(ORIENTATION, 1),
            tuple(picture.tag_v2[tag] for tag in TIFF_SIDES),
        )
    else:
        orientation, stored = 1, picture.size
        packets = str(picture.info.get("xmp", "")) + str(picture.info.get("XML:com.adobe.xmp", ""))
        # For a PNG without EXIF in front of its pixels getexif() decodes them all.
        if "exif" in picture.info or "tiff:Orientation" in packets or said != stored:
            try:
                orientation = picture.getexif().get(ORIENTATION, 1)
            except Exception as error:  # damaged EXIF in a sound image
                if is_passing(error):
                    raise
    return orientation if orientation in range(2, 9) else 1, stored


def _settle_size(image: ImageRecord, stored: tuple[int, int], apply: bool) -> dict[str, str]:
    """Set an image's size, and whether its orientation counts; `apply`: what holds where its size does not tell."""
    said = image.width, image.height
    turned = stored[::-1] if image.orientation >= 5 else stored
    if image.orientation > 1 and turned != stored and said in (stored, turned):
        image.exif_proof = said == turned
    image.exif = image.orientation > 1 and (apply if image.exif_proof is None else image.exif_proof)
    image.width, image.height = turned if image.exif else stored
    if said in (stored, turned, (inf, inf)):
        return {}
    return {"IMG_SIZE": f": {said[0]}x{said[1]}, the file has {image.width}x{image.height}"}


def _number_fault(values: list, limit: float = LIMIT) -> str | None:
    """ "TYPE" where something is no number, "NAN" where one is not finite or absurd.  `values` is not empty."""
    if not set(map(type, values)) <= NUMBERS:
        return "TYPE"
    # comparisons alone may miss NaN, a sum does not
    sound = -limit <= min(values) and max(values) <= limit and sum(values) == sum(values)
    return None if sound else "NAN"


def clip_box(
    entry: dict, right: float, bottom: float
) -> tuple[tuple[float, float, float, float] | None, str | None]:
    """(xyxy box inside the image, or None where the annotation falls out; fault code, if any)."""
    box, area = entry.get("bbox"), entry.get("area")
    fault = _number_fault(box) if type(box) is list and len(box) == 4 else "TYPE"
    if fault:
        return None, f"ANN_BBOX_{fault}"
    x, y, w, h = box
    if w < THINNEST or h < THINNEST:
        return None, "ANN_BBOX_EMPTY"
    if type(area) in (int, float) and area <= 0:
        return None, "ANN_AREA_EMPTY"
    clipped = max(x, 0), max(y, 0), min(x + w, right), min(y + h, bottom)
    if clipped[2] - clipped[0] < THINNEST or clipped[3] - clipped[1] < THINNEST:
        return None, "ANN_BBOX_OUTSIDE"
    stands_out = max(-x, -y, x + w - right, y + h - bottom) > SLACK
    return clipped, "ANN_BBOX_CLIPPED" if stands_out else None


def usable_part(
    segmentation: object, width: float, height: float, sums: dict[str, int]
) -> tuple[list | dict | None, set[str | None], tuple | None]:
    """(the sound part of a segmentation, None if nothing is; fault codes; of polygons left, top, right, bottom).

    sums: run_sums of the RLEs.
    """
    if not segmentation:
        return None, set(), None
    if not isinstance(segmentation, list):
        fault = _rle_fault(segmentation, width, height, sums)
        return (None if fault else segmentation), {fault}, None
    far = 2 * max(width, height)
    judged = [_judge_polygon(polygon, far) for polygon in segmentation]
    sound = [polygon for polygon, (fault, _) in zip(segmentation, judged) if not fault]
    faults = {fault for fault, _ in judged}
    extents = [extent for _, extent in judged if extent]
    if len(extents) > 1:
        lefts, tops, rights, bottoms = zip(*extents)
        extents = [(min(lefts), min(tops), max(rights), max(bottoms))]
    return sound or None, faults, extents[0] if extents else None


def _judge_polygon(polygon: object, far: float) -> tuple[str | None, tuple | None]:
    """(fault code, None) or (None, (left, top, right, bottom))."""
    if type(polygon) is not list:
        return "ANN_SEG_TYPE", None
    if len(polygon) % 2:
        return "ANN_POLYGON_ODD", None
    if len(polygon) < 6:  # pycocotools would take 4 numbers for a box
        return "ANN_POLYGON_SHORT", None
    if not set(map(type, polygon)) <= NUMBERS:
        return "ANN_SEG_TYPE", None
    xs = polygon[::2]
    ys = polygon[1::2]
    extent = left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    low = left if left < top else top
    high = right if right > bottom else bottom
    # comparisons alone may miss NaN, a sum does not
    if not (-LIMIT <= low and high <= LIMIT) or (total := sum(polygon)) != total:
        return "ANN_SEG_NAN", None
    # pycocotools walks along every edge, which takes gigabytes for one that leads millions of pixels away
    if high > far or low < -far:
        return "ANN_POLYGON_FAR", None
    return None, extent


def _rle_fault(rle: object, width: float, height: float, sums: dict[str, int]) -> str | None:
    if not isinstance(rle, dict):
        return "ANN_SEG_TYPE"
    size, runs, known = rle.get("size"), rle.get("counts"), (height, width)
    sound = (
        type(size) is list and len(size) == 2 and all(is_whole(side) and side > 0 for side in size)
    )
    if not sound or any(theirs not in (own, inf) for own, theirs in zip(size, known)):
        return "ANN_RLE_SIZE"
    if type(runs) is str:
        total = sums[runs]
    elif type(runs) is not list or any(type(run) is not int for run in runs):
        return "ANN_RLE_TYPE"
    else:
        total = sum(runs) if min(runs, default=-1) >= 0 and 0 not in runs[1:-1] else -1
    return None if total == size[0] * size[1] else "ANN_RLE_COUNTS"


def run_sums(texts: list[str], at_once: int = 1000) -> dict[str, int]:
    """text -> sum of the runs of that compressed COCO RLE; -1 where it is none, or a run is negative or empty.

    Empty runs (the first and the last may be) make pycocotools' merge write beyond its memory.
    """
    sums = dict.fromkeys(texts, -1)
    whole = [
        text for text in sums if text.isascii() and "0" <= text[-1:] <= "O"
    ]  # the last number ends
    for part in (whole[i : i + at_once] for i in range(0, len(whole), at_once)):
        runs, first, wrong = _decode_runs(part)
        wrong |= runs < 0
        inside = np.ones(len(runs), dtype=bool)
        inside[first] = inside[first - 1] = False  # -1: the last of the text before
        wrong |= (runs == 0) & inside
        totals = np.where(np.logical_or.reduceat(wrong, first), -1, np.add.reduceat(runs, first))
        sums |= zip(part, totals.tolist())
    return sums


def _decode_runs(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the runs of all these compressed RLEs, where each text's first one is, which runs no RLE may have).

    Numbers of 5 bits a character, lowest first, offset 48; bit 5: goes on; bit 4 of the last: sign. From the fourth on
    a number is the difference to the run two before.  Source of the format: pycocotools' maskApi.c, rleFrString.
    """
    chars = np.frombuffer("".join(texts).encode(), np.uint8) - np.uint8(
        48
    )  # what is below 48 comes out above 63
    ends = np.flatnonzero(chars < 32)
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    shift = 5 * (np.arange(len(chars)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((chars & 31).astype(np.int64) << np.minimum(shift, 30), starts)
    runs -= (chars[ends] >> 4 & 1).astype(np.int64) << np.minimum(5 * lengths, 30)
    first = np.append(0, np.searchsorted(ends, np.cumsum([len(text) for text in texts]))[:-1])
    place = np.arange(len(runs)) - np.repeat(
        first, np.diff(np.append(first, len(runs)))
    )  # in its own text
    for start in (
        1,
        2,
    ):  # every other run of a text, from this one on, is the sum of those up to it
        chain = np.flatnonzero((place >= start) & (place % 2 == start % 2))
        begins = np.flatnonzero(place[chain] == start)
        totals = np.cumsum(runs[chain])
        before = totals[begins] - runs[chain[begins]]
        runs[chain] = totals - np.repeat(before, np.diff(np.append(begins, len(chain))))
    # 30 bits: the C code's shifts hold no more
    wrong = (lengths > 6) | (np.maximum.reduceat(chars, starts) > 63)
    return runs, first, wrong


def rle_extents(rles: list[dict], at_once: int = 1000) -> list[tuple[int, int, int, int] | None]:
    """(left, top, right, bottom) in pixels of each sound RLE; None where no pixel is set."""
    extents: list[tuple | None] = [None] * len(rles)
    packed = [index for index, rle in enumerate(rles) if type(rle["counts"]) is str]
    plain = [index for index, rle in enumerate(rles) if type(rle["counts"]) is not str]
    for kind, numbers in ((str, packed), (list, plain)):
        for part in (numbers[i : i + at_once] for i in range(0, len(numbers), at_once)):
            counts = [rles[index]["counts"] for index in part]
            if kind is str:
                runs, first, _ = _decode_runs(counts)
            else:
                runs = np.concatenate([np.array(one, np.int64) for one in counts])
                first = np.cumsum([0, *map(len, counts[:-1])])
            heights = np.array([rles[index]["size"][0] for index in part])
            for index, extent in zip(part, _extents(runs, first, heights)):
                extents[index] = tuple(extent) if extent[0] < extent[2] else None
    return extents


def _extents(runs: np.ndarray, first: np.ndarray, heights: np.ndarray) -> list[list[int]]:
    """[left, top, right, bottom] around the set pixels of RLEs, whose runs go down the columns; left > right: none.

    runs: of all of them; first: where each one's begin; heights: of their images.
    """
    lengths = np.diff(np.append(first, len(runs)))
    ends = np.cumsum(runs)
    ends -= np.repeat(ends[first] - runs[first], lengths)
    starts = ends - runs
    height = np.repeat(heights, lengths)
    set_runs = ((np.arange(len(runs)) - np.repeat(first, lengths)) % 2 == 1) & (runs > 0)
    left = starts // height
    right = (ends - 1) // height
    several = right > left  # columns
    top = np.where(several, 0, starts - left * height)
    bottom = np.where(several, height, ends - right * height)
    far = np.iinfo(np.int64).max
    lows = [np.minimum.reduceat(np.where(set_runs, side, far), first) for side in (left, top)]
    highs = [
        np.maximum.reduceat(np.where(set_runs, side, -1), first) for side in (right + 1, bottom)
    ]
    return np.stack([*lows, *highs], axis=1).tolist()
