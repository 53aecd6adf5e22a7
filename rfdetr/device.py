"""The device: its precision, its memory, and what happens when that runs out."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
from torch import Tensor, nn

from rfdetr import distributed
from rfdetr.console import UserError, warn
from rfdetr.memory import is_out_of_memory

Result = TypeVar("Result")
# what a model computes that not every torch has a kernel for on Apple's GPUs
METAL_OPERATIONS = {
    "deformable attention": ("aten::grid_sampler_2d", "aten::grid_sampler_2d_backward"),
    "resizing images": ("aten::_upsample_bilinear2d_aa",),
}


@dataclass(frozen=True)
class Precision:
    """What the forward pass computes in; losses are always fp32."""

    device: torch.device
    dtype: torch.dtype | None = None  # None: fp32

    @property
    def name(self) -> str:
        """fp32, bfloat16 or float16."""
        return "fp32" if self.dtype is None else str(self.dtype).removeprefix("torch.")

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def pick_device(name: str, in_python: bool = False) -> torch.device:
    """The device of this name; "auto" is CUDA, else MPS, else the CPU.

    Under torchrun each process takes the card of its local rank.  in_python: it is an argument, not
    a flag.  Raises UserError for a device that this machine does not have, and for one card that
    all processes would share.
    """
    given = f"device={name!r}" if in_python else f"--device {name}"
    other = 'device="cpu"' if in_python else "--device cpu"
    if name.startswith("cuda:") and distributed.processes() > 1:
        raise UserError(
            f"--device {name} names one card, torchrun has started {distributed.processes()} "
            "processes: leave --device out, and each takes a card of its own. Which cards, "
            "CUDA_VISIBLE_DEVICES=0,1 before torchrun says"
        )
    if name == "auto":
        name = _best_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:  # which would list all that torch has ever known
        meant = re.sub(r"^(gpu|nvidia)(?=$|:)|^(?=\d+$)", "cuda", name.lower())
        meant = re.sub(r"^cuda(?=\d)", "cuda:", meant)
        hint = f" Did you mean {meant}?" if re.fullmatch(r"cuda(:\d+)?", meant) else ""
        raise UserError(
            f"{given}: there is no such device.{hint} There are auto, cpu, cuda, cuda:1 and mps"
        ) from error
    try:
        if device.type == "cuda":
            device = torch.device("cuda", device.index or distributed.local_rank())
            _require_card(device)
            torch.cuda.set_device(device)
            # what stays fp32 is multiplied in TF32, as the official package does
            torch.set_float32_matmul_precision("high")
        if device.type == "cpu" and device.index:
            raise RuntimeError("there is one CPU, of whatever number of cores")
        torch.zeros(1, device=device).item()  # fails where it does not work; "meta" has no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{given} is not usable here ({reason}): try {other}") from error
    if device.type == "mps":
        warn_of_fallbacks(device)
    return device


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def has_kernel(operation: str, device: torch.device) -> bool:
    """Whether this torch computes an operation ("aten::topk") on the device itself."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation, device.type.upper())


@functools.cache  # once a process
def warn_of_fallbacks(device: torch.device) -> None:
    """Name what Metal has no kernel for; rfdetr/__init__.py lets torch compute it on the CPU."""
    missing = []
    for what, operations in METAL_OPERATIONS.items():
        if not all(has_kernel(operation, device) for operation in operations):
            missing.append(what)
    if missing:
        warn(
            f"torch {torch.__version__} has no Metal kernel for {' and '.join(missing)}: the CPU "
            "computes that part, which is slower. A newer torch may have one"
        )


def _require_card(device: torch.device) -> None:
    """UserError where torchrun has started more processes on this machine than it has cards."""
    cards = torch.cuda.device_count()
    if distributed.processes() > 1 and device.index >= cards > 0:
        raise UserError(
            f"torchrun has started process {device.index + 1} on this machine, which has {cards} "
            f"cards: --nproc_per_node {cards} is the most"
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`. Nothing waits for the copy: a GPU reads pinned memory."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    if not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def copied_by_next_wait(tensor: Tensor) -> Tensor:
    """A copy on the CPU. Of a GPU's tensor it must not be read before the next wait for the GPU."""
    return tensor.to("cpu", non_blocking=tensor.device.type == "cuda")


def fused_attention_pays(device: torch.device) -> bool:
    """Whether torch's fused attention is to be used.

    In bf16 on a CPU its backward pass takes 1.7 to 4 times as long as two matrix products and a
    softmax (torch 2.15, avx512_bf16, 145 to 580 tokens).
    """
    return device.type != "cpu" or not torch.is_autocast_enabled("cpu")


def keep_freed_memory() -> None:
    """Let the C library keep up to 62 MB of freed memory for what is allocated next.

    glibc gives blocks back to the system as long as none of this size has been freed, and takes
    them anew at every layer: page faults were 5 to 8 % of nano's time (a virtual machine, one
    core). With other C libraries a block is allocated and freed, no more: no page is touched.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def compile_in_place(module: nn.Module, device: torch.device, weights_stay: bool = False) -> None:
    """torch.compile a module; its parameters and their names stay.

    weights_stay: nothing in this process changes them any more. A CPU's compiled code then holds
    them cast and in the order that its products read; otherwise it casts them at every call, and is
    hardly faster than what was not compiled.

    Raises UserError where this machine cannot compile.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # whatever the compiler behind it raises
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--compile 1 does not work here ({reason}): it needs a C++ compiler, and Triton on a "
            "GPU. Leave it out"
        ) from error
    import torch._inductor.config as inductor  # takes a second

    inductor.freezing = weights_stay and device.type == "cpu"
    module.compile()


def pick_precision(amp: str, device: torch.device) -> Precision:
    """The precision that --amp names: "bf16", "fp16", "off", or "auto".

    "auto" is bf16 where the hardware computes in it, fp16 on older GPUs, else fp32.  Raises
    UserError for fp16 on a CPU.
    """
    if amp == "fp16" and device.type == "cpu":
        raise UserError(
            "--amp fp16 needs a GPU (a CPU computes fp16 many times slower): use --amp auto, "
            "bf16 or off"
        )
    if amp == "auto":
        if _has_bf16(device):
            amp = "bf16"
        elif device.type == "cuda":
            amp = "fp16"
        else:
            amp = "off"
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
    return Precision(device, dtypes[amp])


def pick_inference_precision(amp: str, device: torch.device, trained_in: str) -> Precision:
    """As pick_precision; "auto" is what the size is trained in (its recipe's amp) on a GPU, and
    fp32 on a CPU, whose figures in bf16 are others.
    """
    if amp == "auto":
        amp = "off" if device.type == "cpu" else trained_in
    return pick_precision(amp, device)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return torch.cpu._is_avx512_bf16_supported()
    return False


# ---------------------------------------------------------------- memory


def memory_mb(device: torch.device) -> float:
    """Peak memory so far in MB: allocated on a GPU, resident of this process elsewhere.

    Metal tells no peak: there it is what torch holds of it now, freed and kept tensors among it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    if psutil.WINDOWS:
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # Windows does not have it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if psutil.MACOS else 2**10  # bytes
    return peak * unit / 2**20


def forget_peak_memory(device: torch.device) -> None:
    """Let a GPU's peak begin with what is allocated now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory_mb() -> float:
    """Main memory that can be taken without swapping, in MB."""
    return psutil.virtual_memory().available / 2**20


def free_on_device_mb(device: torch.device) -> float:
    """Memory that tensors on `device` can still take, in MB: what the GPU's driver has left, what
    Metal recommends at most less what it has given, or main memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free / 2**20
    if device.type == "mps":
        left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return min(left / 2**20, free_memory_mb())  # a Mac's GPU shares its main memory
    return free_memory_mb()


def unless_out_of_memory(attempt: Callable[[], Result], device: torch.device) -> Result | None:
    """What `attempt()` returns; None where memory ran out: the caller tries something smaller.

    Other errors pass.  The one place where the error is caught: a handler's exception keeps the
    failed attempt's tensors alive, so memory is released, and the caller goes on, after it.
    """
    try:
        return attempt()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release_memory(device)
    return None


def release_memory(device: torch.device) -> None:
    """Give back what torch's allocator holds unused."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
