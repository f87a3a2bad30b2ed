"""Joint search of a block: one candidate per site, by the error of the block's output (equation 3 of the paper)."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Choice = tuple[int, ...]
"""One candidate's number per site."""

EXHAUSTIVE_UP_TO = 8
"""Combinations of candidates that are all tried; blocks with more are searched by coordinate descent."""

MAX_SWEEPS = 3
"""Times that coordinate descent goes through the sites at most."""

MIN_GAIN = 0.01
"""Share of the block's error that a step away from the layer-wise optimum must gain. Less is within what another
sample of the data would change, and each step of a descent costs the runs of one more sweep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JointChoice:
    """What the search of a block found.

    Attributes:
        choice: a candidate per site; 0 is the layer-wise optimum.
        before: error of the block with all candidates 0.
        after: error with `choice`, never above `before`.
        forwards: how often the block was run.
    """

    choice: Choice
    before: float
    after: float
    forwards: int


def search_block(
    counts: Sequence[int],
    evaluate: Callable[[Choice], float],
    *,
    exhaustive_up_to: int = EXHAUSTIVE_UP_TO,
    max_sweeps: int = MAX_SWEEPS,
    min_gain: float = MIN_GAIN,
) -> JointChoice:
    """Choose a candidate per site so that the error of the block's output is least.

    The layer-wise optimum is where the search starts and what it falls back to: another choice has to be better by
    `min_gain`. All combinations are tried where there are few. Otherwise sites are taken in turn, first to last, each
    going to its best candidate given the others if that gains as much again, until a whole sweep changes nothing.

    Args:
        counts: number of candidates per site, at least one.
        evaluate: error of the block's output for a choice, a number of at least 0; NaN counts as worse than all.
        exhaustive_up_to: combinations that count as few.
        max_sweeps: a bound on the sweeps.
        min_gain: share of the error that a step must take away, in 0..1.
    """
    known: dict[Choice, float] = {}

    def error(choice: Choice) -> float:
        if choice not in known:
            measured = evaluate(choice)
            known[choice] = math.inf if math.isnan(measured) else measured
        return known[choice]

    start: Choice = (0,) * len(counts)
    before = error(start)

    def step(here: Choice, options: Iterable[Choice]) -> Choice:
        best = min(options, key=error, default=here)  # the first of equals
        return best if error(best) < error(here) and error(best) <= (1 - min_gain) * error(here) else here

    if math.prod(counts) <= exhaustive_up_to:
        best = step(start, itertools.product(*(range(count) for count in counts)))
    else:
        best = _descend(start, counts, step, max_sweeps)
    return JointChoice(choice=best, before=before, after=error(best), forwards=len(known))


def _descend(
    choice: Choice, counts: Sequence[int], step: Callable[[Choice, Iterable[Choice]], Choice], max_sweeps: int
) -> Choice:
    for _ in range(max_sweeps):
        swept = choice
        for site, count in enumerate(counts):
            others = (number for number in range(count) if number != swept[site])
            swept = step(swept, [(*swept[:site], number, *swept[site + 1 :]) for number in others])
        if swept == choice:
            break
        choice = swept
    return choice


def near_clips(grid: Sequence[float], clip: float) -> tuple[float, ...]:
    """What a joint search tries beside the layer-wise `clip`: its neighbours in the grid, and the full range 1.0."""
    ordered = sorted({*grid, clip, 1.0}, reverse=True)
    place = ordered.index(clip)
    around = {*ordered[max(place - 1, 0) : place + 2], 1.0} - {clip}
    return tuple(sorted(around, reverse=True))
