"""Checkpoints: whole or not at all, safe to open, and enough to rebuild the model."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from rfdetr import checkpoint
from rfdetr.classes import assign_rows
from rfdetr.console import UserError
from rfdetr.sizes import SIZES


@pytest.fixture
def content(small_size, small_model) -> dict:
    table = assign_rows(["a", "b", "c", "d"], [1, 2, 3, 4], "dataset")
    return checkpoint.make_content("single", small_size, 64, table, "nano", small_model.state_dict())


@pytest.fixture
def saved(content, tmp_path) -> Path:
    checkpoint.save(tmp_path / "best.pt", content)
    return tmp_path / "best.pt"


def test_a_model_survives_its_checkpoint(saved, small_model):
    model, table = checkpoint.build_model(checkpoint.load(saved), groups=None)
    assert not model.training and table.names == ("a", "b", "c", "d")
    assert checkpoint.fingerprint(model) == checkpoint.fingerprint(small_model)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected, found = small_model.eval()(images), model(images)
    for key in ("pred_logits", "pred_boxes", "queries", "features"):
        assert torch.equal(expected[key], found[key])


def test_inference_needs_one_group_of_queries_alone(saved, small_model):
    model, _ = checkpoint.build_model(checkpoint.load(saved))
    assert model.query_feat.weight.shape[0] == 10 and small_model.query_feat.weight.shape[0] == 20
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected, found = small_model.eval()(images), model(images)
    torch.testing.assert_close(expected["pred_logits"], found["pred_logits"])


def test_torchs_default_loading_opens_it(saved):
    content = torch.load(saved)
    assert content["format"] == 1 and content["size"]["name"] == "small_test"
    assert isinstance(content["model"], dict)


def test_a_failed_save_keeps_the_old_file(saved, content):
    before = saved.read_bytes()

    class Unsaveable:
        def __reduce__(self):
            raise OSError("No space left on device")

    with pytest.raises(UserError, match="earlier file is kept"):
        checkpoint.save(saved, content | {"args": Unsaveable()})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["best.pt"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_cut_off_files_are_named(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="best.pt"):
        checkpoint.load(saved)


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("text.pt", "other.pt", "list.pt"):
        with pytest.raises(UserError, match=name):
            checkpoint.load(tmp_path / name)


def test_a_missing_file_names_its_neighbours(saved):
    with pytest.raises(UserError, match="there is no checkpoint.*best.pt"):
        checkpoint.load(saved.with_name("beast.pt"))


class Malicious:
    """Unpickled, this would run a command."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_file_with_code_in_it_is_refused_and_runs_nothing(tmp_path, content):
    target = tmp_path / "was_here"
    torch.save(content | {"args": Malicious(target)}, tmp_path / "evil.pt")
    (tmp_path / "evil_legacy.pt").write_bytes(pickle.dumps({"model": Malicious(target)}))
    for name in ("evil.pt", "evil_legacy.pt"):
        with pytest.raises(UserError, match=name):
            checkpoint.load(tmp_path / name)
    assert not target.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert target.exists()  # it would have


def test_another_format_is_refused(saved, content):
    checkpoint.save(saved, content | {"format": 99})
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(saved)


def test_a_wrong_size_names_the_right_one(saved):
    with pytest.raises(UserError, match="--size small_test") as error:
        checkpoint.require_size(checkpoint.load(saved), SIZES["tiny"], saved)
    assert "tensors differ" in str(error.value)


def test_missing_and_misshapen_tensors_are_named(content):
    del content["model"]["bbox_embed.0.layers.1.weight"]
    content["model"]["class_embed.0.bias"] = torch.zeros(7)
    with pytest.raises(UserError, match="2 tensors differ") as error:
        checkpoint.build_model(content)
    assert "bbox_embed.0.layers.1.weight" in str(error.value) and "class_embed.0.bias" in str(error.value)


def test_the_fingerprint_sees_one_bit_and_buffers(small_model):
    first = checkpoint.fingerprint(small_model)
    assert checkpoint.fingerprint(small_model) == first
    weight = small_model.class_embed[0].bias
    with torch.no_grad():
        weight.view(torch.int32)[0] ^= 1
    assert checkpoint.fingerprint(small_model) != first
    with torch.no_grad():
        weight.view(torch.int32)[0] ^= 1
    assert checkpoint.fingerprint(small_model) == first
    small_model.register_buffer("extra", torch.zeros(1))
    second = checkpoint.fingerprint(small_model)
    small_model.extra += 1
    assert checkpoint.fingerprint(small_model) != second
