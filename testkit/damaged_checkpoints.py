"""Damaged and hostile checkpoint files."""

from __future__ import annotations

import io
import math
import pickle
import random
import zipfile

import numpy as np
import torch

from testkit.damage import VALUES, damage_bytes, damage_values


class Trap:
    """A pickle that would write a file if it were run."""

    def __reduce__(self):
        return open, ("pwned", "w")


def tensor_values(rng: random.Random) -> list:
    """What may stand in the place of a checkpoint's tensor."""
    return [
        torch.full((3,), math.nan),
        torch.zeros(0),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(1).expand(10**9),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, dtype=torch.complex64),
        [1.0],
        3.0,
        torch.zeros(4, dtype=torch.float64),
        torch.tensor(1.0),
        torch.zeros(2, 3, device="meta"),
        "x",
        None,
    ]


def damage_tensors(rng: random.Random, state: dict) -> None:
    """Change some of a state dict's tensors, in place: values, kinds, shapes, names."""
    for name in rng.sample(sorted(state), min(len(state), rng.choice([1, 1, 3, len(state)]))):
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            continue
        way = rng.randrange(9)
        if way == 0:
            state[name] = torch.full_like(tensor, rng.choice([math.nan, math.inf, 1e38, 0.0]))
        elif way == 1:
            state[name] = rng.choice(tensor_values(rng))
        elif way == 2:
            state[name] = tensor.to(
                rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool])
            )
        elif way == 3:
            state[name] = tensor[: len(tensor) // 2] if tensor.dim() else tensor[None]
        elif way == 4:
            state[name] = (
                tensor.flatten()
                if rng.random() < 0.5
                else tensor.mT
                if tensor.dim() > 1
                else tensor[None]
            )
        elif way == 5:
            state[name] = torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)
        elif way == 6:
            del state[name]
        elif way == 7:
            state[rng.choice(["", "x", name + ".weight", "class_embed.3.bias", "a" * 5000])] = (
                state.pop(name)
            )
        else:
            state[name] = tensor * rng.choice([1e30, -1e5, 1e-40])


def damaged_checkpoint(rng: random.Random, raw: bytes, content: dict) -> bytes:
    """The bytes of a damaged checkpoint file; `raw`: the sound file, `content`: what is in it."""
    way = rng.randrange(10)
    out = io.BytesIO()
    if way < 2:
        return damage_bytes(rng, raw)
    if way == 2:
        harm = rng.choice(
            [
                Trap(),
                {"model": Trap()},
                {"model": {"a": np.zeros(3)}},
                [1],
                "x",
                {1: 2},
                {"model": {}},
                None,
            ]
        )
        protocol = rng.randrange(6)
        harmful = rng.random() < 0.5
        if harmful:
            return pickle.dumps(harm, protocol)
        torch.save(harm, out, _use_new_zipfile_serialization=rng.random() < 0.5)
        return out.getvalue()
    if way == 3:
        with zipfile.ZipFile(
            out, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        ) as archive:
            for member in rng.choice(
                [
                    ["x.txt"],
                    ["a/data.pkl"],
                    ["a/data.pkl", "a/version", "a/data/0"],
                    ["../../x"],
                    [],
                ]
            ):
                archive.writestr(
                    member,
                    rng.choice([b"", pickle.dumps({"model": {}}, 2), b"3\n", rng.randbytes(99)]),
                )
        return out.getvalue()
    content = copy_of(content)
    table = next(key for key in ("model", "state_dict") if key in content)
    if way < 7:
        tables = {key: value for key, value in content.items() if key != table}
        values = [*VALUES, *tensor_values(rng)[:-3]]
        if tables and way < 6:
            damage_values(rng, tables, values)
            content = {table: content[table], **tables} if rng.random() < 0.95 else tables
        else:
            content[table] = rng.choice(
                [rng.choice(values), {}, {"x": torch.zeros(2)}, dict.fromkeys(content[table])]
            )
    else:
        damage_tensors(rng, content[table])
    torch.save(content, out, _use_new_zipfile_serialization=rng.random() < 0.9)
    return out.getvalue()


def copy_of(value):
    """Nested dicts and lists anew, with the same tensors."""
    if isinstance(value, dict):
        return {key: copy_of(inner) for key, inner in value.items()}
    return [copy_of(inner) for inner in value] if isinstance(value, (list, tuple)) else value
