"""What a result must be read with."""

from __future__ import annotations

import contextlib
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def environment(device: torch.device | str = "cpu") -> dict:
    """What a result must be read with: versions, hardware, threads, the repository's commit and the command."""
    device = torch.device(device)
    # the full hash, "-dirty" after it where tracked files differ (no tag has the name "")
    describe = (
        "git",
        "-C",
        str(REPOSITORY),
        "describe",
        "--always",
        "--abbrev=40",
        "--match=",
        "--dirty",
    )
    info = Path("/proc/cpuinfo")
    cpu = re.search(
        r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8") if info.exists() else ""
    )
    return {
        **{module.__name__: module.__version__ for module in (torch, torchvision, np)},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cpu": cpu[1]
        if cpu
        else _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor(),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        # no .git here: an archive, unpacked perhaps inside somebody else's repository
        "commit": _output(*describe) if (REPOSITORY / ".git").exists() else None,
        "command": shlex.join(sys.argv),
    }


def _output(*command: str) -> str | None:
    """What a command prints, stripped; None where it is missing, fails or prints nothing."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return (
            subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            or None
        )
