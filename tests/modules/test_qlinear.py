"""The quantized linear: what it computes, and that it passes for an `nn.Linear`."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimum_qvlm.kernels import fake_quantize_tokens
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.quant.affine import dequantize_weight, quantize_weight
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.spec import ActivationSpec, WeightSpec

BITS = range(2, 9)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def make_format(
    bits: int = 4,
    group: int | None = 32,
    *,
    symmetric: bool = True,
    activation_bits: int | None = None,
    clip: float = 1.0,
) -> LinearFormat:
    """A format whose activation shares the weight's groups below 8 bits."""
    activation = None
    if activation_bits is not None:
        activation = ActivationSpec(bits=activation_bits, group=group if activation_bits < 8 else None)
    weight = WeightSpec(bits=bits, group=group, symmetric=symmetric)
    return LinearFormat(weight=weight, activation=activation, activation_clip=clip)


def make_linear(in_features: int = 96, out_features: int = 33, *, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear with a bias, random weights and one row of zeros."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(in_features, out_features, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(out_features, in_features, generator=generator))
        linear.weight[0] = 0
        linear.bias.copy_(torch.randn(out_features, generator=generator))
    return linear


def make_module(format: LinearFormat, linear: nn.Linear | None = None, *, bias: bool = True) -> QuantLinear:
    """`linear` rounded to nearest."""
    linear = make_linear() if linear is None else linear
    quantized = quantize_weight(linear.weight.detach(), format.weight)
    return QuantLinear.from_quantized(quantized, linear.bias if bias else None, format)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("activation_bits", [None, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_the_product_of_rounded_input_and_rounded_weight(bits, symmetric, group, activation_bits, bias):
    """To the last bit: the definition is the specification of all kernels."""
    linear = make_linear()
    format = make_format(bits, group, symmetric=symmetric, activation_bits=activation_bits, clip=0.9)
    module, x = make_module(format, linear, bias=bias), inputs(5, 96)

    y = module(x)

    weight = dequantize_weight(quantize_weight(linear.weight.detach(), format.weight))
    if format.activation is not None:
        x = fake_quantize_tokens(x, format.activation.bits, format.activation.group, 0.9)
    assert torch.equal(y, F.linear(x, weight, linear.bias if bias else None))


@pytest.mark.parametrize("shape", [(96,), (1, 96), (7, 96), (2, 3, 96), (2, 1, 3, 96), (0, 96), (2, 0, 96)], ids=str)
@pytest.mark.parametrize("activation_bits", [None, 4, 8])
def test_any_number_of_tokens_goes_through(shape, activation_bits):
    """A batch without images sends no tokens through the vision tower."""
    module, x = make_module(make_format(activation_bits=activation_bits)), inputs(*shape)

    y = module(x)

    assert y.shape == (*shape[:-1], 33)
    rows = [module(row) for row in x.reshape(-1, 96)]
    if rows:
        torch.testing.assert_close(y.reshape(-1, 33), torch.stack(rows))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows, columns, group", [(1, 1, None), (33, 96, 32), (5, 129, None), (31, 64, 16)])
def test_codes_come_out_as_they_went_in(bits, symmetric, rows, columns, group):
    """Packing must be lossless for every width and for zero points along the rows."""
    format = make_format(bits, group, symmetric=symmetric)
    quantized = quantize_weight(make_linear(columns, rows).weight.detach(), format.weight, signed=True)

    actual = QuantLinear.from_quantized(quantized, None, format).quantized()

    assert torch.equal(actual.codes, quantized.codes)
    assert torch.equal(actual.scale, quantized.scale)
    if symmetric:
        assert actual.zero_point is None
    else:
        assert torch.equal(actual.zero_point, quantized.zero_point)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("in_features, out_features, group", [(96, 33, 32), (129, 5, None), (1, 1, None)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_parameters_take_no_more_bytes_than_the_codes_need(bits, in_features, out_features, group, symmetric):
    """Sizes are what people quantize for."""
    linear = make_linear(in_features, out_features, dtype=torch.float16)
    groups = 1 if group is None else in_features // group

    module = make_module(make_format(bits, group, symmetric=symmetric), linear)

    actual = {name: p.numel() * p.element_size() for name, p in module.named_parameters()}
    expected = {
        "weight_packed": -(-in_features * bits // 32) * 4 * out_features,
        "weight_scale": 2 * out_features * groups,
        "bias": 2 * out_features,
    }
    if not symmetric:
        expected["weight_zero_point"] = -(-out_features * bits // 32) * 4 * groups
    assert actual == expected


def test_it_passes_for_a_linear():
    """Other libraries look for `nn.Linear` and read its features, bias and weight."""
    linear = make_linear()

    module = make_module(make_format(), linear)

    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (96, 33)
    assert torch.equal(module.bias, linear.bias)
    assert module.weight.shape == linear.weight.shape


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_weight_is_dequantized_on_demand(symmetric, dtype):
    linear, format = make_linear(dtype=dtype), make_format(symmetric=symmetric)

    module = make_module(format, linear)

    expected = dequantize_weight(quantize_weight(linear.weight.detach(), format.weight))
    assert module.weight.dtype == dtype
    assert torch.equal(module.weight, expected.to(dtype))
    assert "weight" not in dict(module.named_parameters())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_state_dict_restores_the_module(dtype, symmetric, bias):
    """The path that a checkpoint takes: an empty module of the same format, then the tensors."""
    format = make_format(3, 32, symmetric=symmetric, activation_bits=8, clip=0.8)
    module = make_module(format, make_linear(dtype=dtype), bias=bias)
    empty = QuantLinear(96, 33, format, bias=bias, scale_dtype=dtype, bias_dtype=dtype)

    empty.load_state_dict(module.state_dict(), strict=True)

    x = inputs(4, 96, dtype=dtype)
    assert torch.equal(empty(x), module(x))
    assert empty.state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_module_on_meta_takes_tensors_by_assignment(symmetric):
    """transformers builds the model on meta and assigns what it reads."""
    format = make_format(symmetric=symmetric)
    module = make_module(format)
    empty = QuantLinear(96, 33, format, device="meta")
    assert {p.device.type for p in empty.parameters()} == {"meta"}

    empty.load_state_dict(module.state_dict(), strict=True, assign=True)

    assert torch.equal(empty(inputs(4, 96)), module(inputs(4, 96)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits, symmetric", [(2, True), (6, False), (8, False)])
def test_an_empty_module_has_the_shapes_of_a_filled_one(dtype, bits, symmetric):
    """Otherwise a checkpoint would not load."""
    format = make_format(bits, symmetric=symmetric)

    empty = QuantLinear(96, 33, format, scale_dtype=dtype, bias_dtype=dtype)

    filled = make_module(format, make_linear(dtype=dtype))
    shapes = {name: (p.shape, p.dtype) for name, p in empty.named_parameters()}
    assert shapes == {name: (p.shape, p.dtype) for name, p in filled.named_parameters()}


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_deep_copy_is_independent(symmetric):
    module = make_module(make_format(symmetric=symmetric, activation_bits=4))
    x = inputs(4, 96)
    before = module(x)

    copied = copy.deepcopy(module)
    copied.weight_scale.data.zero_()

    assert torch.equal(module(x), before)
    assert copied.format == module.format


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_change_of_dtype_leaves_the_weight_alone(dtype, symmetric):
    """Codes were chosen for the scales as stored: rounding scales to another dtype would change the weight."""
    module = make_module(make_format(symmetric=symmetric, activation_bits=8))
    weight = module.weight.clone()

    module.to(dtype)

    assert torch.equal(module.weight, weight)
    assert module.weight_packed.dtype == torch.int32
    assert module.bias.dtype == dtype
    assert module(inputs(2, 96, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_output_has_the_dtype_of_the_input(weight_dtype, dtype):
    """Scales may be kept in another dtype than the model computes in."""
    module = make_module(make_format(activation_bits=4), make_linear(dtype=weight_dtype), bias=False)

    assert module(inputs(2, 96, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("trainable", [True, False])
def test_the_bias_is_taken_as_it_is(dtype, trainable):
    """Its dtype and whether it trains; packed tensors never train."""
    linear = make_linear(dtype=dtype)
    linear.bias.requires_grad_(trainable)

    module = make_module(make_format(symmetric=False), linear)

    assert module.bias.dtype == dtype
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trained == (["bias"] if trainable else [])


def test_no_bias_is_no_parameter():
    module = make_module(make_format(), bias=False)

    assert module.bias is None
    assert "bias" not in module.state_dict()


@pytest.mark.parametrize("activation_bits, clip", [(None, 1.0), (8, 1.0), (4, 0.6)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_reach_the_input(activation_bits, clip, symmetric):
    """Straight through the rounding of the activation, then through the dequantized weight."""
    module = make_module(make_format(symmetric=symmetric, activation_bits=activation_bits, clip=clip))
    x = inputs(4, 96).requires_grad_()
    upstream = inputs(4, 33)

    module(x).backward(upstream)

    torch.testing.assert_close(x.grad, upstream @ module.weight)
    torch.testing.assert_close(module.bias.grad, upstream.sum(dim=0))


def test_gradient_tracking_does_not_change_the_output():
    module, x = make_module(make_format(activation_bits=4, clip=0.7)), inputs(4, 96)

    assert torch.equal(module(x.clone().requires_grad_()), module(x))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_plain_linear_with_the_same_weight_comes_out(dtype, bias, symmetric):
    """For exports, and for people who want to leave."""
    module = make_module(make_format(symmetric=symmetric), bias=bias)

    linear = module.to_linear(dtype)

    assert type(linear) is nn.Linear
    assert linear.weight.dtype == dtype and linear.weight.device.type == "cpu"
    x = inputs(3, 96, dtype=dtype)
    expected = F.linear(x, module.weight.to(dtype), module.bias.to(dtype) if bias else None)
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize(
    "format, expected",
    [
        (make_format(4, 32), "weight=4 bits/32, bias=True"),
        (make_format(8, None, activation_bits=8), "weight=8 bits/row, activation=8 bits/token, bias=True"),
        (make_format(4, 32, activation_bits=4), "weight=4 bits/32, activation=4 bits/32, bias=True"),
    ],
)
def test_printing_a_model_shows_the_grids(format, expected):
    assert repr(make_module(format)) == f"QuantLinear(in_features=96, out_features=33, {expected})"


def test_initialisation_leaves_packed_weights_alone():
    """transformers calls reset_parameters on modules that it takes for uninitialised."""
    module = make_module(make_format())
    before = module.weight.clone()

    module.reset_parameters()

    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("rotation", [None, 32])
@pytest.mark.parametrize("equalized", [False, True])
def test_a_transformed_linear_computes_what_its_parts_say(equalized, rotation):
    """Transform, rounding and product in this order; `weight` and `to_linear` undo the transform."""
    linear = make_linear()
    factors = torch.linspace(0.5, 2.0, 96) if equalized else None
    transform = SiteTransform(factors, rotation)
    format = replace(make_format(bits=4, group=32, activation_bits=4), equalized=equalized, rotation=rotation)
    rounded = quantize_weight(transform.fold(linear.weight.detach()), format.weight)

    module = QuantLinear.from_quantized(rounded, linear.bias, format, input_equalizer=factors)

    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(2))
    expected = F.linear(
        fake_quantize_tokens(transform.tokens(x), 4, 32, 1.0), dequantize_weight(rounded), linear.bias.detach()
    )
    assert torch.equal(module(x), expected)
    assert torch.allclose(module.weight, transform.unfold(dequantize_weight(rounded)), atol=1e-6)
    assert torch.equal(module.to_linear(torch.float32).weight, module.weight)
    assert module.half().input_equalizer is None or module.input_equalizer.dtype == torch.float32


def test_a_static_activation_keeps_its_scale():
    """The scale does not follow the input: values beyond the grid saturate."""
    linear = make_linear()
    format = LinearFormat(weight=WeightSpec(bits=4, group=32), activation=ActivationSpec(bits=4, static=True))
    rounded = quantize_weight(linear.weight.detach(), format.weight)
    module = QuantLinear.from_quantized(rounded, None, format, input_scale=torch.tensor([0.5]))

    x = torch.full((1, 96), 100.0)

    assert torch.allclose(module(x), F.linear(torch.full((1, 96), 3.5), dequantize_weight(rounded)), rtol=1e-5)
    assert module.half().input_scale.dtype == torch.float32
