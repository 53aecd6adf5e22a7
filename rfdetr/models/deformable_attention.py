"""Multi-scale deformable attention with box-shaped references.  Source: Deformable DETR, arXiv:2010.04159."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeformableAttention(nn.Module):
    """Each query reads a few bilinear samples around its reference box and averages them with learned weights.

    Letters: B batch, Q queries, C channels, M heads, L levels, P points, S = sum of the levels' h*w.
    """

    def __init__(self, hidden: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
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
        steps = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        offsets = (direction.view(-1, 1, 1, 2) * steps).expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for tensor in (
            self.sampling_offsets.weight,
            self.attention_weights.weight,
            self.attention_weights.bias,
        ):
            nn.init.zeros_(tensor)

    def forward(
        self, queries: Tensor, boxes: Tensor, memory: Tensor, shapes: list[tuple[int, int]]
    ) -> Tensor:
        """queries (B, Q, C), boxes (B, Q, 4) cxcywh 0..1, memory (B, S, C), shapes [(h, w)] per level -> (B, Q, C)."""
        B, Q, C = queries.shape
        M, L, P = self.heads, self.levels, self.points
        value = self.value_proj(memory).transpose(1, 2).reshape(B * M, C // M, -1)
        offsets = self.sampling_offsets(queries).view(B, Q, M, L, P, 2)
        weights = self.attention_weights(queries).view(B, Q, M, L * P).softmax(-1)
        box = boxes[:, :, None, None, None]
        # an offset of P reaches the edge of the box
        places = box[..., :2] + offsets / P * box[..., 2:] * 0.5  # (B, Q, M, L, P, 2) in 0..1
        grid = (2 * places - 1).permute(0, 2, 3, 1, 4, 5).reshape(B * M, L, Q, P, 2)
        samples = [
            F.grid_sample(
                level.unflatten(-1, shape), grid[:, i].to(value.dtype), align_corners=False
            )
            for i, (level, shape) in enumerate(
                zip(value.split([h * w for h, w in shapes], dim=-1), shapes)
            )
        ]  # L x (B*M, C/M, Q, P)
        weights = weights.transpose(1, 2).reshape(B * M, 1, Q, L * P)
        out = (torch.cat(samples, dim=-1) * weights).sum(-1)  # (B*M, C/M, Q)
        return self.output_proj(out.reshape(B, C, Q).transpose(1, 2))
