"""A linear keeps its arguments settled between calls: nothing that changes it, and nobody who watches, may notice."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels import PACKED, TRANSIENT
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.quant.affine import quantize_weight
from optimum_qvlm.spec import Scheme

SCHEMES = ["w4a16", "w4a8", "w4a4", "w6a6", "w8a8"]
CHANNELS, ROWS = 128, 48


def make_linear(scheme="w4a8", *, seed=0, bias=True, rotation=None):
    """In the layout of this device."""
    parsed = Scheme.parse(scheme)
    spec = parsed.weight_spec(CHANNELS, "auto", symmetric=True)
    format = LinearFormat(weight=spec, activation=parsed.activation_spec(spec), rotation=rotation)
    torch.manual_seed(seed)
    dense = nn.Linear(CHANNELS, ROWS, bias=bias)
    rounded = quantize_weight(dense.weight.detach(), spec)
    return QuantLinear.from_quantized(rounded, dense.bias.detach() if bias else None, format).prepare()


def inputs(tokens=3):
    return torch.randn(2, tokens, CHANNELS, generator=torch.Generator().manual_seed(1))


class Watch(TorchDispatchMode):
    """Names of the operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def watched(linear, x):
    """The result of the operation, which a dispatch mode always gets to see."""
    with Watch() as watch, torch.no_grad():
        y = linear(x)
    assert "optimum_qvlm.linear.default" in watch.seen
    return y


@pytest.mark.parametrize("few", [0, 2, 100])
@pytest.mark.parametrize("rotation", [None, 32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_the_operation_bit_for_bit(scheme, rotation, few):
    linear, x = make_linear(scheme, rotation=rotation), inputs()
    linear.decode_tokens = few

    with torch.no_grad():
        first, second = linear(x), linear(x)

    assert torch.equal(first, watched(linear, x))
    assert torch.equal(first, second)
    assert linear.bound_linear is not None


@pytest.mark.parametrize("layout", [PACKED, TRANSIENT])
def test_nothing_is_kept_of_weights_that_come_and_go(layout):
    """Offloading puts tensors in for a call and takes them out again: what is kept would fill the device."""
    linear, x = make_linear(), inputs()
    linear.pack() if layout == PACKED else linear.prepare(transient=True)

    with torch.no_grad():
        linear(x)

    assert linear.bound_linear is None


def set_threshold(linear, other):
    linear.decode_tokens = 100


def load_another(linear, other):
    linear.load_state_dict(other.state_dict())


def replace_bias(linear, other):
    linear.bias = nn.Parameter(torch.ones(ROWS), requires_grad=False)


def write_bias(linear, other):
    linear.bias.data += 1


def drop_bias(linear, other):
    linear.bias = None


def pack_and_prepare(linear, other):
    linear.pack().prepare()


def change_format(linear, other):
    linear.format = make_linear("w4a16").format


CHANGES = [set_threshold, load_another, replace_bias, write_bias, drop_bias, pack_and_prepare, change_format]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_at_the_next_call(change):
    linear, other, x = make_linear(seed=0), make_linear(seed=5), inputs()
    with torch.no_grad():
        before = linear(x)
        change(linear, other)
        after = linear(x)

    assert torch.equal(after, watched(linear, x))
    assert torch.equal(after, before) == (change is pack_and_prepare)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_at_the_next_compiled_call(change):
    """A compiled graph checks one string for all settings."""
    torch._dynamo.reset()
    linear, other, x = make_linear(seed=0), make_linear(seed=5), inputs()
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        change(linear, other)

        assert torch.equal(compiled(x), watched(linear, x))


def test_a_compiled_graph_checks_few_values_of_a_linear():
    """It does so before every call, for hundreds of linears; checks of a dozen settings cost more than the product."""
    torch._dynamo.reset()
    linear, x, checked = make_linear(bias=False), inputs(), set()

    def note(entries):
        checked.update(entry.name for entry in entries)
        return [True] * len(entries)

    with torch.no_grad():
        torch.compile(linear, backend="eager", fullgraph=True, options={"guard_filter_fn": note})(x)

    own = [name for name in checked if "self" in name]
    assert any("settings" in name for name in own) and any("weight_packed" in name for name in own)
    assert len(own) <= 6


def test_a_moved_module_lets_go_of_its_tensors():
    linear, x = make_linear(), inputs()
    with torch.no_grad():
        linear(x)
        linear.to("meta")

    assert linear.bound_linear is None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_a_used_module_have_their_own_weight(how):
    linear, x = make_linear(), inputs()
    with torch.no_grad():
        expected = linear(x)
        other = how(linear)
        linear.bias.data += 1
        assert torch.equal(other(x), expected)
        assert not torch.equal(linear(x), expected)


def test_gradients_take_the_operation():
    linear, x = make_linear(), inputs().requires_grad_()
    with torch.no_grad():
        linear(x)

    linear(x).sum().backward()

    expected = linear.weight.sum(0)
    torch.testing.assert_close(x.grad, expected.expand_as(x), rtol=1e-4, atol=1e-4)


def test_a_trainable_bias_takes_the_operation():
    linear, x = make_linear(), inputs()
    linear.bias.requires_grad_()
    with torch.no_grad():
        linear(x)

    linear(x).sum().backward()

    assert torch.equal(linear.bias.grad, torch.full((ROWS,), 6.0))


def test_compiling_sees_one_node():
    torch._dynamo.reset()  # graphs of other tests count against a limit
    linear, x = make_linear(), inputs()
    graphs = []

    def backend(graph, _example):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        expected = linear(x)
        found = torch.compile(linear, backend=backend, fullgraph=True)(x)

    assert torch.equal(found, expected)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called == ["optimum_qvlm.linear.default"]


def test_exporting_and_tracing_see_the_operation():
    linear, x = make_linear().eval(), inputs()
    with torch.no_grad():
        expected = linear(x)
        exported = torch.export.export(linear, (x,))
        traced = torch.jit.trace(linear, (x,))

    other = inputs(tokens=3) * 2
    assert any("optimum_qvlm.linear" in str(node.target) for node in exported.graph.nodes)
    with torch.no_grad():
        assert torch.equal(exported.module()(x), expected)
        assert torch.equal(traced(other), linear(other))


def test_functional_transforms_see_the_operation():
    linear, x = make_linear(), inputs()
    with torch.no_grad():
        expected = linear(x)
        found = torch.func.vmap(linear)(x)

    torch.testing.assert_close(found, expected)


def test_what_does_not_fit_is_refused_at_every_call():
    linear = make_linear()
    with torch.no_grad():
        linear(inputs())
        with pytest.raises(SpecError, match="has 64 channels, the weight has in_features=128"):
            linear(torch.zeros(2, 64))
        with pytest.raises(SpecError, match=r"must be floating \[..., channels\]"):
            linear(torch.zeros(2, CHANNELS, dtype=torch.int64))
