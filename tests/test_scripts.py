"""The scripts as a user runs them: their files, what they say, and that stages fit together."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import train_flags

import predict
import shrink_head
import train_seg_stage2
from rfdetr.console import UserError
from rfdetr.console import run_script as as_a_script

pytestmark = pytest.mark.slow

COMMON_FILES = {
    "best.pt",
    "config.yaml",
    "last.pt",
    "checkpoint.pt",
    "metrics.json",
    "tb",
    "log.txt",
    "predictions",
}
COCO_FIGURES = {
    "mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large", "per_class",
}  # fmt: skip
CLASSES = ["cells", "blood_vessel", "glomerulus"]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def metrics_of(folder: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)


def load(path: Path) -> dict:
    return torch.load(path)  # with torch's own defaults, as a user would


def without_times(metrics: dict) -> list[dict]:
    """The epochs' records without what a clock or the memory says."""
    measured = {"images_per_s", "data_s", "compute_s", "epoch_s", "evaluation_s", "peak_memory_mb"}
    return [
        epoch
        | {"train": {name: value for name, value in epoch["train"].items() if name not in measured}}
        for epoch in metrics["epochs"]
    ]


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- stage 1


def test_stage1_leaves_the_files_of_the_specification(stage1, shrunk):
    extra = {"checkpoint_best_regular.pth", "checkpoint_best_ema.pth"}
    assert names_in(stage1.folder) - {shrunk.folder.name} == COMMON_FILES | extra
    assert [p.suffix for p in (stage1.folder / "predictions").iterdir()] == [".png"] * 4
    assert any("tfevents" in name for name in names_in(stage1.folder / "tb"))


def check_metrics(metrics: dict, stage: str, kinds: list[str], losses: list[str]) -> None:
    top = {
        "format",
        "stage",
        "size",
        "resolution",
        "class_names",
        "args",
        "environment",
        "commands",
        "epochs",
        "best",
    }
    assert metrics.keys() - {"test"} == top
    assert (metrics["format"], metrics["stage"], metrics["size"], metrics["resolution"]) == (
        1,
        stage,
        "tiny",
        64,
    )
    assert metrics["class_names"] == CLASSES
    assert {"torch", "device", "cpu", "os", "commit"} <= metrics["environment"].keys()
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2]
    measured = [
        "loss",
        "lr",
        "grad_norm",
        "images_per_s",
        "data_s",
        "compute_s",
        "epoch_s",
        "peak_memory_mb",
    ]
    for epoch in metrics["epochs"]:
        for name in measured + losses:
            assert isinstance(epoch["train"][name], float), name
        for key in ("valid", "valid_ema"):
            check_scores(epoch[key], kinds)
    best = metrics["best"]
    assert (
        best.keys() == {"epoch", "metric", "value", "weights"}
        and best["metric"] == f"{kinds[-1]}/mAP"
    )
    key = "valid" if best["weights"] == "regular" else "valid_ema"
    assert metrics["epochs"][best["epoch"] - 1][key][kinds[-1]]["mAP"] == best["value"]
    values = [e[k][kinds[-1]]["mAP"] for e in metrics["epochs"] for k in ("valid", "valid_ema")]
    assert best["value"] == max(values)


def check_scores(scores: dict, kinds: list[str]) -> None:
    assert scores.keys() == set(kinds) | ({"mask"} if "segm" in kinds else set())
    for kind in kinds:
        assert scores[kind].keys() == COCO_FIGURES
        assert list(scores[kind]["per_class"]) == CLASSES
        figures = [value for name, value in scores[kind].items() if name != "per_class"]
        figures += [value for one in scores[kind]["per_class"].values() for value in one.values()]
        assert all(value is None or 0 <= value <= 1 for value in figures)
        assert scores[kind]["mAP_large"] is None  # the demo's small pictures have no large object
    if "segm" in kinds:
        assert scores["mask"].keys() == {"giou", "ciou", "dice"}


def test_stage1_metrics_have_the_given_form(stage1):
    losses = ["loss_class", "loss_box", "loss_giou", "loss_class_enc", "loss_class_0"]
    check_metrics(metrics_of(stage1.folder), "detector", ["bbox"], losses)


def test_stage1_console_says_where_everything_is(stage1):
    for line in (
        "STAGE 1: DETECTOR TRAINING",
        "Model Size:",
        "Resolution:",
        "Epochs:",
        "Device:",
        "Dataset:",
        "Output:",
    ):
        assert line in stage1.output
    log = (stage1.folder / "log.txt").read_text(encoding="utf-8")
    assert "STAGE 1: DETECTOR TRAINING" in log and "epoch 2/2" in log
    assert "shrink_head.py" in stage1.output.splitlines()[-1]


def test_stage1_trains_on_free_rows_of_the_coco_head(stage1):
    content = load(stage1.folder / "best.pt")
    assert content["model"]["class_embed.0.weight"].shape[0] == 91
    assert content["classes"]["names"] == CLASSES and content["classes"]["rows"] == [12, 26, 29]
    assert content["classes"]["background"] == 0
    assert (content["size"]["name"], content["resolution"]) == ("tiny", 64)


def test_every_checkpoint_opens_with_torchs_safe_loading(stage1, stage2, single):
    for folder in (stage1.folder, stage2.folder, single.folder):
        files = [p for p in folder.iterdir() if p.suffix in (".pt", ".pth")]
        assert len(files) >= 3
        for path in files:
            assert torch.load(path, weights_only=True)["format"] == 1


def test_best_pt_holds_the_best_weights_and_no_optimizer(stage1):
    best = metrics_of(stage1.folder)["best"]
    content = load(stage1.folder / "best.pt")
    assert "training" not in content and content["weights"] == best["weights"]
    same = load(stage1.folder / f"checkpoint_best_{best['weights']}.pth")
    assert same_tensors(content["model"], same["model"])


# ---------------------------------------------------------------- shrink


def test_shrunk_head_has_n_plus_one_rows_bit_for_bit(stage1, shrunk):
    old = load(stage1.folder / "best.pt")["model"]
    new = load(shrunk.folder)["model"]
    assert load(shrunk.folder)["model"]["class_embed.0.weight"].shape[0] == 4
    rows = [29, 12, 26, 0]  # in the order of --keep, the free row 0 last
    heads = [name for name in old if "class_embed" in name]
    assert len(heads) == 4  # decoder and proposals, weight and bias
    for name in old:
        expected = old[name][rows] if name in heads else old[name]
        assert torch.equal(new[name], expected), name
    assert "Output dim: 4" in shrunk.output


def test_the_verify_command_prints_the_output_dim(shrunk, capsys):
    weight = f'torch.load({str(shrunk.folder)!r})["model"]["class_embed.0.weight"]'
    code = f'import torch; print("Output dim:", {weight}.shape[0])'
    exec(code, {})
    assert capsys.readouterr().out.strip() == "Output dim: 4"


def test_shrink_tells_rows_and_the_better_weights(stage1, shrunk):
    assert re.search(r"glomerulus +29 +0\n", shrunk.output) and re.search(
        r"\(background\) +0 +3\n", shrunk.output
    )
    best = metrics_of(stage1.folder)["best"]
    assert f"the {best['weights']} weights scored higher" in shrunk.output


def error_of(call, capsys, main, *words: object) -> str:
    """What a script that ends with exit status 2 says."""
    with pytest.raises(SystemExit) as left:
        call(lambda argv: as_a_script(main, argv), *words)
    said = capsys.readouterr().err
    assert left.value.code == 2 and "Traceback" not in said
    return said


def test_shrink_names_the_near_matches_of_a_wrong_name(stage1, call, capsys):
    files = ["--in_ckpt", stage1.folder / "best.pt", "--out_ckpt", "not_written.pth"]
    said = error_of(call, capsys, shrink_head.main, *files, "--keep", "cell", "vessel")
    assert not Path("not_written.pth").exists()
    assert "'cell' (did you mean 'cells'" in said
    assert "'vessel' (did you mean 'blood_vessel'" in said


def test_shrinking_a_resumable_file_cuts_its_average_too(stage1, call, capsys):
    call(shrink_head.main, "--in_ckpt", stage1.folder / "last.pt", "--out_ckpt", "small.pth")
    old = load(stage1.folder / "last.pt")
    new = load(Path("small.pth"))
    for key in ("model", "ema"):
        for name in ("class_embed.0.weight", "transformer.enc_out_class_embed.0.bias"):
            assert torch.equal(new[key][name], old[key][name][[12, 26, 29, 0]])
    assert "training" not in new


def test_shrink_never_overwrites_its_input(stage1, call):
    path = stage1.folder / "best.pt"
    before = path.read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        call(shrink_head.main, "--in_ckpt", path, "--out_ckpt", path)
    assert path.read_bytes() == before


# ---------------------------------------------------------------- stage 2


def test_stage2_leaves_the_files_of_the_specification(stage2):
    assert names_in(stage2.folder) == COMMON_FILES | {"stage2_config.json"}
    check_metrics(
        metrics_of(stage2.folder), "segmentation", ["bbox", "segm"], ["loss_mask", "loss_dice"]
    )
    check_scores(metrics_of(stage2.folder)["test"], ["bbox", "segm"])


def test_stage2_keeps_the_detector_bit_for_bit(stage2, shrunk):
    detector = load(shrunk.folder)["model"]
    for name in ("best.pt", "last.pt"):
        state = load(stage2.folder / name)["model"]
        assert {key for key in state if not key.startswith("mask_head.")} == detector.keys()
        assert all(torch.equal(state[key], detector[key]) for key in detector)
    trained = load(stage2.folder / "last.pt")["training"]
    assert all(not key.startswith(("backbone", "transformer")) for key in trained["trained"])
    head = sum(p.numel() for p in trained["trained"].values())
    moments = sum(p["exp_avg"].numel() for p in trained["optimizer"]["state"].values())
    assert moments == head  # no optimizer state for the detector


def test_stage2_trains_the_mask_head(stage2):
    epochs = metrics_of(stage2.folder)["epochs"]
    assert epochs[1]["train"]["loss"] < epochs[0]["train"]["loss"]


def test_stage2_knows_classes_by_name_in_the_checkpoints_order(stage2):
    """The dataset's labels are in another order than the shrunk file's rows."""
    content = load(stage2.folder / "best.pt")
    rows = dict(zip(content["classes"]["names"], content["classes"]["rows"]))
    assert rows == {"glomerulus": 0, "cells": 1, "blood_vessel": 2}
    assert list(metrics_of(stage2.folder)["epochs"][0]["valid"]["bbox"]["per_class"]) == CLASSES


def test_stage2_scores_its_detector_as_stage1_did(stage1, stage2):
    """Dropping unused rows and reordering the others changes nothing that is measured."""
    best = metrics_of(stage1.folder)["best"]["value"]
    found = metrics_of(stage2.folder)["epochs"][0]["valid"]["bbox"]["mAP"]
    assert found == pytest.approx(best, abs=0.02)


def test_stage2_config_says_what_was_frozen(stage2, shrunk):
    import hashlib

    config = json.loads((stage2.folder / "stage2_config.json").read_text(encoding="utf-8"))
    assert config["detector_sha256"] == hashlib.sha256(shrunk.folder.read_bytes()).hexdigest()
    assert Path(config["detector_file"]) == shrunk.folder
    assert config["mask_head"] == "nano" and config["cache"] == "disk" and config["class_names"]
    state = load(stage2.folder / "best.pt")["model"]
    head = sum(t.numel() for name, t in state.items() if name.startswith("mask_head."))
    assert config["parameters"]["mask_head"] == head
    assert config["parameters"]["detector"] == sum(t.numel() for t in state.values()) - head
    assert (config["epochs"], config["batch"], config["seed"]) == (2, 2, 0)


def test_stage2_console(stage2, shrunk):
    for text in (
        "STAGE 2: SEGMENTATION HEAD TRAINING",
        f"✓ Found Stage-1 checkpoint: {shrunk.folder}",
        "✓ Validated: 10/10 sample annotations contain segmentation masks",
        "test split",
    ):
        assert text in stage2.output
    assert re.search(r"✓ Detector frozen: [\d,]+ parameters", stage2.output)
    assert re.search(r"✓ Segmentation head trainable: [\d,]+ parameters", stage2.output)


def test_the_unshrunk_message_and_the_command_in_it(demo, stage1, shrunk, call, capsys, tmp_path):
    run = shutil.copytree(stage1.folder, tmp_path / "run")
    (run / shrunk.folder.name).unlink()
    flags = [*train_flags(demo), "--stage1_run", run]
    said = error_of(call, capsys, train_seg_stage2.main, *flags).strip().splitlines()
    assert "Frozen detector head out_dim (91) != requested (4)" in said[0]
    words = shlex.split(next(line for line in said if "shrink_head.py" in line))
    assert words[:2] == ["python", "shrink_head.py"]
    target = Path(words[words.index("--out_ckpt") + 1])
    call(shrink_head.main, *words[2:])
    assert load(target)["classes"]["names"] == CLASSES
    assert load(target)["model"]["class_embed.0.weight"].shape[0] == 4


def test_the_commands_to_type_next_work(stage2, call, tmp_path):
    """Every line after 'Next:' can be pasted as it stands."""
    shutil.copytree(stage2.folder, tmp_path / "runs" / stage2.folder.name)
    words = shlex.split(stage2.output.splitlines()[-1].removeprefix("Next:"))
    assert words[:2] == ["python", "predict.py"]
    call(predict.main, *words[2:], "--threshold", "0.9")
    output = tmp_path / words[words.index("--output") + 1]
    assert len(list(output.glob("*.png"))) == 6 and (output / "predictions.json").exists()


# ---------------------------------------------------------------- single stage


def test_single_stage_leaves_the_files_of_the_specification(single):
    assert names_in(single.folder) == COMMON_FILES
    check_metrics(
        metrics_of(single.folder),
        "single",
        ["bbox", "segm"],
        ["loss_mask", "loss_dice", "loss_class"],
    )
    assert "STAGE 1+2: SINGLE-STAGE TRAINING" in single.output
    state = load(single.folder / "best.pt")["model"]
    assert state["class_embed.0.weight"].shape[0] == 4 and any(
        key.startswith("mask_head.") for key in state
    )
