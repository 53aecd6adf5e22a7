"""Class tables: which dataset class lives in which row of a detector's class head, and cutting a head to fit.

Three numberings, never mixed: a *category id* is the dataset's own, a *label* is 0..N-1 in ascending category id, a
*row* is a row of the class head. Only a checkpoint's table tells rows, and names are what it is matched by.
"""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass, replace

from torch import Tensor

from rfdetr.console import UserError

COCO_ROWS = 91
_COCO = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant - stop_sign parking_meter "
    "bench bird cat dog horse sheep cow elephant bear zebra giraffe - backpack umbrella - - handbag tie suitcase "
    "frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle - "
    "wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair "
    "couch potted_plant bed - dining_table - - toilet - tv laptop mouse remote keyboard cell_phone microwave oven "
    "toaster sink refrigerator - book clock vase scissors teddy_bear hair_drier toothbrush"
)
COCO_NAMES = {
    i: name.replace("_", " ") for i, name in enumerate(_COCO.split(), start=1) if name != "-"
}


@dataclass(frozen=True)
class ClassTable:
    """Names, category ids and head rows of the classes, in label order; `rows_total` rows, one of them background."""

    names: tuple[str, ...]
    ids: tuple[int, ...]
    rows: tuple[int, ...]
    rows_total: int
    background: int | None

    def to_dict(self) -> dict:
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict) -> ClassTable:
        """Raises ValueError or TypeError for what is no table."""
        table = cls(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
            }
        )
        rows = [*table.rows, *([] if table.background is None else [table.background])]
        sound = len(table.names) == len(table.ids) == len(table.rows) and {
            *map(type, table.names)
        } <= {str}
        sound = (
            sound
            and {*map(type, (*rows, *table.ids, table.rows_total))} <= {int}
            and len({*rows}) == len(rows)
        )
        if (
            not sound
            or len({*table.names}) < len(table.names)
            or not 0 <= min(rows, default=0) <= max(rows, default=0)
        ):
            raise ValueError("its class table is damaged")
        if max(rows, default=-1) >= table.rows_total:
            raise ValueError(f"its class table names row {max(rows)} of {table.rows_total}")
        return table

    @property
    def background_last(self) -> bool:
        """True where the last row is background and takes no part in ranking proposals."""
        return self.background == self.rows_total - 1

    @property
    def is_coco(self) -> bool:
        return self.names == tuple(COCO_NAMES.values())

    def in_order_of(self, names: list[str], ids: list[int], where: str) -> ClassTable:
        """The same rows in a dataset's label order.  Raises UserError with both lists where the names differ."""
        row_of = dict(zip(self.names, self.rows))
        missing = [name for name in names if name not in row_of]
        extra = [] if self.is_coco else [name for name in self.names if name not in names]
        if missing or extra:
            raise UserError(
                f"the classes of {where} and of the checkpoint differ. Only in the dataset: {missing or 'none'}; only "
                f"in the checkpoint: {extra or 'none'}. Dataset: {list(names)}; checkpoint: {list(self.names)}. Use "
                "the checkpoint that was trained on these classes, or train again: python train_detector_stage1.py"
            )
        return replace(
            self, names=tuple(names), ids=tuple(ids), rows=tuple(row_of[name] for name in names)
        )


def coco_table() -> ClassTable:
    """The table of the official COCO weights: row = category id, row 0 never used."""
    ids = tuple(COCO_NAMES)
    return ClassTable(tuple(COCO_NAMES.values()), ids, ids, COCO_ROWS, 0)


def assign_rows(names: list[str], ids: list[int], head: str) -> ClassTable:
    """Rows for a dataset's classes, in label order.

    head "dataset": rows 0..N-1 and a background row N. head "coco91": a COCO name takes its COCO row, any other a row
    COCO leaves unused, then rows of COCO classes the dataset has not, then new rows; row 0 stays background.
    """
    if head == "dataset":
        return ClassTable(
            tuple(names), tuple(ids), tuple(range(len(names))), len(names) + 1, len(names)
        )
    row_of = {name: row for row, name in COCO_NAMES.items()}
    others = [name for name in names if name not in row_of]
    unused = [row for row in range(1, COCO_ROWS) if row not in COCO_NAMES]
    spare = unused + [row for row, name in COCO_NAMES.items() if name not in names]
    row_of |= zip(others, itertools.chain(spare, itertools.count(COCO_ROWS)))
    rows = tuple(row_of[name] for name in names)
    return ClassTable(tuple(names), tuple(ids), rows, max(COCO_ROWS, *(row + 1 for row in rows)), 0)


def keep_classes(table: ClassTable, keep: list[str]) -> ClassTable:
    """The table of `keep` alone, in that order, with the rows of the head as it is now.

    Raises UserError for a name that is not in the table, with its near matches, and for one that repeats.
    """
    problems = []
    for name in (name for name in keep if name not in table.names):
        near = " or ".join(map(repr, difflib.get_close_matches(name, table.names, n=3, cutoff=0.5)))
        problems.append(f"{name!r} (did you mean {near}?)" if near else repr(name))
    if problems:
        shown = ", ".join(map(repr, table.names[:20])) + (" ..." if len(table.names) > 20 else "")
        raise UserError(
            f"--keep names no class of this checkpoint: {', '.join(problems)}. Its classes are {shown}."
        )
    repeated = sorted({name for name in keep if keep.count(name) > 1})
    if repeated or not keep:
        raise UserError(
            f"--keep {'repeats ' + ', '.join(repeated) if repeated else 'is empty'}: name each class once."
        )
    chosen = [table.names.index(name) for name in keep]
    ids, rows = (tuple(column[i] for i in chosen) for column in (table.ids, table.rows))
    return replace(table, names=tuple(keep), ids=ids, rows=rows)


def background_row(table: ClassTable) -> int:
    """The row that a shrunk head's background is copied from: the table's own, else the first that no class uses."""
    free = (row for row in range(table.rows_total) if row not in table.rows)
    row = next(free, None) if table.background is None else table.background
    if row is None:
        raise UserError(
            f"all {table.rows_total} rows of the class head belong to a class, none is left as background."
        )
    return row


def is_class_head(name: str) -> bool:
    """True for the parameters of the decoder's and the proposals' class heads, by our names."""
    return name.startswith(("class_embed.", "transformer.enc_out_class_embed."))


def keep_class_rows(state: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """Copy `state` with every class head cut to `rows`, in that order (the background's row given last).

    Weights (K, C) -> (len(rows), C), biases (K,) -> (len(rows),), bit for bit. Rows are head rows, not category ids.
    Raises ValueError for a row that lies outside 0..K-1.
    """
    cut = dict(state)
    for name in filter(is_class_head, state):
        if min(rows) < 0 or max(rows) >= len(state[name]):
            raise ValueError(f"{name} has {len(state[name])} rows, rows {rows} were asked for")
        cut[name] = state[name][rows]
    return cut
