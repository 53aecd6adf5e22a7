"""What a run watches for: steps without a finite loss, images that cannot be read, epochs that
teach nothing.
"""

from __future__ import annotations

from pathlib import Path

from rfdetr import distributed
from rfdetr.console import UserError, warn
from rfdetr.data.dataset import Batch, SplitDataset
from rfdetr.data.loaders import check_unread, note_unread
from rfdetr.files import write_json
from rfdetr.runs.record import Run
from rfdetr.training.engine import Progress

NAN_STEPS = 10  # steps in a row without a finite loss end the run


class RunHealth:
    """Looks at each step and each epoch; what can go on is a warning, what cannot a UserError.

    nan_batches: the run's list of steps without a finite loss, which grows here. run: None but on
    rank 0. steadier: what to try where there are too many such steps.
    """

    def __init__(
        self,
        folder: Path,
        run: Run | None,
        dataset: SplitDataset,
        progress: Progress,
        nan_batches: list[dict],
        steadier: str,
    ):
        self.folder = folder
        self.run = run
        self.dataset = dataset
        self.progress = progress
        self.nan_batches = nan_batches
        self.steadier = steadier
        self.warned_of_matches = False

    def after_step(self, batch: Batch, finite: bool) -> None:
        if not finite:
            self.note_nan(batch.indices)
        if batch.unread:
            note_unread(batch.unread, self.progress.unread)
            check_unread(self.progress.unread, self.dataset.whole_split)

    def note_nan(self, indices: list[int]) -> None:
        """List a skipped step's images in nan_batches.json; UserError after NAN_STEPS in a row."""
        images = []
        for index in sum(distributed.gather_objects(indices), []):
            image = self.dataset.split.images[index]
            images.append({"id": image.id, "file": str(image.path)})
        step = self.progress.step
        self.nan_batches.append({"epoch": self.progress.epoch + 1, "step": step, "images": images})
        if self.run:
            file = self.folder / "nan_batches.json"
            with self.run.optional(f"writing {file}"):
                write_json(file, self.nan_batches)
        warn(f"the loss of step {step} is not finite: skipped, its images are in nan_batches.json")
        if self.progress.nan_steps >= NAN_STEPS:
            kept = f"Nothing is kept: no epoch was finished (log: {self.folder})"
            if (self.folder / "best.pt").is_file():
                kept = f"The best checkpoints so far are kept in {self.folder}"
            raise UserError(
                f"{NAN_STEPS} steps in a row had no finite loss. {kept}. Try {self.steadier}"
            )

    def after_epoch(self, record: dict) -> None:
        """Count the unread images of all ranks into an epoch's "train" record; UserError where they
        are too many.
        """
        unread = set().union(*distributed.gather_objects(self.progress.unread))
        self.progress.unread = sorted(unread)
        check_unread(self.progress.unread, self.dataset.whole_split)
        record["skipped_images"] = len(unread)

    def check_matches(self, epoch: int, record: dict, dry_run: bool) -> None:
        """Stage 2 learns from the objects that its detector finds.

        A warning where an epoch had none; where that was the first one, a UserError.
        """
        if not record.get("objects") or record["matched_objects"]:
            return
        message = (
            f"epoch {epoch} has taught the mask head nothing: the frozen detector finds none of "
            f"its {record['objects']:.0f} objects (no box overlaps one by more than half)"
        )
        if epoch == 1 and not dry_run:
            raise UserError(
                f"{message}. Train stage 1 longer, or see with python evaluate.py whether "
                "--checkpoint, its classes and --resolution are the right ones for this dataset"
            )
        if not self.warned_of_matches:
            warn(message)
        self.warned_of_matches = True
