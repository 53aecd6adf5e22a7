"""The official mask models: their head, its costs and losses at points, and the scripts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import train_flags

import evaluate
import predict
import train_seg_single_stage
import train_seg_stage2
from rfdetr.classes import assign_rows
from rfdetr.console import UserError
from rfdetr.detr import RFDETR, RFDETRSegNano
from rfdetr.losses.criterion import detection_losses
from rfdetr.losses.matcher import Matches
from rfdetr.losses.points import mask_costs, sample_matched_masks, true_at, uncertain_points
from rfdetr.models.detector import Detector
from rfdetr.models.official_masks import OfficialMaskHead
from rfdetr.placement import Placement
from rfdetr.sizes import SIZES, LossWeights, ModelSize
from rfdetr.weights import checkpoint
from rfdetr.weights.official import to_official


@pytest.fixture
def seg_size(monkeypatch) -> ModelSize:
    """A very small size with the official head, known to everything in this process."""
    size = replace(
        SIZES["tiny"],
        name="seg-test",
        mask_head="official",
        depth=3,
        queries=12,
        select=12,
        weights_url="none",
    )
    monkeypatch.setitem(SIZES, size.name, replace(size, recipe=replace(size.recipe, group_detr=2)))
    return SIZES[size.name]


@pytest.fixture
def seg_model(seg_size) -> Detector:
    torch.manual_seed(0)
    return Detector(seg_size, 91, mask_head="official")


@pytest.fixture
def official_file(seg_model, tmp_path) -> Path:
    path = tmp_path / "seg.pth"
    torch.save({"model": to_official(seg_model.state_dict())}, path)
    return path


def targets_of(counts: list[int], side: int = 64) -> list[dict]:
    return [
        {
            "rows": torch.arange(n),
            "boxes": torch.rand(n, 4) * 0.3 + 0.2,
            "masks": (torch.rand(n, side, side) > 0.5).to(torch.uint8),
            "has_mask": torch.ones(n, dtype=torch.bool),
        }
        for n in counts
    ]


# ---------------- head


def test_every_layer_and_the_proposals_learn_masks_and_every_parameter_gets_a_gradient(seg_model):
    outputs = seg_model.train()(torch.randn(2, 3, 64, 64))
    losses, _ = detection_losses(outputs, targets_of([3, 0]), 2, 6.0, LossWeights())
    kinds = ("loss_class", "loss_box", "loss_giou", "loss_mask", "loss_dice")
    assert losses.keys() == {kind + layer for kind in kinds for layer in ("", "_0", "_enc")}
    sum(losses.values()).backward()
    without = {name for name, p in seg_model.named_parameters() if p.grad is None}
    assert without == {name for name, p in seg_model.named_parameters() if not p.requires_grad}


def test_images_without_objects_teach_no_masks(seg_model):
    outputs = seg_model.train()(torch.randn(2, 3, 64, 64))
    losses, _ = detection_losses(outputs, targets_of([0, 0]), 2, 1.0, LossWeights())
    assert losses["loss_mask"] == 0 and losses["loss_dice_enc"] == 0
    sum(losses.values()).backward()


def test_inference_gives_the_last_layers_masks_for_the_chosen_queries_alone(seg_model):
    images = torch.randn(1, 3, 64, 64)
    head = seg_model.train().head
    with torch.no_grad():
        outputs = seg_model(images)
        pixels = head.pixels(outputs["features"], images)
        torch.testing.assert_close(pixels, outputs["pixels"])
        chosen = torch.tensor([5, 2])
        masks = list(
            head.paste(
                pixels[0],
                outputs["queries"][0, chosen],
                outputs["pred_boxes"][0, chosen],
                Placement.resized(50, 70),
            )
        )
        logits = torch.einsum("bchw,bqc->bqhw", outputs["pixels"], outputs["kernels"]) + head.bias
        whole = F.interpolate(logits, size=(50, 70), mode="bilinear")[0, chosen] > 0
    assert [(left, top) for left, top, _, _ in masks] == [(0, 0)] * 2
    assert torch.equal(torch.stack([mask for _, _, mask, _ in masks]), whole)


# ---------------- costs and losses at points


def test_true_masks_are_read_where_the_points_lie():
    masks = torch.arange(16).reshape(1, 4, 4)
    points = torch.tensor([[[0.01, 0.01], [0.6, 0.3], [0.99, 1.0]]])
    assert true_at(masks, torch.tensor([0]), points).tolist() == [[0, 6, 15]]


def test_points_lie_where_the_logits_are_near_zero():
    torch.manual_seed(0)
    ramp = torch.linspace(-8, 8, 64).expand(64, 64)[None, None]  # zero at the middle column
    points = uncertain_points(ramp)
    assert points.shape == (1, 256, 2)
    distance = (points[0, :, 0] - 0.5).abs()
    assert distance[:192].max() < 0.2 < distance[192:].max()


def test_mask_costs_are_the_explicit_pairs():
    torch.manual_seed(1)
    prediction = {
        "pixels": torch.randn(2, 4, 8, 8),
        "kernels": torch.randn(2, 5, 4),
        "mask_bias": torch.ones(1),
    }
    masks = (torch.rand(3, 32, 32) > 0.5).to(torch.uint8)
    has_mask = torch.tensor([True, True, False])
    state = torch.get_rng_state()
    costs = mask_costs(prediction, masks, has_mask, [1, 2], LossWeights(mask=3.0, dice=2.0))
    torch.set_rng_state(state)
    points = torch.rand(1, 4, 2)
    assert costs.shape == (3, 5) and (costs[2] == 0).all()
    for obj, image in ((0, 0), (1, 1)):
        maps = (
            torch.einsum("qc,chw->qhw", prediction["kernels"][image], prediction["pixels"][image])
            + 1
        )
        logits = F.grid_sample(
            maps[None], 2 * points[:, None] - 1, align_corners=False, padding_mode="border"
        )[0, :, 0]
        truth = true_at(masks, torch.tensor([obj]), points).expand_as(logits)
        p = logits.sigmoid()
        bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
        dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
        torch.testing.assert_close(costs[obj], 3 * bce + 2 * dice)


def test_logits_and_truth_are_those_of_the_matched_pairs():
    """Masks of one value each: whatever the points are, what is read there is known."""
    ones = torch.ones(2, 1, 8, 8)
    kernels = torch.arange(6.0).reshape(2, 3, 1)
    prediction = {"pixels": ones, "kernels": kernels, "mask_bias": torch.tensor([0.5])}
    masks = torch.tensor([0, 1, 1]).reshape(3, 1, 1).expand(3, 16, 16)
    image = torch.tensor([0, 0, 1])
    query = torch.tensor([2, 0, 1])
    obj = torch.tensor([0, 1, 2])
    logits, truth = sample_matched_masks(prediction, Matches(image, query, obj), masks)
    torch.testing.assert_close(logits, torch.tensor([2.5, 0.5, 4.5])[:, None].expand_as(logits))
    assert truth.equal(torch.tensor([0.0, 1.0, 1.0])[:, None].expand_as(truth))


def test_objects_without_a_mask_give_no_mask_loss(seg_model):
    outputs = seg_model.train()(torch.randn(1, 3, 64, 64))
    targets = targets_of([2])
    targets[0]["has_mask"][:] = False
    losses, _ = detection_losses(outputs, targets, 2, 4.0, LossWeights())
    assert losses["loss_mask"] == 0 and losses["loss_box"] > 0


# ---------------- files and scripts


def test_an_official_file_loads_with_every_tensor_and_predicts_masks(
    seg_model, official_file, demo
):
    content = checkpoint.load(official_file)
    assert (content["size"]["name"], content["mask_head"]) == ("seg-test", "official")
    loaded, _ = checkpoint.build_model(content, groups=None)
    assert all(
        torch.equal(t, seg_model.state_dict()[name]) for name, t in loaded.state_dict().items()
    )
    model = RFDETR.from_checkpoint(official_file, device="cpu")
    found = model.predict(np.zeros((50, 70, 3), np.uint8), threshold=0.0, nms=0)
    assert len(found.masks) == len(found.scores) == 12
    assert found.masks.shape == (12, 50, 70)


def test_a_file_without_masks_is_a_detector(official_file, seg_model):
    state = to_official(seg_model.state_dict())
    torch.save(
        {"model": {k: v for k, v in state.items() if not k.startswith("segmentation_head.")}},
        official_file,
    )
    assert checkpoint.load(official_file)["mask_head"] is None


def test_the_python_door_names_the_size_that_fits(official_file):
    with pytest.raises(UserError, match="a seg-test checkpoint, and RFDETRSegNano is for seg-nano"):
        RFDETRSegNano(checkpoint=official_file)


def test_a_mask_model_is_fine_tuned_and_scored(seg_size, official_file, few, call):
    flags = [
        *train_flags(few),
        "--size",
        "seg-test",
        "--epochs",
        1,
        "--min_steps",
        2,
        "--tensorboard",
        0,
    ]
    call(
        train_seg_single_stage.main,
        *flags,
        "--pretrain_weights",
        official_file,
        "--output_dir",
        "run",
    )
    content = torch.load("run/best.pt")
    assert content["mask_head"] == "official" and content["args"]["mask_loss_coef"] == 1.0
    names = {f"segmentation_head.{name}" for name in OfficialMaskHead(96, 2).state_dict()}
    assert names == {
        name for name in content["model"] if "head." in name and "point_head" not in name
    }
    train = json.loads(Path("run/metrics.json").read_text())["epochs"][0]["train"]
    assert all(
        train[f"loss_{kind}{layer}"] > 0
        for kind in ("mask", "dice")
        for layer in ("", "_0", "_enc")
    )
    call(evaluate.main, "--checkpoint", "run/best.pt", "--dataset", few, "--json", "scores.json")
    assert json.loads(Path("scores.json").read_text()).keys() == {"bbox", "segm", "mask"}


def test_stage_2_replaces_the_official_head_where_asked_to(
    seg_size, seg_model, few, call, tmp_path
):
    table = assign_rows(["cells", "blood_vessel", "glomerulus"], [1, 2, 3], "dataset")
    model = Detector(seg_size, table.rows_total, True, mask_head="official")
    path = tmp_path / "trained.pt"
    checkpoint.save(
        path, checkpoint.make_content("single", seg_size, 64, table, "official", model.state_dict())
    )
    flags = [*train_flags(few), "--size", "seg-test", "--fast_dev_run", 1, "--tensorboard", 0]
    with pytest.raises(UserError, match="train_seg_single_stage.py --size seg-test"):
        call(train_seg_stage2.main, *flags, "--checkpoint", path)
    call(
        train_seg_stage2.main,
        *flags,
        "--checkpoint",
        path,
        "--mask_head",
        "nano",
        "--output_dir",
        "run",
    )
    content = torch.load("run/best.pt")
    assert content["mask_head"] == "nano" and not any(
        "segmentation_head" in name for name in content["model"]
    )


@pytest.mark.slow
def test_the_script_fine_tunes_a_published_size(few, call, capsys, tmp_path):
    torch.manual_seed(0)
    model = Detector(SIZES["seg-nano"], 91, mask_head="official")
    torch.save({"model": to_official(model.state_dict())}, tmp_path / "official.pth")
    flags = [
        *train_flags(few, 48),
        "--size",
        "seg-nano",
        "--pretrain_weights",
        "official.pth",
        "--fast_dev_run",
        1,
    ]
    call(train_seg_single_stage.main, *flags, "--ema", 0, "--output_dir", "run")
    assert f"{len(model.state_dict())} tensors loaded, 0 left" in capsys.readouterr().out
    assert torch.load(tmp_path / "run/best.pt")["args"]["dice_loss_coef"] == 5.0
    words = ["--checkpoint", "run/best.pt", "--input", few / "valid", "--output", "found"]
    call(predict.main, *words, "--threshold", 0)
    assert all(
        record["mask"] for record in json.loads((tmp_path / "found/predictions.json").read_text())
    )
