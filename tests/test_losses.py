"""Matching and losses against slow, explicit versions; accumulation is exact."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from rfdetr.losses import matcher
from rfdetr.losses.criterion import class_loss, detection_losses, mask_losses
from rfdetr.losses.matcher import match
from rfdetr.models.detector import Detector
from rfdetr.sizes import LossWeights


def random_boxes(count: int) -> torch.Tensor:
    return torch.rand(count, 4) * torch.tensor([0.6, 0.6, 0.3, 0.3]) + torch.tensor(
        [0.2, 0.2, 0.05, 0.05]
    )


def prediction(images: int, queries: int, classes: int = 3) -> dict:
    boxes = random_boxes(images * queries).view(images, queries, 4)
    return {"pred_logits": torch.randn(images, queries, classes), "pred_boxes": boxes}


def explicit_cost(logits: torch.Tensor, guess: torch.Tensor, row: int, box: torch.Tensor) -> float:
    """DETR's matching cost of one query and one object with the focal class cost, written out."""
    p = 1 / (1 + math.exp(-logits[row].item()))
    focal = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
    corners = [box_convert(b[None], "cxcywh", "xyxy") for b in (guess, box)]
    return (
        2 * focal + 5 * (guess - box).abs().sum().item() - 2 * generalized_box_iou(*corners).item()
    )


@pytest.mark.parametrize("seed", range(4))
def test_matching_is_the_cheapest_assignment_of_each_group(seed):
    torch.manual_seed(seed)
    groups = 2
    per_group = 4
    counts = [2, 0, 3]
    found = prediction(3, groups * per_group)
    rows = torch.randint(3, (5,))
    boxes = random_boxes(5)
    ((image, query, obj),) = match([found], rows, boxes, counts, groups)
    assert len(image) == groups * 5
    starts = [0, 2, 2]
    for i, g in itertools.product(range(3), range(groups)):
        here = (image == i) & (torch.div(query, per_group, rounding_mode="floor") == g)
        assert sorted((obj[here] - starts[i]).tolist()) == list(
            range(counts[i])
        )  # each object once a group
        assert len(set(query[here].tolist())) == counts[i]

        def cost(q: int, o: int, i: int = i) -> float:
            return explicit_cost(
                found["pred_logits"][i, q], found["pred_boxes"][i, q], rows[o], boxes[o]
            )

        own = range(g * per_group, (g + 1) * per_group)
        objects = range(starts[i], starts[i] + counts[i])
        cheapest = min(
            sum(cost(q, o) for q, o in zip(chosen, objects))
            for chosen in itertools.permutations(own, counts[i])
        )
        taken = sum(cost(q, o) for q, o in zip(query[here].tolist(), obj[here].tolist()))
        assert taken == pytest.approx(cheapest, abs=1e-4)


def test_predictions_are_matched_independently():
    torch.manual_seed(0)
    several = [prediction(2, 5) for _ in range(3)]
    rows = torch.randint(3, (4,))
    boxes = random_boxes(4)
    counts = [3, 1]
    together = match(several, rows, boxes, counts, groups=1)
    for one, expected in zip(several, together):
        (alone,) = match([one], rows, boxes, counts, groups=1)
        assert all(torch.equal(a, b) for a, b in zip(alone, expected))


def test_no_objects_anywhere_match_nothing():
    ((image, query, obj),) = match(
        [prediction(2, 4)], torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), [0, 0], 2
    )
    assert len(image) == len(query) == len(obj) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_costs_that_are_not_finite_still_give_an_assignment(bad):
    found = prediction(1, 4)
    found["pred_logits"][0, :2] = bad
    found["pred_boxes"][0, 1] = bad
    ((_, query, obj),) = match(
        [found], torch.zeros(2, dtype=torch.long), random_boxes(2), [2], groups=1
    )
    assert sorted(obj.tolist()) == [0, 1] and len(set(query.tolist())) == 2


def test_more_objects_than_queries_match_as_many_as_there_are():
    ((_, query, obj),) = match(
        [prediction(1, 3)], torch.zeros(5, dtype=torch.long), random_boxes(5), [5], groups=1
    )
    assert sorted(query.tolist()) == [0, 1, 2] and len(set(obj.tolist())) == 3


@pytest.mark.parametrize("solver", ["scipy", "lapx"])
@pytest.mark.parametrize("shape", [(6, 9, 40), (3, 12, 12), (3, 8, 5), (2, 1, 7)])
def test_assignments_of_many_problems_cost_the_least(monkeypatch, solver, shape):
    if solver == "scipy":
        monkeypatch.setattr(matcher, "lapjvr_batch", None)
    elif matcher.lapjvr_batch is None:
        pytest.skip("lapx is not installed")
    generator = np.random.default_rng(0)
    for problems in (generator.normal(size=shape), generator.integers(0, 4, shape).astype(float)):
        problems[0, 0, 0] = 1e6  # what is not finite, and many ties
        rows, columns = matcher.cheapest(problems)
        assert rows.shape == columns.shape == (shape[0], min(shape[1:]))
        for problem, own_rows, own_columns in zip(problems, rows, columns):
            assert (np.diff(own_rows) > 0).all() and len(set(own_columns)) == len(own_columns)
            least = problem[linear_sum_assignment(problem)].sum()
            assert problem[own_rows, own_columns].sum() == pytest.approx(least, abs=1e-6)


def test_layers_of_different_widths_are_matched_as_each_alone():
    torch.manual_seed(0)
    found = [prediction(2, 12), prediction(2, 12), prediction(2, 8)]  # fewer proposals
    rows = torch.randint(3, (5,))
    boxes = random_boxes(5)
    together = match(found, rows, boxes, [2, 3], groups=2)
    for one, expected in zip(found, together):
        (alone,) = match([one], rows, boxes, [2, 3], groups=2)
        assert all(torch.equal(a, b) for a, b in zip(alone, expected))


# ---------------- class, box, giou


def test_class_loss_is_the_explicit_loop():
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 4)
    image = torch.tensor([0, 1, 1])
    query = torch.tensor([2, 0, 1])
    rows = torch.tensor([3, 0, 2])
    iou = torch.tensor([0.7, 0.0, 0.95])
    expected = 0.0
    for b, q, k in itertools.product(range(2), range(3), range(4)):
        p = 1 / (1 + math.exp(-logits[b, q, k].item()))
        matched = [n for n in range(3) if (image[n], query[n], rows[n]) == (b, q, k)]
        if matched:
            t = max(p**0.25 * iou[matched[0]].item() ** 0.75, 0.01)
            expected += -t * math.log(p) - (1 - t) * math.log(1 - p)
        else:
            expected += -(p**2) * math.log(1 - p)
    assert class_loss(logits, (image, query), rows, iou).item() == pytest.approx(expected, rel=1e-5)


def test_box_losses_are_the_explicit_sums():
    torch.manual_seed(2)
    found = prediction(2, 6)
    targets = [
        {"rows": torch.tensor(rows), "boxes": random_boxes(len(rows))} for rows in ([0, 2], [1])
    ]
    weights = LossWeights(cls=1.5, bbox=4.0, giou=3.0)
    losses, (image, query, obj) = detection_losses(found, targets, 1, 7.0, weights)
    truth = torch.cat([t["boxes"] for t in targets])
    l1 = giou = 0.0
    for i, q, o in zip(image.tolist(), query.tolist(), obj.tolist()):
        a = found["pred_boxes"][i, q]
        b = truth[o]
        l1 += (a - b).abs().sum().item()
        giou += (
            1
            - generalized_box_iou(*(box_convert(x[None], "cxcywh", "xyxy") for x in (a, b))).item()
        )
    assert losses["loss_box"].item() == pytest.approx(4.0 * l1 / 7, rel=1e-4)
    assert losses["loss_giou"].item() == pytest.approx(3.0 * giou / 7, rel=1e-4)
    rows = torch.cat([t["rows"] for t in targets])[obj]
    pairs = [
        box_convert(x, "cxcywh", "xyxy") for x in (found["pred_boxes"][image, query], truth[obj])
    ]
    cls = class_loss(found["pred_logits"], (image, query), rows, box_iou(*pairs).diagonal())
    assert losses["loss_class"].item() == pytest.approx(1.5 * cls.item() / 7, rel=1e-4)


def test_every_layer_and_the_proposals_have_their_losses(small_model):
    outputs = small_model.train()(torch.randn(1, 3, 64, 64))
    targets = [{"rows": torch.tensor([1]), "boxes": random_boxes(1)}]
    losses, _ = detection_losses(outputs, targets, 2, 2.0, LossWeights())
    kinds = ("loss_class", "loss_box", "loss_giou")
    layers = ("", "_0", "_enc")  # two decoder layers
    assert losses.keys() == {kind + layer for kind in kinds for layer in layers}


def test_images_without_objects_teach_the_classes_alone(small_model):
    outputs = small_model.train()(torch.randn(2, 3, 64, 64))
    nothing = {"rows": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    losses, _ = detection_losses(outputs, [nothing, nothing], 2, 1.0, LossWeights())
    assert losses["loss_box"] == 0 and losses["loss_giou"] == 0 and losses["loss_class"] > 0
    sum(losses.values()).backward()
    assert small_model.class_embed[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in small_model.parameters())


# ---------------- masks


def test_mask_losses_are_the_explicit_means():
    torch.manual_seed(3)
    logits = torch.randn(3, 5, 5)
    target = (torch.rand(3, 5, 5) > 0.5).float()
    losses = mask_losses(logits, target, 6.0, LossWeights(mask=2.0, dice=0.5))
    bce = dice = 0.0
    for one, truth in zip(logits, target):
        bce += F.binary_cross_entropy(one.sigmoid(), truth).item()
        p = one.sigmoid()
        dice += (1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)).item()
    assert losses["loss_mask"].item() == pytest.approx(2 * bce / 6, rel=1e-5)
    assert losses["loss_dice"].item() == pytest.approx(0.5 * dice / 6, rel=1e-5)


def test_perfect_masks_cost_nothing_and_none_at_all_cost_zero():
    target = (torch.rand(2, 8, 8) > 0.5).float()
    assert sum(mask_losses((target * 2 - 1) * 50, target, 2.0, LossWeights()).values()) < 1e-4
    none = mask_losses(
        torch.zeros(0, 8, 8, requires_grad=True), torch.zeros(0, 8, 8), 1.0, LossWeights()
    )
    assert none["loss_mask"] == 0 and none["loss_dice"] == 0
    sum(none.values()).backward()


# ---------------- the divisor


def test_one_batch_of_four_is_four_batches_of_one(small_size):
    """Divided by the objects of the whole effective batch, gradients simply add up."""
    torch.manual_seed(0)
    model = Detector(small_size, rows=5, background=True).train()
    images = torch.randn(4, 3, 64, 64)
    counts = [3, 0, 1, 2]
    targets = [{"rows": torch.randint(4, (n,)), "boxes": random_boxes(n)} for n in counts]
    objects = float(sum(counts)) * 2

    def gradient(parts: list[slice]) -> list[torch.Tensor]:
        model.zero_grad()
        for part in parts:
            losses, _ = detection_losses(
                model(images[part]), targets[part], 2, objects, LossWeights()
            )
            sum(losses.values()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = gradient([slice(0, 4)])
    parts = gradient([slice(i, i + 1) for i in range(4)])
    assert len(whole) == len(parts)
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
