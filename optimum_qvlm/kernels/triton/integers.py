"""Integers in the low bits of floats.

From 2**23 on, floats are 1 apart. So 1.5 * 2**23 plus a value is rounded to a float that holds the nearest integer,
halves to even, in its low bits, and 1.5 * 2**23 taken from it leaves that integer as a float: two additions in place of
conversions, which take a GPU several times as long. Magnitudes must lie below 2**22.
"""

import triton
import triton.language as tl

HOLDER = tl.constexpr(12582912.0)
"""1.5 * 2**23."""

HOLDER_BITS = tl.constexpr(0x4B400000)
"""Its bits: sums of integers that start here are bits of floats, see `held_floats`."""


@triton.jit
def nearest_integers(values):
    """int32 of fp32 values."""
    return (values + HOLDER).to(tl.int32, bitcast=True) - HOLDER_BITS


@triton.jit
def nearest_floats(values):
    """The same as fp32."""
    return (values + HOLDER) - HOLDER


@triton.jit
def held_floats(sums):
    """fp32 of int32 sums that started at HOLDER_BITS."""
    return sums.to(tl.float32, bitcast=True) - HOLDER
