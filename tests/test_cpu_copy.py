"""Inference on a CPU: weights cast once for autocast, and large layers packed once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rfdetr import device as devices
from rfdetr.classes import ClassTable
from rfdetr.device import Precision, compile_in_place
from rfdetr.inference.detections import DetectionRunner
from rfdetr.inference.evaluation import SplitEvaluator
from rfdetr.models import cpu_copy
from rfdetr.models.cpu_copy import CpuCopies, matrices
from rfdetr.models.detector import Detector
from rfdetr.placement import Placement
from rfdetr.sizes import SIZES

CPU = torch.device("cpu")


class CastSizes(TorchDispatchMode):
    """The elements of every fp32 tensor that is cast to bf16 meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        is_cast = operation.overloadpacket is torch.ops.aten._to_copy
        if is_cast and args[0].dtype is torch.float32 and result.dtype is torch.bfloat16:
            self.shapes.append(tuple(result.shape))
        return result


def detect(model: nn.Module, images: Tensor) -> dict:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(images)


def assert_same(ours: dict, autocast: dict) -> None:
    """Bit for bit, in the same types."""
    assert ours.keys() == autocast.keys()
    for name, values in autocast.items():
        assert ours[name].dtype == values.dtype and torch.equal(ours[name], values), name


@pytest.fixture(scope="module", params=["nano", "tiny", "seg-nano"])
def model(request) -> Detector:
    """With the layers, levels and heads of a size, and weights that are no zeros."""
    size = SIZES[request.param]
    narrow = {"dim": 48, "hidden": 32, "feedforward": 32, "queries": 12, "select": 12}
    size = replace(size, resolution=2 * size.block, **narrow)
    torch.manual_seed(0)
    head = "official" if request.param == "seg-nano" else "nano"
    model = Detector(size, 5, background=True, mask_head=head, groups=1).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def images_for(model: Detector) -> Tensor:
    return torch.randn(2, 3, model.size.resolution, model.size.resolution)


def test_results_are_autocasts_bit_for_bit_and_no_weight_is_cast_again(model):
    images = images_for(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cast = CpuCopies(torch.bfloat16)
    assert_same(detect(cast.of(model), images), detect(model, images))
    weights = {tuple(w.shape) for w in matrices(model) if w.ndim > 1}
    with CastSizes() as autocast:
        detect(model, images)
    with CastSizes() as ours:
        detect(cast.of(model), images)
    assert sum(shape in weights for shape in autocast.shapes) > 20
    assert len(ours.shapes) < len(autocast.shapes) - 20
    assert not [shape for shape in ours.shapes if shape in weights and shape[0] > 12]
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name])


def test_what_is_not_cast_is_shared_and_nothing_is_trained(model):
    copy = CpuCopies(torch.bfloat16).of(model)
    cast = {id(weight) for weight in matrices(model)}
    for (name, own), theirs in zip(copy.named_parameters(), model.parameters(), strict=True):
        if id(theirs) in cast:
            assert own.dtype is torch.bfloat16 and not own.requires_grad, name
        else:
            assert own is theirs, name


def changes(model: Detector) -> dict:
    """Ways in which weights change that torch counts, by name."""
    other = {name: tensor + 0.01 for name, tensor in model.state_dict().items()}

    def average() -> None:
        source = Detector(model.size, 5, True, mask_head="nano", groups=1)
        ema = ModelEmaV3(source, decay=0.5)
        ema.module = model
        ema.update(source, 1)

    def given() -> None:
        model.class_embed[0].weight = nn.Parameter(2 * model.class_embed[0].weight)

    return {
        "a state that is loaded": lambda: model.load_state_dict(other),
        "an average": average,
        "data that are replaced": lambda: setattr(
            model.class_embed[0].weight, "data", 2 * model.class_embed[0].weight
        ),
        "another parameter": given,
    }


@pytest.mark.parametrize("kind", list(changes(Detector(SIZES["tiny"], 5, True, groups=1))))
def test_weights_that_have_changed_are_cast_again(small_model, kind):
    model = Detector(small_model.size, 5, True, mask_head="nano", groups=1).eval()
    images = torch.randn(1, 3, 64, 64)
    cast = CpuCopies(torch.bfloat16)
    before = detect(cast.of(model), images)["pred_logits"]
    changes(model)[kind]()
    assert_same(detect(cast.of(model), images), detect(model, images))
    assert not torch.equal(detect(model, images)["pred_logits"], before)


def test_the_runner_casts_in_bf16_alone(small_model, monkeypatch):
    table = ClassTable(("a",), (1,), (0,), 5, 4)
    images = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8)
    runner = DetectionRunner(table, Precision(CPU, torch.bfloat16))
    place = [Placement.resized(64, 64)]
    (ours,) = runner.run(small_model, images, place, [0])
    copy = runner.copies.of(small_model)
    assert copy is not small_model and copy is runner.copies.of(small_model)
    assert not small_model.training and not copy.training
    plain = DetectionRunner(table, Precision(CPU, torch.bfloat16))
    plain.copies = None
    (autocast,) = plain.run(small_model, images, place, [0])
    assert torch.equal(ours.scores, autocast.scores) and torch.equal(ours.boxes, autocast.boxes)
    in_fp32 = DetectionRunner(table, Precision(CPU))
    assert in_fp32.copies.of(small_model) is small_model


def fused_step(model: Detector) -> None:
    """A training step as the scripts do it, which torch does not count as a change."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.01, fused=True).step()


@pytest.mark.parametrize("by", ["training mode", "a pass over a split"])
def test_weights_that_were_trained_are_cast_again(small_model, by):
    table = ClassTable(("a",), (1,), (0,), 5, 4)
    images = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8)
    runner = DetectionRunner(table, Precision(CPU, torch.bfloat16))
    place = [Placement.resized(64, 64)]
    (before,) = runner.run(small_model, images, place, [0])
    if by == "training mode":
        small_model.train()
    fused_step(small_model)
    if by == "a pass over a split":
        loader = SimpleNamespace(dataset=SimpleNamespace(split=None, whole_split=None, tiling=None))
        evaluator = SplitEvaluator(loader, table, runner.precision, masks=False)
        evaluator.runner = runner
        evaluator.loader = []
        assert list(evaluator.detections(small_model)) == []
    (after,) = runner.run(small_model, images, place, [0])
    runner.copies = None
    (autocast,) = runner.run(small_model, images, place, [0])
    assert torch.equal(after.scores, autocast.scores)
    assert not torch.equal(after.scores, before.scores)


def test_a_model_of_inference_mode_is_followed(small_size):
    with torch.inference_mode():
        model = Detector(small_size, 5, True, groups=1).eval()
        images = torch.randn(1, 3, 64, 64)
    cast = CpuCopies(torch.bfloat16)
    with torch.inference_mode():
        detect(cast.of(model), images)
        model.class_embed[0].bias += 1
        assert_same(detect(cast.of(model), images), detect(model, images))


@pytest.mark.parametrize("weights_stay", [False, True])
def test_compiled_code_holds_the_weights_where_they_stay(small_model, monkeypatch, weights_stay):
    import torch._inductor.config as inductor

    monkeypatch.setattr(devices.torch, "compile", lambda function, *a, **b: function)
    with inductor.patch(freezing=not weights_stay):
        compile_in_place(small_model.encoder, CPU, weights_stay)
        assert inductor.freezing is weights_stay
    assert CpuCopies(torch.bfloat16).of(small_model) is small_model  # whose code does that


@pytest.fixture
def packs_all(monkeypatch) -> None:
    """Layers of every width are packed."""
    monkeypatch.setattr(cpu_copy, "PACKED_FROM", 0)
    if not cpu_copy.can_pack(None):
        pytest.skip("this torch or CPU has no packed linear layers")


def packed_layers(model: nn.Module) -> list[str]:
    names = []
    for name, module in model.named_modules():
        if isinstance(module, cpu_copy.PackedLinear):
            names.append(name)
    return names


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_packed_layers_give_the_same_but_for_rounding(model, packs_all, dtype):
    if not cpu_copy.can_pack(dtype):
        pytest.skip("this CPU does not pack that")
    images = images_for(model)
    copy = CpuCopies(dtype).of(model)
    layers = packed_layers(copy)
    assert sum(name.endswith("mlp.fc1") for name in layers) == model.size.depth
    assert not packed_layers(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        ours = copy(images)["features"]
        plain = model(images)["features"]
    assert ours.dtype == plain.dtype
    difference = (ours - plain).float().abs().max() / plain.float().abs().max()
    assert difference < (1e-5 if dtype is None else 0.03)


@pytest.mark.parametrize("kind", list(changes(Detector(SIZES["tiny"], 5, True, groups=1))))
def test_weights_that_have_changed_are_packed_again(small_model, packs_all, kind):
    model = Detector(small_model.size, 5, True, mask_head="nano", groups=1).eval()
    images = torch.randn(1, 3, 64, 64)
    copies = CpuCopies(None)
    with torch.no_grad():
        before = copies.of(model)(images)["pred_logits"]
        changes(model)[kind]()
        after = copies.of(model)(images)["pred_logits"]
        torch.testing.assert_close(after, model(images)["pred_logits"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, rtol=1e-4, atol=1e-4)


def test_a_small_model_in_fp32_and_a_copy_are_their_own_copies(small_model, packs_all, monkeypatch):
    copy = cpu_copy.for_inference(small_model, Precision(CPU))
    assert copy is not small_model
    assert cpu_copy.for_inference(copy, Precision(CPU)) is copy
    monkeypatch.undo()
    assert cpu_copy.for_inference(small_model, Precision(CPU)) is small_model
    lower = Precision(CPU, torch.bfloat16)
    copy = cpu_copy.for_inference(small_model, lower)
    assert cpu_copy.for_inference(copy, lower) is copy


def test_without_the_operations_nothing_is_packed(small_model, monkeypatch):
    monkeypatch.setattr(cpu_copy, "PACKED_FROM", 0)
    monkeypatch.setattr(cpu_copy.platform, "machine", lambda: "arm64")
    assert CpuCopies(None).of(small_model) is small_model
