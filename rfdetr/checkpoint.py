"""Checkpoints: written atomically, loaded safely, self-contained.

A checkpoint is a plain dict of tensors and Python values: format, stage, size (every field of ModelSize), resolution,
classes (a ClassTable), mask_head (name or None), args, model (state dict), and in last.pt and checkpoint.pt ema and
training (all that --resume needs).
"""

from __future__ import annotations

import hashlib
import pickle
import re
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from rfdetr.classes import (
    COCO_ROWS,
    ClassTable,
    background_row,
    coco_table,
    keep_class_rows,
    keep_classes,
    shrunk_table,
)
from rfdetr.console import UserError
from rfdetr.convert import from_official, load_pretrained
from rfdetr.models.detector import Detector
from rfdetr.rundir import atomic_write
from rfdetr.sizes import SIZES, ModelSize, size_from_dict

FORMAT = 1


def save(path: Path, content: dict) -> None:
    """Write a checkpoint so that `path` holds either the old file or the whole new one.

    Raises UserError where the disk refuses (torch.save turns a full disk into a RuntimeError).
    """
    atomic_write(Path(path), lambda file: torch.save(content, file))


def load(path: Path) -> dict:
    """Read one of our checkpoints or an official file onto the CPU, with torch's safe loading.

    An official file ({"model", "args"}) comes back with our parameter names and a class table. Raises UserError for a
    file that is missing, damaged, or asks for anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}{_neighbours(path)}")
    try:
        with torch.serialization.safe_globals([Namespace]):  # the official files keep their settings in one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it wants to run {wanted[1]}" if wanted else "it is damaged or holds more than tensors and plain values"
        raise UserError(f"{path} was refused, nothing of it was run: {why}. Use a checkpoint you trust") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is damaged or no checkpoint ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is no checkpoint: it has no 'model' with weights")
    if "format" not in content:
        return _from_official_file(content, path)
    if content["format"] != FORMAT:
        raise UserError(f"{path} has format {content['format']}, this version reads {FORMAT}")
    return content


def _neighbours(path: Path) -> str:
    near = (
        sorted(p.name for p in path.parent.glob("*.p*") if p.suffix in (".pt", ".pth")) if path.parent.is_dir() else []
    )
    return f". In {path.parent}: {', '.join(near)}" if near else ""


def _from_official_file(content: dict, path: Path) -> dict:
    """{"model", "args"} as the package writes it -> our keys; the size is told by the tensors' shapes."""
    model = from_official(content["model"])
    args = content.get("args")
    args = vars(args) if isinstance(args, Namespace) else args or {}
    rows = len(model["class_embed.0.weight"]) if "class_embed.0.weight" in model else 0
    names = args.get("class_names")
    if names:
        names = [str(name) for name in (names.values() if isinstance(names, dict) else names)][:rows]
        labels = tuple(range(len(names)))
        table = ClassTable(tuple(names), labels, labels, rows, next((r for r in range(rows) if r >= len(names)), None))
    elif rows == COCO_ROWS:
        table = coco_table()
    else:
        raise UserError(f"{path} has {rows} class rows and does not name its classes (no args.class_names)")
    size = next((s for s in SIZES.values() if not shape_differences(s, model)), None)
    if size is None:
        raise UserError(f"{path} fits none of the sizes {', '.join(SIZES)}")
    return {
        "format": FORMAT,
        "stage": "detector",
        "size": asdict(size),
        "resolution": size.resolution,
        "classes": table.to_dict(),
        "mask_head": None,
        "args": {},
        "model": model,
        "official": True,
    }


def shape_differences(size: ModelSize, state: dict[str, Tensor]) -> list[str]:
    """Where `state` (our names) does not fit a detector of this size: missing, unknown or misshapen tensors.

    Class heads and learned queries may have any number of rows.
    """
    with torch.device("meta"):
        expected = Detector(size, rows=2, groups=1).state_dict()
    free = ("class_embed.", "transformer.enc_o", "refpoint_embed.", "query_feat.", "mask_head.")
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


def table_of(content: dict) -> ClassTable:
    return ClassTable.from_dict(content["classes"])


def build_model(content: dict, groups: int | None = 1) -> tuple[Detector, ClassTable]:
    """The model of a checkpoint, in eval mode with its weights, and its class table.

    `groups`: query groups to keep (1 is all that inference needs); None keeps the size's own number.
    """
    size = size_from_dict(content["size"])
    table = table_of(content)
    model = Detector(size, table.rows_total, table.background_last, content["mask_head"], groups)
    load_weights(model, content["model"])
    return model.eval(), table


def load_weights(model: Detector, state: dict[str, Tensor]) -> None:
    """Load every tensor of the model; a file with more query groups gives its first ones.  UserError if one misses."""
    report = load_pretrained(model, state, [])
    problems = report.missing + [f"{name}: {why}" for name, why in report.skipped.items()] + report.unexpected
    if problems:
        shown = "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else "")
        raise UserError(f"the checkpoint does not fit the model, {len(problems)} tensors differ: {shown}")


def fingerprint(module: nn.Module) -> str:
    """sha256 over the module's tensors, buffers included, by name and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def make_content(
    stage: str, size: ModelSize, resolution: int, table: ClassTable, mask_head: str | None, state: dict
) -> dict:
    """What every checkpoint of ours holds; scripts add their args."""
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
    kept = keep_classes(table_of(content), keep)
    rows = [*kept.rows, background_row(table_of(content))]
    small = {key: value for key, value in content.items() if key not in ("training", "official")}
    for key in ("model", "ema"):
        if content.get(key):
            small[key] = keep_class_rows(content[key], rows)
    return small | {"classes": shrunk_table(kept).to_dict()}
