"""What happens to an image and its objects on the way to the model, on torchvision's v2 transforms."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from rfdetr.sizes import ModelSize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as the official weights expect


class RandomTranspose(v2.Transform):
    """Swap x and y with probability 1/2; with both flips it gives the square's eight symmetries."""

    def make_params(self, flat_inputs: list) -> dict:
        return {"apply": torch.rand(()).item() < 0.5}

    def transform(self, inpt, params: dict):
        if not params["apply"]:
            return inpt
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            height, width = inpt.canvas_size
            return tv_tensors.BoundingBoxes(inpt[:, [1, 0, 3, 2]], format="XYXY", canvas_size=(width, height))
        if isinstance(inpt, tv_tensors.Image | tv_tensors.Mask):
            return tv_tensors.wrap(inpt.transpose(-1, -2), like=inpt)
        return inpt


def training_transform(augment: str, resolution: int) -> v2.Transform:
    """Augmentation of a sample dict (image, boxes xyxy pixels, masks, labels ...), ending at resolution x resolution.

    "dihedral": images that are already square and resized; "crops": any size.
    """
    if augment == "dihedral":
        jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
        steps = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), RandomTranspose(), jitter]
    else:
        square = (resolution, resolution)
        crop = v2.RandomResizedCrop(square, scale=(0.3, 1.0), ratio=(0.75, 1.33), antialias=True)
        steps = [v2.RandomHorizontalFlip(), v2.RandomChoice([crop, v2.Resize(square, antialias=True)])]
    # boxes that a crop left with less than a pixel go, together with their labels and masks
    keep = v2.SanitizeBoundingBoxes(min_size=1, labels_getter=lambda s: (s["labels"], s["has_mask"]))
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), keep])


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
        images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return images
