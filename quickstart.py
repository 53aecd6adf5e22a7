"""Everything in one command: an environment, then the whole job from a dataset to masks.

    python quickstart.py                      on dataset/, or on generated demo data
    python quickstart.py --dataset DIR        on your own images
    python quickstart.py --test [PYTEST ...]  runs the tests instead

Standard library only, and no syntax that an old Python cannot parse: it tells it what is needed.
"""

import argparse
import glob
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REQUIREMENTS = os.path.join(HERE, "requirements.txt")
VENV = os.path.join(HERE, ".venv")

# Optimizer steps of stage 1 and of stage 2, whatever the number of images; the epochs follow from
# them. The tiny size starts from nothing; the demo data are easier than what microscopes see.
STEPS = {"demo": (800, 600), "tiny": (3600, 1200), "others": (1500, 1500)}
SEG_EVALUATIONS = 2  # of stage 2, whose epochs are shorter than a look at valid
FEWEST_EPOCHS = 2
MOST_EPOCHS = 100

# Flags that are handed on to the scripts.
DATA_FLAGS = ("dataset", "val_fraction", "exif", "rename")
MODEL_FLAGS = ("size", "device", "resolution", "gray")
NO_SETTINGS = ("config", "test")  # flags that a --config file cannot give

# Two processes share the tests; what follows --test comes later, and wins.
TESTS = ["-m", "pytest", "-n", "2", "--dist", "worksteal"]


class Stop(Exception):
    """Stop(code, paragraph) ends the program with that exit code and the paragraph on stderr."""


# ---------------------------------------------------------------- the environment


def set_up(argv):
    """Make sure of what requirements.txt asks for.

    Returns None where this Python has it. Otherwise runs the same command inside .venv, and returns
    its exit code.
    """
    from rfdetr.requirements import installed_and_missing  # standard library only, too

    missing = installed_and_missing(REQUIREMENTS)[1]
    if not missing:
        return None
    names = ", ".join(missing)
    print("This Python lacks %s. It gets them in %s; PyTorch is large." % (names, VENV))
    if os.path.realpath(sys.prefix) == os.path.realpath(VENV):
        install_requirements()
        return None
    python = python_of_venv()
    if not succeeds(python, "-m", "pip", "--version"):
        make_venv(python)
    return run([os.path.abspath(__file__)] + argv, python)  # which installs, and goes on


def install_requirements():
    """pip installs what is missing into the Python that runs this."""
    code = run(["-m", "pip", "install", "--disable-pip-version-check", "-r", REQUIREMENTS])
    if code:
        raise Stop(
            130 if code == 130 else 2,
            "pip could not install requirements.txt: see above; mostly the network, a full disk "
            "(%s) or a Python too new for PyTorch. Mend that and start this again." % free_disk(),
        )


def python_of_venv():
    """The path of .venv's Python, which may not be there yet."""
    if os.name == "nt":
        return os.path.join(VENV, "Scripts", "python.exe")
    return os.path.join(VENV, "bin", "python")


def make_venv(python):
    """Make .venv, or complete a half made one, so that `python`, which lies in it, has pip."""
    from importlib.util import find_spec

    is_venv = os.path.exists(os.path.join(VENV, "pyvenv.cfg"))
    if os.path.lexists(VENV) and not is_venv:
        message = "%s is in the way: it is no virtual environment. Move it and start this again."
        raise Stop(2, message % VENV)
    lacking = [module for module in ("venv", "ensurepip") if find_spec(module) is None]
    if lacking:
        message = (
            "This Python (%s) lacks %s, which virtual environments need. On Debian and Ubuntu: "
            "sudo apt install python3-venv. Then start this again."
        )
        raise Stop(2, message % (sys.executable, " and ".join(lacking)))
    command = ["-m", "venv", VENV]
    if not succeeds(python, "-c", ""):
        command.append("--clear")  # its Python has gone: nothing in it can be used any more
    code = run(command)
    if code:
        message = (
            "Making %s failed: see above; perhaps a full disk (%s). "
            "Mend that and start this again."
        )
        raise Stop(130 if code == 130 else 2, message % (VENV, free_disk()))


def free_disk():
    """The free disk where .venv lies, beside what PyTorch takes, in words."""
    free = shutil.disk_usage(HERE).free / 1e9
    return "%.1f GB free; PyTorch for CUDA takes 6" % free


# ---------------------------------------------------------------- commands


def shown(arguments, python=sys.executable):
    """`python ARGUMENTS` as one would type it in the current folder."""
    here = os.path.join(os.getcwd(), "")
    words = []
    for word in [python] + list(arguments):
        words.append(word[len(here) :] if word.startswith(here) else word)
    if os.name == "nt":
        return subprocess.list2cmdline(words)
    return " ".join(shlex.quote(word) for word in words)


def succeeds(python, *arguments):
    """Whether there is such a Python and `python ARGUMENTS` ends with 0; prints nothing."""
    if not os.path.exists(python):
        return False
    return subprocess.run((python,) + arguments, capture_output=True).returncode == 0


def run(arguments, python=sys.executable):
    """Show and run `python ARGUMENTS`; returns its exit code (128 + n for signal n)."""
    print("\n> " + shown(arguments, python) + "\n")
    sys.stdout.flush()
    interrupts = []
    children = []
    early = []  # signals from before there was one

    def terminate(*_):
        if children:
            children[0].terminate()
        else:
            early.append(1)

    # Ctrl-C reaches the child by itself, which saves its state: wait for it. SIGTERM reaches us
    # alone, and is handed on.
    former_interrupt = signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
    former_terminate = signal.signal(signal.SIGTERM, terminate)
    children.append(subprocess.Popen([python] + list(arguments)))
    if early:
        children[0].terminate()
    code = children[0].wait()
    signal.signal(signal.SIGINT, former_interrupt)
    signal.signal(signal.SIGTERM, former_terminate)
    if code and interrupts:
        return 130
    if code < 0:
        return 128 - code
    return code


# ---------------------------------------------------------------- the job


def run_job(args):
    """Run the scripts one after the other, each on what the ones before have made."""
    begin = time.time()
    if args.output_dir:
        require_no_run(args.output_dir)
    require_weights(args.pretrain_weights)
    job = Job(args)
    job.choose_dataset_and_size()
    checked = job.flags(*(DATA_FLAGS + MODEL_FLAGS + ("letterbox",))) + job.tile_flag()
    job.step("validate_setup.py", *(checked + ("--json", job.report)))
    job.count_images()
    detector, weights = job.train_detector()
    checkpoint = job.shrink(detector, weights)
    masks = job.train_masks(detector, checkpoint)
    job.evaluate(masks)
    pictures = os.path.join(masks, "found")
    job.step(*job.predict_command(masks, job.annotated_images(), pictures))
    print("\n" + "=" * 60)
    print("Done in %.0f s. Scores are those of the valid split:" % (time.time() - begin))
    for line in job.stands:
        print(line)
    print("Pictures: %s" % pictures)
    print("Your own images: %s" % shown(job.predict_command(masks, "IMAGES", "found")))


class Job(object):
    """What the steps share: the flags, where the runs go, and what has been made so far."""

    def __init__(self, args):
        self.args = args
        self.output_dir = args.output_dir or "runs"
        self.report = os.path.join(self.output_dir, "setup_check.json")
        self.stands = []  # one line for each finished training
        self.steps = None  # of stage 1 and of stage 2
        self.images = 0  # that there are to be trained on, or their tiles
        self.noun = "images" if args.tile in (None, "0") else "tiles"
        self.recipe = None  # the size's own numbers (rfdetr/sizes.py)

    def choose_dataset_and_size(self):
        """What the user named, or what is here: dataset/, else demo data; a GPU, or none."""
        args = self.args
        is_demo = not args.dataset and not os.path.isdir("dataset")
        if is_demo:
            args.size = args.size or "tiny"
            args.dataset = self.demo_data()
        args.dataset = args.dataset or "dataset"
        if not args.val_fraction:
            require_valid_split(args.dataset)
        args.size = args.size or default_size(args.device)
        if is_demo:
            self.steps = STEPS["demo"]
        else:
            self.steps = STEPS.get(args.size, STEPS["others"])

    def flags(self, *names):
        """Those of these flags that have been given, as words of a command."""
        words = []
        for name in names:
            value = getattr(self.args, name)
            if isinstance(value, list):
                words += ["--%s=%s" % (name, one) for one in value]
            elif value not in (None, "auto"):
                words += ["--" + name, str(value)]
        return tuple(words)

    def tile_flag(self):
        """Of stage 1 and of the checks; later steps find it in the checkpoint."""
        return ("--tile", self.args.tile) if self.args.tile else ()

    def step(self, *arguments):
        """Run a script; Stop with its exit code where it fails."""
        code = run(arguments)
        if code == 0:
            return
        script = " ".join(arguments).split(" --")[0]
        message = "%s ended with exit code %d: see its message above." % (script, code)
        if code > 128:
            message = "Stopped in %s. " % script
            if self.args.output_dir:
                message += "To begin the job anew: " + in_free_folder(self.args.output_dir)
            else:
                message += "The same command begins the job anew."
        for line in self.stands:
            message += "\nWhat stands: " + line
        raise Stop(code, message)

    def demo_data(self):
        """Generate the demo dataset, unless it is there; returns its folder."""
        folder = os.path.join(self.output_dir, "demo_data")
        last_file = os.path.join(folder, "valid", "_annotations.coco.json")
        if not os.path.exists(last_file):
            print("There is no dataset/ here: generating demo data.")
            self.step("-m", "rfdetr.data.demo", folder, "--seed", str(self.args.seed))
        return folder

    def count_images(self):
        """What the epochs follow from.  validate_setup.py has checked size and dataset."""
        from rfdetr.sizes import SIZES

        self.recipe = SIZES[self.args.size].recipe
        with open(self.report, encoding="utf-8") as file:
            self.images = json.load(file)["images_an_epoch"]

    def train_detector(self):
        """Stage 1; returns the run's folder and the weights that scored best there."""
        if not self.args.epochs:
            batch = self.recipe.batch * self.recipe.accum
            self.args.epochs = epochs_for(
                "Stage 1", self.steps[0], self.images, batch, self.recipe.min_steps, self.noun
            )
        own = self.flags("seed", "epochs", "letterbox", "pretrain_weights") + self.tile_flag()
        return self.train("train_detector_stage1.py", "detector", "the detector is", own)

    def shrink(self, detector, weights):
        """Cut the detector's head down to the dataset's classes; returns the new checkpoint."""
        trained = os.path.join(detector, "checkpoint_best_%s.pth" % weights)
        shrunk = os.path.join(detector, "checkpoint_mydata.pth")
        self.step("shrink_head.py", "--in_ckpt", trained, "--out_ckpt", shrunk)
        return shrunk

    def train_masks(self, detector, checkpoint):
        """Stage 2; returns the run's folder."""
        own = self.flags("seed") + ("--stage1_run", detector, "--checkpoint", checkpoint)
        epochs = self.args.seg_epochs
        if not epochs:
            batch = self.recipe.seg_batch * self.recipe.seg_accum
            epochs = epochs_for(
                "Stage 2", self.steps[1], self.images, batch, self.recipe.seg_min_steps, self.noun
            )
            own += ("--eval_every", str(math.ceil(epochs / SEG_EVALUATIONS)))
        own += ("--epochs", str(epochs))
        return self.train("train_seg_stage2.py", "segmentation", "the masks are", own)[0]

    def train(self, script, kind, what, own_flags):
        """Run a training script; returns its run's folder and the weights that scored best."""
        command = (script,) + self.flags(*(DATA_FLAGS + MODEL_FLAGS)) + own_flags
        if self.output_dir == "runs":  # the script numbers its runs
            runs = "runs/%s_*" % kind
            before = set(glob.glob(runs))
            self.step(*command)
            new = set(glob.glob(runs)) - before
            folder = os.path.normpath(max(new, key=os.path.getmtime))
        else:
            folder = os.path.join(self.output_dir, kind)
            self.step(*(command + ("--output_dir", folder)))
        text, weights = scores(folder)
        self.stands.append("%s trained, %s (%s)" % (what, os.path.join(folder, "best.pt"), text))
        return folder, weights

    def evaluate(self, masks):
        command = ("evaluate.py", "--checkpoint", os.path.join(masks, "best.pt"))
        command += self.flags("device", *DATA_FLAGS)
        self.step(*(command + ("--split", "valid", "--results", os.path.join(masks, "results"))))

    def predict_command(self, masks, images, output):
        command = ("predict.py", "--checkpoint", os.path.join(masks, "best.pt"))
        return command + self.flags("device") + ("--input", images, "--output", output)

    def annotated_images(self):
        """A folder of images to draw in: of the valid split where it has its own."""
        names = ("valid", "val2017", "train", "train2017")
        folders = [os.path.join(self.args.dataset, name) for name in names]
        folder = next(filter(os.path.isdir, folders), self.args.dataset)
        has_folders = any(entry.is_dir() for entry in os.scandir(folder))
        return os.path.join(folder, "**", "*") if has_folders else folder


def default_size(device):
    from rfdetr.sizes import usual_size

    if device == "auto":
        ask = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        has_gpu = succeeds(sys.executable, "-c", ask)
    else:
        has_gpu = device.startswith("cuda")
    return usual_size(has_gpu)


def epochs_for(stage, steps, images, images_per_step, min_steps, noun="images"):
    """Epochs of at least `min_steps` that make about `steps` optimizer steps; says why."""
    per_epoch = max(images // images_per_step, min_steps)  # a small dataset is repeated
    rounded_up = -(-steps // per_epoch)
    epochs = min(max(rounded_up, FEWEST_EPOCHS), MOST_EPOCHS)
    reason = "%d %s make %d steps an epoch, about %d are wanted"
    reason = reason % (images, noun, per_epoch, steps)
    print("\n%s: %d epochs (%s)" % (stage, epochs, reason))
    return epochs


def require_no_run(output_dir):
    """Stop where the folder for the job's runs is a run itself, or has another job's runs."""
    from pathlib import Path

    from rfdetr.runs.places import CONFIG, STATES, WEIGHTS, first_file  # standard library only

    files = WEIGHTS + STATES + (CONFIG,)
    holds = first_file(Path(output_dir), files)
    if holds:
        message = (
            "--output_dir %s is the folder of one run (it holds %s): detector/ and segmentation/ "
            "would lie inside it. In a folder of their own: %s"
        )
        raise Stop(2, message % (output_dir, holds.name, in_free_folder(output_dir)))
    for kind in ("detector", "segmentation"):
        folder = os.path.join(output_dir, kind)
        if os.path.isdir(folder) and os.listdir(folder):
            message = (
                "%s is not empty: an earlier job's run lies there, which its training script's "
                "--resume would go on with. To begin a job in a folder of its own: %s"
            )
            raise Stop(2, message % (folder, in_free_folder(output_dir)))


def require_weights(weights):
    """Stop where --pretrain_weights names a file that is missing, not after the checks."""
    from pathlib import Path

    from rfdetr.console import UserError  # standard library only, too, as those below
    from rfdetr.runs.places import find_checkpoint
    from rfdetr.text import is_url

    if weights in (None, "auto", "none") or is_url(weights):
        return
    try:
        find_checkpoint(Path(weights))
        return
    except UserError as error:
        reason = str(error)
    raise Stop(2, "--pretrain_weights %s: %s" % (weights, reason))


def in_free_folder(output_dir):
    """This command with another --output_dir, which does not exist."""
    from rfdetr.commands import without_flag  # standard library only, too, as those below
    from rfdetr.text import command_line

    number = 1
    free = os.path.normpath(output_dir) + "_job"
    while os.path.exists(free + str(number)):
        number += 1
    again = without_flag(sys.argv, "output_dir") + ["--output_dir", free + str(number)]
    return command_line("python", *again)


def require_valid_split(dataset):
    """Stop where a dataset has none, with the command that makes one."""
    from rfdetr.console import UserError
    from rfdetr.data.layout import find_splits, has_val_folder
    from rfdetr.text import command_line

    try:
        splits = find_splits(dataset)
    except UserError:
        return  # validate_setup.py says what there is instead of a dataset
    if "train" in splits and "valid" not in splits and not has_val_folder(dataset):
        again = command_line("python", *(sys.argv + ["--val_fraction", "0.1"]))
        message = "%s has no valid split. To take a tenth of train/ as one: %s"
        raise Stop(2, message % (dataset, again))


def scores(run_folder):
    """A run's best scores as text, and the weights that had them ("regular" or "ema")."""
    from rfdetr.runs.metrics_file import best_scores  # standard library only, too

    weights, valid = best_scores(run_folder)
    parts = []
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        table = valid.get(kind) or {}
        for key in ("mAP50", "mAP"):
            if table.get(key) is not None:
                parts.append("%s %s %.3f" % (name, key, table[key]))
    return ", ".join(parts) or "no scores", weights


# ---------------------------------------------------------------- the command line


def parse(argv):
    from rfdetr.cli import flag_type  # standard library only, too, as those below
    from rfdetr.parser import Parser
    from rfdetr.resolve import settings_of
    from rfdetr.settings import DetectorSettings
    from rfdetr.sizes import SIZES

    settings = settings_of(DetectorSettings)
    sizes = [name for name in SIZES if not name.startswith("seg-")]
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--dataset", type=from_here,
        help="folder with train/ and valid/ (default: dataset/, else demo data)")
    add("--size", type=flag_type(settings["size"]), choices=sizes, metavar="SIZE",
        help="tiny, nano, small, medium ... (default: nano on your data with a GPU, else tiny)")
    add("--epochs", type=flag_type(settings["epochs"]),
        help="of stage 1 (default: by the number of training images)")
    add("--seg_epochs", type=flag_type(settings["epochs"]), help="of stage 2 (likewise)")
    add("--resolution", type=int,
        help="side of the model's input in pixels (default: the size's own)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--output_dir", type=from_here,
        help="put detector/, segmentation/ and demo data there (default: runs/)")
    add("--pretrain_weights", type=from_here, help="auto, none, a file or a URL")
    add("--val_fraction", type=flag_type(settings["val_fraction"]),
        help="share of train/ to validate on, where there is no valid/")
    add("--gray", metavar="auto|full|PERCENT",
        help="what is black and white in gray of more than 8 bits (default: auto)")
    add("--exif", choices=("apply", "ignore"),
        help="orientation of images whose annotated size does not tell")
    add("--rename", nargs="+", action="extend", metavar="OLD=NEW",
        help="call classes otherwise: \"Date=date\" where valid says Date, train date")
    add("--tile", help="train on tiles of so many pixels of larger images; auto: by the objects")
    add("--letterbox", metavar="0|1",
        help="1: images keep their proportions, 0: they are resized to a square "
        "(default: 0)")
    add("--seed", type=int, default=0, help="of every random number (default: 0)")
    add("--config", metavar="FILE", help="these settings in YAML; flags win")
    add("--test", nargs=argparse.REMAINDER,
        help="set up, then run the tests; what follows goes to pytest")
    return parser.parse_args(argv)


def config_words(config, known):
    """The settings of a --config FILE.yaml as words of a command, which the user's own follow."""
    from pathlib import Path

    from rfdetr.cli import read_yaml  # needs what requirements.txt asks for
    from rfdetr.console import UserError
    from rfdetr.resolve import require_known

    try:
        content = read_yaml(Path(config))
        settings = [name for name in known if name not in NO_SETTINGS]
        require_known(content, settings, "--config " + config)
    except UserError as error:
        raise Stop(2, str(error))  # noqa: B904 (Python 2 cannot parse `from`)
    words = []
    for name, value in content.items():
        several = name == "rename" and isinstance(value, list)
        for one in value if several else [value]:
            if one is not None:
                words.append("--%s=%s" % (name, one))
    return words


def from_here(path):
    """A path as the scripts see it, which run in the repository's folder."""
    from rfdetr.text import EMPTY  # standard library only, too

    if not path:
        raise argparse.ArgumentTypeError("expected a path, got " + EMPTY)
    is_path = path not in ("auto", "none") and "://" not in path
    return os.path.abspath(path) if is_path and os.getcwd() != HERE else path


def main(argv):
    """Returns the exit code."""
    if sys.version_info[:2] < (3, 10):
        sys.stderr.write(
            "\nerror: This is Python %d.%d, and Python >= 3.10 is needed. Install it from "
            "python.org or from your system's packages, and start this with it: "
            "python3.12 quickstart.py\n" % sys.version_info[:2]
        )
        return 2
    from rfdetr.console import UserError  # standard library only, too
    from rfdetr.streams import lasting_output

    with lasting_output():
        try:
            return set_up_and_run(argv)
        except UserError as error:
            sys.stderr.write("error: %s\n" % error)
            return 2
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return 130
        except Stop as stop:
            was_asked = stop.args[0] in (130, 143)  # Ctrl-C, SIGTERM
            sys.stderr.write("\n" + ("" if was_asked else "error: ") + stop.args[1] + "\n")
            return stop.args[0]


def set_up_and_run(argv):
    """Returns the exit code."""
    args = parse(argv)
    code = set_up(argv)
    if code is not None:
        return code
    if args.config:
        args = parse(config_words(args.config, vars(args)) + argv)
    os.chdir(HERE)
    if args.test is not None:
        return run(TESTS + args.test)
    run_job(args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
