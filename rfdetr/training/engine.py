"""The training loop: one epoch, one optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from rfdetr import distributed
from rfdetr.console import UserError, warn
from rfdetr.data.dataset import Batch
from rfdetr.device import memory_mb, unless_out_of_memory
from rfdetr.memory import OUT_OF_MEMORY_ADVICE
from rfdetr.progress import ProgressBar

# what an objective counts beside its losses: summed, not averaged
COUNTS = ("objects", "matched_objects")
# in the sums: steps whose fp16 gradients overflowed, which have losses but no gradient norm
WITHOUT_NORM = "steps_without_grad_norm"
SHOWN = ("loss_class", "loss_box", "loss_giou", "loss_mask", "loss_dice")  # in the progress bar


@dataclass
class Progress:
    """Where a run stands; plain values, saved with every checkpoint."""

    epoch: int = 0  # finished epochs
    step_in_epoch: int = 0  # optimizer steps done in the running epoch
    step: int = 0  # optimizer steps done in all
    micro_batch: int = 0  # images in one forward pass; out of memory halves it
    nan_steps: int = 0
    sums: dict = field(default_factory=dict)  # running sums of the epoch's losses
    unread: list = field(
        default_factory=list
    )  # numbers of the training images that could not be read
    steps: int = 0  # optimizer steps in an epoch; 0 where an earlier version has not saved them

    def __post_init__(self):
        """ValueError for what no run has saved."""
        counts = [
            self.epoch,
            self.step_in_epoch,
            self.step,
            self.micro_batch,
            self.nan_steps,
            *self.unread,
        ]
        counts.append(self.steps)
        if not all(type(count) is int and 0 <= count < 2**31 for count in counts):
            raise ValueError("progress is counted in whole numbers")
        if not all(type(name) is str and type(value) is float for name, value in self.sums.items()):
            raise ValueError("sums are numbers by name")

    @property
    def position(self) -> int:
        """The schedule's step: the optimizer steps done, had every epoch had as many as now."""
        return self.epoch * self.steps + self.step_in_epoch

    def count_step(self, losses: dict[str, float]) -> bool:
        """Count a step and add up its losses, if they are finite; returns whether they are."""
        finite = math.isfinite(losses["loss"])
        self.step += 1
        self.step_in_epoch += 1
        if not finite:
            self.nan_steps += 1
            return False
        self.nan_steps = 0
        counted = losses | {"steps": 1.0}
        if "grad_norm" not in losses:
            counted[WITHOUT_NORM] = 1.0
        for name, value in counted.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        return True

    def means(self) -> dict[str, float]:
        """The epoch's mean losses over its finite steps, and the sums of what is counted."""
        sums = dict(self.sums)
        steps = max(sums.pop("steps", 0.0), 1.0)
        with_norm = steps - sums.pop(WITHOUT_NORM, 0.0)
        means = {}
        for name, value in sums.items():
            if name in COUNTS:
                means[name] = value
            else:
                means[name] = value / (with_norm if name == "grad_norm" else steps)
        return means

    def finish_epoch(self) -> None:
        self.epoch += 1
        self.step_in_epoch = 0
        self.sums = {}

    def count_epochs_in(self, steps: int) -> None:
        """Give an epoch `steps` optimizer steps from now on; the running one keeps the share that
        is done.
        """
        if self.steps:
            self.step_in_epoch = self.step_in_epoch * steps // self.steps
        self.step_in_epoch = min(self.step_in_epoch, steps)
        self.steps = steps


@dataclass
class Trainer:
    """All that a run trains with. A batch is anything with a length, slices, `objects`, `indices`
    and `unread`. `losses(model, batch, objects)` gives {name: weighted scalar}, each already
    divided by `objects`, the objects of the whole effective batch, and may give COUNTS;
    `schedule(position)` the factor on each group's base_lr.
    """

    model: nn.Module
    losses: Callable[[nn.Module, Batch, float], dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    clip: float
    device: torch.device
    progress: Progress

    @property
    def rates(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]


def train_one_epoch(
    trainer: Trainer, loader: Iterable[Batch], after_step: Callable[[Batch, dict, bool], None]
) -> dict:
    """Train on every batch of `loader`, one optimizer step each.

    Returns the epoch's mean losses, counts, rates and times. `after_step(batch, losses, finite)` is
    called after each step, for curves, signals and timed saves. Of an epoch that was stopped after
    its last step, images_per_s is None.
    """
    progress = trainer.progress
    trainer.model.train()
    data_s = 0.0
    compute_s = 0.0
    images = 0
    title = f"epoch {progress.epoch + 1}"
    bar = ProgressBar(loader, title, "steps", at_once=True, before=progress.step_in_epoch)
    begin = time.perf_counter()
    mark = begin
    for batch in bar:
        data_s += time.perf_counter() - mark
        mark = time.perf_counter()
        factor = trainer.schedule(progress.position)
        for group in trainer.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        losses = optimise(trainer, batch)
        finite = progress.count_step(losses)
        images += len(batch) * distributed.world_size()
        compute_s += time.perf_counter() - mark
        rate = images / (time.perf_counter() - begin)
        memory = memory_mb(trainer.device)
        text = f"{losses_in_words(losses)}, {rate:.1f} images/s, {memory:.0f} MB"
        bar.note(text)
        after_step(batch, losses, finite)
        mark = time.perf_counter()
    seconds = time.perf_counter() - begin
    return progress.means() | {
        "lr": max(group["lr"] for group in trainer.optimizer.param_groups),
        "images_per_s": images / seconds if images else None,
        "data_s": data_s,
        "compute_s": compute_s,
        "epoch_s": seconds,
        "peak_memory_mb": memory_mb(trainer.device),
    }


def losses_in_words(losses: dict[str, float]) -> str:
    """For the progress bar: the sum, and the parts that are SHOWN."""
    parts = []
    for name in SHOWN:
        if name in losses:
            parts.append(f"{name.removeprefix('loss_')} {losses[name]:.2f}")
    return f"loss {losses['loss']:.2f} ({' '.join(parts)})"


def optimise(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """One optimizer step on an effective batch; returns its losses over all ranks and the gradient
    norm, if that is finite.

    Out of memory: the batch is cut into smaller parts, which changes nothing but memory, and the
    step is repeated. A loss that is not finite skips the step.
    """
    trainer.optimizer.zero_grad(set_to_none=True)
    losses = backward_in_parts(trainer, batch)
    distributed.sum_gradients(trainer.model.parameters())
    values = distributed.sum_tensor(torch.stack(list(losses.values())))
    trainer.scaler.unscale_(trainer.optimizer)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(parameters, trainer.clip or math.inf)
    # the one CPU-GPU sync point after the backward pass
    *values, norm = torch.cat((values, norm.to(values)[None])).tolist()
    result = dict(zip(losses, values))
    result["loss"] = sum(value for name, value in result.items() if name not in COUNTS)
    if math.isfinite(norm):
        result["grad_norm"] = norm
        if math.isfinite(result["loss"]):
            take_step(trainer)
    elif math.isfinite(result["loss"]):
        # fp16 gradients that overflowed: a lower scale mends them, as long as there is one
        if trainer.scaler.get_scale() <= 1:
            result["loss"] = math.nan
    trainer.scaler.update()
    return result


def take_step(trainer: Trainer) -> None:
    """Change the weights by gradients that are finite, and their average."""
    trainer.scaler.step(trainer.optimizer)
    if trainer.ema is not None:
        trainer.ema.update(trainer.model, trainer.progress.step + 1)


def backward_in_parts(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
    """Gradients of a whole effective batch; returns its losses, detached.

    Out of memory halves the images in one forward pass, and the whole batch is repeated.
    """
    objects = max(distributed.sum_over_ranks(batch.objects), 1.0)
    random_state = random_states(trainer.device)
    while True:
        losses = unless_out_of_memory(lambda: backward(trainer, batch, objects), trainer.device)
        if losses is not None:
            return losses
        lower_micro_batch(trainer.progress, len(batch))
        trainer.optimizer.zero_grad(set_to_none=True)
        set_random_states(random_state)


def backward(trainer: Trainer, batch: Batch, objects: float) -> dict[str, Tensor]:
    """Add a batch's gradients, `micro_batch` images at a time; returns its losses, detached."""
    size = trainer.progress.micro_batch
    losses: dict[str, Tensor] = {}
    for first in range(0, len(batch), size):
        part = trainer.losses(trainer.model, batch[first : first + size], objects)
        loss = sum(value for name, value in part.items() if name not in COUNTS)
        trainer.scaler.scale(loss).backward()
        for name, value in part.items():
            losses[name] = losses.get(name, 0.0) + value.detach()
    return losses


def random_states(device: torch.device) -> dict:
    """The states of the generators that a step draws from."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def lower_micro_batch(progress: Progress, images: int) -> None:
    """Halve the images in one forward pass, saying so.  Raises UserError with what is left to try
    at one image.
    """
    size = min(progress.micro_batch, images)
    if size <= 1:
        raise UserError(f"out of memory with a single image. {OUT_OF_MEMORY_ADVICE}")
    progress.micro_batch = -(-size // 2)
    warn(
        f"out of memory: going on with --batch {progress.micro_batch} and the accumulation raised "
        f"to match (the effective batch stays {images})"
    )
