"""A detector training step, nano at 384, eight objects an image: forward to AdamW.

python benchmarks/train_step.py [--peer_python ENV/bin/python] [--device cuda] [--cases "batch 1"]

Ours begins with uint8 images, as the loader gives them; the peer is handed normalised floats.
Neither keeps an average of the weights here. Seconds are those of an image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Case, peer_train_step, run, some_objects
from own_train_step import own_train_step

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
    from rfdetr.data.dataset import Batch

    def make_batch(size) -> Batch:
        side = size.resolution
        images = torch.randint(0, 256, (settings["batch"], 3, side, side), dtype=torch.uint8)
        labels = torch.zeros(settings["objects"], dtype=torch.long)
        has_mask = torch.zeros(len(labels), dtype=torch.bool)
        targets = []
        for index in range(len(images)):
            boxes = some_objects(len(labels), 8)[0]
            target = {"boxes": boxes, "labels": labels, "has_mask": has_mask, "index": index}
            targets.append(target)
        return Batch(images, targets)

    amp = "bf16" if settings["amp"] == "bf16" else "off"
    return own_train_step("nano", amp, False, make_batch, device)


if __name__ == "__main__":
    run(__doc__, CASES, {"ours": ours, "peer": peer_train_step})
