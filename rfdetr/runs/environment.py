"""Where a result was made: versions, hardware, commit, command."""

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

REPOSITORY = Path(__file__).resolve().parents[2]


def environment(device: torch.device | str = "cpu") -> dict:
    """Versions, hardware, threads, the repository's commit and the command, as plain values."""
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "cuda": torch.version.cuda if on_cuda else None,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "commit": _commit(),
        "command": shlex.join(sys.argv),
    }


def _cpu() -> str:
    """The processor's name: of Linux, macOS, or else what Python knows."""
    file = Path("/proc/cpuinfo")
    if file.exists():
        line = re.search(r"model name\s*:\s*(.+)", file.read_text(encoding="utf-8"))
        if line:
            return line[1]
    return _output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()


def _commit() -> str | None:
    """The commit's full hash, with -dirty where tracked files differ; None outside a repository."""
    if not (REPOSITORY / ".git").exists():  # an archive, perhaps inside somebody else's repository
        return None
    # no tag has the name ""
    describe = ("describe", "--always", "--abbrev=40", "--match=", "--dirty")
    return _output_of("git", "-C", str(REPOSITORY), *describe)


def _output_of(*command: str) -> str | None:
    """What a command prints, stripped; None where it is missing, fails or prints nothing."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip() or None
    return None
