"""Masks from scratch at equal time: this repository's two ways beside three peers.

python benchmarks/peers_at_equal_time.py --dataset D --minutes 10 --seeds 0 1 2
    --peers two-stage joint segnano maskrcnn yolo --python yolo=/opt/yolo/bin/python

two-stage   stage 1, shrink, stage 2: size tiny, the steps in quickstart.py's proportion
joint       train_seg_single_stage.py, size tiny
segnano     PyPI's rfdetr 1.11 SegNano in its own training loop
maskrcnn    torchvision's Mask R-CNN, ResNet-18 and FPN
yolo        Ultralytics' YOLO11n-seg; `pip install ultralytics pycocotools` into an environment of
            its own, named by --python (segnano's is made where it is not named)

Each starts from random weights and gets its own recipe, written at the top of its script, and the
same `--side` of the input, rounded to what it takes. Time is the CPU time of the training process
with one thread, its imports included; what it finds in the valid split is computed off the clock,
a few times on the way, and scored here by one pycocotools. The last weights count (averaged ones
where the recipe has them), not the best. What has been run lies in --output_dir and is not run
again: seeds and peers may be added. Nothing else should keep the machine busy: CPU seconds grow,
too, where two processes share a core's caches.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from peer import ROOT, peer_environment
from PIL import Image, ImageDraw, ImageFont
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from training_clock import ANNOTATIONS, FACTS, POINTS

PEERS = {
    "two-stage": ["peer_ours.py", "--way", "two-stage"],
    "joint": ["peer_ours.py", "--way", "joint"],
    "segnano": ["peer_segnano.py"],
    "maskrcnn": ["peer_maskrcnn.py"],
    "yolo": ["peer_yolo.py"],
}
NAMES = {
    "two-stage": "two-stage (ours)",
    "joint": "joint (ours)",
    "segnano": "SegNano",
    "maskrcnn": "Mask R-CNN R18",
    "yolo": "YOLO11n-seg",
}
COLOURS = {
    "two-stage": "#d1495b",
    "joint": "#edae49",
    "segnano": "#66717e",
    "maskrcnn": "#00798c",
    "yolo": "#6a4c93",
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MKL_NUM_THREADS": "1"}
SCORES = "scores.json"
FIGURES = ("segm mAP", "segm mAP50", "bbox mAP", "bbox mAP50")
COLUMNS = ("from scratch", "parameters", "seeds", "mask mAP", "mask mAP50", "box mAP")
COLUMNS += ("CPU min", "images trained on", "what was taken")


def python_of(peer: str, given: dict[str, str]) -> str:
    if peer in given:
        return given[peer]
    if peer == "segnano":
        return peer_environment()
    if peer == "yolo":
        raise SystemExit(
            "yolo needs an environment of its own: python -m venv yolo_env, "
            "yolo_env/bin/pip install ultralytics pycocotools, "
            "then --python yolo=yolo_env/bin/python"
        )
    return sys.executable


def train(args: argparse.Namespace, peer: str, seed: int, folder: Path) -> None:
    """Run a peer, unless it has been run."""
    if (folder / FACTS).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / POINTS).unlink(missing_ok=True)
    script, *own = PEERS[peer]
    command = [python_of(peer, args.python), str(ROOT / "benchmarks" / script), *own]
    command += ["--dataset", str(args.dataset), "--out", str(folder), "--seed", str(seed)]
    command += ["--minutes", str(args.minutes), "--side", str(args.side)]
    log = folder / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD
        )
    if done.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")


def score(dataset: Path, folder: Path) -> list[dict]:
    """[{"minutes", "segm mAP", ...}] of a run's points, as pycocotools scores them.

    A point without masks has masks of mAP 0.
    """
    cache = folder / SCORES
    if cache.exists():
        return json.loads(cache.read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(dataset / "valid" / ANNOTATIONS))
    curve = []
    for point in json.loads((folder / POINTS).read_text()):
        figures = dict.fromkeys(FIGURES, 0.0) | {"minutes": point["seconds"] / 60}
        for kind in ("bbox", "segm"):
            results = json.loads((folder / point[kind]).read_text()) if point[kind] else []
            if not results:
                continue
            with contextlib.redirect_stdout(io.StringIO()):
                judge = COCOeval(truth, truth.loadRes(results), kind)
                judge.evaluate()
                judge.accumulate()
                judge.summarize()
            figures[f"{kind} mAP"], figures[f"{kind} mAP50"] = judge.stats[:2].tolist()
        curve.append(figures)
    cache.write_text(json.dumps(curve))
    return curve


def row(peer: str, curves: list[list[dict]], facts: dict) -> str:
    """A line of the table: the medians of the seeds' last points, and their range."""
    ends = [curve[-1] for curve in curves]
    cells = [NAMES[peer], f"{facts['parameters'] / 1e6:.1f} M", str(len(curves))]
    for figure in FIGURES[:3]:
        values = [end[figure] for end in ends]
        text = f"{statistics.median(values):.3f}"
        if len(values) > 1:
            text += f" ({min(values):.3f} .. {max(values):.3f})"
        cells.append(text)
    cells.append(f"{statistics.median(end['minutes'] for end in ends):.1f}")
    cells += [f"{facts['images']:,}", facts["taken"]]
    return f"| {' | '.join(cells)} |"


def highest(curves: dict[str, list[list[dict]]], name: str) -> float:
    """Of a figure in all curves."""
    return max(point[name] for of_peer in curves.values() for c in of_peer for point in c)


def draw(curves: dict[str, list[list[dict]]], minutes: float, file: Path) -> None:
    """Mask and box mAP over CPU minutes, a line a seed."""
    width, height, left, top = 430, 300, 44, 34
    picture = Image.new("RGB", (2 * width, height + 76), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    most = max(
        end[name] for of in curves.values() for c in of for end in c for name in FIGURES[::2]
    )
    most = max(most * 1.08, 0.1)
    longest = max(minutes, *(curve[-1]["minutes"] for of in curves.values() for curve in of))
    for panel, (figure, title) in enumerate((("segm mAP", "mask mAP"), ("bbox mAP", "box mAP"))):
        x0 = panel * width + left
        x1 = (panel + 1) * width - 14
        pen.text((x0, 8), f"{title} over CPU minutes of training", "black", font)
        for tick in range(int(most * 10) + 1):
            y = height - tick / 10 / most * (height - top)
            pen.line((x0, y, x1, y), "#dddddd")
            pen.text((x0 - 6, y), f".{tick}", "black", font, anchor="rm")
        for tick in range(0, int(longest) + 1, max(round(longest / 8), 1)):
            x = x0 + tick / longest * (x1 - x0)
            pen.text((x, height + 4), str(tick), "black", font, anchor="ma")
        for peer, of_peer in curves.items():
            for curve in of_peer:
                ends = [(0.0, 0.0)] + [(end["minutes"], end[figure]) for end in curve]
                dots = []
                for minute, value in ends:
                    x = x0 + minute / longest * (x1 - x0)
                    dots.append((x, height - value / most * (height - top)))
                pen.line(dots, COLOURS[peer], 2)
                for x, y in dots[1:]:
                    pen.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), COLOURS[peer])
    x = left
    for peer in curves:
        pen.rectangle((x, height + 40, x + 12, height + 52), COLOURS[peer])
        pen.text((x + 18, height + 46), NAMES[peer], "black", font, anchor="lm")
        x += 40 + int(pen.textlength(NAMES[peer], font))
    picture.save(file, quality=85)


def pair(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if name not in PEERS or not path:
        raise argparse.ArgumentTypeError(f"{text}: PEER=PYTHON, PEER of {', '.join(PEERS)}")
    return name, path


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--dataset", type=Path, required=True, help=f"train/ and valid/, {ANNOTATIONS} in each")
    add("--minutes", type=float, default=10, help="CPU minutes of each training")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    add("--python", type=pair, nargs="+", default=[], metavar="PEER=PYTHON")
    add("--side", type=int, default=160, help="side of the model's input in pixels")
    add("--output_dir", type=Path, default=Path("runs/peers_at_equal_time"))
    add("--picture", type=Path, help="draw the curves into this file")
    return made


def main() -> None:
    args = parser().parse_args()
    args.python = dict(args.python)
    curves: dict[str, list[list[dict]]] = {peer: [] for peer in args.peers}
    for seed in args.seeds:
        for peer in args.peers:
            folder = args.output_dir / f"{peer}_{seed}"
            train(args, peer, seed, folder)
            curves[peer].append(score(args.dataset, folder))
            end = curves[peer][-1][-1]
            print(f"{peer}, seed {seed}: mask mAP {end['segm mAP']:.3f}", flush=True)
    sys.path.insert(0, str(ROOT))
    from rfdetr.runs.environment import environment

    info = environment()
    print(
        f"\nEqual CPU minutes on one thread: {args.minutes:g}, {args.dataset.name}, "
        f"{args.side} px, {info['cpu']}, torch {info['torch']}, commit {info['commit']}\n"
    )
    print(
        "| from scratch | parameters | seeds | mask mAP | mask mAP50 | box mAP | CPU min |", end=""
    )
    print(" images trained on | what was taken |\n|" + "---|" * 9)
    for peer in args.peers:
        facts = json.loads((args.output_dir / f"{peer}_{args.seeds[0]}" / FACTS).read_text())
        print(row(peer, curves[peer], facts))
    if args.picture:
        draw(curves, args.minutes, args.picture)


if __name__ == "__main__":
    main()
