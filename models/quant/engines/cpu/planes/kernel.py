"""The loop over a layer: threads over images or bands of rows, then pixels, arrays, digits and blocks of 512 columns.

Nothing is stored but the sums of ADC codes of one output pixel, 16 bits a column and digit, added up in 32 bits before
they could pass 16 and when the pixel is done. What is done with a block of reads is in `codes`, `extremes`, `histogram` and
what becomes of the pixel in `finish`.
"""

from __future__ import annotations

import logging

import numba
import numpy as np
import torch
from numba.core import event

from ....kernels.cache import SOURCES
from ....kernels.inner import inlined, inner
from ....kernels.output import ToCodes
from ....kernels.simd import LANES, bit_length, int64_at, splat, uint8_at
from ..common.buffers import (BY_ONES, DYNAMIC, HISTOGRAM, MOST_LEAVES, RANGES, STATIC, Read, column_addresses, keep_alive, new_buffers,
                              target_of)
from ..common.finish import Pixel, finish_pixel
from ..common.histogram import count_values
from ..common.layout import BLOCK, ColumnLayout, ColumnShape
from ..common.rows import Source, active_rows, list_rows_under, rows_to_keep
from ..vectors.loop import Kernel, bands_of, loaded
from .codes import add_dynamic, add_static, converted_runs, shift_add
from .converter import Adc
from .counts import any_outside, clear, count
from .extremes import join_extremes, keep_extremes, spread_extremes

log = logging.getLogger(__name__)

_WHAT = {STATIC: "fixed ADC ranges", BY_ONES: "plans by ones", DYNAMIC: "dynamic ADC ranges", RANGES: "the ranges of a batch",
         HISTOGRAM: "histograms of the reads"}


class _SayCompiling(event.Listener):
    """Tells about the long waits. Numba reports a compilation only where its cache on disk holds none."""

    def on_start(self, compilation):
        for op, kernel in _kernels.items():
            if compilation.data["dispatcher"] is kernel.compiled:
                log.warning("compiling the numba kernel for %s; the result is kept, it takes 2 to 10 seconds, once",
                            _WHAT[op])

    def on_end(self, compilation):
        """The first result says it."""


def run(shape: ColumnShape, layout: ColumnLayout, adc: Adc, a_codes: torch.Tensor, size: tuple[int, int], op: int,
        **target: np.ndarray | int | ToCodes) -> None:
    """Do `op` with every read of a layer: codes of STATIC, BY_ONES and DYNAMIC go to `out` or `next_codes`, RANGES to `extremes`,
    HISTOGRAM to `counts`.

    Args: a_codes, uint8 `[N, H, W, in]`; size, `(H', W')`; target, what `buffers.target_of` takes.
    """
    bands = bands_of(len(a_codes), size[0])
    _kernels[op](len(a_codes) * bands, shape, layout, adc, target_of(**target), a_codes.numpy(), *size, bands)


def _kernel(op):
    """The kernel for one `op`: a constant to the compiler, which leaves out what belongs to the others. Its items are bands of rows."""
    def layer(arguments, item, sources=SOURCES):
        shape, layout, adc, target, codes, height, width, bands = loaded(arguments)
        image, band = item // bands, item % bands
        first, last = height * band // bands, height * (band + 1) // bands
        source = Source(codes.shape[1], codes.shape[2], rows_to_keep(shape))
        leaves = MOST_LEAVES if op == HISTOGRAM else 1
        buffers = new_buffers(shape, source.kept * source.width, len(layout.intervals), leaves)
        thread = numba.get_thread_id() if op == HISTOGRAM or op == RANGES else 0
        at = column_addresses(shape, layout, adc, target, buffers, thread, op)
        for group in range(shape.groups):
            if op == RANGES:
                spread_extremes(target.extremes[thread, group], buffers)
            else:
                _set_quiet(adc.quiet, buffers.quiet, op)
            group_codes = codes.ctypes.data + (image * source.height * source.width * shape.groups + group) * shape.channels
            added, listed = True, 0
            for y in range(first, last):
                listed = list_rows_under(shape, at, source, group_codes, y, listed)
                for x in range(width):
                    if added and op != RANGES and op != HISTOGRAM:
                        _clear_sums(shape, at)
                    added, idle = _reads_of_pixel(shape, at, source, group, y, x, op)
                    if op != RANGES and op != HISTOGRAM:
                        if added:
                            shift_add(shape, at, op)
                        channel = group * shape.out_channels
                        place = ((image * height + y) * width + x) * shape.groups * shape.out_channels + channel
                        finish_pixel(shape, at, Pixel(place, channel, int64_at(at.constant, group) + idle, added, 0))
            if op == RANGES:
                join_extremes(target.extremes[thread, group], buffers)
        keep_alive(buffers)

    return Kernel(layer, f"layer_{op}")


@inner
def _set_quiet(of_adc, quiet, op):
    """Of fixed ranges, the reads that add nothing; of DYNAMIC and HISTOGRAM an empty range, as all of theirs count. (Element by element:
    for arrays that might not fit, Numba compiles four seconds of error messages.)"""
    for t in range(quiet.shape[0]):
        for z in range(quiet.shape[1]):
            quiet[t, z, 0], quiet[t, z, 1] = (of_adc[z, 0], of_adc[z, 1]) if op == STATIC or op == BY_ONES else (1, 0)


@inlined
def _clear_sums(shape, at):
    """Zero the 16-bit sums and the accumulators before a pixel."""
    clear(at.sums, 0, shape.digits * shape.blocks * BLOCK // LANES)
    clear(at.acc, 0, 2 * shape.steps * shape.slice_vectors)


@inlined
def _reads_of_pixel(shape, at, source, group, y, x, op):
    """Do `op` with all reads of one output pixel and group.

    Returns: whether anything was added to the pixel's sums, and what its reads without a one add (DYNAMIC).
    """
    added, idle = at.relative == 0, 0
    for t in range(shape.arrays):
        active_rows(shape, at, source, t, y, x, 0, at.row_at, at.row_count)
        if (op == DYNAMIC or op == BY_ONES) and uint8_at(at.flush, group * shape.arrays + t):
            shift_add(shape, at, op)
            clear(at.sums, 0, shape.digits * shape.blocks * BLOCK // LANES)
        for z in range(shape.digits):
            read = _read(shape, at, group, t, z)
            if op == DYNAMIC and read.ones == 0:
                idle += int64_at(at.idle, (group * shape.arrays + t) * shape.digits + z)
            elif not _must_be_quiet(shape, at, read):
                added = _blocks_of_read(shape, at, read, op) or added
    return added, idle


@inlined
def _read(shape, at, group, t, z):
    """The `Read` of array `t` and digit `z`, whose active rows are listed."""
    first_bit, ones = int64_at(at.digit_start, z), 0
    for i in range(first_bit, int64_at(at.digit_start, z + 1)):
        ones += int64_at(at.row_count, i) << (i - first_bit)
    slot = (t * shape.digits + z) * shape.slices
    kind = z * shape.classes + min(bit_length(ones), shape.classes - 1)
    return Read(array=t, digit=z, kind=kind, first=group * shape.arrays * shape.digits * shape.slices + slot, slot=slot,
                cells=int64_at(at.array_base, group * shape.arrays + t), pass_stride=int64_at(at.pass_stride, t),
                ones=ones, depth=bit_length(ones * ((1 << shape.passes) - 1)))


@inlined
def _quiet(shape, at, read):
    """Range of the u that change nothing."""
    entry = 2 * (read.array * shape.digits * shape.classes + read.kind)
    return int64_at(at.quiet, entry), int64_at(at.quiet, entry + 1)


@inlined
def _must_be_quiet(shape, at, read):
    """Whether no u that so many ones can give changes anything."""
    low, high = _quiet(shape, at, read)
    return low <= -shape.below * read.ones and shape.above * read.ones <= high


@inlined
def _blocks_of_read(shape, at, read, op):
    """Do `op` with all columns of one read; returns whether anything was added to the sums."""
    added = False
    for block in range(shape.blocks):
        if op == STATIC or op == BY_ONES:
            first, end = converted_runs(shape, at, read, block)
            if first == end:  # the plan gives this digit and class no bits in any slice of the block
                continue
        count(shape, at, read, block)
        if op == HISTOGRAM:
            count_values(shape, at, read, block)
        elif not at.look or _any_loud(shape, at, read):
            if op == RANGES:
                keep_extremes(shape, at, read, block)
            elif op == DYNAMIC:
                add_dynamic(shape, at, read, block)
            else:
                add_static(shape, at, read, block, op)
            added = True
    return added


@inlined
def _any_loud(shape, at, read):
    """Whether a read of the block changes anything."""
    low, high = _quiet(shape, at, read)
    return any_outside(shape, at, read, low, high, splat(-1))


_kernels = {op: _kernel(op) for op in (STATIC, BY_ONES, DYNAMIC, RANGES, HISTOGRAM)}
event.register("numba:compile", _SayCompiling())
