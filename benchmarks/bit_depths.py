"""Do 12 and 16 bits a pixel score as 8 do?  One dataset in three depths, trained alike.

python benchmarks/bit_depths.py --dataset nuclei --epochs 3

Copies of the dataset as gray TIFFs of 8, 12 and 16 bits, with the same annotations; stage 1 on each
with the same seed, and the valid box mAP at its end (averaged weights). Then the checkpoints of 8
and of 12 bits are given an image of the other depth, to show what they say. What follows `--` goes
to the training script as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from command_words import own_and_more
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ANNOTATIONS = "_annotations.coco.json"
BITS = (8, 12, 16)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def make_copy(source: Path, target: Path, bits: int) -> None:
    """Write one split as gray of so many bits."""
    data = json.loads((source / ANNOTATIONS).read_text(encoding="utf-8"))
    target.mkdir(parents=True)
    for image in data["images"]:
        with Image.open(source / image["file_name"]) as opened:
            rgb = np.asarray(opened.convert("RGB"), dtype=np.float64)
        gray = np.round(rgb @ LUMA * ((2**bits - 1) / 255))
        image["file_name"] = f"{image['id']}.tif"
        pixels = gray.astype(np.uint8 if bits == 8 else np.uint16)
        Image.fromarray(pixels).save(target / image["file_name"])
    (target / ANNOTATIONS).write_text(json.dumps(data), encoding="utf-8")


def run(script: str, *words: object) -> str:
    """What a script prints."""
    command = [sys.executable, str(ROOT / script), *(str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return done.stdout


def warnings_of(folder: Path, trained: int, given: int) -> list[str]:
    """What a checkpoint of one depth says when it is given an image of another."""
    image = min((folder / f"{given}/valid").glob("*.tif"))
    words = ["--checkpoint", folder / f"run_{trained}", "--input", image]
    printed = run("predict.py", *words, "--output", folder / f"found_{trained}_{given}")
    return [line for line in printed.splitlines() if line.startswith("warning:")]


def main() -> None:
    own, more = own_and_more()
    sys.path.insert(0, str(ROOT))
    from rfdetr.runs.environment import environment
    from rfdetr.runs.metrics_file import read_metrics

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bit_depths"))
    args = parser.parse_args(own)
    info = environment()
    print(
        f"{info['cpu']}, {info['threads']} threads, torch {info['torch']}, commit {info['commit']}"
    )
    print("| bits | box mAP | seconds |\n|---|---|---|", flush=True)
    scores = []
    for bits in BITS:
        dataset = args.output_dir / str(bits)
        for split in ("train", "valid"):
            make_copy(args.dataset / split, dataset / split, bits)
        folder = args.output_dir / f"run_{bits}"
        begin = time.perf_counter()
        flags = ["--size", args.size, "--pretrain_weights", "none", "--epochs", args.epochs]
        flags += ["--dataset", dataset, "--output_dir", folder, "--tensorboard", 0, *more]
        run("train_detector_stage1.py", *flags)
        seconds = time.perf_counter() - begin
        scores.append(read_metrics(folder)["epochs"][-1]["valid_ema"]["bbox"]["mAP"])
        print(f"| {bits} | {scores[-1]:.4f} | {seconds:.0f} |", flush=True)
    print(f"Largest difference to 8 bits: {max(abs(score - scores[0]) for score in scores):.4f}")
    for trained, given in ((8, 12), (12, 8)):
        said = "\n".join(warnings_of(args.output_dir, trained, given)) or "nothing is said"
        print(f"\nTrained on {trained} bits, given {given}: {said}")


if __name__ == "__main__":
    main()
