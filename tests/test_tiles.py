"""Tiles: they cover an image, and each object in it comes back once, whole, however they cut it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import quick_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api

import evaluate
import predict
import train_detector_stage1
import train_seg_stage2
from rfdetr.console import UserError
from rfdetr.data.augment import PRESETS
from rfdetr.data.coco import read_dataset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.images import load_image
from rfdetr.data.tiles import suggested_tile, training_tiling, visible_objects
from rfdetr.detr import RFDETR
from rfdetr.inference.overlaps import PixelMask
from rfdetr.inference.tiles import COMPARABLE, DetectedInWindow, Merged, merge
from rfdetr.placement import Placement
from rfdetr.tiling import Tiling, Window, choose_tile, crop, tell_tiles, unlike_training
from rfdetr.weights import checkpoint

plainly = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@plainly
@given(
    st.integers(1, 900), st.integers(1, 900), st.integers(32, 400), st.floats(0, 0.9), st.booleans()
)
def test_tiles_cover_the_image_and_overlap_as_asked(height, width, side, overlap, full):
    windows = Tiling(side, overlap, full).windows(height, width)
    seen = np.zeros((height, width), dtype=int)
    for left, top, right, bottom in windows:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        seen[top:bottom, left:right] += 1
    assert seen.min() == 1 + (full and len(windows) > 1)
    tiles = windows[:-1] if full and len(windows) > 1 else windows
    assert all(
        tile.width == min(side, width) and tile.height == min(side, height) for tile in tiles
    )
    lefts = sorted({tile.left for tile in tiles})
    assert all(
        b - a <= side - min(round(side * overlap), side - 1) for a, b in zip(lefts, lefts[1:])
    )
    if max(height, width) <= side:
        assert windows == [Window(0, 0, width, height)]


def disc(height: int, width: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def seen_in(
    window: Window, objects: list[np.ndarray], least: float, masks: bool = True
) -> DetectedInWindow:
    """What a perfect detector shows of objects (H, W) bool: those visible by `least` at least."""
    boxes = []
    scores = []
    shown = []
    for number, pixels in enumerate(objects):
        part = np.zeros_like(pixels)
        rows = slice(window.top, window.bottom)
        columns = slice(window.left, window.right)
        part[rows, columns] = pixels[rows, columns]
        if part.sum() < max(least * pixels.sum(), 1):
            continue
        y, x = np.nonzero(part)
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
        scores.append(0.5 + 0.4 * part.sum() / pixels.sum() - number / 1000)
        inside = part[y.min() : y.max() + 1, x.min() : x.max() + 1]
        shown.append(PixelMask(int(x.min()), int(y.min()), inside))
    scores = np.array(scores, dtype=np.float32)
    return DetectedInWindow(
        window=window,
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        scores=scores,
        labels=np.zeros(len(scores), dtype=np.int64),
        masks=shown if masks else None,
        mask_scores=scores if masks else None,
    )


def found_in_tiles(tiling: Tiling, objects: list[np.ndarray], least: float, masks: bool = True):
    height, width = objects[0].shape
    windows = tiling.windows(height, width)
    return merge([seen_in(window, objects, least, masks) for window in windows], height, width)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32), st.sampled_from([64, 96, 130]), st.booleans())
def test_every_object_comes_back_once_and_whole(seed, side, full):
    """Objects no larger than what tiles have in common are whole in one of them."""
    rng = np.random.default_rng(seed)
    objects = []
    taken = np.zeros((240, 300), dtype=bool)
    for _ in range(60):
        pixels = disc(240, 300, rng.uniform(0, 300), rng.uniform(0, 240), rng.uniform(3, 9))
        if pixels.any() and not (pixels & taken).any():
            objects.append(pixels)
            taken |= pixels
    found = found_in_tiles(Tiling(side, 0.35, full), objects, least=0.15)
    masks = sorted(mask_api.decode(rle).astype(bool).tobytes() for rle in found.rles())
    assert masks == sorted(pixels.tobytes() for pixels in objects)
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("masks", [True, False])
def test_an_object_larger_than_a_tile_is_joined_from_its_parts(masks):
    objects = [disc(300, 400, 210, 150, 120), disc(300, 400, 20, 20, 12)]
    found = found_in_tiles(Tiling(128, 0.25), objects, least=0.01, masks=masks)
    assert len(found.scores) == 2
    large = int(np.argmax(found.boxes[:, 2]))
    assert np.abs(found.boxes[large] - [90, 30, 330, 270]).max() <= 1
    if masks:
        pixels = mask_api.decode(found.rles()[large]).astype(bool)
        assert (pixels == objects[0]).mean() > 0.999
    else:
        assert found.masks is None and found.rles() is None


def test_neighbours_and_other_classes_are_not_joined():
    window = Window(0, 0, 100, 100)
    beside = Window(80, 0, 180, 100)
    boxes = np.array([[60, 10, 90, 40], [60, 50, 100, 90]], dtype=np.float32)
    others = np.array([[90, 10, 120, 40], [80, 50, 110, 90]], dtype=np.float32)
    one = DetectedInWindow(window, boxes, np.array([0.9, 0.8]), np.array([0, 0]))
    other = DetectedInWindow(beside, others, np.array([0.7, 0.6]), np.array([0, 1]))
    found = merge([one, other], 100, 180)
    assert found.scores.tolist() == [0.9, 0.8, 0.7, 0.6]
    same = DetectedInWindow(beside, others, np.array([0.7, 0.6]), np.array([0, 0]))
    found = merge([one, same], 100, 180)
    assert found.scores.tolist() == [0.9, 0.8, 0.7]
    assert found.boxes[1].tolist() == [60, 50, 110, 90]


def test_of_a_whole_and_a_cut_detection_the_whole_one_is_taken_whatever_their_scores():
    window = Window(0, 0, 100, 100)
    beside = Window(70, 0, 170, 100)
    cut = DetectedInWindow(window, np.array([[85.0, 10, 100, 40]]), np.array([0.95]), np.array([0]))
    whole = DetectedInWindow(
        beside, np.array([[85.0, 10, 115, 40]]), np.array([0.6]), np.array([0])
    )
    for tiles in ([cut, whole], [whole, cut]):
        found = merge(tiles, 100, 170)
        assert found.boxes.tolist() == [[85, 10, 115, 40]] and found.scores.tolist() == [0.6]


def test_a_cut_detection_counts_for_nothing_where_the_next_tile_shows_it_and_detects_nothing():
    """A sliver at a tile's edge may look like an object; the next tile sees what it belongs to."""
    cut = np.array([[85.0, 10, 100, 40]])

    def objects(window: Window, beside: Window, width: int) -> int:
        tile = DetectedInWindow(window, cut, np.array([0.95]), np.array([0]))
        silent = DetectedInWindow(beside, np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=int))
        first = merge([tile, silent], 100, width)
        second = merge([silent, tile], 100, width)
        assert first.scores.tolist() == second.scores.tolist()
        return len(first.scores)

    tile = Window(0, 0, 100, 100)
    assert objects(tile, Window(70, 0, 170, 100), 170) == 0
    assert objects(tile, Window(84, 0, 184, 100), 184) == 1  # its own edge cuts it, too
    assert objects(tile, Window(0, 0, 170, 100), 170) == 1  # the whole image shows it smaller
    assert objects(tile, Window(70, 0, 100, 100), 100) == 1  # the image's edge, not a tile's


def test_a_detection_of_next_to_no_score_changes_no_sure_one():
    sure = seen_at(Window(0, 0, 100, 100), [[60, 30, 96, 70]], [0.95])
    unsure = seen_at(Window(80, 0, 180, 100), [[80, 30, 150, 70]], [0.02])
    for tiles in ([sure, unsure], [unsure, sure]):
        found = merge(tiles, 100, 180)
        assert found.boxes.tolist() == [[60, 30, 96, 70], [80, 30, 150, 70]]
        assert found.scores.tolist() == [0.95, 0.02]
        assert [mask.area for mask in found.masks] == [36 * 40, 70 * 40]
    assert merge([sure, unsure], 100, 180, threshold=0.5).scores.tolist() == [0.95]


def test_what_an_edge_cuts_is_joined_with_a_weaker_part_beyond_but_not_with_any():
    sure = seen_at(Window(0, 0, 100, 100), [[60, 30, 100, 70]], [0.9])
    for score, boxes in ((0.4, 1), (0.1, 2)):
        beyond = seen_at(Window(80, 0, 180, 100), [[80, 30, 150, 70]], [score])
        found = merge([sure, beyond], 100, 180)
        assert len(found.boxes) == boxes and found.scores[0] == 0.9
        assert found.boxes[0].tolist() == [60, 30, 150 if boxes == 1 else 100, 70]


def test_a_weaker_whole_detection_gives_a_sure_cut_one_its_shape_but_not_its_score():
    sure = seen_at(Window(0, 0, 100, 100), [[61, 30, 100, 70]], [0.9])
    whole = seen_at(Window(60, 0, 160, 100), [[64, 30, 120, 70]], [0.3])
    found = merge([sure, whole], 100, 160)
    assert found.boxes.tolist() == [[64, 30, 120, 70]]
    assert found.scores.tolist() == [0.9]


def test_what_an_edge_cuts_is_joined_with_nothing_at_its_other_sides():
    left_edge_cuts = seen_at(Window(70, 0, 170, 100), [[70, 30, 160, 70]], [0.9])
    right_of_it = seen_at(Window(140, 0, 240, 100), [[142, 30, 200, 70]], [0.8])
    nothing = seen_at(Window(0, 0, 100, 100), [], [])
    found = merge([nothing, left_edge_cuts, right_of_it], 100, 240)
    assert found.boxes.tolist() == [[70, 30, 160, 70], [142, 30, 200, 70]]


def test_parts_are_joined_through_a_weaker_one_between_them_if_it_is_comparable():
    ends = [
        seen_at(Window(0, 0, 100, 100), [[10, 30, 100, 70]], [0.9]),
        seen_at(Window(140, 0, 240, 100), [[140, 30, 230, 70]], [0.8]),
    ]
    for score, expected in ((0.5, [0.9]), (0.1, [0.9, 0.8, 0.1])):
        middle = seen_at(Window(70, 0, 170, 100), [[70, 30, 170, 70]], [score])
        assert merge([*ends, middle], 100, 240).scores.tolist() == expected


def seen_at(window: Window, boxes: list, scores: list[float]) -> DetectedInWindow:
    """Detections of one class, whose masks fill their boxes of whole pixels."""
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    masks = []
    for left, top, right, bottom in boxes.astype(int).tolist():
        masks.append(PixelMask(left, top, np.ones((bottom - top, right - left), dtype=bool)))
    scores = np.array(scores, dtype=float)
    return DetectedInWindow(window, boxes, scores, np.zeros(len(boxes), int), masks, scores / 2)


def what_is_seen(rng: np.random.Generator, windows: list[Window]) -> list[DetectedInWindow]:
    """Objects of all sizes as tiles show them, moved a little, and shifted weaker ones of each."""
    corners = rng.integers(0, 150, (8, 2))
    objects = np.hstack([corners, corners + rng.integers(8, 110, (8, 2))])
    tiles = []
    for window in windows:
        boxes = np.vstack([objects, objects, objects]) + rng.integers(-3, 4, (24, 4))
        boxes[8:] += rng.integers(-20, 21, (16, 4))
        low = np.array([window.left, window.top] * 2)
        high = np.array([window.right, window.bottom] * 2)
        boxes = boxes.clip(low, high)
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
        tiles.append(seen_at(window, boxes, rng.uniform(0.01, 1, len(boxes)).round(3)))
    return tiles


def without_weak_ones(tile: DetectedInWindow, least: float, masks: bool) -> DetectedInWindow:
    kept = np.flatnonzero(tile.scores >= least)
    return DetectedInWindow(
        tile.window,
        tile.boxes[kept],
        tile.scores[kept],
        tile.labels[kept],
        [tile.masks[i] for i in kept] if masks else None,
        tile.mask_scores[kept] if masks else None,
    )


def as_rows(found: Merged) -> list[tuple]:
    masks = found.rles() or [{}] * len(found.scores)
    scores = found.scores if found.mask_scores is None else found.mask_scores
    rows = zip(found.boxes.tolist(), found.scores, found.labels, scores, masks)
    return [(*row[:4], row[4].get("counts")) for row in rows]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32), st.floats(0.05, 0.95), st.booleans(), st.booleans())
def test_objects_do_not_depend_on_detections_that_score_far_less(seed, threshold, masks, full):
    """So that predict's objects, which need no weak detections, are those that are scored."""
    windows = Tiling(100, 0.3, full).windows(180, 240)
    tiles = what_is_seen(np.random.default_rng(seed), windows)
    everything = merge([without_weak_ones(tile, 0, masks) for tile in tiles], 180, 240)
    needed = [without_weak_ones(tile, threshold * COMPARABLE, masks) for tile in tiles]
    sure = [row for row in as_rows(everything) if row[1] >= threshold]
    assert as_rows(merge(needed, 180, 240, threshold)) == sure


def test_a_threshold_chooses_among_the_objects_in_tiles_and_changes_none(stage2, demo):
    """So --track, which looks at scores from .1 on, follows the objects that are found without."""
    model = RFDETR(stage2.folder / "best.pt", device="cpu")
    image = next((demo / "valid").glob("*.png"))
    everything = model.predict(image, 0.0, tile=40)
    for threshold in np.quantile(everything.scores, [0.5, 0.8, 0.95]).tolist():
        found = model.predict(image, threshold, tile=40)
        sure = everything[everything.scores >= threshold]
        assert len(found) and found.boxes.tolist() == sure.boxes.tolist()
        assert found.scores.tolist() == sure.scores.tolist() and found.rles == sure.rles


def test_nothing_detected_is_an_empty_result():
    windows = Tiling(64).windows(100, 100)
    found = merge([seen_in(window, [], least=0) for window in windows], 100, 100)
    assert found.boxes.shape == (0, 4) and found.rles() == []


def test_a_tile_is_placed_where_it_was_cut():
    placement = Placement.of_window(Window(30, 20, 94, 84), 200, 300)
    assert placement.visible == [30, 20, 94, 84]


def test_which_tiles_a_checkpoint_is_used_with():
    assert choose_tile(None, 0, 256) == 0 and choose_tile(None, 320, 256) == 320
    assert choose_tile("auto", 0, 256) == 256 and choose_tile("auto", 320, 256) == 320
    assert choose_tile(0, 320, 256) == 0 and choose_tile(640, 320, 256) == 640
    for wrong in ("large", 31, -5, True, 3.5):
        with pytest.raises(UserError, match="--tile must be 0, auto, or 32 pixels or more"):
            choose_tile(wrong, 0, 256)
    with pytest.raises(UserError, match="--tile must be 0, auto, or 32 pixels or more, got 31"):
        training_tiling(SimpleNamespace(), 64, 31, 0.2, False)
    with pytest.raises(UserError, match="does not say how large"):
        choose_tile("auto", 0, None)


def test_tiles_of_another_scale_than_in_training_are_a_warning():
    trained = {"tile": 0, "image_side": 256}
    assert "2.0 times as large" in unlike_training(trained, Tiling(128))
    assert "0.2 times" in unlike_training(trained, Tiling(1024))
    for tiling in (None, Tiling(256), Tiling(300), Tiling(128, with_whole=True)):
        assert unlike_training(trained, tiling) == ""
    assert unlike_training({}, Tiling(128)) == ""


def test_tiles_that_cut_no_image_are_not_told_of_as_cut(capsys):
    trained = {"tile": 0, "image_side": 256}
    tell_tiles(trained, Tiling(5000), 1024)
    said = capsys.readouterr().out
    assert "Tiles of 5000 px: no image is larger, each is looked at as a whole" in said
    assert "0.2 times as large" in said.replace("\n", " ") and "in common" not in said
    tell_tiles(trained, Tiling(5000), 300)
    assert "times as large" not in capsys.readouterr().out
    tell_tiles(trained, Tiling(200), 1024)
    assert "in common" in capsys.readouterr().out


# ---------------------------------------------------------------- training and scoring


@pytest.fixture
def tiled(demo) -> SplitDataset:
    return SplitDataset(read_dataset(demo)["train"], 64, "dihedral", True, tiling=Tiling(64, 0.25))


def test_a_tile_shows_its_part_of_the_image_and_the_objects_in_it(tiled):
    assert len(tiled) == len(tiled.split.images) > len(tiled.whole_split.images)
    for index in range(0, len(tiled), 5):
        sample = tiled[index, None]
        record = tiled.split.images[index]
        whole = load_image(record)
        part = torch.from_numpy(crop(whole, record.window)).permute(2, 0, 1)
        assert torch.equal(sample["image"], part)  # 64 px of the original on 64 px of the input
        target = sample["target"]
        assert len(target["labels"]) == len(target["masks"])
        for mask, (x, y, w, h) in zip(target["masks"].numpy(), target["boxes"].numpy() * 64):
            rows, columns = np.nonzero(mask)
            if len(rows):
                assert rows.min() >= y - h / 2 - 1 and rows.max() + 1 <= y + h / 2 + 1
                assert columns.min() >= x - w / 2 - 1 and columns.max() + 1 <= x + w / 2 + 1


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_goes_with_tiles(demo, name):
    dataset = SplitDataset(
        read_dataset(demo)["train"], 64, name, masks=True, tiling=Tiling(64, 0.25)
    )
    for index in range(0, len(dataset), 7):
        target = dataset[index, index + 5]["target"]
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        for mask, (x, y, w, h) in zip(target["masks"].numpy(), target["boxes"].numpy() * 64):
            rows, columns = np.nonzero(mask)
            if len(rows):
                assert rows.min() >= y - h / 2 - 1.5 and rows.max() + 1 <= y + h / 2 + 1.5
                assert columns.min() >= x - w / 2 - 1.5 and columns.max() + 1 <= x + w / 2 + 1.5


def test_in_training_tiles_move_as_the_seed_says_and_stay_in_the_image(tiled):
    windows = {tiled.record(0, seed).window for seed in range(20)}
    assert len(windows) > 5
    assert all(0 <= w.left < w.right <= 96 and 0 <= w.top < w.bottom <= 96 for w in windows)
    assert all(w.width == w.height == 64 for w in windows)
    first = tiled[1, 7]
    again = tiled[1, 7]
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["target"]["boxes"], again["target"]["boxes"])


def test_objects_that_are_hardly_visible_are_not_learnt_there():
    boxes = np.array([[0, 0, 40, 40], [50, 0, 90, 40], [60, 0, 100, 40]], dtype=np.float32)
    record = SimpleNamespace(boxes=boxes)
    assert visible_objects(record, Window(0, 0, 64, 64)).tolist() == [0, 1]


def test_guessed_masks_are_those_of_the_whole_image(demo):
    split = read_dataset(demo)["train"]
    images = [replace(i, segmentations=[None] * len(i.segmentations)) for i in split.images]
    split = replace(split, images=images)
    whole = SplitDataset(split, 64, None, masks=True, guess=True)
    tiles = SplitDataset(split, 64, None, masks=True, guess=True, tiling=Tiling(64, 0.25))
    for index in range(6):
        number, window = tiles.split.images.places[index]
        kept = visible_objects(split.images[number], window)
        assert tiles.segmentations(index) == [whole.segmentations(number)[i] for i in kept]


def test_tiles_are_suggested_by_the_sizes_of_the_objects():
    def split_of(side: int, sides: list[float]) -> SimpleNamespace:
        boxes = np.array([[0, 0, one, one] for one in sides], dtype=np.float32).reshape(-1, 4)
        return SimpleNamespace(images=SimpleNamespace(boxes=boxes, sizes=np.array([[side, side]])))

    assert suggested_tile(split_of(2000, [20] * 50), 384) == 480  # 16 px of the input
    assert suggested_tile(split_of(2000, [20] * 90 + [300] * 10), 384) == 1216  # 4 of the largest
    assert suggested_tile(split_of(500, [20] * 50), 384) == 0
    assert suggested_tile(split_of(2000, []), 384) == 0


def test_every_rank_scores_all_tiles_of_its_images(tiled):
    shares = [tiled.share_of(rank, 2) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(len(tiled)))
    numbers = [{tiled.split.images.places[index][0] for index in share} for share in shares]
    assert not numbers[0] & numbers[1]


@pytest.mark.slow
def test_a_run_in_tiles_is_scored_and_used_in_tiles(few, call, capsys, tmp_path):
    tiles = ["--tile", 48]
    call(train_detector_stage1.main, *quick_flags(few), *tiles, "--output_dir", "stage1")
    assert "Tiles of 48 px, 30% in common: 4 images are 16 tiles" in capsys.readouterr().out
    weights = checkpoint.load(tmp_path / "stage1/best.pt")
    assert weights["tile"] == 48 and weights["image_side"] == 64
    words = ["--checkpoint", "stage1/best.pt", "--dataset", few]
    call(evaluate.main, *words, "--json", "own.json")
    assert "Tiles of 48 px" in capsys.readouterr().out
    call(evaluate.main, *words, "--json", "whole.json", "--tile", 0)
    assert "Tiles of" not in capsys.readouterr().out
    valid = json.loads((tmp_path / "stage1/metrics.json").read_text())["best"]
    assert json.loads((tmp_path / "own.json").read_text())["bbox"]["mAP"] == pytest.approx(
        valid["value"], abs=1e-6
    )
    call(
        train_seg_stage2.main,
        *quick_flags(few),
        "--stage1_run",
        "stage1",
        "--auto_shrink",
        1,
        "--output_dir",
        "s2",
    )
    assert "Tiles of 48 px" in capsys.readouterr().out
    image = few / "valid"
    call(predict.main, "--checkpoint", "s2", "--input", image, "--output", "p", "--threshold", 0)
    assert "Tiles of 48 px" in capsys.readouterr().out
    assert (tmp_path / "p/predictions.json").is_file()
