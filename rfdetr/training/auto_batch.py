"""--batch auto: the largest batch that fits the device, with batch x accum kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from rfdetr import distributed
from rfdetr.console import tick
from rfdetr.data.loaders import Batch
from rfdetr.device import (
    forget_peak_memory,
    free_memory_mb,
    memory_mb,
    release_memory,
    unless_out_of_memory,
)

OBJECTS = 30  # an image full of objects: the worst case that is tried
HEADROOM = 0.8  # of the memory that is free, since a CPU does not refuse but swaps


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
) -> int:
    """How many images fit into one forward and backward pass on the worst case: a divisor of
    `effective`.

    A GPU is tried with ever fewer; a CPU, which does not refuse, by what one image takes.
    """
    if losses.sides:
        losses = replace(losses, sides=(max(losses.sides),))  # the worst of multi-scale's
    divisors = [images for images in range(effective, 0, -1) if effective % images == 0]
    device = next(model.parameters()).device
    largest = 1
    if device.type == "cuda":
        states = room_for_states(model)
        for images in divisors:
            if _step_fits(model, losses, images, resolution):
                largest = images
                break
        del states
        release_memory(device)
        forget_peak_memory(device)  # the run's own is what is shown
    else:
        free = free_memory_mb()
        before = memory_mb(device)
        _step_fits(model, losses, 1, resolution)
        one = max(memory_mb(device) - before, 1.0) * distributed.world_size()  # on this machine
        fitting = [images for images in divisors if images * one < HEADROOM * free]
        largest = fitting[0] if fitting else 1
    tick(
        f"--batch auto: {largest} images at a time, accumulated {effective // largest} times "
        f"(effective {effective})"
    )
    return largest


def room_for_states(model: nn.Module) -> list[Tensor]:
    """As much memory as AdamW's two moments and the averaged weights are going to take."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [torch.empty_like(parameter) for parameter in trained for _ in range(3)]


def _step_fits(model: nn.Module, losses: Callable, images: int, resolution: int) -> bool:
    """Whether a training step on so many images fits; weights and random states do not change."""

    def step() -> bool:
        sum(losses(model, random_batch(images, resolution), float(OBJECTS)).values()).backward()
        return True

    state = torch.get_rng_state()
    device = next(model.parameters()).device
    model.train()
    try:
        return unless_out_of_memory(step, device) is not None
    finally:
        model.zero_grad(set_to_none=True)
        torch.set_rng_state(state)
        release_memory(device)  # of a step that did fit, too: the training's own sizes differ
