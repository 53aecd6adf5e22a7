"""The settings of every script: where a value comes from, what it may be, and how it is kept."""

from __future__ import annotations

from dataclasses import MISSING, FrozenInstanceError, fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rfdetr.cli import take_config, training_settings
from rfdetr.console import UserError
from rfdetr.fields import LEAST_TILE
from rfdetr.resolve import plain, read_layer, resolve, settings_of, yaml_text
from rfdetr.settings import (
    EARLY_STOPPING_PATIENCE,
    STAGES,
    DetectorSettings,
    SegmentationSettings,
    SingleSettings,
)
from rfdetr.sizes import SIZES, LossWeights
from rfdetr.tool_settings import (
    ConvertSettings,
    EvaluationSettings,
    ExportSettings,
    InferenceSettings,
    PredictionSettings,
    ShrinkSettings,
    ValidationSettings,
)

TRAINING = tuple(STAGES.values())
ALL = (
    *TRAINING,
    EvaluationSettings,
    PredictionSettings,
    ShrinkSettings,
    ExportSettings,
    ConvertSettings,
    ValidationSettings,
)
STORED = {  # what runs of earlier versions keep beside the settings of today
    "effective_batch": 2,
    "no_amp": False,
    "debug": False,
    "resume": None,
    "output_dir": "runs/detector_nano_384_1",
}


def by_name(kind: type) -> str:
    return kind.__name__


# ---------------------------------------------------------------- where a value comes from


def test_the_command_line_wins_over_the_run_the_file_and_the_size():
    given = {"epochs": 4}
    stored = {"epochs": 3}
    file = {"epochs": 2}
    assert resolve(DetectorSettings, given, stored, file).epochs == 4
    assert resolve(DetectorSettings, {}, stored, file).epochs == 3
    assert resolve(DetectorSettings, {}, None, file).epochs == 2
    assert resolve(DetectorSettings, {}).epochs == SIZES["nano"].recipe.epochs


def test_the_layers_are_merged_setting_by_setting():
    given, stored, file = {"lr": 0.3}, {"lr": 0.2, "seed": 2}, {"lr": 0.1, "seed": 1, "patience": 5}
    resolved = resolve(DetectorSettings, given, stored, file)
    assert (resolved.lr, resolved.seed, resolved.patience) == (0.3, 2, 5)


@pytest.mark.parametrize("layer", ["given", "stored", "file"])
def test_the_size_of_any_layer_decides_the_defaults(layer):
    layers = {"given": {}, "stored": None, "file": None} | {layer: {"size": "tiny"}}
    assert resolve(DetectorSettings, **layers).lr == SIZES["tiny"].recipe.lr


def test_none_of_a_higher_layer_means_the_default():
    """A stored run at the size's own side takes back a file's `resolution: 512`."""
    resolved = resolve(DetectorSettings, {}, {"resolution": None}, {"resolution": 512})
    assert resolved.resolution == 384


@pytest.mark.parametrize("size", SIZES)
def test_defaults_of_the_three_stages_are_the_sizes(size):
    recipe = SIZES[size].recipe
    detector = resolve(DetectorSettings, {"size": size})
    assert (detector.epochs, detector.recipe_batch, detector.accum) == (
        recipe.epochs,
        recipe.batch,
        recipe.accum,
    )
    assert (detector.lr, detector.lr_encoder) == (recipe.lr, recipe.lr_encoder)
    assert (detector.drop_path, detector.min_steps) == (recipe.drop_path, recipe.min_steps)
    assert (detector.multi_scale, detector.workers) == (recipe.multi_scale, recipe.workers)

    head = resolve(SegmentationSettings, {"size": size})
    assert (head.epochs, head.recipe_batch, head.accum) == (
        recipe.seg_epochs,
        recipe.seg_batch,
        recipe.seg_accum,
    )
    assert (head.seg_lr, head.weight_decay) == (recipe.seg_lr, recipe.seg_weight_decay)
    assert (head.multi_scale, head.min_steps) == (recipe.seg_multi_scale, recipe.seg_min_steps)
    assert (head.cache_views, head.workers) == (recipe.cache_views, recipe.workers)

    single = resolve(SingleSettings, {"size": size})
    assert (single.epochs, single.recipe_batch, single.accum) == (
        recipe.epochs,
        recipe.batch,
        recipe.accum,
    )
    assert (single.lr, single.lr_encoder) == (recipe.single_lr, recipe.single_lr_encoder)
    assert single.mask_loss_coef == recipe.single_mask_loss_coef
    assert single.dice_loss_coef == recipe.single_dice_loss_coef


@pytest.mark.parametrize("kind", TRAINING, ids=by_name)
def test_every_setting_of_a_training_run_has_a_value_for_every_size(kind):
    for size in SIZES:
        resolved = resolve(kind, {"size": size})
        assert MISSING not in vars(resolved).values()


def test_the_specified_defaults():
    detector = resolve(DetectorSettings, {})
    assert (detector.size, detector.resolution, detector.dataset) == ("nano", 384, Path("dataset"))
    assert (detector.head, detector.ema, detector.patience) == ("coco91", True, 0)
    assert detector.pretrain_weights == "auto" and detector.pretrain_exclude_keys == ()
    assert (detector.run_test, detector.fast_dev_run, detector.resume) == (False, None, None)
    head = resolve(SegmentationSettings, {})
    assert head.resolution is None  # the detector's
    assert (head.mask_head, head.cache, head.auto_shrink) == ("auto", "auto", False)
    single = resolve(SingleSettings, {})
    assert (single.lr, single.lr_encoder, single.warmup_epochs) == (1e-4, 1.5e-4, 0.0)


def test_settings_that_must_be_given_are_named_all_at_once():
    with pytest.raises(UserError) as caught:
        resolve(PredictionSettings, {"input": ("a.png",)})
    assert "--checkpoint" in str(caught.value) and "--output" in str(caught.value)
    assert "--input" not in str(caught.value)


@pytest.mark.parametrize("kind", ALL, ids=by_name)
def test_every_setting_has_a_help_text(kind):
    assert all(setting.help for setting in settings_of(kind).values())


def test_resolved_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        resolve(DetectorSettings, {}).epochs = 3


# ---------------------------------------------------------------- what a value may be


GOOD = [
    (DetectorSettings, "epochs", "3", 3),
    (DetectorSettings, "batch", "auto", "auto"),
    (DetectorSettings, "batch", 65536, 65536),
    (DetectorSettings, "workers", 0, 0),
    (DetectorSettings, "lr", "1e-4", 1e-4),
    (DetectorSettings, "lr", 0, 0.0),
    (DetectorSettings, "drop_path", 0.9, 0.9),
    (DetectorSettings, "val_fraction", 0.001, 0.001),
    (DetectorSettings, "val_fraction", None, None),
    (DetectorSettings, "ema", "YES", True),
    (DetectorSettings, "ema", "false", False),
    (DetectorSettings, "ema", 0, False),
    (DetectorSettings, "ema", True, True),
    (DetectorSettings, "size", "seg-nano", "seg-nano"),
    (DetectorSettings, "dataset", "my data", Path("my data")),
    (DetectorSettings, "pretrain_exclude_keys", ["a.*", "b"], ("a.*", "b")),
    (DetectorSettings, "pretrain_exclude_keys", [], ()),
    (SegmentationSettings, "cache_views", 4, 4),
    (SingleSettings, "num_queries", 10_000, 10_000),
    (PredictionSettings, "threshold", 1, 1.0),
]


@pytest.mark.parametrize("kind, name, value, expected", GOOD)
def test_values_are_read_from_texts_and_from_plain_values(kind, name, value, expected):
    checked = read_layer(kind, {name: value}, "config.yaml")[name]
    assert checked == expected and type(checked) is type(expected)


BAD = [
    (DetectorSettings, "epochs", 0, "from 1 to"),
    (DetectorSettings, "epochs", "many", "a whole number"),
    (DetectorSettings, "epochs", 2.5, "a whole number"),
    (DetectorSettings, "epochs", None, "None"),
    (DetectorSettings, "epochs", 10**12, "to 1,000,000,000"),
    (DetectorSettings, "batch", 0, "from 1 to"),
    (DetectorSettings, "batch", 65537, "to 65,536"),
    (DetectorSettings, "batch", "automatic", "automatic"),
    (DetectorSettings, "workers", -1, "from 0"),
    (DetectorSettings, "seed", -1, "from 0"),
    (DetectorSettings, "lr", -1, "from 0"),
    (DetectorSettings, "lr", "nan", "nan"),
    (DetectorSettings, "lr", float("inf"), "inf"),
    (DetectorSettings, "lr", [1], "[1]"),
    (DetectorSettings, "drop_path", 0.91, "to 0.9"),
    (DetectorSettings, "val_fraction", 1.5, "to 0.9"),
    (DetectorSettings, "val_fraction", 0, "from 0.001"),
    (DetectorSettings, "ema", "maybe", "0, 1, true, false, yes or no"),
    (DetectorSettings, "ema", 5, "0, 1, true, false, yes or no"),
    (DetectorSettings, "amp", "fp8", "auto, bf16, fp16, off"),
    (DetectorSettings, "size", "huge", "tiny, nano, small"),
    (DetectorSettings, "head", "coco80", "coco91, dataset"),
    (DetectorSettings, "dataset", {}, "{}"),
    (DetectorSettings, "dataset", "", "an empty text"),
    (DetectorSettings, "pretrain_exclude_keys", "a*", "a list"),
    (DetectorSettings, "pretrain_exclude_keys", [["a"]], "one value"),
    (SegmentationSettings, "seg_lr", -1, "from 0"),
    (SegmentationSettings, "cache", "tape", "auto, ram, disk, off"),
    (SegmentationSettings, "cache_views", 5, "to 4"),
    (SegmentationSettings, "mask_head", "large", "auto, nano, standard"),
    (SegmentationSettings, "mask_loss_coef", -0.5, "from 0"),
    (SingleSettings, "num_queries", 0, "from 1 to"),
    (SingleSettings, "num_select", 10_001, "to 10,000"),
    (SingleSettings, "lr_scheduler", "linear", "cosine, step, constant"),
    (SingleSettings, "warmup_epochs", -1, "from 0"),
    (EvaluationSettings, "batch", 0, "from 1 to"),
    (EvaluationSettings, "split", "all", "train, valid, test"),
    (PredictionSettings, "threshold", 2, "to 1"),
    (PredictionSettings, "gray", 30, "auto, full or a percentage of 51 to 100"),
    (PredictionSettings, "nms", -0.1, "from 0"),
    (PredictionSettings, "pictures", 1, "a text"),
    (PredictionSettings, "pictures", "gif", "png, jpg, 0"),
    (ExportSettings, "format", "onnx", "rfdetr"),
    (ConvertSettings, "format", "coco", "auto, yolo, voc, labelme, masks"),
    (ValidationSettings, "resolution", 0, "from 1 to"),
]


@pytest.mark.parametrize("kind, name, value, expected", BAD)
def test_a_bad_value_names_its_origin_the_setting_and_what_fits(kind, name, value, expected):
    with pytest.raises(UserError) as caught:
        read_layer(kind, {name: value}, "config.yaml")
    for word in ("config.yaml", name, expected):
        assert word in str(caught.value)


@pytest.mark.parametrize("wrong, near", [("epoch", "epochs"), ("--lr", "lr"), ("zzz", None)])
def test_an_unknown_name_is_an_error_with_the_near_match(wrong, near):
    with pytest.raises(UserError) as caught:
        read_layer(DetectorSettings, {wrong: 1}, "config.yaml")
    text = str(caught.value)
    assert "config.yaml" in text and repr(wrong) in text and "lr_encoder" in text
    assert (f"did you mean {near}?" in text) if near else ("did you mean" not in text)


def test_a_choice_that_is_a_number_may_be_written_as_one():
    assert read_layer(PredictionSettings, {"pictures": 0}, "config.yaml") == {"pictures": "0"}


def test_a_name_of_another_script_is_unknown():
    with pytest.raises(UserError, match="seg_lr"):
        read_layer(DetectorSettings, {"seg_lr": 0.1}, "config.yaml")


@pytest.mark.parametrize("kind", [DetectorSettings, SingleSettings], ids=by_name)
def test_a_resolution_off_the_grid_names_the_nearest(kind):
    with pytest.raises(UserError, match="100.*96 and 128"):
        resolve(kind, {"size": "nano", "resolution": 100})
    assert resolve(kind, {"size": "nano", "resolution": 96}).resolution == 96


def test_stage_2_takes_its_detectors_resolution_or_one_on_the_grid():
    assert resolve(SegmentationSettings, {"size": "nano"}).resolution is None
    with pytest.raises(UserError, match="96 and 128"):
        resolve(SegmentationSettings, {"size": "nano", "resolution": 100})


def test_two_files_of_weights_are_refused():
    backbone = {"backbone_weights": Path("dinov2.safetensors")}
    for kind, other in (
        (DetectorSettings, {"pretrain_weights": "best.pt"}),
        (SingleSettings, {"pretrain_weights": "best.pt"}),
        (SingleSettings, {"init_ckpt": Path("best.pt")}),
    ):
        with pytest.raises(UserError, match="--backbone_weights"):
            resolve(kind, backbone | other)
    for word in ("auto", "none"):
        resolve(DetectorSettings, backbone | {"pretrain_weights": word})


# ---------------------------------------------------------------- what follows from the values


@pytest.mark.parametrize("word", [None, "auto"])
def test_automatic_precision_is_the_sizes_own(word):
    given = {"amp": word} if word else {}
    assert resolve(DetectorSettings, given | {"size": "tiny"}).amp == "off"
    assert resolve(DetectorSettings, given | {"size": "nano"}).amp == "auto"
    assert resolve(DetectorSettings, {"size": "tiny", "amp": "bf16"}).amp == "bf16"


@pytest.mark.parametrize("kind, usual", [(DetectorSettings, 4), (SegmentationSettings, 8)])
def test_the_effective_batch_is_batch_times_accumulation(kind, usual):
    assert resolve(kind, {"size": "tiny", "batch": 3, "accum": 5}).effective_batch == 15
    automatic = resolve(kind, {"size": "tiny", "batch": "auto", "accum": 2})
    assert (automatic.batch, automatic.effective_batch) == ("auto", 2 * usual)


@pytest.mark.parametrize(
    "given, evaluations",
    [
        ({}, 0),
        ({"patience": 3}, 3),
        ({"early_stopping": True}, EARLY_STOPPING_PATIENCE),
        ({"early_stopping": True, "patience": 3}, 3),
    ],
)
def test_a_run_stops_after_so_many_evaluations_without_gain(given, evaluations):
    assert resolve(SingleSettings, given).stop_after == evaluations


def test_a_fast_dev_run_has_one_epoch():
    assert resolve(DetectorSettings, {"epochs": 9}).epochs == 9
    assert resolve(DetectorSettings, {"epochs": 9, "fast_dev_run": 3}).epochs == 1


@pytest.mark.parametrize("name", ["tiny", "nano", "seg-nano"])
def test_detections_follow_the_queries(name):
    def numbers(**given: int) -> tuple[int, int]:
        size = resolve(SingleSettings, {"size": name} | given).model_size
        return size.queries, size.select

    own = SIZES[name]
    assert numbers() == (own.queries, own.select)
    assert numbers(num_queries=400) == (400, 400)
    assert numbers(num_select=50) == (own.queries, 50)
    assert numbers(num_queries=7, num_select=20) == (7, 20)
    assert resolve(DetectorSettings, {"size": name, "num_queries": 400}).model_size.select == 400
    assert resolve(SegmentationSettings, {"size": name}).model_size is own


def test_loss_weights():
    assert resolve(DetectorSettings, {}).loss_weights == LossWeights()
    given = {"mask_loss_coef": 2.0, "dice_loss_coef": 0.5}
    assert resolve(SegmentationSettings, given).loss_weights == LossWeights(mask=2.0, dice=0.5)
    given |= {"cls_loss_coef": 3.0, "bbox_loss_coef": 4.0, "giou_loss_coef": 6.0}
    expected = LossWeights(cls=3.0, bbox=4.0, giou=6.0, mask=2.0, dice=0.5)
    assert resolve(SingleSettings, given).loss_weights == expected


# ---------------------------------------------------------------- what is kept


def values_for(field, setting) -> st.SearchStrategy:
    """Values that a setting takes, as `read` returns them."""
    if field.type.startswith("bool"):
        return st.booleans()
    if setting.choices:
        return st.sampled_from(sorted(setting.choices))
    if field.name == "gray":
        return st.floats(51, 100) | st.sampled_from(setting.words)
    words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9)
    if field.type.startswith("tuple"):
        return st.lists(words, max_size=3).map(tuple)
    if field.type.startswith("Path"):
        return words.map(Path)
    if field.type.startswith("int"):
        least = LEAST_TILE if field.name == "tile" else 1
        return st.integers(least, least + 3) | st.sampled_from(setting.words or (least,))
    if field.type.startswith("float"):
        return st.floats(0.001, 0.9)
    return words


@st.composite
def given_settings(draw) -> tuple[type, dict]:
    kind = draw(st.sampled_from(TRAINING))
    apart = {"resolution", "backbone_weights"}  # they must fit others
    forms = settings_of(kind)
    given = {}
    for field in fields(kind):
        if field.name not in apart and draw(st.booleans()):
            given[field.name] = draw(values_for(field, forms[field.name]))
    return kind, given


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(given_settings())
def test_what_a_run_keeps_comes_back_through_yaml(drawn):
    kind, given = drawn
    resolved = resolve(kind, given)
    kept = yaml.safe_load(yaml.safe_dump(plain(resolved)))
    again = resolve(kind, read_layer(kind, kept, "config.yaml"))
    of_the_command = {name for name, setting in settings_of(kind).items() if not setting.kept}
    assert of_the_command == {"output_dir", "resume", "fast_dev_run"}
    assert not of_the_command & kept.keys()
    for name in kept:
        assert getattr(again, name) == getattr(resolved, name)


@pytest.mark.parametrize("kind", TRAINING, ids=by_name)
def test_arguments_of_earlier_runs_are_accepted(kind):
    """Their checkpoints keep flags that no setting has today; some of today's they lack."""
    resolved = resolve(kind, {"size": "tiny", "epochs": 3, "lr_scheduler": "step"})
    kept = plain(resolved)
    del kept["lr_scheduler"]
    stored = read_layer(kind, kept | STORED | {"of_long_ago": object()}, "last.pt", strict=False)
    assert "effective_batch" not in stored and "of_long_ago" not in stored
    again = resolve(kind, {}, stored)
    assert (again.size, again.epochs, again.lr_scheduler) == ("tiny", 3, "cosine")
    assert plain(again) == kept | {"lr_scheduler": "cosine"}


def test_values_of_earlier_runs_are_checked():
    with pytest.raises(UserError, match="last.pt: lr"):
        read_layer(DetectorSettings, {"lr": "fast", "old": 1}, "last.pt", strict=False)


def test_what_a_script_keeps_is_plain():
    kept = plain(resolve(InferenceSettings, {"checkpoint": Path("best.pt")}))
    assert kept["checkpoint"] == "best.pt"
    excluded = {"pretrain_exclude_keys": ("a.*", "b")}
    assert plain(resolve(DetectorSettings, excluded))["pretrain_exclude_keys"] == ["a.*", "b"]


# ---------------------------------------------------------------- --config files


def from_file(tmp_path, text: str) -> DetectorSettings:
    """The settings of stage 1 with a --config file of this text and size tiny."""
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    words = ["--size", "tiny", "--config", str(file)]
    return training_settings(DetectorSettings, "", words)[0]


def test_a_plain_off_in_a_file_is_off(tmp_path):
    """YAML reads it as false."""
    assert from_file(tmp_path, "amp: off\nema: off\n").amp == "off"
    assert from_file(tmp_path, "amp: off\nema: off\n").ema is False


@pytest.mark.parametrize("line", ["resume: runs/x", "fast_dev_run: 2", "output_dir: runs/x"])
def test_what_belongs_to_one_command_is_refused_in_a_file(tmp_path, line):
    with pytest.raises(UserError, match=f"--{line.split(':')[0]}"):
        from_file(tmp_path, line)


@pytest.mark.parametrize("text", ["- a\n- b\n", "epochs", "epochs: [1", "\0"])
def test_a_file_that_holds_no_settings_is_named(tmp_path, text):
    with pytest.raises(UserError, match="settings.yaml"):
        from_file(tmp_path, text)


def test_a_trial_run_is_kept_as_what_it_was(tmp_path):
    settings = resolve(DetectorSettings, {"size": "tiny", "epochs": 9, "fast_dev_run": 3})
    assert plain(settings)["epochs"] == 1


def test_the_config_of_another_scripts_run_is_told_to_be_one(tmp_path):
    file = tmp_path / "config.yaml"
    settings = resolve(SegmentationSettings, {"size": "tiny", "dataset": tmp_path})
    file.write_text(yaml_text(settings, []))
    for kind in (DetectorSettings, PredictionSettings):
        with pytest.raises(UserError, match="is the config of train_seg_stage2.py: run that"):
            take_config(kind, {"config": file})
    assert take_config(SegmentationSettings, {"config": file})["masks"] == "auto"
    assert take_config(SegmentationSettings, {"config": tmp_path})["masks"] == "auto"  # its run
    file.write_text("masks: auto\n")
    with pytest.raises(UserError, match="has no setting 'masks'"):
        take_config(DetectorSettings, {"config": file})


def test_a_checkpoint_is_no_config(tmp_path):
    file = tmp_path / "best.pt"
    file.write_bytes(b"PK\x03\x04\x80\x02")
    with pytest.raises(UserError, match="no YAML file: it holds no text. A checkpoint belongs to"):
        take_config(DetectorSettings, {"config": file})
