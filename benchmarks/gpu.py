"""Everything there is to measure on a card, in one command of at most 35 minutes.

python benchmarks/gpu.py [--peer_python ENV/bin/python] [--data DATASET] [--out gpu.md]
python benchmarks/gpu.py --device cpu --quick

Training steps of nano and seg-nano (beside the package's where its Python is given), inference,
stage 2, what --batch auto chooses, a whole run of tiny on the demo (and on --data), and where a
step's time goes. Writes one Markdown table after the other. Weights are random; times are medians
of a step's, by image. --quick tries the code itself, on tiny.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT, Worker, peak_memory_mb, peer_train_step, run, some_objects
from own_train_step import own_train_step

sys.path.insert(0, str(ROOT))

OBJECTS = 8  # an image
PEERS = {"nano": ("Nano", 384), "seg-nano": ("SegNano", 312)}
SLOWEST = 5  # rows of each of the profiler's tables


@dataclass(frozen=True)
class Plan:
    """What is measured: all of it, or as little as runs every line."""

    sizes: tuple[str, ...] = ("nano", "seg-nano")
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    amps: tuple[str, ...] = ("off", "bf16", "fp16")
    compiled: bool = True
    rounds: int = 7
    effective: int = 64  # images of a step, that --batch auto divides
    images: int = 16  # of stage 2
    epochs: int = 20  # of tiny


QUICK = Plan(("tiny",), (1,), ("off",), False, 1, 2, 2, 1)


def builders() -> dict[str, Callable]:
    import stage2

    return {"train": train, "detect": detect, "stage2": stage2.ours, "peer": peer_train_step}


def made_batch(size, images: int):
    """Images with OBJECTS objects each, pinned where the device reads such memory by itself."""
    from rfdetr.data.dataset import Batch

    side = size.resolution
    targets = []
    for index in range(images):
        boxes, masks = some_objects(OBJECTS, side)
        labels = torch.zeros(OBJECTS, dtype=torch.long)
        has_mask = torch.ones(OBJECTS, dtype=torch.bool)
        target = {"boxes": boxes, "labels": labels, "has_mask": has_mask, "index": index}
        targets.append(target | {"masks": masks})
    batch = Batch(torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8), targets)
    return batch.pin_memory() if torch.cuda.is_available() else batch


def train(settings: dict, device: torch.device) -> Callable[[], float]:
    """An optimizer step on images with masks."""

    def make_batch(size):
        return made_batch(size, settings["batch"])

    return own_train_step(
        settings["size"], settings["amp"], settings["compile"], make_batch, device
    )


def detect(settings: dict, device: torch.device) -> Callable[[], float]:
    """Detections, and masks in 640x480 of 100 of each image's."""
    import numpy as np

    from rfdetr.classes import coco_table
    from rfdetr.device import compile_in_place, pick_precision
    from rfdetr.inference.detections import DetectionRunner, draw_masks
    from rfdetr.models.detector import Detector
    from rfdetr.placement import Placement
    from rfdetr.sizes import SIZES

    size = SIZES[settings["size"]]
    kept = min(100, size.select)
    head = size.mask_head if size.mask_head == "official" else "nano"
    model = Detector(size, rows=91, mask_head=head, groups=1).to(device)
    if settings["compile"]:
        compile_in_place(model.encoder, device)
    precision = pick_precision(settings["amp"], device)
    runner = DetectionRunner(coco_table(), precision)
    images = made_batch(size, settings["batch"]).images
    placements = [Placement.resized(480, 640)] * len(images)
    boxes = some_objects(kept, 8)[0].expand(len(images), -1, -1)

    def step() -> float:
        (detections,) = runner.run(model, images, placements, list(range(len(images))))
        if settings["masks"]:
            detections.boxes = boxes  # random weights' own are tiny
            draw_masks(model.head, detections, [np.arange(kept)] * len(images), precision)
        return len(images)

    return step


def measure(what: str, settings: dict, device: torch.device, rounds: int) -> tuple[float, float]:
    """Seconds of an image and the peak of memory in MB; memory is given back afterwards."""
    from rfdetr.device import forget_peak_memory, release_memory

    torch.manual_seed(0)
    forget_peak_memory(device)
    try:
        step = builders()[what](settings, device)
        step()
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            units = step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - begin) / units)
        return statistics.median(seconds), peak_memory_mb(device)
    finally:
        step = None
        gc.collect()
        release_memory(device)


def measure_peer(settings: dict, args: Namespace, rounds: int) -> tuple[float, float]:
    side = Worker(args.peer_python, "peer", settings, args)
    try:
        seconds = [side.ask("round")["seconds"] for _ in range(rounds)]
        return statistics.median(seconds), side.ask("end")["memory_mb"]
    finally:
        side.close()


def cells(measured: Callable[[], tuple[float, float]]) -> list[str]:
    """What was measured as two cells; an error is told in their place, and the rest goes on."""
    try:
        seconds, memory = measured()
    except Exception as error:  # one case must not cost the others
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return [f"not measured: {first_line[:90]}", "-"]
    return [f"{seconds * 1e3:.1f}", f"{memory:.0f}"]


def training_rows(plan: Plan, args: Namespace, device: torch.device) -> Iterator[list[str]]:
    yield ["training step", "batch", "amp", "ms an image", "MB", "package: ms", "package: MB"]
    for size in plan.sizes:
        for batch in plan.batches:
            for amp in plan.amps:
                settings = {"size": size, "batch": batch, "amp": amp, "compile": False}
                own = cells(lambda s=settings: measure("train", s, device, plan.rounds))
                yield [size, str(batch), amp, *own, *peer_cells(settings, plan, args)]
        if plan.compiled:
            settings = {"size": size, "batch": 4, "amp": "bf16", "compile": True}
            own = cells(lambda s=settings: measure("train", s, device, plan.rounds))
            yield [f"{size}, compiled", "4", "bf16", *own, "-", "-"]


def peer_cells(settings: dict, plan: Plan, args: Namespace) -> list[str]:
    """The package's step; its trainer computes in fp32 or bf16."""
    if not args.peer_python or settings["amp"] == "fp16":
        return ["-", "-"]
    model, side = PEERS[settings["size"]]
    peer = {"model": model, "side": side, "batch": settings["batch"], "objects": OBJECTS}
    peer["amp"] = "bf16" if settings["amp"] == "bf16" else "fp32"
    return cells(lambda: measure_peer(peer, args, plan.rounds))


def inference_rows(plan: Plan, device: torch.device) -> Iterator[list[str]]:
    yield ["inference", "batch", "amp", "ms an image", "MB"]
    for size in plan.sizes:
        for masks in (False, True):
            for batch in sorted({plan.batches[0], plan.batches[-1]}):
                for amp in plan.amps[:2]:
                    settings = {"size": size, "batch": batch, "amp": amp, "masks": masks}
                    settings["compile"] = False
                    own = cells(lambda s=settings: measure("detect", s, device, plan.rounds))
                    yield [f"{size}, 100 masks" if masks else size, str(batch), amp, *own]


def stage2_rows(plan: Plan, device: torch.device) -> Iterator[list[str]]:
    import stage2

    yield ["stage 2, nano", "amp", "ms an image", "MB"]
    amps = ("fp32", "bf16") if device.type == "cuda" else ("fp32",)
    for part in ("first epoch", "cached epochs"):
        for amp in amps:
            settings = {"part": part, "amp": amp, "images": plan.images, "objects": OBJECTS}
            settings |= {"warm_epochs": 0, "cache": "ram"}
            stage2.FOLDER = tempfile.TemporaryDirectory()  # its images are written once each
            own = cells(lambda s=settings: measure("stage2", s, device, 1))
            yield [part, amp, *own]


def batch_auto_rows(plan: Plan, device: torch.device) -> Iterator[list[str]]:
    from rfdetr.classes import coco_table
    from rfdetr.device import pick_precision
    from rfdetr.models.detector import Detector
    from rfdetr.sizes import SIZES, LossWeights
    from rfdetr.training.auto_batch import find_micro_batch
    from rfdetr.training.engine import Progress
    from rfdetr.training.objective import DetectorObjective

    yield ["--batch auto", "effective batch", "images at a time"]
    for name in plan.sizes:
        size = SIZES[name]
        head = size.mask_head if size.mask_head == "official" else None
        model = Detector(size, rows=91, mask_head=head).to(device)
        precision = pick_precision("auto", device)
        losses = DetectorObjective(coco_table(), LossWeights(), precision, (), 0, Progress())
        found = find_micro_batch(model, losses, plan.effective, size.resolution)
        yield [name, str(plan.effective), str(found)]


def run_rows(plan: Plan, args: Namespace, folder: Path) -> Iterator[list[str]]:
    """tiny as a user trains it, and its scores by evaluate.py on the same device."""
    from rfdetr.data.demo import make_demo

    yield [
        "tiny",
        "epochs",
        "training, s",
        "an evaluation, s",
        "peak MB",
        "bbox/mAP",
        "evaluate.py",
    ]
    few = {"train": 4, "valid": 2, "test": 0} if args.quick else {}
    make_demo(folder / "demo", **few)
    for data in [folder / "demo", *([args.data] if args.data else [])]:
        where = folder / f"run_{data.name}"
        words = ["--size", "tiny", "--dataset", data, "--output_dir", where]
        words += ["--epochs", plan.epochs, "--device", args.device]
        words += ["--min_steps", 1, "--resolution", 32] if args.quick else []
        begin = time.perf_counter()
        script("train_detector_stage1.py", *words)
        seconds = time.perf_counter() - begin
        epoch = json.loads((where / "metrics.json").read_text())["epochs"][-1]
        given = ["--checkpoint", where / "last.pt", "--dataset", data, "--json", folder / "s.json"]
        script("evaluate.py", *given, "--device", args.device)
        again = json.loads((folder / "s.json").read_text())["bbox"]["mAP"]
        row = [data.name, str(plan.epochs), f"{seconds:.0f}"]
        row += [f"{epoch['train']['evaluation_s']:.1f}", f"{epoch['train']['peak_memory_mb']:.0f}"]
        yield [*row, str(epoch["valid"]["bbox"]["mAP"]), str(again)]


def script(name: str, *words: object) -> None:
    command = [sys.executable, str(ROOT / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stdout[-500:]} {done.stderr[-1500:]}")


def profile_rows(plan: Plan, device: torch.device) -> Iterator[list[str]]:
    """The slowest operations of a training step, and what the CPU waited in."""
    from torch.profiler import ProfilerActivity, profile

    size = plan.sizes[0]
    amp = "bf16" if "bf16" in plan.amps else "off"
    settings = {"size": size, "batch": min(4, plan.batches[-1]), "amp": amp, "compile": False}
    step = train(settings, device)
    step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    on_gpu = device.type == "cuda"
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = profiler.key_averages()
    yield [f"a step of {size}, batch {settings['batch']}, {amp}", "calls", "ms"]
    slowest = sorted(averages, key=lambda event: -getattr(event, time_of))[:SLOWEST]
    for event in slowest:
        yield [event.key[:70], str(event.count), f"{getattr(event, time_of) / 1e3:.2f}"]
    waits = [event for event in averages if "ynchronize" in event.key or "Memcpy" in event.key]
    for event in sorted(waits, key=lambda event: -event.self_cpu_time_total)[:SLOWEST]:
        name = f"waits: {event.key[:60]}"
        yield [name, str(event.count), f"{event.self_cpu_time_total / 1e3:.2f}"]


def write(rows: Iterator[list[str]], file: Path) -> str:
    """Print a table and add it to the file, row by row; returns what ended it early, or ""."""

    def put(text: str) -> None:
        print(text, end="", flush=True)
        with open(file, "a", encoding="utf-8") as opened:
            opened.write(text)

    try:
        for number, row in enumerate(rows):
            put("\n" if number == 0 else "")
            put(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n")
            put("|" + "---|" * len(row) + "\n" if number == 0 else "")
    except Exception as error:  # the other tables are worth having
        put(f"\nnot measured further: {error}\n")
        return str(error)
    return ""


def main(argv: list[str] | None = None) -> None:
    from rfdetr.device import pick_device
    from rfdetr.runs.environment import environment

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="does it run?")
    parser.add_argument("--peer_python", help="of an environment with rfdetr[train]==1.11.*")
    parser.add_argument("--data", type=Path, help="a dataset to train tiny on, beside the demo")
    parser.add_argument("--out", type=Path, default=Path("gpu.md"))
    args = parser.parse_args(argv)
    args.threads = torch.get_num_threads()
    args.clock = "wall"
    device = pick_device(args.device)
    plan = QUICK if args.quick else Plan()
    info = environment(device)
    title = f"{info['device']}, {info['cpu']}, torch {torch.__version__}, commit {info['commit']}\n"
    args.out.write_text(title, encoding="utf-8")
    print(title, end="")
    with tempfile.TemporaryDirectory() as folder:
        tables = [
            training_rows(plan, args, device),
            inference_rows(plan, device),
            stage2_rows(plan, device),
            batch_auto_rows(plan, device),
            profile_rows(plan, device),
            run_rows(plan, args, Path(folder)),
        ]
        failed = [error for rows in tables if (error := write(rows, args.out))]
    print(f"Written: {args.out}")
    if failed:
        sys.exit(f"{len(failed)} tables are not complete")


if __name__ == "__main__":
    if "--side" in sys.argv:
        run(__doc__, [], builders())
    else:
        main()
