"""The few calls that make a script run the same on one process and under torchrun."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist


def start(device: torch.device) -> None:
    """Join the process group that torchrun describes in the environment; nothing on a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def sum_over_ranks(value: float, device: torch.device) -> float:
    """The sum of `value` over all ranks."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    dist.all_reduce(total)
    return total.item()


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of `tensor` over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters) -> None:
    """Add the gradients of all ranks in place; the losses are already divided by the global number of boxes."""
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # no object on this rank
            parameter.grad = torch.zeros_like(parameter)
    flat = sum_tensor(torch.cat([parameter.grad.flatten() for parameter in trained]))  # one transfer for all
    for parameter, part in zip(trained, flat.split([parameter.numel() for parameter in trained])):
        parameter.grad.copy_(part.view_as(parameter))


def gather_objects(value: object) -> list:
    """One Python object of every rank, on every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: object) -> object:
    """Rank 0's object, on every rank."""
    return gather_objects(value)[0]
