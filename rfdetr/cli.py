"""The training scripts' command line: their common flags, --resume, and what a size decides."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from rfdetr.console import UserError, boolean, number, warn
from rfdetr.runs.lock import lock_run
from rfdetr.settings import STAGES
from rfdetr.sizes import SIZES, check_resolution
from rfdetr.training.resume import latest_state, newest_run
from rfdetr.weights import checkpoint


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of all three training scripts. A default of None means the size's own (rfdetr/sizes.py)."""
    positive, images, share = number(int, 1), number(int, 1, 65536), number(float, 0)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="nano", help="model size (default: nano)")
    add(
        "--dataset",
        type=Path,
        default=Path("dataset"),
        help="COCO-format folder (default: dataset)",
    )
    add(
        "--val_fraction",
        type=number(float, 0.001, 0.9),
        help="without valid/: split this share off train/",
    )
    add_exif_flag(parser)
    add("--output_dir", type=Path, help="run folder (default: the next free number under runs/)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--resolution", type=positive, help="input side in pixels (default: the size's own)")
    add("--epochs", type=positive, help="passes over the training images")
    add(
        "--batch",
        type=lambda t: t if t == "auto" else images(t),
        help="images in one forward pass, or auto",
    )
    add("--accum", type=images, help="forward passes per optimizer step")
    add(
        "--workers",
        type=number(int, 0, 256),
        help="loader processes (default: 2; 0 where images stay in memory)",
    )
    add("--weight_decay", type=share, help="AdamW's weight decay")
    add(
        "--multi_scale",
        type=boolean,
        default=None,
        metavar="0|1",
        help="draw the input side anew for each step",
    )
    add(
        "--expanded_scales",
        type=boolean,
        default=False,
        metavar="0|1",
        help="a wider range of sides",
    )
    add(
        "--amp",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="mixed precision (auto: off for tiny)",
    )
    add("--no_amp", action="store_true", help="the same as --amp off")
    add(
        "--ema",
        type=boolean,
        default=True,
        metavar="0|1",
        help="keep an average of the weights, scored as well",
    )
    add(
        "--patience",
        type=number(int, 0),
        default=0,
        help="stop after this many epochs without gain (0: never)",
    )
    add(
        "--min_steps",
        type=number(int, 1, 10**6),
        help="repeat small datasets until an epoch has this many steps",
    )
    add(
        "--eval_every",
        type=positive,
        default=1,
        help="epochs between evaluations (the last is always evaluated)",
    )
    add("--save_minutes", type=share, default=5.0, help="minutes between saves inside an epoch")
    add("--seed", type=number(int, 0), default=0)
    add("--tensorboard", type=boolean, default=True, metavar="0|1", help="write tb/")
    add(
        "--run_test",
        type=boolean,
        default=False,
        metavar="0|1",
        help="score the test split at the end",
    )
    add(
        "--resume",
        nargs="?",
        const="auto",
        metavar="RUN",
        help="go on with a run folder, or the newest (auto)",
    )
    add(
        "--fast_dev_run",
        nargs="?",
        type=positive,
        const=2,
        metavar="N",
        help="one epoch of N steps: does it run?",
    )
    add("--debug", action="store_true", help="show tracebacks")


def add_detector_flags(parser: argparse.ArgumentParser) -> None:
    """How a detector is trained and where it starts from."""
    add = parser.add_argument
    add(
        "--grad_checkpoint",
        type=boolean,
        default=False,
        metavar="0|1",
        help="less memory, more time",
    )
    add(
        "--freeze_encoder",
        type=boolean,
        default=False,
        metavar="0|1",
        help="train what is behind it",
    )
    add_compile_flag(parser)
    add(
        "--pretrain_weights",
        default="auto",
        metavar="auto|none|PATH|URL",
        help="auto: the official file of the size",
    )
    add(
        "--backbone_weights",
        type=Path,
        metavar="PATH",
        help="instead: DINOv2 alone, in the Hugging Face layout",
    )
    add(
        "--pretrain_exclude_keys",
        nargs="+",
        action="extend",
        default=[],
        metavar="GLOB",
        help="tensors not to load",
    )


def add_exif_flag(parser: argparse.ArgumentParser, default: str = "apply") -> None:
    """`default`: in words, for the help."""
    told = f"orientation of images whose annotated size does not tell (default: {default})"
    parser.add_argument("--exif", choices=["apply", "ignore"], help=told)


def add_compile_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compile",
        type=boolean,
        default=False,
        metavar="0|1",
        help="torch.compile the encoder: slow start, then fast",
    )


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, kind: str) -> argparse.Namespace:
    """Parse; with --resume the run's own flags are the defaults, and `args.resume_from` is its checkpoint's content.

    `kind` is "detector", "segmentation" or "seg_single". Fills in what the size decides; raises UserError.
    """

    def refuse(message: str) -> NoReturn:  # as argparse does, but once for all processes of a run
        raise UserError(f"{parser.format_usage()}{parser.prog}: error: {message}")

    parser.error = refuse
    args = parser.parse_args(argv)
    args.resume_from = None
    if args.resume:
        folder = newest_run(kind) if args.resume == "auto" else Path(args.resume)
        if folder.is_dir() and os.environ.get("RANK", "0") == "0":
            lock_run(folder)  # before it is read, so that nobody trains it on meanwhile
        content = latest_state(folder)
        if content["stage"] != kind.removeprefix("seg_"):
            script = STAGES[content["stage"]].script
            raise UserError(f"{folder} is another script's: python {script} --resume {folder}")
        parser.set_defaults(**stored_flags(parser, content["args"], folder))
        args = parser.parse_args(argv)
        args.output_dir, args.resume_from = folder, content
        checkpoint.require_size(content, SIZES[args.size], folder)
    size = SIZES[args.size]
    if args.resolution or kind != "segmentation":  # stage 2 takes its detector's
        args.resolution = check_resolution(size, args.resolution)
    prefix = {"detector": "", "segmentation": "seg_", "seg_single": "single_"}[kind]
    recipe = asdict(size.recipe)
    for name, value in vars(args).items():
        if value is None and (name in recipe or prefix + name in recipe):
            setattr(args, name, recipe.get(prefix + name, recipe.get(name)))
    usual = recipe.get(prefix + "batch", recipe["batch"])
    args.effective_batch = args.accum * (usual if args.batch == "auto" else args.batch)
    if args.expanded_scales and not args.multi_scale:
        warn("--expanded_scales 1 changes nothing without --multi_scale 1")
    if getattr(args, "backbone_weights", None):
        if args.pretrain_weights not in ("auto", "none") or getattr(args, "init_ckpt", None):
            raise UserError(
                "--backbone_weights is a start without a detector: leave out the other file of weights"
            )
        args.pretrain_weights = "none"
    if args.no_amp or args.amp == "auto":
        args.amp = "off" if args.no_amp else size.recipe.amp
    if args.fast_dev_run:
        args.epochs = 1
    return args


def stored_flags(parser: argparse.ArgumentParser, stored: dict, folder: Path) -> dict:
    """The flags that a run's checkpoint holds, each checked as if it had been typed; those that are None are left out.

    Raises UserError for the first value that the command line would refuse.
    """
    no_defaults = ("resume", "output_dir", "no_amp", "debug", "fast_dev_run")  # no_amp is in `amp`
    flags = {}
    for action in parser._actions:
        value = stored.get(action.dest)
        if value is None or action.dest in no_defaults:
            continue
        several = action.nargs == "+"
        try:
            if several and type(value) is not list:
                raise ValueError(f"expected a list, got {type(value).__name__}")
            typed = [as_typed(action, item) for item in (value if several else [value])]
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise UserError(
                f"--resume: the checkpoint in {folder} holds --{action.dest} {str(value)[:100]!r}, which no run saves "
                f"({error}). Take the run's folder as it was written, or train a new run"
            ) from error
        flags[action.dest] = typed if several else typed[0]
    return flags


def as_typed(action: argparse.Action, value: object) -> object:
    """What a stored value is as a flag's.  Raises ArgumentTypeError or ValueError where the flag would not take it."""
    if type(value) not in (str, int, float, bool) or "\0" in str(value):
        raise ValueError(f"got {type(value).__name__}")
    typed = action.type(str(value)) if action.type else str(value)
    if type(value) is not str and typed != value:
        raise ValueError(f"got {type(value).__name__}")
    if action.choices is not None and typed not in action.choices:
        raise ValueError(f"expected one of {', '.join(action.choices)}")
    return typed
