"""Launch shapes: a table that answers for every size, and whose answers a device can launch."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_qvlm.kernels.triton import tiles

ARCHITECTURES = [80, 86, 89, 90, 100, 120]
TOKENS = [1, 8, 9, 16, 17, 32, 33, 64, 65, 600, 5000]

SIZES = [16, 1024, 5120, 50000]

DECODED = [(4, 16), (4, 128), (6, 16), (6, 128), (8, None)]
"""Bits and groups of weights."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits, group", DECODED)
@pytest.mark.parametrize("tokens", TOKENS)
def test_decoding_takes_its_tokens_in_one_program_as_long_as_it_can(architecture, bits, group, tokens):
    """The weight would be read twice otherwise. Slices are shared out evenly among the warps."""
    for rows in SIZES:
        tile = tiles.decode_tile(architecture, bits, group, tokens, rows)

        assert tile.tokens >= min(tokens, tiles.DECODE_TOKENS)
        assert tile.slices % tile.warps == 0
        assert tile.rows % 16 == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", range(1, tiles.DIGITS_TOKENS + 1))
def test_digits_take_their_tokens_in_one_program_with_a_warp_for_each_slice(architecture, tokens):
    """Columns of eight: those of two tokens at least."""
    for rows in SIZES:
        tile = tiles.digits_tile(architecture, tokens, rows)

        assert tile.tokens >= tokens and tile.tokens % 2 == 0
        assert tile.slices == tile.warps
        assert tile.rows % 16 == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "operand_bits, bits, group", [(8, 4, 128), (8, 4, 32), (8, 6, 64), (8, 8, None), (16, 4, 128), (32, 4, 64)]
)
def test_prefill_tiles_grow_with_the_tokens(architecture, operand_bits, bits, group):
    for rows in SIZES:
        actual = [tiles.prefill_tile(architecture, operand_bits, bits, group, tokens, rows) for tokens in TOKENS]

        assert [tile.tokens for tile in actual] == sorted(tile.tokens for tile in actual)
        assert all(tile.tokens >= min(tokens, 16) for tile, tokens in zip(actual, TOKENS, strict=True))


def test_large_products_of_bytes_get_large_tiles():
    """With fewer tiles than multiprocessors, some of these have no work."""
    few, many = (tiles.bytes_tile(90, 600, rows) for rows in (1024, 100000))

    assert few.rows * few.tokens < many.rows * many.tokens


@pytest.mark.parametrize("architecture", [90, 100, 120])
def test_tiles_made_in_registers_are_rows_of_whole_warp_groups(architecture):
    """The left operand is the weight: sixteen rows a warp, four warps to an instruction."""
    for tokens, rows in itertools.product((tiles.LEVELS_TOKENS, 5000), SIZES):
        for tile in (tiles.levels_tile(architecture, tokens, rows), tiles.floats_tile(architecture, tokens, rows)):
            assert tile.rows % 64 == 0 and tile.warps % 4 == 0


def test_a_device_that_nobody_measured_takes_the_lines_of_the_newest_older_one():
    few, many = (lambda number, rows=rows: tiles.decode_tile(number, 4, 128, 1, rows) for rows in (1024, 50000))

    assert few(89) == few(80)
    assert many(120) == many(100)
    assert few(120) == few(100) != few(90)


def test_every_line_of_the_table_is_taken_by_something():
    """A line that an earlier one hides would be tuned for nothing."""
    taken = set()
    for architecture, tokens, rows in itertools.product((80, 90, 100), TOKENS, (16, 50000, 10**6)):
        taken.update(tiles.decode_tile(architecture, bits, group, tokens, rows) for bits, group in DECODED)
        for bits in (4, 6, 8):
            for operand, group in itertools.product((8, 16, 32), (None,) if bits == 8 else (None, 128, 32)):
                taken.add(tiles.prefill_tile(architecture, operand, bits, group, tokens, rows))
        taken.add(tiles.digits_tile(architecture, min(tokens, tiles.DIGITS_TOKENS), rows))
        taken.add(tiles.bytes_tile(architecture, tokens, rows))
        taken.add(tiles.levels_tile(architecture, tokens, rows))
        taken.add(tiles.floats_tile(architecture, tokens, rows))

    for line in tiles.table():
        shape = {name: line[name] for name in ("tokens", "rows", "warps", "stages")}
        shape |= {name: line[name] for name in ("slices", "registers", "busy", "share") if name in line}
        assert any(all(getattr(tile, name, None) == value for name, value in shape.items()) for tile in taken), line


@given(busy=st.integers(1, 6), share=st.integers(1, 64), programs=st.integers(1, 2000), blocks=st.integers(1, 200))
def test_programs_that_share_a_tile_all_have_something_to_do(busy, share, programs, blocks):
    """No more of them than keep the device busy, none with less than its share of channels, none without a block."""
    tile = tiles.PrefillTile(tokens=64, rows=64, warps=4, stages=3, busy=busy, share=128 * share)

    parts = tile.parts(90, programs, 128 * blocks)

    each = -(-blocks // parts)
    assert (parts - 1) * each < blocks <= parts * each
    assert parts == 1 or (parts * programs <= busy * tiles.MULTIPROCESSORS[90] and blocks // parts >= share)


def test_enough_tiles_are_not_shared():
    alone = tiles.PrefillTile(tokens=64, rows=64, warps=4, stages=3)
    shared = dataclasses.replace(alone, busy=2, share=768)

    assert alone.parts(90, 1, 5120) == 1
    assert [shared.parts(90, programs, 5120) for programs in (20, 80, 132, 133)] == [6, 3, 2, 1]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rotation", [None, 16, 128])
@pytest.mark.parametrize("group", [None, 16, 128, 384])
@pytest.mark.parametrize("width", [1, 96, 768, 5120, 13824])
def test_quantizing_holds_whole_groups_and_rotations(width, group, rotation, whole):
    """A group that two programs shared would have two scales."""
    tile = tiles.quantize_tile(width, group, rotation, whole=whole and group is None)

    assert tile.chunk.bit_count() == 1 and tile.span <= tile.chunk
    assert group is None or tile.span % group == 0
    assert rotation is None or tile.chunk % rotation == 0


def test_what_is_no_nvidia_device_gets_the_oldest_table_and_no_ptx():
    """The interpreter runs on the CPU."""
    cpu = torch.device("cpu")

    assert tiles.architecture(cpu) == tiles.OLDEST
    assert not tiles.speaks_ptx(cpu)
