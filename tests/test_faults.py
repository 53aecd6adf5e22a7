"""Faults of machines and strangers, made for real: nothing that was saved is lost."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import quick_flags
from test_resume import assert_same_run, load

import evaluate
import export
import predict
import rfdetr.inference.evaluation
import rfdetr.main
import rfdetr.training.engine
import shrink_head
import train_detector_stage1
import train_seg_single_stage
import train_seg_stage2
from rfdetr.console import Stopped
from rfdetr.console import run_script as as_a_script
from rfdetr.training.resume import latest_state
from testkit.forked import Forked, run_in_turn
from testkit.in_process import output_of
from testkit.kills import kill_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(few, tmp_path_factory) -> Path:
    """A finished stage-1 run of one epoch, with a class head that needs no shrinking."""
    folder = tmp_path_factory.mktemp("faults")
    flags = [
        *quick_flags(few),
        "--tensorboard",
        1,
        "--head",
        "dataset",
        "--output_dir",
        folder / "run",
    ]
    output_of(train_detector_stage1.main, *flags)
    return folder / "run"


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def exit_of(call, capsys):
    """exit_of(main, *flags) -> (exit status, stderr) of a script that fails as it should."""

    def run(main, *words: object) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            call(lambda argv: as_a_script(main, argv), *words)
        text = capsys.readouterr().err
        assert "Traceback" not in text and "defect" not in text
        return left.value.code, text

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".pt", ".pth", ".json")
    }


# ---------------------------------------------------------------- kill -9, and exact resume

def kill_in_the_third_save() -> None:
    """Let torch.save write a part of the third file, and kill the process."""
    save = torch.save
    saves = []

    def half(content, file):
        saves.append(1)
        if len(saves) == 3:
            whole = io.BytesIO()
            save(content, whole)
            file.write(whole.getvalue()[:50_000])
            file.flush()
            os.kill(os.getpid(), 9)
        save(content, file)

    torch.save = half


def test_killed_while_a_checkpoint_is_written(few, call, tmp_path):
    flags = [*quick_flags(few), "--min_steps", 3, "--save_minutes", 0]
    command = ["train_detector_stage1", *flags, "--output_dir", "killed"]
    assert Forked(command, cwd=tmp_path, before=kill_in_the_third_save).wait() != 0
    killed = tmp_path / "killed"
    (half,) = killed.glob("checkpoint.pt.*.tmp")
    assert half.stat().st_size == 50_000
    assert load(killed / "checkpoint.pt")["training"]["progress"]["step"] == 2
    call(train_detector_stage1.main, "--resume", killed)
    assert not list(killed.glob("*.tmp"))
    call(train_detector_stage1.main, *flags, "--output_dir", "whole")
    assert_same_run(killed, tmp_path / "whole")


def kill_each_kind(workplace: Path) -> None:
    kinds = ["stage 1", "stage 2, cache on disk", "single stage"]
    sys.exit(kill_runs(count=3, seed=5, workplace=workplace, kinds=kinds))


def test_runs_killed_at_random_moments_go_on_with_the_same_bits(tmp_path):
    """Each kind of run, without and with workers in turn; benchmarks/stress.py kills hundreds."""
    workplace = tmp_path / "runs"
    workplace.mkdir()
    done = Forked(cwd=tmp_path, before=partial(kill_each_kind, workplace))
    assert done.wait() == 0, done.stdout + done.stderr
    assert re.search(r"3 kills in \d+ runs, 0 runs lost something", done.stdout)


def test_a_run_that_ended_before_its_first_save_says_how_to_start_anew(
    few, exit_of, call, monkeypatch
):
    def end(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rfdetr.training.engine, "optimise", end)
        with pytest.raises(KeyboardInterrupt):
            call(train_detector_stage1.main, *quick_flags(few))
    code, text = exit_of(train_detector_stage1.main, "--resume", "runs/detector_tiny_32_1")
    assert code == 2 and "ended before its first save" in text
    command = text.splitlines()[-1].split()
    assert command[0] == "python" and command[2:] == [str(flag) for flag in quick_flags(few)]


# ---------------------------------------------------------------- a full disk


@contextlib.contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file may become larger than so many bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_that_may_not_grow_keep_the_old_checkpoints(run, exit_of):
    before = contents(run)
    resume = [train_detector_stage1.main, "--resume", run, "--epochs", 2]
    with limited_files(1 << 20):
        code, text = exit_of(*resume)
    assert code == 2 and re.search(r"could not write .*\.pth? \(.*Free some space", text)
    after = contents(run)
    assert all(after[name] == before[name] for name in before if name != "metrics.json")
    assert not list(run.glob("*.tmp"))
    output_of(*resume)  # with room again
    assert load(run / "last.pt")["training"]["progress"]["epoch"] == 2


def test_outputs_that_may_not_grow_are_named(run, few, exit_of, tmp_path):
    weights = ["--checkpoint", run / "best.pt"]
    small = tmp_path / "small.pt"
    small.write_bytes(b"an earlier file")
    for name, *words in (
        ["found", predict.main, *weights, "--input", few / "valid", "--output", "found"],
        ["scores.json", evaluate.main, *weights, "--dataset", few, "--json", "scores.json"],
        ["results", evaluate.main, *weights, "--dataset", few, "--results", "results"],
        ["small.pt", shrink_head.main, "--in_ckpt", run / "best.pt", "--out_ckpt", small],
    ):
        with limited_files(100):
            code, text = exit_of(*words)
        assert code == 2, text
        assert re.search(rf"(could not write|cannot write to the folder) \S*{name}", text), text
    assert small.read_bytes() == b"an earlier file" and not (tmp_path / "scores.json").exists()
    assert not list(tmp_path.rglob("*.tmp")) and not list((tmp_path / "found").iterdir())


@pytest.fixture
def needs_mounts() -> None:
    command = ["sh", "-c", "unshare -rm mount -t tmpfs tmpfs /mnt"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no mount namespaces here")


def mount(folder: str, options: str) -> None:
    """Let this process, as `unshare --map-root-user --mount` does, have a tmpfs of its own."""
    user, group = os.getuid(), os.getgid()
    new_namespaces = 0x10000000 | 0x00020000  # CLONE_NEWUSER | CLONE_NEWNS
    assert ctypes.CDLL(None).unshare(new_namespaces) == 0
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def fill_the_disk_in_the_second_epoch() -> None:
    train = rfdetr.main.train_one_epoch

    def fill() -> None:
        with open("ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)) == 4096:
                pass

    def train_one_epoch(trainer, *rest):
        if trainer.progress.epoch == 1:
            fill()
        return train(trainer, *rest)

    rfdetr.main.train_one_epoch = train_one_epoch


def train_on_a_small_disk(words: list[object]) -> None:
    """Leaves the run in the folder beside the disk."""
    mount("disk", "size=160m")
    os.chdir("disk")
    fill_the_disk_in_the_second_epoch()
    status = run_in_turn([["train_detector_stage1", *map(str, words)]])
    shutil.copytree("run", "../run")
    sys.exit(status)


@pytest.mark.usefixtures("needs_mounts")
def test_a_disk_that_is_really_full(few, tmp_path):
    (tmp_path / "disk").mkdir()
    flags = [*quick_flags(few), "--epochs", 2, "--tensorboard", 1, "--output_dir", "run"]
    done = Forked(cwd=tmp_path, before=partial(train_on_a_small_disk, flags))
    assert done.wait() == 2, done.stderr
    assert re.search(
        r"could not write run.*No space left on device|could not write run.*\.pth? ", done.stderr
    )
    assert (
        "Traceback" not in done.stderr and "Exception" not in done.stderr
    )  # of TensorBoard neither
    run = tmp_path / "run"
    assert not list(run.glob("*.tmp"))
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(metrics["epochs"]) == 1
    assert load(run / "last.pt")["training"]["progress"]["epoch"] == 1
    output_of(train_detector_stage1.main, "--resume", run)
    assert load(run / "last.pt")["training"]["progress"]["epoch"] == 2


# ---------------------------------------------------------------- damaged checkpoints


def test_a_resume_passes_over_whatever_is_left_of_a_file(run, capsys):
    """Cut anywhere: never an error of its own, and the other file is taken."""
    chance = random.Random(0)
    whole = (run / "checkpoint.pt").read_bytes()
    cuts = [0, 1, 100, len(whole) // 2, len(whole) - 1]
    cuts += [chance.randrange(len(whole)) for _ in range(4)]
    for name in ("checkpoint.pt", "last.pt"):
        for cut in cuts:
            (run / name).write_bytes(whole[:cut])
            assert latest_state(run)["training"]["progress"]["epoch"] == 1
            said = capsys.readouterr().out
            assert str(run / name) in said and "going on from the other one" in said
        (run / name).write_bytes(whole)


@pytest.mark.parametrize(
    "damage", [{"epoch": -1}, {"step": "3"}, {"sums": [1]}, {"unread": [0.5]}, {"epoch": 2**40}]
)
def test_a_resume_passes_over_progress_that_no_run_has_saved(damage, run, capsys):
    content = torch.load(run / "checkpoint.pt")
    content["training"]["progress"] |= damage
    torch.save(content, run / "checkpoint.pt")
    assert latest_state(run)["training"]["progress"]["epoch"] == 1
    said = capsys.readouterr().out
    assert (
        "checkpoint.pt holds nothing that a run can go on with" in said
        and "going on from the other one" in said
    )


@pytest.mark.parametrize(
    "moment", [torch.zeros(1), torch.zeros(1).expand(10**6), torch.zeros(2, 2).to_sparse(), "x"]
)
def test_moments_that_do_not_fit_the_weights_are_refused(moment, run, exit_of):
    content = torch.load(run / "last.pt")
    content["training"]["optimizer"]["state"][0]["exp_avg"] = moment
    for name in ("last.pt", "checkpoint.pt"):
        torch.save(content, run / name)
    code, text = exit_of(train_detector_stage1.main, "--resume", run, "--epochs", 2)
    assert code == 2 and "does not fit these settings" in text


@pytest.mark.parametrize(
    "content",
    [
        {"format": 1, "model": {}},
        {"model": {"a": 1}},
        {"format": 1},
        {"state_dict": {"x": 1}},
        {1: 2},
    ],
)
def test_files_of_another_making_are_named(content, run, exit_of):
    torch.save(content, run / "strange.pt")
    code, text = exit_of(export.main, "--checkpoint", run / "strange.pt", "--out", run / "out.pth")
    assert code == 2 and "strange.pt" in text


def test_no_good_checkpoint_left(run, exit_of):
    for name in ("checkpoint.pt", "last.pt"):
        (run / name).write_bytes(b"")
    code, text = exit_of(train_detector_stage1.main, "--resume", run)
    assert (
        code == 2
        and text.count(str(run)) >= 2
        and "Start anew, in another folder:\n  python " in text
    )


# ---------------------------------------------------------------- code in a checkpoint


class Malicious:
    """Unpickled, this would make a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    "script, flag, more, legacy",
    [
        (train_detector_stage1, "--pretrain_weights", "train", False),
        (train_detector_stage1, "--pretrain_weights", "train", True),
        (train_detector_stage1, "--backbone_weights", "train", False),
        (train_detector_stage1, "--resume", None, False),
        (train_seg_stage2, "--checkpoint", "train", False),
        (train_seg_single_stage, "--init_ckpt", "train", False),
        (evaluate, "--checkpoint", "--dataset", True),
        (predict, "--checkpoint", "--output", False),
        (export, "--checkpoint", "--out", False),
        (shrink_head, "--in_ckpt", "--out_ckpt", False),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_code_in_a_checkpoint_is_refused_and_never_run(
    script, flag, more, legacy, run, few, exit_of, tmp_path
):
    marker = tmp_path / "was_here"
    evil = run / "evil.bin"
    content = load(run / "last.pt") | {"args": Malicious(marker)}
    evil.write_bytes(pickle.dumps({"model": Malicious(marker)})) if legacy else torch.save(
        content, evil
    )
    words = [flag, evil]
    if flag == "--resume":
        shutil.copy(evil, run / "last.pt")
        shutil.copy(evil, run / "checkpoint.pt")
        words = [flag, run]
    elif more == "train":
        words += quick_flags(few)
    else:
        words += [more, few if more == "--dataset" else tmp_path / "out"]
        words += ["--input", few / "valid"] if script is predict else []
    code, text = exit_of(script.main, *words)
    assert code == 2 and "was refused" in text
    assert not marker.exists() and not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- another size, other classes


def test_a_resumed_run_keeps_its_size_and_architecture(run, few, exit_of):
    code, text = exit_of(
        train_detector_stage1.main, "--resume", run, "--epochs", 2, "--size", "nano"
    )
    assert code == 2 and "tensors differ" in text and "--size tiny" in text
    code, text = exit_of(train_seg_single_stage.main, "--resume", run)
    assert code == 2 and f"python train_detector_stage1.py --resume {run}" in text


def test_weights_of_another_architecture(few, exit_of, tmp_path):
    torch.save(
        {"model": {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}}, tmp_path / "resnet.pth"
    )
    code, text = exit_of(train_seg_stage2.main, *quick_flags(few), "--checkpoint", "resnet.pth")
    assert code == 2 and "fits none of the sizes" in text and "tensors differ" in text


def renamed(few: Path, folder: Path, names: dict[str, str]) -> Path:
    shutil.copytree(few, folder)
    for file in folder.glob("*/_annotations.coco.json"):
        content = json.loads(file.read_text())
        for category in content["categories"]:
            category["name"] = names[category["name"]]
        file.write_text(json.dumps(content))
    return folder


def test_other_class_names_and_another_order(run, few, exit_of, call, tmp_path):
    names = ["cells", "blood_vessel", "glomerulus"]
    other = renamed(few, tmp_path / "other", dict(zip(names, ["cells", "tubule", "glomerulus"])))
    for words in (
        [train_detector_stage1.main, "--resume", run, "--epochs", 2],
        [train_seg_stage2.main, *quick_flags(few), "--checkpoint", run / "best.pt"],
        [evaluate.main, "--checkpoint", run / "best.pt"],
    ):
        code, text = exit_of(*words, "--dataset", other)
        assert (
            code == 2
            and "Only in the dataset: ['tubule']; only in the checkpoint: ['blood_vessel']" in text
        )
    order = renamed(few, tmp_path / "order", dict(zip(names, names[1:] + names[:1])))
    call(train_detector_stage1.main, "--resume", run, "--epochs", 2, "--dataset", order)
    assert load(run / "last.pt")["classes"]["names"] == names[1:] + names[:1]
    assert load(run / "last.pt")["classes"]["rows"] == [1, 2, 0]


# ---------------------------------------------------------------- places that cannot be written


def test_a_file_where_the_output_belongs(run, few, exit_of, tmp_path):
    (file := tmp_path / "file").write_text("keep")
    weights = ["--checkpoint", run / "best.pt"]
    for words in (
        [train_detector_stage1.main, *quick_flags(few), "--output_dir", file],
        [train_seg_single_stage.main, *quick_flags(few), "--output_dir", file / "deeper"],
        [train_seg_stage2.main, *quick_flags(few), *weights, "--output_dir", file],
        [predict.main, *weights, "--input", few / "valid", "--output", file],
        [evaluate.main, *weights, "--dataset", few, "--json", file / "scores.json"],
        [evaluate.main, *weights, "--dataset", few, "--json", tmp_path],
        [evaluate.main, *weights, "--dataset", few, "--results", file],
        [shrink_head.main, "--in_ckpt", run / "best.pt", "--out_ckpt", file / "small.pt"],
    ):
        code, text = exit_of(*words)
        assert code == 2 and words[-2] in text, text
    assert file.read_text() == "keep"


@pytest.mark.usefixtures("needs_mounts")
def test_a_folder_that_is_read_only(run, few, tmp_path):
    (tmp_path / "locked").mkdir()
    weights = ["--checkpoint", run / "best.pt"]
    done = Forked(
        ["evaluate", *weights, "--dataset", few, "--json", "locked/scores.json"],
        ["predict", *weights, "--input", few / "valid", "--output", "locked"],
        ["train_detector_stage1", *quick_flags(few), "--output_dir", "locked/run"],
        cwd=tmp_path,
        before=partial(mount, "locked", "ro"),
    )
    done.wait()
    assert re.findall(r"left with (\d+)", done.stderr) == ["2", "2", "2"], done.stderr
    assert done.stderr.count("Read-only file system") == 3
    for flag in ("--json", "--output", "--output_dir"):
        assert f"Name another with {flag}\n" in done.stderr


# ---------------------------------------------------------------- signals


def signal_at_detection(monkeypatch, call: int, number: int) -> list[int]:
    """The process gets a signal in its `call`-th detection; returns a list of those that begin."""
    detect = rfdetr.inference.detections.DetectionRunner._detect
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return detect(*args)

    monkeypatch.setattr(rfdetr.inference.detections.DetectionRunner, "_detect", interrupted)
    return calls


@pytest.mark.parametrize("kind", ["stage1", "stage2"])
def test_a_signal_during_the_evaluation_ends_it_at_once(kind, few, run, call, monkeypatch, request):
    script = train_detector_stage1
    flags = [*quick_flags(few), "--batch", 1]
    if kind == "stage2":
        weights = shutil.copy(request.getfixturevalue("shrunk").folder, run)
        script = train_seg_stage2
        flags = [*flags, "--checkpoint", weights]
    call(script.main, *flags, "--output_dir", "whole")
    with monkeypatch.context() as patched:
        calls = signal_at_detection(patched, 1, signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            call(script.main, *flags, "--output_dir", "stopped")
    assert stopped.value.code == 143 and len(calls) == 1
    assert load(Path("stopped/checkpoint.pt"))["training"]["progress"]["step_in_epoch"] == 4
    if kind == "stage2":
        Path(weights).unlink()  # the run has its detector in its own state
    call(script.main, "--resume", "stopped")
    assert_same_run(Path("stopped"), Path("whole"))


def test_a_run_interrupted_while_it_scores_the_test_split_does_that_on_resume(
    few, call, exit_of, monkeypatch
):
    flags = [*quick_flags(few), "--run_test", 1, "--ema", 0]
    with monkeypatch.context() as patched:
        signal_at_detection(patched, 3, signal.SIGINT)  # after valid and the pictures
        code, text = exit_of(train_detector_stage1.main, *flags, "--output_dir", "run")
    assert code == 130 and "interrupted" in text
    assert "test" not in json.loads(Path("run/metrics.json").read_text())
    call(train_detector_stage1.main, "--resume", "run")
    assert json.loads(Path("run/metrics.json").read_text())["test"].keys() == {"bbox"}
    code, text = exit_of(train_detector_stage1.main, "--resume", "run")
    assert code == 2 and "has finished its 1 epoch." in text


def test_a_run_stopped_after_its_patience_does_not_train_on(few, call, capsys):
    flags = [*quick_flags(few), "--epochs", 9, "--patience", 1, "--lr", 0, "--lr_encoder", 0]
    call(train_detector_stage1.main, *flags, "--output_dir", "run")
    assert "train_detector_stage1.py --resume run --patience 2" in capsys.readouterr().out
    before = load(Path("run/last.pt"))["training"]["progress"]
    call(train_detector_stage1.main, "--resume", "run")
    assert load(Path("run/last.pt"))["training"]["progress"] == before
    call(train_detector_stage1.main, "--resume", "run", "--patience", 2)
    assert load(Path("run/last.pt"))["training"]["progress"]["epoch"] == before["epoch"] + 1


def test_scripts_that_only_read_leave_with_143(run, few, exit_of, monkeypatch):
    signal_at_detection(monkeypatch, 1, signal.SIGTERM)
    assert exit_of(evaluate.main, "--checkpoint", run / "best.pt", "--dataset", few)[0] == 143


def tell_of_steps(hang: bool) -> None:
    """Say where each optimizer step begins; one that hangs also says that a signal was noted."""
    optimise = rfdetr.training.engine.optimise

    def step(*args):
        print("in a step", file=sys.stderr, flush=True)
        while hang and signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
            time.sleep(0.02)
        if hang:
            print("the first is noted", file=sys.stderr, flush=True)
        while hang:
            time.sleep(0.02)
        return optimise(*args)

    rfdetr.training.engine.optimise = step


def start_in_a_session(hang: bool, words: list[object], cwd: Path) -> Forked:
    """Run a script in a session of its own, as a terminal would; returns when it is in a step."""
    run = Forked(words, cwd=cwd, before=partial(tell_of_steps, hang), session=True)
    run.wait_for("in a step")
    return run


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups")
def test_ctrl_c_in_a_terminal_reaches_the_workers_too(few, tmp_path):
    flags = [*quick_flags(few), "--workers", 2, "--min_steps", 500, "--output_dir", "run"]
    run = start_in_a_session(False, ["train_detector_stage1", *flags], tmp_path)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait() == 130, run.stderr
    assert "--resume run" in run.stdout and "Traceback" not in run.stderr
    assert load(tmp_path / "run/checkpoint.pt")["training"]["progress"]["step"] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to other processes")
def test_a_second_signal_ends_at_once(few, tmp_path):
    run = start_in_a_session(True, ["train_detector_stage1", *quick_flags(few)], tmp_path)
    os.kill(run.pid, signal.SIGINT)
    run.wait_for("the first is noted")  # and the step goes on
    os.kill(run.pid, signal.SIGINT)
    assert run.wait() == -signal.SIGINT


# ---------------------------------------------------------------- figures of an earlier run


def test_damaged_figures_of_an_earlier_run_are_kept_aside(run, call, capsys):
    (run / "metrics.json").write_text('{"format": 1, "epo')
    (events,) = (run / "tb").iterdir()
    data = bytearray(events.read_bytes())
    data[100] ^= 255  # in a number's record
    events.write_bytes(data)
    call(train_detector_stage1.main, "--resume", run, "--epochs", 2)
    said = capsys.readouterr().out
    assert (
        "metrics.json is damaged: kept as metrics.damaged-1.json, a new one begins at epoch 2"
        in said
    )
    assert "is damaged: kept as tb.damaged-1, a new one begins at epoch 2" in said
    assert (run / "metrics.damaged-1.json").read_text() == '{"format": 1, "epo'
    assert (run / "tb.damaged-1").read_bytes() == data and len(list((run / "tb").iterdir())) == 1
    assert [
        epoch["epoch"] for epoch in json.loads((run / "metrics.json").read_text())["epochs"]
    ] == [2]
