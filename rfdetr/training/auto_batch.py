"""--batch auto: the largest batch that fits the device, with batch x accum kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from rfdetr import distributed
from rfdetr.console import tick
from rfdetr.data.loaders import Batch
from rfdetr.device import free_memory_mb, memory_mb, release_memory, unless_out_of_memory

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
    return Batch(
        torch.zeros(images, 3, resolution, resolution, dtype=torch.uint8), [target] * images
    )


def resolve_batch(
    args: argparse.Namespace,
    model: nn.Module,
    losses: Callable[[nn.Module, Batch, float], dict[str, Tensor]],
) -> None:
    """Turn `args.batch` "auto" into a number, trying a step on the worst case; the effective batch is kept."""
    if args.batch != "auto":
        return
    effective = args.effective_batch
    losses = replace(
        losses, sides=losses.sides and (max(losses.sides),)
    )  # the worst of multi-scale's
    fits = [b for b in range(effective, 0, -1) if effective % b == 0]
    device = next(model.parameters()).device
    if device.type == "cuda":
        args.batch = next((b for b in fits if _step_fits(model, losses, b, args.resolution)), 1)
    else:
        before, free = memory_mb(device), free_memory_mb()
        _step_fits(model, losses, 1, args.resolution)
        each = (
            max(memory_mb(device) - before, 1.0) * distributed.world_size()
        )  # on this machine, perhaps
        args.batch = next((b for b in fits if b * each < HEADROOM * free), 1)
    args.accum = effective // args.batch
    tick(
        f"--batch auto: {args.batch} images at a time, accumulated {args.accum} times "
        f"(effective {effective})"
    )


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
