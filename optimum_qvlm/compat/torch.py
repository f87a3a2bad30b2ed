"""What is private in PyTorch, or differs between its releases.

Functions whose names end in `_check` or `_guard` return what is to be called, for code that a few nanoseconds matter
to: it binds that once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from optimum_qvlm.compat.lookup import private

T = TypeVar("T", bound=Tensor)

SEEN = "2.11 to 2.14"
"""Releases that have all of this."""


def dispatch_mode_check() -> Callable[[], bool]:
    """Tells whether a `TorchDispatchMode` is entered, which wants to see every operation.

    Modes are public, and who is under one is not.
    """
    return cast(Callable[[], bool], private("torch.utils._python_dispatch.is_in_torch_dispatch_mode", SEEN))


def dispatch_mode_class() -> Any:
    """The class of contexts that see every operation. PyTorch's own notes import it from a private module."""
    return private("torch.utils._python_dispatch.TorchDispatchMode", SEEN)


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


def tensor_version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, its views included. Autograd asks this, and nothing public."""
    return int(tensor._version)


def memory_of(held: Tensor | torch.UntypedStorage) -> int:
    """A number that tensors share which lie in the same storage, or that of a storage.

    Public addresses are 0 for tensors without values.
    """
    return int((held.untyped_storage() if isinstance(held, Tensor) else held)._cdata)


def bare_wrapper(cls: type[T], like: Tensor, device: torch.device) -> T:
    """A tensor of the subclass `cls` without memory, with the shape, strides and dtype of `like`.

    PyTorch's own notes on subclasses use this, and no public function makes one.
    """
    make = private("torch.Tensor._make_wrapper_subclass", SEEN)
    offset, strides = like.storage_offset(), like.stride()
    wrapper: T = make(cls, like.shape, strides=strides, storage_offset=offset, dtype=like.dtype, device=device)
    return wrapper


def plain_functions() -> AbstractContextManager[Any]:
    """Inside, a subclass does not see functions called on it, only operators: what its own method calls goes on.

    PyTorch's own notes on subclasses use it. It is named here, not looked up, since compiled code knows the name.
    """
    return torch._C.DisableTorchFunctionSubclass()


def written_arguments(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that a call of an operator writes to. Only its schema says which."""
    for position, argument in enumerate(operator._schema.arguments):
        if argument.is_write:
            yield args[position] if position < len(args) else kwargs.get(argument.name)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves of nested containers, those of models' outputs included, and the form for `unflatten`.

    The public `torch.utils.pytree` came after our oldest release.
    """
    leaves, form = private("torch.utils._pytree.tree_flatten", SEEN)(tree)
    return leaves, form


def unflatten(leaves: list[Any], form: Any) -> Any:
    """The inverse of `flatten`."""
    return private("torch.utils._pytree.tree_unflatten", SEEN)(leaves, form)


def map_leaves(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """Nested containers with what `function` makes of each leaf of a class."""
    return private("torch.utils._pytree.tree_map_only", SEEN)(kind, function, tree)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that a module itself holds, by their names; None for one that it does without.

    This is the very dictionary, which costs a call of a linear less than its attributes do: those are found only after
    a search that fails. `named_parameters` leaves out what is None.
    """
    return module._parameters


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that a module itself holds, by their names: the very dictionary, see `own_parameters`."""
    return module._modules


def has_hooks(module: nn.Module) -> bool:
    """Whether a function was hooked into a module's forward or backward pass. Nothing public says so."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


class StateModule(nn.Module):
    """A module with public names for what a subclass may do otherwise when it is moved, loaded and saved.

    PyTorch calls methods whose names begin with an underscore; the hooks that may be registered in their place are held
    by each instance, which copies and pickles would carry along, and none is there for moving.
    """

    def apply_to_tensors(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Put `fn` of each tensor in its place: how a module is moved and cast."""
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def take_state(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the tensors below `prefix`. `rest` are the metadata, `strict`, and lists for what is missing, unexpected
        and in error."""
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def give_state(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Write its own tensors into `destination`; with `keep_vars` the parameters themselves."""
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self.apply_to_tensors(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.take_state(state_dict, prefix, *rest)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.give_state(destination, prefix, keep_vars)
