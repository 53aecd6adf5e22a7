"""An optimizer step of this repository, as the benchmarks time it: no average of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch


def own_train_step(
    size_name: str, amp: str, compiled: bool, make_batch: Callable, device: torch.device
) -> Callable[[], float]:
    """Returns step(), which trains on the batch of make_batch(size) and returns its images.

    amp: as --amp; an official seg size is trained with its mask head.
    """
    from rfdetr.classes import coco_table
    from rfdetr.device import compile_in_place, pick_precision
    from rfdetr.models.detector import Detector
    from rfdetr.sizes import SIZES, LossWeights
    from rfdetr.training.engine import Progress, Trainer, optimise
    from rfdetr.training.objective import DetectorObjective
    from rfdetr.training.optim import parameter_groups

    size = SIZES[size_name]
    recipe = size.recipe
    batch = make_batch(size)
    progress = Progress(micro_batch=len(batch))
    head = size.mask_head if size.mask_head == "official" else None
    model = Detector(size, rows=91, mask_head=head).to(device).train()
    if compiled:
        compile_in_place(model.encoder, device)
    precision = pick_precision(amp, device)
    losses = DetectorObjective(coco_table(), LossWeights(), precision, (), 0, progress)
    groups = parameter_groups(model, recipe.lr, recipe.lr_encoder, recipe.weight_decay)
    trainer = Trainer(
        model=model,
        losses=losses,
        optimizer=torch.optim.AdamW(groups, fused=True),
        schedule=lambda step: 1.0,
        scaler=torch.amp.GradScaler(device.type, enabled=amp == "fp16"),
        ema=None,
        clip=recipe.clip,
        device=device,
        progress=progress,
    )

    def step() -> float:
        optimise(trainer, batch)
        return len(batch)

    return step
