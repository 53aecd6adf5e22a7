"""Our numbers beside those of the published package, on the same made-up weights."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from rfdetr.inference.detections import Detections
from rfdetr.losses.criterion import detection_losses
from rfdetr.models.detector import Detector, select_detections
from rfdetr.placement import Placement
from rfdetr.sizes import SIZES, LossWeights
from rfdetr.weights.official import from_official
from testkit.made_up import (
    OBJECTS,
    ORIGINAL,
    features_kept,
    flat_predictions,
    hashed,
    made_up,
    made_up_batch,
    made_up_points,
)

# size, resolution, with training: small inputs, other than the stored position grid, once with
# fewer tokens than queries
RECORDED = [
    ("nano", 320, True),
    ("nano", 384, False),
    ("small", 192, False),
    ("medium", 320, False),
    ("base", 280, False),
    ("large", 168, False),
    ("large-2026", 192, False),
    ("seg-nano", 132, True),
    ("seg-small", 192, False),
    ("seg-2xlarge", 144, False),
]


@contextmanager
def ranked_as(order: Tensor, agreement: list[float]):
    """Let every group rank its proposals in the recorded `order` (G, B, Q).

    Rounding swaps near-equal scores, and then queries meet other proposals and nothing can be
    compared. `agreement` receives the share of places where our own order is the same.
    """
    topk = Tensor.topk
    theirs = order.long()

    def replay(scores: Tensor, k: int, dim: int) -> SimpleNamespace:
        agreement.append((topk(scores, k, dim=dim).indices == theirs).float().mean().item())
        return SimpleNamespace(indices=theirs)

    with mock.patch.object(Tensor, "topk", replay):
        yield


def own_values(
    model, resolution: int, order: dict[str, Tensor], nudge: float = 0.0
) -> dict[str, Tensor]:
    """Our numbers under the peer's names.

    `order` holds "order eval" and, to train as well, "order train".
    """
    images, targets = made_up_batch(resolution)
    images = images * (1 + nudge)
    agreement: list[float] = []
    values: dict[str, Tensor] = {}
    backbone = model.eval().backbone[0]
    kept = features_kept(backbone.encoder["encoder"], backbone.projector, values)
    with torch.no_grad(), ranked_as(order["order eval"], agreement), kept:
        outputs = model(images)
    with torch.no_grad():
        if model.head is not None:
            pixels = model.head.pixels(outputs["features"], images)
            kernels = model.head.kernels(outputs["queries"])
            logits = torch.einsum("bchw,bqc->bqhw", pixels, kernels)
            outputs["pred_masks"] = logits + model.head.bias
        values |= flat_predictions("eval", outputs) | own_found(model, outputs, images, order)
    if "order train" in order:
        model.train().zero_grad()
        with ranked_as(order["order train"], agreement):
            outputs = model(images)
        groups = model.transformer.groups
        recipe = model.size.recipe
        weights = LossWeights(mask=recipe.single_mask_loss_coef, dice=recipe.single_dice_loss_coef)
        with mock.patch.object(torch, "rand", made_up_points):
            losses, matches = detection_losses(
                outputs, targets, groups, sum(OBJECTS) * groups, weights
            )
        sum(losses.values()).backward()
        values |= flat_predictions("train", outputs)
        their_names = {"class": "ce", "box": "bbox", "mask": "mask_ce", "dice": "mask_dice"}
        for name, loss in losses.items():
            kind, *layer = name.removeprefix("loss_").split("_")
            values["loss/" + "_".join(["loss", their_names.get(kind, kind), *layer])] = (
                loss.detach()
            )
        values |= {
            f"gradient/{n}": p.grad for n, p in model.named_parameters() if p.grad is not None
        }
        values["matches"] = torch.stack(matches)
    values["order agreement"] = torch.tensor(min(agreement))
    return values


def own_found(model, outputs: dict, images: Tensor, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our post-processing.

    Of their logits and boxes where these are whole, so that rounding changes no order.
    """
    names = {"pred_logits": "eval logits/last", "pred_boxes": "eval boxes/last"}
    whole = {
        key: theirs[name] for key, name in names.items() if theirs[name].shape == outputs[key].shape
    }
    scores, labels, boxes, queries = select_detections(
        outputs | whole, torch.arange(91), model.size.select
    )
    found = {"found scores": scores, "found labels": labels}
    placement = Placement.resized(*ORIGINAL)
    detections = Detections(
        indices=list(range(len(images))),
        placements=[placement] * len(images),
        scores=scores,
        labels=labels,
        boxes=boxes,
        queries=queries,
        features=outputs["features"],
        images=images,
    )
    pixel_boxes = [detections.boxes_in_original(i) for i in range(len(images))]
    found["found boxes"] = torch.from_numpy(np.stack(pixel_boxes))
    if model.head is not None:
        pixels = model.head.pixels(outputs["features"], images)
        parts = zip(pixels, outputs["queries"], queries, boxes)
        masks = [
            list(model.head.paste(p, own[chosen], box, placement)) for p, own, chosen, box in parts
        ]
        found["found masks"] = torch.stack(
            [torch.stack([mask for _, _, mask, _ in one]) for one in masks]
        )[:, :, None]
    return found


def build_own(size: str, shapes: dict[str, tuple[int, ...]]):
    """Our detector with the made-up weights, every official tensor loaded strictly."""
    with torch.device("meta"):
        masks = SIZES[size].mask_head == "official"
        model = Detector(SIZES[size], rows=91, mask_head="official" if masks else None)
    state = from_official({name: made_up(name, shape) for name, shape in shapes.items()})
    model.load_state_dict(state, assign=True)
    return model


def error(name: str, ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value; of gradients the distance over the norm."""
    if name.startswith("gradient/"):
        return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The worst error of every kind of value (the name before the slash).

    Raises KeyError for a value that we lack.
    """
    worst: dict[str, float] = {}
    for name, value in theirs.items():
        if "/" in name:
            kind = name.split("/")[0]
            worst[kind] = max(worst.get(kind, 0.0), error(name, ours[name], value))
    return worst


def same_matches(ours: Tensor, theirs: Tensor) -> bool:
    """(3, n) each: image, query, object, in any order."""
    return set(map(tuple, ours.T.tolist())) == set(map(tuple, theirs.T.tolist()))


def sample(value: Tensor, count: int) -> Tensor:
    """`count` entries spread over the tensor, for a small recording; scalars stay scalars."""
    return value.flatten()[:: max(1, value.numel() // count)][:count].clone()


def projections(name: str, gradient: Tensor) -> list[float]:
    """The norm of a gradient, and its product with a made-up direction of length 1."""
    direction = hashed(name, tuple(gradient.shape))
    return [gradient.norm().item(), ((gradient * direction).sum() / direction.norm()).item()]
