"""Checkpoint files of the published package (PyPI rfdetr 1.11), read and written."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from rfdetr import classes
from rfdetr.classes import COCO_NAMES, ClassTable, is_class_head
from rfdetr.console import UserError
from rfdetr.sizes import SIZES, ModelSize
from rfdetr.weights.fitting import shape_differences
from rfdetr.weights.official import POSITIONS, from_official, groups_of, to_official

SILENT = -100.0  # a logit that wins no place and whose score is 0


def package_class(size: str) -> str:
    """The package's name of a size: seg-2xlarge -> RFDETRSeg2XLarge."""
    size = {"large": "large-deprecated", "large-2026": "large"}.get(size, size)
    return "RFDETR" + size.title().replace("-", "").replace("Xl", "XL")


def package_weights(content: dict) -> dict:
    """A checkpoint of Lightning's ({"state_dict": {"model.NAME": ...}}) with "model" and "args" as in the others."""
    state = {
        re.sub(r"^model\.(_orig_mod\.)?", "", name): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith("model.")
    }
    return {"model": state, "args": content.get("hyper_parameters")} | content


def from_package(content: dict, path: Path) -> dict:
    """{"model", "args", ...} as the package writes it -> our keys."""
    model = from_official(content["model"])
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
    grid = math.isqrt(model[POSITIONS].shape[1] - 1) if POSITIONS in model else 0
    queries = len(model.get("query_feat.weight", ())) // max(groups_of(model), 1)
    differences = {}
    sizes = sorted(
        SIZES.values(), key=lambda s: (package_class(s.name) != model_name, s.position_grid != grid)
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


def to_package(content: dict) -> dict:
    """A checkpoint's content -> what PyPI's rfdetr 1.11 loads: {"model", "args", "model_name", "model_config"}.

    The package takes a row for its class id, ranks proposals by all rows and reports all. So the classes' rows come
    first, in the order of their names (COCO's 91 rows stay), and rows without a class are silenced: in the decoder's
    head, and the background also in the proposals' heads, where it ranks nothing here. `mask_head.` is left out.
    """
    size, table = content["size"], ClassTable.from_dict(content["classes"])
    model = {
        name: tensor
        for name, tensor in content["model"].items()
        if not name.startswith("mask_head.")
    }
    coco, count, groups = table.rows == tuple(COCO_NAMES), len(table.names), groups_of(model)
    if not coco:
        order = torch.tensor(
            [*table.rows, *(row for row in range(table.rows_total) if row not in table.rows)]
        )
        for name in filter(is_class_head, list(model)):
            model[name] = model[name][order]
            if table.background is not None and (
                name.startswith("class_embed.") or table.background_last
            ):
                model[name][count:] = SILENT if name.endswith("bias") else 0.0
    shared = {
        "num_classes": table.rows_total - 1,
        "num_queries": size["queries"],
        "group_detr": groups,
    }
    shared |= {"resolution": content["resolution"], "patch_size": size["patch"]}
    shared["segmentation_head"] = content["mask_head"] == "official"
    return {
        "model": to_official(model),
        "args": shared if coco else shared | {"class_names": list(table.names)},
        "model_name": package_class(size["name"]),
        "model_config": shared
        | {"positional_encoding_size": size["position_grid"], "num_select": size["select"]},
    }
