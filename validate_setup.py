"""Tell before anything runs whether it will: packages, device, disk, and every problem of the
dataset at once.

python validate_setup.py --dataset dataset --size nano --check_images 1
"""

from __future__ import annotations

from rfdetr.sigterm import end_on_ctrl_c, raise_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # while modules are imported

from rfdetr.cli import script_settings
from rfdetr.console import run_script
from rfdetr.packages import require_versions
from rfdetr.tool_settings import ValidationSettings


def main(argv: list[str] | None = None) -> None:
    settings = script_settings(ValidationSettings, __doc__, argv)
    versions = require_versions()
    end_on_ctrl_c()
    from rfdetr.setup_check import check_setup  # needs the packages that were just looked for

    raise_on_ctrl_c()
    check_setup(settings, versions)


if __name__ == "__main__":
    run_script(
        main,
        interrupted="interrupted: the dataset is as it was. The same command begins again from the "
        "start; delete a folder that --fix has begun before",
    )
