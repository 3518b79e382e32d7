"""The loop over a layer of many small groups: 64 groups to a vector, so that each lane has inputs and cells of its own.

Threads take output rows. The input bits of a row of the arrays are one word, a bit for each group; a read adds the cells of its rows
where that bit is one.
"""

from __future__ import annotations

from collections import namedtuple

import numba
import numpy as np

from ....kernels.cache import SOURCES
from ....kernels.inner import inlined, inner
from ....kernels.simd import float32_at, float64_at, int32_at, int64_at, put_int64, put_uint64, uint64_at
from ..common.buffers import DYNAMIC, HISTOGRAM, RANGES, STATIC, addresses, keep_alive, of_thread, target_of
from ..common.histogram import bin_of
from ..grid.cells_forms import FACTOR, FORM, HIGHEST, Forms, broad_code_of, code_of, factor_of
from ..vectors.loop import Kernel, loaded
from ..vectors.wide import (WIDE, add_product_by, add_product_f32, add_product_f32_where, add_product_f64, add_product_f64_where,
                            add_to_int32, add_to_int64, added, added_where, bit_of_64_bytes, code_f64_of_f32_by, full_f32,
                            full_f64, full_i16, full_i32, larger, load_ints, load_shorts, shifted_up, smaller, store_ints, widened)

STATIC_BROAD = 4  # STATIC with codes in float64 and sums in int64

# groups, blocks     of 64 groups; outputs: of a group
# classes            of n, see `MappedLayer.classes`
# rows, bits         word lines of all arrays of a group; bits of an input code
# stride, pitch      bytes from an output pixel's first input to the next one's, downwards; to the right
# chunk              rows whose sum 16 bits hold
GroupShape = namedtuple("GroupShape", "groups blocks outputs rows arrays bits digits slices classes steps stride pitch chunk")

# cells              int16 `[block, output, slice, row, lane]`
# row_at             bytes from the first input of an output pixel to that of each row
# array_start        first row of each array; digit_start: first input bit of each digit
# step_of_slice      which of the ADC steps each slice has
GroupLayout = namedtuple("GroupLayout", "cells row_at array_start digit_start step_of_slice")

# DYNAMIC, of each `[array, digit, slice, block, lane]`: -u_a, int32; step, float32; what a code is worth, float64
Ranges = namedtuple("Ranges", "minus_low delta factor")
NO_RANGES = Ranges(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0))

NO_OUT = np.zeros((0,) * 6, np.int32)

# What else `buffers.addresses` are made of: extremes, int32 `[array, digit, slice, block, 2, lane]`, and counts of this thread; of one work
# item masks, uint64 `[bit, row]`; lanes of each class of n, uint64 `[array, digit, class]`; u of one read; sums.
GroupNumbers = namedtuple("GroupNumbers", "extremes counts masks lanes reads acc")


def run(shape: GroupShape, layout: GroupLayout, forms: Forms, ranges: Ranges, x: np.ndarray, size: tuple[int, int], op: int, *,
        out: np.ndarray = NO_OUT, **target: np.ndarray | int) -> None:
    """Do `op` with every read of a layer: codes of STATIC and DYNAMIC are added to `out`, RANGES go to `extremes`, HISTOGRAM to
    `counts`.

    Args: x, codes uint8 `[N, H, W, channel of a group, group]`, padded on all sides, groups up to whole blocks; size, `(H', W')`; out,
            `[step, N, H', W', group, output]`, int32 or int64; target, other fields of `buffers.target_of`.
    """
    op = STATIC_BROAD if op == STATIC and forms.broad else op
    _kernels[op](len(x) * size[0], shape, layout, forms, ranges, out, target_of(**target), x, *size)


def _kernel(op):
    """The kernel for one `op`, see `kernel`. Its items are output rows."""
    def layer(arguments, item, sources=SOURCES):
        shape, layout, forms, ranges, out, target, x, height, width = loaded(arguments)
        image, y = item // height, item % height
        broad = op == STATIC_BROAD or op == DYNAMIC
        sums = shape.steps * shape.outputs * WIDE
        acc, broad_acc = np.zeros(0 if broad else sums, np.int32), np.zeros(sums if broad else 0, np.int64)
        masks, reads = np.empty(shape.bits * shape.rows, np.uint64), np.empty(WIDE, np.int32)
        lanes = np.empty(shape.arrays * shape.digits * shape.classes, np.uint64)
        thread = numba.get_thread_id() if op == RANGES or op == HISTOGRAM else 0
        at = addresses((target, layout, forms, ranges, GroupNumbers(
            of_thread(target.extremes, thread), of_thread(target.counts, thread), masks.ctypes.data, lanes.ctypes.data, reads.ctypes.data,
            broad_acc.ctypes.data if broad else acc.ctypes.data)))
        first = x.ctypes.data + image * x.strides[0] + y * shape.stride
        for block in range(shape.blocks):
            for column in range(width):
                _list_masks(shape, at, first + column * shape.pitch + block * WIDE)
                if shape.classes > 1 or op == HISTOGRAM:
                    _list_lanes(shape, at)
                acc[:] = 0
                broad_acc[:] = 0
                for output in range(shape.outputs):
                    for k in range(shape.slices):
                        for t in range(shape.arrays):
                            _reads(shape, at, block, output, k, t, op)
                if op == STATIC:
                    _put(shape, acc, out[:, image, y, column, block * WIDE:(block + 1) * WIDE])
                elif broad:
                    _put(shape, broad_acc, out[:, image, y, column, block * WIDE:(block + 1) * WIDE])
        keep_alive((masks, lanes, reads, acc, broad_acc))

    return Kernel(layer, f"grouped_layer_{op}")


@inner
def _put(shape, sums, out):
    """The accumulators of one pixel, `[step, output, lane]`, to `out`, `[step, group, output]`."""
    for step in range(shape.steps):
        for output in range(shape.outputs):
            first = (step * shape.outputs + output) * WIDE
            for lane in range(out.shape[1]):
                out[step, lane, output] = sums[first + lane]


@inlined
def _list_masks(shape, at, pixel):
    """The input bits of each row under one output pixel, whose first code is at address `pixel`."""
    for r in range(shape.rows):
        codes = int64_at(at.row_at, r)
        for i in range(shape.bits):
            put_uint64(at.masks, i * shape.rows + r, bit_of_64_bytes(pixel, codes, i))


@inlined
def _list_lanes(shape, at):
    """The lanes of each class of n under one output pixel, for each array and digit. n is counted in bit planes, one bit for each lane;
    the highest stays on where it has been, as the last class has all longer n too."""
    planes = shape.classes - 1
    for t in range(shape.arrays):
        for z in range(shape.digits):
            lanes, first_bit = at.lanes + 8 * (t * shape.digits + z) * shape.classes, int64_at(at.digit_start, z)
            for p in range(planes):
                put_uint64(lanes, 1 + p, np.uint64(0))
            for i in range(first_bit, int64_at(at.digit_start, z + 1)):
                for r in range(int64_at(at.array_start, t), int64_at(at.array_start, t + 1)):
                    carry, p = uint64_at(at.masks, i * shape.rows + r), max(0, min(i - first_bit, planes - 1))
                    while p < planes and carry != np.uint64(0):
                        plane = uint64_at(lanes, 1 + p)
                        put_uint64(lanes, 1 + p, plane | carry if p == planes - 1 else plane ^ carry)
                        carry, p = carry & plane, p + 1
            rest = ~np.uint64(0)
            for p in range(planes - 1, -1, -1):
                plane = uint64_at(lanes, 1 + p)
                put_uint64(lanes, 1 + p, plane & rest)
                rest &= ~plane
            put_uint64(lanes, 0, rest)


@inlined
def _read(shape, at, cells, t, z):
    """u of one read of 64 groups; their cells of one slice begin at address `cells`."""
    u = full_i32(0)
    first_bit, end = int64_at(at.digit_start, z), int64_at(at.array_start, t + 1)
    for i in range(first_bit, int64_at(at.digit_start, z + 1)):
        r = int64_at(at.array_start, t)
        while r < end:
            stop, total = min(end, r + shape.chunk), full_i16(0)
            while r < stop:
                total = added_where(total, load_shorts(cells, r * WIDE), uint64_at(at.masks, i * shape.rows + r))
                r += 1
            u = added(u, shifted_up(widened(total), i - first_bit))
    return u


@inlined
def _reads(shape, at, block, output, k, t, op):
    """Do `op` with the reads of all digits of one slice of an array."""
    cells = at.cells + 2 * WIDE * shape.rows * ((block * shape.outputs + output) * shape.slices + k)
    sums = (int64_at(at.step_of_slice, k) * shape.outputs + output) * WIDE
    if op == STATIC:
        single = full_f32(np.float32(0))
        for z in range(shape.digits):
            single = _with_codes(shape, at, single, cells, t, z, k)
        add_to_int32(at.acc, sums, single)
    elif op == STATIC_BROAD or op == DYNAMIC:
        double = full_f64(0.0)
        for z in range(shape.digits):
            if op == STATIC_BROAD:
                double = _with_broad_codes(shape, at, double, cells, t, z, k)
            else:
                u = _read(shape, at, cells, t, z)
                lanes = (((t * shape.digits + z) * shape.slices + k) * shape.blocks + block) * WIDE
                code = code_f64_of_f32_by(added(u, load_ints(at.minus_low, lanes)), at.delta, lanes,
                                          float32_at(at.singles, HIGHEST))
                double = add_product_by(double, code, at.factor, lanes)
        add_to_int64(at.acc, sums, double)
    else:
        for z in range(shape.digits):
            u = _read(shape, at, cells, t, z)
            if op == RANGES:
                lanes = (((t * shape.digits + z) * shape.slices + k) * shape.blocks + block) * 2 * WIDE
                store_ints(at.extremes, lanes, smaller(load_ints(at.extremes, lanes), u))
                store_ints(at.extremes, lanes + WIDE, larger(load_ints(at.extremes, lanes + WIDE), u))
            else:
                _count(shape, at, u, block, t, z, k)


@inlined
def _converted_lanes(shape, at, t, z, kind, j):
    """The lanes whose reads are of class j, where these have bits; else none. Args: kind, of class 0."""
    if factor_of(at.singles, kind + j) == 0:
        return np.uint64(0)
    return uint64_at(at.lanes, (t * shape.digits + z) * shape.classes + j)


@inlined
def _code(at, u, kind):
    """(ADC codes, their factor) of one kind of read, in float32."""
    return code_of(u, at.singles, kind, at.divide), factor_of(at.singles, kind)


@inlined
def _broad_code(at, u, kind):
    """The same by the formula, in float64."""
    return broad_code_of(u, at.doubles, kind), float64_at(at.doubles + 8 * FORM * kind, FACTOR)


def _with_codes_of(code, add_product, add_product_where):
    """A function for `total` and the ADC codes of one read times their factors, in one type of numbers: of lanes of each class by a
    converter of its own. Reads of 0 bits are not even added up."""
    @inlined
    def with_codes(shape, at, total, cells, t, z, k):
        kind = (z * shape.slices + k) * shape.classes
        if shape.classes == 1:
            return add_product(total, *code(at, _read(shape, at, cells, t, z), kind))
        u, known = full_i32(0), False
        for j in range(shape.classes):
            lanes = _converted_lanes(shape, at, t, z, kind, j)
            if lanes != np.uint64(0):
                if not known:
                    u, known = _read(shape, at, cells, t, z), True
                q, factor = code(at, u, kind + j)
                total = add_product_where(total, q, factor, lanes)
        return total

    return with_codes


_with_codes = _with_codes_of(_code, add_product_f32, add_product_f32_where)
_with_broad_codes = _with_codes_of(_broad_code, add_product_f64, add_product_f64_where)


@inlined
def _count(shape, at, u, block, t, z, k):
    """One more for each u of 64 groups in the counts of its kind and bin, int64."""
    store_ints(at.reads, 0, u)
    lanes = at.lanes + 8 * (t * shape.digits + z) * shape.classes
    for lane in range(min(WIDE, shape.groups - block * WIDE)):
        j = 0
        while int64_at(lanes, j) >> lane & 1 == 0:
            j += 1
        first = ((z * shape.slices + k) * shape.classes + j) * at.bins - at.first_bin
        one = first + bin_of(int32_at(at.reads, lane), at.bin_shift)
        put_int64(at.counts, one, int64_at(at.counts, one) + 1)


_kernels = {op: _kernel(op) for op in (STATIC, DYNAMIC, RANGES, HISTOGRAM, STATIC_BROAD)}
