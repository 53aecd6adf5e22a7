"""The few calls that make a script run the same on one process and under torchrun."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from rfdetr.console import UserError

# For a process that hangs; one that has died is noticed at once. Rank 0 downloads weights while the
# others wait.
TIMEOUT = datetime.timedelta(hours=1)


class ProcessLost(UserError):
    """Another process of the run has ended or does not answer."""


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around a call that needs every rank: ProcessLost where one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            "another process of this run has ended or does not answer, and so this one ends. "
            "Which one, and how, is in torchrun's summary below (exit code -9: killed, mostly for "
            "want of memory)"
        ) from error


def processes() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device) -> None:
    """Join the process group that torchrun's variables describe; nothing on a single process.

    Objects and numbers go from CPU to CPU, by gloo: they never wait for a GPU, and gloo notices at
    once where a process has ended.
    """
    if processes() <= 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _together():
        dist.init_process_group(backend, timeout=TIMEOUT)


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


def launcher() -> list[str]:
    """The first words of a command that starts a script as this one was started."""
    if world_size() == 1:
        return ["python"]
    return ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", str(world_size()))]


def sum_over_ranks(value: float) -> float:
    """The sum of `value` over all ranks."""
    if world_size() == 1:
        return value
    return sum_tensor(torch.tensor(value, dtype=torch.float64)).item()


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of `tensor` over all ranks, in place.

    On GPUs the ranks meet first: who waits for a GPU's sum with a process that has ended waits for
    TIMEOUT. Meanwhile the GPUs work on.
    """
    if world_size() > 1:
        with _together():
            if tensor.device.type == "cuda":
                dist.all_reduce(torch.zeros(()))
            dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in place.

    A sum, not a mean: the losses are already divided by the number of boxes of all ranks.
    """
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # no object on this rank
            parameter.grad = torch.zeros_like(parameter)
    # one transfer for all
    flat = sum_tensor(torch.cat([parameter.grad.flatten() for parameter in trained]))
    parts = flat.split([parameter.numel() for parameter in trained])
    for parameter, part in zip(trained, parts):
        parameter.grad.copy_(part.view_as(parameter))


def gather_objects(value: object) -> list:
    """One Python object of every rank, on every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    with _together():
        dist.all_gather_object(values, value)
    return values


def from_main(value: object) -> object:
    """Rank 0's object, on every rank."""
    values = [value]
    if world_size() > 1:
        with _together():
            dist.broadcast_object_list(values, src=0)
    return values[0]
