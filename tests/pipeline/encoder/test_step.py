"""The optimisation of the encoder inside a calibration."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.errors import CalibrationError
from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.pipeline.calibrate import CalibrationData, calibrate
from optimum_qvlm.pipeline.dependency import EntropyOptions, dependency
from optimum_qvlm.pipeline.encoder.step import CHANNELS, EncoderStep, SoftDependency
from optimum_qvlm.settings import EncoderOptions
from tests.configs import make_config
from tests.plans import CPU, plan_for
from tests.tiny_models import llama_batch, llava_batch, tiny_llama, tiny_llava

RECIPE = Recipe(source="user", samples=8, seed=0, fingerprint="0")
SETTINGS = {"vision_scheme": "w4a4", "transforms": "off", "error_feedback": False}
"""What the step is for: behind transforms and error feedback a model of random weights has nothing left to learn."""


def make_data(seeds=range(4), rows=4):
    batches = [llava_batch(rows=rows, seed=seed, padding=2) for seed in seeds]
    places = torch.arange(batches[0]["input_ids"].shape[1])
    labels = [torch.where((places > 6) & b["attention_mask"].bool(), b["input_ids"], -100) for b in batches]
    return CalibrationData(batches=batches, recipe=RECIPE, labels=labels)


def run(model, epochs, data=None, scheme="w4a4", **settings):
    settings = SETTINGS | settings | {"encoder_epochs": epochs}
    options = make_config(scheme, **settings).options()
    data = make_data() if data is None else data
    return calibrate(model, plan_for(model, scheme, **settings), options, data, CPU)


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def vision_modules(model):
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear) and "language_model" not in path
    }


@pytest.fixture(scope="module")
def learned():
    """A model calibrated with three epochs, and what was reported. Read only."""
    model = tiny_llava()
    return model, run(model, 3)


def test_without_epochs_nothing_is_optimised():
    result = run(tiny_llava(), 0)

    assert result.encoder is None


def test_without_epochs_other_settings_of_it_change_no_byte():
    """The step is not there, so nothing of it can matter."""
    first, second = tiny_llava(), tiny_llava()
    run(first, 0)
    run(second, 0, encoder_lr=0.5, encoder_l1=3.0, encoder_l2=2.0, encoder_eta=7.0)

    assert same(states(first), states(second))


def test_the_loss_falls_on_the_calibration_set(learned):
    _, result = learned

    losses = result.encoder.losses
    assert len(losses) == 4
    assert result.encoder.chosen == min(range(4), key=lambda place: losses[place].total)
    assert losses[result.encoder.chosen].total < losses[0].total


@pytest.mark.slow
def test_the_loss_falls_on_samples_that_it_never_saw():
    """With factors that let errors decide: the answers of a model with random weights cannot be learned."""
    model, before = tiny_llava(), tiny_llava()
    data = make_data(range(8), rows=32)
    settings = {"encoder_lr": 2e-3, "encoder_l2": 100.0, "method": "layerwise"}
    run(before, 0, data, **settings)
    run(model, 3, data, **settings)

    held_out = make_data(range(50, 54), rows=32)
    assert held_out_loss(model, held_out, **settings) < held_out_loss(before, held_out, **settings)


def held_out_loss(model, data, **settings):
    """The composite loss of a calibrated encoder in front of the full-precision language model."""
    full = tiny_llava()
    options = make_config("w4a4", **(SETTINGS | settings | {"encoder_epochs": 1})).options()
    step = EncoderStep.of(full, plan_for(full, "w4a4", vision_scheme="w4a4"), options, CPU)
    step.note(data.batches)
    full.model.vision_tower = model.model.vision_tower
    full.model.multi_modal_projector = model.model.multi_modal_projector
    weights = {part.name: [1 / 6] * len(part.layers) for part in step.plan.parts}
    total = 0.0
    with torch.no_grad():
        for number, (batch, labels) in enumerate(zip(data.batches, data.labels, strict=True)):
            total += float(step.terms(number, batch, labels, weights).total(options.encoder))
    return total


def test_only_scales_and_clips_of_the_encoder_change(learned):
    model, result = learned
    plain = tiny_llava()
    before = run(plain, 0)

    changed = 0
    for path, module in vision_modules(model).items():
        old = vision_modules(plain)[path]
        assert module.format.weight == old.format.weight and module.format.activation == old.format.activation
        changed += not torch.equal(module.weight_scale, old.weight_scale)
    assert changed > 0
    kept = {name for name in states(plain) if "language_model" not in name and "weight" not in name.split(".")[-1]}
    assert all(torch.equal(states(plain)[name], states(model)[name]) for name in kept)
    assert set(result.modules) == set(before.modules)


def test_records_say_what_the_modules_have(learned):
    """They are what a checkpoint is asserted against."""
    model, result = learned

    for path, module in vision_modules(model).items():
        assert result.modules[path].format.activation_clip == module.format.activation_clip
        assert 0.25 < result.modules[path].weight_clip <= 2.0
    for site in plan_for(model, "w4a4", vision_scheme="w4a4").sites():
        assert len({result.modules[linear.name].format.activation_clip for linear in site.linears}) == 1


def test_what_is_chosen_is_what_the_model_has(learned):
    """The reported loss is that of the packed model, not of parameters before they were rounded."""
    model, result = learned
    full = tiny_llava()
    options = make_config("w4a4", **SETTINGS, encoder_epochs=1).options()
    data = make_data()
    step = EncoderStep.of(full, plan_for(full, "w4a4", vision_scheme="w4a4"), options, CPU)
    step.note(data.batches)
    full.model.vision_tower = model.model.vision_tower
    full.model.multi_modal_projector = model.model.multi_modal_projector

    errors = [[], []]
    with torch.no_grad():
        for number, batch in enumerate(data.batches):
            _, seen = step.seen(number, batch)
            errors[0].append(float(seen.errors["vision"][0]))
            errors[1].append(float(seen.errors["final"][0]))

    loss = result.encoder.losses[result.encoder.chosen]
    assert sum(errors[0]) / 4 == pytest.approx(loss.vision, rel=1e-5)
    assert sum(errors[1]) / 4 == pytest.approx(loss.final, rel=1e-5)


def test_the_same_seed_gives_the_same_bytes(learned):
    model, result = learned
    again = tiny_llava()

    repeated = run(again, 3)

    assert same(states(model), states(again))
    assert repeated.encoder.losses == result.encoder.losses


def test_the_model_takes_gradients_as_before():
    model = tiny_llava()
    run(model, 1)

    assert model.model.language_model.norm.weight.requires_grad
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_step_that_makes_it_worse_is_not_taken():
    """A learning rate that is far too large must not cost accuracy."""
    wild, plain = tiny_llava(), tiny_llava()

    result = run(wild, 1, encoder_lr=5.0)
    run(plain, 0)

    assert result.encoder.chosen == 0
    assert same(states(wild), states(plain))


def test_the_depth_of_blocks_is_reported_before_and_after(learned):
    _, result = learned

    assert len(result.encoder.mean_depths) == 3
    assert result.encoder.mean_depths[-1] == result.plan.mean_depth("language")
    assert all(1 <= depth <= 2 for depth in result.encoder.mean_depths)


def test_blocks_that_are_given_stay():
    """Benchmarks compare partitions; forming them again would make all the same."""
    model = tiny_llava()
    plan = plan_for(model, "w4a4", **SETTINGS)
    options = replace(make_config("w4a4", **SETTINGS, encoder_epochs=1).options(), blocks=plan.blocks)

    result = calibrate(model, plan, options, make_data(range(1)), CPU)

    assert result.plan.blocks == plan.blocks
    assert result.encoder.mean_depths == (1.0, 1.0, 1.0)


def test_without_blocks_there_is_no_depth():
    assert run(tiny_llava(), 1, method="layerwise").encoder.mean_depths == ()


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "w6a6"])
@pytest.mark.parametrize("vision_scheme", ["w4a16", "w8a8"])
def test_every_scheme_is_optimised(scheme, vision_scheme):
    model = tiny_llava()

    result = run(model, 1, scheme=scheme, vision_scheme=vision_scheme)

    assert all(math.isfinite(loss.total) for loss in result.encoder.losses)
    assert all(module.format.weight.bits == int(vision_scheme[1]) for module in vision_modules(model).values())


def test_static_ranges_are_learned():
    """The paper's mode."""
    model, before = tiny_llava(), tiny_llava()
    settings = {"activation_range": "static", "soft_assignment": "step", "encoder_lr": 2e-3, "encoder_l2": 100.0}
    data = make_data(rows=16)

    run(before, 0, data, **settings)
    result = run(model, 3, data, **settings)

    old = vision_modules(before)
    assert result.encoder.chosen > 0
    assert any(not torch.equal(m.input_scale, old[path].input_scale) for path, m in vision_modules(model).items())


@pytest.mark.parametrize(
    "make_model, batch, settings",
    [(tiny_llama, llama_batch, {}), (tiny_llava, llava_batch, {"vision_scheme": None})],
    ids=["text model", "tower in full precision"],
)
def test_where_there_is_nothing_to_learn_nothing_happens(make_model, batch, settings):
    data = CalibrationData(batches=[batch()], recipe=RECIPE, labels=[batch()["input_ids"]])

    assert run(make_model(), 2, data, **settings).encoder is None


def test_a_loss_that_overflows_names_its_batch():
    """Labels are fine here: the features of one sample are not."""
    data = make_data()
    model = tiny_llava()
    options = EncoderOptions(epochs=1)
    plan = plan_for(model, "w4a4", vision_scheme="w4a4")
    quantized = copy.deepcopy(model)
    result = run(quantized, 0, data)
    step = EncoderStep(model, plan, options, lambda a, b: (a - b).square().mean() * float("inf"), CPU)
    step.note(data.batches)
    model.model.vision_tower = quantized.model.vision_tower
    model.model.multi_modal_projector = quantized.model.multi_modal_projector

    with pytest.raises(CalibrationError, match=r"the loss of the encoder is inf in calibration batch 0; .*encoder"):
        step.learn(data.batches, data.labels, result.modules)


@pytest.mark.parametrize("widths", [(64, 64), (64, 32)], ids=["equal", "marginal"])
def test_the_dependency_is_that_of_the_partition(widths):
    options = EntropyOptions(bits=4, static=False, softness="step_squared", tokens=64, seed=0)
    first, second = (
        torch.randn(30, width, generator=torch.Generator().manual_seed(width + n)) for n, width in enumerate(widths)
    )
    assert max(widths) <= CHANNELS

    expected, _ = dependency(first, second, options)

    assert float(SoftDependency(options)(first, second)) == pytest.approx(expected, rel=1e-4)
