"""What happens to an image and its objects on the way to the model (torchvision's v2)."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from rfdetr.data.letterbox import bordered
from rfdetr.device import to_device
from rfdetr.masks import is_turned
from rfdetr.placement import letterbox_borders
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
    # range of its width / height; with a letterbox times the image's own
    crop_aspect: tuple[float, float] = (0.75, 1.33)
    mirrored_axes: tuple[int, ...] = (X,)  # each with a chance of one half
    transposed: bool = False  # x and y swapped, with a chance of one half
    # Of what is no crop, whose objects would go on beyond its turned rim:
    most_turn: float = 0.0  # degrees, either way
    zoom: tuple[float, float] = (1.0, 1.0)  # range of the enlargement, about the centre
    mosaic_chance: float = 0.0  # of parts of four images in one (mosaic.py)
    # of another image's objects on one that is no mosaic (copy_paste.py)
    paste_chance: float = 0.0
    colours: v2.Transform | None = None

    @property
    def mixes_images(self) -> bool:
        """Whether objects of other images are shown in some."""
        return self.mosaic_chance > 0 or self.paste_chance > 0


def colours_and_grain(brightness: float, hue: float) -> v2.Transform:
    """Brightness, contrast and saturation by up to a share, hue; now and then a blur, or noise."""
    blur = v2.RandomApply([v2.GaussianBlur(5, sigma=(0.3, 1.5))], p=0.2)
    noise = v2.RandomApply([v2.GaussianNoise(sigma=0.03)], p=0.2)
    return v2.Compose([v2.ColorJitter(brightness, brightness, brightness, hue), blur, noise])


MILD = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
STRONG = colours_and_grain(0.4, hue=0.1)
STAINS = colours_and_grain(0.25, hue=0.05)
LIGHT = colours_and_grain(0.25, hue=0.02)

ANY_SIDE_UP = Preset(mirrored_axes=(X, Y), transposed=True)  # the eight symmetries of a square

PRESETS = {
    "none": Preset(mirrored_axes=()),
    "flips": Preset(),
    "crops": Preset(crop_chance=0.5),
    "dihedral": replace(ANY_SIDE_UP, colours=MILD),
    "mosaic": replace(ANY_SIDE_UP, mosaic_chance=0.3, colours=MILD),
    "strong": Preset(
        crop_chance=0.5, most_turn=10, zoom=(0.7, 1.2), paste_chance=0.5, colours=STRONG
    ),
    "microscopy": replace(
        ANY_SIDE_UP, most_turn=180, zoom=(0.8, 1.25), paste_chance=0.3, colours=STAINS
    ),
    "aerial": replace(ANY_SIDE_UP, crop_chance=0.5, most_turn=180, zoom=(0.7, 1.2), colours=LIGHT),
}


def find_preset(name: str, flip: bool = True) -> Preset:
    """A preset by its name; without `flip` nothing in it is mirrored."""
    preset = PRESETS[name]
    return preset if flip else replace(preset, mirrored_axes=(), transposed=False)


def random_view(
    image: Tensor,
    preset: Preset,
    side: int,
    scale: np.ndarray | None = None,
    letterbox: bool = False,
) -> tuple[Tensor, np.ndarray]:
    """(random view (3, side, side) of an image uint8 (3, H, W), matrix of where its pixels are).

    In the image's own colours; torch's global generator draws.  The matrix (2, 3) takes (x, y, 1)
    in pixels of the image to (x, y) in those of the view.  scale (2,): pixels of the image to one
    of what it was resized from, along x and y; turns keep the proportions of that.  letterbox: the
    image, or a crop of about its proportions, lies in the place that letterbox_borders gives it.
    """
    top = 0
    left = 0
    height, width = image.shape[-2:]
    beside = 0
    above = 0
    proportions = 1.0
    if letterbox:
        beside, above = letterbox_borders(height, width, side)
        proportions = width / height
    cropped = preset.crop_chance > 0 and bool(torch.rand(()) < preset.crop_chance)
    if cropped:
        top, left, height, width = v2.RandomResizedCrop.get_params(
            image,
            scale=list(preset.crop_area),
            ratio=[proportions * aspect for aspect in preset.crop_aspect],
        )
    size = [side - 2 * above, side - 2 * beside]
    image = v2.functional.resized_crop(image, top, left, height, width, size, antialias=True)
    image = bordered(image, beside, above)
    matrix = np.array([[1, 0, -left], [0, 1, -top]]) * [[size[1] / width], [size[0] / height]]
    matrix[:, 2] += [beside, above]
    for axis in preset.mirrored_axes:
        if torch.rand(()) < 0.5:
            image = image.flip(2 - axis)
            matrix[axis] = [0, 0, side] - matrix[axis]
    if preset.transposed and torch.rand(()) < 0.5:
        image = image.transpose(1, 2)
        matrix = matrix[::-1].copy()
    if preset.most_turn and not cropped:
        angle = preset.most_turn * (2 * torch.rand(()).item() - 1)
        least, most = preset.zoom
        zoom = least * (most / least) ** torch.rand(()).item()
        units = np.linalg.norm(matrix[:, :2] * (1 if scale is None else scale), axis=1)
        turn = turn_about_centre(side, angle, zoom, units)
        image = moved(image, turn)
        matrix = turn[:, :2] @ matrix + [[0, 0, 1]] * turn[:, 2:]
    return image, matrix


def turn_about_centre(side: int, angle: float, zoom: float, units: np.ndarray) -> np.ndarray:
    """Matrix (2, 3) that turns a square of `side` clockwise by degrees, and enlarges it.

    units (2,): how many of its pixels are equally long along x and y.
    """
    radians = np.deg2rad(angle)
    cos = np.cos(radians)
    sin = np.sin(radians)
    linear = zoom * np.array([[cos, -sin], [sin, cos]]) * units[:, None] / units
    centre = np.full(2, side / 2)
    return np.column_stack([linear, centre - linear @ centre])


def moved(image: Tensor, matrix: np.ndarray) -> Tensor:
    """A uint8 image (3, H, W) moved by a matrix (2, 3); what it leaves is of its mean colour."""
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    fill = image.float().mean((1, 2)).tolist()
    coefficients = [*back.ravel().tolist(), 0.0, 0.0]
    return v2.functional.perspective(image, None, None, fill=fill, coefficients=coefficients)


def move_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) xyxy in pixels, taken by a matrix (2, 3).

    A turned box is that of the ellipse inside it, which the corners of most objects' boxes are
    closer to than to the box itself (arXiv:2109.13488).
    """
    if is_turned(matrix):
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 @ matrix[:, :2].T + matrix[:, 2]
        half = np.sqrt(((boxes[:, 2:] - boxes[:, :2]) / 2) ** 2 @ (matrix[:, :2] ** 2).T)
        return np.concatenate([centres - half, centres + half], axis=1)
    corners = boxes.reshape(-1, 2) @ matrix[:, :2].T + matrix[:, 2]
    corners = corners.reshape(-1, 2, 2)
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
