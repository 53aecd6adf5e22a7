"""Everything in one command: an environment, then the whole job from a dataset to pictures with masks.

    python quickstart.py                      on dataset/, or on generated demo data where there is no such folder
    python quickstart.py --dataset DIR        on your own images
    python quickstart.py --test [PYTEST ...]  runs the tests instead

Standard library only, and no syntax that an old Python cannot parse: it must live to say what it needs.
"""

from __future__ import print_function

import argparse
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REQUIREMENTS = os.path.join(HERE, "requirements.txt")
VENV = os.path.join(HERE, ".venv")
STAMP = os.path.join(VENV, "requirements.sha256")  # written when pip has finished: of what it installed

# A job takes about as many optimizer steps whatever the number of images; the epochs follow from that. The tiny size
# starts from nothing and needs more steps of fewer images than one that starts from pretrained weights.
STAGE1_STEPS = {"tiny": 3000}
STAGE2_STEPS = {"tiny": 750}
OTHER_STEPS = 1500
FEWEST_EPOCHS, MOST_EPOCHS = 3, 100


class Stop(Exception):
    """Stop(code, paragraph) ends the program with that exit code after the paragraph on stderr."""


def version(text):
    """The leading numbers of a version, padded: "2.10.0+cpu" -> (2, 10, 0, 0, 0, 0)."""
    numbers = [int(number) for number in re.match(r"[\d.]*", text).group().split(".") if number]
    return tuple(numbers + [0] * (6 - len(numbers)))


def unmet(requirements):
    """The lines of requirements.txt, each "name>=version", that this Python's packages do not satisfy."""
    from importlib import metadata

    missing = []
    for line in filter(None, (line.split("#")[0].strip() for line in requirements.splitlines())):
        name, least = line.split(">=")
        try:
            installed = metadata.version(name)  # None for a package that was half removed
        except metadata.PackageNotFoundError:
            installed = None
        if installed is None or version(installed) < version(least):
            missing.append(line)
    return missing


def set_up(argv):
    """None where this Python has what requirements.txt asks for; else the exit code of `argv` run inside .venv."""
    requirements = read(REQUIREMENTS)
    missing = unmet(requirements)
    if not missing:
        return None
    python = os.path.join(VENV, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
    inside = os.path.realpath(sys.prefix) == os.path.realpath(VENV)
    wanted = hashlib.sha256(requirements.encode()).hexdigest()
    if inside or not runs(python, "-c", "") or not os.path.exists(STAMP) or read(STAMP) != wanted:
        print("This Python lacks %s. Installing into %s; PyTorch is large." % (", ".join(missing), VENV))
        if not inside:
            make_venv(python)
        code = run(["-m", "pip", "install", "--disable-pip-version-check", "-r", REQUIREMENTS], python)
        if code:
            raise Stop(
                130 if code == 130 else 2,
                "pip could not install requirements.txt into %s; its last lines above say why: mostly the network, "
                "less than 10 GB of free disk, or a Python too new for PyTorch (this is %d.%d). Mend that and start "
                "this again: it goes on from there." % ((VENV,) + tuple(sys.version_info[:2])),
            )
        with open(STAMP, "w") as file:
            file.write(wanted)
    return None if inside else run([os.path.abspath(__file__)] + argv, python)


def make_venv(python):
    """Make .venv, or complete one whose making was interrupted, so that `python`, which lies in it, has pip."""
    from importlib.util import find_spec

    if os.path.lexists(VENV) and not os.path.exists(os.path.join(VENV, "pyvenv.cfg")):
        raise Stop(2, "%s is in the way: it is no virtual environment. Move it elsewhere and start this again." % VENV)
    lacking = [module for module in ("venv", "ensurepip") if find_spec(module) is None]
    if lacking:
        raise Stop(
            2,
            "This Python (%s) lacks %s, which virtual environments need. On Debian and Ubuntu: sudo apt install "
            "python3-venv. Or install the packages into this Python yourself: python3 -m pip install -r "
            "requirements.txt. Then start this again." % (sys.executable, " and ".join(lacking)),
        )
    if runs(python, "-m", "pip", "--version"):
        return
    # what lies in it is cleared only where its Python has gone, so that nothing there can be used any more
    clear = ["--clear"] if os.path.lexists(VENV) and not runs(python, "-c", "") else []
    code = run(["-m", "venv"] + clear + [VENV])
    if code:
        raise Stop(130 if code == 130 else 2, "Making %s failed: see above. Mend that and start this again." % VENV)


def read(path):
    with open(path, encoding="utf-8-sig") as file:
        return file.read()


def shown(arguments, python=None):
    """A command as one would type it."""
    python = python or sys.executable
    python = next((name for name in ("python", "python3") if shutil.which(name) == python), python)
    near = os.path.join(os.getcwd(), "")
    words = [word[len(near) :] if word.startswith(near) else word for word in [python] + list(arguments)]
    return subprocess.list2cmdline(words) if os.name == "nt" else " ".join(shlex.quote(word) for word in words)


def runs(python, *arguments):
    """Whether `python ARGUMENTS` ends well; silent."""
    try:
        return subprocess.call((python,) + arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def run(arguments, python=None):
    """Show and run `python ARGUMENTS`; returns its exit code (128 + n for signal n)."""
    print("\n> " + shown(arguments, python) + "\n")
    sys.stdout.flush()
    child = subprocess.Popen([python or sys.executable] + list(arguments))
    interrupts = []
    # Ctrl-C reaches the child by itself, which then saves its state: wait for it. SIGTERM comes to this process alone
    former_interrupt = signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
    former_terminate = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    signal.signal(signal.SIGINT, former_interrupt)
    signal.signal(signal.SIGTERM, former_terminate)
    return 130 if code and interrupts else 128 - code if code < 0 else code


def epochs_for(stage, steps, images, images_per_step, min_steps):
    """Epochs of at least `min_steps` that make about `steps` optimizer steps; printed with the reason."""
    per_epoch = max(images // images_per_step, min_steps)  # a small dataset is repeated
    epochs = min(max(-(-steps // per_epoch), FEWEST_EPOCHS), MOST_EPOCHS)
    reason = (stage, epochs, images, per_epoch, steps, FEWEST_EPOCHS, MOST_EPOCHS)
    print("\n%s: %d epochs (%d images make %d steps an epoch, about %d steps are wanted, in %d to %d epochs)" % reason)
    return epochs


def training_images(dataset):
    """How many images the training annotations list, in either of the two layouts."""
    names = ("train/_annotations.coco.json", "annotations/instances_train*.json")
    found = [path for name in names for path in glob.glob(os.path.join(glob.escape(dataset), name))]
    return len(json.loads(read(found[0]))["images"])


def scores(run_folder):
    """A run's best scores from its metrics.json, as text, and the weights that had them (regular or ema)."""
    metrics = json.loads(read(os.path.join(run_folder, "metrics.json")))
    best = metrics["best"] or {"epoch": None, "weights": "regular"}  # null where the valid split is empty
    record = next((epoch for epoch in metrics["epochs"] if epoch["epoch"] == best["epoch"]), {})
    valid = record.get("valid_ema" if best["weights"] == "ema" else "valid") or {}
    texts = []
    for name, table in (("box", valid.get("bbox")), ("mask", valid.get("segm"))):
        for key in ("mAP50", "mAP"):
            if table and table[key] is not None:
                texts.append("%s %s %.3f" % (name, key, table[key]))
    return ", ".join(texts) or "no scores", best["weights"]


class Job(object):
    """Runs the scripts one after the other; remembers their times and what stands already."""

    def __init__(self, output_dir):
        self.output_dir, self.times, self.stands = output_dir, [], []

    def step(self, *arguments):
        begin = time.time()
        code = run(arguments)
        name = arguments[1] if arguments[0] == "-m" else arguments[0]
        self.times.append((name, time.time() - begin))
        if code:
            stands = "".join("\nWhat stands: " + line for line in self.stands)
            raise Stop(code, "%s ended with exit code %d: see its message above.%s" % (name, code, stands))

    def train(self, script, stem, *arguments):
        """Run a training script; returns the run folder that it made."""
        if self.output_dir != "runs":
            folder = os.path.join(self.output_dir, stem)
            self.step(script, *(arguments + ("--output_dir", folder)))
            return folder
        before = set(glob.glob("runs/%s_*" % stem))
        self.step(script, *arguments)
        return os.path.normpath(max(set(glob.glob("runs/%s_*" % stem)) - before, key=os.path.getmtime))


def run_job(args):
    job = Job(args.output_dir or "runs")
    dataset, size = args.dataset or "dataset", args.size
    if not args.dataset and not os.path.isdir(dataset):
        dataset, size = os.path.join(job.output_dir, "demo_data"), size or "tiny"
        if not os.path.exists(os.path.join(dataset, "valid", "_annotations.coco.json")):  # the last file it writes
            print("There is no dataset/ here: generating demo data.")
            job.step("-m", "rfdetr.data.demo", dataset, "--seed", str(args.seed))
    if not size:
        has_gpu = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        gpu = args.device.startswith("cuda") or (args.device == "auto" and runs(sys.executable, "-c", has_gpu))
        size = "nano" if gpu else "tiny"
    device = ("--device", args.device) if args.device != "auto" else ()
    data = ("--dataset", dataset) + (("--val_fraction", str(args.val_fraction)) if args.val_fraction else ())
    common = data + ("--size", size) + device
    common += ("--resolution", str(args.resolution)) if args.resolution else ()
    job.step("validate_setup.py", *common)
    from rfdetr.sizes import SIZES  # validate_setup.py has said whether there is such a size

    recipe, images = SIZES[size].recipe, training_images(dataset)
    common += ("--seed", str(args.seed))
    steps, batch = STAGE1_STEPS.get(size, OTHER_STEPS), recipe.batch * recipe.accum
    epochs = args.epochs or epochs_for("Stage 1", steps, images, batch, recipe.min_steps)
    weights = ("--pretrain_weights", args.pretrain_weights) if args.pretrain_weights else ()
    detector = job.train("train_detector_stage1.py", "detector", *(common + ("--epochs", str(epochs)) + weights))
    boxes, best = scores(detector)
    job.stands.append("the detector is trained, %s (%s)" % (os.path.join(detector, "best.pt"), boxes))
    trained, shrunk = (os.path.join(detector, "checkpoint_%s.pth" % name) for name in ("best_" + best, "mydata"))
    job.step("shrink_head.py", "--in_ckpt", trained, "--out_ckpt", shrunk)
    steps, batch = STAGE2_STEPS.get(size, OTHER_STEPS), recipe.seg_batch * recipe.seg_accum
    epochs = args.seg_epochs or epochs_for("Stage 2", steps, images, batch, recipe.seg_min_steps)
    frozen = ("--stage1_run", detector, "--checkpoint", shrunk, "--epochs", str(epochs))
    masks = job.train("train_seg_stage2.py", "segmentation", *(common + frozen))
    job.stands.append("the masks are trained, %s (%s)" % (os.path.join(masks, "best.pt"), scores(masks)[0]))
    use = ("--checkpoint", os.path.join(masks, "best.pt")) + device
    job.step("evaluate.py", *(use + data + ("--split", "valid", "--results", os.path.join(masks, "results"))))
    folders = [os.path.join(dataset, name) for name in ("valid", "val2017", "train", "train2017")]
    pictures = os.path.join(masks, "predictions")
    job.step("predict.py", *(use + ("--input", next(filter(os.path.isdir, folders), dataset), "--output", pictures)))
    print("\n" + "=" * 60 + "\nDone in %.0f s" % sum(seconds for _, seconds in job.times))
    print("\n".join("  %-26s %6.0f s" % step for step in job.times))
    print("\nOn the valid split, %s;\n%s.\nPictures: %s" % (job.stands[0], job.stands[1], pictures))
    print("\nNext, your own images:   " + shown(("predict.py",) + use + ("--input", "IMAGES", "--output", "found")))
    print("your own COCO dataset:   " + shown(("quickstart.py", "--dataset", "DIR")))
    print("the curves of training:  " + shown(("-m", "tensorboard.main", "--logdir", job.output_dir)))


def from_here(path):
    """A path that the user gave, as the scripts see it: they run in the repository's folder."""
    return path if os.getcwd() == HERE or path in ("auto", "none") or "://" in path else os.path.abspath(path)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", type=from_here, help="folder with train/ and valid/ (default: dataset/, else demo data)")
    add("--size", help="tiny, nano, small, medium, base or large (default: nano on your data with a GPU, else tiny)")
    add("--epochs", type=int, help="of stage 1 (default: by the number of training images)")
    add("--seg_epochs", type=int, help="of stage 2 (likewise)")
    add("--resolution", type=int, help="side of the model's input in pixels (default: the size's own)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--output_dir", type=from_here, help="put detector/, segmentation/ and demo data there (default: runs/)")
    add("--pretrain_weights", type=from_here, help="auto, none, a file or a URL")
    add("--val_fraction", type=float, help="share of train/ to validate on, where there is no valid/")
    add("--seed", type=int, default=0)
    add("--test", nargs=argparse.REMAINDER, help="set up, then run the tests; what follows goes to pytest")
    return parser.parse_args(argv)


def main(argv):
    """Returns the exit code."""
    try:
        if sys.version_info[:2] < (3, 10):
            raise Stop(
                2,
                "This is Python %d.%d (%s), and Python >= 3.10 is needed. Install a newer one from python.org or with "
                "your system's package manager, and start this again with it, for example: python3.12 quickstart.py"
                % (tuple(sys.version_info[:2]) + (sys.executable,)),
            )
        sys.stdout.reconfigure(errors="replace")  # a Windows console may lack a letter of a folder's name
        args = parse(argv)
        code = set_up(argv)
        if code is None:
            os.chdir(HERE)
            code = run_job(args) if args.test is None else run(["-m", "pytest"] + args.test)
        return code or 0
    except Stop as stop:
        print("\nerror: " + stop.args[1], file=sys.stderr)
        return stop.args[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
