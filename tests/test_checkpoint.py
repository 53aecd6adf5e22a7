"""Checkpoints: whole or not at all, safe to open, and enough to rebuild the model."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from rfdetr.classes import assign_rows
from rfdetr.console import UserError
from rfdetr.models.detector import Detector
from rfdetr.models.segmentation import HeadForm
from rfdetr.sizes import SIZES
from rfdetr.weights import archive, checkpoint
from train_seg_single_stage import form_of_head


@pytest.fixture
def content(small_size, small_model) -> dict:
    table = assign_rows(["a", "b", "c", "d"], [1, 2, 3, 4], "dataset")
    return checkpoint.make_content(
        "single", small_size, 64, table, "nano", small_model.state_dict()
    )


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
        expected = small_model.eval()(images)
        found = model(images)
    for key in ("pred_logits", "pred_boxes", "queries", "features"):
        assert torch.equal(expected[key], found[key])


def test_inference_needs_one_group_of_queries_alone(saved, small_model):
    model, _ = checkpoint.build_model(checkpoint.load(saved))
    assert model.query_feat.weight.shape[0] == 10 and small_model.query_feat.weight.shape[0] == 20
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = small_model.eval()(images)
        found = model(images)
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
    assert "bbox_embed.0.layers.1.weight" in str(error.value) and "class_embed.0.bias" in str(
        error.value
    )


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


# ---------------- values that no sound checkpoint has


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["model", "ema", "optimizer"])
def test_nan_and_infinite_weights_are_refused_by_name(value, where, content, tmp_path):
    content["ema"] = {name: tensor.clone() for name, tensor in content["model"].items()}
    content["training"] = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
    name = "class_embed.0.bias"
    tensor = (
        content[where][name]
        if where != "optimizer"
        else content["training"]["optimizer"]["state"][0]["exp_avg"]
    )
    with torch.no_grad():
        tensor[-1] = value
    checkpoint.save(tmp_path / "last.pt", content)
    with pytest.raises(UserError, match="NaN or infinite values in 1 tensors") as error:
        checkpoint.load(tmp_path / "last.pt")
    message = str(error.value)
    assert "last.pt" in message and (name if where != "optimizer" else "exp_avg") in message
    assert "diverged" in message and "best.pt" in message and "--lr" in message


def test_official_files_and_backbones_with_nan_are_refused_too(tmp_path):
    from rfdetr.models.detector import Detector
    from rfdetr.weights.official import to_official

    state = to_official(Detector(SIZES["tiny"], rows=91).state_dict())
    state["class_embed.weight"][3, 3] = float("nan")
    torch.save({"model": state}, tmp_path / "official.pth")
    with pytest.raises(
        UserError, match=r"official.pth holds NaN .* \(model.class_embed.0.weight\)"
    ):
        checkpoint.load(tmp_path / "official.pth")
    torch.save(
        {"encoder.layer.0.norm1.weight": torch.tensor([float("inf")])}, tmp_path / "dino.bin"
    )
    with pytest.raises(UserError, match="dino.bin holds NaN or infinite"):
        checkpoint.load_backbone(tmp_path / "dino.bin", 16)


@pytest.mark.parametrize(
    "own, asked, expected", [(640, None, 640), (4096, None, None), (4096, 64, 64), (64, 4096, 4096)]
)
def test_a_side_beyond_the_position_grid_is_only_taken_when_asked_for(
    own, asked, expected, content
):
    content["resolution"] = own
    if expected:
        assert checkpoint.input_side(content, asked, Path("x.pt")) == expected
    else:
        with pytest.raises(
            UserError, match="x.pt asks for 4096 x 4096 .* grid is for 160 x 160.*--resolution 4096"
        ):
            checkpoint.input_side(content, asked, Path("x.pt"))


# ---------------- archives and files that are not what they seem


def repacked(
    source: Path, target: Path, packing: int = zipfile.ZIP_STORED, more: dict | None = None
) -> Path:
    """The same records once more, and others, in an archive that zipfile writes."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", packing) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
        for name, data in (more or {}).items():
            new.writestr(name, data)
    return target


def test_archives_that_are_packed_are_refused(saved):
    packed = repacked(saved, saved.with_name("packed.pt"), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="packed.pt.*unpack to more than it is"):
        checkpoint.load(packed)
    checkpoint.load(repacked(saved, saved.with_name("stored.pt")))  # as it is, without 64-bit sizes


@pytest.mark.parametrize("tail", ["zeros", "comment", "second archive"])
@pytest.mark.parametrize("count", [1, 22, 5000, 66_000])
def test_bytes_after_a_packed_archive_do_not_hide_it(tail, count, saved, monkeypatch):
    packed = repacked(
        saved,
        saved.with_name("packed.pt"),
        zipfile.ZIP_DEFLATED,
        {"archive/data/big": bytes(10**6)},
    )
    data = packed.read_bytes()
    harmless = repacked(saved, saved.with_name("harmless.zip"))
    if tail == "zeros":
        data += bytes(count)
    elif tail == "comment":
        data = data[:-2] + struct.pack("<H", min(count, 65535)) + bytes(min(count, 65535))
    else:
        data += bytes(count) + harmless.read_bytes()
    packed.write_bytes(data)
    monkeypatch.setattr(
        torch, "load", lambda *args, **named: pytest.fail("torch's reader was asked")
    )
    with pytest.raises(UserError, match="packed.pt is damaged or no checkpoint"):
        checkpoint.load(packed)


def test_bytes_before_an_archive_are_refused(saved):
    saved.write_bytes(b"PK\3\4" + bytes(60) + saved.read_bytes())
    with pytest.raises(UserError, match="best.pt is damaged or no checkpoint"):
        checkpoint.load(saved)


def test_a_directory_that_only_the_64_bit_record_names_is_refused(saved):
    """The two ends of an archive disagree about where its directory is: readers would, too."""
    data = bytearray(saved.read_bytes())
    assert data[-42:-38] == b"PK\6\7"  # torch writes both
    data[-34:-26] = struct.pack("<Q", len(data) // 2)
    saved.write_bytes(data)
    with pytest.raises(UserError, match="best.pt is damaged or no checkpoint"):
        checkpoint.load(saved)


def test_a_pickle_that_claims_more_than_it_has_takes_no_memory(content, tmp_path):
    torch.save(
        {"model": {"a": torch.zeros(3)}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )
    data = (tmp_path / "old.pt").read_bytes()
    assert data.count(b"K\x03") >= 2
    (tmp_path / "old.pt").write_bytes(data.replace(b"K\x03", b"J\0\0\0\x40"))  # 2**30 numbers
    with pytest.raises(UserError, match="old.pt"):
        checkpoint.load(tmp_path / "old.pt")


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(saved, monkeypatch):
    other = saved.with_name("other.pt")
    shutil.copy(saved, other)
    saved.write_bytes(saved.read_bytes()[:5000])  # what another program has written of it so far
    load = torch.load
    calls = []

    def replaced(*args, **named):
        calls.append(1)
        return load(*args, **named)

    require = archive._require_stored

    def judge(file):
        if other.exists():
            os.replace(other, saved)
        require(file)

    monkeypatch.setattr(archive, "_require_stored", judge)
    monkeypatch.setattr(torch, "load", replaced)
    assert checkpoint.load(saved)["format"] == 1 and len(calls) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_a_pipe_or_device_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{path} is a pipe, a socket or a device"):
            checkpoint.load(path)
        with pytest.raises(UserError, match=f"{path} is a pipe, a socket or a device"):
            checkpoint.load_backbone(path, 16)


def test_mask_heads_of_earlier_versions_are_built_as_they_were(small_size, content, tmp_path):
    """Their files name no stride and no light: it was 4, and as the detector's images."""
    torch.manual_seed(0)
    old = Detector(
        small_size, rows=5, background=True, mask_head="nano", mask_form=HeadForm(4, False)
    ).eval()
    earlier = content | {"model": old.state_dict()}
    del earlier["mask_stride"], earlier["mask_standardise"]
    checkpoint.save(tmp_path / "old.pt", earlier)
    model, _ = checkpoint.build_model(checkpoint.load(tmp_path / "old.pt"), groups=None)
    features = torch.randn(1, small_size.hidden, 8, 8)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        pixels = model.mask_head.pixels(features, images)
        assert pixels.shape[-2:] == (16, 16)
        assert torch.equal(pixels, old.mask_head.pixels(features, images))
    shrunk = checkpoint.shrink(checkpoint.load(tmp_path / "old.pt"), ["a", "b"])
    assert checkpoint.mask_form(shrunk) == HeadForm(4, standardise=False)
    assert checkpoint.mask_form(content) == HeadForm(1, standardise=True)


def test_a_single_stage_keeps_the_mask_head_that_it_starts_from(content):
    size = SIZES["tiny"]
    assert form_of_head(size, content | {"mask_stride": 4}) == HeadForm(4)
    earlier = content | {"mask_stride": 2, "mask_standardise": False}
    assert form_of_head(size, earlier) == HeadForm(2, standardise=False)
    assert form_of_head(size, None) == HeadForm(1)
    assert form_of_head(size, earlier | {"mask_head": "official"}) == HeadForm(1)


@pytest.mark.parametrize("form", [{"mask_stride": 3}, {"mask_standardise": "yes"}])
def test_a_mask_head_of_an_unknown_form_is_refused(content, tmp_path, form):
    checkpoint.save(tmp_path / "odd.pt", content | form)
    with pytest.raises(UserError, match="form"):
        checkpoint.load(tmp_path / "odd.pt")
