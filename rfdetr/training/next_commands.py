"""The command that each script prints to be typed next, with all the flags that it needs."""

from __future__ import annotations

import os
from pathlib import Path

from rfdetr import distributed
from rfdetr.classes import ClassTable
from rfdetr.commands import DATA_FLAGS, flags_of, size_flags, without_flag
from rfdetr.console import UserError
from rfdetr.data.layout import find_splits
from rfdetr.data.records import ImageList, ImageTable
from rfdetr.resolve import plain
from rfdetr.runs.places import CONFIG, WEIGHTS, first_file
from rfdetr.text import command_line, counted, keep_flags
from rfdetr.training.keeper import BEST_OF_EACH
from rfdetr.training.session import Session
from rfdetr.weights import checkpoint

# ---------------------------------------------------------------- after a training


def after_detector(session: Session, table: ClassTable, best: dict) -> tuple[str, str]:
    """After stage 1: what to say of the weights that come next, which may be nothing, and the
    shrink of the better ones, or stage 2 where there is nothing to cut.
    """
    remark = ""
    if best["value"] is None:
        kind = "the averaged weights (EMA)" if best["weights"] == "ema" else "the weights"
        remark = f"No score tells which weights are better: {kind} of the last epoch are taken"
    trained = session.folder / BEST_OF_EACH[best["weights"]]
    if table.rows_total == len(table.names) + 1:
        return remark, mask_training(plain(session.settings), session.resolution, trained)
    shrunk = session.folder / "checkpoint_mydata.pth"
    words = command_line("python", "shrink_head.py", "--in_ckpt", trained, "--out_ckpt", shrunk)
    return remark, f"{words} {keep_flags(table.names)}"


def predict_with(session: Session) -> tuple[str, str]:
    """What to type to see the valid images with everything drawn in, and before it what to say of
    them, which may be nothing.
    """
    images = session.splits["valid"].images or session.train.images
    command = prediction(session.folder / "best.pt", where_all_lie(images), plain(session.settings))
    folder = images[0].path.parent
    remark = ""
    if folder == session.train.images[0].path.parent:
        remark = words_on_trained_folder(folder)
    return remark, command


def where_all_lie(images: ImageTable | ImageList) -> Path:
    """What predict.py takes for all of these images: their folder, or a pattern of what lies below
    the one that they have in common.
    """
    folders = {images.path(index).parent for index in range(len(images))}
    if len(folders) == 1:
        return folders.pop()
    return Path(os.path.commonpath(folders)) / "**" / "*"


def words_on_trained_folder(folder: Path) -> str:
    """What to say of a folder of valid images that were divided from the training images."""
    return f"{folder} holds the images that were trained on, too: finding them proves little"


def after_trial(session: Session, argv: list[str]) -> tuple[str, str]:
    """What to say of a run of a few steps, and the command of the run that it was a trial of."""
    settings = session.settings
    remark = f"A trial of {counted(settings.fast_dev_run, 'step')}: it has learnt nothing."
    if settings.output_dir and not session.resumed:
        remark += f" Delete {session.folder} before you start the run itself"
    elif not session.resumed:
        remark += f" {session.folder} can be deleted"
    own = without_flag(argv, "fast_dev_run")
    return remark, command_line(*distributed.launcher(), *own)


def prediction(weights: Path, images: Path, args: dict) -> str:
    """What `weights` find in `images`, into their run's folder where they lie in one: elsewhere
    the results of several runs would lie among each other.
    """
    is_of_a_run = (weights.parent / CONFIG).is_file()
    output = weights.parent / "found" if is_of_a_run else "predictions"
    words = ["--checkpoint", weights, "--input", images, "--output", output]
    return command_line("python", "predict.py", *words, *flags_of(args, "device"))


def mask_training(args: dict, resolution: int, weights: Path) -> str:
    """Stage 2 on the detector in `weights`, with the images that it was trained on.

    args: the settings of its training; {} where they are unknown, as for an official file.
    """
    args = args | {"resolution": resolution}
    words = [*size_flags(args), *flags_of(args, *DATA_FLAGS, "device")]
    if first_file(weights.parent, WEIGHTS):
        words += ["--stage1_run", str(weights.parent)]
    return command_line("python", "train_seg_stage2.py", *words, "--checkpoint", weights)


# ---------------------------------------------------------------- after a shrink


def after_shrink(content: dict, shrunk: dict, file: Path) -> tuple[str, str]:
    """What to say of a shrunk detector, which may be nothing, and what to type next, likewise.

    content, shrunk: the checkpoint before and after; file: where it was written.
    """
    args = dict(content.get("args") or {})
    kept = checkpoint.table_of(shrunk).names
    dropped = [name for name in checkpoint.table_of(content).names if name not in kept]
    is_official = bool(content.get("official")) or not args
    if is_official or not dropped:
        args["size"] = content["size"]["name"]
        remark = ""
        dataset = args.get("dataset")
        if dataset and not Path(dataset).exists():
            remark = f"DIR is where the dataset {dataset} is now: it is no longer there"
            args["dataset"] = "DIR"
        return remark, mask_training(args, content["resolution"], file)
    remark = (
        f"It no longer knows {', '.join(dropped)}. Stage 2 and evaluate.py need a dataset whose "
        f"classes are {', '.join(kept)} alone; for the one it was trained on, leave out --keep"
    )
    images = folder_of_images(args)
    return remark, prediction(file, images, args) if images else ""


def folder_of_images(args: dict) -> Path | None:
    """Where a run's valid images lie, else its training images; None where they have gone."""
    try:
        splits = find_splits(args.get("dataset", ""))
    except (UserError, OSError):
        return None
    split = splits.get("valid") or splits["train"]
    return split[1]
