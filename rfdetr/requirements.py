"""Which packages requirements.txt asks for, and which are installed; standard library only."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path

LEAST_PYTHON = "3.10"


def installed_and_missing(requirements: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    """Compare this Python's packages with a file of lines "name>=version".

    Returns {name: installed version, or "missing" or "damaged"} of "python" and every line, and
    {name: least version} of those that are missing or older.
    """
    text = Path(requirements).read_text(encoding="utf-8")
    least = {"python": LEAST_PYTHON}
    least.update(re.findall(r"^([\w-]+)>=([\d.]+)", text, re.MULTILINE))
    installed = {name: _installed_version(name) for name in least}
    missing = {}
    for name, version in least.items():
        if _numbers(installed[name]) < _numbers(version):
            missing[name] = version
    return installed, missing


def _installed_version(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name) or "damaged"  # None for a package half removed
    except metadata.PackageNotFoundError:
        return "missing"


def _numbers(version: str) -> list[int]:
    """The leading numbers of a version, padded with zeros: "2.10.0+cpu" -> [2, 10, 0, 0, 0, 0]."""
    leading = re.match(r"[\d.]*", version).group()
    numbers = [int(number or 0) for number in leading.split(".")]
    return numbers + [0] * (6 - len(numbers))
