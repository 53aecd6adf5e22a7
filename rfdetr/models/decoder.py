"""Two-stage query selection and the DETR decoder.

Sources: DETR (arXiv:2005.12872), Deformable DETR's two stages (arXiv:2010.04159), Group DETR (arXiv:2207.13085),
LW-DETR (arXiv:2406.03459).  Boxes are cxcywh in 0..1 of the image.  Letters: B batch, G groups, Q queries per group,
C channels, S tokens of all levels, K class rows.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.device import fused_attention_pays
from rfdetr.models.deformable_attention import DeformableAttention
from rfdetr.sizes import ModelSize


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int):
        super().__init__()
        widths = [inputs] + [hidden] * (layers - 1) + [outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def move_boxes(boxes: Tensor, delta: Tensor) -> Tensor:
    """Boxes shifted by `delta` in units of their own size, sizes scaled by exp(delta); both (..., 4) cxcywh."""
    return torch.cat(
        (boxes[..., :2] + delta[..., :2] * boxes[..., 2:], delta[..., 2:].exp() * boxes[..., 2:]),
        dim=-1,
    )


def sine_embedding(boxes: Tensor, dim: int) -> Tensor:
    """Sines and cosines of cxcywh boxes, (..., 4) -> (..., 4 * dim), in the order y, x, w, h."""
    frequency = 10000 ** (
        -2 * torch.div(torch.arange(dim, device=boxes.device), 2, rounding_mode="floor") / dim
    )
    angle = boxes[..., [1, 0, 2, 3], None] * (2 * math.pi) * frequency  # (..., 4, dim)
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-3)


def grid_proposals(shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """One box per token, centred on it, 5 % of the image wide, twice that on each further level: (S, 4)."""
    levels = []
    for i, (h, w) in enumerate(shapes):
        y, x = torch.meshgrid(
            torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"
        )
        side = torch.full((h, w), 0.05 * 2.0**i, device=device)
        levels.append(torch.stack(((x + 0.5) / w, (y + 0.5) / h, side, side), dim=-1).flatten(0, 1))
    return torch.cat(levels)


class DecoderLayer(nn.Module):
    """Self-attention inside each group, deformable cross-attention, feed-forward; norms after each."""

    def __init__(self, size: ModelSize):
        super().__init__()
        hidden = size.hidden
        self.self_attn = nn.MultiheadAttention(hidden, size.self_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(hidden)
        self.cross_attn = DeformableAttention(
            hidden, size.cross_heads, len(size.levels), size.points
        )
        self.norm2 = nn.LayerNorm(hidden)
        self.linear1 = nn.Linear(hidden, size.feedforward)
        self.linear2 = nn.Linear(size.feedforward, hidden)
        self.norm3 = nn.LayerNorm(hidden)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        boxes: Tensor,
        memory: Tensor,
        shapes: list[tuple[int, int]],
        groups: int,
    ) -> Tensor:
        # x, position (B, G*Q, C); groups never see each other
        B, _, C = x.shape
        query = (x + position).reshape(B * groups, -1, C)
        apart = not fused_attention_pays(
            x.device
        )  # asked for its weights, the module computes them by themselves
        value = x.reshape(B * groups, -1, C)
        attended = self.self_attn(
            query, query, value, need_weights=apart, average_attn_weights=False
        )[0]
        x = self.norm1(x + attended.reshape(B, -1, C))
        x = self.norm2(x + self.cross_attn(x + position, boxes, memory, shapes))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class Decoder(nn.Module):
    """Decoder layers around fixed reference boxes ("lite" refinement: boxes are refined once, at the end)."""

    def __init__(self, size: ModelSize):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(size) for _ in range(size.decoder_layers))
        self.norm = nn.LayerNorm(size.hidden)
        self.ref_point_head = MLP(2 * size.hidden, size.hidden, size.hidden, 2)

    def forward(
        self, x: Tensor, boxes: Tensor, memory: Tensor, shapes: list[tuple[int, int]], groups: int
    ) -> list[Tensor]:
        position = self.ref_point_head(sine_embedding(boxes, x.shape[-1] // 2))
        outputs = []
        for layer in self.layers:
            x = layer(x, position, boxes, memory, shapes, groups)
            outputs.append(self.norm(x))
        return outputs  # per layer (B, G*Q, C)


class Transformer(nn.Module):
    """Ranks every token as a proposal, turns the best Q into queries, decodes them; G groups while training."""

    def __init__(self, size: ModelSize, groups: int, class_head: nn.Linear, box_head: MLP):
        super().__init__()
        hidden = size.hidden
        self.queries, self.groups = size.queries, groups
        self.decoder = Decoder(size)
        self.enc_output = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(groups))
        self.enc_output_norm = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(groups))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for layer in self.decoder.layers:
            layer.cross_attn.reset_parameters()
        self.enc_out_class_embed = nn.ModuleList(copy.deepcopy(class_head) for _ in range(groups))
        self.enc_out_bbox_embed = nn.ModuleList(copy.deepcopy(box_head) for _ in range(groups))

    def propose(
        self, memory: Tensor, shapes: list[tuple[int, int]], group: int, ranked_rows: int
    ) -> dict[str, Tensor]:
        """The group's best proposals by the highest of the first `ranked_rows` class rows.

        memory (B, S, C) -> pred_logits (B, q, K), pred_boxes (B, q, 4) and their tokens as queries (B, q, C), best
        first; q = min(Q, S).
        """
        anchors = grid_proposals(shapes, memory.device)
        inside = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
        anchors, tokens = anchors * inside, memory * inside
        tokens = self.enc_output_norm[group](self.enc_output[group](tokens))
        logits = self.enc_out_class_embed[group](tokens)
        best = (
            logits[..., :ranked_rows]
            .amax(-1)
            .topk(min(self.queries, logits.shape[1]), dim=1)
            .indices
        )
        row = torch.arange(len(memory), device=memory.device)[:, None]
        tokens = tokens[row, best]
        boxes = move_boxes(anchors[best], self.enc_out_bbox_embed[group](tokens).float())
        return {"pred_logits": logits[row, best], "pred_boxes": boxes, "queries": tokens}

    def forward(
        self, levels: list[Tensor], references: Tensor, query_feat: Tensor, ranked_rows: int
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """levels: (B, C, h, w) each; references (G*Q, 4) learned box deltas; query_feat (G*Q, C).

        Returns the layers' queries (B, G*Q, C), their reference boxes (B, G*Q, 4), and the proposals of all groups.
        """
        shapes = [tuple(level.shape[-2:]) for level in levels]
        memory = torch.cat(
            [level.flatten(2).transpose(1, 2) for level in levels], dim=1
        )  # (B, S, C)
        groups = self.groups if self.training else 1
        B, Q = len(memory), self.queries
        proposals, starts = [], []
        for group in range(groups):
            proposals.append(self.propose(memory, shapes, group, ranked_rows))
            boxes = proposals[-1]["pred_boxes"].detach()
            delta = references[group * Q : (group + 1) * Q].expand(B, -1, -1)
            found = boxes.shape[1]
            # with fewer tokens than queries the rest start from their learned box, as in the official model
            starts += [move_boxes(boxes, delta[:, :found]), delta[:, found:]]
        starts = torch.cat(starts, dim=1)
        queries = query_feat[: groups * Q].expand(B, -1, -1)
        together = {key: torch.cat([p[key] for p in proposals], dim=1) for key in proposals[0]}
        return self.decoder(queries, starts, memory, shapes, groups), starts, together
