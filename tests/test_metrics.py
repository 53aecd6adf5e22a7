"""The figures equal plain pycocotools on what was saved, the overlap a count of pixels."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import read_split
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rfdetr.classes import assign_rows
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.loaders import evaluation_loader
from rfdetr.device import pick_device, pick_precision
from rfdetr.inference.detections import make_predictions
from rfdetr.inference.evaluation import SplitEvaluator
from rfdetr.inference.originals import Original
from rfdetr.masks import encode_window, to_rle
from rfdetr.metrics import coco_eval
from rfdetr.metrics.coco_eval import CocoEvaluator
from rfdetr.metrics.overlap import SCORE_THRESHOLD, mask_overlap
from rfdetr.metrics.table import format_table
from rfdetr.models.detector import select_detections
from rfdetr.models.segmentation import PastedMask
from rfdetr.sizes import SIZES

# pycocotools.mask.decode under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FIGURES = ["mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large"]
FIGURES += ["AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]


def random_segmentation(rng, box, height, width):
    """A polygon, compressed or uncompressed RLE of an ellipse in the box (xywh)."""
    x, y, w, h = box
    turns = np.linspace(0, 2 * np.pi, 9)[:-1]
    points = np.stack(
        [x + w / 2 + w / 2 * np.cos(turns), y + h / 2 + h / 2 * np.sin(turns)], axis=1
    )
    polygon = [points.round(2).ravel().tolist()]
    kind = rng.integers(3)
    if kind == 0:
        return polygon
    rle = to_rle(polygon, height, width)
    if kind == 1:
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = mask_api.decode(rle).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *([0] if flat[0] else []), *edges, flat.size]).tolist()
    return {"size": [height, width], "counts": counts}


def random_boxes(rng, count, height, width):
    """(count, 4) xywh: small, medium and large objects inside the image."""
    sides = np.exp(rng.uniform(np.log(6), np.log(min(height, width) - 1), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (np.array([width, height]) - sides)
    return np.concatenate([corners, sides], axis=1).round(1)


def random_split(
    seed, image_ids=(7, 3, 900000000001, 12, 40, 41), category_ids=(5, 90, 17), first_id=1
):
    """Ground truth with crowds; an image and a category (the last) have no annotation."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image_id in image_ids:
        height, width = (int(side) for side in rng.integers(160, 320, 2))
        images.append(
            {"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width}
        )
        if image_id == image_ids[1]:
            continue
        for box in random_boxes(rng, int(rng.integers(1, 9)), height, width):
            segmentation = random_segmentation(rng, box, height, width)
            crowd = int(rng.random() < 0.15)
            if crowd:
                segmentation = {
                    "size": [height, width],
                    "counts": to_rle(segmentation, height, width)["counts"],
                }
                if isinstance(segmentation["counts"], bytes):
                    segmentation["counts"] = segmentation["counts"].decode()
            annotation = {
                "id": len(annotations) + first_id,
                "image_id": image_id,
                "category_id": int(rng.choice(category_ids[:-1])),
                "bbox": box.tolist(),
                "area": float(mask_api.area(to_rle(segmentation, height, width))),
                "iscrowd": crowd,
                "segmentation": segmentation,
            }
            annotations.append(annotation)
    categories = [
        {"id": category_id, "name": f"class {category_id}"} for category_id in category_ids
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def add_random_detections(evaluator, truth, seed):
    """Near copies of the truth and noise, with ties among the scores; none in the last image."""
    rng = np.random.default_rng(seed)
    category_ids = [category["id"] for category in truth["categories"]]
    for image in truth["images"][:-1]:
        height, width = image["height"], image["width"]
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"] for _ in range(2)]
        near = np.array([a["bbox"] for a in own]).reshape(-1, 4) * rng.uniform(
            0.9, 1.1, (len(own), 4)
        )
        noise = random_boxes(rng, int(rng.integers(0, 130)), height, width)
        boxes = np.concatenate([near, noise])
        labels = np.array(
            [a["category_id"] for a in own] + rng.choice(category_ids, len(noise)).tolist(),
            dtype=int,
        )
        scores = rng.integers(1, 40, len(boxes)) / 40  # ties
        scores[: len(own)] += rng.choice([0, 0.5])
        rles = []
        for box in boxes:
            rle = to_rle([random_segmentation_polygon(box)], height, width)
            rles.append({"size": rle["size"], "counts": rle["counts"].decode()})
        xyxy = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        evaluator.add(image["id"], xyxy, scores, labels, rles)


def random_segmentation_polygon(box):
    x, y, w, h = box
    return [x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]


def plain_pycocotools(truth, results, kind):
    """(the twelve figures, per-class mAP and mAP50 by category id), -1 for none."""
    with contextlib.redirect_stdout(io.StringIO()):
        true, found = COCO(), COCO()
        true.dataset = copy.deepcopy(truth)
        true.createIndex()
        if results:
            found = true.loadRes(copy.deepcopy(results))
        else:  # loadRes looks at the first result
            found.dataset = {**true.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(true, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_class = {}
    for row, category_id in enumerate(evaluation.params.catIds):
        values = evaluation.eval["precision"][:, :, row, 0, 2]
        per_class[category_id] = [
            v[v > -1].mean() if (v > -1).any() else -1 for v in (values, values[:1])
        ]
    return evaluation.stats, per_class


def assert_equal_to_pycocotools(figures, truth, results, kind):
    stats, per_class = plain_pycocotools(truth, results, kind)
    plain = dict(zip(FIGURES, stats, strict=True))
    names = {category["id"]: category["name"] for category in truth["categories"]}
    for category_id, values in per_class.items():
        plain |= {
            (names[category_id], name): value for name, value in zip(("mAP", "mAP50"), values)
        }
    own = {name: figures[name] for name in FIGURES}
    own |= {
        (name, key): value
        for name, pair in figures["per_class"].items()
        for key, value in pair.items()
    }
    assert {name: -1 if value is None else value for name, value in own.items()} == pytest.approx(
        plain, abs=1e-9
    )


@pytest.fixture(params=["hotcoco", "pycocotools"])
def backend(request, monkeypatch):
    """Each of the two libraries, and no other: hotcoco alone unless a test says otherwise."""
    if request.param == "pycocotools":
        monkeypatch.setattr(coco_eval, "hotcoco", None)
    return request.param


@pytest.mark.parametrize(
    "case",
    [
        {"seed": 0},
        {
            "seed": 1,
            "first_id": 0,
        },  # pycocotools has its own view of annotation 0; the figures follow it
        {"seed": 2, "image_ids": ("b", "a", "d", "c")},
        {"seed": 3, "category_ids": (10**12, 0, 3)},
        {"seed": 4, "image_ids": tuple(range(30))},
    ],
    ids=lambda case: f"seed {case['seed']}",
)
def test_equals_plain_pycocotools_on_the_saved_files(case, backend, tmp_path, capsys):
    truth = random_split(**case)
    evaluator = CocoEvaluator(copy.deepcopy(truth), masks=True)
    add_random_detections(evaluator, truth, case["seed"])
    summary = evaluator.summary()
    evaluator.save(tmp_path / "results")
    assert capsys.readouterr() == ("", "")
    assert 0.05 < summary["bbox"]["mAP"] < 0.95
    for kind in ("bbox", "segm"):
        results = json.loads((tmp_path / "results" / f"{kind}.json").read_text())
        assert_equal_to_pycocotools(summary[kind], truth, results, kind)
    assert list(summary["bbox"]["per_class"]) == [
        category["name"] for category in truth["categories"]
    ]


@st.composite
def evaluation_case(draw):
    """(ground truth, detections of each image) on a coarse grid.

    Equal scores and overlaps, empty masks, crowds.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    some_id = draw(
        st.sampled_from(
            [st.integers(0, 20), st.integers(0, 2**60), st.text("ab1", min_size=1, max_size=3)]
        )
    )
    category_ids = draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=3, unique=True))
    categories = [
        {"id": category_id, "name": f"class {category_id}"} for category_id in category_ids
    ]
    truth, found = {"images": [], "annotations": [], "categories": categories}, []
    grid, first_id = draw(st.sampled_from([4, 25])), draw(st.sampled_from([0, 1, 1, 2**50]))

    def boxes_and_rles(count):
        corners = np.sort(rng.integers(0, 5, (count, 2, 2)), axis=1) * grid
        boxes = corners.reshape(-1, 4).astype(float)
        canvas = np.zeros((4 * grid, 4 * grid, count), dtype=np.uint8, order="F")
        for i, (x0, y0, x1, y1) in enumerate(corners.reshape(-1, 4)):
            canvas[y0:y1, x0:x1, i] = rng.random() < 0.9
        return boxes, [rle | {"counts": rle["counts"].decode()} for rle in mask_api.encode(canvas)]

    for image_id in draw(st.lists(some_id, min_size=1, max_size=4, unique=True)):
        truth["images"].append({"id": image_id, "height": 4 * grid, "width": 4 * grid})
        for box, rle in zip(*boxes_and_rles(draw(st.integers(0, 6)))):
            row = {
                "id": first_id + len(truth["annotations"]),
                "image_id": image_id,
                "segmentation": rle,
            }
            row |= {
                "category_id": int(rng.choice(category_ids)),
                "iscrowd": int(rng.random() < 0.2),
            }
            row |= {"bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]}
            truth["annotations"].append(
                row | {"area": float(rng.choice([mask_api.area(rle), 1024, 9216, 1e5]))}
            )
        if draw(st.booleans()):
            count = draw(st.sampled_from([0, 1, 10, 130]))
            labels, scores = (
                rng.choice(category_ids, count),
                rng.integers(1, 4, count) / draw(st.sampled_from([3, 1e9])),
            )
            boxes, rles = boxes_and_rles(count)
            found.append((image_id, boxes, scores, labels, rles))
    return truth, found


@settings(max_examples=60, deadline=None)
@given(evaluation_case())
def test_equals_plain_pycocotools_whatever_the_split(case):
    truth, found = case
    evaluator = CocoEvaluator(copy.deepcopy(truth), masks=True)
    for detections in found:
        evaluator.add(*detections)
    summary = evaluator.summary()
    for kind in ("bbox", "segm"):
        assert_equal_to_pycocotools(summary[kind], truth, evaluator.results(kind), kind)


def test_a_second_summary_is_the_same_and_detections_can_be_joined_or_cleared():
    truth = random_split(5)
    evaluator, other = CocoEvaluator(truth, masks=True), CocoEvaluator(truth, masks=True)
    add_random_detections(evaluator, truth, 0)
    first = evaluator.summary()
    assert evaluator.summary() == first
    other.detections.update(dict(list(evaluator.detections.items())[:2]))
    other.detections.update(dict(list(evaluator.detections.items())[1:]))
    assert other.summary() == first
    add_random_detections(other, truth, 0)  # the same images again, as a padded sampler gives them
    assert other.summary() == first
    other.detections.clear()
    assert other.summary()["bbox"]["mAP"] == 0


def test_the_library_does_not_log(caplog):
    caplog.set_level(logging.DEBUG)
    truth = random_split(6, first_id=0)
    evaluator = CocoEvaluator(truth, masks=True)
    add_random_detections(evaluator, truth, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluator.summary()
    assert not caplog.records


def test_nothing_found_gives_zero_and_missing_sizes_give_none(backend):
    box = {
        "id": 1,
        "image_id": 1,
        "category_id": 2,
        "bbox": [1, 1, 10, 10],
        "area": 100,
        "iscrowd": 0,
    }
    box["segmentation"] = [[1, 1, 11, 1, 11, 11, 1, 11]]
    images = [{"id": 1, "height": 50, "width": 50}, {"id": 2, "height": 50, "width": 50}]
    categories = [{"id": 2, "name": "a"}, {"id": 1, "name": "b"}]
    evaluator = CocoEvaluator(
        {"images": images, "annotations": [box], "categories": categories}, masks=True
    )
    evaluator.add(2, np.zeros((0, 4)), np.zeros(0), np.zeros(0), [])
    summary = evaluator.summary()
    for kind in ("bbox", "segm"):
        assert summary[kind]["mAP"] == summary[kind]["mAP_small"] == summary[kind]["AR100"] == 0
        assert summary[kind]["mAP_large"] is None and summary[kind]["AR_medium"] is None
        assert summary[kind]["per_class"] == {
            "b": {"mAP": None, "mAP50": None},
            "a": {"mAP": 0, "mAP50": 0},
        }
    assert summary["mask"] == {"giou": 0, "ciou": 0, "dice": 0}


def test_what_has_boxes_alone_gets_no_figures_of_masks():
    box = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 400}
    truth = {
        "images": [{"id": 1, "height": 60, "width": 80}],
        "annotations": [box | {"bbox": [5, 5, 20, 20]}],
        "categories": [{"id": 1, "name": "a"}],
    }
    evaluator = CocoEvaluator(truth, masks=True)
    boxes = np.array([[5, 5, 25, 25], [40, 20, 60, 40.0]])
    masks = [square(5, 5, 20), square(40, 20, 20)]
    evaluator.add(1, boxes, np.array([0.9, 0.8]), np.ones(2), masks)
    summary = evaluator.summary()
    assert summary["bbox"]["mAP"] == pytest.approx(1)
    assert summary["segm"]["mAP"] is None
    assert summary["mask"] == {"giou": None, "ciou": None, "dice": None}


@pytest.mark.parametrize(
    "images", [[], [{"id": 1, "height": 9, "width": 9}]], ids=["no images", "no annotations"]
)
@pytest.mark.parametrize(
    "categories", [[], [{"id": 1, "name": "a"}]], ids=["no classes", "one class"]
)
def test_an_empty_split_has_no_figures(images, categories, backend, tmp_path):
    evaluator = CocoEvaluator(
        {"images": images, "annotations": [], "categories": categories}, masks=True
    )
    summary = evaluator.summary()
    per_class = {category["name"]: {"mAP": None, "mAP50": None} for category in categories}
    nothing = {**dict.fromkeys(FIGURES), "per_class": per_class}
    assert summary == {
        "bbox": nothing,
        "segm": nothing,
        "mask": dict.fromkeys(("giou", "ciou", "dice")),
    }
    evaluator.save(tmp_path)
    assert (
        json.loads((tmp_path / "bbox.json").read_text())
        == json.loads((tmp_path / "segm.json").read_text())
        == []
    )
    assert "-" in format_table(summary)


def square(x, y, side, height=60, width=80):
    return {
        "size": [height, width],
        "counts": to_rle([[x, y, x + side, y, x + side, y + side, x, y + side]], height, width)[
            "counts"
        ].decode(),
    }


def two_objects(**second):
    """One image with two squares; `second` changes the second annotation."""
    first = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "bbox": [5, 5, 20, 20],
        "area": 400,
        "iscrowd": 0,
    }
    annotations = [
        {**first, "segmentation": square(5, 5, 20)},
        {**first, "id": 2, "bbox": [40, 20, 20, 20], **second},
    ]
    images = [{"id": 1, "height": 60, "width": 80}]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}


@pytest.mark.parametrize("missing", [{}, {"segmentation": None}, {"segmentation": []}])
def test_an_object_without_mask_neither_helps_nor_hurts_the_mask_figures(missing, backend):
    truth = two_objects(**missing)
    boxes, rles = (
        np.array([[5, 5, 25, 25], [40, 20, 60, 40.0]]),
        [square(5, 5, 20), square(40, 20, 18)],
    )
    for found in ([0], [0, 1], [1, 0]):
        evaluator = CocoEvaluator(truth, masks=True)
        scores = np.linspace(0.9, 0.8, len(found))
        evaluator.add(1, boxes[found], scores, np.ones(len(found)), [rles[i] for i in found])
        summary = evaluator.summary()
        assert summary["segm"]["mAP"] == pytest.approx(1)
        assert summary["mask"] == {"giou": 1, "ciou": 1, "dice": 1}
        assert (summary["bbox"]["mAP"] > 0.99) == (len(found) == 2)


def test_masks_of_objects_without_one_may_reach_over_their_boxes(backend):
    truth = two_objects(image_id=2, segmentation=[])
    truth["images"].append({"id": 2, "height": 60, "width": 80})
    evaluator = CocoEvaluator(truth, masks=True)
    evaluator.add(1, np.array([[5, 5, 25, 25]]), np.ones(1), np.ones(1), [square(5, 5, 20)])
    evaluator.add(2, np.array([[39, 19, 61, 41]]), np.ones(1), np.ones(1), [square(39, 19, 22)])
    assert evaluator.summary()["mask"] == {"giou": 1, "ciou": 1, "dice": 1}

    truth["annotations"][0]["segmentation"] = None  # nothing is drawn at all
    evaluator = CocoEvaluator(truth, masks=True)
    evaluator.add(2, np.array([[39, 19, 61, 41]]), np.ones(1), np.ones(1), [square(39, 19, 22)])
    assert evaluator.summary()["mask"] == {"giou": None, "ciou": None, "dice": None}


def test_boxes_only():
    truth = random_split(8)
    for annotation in truth["annotations"]:
        del annotation["segmentation"]
    evaluator = CocoEvaluator(truth, masks=False)
    evaluator.add(
        7,
        np.array([[1, 2, 30, 40]], dtype=np.float32),
        np.array([0.5], dtype=np.float32),
        np.array([5]),
    )
    assert evaluator.results("bbox") == [
        {"image_id": 7, "category_id": 5, "bbox": [1, 2, 29, 38], "score": 0.5}
    ]
    assert set(evaluator.summary()) == {"bbox"}


def test_bad_detections():
    truth = two_objects(segmentation=square(40, 20, 20))
    evaluator = CocoEvaluator(truth, masks=True)
    boxes, scores = (
        np.array([[1, 1, 9, 9], [1, np.nan, 9, 9], [1, 1, 9, 9]]),
        np.array([0.5, 0.6, np.inf]),
    )
    evaluator.add(1, boxes, scores, np.ones(3), [square(1, 1, 8)] * 3)
    assert len(evaluator.results("bbox")) == len(evaluator.results("segm")) == 1
    evaluator.add(
        99, boxes, scores, np.ones(3), [square(1, 1, 8)] * 3
    )  # not an image of the ground truth
    assert list(evaluator.detections) == [1]
    with pytest.raises(ValueError, match="category ids \\[7\\]"):
        evaluator.add(1, boxes[:1], scores[:1], np.array([7]), [square(1, 1, 8)])
    with pytest.raises(ValueError, match="\\[80, 60\\], the image has \\[60, 80\\]"):
        evaluator.add(1, boxes[:1], scores[:1], np.ones(1), [square(1, 1, 8, height=80, width=60)])
    with pytest.raises(ValueError):
        evaluator.add(1, boxes[:1], scores[:1], np.ones(1), [])


@st.composite
def overlap_case(draw):
    """Random bitmaps: results and annotations of two images and two classes, crowds among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))

    def rows(count):
        for _ in range(count):
            bitmap = rng.random(shape) < rng.choice([0, 0.3, 0.7])
            yield {
                "image_id": int(rng.integers(2)),
                "category_id": int(rng.integers(2)),
                "segmentation": mask_api.encode(np.asfortranarray(bitmap, dtype=np.uint8)),
                "score": float(rng.choice([0.3, SCORE_THRESHOLD, 0.9])),
                "iscrowd": int(rng.random() < 0.3),
                "bitmap": bitmap,
            }

    return list(rows(draw(st.integers(0, 6)))), list(rows(draw(st.integers(0, 6)))), shape


@settings(max_examples=150, deadline=None)
@given(overlap_case())
def test_overlap_equals_counting_decoded_pixels(case):
    results, annotations, shape = case
    ious, dices, total = [], [], np.zeros(2)
    for pair in [(i, c) for i in range(2) for c in range(2)]:

        def union(rows, pair=pair):
            own = [row["bitmap"] for row in rows if (row["image_id"], row["category_id"]) == pair]
            return np.any([np.zeros(shape, dtype=bool), *own], axis=0)

        true, crowd = (union([a for a in annotations if a["iscrowd"] == flag]) for flag in (0, 1))
        found = union([r for r in results if r["score"] >= SCORE_THRESHOLD]) & (true | ~crowd)
        if (found | true).any():
            both, either = (found & true).sum(), (found | true).sum()
            ious.append(both / either)
            dices.append(2 * both / (found.sum() + true.sum()))
            total += both, either
    images = np.array([row["image_id"] for row in results])
    classes = np.array([row["category_id"] for row in results])
    scores = np.array([row["score"] for row in results])
    rles = [row["segmentation"] for row in results]
    overlap = mask_overlap(images, classes, scores, rles, annotations)
    if not ious:
        assert overlap == {"giou": None, "ciou": None, "dice": None}
    else:
        expected = {"giou": np.mean(ious), "ciou": total[0] / total[1], "dice": np.mean(dices)}
        assert overlap == pytest.approx(expected, abs=1e-12)


def test_the_table_is_plain_and_compact():
    truth = random_split(9, category_ids=tuple(range(1, 20)))
    truth["categories"][0]["name"] = "a name that is much too long for a column of the table"
    evaluator = CocoEvaluator(truth, masks=True)
    add_random_detections(evaluator, truth, 9)
    text = format_table(evaluator.summary())
    assert (
        text.isascii()
        and max(map(len, text.splitlines())) <= 100
        and len(text.splitlines()) == 3 + 2 + 1 + 13
    )
    assert text.splitlines()[-1] == "... and 7 more"
    assert text.splitlines()[3].endswith("Dice  (all pixels of a class; scores >= 0.5)")
    boxes_only = {"bbox": evaluator.summary()["bbox"]}
    assert "mask" not in format_table(boxes_only)


@given(data=st.data(), height=st.integers(1, 12), width=st.integers(1, 12))
def test_a_part_of_an_image_is_encoded_as_the_whole_image_would_be(data, height, width):
    h, w = data.draw(st.integers(0, height)), data.draw(st.integers(0, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    pixels = data.draw(st.lists(st.booleans(), min_size=h * w, max_size=h * w))
    part = np.array(pixels, dtype=bool).reshape(h, w)
    canvas = np.zeros((height, width), dtype=np.uint8, order="F")
    canvas[top : top + h, left : left + w] = part
    whole = mask_api.encode(canvas)
    rle = encode_window(left, top, torch.from_numpy(part), height, width)
    assert rle == {"size": [height, width], "counts": whole["counts"].decode()}


SIDE, CELL, OBJECTS = 240, 16, 225  # of the crowded images; 15 x 15 objects


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A split of two images with 225 objects each: 150, 45 and 30 of three classes."""
    folder = tmp_path_factory.mktemp("crowded") / "valid"
    folder.mkdir()
    categories = [{"id": 10 * i, "name": f"class {i}"} for i in (1, 2, 3)]
    truth = {"images": [], "annotations": [], "categories": categories}
    for image in (1, 2):
        Image.new("RGB", (SIDE, SIDE)).save(folder / f"{image}.png")
        size = {"width": SIDE, "height": SIDE}
        truth["images"].append({"id": image, "file_name": f"{image}.png", **size})
        for i in range(OBJECTS):
            x, y = i % 15 * CELL + 2, i // 15 * CELL + 2
            label = 10 * (1 + (i >= 150) + (i >= 195))
            row = {"id": len(truth["annotations"]) + 1, "image_id": image, "category_id": label}
            row |= {"bbox": [x, y, 12, 12], "area": 144, "iscrowd": 0}
            row["segmentation"] = [[x, y, x + 12, y, x + 12, y + 12, x, y + 12]]
            truth["annotations"].append(row)
    file = folder / "_annotations.coco.json"
    file.write_text(json.dumps(truth))
    return read_split(file, folder, "valid")


def whole_pixels(box):
    """(left, top, right, bottom) in the image of a box cxcywh 0..1."""
    cx, cy, w, h = box.double().tolist()
    edges = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    return [min(max(round(edge * SIDE), 0), SIDE) for edge in edges]


class BoxMasks(torch.nn.Module):
    """A mask head whose masks fill the boxes."""

    def pixels(self, features, images):
        return features

    def paste(self, pixels, queries, boxes, placement):
        for left, top, right, bottom in map(whole_pixels, boxes):
            mask = torch.ones(bottom - top, right - left, dtype=torch.bool)
            yield PastedMask(left, top, mask, torch.ones(()))


class Trained(torch.nn.Module):
    """As a trained detector: a query near each object, scores of its class all over 0..1."""

    size = replace(SIZES["tiny"], queries=OBJECTS, select=300)

    def __init__(self, split, table):
        super().__init__()
        rng = np.random.default_rng(0)
        boxes = np.array([[*a["bbox"]] for a in split.ground_truth["annotations"]], dtype=float)
        boxes += rng.normal(0, 0.4, boxes.shape)
        boxes[::15, 0] -= 4  # over the left border
        boxes[:, :2] += boxes[:, 2:] / 2
        labels = np.concatenate([record.labels for record in split.images])
        logits = rng.uniform(-6, -2, (len(boxes), table.rows_total))
        logits[np.arange(len(boxes)), np.array(table.rows)[labels]] = rng.uniform(-3, 4, len(boxes))
        self.outputs = {
            "pred_boxes": torch.tensor(boxes / SIDE, dtype=torch.float32).view(2, OBJECTS, 4),
            "pred_logits": torch.tensor(logits, dtype=torch.float32).view(2, OBJECTS, -1),
            "queries": torch.zeros(2, OBJECTS, 8),
            "features": torch.zeros(2, 8, 1, 1),
        }
        self.head = BoxMasks()

    def forward(self, images):
        return self.outputs


@pytest.fixture
def trained(crowded):
    """(the detector, its class table)"""
    table = assign_rows(list(crowded.class_names), crowded.category_ids, "dataset")
    return Trained(crowded, table), table


def split_evaluator(crowded, table, masks=True, frozen=None):
    dataset = SplitDataset(crowded, 32, None, masks=False)
    precision = pick_precision("off", pick_device("cpu"))
    return SplitEvaluator(evaluation_loader(dataset, 2, 0), table, precision, masks, frozen)


def all_results(crowded, model, table):
    """COCO results of everything that the detector gives: {"bbox": [...], "segm": [...]}."""
    rows = torch.tensor(table.rows)
    detections = select_detections(model.outputs, rows, model.size.select)
    results = {"bbox": [], "segm": []}
    for record, *values in zip(crowded.images, *detections[:3]):
        for score, label, box in zip(*values):
            row = {
                "image_id": record.id,
                "category_id": crowded.category_ids[label],
                "score": score.item(),
            }
            cx, cy, w, h = (box * SIDE).double().tolist()
            edges = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]).clip(0, SIDE)
            results["bbox"].append(row | {"bbox": [*edges[:2], *(edges[2:] - edges[:2])]})
            left, top, right, bottom = whole_pixels(box)
            mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
            mask[top:bottom, left:right] = 1
            results["segm"].append(row | {"segmentation": mask_api.encode(mask)})
    return results


@pytest.mark.parametrize("stage", ["single stage", "stage 2"])
def test_scores_with_masks_are_those_of_all_detections(stage, crowded, trained, monkeypatch):
    monkeypatch.setattr(coco_eval, "CROWDED", ())  # COCO's own figures alone
    model, table = trained
    if stage == "stage 2":
        evaluator = split_evaluator(crowded, table, frozen=model).collect(model.head)
    else:
        evaluator = split_evaluator(crowded, table).collect(model)
    summary = evaluator.summary()
    results = all_results(crowded, model, table)
    assert len(results["bbox"]) == 600 and summary["bbox"]["mAP"] > 0.5
    for kind in ("bbox", "segm"):
        assert_equal_to_pycocotools(summary[kind], crowded.ground_truth, results[kind], kind)
        saved = evaluator.results(kind)
        assert 2 * 225 < len(saved) < 600  # what no figure looks at has no mask drawn
        assert_equal_to_pycocotools(summary[kind], crowded.ground_truth, saved, kind)
    assert split_evaluator(crowded, table, masks=False).evaluate(model)["bbox"] == summary["bbox"]


def test_overlap_with_masks_is_that_of_all_detections(crowded, trained, monkeypatch):
    model, table = trained
    model.outputs["pred_logits"] += 3  # every object is found with 0.5 or more
    detections = next(iter(split_evaluator(crowded, table).detections(model)))
    summary = split_evaluator(crowded, table).evaluate(model)
    assert (detections.labels == 0).sum(1).min() > 100
    monkeypatch.setattr(
        "rfdetr.inference.evaluation.counting", lambda boxes, *_: np.ones(len(boxes), bool)
    )
    assert split_evaluator(crowded, table).evaluate(model) == summary


def test_the_boxes_that_are_scored_are_those_that_are_delivered(crowded, trained):
    model, table = trained
    evaluator = split_evaluator(crowded, table, masks=False)
    originals = [Original(SIDE, SIDE)] * 2
    (batch,) = evaluator.detections(model)
    delivered = make_predictions(batch, originals, 0.0, None, table, evaluator.precision)
    boxes = np.concatenate([one.boxes for one in delivered])
    scored = np.array([row["bbox"] for row in evaluator.collect(model).results("bbox")])
    assert len(boxes) == 600 and (boxes[:, 0] == 0).sum() > 10
    np.testing.assert_array_equal(scored[:, :2], boxes[:, :2])
    np.testing.assert_allclose(scored[:, :2] + scored[:, 2:], boxes[:, 2:], rtol=1e-12)
    assert boxes.min() >= 0 and boxes.max() <= SIDE


def test_masks_are_ranked_by_their_own_scores_and_boxes_by_the_classes(tmp_path):
    """Of two detections of one object the surer class has the poorer mask."""
    whole = encode_window(10, 10, np.ones((40, 40), bool), 64, 64)
    half = encode_window(10, 10, np.ones((40, 16), bool), 64, 64)
    truth = {
        "images": [{"id": 1, "height": 64, "width": 64}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "area": 1600}
            | {"segmentation": whole}
        ],
    }
    boxes = [[10, 10, 50, 50], [10, 10, 40, 50]]
    figures = {}
    for name, mask_scores in (("own", [0.3, 0.7]), ("class", None)):
        evaluator = CocoEvaluator(truth, masks=True)
        evaluator.add(1, boxes, [0.9, 0.8], [1, 1], [half, whole], mask_scores)
        figures[name] = evaluator.summary()
        evaluator.save(tmp_path / name)
    assert figures["own"]["bbox"] == figures["class"]["bbox"]
    assert figures["own"]["mask"] == figures["class"]["mask"]
    assert figures["own"]["segm"]["mAP"] == pytest.approx(1)
    assert figures["class"]["segm"]["mAP"] == pytest.approx(0.5)
    for name, kind, scores in (("own", "bbox", [0.9, 0.8]), ("own", "segm", [0.3, 0.7]),
                               ("class", "segm", [0.9, 0.8])):  # fmt: skip
        saved = json.loads((tmp_path / name / f"{kind}.json").read_text())
        assert [entry["score"] for entry in saved] == scores
