"""What each calibration token counts at each site, against an ordinary backward pass and what must hold of it."""

import pytest
import torch

from optimum_qvlm.errors import CalibrationError
from optimum_qvlm.pipeline.captured import Bench
from optimum_qvlm.pipeline.cost import Meter
from optimum_qvlm.pipeline.token_weights import FLOOR, token_weights
from tests.configs import make_config
from tests.plans import CPU, plan_for
from tests.tiny_models import llama_batch, llava_batch, tiny_llama, tiny_llava

CASES = {"llava": (tiny_llava, llava_batch), "llama": (tiny_llama, llama_batch)}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    make_model, make_batch = request.param
    model = make_model()
    return model, plan_for(model), make_batch


def labels_of(batch, first=0):
    """Every real token from place `first` on."""
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    labels[:, :first] = -100
    return labels


def weigh(model, plan, batches, labels=None, seed=0):
    labels = [labels_of(batch) for batch in batches] if labels is None else labels
    options = make_config(seed=seed).options()
    return token_weights(Bench(model=model, options=options, device=CPU, meter=Meter()), plan, batches, labels)


def site_names(plan):
    return {site.name for part in plan.parts for layer in part.layers for site in layer.sites}


def test_every_site_has_a_weight_for_each_token_of_each_run(case):
    model, plan, make_batch = case

    weights = weigh(model, plan, [make_batch(), make_batch(rows=3, tokens=9, seed=1)])

    assert weights.keys() == site_names(plan)
    decoder = next(part for part in plan.parts if not part.vision).layers[0].sites
    for site in decoder:
        assert [tuple(run.shape) for run in weights[site.name]] == [(2, 12, 1), (3, 9, 1)]


def test_weights_have_mean_one_and_none_is_below_the_floor(case):
    model, plan, make_batch = case

    for runs in weigh(model, plan, [make_batch(), make_batch(seed=1)]).values():
        every = torch.cat([run.flatten() for run in runs])
        assert float(every.mean()) == pytest.approx(1, abs=1e-4)
        assert float(every.min()) >= FLOOR


def test_tokens_that_no_prediction_reads_have_the_least_weight():
    """In a causal model nothing that is predicted depends on what comes after it."""
    model, batch = tiny_llama(), llama_batch(tokens=12)
    labels = labels_of(batch)
    labels[:, 8:] = -100  # the last prediction is that of token 7, from token 6

    for runs in weigh(model, plan_for(model), [batch], [labels]).values():
        assert torch.equal(runs[0][:, 7:], torch.full((2, 5, 1), FLOOR))
        assert bool((runs[0][:, :7] > FLOOR).any())


def test_last_layers_count_the_tokens_that_predict():
    """What the last layer gives at a token is read by that token's prediction alone."""
    model, batch = tiny_llama(), llama_batch(tokens=12)
    plan = plan_for(model)

    weights = weigh(model, plan, [batch], [labels_of(batch, first=10)])

    last = plan.parts[-1].layers[-1].sites[-1]
    assert torch.equal(weights[last.name][0][:, :9], torch.full((2, 9, 1), FLOOR))


def test_weights_are_norms_of_gradients(case):
    """Of the linears of a site together, by an ordinary backward pass through the whole model at once."""
    model, plan, make_batch = case
    batch = make_batch()
    weights = weigh(model, plan, [batch])
    site = plan.parts[-1].layers[0].sites[0]
    outputs = []
    handles = [
        model.get_submodule(linear.path).register_forward_hook(lambda _m, _a, out: outputs.append(out))
        for linear in site.linears
    ]

    logits = model(**batch, use_cache=False).logits
    for handle in handles:
        handle.remove()
    draws = torch.rand(2 * 11, 1, generator=torch.Generator().manual_seed(0))
    chances = logits[:, :-1].reshape(22, -1).softmax(-1)
    drawn = torch.searchsorted(chances.detach().cumsum(-1), draws)
    loss = -chances.gather(1, drawn).log().sum()
    gradients = torch.autograd.grad(loss, outputs)

    norms = sum(gradient.square().sum(-1, keepdim=True) for gradient in gradients).sqrt()
    largest = norms.flatten().kthvalue(int(0.999 * norms.numel())).values
    expected = FLOOR + (1 - FLOOR) * norms.clamp(max=largest) / norms.clamp(max=largest).mean()
    torch.testing.assert_close(weights[site.name][0], expected, rtol=1e-4, atol=1e-5)


def test_the_seed_decides_which_labels_are_drawn(case):
    model, plan, make_batch = case
    batches = [make_batch()]

    first, again, other = weigh(model, plan, batches), weigh(model, plan, batches), weigh(model, plan, batches, seed=1)

    assert all(torch.equal(first[name][0], again[name][0]) for name in first)
    assert any(not torch.equal(first[name][0], other[name][0]) for name in first)


def test_the_model_is_left_as_it_was(case):
    model, plan, make_batch = case
    model(**make_batch())  # transformers adds hooks of its own in the first forward
    hooks = [list(module._forward_hooks.values()) for module in model.modules()]
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}

    weigh(model, plan, [make_batch()])

    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert parameter.grad is None
        assert torch.equal(parameter, before[name][1])
    assert [list(module._forward_hooks.values()) for module in model.modules()] == hooks
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_predictions_weighs_nothing():
    """Every token counts the same there."""
    model = tiny_llama()
    plan = plan_for(model)
    model.get_output_embeddings = lambda: None

    assert weigh(model, plan, [llama_batch()]) == {}


def test_the_default_device_changes_nothing(case):
    """Programs that set one would otherwise move what is drawn there."""
    model, plan, make_batch = case
    batches = [make_batch()]
    labels = [labels_of(batch) for batch in batches]
    expected = weigh(model, plan, batches, labels)

    with torch.device("meta"):
        actual = weigh(model, plan, batches, labels)

    assert all(torch.equal(actual[name][0], expected[name][0]) for name in expected)


def test_gradients_that_are_no_numbers_are_refused_with_the_way_out():
    """Weights of them would be none either, and the search would blame the inputs."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))

    with pytest.raises(CalibrationError, match=r"gradients at .* are NaN or infinite.*search\.token_weights False"):
        weigh(model, plan_for(model), [llama_batch()])
