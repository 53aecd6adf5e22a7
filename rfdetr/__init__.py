"""Two-stage instance segmentation with RF-DETR: a detector, then a mask head on it, frozen."""

import os

# Before torch is loaded: its threads spin while they wait for each other, and beside other work
# the one that spins takes the core from the one it waits for. Seven times as fast there, no slower
# on an idle machine (benchmarks/threads.py).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Read when torch is loaded: what Metal has no kernel for is computed on the CPU and ends no run
# (device.py says what it is).
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

_DETECTORS = ["Base", "Large", "Large2026", "Medium", "Nano", "Small"]
_WITH_MASKS = ["Seg2XLarge", "SegLarge", "SegMedium", "SegNano", "SegSmall", "SegXLarge"]
__all__ = ["RFDETR", *(f"RFDETR{size}" for size in _DETECTORS + _WITH_MASKS)]


def __getattr__(name: str):
    # on demand, so that what needs no torch (the demo generator, --help) starts at once
    if name in __all__:
        from rfdetr import detr

        return getattr(detr, name)
    raise AttributeError(f"module 'rfdetr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
