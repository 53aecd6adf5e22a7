"""Pictures have the promised sizes, and colour where the objects are."""

from __future__ import annotations

import time

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from rfdetr.evaluation import Found
from rfdetr.visualise import MIN_SIDE, class_colours, draw, side_by_side

# pycocotools.mask.decode under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def encode(bitmap):
    rle = mask_api.encode(np.asfortranarray(bitmap, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def disc(height, width, x, y, radius):
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


@pytest.mark.parametrize("shape", [(1000, 700), (100, 60), (60, 100), (1, 1), (1, 700), (2100, 3)])
def test_small_pictures_are_enlarged_and_big_ones_keep_their_size(shape):
    height, width = shape
    image = np.zeros((height, width, 3), dtype=np.uint8)
    boxes, masks = [[0, 0, width, height], [-5, -5, 2, 2]], [encode(np.ones(shape)), encode(np.zeros(shape))]
    picture = draw(image, boxes, ["a", "b"], [0.9, 0.8], masks)
    scale = max(1, MIN_SIDE / max(shape))
    assert picture.size == (max(1, round(width * scale)), max(1, round(height * scale))) and picture.mode == "RGB"
    assert np.array(picture).any()


@pytest.mark.parametrize("side", [64, 600, 1700])
def test_colour_is_where_the_mask_is(side):
    image = np.full((side, side, 3), 100, dtype=np.uint8)
    bitmap = disc(side, side, side * 0.6, side * 0.6, side * 0.25)
    box = np.array([[side * 0.35, side * 0.35, side * 0.85, side * 0.85]])
    picture = draw(image, box, ["cell"], [0.93], [encode(bitmap)], {"cell": (255, 0, 0)})
    pixels = np.array(picture.resize((600, 600))).astype(int)
    red, green = pixels[..., 0], pixels[..., 1]
    inside, outside = disc(600, 600, 360, 360, 140), ~disc(600, 600, 360, 360, 160)
    assert (red[inside] > 140).all() and (green[inside] < 80).all()
    border = disc(600, 600, 360, 360, 160) & ~inside
    assert np.percentile(green[border], 10) < 40 < green[inside].min()  # an opaque contour round a translucent mask
    assert (image[0, 0] == 100).all()
    # beyond the mask: only the box and the label above it
    outside[200:520, 200:520] = False
    outside[:215, 200:] = False
    assert (abs(pixels[outside] - 100) <= 2).all()


def test_masks_boxes_and_labels_are_each_optional():
    image = np.full((600, 600, 3), 50, dtype=np.uint8)
    assert (np.array(draw(image, np.zeros((0, 4)), [])) == image).all()
    assert (np.array(draw(image, np.zeros((0, 4)), [], [], [])) == image).all()
    assert draw(image, [[1, 1, 99, 99]], ["a"], None, [None]) == draw(
        image, [[1, 1, 99, 99]], ["a"], None, [encode(np.zeros((600, 600)))]
    )
    changed = (np.array(draw(image, [[100, 200, 300, 400]], ["cell"])) != image).any(axis=2)
    assert changed[198:203, 150:290].any(axis=0).all()  # the box's upper side
    assert not changed[220:380, 120:280].any() and changed[170:198, 100:130].any()  # the label is above it


def test_small_objects_survive_and_labels_do_not_hide_them():
    image = np.zeros((256, 256, 3), dtype=np.uint8)
    boxes, masks = [], []
    for y in range(10, 250, 24):
        for x in range(10, 250, 24):
            boxes.append([x, y, x + 3, y + 3])
            bitmap = np.zeros((256, 256))
            bitmap[y : y + 3, x : x + 3] = 1
            masks.append(encode(bitmap))
    for scores in (None, list(np.linspace(1, 0.1, 100))):
        pixels = np.array(draw(image, boxes, ["nucleus"] * 100, scores, masks, {"nucleus": (0, 255, 0)}))
        centres = pixels[[int(2 * (y + 1.5)) for _, y, _, _ in boxes], [int(2 * (x + 1.5)) for x, _, _, _ in boxes]]
        assert ((centres[:, 1] > 60) & (centres[:, 0] == 0)).all()


def test_a_hundred_masks_are_quick():
    rng = np.random.default_rng(0)
    image = np.zeros((1024, 1024, 3), dtype=np.uint8)
    centres = rng.integers(60, 960, (100, 2))
    masks = [encode(disc(1024, 1024, x, y, 50)) for x, y in centres]
    boxes = np.concatenate([centres - 50, centres + 50], axis=1)
    start = time.perf_counter()
    draw(image, boxes, ["a"] * 100, [0.5] * 100, masks)
    assert time.perf_counter() - start < 5  # 0.6 s on an idle core


def test_class_colours_are_distinct_stable_and_follow_the_index():
    names = [f"class {i}" for i in range(91)]
    colours = class_colours(names)
    assert len(set(colours.values())) == 91
    assert all(0 <= value <= 255 and isinstance(value, int) for colour in colours.values() for value in colour)
    assert class_colours(names[:5]) == {name: colours[name] for name in names[:5]}


def test_side_by_side_has_both_pictures_under_titles():
    left, right = Image.new("RGB", (300, 200), (255, 0, 0)), Image.new("RGB", (80, 100), (0, 255, 0))
    sheet = side_by_side(left, right, ("ground truth", "prediction"))
    pixels = np.array(sheet)
    top = sheet.height - 200
    assert top > 10 and (pixels[top:, :300] == (255, 0, 0)).all()
    assert (pixels[top:, -160:] == (0, 255, 0)).all() and sheet.width > 460
    assert (pixels[:top, :300] > 200).any() and (pixels[:top, -160:] > 200).any()


def test_duplicates_are_left_out_by_class_and_the_better_stays():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [20, 20, 30, 30]], dtype=np.float32)
    scores, labels = np.array([0.5, 0.9, 0.3, 0.7]), np.array([0, 0, 1, 0])
    found = Found(np.zeros((40, 40, 3), np.uint8), boxes, scores, labels, list("abcd"), None)
    kept = found.without_duplicates()
    assert kept.names == ["b", "d", "c"] and kept.scores.tolist() == [0.9, 0.7, 0.3]
    assert (kept.boxes == boxes[[1, 3, 2]]).all() and kept.labels.tolist() == [0, 0, 1]
    assert len(found.without_duplicates(iou=0.95).names) == 4
    nothing = Found(found.image, np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), [], [])
    assert nothing.without_duplicates().names == nothing.without_duplicates().masks == []
