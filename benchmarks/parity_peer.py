"""The package's own numbers on made-up weights; parity.py runs this file under the peer's Python.

python benchmarks/parity_peer.py SIZE RESOLUTION 0|1 OUT
"""

# ruff: noqa: E402 (the repository is put on the path, behind the peer's own rfdetr)

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch

from rfdetr import config
from rfdetr.models import build_criterion_from_config, build_model_from_config
from rfdetr.utilities.tensors import nested_tensor_from_tensor_list
from testkit.made_up import (
    OBJECTS,
    ORIGINAL,
    features_kept,
    flat_predictions,
    made_up,
    made_up_batch,
    made_up_points,
)


def write_values(size: str, resolution: int, train: bool, out: Path) -> None:
    """The package's values and gradients, written to `out`."""
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
    values = {}
    gradients = {}
    order = []
    topk = torch.topk

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


if __name__ == "__main__":
    size, resolution, train, out = sys.argv[1:]
    write_values(size, int(resolution), train == "1", Path(out))
