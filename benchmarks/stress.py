"""Training runs that are killed (kill -9) at random moments and gone on with: nothing may be lost.

python benchmarks/stress.py --kills 200 --cases 10000

Each kind of run is made once without a kill. The others are killed once or twice, at any moment of their lives, and
must end with the same bits: weights, averages, optimizer, random state and figures. A line a kill; exit status 1 where
anything was lost. The moments follow from --seed; where they fall in a run depends on the machine. Then
--cases damaged and hostile inputs (benchmarks/fuzz.py) go through all scripts.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.fuzz import KINDS as KINDS_OF_INPUT  # noqa: E402
from benchmarks.fuzz import run_cases  # noqa: E402
from rfdetr.console import run_script  # noqa: E402
from rfdetr.data.demo import make_demo  # noqa: E402
from rfdetr.runs.metrics_file import read_metrics  # noqa: E402
from rfdetr.weights import checkpoint  # noqa: E402

FLAGS = "--size tiny --resolution 32 --device cpu --batch 2 --min_steps 5 --epochs 2 --save_minutes 0 --run_test 1"
KINDS = {  # name -> script and its own flags; DETECTOR is the best.pt of stage 1
    "stage 1": "train_detector_stage1 --head dataset --multi_scale 1 --drop_path 0.3",
    "stage 2, cache in RAM": "train_seg_stage2 --checkpoint DETECTOR --cache ram",
    "stage 2, cache on disk": "train_seg_stage2 --checkpoint DETECTOR --cache disk",
    "stage 2, no cache": "train_seg_stage2 --checkpoint DETECTOR --cache off",
    "single stage": "train_seg_single_stage",
}
MEASURED = {"images_per_s", "data_s", "compute_s", "epoch_s", "evaluation_s", "peak_memory_mb"}
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


# ---------------------------------------------------------------- what a run left


def plain(value):
    """Nested checkpoint content with tensors as lists, so that == compares bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.flatten().tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def figures(run: Path) -> dict:
    """metrics.json without the command, and without what is measured: times, rates and memory."""
    metrics = read_metrics(run)
    for record in metrics["epochs"]:
        record["train"] = {
            name: value for name, value in record["train"].items() if name not in MEASURED
        }
    return {key: metrics.get(key) for key in ("epochs", "best", "test", "class_names", "stage")}


def differences(one: Path, other: Path) -> list[str]:
    """Where two finished runs are not the same, bit for bit."""
    found = []
    for file, keys in (
        ("last.pt", ("model", "ema", "training")),
        ("best.pt", ("model", "weights", "epoch")),
    ):
        a, b = (torch.load(run / file) for run in (one, other))
        found += [f"{file}: {key}" for key in keys if plain(a[key]) != plain(b[key])]
    a, b = figures(one), figures(other)
    return found + [f"metrics.json: {key}" for key in a if a[key] != b[key]]


def damaged(run: Path) -> list[str]:
    """Files of a run, whatever moment it ended at, that do not load; half written ones have a name of their own."""
    found = []
    for path in (path for path in run.iterdir() if path.suffix in (".pt", ".pth", ".json")):
        try:
            json.loads(path.read_bytes()) if path.suffix == ".json" else checkpoint.load(path)
        except Exception as error:
            found.append(f"{path.name}: {error}")
    return found


def runs_in(folder: Path) -> list[Path]:
    """The run folders, oldest first."""
    found = [path for path in folder.glob("runs/*_*_*") if re.search(r"_\d+$", path.name)]
    return sorted(found, key=lambda path: int(path.name.rsplit("_", 1)[1]))


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


# ---------------------------------------------------------------- kills


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--cases", type=int, default=0, help="of damaged and hostile input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="a new folder to leave the runs in, to look at"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        workplace = args.keep or Path(temporary)
        workplace.mkdir(exist_ok=True)
        lost = kill_runs(args.kills, args.seed, workplace) if args.kills else 0
    faults = run_cases(list(KINDS_OF_INPUT), 0, args.cases, args.seed) if args.cases else 0
    sys.exit(1 if lost or faults else 0)


if __name__ == "__main__":
    main()
