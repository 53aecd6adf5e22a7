"""Datasets as new users bring them: wrong areas, names, sizes, pages, layouts, and what is said."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import predict
import quickstart
import validate_setup
from rfdetr.classes import assign_rows
from rfdetr.console import UserError
from rfdetr.data.class_checks import rare_class_problems
from rfdetr.data.coco import inspect_dataset, read_dataset
from rfdetr.data.layout import ANNOTATIONS
from rfdetr.data.repair import fix_dataset
from rfdetr.data.statistics import shrink_warning
from rfdetr.models.detector import Detector
from rfdetr.renaming import alike_classes, is_near
from rfdetr.resolve import plain, read_layer, resolve
from rfdetr.runs.record import Run
from rfdetr.settings import DetectorSettings
from rfdetr.sizes import SIZES
from rfdetr.tiling import tiling_of
from rfdetr.training.engine import Progress
from rfdetr.training.next_commands import after_detector
from rfdetr.training.report import draw_pictures, print_banner
from rfdetr.weights import checkpoint
from testkit.datasets import HEIGHT, WIDTH, codes, rewrite


def change(root: Path, edit, split: str = "train") -> None:
    rewrite(root / split / ANNOTATIONS, edit)


def areas(root: Path) -> list[float]:
    entries = read_dataset(root)["train"].ground_truth["annotations"]
    return [entry["area"] for entry in entries]


# ---------------------------------------------------------------- areas


@pytest.mark.parametrize("wrong", [0, -3, 0.05, 1e6, "80", None, float("nan"), True])
def test_a_wrong_area_drops_nothing_and_is_computed(dataset, wrong):
    def spoil(data: dict) -> None:
        for entry in data["annotations"]:
            entry["area"] = wrong
        data["annotations"][1]["segmentation"] = []
        data["annotations"][1]["bbox"] = [4, 5, 10, 9]

    change(dataset, spoil)
    assert codes(dataset).get("ANN_AREA_INVALID") == (None if wrong is None else "warning")
    assert read_dataset(dataset)["train"].object_count == 5
    assert areas(dataset) == [80, 80, 90, 80, 80]
    fix_dataset(dataset, dataset.parent / "fixed", decode=False)
    assert "ANN_AREA_INVALID" not in codes(dataset.parent / "fixed")
    assert areas(dataset.parent / "fixed") == [80, 80, 90, 80, 80]


@pytest.mark.parametrize(("box", "code"), [([4, 5, 0, 8], "EMPTY"), ([50, 5, 9, 8], "OUTSIDE")])
def test_of_what_is_dropped_no_area_is_told(dataset, box, code):
    change(dataset, lambda data: data["annotations"][0].update(bbox=box, area=0))
    assert codes(dataset)[f"ANN_BBOX_{code}"] == "warning"
    assert "ANN_AREA_INVALID" not in codes(dataset)
    assert read_dataset(dataset)["train"].object_count == 4


@pytest.mark.parametrize("area", [80, 56.5, 120])
def test_areas_of_boxes_and_of_masks_stay_as_they_are(dataset, area):
    change(dataset, lambda data: [entry.update(area=area) for entry in data["annotations"]])
    assert areas(dataset) == [area] * 5 and "ANN_AREA_INVALID" not in codes(dataset)


def test_a_mask_without_a_pixel_gets_its_boxs_area(dataset):
    thin = {"area": 0, "segmentation": [[4, 5, 5, 5, 4, 5]], "bbox": [4, 5, 10, 8]}
    change(dataset, lambda data: data["annotations"][0].update(thin))
    assert areas(dataset)[0] == 80


# ---------------------------------------------------------------- class names


def call_otherwise(root: Path, split: str = "valid", **names: str) -> None:
    def edit(data: dict) -> None:
        for entry in data["categories"]:
            entry["name"] = names.get(entry["name"], entry["name"])

    change(root, edit, split)


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("Date", "date", True),
        ("blood vessel", "Blood_Vessels", True),
        ("glomerulus", "glomerulos", True),
        ("vessel", "vesel", True),
        ("ﬁg", "fig", True),
        ("type1", "type2", False),
        ("stage-10", "stage_1", False),
        ("cat", "bat", False),
        ("hazelnut", "walnut", False),
        ("", "s", False),
    ],
)
def test_near_names(one, other, near):
    assert is_near(one, other) == is_near(other, one) == near


def test_near_names_in_valid_are_an_error_with_the_flag_to_add(dataset):
    call_otherwise(dataset, cell="Cells", vessel="ve ssel")
    with pytest.raises(UserError) as error:
        read_dataset(dataset)
    assert '--rename "Cells=cell" --rename "ve ssel=vessel"' in str(error.value)
    flags = ["Cells=cell", "ve ssel=vessel"]
    splits = read_dataset(dataset, rename=flags)
    assert splits["valid"].class_names == splits["train"].class_names == ["cell", "vessel"]
    assert splits["valid"].objects_per_class == [2, 1]
    fix_dataset(dataset, dataset.parent / "fixed", decode=False, rename=flags)
    assert "CLASS_UNKNOWN" not in codes(dataset.parent / "fixed")


def test_the_only_class_without_a_partner_on_each_side_may_be_the_same(dataset):
    call_otherwise(dataset, vessel="walnut")
    with pytest.raises(UserError, match=r"train has 'cell', 'vessel'.*--rename \"walnut=vessel\""):
        read_dataset(dataset)


def test_a_class_that_train_lists_without_objects_stays_a_warning(dataset):
    change(dataset, lambda data: data["annotations"].pop())
    assert codes(dataset) == {"CLASS_NOT_IN_TRAIN": "warning"}


def add_class(data: dict, name: str, category_id: int, *annotations: int) -> None:
    """A category more, which these annotations get."""
    data["categories"].append({"id": category_id, "name": name})
    for index in annotations:
        data["annotations"][index]["category_id"] = category_id


def checked(root: Path, call, capsys) -> tuple[list[str], dict]:
    """(the lines that validate_setup.py prints, its report), whether there are errors or not."""
    with suppress(UserError):
        call(validate_setup.main, "--dataset", root, "--size", "tiny", "--json", "report.json")
    report = json.loads((root.parent / "report.json").read_text())
    return capsys.readouterr().out.splitlines(), report


def test_categories_of_one_name_are_one_row_with_the_first_id(dataset, call, capsys):
    change(dataset, lambda data: data["categories"][1].update(name="cell"))
    _, report = checked(dataset, call, capsys)
    assert "CAT_NAME_DUPLICATE" in {problem["code"] for problem in report["problems"]}
    rows = report["splits"]["train"]["classes"]
    assert [row["category_id"] for row in rows if row["name"] == "cell"] == [1]


@pytest.mark.parametrize("is_fault_in", ["train", "valid"])
def test_errors_of_images_hide_no_problem_of_classes(dataset, call, capsys, is_fault_in):
    change(dataset, lambda data: add_class(data, "CELL", 2, 1), "valid")
    change(dataset, lambda data: data["categories"].pop(1), "valid")
    (dataset / is_fault_in / "2.png").unlink()
    _, report = checked(dataset, call, capsys)
    found = {problem["code"]: problem for problem in report["problems"]}
    kinds = {"IMG_MISSING", "CLASS_UNKNOWN", "CLASS_FEW", "CLASS_NOT_SCORED"}
    assert found.keys() == kinds
    assert found["CLASS_UNKNOWN"]["places"] == ["'CELL': 2 annotations"]
    # what the missing image shows is counted, too: it may be put there
    kind = " listed" if is_fault_in == "train" else ""  # beside the table's count of usable ones
    assert found["CLASS_FEW"]["places"] == [f"'cell': 4{kind}", f"'vessel': 1{kind}"]
    assert found["CLASS_NOT_SCORED"]["places"] == ["'vessel'"]


@pytest.mark.parametrize("is_fault_in", [None, "train"])
def test_crowd_regions_are_no_objects_of_a_class_beside_errors_either(
    dataset, call, capsys, is_fault_in
):
    change(dataset, lambda data: [entry.update(iscrowd=1) for entry in data["annotations"][:2]])
    if is_fault_in:
        (dataset / is_fault_in / "2.png").unlink()
        change(dataset, lambda data: data["annotations"][1].update(id="x"))
    _, report = checked(dataset, call, capsys)
    (few,) = [problem for problem in report["problems"] if problem["code"] == "CLASS_FEW"]
    kind = " listed" if is_fault_in else ""
    assert few["places"] == [f"'cell': 2{kind}", f"'vessel': 1{kind}"]


def test_errors_of_categories_are_not_taken_for_missing_classes(dataset):
    change(dataset, lambda data: data["categories"].pop(1))
    assert codes(dataset) == {"ANN_CATEGORY_UNKNOWN": "error"}
    change(dataset, lambda data: add_class(data, "lymph node", 9, 1), "valid")
    assert codes(dataset) == {"ANN_CATEGORY_UNKNOWN": "error", "CLASS_UNKNOWN": "error"}


def test_no_category_id_is_made_up_in_the_report(dataset, call, capsys):
    change(dataset, lambda data: add_class(data, "lymph node", 9, 1), "valid")
    lines, report = checked(dataset, call, capsys)
    rows = [line.split() for line in lines]
    assert ["2", "-", "lymph", "node", "0", "1"] in rows
    ids = {
        name: [entry["category_id"] for entry in split["classes"]]
        for name, split in report["splits"].items()
    }
    assert ids == {"train": [1, 2, None], "valid": [1, 2, 9]}


def test_classes_that_differ_in_case_alone_are_told_with_the_flag_that_joins_them(
    dataset, call, capsys
):
    for split in ("train", "valid"):
        change(dataset, lambda data: add_class(data, "Cell", 5, 1), split)
    _, report = checked(dataset, call, capsys)
    (alike,) = [problem for problem in report["problems"] if problem["code"] == "CLASS_ALIKE"]
    assert (alike["severity"], alike["renames"]) == ("warning", ["Cell=cell"])
    assert '--rename "Cell=cell"' in alike["message"]
    joined = read_dataset(dataset, rename=alike["renames"])["train"]
    assert (joined.class_names, joined.objects_per_class) == (["cell", "vessel"], [4, 1])


@pytest.mark.parametrize("name", ["lymph node", "Lymph_Node", "lymph-node"])
def test_names_that_differ_in_blanks_and_dashes_are_alike(name):
    counts = {"lymph_node": 5, name: 2, "CD4": 1, "CD4-": 1}
    assert alike_classes(counts) == {name: "lymph_node"}


def test_a_class_that_no_split_shows_is_told(dataset, call, capsys):
    for split in ("train", "valid"):
        change(dataset, lambda data: add_class(data, "podocyte", 55), split)
    _, report = checked(dataset, call, capsys)
    (unused,) = [one for one in report["problems"] if one["code"] == "CLASS_NOT_IN_TRAIN"]
    assert unused["severity"] == "warning" and "'podocyte'" in unused["message"]


def test_names_that_are_as_near_are_all_offered(dataset, call, capsys):
    change(dataset, lambda data: add_class(data, "Cell", 5, 1))
    change(dataset, lambda data: add_class(data, "CELL", 5, 1), "valid")
    with pytest.raises(UserError, match='--rename "CELL=Cell" or --rename "CELL=cell"'):
        read_dataset(dataset)
    _, report = checked(dataset, call, capsys)
    assert {problem["code"]: problem["renames"] for problem in report["problems"]} == {
        "CLASS_UNKNOWN": [],
        "CLASS_FEW": [],
        "CLASS_ALIKE": ["Cell=cell"],
    }


def test_renaming_merges_with_a_class_of_the_new_name(dataset):
    def add(data: dict) -> None:
        data["categories"].append({"id": 7, "name": "Cell"})
        data["annotations"][1]["category_id"] = 7

    change(dataset, add, "valid")
    valid = read_dataset(dataset, rename=["Cell=cell"])["valid"]
    assert valid.objects_per_class == [2, 1]
    assert {entry["category_id"] for entry in valid.ground_truth["annotations"]} == {1, 2}


@pytest.mark.parametrize("flags", [["cell=vessel", "vessel=cell"], ["vessel=cell", "cell=top"]])
def test_names_can_be_swapped_and_handed_on(dataset, flags):
    splits = read_dataset(dataset)
    before = splits["train"].objects_per_class
    renamed = read_dataset(dataset, rename=flags)
    new = dict(pair.split("=") for pair in flags)
    for name, split in renamed.items():
        assert split.class_names == [new[one] for one in splits[name].class_names]
    assert renamed["train"].objects_per_class == before


def test_a_new_name_that_is_renamed_itself_is_told_with_the_flags_for_a_chain(dataset, capsys):
    for split in ("train", "valid"):
        change(dataset, lambda data: add_class(data, "Cell", 5, 1), split)
    read_dataset(dataset, rename=["cell=vessel", "vessel=cell"])
    assert "at once" not in capsys.readouterr().out
    read_dataset(dataset, rename=["Cell=vessel", "vessel=top"])
    said = capsys.readouterr().out
    assert "'Cell' is now 'vessel', not 'top'" in said
    flags = '--rename "Cell=top" in place of --rename "Cell=vessel"'
    assert flags in said
    with pytest.raises(UserError, match=r'no class \'b\'.*in place of both give --rename "Cell=c"'):
        read_dataset(dataset, rename=["Cell=b", "b=c"])
    with pytest.raises(UserError, match="'Cell' is renamed to 'a' already"):
        read_dataset(dataset, rename=["Cell=a", "Cell=b"])


@pytest.mark.parametrize("given", [["vessel=Cell", "Cell=cell"], ["vessel=Cell"]])
def test_flags_that_are_advised_beside_given_ones_work_when_pasted(dataset, given):
    for split in ("train", "valid"):
        change(dataset, lambda data: add_class(data, "Cell", 5, 1), split)
    (alike,) = [
        problem
        for problem in rare_class_problems(read_dataset(dataset, rename=given)["train"], None)
        if problem.code == "CLASS_ALIKE"
    ]
    advised = [*(set(given) - set(alike.renames_replaced)), *alike.renames]
    joined = read_dataset(dataset, rename=advised)["train"]
    assert (len(joined.class_names), joined.objects_per_class) == (1, [5])
    assert f"--rename \"{alike.renames_replaced[0]}\")" in alike.message
    assert "(in place of " in alike.message


def test_the_check_that_is_advised_gives_no_flag_twice(dataset, call, capsys):
    call_otherwise(dataset, cell="Cells", vessel="other")
    shutil.copytree(dataset / "valid", dataset / "test")
    flags = ["--dataset", dataset, "--size", "tiny", "--device", "cpu", "--check_images", "0"]
    with pytest.raises(UserError) as error:
        call(validate_setup.main, *flags, "--rename", "cell=cello", "--rename", "other=vessel")
    words = shlex.split(str(error.value).partition("run: python validate_setup.py ")[2])
    renames = [word for word in words if "=" in word]
    assert renames == ["--rename=cell=cello", "--rename=other=vessel", "Cells=cello"]
    call(validate_setup.main, *words)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("Cel=cell", r"the dataset has no class 'Cel' \(did you mean .*'Cells'"),
        ("Cells=cel", r"train has no class 'cel' \(did you mean .*'cell'"),
        ("Cells", r"expected OLD=NEW"),
        ("Cells=", r"no class ''|empty"),
    ],
)
def test_a_rename_that_names_no_class_is_an_error(dataset, value, words):
    call_otherwise(dataset, cell="Cells")
    with pytest.raises(UserError, match=words):
        read_dataset(dataset, rename=[value])


def test_names_with_an_equals_sign_or_a_dash_can_be_renamed(dataset):
    call_otherwise(dataset, cell="-a=b")
    call_otherwise(dataset, split="train", cell="a=b")
    with pytest.raises(UserError, match=r'--rename="-a=b=a=b"'):
        read_dataset(dataset)
    assert read_dataset(dataset, rename=["-a=b=a=b"])["valid"].objects_per_class == [2, 1]


def test_a_checkpoint_of_near_names_offers_the_flag():
    table = assign_rows(["date", "fig"], [1, 2], "dataset")
    with pytest.raises(UserError, match=r'--rename "Date=date"\. Otherwise: Use the checkpoint'):
        table.in_order_of(["Date", "fig"], [1, 2], "data (valid)")
    with pytest.raises(UserError, match=r"\. Use the checkpoint"):
        table.in_order_of(["fig"], [1], "data (valid)")


def save_model(file: Path, names: list[str]) -> None:
    size = replace(SIZES["tiny"], resolution=32)
    model = Detector(size, len(names) + 1, True)
    table = assign_rows(names, [1, 2], "dataset")
    content = checkpoint.make_content("detector", size, 32, table, None, model.state_dict())
    checkpoint.save(file, content)


def test_every_script_takes_rename_and_hands_it_on(dataset, tmp_path, call, capsys):
    call_otherwise(dataset, cell="Cell")
    flags = ["--dataset", dataset, "--device", "cpu", "--rename", "Cell=cell"]
    call(validate_setup.main, *flags, "--size", "tiny", "--fix", "fixed")
    assert "1  --rename: categories with their new name" in capsys.readouterr().out
    call(validate_setup.main, *flags, "--size", "tiny")
    assert capsys.readouterr().out.strip().endswith(" --rename=Cell=cell --device cpu")
    save_model(tmp_path / "x.pt", ["Cell", "vessel"])
    with pytest.raises(UserError, match=r'add: --rename "cell=Cell" \(in place of '):
        call(evaluate.main, "--checkpoint", "x.pt", *flags)
    call(evaluate.main, "--checkpoint", "x.pt", *flags[:-1], "cell=Cell")
    assert "Cell " in capsys.readouterr().out
    kept = plain(resolve(DetectorSettings, {"rename": ("Cell=cell",)}))
    assert read_layer(DetectorSettings, kept, "config.yaml")["rename"] == ("Cell=cell",)
    (tmp_path / "quick.yaml").write_text("rename: [Cell=cell, -a=b]\nseed: 3\n")
    words = quickstart.config_words(str(tmp_path / "quick.yaml"), vars(quickstart.parse([])))
    assert words == ["--rename=Cell=cell", "--rename=-a=b", "--seed=3"]
    assert quickstart.Job(quickstart.parse(words)).flags("rename") == tuple(words[:2])


# ---------------------------------------------------------------- nothing to score


def empty_valid(dataset: Path, *tables: str) -> None:
    change(dataset, lambda data: data.update({table: [] for table in tables}), "valid")


@pytest.mark.parametrize(
    ("tables", "words", "way_out"),
    [
        (["annotations"], "has no objects", "Annotate a few of its images, or remove that split"),
        (["annotations", "images"], "is empty", "Put images there, or remove that split"),
    ],
)
def test_a_valid_split_without_objects_is_told_before_and_in_training(
    dataset, call, capsys, tables, words, way_out
):
    empty_valid(dataset, *tables)
    lines, report = checked(dataset, call, capsys)
    told = f"warning: the valid split {words}: there are no scores, and best.pt holds the last "
    told += f"epoch's weights. {way_out} and add --val_fraction 0.1"
    assert told in lines and report["ok"]
    assert not [line for line in lines if "Draw the masks" in line]
    print_banner(begun(dataset), torch.nn.Linear(1, 1), "cpu")
    assert told in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("epochs", "augment", "is_told"),
    [(100, "dihedral", True), (99, "dihedral", False), (100, "none", False)],
)
def test_few_images_that_are_seen_often_are_to_be_varied(dataset, capsys, epochs, augment, is_told):
    session = begun(dataset)
    changes = {"epochs": epochs, "augment": augment}
    session.settings = replace(session.settings, **changes)
    print_banner(session, torch.nn.Linear(1, 1), "cpu")
    told = "Each image is seen 100 times in all. --augment microscopy" in capsys.readouterr().out
    assert told == is_told


def test_a_part_of_train_without_objects_asks_for_another_part(dataset, capsys):
    shutil.rmtree(dataset / "valid")
    change(dataset, lambda data: data.update(annotations=data["annotations"][:1]))
    session = begun(dataset, val_fraction=0.25)
    if session.splits["valid"].object_count:  # which image is taken, a hash decides
        session.splits["train"], session.splits["valid"] = reversed(session.splits.values())
    print_banner(session, torch.nn.Linear(1, 1), "cpu")
    assert "epoch's weights. Take another --val_fraction" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("weights", "words"), [("ema", "the averaged weights (EMA)"), ("regular", "the weights")]
)
def test_which_weights_come_next_without_scores_is_said(dataset, tmp_path, weights, words):
    session = begun(dataset)
    session.folder = tmp_path
    table = assign_rows(["cell", "vessel"], [1, 2], "coco91")
    best = {"weights": weights, "value": None}
    remark, command = after_detector(session, table, best)
    assert remark.endswith(f"better: {words} of the last epoch are taken")
    assert f"checkpoint_best_{weights}.pth" in command
    assert after_detector(session, table, best | {"value": 0.1}) == ("", command)


def test_no_folder_is_made_for_no_pictures(tmp_path):
    evaluator = SimpleNamespace(pictures=lambda model, count: [])
    with Run(tmp_path, {}, tensorboard=False) as run:
        draw_pictures(run, evaluator, torch.nn.Linear(1, 1), 1, best=True)
    assert not (tmp_path / "predictions").exists()


# ---------------------------------------------------------------- sizes and pages


def half_transparent(mode: str) -> Image.Image:
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, : WIDTH // 2] = 0
    if mode == "P":
        image = Image.fromarray(np.minimum(alpha, 1), "P")
        image.putpalette([200, 0, 0, 0, 200, 0])
        image.info["transparency"] = 0
        return image
    image = Image.new(mode, (WIDTH, HEIGHT))
    image.putalpha(Image.fromarray(alpha))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_told_where_images_are_decoded(dataset, mode):
    half_transparent(mode).save(dataset / "train/1.png")
    Image.new("RGBA", (WIDTH, HEIGHT), (1, 2, 3, 255)).save(dataset / "train/2.png")
    for _ in range(2):  # what is kept of the first check changes nothing
        (problem,) = inspect_dataset(dataset, decode=True)[1]
        assert (problem.code, problem.severity) == ("IMG_ALPHA", "warning")
        assert problem.places == [f"{dataset / 'train/1.png'}: 50% of it"]
        assert codes(dataset) == {}


def shrink_boxes(data: dict) -> None:
    for entry in data["annotations"]:
        entry.update(bbox=[4, 5, 2, 2], area=4, segmentation=[])


def test_large_images_are_told_with_the_factor_and_the_way_out():
    said = shrink_warning([3000, 700], 384, 32)
    assert (
        "1 of 2 images" in said
        and "7.8 times" in said
        and "--resolution 768" in said
        and "--tile auto" in said
    )
    said = shrink_warning([640], 384, 32, np.array([3.0, 4.0, 90.0]))
    assert "the median 4.0" in said and "--resolution 768" in said
    assert shrink_warning([1536], 384, 32, np.array([8.0, 90.0])) == ""
    assert shrink_warning([3000], 384, 32).startswith("the image is shrunk 7.8 times to the model")
    assert shrink_warning([], 384, 32) == shrink_warning([1536], 384, 32, np.array([])) == ""


@pytest.mark.parametrize(
    "trained_with, way_out",
    [
        ({"image_side": 600}, "--tile auto looks at parts of them; a model trained with --tile"),
        ({"tile": 512, "image_side": 3000}, "--tile auto looks at parts of them, as its training"),
        ({}, "--tile 768 looks at parts of them; a model trained with --tile auto, or with --res"),
        ({"image_side": 3000}, "a model trained with --tile auto, or with --resolution 768, sees"),
    ],
)
def test_a_trained_model_is_given_the_tile_that_helps_it_now(trained_with, way_out):
    said = shrink_warning([3000, 700], 384, 32, trained_with=trained_with)
    assert f": hardly seen; {way_out}" in said
    advised = re.search("--tile (auto|[0-9]+) looks", said)
    if advised:
        tile = "auto" if advised[1] == "auto" else int(advised[1])
        side = tiling_of(trained_with, tile, None, None).side
        assert shrink_warning([side, side], 384, 32, trained_with=trained_with) == ""


def test_validation_evaluation_and_prediction_say_it_once(dataset, few, tmp_path, call, capsys):
    save_model(tmp_path / "x.pt", ["cell", "vessel"])
    change(dataset, shrink_boxes)
    change(dataset, shrink_boxes, "valid")
    call(validate_setup.main, "--dataset", dataset, "--size", "tiny", "--resolution", 32)
    said = capsys.readouterr().out
    assert said.count("hardly seen") == said.count("[warning] ANN_SMALL") == 1
    call(evaluate.main, "--checkpoint", "x.pt", "--dataset", dataset, "--device", "cpu")
    assert capsys.readouterr().out.count("hardly seen") == 1
    Image.new("RGB", (300, 40)).save(tmp_path / "wide.png")
    frames = [Image.new("L", (20, 20), gray) for gray in (0, 99, 200)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    files = ["wide.png", "stack.tif"]
    call(
        predict.main,
        "--checkpoint",
        "x.pt",
        "--input",
        *files,
        "--output",
        "out",
        "--device",
        "cpu",
    )
    said = capsys.readouterr().out
    assert (
        said.count("hardly seen") == 1
        and "1 of 2 images is shrunk" in said
        and "9.4 times" in said
    )
    assert "1 image has several pages or frames (stack.tif: 3): the first of each is read" in said


def begun(dataset: Path, **options: object) -> SimpleNamespace:
    """What the banner of a training says something of."""
    session = SimpleNamespace(
        settings=resolve(DetectorSettings, {"size": "tiny"}),
        splits=read_dataset(dataset, **options),
        size=SIZES["tiny"],
        resolution=32,
        tiling=None,
        letterbox=False,
        trained_on=None,
        images_an_epoch=4,
        progress=Progress(micro_batch=1, steps=1),
        precision=SimpleNamespace(name="fp32"),
        run=SimpleNamespace(folder="runs/x"),
    )
    session.train = session.splits["train"]
    return session


def test_training_says_it_after_its_banner(dataset, capsys):
    change(dataset, shrink_boxes)
    session = begun(dataset)
    print_banner(session, torch.nn.Linear(1, 1), "cpu")
    assert capsys.readouterr().out.count("hardly seen") == 1


def test_several_pages_are_a_warning_but_a_cameras_second_picture_is_none(dataset):
    frames = [Image.new("RGB", (40, 30), (gray, 0, 0)) for gray in (0, 99)]
    for number, name in enumerate(("1.tif", "2.gif", "3.mpo.jpg")):
        form = "MPO" if "mpo" in name else None
        frames[0].save(dataset / "train" / name, form, save_all=True, append_images=frames[1:])
        change(dataset, lambda data, n=number, name=name: data["images"][n].update(file_name=name))
    (problem,) = inspect_dataset(dataset, decode=True)[1]
    assert (problem.code, problem.severity, problem.count) == ("IMG_PAGES", "warning", 2)
    assert (
        problem.places[0].endswith("1.tif: 2")
        and "the first page of each is read" in problem.message
    )


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["data.yaml", "images/train/1.jpg", "labels/train/1.txt"], "YOLO"),
        (["train/images/1.jpg", "train/labels/1.txt"], "YOLO"),
        (["data.yaml"], "YOLO"),
        (["Annotations/1.xml", "JPEGImages/1.jpg"], "Pascal VOC"),
        (["train/1.xml", "train/1.jpg"], "Pascal VOC"),
    ],
)
def test_other_formats_are_named(tmp_path, files, words):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    command = f"python convert_dataset.py --input {tmp_path} --output"
    with pytest.raises(UserError, match=f"it is a {words} dataset.*{command}"):
        read_dataset(tmp_path)


def test_the_folder_beside_is_named(dataset):
    for wrong in (dataset / "train", dataset / "train" / ANNOTATIONS, dataset.parent):
        with pytest.raises(UserError, match=r"run the same command with --dataset") as error:
            read_dataset(wrong)
        assert str(error.value).endswith(f"--dataset {dataset}")
    with pytest.raises(UserError, match="there is no such folder"):
        read_dataset(dataset / "nowhere")
