"""What becomes of the sums of cells on the way to their converters: noise, curves of loaded bit lines, converters that are not alike."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import njit

from .simd import LANES, float64_at, int32_at, int64_at, put_int64, put_uint64, uint32_at, uint64_at
from .wide import added, load_ints
from .wide_noise import UNIT, converted_by, curved, noise, noise_of_one_variance, read_key

NOISY, CURVED, CHANGED = 8, 16, 32  # added to an operation of `buffers`: what reads have besides; each sum is compiled by itself

# The reads of 64 columns at one output pixel, a digit each. array, that of all groups; column, the first of 64 in its group; x, the
# pixel in its strip; sums, where u of the first digit stands in `at.sums`.
Place = namedtuple("Place", "group t array k column x sums")


@njit(forceinline=True)
def read(shape, at, place, z, op):
    """u as the converters of 64 columns see it."""
    u = load_ints(at.sums, place.sums + z * shape.tile)
    columns = shape.slice_vectors * LANES
    if op & NOISY:
        low, high, at_zero, slope, reference = _noise_of_read(shape, at, place, z)
        keys = place.group * columns + place.column
        if slope == 0:
            deviation = np.sqrt(max(at_zero, np.float32(0))) * UNIT
            e = noise_of_one_variance(at.keys, keys, low, high, deviation)
        else:
            e = noise(u, at.keys, keys, low, high, at_zero, slope, reference)
    if op & CURVED:
        b0, b1, b2, start, taken = _curve_of_read(shape, at, place, z)
        u = curved(u, start, b0, b1, b2, taken)
    if op & NOISY:
        u = added(u, e)
    if op & CHANGED:
        converters = ((place.k * shape.groups + place.group) * shape.arrays + place.t) * columns + place.column
        u = converted_by(u, at.gains, at.offsets, converters)
    return u


@njit(forceinline=True)
def add_references(shape, at, group, t, k, count):
    """The sum of the reference cells in the active rows of each pixel and digit of one bit, to `pixel_reference`.
    (Of more bits no read needs it: `engine.unsupported`.)"""
    rows = int64_at(at.reference_base, t) + (k * shape.groups + group) * shape.reference_rows
    for x in range(count):
        for z in range(shape.digits):
            r, total = int64_at(at.pixel_row_at, x * shape.input_bits + z), 0
            for i in range(r, r + int64_at(at.pixel_row_count, x * shape.input_bits + z)):
                total += int32_at(at.reference, rows + (uint32_at(at.lists, i) >> shape.tile_bits))
            put_int64(at.pixel_reference, x * shape.digits + z, total)


@njit
def add_keys(shape, at, besides, strip, t, k):
    """The key of the noise of each pixel's and digit's read of array t and slice k, to `pixel_key`: all its columns use it."""
    for x in range(strip.count):
        image, pixel = (strip.start + x) // besides.pixels + besides.first_image, (strip.start + x) % besides.pixels
        for z in range(shape.digits):
            counter = ((pixel * shape.arrays + t) * shape.digits + z) * shape.slices + k
            put_uint64(at.pixel_key, x * shape.digits + z, read_key(at.seed, image, counter))


@njit
def add_squares(shape, at, count):
    """`sum a^2` over the rows of an array under each pixel, a being its digit there, to `pixel_squares`: from the lists of its bits,
    `sum over bits i of 2^i sum over rows of list i of a`."""
    for x in range(count):
        for z in range(shape.digits):
            first, end, total = int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1), 0
            if end - first == 1:
                total = int64_at(at.pixel_row_count, x * shape.input_bits + first)
            else:
                _drive(shape, at, x, first, end, 1)
                for bit in range(first, end):
                    r = int64_at(at.pixel_row_at, x * shape.input_bits + bit)
                    for i in range(r, r + int64_at(at.pixel_row_count, x * shape.input_bits + bit)):
                        total += int64_at(at.drive, uint32_at(at.lists, i) >> shape.tile_bits) << (bit - first)
                _drive(shape, at, x, first, end, -1)
            put_int64(at.pixel_squares, x * shape.digits + z, total)


@njit(forceinline=True)
def _drive(shape, at, x, first, end, sign):
    """Add a digit, input bits `first` to `end` of pixel x, to what drives each row, or take it away again."""
    for bit in range(first, end):
        r = int64_at(at.pixel_row_at, x * shape.input_bits + bit)
        for i in range(r, r + int64_at(at.pixel_row_count, x * shape.input_bits + bit)):
            row = uint32_at(at.lists, i) >> shape.tile_bits
            put_int64(at.drive, row, int64_at(at.drive, row) + (sign << (bit - first)))


@njit(forceinline=True)
def _noise_of_read(shape, at, place, z):
    """(the halves of its key, its variance as `at_zero + slope (2 u + reference)`) of a read."""
    at_read = place.x * shape.digits + z
    key = uint64_at(at.pixel_key, at_read)
    at_zero = np.float32(at.base + float64_at(at.noise, 3 * place.k) * int64_at(at.pixel_squares, at_read))
    slope = np.float32(float64_at(at.noise, 3 * place.k + 1))
    reference = int64_at(at.pixel_reference, at_read) * np.int64(float64_at(at.noise, 3 * place.k + 2))
    return np.int64(key & np.uint64(0xFFFFFFFF)), np.int64(key >> np.uint64(32)), at_zero, slope, reference


@njit(forceinline=True)
def _curve_of_read(shape, at, place, z):
    """(b_0, b_1, b_2, S, what is taken off) of the curve of a read, see `readout.Readout`."""
    b0, b1 = np.float32(float64_at(at.curve, 4 * place.k)), np.float32(float64_at(at.curve, 4 * place.k + 1))
    b2 = np.float32(float64_at(at.curve, 4 * place.k + 2))
    current = float64_at(at.curve, 4 * place.k + 3) * int64_at(at.pixel_row_count, place.x * shape.input_bits + z)
    if at.analog:
        start = np.float32(int64_at(at.pixel_reference, place.x * shape.digits + z) + current)
        return b0, b1, b2, start, start * (b0 + start * (b1 + start * b2))
    start = np.float32(current)
    return b0, b1, b2, start, start
