"""The cache of a frozen detector's outputs: what running it again gives, whoever filled it."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import quick_flags
from test_resume import assert_same_run, signal_at_step

import train_detector_stage1
import train_seg_stage2
from rfdetr.classes import assign_rows
from rfdetr.console import Stopped, UserError
from rfdetr.data.coco import read_dataset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.loaders import EpochSampler, collate
from rfdetr.device import Precision
from rfdetr.models.detector import Detector
from rfdetr.models.segmentation import MASK_HEADS
from rfdetr.sizes import SIZES, LossWeights
from rfdetr.training import feature_cache, feature_key, feature_room, frozen
from rfdetr.training.engine import Progress
from rfdetr.training.feature_cache import CachedLoader, FeatureCache
from rfdetr.training.feature_file import RecordFile
from rfdetr.training.feature_room import choose_cache
from rfdetr.training.frozen import FrozenBatch, MaskObjective, flipped, freeze
from rfdetr.weights import checkpoint

CPU = Precision(torch.device("cpu"))
TABLE = assign_rows(["cells", "blood_vessel", "glomerulus"], [1, 2, 3], "dataset")


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(SIZES["tiny"], TABLE.rows_total, True).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def dataset(demo) -> SplitDataset:
    """Two images with objects, and one without."""
    split = read_dataset(demo)["train"]
    split = replace(split, images=list(split.images))
    del split.images[3:]
    empty = split.images[2]
    for name in ("boxes", "labels", "segmentations"):
        setattr(empty, name, getattr(empty, name)[:0])
    return SplitDataset(split, 64, None, masks=True)


def objective_for(detector: Detector) -> MaskObjective:
    return MaskObjective(detector, TABLE, LossWeights(), CPU, (), 0, Progress())


@pytest.fixture
def cache_of(detector, dataset, tmp_path):
    """cache_of(views, on_disk): an open cache of the three images; those on disk share a folder."""

    def make(views: int = 2, on_disk: bool = False) -> FeatureCache:
        return FeatureCache(
            objective_for(detector), dataset, views, tmp_path / "feature_cache"
        ).open(on_disk)

    return make


@pytest.fixture(autouse=True)
def every_match_counts(monkeypatch):
    """An untrained detector misses its objects, and what is kept does not depend on a match."""
    monkeypatch.setattr("rfdetr.training.frozen.MATCH_IOU", -1.0)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The image of each view that the detector is run on from here on."""
    images = []

    def counted(model, batch, *rest):
        images.extend(batch.indices)
        return freeze(model, batch, *rest)

    monkeypatch.setattr(feature_cache, "freeze", counted)
    return images


def read(cache: FeatureCache, *keys: tuple[int, int]) -> FrozenBatch:
    """The batch of (image index, any number) as a loader makes it."""
    views = feature_cache.Views(cache.dataset, cache.views, cache.records.states)
    return cache.batch([views[key] for key in keys])


def assert_same(a: FrozenBatch, b: FrozenBatch) -> None:
    """Equal bit for bit."""
    assert (
        torch.equal(a.features, b.features)
        and torch.equal(a.images, b.images)
        and a.indices == b.indices
    )
    for name in ("queries", "boxes", "grids"):
        assert all(
            torch.equal(x, y) for x, y in zip(getattr(a, name), getattr(b, name), strict=True)
        )


ALL = [(index, view) for index in range(3) for view in range(2)]


# ---------------------------------------------------------------- what is kept


def test_cached_views_are_the_flipped_images_frozen_anew(detector, dataset, cache_of):
    cache = cache_of(4)
    for index in range(3):
        for view in range(4):
            batch = collate([flipped(dataset[index, None], view)])
            fresh = freeze(detector, batch, TABLE, CPU, None)
            for kept in (
                read(cache, (index, view)),
                read(cache, (index, view + 4)),
            ):  # computed, and kept
                assert torch.equal(kept.images, batch.images) and kept.indices == [index]
                assert torch.equal(kept.features, fresh.features.half())
                assert torch.equal(kept.queries[0], fresh.queries[0].half())
                assert torch.equal(kept.boxes[0], fresh.boxes[0]) and torch.equal(
                    kept.grids[0], fresh.grids[0]
                )
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


def test_a_view_is_computed_when_it_is_first_drawn_and_never_again(cache_of, computed):
    cache = cache_of()
    read(cache, (0, 0), (2, 1), (0, 2))  # the last is the first one's view
    assert computed == [0, 2]
    read(cache, (0, 0), (1, 0), (2, 1))
    assert computed == [0, 2, 1]


def test_a_batch_is_its_views_one_by_one_in_memory_and_on_disk(cache_of):
    keys = [(2, 1), (0, 0), (1, 7), (0, 0)]
    ram, disk, alone = cache_of(), cache_of(on_disk=True), cache_of()
    batch = read(ram, *keys)
    assert_same(batch, read(disk, *keys))
    assert_same(batch, read(disk, *keys))  # once computed, once read
    for i, key in enumerate(keys):
        assert_same(batch[i : i + 1], read(alone, key))


def test_the_detector_is_left_as_it_was(detector, cache_of):
    before = checkpoint.fingerprint(detector)
    detector.train()
    read(cache_of(), *ALL)
    assert checkpoint.fingerprint(detector) == before and not detector.training
    assert all(p.grad is None for p in detector.parameters())


def test_cached_and_fresh_batches_have_the_same_losses(detector, dataset, cache_of):
    torch.manual_seed(1)
    head = MASK_HEADS["nano"](detector.size.hidden)
    objective = objective_for(detector)
    kept = read(cache_of(1), *[(i, 0) for i in range(3)])
    fresh = collate([dataset[i, None] for i in range(3)])
    a, b = (objective(head, batch, float(batch.objects)) for batch in (kept, fresh))
    for name in ("loss_mask", "loss_dice"):
        assert a[name].item() == pytest.approx(b[name].item(), rel=5e-3) and a[name] > 0


def test_images_without_objects_train_too(detector, dataset, cache_of):
    head = MASK_HEADS["nano"](detector.size.hidden)
    cache = cache_of()
    batch = read(cache, (2, 0), (2, 1))
    assert batch.objects == 0 and len(batch) == 2
    losses = objective_for(detector)(head, batch, 1.0)
    sum(losses.values()).backward()
    assert sum(losses.values()) == 0 and all(
        p.grad is None or not p.grad.any() for p in head.parameters()
    )
    part = read(cache, (0, 0), (2, 0), (1, 0))[1:]
    assert part.indices == [2, 1] and part.objects == len(dataset[1, None]["target"]["boxes"])


def test_objects_without_a_mask_are_left_out(detector, dataset):
    batch = collate([dataset[0, None]])
    batch.targets[0]["has_mask"] = batch.targets[0]["has_mask"].clone()
    batch.targets[0]["has_mask"][0] = False
    frozen = freeze(detector, batch, TABLE, CPU, None)
    assert len(frozen.boxes[0]) == batch.objects - 1 and frozen.objects == batch.objects


def test_poor_matches_teach_nothing(detector, dataset, monkeypatch):
    monkeypatch.setattr("rfdetr.training.frozen.MATCH_IOU", 1.1)
    assert len(freeze(detector, collate([dataset[0, None]]), TABLE, CPU, None).boxes[0]) == 0


def test_where_an_image_cannot_be_read_the_next_one_stands_in(
    detector, dataset, tmp_path, computed
):
    split = copy.deepcopy(dataset.split)
    (tmp_path / "bad.png").write_bytes(b"no image")
    split.images[0].path = tmp_path / "bad.png"
    cache = FeatureCache(
        objective_for(detector), SplitDataset(split, 64, None, True), 2, tmp_path
    ).open(True)
    for _ in range(2):
        batch = read(cache, (0, 1), (1, 1))
        assert_same(batch[:1], batch[1:])
        assert batch.indices == [1, 1] and computed == [1]
        assert list(batch.unread) == [0] and "bad.png" in batch.unread[0]
    read(cache, (1, 0))
    cache.dataset.cache.clear()
    # a file that becomes unreadable in the middle of a run: its kept view needs it no more
    split.images[1].path = tmp_path / "bad.png"
    batch = read(cache, (1, 0), (2, 1))
    assert batch.indices == [1, 2] and computed == [1, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_follows_its_sampler(detector, dataset, cache_of, workers):
    dataset = SplitDataset(dataset.split, 64, None, masks=True)
    dataset.cache = None  # as of a set that memory does not hold
    cache = FeatureCache(objective_for(detector), dataset, 2, Path()).open(False)
    sampler = EpochSampler(3, 2, 0, 3)
    loader = CachedLoader(cache, sampler, workers)
    assert loader.items.num_workers == workers
    for epoch in (4, 5):
        sampler.set_epoch(epoch, start_step=1)
        assert len(loader) == 2
        for batch, keys in zip(loader, sampler, strict=True):
            assert_same(batch, read(cache_of(), *keys))
    assert CachedLoader(cache_of(), sampler, 2).items.num_workers == 0  # memory holds these images


def test_a_view_of_nano_takes_at_most_300_kib(demo):
    split = read_dataset(demo)["train"]
    split = replace(split, images=list(split.images))
    for image in split.images:
        image.segmentations = [[[0, 0, 1, 0, 1, 1]]] * 10
    nano = Detector(SIZES["nano"], TABLE.rows_total, True, groups=1)
    cache = FeatureCache(
        objective_for(nano), SplitDataset(split, 384, None, True), 2, Path("nowhere")
    )
    views_and_picture = 300 * 1024 * 2 + 3 * 384**2 + 3 * 8
    assert cache.bytes <= views_and_picture * len(split.images)
    assert cache.record_bytes(0) == nano.size.hidden * 24 * 24 * 2


# ---------------------------------------------------------------- the folder


def test_a_second_run_computes_nothing(cache_of, computed, capsys):
    first = cache_of(on_disk=True)
    batch = read(first, *ALL)
    assert len(computed) == 6
    first.close(keep=True)
    assert f"{first.path.parent}, 6 of 6 views" in capsys.readouterr().out
    second = cache_of(on_disk=True)
    assert choose_cache("disk", second, False).why.startswith(
        f"on disk, as asked, {first.path.parent}, 6 of 6 views there"
    )
    assert_same(batch, read(second, *ALL))
    assert len(computed) == 6
    second.close(keep=False)
    assert not second.path.parent.exists() and "kept" not in capsys.readouterr().out


def test_what_was_computed_before_a_kill_is_kept(cache_of, computed, monkeypatch):
    whole = read(cache_of(), *ALL)
    del computed[:]
    cache, write = cache_of(on_disk=True), RecordFile._write
    read(cache, (1, 0))

    def killed(self, place, data):
        """The process ends in the middle of a record."""
        write(self, place, data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RecordFile, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            read(cache, (0, 1))
    resumed = cache_of(on_disk=True)
    assert resumed.saved()[0] == 1
    assert_same(whole, read(resumed, *ALL))
    assert computed == [1, 0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("place", ["record", "table", "sign"])
def test_a_damaged_view_is_computed_again(cache_of, computed, place):
    whole = read(cache := cache_of(on_disk=True), *ALL)
    with open(cache.path, "r+b") as file:
        record = int(cache.records.offsets[3]) + 20
        file.seek({"record": record, "table": 8 * 3 + 6, "sign": 8 * 3 + 7}[place])
        file.write(b"\xff")
    del computed[:]
    assert_same(whole, read(cache_of(on_disk=True), *ALL))
    assert computed == [1]


def test_a_file_of_the_wrong_size_is_made_anew_and_said(cache_of, capsys):
    whole = read(cache := cache_of(on_disk=True), *ALL)
    os.truncate(cache.path, 1000)
    again = cache_of(on_disk=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{cache.path} is damaged (1,000 bytes" in line and "made anew" in line
    assert again.saved()[0] == 0
    assert_same(whole, read(again, *ALL))


def test_the_folder_says_what_it_is(cache_of, dataset):
    key = json.loads(cache_of(on_disk=True).path.with_name("key.json").read_text(encoding="utf-8"))
    assert "may be deleted" in key["what"] and (key["resolution"], key["views"]) == (64, 2)


def fill(parent: Path, detector: Detector, dataset: SplitDataset, keys: list, barrier) -> None:
    """Another process's share of a cache, with everybody beginning at once."""
    torch.set_num_threads(1)
    frozen.MATCH_IOU = -1.0
    barrier.wait()
    cache = FeatureCache(objective_for(detector), dataset, 2, parent).open(True)
    for key in keys:
        barrier.wait()
        read(cache, key)


def test_two_processes_fill_one_folder_at_once_and_one_killed_spoils_nothing(
    detector, dataset, cache_of, tmp_path, computed
):
    # a fork has torch imported already; where there is none, each process imports it itself
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    parent = tmp_path / "feature_cache"
    barrier, alone = context.Barrier(2), context.Barrier(1)
    both = [
        context.Process(target=fill, args=(parent, detector, dataset, ALL[:4], barrier))
        for _ in range(2)
    ]
    endless = context.Process(target=fill, args=(parent, detector, dataset, ALL * 1000, alone))
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert len(list(parent.iterdir())) == 1
    assert (cache := cache_of(on_disk=True)).saved()[0] == 4
    endless.start()
    while cache.saved()[0] < 5:  # the first of its own
        assert endless.is_alive()
        time.sleep(0.001)
    endless.kill()
    endless.join()
    filled = read(cache_of(on_disk=True), *ALL)
    assert len(computed) <= 1
    assert_same(filled, read(cache_of(), *ALL))


def test_one_run_takes_what_another_has_computed_meanwhile(cache_of, computed):
    one, other = cache_of(on_disk=True), cache_of(on_disk=True)
    batch = read(one, (0, 0))
    assert_same(batch, read(other, (0, 0)))
    assert computed == [0]


def test_the_key_follows_everything_that_the_views_depend_on(detector, demo, tmp_path, monkeypatch):
    shutil.copytree(demo, tmp_path / "data")
    annotations = tmp_path / "data/train/_annotations.coco.json"

    def key(model=detector, views=2, resolution=64, table=TABLE, precision=CPU, drop=0) -> str:
        split = read_dataset(tmp_path / "data")["train"]
        split = replace(split, images=split.images[: len(split.images) - drop])
        objective = MaskObjective(model, table, LossWeights(), precision, (), 0, Progress())
        return FeatureCache(
            objective, SplitDataset(split, resolution, None, True), views, Path()
        ).path.parent.name

    other = copy.deepcopy(detector)
    other.class_embed[0].bias.data += 1e-3
    first = key()
    keys = [first, key(other), key(views=1), key(resolution=96), key(drop=1)]
    keys.append(key(table=assign_rows(["a", "b", "c"], [3, 2, 1], "coco91")))
    keys.append(key(precision=Precision(torch.device("cpu"), torch.bfloat16)))
    for name in ("FORMAT", "GRID", "ENLARGE", "MATCH_IOU"):
        with monkeypatch.context() as patched:
            patched.setattr(frozen if name == "MATCH_IOU" else feature_key, name, 7)
            keys.append(key())
    image = next(annotations.parent.glob("*.png"), None) or next(annotations.parent.glob("*.jpg"))
    os.utime(image, ns=(1, 1))
    keys.append(key())
    pixels = bytearray(image.read_bytes())
    pixels[len(pixels) // 2] ^= 1  # other pixels, of the same size and with the time restored
    image.write_bytes(pixels)
    os.utime(image, ns=(1, 1))
    keys.append(key())
    content = json.loads(annotations.read_text(encoding="utf-8"))
    content["annotations"][0]["segmentation"][0][0] += 0.25
    annotations.write_text(json.dumps(content), encoding="utf-8")
    keys.append(key())
    assert len(set(keys)) == len(keys) and key() == keys[-1]
    # other objects, drawn from the same detector, change nothing
    assert key(copy.deepcopy(detector)) == keys[-1]


def test_a_large_file_is_told_by_blocks_from_all_of_it(tmp_path):
    file, size = tmp_path / "large.bmp", 10 * feature_key.SAMPLES * feature_key.BLOCK
    file.write_bytes(bytes(size))
    samples = {feature_key.sample_of_file(file)}
    for place in (0, size - 1):
        with open(file, "r+b") as content:
            content.seek(place)
            content.write(b"x")
        samples.add(feature_key.sample_of_file(file))
    assert len(samples) == 3
    assert feature_key.sample_of_file(tmp_path / "missing.bmp") == b""


# ---------------------------------------------------------------- where it goes


@pytest.mark.parametrize(
    "mode, ram_mb, disk_mb, expected",
    [
        ("ram", 0.001, 1e6, "ram"),  # what was asked for is done
        ("disk", 1e6, 1e3, "disk"),
        ("off", 1e6, 1e6, "off"),
        ("auto", 1e6, 1e6, "disk"),
        ("auto", 1e6, 0.1, "ram"),
        ("auto", 0.01, 0.01, "off"),
    ],
)
def test_where_the_cache_goes(mode, ram_mb, disk_mb, expected, monkeypatch, cache_of):
    monkeypatch.setattr(feature_room, "free_memory_mb", lambda: ram_mb)
    monkeypatch.setattr(
        feature_room, "free_disk", lambda folder: disk_mb * 1e6 + feature_room.SPARE_DISK
    )
    choice = choose_cache(mode, cache_of(), multi_scale=False)
    assert choice.where == expected
    assert ("as asked" in choice.why) == (mode != "auto") and ("MB free" in choice.why) == (
        disk_mb <= 0.1
    )


def test_a_full_folder_is_used_whatever_the_disk_has_free(cache_of, monkeypatch):
    monkeypatch.setattr(feature_room, "free_disk", lambda folder: 0)
    cache = cache_of(on_disk=True)
    with pytest.raises(UserError, match="--cache ram or --cache off"):
        choose_cache("disk", cache, multi_scale=False)
    read(cache, *ALL)
    monkeypatch.setattr(feature_room, "free_disk", lambda folder: feature_room.SPARE_DISK + 1)
    assert choose_cache("auto", cache, multi_scale=False).where == "disk"


@pytest.mark.parametrize(
    ("size", "words"),
    [(1, "0.1 MB"), (1_053_756, "1.1 MB"), (10_000_001, "11 MB"), (4e9, "4,000 MB")],
)
def test_bytes_are_rounded_up(size, words):
    assert feature_room.in_mb(size) == words


def test_what_fits_is_kept_and_the_rest_said_and_computed(cache_of, monkeypatch, computed, capsys):
    cache = cache_of()
    two_images = cache.offset_of(2) - cache.offset_of(0)
    disk = 2 * two_images + feature_room.SPARE_DISK + 2
    monkeypatch.setattr(feature_room, "free_disk", lambda folder: disk)
    monkeypatch.setattr(feature_room, "free_memory_mb", lambda: 0.001)
    monkeypatch.setattr(FeatureCache, "seconds_a_view", lambda cache: 3600.0)
    choice = choose_cache("auto", cache, multi_scale=False)
    assert (choice.where, choice.images) == ("disk", 2)
    most = feature_room.in_mb(two_images)
    assert "in part" in choice.why and f"2 of 3 images, at most {most}" in choice.why
    assert "about 1:00:00 (h:mm:ss) an epoch" in choice.why
    part = FeatureCache(cache.objective, cache.dataset, 2, cache.path.parent.parent)
    part.open(True, choice.images)
    whole = read(cache, *ALL)
    del computed[:]
    assert_same(read(part, *ALL), whole)
    assert_same(read(part, *ALL), whole)
    assert computed == [0, 0, 1, 1, 2, 2, 2, 2]
    assert part.saved()[0] == 4 and part.saved()[1] <= two_images


def test_the_detector_is_timed_for_what_is_said(cache_of, computed):
    assert cache_of().seconds_a_view() > 0
    assert len(computed) == 2


def test_kept_views_decode_no_image(cache_of, dataset, monkeypatch):
    for on_disk in (False, True):
        cache = cache_of(on_disk=on_disk)
        whole = read(cache, *ALL)
        with monkeypatch.context() as patched:
            patched.setattr(SplitDataset, "image", None)
            patched.setattr(SplitDataset, "__getitem__", None)
            assert_same(read(cache, *ALL), whole)


@pytest.mark.parametrize("place", ["picture", "state"])
def test_a_damaged_picture_is_read_again(cache_of, computed, place):
    cache = cache_of(on_disk=True)
    whole = read(cache, *ALL)
    number = cache.number(1, cache.views)
    with open(cache.path, "r+b") as file:
        file.seek({"picture": int(cache.records.offsets[number]) + 9, "state": 8 * number}[place])
        file.write(b"\xff\xfe")
    del computed[:]
    again = cache_of(on_disk=True)
    assert_same(read(again, *ALL), whole)
    assert_same(read(again, *ALL), whole)
    assert computed == []


def test_the_size_that_is_said_has_the_pictures_in_it(cache_of):
    cache = cache_of(on_disk=True)
    before = cache.saved()[2]
    read(cache, *ALL)
    _, size, missing = cache.saved()
    assert size >= 3 * 3 * 64**2 and missing == 0
    assert size <= before < cache.bytes


def test_a_cache_of_an_earlier_form_is_named_and_left(cache_of, capsys):
    old = cache_of(on_disk=True)
    key = json.loads(old.path.with_name("key.json").read_text(encoding="utf-8")) | {"format": 1}
    folder = old.path.parent.with_name("0123")
    folder.mkdir()
    (folder / "key.json").write_text(json.dumps(key), encoding="utf-8")
    (folder / "views.bin").write_bytes(b"views")
    capsys.readouterr()
    cache_of(on_disk=True)
    said = capsys.readouterr().out
    assert said.count(f"{folder} has an earlier form (1, now 3") == 1
    assert (folder / "views.bin").read_bytes() == b"views"


def test_one_cache_cannot_hold_many_scales(cache_of):
    assert choose_cache("auto", cache_of(), multi_scale=True).where == "off"
    assert choose_cache("off", cache_of(), multi_scale=True).where == "off"
    with pytest.raises(UserError, match="--multi_scale 0"):
        choose_cache("ram", cache_of(), multi_scale=True)


@pytest.fixture
def file_limit():
    """file_limit(bytes): no file of this process may grow beyond."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_cannot_hold_it_is_a_user_error_and_takes_no_space(
    cache_of, file_limit, tmp_path
):
    file_limit(1000)
    with pytest.raises(UserError, match="feature_cache.*--cache ram or --cache off"):
        cache_of(on_disk=True)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) == 0
    file_limit(10**6)
    assert cache_of(on_disk=True).saved()[0] == 0


def test_a_disk_that_fills_up_ends_no_run(cache_of, file_limit, computed, capsys):
    whole = read(cache_of(), *ALL)
    cache = cache_of(on_disk=True)
    file_limit(int(cache.records.offsets[3]) + 100)  # in the middle of the third view
    del computed[:]
    assert_same(whole, read(cache, *ALL))
    assert_same(whole, read(cache, *ALL))
    assert computed == [0, 0, 1, 1, 2, 2, 1, 1, 2, 2]
    assert capsys.readouterr().out.count("takes no more") == 1


# ---------------------------------------------------------------- the script


def config_of(folder: str) -> dict:
    return json.loads(Path(folder, "stage2_config.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_runs_share_a_folder_until_one_removes_it(few, shrunk, call, capsys, computed):
    flags = [*quick_flags(few), "--checkpoint", shrunk.folder, "--min_steps", 8, "--cache_views", 4]
    call(train_seg_stage2.main, *flags)
    drawn = len(computed)
    (folder,) = Path("runs/feature_cache").iterdir()
    first = capsys.readouterr().out
    assert f"Feature cache: on disk, {folder}, 0 of 16 views there" in first
    assert (
        4 < drawn <= 16
        and f"Feature cache kept for later runs: {folder}, {drawn} of 16 views" in first
    )
    call(train_seg_stage2.main, *flags, "--keep_cache", 0)
    assert len(computed) == drawn and f"{drawn} of 16 views there" in capsys.readouterr().out
    assert config_of("runs/segmentation_tiny_32_1")["cache"] == "disk" and not folder.exists()
    one, two = (torch.load(f"runs/segmentation_tiny_32_{n}/last.pt")["model"] for n in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disk", "ram", "off"])
def test_a_stopped_run_goes_on_bit_for_bit(mode, few, shrunk, call, monkeypatch, computed):
    flags = [
        *quick_flags(few),
        "--checkpoint",
        shrunk.folder,
        "--epochs",
        2,
        "--min_steps",
        3,
        "--cache",
        mode,
    ]
    call(train_seg_stage2.main, *flags, "--output_dir", "a/whole")
    drawn = len(computed)
    with monkeypatch.context() as patched:
        signal_at_step(patched, 4, signal.SIGINT)
        with pytest.raises(Stopped):
            call(train_seg_stage2.main, *flags, "--output_dir", "b/stopped")
    call(train_seg_stage2.main, "--resume", "b/stopped")
    assert_same_run(Path("b/stopped"), Path("a/whole"))
    assert (len(computed) == 2 * drawn) == (
        mode != "ram"
    )  # what lay in memory alone was computed again
    config = config_of("b/stopped")
    assert config["detector_sha256"] == config_of("a/whole")["detector_sha256"]
    call(train_seg_stage2.main, "--resume", "b/stopped", "--epochs", 3)
    assert config_of("b/stopped") == config | {"epochs": 3}


@pytest.mark.slow
def test_validation_is_kept_between_epochs_where_memory_holds_it(few, shrunk, call, monkeypatch):
    kept = []
    fit = train_seg_stage2.fit

    def noted(session, trainer, loader, evaluator, pack):
        fit(session, trainer, loader, evaluator, pack)
        kept.append(evaluator._kept_detections is not None)

    monkeypatch.setattr(train_seg_stage2, "fit", noted)
    for ram in (1e6, 0.1):
        monkeypatch.setattr(feature_room, "free_memory_mb", lambda ram=ram: ram)
        call(train_seg_stage2.main, *quick_flags(few), "--checkpoint", shrunk.folder)
    assert kept == [True, False]


@pytest.mark.slow
def test_a_detector_that_finds_nothing_ends_stage_2_after_its_first_epoch(
    few, call, monkeypatch, capsys
):
    call(
        train_detector_stage1.main,
        *quick_flags(few),
        "--head",
        "dataset",
        "--output_dir",
        "detector",
    )
    flags = [*quick_flags(few), "--checkpoint", "detector/best.pt", "--epochs", 3, "--cache", "off"]
    monkeypatch.setattr("rfdetr.training.frozen.MATCH_IOU", 1.1)
    with pytest.raises(
        UserError, match="finds none of its [1-9].* objects.*stage 1 longer.*--checkpoint"
    ):
        call(train_seg_stage2.main, *flags, "--output_dir", "nothing")
    batches = []

    def in_the_first_epoch(model, batch, *rest):
        batches.append(1)
        monkeypatch.setattr("rfdetr.training.frozen.MATCH_IOU", -1.0 if len(batches) <= 2 else 1.1)
        return freeze(model, batch, *rest)

    monkeypatch.setattr(frozen, "freeze", in_the_first_epoch)
    call(train_seg_stage2.main, *flags, "--output_dir", "later")
    epochs = json.loads(Path("later/metrics.json").read_text(encoding="utf-8"))["epochs"]
    assert [epoch["train"]["matched_objects"] > 0 for epoch in epochs] == [True, False, False]
    assert epochs[0]["train"]["objects"] == epochs[0]["train"]["matched_objects"]
    assert capsys.readouterr().out.count("taught the mask head nothing") == 1


def test_a_record_that_another_run_writes_anew_is_read_anew(tmp_path):
    one = RecordFile(tmp_path / "records", [100, 100])
    other = RecordFile(tmp_path / "records", [100, 100])
    one.open()
    other.open()
    one.keep(0, b"x" * 90)
    assert other.load(0) == one.load(0) == b"x" * 90
    other.keep(0, b"y" * 40)
    assert one.load(0) == b"y" * 40
    # the other run is in the midst of writing: its record began to be there, its state is zero
    other._write(0, bytes(8))
    other._write(int(other.offsets[0]), b"z" * 20)
    assert one.load(0) is None
    other.keep(0, b"z" * 60)
    assert one.load(0) == b"z" * 60
