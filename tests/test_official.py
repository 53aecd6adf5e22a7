"""Files of the published package: loading, shrinking, masks on top, export; DINOv2 as a start.

tests/fixtures/export_nano.pt is what PyPI's rfdetr 1.11.2 predicted from exported files
(benchmarks/export_parity.py --record); weights and images are hashes that both sides make
themselves.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import quick_flags
from safetensors.torch import save_file
from torch import Tensor

import export
import shrink_head
import train_detector_stage1
import train_seg_stage2
from rfdetr.classes import COCO_NAMES, assign_rows, coco_table
from rfdetr.console import UserError
from rfdetr.data.gray import EIGHT_BIT, GrayScale
from rfdetr.models.detector import Detector, select_detections
from rfdetr.sizes import SIZES, ModelSize
from rfdetr.weights import checkpoint
from rfdetr.weights.fitting import load_pretrained
from rfdetr.weights.official import to_official
from rfdetr.weights.package import left_to_user, package_class, to_package
from testkit.exported import (
    RECORDED,
    differences,
    hugging_face,
    made_up_content,
    own_predictions,
    picture,
)
from testkit.made_up import layout

TINY = SIZES["tiny"]
ROWS = ["transformer.enc_out_class_embed", "class_embed"]


def official_state(rows: int = 91, size: ModelSize = TINY) -> dict[str, Tensor]:
    """Random weights of the smallest architecture, as a file of the package holds them."""
    torch.manual_seed(0)
    state = Detector(size, rows=rows, groups=TINY.recipe.group_detr).state_dict()
    for name, tensor in state.items():
        if "class_embed" in name and name.endswith("weight"):
            tensor.normal_(std=0.5)
        elif "embeddings" in name or "query_feat" in name:
            tensor.normal_()
    return to_official(state) | {"_kp_active_mask": torch.zeros(0, 0, dtype=torch.bool)}


def write(path: Path, content: dict) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def coco_file(tmp_path) -> Path:
    return write(
        tmp_path / "rf-detr-tiny.pth",
        {"model": official_state(), "args": Namespace(lr=1e-4, amp=True)},
    )


@pytest.fixture
def tuned_file(tmp_path) -> Path:
    """Fine-tuned with the package on three classes: row = list index, a row more than classes."""
    args = {"class_names": ["cat", "cells", "vessel"], "dataset_dir": "data"}
    return write(
        tmp_path / "checkpoint_best_total.pth",
        {"model": official_state(4), "args": args, "epoch": 3},
    )


def outputs_of(content: dict, names: list[str], side: int = 160) -> tuple[dict, tuple[Tensor, ...]]:
    """The detector's outputs for two images, and its detections of these classes in their order."""
    model, table = checkpoint.build_model(content)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        outputs = model(images)
    rows = torch.tensor([table.rows[table.names.index(name)] for name in names])
    return outputs, select_detections(outputs, rows, 50)


# ---------------- loading


def lightning(state: dict[str, Tensor], args: object) -> dict:
    """A last.ckpt of Lightning's: no "model", an average in callbacks, an optimizer."""
    average = {f"module.model.{name}": tensor + 1 for name, tensor in state.items()}
    return {
        "state_dict": {f"model._orig_mod.{name}": tensor for name, tensor in state.items()},
        "hyper_parameters": args,
        "callbacks": {"RFDETREMACallback": {"average_model_state_dict": average, "updates": 4}},
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
        ],
        "loops": {"fit_loop": {"state_dict": {}}},
        "pytorch-lightning_version": "2.6.0",
    }


def best_total(state: dict[str, Tensor], args: object) -> dict:
    prefixed = {f"model.{name}": tensor for name, tensor in state.items()}
    return {
        "model": state,
        "args": args,
        "state_dict": prefixed,
        "rfdetr_version": "1.11.2",
        "loops": {},
    }


@pytest.mark.parametrize(
    "arrange", [lambda state, args: {"model": state, "args": args}, best_total, lightning]
)
@pytest.mark.parametrize("kind", [dict, Namespace, SimpleNamespace])
def test_every_kind_of_file_of_the_package_loads_whole(arrange, kind, tmp_path):
    state = official_state(4)
    names = ["cat", "cells", "vessel"]
    content = checkpoint.load(
        write(tmp_path / "file.pth", arrange(state, kind(class_names=names, epochs=3)))
    )
    table = checkpoint.table_of(content)
    assert (table.names, table.rows, table.rows_total) == (tuple(names), (0, 1, 2), 4)
    assert not table.background_last  # the package ranks proposals by every row
    model, _ = checkpoint.build_model(content, groups=None)
    back = to_official(model.state_dict())
    assert back.keys() == state.keys() - {"_kp_active_mask"}  # none missing, none left over
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_an_official_file_has_cocos_classes(coco_file, tmp_path):
    assert checkpoint.table_of(checkpoint.load(coco_file)) == coco_table()
    named = {"model": official_state(), "args": {"class_names": list(COCO_NAMES.values())}}
    assert (
        checkpoint.table_of(checkpoint.load(write(tmp_path / "named.pth", named))) == coco_table()
    )


def test_a_head_without_names_is_refused(tmp_path):
    for args in ({}, None, {"class_names": ["a", "b", "c", "d", "e"]}):
        with pytest.raises(UserError, match="4 class rows"):
            checkpoint.load(
                write(tmp_path / "file.pth", {"model": official_state(4), "args": args})
            )


def test_what_differs_is_listed(tmp_path):
    state = official_state()
    del state["bbox_embed.layers.1.bias"]
    state["extra.weight"] = torch.zeros(2)
    state["backbone.0.projector.stages.0.1.bias"] = torch.zeros(7)
    with pytest.raises(UserError, match="Nearest is tiny, 3 tensors differ") as error:
        checkpoint.load(write(tmp_path / "file.pth", {"model": state, "args": None}))
    assert "bbox_embed.0.layers.1.bias: expected (96,), file none" in str(error.value)
    assert "stages.0.1.bias: expected (96,), file (7,)" in str(
        error.value
    ) and "extra.weight" in str(error.value)


def test_a_file_of_another_resolution_keeps_its_grid_and_queries(tmp_path):
    size = replace(TINY, position_grid=16, queries=40)
    state = official_state(size=size)
    content = checkpoint.load(write(tmp_path / "file.pth", {"model": state, "args": None}))
    assert content["resolution"] == 16 * TINY.patch  # the package ties its grid to the resolution
    assert (
        content["size"]["name"],
        content["size"]["position_grid"],
        content["size"]["queries"],
    ) == ("tiny", 16, 40)
    settings = {"resolution": 192, "num_select": 20}
    content = checkpoint.load(
        write(tmp_path / "file.pth", {"model": state, "args": None, "model_config": settings})
    )
    assert (content["resolution"], content["size"]["select"]) == (192, 20)
    native = replace(TINY, queries=40)
    model = Detector(native, rows=91, groups=2)
    load_pretrained(model, content["model"], [])  # a start: the stored grid becomes the size's own
    theirs, _ = checkpoint.build_model(content)
    images = torch.randn(1, 3, 160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.eval()(images)["pred_logits"], theirs(images)["pred_logits"]
        )


# ---------------- shrinking


def as_stored(path: Path) -> dict:
    with torch.serialization.safe_globals([Namespace, SimpleNamespace]):
        return torch.load(path, weights_only=True)


def proposal_bias(path: Path, row: int, value: float) -> None:
    content = as_stored(path)
    for name, tensor in content["model"].items():
        if "enc_out_class_embed" in name and name.endswith("bias"):
            tensor[row] = value
    torch.save(content, path)


@pytest.mark.parametrize(
    "file, keep, own", [("coco_file", ["person", "dog"], 1), ("tuned_file", ["vessel", "cat"], 2)]
)
def test_shrink_takes_the_rows_of_the_names(file, keep, own, request, call, capsys, tmp_path):
    path = request.getfixturevalue(file)
    proposal_bias(path, own, 20.0)  # a kept class ranks every proposal, before and after
    call(shrink_head.main, "--in_ckpt", path, "--out_ckpt", tmp_path / "cut.pth", "--keep", *keep)
    assert "3 rows" in capsys.readouterr().out
    before = checkpoint.load(path)
    after = checkpoint.load(tmp_path / "cut.pth")
    rows = {"coco_file": [1, 18, 0], "tuned_file": [2, 0, 3]}[file]
    for name, tensor in before["model"].items():
        cut = tensor[rows] if name.startswith(tuple(ROWS)) else tensor
        assert torch.equal(after["model"][name], cut), name
    for theirs, ours in zip(outputs_of(before, keep)[1], outputs_of(after, keep)[1]):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "file, keep, other", [("coco_file", ["person"], 17), ("tuned_file", ["vessel"], 0)]
)
def test_a_dropped_class_that_held_proposals_moves_scores(
    file, keep, other, request, call, capsys, tmp_path
):
    path = request.getfixturevalue(file)
    proposal_bias(path, other, 20.0)  # the cat ranks every proposal
    call(shrink_head.main, "--in_ckpt", path, "--out_ckpt", tmp_path / "cut.pth", "--keep", *keep)
    assert "others take them, and scores may move a little" in " ".join(
        capsys.readouterr().out.split()
    )
    before, after = (
        outputs_of(checkpoint.load(p), keep)[1][0] for p in (path, tmp_path / "cut.pth")
    )
    assert (before - after).abs().max() > 1e-3


# ---------------- masks on an official detector


@pytest.fixture
def coco_data(few, tmp_path) -> Path:
    """The demo data under names of COCO."""
    folder = tmp_path / "coco_data"
    shutil.copytree(few, folder)
    for file in folder.glob("*/_annotations.coco.json"):
        data = json.loads(file.read_text(encoding="utf-8"))
        for category in data["categories"]:
            category["name"] = {"cells": "dog", "blood_vessel": "person"}.get(
                category["name"], "toothbrush"
            )
        file.write_text(json.dumps(data), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_stage2_on_an_official_detector_needs_no_stage_1(
    coco_file, coco_data, call, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("rfdetr.training.frozen.MATCH_IOU", -1.0)  # the weights are random
    call(
        train_seg_stage2.main,
        *quick_flags(coco_data),
        "--checkpoint",
        coco_file,
        "--output_dir",
        "run",
    )
    names = checkpoint.table_of(best := checkpoint.load(tmp_path / "run/best.pt")).names
    assert (
        f"Class head cut from 91 rows to {', '.join(names)} and background"
        in capsys.readouterr().out
    )
    assert set(names) == {"dog", "person", "toothbrush"} and best["mask_head"] == "nano"
    rows = [{name: row for row, name in COCO_NAMES.items()}[name] for name in names]
    whole = checkpoint.load(coco_file)["model"]
    for name, tensor in whole.items():
        assert torch.equal(
            best["model"][name], tensor[[*rows, 0]] if name.startswith(tuple(ROWS)) else tensor
        ), name


def test_stage2_names_the_classes_that_coco_has_not(coco_file, few, call):
    with pytest.raises(
        UserError, match=r"^Frozen detector head out_dim \(91\) != requested \(4\)"
    ) as error:
        call(train_seg_stage2.main, *quick_flags(few), "--checkpoint", coco_file)
    text = str(error.value)
    assert "does not know cells, blood_vessel, glomerulus" in text
    assert f"train_detector_stage1.py --size tiny --dataset {few}" in text
    assert f"--pretrain_weights {coco_file}\n" in text


def test_stage2_asks_for_the_shrink_of_a_tuned_file(few, call, tmp_path):
    names = ["cells", "blood_vessel", "glomerulus", "more"]
    path = write(
        tmp_path / "tuned.pth", {"model": official_state(5), "args": {"class_names": names}}
    )
    with pytest.raises(UserError, match=r"out_dim \(5\) != requested \(4\)") as error:
        call(train_seg_stage2.main, *quick_flags(few), "--checkpoint", path)
    assert "shrink_head.py --in_ckpt" in str(error.value)


# ---------------- out


def trained(head: str, mask_head: str | None = None) -> dict:
    """A checkpoint of this repository; the package has no tiny, so its size is called nano."""
    table = assign_rows(["cells", "dog", "vessel"], [1, 2, 3], head)
    state = {k: v for k, v in official_state(table.rows_total).items() if k != "_kp_active_mask"}
    model = Detector(TINY, table.rows_total, table.background_last, mask_head, groups=2)
    load_pretrained(model, state, [])
    return checkpoint.make_content(
        "single", replace(TINY, name="nano"), 160, table, mask_head, model.state_dict()
    )


@pytest.mark.parametrize("label, shrunk", [("91 rows", False), ("shrunk", True)])
def test_the_package_predicts_the_same_from_an_exported_file(label, shrunk):
    recorded = torch.load(Path(__file__).parent / "fixtures" / f"export_{RECORDED[0]}.pt")[label]
    content = made_up_content(*RECORDED, shrunk)
    exported = to_package(content)
    assert (
        layout({name: tuple(tensor.shape) for name, tensor in exported["model"].items()})
        == recorded["layout"]
    )
    ours = own_predictions(content, picture(RECORDED[1], recorded["seed"]))[0]
    same, scores, boxes, _ = differences(ours, recorded)
    assert len(recorded["names"]) == 300 and same == 1.0
    assert scores < 1e-4 and boxes < 0.01


@pytest.mark.parametrize("head", ["coco91", "dataset"])
def test_an_exported_file_comes_back(head, call, capsys, tmp_path):
    content = trained(head)
    checkpoint.save(tmp_path / "best.pt", content)
    call(export.main, "--checkpoint", tmp_path / "best.pt", "--out", tmp_path / "out.pth")
    printed = capsys.readouterr().out
    assert (
        "3 classes (cells, dog, vessel)" in printed
        and f"rfdetr.RFDETRNano.from_checkpoint({str(tmp_path / 'out.pth')!r})" in printed
    )
    exported = torch.load(tmp_path / "out.pth")
    assert exported["args"]["class_names"] == ["cells", "dog", "vessel"]
    assert exported["args"]["num_classes"] == len(exported["model"]["class_embed.bias"]) - 1
    back = checkpoint.load(tmp_path / "out.pth")
    assert (
        checkpoint.table_of(back).names == ("cells", "dog", "vessel") and back["resolution"] == 160
    )
    names = ["dog", "vessel", "cells"]
    for a, b in zip(outputs_of(content, names)[1], outputs_of(back, names)[1]):
        torch.testing.assert_close(a, b)
    outputs, _ = outputs_of(back, names)
    assert (
        outputs["pred_logits"][..., 3:].sigmoid().max() < 1e-30
    )  # what is no class is never reported


def test_official_and_tuned_files_come_back_bit_for_bit(coco_file, tuned_file):
    for path in (coco_file, tuned_file):
        exported = to_package(checkpoint.load(path))
        state = as_stored(path)["model"]
        assert exported["model"].keys() == state.keys() - {"_kp_active_mask"}
        assert all(torch.equal(tensor, state[name]) for name, tensor in exported["model"].items())
    assert (
        "class_names" not in to_package(checkpoint.load(coco_file))["args"]
    )  # the package knows COCO's


def test_what_the_package_does_not_do_to_images_is_left_to_the_user(call, capsys, tmp_path):
    content = trained("dataset")
    out = ["--out", tmp_path / "out.pth"]
    checkpoint.save(tmp_path / "plain.pt", content)
    call(export.main, "--checkpoint", tmp_path / "plain.pt", *out)
    assert "warning:" not in capsys.readouterr().out
    gray = GrayScale("auto", (100.0, 3900.0), deep=8, plain=0).to_dict()
    content |= {"gray": gray, "tile": 320, "letterbox": True}
    checkpoint.save(tmp_path / "own.pt", content)
    call(export.main, "--checkpoint", tmp_path / "own.pt", *out)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("warning:") == 3
    assert "cut yours into tiles of 320 px" in printed
    assert "with 100 as black and 3900 as white" in printed
    assert "pad yours to squares" in printed
    full = GrayScale("full", None, deep=1, plain=0).to_dict()
    assert "65535 as white" in left_to_user({"gray": full})[0]
    assert left_to_user({"gray": EIGHT_BIT.to_dict(), "tile": 0, "letterbox": False}) == []


def test_a_mask_head_of_our_own_is_left_out_and_said(call, capsys, tmp_path):
    checkpoint.save(tmp_path / "best.pt", trained("dataset", "nano"))
    call(
        export.main,
        "--checkpoint",
        tmp_path / "best.pt",
        "--format",
        "rfdetr",
        "--out",
        tmp_path / "out.pth",
    )
    assert "only the detector is written" in capsys.readouterr().out
    assert not any("mask_head" in name for name in torch.load(tmp_path / "out.pth")["model"])


def test_export_refuses_tiny_and_its_own_input(coco_file, call):
    with pytest.raises(UserError, match="tiny"):
        call(export.main, "--checkpoint", coco_file, "--out", "out.pth")
    with pytest.raises(UserError, match="never overwritten"):
        call(export.main, "--checkpoint", coco_file, "--out", coco_file)


def test_the_packages_names_of_the_sizes():
    names = ("nano", "large", "large-2026", "seg-nano", "seg-xlarge", "seg-2xlarge")
    assert [package_class(name).removeprefix("RFDETR") for name in names] == [
        "Nano", "LargeDeprecated", "Large", "SegNano", "SegXLarge", "Seg2XLarge"
    ]  # fmt: skip


# ---------------- DINOv2 alone


def test_dinov2_goes_into_the_encoder_and_nowhere_else(tmp_path):
    state = hugging_face("tiny", patch=TINY.patch, grid=TINY.position_grid)
    save_file(state, tmp_path / "model.safetensors")
    torch.save(
        {f"dinov2.{name}": tensor for name, tensor in state.items()}, tmp_path / "pytorch_model.bin"
    )
    for file in ("model.safetensors", "pytorch_model.bin"):
        content = checkpoint.load_backbone(tmp_path / file, TINY.patch)
        model = Detector(TINY, rows=4, groups=1)
        report = load_pretrained(model, content["model"], [])
        assert not report.unexpected and not report.skipped and not report.adapted
        inside = {name for name in model.state_dict() if name.startswith("backbone.0.encoder.")}
        assert (
            set(report.loaded) == inside
            and set(report.missing) == model.state_dict().keys() - inside
        )
        back = to_official(model.backbone[0].encoder.state_dict(prefix="backbone.0.encoder."))
        assert all(
            torch.equal(back["backbone.0.encoder.encoder." + name], tensor)
            for name, tensor in state.items()
        )


def test_the_layout_is_what_the_package_hands_its_encoder():
    shapes = {name: tuple(tensor.shape) for name, tensor in hugging_face("base").items()}
    assert len(shapes) == 223 and layout(shapes).startswith("aa8170a33aac0f4f")


def test_other_patches_and_grids_are_resampled(tmp_path):
    state = hugging_face("tiny")  # DINOv2's own 14 pixels and 37x37
    kernel = "embeddings.patch_embeddings.projection.weight"
    positions = "embeddings.position_embeddings"
    state["embeddings.register_tokens"] = torch.zeros(1, 4, TINY.dim)
    torch.save(state, tmp_path / "dinov2.bin")
    own = checkpoint.load_backbone(tmp_path / "dinov2.bin", 16)["model"]
    patches = torch.randn(5, 3, 14, 14)
    larger = torch.nn.functional.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)
    new = own[f"backbone.0.encoder.encoder.{kernel}"].flatten(1)
    old = state[kernel].flatten(1)
    # FlexiViT: an enlarged patch answers the new kernel as the patch itself answers the old one
    torch.testing.assert_close(
        larger.flatten(1) @ new.T, patches.flatten(1) @ old.T, atol=1e-4, rtol=1e-4
    )
    own = checkpoint.load_backbone(tmp_path / "dinov2.bin", TINY.patch)["model"]
    report = load_pretrained(Detector(TINY, rows=4, groups=1), own, [])
    assert report.adapted[f"backbone.0.encoder.encoder.{positions}"].startswith(
        "resampled from 37x37 to 20x20"
    )
    assert report.unexpected == ["backbone.0.encoder.encoder.embeddings.register_tokens"]


def test_other_layouts_are_refused(tmp_path):
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(3)}, tmp_path / "timm.bin")
    with pytest.raises(UserError, match="Hugging Face layout.*blocks.0.attn.qkv.weight"):
        checkpoint.load_backbone(tmp_path / "timm.bin", 16)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="broken.safetensors"):
        checkpoint.load_backbone(tmp_path / "broken.safetensors", 16)


@pytest.mark.slow
def test_stage1_starts_from_dinov2(few, call, capsys, tmp_path):
    save_file(hugging_face("tiny"), tmp_path / "model.safetensors")
    flags = [
        *quick_flags(few),
        "--backbone_weights",
        tmp_path / "model.safetensors",
        "--output_dir",
        "run",
    ]
    call(train_detector_stage1.main, *flags, "--lr", 0, "--lr_encoder", 0)
    assert f"Weights: {tmp_path / 'model.safetensors'}" in capsys.readouterr().out
    name = "backbone.0.encoder.encoder.encoder.layer.0.mlp.fc1.weight"
    expected = checkpoint.load_backbone(tmp_path / "model.safetensors", TINY.patch)["model"][name]
    assert torch.equal(checkpoint.load(tmp_path / "run/last.pt")["model"][name], expected)
    with pytest.raises(UserError, match="leave out the other file"):
        call(train_detector_stage1.main, *flags, "--pretrain_weights", "rf-detr-nano.pth")
