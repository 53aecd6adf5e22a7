"""Faults of a dataset that would pass unseen.

Orientation, masks beside their boxes, guesses, images scored twice.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quick_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_utils

import evaluate
import predict
import train_detector_stage1
import train_seg_stage2
import validate_setup
from rfdetr import console
from rfdetr.console import UserError, warn
from rfdetr.data.checks import check_file
from rfdetr.data.coco import inspect_dataset, read_dataset
from rfdetr.data.demo import make_demo
from rfdetr.data.exif import exif_note
from rfdetr.data.images import ORIENTATION, load_image
from rfdetr.data.layout import ANNOTATIONS
from rfdetr.data.rectangles import is_rectangle
from rfdetr.data.repair import fix_dataset
from rfdetr.data.rle import rle_extents
from rfdetr.detr import RFDETR, read_image
from rfdetr.text import is_control
from rfdetr.weights import checkpoint
from testkit.datasets import HEIGHT, WIDTH, coco, codes, rewrite, write


def change(root: Path, edit) -> None:
    rewrite(root / "train" / ANNOTATIONS, edit)


# ---------------------------------------------------------------- EXIF orientation


def turn(
    root: Path,
    number: int,
    orientation: int,
    size: tuple[int, int],
    kind: str = "jpg",
    said: bool = True,
) -> None:
    """Make a training image one of this orientation and stored size.

    It is white in its stored upper left corner.
    """
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(root / f"train/{number}.{kind}", exif=exif)
    change(root, lambda data: data["images"][number - 1].update(file_name=f"{number}.{kind}"))
    if not said:
        change(
            root,
            lambda data: [data["images"][number - 1].pop(side) for side in ("width", "height")],
        )


def white_corner(record) -> tuple[int, int]:
    """Which corner is white: (top or bottom, left or right) as 0 or -1."""
    pixels = load_image(record)
    return next((y, x) for y in (0, -1) for x in (0, -1) if pixels[y, x].min() > 200)


@pytest.mark.parametrize("stored", [True, False])
def test_what_one_size_proves_of_exif_holds_for_the_whole_dataset(dataset, stored):
    turn(dataset, 1, 3, (WIDTH, HEIGHT))
    turn(dataset, 2, 6, (WIDTH, HEIGHT) if stored else (HEIGHT, WIDTH))
    for wanted in (None, "apply", "ignore"):
        splits, problems = inspect_dataset(dataset, exif=wanted)
        train, note = splits["train"], exif_note(splits, wanted)
        assert problems == [] and train.exif == splits["valid"].exif == (
            "ignore" if stored else "apply"
        )
        corners = [white_corner(record) for record in train.images[:2]]
        assert corners == ([(0, 0)] * 2 if stored else [(-1, -1), (0, -1)])
        assert "2 images" in note and ("ignored" if stored else "applied") in note
        assert ("is not used" in note) == (wanted not in (None, train.exif))


@pytest.mark.parametrize(
    ("wanted", "corner"), [(None, (-1, -1)), ("apply", (-1, -1)), ("ignore", (0, 0))]
)
def test_without_a_proof_exif_is_what_the_flag_says_with_a_warning(dataset, wanted, corner):
    turn(dataset, 1, 3, (WIDTH, HEIGHT))
    splits, problems = inspect_dataset(dataset, exif=wanted)
    assert {(p.code, p.severity, p.count) for p in problems} == {("IMG_EXIF_UNKNOWN", "warning", 1)}
    assert "--exif" in problems[0].message and white_corner(splits["train"].images[0]) == corner


def test_sizes_that_disagree_on_exif_count_for_their_own_image_alone(dataset):
    turn(dataset, 1, 6, (WIDTH, HEIGHT))
    turn(dataset, 2, 6, (HEIGHT, WIDTH))
    turn(dataset, 3, 3, (WIDTH, HEIGHT))
    for wanted, third in ((None, (-1, -1)), ("ignore", (0, 0))):
        splits, problems = inspect_dataset(dataset, exif=wanted)
        assert [white_corner(record) for record in splits["train"].images[:3]] == [
            (0, 0),
            (0, -1),
            third,
        ]
        assert {p.code: p.count for p in problems} == {"IMG_EXIF_UNKNOWN": 1, "IMG_EXIF_MIXED": 1}


def test_a_size_left_out_follows_what_others_prove_of_exif(dataset):
    turn(dataset, 1, 6, (WIDTH, HEIGHT))
    turn(dataset, 2, 6, (WIDTH, HEIGHT), said=False)
    record = read_dataset(dataset)["train"].images[1]
    assert (record.width, record.height) == (WIDTH, HEIGHT) and white_corner(record) == (0, 0)
    fix_dataset(dataset, dataset.parent / "fixed", decode=False)
    entry = json.loads((dataset.parent / "fixed/train" / ANNOTATIONS).read_text())["images"][1]
    assert (entry["width"], entry["height"]) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_tiffs_which_pillow_turns_by_itself_follow_the_decision_too(dataset, orientation):
    turn(dataset, 1, orientation, (WIDTH, HEIGHT), "tif")
    record = read_dataset(dataset, exif="ignore")["train"].images[0]
    assert load_image(record).shape == (HEIGHT, WIDTH, 3) and white_corner(record) == (0, 0)


def test_what_was_decided_on_exif_is_not_remembered_for_another_flag(dataset):
    turn(dataset, 1, 3, (WIDTH, HEIGHT))
    os.utime(dataset / "train/1.jpg", (1, 1))
    for wanted in ("apply", "ignore", "apply"):
        assert read_dataset(dataset, exif=wanted)["train"].images[0].apply_exif == (
            wanted == "apply"
        )


def test_prediction_turns_images_as_training_did(few, tmp_path, call, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(few, data)
    for split in ("train", "valid"):
        for file in (data / split).glob("*.png"):
            exif = Image.Exif()
            exif[ORIENTATION] = 3
            Image.open(file).save(file, exif=exif)
    call(train_detector_stage1.main, *quick_flags(data), "--exif", "ignore", "--output_dir", "run")
    best = tmp_path / "run/best.pt"
    assert checkpoint.load(best)["exif"] == RFDETR(best, "cpu").exif == "ignore"
    turned = []
    monkeypatch.setattr(
        predict,
        "read_or_warn",
        lambda path, turn, **_: turned.append(turn) or read_image(path, turn),
    )
    words = [
        "--checkpoint",
        best,
        "--input",
        data / "valid",
        "--output",
        "found",
        "--device",
        "cpu",
    ]
    call(predict.main, *words)
    call(predict.main, *words, "--exif", "apply")
    assert turned == [False, False, True, True]

    pictures = []
    monkeypatch.setattr(
        "rfdetr.inference.originals.read_pixels",
        lambda path, turn, _: pictures.append(turn) or np.zeros((9, 9, 3), np.uint8),
    )
    RFDETR(best, "cpu").predict(file)
    splits = []
    monkeypatch.setattr(
        evaluate,
        "SplitEvaluator",
        lambda loader, *rest, **named: splits.append(loader.dataset.split) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        call(evaluate.main, "--checkpoint", best, "--dataset", data, "--device", "cpu")
    assert pictures == [False] and not any(image.apply_exif for image in splits[0].images)

    content = torch.load(best)
    del content["exif"], content["trained_on"]  # as earlier versions wrote it
    checkpoint.save(tmp_path / "old.pt", content)
    assert RFDETR(tmp_path / "old.pt", "cpu").exif == "apply"


# ---------------------------------------------------------------- where boxes and masks lie


def crowd(masks: list, boxes: list, side: int = 200) -> dict:
    entries = [
        {
            "id": n,
            "image_id": 1,
            "category_id": 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": mask,
        }
        for n, (mask, box) in enumerate(zip(masks, boxes), start=1)
    ]
    images = [{"id": 1, "file_name": "1.png", "width": side, "height": side}]
    return {"images": images, "annotations": entries, "categories": [{"id": 1, "name": "cell"}]}


def polygon(x: float, y: float, w: float, h: float) -> list:
    """Of five corners: of four, it might be a box that was exported as an outline."""
    return [[x, y, x + w, y, x + w, y + h, x + w / 2, y + h, x, y + h]]


def rle(x: float, y: float, w: float, h: float, packed: bool) -> dict:
    mask = np.zeros((200, 200), np.uint8, order="F")
    mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
    if packed:
        coded = mask_utils.encode(mask)
        return {"size": [200, 200], "counts": coded["counts"].decode()}
    changes = np.flatnonzero(np.diff(mask.ravel("F"), prepend=0)).tolist()
    return {"size": [200, 200], "counts": np.diff([0, *changes, mask.size]).tolist()}


FORMS = {
    "polygon": polygon,
    "packed": lambda *box: rle(*box, packed=True),
    "runs": lambda *box: rle(*box, packed=False),
}
BOXES = [[n * 8 + 3.0, 20.0 + n, 12.0, 16.0] for n in range(20)]


def found(data: dict) -> dict[str, tuple[str, int]]:
    return {
        problem.code: (problem.severity, problem.count)
        for problem in check_file("x.json", data=data).faults.problems()
    }


@pytest.mark.parametrize("form", FORMS)
def test_masks_beside_their_boxes_are_told(form):
    right = [FORMS[form](*box) for box in BOXES]
    shifted = [FORMS[form](x, y + 40, w, h) for x, y, w, h in BOXES]
    assert found(crowd(right, BOXES)) == {}
    assert found(crowd(shifted, BOXES)) == {"ANN_MASK_OFF_BOX": ("error", 20)}
    assert found(crowd(shifted[:3] + right[3:], BOXES)) == {"ANN_MASK_OFF_BOX": ("warning", 3)}
    few = found(crowd(shifted[:3] + right[3:] * 4, BOXES[:3] + BOXES[3:] * 4))
    assert few["ANN_MASK_OFF_BOX"] == ("warning", 3)
    assert found(crowd(shifted[:2] + right[2:], BOXES)) == {}
    swapped = [FORMS[form](y, x, h, w) for x, y, w, h in BOXES]
    severity, count = found(crowd(swapped, BOXES))["ANN_MASK_OFF_BOX"]
    assert severity == "error" and count >= 15


def rectangle(x: float, y: float, w: float, h: float, kind: str = "open") -> list:
    corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
    if kind == "closed":
        corners.append(corners[0])
    elif kind == "back":
        corners = [corners[2], *corners[1::-1], corners[3]]
    elif kind == "rounded":
        corners[1] = (x + w - 0.4, y + 0.4)
    elif kind == "turned":
        corners = [(x + w / 2, y), (x + w, y + h / 2), (x + w / 2, y + h), (x, y + h / 2)]
    elif kind == "crossed":
        corners[2:] = corners[:1:-1]
    return [[float(number) for corner in corners for number in corner]]


@pytest.mark.parametrize("kind", ["open", "closed", "back", "rounded", "turned", "crossed"])
def test_boxes_that_were_exported_as_outlines_are_told(kind):
    told = {"ANN_MASK_RECTANGLE": ("warning", 20)} if kind not in ("turned", "crossed") else {}
    masks = [rectangle(*box, kind) for box in BOXES]
    assert found(crowd(masks, BOXES)) == told
    others = [polygon(*box) for box in BOXES]
    assert found(crowd(masks[:9] + others[9:], BOXES)) == {}  # nine of twenty
    assert found(crowd(masks[:9], BOXES)) == {}  # nine in all
    assert [is_rectangle(mask) for mask in masks] == [bool(told)] * 20


def test_what_is_no_polygon_is_no_rectangle():
    rle = {"counts": [4], "size": [2, 2]}
    for segmentation in (None, [], [[]], [[1.0, 2.0]], [7], [["a"] * 8], [[None] * 8], rle):
        assert not is_rectangle(segmentation)
    assert not is_rectangle(rectangle(*BOXES[0]) * 2)


def test_a_cleaned_copy_leaves_rectangles_out_where_that_is_asked(few, tmp_path, call, capsys):
    data = shutil.copytree(few, tmp_path / "data")
    for split in ("train", "valid"):
        file = data / split / ANNOTATIONS
        content = json.loads(file.read_text())
        for entry in content["annotations"]:
            entry["segmentation"] = rectangle(*entry["bbox"])
        first = content["annotations"][0]
        first["segmentation"] = drawn = polygon(*first["bbox"])
        file.write_text(json.dumps(content))
    call(validate_setup.main, "--dataset", data, "--check_images", 0)
    said = capsys.readouterr().out
    assert "whose mask is a rectangle" in said
    assert "validate_setup.py --fix NEW_DIR --drop_rectangles 1" in said
    flags = ["--dataset", data, "--drop_rectangles", 1]
    with pytest.raises(UserError, match="add --fix NEW_DIR"):
        call(validate_setup.main, *flags)
    call(validate_setup.main, *flags, "--fix", "copy")
    assert "ANN_MASK_RECTANGLE: the mask is dropped, the box stays" in capsys.readouterr().out
    fixed = json.loads(Path("copy/valid", ANNOTATIONS).read_text())["annotations"]
    assert fixed[0]["segmentation"] == drawn
    assert all(entry["segmentation"] == [] for entry in fixed[1:])


def test_loose_boxes_and_masks_of_visible_parts_are_no_fault():
    masks = [polygon(*box) for box in BOXES]
    for corner in (0, 0.5, 1):  # twice each side, the object at either end or in the middle
        loose = [[x - corner * w, y - corner * h, 2 * w, 2 * h] for x, y, w, h in BOXES]
        assert "ANN_MASK_OFF_BOX" not in found(crowd(masks, loose))
    assert found(crowd([polygon(x, y, w / 3, h / 3) for x, y, w, h in BOXES], BOXES)) == {}
    assert found(crowd([polygon(x - 1, y - 1, w + 2, h + 2) for x, y, w, h in BOXES], BOXES)) == {}


@pytest.mark.parametrize("form", FORMS)
def test_boxes_that_are_corners_are_an_error_that_says_so(form):
    corners = [[x, y, x + w, y + h] for x, y, w, h in BOXES]
    masks = [FORMS[form](*box) for box in BOXES]
    code, (severity, count) = next(iter(found(crowd(masks, corners)).items()))
    assert (code, severity) == ("ANN_BBOX_CORNERS", "error") and count >= 18
    # the same by chance, and whole images
    chance = crowd(masks, corners[:5] + BOXES[5:])
    assert "ANN_BBOX_CORNERS" not in found(chance)
    at_zero = [[0, 0, 20.0 + n, 30] for n in range(20)]
    assert "ANN_BBOX_CORNERS" not in found(crowd([FORMS[form](*box) for box in at_zero], at_zero))


def test_many_boxes_that_leave_their_image_may_be_corners():
    corners = [[x, y, x + w, y + h] for x, y, w, h in [(90 + n, 80, 30, 40) for n in range(9)]]
    for boxes, is_said in ((corners, True), (corners[:2] + BOXES[2:], False)):
        problems = check_file("x.json", data=crowd([[]] * len(boxes), boxes)).faults.problems()
        (clipped,) = [one for one in problems if one.code == "ANN_BBOX_CLIPPED"]
        assert ("are they x1, y1, x2, y2" in clipped.message) == is_said


def test_boxes_and_polygons_in_0_to_1_are_an_error_that_says_so():
    share = [[side / 200 for side in box] for box in BOXES]
    masks = [polygon(*box) for box in BOXES]
    assert found(crowd([[]] * 20, share))["ANN_BBOX_NORMALISED"] == ("error", 20)
    assert found(crowd(masks, share)).keys() == {"ANN_BBOX_NORMALISED"}
    assert found(crowd([polygon(*box) for box in share], BOXES)) == {
        "ANN_POLYGON_NORMALISED": ("error", 20)
    }
    problem = check_file("x.json", data=crowd(masks, share)).faults.problems()[0]
    assert "in pixels" in problem.message and "multiply" in problem.message
    # objects of a pixel, and images of one
    assert found(
        crowd(masks[:-2] + [[]] * 2, BOXES[:-2] + [[0, 0, 1, 1], [0, 0, 0.5, 0.5]])
    ).keys() == {"ANN_NO_MASK"}
    assert "ANN_BBOX_NORMALISED" not in found(
        crowd([[]] * 3, [[0, 0, 1, 1], [0, 0, 0.9, 1], [0, 0, 1, 0.9]], side=1)
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.booleans(), min_size=1, max_size=200), st.integers(1, 25)), max_size=5
    )
)
def test_the_extent_of_an_rle_is_pycocotools_own(masks):
    rles, expected = [], []
    for bits, height in masks:
        width = -(-len(bits) // height)
        mask = np.resize(
            np.array(bits + [False] * (height * width - len(bits)), np.uint8), (height, width)
        )
        coded = mask_utils.encode(np.asfortranarray(mask))
        x, y, w, h = mask_utils.toBbox(coded).astype(int).tolist()
        changes = np.flatnonzero(np.diff(mask.ravel("F").astype(int), prepend=0)).tolist()
        counts = np.diff([0, *changes, mask.size]).tolist()
        rles += [{"size": [height, width], "counts": c} for c in (coded["counts"].decode(), counts)]
        expected += [(x, y, x + w, y + h) if mask.any() else None] * 2
    assert rle_extents(rles) == expected


# ---------------------------------------------------------------- --fix


def test_fix_never_takes_another_file_for_an_image(dataset):
    change(dataset, lambda data: data["images"][0].update(file_name="../cam2/2.png"))
    change(
        dataset,
        lambda data: data["images"][1].update(file_name=f"{dataset.parent}/elsewhere/3.png"),
    )
    change(dataset, lambda data: data["images"][2].update(file_name="sub/../3.png"))
    change(dataset, lambda data: data["images"][3].update(file_name=str(dataset / "train/4.png")))
    (dataset / "train/sub").mkdir()
    done = fix_dataset(dataset, dataset.parent / "fixed", decode=False)["train"]
    assert done == {"IMG_PATH: the same file's plain path is written": 2}
    data = json.loads((dataset.parent / "fixed/train" / ANNOTATIONS).read_text())
    assert [Path(entry["file_name"]).name for entry in data["images"]] == [
        "2.png",
        "3.png",
        "3.png",
        "4.png",
    ]
    assert data["images"][0]["file_name"] == "../cam2/2.png" and len(data["annotations"]) == 5
    problems = {problem.code: problem for problem in inspect_dataset(dataset.parent / "fixed")[1]}
    assert problems["IMG_PATH"].severity == "error" and problems["IMG_PATH"].count == 2


# ---------------------------------------------------------------- scoring what was trained on


def test_two_entries_of_one_file_are_on_one_side(tmp_path):
    write(tmp_path / "train", coco(12))
    os.link(tmp_path / "train/1.png", tmp_path / "train/copy.png")
    extra = ["./1.png", "copy.png", "./2.png", "./3.png", "./4.png"]
    more = [
        {"id": 100 + n, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for n, name in enumerate(extra)
    ]
    change(tmp_path, lambda data: data["images"].extend(more))
    for fraction in (0.1, 0.3, 0.5, 0.8):
        splits = inspect_dataset(tmp_path, fraction)[0]
        train, valid = (
            {os.stat(image.path).st_ino for image in splits[name].images}
            for name in ("train", "valid")
        )
        assert train and valid and not train & valid


@pytest.fixture(scope="module")
def undivided(tmp_path_factory) -> tuple[Path, Path]:
    """(a dataset without valid/, a checkpoint trained on three quarters of it)."""
    folder = tmp_path_factory.mktemp("undivided")
    make_demo(folder / "data", train=8, valid=1, test=0, size=64, seed=3)
    shutil.rmtree(folder / "data/valid")
    flags = map(
        str, [*quick_flags(folder / "data"), "--val_fraction", 0.25, "--output_dir", folder / "run"]
    )
    train_detector_stage1.main(list(flags))
    return folder / "data", folder / "run/best.pt"


def test_train_is_divided_in_evaluation_as_in_training(undivided, call, capsys):
    data, best = undivided
    words = ["--checkpoint", best, "--dataset", data, "--device", "cpu"]
    for fraction in (0.5, 0.125):
        with pytest.raises(UserError, match=r"trained with --val_fraction 0\.25"):
            call(evaluate.main, *words, "--val_fraction", fraction)
    capsys.readouterr()
    call(evaluate.main, *words)
    said = capsys.readouterr().out
    assert "--val_fraction 0.25" in said and "(valid, 2 images" in said
    assert "were trained on, by their content" not in said
    assert f"{data / 'train'} holds the images that were trained on, too" in said.splitlines()[-2]
    call(evaluate.main, *words, "--val_fraction", 0.25, "--split", "train")
    said = capsys.readouterr().out
    assert (
        "✓ --split train: the checkpoint was trained on 6 of the 6 images" in said
        and "scores on them" not in said
    )


def test_stage_2_tells_that_it_is_scored_on_images_of_its_detector(undivided, call, capsys):
    data, best = undivided
    flags = [*quick_flags(data), "--checkpoint", best, "--auto_shrink", 1, "--fast_dev_run", 1]
    call(train_seg_stage2.main, *flags, "--val_fraction", 0.25, "--output_dir", "same")
    assert "were trained on" not in capsys.readouterr().out
    call(train_seg_stage2.main, *flags, "--val_fraction", 0.5, "--output_dir", "other")
    told = "2 of the 4 images of valid were trained on, by their content (demo_"
    assert f"warning: {told}" in capsys.readouterr().out


def test_stage_2_tells_what_its_detector_would_need(undivided, call, capsys):
    data, best = undivided
    flags = [*quick_flags(data), "--checkpoint", best, "--auto_shrink", 1, "--fast_dev_run", 1]
    call(train_seg_stage2.main, *flags, "--val_fraction", 0.25, "--output_dir", "own")
    said = capsys.readouterr().out
    assert "hardly seen; a detector that stage 1 trains with --tile auto, or with --resolu" in said
    assert "was trained at" not in said
    flags[flags.index("--resolution") + 1] = 64
    call(train_seg_stage2.main, *flags, "--val_fraction", 0.25, "--output_dir", "other")
    assert f"--resolution 64: {best} was trained at 32 px" in capsys.readouterr().out


def test_ids_as_decimals_bring_no_other_fault(undivided, tmp_path):
    data = shutil.copytree(undivided[0], tmp_path / "data")

    def write_decimals(content: dict) -> None:
        for entry in content["annotations"]:
            entry["image_id"] = float(entry["image_id"])

    rewrite(data / "train" / ANNOTATIONS, write_decimals)
    assert {problem.code for problem in inspect_dataset(data, 0.25)[1]} == {"ANN_IMAGE_TYPE"}


def test_scored_images_that_were_trained_on_are_told_by_content(undivided, tmp_path, call, capsys):
    data, best = undivided
    shutil.copytree(data / "train", tmp_path / "other/valid")
    shutil.copytree(data / "train", tmp_path / "other/train")
    rewrite(
        tmp_path / "other/valid" / ANNOTATIONS,
        lambda d: [rename(tmp_path / "other/valid", e) for e in d["images"]],
    )
    call(evaluate.main, "--checkpoint", best, "--dataset", tmp_path / "other", "--device", "cpu")
    assert "warning: 6 of the 8 images of valid were trained on" in capsys.readouterr().out
    hashes = torch.load(best)["trained_on"]
    assert hashes.dtype == torch.int64 and len(hashes) == 6
    make_demo(tmp_path / "new", train=8, valid=2, test=0, size=64, seed=4)
    shutil.rmtree(tmp_path / "new/valid")
    call(
        evaluate.main,
        "--checkpoint",
        best,
        "--dataset",
        tmp_path / "new",
        "--device",
        "cpu",
        "--val_fraction",
        0.5,
    )
    assert "trained on" not in capsys.readouterr().out


def rename(folder: Path, entry: dict) -> None:
    (folder / entry["file_name"]).rename(folder / f"other_{entry['file_name']}")
    entry["file_name"] = f"other_{entry['file_name']}"


def test_weights_remember_what_they_started_from_was_trained_on(undivided, few, tmp_path, call):
    _, best = undivided
    call(
        train_detector_stage1.main,
        *quick_flags(few),
        "--pretrain_weights",
        best,
        "--output_dir",
        "run",
    )
    before, after = (
        set(torch.load(path)["trained_on"].tolist()) for path in (best, tmp_path / "run/best.pt")
    )
    assert len(after) == 10 and before < after


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["two\nlines", "bell\a", "\x1b[31mred", "half\ud800", "line\u2028break"]
)
def test_class_names_with_control_characters_are_an_error_that_fix_mends(dataset, name):
    for split in ("train", "valid"):
        rewrite(dataset / split / ANNOTATIONS, lambda data: data["categories"][0].update(name=name))
    assert codes(dataset) == {"CAT_NAME_CONTROL": "error"}
    message = inspect_dataset(dataset)[1][0].message
    assert message.isprintable() and "--fix" in message
    fix_dataset(dataset, dataset.parent / "fixed", decode=False)
    assert codes(dataset.parent / "fixed") == {}
    assert read_dataset(dataset.parent / "fixed")["train"].class_names[0].isprintable()


def test_no_control_character_reaches_the_console(dataset, tmp_path, monkeypatch, capsys):
    bad = "\x1b]0;title\x07\n✓ Done\r.png"
    change(dataset, lambda data: data["images"][0].update(file_name=bad))
    change(dataset, lambda data: data["categories"][1].update(name="x\x1b[2J"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        console.run_script(validate_setup.main, ["--dataset", str(dataset), "--size", "tiny"])
    with pytest.raises(UserError) as error:
        read_image(tmp_path / bad)
    warn(str(error.value))
    console.banner("TITLE", {"Dataset": bad})
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert all(character == "\n" or not is_control(character) for character in text)
        assert "\n✓ Done" not in text
    assert "\\x1b]0;title" in said.out


# ---------------------------------------------------------------- files that cannot be read


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_passing_error_is_neither_corruption_nor_remembered(dataset, monkeypatch, number):
    for file in dataset.rglob("*.png"):
        os.utime(file, (1, 1))
    (dataset / "train/2.png").write_bytes(b"no image")
    usual = Image.open

    def refuse(opened, *args, **options):
        path = str(getattr(opened, "name", opened))
        if path.endswith("train/1.png"):
            raise OSError(number, os.strerror(number), path)
        return usual(opened, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", refuse)
        problems = {problem.code: problem for problem in inspect_dataset(dataset, decode=True)[1]}
        assert (
            problems.keys() == {"IMG_UNREADABLE", "IMG_CORRUPT"}
            and problems["IMG_UNREADABLE"].severity == "error"
        )
        assert os.strerror(number) in problems["IMG_UNREADABLE"].message
        assert codes(dataset) == {"IMG_UNREADABLE": "warning", "IMG_CORRUPT": "warning"}
        fix_dataset(dataset, dataset.parent / "fixed", decode=True)
    assert codes(dataset, decode=True).keys() == {"IMG_CORRUPT"}
    names = [
        e["file_name"]
        for e in json.loads((dataset.parent / "fixed/train" / ANNOTATIONS).read_text())["images"]
    ]
    assert names == ["1.png", "3.png", "4.png"] and codes(dataset.parent / "fixed") == {}


@pytest.mark.skipif(sys.platform == "win32", reason="makes a pipe")
def test_pipes_and_folders_are_refused_by_their_type(dataset, tmp_path):
    (dataset / "train/1.png").unlink()
    os.mkfifo(dataset / "train/1.png")
    (dataset / "train/2.png").unlink()
    (dataset / "train/2.png").mkdir()
    begin = time.monotonic()
    for decode in (False, True):
        problems = inspect_dataset(dataset, decode=decode)[1]
        assert [(p.code, p.severity, p.count) for p in problems] == [("IMG_TYPE", "error", 2)]
        assert "a pipe" in problems[0].message and "a folder" in problems[0].message
    with pytest.raises(UserError, match="pipe"):
        read_image(dataset / "train/1.png")
    fix_dataset(dataset, tmp_path / "fixed", decode=False)
    assert codes(tmp_path / "fixed").keys() == {"CLASS_NOT_IN_TRAIN"}
    (dataset / "valid" / ANNOTATIONS).unlink()
    os.mkfifo(dataset / "valid" / ANNOTATIONS)
    assert "JSON_INVALID" in codes(dataset)
    assert time.monotonic() - begin < 60
