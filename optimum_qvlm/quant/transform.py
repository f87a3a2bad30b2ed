"""Invertible transforms of a site: applied to activations at run time, their inverse folded into the weights."""

from dataclasses import dataclass

from torch import Tensor

from optimum_qvlm.kernels import transform_tokens


@dataclass(frozen=True, slots=True)
class SiteTransform:
    """`T = diag(equalizer) (I x H)`, so that `x W^T = (x T) (T^-1 W^T)`.

    Attributes:
        equalizer: fp32 [channels], multiplies activations; None for ones.
        rotation: size of the orthogonal Hadamard blocks, a power of two that divides the channels; None for none.
    """

    equalizer: Tensor | None = None
    rotation: int | None = None

    @property
    def is_identity(self) -> bool:
        """Whether activations stay as they are."""
        return self.equalizer is None and self.rotation is None

    def tokens(self, x: Tensor) -> Tensor:
        """`x T` in fp32, [..., channels]; `x` itself where there is nothing to do."""
        return x if self.is_identity else transform_tokens(x, self.equalizer, self.rotation)

    def fold(self, weight: Tensor) -> Tensor:
        """`W T^-T` in fp32, [out_features, channels]: what multiplies transformed activations."""
        inverse = None if self.equalizer is None else self.equalizer.float().reciprocal()
        return transform_tokens(weight, inverse, self.rotation)

    def unfold(self, weight: Tensor) -> Tensor:
        """Undo `fold`, up to fp32 rounding."""
        rotated = transform_tokens(weight, None, self.rotation)
        return rotated if self.equalizer is None else rotated * self.equalizer.float()
