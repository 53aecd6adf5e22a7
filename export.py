"""Write a checkpoint in another program's format.

python export.py --checkpoint runs/detector_nano_384_1/best.pt --format rfdetr --out mydata.pth
"""

from __future__ import annotations

from rfdetr.sigterm import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # while modules are imported

from rfdetr.cli import check_command, script_settings
from rfdetr.tool_settings import ExportSettings

# before torch, whose import takes seconds
check_command(ExportSettings, __doc__, __name__)

from rfdetr.console import UserError, run_script, tick, warn
from rfdetr.files import make_place, note_of_earlier, refuse_same_file
from rfdetr.text import counted
from rfdetr.training.keeper import refuse_file_of_run
from rfdetr.weights import checkpoint
from rfdetr.weights.package import left_to_user, to_package


def main(argv: list[str] | None = None) -> None:
    settings = script_settings(ExportSettings, __doc__, argv)
    source = settings.checkpoint
    target = settings.out
    refuse_same_file(target, "--out", source, "--checkpoint")
    refuse_file_of_run(target, "--out", "exported.pth")
    content = checkpoint.load(source)
    size = content["size"]["name"]
    if size == "tiny":
        raise UserError(
            f"{source} is of size tiny, which the package does not have: train an official size, "
            "such as --size nano"
        )
    if content["mask_head"] not in (None, "official"):
        warn(
            f"the mask head ({content['mask_head']}) is not one of the package's: "
            "only the detector is written"
        )
    for note in left_to_user(content):
        warn(note)
    exported = to_package(content)
    make_place(target, "--out")
    replaced = note_of_earlier(target)
    checkpoint.save(target, exported)

    names = exported["args"].get("class_names")
    classes = "COCO's classes"
    if names:
        classes = f"{counted(len(names), 'class')} ({', '.join(names)})"
    tick(
        f"Written: {target}, {len(exported['model'])} tensors, {size}, "
        f"{content['resolution']} px, {classes}{replaced}"
    )
    path = str(target.resolve())  # the package takes a bare file name for one of its cache
    print(f"Load it with rfdetr 1.11:  rfdetr.{exported['model_name']}.from_checkpoint({path!r})")


if __name__ == "__main__":
    run_script(
        main,
        interrupted="interrupted: the file is written at the end, whole or not at all. "
        "The same command begins again from the start",
    )
