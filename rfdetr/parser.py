"""argparse as the scripts use it; standard library only."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection
from typing import NoReturn

from rfdetr.console import UserError


class Parser(argparse.ArgumentParser):
    """argparse that takes no flag for another one that it begins.

    Its refusals are UserErrors of one line and the command that lists all flags. arguments: what
    the usage names before the flags.
    """

    def __init__(self, arguments: str = "", **options):
        super().__init__(
            usage=f"python %(prog)s {arguments}[--FLAG VALUE ...]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(unknown_words(unknown, self._option_string_actions))
        return given

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise UserError(f"{message}\nall flags: python {self.prog} --help")


def unknown_words(words: list[str], flags: Collection[str]) -> str:
    """What is wrong with words of a command line that belong to no flag."""
    unknown = [word.split("=")[0] for word in words if word.startswith("-")]
    if not unknown:
        return f"{words[0]!r} belongs to no flag"
    told = []
    names = [flag.lstrip("-") for flag in flags]
    for flag in unknown:
        name = flag.lstrip("-").replace("-", "_")
        near = [known for known in names if known.startswith(name)]
        near = near or difflib.get_close_matches(name, names, n=1)
        meant = " or ".join(f"--{known}" for known in near[:3])
        told.append(f"{flag} (did you mean {meant}?)" if near else flag)
    return f"there is no flag {', '.join(told)}"
