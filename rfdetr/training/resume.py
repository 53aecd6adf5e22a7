"""The state that a run goes on from, and what has changed since it was saved."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rfdetr.console import UserError, tick, warn
from rfdetr.data.records import CocoSplit
from rfdetr.files import file_sha256
from rfdetr.resolve import plain
from rfdetr.runs.log import start_command
from rfdetr.runs.metrics_file import has_test_scores
from rfdetr.runs.places import STATES, require_state
from rfdetr.settings import STAGES, TrainingSettings
from rfdetr.text import command_line, counted
from rfdetr.training.engine import Progress
from rfdetr.training.keeper import CheckpointKeeper
from rfdetr.training.session import Session
from rfdetr.weights import checkpoint


def latest_state(folder: Path) -> dict:
    """The content of whichever of a run's last.pt and checkpoint.pt is further; a damaged one is
    named, the other taken.

    Raises UserError where neither can be used.
    """
    require_state(folder)
    states = []
    problems = []
    for path in (folder / name for name in STATES):
        if not path.exists():
            continue
        try:
            content = checkpoint.load(path)
            progress = Progress(**content["training"]["progress"])
            content["args"] = dict(content["args"])
            states.append((progress.epoch, progress.step, path, content))
        except UserError as error:
            problems.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError):
            problems.append(f"{path} holds nothing that a run can go on with")
    if not states:
        raise UserError(damaged_message(folder, problems))
    _, _, path, content = max(states, key=lambda state: state[:2])
    for problem in problems:
        warn(f"{problem}: going on from the other one, {path}")
    return content


def require_stage(content: dict, stage: str, folder: Path) -> None:
    """Raise UserError where a run is another script's."""
    if content["stage"] != stage:
        script = STAGES[content["stage"]].script
        command = command_line("python", script, "--resume", folder)
        raise UserError(f"{folder} is another script's: {command}")


def damaged_message(folder: Path, problems: list[str]) -> str:
    message = f"--resume: {'; '.join(problems)}"
    command = start_command(folder)
    if command:
        message += f". Start anew, in another folder:\n  {command}"
    return message


def changed_settings(settings: TrainingSettings, before: dict) -> dict[str, list]:
    """Name -> [value before, value now] of the settings that a resumed run is given anew.

    before: the run's own, as its checkpoint keeps them; those of earlier versions have fewer.
    """
    changed = {}
    for name, value in plain(settings).items():
        if name in before and before[name] != value:
            changed[name] = [before[name], value]
    return changed


def data_digest(split: CocoSplit) -> str:
    """sha256 of a split's annotations and of which images it has."""
    digest = hashlib.sha256(file_sha256(split.annotation_file).encode())
    for name in split.file_names:
        digest.update(f"{name}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def resumed_progress(
    resumed: dict, splits: dict[str, CocoSplit], digests: dict[str, str], dataset: Path
) -> Progress:
    """Where a resumed run stands.  Splits that are no longer what it saw are said.

    digests: as `data_digest` gives them now. Numbers of unread images are forgotten where train is
    another. Checkpoints of earlier versions hold no digests: there the numbers that exist are kept.
    """
    progress = Progress(**resumed["training"]["progress"])
    before = resumed["training"].get("data")
    if not isinstance(before, dict):
        before = {}
    changed = [name for name in digests if before.get(name, digests[name]) != digests[name]]
    if changed:
        warn(
            f"--resume: {' and '.join(changed)} of {dataset} have other images or annotations than "
            f"epochs 1-{max(progress.epoch, 1)} saw: their scores cannot be compared "
            "with what follows"
        )
    images = len(splits["train"].images)
    counted_tiles = resumed.get("tile") and "tile_overlap" not in resumed  # earlier versions did
    if "train" in changed or counted_tiles:
        progress.unread = []
    progress.unread = [index for index in progress.unread if index < images]
    return progress


def refuse_finished_run(settings: TrainingSettings, progress: Progress, has_test: bool) -> None:
    """UserError where a resumed run has nothing left to do."""
    if settings.epochs > progress.epoch:
        return
    if has_test and not has_test_scores(settings.output_dir):
        return
    epochs = counted(progress.epoch, "epoch")
    words = ["--resume", settings.output_dir, "--epochs", progress.epoch + 20]
    raise UserError(
        f"{settings.output_dir} has finished its {epochs}. To train longer, give "
        f"more: {command_line('python', settings.script, *words)}"
    )


def go_on(session: Session, keeper: CheckpointKeeper) -> None:
    """Restore a resumed run."""
    keeper.restore(session.resumed)
    keeper.adopt_newer_best()
    if session.run:
        session.run.set(best=keeper.best)
    progress = session.progress
    tick(
        f"Going on with {session.folder} in epoch {progress.epoch + 1}, "
        f"after {progress.step_in_epoch} steps of it"
    )
    changed = changed_settings(session.settings, session.resumed["args"])
    for name, (before, now) in changed.items():
        tick(f"--{name}: {before} before, {now} from epoch {progress.epoch + 1} on")
