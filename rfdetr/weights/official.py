"""Official weights in and out: names both ways, and loading what fits.

The official files (PyPI rfdetr 1.11) and this project name the same tensors alike, with two differences: here
`class_embed` and `bbox_embed` are lists, and the encoder's blocks carry timm's names with one fused `qkv` instead of
query, key and value.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from rfdetr.classes import COCO_NAMES, ClassTable, is_class_head
from rfdetr.console import UserError

_BLOCK = re.compile(r"(backbone\.0\.encoder\.encoder\.encoder\.layer\.\d+\.)(.+)(\.\w+)")
_QKV = [f"attention.attention.{part}" for part in ("query", "key", "value")]
# inside a block: our text, the official text
_RENAMED = (
    ("attn.proj.", "attention.output.dense."),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
)
_ENCODER = "backbone.0.encoder.encoder."
POSITIONS = _ENCODER + "embeddings.position_embeddings"
SILENT = -100.0  # a logit that wins no place and whose score is 0
_GROUP = re.compile(r"transformer\.enc_out\w*\.(\d+)\.")


def official_names(own: str) -> list[str]:
    """The official names of one of our tensors: three for a fused qkv (in the order of its rows), else one."""
    match = _BLOCK.fullmatch(own)
    if match is None:
        return [re.sub(r"^(class_embed|bbox_embed)\.0\.", r"\1.", own)]
    block, module, tensor = match.groups()
    if module == "attn.qkv":
        return [block + part + tensor for part in _QKV]
    for ours, theirs in _RENAMED:
        own = own.replace(block + ours, block + theirs)
    return [own]


def _own_name(official: str) -> str:
    match = _BLOCK.fullmatch(official)
    if match is None:
        return re.sub(r"^(class_embed|bbox_embed)\.(?!\d)", r"\1.0.", official)
    block, module, tensor = match.groups()
    if module in _QKV:
        return block + "attn.qkv" + tensor
    for ours, theirs in _RENAMED:
        official = official.replace(block + theirs, block + ours)
    return official


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names -> ours, query, key and value fused.  Names it does not know, and ours, pass untouched."""
    own: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = _own_name(name)
        parts = official_names(ours)
        if len(parts) == 1 or name == ours:
            own[ours] = tensor
        elif not all(part in state for part in parts):
            own[name] = tensor
        elif name == parts[0]:
            own[ours] = torch.cat([state[part] for part in parts])
    own.pop("_kp_active_mask", None)  # no weights: 0x0, the package makes it anew
    return own


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> official, the exact inverse of from_official.  Names it does not know pass untouched."""
    official: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = official_names(name)
        official.update(zip(parts, tensor.chunk(3) if len(parts) == 3 else [tensor]))
    return official


def groups_of(state: dict[str, Tensor]) -> int:
    """The number of query groups in a state dict."""
    return 1 + max((int(match[1]) for match in map(_GROUP.match, state) if match), default=-1)


def from_dinov2(state: dict[str, Tensor], patch: int) -> dict[str, Tensor]:
    """DINOv2 in the Hugging Face layout -> our names, its patch kernels resampled to `patch` pixels.

    The package starts base and large so (patch 14); the resampling for the other sizes is FlexiViT's
    (arXiv:2212.08013). Empty where the names are of another layout.
    """
    names = {name: re.sub(r"^dinov2\w*\.", "", name) for name in state}
    if "encoder.layer.0.norm1.weight" not in names.values():
        return {}
    own = from_official({_ENCODER + names[name]: tensor.float() for name, tensor in state.items()})
    kernel = _ENCODER + "embeddings.patch_embeddings.projection.weight"
    if own[kernel].shape[-1] != patch:
        own[kernel] = resample_patch_embed(own[kernel], [patch, patch])
    return own


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


@dataclass
class LoadReport:
    """What load_pretrained did with each tensor, under our names.

    `adapted` (loaded after a change) and `skipped` say why; `missing` are the model's tensors that the file has not,
    `unexpected` the file's that the model has not, `unmatched` the globs that met nothing.
    """

    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A line of counts, then a line a kind with its names, cut to three parts where several begin alike."""
        initial = len(self.excluded) + len(self.skipped) + len(self.missing)
        lines = [
            f"Pretrained weights: {len(self.loaded)} tensors loaded, {initial} left at their initial value"
        ]
        reasons = self.adapted | self.skipped
        for text, names in (
            ("loaded after a change", self.adapted),
            ("excluded", self.excluded),
            ("skipped, another shape", self.skipped),
            ("not in the file", self.missing),
            ("only in the file, unused", self.unexpected),
            ("patterns that match nothing", self.unmatched),
        ):
            shown = []
            for start, members in groupby(names, lambda name: ".".join(name.split(".")[:3])):
                first, *rest = members
                shown.append(f"{start}.* x{1 + len(rest)}" if rest else first)
                shown[-1] += f" ({reasons[first]})" if first in reasons else ""
            if shown:
                lines.append(f"  {text}, {len(names)}: {', '.join(shown)}")
        return "\n".join(lines)


def _adapt(file: dict[str, Tensor], model: dict[str, Tensor]) -> dict[str, str]:
    """Change in place what may differ between a file and a model of one size; returns {name: what was done}.

    Query groups: the model's groups take the file's first ones (further groups of the model keep their initial
    values). Queries are stored group by group, so a flat cut would mix them up. Position grid: resampled.
    """
    adapted = {}
    groups, wanted = groups_of(file), groups_of(model)
    for name in ("refpoint_embed.weight", "query_feat.weight", POSITIONS):
        theirs, ours = file.get(name), model.get(name)
        if (
            theirs is None
            or ours is None
            or theirs.shape == ours.shape
            or theirs.shape[-1] != ours.shape[-1]
        ):
            continue
        if name == POSITIONS:
            old, new = (math.isqrt(tensor.shape[1] - 1) for tensor in (theirs, ours))
            file[name] = resample_abs_pos_embed(theirs.float(), [new, new])
            adapted[name] = f"resampled from {old}x{old} to {new}x{new} patches, bicubic"
        elif groups and wanted and len(theirs) % groups == 0:
            theirs, ours = (
                theirs.unflatten(0, (groups, -1)),
                ours.clone().unflatten(0, (wanted, -1)),
            )
            g, q = min(groups, wanted), min(theirs.shape[1], ours.shape[1])
            ours[:g, :q] = theirs[:g, :q]
            file[name] = ours.flatten(0, 1)
            adapted[name] = (
                f"the first {g} of {groups} groups, {q} of {theirs.shape[1]} queries of each"
            )
    for name in [name for name in file if (m := _GROUP.match(name)) and int(m[1]) >= wanted > 0]:
        del file[name]
    return adapted


def load_pretrained(model: nn.Module, state: dict[str, Tensor], exclude: list[str]) -> LoadReport:
    """Copy into `model` every tensor of `state` (official or our names) that fits and that no glob of `exclude` names.

    Globs are matched against both names of a tensor; one that names the query, key or value alone leaves out the
    fused qkv. Class heads with another number of rows do not fit: prepare them first.
    Raises UserError when nothing fits, which means another architecture.
    """
    file, initial = from_official(state), model.state_dict()
    adapted = _adapt(file, initial)
    report = LoadReport(missing=[name for name in initial if name not in file])
    used, chosen = set(), {}
    for name, tensor in file.items():
        names = [name, *official_names(name)]
        hits = {pattern for pattern in exclude if any(fnmatchcase(n, pattern) for n in names)}
        used |= hits
        if name not in initial:
            report.unexpected.append(name)
        elif hits:
            report.excluded.append(name)
        elif tensor.shape != initial[name].shape:
            report.skipped[name] = (
                f"the file has {tuple(tensor.shape)}, the model {tuple(initial[name].shape)}"
            )
        else:
            chosen[name] = tensor
    report.loaded = list(chosen)
    report.adapted = {name: how for name, how in adapted.items() if name in chosen}
    report.unmatched = [pattern for pattern in exclude if pattern not in used]
    if not chosen and not report.excluded:
        names = ", ".join([*report.skipped, *report.unexpected][:3]) or "the file is empty"
        raise UserError(
            f"None of the {len(file)} pretrained tensors fits this model ({names} ...): they are of another "
            "architecture. Give the --size they were made for, or --pretrain_weights none."
        )
    model.load_state_dict(initial | chosen)
    return report
