"""Adapters that are wrong, and weights that mean nothing, are refused before hours are spent."""

import pytest
import torch
from torch import nn

from optimum_qvlm.errors import CalibrationError, UnsupportedModelError
from optimum_qvlm.models.adapter import Part
from optimum_qvlm.models.llama import LlamaAdapter
from optimum_qvlm.pipeline import checks
from optimum_qvlm.pipeline.capture import Tracer
from tests.plans import CPU, forward_of, plan_for
from tests.tiny_models import llama_batch, llava_batch, tiny_llama, tiny_llava


class Skipping(LlamaAdapter):
    """Forgets the second of three layers."""

    def parts(self):
        return (Part(name="language", layers=("model.layers.0", "model.layers.2")),)


class WronglyUnused(LlamaAdapter):
    """Says that nothing reads the last layer."""

    def parts(self):
        first, last = self.numbered("model.layers")
        return (Part(name="language", layers=(first,), unused=(last,)),)


class WrongSites(LlamaAdapter):
    """Takes linears for neighbours that are not."""

    wrong = ("self_attn.q_proj", "self_attn.o_proj")

    def sites(self, layer):
        first, second = (f"{layer}.{name}" for name in self.wrong)
        rest = [site for site in super().sites(layer) if not {first, second} & set(site)]
        return [(first, second), *rest]


def checked(model, batch, adapter=None):
    """Run both checks over all parts."""
    plan = plan_for(model, adapter=adapter)
    tracer = Tracer(model, forward_of(model), plan.parts, CPU)
    captured = tracer.capture([batch])
    for part in plan.parts:
        checks.require_chain(model, part, captured[part.name][0], CPU)
        for number, layer in enumerate(part.layers):
            checks.require_shared_inputs(model, layer, captured[part.name][0], number, CPU)
    checks.require_unused(tracer, plan.unused, captured, [batch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_adapters_of_known_families_are_right(dtype):
    image_batch = llava_batch(padding=2)
    image_batch["pixel_values"] = image_batch["pixel_values"].to(dtype)

    checked(tiny_llava().to(dtype), image_batch)
    checked(tiny_llama().to(dtype), llama_batch(padding=2))


def test_a_skipped_layer_is_refused():
    """Everything after it would be calibrated on the wrong inputs."""
    model = tiny_llama(num_hidden_layers=3)

    with pytest.raises(UnsupportedModelError, match=r"the language layers, run one after the other, differ .* \(limit"):
        checked(model, llama_batch(), Skipping(model))


def test_work_between_layers_is_refused():
    """A model that adds something between layers is no chain."""
    model = tiny_llama()
    model.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] + 1, *args[1:]))
    run = Tracer(model, forward_of(model), plan_for(model).parts, CPU).capture([llama_batch()])["language"][0]
    model.model.layers[1]._forward_pre_hooks.clear()

    with pytest.raises(UnsupportedModelError, match="the model does more between its layers than the adapter says"):
        checks.require_chain(model, plan_for(model).parts[0], run, CPU)


def test_linears_that_read_different_tensors_are_refused_as_one_site():
    model = tiny_llama()

    with pytest.raises(
        UnsupportedModelError,
        match=r"layers.0.self_attn.q_proj and model.layers.0.self_attn.o_proj were taken to read the same input, but",
    ):
        checked(model, llama_batch(), WrongSites(model))


def test_a_linear_that_never_runs_is_refused():
    """There is nothing to calibrate it on."""
    model = tiny_llama()
    model.model.layers[1].spare = nn.Linear(64, 64)

    with pytest.raises(
        UnsupportedModelError, match=r"layers.1.spare of model.layers.1 never ran in a calibration sample"
    ):
        checked(model, llama_batch())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("path", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"])
def test_weights_that_are_not_finite_are_refused_and_counted(value, path):
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter(f"{path}.weight")[0, :3] = value

    with pytest.raises(
        CalibrationError, match=f"{path}.weight holds 3 NaN or infinite values; the checkpoint is damaged"
    ):
        checks.require_sound_parameters(model, plan_for(model))


def test_finite_weights_are_accepted():
    model = tiny_llama()

    checks.require_sound_parameters(model, plan_for(model))


def test_weights_that_stay_in_full_precision_may_be_infinite():
    """They may be masks."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")

    checks.require_sound_parameters(model, plan_for(model))


def test_layers_that_return_nan_are_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("nan"))

    with pytest.raises(CalibrationError, match=r"activations at model.layers.1 in calibration batch 0"):
        checked(model, llama_batch())


def test_a_layer_that_is_read_after_all_is_refused_as_unused():
    """It would be rounded without being calibrated."""
    model = tiny_llama()

    with pytest.raises(
        UnsupportedModelError,
        match=r"output depends on model.layers.1 \(it changes by .* without\), which the adapter calls unused",
    ):
        checked(model, llama_batch(), WronglyUnused(model))


def test_layers_that_nothing_reads_may_return_anything():
    """Even a model whose last tower layer overflows works, since nothing sees it."""
    model = tiny_llava()
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[2].mlp.fc2.bias.fill_(1e30)

    checked(model, llava_batch())


def test_unused_layers_are_checked_on_a_batch_that_reaches_the_tower():
    """The first batch may be text, which depends on no tower layer at all."""
    model = tiny_llava()
    plan = plan_for(model)
    tracer = Tracer(model, forward_of(model), plan.parts, CPU)
    batches = [llama_batch(), llava_batch()]
    captured = tracer.capture(batches)

    checks.require_unused(tracer, plan.unused, captured, batches)
    with pytest.raises(UnsupportedModelError, match=r"output depends on vision_tower|model.vision_tower"):
        checks.require_unused(tracer, plan.parts[0].layers[:1], captured, batches)


def test_the_difference_of_the_chain_is_returned():
    model = tiny_llama()
    tracer = Tracer(model, forward_of(model), plan_for(model).parts, CPU)
    run = tracer.capture([llama_batch()])["language"][0]
    assert checks.require_chain(model, tracer.parts[0], run, CPU) == 0

    run.output = run.output * (1 + 1e-4)

    assert checks.require_chain(model, tracer.parts[0], run, CPU) == pytest.approx(1e-4, rel=0.01)
