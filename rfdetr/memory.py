"""What memory a run has taken, and what is free."""

from __future__ import annotations

import psutil
import torch


def memory_mb(device: torch.device) -> float:
    """Peak memory so far, MB: allocated on a GPU, resident of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if psutil.WINDOWS:
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if psutil.MACOS else peak / 2**10


def free_memory_mb() -> float:
    """Main memory that can be taken without swapping, MB."""
    return psutil.virtual_memory().available / 2**20


def release_memory(device: torch.device) -> None:
    """Give back what torch's allocator holds unused, before a smaller try."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
