"""From a split to batches: augmentation keeps everything together, seeds decide what is seen."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import read_split
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.mask import encode
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from rfdetr.console import UserError, run_script
from rfdetr.data.augment import draw_side, multi_scale_sides
from rfdetr.data.coco import read_dataset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.loaders import (
    EpochSampler,
    collate,
    evaluation_loader,
    make_loader,
    training_loader,
)
from rfdetr.data.records import CocoSplit
from rfdetr.data.workers import naming_workers
from rfdetr.sizes import SIZES
from testkit.forked import Forked


@pytest.fixture(scope="module")
def split(demo):
    return read_dataset(demo)["train"]


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> CocoSplit:
    """Two gray 120x90 images with a red and a blue rectangle, one a polygon and one an RLE.

    A third has no mask.
    """
    folder = tmp_path_factory.mktemp("data") / "squares/train"
    folder.mkdir(parents=True)
    corners = np.array([[10, 20, 42, 37], [60, 48, 110, 85], [0, 0, 15, 15]])
    pixels, table = (
        np.full((90, 120, 3), 40, np.uint8),
        {"categories": [{"id": n, "name": str(n)} for n in range(3)]},
    )
    table |= {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 120, "height": 90} for n in (0, 1)]
    }
    table["annotations"] = []
    for n, (x0, y0, x1, y1) in enumerate(corners.tolist()):
        mask = np.zeros((90, 120), np.uint8, order="F")
        mask[y0:y1, x0:x1] = 1
        if n < 2:
            pixels[mask > 0] = (255 * (n == 0), 0, 255 * (n == 1))
        polygon, rle = [[x0, y0, x1, y0, x1, y1, x0, y1]], encode(mask) | {"size": [90, 120]}
        for image in (0, 1):
            segmentation = (
                None
                if n == 2
                else polygon
                if image == n
                else rle | {"counts": rle["counts"].decode()}
            )
            entry = {
                "id": 2 * n + image,
                "image_id": image,
                "category_id": n,
                "segmentation": segmentation,
            }
            table["annotations"].append(entry | {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0})
    for image in (0, 1):
        Image.fromarray(pixels).save(folder / f"{image}.png")
    file = folder / "_annotations.coco.json"
    file.write_text(json.dumps(table))
    return read_split(file, folder, "train")


@pytest.mark.parametrize("augment", ["dihedral", "crops", None])
def test_image_boxes_and_masks_stay_together(squares, augment):
    dataset, arrangements = SplitDataset(squares, 96, augment, masks=True), set()
    for seed in range(60):
        sample = dataset[seed % 2, seed]
        image, target = sample["image"].float(), sample["target"]
        assert image.shape == (3, 96, 96)
        assert (
            len(target["labels"])
            == len(target["masks"])
            == len(target["has_mask"])
            == len(target["boxes"])
        )
        boxes = box_convert(target["boxes"], "cxcywh", "xyxy") * 96
        assert (
            boxes.min() >= -1e-4
            and boxes.max() <= 96 + 1e-4
            and (boxes[:, 2:] - boxes[:, :2] > 0.99).all()
        )
        for box, label, mask, has_mask in zip(
            boxes, target["labels"].tolist(), target["masks"], target["has_mask"]
        ):
            assert has_mask == (label != 2)
            if label == 2:
                assert mask.sum() == 0
                continue
            ys, xs = torch.where(mask > 0)
            edges = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            assert (edges - box).abs().max() <= 1
            own, other = (0, 2) if label == 0 else (2, 0)
            coloured = image[own] > image[other] + 60  # whatever the colour jitter did
            assert coloured[mask > 0].float().mean() > 0.9
            if (box[2:] - box[:2]).min() > 6:  # resizing blurs the rims
                assert (mask[coloured] > 0).float().mean() > 0.85
            arrangements.add((label, *box.round().int().tolist()))
    assert (
        len(arrangements) == 2 if augment is None else len(arrangements) >= 8
    )  # the symmetries, or many crops


def test_dihedral_reaches_all_eight_symmetries(squares):
    dataset = SplitDataset(squares, 96, "dihedral", masks=False)
    seen = {
        tuple((dataset[0, seed]["target"]["boxes"][0] * 960).round().tolist())
        for seed in range(100)
    }
    assert len(seen) == 8


def test_objects_that_a_crop_leaves_out_are_gone_and_sizes_vary(squares):
    dataset, counts, areas = SplitDataset(squares, 96, "crops", masks=True), Counter(), []
    for seed in range(80):
        target = dataset[0, seed]["target"]
        counts[len(target["boxes"])] += 1
        areas += target["boxes"][:, 2:].prod(1).tolist()
    assert len(counts) > 1 and max(counts) == 3
    assert max(areas) > 1.5 * 50 * 37 / (120 * 90)


# ---------------------------------------------------------------- the dataset


@pytest.mark.parametrize("augment", ["dihedral", "crops"])
def test_a_samples_seed_alone_decides_it(split, augment):
    dataset = SplitDataset(split, 64, augment, masks=True)
    torch.manual_seed(1)
    first = dataset[3, 77]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = dataset[3, 77], dataset[3, 78]
    assert torch.equal(
        torch.get_rng_state(), state
    )  # and the caller's random numbers are left alone
    assert torch.equal(first["image"], again["image"]) and not torch.equal(
        first["image"], other["image"]
    )
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
    changed = replace(split, images=copy.deepcopy(list(split.images)))
    before, emptied = len(split.images[0].boxes), changed.images[1]
    for name in ("boxes", "labels", "segmentations"):
        setattr(emptied, name, getattr(emptied, name)[:0])
    dataset = SplitDataset(changed, 64, None, masks=True)
    assert len(dataset) == len(split.images)
    batch = collate([dataset[0, None], dataset[1, None]])
    assert len(batch.targets[0]["boxes"]) == len(batch.targets[0]["masks"]) == before
    assert batch.targets[1]["boxes"].shape == (0, 4) and batch.targets[1]["masks"].shape == (
        0,
        64,
        64,
    )
    assert batch.objects == before and len(batch[1:]) == 1 and batch[1:].objects == 0


def test_boxes_are_relative_and_agree_with_the_annotations(split):
    dataset = SplitDataset(split, 128, None, masks=True)
    for index in range(3):
        record, sample = split.images[index], dataset[index, None]
        cx, cy, w, h = sample["target"]["boxes"].T.numpy()
        corners = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)
        np.testing.assert_allclose(
            corners * ([record.width, record.height] * 2), record.boxes, atol=1e-3
        )
        assert sample["image"].shape == (3, 128, 128) and sample["image"].dtype == torch.uint8
        for box, mask in zip(corners * 128, sample["target"]["masks"].numpy()):
            ys, xs = np.nonzero(mask)
            assert (
                np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - box).max() <= 2
            )


def batches(split, workers: int, epochs: int = 2) -> list:
    sampler = EpochSampler(len(split.images), per_step=4, seed=3, min_steps=4)
    loader = training_loader(
        SplitDataset(split, 64, "microscopy", masks=True), sampler, workers, pin=False
    )
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
            assert torch.equal(one["boxes"], other["boxes"]) and torch.equal(
                one["masks"], other["masks"]
            )


def test_loaders_take_no_random_numbers_from_the_run(split):
    """Or a run resumed inside an epoch, which starts one more iterator, would be another run."""
    state = torch.get_rng_state()
    batches(split, 0, epochs=1)
    list(evaluation_loader(SplitDataset(split, 64, None, masks=False), 4, 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_sees_every_image_once_whatever_the_ranks(split):
    dataset = SplitDataset(split, 64, None, masks=False)
    seen = [b.indices for rank in range(3) for b in evaluation_loader(dataset, 2, 0, rank, 3)]
    assert sorted(sum(seen, [])) == list(range(len(split.images)))


# ---------------------------------------------------------------- the order


@given(
    images=st.integers(1, 40),
    per_step=st.integers(1, 6),
    world=st.integers(1, 3),
    min_steps=st.integers(1, 5),
)
def test_every_epoch_is_whole_steps_of_fair_shares(images, per_step, world, min_steps):
    ranks = [
        list(EpochSampler(images, per_step, 0, min_steps, rank, world)) for rank in range(world)
    ]
    steps = max(images // (per_step * world), min_steps)
    assert [len(rank) for rank in ranks] == [steps] * world
    keys = [key for rank in ranks for step in rank for key in step]
    assert len(keys) == steps * per_step * world and all(
        len(step) == per_step for rank in ranks for step in rank
    )
    seen = Counter(index for index, _ in keys)
    assert (
        max(seen.values()) - min(seen.get(i, 0) for i in range(images)) <= 1
    )  # nobody twice before all once
    assert len({seed for _, seed in keys}) == len(
        keys
    )  # ranks and repeats see different augmentations


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
    sampler.set_epoch(2, start_step=8)  # begun by fewer processes
    assert len(sampler) == 0 and list(sampler) == []


# ---------------------------------------------------------------- multi-scale


@pytest.mark.parametrize("name", list(SIZES))
def test_multi_scale_sides_fit_the_grid_and_widen(name):
    size = SIZES[name]
    normal, wide = (
        multi_scale_sides(size, size.resolution, expanded) for expanded in (False, True)
    )
    assert all(side % size.block == 0 and side > 0 for side in wide)
    assert size.resolution in normal and set(normal) < set(wide)
    assert min(normal) < size.resolution < max(normal)


def test_the_side_of_a_step_is_drawn_from_seed_and_step():
    sides = [64, 80, 96]
    drawn = [draw_side(sides, 0, step) for step in range(60)]
    assert set(drawn) == set(sides)
    assert drawn == [draw_side(sides, 0, step) for step in range(60)]
    assert drawn != [draw_side(sides, 1, step) for step in range(60)]


class Samples(Dataset):
    """What workers have to send many of."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, key: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(8), torch.ones(3)

    def prepare_for_workers(self, workers: int) -> None:
        pass

    def images_in_work(self, processes: list) -> list:
        return []


def load_with_few_files(spare: int) -> None:
    """A script that loads with two workers, and may open so many more files than it has now."""
    import resource

    def main(argv: object) -> None:
        limit = 1 + max(map(int, os.listdir("/dev/fd"))) + spare
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        samples = Samples()
        with naming_workers(samples.images_in_work):
            list(make_loader(samples, [[i, i, i, i] for i in range(50)], 2, collate_fn=list))

    run_script(main, [])


# too few to start the workers, and to take what they send
@pytest.mark.slow
@pytest.mark.parametrize("spare", [10, 18])
def test_too_few_file_handles_are_named_and_nothing_hangs(spare, tmp_path):
    pytest.importorskip("resource")
    done = Forked(cwd=tmp_path, before=partial(load_with_few_files, spare))
    assert done.wait() == 2, done.stderr
    assert "--workers 0" in done.stderr and "ulimit -n" in done.stderr


@pytest.mark.parametrize(
    "error, message",
    [
        (
            RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"),
            "/dev/shm.*--workers 0",
        ),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"),
            "/dev/shm.*--workers 0",
        ),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(24, "Too many open files"), "ulimit -n"),
    ],
)
def test_what_the_workers_lack_is_named(error, message, split):
    with (
        pytest.raises(UserError, match=message),
        naming_workers(SplitDataset(split, 64, None, masks=False).images_in_work),
    ):
        raise error
