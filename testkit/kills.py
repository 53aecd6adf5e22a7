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
from pathlib import Path

import torch

from rfdetr.console import run_script
from rfdetr.data.demo import make_demo
from testkit.finished_runs import damaged, differences, runs_in

FLAGS = "--size tiny --resolution 32 --device cpu --batch 2 --min_steps 5 --epochs 2 --save_minutes 0 --run_test 1"


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


def script_process(script: str, words: list[str], folder: Path, log: Path) -> None:
    """What a child does: run a script's main(argv) as its command line would."""
    os.chdir(folder)
    with open(log, "a", encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        sys.argv = [f"{script}.py", *words]
        run_script(importlib.import_module(script).main, words)


def start(
    script: str, words: list[str], folder: Path, kill_after: float = math.inf
) -> tuple[int | None, str]:
    """Run a script in `folder`; returns its exit status (None where it was killed) and what it printed."""
    log = folder / f"console_{sum(1 for _ in folder.glob('console_*'))}.txt"
    process = PROCESSES.Process(target=script_process, args=(script, words, folder, log))
    process.start()
    process.join(min(kill_after, PATIENCE))
    if killed := process.is_alive():
        process.kill()
        process.join()
    printed = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if killed and kill_after > PATIENCE:
        printed += f"\nit was not done after {PATIENCE} s"
    return (None if killed and kill_after <= PATIENCE else process.exitcode), printed


def standing(run: Path) -> str:
    """Where a killed run was, for the reader."""
    saved = [path for path in (run / "last.pt", run / "checkpoint.pt") if path.exists()]
    states = [torch.load(path)["training"]["progress"] for path in saved]
    at = max(states, key=lambda state: (state["epoch"], state["step"]), default=None)
    text = (
        f"epoch {at['epoch'] + 1}, {at['step_in_epoch']} steps saved" if at else "nothing saved yet"
    )
    return ", ".join(
        [text, *(f"writing {path.name.rsplit('.', 2)[0]}" for path in run.glob("*.tmp"))]
    )


def go_on(
    script: str, words: list[str], folder: Path, kill_after: float = math.inf
) -> tuple[int | None, str, bool]:
    """The next command after a kill: --resume, or a new start, where that is what --resume says or no run is there.

    Returns exit status, what was printed, and whether it was a new start.
    """
    last = runs_in(folder)[-1:]
    if last:
        status, printed = start(script, ["--resume", str(last[0])], folder, kill_after)
        saved = any((last[0] / name).exists() for name in ("last.pt", "checkpoint.pt"))
        command = f"Start anew, in another folder:\n  python {shlex.join([f'{script}.py', *words])}"
        if status != 2 or saved or (last[0] / "log.txt").exists() and command not in printed:
            return status, printed, False
    return *start(script, words, folder, kill_after), True


def kill_and_go_on(
    script: str, words: list[str], folder: Path, moments: list[float], reference: Path
) -> tuple[list[tuple[float, str]], list[str]]:
    """A run killed `moments` seconds after its starts; (moment, where it was) of each kill, and what was lost."""
    folder.mkdir()
    kills, lost = [], []
    for moment in moments:
        status, printed, _ = go_on(script, words, folder, moment)
        if status is not None:  # it was faster
            break
        run = runs_in(folder)[-1:]
        kills.append((moment, standing(run[0]) if run else "no folder yet"))
        lost += damaged(run[0]) if run else []
    if not kills:
        return kills, lost
    status, printed, _ = go_on(script, words, folder)
    run = runs_in(folder)[-1]
    if status and "has finished its" not in printed:
        return kills, [*lost, f"exit status {status}: {printed[-400:]}"]
    lost += differences(run, reference) + damaged(run)
    return kills, lost + [f"{path.name} was left" for path in run.glob("*.tmp")]


def kill_runs(count: int, seed: int, workplace: Path) -> int:
    """Kill `count` times, over all kinds of runs with 0 and 2 workers in turn; returns how many runs lost something."""
    make_demo(workplace / "data", train=4, valid=2, test=2, size=64, seed=2)
    references, commands, seconds = {}, {}, {}
    for name, line in KINDS.items():
        script, *words = (
            shlex.split(line) + shlex.split(FLAGS) + ["--dataset", str(workplace / "data")]
        )
        detector = references["stage 1"] / "best.pt" if references else ""
        commands[name] = script, [str(detector) if word == "DETECTOR" else word for word in words]
        (folder := workplace / f"whole {name}").mkdir()
        begin = time.monotonic()
        status, printed = start(*commands[name], folder)
        if status:
            raise SystemExit(f"{name} does not run:\n{printed}")
        references[name], seconds[name] = runs_in(folder)[0], time.monotonic() - begin
        print(f"{name}: {seconds[name]:.1f} s without a kill", flush=True)

    chance, done, lossy = random.Random(seed), 0, 0
    for number, (workers, name) in enumerate(itertools.cycle(itertools.product((0, 2), KINDS))):
        script, words = commands[name]
        length = seconds[name] * (1.5 if workers else 1)
        moments = [
            chance.uniform(0, length) for _ in range(min(chance.choice([1, 1, 1, 2]), count - done))
        ]
        case = [
            script,
            [*words, "--workers", str(workers)],
            workplace / str(number),
            moments,
            references[name],
        ]
        try:
            kills, lost = kill_and_go_on(*case)
        except Exception:
            kills, lost = [(moments[0], "?")], [traceback.format_exc()]
        for moment, where in kills:
            done += 1
            result = f"LOST: {'; '.join(lost)}" if lost else "went on, the same bits"
            print(
                f"{done:>4}  {name}, {workers} workers, after {moment:.2f} s: {where}: {result}",
                flush=True,
            )
        lossy += bool(lost)
        if done >= count:
            break
    print(f"{done} kills in {number + 1} runs, {lossy} runs lost something")
    return lossy
