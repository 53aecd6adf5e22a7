"""Telling that memory ran out; without torch, so that console.py can import it.

device.py has what the training and inference loops use: `unless_out_of_memory`.
"""

from __future__ import annotations

OUT_OF_MEMORY_ADVICE = (
    "What is left: a smaller --batch, --resolution or --size, --grad_checkpoint 1, "
    "--multi_scale 0, --amp bf16 where the hardware has it, or --device cpu"
)
# CUDA and MPS; torch on Windows; torch on Linux; cuBLAS and cuDNN
MESSAGES = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device's memory or the main memory is full."""
    if isinstance(error, MemoryError):  # Python and NumPy
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in MESSAGES)
