"""The parts of Triton beyond its language that we touch are as we take them to be."""

import inspect
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.driver import GPUDriver
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


@contract(compat.launcher, "triton.compiler.CompiledKernel.__getitem__", "triton.knobs.runtime.launch_enter_hook")
def test_a_compiled_kernel_is_launched_as_its_own_call_does_it(monkeypatch):
    """What it hands on is checked without a GPU; that it computes the same, with one."""
    handed = []

    class Compiled(CompiledKernel):
        function, packed_metadata, name = 5, (4, 1, 0), "fill"
        run = property(lambda _: lambda *given: handed.append(given))

        def __init__(self):
            self.src = None

        def __del__(self):
            pass

        def _init_handles(self):
            pass

    kernel = Compiled()
    compat.launcher(kernel, (7, 2))(9, 1000, 1.0)
    kernel[(7, 2, 1)](1000, 1.0, stream=9)
    ours, own = handed
    assert ours == (7, 2, 1, 9, 5, (4, 1, 0), None, None, None, 1000, 1.0)
    assert own[:6] == ours[:6] and own[9:] == ours[9:]
    assert not any(hook.calls for hook in own[7:9])

    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    compat.launcher(kernel, (7, 2))(9, 1000, 1.0)
    assert handed[2][7].calls == [print] and handed[2][9:] == ours[9:]


@contract(compat.stream_of, "triton.runtime.driver.active.get_current_stream")
def test_the_stream_of_a_device_is_asked_of_the_driver(monkeypatch):
    """There is no driver without a GPU, and tests with one launch on several streams."""
    active = SimpleNamespace(get_current_stream=lambda device: 100 + device)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)

    assert compat.stream_of()(2) == 102
    assert "self.get_current_stream" in inspect.getsource(GPUDriver.__init__)


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
