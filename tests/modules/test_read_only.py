"""The weight of a quantized linear is read as any tensor, and refuses whatever would write to it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimum_qvlm.errors import ReadOnlyError
from optimum_qvlm.modules.fused import fuse
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.quant.affine import quantize_weight
from optimum_qvlm.spec import WeightSpec

DELTA = torch.full((16, 32), 0.5)


def assign(target: object, name: str, value: object) -> None:
    setattr(target, name, value)


WRITES = {
    "data.add_": lambda linear: linear.weight.data.add_(DELTA),
    "data +=": lambda linear: linear.weight.data.__iadd__(DELTA),
    "data =": lambda linear: assign(linear.weight, "data", DELTA),
    "data[...] =": lambda linear: linear.weight.data.__setitem__(..., DELTA),
    "copy_": lambda linear: linear.weight.copy_(DELTA),
    "weight +=": lambda linear: linear.weight.__iadd__(DELTA),
    "weight[0] =": lambda linear: linear.weight.__setitem__(0, 1.0),
    "row": lambda linear: linear.weight[0].zero_(),
    "transposed": lambda linear: linear.weight.T.mul_(2),
    "flat": lambda linear: linear.weight.view(-1).mul_(2),
    "detached": lambda linear: linear.weight.detach().zero_(),
    "same dtype": lambda linear: linear.weight.to(torch.float32).zero_(),
    "out=": lambda linear: torch.add(DELTA, 1, out=linear.weight),
    "foreach": lambda linear: torch._foreach_add_([linear.weight], 1),
    "inplace=": lambda linear: F.relu(linear.weight, inplace=True),
    "init.zeros_": lambda linear: nn.init.zeros_(linear.weight),
    "init.kaiming_uniform_": lambda linear: nn.init.kaiming_uniform_(linear.weight),
    "init.orthogonal_": lambda linear: nn.init.orthogonal_(linear.weight),
    "vector_to_parameters": lambda linear: nn.utils.vector_to_parameters(DELTA.view(-1), [linear.weight]),
    "weight =": lambda linear: assign(linear, "weight", DELTA),
    "weight = Parameter": lambda linear: assign(linear, "weight", nn.Parameter(DELTA)),
    "register_parameter": lambda linear: linear.register_parameter("weight", nn.Parameter(DELTA)),
    "del": lambda linear: delattr(linear, "weight"),
    "requires_grad_": lambda linear: linear.weight.requires_grad_(),
    "requires_grad =": lambda linear: assign(linear.weight, "requires_grad", True),
    "grad =": lambda linear: assign(linear.weight, "grad", DELTA),
}


def make_linear() -> QuantLinear:
    """Four bits, 16 x 32."""
    spec = WeightSpec(bits=4, group=16)
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    return QuantLinear.from_quantized(quantize_weight(weight, spec), None, LinearFormat(weight=spec)).prepare()


def make_fused() -> QuantLinear:
    return fuse([make_linear(), make_linear()])[1]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [make_linear, make_fused])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_every_write_is_refused_with_the_way_out(mode, make, write):
    """A write to a temporary is lost: a merged adapter was gone without a word."""
    linear = make()
    before = linear.weight.clone()

    with mode(), pytest.raises(ReadOnlyError, match=r"16x32 cannot be changed .* model\.dequantize\(\)"):
        write(linear)

    assert torch.equal(linear.weight, before)


def test_arrays_of_it_are_not_writable():
    array = make_linear().weight.numpy()

    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


@pytest.mark.parametrize("make", [make_linear, make_fused])
def test_what_is_computed_from_it_is_plain(make):
    """Copies may be changed, and gradients flow to what it is combined with."""
    linear = make()
    expected = linear.to_linear(torch.float32).weight.detach()
    delta = torch.zeros(16, 32, requires_grad=True)

    (linear.weight + delta).norm(dim=1).sum().backward()

    torch.testing.assert_close(delta.grad, F.normalize(expected, dim=1))
    for copied in (linear.weight.clone(), copy.deepcopy(linear.weight), linear.weight * 1, linear.weight.half()):
        assert type(copied) is Tensor
        copied.zero_()
    assert torch.equal(linear.weight, expected)


def test_a_compiled_function_takes_the_weight():
    """As any tensor, in one graph."""
    weight, x = make_linear().weight, torch.randn(3, 32, generator=torch.Generator().manual_seed(1))

    y = torch.compile(lambda x, weight: x @ weight.T, fullgraph=True, backend="eager")(x, weight)

    assert torch.equal(y, x @ weight.clone().T)


def test_packed_parameters_never_ask_for_gradients():
    """transformers sets every floating tensor of a checkpoint as a parameter that does."""
    linear = make_linear()

    linear.weight_scale = nn.Parameter(linear.weight_scale.detach().clone())

    assert not linear.weight_scale.requires_grad
