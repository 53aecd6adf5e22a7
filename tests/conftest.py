"""Shared small things: demo datasets, a very small model size, and a way to run the scripts as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rfdetr.data.demo import make_demo
from rfdetr.models.detector import Detector
from rfdetr.sizes import SIZES, ModelSize

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A small demo dataset with all three splits; tests must not change it."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    make_demo(folder, train=12, valid=6, test=4, size=96, seed=1)
    return folder


@pytest.fixture
def small_size() -> ModelSize:
    """The architecture with numbers small enough for exact comparisons: two windows, two groups, one unused block."""
    recipe = replace(SIZES["tiny"].recipe, group_detr=2)
    return replace(SIZES["tiny"], name="small_test", queries=10, select=10, depth=3, recipe=recipe)


@pytest.fixture
def small_model(small_size) -> Detector:
    torch.manual_seed(0)
    return Detector(small_size, rows=5, background=True, mask_head="nano")


def run_script(*words: object, cwd: Path, check: bool = True, env: dict | None = None) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` of this repository in the folder `cwd`; with `check` a failure shows its output."""
    script, *rest = [str(word) for word in words]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=600,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"} | (env or {}),
    )
    if check and done.returncode:
        pytest.fail(f"{script} left with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done
