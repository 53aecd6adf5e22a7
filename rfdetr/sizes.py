"""The model sizes, the only home of every number of an architecture and its recipe."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from rfdetr.console import UserError

AUGMENTS = ("none", "flips", "crops", "dihedral", "mosaic", "strong", "microscopy", "aerial")
MOST_PIXELS = 4096  # side of an input, beyond which no memory suffices


@dataclass(frozen=True)
class LossWeights:
    """What each loss counts in the sum; the mask's belong to whichever head is trained."""

    cls: float = 1.0
    bbox: float = 5.0
    giou: float = 2.0
    mask: float = 1.0
    dice: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Training defaults of a size; each is a flag's default or documented beside it."""

    epochs: int = 50
    batch: int = 4
    accum: int = 4
    lr: float = 1e-4
    lr_encoder: float = 1.5e-4
    lr_layer_decay: float = 0.8  # encoder: each block's rate is this times the next one's
    lr_decoder_factor: float = 0.7  # decoder layers; the encoder gets it squared
    weight_decay: float = 1e-4
    clip: float = 0.1
    warmup_steps: int = 100
    flat_fraction: float = 0.0  # share of the steps at the full rate before the cosine begins
    lr_min_factor: float = 0.0
    ema_decay: float = 0.993
    group_detr: int = 13
    augment: str = "crops"  # one of AUGMENTS, which data/augment.py has
    amp: str = "auto"
    drop_path: float = 0.0
    letterbox: bool = False  # the published weights have seen resized images alone
    multi_scale: bool = True
    workers: int = 2
    # a small dataset is repeated until an epoch has this many optimizer steps: 1,000 in 50 epochs
    min_steps: int = 20
    # stage 2, the mask head on the frozen detector
    seg_epochs: int = 50
    seg_batch: int = 4
    seg_accum: int = 2
    seg_lr: float = 1e-3
    seg_weight_decay: float = 1e-4
    seg_multi_scale: bool = False
    seg_min_steps: int = 20
    seg_clip: float = 1.0
    cache_views: int = 2  # flips of each image whose features are kept: 2 left-right, 4 up-down too
    # single stage, both at once
    single_lr: float = 1e-4
    single_lr_encoder: float = 1.5e-4
    single_mask_loss_coef: float = LossWeights.mask
    single_dice_loss_coef: float = LossWeights.dice


@dataclass(frozen=True)
class ModelSize:
    """One size of the RF-DETR family.

    Sides are in pixels unless said otherwise. `feature_layers` counts blocks: 3 is the output of
    the third block; the blocks with the 0-based same numbers attend globally, all others inside
    windows (windows x windows of them).
    Source of the numbers: PyPI rfdetr 1.11, config.py and model_weights.py.
    """

    name: str
    resolution: int
    patch: int
    windows: int
    dim: int
    heads: int
    position_grid: int  # side of the stored position embedding, in patches
    feature_layers: tuple[int, ...]
    decoder_layers: int
    depth: int = 12
    mlp_ratio: float = 4.0
    levels: tuple[str, ...] = ("P4",)
    hidden: int = 256
    self_heads: int = 8
    cross_heads: int = 16
    points: int = 2
    feedforward: int = 2048
    queries: int = 300
    select: int = 300  # detections kept per image
    standardise: bool = False  # per image and channel, inside the backbone
    mask_head: str = "standard"  # or "nano"; "official": the published head and its weights
    weights_url: str | None = None
    weights_md5: str | None = None
    recipe: Recipe = Recipe()

    def __post_init__(self):
        if self.resolution % self.block:
            raise ValueError(
                f"size {self.name}: resolution {self.resolution} is not a multiple of {self.block}"
            )
        if self.hidden % self.cross_heads or self.hidden % self.self_heads:
            raise ValueError(
                f"size {self.name}: hidden {self.hidden} is not divisible by its numbers of heads"
            )
        if max(self.feature_layers) > self.depth:
            raise ValueError(
                f"size {self.name}: feature layer {max(self.feature_layers)} of {self.depth} blocks"
            )

    @property
    def block(self) -> int:
        """Inputs are a multiple of this many pixels: patch x windows."""
        return self.patch * self.windows

    @property
    def used_depth(self) -> int:
        """Blocks that influence an output; official files have later ones, which are never run."""
        return max(self.feature_layers)

    @property
    def weights_file(self) -> str | None:
        return self.weights_url and f"rf-detr-{self.name}.pth"


WEIGHTS = "https://storage.googleapis.com/rfdetr/"

TINY = ModelSize(
    name="tiny",
    resolution=160,
    patch=8,
    windows=2,
    dim=96,
    heads=3,
    position_grid=20,
    feature_layers=(1, 2),
    decoder_layers=2,
    depth=2,
    mlp_ratio=3.0,
    hidden=96,
    self_heads=4,
    cross_heads=8,
    feedforward=256,
    queries=100,
    select=100,
    standardise=True,
    mask_head="nano",
    recipe=Recipe(
        accum=1,
        lr=1e-3,
        lr_encoder=1e-3,
        lr_layer_decay=1.0,
        lr_decoder_factor=1.0,
        warmup_steps=50,
        flat_fraction=0.6,
        lr_min_factor=0.02,
        ema_decay=0.99,
        group_detr=1,
        augment="dihedral",
        amp="off",
        multi_scale=False,
        workers=0,
        min_steps=400,
        seg_batch=8,  # half the steps of 16: mask mAP .003 lower on nuclei, .014 on the demo
        seg_accum=1,
        seg_lr=6e-3,  # 2e-3: mask mAP .005 lower on nuclei, .015 on the demo
        seg_min_steps=120,
        single_lr=1e-3,
        single_lr_encoder=1e-3,
    ),
)

BASE = ModelSize(
    name="base",
    resolution=560,
    patch=14,
    windows=4,
    dim=384,
    heads=6,
    position_grid=37,
    feature_layers=(2, 5, 8, 11),
    decoder_layers=3,
    weights_url=WEIGHTS + "rf-detr-base-coco.pth",
    weights_md5="b4d3ce46099eaed50626ede388caf979",
)

LARGE = replace(
    BASE,
    name="large",
    dim=768,
    heads=12,
    levels=("P3", "P5"),
    hidden=384,
    self_heads=12,
    cross_heads=24,
    points=4,
    weights_url=WEIGHTS + "rf-detr-large.pth",
    weights_md5="992c8e862aa733a7bb2777e45d49f1a0",
)


def _patch16(
    name: str, resolution: int, decoder_layers: int, file: str, md5: str, mask_head: str
) -> ModelSize:
    """One of the newer detectors, whose position grid is that of their resolution."""
    return ModelSize(
        name=name,
        resolution=resolution,
        patch=16,
        windows=2,
        dim=384,
        heads=6,
        position_grid=resolution // 16,
        feature_layers=(3, 6, 9, 12),
        decoder_layers=decoder_layers,
        mask_head=mask_head,
        weights_url=WEIGHTS + file,
        weights_md5=md5,
    )


def _seg(
    name: str, resolution: int, windows: int, decoder_layers: int, queries: int, file: str, md5: str
) -> ModelSize:
    """One of the published mask models."""
    return ModelSize(
        name=f"seg-{name}",
        resolution=resolution,
        patch=12,
        windows=windows,
        dim=384,
        heads=6,
        position_grid=resolution // 12,
        feature_layers=(3, 6, 9, 12),
        decoder_layers=decoder_layers,
        queries=queries,
        select=queries,
        mask_head="official",
        weights_url=WEIGHTS + file,
        weights_md5=md5,
        recipe=Recipe(single_mask_loss_coef=5.0, single_dice_loss_coef=5.0),
    )


_ALL = [
    TINY,
    _patch16(
        "nano", 384, 2,
        "nano_coco/checkpoint_best_regular.pth", "fb6504cce7fbdc783f7a46991f07639f", "nano",
    ),
    _patch16(
        "small", 512, 3,
        "small_coco/checkpoint_best_regular.pth", "fb37061c1af7bace359c91b723a8d5c1", "standard",
    ),
    _patch16(
        "medium", 576, 4,
        "medium_coco/checkpoint_best_regular.pth", "7223f764a87b863f02eb8d52bf0ce2ee", "standard",
    ),
    BASE,
    LARGE,
    _patch16(
        "large-2026", 704, 4,
        "rf-detr-large-2026.pth", "5cb72153541cbcb9aa6efa26222acc75", "standard",
    ),
    # name, resolution, windows, decoder layers, queries
    _seg("nano", 312, 1, 4, 100, "rf-detr-seg-n-ft.pth", "9995497791d0ff1664a1d9ddee9cfd20"),
    _seg("small", 384, 2, 4, 100, "rf-detr-seg-s-ft.pth", "0a2a3006381d0c42853907e700eadd08"),
    _seg("medium", 432, 2, 5, 200, "rf-detr-seg-m-ft.pth", "a49af1562c3719227ad43d0ca53b4c7a"),
    _seg("large", 504, 2, 5, 200, "rf-detr-seg-l-ft.pth", "275f7b094909544ed2841c94a677d07e"),
    _seg("xlarge", 624, 2, 6, 300, "rf-detr-seg-xl-ft.pth", "3693b35d0eea86ebb3e0444f4a611fba"),
    _seg("2xlarge", 768, 2, 6, 300, "rf-detr-seg-2xl-ft.pth", "040bc3412af840fa8a47e0ff69b552ba"),
]  # fmt: skip
SIZES: dict[str, ModelSize] = {size.name: size for size in _ALL}


def usual_size(has_gpu: bool) -> str:
    """The size for who names none: on a CPU nano takes days, tiny minutes."""
    return "nano" if has_gpu else "tiny"


def with_queries(size: ModelSize, queries: int | None, select: int | None) -> ModelSize:
    """`size` with so many queries and so many detections kept per image.

    None leaves the size's own queries, and keeps as many detections as there are queries.
    """
    return replace(size, queries=queries or size.queries, select=select or queries or size.select)


def check_resolution(size: ModelSize, resolution: int | None) -> int:
    """The input side in pixels: the size's own, or `resolution` if it fits the windows.

    Raises UserError that names the nearest sides that fit.
    """
    if resolution is None:
        return size.resolution
    block = size.block
    if resolution % block == 0 and block <= resolution <= MOST_PIXELS:
        return resolution
    most_blocks = MOST_PIXELS // block
    blocks_below = min(max(resolution // block, 1), most_blocks - 1)
    below = blocks_below * block
    raise UserError(
        f"--resolution {resolution} does not fit {size.name}: it must be a multiple of {block} "
        f"(patch {size.patch} x {size.windows} windows) up to {MOST_PIXELS}, the nearest are "
        f"{below} and {below + block}"
    )


def size_from_dict(values: dict) -> ModelSize:
    """A size from a checkpoint's plain dict.

    Raises ValueError or TypeError for unknown names and absurd values.
    """
    unknown = values.keys() - {field.name for field in fields(ModelSize)}
    if unknown:
        raise ValueError(f"unknown size fields {sorted(unknown)}")
    recipe = Recipe(**values.get("recipe", {}))
    size = ModelSize(**values | {"recipe": recipe})
    _require_plausible(size, list(SIZES.values()))
    _require_plausible(recipe, [known.recipe for known in SIZES.values()])
    return size


def _require_plausible(own: ModelSize | Recipe, known: list[ModelSize] | list[Recipe]) -> None:
    """Raise ValueError for a value of a type that no known one has, and for absurd numbers."""
    for name, value in vars(own).items():
        types = {type(getattr(one, name)) for one in known}
        entries = value if type(value) is tuple else (value,)
        absurd = any(type(entry) in (int, float) and not 0 <= entry <= 10_000 for entry in entries)
        if type(value) not in types or absurd:
            raise ValueError(f"size field {name} is {str(value)[:50]}")
