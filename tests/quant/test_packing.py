"""Dense packing: the same words as compressed-tensors, and back."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimum_qvlm.quant.packing import pack_codes, packed_width, unpack_codes

BITS = range(2, 9)
COUNTS = [1, 3, 16, 31, 32, 33, 96, 129]


def random_codes(rows: int, count: int, bits: int, seed: int = 0) -> Tensor:
    """Codes over the whole range, with both ends of it first."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.randint(low, high + 1, (rows, count), generator=torch.Generator().manual_seed(seed))
    codes[0, 0], codes[-1, -1] = low, high
    return codes.to(torch.int8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("rows", [1, 5])
def test_words_are_those_of_compressed_tensors(bits, count, rows):
    """Other software reads these tensors from our checkpoints."""
    codes = random_codes(rows, count, bits)

    packed = pack_codes(codes, bits)

    assert packed.dtype == torch.int32 and packed.is_contiguous()
    assert torch.equal(packed, pack_to_int32(codes, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", COUNTS)
def test_words_of_compressed_tensors_are_read(bits, count):
    codes = random_codes(4, count, bits)

    unpacked = unpack_codes(pack_to_int32(codes, bits), bits, count)

    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)
    assert torch.equal(unpacked, unpack_from_int32(pack_codes(codes, bits), bits, codes.shape))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows, groups", [(1, 1), (8, 3), (33, 2), (129, 5)])
def test_zero_points_are_packed_along_the_rows(bits, rows, groups):
    """compressed-tensors packs them with packed_dim=0; we transpose before and after."""
    zero_point = random_codes(rows, groups, bits)

    packed = pack_codes(zero_point.T, bits).T.contiguous()

    assert packed.shape == (packed_width(rows, bits), groups)
    assert torch.equal(packed, pack_to_int32(zero_point, bits, packed_dim=0))
    assert torch.equal(unpack_codes(packed.T, bits, rows).T, zero_point)


@given(bits=st.integers(2, 8), rows=st.integers(1, 6), count=st.integers(1, 200), seed=st.integers(0, 2**16))
def test_codes_survive_the_round_trip(bits, rows, count, seed):
    codes = random_codes(rows, count, bits, seed)

    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_survives_in_every_place_of_a_word(bits):
    """32 values fill whole words for every bit width, so all shifts and straddles occur."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.arange(low, high + 1, dtype=torch.int8).unsqueeze(1).expand(-1, 32)

    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 32), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", ["low", "high"])
def test_neighbours_do_not_leak_into_each_other(bits, value):
    """One extreme value among the other extreme shows a wrong mask at once."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    one, rest = (low, high) if value == "low" else (high, low)
    codes = torch.full((40, 40), rest, dtype=torch.int8).fill_diagonal_(one)

    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 40), codes)


@pytest.mark.parametrize(
    "count, bits, words", [(1, 2, 1), (16, 2, 1), (17, 2, 2), (32, 6, 6), (11, 3, 2), (8, 4, 1), (9, 4, 2), (5, 8, 2)]
)
def test_width_is_the_smallest_number_of_words(count, bits, words):
    assert packed_width(count, bits) == words
    assert pack_codes(torch.zeros(2, count, dtype=torch.int8), bits).shape == (2, words)


@pytest.mark.parametrize("bits", BITS)
def test_the_unused_bits_of_the_last_word_are_zero(bits):
    """Otherwise equal weights could have unequal files."""
    lowest = torch.full((1, 33), -(2 ** (bits - 1)), dtype=torch.int8)

    assert not bool(pack_codes(lowest, bits).any())


@pytest.mark.parametrize("bits", BITS)
def test_views_are_packed_and_unpacked_by_value(bits):
    """Slices and transposes of a weight have other strides."""
    codes = random_codes(10, 70, bits)
    packed = pack_codes(codes.T[:, ::2], bits)

    assert torch.equal(packed, pack_codes(codes.T[:, ::2].contiguous(), bits))
    strided = torch.stack((packed, packed), dim=-1)[..., 0]
    assert torch.equal(unpack_codes(strided, bits, 5), codes.T[:, ::2])
