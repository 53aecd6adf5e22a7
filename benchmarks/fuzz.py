"""Damaged and hostile input for the scripts: each case ends in success or one paragraph and exit 2.

python benchmarks/fuzz.py --cases 10000 --seed 0
python benchmarks/fuzz.py --cases 1 --seed 0 --first 4711 --kinds checkpoint --keep   (one again)
python benchmarks/fuzz.py --evaluation 1200     (instead: random evaluations against pycocotools)

The cases themselves are in testkit/.  A case is made from (seed, kind, number) alone and runs in
this process, through the script's main(argv), in a folder of its own. No traceback, no "defect of
the program", at most 5 s of CPU time and 2 GB of memory, strict JSON in every file written, nothing
changed outside what the command names as output.
"""

# ruff: noqa: E402 (the repository is put on the path first)
from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from testkit.fuzz_cases import KINDS
from testkit.fuzzer import run_cases
from testkit.random_evaluations import run_sets


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument(
        "--keep", action="store_true", help="keep the last case's folder, and say where it is"
    )
    parser.add_argument(
        "--evaluation", type=int, metavar="N", help="instead: N evaluations against pycocotools"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.evaluation:
        found = run_sets(args.first, args.evaluation, args.seed)
    else:
        found = run_cases(args.kinds, args.first, args.cases, args.seed, args.keep)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
