"""Two-stage query selection and the DETR decoder.

Sources: DETR (arXiv:2005.12872), Deformable DETR's two stages (arXiv:2010.04159), Group DETR
(arXiv:2207.13085), LW-DETR (arXiv:2406.03459). Boxes are cxcywh in 0..1 of the image. Letters: B
images, G groups, Q queries per group, C channels, S tokens of all levels, K class rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

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
    """Shift boxes by `delta` in units of their own size and scale their size by exp(delta).

    boxes (..., 4) cxcywh, delta (..., 4) -> (..., 4) cxcywh.
    """
    centre = boxes[..., :2] + delta[..., :2] * boxes[..., 2:]
    size = delta[..., 2:].exp() * boxes[..., 2:]
    return torch.cat((centre, size), dim=-1)


def sine_embedding(boxes: Tensor, dim: int) -> Tensor:
    """Sines and cosines of cxcywh boxes, (..., 4) -> (..., 4 * dim), in the order y, x, w, h."""
    channels = torch.arange(dim, device=boxes.device)
    pairs = torch.div(channels, 2, rounding_mode="floor")
    frequency = 10000 ** (-2 * pairs / dim)  # (dim,)
    x, y, w, h = boxes[..., None].split(1, dim=-2)  # (..., 1, 1) each
    yxwh = torch.cat((y, x, w, h), dim=-2)  # (..., 4, 1)
    angle = yxwh * (2 * math.pi) * frequency  # (..., 4, dim)
    sines = angle[..., 0::2].sin()
    cosines = angle[..., 1::2].cos()
    return torch.stack((sines, cosines), dim=-1).flatten(-3)


def grid_proposals(shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """One box per token, centred on it: (S, 4) cxcywh 0..1.

    Boxes are 5 % of the image wide and high on the first level, and twice that on each further
    level.
    """
    levels = []
    for i, (h, w) in enumerate(shapes):
        rows = torch.arange(h, device=device)
        columns = torch.arange(w, device=device)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        side = torch.full((h, w), 0.05 * 2.0**i, device=device)
        boxes = torch.stack(((x + 0.5) / w, (y + 0.5) / h, side, side), dim=-1)  # (h, w, 4)
        levels.append(boxes.flatten(0, 1))
    return torch.cat(levels)


def stacked(modules: Iterable[nn.Module], name: str) -> Tensor:
    """The parameters of this name, (G, ...)."""
    parameters = [getattr(module, name) for module in modules]
    return torch.stack(parameters) if len(parameters) > 1 else parameters[0][None]


def linear_of_groups(layers: Iterable[nn.Linear], x: Tensor) -> Tensor:
    """Each group's linear layer on its own rows: x (G, n, inputs) -> (G, n, outputs)."""
    weights = stacked(layers, "weight").transpose(1, 2)  # (G, inputs, outputs)
    return torch.baddbmm(stacked(layers, "bias")[:, None], x, weights)


def groups_in_a_row(x: Tensor) -> Tensor:
    """(G, B, q, ...) -> (B, G*q, ...)."""
    return x.transpose(0, 1).flatten(1, 2)


class DecoderLayer(nn.Module):
    """Self-attention inside each group, deformable cross-attention, feed-forward."""

    def __init__(self, size: ModelSize):
        super().__init__()
        hidden = size.hidden
        levels = len(size.levels)
        self.self_attn = nn.MultiheadAttention(hidden, size.self_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(hidden)
        self.cross_attn = DeformableAttention(hidden, size.cross_heads, levels, size.points)
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
        """One layer on all queries; groups never see each other.

        x, position (B, G*Q, C), boxes (B, G*Q, 4), memory (B, S, C), shapes [(h, w)] per level ->
        (B, G*Q, C).
        """
        B, _, C = x.shape
        query = (x + position).reshape(B * groups, -1, C)  # (B*G, Q, C)
        value = x.reshape(B * groups, -1, C)
        # asked for its weights, the module takes torch's plain attention instead of the fused one
        plain = not fused_attention_pays(x.device)
        attended, _ = self.self_attn(
            query, query, value, need_weights=plain, average_attn_weights=False
        )
        x = self.norm1(x + attended.reshape(B, -1, C))
        x = self.norm2(x + self.cross_attn(x + position, boxes, memory, shapes))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class Decoder(nn.Module):
    """Decoder layers around fixed reference boxes: boxes are refined once, at the end."""

    def __init__(self, size: ModelSize):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(size) for _ in range(size.decoder_layers))
        self.norm = nn.LayerNorm(size.hidden)
        self.ref_point_head = MLP(2 * size.hidden, size.hidden, size.hidden, 2)

    def forward(
        self, x: Tensor, boxes: Tensor, memory: Tensor, shapes: list[tuple[int, int]], groups: int
    ) -> list[Tensor]:
        """x (B, G*Q, C), boxes (B, G*Q, 4), memory (B, S, C) -> (B, G*Q, C) after each layer."""
        position = self.ref_point_head(sine_embedding(boxes, x.shape[-1] // 2))  # (B, G*Q, C)
        outputs = []
        for layer in self.layers:
            x = layer(x, position, boxes, memory, shapes, groups)
            outputs.append(self.norm(x))
        return outputs


class Transformer(nn.Module):
    """Ranks every token as a proposal, turns the best Q into queries and decodes them.

    While training this is done in G groups, each with heads and queries of its own.
    """

    def __init__(self, size: ModelSize, groups: int, class_head: nn.Linear, box_head: MLP):
        super().__init__()
        hidden = size.hidden
        self.queries = size.queries
        self.groups = groups
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
        self, memory: Tensor, shapes: list[tuple[int, int]], groups: int, ranked_rows: int
    ) -> dict[str, Tensor]:
        """Each group's best proposals by the highest of the first `ranked_rows` class rows, best
        first.

        memory (B, S, C) -> pred_logits (G, B, q, K), pred_boxes (G, B, q, 4) and their tokens as
        queries (G, B, q, C), where q = min(Q, S). The groups' layers are run as one: a GPU would
        spend more time on starting them than on computing.
        """
        B, S, C = memory.shape
        anchors = grid_proposals(shapes, memory.device)  # (S, 4)
        inside = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)  # (S, 1)
        anchors = anchors * inside
        tokens = (memory * inside).flatten(0, 1).expand(groups, -1, -1)  # (G, B*S, C)
        tokens = linear_of_groups(self.enc_output[:groups], tokens)
        tokens = torch.stack([norm(own) for norm, own in zip(self.enc_output_norm, tokens)])
        logits = linear_of_groups(self.enc_out_class_embed[:groups], tokens)  # (G, B*S, K)
        tokens = tokens.unflatten(1, (B, S))
        logits = logits.unflatten(1, (B, S))
        scores = logits[..., :ranked_rows].amax(-1)  # (G, B, S)
        best = scores.topk(min(self.queries, S), dim=-1).indices  # (G, B, q)
        tokens = tokens.gather(2, best[..., None].expand(-1, -1, -1, C))  # (G, B, q, C)
        logits = logits.gather(2, best[..., None].expand(-1, -1, -1, logits.shape[-1]))
        delta = tokens.flatten(1, 2)  # (G, B*q, C)
        heads = self.enc_out_bbox_embed[:groups]
        for i in range(len(heads[0].layers)):
            if i > 0:
                delta = F.relu(delta)
            delta = linear_of_groups([head.layers[i] for head in heads], delta)
        delta = delta.unflatten(1, (B, -1)).float()  # (G, B, q, 4)
        boxes = move_boxes(anchors[best], delta)
        return {"pred_logits": logits, "pred_boxes": boxes, "queries": tokens}

    def forward(
        self, levels: list[Tensor], learned_deltas: Tensor, query_feat: Tensor, ranked_rows: int
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """levels: (B, C, h, w) each; learned_deltas (G*Q, 4) move the proposals' boxes; query_feat
        (G*Q, C).

        Returns the queries after each layer (B, G*Q, C), their reference boxes (B, G*Q, 4), and the
        proposals of all groups. In eval mode there is one group.
        """
        shapes = [tuple(level.shape[-2:]) for level in levels]
        tokens = [level.flatten(2).transpose(1, 2) for level in levels]
        memory = torch.cat(tokens, dim=1)  # (B, S, C)
        groups = self.groups if self.training else 1
        B = len(memory)
        Q = self.queries
        proposals = self.propose(memory, shapes, groups, ranked_rows)
        boxes = proposals["pred_boxes"].detach()  # (G, B, q, 4)
        count = boxes.shape[2]
        deltas = learned_deltas[: groups * Q].view(groups, 1, Q, 4).expand(-1, B, -1, -1)
        references = move_boxes(boxes, deltas[:, :, :count])
        if count < Q:
            # with fewer tokens than queries the rest start from their learned box, as in the
            # official model
            references = torch.cat((references, deltas[:, :, count:]), dim=2)
        references = groups_in_a_row(references)  # (B, G*Q, 4)
        queries = query_feat[: groups * Q].expand(B, -1, -1)  # (B, G*Q, C)
        layers = self.decoder(queries, references, memory, shapes, groups)
        proposals = {name: groups_in_a_row(values) for name, values in proposals.items()}
        return layers, references, proposals
