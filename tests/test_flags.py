"""Every flag of the training scripts changes something; each test shows what."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import quick_flags

import rfdetr.models.windowed_vit
import rfdetr.training.auto_batch
import rfdetr.training.feature_cache
import train_detector_stage1
import train_seg_single_stage
import train_seg_stage2
from rfdetr.console import run_script
from rfdetr.sizes import SIZES, with_queries

pytestmark = pytest.mark.slow


class Result:
    """A finished run's folder, what it printed, its metrics and its last checkpoint."""

    def __init__(self, folder: Path, output: str):
        self.folder, self.output = folder, output
        self.metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        self.last = torch.load(folder / "last.pt")

    @property
    def train(self) -> dict:
        return self.metrics["epochs"][0]["train"]

    @property
    def groups(self) -> list[dict]:
        return self.last["training"]["optimizer"]["param_groups"]

    @property
    def steps(self) -> int:
        return self.last["training"]["progress"]["step"]


@pytest.fixture
def train(call, few, capsys):
    """train(script, *flags) -> Result of a quick run with these flags on top."""
    runs = []

    def run(script, *flags: object, dataset: Path = few) -> Result:
        runs.append(1)
        folder = Path(f"run{len(runs)}")
        capsys.readouterr()
        call(script.main, *quick_flags(dataset), "--output_dir", folder, *flags)
        return Result(folder, capsys.readouterr().out)

    return run


@pytest.fixture
def stage1_run(train):
    return lambda *flags, **kw: train(train_detector_stage1, *flags, **kw)


@pytest.fixture
def stage2_run(train, shrunk):
    return lambda *flags, **kw: train(train_seg_stage2, "--checkpoint", shrunk.folder, *flags, **kw)


@pytest.fixture
def single_run(train):
    return lambda *flags, **kw: train(train_seg_single_stage, *flags, **kw)


@pytest.fixture
def error_of(call, few, capsys):
    """error_of(script, *flags) -> (exit status, stderr) of a command that must fail before it trains."""

    def run(script, *flags: object, dataset: Path = few) -> tuple[int, str]:
        words = [str(word) for word in (*quick_flags(dataset), *flags)]
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            call(lambda argv: run_script(script.main, argv), *words)
        assert not Path("runs").exists()
        return left.value.code, capsys.readouterr().err

    call(lambda argv: None)  # enter the test's folder
    return run


def same_weights(a: Result, b: Result, key: str = "model") -> bool:
    return all(torch.equal(a.last[key][name], b.last[key][name]) for name in a.last[key])


def trained_part(run: Result) -> dict:
    """The weights, of class heads only the rows that have a class."""
    rows = run.last["classes"]["rows"]
    return {name: t[rows] if "class_embed" in name else t for name, t in run.last["model"].items()}


# ---------------------------------------------------------------- common flags, on stage 1


def test_the_seed_decides_everything(stage1_run):
    first, again, other = stage1_run(), stage1_run("--seed", 0), stage1_run("--seed", 1)
    assert same_weights(first, again) and first.train["loss"] == again.train["loss"]
    assert not same_weights(first, other)


def test_workers_change_no_result(stage1_run):
    assert same_weights(stage1_run("--workers", 0), stage1_run("--workers", 2))


def test_learning_rates_and_weight_decay_reach_the_optimizer(stage1_run):
    run = stage1_run("--lr", "3e-4", "--lr_encoder", "7e-5", "--weight_decay", "0.02")
    assert {group["base_lr"] for group in run.groups} == {3e-4, 7e-5}
    assert {group["weight_decay"] for group in run.groups} == {0.0, 0.02}
    default = stage1_run()
    assert {group["base_lr"] for group in default.groups} == {1e-3} and not same_weights(
        run, default
    )


def test_learning_rate_zero_moves_nothing(stage1_run):
    still = stage1_run("--lr", 0, "--lr_encoder", 0)
    source = still.folder / "last.pt"
    moved = stage1_run("--lr", 0, "--lr_encoder", 0, "--pretrain_weights", source, "--seed", 5)
    # all of an own checkpoint was loaded; of the class heads the rows that have a class
    a, b = trained_part(still), trained_part(moved)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_excluded_keys_keep_their_initial_value(stage1_run):
    still = ["--lr", 0, "--lr_encoder", 0]
    source = stage1_run(*still)
    globs = ["backbone.0.projector.*", "query_feat.weight"]
    start = ["--pretrain_weights", source.folder / "best.pt", "--seed", 5]
    other = stage1_run(*still, *start, "--pretrain_exclude_keys", *globs)
    a, b = trained_part(source), trained_part(other)
    assert not torch.equal(a["query_feat.weight"], b["query_feat.weight"])
    different = {name for name in a if not torch.equal(a[name], b[name])}
    assert different and all(
        n == "query_feat.weight" or n.startswith("backbone.0.projector.") for n in different
    )
    assert "projector" in other.output  # and it says so


def test_a_missing_weights_file_is_named(error_of):
    code, text = error_of(train_detector_stage1, "--pretrain_weights", "nowhere.pth")
    assert code == 2 and "nowhere.pth" in text


def test_head_dataset_starts_with_n_plus_one_rows(stage1_run):
    run = stage1_run("--head", "dataset")
    assert run.last["model"]["class_embed.0.weight"].shape[0] == 4
    assert run.last["classes"]["rows"] == [0, 1, 2] and run.last["classes"]["background"] == 3


def test_batch_and_accumulation_are_one_effective_batch(stage1_run):
    """Batch 1 x accum 4 is batch 4 x accum 1."""
    whole, parts = stage1_run("--batch", 4, "--accum", 1), stage1_run("--batch", 1, "--accum", 4)
    assert whole.steps == parts.steps == 2
    assert whole.train["loss"] == pytest.approx(parts.train["loss"], rel=1e-4)
    assert whole.train["grad_norm"] == pytest.approx(parts.train["grad_norm"], rel=1e-2)
    assert stage1_run("--batch", 2, "--accum", 1).train["loss"] != whole.train["loss"]


def test_batch_auto_keeps_the_effective_batch(stage1_run, monkeypatch):
    roomy = stage1_run("--batch", "auto", "--accum", 2)
    assert (roomy.metrics["args"]["batch"], roomy.metrics["args"]["accum"]) == (8, 1)
    monkeypatch.setattr(rfdetr.training.auto_batch, "free_memory_mb", lambda: 0.0)
    tight = stage1_run("--batch", "auto", "--accum", 2)
    assert (tight.metrics["args"]["batch"], tight.metrics["args"]["accum"]) == (1, 8)


def test_min_steps_repeats_small_datasets(stage1_run):
    assert stage1_run("--min_steps", 5).steps == 5


def test_epochs_and_eval_every(stage1_run):
    run = stage1_run("--epochs", 3, "--eval_every", 2)
    assert ["valid" in epoch for epoch in run.metrics["epochs"]] == [False, True, True]
    assert run.steps == 6


def test_patience_ends_a_run_that_does_not_gain(stage1_run):
    run = stage1_run("--epochs", 6, "--patience", 2, "--lr", 0, "--lr_encoder", 0)
    assert len(run.metrics["epochs"]) == 3  # the first gained over nothing
    assert "Stopped early" in run.output


def test_multi_scale_draws_other_sides_and_expanded_scales_more(stage1_run):
    flags = ["--resolution", 128]
    plain, drawn = stage1_run(*flags), stage1_run(*flags, "--multi_scale", 1)
    wide = stage1_run(*flags, "--multi_scale", 1, "--expanded_scales", 1)
    assert len({plain.train["loss"], drawn.train["loss"], wide.train["loss"]}) == 3


def test_mixed_precision_computes_differently_and_keeps_fp32_weights(stage1_run):
    full, mixed = stage1_run("--amp", "off"), stage1_run("--amp", "bf16")
    assert full.train["loss"] != mixed.train["loss"]
    assert full.train["loss"] == pytest.approx(mixed.train["loss"], rel=0.05)
    assert {t.dtype for t in mixed.last["model"].values()} == {torch.float32}
    refused = stage1_run("--amp", "bf16", "--no_amp")
    assert same_weights(refused, full)


def test_flags_given_with_resume_win_over_the_stored_ones(call, stage1_run):
    run = stage1_run("--no_amp")
    call(train_detector_stage1.main, "--resume", run.folder, "--amp", "bf16", "--epochs", 2)
    assert torch.load(run.folder / "last.pt")["args"]["amp"] == "bf16"


def test_auto_is_fp32_for_tiny(stage1_run):
    assert stage1_run("--amp", "auto").metrics["args"]["amp"] == "off"


def test_fp16_on_a_cpu_is_refused(error_of):
    code, text = error_of(train_detector_stage1, "--amp", "fp16")
    assert code == 2 and "--amp fp16 needs a GPU" in text


def test_ema_off_leaves_no_trace(stage1_run):
    on, off = stage1_run(), stage1_run("--ema", 0)
    assert "valid_ema" in on.metrics["epochs"][0] and on.last["ema"] is not None
    assert "valid_ema" not in off.metrics["epochs"][0] and off.last["ema"] is None
    assert not (off.folder / "checkpoint_best_ema.pth").exists()
    assert same_weights(on, off)  # the average only watches
    assert not torch.equal(
        on.last["ema"]["query_feat.weight"], on.last["model"]["query_feat.weight"]
    )


def test_drop_path_changes_training(stage1_run):
    assert stage1_run().train["loss"] != stage1_run("--drop_path", 0.9).train["loss"]


def test_gradient_checkpointing_recomputes_blocks(stage1_run, monkeypatch):
    used = []
    original = rfdetr.models.windowed_vit.checkpoint
    monkeypatch.setattr(
        rfdetr.models.windowed_vit,
        "checkpoint",
        lambda *args, **kw: (used.append(1), original(*args, **kw))[1],
    )
    plain = stage1_run()
    assert not used
    saving = stage1_run("--grad_checkpoint", 1)
    assert used and saving.train["loss"] == pytest.approx(plain.train["loss"], rel=1e-5)


def test_a_frozen_encoder_stays_bit_equal_and_has_no_optimizer_state(stage1_run):
    untouched, frozen = stage1_run("--lr", 0, "--lr_encoder", 0), stage1_run("--freeze_encoder", 1)
    first, last = untouched.last["model"], frozen.last["model"]
    encoder = {name for name in last if name.startswith("backbone.0.encoder.")}
    assert encoder and all(torch.equal(first[name], last[name]) for name in encoder)
    assert not torch.equal(first["query_feat.weight"], last["query_feat.weight"])
    assert len(frozen.groups) < len(untouched.groups)
    assert "Encoder frozen: " in frozen.output


def test_a_compiled_encoder_computes_the_same(stage1_run, monkeypatch):
    plain, traced, original = stage1_run(), [], torch.compile

    def trace(function):
        traced.append(type(getattr(function, "__self__", None)).__name__)
        return original(
            function, backend="aot_eager"
        )  # not handed to a C++ compiler, which takes minutes

    monkeypatch.setattr(torch, "compile", trace)
    compiled = stage1_run("--compile", 1)
    assert traced[-1] == "WindowedViT"
    assert compiled.train["loss"] == pytest.approx(plain.train["loss"], rel=1e-4)
    assert compiled.last["model"].keys() == plain.last["model"].keys()


def test_compile_without_a_compiler_says_what_is_missing(error_of, monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    code, message = error_of(train_detector_stage1, "--compile", 1)
    assert code == 2 and "--compile 1 does not work here (no compiler)" in message


def test_tensorboard_can_be_left_out(stage1_run):
    def events(run: Result) -> int:
        return sum(path.stat().st_size for path in run.folder.glob("tb/*"))

    with_it, without = stage1_run("--tensorboard", 1), stage1_run("--tensorboard", 0)
    assert events(with_it) > 10_000  # scalars and a picture
    assert events(without) < 200
    assert list(without.folder.glob("predictions/*.png"))


def test_tensorboard_holds_the_scalars_of_metrics_json(stage1_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = stage1_run("--tensorboard", 1)
    events = EventAccumulator(str(run.folder / "tb"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "valid/bbox/mAP", "valid_ema/bbox/mAP50"} <= set(
        tags["scalars"]
    )
    assert events.Scalars("train/loss")[0].value == pytest.approx(run.train["loss"], rel=1e-5)
    drawn = {
        path.stem.replace("valid_", "valid/", 1) for path in (run.folder / "predictions").iterdir()
    }
    assert set(tags["images"]) == drawn != set()


def test_run_test_scores_the_test_split(stage1_run, few, tmp_path):
    run = stage1_run("--run_test", 1)
    assert run.metrics["test"].keys() == {"bbox"}
    assert "test" not in stage1_run().metrics
    shutil.copytree(few, tmp_path / "without", ignore=shutil.ignore_patterns("test"))
    run = stage1_run("--run_test", 1, dataset=tmp_path / "without")
    assert "no test split" in run.output and "test" not in run.metrics


def test_val_fraction_splits_train(stage1_run, error_of, few, tmp_path):
    data = tmp_path / "unsplit"
    shutil.copytree(few, data, ignore=shutil.ignore_patterns("valid", "test"))
    code, text = error_of(train_detector_stage1, dataset=data)
    assert code == 2 and "--val_fraction 0.1" in text
    run = stage1_run("--val_fraction", "0.25", dataset=data)
    assert "(3 train, 1 valid images" in run.output


def test_runs_are_numbered_and_a_folder_with_files_is_refused(call, few, error_of, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    code, text = error_of(train_detector_stage1, "--output_dir", tmp_path / "mine")
    assert code == 2 and "is not empty" in text
    for _ in range(2):
        call(train_detector_stage1.main, *quick_flags(few), "--fast_dev_run", 1)
    assert sorted(p.name for p in Path("runs").iterdir()) == [
        "detector_tiny_32_1",
        "detector_tiny_32_2",
    ]


def test_resolution_is_in_the_run_and_its_name(call, few):
    call(train_detector_stage1.main, *quick_flags(few), "--resolution", 48, "--fast_dev_run", 1)
    content = torch.load("runs/detector_tiny_48_1/best.pt")
    assert content["resolution"] == 48


def test_fast_dev_run_is_one_epoch_of_n_steps(stage1_run):
    run = stage1_run("--epochs", 9, "--min_steps", 9, "--fast_dev_run")
    assert (len(run.metrics["epochs"]), run.steps) == (1, 2)
    assert stage1_run("--min_steps", 9, "--fast_dev_run", 3).steps == 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch", "0"], "--batch"),
        (["--lr", "-1"], "--lr"),
        (["--epochs", "0"], "--epochs"),
        (["--ema", "maybe"], "0, 1, true, false, yes or no"),
        (["--size", "huge"], "nano"),
        (["--resolution", "100"], "96 and 112"),
        (["--device", "cuda:7"], "--device cpu"),
        (["--no_such_flag", "1"], "--no_such_flag"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--val_fraction", "1.5"], "--val_fraction"),
        (["--resume", "nowhere"], "nowhere"),
    ],
)
@pytest.mark.parametrize(
    "script", [train_detector_stage1, train_seg_single_stage], ids=["stage1", "single"]
)
def test_bad_values_leave_with_2_and_name_the_flag(script, flags, message, error_of):
    code, text = error_of(script, *flags)
    assert code == 2 and message in text
    assert "Traceback" not in text


def test_debug_shows_the_traceback(error_of):
    _, text = error_of(train_detector_stage1, "--resolution", "100", "--debug")
    assert "Traceback" in text and "96 and 112" in text


# ---------------------------------------------------------------- stage 2


def test_cache_choices_give_the_same_training(stage2_run):
    ram, disk = stage2_run("--cache", "ram"), stage2_run("--cache", "disk", "--keep_cache", 0)
    assert same_weights(ram, disk)
    assert not list(Path("feature_cache").iterdir())
    again = stage2_run("--cache", "disk")
    assert same_weights(ram, again) and len(list(Path("feature_cache").iterdir())) == 1
    off = stage2_run("--cache", "off")
    assert not same_weights(ram, off) and "off, as asked" in off.output
    configs = [
        json.loads((run.folder / "stage2_config.json").read_text())["cache"]
        for run in (ram, disk, off)
    ]
    assert configs == ["ram", "disk", "off"]


def test_multi_scale_and_a_cache_exclude_each_other(stage2_run, error_of, shrunk):
    code, text = error_of(
        train_seg_stage2, "--checkpoint", shrunk.folder, "--multi_scale", 1, "--cache", "ram"
    )
    assert code == 2 and "--multi_scale 0" in text
    run = stage2_run("--multi_scale", 1)
    assert "since --multi_scale 1" in run.output
    assert run.train["loss"] != stage2_run("--cache", "off").train["loss"]


def test_cache_views_are_the_flips_that_are_seen(stage2_run, monkeypatch):
    seen = set()
    original = rfdetr.training.frozen.apply_view
    monkeypatch.setattr(
        rfdetr.training.frozen, "apply_view", lambda x, view: (seen.add(view), original(x, view))[1]
    )
    stage2_run("--cache_views", 1)
    assert seen == {0}
    stage2_run("--cache_views", 2)
    assert seen == {0, 1}


def test_mask_head_choice(stage2_run):
    nano, standard = stage2_run(), stage2_run("--mask_head", "standard")
    assert (nano.last["mask_head"], standard.last["mask_head"]) == ("nano", "standard")
    heads = [
        [t for n, t in run.last["model"].items() if n.startswith("mask_head.")]
        for run in (nano, standard)
    ]
    small, large = (sum(t.numel() for t in head) for head in heads)
    assert small <= 0.25 * large


def test_seg_lr_and_weight_decay(stage2_run):
    run = stage2_run("--seg_lr", "5e-4", "--weight_decay", "0.03")
    assert [(g["base_lr"], g["weight_decay"]) for g in run.groups] == [(5e-4, 0.03)]


def test_mask_coefficients_scale_their_losses(stage2_run, demo):
    flags = ["--min_steps", 1, "--resolution", 64, "--batch", 12]
    one = stage2_run(*flags, dataset=demo)
    double = stage2_run(*flags, "--mask_loss_coef", 2, "--dice_loss_coef", 0.5, dataset=demo)
    assert one.train["loss_mask"] > 0
    assert double.train["loss_mask"] == pytest.approx(2 * one.train["loss_mask"], rel=1e-4)
    assert double.train["loss_dice"] == pytest.approx(0.5 * one.train["loss_dice"], rel=1e-4)


def test_auto_shrink_does_what_the_message_asks_for(train, error_of, stage1):
    code, text = error_of(train_seg_stage2, "--stage1_run", stage1.folder)
    assert code == 2 and "out_dim (91) != requested (4)" in text
    run = train(train_seg_stage2, "--stage1_run", stage1.folder, "--auto_shrink", 1)
    assert run.last["model"]["class_embed.0.weight"].shape[0] == 4


def test_stage1_folders_without_a_checkpoint(error_of, tmp_path):
    (tmp_path / "empty_run").mkdir()
    (tmp_path / "empty_run/log.txt").write_text("")
    code, text = error_of(train_seg_stage2, "--stage1_run", tmp_path / "empty_run")
    assert code == 2 and "No checkpoint found in Stage-1 directory" in text and "log.txt" in text
    code, text = error_of(train_seg_stage2, "--stage1_run", tmp_path / "nowhere")
    assert code == 2 and "no such folder" in text
    code, text = error_of(train_seg_stage2)
    assert code == 2 and "--stage1_run" in text


def test_last_pt_stands_in_for_best_pt(train, shrunk, tmp_path):
    (tmp_path / "old_run").mkdir()
    shutil.copy(shrunk.folder, tmp_path / "old_run/last.pt")
    run = train(train_seg_stage2, "--stage1_run", tmp_path / "old_run")
    assert "old_run/last.pt" in run.output.replace("\\", "/")


def test_a_dataset_without_masks(error_of, few, shrunk, tmp_path):
    data = tmp_path / "boxes"
    shutil.copytree(few, data)
    for file in data.glob("*/_annotations.coco.json"):
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        file.write_text(json.dumps(content))
    for script, flags in (
        (train_seg_stage2, ["--checkpoint", shrunk.folder]),
        (train_seg_single_stage, []),
    ):
        code, text = error_of(script, *flags, dataset=data)
        assert code == 2 and "No segmentation masks found in COCO annotations" in text
        assert "_annotations.coco.json" in text


def test_a_checkpoint_of_another_size_names_the_right_one(error_of, shrunk):
    flags = ["--checkpoint", shrunk.folder, "--size", "nano", "--resolution", 384]
    code, text = error_of(train_seg_stage2, *flags)
    assert code == 2 and "--size tiny" in text


def test_other_class_names_than_the_checkpoints(error_of, few, shrunk, tmp_path):
    data = tmp_path / "renamed"
    shutil.copytree(few, data)
    for file in data.glob("*/_annotations.coco.json"):
        file.write_text(file.read_text().replace("glomerulus", "tubule"))
    code, text = error_of(train_seg_stage2, "--checkpoint", shrunk.folder, dataset=data)
    assert code == 2 and "tubule" in text and "glomerulus" in text


def test_the_next_command_quotes_folders_with_spaces(stage2_run, few, tmp_path):
    data = tmp_path / "my data"
    shutil.copytree(few, data)
    words = shlex.split(stage2_run(dataset=data).output.splitlines()[-1].removeprefix("Next:"))
    assert words[words.index("--input") + 1 : words.index("--output")] == [str(data / "valid")]


def test_the_next_command_names_images_that_exist(stage2_run, few, tmp_path):
    data = tmp_path / "unsplit"
    shutil.copytree(few, data, ignore=shutil.ignore_patterns("valid", "test"))
    words = shlex.split(
        stage2_run("--val_fraction", 0.25, dataset=data)
        .output.splitlines()[-1]
        .removeprefix("Next:")
    )
    assert Path(words[words.index("--input") + 1]).is_dir()


# ---------------------------------------------------------------- single stage


def test_number_of_queries(single_run):
    run = single_run("--num_queries", 7)
    assert run.last["model"]["query_feat.weight"].shape[0] == 7 and run.last["size"]["queries"] == 7
    assert run.last["size"]["select"] == 7


def test_number_of_detections(single_run):
    run = single_run("--num_queries", 7, "--num_select", 20)
    assert (run.last["size"]["queries"], run.last["size"]["select"]) == (7, 20)


def test_a_resumed_run_keeps_its_number_of_detections(single_run, call):
    run = single_run("--num_queries", 7)
    for file in ("last.pt", "checkpoint.pt"):  # as they were while --num_queries left it alone
        if (run.folder / file).exists():
            content = torch.load(run.folder / file)
            del content["args"]["num_select"]
            content["size"]["select"] = 100
            torch.save(content, run.folder / file)
    call(train_seg_single_stage.main, "--resume", run.folder, "--epochs", 2)
    content = torch.load(run.folder / "last.pt")
    assert content["size"]["select"] == 100 and content["training"]["progress"]["epoch"] == 2


@pytest.mark.parametrize("name", ["tiny", "nano", "seg-nano"])
def test_detections_follow_the_queries(name):
    size = SIZES[name]
    assert with_queries(size, None, None) == size
    assert with_queries(size, 400, None) == replace(size, queries=400, select=400)
    assert with_queries(size, None, 50) == replace(size, select=50)


def test_init_ckpt_starts_from_a_file(single_run, shrunk):
    run = single_run("--init_ckpt", shrunk.folder, "--lr", 0, "--lr_encoder", 0)
    source, rows = (
        torch.load(shrunk.folder),
        [1, 2, 0],
    )  # its order is glomerulus, cells, blood_vessel
    own = run.last["model"]
    for name in ("query_feat.weight", "backbone.0.projector.stages.0.1.weight"):
        if name in own:
            assert torch.equal(own[name], source["model"][name])
    assert torch.equal(
        own["class_embed.0.weight"][:3], source["model"]["class_embed.0.weight"][rows]
    )


@pytest.mark.parametrize("name, losses", [("cls", "class"), ("bbox", "box"), ("giou", "giou")])
def test_detection_coefficients_scale_their_losses(name, losses, single_run):
    coefficient = {"cls": 1.0, "bbox": 5.0, "giou": 2.0}[name]
    one = single_run("--min_steps", 1, "--batch", 4)
    triple = single_run("--min_steps", 1, "--batch", 4, f"--{name}_loss_coef", 3 * coefficient)
    for loss in (f"loss_{losses}", f"loss_{losses}_enc"):
        assert triple.train[loss] == pytest.approx(3 * one.train[loss], rel=1e-4)
    other = next(loss for loss in ("loss_class", "loss_box") if loss != f"loss_{losses}")
    assert triple.train[other] == pytest.approx(one.train[other], rel=1e-6)


def test_mask_coefficients_of_single_stage(single_run):
    one = single_run("--min_steps", 1, "--batch", 4)
    other = single_run("--min_steps", 1, "--batch", 4, "--mask_loss_coef", 2, "--dice_loss_coef", 3)
    assert other.train["loss_mask"] == pytest.approx(2 * one.train["loss_mask"], rel=1e-4)
    assert other.train["loss_dice"] == pytest.approx(3 * one.train["loss_dice"], rel=1e-4)


def test_learning_rate_schedules(single_run):
    ends = {}
    for kind in ("constant", "step", "cosine"):
        rates = ["--lr", "1e-3", "--lr_encoder", "1e-3"]
        run = single_run("--lr_scheduler", kind, "--epochs", 2, "--min_steps", 5, *rates)
        ends[kind] = run.metrics["epochs"][-1]["train"]["lr"]
    assert ends["constant"] == pytest.approx(1e-3) and ends["step"] == pytest.approx(1e-4)
    assert 0 < ends["cosine"] < 1e-3 and ends["cosine"] not in (ends["constant"], ends["step"])


def test_warmup_epochs(single_run):
    run = single_run(
        "--warmup_epochs", 2, "--epochs", 2, "--lr", "1e-3", "--lr_scheduler", "constant"
    )
    assert [epoch["train"]["lr"] for epoch in run.metrics["epochs"]] == pytest.approx(
        [0.5e-3, 1e-3]
    )


def test_early_stopping_and_patience(single_run):
    flags = ["--lr", 0, "--lr_encoder", 0, "--epochs", 4, "--lr_scheduler", "constant"]
    assert len(single_run(*flags, "--early_stopping", 1, "--patience", 1).metrics["epochs"]) == 2
    assert len(single_run(*flags).metrics["epochs"]) == 4
    assert (
        len(
            single_run(*flags, "--early_stopping", 1, "--epochs", 13, "--batch", 4).metrics[
                "epochs"
            ]
        )
        == 11
    )


def test_gradient_checkpointing_of_single_stage(single_run, monkeypatch):
    used = []
    original = rfdetr.models.windowed_vit.checkpoint
    monkeypatch.setattr(
        rfdetr.models.windowed_vit,
        "checkpoint",
        lambda *args, **kw: (used.append(1), original(*args, **kw))[1],
    )
    single_run("--grad_checkpoint", 1)
    assert used
