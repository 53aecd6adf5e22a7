"""Under torchrun: the same training as one process with the whole batch, and only rank 0 writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script

FLAGS = "--size tiny --epochs 1 --min_steps 3 --workers 0 --resolution 64 --device cpu".split()


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_whole_batch(demo, tmp_path):
    common = [*FLAGS, "--dataset", str(demo)]
    run_script("train_detector_stage1.py", *common, "--batch", "4", "--output_dir", "one", cwd=tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "train_detector_stage1.py"), *common, "--batch", "2", "--output_dir", "two"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("STAGE 1: DETECTOR TRAINING") == 1
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["epochs"][0] for name in ("one", "two"))
    assert two["train"]["loss"] == pytest.approx(one["train"]["loss"], rel=1e-5)
    assert two["valid"]["bbox"]["AR100"] == pytest.approx(one["valid"]["bbox"]["AR100"], abs=1e-3)
    states = [torch.load(tmp_path / name / "last.pt")["model"] for name in ("one", "two")]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=2e-4, rtol=1e-3)
