"""Write a checkpoint in another program's format.

python export.py --checkpoint runs/detector_nano_384_1/best.pt --format rfdetr --out mydata.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rfdetr.console import UserError, run_script, tick, warn
from rfdetr.files import make_place
from rfdetr.weights import checkpoint
from rfdetr.weights.package import to_package


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a file of this repository")
    parser.add_argument(
        "--format", choices=["rfdetr"], default="rfdetr", help="rfdetr: the package on PyPI, 1.11"
    )
    parser.add_argument("--out", type=Path, required=True, help="where to write it")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.out.exists() and args.out.samefile(args.checkpoint):
        raise UserError(
            f"--out is --checkpoint ({args.out}): name another file, the input is never overwritten"
        )

    content = checkpoint.load(args.checkpoint)
    size = content["size"]["name"]
    if size == "tiny":
        raise UserError(
            f"{args.checkpoint} is of size tiny, which the package does not have: train an official size"
        )
    if content["mask_head"] not in (None, "official"):
        warn(
            f"the mask head ({content['mask_head']}) is not one of the package's: only the detector is written"
        )
    exported = to_package(content)
    make_place(args.out, "--out")
    checkpoint.save(args.out, exported)

    names = exported["args"].get("class_names")
    classes = f"{len(names)} classes ({', '.join(names)})" if names else "COCO's classes"
    tick(
        f"Written: {args.out}, {len(exported['model'])} tensors, {size}, {content['resolution']} px, {classes}"
    )
    path = str(args.out.resolve())  # the package takes a bare file name for one of its cache
    print(f"Load it with rfdetr 1.11:  rfdetr.{exported['model_name']}.from_checkpoint({path!r})")


if __name__ == "__main__":
    run_script(main)
