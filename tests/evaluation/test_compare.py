"""The three ways to compare with full precision, on real tiny models of every family."""

import pytest
import torch

from optimum_qvlm.evaluation.compare import fidelity_report, observe
from optimum_qvlm.evaluation.fidelity import IGNORED
from tests.configs import make_config
from tests.jobs import load
from tests.tiny_families import FAMILIES, VIDEO_TOKEN
from tests.tiny_models import IMAGE_TOKEN, llama_batch, tiny_llama

EVERY = pytest.mark.parametrize("name", list(FAMILIES))
CAUSAL = pytest.mark.parametrize("name", [name for name in FAMILIES if name != "paligemma"])


def batches_of(family, last=3):
    """Two batches with padding, labels on the last tokens of each row."""
    found = []
    for seed in (3, 4):
        batch = family.batch(seed=seed, padding=1)
        batch["input_ids"][batch["input_ids"] == VIDEO_TOKEN] = 5
        length = batch["attention_mask"].sum(1, keepdim=True)
        places = torch.arange(batch["input_ids"].shape[1])
        wanted = (places < length) & (places >= length - last)
        found.append({**batch, "labels": torch.where(wanted, batch["input_ids"], IGNORED)})
    return found


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A family's tiny model rounded to nearest at `w4a4`, whose rounded activations show, by name."""

    def make(name, **settings):
        folder = tmp_path_factory.mktemp(name)
        FAMILIES[name].build().save_pretrained(folder)
        return load(folder, quantization_config=make_config("w4a4", method="rtn", **settings))

    return make


def figures(name, model):
    """Fidelity of `model` to the family's full precision."""
    batches = batches_of(FAMILIES[name])
    reference = observe(FAMILIES[name].build(), batches, [IMAGE_TOKEN], quantized=False)
    return fidelity_report(reference, observe(model, batches, [IMAGE_TOKEN], quantized=True))


@CAUSAL
def test_with_exact_decode_both_ways_agree(name, quantized):
    """The arithmetic is the same then, so that more than rounding between them would be a mistake of ours."""
    found = figures(name, quantized(name, decode_tokens=0))

    assert found["decode"]["tokens"] == found["prefill"]["tokens"] == 12
    assert found["decode"]["mean_kl"] == pytest.approx(found["prefill"]["mean_kl"], rel=1e-4)
    assert found["decode"]["top1_agreement"] == found["prefill"]["top1_agreement"]


@CAUSAL
def test_without_it_decoding_is_what_differs(name, quantized):
    """Two rows of one token are below `decode_tokens`, and the whole batch is above: activations are rounded there."""
    found = figures(name, quantized(name))

    assert found["decode"]["tokens"] == found["prefill"]["tokens"]
    assert abs(found["decode"]["mean_kl"] / found["prefill"]["mean_kl"] - 1) > 0.02


@EVERY
def test_full_precision_is_no_distance_from_itself(name):
    """Also where prompts see what follows them: there both models decode, and nothing is compared with one pass."""
    found = figures(name, FAMILIES[name].build())

    assert found["prefill"]["mean_kl"] == pytest.approx(0, abs=1e-9)
    assert found["decode"]["mean_kl"] == pytest.approx(0, abs=1e-9)
    assert found["decode"]["top1_agreement"] == found["generate"]["exact_match"] == 1.0
    assert found["generate"]["agreed_tokens"] == found["generate"]["tokens"] > 0
    assert found["generate"]["answers"] == 4


def test_full_precision_takes_one_pass_where_that_says_all():
    """On a device each further one would move all weights there."""
    model, seen = tiny_llama(), []
    model.model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    batches = batches_of(FAMILIES["llama"])[:1]

    observe(model, batches, [], quantized=False)
    passes = list(seen)
    seen.clear()
    observe(model, batches, [], quantized=True)

    assert passes[:2] == [12, 9] and len(passes) == 1 + 16, "the batch, a prompt, and its answer"
    assert seen[:4] == [12, 9, 1, 1]


def test_a_model_that_cannot_generate_has_no_figures_of_it(monkeypatch):
    model, batches = tiny_llama(), batches_of(FAMILIES["llama"])
    monkeypatch.setattr(model, "can_generate", lambda: False)

    seen = observe(model, batches, [], quantized=True)

    found = fidelity_report(seen, seen)
    assert found["prefill"]["mean_kl"] == 0.0
    assert found["decode"] is None and found["generate"] is None


def test_labels_that_decoding_does_not_reach_count_at_once_only():
    batch = llama_batch(rows=1)
    batch["input_ids"][0, 4] = IMAGE_TOKEN
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    batch["labels"][0, 1:8] = 1

    seen = observe(tiny_llama(), [batch], [IMAGE_TOKEN], quantized=True)

    assert len(seen.prefill[0]) == 7 and len(seen.decode[0]) == 2
