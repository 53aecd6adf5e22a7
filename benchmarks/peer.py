"""The published package in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DETECTORS = ("nano", "small", "medium", "base", "large", "large-2026")
SEGMENTERS = ("seg-nano", "seg-small", "seg-medium", "seg-large", "seg-xlarge", "seg-2xlarge")
OFFICIAL = DETECTORS + SEGMENTERS
# size -> DINOv2's name and width: the sizes that the package itself starts from DINOv2
BACKBONES = {"base": ("small", 384), "large": ("base", 768)}


def peer_environment() -> str:
    """The Python of runs/peer_env, which is made with the package first where it is missing."""
    folder = ROOT / "runs" / "peer_env"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "rfdetr[train]==1.11.*"], check=True
        )
    return str(python)
