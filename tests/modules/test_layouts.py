"""The layouts of a quantized linear: nothing is lost between them, and other code need not know which one it is in."""

import copy
import multiprocessing
import pickle

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from optimum_qvlm.kernels import PACKED, TRANSIENT
from optimum_qvlm.kernels.cpu import int4 as cpu_int4
from optimum_qvlm.kernels.cpu import rows as cpu_rows
from optimum_qvlm.kernels.cpu import table as cpu_table
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.quant.affine import quantize_weight
from optimum_qvlm.spec import ActivationSpec, WeightSpec

WEIGHT = ("weight_packed", "weight_scale", "weight_zero_point")


def make_module(
    bits: int = 4,
    group: int | None = 32,
    *,
    symmetric: bool = True,
    sizes: tuple[int, int] = (96, 33),
    dtype: torch.dtype = torch.float32,
    activation_bits: int | None = 8,
) -> QuantLinear:
    """A packed module with a bias."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(sizes[1], sizes[0], generator=generator).to(dtype)
    spec = WeightSpec(bits=bits, group=group, symmetric=symmetric)
    activation = None if activation_bits is None else ActivationSpec(bits=activation_bits)
    bias = nn.Parameter(torch.randn(sizes[1], generator=generator).to(dtype))
    return QuantLinear.from_quantized(
        quantize_weight(weight, spec, signed=True), bias, LinearFormat(weight=spec, activation=activation)
    )


def inputs(tokens: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1)).to(dtype)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sizes", [(96, 33), (64, 128), (32, 1), (64, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_packed_comes_back_bit_for_bit(bits, symmetric, sizes, dtype):
    """A saved model is the one that was calibrated, also after it ran."""
    module = make_module(bits, 32, symmetric=symmetric, sizes=sizes, dtype=dtype)
    packed, weight = state_of(module), module.weight.clone()

    module.prepare()

    assert torch.equal(module.weight, weight)
    require_same(module.packed_state(), {name: packed[name] for name in WEIGHT if name in packed})
    require_same(state_of(module.pack()), packed)


@pytest.mark.parametrize(
    "bits, layout", [(2, "table"), (3, PACKED), (4, "table"), (5, PACKED), (6, "table"), (8, "table")]
)
def test_widths_with_tables_get_them(bits, layout):
    """Eight bits may get rows instead, where the CPU multiplies bytes."""
    found = make_module(bits).prepare().layout

    assert found == layout


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_a_table_takes_a_sixteenth_more_than_the_codes(bits):
    """Each row of 128 output channels has a scale and a bias: four bytes, or eight in tables of whole bytes."""
    module = make_module(bits, 128, sizes=(1024, 1024)).prepare()

    planes = {2: (2,), 4: (4,), 6: (4, 2), 8: (8,)}[bits]
    expected = sum(1024 * 8 * (128 * plane // 8 + (8 if plane == 8 else 4)) for plane in planes)
    assert module.weight_packed.nbytes == expected
    assert expected <= {2: 1.13, 4: 1.07, 6: 1.09, 8: 1.07}[bits] * 1024 * 1024 * bits / 8


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_copies_and_pickles_compute_the_same(bits, tokens):
    """Deep copies for averaging, pickles for worker processes."""
    module = make_module(bits).prepare()
    x = inputs(tokens)

    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.layout == module.layout
        assert torch.equal(other(x), module(x))


def test_a_worker_process_takes_a_prepared_module():
    module, x = make_module().prepare(), inputs()

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_run, (module, x))

    assert torch.equal(found, module(x))


def _run(module: QuantLinear, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("source_prepared", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bits, symmetric", [(4, False), (8, True)])
def test_a_state_dict_of_either_form_is_taken_by_either_form(prepared, source_prepared, assign, bits, symmetric):
    """Names are the same in both, so code that copies states does not see the difference."""
    source = make_module(bits, symmetric=symmetric)
    target = make_module(bits, symmetric=symmetric)
    for name in WEIGHT[:2]:
        getattr(target, name).data.zero_()
    source = source.prepare() if source_prepared else source
    target = target.prepare() if prepared else target

    target.load_state_dict(source.state_dict(), assign=assign)

    torch.testing.assert_close(target(inputs()), source(inputs()), rtol=1e-5, atol=1e-5)
    assert torch.equal(target.weight, source.weight)
    require_same(target.packed_state(), source.packed_state())


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.cpu().float()])
def test_casts_change_the_bias_and_leave_the_weight(cast):
    module = make_module(symmetric=False).prepare()
    weight = module.weight

    cast(module)

    assert module.layout == "table"
    assert torch.equal(module.weight, weight)
    assert module(inputs(dtype=module.bias.dtype)).dtype == module.bias.dtype


def test_another_kind_of_device_gets_its_own_layout():
    """A table means nothing there. The meta device has none, so the shapes of the checkpoint come back."""
    module = make_module(symmetric=False)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}

    module.prepare().to("meta")

    assert module.layout == PACKED
    assert {name: tensor.shape for name, tensor in module.state_dict().items()} == shapes
    assert module.prepare().layout == PACKED


@pytest.mark.parametrize("bits, symmetric", [(4, False), (6, True), (8, True)])
def test_transient_weights_compute_what_prepared_ones_do(bits, symmetric):
    """Parts of a model that are offloaded must not change its output."""
    module = make_module(bits, symmetric=symmetric)
    packed, x = state_of(module), inputs()
    expected = copy.deepcopy(module).prepare()(x)

    module.prepare(transient=True)

    assert module.layout == TRANSIENT
    require_same(state_of(module), packed)
    assert torch.equal(module(x), expected)
    assert module.pack().layout == PACKED


def test_hooks_move_a_prepared_module_like_any_other():
    """accelerate keeps the tensors elsewhere and brings them under their names for each call."""
    module = nn.Sequential(make_module().prepare())
    expected = module(inputs())

    cpu_offload(module, execution_device="cpu")

    assert all(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(module(inputs()), expected)


def test_to_linear_and_weight_do_not_depend_on_the_layout():
    module = make_module(symmetric=False)
    plain = module.to_linear(torch.float32).weight

    assert torch.equal(module.prepare().to_linear(torch.float32).weight, plain)


@pytest.mark.parametrize("tokens", [1, cpu_table.BAG_TOKENS, cpu_table.BAG_TOKENS + 1, 64])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_both_sides_of_the_measured_threshold_compute_the_same(tokens, bits, symmetric):
    """It chooses among kernels of equal arithmetic, so only the order of sums differs."""
    packed = make_module(bits, symmetric=symmetric)
    packed.weight_scale.data[::3] *= -1
    prepared = copy.deepcopy(packed).prepare()

    torch.testing.assert_close(prepared(inputs(tokens)), packed(inputs(tokens)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 20])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_rows_compute_the_definition(dtype, tokens, symmetric, activation_bits):
    """Whatever this machine would choose: integer sums are exact on all, only their speed differs."""
    module = make_module(8, None, symmetric=symmetric, sizes=(96, 40), dtype=dtype, activation_bits=activation_bits)
    module.weight_scale.data[::3] *= -1  # symmetric grids may be turned around
    x = inputs(tokens, dtype)
    expected = module(x)

    module.put_into(cpu_rows.LAYOUT)

    step = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(module(x), expected, rtol=step, atol=step * 10)
    assert module.pack().layout == PACKED


def make_int4(*, symmetric: bool = True, activation_bits: int | None = None) -> QuantLinear:
    """A bf16 module in the layout of PyTorch's int4 operator, its scales of both signs."""
    module = make_module(4, 32, symmetric=symmetric, dtype=torch.bfloat16, activation_bits=activation_bits)
    module.weight_scale.data[::3] *= -1
    module.decode_tokens = 8
    return module.put_into(cpu_int4.LAYOUT)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 60])
def test_int4_computes_what_the_packed_form_does(symmetric, activation_bits, tokens):
    """On both sides of the threshold above which activations are rounded."""
    module = make_int4(symmetric=symmetric, activation_bits=activation_bits)
    x, found = inputs(tokens, torch.bfloat16), module(inputs(tokens, torch.bfloat16))

    expected = module.pack()(x)

    assert module.layout == PACKED
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0.2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_is_saved_and_loaded_like_any_layout(symmetric):
    """States of either form go into modules of either form, and copies and pickles compute the same."""
    module = make_int4(symmetric=symmetric)
    packed, x = module.packed_state(), inputs(3, torch.bfloat16)
    target = make_int4(symmetric=symmetric)
    target.weight_packed.data.zero_()

    target.load_state_dict(module.state_dict())

    for other in (target, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        require_same(other.packed_state(), packed)
    require_same({name: tensor for name, tensor in module.pack().state_dict().items() if name in WEIGHT}, packed)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.float()])
def test_casts_of_an_int4_module_leave_its_scales(cast):
    """The operator's zeros lie beside the scales; a cast must change neither."""
    module = make_int4(symmetric=False)
    weight = module.weight

    cast(module)

    assert module.weight_scale.dtype == torch.bfloat16 and torch.equal(module.weight, weight)
    assert module(inputs(dtype=module.bias.dtype)).dtype == module.bias.dtype


@pytest.fixture
def fresh_compiler():
    """Traces of other tests count against the limit of one function."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_is_traced_compiled_and_differentiated(symmetric):
    """Other code sees one operation, whatever it holds."""
    module = make_int4(symmetric=symmetric)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (3, 7, 60):
            assert torch.equal(compiled(inputs(tokens, torch.bfloat16)), module(inputs(tokens, torch.bfloat16)))

    x = inputs(4).requires_grad_()
    module.float()(x).sum().backward()

    torch.testing.assert_close(x.grad, module.weight.float().sum(dim=0).expand(4, -1), rtol=1e-2, atol=1e-1)
