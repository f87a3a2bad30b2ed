"""What the search of a site looks at, and what it returns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from optimum_qvlm.kernels import Rounding, round_tokens
from optimum_qvlm.quant.affine import QuantizedWeight
from optimum_qvlm.quant.observers import static_scale
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.spec import ActivationSpec, WeightSpec

FEW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class SiteRounding:
    """Transform and rounding of the activations of a site: a function of tokens [tokens, in_features].

    `grid` is what the product's definition calls it.
    """

    transform: SiteTransform
    grid: Rounding

    def __call__(self, tokens: Tensor) -> Tensor:
        """The values that enter the product, fp32."""
        return round_tokens(tokens, self.grid)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteProblem:
    """Everything that the search of a site looks at.

    Attributes:
        inputs: activations [tokens, in_features] that reach the site through the quantized prefix: the sample on
            which candidates are compared.
        weights: full-precision weight [out_features, in_features] per linear.
        specs: grid per linear.
        activation: grid of the shared activation, None to leave it.
        scale_dtype: dtype in which scales are stored.
        references: what the same tokens are at full precision, [tokens, in_features]; the products of these with the
            weights are what the site should give. None stands for `inputs`.
        all_inputs: every calibration token in pieces [some tokens, in_features], on any device, for the second
            moments of error feedback. Empty stands for `inputs` alone.
        all_references: the same at full precision, piece by piece; empty stands for `all_inputs`.
        token_weights: what an error of each of these tokens costs, fp32 [some tokens, 1] with mean 1, piece by piece;
            empty where all cost the same.
        snap: what becomes of an equalizer [in_features] where something that cannot hold every value takes it up.
    """

    inputs: Tensor
    weights: Mapping[str, Tensor]
    specs: Mapping[str, WeightSpec]
    activation: ActivationSpec | None
    scale_dtype: torch.dtype
    references: Tensor | None = None
    all_inputs: Sequence[Tensor] = ()
    all_references: Sequence[Tensor] = ()
    token_weights: Sequence[Tensor] = ()
    snap: Callable[[Tensor], Tensor] | None = None
    _wanted: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def wanted_inputs(self) -> Tensor:
        """Tokens [tokens, in_features] whose full-precision products are the target."""
        return self.inputs if self.references is None else self.references

    def wanted(self, linear: str) -> Tensor:
        """What that linear should give, fp32 [tokens, out_features]; computed once, not to be written to."""
        if linear not in self._wanted:
            self._wanted[linear] = self.wanted_inputs.float() @ self.weights[linear].float().T
        return self._wanted[linear]

    def few(self) -> Tensor:
        """At most `FEW_TOKENS` of the sample, evenly spread: what rounding does to activations is soon averaged out."""
        return self.inputs[:: -(-len(self.inputs) // FEW_TOKENS)]

    def repeated(self, tokens: int) -> "SiteProblem":
        """The same with the sample repeated or cut to so many tokens, to see what a larger one takes."""
        numbers = torch.arange(tokens, device=self.inputs.device) % len(self.inputs)
        references = None if self.references is None else self.references[numbers]
        return replace(self, inputs=self.inputs[numbers], references=references)

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """All calibration tokens, their full-precision values and weights, piece by piece on the sample's device."""
        device = self.inputs.device
        inputs = self.all_inputs or (self.inputs,)
        references = self.all_references or (inputs if self.all_inputs else (self.wanted_inputs,))
        weights = self.token_weights or (None,) * len(inputs)
        for tokens, reference, weight in zip(inputs, references, weights, strict=True):
            yield tokens.to(device), reference.to(device), None if weight is None else weight.to(device)

    def rounding(self, clip: float, transform: SiteTransform) -> SiteRounding:
        """What happens to activations; a static scale is that of the sample's quantile `clip`, after the transform."""
        spec = self.activation
        scale = None
        if spec is not None and spec.static:
            scale = static_scale(transform.tokens(self.inputs), spec.bits, clip)
        grid = Rounding.of(spec, clip=clip, scale=scale, equalizer=transform.equalizer, rotation=transform.rotation)
        return SiteRounding(transform, grid)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteChoice:
    """The rounding function that was found.

    `weights` hold the inverse of `transform` folded in. `input_scale` is the fp32 [1] scale of a static activation.
    `error` and `nearest_error` are relative: squared error of the site's outputs over their squared norm,
    for this choice and for round-to-nearest (NaN where there was nothing to measure on).
    """

    activation_clip: float
    weights: dict[str, QuantizedWeight]
    weight_clips: dict[str, float] = field(default_factory=dict)
    error: float = float("nan")
    nearest_error: float = float("nan")
    transform: SiteTransform = field(default_factory=SiteTransform)
    input_scale: Tensor | None = None
