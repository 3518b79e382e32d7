"""The Triton kernel of ideal cells: an implicit matrix product over NHWC codes with the ADC in registers.

The kernel reads as the equations of `mapping.py`. With the *level* `m_k = 2 C_k - 2 r_k` of a cell (analog reference;
`C_k` for a digital one), known when the weights are, a read is one int8 dot product,

    u = 2 P - 2 r_k n = sum_rows a_z m_k        (u = P = sum_rows a_z C_k)

and needs no count n. A digit is not shifted down: `A & mask_z` is `2^(d z) a_z`, so the dot product gives
`U = 2^(d z) u`. One program makes a tile [pixels, output channels] of the accumulators of one group and one ADC step: for
each slice with that step and each array it loads a tile of codes and a tile of levels once, takes the digits in registers,
converts every read in registers and stores once. What is done with a read is the kernel's MODE:

    sum         acc += U                                   "ideal", and an ADC that changes no value of this layer
    static      acc += 2^(d z + c k) clip(rint(u s), ..)   in float32, where `prepare` proved it equal to `Converter.encode`
    table       acc += 2^(d z + c k) table[k, u]           otherwise, or
    range       smallest and largest U of each (array, digit, slice) of each group: first pass of "dynamic"
    dynamic     acc += 2^(c k) (q (U_b - U_a) + 2^B U_a)   second pass, see `engines`; U's factor is the read's 2^(d z)
    exact       acc += 2^(d z + c k) clip(rint(u / D), ..)  in float64, where the tables of all classes would have more than
                                                           `mapping.MAX_BINS` entries
    histogram   counts[k, z, bin of u] += 1

A plan by ones has converters for each class of n, the sum of a read's digits. Their numbers and tables, and counts, have an axis of
classes, and each pixel of a tile takes those of its own class: `triton_tile.kind_of`.

Rounding is `x + MAGIC` in float32: from 2^23 to 2^24 floats are the integers, so the addition rounds to the nearest,
ties to even, and the code stands in the low bits of the sum. The kernel adds these bits as they are, times the weight
of the read, and takes MAGIC's share off at the end; integers wrap, so the difference is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from ...arrays.mapping import MAX_BINS
from .triton_tile import (MAGIC, MAGIC_BITS, bin_of, classes_apart, corner_of, divide, dot, exact_code, exact_numbers, has_bits, kind_of,
                          load, of_kinds, widen)

if TYPE_CHECKING:
    from ...arrays.mapping import MappedLayer
    from .triton_constants import Constants


@triton.jit
def _read(a, m, m_high, z: tl.constexpr, L: tl.constexpr):
    """`U = 2^(d z) sum_rows a_z m` of a block of rows; levels that do not fit int8 come as `m + 16 m_high`."""
    MASK: tl.constexpr = ((1 << L.dac_bits) - 1 << L.dac_bits * z) & 255
    u = dot(a, m, MASK)
    if L.parts == 2:
        u += dot(a, m_high, MASK) * 16
    return u


# What becomes of a read U. Functions that convert one return (its code, what stands in the code's place where it is 0), both
# times the weight of the read: the difference is what counts.


@triton.jit
def _static(u, adc_ptr, weight, kind, z: tl.constexpr, L: tl.constexpr):
    """Fixed ranges in float32."""
    scale = tl.load(adc_ptr + 3 * kind) * (1.0 / (1 << L.dac_bits * z))
    q = tl.clamp(u.to(tl.float32) * scale + MAGIC, tl.load(adc_ptr + 3 * kind + 1), tl.load(adc_ptr + 3 * kind + 2))
    return q.to(tl.int32, bitcast=True) * weight, MAGIC_BITS * weight


@triton.jit
def _table(u, adc_ptr, weight, kind, z: tl.constexpr, L: tl.constexpr):
    """Fixed ranges, looked up."""
    return tl.load(adc_ptr + (kind * L.bins + (u >> L.dac_bits * z) - L.first_bin)) * weight


@triton.jit
def _dynamic(u, adc_ptr, weight, read, L: tl.constexpr):
    """Ranges of the batch, smallest and largest U of each read."""
    u_a = tl.load(adc_ptr + read)
    span = tl.load(adc_ptr + (read + L.groups * L.arrays * L.digits * L.slices)) - u_a
    step = tl.maximum(span, 1).to(tl.float32) * (1.0 / (1 << L.adc_bits))  # span 0: q = 0, value U_a
    q = tl.minimum(divide((u - u_a).to(tl.float32), step) + MAGIC, MAGIC + ((1 << L.adc_bits) - 1))
    surplus = (MAGIC_BITS * span.to(L.acc) - (u_a.to(L.acc) << L.adc_bits)) * weight
    return q.to(tl.int32, bitcast=True) * (span.to(L.acc) * weight), surplus


@triton.jit
def _count(u, own, out_ptr, kind, z: tl.constexpr, L: tl.constexpr):
    """Count the reads by value, in one of several copies of the counts."""
    copy = tl.program_id(0) % L.copies
    counts = out_ptr + (copy * (L.slices * L.digits * L.classes) + kind).to(tl.int64) * L.bins
    place = bin_of(u >> L.dac_bits * z, L.bin_shift) - L.first_bin
    tl.atomic_add(counts + place, tl.full(u.shape, 1, tl.int64), mask=own, sem="relaxed")


@triton.jit
def kernel(a_ptr, m_ptr, out_ptr, adc_ptr, first_ptr, weight_ptr, pixels, height, width, in_height, in_width,
            L: tl.constexpr, MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """See the module. L, the layer's `triton_gpu.Constants`. Shapes, with slices in the order of the accumulators:

    a uint8 `[N, in_height, in_width, groups * channels]`, padded; m int8 `[parts, slices, groups, out, arrays,
    blocks * block_k]`; out, accumulators `[steps, pixels, groups * out]`, ranges int32 `[2, groups, arrays, digits,
    slices]` or counts int64 `[copies, kinds, bins]`, kinds being `[slices, digits, classes]`; adc, `(s, MAGIC + q_min, MAGIC + q_max)`
    float32 `[kinds, 3]`, table int16 `[kinds, bins]`, `exact_numbers` float64 `[kinds, 4]` or the ranges; first slice of each step
    int32 `[steps + 1]`; weight of a code `[kinds]`, 0 for reads that are not converted: where a tile has no others, they are not made.
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
        for z in tl.static_range(DIGITS):
            kind = kind_of(a, a_ptr, corner, row, depth, in_width, k, t, z, L)
            weight = tl.load(weight_ptr + kind)
            if not L.planned or has_bits(weight, L):
                u = _read(a, m, m_high, z, L)
                for b in range(1, L.blocks):  # arrays of more than block_k rows
                    a_b, m_b, m_high_b, levels_b = load(a_ptr, m_ptr, corner, column, row + b * L.block_k, depth + b * L.block_k,
                                                         in_width, L)
                    u += _read(a_b, m_b, m_high_b, z, L)

                read = ((group * L.arrays + t) * L.digits + z) * L.slices + k
                if MODE == "sum":
                    acc += u
                elif MODE == "static":
                    q, zero = _static(u, adc_ptr, weight, kind, z, L)
                    acc += q
                    surplus += zero
                elif MODE == "table":
                    acc += _table(u, adc_ptr, weight, kind, z, L)
                elif MODE == "exact":
                    acc += exact_code(u >> L.dac_bits * z, adc_ptr, kind).to(L.acc) * weight
                elif MODE == "dynamic":
                    q, zero = _dynamic(u, adc_ptr, weight, read, L)
                    acc += q
                    surplus += zero
                elif MODE == "range":
                    widen(u, out_ptr, read, L)
                else:
                    _count(u, own, out_ptr, kind, z, L)

    if MODE != "range" and MODE != "histogram":
        out = (step.to(tl.int64) * pixels + own_pixel) * (L.groups * L.out) + group * L.out
        tl.store(out_ptr + (out[:, None] + own_channel[None, :]), acc - surplus, mask=own)


def levels(layer: MappedLayer, order: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Levels `m_k` of the slices in `order`, int8 `[parts, slices, groups, out / groups, arrays x blocks x block_k]`; empty rows
    have level 0. Levels that do not fit int8 make two parts.

    Args: rows, which row stands at each position, the one after the last being empty.
    """
    spec = layer.spec
    cells = layer.w_rows.transpose(1, 2).to(torch.int16)
    slices = [(cells >> spec.cell_bits * k) & (2 ** spec.slice_bits[k] - 1) for k in order]
    if spec.reference == "analog":
        slices = [2 * cell - layer.reference_twice[k] for k, cell in zip(order, slices)]
    m = F.pad(torch.stack(slices), (0, 1))  # the last row is the empty one
    m = m.index_select(-1, rows.to(m.device))
    fits = bool((m == m.to(torch.int8)).all())
    return torch.stack([m] if fits else [m & 15, m >> 4]).to(torch.int8)


def conversion(layer: MappedLayer) -> tuple[str, torch.Tensor | None]:
    """How the kernel converts the reads of `layer`: `(mode, what it needs of each slice, digit and class or None)`."""
    spec = layer.spec
    if spec.adc_range == "dynamic":
        return "dynamic", None
    if spec.adc_range == "ideal" or (not spec.planned and len(layer.delta_groups) == 1
                                     and all(_is_identity(layer, k) for k in range(len(spec.slice_bits)))):
        return "sum", None
    constants = of_kinds(layer, _float32_constants)
    if not any(None in of_digit for of_slice in constants for of_digit in of_slice):
        return "static", torch.tensor(constants, dtype=torch.float32)
    low, high = layer.u_span
    if (high - low + 1) * len(classes_apart(layer)) > MAX_BINS:
        return "exact", torch.tensor(of_kinds(layer, exact_numbers), dtype=torch.float64)
    return "table", torch.from_numpy(np.array(of_kinds(layer, _code_table)))


def _code_table(layer, z, k, j):
    """Codes of digit `z`, slice `k` and class `j` for each u of the layer, int16 `[u]`."""
    return layer.converter(z, k, j).table(*layer.u_span, layer.spec.unit).astype(np.int16)


def _is_identity(layer, k):
    """Whether slice `k`'s ADC gives q = u for every u that it can meet."""
    (low, high), converter = layer.u_range(k), layer.converter(0, k)
    if high - low >= 2**converter.bits:
        return False
    return np.array_equal(converter.table(low, high, layer.spec.unit), np.arange(low, high + 1))


def _float32_constants(layer, z, k, j=-1):
    """`(s, MAGIC + q_min, MAGIC + q_max)` with which the kernel's float32 arithmetic is `Converter.encode`; None without.

    It does not fall as u grows: see `Converter.around_steps`.
    """
    unit, converter = layer.spec.unit, layer.converter(z, k, j)
    u, codes = converter.around_steps(*layer.u_range(k, j), unit)
    magic, nearest = np.float32(MAGIC.value), np.float32(unit / converter.delta)
    bounds = magic + np.float32(converter.q_min), magic + np.float32(converter.q_max)
    for s in (nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf))):
        if np.array_equal(np.clip(u.astype(np.float32) * s + magic, *bounds) - magic, codes):
            return float(s), float(bounds[0]), float(bounds[1])
    return None


def tiling(mode: str, pixels: int, channels: int, programs: int, L: Constants) -> tuple[int, int, dict]:
    """Tile `(pixels, channels)` of one program and the launch options.

    On an H100 a tile of 128 x 64 on 8 warps takes 128 registers a thread, so 16 warps share a multiprocessor and
    convert while others multiply. The division of "dynamic" and the numbers of several classes need more registers, a lookup
    goes through shared memory, and so do the codes of several blocks: smaller tiles. Tiles also shrink where they would not fill
    the GPU's 132 multiprocessors twice.

    Args: pixels and channels of one group; programs, groups times ADC steps; L, the layer's constants.
    """
    block_n = min(64, max(16, triton.next_power_of_2(channels)))
    large = mode in ("sum", "static", "range") and L.blocks == L.classes == 1
    block_m = min(128 if large else 64, max(16, triton.next_power_of_2(pixels)))
    for smaller in ((min(block_m, 64), block_n), (min(block_m, 64), min(block_n, 32))):
        if triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_n) * programs < 2 * 132:
            block_m, block_n = smaller
    options = dict(num_warps=8 if block_m == 128 else 4, num_stages=3 if L.blocks == 1 else 2,
                   enable_fp_fusion=False, sanitize_overflow=False)
    if L.acc == tl.int32:
        options["maxnreg"] = 128 if block_m == 128 else 168
    return block_m, block_n, options
