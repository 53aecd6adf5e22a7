"""Inference at batch 1, nano at 384: the detector alone, and with a mask for each of the 100
detections that are kept.

python benchmarks/inference.py [--peer_python ENV/bin/python] [--device cuda] [--cases masks]

Masks are wanted at the original's 640x480. Ours are the RLEs that predict.py and evaluate.py write,
from a nano mask head on nano at 384; the peer is its SegNano at 312, whose post-processing enlarges
100 masks to boolean images. Boxes of random weights are tiny, and ours works inside the boxes: it
is given boxes an eighth to a third of the image wide.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from common import Case, peer_model, run, some_objects

KEPT, HEIGHT, WIDTH = 100, 480, 640
DETECTOR = {"model": "Nano", "side": 384, "masks": False}
SEGMENTER = {"model": "SegNano", "side": 312, "masks": True}
CASES = [
    Case(
        "detector, bf16",
        ("ours", {"amp": "bf16", "masks": False}),
        ("peer", DETECTOR | {"amp": "bf16"}),
        0.62,
    ),
    Case(
        "detector, bf16, compiled",
        ("ours", {"amp": "bf16", "masks": False, "compile": True}),
        ("peer", DETECTOR | {"amp": "bf16"}),
        0.62,
    ),
    Case(
        "detector, fp32",
        ("ours", {"amp": "fp32", "masks": False}),
        ("peer", DETECTOR | {"amp": "fp32"}),
        1.05,
    ),
    Case(
        "with masks, bf16",
        ("ours", {"amp": "bf16", "masks": True}),
        ("peer", SEGMENTER | {"amp": "bf16"}),
        0.4,
    ),
    Case(
        "with masks, fp32",
        ("ours", {"amp": "fp32", "masks": True}),
        ("peer", SEGMENTER | {"amp": "fp32"}),
        0.4,
    ),
]


def ours(settings: dict, device: torch.device) -> Callable[[], float]:
    from rfdetr.classes import ClassTable
    from rfdetr.device import compile_in_place, pick_precision
    from rfdetr.inference.detections import DetectionRunner, draw_masks
    from rfdetr.models.detector import Detector
    from rfdetr.models.segmentation import MASK_HEADS
    from rfdetr.placement import Placement
    from rfdetr.sizes import SIZES

    size = SIZES["nano"]
    precision = pick_precision("bf16" if settings["amp"] == "bf16" else "off", device)
    model = Detector(size, rows=91, groups=1).to(device).eval()
    head = MASK_HEADS["nano"](size.hidden).to(device)
    if settings.get("compile"):
        compile_in_place(model.encoder, device, weights_stay=True)
    images = torch.randint(0, 256, (1, 3, size.resolution, size.resolution), dtype=torch.uint8)
    table = ClassTable(tuple(map(str, range(90))), tuple(range(1, 91)), tuple(range(1, 91)), 91, 0)
    runner = DetectionRunner(table, precision)
    placements = [Placement.resized(HEIGHT, WIDTH)]
    boxes = some_objects(KEPT, 8)[0][None].to(device)

    def step() -> float:
        detections = next(runner.run(model, images, placements, [0]))
        if settings["masks"]:
            detections.boxes = boxes  # of the detections that masks are drawn for
            draw_masks(head, detections, [np.arange(KEPT)], precision)
        return 1

    return step


def peer(settings: dict, device: torch.device) -> Callable[[], float]:
    amp = settings["amp"] == "bf16" and device.type == "cuda"
    model, _, postprocess, _ = peer_model(settings["model"], device, amp)
    model.eval()
    images = torch.randn(1, 3, settings["side"], settings["side"], device=device)
    sizes = torch.tensor([[HEIGHT, WIDTH]], device=device)

    @torch.inference_mode()
    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            outputs = model(images)
        found = postprocess(outputs, sizes)
        assert not settings["masks"] or found[0]["masks"].shape == (KEPT, 1, HEIGHT, WIDTH)
        return 1

    return step


if __name__ == "__main__":
    run(__doc__, CASES, {"ours": ours, "peer": peer})
