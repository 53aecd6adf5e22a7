"""Cut a detector's 91-row COCO class head down to your classes and a background row.

python shrink_head.py --in_ckpt RUN/checkpoint_best_regular.pth --out_ckpt RUN/checkpoint_mydata.pth
    --keep "cells" "blood_vessel" "glomerulus"
"""

from __future__ import annotations

from rfdetr.sigterm import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # while modules are imported

from rfdetr.cli import check_command, script_settings
from rfdetr.tool_settings import ShrinkSettings

# before torch, whose import takes seconds
check_command(ShrinkSettings, __doc__, __name__)

from pathlib import Path

from rfdetr.classes import ClassTable, background_row, is_class_head
from rfdetr.console import UserError, run_script, tick, warn
from rfdetr.files import make_place, note_of_earlier, refuse_same_file
from rfdetr.runs.metrics_file import highest_box_map
from rfdetr.training.keeper import refuse_file_of_run
from rfdetr.training.next_commands import after_shrink
from rfdetr.weights import checkpoint


def main(argv: list[str] | None = None) -> None:
    settings = script_settings(ShrinkSettings, __doc__, argv)
    source = settings.in_ckpt
    target = settings.out_ckpt
    refuse_same_file(target, "--out_ckpt", source, "--in_ckpt")
    refuse_file_of_run(target, "--out_ckpt", "checkpoint_mydata.pth")
    content = checkpoint.load(source)
    table = checkpoint.table_of(content)
    keep = list(table.names)
    if settings.keep:
        keep = without_placeholders(settings.keep, content, table)
    shrunk = checkpoint.shrink(content, keep)
    make_place(target, "--out_ckpt")
    replaced = note_of_earlier(target)
    warn_of_other_classes(target, checkpoint.table_of(shrunk).names)
    checkpoint.save(target, shrunk)

    new_table = checkpoint.table_of(shrunk)
    print_rows(table, new_table)
    heads = 0
    for name in shrunk["model"]:
        heads += is_class_head(name) and name.endswith("weight")
    ema = ", EMA too" if shrunk.get("ema") else ""
    tick(f"{heads} class heads cut from {table.rows_total} to {new_table.rows_total} rows{ema}")
    if len(new_table.names) < len(table.names) or table.rows_total > len(table.names) + 1:
        print(
            "The kept classes score as before, but for places among the model's candidates that a "
            "dropped class had won: others take them, and scores may move a little."
        )
    if content["stage"] != "segmentation":  # its detector is stage 1's, frozen
        say_which_weights_are_better(source)
    tick(f"Written: {target}{replaced}")
    print(f"Output dim: {new_table.rows_total}")
    remark, command = after_shrink(content, shrunk, target)
    if remark:
        print(remark)
    if command:
        print(f"Next:  {command}")


def without_placeholders(keep: tuple[str, ...], content: dict, table: ClassTable) -> list[str]:
    """The classes to keep but for placeholder categories, which are named."""
    kept = []
    for name in keep:
        if name in content.get("left_out", []) and name not in table.names:
            warn(
                f"{name!r} is a placeholder category without objects that was never trained: "
                "left out"
            )
        else:
            kept.append(name)
    return kept


def warn_of_other_classes(file: Path, names: list[str]) -> None:
    """Warn where a checkpoint that is replaced has other classes than `names`."""
    if not file.exists():
        return
    try:
        earlier = checkpoint.table_of(checkpoint.load(file)).names
    except UserError:  # no checkpoint
        return
    if set(earlier) != set(names):
        warn(
            f"{file} had the classes {', '.join(earlier)} and now has {', '.join(names)}: "
            "commands and runs that name it mean the earlier ones. To keep both, write to another "
            "file with --out_ckpt"
        )


def print_rows(table: ClassTable, new_table: ClassTable) -> None:
    """Which row of the head each class had, and has."""
    rows = dict(zip(table.names, table.rows))
    print(f"{'class':<24} {'row':>5} {'new row':>8}")
    for name, row in zip(new_table.names, new_table.rows):
        print(f"{name:<24} {rows[name]:>5} {row:>8}")
    print(f"{'(background)':<24} {background_row(table):>5} {new_table.background:>8}")


def say_which_weights_are_better(path: Path) -> None:
    """Whether the run's regular or EMA weights scored higher, as far as metrics.json tells."""
    best = highest_box_map(path.parent)
    if len(best) < 2:
        return
    better, other = sorted(best, key=best.get, reverse=True)
    scores = f"valid bbox/mAP {best[better]:.3f}, {other} {best[other]:.3f}"
    if f"{best[better]:.3f}" == f"{best[other]:.3f}":
        print(f"In this run the regular and the ema weights scored alike: {scores}")
        return
    print(f"In this run the {better} weights scored higher: {scores}")
    if other in path.name:
        warn(
            f"{path.name} holds the {other} weights; "
            f"checkpoint_best_{better}.pth holds the better ones"
        )


if __name__ == "__main__":
    run_script(
        main,
        interrupted="interrupted: the file is written at the end, whole or not at all. "
        "The same command begins again from the start",
    )
