"""What a GPU would wait for, counted without one: see testkit/pretend_cuda.py.

Sides and channels are small, since no count depends on them; depth, layers and groups are real.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from rfdetr import distributed
from rfdetr.classes import ClassTable
from rfdetr.console import UserError
from rfdetr.data.dataset import Batch
from rfdetr.data.loaders import EpochSampler
from rfdetr.device import Precision, pick_device, pick_inference_precision
from rfdetr.inference.detections import DetectionRunner, draw_masks
from rfdetr.models.detector import Detector
from rfdetr.placement import Placement
from rfdetr.runs.curves import StepCurves
from rfdetr.sizes import SIZES, LossWeights, ModelSize
from rfdetr.tool_settings import InferenceSettings
from rfdetr.training import feature_cache, frozen
from rfdetr.training.engine import Progress, Trainer, optimise
from rfdetr.training.feature_cache import CachedLoader, FeatureCache, Views
from rfdetr.training.frozen import FrozenBatch, MaskObjective, freeze
from rfdetr.training.keeper import CheckpointKeeper
from rfdetr.training.objective import DetectorObjective
from rfdetr.training.signals import StopSignals
from testkit.forked import Forked
from testkit.in_process import output_of
from testkit.pretend_cuda import DEVICE, OnCuda, PretendCuda

TABLE = ClassTable(("a", "b"), (1, 2), (0, 1), 3, 2)
OBJECTS = (3, 0, 2)  # of each image
FP32 = Precision(DEVICE)


def narrow(name: str) -> ModelSize:
    size = SIZES[name]
    few = {"dim": 48, "hidden": 32, "feedforward": 32, "queries": 12, "select": 12}
    return replace(size, resolution=2 * size.block, **few)


def made_batch(size: ModelSize) -> Batch:
    """On the CPU; one object in two has no mask."""
    side = size.resolution
    targets = []
    for index, count in enumerate(OBJECTS):
        target = {"boxes": torch.rand(count, 4) * 0.3 + 0.3, "index": index}
        target["labels"] = torch.zeros(count, dtype=torch.long)
        target["has_mask"] = torch.arange(count) % 2 == 0
        target["masks"] = torch.ones(count, side, side, dtype=torch.uint8)
        targets.append(target)
    images = torch.randint(0, 255, (len(OBJECTS), 3, side, side), dtype=torch.uint8)
    return Batch(images, targets)


def pinned_batch(size: ModelSize) -> Batch:
    """As a loader gives it."""
    return made_batch(size).pin_memory()


def objective(precision: Precision = FP32) -> DetectorObjective:
    return DetectorObjective(TABLE, LossWeights(), precision, (), 0, Progress())


@pytest.fixture
def gpu():
    with PretendCuda() as counting:
        yield counting


# name, mask head, most kernels of forward and losses; before: 1200, 1293 and 2187
TRAINED = [("nano", None, 750), ("nano", "nano", 850), ("seg-nano", "official", 1700)]


@pytest.mark.parametrize("name, mask_head, most_kernels", TRAINED)
def test_a_training_forward_waits_once_for_the_costs(gpu, name, mask_head, most_kernels):
    size = narrow(name)
    model = Detector(size, 3, True, mask_head=mask_head).train().to(DEVICE)
    losses = objective()(model, pinned_batch(size), 5.0)
    assert all(loss.device.type == "cuda" and loss.isfinite() for loss in losses.values())
    gpu.forget()
    objective()(model, pinned_batch(size), 5.0)
    assert set(gpu.blocking_copies) == set()
    assert sum(gpu.waits.values()) == 1 and "matcher.py" in next(iter(gpu.waits))
    assert sum(gpu.kernels.values()) <= most_kernels


def test_an_optimizer_step_waits_once_more_for_losses_and_gradient_norm(gpu):
    size = narrow("nano")
    model = Detector(size, 3, True).train().to(DEVICE)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def losses(model, batch, objects):
        for parameter in parameters:  # what backward() would have left
            parameter.grad = torch.zeros_like(parameter)
        return objective()(model, batch, objects)

    trainer = Trainer(
        model=model,
        losses=losses,
        optimizer=torch.optim.AdamW(parameters, fused=True),
        schedule=lambda position: 1.0,
        scaler=torch.amp.GradScaler("cuda", enabled=False),
        ema=None,
        clip=0.1,
        device=DEVICE,
        progress=Progress(micro_batch=2),
    )
    optimise(trainer, pinned_batch(size))  # makes the optimizer's states
    gpu.forget()
    result = optimise(trainer, pinned_batch(size))
    assert result["grad_norm"] == 0.0 and result["loss"] > 0
    assert set(gpu.blocking_copies) == set()
    assert sum(gpu.waits.values()) == 2 + 1  # two micro-batches, one step


# ---------------------------------------------------------------- several cards


@pytest.fixture
def two_ranks(gpu, monkeypatch) -> list[str]:
    """Two processes with a card each, of which this is the first: the devices of what is summed."""
    devices = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist = torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: devices.append(tensor.device.type))
    return devices


def test_numbers_and_signals_go_from_cpu_to_cpu_where_ranks_have_cards(gpu, two_ranks):
    assert distributed.sum_over_ranks(3.0) == 3.0
    StopSignals(lambda: None).stop_if_asked()
    assert two_ranks == ["cpu", "cpu"]
    assert not gpu.waits and not gpu.kernels and not gpu.blocking_copies


def test_ranks_meet_on_the_cpu_before_their_cards_sum_gradients(gpu, two_ranks):
    layer = torch.nn.Linear(3, 2).to(DEVICE)
    distributed.sum_gradients(layer.parameters())
    assert two_ranks == ["cpu", "cuda"]
    assert layer.weight.grad.device.type == "cuda" and not gpu.waits


@pytest.mark.parametrize(
    "device, backend", [(DEVICE, "cpu:gloo,cuda:nccl"), (torch.device("cpu"), "gloo")]
)
def test_a_group_has_a_way_for_each_device(monkeypatch, device, backend):
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    join = torch.distributed.init_process_group
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda name, timeout: asked.append(name)
    )
    distributed.start(device)
    assert asked == [backend]
    if not torch.distributed.is_nccl_available():
        return
    store = torch.distributed.HashStore()
    try:  # torch knows the backend by this name, and sends objects from CPU to CPU
        join("cpu:gloo,cuda:gloo", store=store, rank=0, world_size=1)
        assert torch.distributed.distributed_c10d._get_object_coll_device() == "cpu"
    finally:
        torch.distributed.destroy_process_group()


def test_one_card_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="cuda:1 names one card.*leave --device out"):
        pick_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 2 on this machine.*--nproc_per_node 1"):
        pick_device("cuda")


@pytest.mark.parametrize("saved", [False, True])
def test_a_lost_process_leaves_the_name_of_the_last_save(tmp_path, saved, monkeypatch):
    keeper = CheckpointKeeper(tmp_path, None, dict, "bbox/mAP", False, {})
    if saved:
        progress = {"epoch": 2, "step_in_epoch": 7}
        torch.save({"training": {"progress": progress}}, tmp_path / "checkpoint.pt")
        load = lambda path: torch.load(path, weights_only=True)  # noqa: E731
        monkeypatch.setattr("rfdetr.training.keeper.checkpoint.load", load)
    with pytest.raises(UserError, match="has ended") as told, keeper.naming_last_save():
        with distributed._together():
            raise RuntimeError("Connection closed by peer")
    if saved:
        assert "checkpoint.pt (epoch 3, after 7 steps of it)" in str(told.value)
        assert f"--resume {tmp_path}" in str(told.value)
    else:
        assert "Nothing was saved yet" in str(told.value)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_losses_are_the_same_numbers_on_either_device(gpu, device):
    """The pretended GPU computes what the CPU does."""
    torch.manual_seed(0)
    size = narrow("nano")
    model = Detector(size, 3, True, mask_head="nano").train()
    batch = pinned_batch(size)
    expected = objective(Precision(torch.device("cpu")))(model, batch, 5.0)
    place = torch.device(device)
    losses = objective(Precision(place))(model.to(place), batch, 5.0)
    for name, loss in losses.items():
        assert loss.device.type == device
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5)


def stage2(model: Detector) -> MaskObjective:
    return MaskObjective(model, TABLE, LossWeights(), FP32, (), 0, Progress())


@pytest.fixture
def with_mask_head(gpu, monkeypatch) -> Detector:
    monkeypatch.setattr(frozen, "MATCH_IOU", -1.0)  # random weights hit nothing
    return Detector(narrow("nano"), 3, True, mask_head="nano", groups=1).eval().to(DEVICE)


def test_freezing_waits_once_and_gives_what_the_cpu_gives(gpu, with_mask_head):
    batch = pinned_batch(with_mask_head.size)
    freeze(with_mask_head, batch, TABLE, FP32, None)
    gpu.forget()
    view = freeze(with_mask_head, batch, TABLE, FP32, None)
    assert set(gpu.blocking_copies) == set()
    assert sum(gpu.waits.values()) == 1
    assert [len(boxes) for boxes in view.boxes] == [2, 0, 1]  # objects that have a mask
    assert view.features.device == view.queries[0].device == DEVICE


def test_a_step_of_stage_2_waits_once_on_fresh_views_and_never_on_cached_ones(gpu, with_mask_head):
    losses = stage2(with_mask_head)
    batch = pinned_batch(with_mask_head.size)
    losses(with_mask_head.mask_head, batch, 5.0)
    gpu.forget()
    losses(with_mask_head.mask_head, batch, 5.0)
    assert set(gpu.blocking_copies) == set()
    assert sum(gpu.waits.values()) == 1

    view = freeze(with_mask_head, batch, TABLE, FP32, None)
    cached = FrozenBatch(
        images=view.images,
        features=view.features.cpu().half(),
        queries=[queries.cpu().half() for queries in view.queries],
        boxes=[boxes.cpu() for boxes in view.boxes],
        grids=[grids.cpu() for grids in view.grids],
        counts=view.counts,
        indices=view.indices,
    )
    gpu.forget()
    losses(with_mask_head.mask_head, cached, 5.0)
    assert set(gpu.blocking_copies) == set()
    assert set(gpu.waits) == set()


@pytest.fixture
def cached(gpu, with_mask_head, tmp_path, monkeypatch) -> tuple:
    """An open cache of four made images' two views, its loader, and the views that the detector
    was run on together, call by call.
    """
    size = with_mask_head.size
    samples = []
    for index in range(4):
        target = made_batch(size).targets[0] | {"index": index}
        image = torch.full((3, size.resolution, size.resolution), index, dtype=torch.uint8)
        samples.append({"image": image, "target": target, "unread": {}})
    records = [SimpleNamespace(segmentations=[[]] * 3, labels=[0] * 3) for _ in samples]
    dataset = SimpleNamespace(
        split=SimpleNamespace(images=records),
        resolution=size.resolution,
        guess=False,
        cache={},
    )
    together = []

    def counted(model, batch, *rest):
        together.append(batch.indices)
        return freeze(model, batch, *rest)

    class Images(SimpleNamespace):
        def __len__(self) -> int:
            return len(samples)

        def __getitem__(self, key: tuple) -> dict:
            return samples[key[0]]

    monkeypatch.setattr(feature_cache, "freeze", counted)
    monkeypatch.setattr(feature_cache, "cache_key", lambda *what: {"format": 2})
    objective = replace(stage2(with_mask_head), progress=Progress(micro_batch=3))
    cache = FeatureCache(objective, Images(**vars(dataset)), 2, tmp_path).open(True)
    sampler = EpochSampler(4, 4, 0, 2)
    return cache, CachedLoader(cache, sampler), together


def test_on_a_gpu_views_are_detected_in_batches_and_read_ahead_into_pinned_memory(gpu, cached):
    cache, loader, together = cached
    for number in range(20):  # until every view has been drawn
        loader.batch_sampler.set_epoch(number)
        for batch in loader:
            assert batch.images.is_pinned() and batch.features.is_pinned()
    assert max(len(images) for images in together) == 3  # as many as the micro-batch
    assert sum(len(images) for images in together) == 8 and len(together) < 8
    for keys, batch in zip(loader.batch_sampler, loader, strict=True):
        assert batch.indices == [index for index, _ in keys]
        assert batch.images[:, 0, 0, 0].tolist() == batch.indices
    assert sum(len(images) for images in together) == 8


def test_a_batch_of_views_that_does_not_fit_is_halved(gpu, cached, monkeypatch, capsys):
    cache, loader, together = cached
    whole = feature_cache.freeze

    def short_of_memory(model, batch, *rest):
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, batch, *rest)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(feature_cache, "freeze", short_of_memory)
    batch = cache.batch([loader.reader[index, 0] for index in range(4)])
    assert batch.indices == [0, 1, 2, 3] and together == [[0], [1], [2], [3]]
    assert cache.objective.progress.micro_batch == 1 and "out of memory" in capsys.readouterr().out


def test_an_error_of_the_reader_ahead_is_the_loaders(gpu, cached, monkeypatch):
    cache, loader, _ = cached
    monkeypatch.setattr(Views, "__getitem__", lambda views, key: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(loader))


@pytest.mark.parametrize("name, mask_head", [("nano", "nano"), ("seg-nano", "official")])
def test_detecting_and_pasting_wait_once_each(gpu, name, mask_head):
    size = replace(narrow(name), queries=120, select=120)
    model = Detector(size, 3, True, mask_head=mask_head, groups=1).to(DEVICE)
    runner = DetectionRunner(TABLE, FP32)
    images = pinned_batch(size).images
    placements = [Placement.resized(60, 80)] * len(images)
    gpu.forget()
    (detections,) = runner.run(model, images, placements, [0, 1, 2])
    assert set(gpu.blocking_copies) == set()
    assert sum(gpu.waits.values()) == 1
    assert len(detections.boxes_in_original(0)) == 120  # on the CPU, and free
    gpu.forget()
    ((rles, _),) = draw_masks(model.head, detections[0:1], [np.arange(100)], FP32)
    assert len(rles) == 100
    assert set(gpu.blocking_copies) == set()
    assert sum(gpu.waits.values()) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sampling_positions_stay_fp32_in_mixed_precision(gpu, dtype):
    """CUDA's autocast samples in the widest type that it is given."""
    size = narrow("nano")
    model = Detector(size, 3, True).train().to(DEVICE)
    objective(Precision(DEVICE, dtype))(model, pinned_batch(size), 5.0)
    assert (torch.float32, dtype) not in gpu.dtypes["addmm"]  # autocast is on
    assert any(dtype in types for types in gpu.dtypes["addmm"])
    assert gpu.dtypes["grid_sampler_2d"] == {(torch.float32, torch.float32)}


def test_inference_computes_as_training_does_on_a_gpu_and_in_fp32_on_a_cpu(gpu):
    cpu = torch.device("cpu")
    assert InferenceSettings.amp == "auto"
    assert pick_inference_precision("auto", DEVICE, "auto").dtype is torch.bfloat16
    assert pick_inference_precision("auto", DEVICE, "off").dtype is None  # tiny's recipe
    assert pick_inference_precision("auto", cpu, "auto").dtype is None
    assert pick_inference_precision("bf16", cpu, "off").dtype is torch.bfloat16


class HalfScaler:
    """A GradScaler that scales nothing; its gradients overflow where it is told so."""

    def __init__(self, scale: float):
        self.value = scale
        self.steps = 0

    def scale(self, loss):
        return loss

    def unscale_(self, optimizer):
        pass

    def step(self, optimizer):
        self.steps += 1

    def update(self):
        pass

    def get_scale(self):
        return self.value


@pytest.mark.parametrize("scale, skipped", [(1024.0, False), (1.0, True)])
def test_an_overflow_leaves_no_nan_in_the_epochs_gradient_norm(scale, skipped):
    weight = torch.nn.Parameter(torch.ones(2))
    model = torch.nn.ParameterList([weight])
    factors = iter([1.0, float("inf"), 3.0])

    def losses(model, batch, objects):
        factor = next(factors)
        return {"loss_class": (weight * factor).sum() if factor < 9 else (weight - 1).sqrt().sum()}

    scaler = HalfScaler(scale)
    trainer = Trainer(
        model=model,
        losses=losses,
        optimizer=torch.optim.SGD([weight], 0.0),
        schedule=lambda position: 1.0,
        scaler=scaler,
        ema=None,
        clip=0.0,
        device=torch.device("cpu"),
        progress=Progress(micro_batch=1),
    )
    batch = made_batch(narrow("tiny"))[:1]
    points = {}
    curves = StepCurves(lambda values, step: points.update(values), steps=3)
    curves.steps_a_point = 3
    for step in (1, 2, 3):
        result = optimise(trainer, batch)
        curves.add(step, result, [1.0])
        trainer.progress.count_step(result)
    means = trainer.progress.means()
    assert means["grad_norm"] == pytest.approx((2**0.5 + 3 * 2**0.5) / 2)
    assert means["loss_class"] == pytest.approx((2 + 6) / (2 if skipped else 3))
    assert points["5 training by step/grad_norm"] == pytest.approx(means["grad_norm"])
    assert scaler.steps == 2 and "steps_without_grad_norm" not in means


# ---------------- the pretended GPU itself


def test_a_pretended_gpu_refuses_what_a_real_one_does(gpu):
    there = torch.ones(3, device=DEVICE)
    assert isinstance(there, OnCuda) and there.device == DEVICE
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)
    with pytest.raises(TypeError):
        there.numpy()
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a CPU's single number is free


def test_waits_and_copies_are_counted_by_line(gpu):
    there = torch.arange(4, device=DEVICE)
    assert not gpu.waits and not gpu.blocking_copies
    there[there > 1]
    there.sum().item()
    there.tolist()
    there.nonzero()
    assert sum(gpu.waits.values()) == 4
    assert all(line.startswith("tests/test_cuda_ready.py:") for line in gpu.waits)
    there[[0, 2]]
    torch.tensor([1, 2], device=DEVICE)
    torch.ones(2).to(DEVICE, non_blocking=True)  # not pinned
    assert sum(gpu.blocking_copies.values()) == 3
    torch.ones(2).pin_memory().to(DEVICE, non_blocking=True)
    there.to("cpu", non_blocking=True)
    assert sum(gpu.blocking_copies.values()) == 3 and sum(gpu.waits.values()) == 4


def measure_quickly(out: Path) -> None:
    """benchmarks/gpu.py, and in the same process the scripts that it starts."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("gpu")

    def script(name: str, *words: object) -> None:
        output_of(importlib.import_module(name.removesuffix(".py")).main, *words)

    benchmark.script = script
    benchmark.main(["--device", "cpu", "--quick", "--out", str(out)])


@pytest.mark.slow
def test_the_benchmark_of_a_card_runs_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.md"
    done = Forked(cwd=tmp_path, before=partial(measure_quickly, out))
    assert done.wait() == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert "not measured" not in text
    for table in ("training step", "inference", "stage 2", "--batch auto", "a step of", "tiny"):
        assert f"\n| {table}" in text
