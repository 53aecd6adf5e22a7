"""The way of a run, for all three training scripts: begin, open the run, fit, finish."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from rfdetr import distributed
from rfdetr.classes import ClassTable
from rfdetr.commands import steadier
from rfdetr.console import say, tick
from rfdetr.data.statistics import typical_side
from rfdetr.data.workers import naming_workers
from rfdetr.device import pick_device, pick_precision
from rfdetr.inference.evaluation import SplitEvaluator
from rfdetr.metrics.table import format_table
from rfdetr.resolve import plain
from rfdetr.runs.curves import StepCurves
from rfdetr.runs.environment import environment
from rfdetr.runs.folder import check_free_disk
from rfdetr.runs.record import Run
from rfdetr.settings import TILE_OVERLAP, TrainingSettings
from rfdetr.sizes import size_from_dict
from rfdetr.text import command_line
from rfdetr.training.engine import Progress, Trainer, train_one_epoch
from rfdetr.training.health import RunHealth
from rfdetr.training.keeper import CheckpointKeeper
from rfdetr.training.next_commands import after_trial
from rfdetr.training.report import (
    RunClock,
    commands_of,
    describe_run,
    draw_pictures,
    is_picture_due,
    note_begun,
    print_banner,
    print_epoch,
    record_epoch,
    record_test,
    stopped_early,
)
from rfdetr.training.resume import data_digest, go_on, refuse_finished_run, resumed_progress
from rfdetr.training.session import (
    Session,
    run_folder,
    split_evaluator,
    warn_of_queries_without_a_place,
)
from rfdetr.training.signals import StopSignals, WatchedLoader
from rfdetr.training.splits import read_splits, with_gray
from rfdetr.weights import checkpoint

SPARE_DISK = 64 << 20  # bytes


# ---------------------------------------------------------------- begin


def begin(settings: TrainingSettings, resumed: dict | None, frozen: dict | None = None) -> Session:
    """Device, seed and data, before anything is written; the dataset's warnings are printed.

    frozen: the content of the checkpoint whose detector stage 2 keeps as it is.
    """
    device = pick_device(settings.device)
    settings = settings.on_device(device.type)
    distributed.start(device)
    torch.manual_seed(settings.seed)
    size = settings.model_size
    if resumed:
        checkpoint.require_size(resumed, size, settings.output_dir)
    queries = size_from_dict(frozen["size"]).queries if frozen else size.queries
    warn_of_queries_without_a_place(settings)
    splits = read_splits(settings, queries)
    splits = with_gray(splits, settings, resumed, frozen)
    digests = {name: data_digest(split) for name, split in splits.items() if name != "test"}
    progress = Progress()
    if resumed:
        progress = resumed_progress(resumed, splits, digests, settings.dataset)
        if settings.batch == "auto" or settings.batch != resumed["args"].get("batch"):
            progress.micro_batch = 0  # to be found on this device, or asked for anew
        refuse_finished_run(settings, progress, "test" in splits)
    return Session(
        settings=settings,
        resumed=resumed,
        size=size,
        precision=pick_precision(settings.amp, device),
        splits=splits,
        digests=digests,
        progress=progress,
        resolution=settings.resolution,
        trained_on=checkpoint.trained_on(resumed) if resumed else None,
    )


# ---------------------------------------------------------------- open the run


def open_run(session: Session, model: nn.Module) -> AbstractContextManager:
    """Make the run's folder, start its log and print the banner; from here on everything is kept.

    Returns what closes the run, and notes in log.txt what ended it if that was an error.
    """
    if distributed.is_main():
        settings = session.settings
        weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        check_free_disk(settings.output_dir or Path("runs"), 15 * weights + SPARE_DISK)
        folder = run_folder(session)
        header = {
            "stage": settings.stage,
            "size": settings.size,
            "resolution": session.resolution,
            "class_names": list(session.train.class_names),
            "args": plain(settings),
            "environment": environment(session.device),
        }
        header["commands"] = commands_of(session, header["environment"]["command"], folder)
        progress = session.progress
        session.run = Run(
            folder, header, progress.epoch, settings.tensorboard, progress.step, waits=True
        )
        if not session.resumed:
            note_begun(session)
        describe_run(session.run, settings, header)
        print_banner(session, model, header["environment"]["device"])
    session.folder = distributed.from_main(session.run.folder if session.run else None)
    return session.run or nullcontext()


# ---------------------------------------------------------------- fit


def fit(
    session: Session,
    trainer: Trainer,
    loader: Iterable,
    evaluator: SplitEvaluator,
    pack: Callable[[dict], dict],
) -> dict | None:
    """Train to the last epoch; after each, evaluate, save and write metrics.json.  Returns the best
    epoch's record.

    loader: batches in the order of its `batch_sampler`, an EpochSampler. `evaluator` scores the
    trained module on valid. `pack` turns its state dict into a self-contained checkpoint's content.
    """
    settings = session.settings
    progress = session.progress
    keeper = make_keeper(session, trainer, pack)
    dataset = loader.dataset
    advice = steadier(settings.stage, amp_is_off=session.precision.dtype is None)
    health = RunHealth(session.folder, session.run, dataset, progress, keeper.nan_batches, advice)
    signals = StopSignals(lambda: save_and_say(session, keeper))
    clock = RunClock(progress, settings.epochs)
    curves = StepCurves(session.run.scalars, progress.steps) if session.run else None

    def after_step(batch, losses: dict[str, float], finite: bool) -> None:
        if curves:
            curves.add(progress.step, losses, trainer.rates)
        health.after_step(batch, finite)
        if keeper.minutes_since_save() > settings.save_minutes:
            keeper.save("checkpoint.pt")
            note_begun(session)
        signals.stop_if_asked()

    with signals, keeper.naming_last_save(), naming_workers(dataset.images_in_work):
        while progress.epoch < settings.epochs:
            if 0 < settings.stop_after <= keeper.evaluations_without_gain:
                tick(stopped_early(session, keeper.evaluations_without_gain))
                break
            epoch = progress.epoch + 1
            loader.batch_sampler.set_epoch(progress.epoch, progress.step_in_epoch)
            means = train_one_epoch(trainer, WatchedLoader(loader, signals), after_step)
            health.after_epoch(means)
            health.check_matches(epoch, means, bool(settings.fast_dev_run))
            record = {"epoch": epoch, "train": means}
            scores = {}
            gained = False
            weights = None  # of the table and the pictures
            if epoch % settings.eval_every == 0 or epoch == settings.epochs:
                with signals.stopping_at_once():
                    scores = evaluate(trainer, evaluator, record)
                gained = keeper.keep_best(epoch, scores)
                weights = keeper.best["weights"] if gained else keeper.better_weights(scores)
            is_best = gained and keeper.best["value"] is not None  # or nothing can be scored
            print_epoch(record, clock, scores.get(weights), weights if is_best else None)
            note_begun(session)
            if session.run:
                record_epoch(session.run, record, keeper.best)
            progress.finish_epoch()  # not before: a run stopped while evaluating does it again
            keeper.save("last.pt", "checkpoint.pt")
            if session.run and weights and (gained or is_picture_due(settings, epoch)):
                model = trainer.model if weights == "regular" else trainer.ema.module
                draw_pictures(session.run, evaluator, model, epoch, gained)
            if progress.epoch < settings.epochs or "test" in session.splits:
                signals.stop_if_asked()
    return keeper.best


def make_keeper(
    session: Session, trainer: Trainer, pack: Callable[[dict], dict]
) -> CheckpointKeeper:
    """What keeps the run's checkpoints; of a resumed run with all that it had.

    Beside the weights each checkpoint holds the settings, and what the images were.
    """
    train = session.train
    trained_on = torch.tensor(train.content_hashes, dtype=torch.int64)
    if session.trained_on is not None:
        trained_on = torch.cat([trained_on, session.trained_on])
    own = {
        "args": plain(session.settings),
        "left_out": train.left_out,
        "exif": train.exif,
        "image_side": typical_side(train, session.letterbox),
        "tile": session.tiling.side if session.tiling else 0,
        "tile_overlap": session.tiling.overlap if session.tiling else TILE_OVERLAP,
        "tile_full": session.tiling.with_whole if session.tiling else False,
        "letterbox": session.letterbox,
        "gray": train.gray.to_dict() if train.gray else None,
        "guessed_masks": session.guess_masks,
        "trained_on": trained_on.unique(),
    }
    keeper = CheckpointKeeper(
        folder=session.folder,
        trainer=trainer,
        pack=lambda state: pack(state) | own,
        metric=session.settings.metric,
        best_of_each=session.settings.stage == "detector",
        digests=session.digests,
    )
    if session.resumed:
        go_on(session, keeper)
    return keeper


def save_and_say(session: Session, keeper: CheckpointKeeper) -> None:
    """Save a run that is asked to stop, and say how to go on; its settings come back with it."""
    keeper.save("checkpoint.pt")
    note_begun(session)
    words = [*distributed.launcher(), sys.argv[0], "--resume", str(session.folder)]
    file = session.folder / "checkpoint.pt"
    say(f"\nstopped: the state is in {file}. Go on with:\n  {command_line(*words)}")


def evaluate(trainer: Trainer, evaluator: SplitEvaluator, record: dict) -> dict[str, dict]:
    """Scores of the regular and, if any, the averaged weights, also put into the epoch's record."""
    begin = time.perf_counter()
    scores = {"regular": evaluator.evaluate(trainer.model)}
    record["valid"] = scores["regular"]
    if trainer.ema:
        scores["ema"] = evaluator.evaluate(trainer.ema.module)
        record["valid_ema"] = scores["ema"]
    record["train"]["evaluation_s"] = time.perf_counter() - begin
    return scores


# ---------------------------------------------------------------- finish


def finish(
    session: Session, table: ClassTable, masks: bool, next_command: str, remark: str = ""
) -> None:
    """Score the test split with the best weights; say where the files are and what to type next.

    remark: on that command.
    """
    if "test" in session.splits:
        content = None
        if distributed.is_main():  # it may still be writing it, and on another machine's disk
            content = checkpoint.load(session.folder / "best.pt")
        model, _ = checkpoint.build_model(distributed.from_main(content))
        evaluator = split_evaluator(session, "test", table, masks)
        scores = evaluator.evaluate(model.to(session.device))
        say(f"test split\n{format_table(scores)}")
        note_begun(session)
        if session.run:
            record_test(session.run, scores, session.progress.epoch)
    files = ("best.pt", "last.pt", "metrics.json", "tb/", "predictions/")
    there = ", ".join(name for name in files if (session.folder / name).exists())
    tick(f"Done. Files: {session.folder} ({there})")
    if (session.folder / "tb").exists():
        say(f"Look at the curves:  {command_line('tensorboard', '--logdir', session.folder)}")
    if session.settings.fast_dev_run:
        remark, next_command = after_trial(session, sys.argv)
    if remark:
        say(remark)
    say(f"Next:  {next_command}")
    distributed.stop()
