"""A CPU's inference in bf16 with weights that are cast once.

Autocast casts them at every call: it keeps casts for one call alone, and none of weights that are
frozen or read in inference mode.
"""

from __future__ import annotations

import copy
from itertools import zip_longest
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# modules whose parameters all go into operations that autocast runs in the lower precision
CAST = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)


class CastWeights:
    """Copies of models for inference under autocast, with the weights in `dtype` that autocast
    would cast: results are the same bit for bit.

    The models stay as they are, and are what is trained and saved. A copy shares all that it does
    not cast, and follows weights that have changed as far as torch counts it. A fused optimizer's
    steps are not counted: after them, `forget`.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._copies: WeakKeyDictionary[nn.Module, CastCopy] = WeakKeyDictionary()

    def of(self, model: nn.Module) -> nn.Module:
        """The copy of a model, in eval mode; the model itself where parts of it are compiled."""
        kept = self._copies.get(model)
        if kept is None or not kept.is_of(model):
            if any(module._compiled_call_impl is not None for module in model.modules()):
                return model
            kept = CastCopy(model, self.dtype)
            self._copies[model] = kept
        kept.follow()
        return kept.model

    def forget(self) -> None:
        """Cast all weights anew when they are needed next."""
        for kept in self._copies.values():
            kept.versions = []


class CastCopy:
    """A model's copy and the state of the weights that it was cast from."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.parameters = list(model.parameters())
        self.weights = cast_weights(model)
        self.cast: list[Tensor] = []
        # what deepcopy finds in its memo it takes as it is
        memo: dict[int, object] = {id(part): part for part in self.parameters}
        memo |= {id(part): part for part in model.buffers()}
        for weight in self.weights:
            own = nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=False)
            memo[id(weight)] = own
            self.cast.append(own)
        self.model = copy.deepcopy(model, memo).eval()
        self.versions: list[tuple[int, object]] = []

    def is_of(self, model: nn.Module) -> bool:
        """Whether the model still has the very parameters that the copy was made of."""
        pairs = zip_longest(self.parameters, model.parameters())
        return all(own is theirs for own, theirs in pairs)

    @torch.no_grad()
    def follow(self) -> None:
        """Cast again where weights have changed since, as torch counts it."""
        versions = [(weight.data_ptr(), version_of(weight)) for weight in self.weights]
        if versions == self.versions:
            return
        for own, weight in zip(self.cast, self.weights):
            own.copy_(weight)
        self.versions = versions


def version_of(weight: Tensor) -> object:
    """Equal as long as torch has counted no change; tensors of inference mode count none."""
    return object() if weight.is_inference() else weight._version


def cast_weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that autocast casts, each once."""
    weights = {}
    for module in model.modules():
        if isinstance(module, CAST):
            for parameter in module.parameters(recurse=False):
                weights[id(parameter)] = parameter
    return list(weights.values())
