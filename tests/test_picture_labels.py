"""Names in pictures can be read, and stand at their objects."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as mask_api

from rfdetr.data.coco import read_dataset
from rfdetr.data.rle import outermost_pixels
from rfdetr.inference import fonts
from rfdetr.inference.class_sheet import class_sheet
from rfdetr.inference.fonts import font_for
from rfdetr.inference.picture_labels import place_labels
from rfdetr.inference.visualise import DrawnObject
from testkit.datasets import coco, write

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def is_box(font, letter: str) -> bool:
    """Whether a font draws what it draws for letters that it lacks."""
    return bytes(font.getmask(letter)) == bytes(font.getmask("\U0010fffd"))


@pytest.mark.parametrize(
    "name, plain",
    [
        ("Größe", "Grosse"),
        ("naïve", "naive"),
        ("Łódź 2 µm²", "Lodz 2 um2"),
        ("血 cell", "? cell"),
        ("cells", "cells"),
    ],
)
def test_no_letter_is_an_empty_box(name, plain, monkeypatch):
    font, text = font_for(name, 20)
    assert not any(is_box(font, letter) for letter in text)
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ("no_such_font.ttf",))
    font, text = font_for(name, 20)
    assert text == plain
    assert not any(is_box(font, letter) for letter in text)


@given(arrays(bool, st.tuples(st.integers(1, 7), st.integers(1, 7))))
def test_the_outermost_pixels_are_those_of_the_mask(mask):
    if not mask.any():
        return
    rows, columns = np.nonzero(mask)
    rle = mask_api.encode(np.asfortranarray(mask, np.uint8))
    highest, lowest, rightmost = outermost_pixels(rle)
    assert highest == (columns[rows == rows.min()].min(), rows.min())
    assert lowest == (columns[rows == rows.max()].min(), rows.max())
    assert rightmost == (columns.max(), rows[columns == columns.max()].max())


def drawn(mask: np.ndarray) -> DrawnObject:
    rle = mask_api.encode(np.asfortranarray(mask, np.uint8))
    x, y, width, height = mask_api.toBbox(rle)
    box = np.array([x, y, x + width, y + height])
    return DrawnObject(box, "vessel", None, rle, (0, 158, 255))


@pytest.mark.parametrize("scale", [1, 2])
def test_a_label_touches_its_mask(scale):
    """A diagonal one, of whose box the corners are empty."""
    mask = np.zeros((400, 400), bool)
    for i in range(100, 300):
        mask[400 - i : 412 - i, i : i + 12] = True
    one = drawn(mask)
    one.box *= scale
    (label,) = place_labels([one], (400 * scale, 400 * scale), scale)
    x1, y1, x2, y2 = np.array(label.rectangle) / scale
    rows, columns = np.nonzero(mask)
    near = (columns >= x1 - 1) & (columns <= x2 + 1) & (rows >= y1 - 1) & (rows <= y2 + 1)
    assert near.any()


def test_a_box_that_begins_above_the_picture_has_its_label_inside():
    box = np.array([100, -80, 300, 250])
    one = DrawnObject(box, "RBC", None, None, (0, 158, 255))
    (label,) = place_labels([one], (400, 400), 1)
    assert label.rectangle[:2] == (100, 0)


def test_a_preview_shows_no_box_for_a_mask_that_lies_elsewhere(tmp_path):
    """The corner of the vessel's box reaches into the cell's example, its mask does not."""
    content = coco(1)
    content["images"][0] |= {"width": 400, "height": 400}
    square = [100, 100, 124, 100, 124, 124, 100, 124]
    triangle = [150, 390, 390, 390, 390, 150]
    for one, outline, box in zip(
        content["annotations"], (square, triangle), ([100, 100, 24, 24], [150, 150, 240, 240])
    ):
        one |= {"segmentation": [outline], "bbox": box}
    write(tmp_path / "data/train", content, (400, 400))
    write(tmp_path / "data/valid", coco(1))
    split = read_dataset(tmp_path / "data")["train"]
    example = np.array(class_sheet(split))[35:350, 5:350]
    assert (example[..., 0] > 200).any()  # the cell is orange
    assert (example[..., 2] < 50).all()  # nothing is blue, as the vessel is


def squares(side: int, count: int, distance: int) -> list[DrawnObject]:
    """Objects with a box of `side` pixels, in rows of ten, and names of two classes in turn."""
    objects = []
    for i in range(count):
        x = distance * (i % 10 + 1)
        y = distance * (i // 10 + 1)
        box = np.array([x, y, x + side, y + side], float)
        objects.append(DrawnObject(box, ("cell", "vessel")[i % 2], 0.9, None, (0, 158, 255)))
    return objects


@pytest.mark.parametrize("side, count, most", [(20, 50, 14), (40, 50, 27), (400, 2, 93)])
def test_labels_in_a_large_picture_are_lower_than_their_objects(side, count, most):
    labels = place_labels(squares(side, count, 3 * side), (3000, 3000), 1)
    heights = [label.rectangle[3] - label.rectangle[1] for label in labels]
    assert len(labels) == count and 0.6 * most < max(heights) <= most


@pytest.mark.parametrize(
    "side, texts", [(24, []), (32, []), (64, ["0.90"]), (128, ["cells  0.90"])]
)
def test_tiny_pictures_are_not_hidden_by_a_label(side, texts):
    box = np.array([0.6, 0.6, 0.95, 0.95]) * side
    one = DrawnObject(box, "cells", 0.9, None, (255, 176, 0))
    assert [label.text for label in place_labels([one], (side, side), 1)] == texts


def test_many_objects_lower_than_any_label_keep_one_of_each_class():
    labels = place_labels(squares(8, 50, 60), (3000, 3000), 1)
    assert [label.text for label in labels] == ["cell  0.90", "vessel  0.90"]
    assert len(place_labels(squares(8, 5, 60), (3000, 3000), 1)) == 5


def test_name_and_score_are_apart_in_small_letters():
    (label,) = place_labels(squares(40, 1, 60), (192, 192), 1)
    assert label.font.getlength(label.text, "L") - label.font.getlength("cell0.90", "L") >= 4


def test_a_class_is_named_where_there_is_room_if_not_at_its_best_object():
    corners = [(100, 100), (130, 80), (124, 101), (130, 120), (300, 300)]
    boxes = [np.array([x, y, x + 20, y + 20], float) for x, y in corners]
    objects = [
        DrawnObject(box, "cell", 0.9 - i / 10, None, (0, 158, 255)) for i, box in enumerate(boxes)
    ]
    texts = [label.text for label in place_labels(objects, (400, 400), 1)]
    assert texts[0] == "0.90"
    assert len([text for text in texts if text.startswith("cell")]) == 1
