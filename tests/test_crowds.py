"""Images with more objects than usual: more queries, more detections, figures beside COCO's."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import quick_flags

import evaluate
import predict
import shrink_head
import train_detector_stage1
import train_seg_stage2
from rfdetr.classes import assign_rows
from rfdetr.cli import own_choices_of_an_earlier_run
from rfdetr.console import UserError
from rfdetr.detr import RFDETR
from rfdetr.metrics import coco_eval
from rfdetr.metrics.coco_eval import FIGURES, CocoEvaluator, counting
from rfdetr.metrics.table import format_table
from rfdetr.models.detector import Detector
from rfdetr.resolve import resolve
from rfdetr.settings import SingleSettings
from rfdetr.sizes import SIZES, with_queries
from rfdetr.tool_settings import EvaluationSettings
from rfdetr.weights import checkpoint
from rfdetr.weights.fitting import load_pretrained

QUERIES, OBJECTS = 500, 400
ROWS, COLUMNS, CELL = 20, 25, 8  # a grid of places, in pixels of the image
HEIGHT, WIDTH = ROWS * CELL, COLUMNS * CELL


def grid_boxes() -> np.ndarray:
    """A box in each place of the grid, (500, 4) xyxy."""
    y, x = np.divmod(np.arange(ROWS * COLUMNS), COLUMNS)
    corner = np.stack([x, y], axis=1) * CELL
    return np.concatenate([corner + 1, corner + CELL - 1], axis=1).astype(float)


@pytest.mark.parametrize(
    ("trained", "asked", "most"),
    [(None, None, 100), (64, None, np.inf), (64, 0, 100), (None, 64, np.inf)],
)
def test_queries_are_no_limit_of_an_image_that_is_seen_in_tiles(monkeypatch, trained, asked, most):
    def read_dataset(folder, fraction, queries, *more) -> dict:
        raise UserError(str(queries))

    monkeypatch.setattr(evaluate, "read_dataset", read_dataset)
    monkeypatch.setattr(evaluate, "find_splits", lambda folder: {"valid": None})
    settings = resolve(EvaluationSettings, {"checkpoint": "best.pt", "tile": asked})
    with pytest.raises(UserError, match=str(most)):
        evaluate.read_split(settings, {"size": asdict(SIZES["tiny"]), "tile": trained})


@pytest.mark.parametrize(
    ("queries", "select", "own"), [(None, 100, {}), (7, 7, {}), (7, 100, {"num_select": 100})]
)
def test_a_run_that_counted_its_detections_by_itself_goes_on_so(queries, select, own):
    resumed = {"size": asdict(SIZES["tiny"]) | {"select": select}}
    stored = {"num_queries": queries, "num_select": None}
    assert own_choices_of_an_earlier_run(SingleSettings, stored, resumed) == own


@pytest.fixture
def crowd_finder(tmp_path, monkeypatch) -> RFDETR:
    """A model of 500 queries, each with a place of its own: 400 are sure, 100 are not."""
    torch.manual_seed(0)
    size = with_queries(SIZES["tiny"], QUERIES, None)
    table = assign_rows(["cells"], [1], "dataset")
    detector = Detector(size, table.rows_total, table.background_last, mask_head="nano")
    content = checkpoint.make_content("single", size, 64, table, "nano", detector.state_dict())
    checkpoint.save(tmp_path / "best.pt", content)
    model = RFDETR.from_checkpoint(tmp_path / "best.pt", device="cpu")
    boxes = torch.from_numpy(grid_boxes() / [WIDTH, HEIGHT, WIDTH, HEIGHT]).float()
    cxcywh = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
    logits = torch.full((QUERIES, 2), -5.0)
    logits[:OBJECTS, 0] = torch.linspace(5, 1, OBJECTS)

    def forward(images: torch.Tensor) -> dict:
        B = len(images)
        return {
            "pred_logits": logits.expand(B, -1, -1),
            "pred_boxes": cxcywh.expand(B, -1, -1),
            "queries": torch.randn(B, QUERIES, size.hidden),
            "features": torch.randn(B, size.hidden, 4, 4),
        }

    monkeypatch.setattr(model.model, "forward", forward)
    return model


def test_an_image_with_400_objects_gets_400_masks(crowd_finder):
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    prediction = crowd_finder.predict(image)
    assert len(prediction) == len(prediction.rles) == OBJECTS
    assert all(rle["size"] == [HEIGHT, WIDTH] for rle in prediction.rles)
    few = crowd_finder.predict(image, max_detections=30)
    assert len(few) == len(few.rles) == 30
    np.testing.assert_array_equal(few.boxes, prediction.boxes[:30])
    assert len(crowd_finder.predict(image, 0.0, nms=0, max_detections=450)) == 450
    assert len(crowd_finder.predict(image)) == OBJECTS


def test_new_queries_are_drawn_like_the_ones_of_the_file():
    small = SIZES["tiny"]
    torch.manual_seed(0)
    source = Detector(small, rows=3, groups=2)
    source.query_feat.weight.data.normal_(mean=3.0, std=0.5)
    source.refpoint_embed.weight.data.normal_(mean=-1.0, std=0.1)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}

    def started(queries: int) -> tuple[Detector, str]:
        torch.manual_seed(5)
        model = Detector(with_queries(small, queries, None), rows=3, groups=2)
        return model, load_pretrained(model, dict(state), []).summary()

    model, report = started(QUERIES)
    new = QUERIES - small.queries
    assert f"{new} new ones" in report
    for name, mean, deviation in (("query_feat", 3.0, 0.5), ("refpoint_embed", -1.0, 0.1)):
        weights = getattr(model, name).weight.data.unflatten(0, (2, QUERIES))
        known = getattr(source, name).weight.data.unflatten(0, (2, small.queries))
        assert torch.equal(weights[:, : small.queries], known)
        drawn = weights[:, small.queries :]
        assert drawn.mean() == pytest.approx(mean, abs=0.1)
        assert drawn.std() == pytest.approx(deviation, rel=0.1)
        assert torch.equal(weights.flatten(0, 1), getattr(started(QUERIES)[0], name).weight)
        fewer = getattr(started(10)[0], name).weight.data.unflatten(0, (2, 10))
        assert torch.equal(fewer, known[:, :10])


def evaluated(objects: int, max_detections: int | None = None, masks: bool = True) -> dict:
    """The figures of one image with so many objects, all of them found."""
    boxes = grid_boxes()[:objects]
    annotations = []
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        entry = {"id": i + 1, "image_id": 1, "category_id": 1, "iscrowd": 0}
        entry |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
        annotations.append(entry | {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]})
    truth = {
        "images": [{"id": 1, "height": HEIGHT, "width": WIDTH}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cells"}],
    }
    evaluator = CocoEvaluator(truth, masks, max_detections=max_detections)
    rles = [mask["segmentation"] for mask in evaluator._true_masks] or None
    evaluator.add(1, boxes, np.linspace(0.9, 0.6, objects), np.ones(objects), rles)
    return evaluator.summary()


def test_crowded_images_are_scored_at_300_and_1000_too():
    summary, at_450, usual = evaluated(OBJECTS), evaluated(OBJECTS, 450), evaluated(100)
    for kind in ("bbox", "segm"):
        figures = summary[kind]
        assert list(figures) == [
            *FIGURES, "per_class", "mAP@300", "AR@300", "mAP@1000", "AR@1000"
        ]  # fmt: skip
        assert (figures["AR100"], figures["AR@300"], figures["AR@1000"]) == (0.25, 0.75, 1.0)
        assert figures["mAP"] < 0.3 < 0.7 < figures["mAP@300"] < figures["mAP@1000"] == 1.0
        assert at_450[kind]["AR@450"] == 1.0 and "AR@300" not in at_450[kind]
        assert [figures[name] for name in FIGURES] == [at_450[kind][name] for name in FIGURES]
        assert list(usual[kind]) == [*FIGURES, "per_class"]
    table = format_table(summary).splitlines()
    assert table[3].split() == ["mAP@300", "AR@300", "mAP@1000", "AR@1000"]
    assert table[4].split()[0] == "box" and table[5].split()[0] == "mask"


def test_both_libraries_give_these_figures(monkeypatch):
    ours = evaluated(120, masks=False)
    monkeypatch.setattr(coco_eval, "hotcoco", None)
    assert evaluated(120, masks=False) == ours and ours["bbox"]["AR@300"] == 1.0


def test_masks_are_drawn_for_all_that_a_figure_looks_at():
    scores = np.linspace(0.4, 0.1, OBJECTS)
    boxes, labels = np.zeros((OBJECTS, 4)), np.zeros(OBJECTS)
    assert counting(boxes, scores, labels).sum() == 100
    assert counting(boxes, scores, labels, 1000).sum() == OBJECTS


@pytest.mark.slow
def test_500_queries_go_through_all_scripts(few, call, tmp_path, capsys):
    flags = [*quick_flags(few), "--head", "coco91", "--num_queries", QUERIES]
    call(train_detector_stage1.main, *flags, "--output_dir", "one")
    assert f"--num_queries {QUERIES}: at 32 px there are 16 places" in capsys.readouterr().out
    assert torch.load(tmp_path / "one/best.pt")["size"]["queries"] == QUERIES
    call(shrink_head.main, "--in_ckpt", "one", "--out_ckpt", "one/small.pth")
    words = ["--checkpoint", "one/small.pth", "--output_dir", "two", "--fast_dev_run", 1]
    call(train_seg_stage2.main, *quick_flags(few), *words)
    size = torch.load(tmp_path / "two/best.pt")["size"]
    assert (size["queries"], size["select"]) == (QUERIES, QUERIES)
    words = ["--checkpoint", "two", "--threshold", 0, "--nms", 0, "--pictures", "0"]
    words += ["--input", few / "valid", "--output", "found"]
    call(predict.main, *words)
    records = json.loads((tmp_path / "found/predictions.json").read_text())
    assert len(records) == 2 * QUERIES and all(record["mask"] for record in records)
    call(predict.main, *words, "--max_detections", 7)
    assert len(json.loads((tmp_path / "found/predictions.json").read_text())) == 2 * 7
    words = ["--checkpoint", "two", "--dataset", few, "--max_detections", 400]
    call(evaluate.main, *words, "--json", "scores.json", "--results", "found")
    assert "mAP@400" in json.loads((tmp_path / "scores.json").read_text())["segm"]
    assert len(json.loads((tmp_path / "found/bbox.json").read_text())) == 2 * 400
