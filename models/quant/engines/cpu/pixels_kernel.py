"""The loop over a layer with output pixels side by side (`pixels_plan`): blocks of pixels, columns, slices, digits, arrays, sets of rows.

The planes of a block and the tables of one column stay in the first-level cache; reads and codes are never stored, only the sum of
the codes of one column, which is turned round from `[column, pixel]` to `[pixel, column]` when all columns of the block are done.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from .cache import SOURCES
from .cells_forms import DELTA, FORM, HIGHEST, LOWEST, SCALE, UNIT
from .finish import Pixel, finish_pixel
from .inner import inlined, inner
from .loop import Kernel, loaded
from .output import ToCodes
from .picks import (PIXELS, TABLE, add_product_of_evens, add_product_of_floats, add_product_of_odds, add_to_sums, added_bytes, full_i8,
                    larger_bytes, load_bytes, load_table, picked_bytes, picked_of_two, picked_shorts, smaller_bytes, zero_shorts)
from .pixels_plan import Plan, Shape
from .simd import LANES, float32_at, int32_at, int64_at, put_int32, put_uint8
from .wide import (WIDE, add_product_f32, added_shorts, bit_of_64_bytes, code_f32, code_of_quotient_f32, full_f32, full_i16, full_i32,
                   store_ints, widened)

# One input and how its pixels lie in a plane: height, width, of an image in memory; out_height, out_width; pitch, pixels from one row to
# the next; rows, from one image to the next; block, output pixels of a work item; length, of a plane, the taps' reach more.
Raster = namedtuple("Raster", "images height width out_height out_width pitch rows block length")

# Where results go: `buffers.Target`.
Target = namedtuple("Target", "out wide values scale offset next_codes")

# Addresses of the arrays of `Plan`, `Target` and of one work item, and numbers beside them: see `buffers.Addresses`.
# place   where the plane of each set begins, moved by its tap; bit_stride: from the planes of one input bit to those of the next
# sums    int32 `[step, column, pixel]` of the block, `sums_stride` from one column to the next
Addresses = namedtuple("Addresses", """
    tables set_start first size place planes bit_stride digit_start step_of_slice codes ends forms factors worth sums sums_stride
    exact relative floats out step_size wide scaling values scale offset to_codes next_codes gain shift alpha factor
    acc exact_acc step total""")


def run(shape: Shape, plan: Plan, raster: Raster, place: np.ndarray, target: Target, to_codes: ToCodes, codes: np.ndarray) -> None:
    """Codes of every read of a layer to `target`. Args: place, see `Addresses`; codes, uint8 `[N, H, W, in]` flat, and a vector behind."""
    blocks = -(-raster.images * raster.rows * raster.pitch // raster.block)
    (_narrow if shape.narrow else _broad)(blocks, shape, plan, raster, place, target, to_codes, codes)


def _kernel(narrow):
    """The kernel for u in bytes (narrow) or in 16 bits. Its items are blocks of output pixels, with all of their columns."""
    def layer(arguments, item, sources=SOURCES):
        shape, plan, raster, place, target, to_codes, codes = loaded(arguments)
        first = item * raster.block
        phases = shape.stride_y * shape.stride_x
        bit_stride = shape.intervals * phases * raster.length
        planes = np.zeros(shape.input_bits * bit_stride + PIXELS, np.uint8)
        stride = raster.block + LANES // 2  # not a multiple of what the cache repeats by
        sums = np.empty(shape.steps * shape.out_channels * stride, np.int32)
        acc = np.empty(shape.steps * shape.slice_vectors * LANES, np.int32)
        step, total = np.empty(shape.slice_vectors * LANES, np.int64), np.empty(shape.slice_vectors * LANES)
        words = 2 if target.wide else 1  # of an element of `out`
        at = Addresses(
            tables=plan.tables.ctypes.data, set_start=plan.set_start.ctypes.data,
            first=plan.first.ctypes.data, size=plan.size.ctypes.data, place=place.ctypes.data, planes=planes.ctypes.data,
            bit_stride=bit_stride, digit_start=plan.digit_start.ctypes.data, step_of_slice=plan.step_of_slice.ctypes.data,
            codes=plan.codes.ctypes.data, ends=plan.ends.ctypes.data, forms=plan.forms.ctypes.data, factors=plan.factors.ctypes.data,
            worth=plan.worth.ctypes.data, sums=sums.ctypes.data, sums_stride=stride, exact=False, relative=0, floats=False,
            out=target.out.ctypes.data, step_size=target.out[:1].size // words, wide=target.wide,
            scaling=len(target.values) > 0, values=target.values.ctypes.data, scale=target.scale.ctypes.data,
            offset=target.offset.ctypes.data, to_codes=len(to_codes.gain) > 0, next_codes=target.next_codes.ctypes.data,
            gain=to_codes.gain.ctypes.data, shift=to_codes.shift.ctypes.data, alpha=to_codes.alpha, factor=to_codes.factor,
            acc=acc.ctypes.data, exact_acc=0, step=step.ctypes.data, total=total.ctypes.data)
        for group in range(shape.groups):
            planes[:] = 0
            sums[:] = 0
            _fill_planes(shape, at, raster, codes, group, first)
            for pixel in range(0, raster.block, PIXELS):
                for o in range(shape.out_channels):
                    if narrow:
                        _narrow_column(shape, at, group, o, pixel)
                    else:
                        _broad_column(shape, at, group, o, pixel)
            _finish(shape, at, raster, group, first)
        _keep_alive(planes, sums, acc, step, total)

    return Kernel(layer, f"pixels_layer_{'narrow' if narrow else 'broad'}")


@inner
def _keep_alive(planes, sums, acc, step, total):
    """Numba frees an array after its last use, and does not see the uses by address."""


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


@inlined
def _narrow_column(shape, at, group, o, pixel):
    """The sums of codes of one column, of the pixels from `pixel` of the block on; u and codes in bytes, sums of one slice in 16 bits."""
    for k in range(shape.slices):
        tables = at.tables + ((group * shape.out_channels + o) * shape.slices + k) * shape.sets * TABLE
        evens, odds = zero_shorts(0), zero_shorts(0)
        for z in range(shape.digits):
            kind = z * shape.slices + k
            factor = int64_at(at.factors, kind)
            if factor == 0:
                continue
            codes, beyond = load_table(at.codes + 2 * TABLE * kind), load_table(at.codes + 2 * TABLE * kind + TABLE)
            low, high = full_i8(int64_at(at.ends, 2 * kind)), full_i8(int64_at(at.ends, 2 * kind + 1))
            t = 0
            while t < shape.arrays:
                stop = min(t + shape.together, shape.arrays)
                q = full_i8(0)
                while t < stop:
                    u = _narrow_read(shape, at, tables, t, z, pixel)
                    if shape.clip:
                        u = smaller_bytes(larger_bytes(u, low), high)
                    q = added_bytes(q, picked_bytes(codes, u) if shape.small else picked_of_two(codes, beyond, u))
                    t += 1
                evens, odds = add_product_of_evens(evens, q, factor), add_product_of_odds(odds, q, factor)
        place = at.sums + 4 * ((int64_at(at.step_of_slice, k) * shape.out_channels + o) * at.sums_stride + pixel)
        add_to_sums(place, evens, int64_at(at.worth, k))
        add_to_sums(place + 2 * PIXELS, odds, int64_at(at.worth, k))


@inlined
def _narrow_read(shape, at, tables, t, z, pixel):
    """u of array t and digit z."""
    u = full_i8(0)
    first_set, end_set = int64_at(at.set_start, t), int64_at(at.set_start, t + 1)
    first, bit = int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1) - 1
    while True:
        planes = at.planes + bit * at.bit_stride + pixel
        for s in range(first_set, end_set):
            u = added_bytes(u, picked_bytes(load_table(tables + s * TABLE), load_bytes(planes + int64_at(at.place, s))))
        if bit == first:
            return u
        bit -= 1
        u = added_bytes(u, u)


@inlined
def _broad_column(shape, at, group, o, pixel):
    """The same with u in 16 bits and codes in float32."""
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
                    q = full_f32(np.float32(0))
                    for t in range(shape.arrays):
                        q = add_product_f32(q, _broad_code(shape, at, _broad_read(shape, at, tables, t, z, half), kind), np.float32(1))
                    total = add_product_of_floats(total, q, factor * int64_at(at.worth, k))
            store_ints(at.sums, (step * shape.out_channels + o) * at.sums_stride + half, total)


@inlined
def _broad_read(shape, at, tables, t, z, pixel):
    """u of array t and digit z, of a vector of pixels."""
    u = full_i16(0)
    first_set, end_set = int64_at(at.set_start, t), int64_at(at.set_start, t + 1)
    first, bit = int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1) - 1
    while True:
        planes = at.planes + bit * at.bit_stride + pixel
        for s in range(first_set, end_set):
            u = added_shorts(u, picked_shorts(tables + s * TABLE, planes + int64_at(at.place, s)))
        if bit == first:
            return widened(u)
        bit -= 1
        u = added_shorts(u, u)


@inlined
def _broad_code(shape, at, u, kind):
    form = at.forms + 4 * FORM * kind
    low, high = float32_at(form, LOWEST), float32_at(form, HIGHEST)
    if shape.divide:
        return code_of_quotient_f32(u, float32_at(form, UNIT), float32_at(form, DELTA), low, high)
    return code_f32(u, float32_at(form, SCALE), low, high)


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
                if shape.narrow:  # even ones come first
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
            put_int32(at.acc, step * shape.slice_vectors * LANES + o, int32_at(at.sums, first + o * at.sums_stride))


_narrow, _broad = _kernel(True), _kernel(False)
