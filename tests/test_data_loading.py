"""From a split to batches: augmentation keeps everything together, and seeds alone decide what is seen."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors

from rfdetr.data.coco import read_dataset
from rfdetr.data.loaders import EpochSampler, SplitDataset, collate, evaluation_loader, training_loader
from rfdetr.data.transforms import draw_side, multi_scale_sides, training_transform
from rfdetr.sizes import SIZES


@pytest.fixture(scope="module")
def split(demo):
    return read_dataset(demo)["train"]


def squares(side: int = 96) -> dict:
    """A gray image with a red and a blue rectangle, their exact boxes and masks; the third object has no mask."""
    image = torch.full((3, side, side), 40, dtype=torch.uint8)
    masks = torch.zeros(3, side, side, dtype=torch.uint8)
    boxes = [[10, 20, 42, 37], [50, 48, 90, 85], [0, 0, 5, 5]]
    for i, (x0, y0, x1, y1) in enumerate(boxes[:2]):
        masks[i, y0:y1, x0:x1] = 1
        image[:, y0:y1, x0:x1] = 0
        image[(0, 2)[i], y0:y1, x0:x1] = 255
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(torch.tensor(boxes).float(), format="XYXY", canvas_size=(side, side)),
        "labels": torch.tensor([4, 7, 9]),
        "has_mask": torch.tensor([True, True, False]),
        "masks": tv_tensors.Mask(masks),
    }


@pytest.mark.parametrize("augment", ["dihedral", "crops"])
def test_image_boxes_and_masks_stay_together(augment):
    transform = training_transform(augment, 96)
    arrangements = set()
    for seed in range(60):
        torch.manual_seed(seed)
        sample = transform(squares())
        image = sample["image"].float()
        assert image.shape == (3, 96, 96)
        count = len(sample["boxes"])
        assert len(sample["labels"]) == len(sample["masks"]) == len(sample["has_mask"]) == count
        boxes = torch.as_tensor(sample["boxes"])
        assert (boxes >= 0).all() and (boxes <= 96).all() and (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        for box, label, mask, has_mask in zip(boxes, sample["labels"].tolist(), sample["masks"], sample["has_mask"]):
            assert has_mask == (label != 9)
            if label == 9:
                assert mask.sum() == 0
                continue
            ys, xs = torch.where(torch.as_tensor(mask) > 0)
            edges = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            assert (edges - box).abs().max() <= 1.5  # resampling rounds masks to whole pixels
            own, other = (0, 2) if label == 4 else (2, 0)
            coloured = image[own] > image[other] + 60  # whatever the colour jitter did
            assert coloured[torch.as_tensor(mask) > 0].float().mean() > 0.9
            assert (mask[coloured] > 0).float().mean() > 0.85
            arrangements.add((label, *box.round().int().tolist()))
    assert len(arrangements) >= 8  # the square's symmetries, or many crops


def test_dihedral_reaches_all_eight_symmetries():
    transform = training_transform("dihedral", 96)
    seen = set()
    for seed in range(100):
        torch.manual_seed(seed)
        sample = transform(squares())
        seen.add(tuple(torch.as_tensor(sample["boxes"])[0].int().tolist()))
    assert len(seen) == 8


def test_objects_that_a_crop_leaves_out_are_gone_and_sizes_vary():
    transform = training_transform("crops", 96)
    counts, areas = Counter(), []
    for seed in range(80):
        torch.manual_seed(seed)
        sample = transform(squares())
        counts[len(sample["boxes"])] += 1
        areas += [float((b[2] - b[0]) * (b[3] - b[1])) for b in torch.as_tensor(sample["boxes"])]
    assert len(counts) > 1 and max(counts) == 3
    assert max(areas) > 1.5 * 40 * 37


# ---------------------------------------------------------------- the dataset


@pytest.mark.parametrize("augment", ["dihedral", "crops"])
def test_a_samples_seed_alone_decides_it(split, augment):
    dataset = SplitDataset(split, 64, augment, masks=True)
    torch.manual_seed(1)
    first = dataset[3, 77]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = dataset[3, 77], dataset[3, 78]
    assert torch.equal(torch.get_rng_state(), state)  # and the caller's random numbers are left alone
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], other["image"])
    plain = dataset[3, None]  # not augmented, but of the resolution all the same
    assert plain["image"].shape == (3, 64, 64) and plain["target"]["masks"].shape[1:] == (64, 64)
    assert torch.equal(first["target"]["boxes"], again["target"]["boxes"])
    assert torch.equal(first["target"]["masks"], again["target"]["masks"])


def test_the_memory_cache_changes_nothing(split):
    cached, fresh = (SplitDataset(split, 64, "dihedral", masks=True) for _ in range(2))
    assert cached.cache is not None
    fresh.cache = None
    for _ in range(2):  # read, then from memory
        for index, seed in ((0, 5), (1, 6), (0, None)):
            a, b = cached[index, seed], fresh[index, seed]
            assert torch.equal(a["image"], b["image"])
            for key in ("boxes", "labels", "has_mask", "masks"):
                assert torch.equal(a["target"][key], b["target"][key]), key


def test_empty_images_stay(split):
    changed = copy.deepcopy(split)
    before, emptied = len(split.images[0].boxes), changed.images[1]
    for name in ("boxes", "labels", "segmentations"):
        setattr(emptied, name, getattr(emptied, name)[:0])
    dataset = SplitDataset(changed, 64, None, masks=True)
    assert len(dataset) == len(split.images)
    batch = collate([dataset[0, None], dataset[1, None]])
    assert len(batch.targets[0]["boxes"]) == len(batch.targets[0]["masks"]) == before
    assert batch.targets[1]["boxes"].shape == (0, 4) and batch.targets[1]["masks"].shape == (0, 64, 64)
    assert batch.objects == before and len(batch[1:]) == 1 and batch[1:].objects == 0


def test_boxes_are_relative_and_agree_with_the_annotations(split):
    dataset = SplitDataset(split, 128, None, masks=True)
    for index in range(3):
        record, sample = split.images[index], dataset[index, None]
        cx, cy, w, h = sample["target"]["boxes"].T.numpy()
        corners = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)
        np.testing.assert_allclose(corners * ([record.width, record.height] * 2), record.boxes, atol=1e-3)
        assert sample["image"].shape == (3, 128, 128) and sample["image"].dtype == torch.uint8
        for box, mask in zip(corners * 128, sample["target"]["masks"].numpy()):
            ys, xs = np.nonzero(mask)
            assert np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - box).max() <= 2


def batches(split, workers: int, epochs: int = 2) -> list:
    sampler = EpochSampler(len(split.images), per_step=4, seed=3, min_steps=4)
    loader = training_loader(SplitDataset(split, 64, "dihedral", masks=True), sampler, workers, pin=False)
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found += list(loader)
    return found


def test_the_number_of_workers_changes_no_batch(split):
    alone, helped = batches(split, 0), batches(split, 2)
    assert len(alone) == len(helped) == 8
    for a, b in zip(alone, helped):
        assert a.indices == b.indices and torch.equal(a.images, b.images)
        for one, other in zip(a.targets, b.targets):
            assert torch.equal(one["boxes"], other["boxes"]) and torch.equal(one["masks"], other["masks"])


def test_loaders_take_no_random_numbers_from_the_run(split):
    """Or a run that was resumed inside an epoch, which starts one more iterator, would not be the same run."""
    state = torch.get_rng_state()
    batches(split, 0, epochs=1)
    list(evaluation_loader(SplitDataset(split, 64, None, masks=False), 4, 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_sees_every_image_once_whatever_the_ranks(split):
    dataset = SplitDataset(split, 64, None, masks=False)
    seen = [b.indices for rank in range(3) for b in evaluation_loader(dataset, 2, 0, rank, 3)]
    assert sorted(sum(seen, [])) == list(range(len(split.images)))


# ---------------------------------------------------------------- the order


@given(images=st.integers(1, 40), per_step=st.integers(1, 6), world=st.integers(1, 3), min_steps=st.integers(1, 5))
def test_every_epoch_is_whole_steps_of_fair_shares(images, per_step, world, min_steps):
    ranks = [list(EpochSampler(images, per_step, 0, min_steps, rank, world)) for rank in range(world)]
    steps = max(images // (per_step * world), min_steps)
    assert [len(rank) for rank in ranks] == [steps] * world
    keys = [key for rank in ranks for step in rank for key in step]
    assert len(keys) == steps * per_step * world and all(len(step) == per_step for rank in ranks for step in rank)
    seen = Counter(index for index, _ in keys)
    assert max(seen.values()) - min(seen.get(i, 0) for i in range(images)) <= 1  # nobody twice before all once
    assert len({seed for _, seed in keys}) == len(keys)  # ranks and repeats see different augmentations


def test_the_order_depends_on_seed_and_epoch_alone():
    sampler, other = EpochSampler(20, 4, 7, 1), EpochSampler(20, 4, 8, 1)
    first = list(sampler)
    torch.rand(5)
    assert list(sampler) == first and list(other) != first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_a_resumed_epoch_skips_what_was_done():
    sampler = EpochSampler(20, 4, 7, 1)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, start_step=3)
    assert len(sampler) == 2 and list(sampler) == whole[3:]


# ---------------------------------------------------------------- multi-scale


@pytest.mark.parametrize("name", list(SIZES))
def test_multi_scale_sides_fit_the_grid_and_widen(name):
    size = SIZES[name]
    normal, wide = (multi_scale_sides(size, size.resolution, expanded) for expanded in (False, True))
    assert all(side % size.block == 0 and side > 0 for side in wide)
    assert size.resolution in normal and set(normal) < set(wide)
    assert min(normal) < size.resolution < max(normal)


def test_the_side_of_a_step_is_drawn_from_seed_and_step():
    sides = [64, 80, 96]
    drawn = [draw_side(sides, 0, step) for step in range(60)]
    assert set(drawn) == set(sides)
    assert drawn == [draw_side(sides, 0, step) for step in range(60)]
    assert drawn != [draw_side(sides, 1, step) for step in range(60)]
