"""Cut a detector's 91-row COCO class head down to your classes and a background row.

python shrink_head.py --in_ckpt RUN/checkpoint_best_regular.pth --out_ckpt RUN/checkpoint_mydata.pth
    --keep "cells" "blood_vessel" "glomerulus"
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from rfdetr.classes import background_row, is_class_head
from rfdetr.console import UserError, run_script, tick, warn
from rfdetr.files import make_place
from rfdetr.runs.metrics_file import highest_box_map
from rfdetr.weights import checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--in_ckpt", type=Path, required=True, help="a stage-1 checkpoint, or an official file"
    )
    parser.add_argument(
        "--out_ckpt", type=Path, required=True, help="where to write the shrunk one"
    )
    order = "classes in their new order (default: all it has); --keep=-NAME for a name with a dash"
    parser.add_argument("--keep", nargs="+", action="extend", metavar="CLASS", help=order)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.out_ckpt.exists() and args.out_ckpt.samefile(args.in_ckpt):
        raise UserError(
            f"--out_ckpt is --in_ckpt ({args.in_ckpt}): name another file, the input is never overwritten"
        )

    content = checkpoint.load(args.in_ckpt)
    table = checkpoint.table_of(content)
    placeholders = [
        name
        for name in args.keep or []
        if name in content.get("left_out", []) and name not in table.names
    ]
    for name in placeholders:
        warn(f"{name!r} is a placeholder category without objects that was never trained: left out")
    keep = [name for name in args.keep or table.names if name not in placeholders]
    small = checkpoint.shrink(content, keep)
    make_place(args.out_ckpt, "--out_ckpt")
    checkpoint.save(args.out_ckpt, small)

    new = checkpoint.table_of(small)
    rows = dict(zip(table.names, table.rows))
    print(f"{'class':<24} {'row':>5} {'new row':>8}")
    for name, row in zip(new.names, new.rows):
        print(f"{name:<24} {rows[name]:>5} {row:>8}")
    print(f"{'(background)':<24} {background_row(table):>5} {new.background:>8}")
    heads = sum(is_class_head(name) and name.endswith("weight") for name in small["model"])
    ema = ", EMA too" if small.get("ema") else ""
    tick(f"{heads} class heads cut from {table.rows_total} to {new.rows_total} rows{ema}")
    if len(new.names) < len(table.names) or table.rows_total > len(table.names) + 1:
        print(
            "Kept logits are unchanged while the ranking of proposals is. A dropped row that had claimed a proposal no "
            "longer does, and query i keeps its own embedding, so that scores may then move a little."
        )
    say_which_weights_are_better(args.in_ckpt)
    tick(f"Written: {args.out_ckpt}")
    run, out = shlex.quote(str(args.in_ckpt.parent)), shlex.quote(str(args.out_ckpt))
    print(f"Output dim: {new.rows_total}")
    print(
        f"Next:  python train_seg_stage2.py --size {content['size']['name']} --stage1_run {run} --checkpoint {out}"
    )


def say_which_weights_are_better(path: Path) -> None:
    """Tell from the run's metrics.json whether its regular or its EMA weights scored higher."""
    best = highest_box_map(path.parent)
    if len(best) < 2:  # no such file, or a run without these scores
        return
    better, other = sorted(best, key=best.get, reverse=True)
    scores = f"valid bbox/mAP {best[better]:.3f}, {other} {best[other]:.3f}"
    print(f"In this run the {better} weights scored higher: {scores}")
    if other in path.name:
        warn(
            f"{path.name} holds the {other} weights; checkpoint_best_{better}.pth holds the better ones"
        )


if __name__ == "__main__":
    run_script(main)
