"""What layers see in a real forward, and that running them alone on it gives the same."""

import pytest
import torch
from torch import nn

from optimum_qvlm.errors import CalibrationError, UnsupportedModelError
from optimum_qvlm.models.adapter import Part
from optimum_qvlm.models.llama import LlamaAdapter
from optimum_qvlm.pipeline.capture import Tracer, first_tensor, linear_inputs, require_finite
from optimum_qvlm.plan import PlannedLayer, PlannedPart
from tests.plans import CPU, forward_of, plan_for
from tests.tiny_families import FAMILIES, qwen_batch
from tests.tiny_models import llama_batch, llava_batch, tiny_llama, tiny_llava

LLAVA_BATCHES = [llava_batch(padding=3), llava_batch(rows=1, tokens=9, seed=1), llava_batch(rows=3, tokens=20, seed=2)]
LLAMA_BATCHES = [llama_batch(padding=3), llama_batch(rows=1, tokens=1, seed=1), llama_batch(rows=3, tokens=20, seed=2)]


@pytest.fixture(params=["llava", "llama", "llava in bf16", "llama with eager attention"])
def case(request):
    """A model with batches of several sizes and paddings."""
    if request.param == "llama":
        return tiny_llama(), LLAMA_BATCHES
    if request.param == "llava":
        return tiny_llava(), LLAVA_BATCHES
    if request.param == "llava in bf16":
        batches = [batch | {"pixel_values": batch["pixel_values"].bfloat16()} for batch in LLAVA_BATCHES]
        return tiny_llava().bfloat16(), batches
    model = tiny_llama()
    model.set_attn_implementation("eager")
    return model, LLAMA_BATCHES


def make_tracer(model, adapter=None):
    plan = plan_for(model, adapter=adapter)
    return Tracer(model, forward_of(model), plan.parts, CPU)


def real_outputs(model, paths, batches):
    """Outputs of the modules at `paths` in the model's own forwards, path -> one per call."""
    seen = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _m, _a, out, path=path: seen[path].append(first_tensor(out))
        )
        for path in paths
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Reordered(LlamaAdapter):
    """Says that the layers run in another order."""

    order = (1, 0)

    def parts(self):
        return (Part(name="language", layers=tuple(f"model.layers.{n}" for n in self.order)),)


def test_layers_run_alone_give_what_the_forward_gave(case):
    """Every layer of every part on every batch: each has its own mask, positions and length."""
    model, batches = case
    tracer = make_tracer(model)

    captured = tracer.capture(batches)

    for part in tracer.parts:
        expected = real_outputs(model, [layer.path for layer in part.layers], batches)
        assert len(captured[part.name]) == len(batches)
        for number, run in enumerate(captured[part.name]):
            hidden = run.hidden
            for layer, call in zip(part.layers, run.calls, strict=True):
                with torch.no_grad():
                    hidden = call(model.get_submodule(layer.path), hidden, CPU)
                assert torch.equal(hidden, expected[layer.path][number])


def test_the_first_run_holds_the_real_output(case):
    model, batches = case
    tracer = make_tracer(model)

    captured = tracer.capture(batches)

    for part in tracer.parts:
        last = part.layers[-1].path
        assert torch.equal(captured[part.name][0].output, real_outputs(model, [last], batches[:1])[last][0])
        assert all(run.output is None for run in captured[part.name][1:])


def test_runs_know_their_batch(case):
    model, batches = case

    captured = make_tracer(model).capture(batches)

    assert all([run.batch for run in runs] == [0, 1, 2] for runs in captured.values())


def test_masks_that_differ_between_batches_are_replayed_each():
    """The same tokens, masked differently, must give different results, and the right ones."""
    model = tiny_llama()
    plain, padded = llama_batch(), llama_batch()
    padded["attention_mask"] = padded["attention_mask"].clone()
    padded["attention_mask"][:, :4] = 0
    tracer = make_tracer(model)

    runs = tracer.capture([plain, padded, plain])["language"]

    expected = real_outputs(model, ["model.layers.0"], [plain, padded, plain])["model.layers.0"]
    with torch.no_grad():
        actual = [run.calls[0](model.model.layers[0], run.hidden, CPU) for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not torch.equal(actual[0], actual[1])
    assert torch.equal(actual[0], actual[2])


def test_samples_without_image_skip_the_tower():
    """Mixed data is common; a text sample has no run in tower and projector."""
    model = tiny_llava()

    captured = make_tracer(model).capture([llama_batch(), llava_batch(), llama_batch(seed=2)])

    assert [run.batch for run in captured["vision"]] == [1]
    assert [run.batch for run in captured["projector"]] == [1]
    assert [run.batch for run in captured["language"]] == [0, 1, 2]


def test_nothing_stays_hooked(case):
    """But what transformers hooks itself, which it leaves after a plain forward too."""
    model, batches = case
    real_outputs(model, [], batches[:1])
    before = count_hooks(model)
    tracer = make_tracer(model)

    tracer.enter(tracer.parts[-1], batches, tracer.capture(batches)[tracer.parts[-1].name])

    assert count_hooks(model) == before


def test_inputs_of_an_unchanged_model_are_those_captured(case):
    model, batches = case
    tracer = make_tracer(model)
    captured = tracer.capture(batches)

    for part in tracer.parts:
        actual = [run.hidden for run in tracer.enter(part, batches, captured[part.name])]
        assert all(torch.equal(a, run.hidden) for a, run in zip(actual, captured[part.name], strict=True))


def test_inputs_follow_changes_of_earlier_parts():
    """Later parts are calibrated on what the quantized tower gives them."""
    model, batches = tiny_llava(), LLAVA_BATCHES
    tracer = make_tracer(model)
    captured = tracer.capture(batches)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(2)

    actual = [run.hidden for run in tracer.enter(tracer.parts[2], batches, captured["language"])]

    assert not any(torch.equal(a, run.hidden) for a, run in zip(actual, captured["language"], strict=True))


def test_inputs_of_mixed_batches_match_their_runs():
    model = tiny_llava()
    batches = [llama_batch(), llava_batch(), llama_batch(seed=2), llava_batch(seed=3)]
    tracer = make_tracer(model)
    captured = tracer.capture(batches)

    for part in tracer.parts:
        actual = [run.hidden for run in tracer.enter(part, batches, captured[part.name])]
        assert all(torch.equal(a, run.hidden) for a, run in zip(actual, captured[part.name], strict=True))


def test_layers_in_the_wrong_order_are_refused():
    model = tiny_llama()

    with pytest.raises(UnsupportedModelError, match=r"model.layers.0 ran out of turn in the language part"):
        make_tracer(model, Reordered(model)).capture(LLAMA_BATCHES)


def test_a_layer_that_never_runs_is_refused():
    """Some models hold more layers than they use."""
    model = tiny_llama(num_hidden_layers=3)
    model.config.num_hidden_layers = 2

    with pytest.raises(UnsupportedModelError, match="the forward called 2 of the 3 language layers; the adapter must"):
        make_tracer(model).capture(LLAMA_BATCHES)


def test_a_part_that_no_sample_reaches_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"no calibration sample reached the vision part \(model.vision"):
        make_tracer(tiny_llava()).capture([llama_batch()])


def test_nothing_stays_hooked_after_an_error():
    model = tiny_llama()

    with pytest.raises(UnsupportedModelError, match="out of turn"):
        make_tracer(model, Reordered(model)).capture(LLAMA_BATCHES)

    assert count_hooks(model) == 0


def test_inputs_of_linears_are_seen_as_they_are():
    layer = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    seen = linear_inputs(layer, ["0", "2"], lambda: layer(x))

    assert torch.equal(seen["0"], x)
    assert torch.equal(seen["2"], layer[0](x).relu())


def test_a_forward_ends_once_all_inputs_were_seen():
    """The rest of the layer costs time and is not needed."""
    ran = []
    layer = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    layer[1].register_forward_hook(lambda *_: ran.append(1))

    linear_inputs(layer, ["0"], lambda: layer(torch.ones(1, 3)))

    assert not ran


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite_are_refused(value):
    tensor = torch.ones(2, 3)
    tensor[1, 2] = value

    with pytest.raises(
        CalibrationError, match=r"NaN or infinite activations at layers.7 in calibration batch 4; check"
    ):
        require_finite(tensor, "layers.7", 4)


@pytest.mark.parametrize(
    "output", [torch.ones(1), (torch.ones(1), None), [torch.ones(1)]], ids=["alone", "tuple", "list"]
)
def test_hidden_states_come_alone_or_first(output):
    assert torch.equal(first_tensor(output), torch.ones(1))


@pytest.mark.parametrize("output", [None, ("text",), {"hidden": torch.ones(1)}], ids=["none", "text", "dict"])
def test_other_outputs_are_refused(output):
    with pytest.raises(UnsupportedModelError, match=r"a layer returned .*, not hidden states"):
        first_tensor(output)


def deepstack():
    """Qwen3-VL, which adds features of its tower between decoder layers, with its tracer."""
    model = FAMILIES["qwen3_vl"].build()
    return model, Tracer.of(model, plan_for(model), CPU)


def chained(model, part, run):
    """What the part's layers return, run alone one after the other."""
    hidden = run.hidden
    for layer, call in zip(part.layers, run.calls, strict=True):
        with torch.no_grad():
            hidden = call(model.get_submodule(layer.path), hidden, CPU)
    return hidden


def test_what_is_added_between_layers_is_added_to_the_chain():
    model, tracer = deepstack()
    batches = [qwen_batch(padding=2), llama_batch(seed=1), qwen_batch(rows=3, seed=2)]

    captured = tracer.capture(batches)

    part = tracer.parts[-1]
    last = part.layers[-1].path
    expected = real_outputs(model, [last], batches)[last]
    for number, run in enumerate(captured["language"]):
        assert torch.equal(chained(model, part, run), expected[number])
        assert [call.mixing is None for call in run.calls] == [True, False]


def test_what_is_added_follows_changes_of_the_tower():
    """The quantized chain gets what the quantized mergers give, the full-precision chain what it got before."""
    model, tracer = deepstack()
    batches = [qwen_batch(), qwen_batch(seed=3)]
    captured = tracer.capture(batches)
    part, last = tracer.parts[-1], tracer.parts[-1].layers[-1].path
    full = real_outputs(model, [last], batches)[last]
    with torch.no_grad():
        model.model.visual.deepstack_merger_list[0].linear_fc2.weight.mul_(2)

    entered = tracer.enter(part, batches, captured["language"])

    changed = real_outputs(model, [last], batches)[last]
    for number in range(2):
        assert torch.equal(chained(model, part, entered[number]), changed[number])
        assert torch.equal(chained(model, part, captured["language"][number]), full[number])
        assert not torch.equal(full[number], changed[number])


class Renamed(nn.Module):
    """A layer whose hidden states go by another name."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, scale=1.0, image_features=None, sizes=None):
        return self.linear(image_features) * scale


@pytest.mark.parametrize("call", ["keyword", "first"])
def test_hidden_states_may_go_by_any_name(call):
    """Projectors of many families call theirs image_features."""
    layer = Renamed() if call == "keyword" else nn.Linear(4, 4)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    holder = nn.Sequential(layer)
    part = PlannedPart(name="p", layers=(PlannedLayer(path="0", name="0", sites=()),))

    def forward(x):
        return layer(scale=2.0, image_features=x, sizes=torch.ones(1)) if call == "keyword" else layer(x)

    (run,) = Tracer(holder, forward, [part], CPU).capture([{"x": x}])["p"]

    assert torch.equal(run.hidden, x)
    assert torch.equal(run.calls[0](layer, x, CPU), forward(x))


def test_a_call_without_tensors_is_refused():
    layer = Renamed()
    part = PlannedPart(name="p", layers=(PlannedLayer(path="0", name="the layer", sites=()),))

    with pytest.raises(UnsupportedModelError, match="the layer is called without hidden states; it is no layer"):
        Tracer(nn.Sequential(layer), lambda x: layer(scale=3.0), [part], CPU).capture([{"x": torch.ones(1)}])
