"""The command after each script's "Next:" does what it says, typed as it stands."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import quick_flags

import evaluate
import export
import shrink_head
import train_detector_stage1
import train_seg_stage2
import validate_setup
from rfdetr.classes import assign_rows
from rfdetr.cli import training_settings
from rfdetr.commands import steadier, without_flag
from rfdetr.console import UserError
from rfdetr.data.demo import CLASS_NAMES
from rfdetr.models.detector import Detector
from rfdetr.settings import DetectorSettings, SegmentationSettings
from rfdetr.sizes import SIZES
from rfdetr.text import command_line, quoted
from rfdetr.training.health import RunHealth
from rfdetr.training.next_commands import prediction
from rfdetr.training.resume import require_stage
from rfdetr.weights import checkpoint
from testkit.datasets import changed_copy, drop_masks

# of a stage, so that it is over at once; what a command has to carry by itself is not in it
QUICK = ["--epochs", 1, "--min_steps", 1, "--batch", 2, "--accum", 1, "--tensorboard", 0]
QUICK += ["--workers", 0]
ODD_NAMES = ["--keep=it's", 'a "b" – $c', "- é 血"]


@pytest.fixture
def type_next(call, capsys, monkeypatch) -> Callable:
    """type_next(output, *more) -> script's name, the output of the command after "Next:".

    A detector of so few steps finds nothing, which stops no stage 2.
    """
    monkeypatch.setattr(RunHealth, "check_matches", lambda *_: None)

    def run(output: str, *more: object) -> tuple[str, str]:
        words = shlex.split(next_line(output))
        assert words[0] == "python"
        script = importlib.import_module(words[1].removesuffix(".py"))
        call(script.main, *words[2:], *more)
        return words[1], capsys.readouterr().out

    return run


def next_line(output: str) -> str:
    line = output.splitlines()[-1]
    assert line.startswith("Next:"), output
    return line.removeprefix("Next:")


def rename_classes(content: dict) -> None:
    for category, name in zip(content["categories"], ODD_NAMES):
        category["name"] = name


@pytest.mark.slow
def test_odd_names_lead_from_stage_1_to_pictures(few, call, capsys, type_next, tmp_path):
    """No valid/, its own resolution, an apostrophe and spaces in the folder, odd classes."""
    data = changed_copy(few, tmp_path / "it's my data", rename_classes)
    shutil.rmtree(data / "valid")
    flags = [*quick_flags(data), "--val_fraction", 0.25, "--exif", "ignore"]
    call(train_detector_stage1.main, *flags, "--output_dir", "run 1's")
    script, output = type_next(capsys.readouterr().out)
    assert script == "shrink_head.py"
    words = shlex.split(next_line(output))
    for name, value in (("--val_fraction", "0.25"), ("--exif", "ignore"), ("--resolution", "32")):
        assert words[words.index(name) + 1] == value
    script, output = type_next(output, *QUICK)
    assert script == "train_seg_stage2.py" and "(3 train, 1 valid images" in output
    assert "train holds the images that were trained on, too" in output.splitlines()[-2]
    words = shlex.split(next_line(output))
    assert type_next(output, "--threshold", 0.9)[0] == "predict.py"
    assert len(list(Path(words[words.index("--output") + 1]).glob("*.png"))) == 4


@pytest.mark.slow
def test_boxes_alone_lead_from_stage_1_to_guessed_masks(few, call, capsys, type_next, tmp_path):
    data = changed_copy(few, tmp_path / "boxes", drop_masks)
    call(train_detector_stage1.main, *quick_flags(data), "--output_dir", "run")
    script, output = type_next(capsys.readouterr().out)
    assert script == "shrink_head.py"
    script, output = type_next(output, *QUICK)
    assert script == "train_seg_stage2.py" and "masks are guessed" in output
    assert type_next(output, "--threshold", 0.9)[0] == "predict.py"


@pytest.mark.slow
def test_a_head_without_unused_rows_goes_on_to_stage_2(few, call, capsys, type_next):
    """First of all a trial, which leads to the run itself."""
    flags = [*quick_flags(few), "--head", "dataset"]
    call(train_detector_stage1.main, *flags[:4], "--fast_dev_run", 1, *flags[4:])
    output = capsys.readouterr().out
    trial, last = output.splitlines()[-2:]
    assert trial.startswith("A trial of 1 step: it has learnt nothing. runs")
    assert shlex.split(last)[1:] == ["python", "train_detector_stage1.py", *map(str, flags)]
    output = type_next(output)[1]
    assert "detector_tiny_32_2" in output
    assert type_next(output, *QUICK)[0] == "train_seg_stage2.py"


def test_what_a_run_finds_goes_into_its_own_folder(tmp_path):
    (tmp_path / "runs/a_1").mkdir(parents=True)
    weights = tmp_path / "runs/a_1/best.pt"
    assert prediction(weights, Path("images"), {}).endswith("--output predictions")
    (weights.parent / "config.yaml").touch()
    assert prediction(weights, Path("images"), {}).endswith(f"--output {weights.parent / 'found'}")


@pytest.mark.parametrize("words", [["--name"], ["--name", "3"], ["--name=3"], []])
def test_a_flag_leaves_its_command_in_every_form(words):
    argv = ["a.py", "--seed", "1", *words, "--names", "2"]
    assert without_flag(argv, "name") == ["a.py", "--seed", "1", "--names", "2"]


# ---------------------------------------------------------------- after --keep of a few classes


def detector(args: dict, file: Path, **more: object) -> Path:
    """A stage-1 checkpoint of the demo's classes, its weights as they begin."""
    size = SIZES["tiny"]
    table = assign_rows(list(CLASS_NAMES), [1, 2, 3], "coco91")
    model = Detector(size, table.rows_total, table.background_last)
    content = checkpoint.make_content("detector", size, 32, table, None, model.state_dict())
    checkpoint.save(file, content | {"args": args} | more)
    return file


def test_after_a_part_of_the_classes_no_stage_2_is_advised(few, call, capsys, type_next, tmp_path):
    source = detector({"dataset": str(few), "size": "tiny", "device": "cpu"}, tmp_path / "best.pt")
    call(shrink_head.main, "--in_ckpt", source, "--out_ckpt", "one.pt", "--keep", CLASS_NAMES[0])
    output = capsys.readouterr().out
    assert f"no longer knows {', '.join(CLASS_NAMES[1:])}" in output
    assert type_next(output, "--threshold", 0.9)[0] == "predict.py"

    # whoever goes on to stage 2 all the same is told why not, with no command that fails
    with pytest.raises(UserError) as caught:
        call(train_seg_stage2.main, *quick_flags(few), "--checkpoint", "one.pt")
    message = str(caught.value)
    assert message.startswith("Frozen detector head out_dim (2) != requested (4)")
    assert f"does not know {', '.join(CLASS_NAMES[1:])}" in message
    assert "--in_ckpt" not in message


# ---------------------------------------------------------------- what errors advise


def advised(message: str) -> DetectorSettings:
    """The settings of the stage 1 that a message advises."""
    command = re.search("python train_detector_stage1.py.*", message)[0]
    return training_settings(DetectorSettings, "", shlex.split(command)[2:])[0]


def other_classes(content: dict) -> None:
    for category in content["categories"]:
        category["name"] = f"new {category['id']}"


def test_where_classes_differ_the_training_that_is_advised_is_of_this_dataset(few, call, tmp_path):
    source = detector({}, tmp_path / "best.pt")
    data = changed_copy(few, tmp_path / "it's data", other_classes)
    flags = ["--dataset", data, "--device", "cpu", "--rename", "new 1=one"]
    for main, own in (
        (evaluate.main, []),
        (train_seg_stage2.main, ["--size", "tiny", "--resolution", 32]),
        (train_seg_stage2.main, ["--size", "tiny", "--auto_shrink", 1, "--resolution", 32]),
    ):
        with pytest.raises(UserError) as caught:
            call(main, "--checkpoint", source, *flags, *own)
        settings = advised(str(caught.value))
        assert (settings.dataset, settings.size, settings.device) == (data, "tiny", "cpu")
        assert list(settings.rename) == ["new 1=one"]
        assert not own or settings.resolution == 32


def test_without_a_stage_1_run_the_one_that_is_advised_is_of_this_dataset(few, call, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = ["--stage1_run", "empty", "--dataset", few, "--size", "small", "--val_fraction", 0.2]
    with pytest.raises(UserError, match="No checkpoint found in Stage-1 directory") as caught:
        call(train_seg_stage2.main, *flags)
    settings = advised(str(caught.value))
    assert (settings.dataset, settings.size, settings.val_fraction) == (few, "small", 0.2)


def test_a_shrunk_file_that_is_replaced_is_said_to_be(few, call, capsys, tmp_path):
    source = detector({"dataset": str(few), "size": "tiny"}, tmp_path / "best.pt")
    flags = ["--in_ckpt", source, "--out_ckpt", "small.pt"]
    call(shrink_head.main, *flags)
    assert "Written: small.pt\n" in capsys.readouterr().out
    call(shrink_head.main, *flags)
    output = capsys.readouterr().out
    assert "Written: small.pt, in place of an earlier file\n" in output
    assert "warning" not in output

    call(shrink_head.main, *flags, "--keep", CLASS_NAMES[1])
    words = f"small.pt had the classes {', '.join(CLASS_NAMES)} and now has {CLASS_NAMES[1]}: "
    assert words in capsys.readouterr().out
    (tmp_path / "small.pt").write_text("no checkpoint")
    call(shrink_head.main, *flags)
    assert "had the classes" not in capsys.readouterr().out


def test_no_checkpoint_that_a_training_wrote_is_replaced(few, call, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    source = detector({"dataset": str(few), "size": "tiny"}, run / "checkpoint_best_ema.pth")
    kept = run / "best.pt"
    kept.write_bytes(b"of the training")
    flags = ["--in_ckpt", source, "--out_ckpt", kept, "--keep", CLASS_NAMES[1]]
    call(shrink_head.main, *flags)  # a folder that is no run's
    kept.write_bytes(b"of the training")
    (run / "config.yaml").touch()
    with pytest.raises(UserError, match="best.pt is a checkpoint of the training.*mydata.pth"):
        call(shrink_head.main, *flags)
    with pytest.raises(UserError, match="--out .*best.pt is a checkpoint.*exported.pth"):
        call(export.main, "--checkpoint", flags[1], "--out", kept)
    assert kept.read_bytes() == b"of the training"


def test_a_shrunk_file_that_lies_there_already_is_named(few, call, capsys, tmp_path):
    source = detector({}, tmp_path / "best.pt")
    shrunk = tmp_path / "checkpoint_mydata.pth"
    flags = [*quick_flags(few), "--checkpoint", source, "--epochs", 3]

    def message_of_stage_2() -> str:
        with pytest.raises(UserError) as caught:
            call(train_seg_stage2.main, *flags)
        assert str(caught.value).startswith("Frozen detector head out_dim (91) != requested (4)")
        return str(caught.value)

    shrink = ["--in_ckpt", source, "--out_ckpt", shrunk]
    call(shrink_head.main, *shrink, "--keep", CLASS_NAMES[0])
    assert "python shrink_head.py" in message_of_stage_2()  # it has not these classes

    call(shrink_head.main, *shrink)
    message = message_of_stage_2()
    assert f"{shrunk} is cut to them already" in message and "shrink_head.py" not in message
    words = shlex.split(message.splitlines()[-1])
    assert words[:2] == ["python", "train_seg_stage2.py"]
    settings = training_settings(SegmentationSettings, "", words[2:])[0]
    assert (settings.checkpoint, settings.epochs, words.count("--checkpoint")) == (shrunk, 3, 1)

    later = shrunk.stat().st_mtime + 10  # stage 1 was trained on since
    os.utime(source, (later, later))
    assert "python shrink_head.py" in message_of_stage_2()


def write_scores(folder: Path, regular: float, ema: float) -> None:
    scores = {"valid": {"bbox": {"mAP": regular}}, "valid_ema": {"bbox": {"mAP": ema}}}
    scores["epoch"] = 1
    (folder / "metrics.json").write_text(json.dumps({"epochs": [scores]}))


def test_a_shrunk_file_older_than_its_run_is_told(few, call, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(RunHealth, "check_matches", lambda *_: None)
    run = tmp_path / "run"
    run.mkdir()
    source = detector({}, run / "checkpoint_best_ema.pth", weights="ema", epoch=1)
    write_scores(run, 0.2, 0.3)
    shrunk = run / "checkpoint_mydata.pth"
    call(shrink_head.main, "--in_ckpt", source, "--out_ckpt", shrunk)
    flags = [*quick_flags(few), "--checkpoint", shrunk, "--epochs", 1]
    call(train_seg_stage2.main, *flags)
    assert "was trained on since" not in capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["epochs"].append({"epoch": 2, "valid": None, "valid_ema": {"bbox": {"mAP": 0.4}}})
    (run / "metrics.json").write_text(json.dumps(metrics))
    detector({}, source, weights="ema", epoch=2)
    call(train_seg_stage2.main, *flags)
    said = capsys.readouterr().out
    assert f"{shrunk} is of epoch 1 of its run, which was trained on since" in said
    words = shlex.split(said.split("cut them first: ")[1].splitlines()[0])
    call(shrink_head.main, *words[2:])
    call(train_seg_stage2.main, *flags)
    assert "was trained on since" not in capsys.readouterr().out


def test_a_shrink_says_that_the_dataset_has_moved(call, capsys, tmp_path):
    source = detector({"dataset": "gone", "size": "tiny"}, tmp_path / "best.pt")
    call(shrink_head.main, "--in_ckpt", source, "--out_ckpt", "small.pt")
    said = capsys.readouterr().out
    assert "DIR is where the dataset gone is now" in said
    assert " --dataset DIR " in next_line(said)


def test_weights_that_score_alike_are_not_said_to_score_higher(call, capsys, tmp_path):
    source = detector({}, tmp_path / "best_ema.pt")
    flags = ["--in_ckpt", source, "--out_ckpt", "small.pt"]
    for ema, words in ((0.1893, "weights scored alike: "), (0.191, "ema weights scored higher: ")):
        write_scores(tmp_path, 0.189, ema)
        call(shrink_head.main, *flags)
        assert words in capsys.readouterr().out

    content = checkpoint.load(source)  # of stage 2, which freezes the detector
    checkpoint.save(source, content | {"stage": "segmentation"})
    call(shrink_head.main, *flags)
    assert "weights scored" not in capsys.readouterr().out


# ---------------------------------------------------------------- what is missing


def test_a_dataset_that_has_gone_leaves_nothing_to_type(call, capsys, tmp_path):
    source = detector({"dataset": "nowhere", "size": "tiny"}, tmp_path / "best.pt")
    call(shrink_head.main, "--in_ckpt", source, "--out_ckpt", "one.pt", "--keep", CLASS_NAMES[0])
    assert "Next:" not in capsys.readouterr().out


def test_a_dataset_that_is_missing_is_not_to_be_mended_by_fix(tmp_path):
    with pytest.raises(UserError, match="no COCO dataset in ") as caught:
        validate_setup.main(["--dataset", str(tmp_path / "nowhere")])
    assert "--fix" not in str(caught.value)


# ---------------------------------------------------------------- quoting


@pytest.mark.parametrize(
    "word, written",
    [
        ("runs/a_1/best.pt", "runs/a_1/best.pt"),
        ("--out_ckpt", "--out_ckpt"),
        ("my data", "'my data'"),
        ("$HOME", "'$HOME'"),
        ("C:\\data", "'C:\\data'"),
        ("a,b", "'a,b'"),  # two words for PowerShell, if bare
        ("--keep=a.b", "'--keep=a.b'"),
        ("it's", '"it\'s"'),
        ("it’s", '"it’s"'),  # PowerShell takes it for the straight one
    ],
)
def test_words_are_written_as_bash_and_powershell_both_read_them(word, written):
    assert quoted(word) == written
    assert shlex.split(written) == [word]


def test_whatever_a_word_holds_bash_reads_it_as_it_is():
    words = ["it's $HOME", "`id` 'x'", "a\nb's", "", "!'x", "\\'", "\"'"]
    assert shlex.split(command_line("python", *words)) == ["python", *words]


def test_the_command_of_another_scripts_run_is_quoted():
    with pytest.raises(UserError) as caught:
        require_stage({"stage": "single"}, "detector", Path("my run"))
    command = re.search("python .*", str(caught.value))[0]
    assert shlex.split(command) == ["python", "train_seg_single_stage.py", "--resume", "my run"]


def test_what_to_train_with_is_not_so_already_and_a_flag_of_the_stage():
    assert steadier("segmentation", amp_is_off=True) == "a lower --seg_lr"
    assert steadier("detector", amp_is_off=False) == "a lower --lr, or --amp off"
