"""A small part of a calibration tells what all of it would do and cost."""

from dataclasses import replace

import pytest
import torch

from optimum_qvlm import QVLMConfig
from optimum_qvlm.errors import CalibrationError, UnsupportedModelError
from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.pipeline.calibrate import calibrate
from optimum_qvlm.pipeline.rehearsal import Workload, rehearse
from optimum_qvlm.plan import Block
from tests.configs import make_config
from tests.plans import CPU, plan_for
from tests.tiny_families import FAMILIES
from tests.tiny_models import llava_batch, tiny_llava

BATCHES = [llava_batch(rows=8, tokens=20, seed=seed) for seed in range(4)]


def rehearsed(model, plan=None, *, batches=BATCHES, **settings):
    sample = llava_batch(rows=1, tokens=20)
    options = make_config("w4a8", **settings).options()
    return rehearse(model, plan or plan_for(model), options, Workload(sample=sample, batches=batches), CPU)


def searched(model):
    return {path for path, module in model.named_modules() if isinstance(module, QuantLinear)}


def test_the_first_block_of_each_part_is_searched_for_real():
    model = tiny_llava()

    found = rehearsed(model, max_block_depth=1)

    first = ("vision_tower.encoder.layers.0.", "multi_modal_projector.", "language_model.layers.0.")
    assert len(found.modules) == len(searched(model)) == 6 + 2 + 7
    assert all(path.removeprefix("model.").startswith(first) for path in searched(model))


def test_blocks_of_several_layers_are_searched_whole():
    """Formed on the sample: at a threshold of zero every pair of layers shares a block."""
    found = rehearsed(tiny_llava(), threshold=0.0)

    assert found.plan.blocks[0] == Block(part="vision", first=0, last=1)
    assert len(found.modules) == 12 + 2 + 14


def test_the_rest_can_be_rounded_so_that_the_model_is_whole():
    model = tiny_llava()
    plan = plan_for(model)

    found = rehearsed(model, plan)
    rest = calibrate(model, found.rest, QVLMConfig().options(), None, CPU)

    assert not set(found.modules) & set(rest.modules)
    assert {*found.modules, *rest.modules} == {linear.name for linear in plan.linears()}


def test_chains_are_compared_by_part():
    assert rehearsed(tiny_llava()).chain == {"vision": 0.0, "projector": 0.0, "language": 0.0}


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_models_with_more_between_their_layers_are_rehearsed_too(name):
    family = FAMILIES[name]
    model = family.build()
    workload = Workload(sample=family.batch(rows=1), batches=[family.batch()])

    found = rehearse(model, plan_for(model), QVLMConfig().options(), workload, CPU)

    assert max(found.chain.values()) < 1e-6
    assert found.cost.seconds > 0


def test_more_samples_cost_more_memory_and_the_model_counts_once():
    few, many = (rehearsed(tiny_llava(), batches=BATCHES[:count]).cost for count in (1, 4))

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
    """The plan of the first blocks has no unused layers, so they are looked at before."""
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
