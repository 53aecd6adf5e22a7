"""predict.py on damaged videos, links, pipes and models that give NaN.

The model is a small one with random weights: what it finds does not matter here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import predict
import validate_setup
from rfdetr.classes import assign_rows
from rfdetr.console import UserError, run_script
from rfdetr.data.demo import CLASS_NAMES
from rfdetr.detr import RFDETR
from rfdetr.inference import videos
from rfdetr.models.detector import Detector
from rfdetr.sizes import SIZES
from rfdetr.weights import checkpoint

FRAMES = 40


def make_checkpoint(path: Path, resolution: int = 32) -> Path:
    torch.manual_seed(0)
    size, table = SIZES["tiny"], assign_rows(list(CLASS_NAMES), [1, 2, 3], "dataset")
    model = Detector(size, table.rows_total, table.background_last)
    checkpoint.save(
        path, checkpoint.make_content("detector", size, resolution, table, None, model.state_dict())
    )
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("weights") / "best.pt")


@pytest.fixture
def find(call, weights, capsys):
    """find(*flags) -> (exit status, stdout, stderr) of predict.py; the output folder is ./found."""

    def run(*words: object) -> tuple[int, str, str]:
        status = 0
        flags = [
            "--checkpoint",
            weights,
            "--output",
            "found",
            "--device",
            "cpu",
            "--threshold",
            0,
            *words,
        ]
        try:
            call(lambda argv: run_script(predict.main, argv), *flags)
        except SystemExit as left:
            status = left.code
        said = capsys.readouterr()
        assert "Traceback" not in said.err and "defect" not in said.err
        return status, said.out, said.err

    return run


def photo(path: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def video(path: Path, codec: str) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 10.0, (64, 48))
    if not writer.isOpened():
        pytest.skip(f"this OpenCV writes no {codec}")
    chance = np.random.default_rng(0)
    for _ in range(FRAMES):
        writer.write(chance.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    writer.release()
    return path


def records(folder: str = "found") -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads((Path(folder) / "predictions.json").read_text(), parse_constant=refuse)


def test_a_model_without_a_mask_head_is_said_to_give_boxes_alone(find, tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png", seed=1)
    status, out, _ = find("--input", "a.png", "b.png")
    assert status == 0 and out.count("boxes alone: this model has no mask head") == 1


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize("name, codec", [("clip.avi", "MJPG"), ("clip.mp4", "mp4v")])
def test_whole_videos_raise_no_alarm(name, codec, find, tmp_path):
    video(tmp_path / name, codec)
    status, out, err = find("--input", name)
    assert status == 0 and "damaged" not in out + err
    assert {record["frame"] for record in records()} == set(range(FRAMES))


@pytest.mark.parametrize(
    "name, codec, where", [("clip.avi", "MJPG", "end"), ("clip.mp4", "mp4v", "middle")]
)
def test_a_video_that_is_cut_short_is_said_and_ends_with_status_1(
    name, codec, where, find, tmp_path
):
    path = video(tmp_path / name, codec)
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    path.write_bytes(
        data[:half] if where == "end" else data[:half] + bytes(half // 2) + data[half + half // 2 :]
    )
    photo(tmp_path / "sound.png")
    status, out, err = find("--input", name, "sound.png")
    frames = {record["frame"] for record in records() if record["file"] == name}
    decoded = len(frames)
    assert 0 < decoded < 0.95 * FRAMES and frames == set(range(decoded))
    assert status == 1
    assert f"{name} is damaged: {decoded} of the {FRAMES} frames" in out and name in err
    assert len(err.strip().split("\n\n")) == 1
    made = cv2.VideoCapture("found/clip.mp4")
    assert made.get(cv2.CAP_PROP_FRAME_COUNT) == decoded and Path("found/sound.png").exists()
    assert sorted(path.name for path in Path("found").iterdir()) == [
        "clip.mp4",
        "predictions.json",
        "sound.png",
    ]


def test_a_few_missing_frames_are_a_warning_alone(find, tmp_path, monkeypatch):
    video(tmp_path / "clip.avi", "MJPG")
    real = videos.read_video
    monkeypatch.setattr(videos, "read_video", lambda capture: list(real(capture))[:39].__iter__())
    status, out, _ = find("--input", "clip.avi")
    assert status == 0 and "39 of the 40 frames" in out


# ---------------------------------------------------------------- what cannot be read


def test_a_file_asked_for_by_name_that_cannot_be_read_is_counted_and_ends_with_status_1(
    find, tmp_path
):
    photo(tmp_path / "a.png")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "fake.mp4").write_text("no video")
    status, out, err = find("--input", "text.jpg", "a.png", "fake.mp4")
    assert status == 1 and " in 1 of 3 files: found " in out
    assert err == "2 of 3 inputs could not be read: see the warnings above\n"
    assert {record["file"] for record in records()} == {"a.png"}


def test_one_of_a_folder_that_cannot_be_read_is_counted_alone(find, tmp_path):
    (tmp_path / "photos").mkdir()
    photo(tmp_path / "photos/a.png")
    (tmp_path / "photos/text.jpg").write_text("no image")
    status, out, _ = find("--input", "photos")
    assert status == 0
    assert out.endswith("warning: 1 of 2 inputs could not be read: see the warnings above\n")


def test_an_empty_input_is_not_the_folder_one_is_in(find, tmp_path):
    photo(tmp_path / "a.png")
    status, _, err = find("--input", "")
    assert status == 2 and "--input is an empty text" in err


def test_hidden_files_of_a_folder_are_no_inputs(find, tmp_path):
    (tmp_path / "photos").mkdir()
    photo(tmp_path / "photos/a.png")
    for name in ("._a.png", ".DS_Store"):
        (tmp_path / "photos" / name).write_bytes(b"\0\5\x16\7")
    status, out, _ = find("--input", "photos")
    assert status == 0 and "in 1 file:" in out and "warning" not in out


def test_an_interrupted_run_says_what_it_leaves(find, tmp_path, monkeypatch):
    predict_one = predict.Predictor.predict
    seen = []

    def interrupted(self, images):
        if seen:
            raise KeyboardInterrupt
        seen.append(images)
        return predict_one(self, images)

    monkeypatch.setattr(predict.Predictor, "predict", interrupted)
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    status, _, err = find("--input", "a.png", "b.png", "--batch", 1)
    assert status == 130 and Path("found/a.png").exists()
    assert "interrupted: 1 picture in found, predictions.json is not written" in err
    status, _, err = find("--input", "a.png")
    assert status == 130 and "interrupted: nothing is written" in err
    monkeypatch.setattr(predict.Predictor, "predict", predict_one)
    monkeypatch.setattr(predict, "tell", lambda *_: interrupted(None, None))
    status, _, err = find("--input", "a.png")
    assert status == 130 and err == "interrupted: all is written to found\n"
    seen.clear()
    monkeypatch.setattr(predict.Predictor, "predict", interrupted)
    err = find("--input", "a.png", "b.png", "--batch", 1)[2]
    assert "interrupted: 1 picture in found, predictions.json is from before" in err


def test_no_object_at_all_leads_to_a_lower_threshold(find, tmp_path, weights):
    path = photo(tmp_path / "a.png")
    best = RFDETR.from_checkpoint(weights, "cpu").predict(path, 0.0).scores[0]
    status, out, _ = find("--input", path, "--threshold", 0.999)
    assert status == 0
    assert f"no score reaches --threshold 0.999, the best is {best:.2g}" in out
    advised = re.search("(--threshold) ([0-9.]+) shows more", out).groups()
    status, out, _ = find("--input", path, *advised)
    assert status == 0 and "shows more" not in out and not out.startswith("✓ 0 objects")


# ---------------------------------------------------------------- where --output may be


@pytest.mark.parametrize(
    "given, output",
    [
        ("photos", "photos"),
        ("photos", "photos/../photos"),
        ("photos/*.png", "photos"),
        ("**/*.png", "photos/found"),
        ("photos/a*", "photos"),
        ("**", "found"),
    ],
)
def test_no_picture_is_written_where_the_input_would_find_it(given, output, find, tmp_path):
    (tmp_path / "photos").mkdir()
    photo(tmp_path / "photos/a.png")
    status, _, err = find("--input", given, "--output", output)
    assert status == 2 and f"--output {Path(output)} lies where --input {given} looks" in err
    assert "--output found" in err
    assert [path.name for path in tmp_path.rglob("*.*")] == ["a.png"]


@pytest.mark.parametrize(
    "words",
    [
        ("--input", "photos", "--output", "photos/found"),
        ("--input", "photos/*.jpg", "--output", "photos"),
        ("--input", "photos", "--output", "photos", "--pictures", "0"),
        ("--input", "photos/a.jpg", "--output", "photos"),
    ],
)
def test_an_output_near_the_input_is_fine(words, find, tmp_path):
    (tmp_path / "photos").mkdir()
    photo(tmp_path / "photos/a.jpg")
    assert find(*words)[0] == 0


def test_no_prediction_is_written_among_a_datasets_images(find, few):
    image = next((few / "train").glob("*.png"))
    before = sorted(few.rglob("*"))
    status, _, err = find("--input", image, "--output", few / "train")
    assert status == 2 and "lies in a dataset's folder" in err
    assert sorted(few.rglob("*")) == before


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind, suffix", [("png", ".png"), ("jpg", ".jpg"), ("0", None)])
def test_pictures_of_the_original_size_are_png_jpg_or_none(kind, suffix, find, tmp_path):
    photo(tmp_path / "a.png")
    video(tmp_path / "clip.mp4", "mp4v")
    status, out, _ = find("--input", "a.png", "clip.mp4", "--pictures", kind)
    assert status == 0
    of_image, of_video = (suffix and f"a{suffix}", "clip.mp4" if suffix else None)
    pictures = {(record["file"], record["picture"]) for record in records()}
    assert pictures == {("a.png", of_image), ("clip.mp4", of_video)}
    files = {path.name for path in Path("found").iterdir()}
    assert files == {"predictions.json", of_image, of_video} - {None}
    assert ("pictures" in out) == bool(suffix)
    if suffix:
        with Image.open(f"found/a{suffix}") as picture:
            assert picture.size == (50, 40) and picture.format == {"jpg": "JPEG"}.get(kind, "PNG")
        assert cv2.VideoCapture("found/clip.mp4").get(cv2.CAP_PROP_FRAME_WIDTH) == 64


def test_duplicates_are_left_out_by_default_and_kept_with_nms_0(find, tmp_path, weights):
    path = photo(tmp_path / "a.png")
    found = {}
    for words in ((), ("--nms", "0")):
        assert find("--input", "a.png", "--pictures", "0", *words)[0] == 0
        found[words] = [record["score"] for record in records()]
    model = RFDETR.from_checkpoint(weights, "cpu")
    assert found[()] == model.predict(path, 0.0).scores.tolist()
    assert found["--nms", "0"] == model.predict(path, 0.0, nms=0).scores.tolist()
    assert len(found[()]) < len(found["--nms", "0"])


# ---------------------------------------------------------------- links


def links(original: Path, link: Path, kind: str) -> None:
    link.parent.mkdir(exist_ok=True)
    try:
        os.link(original, link) if kind == "hard" else os.symlink(original.absolute(), link)
    except (OSError, NotImplementedError):
        pytest.skip("no links here")


@pytest.mark.parametrize("kind", ["hard", "symbolic"])
def test_an_input_is_not_overwritten_through_a_link_in_the_output(kind, find, tmp_path):
    source, before = photo(tmp_path / "photo.png"), (tmp_path / "photo.png").read_bytes()
    links(source, tmp_path / "found/photo.png", kind)
    status, _, _ = find("--input", source)
    assert status == 0 and source.read_bytes() == before
    assert Path("found/photo.png").read_bytes() == before and Path("found/photo_2.png").exists()


def test_links_in_the_output_are_replaced_and_never_written_through(find, tmp_path):
    source = photo(tmp_path / "photo.png")
    video(tmp_path / "clip.mp4", "mp4v")
    precious = tmp_path / "precious"
    precious.write_text("keep")
    for name in ("photo.png", "clip.mp4", "predictions.json"):
        links(precious, tmp_path / "found" / name, "symbolic")
    status, _, _ = find("--input", source, "clip.mp4")
    assert status == 0 and precious.read_text() == "keep"
    assert not any(path.is_symlink() for path in Path("found").iterdir()) and records()


@pytest.mark.parametrize("kind", ["hard", "symbolic"])
def test_inputs_are_kept_where_the_output_is_their_folder_by_another_name(kind, find, tmp_path):
    """The folder is a link; in it lies a link to the one image that was named from elsewhere."""
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "found")
    elsewhere = photo(tmp_path / "elsewhere.png", 1)
    here = photo(tmp_path / "real/here.png")
    links(elsewhere, tmp_path / "real/link.png", kind)
    clip = video(tmp_path / "real/clip.mp4", "mp4v")
    before = {path: path.read_bytes() for path in (elsewhere, here, clip)}
    status, _, _ = find("--input", here, clip, "real/link.png")
    assert status == 0
    assert all(path.read_bytes() == data for path, data in before.items())
    assert {"here_2.png", "link_2.png", "clip_2.mp4"} <= {
        path.name for path in Path("real").iterdir()
    }


# ---------------------------------------------------------------- pipes, values, sides


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_pipes_are_left_out_before_they_are_opened(find, tmp_path):
    (tmp_path / "photos").mkdir()
    photo(tmp_path / "photos/a.png")
    os.mkfifo(tmp_path / "photos/b.png")
    os.mkfifo(tmp_path / "photos/c.mp4")
    status, out, _ = find("--input", "photos")
    assert status == 0 and "photos/b.png is a pipe" in out and "photos/c.mp4 is a pipe" in out
    for name in ("photos/b.png", "photos/c.mp4"):
        status, _, err = find("--input", name)
        assert status == 2 and "no images or videos there" in err


def test_a_model_that_gives_nan_is_an_error_and_no_prediction(find, tmp_path, monkeypatch):
    from rfdetr.inference.detections import DetectionRunner

    detect = DetectionRunner._detect

    def overflown(self, *values):
        detections = detect(self, *values)
        detections.boxes = torch.full_like(detections.boxes, torch.nan)
        return detections

    monkeypatch.setattr(DetectionRunner, "_detect", overflown)
    source = photo(tmp_path / "a.png")
    for amp, advice in (("bf16", "again with --amp off"), ("off", "The checkpoint is damaged")):
        status, _, err = find("--input", source, "--amp", amp)
        assert status == 2 and "NaN" in err and advice in err
    assert not Path("found/predictions.json").exists()


def test_a_checkpoint_with_a_side_beyond_its_grid_asks_for_the_flag(call, find, tmp_path, few):
    greedy = make_checkpoint(tmp_path / "greedy.pt", 4096)
    source = photo(tmp_path / "a.png")
    status, _, err = find("--checkpoint", greedy, "--input", source)
    assert status == 2 and "greedy.pt asks for 4096" in err and "--resolution 4096" in err
    assert find("--checkpoint", greedy, "--input", source, "--resolution", 64)[0] == 0
    with pytest.raises(UserError, match="--resolution 4096"):
        call(evaluate.main, "--checkpoint", greedy, "--dataset", few)
    assert RFDETR.from_checkpoint(greedy, "cpu", resolution=4096).resolution == 4096


def test_results_that_are_replaced_are_said_to_be(find, tmp_path):
    photo(tmp_path / "a.png")
    said = "found has earlier results: files of the same names are replaced, others stay\n"
    _, out, _ = find("--input", "a.png")
    assert said not in out and " in 1 file: found " in out
    _, out, _ = find("--input", "a.png")
    assert said in out and "from before" not in out
    (tmp_path / "found/other.png").touch()
    _, out, _ = find("--input", "a.png")
    assert said in out and (tmp_path / "found/other.png").exists()
    assert "1 picture there from before, which predictions.json does not name" in out


def test_more_detections_than_queries_are_said_not_to_be_found(
    call, weights, few, capsys, tmp_path
):
    words = ["--checkpoint", weights, "--dataset", few, "--device", "cpu"]
    call(evaluate.main, *words, "--max_detections", 450)
    assert "--max_detections 450: the model has 100 queries" in capsys.readouterr().out
    call(evaluate.main, *words, "--max_detections", 450, "--tile", 32)
    assert "queries" not in capsys.readouterr().out
    words = ["--checkpoint", weights, "--input", few / "valid", "--output", tmp_path / "found"]
    call(predict.main, *words, "--device", "cpu", "--max_detections", 450)
    assert "--max_detections 450: the model has 100 queries" in capsys.readouterr().out


def test_evaluate_judges_the_split_that_it_scores_alone(call, weights, few, capsys, tmp_path):
    data = shutil.copytree(few, tmp_path / "data")
    next((data / "train").glob("*.png")).unlink()
    words = ["--checkpoint", weights, "--dataset", data, "--device", "cpu"]
    call(evaluate.main, *words)
    assert "2 images" in capsys.readouterr().out
    with pytest.raises(UserError, match="train.*whose file is missing"):
        call(evaluate.main, *words, "--split", "train")
    shutil.rmtree(data / "valid")
    with pytest.raises(UserError, match="train.*whose file is missing"):  # which is divided
        call(evaluate.main, *words, "--val_fraction", 0.5)
    call(evaluate.main, *words, "--split", "test")
    next((data / "test").glob("*.png")).unlink()
    with pytest.raises(UserError, match="test.*whose file is missing"):
        call(evaluate.main, *words, "--split", "test")


def test_evaluate_says_that_no_score_counts_in_the_overlap(call, few, capsys, tmp_path):
    torch.manual_seed(0)
    size, table = SIZES["tiny"], assign_rows(list(CLASS_NAMES), [1, 2, 3], "dataset")
    model = Detector(size, table.rows_total, table.background_last, mask_head="nano")
    state = model.state_dict()
    for name in state:
        if "class_embed" in name and name.endswith("bias"):
            state[name] -= 9
    content = checkpoint.make_content("single", size, 32, table, "nano", state)
    checkpoint.save(tmp_path / "weak.pt", content)
    call(evaluate.main, "--checkpoint", "weak.pt", "--dataset", few, "--device", "cpu")
    out = capsys.readouterr().out
    best = re.search("No score reaches 0.5, the best is ([0-9.e-]+): gIoU, cIoU and Dice", out)[1]
    advised = out.splitlines()[-1].split()
    assert advised[1:3] == ["python", "predict.py"]
    assert 0 < float(advised[-1]) <= float(best)
    call(predict.main, *advised[3:], "--device", "cpu")
    assert "✓ 0 objects" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--resolution", 100], "--resolution 100 does not fit tiny"),
        (["--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["--device", "cpu:1"], "--device cpu:1 is not usable"),
        (["--tile", "auto"], "--tile auto: this checkpoint does not say"),
    ],
)
def test_what_the_python_door_refuses_names_flags(find, tmp_path, flags, message):
    photo(tmp_path / "a.png")
    status, _, err = find("--input", "a.png", *flags)
    assert status == 2 and message in err


def test_flags_of_tiles_without_tiles_are_told(call, find, weights, few, capsys, tmp_path):
    photo(tmp_path / "a.png")
    idle = ["--tile_overlap", 0.5, "--tile_full", 1]
    for said in (
        find("--input", "a.png", *idle)[1],
        call(evaluate.main, "--checkpoint", weights, "--dataset", few, "--device", "cpu", *idle)
        or capsys.readouterr().out,
    ):
        assert "--tile_overlap changes nothing without tiles" in said
        assert "--tile_full 1 changes nothing without tiles" in said
    assert "nothing" not in find("--input", "a.png", "--tile", 32, *idle)[1]


def test_scores_replace_nothing_but_scores(call, weights, few, tmp_path):
    words = ["--checkpoint", weights, "--dataset", few, "--device", "cpu", "--json"]
    call(evaluate.main, *words, "scores.json")
    call(evaluate.main, *words, "scores.json")
    data = shutil.copy(few / "train/_annotations.coco.json", tmp_path / "mine.json")
    model = shutil.copy(weights, tmp_path / "mine.pt")
    for file in (data, model):
        before = file.read_bytes()
        with pytest.raises(UserError, match="is a file of another kind, which is not replaced"):
            call(evaluate.main, *words, file)
        with pytest.raises(UserError, match="is a file of another kind, which is not replaced"):
            call(validate_setup.main, "--dataset", few, "--json", file)
        assert file.read_bytes() == before


def test_a_file_that_is_no_image_is_told_as_a_file(find, tmp_path):
    (tmp_path / "a.txt").touch()
    status, _, err = find("--input", "a.txt")
    assert status == 2 and "a.txt: a file that is none of the images or videos by its" in err
