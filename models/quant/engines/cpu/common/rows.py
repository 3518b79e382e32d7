"""Which rows of an array are active: lists of the input bits that are one, for every pixel, input bit and channel interval.

An entry of a list is where the row's cells stand, counted from where those of the array begin. A list ends with `TURN`
entries of row 0, whose cells are all zero.
"""

from collections import namedtuple

import numpy as np

from ....kernels.inner import inlined, inner
from ....kernels.simd import (LANES, bit_length, bit_of_bytes, can_compress, int64_at, put_compressed, put_int64, put_uint32, splat, store,
                              trailing_zeros, uint8_at, uint32_at)
from .layout import BOUNDS, FIRST, INTERVAL, LAST, ROW, SEGMENT, SLOT, TAP_X, TAP_Y

COMPRESS = can_compress()

# One input image: its size, and of how many of its rows the lists are kept, each in place of the one so many rows above it.
Source = namedtuple("Source", "height width kept")


@inner
def rows_to_keep(shape, lines=1):
    """Input rows that so many output rows need, or a few more: a power of two, so that a remainder is a bit mask."""
    return 1 << bit_length(shape.reach_y + (lines - 1) * shape.stride_y - 1)


@inlined
def list_rows_under(shape, at, source, codes, y, listed):
    """Lists of the input rows that output row `y` needs and that are not `listed`, the rows before that one; returns the row
    behind the last. The codes of the image and group begin at address `codes`."""
    top = y * shape.stride_y - shape.pad_top
    end = max(listed, min(source.height, top + shape.reach_y))
    for row in range(max(listed, top), end):
        start = row * source.width * shape.groups * shape.channels
        _list_row(shape, at, codes + start, source.width, row & (source.kept - 1))
    return end


@inner
def _list_row(shape, at, codes, width, row):
    """Lists of one input row, whose codes of one group begin at address `codes`, to place `row`. For each pixel, input bit and
    channel interval: where the active rows stand in the weights (row + 1 rows behind the array's base), and how many they
    are."""
    row_size = shape.blocks * LANES
    for x in range(width):
        pixel = codes + x * shape.groups * shape.channels
        for i in range(shape.input_bits):
            which = (row * width + x) * shape.input_bits + i
            for v in range(at.n_intervals):
                c, last = int64_at(at.intervals, BOUNDS * v + FIRST), int64_at(at.intervals, BOUNDS * v + LAST)
                begin = end = which * shape.slots + int64_at(at.intervals, BOUNDS * v + SLOT)
                offset = row_size * (1 - c)
                while c + LANES <= last:
                    end += _put_rows(at, end, bit_of_bytes(pixel, c, i), c * row_size + offset, row_size)
                    c += LANES
                while c < last:
                    if uint8_at(pixel, c) >> i & 1:
                        put_uint32(at.lists, end, c * row_size + offset)
                        end += 1
                    c += 1
                _end_list(at, end)
                put_int64(at.ones, which * at.n_intervals + v, end - begin)


@inlined
def _put_rows(at, end, bits, first, row_size):
    """List the rows whose bits are set of 32 rows from `first` on; returns how many they are."""
    if COMPRESS:
        return put_compressed(at.lists, end, bits, first, row_size)
    n = 0
    while bits:
        put_uint32(at.lists, end + n, first + trailing_zeros(bits) * row_size)
        n += 1
        bits &= bits - np.uint32(1)
    return n


@inlined
def _end_list(at, end):
    """Row 0, all zero, up to a multiple of `TURN` entries: one vector holds as many."""
    store(at.lists, 2 * end, splat(0))


@inlined
def active_rows(shape, at, source, t, y, x, spare, row_at, row_count):
    """For each input bit: where the list of active rows of array `t` under output pixel (y, x) begins, to the int64 at
    address `row_at`, and its length, to those at `row_count`.

    An array of one segment uses the pixel's list as it is; the lists of several are joined behind all others, in place `spare`.
    """
    begin, end = int64_at(at.segment_start, t), int64_at(at.segment_start, t + 1)
    several = end - begin > 1
    behind = (source.kept * source.width + spare) * shape.input_bits * shape.slots
    for i in range(shape.input_bits):
        put_int64(row_count, i, 0)
        if several:
            put_int64(row_at, i, behind + i * shape.slots)
    for s in range(begin, end):
        segment = at.segments + 8 * SEGMENT * s
        iy = y * shape.stride_y - shape.pad_top + int64_at(segment, TAP_Y)
        ix = x * shape.stride_x - shape.pad_left + int64_at(segment, TAP_X)
        if iy < 0 or iy >= source.height or ix < 0 or ix >= source.width:
            continue  # padding: no row is active
        pixel = ((iy & (source.kept - 1)) * source.width + ix) * shape.input_bits
        if several:
            _join_lists(shape, at, pixel, int64_at(segment, INTERVAL), int64_at(segment, ROW) * shape.blocks * LANES, row_at, row_count)
        else:
            _use_lists(shape, at, pixel, int64_at(segment, INTERVAL), row_at, row_count)
    if several:
        for i in range(shape.input_bits):
            _end_list(at, int64_at(row_at, i) + int64_at(row_count, i))


@inlined
def _use_lists(shape, at, pixel, interval, row_at, row_count):
    """The lists of one interval of a pixel (of its first input bit) as those of the array."""
    slot = int64_at(at.intervals, BOUNDS * interval + SLOT)
    for i in range(shape.input_bits):
        put_int64(row_at, i, (pixel + i) * shape.slots + slot)
        put_int64(row_count, i, int64_at(at.ones, (pixel + i) * at.n_intervals + interval))


@inlined
def _join_lists(shape, at, pixel, interval, offset, row_at, row_count):
    """The lists of one interval of a pixel to the end of those of the array, where its rows stand `offset` further."""
    slot = int64_at(at.intervals, BOUNDS * interval + SLOT)
    for i in range(shape.input_bits):
        source, n = (pixel + i) * shape.slots + slot, int64_at(at.ones, (pixel + i) * at.n_intervals + interval)
        target = int64_at(row_at, i) + int64_at(row_count, i)
        for j in range(n):
            put_uint32(at.lists, target + j, uint32_at(at.lists, source + j) + offset)
        put_int64(row_count, i, int64_at(row_count, i) + n)


@inlined
def drive(shape, at, x, first, end, sign):
    """Add a digit, input bits `first` to `end` of pixel x, to what drives each row, or take it away again."""
    for bit in range(first, end):
        r = int64_at(at.pixel_row_at, x * shape.input_bits + bit)
        for i in range(r, r + int64_at(at.pixel_row_count, x * shape.input_bits + bit)):
            row = uint32_at(at.lists, i) >> shape.tile_bits
            put_int64(at.drive, row, int64_at(at.drive, row) + (sign << (bit - first)))
