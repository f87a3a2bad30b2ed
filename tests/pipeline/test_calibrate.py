"""The whole calibration of a loaded model: what it measures, what it leaves, what it does not depend on."""

import copy
import math
import statistics

import pytest
import torch
from torch import nn

from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.errors import CalibrationError
from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.pipeline.calibrate import CalibrationData, calibrate
from optimum_qvlm.pipeline.capture import first_tensor
from tests.configs import make_config
from tests.plans import CPU, plan_for
from tests.tiny_models import PAD_TOKEN, llama_batch, llava_batch, tiny_llama, tiny_llava

PLAIN = {"transforms": "off", "error_feedback": False}
"""Clips alone, which no last bit moves."""

RECIPE = Recipe(source="user", samples=4, seed=0, fingerprint="0")
LLAVA_BATCHES = [llava_batch(seed=0, padding=2), llava_batch(rows=3, tokens=9, seed=1)]
LLAMA_BATCHES = [llama_batch(seed=0, padding=2), llama_batch(rows=3, tokens=9, seed=1)]


def run(model, batches, scheme="w4a8", **settings):
    """Calibrate in place. Without batches, round to nearest."""
    options = make_config(scheme, **settings).options()
    data = None if batches is None else CalibrationData(batches=batches, recipe=RECIPE)
    return calibrate(model, plan_for(model, scheme, **settings), options, data, CPU)


def longer(batch, more):
    """The same samples with `more` pad tokens on the right."""
    rows = batch["input_ids"].shape[0]
    changed = dict(batch)
    changed["input_ids"] = torch.cat([batch["input_ids"], torch.full((rows, more), PAD_TOKEN)], dim=1)
    changed["attention_mask"] = torch.cat([batch["attention_mask"], torch.zeros(rows, more, dtype=torch.int64)], dim=1)
    return changed


def clips(result):
    return {name: (entry.format.activation_clip, round(entry.weight_clip, 3)) for name, entry in result.modules.items()}


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(params=["llava", "llama"])
def case(request):
    if request.param == "llava":
        return tiny_llava(), LLAVA_BATCHES
    return tiny_llama(), LLAMA_BATCHES


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w4a4", "w6a6", "w8a8"])
def test_every_planned_linear_is_replaced_and_recorded(case, scheme):
    model, batches = case
    planned = {linear.path: linear for linear in plan_for(model, scheme).linears()}

    result = run(model, batches, scheme)

    quantized = {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert set(quantized) == set(planned) == set(result.modules)
    for path, entry in result.modules.items():
        assert entry.weight == planned[path].weight == quantized[path].format.weight
        assert entry.activation == quantized[path].format.activation
        assert entry.format.activation_clip == quantized[path].format.activation_clip


def test_nothing_else_changes(case):
    model, batches = case
    before = states(model)

    result = run(model, batches)

    after = states(model)
    kept = {
        name for name in before if not name.endswith(".weight") or name.removesuffix(".weight") not in result.modules
    }
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_one_error_is_reported_per_layer_and_site(case):
    model, batches = case
    plan = plan_for(model)

    result = run(model, batches)

    assert [error.layer for error in result.layers] == [layer.name for part in plan.parts for layer in part.layers]
    searched = [site.name for part in plan.parts for layer in part.layers for site in layer.sites]
    assert [error.site for error in result.sites] == searched
    assert all(math.isfinite(error.error) and error.error > 0 for error in result.layers)
    assert all(0 < error.found <= error.nearest for error in result.sites)


def test_members_of_a_site_share_their_activation_clip(case):
    """They read one tensor, which is rounded once."""
    model, batches = case

    result = run(model, batches, "w4a4")

    for site in plan_for(model, "w4a4").sites():
        entries = [result.modules[linear.name] for linear in site.linears]
        assert {entry.site for entry in entries} == {site.name}
        assert len({entry.format.activation_clip for entry in entries}) == 1


@pytest.mark.parametrize("batches", [LLAVA_BATCHES, [LLAVA_BATCHES[0], llama_batch(seed=5)]], ids=["images", "mixed"])
def test_the_reported_error_is_that_of_the_real_model(batches):
    """The chain of quantized layers must be what the finished model computes, padding left out."""
    model = tiny_llava()
    full = copy.deepcopy(model)

    result = run(model, batches)

    squared = norm = 0.0
    for batch in batches:
        found, wanted = (last_hidden(m, batch)[batch["attention_mask"].bool()] for m in (model, full))
        squared += float((found - wanted).square().sum())
        norm += float(wanted.square().sum())
    assert result.layers[-1].error == pytest.approx(squared / norm, rel=1e-3)


def last_hidden(model, batch):
    """What the last decoder layer returns."""
    seen = []
    handle = model.model.language_model.layers[-1].register_forward_hook(
        lambda _m, _a, out: seen.append(first_tensor(out))
    )
    with torch.no_grad():
        model(**batch, use_cache=False)
    handle.remove()
    return seen[0]


def test_searching_beats_rounding_to_nearest():
    """On the data of the search; that is the point of it."""
    full, searched, nearest = tiny_llava(), tiny_llava(), tiny_llava()
    run(searched, LLAVA_BATCHES, "w4a4")
    run(nearest, None, "w4a4", method="rtn")

    def error(model):
        with torch.no_grad():
            return sum(float((model(**b).logits - full(**b).logits).square().sum()) for b in LLAVA_BATCHES)

    assert error(searched) < error(nearest)


@pytest.mark.parametrize("more", [1, 7])
@pytest.mark.parametrize("make_model, batches", [(tiny_llava, LLAVA_BATCHES), (tiny_llama, LLAMA_BATCHES)])
def test_more_padding_changes_nothing(make_model, batches, more):
    """Padding depends on which samples share a batch and must not leak into the search."""
    result = run(make_model(), batches, "w4a4", **PLAIN)
    padded = run(make_model(), [longer(batch, more) for batch in batches], "w4a4", **PLAIN)

    assert clips(padded) == clips(result)
    assert [e.error for e in padded.layers] == pytest.approx([e.error for e in result.layers], rel=1e-3)


@pytest.mark.parametrize("make_model, batches", [(tiny_llava, LLAVA_BATCHES), (tiny_llama, LLAMA_BATCHES)])
def test_more_padding_is_not_fed_back(make_model, batches):
    """Feedback carries a last bit on to other codes, so errors agree on the first site of a part, and nearly later."""
    result = run(make_model(), batches, "w4a4")
    padded = run(make_model(), [longer(batch, 7) for batch in batches], "w4a4")

    first = next(i for i, site in enumerate(result.sites) if "language" in site.site or site.site.startswith("model.l"))
    assert padded.sites[first].found == pytest.approx(result.sites[first].found, rel=1e-3)
    assert [e.error for e in padded.layers] == pytest.approx([e.error for e in result.layers], rel=0.2)


def test_what_stands_in_the_padding_changes_nothing():
    """Processors fill it with whatever token they like."""
    other = [{name: tensor.clone() for name, tensor in batch.items()} for batch in LLAMA_BATCHES]
    other[0]["input_ids"][other[0]["attention_mask"] == 0] = 33
    models = tiny_llama(), tiny_llama()

    results = run(models[0], LLAMA_BATCHES, "w4a4"), run(models[1], other, "w4a4")

    assert clips(results[0]) == clips(results[1])
    assert same(states(models[0]), states(models[1]))


@pytest.mark.parametrize("settings", [{}, {"search_tokens": 5, "seed": 3}], ids=["all tokens", "some tokens"])
def test_the_same_seed_gives_the_same_bytes(case, settings):
    """A result that cannot be repeated cannot be examined."""
    model, batches = case
    again = copy.deepcopy(model)

    first, second = run(model, batches, **settings), run(again, batches, **settings)

    assert same(states(model), states(again))
    assert first.modules == second.modules
    assert first.layers == second.layers and first.sites == second.sites


def test_another_seed_looks_at_other_tokens(case):
    model, batches = case
    again = copy.deepcopy(model)

    first, second = (run(m, batches, "w4a4", search_tokens=4, seed=s) for m, s in ((model, 0), (again, 1)))

    assert first.sites != second.sites


def test_the_users_batches_stay_as_they_are(case):
    model, batches = case
    before = [{name: tensor.clone() for name, tensor in batch.items()} for batch in batches]

    run(model, batches)

    assert all(same(a, b) for a, b in zip(batches, before, strict=True))


def test_rounding_to_nearest_needs_no_data(case):
    model, _ = case

    result = run(model, None, method="rtn")

    assert result.recipe is None
    assert result.layers == [] and result.sites == []
    assert {entry.format.activation_clip for entry in result.modules.values()} == {1.0}
    assert {entry.weight_clip for entry in result.modules.values()} == {1.0}


def test_rounding_to_nearest_is_within_half_a_step():
    full, model = tiny_llama(), tiny_llama()

    run(model, None, "w8a16", method="rtn")

    found, wanted = (m.model.layers[0].mlp.up_proj.weight for m in (model, full))
    step = wanted.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((found - wanted).abs() <= 0.5001 * step).all())


def test_the_output_embedding_is_quantized_where_asked_for():
    model = tiny_llava()

    result = run(model, LLAVA_BATCHES, overrides={"lm_head": "w8a8"})

    assert isinstance(model.lm_head, QuantLinear)
    assert result.layers[-1].part == "head" and math.isfinite(result.layers[-1].error)


def test_a_tower_in_full_precision_is_left_alone():
    model = tiny_llava()
    before = states(model.model.vision_tower)

    result = run(model, LLAVA_BATCHES, vision_scheme=None)

    assert same(states(model.model.vision_tower), before)
    assert all("language_model" in name for name in result.modules)
    errors = {error.part: error.error for error in result.layers[:3]}
    assert errors == {"vision": 0.0, "projector": 0.0}


def test_biases_stay_in_full_precision():
    full, model = tiny_llava(), tiny_llava()

    run(model, LLAVA_BATCHES)

    path = "model.multi_modal_projector.linear_1.bias"
    assert torch.equal(model.get_parameter(path), full.get_parameter(path))


@pytest.mark.parametrize("with_data", [True, False])
def test_weights_that_are_nan_are_refused_before_anything_changes(with_data):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")

    with pytest.raises(CalibrationError, match=r"model.layers.1.mlp.down_proj.weight holds 1 NaN"):
        run(model, LLAMA_BATCHES if with_data else None)

    assert not any(isinstance(module, QuantLinear) for module in model.modules())


@pytest.mark.parametrize("number", [0, 1])
def test_a_sample_that_overflows_is_named(number):
    """In float16 a few samples do, and the user needs to know which."""
    batches = [{name: tensor.clone() for name, tensor in batch.items()} for batch in LLAVA_BATCHES]
    batches[number]["pixel_values"][0] = float("inf")

    with pytest.raises(
        CalibrationError, match=f"NaN or infinite activations at .* in calibration batch {number}; check"
    ):
        run(tiny_llava(), batches)


def test_linears_of_one_token_and_one_row_are_calibrated():
    """The smallest data there is."""
    result = run(tiny_llama(), [llama_batch(rows=1, tokens=1)], "w4a4")

    assert all(math.isfinite(error.error) for error in result.layers)


def test_every_linear_is_still_a_linear_to_other_libraries(case):
    model, batches = case

    run(model, batches)

    assert all(isinstance(module, nn.Linear) for module in model.modules() if isinstance(module, QuantLinear))


DEEP = {"text": {"num_hidden_layers": 5}, "vision": {"num_hidden_layers": 5}}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("threshold", [None, 0.0, 100.0])
def test_blocks_cover_every_layer_in_order(depth, threshold):
    """None is the median: about half of the pairs exceed it. Whatever h0 is, no layer is lost or searched twice."""
    model = tiny_llava(**DEEP)

    result = run(model, LLAVA_BATCHES, "w4a4", max_block_depth=depth, threshold=threshold)

    for part in result.plan.parts:
        blocks = [block for block in result.plan.blocks if block.part == part.name]
        assert [n for b in blocks for n in range(b.first, b.last + 1)] == list(range(len(part.layers)))
        assert all(block.last - block.first < depth for block in blocks)
        if threshold == 100.0:
            assert len(blocks) == len(part.layers)
        if threshold == 0.0:
            assert len(blocks) <= -(-len(part.layers) // depth)
    assert [error.layer for error in result.layers] == [x.name for part in result.plan.parts for x in part.layers]
    assert [error.block for error in result.joint] == list(result.plan.blocks)


def test_the_default_threshold_is_the_median_of_what_was_measured():
    result = run(tiny_llava(**DEEP), LLAVA_BATCHES, "w4a4")

    pairs = {part.name: len(part.layers) - 1 for part in result.plan.parts}
    measured = [(d.part, d.layer) for d in result.plan.dependencies]
    assert measured == [(part, n) for part, count in pairs.items() for n in range(count)]
    assert result.plan.threshold == statistics.median(d.entropy for d in result.plan.dependencies)
    assert any(block.last > block.first for block in result.plan.blocks)
    given = run(tiny_llava(**DEEP), LLAVA_BATCHES, "w4a4", threshold=1.5)
    assert given.plan.threshold == 1.5 and given.plan.dependencies == result.plan.dependencies


@pytest.mark.parametrize("scheme", ["w3a3", "w4a4", "w4a8"])
@pytest.mark.parametrize("depth", [1, 3])
def test_no_block_ends_above_its_layer_wise_error(scheme, depth):
    """The invariant of the joint search, on real blocks."""
    result = run(tiny_llava(**DEEP), LLAVA_BATCHES, scheme, max_block_depth=depth, threshold=0.0)

    assert all(0 <= error.after <= error.before and error.forwards >= 1 for error in result.joint)
    if scheme == "w3a3":
        assert any(error.after < error.before for error in result.joint)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_blocks_error_is_that_of_its_last_layer(depth):
    """What the joint search measured is what the finished, packed layers give, where it saw all the data."""
    result = run(tiny_llama(), LLAMA_BATCHES, "w3a3", max_block_depth=depth, threshold=0.0)

    ends = [block.last for block in result.plan.blocks]
    assert len(ends) == 2 // depth
    for error, end in zip(result.joint, ends, strict=True):
        assert error.share == 1.0
        assert error.after == pytest.approx(result.layers[end].error, rel=1e-4)


def test_sites_are_searched_alone_where_asked_for():
    """The baseline that the joint search is compared with, on the same blocks of one layer."""
    models = tiny_llava(), tiny_llava()
    alone = run(models[0], LLAVA_BATCHES, "w3a3", method="layerwise")
    jointly = run(models[1], LLAVA_BATCHES, "w3a3", max_block_depth=1)

    assert alone.joint == [] and alone.plan.dependencies == () and alone.plan.threshold is None
    assert all(error.chosen == error.found for error in alone.sites)
    assert jointly.joint[0].before == pytest.approx(alone.layers[0].error, rel=1e-4)
    assert any(error.chosen != error.found for error in jointly.sites)


def test_a_bound_on_tokens_bounds_what_a_joint_search_runs():
    few = run(tiny_llama(), LLAMA_BATCHES, "w4a4", search_tokens=5)

    assert all(error.share < 1.0 for error in few.joint)


@pytest.mark.parametrize("settings", [{}, {"soft_assignment": "step"}, {"activation_clips": [1.0, 0.98]}])
def test_static_activations_get_one_scale(case, settings):
    """Found once; no token's own range is looked at afterwards."""
    model, batches = case

    result = run(model, batches, "w4a4", activation_range="static", **settings)

    unused = {linear.name for layer in result.plan.unused for site in layer.sites for linear in site.linears}
    for name, entry in result.modules.items():
        assert entry.activation.static == (name not in unused), "nothing is measured where nothing reads"
        assert entry.activation.group is None or name in unused
    for site in (site for part in result.plan.parts for layer in part.layers for site in layer.sites):
        scales = [model.get_submodule(linear.path).input_scale for linear in site.linears]
        assert all(scale.shape == (1,) and torch.equal(scale, scales[0]) for scale in scales)
    assert all(error.found <= error.nearest for error in result.sites)
    assert all(error.after <= error.before for error in result.joint)


def test_joint_searches_need_candidates():
    """Weight-only schemes have nothing to exchange yet: each block is run once, and stays as it is."""
    result = run(tiny_llama(), LLAMA_BATCHES, "w4a16")

    assert all(error.forwards == 1 and error.after == error.before for error in result.joint)
