"""The cache of a frozen detector's outputs: the same as running the detector again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from rfdetr import checkpoint
from rfdetr.classes import assign_rows
from rfdetr.console import UserError
from rfdetr.data.coco import read_dataset
from rfdetr.data.loaders import EpochSampler, SplitDataset, collate
from rfdetr.engine import Progress
from rfdetr.feature_cache import FeatureCache, MaskObjective, choose_cache, flipped, freeze
from rfdetr.losses.criterion import LossWeights
from rfdetr.models.detector import Detector
from rfdetr.models.segmentation import build_mask_head
from rfdetr.precision import Precision
from rfdetr.sizes import SIZES

CPU = Precision(torch.device("cpu"))
TABLE = assign_rows(["cells", "blood_vessel", "glomerulus"], [1, 2, 3], "dataset")


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(SIZES["tiny"], TABLE.rows_total, True).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def dataset(demo) -> SplitDataset:
    """Two images with objects, and one without."""
    split = copy.deepcopy(read_dataset(demo)["train"])
    del split.images[3:]
    empty = split.images[2]
    for name in ("boxes", "labels", "segmentations"):
        setattr(empty, name, getattr(empty, name)[:0])
    return SplitDataset(split, 64, "dihedral", masks=True)


def objective_for(detector: Detector) -> MaskObjective:
    return MaskObjective(detector, TABLE, LossWeights(), CPU, (), 0, Progress())


@pytest.fixture(autouse=True)
def every_match_counts(monkeypatch):
    """An untrained detector misses its objects; what the cache keeps of a match does not depend on its quality."""
    monkeypatch.setattr("rfdetr.feature_cache.MATCH_IOU", -1.0)


def test_cached_views_are_the_flipped_images_frozen_anew(detector, dataset):
    cache = FeatureCache(objective_for(detector), dataset, 4, None)
    for index in range(3):
        for view in range(4):
            batch = collate([flipped(dataset[index, None], view)])
            fresh, kept = freeze(detector, batch, TABLE, CPU, None), cache.__getitems__([(index, view)])
            assert torch.equal(kept.images, batch.images) and kept.indices == [index]
            torch.testing.assert_close(kept.features.float(), fresh.features, atol=2e-2, rtol=2e-3)  # half precision
            torch.testing.assert_close(kept.queries[0].float(), fresh.queries[0], atol=2e-2, rtol=2e-3)
            torch.testing.assert_close(kept.boxes[0], fresh.boxes[0])  # a batch against its images one by one
            assert (kept.grids[0] != fresh.grids[0]).sum() <= 2e-3 * fresh.grids[0].numel()
            assert len(kept.boxes[0]) == len(batch.targets[0]["boxes"])


def test_views_are_flips_of_image_and_objects_together(dataset):
    sample = dataset[0, None]
    batch, once = collate([sample]), collate([flipped(sample, 3)])
    assert torch.equal(once.images, batch.images.flip(-1, -2))
    for box, mask in zip(once.targets[0]["boxes"] * 64, once.targets[0]["masks"]):
        ys, xs = torch.where(mask > 0)
        centre = torch.tensor([xs.min() + xs.max() + 1, ys.min() + ys.max() + 1]) / 2
        assert (centre - box[:2]).abs().max() < 2
    again = collate([flipped(flipped(sample, 3), 3)])
    assert torch.equal(again.images, batch.images)
    torch.testing.assert_close(again.targets[0]["boxes"], batch.targets[0]["boxes"])


def test_disk_and_memory_give_the_same(detector, dataset, tmp_path):
    ram, disk = (FeatureCache(objective_for(detector), dataset, 2, folder) for folder in (None, tmp_path))
    assert list(tmp_path.glob("cache_*/features*"))
    keys = [(2, 1), (0, 0), (1, 7)]
    a, b = ram.__getitems__(keys), disk.__getitems__(keys)
    assert torch.equal(a.features, b.features) and torch.equal(a.images, b.images) and a.indices == [2, 0, 1]
    for name in ("queries", "boxes", "grids"):
        assert all(torch.equal(x, y) for x, y in zip(getattr(a, name), getattr(b, name)))
    del disk, b
    assert not list(tmp_path.glob("cache_*"))  # it goes with its owner


def test_the_detector_is_left_as_it_was(detector, dataset):
    before = checkpoint.fingerprint(detector)
    detector.train()
    FeatureCache(objective_for(detector), dataset, 1, None)
    assert checkpoint.fingerprint(detector) == before and not detector.training
    assert all(p.grad is None for p in detector.parameters())


def test_cached_and_fresh_batches_have_the_same_losses(detector, dataset):
    torch.manual_seed(1)
    head = build_mask_head("nano", detector.size.hidden)
    objective = objective_for(detector)
    cache = FeatureCache(objective_for(detector), dataset, 1, None)
    kept = cache.__getitems__([(i, 0) for i in range(3)])
    fresh = collate([dataset[i, None] for i in range(3)])
    a, b = objective(head, kept, 5.0), objective(head, fresh, 5.0)
    for name in ("loss_mask", "loss_dice"):
        assert a[name].item() == pytest.approx(b[name].item(), rel=5e-3) and a[name] > 0


def test_images_without_objects_train_too(detector, dataset):
    head = build_mask_head("nano", detector.size.hidden)
    cache = FeatureCache(objective_for(detector), dataset, 2, None)
    batch = cache.__getitems__([(2, 0), (2, 1)])
    assert batch.objects == 0 and len(batch) == 2
    losses = objective_for(detector)(head, batch, 1.0)
    sum(losses.values()).backward()
    assert sum(losses.values()) == 0 and all(p.grad is None or not p.grad.any() for p in head.parameters())
    part = cache.__getitems__([(0, 0), (2, 0), (1, 0)])[1:]
    assert part.indices == [2, 1] and part.objects == len(dataset[1, None]["target"]["boxes"])


def test_objects_without_a_mask_are_left_out(detector, dataset):
    batch = collate([dataset[0, None]])
    count = batch.objects
    batch.targets[0]["has_mask"] = batch.targets[0]["has_mask"].clone()
    batch.targets[0]["has_mask"][0] = False
    assert freeze(detector, batch, TABLE, CPU, None).objects == count - 1


def test_poor_matches_teach_nothing(detector, dataset, monkeypatch):
    monkeypatch.setattr("rfdetr.feature_cache.MATCH_IOU", 1.1)
    assert freeze(detector, collate([dataset[0, None]]), TABLE, CPU, None).objects == 0


def test_the_loader_follows_its_sampler(detector, dataset):
    sampler = EpochSampler(3, 2, 0, 3)
    loader = FeatureCache(objective_for(detector), dataset, 2, None).loader(sampler)
    sampler.set_epoch(4, start_step=1)
    assert len(loader) == 2
    assert [batch.indices for batch in loader] == [[index for index, _ in step] for step in sampler]


@pytest.mark.parametrize(
    "mode, needed, free_mb, expected",
    [
        ("ram", 10**12, 1.0, "ram"),  # what was asked for is done
        ("disk", 10, 1e6, "disk"),
        ("off", 10, 1e6, "off"),
        ("auto", 10**6, 1e4, "ram"),
        ("auto", 10**6, None, "ram"),
        ("auto", 10**6, 1.0, "disk"),
        ("auto", 10**18, 1.0, "off"),
    ],
)
def test_where_the_cache_goes(mode, needed, free_mb, expected, monkeypatch, tmp_path):
    monkeypatch.setattr("rfdetr.feature_cache.free_memory_mb", lambda: free_mb)
    chosen, why = choose_cache(mode, needed, tmp_path, multi_scale=False)
    assert chosen == expected and why


def test_one_cache_cannot_hold_many_scales():
    assert choose_cache("auto", 10, Path.cwd(), multi_scale=True)[0] == "off"
    assert choose_cache("off", 10, Path.cwd(), multi_scale=True)[0] == "off"
    with pytest.raises(UserError, match="--multi_scale 0"):
        choose_cache("ram", 10, Path.cwd(), multi_scale=True)
