"""Commands that messages advise, with the flags that the settings at hand ask for; standard library
only.
"""

from __future__ import annotations

from dataclasses import fields

from rfdetr.sizes import SIZES
from rfdetr.text import command_line

TRAIN_DETECTOR = "train_detector_stage1.py"
DATA_FLAGS = ("dataset", "val_fraction", "exif", "rename", "tile")
VIEW_FLAGS = ("tile_overlap", "tile_full", "letterbox", "gray")  # stage 2 takes its detector's
USUAL_DEVICE = "auto"


def flags_of(args: dict, *names: str) -> list[str]:
    """--NAME VALUE for those of a run's settings (as in config.yaml) that have a value; a switch
    that is off has none.
    """
    words = []
    for name in names:
        value = args.get(name)
        if isinstance(value, (list, tuple)):
            words += [f"--{name}={one}" for one in value]
        elif value is True:
            words += [f"--{name}", "1"]
        elif value is None or value is False or (name, value) == ("device", USUAL_DEVICE):
            continue
        else:
            words += [f"--{name}", str(value)]
    return words


def steadier(stage: str | None, amp_is_off: bool) -> str:
    """What to train with where numbers have become NaN or infinite; stage: None is unknown."""
    rate = "--seg_lr" if stage == "segmentation" else "--lr"
    return f"a lower {rate}" if amp_is_off else f"a lower {rate}, or --amp off"


def size_flags(args: dict) -> list[str]:
    """--size, and --resolution where it is not the size's own."""
    words = flags_of(args, "size")
    own = SIZES.get(args.get("size"))
    if own is None or args.get("resolution") != own.resolution:
        words += flags_of(args, "resolution")
    return words


def training_command(args: dict, script: str = TRAIN_DETECTOR) -> str:
    """A training from the start, or another script, on the dataset and in the size of these
    settings.
    """
    words = [*size_flags(args), *flags_of(args, *DATA_FLAGS, *VIEW_FLAGS, "device")]
    return command_line("python", script, *words)


def same_command(script: str, settings: object) -> str:
    """A script again, with all of these settings that are not as it has them by itself."""
    words = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        off = value is False  # of a switch that is usually on
        words += [f"--{field.name}", "0"] if off else flags_of({field.name: value}, field.name)
    return command_line("python", script, *words)


def without_flag(argv: list[str], name: str) -> list[str]:
    """The words of a command without --name and its value, in either form."""
    words = []
    after_flag = False
    for word in argv:
        is_value = after_flag and not word.startswith("-")
        after_flag = word == f"--{name}"
        if not (after_flag or is_value or word.startswith(f"--{name}=")):
            words.append(word)
    return words
