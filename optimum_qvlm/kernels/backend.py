"""What a module must offer to compute with weights on some device."""

from collections.abc import Callable, Set
from typing import Protocol

import torch
from torch import Tensor

from optimum_qvlm.kernels.weights import LinearGrid, QuantizedWeight, Rounding, StoredWeight


class Backend(Protocol):
    """A module that holds weights in a layout of its own and multiplies by them as `reference.linear` does.

    Attributes:
        LAYOUT: the layout's name.
        KNOWN: the yes-no fields of `WeightSpec` that it was written for. A weight with another one is never given to
            it, so that a property of a grid that a backend knows nothing of is computed by the definition.
    """

    @property
    def LAYOUT(self) -> str: ...

    @property
    def KNOWN(self) -> Set[str]: ...

    def accepts(self, grid: LinearGrid, device: torch.device) -> bool:
        """Whether it holds this weight, for these activations, and is fast at it on `device`."""

    def store(self, weight: QuantizedWeight, grid: LinearGrid) -> StoredWeight:
        """The weight in its layout, without loss."""

    def restore(self, stored: StoredWeight, grid: LinearGrid) -> QuantizedWeight:
        """Undo `store`, bit for bit."""

    def linear(
        self, x: Tensor, stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid
    ) -> Tensor:
        """`Q(x T) W^T + bias`, [..., out_features] in the dtype of `x` [..., in_features]."""

    def bind(
        self, stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid
    ) -> Callable[[Tensor], Tensor]:
        """`linear` with all but the activation; may be faster from the second call on."""


class Quantizer(Protocol):
    """A module that rounds activations on some device."""

    def quantize(self, x: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
        """Codes and scales of transformed activations, as `optimum_qvlm.kernels.quantize`."""


class Recursion(Protocol):
    """A module that rounds weights channel after channel on some device, see `optimum_qvlm.kernels.recursion`."""

    def feed_back(
        self, block: Tensor, factor: Tensor, bits: int, scale: Tensor, zero: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Codes and errors of one block."""

    def descend(
        self, codes: Tensor, slope: Tensor, curvature: Tensor, scale: Tensor, low: Tensor, high: Tensor
    ) -> Tensor:
        """Change of the values of one block."""
