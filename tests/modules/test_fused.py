"""Linears that share one product: nothing but the number of products may differ from linears of their own."""

import copy
import dataclasses
import pickle
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.kernels import PACKED
from optimum_qvlm.kernels.cpu import int4 as cpu_int4
from optimum_qvlm.modules.fused import FusedLinear, JointLinear, fuse, why_apart
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.quant.affine import quantize_weight
from optimum_qvlm.spec import ActivationSpec, WeightSpec

CHANNELS = 96
ROWS = (33, 16, 64)
NAMES = ("first", "second", "third")


class Site(nn.Module):
    """Three linears that read the same tensor, as in a model's attention."""

    def __init__(self, linears: list[QuantLinear]) -> None:
        super().__init__()
        self.first, self.second, self.third = linears

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.first(x), self.second(x), self.third(x)


def make_linear(
    rows: int,
    bits: int = 4,
    *,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    static: bool = False,
    transformed: bool = False,
    seed: int = 0,
) -> QuantLinear:
    """A packed linear whose values depend on its rows and the seed alone."""
    generator = torch.Generator().manual_seed(rows + seed)
    weight = torch.randn(rows, CHANNELS, generator=generator).to(dtype)
    spec = WeightSpec(bits=bits, group=32, symmetric=symmetric)
    activation = ActivationSpec(bits=8, static=static)
    shift = nn.Parameter(torch.randn(rows, generator=generator).to(dtype)) if bias else None
    return QuantLinear.from_quantized(
        quantize_weight(weight, spec),
        shift,
        LinearFormat(weight=spec, activation=activation, equalized=transformed, rotation=32 if transformed else None),
        input_equalizer=torch.linspace(0.5, 2, CHANNELS) if transformed else None,
        input_scale=torch.tensor([0.03]) if static else None,
    )


def make_sites(*, prepared: bool = True, **changes) -> tuple[Site, Site]:
    """The same linears alone and fused."""
    linears = [make_linear(rows, **changes) for rows in ROWS]
    if prepared:
        linears = [linear.prepare() for linear in linears]
    assert why_apart(linears) is None
    return Site(linears), Site(fuse(linears))


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*(shape or (2, 3)), CHANNELS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def products_of(site: Site) -> list[int]:
    """Grows by one with each product that is computed."""
    found: list[int] = []
    site.first.joint.register_forward_hook(lambda *_: found.append(1))
    return found


def require_equal(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (17,), (2, 3, 5), (70,)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_tables_give_the_same_bits(bits, symmetric, shape):
    """A row of a table is summed by itself, whatever rows lie beside it."""
    alone, fused = make_sites(bits=bits, symmetric=symmetric)
    x = inputs(*shape) if shape else inputs(1)[0]
    with torch.no_grad():
        found = fused(x)

        require_equal(found, alone(x))
    assert fused.first.joint.layout == alone.first.layout == "table"
    assert [tuple(y.shape) for y in found] == [(*x.shape[:-1], rows) for rows in ROWS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"static": True}, {"transformed": True}], ids=str)
def test_formats_give_the_same_bits(changes, dtype):
    alone, fused = make_sites(dtype=dtype, **changes)
    x = inputs(5, dtype=dtype)

    with torch.no_grad():
        require_equal(fused(x), alone(x))


@pytest.mark.parametrize("tokens", [1, 8, 40])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_blocks_give_the_same_but_for_the_order_of_sums(symmetric, tokens):
    """Blocks are padded, and start at other rows when there are others before."""
    alone, fused = make_sites(symmetric=symmetric, dtype=torch.bfloat16)
    expected = alone.state_dict()
    for linear in alone.children():
        linear.decode_tokens = 16
        linear.put_into(cpu_int4.LAYOUT)
    fused = Site(fuse(list(alone.children())))
    fused.first.joint.put_into(cpu_int4.LAYOUT)
    x = inputs(tokens, dtype=torch.bfloat16)

    with torch.no_grad():
        for one, other in zip(fused(x), alone(x), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=0.1)
    packed = Site([linear.pack() for linear in alone.children()]).state_dict()
    require_equal(fused.state_dict().values(), packed.values())
    assert list(fused.state_dict()) == list(expected)


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_the_definition_gives_the_same_but_for_the_order_of_sums(bits):
    """Its products are dense ones, which may take sums in another order for another number of rows."""
    alone, fused = make_sites(bits=bits, prepared=False)
    assert fused.first.joint.layout == PACKED

    with torch.no_grad():
        for found, expected in zip(fused(inputs(40)), alone(inputs(40)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_one_product_serves_all_whoever_comes_first(order, mode):
    alone, fused = make_sites()
    products, x = products_of(fused), inputs()

    for _ in range(2):
        with mode():
            for index in order:
                assert torch.equal(getattr(fused, NAMES[index])(x), getattr(alone, NAMES[index])(x))

    assert len(products) == 2


def test_nothing_is_kept_once_all_have_their_rows():
    """A kept product would cost memory in every layer at once."""
    _, fused = make_sites()
    x, held = inputs(), []
    fused.first.joint.register_forward_hook(lambda module, args, product: held.append(weakref.ref(product)))
    held.append(weakref.ref(x))
    with torch.no_grad():
        outputs = fused(x)

    del x, outputs

    assert [reference() for reference in held] == [None, None]


@pytest.mark.parametrize("function", [F.silu, F.gelu, torch.sigmoid], ids=lambda function: function.__name__)
def test_what_follows_computes_the_same_bits(function):
    """On a CPU these functions round the last elements of a row otherwise where rows are not adjacent."""
    alone, fused = make_sites()
    x = inputs()

    with torch.no_grad():
        outputs, expected = fused(x), alone(x)

    assert all(torch.equal(function(a), function(b)) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_another_tensor_is_another_product(mode):
    """Cross-attention, or a query that is asked for twice before the keys."""
    alone, fused = make_sites()
    x, y = inputs(seed=1), inputs(seed=2)
    calls = [("first", x), ("first", y), ("second", x), ("third", y), ("second", y), ("third", x), ("first", x.clone())]

    with mode():
        for name, tensor in calls:
            assert torch.equal(getattr(fused, name)(tensor), getattr(alone, name)(tensor))


def test_rows_are_taken_once():
    """The caller may have changed what it took, in place."""
    alone, fused = make_sites()
    x = inputs()
    with torch.no_grad():
        fused.first(x).zero_()

        assert torch.equal(fused.first(x), alone.first(x))
        assert torch.equal(fused.second(x), alone.second(x))


def test_an_input_that_was_changed_in_place_is_another_input():
    alone, fused = make_sites()
    x = inputs()
    with torch.no_grad():
        fused.first(x)
        x.mul_(2)

        assert torch.equal(fused.second(x), alone.second(x))


def test_a_product_without_gradients_does_not_serve_one_with_them():
    """Nor one of inference mode, whose tensors autograd refuses."""
    alone, fused = make_sites()
    for mode in (torch.no_grad, torch.inference_mode):
        x = inputs().requires_grad_()
        with mode():
            fused.first(x)
        fused.second(x).square().sum().backward()
        expected = inputs().requires_grad_()
        alone.second(expected).square().sum().backward()

        torch.testing.assert_close(x.grad, expected.grad, rtol=1e-5, atol=1e-4)


def gradients(site: Site, run) -> list[Tensor]:
    """Of the input and, joined, of the biases."""
    x = inputs().requires_grad_()
    first, second, third = run(site, x)
    (first.mul(2).sin().sum() + (second.square().sum() + third.sum() * 3)).backward()
    biases = [parameter.grad for name, parameter in site.named_parameters() if name.endswith("bias")]
    return [x.grad, torch.cat(biases)]


@pytest.mark.parametrize(
    "run",
    [
        lambda site, x: site(x),
        lambda site, x: checkpoint(site, x, use_reentrant=False),
        lambda site, x: checkpoint(site, x, use_reentrant=True),
    ],
    ids=["plain", "checkpoint", "reentrant checkpoint"],
)
def test_gradients_are_those_of_linears_alone(run):
    """Adapters train through them. The sum over the group is one product too, in another order."""
    alone, fused = make_sites()

    for found, expected in zip(gradients(fused, run), gradients(alone, run), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_outputs_may_be_changed_in_place_under_gradients():
    """Views of one tensor would share a version, so that a change of one would spoil what others saved."""
    alone, fused = make_sites()
    x, y = inputs().requires_grad_(), inputs().requires_grad_()

    first, second, third = fused(x)
    loss = (second.square() + 1).sum() + third.sum()
    (loss + first.mul_(2).sin().sum()).backward()

    first, second, third = alone(y)
    ((second.square() + 1).sum() + third.sum() + first.mul(2).sin().sum()).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_compiled_whole_there_is_one_product(mode):
    """With a number of tokens that changes, too. The product lies between the modules only while they are traced."""
    alone, fused = make_sites()
    counts = []

    def count(graph, _):
        counts.append(sum("optimum_qvlm.linear" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=count)
    with mode():
        for tokens in (4, 9, 21):
            require_equal(compiled(inputs(tokens)), alone(inputs(tokens)))

    assert set(counts) == {1}
    assert fused.first.joint.handover.kept is None


def test_compiled_gradients_are_the_same():
    alone, fused = make_sites()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")

    found = gradients(fused, lambda _, x: [y.clone() for y in compiled(x)])

    for one, other in zip(found, gradients(alone, lambda site, x: site(x)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)


def test_an_exported_program_has_one_product():
    alone, fused = make_sites()
    with torch.no_grad():
        program = torch.export.export(fused.eval(), (inputs(),))

        require_equal(program.module()(inputs()), alone(inputs()))
    assert sum("optimum_qvlm.linear" in str(node.target) for node in program.graph.nodes) == 1


def test_threads_do_not_get_each_others_rows():
    """Servers run one model from several threads."""
    alone, fused = make_sites()
    wrong = []

    def work(seed: int) -> None:
        x = inputs(seed=seed)
        with torch.no_grad():
            expected = alone(x)
            for _ in range(100):
                wrong.extend(not torch.equal(*pair) for pair in zip(fused(x), expected, strict=True))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(wrong) == 4 * 100 * 3 and not any(wrong)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda site: pickle.loads(pickle.dumps(site))], ids=["copy", "pickle"])
def test_copies_have_a_joint_weight_of_their_own(make):
    """Also where a copy is made between two calls."""
    alone, fused = make_sites()
    x = inputs()
    with torch.no_grad():
        fused.first(x)
        other = make(fused)

        assert other.first.joint is other.second.joint is other.third.joint is not fused.first.joint
        assert other.first.joint.handover.kept is None
        other.first.joint.weight_packed.zero_()
        require_equal(fused(x), alone(x))


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.cpu().double()])
def test_casts_do_what_they_do_to_linears_alone(cast):
    alone, fused = map(cast, make_sites(symmetric=False))
    x = inputs(dtype=alone.first.bias.dtype)

    with torch.no_grad():
        require_equal(fused(x), alone(x))
    assert fused.second.weight_scale.dtype == torch.float32
    assert fused.second.bias.dtype == alone.second.bias.dtype


def test_a_linear_takes_its_group_to_another_device():
    """A weight that is shared is on one device. The meta device has no layout, so that of the checkpoint comes back."""
    _, fused = make_sites()

    fused.second.to("meta")

    assert all(parameter.is_meta for parameter in fused.parameters())
    assert fused.first.joint.layout == PACKED
    assert fused(inputs().to("meta"))[2].shape == (2, 3, 64)


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("changes", [{}, {"symmetric": False}, {"static": True, "transformed": True}], ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_state_is_that_of_linears_alone(bits, changes, prepared):
    """Names, order, dtypes, values, and no memory in common, since a writer would drop what shares it."""
    linears = [make_linear(rows, bits, **changes) for rows in ROWS]
    expected = {name: tensor.clone() for name, tensor in Site(linears).state_dict().items()}
    if prepared:
        linears = [linear.prepare() for linear in linears]

    state = Site(fuse(linears)).state_dict()

    assert list(state) == list(expected)
    require_equal(state.values(), expected.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("changes", [{}, {"symmetric": False}, {"static": True, "transformed": True}], ids=str)
def test_a_state_is_taken_as_by_linears_alone(changes, prepared):
    """Of a model that was fused when it was loaded, nobody knows."""
    alone, fused = make_sites(prepared=prepared, **changes)
    other = Site([make_linear(rows, seed=7, **changes) for rows in ROWS])
    with torch.no_grad():
        fused(inputs())
    for site in (alone, fused):
        assert str(site.load_state_dict(other.state_dict())) == "<All keys matched successfully>"

    require_equal(fused.state_dict().values(), other.state_dict().values())
    with torch.no_grad():
        require_equal(fused(inputs()), alone(inputs()))


def test_a_state_of_something_else_is_no_fault_of_the_fused():
    """As that of adapters, which is loaded into the whole model."""
    _, fused = make_sites()
    before = {name: tensor.clone() for name, tensor in fused.state_dict().items()}

    found = fused.load_state_dict({"adapter": torch.zeros(1)}, strict=False)

    assert found.unexpected_keys == ["adapter"] and set(found.missing_keys) == set(before)
    require_equal(fused.state_dict().values(), before.values())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "first.weight_packed"'):
        fused.load_state_dict({})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6])
def test_the_state_comes_back_from_the_layout_of_gpus(bits, symmetric):
    """Its scales lie by group, so that the rows of one linear are not in one piece."""
    alone, fused = make_sites(bits=bits, symmetric=symmetric, prepared=False)

    fused.first.joint.put_into("triton")

    assert fused.first.joint.layout == "triton"
    require_equal(fused.state_dict().values(), alone.state_dict().values())


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("changes", [{}, {"symmetric": False}, {"static": True, "transformed": True}], ids=str)
def test_apart_they_are_what_they_were(changes, prepared):
    alone, fused = make_sites(prepared=prepared, **changes)
    for linear in (*alone.children(), *fused.children()):
        linear.decode_tokens = 7

    again = Site([linear.apart() for linear in fused.children()])

    assert list(again.state_dict()) == list(alone.state_dict())
    require_equal(again.state_dict().values(), alone.state_dict().values())
    for one, other in zip(again.children(), alone.children(), strict=True):
        assert type(one) is QuantLinear
        assert (one.layout, one.format, one.grid) == (other.layout, other.format, other.grid)


def test_memory_holds_the_weight_once():
    """Whole blocks of 128 rows, so that the sum of three small ones is even smaller."""
    alone, fused = make_sites()

    def size(site: Site) -> int:
        return sum(parameter.nbytes for parameter in site.parameters())

    assert size(fused) <= size(alone)
    assert {name.split(".")[1] for name, _ in fused.named_parameters()} == {"joint"}


def test_each_is_a_linear_to_other_code_and_what_they_share_is_none():
    """Adapters and reports look for `nn.Linear`, and read sizes, bias and weight."""
    alone, fused = make_sites(symmetric=False)
    found = [name for name, module in fused.named_modules() if isinstance(module, nn.Linear)]
    assert found == list(NAMES)

    for name in NAMES:
        one, other = getattr(fused, name), getattr(alone, name)
        assert (one.in_features, one.out_features, one.grid) == (other.in_features, other.out_features, other.grid)
        assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)
        assert torch.equal(one.to_linear(torch.float32).weight, other.to_linear(torch.float32).weight)
        assert torch.equal(one.quantized().codes, other.quantized().codes)
        require_equal(one.packed_state().values(), other.packed_state().values())
        packed = copy.deepcopy(other).pack()
        require_equal(
            (one.weight_packed, one.weight_scale, one.weight_zero_point),
            (packed.weight_packed, packed.weight_scale, packed.weight_zero_point),
        )
    assert "fused" in repr(fused.first)


def test_layout_and_threshold_are_those_of_the_group():
    _, fused = make_sites()
    fused.first.decode_tokens = 5
    assert fused.third.decode_tokens == fused.third.joint.decode_tokens == 5

    assert fused.second.pack().joint.layout == PACKED
    assert fused.second.prepare().joint.layout == "table"
    with pytest.raises(ConfigError, match=r"fused linears cannot be offloaded; call optimum_qvlm.unfuse_linears"):
        fused.second.prepare(transient=True)


def test_an_odd_one_is_left_with_a_reason():
    """A group has one kernel call, so what that call reads must be the same in all."""
    other = make_linear(16)

    def changed(**fields) -> QuantLinear:
        linear = make_linear(16)
        linear.format = dataclasses.replace(linear.format, **fields)
        return linear

    cases = {
        "their weight grids differ": make_linear(16, bits=8),
        "their activation grids differ": changed(activation=None),
        "their clips differ": changed(activation_clip=0.5),
        "their transforms differ": changed(rotation=32),
        "their scale dtypes differ": make_linear(16, dtype=torch.bfloat16),
        "their biases differ": make_linear(16, bias=False),
        "their layouts differ": make_linear(16).prepare(),
        "their weights are not in memory": make_linear(16).to("meta"),
    }
    for reason, linear in cases.items():
        assert why_apart([make_linear(33), other, linear]) == reason
    hooked = make_linear(16)
    hooked.register_forward_hook(lambda *_: None)
    assert why_apart([other, hooked]) == "they have hooks"
    frozen = make_linear(16)
    frozen.bias.requires_grad_(False)
    assert why_apart([other, frozen]) == "their biases differ"
    counted = make_linear(16)
    counted.decode_tokens = 3
    assert why_apart([other, counted]) == "their decode_tokens differ"


@pytest.mark.parametrize("name", ["input_equalizer", "input_scale"])
def test_tensors_of_the_site_must_have_the_same_values(name):
    """They are said of the site, but stored with each linear, so a file may hold anything."""
    one, other = (make_linear(rows, static=True, transformed=True) for rows in (16, 33))
    assert why_apart([one, other]) is None

    getattr(other, name).data.mul_(2)

    assert why_apart([one, other]) == f"their {name} differ in value"


def test_two_are_a_group():
    """Gate and up."""
    linears = [make_linear(rows).prepare() for rows in (64, 33)]

    gate, up = fuse(linears)

    assert isinstance(gate, FusedLinear) and isinstance(gate.joint, JointLinear)
    with torch.no_grad():
        require_equal((gate(inputs()), up(inputs())), (linears[0](inputs()), linears[1](inputs())))
