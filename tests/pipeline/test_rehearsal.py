"""A small part of a calibration tells what all of it would do and cost."""

from dataclasses import replace

import pytest
import torch

from optimum_qvlm import QVLMConfig
from optimum_qvlm.errors import CalibrationError, UnsupportedModelError
from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.pipeline.rehearsal import Workload, rehearse
from optimum_qvlm.plan import Block
from tests.configs import make_config
from tests.plans import CPU, plan_for
from tests.tiny_families import FAMILIES
from tests.tiny_models import llava_batch, tiny_llava

BATCHES = [llava_batch(rows=8, tokens=20, seed=seed) for seed in range(4)]


def rehearsed(model, plan=None, *, batches=BATCHES, labels=None, **settings):
    sample = llava_batch(rows=1, tokens=20)
    options = make_config("w4a8", **settings).options()
    return rehearse(
        model, plan or plan_for(model), options, Workload(sample=sample, labels=labels, batches=batches), CPU
    )


def searched_layers(rehearsal):
    return [error.layer for error in rehearsal.result.layers]


def test_the_first_block_of_each_part_is_searched_for_real():
    rehearsal = rehearsed(tiny_llava(), max_block_depth=1)

    first = ["vision_tower.encoder.layers.0", "multi_modal_projector", "language_model.layers.0"]
    assert [layer.removeprefix("model.") for layer in searched_layers(rehearsal)] == first
    assert all(error.chosen < 1 for error in rehearsal.result.sites)


def test_blocks_of_several_layers_are_searched_whole():
    """Formed on the sample: at a threshold of zero every pair of layers shares a block."""
    rehearsal = rehearsed(tiny_llava(), threshold=0.0)

    assert rehearsal.result.plan.blocks[0] == Block(part="vision", first=0, last=1)
    assert len(searched_layers(rehearsal)) == 2 + 1 + 2


@pytest.mark.parametrize("settings", [{}, {"activation_range": "static"}], ids=["dynamic", "static"])
def test_the_rest_is_rounded_so_that_the_model_is_whole(settings):
    model = tiny_llava()
    plan = plan_for(model, **settings)

    result = rehearsed(model, plan, max_block_depth=1, **settings).result

    assert set(result.modules) == {linear.name for linear in plan.linears()}
    assert all(isinstance(model.get_submodule(linear.path), QuantLinear) for linear in plan.linears())
    assert torch.isfinite(model(**llava_batch(rows=1)).logits).all()


def test_the_encoder_is_optimised_for_one_epoch_and_all_count():
    """What cannot be learned from is found here too."""
    one, many = (
        rehearsed(tiny_llava(), labels=llava_batch(rows=1, tokens=20)["input_ids"], encoder_epochs=epochs)
        for epochs in (1, 1000)
    )

    assert len(one.result.encoder.losses) == len(many.result.encoder.losses) == 2
    assert many.cost.seconds > 50 * one.cost.seconds


def test_chains_are_compared_by_part():
    assert rehearsed(tiny_llava()).result.differences == {"vision": 0.0, "projector": 0.0, "language": 0.0}


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_models_with_more_between_their_layers_are_rehearsed_too(name):
    family = FAMILIES[name]
    model = family.build()
    workload = Workload(sample=family.batch(rows=1), batches=[family.batch()])

    rehearsal = rehearse(model, plan_for(model), QVLMConfig().options(), workload, CPU)

    assert max(rehearsal.result.differences.values()) < 1e-6
    assert rehearsal.cost.seconds > 0


def test_more_samples_cost_more_memory_and_the_model_counts_once():
    few, many = (rehearsed(tiny_llava(), batches=BATCHES[:count], search_tokens=80).cost for count in (1, 4))

    weights = sum(parameter.numel() * 4 for parameter in tiny_llava().parameters())
    assert few.host_bytes > weights
    growth = (many.host_bytes - weights) / (few.host_bytes - weights)
    assert growth == pytest.approx(4, rel=0.05)
    assert many.device_bytes == few.device_bytes


def test_more_tokens_of_the_search_need_more_of_the_device():
    few, many = (rehearsed(tiny_llava(), search_tokens=count).cost for count in (10, 1000))

    assert many.device_bytes > few.device_bytes


def test_time_for_missing_answers_is_part_of_the_estimate():
    model = tiny_llava()
    workload = Workload(sample=llava_batch(rows=1), batches=BATCHES, answer_seconds=1000.0)

    cost = rehearse(model, plan_for(model), QVLMConfig().options(), workload, CPU).cost

    assert cost.answer_seconds == 1000.0
    assert cost.seconds > 1000.0


@pytest.mark.parametrize("rows, times", [(1, 1.0), (4, 4.0)])
def test_the_workload_is_counted_in_tokens(rows, times):
    workload = Workload(sample=llava_batch(rows=1), batches=[llava_batch(rows=rows)])

    assert workload.times == times


def test_layers_that_are_read_after_all_are_refused():
    model = tiny_llava()
    plan = plan_for(model)
    wrong = replace(plan, unused=plan.parts[0].layers[:1])

    with pytest.raises(UnsupportedModelError, match="which the adapter calls unused"):
        rehearsed(model, wrong)


def test_bad_samples_and_weights_are_refused_as_by_the_calibration():
    model, sample = tiny_llava(), llava_batch(rows=1)
    sample["pixel_values"][:] = float("nan")

    with pytest.raises(CalibrationError, match="NaN or infinite activations"):
        rehearse(model, plan_for(model), QVLMConfig().options(), Workload(sample=sample, batches=[sample]), CPU)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match=r"up_proj.weight holds 1 NaN"):
        rehearsed(model)
