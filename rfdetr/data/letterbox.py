"""Images of any ratio in the square input of a model: resized to it, or letterboxed.

A letterbox keeps an image's proportions: it lies in the middle, and the border has its mean colour.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from rfdetr.placement import letterbox_borders


def as_input(image: Tensor, side: int, letterbox: bool) -> Tensor:
    """An image uint8 (3, H, W) as a model's input, uint8 (3, side, side)."""
    beside, above = letterbox_borders(*image.shape[-2:], side) if letterbox else (0, 0)
    size = [side - 2 * above, side - 2 * beside]
    return bordered(v2.functional.resize(image, size, antialias=True), beside, above)


def bordered(image: Tensor, beside: int, above: int) -> Tensor:
    """An image uint8 (3, H, W) with borders of its mean colour at both ends of each axis.

    Of that colour, and not of the same gray for all: it leaves the mean that `standardise` takes
    from the input, and it is what turned images are surrounded by.
    """
    if not (beside or above):
        return image
    height, width = image.shape[-2:]
    colour = image.float().mean((1, 2)).round().to(torch.uint8)
    canvas = colour[:, None, None].repeat(1, height + 2 * above, width + 2 * beside)
    canvas[:, above : above + height, beside : beside + width] = image
    return canvas


def letterbox_for(given: bool | None, content: dict) -> tuple[bool, str]:
    """Whether a checkpoint is to see letterboxed images, and what to warn of, which may be "".

    given: --letterbox, None where it is left open; content: of the checkpoint. Those of earlier
    versions and official files saw no letterbox.
    """
    trained = bool(content.get("letterbox"))
    if given is None or given == trained:
        return trained, ""
    how = "with their proportions kept" if trained else "resized to a square"
    return given, (
        f"--letterbox {int(given)}: the model was trained on images {how}, and may find others "
        "badly: leave the flag out"
    )
