"""What the benchmarks share: two sides, each in a process of its own, timed in turns.

A script names its cases and how to build a side; `run` does the rest. Both processes of a case stay
alive, and while one works the other waits at a pipe, so that noise of the machine falls on both: A
B A B ...  The peer is PyPI's rfdetr, whose package has the name of ours, hence the processes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peer import ROOT, peer_environment
from PIL import Image

COLUMNS = (
    "case | first side | second side | ratio of medians | of each pair | asked | peak memory, MB"
)
# settings and device -> step(); a step returns how many units (images, say) it did, or
# {"units": ..., "values": [...]}
Builder = Callable[[dict, torch.device], Callable[[], float | dict]]


@dataclass(frozen=True)
class Case:
    """One comparison: seconds a unit of the first side over the second's, to be <= `asked`.

    A side is (name of its builder, settings); settings with amp "bf16" need hardware that computes
    in it.
    """

    name: str
    first: tuple[str, dict]
    second: tuple[str, dict]
    asked: float | None


class Worker:
    """One side of a case in a process of its own, which waits until it is asked for a round."""

    def __init__(self, python: str, side: str, settings: dict, args: argparse.Namespace):
        threads = str(args.threads)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), threads
        )
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        command = [
            python,
            "-W",
            "ignore",
            sys.argv[0],
            "--side",
            side,
            "--settings",
            json.dumps(settings),
        ]
        command += ["--device", args.device, "--threads", threads, "--clock", args.clock]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.log, env=environment, text=True, bufsize=1
        )

    def ask(self, question: str) -> dict:
        """Send "round" or "end" to the side.

        Answers are {"seconds" a unit, "values"} and {"memory_mb", "versions"}. Raises RuntimeError
        if the side has ended.
        """
        try:
            self.process.stdin.write(question + "\n")
            answer = self.process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            self.log.seek(0)
            raise RuntimeError(f"{' '.join(self.process.args)} ended:\n{self.log.read()[-3000:]}")
        return json.loads(answer)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self.process.stdin.close()
        self.process.wait()
        self.log.close()


def serve(build: Builder, args: argparse.Namespace) -> None:
    """A side's process: build, warm up, then a timed round for every line on stdin."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not reach the pipe
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    settings = json.loads(args.settings)
    device = torch.device(args.device)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    step = build(settings, device)
    step()
    for question in sys.stdin:
        if question.strip() == "end":
            print(
                json.dumps({"memory_mb": peak_memory_mb(device), "versions": versions()}),
                file=answers,
            )
            return
        begin = clock()
        done = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = clock() - begin
        done = done if isinstance(done, dict) else {"units": done}
        print(
            json.dumps({"seconds": seconds / done["units"], "values": done.get("values")}),
            file=answers,
        )


def peak_memory_mb(device: torch.device) -> float:
    """Allocated on a GPU, else resident of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def versions() -> str:
    names = (
        "torch",
        "torchvision",
        "numpy",
        "rfdetr",
        "pycocotools",
        "hotcoco",
        "pytorch-lightning",
    )
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def compare(case: Case, args: argparse.Namespace, pythons: dict[str, str]) -> set[str]:
    """Time one case and print its row; returns the versions of its sides."""
    sides = [
        Worker(pythons.get(name, sys.executable), name, settings, args)
        for name, settings in (case.first, case.second)
    ]
    try:
        rounds = [[side.ask("round") for side in sides] for _ in range(args.pairs)]
        ends = [side.ask("end") for side in sides]
    finally:
        for side in sides:
            side.close()
    seconds = [[answer["seconds"] for answer in side] for side in zip(*rounds)]
    first, second = map(statistics.median, seconds)
    ratios = [a / b for a, b in zip(*seconds)]
    asked = "-" if case.asked is None else f"<= {case.asked:g}"
    cells = [
        case.name,
        f"{case.first[0]} {shown(first)}",
        f"{case.second[0]} {shown(second)}",
        f"{first / second:.4g}",
    ]
    cells += [
        f"{min(ratios):.4g} .. {max(ratios):.4g}",
        asked,
        " / ".join(f"{end['memory_mb']:.0f}" for end in ends),
    ]
    print("| " + " | ".join(cells) + " |", flush=True)
    values = [answer["values"] for answer in rounds[-1]]
    if all(values):
        difference = max(abs(a - b) for a, b in zip(*values, strict=True))
        print(f"  {case.name}: {len(values[0])} results, largest difference {difference:.1e}")
    return {f"{name}: {end['versions']}" for (name, _), end in zip((case.first, case.second), ends)}


def shown(seconds: float) -> str:
    digits = 3 - math.ceil(math.log10(max(seconds * 1e3, 1e-9)))
    return f"{seconds * 1e3:.{max(digits, 0)}f} ms"


def run(doc: str, cases: list[Case], builders: dict[str, Builder]) -> None:
    """The command line of a benchmark: all cases in turn, or (as a worker) one side of one."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side")
    parser.add_argument("--pairs", type=int, default=9, help="rounds of each side")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: first ratios on a busy machine",
    )
    parser.add_argument(
        "--peer_python", help="the Python of an environment with rfdetr[train]==1.11.*"
    )
    parser.add_argument(
        "--cases", nargs="+", default=[""], help="only cases whose name contains one of these"
    )
    parser.add_argument("--side", choices=list(builders), help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side != "peer":
        sys.path.insert(0, str(ROOT))
    if args.side:
        serve(builders[args.side], args)
        return
    from rfdetr.device import pick_precision
    from rfdetr.runs.environment import environment

    info = environment(args.device)
    print(
        f"{info['cpu']}, device {info['device']}, {args.threads} threads, {info['os']}, "
        f"commit {info['commit']}"
    )
    print(
        f"medians of {args.pairs} alternating pairs, {args.clock} time of a unit\n| {COLUMNS} |\n|"
        + "---|" * 7,
        flush=True,
    )
    pythons = {}
    has_bf16 = pick_precision("auto", torch.device(args.device)).dtype is torch.bfloat16
    found = set()
    if "peer" in builders:
        pythons["peer"] = args.peer_python or peer_environment()
    for case in cases:
        if not any(part in case.name for part in args.cases):
            continue
        if case.first[1].get("amp") == "bf16" and not has_bf16:
            print(
                f"| {case.name} | not measured: this hardware does not compute in bf16 | | | | | |",
                flush=True,
            )
            continue
        found |= compare(case, args, pythons)
    print("\n".join(sorted(found)))


def peer_model(name: str, device: torch.device, amp: bool) -> tuple:
    """Untrained (model, criterion, post-processing, optimizer), as the package's trainer has."""
    from rfdetr import config
    from rfdetr._namespace import _namespace_from_configs
    from rfdetr.models import build_criterion_from_config, build_model_from_config
    from rfdetr.training.param_groups import get_param_dict

    # a name for the weights keeps the builder from downloading DINOv2's; nothing reads the file
    model_config = getattr(config, f"RFDETR{name}Config")(
        pretrain_weights="none.pth", device=device.type
    )
    kind = config.SegmentationTrainConfig if model_config.segmentation_head else config.TrainConfig
    settings = kind(dataset_dir=".", output_dir=".")
    model = build_model_from_config(model_config, settings).to(device)
    criterion, postprocess = build_criterion_from_config(model_config, settings)
    groups = get_param_dict(_namespace_from_configs(model_config, settings), model)
    if amp and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    fused = amp and device.type == "cuda"
    optimizer = torch.optim.AdamW(
        groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused
    )
    return model, criterion.to(device), postprocess, optimizer


def peer_train_step(settings: dict, device: torch.device) -> Callable[[], float]:
    """The package's joint training step; on a CPU its trainer always computes in fp32."""
    from rfdetr.utilities.tensors import nested_tensor_from_tensor_list

    amp = settings["amp"] == "bf16" and device.type == "cuda"
    model, criterion, _, optimizer = peer_model(settings["model"], device, amp)
    model.train()
    criterion.train()
    batch = settings["batch"]
    side = settings["side"]
    images = nested_tensor_from_tensor_list(list(torch.randn(batch, 3, side, side, device=device)))
    targets = []
    for _ in range(batch):
        boxes, masks = some_objects(settings["objects"], side)
        target = {"labels": torch.ones(len(boxes), dtype=torch.long), "boxes": boxes}
        target |= (
            {"masks": masks.bool()} if "Seg" in settings["model"] else {}
        )  # they would be matched by masks too
        targets.append({key: value.to(device) for key, value in target.items()})

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            losses = criterion(model(images, targets), targets)
        weights = criterion.weight_dict
        torch.stack(
            [losses[name] * weights[name] for name in losses if name in weights]
        ).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return batch

    return step


def some_objects(count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (n, 4) cxcywh 0..1 and the ellipses in them (n, side, side) uint8.

    A box is an eighth to a third of the image wide.
    """
    boxes = torch.cat((torch.rand(count, 2) * 0.6 + 0.2, torch.rand(count, 2) * 0.2 + 0.13), dim=1)
    x, y, w, h = boxes[..., None, None].unbind(1)
    axis = (torch.arange(side) + 0.5) / side
    return boxes, (((axis - x) / w) ** 2 + ((axis[:, None] - y) / h) ** 2 < 0.25).to(torch.uint8)


def write_coco(
    folder: Path, images: int, objects: int, width: int = 640, height: int = 480
) -> Path:
    """Splits "train" and "valid" of the same JPEGs, polygons of 24 corners; returns `folder`."""
    rng = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    table = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "thing", "supercategory": "none"}],
    }
    for split in ("train", "valid"):
        (folder / split).mkdir(parents=True)
    for image in range(images):
        coarse = Image.fromarray(rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(
            0, 6, (height, width, 1)
        )
        name = f"{image:05d}.jpg"
        for split in ("train", "valid"):
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                folder / split / name, quality=90
            )
        table["images"].append(
            {"id": image + 1, "file_name": name, "width": width, "height": height}
        )
        for _ in range(objects):
            radius = rng.uniform(20, 60) * (1 + 0.2 * rng.uniform(-1, 1, 24))
            x = (rng.uniform(0.2, 0.8) * width + radius * np.cos(angle)).clip(0, width)
            y = (rng.uniform(0.2, 0.8) * height + radius * np.sin(angle)).clip(0, height)
            box = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
            entry = {
                "id": len(table["annotations"]) + 1,
                "image_id": image + 1,
                "category_id": 1,
                "iscrowd": 0,
            }
            entry |= {
                "bbox": box,
                "area": box[2] * box[3],
                "segmentation": [np.stack((x, y), 1).ravel().tolist()],
            }
            table["annotations"].append(entry)
    for split in ("train", "valid"):
        (folder / split / "_annotations.coco.json").write_text(json.dumps(table), encoding="utf-8")
    return folder
