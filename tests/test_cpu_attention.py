"""Attention for inference on a CPU: in parts, and in memory that is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rfdetr.models import cpu_attention
from rfdetr.models.cpu_attention import AttentionInParts, divide_attention

FAULTS = """
import resource, torch
from rfdetr.device import Precision
from rfdetr.models.cpu_copy import for_inference
for_inference(torch.nn.Identity(), Precision(torch.device("cpu")))
faults = []
for _ in range(6):
    blocks = [torch.ones(7 * 2**20, dtype=torch.uint8) for _ in range(7)]
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-2])
"""


class Products(TorchDispatchMode):
    """The heads of each batched product meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[int] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.heads.append(len(result))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads_at_once", [0.5, 1, 2, 5, 100])
def test_parts_give_what_all_heads_at_once_give(monkeypatch, heads_at_once, dtype):
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(cpu_attention, "SCORES_AT_ONCE", int(heads_at_once * 9**2))
    whole = Attention(48, num_heads=3, qkv_bias=True).to(dtype)
    whole.fused_attn = False
    tokens = torch.randn(4, 9, 48, dtype=dtype)
    with torch.inference_mode(), Products() as products:
        parts = AttentionInParts(whole)(tokens)
    with torch.inference_mode():
        expected = whole(tokens)
    assert parts.dtype == expected.dtype
    torch.testing.assert_close(parts, expected)
    assert max(products.heads) == min(max(1, int(heads_at_once)), 4 * 3)


def test_only_the_vit_s_attention_is_divided():
    attention = Attention(8, num_heads=2)

    class Other(Attention):
        pass

    model = nn.Sequential(attention, nn.MultiheadAttention(8, 2), Other(8, num_heads=2))
    divide_attention(model)
    assert [type(layer) for layer in model] == [AttentionInParts, nn.MultiheadAttention, Other]
    assert model[0].qkv is attention.qkv and model[0].proj is attention.proj


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the C library of Linux")
def test_freed_memory_is_kept_for_the_next_layer():
    result = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 400  # of 12,544 pages
