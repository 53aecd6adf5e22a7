"""What a run says and notes of itself: its banner, an epoch's scores, its place in metrics.json and
TensorBoard.
"""

from __future__ import annotations

import math

from torch import nn

from rfdetr.console import banner, say, warn
from rfdetr.data.statistics import shrink_problems
from rfdetr.inference.evaluation import SplitEvaluator
from rfdetr.metrics.coco_eval import format_table
from rfdetr.runs.record import Run
from rfdetr.training.keeper import CheckpointKeeper
from rfdetr.training.session import Session

PICTURES = 4  # images of valid, drawn after an epoch


def print_banner(session: Session, model: nn.Module, device: str) -> None:
    settings = session.settings
    counts = ", ".join(f"{len(split.images)} {name}" for name, split in session.splits.items())
    names = ", ".join(session.train.class_names)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    micro_batch = session.progress.micro_batch
    accumulated = math.ceil(settings.effective_batch / micro_batch)
    banner(
        settings.title,
        {
            "Model Size": f"{settings.size} ({parameters:,} parameters)",
            "Resolution": session.resolution,
            "Epochs": settings.epochs,
            "Batch": f"{micro_batch} x {accumulated} accumulated",
            "Device": f"{device}, {session.precision.name}",
            "Dataset": f"{settings.dataset} ({counts} images; {names})",
            "Output": session.run.folder,
        },
    )
    for problem in shrink_problems(session.train, session.resolution, session.size.block):
        warn(problem.message)
    if not session.splits["valid"].images:
        warn(
            "the valid split is empty: there are no scores, "
            "and best.pt holds the last epoch's weights"
        )


def print_scores(
    record: dict, scores: dict[str, dict], keeper: CheckpointKeeper, gained: bool, epochs: int
) -> None:
    """The table of an epoch's better weights."""
    weights = keeper.best["weights"] if gained else keeper.better_weights(scores)
    train = record["train"]
    line = f"\nepoch {record['epoch']}/{epochs}  loss {train.get('loss', math.nan):.3f}"
    line += f"  {train['images_per_s']:.1f} images/s"
    if gained:
        line += f"  new best ({weights} weights)"
    say(line)
    say(format_table(scores[weights]))


def record_epoch(run: Run, record: dict, best: dict | None) -> None:
    """An epoch's record into metrics.json and, whatever happens there, TensorBoard."""
    run.add_epoch(record)
    run.set(best=best)
    for name in ("train", "valid", "valid_ema"):
        with run.optional(f"writing curves to {run.folder / 'tb'}"):
            run.scalars(name, record.get(name, {}), record["epoch"])


def draw_pictures(run: Run, evaluator: SplitEvaluator, model: nn.Module, epoch: int) -> None:
    """Draw valid images beside what the model finds, into predictions/ and TensorBoard; what fails
    is a warning.
    """
    folder = run.folder / "predictions"
    with run.optional(f"drawing pictures into {folder}"):
        folder.mkdir(exist_ok=True)
        for name, picture in evaluator.pictures(model, PICTURES):
            picture.save(folder / f"valid_{name}.png", compress_level=1)
            run.image(f"valid/{name}", picture, epoch)
