"""The mask head of the published mask models: RF-DETR, arXiv:2511.09554.

It sees the whole image and is trained at points. Letters as in segmentation.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.models.segmentation import PastedMask, PixelSampler, maps_in_parts
from rfdetr.placement import Placement


class PixelBlock(nn.Module):
    """Depthwise 3x3 convolution, LayerNorm, linear, GELU, added to the input.

    After ConvNeXt, arXiv:2201.03545.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        change = self.dwconv(x).permute(0, 2, 3, 1)  # (B, h, w, C)
        change = F.gelu(self.pwconv1(self.norm(change)))
        return x + change.permute(0, 3, 1, 2)


class QueryBlock(nn.Module):
    """LayerNorm and a two-layer perceptron, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(channels)
        self.layers = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(self.norm_in(x))


class OfficialMaskHead(nn.Module):
    """The head of the published mask models (PyPI rfdetr 1.11), parameter for parameter.

    The features, enlarged to a quarter of the image's side, pass one block per decoder layer. A
    layer's masks are its queries dotted with the pixels after its block; the proposals' masks are
    made of the pixels before the first block. Inference needs the last block's alone.
    """

    def __init__(self, hidden: int, decoder_layers: int):
        super().__init__()
        self.blocks = nn.ModuleList(PixelBlock(hidden) for _ in range(decoder_layers))
        self.spatial_features_proj = nn.Conv2d(hidden, hidden, kernel_size=1)
        self.query_features_block = QueryBlock(hidden)
        self.query_features_proj = nn.Linear(hidden, hidden)
        self.bias = nn.Parameter(torch.zeros(1))

    def upsampled(self, features: Tensor, images: Tensor) -> Tensor:
        """features (B, C, h, w) at a quarter of the images' side: (B, C, H/4, W/4)."""
        quarter = (images.shape[-2] // 4, images.shape[-1] // 4)
        return F.interpolate(features, size=quarter, mode="bilinear", align_corners=False)

    def pixels(self, features: Tensor, images: Tensor) -> Tensor:
        """features (B, C, h, w), images (B, 3, H, W) for their size alone -> (B, C, H/4, W/4)."""
        x = self.upsampled(features, images)
        for block in self.blocks:
            x = block(x)
        return self.spatial_features_proj(x)

    def kernels(self, queries: Tensor) -> Tensor:
        """queries (..., C) -> what the pixel embeddings are dotted with, (..., C)."""
        return self.query_features_proj(self.query_features_block(queries))

    def supervise(self, features: Tensor, images: Tensor, predictions: list[dict]) -> None:
        """Add to each prediction what its masks are made of.

        predictions: the proposals', then each layer's. Each gets `pixels` (B, C, H/4, W/4),
        `kernels` (B, Q, C) and `mask_bias` (1,).
        """
        x = self.upsampled(features, images)
        for i, prediction in enumerate(predictions):
            if i > 0:
                x = self.blocks[i - 1](x)
            prediction["pixels"] = self.spatial_features_proj(x)
            prediction["kernels"] = self.kernels(prediction["queries"])
            prediction["mask_bias"] = self.bias

    def paste(
        self, pixels: Tensor, queries: Tensor, boxes: Tensor, placement: Placement
    ) -> Iterator[PastedMask]:
        """As MaskHead.paste, but a mask is not bound to its box: it may fill what is visible.

        In place of an expected IoU comes 1.0: the package ranks masks by their class scores.
        """
        whole = [0, 0, placement.width, placement.height]
        rows, columns = placement.visible_pixels(whole)
        sampler = PixelSampler(placement, pixels)
        for one_map in maps_in_parts(self.kernels(queries), pixels):
            logits = sampler(one_map + self.bias, rows, columns)
            yield PastedMask(columns.start, rows.start, logits > 0, logits.new_ones(()))
