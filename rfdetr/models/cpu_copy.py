"""A model's copy for inference on a CPU: its weights are cast and packed once, not at every call.

Autocast keeps casts for one call alone, and none of weights that are frozen or read in inference
mode. oneDNN multiplies with weights that lie as its kernels read them: on a CPU of AMD, fp32 then
takes nine tenths of the time of the library that torch.nn.Linear calls, bf16 a little less too
(benchmarks/inference.py).
"""

from __future__ import annotations

import copy
import platform
from itertools import zip_longest
from weakref import WeakKeyDictionary

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from rfdetr.device import Precision, keep_freed_memory
from rfdetr.models.cpu_attention import divide_attention

# modules whose parameters all go into operations that autocast runs in the lower precision
CAST = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)
PACKED_FROM = 100_000  # weights of a layer; smaller ones gain nothing
X86 = ("x86_64", "amd64")


def for_inference(model: nn.Module, precision: Precision) -> nn.Module:
    """A copy of a model whose weights stay as they are, in eval mode; on a GPU the model itself."""
    if precision.device.type != "cpu":
        return model.eval()
    return CpuCopies(precision.dtype).of(model)


class CpuCopies:
    """Copies of models for inference, under autocast to `dtype` or, where that is None, in fp32.

    Results are the same but for rounding. The models stay as they are, and are what is trained and
    saved. A copy shares all that is neither cast nor packed, and follows weights that have changed
    as far as torch counts it. A fused optimizer's steps are not counted: after them, `forget`. The
    process keeps memory that is freed between layers (keep_freed_memory).
    """

    def __init__(self, dtype: torch.dtype | None):
        keep_freed_memory()
        self.dtype = dtype
        self._copies: WeakKeyDictionary[nn.Module, CpuCopy] = WeakKeyDictionary()

    def of(self, model: nn.Module) -> nn.Module:
        """The copy of a model, in eval mode.

        The model itself where parts of it are compiled, or nothing is to be cast or packed.
        """
        kept = self._copies.get(model)
        if kept is None or not kept.is_of(model):
            model.eval()
            if any(module._compiled_call_impl is not None for module in model.modules()):
                return model
            kept = CpuCopy(model, self.dtype)
            self._copies[model] = kept
        kept.follow()
        return kept.model

    def forget(self) -> None:
        """Cast and pack all weights anew when they are needed next."""
        for kept in self._copies.values():
            kept.versions = []


class CpuCopy:
    """A model's copy and the state of the weights that it was made from.

    The model itself where nothing is to be cast or packed.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None):
        self.parameters = list(model.parameters())
        self.versions: list[tuple[int, object]] = []
        self.weights = [weight for weight in matrices(model) if dtype not in (None, weight.dtype)]
        self.cast: list[Tensor] = []
        self.packed: list[PackedLinear] = []
        packs = can_pack(dtype) and any(map(is_large, model.modules()))
        if not self.weights and not packs:
            self.model = model
            return
        # what deepcopy finds in its memo it takes as it is
        memo: dict[int, object] = {id(part): part for part in self.parameters}
        memo |= {id(part): part for part in model.buffers()}
        for weight in self.weights:
            own = nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=False)
            memo[id(weight)] = own
            self.cast.append(own)
        self.model = copy.deepcopy(model, memo).eval()
        if packs:
            self.packed = pack_layers(self.model)
        if dtype is not None:  # fp32 has torch's fused attention, which is as fast
            divide_attention(self.model)

    def is_of(self, model: nn.Module) -> bool:
        """Whether the model still has the very parameters that the copy was made of."""
        pairs = zip_longest(self.parameters, model.parameters())
        return all(own is theirs for own, theirs in pairs)

    @torch.no_grad()
    def follow(self) -> None:
        """Cast and pack again where weights have changed since, as torch counts it."""
        versions = [(weight.data_ptr(), version_of(weight)) for weight in self.parameters]
        if versions == self.versions:
            return
        for own, weight in zip(self.cast, self.weights):
            own.copy_(weight)
        for layer in self.packed:
            layer.pack()
        self.versions = versions


class PackedLinear(nn.Module):
    """A large linear layer, and a GELU behind it, by oneDNN with weights packed beforehand.

    These are operations of torch that its own compiler uses (torch/_inductor/fx_passes).
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.gelu = False
        self.laid_out: Tensor | None = None

    def pack(self) -> None:
        self.laid_out = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), in the type of the weights."""
        behind = ("gelu", [], "none") if self.gelu else ("none", [], "")
        x = x.to(self.weight.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.laid_out, self.bias, *behind)


def can_pack(dtype: torch.dtype | None) -> bool:
    """Whether this torch has the operations, in bf16 where that is `dtype`, on this CPU."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    if platform.machine().lower() not in X86 or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype is None or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_large(layer: nn.Module) -> bool:
    """Whether it is a linear layer that is worth packing, and no more than that."""
    return type(layer) is nn.Linear and layer.weight.numel() >= PACKED_FROM


def pack_layers(model: nn.Module) -> list[PackedLinear]:
    """Put packed layers in the place of the large linear ones; they are still to be packed."""
    packed = []
    for parent in model.modules():
        for name, layer in parent.named_children():
            if is_large(layer):
                packed.append(PackedLinear(layer))
                setattr(parent, name, packed[-1])
        if isinstance(parent, Mlp) and isinstance(parent.fc1, PackedLinear):
            if isinstance(parent.act, nn.GELU) and parent.act.approximate == "none":
                parent.fc1.gelu = True
                parent.act = nn.Identity()
    return packed


def version_of(weight: Tensor) -> object:
    """Equal as long as torch has counted no change; tensors of inference mode count none."""
    return object() if weight.is_inference() else weight._version


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that autocast casts, each once."""
    weights = {}
    for module in model.modules():
        if isinstance(module, CAST):
            for parameter in module.parameters(recurse=False):
                weights[id(parameter)] = parameter
    return list(weights.values())
