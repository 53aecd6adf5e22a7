"""What requirements.txt asks for and what is there; standard library only."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path


def packages(requirements: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    """({name: installed version} of this Python and each line "name>=version" of that file, {name: the least that it
    needs} of those that are missing or older)."""

    def release(
        version: str,
    ) -> list[int]:  # the leading numbers, padded: "2.10.0+cpu" -> [2, 10, 0, 0, 0, 0]
        numbers = [int(number or 0) for number in re.match(r"[\d.]*", version).group().split(".")]
        return numbers + [0] * (6 - len(numbers))

    lines = Path(requirements).read_text(encoding="utf-8")
    needed, found = dict(re.findall(r"^([\w-]+)>=([\d.]+)", lines, re.MULTILINE)), {}
    for name in needed:
        try:
            found[name] = metadata.version(name) or "damaged"  # None for a package half removed
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    found, needed = {"python": platform.python_version(), **found}, {"python": "3.10", **needed}
    return found, {
        name: least for name, least in needed.items() if release(found[name]) < release(least)
    }
