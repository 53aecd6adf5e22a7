"""Which tensors of a file fit a model, and loading those."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from rfdetr.console import UserError
from rfdetr.models.detector import Detector
from rfdetr.sizes import ModelSize
from rfdetr.weights.official import GROUP, POSITIONS, from_official, groups_of, official_names


def shape_differences(size: ModelSize, state: dict[str, Tensor]) -> list[str]:
    """Where `state` (our names) does not fit a detector of this size: missing, unknown or misshapen tensors.

    Class heads and learned queries may have any number of rows.
    """
    with torch.device("meta"):
        expected = Detector(size, rows=2, groups=1).state_dict()
    free = (
        "class_embed.",
        "transformer.enc_o",
        "refpoint_embed.",
        "query_feat.",
        "mask_head.",
        "segmentation_head.",
    )
    differences = []
    for name in sorted(expected.keys() | state.keys()):
        if name.startswith(free):
            continue
        a, b = expected.get(name), state.get(name)
        if a is None or b is None or a.shape != b.shape:
            shapes = [tuple(t.shape) if t is not None else "none" for t in (a, b)]
            differences.append(f"{name}: expected {shapes[0]}, file {shapes[1]}")
    return differences


@dataclass
class LoadReport:
    """What load_pretrained did with each tensor, under our names.

    `adapted` (loaded after a change) and `skipped` say why; `missing` are the model's tensors that the file has not,
    `unexpected` the file's that the model has not, `unmatched` the globs that met nothing.
    """

    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A line of counts, then a line a kind with its names, cut to three parts where several begin alike."""
        initial = len(self.excluded) + len(self.skipped) + len(self.missing)
        lines = [
            f"Pretrained weights: {len(self.loaded)} tensors loaded, {initial} left at their initial value"
        ]
        reasons = self.adapted | self.skipped
        for text, names in (
            ("loaded after a change", self.adapted),
            ("excluded", self.excluded),
            ("skipped, another shape", self.skipped),
            ("not in the file", self.missing),
            ("only in the file, unused", self.unexpected),
            ("patterns that match nothing", self.unmatched),
        ):
            shown = []
            for start, members in groupby(names, lambda name: ".".join(name.split(".")[:3])):
                first, *rest = members
                shown.append(f"{start}.* x{1 + len(rest)}" if rest else first)
                shown[-1] += f" ({reasons[first]})" if first in reasons else ""
            if shown:
                lines.append(f"  {text}, {len(names)}: {', '.join(shown)}")
        return "\n".join(lines)


def load_pretrained(model: nn.Module, state: dict[str, Tensor], exclude: list[str]) -> LoadReport:
    """Copy into `model` every tensor of `state` (official or our names) that fits and that no glob of `exclude` names.

    Globs are matched against both names of a tensor; one that names the query, key or value alone leaves out the
    fused qkv. Class heads with another number of rows do not fit: prepare them first.
    Raises UserError when nothing fits, which means another architecture.
    """
    file, initial = from_official(state), model.state_dict()
    adapted = _adapt(file, initial)
    report = LoadReport(missing=[name for name in initial if name not in file])
    used, chosen = set(), {}
    for name, tensor in file.items():
        names = [name, *official_names(name)]
        hits = {pattern for pattern in exclude if any(fnmatchcase(n, pattern) for n in names)}
        used |= hits
        if name not in initial:
            report.unexpected.append(name)
        elif hits:
            report.excluded.append(name)
        elif tensor.shape != initial[name].shape:
            report.skipped[name] = (
                f"the file has {tuple(tensor.shape)}, the model {tuple(initial[name].shape)}"
            )
        else:
            chosen[name] = tensor
    report.loaded = list(chosen)
    report.adapted = {name: how for name, how in adapted.items() if name in chosen}
    report.unmatched = [pattern for pattern in exclude if pattern not in used]
    if not chosen and not report.excluded:
        names = ", ".join([*report.skipped, *report.unexpected][:3]) or "the file is empty"
        raise UserError(
            f"None of the {len(file)} pretrained tensors fits this model ({names} ...): they are of another "
            "architecture. Give the --size they were made for, or --pretrain_weights none."
        )
    model.load_state_dict(initial | chosen)
    return report


def _adapt(file: dict[str, Tensor], model: dict[str, Tensor]) -> dict[str, str]:
    """Change in place what may differ between a file and a model of one size; returns {name: what was done}.

    Query groups: the model's groups take the file's first ones (further groups of the model keep their initial
    values). Queries are stored group by group, so a flat cut would mix them up. Position grid: resampled.
    """
    adapted = {}
    groups, wanted = groups_of(file), groups_of(model)
    for name in ("refpoint_embed.weight", "query_feat.weight", POSITIONS):
        theirs, ours = file.get(name), model.get(name)
        if (
            theirs is None
            or ours is None
            or theirs.shape == ours.shape
            or theirs.shape[-1] != ours.shape[-1]
        ):
            continue
        if name == POSITIONS:
            old, new = (math.isqrt(tensor.shape[1] - 1) for tensor in (theirs, ours))
            file[name] = resample_abs_pos_embed(theirs.float(), [new, new])
            adapted[name] = f"resampled from {old}x{old} to {new}x{new} patches, bicubic"
        elif groups and wanted and len(theirs) % groups == 0:
            theirs, ours = (
                theirs.unflatten(0, (groups, -1)),
                ours.clone().unflatten(0, (wanted, -1)),
            )
            g, q = min(groups, wanted), min(theirs.shape[1], ours.shape[1])
            ours[:g, :q] = theirs[:g, :q]
            file[name] = ours.flatten(0, 1)
            adapted[name] = (
                f"the first {g} of {groups} groups, {q} of {theirs.shape[1]} queries of each"
            )
    for name in [name for name in file if (m := GROUP.match(name)) and int(m[1]) >= wanted > 0]:
        del file[name]
    return adapted
