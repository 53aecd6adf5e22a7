"""The detector and the mask heads: shapes, gradients, batches, and what must never matter."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rfdetr.console import UserError
from rfdetr.models.decoder import move_boxes
from rfdetr.models.deformable_attention import DeformableAttention
from rfdetr.models.detector import Detector, select_detections
from rfdetr.models.official_masks import OfficialMaskHead
from rfdetr.models.segmentation import (
    GRID,
    MASK_HEADS,
    HeadForm,
    enlarged,
    expected_iou,
    sample_in_boxes,
)
from rfdetr.placement import Placement
from rfdetr.sizes import SIZES, Recipe, check_resolution, size_from_dict
from rfdetr.training.optim import parameter_groups

OFFICIAL = [name for name, size in SIZES.items() if size.weights_url]


def package_mask_head_parameters(size) -> int:
    """Parameters of the published segmentation head at this size, from its layers' shapes."""
    c = size.hidden
    block = 9 * c + c + 2 * c + c * c + c
    mlp = 2 * c + 4 * c * c + 4 * c + 4 * c * c + c
    return size.decoder_layers * block + 2 * (c * c + c) + mlp + 1


@pytest.mark.parametrize("name", list(SIZES))
def test_mask_heads_keep_their_parameter_bounds(name):
    size = SIZES[name]
    count = {
        head: sum(p.numel() for p in MASK_HEADS[head](size.hidden).parameters())
        for head in MASK_HEADS
    }
    assert count["nano"] <= 0.25 * count["standard"]
    official = OfficialMaskHead(size.hidden, size.decoder_layers)
    assert sum(p.numel() for p in official.parameters()) == package_mask_head_parameters(size)
    assert count["standard"] <= package_mask_head_parameters(size)


def test_nano_and_tiny_use_the_light_head():
    assert SIZES["nano"].mask_head == SIZES["tiny"].mask_head == "nano"
    assert {
        SIZES[name].mask_head for name in ("small", "medium", "base", "large", "large-2026")
    } == {"standard"}


def test_the_mask_models_are_the_published_ones():
    seg = [size for size in SIZES.values() if size.mask_head == "official"]
    assert [size.name for size in seg] == [
        f"seg-{n}" for n in ("nano", "small", "medium", "large", "xlarge", "2xlarge")
    ]
    assert [size.resolution for size in seg] == [312, 384, 432, 504, 624, 768]
    assert [size.decoder_layers for size in seg] == [4, 4, 5, 5, 6, 6]
    assert [size.queries for size in seg] == [100, 100, 200, 200, 300, 300]
    assert all(size.patch == 12 and size.position_grid * 12 == size.resolution for size in seg)
    assert len({size.weights_url for size in SIZES.values()}) == len(SIZES)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes_have_the_published_shape(name):
    size = SIZES[name]
    with torch.device("meta"):
        model = Detector(size, rows=91)
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    assert shapes["query_feat.weight"] == (13 * size.queries, size.hidden)
    assert shapes["transformer.enc_out_class_embed.12.weight"] == (91, size.hidden)
    assert shapes["backbone.0.encoder.encoder.embeddings.position_embeddings"] == (
        1,
        1 + size.position_grid**2,
        size.dim,
    )
    assert (
        len({key.split(".layer.")[1].split(".")[0] for key in shapes if ".encoder.layer." in key})
        == 12
    )


def groups_by_name(model: Detector) -> dict[tuple, list[str]]:
    """What stored optimizer states were grouped by: {(part, depth, without decay): names}."""
    top = model.size.used_depth + 2
    groups: dict[tuple, list[str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = ("other", 0, False)
        if name.startswith("backbone.0.encoder."):
            layer = top
            if "embeddings" in name:
                layer = 0
            elif ".layer." in name:
                layer = int(name.split(".layer.")[1].split(".")[0]) + 1
            words = ("bias", "norm", "embeddings", "gamma")
            key = ("encoder", top - layer, any(word in name for word in words))
        elif name.startswith("transformer.decoder."):
            key = ("decoder", 0, False)
        groups.setdefault(key, []).append(name)
    return groups


@pytest.mark.parametrize("mask_head", [None, "own"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", list(SIZES))
def test_parts_have_the_order_and_members_of_stored_optimizer_states(name, frozen, mask_head):
    size = SIZES[name]
    with torch.device("meta"):
        model = Detector(size, rows=91, mask_head=mask_head and size.mask_head, groups=2)
    if frozen:
        model.encoder.requires_grad_(False)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = [
        (
            (part.name, part.depth_from_top, part.without_decay),
            [name_of[id(parameter)] for parameter in part.parameters],
        )
        for part in model.parts()
    ]
    assert parts == list(groups_by_name(model).items())


def test_rates_and_decay_follow_the_parts():
    model = Detector(SIZES["nano"], rows=3, groups=1)
    groups = parameter_groups(model, 1e-4, 1.5e-4, 0.1)
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(rate_of) == sum(parameter.requires_grad for parameter in model.parameters())
    first_block, last_block = (model.encoder.encoder["layer"][i] for i in (0, 11))
    assert rate_of[id(model.encoder.layernorm.weight)] == pytest.approx(1.5e-4 * 0.7**2)
    assert rate_of[id(last_block.attn.qkv.weight)] == pytest.approx(1.5e-4 * 0.7**2 * 0.8**2)
    assert rate_of[id(first_block.norm1.weight)] == pytest.approx(1.5e-4 * 0.7**2 * 0.8**13)
    assert rate_of[id(model.encoder.embeddings.cls_token)] == pytest.approx(
        1.5e-4 * 0.7**2 * 0.8**14
    )
    assert rate_of[id(model.transformer.decoder.norm.weight)] == pytest.approx(0.7e-4)
    assert rate_of[id(model.class_embed[0].weight)] == 1e-4
    assert decay_of[id(last_block.attn.qkv.weight)] == 0.1
    assert decay_of[id(last_block.attn.qkv.bias)] == 0.0
    assert decay_of[id(model.class_embed[0].bias)] == 0.1


def test_a_size_survives_its_dict():
    for size in SIZES.values():
        assert size_from_dict(asdict(size)) == size
    with pytest.raises(ValueError, match="unknown"):
        size_from_dict({"name": "x", "colour": 1})
    with pytest.raises(ValueError, match="multiple"):
        replace(SIZES["nano"], resolution=385)


def test_resolution_off_the_grid_names_the_nearest():
    assert check_resolution(SIZES["nano"], None) == 384
    assert check_resolution(SIZES["nano"], 416) == 416
    with pytest.raises(UserError, match="416 and 448"):
        check_resolution(SIZES["nano"], 420)
    with pytest.raises(UserError, match="32 and 64"):
        check_resolution(SIZES["nano"], 5)


def test_every_used_parameter_gets_a_gradient_and_no_other(small_model):
    small_model.train()
    images = torch.randn(2, 3, 64, 64)
    outputs = small_model(images)
    total = sum(
        p["pred_logits"].square().mean() + p["pred_boxes"].square().mean()
        for p in every_prediction(outputs)
    )
    image = torch.tensor([0, 1, 1])
    pixels = small_model.mask_head.pixels(outputs["features"], images)
    queries = outputs["queries"][image, :3].diagonal().T
    boxes = torch.rand(3, 4) * 0.3 + 0.2
    total = total + small_model.mask_head.grid_logits(pixels, queries, boxes, image).square().mean()
    total.backward()
    encoder = "backbone.0.encoder.encoder."
    size = small_model.size
    unused = [f"{encoder}encoder.layer.{i}." for i in range(size.used_depth, size.depth)]
    unused = tuple(unused + [f"{encoder}embeddings.mask_token"])
    unused = {name for name, _ in small_model.named_parameters() if name.startswith(unused)}
    assert any("mask_token" in name for name in unused) and any(
        "layer.2." in name for name in unused
    )
    for name, parameter in small_model.named_parameters():
        assert (parameter.grad is None) == (name in unused), name
        assert parameter.requires_grad == (name not in unused), name


def every_prediction(outputs: dict) -> list[dict]:
    return [outputs, *outputs["aux_outputs"], outputs["enc_outputs"]]


def test_a_batch_equals_its_images_one_by_one(small_model):
    small_model.eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        together = small_model(images)
        for i in range(3):
            alone = small_model(images[i : i + 1])
            for key in ("pred_logits", "pred_boxes", "queries", "features"):
                torch.testing.assert_close(together[key][i], alone[key][0], atol=2e-5, rtol=1e-4)


def test_training_uses_all_groups_and_inference_one(small_model):
    images = torch.randn(1, 3, 64, 64)
    assert small_model.train()(images)["pred_logits"].shape == (1, 20, 5)
    outputs = small_model.eval()(images)
    assert outputs["pred_logits"].shape == (1, 10, 5)
    assert "aux_outputs" not in outputs


def test_groups_do_not_see_each_other(small_model):
    small_model.train()
    images = torch.randn(1, 3, 64, 64)
    before = small_model(images)["pred_logits"]
    with torch.no_grad():
        small_model.query_feat.weight[10:] += 1.0
    after = small_model(images)["pred_logits"]
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_background_row_never_ranks_a_proposal(small_model):
    small_model.eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = small_model(images)
        for head in small_model.transformer.enc_out_class_embed:
            head.bias[-1] += 100
        after = small_model(images)
    assert torch.equal(before["pred_boxes"], after["pred_boxes"])


def test_standardised_images_make_brightness_and_contrast_irrelevant(small_model):
    small_model.eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        a = small_model(images)
        b = small_model(images * 3 + 1)
    torch.testing.assert_close(a["features"], b["features"], atol=0.1, rtol=0.1)


def test_other_resolutions_and_fewer_tokens_than_queries_work(small_size):
    torch.manual_seed(0)
    model = Detector(replace(small_size, queries=100, select=100), rows=3).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 32, 64))["pred_boxes"].shape == (1, 100, 4)
        assert model(torch.randn(1, 3, 160, 160))["features"].shape[-2:] == (20, 20)


def test_gradient_checkpointing_changes_memory_not_results(small_size):
    images = torch.randn(1, 3, 64, 64)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Detector(small_size, rows=3, grad_checkpoint=checkpointing).train()
        model(images)["pred_logits"].square().sum().backward()
        grads.append(model.backbone[0].encoder["encoder"].embeddings.cls_token.grad)
    torch.testing.assert_close(*grads)


def test_drop_path_acts_while_training_alone(small_size):
    torch.manual_seed(0)
    model = Detector(small_size, rows=3, drop_path=0.5)
    images = torch.randn(1, 3, 64, 64)
    model.train()
    features = [model(images)["features"] for _ in range(4)]
    assert any(not torch.equal(features[0], other) for other in features[1:])
    model.eval()
    assert torch.equal(model(images)["features"], model(images)["features"])


def test_deformable_attention_reads_where_its_offsets_point():
    attention = DeformableAttention(hidden=8, heads=1, levels=1, points=1)
    with torch.no_grad():
        attention.sampling_offsets.bias.zero_()
        for layer in (attention.value_proj, attention.output_proj):
            layer.weight.copy_(torch.eye(8))
            layer.bias.zero_()
    memory = torch.randn(1, 16, 8)
    box = torch.tensor([[[0.375, 0.625, 0.5, 0.5]]])  # the centre of column 1, row 2 of a 4 x 4 map
    out = attention(torch.randn(1, 1, 8), box, memory, [(4, 4)])
    torch.testing.assert_close(out[0, 0], memory[0, 2 * 4 + 1])


def test_select_detections_ranks_pairs_of_query_and_class():
    logits = torch.tensor([[[0.0, 5.0, 9.0], [3.0, 1.0, 9.0]]])  # row 2 belongs to no class
    boxes = torch.rand(1, 2, 4)
    scores, labels, chosen, queries = select_detections(
        {"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([1, 0]), select=3
    )
    assert labels.tolist() == [[0, 1, 0]] and queries.tolist() == [[0, 1, 1]]
    torch.testing.assert_close(scores, torch.tensor([[5.0, 3.0, 1.0]]).sigmoid())
    assert torch.equal(chosen[0], boxes[0, [0, 1, 1]])


def test_move_boxes_is_relative_to_the_box():
    box = torch.tensor([0.5, 0.5, 0.2, 0.1])
    moved = move_boxes(box, torch.tensor([1.0, -1.0, 0.0, 0.6931472]))
    torch.testing.assert_close(moved, torch.tensor([0.7, 0.4, 0.2, 0.2]))


@pytest.mark.parametrize("name", list(MASK_HEADS))
def test_pasted_masks_agree_with_the_training_grid(name):
    torch.manual_seed(0)
    head = MASK_HEADS[name](96).eval()
    features = torch.randn(1, 96, 16, 16)
    images = torch.randn(1, 3, 128, 128)
    queries = torch.randn(3, 96)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.6, 0.3, 0.3], [0.9, 0.1, 0.3, 0.4]])
    with torch.inference_mode():
        pixels = head.pixels(features, images)
        grid = head.grid_logits(pixels, queries, boxes, torch.zeros(3, dtype=torch.long)) > 0
        pasted = list(head.paste(pixels[0], queries, boxes, Placement.resized(200, 300)))
    for i, (left, top, mask, _) in enumerate(pasted):
        whole = torch.zeros(200, 300)
        whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask.float()
        again = sample_in_boxes(whole[None], boxes[i : i + 1])[0] > 0.5
        assert (again == grid[i]).float().mean() > 0.9  # the third's, beyond the border, too
        x0, y0, x1, y1 = (enlarged(boxes[i]) * torch.tensor([300, 200, 300, 200])).tolist()
        ys, xs = whole.nonzero(as_tuple=True)
        assert len(xs) == 0 or (
            xs.min() >= x0 - 1 and xs.max() <= x1 + 1 and ys.min() >= y0 - 1 and ys.max() <= y1 + 1
        )


def test_masks_of_no_queries_are_none():
    head = MASK_HEADS["nano"](96)
    pixels = head.pixels(torch.randn(1, 96, 8, 8), torch.randn(1, 3, 64, 64))
    empty = head.grid_logits(
        pixels, torch.zeros(0, 96), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    )
    assert empty.shape == (0, GRID, GRID)
    assert (
        list(
            head.paste(pixels[0], torch.zeros(0, 96), torch.zeros(0, 4), Placement.resized(50, 50))
        )
        == []
    )


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", [*MASK_HEADS, "official"])
def test_masks_of_many_queries_take_no_more_memory_than_those_of_a_few(name):
    torch.manual_seed(0)
    head = OfficialMaskHead(96, 2).eval() if name == "official" else MASK_HEADS[name](96).eval()
    features = torch.randn(1, 96, 16, 16)
    images = torch.randn(1, 3, 256, 256)
    queries = torch.randn(300, 96)
    boxes = torch.rand(300, 4) * 0.5 + 0.25
    largest = {}
    with torch.inference_mode():
        pixels = head.pixels(features, images)[0]
        for count in (100, 300):
            with LargestTensor() as seen:
                masks = list(
                    head.paste(pixels, queries[:count], boxes[:count], Placement.resized(60, 50))
                )
            largest[count] = seen.elements
        alone = [
            next(
                iter(
                    head.paste(
                        pixels, queries[i : i + 1], boxes[i : i + 1], Placement.resized(60, 50)
                    )
                )
            )
            for i in range(300)
        ]
    assert largest[300] == largest[100]
    assert len(masks) == 300
    differ = sum((one[2] != other[2]).sum().item() for one, other in zip(masks, alone))
    assert [mask[:2] for mask in masks] == [mask[:2] for mask in alone]
    assert differ <= 5  # pixels whose logit is 0 but for rounding


def test_box_samples_are_the_mask_inside_the_box():
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 8:40] = 1
    box = torch.tensor([[24 / 64, 0.5, 0.5, 0.5]])  # exactly the square
    inside = sample_in_boxes(mask, box)[0]
    assert inside[GRID // 2, GRID // 2] == 1 and inside[0, 0] == 0  # the corner lies in the margin
    expected = 1 / 1.15**2
    assert abs(inside.mean().item() - expected) < 0.03


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_box_samples_of_a_diverged_model_crash_nothing(value):
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [value] * 4])
    inside = sample_in_boxes(torch.ones(2, 96, 64), boxes)
    assert torch.allclose(inside[0], torch.ones(GRID, GRID)) and inside.isfinite().all()


def test_recipes_are_the_only_home_of_training_defaults():
    assert SIZES["nano"].recipe == Recipe()
    tiny = SIZES["tiny"].recipe
    assert (tiny.lr, tiny.group_detr, tiny.batch, tiny.ema_decay) == (1e-3, 1, 4, 0.99)


def test_attention_in_parts_computes_what_the_fused_one_does(small_model, monkeypatch):
    images = torch.randn(2, 3, 64, 64)
    for module in (small_model.train(), small_model.eval()):
        with torch.no_grad():
            fused = module(images)
        with monkeypatch.context() as patched, torch.no_grad():
            for name in ("windowed_vit", "decoder"):
                patched.setattr(f"rfdetr.models.{name}.fused_attention_pays", lambda device: False)
            apart = module(images)
        for key in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(apart[key], fused[key], atol=1e-5, rtol=1e-4)


def test_attention_is_fused_except_in_bf16_on_a_cpu(small_model):
    attention = small_model.encoder.encoder["layer"][0].attn
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            small_model(torch.randn(1, 3, 64, 64))
        assert attention.fused_attn is not enabled


@pytest.mark.parametrize("name", list(MASK_HEADS))
def test_masks_have_the_stride_of_their_head(name):
    features = torch.randn(1, 96, 8, 8)
    images = torch.randn(1, 3, 64, 64)
    for stride in (1, 2, 4):
        head = MASK_HEADS[name](96, HeadForm(stride)).eval()
        pixels = head.pixels(features, images)
        assert pixels.shape[-2:] == (64 // stride, 64 // stride)
        kernels = head.kernels(torch.randn(3, 96), torch.rand(3, 4))
        assert kernels.shape == (3, pixels.shape[1] + 6)
    assert sum("finer" in key for key in head.state_dict()) == 0, "as earlier versions wrote it"


@pytest.mark.parametrize("name", list(MASK_HEADS))
def test_light_and_contrast_do_not_change_masks(name):
    """Those of a detector that standardises its input stay, and so must its masks."""
    head = MASK_HEADS[name](96).eval()
    features = torch.randn(1, 96, 8, 8)
    images = torch.randn(1, 3, 64, 64)
    gain = torch.tensor([0.6, 2.0, 3.0])[:, None, None]
    other = images * gain + torch.tensor([1.0, -0.5, 0.2])[:, None, None]
    near = {"rtol": 0.05, "atol": 0.05}  # the variance has a floor
    with torch.no_grad():
        same = head.pixels(features, images)
        torch.testing.assert_close(head.pixels(features, other), same, **near)
        head.form = HeadForm(head.form.stride, standardise=False)
        assert not torch.allclose(
            head.pixels(features, other), head.pixels(features, images), **near
        )


def test_a_stripe_of_a_pixel_can_be_a_mask():
    """At stride 2 two neighbouring stripes are one cell."""
    torch.manual_seed(0)
    head = MASK_HEADS["nano"](96)
    image = torch.zeros(1, 3, 64, 64)
    image[..., 1::2] = 1  # dark and bright columns in turns
    truth = image[:, 0]
    features = torch.zeros(1, 96, 8, 8)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(30):
        logits = head.pixels(features, image).sum(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((logits > 0) == (truth > 0.5)).float().mean() > 0.95


def test_expected_iou_is_high_where_a_mask_is_sure_of_itself():
    sure = torch.full((20, 20), -9.0)
    sure[5:15, 5:15] = 9.0
    assert expected_iou(sure) > 0.99
    assert expected_iou(sure / 9).item() == pytest.approx(0.731 / (1 + 3 * 0.269), abs=0.01)
    assert expected_iou(torch.full((20, 20), -9.0)) == 0
    assert expected_iou(torch.zeros(0, 0)) == 0
    assert expected_iou(torch.full((4, 4), math.nan)) == 0
    # of two independent pixels with p = .8 and .4: .8 / 1.4
    pair = torch.logit(torch.tensor([[0.8, 0.4]]))
    assert expected_iou(pair).item() == pytest.approx(0.8 / 1.4, abs=1e-4)
