"""AdamW with RF-DETR's rates, and their way through a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import nn

from rfdetr.models.detector import Detector
from rfdetr.sizes import ModelSize
from rfdetr.training.engine import Trainer


@dataclass(frozen=True)
class Schedule:
    """The factor on every base rate at an optimizer step: a linear warm-up, then "cosine" (after a flat part), "step"
    (a tenth from 80 % on) or "constant".

    It follows from the step and the total alone: a finished run resumed with more epochs goes on where the longer
    schedule stands at that step. Where a resumed run's epochs have more or fewer steps than before, the step is the
    one that as many epochs come to now (Progress.position).
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


def parameter_groups(
    model: Detector, lr: float, lr_encoder: float, weight_decay: float, size: ModelSize
) -> list[dict]:
    """AdamW groups with RF-DETR's rates: layer-wise decay on the encoder, a factor on the decoder's layers.

    Encoder biases, norms, embeddings and layer scales get no weight decay, everything else does, as published. Groups
    are parts of the model, not rates, so that a run resumed with other rates has the same ones.
    """
    recipe = size.recipe
    groups = []
    for part in model.parts():
        rate = lr
        if part.name == "encoder":
            layer_factor = recipe.lr_layer_decay**part.depth_from_top
            rate = lr_encoder * layer_factor * recipe.lr_decoder_factor**2
        elif part.name == "decoder":
            rate = lr * recipe.lr_decoder_factor
        groups.append(
            {
                "params": part.parameters,
                "base_lr": rate,
                "lr": rate,
                "weight_decay": 0.0 if part.without_decay else weight_decay,
            }
        )
    return groups


def make_trainer(
    session, model: nn.Module, losses: Callable, groups: list[dict], steps: int
) -> Trainer:
    """AdamW (fused where torch has it), a gradient scaler for fp16 alone, an average of the weights, and the schedule.

    `steps`: optimizer steps in an epoch.
    """
    session.progress.count_epochs_in(steps)
    args, device, recipe = session.args, session.device, session.size.recipe
    total = args.epochs * steps
    warmup = (
        round(args.warmup_epochs * steps)
        if "warmup_epochs" in args
        else min(recipe.warmup_steps, total // 10)
    )
    kind = getattr(args, "lr_scheduler", "cosine")
    schedule = Schedule(total, warmup, recipe.flat_fraction, recipe.lr_min_factor, kind)
    clip = recipe.seg_clip if session.kind == "segmentation" else recipe.clip
    optimizer = torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=session.precision.dtype is torch.float16)
    ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if args.ema else None
    session.progress.micro_batch = session.progress.micro_batch or args.batch
    return Trainer(model, losses, optimizer, schedule, scaler, ema, clip, device, session.progress)
