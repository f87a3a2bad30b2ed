"""Linears in full precision again, from the tensors that store them, as these come one after the other."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from optimum_qvlm.compat.torch import own_parameters
from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.modules.recorded import recorded_linear
from optimum_qvlm.plan import ModuleRecord

Named = tuple[str, Tensor]


def dequantized(tensors: Iterable[Named], plain: Mapping[str, ModuleRecord]) -> Iterator[Named]:
    """The tensors of a checkpoint, with one weight in place of all that stores it for each linear in `plain`.

    Raises:
        CheckpointError: a tensor of such a linear is missing.
    """
    waiting = {name: recorded_linear(entry) for name, entry in plain.items()}
    begun = set()
    for name, tensor in tensors:
        owner, _, kind = name.rpartition(".")
        if owner not in plain or kind == "bias":
            yield name, tensor
        elif owner in waiting and kind in own_parameters(waiting[owner]):
            begun.add(owner)
            linear = waiting[owner]
            linear.register_parameter(kind, nn.Parameter(tensor, requires_grad=False))
            if not any(parameter.is_meta for parameter in linear.parameters()):
                del waiting[owner]
                yield f"{owner}.weight", linear.weight[:]
    missing = next((name for name in waiting if name in begun), None)
    if missing is not None:
        raise CheckpointError(f"not all tensors of {missing} were loaded; fetch the checkpoint again")
