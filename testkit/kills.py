"""Training runs that are killed (kill -9) at random moments and gone on with."""

from __future__ import annotations

import importlib
import itertools
import math
import multiprocessing
import os
import random
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rfdetr.console import run_script
from rfdetr.data.demo import make_demo
from testkit.finished_runs import damaged, differences, runs_in

FLAGS = (
    "--size tiny --resolution 32 --device cpu --batch 2 --min_steps 5 --epochs 2 "
    "--save_minutes 0 --run_test 1"
)
KINDS = {  # name -> script and its own flags; DETECTOR is the best.pt of stage 1
    "stage 1": "train_detector_stage1 --head dataset --multi_scale 1 --drop_path 0.3",
    "stage 2, cache in RAM": "train_seg_stage2 --checkpoint DETECTOR --cache ram",
    "stage 2, cache on disk": "train_seg_stage2 --checkpoint DETECTOR --cache disk",
    "stage 2, no cache": "train_seg_stage2 --checkpoint DETECTOR --cache off",
    "single stage": "train_seg_single_stage",
}
PATIENCE = 300  # seconds that a run of a few seconds may take
# a fork has torch imported already; where there is none, each run imports it itself
PROCESSES = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")


@dataclass
class Job:
    """A training command that is killed and gone on with in a folder."""

    script: str
    words: list[str]

    def in_folder(self, folder: Path) -> Killed:
        folder.mkdir()
        return Killed(self, folder)


@dataclass
class Killed:
    """A job in its folder: its kills (moment in seconds, where it was), and what was lost."""

    job: Job
    folder: Path
    kills: list[tuple[float, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def start(self, words: list[str], kill_after: float) -> tuple[int | None, str]:
        """Run the script; returns its exit status, None where it was killed, and its output."""
        number = len(list(self.folder.glob("console_*")))
        log = self.folder / f"console_{number}.txt"
        arguments = (self.job.script, words, self.folder, log)
        process = PROCESSES.Process(target=run_in_child, args=arguments)
        process.start()
        process.join(min(kill_after, PATIENCE))
        still_running = process.is_alive()
        if still_running:
            process.kill()
            process.join()
        printed = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if still_running and kill_after <= PATIENCE:
            return None, printed
        if still_running:
            printed += f"\nit was not done after {PATIENCE} s"
        return process.exitcode, printed

    def go_on(self, kill_after: float = math.inf) -> tuple[int | None, str]:
        """The next command: --resume, or a new start where no run is there or --resume says so."""
        runs = runs_in(self.folder)
        if runs:
            run = runs[-1]
            status, printed = self.start(["--resume", str(run)], kill_after)
            saved = (run / "last.pt").exists() or (run / "checkpoint.pt").exists()
            command = shlex.join([f"{self.job.script}.py", *self.job.words])
            advice = f"Start anew, in another folder:\n  python {command}"
            unknown = (run / "log.txt").exists() and advice not in printed
            if status != 2 or saved or unknown:
                return status, printed
        return self.start(self.job.words, kill_after)

    def kill_at(self, moments: list[float]) -> None:
        """Kill the job so many seconds after each of its starts, unless it is faster."""
        for moment in moments:
            status, _ = self.go_on(moment)
            if status is not None:
                return
            runs = runs_in(self.folder)
            if not runs:
                self.kills.append((moment, "no folder yet"))
                continue
            self.kills.append((moment, standing(runs[-1])))
            self.lost += damaged(runs[-1])

    def compare_with(self, reference: Path) -> None:
        """Let the job end, and add to `lost` where it is not the run that was never killed."""
        status, printed = self.go_on()
        run = runs_in(self.folder)[-1]
        if status and "has finished its" not in printed:
            self.lost.append(f"exit status {status}: {printed[-400:]}")
            return
        self.lost += differences(run, reference) + damaged(run)
        self.lost += [f"{path.name} was left" for path in run.glob("*.tmp")]

    def report(self, name: str, before: int) -> None:
        result = "went on, the same bits"
        if self.lost:
            result = f"LOST: {'; '.join(self.lost)}"
        for number, (moment, where) in enumerate(self.kills, start=before + 1):
            print(f"{number:>4}  {name}, after {moment:.2f} s: {where}: {result}", flush=True)


def run_in_child(script: str, words: list[str], folder: Path, log: Path) -> None:
    """What a child does: run a script's main(argv) as its command line would."""
    os.chdir(folder)
    with open(log, "a", encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        sys.argv = [f"{script}.py", *words]
        run_script(importlib.import_module(script).main, words)


def standing(run: Path) -> str:
    """Where a killed run was, for the reader."""
    saved = [path for path in (run / "last.pt", run / "checkpoint.pt") if path.exists()]
    states = [torch.load(path)["training"]["progress"] for path in saved]
    words = ["nothing saved yet"]
    if states:
        newest = max(states, key=lambda state: (state["epoch"], state["step"]))
        words = [f"epoch {newest['epoch'] + 1}, {newest['step_in_epoch']} steps saved"]
    words += [f"writing {path.name.rsplit('.', 2)[0]}" for path in run.glob("*.tmp")]
    return ", ".join(words)


def whole_runs(
    workplace: Path, kinds: Sequence[str]
) -> tuple[dict[str, Job], dict[str, Path], dict[str, float]]:
    """Each kind of run without a kill: its command, its folder, its seconds."""
    jobs: dict[str, Job] = {}
    references: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    common = [*shlex.split(FLAGS), "--dataset", str(workplace / "data")]
    for name in kinds:
        line = KINDS[name]
        if references:
            line = line.replace("DETECTOR", shlex.quote(str(references["stage 1"] / "best.pt")))
        script, *words = shlex.split(line)
        jobs[name] = Job(script, words + common)
        whole = jobs[name].in_folder(workplace / f"whole {name}")
        begin = time.monotonic()
        status, printed = whole.go_on()
        if status:
            raise SystemExit(f"{name} does not run:\n{printed}")
        references[name] = runs_in(whole.folder)[0]
        seconds[name] = time.monotonic() - begin
        print(f"{name}: {seconds[name]:.1f} s without a kill", flush=True)
    return jobs, references, seconds


def kill_runs(count: int, seed: int, workplace: Path, kinds: Sequence[str] = tuple(KINDS)) -> int:
    """Kill `count` times, over these kinds of runs, with 0 and 2 workers in turn.

    `kinds`: names in KINDS, "stage 1" first.  Prints a line a kill; returns how many runs lost
    something.
    """
    make_demo(workplace / "data", train=4, valid=2, test=2, size=64, seed=2)
    jobs, references, seconds = whole_runs(workplace, kinds)
    chance = random.Random(seed)
    done = 0
    lossy = 0
    turns = zip(itertools.cycle(kinds), itertools.cycle((0, 2)))  # all pairs of an odd number
    for number, (name, workers) in enumerate(turns):
        if done >= count:
            break
        length = seconds[name] * (1.5 if workers else 1)
        kills = min(chance.choice([1, 1, 1, 2]), count - done)
        moments = [chance.uniform(0, length) for _ in range(kills)]
        job = Job(jobs[name].script, [*jobs[name].words, "--workers", str(workers)])
        run = job.in_folder(workplace / str(number))
        try:
            run.kill_at(moments)
            if run.kills:
                run.compare_with(references[name])
        except Exception:
            run.kills = run.kills or [(moments[0], "?")]
            run.lost.append(traceback.format_exc())
        run.report(f"{name}, {workers} workers", before=done)
        done += len(run.kills)
        lossy += bool(run.lost)
    print(f"{done} kills in {number} runs, {lossy} runs lost something")
    return lossy
