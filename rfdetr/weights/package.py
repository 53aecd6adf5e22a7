"""Checkpoint files of the published package (PyPI rfdetr 1.11), read and written."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from rfdetr.classes import COCO_NAMES, COCO_ROWS, ClassTable, coco_table, is_class_head
from rfdetr.console import UserError
from rfdetr.data.gray import EIGHT_BIT
from rfdetr.sizes import SIZES, ModelSize
from rfdetr.weights.fitting import shape_differences
from rfdetr.weights.official import POSITIONS, from_official, groups_of, to_official

WHITE_OF_16_BITS = 65535
SILENT = -100.0  # a logit that wins no place and whose score is 0


def package_class(size: str) -> str:
    """The package's name of a size: seg-2xlarge -> RFDETRSeg2XLarge."""
    size = {"large": "large-deprecated", "large-2026": "large"}.get(size, size)
    return "RFDETR" + size.title().replace("-", "").replace("Xl", "XL")


def from_lightning(content: dict) -> dict:
    """A checkpoint of Lightning's, {"state_dict": {"model.NAME": ...}}, with "model" and "args"."""
    state = {}
    for name, tensor in content["state_dict"].items():
        if name.startswith("model."):
            state[re.sub(r"^model\.(_orig_mod\.)?", "", name)] = tensor
    return {"model": state, "args": content.get("hyper_parameters")} | content


def from_package(content: dict, path: Path) -> dict:
    """A file of the package, {"model", "args", ...} -> a checkpoint of ours, all but its format.

    Raises UserError for tensors that fit no size, and for a class head without names.
    """
    model = from_official(content["model"])
    args = content.get("args") or {}
    if not isinstance(args, dict):
        args = vars(args)
    settings = content.get("model_config") or {}
    size = _size_of(model, content.get("model_name"), path)
    size = replace(size, select=settings.get("num_select", size.select))
    resolution = settings.get("resolution", _resolution_of(size))
    rows = len(model.get("class_embed.0.weight", ()))
    table = _table_of(rows, args.get("class_names"), path)
    has_masks = any(name.startswith("segmentation_head.") for name in model)
    return {
        "stage": "single" if has_masks else "detector",
        "size": asdict(size),
        "resolution": resolution,
        "classes": table.to_dict(),
        "mask_head": "official" if has_masks else None,
        "args": {},
        "model": model,
        "official": True,
        "gray": EIGHT_BIT.to_dict(),
    }


def _size_of(model: dict[str, Tensor], model_name: str | None, path: Path) -> ModelSize:
    """The size whose tensors these are, with the file's own position grid and number of queries.

    Sizes with the same tensors are told apart by the file's model_name, then by their grid.
    """
    grid = 0
    if POSITIONS in model:
        grid = math.isqrt(model[POSITIONS].shape[1] - 1)
    queries = len(model.get("query_feat.weight", ())) // max(groups_of(model), 1)

    def likelihood(size: ModelSize) -> tuple[bool, bool]:
        return package_class(size.name) == model_name, size.position_grid == grid

    differences = {}
    for size in sorted(SIZES.values(), key=likelihood, reverse=True):
        size = replace(size, position_grid=grid, queries=queries)
        differences[size.name] = shape_differences(size, model)
        if not differences[size.name]:
            return size
    nearest = min(differences, key=lambda name: len(differences[name]))
    count = len(differences[nearest])
    shown = "; ".join(differences[nearest][:5]) + (" ..." if count > 5 else "")
    raise UserError(
        f"{path} fits none of the sizes {', '.join(SIZES)}. Nearest is {nearest}, {count} tensors "
        f"differ: {shown}"
    )


def _resolution_of(size: ModelSize) -> int:
    """The resolution of a file that does not tell it, from its position grid."""
    native = SIZES[size.name]
    # the grid of nano and its like is the resolution's; base and large keep DINOv2's 37x37 at any
    if native.position_grid * native.patch == native.resolution:
        return size.position_grid * size.patch
    return size.resolution


def _table_of(rows: int, names: list[str] | dict | None, path: Path) -> ClassTable:
    """COCO's classes, or those the file was fine-tuned on with the package (row = list index)."""
    if isinstance(names, dict):
        names = list(names.values())
    names = tuple(str(name) for name in names or ())
    if rows == COCO_ROWS and names in ((), tuple(COCO_NAMES.values())):
        return coco_table()
    if not 0 < len(names) <= rows:
        raise UserError(
            f"{path} has {rows} class rows, and its args.class_names names {len(names)} classes"
        )
    labels = tuple(range(len(names)))
    # no background: the package ranks proposals by every row
    return ClassTable(names, labels, labels, rows, None)


def to_package(content: dict) -> dict:
    """A checkpoint's content -> what PyPI's rfdetr 1.11 loads.

    Returns {"model", "args", "model_name", "model_config"}. The package takes a row for its class
    id, ranks proposals by all rows and reports all; so _package_rows changes the class heads.
    Tensors of `mask_head.` are left out: the package has no such head.
    """
    size = content["size"]
    table = ClassTable.from_dict(content["classes"])
    model = {}
    for name, tensor in content["model"].items():
        if not name.startswith("mask_head."):
            model[name] = tensor
    args = {
        "num_classes": table.rows_total - 1,
        "num_queries": size["queries"],
        "group_detr": groups_of(model),
        "resolution": content["resolution"],
        "patch_size": size["patch"],
        "segmentation_head": content["mask_head"] == "official",
    }
    model_config = args | {
        "positional_encoding_size": size["position_grid"],
        "num_select": size["select"],
    }
    if table.rows != tuple(COCO_NAMES):
        model = _package_rows(model, table)
        args = args | {"class_names": list(table.names)}
    return {
        "model": to_official(model),
        "args": args,
        "model_name": package_class(size["name"]),
        "model_config": model_config,
    }


def left_to_user(content: dict) -> list[str]:
    """What is done here to images before a checkpoint's model sees them and the package does not:
    for each a sentence on what to do instead.
    """
    notes = []
    tile = content.get("tile")
    if tile:
        notes.append(
            f"the model was trained on tiles of {tile} x {tile} px, and the package shows it whole "
            f"images: cut yours into tiles of {tile} px, and join what is found in them"
        )
    gray = content.get("gray")
    if gray and gray["deep"]:
        black, white = gray["window"] or (0, WHITE_OF_16_BITS)
        notes.append(
            f"the model was trained on gray of more than 8 bits with {black:.6g} as black and "
            f"{white:.6g} as white, and the package reads such files in another way: scale yours "
            "from these values to 0..255, and save them with 8 bits"
        )
    if content.get("letterbox"):
        notes.append(
            "the model was trained on images with their own proportions (letterbox), and the "
            "package stretches each to a square: pad yours to squares"
        )
    return notes


def _package_rows(model: dict[str, Tensor], table: ClassTable) -> dict[str, Tensor]:
    """`model` with the classes' rows first, in the order of their names, and the others silenced.

    The decoder's head is silenced in every row without a class. The proposals' heads are silenced
    where the last row is background, which ranks nothing here; other rows rank proposals and stay.
    """
    without_class = [row for row in range(table.rows_total) if row not in table.rows]
    order = [*table.rows, *without_class]
    changed = dict(model)
    for name in filter(is_class_head, model):
        head = model[name][order]
        of_decoder = name.startswith("class_embed.")
        if table.background is not None and (of_decoder or table.background_last):
            head[len(table.names) :] = SILENT if name.endswith("bias") else 0.0
        changed[name] = head
    return changed
