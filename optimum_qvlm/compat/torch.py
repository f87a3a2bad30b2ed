"""What is private in PyTorch, or differs between its releases.

Functions whose names end in `_check` or `_guard` return what is to be called, for code that a few nanoseconds matter
to: it binds that once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

from torch import Tensor

from optimum_qvlm.compat.lookup import private

SEEN = "2.11 to 2.14"
"""Releases that have all of this."""


def dispatch_mode_check() -> Callable[[], bool]:
    """Tells whether a `TorchDispatchMode` is entered, which wants to see every operation.

    Modes are public, and who is under one is not.
    """
    return cast(Callable[[], bool], private("torch.utils._python_dispatch.is_in_torch_dispatch_mode", SEEN))


def tracing_check() -> Callable[[], bool]:
    """Tells whether `torch.jit.trace` records the call.

    `torch.jit.is_tracing` asks the same by way of two more functions, and `torch.jit` is deprecated.
    """
    return cast(Callable[[], bool], private("torch._C._is_tracing", SEEN))


def transform_check() -> Callable[[], Any]:
    """Gives the innermost transform of `torch.func`, as `vmap`, that the call is in; None outside of any.

    Such transforms wrap tensors whose type is still `Tensor`, and nothing public tells them.
    """
    return cast(Callable[[], Any], private("torch._C._functorch.peek_interpreter_stack", SEEN))


def below_autograd_guard() -> Callable[[], AbstractContextManager[Any]]:
    """Makes the context in which an operator that autograd has seen goes on to what computes it.

    The public way, `torch.library.custom_op`, makes a call of an operator five times as long. Keys that only note
    views and writes in place are passed over too: otherwise what `torch.autograd.Function` returns is taken for a view
    of its output, and may not be written to.
    """
    return cast(Callable[[], AbstractContextManager[Any]], private("torch._C._AutoDispatchBelowADInplaceOrView", SEEN))


def byte_product(codes: Tensor, values: Tensor) -> Tensor:
    """int32 [tokens, rows] of int8 [tokens, channels] and int8 [channels, rows]. No public product takes integers."""
    return cast(Tensor, private("torch._int_mm", SEEN)(codes, values))


def int8_weight_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """bf16 [tokens, rows] of bf16 [tokens, channels] and int8 [rows, channels] times bf16 scales [rows].

    No public product takes such weights without a copy in bf16.
    """
    return cast(Tensor, private("torch._weight_int8pack_mm", SEEN)(x, codes, scale))


def int4_weight_product(x: Tensor, octets: Tensor, group: int, pairs: Tensor) -> Tensor:
    """bf16 [tokens, rows] of bf16 [tokens, channels] and a weight in PyTorch's own blocks of four bits on a CPU.

    `pairs` are bf16 [groups, rows, 2] with the scale and the zero of each group. Nothing public takes four bits.
    """
    multiply = private("torch.ops.aten._weight_int4pack_mm_for_cpu.default", SEEN)
    return cast(Tensor, multiply(x, octets, group, pairs))
