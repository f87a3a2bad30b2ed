"""The joint search: never above where it starts, the best of all where they are few, and bounded in cost."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_qvlm.search.block import near_clips, search_block

GRID = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)


class Landscape:
    """Seeded errors over choices, and how often each was asked for."""

    def __init__(self, counts, seed):
        import random

        generator = random.Random(seed)
        self.errors = {c: generator.random() for c in itertools.product(*map(range, counts))}
        self.asked = []

    def __call__(self, choice):
        self.asked.append(choice)
        return self.errors[choice]


counts_of_sites = st.lists(st.integers(1, 4), max_size=5)


@given(counts=counts_of_sites, seed=st.integers(0, 1000), few=st.sampled_from([0, 32]))
def test_the_error_is_never_above_the_layer_wise_one(counts, seed, few):
    """The invariant of the search; and the errors are those of the choices."""
    landscape = Landscape(counts, seed)

    actual = search_block(counts, landscape, exhaustive_up_to=few)

    assert actual.after <= actual.before == landscape.errors[(0,) * len(counts)]
    assert actual.after == landscape.errors[actual.choice]


@given(counts=counts_of_sites, seed=st.integers(0, 1000))
def test_few_combinations_are_all_tried(counts, seed):
    landscape = Landscape(counts, seed)

    actual = search_block(counts, landscape, exhaustive_up_to=len(landscape.errors), min_gain=0.0)

    assert actual.after == min(landscape.errors.values())
    assert actual.forwards == len(landscape.errors)


@given(
    counts=st.lists(st.integers(2, 4), min_size=2, max_size=5),
    seed=st.integers(0, 1000),
    gain=st.sampled_from([0.0, 0.01, 0.3]),
)
def test_descent_ends_where_no_site_alone_gains_enough(counts, seed, gain):
    landscape = Landscape(counts, seed)

    actual = search_block(counts, landscape, exhaustive_up_to=0, max_sweeps=1000, min_gain=gain)

    for site, count in enumerate(counts):
        for other in range(count):
            moved = (*actual.choice[:site], other, *actual.choice[site + 1 :])
            assert landscape.errors[moved] >= (1 - gain) * actual.after


@given(counts=counts_of_sites, seed=st.integers(0, 1000), sweeps=st.integers(1, 3))
def test_nothing_is_run_twice_and_sweeps_bound_the_cost(counts, seed, sweeps):
    landscape = Landscape(counts, seed)

    actual = search_block(counts, landscape, exhaustive_up_to=0, max_sweeps=sweeps)

    assert len(landscape.asked) == len(set(landscape.asked)) == actual.forwards
    assert actual.forwards <= 1 + sweeps * sum(count - 1 for count in counts)


def test_sites_that_only_gain_together_are_found_where_all_are_tried():
    """What a search of each site alone cannot see."""
    errors = {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 2.0, (1, 1): 0.1}

    assert search_block([2, 2], errors.__getitem__).choice == (1, 1)


@pytest.mark.parametrize("few", [0, 32])
@pytest.mark.parametrize("better, choice", [(0.985, (0,)), (0.9, (1,))])
def test_a_step_has_to_gain_its_share(few, better, choice):
    """What is within the noise of the data is not worth leaving the layer-wise optimum for."""
    actual = search_block([2], lambda choice: [1.0, better][choice[0]], exhaustive_up_to=few, min_gain=0.02)

    assert actual.choice == choice


@pytest.mark.parametrize("few", [0, 32])
def test_equal_errors_leave_the_layer_wise_choice(few):
    actual = search_block([3, 3, 3], lambda choice: 0.5, exhaustive_up_to=few)

    assert actual.choice == (0, 0, 0)


@pytest.mark.parametrize("few", [0, 32])
def test_a_choice_without_a_finite_error_is_not_taken(few):
    """A candidate may overflow where the layer-wise optimum does not."""
    actual = search_block([3], lambda choice: [0.5, math.nan, math.inf][choice[0]], exhaustive_up_to=few)

    assert actual.choice == (0,)


def test_a_block_without_choices_is_run_once():
    actual = search_block([], lambda choice: 0.25)

    assert (actual.choice, actual.before, actual.after, actual.forwards) == ((), 0.25, 0.25, 1)


@pytest.mark.parametrize(
    "clip, expected",
    [(1.0, (0.95,)), (0.95, (1.0, 0.9)), (0.8, (1.0, 0.85, 0.75)), (0.5, (1.0, 0.6))],
)
def test_neighbours_and_the_full_range_are_tried_beside_a_clip(clip, expected):
    """1.0 always, so that a clip which only helps its own site can be undone."""
    assert near_clips(GRID, clip) == expected


def test_a_grid_of_one_leaves_nothing_to_try():
    assert near_clips((1.0,), 1.0) == ()
