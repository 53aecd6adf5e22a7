"""What the training scripts' flags do to a run. What they resolve to stands in test_settings.py."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import quick_flags

import evaluate
import export
import predict
import rfdetr.models.windowed_vit
import rfdetr.training.auto_batch
import rfdetr.training.frozen
import rfdetr.training.objective
import shrink_head
import train_detector_stage1
import train_seg_single_stage
import train_seg_stage2
import validate_setup
from rfdetr.console import run_script
from rfdetr.data.augment import multi_scale_sides
from rfdetr.losses.criterion import detection_losses, mask_losses
from rfdetr.sizes import SIZES, LossWeights
from rfdetr.training.optim import Schedule
from testkit.datasets import changed_copy, drop_masks
from testkit.in_process import output_of

STILL = ["--lr", 0, "--lr_encoder", 0]  # nothing is learned


class Result:
    """A finished run's folder, what it printed, its metrics and its last checkpoint."""

    def __init__(self, folder: Path, output: str):
        self.folder = folder
        self.output = output
        self.metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        self.last = torch.load(folder / "last.pt")

    @property
    def model(self) -> dict:
        return self.last["model"]

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
        runs.append(script)
        folder = Path(f"run{len(runs)}")
        capsys.readouterr()
        call(script.main, *quick_flags(dataset), "--output_dir", folder, *flags)
        return Result(folder, capsys.readouterr().out)

    return run


@pytest.fixture
def stage1_run(train):
    return lambda *flags, **options: train(train_detector_stage1, *flags, **options)


@pytest.fixture
def stage2_run(train, shrunk):
    first = ["--checkpoint", shrunk.folder]
    return lambda *flags, **options: train(train_seg_stage2, *first, *flags, **options)


@pytest.fixture
def single_run(train):
    return lambda *flags, **options: train(train_seg_single_stage, *flags, **options)


def run_once(script, folder: Path, words: list[object]) -> Result:
    """A quick run that several tests look at."""
    printed = output_of(script.main, *words, "--output_dir", folder / "run")
    return Result(folder / "run", printed)


@pytest.fixture(scope="module")
def plain(few, tmp_path_factory) -> Result:
    """A run of stage 1 without flags of its own, but with TensorBoard."""
    words = [*quick_flags(few), "--tensorboard", 1]
    return run_once(train_detector_stage1, tmp_path_factory.mktemp("plain"), words)


@pytest.fixture(scope="module")
def plain_masks(few, shrunk, tmp_path_factory) -> Result:
    """A run of stage 2 with its features in memory."""
    words = [*quick_flags(few), "--checkpoint", shrunk.folder, "--cache", "ram"]
    return run_once(train_seg_stage2, tmp_path_factory.mktemp("plain_masks"), words)


@pytest.fixture(scope="module")
def uncached_masks(few, shrunk, tmp_path_factory) -> Result:
    """The same without a cache."""
    words = [*quick_flags(few), "--checkpoint", shrunk.folder, "--cache", "off"]
    return run_once(train_seg_stage2, tmp_path_factory.mktemp("uncached_masks"), words)


@pytest.fixture
def error_of(call, few, capsys):
    """error_of(script, *flags) -> (exit status, stderr) of a command that must fail at once."""

    def run(script, *flags: object, dataset: Path | None = few) -> tuple[int, str]:
        words = [*quick_flags(dataset), *flags] if dataset else flags
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            call(lambda argv: run_script(script.main, argv), *words)
        assert not Path("runs").exists()
        return left.value.code, capsys.readouterr().err

    call(lambda argv: None)  # enter the test's folder
    return run


def same_weights(one: Result, other: Result) -> bool:
    return all(torch.equal(one.model[name], other.model[name]) for name in one.model)


def trained_part(run: Result) -> dict:
    """The weights, of class heads only the rows that have a class."""
    rows = run.last["classes"]["rows"]
    part = {}
    for name, tensor in run.model.items():
        part[name] = tensor[rows] if "class_embed" in name else tensor
    return part


def unsplit(few: Path, folder: Path) -> Path:
    """A copy of the dataset that has train/ alone."""
    return shutil.copytree(few, folder, ignore=shutil.ignore_patterns("valid", "test"))


# ---------------------------------------------------------------- bad commands


def words_of(value: object) -> str:
    """A readable name of a parametrised case's part."""
    if isinstance(value, list):
        return " ".join(value)
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(
    "script, flags, message",
    [
        (train_detector_stage1, ["--batch", "0"], "--batch"),
        (train_detector_stage1, ["--resolution", "100"], "96 and 112"),
        (train_detector_stage1, ["--device", "cuda:7"], "--device cpu"),
        (train_detector_stage1, ["--no_such_flag", "1"], "--no_such_flag"),
        (train_detector_stage1, ["--dataset", "nowhere"], "nowhere"),
        (train_detector_stage1, ["--dataset", "file"], "file"),
        (train_detector_stage1, ["--resume", "nowhere"], "nowhere"),
        (train_detector_stage1, ["--resume", "file"], "last.pt"),
        (train_detector_stage1, ["--pretrain_weights", "nowhere.pth"], "nowhere.pth"),
        (train_detector_stage1, ["--amp", "fp16"], "GPU"),
        (train_seg_stage2, ["--cache", "tape"], "disk"),
        (train_seg_stage2, [], "--stage1_run"),
        (train_seg_single_stage, ["--num_queries", "0"], "a whole number from 1"),
    ],
    ids=words_of,
)
def test_a_bad_training_command_leaves_with_2_and_names_its_fault(
    script, flags, message, error_of, tmp_path
):
    (tmp_path / "file").write_text("no folder")
    status, text = error_of(script, *flags)
    assert status == 2 and message in text
    assert "Traceback" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "script, flags, message",
    [
        (evaluate, ["--checkpoint", "folder", "--batch", "0"], "a whole number from 1"),
        (
            predict,
            ["--checkpoint", "x.pt", "--input", "folder", "--output", "o", "--threshold", "2"],
            "a number from 0 to 1, got '2'",
        ),
        (predict, ["--checkpoint", "x.pt", "--input", "folder", "--output", "o"], "folder"),
        (shrink_head, ["--in_ckpt", "folder", "--out_ckpt", "o.pt"], "folder"),
        (export, ["--checkpoint", "file", "--out", "o.pth", "--format", "onnx"], "rfdetr"),
        (validate_setup, ["--dataset", "file"], "file"),
    ],
    ids=words_of,
)
def test_a_bad_command_of_another_script_too(script, flags, message, error_of, tmp_path):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    status, text = error_of(script, *flags, dataset=None)
    assert status == 2 and message in text
    assert "Traceback" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_debug_shows_the_traceback(error_of):
    _, text = error_of(train_detector_stage1, "--resolution", "100", "--debug")
    assert "Traceback" in text and "96 and 112" in text


def test_compile_without_a_compiler_says_what_is_missing(error_of, monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    status, text = error_of(train_detector_stage1, "--compile", 1)
    assert status == 2 and "--compile 1" in text and "no compiler" in text


@pytest.mark.slow
def test_multi_scale_and_a_cache_exclude_each_other(error_of, shrunk):
    flags = ["--checkpoint", shrunk.folder, "--multi_scale", 1, "--cache", "ram"]
    status, text = error_of(train_seg_stage2, *flags)
    assert status == 2 and "--multi_scale 0" in text


def test_stage1_folders_without_a_checkpoint(error_of, tmp_path):
    (tmp_path / "empty_run").mkdir()
    (tmp_path / "empty_run/log.txt").write_text("")
    status, text = error_of(train_seg_stage2, "--stage1_run", tmp_path / "empty_run")
    assert status == 2 and "No checkpoint found in Stage-1 directory" in text
    assert "log.txt" in text  # what is there
    status, text = error_of(train_seg_stage2, "--stage1_run", tmp_path / "nowhere")
    assert status == 2 and "nowhere" in text


@pytest.mark.slow
def test_a_dataset_without_masks(error_of, few, shrunk, tmp_path):
    data = changed_copy(few, tmp_path / "boxes", drop_masks)
    for script, flags in (
        (train_seg_stage2, ["--checkpoint", shrunk.folder]),
        (train_seg_single_stage, []),
    ):
        status, text = error_of(script, *flags, "--masks", "given", dataset=data)
        assert status == 2 and "No segmentation masks found in COCO annotations" in text
        assert "_annotations.coco.json" in text


# ---------------------------------------------------------------- coefficients and schedules


def losses_of(model, weights: LossWeights) -> dict[str, float]:
    """The detection and mask losses of made-up images and objects."""
    torch.manual_seed(0)
    boxes = torch.tensor([[0.4, 0.5, 0.3, 0.2], [0.6, 0.4, 0.2, 0.4]])
    target = {"rows": torch.tensor([1, 2]), "boxes": boxes}
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 64, 64))
    losses, _ = detection_losses(outputs, [target], model.transformer.groups, 4.0, weights)
    losses |= mask_losses(torch.randn(2, 8, 8), torch.rand(2, 8, 8).round(), 2.0, weights)
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize(
    "name, kind",
    [("cls", "class"), ("bbox", "box"), ("giou", "giou"), ("mask", "mask"), ("dice", "dice")],
)
def test_a_coefficient_scales_its_losses_and_no_other(name, kind, small_model):
    small_model.train()
    usual = losses_of(small_model, LossWeights())
    tripled = losses_of(small_model, LossWeights(**{name: 3 * getattr(LossWeights(), name)}))
    own = [loss for loss in usual if loss.split("_")[1] == kind]
    assert own
    for loss, value in usual.items():
        factor = 3 if loss in own else 1
        assert tripled[loss] == pytest.approx(factor * value, rel=1e-5), loss


def test_learning_rate_schedules():
    def rates(kind: str) -> list[float]:
        schedule = Schedule(total=10, warmup=4, flat=0.5, floor=0.1, kind=kind)
        return [schedule(step) for step in range(10)]

    warm_up = [0.25, 0.5, 0.75, 1.0]
    assert rates("constant") == [*warm_up, 1, 1, 1, 1, 1, 1]
    assert rates("step") == [*warm_up, 1, 1, 1, 1, 0.1, 0.1]
    cosine = rates("cosine")
    assert cosine[:6] == [*warm_up, 1, 1]
    assert cosine[5:] == sorted(cosine[5:], reverse=True) and 0.1 < cosine[9] < 0.2


# ---------------------------------------------------------------- runs of stage 1


@pytest.mark.slow
def test_the_seed_decides_everything_and_what_only_watches_nothing(stage1_run, plain):
    """Workers, TensorBoard and the average of the weights leave the training as it is."""
    flags = ["--workers", 2, "--ema", 0, "--tensorboard", 0, "--amp", "bf16", "--no_amp"]
    other = stage1_run(*flags)
    assert same_weights(other, plain)
    assert other.train["loss"] == plain.train["loss"]

    assert "valid_ema" in plain.metrics["epochs"][0]
    average = plain.last["ema"]["query_feat.weight"]
    assert not torch.equal(average, plain.model["query_feat.weight"])
    assert "valid_ema" not in other.metrics["epochs"][0] and other.last["ema"] is None
    assert not (other.folder / "checkpoint_best_ema.pth").exists()

    def events(run: Result) -> int:
        return sum(path.stat().st_size for path in run.folder.glob("tb/*"))

    assert events(plain) > 10_000  # scalars and a picture
    assert events(other) < 200
    assert list(other.folder.glob("predictions/*.png"))

    assert not same_weights(stage1_run("--seed", 1), plain)


@pytest.mark.slow
def test_tensorboard_holds_the_scalars_of_metrics_json(plain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(plain.folder / "tb"))
    events.Reload()
    tags = events.Tags()
    expected = {"2 losses/loss", "4 learning rate/lr", "1 scores/bbox mAP"}
    expected |= {"1 scores/bbox mAP50 (ema)", "1 scores/bbox mAP (best)", "2 losses by step/loss"}
    assert expected <= set(tags["scalars"])
    assert events.Scalars("2 losses/loss")[0].value == pytest.approx(plain.train["loss"], rel=1e-5)
    by_step = [event.value for event in events.Scalars("2 losses by step/loss")]
    assert sum(by_step) / len(by_step) == pytest.approx(plain.train["loss"], rel=1e-5)
    pictures = (plain.folder / "predictions").iterdir()
    drawn = {path.stem.replace("valid_", "3 pictures/", 1) for path in pictures}
    assert drawn and set(tags["images"]) == drawn


@pytest.mark.slow
def test_rates_epochs_head_and_test_split(stage1_run, plain, monkeypatch):
    recomputed = []
    checkpoint = rfdetr.models.windowed_vit.checkpoint

    def counted(*args, **options):
        recomputed.append(args)
        return checkpoint(*args, **options)

    monkeypatch.setattr(rfdetr.models.windowed_vit, "checkpoint", counted)
    rates = ["--lr", "3e-4", "--lr_encoder", "7e-5", "--weight_decay", "0.02"]
    epochs = ["--epochs", 3, "--eval_every", 2, "--min_steps", 3, "--run_test", 1]
    run = stage1_run(*rates, *epochs, "--head", "dataset", "--grad_checkpoint", 1)
    assert {group["base_lr"] for group in run.groups} == {3e-4, 7e-5}
    assert {group["weight_decay"] for group in run.groups} == {0.0, 0.02}
    assert ["valid" in epoch for epoch in run.metrics["epochs"]] == [False, True, True]
    assert run.steps == 9
    assert run.model["class_embed.0.weight"].shape[0] == 4
    assert run.last["classes"]["rows"] == [0, 1, 2] and run.last["classes"]["background"] == 3
    assert run.metrics["test"].keys() == {"bbox"} and "test" not in plain.metrics
    assert recomputed


@pytest.mark.slow
def test_learning_rate_zero_moves_nothing_and_excluded_keys_are_not_loaded(stage1_run):
    still = stage1_run(*STILL, "--epochs", 6, "--patience", 2)
    assert len(still.metrics["epochs"]) == 3  # the first gained over nothing
    assert "Stopped early" in still.output

    globs = ["backbone.0.projector.*", "query_feat.weight"]
    start = ["--pretrain_weights", still.folder / "best.pt", "--seed", 5]
    other = stage1_run(*STILL, *start, "--pretrain_exclude_keys", *globs)
    mine = trained_part(still)
    theirs = trained_part(other)
    different = {name for name in mine if not torch.equal(mine[name], theirs[name])}
    projector = {name for name in different if name.startswith("backbone.0.projector.")}
    assert projector and different == projector | {"query_feat.weight"}
    assert "projector" in other.output  # and it says so

    frozen = stage1_run("--freeze_encoder", 1)
    encoder = [name for name in frozen.model if name.startswith("backbone.0.encoder.")]
    assert encoder
    assert all(torch.equal(still.model[name], frozen.model[name]) for name in encoder)
    assert not torch.equal(still.model["query_feat.weight"], frozen.model["query_feat.weight"])
    assert len(frozen.groups) < len(still.groups)  # no optimizer state for the encoder


@pytest.mark.slow
def test_batch_and_accumulation_are_one_effective_batch(stage1_run, plain):
    """Batch 1 x accum 4 is batch 4 x accum 1."""
    whole = stage1_run("--batch", 4, "--accum", 1)
    parts = stage1_run("--batch", 1, "--accum", 4)
    assert whole.steps == parts.steps == 2
    assert whole.train["loss"] == pytest.approx(parts.train["loss"], rel=1e-4)
    assert whole.train["grad_norm"] == pytest.approx(parts.train["grad_norm"], rel=1e-2)
    assert plain.train["loss"] != whole.train["loss"]  # batch 2


@pytest.mark.slow
def test_batch_auto_keeps_the_effective_batch(stage1_run, monkeypatch):
    flags = ["--batch", "auto", "--accum", 2, "--fast_dev_run", 1]
    roomy = stage1_run(*flags)
    assert roomy.last["training"]["progress"]["micro_batch"] == 8
    assert "8 x 1 accumulated" in roomy.output
    monkeypatch.setattr(rfdetr.training.auto_batch, "free_on_device_mb", lambda device: 0.0)
    tight = stage1_run(*flags)
    assert tight.last["training"]["progress"]["micro_batch"] == 1
    assert "1 x 8 accumulated" in tight.output


@pytest.mark.slow
def test_multi_scale_draws_other_sides_and_expanded_scales_more(stage1_run, monkeypatch):
    drawn = []
    draw_side = rfdetr.training.objective.draw_side

    def noted(sides, seed, step):
        drawn.append(tuple(sides))
        return draw_side(sides, seed, step)

    monkeypatch.setattr(rfdetr.training.objective, "draw_side", noted)
    flags = ["--resolution", 128, "--fast_dev_run", 1]
    stage1_run(*flags, "--multi_scale", 1)
    stage1_run(*flags, "--multi_scale", 1, "--expanded_scales", 1)
    few_sides, many_sides = (set(sides) for sides in drawn)
    assert few_sides == set(multi_scale_sides(SIZES["tiny"], 128, False))
    assert many_sides == set(multi_scale_sides(SIZES["tiny"], 128, True))
    assert few_sides < many_sides
    stage1_run(*flags, "--multi_scale", 0)
    assert len(drawn) == 2


@pytest.mark.slow
def test_mixed_precision_computes_differently_and_keeps_fp32_weights(stage1_run, plain):
    mixed = stage1_run("--amp", "bf16")
    assert mixed.train["loss"] != plain.train["loss"]
    assert mixed.train["loss"] == pytest.approx(plain.train["loss"], rel=0.05)
    assert {tensor.dtype for tensor in mixed.model.values()} == {torch.float32}


@pytest.mark.slow
def test_drop_path_and_fast_dev_run(stage1_run, plain):
    run = stage1_run("--drop_path", 0.9, "--epochs", 9, "--min_steps", 9, "--fast_dev_run")
    assert (len(run.metrics["epochs"]), run.steps) == (1, 2)
    assert run.train["loss"] != plain.train["loss"]  # of the same two steps


@pytest.mark.slow
def test_a_compiled_encoder_computes_the_same(stage1_run, plain, monkeypatch):
    traced = []
    compile_with = torch.compile

    def trace(function):
        traced.append(type(getattr(function, "__self__", None)).__name__)
        # not handed to a C++ compiler, which takes minutes
        return compile_with(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", trace)
    compiled = stage1_run("--compile", 1)
    assert traced[-1] == "WindowedViT"
    assert compiled.train["loss"] == pytest.approx(plain.train["loss"], rel=1e-4)
    assert compiled.model.keys() == plain.model.keys()


@pytest.mark.slow
def test_val_fraction_splits_train_and_a_missing_test_split_is_said(
    stage1_run, error_of, few, tmp_path
):
    data = unsplit(few, tmp_path / "unsplit")
    status, text = error_of(train_detector_stage1, dataset=data)
    assert status == 2 and "--val_fraction 0.1" in text
    run = stage1_run("--val_fraction", "0.25", "--run_test", 1, dataset=data)
    assert "(3 train, 1 valid images" in run.output
    assert "no test split" in run.output and "test" not in run.metrics


# ---------------------------------------------------------------- runs of stage 2


@pytest.mark.slow
def test_cache_choices_give_the_same_training(stage2_run, plain_masks, uncached_masks):
    on_disk = stage2_run("--cache", "disk", "--keep_cache", 0)
    assert same_weights(plain_masks, on_disk)
    assert not list(Path("feature_cache").iterdir())
    assert not same_weights(plain_masks, uncached_masks)  # which draws fresh views
    for run, cache in ((plain_masks, "ram"), (on_disk, "disk"), (uncached_masks, "off")):
        assert json.loads((run.folder / "stage2_config.json").read_text())["cache"] == cache


@pytest.mark.slow
def test_multi_scale_turns_the_cache_off_and_says_so(stage2_run, uncached_masks):
    run = stage2_run("--multi_scale", 1)
    assert "--multi_scale 1" in run.output
    assert json.loads((run.folder / "stage2_config.json").read_text())["cache"] == "off"
    assert run.train["loss"] != uncached_masks.train["loss"]


@pytest.mark.slow
def test_cache_views_are_the_flips_that_are_drawn(stage2_run, monkeypatch):
    drawn = set()
    apply_view = rfdetr.training.frozen.apply_view

    def noted(x, view):
        drawn.add(view)
        return apply_view(x, view)

    monkeypatch.setattr(rfdetr.training.frozen, "apply_view", noted)
    stage2_run("--cache_views", 1)
    assert drawn == {0}
    stage2_run("--cache_views", 2)
    assert drawn == {0, 1}


@pytest.mark.slow
def test_head_rate_and_coefficients_of_stage_2(stage2_run, plain_masks):
    none = ["--mask_loss_coef", 0, "--dice_loss_coef", 0]
    rates = ["--seg_lr", "5e-4", "--weight_decay", "0.03"]
    run = stage2_run("--mask_head", "standard", *rates, *none)
    assert (plain_masks.last["mask_head"], run.last["mask_head"]) == ("nano", "standard")
    assert [(g["base_lr"], g["weight_decay"]) for g in run.groups] == [(5e-4, 0.03)]
    assert run.train["loss"] == 0 < plain_masks.train["loss"]


@pytest.mark.slow
def test_auto_shrink_does_what_the_message_asks_for(train, stage1):
    run = train(train_seg_stage2, "--stage1_run", stage1.folder, "--auto_shrink", 1)
    assert run.model["class_embed.0.weight"].shape[0] == 4


@pytest.mark.slow
def test_last_pt_stands_in_and_the_next_command_can_be_pasted(train, few, shrunk, tmp_path):
    """Folders with spaces are quoted, and the images that it names are there."""
    data = unsplit(few, tmp_path / "my data")
    (tmp_path / "old_run").mkdir()
    shutil.copy(shrunk.folder, tmp_path / "old_run/last.pt")
    flags = ["--stage1_run", tmp_path / "old_run", "--val_fraction", 0.25]
    run = train(train_seg_stage2, *flags, dataset=data)
    assert "old_run/last.pt" in run.output.replace("\\", "/")
    words = shlex.split(run.output.splitlines()[-1].removeprefix("Next:"))
    assert words[words.index("--input") + 1 : words.index("--output")] == [str(data / "train")]


@pytest.mark.slow
def test_the_end_names_the_files_that_there_are(plain, plain_masks):
    assert "tb/" in plain.output and "tensorboard --logdir" in plain.output
    assert "tb/" not in plain_masks.output and "tensorboard" not in plain_masks.output


@pytest.mark.slow
def test_of_a_run_of_stage_2_its_detector_alone_is_used(plain_masks, train):
    assert "has a mask head already" not in plain_masks.output
    earlier = ["--stage1_run", plain_masks.folder]
    run = train(train_seg_stage2, *earlier, "--mask_head", "standard")
    assert f"{plain_masks.folder / 'best.pt'} has a mask head already" in run.output
    assert f"train_seg_stage2.py --resume {plain_masks.folder}\n" in run.output
    detector = {key for key in plain_masks.model if not key.startswith("mask_head.")}
    assert detector == {key for key in run.model if not key.startswith("mask_head.")}
    assert all(torch.equal(plain_masks.model[key], run.model[key]) for key in detector)
    assert plain_masks.model.keys() != run.model.keys()  # it has a head of its own


# ---------------------------------------------------------------- runs of the single stage


@pytest.mark.slow
def test_queries_warm_up_and_coefficients_of_the_single_stage(single_run, call):
    kinds = ("cls", "bbox", "giou", "mask", "dice")
    none = [word for kind in kinds for word in (f"--{kind}_loss_coef", 0)]
    warm_up = ["--warmup_epochs", 2, "--lr", "1e-3", "--lr_scheduler", "constant", "--epochs", 2]
    run = single_run("--num_queries", 7, *warm_up, *none)
    assert run.model["query_feat.weight"].shape[0] == 7
    assert (run.last["size"]["queries"], run.last["size"]["select"]) == (7, 7)
    rates = [epoch["train"]["lr"] for epoch in run.metrics["epochs"]]
    assert rates == pytest.approx([0.5e-3, 1e-3])
    assert run.train["loss"] == 0

    # a run of the time when --num_queries left the number of detections alone keeps it
    for file in ("last.pt", "checkpoint.pt"):
        content = torch.load(run.folder / file)
        del content["args"]["num_select"]
        content["size"]["select"] = 100
        torch.save(content, run.folder / file)
    call(train_seg_single_stage.main, "--resume", run.folder, "--epochs", 3)
    content = torch.load(run.folder / "last.pt")
    assert content["size"]["select"] == 100 and content["training"]["progress"]["epoch"] == 3


@pytest.mark.slow
def test_init_ckpt_starts_from_a_file(single_run, shrunk):
    run = single_run("--init_ckpt", shrunk.folder, *STILL, "--num_select", 20)
    assert run.last["size"]["select"] == 20
    source = torch.load(shrunk.folder)["model"]
    rows = [1, 2, 0]  # the file's order is glomerulus, cells, blood_vessel
    for name in ("query_feat.weight", "refpoint_embed.weight"):
        assert torch.equal(run.model[name], source[name])
    head = "class_embed.0.weight"
    assert torch.equal(run.model[head][:3], source[head][rows])
