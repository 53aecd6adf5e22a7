"""A COCO dataset written out in the other forms that convert_dataset.py reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from rfdetr.data.layout import ANNOTATIONS
from rfdetr.masks import to_rle

VAL = {"train": "train", "valid": "val", "test": "test"}  # names that other forms use


def read_coco(root: Path) -> Iterator[tuple[str, dict, list[dict], list[str]]]:
    """(split, image, its annotations with their class's "name", all classes) of each image."""
    for file in sorted(root.glob(f"*/{ANNOTATIONS}")):
        data = json.loads(file.read_text(encoding="utf-8"))
        names = {entry["id"]: entry["name"] for entry in data["categories"]}
        for image in data["images"]:
            objects = [a for a in data["annotations"] if a["image_id"] == image["id"]]
            for entry in objects:
                entry["name"] = names[entry["category_id"]]
            yield file.parent.name, image, objects, list(names.values())


def place_image(root: Path, split: str, image: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(root / split / image["file_name"], folder))


def xyxy(entry: dict) -> list[float]:
    x, y, w, h = entry["bbox"]
    return [x, y, x + w, y + h]


def mask_of(entry: dict, image: dict) -> np.ndarray:
    """(H, W) bool."""
    rle = to_rle(entry["segmentation"], image["height"], image["width"])
    return mask_api.decode(rle).astype(bool)


def painted(objects: list[dict], image: dict) -> np.ndarray:
    """(H, W) numbers of objects from 1 on; where two overlap, the later one's."""
    numbers = np.zeros((image["height"], image["width"]), np.uint16)
    for number, entry in enumerate(objects, start=1):
        numbers[mask_of(entry, image)] = number
    return numbers


def write_yolo(root: Path, out: Path, outlines: bool = True, described: bool = True) -> Path:
    """images/train/a.png and labels/train/a.txt; described: with a data.yaml."""
    for split, image, objects, names in read_coco(root):
        place_image(root, split, image, out / "images" / VAL[split])
        lines = [yolo_line(entry, image, names, outlines) for entry in objects]
        file = out / "labels" / VAL[split] / f"{Path(image['file_name']).stem}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        if lines:  # an image without objects has no file
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if described:
        lines = [f"{name}: images/{name}" for name in VAL.values()]
        lines.append(f"names: {json.dumps(names)}")
        (out / "data.yaml").write_text("\n".join(lines), encoding="utf-8")
    else:
        (out / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    return out


def yolo_line(entry: dict, image: dict, names: list[str], outlines: bool) -> str:
    sides = image["width"], image["height"]
    if outlines:
        (numbers,) = entry["segmentation"]
    else:
        x, y, w, h = entry["bbox"]
        numbers = [x + w / 2, y + h / 2, w, h]
    shares = [f"{number / sides[index % 2]:.7f}" for index, number in enumerate(numbers)]
    return " ".join([str(names.index(entry["name"])), *shares])


def write_voc(root: Path, out: Path) -> Path:
    """The development kit's folders, with boxes that count from 1, masks and lists.

    All images lie in one of them: the split stands in front of their names.
    """
    for split, image, objects, _ in read_coco(root):
        stem = f"{split}_{Path(image['file_name']).stem}"
        file = place_image(root, split, image, out / "JPEGImages")
        file.rename(file.with_stem(stem))
        put(out / "Annotations" / f"{stem}.xml", voc_xml(image, objects, first=1))
        save_palette(painted(objects, image), out / "SegmentationObject" / f"{stem}.png")
        with open(make(out / "ImageSets" / "Main") / f"{VAL[split]}.txt", "a") as file:
            file.write(f"{stem}\n")
    return out


def write_voc_beside(root: Path, out: Path) -> Path:
    """As Roboflow exports: train/a.png and train/a.xml, boxes that count from 0."""
    for split, image, objects, _ in read_coco(root):
        file = place_image(root, split, image, out / split)
        put(file.with_suffix(".xml"), voc_xml(image, objects, first=0))
    return out


def voc_xml(image: dict, objects: list[dict], first: int) -> str:
    """first: what the first pixel is called; boxes include their last one where that is 1."""
    source = "PASCAL VOC2007" if first else "roboflow"
    width, height = image["width"], image["height"]
    text = f"<annotation><filename>{image['file_name']}</filename>"
    text += f"<source><annotation>{source}</annotation></source>"
    text += f"<size><width>{width}</width><height>{height}</height></size>"
    for entry in objects:
        left, top, right, bottom = xyxy(entry)
        text += f"<object><name>{entry['name']}</name><difficult>0</difficult><bndbox>"
        text += f"<xmin>{left + first}</xmin><ymin>{top + first}</ymin>"
        text += f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
    return text + "</annotation>"


def write_labelme(root: Path, out: Path) -> Path:
    for split, image, objects, _ in read_coco(root):
        file = place_image(root, split, image, out / VAL[split])
        shapes = []
        for entry in objects:
            points = np.reshape(entry["segmentation"][0], (-1, 2)).tolist()
            shapes.append({"label": entry["name"], "points": points, "shape_type": "polygon"})
        put(file.with_suffix(".json"), json.dumps(labelme(image, shapes)))
    return out


def labelme(image: dict, shapes: list[dict]) -> dict:
    size = {"imageWidth": image["width"], "imageHeight": image["height"]}
    return {"version": "5.4.1", "shapes": shapes, "imagePath": image["file_name"]} | size


def write_masks(root: Path, out: Path) -> Path:
    """images/train/a.png and masks/train/a.tif with the numbers of objects in 16 bits."""
    for split, image, objects, _ in read_coco(root):
        file = place_image(root, split, image, out / "images" / VAL[split])
        target = make(out / "masks" / VAL[split]) / f"{file.stem}.tif"
        Image.fromarray(painted(objects, image) * 300).save(target)
    return out


def write_bowl(root: Path, out: Path) -> Path:
    """As in the Data Science Bowl 2018: train/ID/images/ID.png, train/ID/masks/*.png."""
    for split, image, objects, _ in read_coco(root):
        folder = out / VAL[split] / Path(image["file_name"]).stem
        place_image(root, split, image, folder / "images")
        for number, entry in enumerate(objects):
            pixels = mask_of(entry, image).astype(np.uint8) * 255
            Image.fromarray(pixels).save(make(folder / "masks") / f"object{number:03}.png")
    return out


def save_palette(numbers: np.ndarray, target: Path) -> None:
    """A mask of VOC: indices of a palette, where a border of 255 parts objects from the ground."""
    image = Image.fromarray(numbers.astype(np.uint8), "P")
    image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    make(target.parent)
    image.save(target)


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def put(file: Path, text: str) -> None:
    make(file.parent)
    file.write_text(text, encoding="utf-8")
