"""What becomes of the sums of cells on the way to their converters: noise, curves of loaded bit lines, converters that are not alike."""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from .amx import TILE_ROWS
from .inner import inlined, inner
from .rows import drive
from .simd import LANES, float32_at, float64_at, int32_at, int64_at, put_float32, put_int64, put_uint32, uint32_at
from .wide import added_quads, full_quad, load_ints, put_quad, with_quad
from .wide_noise import (APART, IN_STEPS, ROUNDER, SHARING, STEP, between_curves, converted_by, curved, mixed, moved_high, with_noise,
                         with_noise_of_levels)

# Operations beside those of `buffers`: STATIC where reads have nothing besides, so that nothing asks for it, and where 16 bits hold the
# sums of cells, which are made and used in registers.
PLAIN, SHORT = 5, 6

# The reads of 64 columns at one output pixel, a digit each. array, that of all groups; column, the first of 64 in its group; x, the
# pixel in its strip; sums, where u of the first digit stands in `at.sums`.
Place = namedtuple("Place", "group t array k column x sums")

# What all columns of a read share, 32 bits each, `[pixel, digit, field]` of one array and slice: arguments of `curved` and `with_noise`.
# Vectors take them from memory: no instruction is spent on spreading a number over the lanes. Of pairs FIRST is `z sum a`.
FIRST, SECOND, THIRD, RISE, LOW, HIGH, DEVIATION, LIFT = range(8)
SHARED = 8
UNLIKE = np.float32(-1)  # DEVIATION where each column has its own
TOGETHER = 4  # slices whose reference cells are added up at a time


@inlined
def is_idle(shape, at, x, z):
    """Whether a read of digit `z` of pixel `x` is 0 in all columns: no row is on, and nothing else counts."""
    if not at.idle_is_zero:
        return False
    for i in range(int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1)):
        if int64_at(at.pixel_row_count, x * shape.input_bits + i):
            return False
    return True


@inlined
def sums_of_cells(shape, at, place, z):
    """u of 64 columns before what reads have besides, ints."""
    return load_ints(at.sums, place.sums + z * shape.tile)


@inlined
def _other_sums(shape, at, place, z, part):
    """What `Shape` has besides u, of 64 columns: sum 1 is B of pairs, see `readout.Readout`; behind the last stands that of a^2."""
    return load_ints(at.sums, place.sums + (part * TILE_ROWS + z) * shape.tile)


@inlined
def read(shape, at, place, z, op, u):
    """u, ints or whole floats, as the converters of 64 columns see it; u, their `sums_of_cells` as either."""
    if op == PLAIN:
        return u
    columns, at_read = shape.slice_vectors * LANES, place.x * shape.digits + z
    shared = at.pixel_shared + 4 * SHARED * at_read
    if at.curved:
        if shape.sums > 1:
            b0, b1 = float64_at(at.curve, 4 * place.k), float64_at(at.curve, 4 * place.k + 1)
            b2, both = float64_at(at.curve, 4 * place.k + 2), _other_sums(shape, at, place, z, 1)
            u = between_curves(u, both, float32_at(shared, FIRST), np.float32(b0), np.float32(b1), np.float32(b2))
        else:
            u = curved(u, float32_at(shared, FIRST), float32_at(shared, SECOND), float32_at(shared, THIRD), float32_at(shared, RISE))
    if at.noisy:
        words = (place.group * columns + place.column) // SHARING * APART
        low, high, deviation = int32_at(shared, LOW), int32_at(shared, HIGH), float32_at(shared, DEVIATION)
        if op == SHORT or deviation >= 0:
            u = with_noise(u, at.keys, words, low, high, deviation, float32_at(shared, LIFT))
        else:
            slope, at_zero = np.float32(float64_at(at.noise, 3 * place.k + 1)), _variance_at_zero(shape, at, place.x, z, place.k)
            squares = _reference_place(shape, place.x, z) + shape.squared * shape.reference_slices + place.k
            reference = int64_at(at.pixel_reference, squares) * np.int64(float64_at(at.noise, 3 * place.k + 2))
            sums = _other_sums(shape, at, place, z, shape.sums - 1 + shape.squared)  # of pairs the reference is 0
            u = with_noise_of_levels(u, sums, at.keys, words, low, high, at_zero, slope, reference)
    if at.changed:
        converters = ((place.k * shape.groups + place.group) * shape.arrays + place.t) * columns + place.column
        u = converted_by(u, at.gains, at.offsets, converters)
    return u


@inner
def add_references(shape, at, group, t, count):
    """The sums of the reference cells of all slices in the active rows of each pixel and digit, `sum a R`, to `pixel_reference`, and
    behind those of a read `sum a^2 R` where that is needed."""
    slices = shape.reference_slices
    rows = at.reference + 4 * slices * (int64_at(at.reference_base, t) + group * shape.reference_rows)
    for x in range(count):
        for z in range(shape.digits):
            first, end, place = int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1), _reference_place(shape, x, z)
            for k in range(0, slices, TOGETHER):
                total = full_quad(0)
                for bit in range(end - 1, first - 1, -1):
                    total = added_quads(total, total)
                    r = int64_at(at.pixel_row_at, x * shape.input_bits + bit)
                    for i in range(r, r + int64_at(at.pixel_row_count, x * shape.input_bits + bit)):
                        row = np.int64(uint32_at(at.lists, i) >> shape.tile_bits)
                        total = with_quad(total, rows, slices * row + k)
                put_quad(at.pixel_reference, place + k, total)
            if shape.squared:
                drive(shape, at, x, first, end, 1)
                for k in range(shape.slices):
                    total = 0
                    for bit in range(first, end):
                        r = int64_at(at.pixel_row_at, x * shape.input_bits + bit)
                        for i in range(r, r + int64_at(at.pixel_row_count, x * shape.input_bits + bit)):
                            row = np.int64(uint32_at(at.lists, i) >> shape.tile_bits)
                            total += (int64_at(at.drive, row) << (bit - first)) * int32_at(rows, slices * row + k)
                    put_int64(at.pixel_reference, place + slices + k, total)
                drive(shape, at, x, first, end, -1)


@inlined
def _reference_place(shape, x, z):
    return (x * shape.digits + z) * shape.reference_slices * (1 + shape.squared)


@inner
def add_curves(shape, at, k, count):
    """The curve of each pixel's and digit's read of slice k, see `readout.curve_at`, to `pixel_shared`."""
    b0, b1 = np.float32(float64_at(at.curve, 4 * k)), np.float32(float64_at(at.curve, 4 * k + 1))
    b2, current = np.float32(float64_at(at.curve, 4 * k + 2)), float64_at(at.curve, 4 * k + 3)
    for x in range(count):
        for z in range(shape.digits):
            first, total = int64_at(at.digit_start, z), 0
            for bit in range(first, int64_at(at.digit_start, z + 1)):
                total += int64_at(at.pixel_row_count, x * shape.input_bits + bit) << (bit - first)
            total = current * total
            shared = at.pixel_shared + 4 * SHARED * (x * shape.digits + z)
            if shape.sums > 1:
                put_float32(shared, FIRST, np.float32(total))
                continue
            if at.analog:
                total += int64_at(at.pixel_reference, _reference_place(shape, x, z) + k)
            start = np.float32(total)
            bent = start * (np.float32(3) * b2)
            put_float32(shared, FIRST, b0 + start * (np.float32(2) * b1 + bent))
            put_float32(shared, SECOND, b1 + bent)
            put_float32(shared, THIRD, b2)
            rise = np.float32(0) if at.analog else start * (b0 + start * (b1 + start * b2)) - start
            put_float32(shared, RISE, ROUNDER + np.float32(np.rint(rise)))


@inner
def add_noise(shape, at, besides, strip, t, k):
    """The key of the noise of each pixel's and digit's read of array t and slice k, and its deviation, to `pixel_shared`."""
    image, pixel = strip.start // besides.pixels + besides.first_image, strip.start % besides.pixels
    image_key = mixed(at.seed, image)
    alike = float64_at(at.noise, 3 * k + 1) == 0
    for x in range(strip.count):
        if pixel == besides.pixels:
            image, pixel = image + 1, 0
            image_key = mixed(at.seed, image)
        for z in range(shape.digits):
            key = mixed(image_key, ((pixel * shape.arrays + t) * shape.digits + z) * shape.slices + k)
            deviation = UNLIKE
            if alike:
                root = np.sqrt(max(_variance_at_zero(shape, at, x, z, k), np.float32(0)))
                deviation = np.float32(np.rint(root * IN_STEPS)) * STEP
            shared = at.pixel_shared + 4 * SHARED * (x * shape.digits + z)
            put_uint32(shared, LOW, np.int64(key))
            put_uint32(shared, HIGH, np.int64(moved_high(key)))
            put_float32(shared, DEVIATION, deviation)
            put_float32(shared, LIFT, ROUNDER - ROUNDER * deviation)
        pixel += 1


@inlined
def _variance_at_zero(shape, at, x, z, k):
    """That of a read of pixel x and digit z whose cells have no current."""
    return np.float32(at.base + float64_at(at.noise, 3 * k) * int64_at(at.pixel_squares, x * shape.digits + z))


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
