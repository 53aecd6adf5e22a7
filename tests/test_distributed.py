"""Under torchrun: the training of one process, one voice, no process left behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, quick_flags, train_flags
from torch.distributed import TCPStore

import train_seg_stage2
from testkit.forked import Forked

pytestmark = pytest.mark.slow
posix = pytest.mark.skipif(os.name != "posix", reason="signals")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ALONE = ("--standalone", "--nproc_per_node")


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(options, script, *flags) starts it in tmp_path; its output goes to a file there."""
    started = []

    def start(
        options: tuple, script: str, *flags: object, output: str = "out.txt"
    ) -> subprocess.Popen:
        words = [str(word) for word in (*TORCHRUN, *options, ROOT / script, *flags)]
        with open(tmp_path / output, "w") as file:
            process = subprocess.Popen(
                words, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT, env=environment()
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def ranks() -> Iterator[Callable[..., list[Forked]]]:
    """ranks(count, command, folder, nodes): processes with the variables of torchrun."""
    started = []
    stores = []  # which torchrun's agent keeps

    def start(
        count: int, command: list[object], folder: Path, nodes: int = 1, name: str = "rank"
    ) -> list[Forked]:
        stores.append(TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
        here = count // nodes
        env = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(stores[-1].port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(here),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank % here)}
            own["GROUP_RANK"] = str(rank // here)
            started.append(Forked(command, cwd=folder, env=env | own, name=f"{name} {rank}"))
        return started[-count:]

    yield start
    for process in started:
        process.kill()


def end_of(ranks: list[Forked]) -> str:
    """What processes that end well have said."""
    for process in ranks:
        assert process.wait() == 0, process.stderr
    return "".join(process.stdout for process in ranks)


def said(folder: Path, file: str = "out.txt") -> str:
    return (folder / file).read_text(encoding="utf-8", errors="replace")


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until the file is there; fails where the run ends before."""
    while not path.exists():
        assert process.poll() is None, said(path.parent.parent)[-4000:]
        time.sleep(0.02)


def epochs(folder: Path) -> list[dict]:
    return json.loads((folder / "metrics.json").read_text())["epochs"]


def assert_same_training(ours: Path, one: Path) -> None:
    """Losses, weights and files of a run of several processes are those of a single one."""
    assert {path.name for path in ours.iterdir()} == {path.name for path in one.iterdir()}
    for a, b in zip(epochs(ours), epochs(one), strict=True):
        losses = [name for name in b["train"] if name.startswith("loss")]
        assert {n: a["train"][n] for n in losses} == pytest.approx(
            {n: b["train"][n] for n in losses}, rel=1e-5
        )
    states = [torch.load(folder / "last.pt")["model"] for folder in (ours, one)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, atol=2e-4, rtol=1e-3)


def test_three_processes_and_two_validation_images(few, shrunk, tmp_path, ranks, call):
    """One process scores nothing; four training images are no multiple of three.

    They fill one feature cache.
    """
    flags = [*quick_flags(few), "--checkpoint", shrunk.folder, "--min_steps", 4, "--output_dir"]
    three = ranks(3, ["train_seg_stage2", *flags, "three/run", "--batch", 1], tmp_path)
    call(train_seg_stage2.main, *flags, "one/run", "--batch", 3)
    output = end_of(three)
    for words in ("STAGE 2: SEGMENTATION HEAD", "Done. Files", "Feature cache kept"):
        assert output.count(words) == 1
    assert_same_training(tmp_path / "three/run", tmp_path / "one/run")
    (three,) = (tmp_path / "three/feature_cache").iterdir()
    (one,) = (tmp_path / "one/feature_cache").iterdir()
    assert three.name == one.name
    assert (three / "views.bin").read_bytes() == (one / "views.bin").read_bytes()


def test_two_nodes_train_and_score_stage_2_as_one_process_does(
    demo, stage1, shrunk, stage2, tmp_path, ranks
):
    flags = [*train_flags(demo), "--stage1_run", stage1.folder, "--checkpoint", shrunk.folder]
    # two processes of half the images each
    flags += ["--run_test", 1, "--min_steps", 10, "--accum", 1, "--output_dir", "nodes"]
    output = end_of(ranks(2, ["train_seg_stage2", *flags], tmp_path, nodes=2))
    assert output.count("STAGE 2: SEGMENTATION HEAD TRAINING") == output.count("Done. Files") == 1
    assert_same_training(tmp_path / "nodes", stage2.folder)
    ours, one = (
        json.loads((folder / "metrics.json").read_text())
        for folder in (tmp_path / "nodes", stage2.folder)
    )
    assert one["test"]["bbox"]["mAP"] > 0.1
    for a, b in (
        (ours["test"], one["test"]),
        *((x["valid"], y["valid"]) for x, y in zip(ours["epochs"], one["epochs"])),
    ):
        for name in ("mAP", "mAP50", "AR100"):
            assert a["bbox"][name] == pytest.approx(b["bbox"][name], abs=1e-9)
            assert a["segm"][name] == pytest.approx(b["segm"][name], abs=1e-9)


@posix
def test_sigterm_to_torchrun_saves_and_the_printed_command_goes_on(
    demo, single, tmp_path, torchrun, ranks
):
    """The signal reaches loader processes, too; the end is that of a run that never stopped."""
    flags = [
        *train_flags(demo),
        "--accum",
        1,
        "--workers",
        2,
        "--save_minutes",
        0,
        "--output_dir",
        "run",
    ]
    process = torchrun((*ALONE, 2), "train_seg_single_stage.py", *flags)
    wait_for(tmp_path / "run/checkpoint.pt", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0
    output = said(tmp_path)
    assert (
        output.count("stopped: the state is in run/checkpoint.pt") == 1 and "error:" not in output
    )
    assert len(epochs(tmp_path / "run")) < 2
    command = shlex.split(next(line for line in output.splitlines() if "--resume" in line))
    assert command[:3] == ["torchrun", "--nproc_per_node", "2"]
    script, *words = command[3:]
    end_of(ranks(2, [Path(script).stem, *words], tmp_path))
    assert_same_training(tmp_path / "run", single.folder)


def processes_of(agent: subprocess.Popen) -> dict[int, int]:
    """Rank -> process id."""
    found = {}
    for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        environment = dict(
            item.partition("=")[::2]
            for item in Path(f"/proc/{pid}/environ").read_text().split("\0")
        )
        found[int(environment["RANK"])] = int(pid)
    return found


@pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs Linux's /proc"
)
def test_the_others_end_when_one_is_killed(few, tmp_path, torchrun):
    process = torchrun(
        (*ALONE, 2),
        "train_detector_stage1.py",
        *quick_flags(few),
        "--epochs",
        9999,
        "--output_dir",
        "run",
    )
    wait_for(tmp_path / "run/last.pt", process)
    ranks = processes_of(process)
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(60) != 0
    assert not Path(f"/proc/{ranks[0]}").exists()
    output = said(tmp_path)
    assert output.count("another process of this run has ended") == 1
    assert "exit code -9" in output and "defect" not in output
    assert output.count("The last save is run/") == 1
    assert "torchrun --nproc_per_node 2" in output and "--resume run" in output
    torch.load(tmp_path / "run/last.pt")


def test_what_all_processes_have_to_say_is_said_once(few, tmp_path, ranks):
    command = ["train_detector_stage1", "--dataset", few, "--epochs", "many"]
    two = ranks(2, command, tmp_path)
    assert [process.wait() for process in two] == [2, 2]
    output = "".join(process.stderr for process in two)
    error = "error: --epochs: expected a whole number from 1 to 1,000,000,000, got 'many'"
    assert output.count(error) == 1
