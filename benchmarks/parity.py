"""Is our detector the published one?  Compares it with PyPI's rfdetr 1.11, size by size, on the same weights.

python benchmarks/parity.py                       (makes runs/parity_env with the package first)
python benchmarks/parity.py --peer_python ENV/bin/python --sizes nano base
python benchmarks/parity.py --peer_python ENV/bin/python --record      (rewrites tests/fixtures/)

Weights, images and targets are hashes of their names and indices, so that both sides make them bit for bit without
passing files. Compared are the encoder's features, the projector's levels, logits and boxes of every decoder layer
and of the proposals, evaluating and training (13 groups), the matching, every loss, and the gradient of every
parameter. This file runs itself under the peer's Python (--as_peer), where `rfdetr` is the package.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import platform
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
OFFICIAL = ("nano", "small", "medium", "base", "large")
# size, resolution, with training: small inputs, other than the stored position grid, once fewer tokens than queries
RECORDED = [
    ("nano", 320, True),
    ("nano", 384, False),
    ("small", 192, False),
    ("medium", 320, False),
    ("base", 280, False),
    ("large", 168, False),
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
    return torch.from_numpy(x.astype(np.float32)).mul_(2 * 3**0.5 / 2**32).sub_(3**0.5).reshape(shape)


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
    return noise * (0.3 if "bbox_embed" in name and "layers.2" in name else 1) * (shape[0] / noise.numel()) ** 0.5


def made_up_batch(resolution: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images (B, 3, R, R) and per image rows (t,) and boxes (t, 4) cxcywh 0..1."""
    targets = []
    for image, count in enumerate(OBJECTS):
        noise = hashed(f"boxes {image}", (count, 4)) / math.sqrt(3)
        rows = (hashed(f"rows {image}", (count,)).abs() * 45).long() + 1
        targets.append({"rows": rows, "boxes": torch.cat((0.5 + 0.3 * noise[:, :2], 0.2 + 0.15 * noise[:, 2:]), dim=1)})
    return hashed("images", (len(OBJECTS), 3, resolution, resolution)), targets


def layout(shapes: dict[str, tuple[int, ...]]) -> str:
    """A digest of names and shapes."""
    return hashlib.sha256("".join(f"{n} {tuple(s)}\n" for n, s in sorted(shapes.items())).encode()).hexdigest()


def flat_predictions(prefix: str, outputs: dict) -> dict[str, Tensor]:
    layers = {"last": outputs} | {f"layer{i}": aux for i, aux in enumerate(outputs.get("aux_outputs", ()))}
    if "enc_outputs" in outputs:
        layers["proposals"] = outputs["enc_outputs"]
    return {
        f"{prefix} {kind}/{layer}": values[key].detach()
        for layer, values in layers.items()
        for kind, key in (("logits", "pred_logits"), ("boxes", "pred_boxes"))
    }


@contextmanager
def features_kept(encoder: torch.nn.Module, projector: torch.nn.Module, values: dict[str, Tensor]):
    """Put the feature maps of a forward pass into `values`."""

    def keep(prefix: str):
        return lambda module, inputs, maps: values.update({f"{prefix}/{i}": x for i, x in enumerate(maps)})

    hooks = [encoder.register_forward_hook(keep("encoder")), projector.register_forward_hook(keep("projector"))]
    yield
    for hook in hooks:
        hook.remove()


def as_peer(size: str, resolution: int, train: bool, out: Path) -> None:
    """Under the peer's Python: the package's own numbers, written to `out`."""
    from rfdetr import config
    from rfdetr.models import build_criterion_from_config, build_model_from_config
    from rfdetr.utilities.tensors import nested_tensor_from_tensor_list

    # a name for the weights keeps the builder from downloading DINOv2's; nothing reads the file
    name = f"RFDETR{size.capitalize()}{'Deprecated' if size == 'large' else ''}Config"
    model_config = getattr(config, name)(pretrain_weights="none.pth", device="cpu")
    train_config = config.TrainConfig(dataset_dir=".", output_dir=".")
    model = build_model_from_config(model_config, train_config)
    criterion, _ = build_criterion_from_config(model_config, train_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if tensor.numel()}
    model.load_state_dict({name: made_up(name, shape) for name, shape in shapes.items()}, strict=False)
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
        values |= {k: v for k, v in flat_predictions("eval", outputs).items() if k.endswith("/last")}
        values["order eval"] = order.pop()[None]
        if train:
            outputs = model.train()(nested_tensor_from_tensor_list(list(images)))
            values["order train"] = order.pop()
    if train:
        theirs = [{"labels": t["rows"], "boxes": t["boxes"]} for t in targets]
        losses = criterion.train()(outputs, theirs)
        losses = {name: losses[name] * weight for name, weight in criterion.weight_dict.items()}
        sum(losses.values()).backward()
        values |= flat_predictions("train", outputs)
        values |= {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        pairs = criterion.matcher(outputs, theirs, group_detr=model_config.group_detr)
        starts = [sum(OBJECTS[:i]) for i in range(len(OBJECTS))]
        pairs = [torch.stack((torch.full_like(q, i), q, obj + starts[i])) for i, (q, obj) in enumerate(pairs)]
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


def own_values(model, resolution: int, order: dict[str, Tensor], nudge: float = 0.0) -> dict[str, Tensor]:
    """Our numbers under the same names; `order` holds "order eval" and, to train as well, "order train"."""
    from rfdetr.losses.criterion import LossWeights, detection_losses

    images, targets = made_up_batch(resolution)
    images, agreement, values = images * (1 + nudge), [], {}
    backbone = model.eval().backbone[0]
    kept = features_kept(backbone.encoder["encoder"], backbone.projector, values)
    with torch.no_grad(), ranked_as(order["order eval"], agreement), kept:
        values |= flat_predictions("eval", model(images))
    if "order train" in order:
        model.train().zero_grad()
        with ranked_as(order["order train"], agreement):
            outputs = model(images)
        groups = model.transformer.groups
        losses, matches = detection_losses(outputs, targets, groups, sum(OBJECTS) * groups, LossWeights())
        sum(losses.values()).backward()
        values |= flat_predictions("train", outputs)
        their_names = {"class": "ce", "box": "bbox"}
        for name, loss in losses.items():
            kind, *layer = name.removeprefix("loss_").split("_")
            values["loss/" + "_".join(["loss", their_names.get(kind, kind), *layer])] = loss.detach()
        values |= {f"gradient/{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        values["matches"] = torch.stack(matches)
    values["order agreement"] = torch.tensor(min(agreement))
    return values


def build_own(size: str, shapes: dict[str, tuple[int, ...]]):
    """Our detector with the made-up weights, every official tensor loaded strictly."""
    from rfdetr.convert import from_official
    from rfdetr.models.detector import Detector
    from rfdetr.sizes import SIZES

    with torch.device("meta"):
        model = Detector(SIZES[size], rows=91)
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
    values = {name: sample(value, 256) if "/" in name else value.short() for name, value in dump["values"].items()}
    gradients = {name: projections(name, gradient) for name, gradient in dump["gradients"].items()}
    path.parent.mkdir(exist_ok=True)
    torch.save({"layout": layout(dump["shapes"]), "values": values, "gradients": gradients}, path)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB")


def peer_environment() -> str:
    folder = ROOT / "runs" / "parity_env"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "rfdetr==1.11.*"], check=True)
    return str(python)


def ask_peer(python: str, size: str, resolution: int, train: bool) -> dict:
    """The package's numbers; gradients under our names (a key's bias alone has none but rounding's: it is fused)."""
    from rfdetr.convert import from_official

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peer.pt"
        command = [python, "-W", "ignore", __file__, "--as_peer", size, str(resolution), str(int(train)), str(out)]
        subprocess.run(command, check=True, env=environment, cwd=folder)
        dump = torch.load(out, weights_only=True)
    return dump | {"gradients": {f"gradient/{n}": g for n, g in from_official(dump["gradients"]).items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", help="the Python of an environment with rfdetr==1.11.*")
    parser.add_argument("--sizes", nargs="+", choices=OFFICIAL, default=OFFICIAL)
    parser.add_argument("--record", action="store_true", help="write tests/fixtures/ instead of comparing")
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
            record(ask_peer(python, size, resolution, train), ROOT / "tests" / "fixtures" / f"{size}_{resolution}.pt")
        return
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, fp32", flush=True)
    for size in args.sizes:
        start, resolution = time.time(), SIZES[size].resolution
        dump = ask_peer(python, size, resolution, True)
        model, theirs = build_own(size, dump["shapes"]), dump["values"]
        ours = own_values(model, resolution, theirs)
        worst = compare(ours, theirs | dump["gradients"])
        # rounding decides the gradient of a sampling point on a cell's edge: how far does ours move by itself?
        noise = compare(own_values(model, resolution, theirs, nudge=1e-7), ours)["gradient"]
        print(f"\n{size}: {len(dump['shapes'])} tensors, {sum(p.numel() for p in model.parameters()):,} parameters")
        for kind, value in worst.items():
            print(
                f"  {kind:<13} {value:.1e}" + (f"  ours with images nudged: {noise:.1e}" if kind == "gradient" else "")
            )
        matched = "same" if same_matches(ours["matches"], theirs["matches"]) else "OTHER"
        print(f"  {matched} matches, proposals' order {ours['order agreement']:.2%} the same in the worst group")
        print(f"  {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
