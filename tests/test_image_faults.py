"""Images that go bad after the check, and processes that die while they read one."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quick_flags, train_flags
from PIL import Image
from test_resume import assert_same_run, signal_at_step

import evaluate
import predict
import train_detector_stage1
import train_seg_stage2
from rfdetr.console import Stopped, UserError
from rfdetr.console import run_script as as_a_script
from rfdetr.data.coco import read_dataset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.loaders import evaluation_loader
from rfdetr.metrics.coco_eval import CocoEvaluator
from testkit.forked import Forked

pytestmark = pytest.mark.slow


def truncated(source: Path, target: Path, count: dict[str, int]) -> list[Path]:
    """Copy a dataset; the first images of the named splits are cut JPEGs with sound headers."""
    shutil.copytree(source, target)
    files = [
        file for split, n in count.items() for file in sorted((target / split).glob("*.png"))[:n]
    ]
    for file in files:
        whole = io.BytesIO()
        Image.open(file).convert("RGB").save(whole, "JPEG", quality=95)
        file.write_bytes(whole.getvalue()[: whole.tell() // 2])
    return files


def epochs(folder: Path) -> list[dict]:
    return json.loads((folder / "metrics.json").read_text())["epochs"]


def test_unreadable_images_are_skipped_named_once_and_counted(few, tmp_path, call, capsys):
    bad, bad_valid = truncated(few, tmp_path / "data", {"train": 1, "valid": 1})
    flags, losses = [*quick_flags(tmp_path / "data"), "--epochs", 2], []
    for workers in (0, 2):
        out = tmp_path / f"run{workers}"
        call(train_detector_stage1.main, *flags, "--workers", workers, "--output_dir", out)
        said = capsys.readouterr().out
        for file in (bad, bad_valid):
            assert said.count(f"skipped: {file}: cannot be read") == 1
        assert [epoch["train"]["skipped_images"] for epoch in epochs(out)] == [1, 1]
        losses.append([(epoch["train"]["loss"], epoch["valid"]) for epoch in epochs(out)])
    assert losses[0] == losses[1]

    best = ["--checkpoint", tmp_path / "run0/best.pt"]
    call(evaluate.main, *best, "--dataset", tmp_path / "data", "--results", tmp_path)
    assert f"skipped: {bad_valid}" in capsys.readouterr().out
    truth = json.loads((tmp_path / "data/valid/_annotations.coco.json").read_text())
    number = {entry["file_name"]: entry["id"] for entry in truth["images"]}[bad_valid.name]
    found = {result["image_id"] for result in json.loads((tmp_path / "bbox.json").read_text())}
    assert found == {entry["id"] for entry in truth["images"]} - {number}
    call(predict.main, *best, "--input", bad.parent, "--output", tmp_path / "out")
    said = capsys.readouterr().out
    assert str(bad) in said and "in 3 of 4 files" in said


def test_what_a_damaged_file_shows_counts_as_missed(few, tmp_path):
    """The figures stay those of pycocotools on the dataset's own file."""
    shutil.copytree(few, tmp_path / "data")
    whole = read_dataset(tmp_path / "data")["valid"]
    whole.images[0].path.write_bytes(b"not even a header")
    valid = read_dataset(tmp_path / "data")["valid"]
    assert (
        valid.ground_truth == whole.ground_truth
        and "1 image that cannot be read" in valid.warnings[0]
    )
    evaluator = CocoEvaluator(valid.ground_truth, masks=False)
    record = valid.images[1]
    ids = np.asarray(valid.category_ids)[record.labels]
    evaluator.add(record.id, record.boxes, np.ones(len(ids)), ids, None)
    assert 0.3 < evaluator.summary()["bbox"]["AR100"] < 0.7


def test_too_many_unreadable_images_are_an_error(demo, tmp_path, call, capsys):
    truncated(demo, tmp_path / "data", {"train": 4, "valid": 4})
    flags = [*train_flags(tmp_path / "data", 32), "--workers", 1, "--epochs", 1]
    with pytest.raises(SystemExit) as left:
        call(lambda argv: as_a_script(train_detector_stage1.main, argv), *flags)
    said = capsys.readouterr().err
    assert left.value.code == 2 and "Traceback" not in said
    for words in ("4 of 12 images cannot be read", "train/_annotations", "validate_setup.py --"):
        assert words in said
    call(train_detector_stage1.main, *quick_flags(demo), "--output_dir", "sound")
    with pytest.raises(UserError, match="4 of 6 images cannot be read"):
        call(evaluate.main, "--checkpoint", "sound/best.pt", "--dataset", tmp_path / "data")


def test_a_run_with_an_unreadable_image_resumes_exactly(few, tmp_path, call, monkeypatch):
    truncated(few, tmp_path / "data", {"train": 1})
    flags = [*quick_flags(tmp_path / "data"), "--epochs", 2]
    call(train_detector_stage1.main, *flags, "--output_dir", "whole")
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        signal_at_step(patched, 3, signal.SIGINT)
        call(train_detector_stage1.main, *flags, "--output_dir", "stopped")
    call(train_detector_stage1.main, "--resume", "stopped")
    assert_same_run(Path("stopped"), Path("whole"))


@pytest.mark.parametrize(
    "caches", [["off"], ["disk", "disk"]]
)  # the second finds what the first has computed
def test_stage_2_skips_them_too(few, tmp_path, call, capsys, caches, monkeypatch):
    monkeypatch.setattr("rfdetr.training.frozen.MATCH_IOU", -1.0)  # the detector is hardly trained
    (bad,) = truncated(few, tmp_path / "data", {"train": 1})
    call(train_detector_stage1.main, *quick_flags(few), "--output_dir", "stage1")
    flags = [*quick_flags(tmp_path / "data"), "--stage1_run", "stage1", "--auto_shrink", 1]
    for number, cache in enumerate(caches):
        capsys.readouterr()
        call(train_seg_stage2.main, *flags, "--cache", cache, "--output_dir", f"run{number}")
        assert capsys.readouterr().out.count(f"skipped: {bad}") == 1
        assert [epoch["train"]["skipped_images"] for epoch in epochs(Path(f"run{number}"))] == [1]


def test_the_next_image_stands_in_in_training_and_nothing_in_evaluation(few, tmp_path):
    (bad,) = truncated(few, tmp_path / "data", {"train": 1})
    split = read_dataset(tmp_path / "data")["train"]
    at = [image.path for image in split.images].index(bad)
    for augment in ("crops", "dihedral"):
        dataset = SplitDataset(split, 64, augment, masks=True)
        taken, other = dataset[at, 5], dataset[(at + 1) % 4, 5]
        assert (
            torch.equal(taken["image"], other["image"])
            and taken["target"]["index"] == other["target"]["index"]
        )
        assert (
            list(taken["unread"]) == [at]
            and str(bad) in taken["unread"][at]
            and not other["unread"]
        )
        assert torch.equal(dataset.image(at)[1], dataset.image((at + 1) % 4)[1])
    batches = list(evaluation_loader(SplitDataset(split, 64, None, masks=False), 1, 0))
    assert [batch.indices for batch in batches] == [[i] if i != at else [] for i in range(4)]
    assert [len(batch.images) for batch in batches] == [int(i != at) for i in range(4)]
    for image in split.images:
        image.path.write_bytes(b"")
    with pytest.raises(UserError, match="none of its images"):
        SplitDataset(split, 64, None, masks=False)[0, None]


def make_pipes_of_the_images() -> None:
    """Once the check is over: who opens one waits until the test writes to it."""
    make = train_detector_stage1.training_loader

    def training_loader(dataset, *rest, **options):
        for image in dataset.split.images:
            image.path.unlink()
            os.mkfifo(image.path)
        return make(dataset, *rest, **options)

    train_detector_stage1.training_loader = training_loader


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for the worker in /proc")
def test_a_dead_worker_ends_the_run_and_its_image_is_named(few, tmp_path):
    shutil.copytree(few, tmp_path / "data")
    flags = [*quick_flags(tmp_path / "data"), "--workers", 2]
    command = ["train_detector_stage1", *flags]
    script = Forked(command, cwd=tmp_path, before=make_pipes_of_the_images)
    file, worker = who_reads(sorted((tmp_path / "data/train").glob("*.png")), script)
    os.kill(worker, signal.SIGKILL)
    assert script.wait() == 2, script.stderr
    said = script.stderr
    assert str(worker) in said and str(file) in said and "--workers 0" in said
    assert "Traceback" not in said and said.count(".png") == 1


def who_reads(files: list[Path], script: Forked) -> tuple[Path, int]:
    """The first pipe that a process has opened to read, and that process, which goes on waiting."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and script.is_running:
        for file in files:
            try:
                writer = os.open(file, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # nobody reads it, or it is no pipe yet
                continue
            if not file.is_fifo():
                os.close(writer)
                continue
            while time.monotonic() < deadline:
                for link in Path("/proc").glob("[0-9]*/fd/*"):
                    try:
                        if Path(os.readlink(link)) == file and int(link.parts[2]) != os.getpid():
                            return file, int(link.parts[2])
                    except OSError:
                        continue
        time.sleep(0.1)
    raise AssertionError(f"no worker began to read: {script.stdout}{script.stderr}")
