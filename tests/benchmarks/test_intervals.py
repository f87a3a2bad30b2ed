"""The intervals that decide what the tables may claim."""

import math

import pytest
import torch

from benchmarks.intervals import Interval, of_correlation, of_mean, of_ratio


def noise(items, seed=0):
    return torch.randn(items, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_mean_lies_in_its_interval_and_more_items_narrow_it():
    few, many = of_mean(noise(20)), of_mean(noise(2000))

    assert few.low < few.value < few.high
    assert many.high - many.low < (few.high - few.low) / 5


def test_the_interval_of_a_mean_is_about_two_standard_errors():
    """The bootstrap must not be too narrow, or noise looks like a gain."""
    values = noise(400)
    found = of_mean(values)

    error = float(values.std()) / math.sqrt(400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_a_constant_has_no_spread():
    assert of_mean(torch.full((5,), 2.0)) == Interval(2.0, 2.0, 2.0)


@pytest.mark.parametrize("ranks", [False, True], ids=["pearson", "spearman"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_line_correlates_fully(ranks, sign):
    x = noise(30)

    found = of_correlation(x, sign * 3 * x + 1, ranks=ranks)

    assert (found.value, found.low, found.high) == pytest.approx((sign, sign, sign))


def test_spearman_sees_order_alone():
    x = noise(30)

    assert of_correlation(x, x.exp(), ranks=True).value == pytest.approx(1)
    assert of_correlation(x, x.exp(), ranks=False).value < 0.99


def test_ties_share_their_rank():
    """By hand: ranks 0.5, 0.5, 2 against 0, 1, 2."""
    found = of_correlation(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]), ranks=True)

    assert found.value == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_independent_items_have_zero_in_their_interval():
    found = of_correlation(noise(200), noise(200, seed=1), ranks=False)

    assert found.low < 0 < found.high


def test_a_constant_side_has_no_correlation():
    found = of_correlation(torch.ones(5), noise(5), ranks=False)

    assert math.isnan(found.value) and math.isnan(found.low)


def test_the_same_seed_gives_the_same_interval():
    assert of_mean(noise(50), seed=3) == of_mean(noise(50), seed=3)
    assert of_mean(noise(50), seed=3) != of_mean(noise(50), seed=4)


def test_an_interval_is_printed_with_signs():
    assert Interval(0.5, -0.25, 1.0).text() == "+0.50 (-0.25 .. +1.00)"
    assert Interval(0.5, -0.25, 1.0).scaled(100).text(0) == "+50 (-25 .. +100)"
    assert Interval(0.5, -0.25, 1.0).text(1, sign="") == "0.5 (-0.2 .. 1.0)"


def test_a_ratio_weighs_items_by_what_they_hold():
    found = of_ratio(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 3.0]))

    assert found.value == 2.5
    assert (found.low, found.high) == (1.0, 3.0)


def test_a_row_that_comes_again_is_no_news():
    """Three seeds on the same chunks are not three times as many chunks."""
    sums, weights = noise(40).abs(), torch.ones(40)
    again = torch.arange(40).repeat(3)

    once, thrice = of_ratio(sums, weights), of_ratio(sums.repeat(3), weights.repeat(3), again)
    apart = of_ratio(sums.repeat(3), weights.repeat(3))

    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    assert apart.high - apart.low < 0.7 * (once.high - once.low)


def test_the_interval_of_a_ratio_is_that_of_a_mean_where_weights_are_alike():
    values = noise(60)
    mean, ratio = of_mean(values), of_ratio(2 * values, torch.full((60,), 2.0))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((mean.value, mean.low, mean.high))
