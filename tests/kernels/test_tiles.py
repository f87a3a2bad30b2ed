"""Launch shapes: a table that answers for every size, and whose answers a device can launch."""

import pytest
import torch

from optimum_qvlm.kernels import tiles

ARCHITECTURES = [80, 86, 89, 90, 100, 120]
TOKENS = [1, 8, 9, 16, 17, 32, 33, 64, 65, 600, 5000]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("tokens", TOKENS)
def test_decoding_covers_its_tokens_with_one_bucket(architecture, bits, tokens):
    """Eight to a matrix instruction; a weight of few rows gives more programs than one of many."""
    few, many = (tiles.decode_tile(architecture, bits, tokens, rows) for rows in (1024, 50000))

    assert few.tokens in tiles.DECODE_BUCKETS
    assert tokens <= few.tokens or few.tokens == max(tiles.DECODE_BUCKETS)
    assert few.rows <= many.rows
    assert few.slices == few.warps


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "operand_bits, bits, group", [(8, 4, 128), (8, 4, 32), (8, 8, None), (16, 4, 128), (32, 4, 64)]
)
def test_prefill_tiles_grow_with_the_tokens(architecture, operand_bits, bits, group):
    sizes = [tiles.prefill_tile(architecture, operand_bits, bits, group, tokens).tokens for tokens in TOKENS]

    assert sizes == sorted(sizes)
    assert all(size >= min(tokens, 16) for size, tokens in zip(sizes, TOKENS, strict=True))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rotation", [None, 16, 128])
@pytest.mark.parametrize("group", [None, 16, 128, 384])
@pytest.mark.parametrize("width", [1, 96, 768, 5120, 13824])
def test_quantizing_holds_whole_groups_and_rotations(width, group, rotation, whole):
    """A group that two programs shared would have two scales."""
    tile = tiles.quantize_tile(width, group, rotation, whole=whole and group is None)

    assert tile.chunk.bit_count() == 1 and tile.span <= tile.chunk
    assert group is None or tile.span % group == 0
    assert rotation is None or tile.chunk % (16 * rotation) == 0


def test_what_is_no_nvidia_device_gets_the_oldest_table_and_no_ptx():
    """The interpreter runs on the CPU."""
    cpu = torch.device("cpu")

    assert tiles.architecture(cpu) == tiles.OLDEST
    assert not tiles.speaks_ptx(cpu)
