"""Two-stage instance segmentation with RF-DETR: a detector, then a mask head on it, frozen."""

_DETECTORS = ["Base", "Large", "Large2026", "Medium", "Nano", "Small"]
_WITH_MASKS = ["Seg2XLarge", "SegLarge", "SegMedium", "SegNano", "SegSmall", "SegXLarge"]
__all__ = ["RFDETR", *(f"RFDETR{size}" for size in _DETECTORS + _WITH_MASKS)]


def __getattr__(name: str):
    # on demand, so that what needs no torch (the demo generator, --help) starts at once
    if name in __all__:
        from rfdetr import detr

        return getattr(detr, name)
    raise AttributeError(f"module 'rfdetr' has no attribute {name!r}")
