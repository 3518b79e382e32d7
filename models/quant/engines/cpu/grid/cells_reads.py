"""What becomes of the sums of cells on the way to their converters: noise, curves of loaded bit lines, converters that are not alike."""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from ....kernels.inner import inlined, inner
from ....kernels.simd import (LANES, bit_length, float32_at, float64_at, int32_at, int64_at, put_float32, put_int64, put_uint32, uint32_at)
from ..common.buffers import DYNAMIC, HISTOGRAM, RANGES
from ..common.rows import drive
from ..vectors.amx import TILE_ROWS
from ..vectors.wide import UNROLL, WIDE, added_quads, full_quad, load_ints, put_quad, with_quad
from ..vectors.wide_noise import (APART, IN_STEPS, ROUNDER, SHARING, STEP, between_curves, converted_by, curved, lifted, mixed, moved_by,
                                  put_currents, put_curves, put_keys, with_noise, with_noise_of_levels)
from .cells_forms import factor_of

# Operations beside those of `buffers`: STATIC where reads have nothing besides, so that nothing asks for it; by `cells_narrow`, with what
# reads have besides, and without; by `cells_compared`, in 32 bits and in 16; by `cells_trees`, of sums in 16 bits and in 32.
PLAIN, SHORT, NARROW, COMPARED, COMPARED_SHORT, COMPARED_TREES, COMPARED_WIDE_TREES = 5, 6, 7, 8, 9, 10, 11

# The reads of 64 columns at one output pixel, a digit each. array, that of all groups; column, the first of 64 in its group; x, the
# pixel in its strip; sums, where u of the first digit stands in `at.sums`.
Place = namedtuple("Place", "group t array k column x sums")

# What all columns of a read share, 32 bits each, `[field, pixel, digit]` of one array and slice: arguments of `curved` and `with_noise`.
# Vectors take them from memory: no instruction is spent on spreading a number over the lanes. Of pairs FIRST is `z sum a`.
FIRST, SECOND, RISE, LOW, HIGH, DEVIATION, LIFT = range(7)
SHARED = 7
UNLIKE = np.float32(-1)  # DEVIATION where each column has its own
TOGETHER = 4  # slices whose reference cells are added up at a time


@inlined
def moved(place, columns, x, sums):
    """So many columns further, at pixel x."""
    return Place(place.group, place.t, place.array, place.k, place.column + columns, x, sums)


@inlined
def kind_of(shape, at, x, z, k):
    """The kind of a read of pixel `x`, digit `z` and slice `k`, an entry of tables `[digit, slice, class]`."""
    n = np.int64(int32_at(at.pixel_inputs, x * shape.digits + z))
    return (z * shape.slices + k) * shape.classes + min(bit_length(n), shape.classes - 1)


@inlined
def adds_nothing(shape, at, x, z, k, op):
    """Whether a read need not be looked at: with fixed ranges one of 0 bits, or without a row that is on where nothing else counts."""
    if op == DYNAMIC or op == RANGES or op == HISTOGRAM:
        return False
    if at.idle_is_zero and int32_at(at.pixel_inputs, x * shape.digits + z) == 0:
        return True
    return factor_of(at.singles, kind_of(shape, at, x, z, k)) == 0


@inlined
def sums_of_cells(shape, at, place, z):
    """u of 64 columns before what reads have besides, ints."""
    return load_ints(at.sums, place.sums + z * shape.tile)


@inlined
def _other_sums(shape, at, place, z, part):
    """What `CellShape` has besides u, of 64 columns: sum 1 is B of pairs, see `readout.Readout`; behind the last stands that of a^2."""
    return load_ints(at.sums, place.sums + (part * TILE_ROWS + z) * shape.tile)


@inlined
def read(shape, at, place, z, op, u):
    """u as the converters of 64 columns see it, ints, whole floats, or raised ones. u, their `sums_of_cells`, ints or floats, or shorts."""
    columns, shared = shape.slice_vectors * LANES, at.pixel_shared + 4 * (place.x * shape.digits + z)
    if at.curved:
        b0, b1 = float32_at(at.curve, 3 * place.k), float32_at(at.curve, 3 * place.k + 1)
        b2, first = float32_at(at.curve, 3 * place.k + 2), float32_at(shared, FIRST * at.reads)
        if shape.sums > 1:
            seen = between_curves(u, _other_sums(shape, at, place, z, 1), first, b0, b1, b2)
        else:
            seen = curved(u, first, float32_at(shared, SECOND * at.reads), b2, float32_at(shared, RISE * at.reads))
    else:
        seen = lifted(u)
    if at.noisy:
        words = (place.group * columns + place.column) // SHARING * APART
        low, high = int32_at(shared, LOW * at.reads), int32_at(shared, HIGH * at.reads)
        deviation = float32_at(shared, DEVIATION * at.reads)
        if op == SHORT or deviation >= 0:
            seen = with_noise(seen, at.keys, words, low, high, deviation, float32_at(shared, LIFT * at.reads))
        else:
            slope, at_zero = np.float32(float64_at(at.noise, 3 * place.k + 1)), _variance_at_zero(shape, at, place.x, z, place.k)
            squares = at.pixel_reference + 4 * (shape.squared * shape.reference_slices + place.k) * at.reads
            reference = int32_at(squares, place.x * shape.digits + z) * np.int64(float64_at(at.noise, 3 * place.k + 2))
            sums = _other_sums(shape, at, place, z, shape.sums - 1 + shape.squared)  # of pairs the reference is 0
            seen = with_noise_of_levels(seen, sums, at.keys, words, low, high, at_zero, slope, reference)
    if at.gained:
        seen = converted_by(seen, at.gains, at.offsets, _converters(shape, place))
    elif at.moved:
        seen = moved_by(seen, at.offsets, _converters(shape, place))
    return seen


@inlined
def with_offsets(shape, at, place, u):
    """Shorts as the converters of 64 columns see them, whose offsets are all that reads have besides."""
    return moved_by(u, at.offsets, _converters(shape, place)) if at.moved else u


@inlined
def _converters(shape, place):
    """The first of the converters of 64 columns."""
    return ((place.k * shape.groups + place.group) * shape.arrays + place.t) * shape.slice_vectors * LANES + place.column


@inner
def add_references(shape, at, group, t, count):
    """The sums of the reference cells of all slices in the active rows of each pixel and digit, `sum a R`, to `pixel_reference`, and
    behind those of all slices `sum a^2 R` where that is needed."""
    slices = shape.reference_slices
    rows = at.reference + 4 * slices * (int64_at(at.reference_base, t) + group * shape.reference_rows)
    for x in range(count):
        for z in range(shape.digits):
            first, end, read = int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1), x * shape.digits + z
            for k in range(0, slices, TOGETHER):
                total = full_quad(0)
                for bit in range(end - 1, first - 1, -1):
                    total = added_quads(total, total)
                    r = int64_at(at.pixel_row_at, x * shape.input_bits + bit)
                    stop = r + int64_at(at.pixel_row_count, x * shape.input_bits + bit)
                    while r < stop:  # beyond the end of a list stand rows of zeros
                        for i in range(UNROLL):
                            total = with_quad(total, rows + 4 * k, uint32_at(at.lists, r + i) >> shape.reference_shift)
                        r += UNROLL
                put_quad(at.pixel_reference, k * at.reads + read, at.reads, total)
            if shape.squared:
                drive(shape, at, x, first, end, 1)
                for k in range(shape.slices):
                    total = 0
                    for bit in range(first, end):
                        r = int64_at(at.pixel_row_at, x * shape.input_bits + bit)
                        for i in range(r, r + int64_at(at.pixel_row_count, x * shape.input_bits + bit)):
                            row = uint32_at(at.lists, i)
                            driven = int64_at(at.drive, row >> shape.tile_bits) << (bit - first)
                            total += driven * int32_at(rows, (row >> shape.reference_shift) + k)
                    put_uint32(at.pixel_reference, (slices + k) * at.reads + read, total)
                drive(shape, at, x, first, end, -1)


@inner
def add_inputs(shape, at, count):
    """The sum of the digits under each pixel, `sum a`, to `pixel_inputs`."""
    for x in range(count):
        for z in range(shape.digits):
            first, total = int64_at(at.digit_start, z), 0
            for bit in range(first, int64_at(at.digit_start, z + 1)):
                total += int64_at(at.pixel_row_count, x * shape.input_bits + bit) << (bit - first)
            put_uint32(at.pixel_inputs, x * shape.digits + z, total)


@inner
def add_curves(shape, at, k, count):
    """The curve of each pixel's and digit's read of slice k, see `readout.curve_at`, to `pixel_shared`."""
    b0, b1, b2 = float32_at(at.curve, 3 * k), float32_at(at.curve, 3 * k + 1), float32_at(at.curve, 3 * k + 2)
    row, current = 4 * at.reads, float64_at(at.current, k)
    for read in range(0, 4 * count * shape.digits, 4 * WIDE):
        inputs, shared = at.pixel_inputs + read, at.pixel_shared + read
        if shape.sums > 1:
            put_currents(inputs, current, shared + FIRST * row)
        else:
            put_curves(inputs, at.pixel_reference + k * row + read, current, b0, b1, b2, at.analog, at.rounder,
                       shared + FIRST * row, shared + SECOND * row, shared + RISE * row)


@inner
def number_reads(shape, at, besides, strip):
    """What the noise of each pixel's and digit's reads follows from, to `read_keys`: the key of the image, and the number of the first of
    these reads, of array 0 and slice 0."""
    image, pixel = strip.start // besides.pixels + besides.first_image, strip.start % besides.pixels
    image_key = mixed(at.seed, image)
    for x in range(strip.count):
        if pixel == besides.pixels:
            image, pixel = image + 1, 0
            image_key = mixed(at.seed, image)
        for z in range(shape.digits):
            read = x * shape.digits + z
            put_int64(at.read_keys, read, np.int64(image_key))
            put_int64(at.read_keys, at.reads + read, (pixel * shape.arrays * shape.digits + z) * shape.slices)
        pixel += 1


@inner
def add_noise(shape, at, count, t, k, op):
    """The key of the noise of each pixel's and digit's read of array t and slice k, and its deviation, to `pixel_shared`."""
    row, alike = 4 * at.reads, float64_at(at.noise, 3 * k + 1) == 0
    for read in range(0, count * shape.digits, WIDE):
        keys, shared = at.read_keys + 8 * read, at.pixel_shared + 4 * read
        put_keys(keys, keys + 8 * at.reads, t * shape.digits * shape.slices + k, shared + LOW * row, shared + HIGH * row)
    for x in range(count):
        for z in range(shape.digits):
            if adds_nothing(shape, at, x, z, k, op):
                continue
            deviation = UNLIKE
            if alike:
                root = np.sqrt(max(_variance_at_zero(shape, at, x, z, k), np.float32(0)))
                deviation = np.float32(np.rint(root * IN_STEPS)) * STEP
            shared = at.pixel_shared + 4 * (x * shape.digits + z)
            put_float32(shared, DEVIATION * at.reads, deviation)
            put_float32(shared, LIFT * at.reads, ROUNDER - ROUNDER * deviation)


@inlined
def _variance_at_zero(shape, at, x, z, k):
    """That of a read of pixel x and digit z whose cells have no current."""
    base = float64_at(at.base, kind_of(shape, at, x, z, k))
    return np.float32(base + float64_at(at.noise, 3 * k) * int64_at(at.pixel_squares, x * shape.digits + z))


@inner
def add_squares(shape, at, count):
    """`sum a^2` over the rows of an array under each pixel, a being its digit there, to `pixel_squares`: from the lists of its bits,
    `sum over bits i of 2^i sum over rows of list i of a`."""
    for x in range(count):
        for z in range(shape.digits):
            first, end, total = int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1), 0
            if end - first == 1:
                total = int64_at(at.pixel_row_count, x * shape.input_bits + first)
            else:
                drive(shape, at, x, first, end, 1)
                for bit in range(first, end):
                    r = int64_at(at.pixel_row_at, x * shape.input_bits + bit)
                    for i in range(r, r + int64_at(at.pixel_row_count, x * shape.input_bits + bit)):
                        total += int64_at(at.drive, uint32_at(at.lists, i) >> shape.tile_bits) << (bit - first)
                drive(shape, at, x, first, end, -1)
            put_int64(at.pixel_squares, x * shape.digits + z, total)
