"""Four bits for PyTorch's int4 operator, on whatever CPU this is: what is lost, what is computed, when it is chosen."""

import dataclasses

import pytest
import torch
from torch import Tensor

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels import NOTHING, LinearGrid, QuantizedWeight, Rounding, dispatch, reference
from optimum_qvlm.kernels.cpu import int4 as cpu_int4
from optimum_qvlm.kernels.cpu import processor
from optimum_qvlm.spec import ActivationSpec, WeightSpec

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")

# Relative to the sum of magnitudes: fp32 sums, one after the other over all channels in the operator.
SUM_TOLERANCE = 2e-6
# Relative to the output: one rounding; in bf16 also that of the product before a bias is added to it.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Relative to the sum of magnitudes: a weight rounded to bf16.
WEIGHT_ROUNDING = 2.0**-8

OTHERS = [
    {"scale_dtype": torch.float32},
    {"scale_dtype": torch.float16},
    {"weight": WeightSpec(bits=4, group=16)},
    {"weight": WeightSpec(bits=3, group=64)},
    {"weight": WeightSpec(bits=8, group=64)},
]
"""What the layout does not hold, of a grid that it holds."""


def grid_of(
    in_features: int = 256, out_features: int = 100, group: int | None = 64, *, zero_point: bool = False
) -> LinearGrid:
    return LinearGrid(
        in_features=in_features,
        out_features=out_features,
        weight=WeightSpec(bits=4, group=group, symmetric=not zero_point),
        scale_dtype=torch.bfloat16,
    )


def make_weight(grid: LinearGrid, seed: int = 0) -> QuantizedWeight:
    """Every code and zero point, scales of both signs, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (grid.out_features, grid.in_features), generator=generator).to(torch.int8)
    scale = torch.randn(grid.out_features, grid.groups, generator=generator).to(grid.scale_dtype)
    scale[0, 0] = 0
    zero = torch.randint(-8, 8, scale.shape, generator=generator).to(torch.int8) if not grid.weight.symmetric else None
    return QuantizedWeight(codes, scale, zero)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def require_close(
    found: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, rounding: Rounding, *, rounded: bool
) -> None:
    """`found` against the definition in double precision; `rounded` where weights are rounded to bf16."""
    rows = reference.dequantize_rows(weight, 0, weight.codes.shape[0]).double()
    values = reference.round_tokens(x, rounding).double()
    product, size = values @ rows.T, values.abs() @ rows.abs().T
    expected = product if bias is None else product + bias.double()
    allowed = SUM_TOLERANCE * size + ROUNDING[x.dtype] * (product.abs() + expected.abs()) + 1e-30
    if rounded:
        allowed = allowed + WEIGHT_ROUNDING * size
    assert found.dtype == x.dtype and found.shape == expected.shape
    assert bool(((found.double() - expected).abs() <= allowed).all())


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize(
    "sizes", [(32, 1, 32), (96, 33, 32), (256, 64, None), (512, 130, 256), (128, 128, 64)], ids=str
)
def test_codes_scales_and_zero_points_come_back_bit_for_bit(sizes, zero_point):
    """Also where a scale is zero, negative, subnormal or so large that a zero of the operator overflows."""
    grid = grid_of(*sizes, zero_point=zero_point)
    weight = make_weight(grid)
    weight.scale[-1, -1], weight.scale[:, 0] = -1e-40, 3e38

    found = dispatch.restore(dispatch.store(weight, grid, cpu_int4.LAYOUT), grid)

    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(bits_of(found.scale), bits_of(weight.scale))
    assert (found.zero_point is None) if weight.zero_point is None else torch.equal(found.zero_point, weight.zero_point)


def test_bytes_are_those_that_pytorch_packs():
    """The operator reads no others; a release that packs otherwise must not go unnoticed."""
    grid = grid_of(128, 128, 32)
    weight = make_weight(grid)

    stored = cpu_int4.store(weight, grid)

    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int() + 8, 1)
    assert torch.equal(stored.values.flatten(), packed.flatten())


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 256, None])
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 16, 17, 49, 70])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fast", [False, True])
def test_the_definition_is_computed_for_any_number_of_tokens(monkeypatch, zero_point, group, tokens, dtype, fast):
    """By the operator and by slices, on CPUs that multiply bf16 fast and on others."""
    monkeypatch.setattr(processor, "multiplies_bf16", lambda: fast)
    grid = grid_of(256, 100, group, zero_point=zero_point)
    weight, x, bias = make_weight(grid), random(tokens, 256, dtype=dtype), random(100, dtype=dtype, seed=2)

    found = dispatch.linear(x, cpu_int4.store(weight, grid), bias, NOTHING, grid)

    rounded = dtype == torch.bfloat16 and fast and tokens > cpu_int4.FEW_TOKENS[True]
    require_close(found, x, weight, bias, NOTHING, rounded=rounded)


@pytest.mark.parametrize("out_features", [1, 31, 64, 65, 200])
@pytest.mark.parametrize("shape", [(128,), (2, 3, 128), (2, 30, 128), (0, 3, 128)], ids=str)
def test_sizes_need_not_be_whole_blocks(out_features, shape):
    """The operator takes multiples of 16 output channels; padded ones must not be seen."""
    grid = grid_of(128, out_features, 32)
    weight, x = make_weight(grid), random(*shape)

    found = cpu_int4.linear(x, cpu_int4.store(weight, grid), None, NOTHING, grid)

    require_close(found, x, weight, None, NOTHING, rounded=processor.multiplies_bf16())


@pytest.mark.parametrize("tokens", [2, 20])
def test_transposed_and_strided_activations_are_taken(tokens):
    grid = grid_of()
    weight = make_weight(grid)
    stored = cpu_int4.store(weight, grid)
    for x in (random(256, tokens).T, random(tokens, 512)[:, ::2]):
        require_close(
            cpu_int4.linear(x, stored, None, NOTHING, grid), x, weight, None, NOTHING,
            rounded=processor.multiplies_bf16(),
        )  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    "rounding",
    [
        Rounding(equalizer=torch.linspace(0.5, 2.0, 256), rotation=64),
        Rounding(bits=8),
        Rounding(bits=4, group=64, rotation=32),
        Rounding(bits=8, scale=torch.tensor([0.03])),
    ],
    ids=["transformed", "token", "group", "static"],
)
def test_activations_are_transformed_and_rounded_as_the_definition_says(rounding, tokens):
    """Rounded ones are multiplied in fp32: their scales are not bf16."""
    grid = dataclasses.replace(grid_of(zero_point=True), decode_tokens=1)
    weight, x = make_weight(grid), random(tokens, 256)

    found = cpu_int4.linear(x, cpu_int4.store(weight, grid), None, rounding, grid)

    require_close(
        found, x, weight, None, rounding, rounded=rounding.bits is None and tokens > 16 and processor.multiplies_bf16()
    )


def test_zero_points_lose_nothing_to_the_bf16_of_the_operator():
    """Seven times a scale does not fit into bf16. With equal activations its rounding would add up, not average out."""
    grid = grid_of(256, 64, 64, zero_point=True)
    generator = torch.Generator().manual_seed(0)
    scale = (1 + torch.rand(64, 4, generator=generator)).bfloat16()
    codes = torch.full((64, 256), 7, dtype=torch.int8)
    weight = QuantizedWeight(codes, scale, torch.full((64, 4), 7, dtype=torch.int8))

    found = cpu_int4.linear(torch.ones(1, 256).bfloat16(), cpu_int4.store(weight, grid), None, NOTHING, grid)

    assert found.abs().max() <= 256 * 2 * 7 * SUM_TOLERANCE


@pytest.mark.parametrize("instructions", ["AVX512", "AVX2"])
def test_it_is_chosen_where_it_is_fast_and_holds_the_weight_as_it_is(monkeypatch, instructions):
    """Rounding fp32 scales to bf16 would change the model; rounded activations would need slices for every token."""
    monkeypatch.setattr(processor, "instructions", lambda: instructions)
    grid = grid_of()
    rounds = dataclasses.replace(grid, activation=ActivationSpec(bits=8))

    assert cpu_int4.accepts(grid, CPU) and dispatch.choose_layout(grid, CPU) == cpu_int4.LAYOUT
    assert cpu_int4.accepts(dataclasses.replace(rounds, decode_tokens=16), CPU)
    assert not cpu_int4.accepts(rounds, CPU)
    for other in OTHERS:
        assert not cpu_int4.accepts(dataclasses.replace(grid, **other), CPU)
    assert not cpu_int4.accepts(grid, torch.device("cuda"))


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_what_would_lose_something_is_refused(other):
    grid = dataclasses.replace(grid_of(), **other)

    with pytest.raises(SpecError, match=r"the layout 'int4' holds 4 bits in groups of .* with scales in bfloat16, got"):
        cpu_int4.store(make_weight(grid), grid)


def test_blocks_of_another_instruction_set_are_refused(monkeypatch):
    """A module that was pickled on another machine: the operator would take its bytes in the wrong order."""
    grid = grid_of()
    stored = cpu_int4.store(make_weight(grid), grid)
    here, other = ("AVX512", "AVX2") if processor.instructions() == "AVX512" else ("AVX2", "AVX512")
    monkeypatch.setattr(processor, "instructions", lambda: other)

    with pytest.raises(SpecError, match=f"blocks of {cpu_int4.BLOCKS[here]} output .* with {other}, .*load the checkp"):
        cpu_int4.linear(random(1, 256), stored, None, NOTHING, grid)


def test_instructions_without_a_layout_are_named(monkeypatch):
    grid = grid_of()
    monkeypatch.setattr(processor, "instructions", lambda: "DEFAULT")

    assert not cpu_int4.accepts(grid, CPU) and dispatch.choose_layout(grid, CPU) == "table"
    with pytest.raises(SpecError, match="the layout 'int4' needs AVX512 or AVX2, PyTorch runs here with DEFAULT"):
        cpu_int4.store(make_weight(grid), grid)
