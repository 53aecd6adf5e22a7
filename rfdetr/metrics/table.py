"""A split's figures as lines for the console."""

from __future__ import annotations

from rfdetr.metrics.coco_eval import FIGURES
from rfdetr.metrics.overlap import SCORE_THRESHOLD
from rfdetr.text import with_its_blanks

TABLE_COLUMNS = [*FIGURES[:6], "AR100"]
TABLE_CLASSES = 12  # more are counted, not listed
TABLE_LETTERS = 30  # of a class name


def format_table(summary: dict) -> str:
    """A summary() as lines for the console: the split's figures, then mAP50 by class."""
    kinds = {"box": summary["bbox"]}
    if "segm" in summary:
        kinds["mask"] = summary["segm"]
    names = list(summary["bbox"]["per_class"])
    listed = {name: _shortened(name) for name in names[:TABLE_CLASSES]}
    width = max([7, *map(len, listed.values())])

    lines = [_row("", [key.removeprefix("mAP_") for key in TABLE_COLUMNS], width)]
    for title, figures in kinds.items():
        lines.append(_row(title, [figures[key] for key in TABLE_COLUMNS], width))
    further = [key for key in summary["bbox"] if "@" in key]
    if further:
        lines.append(_row("", further, width, cell_width=9))
        for title, figures in kinds.items():
            lines.append(_row(title, [figures[key] for key in further], width, cell_width=9))
    if "mask" in summary:
        overlap = summary["mask"]
        counted = f"  (all pixels of a class; scores >= {SCORE_THRESHOLD})"
        lines.append(_row("", ["gIoU", "cIoU", "Dice"], width) + counted)
        lines.append(_row("overlap", [overlap["giou"], overlap["ciou"], overlap["dice"]], width))
    lines.append(_row("mAP50", list(kinds), width))
    for name, shortened in listed.items():
        values = [figures["per_class"][name]["mAP50"] for figures in kinds.values()]
        lines.append(_row(shortened, values, width))
    if len(names) > len(listed):
        lines.append(f"... and {len(names) - len(listed)} more")
    return "\n".join(lines)


def _shortened(name: str) -> str:
    name = with_its_blanks(name)
    if len(name) <= TABLE_LETTERS:
        return name
    return name[: TABLE_LETTERS - 3] + "..."


def _row(title: str, cells: list[str | float | None], width: int, cell_width: int = 8) -> str:
    """A line of the table: a title of `width` letters and its cells, "-" for None."""
    line = f"{title:<{width}}"
    for cell in cells:
        if cell is None:
            cell = "-"
        elif not isinstance(cell, str):
            cell = f"{cell:.3f}"
        line += f"{cell:>{cell_width}}"
    return line
