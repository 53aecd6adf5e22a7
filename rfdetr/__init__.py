"""Two-stage instance segmentation with RF-DETR: a detector, then a light mask head on the frozen detector."""

__all__ = ["RFDETR", "RFDETRBase", "RFDETRLarge", "RFDETRMedium", "RFDETRNano", "RFDETRSmall"]


def __getattr__(name: str):
    # on demand, so that what needs no torch (the demo generator, --help) starts at once
    if name in __all__:
        from rfdetr import detr

        return getattr(detr, name)
    raise AttributeError(f"module 'rfdetr' has no attribute {name!r}")
