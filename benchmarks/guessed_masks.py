"""What are masks worth that are guessed from boxes?  Stage 2 with and without the drawn ones.

python benchmarks/guessed_masks.py --dataset DIR --checkpoint RUN/checkpoint_mydata.pth
    --seeds 0 1 2

The masks of train are taken out of copies of the dataset: of all images ("boxes"), of all but ten
("ten drawn"), of all with each side of each box moved by a normal error of 7 % of the box
("loose boxes"). Each is trained on the same frozen detector for the same steps and scored with the
drawn masks of valid. The share is that of the row "drawn" with the same seed.
"""

# ruff: noqa: E402 (the repository is put on the path first)
from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from command_words import own_and_more

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from rfdetr.runs.environment import environment
from rfdetr.runs.metrics_file import best_scores

TEN = 10  # images whose masks stay
LOOSE = 0.07  # of a box's side
ANNOTATIONS = "_annotations.coco.json"


def strip_masks(dataset: Path, folder: Path, keep: int = 0, loose: float = 0.0) -> Path:
    """A copy of a dataset whose training masks are gone but for `keep` images spread over it."""
    if folder.exists():
        return folder
    shutil.copytree(dataset, folder)
    file = folder / "train" / ANNOTATIONS
    content = json.loads(file.read_text(encoding="utf-8"))
    ids = [image["id"] for image in content["images"]]
    kept = {ids[i] for i in np.linspace(0, len(ids) - 1, keep).astype(int)}
    rng = np.random.default_rng(0)
    for annotation in content["annotations"]:
        if annotation["image_id"] in kept:
            continue
        annotation["segmentation"] = []
        x, y, width, height = annotation["bbox"]
        left, top, right, bottom = rng.normal(0, loose, 4) * [width, height, width, height]
        if loose:
            width = max(width + right - left, 1)
            height = max(height + bottom - top, 1)
            annotation["bbox"] = [x + left, y + top, width, height]
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def scores(args: argparse.Namespace, name: str, dataset: Path, seed: int) -> dict:
    """The best mask figures of a run of stage 2."""
    folder = args.output_dir / f"{name.replace(' ', '_')}_{seed}"
    command = [sys.executable, str(ROOT / "train_seg_stage2.py"), "--size", args.size]
    command += ["--dataset", str(dataset), "--checkpoint", str(args.checkpoint)]
    command += ["--epochs", str(args.epochs), "--seed", str(seed), "--masks", "boxes"]
    command += ["--output_dir", str(folder), "--tensorboard", "0"]
    done = subprocess.run(command + args.more, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return best_scores(folder)[1]["segm"]


def main() -> None:
    own, more = own_and_more()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a detector, shrunk to it")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/guessed_masks"))
    args = parser.parse_args(own, argparse.Namespace(more=more))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    copies = {
        "drawn": args.dataset,
        "boxes": strip_masks(args.dataset, args.output_dir / "data_boxes"),
        "ten drawn": strip_masks(args.dataset, args.output_dir / "data_ten", keep=TEN),
        "loose boxes": strip_masks(args.dataset, args.output_dir / "data_loose", loose=LOOSE),
    }
    info = environment()
    print(f"{info['cpu']}, {info['threads']} threads, torch {info['torch']}, {info['commit']}")
    print("| train masks | mask mAP of each seed | mAP50 | share of mAP |\n|---|---|---|---|")
    drawn = []
    for name, dataset in copies.items():
        found = [scores(args, name, dataset, seed) for seed in args.seeds]
        drawn = drawn or found
        shares = [one["mAP"] / true["mAP"] for one, true in zip(found, drawn)]
        each = " ".join(f"{one['mAP']:.3f}" for one in found)
        map50 = " ".join(f"{one['mAP50']:.3f}" for one in found)
        print(f"| {name} | {each} | {map50} | {statistics.median(shares):.3f} |", flush=True)


if __name__ == "__main__":
    main()
