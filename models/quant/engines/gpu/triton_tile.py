"""What the Triton kernel is made of: products of codes, a division, rounding, where the codes of a pixel lie, and levels
that int8 does not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

if TYPE_CHECKING:
    from ...arrays.mapping import MappedLayer

MAGIC = tl.constexpr(1.5 * 2**23)
MAGIC_BITS = tl.constexpr(0x4B400000)  # MAGIC as an integer; MAGIC + q is MAGIC_BITS + q
WIDE_MAGIC = tl.constexpr(1.5 * 2**52)  # float64 from 2^52 to 2^53 are the integers; its low 32 bits are 0
MAX_ROWS = 128  # rows of one dot product


@triton.jit
def dot(a, m, MASK: tl.constexpr):
    """`sum_rows (a & MASK) m`, int32 `[pixels, channels]`. Codes above 127 do not fit int8: two halves of 4 bits."""
    if MASK < 128:
        total = tl.dot((a & MASK).to(tl.int8), m)
    else:
        total = tl.dot(((a & MASK) >> 4).to(tl.int8), m) * 16
        if MASK % 16 != 0:
            total += tl.dot((a & (MASK % 16)).to(tl.int8), m)
    return total


@triton.jit
def divide(x, y):
    """`x / y` in float32, correctly rounded, for a scalar y: one reciprocal for all of x.

    Markstein: with 1/y correctly rounded and q within one ulp of x/y, q + (x - q y) / y is x/y correctly rounded. The
    first correction brings q there. (`/` may be approximate on a GPU, and `div_rn` is 20 instructions an element.)
    """
    reciprocal = tl.div_rn(1.0, y)
    q = x * reciprocal
    q = tl.fma(tl.fma(-q, y, x), reciprocal, q)
    return tl.fma(tl.fma(-q, y, x), reciprocal, q)


@triton.jit
def exact_code(u, adc_ptr, kind):
    """Codes of fixed ranges in float64, int32, of a kind's `exact_numbers`. Clipped before they are rounded, which is the same as the
    bounds are integers; the code then stands in the low bits of the sum, ties to even."""
    q = u.to(tl.float64) / tl.load(adc_ptr + 4 * kind + 1)
    q = tl.minimum(tl.maximum(q, tl.load(adc_ptr + 4 * kind + 2)), tl.load(adc_ptr + 4 * kind + 3))
    return (q + WIDE_MAGIC).to(tl.int64, bitcast=True).to(tl.int32)


def exact_numbers(layer: MappedLayer, z: int, k: int, j: int) -> tuple[float, float, int, int]:
    """`(1 / D, D, q_min, q_max)` of the ADC of digit `z`, slice `k` and class `j`, D its step in units of u: a power of two times delta."""
    converter = layer.converter(z, k, j)
    step = converter.delta / layer.unit
    return 1 / step, step, converter.q_min, converter.q_max


@triton.jit
def corner_of(pixel, group, height, width, in_height, in_width, L: tl.constexpr):
    """Where the codes begin that an output pixel sees: those of the group at the pixel's upper left corner."""
    image = (pixel // (height * width)).to(tl.int64)
    y = pixel // width % height * L.stride_y
    x = pixel % width * L.stride_x
    return ((image * in_height + y) * in_width + x) * (L.groups * L.channels) + group * L.channels


@triton.jit
def codes_of_rows(a_ptr, corner, row, in_width, L: tl.constexpr):
    """Codes `[pixels, rows]` of a block of rows; row may go beyond the last, to codes that meet levels of 0."""
    row = row % (L.taps * L.channels)
    tap = row // L.channels
    shift = tap // L.kernel_w * L.dilation_y * in_width + tap % L.kernel_w * L.dilation_x
    offset = shift * (L.groups * L.channels) + row % L.channels
    VECTOR: tl.constexpr = L.vector
    offset = tl.max_contiguous(tl.multiple_of(offset, VECTOR), VECTOR)
    return tl.load(a_ptr + (corner[:, None] + offset[None, :]))


@triton.jit
def load(a_ptr, m_ptr, corner, column, row, depth, in_width, L: tl.constexpr):
    """Codes `[pixels, rows]` of a block of rows, and their levels `[rows, channels]`: the two lower digits, and where all of them lie.

    Row r is tap r // channels, channel r % channels, and each `L.vector` rows lie side by side in memory. Rows past the end
    of an array have level 0: their codes are read (from the next array, from row 0 after the last) and do not matter.
    """
    a = codes_of_rows(a_ptr, corner, row, in_width, L)
    levels = m_ptr + (column[None, :] + depth[:, None])
    m = tl.load(levels)
    m_high = m
    if L.parts > 1:
        m_high = tl.load(levels + L.slices * L.groups * L.out * L.arrays * L.blocks * L.block_k)
    return a, m, m_high, levels


@triton.jit
def kind_of(a, a_ptr, corner, row, depth, in_width, k, t, z, L: tl.constexpr):
    """Which number of a table `[slices, digits, classes]` is that of a read: one for all pixels, or `[pixels, 1]` where classes of n, the
    sum of the digits on the rows of array t, are told apart. Class j has the n of j bits, the last one all longer ones."""
    kind = k * L.digits + z
    if L.classes > 1:
        CLASSES: tl.constexpr = L.classes
        n = _ones(a, depth, t, z, L)
        for b in range(1, L.blocks):
            n += _ones(codes_of_rows(a_ptr, corner, row + b * L.block_k, in_width, L), depth + b * L.block_k, t, z, L)
        kind = (kind * L.classes + tl.zeros_like(n))[:, None]
        for bits in tl.static_range(CLASSES - 1):
            kind += (n >= 1 << bits).to(tl.int32)[:, None]
    return kind


@triton.jit
def _ones(a, depth, t, z, L: tl.constexpr):
    """Sum of the digits of a block of codes, int32 `[pixels]`, without those of rows past the end of the array."""
    own = (depth < L.rows) & (t % tl.cdiv(L.span, L.rows) * L.rows + depth < L.span)
    MASK: tl.constexpr = (1 << L.dac_bits) - 1
    return tl.max(dot(a >> L.dac_bits * z, own[:, None].broadcast_to(L.block_k, 16).to(tl.int8), MASK), 1)


@triton.jit
def has_bits(weight, L: tl.constexpr):
    """Whether any read of these weights, of codes, is converted."""
    if L.classes > 1:
        weight = tl.max(weight)
    return weight != 0


def classes_apart(layer: MappedLayer) -> list[int]:
    """The classes of n that have converters of their own, those of a plan by ones. Otherwise the last one is that of all: idle reads, a
    class of two, are 0, and so is their code."""
    return [*range(layer.classes)] if layer.by_ones else [-1]


def of_kinds(layer: MappedLayer, function: Callable[..., Any]) -> list:
    """`function(layer, z, k, j)` of all reads that have converters of their own, lists `[slices, digits, classes]`."""
    digits, slices = range(len(layer.spec.digit_bits)), range(len(layer.spec.slice_bits))
    return [[[function(layer, z, k, j) for j in classes_apart(layer)] for z in digits] for k in slices]


def levels(weights: torch.Tensor, order: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Weights of the slices in `order`, digit by digit: int8 `[parts, slices, groups, out / groups, positions]`.

    Args: weights, int32 `[slices, groups, rows, out / groups]`; rows, which row stands at each position, the one after the last being
        empty.
    """
    m = F.pad(weights[order].transpose(2, 3), (0, 1))
    m = m.index_select(-1, rows.to(m.device))
    parts = []
    while not parts or m.any():
        parts.append(((m + 128) % 256 - 128).to(torch.int8))
        m = (m - parts[-1]) >> 8
    return torch.stack(parts)
