"""Checkpoints: written atomically, loaded safely, self-contained.

A checkpoint is a plain dict of tensors and Python values: format, stage, size (every field of
ModelSize), resolution, classes (a ClassTable), mask_head (name or None), args, model (state dict),
exif ("apply" or "ignore": how its images were read), gray (a GrayScale's to_dict, or None: gray of
more than 8 bits by its bits), guessed_masks (whether masks were learnt from guesses), trained_on
(int64: the content hashes of its training images), mask_stride and mask_standardise (with a mask
head of ours, its HeadForm), image_side (a typical training image's, in pixels), tile (the side of
the tiles that it was trained on; 0 for none), tile_overlap and tile_full (as the flags), letterbox
(whether images kept their proportions), and in last.pt and checkpoint.pt ema and training (all that
--resume needs). Files of earlier versions lack what stands from exif to letterbox.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError  # comes with timm
from safetensors.torch import load_file
from torch import Tensor, nn

from rfdetr import classes
from rfdetr.classes import ClassTable
from rfdetr.console import UserError
from rfdetr.data.gray import GrayScale
from rfdetr.files import atomic_write
from rfdetr.models import segmentation
from rfdetr.models.detector import Detector
from rfdetr.runs.places import find_checkpoint, require_file
from rfdetr.settings import EXIF, STAGES
from rfdetr.sizes import ModelSize, check_resolution, size_from_dict
from rfdetr.weights.archive import read_file, require_finite, require_plain
from rfdetr.weights.fitting import load_pretrained, shape_differences
from rfdetr.weights.official import from_dinov2
from rfdetr.weights.package import from_lightning, from_package

FORMAT = 1
MASK_HEADS = (None, *segmentation.MASK_HEADS, "official")
EARLIER_STRIDE = 4  # of mask heads whose file does not name theirs
MOST_IMAGE_SIDE = 10**6  # pixels
MOST_QUERIES = 200_000  # of all groups: more would cost all memory
MOST_ENLARGED = 4  # times the side of a file's position grid; more has to be asked for


def save(path: Path, content: dict) -> None:
    """Write a checkpoint so that `path` holds either the old file or the whole new one.

    Raises UserError where the disk refuses (torch.save turns a full disk into a RuntimeError).
    """
    atomic_write(Path(path), lambda file: torch.save(content, file))


def load(path: Path) -> dict:
    """Read one of our checkpoints or a file of the official package onto the CPU; of a run's folder
    its best.pt.

    Torch's safe loading reads it. The package's files, published or fine-tuned ({"model", "args",
    ...}, or Lightning's {"state_dict", ...}), come back with our parameter names and a class table.
    Raises UserError for a file that is missing, damaged, asks for anything but tensors and plain
    values, or has NaN or infinite weights.
    """
    path = find_checkpoint(Path(path))
    content = read_file(path)
    try:
        if isinstance(content.get("state_dict"), dict):
            content = from_lightning(content)
        if not isinstance(content.get("model"), dict):
            raise UserError(f"{path} is no checkpoint: it has no 'model' with weights")
        require_plain(content["model"])
        if "format" not in content:
            content = {"format": FORMAT} | from_package(content, path)
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, this version reads {FORMAT}")
        _check(content)
        require_finite(content, path)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # a foreign file can make code that expects one of ours raise anything
        raise UserError(
            f"{path} is no checkpoint of this program ({type(error).__name__}: {error})"
        ) from error
    return content


def _check(content: dict) -> None:
    """Raise an error where the content is not what `make_content` and a run write.

    This comes before a model is built, so that a damaged file cannot take all memory.
    """
    required = {"stage": str, "size": dict, "resolution": int, "classes": dict}
    optional = {"args": dict, "ema": dict, "left_out": list, "letterbox": bool}
    wrong = [key for key, kind in required.items() if not isinstance(content.get(key), kind)]
    for key, kind in optional.items():
        value = content.get(key)
        if value is not None and not isinstance(value, kind):
            wrong.append(key)
    if wrong:
        raise ValueError(f"missing or of another type: {', '.join(wrong)}")
    model = content["model"]
    ema = content.get("ema") or {}
    require_plain(ema)
    require_plain({"trained_on": trained_on(content)})
    for name in ("tile", "image_side"):
        side = content.get(name)
        if side is not None and not (type(side) is int and 0 <= side <= MOST_IMAGE_SIDE):
            raise ValueError(f"{name} is no number of pixels")
    if content.get("tile_full") not in (None, False, True):
        raise ValueError("tile_full is neither True nor False")
    if type(content.get("tile_overlap", 0.0)) not in (int, float):
        raise ValueError("tile_overlap is no number")
    if content.get("exif") not in (None, *EXIF):
        raise ValueError(f"exif is neither {' nor '.join(EXIF)}")
    gray_of(content)
    if content["stage"] not in STAGES or content.get("mask_head") not in MASK_HEADS:
        raise ValueError("its stage or mask head is unknown")
    form = mask_form(content)
    if form.stride not in segmentation.STRIDES or type(form.standardise) is not bool:
        raise ValueError("its mask head's form is unknown")
    size = size_from_dict(content["size"])
    too_many_layers = size.depth + size.decoder_layers > len(model)
    if too_many_layers or size.queries * size.recipe.group_detr > MOST_QUERIES:
        raise ValueError("its size is absurd")
    differences = shape_differences(size, model)
    if differences:
        raise ValueError(
            f"{len(differences)} tensors are not of its size: {'; '.join(differences[:3])}"
        )
    rows_total = table_of(content).rows_total
    for name, tensor in [*model.items(), *ema.items()]:
        if classes.is_class_head(name) and len(tensor) != rows_total:
            raise ValueError(f"{name} has {len(tensor)} rows, its class table has {rows_total}")
    check_resolution(size, content["resolution"])


def input_side(content: dict, resolution: int | None, path: Path) -> int:
    """The input side in pixels: `resolution` where it was asked for, else the checkpoint's own.

    Raises UserError where it does not fit the size, and for a file that by itself asks for a side
    far beyond its position grid: a few changed bytes would cost all memory.
    """
    size = size_from_dict(content["size"])
    own = content["resolution"]
    grid_side = max(size.position_grid * size.patch, size.block)
    if resolution is None and own > MOST_ENLARGED * grid_side:
        raise UserError(
            f"{path} asks for {own} x {own} pixels, and its position grid is for {grid_side} x "
            f"{grid_side}: that takes much memory and time. If it was trained at this resolution, "
            f"add --resolution {own}"
        )
    return check_resolution(size, resolution or own)


def load_backbone(path: Path, patch: int) -> dict:
    """DINOv2's weights alone, in the Hugging Face layout, as a checkpoint without classes.

    Reads .safetensors, or torch's .bin. Patch kernels are resampled to `patch` pixels.
    Raises UserError for another layout.
    """
    require_file(path)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else read_file(path)
        require_plain(state)
        require_finite({"model": state}, path)
        own = from_dinov2(state, patch)
    except (SafetensorError, OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise UserError(f"cannot read the backbone weights {path}: {error}") from error
    if not own:
        raise UserError(
            f"{path} does not hold DINOv2 in the Hugging Face layout (encoder.layer.0.norm1.weight "
            f"...), but {', '.join(list(state)[:3])} ... Take model.safetensors of "
            "facebook/dinov2-small (large: dinov2-base)"
        )
    return {"model": own, "classes": ClassTable((), (), (), 0, None).to_dict()}


def require_size(content: dict, size: ModelSize, path: Path) -> None:
    """Raise UserError where the checkpoint is of another size, naming the one that fits."""
    own = content["size"]["name"]
    if own != size.name:
        differences = shape_differences(size, content["model"])
        raise UserError(
            f"{path} is a {own} checkpoint, --size is {size.name}: run again with --size {own} "
            f"({len(differences)} tensors differ, the first {'; '.join(differences[:3])})"
        )


def trained_on(content: dict) -> Tensor:
    """Sorted content hashes (image_files.content_hash), int64, of the images of its training.

    Empty where they are not known.
    """
    hashes = content.get("trained_on")
    if hashes is None:
        return torch.empty(0, dtype=torch.int64)
    if not isinstance(hashes, Tensor) or hashes.dtype != torch.int64 or hashes.ndim != 1:
        raise ValueError("its trained_on is no list of hashes")
    return hashes


def gray_of(content: dict) -> GrayScale | None:
    """How gray of more than 8 bits was read in training; None: by its bits.

    Raises an error where it is damaged.
    """
    values = content.get("gray")
    return None if values is None else GrayScale.from_dict(values)


def table_of(content: dict) -> ClassTable:
    """The checkpoint's class table.  Raises ValueError or TypeError where it is damaged."""
    return ClassTable.from_dict(content["classes"])


def build_model(content: dict, groups: int | None = 1) -> tuple[Detector, ClassTable]:
    """The model of a checkpoint, in eval mode with all its weights, and its class table.

    `groups`: query groups to keep, the first ones (1 is all that inference needs); None keeps the
    size's own number. Raises UserError where a tensor is missing, unknown or misshapen.
    """
    size = size_from_dict(content["size"])
    table = table_of(content)
    model = Detector(
        size,
        table.rows_total,
        table.background_last,
        content["mask_head"],
        groups,
        mask_form=mask_form(content),
    )
    report = load_pretrained(model, content["model"], [])
    misshapen = [f"{name}: {reason}" for name, reason in report.skipped.items()]
    problems = report.missing + misshapen + report.unexpected
    if problems:
        shown = "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else "")
        raise UserError(
            f"the checkpoint does not fit the model, {len(problems)} tensors differ: {shown}"
        )
    return model.eval(), table


def fingerprint(module: nn.Module) -> str:
    """sha256 over the module's tensors, buffers included, by name and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def mask_form(content: dict) -> segmentation.HeadForm:
    """The form of a checkpoint's mask head."""
    stride = content.get("mask_stride", EARLIER_STRIDE)
    return segmentation.HeadForm(stride, content.get("mask_standardise", False))


def make_content(
    stage: str,
    size: ModelSize,
    resolution: int,
    table: ClassTable,
    mask_head: str | None,
    state: dict,
    mask_form: segmentation.HeadForm | None = None,
) -> dict:
    """What every checkpoint of ours holds; a run adds its args.

    mask_form: None is that of new heads.
    """
    content = {
        "format": FORMAT,
        "stage": stage,
        "size": asdict(size),
        "resolution": resolution,
        "classes": table.to_dict(),
        "mask_head": mask_head,
        "model": state,
    }
    if mask_head in segmentation.MASK_HEADS:
        form = mask_form or segmentation.new_form(size.hidden)
        content["mask_stride"] = form.stride
        content["mask_standardise"] = form.standardise
    return content


def shrink(content: dict, keep: list[str]) -> dict:
    """A checkpoint with class heads that have a row for each class of `keep` and a background row.

    EMA weights are cut like the others. Rows are copied bit for bit in the order of `keep`, the
    background's last. Raises UserError for unknown names.
    """
    kept = classes.keep_classes(table_of(content), keep)
    rows = [*kept.rows, classes.background_row(table_of(content))]
    shrunk = {key: value for key, value in content.items() if key not in ("training", "official")}
    for key in ("model", "ema"):
        if content.get(key):
            shrunk[key] = classes.keep_class_rows(content[key], rows)
    table = classes.assign_rows(keep, list(kept.ids), "dataset")
    return shrunk | {"classes": table.to_dict()}
