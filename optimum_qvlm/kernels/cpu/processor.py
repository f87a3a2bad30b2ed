"""What the processor here does fast, as PyTorch uses it."""

from functools import cache

import torch


@cache
def instructions() -> str:
    """The set of vector instructions that PyTorch's own kernels run with, as "AVX2"."""
    return str(torch.backends.cpu.get_cpu_capability())


@cache
def multiplies_bf16() -> bool:
    """Whether products in bf16 are much faster than those in fp32."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16", False) or able.get("avx512_bf16", False))
