"""Is our detector the published one?  Compares it with PyPI's rfdetr 1.11 on the same weights.

python benchmarks/parity.py                       (makes runs/peer_env with the package first)
python benchmarks/parity.py --peer_python ENV/bin/python --sizes nano base
python benchmarks/parity.py --peer_python ENV/bin/python --record      (rewrites tests/fixtures/)

Weights, images, targets and the points that mask losses look at are hashes of their names and
indices, so that both sides make them bit for bit without passing files. Compared are the encoder's
features, the projector's levels, logits, boxes and masks of every decoder layer and of the
proposals, evaluating and training (13 groups), post-processing, the matching, every loss, and the
gradient of every parameter. parity_peer.py runs under the peer's Python, where `rfdetr` is the
package.  Exit code 1: a size is outside LIMIT.
"""

# ruff: noqa: E402 (the repository is put on the path first)
from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peer import OFFICIAL, ROOT, peer_environment

from rfdetr.sizes import SIZES
from rfdetr.weights.official import from_official, to_official
from testkit.made_up import layout
from testkit.official import (
    RECORDED,
    build_own,
    compare,
    error,
    own_values,
    projections,
    same_matches,
    sample,
)

LIMIT = 1e-4  # of every figure, for gradients of the middle tensor
# the worst tensor's gradient: at most so many times what ours move when images are nudged by 1e-7
NOISE = 2
COLUMNS = [
    "size",
    "tensors used / in the file",
    "features",
    "logits",
    "boxes",
    "masks",
    "losses",
    "gradients",
]
COLUMNS += [
    "ours, nudged",
    "middle gradient",
    "matches",
    "labels found",
    "found",
    "proposals' order",
    "time",
    "limits",
]


def record(dump: dict, path: Path) -> None:
    """Keep of the peer's numbers what the tests compare; loads with torch's safe loading."""
    values = dump["values"]
    if "found masks" in values:
        values["found area"] = values.pop("found masks").sum((-3, -2, -1))
    values = {
        name: value.short() if not value.is_floating_point() else sample(value, 256)
        for name, value in values.items()
    }
    gradients = {name: projections(name, gradient) for name, gradient in dump["gradients"].items()}
    path.parent.mkdir(exist_ok=True)
    torch.save({"layout": layout(dump["shapes"]), "values": values, "gradients": gradients}, path)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB")


def check(size: str, dump: dict) -> bool:
    """Compare a size at full scale and print its row; False where it is outside the limits."""
    start = time.time()
    model = build_own(size, dump["shapes"])
    theirs = dump["values"]
    used = dump["shapes"].keys() & to_official(model.state_dict()).keys()
    ours = own_values(model, model.size.resolution, theirs)
    worst = compare(ours, theirs | dump["gradients"])
    middle = statistics.median(
        error(name, ours[name], gradient) for name, gradient in dump["gradients"].items()
    )
    # rounding decides the gradient of a sampling point on a cell's edge: how far do ours move?
    moved = (own_values(model, model.size.resolution, theirs, nudge) for nudge in (1e-7, -1e-7))
    noise = max(compare(values, ours)["gradient"] for values in moved)
    found = [error(key, ours[key], theirs[key]) for key in ("found scores", "found boxes")]
    if "found masks" in theirs:
        found.append((ours["found masks"] != theirs["found masks"]).float().mean().item())
    same = [
        same_matches(ours["matches"], theirs["matches"]),
        torch.equal(ours["found labels"], theirs["found labels"]),
    ]
    limited = [value for kind, value in worst.items() if kind != "gradient"] + found + [middle]
    good = used == dump["shapes"].keys() and all(same) and all(value <= LIMIT for value in limited)
    good &= worst["gradient"] <= max(LIMIT, NOISE * noise)
    kinds = [
        ("encoder", "projector"),
        ("eval logits", "train logits"),
        ("eval boxes", "train boxes"),
        ("eval masks",),
    ]
    kinds += [("loss",), ("gradient",)]
    values = [
        max((worst[kind] for kind in group if kind in worst), default=None) for group in kinds
    ]
    cells = [
        size,
        f"{len(used)} / {len(dump['shapes'])}",
        *values,
        noise,
        middle,
        *same,
        max(found),
    ]
    cells += [
        f"{ours['order agreement']:.2%}",
        f"{time.time() - start:.0f} s",
        "within" if good else "OUTSIDE",
    ]
    shown = [
        "-" if c is None else "same" if c is True else f"{c:.1e}" if isinstance(c, float) else c
        for c in cells
    ]
    print("| " + " | ".join(map(str, shown)) + " |", flush=True)
    return good


def ask_peer(python: str, size: str, resolution: int, train: bool) -> dict:
    """The package's numbers, gradients under our names.

    A key's bias has no gradient of its own but rounding's: it is fused.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peer.pt"
        command = [
            python,
            "-W",
            "ignore",
            str(ROOT / "benchmarks/parity_peer.py"),
            size,
            str(resolution),
            str(int(train)),
            str(out),
        ]
        subprocess.run(command, check=True, env=environment, cwd=folder)
        dump = torch.load(out, weights_only=True)
    return dump | {
        "gradients": {f"gradient/{n}": g for n, g in from_official(dump["gradients"]).items()}
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer_python", help="the Python of an environment with rfdetr==1.11.*")
    parser.add_argument("--sizes", nargs="+", choices=OFFICIAL, default=OFFICIAL)
    parser.add_argument(
        "--record", action="store_true", help="write tests/fixtures/ instead of comparing"
    )
    args = parser.parse_args()
    python = args.peer_python or peer_environment()
    if args.record:
        for size, resolution, train in RECORDED:
            record(
                ask_peer(python, size, resolution, train),
                ROOT / "tests" / "fixtures" / f"{size}_{resolution}.pt",
            )
        return
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, fp32"
    )
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    good = [
        check(size, ask_peer(python, size, SIZES[size].resolution, True)) for size in args.sizes
    ]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
