"""How long should torch's threads spin while they wait for each other?

python benchmarks/threads.py --busy 0        (an idle machine)
python benchmarks/threads.py --busy 2        (beside so many processes that compute)

OpenMP's threads spin before they sleep. On an idle machine that is the fastest; beside other work,
a thread that spins takes the core from the one it waits for. Training steps of tiny at batch 4 run
in processes of their own, in turns, each with another environment; printed are images a second and
their ratio to the first one's.
"""

# ruff: noqa: E402 (the repository is put on the path first)
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rfdetr.runs.environment import environment

ENVIRONMENTS = {
    "as it is": {"GOMP_SPINCOUNT": ""},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": ""},
}

STEPS = """
import sys, time
import torch
from rfdetr.classes import COCO_ROWS, assign_rows
from rfdetr.device import Precision
from rfdetr.models.detector import Detector
from rfdetr.sizes import SIZES, LossWeights
from rfdetr.training.auto_batch import random_batch
from rfdetr.training.engine import Progress
from rfdetr.training.objective import DetectorObjective

seconds, batch = float(sys.argv[1]), 4
model = Detector(SIZES["tiny"], COCO_ROWS).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
table = assign_rows(["object"], [1], "coco91")
precision = Precision(torch.device("cpu"))
losses = DetectorObjective(table, LossWeights(), precision, (), 0, Progress())
begin, done = None, -2  # two steps warm up
while begin is None or time.perf_counter() - begin < seconds:
    sum(losses(model, random_batch(batch, 160), 8.0).values()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    done += 1
    if done == 0:
        begin = time.perf_counter()
print(done * batch / (time.perf_counter() - begin))
"""


def images_per_second(variables: dict[str, str], seconds: float) -> float:
    merged = os.environ | variables
    kept = {name: value for name, value in merged.items() if value}
    command = [sys.executable, "-c", STEPS, str(seconds)]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--busy", type=int, default=0, help="other processes that compute")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    args = parser.parse_args()
    info = environment()
    print(f"{info['cpu']}, {info['threads']} threads, torch {info['torch']}, {info['commit']}")
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(args.busy)]
    measured: dict[str, list[float]] = {name: [] for name in ENVIRONMENTS}
    try:
        for _ in range(args.rounds):
            for name, variables in ENVIRONMENTS.items():
                measured[name].append(images_per_second(variables, args.seconds))
    finally:
        for other in others:
            other.kill()
    print(f"beside {args.busy} busy processes\n| environment | images/s | ratio |\n|---|---|---|")
    first = statistics.median(measured["as it is"])
    for name, values in measured.items():
        each = " ".join(f"{value:.1f}" for value in values)
        print(f"| {name} | {each} | {statistics.median(values) / first:.2f} |")


if __name__ == "__main__":
    main()
