"""A detector training step, nano at 384, eight objects an image: forward to AdamW.

python benchmarks/train_step.py [--peer_python ENV/bin/python] [--device cuda] [--cases "batch 1"]

Ours begins with uint8 images, as the loader gives them; the peer is handed normalised floats.
Neither keeps an average of the weights here. Seconds are those of an image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Case, peer_train_step, run, some_objects

CASES = [
    Case(
        f"train step, batch {batch}, {amp}",
        ("ours", {"batch": batch, "amp": amp, "objects": 8}),
        ("peer", {"model": "Nano", "side": 384, "batch": batch, "amp": amp, "objects": 8}),
        asked,
    )
    for amp, asked in (("bf16", 0.65), ("fp32", 1.05))
    for batch in (1, 4)
]


def ours(settings: dict, device: torch.device) -> Callable[[], float]:
    from rfdetr.classes import coco_table
    from rfdetr.data.loaders import Batch
    from rfdetr.device import pick_precision
    from rfdetr.models.detector import Detector
    from rfdetr.sizes import SIZES, LossWeights
    from rfdetr.training.engine import Progress, Trainer, optimise
    from rfdetr.training.objective import DetectorObjective
    from rfdetr.training.optim import parameter_groups

    size = SIZES["nano"]
    batch = settings["batch"]
    recipe = size.recipe
    progress = Progress(micro_batch=batch)
    model = Detector(size, rows=91).to(device).train()
    precision = pick_precision("bf16" if settings["amp"] == "bf16" else "off", device)
    objective = DetectorObjective(
        coco_table(), LossWeights(), precision, sides=(), seed=0, progress=progress
    )
    groups = parameter_groups(model, recipe.lr, recipe.lr_encoder, recipe.weight_decay)
    trainer = Trainer(
        model=model,
        losses=objective,
        optimizer=torch.optim.AdamW(groups, fused=True),
        schedule=lambda step: 1.0,
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        ema=None,
        clip=recipe.clip,
        device=device,
        progress=progress,
    )
    images = torch.randint(0, 256, (batch, 3, size.resolution, size.resolution), dtype=torch.uint8)
    labels = torch.zeros(settings["objects"], dtype=torch.long)
    targets = [
        {
            "boxes": some_objects(len(labels), 8)[0],
            "labels": labels,
            "has_mask": torch.zeros(len(labels), dtype=torch.bool),
            "index": i,
        }
        for i in range(batch)
    ]
    data = Batch(images, targets)

    def step() -> float:
        optimise(trainer, data)
        return batch

    return step


if __name__ == "__main__":
    run(__doc__, CASES, {"ours": ours, "peer": peer_train_step})
