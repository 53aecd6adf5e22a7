"""Stopping and going on: a resumed run equals one never stopped, and faults cost no results."""

from __future__ import annotations

import json
import math
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import quick_flags

import rfdetr.distributed
import rfdetr.main
import rfdetr.training.engine
import rfdetr.training.report
import train_detector_stage1
import train_seg_single_stage
import train_seg_stage2
from rfdetr.console import Stopped, UserError
from rfdetr.console import run_script as as_a_script
from rfdetr.data.demo import make_demo
from rfdetr.device import Precision
from rfdetr.models import segmentation
from rfdetr.runs.metrics_file import earlier_commands
from rfdetr.training.engine import Progress
from rfdetr.training.keeper import check_history
from rfdetr.weights import checkpoint
from testkit.finished_runs import differences
from testkit.in_process import output_of

pytestmark = pytest.mark.slow

SCRIPTS = {
    "stage1": train_detector_stage1.main,
    "stage2": train_seg_stage2.main,
    "single": train_seg_single_stage.main,
}


def load(path: Path) -> dict:
    return torch.load(path)


def assert_same_run(stopped: Path, whole: Path) -> None:
    """Weights, averages, optimizer, random state and figures are equal, bit for bit."""
    assert differences(stopped, whole) == []


def curves(run: Path) -> dict[str, list[tuple]]:
    """What TensorBoard shows of a run, times aside: points by tag, and the pictures' epochs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb"), {"scalars": 0, "images": 0}).Reload()
    points = {}
    for tag in events.Tags()["scalars"]:
        if not tag.startswith("5 training/"):
            points[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    for tag in events.Tags()["images"]:
        points[tag] = [event.step for event in events.Images(tag)]
    return points


def signal_at_step(monkeypatch, step: int, number: int) -> None:
    """The process gets a signal in its `step`-th optimizer step, counted from here."""
    optimise = rfdetr.training.engine.optimise
    done = []

    def interrupted(*args):
        done.append(1)
        if len(done) == step:
            signal.raise_signal(number)
        return optimise(*args)

    monkeypatch.setattr(rfdetr.training.engine, "optimise", interrupted)


# optimizer step, signal, exit status: at the end of the first epoch, and inside the second
STOPS = [(2, signal.SIGINT, 130), (3, signal.SIGTERM, 143)]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_stopped_by_a_signal_goes_on_as_if_nothing_was(
    kind, few, call, capsys, monkeypatch, request
):
    flags = [*quick_flags(few), "--epochs", 2]
    if kind == "stage1":
        flags += ["--multi_scale", 1, "--drop_path", 0.5, "--tensorboard", 1]
    if kind == "stage2":
        flags += ["--checkpoint", request.getfixturevalue("shrunk").folder]
    call(SCRIPTS[kind], *flags, "--output_dir", "whole")
    for step, number, status in STOPS:
        folder = Path(f"stopped{step}")
        with monkeypatch.context() as patched:
            signal_at_step(patched, step, number)
            with pytest.raises(Stopped) as stopped:
                call(SCRIPTS[kind], *flags, "--output_dir", folder)
        assert stopped.value.code == status
        state = load(folder / "checkpoint.pt")
        assert state["training"]["progress"]["step"] == step
        words = shlex.split(capsys.readouterr().out.splitlines()[-1])
        assert words[0] == "python" and words[-2:] == ["--resume", str(folder)]
        call(SCRIPTS[kind], *words[2:])
        assert_same_run(folder, Path("whole"))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
        train = json.loads((folder / "metrics.json").read_text())["epochs"][0]["train"]
        if step == 2:  # the first epoch had its steps behind it: nothing to tell a speed from
            assert lines[0].endswith(" elapsed") or " elapsed  new best" in lines[0]
            assert "images/s" not in lines[0] and train["images_per_s"] is None
        assert "images/s" in lines[-1] and lines[-1].split("  new")[0].endswith(" left")
        if kind == "stage1":
            assert curves(folder) == curves(Path("whole"))


def test_resume_auto_and_more_epochs(few, call, capsys):
    call(train_detector_stage1.main, *quick_flags(few))
    folder = Path("runs/detector_tiny_32_1")
    with pytest.raises(UserError, match="has finished its 1 epoch[.].*--epochs"):
        call(train_detector_stage1.main, "--resume")
    call(
        train_detector_stage1.main, "--resume", "--epochs", 3
    )  # the run's own flags are the defaults
    assert [path.name for path in Path("runs").iterdir()] == ["detector_tiny_32_1"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2, 3]
    assert metrics["args"]["batch"] == 2 and metrics["args"]["resolution"] == 32
    assert load(folder / "last.pt")["training"]["progress"]["step"] == 6


def test_settings_that_a_resume_changes_are_said_and_both_are_kept(few, call, capsys):
    folder = Path("run")
    call(train_detector_stage1.main, *quick_flags(few), "--lr", 0.002, "--output_dir", folder)
    capsys.readouterr()
    flags = ["--resume", folder, "--epochs", 2, "--lr", 0.001, "--batch", 2, "--min_steps", 6]
    call(train_detector_stage1.main, *flags)
    said = capsys.readouterr().out
    assert "so that it has 6 optimizer steps (8 in all" in said  # two before
    assert "--lr: 0.002 before, 0.001 from epoch 2 on" in said
    assert "--epochs: 1 before, 2 from epoch 2 on" in said
    assert "--batch:" not in said  # the same as before
    metrics = json.loads((folder / "metrics.json").read_text())
    first, second = metrics["commands"]
    assert (first["first_epoch"], first["changed"]) == (1, {})
    assert (second["first_epoch"], second["changed"]) == (
        2,
        {"epochs": [1, 2], "lr": [0.002, 0.001], "min_steps": [2, 6]},
    )
    assert "--resume run" in second["command"] and second["when"]
    assert metrics["args"]["lr"] == 0.001
    config = (folder / "config.yaml").read_text()
    assert "# lr: 0.002 before epoch 2" in config and yaml.safe_load(config)["lr"] == 0.001


def test_a_resumed_run_that_fails_before_it_saves_leaves_the_settings(few, call, monkeypatch):
    folder = Path("run")
    call(train_detector_stage1.main, *quick_flags(few), "--lr", 0.002, "--output_dir", folder)
    files = [folder / "config.yaml", folder / "metrics.json"]
    before = [file.read_bytes() for file in files]

    def fail(number, losses):
        raise RuntimeError("no step succeeds")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patch_losses(patched, fail)
        call(train_detector_stage1.main, "--resume", folder, "--epochs", 2, "--lr", 1e9)
    assert [file.read_bytes() for file in files] == before
    call(train_detector_stage1.main, "--resume", folder, "--epochs", 2)
    assert yaml.safe_load(files[0].read_text())["lr"] == 0.002
    metrics = json.loads(files[1].read_text())
    assert [command["changed"] for command in metrics["commands"]] == [{}, {"epochs": [1, 2]}]


def test_commands_of_a_run_that_lists_none(tmp_path):
    assert earlier_commands(tmp_path) == []
    file = tmp_path / "metrics.json"
    for damaged in ("{", "[]", '{"commands": 3}', '{"commands": [3]}', '{"epochs": []}'):
        file.write_text(damaged)
        assert earlier_commands(tmp_path) == []
    file.write_text('{"environment": {"command": "train.py"}}')
    (only,) = earlier_commands(tmp_path)
    assert only["command"] == "train.py" and only["changed"] == {}


def test_resume_auto_without_any_run(few, call):
    with pytest.raises(UserError, match="no run under runs/detector_"):
        call(train_detector_stage1.main, *quick_flags(few), "--resume", "auto")


def test_a_resumed_run_takes_a_new_learning_rate(few, call):
    call(train_detector_stage1.main, *quick_flags(few))
    call(
        train_detector_stage1.main,
        "--resume",
        "--epochs",
        2,
        "--lr",
        "1e-6",
        "--lr_encoder",
        "1e-6",
        "--amp",
        "bf16",
    )
    content = load(Path("runs/detector_tiny_32_1/last.pt"))
    assert (content["args"]["lr"], content["args"]["amp"]) == (1e-6, "bf16")
    assert {group["base_lr"] for group in content["training"]["optimizer"]["param_groups"]} == {
        1e-6
    }


def test_a_resumed_run_may_drop_the_average(few, call):
    """The average of the first epoch stays the best, and the run goes on without one."""
    call(train_detector_stage1.main, *quick_flags(few))
    path = Path("runs/detector_tiny_32_1/last.pt")
    content = load(path)
    content["training"]["each"] = {"regular": 0.1, "ema": 0.9}
    content["training"]["best"] |= {"value": 0.9, "weights": "ema"}
    torch.save(content, path)
    path.with_name("checkpoint.pt").unlink()
    call(train_detector_stage1.main, "--resume", "--epochs", 2, "--ema", 0)
    assert load(path)["ema"] is None


def test_a_resumed_run_may_start_an_average(few, call):
    call(train_detector_stage1.main, *quick_flags(few), "--ema", 0, "--lr", 0, "--lr_encoder", 0)
    call(train_detector_stage1.main, "--resume", "--epochs", 2, "--ema", 1)
    content = load(Path("runs/detector_tiny_32_1/last.pt"))
    # the weights never moved, so that their average is the weights
    assert all(
        torch.allclose(content["ema"][name], value, atol=1e-6)
        for name, value in content["model"].items()
    )


def test_timed_saves_inside_an_epoch(few, call, monkeypatch):
    saved = []
    save = rfdetr.main.checkpoint.save
    monkeypatch.setattr(
        rfdetr.main.checkpoint,
        "save",
        lambda path, content: (saved.append(path.name), save(path, content)),
    )
    call(train_detector_stage1.main, *quick_flags(few), "--output_dir", "rarely")
    rarely = saved.count("checkpoint.pt")
    call(
        train_detector_stage1.main, *quick_flags(few), "--output_dir", "often", "--save_minutes", 0
    )
    assert (rarely, saved.count("checkpoint.pt") - rarely) == (1, 3)  # one after the epoch


def edit_state(run: Path, change) -> None:
    """Apply `change(content)` to what a run goes on from."""
    content = load(run / "last.pt")
    change(content)
    torch.save(content, run / "last.pt")
    (run / "checkpoint.pt").unlink(missing_ok=True)


def test_the_schedule_follows_the_share_of_work_done():
    progress = Progress(epoch=2, step_in_epoch=3, step=11, steps=4)
    assert progress.position == progress.step
    progress.count_epochs_in(8)
    assert (progress.position, progress.step_in_epoch, progress.step) == (2 * 8 + 6, 6, 11)
    progress.count_epochs_in(1)
    assert (progress.position, progress.step_in_epoch) == (2, 0)
    early = Progress(epoch=1, step_in_epoch=9)  # of a version that did not save the steps
    early.count_epochs_in(4)
    assert (early.position, early.step_in_epoch) == (8, 4)


def test_other_steps_in_an_epoch_leave_the_schedule_where_it_was(few, call, monkeypatch):
    """Half of the work done is the middle of the schedule, however many steps the rest has."""
    call(train_detector_stage1.main, *quick_flags(few), "--min_steps", 8)
    run = Path("runs/detector_tiny_32_1")
    positions = []
    schedule = rfdetr.training.optim.Schedule.__call__

    def noted(self, step):
        positions.append(step / self.total)
        return schedule(self, step)

    monkeypatch.setattr(rfdetr.training.optim.Schedule, "__call__", noted)
    call(
        train_detector_stage1.main,
        "--resume",
        run,
        "--epochs",
        2,
        "--min_steps",
        2,
        "--batch",
        1,
        "--accum",
        1,
    )
    assert positions == [0.5, 0.625, 0.75, 0.875]  # four images, one by one
    assert load(run / "last.pt")["training"]["progress"]["step"] == 12


def test_a_changed_dataset_is_said_and_its_unread_images_are_forgotten(few, call, capsys, tmp_path):
    call(train_detector_stage1.main, *quick_flags(few))
    run = Path("runs/detector_tiny_32_1")
    edit_state(run, lambda content: content["training"]["progress"].update(unread=[3]))
    make_demo(tmp_path / "other", train=2, valid=2, test=0, size=64, seed=5)
    call(
        train_detector_stage1.main, "--resume", run, "--epochs", 2, "--dataset", tmp_path / "other"
    )
    assert "train and valid of" in capsys.readouterr().out
    assert load(run / "last.pt")["training"]["progress"]["unread"] == []
    # a checkpoint that does not tell its data keeps the numbers that there are
    edit_state(run, lambda content: content["training"].pop("data"))
    edit_state(run, lambda content: content["training"]["progress"].update(unread=[1, 3]))
    call(train_detector_stage1.main, "--resume", run, "--epochs", 3)
    assert "other images" not in capsys.readouterr().out
    assert load(run / "last.pt")["training"]["progress"]["unread"] == [1]


def test_a_best_file_that_a_kill_left_and_metrics_tell_the_same(few, call, monkeypatch):
    """Killed between best.pt and last.pt, and worse when the epoch is run again."""
    scores = iter([0.1, 0.5, 0.2, 0.6])
    save = rfdetr.training.keeper.CheckpointKeeper.save
    monkeypatch.setattr(
        rfdetr.main.SplitEvaluator, "evaluate", lambda *args: {"bbox": {"mAP": next(scores)}}
    )
    monkeypatch.setattr(rfdetr.training.report, "format_table", lambda scores: "")
    run = Path("run")
    told = []

    def killed(keeper, *names):
        if keeper.best["epoch"] == 2:
            raise KeyboardInterrupt
        save(keeper, *names)

    def compared(keeper, *names):
        best = load(run / "best.pt")
        metrics = json.loads((run / "metrics.json").read_text())
        told.append((best["epoch"], best["scores"]["bbox"]["mAP"]))
        assert told[-1] == (metrics["best"]["epoch"], metrics["best"]["value"])
        save(keeper, *names)

    monkeypatch.setattr(rfdetr.training.keeper.CheckpointKeeper, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        call(
            train_detector_stage1.main,
            *quick_flags(few),
            "--epochs",
            3,
            "--ema",
            0,
            "--output_dir",
            "run",
        )
    monkeypatch.setattr(rfdetr.training.keeper.CheckpointKeeper, "save", compared)
    call(train_detector_stage1.main, "--resume", run, "--save_minutes", 0)
    assert told == [(2, 0.5)] * 5 + [(3, 0.6)]  # two steps and an epoch's end, twice
    assert load(run / "checkpoint_best_regular.pth")["epoch"] == 3


def test_pictures_that_fail_end_no_run_and_come_after_last_pt(few, call, monkeypatch, capsys):
    found = []

    def pictures(judge, *args):
        found.append(load(Path("runs/detector_tiny_32_1/last.pt"))["training"]["progress"]["epoch"])
        raise ValueError("x1 must be greater than or equal to x0")

    gains = iter([0.1, 0.2])
    monkeypatch.setattr(
        rfdetr.main.SplitEvaluator, "evaluate", lambda *args: {"bbox": {"mAP": next(gains)}}
    )
    monkeypatch.setattr(rfdetr.training.report, "format_table", lambda scores: "")
    monkeypatch.setattr(rfdetr.main.SplitEvaluator, "pictures", pictures)
    call(train_detector_stage1.main, *quick_flags(few), "--epochs", 2, "--ema", 0)
    assert found == [1, 2]
    assert capsys.readouterr().out.count("predictions failed (ValueError: x1 must be") == 1


@pytest.mark.parametrize(
    "flag, value",
    [
        ("batch", 0),
        ("batch", 2.5),
        ("lr", math.nan),
        ("lr", [1]),
        ("epochs", "many"),
        ("ema", 5),
        ("amp", "fp8"),
    ]
    + [
        ("dataset", {}),
        ("device", 3),
        ("pretrain_exclude_keys", "a*"),
        ("seed", True),
        ("dataset", "a\0b"),
    ],
)
def test_a_strangers_settings_are_checked_as_flags_are(flag, value, few, call, finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    torch.save(finished | {"args": finished["args"] | {flag: value}}, run / "last.pt")
    with pytest.raises(UserError, match=rf"{re.escape(str(run))}.* {flag}: "):
        call(train_detector_stage1.main, "--resume", run, "--epochs", 2)


@pytest.mark.parametrize(
    "change",
    [
        {"best": 5},
        {"best": {"epoch": 1}},
        {"each": [1]},
        {"each": {"regular": "x"}},
        {"epochs_without_gain": "x"},
    ]
    + [{"nan_batches": "x"}, {"nan_batches": [1]}, {"scaler": {"scale": "x"}}],
)
def test_a_strangers_history_is_refused(change, finished):
    check_history(finished["training"])
    with pytest.raises((ValueError, AttributeError)):
        check_history(finished["training"] | change)


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory) -> dict:
    """The last.pt of a run of one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    output_of(train_detector_stage1.main, *quick_flags(few), "--output_dir", folder / "run")
    return load(folder / "run/last.pt")


# ---------------------------------------------------------------- faults while training


def patch_losses(monkeypatch, change) -> list[int]:
    """`change(call number, losses)` replaces each batch's losses; returns the batches' sizes."""
    original = rfdetr.training.objective.DetectorObjective.__call__
    calls = []

    def changed(self, model, batch, objects):
        calls.append(len(batch))
        return change(len(calls), original(self, model, batch, objects))

    monkeypatch.setattr(rfdetr.training.objective.DetectorObjective, "__call__", changed)
    return calls


def set_precision(monkeypatch, amp: str) -> list[str]:
    """Flags for a precision; fp16 is forced, since the scripts refuse it on a CPU."""
    if amp != "fp16":
        return ["--amp", amp]
    monkeypatch.setattr(
        rfdetr.main, "pick_precision", lambda amp, device: Precision(device, torch.float16)
    )
    return []


PRECISIONS = pytest.mark.parametrize("amp", ["off", "fp16"])  # bf16 has no way of its own


def fail_once(number, losses):
    if number == 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return losses


@PRECISIONS
def test_out_of_memory_halves_the_batch_and_changes_no_gradient(
    amp, few, call, capsys, monkeypatch
):
    flags = [*quick_flags(few), "--batch", 4, "--min_steps", 1, *set_precision(monkeypatch, amp)]
    call(train_detector_stage1.main, *flags, "--output_dir", "plenty")

    with monkeypatch.context() as patched:
        patch_losses(patched, fail_once)
        call(train_detector_stage1.main, *flags, "--output_dir", "little")
    assert "out of memory: going on with --batch 2" in capsys.readouterr().out
    plenty, little = (load(Path(name, "last.pt"))["training"] for name in ("plenty", "little"))
    assert (plenty["progress"]["micro_batch"], little["progress"]["micro_batch"]) == (4, 2)
    moments = [
        [s["exp_avg"] for s in run["optimizer"]["state"].values()] for run in (plenty, little)
    ]
    for a, b in zip(*moments):  # after one step the first moment is the gradient's share
        if amp == "off":
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
        else:  # 8 or 11 bits, which another order of sums moves
            assert (a - b).norm() <= 0.05 * a.norm() + 1e-6


def test_a_smaller_batch_is_remembered_by_a_resumed_run(few, call, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patch_losses(patched, fail_once)
        call(train_detector_stage1.main, *quick_flags(few), "--batch", 4)
    assert "out of memory" in capsys.readouterr().out
    sizes = patch_losses(monkeypatch, lambda number, losses: losses)
    call(train_detector_stage1.main, "--resume", "--epochs", 2)
    assert sizes == [2, 2, 2, 2]  # two steps of four images


def test_out_of_memory_with_one_image_gives_the_advice_that_is_left(few, call, monkeypatch):
    def fail(number, losses):
        raise torch.OutOfMemoryError("CUDA out of memory")

    patch_losses(monkeypatch, fail)
    with pytest.raises(UserError, match="single image.*--resolution.*--grad_checkpoint 1"):
        call(train_detector_stage1.main, *quick_flags(few))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 3 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:20],
)
def test_memory_that_runs_out_elsewhere_ends_with_the_advice(error, few, call, capsys, monkeypatch):
    def step(*args, **options):  # the optimizer's first one takes twice the weights' memory
        raise error

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(SystemExit) as left:
        call(lambda argv: as_a_script(train_detector_stage1.main, argv), *quick_flags(few))
    text = capsys.readouterr().err
    assert (
        left.value.code == 2
        and "out of memory (" in text
        and "--grad_checkpoint 1" in text
        and "defect" not in text
    )


@PRECISIONS
def test_a_step_without_a_finite_loss_is_skipped_and_recorded(amp, few, call, capsys, monkeypatch):
    def spoil(number, losses):
        return (
            losses | {"loss_class": losses["loss_class"] * float("nan")} if number == 1 else losses
        )

    flags = set_precision(monkeypatch, amp)
    with monkeypatch.context() as patched:
        patch_losses(patched, spoil)
        call(train_detector_stage1.main, *quick_flags(few), *flags)
    folder = Path("runs/detector_tiny_32_1")
    (entry,) = json.loads((folder / "nan_batches.json").read_text())
    assert (entry["epoch"], entry["step"], len(entry["images"])) == (1, 1, 2)
    assert all(Path(image["file"]).exists() for image in entry["images"])
    assert "is not finite" in capsys.readouterr().out
    content = load(folder / "last.pt")
    assert all(tensor.isfinite().all() for tensor in content["model"].values())
    assert {s["step"].item() for s in content["training"]["optimizer"]["state"].values()} == {
        1.0
    }  # of two
    call(train_detector_stage1.main, "--resume", folder, "--epochs", 2, *flags)
    assert json.loads((folder / "nan_batches.json").read_text()) == [entry]
    with monkeypatch.context() as patched:
        patch_losses(patched, spoil)
        call(train_detector_stage1.main, "--resume", folder, "--epochs", 3, *flags)
    first, second = json.loads((folder / "nan_batches.json").read_text())
    assert first == entry and (second["epoch"], second["step"]) == (3, 5)


def test_the_record_names_the_images_of_all_processes(few, call, monkeypatch):
    monkeypatch.setattr(
        rfdetr.distributed, "gather_objects", lambda value: [value, value]
    )  # as of two
    patch_losses(
        monkeypatch, lambda number, losses: {name: v * float("nan") for name, v in losses.items()}
    )
    call(train_detector_stage1.main, *quick_flags(few))
    entries = json.loads(Path("runs/detector_tiny_32_1/nan_batches.json").read_text())
    assert [len(entry["images"]) for entry in entries] == [4, 4]


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(amp, few, call, monkeypatch):
    """A finite loss may still have such a gradient (the square root of zero, say)."""

    def spoil(number, losses):
        if number == 1:
            losses = losses | {
                "loss_class": losses["loss_class"] + (losses["loss_class"] * 0).sqrt()
            }
        return losses

    patch_losses(monkeypatch, spoil)
    call(train_detector_stage1.main, *quick_flags(few), *set_precision(monkeypatch, amp))
    content = load(Path("runs/detector_tiny_32_1/last.pt"))
    assert all(tensor.isfinite().all() for tensor in content["model"].values())


def test_fp16_gradients_that_no_scale_mends_end_the_run(few, call, monkeypatch):
    def spoil(number, losses):
        return losses | {"loss_class": losses["loss_class"] + (losses["loss_class"] * 0).sqrt()}

    patch_losses(monkeypatch, spoil)
    with pytest.raises(UserError, match="10 steps in a row had no finite loss.*Nothing is kept"):
        call(
            train_detector_stage1.main,
            *quick_flags(few),
            "--min_steps",
            40,
            *set_precision(monkeypatch, "fp16"),
        )


@PRECISIONS
def test_too_many_steps_without_a_finite_loss_end_the_run(amp, few, call, monkeypatch):
    flags = [*quick_flags(few), "--epochs", 2, "--min_steps", 12, *set_precision(monkeypatch, amp)]

    def spoil(number, losses):
        return losses if number <= 12 else {name: v * float("inf") for name, v in losses.items()}

    patch_losses(monkeypatch, spoil)
    kept = "no finite loss. The best checkpoints so far.*--lr"
    with pytest.raises(UserError, match=kept) as said:
        call(train_detector_stage1.main, *flags)
    assert ("--amp off" in str(said.value)) == (amp != "off")
    folder = Path("runs/detector_tiny_32_1")
    assert [
        entry["step"] for entry in json.loads((folder / "nan_batches.json").read_text())
    ] == list(range(13, 23))
    for name in ("best.pt", "checkpoint_best_regular.pth", "last.pt"):
        assert all(tensor.isfinite().all() for tensor in load(folder / name)["model"].values())


@pytest.mark.slow
def test_a_run_of_an_earlier_version_keeps_its_masks_form(few, call, monkeypatch):
    call(train_detector_stage1.main, *quick_flags(few), "--output_dir", "detector")
    flags = [*quick_flags(few), "--output_dir", "masks"]
    monkeypatch.setattr("rfdetr.training.frozen.MATCH_IOU", -1.0)  # two steps find no object
    with monkeypatch.context() as earlier:
        earlier.setattr(segmentation, "new_form", lambda hidden: segmentation.HeadForm(4, False))
        call(train_seg_stage2.main, *flags, "--stage1_run", "detector", "--auto_shrink", 1)
    for file in Path("masks").glob("*.pt"):
        content = checkpoint.load(file)
        del content["mask_stride"], content["mask_standardise"]
        checkpoint.save(file, content)
    call(train_seg_stage2.main, "--resume", "masks", "--epochs", 2)
    resumed = checkpoint.load(Path("masks/last.pt"))
    assert checkpoint.mask_form(resumed) == segmentation.HeadForm(4, standardise=False)
    assert not any("finer" in name for name in resumed["model"])
