"""A weight that can be read as any tensor, but not written to."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from optimum_qvlm.compat.torch import bare_wrapper, flatten, map_leaves, memory_of, plain_functions, written_arguments
from optimum_qvlm.compat.transformers import spared_by_initialisation
from optimum_qvlm.errors import ReadOnlyError

# Setters that never reach torch's dispatcher, each with the one value that asks for no change.
_SETTERS: dict[Any, object] = {
    Tensor.data.__set__: ...,  # type: ignore[attr-defined]
    Tensor.grad.__set__: None,  # type: ignore[union-attr]
    Tensor.requires_grad.__set__: False,  # type: ignore[attr-defined]
    Tensor.requires_grad_: False,
}
# What reads memory past the dispatcher, and ways to copy. These get the plain tensor.
_READERS = frozenset(
    {
        Tensor.__array__,
        Tensor.__deepcopy__,
        Tensor.__dlpack__,
        Tensor.__reduce_ex__,
        Tensor.__repr__,
        Tensor.data_ptr,
        Tensor.numpy,
        Tensor.share_memory_,
        Tensor.storage,
        Tensor.tolist,
    }
)


@spared_by_initialisation
class ReadOnlyWeight(Tensor):
    """The tensor that `read` gives, which is called when values are first needed: shape, dtype and device are free.

    Views of it are read-only too. What is computed from it, a `clone()` and a deep copy are plain tensors. Arrays that
    NumPy makes of it are not writable.

    Raises:
        ReadOnlyError: whatever would write to it or have it trained, instead of doing so.
    """

    _read: Callable[[], Tensor]
    _plain: Tensor | None
    _owner: str

    @staticmethod
    def __new__(cls, read: Callable[[], Tensor], owner: str, like: Tensor, device: torch.device) -> Self:
        """`like` has the shape, strides and dtype of what `read` gives; `owner` says whose weight it is."""
        weight = bare_wrapper(cls, like, device)
        weight._read, weight._owner, weight._plain = read, owner, None
        return weight

    @property
    def plain(self) -> Tensor:
        """The values as an ordinary tensor."""
        if self._plain is None:
            self._plain = self._read()
        return self._plain

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        """For compiled functions that are called with the weight."""
        return ["plain"], self._owner

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], owner: str, size: Any, stride: Any) -> "ReadOnlyWeight":
        """The inverse."""
        plain = inner["plain"]
        return ReadOnlyWeight(lambda: plain, owner, plain, plain.device)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse setters, and read memory for what does not go through the dispatcher."""
        kwargs = kwargs or {}
        weight = args[0] if args else None
        if isinstance(weight, cls) and func in _SETTERS:
            value = [*args[1:], *kwargs.values(), True][0]
            if value is not _SETTERS[func]:
                raise refusal(weight._owner)
            return weight
        if isinstance(weight, cls) and func in _READERS:
            read = func(weight.plain, *args[1:], **kwargs)
            if func in (Tensor.numpy, Tensor.__array__):
                read.flags.writeable = False
            return read
        with plain_functions():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on the values, unless its schema says that it writes to them."""
        kwargs = kwargs or {}
        for weight in _of(cls, list(written_arguments(func, args, kwargs))):
            raise refusal(weight._owner)
        memory = {memory_of(weight.plain): weight for weight in _of(cls, (args, kwargs))}
        args, kwargs = map_leaves(cls, lambda weight: weight.plain, (args, kwargs))
        return map_leaves(Tensor, lambda made: _guard(made, memory.get(memory_of(made))), func(*args, **kwargs))


def refusal(owner: str) -> ReadOnlyError:
    """The error for a write to the weight of `owner`."""
    return ReadOnlyError(
        f"the weight of {owner} cannot be changed or trained: it is computed from packed integers each time it is "
        "read, so that a change would be lost. Call model.dequantize() first, or clone() the weight to change a copy"
    )


def _guard(made: Tensor, weight: ReadOnlyWeight | None) -> Tensor:
    """`made`, read-only where it lies in the memory of a weight that is."""
    return made if weight is None else ReadOnlyWeight(lambda: made, weight._owner, made, made.device)


def _of(cls: type, tree: Any) -> list[Any]:
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, cls)]
