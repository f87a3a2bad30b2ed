"""Soft assignment and entropies, against sums written out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimum_qvlm.quant import entropy
from optimum_qvlm.quant.entropy import (
    SOFTNESS,
    conditional_entropy,
    grid_positions,
    joint_table,
    marginal_entropy,
    soft_assignment,
)

FP32_SUM = 1e-5
"""Relative; tables are products of fp32 probabilities, summed here in double precision and another order."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(value: float, step: float, bits: int, softness: str) -> list[float]:
    """Equation 5 for one element, in double precision."""
    top = 2 ** (bits - 1) - 1
    divisor = step if softness == "step" else step**2
    weights = [math.exp(-((value - level * step) ** 2) / divisor) for level in range(-top, top + 1)]
    return [weight / sum(weights) for weight in weights]


def tables_by_hand(first: Tensor, second: Tensor, bits: int, softness: str) -> list[list[float]]:
    """P(m, n) for two activations on static grids, element by element."""
    steps = [float(x.abs().max()) / (2 ** (bits - 1) - 1) for x in (first, second)]
    levels = 2**bits - 1
    table = [[0.0] * levels for _ in range(levels)]
    pairs = list(zip(first.flatten().tolist(), second.flatten().tolist(), strict=True))
    for x, y in pairs:
        p, q = by_hand(x, steps[0], bits, softness), by_hand(y, steps[1], bits, softness)
        for m in range(levels):
            for n in range(levels):
                table[m][n] += p[m] * q[n] / len(pairs)
    return table


@pytest.mark.parametrize("softness", SOFTNESS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_assignment_and_table_are_those_of_the_equations(softness, bits):
    first, second = normal(5, 6), 3 * normal(5, 6, seed=1)

    places = [grid_positions(x, bits, static=True) for x in (first, second)]
    table = joint_table(*places, softness)

    step = float(first.abs().max()) / (2 ** (bits - 1) - 1)
    for row, value in zip(soft_assignment(places[0], softness), first.flatten().tolist(), strict=True):
        assert row.tolist() == pytest.approx(by_hand(value, step, bits, softness), rel=1e-3, abs=1e-6)
    expected = torch.tensor(tables_by_hand(first, second, bits, softness), dtype=torch.float64)
    assert torch.allclose(table, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("softness", SOFTNESS)
def test_entropies_are_those_of_brute_force(softness):
    """The sums of equation 4 over a table made by hand."""
    first, second = normal(7, 5), normal(7, 5, seed=1) + normal(7, 5)
    table = tables_by_hand(first, second, 3, softness)

    places = [grid_positions(x, 3, static=True) for x in (first, second)]

    expected = -sum(p * math.log(p / sum(row)) for row in table for p in row if p > 0)
    columns = [sum(row[n] for row in table) for n in range(7)]
    assert conditional_entropy(joint_table(*places, softness)) == pytest.approx(expected, rel=1e-4)
    assert marginal_entropy(places[1], softness) == pytest.approx(
        -sum(p * math.log(p) for p in columns if p > 0), rel=1e-4
    )


def test_a_known_table_has_its_known_entropies():
    """Two fair coins, the same coin twice, and a coin that turns with probability one quarter."""
    independent = torch.full((2, 2), 0.25, dtype=torch.float64)
    equal = torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64)
    turned = torch.tensor([[0.375, 0.125], [0.125, 0.375]], dtype=torch.float64)

    assert conditional_entropy(independent) == pytest.approx(math.log(2))
    assert conditional_entropy(equal) == 0.0
    assert conditional_entropy(turned) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


@given(seed=st.integers(0, 500), bits=st.integers(2, 6), group=st.sampled_from([None, 4, 8]))
def test_conditional_entropy_lies_between_zero_and_the_marginal(seed, bits, group):
    """Knowing the layer before never adds uncertainty."""
    first = normal(12, 8, seed=seed)
    second = 0.5 * first + normal(12, 8, seed=seed + 1)
    places = [grid_positions(x, bits, group) for x in (first, second)]

    actual = conditional_entropy(joint_table(*places))

    assert 0.0 <= actual <= marginal_entropy(places[1]) * (1 + FP32_SUM)
    assert marginal_entropy(places[1]) <= math.log(2**bits - 1) + FP32_SUM


@pytest.mark.parametrize("factor", [0.05, 20.0, 1e-3])
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_the_unit_of_an_activation_does_not_matter(factor, static):
    """Distances are counted in steps; both activations may be scaled, each by its own factor."""
    first, second = normal(30, 16), normal(30, 16, seed=1)
    plain = joint_table(*(grid_positions(x, 4, static=static) for x in (first, second)))
    scaled = joint_table(
        grid_positions(first * factor, 4, static=static), grid_positions(second / factor, 4, static=static)
    )

    assert conditional_entropy(scaled) == pytest.approx(conditional_entropy(plain), rel=FP32_SUM)


def test_dividing_by_the_step_depends_on_the_unit():
    """As printed in the paper; that is why it is not the default."""
    x = normal(50, 16)
    actual = [marginal_entropy(grid_positions(x * factor, 4, static=True), "step") for factor in (0.05, 1.0, 20.0)]

    assert actual[0] > actual[1] + 0.1 > actual[2] + 0.2


@pytest.mark.parametrize("softness", SOFTNESS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_a_constant_activation_has_a_defined_result(value, softness):
    """It tells nothing and needs nothing: the entropy is that of one element's assignment, whatever came before."""
    constant = torch.full((9, 4), value)
    places = grid_positions(constant, 4, static=True)
    other = grid_positions(normal(9, 4), 4, static=True)
    step = abs(value) / 7 if value else 1.0
    alone = -sum(p * math.log(p) for p in by_hand(value, step, 4, softness) if p > 0)

    assert marginal_entropy(places, softness) == pytest.approx(alone, rel=1e-4)
    assert conditional_entropy(joint_table(other, places, softness)) == pytest.approx(alone, rel=1e-4)
    actual = conditional_entropy(joint_table(places, other, softness))
    assert actual == pytest.approx(marginal_entropy(other, softness), rel=1e-4)


def test_independent_activations_are_as_uncertain_as_alone():
    """And a copy is less so; the default engine puts layers of high conditional entropy in one block."""
    first, second = normal(400, 64), normal(400, 64, seed=1)
    places = [grid_positions(x, 4) for x in (first, second)]

    alone, given_other = marginal_entropy(places[1]), conditional_entropy(joint_table(*places))

    assert given_other == pytest.approx(alone, rel=0.01)
    assert conditional_entropy(joint_table(places[1], places[1])) < 0.8 * alone


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_slices_give_the_whole(at_once, monkeypatch):
    """Memory is bounded by taking elements in slices."""
    places = [grid_positions(normal(9, 8, seed=seed), 4, 4) for seed in (0, 1)]
    whole = joint_table(*places), marginal_entropy(places[0])
    monkeypatch.setattr(entropy, "ELEMENTS_AT_ONCE", at_once)

    assert torch.allclose(joint_table(*places), whole[0], rtol=1e-5, atol=1e-9)
    assert marginal_entropy(places[0]) == pytest.approx(whole[1], rel=FP32_SUM)


@pytest.mark.parametrize("group, peaks", [(None, [4.0, 4.0, 4.0, 4.0]), (2, [4.0, 4.0, 1.0, 1.0])])
def test_positions_are_counted_from_the_peak_of_token_or_group(group, peaks):
    x = torch.tensor([[4.0, 2.0, 1.0, -0.5]])

    places = grid_positions(x, 4, group)

    assert places.values[0].tolist() == pytest.approx([7 * v / p for v, p in zip(x[0].tolist(), peaks, strict=True)])
    assert places.steps.expand_as(places.values)[0].tolist() == pytest.approx([p / 7 for p in peaks])


def test_some_channels_keep_the_steps_of_the_whole_token():
    """Channels are drawn after the grid is laid, so what is left out still sets its range."""
    x = torch.tensor([[8.0, 1.0, 2.0]])

    chosen = grid_positions(x, 4).columns(torch.tensor([1, 2]))

    assert chosen.values[0].tolist() == pytest.approx([7 / 8, 14 / 8])
