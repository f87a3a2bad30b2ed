"""What is no part of Triton's language, or differs between its releases."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from optimum_qvlm.compat.lookup import private

SEEN = "3.6 to 3.9"
"""Releases that have all of this."""


def descriptor_class() -> Any:
    """The class of tensors that kernels copy by whole blocks: `(tensor, shape, strides, block_shape, padding)`.

    The tutorials use it, and the reference leaves it out. Its fields have the names of its arguments, and `base`.
    """
    return private("triton.tools.tensor_descriptor.TensorDescriptor", SEEN)


def described(tensor: Tensor, block: Sequence[int]) -> Any:
    """A contiguous tensor for a kernel that copies it by blocks of this shape."""
    return descriptor_class().from_tensor(tensor, list(block))


def is_compiled(kernel: Any) -> bool:
    """Whether a launch gave a compiled kernel: the interpreter gives none, nor do hooks that stop a launch."""
    return isinstance(kernel, private("triton.compiler.CompiledKernel", SEEN))


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Launches a compiled kernel on a stream, see `stream_of`, with all arguments by position, constants among them.

    Pointers may be given as addresses. A kernel's own call looks at the type, value and alignment of each argument
    first, and that of a compiled one asks for the device and calls hooks of profilers, also where there are none.
    """
    x, y, z = (*grid, 1, 1)[:3]
    hooked = kernel[(x, y, z)]
    run, function, packed = kernel.run, kernel.function, kernel.packed_metadata
    knobs = private("triton.knobs.runtime", SEEN)

    def launch(stream: int, *arguments: Any) -> None:
        if knobs.launch_enter_hook.calls or knobs.launch_exit_hook.calls:
            hooked(*arguments, stream=stream)
        else:
            run(x, y, z, stream, function, packed, None, None, None, *arguments)

    return launch


def stream_of() -> Callable[[int], int]:
    """Gives the handle of the current stream of a device by its number."""
    return cast(Callable[[int], int], private("triton.runtime.driver", SEEN).active.get_current_stream)


def arithmetic_options() -> dict[str, Any]:
    """Options of a launch that settle how a kernel computes: products and sums are fused where the compiler can.

    Triton 3.10 leaves them apart by default, which takes longer, and 3.9 warns each user of it.
    """
    return {"enable_fp_fusion": True}


def argument_names(function: Any) -> list[str]:
    """Names of the arguments of a `triton.jit` function, in their order, constants among them."""
    return cast(list[str], function.arg_names)
