"""Write YOLO, Pascal VOC, LabelMe or mask images as COCO, which all scripts read.

python convert_dataset.py --input DIR --output dataset
"""

from __future__ import annotations

from rfdetr.sigterm import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # while modules are imported

from rfdetr.cli import check_command, script_settings
from rfdetr.tool_settings import FORMS, ConvertSettings

# before the slow imports
check_command(ConvertSettings, __doc__, __name__)

import os
from dataclasses import replace
from pathlib import Path

from rfdetr.commands import same_command
from rfdetr.console import UserError, run_script, say, tick, warn
from rfdetr.data.formats.detect import (
    dataset_above,
    datasets_below,
    find_form,
    find_yaml,
    free_output,
)
from rfdetr.data.formats.labelme import LabelMeReader
from rfdetr.data.formats.mask_images import MasksReader
from rfdetr.data.formats.source import Notes, Reader, Unusable
from rfdetr.data.formats.voc import VocReader
from rfdetr.data.formats.writer import CocoWriter, new_folder
from rfdetr.data.formats.yolo import YoloReader
from rfdetr.data.layout import describe_folder, holds_dataset
from rfdetr.files import require_free, writing_to
from rfdetr.progress import ProgressBar
from rfdetr.renaming import STYLE, alike_classes, as_pairs, rename_flags
from rfdetr.settings import VAL_FRACTION
from rfdetr.text import command_line


def main(argv: list[str] | None = None) -> None:
    settings = script_settings(ConvertSettings, __doc__, argv)
    root = folder_of(settings.input)
    described = settings.input if is_yaml(settings.input) else find_yaml(root)
    form = settings.format
    labelled = root if described else folder_with_labels(root, settings)
    if form == "auto":
        form = "yolo" if described else find_form(labelled)
    if form is None:
        raise UserError(no_form_message(root, settings))
    place = settings.input / labelled.relative_to(root)
    if form == "yolo" and not described:
        root = labelled
        described = find_yaml(root)
    output = settings.output
    require_free(output, "--output")
    notes = Notes(root)
    reader = open_reader(form, root, described, settings.class_name, notes)
    with writing_to(output, "--output"), new_folder(output, "--output") as folder:
        with CocoWriter(folder, reader.class_names, settings.copy == "copy", notes) as writer:
            convert(reader, writer, notes)
            require_objects(writer, form, root, notes, settings)
            writer.finish()

    tick(f"Written: {output}, from {FORMS[form]} in {place}")
    for line in writer.table():
        say(line)
    if form == "masks" and settings.class_name == ConvertSettings.class_name:
        say(f"Mask images name no class: all is {settings.class_name!r} (--class_name NAME)")
    if notes.counts:
        warn("; ".join(notes.lines()))
    warn_of_alike_classes(writer.taught)
    print_next(writer, output)


def is_yaml(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".yaml", ".yml")


def folder_of(path: Path) -> Path:
    """The absolute path of a dataset's folder, of which the data.yaml may have been given."""
    if is_yaml(path):
        path = path.parent
    if not path.is_dir():
        what = "is a file: where it is an archive, unpack it" if path.exists() else "does not exist"
        raise UserError(f"--input {path} {what}. Name the folder of the dataset")
    return Path(os.path.abspath(path))


def folder_with_labels(root: Path, settings: ConvertSettings) -> Path:
    """`root`, or the only folder in it that holds a dataset, of --format's form if that is given.

    Several of one form are parts of one dataset; not of YOLO, where each has its own classes.
    Raises UserError for datasets that do not go together.
    """
    below = {
        folder: form
        for folder, form in datasets_below(root).items()
        if settings.format in ("auto", form)
    }
    forms = set(below.values())
    if len(below) == 1:
        return next(iter(below))
    if len(forms) < 2 and forms != {"yolo"}:
        return root
    found = ", ".join(f"{FORMS[form]} in {folder.name}" for folder, form in below.items())
    commands = "".join(f"\n  {conversion_of(folder, settings)}" for folder in below)
    raise UserError(f"{root} holds several datasets: {found}. Convert the one you mean:{commands}")


def conversion_of(root: Path, settings: ConvertSettings) -> str:
    """The command that converts another folder, in the form that it is found to have."""
    output = settings.output
    if output == ConvertSettings.output:  # by itself: what is there may be in the way
        output = free_output(root)
    wanted = replace(settings, input=root, output=output, format="auto")
    return same_command("convert_dataset.py", wanted)


def no_form_message(root: Path, settings: ConvertSettings) -> str:
    """What a folder holds that is in none of the forms, and what to type instead."""
    for folder in (root, root.parent):
        if holds_dataset(folder):
            command = command_line("python", "validate_setup.py", "--dataset", folder)
            return (
                f"{folder} is a COCO dataset already, which all scripts read. Check it: {command}"
            )
    return whole_dataset_message(root, settings) or (
        f"{root} is no dataset in a form that is known ({describe_folder(root)}): expected YOLO "
        "(data.yaml, or images/ and labels/), Pascal VOC (Annotations/, or an .xml beside each "
        "image), LabelMe (a .json beside each image), or images/ and masks/. Name the right folder "
        f"with --input, or what it is with --format {'|'.join(FORMS)}"
    )


def whole_dataset_message(root: Path, settings: ConvertSettings) -> str | None:
    """What a folder such as images/train is a part of, and what to type."""
    above = dataset_above(root)
    if above is None:
        return None
    form = FORMS[find_form(above)]
    return (
        f"{root} is a part of a dataset: {form} in {above}. Run: {conversion_of(above, settings)}"
    )


def open_reader(
    form: str, root: Path, described: Path | None, class_name: str, notes: Notes
) -> Reader:
    """The reader of a dataset in one of FORMS.  Raises UserError."""
    try:
        if form == "yolo":
            return YoloReader(root, described, notes)
        if form == "voc":
            return VocReader(root, notes)
        if form == "labelme":
            return LabelMeReader(root, notes)
        return MasksReader(root, class_name, notes)
    except Unusable as error:  # a file that the whole dataset depends on
        raise UserError(f"{error.what}: {error.detail}") from error


def convert(reader: Reader, writer: CocoWriter, notes: Notes) -> None:
    """Write every image that can be used; `notes` counts the others."""
    items = [(split, item) for split, items in reader.splits.items() for item in items]
    for split, item in ProgressBar(items, "convert"):
        try:
            image = reader.read(item)
        except Unusable as error:
            notes.add(f"{error.what}, left out", reader.place(item), error.detail)
        else:
            writer.add(split, image)


def require_objects(
    writer: CocoWriter, form: str, root: Path, notes: Notes, settings: ConvertSettings
) -> None:
    """Raises UserError where nothing was read that a model could learn; form: it was read as."""
    if any(split.objects for split in writer.splits.values()):
        return
    found = "images without any object" if writer.splits else "no usable image"
    left_out = f": {'; '.join(notes.lines())}" if notes.counts else ""
    advice = f"Is it in another form? Name it with --format {'|'.join(FORMS)}"
    raise UserError(
        f"{root}: {found} in what was read as {FORMS[form]}{left_out}. Nothing is written. "
        f"{whole_dataset_message(root, settings) or advice}"
    )


def warn_of_alike_classes(taught: dict[str, int]) -> None:
    """taught: class name -> its objects in train."""
    alike = alike_classes(taught)
    if not alike:
        return
    names = ", ".join(f"{old!r} and {new!r}" for old, new in alike.items())
    warn(
        f"classes whose names differ in {STYLE} alone: {names}. If they are the same, add to the "
        f"next command and to every later one: {rename_flags(as_pairs(alike))}"
    )


def print_next(writer: CocoWriter, output: Path) -> None:
    words = ["python", "validate_setup.py", "--dataset", output]
    if "train" in writer.splits and "valid" not in writer.splits:
        say(f"There is no valid split: --val_fraction {VAL_FRACTION} takes a tenth of train/")
        words += ["--val_fraction", VAL_FRACTION]
    say(f"Next:  {command_line(*words)}")


if __name__ == "__main__":
    run_script(
        main,
        interrupted="interrupted: the dataset is written at the end, whole or not at all. "
        "The same command begins again from the start",
    )
