"""The parts of Triton beyond its language that we touch are as we take them to be."""

import inspect

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel

from optimum_qvlm.compat import triton as compat
from tests.compat.contract import contract
from tests.kernels.ahead_of_time import compile_kernel


@triton.jit
def fill(x, VALUE: tl.constexpr):
    """The least of a kernel."""
    tl.store(x, VALUE)


@contract(compat.descriptor_class, "triton.tools.tensor_descriptor.TensorDescriptor")
def test_a_descriptor_is_made_of_the_fields_of_another():
    """Recorded launches are repeated with other tensors of the same extent."""
    make = compat.descriptor_class()
    given = make.from_tensor(torch.zeros(4, 64, dtype=torch.int8), [2, 16])
    other = torch.ones(4, 64, dtype=torch.int8)

    again = make(other, given.shape, given.strides, given.block_shape, given.padding)

    assert given.base is not other and again.base is other
    assert (again.shape, again.strides, again.block_shape) == (given.shape, given.strides, [2, 16])


@contract(compat.described, "triton.tools.tensor_descriptor.TensorDescriptor.from_tensor")
def test_a_contiguous_tensor_is_described_by_its_sizes():
    described = compat.described(torch.zeros(4, 64, dtype=torch.int8), (2, 16))

    assert isinstance(described, compat.descriptor_class())
    assert (list(described.shape), list(described.strides), described.block_shape) == ([4, 64], [64, 1], [2, 16])


@contract(compat.is_compiled, "triton.compiler.CompiledKernel")
def test_only_what_was_compiled_is_a_compiled_kernel():
    compiled = compile_kernel(fill, {"x": "*fp32"}, {"VALUE": 1.0}, 90)

    assert compat.is_compiled(compiled)
    assert not compat.is_compiled(None) and not compat.is_compiled(fill)


@contract(compat.launcher, "triton.compiler.CompiledKernel.__getitem__")
def test_a_compiled_kernel_is_launched_by_a_grid_of_three_and_positions():
    """What it hands on is checked without a GPU; that it computes the same, with one."""
    grids = []

    class Compiled:
        def __getitem__(self, grid):
            grids.append(grid)
            return print

    assert compat.launcher(Compiled(), (7,)) is print
    assert compat.launcher(Compiled(), (7, 2)) is print
    assert grids == [(7, 1, 1), (7, 2, 1)]
    source = inspect.getsource(CompiledKernel.__getitem__)
    assert "grid[0], grid[1], grid[2]" in source and "*args" in source


@triton.jit
def multiply_add(x, VALUE: tl.constexpr):
    """One product that is added to."""
    at = x + tl.arange(0, 128)
    tl.store(at, tl.load(at) * VALUE + tl.load(at + 128))


@contract(compat.arithmetic_options, "triton.backends.nvidia.compiler.CUDAOptions.enable_fp_fusion")
def test_products_are_fused_with_sums_and_nothing_is_warned(recwarn):
    options = compat.arithmetic_options()

    fused = compile_kernel(multiply_add, {"x": "*fp32"}, {"VALUE": 3.0}, 90, **options)
    apart = compile_kernel(multiply_add, {"x": "*fp32"}, {"VALUE": 3.0}, 90, enable_fp_fusion=False)

    assert "fma.rn" in fused.asm["ptx"] and "fma.rn" not in apart.asm["ptx"]
    assert [str(each.message) for each in recwarn if "FUSION" in str(each.message)] == []


@contract(compat.argument_names, "triton.runtime.jit.JITFunction.arg_names")
def test_argument_names_are_those_of_the_function():
    assert list(compat.argument_names(fill)) == ["x", "VALUE"]
