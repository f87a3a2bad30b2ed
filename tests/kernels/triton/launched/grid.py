"""Weights, activations and bounds for tests that launch kernels: in Triton's interpreter, else on a GPU.

`TRITON_INTERPRET=1` has to be set before triton is imported, so one process does one or the other. Without it these
tests need a GPU and are marked so.
"""

import dataclasses
import os

import pytest
import torch
from torch import Tensor

from optimum_qvlm.kernels import LinearGrid, QuantizedWeight, reference
from optimum_qvlm.kernels.triton import layout
from optimum_qvlm.kernels.triton.layout import PackedWeight
from optimum_qvlm.spec import WeightSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MARKS = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
"""The interpreter computes with bf16 as if it were an integer."""

FORMATS = [
    (4, 128), (4, 64), (4, 32), (4, 16), (4, 256), (4, None), (3, 64), (2, None),
    (6, 128), (6, 64), (6, 32), (6, 16), (6, None), (5, 32), (8, None), (7, None),
]  # fmt: skip
"""Bits and group of weights."""

QUICK_FORMATS = [(4, 128), (4, 32), (4, 16), (4, None), (6, 64), (8, None)]
"""Those that `make test` launches in the interpreter, which takes about a second for each."""


def _params(values: list, quick: list) -> list:
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            id=str(value),
            marks=[pytest.mark.slow] if INTERPRETED and value not in quick else [],
        )
        for value in values
    ]


FORMATS_TO_LAUNCH = _params(FORMATS, QUICK_FORMATS)
DTYPES_TO_LAUNCH = _params(DTYPES, DTYPES[:1])

ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""What rounding the same value twice to a dtype can differ by: one unit in the last place."""

ORDER = 2.0**-19
"""Sums in another order, against the sum of magnitudes: sixteen units of fp32, as errors of a few hundred terms add."""


def make_weight(
    rows: int, channels: int, bits: int, group: int | None, *, zero_point: bool = False, seed: int = 0
) -> tuple[QuantizedWeight, LinearGrid]:
    """All codes of `bits`, scales of either sign over three decades."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group is None else channels // group
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (rows, channels), generator=generator).to(torch.int8)
    scale = 10 ** (torch.rand(rows, groups, generator=generator) * 3 - 3)
    scale *= torch.randint(2, (rows, groups), generator=generator) * 2 - 1
    zero = torch.randint(low, high, (rows, groups), generator=generator).to(torch.int8) if zero_point else None
    weight = QuantizedWeight(codes.to(DEVICE), scale.to(DEVICE), None if zero is None else zero.to(DEVICE))
    spec = WeightSpec(bits=bits, group=group, symmetric=not zero_point)
    return weight, LinearGrid(in_features=channels, out_features=rows, weight=spec)


def make_levels(
    rows: int, channels: int, bits: int, group: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[QuantizedWeight, LinearGrid]:
    """All codes of `bits`, scales that are 1 to 15 times a step of each row, of either sign, exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    weight, grid = make_weight(rows, channels, bits, group, seed=seed)
    step = torch.randint(8, 16, (rows, 1), generator=generator) * 2.0 ** torch.randint(
        -9, 0, (rows, 1), generator=generator
    )
    multiples = torch.randint(1, 16, (rows, channels // group), generator=generator)
    multiples *= torch.randint(2, multiples.shape, generator=generator) * 2 - 1
    scale = (step * multiples / 64).to(DEVICE, dtype)
    spec = dataclasses.replace(grid.weight, two_level=True)
    return dataclasses.replace(weight, scale=scale), dataclasses.replace(grid, weight=spec, scale_dtype=dtype)


def pack(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, *, two_level: bool = False
) -> PackedWeight:
    """The weight as the kernels read it; its groups are those of its scales."""
    group = None if scale.shape[1] == 1 else codes.shape[1] // scale.shape[1]
    spec = WeightSpec(bits=bits, group=group, symmetric=zero_point is None, two_level=two_level)
    return layout.pack(QuantizedWeight(codes, scale, zero_point), spec)


def make_activations(tokens: int, channels: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Tensor:
    """Normal values; the first token is zero where there is more than one, the last has an outlier."""
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))
    if tokens > 1:
        x[0] = 0
        x[-1, channels // 2] = 100
    return x.to(device=DEVICE, dtype=dtype)


def assert_product(
    y: Tensor,
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    dense: torch.dtype | None = None,
    order: float | None = None,
) -> None:
    """`y` is `x W^T + bias` up to rounding to its dtype and the order of sums, at every element.

    With `dense` the weight was rounded to that dtype first, and partial sums may have been too, unless `order` says
    what their order can differ by. Without, sums of codes and of zero points are taken apart, so that what cancels
    between them counts too.
    """
    whole = reference.dequantize_rows(weight, 0, weight.codes.shape[0])
    whole = whole.double() if dense is None else whole.to(dense).double()
    exact = x.double() @ whole.T
    parts = whole.abs() if dense is not None or weight.zero_point is None else sizes_of_parts(weight)
    magnitude = x.double().abs() @ parts.T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    if order is None:
        order = ORDER if dense is None else ROUNDING[dense]
    excess = (y.double() - exact).abs() - (ROUNDING[y.dtype] * exact.abs() + order * magnitude)
    assert bool(torch.isfinite(y).all())
    assert float(excess.max()) <= 0


def sizes_of_parts(weight: QuantizedWeight) -> Tensor:
    """Sizes of codes and zero points together, times those of the scales, fp64 [rows, channels]."""
    assert weight.zero_point is not None
    width = weight.codes.shape[1] // weight.scale.shape[1]
    codes = weight.codes.double().abs().unflatten(1, (-1, width))
    sizes = (codes + weight.zero_point.double().abs().unsqueeze(-1)) * weight.scale.double().abs().unsqueeze(-1)
    return sizes.flatten(1)
