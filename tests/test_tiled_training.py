"""What training in tiles learns from, counts and keeps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, quick_flags
from pycocotools import mask as mask_api
from torchvision.ops import box_convert

import evaluate
import train_detector_stage1
import validate_setup
from rfdetr.console import UserError
from rfdetr.data.coco import read_dataset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.images import load_image
from rfdetr.data.large_images import load_for_tiles
from rfdetr.data.loaders import evaluation_loader
from rfdetr.data.records import CocoSplit, ImageList
from rfdetr.data.sampling import Pool, make_mix
from rfdetr.data.targets import target_of
from rfdetr.data.tiles import in_tiles, objects_in_no_tile, part_of, visible_objects
from rfdetr.detr import RFDETR
from rfdetr.masks import to_rle
from rfdetr.tiling import Tiling, Window, crop, tiling_of
from rfdetr.training.resume import resumed_progress
from rfdetr.training.session import choose_tiles
from rfdetr.weights import checkpoint
from testkit.datasets import coco, write


def squares(folder: Path, vessel: list[int]) -> Path:
    """Two images of 100 x 100 pixels with a cell of 90 x 90, one of them with a vessel, too."""
    content = coco(2)
    for image in content["images"]:
        image |= {"width": 100, "height": 100}
    for annotation in content["annotations"]:
        is_cell = annotation["category_id"] == 1
        annotation |= {"bbox": [5, 5, 90, 90] if is_cell else vessel, "segmentation": []}
    for split in ("train", "valid"):
        write(folder / split, content, (100, 100))
    return folder


@pytest.fixture
def large(tmp_path) -> CocoSplit:
    return read_dataset(squares(tmp_path / "large", [5, 5, 80, 80]))["train"]


@pytest.fixture
def mixed(tmp_path) -> CocoSplit:
    return read_dataset(squares(tmp_path / "mixed", [60, 20, 9, 9]))["train"]


@pytest.mark.parametrize("tiling", [Tiling(32), Tiling(48, 0.5), Tiling(32, with_whole=True)])
def test_what_no_tile_shows_is_known_without_looking_at_each_tile(demo, mixed, tiling):
    for split in (read_dataset(demo)["train"], mixed):
        expected = []
        for image in split.images:
            shown = np.zeros(len(image.labels), bool)
            for window in tiling.windows(image.height, image.width):
                shown[visible_objects(image, window)] = True
            expected += (~shown).tolist()
        assert objects_in_no_tile(split.images, tiling).tolist() == expected
    assert expected == [tiling == Tiling(32), False, tiling == Tiling(32)]


def begun(
    split: CocoSplit,
    tile: int | None = 32,
    tile_overlap: float | None = 0.2,
    tile_full: bool | None = None,
) -> SimpleNamespace:
    """What choose_tiles needs of a Session."""
    settings = SimpleNamespace(tile=tile, tile_overlap=tile_overlap, tile_full=tile_full)
    return SimpleNamespace(
        settings=settings, train=split, resumed=None, resolution=64, images_an_epoch=0
    )


def test_objects_too_large_for_the_tiles_are_said_by_class(mixed, capsys):
    choose_tiles(begun(mixed))
    warning = capsys.readouterr().out
    for words in ("2 of 3 objects", "cell 2 of 2;", "up to 90 px", "--tile_full 1", "a larger"):
        assert words in warning
    for enough in ({"tile_full": True}, {"tile": 64}):
        choose_tiles(begun(mixed, **enough))
        assert "no tile of" not in capsys.readouterr().out


def test_tiles_that_show_no_object_at_all_are_an_error(large, tmp_path):
    with pytest.raises(UserError, match="3 of 3 objects .cell 2 of 2, vessel 1 of 1;"):
        choose_tiles(begun(large))
    words = ["--dataset", str(tmp_path / "large"), "--device", "cpu", "--tile", "32"]
    with pytest.raises(UserError, match="3 of 3 objects. All errors .see above.: ANN_NO_TILE"):
        validate_setup.main(words)


def test_validate_setup_knows_what_tiles_show(mixed, tmp_path, capsys):
    def report(*flags: object) -> dict:
        words = ["--dataset", tmp_path / "mixed", "--device", "cpu", "--resolution", 64]
        words += ["--json", tmp_path / "report.json", *flags]
        validate_setup.main([str(word) for word in words])
        return json.loads((tmp_path / "report.json").read_text())

    sides = [one["splits"]["train"]["median_side_px"] for one in (report(), report("--tile", 32))]
    assert sides == [57.6, 180.0]
    said = capsys.readouterr().out
    assert "[warning] ANN_NO_TILE" in said and "--tile_full 1" in said


def test_an_epoch_of_nothing_is_an_error_and_no_endless_loop(large):
    with pytest.raises(UserError, match="--negatives 0.1: no image or tile of .* shows an object"):
        make_mix(in_tiles(large, Tiling(32)), [], None, 0.1)
    with pytest.raises(ValueError, match="no images"):
        Pool(torch.zeros(0, dtype=torch.long)).draw(1, torch.Generator())


def test_tiles_with_masks_are_those_that_show_an_object_with_one(demo):
    split = read_dataset(demo)["train"]
    few = ImageList(split.images)
    few[0].segmentations[1:] = [None] * (len(few[0].segmentations) - 1)
    split = replace(split, images=few)
    dataset = SplitDataset(split, 64, "strong", True, tiling=Tiling(32))
    expected = []
    for index, tile in enumerate(dataset.split.images):
        if any(mask is not None for mask in tile.segmentations):
            expected.append(index)
    assert dataset.donors == expected
    assert 0 < len(expected) < len(dataset)
    of_first = dataset.positions_with_masks([0])
    tiles_of_first = [i for i, (number, _) in enumerate(dataset.split.images.places) if number == 0]
    assert 0 < len(of_first) < len(tiles_of_first)
    # ... so that a share of tiles without objects is kept
    is_empty = np.array(dataset.split.objects_per_image) == 0
    order = make_mix(dataset.split, of_first, None, 0.0).draw(200, torch.Generator())
    assert not is_empty[order.numpy()].any()


@pytest.fixture
def damaged(few, tmp_path) -> Path:
    """An image of train and one of valid lack their second half."""
    shutil.copytree(few, tmp_path / "damaged")
    for split in ("train", "valid"):
        file = sorted((tmp_path / "damaged" / split).glob("*.png"))[0]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return tmp_path / "damaged"


def test_a_damaged_image_is_one_however_many_tiles_it_has(damaged):
    split = read_dataset(damaged)["train"]
    dataset = SplitDataset(split, 32, "flips", False, tiling=Tiling(32))
    loader = evaluation_loader(dataset, batch=4, workers=0)
    batches = list(loader)
    unread = {}
    for batch in batches:
        unread |= batch.unread
    assert list(unread) == [0] and split.images[0].path.name in unread[0]
    assert {dataset.number_of(i) for batch in batches for i in batch.indices} == {1, 2, 3}
    stand_in = dataset[0, 7]
    assert dataset.number_of(stand_in["target"]["index"]) == 1 and list(stand_in["unread"]) == [0]


def test_a_damaged_image_does_not_end_a_run_in_tiles(damaged, tmp_path, call, capsys):
    flags = [*quick_flags(damaged), "--tile", 32, "--min_steps", 12, "--output_dir", "run"]
    call(train_detector_stage1.main, *flags)
    said = capsys.readouterr().out
    assert said.count("skipped:") == 2  # one of train, one of valid
    (epoch,) = json.loads((tmp_path / "run/metrics.json").read_text())["epochs"]
    assert epoch["train"]["skipped_images"] == 1
    progress = checkpoint.load(tmp_path / "run/last.pt")["training"]["progress"]
    assert progress["unread"] == [0]
    call(evaluate.main, "--checkpoint", "run", "--dataset", damaged)
    assert capsys.readouterr().out.count("skipped:") == 1


OWN = {"tile": 48, "tile_overlap": 0.6, "tile_full": True}
EARLIER = {"tile": 48, "args": {"tile_overlap": 0.6, "tile_full": True}}


@pytest.mark.parametrize("content", [OWN, EARLIER])
def test_flags_that_are_left_out_mean_tiles_as_in_training(mixed, content):
    session = begun(mixed, tile=None, tile_overlap=None)
    choose_tiles(session, content)
    assert session.tiling == tiling_of(content, None, None, None) == Tiling(48, 0.6, True)
    assert tiling_of(content, 64, None, False) == Tiling(64, 0.6, False)
    session = begun(mixed, tile=None, tile_overlap=0.1, tile_full=False)
    choose_tiles(session, content)
    assert session.tiling == tiling_of(content, None, 0.1, False) == Tiling(48, 0.1, False)
    # trained on whole images: as ever
    assert tiling_of({"tile": 0, "args": {"tile_overlap": 0.6}}, 64, None, None) == Tiling(64)


def best_scores(file: Path) -> dict[int, list[float]]:
    """By image, the best first, of COCO results."""
    scores = defaultdict(list)
    for result in json.loads(file.read_text()):
        scores[result["image_id"]].append(result["score"])
    return {image: sorted(values, reverse=True) for image, values in scores.items()}


def test_a_run_keeps_its_tiles_for_what_follows(few, tmp_path, call, capsys):
    flags = ["--tile", 48, "--tile_overlap", 0.6, "--tile_full", 1, "--output_dir", "run"]
    call(train_detector_stage1.main, *quick_flags(few), *flags)
    told = "Tiles of 48 px, 60% in common, and each image as a whole"
    assert told in capsys.readouterr().out
    call(evaluate.main, "--checkpoint", "run", "--dataset", few, "--json", "scores.json")
    assert told in capsys.readouterr().out
    best = json.loads((tmp_path / "run/metrics.json").read_text())["best"]["value"]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["bbox"]["mAP"] == pytest.approx(best, abs=1e-6)
    # at most 3 of an image are its 3 best, not 3 of each tile
    for limit, words in (("all", ()), ("three", ("--max_detections", 3))):
        words = ["--checkpoint", "run", "--dataset", few, "--results", limit, *words]
        call(evaluate.main, *words)
    every, three = (best_scores(tmp_path / limit / "bbox.json") for limit in ("all", "three"))
    assert every.keys() == three.keys() and max(map(len, every.values())) > 3
    for image, scores in three.items():
        assert scores == every[image][:3]
    model = RFDETR.from_checkpoint(tmp_path / "run", device="cpu")
    assert model.tiling(None, None, None) == Tiling(48, 0.6, True)
    with pytest.raises(UserError, match="tile_overlap must be a number in 0..0.9, got 1.0"):
        model.predict(np.zeros((64, 64, 3), np.uint8), tile_overlap=1.0)


def test_runs_that_counted_tiles_as_unreadable_images_start_counting_anew(mixed, tmp_path):
    state = {"training": {"progress": {"unread": [1]}}, "tile": 48}
    splits = {"train": mixed}
    assert resumed_progress(state, splits, {}, tmp_path).unread == []
    assert resumed_progress(state | {"tile_overlap": 0.3}, splits, {}, tmp_path).unread == [1]


def test_too_large_a_share_in_common_makes_no_tiles():
    with pytest.raises(UserError, match="0..0.9, got 1.0"):
        Tiling(640, 1.0)


@pytest.mark.parametrize("as_rle", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_the_box_of_a_cut_object_is_that_of_what_is_seen_of_it(tmp_path, as_rle, masks):
    """A stroke from corner to corner, and a square: the tile at the upper left cuts both."""
    stroke = [4.0, 4, 8, 4, 80, 76, 80, 80, 76, 80, 4, 8]
    square = [20.0, 4, 50, 4, 50, 14, 20, 14]
    content = coco(1)
    content["images"][0] |= {"width": 84, "height": 84}
    boxes = ([4, 4, 76, 76], [20, 4, 30, 10])
    for annotation, corners, box in zip(content["annotations"], (stroke, square), boxes):
        shape = [corners]
        if as_rle:
            rle = to_rle(shape, 84, 84)
            shape = {"size": [84, 84], "counts": rle["counts"].decode()}
        annotation |= {"bbox": box, "segmentation": shape}
    for split in ("train", "valid"):
        write(tmp_path / split, content, (84, 84))
    split = read_dataset(tmp_path)["train"]
    dataset = SplitDataset(split, 44, None, masks, tiling=Tiling(44, 0.0))
    target = dataset[0, None]["target"]
    stroke_box, square_box = (box_convert(target["boxes"], "cxcywh", "xyxy") * 44).tolist()
    assert stroke_box == pytest.approx([4, 4, 44, 44], abs=1)
    assert square_box == pytest.approx([20, 4, 44, 14], abs=1e-3)
    # the stroke leaves this tile through its left and lower edge
    window = Window(10, 0, 54, 44)
    moved = replace(part_of(split.images[0], window))
    matrix = np.array([[1.0, 0, -10], [0, 1, 0]])
    target = target_of(moved, matrix, 44, Window(0, 0, 44, 44), False, masks)
    stroke_box = (box_convert(target["boxes"][:1], "cxcywh", "xyxy") * 44)[0].tolist()
    assert stroke_box == pytest.approx([0, 6, 38, 44], abs=1.5)


@pytest.mark.parametrize("room", [1 << 31, 0])
def test_moved_tiles_are_cut_from_images_that_are_decoded_once_where_they_fit(
    demo, monkeypatch, room
):
    split = read_dataset(demo)["train"]
    decoded = []

    def load(record, window):
        decoded.append(record.path)
        return load_for_tiles(record, window)

    monkeypatch.setattr("rfdetr.data.dataset.load_for_tiles", load)
    monkeypatch.setattr("rfdetr.data.dataset.RAM_CACHE_BYTES", room)
    dataset = SplitDataset(split, 32, "flips", False, tiling=Tiling(40))
    keys = [(0, 1), (len(dataset) - 1, 2), (0, 3)]
    samples = [dataset[key] for key in keys]
    assert len(decoded) == (2 if room else 3)
    dataset.prepare_for_workers(2)
    for key, sample in zip(keys, samples):
        assert torch.equal(dataset[key]["image"], sample["image"])
    dataset.prepare_for_workers(1)
    dataset[0, None]  # kept itself
    assert not dataset.cut_images


def test_a_mosaic_shows_every_object_of_its_images_once(demo, tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "mosaics.py"), "--dataset", str(demo)]
    for side in (200, 96):
        words = ["--out", str(tmp_path / f"{side}"), "--side", str(side), "--only", "96"]
        subprocess.run([*script, *words], check=True, capture_output=True)
    drawn = read_dataset(demo)
    laid = read_dataset(tmp_path / "200")
    assert [(image.width, image.height) for image in laid["train"].images] == [(192, 192)] * 3
    assert not laid["train"].problems
    image = laid["train"].images[0]
    number = 0
    for i, (left, top) in enumerate(((0, 0), (96, 0), (0, 96), (96, 96))):
        own = drawn["train"].images[i]
        window = Window(left, top, left + 96, top + 96)
        assert (crop(load_image(image), window) == load_image(own)).all()
        for box, shape in zip(own.boxes, own.segmentations):
            assert image.boxes[number] == pytest.approx(box + [left, top, left, top], abs=0.01)
            there = mask_api.decode(to_rle(image.segmentations[number], 192, 192))
            assert (crop(there, window) == mask_api.decode(to_rle(shape, 96, 96))).all()
            number += 1
    assert number == len(image.labels)
    # a mosaic of one image is that image
    alone = read_dataset(tmp_path / "96")
    for one, own in zip(alone["valid"].images, drawn["valid"].images, strict=True):
        assert (
            load_image(one) == load_image(own)
        ).all() and one.boxes.tolist() == own.boxes.tolist()
