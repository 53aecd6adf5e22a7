"""Shared small things: demo datasets, a very small model size, ways to run the scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis
import pytest
import torch
from filelock import FileLock  # comes with torch

from rfdetr.data.checks import check_file
from rfdetr.data.coco import build_splits, compute_areas
from rfdetr.data.demo import make_demo
from rfdetr.data.faults import raise_errors
from rfdetr.data.records import CocoSplit
from rfdetr.models.detector import Detector
from rfdetr.sigterm import leave
from rfdetr.sizes import SIZES, ModelSize
from testkit.datasets import coco, write
from testkit.forked import Forked

# a busy machine is no fault of what is tested
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(
    1
)  # as in the scripts that run_script starts: bits depend on the number of threads
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job, whose scripts would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Finished:
    """What a script left: its folder (or file) and what it printed."""

    folder: Path
    output: str


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """What the scripts remember goes to a folder of the tests' own."""
    os.environ["RFDETR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> None:
    """Checkpoints of tests need not outlive a power cut; test_rundir.py sees that others do."""
    os.fsync = lambda number: None


@pytest.fixture(autouse=True)
def own_sigterm() -> Iterator[None]:
    """A script that ran in this process leaves no handler that ends the tests."""
    yield
    if signal.getsignal(signal.SIGTERM) is leave:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def once(file: Path, make: Callable[[], str]) -> str:
    """The text of `file`: what `make()` returns to the first of pytest's processes that asks."""
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(make(), encoding="utf-8")
        return file.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder of all of pytest's processes; nothing in it may be changed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A dataset written by hand, without faults: four images in train, two in valid."""
    write(tmp_path / "data/train", coco(4))
    write(tmp_path / "data/valid", coco(2))
    return tmp_path / "data"


@pytest.fixture(scope="session")
def demo(shared) -> Path:
    """A small demo dataset with all three splits; tests must not change it."""
    folder = shared / "demo"

    def make() -> str:
        make_demo(folder, train=12, valid=6, test=4, size=96, seed=1)
        return ""

    once(shared / "demo.txt", make)
    return folder


@pytest.fixture
def small_size() -> ModelSize:
    """Small enough for exact comparisons: two windows, two groups, one unused block."""
    recipe = replace(SIZES["tiny"].recipe, group_detr=2)
    return replace(SIZES["tiny"], name="small_test", queries=10, select=10, depth=3, recipe=recipe)


@pytest.fixture
def small_model(small_size) -> Detector:
    torch.manual_seed(0)
    return Detector(small_size, rows=5, background=True, mask_head="nano")


def read_split(file: Path, folder: Path, name: str) -> CocoSplit:
    """One annotation file alone, checked and read as read_dataset reads all of a dataset."""
    split = check_file(file, folder)
    raise_errors(split.faults.problems(), {"dataset": file.parent.parent})
    compute_areas(split.columns)
    return build_splits({name: split})[name]


def environment() -> dict[str, str]:
    """For a script that a test starts: one thread, as this process has, and UTF-8."""
    return os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}


def run_script(
    *words: object, cwd: Path, check: bool = True, env: dict | None = None
) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` in the folder `cwd`; with `check` a failure shows its output."""
    script, *rest = [str(word) for word in words]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=600,
        env=environment() | (env or {}),
    )
    if check and done.returncode:
        pytest.fail(
            f"{script} left with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return done


@pytest.fixture
def call(monkeypatch, tmp_path):
    """call(main, *flags): run a script's main(argv) in this process, in the folder tmp_path.

    What a script changes for its whole process (signal handlers, console streams) is put back.
    """

    def run(main: Callable, *words: object) -> None:
        argv = [str(word) for word in words]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *argv])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        streams = sys.stdout, sys.stderr
        try:
            main(argv)
        finally:
            sys.stdout, sys.stderr = streams
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return run


def train_flags(dataset: Path, resolution: int = 64) -> list[object]:
    """Flags that make a training script small: two short epochs of the tiny size."""
    flags = {
        "size": "tiny",
        "dataset": dataset,
        "resolution": resolution,
        "device": "cpu",
        "workers": 0,
    }
    flags |= {"batch": 2, "accum": 2, "min_steps": 3, "epochs": 2}
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="session")
def workplace(shared) -> Path:
    """The folder whose runs/ the session's chain of stages writes to."""
    folder = shared / "workplace"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def chain(workplace) -> Callable[..., Finished]:
    """chain(result, script, *flags): what a script, which is run once, has left in runs/."""

    def run(result: str, script: str, *flags: object) -> Finished:
        def output_of_script() -> str:
            done = Forked([script.removesuffix(".py"), *flags], cwd=workplace, name=script)
            if done.wait():
                pytest.fail(f"{script} failed\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
            return done.stdout

        output = once(workplace.with_name(f"{script}.txt"), output_of_script)
        return Finished(workplace / "runs" / result, output)

    return run


@pytest.fixture(scope="session")
def stage1(demo, chain) -> Finished:
    """A stage-1 run long enough to find objects that it was trained on."""
    flags = [*train_flags(demo), "--accum", 1, "--batch", 4, "--min_steps", 60]
    return chain("detector_tiny_64_1", "train_detector_stage1.py", *flags)


@pytest.fixture(scope="session")
def shrunk(stage1, chain) -> Finished:
    """Its detector with a head of the dataset's three classes, in another order."""
    out = stage1.folder / "checkpoint_mydata.pth"
    keep = ["--keep", "glomerulus", "cells", "blood_vessel"]
    files = ["--in_ckpt", stage1.folder / "best.pt", "--out_ckpt", out]
    return chain("detector_tiny_64_1/checkpoint_mydata.pth", "shrink_head.py", *files, *keep)


@pytest.fixture(scope="session")
def stage2(demo, stage1, shrunk, chain) -> Finished:
    flags = [*train_flags(demo), "--stage1_run", stage1.folder, "--checkpoint", shrunk.folder]
    flags += ["--run_test", 1, "--min_steps", 10]
    return chain("segmentation_tiny_64_1", "train_seg_stage2.py", *flags)


@pytest.fixture(scope="session")
def single(demo, workplace) -> Finished:
    """As from a console: quickstart.py, which test_quickstart.py runs, starts the others so."""
    script = "train_seg_single_stage.py"

    def output_of_script() -> str:
        return run_script(script, *train_flags(demo), cwd=workplace).stdout

    output = once(workplace.with_name(f"{script}.txt"), output_of_script)
    return Finished(workplace / "runs/seg_single_tiny_64_1", output)


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Path:
    """For tests that need a run but no quality: four training images, two of each other split."""
    folder = tmp_path_factory.mktemp("data") / "few"
    make_demo(folder, train=4, valid=2, test=2, size=64, seed=2)
    return folder


def quick_flags(dataset: Path) -> list[object]:
    """Flags of a run of one epoch of two optimizer steps, two images each."""
    return [
        *train_flags(dataset, 32),
        "--accum",
        1,
        "--min_steps",
        2,
        "--epochs",
        1,
        "--tensorboard",
        0,
    ]
