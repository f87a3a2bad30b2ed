"""How much memory the optimisation of the encoder needs beside weights, against the layer-wise search."""

import pytest
import torch

from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.pipeline.calibrate import CalibrationData, calibrate
from optimum_qvlm.pipeline.cost import LiveBytes
from optimum_qvlm.pipeline.encoder.step import EncoderStep
from tests.configs import make_config
from tests.plans import CPU, plan_for
from tests.tiny_models import llava_batch, tiny_llava

TEXT = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3}
VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}


def peaks(batch_count, **settings):
    """Most bytes of the layer-wise search and of the step, beside weights."""
    settings = {"vision_scheme": "w4a4", "method": "layerwise", "search_tokens": 512, "encoder_epochs": 1, **settings}
    batches = [llava_batch(rows=8, tokens=64, seed=seed) for seed in range(batch_count)]
    labels = [torch.where(torch.arange(64) > 56, batch["input_ids"], -100) for batch in batches]
    recipe = Recipe(source="", samples=8 * batch_count, seed=0, fingerprint="")
    data = CalibrationData(batches=batches, recipe=recipe, labels=labels)
    model, full = (tiny_llava(text=dict(TEXT), vision=dict(VISION)) for _ in range(2))
    options, plan = make_config("w4a4", **settings).options(), plan_for(model, "w4a4", **settings)
    search, step = LiveBytes(CPU), LiveBytes(CPU)

    with search:
        result = calibrate(model, plan, make_config("w4a4", **settings | {"encoder_epochs": 0}).options(), data, CPU)
    half = EncoderStep.of(full, plan, options, CPU)
    half.note(batches)
    full.model.vision_tower = model.model.vision_tower
    full.model.multi_modal_projector = model.model.multi_modal_projector
    with step:
        half.learn(batches, labels, result.modules)
    return search.peak, step.peak


@pytest.mark.parametrize("settings", [{}, {"transforms": "off", "error_feedback": False}], ids=["default", "clips"])
def test_the_step_needs_at_most_one_and_a_half_times_the_search(settings):
    """Models are quantized on devices that they do not fit on; a step that needed much more could not run there.

    Host and device are one here. What grows with the number of batches waits on the host, in both, and is taken off.
    """
    (search, step), (search_of_two, step_of_two) = (peaks(batch_count, **settings) for batch_count in (1, 2))
    on_device = {"search": 2 * search - search_of_two, "step": 2 * step - step_of_two}

    print(f"of one batch {search / 2**20:.1f} MiB, {step / 2**20:.1f} MiB, {step / search:.2f} x")
    print(*(f"{name} {size / 2**20:.1f} MiB" for name, size in on_device.items()), "on the device")
    assert step <= 1.5 * search
    assert 0 < on_device["step"] <= 1.5 * on_device["search"]
