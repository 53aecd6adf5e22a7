"""The state that a run goes on from."""

from __future__ import annotations

from pathlib import Path

from rfdetr.console import UserError, warn
from rfdetr.runs.log import start_command
from rfdetr.training.engine import Progress
from rfdetr.weights import checkpoint


def newest_run(kind: str) -> Path:
    folders = [
        p
        for p in Path("runs").glob(f"{kind}_*")
        if (p / "last.pt").exists() or (p / "checkpoint.pt").exists()
    ]
    if not folders:
        raise UserError(
            f"--resume auto: no run under runs/{kind}_* has a last.pt or checkpoint.pt. Name the run's folder."
        )
    return max(folders, key=lambda p: p.stat().st_mtime)


def latest_state(folder: Path) -> dict:
    """The furthest of a run's last.pt and checkpoint.pt; a damaged one is named and passed over.  Raises UserError."""
    found, problems = [], []
    for path in (folder / "last.pt", folder / "checkpoint.pt"):
        if path.exists():
            try:
                content = checkpoint.load(path)
                progress = Progress(**content["training"]["progress"])
                found.append(
                    (
                        (progress.epoch, progress.step),
                        path,
                        content | {"args": dict(content["args"])},
                    )
                )
            except UserError as error:
                problems.append(str(error))
            except (KeyError, TypeError, ValueError, AttributeError):
                problems.append(f"{path} holds nothing that a run can go on with")
    if not found:
        command = start_command(folder)
        why = "; ".join(problems) or f"there is no last.pt or checkpoint.pt in {folder}"
        if command and not problems:
            why += ": the run ended before its first save"
        raise UserError(
            f"--resume: {why}"
            + (f". Start anew, in another folder:\n  {command}" if command else "")
        )
    _, path, content = max(found, key=lambda one: one[0])
    for problem in problems:
        warn(f"{problem}: going on from the other one, {path}")
    return content
