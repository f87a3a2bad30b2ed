"""Confidence intervals of the figures that the benchmarks print."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the ends of its 95 % bootstrap interval; NaN ends where it cannot be resampled."""

    value: float
    low: float
    high: float

    def text(self, places: int = 2, sign: str = "+") -> str:
        """As the tables print it; differences with a sign."""
        form = f"{sign}.{places}f"
        return f"{self.value:{form}} ({self.low:{form}} .. {self.high:{form}})"

    def scaled(self, factor: float) -> "Interval":
        """The same in another unit."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def exp(self) -> "Interval":
        """Of the exponential."""
        return Interval(math.exp(self.value), math.exp(self.low), math.exp(self.high))


def of_mean(values: Tensor, seed: int = 0) -> Interval:
    """Mean of `values` [items], resampled over the items. Pass differences for a paired interval."""
    values = values.double()
    drawn = _draws(len(values), seed)
    means = values[drawn].mean(dim=1)
    return Interval(float(values.mean()), float(means.quantile(0.025)), float(means.quantile(0.975)))


def of_ratio(sums: Tensor, weights: Tensor, clusters: Tensor | None = None, seed: int = 0) -> Interval:
    """What `sums` are for each of `weights`, both [items] and added up, resampled over the items.

    Items of one number in `clusters` are drawn together, since they are not independent.
    """
    names = torch.arange(len(sums)) if clusters is None else clusters
    members, places = names.unique(return_inverse=True)
    above, below = (torch.zeros(len(members)).double().index_add(0, places, x.double()) for x in (sums, weights))
    drawn = _draws(len(members), seed)
    ratios = above[drawn].sum(dim=1) / below[drawn].sum(dim=1)
    return Interval(float(above.sum() / below.sum()), float(ratios.quantile(0.025)), float(ratios.quantile(0.975)))


def of_correlation(
    first: Tensor, second: Tensor, *, ranks: bool, clusters: Tensor | None = None, seed: int = 0
) -> Interval:
    """Pearson's correlation of two [items], or Spearman's with `ranks`, resampled over the items.

    Items of one number in `clusters` are drawn together, since they are not independent. Resamples in which one side
    is constant have no correlation and are left out.
    """
    found = _correlation(first, second, ranks=ranks)
    names = torch.arange(len(first)) if clusters is None else clusters
    members = [(names == name).nonzero().squeeze(1) for name in names.unique()]
    chosen = (torch.cat([members[place] for place in drawn]) for drawn in _draws(len(members), seed).tolist())
    draws = [_correlation(first[items], second[items], ranks=ranks) for items in chosen]
    valid = torch.tensor([draw for draw in draws if draw == draw], dtype=torch.float64)
    if len(valid) == 0:
        return Interval(found, float("nan"), float("nan"))
    return Interval(found, float(valid.quantile(0.025)), float(valid.quantile(0.975)))


def _draws(items: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(items, (RESAMPLES, items), generator=generator)


def _correlation(first: Tensor, second: Tensor, *, ranks: bool) -> float:
    a, b = (_ranks(x) if ranks else x.double() for x in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else float("nan")


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return ((ends - counts) + (ends - 1)).double()[inverse] / 2
