"""The loop over a layer: threads over images or bands of rows, then pixels, arrays, digits and blocks of 512 columns.

Nothing is stored but the sums of ADC codes of one output pixel, 16 bits a column and digit, added up in 32 bits before
they could pass 16 and when the pixel is done. What is done to a block of reads is in `counts`, `codes` and `extremes`.
"""

import logging
from collections import namedtuple

import numba
import numpy as np
from numba import literally, njit, prange
from numba.core import event

from .cache import SOURCES
from .output import NOT_TO_CODES, next_code, scale_sum
from .simd import LANES, aligned, bit_length, bits_of_float32, int64_at, splat
from .codes import DYNAMIC, HISTOGRAM, RANGES, STATIC, add_dynamic, add_static, add_static_by_table, shift_add
from .counts import MAX_PLANES, MOST_LEAVES, any_outside, count, count_values, to_bytes
from .exact import add_exact
from .extremes import join_extremes, keep_extremes, narrowest, spread_extremes
from .layout import BLOCK
from .rows import active_rows, list_rows

log = logging.getLogger(__name__)

# Where results go.
# out       accumulators `[step, N, H', W', out]`; or, with `values`, a float64 for each step, one plane with the bits of
#           `float32(sum_step acc values) scale + offset`. Where `Adc.relative`, it holds the sum of all u before.
# next_codes  `[N, H', W', out]`: in place of those bits the codes that the next layer makes of them, see `output.ToCodes`
# extremes  smallest and largest u, `[thread, group, array, digit, slice, 2]`
# counts    of u, `[thread, digit, slice, u - u_min, part]`: eight parts (`simd.add_ones`), or one where `exact`
Target = namedtuple("Target", "out values scale offset next_codes extremes counts u_min")

# Arrays of one work item. lists, ones: see `rows`; row_at, row_count: `rows.active_rows`; planes, bytes: P of one block;
# sums: 16-bit sums of codes [digit, block, vector]; acc, exact_acc: accumulators [step, channel], total: their scaled sum;
# lows, highs: extremes of [array, digit, slice] in each lane; own: of all lanes; window: reads of [array, digit] in it, ends
# included, change nothing, those that add nothing or move no extreme; leaves: `counts.count_values`.
Buffers = namedtuple("Buffers", """lists ones row_at row_count planes bytes sums acc exact_acc total lows highs own window
    leaves""")

# What the hot functions see of `Plan`, `Adc` and `Buffers`: addresses (see `simd`), one number.
Addresses = namedtuple("Addresses", """weights lists ones row_at row_count planes bytes sums acc lows highs own
    segments segment_start intervals n_intervals runs run_columns merged reference step_of_slice forms limits
    codes leaves""")


_WHAT = {STATIC: "fixed ADC ranges", DYNAMIC: "dynamic ADC ranges", RANGES: "the ranges of a batch",
         HISTOGRAM: "histograms of the reads"}


class _SayCompiling(event.Listener):
    """Tells about the long waits. Numba reports a compilation only where its cache on disk holds none."""

    def on_start(self, compilation):
        for op, layer in _layers.items():
            if compilation.data["dispatcher"] is layer:
                log.warning("compiling the numba kernel for %s; the result is kept, it takes 10 to 20 seconds, once", _WHAT[op])

    def on_end(self, compilation):
        """The first result says it."""


def run(shape, plan, table, a_codes, size, op, *, out=None, values=None, scale=None, offset=None, next_codes=None,
        to_codes=None, extremes=None, counts=None, u_min=0):
    """Do `op` with every read of a layer: codes of STATIC and DYNAMIC go to `out` or `next_codes`, RANGES to `extremes`,
    HISTOGRAM to `counts`; see `Target`.

    Args: a_codes, uint8 `[N, H, W, in]`; size, `(H', W')`; table, `converter.Adc`.
    """
    target = Target(
        out=np.empty((0,) * 5, np.int32) if out is None else out, values=np.empty(0) if values is None else values,
        scale=np.empty(0, np.float32) if scale is None else scale,
        offset=np.empty(0, np.float32) if offset is None else offset,
        next_codes=np.empty((0,) * 4, np.uint8) if next_codes is None else next_codes,
        extremes=np.empty((0,) * 6, np.int64) if extremes is None else extremes,
        counts=np.empty((0,) * 5, np.int64) if counts is None else counts, u_min=u_min)
    _layers[op](shape, plan, table, target, to_codes or NOT_TO_CODES, a_codes.numpy(), *size,
                _work_items(len(a_codes), size[0]))


def _work_items(images, height):
    """Work items of one call: bands of output rows where there are fewer images than threads can share."""
    return images * min(height, max(1, 8 * numba.get_num_threads() // max(images, 1)))


def _compiled(op):
    """The loop over a layer for one `op`: a constant to the compiler, which leaves out what belongs to the others."""
    def layer(shape, plan, table, target, to_codes, codes, height, width, items, sources=SOURCES):
        bands = items // max(len(codes), 1)
        for item in prange(items):
            image, band = item // bands, item % bands
            first, last = height * band // bands, height * (band + 1) // bands
            _band(shape, plan, table, target, to_codes, codes, image, first, last, width, op)

    layer.__qualname__ = f"layer_{op}"  # names its files in Numba's cache: two processes must not write to one of them
    return njit(cache=True, parallel=True)(layer)


@njit
def _band(shape, plan, table, target, to_codes, codes, image, first, last, width, op):
    """All output pixels of one image in rows first..last - 1."""
    op = literally(op)
    # Numba counts a reference whenever an array is taken out of a tuple or given to a function: not in the loop over blocks.
    array_base, plane_stride, digit_start = plan.array_base, plan.plane_stride, plan.digit_start
    run_start, merged_start = plan.run_start, plan.merged_start
    flush, idle_reads, constants = table.flush, table.idle, table.constant
    out, values, scale, offset, next_codes, extremes, counts, u_min = target
    in_height, in_width = codes.shape[1:3]
    arrays, digits = len(plane_stride), len(digit_start) - 1
    padded = shape.slice_vectors * LANES
    kept = 1  # input rows whose lists are kept, in turns: a power of two not below those that one output row needs
    while kept < shape.reach_y:
        kept *= 2
    buffers = _buffers(shape, plan, kept * in_width, op == HISTOGRAM and not table.exact)
    at = _addresses(plan, table, buffers)
    planes, sums, acc, exact_acc, total = buffers.planes, buffers.sums, buffers.acc, buffers.exact_acc, buffers.total
    lows, highs, own, window = buffers.lows, buffers.highs, buffers.own, buffers.window
    thread = numba.get_thread_id() if op == HISTOGRAM or op == RANGES else 0
    relative = op == STATIC and table.relative
    look = shape.packed == 1 and shape.one_reference and not table.exact and (op == RANGES or relative)

    for g in range(shape.groups):
        if op == RANGES:
            spread_extremes(extremes[thread, g], lows, highs, own, window)
        elif op == STATIC:
            window[:, :, 0], window[:, :, 1] = table.quiet_low, table.quiet_high
        else:
            window[:, :, 0], window[:, :, 1] = 1, 0
        added = True
        listed = 0
        for y in range(first, last):
            top = max(listed, y * shape.stride_y - shape.pad_top)
            listed = max(listed, min(in_height, y * shape.stride_y - shape.pad_top + shape.reach_y))
            for row in range(top, listed):
                start = (image * in_height + row) * in_width * shape.groups + g
                list_rows(shape, at, codes.ctypes.data + start * shape.channels, in_width, row & (kept - 1))
            for x in range(width):
                if added and table.exact:
                    exact_acc[:] = 0
                elif added:
                    sums[:] = 0
                    acc[:] = 0
                added = not relative  # whether anything is added to the sums of this pixel
                idle = 0
                for t in range(arrays):
                    active_rows(shape, at, t, y, x, kept, in_height, in_width)
                    if op == DYNAMIC and flush[g, t]:
                        shift_add(shape, at, digits, op)
                        sums[:] = 0
                    for z in range(digits):
                        bit, bit_end = digit_start[z], digit_start[z + 1]
                        n = 0
                        for i in range(bit, bit_end):
                            n += int64_at(at.row_count, i) << (i - bit)
                        if op == DYNAMIC and n == 0:
                            idle += idle_reads[g, t, z]
                            continue
                        low, high = window[t, z, 0], window[t, z, 1]
                        if low <= -shape.below * n and shape.above * n <= high:
                            continue
                        used = bit_length(n * ((1 << shape.passes) - 1))  # bit planes that a sum can reach
                        slot = (t * digits + z) * shape.slices
                        for block in range(shape.blocks):
                            count(shape, at, array_base[g, t] + block * LANES, plane_stride[t], bit, bit_end, used)
                            if table.exact:
                                add_exact(shape, plan, table, planes, used, n, g, t, z, block, op, exact_acc, extremes,
                                          counts, u_min, thread)
                                continue
                            if op == HISTOGRAM:
                                count_values(shape, at, counts[thread, z].ctypes.data, counts.shape[3], u_min, used, n,
                                             run_start[block], run_start[block + 1])
                                continue
                            if look and not any_outside(shape, at, used, n, low, high, splat(-1)):
                                continue
                            if op == RANGES:
                                if keep_extremes(shape, at, used, n, slot, run_start[block], run_start[block + 1], look):
                                    low, high = narrowest(lows, highs, own, slot, shape.slices)
                                    window[t, z, 0], window[t, z, 1] = low, high
                                continue
                            added = True
                            to_bytes(at, used)
                            if op == STATIC and n <= table.table_ones:
                                for run in range(merged_start[block], merged_start[block + 1]):
                                    add_static_by_table(shape, at, n, z, block, run)
                                continue
                            for run in range(run_start[block], run_start[block + 1]):
                                if op == STATIC:
                                    add_static(shape, at, relative, table.q_max, used, n, z, block, run)
                                else:
                                    add_dynamic(shape, at, table.q_max, used, n, g * arrays * digits * shape.slices + slot,
                                                z, block, run, n <= table.table_ones)
                if op == RANGES or op == HISTOGRAM:
                    continue
                if added and not table.exact:
                    shift_add(shape, at, digits, op)
                # The accumulators of this pixel to where they are wanted.
                o, end = g * shape.out_channels, (g + 1) * shape.out_channels
                constant = constants[g] + idle
                total[:] = 0
                for step in range(shape.steps):
                    lane = step * padded
                    if table.exact:
                        _finish(exact_acc[lane:lane + shape.out_channels], constant, out, values, step, image, y, x, o, total)
                    elif relative:  # `out` holds the sum of all u
                        pixel = out[0, image, y, x, o:end]
                        if added:
                            pixel += acc[:shape.out_channels]
                        _finish(pixel, constant, out, values, step, image, y, x, o, total)
                    else:
                        _finish(acc[lane:lane + shape.out_channels], constant, out, values, step, image, y, x, o, total)
                if len(to_codes.gain):
                    pixel_codes = next_codes[image, y, x, o:end]
                    for c in range(shape.out_channels):
                        pixel_codes[c] = next_code(scale_sum(total[c], scale[o + c], offset[o + c]), o + c, to_codes)
                elif len(values):
                    pixel = out[0, image, y, x, o:end]
                    for c in range(shape.out_channels):
                        pixel[c] = bits_of_float32(scale_sum(total[c], scale[o + c], offset[o + c]))
        if op == RANGES and not table.exact:
            join_extremes(extremes[thread, g], lows, highs)
    _keep_alive(buffers)


@njit
def _finish(acc, constant, out, values, step, image, y, x, first, total):
    """Accumulators of one ADC step to `out`, from channel `first` on, or with `values` to their scaled sum."""
    if len(values):
        for c in range(len(acc)):
            total[c] += (acc[c] + constant) * values[step]
    else:
        pixel = out[step, image, y, x, first:first + len(acc)]
        for c in range(len(acc)):
            pixel[c] = acc[c] + constant


@njit
def _buffers(shape, plan, pixels, with_leaves):
    arrays, digits, padded = len(plan.plane_stride), len(plan.digit_start) - 1, shape.slice_vectors * LANES
    places = pixels * shape.input_bits
    like, int16, int32 = plan.weights, np.empty(0, np.int16), np.empty(0, np.int32)
    slots = arrays * digits * shape.slices
    return Buffers(
        lists=np.empty((places + shape.input_bits) * shape.slots, np.uint32),
        ones=np.empty(places * len(plan.intervals), np.int64),
        row_at=np.empty(shape.input_bits, np.int64), row_count=np.empty(shape.input_bits, np.int64),
        planes=aligned(MAX_PLANES * LANES, like), bytes=aligned(16 * LANES, like),
        sums=aligned(digits * shape.blocks * BLOCK, like), acc=aligned(shape.steps * padded, int32),
        exact_acc=np.empty(shape.steps * padded, np.int64), total=np.empty(padded),
        lows=aligned(slots * LANES, int16), highs=aligned(slots * LANES, int16), own=np.empty((slots, 2), np.int64),
        window=np.empty((arrays, digits, 2), np.int64),
        leaves=aligned(MOST_LEAVES * LANES if with_leaves else 1, like))


@njit
def _addresses(plan, table, buffers):
    return Addresses(
        weights=plan.weights.ctypes.data, lists=buffers.lists.ctypes.data, ones=buffers.ones.ctypes.data,
        row_at=buffers.row_at.ctypes.data, row_count=buffers.row_count.ctypes.data, planes=buffers.planes.ctypes.data,
        bytes=buffers.bytes.ctypes.data, sums=buffers.sums.ctypes.data, acc=buffers.acc.ctypes.data,
        lows=buffers.lows.ctypes.data, highs=buffers.highs.ctypes.data, own=buffers.own.ctypes.data,
        segments=plan.segments.ctypes.data, segment_start=plan.segment_start.ctypes.data, intervals=plan.intervals.ctypes.data,
        n_intervals=len(plan.intervals), runs=plan.runs.ctypes.data,
        run_columns=plan.run_columns.ctypes.data, merged=plan.merged.ctypes.data, reference=plan.reference.ctypes.data,
        step_of_slice=plan.step_of_slice.ctypes.data, forms=table.forms.ctypes.data, limits=table.limits.ctypes.data,
        codes=table.codes.ctypes.data, leaves=buffers.leaves.ctypes.data)


@njit
def _keep_alive(buffers):
    """Numba frees an array after its last use, and does not see the uses by address."""


_layers = {op: _compiled(op) for op in (STATIC, DYNAMIC, RANGES, HISTOGRAM)}
event.register("numba:compile", _SayCompiling())
