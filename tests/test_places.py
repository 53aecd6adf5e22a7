"""Which file or run a path means, and what is said of one that leads nowhere."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

import evaluate
import export
import predict
import shrink_head
from rfdetr.classes import assign_rows
from rfdetr.cli import script_settings, training_settings
from rfdetr.console import UserError, run_script
from rfdetr.data.demo import CLASS_NAMES
from rfdetr.data.layout import ANNOTATIONS, read_json
from rfdetr.models.detector import Detector
from rfdetr.runs.places import detector_of_run, find_checkpoint, require_state
from rfdetr.settings import SegmentationSettings, SingleSettings
from rfdetr.sizes import SIZES
from rfdetr.text import command_line
from rfdetr.tool_settings import PredictionSettings
from rfdetr.weights import checkpoint
from rfdetr.weights.download import find_weights
from testkit.datasets import rewrite


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A small detector."""
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    size = SIZES["tiny"]
    table = assign_rows(list(CLASS_NAMES), [1, 2, 3], "coco91")
    model = Detector(size, table.rows_total, table.background_last)
    content = checkpoint.make_content("detector", size, 32, table, None, model.state_dict())
    checkpoint.save(path, content)
    return path


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """runs/detector_tiny_64_1 with empty files where weights lie."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/detector_tiny_64_1")
    (folder / "tb").mkdir(parents=True)
    for name in ("best.pt", "last.pt", "checkpoint.pt", "checkpoint_mydata.pth"):
        (folder / name).touch()
    return folder


def refusal(action, *values: object) -> str:
    with pytest.raises(UserError) as caught:
        action(*values)
    return str(caught.value)


def test_a_runs_folder_means_its_best_weights(run):
    assert find_checkpoint(run) == run / "best.pt"
    assert find_checkpoint(run / "last.pt") == run / "last.pt"
    assert find_weights(str(run), SIZES["tiny"]) == run / "best.pt"
    (run / "best.pt").unlink()
    assert find_checkpoint(run) == detector_of_run(run) == run / "last.pt"


def test_a_run_is_accepted_by_every_flag_that_takes_a_checkpoint(run, capsys):
    words = ["--checkpoint", str(run), "--input", "a", "--output", "b"]
    assert script_settings(PredictionSettings, "", words).checkpoint == run / "best.pt"
    assert "--checkpoint" in capsys.readouterr().out
    script_settings(PredictionSettings, "", [*words, "--checkpoint", str(run / "best.pt")])
    assert not capsys.readouterr().out
    for kind, flag in ((SegmentationSettings, "checkpoint"), (SingleSettings, "init_ckpt")):
        settings, _ = training_settings(kind, "", [f"--{flag}", str(run)])
        assert getattr(settings, flag) == run / "best.pt"
        assert "best.pt" in capsys.readouterr().out


def test_scripts_go_on_with_the_file_of_the_run(run, weights, few, call, capsys):
    shutil.copy(weights, run / "best.pt")
    data = ["--dataset", few, "--device", "cpu"]
    call(evaluate.main, "--checkpoint", run, *data)
    said = capsys.readouterr().out
    assert "best.pt on" in said
    words = ["--checkpoint", run / "best.pt", "--input", few / "valid", "--output", "predictions"]
    command = command_line("python", "predict.py", *words, "--device", "cpu")
    assert said.splitlines()[-1].startswith(f"Next:  {command} --threshold ")  # it is untrained
    call(shrink_head.main, "--in_ckpt", run, "--out_ckpt", "small.pth")
    assert checkpoint.load(Path("small.pth"))["classes"]["names"] == list(CLASS_NAMES)
    message = refusal(call, export.main, "--checkpoint", run, "--out", "x.pth")
    assert "best.pt is of size tiny" in message
    assert checkpoint.load(run)["format"] == 1


def test_a_run_is_scored_on_what_it_was_trained_on(run, weights, few, call, capsys):
    data = shutil.copytree(few, Path("my data"))
    for split in ("train", "valid"):
        rewrite(data / split / ANNOTATIONS, lambda d: d["categories"][0].update(name="mine"))
    shutil.copy(weights, run / "best.pt")
    rename = f"mine={read_json(few / 'train' / ANNOTATIONS)['categories'][0]['name']}"
    (run / "config.yaml").write_text(f"dataset: my data\nrename: [{rename}]\n", encoding="utf-8")
    flags = ["--checkpoint", run, "--device", "cpu"]
    call(evaluate.main, *flags)
    said = capsys.readouterr().out
    assert "--dataset 'my data' --rename=" in said and "my data (valid, 2 images" in said
    assert f": of the run in {run}\n" in said
    call(evaluate.main, *flags, "--dataset", few)
    assert "of the run in" not in capsys.readouterr().out
    data.rename("moved")
    message = refusal(call, evaluate.main, *flags)
    assert "was trained on the dataset my data, and there is no" in message
    words = shlex.split(message.partition("now: python evaluate.py ")[2])
    assert words[-2:] == ["--dataset", "DIR"]
    call(evaluate.main, *words[:-1], "moved")
    (run / "config.yaml").unlink()
    assert "no COCO dataset in dataset" in refusal(call, evaluate.main, *flags)


def test_a_text_is_no_checkpoint_and_the_weights_beside_it_are_named(run):
    (run / "stage2_config.json").write_text("{}")
    (run / "best.pt").write_bytes(b"weights")
    message = refusal(find_checkpoint, run / "stage2_config.json")
    assert "stage2_config.json is a text file, which holds no weights" in message
    assert f"Did you mean {run / 'best.pt'}?" in message


def test_a_folder_too_deep_or_too_high_names_the_run(run):
    for path in (run / "tb", run / "images", Path("runs"), Path()):
        for find in (find_checkpoint, detector_of_run, require_state):
            assert f"Did you mean {run}?" in refusal(find, path)
    for find in (detector_of_run, require_state):
        assert f"Did you mean {run}?" in refusal(find, run / "last.pt")


def test_of_several_runs_the_newest_three_are_named(run):
    for number in range(2, 6):
        shutil.copytree(run, run.with_name(f"detector_tiny_64_{number}"))
    assert refusal(require_state, Path("runs")).count("runs/detector_tiny_64_") == 3


@pytest.mark.parametrize(
    "path, said",
    [
        ("runs/detector_tiny_64_1/bset.pt", "detector_tiny_64_1/best.pt"),
        ("runs/detector_tiny_64_2", "detector_tiny_64_1"),
        ("run/detector_tiny_64_1", "there is no folder run. Did you mean runs?"),
        ("elsewhere/a/b", "there is no folder elsewhere"),
    ],
)
def test_what_is_missing_is_called_missing_with_near_names(run, path, said):
    for find in (find_checkpoint, detector_of_run, require_state):
        message = refusal(find, Path(path))
        assert said in message.replace("\\", "/") and "there is no" in message


def test_a_url_is_called_one(run):
    message = refusal(find_checkpoint, Path("https://example.com/best.pt"))
    assert "it is a URL: download it first" in message


def test_a_folder_without_checkpoints_tells_what_it_has(run):
    message = refusal(detector_of_run, Path("runs/detector_tiny_64_1/tb"))
    assert message.startswith("No checkpoint found in Stage-1 directory")
    (run / "empty").mkdir()
    assert "it is empty" in refusal(find_checkpoint, run / "empty")
    message = refusal(detector_of_run, Path("nowhere"))
    assert "no such file or folder" in message and "There is" not in message


def test_images_in_folders_below_are_named_by_a_glob(few, call, tmp_path, capsys, weights):
    data = shutil.copytree(few, tmp_path / "my data")
    flags = ["--checkpoint", weights, "--output", "found", "--device", "cpu"]
    message = refusal(call, predict.main, *flags, "--input", data)
    pattern = message.split("--input '")[1].removesuffix("'")
    call(predict.main, *flags, "--input", pattern)
    assert len(list(Path("found").glob("*.png"))) == 8
    assert "no such file or folder" in refusal(call, predict.main, *flags, "--input", "few.png")


def test_an_mp4_that_cannot_be_read_is_not_to_be_converted_to_mp4(call, weights, capsys, tmp_path):
    for name, content, advice in (
        ("a.mp4", b"\0\0\0\x18ftypmp42", "ffmpeg -i a.mp4 -vcodec libx264 a_new.mp4\n"),
        ("a.avi", b"RIFFxxxx", "Convert it to .mp4"),
        ("b.mp4", b"only text", "by its content it is no video, whatever its name says\n"),
        ("c.mp4", b"", "the file is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        flags = ["--checkpoint", weights, "--output", "found", "--device", "cpu"]
        with pytest.raises(SystemExit):
            call(lambda argv: run_script(predict.main, argv), *flags, "--input", name)
        said = capsys.readouterr()
        assert advice in said.out
        assert "error: the file could not be read" in said.err
