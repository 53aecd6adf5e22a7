"""What does each augmentation preset do to box and mask mAP?  At equal steps, on datasets of yours.

python benchmarks/augmentations.py --dataset nuclei dataset_demo --steps 450
python benchmarks/augmentations.py --dataset nuclei --presets none dihedral microscopy -- --seed 1

A row is a run of train_seg_single_stage.py from scratch: a preset, and for each dataset the valid
box and mask mAP at its end (averaged weights). The schedule is short unless --steps says otherwise:
then presets that vary much look worse than in a long training. What follows `--` goes to the
script as it is. Sets without masks are measured by train_detector_stage1.py with --boxes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from command_words import own_and_more

ROOT = Path(__file__).resolve().parents[1]


def one_run(args: argparse.Namespace, preset: str, dataset: Path) -> str:
    """Two cells of the table: box and mask mAP."""
    folder = args.output_dir / f"{dataset.name}_{preset}"
    script = "train_detector_stage1.py" if args.boxes else "train_seg_single_stage.py"
    flags = ["--dataset", dataset, "--size", args.size, "--augment", preset]
    flags += ["--epochs", 1, "--min_steps", args.steps, "--pretrain_weights", "none"]
    flags += ["--output_dir", folder, "--tensorboard", 0]
    command = [sys.executable, ROOT / script, *flags, *args.more]
    begin = time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{preset} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    print(f"{dataset.name}, {preset}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    from rfdetr.runs.metrics_file import read_metrics

    scores = read_metrics(folder)["epochs"][-1]["valid_ema"]
    return " | ".join(
        "-" if kind not in scores else f"{scores[kind]['mAP']:.3f}" for kind in ("bbox", "segm")
    )


def main() -> None:
    own, more = own_and_more()
    sys.path.insert(0, str(ROOT))
    from rfdetr.runs.environment import environment
    from rfdetr.sizes import AUGMENTS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, nargs="+", required=True)
    parser.add_argument("--presets", nargs="+", choices=AUGMENTS, default=AUGMENTS)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of each run")
    parser.add_argument("--boxes", action="store_true", help="stage 1 alone")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/augmentations"), help="one folder a run in it"
    )
    args = parser.parse_args(own, argparse.Namespace(more=more))
    info = environment()
    print(
        f"{info['cpu']}, {info['threads']} threads, torch {info['torch']}, {info['os']}, "
        f"commit {info['commit']}; {args.size}, {args.steps} steps"
    )
    columns = [f"{dataset.name} {kind}" for dataset in args.dataset for kind in ("box", "mask")]
    print(f"| preset | {' | '.join(columns)} |\n|---|" + "---|" * len(columns), flush=True)
    for preset in args.presets:
        cells = [one_run(args, preset, dataset) for dataset in args.dataset]
        print(f"| `{preset}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
