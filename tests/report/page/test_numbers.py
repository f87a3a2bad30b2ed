"""Numbers as people read them, and where they lie on an axis."""

import pytest

from optimum_qvlm.report.page.numbers import Scale, duration, from_zero, over_decades, readable


@pytest.mark.parametrize(
    "value, shown",
    [(0, "0"), (0.0123456, "0.0123"), (1.42e-5, "1.42e-05"), (12_345.6, "12,346"), (1e12, "1.00e+12"), (-2.5, "-2.5")],
)
def test_three_digits_are_shown(value, shown):
    assert readable(value) == shown


@pytest.mark.parametrize("seconds, shown", [(0.5, "0.5 s"), (95, "1 min 35 s"), (7_500, "2 h 5 min")])
def test_durations_have_the_units_of_a_clock(seconds, shown):
    assert duration(seconds) == shown


def test_a_linear_scale_starts_at_zero_and_holds_its_largest():
    scale = from_zero([1.0, 4.0], 0, 100)

    assert scale(0) == 0 and 90 < scale(4) < 100
    assert scale.ticks() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("values", [[], [0.0], [1e-320], [3.0], [1e-9, 1e9]])
def test_a_logarithmic_scale_holds_any_values(values):
    scale = over_decades(values, 100, 0)

    assert all(0 <= scale(value) <= 100 for value in (*values, 0.0, 1e300))
    assert 2 <= len(scale.ticks()) <= 8


def test_few_decades_have_ticks_between():
    assert Scale(low=1.0, high=10.0, start=0, end=1, logarithmic=True).ticks() == [1, 2, 5, 10]
