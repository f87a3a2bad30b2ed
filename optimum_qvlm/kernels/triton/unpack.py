"""Device functions that turn packed bytes into operands of a matrix product.

Each has two ways. With ASM, PTX on whole 32-bit words: a byte is put beside the exponent of a float whose mantissa ends
at one, and the offset subtracted, which is exact. Without, shifts and casts, for Triton's interpreter and for devices
that are not NVIDIA's. Both give the same numbers.
"""

import triton
import triton.language as tl

_NIBBLES_FP16 = tl.constexpr(
    "{\n"
    ".reg .b32 a, b, one, low, high;\n"  # words of 32 bits
    "prmt.b32 a, $4, 0, 0x4140;\n"  # bytes 0 and 1, each in a half word of its own
    "prmt.b32 b, $4, 0, 0x4342;\n"  # bytes 2 and 3 likewise
    "mov.b32 low, 0x64086408;\n"  # 1032 in fp16, twice
    "mov.b32 one, 0x2c002c00;\n"  # 1/16 in fp16, twice
    "mov.b32 high, 0xd480d480;\n"  # -72 in fp16, twice
    "lop3.b32 $0, a, 0x000f000f, low, 0x6a;\n"  # (word & mask) ^ low: 1024 + (low nibble ^ 8)
    "lop3.b32 $1, b, 0x000f000f, low, 0x6a;\n"  # (word & mask) ^ low: 1024 + (low nibble ^ 8)
    "lop3.b32 $2, a, 0x00f000f0, 0x64806480, 0x6a;\n"  # (word & mask) ^ 1152: 1024 + 16 (high nibble ^ 8)
    "lop3.b32 $3, b, 0x00f000f0, 0x64806480, 0x6a;\n"  # (word & mask) ^ 1152: 1024 + 16 (high nibble ^ 8)
    "sub.f16x2 $0, $0, low;\n"  # less 1032: the code
    "sub.f16x2 $1, $1, low;\n"  # less 1032: the code
    "fma.rn.f16x2 $2, $2, one, high;\n"  # 1/16 of it less 72: the code
    "fma.rn.f16x2 $3, $3, one, high;\n"  # 1/16 of it less 72: the code
    "}"
)

_NIBBLES_BF16 = tl.constexpr(
    "{\n"
    ".reg .b32 a, b, c, d, t, one, shift;\n"  # words of 32 bits
    "shr.u32 t, $4, 4;\n"  # high nibbles come to the place of the low ones
    "prmt.b32 a, $4, 0, 0x4140;\n"  # bytes 0 and 1, each in a half word of its own
    "prmt.b32 b, $4, 0, 0x4342;\n"  # bytes 2 and 3 likewise
    "prmt.b32 c, t, 0, 0x4140;\n"  # bytes 0 and 1, each in a half word of its own
    "prmt.b32 d, t, 0, 0x4342;\n"  # bytes 2 and 3 likewise
    "mov.b32 one, 0x3f803f80;\n"  # 1 in bf16, twice
    "mov.b32 shift, 0xc308c308;\n"  # -136 in bf16, twice
    "lop3.b32 $0, a, 0x000f000f, 0x43084308, 0x6a;\n"  # (word & mask) ^ 136: 128 + (nibble ^ 8) in bf16
    "lop3.b32 $1, b, 0x000f000f, 0x43084308, 0x6a;\n"  # (word & mask) ^ 136: 128 + (nibble ^ 8) in bf16
    "lop3.b32 $2, c, 0x000f000f, 0x43084308, 0x6a;\n"  # (word & mask) ^ 136: 128 + (nibble ^ 8) in bf16
    "lop3.b32 $3, d, 0x000f000f, 0x43084308, 0x6a;\n"  # (word & mask) ^ 136: 128 + (nibble ^ 8) in bf16
    "fma.rn.bf16x2 $0, $0, one, shift;\n"  # less 136: the code
    "fma.rn.bf16x2 $1, $1, one, shift;\n"  # less 136: the code
    "fma.rn.bf16x2 $2, $2, one, shift;\n"  # less 136: the code
    "fma.rn.bf16x2 $3, $3, one, shift;\n"  # less 136: the code
    "}"
)

NIBBLES_INT8 = tl.constexpr(
    "{\n"
    ".reg .b32 t;\n"  # words of 32 bits
    "shl.b32 t, $2, 4;\n"  # low nibbles come to the place of the high ones
    "and.b32 $1, $2, 0xf0f0f0f0;\n"  # high nibbles, times 16
    "and.b32 $0, t, 0xf0f0f0f0;\n"  # low nibbles, times 16
    "}"
)
"""Sixteen times the codes of the low and of the high nibbles of a word, as bytes."""

_NIBBLES_MULTIPLIED = tl.constexpr(
    "{\n"
    ".reg .b32 l, h, m, n;\n"  # words of 32 bits
    "shr.u32 h, $2, 4;\n"  # high nibbles come to the place of the low ones
    "lop3.b32 l, $2, 0x0f0f0f0f, 0x08080808, 0x6a;\n"  # (word & mask) ^ 8: codes plus 8, from 0 to 15
    "lop3.b32 h, h, 0x0f0f0f0f, 0x08080808, 0x6a;\n"  # (word & mask) ^ 8: codes plus 8, from 0 to 15
    "mad.lo.u32 m, $3, 0xf7f7f7f8, 0x80808080;\n"  # in each byte 128 less 8 times the multiple
    "mad.lo.u32 n, $7, 0xf7f7f7f8, 0x80808080;\n"  # in each byte 128 less 8 times the multiple
    "mad.lo.u32 l, l, $3, m;\n"  # four codes times their multiple, plus 128
    "mad.lo.u32 h, h, $7, n;\n"  # four codes times their multiple, plus 128
    "xor.b32 $0, l, 0x80808080;\n"  # less 128: bytes with a sign
    "xor.b32 $1, h, 0x80808080;\n"  # less 128: bytes with a sign
    "}"
)

_LOW_SCALED_FP16 = tl.constexpr(
    "{\n"
    ".reg .b32 a, b, low, zero;\n"  # words of 32 bits
    "prmt.b32 a, $2, 0, 0x4140;\n"  # bytes 0 and 1, each in a half word of its own
    "prmt.b32 b, $2, 0, 0x4342;\n"  # bytes 2 and 3 likewise
    "mov.b32 low, 0x64086408;\n"  # 1032 in fp16, twice
    "mov.b32 zero, 0x80008000;\n"  # minus zero, twice: it leaves a product as it is
    "lop3.b32 a, a, 0x000f000f, low, 0x6a;\n"  # (word & mask) ^ low: 1024 + (low nibble ^ 8)
    "lop3.b32 b, b, 0x000f000f, low, 0x6a;\n"  # (word & mask) ^ low: 1024 + (low nibble ^ 8)
    "sub.f16x2 a, a, low;\n"  # less 1032: the code
    "sub.f16x2 b, b, low;\n"  # less 1032: the code
    "fma.rn.f16x2 $0, a, $3, zero;\n"  # times the factor, rounded once
    "fma.rn.f16x2 $1, b, $4, zero;\n"  # times the factor, rounded once
    "}"
)

_HIGH_SCALED_FP16 = tl.constexpr(
    "{\n"
    ".reg .b32 a, b, one, high, zero;\n"  # words of 32 bits
    "prmt.b32 a, $2, 0, 0x4140;\n"  # bytes 0 and 1, each in a half word of its own
    "prmt.b32 b, $2, 0, 0x4342;\n"  # bytes 2 and 3 likewise
    "mov.b32 one, 0x2c002c00;\n"  # 1/16 in fp16, twice
    "mov.b32 high, 0xd480d480;\n"  # -72 in fp16, twice
    "mov.b32 zero, 0x80008000;\n"  # minus zero, twice: it leaves a product as it is
    "lop3.b32 a, a, 0x00f000f0, 0x64806480, 0x6a;\n"  # (word & mask) ^ 1152: 1024 + 16 (high nibble ^ 8)
    "lop3.b32 b, b, 0x00f000f0, 0x64806480, 0x6a;\n"  # (word & mask) ^ 1152: 1024 + 16 (high nibble ^ 8)
    "fma.rn.f16x2 a, a, one, high;\n"  # 1/16 of it less 72: the code
    "fma.rn.f16x2 b, b, one, high;\n"  # 1/16 of it less 72: the code
    "fma.rn.f16x2 $0, a, $3, zero;\n"  # times the factor, rounded once
    "fma.rn.f16x2 $1, b, $4, zero;\n"  # times the factor, rounded once
    "}"
)

_LOW_SCALED_BF16 = tl.constexpr(
    "{\n"
    ".reg .b32 a, b, one, shift, zero;\n"  # words of 32 bits
    "prmt.b32 a, $2, 0, 0x4140;\n"  # bytes 0 and 1, each in a half word of its own
    "prmt.b32 b, $2, 0, 0x4342;\n"  # bytes 2 and 3 likewise
    "mov.b32 one, 0x3f803f80;\n"  # 1 in bf16, twice
    "mov.b32 shift, 0xc308c308;\n"  # -136 in bf16, twice
    "mov.b32 zero, 0x80008000;\n"  # minus zero, twice: it leaves a product as it is
    "lop3.b32 a, a, 0x000f000f, 0x43084308, 0x6a;\n"  # (word & mask) ^ 136: 128 + (nibble ^ 8) in bf16
    "lop3.b32 b, b, 0x000f000f, 0x43084308, 0x6a;\n"  # (word & mask) ^ 136: 128 + (nibble ^ 8) in bf16
    "fma.rn.bf16x2 a, a, one, shift;\n"  # less 136: the code
    "fma.rn.bf16x2 b, b, one, shift;\n"  # less 136: the code
    "fma.rn.bf16x2 $0, a, $3, zero;\n"  # times the factor, rounded once
    "fma.rn.bf16x2 $1, b, $4, zero;\n"  # times the factor, rounded once
    "}"
)

_HIGH_SCALED_BF16 = tl.constexpr(
    "{\n"
    ".reg .b32 a, b, t, one, shift, zero;\n"  # words of 32 bits
    "shr.u32 t, $2, 4;\n"  # high nibbles come to the place of the low ones
    "prmt.b32 a, t, 0, 0x4140;\n"  # bytes 0 and 1, each in a half word of its own
    "prmt.b32 b, t, 0, 0x4342;\n"  # bytes 2 and 3 likewise
    "mov.b32 one, 0x3f803f80;\n"  # 1 in bf16, twice
    "mov.b32 shift, 0xc308c308;\n"  # -136 in bf16, twice
    "mov.b32 zero, 0x80008000;\n"  # minus zero, twice: it leaves a product as it is
    "lop3.b32 a, a, 0x000f000f, 0x43084308, 0x6a;\n"  # (word & mask) ^ 136: 128 + (nibble ^ 8) in bf16
    "lop3.b32 b, b, 0x000f000f, 0x43084308, 0x6a;\n"  # (word & mask) ^ 136: 128 + (nibble ^ 8) in bf16
    "fma.rn.bf16x2 a, a, one, shift;\n"  # less 136: the code
    "fma.rn.bf16x2 b, b, one, shift;\n"  # less 136: the code
    "fma.rn.bf16x2 $0, a, $3, zero;\n"  # times the factor, rounded once
    "fma.rn.bf16x2 $1, b, $4, zero;\n"  # times the factor, rounded once
    "}"
)

_SIX_BITS_FIRST = tl.constexpr(
    "{\n"
    ".reg .b32 h, l, u, v;\n"  # words of 32 bits
    "shl.b32 h, $2, 4;\n"  # low nibbles come to the place of the high ones
    "shl.b32 l, $3, 2;\n"  # two low bits of each code, times 4
    "shr.u32 u, $3, 2;\n"  # those of the second half, times 4
    "and.b32 l, l, 0x0c0c0c0c;\n"  # nothing but those of the first half
    "and.b32 u, u, 0x0c0c0c0c;\n"  # nothing but those of the second half
    "mov.b32 v, 0xf0f0f0f0;\n"  # mask of the high nibbles
    "lop3.b32 $1, $2, v, u, 0xea;\n"  # (codes & mask) | low bits of the second half
    "lop3.b32 $0, h, v, l, 0xea;\n"  # (codes & mask) | low bits of the first half
    "}"
)

_SIX_BITS_SECOND = tl.constexpr(
    "{\n"
    ".reg .b32 h, l, u, v;\n"  # words of 32 bits
    "shl.b32 h, $2, 4;\n"  # low nibbles come to the place of the high ones
    "shr.u32 u, $3, 4;\n"  # those of the second half, times 4
    "and.b32 l, $3, 0x0c0c0c0c;\n"  # nothing but those of the first half
    "and.b32 u, u, 0x0c0c0c0c;\n"  # nothing but those of the second half
    "mov.b32 v, 0xf0f0f0f0;\n"  # mask of the high nibbles
    "lop3.b32 $1, $2, v, u, 0xea;\n"  # (codes & mask) | low bits of the second half
    "lop3.b32 $0, h, v, l, 0xea;\n"  # (codes & mask) | low bits of the first half
    "}"
)

_BYTES_FP16 = tl.constexpr(
    "{\n"
    ".reg .b32 t, s;\n"  # words of 32 bits
    "xor.b32 t, $2, 0x80808080;\n"  # bytes plus 128, from 0 to 255
    "mov.b32 s, 0x64806480;\n"  # 1152 in fp16, twice
    "prmt.b32 $0, t, 0x64646464, 0x4140;\n"  # 1024 + byte 0 and 1024 + byte 1 in fp16
    "prmt.b32 $1, t, 0x64646464, 0x4342;\n"  # and those of bytes 2 and 3
    "sub.f16x2 $0, $0, s;\n"  # less 1152: the code
    "sub.f16x2 $1, $1, s;\n"  # less 1152: the code
    "}"
)

_BYTES_BF16 = tl.constexpr(
    "{\n"
    ".reg .b32 a, b, c, d, minus, e;\n"  # words of 32 bits
    "prmt.b32 a, $2, 0, 0x4140;\n"  # bytes 0 and 1, each in a half word of its own
    "prmt.b32 b, $2, 0, 0x4342;\n"  # bytes 2 and 3 likewise
    "mov.b32 minus, 0xbf80bf80;\n"  # -1 in bf16, twice
    "mov.b32 e, 0x43004300;\n"  # 128 in bf16, twice
    "lop3.b32 c, a, 0x00800080, e, 0xea;\n"  # (word & mask) | 128: 256 where the byte is negative, else 128
    "lop3.b32 d, b, 0x00800080, e, 0xea;\n"  # (word & mask) | 128: 256 where the byte is negative, else 128
    "lop3.b32 a, a, 0x007f007f, e, 0xea;\n"  # (word & mask) | 128: 128 + the low seven bits
    "lop3.b32 b, b, 0x007f007f, e, 0xea;\n"  # (word & mask) | 128: 128 + the low seven bits
    "fma.rn.bf16x2 $0, c, minus, a;\n"  # one less the other: the code
    "fma.rn.bf16x2 $1, d, minus, b;\n"  # one less the other: the code
    "}"
)


@triton.jit
def load_weight(
    row, block, offset,
    START: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Codes of channels START + offset and START + offset + 64 of a block of 128, as DTYPE.

    `row` points to rows of packed weights, `block` counts blocks, and the three broadcast. int8 comes out as 16 times
    the code from four bits, 4 times from six; floats as the code from four bits, 4 times from six.
    """
    if BITS == 8:
        place = row + block * 128 + START + offset
        first = tl.load(place)
        second = tl.load(place + 64)
        if DTYPE != tl.int8:
            first = whole_bytes(first, DTYPE, ASM)
            second = whole_bytes(second, DTYPE, ASM)
        return first, second
    elif BITS == 6:
        packed = tl.load(row + block * 64 + START + offset)
        low = tl.load(row + WIDTH // 2 + block * 32 + START % 32 + offset)
        first, second = fourfold_six_bits(packed, low, START // 32, ASM)
        if DTYPE != tl.int8:
            first = whole_bytes(first, DTYPE, ASM)
            second = whole_bytes(second, DTYPE, ASM)
        return first, second
    else:
        packed = tl.load(row + block * 64 + START + offset)
        if DTYPE == tl.int8:
            return sixteenfold_nibbles(packed, ASM)
        else:
            return nibbles(packed, DTYPE, ASM)


@triton.jit
def load_bytes(row, block, offset, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Codes of eight bits of a whole block of 128, as DTYPE: the same codes in the order of the channels."""
    codes = tl.load(row + block * 128 + offset)
    if DTYPE != tl.int8:
        codes = whole_bytes(codes, DTYPE, ASM)
    return codes


@triton.jit
def nibbles(packed, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Codes of the low and of the high nibbles, as floats."""
    if ASM and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            _NIBBLES_FP16, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    elif ASM and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _NIBBLES_BF16, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        return ((packed << 4).to(tl.int8) >> 4).to(DTYPE), (packed >> 4).to(DTYPE)


@triton.jit
def scaled_nibbles(packed, factor, HALF: tl.constexpr, ASM: tl.constexpr):
    """Codes of the low nibbles, or of the high ones with HALF 1, times `factor` in its dtype, fp16 or bf16.

    `factor` broadcasts. Codes are exact, so that each product is rounded once.
    """
    factor, packed = tl.broadcast(factor, packed)
    if ASM and factor.dtype == tl.float16 and HALF == 0:
        return tl.inline_asm_elementwise(
            _LOW_SCALED_FP16, "=r,=r,r,r,r", [packed, factor], dtype=tl.float16, is_pure=True, pack=4
        )
    elif ASM and factor.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _HIGH_SCALED_FP16, "=r,=r,r,r,r", [packed, factor], dtype=tl.float16, is_pure=True, pack=4
        )
    elif ASM and HALF == 0:
        return tl.inline_asm_elementwise(
            _LOW_SCALED_BF16, "=r,=r,r,r,r", [packed, factor], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            _HIGH_SCALED_BF16, "=r,=r,r,r,r", [packed, factor], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        codes = (packed << 4).to(tl.int8) >> 4 if HALF == 0 else packed >> 4
        return (codes.to(tl.float32) * factor.to(tl.float32)).to(factor.dtype)


@triton.jit
def sixteenfold_nibbles(packed, ASM: tl.constexpr):
    """Sixteen times the codes of the low and of the high nibbles, as int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            NIBBLES_INT8, "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        return (packed << 4).to(tl.int8), (packed & -16).to(tl.int8)


@triton.jit
def multiplied_nibbles(packed, first, second, ASM: tl.constexpr):
    """Codes of the low nibbles times `first` and of the high ones times `second`, as int8.

    Both are int32 in -15..15 that broadcast, the same for any four bytes side by side. One product multiplies four
    codes: codes from 0 to 15 times the multiple, less 8 times it, plus 128 are four bytes that none overflows.
    """
    if ASM:
        first, packed = tl.broadcast(first, packed)
        second, packed = tl.broadcast(second, packed)
        return tl.inline_asm_elementwise(
            _NIBBLES_MULTIPLIED,
            "=r,=r,r,r,r,r,r,r,r,r,r",
            [packed, first, second],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((packed << 4).to(tl.int8) >> 4).to(tl.int32) * first
        high = (packed >> 4).to(tl.int32) * second
        return low.to(tl.int8), high.to(tl.int8)


@triton.jit
def fourfold_six_bits(packed, low, QUARTER: tl.constexpr, ASM: tl.constexpr):
    """Four times the six-bit codes of the low and of the high nibbles, as int8.

    QUARTER 0 has channels 0..31 and 64..95 of a block in `packed`, QUARTER 1 the others; `low` has all.
    """
    if ASM and QUARTER == 0:
        return tl.inline_asm_elementwise(
            _SIX_BITS_FIRST, "=r,=r,r,r", [packed, low], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            _SIX_BITS_SECOND, "=r,=r,r,r", [packed, low], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        first = ((low >> (2 * QUARTER)) & 3) << 2
        second = ((low >> (2 * QUARTER + 4)) & 3) << 2
        return ((packed << 4) | first).to(tl.int8), ((packed & -16) | second).to(tl.int8)


@triton.jit
def whole_bytes(codes, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """int8 as floats."""
    if ASM and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(_BYTES_FP16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    elif ASM and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(_BYTES_BF16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return codes.to(DTYPE)
