"""The weight of a quantized linear as values: its grid, its codes, and the tensors of a layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_qvlm.spec import ActivationSpec, WeightSpec

PACKED = "packed"
"""The layout of the checkpoint, which every device can run, by the definition."""

TRANSIENT = "transient"
"""The same tensors, put into the layout of the device for each call: for weights that are brought there for it."""

CHECKPOINT_LAYOUTS = (PACKED, TRANSIENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearGrid:
    """What a layout has to hold, and for which activations.

    Attributes:
        in_features, out_features: sizes of the weight [out_features, in_features].
        weight: its grid.
        activation: the grid of activations; None where they are not rounded.
        scale_dtype: dtype of the weight's scales.
        decode_tokens: up to how many tokens activations are not rounded whatever `activation` says.
    """

    in_features: int
    out_features: int
    weight: WeightSpec
    activation: ActivationSpec | None = None
    scale_dtype: torch.dtype = torch.float32
    decode_tokens: int = 0

    @property
    def groups(self) -> int:
        """Number of scales per row."""
        return self.weight.groups(self.in_features)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Codes of one weight with what turns them back.

    Attributes:
        codes: int8 [out_features, in_features], in -2^(bits-1) .. 2^(bits-1)-1.
        scale: [out_features, groups], in the dtype that is stored. Not zero; negative ones turn the grid around.
        zero_point: int8 [out_features, groups], or None on a symmetric grid.
    """

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
        bits: 2..8, or None to leave them.
        group: channels of a token that share a scale; None shares the token.
        clip: ratio of the peak that maps to the largest code.
        scale: fp32 [1], the fixed scale of a static grid; None on dynamic ones.
        equalizer: fp32 [channels], multiplies activations first; None for ones.
        rotation: size of the Hadamard blocks applied next; None for none.
        fitted: fit sign and size of each dynamic scale, see `quantize_tokens`.
    """

    bits: int | None = None
    group: int | None = None
    clip: float = 1.0
    scale: Tensor | None = None
    equalizer: Tensor | None = None
    rotation: int | None = None
    fitted: bool = False

    @classmethod
    def of(
        cls,
        activation: ActivationSpec | None,
        *,
        clip: float = 1.0,
        scale: Tensor | None = None,
        equalizer: Tensor | None = None,
        rotation: int | None = None,
    ) -> "Rounding":
        """Rounding to a grid behind a transform; `NOTHING` where there is neither."""
        if activation is not None:
            return cls(
                bits=activation.bits,
                group=activation.group,
                clip=clip,
                scale=scale,
                equalizer=equalizer,
                rotation=rotation,
                fitted=activation.fitted,
            )
        return NOTHING if equalizer is None and rotation is None else cls(equalizer=equalizer, rotation=rotation)

    def unrounded(self) -> "Rounding":
        """The transform alone."""
        return Rounding.of(None, equalizer=self.equalizer, rotation=self.rotation)


NOTHING = Rounding()
"""Activations as they are."""
