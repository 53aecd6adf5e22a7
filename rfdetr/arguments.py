"""The arguments of the Python door: whether they are what they should be, and their names in
messages that are written for flags.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from rfdetr.console import UserError
from rfdetr.resolve import settings_of
from rfdetr.text import EMPTY
from rfdetr.tool_settings import PredictionSettings

FLAG = re.compile(
    r"--(tile_overlap|tile_full|tile|letterbox|device|amp|resolution|gray)\b"
    r"(?: (auto\b|full\b|cpu\b|bf16\b|fp16\b|off\b|\d+))?"
)


def require_path(name: str, value: str | Path) -> None:
    """Raise UserError for what is no path, or an empty one."""
    if not isinstance(value, (str, os.PathLike)):
        raise UserError(f"{name} must be the path of a file, got {value!r}")
    if not str(value):
        raise UserError(f"{name} is {EMPTY}")


def require_share(name: str, value: float, most: float = 1) -> None:
    """Raise UserError for what is no number in 0..most."""
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= most:  # never true of NaN
        raise UserError(f"{name} must be a number in 0..{most}, got {value!r}")


def require_count(name: str, value: int) -> None:
    """Raise UserError for what is no whole number of 1 or more."""
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, bool):
        raise UserError(f"{name} must be a whole number of 1 or more, got {value!r}")


def require_switch(name: str, value: bool) -> None:
    """Raise UserError for what is neither true nor false."""
    if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, int) and value in (0, 1)):
        raise UserError(f"{name} must be True or False, got {value!r}")


def checked_setting(name: str, value: str | float) -> str | float:
    """A value that a flag of predict.py takes.  Raises UserError."""
    try:
        return settings_of(PredictionSettings)[name].read(value)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def as_arguments(message: str) -> str:
    """A message that names flags, as it is to name the Python door's arguments."""
    return FLAG.sub(as_argument, message).replace("leave the flag out", "leave it out")


def as_argument(flag: re.Match) -> str:
    """--tile 640 as tile=640, --letterbox 1 as letterbox=True, --tile as tile."""
    name, value = flag.groups()
    if value is None:
        return name
    if name in ("letterbox", "tile_full"):
        value = str(value != "0")
        return f"{name}={value}"
    return f"{name}={value}" if value.isdigit() else f'{name}="{value}"'


@contextmanager
def naming_arguments(in_python: bool) -> Iterator[None]:
    """UserErrors of what is done in it name arguments where that is in Python, not flags."""
    try:
        yield
    except UserError as error:
        if not in_python:
            raise
        raise UserError(as_arguments(str(error))) from error
