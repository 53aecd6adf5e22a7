"""Multi-scale deformable attention with box-shaped references.

Source: Deformable DETR, arXiv:2010.04159.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeformableAttention(nn.Module):
    """Each query reads a few bilinear samples around its reference box and averages them with
    learned weights.

    Letters: B images, Q queries, C channels, M heads, L levels, P points, S = sum of the levels'
    h*w.
    """

    def __init__(self, hidden: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads = heads
        self.levels = levels
        self.points = points
        self.sampling_offsets = nn.Linear(hidden, heads * levels * points * 2)
        self.attention_weights = nn.Linear(hidden, heads * levels * points)
        self.value_proj = nn.Linear(hidden, hidden)
        self.output_proj = nn.Linear(hidden, hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Heads start looking in evenly spread directions, point k at k times the distance."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # (M, 2) on the unit square
        distance = torch.arange(1, self.points + 1).view(1, 1, -1, 1)  # (1, 1, P, 1)
        offsets = direction.view(-1, 1, 1, 2) * distance  # (M, 1, P, 2)
        offsets = offsets.expand(-1, self.levels, -1, -1)  # (M, L, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)

    def forward(
        self, queries: Tensor, boxes: Tensor, memory: Tensor, shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Read `memory` around the queries' boxes.

        queries (B, Q, C), boxes (B, Q, 4) cxcywh 0..1, memory (B, S, C), shapes [(h, w)] per level
        -> (B, Q, C).
        """
        B, Q, C = queries.shape
        M = self.heads
        L = self.levels
        P = self.points
        value = self.value_proj(memory).transpose(1, 2)  # (B, C, S)
        value = value.reshape(B * M, C // M, -1)  # (B*M, C/M, S)
        offsets = self.sampling_offsets(queries).view(B, Q, M, L, P, 2)
        weights = self.attention_weights(queries).view(B, Q, M, L * P).softmax(-1)
        box = boxes[:, :, None, None, None]  # (B, Q, 1, 1, 1, 4)
        # an offset of P reaches the edge of the box
        positions = box[..., :2] + offsets / P * box[..., 2:] * 0.5  # (B, Q, M, L, P, 2) in 0..1
        grid = (2 * positions - 1).permute(0, 2, 3, 1, 4, 5)  # (B, M, L, Q, P, 2) in -1..1
        grid = grid.reshape(B * M, L, Q, P, 2)
        samples = []
        level_values = value.split([h * w for h, w in shapes], dim=-1)
        for i, (level_value, shape) in enumerate(zip(level_values, shapes)):
            # fp32: rounded to bf16, a position would be wrong by up to .03 of a cell
            level_map = level_value.unflatten(-1, shape).float()  # (B*M, C/M, h, w)
            level_grid = grid[:, i].float()  # (B*M, Q, P, 2)
            samples.append(F.grid_sample(level_map, level_grid, align_corners=False))
        samples = torch.cat(samples, dim=-1)  # (B*M, C/M, Q, L*P)
        weights = weights.transpose(1, 2).reshape(B * M, 1, Q, L * P)
        out = (samples * weights).sum(-1)  # (B*M, C/M, Q)
        return self.output_proj(out.reshape(B, C, Q).transpose(1, 2))
