"""Numbers as people read them, and where they lie on an axis."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TICKS = 5
"""Labels of an axis at most, about."""


def readable(value: float) -> str:
    """Three digits: `0.0123`, `1.42e-05`, `12,300`."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e9:
        return f"{value:.2e}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    """`0.9876` as `98.8 %`."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """`95` as `1 min 35 s`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Values of an axis from `low` to `high` onto lengths from `start` to `end`; logarithmic ones are above 0."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; what lies outside is moved to the nearer end."""
        inside = min(max(value, self.low), self.high)
        low, high, at = (self._linear(number) for number in (self.low, self.high, inside))
        return self.start + (self.end - self.start) * ((at - low) / (high - low))

    def ticks(self) -> list[float]:
        """Round values in the range, in order."""
        if self.logarithmic:
            return self._decades()
        rough = (self.high - self.low) / TICKS
        base = 10.0 ** math.floor(math.log10(rough))
        step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _decades(self) -> list[float]:
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        if last - first < 2:
            shown = [10.0**power * digit for power in range(first, last + 1) for digit in (1, 2, 5)]
            return [value for value in shown if value <= self.high * 1.001]
        every = math.ceil((last - first + 1) / TICKS)
        return [10.0**power for power in range(first, last + 1, every)]

    def _linear(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def from_zero(values: Iterable[float], start: float, end: float) -> Scale:
    """A linear scale of values that are not negative."""
    return Scale(low=0.0, high=max([*values, 1e-12]) * 1.05, start=start, end=end)


def over_decades(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale of whole decades around the values above 0."""
    positive = [max(value, 1e-30) for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return Scale(low=10.0**low, high=10.0 ** max(high, low + 1), start=start, end=end, logarithmic=True)
