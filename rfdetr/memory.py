"""Running out of memory, told without torch."""

from __future__ import annotations

OUT_OF_MEMORY_ADVICE = (
    "What is left: a smaller --batch, --resolution or --size, --grad_checkpoint 1, --multi_scale 0, --amp bf16 where "
    "the hardware has it, or --device cpu"
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the main memory had no more: CUDA, cuBLAS, MPS, torch on Linux and Windows, NumPy."""
    texts = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or isinstance(error, RuntimeError)
        and any(t in str(error) for t in texts)
    )
