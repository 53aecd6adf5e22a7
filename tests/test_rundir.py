"""Run folders: numbering, atomic JSON, metrics.json over a resume, the log and TensorBoard."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rfdetr.console import UserError
from rfdetr.files import atomic_write, write_json
from rfdetr.metrics.coco_eval import CocoEvaluator
from rfdetr.runs import environment as environment_module
from rfdetr.runs import log, tensorboard
from rfdetr.runs.curves import FINAL_SCORES, StepCurves, best_score, score_curves, train_curves
from rfdetr.runs.environment import environment
from rfdetr.runs.folder import check_free_disk, given_run, new_run
from rfdetr.runs.lock import HOLDER, LOCK, lock_run, unlock_run
from rfdetr.runs.metrics_file import best_scores, first_epochs, has_test_scores, highest_box_map
from rfdetr.runs.record import Run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

HEADER = {
    "stage": "detector",
    "size": "tiny",
    "resolution": 128,
    "class_names": ["cells"],
    "args": {},
}


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tb")).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


FORK = multiprocessing.get_context(
    "fork" if hasattr(os, "fork") else "spawn"
)  # spawning imports torch again


# --- folders ---


def test_new_run_takes_the_first_free_number(tmp_path):
    parent = tmp_path / "a folder" / "runs"
    assert new_run(parent, "detector_tiny_128") == parent / "detector_tiny_128_1"
    (parent / "detector_tiny_128_2").write_text("a file, not a folder")
    assert new_run(parent, "detector_tiny_128").name == "detector_tiny_128_3"
    assert new_run(parent, "detector_nano_384").name == "detector_nano_384_1"


def take_fifty(parent: Path, start, names) -> None:
    start.wait(60)
    names.put([new_run(parent, "run").name for _ in range(50)])


def test_processes_that_start_at_once_get_different_folders(tmp_path):
    start, names = FORK.Barrier(2), FORK.Queue()
    racers = [
        FORK.Process(target=take_fifty, args=(tmp_path / "runs", start, names)) for _ in range(2)
    ]
    for racer in racers:
        racer.start()
    taken = names.get(timeout=60) + names.get(timeout=60)
    for racer in racers:
        racer.join()
    assert sorted(taken) == sorted(f"run_{n}" for n in range(1, 101))


def test_a_file_in_the_way_of_the_runs_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    for parent in (tmp_path / "runs", tmp_path / "runs" / "deeper"):
        with pytest.raises(UserError, match="the file .*runs is in the way. Name another"):
            new_run(parent, "detector")


def test_a_named_folder_must_be_new_or_empty(tmp_path):
    assert given_run(tmp_path / "new" / "run") == given_run(tmp_path / "new" / "run")
    with pytest.raises(UserError, match=r"not empty \(it holds run\).*--output_dir"):
        given_run(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output_dir$"):  # what is there is no run
        given_run(tmp_path)
    (tmp_path / "new" / "run" / "last.pt").touch()
    with pytest.raises(UserError, match="or --resume it"):
        given_run(tmp_path / "new" / "run")
    with pytest.raises(UserError, match="cannot write to the folder .*file"):
        given_run(tmp_path / "file")


def test_an_unwritable_parent_is_named(tmp_path, monkeypatch):
    def refuse(self, *args, **options):
        if self.name == "run_1":
            raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="Permission denied .*run_1.*--output_dir"):
        new_run(tmp_path, "run")


def test_check_free_disk_works_before_the_folder_exists(tmp_path):
    check_free_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match="GB free and this run needs about 1000000.0 GB"):
        check_free_disk(tmp_path / "not" / "yet", 10**15)


def test_what_is_no_disk_is_not_said_to_be_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (0, 0, 0))  # as of /proc
    check_free_disk(tmp_path / "run", 10**9)


# --- atomic files ---

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
    )
)
def test_any_plain_value_becomes_strict_json(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_json(path, {"value": value})
    written = json.loads(path.read_bytes(), parse_constant=pytest.fail)
    if "nan" not in repr(value) and "inf" not in repr(value) and repr(value).isascii():
        assert written == {"value": value}


def test_write_json_turns_numbers_of_other_kinds_into_plain_ones(tmp_path):
    data = {
        "nan": float("nan"),
        "infinite": np.float32("-inf"),
        "tensor": torch.tensor([1.5, float("nan")]),
        "scalar": torch.tensor(3),
        "numpy": np.int64(4),
        "yes": np.bool_(True),
        "path": Path("runs"),
        "device": torch.device("cpu"),
        "pair": (1, 2),
        5: "Zellen – 细胞",
    }
    write_json(tmp_path / "x.json", data)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {
        "nan": None,
        "infinite": None,
        "tensor": [1.5, None],
        "scalar": 3,
        "numpy": 4,
        "yes": True,
        "path": "runs",
        "device": "cpu",
        "pair": [1, 2],
        "5": "Zellen – 细胞",
    }
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"what": object()})
    assert os.listdir(tmp_path) == ["x.json"] and "tensor" in (tmp_path / "x.json").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_failed_write_keeps_the_old_file_and_no_temporary(tmp_path, error):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(UserError, match="could not write .*last.pt"):
        atomic_write(path, write)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pt"]


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    done = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append("written to the disk"))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replaced"), replace(*paths)))
    atomic_write(tmp_path / "last.pt", lambda file: file.write(b"new"))
    assert done == ["written to the disk", "replaced"]
    assert (tmp_path / "last.pt").read_bytes() == b"new"


def write_beyond_the_limit(path: Path, said) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_json(path, {"new": list(range(1000))})
    except UserError as error:
        said.send(str(error))


def test_a_disk_that_takes_no_more_keeps_the_old_file(tmp_path):
    pytest.importorskip("resource")
    path = tmp_path / "metrics.json"
    write_json(path, {"old": 1})
    said, writer = FORK.Pipe(duplex=False)
    process = FORK.Process(target=write_beyond_the_limit, args=(path, writer))
    process.start()
    process.join()
    assert said.poll() and f"could not write {path}" in said.recv()
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["metrics.json"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "mydata.pth"

    def slow(file):
        file.write(b"first, ")
        atomic_write(path, lambda other: other.write(b"second"))  # begins and ends meanwhile
        assert path.read_bytes() == b"second"
        file.write(b"whole")

    atomic_write(path, slow)
    assert path.read_bytes() == b"first, whole" and os.listdir(tmp_path) == ["mydata.pth"]


def test_results_that_cannot_be_written_keep_the_old_ones(tmp_path, monkeypatch):
    evaluator = CocoEvaluator({"images": [], "annotations": [], "categories": []}, masks=False)
    evaluator.save(tmp_path)

    def half(path, text, **options):
        path.write_bytes(b"[{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        evaluator.save(tmp_path)
    assert (tmp_path / "bbox.json").read_bytes() == b"[]" and os.listdir(tmp_path) == ["bbox.json"]


# --- one process a run ---


def hold(folder: Path, locked, end) -> None:
    lock_run(folder)
    locked.set()
    end.wait(60)


def test_a_run_belongs_to_one_process_until_it_ends(tmp_path, capsys):
    locked, end = FORK.Event(), FORK.Event()
    other = FORK.Process(target=hold, args=(tmp_path, locked, end))
    other.start()
    assert locked.wait(60)
    with pytest.raises(UserError, match=f"process {other.pid} on .*--output_dir"):
        Run(tmp_path, HEADER)
    assert sorted(os.listdir(tmp_path)) == [LOCK, HOLDER]
    assert not isinstance(sys.stdout, log._Tee)
    other.kill()
    other.join()
    with Run(tmp_path, HEADER):
        lock_run(tmp_path / "tb" / "..")  # by the same process: nothing
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.glob("run.lock*")) and not list(tmp_path.glob("*.tmp"))
    said = capsys.readouterr().out
    assert said.count(f"locked by process {other.pid}, which is gone: taken over") == 1


def hold_with_a_loader(folder: Path, locked, end) -> None:
    """A process that is killed while one that it has forked, as loaders do, goes on for a while."""
    lock_run(folder)
    if os.fork() == 0:
        locked.set()
        end.wait(60)
        os._exit(0)
    time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_loaders_of_a_killed_run_do_not_hold_its_lock(tmp_path):
    locked, end = FORK.Event(), FORK.Event()
    other = FORK.Process(target=hold_with_a_loader, args=(tmp_path, locked, end))
    other.start()
    assert locked.wait(60)
    other.kill()
    other.join()
    threading.Timer(1, end.set).start()
    lock_run(tmp_path)
    unlock_run(tmp_path)


def test_a_lock_of_another_machine_is_left_and_its_file_named(tmp_path):
    (tmp_path / HOLDER).write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "today"}))
    with pytest.raises(UserError, match=f"process 1 on elsewhere.*delete .*{HOLDER}"):
        lock_run(tmp_path)
    unlock_run(tmp_path)
    assert (tmp_path / HOLDER).exists()


@pytest.mark.parametrize("content", ["", "[1]", '{"pid": -1, "host": "x"}', '{"pid": "x"}'])
def test_a_damaged_lock_is_taken_over(tmp_path, content, capsys):
    (tmp_path / HOLDER).write_text(content)
    lock_run(tmp_path)
    assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
    assert "taken over" in capsys.readouterr().out
    unlock_run(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_lock_whose_number_another_process_has_now_is_taken_over(tmp_path, capsys):
    holder = {"pid": os.getppid(), "host": platform.node(), "started": "long ago"}
    (tmp_path / HOLDER).write_text(json.dumps(holder))
    lock_run(tmp_path)
    unlock_run(tmp_path)
    assert "taken over" in capsys.readouterr().out


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, capsys, monkeypatch):
    def refuse(self, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    (tmp_path / HOLDER).write_text(json.dumps({"pid": os.getppid(), "host": platform.node()}))
    with pytest.raises(UserError, match=f"process {os.getppid()} on"):
        lock_run(tmp_path)
    (tmp_path / HOLDER).unlink()
    lock_run(tmp_path)
    assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
    unlock_run(tmp_path)
    assert "has no locks" in capsys.readouterr().out and os.listdir(tmp_path) == []


def test_two_locks_in_turn_leave_nothing(tmp_path):
    for _ in range(2):
        lock_run(tmp_path)
        assert (tmp_path / HOLDER).exists()
        unlock_run(tmp_path)
        unlock_run(tmp_path)
        assert os.listdir(tmp_path) == []


# --- a run ---


def test_metrics_has_the_documented_form_from_the_first_moment(tmp_path):
    with Run(tmp_path, {**HEADER, "environment": environment()}) as run:
        assert list(read(tmp_path)) == ["format", *HEADER, "environment", "epochs", "best"]
        run.add_epoch(
            {
                "epoch": 1,
                "train": {"loss": torch.tensor(0.5)},
                "valid": {"bbox": {"mAP": float("nan")}},
            }
        )
        run.set(best={"epoch": 1, "metric": "bbox/mAP", "value": 0.25, "weights": "ema"})
        run.set(test={"bbox": {"mAP": 0.5}})
    metrics = read(tmp_path)
    assert metrics["format"] == 1 and metrics["stage"] == "detector"
    assert metrics["epochs"] == [
        {"epoch": 1, "train": {"loss": 0.5}, "valid": {"bbox": {"mAP": None}}}
    ]
    assert metrics["best"]["weights"] == "ema" and metrics["test"] == {"bbox": {"mAP": 0.5}}


def make_run(folder: Path, epochs: int) -> None:
    with Run(folder, HEADER) as run:
        for epoch in range(1, epochs + 1):
            run.add_epoch({"epoch": epoch})
            run.scalars({"2 losses/loss": float(epoch)}, epoch)
        run.set(best={"epoch": epochs, "value": 0.5})


def test_resume_drops_what_lies_beyond_the_saved_state(tmp_path):
    make_run(tmp_path, 3)
    with Run(tmp_path, {**HEADER, "args": {"epochs": 9}}, done_epochs=2) as run:
        assert run.metrics["best"] is None  # it was of epoch 3
        run.add_epoch({"epoch": 3, "again": True})
        run.scalars({"2 losses/loss": 30.0}, 3)
    assert read(tmp_path)["epochs"] == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3, "again": True}]
    assert read(tmp_path)["args"] == {"epochs": 9}
    assert scalars(tmp_path, "2 losses/loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_resume_keeps_a_best_that_still_stands(tmp_path):
    make_run(tmp_path, 2)
    Run(tmp_path, HEADER, done_epochs=2).close()
    assert (
        read(tmp_path)["best"] == {"epoch": 2, "value": 0.5} and len(read(tmp_path)["epochs"]) == 2
    )


@pytest.mark.parametrize(
    "content", ["", '{"format": 1, "epo', "[]", "{}", '{"epochs": [{}], "best": null}', "\udcff"]
)
def test_a_damaged_metrics_file_is_set_aside(tmp_path, capsys, content):
    content = content.encode("utf-8", "surrogateescape")
    (tmp_path / "metrics.damaged-1.json").write_text("an earlier one")
    (tmp_path / "metrics.json").write_bytes(content)
    with Run(tmp_path, HEADER, done_epochs=4) as run:
        run.add_epoch({"epoch": 5})
    assert read(tmp_path)["epochs"] == [{"epoch": 5}]
    assert (tmp_path / "metrics.damaged-1.json").read_text() == "an earlier one"
    assert (tmp_path / "metrics.damaged-2.json").read_bytes() == content
    note = "metrics.json is damaged: kept as metrics.damaged-2.json, a new one begins at epoch 5"
    assert note in capsys.readouterr().out and note in (tmp_path / "log.txt").read_text(
        encoding="utf-8"
    )


def epoch(number: int, regular: float | None, ema: float | None) -> dict:
    return {
        "epoch": number,
        "valid": {"bbox": {"mAP": regular}},
        "valid_ema": {"bbox": {"mAP": ema}},
    }


def test_what_others_ask_metrics_json_for(tmp_path):
    assert not has_test_scores(tmp_path) and highest_box_map(tmp_path) == {}
    with Run(tmp_path, HEADER) as run:
        assert best_scores(tmp_path) == ("regular", {})
        run.add_epoch(epoch(1, 0.25, None))
        assert highest_box_map(tmp_path) == {"regular": 0.25}
        run.add_epoch(epoch(2, 0.5, 0.75))
        run.add_epoch({"epoch": 3})  # with --eval_every 2
        run.set(best={"epoch": 2, "metric": "bbox/mAP", "value": 0.75, "weights": "ema"})
        assert best_scores(tmp_path) == ("ema", {"bbox": {"mAP": 0.75}})
        assert highest_box_map(tmp_path) == {"regular": 0.5, "ema": 0.75}
        assert not has_test_scores(tmp_path)
        run.set(test={"bbox": {"mAP": 0.5}})
    assert has_test_scores(tmp_path)
    epochs, best = first_epochs(tmp_path, 1)
    assert [record["epoch"] for record in epochs] == [1] and best is None
    (tmp_path / "metrics.json").write_text("[1]")
    assert not has_test_scores(tmp_path) and highest_box_map(tmp_path) == {}


def test_events_that_a_kill_cut_short_stay_readable(tmp_path, capsys):
    make_run(tmp_path, 2)
    (events,) = (tmp_path / "tb").iterdir()
    events.write_bytes(events.read_bytes()[:-5])
    with Run(tmp_path, HEADER, done_epochs=1) as run:
        run.scalars({"2 losses/loss": 2.0}, 2)
    assert "damaged" not in capsys.readouterr().out
    assert scalars(tmp_path, "2 losses/loss") == [(1, 1.0), (2, 2.0)]


def test_tensorboard_gets_nested_numbers_and_pictures(tmp_path):
    values = {
        "bbox": {
            "mAP": np.float64(0.5),
            "mAP_small": None,
            "per_class": {"cells": {"mAP": torch.tensor(0.25)}},
        }
    }
    with Run(tmp_path, HEADER) as run:
        run.scalars(score_curves(values, "ema"), 7)
        run.image("3 pictures/0", Image.new("RGBA", (8, 6), "red"), 6)
        run.image("3 pictures/0", Image.new("RGBA", (2048, 6), "red"), 7)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    tags = {"1 scores/bbox mAP (ema)", "8 scores by class/bbox mAP cells (ema)"}
    assert set(events.Tags()["scalars"]) == tags
    first, second = events.Images("3 pictures/0")
    assert (first.step, first.width, first.height) == (6, 8, 6)
    assert (second.step, second.width, second.height) == (7, 1024, 3)


METRICS = {"mAP": 0.5, "mAP50": 0.75, "AR100": 0.625, "per_class": {"cells": {"mAP": 0.5}}}


def test_scores_come_first_and_have_one_name_in_every_stage(tmp_path):
    train = {"loss": 1.0, "loss_box": 0.5, "loss_box_0": 0.5, "lr": 1e-4, "images_per_s": 9.0}
    with Run(tmp_path, HEADER) as run:
        StepCurves(run.scalars, steps=10).add(1, {"loss": 1.0, "objects": 3.0}, [1e-4])
        run.scalars(train_curves(train), 1)
        run.scalars(score_curves({"bbox": METRICS, "segm": METRICS, "mask": {"giou": 0.5}}), 1)
        run.scalars(score_curves({"bbox": METRICS}, "ema"), 1)
        run.scalars({best_score("segm/mAP"): 0.5}, 1)
    tags = sorted(EventAccumulator(str(tmp_path / "tb")).Reload().Tags()["scalars"])
    assert tags[:7] == [
        "1 scores/bbox mAP",
        "1 scores/bbox mAP (ema)",
        "1 scores/bbox mAP50",
        "1 scores/bbox mAP50 (ema)",
        "1 scores/segm mAP",
        "1 scores/segm mAP (best)",
        "1 scores/segm mAP50",
    ]
    groups = sorted({tag.split("/")[0] for tag in tags})
    assert groups == [
        "1 scores",
        "2 losses",
        "2 losses by step",
        "4 learning rate",
        "4 learning rate by step",
        "5 training",
        "6 losses by layer",
        "7 more scores",
        "8 scores by class",
    ]
    assert set(FINAL_SCORES) - set(tags) == {best_score("bbox/mAP")}


def test_curves_by_step_are_means_and_leave_out_skipped_steps():
    points = []
    curves = StepCurves(lambda values, step: points.append((step, values)), steps=150)
    for step in range(1, 8):
        loss = float("nan") if step == 2 else float(step)
        curves.add(step, {"loss": loss, "grad_norm": 2.0 * loss, "objects": 7.0}, [1e-3, 1e-4])
    assert points == [
        (
            step,
            {
                "4 learning rate by step/highest": 1e-3,
                "4 learning rate by step/lowest": 1e-4,
                "2 losses by step/loss": mean,
                "5 training by step/grad_norm": 2 * mean,
            },
        )
        for step, mean in ((3, 2.0), (6, 5.0))
    ]


def points_of(folder: Path, tag: str) -> list[int]:
    return [step for step, _ in scalars(folder, tag)]


def write_steps(run: Run, first: int, last: int) -> None:
    """Steps FIRST..LAST of a run whose epochs have four."""
    curves = StepCurves(run.scalars, steps=4)
    for step in range(first, last + 1):
        curves.add(step, {"loss": float(step)}, [1e-3])
        if step % 4 == 0:
            run.scalars(train_curves({"loss": float(step)}), step // 4)
            run.image("3 pictures/0", Image.new("RGB", (4, 4)), step // 4)


@pytest.mark.parametrize("saved", [8, 10])  # after epoch 2, and within epoch 3
def test_curves_of_a_resumed_run_have_no_gap_and_no_point_twice(tmp_path, saved):
    with pytest.raises(KeyboardInterrupt), Run(tmp_path, HEADER) as run:
        write_steps(run, 1, 13)
        raise KeyboardInterrupt
    with Run(tmp_path, HEADER, done_epochs=2, done_steps=saved) as run:
        write_steps(run, saved + 1, 16)
    assert points_of(tmp_path, "2 losses by step/loss") == list(range(1, 17))
    assert points_of(tmp_path, "2 losses/loss") == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [picture.step for picture in events.Images("3 pictures/0")] == [1, 2, 3, 4]


def test_curves_of_an_earlier_version_go_on_after_their_epochs(tmp_path):
    """Its tags have no group's number."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "tb")) as writer:
        for epoch in (1, 2, 3):
            writer.add_scalar("train/loss", float(epoch), epoch)
    with Run(tmp_path, HEADER, done_epochs=2, done_steps=500) as run:
        run.scalars(train_curves({"loss": 30.0}), 3)
    assert points_of(tmp_path, "train/loss") == [1, 2]
    assert points_of(tmp_path, "2 losses/loss") == [3]


def test_settings_are_texts_and_hyperparameters_once_after_a_resume(tmp_path):
    settings = {"epochs": 2, "lr": 1e-4, "ema": True, "checkpoint": None, "fixed": ["a", "b"]}
    with Run(tmp_path, HEADER) as run:
        run.describe(settings, {"config.yaml": "epochs: 2\nlr: 0.0001"})
    with Run(tmp_path, HEADER, done_epochs=1, done_steps=4) as run:
        run.describe(settings | {"epochs": 9}, {"config.yaml": "epochs: 9"})
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    (text,) = events.Tensors("settings/config.yaml")
    assert text.tensor_proto.string_val == [b"    epochs: 9"]
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    start = HParamsPluginData.FromString(plugin.content).session_start_info
    values = {}
    for name, value in start.hparams.items():
        values[name] = getattr(value, value.WhichOneof("kind"))
    assert values == {"epochs": 9, "lr": 1e-4, "ema": True, "fixed": "['a', 'b']"}
    plugin = events.SummaryMetadata("_hparams_/experiment").plugin_data
    experiment = HParamsPluginData.FromString(plugin.content).experiment
    assert [info.name.tag for info in experiment.metric_infos] == FINAL_SCORES


def test_what_a_run_can_do_without_does_not_end_it(tmp_path, capsys, monkeypatch):
    def refuse(*args):
        raise RuntimeError("no events\ntoday")

    monkeypatch.setattr(tensorboard, "RecordWriter", refuse)
    with Run(tmp_path, HEADER) as run:
        run.scalars({"2 losses/loss": 1.0}, 1)
        for _ in range(2):
            with run.optional("drawing"):
                raise ValueError("x1 must be greater")
        with pytest.raises(KeyboardInterrupt), run.optional("drawing"):
            raise KeyboardInterrupt
    said = capsys.readouterr().out
    assert (
        said.count("drawing failed (ValueError: x1 must be greater): training goes on without") == 1
    )
    assert "for TensorBoard failed (RuntimeError: no events today)" in said


def test_an_unwritable_run_folder_is_a_user_error(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(UserError, match="cannot write to the folder"):
        Run(tmp_path, HEADER)
    assert not isinstance(sys.stdout, log._Tee)


# --- the log ---


def log_of(folder: Path) -> list[str]:
    return (folder / "log.txt").read_text(encoding="utf-8").splitlines()


def test_the_log_has_both_streams_and_only_the_last_state_of_a_bar(tmp_path, capsys):
    with Run(tmp_path, HEADER):
        print("STAGE 1 ✓")
        for percent in range(0, 101, 10):
            sys.stderr.write(f"\r{percent}%|##|")
        sys.stderr.write("\n")
        for percent in range(3):
            sys.stderr.write(f"\x1b[A\rbar {percent}\r")
            sys.stderr.write("      \r")
        print("unfinished", end="")
    first, *lines = log_of(tmp_path)
    assert first.startswith("--- ")
    time.strptime(lines[0][:19], log.TIME)
    assert [line[20:] for line in lines] == ["STAGE 1 ✓", "100%|##|", "unfinished", "bar 2"]
    out, err = capsys.readouterr()
    assert out == "STAGE 1 ✓\nunfinished" and err.count("%") == 11


def test_a_progress_bar_leaves_one_line(tmp_path, capsys):
    from tqdm import tqdm

    with Run(tmp_path, HEADER):
        for _ in tqdm(range(500), desc="epoch 1", mininterval=0):
            pass
    assert capsys.readouterr().err.count("\r") > 100
    assert len(log_of(tmp_path)) == 2 and "epoch 1: 100%" in log_of(tmp_path)[1]


def test_the_console_comes_back_and_a_second_close_does_nothing(tmp_path, capsys):
    streams = sys.stdout, sys.stderr
    run = Run(tmp_path, HEADER)
    assert sys.stdout is not streams[0]
    run.close()
    run.close()
    assert (sys.stdout, sys.stderr) == streams
    print("not for the log")
    assert len(log_of(tmp_path)) == 1


def test_the_log_says_what_ended_a_run_and_is_appended_to(tmp_path, capsys):
    with pytest.raises(UserError), Run(tmp_path, HEADER):
        raise UserError("no masks")
    Run(tmp_path, HEADER).close()
    assert log_of(tmp_path)[1].endswith(" ended by UserError: no masks")
    assert len(log_of(tmp_path)) == 3


def test_printing_goes_on_when_the_log_cannot_be_written(tmp_path, capsys):
    with Run(tmp_path, HEADER) as run:
        run._log.file.close()
        print("still here")
    assert capsys.readouterr().out == "still here\n"


# --- environment ---


def test_environment_is_json_and_tells_hardware_and_command(tmp_path):
    found = environment()
    assert (
        found["torch"] == torch.__version__ and found["device"] == "cpu" and found["threads"] >= 1
    )
    assert found["cpu"] and found["os"] and found["command"]
    write_json(tmp_path / "environment.json", found)
    assert json.loads((tmp_path / "environment.json").read_text(encoding="utf-8")) == found


def test_commit_is_the_hash_with_a_mark_for_changed_files(tmp_path, monkeypatch):
    monkeypatch.setattr(environment_module, "REPOSITORY", tmp_path)
    assert environment()["commit"] is None

    def git(*arguments):
        author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("no git")
    assert environment()["commit"] is None
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert environment()["commit"] == commit
    (tmp_path / "file").write_text("2")
    assert environment()["commit"] == commit + "-dirty"
    monkeypatch.setattr(
        environment_module, "REPOSITORY", tmp_path / "inside"
    )  # an archive unpacked inside a repository
    (tmp_path / "inside").mkdir()
    assert environment()["commit"] is None
