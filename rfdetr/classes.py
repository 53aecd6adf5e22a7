"""Class tables: which class has which row of a detector's class head, and cutting a head to fit.

Three numberings, never mixed: a *category id* is the dataset's own, a *label* is 0..N-1 in
ascending category id, a *row* is a row of the class head. Only a checkpoint's table tells rows, and
names are what it is matched by.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rfdetr.console import UserError
from rfdetr.renaming import NO_RENAMES, Renames, suggest_renames

COCO_ROWS = 91
_COCO = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant - "
    "stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe - "
    "backpack umbrella - - handbag tie suitcase frisbee skis snowboard sports_ball kite "
    "baseball_bat baseball_glove skateboard surfboard tennis_racket bottle - wine_glass cup fork "
    "knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair "
    "couch potted_plant bed - dining_table - - toilet - tv laptop mouse remote keyboard cell_phone "
    "microwave oven toaster sink refrigerator - book clock vase scissors teddy_bear hair_drier "
    "toothbrush"
)
COCO_NAMES = {  # by category id; "-" is an id that COCO does not use
    category: name.replace("_", " ")
    for category, name in enumerate(_COCO.split(), start=1)
    if name != "-"
}


@dataclass(frozen=True)
class ClassTable:
    """Names, category ids and head rows of the classes, in label order."""

    names: tuple[str, ...]
    ids: tuple[int, ...]
    rows: tuple[int, ...]
    rows_total: int  # of the class head
    background: int | None  # a row

    def to_dict(self) -> dict:
        """Plain Python, as a checkpoint holds it."""
        return {
            "names": list(self.names),
            "ids": list(self.ids),
            "rows": list(self.rows),
            "rows_total": self.rows_total,
            "background": self.background,
        }

    @classmethod
    def from_dict(cls, values: dict) -> ClassTable:
        """The inverse of to_dict.  Raises ValueError or TypeError for what is no table."""
        fields = dict(values)
        for name, value in values.items():
            if isinstance(value, list):
                fields[name] = tuple(value)
        table = cls(**fields)
        table._check()
        return table

    def _check(self) -> None:
        """Raise ValueError for a table that contradicts itself, TypeError for one of odd types."""
        rows = list(self.rows)
        if self.background is not None:
            rows.append(self.background)
        numbers = [*rows, *self.ids, self.rows_total]
        sound = (
            len(self.names) == len(self.ids) == len(self.rows)
            and all(type(name) is str for name in self.names)
            and all(type(number) is int for number in numbers)
        )
        if not sound or repeated(self.names) or repeated(rows) or min(rows, default=0) < 0:
            raise ValueError("its class table is damaged")
        if max(rows, default=-1) >= self.rows_total:
            raise ValueError(f"its class table names row {max(rows)} of {self.rows_total}")

    @property
    def background_last(self) -> bool:
        """True where the last row is background and takes no part in ranking proposals."""
        return self.background == self.rows_total - 1

    @property
    def is_coco(self) -> bool:
        """True for the classes of COCO in their order."""
        return self.names == tuple(COCO_NAMES.values())

    def in_order_of(
        self,
        names: list[str],
        ids: list[int],
        where: str,
        train_again: str = "",
        renames: Renames = NO_RENAMES,
    ) -> ClassTable:
        """The same rows in a dataset's label order.

        where, train_again, renames: the dataset, a command and the --rename given, for the message.
        A dataset may have a part of COCO's classes alone. Raises UserError with all names where
        they differ.
        """
        row_of = dict(zip(self.names, self.rows))
        missing = [name for name in names if name not in row_of]
        extra = []
        if not self.is_coco:
            extra = [name for name in self.names if name not in names]
        if missing or extra:
            message = (
                f"the classes of {where} and of the checkpoint differ. "
                f"Only in the dataset: {missing or 'none'}; "
                f"only in the checkpoint: {extra or 'none'}. "
            )
            if row_of.keys() & set(names):
                message += f"Dataset: {list(names)}; checkpoint: {list(self.names)}. "
            meant = suggest_renames(missing, extra, self.names)
            if meant:
                message += f"If they are the same, add: {renames.choices(meant)}. Otherwise: "
            if missing and not extra:
                message += "If shrink_head.py --keep left them out, run it again without --keep. "
            message += "Use the checkpoint that was trained on these classes, or train again"
            raise UserError(f"{message}: {train_again}" if train_again else message)
        rows = tuple(row_of[name] for name in names)
        return replace(self, names=tuple(names), ids=tuple(ids), rows=rows)


def coco_table() -> ClassTable:
    """The table of the official COCO weights: row = category id, row 0 never used."""
    ids = tuple(COCO_NAMES)
    return ClassTable(tuple(COCO_NAMES.values()), ids, ids, COCO_ROWS, 0)


def assign_rows(names: list[str], ids: list[int], head: str) -> ClassTable:
    """Rows for a dataset's classes, in label order.

    head "dataset": rows 0..N-1 and a background row N.
    head "coco91": a COCO name takes its COCO row. Any other takes a row that COCO leaves unused,
    then rows of COCO classes that the dataset does not have, then new rows. Row 0 stays background.
    """
    if head == "dataset":
        count = len(names)
        return ClassTable(tuple(names), tuple(ids), tuple(range(count)), count + 1, count)
    row_of = {name: row for row, name in COCO_NAMES.items()}
    others = [name for name in names if name not in row_of]
    unused = [row for row in range(1, COCO_ROWS) if row not in COCO_NAMES]
    absent = [row for row, name in COCO_NAMES.items() if name not in names]
    new_rows = range(COCO_ROWS, COCO_ROWS + len(others))
    row_of |= zip(others, [*unused, *absent, *new_rows])
    rows = tuple(row_of[name] for name in names)
    rows_total = max([COCO_ROWS, *(row + 1 for row in rows)])
    return ClassTable(tuple(names), tuple(ids), rows, rows_total, 0)


def keep_classes(table: ClassTable, keep: list[str]) -> ClassTable:
    """The table of `keep` alone, in that order, with the rows of the head as it is now.

    Raises UserError for a name that is not in the table, with its near matches, and for one that
    repeats.
    """
    unknown = [_with_near_matches(name, table.names) for name in keep if name not in table.names]
    if unknown:
        known = ", ".join(repr(name) for name in table.names[:20])
        if len(table.names) > 20:
            known += " ..."
        raise UserError(
            f"--keep names no class of this checkpoint: {', '.join(unknown)}. "
            f"Its classes are {known}."
        )
    if not keep:
        raise UserError("--keep is empty: name each class once.")
    if repeated(keep):
        raise UserError(f"--keep repeats {', '.join(repeated(keep))}: name each class once.")
    labels = [table.names.index(name) for name in keep]
    ids = tuple(table.ids[label] for label in labels)
    rows = tuple(table.rows[label] for label in labels)
    return replace(table, names=tuple(keep), ids=ids, rows=rows)


def _with_near_matches(name: str, names: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if not near:
        return repr(name)
    return f"{name!r} (did you mean {' or '.join(repr(one) for one in near)}?)"


def repeated(values: Sequence) -> list:
    """The values that occur more than once, sorted."""
    return sorted(value for value, count in Counter(values).items() if count > 1)


def background_row(table: ClassTable) -> int:
    """The row that a shrunk head's background is copied from.

    The table's own background, else the first row that no class uses. Raises UserError without one.
    """
    if table.background is not None:
        return table.background
    for row in range(table.rows_total):
        if row not in table.rows:
            return row
    raise UserError(
        f"all {table.rows_total} rows of the class head belong to a class, none is left as "
        "background."
    )


def is_class_head(name: str) -> bool:
    """True for the parameters of the decoder's and the proposals' class heads, by our names."""
    return name.startswith(("class_embed.", "transformer.enc_out_class_embed."))


def keep_class_rows(state: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """Copy `state` with every class head cut to `rows`, in that order, the background's row last.

    Weights (K, C) -> (len(rows), C), biases (K,) -> (len(rows),), bit for bit. Rows are head rows,
    not category ids. Raises ValueError for a row that lies outside 0..K-1.
    """
    cut = dict(state)
    for name in filter(is_class_head, state):
        if min(rows) < 0 or max(rows) >= len(state[name]):
            raise ValueError(f"{name} has {len(state[name])} rows, rows {rows} were asked for")
        cut[name] = state[name][rows]
    return cut
