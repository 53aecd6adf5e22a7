"""What happens to an image and its objects on the way to the model (torchvision's v2)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from rfdetr.device import to_device
from rfdetr.sizes import ModelSize

MEAN = (0.485, 0.456, 0.406)  # ImageNet, as the official weights expect
STD = (0.229, 0.224, 0.225)
LEAST_SIDE = 1  # pixels; boxes of which a crop leaves less are gone
X, Y = 0, 1  # axes: the rows of a matrix


@dataclass(frozen=True)
class Preset:
    """How training sees an image. Random numbers are drawn in the order of the fields."""

    crop_chance: float = 0.0  # of a part of the image instead of all of it
    crop_area: tuple[float, float] = (0.3, 1.0)  # range of the part's share
    crop_aspect: tuple[float, float] = (0.75, 1.33)  # range of its width / height
    mirrored_axes: tuple[int, ...] = (X,)  # each with a chance of one half
    transposed: bool = False  # x and y swapped, with a chance of one half
    colours: v2.ColorJitter | None = None


PRESETS = {
    "crops": Preset(crop_chance=0.5),
    # one of a square's eight symmetries, in other colours
    "dihedral": Preset(
        mirrored_axes=(X, Y),
        transposed=True,
        colours=v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
    ),
}


def random_view(image: Tensor, augment: str, side: int) -> tuple[Tensor, np.ndarray]:
    """(random view (3, side, side) of an image uint8 (3, H, W), matrix of where its pixels are).

    augment: a name in PRESETS; torch's global generator draws.  The matrix (2, 3) takes (x, y, 1)
    in pixels of the image to (x, y) in those of the view.
    """
    preset = PRESETS[augment]
    top = 0
    left = 0
    height, width = image.shape[-2:]
    if preset.crop_chance and torch.rand(()) < preset.crop_chance:
        top, left, height, width = v2.RandomResizedCrop.get_params(
            image, scale=list(preset.crop_area), ratio=list(preset.crop_aspect)
        )
    image = v2.functional.resized_crop(
        image, top, left, height, width, [side, side], antialias=True
    )
    matrix = np.array([[1, 0, -left], [0, 1, -top]]) * [[side / width], [side / height]]
    for axis in preset.mirrored_axes:
        if torch.rand(()) < 0.5:
            image = image.flip(2 - axis)
            matrix[axis] = [0, 0, side] - matrix[axis]
    if preset.transposed and torch.rand(()) < 0.5:
        image = image.transpose(1, 2)
        matrix = matrix[::-1].copy()
    if preset.colours is not None:
        image = preset.colours(image)
    return image.contiguous(), matrix


def move_boxes(boxes: np.ndarray, matrix: np.ndarray, side: int) -> np.ndarray:
    """Boxes (n, 4) xyxy in pixels, taken by a matrix (2, 3) and clipped to a square of `side`."""
    corners = boxes.reshape(-1, 2) @ matrix[:, :2].T + matrix[:, 2]
    corners = corners.clip(0, side).reshape(-1, 2, 2)
    return np.concatenate((corners.min(1), corners.max(1)), axis=1)


def multi_scale_sides(size: ModelSize, resolution: int, expanded: bool) -> list[int]:
    """The input sides that multi-scale training draws from, in steps of patch x windows.

    They lie around `resolution`, with `expanded` from further away.
    """
    steps = range(-5, 6) if expanded else range(-3, 5)
    sides = [resolution + step * size.block for step in steps]
    return [side for side in sides if side >= 2 * size.block]


def draw_side(sides: list[int], seed: int, step: int) -> int:
    """The side of one optimizer step: the same on every rank and after a resume."""
    return random.Random(seed * 1_000_003 + step).choice(sides)


def to_model_input(images: Tensor, device: torch.device, side: int | None = None) -> Tensor:
    """uint8 (B, 3, R, R) on any device -> normalised float (B, 3, side, side) on `device`."""
    images = to_device(images, device).float() / 255
    # with numbers, not tensors of them, which a GPU would wait for
    for channel, mean, std in zip(images.unbind(1), MEAN, STD):
        channel.sub_(mean).div_(std)
    if side is not None and side != images.shape[-1]:
        images = F.interpolate(
            images, size=(side, side), mode="bilinear", align_corners=False, antialias=True
        )
    return images
