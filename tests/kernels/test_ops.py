"""The operations as PyTorch sees them: schemas, tracing, gradients, and what each layout computes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels import LinearGrid, QuantizedWeight, Rounding, quantize, reference
from optimum_qvlm.kernels.cpu import int4 as cpu_int4
from optimum_qvlm.kernels.reference import quantize_static, quantize_tokens, transform_tokens
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.spec import ActivationSpec, WeightSpec
from tests.op_arguments import arguments_of

FLOATS = [torch.float32, torch.float16, torch.bfloat16]

# Sums in another order, relative to the sum of magnitudes; then one rounding to the dtype of the output.
SUM_TOLERANCE = 2e-6
OUTPUT_TOLERANCE = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

# In bf16 the layout "int4" may round weights, and rounds the product before a bias is added to it.
INT4_TOLERANCE = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 2.0**-8}

SCHEMES = {
    "w4a16": (4, 16, None),
    "w4a8": (4, 16, 8),
    "w4a4": (4, 16, 4),
    "w6a6": (6, 16, 6),
    "w8a8": (8, None, 8),
    "w3a16": (3, 32, None),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_weight(grid: LinearGrid, seed: int = 0) -> QuantizedWeight:
    """Every code of the grid, in random places, and scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (grid.weight.bits - 1)), 2 ** (grid.weight.bits - 1)
    codes = torch.randint(low, high, (grid.out_features, grid.in_features), generator=generator).to(torch.int8)
    sizes = torch.rand(grid.out_features, grid.groups, generator=generator) + 0.1
    scale = (sizes * (1 - 2 * torch.randint(0, 2, sizes.shape, generator=generator))).to(grid.scale_dtype)
    zero = (
        torch.randint(low, high, scale.shape, generator=generator).to(torch.int8) if not grid.weight.symmetric else None
    )
    return QuantizedWeight(codes, scale, zero)


def require_close(
    found: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, rounding: Rounding, layout: str
) -> None:
    """`found` against the definition in double precision."""
    rows = reference.dequantize_rows(weight, 0, weight.codes.shape[0]).double()
    values = reference.round_tokens(x, rounding).double()
    expected = values @ rows.T + (0 if bias is None else bias.double())
    size = values.abs() @ rows.abs().T + (0 if bias is None else bias.double().abs())
    allowed = SUM_TOLERANCE * size + OUTPUT_TOLERANCE[x.dtype] * expected.abs() + 1e-30
    if layout == cpu_int4.LAYOUT:
        allowed = allowed + INT4_TOLERANCE[x.dtype] * size
    assert found.dtype == x.dtype and found.shape == expected.shape
    assert bool(((found.double() - expected).abs() <= allowed).all())


def make_module(scheme: str, *, in_features: int = 64, out_features: int = 48, bias: bool = True) -> QuantLinear:
    bits, group, activation_bits = SCHEMES[scheme]
    activation = None
    if activation_bits is not None:
        activation = ActivationSpec(bits=activation_bits, group=group if activation_bits < 8 else None)
    format = LinearFormat(weight=WeightSpec(bits=bits, group=group), activation=activation, rotation=16)
    module = QuantLinear(in_features, out_features, format, bias=bias)
    weight = make_weight(module.grid)
    filled = QuantLinear.from_quantized(
        weight,
        nn.Parameter(random(out_features, seed=3)) if bias else None,
        format,
    )
    return filled.prepare()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("equalized", [False, True])
@pytest.mark.parametrize("rotation", [None, 32])
def test_quantize_gives_the_codes_of_the_definition(dtype, shape, equalized, rotation):
    """Codes are integers, so off by one is wrong."""
    x = random(*shape, dtype=dtype)
    factors = torch.linspace(0.5, 2.0, 64) if equalized else None

    codes, scale = quantize(x, 4, group=16, clip=0.9, equalizer=factors, rotation=rotation)

    expected, expected_scale = quantize_tokens(transform_tokens(x, factors, rotation), 4, 16, 0.9)
    assert torch.equal(codes, expected) and torch.equal(scale, expected_scale)


def test_quantize_takes_a_fixed_scale():
    x, fixed = 10 * random(3, 64), torch.tensor([0.05])

    codes, scale = quantize(x, 8, scale=fixed)

    assert torch.equal(codes, quantize_static(x, 8, fixed)) and torch.equal(scale, fixed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bits": 9}, "activation bits must lie in 2..8"),
        ({"bits": 4, "clip": 0.0}, "clip must lie above 0 and at most at 1, got 0.0"),
        ({"bits": 4, "group": 48}, "group=48 does not divide the 64 channels"),
        ({"bits": 4, "rotation": 48}, "rotation=48 does not divide the 64 channels"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(SpecError, match=message):
        quantize(torch.zeros(2, 64), **arguments)


@pytest.mark.parametrize("x", [torch.zeros(2, 64, dtype=torch.int32), torch.tensor(1.0)], ids=["integers", "scalar"])
def test_activations_must_be_floating_with_channels(x):
    with pytest.raises(SpecError, match="activations must be floating"):
        quantize(x, 8)


def test_another_number_of_channels_is_refused():
    with pytest.raises(SpecError, match="the activation has 63 channels, the weight has in_features=64"):
        make_module("w4a8")(random(2, 63))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pytorch_finds_no_fault_with_the_product(scheme):
    """Schema, fake implementation, autograd registration and tracing."""
    module, x = make_module(scheme), random(5, 64).requires_grad_()

    torch.library.opcheck(torch.ops.optimum_qvlm.linear.default, arguments_of(module, x))


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("group, rotation", [(None, None), (16, 32)])
def test_pytorch_finds_no_fault_with_quantize(group, rotation, fitted):
    factors = torch.linspace(0.5, 2.0, 64)

    torch.library.opcheck(
        torch.ops.optimum_qvlm.quantize.default, (random(3, 64), 4, group, 0.9, None, factors, rotation, fitted)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_whole_graph_is_compiled_for_any_number_of_tokens(scheme):
    """No graph breaks, and one graph on both sides of the token threshold. The eager backend needs no compiler."""
    module = make_module(scheme)
    module.decode_tokens = 4
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")

    for tokens in (3, 7, 20):
        x = random(tokens, 64)
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8"])
def test_gradients_survive_compilation(scheme):
    module = make_module(scheme)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, same = random(5, 64).requires_grad_(), random(5, 64).requires_grad_()

    compiled(x).sum().backward()
    module(same).sum().backward()

    torch.testing.assert_close(x.grad, same.grad)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_a_module_is_exported_with_dynamic_tokens(scheme):
    module = make_module(scheme).eval()
    tokens = torch.export.Dim("tokens", min=2, max=64)

    program = torch.export.export(module, (random(5, 64),), dynamic_shapes=({0: tokens},))

    assert torch.equal(program.module()(random(9, 64)), module(random(9, 64)))


@pytest.mark.parametrize("layout", ["packed", "prepared"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_to_the_input_are_those_of_the_plain_weight(scheme, layout):
    module = make_module(scheme)
    module = module.pack() if layout == "packed" else module
    x, upstream = random(4, 64).requires_grad_(), random(4, 48, seed=1)

    module(x).backward(upstream)

    torch.testing.assert_close(x.grad, upstream @ module.weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(module.bias.grad, upstream.sum(dim=0))


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w8a8"])
def test_the_threshold_alone_changes_the_arithmetic(scheme):
    """Up to `decode_tokens` activations stay; above, they are rounded. All tokens of a batch count."""
    module = make_module(scheme)
    plain = copy.deepcopy(module)
    plain.format = LinearFormat(weight=module.format.weight, rotation=16)
    few, many = random(2, 3, 64), random(7, 64)
    rounded_few = module(few)

    module.decode_tokens = 6

    assert torch.equal(module(few), plain(few))
    assert not torch.equal(module(few), rounded_few)
    assert not torch.equal(module(many), plain(many))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    group=st.sampled_from([None, 16, 32, 64, 128]),
    groups=st.integers(1, 3),
    out_features=st.integers(1, 140),
    tokens=st.sampled_from([0, 1, 2, 8, 9, 30]),
    zero_point=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    scale_dtype=st.sampled_from(FLOATS),
    activation_bits=st.sampled_from([16, 8, 4]),
    exponent=st.integers(-10, 6),
    contiguous=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_grid_computes_the_definition(
    bits, group, groups, out_features, tokens, zero_point, dtype, scale_dtype, activation_bits, exponent, contiguous,
    bias, seed
):  # fmt: skip
    """In the layout that this machine chooses; magnitudes, a row of zeros, transposed inputs."""
    in_features = 40 * groups if group is None else group * groups
    spec = WeightSpec(bits=bits, group=group, symmetric=not zero_point)
    activation = None if activation_bits == 16 else ActivationSpec(bits=activation_bits, group=None)
    format = LinearFormat(weight=spec, activation=activation)
    grid = QuantLinear(in_features, out_features, format, scale_dtype=scale_dtype, device="meta").grid
    weight = make_weight(grid, seed)
    shift = random(out_features, seed=seed + 2, dtype=dtype) if bias else None
    module = QuantLinear.from_quantized(weight, shift, format).prepare()
    x = (random(tokens, in_features, seed=seed + 1) * 2.0**exponent).to(dtype)
    x[:1] = 0
    x = x if contiguous else x.T.contiguous().T

    with torch.no_grad():
        y = module(x)

    require_close(y, x, weight, shift, Rounding.of(activation), module.layout)
