"""Which detector stage 2 freezes, and whether it and its class head fit the dataset."""

from __future__ import annotations

import sys
from pathlib import Path

from rfdetr import distributed
from rfdetr.classes import COCO_NAMES, ClassTable
from rfdetr.commands import DATA_FLAGS, TRAIN_DETECTOR, flags_of, training_command, without_flag
from rfdetr.console import UserError, warn
from rfdetr.data.records import CocoSplit
from rfdetr.models.detector import Detector
from rfdetr.resolve import plain
from rfdetr.runs.metrics_file import best_box_epochs
from rfdetr.runs.places import STATES, detector_of_run, first_file
from rfdetr.settings import STAGES, SegmentationSettings
from rfdetr.text import command_line, counted, keep_flags
from rfdetr.training.keeper import BEST_OF_EACH, OF_TRAINING
from rfdetr.training.session import Session
from rfdetr.weights import checkpoint


def detector_file(settings: SegmentationSettings) -> Path:
    """The checkpoint that was asked for, else best.pt or last.pt of the stage-1 run.  Raises
    UserError.
    """
    run = settings.stage1_run
    if settings.checkpoint:
        return settings.checkpoint
    if run is None:
        raise UserError(
            "name the detector to freeze, a run of stage 1 or a file: --stage1_run DIR or "
            "--checkpoint FILE"
        )
    return detector_of_run(run, training_command(plain(settings)))


def warn_of_other_exif(content: dict, train: CocoSplit, path: Path) -> None:
    """Warn where the detector was trained on images that were read another way."""
    theirs = content.get("exif", train.exif)
    if theirs != train.exif:
        warn(
            f"{path} was trained with images' EXIF orientation read as --exif {theirs}, here it is "
            f"{train.exif}: where sizes do not tell, add --exif {theirs}"
        )


def warn_of_other_resolution(content: dict, asked: int | None, path: Path) -> None:
    """Warn where the detector is to look at another resolution than the one it was trained at."""
    own = content["resolution"]
    if asked in (None, own):
        return
    warn(
        f"--resolution {asked}: {path} was trained at {own} px, and finds objects of other sizes "
        f"less well. Leave it out, or train stage 1 with --resolution {asked}, too"
    )


def warn_of_own_mask_head(content: dict, path: Path) -> None:
    """Warn where the detector's file has a mask head, too: another one is trained."""
    if content["mask_head"] is None:
        return
    run = path.parent
    advice = ""
    if first_file(run, STATES):
        words = ["python", STAGES[content["stage"]].script, "--resume", run]
        advice = f". To train its own on: {command_line(*words)}"
    warn(
        f"{path} has a mask head already: of that file the detector alone is used, and a new mask "
        f"head is trained on it{advice}"
    )


def warn_of_newer_weights(content: dict, path: Path) -> None:
    """Warn where a shrunk detector was cut before its run found better weights."""
    best = best_box_epochs(path.parent)
    weights = content.get("weights")
    if path.name in OF_TRAINING or weights not in best or "epoch" not in content:
        return
    if best[weights][1] <= content["epoch"]:
        return
    better = max(best, key=best.get)
    newer = path.parent / BEST_OF_EACH[better]
    if not newer.is_file():
        return
    words = command_line("python", "shrink_head.py", "--in_ckpt", newer, "--out_ckpt", path)
    warn(
        f"{path} is of epoch {content['epoch']} of its run, which was trained on since and has "
        f"better weights, of epoch {best[better][1]}. To take those, cut them first: {words} "
        f"{keep_flags(checkpoint.table_of(content).names)}"
    )


def mask_head_name(settings: SegmentationSettings, content: dict, path: Path) -> str:
    """The mask head to train; a mask model's own is not trained on a frozen detector.  Raises
    UserError.
    """
    name = settings.mask_head
    if name == "auto":
        name = settings.model_size.mask_head
    if name == "official" and content["mask_head"] == "official":
        raise UserError(
            f"{path} has {settings.size}'s own mask head already, which is trained with the "
            f"detector: python train_seg_single_stage.py --size {settings.size}. For a light one "
            "on its frozen detector: --mask_head nano"
        )
    return "standard" if name == "official" else name


def frozen_detector(session: Session, content: dict, path: Path) -> tuple[Detector, ClassTable]:
    """The detector without masks, its class heads cut to the dataset's classes where that is asked
    for or goes without saying, and its class table in the dataset's order.  Raises UserError.
    """
    settings = session.settings
    names = session.train.class_names
    table = checkpoint.table_of(content)
    if table.rows_total != len(names) + 1:
        is_official_coco = content.get("official") and table.is_coco
        if is_official_coco and not set(names) <= set(table.names):
            raise UserError(not_coco_message(table.rows_total, session, path))
        if not set(names) <= set(table.names):
            raise UserError(lacking_message(table, session, path))
        if not (is_official_coco or settings.auto_shrink):
            raise UserError(unshrunk_message(table.rows_total, names, path))
        content = checkpoint.shrink(content, names)
    model = {}
    for key, tensor in content["model"].items():
        if not key.startswith(("mask_head.", "segmentation_head.")):
            model[key] = tensor
    detector, table = checkpoint.build_model(
        content | {"model": model, "mask_head": None}, groups=None
    )
    detector.to(session.device).requires_grad_(False)
    where = f"{settings.dataset} (train)"
    again = training_command(plain(settings))
    train = session.train
    return detector, table.in_order_of(names, train.category_ids, where, again, train.renames)


def unshrunk_message(rows: int, names: list[str], path: Path) -> str:
    """Of a detector that has rows of other classes, too: the shrink to type, or where that is done
    already the command with its file.
    """
    shrunk = path.parent / "checkpoint_mydata.pth"
    message = (
        f"Frozen detector head out_dim ({rows}) != requested ({len(names) + 1})\n"
        f"{path} has a {rows}-row class head, the dataset has {counted(len(names), 'class')} "
        f"({', '.join(names)}). "
    )
    if is_newer_shrunk(shrunk, path, names):
        own = without_flag(sys.argv, "checkpoint")
        again = command_line(*distributed.launcher(), *own, "--checkpoint", shrunk)
        return f"{message}{shrunk} is cut to them already. Run:\n  {again}"
    words = command_line("python", "shrink_head.py", "--in_ckpt", path, "--out_ckpt", shrunk)
    return (
        f"{message}Run:\n"
        f"  {words} {keep_flags(names)}\n"
        "and pass the new file with --checkpoint, or add --auto_shrink 1."
    )


def is_newer_shrunk(file: Path, path: Path, names: list[str]) -> bool:
    """Whether `file` was written after the checkpoint `path`, and its classes are `names` alone."""
    if not file.is_file() or file.stat().st_mtime < path.stat().st_mtime:
        return False
    try:
        table = checkpoint.table_of(checkpoint.load(file))
    except UserError:
        return False
    return set(table.names) == set(names) and table.rows_total == len(names) + 1


def lacking_message(table: ClassTable, session: Session, path: Path) -> str:
    """Of a detector that does not know all of the dataset's classes: no shrink gives it them."""
    names = session.train.class_names
    lacking = [name for name in names if name not in table.names]
    return (
        f"Frozen detector head out_dim ({table.rows_total}) != requested ({len(names) + 1})\n"
        f"{path} does not know {', '.join(lacking)}: its classes are {', '.join(table.names)}. If "
        "it was cut by shrink_head.py, cut its detector again and keep these classes too; else "
        f"train stage 1 on this dataset: {training_command(plain(session.settings))}"
    )


def not_coco_message(rows: int, session: Session, path: Path) -> str:
    settings = session.settings
    names = session.train.class_names
    others = [name for name in names if name not in COCO_NAMES.values()]
    words = flags_of(plain(settings), "size", *DATA_FLAGS, "device")
    run = f"runs/detector_{settings.size}_{session.resolution}_N"
    teach = ["python", TRAIN_DETECTOR, *words, "--pretrain_weights", path]
    mask = ["python", "train_seg_stage2.py", *words, "--stage1_run", run, "--auto_shrink", 1]
    return (
        f"Frozen detector head out_dim ({rows}) != requested ({len(names) + 1})\n"
        f"{path} is an official COCO detector, which does not know {', '.join(others)}. "
        "Teach it, then mask it:\n"
        f"  {command_line(*teach)}\n"
        f"  {command_line(*mask)}"
    )
