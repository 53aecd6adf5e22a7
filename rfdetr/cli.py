"""The command line: flags made from a script's settings, `--config FILE.yaml`, `--resume`."""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from rfdetr.commands import flags_of, same_command, training_command
from rfdetr.console import UserError, run_script, tick, warn
from rfdetr.fields import Setting, by_size
from rfdetr.packages import require_packages
from rfdetr.parser import Parser
from rfdetr.resolve import (
    MissingSettings,
    plain,
    read_layer,
    resolve,
    script_of_config,
    settings_of,
)
from rfdetr.runs.places import (
    CONFIG,
    data_of_run,
    detector_of_run,
    find_checkpoint,
    missing,
    newest_run,
    require_state,
    what_is_there,
)
from rfdetr.settings import DataSettings, SingleSettings, TrainingSettings
from rfdetr.sigterm import TOO_EARLY, end_on_ctrl_c
from rfdetr.sizes import SIZES, with_queries
from rfdetr.text import as_typed, command_line, is_url
from rfdetr.tool_settings import EvaluationSettings

S = TypeVar("S")
T = TypeVar("T", bound=TrainingSettings)


# ---------------------------------------------------------------- before the slow imports


def check_command(kind: type, description: str, name: str) -> None:
    """Answer --help, and refuse a wrong flag or a file that is missing, where a script is run.

    Scripts call this before they import torch, which takes seconds and which Ctrl-C ends at once;
    `name` is their __name__.
    """
    if name == "__main__":
        run_script(partial(_check, kind, description), interrupted=TOO_EARLY)
        end_on_ctrl_c()


def _check(kind: type, description: str, argv: list[str] | None) -> None:
    """Raises UserError, SystemExit after --help."""
    parser = make_parser(kind, description)
    given = vars(parser.parse_args(argv))
    require_packages()
    file = take_config(kind, given)
    given.pop("no_amp", None)
    if given.get("resume"):  # the run has the other settings
        require_state(run_to_resume(kind, given["resume"]))
        return
    require_files(resolved(parser, kind, given, file))


def require_files(settings: object) -> None:
    """UserError for what the settings name and does not exist, as far as torch is not needed."""
    find_checkpoints(settings)
    settings = with_own_dataset(settings)
    weights = getattr(settings, "pretrain_weights", "auto")
    if weights not in ("auto", "none") and not is_url(weights):
        find_checkpoint(Path(weights).expanduser())
    if getattr(settings, "stage1_run", None) and not settings.checkpoint:
        detector_of_run(settings.stage1_run, training_command(plain(settings)))
    inputs = getattr(settings, "input", ())
    for text in [str(inputs)] if isinstance(inputs, Path) else inputs:
        if not (glob.has_magic(text) or Path(text).exists()):
            raise UserError(f"--input {as_typed(text)}: {what_is_there(Path(text))}")
    if isinstance(settings, DataSettings):
        from rfdetr.data.layout import find_splits  # --help works without the packages behind it

        find_splits(settings.dataset)


# ---------------------------------------------------------------- the settings of a script


def script_settings(kind: type[S], description: str, argv: list[str] | None) -> S:
    """The settings of a script that trains nothing: --config FILE < command line.

    Raises UserError.
    """
    parser = make_parser(kind, description)
    given = vars(parser.parse_args(argv))
    file = take_config(kind, given)
    return with_own_dataset(with_checkpoints(resolved(parser, kind, given, file)), tick)


def resolved(parser: Parser, kind: type[S], given: dict, file: dict) -> S:
    """The settings.  Raises UserError; for missing ones as the parser does for wrong ones."""
    try:
        return resolve(kind, given, file=file)
    except MissingSettings as error:
        parser.error(str(error))


def training_settings(
    kind: type[T], description: str, argv: list[str] | None
) -> tuple[T, dict | None]:
    """The settings of a training script, and the checkpoint's content to go on from, or None.

    With --resume the run's own settings stand between --config and the command line; the run is
    locked before it is read, so that nobody trains it on meanwhile. Raises UserError.
    """
    given = vars(make_parser(kind, description).parse_args(argv))
    file = take_config(kind, given)
    if given.pop("no_amp", False):
        given["amp"] = "off"
    stored = None
    resumed = None
    if given.get("resume"):
        folder, resumed = read_run(kind, given["resume"])
        if "size" in given:
            require_size_of_run(resumed, given["size"], folder)
        stored = read_layer(kind, resumed["args"], f"--resume {folder}: stored", strict=False)
        stored |= own_choices_of_an_earlier_run(kind, stored, resumed)
        given["output_dir"] = folder
    settings = resolve(kind, given, stored, file)
    if settings.expanded_scales and not settings.multi_scale:
        warn("--expanded_scales 1 changes nothing without --multi_scale 1")
    if not resumed:  # a run has in its own state what it began with
        settings = with_checkpoints(settings)
    return settings, resumed


def with_checkpoints(settings: S) -> S:
    """With the files that folders of runs mean, which are said.  Raises UserError."""
    found = find_checkpoints(settings)
    for name, path in found.items():
        folder = getattr(settings, name)
        if folder != path:
            tick(f"--{name} {folder}: {path.name} of this run")
    return replace(settings, **found)


def with_own_dataset(settings: S, tell: Callable[[str], object] = lambda text: None) -> S:
    """The same, or for evaluate.py without --dataset with the one of the checkpoint's run.

    tell: what prints which one that is.  Raises UserError where it has gone.
    """
    if not isinstance(settings, EvaluationSettings) or settings.dataset:
        return settings
    checkpoint = find_checkpoint(settings.checkpoint)
    data = data_of_run(checkpoint)
    if not data:
        return replace(settings, dataset=DataSettings.dataset)
    dataset = data["dataset"]
    settings = replace(settings, rename=settings.rename or data["rename"])
    if not dataset.exists():
        again = same_command("evaluate.py", settings)
        raise UserError(
            f"the run in {checkpoint.parent} was trained on the dataset {dataset}, and "
            f"{missing(dataset)} (looked from {Path.cwd()}). Name the folder where it is now: "
            f"{again} --dataset DIR"
        )
    settings = replace(settings, dataset=dataset)
    words = command_line(*flags_of(vars(settings), "dataset", "rename"))
    tell(f"{words}: of the run in {checkpoint.parent}")
    return settings


def find_checkpoints(settings: object) -> dict[str, Path]:
    """The file of each checkpoint that the settings name.  Raises UserError."""
    found = {}
    for name, setting in settings_of(type(settings)).items():
        path = getattr(settings, name)
        if setting.checkpoint and path is not None:
            found[name] = find_checkpoint(path)
    return found


def read_run(kind: type[TrainingSettings], name: str) -> tuple[Path, dict]:
    """The folder that --resume names, locked, and its latest state.  Raises UserError."""
    from rfdetr.runs.lock import lock_run  # with torch behind it: not for every --help
    from rfdetr.training.resume import latest_state, require_stage

    folder = run_to_resume(kind, name)
    if folder.is_dir() and os.environ.get("RANK", "0") == "0":
        lock_run(folder)
    content = latest_state(folder)
    require_stage(content, kind.stage, folder)
    return folder, content


def run_to_resume(kind: type[TrainingSettings], name: str) -> Path:
    """The folder that --resume names, or the newest.  Raises UserError."""
    return newest_run(kind.run_stem) if name == "auto" else Path(name)


def require_size_of_run(resumed: dict, size: str, folder: Path) -> None:
    """UserError with the right --size where the run is of another."""
    from rfdetr.weights.checkpoint import require_size

    require_size(resumed, SIZES[size], folder)


def own_choices_of_an_earlier_run(kind: type, stored: dict, resumed: dict) -> dict:
    """What a run of an earlier version decided without writing it into its settings."""
    if not issubclass(kind, SingleSettings) or stored.get("num_select") is not None:
        return {}
    kept = resumed["size"]["select"]  # which did not follow --num_queries
    size = SIZES[resumed["size"]["name"]]
    follows = kept == with_queries(size, stored.get("num_queries"), None).select
    return {} if follows else {"num_select": kept}


def make_parser(kind: type, description: str) -> Parser:
    """A parser with a flag for every setting of `kind`; its result has only what is given."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    for field in fields(kind):
        setting = field.metadata["setting"]
        default = field.default
        if setting.of_size:
            default = by_size(
                {size.name: kind.recipe_value(size, field.name) for size in SIZES.values()}
            )
        add_flag(parser, field.name, setting, default)
    if issubclass(kind, TrainingSettings):
        parser.add_argument("--no_amp", action="store_true", help="the same as --amp off")
    read_path = flag_type(Setting(Path, ""))
    parser.add_argument(
        "--config", type=read_path, metavar="FILE", help="settings in YAML; flags win"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def add_flag(parser: Parser, name: str, setting: Setting, default: object) -> None:
    """A flag that reads its values as `setting` does; `default` is only told in its help."""
    metavar = f"{{{','.join(setting.choices)}}}" if setting.choices else setting.metavar
    options: dict = {"type": flag_type(setting), "metavar": metavar}
    options["help"] = setting.help + default_text(setting, default)
    if setting.bare is not None:
        options |= {"nargs": "?", "const": setting.bare}
    if setting.several:
        options |= {"nargs": "+", "action": "extend"}
    parser.add_argument(f"--{name}", **options)


def flag_type(setting: Setting) -> Callable[[str], object]:
    """For argparse's `type`: how a flag reads a setting's value."""

    def read(text: str) -> object:
        try:
            return setting.read_text(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def default_text(setting: Setting, default: object) -> str:
    """What --help says of a default; nothing where the setting's own help does."""
    if default is MISSING:  # a --config file may give it, too
        return " (required)"
    if "default" in setting.help:
        return ""
    if default is None or default == ():
        return " (default: none)"
    value = int(default) if isinstance(default, bool) else default
    return f" (default: {value})"


def take_config(kind: type, given: dict) -> dict:
    """Take --config and --debug, which are no settings, out of `given`; the file's settings.

    Raises UserError for a file that cannot be read, unknown names and values that do not fit.
    """
    given.pop("debug", None)
    path = given.pop("config", None)
    if path is None:
        return {}
    if path.is_dir():  # a run's
        path /= CONFIG
    values = read_yaml(path)
    owner = script_of_config(path)
    if owner not in (None, getattr(kind, "script", None)) and values.keys() - settings_of(kind):
        raise UserError(
            f"--config {path} is the config of {owner}: run that with it, or name another file"
        )
    return read_layer(kind, values, f"--config {path}")


def read_yaml(path: Path) -> dict:
    """The names and values of a --config file.  Raises UserError where it cannot be read."""
    import yaml  # here, so that --help is quick and works where packages are missing

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"--config {path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--config {path} is no YAML file: it holds no text. A checkpoint belongs to "
            "--checkpoint, or to --resume to train on"
        ) from error
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines of `name: value`, such as `epochs: 50`")
    return content
