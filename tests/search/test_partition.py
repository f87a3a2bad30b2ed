"""The partition: every layer once, in order, contiguous, never too deep, and a function of its arguments alone."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_qvlm.plan import Block, Dependency
from optimum_qvlm.search.partition import default_threshold, partition, span_dependency

dependencies = st.lists(st.floats(0, 4).map(lambda value: round(value, 2)), max_size=9)


def spans(values, threshold, depth, part="language"):
    return [(b.first, b.last) for b in partition(part, len(values) + 1, values, threshold, depth)]


@given(values=dependencies, threshold=st.floats(0, 4), depth=st.integers(1, 5))
def test_every_layer_is_in_one_block_in_order(values, threshold, depth):
    blocks = partition("vision", len(values) + 1, values, threshold, depth)

    layers = [layer for block in blocks for layer in range(block.first, block.last + 1)]
    assert layers == list(range(len(values) + 1))
    assert all(block.part == "vision" and block.last - block.first < depth for block in blocks)


@given(values=dependencies, threshold=st.floats(0, 4), depth=st.integers(1, 5))
def test_a_block_of_several_layers_exceeds_the_bound(values, threshold, depth):
    """Equation 7."""
    for first, last in spans(values, threshold, depth):
        assert first == last or span_dependency(values, first, last) > (last - first) * threshold


@given(values=dependencies, threshold=st.floats(0, 4), depth=st.integers(1, 5))
def test_the_partition_is_a_pure_function(values, threshold, depth):
    """Its arguments stay as they are, and the answer is the same each time."""
    before = list(values)

    assert spans(values, threshold, depth) == spans(tuple(values), threshold, depth)
    assert values == before


@given(
    values=st.lists(st.integers(0, 6).map(lambda value: value / 2), max_size=6),
    threshold=st.integers(0, 6).map(lambda value: value / 2),
    depth=st.integers(1, 4),
)
def test_no_other_partition_has_more_excess(values, threshold, depth):
    """By brute force over all ways to cut; ties go to the shortest first block."""

    def excess(cut):
        return [span_dependency(values, first, last) - (last - first) * threshold for first, last in cut]

    allowed = []
    layers = len(values) + 1
    for cuts in itertools.product([False, True], repeat=len(values)):
        ends = [layer for layer in range(layers) if layer == layers - 1 or cuts[layer]]
        cut = list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))
        whole = all(last - first < depth for first, last in cut)
        if whole and all(first == last or e > 0 for (first, last), e in zip(cut, excess(cut), strict=True)):
            allowed.append(cut)

    best = min(allowed, key=lambda cut: (-sum(excess(cut)), [last for _, last in cut]))
    assert spans(values, threshold, depth) == best


@pytest.mark.parametrize(
    "values, depth, expected",
    [
        ([], 3, [(0, 0)]),
        ([2.0], 3, [(0, 1)]),
        ([0.5], 3, [(0, 0), (1, 1)]),
        ([1.0], 3, [(0, 0), (1, 1)]),
        ([2.0, 2.0], 1, [(0, 0), (1, 1), (2, 2)]),
        ([2.0, 2.0], 3, [(0, 2)]),
        ([2.0, 2.0, 2.0], 2, [(0, 1), (2, 3)]),
        ([0.9, 3.0, 0.9], 2, [(0, 0), (1, 2), (3, 3)]),
        ([0.9, 3.0], 3, [(0, 0), (1, 2)]),
    ],
    ids=["one", "pair", "weak pair", "at the bound", "depth 1", "triple", "two pairs", "middle", "weak neighbour"],
)
def test_blocks_form_where_dependency_exceeds_the_threshold(values, depth, expected):
    assert spans(values, 1.0, depth) == expected


@pytest.mark.parametrize("factor", [0.25, 8.0])
@given(values=dependencies, depth=st.integers(1, 4))
def test_only_the_ratio_to_the_threshold_counts(factor, values, depth):
    """Powers of two, so that nothing is rounded."""
    assert spans([factor * value for value in values], factor * 1.5, depth) == spans(values, 1.5, depth)


def test_a_span_sums_its_pairs():
    """Equation 6; a single layer has none."""
    assert span_dependency([1.0, 2.0, 4.0], 0, 0) == 0
    assert span_dependency([1.0, 2.0, 4.0], 1, 3) == 6.0


def test_the_default_threshold_is_the_median_of_pairs_of_equal_width():
    """An entropy that is but an upper bound would raise it."""
    actual = [Dependency(part="vision", layer=n, entropy=e) for n, e in enumerate([1.0, 2.0, 5.0])]
    bound = Dependency(part="language", layer=0, entropy=9.0, marginal=True)

    assert default_threshold([*actual, bound]) == 2.0
    assert default_threshold([*actual[:2], bound]) == 1.5
    assert default_threshold([bound]) == 9.0
    assert default_threshold([]) == 0.0


def test_blocks_name_their_part():
    assert partition("projector", 1, [], 0.0, 3) == (Block(part="projector", first=0, last=0),)
