"""What the loops of the kernel work with: buffers of one work item, and everything by its address.

Numba counts a reference whenever an array is taken out of a tuple or given to a function, and wraps negative indices; in the
innermost loops either costs more than the arithmetic. So functions that run once a read or more often take no arrays. They
take `shape` (`layout.ColumnShape`), `at` (`ColumnAddresses`) and `read` (`Read`), tuples of plain numbers, which cost nothing when the
compiler puts one function into the other, and fetch from memory with `simd.int64_at` and its like.
"""

from collections import namedtuple

import numpy as np
import torch

from ....arrays.mapping import MappedLayer
from ....kernels.inner import inner
from ....kernels.simd import LANES, aligned
from .layout import BLOCK

# What is done with a read. Each is compiled by itself: the number is a constant to the compiler, which leaves out the others. (4 to 7 are
# those of cells on a grid.)
STATIC = 0  # its ADC code, ranges fixed, to the accumulators
DYNAMIC = 1  # its ADC code, ranges of the batch, to the accumulators
RANGES = 2  # its u to the smallest and largest ones of the batch
HISTOGRAM = 3  # its u is counted
BY_ONES = 8  # as STATIC, with ranges that differ from class to class of n

MAX_PLANES = 32  # bit planes of P, which stays below 2^26
MOST_LEAVES = 2**11  # values of P that a histogram counts 512 columns at a time: a vector for each

# What is not asked for: Numba wants one type.
NO_OUT, NO_VALUES, NO_SCALE, NO_CODES = np.empty((0,) * 5, np.int32), np.empty(0), np.empty(0, np.float32), np.empty((0,) * 4, np.uint8)
NO_SCALING, NO_COUNTS = (NO_VALUES, NO_SCALE, NO_SCALE, NO_CODES), np.empty((0,) * 6, np.int64)

# Where results go; arrays that `op` does not write are empty.
# out         accumulators `[step, N, H', W', out]`; or, with `values`, a float64 for each step, one array with the bits of
#             `float32(sum_step acc values) scale + offset`. Where `Adc.relative`, it holds the sum of all u / s before.
#             As int32 in any case, so that one compiled kernel serves all; wide: its elements are int64; floats: the sums of
#             all u are float32
# next_codes  `[N, H', W', out]`: in place of those bits the codes that the next layer makes of them, see `output.ToCodes`
# extremes    smallest and largest u, `[thread, group, array, digit, slice, 2]`
# counts      of u, `[thread, digit, slice, class, u - u_min, part]`: eight parts (`simd.add_ones`)
Target = namedtuple("Target", "out wide floats values scale offset next_codes extremes counts u_min",
                    defaults=(*NO_SCALING, NO_COUNTS, NO_COUNTS, 0))

# Arrays of one work item, overwritten from pixel to pixel.
# lists, ones        active rows of the input rows at hand, and how many they are: see `rows`
# row_at, row_count  for each input bit, where the active rows of one array are listed, and their number
# planes, bytes      P of one block of columns in bit planes, and in bytes
# sums               16-bit sums of ADC codes, `[digit, block, vector, lane]`
# acc                accumulators, int32 `[step, channel]`; channels of whole vectors
# step, total        of one pixel, `[channel]`: accumulators of one ADC step, int64; their scaled sum, float64
# lows, highs        RANGES: smallest and largest u in each lane, `[array, digit, slice, lane]`
# seen               RANGES: those of all lanes, `[array, digit, slice, 2]`
# quiet              `[array, digit, class, 2]`: reads with a u from the first to the second change nothing (their code is 0, or
#                    every slice has seen smaller and larger ones) and are not looked at closely, or not at all
# leaves             HISTOGRAM: see `histogram`
Buffers = namedtuple("Buffers", """lists ones row_at row_count planes bytes sums acc step total lows highs seen
    quiet leaves""")

# Addresses of the arrays of `ColumnLayout`, `converter.Adc`, `Target` and `Buffers`, one line each, and numbers beside them.
# n_intervals           of `ColumnLayout`
# exact, exact_acc       whether sums are int64, and those sums: in `cells_kernel`
# relative .. constant   of `Adc`; relative holds for STATIC only
# counts                those of this thread; u_min, bins: lowest u and number of values that are counted
# step_size             of `out`: elements of one ADC step; wide, floats: see `Target`
# scaling, to_codes     whether there are `values`; whether there are `next_codes`
# gain .. factor        of `output.ToCodes`
# look                  whether bit planes tell that a block of reads is quiet (`counts.any_outside`)
ColumnAddresses = namedtuple("ColumnAddresses", """
    weights array_base pass_stride segments segment_start intervals n_intervals digit_start reference step_of_slice runs
    run_start run_columns merged merged_start
    exact relative table_ones q_max forms limits codes factors idle flush constant
    out step_size wide floats scaling values scale offset to_codes next_codes gain shift alpha factor
    counts u_min bins
    lists ones row_at row_count planes bytes sums acc exact_acc step total lows highs seen quiet leaves
    look""")

# The reads of all columns of one array at one output pixel, for one digit of the input.
# kind         digit and class of n, an entry of tables [digit, class]
# first        entry of its slice 0 in tables [group, array, digit, slice]; slot: in tables [array, digit, slice]
# cells        where the cells of its array begin in the weights; pass_stride: words from one bit of the cells to the next
# ones         n, the sum of its rows' digits
# depth        bit planes that hold any P with so many ones
Read = namedtuple("Read", "array digit kind first slot cells pass_stride ones depth")


def room_for_results(layer: MappedLayer, a_codes: torch.Tensor, steps: int, dtype: torch.dtype, scaling: dict) -> torch.Tensor:
    """`Target.out`: accumulators of `dtype`, or what `scaling` makes of them, nothing where that are the next layer's codes."""
    results = 0 if "next_codes" in scaling else 1 if scaling else steps
    size = layer.geometry.output_size(*a_codes.shape[1:3], layer.kernel)
    return torch.empty(results, len(a_codes), *size, len(layer.w_codes), dtype=torch.int32 if scaling else dtype)


@inner
def new_buffers(shape, pixels, n_intervals, leaves):
    """`Buffers` for lists of so many input pixels and so many channel intervals; with room for `leaves` vectors."""
    like, int16, int32 = np.empty(0, np.uint16), np.empty(0, np.int16), np.empty(0, np.int32)
    padded = shape.slice_vectors * LANES
    places = pixels * shape.input_bits
    slots = shape.arrays * shape.digits * shape.slices
    return Buffers(
        lists=np.empty((places + shape.input_bits) * shape.slots, np.uint32), ones=np.empty(places * n_intervals, np.int64),
        row_at=np.empty(shape.input_bits, np.int64), row_count=np.empty(shape.input_bits, np.int64),
        planes=aligned(MAX_PLANES * LANES, like), bytes=aligned(16 * LANES, like),
        sums=aligned(shape.digits * shape.blocks * BLOCK, like), acc=aligned(shape.steps * padded, int32),
        step=np.empty(padded, np.int64), total=np.empty(padded),
        lows=aligned(slots * LANES, int16), highs=aligned(slots * LANES, int16), seen=np.empty((slots, 2), np.int64),
        quiet=np.empty((shape.arrays, shape.digits * shape.classes, 2), np.int64), leaves=aligned(leaves * LANES, like))


@inner
def addresses(shape, layout, adc, target, to_codes, buffers, thread, op):
    """`ColumnAddresses` for one `op`."""
    relative = adc.relative if op == STATIC else 0
    look = (op == RANGES or relative > 0) and shape.packed == 1 and shape.one_reference
    words = 2 if target.wide else 1  # of an element of `out`
    return ColumnAddresses(
        weights=layout.weights.ctypes.data, array_base=layout.array_base.ctypes.data, pass_stride=layout.pass_stride.ctypes.data,
        segments=layout.segments.ctypes.data, segment_start=layout.segment_start.ctypes.data,
        intervals=layout.intervals.ctypes.data, n_intervals=len(layout.intervals), digit_start=layout.digit_start.ctypes.data,
        reference=layout.reference.ctypes.data, step_of_slice=layout.step_of_slice.ctypes.data,
        runs=layout.runs.ctypes.data, run_start=layout.run_start.ctypes.data, run_columns=layout.run_columns.ctypes.data,
        merged=layout.merged.ctypes.data, merged_start=layout.merged_start.ctypes.data,
        exact=False, relative=relative, table_ones=adc.table_ones.ctypes.data, q_max=adc.q_max,
        forms=adc.forms.ctypes.data, limits=adc.limits.ctypes.data, codes=adc.codes.ctypes.data,
        factors=adc.factors.ctypes.data, idle=adc.idle.ctypes.data,
        flush=adc.flush.ctypes.data, constant=adc.constant.ctypes.data,
        out=target.out.ctypes.data, step_size=target.out[:1].size // words, wide=target.wide, floats=target.floats,
        scaling=len(target.values) > 0, values=target.values.ctypes.data, scale=target.scale.ctypes.data,
        offset=target.offset.ctypes.data, to_codes=len(to_codes.gain) > 0, next_codes=target.next_codes.ctypes.data,
        gain=to_codes.gain.ctypes.data, shift=to_codes.shift.ctypes.data, alpha=to_codes.alpha, factor=to_codes.factor,
        counts=target.counts.ctypes.data + thread * target.counts.strides[0], u_min=target.u_min, bins=target.counts.shape[4],
        lists=buffers.lists.ctypes.data, ones=buffers.ones.ctypes.data, row_at=buffers.row_at.ctypes.data,
        row_count=buffers.row_count.ctypes.data, planes=buffers.planes.ctypes.data, bytes=buffers.bytes.ctypes.data,
        sums=buffers.sums.ctypes.data, acc=buffers.acc.ctypes.data, exact_acc=0,
        step=buffers.step.ctypes.data, total=buffers.total.ctypes.data,
        lows=buffers.lows.ctypes.data, highs=buffers.highs.ctypes.data,
        seen=buffers.seen.ctypes.data, quiet=buffers.quiet.ctypes.data, leaves=buffers.leaves.ctypes.data, look=look)


@inner
def keep_alive(buffers):
    """Numba frees an array after its last use, and does not see the uses by address."""
