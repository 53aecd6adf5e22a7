"""Names that may hold anything, made safe for a console and for a shell; standard library only."""

from __future__ import annotations

import re
import shlex
import unicodedata
from pathlib import PurePath

EMPTY = "an empty text: is a variable of the shell unset?"  # where a path is wanted
DOWNLOAD_FIRST = "is a URL: download it first, and give the file (of an archive: its folder)"

MOST_DIGITS = 9  # of a score behind the point


def is_control(character: str) -> bool:
    """Whether a character moves a cursor, breaks a line or cannot be encoded (half a surrogate)."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def without_controls(name: str) -> str:
    """A name with single blanks where control characters and blanks were."""
    characters = [" " if is_control(character) else character for character in name]
    return " ".join("".join(characters).split())


def printable(text: object) -> str:
    """`text` on one line, with control characters as escapes."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if is_control(c) else c for c in text)


def with_its_blanks(name: str) -> str:
    """A class name, in quotes where it begins or ends with a blank, or is empty."""
    return printable(name) if name and name == name.strip() else f'"{printable(name)}"'


def counted(number: int, noun: str) -> str:
    """1 class, 2 classes."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"


def rounded_down(score: float) -> str:
    """A number in 0..1 that is no larger than `score`, of one digit that is not 0, for a flag."""
    digits = 1
    while digits < MOST_DIGITS and score * 10**digits < 1:
        digits += 1
    return f"{int(score * 10**digits) / 10**digits:.{digits}f}"


def with_article(noun: str) -> str:
    """a list, an int."""
    return f"{'an' if noun[0] in 'aeioAEIO' else 'a'} {noun}"


def quoted(word: str) -> str:
    """A word of a command that bash and PowerShell both read as it is; where they cannot agree
    (an apostrophe and a dollar in one name, say), bash does.
    """
    # PowerShell breaks a bare -word at a dot or colon
    if re.fullmatch(r"--?[A-Za-z0-9_=-]+|[A-Za-z0-9_+=:./][A-Za-z0-9_+=:./-]*", word):
        return word
    if not re.search(r"['‘’‚‛\n]", word):  # PowerShell takes the curved ones for the straight one
        return f"'{word}'"
    if re.fullmatch(r"[\w .,:;/()&+=@#%'‘’‚‛-]+", word):
        return f'"{word}"'
    return shlex.quote(word)


def quoted_name(name: str) -> str:
    """A class name (or OLD=NEW) as a word of a command, in double quotes where they serve."""
    return f'"{name}"' if re.fullmatch(r"[\w .=-]+", name) else quoted(name)


def is_url(path: str | PurePath) -> bool:
    """Whether a path is a URL, also one of whose two slashes a Path has made one."""
    text = path.as_posix() if isinstance(path, PurePath) else path
    return bool(re.match("[A-Za-z][A-Za-z0-9+.-]+:/", text))


def as_typed(path: object) -> str:
    """A path, or a URL with both its slashes, of which a Path has made one."""
    return re.sub("^([A-Za-z][A-Za-z0-9+.-]+:)/(?!/)", r"\1//", str(path))


def command_line(*words: object) -> str:
    """A command to be pasted into a shell."""
    return " ".join(quoted(str(word)) for word in words)


def keep_flags(names: list[str]) -> str:
    """shrink_head.py's --keep flags for these classes in this order, to be pasted into a shell.

    A name that begins with a dash is written as --keep=NAME: argparse would take it for a flag.
    """
    words = []
    after_keep = False  # whether another name may follow without a new --keep
    for name in names:
        if name.startswith("-"):
            words.append(quoted(f"--keep={name}"))
            after_keep = False
            continue
        if not after_keep:
            words.append("--keep")
            after_keep = True
        words.append(quoted_name(name))
    return " ".join(words)
