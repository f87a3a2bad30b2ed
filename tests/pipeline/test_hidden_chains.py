"""The two chains of hidden states of a part."""

import pytest
import torch

from optimum_qvlm.errors import CalibrationError
from optimum_qvlm.pipeline.capture import Tracer
from optimum_qvlm.pipeline.hidden_chains import Chain, some_runs
from optimum_qvlm.pipeline.tokens import TokenSampler
from tests.plans import CPU, forward_of, plan_for
from tests.tiny_models import llama_batch, tiny_llama

BATCHES = [llama_batch(seed=0, padding=2), llama_batch(rows=3, tokens=9, seed=1)]


@pytest.fixture
def chained():
    model = tiny_llama()
    part = plan_for(model).parts[0]
    runs = Tracer(model, forward_of(model), [part], CPU).capture(BATCHES)[part.name]
    sampler = TokenSampler([batch["attention_mask"] for batch in BATCHES], 100, 0)
    return model, Chain.of(runs, sampler, CPU), part


def test_both_chains_agree_while_nothing_is_quantized(chained):
    model, chain, part = chained
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            wanted = chain.full_precision(layer, number, part.layers[number])
            chain.advance(layer, number, "layer")

            assert chain.error(wanted) == 0.0


def test_the_error_is_relative_and_leaves_padding_out(chained):
    _, chain, _ = chained
    wanted = list(chain.quantized)
    chain.quantized = [hidden * 1.5 for hidden in wanted]
    chain.quantized[0][-1, -2:] = 1e6  # padding

    assert chain.error(wanted) == pytest.approx(0.25)
    assert chain.relative_error([(1, wanted[1] * 3)], wanted) == pytest.approx(4.0)


def test_an_output_that_is_not_finite_names_its_batch(chained):
    model, chain, _ = chained
    chain.quantized[1] = chain.quantized[1] * float("inf")

    with torch.no_grad(), pytest.raises(CalibrationError, match=r"at layers\.0 in calibration batch 1"):
        chain.advance(model.model.layers[0], 0, "layers.0")


@pytest.mark.parametrize("tokens, count", [(1, 1), (12, 1), (13, 2), (36, 3), (37, 4), (10_000, 5)])
def test_runs_are_drawn_until_they_hold_enough_tokens(tokens, count):
    """Whole runs, since attention needs its whole sequence."""
    hidden = [torch.zeros(2, 6, 4) for _ in range(5)]

    chosen = some_runs(hidden, tokens, seed=0)

    assert len(chosen) == count and chosen == sorted(set(chosen))
    assert chosen == some_runs(hidden, tokens, seed=0)


def test_another_seed_draws_other_runs():
    hidden = [torch.zeros(1, 6, 4) for _ in range(20)]

    assert len({tuple(some_runs(hidden, 30, seed)) for seed in range(5)}) > 1
