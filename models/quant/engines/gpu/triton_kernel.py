"""The Triton kernel: an implicit matrix product over NHWC codes with the ADC in registers.

The kernel reads as the equations of `mapping.py`. What a row adds to a read, `m`, is known when the weights are: of ideal cells the *level*
`m_k = 2 C_k - 2 r_k` (analog reference; `C_k` for a digital one), of cells on a grid `values - reference` (analog reference, and without
an ADC) or `values` (digital). It may not fit int8, so it is taken apart into digits of its own, -128..127 with places of 256,

    m = sum_p 256^p m_p        u = sum_rows a_z m = sum_p 256^p sum_rows a_z m_p

and a read is one exact int8 dot product a digit, added in int32 (int64 where u needs it; integers wrap, so that only u itself must fit).
Levels of up to 6 bits are one digit; two digits serve cells up to 32639 units from their reference, 127 levels of a grid of 1/256.

One program makes a tile [pixels, output channels] of the accumulators of one group and one ADC step: for each slice with that step and
each array it loads a tile of codes and a tile of `m` once, takes the digits in registers, converts every read in registers and stores
once. What is done with a read is the kernel's MODE:

    sum         acc += u                                   "ideal", and an ADC that changes no value of this layer
    as read     acc += 2^(d z + c k) u                     "ideal", of reads that have something besides (`triton_readout`)
    static      acc += 2^(d z + c k) clip(rint(u s), ..)   in float32, where `prepare` proved it equal to `Converter.encode`; of cells on a
                                                           grid `rint(u / D)`, `D = 2^F delta`, corrected
    table       acc += 2^(d z + c k) table[k, u]           ideal cells: otherwise, or
    exact       acc += 2^(d z + c k) clip(rint(u / D), ..) in float64: otherwise; of ideal cells where the tables of all classes would have
                                                           more than `mapping.MAX_BINS` entries
    range       smallest and largest u of each (array, digit, slice) of each group: first pass of "dynamic"
    dynamic     acc += 2^(d z + c k) (q (u_b - u_a) + 2^B u_a)   second pass, see `engines`
    histogram   counts[k, z, bin of u] += 1

Of ideal cells a digit is not shifted down: `A & mask_z` is `2^(d z) a_z`, so the dot product gives `U = 2^(d z) u`, which stands for
`2^(d z) u` above, and for u in ranges.

A plan by ones has converters for each class of n, the sum of a read's digits. Their numbers and tables, and counts, have an axis of
classes, and each pixel of a tile takes those of its own class: `triton_tile.kind_of`.

Rounding is `x + MAGIC` in float32: from 2^23 to 2^24 floats are the integers, so the addition rounds to the nearest,
ties to even, and the code stands in the low bits of the sum. Where codes are not corrected, the kernel adds these bits as they are, times
the weight of the read, and takes MAGIC's share off at the end; integers wrap, so the difference is exact.

Nothing is left to PyTorch but the layout. Numbers that differ from chip to chip (the bins of a histogram) are arguments, not
constants, so that another chip runs the code that was compiled for the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .triton_readout import read_out
from .triton_tile import MAGIC, MAGIC_BITS, corner_of, divide, dot, exact_code, has_bits, kind_of, load


@dataclass(frozen=True)
class Constants:
    """What the kernel is compiled for: all numbers of a layer. (Triton takes one such object as one argument; it would not
    take fields that are tensors.)"""

    acc: tl.dtype  # of the accumulators, int32 or int64
    channels: int  # of one group, and so is out
    groups: int
    out: int
    taps: int
    kernel_w: int
    stride_y: int
    stride_x: int
    dilation_y: int
    dilation_x: int
    span: int  # rows after which arrays begin anew: those of a kernel position, or all
    rows: int  # of a full array
    arrays: int
    slices: int
    digits: int
    classes: int  # of n, that are told apart
    dac_bits: int
    planned: bool  # whether some reads are not converted
    adc_bits: int
    parts: int  # int8 digits of what a row adds to a read
    vector: int  # rows that lie side by side in memory, wherever an array begins
    block_k: int  # rows of one dot product
    blocks: int  # dot products of an array
    ideal: bool  # whether cells are ideal; else they lie on a grid
    wide: bool  # cells on a grid: whether a read needs 64 bits
    table_first: int  # of a table of codes, the first u and how many there are; 0 without one
    table_size: int


@triton.jit
def _read(a, m, m_high, levels, z, L: tl.constexpr):
    """`u` of a block of rows, `[pixels, channels]`, of ideal cells U. A third digit of m is rare, and loaded when it is needed."""
    PARTS: tl.constexpr = L.parts
    ALL: tl.constexpr = (1 << L.dac_bits) - 1
    MASK: tl.constexpr = (ALL << L.dac_bits * z) & 255 if L.ideal else ALL
    if not L.ideal:
        a = a >> L.dac_bits * z
    u = _sized(dot(a, m, MASK), L)
    if PARTS > 1:
        u += _sized(dot(a, m_high, MASK), L) << 8
    for p in tl.static_range(2, PARTS):
        part = levels + p * (L.slices * L.groups * L.out * L.arrays * L.blocks * L.block_k)
        u += _sized(dot(a, tl.load(part), MASK), L) << 8 * p
    return u


@triton.jit
def _sized(u, L: tl.constexpr):
    """In the type of reads."""
    if L.wide:
        u = u.to(tl.int64)
    return u


# What becomes of a read. Functions that return two numbers give (its code, what stands in the code's place where it is 0), both
# times the weight of the read: the difference is what counts.


@triton.jit
def _static(u, adc_ptr, weight, kind, z, L: tl.constexpr):
    """Fixed ranges in float32, of U."""
    scale = tl.load(adc_ptr + 3 * kind) * (1.0 / (1 << L.dac_bits * z))
    q = tl.clamp(u.to(tl.float32) * scale + MAGIC, tl.load(adc_ptr + 3 * kind + 1), tl.load(adc_ptr + 3 * kind + 2))
    return q.to(tl.int32, bitcast=True) * weight, MAGIC_BITS * weight


@triton.jit
def _corrected(u, adc_ptr, kind):
    """Codes of fixed ranges in float32, int32.

    `u (1 / D)` is next to u / D, so its nearest integer q is the code or beside it. What is left, `r = u - q D`, is exact (see
    `triton_conversion`) and says which, and where there is a tie. Beyond the range by one or more, a code's bound is all that matters.
    """
    step, low, high = tl.load(adc_ptr + 4 * kind + 1), tl.load(adc_ptr + 4 * kind + 2), tl.load(adc_ptr + 4 * kind + 3)
    x = u.to(tl.float32)
    rounded = tl.clamp(x * tl.load(adc_ptr + 4 * kind), low - 1, high + 1) + MAGIC
    left, half = x - (rounded - MAGIC) * step, 0.5 * step
    code = rounded.to(tl.int32, bitcast=True) - MAGIC_BITS
    odd = (code & 1) != 0
    above = (left > half) | ((left == half) & odd)
    below = (left < -half) | ((left == -half) & odd)
    code += above.to(tl.int32) - below.to(tl.int32)
    return tl.minimum(tl.maximum(code, low.to(tl.int32)), high.to(tl.int32))


@triton.jit
def _dynamic(u, adc_ptr, weight, read, L: tl.constexpr):
    """Ranges of the batch, smallest and largest u of each read."""
    u_a = tl.load(adc_ptr + read)
    span = tl.load(adc_ptr + (read + L.groups * L.arrays * L.digits * L.slices)) - u_a
    step = tl.maximum(span, 1).to(tl.float32) * (1.0 / (1 << L.adc_bits))  # span 0: q = 0, value u_a
    q = tl.minimum(divide((u - u_a).to(tl.float32), step) + MAGIC, MAGIC + ((1 << L.adc_bits) - 1))
    surplus = (MAGIC_BITS * span.to(L.acc) - (u_a.to(L.acc) << L.adc_bits)) * weight
    return q.to(tl.int32, bitcast=True) * (span.to(L.acc) * weight), surplus


@triton.jit
def _count(u, own, out_ptr, adc_ptr, kind, L: tl.constexpr):
    """Count the reads by value, in one of several copies of the counts."""
    first, bins, shift = tl.load(adc_ptr).to(tl.int32), tl.load(adc_ptr + 1), tl.load(adc_ptr + 2).to(tl.int32)
    copy = tl.program_id(0) % tl.load(adc_ptr + 3)
    counts = out_ptr + (copy * (L.slices * L.digits * L.classes) + kind) * bins
    place = (u + (1 << shift >> 1) >> shift) - first  # see `mapping.Bins`
    tl.atomic_add(counts + place, tl.full(u.shape, 1, tl.int64), mask=own, sem="relaxed")


@triton.jit
def _add_read(acc, surplus, a, m, m_high, levels, a_ptr, m_ptr, out_ptr, adc_ptr, weight_ptr, besides, first_image, seed, corner, column,
              row, depth, in_width, pixel, size, channel, own, group, k, t, z, L: tl.constexpr, R: tl.constexpr, MODE: tl.constexpr):
    """Make a read of digit z and do with it what MODE says. Returns: acc and surplus, and what the read adds to them."""
    kind = kind_of(a, a_ptr, corner, row, depth, in_width, k, t, z, L)
    weight = tl.load(weight_ptr + kind)
    if not L.planned or has_bits(weight, L):
        u = _read(a, m, m_high, levels, z, L)
        for b in range(1, L.blocks):  # arrays of more than block_k rows
            a_b, m_b, m_high_b, levels_b = load(a_ptr, m_ptr, corner, column, row + b * L.block_k, depth + b * L.block_k, in_width, L)
            u += _read(a_b, m_b, m_high_b, levels_b, z, L)
        if R is not None:
            u = read_out(u, besides, first_image, seed, a, a_ptr, corner, row, in_width, pixel, size, channel, group, k, t, z, L, R)
        if L.ideal and (MODE == "table" or MODE == "exact" or MODE == "histogram"):
            u = u >> L.dac_bits * z

        read = ((group * L.arrays + t) * L.digits + z) * L.slices + k
        if MODE == "sum":
            acc += u.to(L.acc)
        elif MODE == "as read":
            acc += u.to(L.acc) * weight
        elif MODE == "static" and L.ideal:
            q, zero = _static(u, adc_ptr, weight, kind, z, L)
            acc += q
            surplus += zero
        elif MODE == "static":
            acc += _corrected(u, adc_ptr, kind).to(L.acc) * weight
        elif MODE == "table":
            acc += tl.load(adc_ptr + (kind * L.table_size + u - L.table_first)) * weight
        elif MODE == "exact":
            acc += exact_code(u, adc_ptr, kind).to(L.acc) * weight
        elif MODE == "dynamic":
            q, zero = _dynamic(u, adc_ptr, weight, read, L)
            acc += q
            surplus += zero
        elif MODE == "range":
            tl.atomic_min(out_ptr + read, tl.min(u), sem="relaxed")
            tl.atomic_max(out_ptr + (read + L.groups * L.arrays * L.digits * L.slices), tl.max(u), sem="relaxed")
        else:
            _count(u, own, out_ptr, adc_ptr, kind, L)
    return acc, surplus


@triton.jit(do_not_specialize=["first_image", "seed"])  # of which each value would be compiled for, if it were 1
def kernel(a_ptr, m_ptr, out_ptr, adc_ptr, first_ptr, weight_ptr, pixels, height, width, in_height, in_width, besides, first_image, seed,
           L: tl.constexpr, R: tl.constexpr, MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """See the module. L, the layer's `Constants`. Shapes, with slices in the order of the accumulators:

    a uint8 `[N, in_height, in_width, groups * channels]`, padded; m int8 `[parts, slices, groups, out, arrays,
    blocks * block_k]`; out, accumulators `[steps, pixels, groups * out]`, ranges `[2, groups, arrays, digits,
    slices]`, int32, or int64 where reads are, or counts int64 `[copies, kinds, bins]`, kinds being `[slices, digits, classes]`; adc, for
    "static" float32, of ideal cells `(s, MAGIC + q_min, MAGIC + q_max)` `[kinds, 3]`, else `exact_numbers` `[kinds, 4]`, for "exact"
    these in float64, for "table" int16 `[kinds, u]`, for "dynamic" the ranges, for "histogram" `(*Bins, copies)` int64; first slice of
    each step int32 `[steps + 1]`; weight of a code `[kinds]`, 0 for reads that are not converted: where a tile has no others, they are not
    made; besides, first_image and seed, of `triton_readout`.
    """
    group = tl.program_id(2) % L.groups
    step = tl.program_id(2) // L.groups
    own_pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own_channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = (own_pixel < pixels)[:, None] & (own_channel < L.out)[None, :]
    pixel = tl.minimum(own_pixel, pixels - 1)  # beyond the last it is read again: ranges do not change,
    channel = tl.minimum(own_channel, L.out - 1)  # and nothing else is kept of what is not `own`
    corner = corner_of(pixel, group, height, width, in_height, in_width, L)
    depth = tl.arange(0, L.block_k)
    DIGITS: tl.constexpr = L.digits

    acc = tl.zeros((BLOCK_M, BLOCK_N), L.acc)
    surplus = tl.full((BLOCK_M, 1) if L.classes > 1 else (), 0, L.acc)
    for i in range(tl.load(first_ptr + step) * L.arrays, tl.load(first_ptr + step + 1) * L.arrays):
        k = i // L.arrays
        t = i % L.arrays
        row = t // tl.cdiv(L.span, L.rows) * L.span + t % tl.cdiv(L.span, L.rows) * L.rows + depth
        column = ((k * L.groups + group).to(tl.int64) * L.out + channel) * (L.arrays * L.blocks * L.block_k) + (
            t * (L.blocks * L.block_k))
        a, m, m_high, levels = load(a_ptr, m_ptr, corner, column, row, depth, in_width, L)
        if R is None:
            for z in tl.static_range(DIGITS):
                acc, surplus = _add_read(
                    acc, surplus, a, m, m_high, levels, a_ptr, m_ptr, out_ptr, adc_ptr, weight_ptr, besides, first_image, seed, corner,
                    column, row, depth, in_width, pixel, height * width, channel, own, group, k, t, z, L, R, MODE)
        else:  # digits one after the other: all of them would need more registers than there are
            for z in range(DIGITS):
                acc, surplus = _add_read(
                    acc, surplus, a, m, m_high, levels, a_ptr, m_ptr, out_ptr, adc_ptr, weight_ptr, besides, first_image, seed, corner,
                    column, row, depth, in_width, pixel, height * width, channel, own, group, k, t, z, L, R, MODE)

    if MODE != "range" and MODE != "histogram":
        out = (step.to(tl.int64) * pixels + own_pixel) * (L.groups * L.out) + group * L.out
        tl.store(out_ptr + (out[:, None] + own_channel[None, :]), acc - surplus, mask=own)
