"""What all generated data are drawn with: outlines, noise, soft edges, and room for an object."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

MAX_OVERLAP = 0.3  # of the smaller object of a pair
MIN_INSIDE = 0.8  # of an object: what the image's border may not cut off
TRIES = 40  # to find room for an object
MARGIN = 4  # pixels around an object in its window, for what is painted beside it
FULL_TURN = 2 * np.pi


class Place(NamedTuple):
    """Where an object's window lies on a canvas."""

    corner: tuple[int, int]  # x, y of the window's corner on the canvas, in pixels
    there: tuple[slice, slice]  # the part of the canvas under the window
    here: tuple[slice, slice]  # the part of the window over the canvas


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], bumps: int) -> np.ndarray:
    """Noise (h, w) in about -1..1: a coarse random grid, enlarged."""
    coarse = rng.uniform(-1, 1, (bumps + 1, bumps + 1)).astype(np.float32)
    height, width = shape
    enlarged = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(enlarged)


def soft_step(value: np.ndarray, width: float = 1.0) -> np.ndarray:
    """0 where value is negative, 1 where positive, an antialiased edge `width` pixels between."""
    return np.clip(value / width + 0.5, 0, 1)


def direction(angle: np.ndarray) -> np.ndarray:
    """Unit vectors (..., 2) of angles (...)."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def distances_to(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Distances (n, h, w) from points (n, 2) to the pixels' centres."""
    height, width = shape
    points = points.astype(np.float32)[..., None]
    x = np.arange(width, dtype=np.float32) + 0.5
    y = np.arange(height, dtype=np.float32) + 0.5
    dx = x - points[:, 0]
    dy = y - points[:, 1]
    return np.sqrt((dx**2)[:, None, :] + (dy**2)[:, :, None])


def roundish(
    rng: np.random.Generator, radius: float, wobble: float, vertices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Outline (vertices, 2) and depth (h, w) of a disc with a wavy edge."""
    waves = []
    for count in (2, 3, 4, 5):
        height = wobble * rng.uniform(-1, 1) / count**2
        phase = rng.uniform(0, FULL_TURN)
        waves.append((height, count, phase))

    def radius_at(angle: np.ndarray) -> np.ndarray:
        wave = sum(height * np.cos(count * angle + phase) for height, count, phase in waves)
        return radius * (1 + wave)

    return outlined(rng, radius_at, vertices)


def lobed(
    rng: np.random.Generator, radius: float, lobes: int, vertices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Outline (vertices, 2) and depth (h, w) of a flower with so many petals."""
    phase = rng.uniform(0, FULL_TURN)
    height = rng.uniform(0.2, 0.35)
    return outlined(
        rng, lambda angle: radius * (1 + height * np.cos(lobes * angle + phase)), vertices
    )


def outlined(
    rng: np.random.Generator, radius_at: Callable[[np.ndarray], np.ndarray], vertices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Outline (vertices, 2) and depth (h, w) of what reaches radius_at(angles) from its centre."""
    angle = np.linspace(0, FULL_TURN, vertices, endpoint=False)
    outline = radius_at(angle)[:, None] * direction(angle)
    reach = math.ceil(np.abs(outline).max()) + MARGIN
    centre = reach + rng.uniform(0, 1, 2).astype(np.float32)
    side = int(2 * centre.max())
    y, x = np.mgrid[:side, :side].astype(np.float32) + 0.5
    x = x - centre[0]
    y = y - centre[1]
    depth = radius_at(np.arctan2(y, x)) - np.sqrt(x * x + y * y)
    return outline + centre, depth


def bent_tube(
    rng: np.random.Generator, length: float, radius: float, most_curl: float = 3.0, discs: int = 33
) -> tuple[np.ndarray, np.ndarray]:
    """Outline (n, 2) and depth (h, w) of a tube with round ends: discs along a curved line."""
    along = np.linspace(-0.5, 0.5, discs)
    # radians along the tube, few enough that its sides do not cross
    curl = min(most_curl, 0.75 * length / radius)
    heading = rng.uniform(0, FULL_TURN) + rng.uniform(-0.65, 0.65) * curl * along
    sway = rng.uniform(0, 0.35) * curl / FULL_TURN
    heading += sway * np.sin(FULL_TURN * (along + rng.uniform()))
    line = np.cumsum(direction(heading), axis=0) * length / (discs - 1)
    bulge = np.sin(FULL_TURN * (along * rng.uniform(0.7, 1.5) + rng.uniform()))
    radii = radius * (1 + 0.12 * bulge)
    # along one side, around the end, back along the other side, around the beginning
    quarter = np.pi / 2
    cap = np.linspace(-quarter, quarter, 9)
    index = np.arange(discs)
    angle = np.concatenate(
        [heading - quarter, heading[-1] + cap, heading[::-1] + quarter, heading[0] + np.pi + cap]
    )
    at = np.concatenate([index, np.full(9, discs - 1), index[::-1], np.zeros(9, int)])
    outline = line[at] + radii[at, None] * direction(angle)
    origin = outline.min(axis=0) - MARGIN - rng.uniform(0, 1, 2)
    width, height = np.ceil(outline.max(axis=0) - origin).astype(int) + MARGIN
    distances = distances_to(line - origin, (height, width))
    depth = (radii.astype(np.float32)[:, None, None] - distances).max(axis=0)
    return outline - origin, depth


def find_place(
    rng: np.random.Generator, size: int, masks: list[np.ndarray], inside: np.ndarray
) -> Place | None:
    """Room on a canvas of size x size for an object that is `inside` (h, w) of its window.

    Its mask is added to those of the other objects; None where there is no room.
    """
    height, width = inside.shape
    for _ in range(TRIES):
        x = int(rng.integers(-width // 3, size - width + width // 3 + 1))
        y = int(rng.integers(-height // 3, size - height + height // 3 + 1))
        there = np.s_[max(y, 0) : y + height, max(x, 0) : x + width]
        here = np.s_[max(-y, 0) : size - y, max(-x, 0) : size - x]
        visible = inside[here]
        if np.count_nonzero(visible) < MIN_INSIDE * np.count_nonzero(inside):
            continue
        if any(hides_too_much(visible, mask, there) for mask in masks):
            continue
        mask = np.zeros((size, size), bool)
        mask[there] = visible
        masks.append(mask)
        return Place((x, y), there, here)
    return None


def hides_too_much(visible: np.ndarray, mask: np.ndarray, there: tuple[slice, slice]) -> bool:
    """Whether an object `visible` at `there` and one with this mask share too many pixels."""
    smaller = min(np.count_nonzero(visible), np.count_nonzero(mask))
    return np.count_nonzero(mask[there] & visible) > MAX_OVERLAP * smaller


def describe_object(category_id: int, polygon: np.ndarray) -> dict:
    """The COCO annotation of a polygon (n, 2)."""
    x, y = polygon.T
    doubled = np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))  # the shoelace formula
    corner_and_sides = np.concatenate([polygon.min(axis=0), np.ptp(polygon, axis=0)])
    return {
        "category_id": category_id,
        "bbox": corner_and_sides.round(2).tolist(),
        "area": round(float(abs(doubled) / 2), 2),
        "iscrowd": 0,
        "segmentation": [polygon.ravel().tolist()],
    }
