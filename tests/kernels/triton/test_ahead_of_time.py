"""Kernels compiled for architectures that are not here: nothing spills, everything fits, the right instruction."""

import dataclasses
from collections import Counter

import pytest

from optimum_qvlm.kernels.triton import tiles
from tests.kernels import ahead_of_time, resources


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(number, marks=[] if number >= 90 else [pytest.mark.slow], id=str(number))
        for number in resources.ARCHITECTURES
    ],
)
def test_the_tiles_that_most_calls_take_fit(architecture, capsys):
    """A spill costs more than the kernel gains; `make kernel-resources` prints the whole table."""
    for case in resources.checked_cases(architecture):
        actual = case.resources()
        print(resources.line(case, actual))
        assert case.faults(actual) == []


def test_decoding_spends_few_instructions_on_a_weight():
    """Few tokens are bound by memory as long as the arithmetic keeps up: 2.0 to 3.1 instructions per weight do."""
    actual = resources.decode_case(90, 1, 4, 128).resources()
    case = resources.decode_case(90, 1, 4, 128)

    spent = sum(actual.body.values()) * case.warps * 32 / case.weights
    assert 1.0 < spent <= 3.1


@pytest.mark.parametrize("rows", [5120, 28672])
def test_digits_spend_a_third_of_that(rows):
    """Of the instructions for a weight, so that memory is what one token waits for."""
    case = resources.digits_case(90, 1, rows)

    spent = sum(case.resources().body.values()) * case.warps * 32 / case.weights
    assert 0.5 < spent <= 1.4


@pytest.mark.parametrize("architecture", sorted({line["architecture"] for line in tiles.table()}))
def test_the_whole_table_has_every_launch_shape_of_its_architecture(architecture):
    """A line that is never compiled is one whose faults nobody sees."""
    compiled = {
        (case.name.split()[0], case.constants.get("BITS"), *_shape_of(case))
        for case in resources.all_cases(architecture)
    }

    for line in tiles.table():
        if line["architecture"] != architecture:
            continue
        shape = [line.get(name) for name in ("tokens", "rows", "slices", "warps", "stages", "registers")]
        bits = {4, 6, 8, None} if line.get("bits", "any") == "any" else {line["bits"]}
        assert any((line["kernel"], number, *shape) in compiled for number in bits), line


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_no_product_is_open_when_its_operand_is_overwritten(bits):
    """Whole rows in floats, whose sums nothing but the next product uses, so that Triton does not wait for them."""
    case = resources.prefill_case(90, 200, bits, None, "fp16")
    careless = dataclasses.replace(case, constants=case.constants | {"SETTLES": False})

    assert case.resources().open_products == 0
    assert careless.resources().open_products > 0


def test_faults_are_found():
    """What a tile that is far too large would show."""
    case = resources.prefill_case(86, 600, 4, 128)
    poor = ahead_of_time.Resources(
        registers=255,
        stack_bytes=8,
        shared_bytes=100 * 1024,
        tensor_columns=576,
        matrix=Counter({"HMMA.16816.F32": 4}),
        body=Counter(),
        load_bits=(32,),
        open_products=1,
    )

    assert case.faults(poor) == [
        "8 bytes of stack",
        "102400 bytes of shared memory",
        "576 columns of tensor memory",
        "{'HMMA.16816.F32': 4} instead of ('IMMA',)",
        "1 products from registers are open when a step ends",
        "loads of (32,) bits",
    ]


def _shape_of(case):
    constants = case.constants
    sizes = (constants.get(name) for name in ("BLOCK_TOKENS", "BLOCK_ROWS", "SLICES"))
    return *sizes, case.warps, case.stages, case.limit
