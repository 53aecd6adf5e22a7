"""A GPU that is not there: tensors whose values lie on the CPU and that say they are on CUDA.

    with PretendCuda() as gpu:
        model.to(DEVICE)(images.to(DEVICE))
    gpu.waits, gpu.blocking_copies, gpu.kernels

What such a GPU refuses is refused: two devices in one operation, numpy() of its tensors. What it
would wait for is noted with the line of this repository that asked for it. No gradients: there is
no stream to compute them on, so that backward() does nothing.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
# the CPU must know a result's size, or its value, before it goes on
WAITING = {
    aten._local_scalar_dense,
    aten.bincount,
    aten.equal,
    aten.histc,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten.unique_dim,
    aten._unique2,
}
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
# operations without a kernel that the schema does not tell
FREE = {
    aten._unsafe_view,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.lift_fresh,
    aten._local_scalar_dense,
}
scaled_dot_product_attention = F.scaled_dot_product_attention


class OnCuda(Tensor):
    """A tensor that says it is on CUDA; `values` has its numbers, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> OnCuda:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        tensor.values_on_cpu = values
        return tensor

    def tolist(self) -> list:
        return self.cpu().tolist()  # as C++ does it, for other tensors

    def numpy(self) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self) -> str:
        return f"OnCuda({self.values_on_cpu!r})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise RuntimeError(f"{operation} outside of PretendCuda")


def values_of(x: object) -> object:
    return x.values_on_cpu if isinstance(x, OnCuda) else x


class PretendCuda(TorchDispatchMode):
    """Counts what a GPU would do and wait for, while it is on.

    waits: device to host, by "file:line"; blocking_copies: host to device, by "file:line";
    kernels: by operation; kernel_lines: by "file:line"; dtypes: of the tensors that each operation
    was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: dict[int, torch.UntypedStorage] = {}  # by address, kept so that it stays so
        self.forget()

    def forget(self) -> None:
        """Count from zero."""
        self.waits: Counter[str] = Counter()
        self.blocking_copies: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.kernel_lines: Counter[str] = Counter()
        self.dtypes: dict[str, set[tuple]] = defaultdict(set)

    def __enter__(self) -> PretendCuda:
        if not torch.cuda.is_available():
            torch._C._ensureCUDADeviceGuardSet()  # one that asks no driver
        self.changed = ExitStack()
        for target, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
            (torch.cuda, "max_memory_allocated", lambda device=None: 0),
            (torch.cuda, "get_rng_state", lambda device=None: None),
            (torch.amp.autocast_mode, "_cuda_available", True),
            (F, "scaled_dot_product_attention", self.attention),
            (Tensor, "pin_memory", lambda tensor, device=None: self.pin(tensor)),
            (Tensor, "is_pinned", lambda tensor, device=None: self.is_pinned(tensor)),
            (Tensor, "backward", lambda tensor, *args, **kwargs: None),
            # in it, operations would come here undivided
            (torch.inference_mode, "__enter__", lambda context: None),
            (torch.inference_mode, "__exit__", lambda context, *error: None),
        ):
            if hasattr(target, name):
                self.changed.enter_context(mock.patch.object(target, name, value))
        self.changed.enter_context(
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        )
        self.changed.enter_context(torch.no_grad())
        # torch.tensor(..., device="cuda") makes its tensor on the CPU, and its copy is to count
        self.changed.callback(
            torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors()
        )
        torch._C._set_only_lift_cpu_tensors(True)
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        set_overwriting = torch.__future__.set_overwrite_module_params_on_conversion
        set_overwriting(True)
        self.changed.callback(set_overwriting, before)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.changed.close()

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy in memory that a GPU may read by itself."""
        copy = tensor.clone()
        storage = copy.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return copy

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        """The fused kernel, which is one; as an operation of the CPU it would be many."""
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = (x.to(dtype) for x in (query, key, value))
        require_one_device("attention", [query, key, value])
        self.note_kernel("scaled_dot_product_attention")
        values = [values_of(x) for x in (query, key, value)]
        with torch._C._DisableTorchDispatch():
            result = scaled_dot_product_attention(*values, *args, **kwargs)
        return OnCuda(result) if isinstance(query, OnCuda) else result

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs, structure = tree_flatten((args, kwargs))
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        to = kwargs.get("device")
        is_to_cuda = to is not None and torch.device(to).type == "cuda"
        on_cuda = any(isinstance(x, OnCuda) for x in tensors)
        packet = operation.overloadpacket
        if not on_cuda and not is_to_cuda:
            return operation(*args, **kwargs)
        if packet in COPIES:
            stays = self.note_copy(operation, args, kwargs)
        else:
            stays = True
            self.note_waits(packet, args, kwargs)
            if packet not in INDEXING:
                require_one_device(operation, tensors)
            if not operation.is_view and packet not in FREE:
                name = str(packet).removeprefix("aten.")
                self.note_kernel(name)
                self.dtypes[name].add(tuple(x.dtype for x in tensors))
        plain = [values_of(x) for x in inputs]
        plain_args, plain_kwargs = tree_unflatten(plain, structure)
        if is_to_cuda:
            plain_kwargs["device"] = torch.device("cpu")
            plain_kwargs["pin_memory"] = False
            if packet is aten._to_copy:
                plain_kwargs.pop("pin_memory")
        if packet is aten._softmax and plain_args[2]:  # from half to float, in one kernel
            plain_args = [plain_args[0].float(), plain_args[1], False]
        result = operation(*plain_args, **plain_kwargs)
        return self.placed(result, args, plain_args, stays)

    def placed(self, result: object, args: tuple, plain_args: tuple, on_cuda: bool) -> object:
        """The result as tensors of the device; one that was changed in place is the same tensor."""
        leaves, structure = tree_flatten(result)
        own, _ = tree_flatten(args)
        plain, _ = tree_flatten(plain_args)
        tensor_of = {id(p): a for p, a in zip(plain, own) if isinstance(p, Tensor)}
        placed = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                placed.append(leaf)
            elif id(leaf) in tensor_of:
                placed.append(tensor_of[id(leaf)])
            else:
                placed.append(OnCuda(leaf) if on_cuda else leaf)
        return tree_unflatten(placed, structure)

    def note_copy(self, operation, args: tuple, kwargs: dict) -> bool:
        """Count a copy as what it is; returns whether its result is on the device."""
        if operation.overloadpacket is aten._to_copy:
            source = args[0]
            device = kwargs.get("device")
            target_on_cuda = isinstance(source, OnCuda)
            if device is not None:
                target_on_cuda = torch.device(device).type == "cuda"
            non_blocking = kwargs.get("non_blocking", False)
        else:
            target, source = args[:2]
            target_on_cuda = isinstance(target, OnCuda)
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if isinstance(source, OnCuda) and not target_on_cuda and not non_blocking:
            self.waits[line_of_repository()] += 1
        elif isinstance(source, OnCuda):
            self.note_kernel("copy")  # a cast, and what goes to the host beside other work
        elif not (non_blocking and self.is_pinned(source)):
            self.blocking_copies[line_of_repository()] += 1
        return target_on_cuda

    def note_waits(self, packet, args: tuple, kwargs: dict) -> None:
        if packet in WAITING:
            self.waits[line_of_repository()] += 1
        if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            self.waits[line_of_repository()] += 1
        if packet in INDEXING:
            for index in args[1]:
                if index is None:
                    continue
                if index.dtype in (torch.bool, torch.uint8):
                    self.waits[line_of_repository()] += 1
                if not isinstance(index, OnCuda):
                    self.blocking_copies[line_of_repository()] += 1

    def note_kernel(self, name: str) -> None:
        self.kernels[name] += 1
        self.kernel_lines[line_of_repository()] += 1


def require_one_device(operation: object, tensors: list[Tensor]) -> None:
    """RuntimeError where tensors of two devices meet; a CPU's single number may be anywhere."""
    on_cuda = [isinstance(x, OnCuda) for x in tensors]
    if not any(on_cuda):
        return
    for x, there in zip(tensors, on_cuda):
        if not there and x.ndim > 0:
            raise RuntimeError(
                f"{operation}: expected all tensors to be on the same device, "
                f"but found at least two devices, cuda:0 and {x.device}"
            )


def line_of_repository() -> str:
    """The innermost line of this repository (but this file) that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        is_installed = "site-packages" in file.parts  # an environment may lie in the repository
        if ROOT in file.parents and file != Path(__file__) and not is_installed:
            return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
