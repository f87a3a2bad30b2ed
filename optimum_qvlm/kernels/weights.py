"""The weight of a quantized linear as values: its grid, its codes, and the tensors of a layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

PACKED = "packed"
"""The layout of the checkpoint, which every device can run, by the definition."""

TRANSIENT = "transient"
"""The same tensors, put into the layout of the device for each call: for weights that are brought there for it."""

CHECKPOINT_LAYOUTS = (PACKED, TRANSIENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGrid:
    """What a layout has to hold, and for which activations.

    Attributes:
        in_features, out_features: sizes of the weight [out_features, in_features].
        bits: 2..8.
        group: input channels that share a scale; None shares the row.
        zero_point: whether groups have zero points.
        scale_dtype: dtype of the scales.
        activation_bits: 2..8, or 16 where activations are not rounded.
        activation_group: channels of a token that share a scale; None shares the token.
        decode_tokens: up to how many tokens activations are not rounded whatever `activation_bits` says.
        two_level: whether scales of a row are multiples of one step, see `optimum_qvlm.kernels.levels`.
    """

    in_features: int
    out_features: int
    bits: int
    group: int | None = None
    zero_point: bool = False
    scale_dtype: torch.dtype = torch.float32
    activation_bits: int = 16
    activation_group: int | None = None
    decode_tokens: int = 0
    two_level: bool = False

    @property
    def groups(self) -> int:
        """Number of scales per row."""
        return 1 if self.group is None else self.in_features // self.group


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """int8 codes [out_features, in_features], scales [out_features, groups], int8 zero points of that shape or None."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """The same in the tensors of the layout that is named: what a module holds and a kernel reads."""

    layout: str
    values: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounding:
    """What happens to activations [..., channels] before the product.

    Attributes:
        bits: 2..8, or 16 to leave them.
        group: channels of a token that share a scale; None shares the token.
        clip: ratio of the peak that maps to the largest code.
        scale: fp32 [1], the fixed scale of a static grid; None on dynamic ones.
        equalizer: fp32 [channels], multiplies activations first; None for ones.
        rotation: size of the Hadamard blocks applied next; None for none.
        fitted: fit sign and size of each dynamic scale, see `quantize_tokens`.
    """

    bits: int = 16
    group: int | None = None
    clip: float = 1.0
    scale: Tensor | None = None
    equalizer: Tensor | None = None
    rotation: int | None = None
    fitted: bool = False

    def unrounded(self) -> "Rounding":
        """The transform alone."""
        if self.equalizer is None and self.rotation is None:
            return NOTHING
        return Rounding(equalizer=self.equalizer, rotation=self.rotation)


NOTHING = Rounding()
"""Activations as they are."""
