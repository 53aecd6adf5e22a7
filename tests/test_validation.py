"""Every fault of a dataset: its code, its severity, and what it does to what is read.

And validate_setup.py as a whole.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from conftest import read_split
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_utils

import validate_setup
from rfdetr.console import UserError
from rfdetr.console import run_script as as_a_script
from rfdetr.data.checks import check_file
from rfdetr.data.coco import inspect_dataset, read_dataset
from rfdetr.data.faults import Problem
from rfdetr.data.layout import ANNOTATIONS, COPY_NOTE
from rfdetr.data.mask_source import choose_masks
from rfdetr.data.rle import run_sums
from testkit.datasets import HEIGHT, SQUARE, WIDTH, coco, drop_masks, rewrite, write

ROOT = Path(__file__).resolve().parent.parent
EMPTY_RLE = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write(tmp_path / "data/train", coco(4))
    write(tmp_path / "data/valid", coco(1))
    return tmp_path / "data"


def check_annotations(data: dict, file: str | Path) -> list[Problem]:
    return check_file(file, data=data).faults.problems()


def check_dataset(
    root: Path, val_fraction=None, need_masks=False, check_images=False, queries=300
) -> list[Problem]:
    return inspect_dataset(root, val_fraction, need_masks, check_images, queries)[1]


def codes(problems: list) -> dict[str, str]:
    return {problem.code: problem.severity for problem in problems}


def test_a_sound_dataset_has_no_problems(dataset):
    assert check_annotations(coco(), "x.json") == []
    assert check_dataset(dataset, need_masks=True, check_images=True) == []


def test_a_name_longer_than_a_disk_takes_is_a_missing_image(dataset):
    rewrite(
        dataset / "train/_annotations.coco.json",
        lambda d: d["images"][0].update(file_name="x" * 300 + ".png"),
    )
    assert codes(check_dataset(dataset)) == {"IMG_MISSING": "error"}


# what the first annotation is updated with -> code, severity
ANNOTATION_FAULTS = [
    ({"bbox": [math.nan, 5, 10, 8]}, "ANN_BBOX_NAN", "error"),
    ({"bbox": [4, 5, math.inf, 8]}, "ANN_BBOX_NAN", "error"),
    ({"bbox": [4, 5, -math.inf, math.inf]}, "ANN_BBOX_NAN", "error"),
    ({"bbox": [4, 5, 1e8, 8]}, "ANN_BBOX_NAN", "error"),
    ({"bbox": [4, 5, 10**400, 8]}, "ANN_BBOX_NAN", "error"),
    ({"bbox": [4, 5, 10**400, 8.5]}, "ANN_BBOX_NAN", "error"),
    ({"bbox": ["4", 5, 10, 8]}, "ANN_BBOX_TYPE", "error"),
    ({"bbox": [4, 5, 10]}, "ANN_BBOX_TYPE", "error"),
    ({"bbox": None}, "ANN_BBOX_TYPE", "error"),
    ({"bbox": [[4], 5, 10, 8]}, "ANN_BBOX_TYPE", "error"),
    ({"bbox": [4, 5, 0, 8]}, "ANN_BBOX_EMPTY", "warning"),
    ({"bbox": [4, 5, 10, -8]}, "ANN_BBOX_EMPTY", "warning"),
    ({"bbox": [4, 5, 1e-9, 8]}, "ANN_BBOX_EMPTY", "warning"),
    ({"bbox": [-4, 5, 10, 8]}, "ANN_BBOX_CLIPPED", "warning"),
    ({"bbox": [35, 25, 10, 10]}, "ANN_BBOX_CLIPPED", "warning"),
    ({"bbox": [50, 5, 10, 8]}, "ANN_BBOX_OUTSIDE", "warning"),
    ({"bbox": [4, -20, 10, 8]}, "ANN_BBOX_OUTSIDE", "warning"),
    ({"area": 0}, "ANN_AREA_INVALID", "warning"),
    ({"area": -3.5}, "ANN_AREA_INVALID", "warning"),
    ({"area": math.nan}, "ANN_AREA_INVALID", "warning"),
    ({"area": "80"}, "ANN_AREA_INVALID", "warning"),
    ({"area": 0.07}, "ANN_AREA_INVALID", "warning"),
    ({"area": 80 * 4}, "ANN_AREA_INVALID", "warning"),
    ({"iscrowd": 2}, "ANN_CROWD_INVALID", "error"),
    ({"iscrowd": []}, "ANN_CROWD_INVALID", "error"),
    ({"image_id": 99}, "ANN_IMAGE_UNKNOWN", "error"),
    ({"image_id": [1]}, "ANN_IMAGE_UNKNOWN", "error"),
    ({"category_id": 99}, "ANN_CATEGORY_UNKNOWN", "error"),
    ({"category_id": "1"}, "ANN_CATEGORY_TYPE", "error"),
    ({"category_id": 1.0}, "ANN_CATEGORY_TYPE", "error"),
    ({"category_id": "01"}, "ANN_CATEGORY_UNKNOWN", "error"),
    ({"category_id": True}, "ANN_CATEGORY_UNKNOWN", "error"),
    ({"image_id": "1"}, "ANN_IMAGE_TYPE", "error"),
    ({"id": "a"}, "ANN_ID_INVALID", "error"),
    ({"id": 2**64}, "ANN_ID_INVALID", "error"),
    ({"segmentation": [[4, 5, 14, 5]]}, "ANN_POLYGON_SHORT", "warning"),
    ({"segmentation": [[]]}, "ANN_POLYGON_SHORT", "warning"),
    ({"segmentation": [[4, 5, 14, 5, 14, 13, 4]]}, "ANN_POLYGON_ODD", "warning"),
    ({"segmentation": [[4, 5, 9e6, 5, 9e6, 13, 4, -9e6]]}, "ANN_POLYGON_FAR", "warning"),
    ({"segmentation": []}, "ANN_NO_MASK", "warning"),
    ({"segmentation": None}, "ANN_NO_MASK", "warning"),
    ({"segmentation": EMPTY_RLE}, "ANN_NO_MASK", "warning"),
    ({"segmentation": EMPTY_RLE | {"counts": "`U1"}}, "ANN_NO_MASK", "warning"),
    ({"segmentation": [[[4, 5], [14, 5], [14, 13], [4, 13]]]}, "ANN_SEG_TYPE", "error"),
    ({"segmentation": [[[4, 5], [14, 5], [14, 13]]]}, "ANN_SEG_TYPE", "error"),
    ({"segmentation": [[4, 5, 14, math.nan, 14, 13]]}, "ANN_SEG_NAN", "error"),
    ({"segmentation": [[4, 5, 14, 1e300, 14, 13]]}, "ANN_SEG_NAN", "error"),
    ({"segmentation": [4, 5, 14, 5, 14, 13]}, "ANN_SEG_TYPE", "error"),
    ({"segmentation": [["4", 5, 14, 5, 14, 13]]}, "ANN_SEG_TYPE", "error"),
    ({"segmentation": "square"}, "ANN_SEG_TYPE", "error"),
    ({"segmentation": EMPTY_RLE | {"size": [WIDTH, HEIGHT]}}, "ANN_RLE_SIZE", "error"),
    ({"segmentation": EMPTY_RLE | {"size": "30x40"}}, "ANN_RLE_SIZE", "error"),
    ({"segmentation": EMPTY_RLE | {"size": [-30, -40]}}, "ANN_RLE_SIZE", "error"),
    ({"segmentation": EMPTY_RLE | {"counts": [1199]}}, "ANN_RLE_COUNTS", "error"),
    ({"segmentation": EMPTY_RLE | {"counts": [1300, -100]}}, "ANN_RLE_COUNTS", "error"),
    ({"segmentation": EMPTY_RLE | {"counts": []}}, "ANN_RLE_COUNTS", "error"),
    ({"segmentation": EMPTY_RLE | {"counts": [0, *[0] * 5000, 1200]}}, "ANN_RLE_COUNTS", "error"),
    ({"segmentation": EMPTY_RLE | {"counts": "10000_U1"}}, "ANN_RLE_COUNTS", "error"),
    ({"segmentation": EMPTY_RLE | {"counts": [1200.0]}}, "ANN_RLE_TYPE", "error"),
    ({"segmentation": EMPTY_RLE | {"counts": 7}}, "ANN_RLE_TYPE", "error"),
    ({"segmentation": EMPTY_RLE | {"counts": "0"}}, "ANN_RLE_COUNTS", "error"),
    ({"segmentation": EMPTY_RLE | {"counts": ""}}, "ANN_RLE_COUNTS", "error"),
    ({"segmentation": EMPTY_RLE | {"counts": "oooooooooooooo"}}, "ANN_RLE_COUNTS", "error"),
    ({"segmentation": EMPTY_RLE | {"counts": "é~ \ud800"}}, "ANN_RLE_COUNTS", "error"),
]


@pytest.mark.parametrize(("change", "code", "severity"), ANNOTATION_FAULTS)
def test_annotation_faults(tmp_path, change, code, severity):
    data = coco()
    data["annotations"][0].update(change)
    file = write(tmp_path / "data/train", data)
    problems = check_annotations(data, file)
    assert codes(problems)[code] == severity
    assert "error" not in {other.severity for other in problems if other.code != code}
    problem = next(problem for problem in problems if problem.code == code)
    assert problem.count == 1 and problem.message.startswith(f"{file}: 1 annotation ")
    entry = data["annotations"][0]
    where = "1.png" if entry["image_id"] in (1, "1") else "not listed"
    assert problem.places == [f"annotation {entry['id']} of image {entry['image_id']} ({where})"]
    if severity == "error":
        with pytest.raises(UserError, match="validate_setup.py --dataset") as caught:
            read_split(file, file.parent, "train")
        assert "\n" not in str(caught.value)
    else:
        split = read_split(file, file.parent, "train")
        assert (
            code == "ANN_NO_MASK"
            or sum(problem.message in split.warnings for problem in problems) >= 1
        )
        assert all(0 <= x <= WIDTH for image in split.images for x in image.boxes[:, 0::2].ravel())


DATA_FAULTS = [
    (lambda d: d.pop("images"), "JSON_STRUCTURE"),
    (lambda d: d.update(annotations={}), "JSON_STRUCTURE"),
    (lambda d: d["annotations"].append(None), "JSON_STRUCTURE"),
    (lambda d: d["categories"].append([1]), "JSON_STRUCTURE"),
    (lambda d: d["images"].append(dict(d["images"][0], file_name="9.png")), "IMG_ID_DUPLICATE"),
    (lambda d: d["images"][1].update(id=None), "IMG_ID_INVALID"),
    (lambda d: d["images"][1].update(id=2.0), "IMG_ID_TYPE"),
    (lambda d: d["images"][1].update(id=2.5), "IMG_ID_INVALID"),
    (lambda d: d["images"][1].update(id={}), "IMG_ID_INVALID"),
    (lambda d: d["images"][1].update(file_name="../2.png"), "IMG_PATH"),
    (lambda d: d["images"][1].update(file_name=3), "IMG_PATH"),
    (lambda d: d["images"][1].update(file_name=""), "IMG_PATH"),
    (lambda d: d["images"][1].update(width=0), "IMG_SIZE_INVALID"),
    (lambda d: d["images"][1].update(width="40"), "IMG_SIZE_INVALID"),
    (lambda d: d["images"][1].update(height=math.nan), "IMG_SIZE_INVALID"),
    (lambda d: d["annotations"][0].update(id=2), "ANN_ID_DUPLICATE"),
    (lambda d: d["categories"][0].update(id="1"), "CAT_ID_TYPE"),
    (lambda d: d["categories"][1].update(id="1"), "CAT_ID_DUPLICATE"),
    (lambda d: d["categories"][0].update(id=True), "CAT_INVALID"),
    (lambda d: d["categories"][0].pop("name"), "CAT_INVALID"),
    (lambda d: d["categories"].append({"id": 1, "name": "x"}), "CAT_ID_DUPLICATE"),
    (lambda d: d["categories"].append({"id": 3, "name": "cell"}), "CAT_NAME_DUPLICATE"),
]


@pytest.mark.parametrize(("change", "code"), DATA_FAULTS)
def test_faults_of_tables_are_errors(change, code):
    data = coco()
    change(data)
    assert codes(check_annotations(data, "x.json"))[code] == "error"


@pytest.mark.parametrize("name", ["", "Gefäß 血管", "x" * 5000, "a/b\\c:*?"])
def test_any_category_name_works(name):
    data = coco()
    data["categories"][0]["name"] = name
    assert check_annotations(data, "x.json") == []


def test_all_problems_are_reported_at_once_with_counts_and_first_places(tmp_path):
    data = coco(30)
    for entry in data["annotations"][:25]:
        entry["bbox"] = [math.nan] * 4
    data["annotations"][27]["bbox"] = [0, 0, 0, 0]
    problems = check_annotations(data, "x.json")
    assert [(problem.code, problem.count, len(problem.places)) for problem in problems] == [
        ("ANN_BBOX_NAN", 25, 20),
        ("ANN_BBOX_EMPTY", 1, 1),
    ]
    data["images"][3]["width"] = -1
    file = write(tmp_path / "my data/train", data)
    with pytest.raises(UserError, match=r'1 more kind of errors\..*--dataset \'.*my data\''):
        read_split(file, file.parent, "train")


def test_identical_annotations_leave_one(tmp_path):
    data = coco()
    data["annotations"].append(copy.deepcopy(data["annotations"][0]))
    data["annotations"].append(data["annotations"][0] | {"id": 77})
    data["annotations"].append(
        data["annotations"][0] | {"id": 78, "segmentation": [[4, 5, 14, 5, 14, 13]]}
    )
    file = write(tmp_path / "train", data)
    split = read_split(file, file.parent, "train")
    assert [(p.code, p.count) for p in check_annotations(data, "x.json")] == [("ANN_DUPLICATE", 2)]
    assert split.images[0].labels.tolist() == [0, 1, 0] and len(split.warnings) == 1


def test_dropped_and_clipped_annotations(tmp_path):
    data = coco()
    data["annotations"][0]["bbox"] = [-4, 25, 10, 10]
    data["annotations"][1]["bbox"] = [50, 50, 5, 5]
    data["annotations"][2]["segmentation"] = [[1, 2, 3, 4], *SQUARE]
    file = write(tmp_path / "train", data)
    first, second = read_split(file, file.parent, "train").images
    assert first.boxes[0].tolist() == [0, 25, 6, 30] and len(second.boxes) == 0
    assert first.segmentations == [SQUARE, SQUARE]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.booleans(), min_size=1, max_size=600), st.integers(1, 25)), max_size=5
    )
)
def test_compressed_runs_are_summed_as_pycocotools_reads_them(masks):
    sizes = {}
    for bits, height in masks:
        mask = np.zeros((height, -(-len(bits) // height)), np.uint8, order="F")
        mask.ravel(order="K")[: len(bits)] = bits
        sizes[mask_utils.encode(mask)["counts"].decode()] = mask.size
    assert run_sums([*sizes, "", "é", "o" * 14, *sizes], at_once=3) == sizes | {
        "": -1,
        "é": -1,
        "o" * 14: -1,
    }


def test_large_runs_and_negative_ones():
    mask = np.zeros((3000, 4000), np.uint8, order="F")
    mask[100:2000, 500:3900:7] = 1
    text = mask_utils.encode(mask)["counts"].decode()
    broken = [
        text[:-1] + "o",
        text[:40] + "/" + text[40:],
        text[:40] + "p" + text[40:],
        "PPPPPP1",
        "5O5",
    ]
    assert run_sums([*broken, text]) == {text: mask.size} | dict.fromkeys(broken, -1)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_content_makes_the_check_itself_fail(data):
    content = coco()
    for _ in range(data.draw(st.integers(1, 3))):
        table = data.draw(st.sampled_from(["images", "annotations", "categories"]))
        key = data.draw(st.sampled_from([*content[table][0], "supercategory"]))
        content[table][0][key] = data.draw(anything)
    for problem in check_annotations(content, "x.json"):
        assert (
            problem.severity in ("error", "warning") and 1 <= len(problem.places) <= problem.count
        )


@pytest.mark.parametrize(
    ("listed", "there"), [("1.PNG", "1.png"), ("u\u0308.png", "\u00fc.png"), ("1.png ", "1.png")]
)
def test_a_missing_image_names_the_file_that_is_called_almost_so(dataset, listed, there):
    os.rename(dataset / "train/1.png", dataset / "train" / there)
    if (dataset / "train" / listed).exists():
        pytest.skip("this disk takes both names for one")
    rewrite(
        dataset / "train/_annotations.coco.json",
        lambda data: data["images"][0].update(file_name=listed),
    )
    (problem,) = [one for one in check_dataset(dataset) if one.code == "IMG_MISSING"]
    assert problem.places == [f"{dataset / 'train' / listed} (there is {there!r})"]


def test_missing_images_are_listed(dataset):
    for number in (1, 2):
        (dataset / f"train/{number}.png").unlink()
    (problem,) = check_dataset(dataset)
    assert (problem.code, problem.severity, problem.count) == ("IMG_MISSING", "error", 2)
    assert problem.places == [str(dataset / "train/1.png"), str(dataset / "train/2.png")]


def test_other_size_than_the_annotations_say(dataset):
    Image.new("RGB", (33, 44)).save(dataset / "train/2.png")
    (problem,) = check_dataset(dataset)
    assert (problem.code, problem.severity) == ("IMG_SIZE", "error") and "33x44" in problem.message


def test_a_few_unreadable_images_are_a_warning_many_are_an_error(tmp_path):
    for split in ("train", "valid"):
        write(tmp_path / split, coco(8))
    for number in range(1, 4):
        (tmp_path / f"train/{number}.png").write_bytes(b"no image")
    train = read_dataset(tmp_path)["train"]
    assert (
        len(train.images) == 8 and len(train.warnings) == 1
    )  # training skips them, scoring counts them as missed
    assert codes(check_dataset(tmp_path, check_images=True)) == {"IMG_CORRUPT": "error"}
    (tmp_path / "train/4.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="4 images that cannot be read") as caught:
        read_dataset(tmp_path)
    message = str(caught.value)
    assert "skips up to 3 of a split, or 1 %, and refuses more" in message
    assert "--fix DIR" in message and message.count("train/4.png") == 0
    assert message.count("train/1.png") == 1


def test_truncated_pixels_show_only_when_images_are_decoded(dataset):
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(dataset / "train/1.png")
    whole = (dataset / "train/1.png").read_bytes()
    (dataset / "train/1.png").write_bytes(whole[: len(whole) // 2])
    assert check_dataset(dataset) == []
    assert codes(check_dataset(dataset, check_images=True)) == {"IMG_CORRUPT": "error"}


def test_decompression_bomb(dataset, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert codes(check_dataset(dataset))["IMG_BOMB"] == "error"


def test_shared_images_and_classes_missing_in_train(dataset):
    rewrite(
        dataset / "train/_annotations.coco.json", lambda data: data["annotations"].pop()
    )  # the only vessel
    (dataset / "valid/1.png").write_bytes((dataset / "train/3.png").read_bytes())
    problems = check_dataset(dataset, check_images=True)
    assert codes(problems) == {"CLASS_NOT_IN_TRAIN": "warning", "IMG_SHARED": "warning"}
    assert {place for problem in problems for place in problem.places} == {
        "'vessel'",
        "1.png = train's 3.png",
    }
    assert "without a usable object in train" in read_dataset(dataset)["valid"].warnings[-1]


def test_an_image_that_is_listed_twice_is_told(dataset):
    copied = (dataset / "train/1.png").read_bytes()
    (dataset / "train/copy.png").write_bytes(copied)

    def list_again(data: dict) -> None:
        first = data["images"][0]
        for new_id, name in ((801, first["file_name"]), (802, "copy.png")):
            data["images"].append(first | {"id": new_id, "file_name": name})

    rewrite(dataset / "train/_annotations.coco.json", list_again)
    for decoded, expected in ((False, 1), (True, 2)):
        problems = check_dataset(dataset, check_images=decoded)
        (told,) = [problem for problem in problems if problem.code == "IMG_TWICE"]
        assert told.severity == "warning" and len(told.places) == expected
        assert told.places[0].startswith("1.png = 1.png: ")


def test_empty_splits(dataset):
    def clear(data: dict) -> None:
        data.update(annotations=[], images=[])

    rewrite(dataset / "valid/_annotations.coco.json", clear)
    assert codes(check_dataset(dataset)) == {"SPLIT_EMPTY": "warning"}
    assert len(read_dataset(dataset)["valid"].images) == 0
    rewrite(dataset / "train/_annotations.coco.json", clear)
    assert check_dataset(dataset)[0].severity == "error"
    with pytest.raises(UserError, match="without a usable object"):
        read_dataset(dataset)


def test_more_objects_than_queries(dataset):
    def crowd_in(data: dict) -> None:
        for n in range(301):
            other = {
                "id": 1000 + n,
                "area": 12,
                "bbox": [n / 20, 1, 5, 5],
                "segmentation": [[n / 20, 1, n / 20 + 5, 1, n / 20, 6]],
            }
            data["annotations"].append(data["annotations"][0] | other)

    rewrite(dataset / "train/_annotations.coco.json", crowd_in)
    assert codes(check_dataset(dataset)) == {"IMG_MANY_OBJECTS": "warning"}
    assert read_dataset(dataset)["train"].object_count == 306


def test_layout_and_broken_files_are_problems_too(dataset):
    assert codes(check_dataset(dataset / "nowhere")) == {"DATASET_LAYOUT": "error"}
    (dataset / "train/_annotations.coco.json").write_text('{"images": [\n')
    (dataset / "valid/_annotations.coco.json").write_text("")
    problems = check_dataset(dataset)
    assert [problem.code for problem in problems] == [
        "JSON_INVALID"
    ] * 2 and "line 2, column 1" in problems[0].message
    (dataset / "valid/_annotations.coco.json").unlink()
    assert codes(check_dataset(dataset))["SPLIT_VALID_MISSING"] == "error"


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"images": [{"file_name": "a', "column 27: .*the text that begins there does not end"),
        ('{"images": [', "column 13: .*the file ends there"),
        ('{"images"\n 1}', "line 2, column 2: .*a colon is missing"),
        ('{"a": 1 "b": 2}', "column 9: .*a comma or a closing bracket is missing"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_broken_json_is_told_in_words(dataset, text, words):
    (dataset / "train" / ANNOTATIONS).write_text(text)
    with pytest.raises(UserError, match=words):
        read_dataset(dataset)


def test_a_folder_that_is_no_dataset_is_named_so_that_it_can_be_told(dataset, monkeypatch):
    def message(root: str) -> str:
        return inspect_dataset(root)[1][0].message

    monkeypatch.chdir(dataset.parent)
    assert message(".").startswith(f"no COCO dataset in {dataset.parent}. There is one nearby")
    assert message("dat").endswith("(there is no such folder). Did you mean --dataset data?")
    monkeypatch.chdir(dataset / "train")
    assert message(".").endswith(f"--dataset {dataset}")


def test_val_fraction_beside_a_valid_split_is_not_used(dataset):
    assert codes(check_dataset(dataset, 0.1)) == {"SPLIT_FRACTION_UNUSED": "warning"}
    assert len(read_dataset(dataset, 0.1)["valid"].images) == 1


def test_masks_are_required_where_they_are_needed(dataset, capsys):
    assert not choose_masks(read_dataset(dataset)["train"], "auto")
    assert (
        capsys.readouterr().out
        == "✓ Validated: 5/5 sample annotations contain segmentation masks\n"
    )

    def strip(data: dict, keep: int) -> None:
        for entry in data["annotations"][keep:]:
            entry["segmentation"] = []

    file = dataset / "train/_annotations.coco.json"
    rewrite(file, lambda data: strip(data, 2))
    train = read_dataset(dataset)["train"]
    assert not choose_masks(train, "auto")
    out = capsys.readouterr().out
    assert (
        "/5 sample annotations" in out
        and "3 of 5 annotations have no mask" in out
        and train.warnings == []
    )
    assert choose_masks(train, "boxes")
    assert "3 of 5 annotations have no mask: masks are guessed" in capsys.readouterr().out
    assert codes(check_dataset(dataset, need_masks=True)) == {"ANN_NO_MASK": "warning"}

    rewrite(file, lambda data: strip(data, 0))
    with pytest.raises(
        UserError, match="^No segmentation masks found in COCO annotations: .*0 of 5 annotations"
    ):
        choose_masks(read_dataset(dataset)["train"], "given")
    assert choose_masks(read_dataset(dataset)["train"], "auto")
    assert "5 of 5 annotations have no mask: masks are guessed" in capsys.readouterr().out
    assert check_dataset(dataset) == []
    assert codes(check_dataset(dataset, need_masks=True)) == {"MASKS_NONE": "error"}


def test_where_masks_are_missing_only_those_of_train_are_guessed(dataset):
    for split in ("train", "valid"):
        rewrite(dataset / split / "_annotations.coco.json", drop_masks)
    problems = check_dataset(dataset, need_masks=True)
    train, valid = (problem.message for problem in problems if problem.code == "MASKS_NONE")
    assert "leave out --need_masks 1" in train and "guess masks from the boxes" in train
    assert "leave out --need_masks 1: there are no mask scores then" in valid
    assert "guess" not in valid and "--masks given" not in train + valid


def test_checking_takes_at_most_ten_times_as_long_as_loading():
    data = coco(200)
    polygon = np.random.default_rng(0).uniform(2, 28, 60).round(2).tolist()
    data["annotations"] = [
        {
            "id": n,
            "image_id": 1 + n % 200,
            "category_id": 1,
            "bbox": [1 + n / 4000, 2, 9, 9],
            "area": 81,
            "iscrowd": 0,
        }
        | {"segmentation": [polygon]}
        for n in range(8000)
    ]
    text = json.dumps(data)

    def seconds(action) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            action()
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(lambda: check_annotations(data, "x.json")) < 10 * seconds(
        lambda: json.loads(text)
    )


def test_reading_needs_no_torch_and_checking_no_pycocotools():
    code = "import sys, rfdetr.data.{}; assert '{}' not in sys.modules"
    for module, other in (("coco", "torch"), ("checks", "pycocotools")):
        subprocess.run([sys.executable, "-c", code.format(module, other)], cwd=ROOT, check=True)


def run_script(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "validate_setup.py"), *map(str, arguments)]
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "errors": "replace"}
    return subprocess.run(
        command, **options, env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment
    )


@pytest.mark.slow
def test_validate_setup_of_a_good_dataset(dataset, tmp_path):
    done = run_script(
        "--dataset", dataset, "--json", tmp_path / "report.json", PYTHONIOENCODING="cp1252"
    )
    assert done.returncode == 0, done.stderr
    assert (
        "Stage 2 and single stage (masks) are possible" in done.stdout and "vessel" in done.stdout
    )
    command = done.stdout.splitlines()[-1]
    assert command.startswith("Next: python train_detector_stage1.py --size ")
    assert f"--dataset {dataset}" in command
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    (problem,) = report["problems"]
    assert report["ok"] and problem["code"] == "CLASS_FEW" and all(report["stages"].values())
    assert report["splits"]["train"]["objects"] == 5 and report["environment"]["torch"]


def test_validate_setup_of_a_bad_dataset_reports_everything(dataset, tmp_path, capsys):
    def spoil(data: dict) -> None:
        data["annotations"][0]["bbox"] = [math.nan, 1, 2, 3]
        data["annotations"][1]["bbox"] = [35, 5, 10, 8]
        data["images"][3]["file_name"] = "gone.png"

    rewrite(dataset / "train/_annotations.coco.json", spoil)
    (dataset / "valid/1.png").write_bytes(b"no image")
    words = ["--dataset", dataset, "--json", tmp_path / "report.json", "--check_images", "yes"]
    with pytest.raises(SystemExit) as left:
        as_a_script(validate_setup.main, [str(word) for word in words])
    said = capsys.readouterr()
    assert left.value.code == 2 and "Traceback" not in said.err
    found = {
        problem["code"]
        for problem in json.loads((tmp_path / "report.json").read_text())["problems"]
    }
    few = {"CLASS_FEW"}  # of any dataset as small as this
    assert found - few == {"ANN_BBOX_NAN", "ANN_BBOX_CLIPPED", "IMG_MISSING", "IMG_CORRUPT"}
    assert all(code in said.out for code in found)


def test_validate_setup_tells_which_stages_boxes_allow(dataset, capsys):
    for split in ("train", "valid"):
        rewrite(
            dataset / split / "_annotations.coco.json",
            lambda d: [a.pop("segmentation") for a in d["annotations"]],
        )
    report = dataset.parent / "report.json"
    flags = ["--dataset", str(dataset), "--check_images", "0", "--json", str(report)]
    validate_setup.main(flags)
    assert "will guess masks from the boxes" in capsys.readouterr().out
    stages = json.loads(report.read_text())["stages"]
    assert stages == {"detector": True, "segmentation": True, "single": True}
    with pytest.raises(UserError, match="^No segmentation masks found in COCO annotations"):
        validate_setup.main(["--dataset", str(dataset), "--need_masks", "1"])


def check_setup(capsys, root: Path, *flags: str) -> tuple[str, str]:
    """(what validate_setup.py prints, how it ends where there are errors)."""
    capsys.readouterr()
    error = ""
    try:
        validate_setup.main(["--dataset", str(root), "--size", "tiny", "--device", "cpu", *flags])
    except UserError as left:
        error = str(left)
    return capsys.readouterr().out, error


def test_fix_is_advised_where_it_can_help(dataset, capsys):
    train = dataset / "train" / ANNOTATIONS
    rewrite(dataset / "valid" / ANNOTATIONS, lambda d: d["categories"][0].update(name="Cell"))
    _, error = check_setup(capsys, dataset)
    assert "--fix" not in error and error.endswith('--rename "Cell=cell"')
    assert f"python validate_setup.py --dataset {dataset} --size tiny" in error
    rewrite(
        dataset / "valid" / ANNOTATIONS,
        lambda d: d["annotations"].append(d["annotations"][0] | {"id": "x"}),
    )
    _, error = check_setup(capsys, dataset)
    assert error.endswith('--fix NEW_DIR --rename "Cell=cell"')
    assert f"in a copy: python validate_setup.py --dataset {dataset} --size tiny" in error
    train.write_text("{")
    _, error = check_setup(capsys, dataset)
    assert "JSON_INVALID" in error and "--fix" not in error


def test_a_renaming_that_is_advised_writes_where_the_first_check_did(dataset, tmp_path, capsys):
    rewrite(dataset / "valid" / ANNOTATIONS, lambda d: d["categories"][0].update(name="Cell"))
    report = tmp_path / "my report.json"
    flags = ["--json", str(report), "--check_images", "0", "--need_masks", "1"]
    _, error = check_setup(capsys, dataset, *flags)
    words = shlex.split(error.partition("run: python validate_setup.py ")[2])
    assert words[words.index("--check_images") + 1] == "0" and "--need_masks" in words
    report.unlink()
    validate_setup.main(words)
    assert json.loads(report.read_text())["ok"]


def test_the_command_that_lists_all_errors_reads_the_data_as_training_did(dataset):
    shutil.rmtree(dataset / "valid")
    rewrite(dataset / "train" / ANNOTATIONS, lambda d: d["annotations"][0].update(id="x"))
    with pytest.raises(UserError) as error:
        read_dataset(dataset, 0.25, exif="ignore", rename=["cell=blood cell"])
    words = shlex.split(str(error.value).partition("run: python validate_setup.py ")[2])
    flags = ["--dataset", str(dataset), "--val_fraction", "0.25", "--exif", "ignore"]
    assert words == [*flags, "--rename=cell=blood cell"]


def test_the_links_of_a_cleaned_copy_are_no_news(dataset, tmp_path, capsys):
    copy = tmp_path / "cleaned"
    out, _ = check_setup(capsys, dataset, "--fix", str(copy))
    assert "IMG_LINK" not in out and "its images are links" in out
    assert codes(check_dataset(copy)) == {}
    assert str(dataset) in (copy / COPY_NOTE).read_text()
    (dataset / "train/1.png").rename(tmp_path / "1.png")
    os.symlink(tmp_path / "1.png", dataset / "train/1.png")
    assert codes(check_dataset(dataset)) == {"IMG_LINK": "warning"}


def test_classes_that_train_or_valid_hardly_shows_are_told_in_a_line_each(dataset, capsys):
    rewrite(dataset / "valid" / ANNOTATIONS, lambda d: d["annotations"].pop())
    out, _ = check_setup(capsys, dataset)
    told = {line.split(":")[0]: line for line in out.splitlines() if line.startswith("[warning]")}
    few = told["[warning] CLASS_FEW"]
    assert "2 classes with fewer than 10 objects in train ('cell': 4, 'vessel': 1)" in few
    unscored = told["[warning] CLASS_NOT_SCORED"]
    assert "1 class of train without an object in valid ('vessel')" in unscored


def test_blanks_around_a_class_name_are_seen(dataset, capsys):
    for split in ("train", "valid"):
        rewrite(dataset / split / ANNOTATIONS, lambda d: d["categories"][1].update(name="cell "))
    rows = [line.split() for line in check_setup(capsys, dataset)[0].splitlines()]
    assert ["0", "1", "cell", "4", "1"] in rows and ["1", "2", '"cell', '"', "1", "1"] in rows


def test_masks_that_lack_in_a_part_are_told_with_the_way_out(dataset, capsys):
    rewrite(dataset / "train" / ANNOTATIONS, lambda d: d["annotations"][0].pop("segmentation"))
    out, _ = check_setup(capsys, dataset)
    (line,) = [line for line in out.splitlines() if "ANN_NO_MASK" in line]
    assert "--masks boxes" in line and "no mask scores" not in out
    rewrite(
        dataset / "valid" / ANNOTATIONS,
        lambda d: [entry.pop("segmentation") for entry in d["annotations"]],
    )
    assert "no mask scores" in check_setup(capsys, dataset)[0]


def test_validate_setup_names_the_packages_that_lack(monkeypatch):
    versions = {"torch": "1.13.1+cu117", "numpy": "1.26.4"}
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name, "99.0"))
    with pytest.raises(
        UserError,
        match=r"^torch is 1\.13\.1\+cu117, 2\.\d+ or newer is needed\. Run: .*pip install",
    ):
        validate_setup.main([])


def test_validate_setup_judges_the_size_resolution_and_device_to_be_trained(dataset, capsys):
    def crowd_in(data: dict) -> None:
        for n in range(101):  # one more than tiny's queries
            other = {
                "id": 1000 + n,
                "area": 12,
                "bbox": [n / 20, 1, 5, 5],
                "segmentation": [[n / 20, 1, n / 20 + 5, 1, n / 20, 6]],
            }
            data["annotations"].append(data["annotations"][0] | other)

    rewrite(dataset / "train/_annotations.coco.json", crowd_in)
    flags = [
        "--dataset",
        str(dataset),
        "--check_images",
        "0",
        "--val_fraction",
        "0.2",
        "--device",
        "cpu",
    ]
    validate_setup.main([*flags, "--size", "nano"])
    assert "IMG_MANY_OBJECTS" not in capsys.readouterr().out
    validate_setup.main([*flags, "--size", "tiny", "--resolution", "64"])
    said = capsys.readouterr().out
    assert "[warning] IMG_MANY_OBJECTS" in said and "image 1 (1.png): 103, queries: 100" in said
    assert ": train with more: --num_queries 200" in said
    advised = said.splitlines()[-1]
    assert " --size tiny --resolution 64 " in advised
    assert advised.endswith(" --val_fraction 0.2 --device cpu")
    assert "--num_queries, which warnings advise" in said.splitlines()[-2]
    validate_setup.main(flags)  # nano takes days without a GPU
    said = capsys.readouterr().out
    assert "tiny, 160 px (usual on cpu; --size checks another)" in said
    assert " --size tiny --dataset " in said.splitlines()[-1]
    validate_setup.main([*flags, "--size", "nano"])
    assert " --size nano " in capsys.readouterr().out.splitlines()[-1]
    for wrong in (["--resolution", "100"], ["--device", "abacus"]):
        with pytest.raises(UserError, match=" ".join(wrong)):
            validate_setup.main([*flags, *wrong])
