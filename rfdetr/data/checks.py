"""Checks of an annotation file and its images, in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import inf
from pathlib import Path

from tqdm.contrib.concurrent import thread_map

from rfdetr.console import is_control, printable
from rfdetr.data.annotations import LIMIT, Frames, _number_fault, clip_box, is_whole, usable_part
from rfdetr.data.faults import CODES, NOUNS, Problem
from rfdetr.data.image_cache import ImageCache
from rfdetr.data.image_files import _look, stays_inside
from rfdetr.data.layout import read_json
from rfdetr.data.records import ImageRecord
from rfdetr.data.rle import rle_extents, run_sums


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
