"""Everything in one command: an environment, then the whole job from a dataset to pictures with masks.

    python quickstart.py                      on dataset/, or on generated demo data where there is no such folder
    python quickstart.py --dataset DIR        on your own images
    python quickstart.py --test [PYTEST ...]  runs the tests instead

Standard library only, and no syntax that an old Python cannot parse: it must live to say what it needs.
"""

import argparse
import glob
import json
import os
import shlex
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REQUIREMENTS = os.path.join(HERE, "requirements.txt")
VENV = os.path.join(HERE, ".venv")

# A job takes about as many optimizer steps of stages 1 and 2 whatever the number of images; the epochs follow from
# that. The tiny size starts from nothing; the demo data are easier for it than what microscopes see.
STEPS = {"demo": (800, 300), "tiny": (4000, 300), "others": (1500, 1500)}
FEWEST_EPOCHS, MOST_EPOCHS = 2, 100


class Stop(Exception):
    """Stop(code, paragraph) ends the program with that exit code after the paragraph on stderr."""


def set_up(argv):
    """None where this Python has what requirements.txt asks for; else the exit code of `argv` run inside .venv."""
    from rfdetr.console import packages  # standard library only too

    missing = packages(REQUIREMENTS)[1]
    if not missing:
        return None
    print("This Python lacks %s. They are kept in %s; PyTorch is large." % (", ".join(missing), VENV))
    if os.path.realpath(sys.prefix) != os.path.realpath(VENV):
        python = os.path.join(VENV, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
        if not runs(python, "-m", "pip", "--version"):
            make_venv(python)
        return run([os.path.abspath(__file__)] + argv, python)  # which comes here too, and goes on below
    code = run(["-m", "pip", "install", "--disable-pip-version-check", "-r", REQUIREMENTS])
    if code:
        raise Stop(130 if code == 130 else 2, "pip could not install requirements.txt; above it says why, mostly the "
                   "network, a full disk or a Python too new for PyTorch. Mend that and start this again.")


def make_venv(python):
    """Make .venv, or complete one whose making was interrupted, so that `python`, which lies in it, has pip."""
    from importlib.util import find_spec

    if os.path.lexists(VENV) and not os.path.exists(os.path.join(VENV, "pyvenv.cfg")):
        raise Stop(2, "%s is in the way: it is no virtual environment. Move it elsewhere and start this again." % VENV)
    lacking = " and ".join(module for module in ("venv", "ensurepip") if find_spec(module) is None)
    if lacking:
        raise Stop(2, "This Python (%s) lacks %s, which virtual environments need. On Debian and Ubuntu: sudo apt "
                   "install python3-venv. Then start this again." % (sys.executable, lacking))
    # what lies in it is cleared only where its Python has gone, so that nothing there can be used any more
    code = run(["-m", "venv", VENV] + ([] if runs(python, "-c", "") else ["--clear"]))
    if code:
        raise Stop(130 if code == 130 else 2, "Making %s failed: see above. Mend that and start this again." % VENV)


def shown(arguments, python=sys.executable):
    """A command as one would type it."""
    near = os.path.join(os.getcwd(), "")
    words = [word[len(near) :] if word.startswith(near) else word for word in [python] + list(arguments)]
    return subprocess.list2cmdline(words) if os.name == "nt" else " ".join(shlex.quote(word) for word in words)


def runs(python, *arguments):
    """Whether there is such a Python and `python ARGUMENTS` ends well; silent."""
    return os.path.exists(python) and subprocess.run((python,) + arguments, capture_output=True).returncode == 0


def run(arguments, python=sys.executable):
    """Show and run `python ARGUMENTS`; returns its exit code (128 + n for signal n)."""
    print("\n> " + shown(arguments, python) + "\n")
    sys.stdout.flush()
    child, interrupts = subprocess.Popen([python] + list(arguments)), []
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
    reason = "%d images make %d steps an epoch, about %d are wanted" % (images, per_epoch, steps)
    print("\n%s: %d epochs (%s)" % (stage, epochs, reason))
    return epochs


def training_images(dataset):
    """How many images the training annotations list, in either of the two layouts."""
    from rfdetr.data.layout import find_splits, read_json

    return len(read_json(find_splits(dataset)["train"][0])["images"])


def scores(run_folder):
    """A run's best scores from its metrics.json, as text, and the weights that had them (regular or ema)."""
    with open(os.path.join(run_folder, "metrics.json"), encoding="utf-8") as file:
        metrics = json.load(file)
    best = metrics["best"] or {"epoch": None, "weights": "regular"}  # null where the valid split is empty
    record = next((epoch for epoch in metrics["epochs"] if epoch["epoch"] == best["epoch"]), {})
    valid = record.get("valid_ema" if best["weights"] == "ema" else "valid") or {}
    tables = [(name, valid.get(kind) or {}) for name, kind in (("box", "bbox"), ("mask", "segm"))]
    found = [(name, key, table.get(key)) for name, table in tables for key in ("mAP50", "mAP")]
    return ", ".join("%s %s %.3f" % row for row in found if row[2] is not None) or "no scores", best["weights"]


def run_job(args):
    """Run the scripts one after the other."""
    begin, output_dir, stands = time.time(), args.output_dir or "runs", []

    def flags(*names):
        given = [(name, getattr(args, name)) for name in names if getattr(args, name) not in (None, "auto")]
        return tuple(word for name, value in given for word in ("--" + name, str(value)))

    def step(*arguments):
        code = run(arguments)
        if code:
            name, so_far = " ".join(arguments).split(" --")[0], "".join("\nWhat stands: " + line for line in stands)
            raise Stop(code, "%s ended with exit code %d: see its message above.%s" % (name, code, so_far))

    def train(script, stem, what, *arguments):  # returns the run's folder and the weights that scored best
        before, folder = set(glob.glob("runs/%s_*" % stem)), os.path.join(output_dir, stem)
        step(script, *(arguments + (("--output_dir", folder) if output_dir != "runs" else ())))
        if output_dir == "runs":
            folder = os.path.normpath(max(set(glob.glob("runs/%s_*" % stem)) - before, key=os.path.getmtime))
        found, weights = scores(folder)
        stands.append("%s trained, %s (%s)" % (what, os.path.join(folder, "best.pt"), found))
        return folder, weights

    demo = not args.dataset and not os.path.isdir("dataset")
    if demo:
        args.dataset, args.size = os.path.join(output_dir, "demo_data"), args.size or "tiny"
        if not os.path.exists(os.path.join(args.dataset, "valid", "_annotations.coco.json")):  # the last file it writes
            print("There is no dataset/ here: generating demo data.")
            step("-m", "rfdetr.data.demo", args.dataset, "--seed", str(args.seed))
    dataset = args.dataset = args.dataset or "dataset"
    if not args.size:
        has_gpu = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        gpu = runs(sys.executable, "-c", has_gpu) if args.device == "auto" else args.device.startswith("cuda")
        args.size = "nano" if gpu else "tiny"
    kind = "demo" if demo else args.size if args.size in STEPS else "others"
    common = flags("dataset", "val_fraction", "exif", "size", "device", "resolution")
    step("validate_setup.py", *common)
    from rfdetr.sizes import SIZES  # validate_setup.py has said whether there is such a size
    recipe, images = SIZES[args.size].recipe, training_images(dataset)
    common += flags("seed")
    batch = recipe.batch * recipe.accum
    args.epochs = args.epochs or epochs_for("Stage 1", STEPS[kind][0], images, batch, recipe.min_steps)
    own = common + flags("epochs", "pretrain_weights")
    detector, best = train("train_detector_stage1.py", "detector", "the detector is", *own)
    trained, shrunk = (os.path.join(detector, "checkpoint_%s.pth" % name) for name in ("best_" + best, "mydata"))
    step("shrink_head.py", "--in_ckpt", trained, "--out_ckpt", shrunk)
    batch = recipe.seg_batch * recipe.seg_accum
    epochs = args.seg_epochs or epochs_for("Stage 2", STEPS[kind][1], images, batch, recipe.seg_min_steps)
    own = common + ("--stage1_run", detector, "--checkpoint", shrunk, "--epochs", str(epochs))
    masks, _ = train("train_seg_stage2.py", "segmentation", "the masks are", *own)
    use = ("--checkpoint", os.path.join(masks, "best.pt")) + flags("device")
    results, pictures = (os.path.join(masks, name) for name in ("results", "predictions"))
    step("evaluate.py", *(use + flags("dataset", "val_fraction", "exif") + ("--split", "valid", "--results", results)))
    folders = [os.path.join(dataset, name) for name in ("valid", "val2017", "train", "train2017")]
    step("predict.py", *(use + ("--input", next(filter(os.path.isdir, folders), dataset), "--output", pictures)))
    own = shown(("predict.py",) + use + ("--input", "IMAGES", "--output", "found"))
    print("\n%s\nDone in %.0f s. On the valid split, %s;" % ("=" * 60, time.time() - begin, ";\n".join(stands)))
    print("Pictures: %s\nYour own images: %s" % (pictures, own))


def parse(argv):
    def from_here(path):  # what the user typed, as the scripts see it: they run in the repository's folder
        return path if os.getcwd() == HERE or path in ("auto", "none") or "://" in path else os.path.abspath(path)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", type=from_here, help="folder with train/ and valid/ (default: dataset/, else demo data)")
    add("--size", help="tiny, nano, small, medium, base, large ... (default: nano on your data with a GPU, else tiny)")
    add("--epochs", type=int, help="of stage 1 (default: by the number of training images)")
    add("--seg_epochs", type=int, help="of stage 2 (likewise)")
    add("--resolution", type=int, help="side of the model's input in pixels (default: the size's own)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--output_dir", type=from_here, help="put detector/, segmentation/ and demo data there (default: runs/)")
    add("--pretrain_weights", type=from_here, help="auto, none, a file or a URL")
    add("--val_fraction", type=float, help="share of train/ to validate on, where there is no valid/")
    add("--exif", choices=("apply", "ignore"), help="orientation of images whose annotated size does not tell")
    add("--seed", type=int, default=0)
    add("--test", nargs=argparse.REMAINDER, help="set up, then run the tests; what follows goes to pytest")
    return parser.parse_args(argv)


def main(argv):
    """Returns the exit code."""
    if sys.version_info[:2] < (3, 10):
        sys.stderr.write("\nerror: This is Python %d.%d, and Python >= 3.10 is needed. Install it from python.org or "
                         "from your system's packages, and start this with it: python3.12 quickstart.py\n"
                         % sys.version_info[:2])
        return 2
    from rfdetr.console import lasting_output  # standard library only too

    with lasting_output():
        try:
            args = parse(argv)
            code = set_up(argv)
            if code is None:
                os.chdir(HERE)
                code = run_job(args) if args.test is None else run(["-m", "pytest"] + args.test)
            return code or 0
        except Stop as stop:
            sys.stderr.write("\nerror: " + stop.args[1] + "\n")
            return stop.args[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
