"""Torch definitions of the operations. Every faster backend must match these."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels.weights import QuantizedWeight, Rounding

SLICE_ELEMENTS = 2**23
"""Weights that are dequantized at once: 32 MB in fp32."""

FITTED_RATIOS = (1.0, 0.93, 0.86)
"""Ratios of the scale that holds every value, among which a fitted grid takes the one of least squared error."""


def quantize_tokens(
    x: Tensor, bits: int, group: int | None, clip: float, *, fitted: bool = False
) -> tuple[Tensor, Tensor]:
    """Round activations to integers, one scale per token or per token and group.

    On a fitted grid the scale takes the sign that puts the value of largest magnitude on the negative side, which has
    one code more, and is the one of `FITTED_RATIOS` whose squared error is least.

    Args:
        x: activations [..., channels], any floating dtype.
        bits: 2..8.
        group: channels that share a scale; None shares the whole token.
        clip: ratio of the peak that maps to the largest code, in (0, 1]. Larger values saturate.
        fitted: fit sign and size of each scale.

    Returns:
        int8 codes [..., channels] in -(2^(bits-1)-1) .. 2^(bits-1)-1, from -2^(bits-1) where `fitted`, and fp32 scales
        [..., groups], so that x ~ codes * scale. Halves round to even. A group of zeros gets scale 1.

    Raises:
        SpecError: `group` does not divide the channels.
    """
    codes, scale = _round(x, bits, group, clip, fitted=fitted)
    return codes.to(torch.int8).reshape(x.shape), scale.squeeze(-1)


def dequantize_tokens(codes: Tensor, scale: Tensor) -> Tensor:
    """fp32 activations [..., channels] from codes [..., channels] and scales [..., groups]."""
    grouped = codes.reshape(*scale.shape, codes.shape[-1] // scale.shape[-1])
    return (grouped * scale.unsqueeze(-1)).reshape(codes.shape)


def fake_quantize_tokens(x: Tensor, bits: int, group: int | None, clip: float, *, fitted: bool = False) -> Tensor:
    """`x` rounded to its grid and returned in its own dtype; gradients pass straight through.

    Equals `dequantize_tokens(*quantize_tokens(...))`, without the way through int8.
    """
    codes, scale = _round(x.detach(), bits, group, clip, fitted=fitted)
    rounded = codes.mul_(scale).reshape(x.shape).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def quantize_static(x: Tensor, bits: int, scale: Tensor) -> Tensor:
    """Round activations to symmetric integers with a fixed scale.

    Args:
        x: activations [..., channels], any floating dtype.
        bits: 2..8.
        scale: fp32 [1], above zero, the same for every token and channel.

    Returns:
        int8 codes of the shape of `x`; values beyond the grid saturate. Halves round to even.
    """
    return _round_static(x, bits, scale).to(torch.int8)


def fake_quantize_static(x: Tensor, bits: int, scale: Tensor) -> Tensor:
    """`x` rounded as by `quantize_static` and returned in its own dtype; gradients pass straight through."""
    rounded = _round_static(x.detach(), bits, scale).mul_(scale.float()).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def transform_tokens(x: Tensor, equalizer: Tensor | None, rotation: int | None) -> Tensor:
    """Activations times `diag(equalizer) (I x H)`, in fp32.

    Args:
        x: activations [..., channels], any floating dtype.
        equalizer: fp32 [channels], or None.
        rotation: size of the Hadamard blocks along the channels, a power of two, or None.

    Raises:
        SpecError: `rotation` is no power of two or does not divide the channels.
    """
    x = x.float()
    if equalizer is not None:
        x = x * equalizer.float()
    if rotation is not None:
        x = (_split(x, rotation) @ hadamard(rotation, x.device)).reshape(x.shape)
    return x


def hadamard(size: int, device: torch.device | None = None) -> Tensor:
    """Orthogonal, symmetric Hadamard matrix in Sylvester's order, fp32 [size, size]; made once, not to be written to.

    Raises:
        SpecError: `size` is no power of two.
    """
    if size < 1 or size & (size - 1) != 0:
        raise SpecError(f"rotation={size} is no power of two")
    return _hadamard(size, torch.device("cpu") if device is None else device)


@functools.lru_cache(maxsize=16)
def _hadamard(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):  # gradients may flow through it later, whoever asks first
        index = torch.arange(size, device=device)
        common = index.unsqueeze(0) & index.unsqueeze(1)
        for shift in (8, 4, 2, 1):
            common = common ^ (common >> shift)
        matrix: Tensor = (1.0 - 2.0 * (common & 1).float()) * size**-0.5
        return matrix


def quantize(x: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Codes and scales of transformed activations, see `optimum_qvlm.kernels.quantize`."""
    assert rounding.bits is not None
    transformed = transform_tokens(x, rounding.equalizer, rounding.rotation)
    if rounding.scale is not None:
        return quantize_static(transformed, rounding.bits, rounding.scale), rounding.scale.float().clone()
    return quantize_tokens(transformed, rounding.bits, rounding.group, rounding.clip, fitted=rounding.fitted)


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rounding: Rounding) -> Tensor:
    """As `linear`, over a weight [out, in] that is dequantized already, in fp32."""
    return finish(F.linear(round_tokens(x, rounding), weight), bias, x.dtype)


def _round(x: Tensor, bits: int, group: int | None, clip: float, *, fitted: bool) -> tuple[Tensor, Tensor]:
    """Codes [..., groups, channels of a group] as fp32 and scales [..., groups, 1]."""
    grouped = _split(x, group).float()
    qmax = 2 ** (bits - 1) - 1
    top, bottom = grouped.amax(-1, keepdim=True), -grouped.amin(-1, keepdim=True)  # no copy, and vectorised
    # A number that divides is multiplied by its rounded inverse on GPUs; a tensor divides the same way everywhere.
    most = top.new_full((), float(qmax))
    if not fitted:
        scale = torch.maximum(top, bottom) * clip / most
        scale = torch.where(scale > 0, scale, 1.0)  # zeros, and peaks so small that their scale underflows
        return (grouped / scale).round_().clamp_(-qmax, qmax), scale
    whole = torch.maximum(torch.maximum(top, bottom) / (most + 1), torch.minimum(top, bottom) / most) * clip
    scale = _fitted_scale(grouped, torch.where(top > bottom, -whole, whole), qmax)
    return (grouped / scale).round_().clamp_(-qmax - 1, qmax), scale


def fitted_shift(qmax: int) -> int:
    """Errors of a fitted grid are counted in parts of a code, of which there are two to this power: at most 64."""
    return min(6, 9 - (qmax + 1).bit_length() + 1)


def _fitted_scale(grouped: Tensor, whole: Tensor, qmax: int) -> Tensor:
    """Of the scale `whole` [..., groups, 1] times each ratio, that of least squared error; 1 where it is zero.

    Errors are integers, in parts of a code (64ths at 4 bits), so that their sums are the same in any order. What is
    missing is cut at 192 parts, more than the ratios cut off, so that sums of 58,000 channels fit 32 bits.
    """
    shift = fitted_shift(qmax)
    best: Tensor | None = None
    least: Tensor | None = None
    for ratio in FITTED_RATIOS:
        scale = whole * ratio
        scale = torch.where(scale != 0, scale, 1.0)
        steps = (grouped * scale.reciprocal()).clamp_(-2 * qmax, 2 * qmax).mul_(2**shift).round_().to(torch.int32)
        codes = ((steps + 2 ** (shift - 1)) >> shift).clamp_(-qmax - 1, qmax)
        missing = (steps - (codes << shift)).clamp_(-192, 192)
        error = scale * scale * missing.square_().sum(-1, keepdim=True, dtype=torch.int32).float()
        if best is None or least is None:
            best, least = scale, error
        else:
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    assert best is not None
    return best


def _round_static(x: Tensor, bits: int, scale: Tensor) -> Tensor:
    qmax = 2 ** (bits - 1) - 1
    return (x.float() / scale.float()).round_().clamp_(-qmax, qmax)


def _split(x: Tensor, group: int | None) -> Tensor:
    channels = x.shape[-1]
    if group is None:
        return x.unsqueeze(-2)
    if channels % group != 0:
        raise SpecError(f"group={group} does not divide the {channels} channels of the activation")
    grouped: Tensor = x.unflatten(-1, (channels // group, group))
    return grouped


def round_tokens(x: Tensor, rounding: Rounding) -> Tensor:
    """The values that enter the product, fp32 [..., channels]: transformed, then rounded to their grid.

    Where nothing is rounded they are those that the transform gives, in the dtype of `x`.
    """
    transformed = transform_tokens(x, rounding.equalizer, rounding.rotation)
    if rounding.bits is None:
        return transformed.to(x.dtype).float()
    if rounding.scale is not None:
        return _round_static(transformed, rounding.bits, rounding.scale).mul_(rounding.scale.float())
    codes, scale = _round(transformed, rounding.bits, rounding.group, rounding.clip, fitted=rounding.fitted)
    rounded: Tensor = codes.mul_(scale).reshape(x.shape)
    return rounded


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, rounding: Rounding) -> Tensor:
    """`Q(x T) W^T + bias` with products and sums in fp32, [..., out_features] in the dtype of `x`.

    The weight is dequantized in slices of rows, so that no full-precision copy of it exists.
    """
    rounded = round_tokens(x, rounding)
    rows = max(1, SLICE_ELEMENTS // max(1, weight.codes.shape[1]))
    parts = [F.linear(rounded, dequantize_rows(weight, first, first + rows)) for first in _starts(weight, rows)]
    return finish(torch.cat(parts, dim=-1), bias, x.dtype)


def linear_backward(gradient: Tensor, weight: QuantizedWeight, rounding: Rounding) -> Tensor:
    """Gradient to the input, straight through the rounding: `g W T^T`, in the dtype of `gradient`."""
    rows = max(1, SLICE_ELEMENTS // max(1, weight.codes.shape[1]))
    total: Tensor = gradient.new_zeros((*gradient.shape[:-1], weight.codes.shape[1]), dtype=torch.float32)
    for first in _starts(weight, rows):
        part = gradient[..., first : first + rows].float()
        total += part @ dequantize_rows(weight, first, first + rows)
    total = transform_tokens(total, None, rounding.rotation)
    if rounding.equalizer is not None:
        total = total * rounding.equalizer.float()
    return total.to(gradient.dtype)


def dequantize_rows(weight: QuantizedWeight, first: int, last: int) -> Tensor:
    """Rows [first, last) of the weight in fp32, [rows, in_features]."""
    codes, scale = weight.codes[first:last], weight.scale[first:last]
    grouped = codes.unflatten(1, (scale.shape[1], codes.shape[1] // scale.shape[1])).float()
    if weight.zero_point is not None:
        grouped = grouped - weight.zero_point[first:last].unsqueeze(-1).float()
    rows: Tensor = (grouped * scale.unsqueeze(-1).float()).flatten(1)
    return rows


def finish(product: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """fp32 sums plus bias, rounded once to `dtype`."""
    return (product if bias is None else product + bias.float()).to(dtype)


def _starts(weight: QuantizedWeight, rows: int) -> range:
    return range(0, max(1, weight.codes.shape[0]), rows)
