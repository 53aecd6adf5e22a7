"""Stage 2 on generated 640x480 JPEGs: nano, its default views and mask head, batch 4, against
SegNano's joint step.

python benchmarks/stage2.py [--peer_python ENV/bin/python] [--device cuda] [--cases epoch]

"first epoch" reads the images, runs the frozen detector on the views that the epoch draws, keeps
them on disk and trains; "cached epochs" train from views that are all there. Seconds are those of
an image. Further cases compare ours with itself: 200 objects an image with 8 (a training step from
the cache), 64 images with 16, the cache on disk with the one in memory, and reads from the cache on
disk after 50 epochs with the first ones. At the end train_seg_stage2.py itself runs at batch 4 with
the cache in memory, on disk and off, for the memory of the whole process (evaluation included).

Random weights match no object, so every object keeps the query that fits it least badly, whatever
the overlap.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, Case, peer_train_step, run, write_coco

FOLDER = tempfile.TemporaryDirectory()
PEER = {"model": "SegNano", "side": 312, "batch": 4, "objects": 8}
BASE = {"images": 16, "objects": 8, "warm_epochs": 0, "amp": "fp32", "cache": "disk"}
CASES = []
for amp in ("bf16", "fp32"):
    for part, asked in (("first epoch", 0.12), ("cached epochs", 0.006)):
        CASES.append(
            Case(
                f"{part}, {amp}",
                ("ours", BASE | {"part": part, "amp": amp}),
                ("peer", PEER | {"amp": amp}),
                asked,
            )
        )
EPOCHS, READS = BASE | {"part": "cached epochs"}, BASE | {"part": "reads"}
CASES += [
    Case("200 objects an image : 8", ("ours", EPOCHS | {"objects": 200}), ("ours", EPOCHS), 3.0),
    Case("64 images : 16", ("ours", EPOCHS | {"images": 64}), ("ours", EPOCHS), 1.1),
    Case("cache on disk : in memory", ("ours", EPOCHS), ("ours", EPOCHS | {"cache": "ram"}), 1.1),
    Case(
        "cache reads after 50 epochs : first",
        ("ours", READS | {"warm_epochs": 50}),
        ("ours", READS),
        1.1,
    ),
]

# train_seg_stage2.py, where every object of random weights keeps a query
MATCHING = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import train_seg_stage2
from rfdetr.training import frozen
frozen.MATCH_IOU = -1.0
train_seg_stage2.main()
"""


def ours(settings: dict, device: torch.device) -> Callable[[], float]:
    from timm.utils import ModelEmaV3

    from rfdetr.classes import ClassTable
    from rfdetr.data.coco import read_dataset
    from rfdetr.data.dataset import SplitDataset
    from rfdetr.data.loaders import EpochSampler
    from rfdetr.device import pick_precision
    from rfdetr.models.cpu_copy import for_inference
    from rfdetr.models.detector import Detector
    from rfdetr.models.segmentation import MASK_HEADS
    from rfdetr.sizes import SIZES, LossWeights
    from rfdetr.training import feature_cache, frozen
    from rfdetr.training.engine import Progress, Trainer, train_one_epoch

    frozen.MATCH_IOU = -1.0
    size, count = SIZES["nano"], settings["images"]
    recipe, table = size.recipe, ClassTable(("thing",), (1,), (0,), 2, 1)
    split = read_dataset(write_coco(Path(FOLDER.name) / "data", count, settings["objects"]))[
        "train"
    ]
    precision = pick_precision("bf16" if settings["amp"] == "bf16" else "off", device)
    detector = Detector(size, 2, background=True, groups=1).to(device).requires_grad_(False).eval()
    head, progress = (
        MASK_HEADS[size.mask_head](size.hidden).to(device),
        Progress(micro_batch=recipe.seg_batch),
    )
    groups = [{"params": list(head.parameters()), "base_lr": recipe.seg_lr, "lr": recipe.seg_lr}]
    objective = feature_cache.MaskObjective(
        for_inference(detector, precision), table, LossWeights(), precision, (), 0, progress
    )
    trainer = Trainer(
        model=head,
        losses=objective,
        optimizer=torch.optim.AdamW(groups, weight_decay=recipe.seg_weight_decay, fused=True),
        schedule=lambda step: 1.0,
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        ema=ModelEmaV3(head, decay=recipe.ema_decay, use_warmup=True),
        clip=recipe.seg_clip,
        device=device,
        progress=progress,
    )
    sampler = EpochSampler(count, recipe.seg_batch * recipe.seg_accum, 0, 1)

    def cached() -> feature_cache.CachedLoader:
        """From a cache of its own, with no view in it."""
        dataset, parent = (
            SplitDataset(split, size.resolution, None, masks=True),
            Path(FOLDER.name, uuid.uuid4().hex),
        )
        cache = feature_cache.FeatureCache(objective, dataset, recipe.cache_views, parent)
        return feature_cache.CachedLoader(cache.open(settings["cache"] == "disk"), sampler)

    def epoch(loader: feature_cache.CachedLoader) -> float:
        progress.epoch += 1
        sampler.set_epoch(progress.epoch)
        if settings["part"] == "reads":
            return sum(len(batch) for batch in loader)
        train_one_epoch(trainer, loader, lambda batch, losses, finite: None)
        return len(sampler) * sampler.per_step

    if settings["part"] == "first epoch":
        return lambda: epoch(cached())
    loader = cached()
    for index in range(count * recipe.cache_views):
        loader.cache.batch([loader.reader[index // recipe.cache_views, index]])
    for _ in range(settings["warm_epochs"]):
        epoch(loader)
    return lambda: epoch(loader)


def whole_process(device: str) -> None:
    """Run the script at batch 4 on a few images and print its peak memory."""
    from rfdetr.classes import ClassTable
    from rfdetr.models.detector import Detector
    from rfdetr.runs.metrics_file import read_metrics
    from rfdetr.sizes import SIZES
    from rfdetr.weights import checkpoint

    folder, size = Path(FOLDER.name), SIZES["nano"]
    write_coco(folder / "data", 16, 8)
    table = ClassTable(("thing",), (1,), (0,), 2, 1)
    state = Detector(size, 2, background=True).state_dict()
    checkpoint.save(
        folder / "detector.pt", checkpoint.make_content("detector", size, 384, table, None, state)
    )
    for cache in ("ram", "disk", "off"):
        command = [sys.executable, "-c", MATCHING, str(ROOT)]
        command += ["--checkpoint", str(folder / "detector.pt")]
        command += ["--dataset", str(folder / "data"), "--output_dir", str(folder / cache)]
        command += ["--epochs", "2", "--device", device, "--tensorboard", "0", "--cache", cache]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        # the second epoch's peak covers the first one's evaluation
        epochs = read_metrics(folder / cache)["epochs"]
        peak, what = (
            epochs[-1]["train"]["peak_memory_mb"],
            "allocated" if device == "cuda" else "resident",
        )
        print(f"train_seg_stage2.py, batch 4, --cache {cache}: {peak:.0f} MB {what}")


if __name__ == "__main__":
    run(__doc__, CASES, {"ours": ours, "peer": peer_train_step})
    if "--side" not in sys.argv and ("--cases" not in sys.argv or "memory" in sys.argv):
        whole_process("cuda" if "cuda" in sys.argv else "cpu")
