"""Mosaics: parts of four images in one, and of their objects what is seen there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_augment import as_rle, corners_of, split  # noqa: F401  (fixtures)

from rfdetr.data.augment import Preset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.loaders import collate
from rfdetr.data.mosaic import MARGIN, draw_parts
from rfdetr.data.tiles import VISIBLE
from rfdetr.masks import extent_of_pixels
from rfdetr.tiling import Tiling

SIDE = 96  # of the fixture's images
MOSAICS = Preset(mirrored_axes=(), mosaic_chance=1.0)


def drawn(dataset: SplitDataset, index: int, seed: int) -> list[tuple]:
    """(image, part) of each view of a mosaic."""
    torch.manual_seed(seed)
    torch.rand(())  # whether it is one
    indices = [index, *torch.randint(len(dataset), (3,)).tolist()]
    return list(zip(indices, draw_parts(dataset.resolution)))


@pytest.mark.parametrize("seed", range(8))
def test_a_mosaic_s_parts_share_the_whole_and_leave_none_out(seed):
    torch.manual_seed(seed)
    parts = draw_parts(SIDE)
    covered = np.zeros((SIDE, SIDE), int)
    for (left, top, right, bottom), to_right, down in parts:
        covered[top:bottom, left:right] += 1
        assert min(right - left, bottom - top) >= int(MARGIN * SIDE)
        # a view's corner lies at the seams' crossing
        assert to_right in (left, right - SIDE) and down in (top, bottom - SIDE)
    assert (covered == 1).all()


@pytest.mark.parametrize("seed", range(12))
def test_pixels_masks_and_boxes_are_those_of_the_images_moved(as_rle, seed):  # noqa: F811
    plain = SplitDataset(as_rle, SIDE, None, masks=True)
    dataset = SplitDataset(as_rle, SIDE, MOSAICS, masks=True)
    index = seed % len(dataset)
    sample = dataset[index, seed]
    target = sample["target"]
    assert target["index"] == index
    number = 0
    for image, ((left, top, right, bottom), to_right, down) in drawn(dataset, index, seed):
        view = plain[image, None]
        there = slice(top, bottom), slice(left, right)
        origin = slice(top - down, bottom - down), slice(left - to_right, right - to_right)
        shown = sample["image"].permute(1, 2, 0)[there]
        assert torch.equal(shown, view["image"].permute(1, 2, 0)[origin])
        corners = as_rle.images[image].boxes + [to_right, down, to_right, down]
        seen = corners.clip([left, top, left, top], [right, bottom, right, bottom])
        share = (seen[:, 2:] - seen[:, :2]).prod(1) / (corners[:, 2:] - corners[:, :2]).prod(1)
        for i, label in enumerate(view["target"]["labels"]):
            if share[i] < VISIBLE:
                continue
            expected = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
            expected[there] = view["target"]["masks"][i][origin]
            if not expected.any():  # its box reaches this part, its mask does not
                continue
            assert target["labels"][number] == label
            # polygons are drawn anew: their corners are rounded to a fifth of a pixel
            assert (target["masks"][number] != expected).sum() <= 3
            box = corners_of(target, SIDE)[number]
            assert np.abs(box - extent_of_pixels(expected.numpy())).max() <= 1.5
            number += 1
    assert number == len(target["labels"])


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("tiling", [None, Tiling(64, 0.25)])
def test_boxes_are_the_same_without_masks(split, letterbox, tiling):  # noqa: F811
    preset = replace(MOSAICS, mirrored_axes=(0, 1), transposed=True, crop_chance=0.3)
    made = []
    for masks in (True, False):
        dataset = SplitDataset(split, 64, preset, masks, tiling=tiling, letterbox=letterbox)
        made.append(collate([dataset[seed % len(dataset), seed] for seed in range(20)]))
    with_masks, without = made
    assert torch.equal(with_masks.images, without.images)
    assert with_masks.objects == without.objects > 20
    for one, other in zip(with_masks.targets, without.targets):
        assert torch.equal(one["boxes"], other["boxes"])
        assert "masks" not in other


def test_a_box_without_a_mask_ends_at_the_seam(split):  # noqa: F811
    changed = replace(split, images=list(split.images))
    for image in changed.images:
        image.segmentations = [None] * len(image.labels)
    dataset = SplitDataset(changed, SIDE, MOSAICS, masks=False)
    cut = 0
    for seed in range(10):
        boxes = corners_of(dataset[0, seed]["target"], SIDE)
        windows = [np.array(part.window) for _, part in drawn(dataset, 0, seed)]
        for box in boxes:
            inside = [
                (box[:2] >= w[:2] - 1e-3).all() and (box[2:] <= w[2:] + 1e-3).all() for w in windows
            ]
            assert sum(inside) == 1
            cut += any(np.isclose(box[[0, 1, 2, 3]], w[[0, 1, 2, 3]]).any() for w in windows)
    assert cut > 5


def test_a_turned_mosaic_shows_an_object_in_its_own_part_alone(as_rle):  # noqa: F811
    preset = Preset(mosaic_chance=1.0, most_turn=180, zoom=(0.8, 1.2))
    dataset = SplitDataset(as_rle, SIDE, preset, masks=True)
    objects = 0
    for seed in range(10):
        target = dataset[seed, seed]["target"]
        windows = [part.window for _, part in drawn(dataset, seed, seed)]
        boxes = corners_of(target, SIDE)
        for box, mask in zip(boxes, target["masks"].numpy()):
            shown = [mask[w.top : w.bottom, w.left : w.right].any() for w in windows]
            assert sum(shown) == 1
            assert np.abs(box - extent_of_pixels(mask)).max() <= 2
            objects += 1
    assert objects > 20
