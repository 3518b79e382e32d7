"""What reads have besides their cells (`readout.Readout`) in the Triton engine: curves of loaded bit lines, noise, converters that are
not alike.

The sums that they need beside u, of a, a^2 and of the reference cells under both, are int8 products with 16 columns more; where the
cells of each column count, those with their values, or with what both lines of a pair hold, are another product. What follows is
the arithmetic of `readout` in 32 bits, every float operation rounded once and only where `readout` rounds; the sum with MAGIC leaves the
nearest integer in the low bits, ties to even. `reach.too_far` says that float32 has room for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from ...arrays.mapping import MappedLayer
from ...arrays.readout import APART, COLUMN_KEY, DEVIATION, GOLDEN, MIX_1, MIX_2, MIX_3, MIX_4, NORMAL, SHARING, SIGNS, STEPS, signed
from .triton_tile import MAGIC, WIDE_MAGIC, codes_of_rows, dot, levels

_SHARING, _APART, _ENTRIES, _SUMMED = (tl.constexpr(n) for n in (SHARING, APART, len(NORMAL), len(SIGNS[0])))
_COLUMN_KEY, _MIX_1, _MIX_2 = (tl.constexpr(n) for n in (COLUMN_KEY, MIX_1, MIX_2))
_GOLDEN, _MIX_3, _MIX_4 = (tl.constexpr(n) for n in (GOLDEN, MIX_3, MIX_4))
_IN_STEPS, _STEP = tl.constexpr(float(np.float32(STEPS / DEVIATION))), tl.constexpr(1 / STEPS)
_NUMBERS = tl.constexpr(9)  # of a slice, see `Besides`
_SHARED = tl.constexpr(16)  # columns of the product that all columns share: 1 where a row stands, and the reference, digit by digit


@dataclass(frozen=True)
class Constants:
    """What the kernel is compiled for."""

    noisy: bool
    levels: bool  # whether the noise of cells depends on their values
    curved: bool
    changed: bool  # whether converters are not alike
    skips_idle: bool  # whether reads that no row is on for are 0
    analog: bool
    pair: bool  # whether lines of pairs are told apart
    parts: int  # int8 digits of the cells of the second product, 0 without one


class Besides:
    """What the kernel needs for the `Readout` of a layer.

    Args: order, the slices in the kernel's order; rows, which row stands at each position of the arrays, the one after the last empty.

    Attributes:
        constants: of the kernel.
        tables: float64 `[slices, 9]`: k, `base_noise`, `c_0 (1 + m)`, `c_1 / 2`, `2 m`, and `curve`; int32: `NORMAL`, then `SIGNS`;
            int8 `[slices, groups, 16, positions]`: 1 where a row stands, and the reference; int8 `[parts, slices, groups, out / groups,
            positions]`: cells of the second product; float64 and int32 `[slices, groups, arrays, out / groups]`: gain, offset.
    """

    def __init__(self, layer: MappedLayer, order: list[int], rows: torch.Tensor) -> None:
        readout, groups, arrays = layer.readout, layer.geometry.groups, len(layer.arrays)
        numbers = torch.zeros(len(order), _NUMBERS.value, dtype=torch.float64)
        for place, k in enumerate(order):
            c0, c1, m = readout.cell_noise[k] if readout.cell_noise else (0.0, 0.0, 0.0)
            curve = readout.curve[k] if readout.curve else (0.0,) * 4
            base = float(layer.base_noise[0, k, -1])
            numbers[place] = torch.tensor([k, base, c0 * (1 + m), np.float32(c1 / 2), 2 * m, *curve], dtype=torch.float64)
        reference = layer.cells.reference.cpu()[..., None]
        shared = torch.cat([levels(torch.ones_like(reference), order, rows), levels(reference, order, rows)])[:, :, :, 0]
        shared = F.pad(shared.permute(1, 2, 0, 3), (0, 0, 0, _SHARED.value - len(shared))).contiguous()
        cells = _second(layer)
        cells = torch.zeros(0, dtype=torch.int8) if cells is None else levels(cells.cpu(), order, rows)
        gain = torch.ones(len(order), groups, arrays, len(layer.w_codes) // groups, dtype=torch.float64)
        offset = torch.zeros(gain.shape, dtype=torch.int32)
        if readout.gain is not None:
            gain[:] = readout.gain.cpu()[order]
        if readout.offset is not None:
            offset[:] = readout.offset.cpu()[order]
        self.tables = numbers, torch.tensor(NORMAL + sum(SIGNS, ()), dtype=torch.int32), shared, cells, gain, offset
        self.seed = signed(readout.seed)
        self.constants = Constants(
            noisy=readout.noisy, levels=readout.depends_on_level, curved=readout.curve is not None,
            changed=readout.gain is not None or readout.offset is not None, analog=layer.spec.reference == "analog",
            skips_idle=layer.spec.skips_idle, pair=readout.needs_both, parts=len(cells))


def lacking(layer: MappedLayer) -> str | None:
    """Why the kernel cannot make the reads of a layer, or None."""
    noise = layer.readout is not None and layer.readout.circuits is not None and layer.readout.circuits.noise
    return "it has no comparator noise of plans, whose steps differ from digit to digit" if noise and layer.spec.planned else None


def tiling(pixels: int, channels: int) -> tuple[int, int, dict]:
    """As `triton_conversion.tiling`; on Hopper these need 181 to 205 registers of the 255 that there are."""
    block_m, block_n = (min(most, max(16, triton.next_power_of_2(n))) for most, n in ((64, pixels), (32, channels)))
    return block_m, block_n, dict(num_warps=8, num_stages=1, enable_fp_fusion=False, sanitize_overflow=False)


def _second(layer):
    """Cells whose sums reads need besides u: int32 `[slices, groups, rows, out / groups]`, or None: of digits of one bit and with one line
    a column, the sum of the values is u and the reference's."""
    readout = layer.readout
    if readout.needs_both:
        return readout.both
    return layer.cells.values if readout.depends_on_level and max(layer.spec.digit_bits) > 1 else None


@triton.jit
def read_out(u, besides, first_image, seed, a, a_ptr, corner, row, in_width, pixel, size, channel, group, k, t, z,
             L: tl.constexpr, R: tl.constexpr):
    """u, int32 `[pixels, channels]`, as the converters see it. Arguments are those of the kernel; size, output pixels of an image; a and
    row, codes and rows of the first block."""
    numbers_ptr, table_ptr, shared_ptr, cells_ptr, gain_ptr, offset_ptr = besides
    numbers = numbers_ptr + k * _NUMBERS
    sums, squares, both, both_squares = _sums(a, u, shared_ptr, cells_ptr, channel, group, k, t, 0, z, L, R)
    for b in range(1, L.blocks):
        a_b = codes_of_rows(a_ptr, corner, row + b * L.block_k, in_width, L)
        sums_b, squares_b, both_b, both_squares_b = _sums(a_b, u, shared_ptr, cells_ptr, channel, group, k, t, b, z, L, R)
        sums, squares, both, both_squares = sums + sums_b, squares + squares_b, both + both_b, both_squares + both_squares_b
    ones, reference = _of_rows(sums)
    ones_squares, reference_squares = _of_rows(squares)
    own = u
    if R.curved:
        u = _curved(u, numbers, ones, reference, both, R)
    if R.noisy:
        variance = (tl.load(numbers + 1) + tl.load(numbers + 2) * ones_squares.to(tl.float64)).to(tl.float32)[:, None]
        if R.levels:
            twice = 2 * both_squares
            if not R.pair:
                if R.parts == 0:  # of digits of one bit, whose squares they are
                    twice = 2 * own
                    if R.analog:
                        twice += 2 * reference[:, None]
                twice += tl.load(numbers + 4).to(tl.int32) * reference_squares[:, None]
            variance += tl.load(numbers + 3).to(tl.float32) * twice.to(tl.float32)
        image = pixel // size + first_image
        counter = ((pixel % size * L.arrays + t) * L.digits + z).to(tl.int64) * L.slices + tl.load(numbers).to(tl.int64)
        wide: tl.constexpr = tl.cdiv(L.out, _SHARING) * _SHARING
        u += _noise(variance, _read_key(seed, image, counter)[:, None], (group * wide + channel)[None, :], table_ptr)
    if R.changed:
        converter = ((k * L.groups + group) * L.arrays + t) * L.out + channel
        q = u.to(tl.float64) * tl.load(gain_ptr + converter)[None, :]
        u = (q + WIDE_MAGIC).to(tl.int64, bitcast=True).to(tl.int32) + tl.load(offset_ptr + converter)[None, :]
    if R.skips_idle:
        u = tl.where(ones[:, None] > 0, u, 0)
    return u


@triton.jit
def _sums(a, u, shared_ptr, cells_ptr, channel, group, k, t, b, z, L: tl.constexpr, R: tl.constexpr):
    """Over a block of rows the sums of a and a^2 with the shared columns, int32 `[pixels, 16]`, and with the cells of the second product,
    `[pixels, channels]`. What is not used is not computed."""
    MASK: tl.constexpr = (1 << L.dac_bits) - 1
    PARTS: tl.constexpr = R.parts
    positions: tl.constexpr = L.arrays * L.blocks * L.block_k
    position = ((t * L.blocks + b) * L.block_k + tl.arange(0, L.block_k))[:, None]
    a = a >> L.dac_bits * z
    layer = k * L.groups + group
    shared = tl.load(shared_ptr + ((layer * _SHARED + tl.arange(0, _SHARED)) * positions)[None, :] + position)
    both = u * 0
    both_squares = both
    for p in tl.static_range(PARTS):
        column = ((p * L.slices * L.groups + layer).to(tl.int64) * L.out + channel) * positions
        cells = tl.load(cells_ptr + (column[None, :] + position))
        if R.pair and R.curved:
            both += dot(a, cells, MASK) << 8 * p
        if R.levels:
            both_squares += _dot_of_squares(a, cells, MASK) << 8 * p
    return dot(a, shared, MASK), _dot_of_squares(a, shared, MASK), both, both_squares


@triton.jit
def _dot_of_squares(a, m, MASK: tl.constexpr):
    """`sum_rows (a & MASK)^2 m`. Codes whose squares 8 bits do not hold are two halves of 4 bits: `256 h h + 32 h l + l l`."""
    if MASK == 1:
        total = dot(a, m, MASK)
    elif MASK < 16:
        total = dot((a & MASK) * (a & MASK), m, 255)
    else:
        high, low = (a & MASK) >> 4, a & 15
        total = dot(high * high, m, 255) * 256 + dot(high * low, m, 255) * 32 + dot(low * low, m, 255)
    return total


@triton.jit
def _of_rows(sums):
    """What the shared columns have: those of where rows stand, and of the reference, int32 `[pixels]`."""
    column = tl.arange(0, _SHARED)[None, :]
    place = tl.where((column > 0) & (column < 4), 1, 0) << tl.maximum(tl.minimum(8 * (column - 1), 16), 0)
    return tl.sum(tl.where(column == 0, sums, 0), 1), tl.sum(sums * place, 1)


@triton.jit
def _curved(u, numbers, ones, reference, both, R: tl.constexpr):
    """`readout.curve_at` and the nearest integer to what it gives."""
    b0, b1, b2 = tl.load(numbers + 5).to(tl.float32), tl.load(numbers + 6).to(tl.float32), tl.load(numbers + 7).to(tl.float32)
    current = tl.load(numbers + 8) * ones.to(tl.float64)
    if R.pair:
        start = (both - u).to(tl.float32) * 0.5 + current.to(tl.float32)[:, None]
    else:
        if R.analog:
            current = reference.to(tl.float64) + current
        start = current.to(tl.float32)[:, None]
    bent = start * (b2 * 3)
    first, second = b0 + start * (b1 * 2 + bent), b1 + bent
    x = u.to(tl.float32)
    slope = tl.fma(x, tl.fma(x, tl.zeros_like(x) + b2, tl.zeros_like(x) + second), tl.zeros_like(x) + first)
    lift = tl.zeros_like(x) + MAGIC
    if not R.analog:
        lift = lift + (start * (b0 + start * (b1 + start * b2)) - start)
    return (tl.fma(x, slope, lift) - MAGIC).to(tl.int32)


@triton.jit
def _read_key(seed, image, counter):
    """`readout.read_key`, uint64."""
    key = _mix(image.to(tl.uint64) * _GOLDEN + seed.to(tl.uint64))
    return _mix(key + counter.to(tl.uint64) * _GOLDEN)


@triton.jit
def _mix(x):
    x = x + _GOLDEN
    x = (x ^ (x >> 30)) * _MIX_3
    x = (x ^ (x >> 27)) * _MIX_4
    return x ^ (x >> 31)


@triton.jit
def _noise(variance, key, column, table_ptr):
    """`readout.noise`, int32."""
    word = column // _SHARING * _APART + column % _APART
    x = word.to(tl.uint32) * _COLUMN_KEY + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * _MIX_1
    x = x ^ (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 13)) * _MIX_2
    x = x ^ (x >> 16)
    signs = table_ptr + (_ENTRIES + column % _SHARING // _APART * _SUMMED)
    total = tl.zeros_like(x).to(tl.int32)
    for i in tl.static_range(_SUMMED):
        total += tl.load(table_ptr + ((x >> (8 * i)) & (_ENTRIES - 1)).to(tl.int32)) * tl.load(signs + i)
    deviation = ((tl.sqrt_rn(tl.maximum(variance, 0.0)) * _IN_STEPS + MAGIC) - MAGIC) * _STEP
    normal = total.to(tl.float32)
    return (tl.fma(normal, tl.zeros_like(normal) + deviation, tl.zeros_like(normal) + MAGIC) - MAGIC).to(tl.int32)
