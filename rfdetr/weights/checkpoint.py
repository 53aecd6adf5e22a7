"""Checkpoints: written atomically, loaded safely, self-contained.

A checkpoint is a plain dict of tensors and Python values: format, stage, size (every field of ModelSize), resolution,
classes (a ClassTable), mask_head (name or None), args, model (state dict), exif ("apply" or "ignore": how its images
were read), trained_on (int64: the content hashes of its training images), and in last.pt and checkpoint.pt ema and
training (all that --resume needs). Files of earlier versions lack exif and trained_on.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
import struct
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import torch
from safetensors import SafetensorError  # comes with timm
from safetensors.torch import load_file
from torch import Tensor, nn

from rfdetr import classes
from rfdetr.classes import ClassTable
from rfdetr.console import UserError
from rfdetr.files import atomic_write, is_special_file
from rfdetr.models.detector import Detector
from rfdetr.sizes import SIZES, ModelSize, check_resolution, size_from_dict
from rfdetr.weights import official as convert

FORMAT = 1
MOST_ENLARGED = (
    4  # times the side that a file's position grid stands for: more is asked for with --resolution
)
SCRIPTS = {  # of each stage
    "detector": "train_detector_stage1.py",
    "segmentation": "train_seg_stage2.py",
    "single": "train_seg_single_stage.py",
}


def save(path: Path, content: dict) -> None:
    """Write a checkpoint so that `path` holds either the old file or the whole new one.

    Raises UserError where the disk refuses (torch.save turns a full disk into a RuntimeError).
    """
    atomic_write(Path(path), lambda file: torch.save(content, file))


def load(path: Path) -> dict:
    """Read one of our checkpoints or a file of the official package onto the CPU, with torch's safe loading.

    The package's files, published or fine-tuned ({"model", "args", ...}, or Lightning's {"state_dict", ...}), come back
    with our parameter names and a class table. Raises UserError for a file that is missing, damaged, asks for
    anything but tensors and plain values, or has NaN or infinite weights.
    """
    path = Path(path)
    content = _read(path)
    try:
        if isinstance(content.get("state_dict"), dict):
            content = convert.package_weights(content)
        if not isinstance(content.get("model"), dict):
            raise UserError(f"{path} is no checkpoint: it has no 'model' with weights")
        require_plain(content["model"])
        if "format" not in content:
            content = _from_official_file(content, path)
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, this version reads {FORMAT}")
        _check(content)
        _require_finite(content, path)
    except UserError:
        raise
    except Exception as error:  # whatever a stranger's file does to code that expects one of ours
        raise UserError(
            f"{path} is no checkpoint of this program ({type(error).__name__}: {error})"
        ) from error
    return content


def _check(content: dict) -> None:
    """Raise some error where a file says that it is ours and has not what ours have, before memory is taken for it."""
    kinds = dict(
        stage=str, size=dict, resolution=int, classes=dict, args=dict, ema=dict, left_out=list
    )
    content = {"args": {}, "ema": {}, "left_out": []} | {
        key: value for key, value in content.items() if value is not None
    }
    if wrong := [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]:
        raise ValueError(f"it lacks {', '.join(wrong)}")
    require_plain(content["ema"])
    if content.get("exif", "apply") not in ("apply", "ignore"):
        raise ValueError("its exif is neither apply nor ignore")
    require_plain({"trained_on": trained_on(content)})
    model, size, table = content["model"], size_from_dict(content["size"]), table_of(content)
    if content["stage"] not in SCRIPTS or content.get("mask_head") not in (
        None,
        "nano",
        "standard",
        "official",
    ):
        raise ValueError("its stage or mask head is unknown")
    if (
        size.depth + size.decoder_layers > len(model)
        or size.queries * size.recipe.group_detr > 100_000
    ):
        raise ValueError("its size is absurd")
    if differences := shape_differences(size, model):
        raise ValueError(
            f"{len(differences)} tensors are not of its size: {'; '.join(differences[:3])}"
        )
    heads = [
        head
        for state in (model, content["ema"])
        for name, head in state.items()
        if classes.is_class_head(name)
    ]
    if any(len(head) != table.rows_total for head in heads):
        raise ValueError(f"its class heads have not the {table.rows_total} rows of its class table")
    check_resolution(size, content["resolution"])


def require_plain(state: dict) -> None:
    """Raise ValueError where an entry is anything but a name and a plain tensor all of which is in the file."""
    for name, tensor in state.items():
        plain = type(name) is str and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        if not plain or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
            raise ValueError(f"{str(name)[:100]!r} is no plain tensor")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name[:100]!r} is larger than what is stored of it")


def _require_finite(content: dict, path: Path) -> None:
    """Raise UserError where a weight, or what a run goes on with, is NaN or infinite."""
    states = {name: content.get(name) for name in ("model", "ema", "training")}
    broken = [name for name, tensor in _tensors(states) if not tensor.isfinite().all()]
    if not broken:
        return
    if content.get("training"):
        best = path.with_name("best.pt")
        advice = f"The run has diverged: begin a new one from {best}, if that is sound, with a lower --lr or --amp off"
    else:
        advice = "Use another checkpoint, or train again with a lower --lr or --amp off"
    shown = ", ".join(broken[:3]) + (" ..." if len(broken) > 3 else "")
    raise UserError(
        f"{path} holds NaN or infinite values in {len(broken)} tensors ({shown}). {advice}"
    )


def _tensors(values: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in nested dicts that are whole in the file, with their names: model.bias ..."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{key}.")
        elif (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.layout is torch.strided
        ):
            if (
                value.nbytes <= value.untyped_storage().nbytes()
            ):  # else small in the file and huge when read
                yield prefix + str(key), value


def input_side(content: dict, resolution: int | None, path: Path) -> int:
    """The input side in pixels: `resolution` where it was asked for, else the checkpoint's own.

    Raises UserError where it does not fit the size, and for a file that by itself asks for a side that is far beyond
    its position grid: a few changed bytes would cost all memory.
    """
    size = size_from_dict(content["size"])
    own, native = content["resolution"], max(size.position_grid * size.patch, size.block)
    if resolution is None and own > MOST_ENLARGED * native:
        raise UserError(
            f"{path} asks for {own} x {own} pixels, and its position grid is for {native} x {native}: that takes much "
            f"memory and time. If it was trained so, add --resolution {own}"
        )
    return check_resolution(size, resolution or own)


def load_backbone(path: Path, patch: int) -> dict:
    """DINOv2's weights alone, in the Hugging Face layout (.safetensors, or torch's .bin), as a file without classes.

    Patch kernels are resampled to `patch` pixels. Raises UserError for another layout.
    """
    _require_file(path)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _read(path)
        require_plain(state)
        _require_finite({"model": state}, path)
        own = convert.from_dinov2(state, patch)
    except (SafetensorError, OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise UserError(f"cannot read the backbone weights {path}: {error}") from error
    if not own:
        raise UserError(
            f"{path} does not hold DINOv2 in the Hugging Face layout (encoder.layer.0.norm1.weight ...), but "
            f"{', '.join(list(state)[:3])} ... Take model.safetensors of facebook/dinov2-small (large: dinov2-base)"
        )
    return {"model": own, "classes": ClassTable((), (), (), 0, None).to_dict()}


def _read(path: Path) -> dict:
    """The dict in a file of torch's: nothing of it is run, and it takes no more memory than the file has bytes."""
    _require_file(path)
    try:
        try:
            content = _read_once(path)
        except FileReplaced:
            content = _read_once(path)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"it wants to run {wanted[1]}"
            if wanted
            else "it is damaged or holds more than tensors and plain values"
        )
        raise UserError(
            f"{path} was refused, nothing of it was run: {why}. Use a checkpoint you trust"
        ) from error
    except OSError as error:  # rights, a network disk
        raise UserError(
            f"cannot read {path} ({error.strerror or error}). It is not touched: try again"
        ) from error
    except Exception as error:  # damaged bytes make torch's reader raise nearly anything
        raise UserError(
            f"{path} is damaged or no checkpoint ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


class FileReplaced(Exception):
    """What was read is no longer what the path names."""


def _read_once(path: Path) -> object:
    """What one file holds, judged and read through the same handle.  FileReplaced where that failed meanwhile."""
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        try:
            _require_stored(file)
            file.seek(0)
            # the package keeps its settings in one of these
            with torch.serialization.safe_globals([Namespace, SimpleNamespace]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            now = os.stat(path)
            if any(
                getattr(before, name) != getattr(now, name)
                for name in ("st_ino", "st_size", "st_mtime_ns")
            ):
                raise FileReplaced(f"{path} is being written by another program") from error
            raise


def _require_stored(file: BinaryIO) -> None:
    """Raise ValueError for an archive that may unpack to more than the file has bytes.

    Torch's reader trusts the directory of records that the end of the file points to. It has to be the one and only:
    right before that end, nothing after it, nothing before the first record.
    """
    if file.read(4) != b"PK\3\4":  # torch reads everything else as one pickle
        return
    size = file.seek(0, os.SEEK_END)
    end, long_end = size - 22, size - 98  # of the directory; the second where sizes have 64 bits
    file.seek(max(long_end, 0))
    tail = file.read()
    mark, *_, length, start, comment = struct.unpack("<4s4H2LH", tail[-22:])
    if tail[-42:-38] == b"PK\6\7":
        length, start, _, _, end = struct.unpack("<2Q2LQ", tail[-58:-26])
        mark = mark if end == long_end and tail[:4] == b"PK\6\6" else b""
    if mark != b"PK\5\6" or comment or start + length != end:
        raise ValueError("its end is missing, or other bytes follow")
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if min((record.header_offset for record in records), default=0):
        raise ValueError("other bytes stand before its first record")
    packed = any(
        record.compress_type != zipfile.ZIP_STORED for record in records
    )  # torch packs nothing
    if packed or sum(record.file_size for record in records) > size:
        raise ValueError("it would unpack to more than it is")


def _require_file(path: Path) -> None:
    if is_special_file(path):
        raise UserError(f"{path} is a pipe, a socket or a device: weights are read from files")
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}{_neighbours(path)}")


def _neighbours(path: Path) -> str:
    near = (
        sorted(p.name for p in path.parent.glob("*.p*") if p.suffix in (".pt", ".pth"))
        if path.parent.is_dir()
        else []
    )
    return f". In {path.parent}: {', '.join(near)}" if near else ""


def _from_official_file(content: dict, path: Path) -> dict:
    """{"model", "args", ...} as the package writes it -> our keys."""
    model = convert.from_official(content["model"])
    args = content.get("args") or {}
    args = args if isinstance(args, dict) else vars(args)
    settings = content.get("model_config") or {}
    size = _official_size(model, content.get("model_name"), path)
    size = replace(size, select=settings.get("num_select", size.select))
    native = SIZES[size.name]
    # the grid of nano and its like is the resolution's; base and large keep DINOv2's 37x37 at any
    scaled = native.position_grid * native.patch == native.resolution
    resolution = settings.get(
        "resolution", size.position_grid * size.patch if scaled else size.resolution
    )
    masks = any(name.startswith("segmentation_head.") for name in model)
    return {
        "format": FORMAT,
        "stage": "single" if masks else "detector",
        "size": asdict(size),
        "resolution": resolution,
        "classes": _official_table(
            len(model.get("class_embed.0.weight", ())), args.get("class_names"), path
        ).to_dict(),
        "mask_head": "official" if masks else None,
        "args": {},
        "model": model,
        "official": True,
    }


def _official_table(rows: int, names: list[str] | dict | None, path: Path) -> ClassTable:
    """The classes of an official file: COCO's, or those it was fine-tuned on with the package (row = list index)."""
    names = tuple(map(str, names.values() if isinstance(names, dict) else names or ()))
    if rows == classes.COCO_ROWS and names in ((), tuple(classes.COCO_NAMES.values())):
        return classes.coco_table()
    if not 0 < len(names) <= rows:
        raise UserError(
            f"{path} has {rows} class rows, and its args.class_names names {len(names)} classes"
        )
    labels = tuple(range(len(names)))
    return ClassTable(
        names, labels, labels, rows, None
    )  # no background: the package ranks proposals by every row


def _official_size(model: dict[str, Tensor], model_name: str | None, path: Path) -> ModelSize:
    """The size whose tensors these are, with the file's own position grid and number of queries.

    Sizes with the same tensors are told apart by the file's model_name, then by their position grid.
    """
    grid = math.isqrt(model[convert.POSITIONS].shape[1] - 1) if convert.POSITIONS in model else 0
    queries = len(model.get("query_feat.weight", ())) // max(convert.groups_of(model), 1)
    differences = {}
    sizes = sorted(
        SIZES.values(),
        key=lambda s: (convert.package_class(s.name) != model_name, s.position_grid != grid),
    )
    for size in sizes:
        size = replace(size, position_grid=grid, queries=queries)
        differences[size.name] = shape_differences(size, model)
        if not differences[size.name]:
            return size
    name, nearest = min(differences.items(), key=lambda item: len(item[1]))
    raise UserError(
        f"{path} fits none of the sizes {', '.join(SIZES)}. Nearest is {name}, {len(nearest)} tensors differ: "
        f"{'; '.join(nearest[:5])}{' ...' if len(nearest) > 5 else ''}"
    )


def shape_differences(size: ModelSize, state: dict[str, Tensor]) -> list[str]:
    """Where `state` (our names) does not fit a detector of this size: missing, unknown or misshapen tensors.

    Class heads and learned queries may have any number of rows.
    """
    with torch.device("meta"):
        expected = Detector(size, rows=2, groups=1).state_dict()
    free = (
        "class_embed.",
        "transformer.enc_o",
        "refpoint_embed.",
        "query_feat.",
        "mask_head.",
        "segmentation_head.",
    )
    differences = []
    for name in sorted(expected.keys() | state.keys()):
        if name.startswith(free):
            continue
        a, b = expected.get(name), state.get(name)
        if a is None or b is None or a.shape != b.shape:
            shapes = [tuple(t.shape) if t is not None else "none" for t in (a, b)]
            differences.append(f"{name}: expected {shapes[0]}, file {shapes[1]}")
    return differences


def require_size(content: dict, size: ModelSize, path: Path) -> None:
    """Raise UserError where the checkpoint is of another size, naming the one that fits."""
    found = content["size"]["name"]
    if found != size.name:
        differences = shape_differences(size, content["model"])
        raise UserError(
            f"{path} is a {found} checkpoint, --size is {size.name}: {len(differences)} tensors differ, the first "
            f"{'; '.join(differences[:3])}. Run again with --size {found}"
        )


def trained_on(content: dict) -> Tensor:
    """Sorted content hashes (seen.content_hash), int64, of the images a checkpoint was trained on, as far as known."""
    hashes = content.get("trained_on")
    if hashes is None:
        return torch.empty(0, dtype=torch.int64)
    if not isinstance(hashes, Tensor) or hashes.dtype != torch.int64 or hashes.ndim != 1:
        raise ValueError("its trained_on is no list of hashes")
    return hashes


def table_of(content: dict) -> ClassTable:
    return ClassTable.from_dict(content["classes"])


def build_model(content: dict, groups: int | None = 1) -> tuple[Detector, ClassTable]:
    """The model of a checkpoint, in eval mode with all its weights, and its class table.  UserError if a tensor misses.

    `groups`: query groups to keep, the first ones (1 is all that inference needs); None keeps the size's own number.
    """
    size, table = size_from_dict(content["size"]), table_of(content)
    model = Detector(size, table.rows_total, table.background_last, content["mask_head"], groups)
    report = convert.load_pretrained(model, content["model"], [])
    problems = (
        report.missing
        + [f"{name}: {why}" for name, why in report.skipped.items()]
        + report.unexpected
    )
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


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_content(
    stage: str,
    size: ModelSize,
    resolution: int,
    table: ClassTable,
    mask_head: str | None,
    state: dict,
) -> dict:
    """What every checkpoint of ours holds; a run adds its args."""
    return {
        "format": FORMAT,
        "stage": stage,
        "size": asdict(size),
        "resolution": resolution,
        "classes": table.to_dict(),
        "mask_head": mask_head,
        "model": state,
    }


def shrink(content: dict, keep: list[str]) -> dict:
    """A checkpoint with every class head, and that of its EMA weights, cut to the classes `keep` and a background row.

    Rows are copied bit for bit in the order of `keep`, the background's last. Raises UserError for unknown names.
    """
    kept = classes.keep_classes(table_of(content), keep)
    rows = [*kept.rows, classes.background_row(table_of(content))]
    small = {key: value for key, value in content.items() if key not in ("training", "official")}
    for key in ("model", "ema"):
        if content.get(key):
            small[key] = classes.keep_class_rows(content[key], rows)
    return small | {"classes": classes.assign_rows(keep, list(kept.ids), "dataset").to_dict()}
