"""Boxes and masks land where they belong: in a resized image, a tile, a letterbox."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

from rfdetr.boxes import cxcywh_to_xyxy
from rfdetr.classes import assign_rows
from rfdetr.device import pick_device, pick_precision
from rfdetr.inference.detections import Detections, draw_masks, make_predictions
from rfdetr.inference.originals import Original
from rfdetr.models.official_masks import OfficialMaskHead
from rfdetr.models.segmentation import MASK_HEADS
from rfdetr.placement import Placement

# pycocotools.mask.decode under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEIGHT, WIDTH = 150, 200  # of the original
TABLE = assign_rows(["cell"], [1], "dataset")

# (left, top, right, bottom) of the input in pixels of the original
INPUTS = {
    "whole image": (0, 0, 200, 150),
    "tile": (120, 40, 184, 88),
    "tile over the lower right corner": (160, 120, 240, 200),
    "letterbox": (0, -25, 200, 175),
    "letterbox with borders on all sides": (-10, -50, 230, 190),
}


def placement_of(left: float, top: float, right: float, bottom: float) -> Placement:
    matrix = np.array([[right - left, 0.0, left], [0.0, bottom - top, top]])
    return Placement(matrix, HEIGHT, WIDTH)


def random_boxes(count: int) -> torch.Tensor:
    """(count, 4) cxcywh 0..1; some stand out over the input's border."""
    return torch.cat((torch.rand(count, 2), torch.rand(count, 2) * 0.6), dim=1)


def detections_of(placement: Placement, boxes: torch.Tensor) -> Detections:
    """Detections with random features in one image; scores fall from 0.9 to 0.1."""
    return Detections(
        indices=[0],
        placements=[placement],
        scores=torch.linspace(0.9, 0.1, len(boxes))[None],
        labels=torch.zeros(1, len(boxes), dtype=torch.long),
        boxes=boxes[None],
        queries=torch.randn(1, len(boxes), 96),
        features=torch.randn(1, 96, 6, 6),
        images=torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8),
    )


@pytest.fixture
def precision():
    return pick_precision("off", pick_device("cpu"))


@pytest.fixture(params=[*MASK_HEADS, "official"])
def head(request):
    torch.manual_seed(0)
    return OfficialMaskHead(96, 2) if request.param == "official" else MASK_HEADS[request.param](96)


def whole_masks(head, detections: Detections, precision) -> np.ndarray:
    """(n, H, W) bool of the first image."""
    chosen = [np.arange(detections.boxes.shape[1])]
    ((rles, _),) = draw_masks(head, detections, chosen, precision)
    return np.stack([mask_api.decode(rle) for rle in rles]).astype(bool)


@pytest.mark.parametrize("where", INPUTS.values(), ids=INPUTS)
def test_masks_are_those_of_the_input_alone_put_where_it_lies(where, head, precision):
    left, top, right, bottom = where
    detections = detections_of(placement_of(*where), random_boxes(20))
    placed = whole_masks(head, detections, precision)

    detections.placements = [Placement.resized(bottom - top, right - left)]
    of_input = whole_masks(head, detections, precision)
    # a canvas that holds the input and the original
    canvas = np.zeros((20, 400, 400), dtype=bool)
    canvas[:, 100 + top : 100 + bottom, 100 + left : 100 + right] = of_input
    expected = canvas[:, 100 : 100 + HEIGHT, 100 : 100 + WIDTH]

    assert expected.any() and placed.shape == expected.shape
    assert (placed != expected).sum() <= 3  # pixels, by rounding


@pytest.mark.parametrize("where", INPUTS.values(), ids=INPUTS)
def test_boxes_lie_in_the_input_and_in_the_original(where):
    left, top, right, bottom = where
    boxes = random_boxes(200)
    detections = detections_of(placement_of(*where), boxes)
    placed = detections.boxes_in_original(0)
    corners = cxcywh_to_xyxy(boxes).double().numpy()
    expected = corners * ([right - left, bottom - top] * 2) + [left, top, left, top]
    visible = [max(left, 0), max(top, 0), min(right, WIDTH), min(bottom, HEIGHT)]
    expected = expected.clip(visible[:2] * 2, visible[2:] * 2)
    assert placed.dtype == np.float32
    np.testing.assert_allclose(placed, expected, atol=1e-4)
    assert (placed[:, :2] == visible[:2]).any() and (placed[:, 2:] == visible[2:]).any()


def test_boxes_of_a_resized_image_are_scaled_and_clipped_to_the_bit():
    boxes = random_boxes(500)
    boxes[0, 0] = torch.nan
    placed = detections_of(Placement.resized(479, 641), boxes).boxes_in_original(0)
    sides = np.array([641, 479] * 2, dtype=np.float32)
    expected = (cxcywh_to_xyxy(boxes).numpy() * sides).clip(0, sides)
    np.testing.assert_array_equal(placed, expected)
    assert np.isnan(placed[0]).any()


def test_a_tile_and_the_whole_image_show_an_object_at_the_same_pixels(head, precision):
    """Predictions and their pictures: one object, seen by two inputs."""
    originals = [Original(HEIGHT, WIDTH, np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8))]
    object_box = np.array([130.0, 50.0, 170.0, 80.0])  # xyxy in the original
    pictures = []
    for where in ("whole image", "tile", "letterbox"):
        left, top, right, bottom = INPUTS[where]
        corners = (object_box - [left, top, left, top]) / ([right - left, bottom - top] * 2)
        centre = (corners[:2] + corners[2:]) / 2
        box = torch.tensor([*centre, *(corners[2:] - corners[:2])], dtype=torch.float32)
        detections = detections_of(placement_of(*INPUTS[where]), box[None])
        (prediction,) = make_predictions(detections, originals, 0.5, head, TABLE, precision)
        np.testing.assert_allclose(prediction.boxes, object_box[None], atol=1e-3)
        assert prediction.masks.shape == (1, HEIGHT, WIDTH)
        prediction.rles = None  # of random features
        pictures.append(np.asarray(prediction.picture()))
    assert (pictures[0] == pictures[1]).all() and (pictures[0] == pictures[2]).all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", INPUTS.values(), ids=INPUTS)
def test_boxes_that_are_not_finite_can_be_drawn(broken, where, head, precision):
    boxes = random_boxes(8)
    boxes[range(8), [0, 1, 2, 3] * 2] = broken
    masks = whole_masks(head, detections_of(placement_of(*where), boxes), precision)
    assert masks.shape == (8, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "matrix",
    [
        [[0, 1, 0], [1, 0, 0]],
        [[-1, 0, 1], [0, 1, 0]],
        [[1, 0, 0], [0, 0, 0]],
        [[1, 1, 0], [0, 1, 0]],
    ],
    ids=["transposed", "mirrored", "flat", "sheared"],
)
def test_a_matrix_that_does_more_than_scale_and_shift_is_refused(matrix):
    with pytest.raises(ValueError, match="scale and shift"):
        Placement(np.array(matrix, dtype=float), HEIGHT, WIDTH)
