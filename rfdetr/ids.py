"""Ids of a COCO file: whole numbers, which some tools write as texts or decimals."""

from __future__ import annotations

import re

WHOLE = 2**53  # below it, float64 holds all whole numbers


def is_whole(value: object) -> bool:
    """Whether it is a whole number that float64 holds: pycocotools keeps ids in such arrays.

    True and false are none.
    """
    return type(value) is int and -WHOLE < value < WHOLE


def other_form(value: object) -> int | str | None:
    """The number that a text or a decimal means, the text of a number; None for anything else."""
    if is_whole(value):
        return str(value)
    if type(value) is float and value.is_integer() and is_whole(int(value)):
        return int(value)
    is_number = type(value) is str and re.fullmatch("0|-?[1-9][0-9]{0,17}", value)
    return int(value) if is_number and is_whole(int(value)) else None


def whole_id(value: object) -> int | None:
    """The whole number that an id is, or means in another form."""
    return value if is_whole(value) else other_form(value)
