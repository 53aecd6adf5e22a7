"""benchmarks/peers_at_equal_time.py, but for the training itself: scores, table and picture."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from PIL import Image
from pycocotools.coco import COCO

import quickstart
from rfdetr.sizes import SIZES


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    """The benchmark's module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("peers_at_equal_time")


def finished_run(folder: Path, dataset: Path) -> None:
    """What a peer leaves behind: after one minute the true boxes alone, then the true masks of all
    images but one.
    """
    folder.mkdir(parents=True)
    truth = COCO(str(dataset / "valid" / "_annotations.coco.json"))
    left_out = truth.dataset["annotations"][0]["image_id"]
    boxes = []
    masks = []
    for annotation in truth.anns.values():
        found = {key: annotation[key] for key in ("image_id", "category_id")} | {"score": 0.9}
        boxes.append(found | {"bbox": annotation["bbox"]})
        if annotation["image_id"] != left_out:
            rle = truth.annToRLE(annotation)
            rle["counts"] = rle["counts"].decode()
            masks.append(found | {"segmentation": rle})
    (folder / "boxes.json").write_text(json.dumps(boxes))
    (folder / "masks.json").write_text(json.dumps(masks))
    points = [
        {"seconds": 60, "bbox": "boxes.json", "segm": None},
        {"seconds": 120, "bbox": "boxes.json", "segm": "masks.json"},
    ]
    (folder / "points.json").write_text(json.dumps(points))
    facts = {"parameters": 2_500_000, "images": 12_345, "taken": "3 epochs"}
    (folder / "facts.json").write_text(json.dumps(facts))


def test_finished_runs_are_scored_not_run_again(demo, script, tmp_path, monkeypatch, capsys):
    for name in ("yolo_0", "yolo_1", "joint_0", "joint_1"):
        finished_run(tmp_path / "out" / name, demo)
    words = ["--dataset", demo, "--minutes", 2, "--seeds", 0, 1, "--peers", "joint", "yolo"]
    words += ["--output_dir", tmp_path / "out", "--picture", tmp_path / "curves.webp"]
    monkeypatch.setattr(sys, "argv", ["peers_at_equal_time.py", *map(str, words)])
    script.main()
    table = capsys.readouterr().out
    (line,) = (line for line in table.splitlines() if line.startswith("| YOLO11n-seg"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    name, parameters, seeds, mask, mask50, box, minutes, images, taken = cells
    assert (parameters, seeds, minutes, images) == ("2.5 M", "2", "2.0", "12,345")
    assert box.startswith("1.000") and taken == "3 epochs"
    assert 0.3 < float(mask.split()[0]) < 1
    curve = json.loads((tmp_path / "out" / "yolo_0" / "scores.json").read_text())
    assert [point["segm mAP"] == 0 for point in curve] == [True, False]
    assert (tmp_path / "curves.webp").stat().st_size < 40_000
    assert Image.open(tmp_path / "curves.webp").format == "WEBP"


def test_a_peer_without_its_environment_is_told_how_to_get_one(demo, tmp_path):
    """As from a console, and before anything slow is imported."""
    words = ["--dataset", demo, "--peers", "yolo", "--output_dir", tmp_path / "out"]
    command = [sys.executable, ROOT / "benchmarks/peers_at_equal_time.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "--python yolo=" in done.stderr


def test_ours_has_the_numbers_of_quickstart_and_tiny():
    numbers = {}
    source = (ROOT / "benchmarks" / "peer_ours.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            numbers[node.targets[0].id] = node.value
    recipe = SIZES["tiny"].recipe
    assert ast.literal_eval(numbers["QUICKSTART_STEPS"]) == quickstart.STEPS["tiny"]
    batches = [value.value for value in numbers["BATCH"].values]
    one_step = recipe.batch * recipe.accum
    assert batches == [one_step, recipe.seg_batch * recipe.seg_accum, one_step]
