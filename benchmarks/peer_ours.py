"""This repository's two ways to masks, from scratch, on a clock; peers_at_equal_time.py runs it.

python benchmarks/peer_ours.py --way two-stage --dataset D --out DIR --minutes 10
python benchmarks/peer_ours.py --way joint --dataset D --out DIR --minutes 10

`two-stage`: train_detector_stage1.py, shrink_head.py, train_seg_stage2.py, with optimizer steps in
the proportion of quickstart.py; `joint`: train_seg_single_stage.py. Size tiny and its own recipe.
A rehearsal of a few steps, not counted, tells how many steps fit into the minutes; the schedules
end there, whatever time they turn out to take, which is told beside the scores. Averaged weights
are handed in after each epoch. Every script is a process of its own, whose imports count. Stage 2
gets the epoch of stage 1 that was best on the valid split.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from training_clock import ANNOTATIONS, cpu_seconds, peer_arguments, write_facts

ROOT = Path(__file__).resolve().parent.parent
STAGE1, STAGE2, JOINT = (
    "train_detector_stage1.py",
    "train_seg_stage2.py",
    "train_seg_single_stage.py",
)
QUICKSTART_STEPS = (3600, 1200)  # of stage 1 and stage 2, for tiny: quickstart.STEPS
BATCH = {STAGE1: 4, STAGE2: 8, JOINT: 4}  # tiny's: rfdetr/sizes.py
EPOCHS = {STAGE1: 10, STAGE2: 5, JOINT: 10}  # quickstart's on 300 images
REHEARSED = {STAGE1: 40, STAGE2: 160, JOINT: 40}  # steps of an epoch; stage 2's fill its cache


class Script:
    """One training script: a rehearsal tells its times, then it is run for as many steps as fit."""

    def __init__(self, args: argparse.Namespace, script: str, folder: Path):
        self.args = args
        self.script = script
        self.folder = folder
        content = json.loads((args.dataset / "train" / ANNOTATIONS).read_text(encoding="utf-8"))
        self.pass_steps = max(len(content["images"]) // BATCH[script], 1)
        self.start_s = 0.0  # of all that is no step
        self.step_s = 0.0

    def run(self, out: Path, spent: float, flags: list) -> dict:
        """Run it with `flags`, hand in to `out`; returns what clock.json holds."""
        args = self.args
        command = [sys.executable, str(ROOT / "benchmarks" / "clocked_script.py"), out, spent]
        command += [self.script, "--size", "tiny", "--dataset", args.dataset.resolve()]
        command += ["--output_dir", self.folder, "--resolution", args.side, "--device", "cpu"]
        command += ["--seed", args.seed, "--workers", 0, "--tensorboard", 0, *flags]
        subprocess.run([str(word) for word in command], check=True)
        return json.loads((out / "clock.json").read_text())

    def rehearse(self, out: Path, flags: list) -> None:
        """Two short epochs: the first may fill a cache, the second tells what a step takes."""
        facts = self.run(out, 0.0, [*flags, "--epochs", 2, "--min_steps", REHEARSED[self.script]])
        self.step_s = facts["epochs"][-1] / facts["steps"]
        self.start_s = facts["seconds"] - 2 * facts["epochs"][-1]

    def length(self, steps: float) -> tuple[int, int]:
        """Epochs, and steps of each, that make about `steps` steps."""
        epochs = int(min(max(steps // self.pass_steps, 1), EPOCHS[self.script]))
        return epochs, max(round(steps / epochs), self.pass_steps)


def shrink(detector: Path) -> tuple[Path, float]:
    """The detector with the dataset's classes alone, and the CPU seconds that took."""
    begin = cpu_seconds()
    shrunk = detector / "checkpoint_mydata.pth"
    command = [sys.executable, str(ROOT / "shrink_head.py")]
    command += ["--in_ckpt", str(detector / "checkpoint_best_ema.pth"), "--out_ckpt", str(shrunk)]
    subprocess.run(command, check=True)
    return shrunk, cpu_seconds() - begin


def joint(args: argparse.Namespace, folder: Path) -> None:
    flags = ["--pretrain_weights", "none"]
    rehearsal = Script(args, JOINT, folder / "rehearsal")
    rehearsal.rehearse(folder / "rehearsed", flags)
    steps = (args.minutes * 60 - rehearsal.start_s) / rehearsal.step_s
    epochs, per_epoch = rehearsal.length(steps)
    length = ["--epochs", epochs, "--min_steps", per_epoch]
    facts = Script(args, JOINT, folder / "run").run(args.out, 0.0, flags + length)
    taken = f"{epochs} epochs of {per_epoch} steps, {BATCH[JOINT]} images each"
    images = epochs * per_epoch * BATCH[JOINT]
    write_facts(args.out, facts["parameters"], images, taken)


def two_stage(args: argparse.Namespace, folder: Path) -> None:
    scratch = ["--pretrain_weights", "none"]
    first = Script(args, STAGE1, folder / "detector_rehearsal")
    first.rehearse(folder / "rehearsed1", scratch)
    shrunk, shrink_s = shrink(first.folder)
    second = Script(args, STAGE2, folder / "masks_rehearsal")
    second.rehearse(folder / "rehearsed2", ["--checkpoint", shrunk])
    steps1, steps2 = QUICKSTART_STEPS
    for_steps = args.minutes * 60 - first.start_s - shrink_s - second.start_s
    factor = for_steps / (steps1 * first.step_s + steps2 * second.step_s)
    epochs1, per_epoch1 = first.length(factor * steps1)

    length = ["--epochs", epochs1, "--min_steps", per_epoch1]
    detector = Script(args, STAGE1, folder / "detector")
    spent = detector.run(args.out, 0.0, scratch + length)["seconds"]
    shrunk, shrink_s = shrink(detector.folder)
    epochs2, per_epoch2 = second.length(factor * steps2)
    length = ["--epochs", epochs2, "--min_steps", per_epoch2, "--checkpoint", shrunk]
    masks = Script(args, STAGE2, folder / "masks")
    facts = masks.run(args.out, spent + shrink_s, length)
    taken = (
        f"stage 1: {epochs1} epochs of {per_epoch1} steps, {BATCH[STAGE1]} images each; "
        f"stage 2: {epochs2} of {per_epoch2}, {BATCH[STAGE2]} each"
    )
    images = epochs1 * per_epoch1 * BATCH[STAGE1] + epochs2 * per_epoch2 * BATCH[STAGE2]
    write_facts(args.out, facts["parameters"], images, taken)


def main() -> None:
    parser = peer_arguments(__doc__)
    parser.add_argument("--way", choices=["two-stage", "joint"], required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.way == "joint":
            joint(args, Path(folder))
        else:
            two_stage(args, Path(folder))


if __name__ == "__main__":
    main()
