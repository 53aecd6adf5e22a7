"""Memory: --batch auto and its place as CUDA's default, and what Metal and its fallbacks say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

import rfdetr.main
from rfdetr import device as devices
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.loaders import evaluation_loader
from rfdetr.data.records import CocoSplit
from rfdetr.resolve import plain, read_layer, resolve, yaml_text
from rfdetr.settings import DetectorSettings, SegmentationSettings
from rfdetr.training import auto_batch
from rfdetr.training.auto_batch import bytes_of_states, find_micro_batch
from rfdetr.training.optim import has_fused_adamw

MPS = torch.device("mps")
MB = 2**20

# ---------------------------------------------------------------- the default


@pytest.mark.parametrize("kind, images", [(DetectorSettings, 4), (SegmentationSettings, 8)])
def test_the_batch_left_open_is_auto_on_cuda_and_the_recipes_elsewhere(kind, images):
    settings = resolve(kind, {"size": "tiny"})
    on_cuda = settings.on_device("cuda")
    assert (on_cuda.batch, on_cuda.effective_batch) == ("auto", settings.accum * images)
    for name in ("cpu", "mps"):
        assert settings.on_device(name).batch == images
    assert resolve(kind, {"batch": 3}).on_device("cuda").batch == 3
    assert resolve(kind, {}, stored={"batch": 2}).on_device("cuda").batch == 2  # an earlier run's


def test_the_config_has_the_batch_that_repeats_the_run():
    settings = resolve(DetectorSettings, {}).on_device("cuda")
    file = yaml.safe_load(yaml_text(settings, []))
    assert file["batch"] == "auto"
    again = resolve(DetectorSettings, {}, file=read_layer(DetectorSettings, file, "config.yaml"))
    assert plain(again) == plain(settings)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_run_takes_the_batch_of_its_device(few, kind, monkeypatch):
    monkeypatch.setattr(rfdetr.main, "pick_device", lambda name: SimpleNamespace(type=kind))
    monkeypatch.setattr(rfdetr.main.distributed, "start", lambda device: None)
    monkeypatch.setattr(rfdetr.main, "pick_precision", lambda amp, device: None)
    settings = resolve(DetectorSettings, {"size": "tiny", "dataset": few})
    assert rfdetr.main.begin(settings, None).settings.batch == (4 if kind == "cpu" else "auto")


# ---------------------------------------------------------------- the probe


class Losses:
    """A training step that takes `mb` an image and, as CUDA does, fails where `room` is less."""

    sides = ()

    def __init__(self, memory: FakeMemory, mb: float, refuses: bool):
        self.memory = memory
        self.mb = mb
        self.refuses = refuses

    def __call__(self, model, batch, objects):
        needed = self.memory.held + self.mb * len(batch)
        if self.refuses and needed > self.memory.total:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        self.memory.peak = max(self.memory.peak, needed)
        torch.rand(3)
        return {"loss": model.weight.sum()}


class FakeMemory:
    """What a device says of its memory, in MB."""

    def __init__(self, total: float):
        self.total = total
        self.held = 0.0
        self.peak = 0.0
        self.forgotten = 0

    def forget(self, device) -> None:
        self.peak = self.held
        self.forgotten += 1


@pytest.fixture
def memory(monkeypatch) -> FakeMemory:
    memory = FakeMemory(total=100.0)
    monkeypatch.setattr(auto_batch, "memory_mb", lambda device: memory.peak)
    monkeypatch.setattr(auto_batch, "free_on_device_mb", lambda device: memory.total - memory.held)
    monkeypatch.setattr(auto_batch, "forget_peak_memory", memory.forget)
    return memory


def on_cuda(memory: FakeMemory, monkeypatch) -> None:
    """Let what is probed on the CPU be probed as CUDA is; the states' room is held by `memory`."""
    monkeypatch.setattr(auto_batch, "_largest_by_one_image", auto_batch._largest_on_cuda)

    def hold(model: nn.Module, ema: bool) -> None:
        memory.held += bytes_of_states(model, ema) / MB

    monkeypatch.setattr(auto_batch, "room_for_states", hold)


@pytest.mark.parametrize("refuses", [True, False])  # Windows takes main memory instead
@pytest.mark.parametrize("ema, images", [(True, 4), (False, 8)])
def test_the_probe_leaves_room_for_adam_and_the_average(memory, monkeypatch, refuses, ema, images):
    """12 MB of weights: 36 for gradients and moments, 12 for the average; 7.5 an image."""
    on_cuda(memory, monkeypatch)
    model = nn.Linear(1024, 3 * 1024, bias=False)
    losses = Losses(memory, 7.5, refuses)
    assert find_micro_batch(model, losses, 16, 32, ema) == images


def test_the_probes_peak_and_random_numbers_are_forgotten(memory, monkeypatch):
    on_cuda(memory, monkeypatch)
    memory.held = 5.0
    model = nn.Linear(8, 8)
    state = torch.get_rng_state()
    find_micro_batch(model, Losses(memory, 2.0, True), 4, 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert memory.forgotten == 2 and memory.peak < 6


def test_what_swaps_is_measured_by_one_image(memory):
    """80 of 100 MB are for use, 48 of them for states: three images of 9.5 MB."""
    model = nn.Linear(1024, 3 * 1024, bias=False)
    assert find_micro_batch(model, Losses(memory, 9.5, False), 12, 32) == 3


def test_states_are_of_what_trains_and_the_average_of_everything():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[0].requires_grad_(False)
    assert bytes_of_states(model, ema=False) == 3 * 4 * 8
    assert bytes_of_states(model, ema=True) == 3 * 4 * 8 + 4 * 24


# ---------------------------------------------------------------- Metal


def test_metal_is_asked_for_its_memory(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 700 * MB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 200 * MB)
    monkeypatch.setattr(devices, "free_memory_mb", lambda: 9000.0)
    assert devices.memory_mb(MPS) == 200
    assert devices.free_on_device_mb(MPS) == 500
    monkeypatch.setattr(devices, "free_memory_mb", lambda: 300.0)  # other programs have the rest
    assert devices.free_on_device_mb(MPS) == 300


@pytest.mark.parametrize("lacking", ["aten::grid_sampler_2d_backward", None])
def test_what_falls_back_to_the_cpu_is_named_once(lacking, monkeypatch, capsys):
    monkeypatch.setattr(devices, "has_kernel", lambda operation, device: operation != lacking)
    devices.warn_of_fallbacks.cache_clear()
    for _ in range(2):
        devices.warn_of_fallbacks(MPS)
    devices.warn_of_fallbacks.cache_clear()
    told = capsys.readouterr()
    assert (told.out + told.err).count("no Metal kernel for deformable attention") == bool(lacking)


def test_every_operation_that_may_fall_back_exists():
    for operations in devices.METAL_OPERATIONS.values():
        for operation in operations:
            assert devices.has_kernel(operation, torch.device("cpu"))
    assert has_fused_adamw(torch.device("cpu"))
    assert has_fused_adamw(MPS) == devices.has_kernel("aten::_fused_adamw_", MPS)


# ---------------------------------------------------------------- loaders


def test_evaluation_loaders_are_pinned_and_keep_their_workers(few):
    split = CocoSplit.__new__(CocoSplit)
    split.images = [None] * 5
    loader = evaluation_loader(SplitDataset(split, 32, None, masks=False), 2, 1, pin=True)
    assert loader.pin_memory and loader.persistent_workers
