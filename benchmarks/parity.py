"""Is our detector the published one?  Compares it with PyPI's rfdetr 1.11, size by size, on the same weights.

python benchmarks/parity.py                       (makes runs/peer_env with the package first)
python benchmarks/parity.py --peer_python ENV/bin/python --sizes nano base
python benchmarks/parity.py --peer_python ENV/bin/python --record      (rewrites tests/fixtures/)

Weights, images, targets and the points that mask losses look at are hashes of their names and indices, so that both
sides make them bit for bit without passing files. Compared are the encoder's features, the projector's levels, logits,
boxes and masks of every decoder layer and of the proposals, evaluating and training (13 groups), post-processing, the
matching, every loss, and the gradient of every parameter. This file runs itself under the peer's Python (--as_peer),
where `rfdetr` is the package.  Exit code 1: a size is outside LIMIT.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
OFFICIAL = ("nano", "small", "medium", "base", "large", "large-2026")
OFFICIAL += tuple(
    f"seg-{size}" for size in ("nano", "small", "medium", "large", "xlarge", "2xlarge")
)
LIMIT = 1e-4  # of every figure, for gradients of the middle tensor
NOISE = 2  # the worst tensor's gradient: at most so many times what ours move when images are nudged by +-1e-7
ORIGINAL = (90, 120)  # height and width that post-processing goes back to
# size, resolution, with training: small inputs, other than the stored position grid, once fewer tokens than queries
RECORDED = [
    ("nano", 320, True),
    ("nano", 384, False),
    ("small", 192, False),
    ("medium", 320, False),
    ("base", 280, False),
    ("large", 168, False),
    ("large-2026", 192, False),
    ("seg-nano", 132, True),
    ("seg-small", 192, False),
    ("seg-2xlarge", 144, False),
]
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
OBJECTS = (6, 0)  # a batch of two, one image without objects


def hashed(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of mean 0 and variance 1 that depend on nothing but the name and the index."""
    x = np.arange(math.prod(shape), dtype=np.uint32)
    x *= np.uint32(0x9E3779B1)
    x += np.uint32(zlib.crc32(name.encode()))
    for _ in range(2):
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x45D9F3B)
    x ^= x >> np.uint32(16)
    return (
        torch.from_numpy(x.astype(np.float32)).mul_(2 * 3**0.5 / 2**32).sub_(3**0.5).reshape(shape)
    )


def made_up(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights for an official name, of sizes that keep activations sane and boxes moderate; nothing is 0 or 1."""
    noise = hashed(name, shape)
    if len(shape) == 1:
        scale = name.endswith((".weight", "lambda1"))
        return 1 + 0.2 * noise if scale else 0.1 * noise - (2 if "class_embed" in name else 0)
    if "embeddings." in name and "projection" not in name:
        return 0.5 * noise
    if name in ("refpoint_embed.weight", "query_feat.weight"):
        return noise * (0.3 if "refpoint" in name else 1)
    small = (
        0.3
        if "bbox_embed" in name and "layers.2" in name
        else 0.1
        if "query_features_proj" in name
        else 1
    )
    return noise * small * (shape[0] / noise.numel()) ** 0.5


def made_up_batch(resolution: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images (B, 3, R, R) and per image rows (t,), boxes (t, 4) cxcywh 0..1 and masks (t, R, R), ellipses in them."""
    targets = []
    for image, count in enumerate(OBJECTS):
        noise = hashed(f"boxes {image}", (count, 4)) / math.sqrt(3)
        rows = (hashed(f"rows {image}", (count,)).abs() * 45).long() + 1
        boxes = torch.cat((0.5 + 0.3 * noise[:, :2], 0.2 + 0.15 * noise[:, 2:]), dim=1)
        x, y, w, h = boxes.double()[..., None, None].unbind(1)
        axis = (torch.arange(resolution) + 0.5).double() / resolution
        masks = ((axis - x) / w) ** 2 + ((axis[:, None] - y) / h) ** 2 < 0.25
        has_mask = torch.ones(count, dtype=torch.bool)
        targets.append({"rows": rows, "boxes": boxes, "masks": masks, "has_mask": has_mask})
    return hashed("images", (len(OBJECTS), 3, resolution, resolution)), targets


def made_up_points(rows: int, *shape: int, device: torch.device | None = None) -> Tensor:
    """In place of torch.rand while losses are computed: the same numbers 0..1 in every row, whatever their order."""
    return (
        (hashed("points", (1, *shape)) / 12**0.5 + 0.5).clamp(0, 1).repeat(rows, *[1] * len(shape))
    )


def layout(shapes: dict[str, tuple[int, ...]]) -> str:
    """A digest of names and shapes."""
    return hashlib.sha256(
        "".join(f"{n} {tuple(s)}\n" for n, s in sorted(shapes.items())).encode()
    ).hexdigest()


def flat_predictions(prefix: str, outputs: dict) -> dict[str, Tensor]:
    layers = {"last": outputs} | {
        f"layer{i}": aux for i, aux in enumerate(outputs.get("aux_outputs", ()))
    }
    if "enc_outputs" in outputs:
        layers["proposals"] = outputs["enc_outputs"]
    return {
        f"{prefix} {kind}/{layer}": values[key].detach()
        for layer, values in layers.items()
        for kind, key in (
            ("logits", "pred_logits"),
            ("boxes", "pred_boxes"),
            ("masks", "pred_masks"),
        )
        if isinstance(
            values.get(key), Tensor
        )  # while training, masks are left as their two factors
    }


@contextmanager
def features_kept(encoder: torch.nn.Module, projector: torch.nn.Module, values: dict[str, Tensor]):
    """Put the feature maps of a forward pass into `values`."""

    def keep(prefix: str):
        return lambda module, inputs, maps: values.update(
            {f"{prefix}/{i}": x for i, x in enumerate(maps)}
        )

    hooks = [
        encoder.register_forward_hook(keep("encoder")),
        projector.register_forward_hook(keep("projector")),
    ]
    yield
    for hook in hooks:
        hook.remove()


def as_peer(size: str, resolution: int, train: bool, out: Path) -> None:
    """Under the peer's Python: the package's own numbers, written to `out`."""
    from rfdetr import config
    from rfdetr.models import build_criterion_from_config, build_model_from_config
    from rfdetr.utilities.tensors import nested_tensor_from_tensor_list

    name = {"large": "LargeDeprecated", "large-2026": "Large"}.get(
        size, size.replace("-", "")
    ).lower()
    configs = {key.lower(): value for key, value in vars(config).items()}
    # a name for the weights keeps the builder from downloading DINOv2's; nothing reads the file
    model_config = configs[f"rfdetr{name}config"](pretrain_weights="none.pth", device="cpu")
    train_config = (
        config.SegmentationTrainConfig if model_config.segmentation_head else config.TrainConfig
    )
    train_config = train_config(dataset_dir=".", output_dir=".")
    model = build_model_from_config(model_config, train_config)
    criterion, postprocess = build_criterion_from_config(model_config, train_config)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if tensor.numel()
    }
    model.load_state_dict(
        model.state_dict() | {name: made_up(name, shape) for name, shape in shapes.items()}
    )
    images, targets = made_up_batch(resolution)
    values, gradients, order, topk = {}, {}, [], torch.topk

    def recording(*args, **kwargs):
        found = topk(*args, **kwargs)
        order.append(found[1])
        return found

    with mock.patch.object(torch, "topk", recording):
        backbone = model.eval().backbone[0]
        with torch.no_grad(), features_kept(backbone.encoder, backbone.projector, values):
            outputs = model(nested_tensor_from_tensor_list(list(images)))
        values |= {
            k: v for k, v in flat_predictions("eval", outputs).items() if k.endswith("/last")
        }
        values["order eval"] = order.pop()[None]
        found = postprocess(outputs, torch.tensor([ORIGINAL] * len(images)))
        values |= {f"found {key}": torch.stack([one[key] for one in found]) for key in found[0]}
        if train:
            outputs = model.train()(nested_tensor_from_tensor_list(list(images)))
            values["order train"] = order.pop()
    if train:
        keys = {"labels": "rows", "boxes": "boxes"} | (
            {"masks": "masks"} if model_config.segmentation_head else {}
        )
        theirs = [{key: target[ours] for key, ours in keys.items()} for target in targets]
        with mock.patch.object(torch, "rand", made_up_points):
            losses = criterion.train()(outputs, theirs)
            pairs = criterion.matcher(outputs, theirs, group_detr=model_config.group_detr)
        losses = {name: losses[name] * weight for name, weight in criterion.weight_dict.items()}
        sum(losses.values()).backward()
        values |= flat_predictions("train", outputs)
        values |= {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        starts = [sum(OBJECTS[:i]) for i in range(len(OBJECTS))]
        pairs = [
            torch.stack((torch.full_like(q, i), q, obj + starts[i]))
            for i, (q, obj) in enumerate(pairs)
        ]
        values["matches"] = torch.cat(pairs, dim=1)
    torch.save({"shapes": shapes, "values": values, "gradients": gradients}, out)


@contextmanager
def ranked_as(order: Tensor, agreement: list[float]):
    """Let every group rank its proposals in the recorded `order` (G, B, Q).

    Rounding swaps near-equal scores, and then queries meet other proposals and nothing can be compared. `agreement`
    receives the share of places where our own order is the same.
    """
    topk, groups = Tensor.topk, iter(order.long())

    def replay(scores: Tensor, k: int, dim: int) -> SimpleNamespace:
        theirs = next(groups)
        agreement.append((topk(scores, k, dim=dim).indices == theirs).float().mean().item())
        return SimpleNamespace(indices=theirs)

    with mock.patch.object(Tensor, "topk", replay):
        yield


def own_values(
    model, resolution: int, order: dict[str, Tensor], nudge: float = 0.0
) -> dict[str, Tensor]:
    """Our numbers under the same names; `order` holds "order eval" and, to train as well, "order train"."""
    from rfdetr.losses.criterion import detection_losses
    from rfdetr.sizes import LossWeights

    images, targets = made_up_batch(resolution)
    images, agreement, values = images * (1 + nudge), [], {}
    backbone = model.eval().backbone[0]
    kept = features_kept(backbone.encoder["encoder"], backbone.projector, values)
    with torch.no_grad(), ranked_as(order["order eval"], agreement), kept:
        outputs = model(images)
    with torch.no_grad():
        if model.head is not None:
            pixels, kernels = (
                model.head.pixels(outputs["features"], images),
                model.head.kernels(outputs["queries"]),
            )
            outputs["pred_masks"] = (
                torch.einsum("bchw,bqc->bqhw", pixels, kernels) + model.head.bias
            )
        values |= flat_predictions("eval", outputs) | own_found(model, outputs, images, order)
    if "order train" in order:
        model.train().zero_grad()
        with ranked_as(order["order train"], agreement):
            outputs = model(images)
        groups = model.transformer.groups
        recipe = model.size.recipe
        weights = LossWeights(mask=recipe.single_mask_loss_coef, dice=recipe.single_dice_loss_coef)
        with mock.patch.object(torch, "rand", made_up_points):
            losses, matches = detection_losses(
                outputs, targets, groups, sum(OBJECTS) * groups, weights
            )
        sum(losses.values()).backward()
        values |= flat_predictions("train", outputs)
        their_names = {"class": "ce", "box": "bbox", "mask": "mask_ce", "dice": "mask_dice"}
        for name, loss in losses.items():
            kind, *layer = name.removeprefix("loss_").split("_")
            values["loss/" + "_".join(["loss", their_names.get(kind, kind), *layer])] = (
                loss.detach()
            )
        values |= {
            f"gradient/{n}": p.grad for n, p in model.named_parameters() if p.grad is not None
        }
        values["matches"] = torch.stack(matches)
    values["order agreement"] = torch.tensor(min(agreement))
    return values


def own_found(model, outputs: dict, images: Tensor, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our post-processing, of their logits and boxes where these are whole, so that rounding changes no order."""
    from rfdetr.inference.detections import Detections
    from rfdetr.models.detector import select_detections
    from rfdetr.placement import Placement

    names = {"pred_logits": "eval logits/last", "pred_boxes": "eval boxes/last"}
    whole = {
        key: theirs[name] for key, name in names.items() if theirs[name].shape == outputs[key].shape
    }
    scores, labels, boxes, queries = select_detections(
        outputs | whole, torch.arange(91), model.size.select
    )
    found = {"found scores": scores, "found labels": labels}
    placement = Placement.resized(*ORIGINAL)
    detections = Detections(
        indices=list(range(len(images))),
        placements=[placement] * len(images),
        scores=scores,
        labels=labels,
        boxes=boxes,
        queries=queries,
        features=outputs["features"],
        images=images,
    )
    pixel_boxes = [detections.boxes_in_original(i) for i in range(len(images))]
    found["found boxes"] = torch.from_numpy(np.stack(pixel_boxes))
    if model.head is not None:
        pixels = model.head.pixels(outputs["features"], images)
        parts = zip(pixels, outputs["queries"], queries, boxes)
        masks = [
            list(model.head.paste(p, own[chosen], box, placement)) for p, own, chosen, box in parts
        ]
        found["found masks"] = torch.stack(
            [torch.stack([mask for _, _, mask in one]) for one in masks]
        )[:, :, None]
    return found


def build_own(size: str, shapes: dict[str, tuple[int, ...]]):
    """Our detector with the made-up weights, every official tensor loaded strictly."""
    from rfdetr.models.detector import Detector
    from rfdetr.sizes import SIZES
    from rfdetr.weights.official import from_official

    with torch.device("meta"):
        masks = SIZES[size].mask_head == "official"
        model = Detector(SIZES[size], rows=91, mask_head="official" if masks else None)
    state = from_official({name: made_up(name, shape) for name, shape in shapes.items()})
    model.load_state_dict(state, assign=True)
    return model


def error(name: str, ours: Tensor, theirs: Tensor) -> float:
    """Gradients: the distance relative to the norm; else the largest difference relative to the largest value."""
    if name.startswith("gradient/"):
        return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The worst error of every kind of value (the name before the slash).  Raises KeyError for one that we lack."""
    worst: dict[str, float] = {}
    for name, value in theirs.items():
        if "/" in name:
            kind = name.split("/")[0]
            worst[kind] = max(worst.get(kind, 0.0), error(name, ours[name], value))
    return worst


def same_matches(ours: Tensor, theirs: Tensor) -> bool:
    """(3, n) each: image, query, object, in any order."""
    return set(map(tuple, ours.T.tolist())) == set(map(tuple, theirs.T.tolist()))


def sample(value: Tensor, count: int) -> Tensor:
    """`count` entries spread over the tensor, for a recording that stays small; scalars stay scalars."""
    return value.flatten()[:: max(1, value.numel() // count)][:count].clone()


def projections(name: str, gradient: Tensor) -> list[float]:
    """The norm of a gradient, and its product with a made-up direction of length 1: every entry counts."""
    direction = hashed(name, tuple(gradient.shape))
    return [gradient.norm().item(), ((gradient * direction).sum() / direction.norm()).item()]


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
    """Compare a size at full scale and print its row; False where something lies outside the limits."""
    from rfdetr.weights.official import to_official

    start, model, theirs = time.time(), build_own(size, dump["shapes"]), dump["values"]
    used = dump["shapes"].keys() & to_official(model.state_dict()).keys()
    ours = own_values(model, model.size.resolution, theirs)
    worst = compare(ours, theirs | dump["gradients"])
    middle = statistics.median(
        error(name, ours[name], gradient) for name, gradient in dump["gradients"].items()
    )
    # rounding decides the gradient of a sampling point on a cell's edge: how far does ours move by itself?
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


def peer_environment() -> str:
    folder = ROOT / "runs" / "peer_env"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "rfdetr[train]==1.11.*"], check=True
        )
    return str(python)


def ask_peer(python: str, size: str, resolution: int, train: bool) -> dict:
    """The package's numbers; gradients under our names (a key's bias alone has none but rounding's: it is fused)."""
    from rfdetr.weights.official import from_official

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peer.pt"
        command = [
            python,
            "-W",
            "ignore",
            __file__,
            "--as_peer",
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
    parser.add_argument("--as_peer", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_peer:
        size, resolution, train, out = args.as_peer
        as_peer(size, int(resolution), train == "1", Path(out))
        return
    sys.path.insert(0, str(ROOT))
    from rfdetr.sizes import SIZES

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
