"""Attention for inference on a CPU in bf16, a few heads at a time."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

# attention scores computed at once on a core: 1 MB in bf16, which its cache holds
SCORES_AT_ONCE = 2**19


class AttentionInParts(nn.Module):
    """timm's attention without norms, masks and dropout, and with the same results.

    Scores of all heads do not fit in a core's cache where attention is over a whole image; those of
    one head do, and softmax and product find them there.
    """

    def __init__(self, attention: Attention):
        super().__init__()
        self.heads = attention.num_heads
        self.scale = attention.scale
        self.qkv = attention.qkv
        self.proj = attention.proj

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C), N tokens that all see each other.

        timm's blocks name the masks; these models have none.
        """
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, B * self.heads, N, -1).contiguous()  # (B*heads, N, d) each
        q = q * self.scale
        at_once = max(1, torch.get_num_threads() * SCORES_AT_ONCE // N**2)
        parts = []
        for own_q, own_k, own_v in zip(q.split(at_once), k.split(at_once), v.split(at_once)):
            scores = torch.bmm(own_q, own_k.transpose(1, 2))  # (at_once, N, N)
            parts.append(torch.bmm(scores.softmax(-1), own_v))
        x = torch.cat(parts).unflatten(0, (B, self.heads))  # (B, heads, N, d)
        return self.proj(x.transpose(1, 2).flatten(2))


def divide_attention(model: nn.Module) -> None:
    """Put attention in parts in the place of that of every block of timm."""
    for parent in model.modules():
        for name, layer in parent.named_children():
            if type(layer) is Attention:
                setattr(parent, name, AttentionInParts(layer))
