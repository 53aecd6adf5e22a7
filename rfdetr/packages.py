"""Refuses a Python that lacks the packages that the scripts need; standard library only."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from rfdetr.console import UserError, run_script
from rfdetr.requirements import installed_and_missing
from rfdetr.text import quoted

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements.txt"
VENV = ROOT / ".venv"  # which quickstart.py makes
TEST_ONLY = {"pytest", "hypothesis", "pytest-xdist"}
# names of packages that are not imported by these
IMPORTED_AS = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}


def check_packages(name: str) -> None:
    """End with one paragraph where a module that is run lacks a package; `name`: its __name__.

    Modules that scripts and `python -m` run call this before the imports that need packages.
    """
    if name == "__main__":
        run_script(lambda argv: require_packages())


def require_packages() -> None:
    """UserError where packages cannot be imported, whatever their version."""
    installed, _ = installed_and_missing(REQUIREMENTS)
    names = installed.keys() - TEST_ONLY - {"python"}
    missing = [name for name in names if find_spec(IMPORTED_AS.get(name, name)) is None]
    if missing:
        names = ", ".join(sorted(missing))
        raise UserError(f"this Python ({sys.executable}) lacks {names}. {how_to_get_them()}")


def require_versions() -> dict[str, str]:
    """The installed versions by name; UserError where requirements.txt asks for others."""
    require_packages()
    installed, needed = installed_and_missing(REQUIREMENTS)
    lacking = []
    for name, least in needed.items():
        # what is missing by name can be imported: opencv-python, say, has the same modules
        if name not in TEST_ONLY and installed[name] != "missing":
            lacking.append(f"{name} is {installed[name]}, {least} or newer is needed")
    if lacking:
        raise UserError(f"{'; '.join(lacking)}. {how_to_get_them()}")
    return installed


def how_to_get_them() -> str:
    """The command that makes up for missing packages."""
    folder = "Scripts" if os.name == "nt" else "bin"
    is_there = any((VENV / folder / python).exists() for python in ("python", "python.exe"))
    if is_there and Path(sys.prefix).resolve() != VENV.resolve():
        activate = quoted(shown(VENV / folder / "activate"))
        source = "" if os.name == "nt" else "source "
        return f"Run: {source}{activate}, the environment of quickstart.py, and this command again"
    return (
        f"Run: python -m pip install -r {quoted(shown(REQUIREMENTS))}, or python "
        f"{quoted(shown(ROOT / 'quickstart.py'))}, which makes an environment of its own (.venv)"
    )


def shown(path: Path) -> str:
    """Relative to the current folder where it lies in it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
