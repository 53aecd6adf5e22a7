"""Rare classes more often, a share of images without objects; (seed, epoch) alone decide."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import quick_flags

import train_detector_stage1
from rfdetr.console import UserError
from rfdetr.data.augment import PRESETS
from rfdetr.data.coco import read_dataset
from rfdetr.data.demo import make_demo
from rfdetr.data.loaders import EpochSampler
from rfdetr.data.sampling import Pool, make_mix, repeat_factors, say_counts


@pytest.fixture(scope="module")
def tailed(demo):
    """100 images: "often" in 80 of them, "seldom" in 4, one of them with both; 17 are empty."""
    split = read_dataset(demo)["train"]
    images = []
    for number in range(100):
        labels = [0, 0] if number < 80 else []
        labels += [1] if 79 <= number < 83 else []
        images.append(replace(split.images[0], labels=np.array(labels, dtype=np.int64)))
    return replace(split, images=images, class_names=["often", "seldom"], category_ids=[1, 2])


def epoch_of(sampler: EpochSampler, epoch: int = 0, start: int = 0) -> list:
    sampler.set_epoch(epoch, start)
    return list(sampler)


def test_an_images_factor_is_that_of_its_rarest_class(tailed):
    factors = repeat_factors(tailed, 0.16)
    assert factors[:79].tolist() == [1] * 79 and factors[83:].tolist() == [1] * 17
    assert factors[79:83].tolist() == pytest.approx([2.0] * 4)  # sqrt(.16 / .04)
    assert repeat_factors(tailed, 0.01).tolist() == [1] * 100


def test_a_fraction_of_a_factor_is_the_chance_of_once_more(tailed):
    mix = make_mix(tailed, [], repeat_factor=0.09)  # sqrt(.09 / .04) = 1.5
    shown = Counter()
    for seed in range(200):
        order = mix.draw(102, torch.Generator().manual_seed(seed))
        shown.update(order.tolist())
    rare = np.mean([shown[index] for index in range(79, 83)])
    common = np.mean([shown[index] for index in range(79)])
    assert rare / common == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize("flags", [{"repeat_factor": 0.3}, {"negatives": 0.4}, {}])
@pytest.mark.parametrize("every_other", [[], [0, 3, 79]])
def test_mixes_resume_and_share_out_as_plain_epochs_do(tailed, flags, every_other):
    mix = make_mix(tailed, every_other, **flags)
    one = EpochSampler(100, 4, 7, 12, mix=mix)
    whole = epoch_of(one, 2)
    assert epoch_of(one, 2, start=5) == whole[5:] and epoch_of(one, 3) != whole
    assert len(whole) == 25  # a mix changes what is shown, not how much
    ranks = [epoch_of(EpochSampler(100, 2, 7, 12, rank, 2, mix), 2) for rank in range(2)]
    assert [step for pair in zip(*ranks) for step in [pair[0] + pair[1]]] == whole
    seeds = [seed for step in whole for _, seed in step]
    assert len(set(seeds)) == len(seeds)


def test_without_flags_the_order_is_what_it_was(tailed):
    generator = torch.Generator().manual_seed(7 * 1_000_003)
    order = torch.cat([torch.randperm(100, generator=generator) for _ in range(2)])[:120]
    order[::2] = torch.tensor([4, 5, 6])[
        torch.cat([torch.randperm(3, generator=generator) for _ in range(20)])
    ]
    mix = make_mix(tailed, [4, 5, 6])
    drawn, _ = EpochSampler(100, 4, 7, 30, mix=mix).order()
    assert drawn.tolist() == order.tolist()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_the_share_of_images_without_objects_is_exact(tailed, share):
    order = make_mix(tailed, [], negatives=share).draw(200, torch.Generator())
    empty = order >= 83
    assert empty.sum() == round(200 * share)
    if share == 0.5:  # they are all over the epoch, and each as often as any other
        assert 20 < empty[:100].sum() < 80
        counts = np.bincount(order[empty].numpy())[83:]
        assert counts.max() - counts.min() <= 1


def test_no_image_without_objects_to_show(tailed):
    full = replace(tailed, images=tailed.images[:80])
    with pytest.raises(UserError, match="every image of .* shows an object"):
        make_mix(full, [], negatives=0.1)
    make_mix(full, [], negatives=0.0)


def test_a_pool_draws_no_image_twice_before_all_once():
    order = Pool(torch.tensor([3, 5, 9])).draw(7, torch.Generator())
    assert sorted(order[:3].tolist()) == [3, 5, 9] == sorted(order[3:6].tolist())


@pytest.mark.parametrize("name", ["flips", "mosaic", "strong"])
def test_what_an_epoch_shows_is_said_to_be_before_images_are_mixed(name, few, capsys):
    split = read_dataset(few)["train"]
    say_counts(split, torch.arange(4), PRESETS[name].mixes_images)
    said = "without objects, before --augment puts objects of other images on some\n"
    assert (said in capsys.readouterr().out) == (name != "flips")


def test_training_says_what_an_epoch_shows(few, call, capsys, tmp_path):
    flags = [*quick_flags(few), "--pretrain_weights", "none", "--head", "dataset"]
    flags += ["--repeat_factor", 1, "--negatives", 0, "--output_dir", tmp_path / "run"]
    call(train_detector_stage1.main, *flags)
    said = capsys.readouterr().out
    assert "Epoch 1 shows 4 images, 0 % of them without objects\n" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["objects", "of", "before", "now"] in rows
    assert any(row[:1] == ["cells"] and int(row[2]) > 0 for row in rows)
    stored = json.loads((tmp_path / "run/metrics.json").read_text())["args"]
    assert stored["repeat_factor"] == 1 and stored["negatives"] == 0


def test_the_long_tailed_demo_has_two_rare_classes(tmp_path):
    make_demo(tmp_path, train=150, valid=0, size=64, kind="longtail")
    table = json.loads((tmp_path / "train/_annotations.coco.json").read_text())
    counts = Counter(entry["category_id"] for entry in table["annotations"])
    assert [row["name"] for row in table["categories"]] == ["rod", "blob", "clover", "star"]
    for rare in (3, 4):
        assert 15 <= counts[1] / counts[rare] <= 60
