"""Damaged checkpoints: refused, the same, or harmless. `python -m tests.fuzz.checkpoints` takes other seeds."""

from collections.abc import Sequence

import pytest

from tests.fuzz.checkpoints import FAULTS, REFUSED, SAME, Outcome, make_bases, make_mutants, run, table


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


def require_sound(outcomes: Sequence[Outcome], count: int) -> None:
    faults = [outcome for outcome in outcomes if outcome.result in FAULTS]
    assert not faults, "\n".join([table(outcomes), *map(str, faults)])
    assert len(outcomes) == count
    assert sum(outcome.result == REFUSED for outcome in outcomes) > count / 2
    assert any(outcome.result == SAME for outcome in outcomes), "nothing loads: the check is of no use"


def test_a_sample_of_damaged_checkpoints_is_refused_or_loads_the_same(bases):
    """Exchanged tensors and a changed epsilon loaded to other logits in silence."""
    require_sound(list(run(make_mutants(84, seed=11), bases)), 84)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2])
def test_thousands_of_damaged_checkpoints_are_refused_or_load_the_same(bases, seed):
    require_sound(list(run(make_mutants(3000, seed=seed), bases)), 3000)
