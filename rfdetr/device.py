"""What a forward pass computes in, and on which device."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from rfdetr import distributed
from rfdetr.console import UserError


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


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else MPS, else CPU.  Raises UserError for a device this machine has not."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or distributed.local_rank())
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()  # of "meta" there is none
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} is not usable here ({reason}): try --device cpu"
        ) from error
    return device


def fused_attention_pays(device: torch.device) -> bool:
    """Whether torch's fused attention is to be used: in bf16 on a CPU its backward pass takes 1.7 to 4 times the time
    of two matrix products and a softmax (torch 2.15, avx512_bf16, 145 to 580 tokens)."""
    return device.type != "cpu" or not torch.is_autocast_enabled("cpu")


def compile_in_place(module: nn.Module, device: torch.device) -> None:
    """torch.compile a module; its parameters and their names stay.  Raises UserError where this machine cannot."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # whatever the compiler behind it raises
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--compile 1 does not work here ({reason}): it needs a C++ compiler, and Triton on a GPU. Leave it out"
        ) from error
    module.compile()


def pick_precision(amp: str, device: torch.device) -> Precision:
    """auto: bf16 where the hardware computes in it, fp16 on older GPUs, else fp32."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = (
            device.type == "cpu"
            and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        )
    if amp == "fp16" and device.type == "cpu":
        raise UserError(
            "--amp fp16 needs a GPU (a CPU computes fp16 many times slower): use --amp auto, bf16 or off"
        )
    if amp == "auto":
        amp = "bf16" if has_bf16 else "fp16" if device.type == "cuda" else "off"
    return Precision(device, {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp])


def memory_mb(device: torch.device) -> float:
    """Peak memory so far, MB: allocated on a GPU, resident of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if psutil.WINDOWS:
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if psutil.MACOS else peak / 2**10


def free_memory_mb() -> float:
    """Main memory that can be taken without swapping, MB."""
    return psutil.virtual_memory().available / 2**20


def release_memory(device: torch.device) -> None:
    """Give back what torch's allocator holds unused, before a smaller try."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
