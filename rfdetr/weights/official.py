"""The official names of tensors, both ways.

The official files (PyPI rfdetr 1.11) and this project name the same tensors alike, with two
differences: here `class_embed` and `bbox_embed` are lists, and the encoder's blocks carry timm's
names with one fused `qkv` instead of query, key and value.
"""

from __future__ import annotations

import re

import torch
from timm.layers import resample_patch_embed
from torch import Tensor

_BLOCK = re.compile(r"(backbone\.0\.encoder\.encoder\.encoder\.layer\.\d+\.)(.+)(\.\w+)")
_QKV = [f"attention.attention.{part}" for part in ("query", "key", "value")]
_OFFICIAL_MODULES = {  # inside a block: our beginning of a name, the official one
    "attn.proj.": "attention.output.dense.",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
_ENCODER = "backbone.0.encoder.encoder."
POSITIONS = _ENCODER + "embeddings.position_embeddings"
GROUP = re.compile(r"transformer\.enc_out\w*\.(\d+)\.")


def official_names(own: str) -> list[str]:
    """The official names of one of our tensors.

    Three for a fused qkv, in the order of its rows, else one.
    """
    match = _BLOCK.fullmatch(own)
    if match is None:
        return [re.sub(r"^(class_embed|bbox_embed)\.0\.", r"\1.", own)]
    block, module, tensor = match.groups()
    if module == "attn.qkv":
        return [block + part + tensor for part in _QKV]
    for ours, theirs in _OFFICIAL_MODULES.items():
        own = own.replace(block + ours, block + theirs)
    return [own]


def own_name(official: str) -> str:
    """Our name of an official tensor; that of the fused qkv for a query, key or value."""
    match = _BLOCK.fullmatch(official)
    if match is None:
        return re.sub(r"^(class_embed|bbox_embed)\.(?!\d)", r"\1.0.", official)
    block, module, tensor = match.groups()
    if module in _QKV:
        return block + "attn.qkv" + tensor
    for ours, theirs in _OFFICIAL_MODULES.items():
        official = official.replace(block + theirs, block + ours)
    return official


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names -> ours, with query, key and value fused.

    Unknown names pass untouched, and so do ours.
    """
    own: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = own_name(name)
        parts = official_names(ours)
        if len(parts) == 1 or name == ours:
            own[ours] = tensor
        elif not all(part in state for part in parts):
            own[name] = tensor
        elif name == parts[0]:  # once for the three of them
            own[ours] = torch.cat([state[part] for part in parts])
    own.pop("_kp_active_mask", None)  # 0x0, no weights: the package makes it anew
    return own


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> official, the exact inverse of from_official.  Unknown names pass untouched."""
    official: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names = official_names(name)
        tensors = tensor.chunk(3) if len(names) == 3 else [tensor]
        official.update(zip(names, tensors))
    return official


def groups_of(state: dict[str, Tensor]) -> int:
    """The number of query groups in a state dict."""
    groups = [int(match[1]) for match in map(GROUP.match, state) if match]
    return max(groups, default=-1) + 1


def from_dinov2(state: dict[str, Tensor], patch: int) -> dict[str, Tensor]:
    """DINOv2 in the Hugging Face layout -> our names, patch kernels resampled to `patch` pixels.

    The package starts base and large this way (patch 14); the resampling for the other sizes is
    FlexiViT's (arXiv:2212.08013). Empty where the names are of another layout.
    """
    official = {}
    for name, tensor in state.items():
        official[_ENCODER + re.sub(r"^dinov2\w*\.", "", name)] = tensor.float()
    if _ENCODER + "encoder.layer.0.norm1.weight" not in official:
        return {}
    own = from_official(official)
    kernel = _ENCODER + "embeddings.patch_embeddings.projection.weight"
    if own[kernel].shape[-1] != patch:
        own[kernel] = resample_patch_embed(own[kernel], [patch, patch])
    return own
