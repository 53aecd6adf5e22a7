"""Pictures have the promised sizes, and colour where the objects are."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_api

from rfdetr.classes import assign_rows
from rfdetr.data.coco import read_dataset
from rfdetr.data.demo import make_demo
from rfdetr.inference.class_sheet import class_sheet
from rfdetr.inference.originals import Original
from rfdetr.inference.prediction import Prediction
from rfdetr.inference.visualise import (
    MIN_SIDE,
    class_colours,
    draw,
    object_colours,
    picture_colours,
    side_by_side,
)

# pycocotools.mask.decode under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def encode(bitmap):
    rle = mask_api.encode(np.asfortranarray(bitmap, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def disc(height, width, x, y, radius):
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


@pytest.mark.parametrize("min_side", [1, MIN_SIDE])
@pytest.mark.parametrize("shape", [(1000, 700), (100, 60), (60, 100), (1, 1), (1, 700), (2100, 3)])
def test_pictures_keep_their_size_and_small_ones_are_enlarged_on_request(shape, min_side):
    height, width = shape
    image = np.zeros((height, width, 3), dtype=np.uint8)
    boxes, masks = (
        [[0, 0, width, height], [-5, -5, 2, 2]],
        [encode(np.ones(shape)), encode(np.zeros(shape))],
    )
    picture = draw(image, boxes, ["a", "b"], [0.9, 0.8], masks, min_side=min_side)
    scale = max(1, min_side / max(shape))
    assert (
        picture.size == (max(1, round(width * scale)), max(1, round(height * scale)))
        and picture.mode == "RGB"
    )
    assert np.array(picture).any()


@pytest.mark.parametrize("side", [64, 600, 1700])
def test_colour_is_where_the_mask_is(side):
    image = np.full((side, side, 3), 100, dtype=np.uint8)
    bitmap = disc(side, side, side * 0.6, side * 0.6, side * 0.25)
    box = np.array([[side * 0.35, side * 0.35, side * 0.85, side * 0.85]])
    red = {"cell": (255, 0, 0)}
    picture = draw(image, box, ["cell"], [0.93], [encode(bitmap)], red, MIN_SIDE)
    pixels = np.array(picture.resize((600, 600))).astype(int)
    red, green = pixels[..., 0], pixels[..., 1]
    inside, outside = disc(600, 600, 360, 360, 140), ~disc(600, 600, 360, 360, 160)
    assert (red[inside] > 130).all() and (green[inside] < 80).all()
    border = disc(600, 600, 360, 360, 160) & ~inside
    assert (
        np.percentile(green[border], 4) < 40 < green[inside].min()
    )  # an opaque contour round a translucent mask
    assert (image[0, 0] == 100).all()
    outside[:215, 200:] = False  # the label above it
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
    assert (
        not changed[220:380, 120:280].any() and changed[170:198, 100:130].any()
    )  # the label is above it


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
        pixels = np.array(
            draw(image, boxes, ["nucleus"] * 100, scores, masks, {"nucleus": (0, 255, 0)}, 512)
        )
        objects = np.array([pixels[2 * y : 2 * y + 6, 2 * x : 2 * x + 6] for x, y, _, _ in boxes])
        assert (objects[..., 1].max(axis=(1, 2)) > 200).all()
        assert (objects[:, 1:-1, 1:-1, 1] > 30).all() and (objects[:, 2:4, 2:4, 0] == 0).all()


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
    assert all(
        0 <= value <= 255 and isinstance(value, int)
        for colour in colours.values()
        for value in colour
    )
    assert class_colours(names[:5]) == {name: colours[name] for name in names[:5]}


def test_objects_of_a_single_class_have_colours_of_their_own():
    assert picture_colours(["cell"]) is None and len(picture_colours(["a", "b"])) == 2
    corners = np.random.default_rng(0).uniform(0, 900, (100, 2))
    boxes = np.hstack([corners, corners + 20])
    colours = object_colours(boxes)
    assert len(set(colours)) == len(set(colours[:12])) == 12
    distances = np.linalg.norm(corners[:, None] - corners, axis=2) + 1e9 * np.eye(100)
    assert all(colours[i] != colours[nearest] for i, nearest in enumerate(distances.argmin(axis=1)))
    image = np.full((100, 100, 3), 60, np.uint8)
    pixels = np.array(draw(image, [[5, 5, 35, 35], [60, 60, 95, 95]], ["cell"] * 2))
    assert (pixels[20, 5] != pixels[75, 60]).any()


def test_dark_images_stay_readable_under_a_mask():
    """Stripes of 10 and 40 in a dark nucleus: of their contrast most is left."""
    image = np.full((600, 600, 3), 10, np.uint8)
    image[::2] = 40
    mask = encode(disc(600, 600, 300, 300, 200))
    pixels = np.array(draw(image, [[100, 100, 500, 500]], [""], None, [mask])).astype(int)
    inside = pixels[200:400, 200:400].sum(axis=2) / 3
    assert inside[::2].mean() - inside[1::2].mean() > 25 and inside.mean() < 60
    outline = pixels[300, 95:110].max(axis=1)
    assert outline.max() > 200


def test_a_large_object_keeps_its_inside_and_a_small_one_is_seen_at_every_size():
    for side in (128, 700, 3000):
        image = np.full((side, side, 3), 100, np.uint8)
        mask = encode(disc(side, side, side / 2, side / 2, 8))
        box = [[side / 2 - 8, side / 2 - 8, side / 2 + 8, side / 2 + 8]]
        pixels = np.array(draw(image, box, [""], None, [mask], {"": (255, 0, 0)}))
        middle = pixels[side // 2, side // 2]
        assert 110 < middle[0] < 200  # the tint, not the line
        assert (pixels[..., 0] > 225).sum() > 30


@pytest.mark.parametrize("diameter, most", [(20, 3), (40, 5), (600, 9)])
def test_an_outline_is_as_thin_as_its_object_is_small(diameter, most):
    """In a picture in which a large object has one of 8 pixels."""
    radius = diameter / 2
    image = np.full((900, 3000, 3), 100, np.uint8)
    box = [[450 - radius, 450 - radius, 450 + radius, 450 + radius]]
    red = {"": (255, 0, 0)}
    for mask in (None, [encode(disc(900, 3000, 450, 450, radius))]):
        row = np.array(draw(image, box, [""], None, mask, red))[450, :450, 0]
        assert 1 <= (row > 240).sum() <= most
        assert (row > 240).sum() > 5 or diameter < 600


def test_the_sheet_of_one_class_is_full_of_its_objects(tmp_path):
    make_demo(tmp_path / "data", train=4, valid=1, test=1, size=64, seed=0)
    split = read_dataset(tmp_path / "data")["train"]
    three = class_sheet(split)
    split = replace(split, class_names=["cell"], images=list(split.images))
    for image in split.images:
        image.labels[:] = 0
    sheet = np.array(class_sheet(split))
    assert sheet.shape[1] == three.width == 1440
    assert split.objects_per_class[0] > 24
    for i in range(20):
        y, x = 30 + 240 * (i // 6), 240 * (i % 6)
        assert (sheet[y + 20 : y + 200, x + 20 : x + 200] != (24, 26, 31)).any(axis=2).mean() > 0.9


def test_side_by_side_has_both_pictures_under_titles():
    left, right = (
        Image.new("RGB", (300, 200), (255, 0, 0)),
        Image.new("RGB", (80, 100), (0, 255, 0)),
    )
    sheet = side_by_side(left, right, ("ground truth", "prediction"))
    pixels = np.array(sheet)
    top = sheet.height - 200
    assert top > 10 and (pixels[top:, :300] == (255, 0, 0)).all()
    assert (pixels[top:, -160:] == (0, 255, 0)).all() and sheet.width > 460
    assert (pixels[:top, :300] > 200).any() and (pixels[:top, -160:] > 200).any()


def test_duplicates_are_left_out_by_class_and_the_better_stays():
    boxes = np.array(
        [[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [20, 20, 30, 30]], dtype=np.float32
    )
    scores, labels = np.array([0.5, 0.9, 0.3, 0.7]), np.array([0, 0, 1, 0])
    table = assign_rows(["cell", "vessel"], [1, 2], "dataset")
    prediction = Prediction(Original(40, 40), table, boxes, scores, labels, None)
    unique = prediction.without_duplicates()
    assert unique.scores.tolist() == [0.9, 0.7] and unique.labels.tolist() == [0, 0]
    assert (unique.boxes == boxes[[1, 3]]).all()
    assert len(prediction.without_duplicates(iou=0.95)) == 3
    assert len(prediction.without_duplicates(iou=0)) == 4
    prediction.boxes[2] = [0, 0, 10, 7.5]  # of another class, inside: IoU 0.83
    assert prediction.without_duplicates().scores.tolist() == [0.9, 0.7, 0.3]
    nothing = prediction[[]].without_duplicates()
    assert nothing.names == [] and nothing.boxes.shape == (0, 4)


# ---------------------------------------------------------------- whatever is to be drawn

NAMES = [
    "cell",
    "",
    "two\nlines",
    "tab\tbell\a\0",
    "\ud800",
    "é血🩸",
    "\u202ename",
    "x" * 5000,
    "--out=$(x)",
]
FAR_OUT = [np.nan, np.inf, -np.inf, 1e300, -1e300, 0.0, -7.5]


@st.composite
def scenes(draw) -> dict:
    """An image's shape and objects of any kind in it: what draw() takes."""
    long = draw(st.sampled_from([1, 2, 17, 511, 512, 513, 1600, 1601, 4000]) | st.integers(1, 4000))
    short = draw(st.integers(1, max(1, min(long, 200_000 // long))))
    height, width = draw(st.permutations([long, short]))
    count = draw(st.sampled_from([0, 1, 2, 13, 60]) | st.integers(0, 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    corners = rng.uniform(-0.1, 1.1, (count, 2)) * (width, height)
    small, large = rng.uniform(0, 6, (count, 2)), rng.uniform(0, 1, (count, 2)) * (width, height)
    boxes = np.hstack([corners, corners + np.where(rng.random((count, 1)) < 0.7, small, large)])
    boxes = np.where(rng.random((count, 1)) < 0.3, boxes.round(), boxes)
    boxes = np.where(
        rng.random((count, 4)) < draw(st.sampled_from([0, 0.1])),
        rng.choice(FAR_OUT, (count, 4)),
        boxes,
    )
    masks = None
    if draw(st.booleans()):
        masks = [
            None if rng.random() < 0.3 else encode(some_mask(rng, height, width))
            for _ in range(count)
        ]
    scores = draw(st.sampled_from([None, rng.random(count).tolist(), [np.nan] * count]))
    names = (
        [str(name) for name in rng.choice(NAMES, count)]
        if draw(st.booleans())
        else ["cell"] * count
    )
    return {
        "shape": (height, width),
        "boxes": boxes,
        "names": names,
        "scores": scores,
        "masks": masks,
    }


def some_mask(rng, height: int, width: int) -> np.ndarray:
    """Empty, full, or a rectangle."""
    mask = np.zeros((height, width), np.uint8)
    (y1, y2), (x1, x2) = (np.sort(rng.integers(0, side + 1, 2)) for side in (height, width))
    mask[y1:y2, x1:x2] = 1
    return mask


def scene(height: int, width: int, boxes: list, names: list[str] | None = None) -> dict:
    names = names or ["a"] * len(boxes)
    return {"shape": (height, width), "boxes": boxes, "names": names, "scores": None, "masks": None}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(scenes())
@example(scene(2000, 1500, [[10 + 7 * i, 10.3, 11 + 7.13 * i, 12.4] for i in range(60)]))
@example(
    scene(
        4000, 3000, [[900.2, 900.7, 900.2 + w, 900.7 + h] for w in range(1, 7) for h in range(1, 7)]
    )
)
@example(scene(100, 100, [[1, 1, 50, 50]], ["two\nlines"]))
@example(scene(100, 100, [[1, 1, 50, 50]], ["\ud800"]))
@example(scene(100, 100, [[np.nan, 1, 50, 50], [-np.inf, 2, np.inf, 50], [50, 50, 2, 2]]))
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_everything_can_be_drawn(one):
    height, width = one.pop("shape")
    picture = draw(np.zeros((height, width, 3), np.uint8), **one, min_side=MIN_SIDE)
    scale = max(1, MIN_SIDE / max(height, width))
    assert picture.size == (max(1, round(width * scale)), max(1, round(height * scale)))
    sheet = side_by_side(picture, picture, ("ground truth", "prediction"))
    assert sheet.height > picture.height and sheet.width > 2 * picture.width


def test_boxes_of_a_few_pixels_in_a_large_image_are_seen():
    image = np.zeros((3000, 2000, 3), np.uint8)
    for width in (1, 2, 3, 4, 6, 40):
        for shift in (0, 0.5, 0.8):
            box = np.array([500 + shift, 700 + shift, 500 + shift + width, 702 + shift])
            pixels = np.array(draw(image, box[None], [""], colours={"": (255, 0, 0)}))  # no label
            near = pixels[698:706, 498 : 504 + width, 0]
            assert near.max() == 255 and near.sum(dtype=int) == pixels[..., 0].sum(dtype=int)


def test_a_nan_box_takes_its_name_score_and_mask_along():
    image = np.zeros((600, 600, 3), np.uint8)
    box, mask = [100, 200, 300, 400], encode(disc(600, 600, 200, 300, 90))
    alone = draw(image, [box], ["b"], [0.5], [mask])
    nan = [np.nan, 0, 10, 10]
    assert (
        draw(image, [nan, box, nan], ["a", "b", "c"], [0.9, 0.5, 0.1], [mask, mask, None]) == alone
    )


def test_the_sheet_of_classes_takes_any_name(tmp_path):
    make_demo(tmp_path / "data", train=2, valid=1, test=1, size=64, seed=0)
    split = read_dataset(tmp_path / "data")["train"]
    split.class_names = ["two\nlines", "\ud800", "x" * 5000]
    assert class_sheet(split).width > 0
