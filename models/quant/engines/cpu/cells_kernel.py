"""The loop over a layer whose cells lie on a grid: sums of 16-bit rows over the active rows only, tile by tile.

Threads take images or bands of rows. For an output row: arrays, slices, tiles of columns, pixels, digits. The cells of one array
and tile stay in the first-level cache while the pixels pass; a read is converted in registers, the codes of all digits of a pixel
are added there too, and what is stored is their sum.
"""

from __future__ import annotations

import functools
from collections import namedtuple

import numba
import numpy as np
import torch
from numba import literally, njit, prange

from .buffers import DYNAMIC, HISTOGRAM, RANGES, STATIC
from .cache import SOURCES
from .cells_plan import DELTA, FACTOR, FORM, HIGHEST, LOWEST, SCALE, TILE, UNIT, UNROLL, Besides, Forms, Plan, Shape
from .finish import Pixel, finish_pixel
from .output import NOT_TO_CODES, ToCodes
from .rows import Source, active_rows, list_rows_under, rows_to_keep
from .simd import LANES, aligned, float32_at, float64_at, int32_at, int64_at, put_int64, uint32_at
from .wide import (WIDE, add_product_f32, add_product_f64, add_to_int32, add_to_int64, added, added_shorts, code_f32, code_f64_of_f32,
                   code_of_quotient_f32, code_of_quotient_f64, full_f32, full_f64, full_i16, full_i32, larger, load_ints, load_shorts,
                   shifted_up, smaller, store_ints, widened)
from .wide_noise import UNIT as UNIT_DEVIATION
from .wide_noise import converted_by, curved, noise, noise_of_one_variance, read_key

STATIC_BROAD = 4  # STATIC with codes in float64 and sums in int64
NOISY, CURVED, CHANGED = 8, 16, 32  # added to one of those: what reads have besides; each sum is compiled by itself

# Where results go; see `buffers.Target`. extremes: int32 `[thread, group, array, digit, slice, tile, 2, column]`;
# counts: int64 `[thread, digit, slice, u - u_min]`.
Target = namedtuple("Target", "out wide values scale offset next_codes extremes counts u_min")

# Addresses of the arrays of `Plan`, `Forms`, `Target` and of one work item, and numbers beside them: see `buffers.Addresses`.
# pixel_row_at, pixel_row_count   `row_at` and `row_count` of each pixel of an output row
# pixel_reference                 sum of the reference cells under each pixel and digit, of one array and slice
# pixel_squares                   sum of the squares of the digits under each pixel, of one array; drive: digit of each of its rows
# reads                           u of one tile
# analog .. seed                  of `cells_plan.Besides`
Addresses = namedtuple("Addresses", """
    analog keys noise curve reference reference_base gains offsets base seed
    weights array_base tile_stride segments segment_start intervals n_intervals digit_start step_of_slice
    singles doubles divide low constant
    exact relative floats out step_size wide scaling values scale offset to_codes next_codes gain shift alpha factor
    extremes counts u_min bins
    lists ones row_at row_count pixel_row_at pixel_row_count pixel_reference pixel_squares drive acc exact_acc step total reads""")

Buffers = namedtuple("Buffers", """
    lists ones row_at row_count pixel_row_at pixel_row_count pixel_reference pixel_squares drive acc exact_acc step total reads""")


# A pixel and tile at hand: their numbers, array being that of all groups; image and pixel, its numbers in the set and the image.
Place = namedtuple("Place", "group t array k tile x image pixel")


def run(shape: Shape, plan: Plan, forms: Forms, besides: Besides, a_codes: torch.Tensor, size: tuple[int, int], pixels: int, op: int, *,
        out: np.ndarray | None = None, values: np.ndarray | None = None, scale: np.ndarray | None = None,
        offset: np.ndarray | None = None, next_codes: np.ndarray | None = None, to_codes: ToCodes | None = None,
        extremes: np.ndarray | None = None, counts: np.ndarray | None = None, u_min: int = 0) -> None:
    """Do `op` with every read of a layer, as `kernel.run`.

    Args: a_codes, uint8 `[N, H, W, in]`; size, `(H', W')`; pixels, how many of the N H' W' output pixels there are.
    """
    target = Target(
        out=np.empty((0,) * 5, np.int32) if out is None else out.view(np.int32),
        wide=out is not None and out.dtype == np.int64, values=np.empty(0) if values is None else values,
        scale=np.empty(0, np.float32) if scale is None else scale, offset=np.empty(0, np.float32) if offset is None else offset,
        next_codes=np.empty((0,) * 4, np.uint8) if next_codes is None else next_codes,
        extremes=np.empty((0,) * 8, np.int32) if extremes is None else extremes,
        counts=np.empty((0,) * 4, np.int64) if counts is None else counts, u_min=u_min)
    bands = min(size[0], max(1, 8 * numba.get_num_threads() // max(len(a_codes), 1)))
    op = STATIC_BROAD if op == STATIC and forms.broad else op
    op += NOISY * besides.noisy + CURVED * besides.curved + CHANGED * besides.changed
    _compiled(op)(
        shape, plan, forms, besides, target, to_codes or NOT_TO_CODES, a_codes.numpy(), *size, pixels, bands)


@functools.cache
def _compiled(op):
    def layer(shape, plan, forms, besides, target, to_codes, codes, height, width, pixels, bands, sources=SOURCES):
        for item in prange(len(codes) * bands):
            image, band = item // bands, item % bands
            _band(shape, plan, forms, besides, target, to_codes, codes, image, height * band // bands, height * (band + 1) // bands,
                  height, width, pixels, op)

    layer.__qualname__ = f"cells_layer_{op}"  # names its files in Numba's cache
    return njit(cache=True, parallel=True)(layer)


@njit
def _band(shape, plan, forms, besides, target, to_codes, codes, image, first, last, height, width, pixels, op):
    """All output pixels of one image in rows first..last - 1."""
    op = literally(op)
    source = Source(codes.shape[1], codes.shape[2], rows_to_keep(shape))
    buffers = _new_buffers(shape, source.kept * source.width, len(plan.intervals), width, op)
    at = _addresses(shape, plan, forms, besides, target, to_codes, buffers, numba.get_thread_id(), op)
    for group in range(shape.groups):
        group_codes = codes.ctypes.data + (image * source.height * source.width * shape.groups + group) * shape.channels
        listed = 0
        for y in range(first, last):
            listed = list_rows_under(shape, at, source, group_codes, y, listed)
            start = (image * height + y) * width
            count = min(width, pixels - start)
            if op % NOISY != RANGES and op % NOISY != HISTOGRAM:
                buffers.acc[:] = 0
                buffers.exact_acc[:] = 0
            _reads_of_row(shape, at, source, besides, group, y, start, count, op)
            if op % NOISY != RANGES and op % NOISY != HISTOGRAM:
                for x in range(count):
                    channel = group * shape.out_channels
                    place = (start + x) * shape.groups * shape.out_channels + channel
                    sums = x * shape.steps * shape.slice_vectors * LANES
                    finish_pixel(shape, at, Pixel(place, channel, int64_at(at.constant, group), True, sums))
    _keep_alive(buffers)


@njit(forceinline=True)
def _reads_of_row(shape, at, source, besides, group, y, start, count, op):
    """Do `op` with all reads of the first `count` output pixels of row `y`, which are those from number `start` on."""
    op = literally(op)
    for t in range(shape.arrays):
        for x in range(count):
            active_rows(shape, at, source, t, y, x, x)
            for i in range(shape.input_bits):
                put_int64(at.pixel_row_at, x * shape.input_bits + i, int64_at(at.row_at, i))
                put_int64(at.pixel_row_count, x * shape.input_bits + i, int64_at(at.row_count, i))
        array = group * shape.arrays + t
        if op & NOISY:
            _add_squares(shape, at, count)
        for k in range(shape.slices):
            if op & (NOISY | CURVED) and shape.digits == shape.input_bits:
                _add_references(shape, at, group, t, k, count)
            for tile in range(shape.tiles):
                weights = at.weights + 2 * (int64_at(at.array_base, array)
                                            + (k * shape.tiles + tile) * int64_at(at.tile_stride, t))
                for x in range(count):
                    image, pixel = (start + x) // besides.pixels + besides.first_image, (start + x) % besides.pixels
                    place = Place(group, t, array, k, tile, x, image, pixel)
                    if op % NOISY == RANGES:
                        _keep_extremes(shape, at, weights, place, op)
                    elif op % NOISY == HISTOGRAM:
                        _count_values(shape, at, weights, place, op)
                    elif op % NOISY == STATIC:
                        _add_codes(shape, at, weights, place, op)
                    else:
                        _add_broad_codes(shape, at, weights, place, op)


@njit(forceinline=True)
def _add_references(shape, at, group, t, k, count):
    """The sum of the reference cells in the active rows of each pixel and digit of one bit, to `pixel_reference`. (Of more bits no
    read needs it: `engine.unsupported`.)"""
    rows = int64_at(at.reference_base, t) + (k * shape.groups + group) * shape.reference_rows
    for x in range(count):
        for z in range(shape.digits):
            r, total = int64_at(at.pixel_row_at, x * shape.input_bits + z), 0
            for i in range(r, r + int64_at(at.pixel_row_count, x * shape.input_bits + z)):
                total += int32_at(at.reference, rows + uint32_at(at.lists, i) // TILE)
            put_int64(at.pixel_reference, x * shape.digits + z, total)


@njit
def _add_squares(shape, at, count):
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
                        total += int64_at(at.drive, uint32_at(at.lists, i) // TILE) << (bit - first)
                _drive(shape, at, x, first, end, -1)
            put_int64(at.pixel_squares, x * shape.digits + z, total)


@njit(forceinline=True)
def _drive(shape, at, x, first, end, sign):
    """Add a digit, input bits `first` to `end` of pixel x, to what drives each row, or take it away again."""
    for bit in range(first, end):
        r = int64_at(at.pixel_row_at, x * shape.input_bits + bit)
        for i in range(r, r + int64_at(at.pixel_row_count, x * shape.input_bits + bit)):
            row = uint32_at(at.lists, i) // TILE
            put_int64(at.drive, row, int64_at(at.drive, row) + (sign << (bit - first)))


@njit(forceinline=True)
def _is_idle(shape, at, x, z, op):
    """Whether a read of digit `z` of pixel `x` is 0 in all columns."""
    if op >= NOISY:
        return False
    for i in range(int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1)):
        if int64_at(at.pixel_row_count, x * shape.input_bits + i):
            return False
    return True


@njit(forceinline=True)
def _read(shape, at, weights, place, z, op):
    """u of the two vectors of a tile, as their converters see them."""
    u0, u1 = _sum_rows(shape, at, weights, place.x, z)
    e0 = e1 = full_i32(0)
    if op & NOISY:
        low, high, at_zero, slope, reference = _noise_of_read(shape, at, place, z)
        keys = (place.group * shape.tiles + place.tile) * TILE
        if slope == 0:
            deviation = np.sqrt(max(at_zero, np.float32(0))) * UNIT_DEVIATION
            e0 = noise_of_one_variance(at.keys, keys, low, high, deviation)
            e1 = noise_of_one_variance(at.keys, keys + WIDE, low, high, deviation)
        else:
            e0 = noise(u0, at.keys, keys, low, high, at_zero, slope, reference)
            e1 = noise(u1, at.keys, keys + WIDE, low, high, at_zero, slope, reference)
    if op & CURVED:
        b0, b1, b2, start, taken = _curve_of_read(shape, at, place, z)
        u0, u1 = curved(u0, start, b0, b1, b2, taken), curved(u1, start, b0, b1, b2, taken)
    u0, u1 = added(u0, e0), added(u1, e1)
    if op & CHANGED:
        column = (((place.k * shape.groups + place.group) * shape.arrays + place.t) * shape.tiles + place.tile) * TILE
        u0 = converted_by(u0, at.gains, at.offsets, column)
        u1 = converted_by(u1, at.gains, at.offsets, column + WIDE)
    return u0, u1


@njit(forceinline=True)
def _noise_of_read(shape, at, place, z):
    """(the halves of its key, its variance as `at_zero + slope (2 u + reference)`) of a read."""
    counter = ((place.pixel * shape.arrays + place.t) * shape.digits + z) * shape.slices + place.k
    key = read_key(at.seed, place.image, counter)
    squares = int64_at(at.pixel_squares, place.x * shape.digits + z)
    at_zero = np.float32(at.base + float64_at(at.noise, 3 * place.k) * squares)
    slope = np.float32(float64_at(at.noise, 3 * place.k + 1))
    reference = int64_at(at.pixel_reference, place.x * shape.digits + z) * np.int64(float64_at(at.noise, 3 * place.k + 2))
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


@njit(forceinline=True)
def _with_rows(total, weights, a, b, c, d):
    return added_shorts(total, added_shorts(added_shorts(load_shorts(weights, a), load_shorts(weights, b)),
                                            added_shorts(load_shorts(weights, c), load_shorts(weights, d))))


@njit(forceinline=True)
def _sum_rows(shape, at, weights, x, z):
    """u of the two vectors of a tile: sums of 16 bits over as many rows as they hold, added in 32 bits."""
    u0 = u1 = full_i32(0)
    first_bit = int64_at(at.digit_start, z)
    for i in range(first_bit, int64_at(at.digit_start, z + 1)):
        r = int64_at(at.pixel_row_at, x * shape.input_bits + i)
        end = r + int64_at(at.pixel_row_count, x * shape.input_bits + i)
        while r < end:
            stop = min(end, r + shape.chunk)
            s0 = s1 = full_i16(0)
            while r < stop:  # beyond the end of a list stand rows of zeros
                a, b = uint32_at(at.lists, r), uint32_at(at.lists, r + 1)
                c, d = uint32_at(at.lists, r + 2), uint32_at(at.lists, r + 3)
                s0 = _with_rows(s0, weights, a, b, c, d)
                s1 = _with_rows(s1, weights + 2 * WIDE, a, b, c, d)
                r += UNROLL
            u0 = added(u0, shifted_up(widened(s0), i - first_bit))
            u1 = added(u1, shifted_up(widened(s1), i - first_bit))
    return u0, u1


@njit(forceinline=True)
def _sums(shape, at, place):
    """The first accumulator of a pixel's tile."""
    step = int64_at(at.step_of_slice, place.k)
    return (place.x * shape.steps + step) * shape.slice_vectors * LANES + place.tile * TILE


@njit(forceinline=True)
def _add_codes(shape, at, weights, place, op):
    """STATIC: ADC codes of all digits of one pixel, times their factors, to its accumulators; float32 holds them exactly."""
    total0 = total1 = full_f32(np.float32(0))
    for z in range(shape.digits):
        form = at.singles + 4 * FORM * (z * shape.slices + place.k)
        factor = float32_at(form, FACTOR)
        if factor == 0 or _is_idle(shape, at, place.x, z, op):
            continue
        u0, u1 = _read(shape, at, weights, place, z, op)
        low, high = float32_at(form, LOWEST), float32_at(form, HIGHEST)
        if at.divide:
            unit, delta = float32_at(form, UNIT), float32_at(form, DELTA)
            q0 = code_of_quotient_f32(u0, unit, delta, low, high)
            q1 = code_of_quotient_f32(u1, unit, delta, low, high)
        else:
            scale = float32_at(form, SCALE)
            q0, q1 = code_f32(u0, scale, low, high), code_f32(u1, scale, low, high)
        total0, total1 = add_product_f32(total0, q0, factor), add_product_f32(total1, q1, factor)
    sums = _sums(shape, at, place)
    add_to_int32(at.acc, sums, total0)
    add_to_int32(at.acc, sums + WIDE, total1)


@njit(forceinline=True)
def _add_broad_codes(shape, at, weights, place, op):
    """STATIC_BROAD and DYNAMIC: the same in float64, by the formula."""
    total0 = total1 = full_f64(0.0)
    for z in range(shape.digits):
        entry = (place.array * shape.digits + z) * shape.slices + place.k if op % NOISY == DYNAMIC else z * shape.slices + place.k
        form, single = at.doubles + 8 * FORM * entry, at.singles + 4 * FORM * entry
        factor = float64_at(form, FACTOR)
        if factor == 0:
            continue
        u0, u1 = _read(shape, at, weights, place, z, op)
        if op % NOISY == DYNAMIC:
            start = full_i32(-int64_at(at.low, entry))
            delta, high = float32_at(single, DELTA), float32_at(single, HIGHEST)
            q0, q1 = code_f64_of_f32(added(u0, start), delta, high), code_f64_of_f32(added(u1, start), delta, high)
        else:
            unit, delta = float64_at(form, UNIT), float64_at(form, DELTA)
            low, high = float64_at(form, LOWEST), float64_at(form, HIGHEST)
            q0 = code_of_quotient_f64(u0, unit, delta, low, high)
            q1 = code_of_quotient_f64(u1, unit, delta, low, high)
        total0, total1 = add_product_f64(total0, q0, factor), add_product_f64(total1, q1, factor)
    sums = _sums(shape, at, place)
    add_to_int64(at.exact_acc, sums, total0)
    add_to_int64(at.exact_acc, sums + WIDE, total1)


@njit(forceinline=True)
def _keep_extremes(shape, at, weights, place, op):
    for z in range(shape.digits):
        u0, u1 = _read(shape, at, weights, place, z, op)
        low = 2 * TILE * (((place.array * shape.digits + z) * shape.slices + place.k) * shape.tiles + place.tile)
        high = low + TILE
        store_ints(at.extremes, low, smaller(load_ints(at.extremes, low), u0))
        store_ints(at.extremes, low + WIDE, smaller(load_ints(at.extremes, low + WIDE), u1))
        store_ints(at.extremes, high, larger(load_ints(at.extremes, high), u0))
        store_ints(at.extremes, high + WIDE, larger(load_ints(at.extremes, high + WIDE), u1))


@njit(forceinline=True)
def _count_values(shape, at, weights, place, op):
    columns = min(TILE, shape.out_channels - place.tile * TILE)
    for z in range(shape.digits):
        u0, u1 = _read(shape, at, weights, place, z, op)
        store_ints(at.reads, 0, u0)
        store_ints(at.reads, WIDE, u1)
        start = (z * shape.slices + place.k) * at.bins - at.u_min
        for c in range(columns):
            one = start + int32_at(at.reads, c)
            put_int64(at.counts, one, int64_at(at.counts, one) + 1)


@njit
def _new_buffers(shape, pixels, n_intervals, width, op):
    """`Buffers` for lists of so many input pixels and so many channel intervals, and an output row of so many pixels."""
    places = pixels * shape.input_bits
    sums = width * shape.steps * shape.slice_vectors * LANES
    broad = op % NOISY == STATIC_BROAD or op % NOISY == DYNAMIC
    narrow_sums, broad_sums = 0 if broad else sums, sums if broad else 0
    return Buffers(
        lists=np.empty((places + width * shape.input_bits) * shape.slots, np.uint32), ones=np.empty(places * n_intervals, np.int64),
        row_at=np.empty(shape.input_bits, np.int64), row_count=np.empty(shape.input_bits, np.int64),
        pixel_row_at=np.empty(width * shape.input_bits, np.int64), pixel_row_count=np.empty(width * shape.input_bits, np.int64),
        pixel_reference=np.zeros(width * shape.digits, np.int64), pixel_squares=np.empty(width * shape.digits, np.int64),
        drive=np.zeros(shape.reference_rows + 1, np.int64),
        acc=aligned(narrow_sums, np.empty(0, np.int32)), exact_acc=np.empty(broad_sums, np.int64),
        step=np.empty(shape.slice_vectors * LANES, np.int64), total=np.empty(shape.slice_vectors * LANES),
        reads=np.empty(TILE, np.int32))


@njit
def _addresses(shape, plan, forms, besides, target, to_codes, buffers, thread, op):
    words = 2 if target.wide else 1
    exact = op % NOISY == STATIC_BROAD or op % NOISY == DYNAMIC
    return Addresses(
        analog=besides.analog, curve=besides.curve.ctypes.data, keys=besides.keys.ctypes.data, noise=besides.noise.ctypes.data,
        reference=besides.reference.ctypes.data, reference_base=besides.reference_base.ctypes.data,
        gains=besides.gain.ctypes.data, offsets=besides.offset.ctypes.data, base=besides.base, seed=besides.seed,
        weights=plan.weights.ctypes.data, array_base=plan.array_base.ctypes.data, tile_stride=plan.tile_stride.ctypes.data,
        segments=plan.segments.ctypes.data, segment_start=plan.segment_start.ctypes.data, intervals=plan.intervals.ctypes.data,
        n_intervals=len(plan.intervals), digit_start=plan.digit_start.ctypes.data, step_of_slice=plan.step_of_slice.ctypes.data,
        singles=forms.singles.ctypes.data, doubles=forms.doubles.ctypes.data, divide=forms.divide, low=forms.low.ctypes.data,
        constant=forms.constant.ctypes.data,
        exact=exact, relative=0, floats=False,
        out=target.out.ctypes.data, step_size=target.out[:1].size // words, wide=target.wide,
        scaling=len(target.values) > 0, values=target.values.ctypes.data, scale=target.scale.ctypes.data,
        offset=target.offset.ctypes.data, to_codes=len(to_codes.gain) > 0, next_codes=target.next_codes.ctypes.data,
        gain=to_codes.gain.ctypes.data, shift=to_codes.shift.ctypes.data, alpha=to_codes.alpha, factor=to_codes.factor,
        extremes=target.extremes.ctypes.data + thread * target.extremes.strides[0],
        counts=target.counts.ctypes.data + thread * target.counts.strides[0], u_min=target.u_min, bins=target.counts.shape[3],
        lists=buffers.lists.ctypes.data, ones=buffers.ones.ctypes.data, row_at=buffers.row_at.ctypes.data,
        row_count=buffers.row_count.ctypes.data, pixel_row_at=buffers.pixel_row_at.ctypes.data,
        pixel_row_count=buffers.pixel_row_count.ctypes.data,
        pixel_reference=buffers.pixel_reference.ctypes.data, pixel_squares=buffers.pixel_squares.ctypes.data,
        drive=buffers.drive.ctypes.data, acc=buffers.acc.ctypes.data,
        exact_acc=buffers.exact_acc.ctypes.data, step=buffers.step.ctypes.data, total=buffers.total.ctypes.data,
        reads=buffers.reads.ctypes.data)


@njit
def _keep_alive(buffers):
    """Numba frees an array after its last use, and does not see the uses by address."""

