"""Quantized linears on GPUs: which kernel runs for how many tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from optimum_qvlm.kernels import reference
from optimum_qvlm.kernels.triton import bytes as triton_bytes
from optimum_qvlm.kernels.triton import digits as triton_digits
from optimum_qvlm.kernels.triton import floats as triton_floats
from optimum_qvlm.kernels.triton import levels as triton_levels
from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.decode import linear_decode
from optimum_qvlm.kernels.triton.dequantize import dequantize
from optimum_qvlm.kernels.triton.launching import ALIGNMENT, Recording, record
from optimum_qvlm.kernels.triton.layout import PackedWeight, is_packable, pack, unpack
from optimum_qvlm.kernels.triton.prefill import linear_prefill
from optimum_qvlm.kernels.triton.quantize import quantize_padded, split, transform
from optimum_qvlm.kernels.weights import LinearGrid, QuantizedWeight, Rounding, StoredWeight

LAYOUT = "triton"

KNOWN = frozenset({"symmetric", "two_level"})

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

RECORDINGS = 8
"""How many counts of tokens a linear remembers its launches for: of decoding, of drafts, of prompts that come again."""


def accepts(grid: LinearGrid, device: torch.device) -> bool:
    """Whether there are kernels for this weight and the activations that meet it, on `device`."""
    fits = grid.activation is None or grid.activation.group in (None, grid.weight.group)
    packs = is_packable(grid.weight.bits, None if grid.groups == 1 else grid.weight.group)
    return fits and packs and tiles.architecture(device) >= tiles.OLDEST


def store(weight: QuantizedWeight, grid: LinearGrid) -> StoredWeight:
    """Codes in the order of the kernels, see `triton.layout`."""
    packed = pack(weight, grid.weight)
    return StoredWeight(LAYOUT, packed.codes, packed.scale, packed.zero_point)


def restore(stored: StoredWeight, grid: LinearGrid) -> QuantizedWeight:
    """Undo `store`."""
    return unpack(_packed(stored, grid))


def linear(x: Tensor, stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid) -> Tensor:
    """`Q(x T) W^T + bias`, [..., out_features] in the dtype of `x`; see `optimum_qvlm.kernels.reference.linear`.

    Sums are fp32 and products exact, except where unrounded activations of more tokens than decoding takes are faster
    multiplied by a weight that was rounded to their dtype first.
    """
    if x.dtype not in DTYPES:
        return reference.linear(x, restore(stored, grid), bias, rounding)
    weight = _packed(stored, grid)
    tokens = x.reshape(-1, grid.in_features)
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    y = _product(tokens, weight, bias, rounding)
    return y.view(*x.shape[:-1], grid.out_features)


def bind(stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid) -> Callable[[Tensor], Tensor]:
    """`linear` with all but the activation; its launches are repeated for activations of a shape that it has met."""
    return _Bound(stored, bias, rounding, grid)


class _Bound:
    def __init__(self, stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid) -> None:
        self.stored, self.bias, self.rounding, self.grid = stored, bias, rounding, grid
        self.weight = _packed(stored, grid)
        read = (stored.values, stored.scale, stored.zero_point, bias, rounding.scale, rounding.equalizer)
        self.constants = [tensor for tensor in read if tensor is not None]
        self.recordings: dict[Any, Recording | None] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if not x.is_cuda or not x.is_contiguous() or x.dtype not in DTYPES or x.numel() == 0:
            return linear(x, self.stored, self.bias, self.rounding, self.grid)
        shape = x.shape
        tokens, dtype = x.numel() // self.grid.in_features, x.dtype
        key = (tokens, dtype, x.data_ptr() % ALIGNMENT)
        out = (*shape[:-1], self.grid.out_features)
        recording = self.recordings.get(key)
        if recording is not None:
            return recording(x, out)
        flat = x.view(tokens, self.grid.in_features)
        if key in self.recordings:
            return _product(flat, self.weight, self.bias, self.rounding).view(out)
        if len(self.recordings) == RECORDINGS:
            self.recordings.pop(next(iter(self.recordings)), None)  # another thread may have done it
        y, self.recordings[key] = record(
            lambda flat: _product(flat, self.weight, self.bias, self.rounding), flat, self.constants
        )
        return y.view(out)


def _product(x: Tensor, weight: PackedWeight, bias: Tensor | None, rounding: Rounding) -> Tensor:
    if rounding.bits is not None:
        if weight.group is None:
            rounding = dataclasses.replace(rounding, group=None)
        codes, scale = quantize_padded(x, rounding, weight.width)
        if triton_levels.takes(codes, scale, weight):
            return triton_levels.linear_levels(codes, scale, weight, bias, x.dtype)
        product = triton_bytes.linear_bytes if triton_bytes.takes(codes, weight) else linear_prefill
        return product(codes, scale, weight, bias, x.dtype)
    if triton_digits.takes(x.shape[0], weight):
        digits, scale = split(x, rounding, weight.width)
        return triton_digits.linear_digits(digits, scale, weight, bias, x.dtype)
    transformed = transform(x, rounding)
    if x.shape[0] <= tiles.DECODE_TOKENS:
        return linear_decode(transformed, weight, bias)
    if triton_floats.takes(transformed, weight):
        return triton_floats.linear_floats(transformed, weight, bias)
    if x.shape[0] < tiles.FLOAT_TOKENS or x.dtype == torch.float32:
        return linear_prefill(transformed, None, weight, bias, x.dtype)
    return F.linear(transformed, dequantize(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def _packed(stored: StoredWeight, grid: LinearGrid) -> PackedWeight:
    return PackedWeight(
        codes=stored.values,
        scale=stored.scale,
        zero_point=stored.zero_point,
        grid=grid.weight,
        in_features=grid.in_features,
    )
