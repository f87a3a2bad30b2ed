"""What is read off a forward for the encoder's loss."""

import copy

import pytest
import torch

from optimum_qvlm.pipeline.encoder.observe import TOKENS, Observer
from tests.plans import forward_of, plan_for
from tests.tiny_models import PATCHES, llava_batch, tiny_llava


@pytest.fixture
def model():
    return tiny_llava()


@pytest.fixture
def observer(model):
    return Observer(model, plan_for(model), seed=0)


def watch(observer, model, batch, wanted=None, **options):
    with observer.watching(0, batch["attention_mask"], wanted, **options) as seen:
        output = forward_of(model.model)(**batch)
    return output.last_hidden_state, seen


def test_the_ends_are_the_projector_and_the_last_decoder_layer(model, observer):
    batch = llava_batch(rows=2, padding=3)

    hidden, seen = watch(observer, model, batch)

    assert seen.ends["vision"][0].shape == (2, PATCHES, 64)
    real = batch["attention_mask"].bool()
    assert torch.allclose(model.model.language_model.norm(seen.ends["final"][0]), hidden[real])


def test_errors_are_zero_against_themselves_and_not_against_others(model, observer):
    batch = llava_batch(padding=2)
    _, seen = watch(observer, model, batch)

    _, same = watch(observer, model, batch, seen.ends)
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(1.5)
    _, other = watch(observer, model, batch, seen.ends)

    assert [float(same.errors[end][0]) for end in ("vision", "final")] == [0.0, 0.0]
    assert all(float(other.errors[end][0]) > 0 for end in ("vision", "final"))


def test_padding_is_never_looked_at(model, observer):
    """What stands there depends on the samples that share a batch."""
    batch = llava_batch(padding=3)
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["input_ids"][batch["attention_mask"] == 0] = 33

    _, first = watch(observer, model, batch)
    _, second = watch(observer, model, other)

    assert torch.equal(first.ends["final"][0], second.ends["final"][0])
    for a, b in zip(first.samples["language"], second.samples["language"], strict=True):
        assert torch.equal(a[0], b[0])


def test_every_layer_shows_the_same_tokens(model, observer):
    """A joint table needs pairs."""
    batch = llava_batch()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()

    _, seen = watch(observer, model, batch)

    first, last = seen.samples["language"]
    assert torch.equal(first[0], last[0])


def test_only_some_tokens_of_a_long_call_are_taken(observer):
    hidden = torch.arange(4 * TOKENS * 2.0).reshape(4, TOKENS, 2)

    taken = observer.take(hidden, None, 0)

    assert taken.shape == (TOKENS, 2) and len(set(taken[:, 0].tolist())) == TOKENS
    assert torch.equal(taken, observer.take(hidden, None, 0))
    assert not torch.equal(taken, observer.take(hidden, None, 1))


def test_slopes_are_the_norms_of_the_gradient_at_each_layer(model, observer):
    batch = llava_batch()
    _, seen = watch(observer, model, batch)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(1.5)
    looking = Observer(changed, plan_for(changed), seed=0)

    outputs = {}
    handles = [
        layer.register_forward_hook(lambda _m, _a, out, n=n: outputs.setdefault(n, out).retain_grad())
        for n, layer in enumerate(changed.model.language_model.layers)
    ]
    _, actual = watch(looking, changed, batch, seen.ends, slopes=True)
    actual.errors["final"][0].backward()

    for number, squared in enumerate(actual.slopes["language"]):
        assert squared == pytest.approx(float(outputs[number].grad.square().sum()), rel=1e-4)
    assert all(handle.remove() is None for handle in handles)


def test_hooks_are_gone_afterwards(model, observer):
    with pytest.raises(RuntimeError, match="stop"), observer.watching(0, None):
        raise RuntimeError("stop")

    assert not any(module._forward_hooks for module in model.modules())
