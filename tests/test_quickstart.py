"""quickstart.py: old or bare Pythons, the environment, the epochs, the order of the job."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import environment

import quickstart
import validate_setup
from rfdetr import requirements
from rfdetr.data.demo import make_demo

ROOT = Path(quickstart.HERE)
SOURCE = (ROOT / "quickstart.py").read_bytes()


# --- an old or bare Python ---


def test_an_old_python_can_parse_it():
    assert SOURCE.isascii()  # Python 2 wants a declaration otherwise
    nodes = list(ast.walk(ast.parse(SOURCE, feature_version=(3, 4))))
    assert not [
        node for node in nodes if isinstance(node, (ast.JoinedStr, ast.AnnAssign, ast.Nonlocal))
    ]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert not [
        f
        for f in functions
        if f.returns or f.args.kwonlyargs or any(a.annotation for a in f.args.args)
    ]


OWN = ["requirements", "streams", "runs/metrics_file"]  # modules that it imports before torch


@pytest.mark.parametrize("name", ["quickstart", *(f"rfdetr/{name}" for name in OWN)])
def test_only_the_standard_library_is_imported_at_the_top(name):
    roots = set()
    for node in ast.parse((ROOT / f"{name}.py").read_bytes()).body:
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots <= sys.stdlib_module_names


def test_an_old_python_is_told_what_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 8, 1, "final", 0))
    assert quickstart.main(["--test"]) == 2
    said = capsys.readouterr().err
    assert "This is Python 3.8" in said and "Python >= 3.10 is needed" in said


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A Python that lacks all, and a folder for .venv; `commands` are run in name only."""

    class Bare:
        venv = tmp_path / "a folder" / ".venv"
        python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        commands = []
        codes = {}  # of `venv` and `pip`
        working = set()  # what the Python in .venv can do

    def run(arguments, python=None):
        command = "again" if arguments[0] != "-m" else arguments[1]
        Bare.commands.append((command, python and Path(python)))
        if command == "venv":
            Bare.venv.mkdir(exist_ok=True)
        return Bare.codes.get(command, 0)

    Bare.venv.mkdir(parents=True)
    (Bare.venv / "pyvenv.cfg").touch()
    monkeypatch.setattr(quickstart, "VENV", str(Bare.venv))
    monkeypatch.setattr(requirements, "installed_and_missing", lambda file: ({}, {"torch": "2.10"}))
    monkeypatch.setattr(quickstart, "run", run)
    monkeypatch.setattr(
        quickstart, "succeeds", lambda python, *arguments: arguments[1] in Bare.working
    )
    return Bare


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_the_package(bare, monkeypatch, capsys, module):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )
    assert quickstart.main([]) == 2
    said = capsys.readouterr().err
    assert f"lacks {module}" in said and "apt install python3-venv" in said and not bare.commands


# --- requirements ---


def test_every_line_of_requirements_has_the_form_that_is_read():
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    for line in filter(None, lines):
        name, least = line.split(">=")
        assert name.replace("-", "").isalnum() and least.replace(".", "").isdigit()


@pytest.mark.parametrize(
    ("installed", "least", "fits"),
    [
        ("2.10.0", "2.10", True),
        ("2.10", "2.10.0", True),
        ("2.9.1", "2.10", False),
        ("2.15.0+cpu", "2.10", True),
        ("2.10.0a0+git1234", "2.10", True),
        ("1.0.9", "1.0.20", False),
        ("10", "9.5", True),
        ("unknown", "0.1", False),
        (None, "1.0", False),
    ],
)
def test_versions_are_compared_as_numbers(tmp_path, monkeypatch, installed, least, fits):
    (tmp_path / "needs.txt").write_text(f"# a comment\n\nthing>={least}  # why\n")
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    assert requirements.installed_and_missing(tmp_path / "needs.txt")[1] == (
        {} if fits else {"thing": least}
    )


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "needs.txt").write_text("pytest>=1.0\nno-such-package-anywhere>=1.0\n")
    assert requirements.installed_and_missing(tmp_path / "needs.txt")[1] == {
        "no-such-package-anywhere": "1.0"
    }


def test_this_environment_is_used_as_it_is(monkeypatch):
    monkeypatch.setattr(
        quickstart, "run", lambda arguments, python=None: pytest.fail("nothing is to be installed")
    )
    assert quickstart.set_up([]) is None


# --- .venv ---


@pytest.fixture
def inside(bare, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(bare.venv))


def test_a_new_venv_is_made_and_used(bare):
    shutil.rmtree(bare.venv)
    assert quickstart.main(["--size", "tiny"]) == 0
    assert bare.commands == [("venv", None), ("again", bare.python)]


def test_a_finished_venv_is_used_as_it_is(bare):
    bare.working = {"", "pip"}
    bare.codes["again"] = 7
    assert quickstart.main([]) == 7
    assert bare.commands == [("again", bare.python)]


def test_a_half_made_venv_is_completed(bare):
    assert quickstart.main([]) == 0  # its Python does not start
    assert bare.commands == [("venv", None), ("again", bare.python)]


def test_what_is_missing_inside_the_venv_is_installed_there(bare, inside):
    assert quickstart.set_up([]) is None
    assert bare.commands == [("pip", None)]


def test_a_failed_pip_is_one_paragraph_and_tried_again_the_next_time(bare, inside, capsys):
    bare.codes["pip"] = 1
    assert quickstart.main([]) == 2
    said = capsys.readouterr().err
    assert "pip could not install requirements.txt" in said and "GB free" in said
    bare.codes["pip"] = 0
    assert quickstart.set_up([]) is None


def test_ctrl_c_while_setting_up_exits_as_such(bare, monkeypatch):
    bare.codes = {"venv": 130, "pip": 130}
    assert quickstart.main([]) == 130
    monkeypatch.setattr(sys, "prefix", str(bare.venv))
    assert quickstart.main([]) == 130 and bare.commands == [("venv", None), ("pip", None)]


def test_what_is_no_virtual_environment_is_left_alone(bare, capsys):
    (bare.venv / "pyvenv.cfg").unlink()
    (bare.venv / "mine.txt").write_text("keep")
    assert quickstart.main([]) == 2
    assert "is in the way" in capsys.readouterr().err
    assert (bare.venv / "mine.txt").read_text() == "keep" and not bare.commands


# --- commands ---


@pytest.mark.skipif(os.name == "nt", reason="quotes of POSIX")
def test_a_command_is_shown_as_one_would_type_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    inside = os.path.join(ROOT, ".venv", "bin", "python")
    assert quickstart.shown(["predict.py", "--input", "my images"], inside).split(maxsplit=1) == [
        os.path.join(".venv", "bin", "python"),
        "predict.py --input 'my images'",
    ]


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("pass", 0)])
def test_an_exit_code_is_passed_on(code, status):
    assert quickstart.run(["-c", code]) == status


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_lets_the_child_save_and_its_code_is_passed_on(tmp_path):
    """SIGTERM is handed on; Ctrl-C, which a terminal sends to all, is waited out."""
    child = (
        "import os, signal, sys, time\n"
        "def save(number, frame): os.write(1, b'saved'); sys.exit(128 + number)\n"
        "signal.signal(signal.SIGTERM, save); signal.signal(signal.SIGINT, save)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    parent = "import sys, quickstart; sys.exit(quickstart.run(['-c', sys.argv[1]]))"
    for number in (signal.SIGTERM, signal.SIGINT):
        pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "start_new_session": True}
        process = subprocess.Popen([sys.executable, "-c", parent, child], **pipes)
        while process.stdout.readline() != "ready\n":
            pass
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert "saved" in process.communicate(timeout=30)[0] and process.returncode == 128 + number


# --- the job ---


@pytest.mark.parametrize(
    "text, words, said",
    [
        ("size: nano\nepochs: 3", [], {"size": "nano", "epochs": 3}),
        ("epochs: 3\nval_fraction: 0.2", ["--epochs", "4"], {"epochs": 4, "val_fraction": 0.2}),
        ("dataset: my data\nexif: null", [], {"dataset": "my data", "exif": None}),
        ("epoch: 3", [], "--config own.yaml has no setting 'epoch' (did you mean epochs?)"),
        ("test: 3", [], "has no setting 'test'"),
        ("- epochs", [], "expected lines of `name: value`"),
        ("epochs: [3]", [], "--epochs: expected a whole number from 1 to 1,000,000,000"),
        ("rename: [Date=date, A=b]", [], {"rename": ["Date=date", "A=b"]}),
    ],
)
def test_a_file_gives_settings_and_flags_win(text, words, said, tmp_path, monkeypatch, capsys):
    jobs = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "HERE", str(tmp_path))
    monkeypatch.setattr(quickstart, "set_up", lambda argv: None)
    monkeypatch.setattr(quickstart, "run_job", jobs.append)
    Path("own.yaml").write_text(text)
    code = quickstart.main(["--config", "own.yaml", *words])
    if isinstance(said, str):
        assert code == 2 and said in capsys.readouterr().err
    else:
        assert code == 0 and said.items() <= vars(jobs[0]).items()


def test_pictures_are_of_images_in_folders_below_too(tmp_path):
    (tmp_path / "valid").mkdir()
    job = quickstart.Job(quickstart.parse(["--dataset", str(tmp_path)]))
    assert job.annotated_images() == str(tmp_path / "valid")
    (tmp_path / "valid/images").mkdir()
    assert job.annotated_images() == str(tmp_path / "valid/**/*")


@pytest.mark.parametrize(
    ("words", "noun"),
    [([], "images"), (["--tile", "0"], "images"), (["--tile", "auto"], "tiles")],
)
def test_an_epoch_is_counted_in_what_it_is_made_of(words, noun):
    assert quickstart.Job(quickstart.parse(words)).noun == noun


@pytest.mark.parametrize(
    ("steps", "images", "per_step", "min_steps", "per_epoch", "epochs"),
    [
        (3000, 200, 4, 5, 50, 60),
        (3000, 203, 4, 5, 50, 60),
        (3000, 199, 4, 5, 49, 62),
        (3000, 200, 4, 250, 250, 12),  # a small dataset is repeated within an epoch
        (3000, 0, 4, 250, 250, 12),
        (1500, 100_000, 16, 5, 6250, 2),
        (3000, 5, 4, 5, 5, 100),
    ],
)
def test_epochs_keep_the_number_of_steps_and_say_why(
    capsys, steps, images, per_step, min_steps, per_epoch, epochs
):
    assert quickstart.epochs_for("Stage 1", steps, images, per_step, min_steps) == epochs
    said = capsys.readouterr().out
    assert (
        f"Stage 1: {epochs} epochs" in said
        and f"{images} images make {per_epoch} steps an epoch" in said
    )


@pytest.mark.parametrize(
    ("flags", "images"), [([], 4), (["--val_fraction", "0.5"], 2), (["--tile", "48"], 4 * 4)]
)
def test_the_setup_check_counts_what_is_trained_on(few, call, tmp_path, flags, images):
    """4 images of 64 x 64 pixels."""
    shutil.copytree(few / "train", tmp_path / "data/train")
    if "--val_fraction" not in flags:
        shutil.copytree(few / "valid", tmp_path / "data/valid")
    check = ["--dataset", "data", "--size", "tiny", "--json", "runs/setup_check.json"]
    call(validate_setup.main, *check, *flags)
    assert json.loads(Path("runs/setup_check.json").read_text())["images_an_epoch"] == images


def metrics_of(**tables) -> dict:
    tables = {name: {"mAP50": 0.5, "mAP": value} for name, value in tables.items()}
    record = {"epoch": 2, "valid": {}, "valid_ema": tables}
    return {"epochs": [{"epoch": 1, "valid": {}}, record], "best": {"epoch": 2, "weights": "ema"}}


def test_scores_are_those_of_the_best_epoch_and_weights(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(metrics_of(bbox=0.25, segm=None)))
    assert quickstart.scores(str(tmp_path)) == (
        "box mAP50 0.500, box mAP 0.250, mask mAP50 0.500",
        "ema",
    )
    file.write_text(json.dumps({"epochs": [], "best": None}))
    assert quickstart.scores(str(tmp_path)) == ("no scores", "regular")


REPORT = os.path.join("runs", "setup_check.json")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A dataset; the scripts are run in name only, and `failing` ones end with their code."""
    annotations = tmp_path / "dataset" / "train" / "_annotations.coco.json"
    annotations.parent.mkdir(parents=True)
    annotations.write_text(json.dumps({"images": [{}] * 200}))
    valid = tmp_path / "dataset" / "valid" / "_annotations.coco.json"
    valid.parent.mkdir()
    valid.touch()
    commands, failing = [], {}

    def run(arguments, python=None):
        commands.append(" ".join(arguments))
        if arguments[0] == "validate_setup.py":
            report = Path(arguments[arguments.index("--json") + 1])
            report.parent.mkdir(exist_ok=True)
            report.write_text(json.dumps({"images_an_epoch": 200}))
        stem = {"train_detector_stage1.py": "detector", "train_seg_stage2.py": "segmentation"}.get(
            arguments[0]
        )
        if stem and arguments[0] not in failing:
            folder = tmp_path / "runs" / f"{stem}_tiny_128_2"
            if "--output_dir" in arguments:
                folder = Path(arguments[arguments.index("--output_dir") + 1])
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps(metrics_of(bbox=0.25, segm=0.125)))
        return failing.get(arguments[0], 0)

    (tmp_path / "runs" / "detector_tiny_128_1").mkdir(parents=True)
    monkeypatch.setattr(quickstart, "HERE", str(tmp_path))
    monkeypatch.setattr(quickstart, "set_up", lambda argv: None)
    monkeypatch.setattr(quickstart, "run", run)
    monkeypatch.setattr(quickstart, "succeeds", lambda python, *arguments: False)  # no GPU
    monkeypatch.chdir(tmp_path)
    return commands, failing


def test_the_job_runs_the_scripts_in_order_on_what_each_made(repository, capsys):
    assert quickstart.main([]) == 0
    detector, masks = (
        os.path.join("runs", f"{stem}_tiny_128_2") for stem in ("detector", "segmentation")
    )
    shrunk, best = os.path.join(detector, "checkpoint_mydata.pth"), os.path.join(masks, "best.pt")
    trained = os.path.join(detector, "checkpoint_best_ema.pth")
    results = os.path.join(masks, "results")
    said = capsys.readouterr().out
    epochs = re.findall(r"Stage [12]: (\d+) epochs", said)
    assert repository[0] == [
        f"validate_setup.py --dataset dataset --size tiny --json {REPORT}",
        f"train_detector_stage1.py --dataset dataset --size tiny --seed 0 --epochs {epochs[0]}",
        f"shrink_head.py --in_ckpt {trained} --out_ckpt {shrunk}",
        "train_seg_stage2.py --dataset dataset --size tiny --seed 0 "
        f"--stage1_run {detector} --checkpoint {shrunk} "
        f"--eval_every {math.ceil(int(epochs[1]) / 2)} --epochs {epochs[1]}",
        f"evaluate.py --checkpoint {best} --dataset dataset --split valid --results {results}",
        f"predict.py --checkpoint {best} --input {os.path.join('dataset', 'valid')} "
        f"--output {os.path.join(masks, 'found')}",
    ]
    assert (
        "box mAP 0.250, mask mAP50 0.500, mask mAP 0.125" in said
        and "predict.py --checkpoint" in said
    )


def test_flags_reach_the_scripts(repository, tmp_path):
    flags = "--dataset dataset --size nano --epochs 2 --seg_epochs 3 --resolution 320 "
    flags += "--device cpu --output_dir out --pretrain_weights none --seed 5 --val_fraction 0.1"
    assert quickstart.main(flags.split()) == 0
    common = "--dataset dataset --val_fraction 0.1 --size nano --device cpu --resolution 320"
    report = os.path.join("out", "setup_check.json")
    assert repository[0][0] == f"validate_setup.py {common} --json {report}"
    folder = os.path.join("out", "detector")
    own = f"--epochs 2 --pretrain_weights none --output_dir {folder}"
    assert repository[0][1] == f"train_detector_stage1.py {common} --seed 5 {own}"
    assert " --epochs 3 " in repository[0][3]


def test_without_a_dataset_demo_data_is_generated_once(repository, tmp_path):
    shutil.rmtree(tmp_path / "dataset")
    demo = os.path.join("runs", "demo_data")
    repository[1]["validate_setup.py"] = 9  # far enough
    assert quickstart.main([]) == 9
    assert repository[0] == [
        f"-m rfdetr.data.demo {demo} --seed 0",
        f"validate_setup.py --dataset {demo} --size tiny --json {REPORT}",
    ]
    (tmp_path / demo / "valid").mkdir(parents=True)
    (tmp_path / demo / "valid" / "_annotations.coco.json").touch()
    repository[0].clear()
    assert quickstart.main([]) == 9
    assert repository[0] == [f"validate_setup.py --dataset {demo} --size tiny --json {REPORT}"]


def test_a_dataset_without_masks_says_what_stands(repository, capsys):
    repository[1]["train_seg_stage2.py"] = 2
    assert quickstart.main([]) == 2
    said = capsys.readouterr().err
    best = os.path.join("runs", "detector_tiny_128_2", "best.pt")
    assert "train_seg_stage2.py ended with exit code 2" in said
    assert f"What stands: the detector is trained, {best} (box mAP50 0.500" in said
    assert len(repository[0]) == 4


def test_without_a_valid_split_the_own_command_is_advised(repository, tmp_path, capsys):
    shutil.rmtree(tmp_path / "dataset" / "valid")
    assert quickstart.main(["--size", "tiny"]) == 2
    said = capsys.readouterr().err
    assert "no valid split" in said and "--val_fraction 0.1" in said and not repository[0]


def test_a_folder_of_one_run_is_none_of_a_job(repository, tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "detector_tiny_128_1"
    (run / "best.pt").touch()
    (tmp_path / "runs" / "detector_tiny_128_1_job1").mkdir()
    words = ["--size", "tiny", f"--output_dir={os.path.relpath(run)}", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *words])
    assert quickstart.main(words) == 2
    said = capsys.readouterr().err
    assert "is the folder of one run (it holds best.pt)" in said and not repository[0]
    assert said.endswith(
        "python quickstart.py --size tiny --seed 5 "
        f"--output_dir {os.path.join('runs', 'detector_tiny_128_1_job2')}\n"
    )
    assert quickstart.main(shlex.split(said.split("python quickstart.py ")[1])) == 0


def test_weights_that_are_missing_are_told_at_once(repository, tmp_path, capsys):
    assert quickstart.main(["--pretrain_weights", "no.pth"]) == 2
    assert "--pretrain_weights no.pth: " in capsys.readouterr().err and not repository[0]
    (tmp_path / "own.pth").touch()
    for weights in ("own.pth", "none", "auto", "https://example.org/own.pth"):
        shutil.rmtree(tmp_path / "runs")
        assert quickstart.main(["--pretrain_weights", weights]) == 0


def test_a_stopped_job_names_a_command_that_works(repository, tmp_path, monkeypatch, capsys):
    repository[1]["validate_setup.py"] = 130
    assert quickstart.main([]) == 130
    assert "The same command begins the job anew." in capsys.readouterr().err
    words = ["--output_dir", "new", "--size", "tiny"]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *words])
    assert quickstart.main(words) == 130
    again = "python quickstart.py --size tiny --output_dir new_job1\n"
    assert f"To begin the job anew: {again}" in capsys.readouterr().err
    (tmp_path / "new" / "detector" / "tensorboard").mkdir(parents=True)
    repository[0].clear()
    assert quickstart.main(words) == 2
    said = capsys.readouterr().err
    assert "detector is not empty: an earlier job's run lies there" in said and said.endswith(again)
    assert not repository[0]


@pytest.mark.parametrize(
    "words",
    ["--epochs 0", "--seg_epochs -1", "--size tinny", "--size seg-nano", "--val_fraction 5"],
)
def test_values_out_of_range_are_refused_before_anything_is_run(repository, capsys, words):
    assert quickstart.main(words.split()) == 2
    assert words.split()[0] in capsys.readouterr().err and not repository[0]


def test_paths_are_the_users_wherever_it_is_started(repository, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    repository[1]["validate_setup.py"] = 9
    assert quickstart.main(["--dataset", "mine", "--size", "tiny"]) == 9
    assert repository[0] == [
        f"validate_setup.py --dataset {tmp_path / 'elsewhere' / 'mine'} --size tiny --json {REPORT}"
    ]


def test_what_follows_test_goes_to_pytest(repository):
    assert quickstart.main(["--test", "-x", "tests/test_boxes.py", "--size", "nano"]) == 0
    shared = "-m pytest -n 2 --dist worksteal"
    assert repository[0] == [f"{shared} -x tests/test_boxes.py --size nano"]


@pytest.mark.slow
def test_the_whole_job_in_a_folder_with_a_space(tmp_path):
    copy = tmp_path / "a copy"
    shutil.copytree(ROOT / "rfdetr", copy / "rfdetr", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        shutil.copy(file, copy)
    sizes = copy / "rfdetr/sizes.py"
    shorter_epochs = re.sub(r"\bmin_steps=\d+", "min_steps=60", sizes.read_text())
    sizes.write_text(re.sub(r"\bseg_min_steps=\d+", "seg_min_steps=5", shorter_epochs))
    make_demo(copy / "dataset", train=8, valid=4, test=0, size=96, seed=0)
    job = [
        sys.executable,
        "quickstart.py",
        "--size",
        "tiny",
        "--epochs",
        "1",
        "--seg_epochs",
        "1",
        "--resolution",
        "64",
        "--device",
        "cpu",
    ]
    result = subprocess.run(
        job, cwd=copy, capture_output=True, encoding="utf-8", errors="replace", env=environment()
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (masks,) = (copy / "runs").glob("segmentation_tiny_*")
    assert any((masks / "found").iterdir()) and (masks / "results" / "segm.json").exists()
    assert not (copy / ".venv").exists() and "the masks are trained" in result.stdout
