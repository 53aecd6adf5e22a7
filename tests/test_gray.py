"""Gray images of 12 and 16 bits and of floating-point numbers, stacks of pages, many channels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import quick_flags
from PIL import Image

import evaluate
import predict
import train_detector_stage1
import train_seg_stage2
import validate_setup
from rfdetr.classes import assign_rows
from rfdetr.console import UserError
from rfdetr.data import images
from rfdetr.data.coco import read_dataset
from rfdetr.data.gray import (
    EIGHT_BIT,
    GrayScale,
    look_at,
    look_at_records,
    other_ranges,
    scale_by,
    scale_for,
)
from rfdetr.data.images import load_image, read_pixels
from rfdetr.detr import RFDETR
from rfdetr.inference.originals import deep_pixels_of, read_image
from rfdetr.models.detector import Detector
from rfdetr.sizes import SIZES
from rfdetr.weights import checkpoint

KINDS = {"8": (255, np.uint8), "12": (4095, np.uint16), "16": (65535, np.uint16)}
KINDS |= {"float": (1700.0, np.float32)}


def in_gray(source: Path, target: Path, kind: str) -> Path:
    """The demo in gray of 8 bits and of more, its darkest and lightest thousandth cut off.

    That is what a microscope's software exports: the 8-bit images are shown as the others are read.
    """
    shutil.copytree(source, target)
    white, dtype = KINDS[kind]
    files = sorted(target.rglob("*.png"))
    values = {file: np.asarray(Image.open(file).convert("F"), np.float64) for file in files}
    train = np.concatenate([gray.ravel() for file, gray in values.items() if "train" in file.parts])
    low, high = np.percentile(train, [0.1, 99.9])
    for file, gray in values.items():
        share = (gray - low) / (high - low)
        if kind == "8":
            stored = (share.clip(0, 1) * 255).round().astype(dtype)
        else:  # as a camera gives it: dim, above a dark level
            stored = (white * (0.05 + 0.4 * share)).clip(0, white).astype(dtype)
        file.unlink()
        Image.fromarray(stored).save(file.with_suffix(".tif"))
        annotations = file.parent / "_annotations.coco.json"
        text = annotations.read_text(encoding="utf-8")
        new = file.with_suffix(".tif").name
        annotations.write_text(text.replace(f'"{file.name}"', f'"{new}"'), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def grays(demo, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gray")
    return {kind: in_gray(demo, folder / kind, kind) for kind in KINDS}


def pixels_of(dataset: Path, by: str | float) -> tuple[np.ndarray, GrayScale]:
    """All images of a dataset as training reads them, and the range that was found."""
    splits = read_dataset(dataset)
    scale = scale_by(by, look_at_records(splits["train"].images))
    images = [image for split in splits.values() for image in split.images]
    return np.stack([load_image(image, scale.window) for image in images]), scale


@pytest.mark.parametrize("kind", ["12", "16", "float"])
def test_deep_gray_is_read_as_the_8_bit_images_of_it(grays, kind):
    plain, nothing = pixels_of(grays["8"], "auto")
    assert nothing.window is None and nothing.note is None and plain.std() > 30
    deep, scale = pixels_of(grays[kind], "auto")
    assert np.abs(deep.astype(int) - plain).max() <= 1
    assert deep.max() == 255 and (scale.deep, scale.plain) == (12, 0)
    assert "12 of 12 images" in scale.note and "is black" in scale.note
    full, _ = pixels_of(grays[kind], "full")
    assert len(np.unique(full)) < 0.6 * len(np.unique(deep))
    harder, narrow = pixels_of(grays[kind], 95.0)
    assert narrow.window[0] > scale.window[0] and narrow.window[1] < scale.window[1]
    assert harder.std() > deep.std()


def test_few_bright_pixels_and_odd_values():
    dark = np.zeros((300, 300), np.uint16)
    assert scale_by("auto", look_at([dark], lambda image, values_too: image)).window is None
    dark[5, 5] = 900
    spots = scale_by("auto", look_at([dark[:20, :20]] * 200, lambda image, values_too: image))
    assert spots.window == (0, 900) and spots.deep == 100
    odd = np.array([[np.nan, -np.inf, np.inf, 0.5, 2.0]], np.float32)
    sample = look_at([odd], lambda image, values_too: image)
    assert sorted(sample.values) == [0.5, 2.0]
    assert read_image(odd, window=(0.5, 2.0))[0, :, 0].tolist() == [0, 0, 255, 0, 255]


def test_the_range_comes_back_from_a_checkpoint():
    scale = GrayScale("auto", (10.0, 200.5), 3, 1)
    assert GrayScale.from_dict(json.loads(json.dumps(scale.to_dict()))) == scale
    assert checkpoint.gray_of({}) is None  # of earlier versions: by its bits
    for wrong in ({"window": [5, 5]}, {"window": [0, float("nan")]}, {"by": "some"}, {"by": 20}):
        with pytest.raises((ValueError, TypeError)):
            GrayScale.from_dict(scale.to_dict() | wrong)


def test_other_images_than_in_training_are_told():
    deep = look_at([np.arange(1000)], lambda image, values_too: image)
    plain = look_at([1], lambda image, values_too: None)
    trained = GrayScale("auto", (10.0, 200.0), 9, 0)
    alike = look_at([np.arange(200)], lambda image, values_too: image)
    assert scale_for(None, trained, alike) == (trained, None)
    assert scale_for(None, None, deep) == (None, None)
    scale, warning = scale_for(None, EIGHT_BIT, deep)
    assert (
        scale.window == pytest.approx((0.999, 998.001)) and "trained on images of 8 bits" in warning
    )
    assert "--gray full" in warning
    scale, warning = scale_for(None, trained, plain)
    assert scale == trained and "these images have 8 bits" in warning
    mixed = look_at([None, np.arange(1000), None], lambda image, values_too: image)
    scale, warning = scale_for(None, trained, mixed)
    assert scale == trained and "2 of 3 images looked at have 8 bits" in warning
    assert scale_for("full", trained, deep)[0].window is None


def sampled(*images: np.ndarray):
    return look_at(images, lambda image, values_too: image)


def test_images_of_another_bit_depth_than_in_training_are_told():
    gray = np.arange(4096, dtype=np.uint16)
    trained = scale_by("auto", sampled(gray))
    assert scale_for(None, trained, sampled(gray)) == (trained, None)
    assert scale_for(None, trained, sampled(gray // 4)) == (trained, None)  # a dim image
    scale, warning = scale_for(None, trained, sampled(gray * 16))
    assert scale is trained and "as if of another bit depth, they are far too bright" in warning
    assert "up to 65454.5, of the training images' up to 4090.91" in warning
    back, warning = scale_for(None, scale_by("auto", sampled(gray * 16)), sampled(gray))
    assert back.window[1] > 65000 and "they are nearly black to the model" in warning
    assert "--gray auto" in warning
    assert scale_for("auto", trained, sampled(gray * 16))[1] is None


def test_images_of_two_bit_depths_in_one_set_are_told():
    gray = np.arange(4096, dtype=np.uint16)
    mixed = sampled(gray, gray * 16, gray, gray)
    scale, warning = scale_for("auto", None, mixed)
    assert scale.window[1] > 60_000
    assert "nearly black by that range: 3 (an array: hardly a pixel above 4090.91)" in warning
    bytes_too = sampled(gray, np.arange(256, dtype=np.int32), gray, gray)
    scale, warning = scale_for("auto", None, bytes_too)
    assert "nearly black by that range: 1 (an array: hardly a pixel above 254.745)" in warning
    assert scale_for("full", None, bytes_too)[1] is None
    assert "nearly black" in scale_for(None, EIGHT_BIT, bytes_too)[1]


def test_a_valid_split_of_another_bit_depth_is_told(grays, tmp_path, call, capsys):
    """By the setup check, training and evaluation."""
    mixed = shutil.copytree(grays["12"], tmp_path / "mixed")
    shutil.rmtree(mixed / "valid")
    shutil.copytree(grays["16"] / "valid", mixed / "valid")
    for dataset, expected in ((mixed, 1), (grays["12"], 0)):
        splits = read_dataset(dataset)
        told = other_ranges(splits, scale_by("auto", look_at_records(splits["train"].images)))
        assert len(told) == expected
    told = "warning: valid: 99.9 % of these images' pixels are up to"
    call(validate_setup.main, "--dataset", mixed)
    said = capsys.readouterr().out
    assert told in said and "they are far too bright to the model. Scale all alike first" in said
    call(train_detector_stage1.main, *quick_flags(mixed), "--output_dir", "one")
    assert told in capsys.readouterr().out
    call(evaluate.main, "--checkpoint", "one", "--device", "cpu")
    assert "--gray auto takes the range of these images" in capsys.readouterr().out


# ---------------------------------------------------------------- predict


def saved_model(folder: Path, gray: GrayScale | None) -> Path:
    torch.manual_seed(0)
    size, table = SIZES["tiny"], assign_rows(["cells"], [1], "dataset")
    detector = Detector(size, table.rows_total, table.background_last, mask_head="nano")
    content = checkpoint.make_content("single", size, 64, table, "nano", detector.state_dict())
    checkpoint.save(folder / "best.pt", content | {"gray": gray and gray.to_dict()})
    return folder / "best.pt"


def assert_same(one, other) -> None:
    np.testing.assert_array_equal(one.boxes, other.boxes)
    np.testing.assert_array_equal(one.scores, other.scores)
    assert one.rles == other.rles


@pytest.mark.parametrize("kind", ["12", "float"])
def test_files_and_arrays_give_equal_detections(grays, tmp_path, kind):
    _, scale = pixels_of(grays[kind], "auto")
    model = RFDETR(saved_model(tmp_path, scale), device="cpu")
    file = sorted((grays[kind] / "valid").glob("*.tif"))[0]
    array = np.array(Image.open(file))
    found = model.predict(file, 0.0)
    for image in (array, array[:, :, None], Image.open(file), torch.from_numpy(array)):
        assert_same(model.predict(image, 0.0), found)
    plain = sorted((grays["8"] / "valid").glob("*.tif"))[0]
    assert np.abs(found.image.astype(int) - read_image(plain)).max() <= 1
    assert not np.array_equal(model.predict(file, 0.0, gray="full").image, found.image)
    with pytest.raises(UserError, match="gray: expected auto, full or a percentage"):
        model.predict(file, gray="bright")


def test_a_model_of_8_bit_images_tells_what_it_does_with_others(grays, tmp_path, capsys):
    model = RFDETR(saved_model(tmp_path, EIGHT_BIT), device="cpu")
    folder = grays["12"] / "valid"
    found = model.predict(folder, 0.0)
    assert "trained on images of 8 bits, these have gray of more" in capsys.readouterr().out
    assert found[0].image.max() == 255
    model.predict(folder, 0.0)
    model.predict(sorted((grays["8"] / "valid").glob("*.tif"))[0])
    assert not capsys.readouterr().out  # said once
    old = RFDETR(saved_model(tmp_path, None), device="cpu")
    assert old.predict(folder)[0].image.max() < 10 and not capsys.readouterr().out


def test_colours_of_16_bits_are_read_by_their_bits_in_files_and_arrays(tmp_path):
    colours = np.random.default_rng(0).integers(0, 65536, (16, 16, 3), np.uint16)
    cv2.imwrite(str(tmp_path / "rgb.png"), colours[:, :, ::-1])
    window = (120.0, 3900.0)
    from_file = read_image(tmp_path / "rgb.png", window=window)
    tensor = torch.from_numpy(colours).permute(2, 0, 1)
    for image in (colours, tensor):
        from_array = read_image(image, window=window)
        assert np.abs(from_array.astype(int) - from_file).max() <= 1
        assert deep_pixels_of(image, True) is None
    assert deep_pixels_of(tensor[:1], True).shape == (16, 16, 1)


@pytest.mark.parametrize("kind", ["png", "tif", "array", "dataset"])
def test_dark_colours_of_16_bits_are_told_once(kind, few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "DARK_TOLD", [])
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint16)
    file = tmp_path / f"rgb.{kind}"
    if kind == "array":
        file = colours
    elif kind == "dataset":
        file = shutil.copytree(few, tmp_path / "few")
        for image in file.rglob("*.png"):
            cv2.imwrite(str(image), cv2.imread(str(image)).astype(np.uint16))
    else:
        cv2.imwrite(str(file), colours)
    for _ in range(2):
        if kind == "dataset":
            look_at_records(read_dataset(file)["train"].images)
        else:
            read_image(file)
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "read as 0..65535, and no value here is above 2" in said
    assert "astype('uint8')" in said


def test_bright_colours_of_16_bits_and_dark_ones_of_8_are_not_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "DARK_TOLD", [])
    colours = np.random.default_rng(0).integers(0, 65536, (16, 16, 3), np.uint16)
    cv2.imwrite(str(tmp_path / "bright.png"), colours)
    cv2.imwrite(str(tmp_path / "dark.png"), np.ones((16, 16, 3), np.uint8))
    for image in (colours, tmp_path / "bright.png", tmp_path / "dark.png"):
        read_image(image)
    assert not capsys.readouterr().out


def test_gray_arrays_that_the_window_leaves_nothing_of_are_told(capsys):
    shares = np.random.default_rng(0).random((8, 8), np.float32)
    for window in ((120.0, 3900.0), (0.0, 3900.0)):
        for image in (shares, torch.from_numpy(shares)[None]):
            with pytest.raises(UserError, match="from 0.0.* to 0.9.*gray='full' for 0..1"):
                read_image(image, window=window)
    assert np.ptp(read_image(shares)) > 200
    assert read_image(shares, window=(0.2, 0.8)).max() == 255
    assert not read_image(np.zeros((8, 8), np.float32), window=window).any()  # a dark frame
    assert not capsys.readouterr().out
    bright = np.full((8, 8), 5000, np.uint16)
    bright[0] = 6000
    assert (read_image(bright, window=window) == 255).all()
    assert "from 5000 to 6000, and 0 is black and 3900 white" in capsys.readouterr().out


@pytest.fixture
def stack(tmp_path) -> Path:
    """A TIFF of three pages of 12 bits."""
    rng = np.random.default_rng(0)
    pages = [Image.fromarray(rng.integers(0, 4096, (40, 50), np.uint16)) for _ in range(3)]
    path = tmp_path / "stacks/stack.tif"
    path.parent.mkdir()
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def test_each_page_is_an_image(stack, tmp_path, call, capsys):
    weights = saved_model(tmp_path, GrayScale("auto", (0.0, 4095.0), 1, 0))
    model = RFDETR(weights, device="cpu")
    pages = model.predict(stack, 0.0, pages=True, batch=1)
    assert [page.page for page in pages] == [1, 2, 3] and pages[0].path == stack
    with Image.open(stack) as image:
        for number, page in enumerate(pages):
            image.seek(number)
            assert_same(page, model.predict(np.asarray(image), 0.0))
            assert (page.image == read_image(np.asarray(image), window=(0.0, 4095.0))).all()
    assert_same(model.predict(stack, 0.0), pages[0])
    assert "the first of each is read, pages=True sees them all" in capsys.readouterr().out

    (stack.parent / "broken.tif").write_bytes(b"II*\0")
    words = ["--checkpoint", weights, "--input", stack.parent, "--threshold", 0]
    call(predict.main, *words, "--pages", 1, "--output", "found")
    records = json.loads((tmp_path / "found/predictions.json").read_text())
    counts = [sum(record["page"] == number for record in records) for number in (1, 2, 3)]
    assert counts == [len(page) for page in pages]
    pictures = sorted(file.name for file in (tmp_path / "found").glob("*.png"))
    assert pictures == [f"stack_page{number}.png" for number in (1, 2, 3)]
    said = capsys.readouterr().out
    assert "broken.tif" in said and "on 3 pages in 1 of 2 files: " in said
    assert "several pages" not in said
    call(predict.main, *words, "--output", "first")
    records = json.loads((tmp_path / "first/predictions.json").read_text())
    assert "page" not in records[0] and len(records) == counts[0]
    assert "--pages 1 sees them all" in capsys.readouterr().out


def tiff_of(channels: int, rgb: bool) -> bytes:
    """An uncompressed TIFF of 2 x 2 pixels of 8 bits."""
    entries = [(256, 3, 1, 2), (257, 3, 1, 2), (259, 3, 1, 1), (262, 3, 1, 2 if rgb else 1)]
    entries += [(277, 3, 1, channels), (278, 3, 1, 2), (279, 4, 1, 4 * channels)]
    after = 8 + 2 + 12 * (len(entries) + 2) + 4
    entries += [(258, 3, channels, after), (273, 4, 1, after + 2 * channels)]
    parts = [b"II*\0", (8).to_bytes(4, "little"), len(entries).to_bytes(2, "little")]
    for tag, kind, count, value in sorted(entries):
        parts.append(tag.to_bytes(2, "little") + kind.to_bytes(2, "little"))
        parts.append(count.to_bytes(4, "little") + value.to_bytes(4, "little"))
    parts += [bytes(4), (8).to_bytes(2, "little") * channels, bytes(4 * channels)]
    return b"".join(parts)


@pytest.mark.parametrize("rgb", [True, False])
def test_more_than_four_channels_are_refused(tmp_path, rgb):
    (tmp_path / "many.tif").write_bytes(tiff_of(5, rgb))
    with pytest.raises(UserError, match="has 5 channels.* Choose the one or three"):
        read_pixels(tmp_path / "many.tif", True)
    Image.new("RGBA", (2, 2), (9, 8, 7, 255)).save(tmp_path / "rgba.tif")
    assert (read_pixels(tmp_path / "rgba.tif", True) == [9, 8, 7]).all()


# ---------------------------------------------------------------- the scripts


@pytest.mark.slow
def test_the_range_goes_with_the_checkpoint(grays, call, tmp_path, capsys):
    data = grays["12"]
    call(validate_setup.main, "--dataset", data, "--size", "tiny", "--json", "check.json")
    assert "12 of 12 images" in capsys.readouterr().out
    flags = [*quick_flags(data), "--head", "dataset"]
    call(train_detector_stage1.main, *flags, "--output_dir", "one")
    assert "Gray of more than 8 bits in 12 of 12" in capsys.readouterr().out
    scale = checkpoint.gray_of(checkpoint.load(tmp_path / "one/best.pt"))
    assert scale.by == "auto" and scale.window == pytest.approx((4095 * 0.05, 4095 * 0.45), abs=3)
    assert json.loads((tmp_path / "check.json").read_text())["gray"]["window"] == [*scale.window]
    call(train_detector_stage1.main, "--resume", "one", "--epochs", 2)
    words = ["--checkpoint", "one", "--output_dir", "two", "--fast_dev_run", 1]
    capsys.readouterr()
    call(train_seg_stage2.main, *quick_flags(grays["16"]), *words, "--gray", 99)
    assert (
        "--gray 99.0: the frozen detector's images were read otherwise" in capsys.readouterr().out
    )
    call(train_seg_stage2.main, *quick_flags(data), *words[:3], "three", *words[4:])
    assert "As in training: Gray of more than 8 bits in 12 of 12" in capsys.readouterr().out
    assert checkpoint.gray_of(checkpoint.load(tmp_path / "three/best.pt")) == scale

    call(evaluate.main, "--checkpoint", "one", "--dataset", data, "--results", "deep")
    capsys.readouterr()
    call(evaluate.main, "--checkpoint", "one", "--dataset", grays["8"], "--results", "plain")
    assert "these images have 8 bits" in capsys.readouterr().out
    scores = {}
    for kind in ("deep", "plain"):
        found = json.loads((tmp_path / kind / "bbox.json").read_text())
        scores[kind] = np.sort([one["score"] for one in found])
    assert np.abs(scores["deep"] - scores["plain"]).max() < 0.01
    words = ["--checkpoint", "one", "--threshold", 0, "--output", "found"]
    call(predict.main, *words, "--input", data / "valid", "--gray", "full", "--pictures", 0)
    call(predict.main, *words, "--input", data / "valid")
    picture = sorted((tmp_path / "found").glob("*.png"))[0]
    assert np.asarray(Image.open(picture)).std() > 30
