"""What happens to the tensors of a checkpoint before vLLM's loader gives them to modules."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from vllm.model_executor.models.utils import WeightsMapper

from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.hf.format.modules import format_of
from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.plan import ModuleRecord

Named = tuple[str, Tensor]


@dataclass
class CheckpointMapper(WeightsMapper):
    """Names as those of any mapper, and weights of linears that vLLM has no quantized form of as full ones.

    vLLM merges mappers with `|`; what comes out is of this class, whichever side it stood on.

    Attributes:
        plain: linears to dequantize, by their names on disk.
    """

    plain: Mapping[str, ModuleRecord] = field(default_factory=dict)

    def __or__(self, other: WeightsMapper) -> Self:
        """Both, and what is plain here."""
        return self._with(WeightsMapper.__or__(self, other))

    def __ror__(self, other: WeightsMapper) -> Self:
        """Both, and what is plain here. Python asks the right side first where its class derives from the left's."""
        return self._with(WeightsMapper.__or__(other, self))

    def _with(self, merged: Any) -> Self:
        names = {each.name: getattr(merged, each.name) for each in fields(WeightsMapper)}
        return type(self)(**names, plain=self.plain)

    def apply(self, weights: Iterable[Named]) -> Iterable[Named]:
        """The tensors under their new names."""
        mapped: Iterable[Named] = super().apply(dequantized(weights, self.plain))
        return mapped


def dequantized(tensors: Iterable[Named], plain: Mapping[str, ModuleRecord]) -> Iterator[Named]:
    """The tensors of a checkpoint, with one weight in place of all that stores it for each linear in `plain`.

    Raises:
        CheckpointError: a tensor of such a linear is missing.
    """
    waiting = {name: _empty(entry) for name, entry in plain.items()}
    begun = set()
    for name, tensor in tensors:
        owner, _, kind = name.rpartition(".")
        if owner not in plain or kind == "bias":
            yield name, tensor
        elif owner in waiting and kind in waiting[owner]._parameters:
            begun.add(owner)
            linear = waiting[owner]
            linear.register_parameter(kind, nn.Parameter(tensor, requires_grad=False))
            if not any(parameter.is_meta for parameter in linear.parameters()):
                del waiting[owner]
                yield f"{owner}.weight", linear.weight[:]
    missing = next((name for name in waiting if name in begun), None)
    if missing is not None:
        raise CheckpointError(f"not all tensors of {missing} were loaded; fetch the checkpoint again")


def _empty(entry: ModuleRecord) -> QuantLinear:
    return QuantLinear(
        entry.in_features,
        entry.out_features,
        format_of(entry),
        bias=False,
        scale_dtype=getattr(torch, entry.scale_dtype),
        device="meta",
    )
