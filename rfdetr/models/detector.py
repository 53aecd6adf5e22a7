"""The RF-DETR detector, with room for a mask head on top.

Source: RF-DETR, arXiv:2511.09554, in the architecture of PyPI rfdetr 1.11.  Letters: B images, G groups, Q queries per
group, C channels, K class rows, N classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rfdetr.models.decoder import MLP, Transformer, move_boxes
from rfdetr.models.projector import Projector
from rfdetr.models.segmentation import MASK_HEADS, MaskHead, OfficialMaskHead
from rfdetr.models.windowed_vit import WindowedViT, standardise
from rfdetr.sizes import ModelSize


class Backbone(nn.Module):
    """Encoder and projector: (B, 3, H, W) -> one (B, C, h, w) map per level."""

    def __init__(self, size: ModelSize, drop_path: float, grad_checkpoint: bool):
        super().__init__()
        self.standardise = size.standardise
        self.encoder = nn.ModuleDict({"encoder": WindowedViT(size, drop_path, grad_checkpoint)})
        self.projector = Projector(size.dim, len(size.feature_layers), size.hidden, size.levels)

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.standardise:
            images = standardise(images)
        return self.projector(self.encoder["encoder"](images))


class Detector(nn.Module):
    """Normalised images -> class logits and boxes of Q queries (G x Q while training).

    `rows`: rows of the class head. `background`: the last row is a background row, which never ranks a proposal.
    `mask_head`: None, "nano" or "standard", or "official", the package's; masks are computed from the outputs for
    chosen queries only.
    Parameter names are the official ones, except that class_embed and bbox_embed are lists and that the encoder's
    blocks carry timm's names (convert.py maps both ways).
    """

    def __init__(
        self,
        size: ModelSize,
        rows: int,
        background: bool = False,
        mask_head: str | None = None,
        groups: int | None = None,
        drop_path: float = 0.0,
        grad_checkpoint: bool = False,
    ):
        super().__init__()
        self.size, self.background = size, background
        groups = size.recipe.group_detr if groups is None else groups
        class_head = nn.Linear(size.hidden, rows)
        nn.init.constant_(class_head.bias, -math.log(99))  # every class starts at probability 0.01
        box_head = MLP(size.hidden, size.hidden, 4, 3)
        nn.init.zeros_(box_head.layers[-1].weight)
        nn.init.zeros_(box_head.layers[-1].bias)
        self.backbone = nn.ModuleList([Backbone(size, drop_path, grad_checkpoint)])
        self.transformer = Transformer(size, groups, class_head, box_head)
        self.class_embed = nn.ModuleList([class_head])
        self.bbox_embed = nn.ModuleList([box_head])
        self.refpoint_embed = nn.Embedding(groups * size.queries, 4)
        nn.init.zeros_(self.refpoint_embed.weight)
        self.query_feat = nn.Embedding(groups * size.queries, size.hidden)
        self.mask_head = (
            MASK_HEADS[mask_head](size.hidden) if mask_head not in (None, "official") else None
        )
        official = (
            mask_head == "official"
        )  # a module of its own, for the official names of its parameters
        self.segmentation_head = (
            OfficialMaskHead(size.hidden, size.decoder_layers) if official else None
        )

    @property
    def encoder(self) -> WindowedViT:
        return self.backbone[0].encoder["encoder"]

    @property
    def head(self) -> MaskHead | OfficialMaskHead | None:
        """Whichever mask head there is."""
        return self.segmentation_head or self.mask_head

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W), normalised.

        Returns pred_logits (B, Q, K), pred_boxes (B, Q, 4) cxcywh 0..1, and what the mask head reads: queries (B, Q, C)
        and features (B, C, h, w) of the finest level. While training Q is G*Q, and aux_outputs and enc_outputs hold
        the same tensors of the earlier layers and of the proposals; an official mask head adds to each what its
        masks are made of (OfficialMaskHead.supervise).
        """
        levels = self.backbone[0](images)
        ranked = self.class_embed[0].out_features - self.background
        layers, references, proposals = self.transformer(
            levels, self.refpoint_embed.weight, self.query_feat.weight, ranked
        )
        if not self.training:
            layers = layers[-1:]
        logits = [self.class_embed[0](queries) for queries in layers]
        boxes = [move_boxes(references, self.bbox_embed[0](queries).float()) for queries in layers]
        keys = ("pred_logits", "pred_boxes", "queries")
        predictions = [dict(zip(keys, values)) for values in zip(logits, boxes, layers)]
        if self.training and self.segmentation_head is not None:
            self.segmentation_head.supervise(levels[0], images, [proposals, *predictions])
        outputs = predictions[-1] | {"features": levels[0]}
        if self.training:
            outputs["aux_outputs"] = predictions[:-1]
            outputs["enc_outputs"] = proposals
        return outputs


def select_detections(
    outputs: dict, class_rows: Tensor, select: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best (query, class) pairs of each image, best first.

    class_rows (N,): the head row of each label; other rows give no results.
    Returns scores (B, k) 0..1, labels (B, k), boxes (B, k, 4) cxcywh 0..1, query indices (B, k); k = min(select, Q*N).
    """
    scores = outputs["pred_logits"].float()[..., class_rows].sigmoid()  # (B, Q, N)
    N = scores.shape[-1]
    scores, best = scores.flatten(1).topk(min(select, scores[0].numel()), dim=1)
    queries = torch.div(best, N, rounding_mode="floor")
    boxes = outputs["pred_boxes"].gather(1, queries[..., None].expand(-1, -1, 4))
    return scores, best % N, boxes, queries
