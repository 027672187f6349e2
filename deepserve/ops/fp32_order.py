"""fp32 numbers as integers in the same order: Triton kernels that search by them end exactly, and see NaN."""

from __future__ import annotations

import triton
import triton.language as tl

LEAST = tl.constexpr(-2139095040)  # the key of the least finite number; that of -inf is one less
INFINITY = tl.constexpr(0x7F800000)  # the key of inf; above it is NaN alone
NAN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def key_of(value):
    """int32 of fp32: -0.0 is 0.0, NaN is the largest."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(value != value, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def value_of(key):
    """fp32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
