"""Names that may hold anything, on a console and in a shell; standard library only."""

from __future__ import annotations

import re
import shlex
import unicodedata


def is_control(character: str) -> bool:
    """Whether a character moves a cursor, breaks a line or cannot be written at all (half a surrogate pair)."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def printable(text: object) -> str:
    """As text on one line, control characters as escapes: names in a dataset or on a disk may hold anything."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if is_control(c) else c for c in text)


def keep_flags(names: list[str]) -> str:
    """shrink_head.py's --keep for these classes in this order, to be pasted into a shell.

    A name that looks like a flag is given with an =, which argparse takes for a value.
    """
    words, listing = [], False
    for name in names:
        if name.startswith("-"):
            words.append(shlex.quote(f"--keep={name}"))
            listing = False
            continue
        if not listing:
            words.append("--keep")
        words.append(f'"{name}"' if re.fullmatch(r"[\w .-]+", name) else shlex.quote(name))
        listing = True
    return " ".join(words)
