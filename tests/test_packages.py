"""What is said where packages are missing: a paragraph with the command that gets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from rfdetr import packages
from rfdetr.console import UserError

# every way in that needs packages, with words that are otherwise accepted
WAYS_IN = {
    "validate_setup": ["validate_setup.py"],
    "training": ["train_detector_stage1.py", "--size", "tiny"],
    "conversion": ["convert_dataset.py", "--input", ".", "--output", "out"],
    "demo data": ["-m", "rfdetr.data.demo", "out"],
    "weights": ["-m", "rfdetr.weights", "list"],
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_python_without_packages_is_told_where_to_get_them(tmp_path, way):
    command = [*WAYS_IN[way]]
    if command[0].endswith(".py"):
        command[0] = str(ROOT / command[0])
    # -S: without the folder that packages are installed in
    done = subprocess.run(
        [sys.executable, "-S", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: this Python ({sys.executable}) lacks ")
    assert "pillow" in done.stderr and "torch" in done.stderr and "pytest" not in done.stderr
    assert "Run: " in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def lacks_torch(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "torch" else object())


def message() -> str:
    with pytest.raises(UserError) as raised:
        packages.require_packages()
    return str(raised.value)


def test_the_environment_that_quickstart_made_is_named(lacks_torch, tmp_path, monkeypatch):
    venv = tmp_path / ".venv"
    folder = venv / ("Scripts" if os.name == "nt" else "bin")
    folder.mkdir(parents=True)
    (folder / "python").touch()
    monkeypatch.setattr(packages, "VENV", venv)
    monkeypatch.chdir(tmp_path)
    assert str(Path(".venv") / folder.name / "activate") in message()


def test_inside_of_that_environment_it_is_not_advised(lacks_torch, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(packages, "VENV", tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert "activate" not in message() and "pip install -r" in message()


def test_a_module_may_come_with_another_package(monkeypatch):
    def installed_and_missing(file):
        return {"opencv-python-headless": "missing"}, {"opencv-python-headless": "4.9"}

    monkeypatch.setattr(packages, "installed_and_missing", installed_and_missing)
    assert packages.require_versions() == {"opencv-python-headless": "missing"}
