"""Activations of one site in one pass: equalisation, Hadamard rotation, peak, scale, codes.

The rotation is the fast Walsh-Hadamard transform, sums and differences in fp32: as a matrix product, a program would
spend more on the matrix of signs than on its activations.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_qvlm.kernels.reference import FITTED_RATIOS, fitted_shift, transform_tokens
from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.integers import nearest_integers
from optimum_qvlm.kernels.triton.launching import empty, start
from optimum_qvlm.kernels.weights import NOTHING, Rounding

ROTATIONS = (16, 32, 64, 128)
"""Sizes of Hadamard blocks that the kernel applies."""

RATIOS = tl.constexpr(FITTED_RATIOS)


@triton.jit
def quantize_kernel(
    x, equalizer, fixed, out, scales,
    clip, token_stride, out_stride, scale_stride,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROTATION: tl.constexpr,
    EQUALIZED: tl.constexpr, STATIC: tl.constexpr, ROUNDS: tl.constexpr, QMAX: tl.constexpr, FITTED: tl.constexpr,
    SPAN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Codes and scales with ROUNDS, else transformed activations.

    FITTED, 0 for grids that are not, is the `fitted_shift` of those that are.

    One program per token and SPAN of channels; GROUP 0 shares the scale of a token, which one program does alone.
    CHUNK is the power of two at or above SPAN that is held at a time.
    """
    # Tokens times channels pass 2**31 in long batches.
    token = tl.program_id(0).to(tl.int64)
    x += token * token_stride
    out += token * out_stride
    start = tl.program_id(1) * SPAN
    WHOLE: tl.constexpr = ROUNDS and GROUP == 0 and not STATIC
    QMIN: tl.constexpr = -QMAX - 1 if FITTED else -QMAX
    if WHOLE and WIDTH > CHUNK:
        STEPS: tl.constexpr = (CHANNELS + CHUNK - 1) // CHUNK
        top, bottom = 0.0, 0.0
        for step in tl.range(0, STEPS):
            part = _transformed(x, equalizer, step * CHUNK, CHANNELS, CHUNK, CHUNK, ROTATION, EQUALIZED)
            top, bottom = tl.maximum(top, tl.max(part)), tl.maximum(bottom, -tl.min(part))
        scale = _scale(top, bottom, clip, 0, QMAX, FITTED)
        if FITTED:
            second = _scale(top, bottom, clip, 1, QMAX, FITTED)
            third = _scale(top, bottom, clip, 2, QMAX, FITTED)
            errors, errors_2, errors_3 = 0, 0, 0
            for step in tl.range(0, STEPS):
                part = _transformed(x, equalizer, step * CHUNK, CHANNELS, CHUNK, CHUNK, ROTATION, EQUALIZED)
                errors += tl.sum(_missing(part, scale, QMAX, FITTED))
                errors_2 += tl.sum(_missing(part, second, QMAX, FITTED))
                errors_3 += tl.sum(_missing(part, third, QMAX, FITTED))
            scale = _best(scale, second, third, errors, errors_2, errors_3)
        tl.store(scales + token * scale_stride, scale)
        for step in tl.range(0, (WIDTH + CHUNK - 1) // CHUNK):
            part = _transformed(x, equalizer, step * CHUNK, CHANNELS, CHUNK, CHUNK, ROTATION, EQUALIZED)
            _write(out, part, scale, step * CHUNK, WIDTH, CHUNK, CHUNK, QMIN, QMAX, ROUNDS)
    else:
        part = _transformed(x, equalizer, start, CHANNELS, SPAN, CHUNK, ROTATION, EQUALIZED)
        if not ROUNDS:
            _write(out, part, 1.0, start, WIDTH, SPAN, CHUNK, QMIN, QMAX, ROUNDS)
        elif STATIC:
            _write(out, part, tl.load(fixed), start, WIDTH, SPAN, CHUNK, QMIN, QMAX, ROUNDS)
        else:
            ROWS: tl.constexpr = 1 if GROUP == 0 or SPAN != CHUNK else CHUNK // GROUP
            part = tl.reshape(part, (ROWS, CHUNK // ROWS))
            top, bottom = tl.max(part, axis=1), -tl.min(part, axis=1)
            scale = _scale(top, bottom, clip, 0, QMAX, FITTED)
            if FITTED:
                second = _scale(top, bottom, clip, 1, QMAX, FITTED)
                third = _scale(top, bottom, clip, 2, QMAX, FITTED)
                errors = tl.sum(_missing(part, scale[:, None], QMAX, FITTED), axis=1)
                errors_2 = tl.sum(_missing(part, second[:, None], QMAX, FITTED), axis=1)
                errors_3 = tl.sum(_missing(part, third[:, None], QMAX, FITTED), axis=1)
                scale = _best(scale, second, third, errors, errors_2, errors_3)
            if ROWS == 1:
                group = tl.program_id(1) + tl.arange(0, 1)
                tl.store(scales + token * scale_stride + group, scale)
            else:
                group = start // GROUP + tl.arange(0, ROWS)
                tl.store(scales + token * scale_stride + group, scale, mask=group < WIDTH // GROUP)
            _write(out, part, scale[:, None], start, WIDTH, SPAN, CHUNK, QMIN, QMAX, ROUNDS)


@triton.jit
def _transformed(
    x, equalizer, start,
    CHANNELS: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr,
    ROTATION: tl.constexpr, EQUALIZED: tl.constexpr,
):  # fmt: skip
    """Transformed activations of a chunk, fp32 [CHUNK]; zeros past the channels or the span."""
    inside = tl.arange(0, CHUNK)
    channel = start + inside
    mask = (channel < CHANNELS) & (inside < SPAN)
    values = tl.load(x + channel, mask=mask, other=0.0).to(tl.float32)
    if EQUALIZED:
        values = values * tl.load(equalizer + channel, mask=mask, other=0.0).to(tl.float32)
    if ROTATION != 0:
        SIZE_ROOT: tl.constexpr = ROTATION**-0.5
        values = _butterflies(values, CHUNK, ROTATION) * SIZE_ROOT
    return values


@triton.jit
def _butterflies(values, CHUNK: tl.constexpr, SIZE: tl.constexpr):
    """`values` [CHUNK] times Sylvester's matrix of ones and minus ones, in blocks of SIZE: sums and differences."""
    if SIZE > 1:
        HALF: tl.constexpr = SIZE // 2
        values = _butterflies(values, CHUNK, HALF)
        left, right = tl.split(tl.permute(tl.reshape(values, (CHUNK // SIZE, 2, HALF)), (0, 2, 1)))
        values = tl.reshape(tl.permute(tl.join(left + right, left - right), (0, 2, 1)), (CHUNK,))
    return values


@triton.jit
def _scale(top, bottom, clip, NUMBER: tl.constexpr, QMAX: tl.constexpr, FITTED: tl.constexpr):
    """Scales for the largest value and the largest negated one; FITTED, that of the ratio with this NUMBER."""
    if FITTED:
        RATIO: tl.constexpr = RATIOS[NUMBER]
        peak, other = tl.maximum(top, bottom), tl.minimum(top, bottom)
        scale = tl.maximum(tl.div_rn(peak, QMAX + 1.0), tl.div_rn(other, QMAX * 1.0)) * clip
        scale = tl.where(top > bottom, -scale, scale) * RATIO
        scale = tl.where(scale != 0, scale, 1.0)
    else:
        scale = tl.div_rn(tl.maximum(top, bottom) * clip, QMAX * 1.0)
        scale = tl.where(scale > 0, scale, 1.0)
    return scale


@triton.jit
def _missing(values, scale, QMAX: tl.constexpr, SHIFT: tl.constexpr):
    """Squares of what codes miss, in parts of one: integers, whose sum is the same in any order."""
    PARTS: tl.constexpr = 1 << SHIFT
    steps = values * tl.div_rn(1.0, scale)
    steps = tl.minimum(tl.maximum(steps, -2.0 * QMAX), 2.0 * QMAX) * PARTS
    steps = nearest_integers(steps)
    codes = tl.minimum(tl.maximum((steps + PARTS // 2) >> SHIFT, -QMAX - 1), QMAX)
    missing = tl.minimum(tl.maximum(steps - (codes << SHIFT), -192), 192)
    return missing * missing


@triton.jit
def _best(first, second, third, errors, errors_2, errors_3):
    """The scale of least error, the first of equals."""
    least, least_2 = first * first * errors.to(tl.float32), second * second * errors_2.to(tl.float32)
    least_3 = third * third * errors_3.to(tl.float32)
    best = tl.where(least_2 < least, second, first)
    return tl.where(least_3 < tl.minimum(least, least_2), third, best)


@triton.jit
def _write(
    out, values, scale, start,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    inside = tl.arange(0, CHUNK)
    mask = (start + inside < WIDTH) & (inside < SPAN)
    if not ROUNDS:
        tl.store(out + start + inside, values.to(out.dtype.element_ty), mask=mask)
    else:
        steps = tl.minimum(tl.maximum(tl.div_rn(values, scale), QMIN), QMAX)
        # Flat, so that neighbouring channels are written at once.
        codes = tl.reshape(nearest_integers(steps).to(tl.int8), (CHUNK,))
        tl.store(out + start + inside, codes, mask=mask)


@triton.jit
def split_kernel(
    x, equalizer, out, scales,
    token_stride,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROTATION: tl.constexpr, EQUALIZED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Transformed activations, rounded to the dtype of `x`, as four digits, out [tokens, 4, WIDTH], times `scales`.

    One program per token and 128 channels, whose scale is the power of two that fills the digits. What follows CHAINED
    programs may start with them.
    """
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    # Tokens times channels pass 2**31 in long batches.
    token = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * 128
    values = _transformed(x + token * token_stride, equalizer, start, CHANNELS, 128, 128, ROTATION, EQUALIZED)
    values = values.to(x.dtype.element_ty).to(tl.float32)
    # The exponent of the largest, from the bits of a float: integers stay below 2**30, and no factor is subnormal.
    exponent = tl.maximum(tl.max(tl.abs(values)).to(tl.int32, bitcast=True) >> 23, 30)
    scale = ((exponent - 29) << 23).to(tl.float32, bitcast=True)
    inverse = ((283 - exponent) << 23).to(tl.float32, bitcast=True)
    # Digits from -128 to 127: what is added carries into the next one, and flipping a sign bit takes it off again.
    digits = ((values * inverse).to(tl.int32) + 0x808080) ^ 0x808080
    # Infinities and what is no number have no digits, so their scale is none either.
    scale += tl.sum(values * 0.0)
    tl.store(scales + token * (WIDTH // 128) + tl.program_id(1), scale)
    place = out + token * (4 * WIDTH) + start + tl.arange(0, 128)
    for digit in tl.static_range(0, 4):
        tl.store(place + digit * WIDTH, (digits >> (8 * digit)).to(tl.int8))


def fuses(rounding: Rounding) -> bool:
    """Whether the kernel applies the rotation of `rounding`; the definition does it before the kernel otherwise."""
    rotation, group = rounding.rotation, rounding.group
    if rotation is None:
        return True
    return rotation in ROTATIONS and (group is None or group.bit_count() == 1 or group % rotation == 0)


def quantize(x: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Codes and scales of transformed activations.

    Args:
        x: [..., channels], floating.
        rounding: bits 2..8; its group divides the channels.

    Returns:
        int8 codes of the shape of `x` and fp32 scales [..., groups], or [1] on a static grid.
    """
    codes, scale = quantize_padded(_flat(x), rounding, x.shape[-1])
    if rounding.scale is not None:
        return codes.view(x.shape), rounding.scale.float().clone()
    return codes.view(x.shape), scale.view(*x.shape[:-1], scale.shape[1])


def quantize_padded(x: Tensor, rounding: Rounding, width: int) -> tuple[Tensor, Tensor]:
    """Codes [tokens, width] of [tokens, channels] and scales [tokens, width / group], or [1] as given.

    Columns past the channels get code 0, and their groups scale 1.
    """
    x, rounding = _rotated(x, rounding)
    codes = empty(x, x.shape[0], width, dtype=torch.int8)
    if rounding.scale is not None:
        scale = rounding.scale
    else:
        groups = 1 if rounding.group is None else width // rounding.group
        scale = empty(x, x.shape[0], groups, dtype=torch.float32)
    _launch(x, rounding, codes, scale)
    return codes, scale


def transform(x: Tensor, rounding: Rounding) -> Tensor:
    """Transformed activations [tokens, channels] in the dtype of `x`; `x` itself where there is nothing to do."""
    if rounding.equalizer is None and rounding.rotation is None:
        return x
    if not fuses(rounding):
        return transform_tokens(x, rounding.equalizer, rounding.rotation).to(x.dtype)
    transformed = empty(x, *x.shape)
    _launch(x, rounding, transformed, transformed)
    return transformed


def split(x: Tensor, rounding: Rounding, width: int) -> tuple[Tensor, Tensor]:
    """Transformed activations, rounded to the dtype of `x`, as int8 digits and powers of two.

    Args:
        x: [tokens, channels], floating, rows contiguous.
        width: channels with padding, a multiple of 128; columns past the channels get digits 0.

    Returns:
        int8 digits [tokens, 4, width], of which the first weighs 1 and the others 256 times the one before, and fp32
        scales [tokens, width / 128].
    """
    if not fuses(rounding):
        x, rounding = transform(x, rounding), NOTHING
    tokens, channels = x.shape
    digits = empty(x, tokens, 4, width, dtype=torch.int8)
    scale = empty(x, tokens, width // 128, dtype=torch.float32)
    if digits.numel() == 0:
        return digits, scale
    arguments = {
        "x": x,
        "equalizer": x if rounding.equalizer is None else rounding.equalizer,
        "out": digits,
        "scales": scale,
        "token_stride": x.stride(0),
        "CHANNELS": channels,
        "WIDTH": width,
        "ROTATION": 0 if rounding.rotation is None else rounding.rotation,
        "EQUALIZED": rounding.equalizer is not None,
        "CHAINED": tiles.chains(x.device),
    }
    start(split_kernel, (tokens, width // 128), arguments, x.device, num_warps=1)
    return digits, scale


def _flat(x: Tensor) -> Tensor:
    """[tokens, channels] with contiguous rows."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _rotated(x: Tensor, rounding: Rounding) -> tuple[Tensor, Rounding]:
    """Activations and what is left for the kernel to do with them."""
    if fuses(rounding):
        return x, rounding
    transformed = transform_tokens(x, rounding.equalizer, rounding.rotation)
    return transformed, dataclasses.replace(rounding, equalizer=None, rotation=None)


def _launch(x: Tensor, rounding: Rounding, out: Tensor, scale: Tensor) -> None:
    tokens, channels = x.shape
    width = out.shape[1]
    if tokens == 0 or width == 0:
        return
    bits = rounding.bits if out.dtype == torch.int8 else None
    rounds, static = bits is not None, rounding.scale is not None
    group = rounding.group if rounds and not static else None
    whole = rounds and group is None and not static
    qmax = 0 if bits is None else 2 ** (bits - 1) - 1
    tile = tiles.quantize_tile(width, group, rounding.rotation, whole=whole)
    arguments = {
        "x": x,
        "equalizer": x if rounding.equalizer is None else rounding.equalizer,
        "fixed": x if rounding.scale is None else rounding.scale,
        "out": out,
        "scales": scale,
        "clip": rounding.clip,
        "token_stride": x.stride(0),
        "out_stride": out.stride(0),
        "scale_stride": scale.stride(0),
        "CHANNELS": channels,
        "WIDTH": width,
        "GROUP": 0 if group is None else group,
        "ROTATION": 0 if rounding.rotation is None else rounding.rotation,
        "EQUALIZED": rounding.equalizer is not None,
        "STATIC": static,
        "ROUNDS": rounds,
        "QMAX": qmax,
        "FITTED": fitted_shift(qmax) if rounding.fitted and rounds and not static else 0,
        "SPAN": tile.span,
        "CHUNK": tile.chunk,
    }
    grid = (tokens, 1 if whole else -(-width // tile.span))
    start(quantize_kernel, grid, arguments, x.device, num_warps=tile.warps)
