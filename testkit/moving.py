"""Videos of the demo's objects that move, cross, hide each other, leave and enter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from rfdetr.data.demo import make_cell, make_glomerulus, make_stroma, paint, stain

UNIT = 1.0  # the demo's scale: pixels of a 192-pixel image
LEAST_VISIBLE = 0.25  # of an object, where it counts as being in the frame


@dataclass
class Scene:
    """Frames (H, W, 3) uint8 RGB, and what is visible in each: object's number -> its whole box.

    Boxes (4,) are xyxy in pixels, clipped to the frame.
    """

    frames: list[np.ndarray]
    truth: list[dict[int, np.ndarray]]


def moving_scene(frames: int, side: int = 192, cells: int = 8, seed: int = 0) -> Scene:
    """Cells on straight lines over each other and over a slow glomerulus.

    Each is inside at some moment; the fast ones enter before or leave afterwards.
    """
    rng = np.random.default_rng([seed, 77])
    shapes = [make_glomerulus(rng, UNIT)] + [make_cell(rng, UNIT) for _ in range(cells)]
    directions = rng.uniform(0, 2 * np.pi, len(shapes))
    speeds = rng.uniform(0.6, 2.6, len(shapes))
    speeds[0] = 0.3
    velocities = np.stack([np.cos(directions), np.sin(directions)], axis=1) * speeds[:, None]
    # where each is at a moment of its own, and so surely inside
    places = rng.uniform(0.2 * side, 0.8 * side, (len(shapes), 2))
    moments = rng.uniform(0, frames, len(shapes))
    stroma = make_stroma(rng, side, UNIT)
    dyes_seed = int(rng.integers(1 << 30))
    scene = Scene([], [])
    for t in range(frames):
        canvas = stroma.copy()
        on_top = np.full((side, side), -1)
        wholes = []
        for number, shape in enumerate(shapes):
            centre = places[number] + velocities[number] * (t - moments[number])
            wholes.append(_lay(canvas, on_top, shape, centre, number))
        truth = {}
        for number, (whole, area) in enumerate(wholes):
            visible = np.count_nonzero(on_top == number)
            if visible >= LEAST_VISIBLE * area:
                truth[number] = whole
        # the same colours and grain in all frames
        image = stain(np.random.default_rng(dyes_seed), canvas, UNIT)
        scene.frames.append(np.asarray(image))
        scene.truth.append(truth)
    return scene


def _lay(
    canvas: np.ndarray, on_top: np.ndarray, shape, centre: np.ndarray, number: int
) -> tuple[np.ndarray, int]:
    """Paint a shape around a centre; its box, clipped to the frame, and its whole area."""
    side = len(canvas)
    inside = shape.depth > 0
    height, width = inside.shape
    left, top = np.rint(centre - (width / 2, height / 2)).astype(int)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + width, side), min(top + height, side)
    area = np.count_nonzero(inside)
    if x0 >= x1 or y0 >= y1:
        return np.zeros(4), area
    there = np.s_[y0:y1, x0:x1]
    here = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    paint(canvas[there], shape.depth[here][..., None], shape.dyes[here], UNIT)
    on_top[there][inside[here]] = number
    rows, columns = np.nonzero(inside[here])
    if not len(rows):
        return np.zeros(4), area
    corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return np.array(corners, dtype=float) + (x0, y0, x0, y0), area


def write_video(
    path: Path, frames: list[np.ndarray], codec: str = "mp4v", rate: float = 10
) -> None:
    """frames (H, W, 3) uint8 RGB, all of one size."""
    size = frames[0].shape[1::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 10.0, size)
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
