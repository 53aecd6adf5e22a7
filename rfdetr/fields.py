"""Kinds of settings: how a value is written on the command line or in YAML, and what it may be.

`settings.py` declares its dataclasses with these, so that a default, its bounds and its help stand
in one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass
from pathlib import Path

from rfdetr.text import EMPTY

MOST = 10**9  # the largest number a setting takes: more is a slip, and no library takes it
LEAST_TILE = 32  # pixels, of --tile
OF_SIZE = "the size's own"  # a default that `sizes.py` has


@dataclass(frozen=True)
class Setting:
    """One setting's form: `read` turns what a user wrote into its checked value.

    `several`: a list of such values. `none`: None is a value too, it means what `help` says of the
    default. `words`: texts taken as they are beside the kind's own values ("auto"). `of_size`: the
    default is the size's. `kept`: False for what belongs to one command and not to the run that it
    starts. `bare`: the value of a flag that is given without one. `checkpoint`: a file of weights,
    for which a run's folder may stand.
    """

    read_one: Callable[[str], object]
    help: str
    metavar: str | None = None
    choices: Collection[str] = ()
    words: tuple[str, ...] = ()
    several: bool = False
    none: bool = False
    of_size: bool = False
    kept: bool = True
    bare: object = None
    checkpoint: bool = False

    def read(self, value: object) -> object:
        """The checked value of a text, or of a plain value from YAML or a checkpoint; ValueError
        says what fits.
        """
        if value is None and self.none:
            return None
        if self.several:
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"expected a list, got {value!r}")
            return tuple(self._read_one(one) for one in value)
        return self._read_one(value)

    def _read_one(self, value: object) -> object:
        if isinstance(value, bool):
            if not value and "off" in self.choices:  # YAML reads a plain off as false
                return "off"
            if self.read_one is not read_switch:
                raise ValueError(f"expected no true or false, got {value}")
            return value
        is_number = isinstance(value, (int, float)) and str(value) not in self.choices
        if is_number and self.read_one in (str, Path):
            raise ValueError(f"expected a text, got {value!r}")
        if not isinstance(value, (str, int, float, Path)):
            raise ValueError(f"expected one value, got {value!r}")
        return self.read_text(str(value))

    def read_text(self, text: str) -> object:
        """The checked value of one text; ValueError says what fits."""
        if "\0" in text:
            raise ValueError("expected no NUL character")
        if self.read_one is Path and not text:  # which Path takes for the folder one is in
            raise ValueError(f"expected a path, got {EMPTY}")
        if self.read_one is str and not (text or self.several or self.choices):
            raise ValueError(f"expected a value, got {EMPTY}")
        if text in self.words:
            return text
        if self.choices and text not in self.choices:
            near = difflib.get_close_matches(text, self.choices, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"invalid choice: {text!r}{meant}: choose from {', '.join(self.choices)}"
            )
        return self.read_one(text)


def _field(default: object, setting: Setting) -> dataclasses.Field:
    of_size = default is OF_SIZE
    setting = dataclasses.replace(setting, none=default is None, of_size=of_size)
    default = MISSING if of_size or default is REQUIRED else default
    return dataclasses.field(default=default, metadata={"setting": setting})


class _Required:
    """The default of a setting that must be given."""


REQUIRED = _Required()


def number(
    kind: type, low: float, high: float, words: tuple[str, ...] = ()
) -> Callable[[str], float]:
    """A reader of an int or float within [low, high]; its ValueError names the range, and the words
    that may stand in its place.
    """
    what = "a whole number" if kind is int else "a number"
    range_in_words = f"{what} from {in_words(low)} to {in_words(high)}"
    expected = " or ".join([*words, range_in_words])

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high:  # never true of nan
                return value
        raise ValueError(f"expected {expected}, got {text!r}")

    return read


def in_words(number: float) -> str:
    """1,000,000 or 0.9; a whole number without decimals."""
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def integer(default, help: str, low: int = 1, high: int = MOST, words: tuple[str, ...] = ()):
    """A whole number within [low, high], or one of `words`."""
    return _field(default, Setting(number(int, low, high, words), help, words=words))


def decimal(default, help: str, low: float = 0.0, high: float = MOST):
    return _field(default, Setting(number(float, low, high), help))


def gray_range(default_means: str):
    """--gray; default_means: what is done where it is not given."""
    help = (
        "what is black and white in gray of more than 8 bits: full: 0 and the most that the bits "
        "hold; 99: what cuts off a hundredth of all images' pixels at either end; auto: 99.9 "
        f"(default: {default_means})"
    )

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            return number(float, 51, 100)(text)
        raise ValueError(f"expected auto, full or a percentage of 51 to 100, got {text!r}")

    words = ("auto", "full")
    return _field(None, Setting(read, help, metavar="auto|full|PERCENT", words=words))


def read_switch(text: str) -> bool:
    value = text.strip().lower()
    if value in ("1", "true", "yes"):
        return True
    if value in ("0", "false", "no"):
        return False
    raise ValueError(f"expected 0, 1, true, false, yes or no, got {text!r}")


def switch(default, help: str):
    """The guide's 0|1 flags; true, false, yes and no do as well."""
    return _field(default, Setting(read_switch, help, metavar="0|1"))


def choice(default, help: str, choices: Collection[str]):
    return _field(default, Setting(str, help, choices=choices))


def text(default, help: str, metavar: str | None = None):
    return _field(default, Setting(str, help, metavar=metavar))


def texts(default, help: str, metavar: str | None = None):
    return _field(default, Setting(str, help, metavar=metavar, several=True))


def path(default, help: str, metavar: str | None = None):
    return _field(default, Setting(Path, help, metavar=metavar))


def checkpoint_file(default, help: str):
    """A file of weights, or a run's folder for its best.pt."""
    return _field(default, Setting(Path, help, metavar="FILE|RUN", checkpoint=True))


def for_this_command(field: dataclasses.Field, bare: object = None) -> dataclasses.Field:
    """A setting that is no part of the run it starts; `bare`: its value where the flag is given
    without one.
    """
    setting = dataclasses.replace(field.metadata["setting"], kept=False, bare=bare)
    return dataclasses.field(default=field.default, metadata={"setting": setting})


def by_size(values: dict[str, object]) -> str:
    """A default that depends on the size, for --help: "50", or "50; tiny: 60"."""
    sizes_of: dict[str, list[str]] = {}
    for size, value in values.items():
        text = str(int(value) if isinstance(value, bool) else value)
        sizes_of.setdefault(text, []).append(size)
    usual = max(sizes_of, key=lambda text: len(sizes_of[text]))
    parts = [] if len(sizes_of[usual]) < len(values) / 2 else [usual]
    for text, sizes in sizes_of.items():
        if text not in parts:
            parts.append(f"{', '.join(sizes)}: {text}")
    return "; ".join(parts)


def tile_of(help: str):
    """--tile: a side in pixels, 0 for whole images, or auto."""
    side = number(int, LEAST_TILE, MOST, ("auto", "0"))

    def read(text: str) -> int:
        return 0 if text.strip() == "0" else side(text)

    return _field(None, Setting(read, help, words=("auto",)))


def batch_of(recipes: dict[str, int]):
    """--batch of a stage; recipes: size -> images in one forward pass."""
    return integer(
        None,
        "images in one forward pass; auto: the largest that fits, batch x accum kept "
        f"(default: auto on CUDA, elsewhere {by_size(recipes)})",
        high=65536,
        words=("auto",),
    )
