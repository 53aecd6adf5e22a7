"""What training in tiles learns from, counts and keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import validate_setup
from rfdetr.console import UserError
from rfdetr.data.coco import read_dataset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.records import CocoSplit, ImageList
from rfdetr.data.sampling import Pool, make_mix
from rfdetr.data.tiles import in_tiles, objects_in_no_tile, visible_objects
from rfdetr.tiling import Tiling
from rfdetr.training.session import choose_tiles
from testkit.datasets import coco, write


def squares(folder: Path, vessel: list[int]) -> Path:
    """Two images of 100 x 100 pixels with a cell of 90 x 90, one of them with a vessel, too."""
    content = coco(2)
    for image in content["images"]:
        image |= {"width": 100, "height": 100}
    for annotation in content["annotations"]:
        is_cell = annotation["category_id"] == 1
        annotation |= {"bbox": [5, 5, 90, 90] if is_cell else vessel, "segmentation": []}
    for split in ("train", "valid"):
        write(folder / split, content, (100, 100))
    return folder


@pytest.fixture
def large(tmp_path) -> CocoSplit:
    return read_dataset(squares(tmp_path / "large", [5, 5, 80, 80]))["train"]


@pytest.fixture
def mixed(tmp_path) -> CocoSplit:
    return read_dataset(squares(tmp_path / "mixed", [60, 20, 9, 9]))["train"]


@pytest.mark.parametrize("tiling", [Tiling(32), Tiling(48, 0.5), Tiling(32, with_whole=True)])
def test_what_no_tile_shows_is_known_without_looking_at_each_tile(demo, mixed, tiling):
    for split in (read_dataset(demo)["train"], mixed):
        expected = []
        for image in split.images:
            shown = np.zeros(len(image.labels), bool)
            for window in tiling.windows(image.height, image.width):
                shown[visible_objects(image, window)] = True
            expected += (~shown).tolist()
        assert objects_in_no_tile(split.images, tiling).tolist() == expected
    assert expected == [tiling == Tiling(32), False, tiling == Tiling(32)]


def begun(split: CocoSplit, tile: int = 32, tile_full: bool = False) -> SimpleNamespace:
    """What choose_tiles needs of a Session."""
    settings = SimpleNamespace(tile=tile, tile_overlap=0.2, tile_full=tile_full)
    return SimpleNamespace(
        settings=settings, train=split, resumed=None, resolution=64, images_an_epoch=0
    )


def test_objects_too_large_for_the_tiles_are_said_by_class(mixed, capsys):
    choose_tiles(begun(mixed))
    warning = capsys.readouterr().out
    for words in ("2 of 3 objects", "cell 2 of 2;", "up to 90 px", "--tile_full 1", "a larger"):
        assert words in warning
    for enough in ({"tile_full": True}, {"tile": 64}):
        choose_tiles(begun(mixed, **enough))
        assert "no tile of" not in capsys.readouterr().out


def test_tiles_that_show_no_object_at_all_are_an_error(large):
    with pytest.raises(UserError, match="3 of 3 objects .cell 2 of 2, vessel 1 of 1;"):
        choose_tiles(begun(large))


def test_validate_setup_knows_what_tiles_show(mixed, tmp_path, capsys):
    def report(*flags: object) -> dict:
        words = ["--dataset", tmp_path / "mixed", "--device", "cpu", "--resolution", 64]
        words += ["--json", tmp_path / "report.json", *flags]
        validate_setup.main([str(word) for word in words])
        return json.loads((tmp_path / "report.json").read_text())

    sides = [one["splits"]["train"]["median_side_px"] for one in (report(), report("--tile", 32))]
    assert sides == [57.6, 180.0]
    said = capsys.readouterr().out
    assert "[warning] ANN_NO_TILE" in said and "--tile_full 1" in said


def test_an_epoch_of_nothing_is_an_error_and_no_endless_loop(large):
    with pytest.raises(UserError, match="--negatives 0.1: no image or tile of .* shows an object"):
        make_mix(in_tiles(large, Tiling(32)), [], None, 0.1)
    with pytest.raises(ValueError, match="no images"):
        Pool(torch.zeros(0, dtype=torch.long)).draw(1, torch.Generator())


def test_tiles_with_masks_are_those_that_show_an_object_with_one(demo):
    split = read_dataset(demo)["train"]
    few = ImageList(split.images)
    few[0].segmentations[1:] = [None] * (len(few[0].segmentations) - 1)
    split = replace(split, images=few)
    dataset = SplitDataset(split, 64, "strong", True, tiling=Tiling(32))
    expected = []
    for index, tile in enumerate(dataset.split.images):
        if any(mask is not None for mask in tile.segmentations):
            expected.append(index)
    assert dataset.donors == expected
    assert 0 < len(expected) < len(dataset)
    of_first = dataset.positions_with_masks([0])
    tiles_of_first = [i for i, (number, _) in enumerate(dataset.split.images.places) if number == 0]
    assert 0 < len(of_first) < len(tiles_of_first)
    # ... so that a share of tiles without objects is kept
    is_empty = np.array(dataset.split.objects_per_image) == 0
    order = make_mix(dataset.split, of_first, None, 0.0).draw(200, torch.Generator())
    assert not is_empty[order.numpy()].any()
