"""Names both ways, loading what fits, and the published package's own numbers.

tests/fixtures/ holds what PyPI's rfdetr 1.11 computed (benchmarks/parity.py --record); weights and
images are hashes that both sides make themselves, so these tests need neither the package nor its
weights.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from rfdetr.console import UserError
from rfdetr.models.detector import Detector
from rfdetr.sizes import SIZES
from rfdetr.weights.fitting import load_pretrained
from rfdetr.weights.official import from_official, official_names, to_official
from testkit.made_up import layout
from testkit.official import (
    RECORDED,
    build_own,
    error,
    own_values,
    projections,
    same_matches,
    sample,
)

FIXTURES = Path(__file__).parent / "fixtures"
OFFICIAL = [name for name, size in SIZES.items() if size.weights_url]
TINY = SIZES["tiny"]
BLOCK = "backbone.0.encoder.encoder.encoder.layer.3."


def meta_state(size: str, groups: int | None = None) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        masks = "official" if SIZES[size].mask_head == "official" else None
        return Detector(SIZES[size], rows=91, groups=groups, mask_head=masks).state_dict()


def tiny(rows: int = 91, groups: int = 3, mask_head: str | None = None) -> Detector:
    return Detector(TINY, rows=rows, groups=groups, mask_head=mask_head)


def tiny_file(rows: int = 91, groups: int = 3) -> dict[str, torch.Tensor]:
    """An official-looking file for the smallest architecture, with numbers in every tensor."""
    state = tiny(rows, groups).state_dict()
    return to_official({name: torch.randn(tensor.shape) for name, tensor in state.items()})


# ---------------- the package's numbers


@pytest.mark.parametrize("size, resolution, train", RECORDED)
def test_same_numbers_as_the_published_package(size, resolution, train):
    recorded = torch.load(FIXTURES / f"{size}_{resolution}.pt")
    shapes = {name: tuple(tensor.shape) for name, tensor in to_official(meta_state(size)).items()}
    assert layout(shapes) == recorded["layout"]  # every official tensor, no other
    theirs = recorded["values"]
    ours = own_values(build_own(size, shapes), resolution, theirs)
    assert ours["order agreement"] > 0.95
    compared = set()
    for name, value in theirs.items():
        if "/" in name:
            assert error(name, sample(ours[name], 256), value) < 2e-5, name
            compared.add(name.split("/")[0])
    assert {"encoder", "projector", "eval logits", "eval boxes"} <= compared
    assert ("eval masks" in compared) == size.startswith("seg-")
    assert error("found scores", sample(ours["found scores"], 256), theirs["found scores"]) < 2e-5
    # near-equal scores swap: compared by share
    assert (ours["found labels"] == theirs["found labels"]).float().mean() > 0.95
    if "found area" in theirs:
        area = ours["found masks"].sum((-3, -2, -1))
        assert ((area - theirs["found area"]).abs() <= 1).float().mean() > 0.95
    if train:
        assert {"train logits", "train boxes", "loss"} <= compared
        assert same_matches(ours["matches"], theirs["matches"])
        gradients = {name for name in ours if name.startswith("gradient/")}
        assert gradients == recorded["gradients"].keys()
        for name, expected in recorded["gradients"].items():
            # sampling points on a cell's edge turn their gradient with the last bit: no closer than
            # this
            assert projections(name, ours[name]) == pytest.approx(
                expected, abs=0.01 * expected[0] + 1e-9
            ), name


# ---------------- names


@pytest.mark.parametrize("size", OFFICIAL)
def test_names_go_both_ways_without_loss(size):
    ours = meta_state(size)
    official = to_official(ours)
    assert "class_embed.weight" in official and "bbox_embed.layers.0.weight" in official
    assert not [
        name
        for name in official
        if re.search(r"qkv|ls\d|attn\.proj|class_embed\.0\.w", name.split("enc_out")[0])
    ]
    back = from_official(official)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in ours.items()}
    assert to_official(back).keys() == official.keys()
    assert from_official(ours).keys() == ours.keys()  # ours stay as they are


def test_tensors_survive_both_ways_bit_for_bit():
    file = tiny_file()
    back = to_official(
        from_official(file | {"_kp_active_mask": torch.zeros(0, 0, dtype=torch.bool)})
    )
    assert back.keys() == file.keys()
    assert all(torch.equal(back[name], file[name]) for name in file)


def test_unknown_names_pass_untouched():
    odd = {
        "something.else": torch.zeros(1),
        "mask_head.out.weight": torch.zeros(2),
        BLOCK + "attention.attention.query.weight": torch.zeros(
            3, 3
        ),  # its key and value are not there
        "class_embed_projection.weight": torch.zeros(4),
    }
    assert from_official(odd) == odd
    assert from_official(to_official(odd)) == odd


def test_the_official_names_of_a_tensor():
    assert official_names("class_embed.0.weight") == ["class_embed.weight"]
    assert official_names("query_feat.weight") == ["query_feat.weight"]
    assert official_names(BLOCK + "attn.qkv.bias") == [
        BLOCK + f"attention.attention.{part}.bias" for part in ("query", "key", "value")
    ]
    assert official_names(BLOCK + "ls2.gamma") == [BLOCK + "layer_scale2.lambda1"]
    assert official_names(BLOCK + "attn.proj.weight") == [BLOCK + "attention.output.dense.weight"]


# ---------------- loading


def test_everything_loads_and_says_so():
    file = tiny_file()
    model = tiny()
    report = load_pretrained(model, file, [])
    assert set(report.loaded) == set(model.state_dict())
    assert (
        report.summary() == f"Pretrained weights: {len(model.state_dict())} tensors loaded, "
        "0 left at their initial value"
    )
    expected = from_official(file)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "glob, left_out",
    [
        ("backbone.0.projector.*", "backbone.0.projector.stages.0.0.cv1.conv.weight"),
        ("class_embed.weight", "class_embed.0.weight"),
        ("class_embed.0.*", "class_embed.0.bias"),
        ("*.layer_scale1.*", BLOCK.replace(".3.", ".1.") + "ls1.gamma"),
        ("*.attn.qkv.weight", BLOCK.replace(".3.", ".1.") + "attn.qkv.weight"),
        ("*attention.key.weight", BLOCK.replace(".3.", ".1.") + "attn.qkv.weight"),
    ],
)
def test_globs_meet_both_names(glob, left_out):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_pretrained(model, tiny_file(), [glob])
    assert left_out in report.excluded and not report.unmatched and not report.missing
    assert set(report.loaded) | set(report.excluded) == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name in report.excluded)
    assert f"excluded, {len(report.excluded)}: " in report.summary()


def test_a_glob_that_matches_nothing_is_named():
    report = load_pretrained(tiny(), tiny_file(), ["backbone.projector.*"])
    assert report.unmatched == ["backbone.projector.*"]
    assert "patterns that match nothing, 1: backbone.projector.*" in report.summary()


def test_what_does_not_fit_is_skipped_with_both_shapes():
    model = tiny(rows=4, mask_head="nano")
    report = load_pretrained(model, tiny_file() | {"ema.decay": torch.zeros(1)}, [])
    assert set(report.skipped) == {name for name in model.state_dict() if "class_embed" in name}
    assert set(report.missing) == {
        name for name in model.state_dict() if name.startswith("mask_head.")
    }
    assert report.unexpected == ["ema.decay"]
    text = report.summary()
    assert (
        f"class_embed.0.weight (the file has (91, {TINY.hidden}), the model (4, {TINY.hidden}))"
        in text
    )
    assert (
        f"not in the file, {len(report.missing)}: mask_head." in text
        and "only in the file, unused, 1: ema.decay" in text
    )


@pytest.mark.parametrize("in_file, in_model", [(3, 1), (1, 3)])
def test_other_numbers_of_groups_share_the_first_ones(in_file, in_model):
    file = tiny_file(groups=in_file)
    model = tiny(groups=in_model)
    before = model.refpoint_embed.weight.detach().clone()
    report = load_pretrained(model, file, [])
    both = TINY.queries * min(in_file, in_model)
    assert torch.equal(model.refpoint_embed.weight[:both], file["refpoint_embed.weight"][:both])
    assert torch.equal(model.refpoint_embed.weight[both:], before[both:])
    assert torch.equal(
        model.transformer.enc_output[0].weight, file["transformer.enc_output.0.weight"]
    )
    assert (
        set(report.adapted) == {"refpoint_embed.weight", "query_feat.weight"} and not report.skipped
    )
    assert not report.unexpected
    assert all(re.search(r"enc_out\w*\.[12]\.", name) for name in report.missing)
    assert f"the first 1 of {in_file} groups" in report.summary()


def test_fewer_queries_are_taken_from_every_group():
    file = tiny_file(groups=3)
    model = Detector(dataclasses.replace(TINY, queries=40), rows=91, groups=3)
    load_pretrained(model, file, [])
    wanted = file["query_feat.weight"].view(3, TINY.queries, -1)[:, :40]
    assert torch.equal(model.query_feat.weight.view(3, 40, -1), wanted)


def test_a_position_grid_of_another_side_is_resampled():
    name = "backbone.0.encoder.encoder.embeddings.position_embeddings"
    file = tiny_file()
    model = tiny()
    theirs = TINY.position_grid + 4
    ours = TINY.position_grid
    dim = TINY.dim
    file[name] = torch.cat(
        (torch.full((1, 1, dim), 5.0), torch.full((1, theirs**2, dim), 2.0)), dim=1
    )
    report = load_pretrained(model, file, [])
    assert (
        report.adapted[name]
        == f"resampled from {theirs}x{theirs} to {ours}x{ours} patches, bicubic"
    )
    got = model.state_dict()[name]
    torch.testing.assert_close(got[:, 0], torch.full((1, dim), 5.0))
    torch.testing.assert_close(got[:, 1:], torch.full((1, ours**2, dim), 2.0))


def test_weights_of_another_architecture_are_refused():
    with pytest.raises(UserError, match="--pretrain_weights none"):
        load_pretrained(tiny(), {"layers.0.weight": torch.zeros(3)}, [])
    with pytest.raises(UserError, match="the file is empty"):
        load_pretrained(tiny(), {}, [])
