"""One run: its settings, what it finds out, and what it is trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from rfdetr import distributed
from rfdetr.classes import ClassTable, assign_rows
from rfdetr.commands import training_command
from rfdetr.console import UserError, tick, warn
from rfdetr.data.augment import find_preset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.letterbox import letterbox_for
from rfdetr.data.loaders import EpochSampler, evaluation_loader
from rfdetr.data.mask_source import images_with_drawn_masks
from rfdetr.data.records import CocoSplit
from rfdetr.data.sampling import make_mix, say_counts
from rfdetr.data.tiles import images_an_epoch, tile_problems, training_tiling
from rfdetr.device import Precision, compile_in_place
from rfdetr.inference.evaluation import SplitEvaluator
from rfdetr.models.detector import Detector
from rfdetr.models.projector import count_places
from rfdetr.resolve import plain
from rfdetr.runs.folder import given_run, new_run
from rfdetr.runs.record import Run
from rfdetr.settings import TrainingSettings
from rfdetr.sizes import ModelSize
from rfdetr.tiling import AUTO, Tiling, tell_idle_flags
from rfdetr.training.auto_batch import find_micro_batch
from rfdetr.training.engine import Progress, Trainer
from rfdetr.training.optim import has_fused_adamw, make_schedule
from rfdetr.weights import checkpoint

EVALUATION_BATCH = 16  # images, at most


@dataclass
class Session:
    """One run of a training script: its settings, and what the run finds out."""

    settings: TrainingSettings
    resumed: dict | None  # the content of the checkpoint that it goes on from
    size: ModelSize
    precision: Precision
    splits: dict[str, CocoSplit]
    digests: dict[str, str]  # split -> what its images and annotations are told by
    progress: Progress
    resolution: int | None  # side of the model's input; stage 2 takes its detector's
    trained_on: Tensor | None  # content hashes of the images that its start was trained on
    guess_masks: bool = False  # of training objects that have none
    tiling: Tiling | None = None  # of the images
    letterbox: bool = False  # whether images and tiles keep their proportions
    stage2_config: dict | None = None  # content of stage 2's own file
    folder: Path | None = None
    run: Run | None = None  # open on rank 0 alone

    @property
    def device(self) -> torch.device:
        return self.precision.device

    @property
    def images_an_epoch(self) -> int:
        """Images, or their tiles, that there are to be trained on."""
        return images_an_epoch(self.train.images, self.tiling)

    @property
    def train(self) -> CocoSplit:
        return self.splits["train"]


def warn_of_queries_without_a_place(settings: TrainingSettings) -> None:
    """Queries begin at the best places of the feature maps; more than these start from nowhere."""
    wanted = getattr(settings, "num_queries", None)
    places = count_places(settings.model_size, settings.resolution) if wanted else 0
    if wanted and wanted > places:
        warn(
            f"--num_queries {wanted}: at {settings.resolution} px there are {places} places that "
            "queries can begin at; the others find little. Give a larger --resolution"
        )


def class_table(session: Session, head: str) -> ClassTable:
    """The class head's rows: new ones (`head` as in assign_rows), or a resumed run's, in the
    dataset's order of now.

    Raises UserError where the dataset's classes are no longer the run's.
    """
    train = session.train
    if not session.resumed:
        return assign_rows(train.class_names, train.category_ids, head)
    table = checkpoint.table_of(session.resumed)
    where = f"{session.settings.dataset} (train)"
    again = training_command(plain(session.settings), session.settings.script)
    return table.in_order_of(
        train.class_names, train.category_ids, where, again, train.renames
    )


def choose_tiles(session: Session, content: dict | None = None) -> None:
    """Set the run's tiles, and say what they are.

    content: the checkpoint that a run begins with or is resumed from; what flags leave open is as
    its own tiles were. Raises UserError.
    """
    settings = session.settings
    tile = settings.tile
    known = (content or {}).get("tile")
    if known is not None and (tile is None or session.resumed and tile == AUTO):
        tile = known
    session.tiling = training_tiling(
        session.train,
        session.resolution,
        tile,
        settings.tile_overlap,
        settings.tile_full,
        content,
    )
    if session.tiling:
        images = len(session.train.images)
        tick(f"{session.tiling.told()}: {images} images are {session.images_an_epoch:,} tiles")
        for problem in tile_problems(session.train, session.tiling):
            if problem.severity == "error":
                raise UserError(problem.message)
            warn(problem.message)
    elif tile == AUTO:
        tick("--tile auto: objects are large enough in whole images")
    tell_idle_flags(session.tiling, settings.tile_overlap, settings.tile_full)


def choose_letterbox(session: Session, content: dict | None = None) -> None:
    """Set whether images keep their proportions, and say so.

    content: the checkpoint that a run begins with or is resumed from, whose way --letterbox
    changes; without one the size's recipe has it. A frozen detector's way is not to be changed.
    """
    given = session.settings.letterbox
    if content:
        session.letterbox, warning = letterbox_for(given, content)
        if warning and session.settings.stage == "segmentation":
            warn(warning)
    else:
        session.letterbox = session.size.recipe.letterbox if given is None else given
    if session.letterbox:
        tick("Letterbox: images keep their proportions, with borders of their mean colour")


def adapt_encoder(session: Session, model: Detector) -> None:
    """What --freeze_encoder and --compile ask for."""
    if session.settings.freeze_encoder:
        model.encoder.requires_grad_(False)
        frozen = sum(parameter.numel() for parameter in model.encoder.parameters())
        tick(f"Encoder frozen: {frozen:,} parameters")
    if session.settings.compile:
        compile_in_place(model.encoder, session.device)


def training_data(
    session: Session, masks: bool, sides: tuple[int, ...] = ()
) -> tuple[SplitDataset, EpochSampler]:
    """The training images and their order; each list of the sampler is one optimizer step of this
    rank.

    sides: what multi-scale draws from, if it does. Images are loaded at the largest, so that a step
    makes them smaller, never larger than what was read.
    """
    settings = session.settings
    preset = find_preset(settings.augment, settings.flip)
    side = max(sides, default=session.resolution)
    dataset = SplitDataset(
        split=session.train,
        resolution=side,
        augment=preset,
        masks=masks,
        guess=session.guess_masks,
        tiling=session.tiling,
        letterbox=session.letterbox,
    )
    if preset.paste_chance and not dataset.donors:
        tick(f"--augment {settings.augment} pastes objects by their masks: without any it does not")
    drawn = images_with_drawn_masks(session.train) if session.guess_masks else []
    sampler = EpochSampler(
        len(dataset),
        settings.effective_batch,
        settings.seed,
        settings.min_steps,
        distributed.rank(),
        distributed.world_size(),
        make_mix(
            dataset.split,
            dataset.positions_with_masks(drawn),
            settings.repeat_factor,
            settings.negatives,
        ),
    )
    if settings.fast_dev_run:
        sampler.steps = min(sampler.steps, settings.fast_dev_run)
    if settings.repeat_factor or settings.negatives is not None:
        mixes_images = dataset.preset is not None and dataset.preset.mixes_images
        say_counts(dataset.split, sampler.order()[0], mixes_images)
    return dataset, sampler


def make_trainer(
    session: Session, model: nn.Module, losses: Callable, groups: list[dict], steps: int
) -> Trainer:
    """AdamW (fused where torch has it), a gradient scaler for fp16 alone, an average of the
    weights, the schedule.

    `steps`: optimizer steps in an epoch. `losses` as in Trainer.
    """
    settings = session.settings
    recipe = session.size.recipe
    device = session.device
    progress = session.progress
    progress.count_epochs_in(steps)
    if not progress.micro_batch:
        progress.micro_batch = settings.batch
        if settings.batch == "auto":
            progress.micro_batch = find_micro_batch(
                model, losses, settings.effective_batch, session.resolution, settings.ema
            )
    progress.micro_batch = min(progress.micro_batch, settings.effective_batch)
    is_half = session.precision.dtype is torch.float16
    return Trainer(
        model=model,
        losses=losses,
        optimizer=torch.optim.AdamW(groups, fused=has_fused_adamw(device)),
        schedule=make_schedule(settings, recipe, steps),
        scaler=torch.amp.GradScaler(device.type, enabled=is_half),
        ema=ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if settings.ema else None,
        clip=recipe.seg_clip if settings.stage == "segmentation" else recipe.clip,
        device=device,
        progress=progress,
    )


def split_evaluator(
    session: Session, name: str, table: ClassTable, masks: bool, frozen: Detector | None = None
) -> SplitEvaluator:
    """What scores the trained module on one split; `frozen`: the detector behind a mask head."""
    settings = session.settings
    split = session.splits[name]
    batch = min(EVALUATION_BATCH, settings.effective_batch)
    if settings.fast_dev_run:
        images = split.images[: batch * settings.fast_dev_run]
        split = replace(split, images=images)
    dataset = SplitDataset(
        split=split,
        resolution=session.resolution,
        augment=None,
        masks=False,
        tiling=session.tiling,
        letterbox=session.letterbox,
    )
    rank = distributed.rank()
    world = distributed.world_size()
    pin = session.device.type == "cuda"
    loader = evaluation_loader(dataset, batch, settings.workers, rank, world, pin)
    return SplitEvaluator(loader, table, session.precision, masks, frozen)


def run_folder(session: Session) -> Path:
    """The folder that a run is resumed in, was given, or gets: the next free number."""
    settings = session.settings
    if session.resumed:
        return settings.output_dir
    if settings.output_dir:
        return given_run(settings.output_dir)
    return new_run(Path("runs"), f"{settings.run_stem}_{settings.size}_{session.resolution}")
