"""What the training scripts share: opening a run, the objective, and fit(), epoch by epoch."""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from rfdetr import checkpoint, distributed
from rfdetr.classes import ClassTable, assign_rows, is_class_head
from rfdetr.console import GRACE, Stopped, UserError, banner, tick, warn
from rfdetr.convert import load_pretrained
from rfdetr.data.coco import CocoSplit, read_dataset
from rfdetr.data.loaders import (
    STOP_SIGNALS,
    Batch,
    EpochSampler,
    SplitDataset,
    check_unread,
    evaluation_loader,
    naming_workers,
    note_unread,
)
from rfdetr.data.transforms import draw_side, multi_scale_sides, to_model_input
from rfdetr.engine import Progress, Trainer, random_states, set_random_states, train_one_epoch
from rfdetr.evaluation import Judge
from rfdetr.losses.criterion import LossWeights, detection_losses, mask_losses
from rfdetr.metrics.coco_eval import format_table
from rfdetr.models.detector import Detector
from rfdetr.models.segmentation import sample_in_boxes
from rfdetr.precision import Precision, compile_in_place, pick_device, pick_precision
from rfdetr.rundir import Run, check_free_disk, environment, given_run, new_run, test_is_scored, write_json
from rfdetr.sizes import SIZES, ModelSize

NAN_STEPS = 10  # steps in a row without a finite loss end the run
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
    trained_on: Tensor | None = None  # content hashes of the images that what it starts from was trained on

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
    progress, data = Progress(), {name: digest(split) for name, split in splits.items() if name != "test"}
    if args.resume_from:
        progress = Progress(**args.resume_from["training"]["progress"])
        take_other_data(progress, args, data, len(splits["train"].images))
        if args.batch != args.resume_from["args"].get("batch"):
            progress.micro_batch = 0  # asked for anew
        if args.epochs <= progress.epoch and ("test" not in splits or test_is_scored(args.output_dir)):
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


def take_other_data(progress: Progress, args: argparse.Namespace, data: dict[str, str], images: int) -> None:
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
    progress.unread = [] if "train" in changed else [index for index in progress.unread if index < images]


def class_table(session: Session, head: str) -> ClassTable:
    """The class head's rows: new ones (`head` as in assign_rows), or a resumed run's, in the dataset's order of now.

    Raises UserError where the dataset's classes are no longer the run's.
    """
    args, train = session.args, session.splits["train"]
    if args.resume_from:
        table = checkpoint.table_of(args.resume_from)
        return table.in_order_of(train.class_names, train.category_ids, f"{args.dataset} (train)")
    return assign_rows(train.class_names, train.category_ids, head)


def open_run(session: Session, stage: str, title: str, model: nn.Module, judge: Judge) -> AbstractContextManager:
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
        session.run = Run(folder, header, session.progress.epoch if args.resume_from else 0, args.tensorboard)
        counts = ", ".join(f"{len(split.images)} {name}" for name, split in session.splits.items())
        precision = str(session.precision.dtype).removeprefix("torch.") if session.precision.dtype else "fp32"
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
            warn("the valid split is empty: there are no scores, and best.pt holds the last epoch's weights")
    session.folder = distributed.from_main(session.run.folder if session.run else None)
    return session.run or nullcontext()


def plain_args(args: argparse.Namespace) -> dict:
    """The flags as plain values, for checkpoints and JSON."""
    values = {name: value for name, value in vars(args).items() if name not in ("resume_from", "debug", "fast_dev_run")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def training_data(session: Session, masks: bool) -> tuple[SplitDataset, EpochSampler]:
    """The training images and their order; each list of the sampler is one optimizer step of this rank."""
    args = session.args
    dataset = SplitDataset(session.splits["train"], args.resolution, session.size.recipe.augment, masks)
    rank, world = distributed.rank(), distributed.world_size()
    sampler = EpochSampler(len(dataset), args.effective_batch, args.seed, args.min_steps, rank, world)
    if args.fast_dev_run:
        sampler.steps = min(sampler.steps, args.fast_dev_run)
    return dataset, sampler


def start_from(
    model: Detector, table: ClassTable, weights: Path | None, exclude: list[str], backbone: Path | None = None
) -> Tensor | None:
    """Load pretrained weights into a new model and print what was loaded, skipped and left as it was.

    Class rows go to the class of the same name; from COCO's head to COCO's, every row goes to itself. `backbone`: a
    file with DINOv2's weights alone, taken instead of `weights`.  Returns the content hashes of the images that the
    weights were trained on, as far as known.
    """
    if weights is None and backbone is None:
        if distributed.is_main():
            tick("Weights: none, training from scratch")
        return None
    content = checkpoint.load_backbone(backbone, model.size.patch) if backbone else checkpoint.load(weights)
    source, state = checkpoint.table_of(content), content["model"]
    if source.is_coco and table.background == 0:
        pairs = {row: row for row in range(source.rows_total)}
    else:
        pairs = {
            row: source.rows[source.names.index(n)] for n, row in zip(table.names, table.rows) if n in source.names
        }
    for name, own in model.state_dict().items():
        if is_class_head(name) and name in state:
            rows = own.cpu().clone()
            for row, other in pairs.items():
                rows[row] = state[name][other]
            state[name] = rows
    report = load_pretrained(model, state, exclude)
    if distributed.is_main():
        tick(f"Weights: {backbone or weights}")
        print(report.summary(), flush=True)
    return checkpoint.trained_on(content)


def adapt_encoder(session: Session, model: Detector) -> None:
    """What --freeze_encoder and --compile ask for."""
    if session.args.freeze_encoder:
        model.encoder.requires_grad_(False)
        if distributed.is_main():
            tick(f"Encoder frozen: {sum(p.numel() for p in model.encoder.parameters()):,} parameters")
    if session.args.compile:
        compile_in_place(model.encoder, session.device)


def judge_of(session: Session, name: str, table: ClassTable, masks: bool, frozen: Detector | None = None) -> Judge:
    """The judge of one split."""
    args, split = session.args, session.splits[name]
    batch = min(16, args.effective_batch)
    if args.fast_dev_run:
        split = copy.copy(split)
        split.images = split.images[: batch * args.fast_dev_run]
    dataset = SplitDataset(split, args.resolution, None, masks=False)
    rank, world = distributed.rank(), distributed.world_size()
    loader = evaluation_loader(dataset, batch, args.workers, rank, world)
    return Judge(loader, table, session.precision, masks, frozen)


@dataclass(frozen=True)
class Objective:
    """The detector's losses on a batch of images, and its mask head's, where it has one, on the matched queries."""

    table: ClassTable
    weights: LossWeights
    precision: Precision
    sides: tuple[int, ...]  # multi-scale: the input sides to draw from
    seed: int
    progress: Progress

    def __call__(self, model: Detector, batch: Batch, objects: float) -> dict[str, Tensor]:
        device = self.precision.device
        side = draw_side(self.sides, self.seed, self.progress.step) if self.sides else None
        images = to_model_input(batch.images, device, side)
        rows = torch.tensor(self.table.rows, device=device)
        targets = [{k: v.to(device) for k, v in t.items() if k != "index"} for t in batch.targets]
        targets = [target | {"rows": rows[target["labels"]]} for target in targets]
        with self.precision.autocast():
            outputs = model(images)
        groups = model.transformer.groups
        losses, (image, query, obj) = detection_losses(outputs, targets, groups, objects * groups, self.weights)
        if model.mask_head is not None:
            has_mask = torch.cat([t["has_mask"] for t in targets])[obj]
            image, query, obj = image[has_mask], query[has_mask], obj[has_mask]
            truth = torch.cat([t["masks"] for t in targets])
            boxes = outputs["pred_boxes"].detach()[image, query]
            target = sample_in_boxes(truth[:, None], boxes, obj)[:, 0]
            with self.precision.autocast():
                pixels = model.mask_head.pixels(outputs["features"], images)
                logits = model.mask_head.grid_logits(pixels, outputs["queries"][image, query], boxes, image)
            losses |= mask_losses(logits, target, objects * groups, self.weights)
        return losses


def input_sides(args: argparse.Namespace) -> tuple[int, ...]:
    """What multi-scale training draws each step's side from; empty where the side stays the same."""
    if not args.multi_scale:
        return ()
    return tuple(multi_scale_sides(SIZES[args.size], args.resolution, args.expanded_scales))


@dataclass(frozen=True)
class Schedule:
    """The factor on every base rate at an optimizer step: a linear warm-up, then "cosine" (after a flat part), "step"
    (a tenth from 80 % on) or "constant".

    It follows from the step and the total alone: a finished run resumed with more epochs goes on where the longer
    schedule stands at that step. Where a resumed run's epochs have more or fewer steps than before, the step is the
    one that as many epochs come to now (Progress.position).
    """

    total: int  # steps
    warmup: int  # steps
    flat: float  # cosine: share of all steps at the full rate first
    floor: float  # cosine: where it ends
    kind: str

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        if self.kind == "step":
            return 1.0 if step < 0.8 * self.total else 0.1
        start = max(self.warmup, self.flat * self.total)
        if step < start or self.total <= start:
            return 1.0
        done = min((step - start) / (self.total - start), 1.0)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(
    model: nn.Module, lr: float, lr_encoder: float, weight_decay: float, size: ModelSize
) -> list[dict]:
    """AdamW groups with RF-DETR's rates: layer-wise decay on the encoder, a factor on the decoder's layers.

    Encoder biases, norms, embeddings and layer scales get no weight decay, everything else does, as published. Groups
    are parts of the model, not rates, so that a run resumed with other rates has the same ones.
    """
    recipe, top = size.recipe, size.used_depth + 2
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, rate, decay = "other", lr, weight_decay
        if name.startswith("backbone.0.encoder."):
            layer = int(name.split(".layer.")[1].split(".")[0]) + 1 if ".layer." in name else top
            layer = 0 if "embeddings" in name else layer
            rate = lr_encoder * recipe.lr_layer_decay ** (top - layer) * recipe.lr_decoder_factor**2
            plain = any(word in name for word in ("bias", "norm", "embeddings", "gamma"))
            part, decay = f"encoder {layer} {plain}", 0.0 if plain else weight_decay
        elif name.startswith("transformer.decoder."):
            part, rate = "decoder", lr * recipe.lr_decoder_factor
        group = groups.setdefault(part, {"params": [], "base_lr": rate, "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def make_trainer(session: Session, model: nn.Module, losses: Callable, groups: list[dict], steps: int) -> Trainer:
    """AdamW (fused where torch has it), a gradient scaler for fp16 alone, an average of the weights, and the schedule.

    `steps`: optimizer steps in an epoch.
    """
    session.progress.count_epochs_in(steps)
    args, device, recipe = session.args, session.device, session.size.recipe
    total = args.epochs * steps
    warmup = round(args.warmup_epochs * steps) if "warmup_epochs" in args else min(recipe.warmup_steps, total // 10)
    kind = getattr(args, "lr_scheduler", "cosine")
    schedule = Schedule(total, warmup, recipe.flat_fraction, recipe.lr_min_factor, kind)
    clip = recipe.seg_clip if session.kind == "segmentation" else recipe.clip
    optimizer = torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=session.precision.dtype is torch.float16)
    ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if args.ema else None
    session.progress.micro_batch = session.progress.micro_batch or args.batch
    return Trainer(model, losses, optimizer, schedule, scaler, ema, clip, device, session.progress)


# ---------------------------------------------------------------- fit


class Keeper:
    """Writes a run's checkpoints: after epochs, every few minutes inside them, and on a signal.

    `pack(state)` turns the trained module's state dict into a self-contained checkpoint's content.
    """

    def __init__(self, session: Session, trainer: Trainer, pack: Callable[[dict], dict]):
        self.session, self.trainer, self.pack = session, trainer, pack
        self.best: dict | None = None
        self.each: dict[str, float] = {}  # best value so far of regular and ema weights
        self.epochs_without_gain = 0
        self.last_save = time.monotonic()
        self.nan_batches: list[dict] = []
        self.warned_of_matches = False
        self.signal: int | None = None
        self.busy = True  # with something that a signal has to wait for
        self.waiting = False  # for a batch: nothing of the run's state changes meanwhile

    @contextmanager
    def watch_signals(self) -> Iterator[None]:
        """Inside, a first signal ends the run after the step, a second one at once.

        A step whose batch does not come, from a loader process that hangs, is not waited for.
        """
        timer = hasattr(signal, "setitimer") and distributed.world_size() == 1

        def note(number: int, frame: object) -> None:
            self.signal = number
            if distributed.world_size() == 1:  # torchrun hands a signal on that came here already
                signal.signal(number, signal.SIG_DFL)
            if not self.busy:
                self.stop()
            if timer:
                signal.setitimer(signal.ITIMER_REAL, GRACE / 2, 1.0)

        def look(number: int, frame: object) -> None:
            if self.waiting:
                signal.setitimer(signal.ITIMER_REAL, 0)
                self.stop()

        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in before:
            if before[number] is not signal.SIG_IGN:  # nohup
                signal.signal(number, note)
        if timer:
            before[signal.SIGALRM] = signal.signal(signal.SIGALRM, look)
        try:
            yield
        finally:
            if timer:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """For what takes long and changes nothing of the run's state: inside, a signal ends the run at once."""
        self.stop_if_asked()
        self.busy = False
        try:
            if self.signal:  # it came between the two
                self.stop()
            yield
        finally:
            self.busy = True

    def state(self) -> dict:
        trainer = self.trainer
        return self.pack(trainer.model.state_dict()) | {
            "ema": self.pack(trainer.ema.module.state_dict())["model"] if trainer.ema else None,
            "training": {
                "progress": asdict(trainer.progress),
                "optimizer": trainer.optimizer.state_dict(),
                "scaler": trainer.scaler.state_dict(),
                "data": self.session.data,
                "trained": trainer.model.state_dict(),
                "trained_ema": trainer.ema.module.state_dict() if trainer.ema else None,
                "random": random_states(trainer.device),
                "best": self.best,
                "each": self.each,
                "epochs_without_gain": self.epochs_without_gain,
                "nan_batches": self.nan_batches,
            },
        }

    def restore(self, content: dict) -> None:
        """Put back everything state() took; progress itself was read when the session began."""
        trainer, state = self.trainer, content["training"]
        settings = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in trainer.optimizer.param_groups
        ]
        try:
            check_history(state)
            trainer.model.load_state_dict(state["trained"])
            if trainer.ema:  # an average that begins now begins at the weights
                trainer.ema.module.load_state_dict(state["trained_ema"] or state["trained"])
            for moments in state["optimizer"]["state"].values():
                checkpoint.require_plain(moments)
            trainer.optimizer.load_state_dict(state["optimizer"])
            if not all(type(group["lr"]) in (int, float) for group in trainer.optimizer.param_groups):
                raise ValueError("the optimizer's rates are no numbers")
            for parameter, moments in trainer.optimizer.state.items():  # a fused step would write beyond smaller ones
                if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                    raise ValueError("the optimizer's moments have other shapes than the weights")
                if moments["step"].numel() != 1:
                    raise ValueError("the optimizer's step is no number")
            trainer.scaler.load_state_dict(state["scaler"])
            set_random_states(state["random"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"--resume: the state in {self.session.folder} does not fit these settings "
                f"({' '.join(str(error).split())[:300]}). Leave out flags that change the model"
            ) from error
        # moments and the last rates alone are taken over: flags given anew win, no stranger's setting reaches a kernel
        for group, given in zip(trainer.optimizer.param_groups, settings):
            group.update(given)
        self.best, self.each = state["best"], state["each"]
        self.epochs_without_gain, self.nan_batches = state["epochs_without_gain"], state.get("nan_batches", [])

    def take_newer_best(self) -> None:
        """Adopt the best files of an epoch that the restored state has not reached.

        A kill between best.pt and last.pt leaves them. Their weights are whole, and those that they replaced are gone:
        so they are the best so far, and metrics.json says what best.pt holds. The epoch is run again; with the same
        scores it writes the same files again.
        """
        if self.best is None:
            metric = "bbox/mAP" if self.session.kind == "detector" else "segm/mAP"
        else:
            metric = self.best["metric"]
        folder, epoch = self.session.folder, self.trainer.progress.epoch
        names = ("best.pt", "checkpoint_best_regular.pth", "checkpoint_best_ema.pth")
        stories = [best_story(folder / name, metric, epoch) for name in names] if distributed.is_main() else []
        best, *each = distributed.from_main(stories)
        self.best = best or self.best
        for story in filter(None, each):
            self.each[story["weights"]] = -1.0 if story["value"] is None else story["value"]

    def save(self, names: tuple[str, ...]) -> None:
        """Write the state under each name: files of their own, so that damage to one leaves another."""
        self.last_save = time.monotonic()
        if distributed.is_main():
            state = self.state()
            for name in names:
                checkpoint.save(self.session.folder / name, state)

    def after_step(self, batch: Batch, finite: bool) -> None:
        """Timed saves, the record of steps without a finite loss, unreadable images, and the end after a signal."""
        if not finite:
            self.note_nan(batch.indices)
        if batch.unread:
            note_unread(batch.unread, self.trainer.progress.unread)
            check_unread(self.trainer.progress.unread, self.session.splits["train"])
        if time.monotonic() - self.last_save > self.session.args.save_minutes * 60:
            self.save(("checkpoint.pt",))
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        # any rank's signal stops them all, at the same step
        if distributed.sum_over_ranks(self.signal or 0, self.trainer.device):
            self.stop()

    def stop(self) -> None:
        """Save, say how to go on, and leave."""
        self.busy = True
        self.save(("checkpoint.pt",))
        if distributed.is_main():
            print(f"\nstopped: the state is in {self.session.folder / 'checkpoint.pt'}. Go on with:")
            # the run's own flags come back with it
            words = [*distributed.launcher(), sys.argv[0], "--resume", str(self.session.folder)]
            print("  " + shlex.join(words), flush=True)
        raise Stopped(128 + (self.signal or signal.SIGTERM))

    def note_nan(self, images: list[int]) -> None:
        split, progress = self.session.splits["train"], self.trainer.progress
        numbers = sum(distributed.gather_objects(images), [])
        names = [{"id": split.images[i].id, "file": str(split.images[i].path)} for i in numbers]
        self.nan_batches.append({"epoch": progress.epoch + 1, "step": progress.step, "images": names})
        if distributed.is_main():
            file = self.session.folder / "nan_batches.json"
            with self.session.run.optional(f"writing {file}"):
                write_json(file, self.nan_batches)
            warn(f"the loss of step {progress.step} is not finite: skipped, its images are in nan_batches.json")
        if progress.nan_steps >= NAN_STEPS:
            raise UserError(
                f"{NAN_STEPS} steps in a row had no finite loss. The best checkpoints so far are kept in "
                f"{self.session.folder}. Try a lower --lr, or --amp off"
            )

    def keep_best(self, epoch: int, scores: dict[str, dict], metric: str) -> bool:
        """Write best.pt (and stage 1's best of each kind) where an epoch's scores ask for it; True for a new best."""
        kind, name = metric.split("/")
        gained = False
        for weights, summary in scores.items():
            value = summary[kind][name]
            files = []
            if weights not in self.each or (value is not None and value > self.each[weights]):
                self.each[weights] = -1.0 if value is None else value
                files += [f"checkpoint_best_{weights}.pth"] if self.session.kind == "detector" else []
            story = {"epoch": epoch, "metric": metric, "value": value, "weights": weights}
            none_yet = self.best is None or value is self.best["value"] is None
            again = story == self.best  # adopted by take_newer_best
            if none_yet or again or (value or 0.0) > (self.best["value"] or 0.0):
                gained = True
                self.best = story
                files.append("best.pt")
            if files and distributed.is_main():
                model = self.trainer.model if weights == "regular" else self.trainer.ema.module
                content = self.pack(model.state_dict()) | {"weights": weights, "epoch": epoch, "scores": summary}
                for file in files:
                    checkpoint.save(self.session.folder / file, content)
        return gained


def check_history(state: dict) -> None:
    """Raise ValueError where a checkpoint's `training` has no history of scores as Keeper.state() writes it."""
    best, each = state["best"], state["each"]
    problems = state.get("nan_batches", [])
    if best is not None and not is_story(best):
        raise ValueError("its best epoch is none")
    if not all(name in ("regular", "ema") and type(value) is float for name, value in each.items()):
        raise ValueError("its best scores are no numbers")
    if type(state["epochs_without_gain"]) is not int or not 0 <= state["epochs_without_gain"] < 2**31:
        raise ValueError("its epochs without gain are no count")
    if type(problems) is not list or not all(type(problem) is dict for problem in problems):
        raise ValueError("its steps without a finite loss are no list")
    if not all(type(value) in (int, float) for value in state["scaler"].values()):
        raise ValueError("its gradient scale is no number")


def is_story(best: object) -> bool:
    """Whether this is what Keeper.best holds: {"epoch", "metric", "value", "weights"}."""
    if type(best) is not dict or best.keys() != {"epoch", "metric", "value", "weights"}:
        return False
    value, epoch = best["value"], best["epoch"]
    named = best["metric"] in ("bbox/mAP", "segm/mAP") and best["weights"] in ("regular", "ema")
    scored = value is None or type(value) is float and 0 <= value <= 1
    return named and scored and type(epoch) is int and 0 < epoch < 2**31


def best_story(file: Path, metric: str, epoch: int) -> dict | None:
    """What a best file says of itself, in the form of Keeper.best; None where it is of epoch `epoch` or before, is
    missing, or tells nothing."""
    if not file.exists():
        return None
    kind, name = metric.split("/")
    try:
        content = checkpoint.load(file)
        value = content["scores"][kind][name]
        story = {"epoch": content["epoch"], "metric": metric, "value": value, "weights": content["weights"]}
    except (UserError, KeyError, TypeError) as error:
        warn(f"{file} tells no score ({error}): the next best epoch replaces it")
        return None
    return story if is_story(story) and story["epoch"] > epoch else None


def fit(
    session: Session, trainer: Trainer, loader: Iterable, judge: Judge, pack: Callable[[dict], dict]
) -> dict | None:
    """Train to the last epoch; after each, evaluate, save and write metrics.json.  Returns the best epoch's entry.

    loader: batches in the order of its `batch_sampler`, an EpochSampler; judge scores the trained module; `pack` as in
    Keeper. The best is chosen by valid bbox/mAP for a detector, by segm/mAP where masks are trained.
    """
    args, progress = session.args, trainer.progress
    patience = args.patience or (PATIENCE if getattr(args, "early_stopping", False) else 0)
    train = session.splits["train"]
    own = {"args": plain_args(args), "left_out": train.left_out, "exif": train.exif, "trained_on": trained_on(session)}
    keeper = Keeper(session, trainer, lambda state: pack(state) | own)
    if args.resume_from:
        keeper.restore(args.resume_from)
        keeper.take_newer_best()
        if session.run:
            session.run.set(best=keeper.best)
            tick(f"Going on with {session.folder} in epoch {progress.epoch + 1}, after {progress.step_in_epoch} steps")
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
    hashes = torch.tensor(session.splits["train"].samples, dtype=torch.int64)
    before = [] if session.trained_on is None else [session.trained_on]
    return torch.cat([hashes, *before]).unique()


@dataclass(frozen=True)
class Awaited:
    """A loader that lets its run's keeper know while a batch is waited for."""

    loader: Iterable
    keeper: Keeper

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while True:
            self.keeper.waiting = True
            try:
                batch = next(batches, None)
            finally:
                self.keeper.waiting = False
            if batch is None:
                return
            yield batch


def train_and_judge(keeper: Keeper, loader: Iterable, judge: Judge) -> None:
    """One epoch, or what is left of it, with its entry in metrics.json and TensorBoard, its checkpoints and pictures.

    Raises UserError where the first epoch has taught nothing.
    """
    session, trainer, progress, run = keeper.session, keeper.trainer, keeper.trainer.progress, keeper.session.run
    args, epoch = session.args, progress.epoch + 1
    loader.batch_sampler.set_epoch(progress.epoch, progress.step_in_epoch)
    record = {"epoch": epoch, "train": train_one_epoch(trainer, Awaited(loader, keeper), keeper.after_step)}
    progress.unread = sorted(set().union(*distributed.gather_objects(progress.unread)))
    check_unread(progress.unread, session.splits["train"])
    record["train"]["skipped_images"] = len(progress.unread)
    check_matches(keeper, record)
    gained = None
    if epoch % args.eval_every == 0 or epoch == args.epochs:
        gained = evaluate_epoch(keeper, judge, record, "bbox/mAP" if session.kind == "detector" else "segm/mAP")
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


def check_matches(keeper: Keeper, record: dict) -> None:
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


def evaluate_epoch(keeper: Keeper, judge: Judge, record: dict, metric: str) -> bool:
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
            f"{record['train']['images_per_s']:.1f} images/s" + (f"  new best ({weights} weights)" if gained else "")
        )
        print(format_table(scores[weights]), flush=True)
    return gained


def draw_pictures(session: Session, judge: Judge, trainer: Trainer, best: dict, epoch: int) -> None:
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
    words = ["--checkpoint", session.folder / "best.pt", "--input", images[0].path.parent, "--output", "predictions"]
    return shlex.join(["python", "predict.py", *map(str, words)])


def finish(session: Session, table: ClassTable, masks: bool, next_command: str) -> None:
    """Score the test split with the best weights, say where the files are, and what to type next."""
    if "test" in session.splits:
        # rank 0 may still be writing it, and on another machine's disk
        best = distributed.from_main(checkpoint.load(session.folder / "best.pt") if distributed.is_main() else None)
        model, _ = checkpoint.build_model(best)
        scores = judge_of(session, "test", table, masks)(model.to(session.device))
        if distributed.is_main():
            print(f"test split\n{format_table(scores)}")
            session.run.set(test=scores)
    if distributed.is_main():
        tick(f"Done. Files: {session.folder} (best.pt, last.pt, metrics.json, tb/, predictions/)")
        print(f"Look at the curves:  tensorboard --logdir {shlex.quote(str(session.folder))}")
        print(f"Next:  {next_command}", flush=True)
    distributed.stop()
