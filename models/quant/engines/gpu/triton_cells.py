"""The Triton engine's kernel for cells on a grid of integers (`cells.Cells`).

What a row adds to a read, `m = values - reference` (analog reference, and without an ADC) or `values` (digital), is known when the
cells are. It does not fit int8, so it is taken apart into digits of its own, -128..127 with places of 256,

    m = sum_p 256^p m_p        u = sum_rows a_z m = sum_p 256^p sum_rows a_z m_p

and a read is one exact int8 dot product a digit, added in int32 (int64 where u needs it; integers wrap, so that only u itself must
fit). Two digits serve cells up to 32639 units from their reference, 127 levels of a grid of 1/256. What becomes of u is the MODE:

    sum         acc += u                                      "ideal": one read of all digits and slices, `m = sum_k 2^(c k) m_k`
    as read     acc += 2^(d z + c k) u                        "ideal", of reads that have something besides (`triton_readout`)
    static      acc += 2^(d z + c k) clip(rint(u / D), ..)    `D = 2^F delta`; in float32 and corrected, where that is exact
    exact       acc += 2^(d z + c k) clip(rint(u / D), ..)    otherwise: in float64, as `Converter.encode` has it
    range, dynamic, histogram                                 as in `triton_ideal`

Nothing is left to PyTorch but the layout. Numbers that differ from chip to chip (the bins of a histogram) are arguments, not
constants, so that another chip runs the code that was compiled for the first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

from ..reach import read_range
from .triton_readout import read_out
from .triton_tile import (MAGIC, MAGIC_BITS, bin_of, corner_of, divide, dot, exact_code, exact_numbers, has_bits, kind_of, load, of_kinds,
                          widen)

if TYPE_CHECKING:
    from ...arrays.mapping import MappedLayer
    from .triton_constants import Constants


@triton.jit
def _read(a, m, m_high, levels, z, L: tl.constexpr):
    """`u` of a block of rows, `[pixels, channels]`. A third digit is rare, and loaded when it is needed."""
    PARTS: tl.constexpr = L.parts
    MASK: tl.constexpr = (1 << L.dac_bits) - 1
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


@triton.jit
def _static(u, adc_ptr, kind):
    """Codes of fixed ranges in float32, int32.

    `u (1 / D)` is next to u / D, so its nearest integer q is the code or beside it. What is left, `r = u - q D`, is exact (see
    `_exact_in_float32`) and says which, and where there is a tie. Beyond the range by one or more, a code's bound is all that
    matters.
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
def _dynamic(u, adc_ptr, read, L: tl.constexpr):
    """Value of a read in units of `u / 2^B`, ranges of the batch, smallest and largest u of each read."""
    u_a = tl.load(adc_ptr + read)
    span = tl.load(adc_ptr + (read + L.groups * L.arrays * L.digits * L.slices)) - u_a
    step = tl.maximum(span, 1).to(tl.float32) * (1.0 / (1 << L.adc_bits))  # span 0: q = 0, value u_a
    q = tl.minimum(divide((u - u_a).to(tl.float32), step) + MAGIC, MAGIC + ((1 << L.adc_bits) - 1))
    return (q.to(tl.int32, bitcast=True) - MAGIC_BITS).to(L.acc) * span.to(L.acc) + (u_a.to(L.acc) << L.adc_bits)


@triton.jit
def _count(u, own, out_ptr, adc_ptr, kind, L: tl.constexpr):
    """Count the reads by value, in one of several copies of the counts."""
    bins = tl.load(adc_ptr + 1)
    copy = tl.program_id(0) % tl.load(adc_ptr + 3)
    counts = out_ptr + (copy * (L.slices * L.digits * L.classes) + kind) * bins
    tl.atomic_add(counts + (bin_of(u, tl.load(adc_ptr + 2)) - tl.load(adc_ptr)), tl.full(u.shape, 1, tl.int64), mask=own, sem="relaxed")


@triton.jit
def _add_read(acc, a, m, m_high, levels, a_ptr, m_ptr, out_ptr, adc_ptr, weight_ptr, besides, first_image, seed, corner, column, row, depth,
              in_width, pixel, size, channel, own, group, k, t, z, L: tl.constexpr, R: tl.constexpr, MODE: tl.constexpr):
    """Make a read of digit z and do with it what MODE says. Returns: acc and what the read adds to it."""
    kind = kind_of(a, a_ptr, corner, row, depth, in_width, k, t, z, L)
    weight = tl.load(weight_ptr + kind)
    if not L.planned or has_bits(weight, L):
        u = _read(a, m, m_high, levels, z, L)
        for b in range(1, L.blocks):  # arrays of more than block_k rows
            a_b, m_b, m_high_b, levels_b = load(a_ptr, m_ptr, corner, column, row + b * L.block_k, depth + b * L.block_k, in_width, L)
            u += _read(a_b, m_b, m_high_b, levels_b, z, L)
        if R is not None:
            u = read_out(u, besides, first_image, seed, a, a_ptr, corner, row, in_width, pixel, size, channel, group, k, t, z, L, R)

        read = ((group * L.arrays + t) * L.digits + z) * L.slices + k
        if MODE == "sum":
            acc += u.to(L.acc)
        elif MODE == "as read":
            acc += u.to(L.acc) * weight
        elif MODE == "static":
            acc += _static(u, adc_ptr, kind).to(L.acc) * weight
        elif MODE == "exact":
            acc += exact_code(u, adc_ptr, kind).to(L.acc) * weight
        elif MODE == "dynamic":
            acc += _dynamic(u, adc_ptr, read, L) * weight
        elif MODE == "range":
            widen(u, out_ptr, read, L)
        else:
            _count(u, own, out_ptr, adc_ptr, kind, L)
    return acc


@triton.jit(do_not_specialize=["first_image", "seed"])  # of which each value would be compiled for, if it were 1
def kernel(a_ptr, m_ptr, out_ptr, adc_ptr, first_ptr, weight_ptr, pixels, height, width, in_height, in_width, besides, first_image, seed,
           L: tl.constexpr, R: tl.constexpr, MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """See the module. L, the layer's `triton_gpu.Constants`. Shapes are those of `triton_ideal.kernel`, but for the ADC:

    adc, `(1 / D, D, q_min, q_max)` `[kinds, 4]`, float32 for "static" and float64 for "exact", the ranges for "dynamic",
    `(*Bins, copies)` int64 for "histogram". Ranges are int64 where reads are.
    """
    group = tl.program_id(2) % L.groups
    step = tl.program_id(2) // L.groups
    own_pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own_channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = (own_pixel < pixels)[:, None] & (own_channel < L.out)[None, :]
    pixel = tl.minimum(own_pixel, pixels - 1)  # beyond the last it is read again, and not kept
    channel = tl.minimum(own_channel, L.out - 1)
    corner = corner_of(pixel, group, height, width, in_height, in_width, L)
    depth = tl.arange(0, L.block_k)
    DIGITS: tl.constexpr = L.digits

    acc = tl.zeros((BLOCK_M, BLOCK_N), L.acc)
    for i in range(tl.load(first_ptr + step) * L.arrays, tl.load(first_ptr + step + 1) * L.arrays):
        k = i // L.arrays
        t = i % L.arrays
        row = t // tl.cdiv(L.span, L.rows) * L.span + t % tl.cdiv(L.span, L.rows) * L.rows + depth
        column = ((k * L.groups + group).to(tl.int64) * L.out + channel) * (L.arrays * L.blocks * L.block_k) + (
            t * (L.blocks * L.block_k))
        a, m, m_high, levels = load(a_ptr, m_ptr, corner, column, row, depth, in_width, L)
        if R is None:
            for z in tl.static_range(DIGITS):
                acc = _add_read(acc, a, m, m_high, levels, a_ptr, m_ptr, out_ptr, adc_ptr, weight_ptr, besides, first_image, seed, corner,
                                column, row, depth, in_width, pixel, height * width, channel, own, group, k, t, z, L, R, MODE)
        else:  # digits one after the other: all of them would need more registers than there are
            for z in range(DIGITS):
                acc = _add_read(acc, a, m, m_high, levels, a_ptr, m_ptr, out_ptr, adc_ptr, weight_ptr, besides, first_image, seed, corner,
                                column, row, depth, in_width, pixel, height * width, channel, own, group, k, t, z, L, R, MODE)

    if MODE != "range" and MODE != "histogram":
        out = (step.to(tl.int64) * pixels + own_pixel) * (L.groups * L.out) + group * L.out
        tl.store(out_ptr + (out[:, None] + own_channel[None, :]), acc, mask=own)


def whole_weights(layer: MappedLayer) -> torch.Tensor:
    """What a row adds to the sum over all slices without an ADC: int64 `[1, groups, rows, out / groups]`."""
    return sum(part.long() << layer.spec.cell_bits * k for k, part in enumerate(layer.cells.weights(analog=True)))[None]


def conversion(layer: MappedLayer) -> tuple[str, torch.Tensor | None]:
    """How the kernel converts the reads of `layer`: `(mode, what it needs of each slice, digit and class or None)`."""
    spec = layer.spec
    if spec.adc_range == "ideal":
        return "sum" if layer.readout is None else "as read", None
    if spec.adc_range == "dynamic":
        return "dynamic", None
    static = np.all(of_kinds(layer, _is_static))
    return "static" if static else "exact", torch.tensor(of_kinds(layer, exact_numbers), dtype=torch.float32 if static else torch.float64)


def _is_static(layer, z, k, j):
    """Whether float32 gives the codes of digit `z`, slice `k` and class `j`; reads of 0 bits have none."""
    converter = layer.converter(z, k, j)
    return not converter.bits or _exact_in_float32(converter.delta / layer.unit, read_range(layer, k))


def _exact_in_float32(step, u_range):
    """Whether `u - q D` is exact in float32 for every u of the range and the codes q beside u / D.

    D is a multiple of 1/g, g a power of two, and so are u, q D and what is left. All of them are below the largest |u| + 2 D, so they
    are floats if that is at most 2^24 / g. Steps that are multiples of 1/64 of a level are wholes here on the grid of 1/256.
    """
    grain = step.as_integer_ratio()[1]
    return (max(-u_range[0], u_range[1]) + 2 * step) * grain <= 2**24


def constants(common: Constants, layer: MappedLayer, mode: str, dtype: torch.dtype,
              conversion: torch.Tensor) -> tuple[Constants, torch.Tensor]:
    """(constants of the kernel, what its ADC needs): from those that all layers have, bins and copies moved to the latter."""
    low, high = layer.u_span
    wide = dtype == torch.int64 if mode == "sum" else high - low >= 2**31  # "dynamic" takes the smallest from each
    if mode == "histogram":
        conversion = torch.tensor([*layer.bins, common.copies])
    return replace(common, wide=wide, first_bin=0, bins=0, bin_shift=0, copies=0), conversion


def tiling(mode: str, pixels: int, channels: int, programs: int, L: Constants) -> tuple[int, int, dict]:
    """Tile `(pixels, channels)` of one program and the launch options; arguments as `triton_ideal.tiling`.

    The largest that need no more registers than there are: float64, and the division of "dynamic", take many. Passes that store no
    tile have their products unrolled, and with several stages in flight these would not fit the shared memory of smaller GPUs.
    """
    most = 64 if mode == "sum" or mode == "static" and L.blocks == 1 else 32
    block_n = min(most, max(16, triton.next_power_of_2(channels)))
    block_m = min(64, max(16, triton.next_power_of_2(pixels)))
    if triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_n) * programs < 2 * 132:
        block_n = min(block_n, 32)
    stages = 1 if mode in ("range", "histogram") else 2
    return block_m, block_n, dict(num_warps=4, num_stages=stages, enable_fp_fusion=False, sanitize_overflow=False)
