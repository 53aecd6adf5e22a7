"""Training runs that are killed (kill -9) at random moments and gone on with: nothing may be lost.

python benchmarks/stress.py --kills 200 --cases 10000

Each kind of run is made once without a kill. The others are killed once or twice, at any moment of
their lives, and must end with the same bits: weights, averages, optimizer, random state and
figures. A line a kill; exit status 1 where anything was lost. The moments follow from --seed; where
they fall in a run depends on the machine. Then --cases damaged and hostile inputs
(benchmarks/fuzz.py) go through all scripts.
"""

# ruff: noqa: E402 (the repository is put on the path first)
from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from testkit.fuzz_cases import KINDS
from testkit.fuzzer import run_cases
from testkit.kills import kill_runs


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
    faults = run_cases(list(KINDS), 0, args.cases, args.seed) if args.cases else 0
    sys.exit(1 if lost or faults else 0)


if __name__ == "__main__":
    main()
