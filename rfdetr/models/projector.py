"""From the encoder's feature maps to the decoder's levels.

Source: LW-DETR, arXiv:2406.03459 (after YOLOv8's C2f).  Letters: B images, D encoder channels,
C channels, h w side of the patch grid.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from rfdetr.sizes import ModelSize

# a level's side relative to the patch grid
LEVEL_SCALE = {"P3": 2.0, "P4": 1.0, "P5": 0.5}


def count_places(size: ModelSize, resolution: int) -> int:
    """How many tokens the feature maps of an input of this side have: one proposal each."""
    side = resolution // size.patch
    return sum(int(side * LEVEL_SCALE[level]) ** 2 for level in size.levels)


class ConvNorm(nn.Module):
    """Convolution without bias, LayerNorm over channels, activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        activation: type[nn.Module] = nn.SiLU,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = LayerNorm2d(outputs)  # the official name; a layer norm all the same
        self.act = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class C2f(nn.Module):
    """Split the channels in two, run one half through bottlenecks, fuse all that comes out."""

    def __init__(self, inputs: int, outputs: int, bottlenecks: int = 3):
        super().__init__()
        half = outputs // 2
        self.cv1 = ConvNorm(inputs, 2 * half, 1)
        self.cv2 = ConvNorm((2 + bottlenecks) * half, outputs, 1)
        self.m = nn.ModuleList()
        for _ in range(bottlenecks):
            convolutions = OrderedDict(cv1=ConvNorm(half, half, 3), cv2=ConvNorm(half, half, 3))
            self.m.append(nn.Sequential(convolutions))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, dim=1))  # (B, outputs/2, h, w) each
        for bottleneck in self.m:
            parts.append(bottleneck(parts[-1]))
        return self.cv2(torch.cat(parts, dim=1))


class Projector(nn.Module):
    """Feature maps, each (B, D, h, w), -> one (B, C, h*s, w*s) map per level, s = LEVEL_SCALE."""

    def __init__(self, dim: int, features: int, hidden: int, levels: tuple[str, ...]):
        super().__init__()
        self.stages_sampling = nn.ModuleList()
        self.stages = nn.ModuleList()
        for level in levels:
            scale = LEVEL_SCALE[level]
            self.stages_sampling.append(
                nn.ModuleList(self._resample(dim, scale) for _ in range(features))
            )
            fused = features * (dim // 2 if scale == 2.0 else dim)
            self.stages.append(nn.Sequential(C2f(fused, hidden), LayerNorm2d(hidden)))

    @staticmethod
    def _resample(dim: int, scale: float) -> nn.Sequential:
        # (B, D, h, w) -> (B, D/2, 2h, 2w), (B, D, h/2, w/2) or the same
        if scale == 2.0:
            return nn.Sequential(nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2))
        if scale == 0.5:
            return nn.Sequential(ConvNorm(dim, dim, 3, stride=2, activation=nn.ReLU))
        return nn.Sequential()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        levels = []
        for resamplers, stage in zip(self.stages_sampling, self.stages):
            resampled = [resample(x) for resample, x in zip(resamplers, features)]
            levels.append(stage(torch.cat(resampled, dim=1)))
        return levels
