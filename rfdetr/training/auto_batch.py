"""--batch auto: the largest batch that fits the device, with batch x accum kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from rfdetr import distributed
from rfdetr.console import tick
from rfdetr.data.dataset import Batch
from rfdetr.device import (
    forget_peak_memory,
    free_on_device_mb,
    memory_mb,
    release_memory,
    unless_out_of_memory,
)
from rfdetr.text import counted
from rfdetr.training.engine import random_states, set_random_states

OBJECTS = 30  # an image full of objects: the worst case that is tried
HEADROOM = 0.8  # of the memory that is free, where it is not refused but swapped


def random_batch(images: int, resolution: int) -> Batch:
    """A batch as heavy as they come: OBJECTS objects with masks in every image."""
    target = {
        "boxes": torch.rand(OBJECTS, 4) * 0.5 + 0.1,
        "labels": torch.zeros(OBJECTS, dtype=torch.long),
        "has_mask": torch.ones(OBJECTS, dtype=torch.bool),
        "masks": torch.zeros(OBJECTS, resolution, resolution, dtype=torch.uint8),
        "index": 0,
    }
    pixels = torch.zeros(images, 3, resolution, resolution, dtype=torch.uint8)
    return Batch(pixels, [target] * images)


def find_micro_batch(
    model: nn.Module,
    losses: Callable[[nn.Module, Batch, float], dict[str, Tensor]],
    effective: int,
    resolution: int,
    ema: bool = True,
) -> int:
    """How many images fit into one forward and backward pass on the worst case: a divisor of
    `effective`.

    `ema`: whether there will be an average of the weights. CUDA is tried with ever fewer images;
    a CPU and Metal, which swap rather than refuse, by what one image takes. Before and after,
    weights and random states are the same.
    """
    side = resolution
    if losses.sides:  # multi-scale: the worst, at which its images are loaded
        side = max(losses.sides)
        losses = replace(losses, sides=(side,))
    divisors = [images for images in range(effective, 0, -1) if effective % images == 0]
    device = next(model.parameters()).device
    random_state = random_states(device)
    release_memory(device)
    forget_peak_memory(device)
    if device.type == "cuda":
        largest = _largest_on_cuda(model, losses, divisors, side, ema)
    else:
        largest = _largest_by_one_image(model, losses, divisors, side, ema)
    set_random_states(random_state)
    forget_peak_memory(device)  # the run's own is what is shown
    at_a_time = counted(largest, "image")
    times = counted(effective // largest, "time")
    tick(f"--batch auto: {at_a_time} at a time, accumulated {times} (effective {effective})")
    return largest


def _largest_on_cuda(
    model: nn.Module, losses: Callable, divisors: list[int], side: int, ema: bool
) -> int:
    """The first of `divisors` whose training step fits beside what the optimizer will hold."""
    device = next(model.parameters()).device
    room = memory_mb(device) + free_on_device_mb(device)
    states = room_for_states(model, ema)
    largest = 1
    for images in divisors:
        peak = _peak_of_step(model, losses, images, side)
        # Windows takes main memory instead of refusing, and is many times slower from there on
        if peak is not None and peak <= room:
            largest = images
            break
        forget_peak_memory(device)
    del states
    release_memory(device)
    return largest


def _largest_by_one_image(
    model: nn.Module, losses: Callable, divisors: list[int], side: int, ema: bool
) -> int:
    """The first of `divisors` that fits by what one image's training step takes."""
    device = next(model.parameters()).device
    processes = distributed.world_size()  # taken to be on this machine
    states = processes * bytes_of_states(model, ema) / 2**20
    free = HEADROOM * free_on_device_mb(device) - states
    before = memory_mb(device)
    peak = _peak_of_step(model, losses, 1, side)
    if peak is None:
        return 1
    one = processes * max(peak - before, 1.0)
    fitting = [images for images in divisors if images * one < free]
    return fitting[0] if fitting else 1


def bytes_of_states(model: nn.Module, ema: bool) -> int:
    """What there is of a model beside one step's own: AdamW's two moments, the gradients that the
    parts of a batch add to, and the averaged weights.
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    averaged = sum(tensor.nbytes for tensor in model.state_dict().values()) if ema else 0
    return 3 * trained + averaged


def room_for_states(model: nn.Module, ema: bool) -> Tensor:
    """Memory of the model's device, taken until the tensor is dropped."""
    device = next(model.parameters()).device
    return torch.empty(bytes_of_states(model, ema), dtype=torch.uint8, device=device)


def _peak_of_step(model: nn.Module, losses: Callable, images: int, side: int) -> float | None:
    """Peak MB of the device in a training step on so many images; None where it does not fit."""
    device = next(model.parameters()).device

    def step() -> float:
        sum(losses(model, random_batch(images, side), float(OBJECTS)).values()).backward()
        return memory_mb(device)

    model.train()
    try:
        return unless_out_of_memory(step, device)
    finally:
        model.zero_grad(set_to_none=True)
        release_memory(device)  # of a step that did fit, too: the training's own sizes differ
