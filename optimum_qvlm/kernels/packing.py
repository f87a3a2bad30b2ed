"""Dense packing of small integers into int32 words, as in the pack-quantized format of compressed-tensors 0.19.

Element i of a row starts at bit i * bits; a value may straddle two words. Codes are stored with an offset of
2^(bits-1), so that they are unsigned.
"""

import sys

import torch
from torch import Tensor

WORD = 32


def packed_width(count: int, bits: int) -> int:
    """Number of int32 words that hold `count` values."""
    return -(-count * bits // WORD)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes [rows, count] into int32 [rows, packed_width(count, bits)]."""
    rows, count = codes.shape
    values = codes.to(torch.int64) + 2 ** (bits - 1)
    values = torch.nn.functional.pad(values, (0, -count % WORD)).view(rows, -1, WORD)
    words = values.new_zeros(rows, values.shape[1], bits)
    for element in range(WORD):
        word, shift = divmod(element * bits, WORD)
        words[..., word] |= values[..., element] << shift & 0xFFFFFFFF
        if shift + bits > WORD:
            words[..., word + 1] |= values[..., element] >> (WORD - shift)
    signed = torch.where(words > 0x7FFFFFFF, words - 2**WORD, words).to(torch.int32)
    packed: Tensor = signed.reshape(rows, -1)[:, : packed_width(count, bits)].contiguous()
    return packed


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_codes`: int8 [rows, count] from int32 [rows, words]."""
    offset = 2 ** (bits - 1)
    rows = packed.shape[0]
    if bits in (4, 8) and sys.byteorder == "little":
        octets = packed.contiguous().view(torch.uint8)
        if bits == 4:
            octets = torch.stack((octets & 0xF, octets >> 4), dim=-1).reshape(rows, -1)
        return (octets[:, :count].view(torch.int8) ^ -128) if bits == 8 else octets[:, :count].view(torch.int8) - offset
    words = torch.nn.functional.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, -packed.shape[1] % bits))
    words = words.view(rows, -1, bits)
    values = words.new_empty(rows, words.shape[1], WORD)
    for element in range(WORD):
        word, shift = divmod(element * bits, WORD)
        value = words[..., word] >> shift
        if shift + bits > WORD:
            value = value | words[..., word + 1] << (WORD - shift)
        values[..., element] = value & (2**bits - 1)
    codes: Tensor = (values.view(rows, -1)[:, :count] - offset).to(torch.int8)
    return codes
