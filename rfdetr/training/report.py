"""What a run says and notes of itself: its banner, an epoch's scores, its place in metrics.json and
TensorBoard.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from rfdetr import distributed
from rfdetr.console import UserError, banner, say, tick, warn
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.records import ImageRecord
from rfdetr.data.statistics import shrink_problems, without_scores, words_on_trained
from rfdetr.files import atomic_write, write_json
from rfdetr.inference.class_sheet import class_sheet
from rfdetr.inference.evaluation import SplitEvaluator
from rfdetr.metrics.table import format_table
from rfdetr.progress import in_hours
from rfdetr.resolve import plain, yaml_text
from rfdetr.runs.curves import PICTURES as PICTURE_TAGS
from rfdetr.runs.curves import best_score, score_curves, train_curves
from rfdetr.runs.metrics_file import earlier_commands
from rfdetr.runs.places import CONFIG
from rfdetr.runs.record import Run
from rfdetr.settings import DetectorTraining, SegmentationSettings, TrainingSettings
from rfdetr.text import command_line, counted
from rfdetr.training.engine import Progress
from rfdetr.training.resume import changed_settings
from rfdetr.training.session import Session

GUESSED_IMAGES = 48  # training images that are drawn with their guessed masks
STAGE2_CONFIG = "stage2_config.json"
MANY_TIMES = 100  # that an image is seen; 27 times are better with mild augmentation
PICTURES = 4  # images of valid, always the same
PICTURE_TIMES = 10  # as many pictures as TensorBoard shows of a tag


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
    for words in (words_on_repetition(session), words_on_variety(session)):
        if words:
            tick(words)
    if not session.tiling:
        for problem in shrink_problems(
            session.train,
            session.resolution,
            session.size.block,
            session.letterbox,
            is_frozen=isinstance(settings, SegmentationSettings),
        ):
            warn(problem.message)
    valid = session.splits["valid"]
    if session.trained_on is not None:
        # what train and valid share is told with the dataset
        of_start = set(session.trained_on.tolist()) - set(session.train.content_hashes)
        told = words_on_trained(valid, "valid", of_start)
        if told:
            warn(told)
    unscored = without_scores(session.splits)
    if unscored:
        warn(unscored)
    elif settings.metric.startswith("segm") and valid.mask_count == 0:
        warn(
            "the valid split has no masks: there are no mask scores, best.pt holds the last "
            "epoch's weights, and nothing stops the run early. Draw the masks of a few valid images"
        )


def words_on_repetition(session: Session) -> str | None:
    """Why an epoch goes through a small dataset more than once; None where it does not."""
    settings = session.settings
    images = session.images_an_epoch
    progress = session.progress
    steps = progress.steps
    to_come = (settings.epochs - progress.epoch) * steps - progress.step_in_epoch
    drawn = steps * settings.effective_batch * distributed.world_size()
    if drawn <= images or settings.fast_dev_run:
        return None
    noun = "tiles" if session.tiling else "images"
    return (
        f"A small dataset: {images} {noun} are drawn {drawn / images:.1f} times an epoch, so that "
        f"it has {steps} optimizer steps ({progress.step + to_come:,} in all; --min_steps)"
    )


def words_on_variety(session: Session) -> str | None:
    """What shows a few images in more ways, where the usual ones are seen so often that they are
    learnt by heart; None where not.
    """
    settings = session.settings
    if settings.augment != "dihedral" or not isinstance(settings, DetectorTraining):
        return None
    drawn = settings.epochs * session.progress.steps * settings.effective_batch
    times = drawn * distributed.world_size() / session.images_an_epoch
    if times < MANY_TIMES or settings.fast_dev_run:
        return None
    return (
        f"Each image is seen {times:.0f} times in all. --augment microscopy shows it in more ways: "
        "on 30 images of nuclei that gave box mAP .442 for .381 (docs/training.md)"
    )


def commands_of(session: Session, command: str, folder: Path) -> list[dict]:
    """metrics.json's "commands": those before, and this one with what it changes."""
    earlier = []
    changed = {}
    if session.resumed:
        earlier = earlier_commands(folder)
        changed = changed_settings(session.settings, session.resumed["args"])
    own = {
        "command": command,
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "first_epoch": session.progress.epoch + 1,
        "changed": changed,
    }
    return [*earlier, own]


def note_begun(session: Session) -> None:
    """Let config.yaml and metrics.json be this command's.

    A resumed run has not begun before it has something to save: one that fails until then leaves
    the settings that its checkpoints have.
    """
    run = session.run
    if run is None or not run.waits:
        return
    run.begin()
    write_config(run, session.settings)
    if session.stage2_config:
        write_stage2_config(session)


def write_stage2_config(session: Session) -> None:
    file = session.folder / STAGE2_CONFIG
    with session.run.optional(f"writing {file}"):
        write_json(file, session.stage2_config)


def detector_of_config(folder: Path) -> dict[str, str | None]:
    """A stage 2 run's detector file and its sha256, which may be gone since the run began; None
    where stage2_config.json does not tell.
    """
    names = ("detector_file", "detector_sha256")
    try:
        config = json.loads((folder / STAGE2_CONFIG).read_text(encoding="utf-8"))
        return {name: config.get(name) for name in names}
    except (OSError, ValueError, AttributeError):  # AttributeError: no JSON object
        return dict.fromkeys(names)


def write_config(run: Run, settings: TrainingSettings) -> None:
    file = run.folder / CONFIG
    with run.optional(f"writing {file}"):
        text = yaml_text(settings, run.metrics["commands"]).encode()
        atomic_write(file, lambda opened: opened.write(text))


class RunClock:
    """How long a run takes, since it began or was resumed; clock: seconds."""

    def __init__(
        self, progress: Progress, epochs: int, clock: Callable[[], float] = time.monotonic
    ):
        self.progress = progress
        self.epochs = epochs
        self.clock = clock
        self.begin = clock()
        self.first_step = progress.position

    def words(self) -> str:
        """The time that has passed, and what is left where the epochs to come take as long."""
        seconds = self.clock() - self.begin
        position = self.progress.position
        done = position - self.first_step
        if not done:  # resumed where an epoch had only its scores to come
            return f"{in_hours(seconds)} elapsed"
        left = max(self.epochs * self.progress.steps - position, 0)
        return f"{in_hours(seconds)} elapsed, {in_hours(seconds / done * left)} left"


def print_epoch(
    record: dict, clock: RunClock, scores: dict | None, best_weights: str | None
) -> None:
    """A line on an epoch and the table of its scores, if there are any; best_weights: "regular" or
    "ema" where they are the best so far.
    """
    train = record["train"]
    line = f"\nepoch {record['epoch']}/{clock.epochs}  loss {train.get('loss', math.nan):.3f}"
    if train["images_per_s"] is not None:
        line += f"  {train['images_per_s']:.1f} images/s"
    line += f"  {clock.words()}"
    if best_weights:
        line += f"  new best ({best_weights} weights)"
    say(line)
    if scores:
        say(format_table(scores))


def stopped_early(session: Session, evaluations: int) -> str:
    """What to say of a run after so many evaluations without gain, and how it goes on."""
    words = ["--resume", session.folder, "--patience", 2 * evaluations]
    more = command_line("python", session.settings.script, *words)
    without = f"{counted(evaluations, 'evaluation')} without gain"
    return f"Stopped early: {without}. To train on: {more}"


def describe_run(run: Run, settings: TrainingSettings, header: dict) -> None:
    """The settings, and where and how the run was made, for TensorBoard.

    header: what metrics.json begins with.
    """
    facts = "\n".join(f"{name}: {value}" for name, value in header["environment"].items())
    texts = {"config.yaml": yaml_text(settings, header["commands"]), "environment": facts}
    run.describe(plain(settings), texts)


def record_epoch(run: Run, record: dict, best: dict | None) -> None:
    """An epoch's record into metrics.json and, whatever happens there, TensorBoard."""
    run.add_epoch(record)
    run.set(best=best)
    curves = train_curves(record["train"])
    curves |= score_curves(record.get("valid", {}))
    curves |= score_curves(record.get("valid_ema", {}), "ema")
    if best and best["value"] is not None:
        curves[best_score(best["metric"])] = best["value"]
    run.scalars(curves, record["epoch"])


def record_test(run: Run, scores: dict, epoch: int) -> None:
    """The test split's scores, made after `epoch` epochs, into metrics.json and TensorBoard."""
    run.set(test=scores)
    run.scalars(score_curves(scores, "test"), epoch)


def is_picture_due(settings: TrainingSettings, epoch: int) -> bool:
    """Whether TensorBoard gets pictures of an epoch even if it is no better: of a few in a run."""
    return settings.tensorboard and epoch % math.ceil(settings.epochs / PICTURE_TIMES) == 0


def draw_guesses(run: Run, dataset: SplitDataset) -> None:
    """Draw objects with the masks that were guessed for them, to be looked at before they are
    trusted; images that cannot be read are left out, what else fails is a warning.
    """
    file = run.folder / "guessed_masks.png"
    split = dataset.split
    with run.optional(f"drawing {file}"):
        guessed = np.unique(split.places[~split.images.has_mask])  # images
        numbers = np.linspace(0, len(guessed) - 1, GUESSED_IMAGES).astype(int)
        images = []
        for number in guessed[np.unique(numbers)].tolist():
            with contextlib.suppress(UserError):
                masks = dataset.segmentations(number)
                images.append(with_guesses_alone(split.images[number], masks))
        of_how_many = ""
        if len(images) < len(guessed):
            noun = "tile" if dataset.tiling else "image"
            of_how_many = f" in {len(images)} of {counted(len(guessed), noun)}"
        class_sheet(replace(split, images=images), f"{of_how_many} (masks guessed)").save(file)
        tick(f"Guessed masks to look at{of_how_many}: {file}")


def with_guesses_alone(image: ImageRecord, masks: list[list | dict | None]) -> ImageRecord:
    """An image with those of its objects that have no drawn mask; masks: of all its objects."""
    indices = [i for i, drawn in enumerate(image.segmentations) if drawn is None]
    return replace(
        image,
        boxes=image.boxes[indices],
        labels=image.labels[indices],
        segmentations=[masks[i] for i in indices],
    )


def draw_pictures(
    run: Run, evaluator: SplitEvaluator, model: nn.Module, epoch: int, best: bool
) -> None:
    """Draw valid images beside what the model finds, for TensorBoard and, of the best epoch, into
    predictions/; what fails is a warning.
    """
    folder = run.folder / "predictions"
    with run.optional(f"drawing pictures into {folder}"):
        for name, picture in evaluator.pictures(model, PICTURES):
            if best:
                folder.mkdir(exist_ok=True)
                picture.save(folder / f"valid_{name}.png", compress_level=1)
            run.image(f"{PICTURE_TAGS}/{name}", picture, epoch)
