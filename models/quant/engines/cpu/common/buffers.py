"""What the loops of the kernel work with: buffers of one work item, and everything by its address.

Numba counts a reference whenever an array is taken out of a tuple or given to a function, and wraps negative indices; in the
innermost loops either costs more than the arithmetic. So functions that run once a read or more often take no arrays. They
take `shape` (`layout.ColumnShape`), `at` (`addresses`) and `read` (`Read`), tuples of plain numbers, which cost nothing when the
compiler puts one function into the other, and fetch from memory with `simd.int64_at` and its like.
"""

import functools
from collections import namedtuple

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from ....arrays.mapping import MappedLayer
from ....kernels.inner import inlined, inner
from ....kernels.output import NOT_TO_CODES, ToCodes
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
NO_COUNTS = np.empty((0,) * 6, np.int64)

# Where results go; arrays that `op` does not write are empty.
# out         accumulators `[step, N, H', W', out]`; or, with `values`, a float64 for each step, one array with the bits of
#             `float32(sum_step acc values) scale + offset`. Where `Adc.relative`, it holds the sum of all u / s before.
#             As int32 in any case, so that one compiled kernel serves all; wide: its elements are int64; floats: the sums of
#             all u are float32; step_size: elements of one ADC step
# scaling     whether there are `values`
# next_codes  where `to_codes`, `[N, H', W', out]`: in place of those bits the codes that the next layer makes of them by the numbers
#             gain .. factor of `output.ToCodes`
# extremes    smallest and largest u, `[thread, group, array, digit, slice, 2]`, or as the kernel says
# counts      of u, `[thread, digit, slice, class, bin]`, see `mapping.Bins`, of which are first_bin, bin_shift and bins; of bit planes
#             `[thread, digit, counters, class, bin, 8]`, see `layout.Counted`
Target = namedtuple("Target", "out step_size wide floats scaling values scale offset to_codes next_codes gain shift alpha factor "
                              "extremes counts first_bin bin_shift bins")


def target_of(out: np.ndarray = NO_OUT, to_codes: ToCodes = NOT_TO_CODES, values: np.ndarray = NO_VALUES, scale: np.ndarray = NO_SCALE,
              offset: np.ndarray = NO_SCALE, next_codes: np.ndarray = NO_CODES, extremes: np.ndarray = NO_COUNTS,
              counts: np.ndarray = NO_COUNTS, first_bin: int = 0, bin_shift: int = 0) -> Target:
    """`Target` with an `out` of int32, int64 or float32."""
    return Target(out.view(np.int32), out[:1].size, out.dtype == np.int64, out.dtype == np.float32, len(values) > 0, values, scale, offset,
                  len(to_codes.gain) > 0, next_codes, *to_codes, extremes, counts, first_bin, bin_shift, counts.shape[4])


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

# What else `addresses` are made of.
# n_intervals           of `ColumnLayout`
# exact, exact_acc      whether sums are int64, and those sums: in `cells_kernel`
# relative              of `Adc`, 0 but for STATIC
# counts                those of this thread
# look                  whether bit planes tell that a block of reads is quiet (`counts.any_outside`)
ColumnNumbers = namedtuple("ColumnNumbers", "n_intervals exact exact_acc relative counts look")

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


@functools.cache
def _addresses(fields):
    return namedtuple("Addresses", fields)


@intrinsic
def addresses(typingctx, parts):
    """All fields of several named tuples as one, with addresses in the place of arrays; of fields of one name the last one. This is `at`
    in the kernels."""
    places = {name: (i, j) for i, part in enumerate(parts) for j, name in enumerate(part.fields)}
    kinds = {name: parts[i][j] for name, (i, j) in places.items()}

    def codegen(context, builder, sig, args):
        values = {name: builder.extract_value(args[0], place) for name, place in places.items()}
        for name, kind in kinds.items():
            if isinstance(kind, types.Array):
                data = context.make_array(kind)(context, builder, values[name]).data
                values[name] = builder.ptrtoint(data, context.get_value_type(types.intp))
        return context.make_tuple(builder, sig.return_type, values.values())

    found = [types.intp if isinstance(kind, types.Array) else kind for kind in kinds.values()]
    return types.NamedTuple(found, _addresses(tuple(kinds)))(parts), codegen


@inlined
def of_thread(counts, thread):
    """Where those of a thread begin."""
    return counts.ctypes.data + thread * counts.strides[0]


@inner
def column_addresses(shape, layout, adc, target, buffers, thread, op):
    """`addresses` for one `op` of `planes.kernel`."""
    relative = adc.relative if op == STATIC else 0
    look = (op == RANGES or relative > 0) and shape.packed == 1 and shape.one_reference
    numbers = ColumnNumbers(len(layout.intervals), False, 0, relative, of_thread(target.counts, thread), look)
    return addresses((layout, adc, target, buffers, numbers))


@inner
def keep_alive(buffers):
    """Numba frees an array after its last use, and does not see the uses by address."""
