"""One settings object from many places: the size's recipe < a file < a resumed run's own < flags.

Also the way back: settings as plain values for YAML, JSON and checkpoints.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TypeVar

from rfdetr.console import UserError
from rfdetr.fields import Setting
from rfdetr.settings import TrainingSettings
from rfdetr.sizes import SIZES
from rfdetr.text import printable

S = TypeVar("S")

REPEAT = "# repeat this run: python"  # a run's config.yaml begins so


class MissingSettings(UserError):
    """Some that have no default."""


def settings_of(kind: type) -> dict[str, Setting]:
    """Name -> form of every setting of a script, in the order of its --help."""
    return {field.name: field.metadata["setting"] for field in fields(kind)}


def resolve(kind: type[S], given: dict, stored: dict | None = None, file: dict | None = None) -> S:
    """The settings of a script: the size's recipe < `file` < `stored` (a resumed run's) < `given`.

    Each maps names to values as `read_layer` returns them. Raises MissingSettings, and UserError
    where two do not fit.
    """
    layers = (file or {}) | (stored or {}) | given
    values = {field.name: layers.get(field.name, field.default) for field in fields(kind)}
    if issubclass(kind, TrainingSettings):
        fill_in_from_size(kind, values)
    missing = [f"--{name}" for name, value in values.items() if value is MISSING]
    if missing:
        raise MissingSettings(f"these settings are missing: {', '.join(missing)}")
    settings = kind(**values)
    return settings.checked() if isinstance(settings, TrainingSettings) else settings


def fill_in_from_size(kind: type[TrainingSettings], values: dict) -> None:
    """Give what is left open (or "auto" mixed precision) the value of the size's recipe."""
    for name, setting in settings_of(kind).items():
        left_open = values[name] is MISSING or (name == "amp" and values[name] == "auto")
        if setting.of_size and left_open:
            values[name] = kind.recipe_value(SIZES[values["size"]], name)


def read_layer(kind: type, values: dict, where: str, strict: bool = True) -> dict:
    """The checked values of a --config file or a stored run, by name.

    Unknown names are errors with the near match where `strict`, else passed over: an earlier
    version's run may have had more. Raises UserError naming `where`, the setting and what it takes.
    """
    known = settings_of(kind)
    if strict:
        require_known(values, known, where)
    checked = {}
    for name in known.keys() & values.keys():
        if not known[name].kept:
            if strict:
                raise UserError(f"{where}: {name} belongs to one command: give it as --{name}")
            continue  # of the command that began the run
        if not strict and values[name] is None and not known[name].none:
            continue  # left open by an earlier version
        try:
            checked[name] = known[name].read(values[name])
        except ValueError as error:
            raise UserError(f"{where}: {name}: {error}") from error
    return checked


def require_known(names: Iterable[str], known: Collection[str], where: str) -> None:
    """UserError naming `where` and the near match for the first name that is not known."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            message = f"{where} has no setting {name!r}{meant}. It may have: {', '.join(known)}"
            raise UserError(message)


def plain(settings: object) -> dict:
    """The settings that belong to a run as plain values, for YAML, JSON and checkpoints;
    `read_layer` reads them.
    """
    kept = {}
    for name, setting in settings_of(type(settings)).items():
        value = getattr(settings, name)
        if setting.kept:
            value = list(map(str, value)) if isinstance(value, tuple) else value
            kept[name] = str(value) if isinstance(value, Path) else value
    return kept


def yaml_text(settings: TrainingSettings, commands: list[dict]) -> str:
    """A run's config.yaml: `--config` with it repeats the run.

    commands: as in metrics.json; what they changed stands in comments, the newest values below.
    """
    import yaml  # here: validate_setup.py reads this module where packages are missing

    lines = [f"{REPEAT} {settings.script} --config FILE"]
    for command in commands:
        for name, (before, _) in command["changed"].items():
            lines.append(f"# {name}: {before} before epoch {command['first_epoch']}")
    text = yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True)
    return "\n".join([*map(printable, lines), text])


def script_of_config(path: Path) -> str | None:
    """The script whose run has written a config.yaml; None for a file of another origin."""
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    return first.removeprefix(REPEAT).split()[0] if first.startswith(f"{REPEAT} ") else None
