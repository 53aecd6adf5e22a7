"""convert_dataset.py: other forms of datasets become COCO, whole or not at all."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_api

import convert_dataset
import validate_setup
from rfdetr.cli import require_files
from rfdetr.console import UserError, run_script
from rfdetr.data.coco import inspect_dataset, read_dataset
from rfdetr.data.formats.detect import find_form
from rfdetr.data.formats.source import Notes
from rfdetr.data.formats.voc import colour, match
from rfdetr.data.formats.yolo import YoloReader
from rfdetr.data.layout import ANNOTATIONS, find_splits
from rfdetr.masks import to_rle
from rfdetr.tool_settings import ConvertSettings
from testkit.forms import (
    labelme,
    make,
    painted,
    put,
    read_coco,
    voc_xml,
    write_bowl,
    write_labelme,
    write_masks,
    write_voc,
    write_voc_beside,
    write_yolo,
)

SIDE = {"width": 40, "height": 30}
IMAGE = {"file_name": "a.png", **SIDE}
BOX = {"name": "cell", "bbox": [4, 5, 10, 8]}


@pytest.fixture
def convert(call, capsys, tmp_path):
    """convert(root, *flags) -> (the new dataset's folder, what was printed)."""

    def run(root: Path, *flags: object) -> tuple[Path, str]:
        capsys.readouterr()
        call(convert_dataset.main, "--input", root, "--output", "coco", *flags)
        return tmp_path / "coco", capsys.readouterr().out

    return run


@pytest.fixture
def refused(convert, tmp_path):
    """refused(root, *flags) -> the error's text; nothing is left behind."""

    def run(root: Path, *flags: object) -> str:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError) as error:
            convert(root, *flags)
        assert sorted(tmp_path.iterdir()) == before
        return str(error.value)

    return run


def picture(file: Path, size: tuple[int, int] = (40, 30), **options: object) -> Path:
    make(file.parent)
    Image.new("RGB", size, (len(file.as_posix()) % 256, 90, 90)).save(file, **options)
    return file


def objects_of(root: Path, split: str = "train") -> list[dict]:
    data = json.loads((root / split / ANNOTATIONS).read_text(encoding="utf-8"))
    names = {entry["id"]: entry["name"] for entry in data["categories"]}
    return [{**entry, "name": names[entry["category_id"]]} for entry in data["annotations"]]


def images_of(root: Path, split: str = "train") -> list[dict]:
    return json.loads((root / split / ANNOTATIONS).read_text(encoding="utf-8"))["images"]


def iou(one: object, other: object, is_crowd: int = 0) -> float:
    """Of two boxes (xywh) or two masks (RLE)."""
    return float(mask_api.iou([one], [other], [is_crowd])[0, 0])


# ---------------------------------------------------------------- there and back


def require_same(original: Path, converted: Path, masks: bool, name: str | None = None) -> None:
    """Every object is there again, with its class (or `name`), its box and its mask."""
    ours = {(split, image["file_name"]): rest for split, image, *rest in read_coco(converted)}
    for split, image, objects, _ in read_coco(original):
        found, _ = ours.pop((split, image["file_name"]))
        assert len(found) == len(objects)
        for entry, other in zip(objects, found):
            assert other["name"] == (name or entry["name"])
            assert other["bbox"] == pytest.approx(entry["bbox"], abs=1e-3)
            if masks:
                size = image["height"], image["width"]
                rles = [to_rle(one["segmentation"], *size) for one in (entry, other)]
                assert iou(*rles) >= 0.95
                assert other["area"] == pytest.approx(entry["area"], rel=0.2, abs=8)
            else:
                assert other["segmentation"] == []
    assert not ours


def require_painted(original: Path, converted: Path) -> None:
    """Every mask is, pixel by pixel, what the image of numbers shows of its object."""
    ours = {(split, image["file_name"]): rest for split, image, *rest in read_coco(converted)}
    for split, image, objects, _ in read_coco(original):
        found, _ = ours.pop((split, image["file_name"]))
        numbers = painted(objects, image)
        masks = [mask_api.decode(entry["segmentation"]) for entry in found]
        assert len(masks) == len(np.unique(numbers)) - 1
        for number in np.unique(numbers)[1:]:
            assert any(np.array_equal(mask, numbers == number) for mask in masks)
    assert not ours


@pytest.mark.parametrize(
    "write, form, masks",
    [
        (write_yolo, "yolo", True),
        (lambda *places: write_yolo(*places, described=False), "yolo", True),
        (lambda *places: write_yolo(*places, outlines=False), "yolo", False),
        (write_voc_beside, "voc", False),
        (write_labelme, "labelme", True),
    ],
    ids=["yolo", "yolo without yaml", "yolo boxes", "voc beside", "labelme"],
)
def test_there_and_back(write: Callable, form: str, masks: bool, few, convert, tmp_path):
    root = write(few, tmp_path / "theirs")
    assert find_form(root) == form
    converted, said = convert(root)
    require_same(few, converted, masks)
    problems = inspect_dataset(converted, decode=True)[1]
    assert {problem.code for problem in problems} <= {"ANN_NO_MASK"}
    assert said.splitlines()[-1] == "Next:  python validate_setup.py --dataset coco"
    assert "warning" not in said


@pytest.mark.parametrize("names", ["[1, yes, null]", "{0: 1, 1: yes, 2: null}"])
def test_yolo_names_are_what_is_written(names, convert, tmp_path):
    lines = "0 .5 .5 .5 .5\n1 .3 .3 .2 .2\n2 .3 .3 .2 .2"
    converted, _ = convert(yolo(tmp_path / "theirs", lines, f"names: {names}"))
    assert {entry["name"] for entry in objects_of(converted)} == {"1", "yes", "null"}


def test_yolo_classes_of_one_name_are_told(convert, tmp_path):
    root = yolo(tmp_path / "theirs", "0 .5 .5 .5 .5\n2 .3 .3 .2 .2", "names: [a, b, a]")
    said = convert(root)[1]
    words = "names of several class numbers, whose objects become one class: 1 "
    assert words + "(data.yaml: 'a' is 0 and 2)" in said


def test_a_yolo_class_number_is_its_line(convert, tmp_path):
    root = yolo(tmp_path / "theirs", "0 .5 .5 .5 .5\n1 .3 .3 .2 .2\n2 .3 .3 .2 .2")
    (root / "data.yaml").unlink()
    put(root / "classes.txt", "car\n\ndog\n\n")
    converted, said = convert(root)
    assert [entry["name"] for entry in objects_of(converted)] == ["car", "class_1", "dog"]
    assert "objects of a class that has a number only (classes.txt names 2 classes" in said


def test_yolo_names_that_differ_in_blanks_alone_are_told(convert, tmp_path):
    lines = "0 .5 .5 .5 .5\n1 .3 .3 .2 .2"
    said = convert(yolo(tmp_path / "theirs", lines, 'names: ["red cell", "red  cell"]'))[1]
    assert "whose objects become one class: 1 (data.yaml: 'red cell' is 0 and 1)" in said


def test_numbers_in_16_bits_there_and_back(few, convert, tmp_path):
    converted, said = convert(write_masks(few, tmp_path / "theirs"), "--class_name", "nucleus")
    require_painted(few, converted)
    assert {entry["name"] for entry in objects_of(converted)} == {"nucleus"}
    assert "--class_name" not in said
    assert not inspect_dataset(converted, decode=True)[1]


def test_a_mask_an_object_there_and_back(few, convert, tmp_path):
    root = write_bowl(few, tmp_path / "theirs")
    assert find_form(root) == "masks"
    converted, said = convert(root)
    assert "all is 'object' (--class_name NAME)" in said
    for split, image, objects, _ in read_coco(few):
        name = image["file_name"]
        entry = next((i for i in images_of(converted, split) if i["file_name"] == name), None)
        if not objects:  # no folder of masks: nobody looked
            assert entry is None
            continue
        found = [one for one in objects_of(converted, split) if one["image_id"] == entry["id"]]
        rles = [to_rle(o["segmentation"], image["height"], image["width"]) for o in objects]
        assert [iou(one, o["segmentation"]) for one, o in zip(rles, found)] == [1] * len(objects)


def test_the_development_kit_there_and_back(few, convert, tmp_path):
    root = write_voc(few, tmp_path / "VOC2007")
    assert find_form(root) == "voc" == find_form(tmp_path)
    converted, said = convert(root)
    assert not inspect_dataset(converted, decode=True)[1]
    ours = {(split, image["file_name"]): rest for split, image, *rest in read_coco(converted)}
    for split, image, objects, _ in read_coco(few):
        found, _ = ours[split, f"{split}_{image['file_name']}"]
        numbers = painted(objects, image)
        for number, (entry, other) in enumerate(zip(objects, found), start=1):
            assert other["name"] == entry["name"]
            assert other["bbox"] == pytest.approx(entry["bbox"], abs=1e-3)
            if (numbers == number).sum() > 0.8 * entry["area"]:  # hardly covered by others
                mask = mask_api.decode(other["segmentation"])
                assert np.array_equal(mask, numbers == number)


def test_validate_setup_takes_what_was_converted(few, convert, call, capsys, tmp_path):
    _, said = convert(write_yolo(few, tmp_path / "theirs"))
    python, script, *words = shlex.split(said.splitlines()[-1].removeprefix("Next:  "))
    assert script == "validate_setup.py"
    call(validate_setup.main, *words, "--size", "tiny", "--device", "cpu")
    assert "Stage 2 and single stage (masks) are possible" in capsys.readouterr().out


side = st.floats(0, 1).map(lambda value: round(value, 6))


@given(st.lists(st.tuples(st.integers(0, 9), side, side, side, side), max_size=5), st.data())
def test_any_yolo_line_there_and_back(tmp_path_factory, rows, data):
    root = tmp_path_factory.mktemp("yolo")
    width, height = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    picture(root / "images/a.png", (width, height))
    lines = [f"{label} {' '.join(map(repr, row))}" for label, *row in rows]
    put(root / "labels/a.txt", "\r\n".join(lines))
    reader = YoloReader(root, None, Notes(root))
    (item,) = reader.splits["train"]
    image = reader.read(item)
    assert (image.width, image.height, len(image.objects)) == (width, height, len(rows))
    for entry, (label, x, y, w, h) in zip(image.objects, rows):
        left, top, right, bottom = entry.box
        assert entry.name == f"class_{label}"
        centre_and_sides = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        shares = np.divide(centre_and_sides, [width, height] * 2)
        assert shares == pytest.approx([x, y, w, h], abs=1e-9)


# ---------------------------------------------------------------- YOLO


def yolo(root: Path, text: str = "0 .5 .5 .5 .5", yaml: str = "names: [cell]") -> Path:
    picture(root / "images/train/a.png")
    put(root / "labels/train/a.txt", text)
    put(root / "data.yaml", f"train: images/train\n{yaml}")
    return root


@pytest.mark.parametrize(
    "described",
    [
        "names: {0: cell, 2: vessel}\ntrain: images/train",
        "names: [cell]\ntrain: [images/train]",
        "names: [cell]\npath: images\ntrain: train",
        "names: [cell]\npath: /content/somewhere\ntrain: images/train",
        "names: [cell]\ntrain: ../images/train\nval: ../valid/images",  # Roboflow's
        "names: [cell]\npath: .\ntrain: lists/train.txt",
        "names: [cell]\ntrain: {root}/images/train",
    ],
)
def test_ways_to_say_where_the_images_lie(described, convert, tmp_path):
    root = yolo(tmp_path / "theirs")
    put(root / "data.yaml", described.replace("{root}", str(root)))
    put(root / "lists/train.txt", "./images/train/a.png\n\n../images/train/a.png\n")
    converted, said = convert(root)
    assert [entry["bbox"] for entry in objects_of(converted)] == [[10, 7.5, 20, 15]]
    assert len(images_of(converted)) == 1
    assert "--val_fraction 0.1" in said.splitlines()[-1]


def test_the_yaml_itself_may_be_given(convert, tmp_path):
    root = yolo(tmp_path / "theirs")
    put(root / "other.yaml", "train: images/train\nnames: [nucleus]")
    converted, _ = convert(root / "other.yaml")
    assert [entry["name"] for entry in objects_of(converted)] == ["nucleus"]


def test_a_split_that_the_yaml_names_wrongly_is_found_by_its_folders_name(convert, tmp_path):
    root = yolo(tmp_path / "theirs", yaml="val: ../valid/images\nnames: [cell]")
    for split in ("val", "test"):
        picture(root / f"images/{split}/b.png")
        put(root / f"labels/{split}/b.txt", "0 .5 .5 .5 .5")
    converted, said = convert(root)
    assert "do not exist: 1 (data.yaml: val: ../valid/images)" in said
    assert "images of valid, taken from the folder of that name: 1 (images/val/b.png)" in said
    assert len(images_of(converted, "valid")) == 1
    assert "images of test, which data.yaml does not name, left out: 1 (images/test/b.png)" in said
    assert not (converted / "test").exists()


def test_a_train_split_that_is_not_there_is_an_error(refused, tmp_path):
    root = yolo(tmp_path / "theirs")
    put(root / "data.yaml", "train: nowhere\nval: images/train")
    assert "train: nowhere: there are no images" in refused(root)


@pytest.mark.parametrize("entry", ["../outside", "{outside}", "lists.txt"])
def test_nothing_outside_is_read(entry, refused, tmp_path):
    outside = picture(tmp_path / "outside/b.png")
    root = yolo(tmp_path / "theirs")
    put(root / "lists.txt", str(outside))
    put(root / "data.yaml", f"train: {entry.replace('{outside}', str(outside.parent))}")
    said = refused(root)
    assert "outside" in said and "--input" in said


@pytest.mark.parametrize(
    "text, reason",
    [
        ("0 .5 .5 .5", "4 numbers"),
        ("0 .5 .5 .5 .5 .9", "6 numbers"),
        ("0 .5 .5 nan .5", "nan is not in 0..1"),
        ("0 .5 .5 1e999 .5", "inf is not"),
        ("0 12 20 31 14", "12.0 is not in 0..1"),
        ("cell .5 .5 .5 .5", "could not convert"),
        ("-1 .5 .5 .5 .5", "no class number"),
        ("0.5 .5 .5 .5 .5", "no class number"),
        (b"\xff\xfe\x00", "no UTF-8"),
    ],
)
def test_damaged_labels_leave_their_image_out(text, reason, convert, tmp_path):
    root = yolo(tmp_path / "theirs")
    for name in "bcde":
        picture(root / f"images/train/{name}.png")
        content = text if isinstance(text, bytes) else f"\n{text}\n".encode()
        (root / f"labels/train/{name}.txt").write_bytes(content)
    picture(root / "images/train/z.png")  # without a .txt: shows nothing
    converted, said = convert(root)
    assert [entry["file_name"] for entry in images_of(converted)] == ["a.png", "z.png"]
    assert "left out: 4 (" in said and reason in said
    assert "d.png" in said and "e.png" not in said


def test_nothing_usable_is_an_error_of_one_paragraph(refused, tmp_path):
    said = refused(yolo(tmp_path / "theirs", "what"))
    assert "no usable image" in said and "Nothing is written" in said and "\n" not in said
    empty = yolo(tmp_path / "empty", "")
    assert "images without any object" in refused(empty)


def test_classes_without_a_name_are_called_by_their_number(convert, tmp_path):
    root = yolo(tmp_path / "theirs", "7 .5 .5 .5 .5\n0 .5 .5 .2 .2")
    put(root / "labels/train/b.txt", "7 .5 .5 .5 .5\n7 .5")  # damaged: left out with its image
    picture(root / "images/train/b.png")
    converted, said = convert(root)
    assert [entry["name"] for entry in objects_of(converted)] == ["class_7", "cell"]
    line = (
        "objects of a class that has a number only (data.yaml names 1 class; it is kept as one "
        "more: name it there or delete its lines, and convert again; or let --rename join it to "
        "another later): 1 (labels/train/a.txt: "
    )
    assert line in said
    joined = read_dataset(converted, rename=["class_7=cell"], needed=["train"])
    assert joined["train"].class_names == ["cell"]


def test_classes_of_which_none_has_a_name_are_told_how_to_get_one(convert, tmp_path):
    picture(tmp_path / "theirs/images/a.png")
    put(tmp_path / "theirs/labels/a.txt", "3 .5 .5 .5 .5")
    converted, said = convert(tmp_path / "theirs")
    assert [entry["name"] for entry in objects_of(converted)] == ["class_3"]
    assert "a class that has a number only (names in classes.txt would name it; so does --" in said


@pytest.mark.parametrize("is_described", [True, False])
def test_labels_without_an_image_are_told(is_described, convert, tmp_path):
    root = yolo(tmp_path / "theirs")
    picture(root / "images/val/b.PNG")
    put(root / "labels/train/classes.txt", "cell")
    put(root / "labels/train/gone.txt", "0 .5 .5 .5 .5")
    put(root / "labels/train/empty.txt", "")
    put(root / "labels/val/B.txt", "0 .5 .5 .5 .5")
    put(root / "labels/test/gone too.txt", "0 .5 .5 .5 .5")
    if not is_described:
        (root / "data.yaml").unlink()
    _, said = convert(root)
    gone = "images that are missing, left out: 2 (labels/test/gone too.txt; labels/train/gone.txt)"
    assert gone in said


def test_labels_beside_images_without_one_are_told(convert, tmp_path):
    root = tmp_path / "theirs"
    picture(root / "a.png")
    put(root / "a.txt", "0 .5 .5 .5 .5")
    put(root / "gone.txt", "0 .5 .5 .5 .5")
    put(root / "README.txt", "2024 was the year")
    assert "images that are missing, left out: 1 (gone.txt)" in convert(root)[1]


def test_masks_without_an_image_are_told(convert, tmp_path):
    root = tmp_path / "theirs"
    picture(root / "train/images/a.png")
    picture(root / "one/images/c.png")
    for name in ("train/masks/a", "train/masks/b", "one/masks/1", "one/masks/2", "two/masks/1"):
        make((root / name).parent)
        numbers = np.zeros((30, 40), np.uint8)
        numbers[5:10, 5:10] = 1
        Image.fromarray(numbers).save(root / f"{name}.png")
    _, said = convert(root)
    assert "images that are missing, left out: 1 (train/masks/b.png)" in said
    assert "folders of masks without an image, left out: 1 (two/masks)" in said


@pytest.mark.parametrize("other, told", [("CELL", True), ("cell 2", False)])
def test_classes_that_differ_in_case_alone_are_told(other, told, convert, tmp_path):
    text = "0 .5 .5 .5 .5\n0 .2 .2 .1 .1\n1 .5 .5 .2 .2"
    _, said = convert(yolo(tmp_path / "theirs", text, f"names: [cell, {other}]"))
    assert ('every later one: --rename "CELL=cell"' in said) == told


def test_of_a_dataset_of_poses_the_boxes_are_taken(convert, tmp_path):
    root = yolo(tmp_path / "theirs", "0 .5 .5 .5 .5 .1 .1 2", "names: [cell]\nkpt_shape: [1, 3]")
    (entry,) = objects_of(convert(root)[0])
    assert entry["bbox"] == [10, 7.5, 20, 15] and entry["segmentation"] == []


def test_a_split_without_labels_is_left_out(convert, tmp_path):
    root = yolo(tmp_path / "theirs", yaml="names: [cell]\ntest: images/test")
    picture(root / "images/test/b.png")
    converted, said = convert(root)
    assert not (converted / "test").exists()
    assert "images of test, where no image has a .txt, left out: 1 (" in said


@pytest.mark.parametrize(
    "text",
    ["[1, 2", "- a", "names: 5\ntrain: images/train", "train: {a: 1}", "a: 2020-99-99", "[" * 2000],
)
def test_a_damaged_yaml_is_an_error(text, refused, tmp_path):
    root = yolo(tmp_path / "theirs")
    put(root / "data.yaml", text)
    assert "data.yaml" in refused(root)


# ---------------------------------------------------------------- Pascal VOC


def voc(root: Path, objects: list[dict] | None = None, first: int = 0, text: str = "") -> Path:
    picture(root / "a.png")
    put(root / "a.xml", text or voc_xml(IMAGE, objects or [BOX], first))
    return root


def test_pixels_count_from_1_in_the_original_only(convert, tmp_path):
    whole = {"name": "cell", "bbox": [0, 0, 40, 30]}
    for number, first in enumerate((0, 1)):
        xml = voc_xml(IMAGE, [whole], first)
        assert f"<xmin>{first}</xmin>" in xml and "<xmax>40</xmax>" in xml
        picture(tmp_path / f"theirs/{number}.png")
        put(tmp_path / f"theirs/{number}.xml", xml)
    converted, _ = convert(tmp_path / "theirs")
    assert [entry["bbox"] for entry in objects_of(converted)] == [[0, 0, 40, 30]] * 2


def test_difficult_objects_are_ignored_as_vocs_scores_do(convert, tmp_path):
    xml = voc_xml(IMAGE, [BOX, BOX], 0).replace("<difficult>0", "<difficult>1", 1)
    converted, said = convert(voc(tmp_path / "theirs", text=xml))
    assert [entry["iscrowd"] for entry in objects_of(converted)] == [1, 0]
    assert "difficult objects, written as crowds, which training and scores ignore: 1" in said


def test_images_without_an_xml_are_told(convert, tmp_path):
    root = voc(tmp_path / "theirs")
    for name in "bcdefg":
        picture(root / f"{name}.png")
    put(root / "other.xml", voc_xml({**IMAGE, "file_name": "g.png"}, [BOX], 0))
    picture(root / "elsewhere/h.png")
    converted, said = convert(root)
    assert len(images_of(converted)) == 2
    assert "images without an .xml or a mask, left out: 5 (b.png; c.png; d.png; ...)" in said


def test_corners_of_a_box_in_another_order_are_the_same_box(convert, tmp_path):
    root = voc(tmp_path / "theirs")
    (file,) = root.rglob("a.xml")
    text = file.read_text()
    for axis in "xy":
        text = text.replace(f"{axis}min>", "other>").replace(f"{axis}max>", f"{axis}min>")
        text = text.replace("other>", f"{axis}max>")
    file.write_text(text)
    assert [one["bbox"] for one in objects_of(convert(root)[0])] == [BOX["bbox"]]


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>'


@pytest.mark.parametrize(
    "xml, reason",
    [
        (BOMB.encode(), "DOCTYPE"),
        (BOMB.encode("utf-16"), "DOCTYPE"),
        (b"<annotation><object>", "damaged"),
        (b"", "damaged"),
        (b'<?xml version="1.0" encoding="nonsense"?><annotation/>', "damaged"),
        (b"<html/>", "<html> instead of <annotation>"),
        (b"<annotation><object/></annotation>", "without a name"),
        (b"<annotation><object><name>a</name></object></annotation>", "no bndbox"),
    ],
)
def test_damaged_xml_leaves_its_image_out(xml, reason, convert, tmp_path):
    root = voc(tmp_path / "theirs")
    picture(root / "b.png")
    (root / "b.xml").write_bytes(xml)
    converted, said = convert(root)
    assert [entry["file_name"] for entry in images_of(converted)] == ["a.png"]
    assert reason in said and "b.xml" in said


def test_a_file_name_leads_nowhere_else(convert, tmp_path):
    picture(tmp_path / "outside.png")
    root = voc(tmp_path / "theirs")
    xml = voc_xml({**IMAGE, "file_name": "../outside.png"}, [BOX], 0)
    put(root / "b.xml", xml)
    converted, said = convert(root)
    assert len(images_of(converted)) == 1 and "images that are missing, left out: 1 (b.xml)" in said


def test_lists_name_images_with_dots_and_others_are_left_out(convert, tmp_path):
    root = tmp_path / "theirs"
    for name in ("a.1", "a.2", "a.3"):
        picture(root / f"JPEGImages/{name}.png")
        put(root / f"Annotations/{name}.xml", voc_xml(IMAGE, [BOX], 0))
    put(root / "ImageSets/Main/train.txt", "a.1\n")
    put(root / "ImageSets/Main/val.txt", "a.2.png 1\n")
    put(root / "ImageSets/Main/cell_train.txt", "a.3 -1\n")
    converted, said = convert(root)
    assert [entry["file_name"] for entry in images_of(converted)] == ["a.1.png"]
    assert [entry["file_name"] for entry in images_of(converted, "valid")] == ["a.2.png"]
    assert "no list in ImageSets names, left out: 1 (Annotations/a.3.xml)" in said


def test_masks_without_a_box_have_the_class_of_their_colour(convert, tmp_path):
    root = tmp_path / "theirs"
    picture(root / "JPEGImages/a.png")
    numbers = np.zeros((30, 40), np.uint8)
    numbers[2:9, 3:13] = 1
    numbers[2:9, 13:14] = 255
    rgb = {"class": colour(8), "object": colour(1), "border": colour(255)}
    for folder, value in (("SegmentationClass", "class"), ("SegmentationObject", "object")):
        codes = np.select([numbers == 1, numbers == 255], [rgb[value], rgb["border"]])
        pixels = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(make(root / folder) / "a.png")
    (entry,) = objects_of(convert(root)[0])
    assert (entry["name"], entry["bbox"]) == ("cat", [3, 2, 10, 7])
    assert np.array_equal(mask_api.decode(entry["segmentation"]), numbers == 1)


def test_colours_and_pairs():
    assert [colour(n) for n in (0, 1, 2, 8, 255)] == [0, 0x800000, 0x008000, 0x400000, 0xE0E0C0]
    boxes = [(0, 0, 10, 10), (0, 0, 10, 9), (50, 50, 60, 60)]
    assert match(boxes, [(0, 0, 10, 9), (0, 0, 10, 10)]) == {0: 1, 1: 0}
    assert match(boxes, []) == {} == match([], boxes)


# ---------------------------------------------------------------- LabelMe


def drawn(root: Path, *shapes: dict, **changes: object) -> Path:
    """A LabelMe dataset of one image; a change to None leaves a key out."""
    picture(root / "a.png")
    data = labelme(IMAGE, [{"label": "cell", **shape} for shape in shapes]) | changes
    data = {key: value for key, value in data.items() if value is not None}
    put(root / "a.json", json.dumps(data))
    return root


SQUARE = {"shape_type": "polygon", "points": [[4, 5], [14, 5], [14, 13], [4, 13]]}
RECTANGLE = {"shape_type": "rectangle", "points": [[30, 20], [20, 10]]}
CIRCLE = {"shape_type": "circle", "points": [[20, 15], [30, 15]]}


def test_every_shape(convert, tmp_path):
    pixels = np.zeros((5, 7), np.uint8)
    pixels[1:4, 1:6] = 1
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    mask = {"shape_type": "mask", "points": [[3, 4], [9, 8]], "mask": encoded}
    line = {"shape_type": "line", "points": [[1, 1], [2, 2]]}
    point = {"shape_type": "point", "points": [[1, 1]]}
    misclick = {"shape_type": "polygon", "points": [[1, 1], [2, 2]]}
    shapes = (SQUARE, RECTANGLE, CIRCLE, mask, line, point, point, misclick)
    converted, said = convert(drawn(tmp_path / "theirs", *shapes))
    square, rectangle, round_one, painted_one = objects_of(converted)
    assert square["segmentation"] == [[4, 5, 14, 5, 14, 13, 4, 13]] and square["area"] == 80
    assert rectangle["bbox"] == [20, 10, 10, 10] and rectangle["segmentation"] == []
    assert round_one["bbox"] == [10, 5, 20, 20]
    assert round_one["area"] == pytest.approx(np.pi * 100, rel=0.03)
    assert painted_one["bbox"] == [4, 5, 5, 3] and painted_one["area"] == 15
    assert "type line, left out: 1" in said and "type point, left out: 2" in said
    assert "polygons of fewer than 3 points, left out: 1" in said


def test_a_group_is_one_object(convert, tmp_path):
    parts = [{**shape, "group_id": 1} for shape in (SQUARE, RECTANGLE)]
    root = drawn(tmp_path / "theirs", *parts, {**SQUARE, "group_id": 1, "label": "vessel"})
    cell, vessel = objects_of(convert(root)[0])
    assert len(cell["segmentation"]) == 2 and cell["bbox"] == [4, 5, 26, 15]
    assert (vessel["name"], vessel["bbox"]) == ("vessel", [4, 5, 10, 8])


def test_the_image_in_the_json_is_written(convert, tmp_path):
    root = drawn(tmp_path / "theirs", SQUARE)
    encoded = base64.b64encode((root / "a.png").read_bytes()).decode()
    data = labelme({**IMAGE, "file_name": "../../outside.png"}, [{"label": "cell", **SQUARE}])
    picture(tmp_path / "outside.png", (7, 7))
    put(root / "b.json", json.dumps(data | {"imageData": encoded}))
    converted, _ = convert(root)
    assert [entry["file_name"] for entry in images_of(converted)] == ["a.png", "b.png"]
    assert (converted / "train/b.png").read_bytes() == (root / "a.png").read_bytes()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[" * 100_000, "damaged"),
        ('{"shapes": [', "damaged"),
        ('{"shapes": 5}', "no shapes"),
        (labelme(IMAGE, [{"label": 5, **SQUARE}]), "has no label"),
        (labelme(IMAGE, [{"label": "a", "points": [[1, float("nan")]] * 3}]), "a point lies"),
        (labelme(IMAGE, [{"label": "a", "points": [[1, 10**9]] * 3}]), "a point lies"),
        (labelme(IMAGE, [{"label": "a", "points": [[1, "2"]] * 3}]), "no pair of numbers"),
        (labelme(IMAGE, [{"label": "a", **CIRCLE, "points": [[1, 2]]}]), "circle of 1 points"),
        (labelme({**IMAGE, "file_name": "/etc/passwd"}, []), "outside of the dataset"),
        (labelme({**IMAGE, "file_name": "../../outside.png"}, []), "outside of the dataset"),
        (labelme({**IMAGE, "file_name": "no.png"}, []), "missing"),
        (labelme(IMAGE, []) | {"imageWidth": [1]}, "another size"),
        (labelme(IMAGE, []) | {"imageWidth": 80}, "80x30, it is 40x30"),
        (labelme({**IMAGE, "file_name": "\0"}, []) | {"imageData": "!"}, "damaged"),
        (labelme({**IMAGE, "file_name": "\0"}, []) | {"imageData": "aaaa"}, "damaged"),
    ],
)
def test_damaged_json_leaves_its_image_out(text, reason, convert, tmp_path):
    picture(tmp_path / "outside.png")
    root = drawn(tmp_path / "theirs", SQUARE)
    put(root / "b.json", text if isinstance(text, str) else json.dumps(text))
    converted, said = convert(root)
    assert len(images_of(converted)) == 1
    assert reason in said and "b.json" in said


# ---------------------------------------------------------------- mask images


def masked(root: Path, numbers: np.ndarray, name: str = "a.png") -> Path:
    picture(root / "images" / name)
    Image.fromarray(numbers).save(make(root / "masks") / name)
    return root


def numbers_of(*values: int, dtype: type = np.uint8) -> np.ndarray:
    numbers = np.zeros((30, 40), dtype)
    for index, value in enumerate(values):
        numbers[3:9, 8 * index : 8 * index + 6] = value
    return numbers


def test_8_bits_and_colours(convert, tmp_path):
    root = masked(tmp_path / "theirs", numbers_of(255, 7, 8))
    colours = np.zeros((30, 40, 3), np.uint8)
    colours[1:5, 1:9] = (0, 0, 200)
    colours[1:5, 11:19] = (0, 200, 0)
    masked(root, colours, "b.png")
    objects = objects_of(convert(root)[0])
    assert [entry["image_id"] for entry in objects] == [1, 1, 1, 2, 2]
    assert {tuple(entry["bbox"]) for entry in objects[:3]} == {
        (0, 3, 6, 6), (8, 3, 6, 6), (16, 3, 6, 6)
    }  # fmt: skip


def test_values_that_lie_in_several_places_are_told(convert, tmp_path):
    """Classes, or the shades of soft edges: objects one by one they are not."""
    classes = numbers_of(1, 2)
    classes[20:26] = classes[3:9]
    root = masked(tmp_path / "theirs", classes, "classes.png")
    soft = Image.fromarray(numbers_of(255, 255)).resize((80, 60), Image.Resampling.BICUBIC)
    masked(root, np.asarray(soft.resize((40, 30), Image.Resampling.BICUBIC)), "soft.png")
    cut = numbers_of(1, 2, 3)
    cut[5, :6] = 0  # one of three objects in two pieces
    masked(root, cut, "cut.png")
    _, said = convert(root)
    told = "masks most of whose values lie in several places, and become one object each"
    assert told in said and "value of its own): 2 (masks/classes.png; masks/soft.png)" in said


def test_a_part_of_one_split_leads_to_the_dataset_with_all_splits(convert, tmp_path):
    for split in ("train", "valid"):
        masked(tmp_path / "theirs" / split, numbers_of(1, 2))
    with pytest.raises(UserError, match=r"is a part of a dataset: .* in \S*theirs\. Run: "):
        convert(tmp_path / "theirs/train/masks")


def test_masks_that_cannot_be_used(convert, tmp_path):
    root = masked(tmp_path / "theirs", numbers_of(1, 2))
    masked(root, np.zeros((20, 20), np.uint8), "small.png")
    masked(root, numbers_of(255), "binary.png")
    picture(root / "images/lossy.png")
    Image.fromarray(numbers_of(1)).save(root / "masks/lossy.jpg")
    picture(root / "images/cut.png")
    (root / "masks/cut.png").write_bytes((root / "masks/a.png").read_bytes()[:60])
    picture(root / "images/alone.png")
    converted, said = convert(root)
    assert [entry["file_name"] for entry in images_of(converted)] == ["a.png", "binary.png"]
    for words in (
        "another size than their labels say, left out: 1 (masks/small.png: 20x20, it is 40x30)",
        "masks of one value, whose objects become one: 1 (masks/binary.png)",
        "images whose mask is a JPEG",
        "images whose mask cannot be read, left out: 1 (masks/cut.png",
        "images without a mask, left out: 1 (images/alone.png)",
    ):
        assert words in said


# ---------------------------------------------------------------- all of them


def test_orientation_is_settled_by_the_size_that_was_labelled(convert, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown, it is 30 wide and 40 high
    for form, size in (("yolo", (30, 40)), ("voc", (40, 30))):
        root = tmp_path / form
        if form == "yolo":
            yolo(root)
            (root / "images/train/a.png").unlink()
            picture(root / "images/train/a.jpg", exif=exif)
        else:
            voc(root)
            (root / "a.png").unlink()
            picture(root / "a.jpg", exif=exif)
        converted, _ = convert(root)
        (entry,) = images_of(converted)
        assert (entry["width"], entry["height"]) == size
        splits, problems = inspect_dataset(converted, val_fraction=0.5, decode=True)
        assert splits["train"].exif == ("apply" if form == "yolo" else "ignore")
        converted.rename(tmp_path / f"coco of {form}")


@pytest.mark.parametrize("size", [(40, 30), (30, 40)], ids=["stored", "shown"])
@pytest.mark.parametrize("form", ["labelme", "masks"])
def test_labels_of_either_orientation(form, size, convert, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    root = tmp_path / "theirs"
    picture(root / "images/a.jpg", exif=exif)
    width, height = size
    if form == "masks":
        Image.fromarray(np.eye(height, width, dtype=np.uint8)).save(make(root / "masks") / "a.png")
    else:
        image = {"file_name": "a.jpg", "width": width, "height": height}
        data = labelme(image, [{"label": "cell", **SQUARE}])
        put(root / "images/a.json", json.dumps(data))
    (entry,) = images_of(convert(root)[0])
    assert (entry["width"], entry["height"]) == size


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_are_not_opened_and_links_that_go_round_end(convert, tmp_path):
    root = drawn(tmp_path / "theirs", SQUARE)
    for name in ("b.json", "c.png", "d.txt", "e.xml"):
        os.mkfifo(root / name)
    (make(root / "sub") / "loop").symlink_to(root)
    converted, said = convert(root)
    assert len(images_of(converted)) == 1
    assert "b.json: no plain file" in said


def test_linked_folders_are_followed(convert, tmp_path):
    root = yolo(tmp_path / "theirs")
    (root / "images").rename(tmp_path / "elsewhere")
    (root / "images").symlink_to(tmp_path / "elsewhere")
    assert len(objects_of(convert(root)[0])) == 1


def test_equal_names_of_several_folders_do_not_collide(convert, tmp_path):
    root = tmp_path / "theirs"
    for folder, size in (("one", (40, 30)), ("two", (50, 30)), ("Three", (60, 30))):
        picture(root / folder / ("a.png" if folder != "Three" else "A.png"), size)
        image = {"file_name": "a.png", "width": size[0], "height": 30}
        put(root / folder / "a.xml" if folder != "Three" else root / "Three/A.xml",
            voc_xml(image, [BOX], 0))  # fmt: skip
    converted, _ = convert(root, "--format", "voc")
    found = {entry["file_name"]: entry["width"] for entry in images_of(converted)}
    assert len({name.lower() for name in found}) == 3
    for name, width in found.items():
        with Image.open(converted / "train" / name) as image:
            assert image.width == width


def test_links_and_copies(convert, monkeypatch, tmp_path):
    root = yolo(tmp_path / "theirs")
    image = root / "images/train/a.png"
    converted, _ = convert(root)
    assert image.samefile(converted / "train/a.png")
    for flags in (["--copy", "copy"], []):
        converted.rename(tmp_path / f"coco{len(flags)}")
        converted, _ = convert(root, *flags)
        assert image.samefile(converted / "train/a.png") is not bool(flags)
    converted.rename(tmp_path / "coco1")

    def refuse(*places):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    converted, _ = convert(root)
    assert (converted / "train/a.png").read_bytes() == image.read_bytes()


def test_nothing_is_written_over_and_nothing_half(convert, refused, monkeypatch, tmp_path):
    root = yolo(tmp_path / "theirs")
    make(tmp_path / "coco")
    converted, _ = convert(root)  # an empty folder is taken
    before = (converted / "train" / ANNOTATIONS).read_bytes()
    assert "(it holds " in refused(root) and "never written over" in refused(root)
    assert (converted / "train" / ANNOTATIONS).read_bytes() == before
    converted.rename(tmp_path / "first")

    def disk_full(*places):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rfdetr.data.formats.writer.link_or_copy", disk_full)
    assert "No space left" in refused(root)


def test_damaged_images_are_left_out(convert, tmp_path):
    root = yolo(tmp_path / "theirs")
    (root / "images/train/b.png").write_bytes(b"no image")
    put(root / "labels/train/b.txt", "0 .5 .5 .5 .5")
    converted, said = convert(root)
    assert "images that cannot be read, left out: 1 (images/train/b.png: " in said
    assert len(images_of(converted)) == 1


def test_objects_outside_of_their_image_are_left_out_and_others_cut(convert, tmp_path):
    boxes = [
        {"name": "cell", "bbox": box} for box in ([50, 5, 10, 8], [35, 5, 10, 8], [4, 5, 0, 8])
    ]
    converted, said = convert(voc(tmp_path / "theirs", boxes))
    assert [entry["bbox"] for entry in objects_of(converted)] == [[35, 5, 5, 8]]
    assert "objects without area or outside of their image, left out: 2 (" in said


def test_names_are_made_safe(convert, tmp_path):
    xml = voc_xml(IMAGE, [{**BOX, "name": " two\n words "}], 0)
    converted, _ = convert(voc(tmp_path / "theirs", text=xml))
    assert [entry["name"] for entry in objects_of(converted)] == ["two words"]


@pytest.mark.parametrize(
    "files, words",
    [
        ([], "it is empty"),
        (["a.png"], "expected YOLO"),
        ([f"train/{ANNOTATIONS}"], "a COCO dataset already"),
    ],
)
def test_what_is_in_no_known_form(files, words, refused, tmp_path):
    root = make(tmp_path / "theirs")
    for name in files:
        put(root / name, "{}")
    assert words in refused(root)


@pytest.fixture
def several(few, tmp_path) -> Path:
    """A folder with datasets of three forms."""
    for name, write in {"a": write_voc, "b": write_labelme, "c": write_masks}.items():
        write(few, tmp_path / "all" / name)
    return tmp_path / "all"


def test_several_datasets_in_a_folder_are_named_and_none_is_read(several, few, refused, tmp_path):
    said = refused(several)
    for name, form in {"a": "a Pascal VOC", "b": "a LabelMe", "c": "of mask images"}.items():
        assert form in said and f"--input {several / name} --output" in said
    for name in ("d", "e"):
        write_yolo(few, tmp_path / "yolos" / name)
    assert "--input" in refused(tmp_path / "yolos")


def test_a_command_that_is_advised_keeps_what_was_asked_for(several, few, refused, call, tmp_path):
    flags = ["--copy", "copy", "--class_name", "my cell"]
    commands = refused(several, *flags).splitlines()[1:]
    python, script, *words = shlex.split(commands[2])
    assert (python, script) == ("python", "convert_dataset.py")
    call(convert_dataset.main, *words)
    data = json.loads((tmp_path / "coco/train" / ANNOTATIONS).read_text())
    assert [category["name"] for category in data["categories"]] == ["my cell"]
    image = tmp_path / "coco/train" / data["images"][0]["file_name"]
    assert image.stat().st_nlink == 1
    theirs = write_yolo(few, tmp_path / "theirs")
    assert f"--input {theirs} --output coco --copy copy" in refused(theirs / "images", *flags[:2])


@pytest.mark.parametrize("write", [write_yolo, write_voc, write_labelme, write_masks])
def test_the_only_dataset_in_a_folder_is_read_and_its_folder_named(write, few, convert, tmp_path):
    write(few, tmp_path / "outer/inner")
    converted, said = convert(tmp_path / "outer")
    assert set(find_splits(converted)) == {"train", "valid", "test"}
    assert f"in {tmp_path / 'outer/inner'}" in said


@pytest.mark.parametrize(
    "write, part",
    [
        (write_yolo, "images"),
        (write_yolo, "labels"),
        (write_yolo, "images/train"),
        (write_voc, "Annotations"),
        (write_voc, "JPEGImages"),
        (write_masks, "masks"),
    ],
)
def test_a_part_of_a_dataset_leads_to_the_whole(write, part, few, refused, tmp_path):
    root = write(few, tmp_path / "theirs")
    assert f"convert_dataset.py --input {root} --output" in refused(root / part)


def test_a_file_and_a_url_are_no_folders(refused, tmp_path):
    archive = tmp_path / "x.zip"
    archive.touch()
    assert "unpack it" in refused(archive)
    with pytest.raises(UserError, match="https://example.org/x.zip: it is a URL.*its folder"):
        require_files(ConvertSettings(input=Path("https://example.org/x.zip")))


def test_exit_codes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        run_script(convert_dataset.main, ["--input", str(make(tmp_path / "empty"))])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("write", [write_yolo, write_voc, write_labelme, write_masks, write_bowl])
def test_scripts_that_train_name_the_command(write, few, call, capsys, tmp_path):
    root = write(few, tmp_path / "theirs")
    with pytest.raises(UserError) as error:
        find_splits(root)
    python, script, *words = shlex.split(str(error.value).partition("Write it as COCO: ")[2])
    assert (python, script) == ("python", "convert_dataset.py")
    call(convert_dataset.main, *words)
    assert set(find_splits(tmp_path / "dataset")) == {"train", "valid", "test"}
