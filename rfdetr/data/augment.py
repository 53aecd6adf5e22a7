"""What happens to an image and its objects on the way to the model, on torchvision's v2 transforms."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from rfdetr.sizes import ModelSize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as the official weights expect
JITTER = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
LEAST_SIDE = 1  # pixels; boxes of which a crop leaves less are gone


def random_view(image: Tensor, augment: str, side: int) -> tuple[Tensor, np.ndarray]:
    """An image uint8 (3, H, W) as training sees it once, (3, side, side); torch's global generator draws.

    "dihedral": one of a square's eight symmetries, with other colours. "crops": mirrored or not, all of it or a part.
    Also returns where its pixels are then: the matrix (2, 3) that takes their (x, y, 1) there.
    """
    top, left, (height, width) = 0, 0, image.shape[-2:]
    if augment == "crops" and torch.rand(()) < 0.5:
        top, left, height, width = v2.RandomResizedCrop.get_params(
            image, scale=[0.3, 1.0], ratio=[0.75, 1.33]
        )
    image = v2.functional.resized_crop(
        image, top, left, height, width, [side, side], antialias=True
    )
    place = np.array([[1, 0, -left], [0, 1, -top]]) * [[side / width], [side / height]]
    for axis in (0, 1) if augment == "dihedral" else (0,):
        if torch.rand(()) < 0.5:
            image = image.flip(2 - axis)
            place[axis] = [0, 0, side] - place[axis]
    if augment == "dihedral":
        if torch.rand(()) < 0.5:
            image, place = image.transpose(1, 2), place[::-1].copy()
        image = JITTER(image)
    return image.contiguous(), place


def place_boxes(boxes: np.ndarray, place: np.ndarray, side: int) -> np.ndarray:
    """Boxes (n, 4) xyxy where the matrix `place` (2, 3) takes them, clipped to a square of `side`."""
    corners = (boxes.reshape(-1, 2) @ place[:, :2].T + place[:, 2]).clip(0, side).reshape(-1, 2, 2)
    return np.concatenate((corners.min(1), corners.max(1)), axis=1)


def multi_scale_sides(size: ModelSize, resolution: int, expanded: bool) -> list[int]:
    """The input sides that multi-scale training draws from: steps of patch x windows around the resolution."""
    steps = range(-5, 6) if expanded else range(-3, 5)
    sides = [resolution + step * size.block for step in steps]
    return [side for side in sides if side >= 2 * size.block]


def draw_side(sides: list[int], seed: int, step: int) -> int:
    """The side of one optimizer step: the same on every rank and after a resume."""
    return random.Random(seed * 1_000_003 + step).choice(sides)


def to_model_input(images: Tensor, device: torch.device, side: int | None = None) -> Tensor:
    """uint8 (B, 3, R, R) on any device -> normalised float (B, 3, side, side) on `device`."""
    images = v2.functional.normalize(images.to(device, non_blocking=True).float() / 255, MEAN, STD)
    if side is not None and side != images.shape[-1]:
        images = F.interpolate(
            images, size=(side, side), mode="bilinear", align_corners=False, antialias=True
        )
    return images
