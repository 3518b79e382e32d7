"""The loop over a layer with output pixels side by side (`pixels_layout`): blocks of pixels, columns, slices, digits, arrays, sets of rows.

The planes of a block and the tables of one column stay in the first-level cache; reads and codes are never stored, only the sum of
the codes of one column, which is turned round from `[column, pixel]` to `[pixel, column]` when all columns of the block are done.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from ....kernels.cache import SOURCES
from ....kernels.inner import inlined, inner
from ....kernels.output import ToCodes
from ....kernels.simd import LANES, int32_at, int64_at, put_uint8, put_uint32
from ..common.buffers import addresses, keep_alive, target_of
from ..common.finish import Pixel, finish_pixel
from ..grid.cells_forms import code_of
from ..grid.cells_reads import SHARED
from ..planes.converter import CLIP_HIGH, CLIP_LOW, FACTOR, FRACTION, LOW, OFFSET, Q_MAX, Q_MIN, SHIFT, TIE
from ..planes.fixed_point import EVEN, TOWARDS_ZERO
from ..vectors.loop import Kernel, loaded
from ..vectors.picks import (PIXELS, TABLE, add_joined_evens, add_joined_odds, add_product_of_evens, add_product_of_floats,
                             add_product_of_odds, add_product_of_shorts, add_to_sums, added_bytes, codes_of_shorts,
                             full_i8, larger_bytes, load_bytes, load_table, picked_bytes, picked_of_four, picked_of_two, picked_shorts,
                             smaller_bytes, store_bytes, zero_shorts)
from ..vectors.wide import (WIDE, add_product_f32, added, added_shorts, bit_of_64_bytes, full_f32, full_i16, full_i32, halved, store_ints,
                            times, widened, widened_unsigned)
from .pixels_compared import worth_of_reads
from .pixels_layout import BROAD, BY_ONES, COMPARED, NARROW, READ_OUT, SHORT_FORM, TALL, VALUES, PixelLayout, PixelShape
from .pixels_reads import bend, draw, read_out

POPULATION = np.array([bits.bit_count() for bits in range(TABLE)], np.uint8)  # of the rows of a set
LENGTH = np.array([n.bit_length() for n in range(2 * TABLE)], np.uint8)  # class of n

# One input and how its pixels lie in a plane: height, width, of an image in memory; out_height, out_width; pitch, pixels from one row to
# the next; rows, from one image to the next; block, output pixels of a work item; length, of a plane, the taps' reach more.
Raster = namedtuple("Raster", "images height width out_height out_width pitch rows block length")

# Arrays of one work item, and numbers: what else `buffers.addresses` are made of.
# place   where the plane of each set begins, moved by its tap; bit_stride: from the planes of one input bit to those of the next
# classes  BY_ONES, and where reads are read out: bytes `[array, digit, pixel]`, of PIXELS pixels: classes of n, or n
# reads    READ_OUT, COMPARED: `[array, digit, slice, field, pixel]`, of PIXELS pixels, `cells_reads.SHARED` fields of 32 bits
# keys     READ_OUT, COMPARED: 64 bits `[2, pixel]`: key of the image, and number of a pixel's first read
# sums_of_rows   int32 `[2, pixel]`: n and the sum of the reference cells
# sums    int32 `[step, column, pixel]` of the block, `sums_stride` from one column to the next
# exact, exact_acc, relative   that `finish` asks for
PixelNumbers = namedtuple("PixelNumbers", """place planes bit_stride classes reads keys sums_of_rows sums sums_stride acc step total
    exact exact_acc relative""")


def run(shape: PixelShape, layout: PixelLayout, raster: Raster, place: np.ndarray, codes: np.ndarray, first_image: int,
        **target: np.ndarray | ToCodes) -> None:
    """Codes of every read of a layer to `target`, see `buffers.target_of`. Args: place, see `PixelNumbers`; codes, uint8 `[N, H, W, in]`
    flat, and a vector behind; first_image, its number, which its noise follows from."""
    blocks = -(-raster.images * raster.rows * raster.pitch // raster.block)
    _kernels[shape.form](blocks, shape, layout, raster, place, target_of(**target), codes, first_image)


def _kernel(form):
    """The kernel for layers of this form. Its items are blocks of output pixels, with all of their columns."""
    reads_out, by_twos = form in (READ_OUT, COMPARED), form in (NARROW, TALL, BY_ONES)

    def layer(arguments, item, sources=SOURCES):
        shape, layout, raster, place, target, codes, first_image = loaded(arguments)
        first = item * raster.block
        phases = shape.stride_y * shape.stride_x
        bit_stride = shape.intervals * phases * raster.length
        planes = np.zeros(shape.input_bits * bit_stride + PIXELS, np.uint8)
        classes = np.empty(shape.arrays * shape.digits * PIXELS if form == BY_ONES or reads_out else 0, np.uint8)
        reads = np.empty(shape.arrays * shape.digits * shape.slices * SHARED * PIXELS if reads_out else 0, np.int32)
        keys = np.empty(2 * PIXELS if reads_out else 0, np.int64)
        sums_of_rows = np.empty(2 * PIXELS, np.int32)
        stride = raster.block + LANES // 2  # not a multiple of what the cache repeats by
        sums = np.empty(shape.steps * shape.out_channels * stride, np.int32)
        acc = np.empty(shape.steps * shape.slice_vectors * LANES, np.int32)
        step, total = np.empty(shape.slice_vectors * LANES, np.int64), np.empty(shape.slice_vectors * LANES)
        at = addresses((layout, target, PixelNumbers(
            place=place, planes=planes, bit_stride=bit_stride, classes=classes, reads=reads, keys=keys, sums_of_rows=sums_of_rows,
            sums=sums, sums_stride=stride, acc=acc, step=step, total=total, exact=False, exact_acc=0, relative=0)))
        for group in range(shape.groups):
            planes[:] = 0
            sums[:] = 0
            _fill_planes(shape, at, raster, codes, group, first)
            for pixel in range(0, raster.block, PIXELS):
                if form == BY_ONES or reads_out and (shape.noisy or shape.curved):
                    _find_classes(shape, at, pixel, form)
                if reads_out and shape.curved:
                    bend(shape, at, group, pixel)
                if reads_out and shape.noisy:
                    draw(shape, at, raster, layout.seed, first_image, first + pixel)
                for o in range(0, shape.out_channels, 2 if by_twos else 1):
                    if form == NARROW:
                        _narrow_columns(shape, at, group, o, pixel)
                    elif form == TALL:
                        _tall_columns(shape, at, group, o, pixel)
                    elif form == BY_ONES:
                        _columns_by_ones(shape, at, group, o, pixel)
                    else:
                        _broad_column(shape, at, group, o, pixel, form)
            _finish(shape, at, raster, group, first)
        keep_alive((planes, classes, reads, keys, sums_of_rows, sums, acc, step, total))

    return Kernel(layer, f"pixels_layer_{form}")


@inlined
def _put_sets(shape, at, codes, stride, place):
    """The input bits of one pixel, whose codes are at address `codes`, to `place` of the planes of all intervals, `stride` apart."""
    for i in range(shape.input_bits):
        base, end, word = 0, 0, np.uint64(0)
        for v in range(shape.intervals):
            first, size = int64_at(at.first, v), int64_at(at.size, v)
            if first < base or first + size > end:
                base, end, word = first, first + WIDE, bit_of_64_bytes(codes, first, i)
            put_uint8(at.planes, i * at.bit_stride + v * stride + place, np.int64(word >> np.uint64(first - base)) & ((1 << size) - 1))


@inner
def _fill_planes(shape, at, raster, codes, group, first):
    """The input bits of the pixels that the block from raster pixel `first` on sees; the others of a plane are 0."""
    phases, pixel_bytes = shape.stride_y * shape.stride_x, shape.groups * shape.channels
    start = codes.ctypes.data
    row, stop = first // raster.pitch, first + raster.length
    while row * raster.pitch < stop:
        image, y = row // raster.rows, row % raster.rows
        left = max(0, first - row * raster.pitch)
        right = min(raster.pitch, stop - row * raster.pitch)
        for phase_y in range(shape.stride_y if image < raster.images else 0):
            iy = y * shape.stride_y + phase_y - shape.pad_top
            if iy < 0 or iy >= raster.height:
                continue
            for phase_x in range(shape.stride_x):
                phase = phase_y * shape.stride_x + phase_x
                source = start + (image * raster.height + iy) * raster.width * pixel_bytes + group * shape.channels
                for x in range(left, right):
                    ix = x * shape.stride_x + phase_x - shape.pad_left
                    if 0 <= ix < raster.width:
                        pixel = row * raster.pitch + x - first
                        _put_sets(shape, at, source + ix * pixel_bytes, phases * raster.length, phase * raster.length + pixel)
        row += 1


# Columns o and o + 1 are made together, as they share what is loaded of the planes; a last one is made twice.


@inlined
def _tables(shape, at, group, o, k):
    """Where those of the two columns begin."""
    first, size = at.tables + (group * shape.out_channels * shape.slices + k) * shape.sets * TABLE, shape.slices * shape.sets * TABLE
    return first + o * size, first + min(o + 1, shape.out_channels - 1) * size


@inlined
def _put_sums(shape, at, k, o, pixel, evens, odds, factor):
    """Sums of codes of slice k, times a factor, to those of column o, if there is such a one."""
    if o < shape.out_channels:
        place = at.sums + 4 * ((int64_at(at.step_of_slice, k) * shape.out_channels + o) * at.sums_stride + pixel)
        add_to_sums(place, evens, factor * int64_at(at.worth, k))
        add_to_sums(place + 2 * PIXELS, odds, factor * int64_at(at.worth, k))


@inlined
def _added_sets(at, tables, planes, s, stop, u, v):
    """u and v with what the sets from s up to `stop` add to them, in bytes."""
    while s < stop:
        index = load_bytes(planes + int64_at(at.place, s))
        u = added_bytes(u, picked_bytes(load_table(tables[0] + s * TABLE), index))
        v = added_bytes(v, picked_bytes(load_table(tables[1] + s * TABLE), index))
        s += 1
    return u, v


@inlined
def _narrow_columns(shape, at, group, o, pixel):
    """The sums of codes of two columns, of the pixels from `pixel` of the block on; u and codes in bytes, sums of one slice in 16 bits."""
    for k in range(shape.slices):
        tables = _tables(shape, at, group, o, k)
        evens, odds, more_evens, more_odds = zero_shorts(0), zero_shorts(0), zero_shorts(0), zero_shorts(0)
        for z in range(shape.digits):
            kind = z * shape.slices + k
            factor = int64_at(at.factors, kind)
            if factor == 0:
                continue
            t = 0
            while t < shape.arrays:
                stop = min(t + shape.together, shape.arrays)
                q, r = full_i8(0), full_i8(0)
                while t < stop:
                    u, v = _narrow_reads(at, tables, t, z, pixel)
                    q, r = added_bytes(q, _narrow_code(shape, at, u, kind)), added_bytes(r, _narrow_code(shape, at, v, kind))
                    t += 1
                evens, odds = add_product_of_evens(evens, q, factor), add_product_of_odds(odds, q, factor)
                more_evens, more_odds = add_product_of_evens(more_evens, r, factor), add_product_of_odds(more_odds, r, factor)
        _put_sums(shape, at, k, o, pixel, evens, odds, 1)
        _put_sums(shape, at, k, o + 1, pixel, more_evens, more_odds, 1)


@inlined
def _narrow_code(shape, at, u, kind):
    """Codes of a vector of reads, bytes, from u in bytes, by a table. Args: kind, of read: digit and slice."""
    if shape.clip:
        u = smaller_bytes(larger_bytes(u, full_i8(int64_at(at.ends, 2 * kind))), full_i8(int64_at(at.ends, 2 * kind + 1)))
    codes = at.codes + 2 * TABLE * kind
    return picked_bytes(load_table(codes), u) if shape.small else picked_of_two(load_table(codes), load_table(codes + TABLE), u)


@inlined
def _narrow_reads(at, tables, t, z, pixel):
    """u of array t and digit z, of both columns."""
    u, v = full_i8(0), full_i8(0)
    first, bit = int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1) - 1
    while True:
        planes = at.planes + bit * at.bit_stride + pixel
        u, v = _added_sets(at, tables, planes, int64_at(at.set_start, t), int64_at(at.set_start, t + 1), u, v)
        if bit == first:
            return u, v
        bit -= 1
        u, v = added_bytes(u, u), added_bytes(v, v)


@inner
def _find_classes(shape, at, pixel, form):
    """n of the reads of each array and digit, modulo 256, of the pixels from `pixel` of the block on; BY_ONES its class."""
    population, short, long = load_table(POPULATION.ctypes.data), load_table(LENGTH.ctypes.data), load_table(LENGTH.ctypes.data + TABLE)
    for t in range(shape.arrays):
        for z in range(shape.digits):
            n = full_i8(0)
            for bit in range(int64_at(at.digit_start, z + 1) - 1, int64_at(at.digit_start, z) - 1, -1):
                n, planes = added_bytes(n, n), at.planes + bit * at.bit_stride + pixel
                for s in range(int64_at(at.set_start, t), int64_at(at.set_start, t + 1)):
                    n = added_bytes(n, picked_bytes(population, load_bytes(planes + int64_at(at.place, s))))
            if form == BY_ONES:
                n = picked_of_two(short, long, n)
            store_bytes(at.classes + (t * shape.digits + z) * PIXELS, n)


@inlined
def _columns_by_ones(shape, at, group, o, pixel):
    """The same with codes, times what they are worth, that are looked up from u and the class of n."""
    for k in range(shape.slices):
        tables = _tables(shape, at, group, o, k)
        for z in range(shape.digits):
            kind = z * shape.slices + k
            factor, t = int64_at(at.factors, kind), 0
            while factor != 0 and t < shape.arrays:
                stop = min(t + shape.flush, shape.arrays)
                evens, odds, more_evens, more_odds = zero_shorts(0), zero_shorts(0), zero_shorts(0), zero_shorts(0)
                while t < stop:
                    u, v = _narrow_reads(at, tables, t, z, pixel)
                    of_class = load_bytes(at.classes + (t * shape.digits + z) * PIXELS)
                    low, high = _values(shape, at, u, of_class, kind)
                    evens, odds = add_joined_evens(evens, low, high), add_joined_odds(odds, low, high)
                    low, high = _values(shape, at, v, of_class, kind)
                    more_evens, more_odds = add_joined_evens(more_evens, low, high), add_joined_odds(more_odds, low, high)
                    t += 1
                _put_sums(shape, at, k, o, pixel, evens, odds, factor)
                _put_sums(shape, at, k, o + 1, pixel, more_evens, more_odds, factor)


@inlined
def _values(shape, at, u, of_class, kind):
    """What the codes of a vector of reads are worth, low and high bytes, from u in bytes and their classes of n."""
    if shape.clip:
        u = larger_bytes(u, picked_bytes(load_table(at.windows + TABLE), of_class))
        u = smaller_bytes(u, picked_bytes(load_table(at.windows + 2 * TABLE), of_class))
    index = added_bytes(u, picked_bytes(load_table(at.windows), of_class))
    values = at.value_bytes + 2 * VALUES * kind
    return picked_of_four(values, index), picked_of_four(values + VALUES, index)


@inlined
def _tall_columns(shape, at, group, o, pixel):
    """The same with u and codes in 16 bits, from the sums of some sets on."""
    for k in range(shape.slices):
        tables = _tables(shape, at, group, o, k)
        evens, odds, more_evens, more_odds = zero_shorts(0), zero_shorts(0), zero_shorts(0), zero_shorts(0)
        for z in range(shape.digits):
            kind = z * shape.slices + k
            factor = int64_at(at.factors, kind)
            if factor == 0:
                continue
            if not shape.at_once:
                evens, odds, more_evens, more_odds = zero_shorts(0), zero_shorts(0), zero_shorts(0), zero_shorts(0)
            own = factor if shape.at_once else 1
            for t in range(shape.arrays):
                u_evens, u_odds, v_evens, v_odds = _tall_reads(shape, at, tables, t, z, pixel)
                evens = add_product_of_shorts(evens, _tall_code(at, u_evens, kind), own)
                odds = add_product_of_shorts(odds, _tall_code(at, u_odds, kind), own)
                more_evens = add_product_of_shorts(more_evens, _tall_code(at, v_evens, kind), own)
                more_odds = add_product_of_shorts(more_odds, _tall_code(at, v_odds, kind), own)
            if not shape.at_once:
                _put_sums(shape, at, k, o, pixel, evens, odds, factor)
                _put_sums(shape, at, k, o + 1, pixel, more_evens, more_odds, factor)
        if shape.at_once:
            _put_sums(shape, at, k, o, pixel, evens, odds, 1)
            _put_sums(shape, at, k, o + 1, pixel, more_evens, more_odds, 1)


@inlined
def _tall_reads(shape, at, tables, t, z, pixel):
    """u of array t and digit z, of the even pixels and of the odd ones, of both columns."""
    evens, odds, more_evens, more_odds = zero_shorts(0), zero_shorts(0), zero_shorts(0), zero_shorts(0)
    first = int64_at(at.digit_start, z)
    for bit in range(first, int64_at(at.digit_start, z + 1)):
        planes, s, end_set = at.planes + bit * at.bit_stride + pixel, int64_at(at.set_start, t), int64_at(at.set_start, t + 1)
        while s < end_set:
            stop = min(s + shape.flush, end_set)
            u, v = _added_sets(at, tables, planes, s, stop, full_i8(0), full_i8(0))
            worth, s = 1 << (bit - first), stop
            evens, odds = add_product_of_evens(evens, u, worth), add_product_of_odds(odds, u, worth)
            more_evens, more_odds = add_product_of_evens(more_evens, v, worth), add_product_of_odds(more_odds, v, worth)
    return evens, odds, more_evens, more_odds


@inlined
def _tall_code(at, u, kind):
    """Codes of a vector of reads, int16, from u in int16, by `fixed_point`."""
    form = at.shorts + 8 * SHORT_FORM * kind
    limits = form + 8 * LOW
    return codes_of_shorts(u, int64_at(limits, CLIP_LOW), int64_at(limits, CLIP_HIGH), int64_at(form, SHIFT), int64_at(form, OFFSET),
                           int64_at(form, FACTOR), int64_at(form, FRACTION), -(int64_at(form, TIE) == EVEN),
                           -(int64_at(form, TIE) == TOWARDS_ZERO), int64_at(limits, Q_MIN), int64_at(limits, Q_MAX))


@inlined
def _broad_column(shape, at, group, o, pixel, form):
    """The same with u in 16 bits and codes in float32, or by thresholds in 16 bits."""
    for half in range(pixel, pixel + PIXELS, WIDE):
        for step in range(shape.steps):
            total = full_i32(0)
            for k in range(shape.slices):
                if int64_at(at.step_of_slice, k) != step:
                    continue
                tables = at.tables + ((group * shape.out_channels + o) * shape.slices + k) * shape.sets * TABLE
                for z in range(shape.digits):
                    kind = z * shape.slices + k
                    factor = int64_at(at.factors, kind)
                    if factor == 0:
                        continue
                    q, worth = full_f32(np.float32(0)), full_i16(0)
                    for t in range(shape.arrays):
                        sums = _broad_read(at, tables, t, z, half)
                        u = widened(sums)
                        if form != BROAD:
                            both = _both(shape, at, tables, t, z, half) if shape.paired else u
                            u = read_out(shape, at, u, both, group, o, t, z, k, half - pixel)
                        if form == COMPARED:
                            x = halved(u) if shape.noisy or shape.curved or shape.gained or shape.moved else sums
                            worth = added_shorts(worth, worth_of_reads(shape, at, x, group, o, t, kind))
                        else:
                            q = add_product_f32(q, code_of(u, at.forms, kind, shape.divide), np.float32(1))
                    if form == COMPARED:
                        total = added(total, times(widened(worth), factor * int64_at(at.worth, k)))
                    else:
                        total = add_product_of_floats(total, q, factor * int64_at(at.worth, k))
            store_ints(at.sums, (step * shape.out_channels + o) * at.sums_stride + half, total)


@inlined
def _broad_read(at, tables, t, z, pixel):
    """u of array t and digit z, of a vector of pixels, shorts."""
    u = full_i16(0)
    first_set, end_set = int64_at(at.set_start, t), int64_at(at.set_start, t + 1)
    first, bit = int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1) - 1
    while True:
        planes = at.planes + bit * at.bit_stride + pixel
        for s in range(first_set, end_set):
            u = added_shorts(u, picked_shorts(tables + s * TABLE, planes + int64_at(at.place, s)))
        if bit == first:
            return u
        bit -= 1
        u = added_shorts(u, u)


@inlined
def _both(shape, at, tables, t, z, pixel):
    """What both lines of a pair hold together, of such reads, modulo 2^16 from the least on."""
    sums = _broad_read(at, at.both + tables - at.tables, t, z, pixel)
    return added(widened_unsigned(added_shorts(sums, full_i16(-at.least))), full_i32(at.least))


@inner
def _finish(shape, at, raster, group, first):
    """The sums of the block's output pixels to where they are wanted."""
    channel = group * shape.out_channels
    row, stop = first // raster.pitch, first + raster.block
    while row * raster.pitch < stop:
        image, y = row // raster.rows, row % raster.rows
        if image < raster.images and y < raster.out_height:
            for x in range(max(0, first - row * raster.pitch), min(raster.out_width, stop - row * raster.pitch)):
                pixel = row * raster.pitch + x - first
                if shape.form in (NARROW, TALL, BY_ONES):  # even ones come first
                    pixel = pixel // PIXELS * PIXELS + pixel % PIXELS // 2 + pixel % 2 * (PIXELS // 2)
                _turn(shape, at, pixel)
                place = ((image * raster.out_height + y) * raster.out_width + x) * shape.groups * shape.out_channels + channel
                finish_pixel(shape, at, Pixel(place, channel, 0, True, 0))
        row += 1


@inlined
def _turn(shape, at, pixel):
    """The sums of one pixel to `at.acc`, as `finish` takes them."""
    for step in range(shape.steps):
        first = step * shape.out_channels * at.sums_stride + pixel
        for o in range(shape.out_channels):
            put_uint32(at.acc, step * shape.slice_vectors * LANES + o, int32_at(at.sums, first + o * at.sums_stride))


_kernels = {form: _kernel(form) for form in (NARROW, TALL, BROAD, BY_ONES, READ_OUT, COMPARED)}
