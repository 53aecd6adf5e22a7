"""Which mask head, which cached views, or both stages at once?  Mask mAP against seconds on a
dataset of yours.

python benchmarks/mask_quality.py --dataset nuclei --checkpoint RUN/checkpoint_mydata.pth --epochs 8
python benchmarks/mask_quality.py --dataset D --checkpoint F --views 1 2 4 fresh -- --seed 1
python benchmarks/mask_quality.py --dataset nuclei --joint nano official --joint_epochs 8

A row is a run of stage 2: a head, and the flips of each image that are cached (1, 2, 4) or `fresh`,
new augmentation each time the detector is run again. Box mAP is the frozen detector's, the same in
every such row. `joint` rows are runs of train_seg_single_stage.py from scratch, whose time is to be
compared with that of both stages; `official` is the package's own mask head. What follows `--` goes
to the script as it is. Seconds are those of training (caching and reading included, evaluation
not); `epoch` is the best of valid segm/mAP, `after` the time up to its end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from command_words import own_and_more

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = [
    "head",
    "views",
    "mask mAP",
    "mask mAP50",
    "box mAP",
    "mask/box",
    "epoch",
    "train s",
    "after, s",
    "whole, s",
]


# the single stage takes its size's mask head: this one with another
JOINT = """
import sys
from dataclasses import replace
sys.path.insert(0, sys.argv.pop(1))
from rfdetr.sizes import SIZES
import train_seg_single_stage
head, size = sys.argv.pop(1), sys.argv[sys.argv.index("--size") + 1]
SIZES[size] = replace(SIZES[size], mask_head=head)
train_seg_single_stage.main()
"""


def one_run(args: argparse.Namespace, head: str, views: str) -> list[str]:
    """A row of the table; `views` "joint" trains detector and masks together."""
    folder = args.output_dir / f"{head}_{views}"
    if views == "joint":
        command = [sys.executable, "-c", JOINT, str(ROOT), head, "--epochs", str(args.joint_epochs)]
        command += ["--pretrain_weights", "none"]
    else:
        command = [
            sys.executable,
            str(ROOT / "train_seg_stage2.py"),
            "--checkpoint",
            str(args.checkpoint),
        ]
        command += ["--mask_head", head, "--epochs", str(args.epochs)]
        command += (
            ["--cache", "off"] if views == "fresh" else ["--cache", "ram", "--cache_views", views]
        )
    command += ["--dataset", str(args.dataset), "--size", args.size, "--output_dir", str(folder)]
    command += ["--tensorboard", "0", "--multi_scale", "0"]
    begin = time.perf_counter()
    done = subprocess.run(command + args.more, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    whole = time.perf_counter() - begin
    from rfdetr.runs.metrics_file import read_metrics

    result = read_metrics(folder)
    best, epochs = result["best"], result["epochs"]
    scores = epochs[best["epoch"] - 1]["valid_ema" if best["weights"] == "ema" else "valid"]
    mask, box = scores["segm"], scores["bbox"]["mAP"]
    # what is neither an epoch's training nor its evaluation is the start, with the caching in it
    measured = sum(e["train"]["epoch_s"] + e["train"].get("evaluation_s", 0) for e in epochs)
    seconds = [whole - measured] + [e["train"]["epoch_s"] for e in epochs]
    share = f"{mask['mAP'] / box:.3f}" if box else "-"
    row = [
        head,
        views,
        f"{mask['mAP']:.3f}",
        f"{mask['mAP50']:.3f}",
        f"{box:.3f}",
        share,
        f"{best['epoch']}/{len(epochs)}",
    ]
    return row + [f"{sum(seconds):.0f}", f"{sum(seconds[: best['epoch'] + 1]):.0f}", f"{whole:.0f}"]


def main() -> None:
    own, more = own_and_more()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="a trained detector, shrunk to the dataset")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--heads", nargs="+", default=["nano", "standard"])
    parser.add_argument(
        "--views", nargs="+", choices=["1", "2", "4", "fresh"], default=["1", "2", "4", "fresh"]
    )
    parser.add_argument("--joint", nargs="+", choices=["nano", "standard", "official"], default=[])
    parser.add_argument("--joint_epochs", type=int, default=8)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/mask_quality"), help="one folder a run in it"
    )
    args = parser.parse_args(own, argparse.Namespace(more=more))
    sys.path.insert(0, str(ROOT))
    from rfdetr.runs.environment import environment

    info = environment()
    print(
        f"{info['cpu']}, {info['threads']} threads, torch {info['torch']}, {info['os']}, "
        f"commit {info['commit']}"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|" + "---|" * len(COLUMNS), flush=True)
    rows = [(head, views) for head in args.heads for views in args.views] if args.checkpoint else []
    for head, views in [*rows, *((head, "joint") for head in args.joint)]:
        print(f"| {' | '.join(one_run(args, head, views))} |", flush=True)


if __name__ == "__main__":
    main()
