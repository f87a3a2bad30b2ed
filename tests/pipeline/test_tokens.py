"""Which tokens the search looks at: never padding, the same for all sites, as many as asked for."""

import pytest
import torch
from torch import Tensor

from optimum_qvlm.pipeline.tokens import TokenSampler

ROWS, TOKENS = 3, 10


def make_sampler(budget: int, *, runs: int = 1, seed: int = 0, side: str | None = "right") -> TokenSampler:
    """Masks of three rows of ten tokens; the second row has four and the third nine pad tokens on `side`."""
    mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    mask[1, :4], mask[2, :9] = 0, 0
    if side == "right":
        mask = mask.flip(1)
    return TokenSampler([None if side is None else mask] * runs, budget, seed)


def numbered(rows: int = ROWS, tokens: int = TOKENS) -> Tensor:
    """Hidden states of two channels: the token's number in the batch, and its negative."""
    places = torch.arange(rows * tokens).float()
    return torch.stack((places, -places), dim=-1).reshape(rows, tokens, 2)


def real_places(side: str | None) -> list[int]:
    if side is None:
        return list(range(ROWS * TOKENS))
    first = {"left": (0, 4, 9), "right": (0, 0, 0)}[side]
    count = (10, 6, 1)
    return [row * TOKENS + first[row] + n for row in range(ROWS) for n in range(count[row])]


@pytest.mark.parametrize("side", ["left", "right", None])
def test_with_room_for_all_every_real_token_is_taken_in_order(side):
    """Padding carries no information, and attention never reads it."""
    taken = make_sampler(1000, side=side).take(0, numbered())

    assert taken[:, 0].tolist() == real_places(side)
    assert torch.equal(taken[:, 1], -taken[:, 0])


@pytest.mark.parametrize("budget", [1, 2, 7, 16])
@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("seed", range(3))
def test_no_more_tokens_than_the_budget_are_taken(budget, side, seed):
    taken = make_sampler(budget, side=side, seed=seed).take(0, numbered())[:, 0].tolist()

    assert len(taken) == budget
    assert taken == sorted(set(taken))
    assert set(taken) <= set(real_places(side))


@pytest.mark.parametrize("budget, runs, share", [(12, 4, 3), (13, 4, 4), (1, 4, 1)])
def test_the_budget_is_shared_between_runs(budget, runs, share):
    """Every batch has its say."""
    sampler = make_sampler(budget, runs=runs)

    assert [len(sampler.take(number, numbered())) for number in range(runs)] == [share] * runs


def test_sites_of_one_run_see_the_same_tokens():
    """Errors of neighbouring sites can be compared then, whatever their widths."""
    sampler = make_sampler(5)

    narrow, wide = sampler.take(0, numbered()), sampler.take(0, numbered().repeat(1, 1, 4))

    assert torch.equal(narrow[:, 0], wide[:, 0])


@pytest.mark.parametrize("seed", range(3))
def test_the_draw_follows_the_seed(seed):
    first, again, other = (make_sampler(5, seed=s).take(0, numbered()) for s in (seed, seed, seed + 1))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_runs_draw_different_tokens():
    """Otherwise all batches would be looked at in the same places."""
    sampler = make_sampler(10, runs=2)

    assert not torch.equal(sampler.take(0, numbered()), sampler.take(1, numbered()))


@pytest.mark.parametrize("shape", [(6, 5), (ROWS, 5)])
def test_tokens_of_another_shape_are_all_real(shape):
    """Patches of a vision tower: the mask belongs to the text."""
    taken = make_sampler(1000).take(0, numbered(*shape))

    assert taken[:, 0].tolist() == list(range(shape[0] * shape[1]))


def test_hidden_states_without_rows_are_all_real():
    """Some towers flatten the patches of all images."""
    taken = make_sampler(1000).take(0, numbered().reshape(-1, 2))

    assert len(taken) == ROWS * TOKENS


@pytest.mark.parametrize("side, sum_of_places", [("right", sum(real_places("right"))), (None, sum(range(30)))])
def test_errors_do_not_count_padding(side, sum_of_places):
    expected = numbered().abs().sqrt()

    error, norm = make_sampler(1, side=side).relative_error(0, expected + 1, expected)

    assert error == pytest.approx(2 * len(real_places(side)), rel=1e-5)
    assert norm == pytest.approx(2 * sum_of_places, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_errors_of_half_precision_are_summed_in_single(dtype):
    """Squares of large activations overflow float16."""
    expected = torch.full((ROWS, TOKENS, 2), 1000.0, dtype=dtype)

    error, norm = make_sampler(1, side=None).relative_error(0, torch.zeros_like(expected), expected)

    assert error == norm == 6e7
