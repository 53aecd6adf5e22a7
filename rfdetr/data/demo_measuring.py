"""Generated images that mask heads are measured on; demo.py writes them as datasets.

"thin": bright rods 3-10 px wide and blobs 12-32 px across on a dark ground: what a coarse grid of
mask logits cannot show. "hard": textured objects on a ground of two other textures, whose colours
tell little. "longtail": rods and blobs, and for about 30 of either one clover and one star. Lengths
are in pixels of a 192-pixel image; the order of random draws is part of what an image shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from rfdetr.data.demo_drawing import (
    bent_tube,
    describe_object,
    find_place,
    lobed,
    roundish,
    smooth_noise,
    soft_step,
)

THIN_NAMES = ("rod", "blob")  # category ids 1, 2
HARD_NAMES = ("stone", "leaf")
LONGTAIL_NAMES = ("rod", "blob", "clover", "star")
RARE_CHANCE = 0.05  # of an image to show clovers, and of one to show stars
GREY_AND_COLOUR = np.array(((1, 1, 1), (0.5, 0, -0.5), (-0.3, 0.5, -0.3)), np.float32)

Outline = tuple[np.ndarray, np.ndarray]  # polygon (n, 2), depth (h, w), as demo_drawing makes them


def make_rod(rng: np.random.Generator, unit: float) -> Outline:
    radius = unit * rng.uniform(1.5, 5)
    return bent_tube(rng, unit * rng.uniform(24, 56), radius, most_curl=1.0, discs=65)


def make_blob(rng: np.random.Generator, unit: float) -> Outline:
    return roundish(rng, unit * rng.uniform(6, 16), wobble=0.6, vertices=48)


def make_stone(rng: np.random.Generator, unit: float) -> Outline:
    return roundish(rng, unit * rng.uniform(10, 30), wobble=0.9, vertices=64)


def make_clover(rng: np.random.Generator, unit: float) -> Outline:
    return lobed(rng, unit * rng.uniform(8, 15), 3, vertices=60)


def make_star(rng: np.random.Generator, unit: float) -> Outline:
    return lobed(rng, unit * rng.uniform(8, 15), 5, vertices=60)


def make_leaf(rng: np.random.Generator, unit: float) -> Outline:
    return bent_tube(rng, unit * rng.uniform(28, 60), unit * rng.uniform(6, 11))


def render_thin(rng: np.random.Generator, size: int, empty: bool) -> tuple[Image.Image, list[dict]]:
    """As demo.render."""
    makers = (make_rod, make_blob)

    def counts() -> Sequence[int]:
        return (0, 0) if empty else rng.integers((4, 3), (9, 8))

    return on_dark_ground(rng, size, makers, counts)


def render_longtail(
    rng: np.random.Generator, size: int, empty: bool
) -> tuple[Image.Image, list[dict]]:
    """As demo.render."""

    def counts() -> np.ndarray:
        common = rng.integers((3, 3), (7, 7))
        rare = rng.integers((2, 2), (5, 5)) * (rng.uniform(0, 1, 2) < RARE_CHANCE)
        return np.concatenate([common, rare]) * (not empty)

    makers = (make_rod, make_blob, make_clover, make_star)
    return on_dark_ground(rng, size, makers, counts)


def on_dark_ground(
    rng: np.random.Generator,
    size: int,
    makers: tuple[Callable[[np.random.Generator, float], Outline], ...],
    draw_counts: Callable[[], Sequence[int]],
) -> tuple[Image.Image, list[dict]]:
    """Bright objects; draw_counts() -> how many of each maker's."""
    unit = size / 192
    coarse = smooth_noise(rng, (size, size), bumps=4)
    fine = smooth_noise(rng, (size, size), bumps=30)
    canvas = (40 + 14 * coarse + 8 * fine)[..., None] * rng.uniform(0.7, 1.2, 3)
    canvas = canvas.astype(np.float32)

    def surface(shape: tuple[int, int]) -> np.ndarray:
        texture = 1 + 0.15 * smooth_noise(rng, shape, bumps=6)
        return texture[..., None] * rng.uniform(75, 190) * rng.uniform(0.8, 1.1, 3)

    annotations = lay_objects(rng, canvas, unit, draw_counts(), makers, surface)
    return photograph(rng, canvas, unit), annotations


def render_hard(rng: np.random.Generator, size: int, empty: bool) -> tuple[Image.Image, list[dict]]:
    """As demo.render."""
    unit = size / 192
    mean = rng.uniform(90, 165, 3)
    border = smooth_noise(rng, (size, size), bumps=3)
    ground = [fractal(rng, (size, size), mean + rng.normal(0, 15, 3)) for _ in range(2)]
    canvas = ground[0] + soft_step(border, 0.05)[..., None] * (ground[1] - ground[0])

    def surface(shape: tuple[int, int]) -> np.ndarray:
        return fractal(rng, shape, mean + rng.normal(0, 32, 3))

    counts = (0, 0) if empty else rng.integers((2, 2), (6, 5))
    annotations = lay_objects(rng, canvas, unit, counts, (make_stone, make_leaf), surface)
    return photograph(rng, canvas, unit), annotations


def lay_objects(
    rng: np.random.Generator,
    canvas: np.ndarray,
    unit: float,
    counts: Sequence[int] | np.ndarray,
    makers: tuple[Callable[[np.random.Generator, float], Outline], ...],
    surface: Callable[[tuple[int, int]], np.ndarray],
) -> list[dict]:
    """Paint `counts` objects of each maker on the canvas (size, size, 3) where there is room.

    surface(shape (h, w)) -> their light (h, w, 3). Returns their COCO annotations without ids; the
    categories are the makers', from 1 on.
    """
    size = len(canvas)
    masks: list[np.ndarray] = []
    annotations = []
    for category_id, (make, count) in enumerate(zip(makers, counts, strict=True), start=1):
        for _ in range(count):
            polygon, depth = make(rng, unit)
            light = surface(depth.shape)
            place = find_place(rng, size, masks, depth > 0)
            if place is None:
                continue
            part = canvas[place.there]
            part += soft_step(depth[place.here])[..., None] * (light[place.here] - part)
            outline = np.clip(polygon + place.corner, 0, size).round(2)
            annotations.append(describe_object(category_id, outline))
    return annotations


def fractal(rng: np.random.Generator, shape: tuple[int, int], mean: np.ndarray) -> np.ndarray:
    """Light (h, w, 3) around a mean (3,): noise of a photograph's spectrum, 1 / frequency**slope.

    Slope, contrast, direction and colours are drawn anew.
    """
    height, width = shape
    slope = rng.uniform(0.5, 1.6)
    turn = rng.uniform(0, np.pi)
    stretch = rng.uniform(1, 4)
    y = np.fft.fftfreq(height)[:, None]
    x = np.fft.rfftfreq(width)[None]
    along = x * np.cos(turn) + y * np.sin(turn)
    across = y * np.cos(turn) - x * np.sin(turn)
    frequency = np.hypot(along * stretch, across)
    frequency[0, 0] = np.inf  # no mean of its own
    noise = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency**slope
    layers = np.fft.irfft2(noise, s=shape)  # (3, h, w)
    layers = layers / layers.std(axis=(1, 2), keepdims=True)
    strengths = rng.uniform((14, 4, 4), (34, 16, 16)).astype(np.float32)
    light = np.einsum("chw,c,cd->hwd", layers, strengths, GREY_AND_COLOUR)
    return (light + mean).astype(np.float32)


def photograph(rng: np.random.Generator, canvas: np.ndarray, unit: float) -> Image.Image:
    """A canvas (size, size, 3) of light, a little out of focus and noisy."""
    blur = unit * rng.uniform(0.3, 0.7)
    light = gaussian_filter(canvas, (blur, blur, 0))
    noise = rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(2, 6))
    return Image.fromarray(np.clip(light + noise + 0.5, 0, 255).astype(np.uint8))
