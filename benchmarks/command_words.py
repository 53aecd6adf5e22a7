"""The words of a benchmark's command line, and those behind -- for the scripts that it runs."""

from __future__ import annotations

import sys


def own_and_more() -> tuple[list[str], list[str]]:
    """(its own words, those behind --)."""
    words = sys.argv[1:]
    if "--" not in words:
        return words, []
    cut = words.index("--")
    return words[:cut], words[cut + 1 :]
