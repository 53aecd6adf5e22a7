"""What the training scripts share: opening a run, the objective, and fit(), epoch by epoch."""

from __future__ import annotations

import argparse
import hashlib
import math
import shlex
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rfdetr import distributed
from rfdetr.classes import ClassTable, assign_rows
from rfdetr.console import UserError, banner, tick, warn
from rfdetr.data.coco import read_dataset
from rfdetr.data.loaders import EpochSampler, SplitDataset, check_unread, evaluation_loader
from rfdetr.data.records import CocoSplit
from rfdetr.data.workers import naming_workers
from rfdetr.device import Precision, compile_in_place, pick_device, pick_precision
from rfdetr.inference.evaluation import SplitEvaluator
from rfdetr.metrics.coco_eval import format_table
from rfdetr.models.detector import Detector
from rfdetr.runs.environment import environment
from rfdetr.runs.folder import check_free_disk, given_run, new_run
from rfdetr.runs.record import Run, test_is_scored
from rfdetr.sizes import SIZES, ModelSize
from rfdetr.training.engine import Progress, Trainer, train_one_epoch
from rfdetr.training.keeper import Awaited, CheckpointKeeper
from rfdetr.weights import checkpoint

PATIENCE = 10  # evaluations without gain, where --early_stopping 1 names none
PICTURES = 4  # validation images drawn after an epoch


@dataclass
class Session:
    """One run of a training script: its flags and what follows from them.  `run` is open on rank 0 alone."""

    args: argparse.Namespace
    kind: str  # "detector", "segmentation" or "seg_single": the run folder's first word
    precision: Precision
    splits: dict[str, CocoSplit]
    progress: Progress
    data: dict[str, str]  # split -> what its images and annotations are told by
    folder: Path | None = None
    run: Run | None = None
    trained_on: Tensor | None = (
        None  # content hashes of the images that what it starts from was trained on
    )

    @property
    def size(self) -> ModelSize:
        return SIZES[self.args.size]

    @property
    def device(self) -> torch.device:
        return self.precision.device


def begin(args: argparse.Namespace, kind: str) -> Session:
    """Device, seed and data, before anything is written; the dataset's warnings are printed."""
    device = pick_device(args.device)
    distributed.start(device)
    torch.manual_seed(args.seed)
    queries = getattr(args, "num_queries", None) or SIZES[args.size].queries
    splits = read_dataset(args.dataset, args.val_fraction, queries, args.exif)
    if args.run_test and "test" not in splits:
        warn(f"--run_test 1: {args.dataset} has no test split, it is skipped")
    if not args.run_test:
        splits.pop("test", None)
    for split in splits.values():
        for message in split.warnings:
            warn(message)
    progress, data = (
        Progress(),
        {name: digest(split) for name, split in splits.items() if name != "test"},
    )
    if args.resume_from:
        progress = Progress(**args.resume_from["training"]["progress"])
        take_other_data(progress, args, data, len(splits["train"].images))
        if args.batch != args.resume_from["args"].get("batch"):
            progress.micro_batch = 0  # asked for anew
        if args.epochs <= progress.epoch and (
            "test" not in splits or test_is_scored(args.output_dir)
        ):
            raise UserError(
                f"{args.output_dir} has finished its {progress.epoch} epochs. To train longer, give more: "
                f"--resume {args.output_dir} --epochs {progress.epoch + 20}"
            )
    session = Session(args, kind, pick_precision(args.amp, device), splits, progress, data)
    if args.resume_from:
        session.trained_on = checkpoint.trained_on(args.resume_from)
    return session


def digest(split: CocoSplit) -> str:
    """sha256 of a split's annotations and of which images it has."""
    names = hashlib.sha256(checkpoint.file_sha256(split.annotation_file).encode())
    for image in split.images:
        names.update(f"{image.file_name}\n".encode(errors="surrogatepass"))
    return names.hexdigest()


def take_other_data(
    progress: Progress, args: argparse.Namespace, data: dict[str, str], images: int
) -> None:
    """Say which splits are no longer what the run saw (`data` as in Session); numbers of other `images` are forgotten.

    Checkpoints of earlier versions do not tell: there the numbers that exist are kept.
    """
    before = args.resume_from["training"].get("data")
    before = before if isinstance(before, dict) else {}
    changed = [name for name in data if before.get(name, data[name]) != data[name]]
    if changed:
        warn(
            f"--resume: {' and '.join(changed)} of {args.dataset} have other images or annotations than epochs "
            f"1-{max(progress.epoch, 1)} saw: their scores cannot be compared with what follows"
        )
    progress.unread = (
        [] if "train" in changed else [index for index in progress.unread if index < images]
    )


def class_table(session: Session, head: str) -> ClassTable:
    """The class head's rows: new ones (`head` as in assign_rows), or a resumed run's, in the dataset's order of now.

    Raises UserError where the dataset's classes are no longer the run's.
    """
    args, train = session.args, session.splits["train"]
    if args.resume_from:
        table = checkpoint.table_of(args.resume_from)
        return table.in_order_of(train.class_names, train.category_ids, f"{args.dataset} (train)")
    return assign_rows(train.class_names, train.category_ids, head)


def open_run(
    session: Session, stage: str, title: str, model: nn.Module, judge: SplitEvaluator
) -> AbstractContextManager:
    """Make the run's folder, start its log and print the banner; from here on everything is kept.

    Returns what closes the run, and notes in log.txt what ended it if that was an error.
    """
    args, device = session.args, session.device
    if distributed.is_main():
        weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        parent = args.output_dir or Path("runs")
        check_free_disk(parent, 15 * weights + (64 << 20))
        stem = f"{session.kind}_{args.size}_{args.resolution}"
        if args.resume_from:
            folder = args.output_dir
        else:
            folder = given_run(args.output_dir) if args.output_dir else new_run(parent, stem)
        header = {
            "stage": stage,
            "size": args.size,
            "resolution": args.resolution,
            "class_names": list(session.splits["train"].class_names),
            "args": plain_args(args),
            "environment": environment(device),
        }
        session.run = Run(
            folder, header, session.progress.epoch if args.resume_from else 0, args.tensorboard
        )
        counts = ", ".join(f"{len(split.images)} {name}" for name, split in session.splits.items())
        precision = (
            str(session.precision.dtype).removeprefix("torch.")
            if session.precision.dtype
            else "fp32"
        )
        banner(
            title,
            {
                "Model Size": f"{args.size} ({sum(p.numel() for p in model.parameters()):,} parameters)",
                "Resolution": args.resolution,
                "Epochs": args.epochs,
                "Batch": f"{args.batch} x {args.accum} accumulated",
                "Device": f"{header['environment']['device']}, {precision}",
                "Dataset": f"{args.dataset} ({counts} images; {', '.join(session.splits['train'].class_names)})",
                "Output": folder,
            },
        )
        if judge.split.images == []:
            warn(
                "the valid split is empty: there are no scores, and best.pt holds the last epoch's weights"
            )
    session.folder = distributed.from_main(session.run.folder if session.run else None)
    return session.run or nullcontext()


def plain_args(args: argparse.Namespace) -> dict:
    """The flags as plain values, for checkpoints and JSON."""
    values = {
        name: value
        for name, value in vars(args).items()
        if name not in ("resume_from", "debug", "fast_dev_run")
    }
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in values.items()
    }


def training_data(session: Session, masks: bool) -> tuple[SplitDataset, EpochSampler]:
    """The training images and their order; each list of the sampler is one optimizer step of this rank."""
    args = session.args
    dataset = SplitDataset(
        session.splits["train"], args.resolution, session.size.recipe.augment, masks
    )
    rank, world = distributed.rank(), distributed.world_size()
    sampler = EpochSampler(
        len(dataset), args.effective_batch, args.seed, args.min_steps, rank, world
    )
    if args.fast_dev_run:
        sampler.steps = min(sampler.steps, args.fast_dev_run)
    return dataset, sampler


def adapt_encoder(session: Session, model: Detector) -> None:
    """What --freeze_encoder and --compile ask for."""
    if session.args.freeze_encoder:
        model.encoder.requires_grad_(False)
        if distributed.is_main():
            tick(
                f"Encoder frozen: {sum(p.numel() for p in model.encoder.parameters()):,} parameters"
            )
    if session.args.compile:
        compile_in_place(model.encoder, session.device)


def split_evaluator(
    session: Session, name: str, table: ClassTable, masks: bool, frozen: Detector | None = None
) -> SplitEvaluator:
    """The judge of one split."""
    args, split = session.args, session.splits[name]
    batch = min(16, args.effective_batch)
    if args.fast_dev_run:
        split = replace(split, images=split.images[: batch * args.fast_dev_run])
    dataset = SplitDataset(split, args.resolution, None, masks=False)
    rank, world = distributed.rank(), distributed.world_size()
    loader = evaluation_loader(dataset, batch, args.workers, rank, world)
    return SplitEvaluator(loader, table, session.precision, masks, frozen)


# ---------------------------------------------------------------- fit


def fit(
    session: Session,
    trainer: Trainer,
    loader: Iterable,
    judge: SplitEvaluator,
    pack: Callable[[dict], dict],
) -> dict | None:
    """Train to the last epoch; after each, evaluate, save and write metrics.json.  Returns the best epoch's entry.

    loader: batches in the order of its `batch_sampler`, an EpochSampler; judge scores the trained module; `pack` as in
    CheckpointKeeper. The best is chosen by valid bbox/mAP for a detector, by segm/mAP where masks are trained.
    """
    args, progress = session.args, trainer.progress
    patience = args.patience or (PATIENCE if getattr(args, "early_stopping", False) else 0)
    train = session.splits["train"]
    own = {
        "args": plain_args(args),
        "left_out": train.left_out,
        "exif": train.exif,
        "trained_on": trained_on(session),
    }
    keeper = CheckpointKeeper(session, trainer, lambda state: pack(state) | own)
    if args.resume_from:
        keeper.restore(args.resume_from)
        keeper.take_newer_best()
        if session.run:
            session.run.set(best=keeper.best)
            tick(
                f"Going on with {session.folder} in epoch {progress.epoch + 1}, after {progress.step_in_epoch} steps"
            )
    with keeper.watch_signals(), naming_workers(loader.dataset):
        while progress.epoch < args.epochs:
            if patience and keeper.epochs_without_gain >= patience:
                tick(f"Stopped early: {patience} evaluations without gain (--patience {patience})")
                break
            train_and_judge(keeper, loader, judge)
            if progress.epoch < args.epochs or "test" in session.splits:
                keeper.stop_if_asked()
    return keeper.best


def trained_on(session: Session) -> Tensor:
    """Content hashes, int64, of the images that the run's weights have seen in the end, in this run and before."""
    hashes = torch.tensor(session.splits["train"].content_hashes, dtype=torch.int64)
    before = [] if session.trained_on is None else [session.trained_on]
    return torch.cat([hashes, *before]).unique()


def train_and_judge(keeper: CheckpointKeeper, loader: Iterable, judge: SplitEvaluator) -> None:
    """One epoch, or what is left of it, with its entry in metrics.json and TensorBoard, its checkpoints and pictures.

    Raises UserError where the first epoch has taught nothing.
    """
    session, trainer, progress, run = (
        keeper.session,
        keeper.trainer,
        keeper.trainer.progress,
        keeper.session.run,
    )
    args, epoch = session.args, progress.epoch + 1
    loader.batch_sampler.set_epoch(progress.epoch, progress.step_in_epoch)
    record = {
        "epoch": epoch,
        "train": train_one_epoch(trainer, Awaited(loader, keeper), keeper.after_step),
    }
    progress.unread = sorted(set().union(*distributed.gather_objects(progress.unread)))
    check_unread(progress.unread, session.splits["train"])
    record["train"]["skipped_images"] = len(progress.unread)
    check_matches(keeper, record)
    gained = None
    if epoch % args.eval_every == 0 or epoch == args.epochs:
        gained = evaluate_epoch(
            keeper, judge, record, "bbox/mAP" if session.kind == "detector" else "segm/mAP"
        )
        keeper.epochs_without_gain = 0 if gained else keeper.epochs_without_gain + 1
    if run:
        run.add_epoch(record)
        run.set(best=keeper.best)
        for name in record.keys() - {"epoch"}:
            with run.optional(f"writing curves to {run.folder / 'tb'}"):
                run.scalars(name, record[name], epoch)
    # not before: a run stopped during the evaluation starts it again
    progress.epoch, progress.step_in_epoch, progress.sums = epoch, 0, {}
    keeper.save(("last.pt", "checkpoint.pt"))
    if run and gained:
        with run.optional(f"drawing pictures into {run.folder / 'predictions'}"):
            draw_pictures(session, judge, trainer, keeper.best, epoch)


def check_matches(keeper: CheckpointKeeper, record: dict) -> None:
    """Stage 2 learns from the objects that its detector finds: a warning where an epoch had none, and where that was
    the first one, a UserError."""
    train, args = record["train"], keeper.session.args
    if not train.get("objects") or train["matched_objects"]:
        return
    message = (
        f"epoch {record['epoch']} has taught the mask head nothing: the frozen detector finds none of its "
        f"{train['objects']:.0f} objects (no box overlaps one by more than half)"
    )
    if record["epoch"] > 1 or args.fast_dev_run:
        if not keeper.warned_of_matches:
            warn(message)
        keeper.warned_of_matches = True
        return
    raise UserError(
        f"{message}. Train stage 1 longer, or see with python evaluate.py whether --checkpoint, its classes and "
        f"--resolution {args.resolution} are the right ones for {args.dataset}"
    )


def evaluate_epoch(
    keeper: CheckpointKeeper, judge: SplitEvaluator, record: dict, metric: str
) -> bool:
    """Score regular and averaged weights into `record`, print the table, keep the best; True for a new best."""
    trainer, epoch = keeper.trainer, record["epoch"]
    begin = time.perf_counter()
    with keeper.interruptible():
        scores = {"regular": judge(trainer.model)}
        record["valid"] = scores["regular"]
        if trainer.ema:
            scores["ema"] = record["valid_ema"] = judge(trainer.ema.module)
    record["train"]["evaluation_s"] = time.perf_counter() - begin
    gained = keeper.keep_best(epoch, scores, metric)
    if distributed.is_main():
        weights = keeper.best["weights"] if gained else max(scores, key=keeper.each.get)
        print(
            f"\nepoch {epoch}/{keeper.session.args.epochs}  loss {record['train'].get('loss', math.nan):.3f}  "
            f"{record['train']['images_per_s']:.1f} images/s"
            + (f"  new best ({weights} weights)" if gained else "")
        )
        print(format_table(scores[weights]), flush=True)
    return gained


def draw_pictures(
    session: Session, judge: SplitEvaluator, trainer: Trainer, best: dict, epoch: int
) -> None:
    """Draw a few validation images with the best weights, into predictions/ and TensorBoard."""
    model = trainer.model if best["weights"] == "regular" else trainer.ema.module
    folder = session.folder / "predictions"
    folder.mkdir(exist_ok=True)
    for name, drawn in judge.pictures(model, PICTURES):
        drawn.save(folder / f"valid_{name}.png", compress_level=1)
        session.run.image(f"valid/{name}", drawn, epoch)


def predict_command(session: Session) -> str:
    """What to type to see the valid images with everything drawn in."""
    images = session.splits["valid"].images or session.splits["train"].images
    words = [
        "--checkpoint",
        session.folder / "best.pt",
        "--input",
        images[0].path.parent,
        "--output",
        "predictions",
    ]
    return shlex.join(["python", "predict.py", *map(str, words)])


def finish(session: Session, table: ClassTable, masks: bool, next_command: str) -> None:
    """Score the test split with the best weights, say where the files are, and what to type next."""
    if "test" in session.splits:
        # rank 0 may still be writing it, and on another machine's disk
        best = distributed.from_main(
            checkpoint.load(session.folder / "best.pt") if distributed.is_main() else None
        )
        model, _ = checkpoint.build_model(best)
        scores = split_evaluator(session, "test", table, masks)(model.to(session.device))
        if distributed.is_main():
            print(f"test split\n{format_table(scores)}")
            session.run.set(test=scores)
    if distributed.is_main():
        tick(f"Done. Files: {session.folder} (best.pt, last.pt, metrics.json, tb/, predictions/)")
        print(f"Look at the curves:  tensorboard --logdir {shlex.quote(str(session.folder))}")
        print(f"Next:  {next_command}", flush=True)
    distributed.stop()
