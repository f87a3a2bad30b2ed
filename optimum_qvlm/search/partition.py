"""From the dependency of consecutive layers to blocks (equations 6 and 7 of the paper). Pure functions."""

import statistics
from collections.abc import Sequence

from optimum_qvlm.plan import Block, Dependency


def span_dependency(values: Sequence[float], first: int, last: int) -> float:
    """Dependency of the span of layers first..last: the sum over its consecutive pairs (equation 6).

    `values[k]` belongs to the layers k and k + 1.
    """
    return sum(values[first:last])


def default_threshold(dependencies: Sequence[Dependency]) -> float:
    """h0 where none is given: the median over all pairs of equal width, 0 where there are none."""
    values = [d.entropy for d in dependencies if not d.marginal] or [d.entropy for d in dependencies]
    return statistics.median(values) if values else 0.0


def partition(part: str, layers: int, values: Sequence[float], threshold: float, max_depth: int) -> tuple[Block, ...]:
    """Split the layers of a part into contiguous blocks of at most `max_depth` layers.

    A span first..last of more than one layer may be a block where its dependency exceeds (last - first) * threshold.
    Among all ways to split, the one with the largest sum over blocks of what exceeds that bound is taken; ties go to
    the shortest first block, then to the shortest next one.

    `values` has one entry per consecutive pair, so one less than layers.
    """
    assert len(values) == max(layers - 1, 0) and max_depth >= 1
    best: list[tuple[float, int]] = [(0.0, 0)] * (layers + 1)  # from each layer on: the sum, and where its block ends
    for first in reversed(range(layers)):
        options = []
        for last in range(first, min(first + max_depth, layers)):
            excess = span_dependency(values, first, last) - (last - first) * threshold
            if last == first or excess > 0:
                options.append((excess + best[last + 1][0], last))
        best[first] = max(options, key=lambda option: (option[0], -option[1]))
    blocks, first = [], 0
    while first < layers:
        last = best[first][1]
        blocks.append(Block(part=part, first=first, last=last))
        first = last + 1
    return tuple(blocks)
