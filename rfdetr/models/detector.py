"""The RF-DETR detector, with room for a mask head on top.

Source: RF-DETR, arXiv:2511.09554, in the architecture of PyPI rfdetr 1.11. Letters: B images, G
groups, Q queries per group, C channels, K class rows, N classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rfdetr.models.decoder import MLP, Transformer, move_boxes
from rfdetr.models.official_masks import OfficialMaskHead
from rfdetr.models.parts import ModelPart, trainable
from rfdetr.models.projector import Projector
from rfdetr.models.segmentation import MASK_HEADS, HeadForm, MaskHead
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

    `rows`: rows of the class head.
    `background`: whether the last row is a background row, which never ranks a proposal.
    `mask_head`: None, "nano", "standard", or "official" for the head of the official mask models.
    Masks are computed from the outputs, for chosen queries only.
    `groups`: query groups; None is the size's own number.
    `mask_form`: of a "nano" or "standard" head; None is that of new heads.

    Parameter names are the official ones, except that class_embed and bbox_embed are lists and that
    the encoder's blocks carry timm's names (weights/official.py maps both ways).
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
        mask_form: HeadForm | None = None,
    ):
        super().__init__()
        self.size = size
        self.background = background
        if groups is None:
            groups = size.recipe.group_detr
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
        self.mask_head = None
        self.segmentation_head = None  # so that its parameters have their official names
        if mask_head == "official":
            self.segmentation_head = OfficialMaskHead(size.hidden, size.decoder_layers)
        elif mask_head is not None:
            self.mask_head = MASK_HEADS[mask_head](size.hidden, mask_form)

    @property
    def encoder(self) -> WindowedViT:
        return self.backbone[0].encoder["encoder"]

    @property
    def head(self) -> MaskHead | OfficialMaskHead | None:
        """Whichever mask head there is."""
        return self.segmentation_head or self.mask_head

    def parts(self) -> list[ModelPart]:
        """The parameters that train, in parts that have a learning rate and a weight decay of their
        own.

        The order, in the list and inside a part, is the one in which optimizer states are stored:
        do not change it.
        """
        encoder = self.encoder.parts()
        decoder = trainable(self.transformer.decoder)
        in_another_part = {id(parameter) for parameter in decoder}
        for part in encoder:
            in_another_part.update(id(parameter) for parameter in part.parameters)
        other = [parameter for parameter in trainable(self) if id(parameter) not in in_another_part]
        parts = [*encoder, ModelPart("other", other), ModelPart("decoder", decoder)]
        return [part for part in parts if part.parameters]

    def forward(self, images: Tensor) -> dict:
        """images (B, 3, H, W), normalised.

        Returns pred_logits (B, Q, K), pred_boxes (B, Q, 4) cxcywh 0..1, and what the mask head
        reads: queries (B, Q, C) and features (B, C, h, w) of the finest level. While training Q is
        G*Q, and aux_outputs and enc_outputs hold the same tensors of the earlier layers and of the
        proposals; an official mask head adds to each what its masks are made of
        (OfficialMaskHead.supervise).
        """
        levels = self.backbone[0](images)  # (B, C, h, w) each
        rows = self.class_embed[0].out_features
        ranked_rows = rows - 1 if self.background else rows
        layers, references, proposals = self.transformer(
            levels, self.refpoint_embed.weight, self.query_feat.weight, ranked_rows
        )
        if not self.training:
            layers = layers[-1:]
        logits = [self.class_embed[0](queries) for queries in layers]
        deltas = [self.bbox_embed[0](queries).float() for queries in layers]
        predictions = []
        for layer_logits, delta, queries in zip(logits, deltas, layers):
            boxes = move_boxes(references, delta)
            predictions.append(
                {"pred_logits": layer_logits, "pred_boxes": boxes, "queries": queries}
            )
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
    Returns scores (B, k) 0..1, labels (B, k), boxes (B, k, 4) cxcywh 0..1, query indices (B, k); k
    = min(select, Q*N).
    """
    scores = outputs["pred_logits"].float()[..., class_rows].sigmoid()  # (B, Q, N)
    N = scores.shape[-1]
    pairs = scores.flatten(1)  # (B, Q*N)
    best_scores, best = pairs.topk(min(select, pairs.shape[1]), dim=1)
    queries = torch.div(best, N, rounding_mode="floor")
    labels = best % N
    boxes = outputs["pred_boxes"].gather(1, queries[..., None].expand(-1, -1, 4))
    return best_scores, labels, boxes, queries
