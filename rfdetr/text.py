"""Names that may hold anything, made safe for a console and for a shell; standard library only."""

from __future__ import annotations

import re
import shlex
import unicodedata


def is_control(character: str) -> bool:
    """Whether a character moves a cursor, breaks a line or cannot be encoded (half a surrogate)."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def printable(text: object) -> str:
    """`text` on one line, with control characters as escapes."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if is_control(c) else c for c in text)


def keep_flags(names: list[str]) -> str:
    """shrink_head.py's --keep flags for these classes in this order, to be pasted into a shell.

    A name that begins with a dash is written as --keep=NAME: argparse would take it for a flag.
    """
    words = []
    after_keep = False  # whether another name may follow without a new --keep
    for name in names:
        if name.startswith("-"):
            words.append(shlex.quote(f"--keep={name}"))
            after_keep = False
            continue
        if not after_keep:
            words.append("--keep")
            after_keep = True
        is_plain = re.fullmatch(r"[\w .-]+", name)
        words.append(f'"{name}"' if is_plain else shlex.quote(name))
    return " ".join(words)
