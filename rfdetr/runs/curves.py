"""What TensorBoard calls a run's figures: the same names in every stage, in the order of reading.

A tag is "GROUP/NAME", and TensorBoard sorts both. Groups "... by step" are drawn over optimizer
steps, all others over epochs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from rfdetr.text import printable

SCORES = "1 scores"
LOSSES = "2 losses"
PICTURES = "3 pictures"
RATES = "4 learning rate"
TRAINING = "5 training"
LAYERS = "6 losses by layer"
MORE_SCORES = "7 more scores"
CLASSES = "8 scores by class"
BY_STEP = " by step"

MAIN_SCORES = ("mAP", "mAP50")
MAIN_LOSSES = ("loss", "loss_class", "loss_box", "loss_giou", "loss_mask", "loss_dice")
POINTS = 50  # of a curve by step, in an epoch


def is_by_step(tag: str) -> bool:
    """Whether a tag's numbers are counted by optimizer steps, not by epochs."""
    return tag.partition("/")[0].endswith(BY_STEP)


def train_curves(means: dict[str, float | None]) -> dict[str, float]:
    """An epoch's "train" in metrics.json, by tag; None is left out."""
    curves = {}
    for name, value in means.items():
        if value is None:
            continue
        group = TRAINING
        if name in MAIN_LOSSES:
            group = LOSSES
        elif name.startswith("loss"):
            group = LAYERS
        elif name == "lr":
            group = RATES
        curves[f"{group}/{name}"] = value
    return curves


def score_curves(scores: dict, of: str = "") -> dict[str, float]:
    """An epoch's "valid" in metrics.json, by tag; None is left out.

    of: what tells these scores from those of the regular weights on valid, "ema" for example.
    """
    ending = f" ({of})" if of else ""
    curves = {}
    for kind, figures in scores.items():
        for class_name, of_class in figures.get("per_class", {}).items():
            for name, value in of_class.items():
                curves[f"{CLASSES}/{kind} {name} {printable(class_name)}{ending}"] = value
        for name, value in figures.items():
            if name != "per_class":
                group = SCORES if name in MAIN_SCORES else MORE_SCORES
                curves[f"{group}/{kind} {name}{ending}"] = value
    return {tag: value for tag, value in curves.items() if value is not None}


def best_score(metric: str) -> str:
    """The tag of the highest score so far; metric: "bbox/mAP" or "segm/mAP"."""
    return f"{SCORES}/{metric.replace('/', ' ')} (best)"


# The tags that the HParams tab shows. It takes them from one run: the others need the same.
FINAL_SCORES = [best_score("segm/mAP"), best_score("bbox/mAP")]
FINAL_SCORES += [f"{SCORES}/{kind} {name}" for kind in ("segm", "bbox") for name in MAIN_SCORES]


class StepCurves:
    """Losses, the gradient norm and learning rates by optimizer step, POINTS an epoch.

    Each point is the mean of the steps since the last one. write: takes the numbers by tag, and
    the step. steps: in an epoch.
    """

    def __init__(self, write: Callable[[dict[str, float], int], None], steps: int):
        self.write = write
        self.steps_a_point = max(steps // POINTS, 1)
        self.sums: dict[str, float] = {}
        self.counts: Counter[str] = Counter()  # a step may have no gradient norm

    def add(self, step: int, losses: dict[str, float], rates: list[float]) -> None:
        """Count a step; losses: what engine.optimise returns. rates: of all groups."""
        if math.isfinite(losses["loss"]):  # else the step was skipped
            for name, value in losses.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] += 1
        if step % self.steps_a_point or not self.sums:
            return
        curves = {f"{RATES}{BY_STEP}/highest": max(rates), f"{RATES}{BY_STEP}/lowest": min(rates)}
        for name, total in self.sums.items():
            if name in MAIN_LOSSES:
                curves[f"{LOSSES}{BY_STEP}/{name}"] = total / self.counts[name]
            elif name == "grad_norm":
                curves[f"{TRAINING}{BY_STEP}/{name}"] = total / self.counts[name]
        self.sums = {}
        self.counts.clear()
        self.write(curves, step)
