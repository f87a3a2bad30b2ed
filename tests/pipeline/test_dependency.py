"""How dependency is measured on a model: what it looks at, and what it does not depend on."""

import pytest
import torch
from torch import Tensor, nn

from optimum_qvlm.pipeline import dependency as measuring
from optimum_qvlm.pipeline.dependency import EntropyOptions, dependency, measure_part
from tests.plans import front_of, plan_for
from tests.tiny_models import llama_batch, llava_batch, tiny_llama, tiny_llava

OPTIONS = EntropyOptions(bits=4, static=False, softness="step_squared", tokens=2048, seed=0)
MANY_LAYERS = {"num_hidden_layers": 4}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measure(model, batches, scheme="w4a4", options=OPTIONS):
    """Dependencies of the last part of a model."""
    return measure_part(front_of(model, plan_for(model, scheme), batches), options)


def entropies(found):
    return [entry.entropy for entry in found]


def test_every_pair_of_layers_is_measured():
    found = measure(tiny_llama(**MANY_LAYERS), [llama_batch()])

    assert [(entry.part, entry.layer, entry.marginal) for entry in found] == [
        ("language", 0, False),
        ("language", 1, False),
        ("language", 2, False),
    ]
    assert all(entry.entropy > 0 for entry in found)


@pytest.mark.parametrize("make_model, batch", [(tiny_llama, llama_batch()), (tiny_llava, llava_batch())])
def test_the_model_is_left_as_it_was(make_model, batch):
    """It comes before the search, which starts from full precision."""
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    types = [type(module) for module in model.modules()]

    measure(model, [batch])

    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(type(module) is not nn.Linear and isinstance(module, nn.Linear) for module in model.modules())


def test_outputs_are_those_of_rounded_layers():
    """Two bits change what eight do not."""
    model, batches = tiny_llama(**MANY_LAYERS), [llama_batch()]

    assert entropies(measure(model, batches, "w2a8")) != entropies(measure(model, batches, "w8a8"))


def test_the_same_seed_measures_the_same():
    model, batches = tiny_llama(**MANY_LAYERS), [llama_batch(), llama_batch(seed=1)]
    few = EntropyOptions(bits=4, static=False, softness="step_squared", tokens=5, seed=1)

    assert measure(model, batches) == measure(model, batches)
    assert measure(model, batches, options=few) == measure(model, batches, options=few)


def test_what_stands_in_the_padding_changes_nothing():
    other = {name: tensor.clone() for name, tensor in llama_batch(padding=3).items()}
    other["input_ids"][other["attention_mask"] == 0] = 33
    model = tiny_llama(**MANY_LAYERS)

    assert measure(model, [llama_batch(padding=3)]) == measure(model, [other])


@pytest.mark.parametrize("factor", [0.05, 20.0])
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_scaling_an_activation_leaves_its_dependency(factor, static):
    options = EntropyOptions(bits=4, static=static, softness="step_squared", tokens=1, seed=0)
    first, second = normal(40, 96), normal(40, 96, seed=1)

    plain, _ = dependency(first, second, options)

    assert dependency(first * factor, second, options)[0] == pytest.approx(plain, rel=1e-4)
    assert dependency(first, second * factor, options)[0] == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("first, second", [((40, 64), (40, 96)), ((40, 64), (10, 64))], ids=["width", "tokens"])
def test_unequal_shapes_give_the_marginal_entropy_and_say_so(first, second):
    """There is no pair of elements to count; the bound does not depend on what came before."""
    found = dependency(normal(*first), normal(*second, seed=1), OPTIONS)

    assert found == dependency(normal(*first, seed=5), normal(*second, seed=1), OPTIONS)
    assert found[1] is True
    same = dependency(normal(*second, seed=5), normal(*second, seed=1), OPTIONS)
    assert same[1] is False and same[0] <= found[0]


def test_a_sample_of_channels_stands_for_all(monkeypatch):
    """Cost does not grow with the width of a model."""
    first, second = normal(200, 512), normal(200, 512, seed=1)
    whole, _ = dependency(first, second, OPTIONS)
    monkeypatch.setattr(measuring, "CHANNELS", 128)

    assert dependency(first, second, OPTIONS)[0] == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_constant_outputs_are_measured(value):
    found, marginal = dependency(torch.full((8, 64), value), torch.full((8, 64), value), OPTIONS)

    assert 0.0 < found < 1.2 and marginal is False


@pytest.mark.parametrize(
    "scheme, settings, bits, static",
    [
        ("w4a4", {}, 4, False),
        ("w4a8", {}, 6, False),
        ("w4a16", {"vision_scheme": None}, 6, False),
        ("w6a6", {"vision_scheme": "w4a4"}, 4, False),
        ("w4a4", {"activation_range": "static"}, 4, True),
    ],
)
def test_one_grid_serves_the_whole_model(scheme, settings, bits, static):
    """So that one threshold fits the tower and the language model: the fewest bits of any activation, at most 6."""
    options = EntropyOptions.of(plan_for(tiny_llava(), scheme, **settings), "step", 7, 3)

    assert options == EntropyOptions(bits=bits, static=static, softness="step", tokens=7, seed=3)
