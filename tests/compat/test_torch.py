"""The private parts of PyTorch that we touch are as we take them to be."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from optimum_qvlm.compat import torch as compat
from tests.compat.contract import contract


class Passing(compat.dispatch_mode_class()):
    """Sees everything and changes nothing."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


@contract(compat.dispatch_mode_class, "torch.utils._python_dispatch.TorchDispatchMode")
def test_a_dispatch_mode_sees_each_operation():
    with Passing() as mode:
        torch.ones(2) + 1

    assert mode.seen == 2


@contract(compat.dispatch_mode_check, "torch.utils._python_dispatch.is_in_torch_dispatch_mode")
def test_a_dispatch_mode_is_told():
    is_watched = compat.dispatch_mode_check()

    assert is_watched() is False
    with Passing():
        assert is_watched() is True


@contract(compat.tracing_check, "torch._C._is_tracing")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_is_told():
    is_traced, told = compat.tracing_check(), []

    def double(x):
        told.append(is_traced())
        return 2 * x

    assert is_traced() is False
    torch.jit.trace(double, torch.ones(2), check_trace=False)
    assert told == [True]


@contract(compat.transform_check, "torch._C._functorch.peek_interpreter_stack")
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_a_transform_is_told(transform):
    innermost, told = compat.transform_check(), []

    def total(x):
        told.append(innermost())
        return x.sum()

    assert innermost() is None
    transform(total)(torch.ones(2, 3))
    assert told[0] is not None


@contract(compat.below_autograd_guard, "torch._C._AutoDispatchBelowADInplaceOrView")
def test_below_autograd_neither_gradients_nor_views_are_noted():
    x = torch.ones(2, 3, requires_grad=True)

    with compat.below_autograd_guard()():
        doubled, view = x * 2, torch.ones(6).view(2, 3)

    assert doubled.grad_fn is None and not doubled.requires_grad
    assert not view._is_view()
    assert (x * 2).requires_grad and torch.ones(6).view(2, 3)._is_view()


@contract(compat.byte_product, "torch._int_mm")
def test_bytes_are_multiplied_exactly():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (17, 64), dtype=torch.int8, generator=generator)
    values = torch.randint(-7, 8, (24, 64), dtype=torch.int8, generator=generator)

    sums = compat.byte_product(codes, values.t())

    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), codes.long() @ values.long().t())


@contract(compat.int8_weight_product, "torch._weight_int8pack_mm")
def test_the_product_with_int8_weights_is_that_of_their_values():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    codes = torch.randint(-127, 128, (16, 64), dtype=torch.int8, generator=generator)
    scale = torch.rand(16, generator=generator).bfloat16()

    product = compat.int8_weight_product(x, codes, scale)

    expected = x.float() @ codes.float().t() * scale.float()
    assert product.dtype == torch.bfloat16
    assert torch.allclose(product.float(), expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


@contract(compat.int4_weight_product, "torch.ops.aten._weight_int4pack_mm_for_cpu")
def test_the_product_with_int4_weights_takes_scales_and_zeros_of_each_group():
    """The blocks that PyTorch packs itself; `kernels.cpu.int4` packs the same ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    codes = torch.randint(0, 16, (64, 64), dtype=torch.int32, generator=generator)
    pairs = torch.stack([torch.rand(2, 64, generator=generator), torch.randn(2, 64, generator=generator)], -1)
    octets = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)

    product = compat.int4_weight_product(x, octets, 32, pairs.bfloat16())

    scale, zero = pairs.bfloat16().float().repeat_interleave(32, dim=0).permute(2, 1, 0)
    expected = x.float() @ ((codes - 8) * scale + zero).t()
    assert product.dtype == torch.bfloat16
    assert torch.allclose(product.float(), expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


@contract(compat.tensor_version, "torch.Tensor._version")
def test_a_change_in_place_is_counted_through_views():
    x = torch.zeros(4)
    before = compat.tensor_version(x)

    x[1:].add_(1)

    assert compat.tensor_version(x) == before + 1


@contract(compat.memory_of, "torch.UntypedStorage._cdata")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_views_lie_in_the_memory_of_their_tensor(device):
    x, other = torch.empty(2, 3, device=device), torch.empty(2, 3, device=device)

    assert compat.memory_of(x) == compat.memory_of(x[1].view(3, 1)) != compat.memory_of(other)
    assert compat.memory_of(x.untyped_storage()) == compat.memory_of(x)


class Wrapped(torch.Tensor):
    """Counts the functions that are called on it."""

    called = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called += 1
        with compat.plain_functions():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


@contract(compat.bare_wrapper, "torch.Tensor._make_wrapper_subclass")
def test_a_wrapper_has_form_and_no_memory():
    like = torch.empty(6, 4, dtype=torch.float16, device="meta").t()[1:]

    wrapper = compat.bare_wrapper(Wrapped, like, torch.device("cpu"))

    assert type(wrapper) is Wrapped
    assert (wrapper.shape, wrapper.stride(), wrapper.storage_offset()) == (like.shape, (1, 4), 1)
    assert (wrapper.dtype, wrapper.device.type) == (torch.float16, "cpu")


@contract(compat.plain_functions, "torch._C.DisableTorchFunctionSubclass")
def test_functions_within_plain_functions_are_not_seen():
    """Otherwise the method would call itself."""
    wrapper = compat.bare_wrapper(Wrapped, torch.empty(2, device="meta"), torch.device("cpu"))
    before = Wrapped.called

    assert wrapper.size(0) == 2

    assert Wrapped.called == before + 1


@contract(compat.written_arguments, "torch._ops.OpOverload._schema")
def test_the_schema_tells_what_an_operator_writes_to():
    x, y = torch.ones(2), torch.ones(2)

    assert list(compat.written_arguments(torch.ops.aten.add.Tensor, (x, y), {})) == []
    assert list(compat.written_arguments(torch.ops.aten.add_.Tensor, (x, y), {})) == [x]
    (out,) = compat.written_arguments(torch.ops.aten.add.out, (x, 1), {"out": y})
    assert out is y


@contract(compat.flatten, "torch.utils._pytree.tree_flatten")
def test_outputs_of_models_are_flattened_to_tensors():
    output = BaseModelOutput(last_hidden_state=torch.ones(1), hidden_states=(torch.ones(2), torch.ones(3)))

    leaves, _ = compat.flatten({"output": output, "rest": [1, None]})

    assert [leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)] == [1, 2, 3]


@contract(compat.unflatten, "torch.utils._pytree.tree_unflatten")
def test_unflattened_leaves_have_their_form():
    tree = (BaseModelOutput(last_hidden_state=torch.ones(1)), {"a": [1, (2,)]})

    again = compat.unflatten(*compat.flatten(tree))

    assert type(again[0]) is BaseModelOutput and again[1] == tree[1]
    assert again[0].last_hidden_state is tree[0].last_hidden_state


@contract(compat.map_leaves, "torch.utils._pytree.tree_map_only")
def test_only_leaves_of_the_class_are_mapped():
    assert compat.map_leaves(int, str, {"a": [1, 2.5], "b": ("x", 3)}) == {"a": ["1", 2.5], "b": ("x", "3")}


@contract(compat.own_parameters, "torch.nn.Module._parameters")
def test_own_parameters_are_the_dictionary_with_what_is_absent():
    linear = torch.nn.Linear(2, 3, bias=False)

    held = compat.own_parameters(linear)

    assert held == {"weight": linear.weight, "bias": None}
    linear.weight = torch.nn.Parameter(torch.zeros(3, 2))
    assert held["weight"] is linear.weight


@contract(compat.own_modules, "torch.nn.Module._modules")
def test_own_modules_are_the_dictionary():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))

    held = compat.own_modules(model)

    assert held == {"0": model[0]}
    model.add_module("later", None)
    assert held["later"] is None


@contract(compat.has_hooks, "torch.nn.Module._forward_hooks", "torch.nn.Module._backward_hooks")
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_each_kind_of_hook_is_told(register):
    linear = torch.nn.Linear(2, 3)

    assert not compat.has_hooks(linear)
    handle = getattr(linear, register)(lambda *_: None)
    assert compat.has_hooks(linear)
    handle.remove()
    assert not compat.has_hooks(linear)


class Noting(compat.StateModule):
    """Notes what it is asked to do."""

    def __init__(self):
        super().__init__()
        self.shift, self.asked = torch.nn.Parameter(torch.ones(2)), []

    def apply_to_tensors(self, fn, recurse=True):
        self.asked.append("moved")
        return super().apply_to_tensors(fn, recurse)

    def take_state(self, state_dict, prefix, *rest):
        _metadata, strict, missing, *_ = rest
        self.asked.append(("taken", prefix, strict, list(missing)))
        super().take_state(state_dict, prefix, *rest)

    def give_state(self, destination, prefix, keep_vars):
        self.asked.append(("given", prefix))
        super().give_state(destination, prefix, keep_vars)


@contract(
    compat.StateModule,
    "torch.nn.Module._apply",
    "torch.nn.Module._load_from_state_dict",
    "torch.nn.Module._save_to_state_dict",
)
def test_a_module_is_asked_when_it_is_moved_loaded_and_saved():
    inner = Noting()
    outer = torch.nn.Sequential(inner)

    state = outer.double().state_dict()
    outer.load_state_dict({"0.shift": torch.zeros(2)})

    assert inner.asked == ["moved", ("given", "0."), ("taken", "0.", True, [])]
    assert state["0.shift"].dtype == torch.float64
    assert torch.equal(inner.shift.detach(), torch.zeros(2, dtype=torch.float64))
