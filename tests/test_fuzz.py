"""Hostile and damaged input: 590 cases of testkit/fuzz_cases.py through the scripts, and properties
they rest on; 60 random evaluations against pycocotools."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils

from rfdetr.classes import COCO_NAMES, assign_rows, background_row, is_class_head, keep_class_rows
from rfdetr.console import UserError
from rfdetr.data.augment import PRESETS, random_view
from rfdetr.data.coco import inspect_dataset, read_dataset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.loaders import EpochSampler, collate
from rfdetr.masks import rasterise, to_rle
from rfdetr.metrics.coco_eval import CocoEvaluator
from rfdetr.training.optim import Schedule
from rfdetr.weights import checkpoint
from testkit.damage import SIDE, damage_values, damaged_json, some_polygons, some_rle
from testkit.fuzz_cases import KINDS
from testkit.fuzzer import Fuzzer
from testkit.random_evaluations import run_sets

# of each kind: the first are for every day, the others are slow
FIRST = range(14)
FURTHER = range(14, 44)
plainly = settings(max_examples=60, deadline=None, derandomize=True, database=None)
RANDOM = st.integers(0, 2**32).map(random.Random)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz") / "tree")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "numbers",
    [pytest.param(FIRST, id="first"), pytest.param(FURTHER, id="further", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_case_ends_in_success_or_in_one_paragraph(fuzzer, kind, numbers):
    faults = []
    ends = set()
    for number in numbers:
        command, status, wrong = fuzzer.run(kind, number, seed=0)
        ends.add(status)
        if wrong:
            faults.append(f"--kinds {kind} --first {number} ({command.script}): {'; '.join(wrong)}")
    assert not faults, "python benchmarks/fuzz.py --cases 1 --seed 0 ...\n" + "\n".join(faults)
    if numbers is FURTHER:
        assert ends == {0, 2}  # some of the damage is harmless, some is not


@pytest.mark.slow
def test_random_evaluations_equal_pycocotools(capsys):
    outside = run_sets(first=0, count=24, seed=0)
    assert not outside, "python benchmarks/fuzz.py ...\n" + capsys.readouterr().out


def damaged_dataset(rng: random.Random, fuzzer: Fuzzer) -> Path:
    """A dataset with one damaged annotation file."""
    root = fuzzer.folder / "property"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(fuzzer.base.data, root)
    split = rng.choice(["train", "train", "valid"])
    document = json.loads(json.dumps(fuzzer.base.documents[split]))
    file = root / split / "_annotations.coco.json"
    way = rng.randrange(6)
    if way == 0:
        file.write_bytes(damaged_json(rng, document))
        return root
    if way == 1:
        damage_values(rng, document)
    else:
        for entry in rng.sample(document["annotations"], min(3, len(document["annotations"]))):
            entry["segmentation"] = rng.choice([some_rle, some_polygons])(rng, SIDE, SIDE)
            x, y = rng.choice([(entry["bbox"][0], 3), (-5, -7.5), (SIDE - 0.5, 2)])
            entry["bbox"] = [x, y, *rng.choice([(5, 5), (0.002, 500), (1e7, 1), entry["bbox"][2:]])]
    file.write_text(json.dumps(document), encoding="utf-8")
    return root


@settings(plainly, max_examples=40)
@given(rng=RANDOM)
def test_what_the_doctor_passes_can_be_loaded_drawn_collated_and_scored(fuzzer, rng):
    root = damaged_dataset(rng, fuzzer)
    _, problems = inspect_dataset(root)
    assert all(
        problem.severity in ("error", "warning") and problem.count >= 1 for problem in problems
    )
    if problems and problems[0].severity == "error":
        with pytest.raises(UserError) as caught:
            read_dataset(root)
        assert str(caught.value).strip()
        return
    for split in read_dataset(root).values():
        preset = rng.choice(["dihedral", "crops", "strong", "aerial"])
        dataset = SplitDataset(split, 32, preset, masks=True)
        evaluator = CocoEvaluator(split.ground_truth, masks=True)
        for index, record in enumerate(split.images):
            batch = collate([dataset[index, None], dataset[index, rng.randrange(2**62)]])
            assert batch.images.shape == (2, 3, 32, 32) and not batch.unread
            for target in batch.targets:
                sides = target["boxes"][:, 2:]
                assert (
                    (0 <= target["boxes"]).all()
                    and (target["boxes"] <= 1).all()
                    and (sides > 0).all()
                )
                assert target["masks"].shape == (len(sides), 32, 32)
                assert set(target["masks"].unique().tolist()) <= {0, 1}
                assert not target["masks"][~target["has_mask"]].any()
            size = record.height, record.width
            corners = np.c_[record.boxes[:, :2], record.boxes[:, 2:] - record.boxes[:, :2]].astype(
                float
            )
            masks = [
                to_rle(mask, *size) if mask else to_rle(corners[i : i + 1], *size)
                for i, mask in enumerate(record.segmentations)
            ]
            assert all(mask_utils.decode(mask).shape == size for mask in masks)
            labels = np.array(split.category_ids)[record.labels]
            evaluator.add(record.id, record.boxes, np.linspace(1, 0.6, len(labels)), labels, masks)
        summary = evaluator.summary()
        figures = [
            value for kind in summary.values() for value in kind.values() if type(value) is float
        ]
        assert all(0 <= value <= 1 + 1e-9 for value in figures)
        json.dumps(summary, allow_nan=False)


@plainly
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32))
def test_rles_are_read_as_pycocotools_reads_them(height, width, seed):
    generator = np.random.default_rng(seed)
    mask = np.asfortranarray(generator.random((height, width)) < generator.random(), dtype=np.uint8)
    compressed = mask_utils.encode(mask)
    compressed = compressed | {"counts": compressed["counts"].decode()}
    edges = np.flatnonzero(
        np.diff(mask.ravel(order="F"), prepend=0, append=2)
    )  # the first run is of zeros
    runs = {"size": [height, width], "counts": np.diff(edges, prepend=0).tolist()}
    for rle in (compressed, runs):
        drawn = np.zeros((height, width), np.uint8)
        rasterise(rle, height, width, np.eye(2, 3), drawn)
        assert (drawn == mask).all()
        assert (mask_utils.decode(to_rle(rle, height, width)) == mask).all()


POLYGON = st.lists(st.floats(-80, 160), min_size=6, max_size=20)


@plainly
@given(
    st.lists(POLYGON.filter(lambda polygon: len(polygon) % 2 == 0), min_size=1),
    st.integers(1, 80),
    st.integers(1, 80),
    st.sampled_from(["dihedral", "crops", "microscopy"]),
    st.integers(0, 2**32),
)
def test_drawn_polygons_stay_in_their_rectangle(polygons, height, width, augment, seed):
    torch.manual_seed(seed)
    _, place = random_view(torch.zeros(3, height, width, dtype=torch.uint8), PRESETS[augment], 48)
    drawn = np.zeros((48, 48), np.uint8)
    rasterise(polygons, height, width, place, drawn)
    corners = (
        np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons]) @ place[:, :2].T
        + place[:, 2]
    )
    assert drawn.max() <= 1
    y, x = np.nonzero(drawn)
    if len(x):  # pycocotools rounds to fifths of a pixel
        assert corners[:, 0].min() - 1 <= x.min() and x.max() <= corners[:, 0].max() + 1
        assert corners[:, 1].min() - 1 <= y.min() and y.max() <= corners[:, 1].max() + 1


NAMES = st.sampled_from(list(COCO_NAMES.values())) | st.text(max_size=6)


@plainly
@given(
    st.lists(NAMES, min_size=1, max_size=120, unique=True), st.sampled_from(["coco91", "dataset"])
)
def test_every_class_has_a_row_of_its_own_and_the_background_none(classes, head):
    table = assign_rows(classes, list(range(3, 3 + len(classes))), head)
    assert len(set(table.rows)) == len(classes) and table.background not in table.rows
    assert {*table.rows, table.background} <= set(range(table.rows_total))
    row_of = {name: row for row, name in COCO_NAMES.items()}
    if head == "coco91":
        assert all(row == row_of[name] for name, row in zip(classes, table.rows) if name in row_of)
    shuffled = sorted(classes)
    again = table.in_order_of(shuffled, list(range(len(classes))), "x")
    assert dict(zip(again.names, again.rows)) == dict(zip(table.names, table.rows))


@plainly
@given(
    st.integers(1, 10**6), st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1),
    st.sampled_from(["cosine", "step", "constant"]), st.integers(0, 2 * 10**6),
)  # fmt: skip
@example(1, 0, 1.0, 0.0, "cosine", 0)
@example(10**9, 10**6, 0.5, 0.0, "cosine", 10**9 - 1)
def test_the_learning_rate_stays_within_its_bounds(total, warmup, flat, floor, kind, step):
    schedule = Schedule(total, warmup, flat, floor, kind)
    factor = schedule(step)
    lowest = {"cosine": floor, "step": 0.1, "constant": 1.0}[kind]
    assert 0 < factor <= 1 if step < warmup else lowest - 1e-12 <= factor <= 1
    if warmup <= step:
        assert schedule(step + 1) <= factor  # it never rises again


@plainly
@given(
    st.integers(1, 50),
    st.integers(1, 8),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 99),
    st.just(3),
)
def test_an_epoch_covers_every_image_as_often_as_any_other(
    images, per_step, world, min_steps, seed, epoch
):
    samplers = [
        EpochSampler(images, per_step, seed, min_steps, rank, world) for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    keys = [key for steps in zip(*samplers) for step in steps for key in step]
    assert len(keys) == len(set(keys)) == samplers[0].steps * per_step * world
    counts = np.bincount([index for index, _ in keys], minlength=images)
    assert counts.max() - counts.min() <= 1 and len(counts) == images


@settings(plainly, max_examples=25)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=6, unique=True), st.data())
def test_a_checkpoint_comes_back_as_it_was_and_is_shrunk_bit_for_bit(fuzzer, classes, data):
    keep = data.draw(st.permutations(classes))[: data.draw(st.integers(1, len(classes)))]
    table = assign_rows(
        classes, list(range(len(classes))), data.draw(st.sampled_from(["coco91", "dataset"]))
    )
    content = dict(fuzzer.base.contents["detector.pt"])
    heads = {name: tensor for name, tensor in content["model"].items() if is_class_head(name)}
    fresh = {
        name: torch.randn(table.rows_total, *tensor.shape[1:]) for name, tensor in heads.items()
    }
    content |= {"classes": table.to_dict(), "model": content["model"] | fresh, "ema": dict(fresh)}
    path = fuzzer.folder / "round.pt"
    checkpoint.save(path, content)
    loaded = checkpoint.load(path)
    assert checkpoint.table_of(loaded) == table and loaded["args"] == content["args"]
    assert all(
        torch.equal(loaded["model"][name], tensor) for name, tensor in content["model"].items()
    )
    small = checkpoint.shrink(loaded, keep)
    rows = [dict(zip(table.names, table.rows))[name] for name in keep] + [background_row(table)]
    for name, tensor in keep_class_rows(fresh, rows).items():
        assert torch.equal(small["model"][name], tensor) and torch.equal(small["ema"][name], tensor)
