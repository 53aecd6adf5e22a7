"""Every preset keeps image, boxes and masks together; pasted objects hide what is below them."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import quick_flags
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_data_loading import squares  # noqa: F401  (a fixture)
from torchvision.ops import box_convert

import train_detector_stage1
import train_seg_stage2
import validate_setup
from rfdetr.console import UserError
from rfdetr.data.augment import PRESETS, Preset, find_preset, move_boxes, random_view
from rfdetr.data.coco import read_dataset
from rfdetr.data.copy_paste import paste
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.loaders import collate
from rfdetr.masks import draw_masks, extent_of_pixels, inside_window, is_turned, rasterise, to_rle
from rfdetr.sizes import AUGMENTS, SIZES
from rfdetr.tiling import Window


@pytest.fixture(scope="module")
def split(demo):
    return read_dataset(demo)["train"]


@pytest.fixture(scope="module")
def as_rle(split):
    """The same, the masks of every second image as RLE."""
    changed = replace(split, images=list(split.images))
    for image in changed.images[::2]:
        image.segmentations = [
            to_rle(polygons, image.height, image.width) for polygons in image.segmentations
        ]
    return changed


def corners_of(target: dict, side: int) -> np.ndarray:
    return box_convert(target["boxes"], "cxcywh", "xyxy").numpy() * side


def test_every_choice_is_a_preset_and_every_size_has_one():
    assert tuple(PRESETS) == AUGMENTS
    assert {size.recipe.augment for size in SIZES.values()} <= set(PRESETS)


@pytest.mark.parametrize("name", AUGMENTS)
def test_boxes_are_the_extents_of_masks_after_any_preset(as_rle, name):
    dataset = SplitDataset(as_rle, 96, name, masks=True)
    for seed in range(40):
        sample = dataset[seed % len(dataset), seed]
        target = sample["target"]
        counts = {len(target[key]) for key in ("boxes", "labels", "has_mask", "masks")}
        assert len(counts) == 1
        assert sample["image"].shape == (3, 96, 96) and sample["image"].dtype == torch.uint8
        assert sample["image"].is_contiguous()
        boxes = corners_of(target, 96)
        assert boxes.min(initial=0) >= -1e-4 and boxes.max(initial=0) <= 96 + 1e-4
        for box, mask in zip(boxes, target["masks"].numpy()):
            assert mask.max() == 1
            left, top, right, bottom = extent_of_pixels(mask)
            assert (box[:2] - 1.01 <= [left, top]).all()
            assert (box[2:] + 1.01 >= [right, bottom]).all()
            assert np.abs(box - [left, top, right, bottom]).max() <= 2


@pytest.mark.parametrize("name", ["strong", "microscopy", "aerial"])
def test_pixels_are_where_the_matrix_says(squares, name):  # noqa: F811
    """A red rectangle on gray, on an image that is wider than high."""
    preset = PRESETS[name]
    pixels = torch.full((3, 90, 120), 40, dtype=torch.uint8)
    pixels[0, 20:60, 30:90] = 255
    polygon = [[30, 20, 90, 20, 90, 60, 30, 60]]
    rle = to_rle(polygon, 90, 120)
    turned = 0
    for seed in range(30):
        torch.manual_seed(seed)
        image, matrix = random_view(pixels, preset, 128)
        turned += is_turned(matrix)
        red = (image[0] > 150).numpy()
        for segmentation in (polygon, rle):
            mask = np.zeros((128, 128), np.uint8)
            rasterise(segmentation, 90, 120, matrix, mask)
            both = (red & (mask > 0)).sum()
            assert both / (red | (mask > 0)).sum() > 0.93
    assert turned > 8


def test_polygons_that_lead_out_of_a_turned_image_end_at_its_rim(split):
    changed = replace(split, images=list(split.images))
    record = changed.images[0]
    far = [[-30, -30, 40, -30, 40, 40, -30, 40]]
    record.segmentations[0] = far
    record.boxes[0] = [0, 0, 40, 40]
    dataset = SplitDataset(changed, 96, Preset(most_turn=45, zoom=(0.5, 0.5)), masks=True)
    for seed in range(5):
        target = dataset[0, seed]["target"]
        assert target["masks"][0].sum().item() == pytest.approx(20 * 20, rel=0.1)


@given(
    seed=st.integers(0, 10**6),
    left=st.integers(0, 60),
    top=st.integers(0, 60),
    side=st.integers(30, 80),
)
def test_a_polygon_ends_at_the_rim_of_its_tile(seed, left, top, side):
    """As its pixels do, whatever its shape: in a view that is hardly turned, nothing moves."""
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, int(rng.integers(3, 12)), endpoint=False)
    radii = rng.uniform(15, 90, len(angles))
    corners = 64 + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    polygon = [corners.ravel().tolist()]
    window = Window(left, top, left + side, top + side)
    drawn = draw_masks([inside_window(polygon, 128, 128, window)], 128, 128, np.eye(2, 3), 128)[0]
    whole = draw_masks([polygon], 128, 128, np.eye(2, 3), 128)[0]
    expected = np.zeros_like(whole)
    expected[top : top + side, left : left + side] = whole[top : top + side, left : left + side]
    wrong = np.count_nonzero(drawn != expected)
    assert wrong <= 0.02 * np.count_nonzero(expected) + side  # pixels along the rim


def test_turns_keep_the_proportions_of_the_image():
    """A square of a wide image stays one, also where the image was squeezed into a square first."""
    preset = Preset(mirrored_axes=(), most_turn=180)
    corners = np.array([[50.0, 20], [70, 20], [70, 40], [50, 40]])
    for scale in (np.array([1.0, 1.0]), np.array([64 / 200, 64 / 50])):
        width, height = (np.array([200, 50]) * scale).round().astype(int)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        _, matrix = random_view(image, preset, 64, scale)
        matrix = matrix * [*scale, 1]
        there = corners @ matrix[:, :2].T / np.array([64 / 200, 64 / 50])  # in the image's pixels
        sides = np.linalg.norm(there - np.roll(there, 1, axis=0), axis=1)
        np.testing.assert_allclose(sides, 20, rtol=1e-6)


@given(st.floats(-np.pi, np.pi), st.floats(2, 30), st.floats(2, 30))
def test_a_turned_box_holds_the_ellipse_and_lies_in_the_corners(angle, width, height):
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin, 50], [sin, cos, 50]])
    box = np.array([[-width, -height, width, height]]) / 2
    x1, y1, x2, y2 = move_boxes(box, matrix)[0]
    turn = np.linspace(0, 2 * np.pi, 720)
    ellipse = np.stack([width / 2 * np.cos(turn), height / 2 * np.sin(turn)], axis=1)
    ellipse = ellipse @ matrix[:, :2].T + matrix[:, 2]
    expected = [*ellipse.min(0), *ellipse.max(0)]
    np.testing.assert_allclose([x1, y1, x2, y2], expected, atol=0.01 * max(width, height))


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_seed_repeats_a_sample_whatever_was_drawn_before(split, name):
    dataset = SplitDataset(split, 64, name, masks=False)
    torch.manual_seed(1)
    first = dataset[3, 77]
    torch.rand(3)
    state = torch.get_rng_state()
    again = dataset[3, 77]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["target"]["boxes"], again["target"]["boxes"])
    assert "masks" not in first["target"]


@pytest.mark.parametrize("name", AUGMENTS)
def test_images_without_objects_pass(split, name):
    changed = replace(split, images=list(split.images))
    for image in changed.images:
        for part in ("boxes", "labels", "segmentations"):
            setattr(image, part, getattr(image, part)[:0])
    dataset = SplitDataset(changed, 64, name, masks=True)
    batch = collate([dataset[0, seed] for seed in range(6)])
    assert batch.objects == 0 and batch.targets[0]["masks"].shape == (0, 64, 64)


def test_nothing_is_mirrored_without_flips(split):
    for name in AUGMENTS:
        dataset = SplitDataset(split, 64, find_preset(name, flip=False), masks=False)
        for seed in range(12):
            torch.manual_seed(seed)
            image = torch.zeros(3, 60, 80, dtype=torch.uint8)
            _, matrix = random_view(image, dataset.preset, 64)
            assert np.linalg.det(matrix[:, :2]) > 0, name
    plain = SplitDataset(split, 64, None, masks=True)[2, None]
    none = SplitDataset(split, 64, "none", masks=True)[2, 5]
    assert torch.equal(plain["image"], none["image"])
    assert torch.equal(plain["target"]["boxes"], none["target"]["boxes"])


# ---------------------------------------------------------------- copy-paste


def sample_of(boxes: list, labels: list, has_mask: list, colour: int) -> dict:
    """Of 32 x 32 pixels; masks fill their boxes (xyxy)."""
    masks = torch.zeros(len(boxes), 32, 32, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2), there in zip(masks, boxes, has_mask):
        mask[y1:y2, x1:x2] = there
    relative = torch.tensor(boxes).float().reshape(-1, 4) / 32
    target = {
        "boxes": box_convert(relative, "xyxy", "cxcywh"),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "has_mask": torch.tensor(has_mask, dtype=torch.bool),
        "index": colour,
        "masks": masks,
    }
    image = torch.full((3, 32, 32), colour, dtype=torch.uint8)
    return {"image": image, "target": target, "unread": {}}


def pasted(below: dict, above: dict) -> dict:
    """With all of its objects: the first seed whose coins say so."""
    for seed in range(1000):
        torch.manual_seed(seed)
        if (torch.rand(len(above["target"]["labels"])) < 0.5).all():
            torch.manual_seed(seed)
            return paste(below, above)
    raise AssertionError


def test_what_is_covered_leaves_the_masks_below_and_their_boxes_follow():
    boxes = [[0, 0, 10, 10], [8, 8, 12, 12], [20, 20, 30, 30], [6, 0, 15, 8]]
    below = sample_of(boxes, [0, 1, 2, 3], [True, True, True, False], 10)
    above = sample_of([[5, 0, 15, 16]], [7], [True], 200)
    whole = copy.deepcopy(below)
    result = pasted(below, above)
    target = result["target"]
    # half of the first is left; the second is covered, and so is the box of the fourth
    assert target["labels"].tolist() == [0, 2, 7]
    np.testing.assert_allclose(
        corners_of(target, 32), [[0, 0, 5, 10], [20, 20, 30, 30], [5, 0, 15, 16]], atol=1e-4
    )
    assert target["masks"].flatten(1).sum(1).tolist() == [50, 100, 160]
    assert target["masks"].sum(0).max() == 1 and target["has_mask"].all()
    covered = target["masks"][2].bool()
    assert (result["image"][:, covered] == 200).all() and (result["image"][:, ~covered] == 10).all()
    assert target["index"] == 10
    assert torch.equal(below["target"]["masks"], whole["target"]["masks"])  # left as it was


def test_an_object_without_mask_is_never_pasted_and_keeps_a_box_in_sight():
    below = sample_of([[0, 0, 20, 20]], [0], [False], 10)
    above = sample_of([[0, 0, 10, 10], [12, 12, 30, 30]], [1, 2], [True, False], 200)
    target = pasted(below, above)["target"]
    assert target["labels"].tolist() == [0, 1]
    np.testing.assert_allclose(corners_of(target, 32)[0], [0, 0, 20, 20], atol=1e-4)


def test_objects_are_pasted_in_training_with_and_without_masks_asked_for(split):
    preset = Preset(mirrored_axes=(), paste_chance=1.0)
    most = 0
    for masks in (True, False):
        dataset = SplitDataset(split, 64, preset, masks=masks)
        plain = SplitDataset(split, 64, None, masks=masks)
        for seed in range(8):
            most = max(
                most, collate([dataset[0, seed]]).objects - collate([plain[0, None]]).objects
            )
    assert most > 2
    without = replace(split, images=list(split.images))
    for image in without.images:
        image.segmentations = [None] * len(image.segmentations)
    dataset = SplitDataset(without, 64, preset, masks=False)
    assert dataset.donors == [] and collate([dataset[0, 1]]).objects == len(split.images[0].labels)


# ---------------------------------------------------------------- the commands


def test_stage_2_says_what_its_cached_views_are(few, call, capsys, tmp_path):
    flags = [*quick_flags(few), "--augment", "strong"]
    detector = tmp_path / "detector"
    start = ["--pretrain_weights", "none", "--head", "dataset", "--output_dir", detector]
    call(train_detector_stage1.main, *flags, *start)
    head = ["--stage1_run", detector, "--output_dir", tmp_path / "head", "--cache", "ram"]
    call(train_seg_stage2.main, *flags, *head, "--cache_views", 2, "--fast_dev_run", 2)
    said = capsys.readouterr().out
    assert "with --cache off --augment strong varies them" in said
    settings = SimpleNamespace(augment="dihedral", flip=False, cache_views=4)
    assert train_seg_stage2.cached_views(settings) == 1
    assert train_seg_stage2.cached_views(SimpleNamespace(**vars(settings) | {"flip": True})) == 4


def test_preview_draws_the_presets_samples(demo, call, capsys, tmp_path):
    flags = ["--dataset", demo, "--size", "tiny", "--check_images", 0, "--augment", "microscopy"]
    call(validate_setup.main, *flags, "--flip", 0, "--preview", tmp_path / "sheet.png")
    said = capsys.readouterr().out
    assert "Training images as --augment microscopy --flip 0 varies them" in said
    assert said.endswith("--augment microscopy --flip 0\n")  # so does what is to be typed next
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 1000 and len(sheet.getcolors(1 << 24)) > 1000
    with pytest.raises(UserError, match="--preview"):
        call(validate_setup.main, *flags)


def test_training_takes_a_preset_and_says_once_where_nothing_can_be_pasted(
    few, call, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("rfdetr.data.dataset.images_with_masks", lambda split: [])
    flags = [*quick_flags(few), "--pretrain_weights", "none", "--head", "dataset"]
    call(train_detector_stage1.main, *flags, "--augment", "strong", "--output_dir", tmp_path / "r")
    said = capsys.readouterr().out
    assert said.count("--augment strong pastes objects by their masks") == 1
    assert "augment: strong" in (tmp_path / "r/config.yaml").read_text()
