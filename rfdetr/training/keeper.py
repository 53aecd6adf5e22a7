"""A run's checkpoints: what they hold, when they are written, which one is the best."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rfdetr import distributed
from rfdetr.console import GRACE, Stopped, UserError, warn
from rfdetr.data.loaders import Batch, check_unread, note_unread
from rfdetr.data.workers import STOP_SIGNALS
from rfdetr.files import write_json
from rfdetr.training.engine import Trainer, random_states, set_random_states
from rfdetr.weights import checkpoint

NAN_STEPS = 10  # steps in a row without a finite loss end the run


class CheckpointKeeper:
    """Writes a run's checkpoints: after epochs, every few minutes inside them, and on a signal.

    `pack(state)` turns the trained module's state dict into a self-contained checkpoint's content.
    """

    def __init__(self, session, trainer: Trainer, pack: Callable[[dict], dict]):
        self.session, self.trainer, self.pack = session, trainer, pack
        self.best: dict | None = None
        self.each: dict[str, float] = {}  # best value so far of regular and ema weights
        self.epochs_without_gain = 0
        self.last_save = time.monotonic()
        self.nan_batches: list[dict] = []
        self.warned_of_matches = False
        self.signal: int | None = None
        self.busy = True  # with something that a signal has to wait for
        self.waiting = False  # for a batch: nothing of the run's state changes meanwhile

    @contextmanager
    def watch_signals(self) -> Iterator[None]:
        """Inside, a first signal ends the run after the step, a second one at once.

        A step whose batch does not come, from a loader process that hangs, is not waited for.
        """
        timer = hasattr(signal, "setitimer") and distributed.world_size() == 1

        def note(number: int, frame: object) -> None:
            self.signal = number
            if distributed.world_size() == 1:  # torchrun hands a signal on that came here already
                signal.signal(number, signal.SIG_DFL)
            if not self.busy:
                self.stop()
            if timer:
                signal.setitimer(signal.ITIMER_REAL, GRACE / 2, 1.0)

        def look(number: int, frame: object) -> None:
            if self.waiting:
                signal.setitimer(signal.ITIMER_REAL, 0)
                self.stop()

        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in before:
            if before[number] is not signal.SIG_IGN:  # nohup
                signal.signal(number, note)
        if timer:
            before[signal.SIGALRM] = signal.signal(signal.SIGALRM, look)
        try:
            yield
        finally:
            if timer:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """For what takes long and changes nothing of the run's state: inside, a signal ends the run at once."""
        self.stop_if_asked()
        self.busy = False
        try:
            if self.signal:  # it came between the two
                self.stop()
            yield
        finally:
            self.busy = True

    def state(self) -> dict:
        trainer = self.trainer
        return self.pack(trainer.model.state_dict()) | {
            "ema": self.pack(trainer.ema.module.state_dict())["model"] if trainer.ema else None,
            "training": {
                "progress": asdict(trainer.progress),
                "optimizer": trainer.optimizer.state_dict(),
                "scaler": trainer.scaler.state_dict(),
                "data": self.session.data,
                "trained": trainer.model.state_dict(),
                "trained_ema": trainer.ema.module.state_dict() if trainer.ema else None,
                "random": random_states(trainer.device),
                "best": self.best,
                "each": self.each,
                "epochs_without_gain": self.epochs_without_gain,
                "nan_batches": self.nan_batches,
            },
        }

    def restore(self, content: dict) -> None:
        """Put back everything state() took; progress itself was read when the session began."""
        trainer, state = self.trainer, content["training"]
        settings = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in trainer.optimizer.param_groups
        ]
        try:
            check_history(state)
            trainer.model.load_state_dict(state["trained"])
            if trainer.ema:  # an average that begins now begins at the weights
                trainer.ema.module.load_state_dict(state["trained_ema"] or state["trained"])
            for moments in state["optimizer"]["state"].values():
                checkpoint.require_plain(moments)
            trainer.optimizer.load_state_dict(state["optimizer"])
            if not all(
                type(group["lr"]) in (int, float) for group in trainer.optimizer.param_groups
            ):
                raise ValueError("the optimizer's rates are no numbers")
            for (
                parameter,
                moments,
            ) in trainer.optimizer.state.items():  # a fused step would write beyond smaller ones
                if any(
                    moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")
                ):
                    raise ValueError("the optimizer's moments have other shapes than the weights")
                if moments["step"].numel() != 1:
                    raise ValueError("the optimizer's step is no number")
            trainer.scaler.load_state_dict(state["scaler"])
            set_random_states(state["random"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"--resume: the state in {self.session.folder} does not fit these settings "
                f"({' '.join(str(error).split())[:300]}). Leave out flags that change the model"
            ) from error
        # moments and the last rates alone are taken over: flags given anew win, no stranger's setting reaches a kernel
        for group, given in zip(trainer.optimizer.param_groups, settings):
            group.update(given)
        self.best, self.each = state["best"], state["each"]
        self.epochs_without_gain, self.nan_batches = (
            state["epochs_without_gain"],
            state.get("nan_batches", []),
        )

    def take_newer_best(self) -> None:
        """Adopt the best files of an epoch that the restored state has not reached.

        A kill between best.pt and last.pt leaves them. Their weights are whole, and those that they replaced are gone:
        so they are the best so far, and metrics.json says what best.pt holds. The epoch is run again; with the same
        scores it writes the same files again.
        """
        if self.best is None:
            metric = "bbox/mAP" if self.session.kind == "detector" else "segm/mAP"
        else:
            metric = self.best["metric"]
        folder, epoch = self.session.folder, self.trainer.progress.epoch
        names = ("best.pt", "checkpoint_best_regular.pth", "checkpoint_best_ema.pth")
        stories = (
            [best_story(folder / name, metric, epoch) for name in names]
            if distributed.is_main()
            else []
        )
        best, *each = distributed.from_main(stories)
        self.best = best or self.best
        for story in filter(None, each):
            self.each[story["weights"]] = -1.0 if story["value"] is None else story["value"]

    def save(self, names: tuple[str, ...]) -> None:
        """Write the state under each name: files of their own, so that damage to one leaves another."""
        self.last_save = time.monotonic()
        if distributed.is_main():
            state = self.state()
            for name in names:
                checkpoint.save(self.session.folder / name, state)

    def after_step(self, batch: Batch, finite: bool) -> None:
        """Timed saves, the record of steps without a finite loss, unreadable images, and the end after a signal."""
        if not finite:
            self.note_nan(batch.indices)
        if batch.unread:
            note_unread(batch.unread, self.trainer.progress.unread)
            check_unread(self.trainer.progress.unread, self.session.splits["train"])
        if time.monotonic() - self.last_save > self.session.args.save_minutes * 60:
            self.save(("checkpoint.pt",))
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        # any rank's signal stops them all, at the same step
        if distributed.sum_over_ranks(self.signal or 0, self.trainer.device):
            self.stop()

    def stop(self) -> None:
        """Save, say how to go on, and leave."""
        self.busy = True
        self.save(("checkpoint.pt",))
        if distributed.is_main():
            print(
                f"\nstopped: the state is in {self.session.folder / 'checkpoint.pt'}. Go on with:"
            )
            # the run's own flags come back with it
            words = [*distributed.launcher(), sys.argv[0], "--resume", str(self.session.folder)]
            print("  " + shlex.join(words), flush=True)
        raise Stopped(128 + (self.signal or signal.SIGTERM))

    def note_nan(self, images: list[int]) -> None:
        split, progress = self.session.splits["train"], self.trainer.progress
        numbers = sum(distributed.gather_objects(images), [])
        names = [{"id": split.images[i].id, "file": str(split.images[i].path)} for i in numbers]
        self.nan_batches.append(
            {"epoch": progress.epoch + 1, "step": progress.step, "images": names}
        )
        if distributed.is_main():
            file = self.session.folder / "nan_batches.json"
            with self.session.run.optional(f"writing {file}"):
                write_json(file, self.nan_batches)
            warn(
                f"the loss of step {progress.step} is not finite: skipped, its images are in nan_batches.json"
            )
        if progress.nan_steps >= NAN_STEPS:
            raise UserError(
                f"{NAN_STEPS} steps in a row had no finite loss. The best checkpoints so far are kept in "
                f"{self.session.folder}. Try a lower --lr, or --amp off"
            )

    def keep_best(self, epoch: int, scores: dict[str, dict], metric: str) -> bool:
        """Write best.pt (and stage 1's best of each kind) where an epoch's scores ask for it; True for a new best."""
        kind, name = metric.split("/")
        gained = False
        for weights, summary in scores.items():
            value = summary[kind][name]
            files = []
            if weights not in self.each or (value is not None and value > self.each[weights]):
                self.each[weights] = -1.0 if value is None else value
                files += (
                    [f"checkpoint_best_{weights}.pth"] if self.session.kind == "detector" else []
                )
            story = {"epoch": epoch, "metric": metric, "value": value, "weights": weights}
            none_yet = self.best is None or value is self.best["value"] is None
            again = story == self.best  # adopted by take_newer_best
            if none_yet or again or (value or 0.0) > (self.best["value"] or 0.0):
                gained = True
                self.best = story
                files.append("best.pt")
            if files and distributed.is_main():
                model = self.trainer.model if weights == "regular" else self.trainer.ema.module
                content = self.pack(model.state_dict()) | {
                    "weights": weights,
                    "epoch": epoch,
                    "scores": summary,
                }
                for file in files:
                    checkpoint.save(self.session.folder / file, content)
        return gained


def check_history(state: dict) -> None:
    """Raise ValueError where a checkpoint's `training` has no history of scores as CheckpointKeeper.state() writes it."""
    best, each = state["best"], state["each"]
    problems = state.get("nan_batches", [])
    if best is not None and not is_story(best):
        raise ValueError("its best epoch is none")
    if not all(name in ("regular", "ema") and type(value) is float for name, value in each.items()):
        raise ValueError("its best scores are no numbers")
    if (
        type(state["epochs_without_gain"]) is not int
        or not 0 <= state["epochs_without_gain"] < 2**31
    ):
        raise ValueError("its epochs without gain are no count")
    if type(problems) is not list or not all(type(problem) is dict for problem in problems):
        raise ValueError("its steps without a finite loss are no list")
    if not all(type(value) in (int, float) for value in state["scaler"].values()):
        raise ValueError("its gradient scale is no number")


def is_story(best: object) -> bool:
    """Whether this is what CheckpointKeeper.best holds: {"epoch", "metric", "value", "weights"}."""
    if type(best) is not dict or best.keys() != {"epoch", "metric", "value", "weights"}:
        return False
    value, epoch = best["value"], best["epoch"]
    named = best["metric"] in ("bbox/mAP", "segm/mAP") and best["weights"] in ("regular", "ema")
    scored = value is None or type(value) is float and 0 <= value <= 1
    return named and scored and type(epoch) is int and 0 < epoch < 2**31


def best_story(file: Path, metric: str, epoch: int) -> dict | None:
    """What a best file says of itself, in the form of CheckpointKeeper.best; None where it is of epoch `epoch` or before, is
    missing, or tells nothing."""
    if not file.exists():
        return None
    kind, name = metric.split("/")
    try:
        content = checkpoint.load(file)
        value = content["scores"][kind][name]
        story = {
            "epoch": content["epoch"],
            "metric": metric,
            "value": value,
            "weights": content["weights"],
        }
    except (UserError, KeyError, TypeError) as error:
        warn(f"{file} tells no score ({error}): the next best epoch replaces it")
        return None
    return story if is_story(story) and story["epoch"] > epoch else None


@dataclass(frozen=True)
class Awaited:
    """A loader that lets its run's keeper know while a batch is waited for."""

    loader: Iterable
    keeper: CheckpointKeeper

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while True:
            self.keeper.waiting = True
            try:
                batch = next(batches, None)
            finally:
                self.keeper.waiting = False
            if batch is None:
                return
            yield batch
