"""Tell before anything runs whether it will: packages, device, disk, and every problem of the
dataset at once.

python validate_setup.py --dataset dataset --size nano --check_images 1
"""

from __future__ import annotations

from rfdetr.sigterm import end_on_ctrl_c, raise_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # while modules are imported

from pathlib import Path

from rfdetr.cli import script_settings
from rfdetr.console import UserError, run_script
from rfdetr.requirements import installed_and_missing
from rfdetr.tool_settings import ValidationSettings

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
TEST_ONLY = {"pytest", "hypothesis"}


def main(argv: list[str] | None = None) -> None:
    settings = script_settings(ValidationSettings, __doc__, argv)
    versions = check_packages()
    end_on_ctrl_c()
    from rfdetr.setup_check import check_setup  # needs the packages that were just looked for

    raise_on_ctrl_c()
    check_setup(settings, versions)


def check_packages() -> dict[str, str]:
    """The installed versions by name; UserError where requirements.txt asks for others."""
    installed, needed = installed_and_missing(REQUIREMENTS)
    lacking = []
    for name, least in needed.items():
        if name not in TEST_ONLY:
            lacking.append(f"{name} is {installed[name]}, {least} or newer is needed")
    if lacking:
        raise UserError(
            f"{'; '.join(lacking)}. Run: python -m pip install -r requirements.txt, "
            "or python quickstart.py"
        )
    return installed


if __name__ == "__main__":
    run_script(
        main,
        interrupted="interrupted: the dataset is as it was. The same command begins again from the "
        "start; delete a folder that --fix has begun before",
    )
