"""Stand-ins for quantized linears while their clips, scales and equalizers are learned."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.quant.affine import quantize_weight
from optimum_qvlm.search.encoder_loss import WeightStart, learned_clip, learned_static, learned_tokens, transformed

LARGEST_CHANGE = math.log(2)
"""A scale or equalizer stays within this factor of what the search found, as a logarithm."""

SMALLEST_CLIP = 0.3
"""The smallest ratio of an activation's peak that can be learned."""


class LearnedSite(nn.Module):
    """What the linears of one site share: the logarithms of changes to its clip or static scale, and equalizer.

    Parameters are zero at the start, which is exactly what `start` does. None where there is nothing to learn.
    """

    scale: Tensor | None
    equalizer: Tensor | None
    log_clip: nn.Parameter | None
    log_equalizer: nn.Parameter | None

    def __init__(self, start: QuantLinear) -> None:
        super().__init__()
        self.activation, self.clip = start.format.activation, start.format.activation_clip
        self.rotation = start.format.rotation
        self.register_buffer("scale", start.input_scale)
        self.register_buffer("equalizer", start.input_equalizer)
        equalizer = start.input_equalizer
        # A fitted scale makes good what another clip does, so there is nothing to learn about it.
        bounded = self.activation is not None and not self.activation.fitted
        self.log_clip = nn.Parameter(start.weight_scale.new_zeros(1, dtype=torch.float32)) if bounded else None
        self.log_equalizer = None if equalizer is None else nn.Parameter(torch.zeros_like(equalizer))

    def transform(self) -> Tensor | None:
        """The equalizer [channels] as it is now."""
        if self.equalizer is None or self.log_equalizer is None:
            return None
        return self.equalizer * self.log_equalizer.exp()

    def forward(self, x: Tensor) -> Tensor:
        """The rounded activation, as `QuantLinear` would compute it."""
        dtype = x.dtype
        x = transformed(x, self.transform(), self.rotation)
        if self.activation is not None:
            log_clip = x.new_zeros(1, dtype=torch.float32) if self.log_clip is None else self.log_clip
            if self.scale is None:
                x = learned_tokens(x, self.activation, log_clip, self.clip)
            else:
                x = learned_static(x, self.activation, log_clip, self.scale)
        return x.to(dtype)

    @torch.no_grad()
    def keep_in_bounds(self) -> None:
        """Bring parameters back to where they mean something: no clip above 1 or below `SMALLEST_CLIP`."""
        if self.log_clip is not None:
            if self.scale is None:
                self.log_clip.clamp_(min(0.0, math.log(SMALLEST_CLIP / self.clip)), -math.log(self.clip))
            else:
                self.log_clip.clamp_(-LARGEST_CHANGE, LARGEST_CHANGE)
        if self.log_equalizer is not None:
            self.log_equalizer.clamp_(-LARGEST_CHANGE, LARGEST_CHANGE)


class LearnedLinear(nn.Module):
    """One linear of a learned site, on its full-precision weight.

    At the start it computes what `start` does, up to the folding of the transform. Only `log_scale`
    [out_features, groups] and the site's parameters can be trained.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    zero_point: Tensor | None
    offset: Tensor | None

    def __init__(self, start: QuantLinear, weight: Tensor, site: LearnedSite) -> None:
        super().__init__()
        self.format, self.site = start.format, site
        self.in_features, self.out_features = start.in_features, start.out_features
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if start.bias is None else start.bias.detach())
        packed_weight = start.quantized()
        begun = WeightStart.of(packed_weight, self._folded(), start.format.weight)
        self.register_buffer("scale", begun.scale)
        self.register_buffer("zero_point", begun.zero_point)
        self.register_buffer("offset", begun.offset)
        self.log_scale = nn.Parameter(torch.zeros_like(packed_weight.scale, dtype=torch.float32))

    def forward(self, input: Tensor) -> Tensor:
        """Product of the rounded input [..., in_features] with the rounded weight, plus bias."""
        value = self._start().value(self._folded(), self.log_scale)
        return F.linear(self.site(input), value.to(input.dtype), self.bias)

    @torch.no_grad()
    def keep_in_bounds(self) -> None:
        """Bring scales back to within `LARGEST_CHANGE` of the search's."""
        self.log_scale.clamp_(-LARGEST_CHANGE, LARGEST_CHANGE)

    @torch.no_grad()
    def packed(self) -> QuantLinear:
        """The weight rounded again with what was learned, packed."""
        format = replace(self.format, activation_clip=self._clip())
        scale = self.site.scale
        if scale is not None:
            assert self.site.log_clip is not None
            scale = scale * self.site.log_clip.exp()
        return QuantLinear.from_quantized(
            self._start().rounded(self._folded(), self.log_scale),
            self.bias,
            format,
            input_equalizer=self.site.transform(),
            input_scale=scale,
        )

    @torch.no_grad()
    def weight_clip(self) -> float:
        """Mean over rows and groups of the ratio of the range that the grid covers now."""
        packed_weight = self._start().rounded(self._folded(), self.log_scale).scale.float()
        signed = bool((packed_weight < 0).any())
        full = quantize_weight(self._folded(), self.format.weight, scale_dtype=torch.float32, signed=signed).scale
        return float((packed_weight / full).abs().mean())

    def _clip(self) -> float:
        log_clip, clip = self.site.log_clip, self.format.activation_clip
        return clip if log_clip is None or self.site.scale is not None else learned_clip(log_clip, clip)

    def _folded(self) -> Tensor:
        equalizer = self.site.transform()
        inverse = None if equalizer is None else equalizer.reciprocal()
        return transformed(self.weight, inverse, self.site.rotation)

    def _start(self) -> WeightStart:
        return WeightStart(spec=self.format.weight, scale=self.scale, zero_point=self.zero_point, offset=self.offset)
