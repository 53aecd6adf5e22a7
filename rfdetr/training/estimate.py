"""What stage 1 takes on this machine: one size is measured by a real step, the others follow from
their shapes.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from timm.utils import ModelEmaV3
from torch.utils.flop_counter import FlopCounterMode

from rfdetr.classes import COCO_ROWS, assign_rows
from rfdetr.console import UserError
from rfdetr.device import Precision, memory_mb, unless_out_of_memory
from rfdetr.models.detector import Detector
from rfdetr.progress import ProgressBar
from rfdetr.sizes import SIZES, LossWeights
from rfdetr.training.auto_batch import OBJECTS, random_batch
from rfdetr.training.engine import Progress
from rfdetr.training.objective import DetectorObjective

STATE_BYTES = 20  # a parameter's: its weight, gradient, two moments of AdamW, and its average
PATIENCE = 8.0  # seconds: a first step that took longer is not repeated, though it warmed up


def shape_of(name: str, resolution: int) -> tuple[int, float, float]:
    """(parameters, FLOP, MB kept for the backward pass) of a training step's forward pass on one
    image.

    On torch's meta device, which knows shapes and computes nothing.
    """
    kept: dict[int, int] = {}
    alive = []  # else a later tensor may take the place of an earlier one

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.device("meta"):
        model, image = Detector(SIZES[name], COCO_ROWS), torch.zeros(1, 3, resolution, resolution)
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
    ):
        model.train()(image)
    parameters = sum(p.numel() for p in model.parameters())
    weights = 4 * parameters / 2**20
    return parameters, counter.get_total_flops(), max(sum(kept.values()) / 2**20 - weights, 1.0)


def measure(name: str, resolution: int, precision: Precision) -> tuple[float, float, float]:
    """(seconds of a training step on one image, MB before there is a model, MB at the peak)."""
    device, size = precision.device, SIZES[name]
    before = memory_mb(device)
    model = Detector(size, COCO_ROWS).to(device).train()
    optimizer, ema = torch.optim.AdamW(model.parameters(), lr=1e-6), ModelEmaV3(model)
    table = assign_rows(["object"], [1], "coco91")
    losses = DetectorObjective(table, LossWeights(), precision, (), 0, Progress())
    for _ in range(2):
        begin = time.perf_counter()
        sum(losses(model, random_batch(1, resolution), float(OBJECTS)).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model, 1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        if (seconds := time.perf_counter() - begin) > PATIENCE:
            break
    return seconds, before, memory_mb(device)


def measure_apart(name: str, resolution: int, precision: Precision) -> tuple[float, float, float]:
    """`measure` in a process of its own, whose peak is its own, and which alone ends where the
    memory does.
    """

    def in_a_process() -> tuple[float, float, float]:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(measure, name, resolution, precision).result()

    try:
        measured = unless_out_of_memory(in_a_process, precision.device)
    except BrokenProcessPool:  # the system has ended it, mostly for want of memory
        measured = None
    if measured is None:
        raise UserError(
            f"a training step of {name} at {resolution} px runs out of memory with a single image. "
            "Try a smaller --size or --resolution, or leave out --estimate and train with "
            "--grad_checkpoint 1"
        )
    return measured


def estimate(name: str, resolution: int, precision: Precision, images: int) -> list[dict]:
    """A row for each size at its own resolution, and for `name` at `resolution`.

    size, resolution, parameters, memory_mb at batch 1 and 4, epoch_s for so many images in the
    training split, and whether a step was measured: of `name` and of tiny (of nano, where `name` is
    tiny). The others lie on the line through these two.  Raises UserError where a single image does
    not fit.
    """
    sides = {key: size.resolution for key, size in SIZES.items()} | {name: resolution}
    anchors = [name, "nano" if name == "tiny" else "tiny"]
    ordered = [*anchors, *(key for key in sides if key not in anchors)]
    shapes = {}
    seconds, memory, base = [], [], 0.0  # points of the two lines; MB of a process without a model
    for key in ProgressBar(ordered, "measuring a training step", "sizes", at_once=True):
        parameters, flop, kept = shapes[key] = shape_of(key, sides[key])
        if key in anchors:
            step_s, base, peak = measure_apart(key, sides[key], precision)
            seconds.append((flop, step_s))
            memory.append((kept, max(peak - base - parameters * STATE_BYTES / 2**20, 0.0)))
    rows = []
    for key in sides:
        parameters, flop, kept = shapes[key]
        recipe, fixed = SIZES[key].recipe, base + parameters * STATE_BYTES / 2**20
        step = recipe.batch * recipe.accum
        row = {
            "size": key,
            "resolution": sides[key],
            "parameters": parameters,
            "measured": key in anchors,
        }
        row["memory_mb"] = {
            str(batch): round(fixed + on_line(memory, batch * kept)) for batch in (1, 4)
        }
        row["epoch_s"] = round(
            on_line(seconds, flop) * step * max(images // step, recipe.min_steps), 1
        )
        rows.append(row)
    return rows


def on_line(points: list[tuple[float, float]], x: float) -> float:
    """The y at x of the line through two points, or through the second and zero where that line
    starts below zero.
    """
    (x1, y1), (x2, y2) = sorted(points)
    slope = (y2 - y1) / (x2 - x1)
    return y1 + slope * (x - x1) if y1 > slope * x1 else y2 * x / x2
