"""Sums of reads by rows: of 16-bit rows of cells, those that are on are added, 128 columns at a time."""

from __future__ import annotations

from ....kernels.inner import inlined
from ....kernels.simd import int64_at, uint32_at
from ..common.rows import drive
from ..vectors.wide import (UNROLL, WIDE, added, added_shorts, full_i16, full_i32, load_shorts, shifted_up, store_ints, times,
                            widened_pairs)
from .cells_reads import adds_nothing


@inlined
def add_rows(shape, at, weights, k, first, end, sums, op):
    """The sums of the two vectors of a tile of slice `k`, whose cells are at `weights`, of the reads of output pixels `first` to `end`, to
    `sums`: of all, or with fixed ranges of those that add something."""
    for x in range(first, end):
        for z in range(shape.digits):
            if adds_nothing(shape, at, x, z, k, op):
                continue
            u0, u1 = _sum_rows(shape, at, weights, x, z)
            place = ((x - first) * shape.digits + z) * shape.tile
            store_ints(sums, place, u0)
            store_ints(sums, place + WIDE, u1)


@inlined
def _sum_rows(shape, at, weights, x, z):
    """Sums of 16 bits over as many rows as they hold, added in 32 bits."""
    u0 = u1 = full_i32(0)
    first_bit = int64_at(at.digit_start, z)
    for i in range(first_bit, int64_at(at.digit_start, z + 1)):
        r = int64_at(at.pixel_row_at, x * shape.input_bits + i)
        end = r + int64_at(at.pixel_row_count, x * shape.input_bits + i)
        while r < end:
            stop = min(end, r + shape.chunk)
            s0, s1 = _with_list(at, weights, full_i16(0), full_i16(0), r, stop)
            u0 = added(u0, shifted_up(widened_pairs(s0), i - first_bit))
            u1 = added(u1, shifted_up(widened_pairs(s1), i - first_bit))
            r = stop
    return u0, u1


@inlined
def sum_shorts(shape, at, weights, x, z, start):
    """u of the two vectors of a tile whose cells are at `weights`, and `start`, doubled for each bit of the digit but the first, modulo
    2^16: whatever sums pass on the way, it is right."""
    first, i = int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1) - 1
    u0 = u1 = full_i16(start)
    while True:
        r = int64_at(at.pixel_row_at, x * shape.input_bits + i)
        end = r + int64_at(at.pixel_row_count, x * shape.input_bits + i)
        u0, u1 = _with_list(at, weights, u0, u1, r, end)
        if i == first:
            return u0, u1
        u0, u1 = added_shorts(u0, u0), added_shorts(u1, u1)
        i -= 1


@inlined
def _with_list(at, weights, s0, s1, r, end):
    """Two vectors and the rows of a list from entry r to `end`. Beyond the end of a list stand rows of zeros; a part of one is a
    multiple of UNROLL."""
    while r < end:
        a, b = uint32_at(at.lists, r), uint32_at(at.lists, r + 1)
        c, d = uint32_at(at.lists, r + 2), uint32_at(at.lists, r + 3)
        s0 = _with_rows(s0, weights, a, b, c, d)
        s1 = _with_rows(s1, weights + 2 * WIDE, a, b, c, d)
        r += UNROLL
    return s0, s1


@inlined
def _with_rows(total, weights, a, b, c, d):
    """Sums of 64 columns, int16, and the cells of four rows more, which begin so many elements behind `weights`."""
    return added_shorts(total, added_shorts(added_shorts(load_shorts(weights, a), load_shorts(weights, b)),
                                            added_shorts(load_shorts(weights, c), load_shorts(weights, d))))


@inlined
def add_squared_rows(shape, at, weights, k, first, end, sums, op):
    """As `add_rows`, each row times the square of its digit: `sum over bits i of sum over rows of list i of (2^i a) X`, in 32 bits."""
    for x in range(first, end):
        for z in range(shape.digits):
            if adds_nothing(shape, at, x, z, k, op):
                continue
            first_bit, end_bit = int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1)
            u0 = u1 = full_i32(0)
            drive(shape, at, x, first_bit, end_bit, 1)
            for bit in range(first_bit, end_bit):
                r = int64_at(at.pixel_row_at, x * shape.input_bits + bit)
                for i in range(r, r + int64_at(at.pixel_row_count, x * shape.input_bits + bit)):
                    row = uint32_at(at.lists, i)
                    factor = int64_at(at.drive, row >> shape.tile_bits) << (bit - first_bit)
                    u0 = added(u0, times(widened_pairs(load_shorts(weights, row)), factor))
                    u1 = added(u1, times(widened_pairs(load_shorts(weights + 2 * WIDE, row)), factor))
            drive(shape, at, x, first_bit, end_bit, -1)
            place = ((x - first) * shape.digits + z) * shape.tile
            store_ints(sums, place, u0)
            store_ints(sums, place + WIDE, u1)
