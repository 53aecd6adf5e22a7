"""Tiny datasets written by hand or changed as messy ones are, and what the checks say of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from rfdetr.data.coco import inspect_dataset
from rfdetr.data.layout import ANNOTATIONS

WIDTH = 40
HEIGHT = 30
SQUARE = [[4, 5, 14, 5, 14, 13, 4, 13]]


def coco(images: int = 2) -> dict:
    """A sound file: one cell in every image, the vessel in the first one too."""
    entry = {"bbox": [4, 5, 10, 8], "area": 80, "iscrowd": 0, "segmentation": SQUARE}
    annotations = [{"id": n, "image_id": n, "category_id": 1} | entry for n in range(1, images + 1)]
    beside = {"bbox": [20, 5, 10, 8], "segmentation": [[20, 5, 30, 5, 30, 13, 20, 13]]}
    annotations.append({"id": 50, "image_id": 1, "category_id": 2} | entry | beside)
    return {
        "images": [
            {"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT}
            for n in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "vessel"}],
    }


def write(folder: Path, data: dict, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    """Annotations, and an image of `size` (width, height) in one colour for each entry."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(data["images"]):
        image = Image.new("RGB", size, (number % 256, ord(folder.name[0]), number // 256))
        image.save(folder / Path(entry["file_name"]).name)
    file = folder / ANNOTATIONS
    file.write_text(json.dumps(data), encoding="utf-8")
    return file


def rewrite(file: Path, change) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def changed_copy(data: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a dataset with the annotations of each split changed; returns `folder`."""
    shutil.copytree(data, folder)
    for file in folder.glob(f"*/{ANNOTATIONS}"):
        content = json.loads(file.read_text(encoding="utf-8"))
        change(content)
        file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def drop_masks(content: dict) -> None:
    for annotation in content["annotations"]:
        del annotation["segmentation"]


def codes(root: Path, **options) -> dict[str, str]:
    """{code: severity} of all problems of a dataset."""
    return {problem.code: problem.severity for problem in inspect_dataset(root, **options)[1]}
