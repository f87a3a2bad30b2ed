"""The two chains of hidden states of a part."""

import pytest
import torch

from optimum_qvlm.errors import CalibrationError
from optimum_qvlm.pipeline.hidden_chains import some_runs
from tests.plans import front_of, plan_for
from tests.tiny_models import llama_batch, tiny_llama

BATCHES = [llama_batch(seed=0, padding=2), llama_batch(rows=3, tokens=9, seed=1)]


@pytest.fixture
def front():
    model = tiny_llama()
    return front_of(model, plan_for(model), BATCHES)


def test_both_chains_agree_while_nothing_is_quantized(front):
    full, quantized = front, front.fork()
    with torch.no_grad():
        for number in range(2):
            assert full.position == quantized.position == number
            full.observe()
            quantized.advance()

            assert quantized.error(full.hidden) == 0.0


def test_a_fork_goes_ahead_alone(front):
    """So that nothing is ever wound back."""
    before, ahead = list(front.hidden), front.fork()
    with torch.no_grad():
        ahead.advance()

    assert (front.position, ahead.position) == (0, 1)
    assert all(a is b for a, b in zip(front.hidden, before, strict=True))
    assert not torch.equal(ahead.hidden[0], before[0])


def test_some_runs_go_as_they_would_among_all(front):
    one = front.some([1])
    with torch.no_grad():
        one.advance()
        front.advance()

    assert len(one.hidden) == 1 and torch.equal(one.hidden[0], front.hidden[1])


def test_what_sites_see_is_the_same_with_and_without_moving(front):
    site = front.layer.sites[-1]
    with torch.no_grad():
        stood = front.site_inputs(site)
        moved = front.observe()[site.name]

    assert all(torch.equal(a, b) for a, b in zip(stood, moved, strict=True))


def test_the_error_is_relative_and_leaves_padding_out(front):
    target = list(front.hidden)
    front.hidden = [hidden * 1.5 for hidden in target]
    front.hidden[0][-1, -2:] = 1e6  # padding

    assert front.error(target) == pytest.approx(0.25)
    assert front.some([1]).error([front.hidden[1] / 3]) == pytest.approx(4.0)


def test_an_output_that_is_not_finite_names_its_batch(front):
    front.hidden[1] = front.hidden[1] * float("inf")

    with torch.no_grad(), pytest.raises(CalibrationError, match=r"at model\.layers\.0 in calibration batch 1"):
        front.advance()
    assert front.position == 0


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
