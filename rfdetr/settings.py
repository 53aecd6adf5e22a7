"""Every setting of the training scripts, once: default, bounds, unit and help.

Those of the other scripts are in `tool_settings.py`.

Flags, `--config FILE.yaml`, a run's config.yaml and what a checkpoint keeps are made from these
fields. They are resolved once (`resolve.py`): the size's recipe < the file < a resumed run's own <
the command line; a batch that is left open once the device is known (`on_device`). Afterwards
nothing changes them: what a run finds out (how many images fit at once, where its cache lies) is
the run's state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from rfdetr.console import UserError
from rfdetr.fields import (
    OF_SIZE,
    batch_of,
    by_size,
    checkpoint_file,
    choice,
    decimal,
    for_this_command,
    gray_range,
    integer,
    path,
    switch,
    text,
    texts,
    tile_of,
)
from rfdetr.sizes import AUGMENTS, SIZES, LossWeights, ModelSize, check_resolution, with_queries

EXIF = ("apply", "ignore")
AMP = ("auto", "bf16", "fp16", "off")
TWO_STARTS = "--backbone_weights is a start without a detector: leave out the other file of weights"
EARLY_STOPPING_PATIENCE = 10  # evaluations without gain, where no --patience is named

VAL_FRACTION = 0.1  # of train/ that is advised where there is no valid/
TILE_OVERLAP = 0.3  # where neither a flag nor a checkpoint says otherwise
MOST_TILE_OVERLAP = 0.9  # tiles grow in number without end towards 1

OWN_RESOLUTION = by_size({name: size.resolution for name, size in SIZES.items()})
OWN_QUERIES = by_size({name: size.queries for name, size in SIZES.items()})
OWN_LETTERBOX = by_size({name: size.recipe.letterbox for name, size in SIZES.items()})
WARM_UP = by_size({name: size.recipe.warmup_steps for name, size in SIZES.items()})


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images."""

    dataset: Path = path(Path("dataset"), "COCO-format folder")
    val_fraction: float | None = decimal(
        None, "without valid/: split this share off train/ (default: none)", low=0.001, high=0.9
    )
    exif: str | None = choice(
        None, "orientation of images whose size does not tell (default: apply)", EXIF
    )
    gray: str | float | None = gray_range("auto")
    rename: tuple[str, ...] = texts(
        (), 'call classes otherwise: "Date=date" where valid says Date, train date', "OLD=NEW"
    )


def overlap_of(default_means: str):
    """--tile_overlap; default_means: what is done where it is not given."""
    help = f"share of a tile that the next one shows, too (default: {default_means})"
    return decimal(None, help, high=MOST_TILE_OVERLAP)


def tile_full_of(default_means: str):
    """--tile_full; default_means: as in overlap_of."""
    return switch(None, f"with tiles: look at the whole image, too (default: {default_means})")


def training_tile_of(default_means: str):
    """--tile of a training; default_means: what is done where it is not given."""
    return tile_of(
        "train on tiles of so many pixels of larger images; auto: by the objects' sizes; 0: on "
        f"whole images (default: {default_means})"
    )


@dataclass(frozen=True, kw_only=True)
class TileSettings:
    """Large images in parts."""

    tile: int | str | None = training_tile_of("whole images")
    tile_overlap: float | None = overlap_of(str(TILE_OVERLAP))
    tile_full: bool | None = tile_full_of("0")


def letterbox_of(default_means: str):
    """--letterbox; default_means: what is done where it is not given."""
    return switch(
        None,
        "1: images keep their proportions, in the middle of the model's square input; 0: they are "
        f"resized to it (default: {default_means})",
    )


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(TileSettings, DataSettings):
    """What the three training scripts have in common."""

    stage: ClassVar[str]  # "detector", "segmentation" or "single"
    script: ClassVar[str]
    run_stem: ClassVar[str]  # the run folder's first words
    title: ClassVar[str]
    metric: ClassVar[str]  # the best epoch is chosen by it
    recipe_prefix: ClassVar[str] = ""  # of the fields of Recipe that this stage has of its own

    size: str = choice("nano", "model size", SIZES)
    output_dir: Path | None = for_this_command(
        path(None, "run folder (default: the next free number under runs/)")
    )
    device: str = text("auto", "auto, cpu, cuda, cuda:1, mps")
    resolution: int | None = integer(None, f"input side in pixels (default: {OWN_RESOLUTION})")
    letterbox: bool | None = letterbox_of(OWN_LETTERBOX)
    epochs: int = integer(OF_SIZE, "passes over the training images")
    batch: int | str | None = batch_of({name: size.recipe.batch for name, size in SIZES.items()})
    accum: int = integer(OF_SIZE, "forward passes per optimizer step", high=65536)
    workers: int = integer(OF_SIZE, "loader processes", low=0, high=256)
    weight_decay: float = decimal(OF_SIZE, "AdamW's weight decay")
    multi_scale: bool = switch(OF_SIZE, "draw the input side anew for each step")
    expanded_scales: bool = switch(False, "a wider range of sides")
    lr_scheduler: str = choice(
        "cosine", "how the learning rates fall", ("cosine", "step", "constant")
    )
    warmup_epochs: float | None = decimal(
        None, f"epochs of linear warm-up (default, in steps: {WARM_UP}; at most a tenth of all)"
    )
    amp: str = choice(OF_SIZE, "mixed precision (auto: the size's own)", AMP)
    ema: bool = switch(True, "keep an average of the weights, scored as well")
    patience: int = integer(
        0, "stop after this many evaluations without gain (0: as --early_stopping says)", low=0
    )
    early_stopping: bool = switch(
        False, f"stop after {EARLY_STOPPING_PATIENCE} evaluations without gain, or --patience"
    )
    min_steps: int = integer(
        OF_SIZE, "repeat small datasets until an epoch has this many steps", high=10**6
    )
    augment: str = choice(OF_SIZE, "how training images are varied", AUGMENTS)
    flip: bool = switch(True, "0: mirror no image, whatever --augment does")
    repeat_factor: float | None = decimal(
        None,
        "show images of classes that fewer than this share of the images has more often, as LVIS "
        "does (default: all alike)",
        low=1e-6,
        high=1.0,
    )
    negatives: float | None = decimal(
        None, "share of images without objects in an epoch (default: as they are)", high=0.9
    )
    eval_every: int = integer(1, "epochs between evaluations (the last is always evaluated)")
    save_minutes: float = decimal(5.0, "minutes between saves inside an epoch")
    seed: int = integer(0, "of every random number", low=0)
    tensorboard: bool = switch(True, "write tb/")
    run_test: bool = switch(False, "score the test split at the end")
    resume: str | None = for_this_command(
        text(None, "go on with a run folder, or the newest (auto)", metavar="RUN"), bare="auto"
    )
    fast_dev_run: int | None = for_this_command(
        integer(None, "one epoch of N steps: does it run?"), bare=2
    )

    @property
    def model_size(self) -> ModelSize:
        """The one object of the model's numbers in a run."""
        return SIZES[self.size]

    @property
    def effective_batch(self) -> int:
        """Images of an optimizer step, on one rank."""
        return self.accum * (self.batch if isinstance(self.batch, int) else self.recipe_batch)

    @property
    def recipe_batch(self) -> int:
        """Images in one forward pass as the size's recipe has them."""
        return self.recipe_value(self.model_size, "batch")

    @classmethod
    def recipe_value(cls, size: ModelSize, name: str) -> object:
        """A setting in a size's recipe; what this stage has of its own there goes first."""
        usual = getattr(size.recipe, name, None)
        return getattr(size.recipe, cls.recipe_prefix + name, usual)

    def on_device(self, kind: str) -> TrainingSettings:
        """With the batch that was left open; kind: the device's type, "cuda"."""
        if self.batch is not None:
            return self
        return replace(self, batch="auto" if kind == "cuda" else self.recipe_batch)

    @property
    def stop_after(self) -> int:
        """Evaluations without gain that end the run; 0: none do."""
        return self.patience or (EARLY_STOPPING_PATIENCE if self.early_stopping else 0)

    def checked(self) -> TrainingSettings:
        """With what follows from other values filled in; raises UserError where two do not fit."""
        resolution = check_resolution(self.model_size, self.resolution)
        return replace(self, resolution=resolution, epochs=self.epochs_to_train)

    @property
    def epochs_to_train(self) -> int:
        return 1 if self.fast_dev_run else self.epochs


@dataclass(frozen=True, kw_only=True)
class DetectorTraining(TrainingSettings):
    """What trains a detector has in common: stage 1 and the single stage."""

    lr: float = decimal(OF_SIZE, "learning rate")
    lr_encoder: float = decimal(OF_SIZE, "the encoder's learning rate")
    grad_checkpoint: bool = switch(False, "less memory, more time")
    freeze_encoder: bool = switch(False, "train what is behind it")
    compile: bool = switch(False, "torch.compile the encoder: slow start, then fast")
    pretrain_weights: str = text(
        "auto", "where to start: the size's official file (auto)", metavar="auto|none|PATH|URL"
    )
    backbone_weights: Path | None = path(
        None, "instead: DINOv2 alone, in the Hugging Face layout", metavar="PATH"
    )
    pretrain_exclude_keys: tuple[str, ...] = texts((), "tensors not to load", metavar="GLOB")
    num_queries: int | None = integer(
        None, f"queries per image (default: {OWN_QUERIES})", high=10_000
    )
    num_select: int | None = integer(
        None, "detections kept per image (default: as many as queries)", high=10_000
    )

    def checked(self) -> DetectorTraining:
        if self.backbone_weights and self.pretrain_weights not in ("auto", "none"):
            raise UserError(TWO_STARTS)
        return super().checked()

    @property
    def model_size(self) -> ModelSize:
        return with_queries(SIZES[self.size], self.num_queries, self.num_select)


@dataclass(frozen=True, kw_only=True)
class DetectorSettings(DetectorTraining):
    """train_detector_stage1.py"""

    stage = "detector"
    script = "train_detector_stage1.py"
    run_stem = "detector"
    title = "STAGE 1: DETECTOR TRAINING"
    metric = "bbox/mAP"

    drop_path: float = decimal(OF_SIZE, "encoder: share of blocks skipped at random", high=0.9)
    head: str = choice("coco91", "rows of the class head", ("coco91", "dataset"))

    @property
    def loss_weights(self) -> LossWeights:
        return LossWeights()


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """What both ways to train masks have in common."""

    masks: str = choice(
        "auto",
        "given: drawn masks alone; boxes: guess the missing ones from the boxes; "
        "auto: guess where there is none at all",
        ("auto", "given", "boxes"),
    )


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings(MaskSettings, TrainingSettings):
    """train_seg_stage2.py"""

    stage = "segmentation"
    script = "train_seg_stage2.py"
    run_stem = "segmentation"
    title = "STAGE 2: SEGMENTATION HEAD TRAINING"
    metric = "segm/mAP"
    recipe_prefix = "seg_"

    gray: str | float | None = gray_range("as the detector's images")
    tile: int | str | None = training_tile_of("as the detector")
    tile_overlap: float | None = overlap_of("as the detector")
    tile_full: bool | None = tile_full_of("as the detector")
    resolution: int | None = integer(None, "input side in pixels (default: the detector's)")
    letterbox: bool | None = letterbox_of("as the detector")
    batch: int | str | None = batch_of({n: size.recipe.seg_batch for n, size in SIZES.items()})
    stage1_run: Path | None = path(None, "run folder of stage 1")
    checkpoint: Path | None = checkpoint_file(
        None, "detector to freeze (default: the run's best.pt, else last.pt)"
    )
    seg_lr: float = decimal(OF_SIZE, "learning rate of the mask head")
    mask_loss_coef: float = decimal(LossWeights.mask, "weight of the mask's BCE")
    dice_loss_coef: float = decimal(LossWeights.dice, "weight of the mask's dice loss")
    mask_head: str = choice("auto", "auto: the size's own", ("auto", "nano", "standard"))
    cache: str = choice("auto", "where the frozen features go", ("auto", "ram", "disk", "off"))
    cache_views: int = integer(OF_SIZE, "flips of each image that are cached", high=4)
    keep_cache: bool = switch(True, "on disk, for later runs")
    auto_shrink: bool = switch(False, "cut the class head here")
    early_stopping: bool = switch(
        True, f"stop after {EARLY_STOPPING_PATIENCE} evaluations without gain, or --patience"
    )

    @property
    def loss_weights(self) -> LossWeights:
        return LossWeights(mask=self.mask_loss_coef, dice=self.dice_loss_coef)

    def checked(self) -> SegmentationSettings:
        if self.resolution:
            return super().checked()
        return replace(self, epochs=self.epochs_to_train)


@dataclass(frozen=True, kw_only=True)
class SingleSettings(MaskSettings, DetectorTraining):
    """train_seg_single_stage.py"""

    stage = "single"
    script = "train_seg_single_stage.py"
    run_stem = "seg_single"
    title = "STAGE 1+2: SINGLE-STAGE TRAINING"
    metric = "segm/mAP"
    recipe_prefix = "single_"

    letterbox: bool | None = letterbox_of(f"as --init_ckpt; without it {OWN_LETTERBOX}")
    warmup_epochs: float = decimal(0.0, "epochs of linear warm-up")
    init_ckpt: Path | None = checkpoint_file(
        None, "start from this checkpoint instead of --pretrain_weights"
    )
    cls_loss_coef: float = decimal(LossWeights.cls, "weight of the classes' loss")
    bbox_loss_coef: float = decimal(LossWeights.bbox, "weight of the boxes' L1 loss")
    giou_loss_coef: float = decimal(LossWeights.giou, "weight of the boxes' GIoU loss")
    mask_loss_coef: float = decimal(OF_SIZE, "weight of the mask's BCE")
    dice_loss_coef: float = decimal(OF_SIZE, "weight of the mask's dice loss")

    def checked(self) -> SingleSettings:
        if self.backbone_weights and self.init_ckpt:
            raise UserError(TWO_STARTS)
        return super().checked()

    @property
    def loss_weights(self) -> LossWeights:
        return LossWeights(
            cls=self.cls_loss_coef,
            bbox=self.bbox_loss_coef,
            giou=self.giou_loss_coef,
            mask=self.mask_loss_coef,
            dice=self.dice_loss_coef,
        )


STAGES: dict[str, type[TrainingSettings]] = {
    kind.stage: kind for kind in (DetectorSettings, SegmentationSettings, SingleSettings)
}
