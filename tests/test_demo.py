"""The demo generator: same bytes for the same seed, and annotations that mean what COCO means."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image

from rfdetr.console import UserError, run_script
from rfdetr.data import demo, demo_drawing

SIZE = 192


def annotations(folder: Path) -> dict:
    return json.loads((folder / "_annotations.coco.json").read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def rle(annotation: dict, size: int = SIZE) -> dict:
    return pycocotools.mask.merge(
        pycocotools.mask.frPyObjects(annotation["segmentation"], size, size)
    )


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    demo.make_demo(out, train=75, valid=0)
    return out / "train"


def test_same_seed_same_bytes_and_other_seed_other_images(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        demo.make_demo(tmp_path / name, train=3, valid=2, test=1, size=96, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a)
    pictures = [data for name, data in a.items() if name.endswith(".png")]
    assert len(pictures) == len(set(pictures)) == 6, "the splits share no image"


def test_first_images_do_not_depend_on_the_counts(tmp_path):
    demo.make_demo(tmp_path / "few", train=3, valid=1, size=96)
    demo.make_demo(tmp_path / "more", train=7, valid=2, size=96)
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    assert all(more[name] == data for name, data in few.items() if name.endswith(".png"))
    for split in ("train", "valid"):
        short, long = annotations(tmp_path / "few" / split), annotations(tmp_path / "more" / split)
        assert long["images"][: len(short["images"])] == short["images"]
        assert long["annotations"][: len(short["annotations"])] == short["annotations"]


def test_layout_counts_and_categories(tmp_path):
    demo.make_demo(tmp_path, train=8, valid=4, size=96)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "valid"]
    for split, count in (("train", 8), ("valid", 4)):
        table = annotations(tmp_path / split)
        assert [(c["id"], c["name"]) for c in table["categories"]] == [
            (1, "cells"),
            (2, "blood_vessel"),
            (3, "glomerulus"),
        ]
        assert len(table["images"]) == len({image["id"] for image in table["images"]}) == count
        assert {image["file_name"] for image in table["images"]} == {
            p.name for p in (tmp_path / split).glob("*.png")
        }
        for image in table["images"]:
            with Image.open(tmp_path / split / image["file_name"]) as picture:
                assert picture.mode == "RGB" and picture.size == (
                    image["width"],
                    image["height"],
                ) == (96, 96)
        assert [a["id"] for a in table["annotations"]] == list(
            range(1, len(table["annotations"]) + 1)
        )


def test_objects_an_image_empty_images_and_classes(train):
    table = annotations(train)
    found = Counter(a["image_id"] for a in table["annotations"])
    assert 6 <= len(table["annotations"]) / len(table["images"]) <= 10
    assert len(table["images"]) - len(found) == 3, "4 % of 75"
    classes = Counter(a["category_id"] for a in table["annotations"])
    assert set(classes) == {1, 2, 3} and min(classes.values()) > 30


def test_polygons_boxes_and_areas_agree(train):
    pixels, areas = [], []
    for a in annotations(train)["annotations"]:
        (flat,) = a["segmentation"]
        points = np.array(flat).reshape(-1, 2)
        assert len(points) >= 3 and points.min() >= 0 and points.max() <= SIZE
        x, y, width, height = a["bbox"]
        assert [x, y] == pytest.approx(points.min(axis=0))
        assert [x + width, y + height] == pytest.approx(points.max(axis=0))
        assert a["iscrowd"] == 0 and min(width, height) > 8
        pixels.append(float(pycocotools.mask.area(rle(a))))
        areas.append(a["area"])
        # 2 %; a small cell is nearly all outline, which rounding may move by 0.2 pixels
        outline = np.hypot(*(points - np.roll(points, 1, axis=0)).T).sum()
        assert abs(pixels[-1] - a["area"]) <= max(0.02 * a["area"], 0.2 * outline)
    assert sum(pixels) == pytest.approx(sum(areas), rel=0.002)
    assert np.median(np.abs(np.divide(pixels, areas) - 1)) < 0.01


def test_no_object_hides_more_than_the_limit_of_another(train):
    by_image: dict[int, list[dict]] = {}
    for a in annotations(train)["annotations"]:
        by_image.setdefault(a["image_id"], []).append(rle(a))
    shares = []
    for masks in by_image.values():
        for one, other in combinations(masks, 2):
            shared = pycocotools.mask.area(pycocotools.mask.merge([one, other], intersect=True))
            shares.append(shared / min(pycocotools.mask.area(one), pycocotools.mask.area(other)))
    assert max(shares) <= demo_drawing.MAX_OVERLAP + 0.02, "0.02: outlines rasterised another way"
    assert max(shares) > 0.1, "some objects do overlap"


def test_outlines_lie_on_what_was_painted(train):
    """Cells are darker than the ring around them: polygons and pixels share one frame."""
    table = annotations(train)
    names = {image["id"]: image["file_name"] for image in table["images"]}
    contrasts = []
    for a in [a for a in table["annotations"] if a["category_id"] == 1][:60]:
        grey = np.asarray(Image.open(train / names[a["image_id"]]).convert("L"), float)
        inside = pycocotools.mask.decode(rle(a)).astype(bool)
        points = np.array(a["segmentation"][0]).reshape(-1, 2)
        centre = points.mean(axis=0)
        larger = np.clip(centre + (points - centre) * 1.3, 0, SIZE)
        ring = (
            pycocotools.mask.decode(rle({"segmentation": [larger.ravel().tolist()]})).astype(bool)
            & ~inside
        )
        contrasts.append(grey[ring].mean() - grey[inside].mean())
    assert np.median(contrasts) > 40 and np.mean(np.array(contrasts) > 15) > 0.95


def test_replaces_an_earlier_demo_and_refuses_anything_else(tmp_path):
    out = tmp_path / "demo"
    demo.make_demo(out, train=3, valid=1, test=1, size=96)
    (out / "train" / "_annotations.coco.json").unlink()  # as when the first attempt was interrupted
    demo.make_demo(out, train=2, valid=1, size=96)
    assert sorted(contents(out)) == sorted(
        f"{split}/{name}"
        for split, count in (("train", 2), ("valid", 1))
        for name in ["_annotations.coco.json", *(f"demo_{i:05d}.png" for i in range(count))]
    )
    assert not (out / "test").exists()
    before = contents(out)
    for name in (
        "train/holiday.png",
        "notes.txt",
        "test/_annotations.coco.json",
        "old/train/demo_00000.png",
    ):
        stranger = out / name
        stranger.parent.mkdir(parents=True, exist_ok=True)
        stranger.write_text('{"images": []}')
        with pytest.raises(UserError, match="in the way"):
            demo.make_demo(out, train=1, valid=1, size=96)
        stranger.unlink()
    assert contents(out) == before
    for place in (tmp_path, out / "train" / "demo_00000.png"):  # a demo's parent, a file
        with pytest.raises(UserError, match="another folder"):
            demo.make_demo(place, train=1)
    assert contents(out) == before


def test_command_line(tmp_path, capsys):
    out = tmp_path / "set"
    demo.main([str(out), "--train", "2", "--valid", "1", "--size", "96"])
    said = capsys.readouterr().out
    assert str(out) in said and f"python validate_setup.py --dataset {out}" in said
    (out / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit) as left:
        run_script(demo.main, [str(out)])
    assert left.value.code == 2 and "mine.txt" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("kind", ["thin", "hard"])
def test_sets_to_measure_masks_on(tmp_path, kind):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        demo.main(
            [str(tmp_path / name), "--train", "3", "--valid", "1", "--kind", kind]
            + ["--seed", str(seed)]
        )
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and all(a[name] != c[name] for name in a)
    table = annotations(tmp_path / "a" / "train")
    names = {"thin": ["rod", "blob"], "hard": ["stone", "leaf"]}[kind]
    assert [category["name"] for category in table["categories"]] == names
    assert {entry["category_id"] for entry in table["annotations"]} == {1, 2}
    for entry in table["annotations"]:
        area = float(pycocotools.mask.area(rle(entry)))
        outline = np.reshape(entry["segmentation"], (-1, 2))
        around = np.hypot(*(outline - np.roll(outline, 1, axis=0)).T).sum()
        assert abs(area - entry["area"]) <= 0.25 * around
        if kind == "thin":
            thickness = 2 * area / around  # of a long rod its width, of a disc half of it
            assert 1.5 <= thickness <= 18


def test_a_wrong_flag_is_answered_with_what_it_may_mean(tmp_path):
    for flags, words in (
        (["--kind", "cats"], "--kind: invalid choice: 'cats'.*tissue"),
        (["--trian", "5"], "there is no flag --trian .did you mean --train"),
        (["--size", "5"], "--size: expected a whole number from 64 to 2,048"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            demo.main([str(tmp_path / "set"), *flags])
        assert "all flags: python -m rfdetr.data.demo --help" in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_help_tells_every_default(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m rfdetr.data.demo OUT [--FLAG VALUE ...]")
    told = re.findall(r"[(]default:\s+(\w+)[)]", said)
    assert told == ["200", "50", "0", "192", "0", "tissue"]
