"""Images that keep their proportions in the model's square input: everything lies where it lay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import once, quick_flags
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_api
from torchvision.ops import box_convert
from torchvision.transforms import v2

import evaluate
import predict
import quickstart
import train_detector_stage1
import train_seg_single_stage
import train_seg_stage2
import validate_setup
from rfdetr.classes import assign_rows
from rfdetr.console import UserError
from rfdetr.data.augment import PRESETS, Preset, random_view
from rfdetr.data.coco import read_dataset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.layout import ANNOTATIONS
from rfdetr.data.letterbox import as_input, letterbox_for
from rfdetr.data.statistics import object_sides, typical_side
from rfdetr.detr import RFDETR
from rfdetr.device import pick_device, pick_precision
from rfdetr.inference.detections import Detections, draw_masks, make_predictions, sure_detections
from rfdetr.inference.originals import Original
from rfdetr.models.detector import Detector
from rfdetr.models.official_masks import OfficialMaskHead
from rfdetr.placement import Placement, letterbox_borders
from rfdetr.sizes import SIZES
from rfdetr.tiling import Tiling, Window
from rfdetr.training.feature_key import cache_key
from rfdetr.weights import checkpoint

# pycocotools.mask.decode under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPES = {"wide": (120, 40), "tall": (40, 120), "square": (80, 80)}  # width, height
TABLE = assign_rows(["cell"], [1], "dataset")
SIDE = 64


def write_split(folder: Path, images: int) -> None:
    """Wide, tall and square images in turn: red rectangles on gray, one of them in a corner."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(images)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
    for number in range(images):
        width, height = list(SHAPES.values())[number % 3]
        pixels = np.full((height, width, 3), 60 + 10 * number, dtype=np.uint8)
        name = f"{number}.png"
        entry = {"id": number, "file_name": name, "width": width, "height": height}
        content["images"].append(entry)
        x, y = (rng.integers(20, side - 19) for side in (width, height))
        for left, top in ((0, 0), (int(x), int(y))):
            pixels[top : top + 16, left : left + 16] = (255, 0, 0)
            corners = [left, top, left + 16, top, left + 16, top + 16, left, top + 16]
            shape = [corners]
            if number % 2:
                shape = mask_api.frPyObjects([corners], height, width)[0]
                shape["counts"] = shape["counts"].decode()
            annotation = {"id": len(content["annotations"]) + 1, "image_id": number}
            annotation |= {"category_id": 1, "bbox": [left, top, 16, 16], "segmentation": shape}
            content["annotations"].append(annotation | {"area": 256, "iscrowd": 0})
        Image.fromarray(pixels).save(folder / name)
    (folder / ANNOTATIONS).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="session")
def mixed(shared) -> Path:
    """A dataset of images of three ratios; tests must not change it."""

    def make() -> str:
        write_split(shared / "mixed/train", 6)
        write_split(shared / "mixed/valid", 3)
        return ""

    once(shared / "mixed.txt", make)
    return shared / "mixed"


@pytest.fixture(scope="module")
def split(mixed):
    return read_dataset(mixed)["train"]


def whole(height: int, width: int, side: int) -> Placement:
    return Placement.of_input(Window(0, 0, width, height), height, width, side, True)


# ---------------------------------------------------------------- geometry


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(2, 40).map(lambda n: 8 * n))
def test_an_image_is_centred_and_keeps_its_proportions(height, width, side):
    beside, above = letterbox_borders(height, width, side)
    inner = np.array([side - 2 * beside, side - 2 * above])
    assert inner.max() == side and inner.min() >= 1
    exact = side * np.array([width, height]) / max(width, height)
    assert (np.abs(inner - exact) <= np.maximum(1, 2 - exact)).all()


@given(st.integers(8, 900), st.integers(8, 900), st.integers(2, 20).map(lambda n: 16 * n))
def test_boxes_come_back_to_where_they_lay(height, width, side):
    placement = whole(height, width, side)
    to_input = placement.to_input(side, side)
    boxes = np.array([[0, 0, width, height], [width / 4, height / 3, width / 2, height - 1]])
    there = boxes.reshape(-1, 2) @ to_input[:2, :2].T + to_input[:2, 2]
    beside, above = letterbox_borders(height, width, side)
    np.testing.assert_allclose(there[0], [beside, above], atol=1e-6)
    np.testing.assert_allclose(there[1], [side - beside, side - above], atol=1e-6)
    back = placement.to_original(torch.from_numpy(there.reshape(-1, 4) / side))
    np.testing.assert_allclose(back.numpy(), boxes, atol=1e-6 * max(width, height))
    np.testing.assert_allclose(placement.visible, [0, 0, width, height], atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_lie_where_the_placement_says(shape):
    width, height = SHAPES[shape]
    image = torch.full((3, height, width), 40, dtype=torch.uint8)
    image[0, 8:32, 16:36] = 255
    side = 160
    shown = as_input(image, side, True)
    red = np.argwhere((shown[0] > 150).numpy())
    matrix = whole(height, width, side).to_input(side, side)
    corners = np.array([[16, 8], [36, 32]]) @ matrix[:2, :2].T + matrix[:2, 2]
    assert np.abs(red.min(0)[::-1] - corners[0]).max() <= 1
    assert np.abs(red.max(0)[::-1] + 1 - corners[1]).max() <= 1
    beside, above = letterbox_borders(height, width, side)
    if beside or above:  # of the image's mean colour
        mean = image.float().mean((1, 2))
        assert (shown[:, 0, 0] - mean).abs().max() <= 1.5
        assert (shown.float().mean((1, 2)) - mean).abs().max() <= 1.5


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_comes_back_to_where_its_object_lies(shape):
    """A head whose masks are the red pixels of its input gives those of the original."""

    class RedPixels(OfficialMaskHead):
        def pixels(self, features, images):
            return images[:, :1] - 1

        def kernels(self, queries):
            return queries[:, :1] * 0 + 1

    width, height = SHAPES[shape]
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, 8:32, 16:36] = 255
    detections = Detections(
        indices=[0],
        placements=[whole(height, width, 160)],
        scores=torch.ones(1, 1),
        labels=torch.zeros(1, 1, dtype=torch.long),
        boxes=torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]),
        queries=torch.zeros(1, 1, 96),
        features=torch.zeros(1, 96, 10, 10),
        images=as_input(image, 160, True)[None],
    )
    precision = pick_precision("off", pick_device("cpu"))
    (((rle,), _),) = draw_masks(RedPixels(96, 1), detections, [np.arange(1)], precision)
    drawn = mask_api.decode(rle).astype(bool)
    truth = (image[0] > 0).numpy()
    assert drawn.shape == truth.shape
    assert (drawn & truth).sum() / (drawn | truth).sum() > 0.9


def test_nothing_is_detected_in_the_border():
    placement = whole(40, 120, 96)  # rows 32 to 64 of the input
    boxes = torch.tensor([[0.5, 0.1, 0.4, 0.2], [0.5, 0.34, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]])
    detections = Detections(
        indices=[0],
        placements=[placement],
        scores=torch.tensor([[0.9, 0.8, 0.7]]),
        labels=torch.zeros(1, 3, dtype=torch.long),
        boxes=boxes[None],
        queries=torch.zeros(1, 3, 96),
        features=torch.zeros(1, 96, 6, 6),
        images=torch.zeros(1, 3, 96, 96, dtype=torch.uint8),
    )
    assert detections.in_sight(0).tolist() == [False, True, True]
    assert sure_detections(detections, 0.0, 0.0)[0].tolist() == [1, 2]
    original = Original(40, 120, np.zeros((40, 120, 3), dtype=np.uint8))
    precision = pick_precision("off", pick_device("cpu"))
    (found,) = make_predictions(detections, [original], 0.0, None, TABLE, precision)
    assert found.scores.tolist() == pytest.approx([0.8, 0.7])
    assert (found.boxes[:, 1] >= 0).all() and (found.boxes[:, 3] <= 40).all()
    detections.placements = [Placement.resized(40, 120)]
    assert detections.in_sight(0).all()


def test_the_best_score_is_of_what_is_in_sight(tmp_path):
    model = RFDETR.from_checkpoint(saved_model(tmp_path / "boxed.pt", letterbox=True), "cpu")
    image = np.random.default_rng(0).integers(0, 256, (16, 200, 3), dtype=np.uint8)
    shown = model.predict(image, 0.0, nms=0)
    assert 0 < len(shown) < model.model.size.select
    assert model.best_score == shown.scores[0]


# ---------------------------------------------------------------- what training sees


@pytest.mark.parametrize("tiling", [None, Tiling(48, 0.25)], ids=["whole", "tiles"])
@pytest.mark.parametrize("name", [None, *PRESETS])
def test_objects_and_pixels_stay_together(split, name, tiling):
    """The red pixels of a view are those of its masks, and the boxes lie around them."""
    preset = name and replace(PRESETS[name], colours=None, paste_chance=0.0)
    dataset = SplitDataset(split, SIDE, preset, masks=True, tiling=tiling, letterbox=True)
    views = 0
    for seed in range(36):
        sample = dataset[seed % len(dataset), seed]
        target = sample["target"]
        masks = target["masks"].numpy().astype(bool)
        image = sample["image"].numpy().astype(int)
        red = image[0] - image[1] > 140
        union = masks.any(0)
        if not len(masks) or max(red.sum(), union.sum()) < 40:
            continue
        views += 1
        missed = (red ^ union).sum() / (red | union).sum()
        assert missed < 0.35 if tiling else missed < 0.25  # rims, and slivers at a tile's edge
        corners = box_convert(target["boxes"], "cxcywh", "xyxy").numpy() * SIDE
        for mask, box in zip(masks, corners):
            rows, columns = np.nonzero(mask)
            if len(rows):
                assert rows.min() >= box[1] - 1.5 and rows.max() + 1 <= box[3] + 1.5
                assert columns.min() >= box[0] - 1.5 and columns.max() + 1 <= box[2] + 1.5
    assert views > 10


def test_objects_keep_their_proportions(split):
    dataset = SplitDataset(split, SIDE, None, masks=False, letterbox=True)
    squeezed = SplitDataset(split, SIDE, None, masks=False)
    for index in range(6):
        boxes = dataset[index, None]["target"]["boxes"]
        assert torch.allclose(boxes[:, 2], boxes[:, 3], rtol=0.06)
        sides = (boxes[:, 2] * boxes[:, 3]).sqrt() * SIDE
        own = object_sides(split, SIDE, letterbox=True)[split.places == index]
        np.testing.assert_allclose(sides.numpy(), own, rtol=0.04)
    assert typical_side(split, letterbox=True) == 120 and typical_side(split) == 69
    assert not torch.allclose(*squeezed[0, None]["target"]["boxes"][:, 2:].unbind(1), rtol=0.5)


def test_crops_have_the_border_and_about_the_ratio_of_their_image():
    preset = Preset(crop_chance=1.0, mirrored_axes=())
    image = torch.full((3, 40, 120), 200, dtype=torch.uint8)
    image[:, :, ::2] = 0
    for seed in range(10):
        torch.manual_seed(seed)
        view, matrix = random_view(image, preset, 96, letterbox=True)
        border = view[:, list(range(32)) + list(range(64, 96))]
        assert (border == border[:, :1, :1]).all()
        assert 0.74 < matrix[0, 0] / matrix[1, 1] < 1.35


@pytest.mark.parametrize("name", ["strong", "microscopy"])
def test_nothing_is_pasted_on_a_border(split, name):
    preset = replace(PRESETS[name], colours=None, paste_chance=1.0)
    dataset = SplitDataset(split, SIDE, preset, masks=True, letterbox=True)
    more = 0
    for seed in range(20):
        index = seed % 2  # wide, tall; the others' objects lie anywhere
        sample = dataset[index, seed]
        own = replace(preset, paste_chance=0.0)
        alone = SplitDataset(split, SIDE, own, masks=True, letterbox=True)[index, seed]
        more += len(sample["target"]["labels"]) > len(alone["target"]["labels"])
        shown = sample_shown(dataset, index, preset, seed)
        assert not (sample["target"]["masks"].bool() & ~shown).any()
        assert torch.equal(sample["image"][:, ~shown], alone["image"][:, ~shown])
    assert more > 5


def sample_shown(dataset: SplitDataset, index: int, preset: Preset, seed: int) -> torch.Tensor:
    """Where the image lies in a view, or within a pixel of it: bool (R, R)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        shown = dataset._view(index, preset)["shown"]
    return torch.nn.functional.max_pool2d(shown[None].float(), 3, 1, 1)[0] > 0


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_square_images_are_the_same_with_and_without(demo, name):
    squares = read_dataset(demo)["train"]
    plain = SplitDataset(squares, SIDE, name, masks=True)
    boxed = SplitDataset(squares, SIDE, name, masks=True, letterbox=True)
    for seed in range(6):
        one = plain[seed, seed]
        other = boxed[seed, seed]
        assert torch.equal(one["image"], other["image"])
        for key in ("boxes", "labels", "masks", "has_mask"):
            assert torch.equal(one["target"][key], other["target"][key])


def test_without_it_inputs_are_resized_as_ever(split, tmp_path):
    dataset = SplitDataset(split, SIDE, None, masks=False)
    for index, record in enumerate(split.images):
        pixels = torch.from_numpy(np.array(Image.open(record.path).convert("RGB"))).permute(2, 0, 1)
        resized = v2.functional.resize(pixels, [SIDE, SIDE], antialias=True)
        assert torch.equal(dataset[index, None]["image"], resized)
        assert torch.equal(as_input(pixels, SIDE, False), resized)
    for size in SIZES.values():
        assert not size.recipe.letterbox


def test_kept_images_are_the_same_as_new_ones(split):
    dataset = SplitDataset(split, SIDE, None, masks=True, letterbox=True)
    first = dataset[0, None]["image"].clone()
    assert dataset.cache and torch.equal(dataset[0, None]["image"], first)
    dataset.cache = None
    assert torch.equal(dataset[0, None]["image"], first)


def test_guessed_masks_lie_on_the_objects(split):
    images = [replace(i, segmentations=[None] * len(i.segmentations)) for i in split.images]
    without = replace(split, images=images)
    guessed = SplitDataset(without, SIDE, None, masks=True, guess=True, letterbox=True)
    drawn = SplitDataset(split, SIDE, None, masks=True, letterbox=True)
    for index in range(3):
        one = guessed[index, None]["target"]["masks"].bool()
        other = drawn[index, None]["target"]["masks"].bool()
        assert (one & other).sum() / (one | other).sum() > 0.7


# ---------------------------------------------------------------- the Python door


def saved_model(file: Path, **more: object) -> Path:
    torch.manual_seed(0)
    size = replace(SIZES["tiny"], select=8)
    detector = Detector(size, TABLE.rows_total, TABLE.background_last, mask_head="nano")
    content = checkpoint.make_content("single", size, SIDE, TABLE, "nano", detector.state_dict())
    checkpoint.save(file, content | more)
    return file


def test_a_batch_equals_its_images_one_by_one(mixed, tmp_path):
    model = RFDETR(saved_model(tmp_path / "best.pt", letterbox=True), device="cpu")
    files = sorted((mixed / "valid").glob("*.png"))
    for options in ({}, {"tile": 48}):
        together = model.predict(files, 0.0, batch=3, **options)
        for file, found in zip(files, together):
            alone = model.predict(file, 0.0, **options)
            assert len(alone) == len(found) > 0
            # equal scores have no order
            rows, expected = (
                sorted(np.column_stack([one.scores, one.boxes]).round(3).tolist())
                for one in (found, alone)
            )
            np.testing.assert_allclose(rows, expected, atol=1e-2)
            height, width = found.image.shape[:2]
            assert found.boxes.min() >= 0 and (found.boxes <= [width, height] * 2).all()
            assert found.masks.shape[1:] == (height, width)


def test_another_way_than_in_training_is_told_once(mixed, tmp_path, capsys):
    file = sorted((mixed / "valid").glob("*.png"))[0]
    old = RFDETR(saved_model(tmp_path / "old.pt"), device="cpu")
    boxed = RFDETR(saved_model(tmp_path / "boxed.pt", letterbox=True), device="cpu")
    plain = old.predict(file, 0.0)
    assert not np.array_equal(plain.boxes, boxed.predict(file, 0.0).boxes)
    assert not capsys.readouterr().out
    np.testing.assert_array_equal(boxed.predict(file, 0.0, letterbox=False).boxes, plain.boxes)
    assert "letterbox=False: the model was trained on images with" in capsys.readouterr().out
    boxed.predict(file, letterbox=False)
    assert not capsys.readouterr().out
    old.predict(file, letterbox=True)
    assert "letterbox=True: the model was trained on images resized" in capsys.readouterr().out
    assert letterbox_for(None, {"letterbox": True}) == (True, "")
    assert letterbox_for(None, {}) == letterbox_for(False, {}) == (False, "")
    for wrong in ("yes", np.ones(2)):
        with pytest.raises(UserError, match="letterbox must be True or False, got"):
            old.predict(file, letterbox=wrong)
    with pytest.raises(UserError, match="letterbox"):
        checkpoint.load(saved_model(tmp_path / "broken.pt", letterbox="yes"))


# ---------------------------------------------------------------- the scripts


@pytest.mark.slow
def test_the_letterbox_goes_with_the_checkpoint(mixed, call, tmp_path, capsys, monkeypatch):
    preview = ["--preview", "sheet.png", "--augment", "crops", "--letterbox", 1]
    call(validate_setup.main, "--dataset", mixed, "--size", "tiny", *preview)
    assert "--letterbox 1" in capsys.readouterr().out.splitlines()[-1]
    flags = [*quick_flags(mixed), "--resolution", SIDE, "--head", "dataset"]
    call(train_detector_stage1.main, *flags, "--output_dir", "one", "--letterbox", 1)
    assert "Letterbox: images keep their proportions" in capsys.readouterr().out
    assert "letterbox: true" in (tmp_path / "one/config.yaml").read_text()
    call(train_detector_stage1.main, "--resume", "one", "--epochs", 2)
    assert "Letterbox: images keep their proportions" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "one/best.pt")["letterbox"] is True

    keys = []
    monkeypatch.setattr(
        "rfdetr.training.feature_cache.cache_key",
        lambda *given: keys.append(cache_key(*given)) or keys[-1],
    )
    flags = [*quick_flags(mixed), "--resolution", SIDE, "--checkpoint", "one", "--cache", "ram"]
    flags += ["--fast_dev_run", 1]
    call(train_seg_stage2.main, *flags, "--output_dir", "two")
    assert "leave the flag out" not in capsys.readouterr().out
    call(train_seg_stage2.main, *flags, "--output_dir", "other", "--letterbox", 0)
    assert "--letterbox 0: the model was trained on" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "two/best.pt")["letterbox"] is True
    assert keys[0] != keys[1] and keys[0] | {"letterbox": None} == keys[1] | {"letterbox": None}

    call(
        train_seg_single_stage.main,
        *quick_flags(mixed),
        "--output_dir",
        "three",
        "--init_ckpt",
        "two",
        "--resolution",
        SIDE,
    )
    assert checkpoint.load(tmp_path / "three/best.pt")["letterbox"] is True

    words = ["--checkpoint", "two", "--dataset", mixed, "--results"]
    call(evaluate.main, *words, "own", "--letterbox", 1)
    assert "leave the flag out" not in capsys.readouterr().out
    call(
        predict.main,
        "--checkpoint",
        "two",
        "--input",
        mixed / "valid",
        "--output",
        "found",
        "--threshold",
        0,
        "--nms",
        0,
    )
    own = json.loads((tmp_path / "own/segm.json").read_text())
    records = json.loads((tmp_path / "found/predictions.json").read_text())
    model = RFDETR(tmp_path / "two", device="cpu")
    for number in range(3):
        found = model.predict(mixed / f"valid/{number}.png", 0.0, nms=0)
        of_image = [one for one in records if one["file"].endswith(f"{number}.png")]
        scored = [one for one in own if one["image_id"] == number]
        assert len(of_image) == len(found) > 0 and len(scored) == len(found)
        boxes = np.array([one["bbox"] for one in of_image])
        np.testing.assert_allclose(
            box_convert(torch.from_numpy(boxes), "xywh", "xyxy"), found.boxes, atol=0.02
        )
    call(evaluate.main, *words, "plain", "--letterbox", 0)
    assert "--letterbox 0: the model was trained on" in capsys.readouterr().out
    assert json.loads((tmp_path / "plain/segm.json").read_text()) != own


def test_quickstart_hands_it_to_stage_1(monkeypatch):
    job = quickstart.Job(quickstart.parse(["--letterbox", "1", "--epochs", "1"]))
    monkeypatch.setattr(job, "train", lambda script, kind, what, own: own)
    assert job.train_detector()[-2:] == ("--letterbox", "1")
