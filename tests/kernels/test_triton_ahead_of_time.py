"""Kernels compiled for architectures that are not here: nothing spills, everything fits, the right instruction."""

from collections import Counter

import pytest

from tests.kernels import ahead_of_time, resources


@pytest.mark.parametrize(
    "architecture",
    [90, *(pytest.param(other, marks=pytest.mark.slow) for other in resources.ARCHITECTURES if other != 90)],
)
def test_the_tiles_that_most_calls_take_fit(architecture, capsys):
    """A spill costs more than the kernel gains; `make kernel-resources` prints the whole table."""
    for case in resources.checked_cases(architecture):
        found = case.resources()
        print(resources.line(case, found))
        assert case.faults(found) == []


def test_decoding_spends_few_instructions_on_a_weight():
    """Few tokens are bound by memory as long as the arithmetic keeps up: 2.0 to 3.1 instructions per weight do."""
    found = resources.decode_case(90, 1, 4, 128).resources()
    case = resources.decode_case(90, 1, 4, 128)

    spent = sum(found.body.values()) * case.warps * 32 / case.weights
    assert 1.0 < spent <= 3.1


def test_faults_are_found():
    """What a tile that is far too large would show."""
    case = resources.prefill_case(86, 600, 4, 128)
    poor = ahead_of_time.Resources(
        registers=255,
        stack_bytes=8,
        shared_bytes=100 * 1024,
        matrix=Counter({"HMMA.16816.F32": 4}),
        body=Counter(),
        load_bits=(32,),
    )

    assert case.faults(poor) == [
        "8 bytes of stack",
        "102400 bytes of shared memory",
        "{'HMMA.16816.F32': 4} instead of ('IMMA',)",
        "loads of (32,) bits",
    ]
