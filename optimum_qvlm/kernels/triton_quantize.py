"""Activations of one site in one pass: equalisation, Hadamard rotation, peak, scale, codes.

The rotation is a matrix product with a matrix of signs. Operands of tensor cores have 16 bits, so equalised activations
are split into three bf16 parts whose sum they are: products are exact, and only the sums round, in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_qvlm.kernels import tiles

FLOATS, CODES, ROUNDED = 0, 1, 2
"""What `quantize_kernel` writes: transformed activations, integer codes, or codes times scales."""


@triton.jit
def quantize_kernel(
    x, equalizer, fixed, out, scales,
    clip, token_stride, out_stride, scale_stride,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ROTATION: tl.constexpr,
    EQUALIZED: tl.constexpr, STATIC: tl.constexpr, OUTPUT: tl.constexpr, QMAX: tl.constexpr,
    SPAN: tl.constexpr, CHUNK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program per token and SPAN of channels; GROUP 0 shares the scale of a token, which one program does alone.

    CHUNK is the power of two at or above SPAN that is held at a time.
    """
    # Tokens times channels pass 2**31 in long batches.
    token = tl.program_id(0).to(tl.int64)
    x += token * token_stride
    out += token * out_stride
    start = tl.program_id(1) * SPAN
    WHOLE: tl.constexpr = OUTPUT != 0 and GROUP == 0 and not STATIC
    if WHOLE and WIDTH > CHUNK:
        peak = 0.0
        for step in tl.range(0, (CHANNELS + CHUNK - 1) // CHUNK):
            part = _transformed(x, equalizer, step * CHUNK, CHANNELS, CHUNK, CHUNK, ROTATION, EQUALIZED, ASM)
            peak = tl.maximum(peak, tl.max(tl.abs(part)))
        scale = _scale(peak, clip, QMAX)
        tl.store(scales + token * scale_stride, scale)
        for step in tl.range(0, (WIDTH + CHUNK - 1) // CHUNK):
            part = _transformed(x, equalizer, step * CHUNK, CHANNELS, CHUNK, CHUNK, ROTATION, EQUALIZED, ASM)
            _write(out, part, scale, step * CHUNK, WIDTH, CHUNK, CHUNK, QMAX, OUTPUT)
    else:
        part = _transformed(x, equalizer, start, CHANNELS, SPAN, CHUNK, ROTATION, EQUALIZED, ASM)
        if OUTPUT == 0:
            _write(out, part, 1.0, start, WIDTH, SPAN, CHUNK, QMAX, OUTPUT)
        elif STATIC:
            _write(out, part, tl.load(fixed), start, WIDTH, SPAN, CHUNK, QMAX, OUTPUT)
        elif GROUP == 0 or SPAN != CHUNK:
            scale = _scale(tl.max(tl.abs(part)), clip, QMAX)
            tl.store(scales + token * scale_stride + tl.program_id(1), scale)
            _write(out, part, scale, start, WIDTH, SPAN, CHUNK, QMAX, OUTPUT)
        else:
            part = tl.reshape(part, (CHUNK // GROUP, GROUP))
            scale = _scale(tl.max(tl.abs(part), axis=1), clip, QMAX)
            group = start // GROUP + tl.arange(0, CHUNK // GROUP)
            tl.store(scales + token * scale_stride + group, scale, mask=group < WIDTH // GROUP)
            _write(out, part, scale[:, None], start, WIDTH, SPAN, CHUNK, QMAX, OUTPUT)


@triton.jit
def _transformed(
    x, equalizer, start,
    CHANNELS: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr,
    ROTATION: tl.constexpr, EQUALIZED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Transformed activations of a chunk, fp32 [CHUNK]; zeros past the channels or the span."""
    inside = tl.arange(0, CHUNK)
    channel = start + inside
    mask = (channel < CHANNELS) & (inside < SPAN)
    values = tl.load(x + channel, mask=mask, other=0.0).to(tl.float32)
    if EQUALIZED:
        values = values * tl.load(equalizer + channel, mask=mask, other=0.0).to(tl.float32)
    if ROTATION != 0:
        blocks = tl.reshape(values, (CHUNK // ROTATION, ROTATION))
        if not ASM:
            blocks = tl.dot(blocks, _hadamard_signs(ROTATION, tl.float32), input_precision="ieee")
        elif EQUALIZED or x.dtype.element_ty == tl.float32:
            signs = _hadamard_signs(ROTATION, tl.bfloat16)
            high, middle, rest = split_in_three(blocks)
            blocks = tl.dot(rest.to(tl.bfloat16), signs)
            blocks = tl.dot(middle.to(tl.bfloat16), signs, blocks)
            blocks = tl.dot(high.to(tl.bfloat16), signs, blocks)
        else:
            DTYPE: tl.constexpr = x.dtype.element_ty
            blocks = tl.dot(blocks.to(DTYPE), _hadamard_signs(ROTATION, DTYPE))
        SIZE_ROOT: tl.constexpr = ROTATION**-0.5
        values = tl.reshape(blocks * SIZE_ROOT, (CHUNK,))
    return values


@triton.jit
def _hadamard_signs(SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Sylvester's matrix of ones and minus ones [SIZE, SIZE]: the parity of the common bits of the indices."""
    index = tl.arange(0, SIZE)
    common = index[:, None] & index[None, :]
    common = common ^ (common >> 4)
    odd = (0x6996 >> (common & 15)) & 1
    return (1 - 2 * odd).to(DTYPE)


@triton.jit
def split_in_three(values):
    """fp32 as a sum of three that have at most eight significant bits each, so that bf16 holds them exactly."""
    high = _leading_bits(values)
    rest = values - high
    middle = _leading_bits(rest)
    return high, middle, rest - middle


@triton.jit
def _leading_bits(values):
    return (values.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _scale(peak, clip, QMAX: tl.constexpr):
    scale = tl.div_rn(peak * clip, QMAX * 1.0)
    return tl.where(scale > 0, scale, 1.0)


@triton.jit
def _write(
    out, values, scale, start,
    WIDTH: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, QMAX: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    inside = tl.reshape(tl.arange(0, CHUNK), values.shape)
    mask = (start + inside < WIDTH) & (inside < SPAN)
    if OUTPUT == 0:
        tl.store(out + start + inside, values.to(out.dtype.element_ty), mask=mask)
    else:
        steps = tl.minimum(tl.maximum(tl.div_rn(values, scale), -QMAX), QMAX)
        # Adding 1.5 * 2**23 leaves the integer nearest, halves to even, in the low bits.
        codes = (steps + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        if OUTPUT == 1:
            tl.store(out + start + inside, codes.to(tl.int8), mask=mask)
        else:
            tl.store(out + start + inside, (codes.to(tl.float32) * scale).to(out.dtype.element_ty), mask=mask)


def quantize_tokens(
    x: Tensor,
    bits: int,
    group: int | None,
    clip: float,
    *,
    equalizer: Tensor | None = None,
    rotation: int | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of transformed activations.

    Args:
        x: [tokens, channels], floating, rows contiguous.
        bits: 2..8.
        group: channels that share a scale, a power of two or what `rotation` divides; None shares the token.
        clip: ratio of the peak that maps to the largest code.
        equalizer: fp32 [channels], or None.
        rotation: 16, 32, 64, 128 or None.
        width: columns to write, at least the channels; the others get code 0, and their groups scale 1.

    Returns:
        int8 codes [tokens, width] and fp32 scales [tokens, width / group] or [tokens, 1].
    """
    width = x.shape[1] if width is None else width
    codes = x.new_empty(x.shape[0], width, dtype=torch.int8)
    scale = x.new_empty(x.shape[0], 1 if group is None else width // group, dtype=torch.float32)
    _launch(x, (equalizer, None), codes, scale, (bits, group, clip, rotation), CODES)
    return codes, scale


def quantize_static(
    x: Tensor,
    bits: int,
    scale: Tensor,
    *,
    equalizer: Tensor | None = None,
    rotation: int | None = None,
    width: int | None = None,
) -> Tensor:
    """int8 codes [tokens, width] of transformed activations with the fixed fp32 `scale` [1]; see `quantize_tokens`."""
    codes = x.new_empty(x.shape[0], x.shape[1] if width is None else width, dtype=torch.int8)
    _launch(x, (equalizer, scale), codes, scale, (bits, None, 1.0, rotation), CODES)
    return codes


def round_tokens(
    x: Tensor,
    bits: int,
    group: int | None,
    clip: float,
    *,
    static_scale: Tensor | None = None,
    equalizer: Tensor | None = None,
    rotation: int | None = None,
) -> Tensor:
    """Transformed activations on their grid, codes times scales, in the dtype of `x`; see `quantize_tokens`."""
    rounded = torch.empty_like(x, memory_format=torch.contiguous_format)
    scale = x.new_empty(x.shape[0], 1 if group is None else x.shape[1] // group, dtype=torch.float32)
    _launch(x, (equalizer, static_scale), rounded, scale, (bits, group, clip, rotation), ROUNDED)
    return rounded


def transform_tokens(x: Tensor, equalizer: Tensor | None, rotation: int | None) -> Tensor:
    """Transformed activations in the dtype of `x`, [tokens, channels]; see `quantize_tokens`."""
    transformed = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, (equalizer, None), transformed, transformed, (8, None, 1.0, rotation), FLOATS)
    return transformed


def _launch(
    x: Tensor,
    factors: tuple[Tensor | None, Tensor | None],
    out: Tensor,
    scale: Tensor,
    grid: tuple[int, int | None, float, int | None],
    output: int,
) -> None:
    equalizer, static_scale = factors
    bits, group, clip, rotation = grid
    tokens, channels = x.shape
    width = out.shape[1]
    if tokens == 0 or width == 0:
        return
    whole = output != FLOATS and group is None and static_scale is None
    tile = tiles.quantize_tile(width, group, rotation, whole=whole)
    programs = 1 if whole else triton.cdiv(width, tile.span)
    with torch.cuda.device_of(x):
        quantize_kernel[(tokens, programs)](
            x,
            x if equalizer is None else equalizer,
            x if static_scale is None else static_scale,
            out,
            scale,
            clip,
            x.stride(0),
            out.stride(0),
            scale.stride(0),
            CHANNELS=channels,
            WIDTH=width,
            GROUP=0 if group is None else group,
            ROTATION=0 if rotation is None else rotation,
            EQUALIZED=equalizer is not None,
            STATIC=static_scale is not None,
            OUTPUT=output,
            QMAX=2 ** (bits - 1) - 1,
            SPAN=tile.span,
            CHUNK=tile.chunk,
            ASM=tiles.speaks_ptx(x.device),
            num_warps=tile.warps,
        )
