"""What happens to the tensors of a checkpoint before vLLM's loader gives them to modules."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from vllm.model_executor.models.utils import WeightsMapper

from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.serving.plain import Named, dequantized


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
