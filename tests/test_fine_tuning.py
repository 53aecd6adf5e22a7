"""Starting from published weights: what new classes begin with, how many steps small sets get."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import quick_flags
from torch import Tensor

import rfdetr.training.objective
import train_detector_stage1
from rfdetr.classes import COCO_NAMES, assign_rows, is_class_head
from rfdetr.data.augment import multi_scale_sides
from rfdetr.data.loaders import EpochSampler
from rfdetr.models.detector import Detector
from rfdetr.resolve import resolve
from rfdetr.settings import STAGES
from rfdetr.sizes import SIZES, ModelSize
from rfdetr.weights.official import to_official
from rfdetr.weights.start import start_from

OFFICIAL = [name for name in SIZES if name != "tiny"]
USED = list(COCO_NAMES)  # rows of the 91
UNUSED = [row for row in range(91) if row not in USED]


@pytest.fixture(scope="module")
def size() -> ModelSize:
    return replace(SIZES["tiny"], recipe=replace(SIZES["tiny"].recipe, group_detr=3))


@pytest.fixture(scope="module")
def published(size, tmp_path_factory):
    """A model with COCO's 91 rows and random weights, and its file in the official layout.

    As in the published files, rows that COCO does not use claim nothing.
    """
    torch.manual_seed(0)
    model = Detector(size, rows=91)
    for name, tensor in model.state_dict().items():
        if is_class_head(name):
            tensor.normal_(std=0.5)
            tensor[UNUSED] = 0 if name.endswith("weight") else -9
        elif "embeddings" in name or "query_feat" in name:
            tensor.normal_()
    file = tmp_path_factory.mktemp("weights") / "rf-detr-tiny.pth"
    torch.save({"model": to_official(model.state_dict())}, file)
    return model, file


def started(size: ModelSize, names: list[str], head: str, file) -> Detector:
    table = assign_rows(names, list(range(1, len(names) + 1)), head)
    torch.manual_seed(1)
    model = Detector(size, table.rows_total, table.background_last)
    start_from(model, table, file, [])
    return model


def class_heads(model: Detector) -> list[torch.nn.Linear]:
    """The decoder's, then one of each group of proposals."""
    return [*model.class_embed, *model.transformer.enc_out_class_embed]


@pytest.mark.parametrize("head, row", [("coco91", 12), ("dataset", 0)])
def test_a_class_that_coco_has_not_begins_at_the_mean_of_cocos(published, size, head, row, capsys):
    coco, file = published
    model = started(size, ["cells", "cat"], head, file)
    assert "classes new to the file, 1, at the mean of its 80 classes' rows: cells" in (
        capsys.readouterr().out
    )
    cat = 17 if head == "coco91" else 1
    for own, theirs in zip(class_heads(model), class_heads(coco), strict=True):
        assert torch.allclose(own.weight[row], theirs.weight[USED].mean(0), atol=1e-6)
        assert torch.allclose(own.bias[row], theirs.bias[USED].mean(), atol=1e-6)
        assert torch.equal(own.weight[cat], theirs.weight[17])


def test_a_new_background_row_is_at_its_prior(published, size):
    for head in class_heads(started(size, ["cells"], "dataset", published[1])):
        assert not head.weight[-1].any()
        assert head.bias[-1].sigmoid().item() == pytest.approx(0.01)


def ranked(model: Detector, images: Tensor, monkeypatch) -> Tensor:
    """The tokens (G, B, Q) that are the first training step's proposals."""
    chosen = []
    topk = Tensor.topk

    def note(scores: Tensor, k: int, dim: int = -1):
        best = topk(scores, k, dim=dim)
        chosen.append(best.indices)
        return best

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(Tensor, "topk", note)
        model.train()(images)
    return chosen[0]


@pytest.mark.parametrize("count", [1, 10])
def test_the_first_proposals_are_those_of_cocos_head(published, size, count, monkeypatch):
    coco, file = published
    images = torch.randn(2, 3, 320, 320, generator=torch.Generator().manual_seed(2))
    model = started(size, [f"kind {i}" for i in range(count)], "coco91", file)
    before = ranked(coco, images, monkeypatch).flatten(0, 1)
    after = ranked(model, images, monkeypatch).flatten(0, 1)
    for old, new in zip(before, after, strict=True):
        assert torch.isin(new, old).float().mean() >= 0.9


# ---------------------------------------------------------------- steps and sides


def steps_of(stage: str, size: str, images: int) -> int:
    """Optimizer steps in an epoch at the defaults."""
    settings = resolve(STAGES[stage], {"size": size})
    return EpochSampler(images, settings.effective_batch, 0, settings.min_steps).steps


@pytest.mark.parametrize("stage", STAGES)
def test_fifty_images_get_a_thousand_steps_in_fifty_epochs(stage):
    for size in OFFICIAL:
        assert 50 * steps_of(stage, size, 50) >= 1000
        settings = resolve(STAGES[stage], {"size": size})
        assert steps_of(stage, size, 5000) == 5000 // settings.effective_batch


def test_repetition_is_said_and_images_are_only_made_smaller(few, call, capsys, monkeypatch):
    seen = []
    to_model_input = rfdetr.training.objective.to_model_input

    def noted(images, device, side):
        seen.append((images.shape[-1], side))
        return to_model_input(images, device, side)

    monkeypatch.setattr(rfdetr.training.objective, "to_model_input", noted)
    flags = [*quick_flags(few), "--resolution", 48, "--min_steps", 4, "--multi_scale", 1]
    call(train_detector_stage1.main, *flags, "--output_dir", "run")
    largest = max(multi_scale_sides(SIZES["tiny"], 48, False))
    assert {loaded for loaded, _ in seen} == {largest}
    assert len({side for _, side in seen}) > 1 and all(side <= largest for _, side in seen)
    words = "4 images are drawn 2.0 times an epoch, so that it has 4 optimizer steps (4 in all"
    assert words in capsys.readouterr().out
    assert json.loads(Path("run/metrics.json").read_text())["args"]["batch"] == 2
