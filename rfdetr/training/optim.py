"""AdamW with RF-DETR's rates, and the learning rates' way through a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from rfdetr.device import has_kernel
from rfdetr.models.detector import Detector
from rfdetr.settings import TrainingSettings
from rfdetr.sizes import Recipe


def parameter_groups(
    model: Detector, lr: float, lr_encoder: float, weight_decay: float
) -> list[dict]:
    """AdamW groups with RF-DETR's rates: layer-wise decay on the encoder, a factor on the decoder's
    layers.

    The encoder's biases, norms, embeddings and layer scales get no weight decay, everything else
    does, as published. Groups are parts of the model, not rates, so that a run that is resumed with
    other rates has the same ones.  Source: PyPI rfdetr 1.11.
    """
    recipe = model.size.recipe
    groups = []
    for part in model.parts():
        rate = lr
        if part.name == "encoder":
            rate = lr_encoder * recipe.lr_layer_decay**part.depth_from_top
            rate *= recipe.lr_decoder_factor**2
        elif part.name == "decoder":
            rate *= recipe.lr_decoder_factor
        decay = 0.0 if part.without_decay else weight_decay
        groups.append(parameter_group(part.parameters, rate, decay))
    return groups


def parameter_group(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> dict:
    """One AdamW group; the schedule's factor is taken of `base_lr`."""
    return {"params": parameters, "base_lr": lr, "lr": lr, "weight_decay": weight_decay}


def has_fused_adamw(device: torch.device) -> bool:
    """Whether this torch has AdamW as one kernel there."""
    if device.type == "mps":
        return has_kernel("aten::_fused_adamw_", device)
    return device.type in ("cpu", "cuda")


@dataclass(frozen=True)
class Schedule:
    """The factor on every base rate at an optimizer step: a linear warm-up, then the kind's own
    way.

    "cosine": flat first, then a cosine down to the floor. "step": a tenth from 80 % on. "constant".
    It follows from the step and the total alone: a finished run that is resumed with more epochs
    goes on where the longer schedule stands at that step. Where a resumed run's epochs have more or
    fewer steps than before, the step is the one that as many epochs come to now
    (Progress.position).
    """

    total: int  # steps
    warmup: int  # steps
    flat: float  # cosine: share of all steps at the full rate first
    floor: float  # cosine: where it ends
    kind: str

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        if self.kind == "step":
            return 1.0 if step < 0.8 * self.total else 0.1
        start = max(self.warmup, self.flat * self.total)
        if step < start or self.total <= start:
            return 1.0
        done = min((step - start) / (self.total - start), 1.0)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


def make_schedule(settings: TrainingSettings, recipe: Recipe, steps: int) -> Schedule:
    """steps: optimizer steps in an epoch."""
    total = settings.epochs * steps
    if settings.warmup_epochs is None:
        warmup = min(recipe.warmup_steps, total // 10)
    else:
        warmup = round(settings.warmup_epochs * steps)
    kind = settings.lr_scheduler
    return Schedule(total, warmup, recipe.flat_fraction, recipe.lr_min_factor, kind)
