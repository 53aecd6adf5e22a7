"""Windowed DINOv2 vision transformer on timm's blocks.

Most blocks attend inside windows, a few over the whole image. Sources: RF-DETR (arXiv:2511.09554),
LW-DETR (arXiv:2406.03459), DINOv2 (arXiv:2304.07193). Letters: B images, N windows per side, T
patches per window, D channels.
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
from rfdetr.models.parts import ModelPart, trainable
from rfdetr.sizes import ModelSize


class Embeddings(nn.Module):
    """Patch, position and CLS embeddings, cut into windows that each have a CLS token."""

    def __init__(self, size: ModelSize):
        super().__init__()
        self.windows = size.windows
        self.grid = size.position_grid
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
        """The position embedding of height x width patches, (1, height, width, D).

        Bicubic from the stored grid.
        """
        stored = self.position_embeddings[:, 1:].unflatten(1, (self.grid, self.grid))
        # Metal has the kernel itself from torch 2.8 on, but that of its gradient only since 2026
        antialias = stored.device.type != "mps"
        return resample_abs_pos_embed_nhwc(stored, [height, width], antialias=antialias)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B*N*N, 1+T, D), the CLS token first in each window."""
        projection = self.patch_embeddings["projection"]
        B, _, H, W = images.shape
        N = self.windows
        p = projection.kernel_size[0]
        h = H // p // N  # patches of a window
        w = W // p // N
        patches = images.reshape(B, 3, N, h, p, N, w, p)
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (B, N, N, h, w, 3, p, p)
        patches = patches.reshape(B, N * N, h * w, -1)  # (B, N*N, T, 3*p*p)
        positions = self.positions(N * h, N * w).reshape(N, h, N, w, -1)
        positions = positions.transpose(1, 2).reshape(N * N, h * w, -1)  # (N*N, T, D)
        # the convolution as a matrix product, which a CPU does in a third of the time
        patches = F.linear(patches, projection.weight.flatten(1), projection.bias)
        patches = patches + positions  # (B, N*N, T, D)
        cls = self.cls_token + self.position_embeddings[:, :1]
        cls = cls.expand(B * N * N, -1, -1).to(patches.dtype)  # (B*N*N, 1, D)
        return torch.cat((cls, patches.flatten(0, 1)), dim=1)


class WindowedViT(nn.Module):
    """(B, 3, H, W) normalised images -> one (B, D, H/patch, W/patch) map per feature layer.

    H and W are multiples of patch x windows. Blocks after the last feature layer are kept for the
    official files' sake, frozen and never run.
    """

    def __init__(self, size: ModelSize, drop_path: float = 0.0, grad_checkpoint: bool = False):
        super().__init__()
        self.size = size
        self.grad_checkpoint = grad_checkpoint
        self.embeddings = Embeddings(size)
        norm = partial(nn.LayerNorm, eps=1e-6)
        blocks = []
        for _ in range(size.depth):
            block = Block(
                size.dim,
                size.heads,
                mlp_ratio=size.mlp_ratio,
                qkv_bias=True,
                init_values=1.0,  # LayerScale, as in DINOv2
                drop_path=drop_path,
                norm_layer=norm,
            )
            blocks.append(block)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(blocks)})
        self.layernorm = norm(size.dim)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for block in blocks[size.used_depth :]:
            block.requires_grad_(False)

    def parts(self) -> list[ModelPart]:
        """The parameters that train, layer by layer from the embeddings to the final norm.

        The depths are the published ones: the last block in use has depth 2, the embeddings have
        used_depth + 2.
        """
        embeddings_depth = self.size.used_depth + 2
        parts = [ModelPart("encoder", trainable(self.embeddings), embeddings_depth, True)]
        for number, block in enumerate(self.encoder["layer"], start=1):
            depth = embeddings_depth - number
            parameters = trainable(block)
            # the vectors of a block are its biases, norms and layer scales
            vectors = [parameter for parameter in parameters if parameter.ndim == 1]
            matrices = [parameter for parameter in parameters if parameter.ndim > 1]
            parts.append(ModelPart("encoder", vectors, depth, without_decay=True))
            parts.append(ModelPart("encoder", matrices, depth))
        parts.append(ModelPart("encoder", trainable(self.layernorm), 0, without_decay=True))
        return [part for part in parts if part.parameters]

    def forward(self, images: Tensor) -> list[Tensor]:
        B, _, H, W = images.shape
        N = self.size.windows
        h = H // self.size.patch // N  # patches of a window
        w = W // self.size.patch // N
        x = self.embeddings(images)  # (B*N*N, 1+T, D)
        features = []
        fused = fused_attention_pays(images.device)
        for i, block in enumerate(self.encoder["layer"][: self.size.used_depth]):
            block.attn.fused_attn = fused
            # attention alone mixes tokens: a global block is a block on all windows in one row
            rows = B if i in self.size.feature_layers else B * N * N
            x = x.reshape(rows, -1, x.shape[-1])
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if i + 1 in self.size.feature_layers:
                features.append(self.feature_map(x, B, h, w))
        return features

    def feature_map(self, x: Tensor, B: int, h: int, w: int) -> Tensor:
        """Put the windows, each of h x w patches, together again and norm them.

        x (B*N*N, 1+T, D), or the same tokens as (B, N*N*(1+T), D) -> (B, D, N*h, N*w).
        """
        N = self.size.windows
        patches = self.layernorm(x).reshape(B * N * N, -1, x.shape[-1])[:, 1:]  # (B*N*N, T, D)
        patches = patches.reshape(B, N, N, h, w, -1).transpose(2, 3)  # (B, N, h, N, w, D)
        return patches.reshape(B, N * h, N * w, -1).permute(0, 3, 1, 2)


def standardise(images: Tensor) -> Tensor:
    """Zero mean and unit variance per image and channel, (B, 3, H, W) -> the same shape.

    Lets a network from scratch learn at a high rate on data of any stain or exposure.
    """
    centred = images - images.mean((2, 3), keepdim=True)
    deviation = centred.square().mean((2, 3), keepdim=True).sqrt()  # (B, 3, 1, 1)
    return centred / (deviation + 1e-2)
