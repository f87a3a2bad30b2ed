"""The private parts of PyTorch that we touch are as we take them to be."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_qvlm.compat import torch as compat
from tests.compat.contract import contract


class Passing(TorchDispatchMode):
    """Sees everything and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contract(compat.dispatch_mode_check, "torch.utils._python_dispatch.is_in_torch_dispatch_mode")
def test_a_dispatch_mode_is_told():
    is_watched = compat.dispatch_mode_check()

    assert is_watched() is False
    with Passing():
        assert is_watched() is True


@contract(compat.tracing_check, "torch._C._is_tracing")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_is_told():
    is_traced, told = compat.tracing_check(), []

    def double(x):
        told.append(is_traced())
        return 2 * x

    assert is_traced() is False
    torch.jit.trace(double, torch.ones(2), check_trace=False)
    assert told == [True]


@contract(compat.transform_check, "torch._C._functorch.peek_interpreter_stack")
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_a_transform_is_told(transform):
    innermost, told = compat.transform_check(), []

    def total(x):
        told.append(innermost())
        return x.sum()

    assert innermost() is None
    transform(total)(torch.ones(2, 3))
    assert told[0] is not None


@contract(compat.below_autograd_guard, "torch._C._AutoDispatchBelowADInplaceOrView")
def test_below_autograd_neither_gradients_nor_views_are_noted():
    x = torch.ones(2, 3, requires_grad=True)

    with compat.below_autograd_guard()():
        doubled, view = x * 2, torch.ones(6).view(2, 3)

    assert doubled.grad_fn is None and not doubled.requires_grad
    assert not view._is_view()
    assert (x * 2).requires_grad and torch.ones(6).view(2, 3)._is_view()


@contract(compat.byte_product, "torch._int_mm")
def test_bytes_are_multiplied_exactly():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (17, 64), dtype=torch.int8, generator=generator)
    values = torch.randint(-7, 8, (24, 64), dtype=torch.int8, generator=generator)

    sums = compat.byte_product(codes, values.t())

    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), codes.long() @ values.long().t())


@contract(compat.int8_weight_product, "torch._weight_int8pack_mm")
def test_the_product_with_int8_weights_is_that_of_their_values():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    codes = torch.randint(-127, 128, (16, 64), dtype=torch.int8, generator=generator)
    scale = torch.rand(16, generator=generator).bfloat16()

    product = compat.int8_weight_product(x, codes, scale)

    expected = x.float() @ codes.float().t() * scale.float()
    assert product.dtype == torch.bfloat16
    assert torch.allclose(product.float(), expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


@contract(compat.int4_weight_product, "torch.ops.aten._weight_int4pack_mm_for_cpu")
def test_the_product_with_int4_weights_takes_scales_and_zeros_of_each_group():
    """The blocks that PyTorch packs itself; `kernels.cpu.int4` packs the same ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    codes = torch.randint(0, 16, (64, 64), dtype=torch.int32, generator=generator)
    pairs = torch.stack([torch.rand(2, 64, generator=generator), torch.randn(2, 64, generator=generator)], -1)
    octets = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)

    product = compat.int4_weight_product(x, octets, 32, pairs.bfloat16())

    scale, zero = pairs.bfloat16().float().repeat_interleave(32, dim=0).permute(2, 1, 0)
    expected = x.float() @ ((codes - 8) * scale + zero).t()
    assert product.dtype == torch.bfloat16
    assert torch.allclose(product.float(), expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())
