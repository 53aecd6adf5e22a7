"""A run's checkpoints: what they hold, when they are written, which epoch was the best."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from torch.optim import Optimizer

from rfdetr import distributed
from rfdetr.console import UserError, warn
from rfdetr.runs.places import CONFIG, STATES
from rfdetr.text import command_line
from rfdetr.training.engine import Trainer, random_states, set_random_states
from rfdetr.weights import checkpoint
from rfdetr.weights.archive import require_plain

WEIGHTS = ("regular", "ema")
BEST_OF_EACH = {weights: f"checkpoint_best_{weights}.pth" for weights in WEIGHTS}
OF_TRAINING = {"best.pt", *STATES, *BEST_OF_EACH.values()}  # checkpoints in a run's folder
METRICS = ("bbox/mAP", "segm/mAP")
MOST = 2**31  # no run counts so far


def refuse_file_of_run(file: Path, flag: str, usual: str) -> None:
    """Raise UserError where a training has written the file that would be replaced; usual: another
    name for what would be written.
    """
    if file.name in OF_TRAINING and file.exists() and (file.parent / CONFIG).exists():
        raise UserError(
            f"{flag} {file} is a checkpoint of the training in {file.parent}: it is not "
            f"replaced. Name another file, such as {file.parent / usual}"
        )


class CheckpointKeeper:
    """Writes a run's checkpoints and restores from them.

    `pack(state_dict)` turns the trained module's weights into a self-contained checkpoint's
    content. `metric`, "bbox/mAP" or "segm/mAP", decides which epoch is the best. `best_of_each`:
    the best regular and the best averaged weights get files of their own, too. `digests`: of each
    split's data, for whoever resumes.
    """

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        pack: Callable[[dict], dict],
        metric: str,
        best_of_each: bool,
        digests: dict[str, str],
    ):
        self.folder = folder
        self.trainer = trainer
        self.pack = pack
        self.metric = metric
        self.best_of_each = best_of_each
        self.digests = digests
        self.best: dict | None = None  # {"epoch", "metric", "value", "weights"}
        self.best_values: dict[str, float | None] = {}  # of regular and averaged weights
        self.evaluations_without_gain = 0
        self.nan_batches: list[dict] = []
        self.last_save = time.monotonic()

    # ------------------------------------------------------------ the state of a run

    def save(self, *names: str) -> None:
        """Write the state under each name: files of their own, so that damage to one leaves
        another.
        """
        self.last_save = time.monotonic()
        if distributed.is_main():
            state = self.state()
            for name in names:
                checkpoint.save(self.folder / name, state)

    def minutes_since_save(self) -> float:
        return (time.monotonic() - self.last_save) / 60

    @contextlib.contextmanager
    def naming_last_save(self) -> Iterator[None]:
        """Where another process is lost: ProcessLost with the state that is kept, and how to go on
        with it.
        """
        try:
            yield
        except distributed.ProcessLost as error:
            raise distributed.ProcessLost(f"{error}. {self.last_save_in_words()}") from error

    def last_save_in_words(self) -> str:
        """The newest state in the run's folder, whichever process has written it."""
        saved = [file for name in STATES if (file := self.folder / name).exists()]
        if not saved:
            return "Nothing was saved yet: type the same command again"
        newest = max(saved, key=lambda file: file.stat().st_mtime_ns)
        progress = checkpoint.load(newest)["training"]["progress"]
        place = f"epoch {progress['epoch'] + 1}, after {progress['step_in_epoch']} steps of it"
        words = [*distributed.launcher(), sys.argv[0], "--resume", self.folder]
        return f"The last save is {newest} ({place}). Go on with:\n  {command_line(*words)}"

    def state(self) -> dict:
        """The content of last.pt and checkpoint.pt: all that --resume needs."""
        trainer = self.trainer
        trained = trainer.model.state_dict()
        averaged = trainer.ema.module.state_dict() if trainer.ema else None
        content = self.pack(trained)
        content["ema"] = None if averaged is None else self.pack(averaged)["model"]
        content["training"] = {
            "progress": asdict(trainer.progress),
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "data": self.digests,
            "trained": trained,
            "trained_ema": averaged,
            "random": random_states(trainer.device),
            "best": self.best,
            "each": self.best_values,
            "epochs_without_gain": self.evaluations_without_gain,
            "nan_batches": self.nan_batches,
        }
        return content

    def restore(self, content: dict) -> None:
        """Put back everything state() took; progress itself was read when the run began.

        Raises UserError where the state does not fit the model or was not written by a run.
        """
        trainer = self.trainer
        state = content["training"]
        try:
            check_history(state)
            trainer.model.load_state_dict(state["trained"])
            if trainer.ema:  # an average that begins now begins at the weights
                trainer.ema.module.load_state_dict(state["trained_ema"] or state["trained"])
            restore_optimizer(trainer.optimizer, state["optimizer"])
            trainer.scaler.load_state_dict(state["scaler"])
            set_random_states(state["random"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--resume: the state in {self.folder} does not fit these settings ({reason}). "
                "Leave out flags that change the model"
            ) from error
        self.best = state["best"]
        for weights, value in state["each"].items():
            # earlier versions wrote -1 where nothing was scored
            self.best_values[weights] = None if value == -1.0 else value
        self.evaluations_without_gain = state["epochs_without_gain"]
        self.nan_batches = state.get("nan_batches", [])

    # ------------------------------------------------------------ the best epoch

    def keep_best(self, epoch: int, scores: dict[str, dict]) -> bool:
        """Write best.pt, and the best of each, where an epoch's scores ask for it; True for a new
        best.

        scores: "regular" and, where there is one, "ema" -> the summary of metrics.json's "valid".
        """
        kind, name = self.metric.split("/")
        gained = False
        for weights, summary in scores.items():
            value = summary[kind][name]
            files = []
            if weights not in self.best_values or is_better(value, self.best_values[weights]):
                self.best_values[weights] = value
                if self.best_of_each:
                    files.append(BEST_OF_EACH[weights])
            record = {"epoch": epoch, "metric": self.metric, "value": value, "weights": weights}
            if self.is_new_best(record):
                self.best = record
                gained = True
                files.append("best.pt")
            self.write_best(files, weights, epoch, summary)
        self.evaluations_without_gain = 0 if gained else self.evaluations_without_gain + 1
        return gained

    def is_new_best(self, record: dict) -> bool:
        if self.best is None or record == self.best:  # the latter: adopted, see adopt_newer_best
            return True
        if record["value"] is None:  # where nothing is scored, the last weights are the best
            return self.best["value"] is None
        return record["value"] > (self.best["value"] or 0.0)

    def better_weights(self, scores: dict[str, dict]) -> str:
        """Which of an epoch's weights have had the better best so far."""
        return max(scores, key=lambda weights: self.best_values[weights] or -1.0)

    def write_best(self, files: list[str], weights: str, epoch: int, summary: dict) -> None:
        if not files or not distributed.is_main():
            return
        model = self.trainer.model if weights == "regular" else self.trainer.ema.module
        content = self.pack(model.state_dict())
        content |= {"weights": weights, "epoch": epoch, "scores": summary}
        for file in files:
            checkpoint.save(self.folder / file, content)

    def adopt_newer_best(self) -> None:
        """Adopt the best files of an epoch that the restored state has not reached.

        A kill between best.pt and last.pt leaves them. Their weights are whole, and those that they
        replaced are gone: so they are the best so far, and metrics.json says what best.pt holds.
        The epoch is run again; with the same scores it writes the same files again.
        """
        records: list[dict | None] = []
        if distributed.is_main():
            for name in ("best.pt", *BEST_OF_EACH.values()):
                records.append(self.newer_record(self.folder / name))
        best, *best_of_each = distributed.from_main(records)
        self.best = best or self.best
        for record in best_of_each:
            if record is not None:
                self.best_values[record["weights"]] = record["value"]

    def newer_record(self, file: Path) -> dict | None:
        """What a best file says of itself, if it is of an epoch after the restored one."""
        if not file.exists():
            return None
        kind, name = self.metric.split("/")
        try:
            content = checkpoint.load(file)
            record = {
                "epoch": content["epoch"],
                "metric": self.metric,
                "value": content["scores"][kind][name],
                "weights": content["weights"],
            }
        except (UserError, KeyError, TypeError) as error:
            warn(f"{file} tells no score ({error}): the next best epoch replaces it")
            return None
        newer = is_best_record(record) and record["epoch"] > self.trainer.progress.epoch
        return record if newer else None


def is_better(value: float | None, than: float | None) -> bool:
    if value is None:
        return False
    return than is None or value > than


def restore_optimizer(optimizer: Optimizer, state: dict) -> None:
    """Take over moments and the last rates alone: flags given anew win, no stranger's setting
    reaches a kernel.

    Raises ValueError for moments of other shapes: a fused step would write beyond smaller ones.
    """
    own_settings = []
    for group in optimizer.param_groups:
        own = {key: value for key, value in group.items() if key not in ("params", "lr")}
        own_settings.append(own)
    for moments in state["state"].values():
        require_plain(moments)
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        if type(group["lr"]) not in (int, float):
            raise ValueError("the optimizer's rates are no numbers")
    for parameter, moments in optimizer.state.items():
        if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
            raise ValueError("the optimizer's moments have other shapes than the weights")
        if moments["step"].numel() != 1:
            raise ValueError("the optimizer's step is no number")
    for group, own in zip(optimizer.param_groups, own_settings):
        group.update(own)


def check_history(state: dict) -> None:
    """Raise ValueError where a checkpoint's "training" has no history of scores as state() writes
    it.
    """
    if state["best"] is not None and not is_best_record(state["best"]):
        raise ValueError("its best epoch is none")
    for weights, value in state["each"].items():
        if weights not in WEIGHTS or not (value is None or type(value) is float):
            raise ValueError("its best scores are no numbers")
    without_gain = state["epochs_without_gain"]
    if type(without_gain) is not int or not 0 <= without_gain < MOST:
        raise ValueError("its epochs without gain are no count")
    problems = state.get("nan_batches", [])
    if type(problems) is not list or not all(type(problem) is dict for problem in problems):
        raise ValueError("its steps without a finite loss are no list")
    if not all(type(value) in (int, float) for value in state["scaler"].values()):
        raise ValueError("its gradient scale is no number")


def is_best_record(record: object) -> bool:
    """Whether this is what CheckpointKeeper.best holds."""
    if type(record) is not dict or record.keys() != {"epoch", "metric", "value", "weights"}:
        return False
    value = record["value"]
    epoch = record["epoch"]
    if record["metric"] not in METRICS or record["weights"] not in WEIGHTS:
        return False
    if value is not None and not (type(value) is float and 0 <= value <= 1):
        return False
    return type(epoch) is int and 0 < epoch < MOST
