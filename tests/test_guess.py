"""Masks guessed from boxes: as good as promised, cached, said, and never scored against."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quick_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as mask_api
from scipy.special import expit

import evaluate
import train_seg_single_stage
import train_seg_stage2
from rfdetr.data import guess_weights
from rfdetr.data.coco import read_dataset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.guess import UNLEARNT, guess_masks
from rfdetr.data.guess_weights import LEAST_OBJECTS, learn_weights, logistic_regression
from rfdetr.data.images import load_image
from rfdetr.data.loaders import EpochSampler
from rfdetr.data.mask_source import images_with_drawn_masks
from rfdetr.data.records import CocoSplit
from rfdetr.data.sampling import make_mix
from rfdetr.masks import to_rle
from rfdetr.runs.record import Run
from rfdetr.tiling import Tiling
from rfdetr.training.report import draw_guesses
from testkit.datasets import changed_copy


def without_masks(split: CocoSplit, keep: int = 0) -> CocoSplit:
    """The split as somebody would have it who drew masks in its first `keep` images alone."""
    images = list(split.images[:keep])
    for image in split.images[keep:]:
        images.append(replace(image, segmentations=[None] * len(image.segmentations)))
    return replace(split, images=images)


def mean_iou(split: CocoSplit, masks: list[list]) -> float:
    overlaps = []
    for image, guesses in zip(split.images, masks):
        truth = [to_rle(mask, image.height, image.width) for mask in image.segmentations]
        for guess, true in zip(guesses, truth):
            overlaps.append(mask_api.iou([guess], [true], [0])[0, 0])
    return float(np.mean(overlaps))


def test_guesses_are_near_the_drawn_masks(demo):
    split = read_dataset(demo)["train"]
    dataset = SplitDataset(without_masks(split), 96, None, masks=True, guess=True)
    guesses = [dataset.segmentations(index) for index in range(len(split.images))]
    whole_boxes = []
    for image in split.images:
        xywh = np.hstack([image.boxes[:, :2], image.boxes[:, 2:] - image.boxes[:, :2]])
        rles = mask_api.frPyObjects(xywh.astype(float), image.height, image.width)
        whole_boxes.append(rles)
    assert mean_iou(split, guesses) > max(0.8, mean_iou(split, whole_boxes) + 0.1)


def test_drawn_masks_teach_how_the_others_are_guessed(demo):
    split = read_dataset(demo)["train"]
    some = without_masks(split, keep=8)
    dataset = SplitDataset(some, 96, None, masks=True, guess=True)
    assert sum(len(image.labels) for image in some.images[:8]) >= LEAST_OBJECTS
    rest = replace(split, images=list(split.images[8:]))
    learnt = [dataset.segmentations(index) for index in range(8, len(split.images))]
    dataset = SplitDataset(some, 96, None, masks=True, guess=True)
    dataset.guess_weights = UNLEARNT
    unlearnt = [dataset.segmentations(index) for index in range(8, len(split.images))]
    assert mean_iou(rest, learnt) > mean_iou(rest, unlearnt) + 0.005


def test_few_drawn_masks_and_unreadable_images_teach_nothing(demo, tmp_path):
    split = read_dataset(demo)["train"]
    none, few = without_masks(split), without_masks(split, keep=1)
    gone = without_masks(split, keep=8)
    for i in range(8):
        gone.images[i] = replace(gone.images[i], path=tmp_path / "gone.png")
    for changed in (none, few, gone):
        dataset = SplitDataset(changed, 64, None, masks=True, guess=True)
        assert (dataset.guess_weights == UNLEARNT).all()


def test_of_large_objects_a_grid_of_pixels_is_learnt_from(demo, monkeypatch):
    image = read_dataset(demo)["train"].images[0]
    rows = {}
    for most in (10_000, 50):
        monkeypatch.setattr(guess_weights, "LEAST_OBJECTS", 1)
        monkeypatch.setattr(guess_weights, "MOST_PIXELS", most)
        monkeypatch.setattr(guess_weights, "logistic_regression", lambda *given: given)
        rows[most] = learn_weights([(image, load_image(image))])
    every, some = rows[10_000], rows[50]
    assert len(some[0]) <= 2 * 50 * len(image.labels) < len(every[0])
    # each object counts as before, and its pixels lie in its mask as often
    assert some[2].sum() == pytest.approx(every[2].sum(), rel=0.2)
    inside = [np.average(signs, weights=shares) for _, signs, shares in (every, some)]
    assert inside[1] == pytest.approx(inside[0], abs=0.1)


def test_workers_are_given_the_weights_that_were_learnt(demo):
    some = without_masks(read_dataset(demo)["train"], keep=8)
    dataset = SplitDataset(some, 64, None, masks=True, guess=True)
    dataset.prepare_for_workers(2)
    copied = pickle.loads(pickle.dumps(dataset))
    assert (vars(copied)["guess_weights"] == dataset.guess_weights).all()


def test_weights_are_found_again_and_rare_rows_count_by_their_share():
    rng = np.random.default_rng(0)
    known = np.hstack([rng.normal([5, -3], [2, 0.1], (20_000, 2)), np.ones((20_000, 1))])
    weights = np.array([1.0, -8.0, -29.0])
    signs = np.where(rng.random(20_000) < expit(known @ weights), 1.0, -1.0)
    found = logistic_regression(known, signs, np.ones(20_000))
    assert found == pytest.approx(weights, rel=0.15)
    flipped = np.vstack([known, known[:100]])
    shares = np.hstack([np.full(20_000, 1e-9), np.ones(100)])
    opposed = logistic_regression(flipped, np.hstack([-signs, signs[:100]]), shares)
    assert opposed[0] > 0 > opposed[1]


def test_an_object_that_looks_like_the_ground_has_a_mask_all_the_same():
    image = np.random.default_rng(0).normal(128, 12, (320, 320, 3))
    corners = [(x, y) for y in (10, 110, 210) for x in (10, 110, 210)]
    boxes = np.array([(x, y, x + 60, y + 60) for x, y in corners], float)
    for x, y in corners[1:]:
        image[y + 6 : y + 54, x + 6 : x + 54] += (70, -70, -60)
    masks = guess_masks(image.clip(0, 255).astype(np.uint8), boxes, np.zeros(9, int), 320, 320)
    fills = mask_api.area(masks) / 60**2
    assert fills[0] > 0.5  # nothing of it differs from the ground
    assert fills[1:] == pytest.approx(0.64, abs=0.1)


def test_drawn_masks_stay_as_they_are(demo):
    split = read_dataset(demo)["train"]
    some = without_masks(split, keep=3)
    dataset = SplitDataset(some, 64, None, masks=True, guess=True)
    assert dataset.segmentations(1) is some.images[1].segmentations
    mixed = next(i for i in range(3, 12) if len(split.images[i].segmentations) > 1)
    drawn, *others = split.images[mixed].segmentations
    some.images[mixed] = replace(split.images[mixed], segmentations=[drawn] + [None] * len(others))
    segmentations = dataset.segmentations(mixed)
    assert segmentations[0] is drawn and None not in segmentations
    target = dataset[mixed, None]["target"]
    assert target["has_mask"].all() and target["masks"].flatten(1).any(1).all()
    assert dataset.segmentations(mixed) is segmentations  # computed once


def test_the_sheet_of_guesses_leaves_out_what_cannot_be_read(demo, tmp_path, capsys):
    split = without_masks(read_dataset(demo)["train"])
    split.images[0] = replace(split.images[0], path=tmp_path / "gone.png")
    dataset = SplitDataset(split, 64, None, masks=True, guess=True)
    with Run(tmp_path / "run", {}, tensorboard=False) as run:
        draw_guesses(run, dataset)
    assert Image.open(tmp_path / "run/guessed_masks.png").height > 300
    (tmp_path / "run/guessed_masks.png").unlink()
    (tmp_path / "run/guessed_masks.png").mkdir()
    capsys.readouterr()
    with Run(tmp_path / "run", {}, tensorboard=False) as run:
        draw_guesses(run, dataset)
    said = "".join(capsys.readouterr())
    assert "guessed_masks.png failed" in said and "to look at" not in said


def test_the_sheet_of_guesses_says_that_it_counts_some_images(demo, tmp_path, capsys, monkeypatch):
    remarks = []

    def sheet(split: CocoSplit, remark: str) -> Image.Image:
        remarks.append(remark)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("rfdetr.training.report.class_sheet", sheet)
    dataset = SplitDataset(without_masks(read_dataset(demo)["train"]), 64, None, True, guess=True)
    for drawn in (3, 48):
        monkeypatch.setattr("rfdetr.training.report.GUESSED_IMAGES", drawn)
        with Run(tmp_path / f"run_{drawn}", {}, tensorboard=False) as run:
            draw_guesses(run, dataset)
    assert remarks == [" in 3 of 11 images (masks guessed)", " (masks guessed)"]
    said = capsys.readouterr().out
    assert "to look at in 3 of 11 images: " in said and "to look at: " in said


def test_the_sheet_of_guesses_shows_no_drawn_mask(demo, tmp_path, monkeypatch):
    sheets = []

    def sheet(split: CocoSplit, remark: str) -> Image.Image:
        sheets.append(split)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("rfdetr.training.report.class_sheet", sheet)
    split = without_masks(read_dataset(demo)["train"], keep=10)
    mixed = split.images[0]
    split.images[0] = replace(mixed, segmentations=[None, *mixed.segmentations[1:]])
    with Run(tmp_path / "run", {}, tensorboard=False) as run:
        draw_guesses(run, SplitDataset(split, 64, None, True, guess=True))
    (shown,) = sheets
    assert [image.id for image in shown.images] == [split.images[i].id for i in (0, 10, 11)]
    assert len(shown.images[0].boxes) == 1
    assert shown.object_count == shown.mask_count == 1 + sum(split.objects_per_image[10:])


@settings(max_examples=40, deadline=None)
@given(
    image=arrays.arrays(np.uint8, st.tuples(st.integers(1, 24), st.integers(1, 24), st.just(3))),
    corners=st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=5),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
)
def test_any_image_and_any_boxes_give_masks_inside_the_boxes(image, corners, height, width):
    boxes = np.array(corners)
    boxes = np.hstack([boxes[:, :2], boxes[:, 2:]]).reshape(-1, 2, 2)
    boxes = np.sort(boxes, axis=1).reshape(-1, 4) * [width, height, width, height]
    labels = np.arange(len(boxes)) % 2
    masks = guess_masks(image, boxes, labels, height, width)
    assert len(masks) == len(boxes)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        y, x = np.nonzero(mask_api.decode(mask))
        assert mask["size"] == [height, width]
        if len(y):
            assert x.min() >= min(np.floor(x0), width - 1) and x.max() < max(np.ceil(x1), 1) + 1
            assert y.min() >= min(np.floor(y0), height - 1) and y.max() < max(np.ceil(y1), 1) + 1


def test_every_second_image_of_a_batch_has_drawn_masks(demo):
    split = read_dataset(demo)["train"]
    drawn = images_with_drawn_masks(without_masks(split, keep=3))
    assert drawn == [0, 1, 2]
    assert images_with_drawn_masks(without_masks(split, keep=8)) == []  # most have them anyway
    mix = make_mix(split, drawn)
    sampler = EpochSampler(12, per_step=4, seed=0, min_steps=6, mix=mix)
    for step in sampler:
        indices = [index for index, _ in step]
        assert all(index in drawn for index in indices[::2])
    sampler.set_epoch(0, start_step=4)
    assert list(sampler) == list(EpochSampler(12, 4, 0, 6, mix=mix))[4:]


@pytest.fixture(scope="module")
def boxes_only(few, tmp_path_factory) -> Path:
    """The few images without any mask, neither in train nor in valid."""

    def empty_masks(content: dict) -> None:
        for entry in content["annotations"]:
            entry["segmentation"] = []

    return changed_copy(few, tmp_path_factory.mktemp("data") / "boxes", empty_masks)


def test_the_sheet_shows_guesses_in_tiles(demo, tmp_path, capsys):
    split = without_masks(read_dataset(demo)["train"])
    dataset = SplitDataset(split, 64, None, masks=True, guess=True, tiling=Tiling(96))
    with Run(tmp_path / "run", {}, tensorboard=False) as run:
        draw_guesses(run, dataset)
    assert Image.open(tmp_path / "run/guessed_masks.png").height > 300
    assert "failed" not in "".join(capsys.readouterr())


@pytest.mark.slow
def test_boxes_in_tiles_are_scored_as_in_training(boxes_only, call, tmp_path):
    """With masks, by which duplicates of two tiles are told, though there are none to score."""
    flags = [*quick_flags(boxes_only), "--tile", 48, "--output_dir", "run"]
    call(train_seg_single_stage.main, *flags)
    call(evaluate.main, "--checkpoint", "run", "--json", "scores.json")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    weights = "valid_ema" if metrics["best"]["weights"] == "ema" else "valid"
    assert json.loads((tmp_path / "scores.json").read_text()) == metrics["epochs"][-1][weights]


@pytest.mark.slow
def test_stage_2_learns_from_boxes_alone(
    boxes_only, few, shrunk, call, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("rfdetr.training.frozen.MATCH_IOU", -1.0)  # a detector of other images
    flags = ["--checkpoint", shrunk.folder, "--resolution", 64]
    call(train_seg_stage2.main, *quick_flags(boxes_only), *flags)
    said = "".join(capsys.readouterr())
    assert "have no mask: masks are guessed" in said
    assert "valid split has no masks: there are no mask scores, best.pt holds the last" in said
    assert "new best" not in said
    run = tmp_path / "runs/segmentation_tiny_64_1"
    assert Image.open(run / "guessed_masks.png").height > 300
    assert json.loads((run / "stage2_config.json").read_text())["guessed_masks"] is True
    valid = json.loads((run / "metrics.json").read_text())["epochs"][-1]["valid"]
    assert valid["segm"]["mAP"] is None and valid["bbox"]["mAP"] is not None
    assert valid["mask"] == {"giou": None, "ciou": None, "dice": None}
    assert torch.load(run / "best.pt", weights_only=True)["guessed_masks"] is True
    call(evaluate.main, "--checkpoint", run, "--dataset", boxes_only)
    assert "has no masks: boxes alone are scored" in "".join(capsys.readouterr())
    guessed_cache = set((tmp_path / "runs/feature_cache").iterdir())

    call(train_seg_stage2.main, *quick_flags(few), *flags)  # drawn masks share no view with them
    assert "guessed" not in capsys.readouterr().out
    assert set((tmp_path / "runs/feature_cache").iterdir()) > guessed_cache
