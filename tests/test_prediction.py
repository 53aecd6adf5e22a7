"""What the Python door takes as images, and what a Prediction gives.

The model is a small one with random weights: what it finds does not matter here.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

import rfdetr
from rfdetr.arguments import as_arguments
from rfdetr.classes import assign_rows
from rfdetr.console import UserError
from rfdetr.data.demo import CLASS_NAMES
from rfdetr.data.records import ImageList
from rfdetr.detr import RFDETR, RFDETRNano
from rfdetr.inference import detections
from rfdetr.inference.detections import DetectionRunner
from rfdetr.inference.inputs import collect
from rfdetr.inference.originals import Original, read_image
from rfdetr.inference.prediction import Prediction
from rfdetr.models.detector import Detector
from rfdetr.sizes import SIZES
from rfdetr.tool_settings import PredictionSettings
from rfdetr.training.next_commands import where_all_lie
from rfdetr.weights import checkpoint

HEIGHT, WIDTH = 40, 50


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> RFDETR:
    torch.manual_seed(0)
    size, table = SIZES["tiny"], assign_rows(list(CLASS_NAMES), [10, 20, 30], "dataset")
    detector = Detector(size, table.rows_total, table.background_last, mask_head="nano")
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    state = detector.state_dict()
    checkpoint.save(path, checkpoint.make_content("single", size, 32, table, "nano", state))
    return RFDETR.from_checkpoint(path, device="cpu")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def photo(tmp_path, pixels):
    path = tmp_path / "photos/photo.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    return path


def some_prediction() -> Prediction:
    """Three objects in an image of 40 x 50 pixels: two cells and a vessel, with masks."""
    masks = np.zeros((3, HEIGHT, WIDTH), np.uint8)
    masks[0, 5:15, 5:25] = 1
    masks[0, 8:10, 8:10] = 0  # a hole
    masks[1, 20:38, 30] = 1  # a line
    masks[2, 0:3, 0:3] = 1
    masks[2, 30:40, 40:50] = 1  # two parts
    rles = [mask_api.encode(np.asfortranarray(mask)) for mask in masks]
    return Prediction(
        original=Original(HEIGHT, WIDTH, np.zeros((HEIGHT, WIDTH, 3), np.uint8)),
        table=assign_rows(["cells", "vessel"], [7, 9], "dataset"),
        boxes=np.array([[5, 5, 25, 15], [30, 20, 31, 38], [0, 0, 50, 40]], np.float32),
        scores=np.array([0.9, 0.6, 0.4], np.float32),
        labels=np.array([0, 1, 0]),
        rles=rles,
    )


# ---------------------------------------------------------------- what is an image


def test_all_kinds_of_one_image_are_read_alike(pixels, photo):
    rgba = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    kinds = [photo, str(photo), Image.fromarray(pixels), Image.fromarray(rgba), pixels, rgba]
    kinds += [pixels / 255, (pixels / 255).astype(np.float32), pixels.astype(np.uint16) * 257]
    kinds += [chw, chw / 255, (chw / 255).double(), pixels[:, ::-1][:, ::-1]]
    for kind in kinds:
        read = read_image(kind)
        assert read.dtype == np.uint8 and (read == pixels).all()
        assert not np.shares_memory(read, pixels)  # who draws on his array changes no picture


def test_gray_is_read_as_files_are(tmp_path):
    gray = np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
    Image.fromarray(gray).save(tmp_path / "16.png")
    expected = read_image(tmp_path / "16.png")
    assert expected.std() > 60
    for kind in (gray, gray[:, :, None], np.dstack([gray] * 3), gray.astype(">u2")):
        assert (read_image(kind) == expected).all()
    bytes_ = expected[:, :, 0]
    tensor = torch.from_numpy(bytes_)
    for kind in (bytes_, bytes_ / 255, bytes_[..., None], tensor, tensor[None]):
        assert (read_image(kind) == expected).all()
    is_light = Image.fromarray(bytes_ > 127)
    assert (read_image(is_light) == 255 * (expected > 127)).all()
    assert abs(read_image((tensor / 255).bfloat16()).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((3, 8, 9), np.uint8), r"\(3, 8, 9\).*transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 2), np.uint8), r"RGB \(H, W, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), r"this one is \(0, 8, 3\)"),
        (np.zeros(8), "must be gray"),
        (np.full((8, 8), 200.0), "0..1.*200.*divide it by 255"),
        (np.full((8, 8), -1.0), "before it is normalised"),
        (np.full((8, 8), np.nan), "NaN or infinite pixels"),
        (np.zeros((8, 8), int), r"int64.*astype\('uint8'\)"),
        (np.ones((8, 8), bool), "this one is bool, as masks are. Give the image itself"),
        (torch.ones(3, 8, 8, dtype=torch.bool), "this one is bool, as masks are"),
        (torch.zeros(8, 9, 3), r"permute\(2, 0, 1\)"),
        ("https://example.org/a.jpg", "is a URL: download it first"),
        ("nowhere.jpg", "cannot be read as an image: there is no such file"),
        (None, "a NoneType"),
        (1, "this one is an int"),
        ("", "an empty text"),
        (b"bytes", r"a bytes\. .*Image\.open\(io\.BytesIO"),
        (io.BytesIO(b"lines\nof\na file"), r"a file object \(BytesIO\)\. .*Image\.open\(file"),
    ],
)
def test_what_is_no_image_is_refused_by_name(model, image, message):
    with pytest.raises(UserError, match=message):
        model.predict(image)
    with pytest.raises(UserError, match=r"images\[1\]: .*" + message):
        model.predict([Image.new("RGB", (8, 8)), image])


def test_an_open_file_is_not_taken_for_a_list_of_its_lines(model, photo):
    with (
        open(photo, "rb") as file,
        pytest.raises(UserError, match=r"this one is a file object.*Give its path"),
    ):
        model.predict(file)


def test_errors_of_the_python_door_name_arguments():
    with pytest.raises(UserError, match=r"^device='gpu': .* Did you mean cuda\?"):
        RFDETRNano(device="gpu")
    with pytest.raises(UserError, match=r"^device='cuda:x': there is no such device\. There are"):
        RFDETRNano(device="cuda:x")
    with pytest.raises(UserError, match=r"^device='meta' is not usable.* try device=\"cpu\"$"):
        RFDETRNano(device="meta")
    with pytest.raises(UserError, match="^device='cpu:1' is not usable"):
        RFDETRNano(device="cpu:1")


def test_a_model_is_told_in_a_line(model):
    said = repr(model)
    assert said == f"RFDETR(tiny, 3 classes, 32 px, cpu, masks, {model.path})"


def test_a_video_and_further_pages_are_told(model, tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"....ftyp")
    with pytest.raises(UserError, match=r"a\.mp4 is a video.* predict\.py .*--input .*a\.mp4$"):
        model.predict(str(tmp_path / "a.mp4"))
    pages = [Image.new("L", (40, 30), gray) for gray in (0, 99)]
    stack = tmp_path / "stack.tif"
    pages[0].save(stack, save_all=True, append_images=pages[1:])
    model.predict(stack)
    line = f"1 image has several pages or frames ({stack}: 2): the first of each is read, "
    assert f"{line}pages=True sees them all" in capsys.readouterr().out
    model.predict(stack, pages=True)
    assert "pages" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tile": "auto"}, r'^tile="auto": .* such as tile=640$'),
        ({"tile": -1}, "^tile must be 0, auto, or 32 pixels or more, got -1$"),
        ({"tile": 64, "tile_full": "no"}, "^tile_full must be True or False, got 'no'$"),
        ({"pages": "yes"}, "^pages must be True or False, got 'yes'$"),
    ],
)
def test_messages_to_python_name_arguments(model, pixels, arguments, message, capsys):
    with pytest.raises(UserError, match=message):
        model.predict(pixels, **arguments)
    assert as_arguments("--letterbox 1: leave the flag out") == "letterbox=True: leave it out"
    assert as_arguments("--gray full: by its bits") == 'gray="full": by its bits'


def test_idle_arguments_are_told_once(model, pixels, capsys):
    for _ in range(2):
        model.predict(pixels, tile_overlap=0.3, tile_full=True)
    said = capsys.readouterr().out
    assert said.count("tile_overlap changes nothing without tiles, which tile asks for") == 1
    assert said.count("tile_full=True changes nothing without tiles") == 1


def test_where_memory_runs_out_arguments_are_advised(model, pixels, monkeypatch):
    monkeypatch.setattr(detections, "unless_out_of_memory", lambda *_: None)
    advice = 'use device="cpu", or a model of a smaller resolution'
    with pytest.raises(UserError, match=f"^out of memory with a single image: {advice}$"):
        model.predict(pixels)


@pytest.mark.parametrize("checkpoint", ["", Path(""), 3, b"best.pt", []])
def test_an_empty_checkpoint_is_no_download(checkpoint, model):
    with pytest.raises(UserError):
        RFDETRNano(checkpoint=checkpoint)
    again = RFDETR.from_checkpoint(model.path, device=torch.device("cpu"))
    assert repr(again) == repr(model)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"amp": "bf61"}, r"amp: invalid choice: 'bf61' \(did you mean bf16\?"),
        ({"resolution": "64"}, "resolution must be a whole number of 1 or more, got '64'"),
        ({"resolution": 65}, "^resolution=65 does not fit tiny: .* the nearest are"),
        ({"amp": "fp16"}, '^amp="fp16" needs a GPU .*: use amp="auto", bf16 or off$'),
    ],
)
def test_a_models_arguments_are_checked(arguments, message, tmp_path, model):
    file = tmp_path / "model.pt"
    size = SIZES["tiny"]
    state = model.model.state_dict()
    content = checkpoint.make_content("single", size, 32, model.table, "nano", state)
    checkpoint.save(file, content)
    with pytest.raises(UserError, match=message):
        RFDETR.from_checkpoint(file, "cpu", **arguments)


def test_completion_finds_the_sizes():
    assert {"RFDETR", "RFDETRNano", "RFDETRSegLarge"} <= set(dir(rfdetr))


def test_several_images_are_a_list_a_folder_or_a_batch(model, pixels, photo, monkeypatch):
    given = []
    detect = DetectionRunner._detect
    monkeypatch.setattr(
        DetectionRunner,
        "_detect",
        lambda self, net, images, *rest: (
            given.append(len(images)) or detect(self, net, images, *rest)
        ),
    )
    (photo.parent / "notes.txt").write_text("no image")
    batch = np.stack([pixels] * 3)
    tensors = torch.from_numpy(batch).permute(0, 3, 1, 2)
    one = model.predict(photo, 0.0)
    assert isinstance(one, Prediction) and len(one) > 0
    for several, count in (
        ([photo], 1),
        (photo.parent, 1),
        (str(photo.parent), 1),
        (batch, 3),
        (tensors, 3),
        (photo.parent.glob("*.png"), 1),
        ([photo, tensors / 255, pixels, (photo.parent, Image.fromarray(pixels))], 7),
    ):
        given.clear()
        predictions = model.predict(several, 0.0, batch=3)
        assert given == [3] * (count // 3) + [count % 3] * (count % 3 > 0)
        assert len(predictions) == count
        for prediction in predictions:
            np.testing.assert_allclose(prediction.scores, one.scores, atol=1e-5)
    assert model.predict([]) == []
    photo.unlink()
    with pytest.raises(UserError, match="no images there"):
        model.predict(photo.parent)


def test_folders_and_patterns_are_what_predict_takes_them_for(model, photo, capsys):
    """Hidden files are none of them, and what cannot be read is left out, said and counted."""
    folder = photo.parent
    for name in ("._photo.png", ".DS_Store", ".hidden.png"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    for several in (folder, folder / "*.png", f"{folder}/../**/*.png"):
        assert [found.path.name for found in model.predict(several)] == ["photo.png"]
    assert capsys.readouterr().out == ""
    (folder / "bad.png").write_bytes(b"no image")
    for several in (folder, folder / "*.png", [folder]):
        assert [found.path for found in model.predict(several)] == [photo]
        said = capsys.readouterr().out
        assert "bad.png" in said and "1 of 2 inputs could not be read" in said
    with pytest.raises(UserError, match=r"images\[0\]: .*bad.png"):
        model.predict([folder / "bad.png", folder])
    with pytest.raises(UserError, match="the file could not be read: see the warnings"):
        model.predict(folder / "b*.png")


def test_what_is_missing_is_told_with_what_may_be_meant(model, photo):
    with pytest.raises(UserError, match=r"Did you mean .*photo\.png\?"):
        model.predict(photo.with_name("phot.png"))
    with pytest.raises(UserError, match=r"there is no folder .*Did you mean .*photos\?"):
        model.predict(photo.parents[1] / "phots/photo.png")
    with pytest.raises(UserError, match=r"no images there \(.bmp"):
        model.predict(photo.parent / "*.jpg")
    with pytest.raises(UserError, match=r"but in folders below: .*\*.png"):
        model.predict(photo.parents[1])


def test_images_in_folders_below_are_told_and_named_by_the_next_command(tmp_path, capsys):
    for name in ("a.png", "in/b.png", "in/deep/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [path.name for path in collect([str(tmp_path)])] == ["a.png"]
    pattern = tmp_path / "**" / "*"
    told = f"{tmp_path}: images in folders below it are left out. All of them: --input {pattern}"
    assert told in capsys.readouterr().out.replace("'", "")
    paths = sorted(tmp_path.rglob("*.png"))
    images = ImageList(SimpleNamespace(path=path) for path in paths)
    assert where_all_lie(images) == pattern and where_all_lie(ImageList(images[:1])) == tmp_path
    assert collect([str(pattern)]) == paths
    collect([str(tmp_path), str(tmp_path / "in"), str(tmp_path / "in/deep")])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["threshold", "nms"])
@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan, None, "0.5", True, 50])
def test_shares_lie_in_0_to_1(model, pixels, name, value):
    with pytest.raises(UserError, match=rf"{name} must be a number in 0\.\.1, got"):
        model.predict(pixels, **{name: value})


@pytest.mark.parametrize("value", [0, -1, 2.5, None, "8", True])
def test_a_batch_is_a_count(model, pixels, value):
    with pytest.raises(UserError, match="batch must be a whole number"):
        model.predict(pixels, batch=value)


def test_duplicates_are_left_out_unless_nms_is_0(model, pixels):
    everything = model.predict(pixels, 0.0, nms=0)
    default = model.predict(pixels, 0.0)
    assert len(everything) == SIZES["tiny"].select > len(default) > 0
    assert len(default) == len(model.predict(pixels, 0.0, nms=PredictionSettings.nms))
    unique = everything.without_duplicates()
    np.testing.assert_array_equal(default.boxes, unique.boxes)
    assert default.rles == unique.rles and (np.diff(default.scores) <= 0).all()
    with pytest.raises(UserError, match=r"iou must be a number in 0\.\.1, got 7"):
        everything.without_duplicates(7)


# ---------------------------------------------------------------- a Prediction


def test_a_prediction_is_a_list_of_objects():
    prediction = some_prediction()
    assert len(prediction) == 3 and [one.name for one in prediction] == prediction.names
    first, last = prediction[0], prediction[-1]
    assert (first.name, last.name, first.label) == ("cells", "cells", 0)
    assert first.score == pytest.approx(0.9) and (last.box == prediction.boxes[2]).all()
    assert (prediction[1].mask == prediction.masks[1]).all()
    assert repr(first) == "DetectedObject(cells 0.90, box 5, 5, 25, 15)"
    with pytest.raises(IndexError):
        prediction[3]


def test_parts_of_a_prediction_are_predictions():
    prediction = some_prediction()
    for chosen, count in (
        (slice(1, None), 2),
        (prediction.scores > 0.5, 2),
        ([name == "vessel" for name in prediction.names], 1),
        (np.array([2, 0]), 2),
        ([0], 1),
        ([], 0),
    ):
        part = prediction[chosen]
        assert len(part) == len(part.boxes) == len(part.names) == count
        assert part.masks.shape == (count, HEIGHT, WIDTH) and part.masks.dtype == bool
    assert prediction[np.array([2, 0])].scores.tolist() == prediction.scores[[2, 0]].tolist()
    with pytest.raises(TypeError, match="compare each"):
        prediction[prediction.names == "cells"]
    for wrong in ("cells", 0.5, None, ["cells"], [0.5]):
        with pytest.raises(TypeError, match="is a number, a slice, or a list of numbers or"):
            prediction[wrong]
    assert prediction[torch.tensor(1)].name == "vessel"
    with pytest.raises(IndexError):
        prediction[[True, False]]


def test_a_prediction_is_told_in_a_line():
    prediction = some_prediction()
    assert repr(prediction) == "Prediction(3 objects: 2 cells, 1 vessel, 50x40, masks)"
    prediction.rles = None
    assert repr(prediction[1:2]) == "Prediction(1 object: 1 vessel, 50x40)"
    assert repr(prediction[[]]) == "Prediction(0 objects, 50x40)"
    prediction.table = assign_rows([f"class {i}" for i in range(9)], list(range(9)), "dataset")
    many = prediction[[0] * 9]
    many.labels = np.arange(9)
    assert repr(many).endswith("1 class 4, 4 more classes, 50x40)")


def test_polygons_draw_the_masks_again_without_holes():
    prediction = some_prediction()
    polygons = prediction.polygons()
    assert [len(parts) for parts in polygons] == [1, 1, 2]
    masks = prediction.masks
    masks[0, 8:10, 8:10] = True
    for parts, mask in zip(polygons, masks):
        rles = mask_api.frPyObjects([part.ravel().tolist() for part in parts], HEIGHT, WIDTH)
        assert (mask_api.decode(mask_api.merge(rles)) == mask).all()
    prediction.rles = None
    assert prediction.masks is None and prediction[0].mask is None
    with pytest.raises(UserError, match="no mask head"):
        prediction.polygons()


def test_coco_results_have_the_datasets_ids():
    prediction = some_prediction()
    results = prediction.to_coco(image_id=42)
    assert [result["category_id"] for result in results] == [7, 9, 7]
    assert {result["image_id"] for result in results} == {42}
    assert results[0]["bbox"] == [5, 5, 20, 10] and results[0]["score"] == pytest.approx(0.9)
    assert results[1]["segmentation"] == prediction.rles[1]
    prediction.rles = None
    assert "segmentation" not in prediction.to_coco(1)[0]


def test_supervision_gets_real_detections(model, pixels):
    supervision = pytest.importorskip("supervision")
    prediction = some_prediction()
    detections = prediction.to_supervision()
    assert isinstance(detections, supervision.Detections) and len(detections) == 3
    assert list(detections.data["class_name"]) == prediction.names
    assert (detections.mask == prediction.masks).all()
    assert (detections.class_id == prediction.labels).all()
    picture = supervision.MaskAnnotator().annotate(prediction.image.copy(), detections)
    assert picture.any()
    assert len(detections[detections.confidence > 0.5]) == 2
    assert len(prediction[[]].to_supervision()) == 0
    prediction.rles = None
    assert prediction.to_supervision().mask is None
    assert len(model.predict(pixels, 0.0).to_supervision()) > 0


def test_without_supervision_the_command_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        some_prediction().to_supervision()


def test_a_picture_needs_no_arguments(model, pixels, photo):
    """Of an array, which is remembered, and of a file, which is read again."""
    of_array = model.predict(pixels, 0.0)
    of_file = model.predict(photo, 0.0)
    assert of_file.path == photo and of_array.path is None
    assert of_file.original.pixels is None
    assert of_array.picture().size == of_file.picture().size == (WIDTH, HEIGHT)
    assert (np.asarray(of_array.picture()) == np.asarray(of_file.picture())).all()
    assert (np.asarray(of_array.picture()) != pixels).any()
    Image.new("RGB", (20, 20)).save(photo)
    with pytest.raises(UserError, match="was 50x40 pixels when it was predicted"):
        of_file.picture()
    photo.unlink()
    with pytest.raises(UserError, match="no such file"):
        of_file.picture()


def test_a_picture_is_saved_wherever_its_name_says(tmp_path):
    prediction = some_prediction()
    file = tmp_path / "new/folder/found.png"
    prediction.save_picture(file)
    assert Image.open(file).size == (WIDTH, HEIGHT)
    for name in ("found", "found.xyz"):
        with pytest.raises(UserError, match="no kind of picture: call it .*found.png"):
            prediction.save_picture(tmp_path / name)


def test_what_is_no_tracker_is_refused():
    with pytest.raises(UserError, match=r"Tracker\(threshold=0.5\).*got None"):
        some_prediction().tracked(None)
