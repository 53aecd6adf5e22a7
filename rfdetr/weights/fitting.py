"""Which tensors of a file fit a model, and loading those."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from rfdetr.classes import ClassTable
from rfdetr.console import UserError
from rfdetr.models.detector import Detector
from rfdetr.sizes import ModelSize
from rfdetr.weights.official import GROUP, POSITIONS, from_official, groups_of, official_names

# class heads, learned queries and mask heads, which may differ between models of one size
ANY_SHAPE = (
    "class_embed.",
    "transformer.enc_o",
    "refpoint_embed.",
    "query_feat.",
    "mask_head.",
    "segmentation_head.",
)


def shape_differences(size: ModelSize, state: dict[str, Tensor]) -> list[str]:
    """Where `state` (our names) does not fit a detector of this size.

    Missing, unknown and misshapen tensors, one text each; those of ANY_SHAPE are not compared.
    """
    with torch.device("meta"):
        expected = Detector(size, rows=2, groups=1).state_dict()
    differences = []
    for name in sorted(expected.keys() | state.keys()):
        if name.startswith(ANY_SHAPE):
            continue
        wanted = tuple(expected[name].shape) if name in expected else "none"
        actual = tuple(state[name].shape) if name in state else "none"
        if wanted != actual:
            differences.append(f"{name}: expected {wanted}, file {actual}")
    return differences


def fit_class_head(
    own: Tensor, stored: Tensor, source_row: dict[int, int], source: ClassTable, table: ClassTable
) -> Tensor:
    """A new class head of `table`, from a file's head of `source`: weights (K, C) or biases (K,).

    own: the model's initial values. source_row: {row: row of the file that it is copied from}.
    A class that the file does not know begins at the mean of the rows that its classes have.
    Proposals are ranked by their highest row, and where every row is as often the highest as any
    other, their mean is its best linear stand-in: proposals are ranked about as the file ranks
    them, from the first step on. Rows of no class, background among them, stay at their prior: the
    initial bias, and no weight, so that they raise no proposal above another.
    """
    fitted = own.clone() if own.dim() == 1 else torch.zeros_like(own)
    mean = stored[list(source.rows)].mean(0)
    for row in table.rows:
        fitted[row] = mean
    for row, other in source_row.items():
        fitted[row] = stored[other]
    return fitted


@dataclass
class LoadReport:
    """What load_pretrained did with each tensor, under our names."""

    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)  # loaded after a change: which one
    excluded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # of another shape: which ones
    missing: list[str] = field(default_factory=list)  # in the model alone
    unexpected: list[str] = field(default_factory=list)  # in the file alone
    unmatched: list[str] = field(default_factory=list)  # globs that match nothing

    def summary(self) -> str:
        """A line of counts, then a line a kind with its names.

        Names that follow each other and begin with the same three parts are shown as one.
        """
        initial = len(self.excluded) + len(self.skipped) + len(self.missing)
        lines = [
            f"Pretrained weights: {len(self.loaded)} tensors loaded, {initial} left at their "
            "initial value"
        ]
        kinds = {
            "loaded after a change": self.adapted,
            "excluded": self.excluded,
            "skipped, another shape": self.skipped,
            "not in the file": self.missing,
            "only in the file, unused": self.unexpected,
            "patterns that match nothing": self.unmatched,
        }
        for kind, names in kinds.items():
            if names:
                lines.append(f"  {kind}, {len(names)}: {self._shown(names)}")
        return "\n".join(lines)

    def _shown(self, names: Iterable[str]) -> str:
        reasons = self.adapted | self.skipped
        shown = []
        for start, members in groupby(names, lambda name: ".".join(name.split(".")[:3])):
            first, *others = members
            text = f"{start}.* x{1 + len(others)}" if others else first
            if first in reasons:
                text += f" ({reasons[first]})"
            shown.append(text)
        return ", ".join(shown)


def load_pretrained(model: nn.Module, state: dict[str, Tensor], exclude: list[str]) -> LoadReport:
    """Copy into `model` every tensor of `state` that fits and that no glob of `exclude` names.

    `state` has official or our names. Globs are matched against both names of a tensor; one that
    names the query, key or value alone leaves out the fused qkv. Class heads with another number of
    rows do not fit: prepare them first.
    Raises UserError when nothing fits, which means another architecture.
    """
    stored = from_official(state)
    initial = model.state_dict()
    adapted = _adapt(stored, initial)
    report = LoadReport(missing=[name for name in initial if name not in stored])
    report.unmatched = list(exclude)
    chosen = {}
    for name, tensor in stored.items():
        matching = _matching(exclude, name)
        report.unmatched = [glob for glob in report.unmatched if glob not in matching]
        if name not in initial:
            report.unexpected.append(name)
        elif matching:
            report.excluded.append(name)
        elif tensor.shape != initial[name].shape:
            shape = tuple(initial[name].shape)
            report.skipped[name] = f"the file has {tuple(tensor.shape)}, the model {shape}"
        else:
            chosen[name] = tensor
    report.loaded = list(chosen)
    report.adapted = {name: change for name, change in adapted.items() if name in chosen}
    if not chosen and not report.excluded:
        names = ", ".join([*report.skipped, *report.unexpected][:3]) or "the file is empty"
        raise UserError(
            f"None of the {len(stored)} pretrained tensors fits this model ({names} ...): they are "
            "of another architecture. Give the --size they were made for, or "
            "--pretrain_weights none."
        )
    model.load_state_dict(initial | chosen)
    return report


def new_queries(known: Tensor, count: int) -> Tensor:
    """`count` more queries for each group: normal, with each channel's mean and deviation there.

    known (G, Q, C) -> (G, count, C). Random numbers are torch's own, which --seed decides.
    """
    mean = known.mean(1, keepdim=True)
    deviation = known.std(1, correction=0, keepdim=True)
    return mean + deviation * torch.randn(len(known), count, known.shape[2])


def _matching(globs: list[str], name: str) -> list[str]:
    """The globs that match one of a tensor's names."""
    names = [name, *official_names(name)]
    return [glob for glob in globs if any(fnmatchcase(n, glob) for n in names)]


def _adapt(stored: dict[str, Tensor], model: dict[str, Tensor]) -> dict[str, str]:
    """Change `stored` where files and models of one size may differ; returns {name: what was done}.

    Position grid: resampled. Query groups: the model's first groups take the file's first ones, the
    model's other groups keep their initial values. Queries beyond a group's: as `new_queries`.
    """
    adapted = {}
    groups = groups_of(stored)
    wanted_groups = groups_of(model)
    for name in ("refpoint_embed.weight", "query_feat.weight", POSITIONS):
        if name not in stored or name not in model:
            continue
        theirs = stored[name]
        ours = model[name]
        if theirs.shape == ours.shape or theirs.shape[-1] != ours.shape[-1]:
            continue
        if name == POSITIONS:  # (1, 1 + side^2, D)
            old = math.isqrt(theirs.shape[1] - 1)
            new = math.isqrt(ours.shape[1] - 1)
            stored[name] = resample_abs_pos_embed(theirs.float(), [new, new])
            adapted[name] = f"resampled from {old}x{old} to {new}x{new} patches, bicubic"
        elif groups and wanted_groups and len(theirs) % groups == 0:
            # queries are stored group by group, so a flat cut would mix them up
            theirs = theirs.unflatten(0, (groups, -1))  # (G, Q, C)
            ours = ours.clone().unflatten(0, (wanted_groups, -1))
            G = min(groups, wanted_groups)
            Q = min(theirs.shape[1], ours.shape[1])
            ours[:G, :Q] = theirs[:G, :Q]
            change = f"the first {G} of {groups} groups, {Q} of {theirs.shape[1]} queries of each"
            new = ours.shape[1] - Q
            if new:
                ours[:G, Q:] = new_queries(theirs[:G], new)
                change += f", {new} new ones drawn by their mean and deviation"
            stored[name] = ours.flatten(0, 1)
            adapted[name] = change
    for name in list(stored):
        match = GROUP.match(name)
        if match and int(match[1]) >= wanted_groups > 0:
            del stored[name]
    return adapted
