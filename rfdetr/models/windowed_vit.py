"""Windowed DINOv2 vision transformer on timm's blocks.

Most blocks attend inside windows, a few over the whole image.  Sources: RF-DETR (arXiv:2511.09554), LW-DETR
(arXiv:2406.03459), DINOv2 (arXiv:2304.07193).  Letters: B images, N windows per side, T patches per window, D channels.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rfdetr.device import fused_attention_pays
from rfdetr.sizes import ModelSize


class Embeddings(nn.Module):
    """Patches, position embedding and the CLS token, cut into windows that each get a CLS token of their own."""

    def __init__(self, size: ModelSize):
        super().__init__()
        self.windows, self.grid = size.windows, size.position_grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        # in the official files, never used
        self.mask_token = nn.Parameter(torch.zeros(1, size.dim), requires_grad=False)
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + size.position_grid**2, size.dim))
        self.patch_embeddings = nn.ModuleDict(
            {"projection": nn.Conv2d(3, size.dim, size.patch, size.patch)}
        )
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.position_embeddings, std=0.02)

    def positions(self, height: int, width: int) -> Tensor:
        """The position embedding of height x width patches, (1, height, width, D); bicubic from the stored one."""
        stored = self.position_embeddings[:, 1:].unflatten(1, (self.grid, self.grid))
        antialias = stored.device.type != "mps"  # no such kernel on MPS
        return resample_abs_pos_embed_nhwc(stored, [height, width], antialias=antialias)

    def forward(self, images: Tensor) -> Tensor:
        projection, N = self.patch_embeddings["projection"], self.windows
        B, p = len(images), projection.kernel_size[0]
        h, w = images.shape[2] // p // N, images.shape[3] // p // N  # patches of a window
        patches = (
            images.reshape(B, 3, N, h, p, N, w, p)
            .permute(0, 2, 5, 3, 6, 1, 4, 7)
            .reshape(B, N * N, h * w, -1)
        )
        positions = (
            self.positions(N * h, N * w)
            .reshape(N, h, N, w, -1)
            .transpose(1, 2)
            .reshape(N * N, h * w, -1)
        )
        # the convolution as a matrix product, which a CPU does in a third of the time
        patches = (
            F.linear(patches, projection.weight.flatten(1), projection.bias) + positions
        )  # (B, N*N, T, D)
        cls = (
            (self.cls_token + self.position_embeddings[:, :1])
            .expand(B * N * N, -1, -1)
            .to(patches.dtype)
        )
        return torch.cat((cls, patches.flatten(0, 1)), dim=1)  # (B*N*N, 1+T, D)


class WindowedViT(nn.Module):
    """(B, 3, H, W) normalised images -> one (B, D, H/patch, W/patch) map per feature layer.

    H and W are multiples of patch x windows.  Blocks after the last feature layer are kept for the official files'
    sake, frozen and never run.
    """

    def __init__(self, size: ModelSize, drop_path: float = 0.0, grad_checkpoint: bool = False):
        super().__init__()
        self.size, self.grad_checkpoint = size, grad_checkpoint
        self.embeddings = Embeddings(size)
        norm = partial(nn.LayerNorm, eps=1e-6)
        # init_values: LayerScale, as in DINOv2
        options = {
            "mlp_ratio": size.mlp_ratio,
            "qkv_bias": True,
            "init_values": 1.0,
            "drop_path": drop_path,
        }
        blocks = [
            Block(size.dim, size.heads, norm_layer=norm, **options) for _ in range(size.depth)
        ]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(blocks)})
        self.layernorm = norm(size.dim)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for block in blocks[size.used_depth :]:
            block.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        B, _, H, W = images.shape
        N, height, width = self.size.windows, H // self.size.patch, W // self.size.patch
        x = self.embeddings(images)
        features, fused = [], fused_attention_pays(images.device)
        for i, block in enumerate(self.encoder["layer"][: self.size.used_depth]):
            block.attn.fused_attn = fused
            # attention alone mixes tokens, so a global block is a plain block on all windows in one row
            rows = B if i in self.size.feature_layers else B * N * N
            x = x.reshape(rows, -1, x.shape[-1])
            x = (
                checkpoint(block, x, use_reentrant=False)
                if self.grad_checkpoint and self.training
                else block(x)
            )
            if i + 1 in self.size.feature_layers:
                patches = self.layernorm(x).reshape(B * N * N, -1, x.shape[-1])[:, 1:]
                patches = patches.reshape(B, N, N, height // N, width // N, -1).transpose(2, 3)
                features.append(
                    patches.reshape(B, height, width, -1).permute(0, 3, 1, 2)
                )  # (B, D, H/p, W/p)
        return features


def standardise(images: Tensor) -> Tensor:
    """Zero mean and unit variance per image and channel, (B, 3, H, W) -> the same shape.

    Lets a network from scratch learn at a high rate on data of any stain or exposure.
    """
    centred = images - images.mean((2, 3), keepdim=True)
    return centred / (centred.square().mean((2, 3), keepdim=True).sqrt() + 1e-2)
