"""Where everything stands that does not depend on the input: columns, blocks, words of cells, rows.

A *column* is one output channel of one slice; a block is 512 columns, one bit each, in one vector of `simd`. Vector v of
a block sits in bit `v // 2 + 8 (v % 2)` of its 16-bit words, the order in which `counts.to_bytes` gives the vectors back.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import njit, prange

from ....arrays.mapping import MappedLayer
from ....kernels.cache import SOURCES
from ....kernels.simd import LANES, aligned, load, set_threads, splat, store

BLOCK = 512  # columns of a block
TURN = 16  # rows that are counted at a time; lists of rows end with so many entries of row 0, all zero

# A layer as the kernel sees it: numbers in `ColumnShape`, tables in `ColumnLayout`.
ColumnShape = namedtuple("ColumnShape", """
    out_channels channels groups arrays
    stride_y stride_x pad_top pad_left reach_y
    input_bits cell_bits digits classes slices
    slice_vectors blocks
    passes packed
    slots
    read_scale below above one_reference
    steps counters""")
# out_channels, channels   of one group; arrays: of one group too
# reach_y                  input rows that a kernel spans
# classes                  of n, see `MappedLayer.classes`
# slice_vectors, blocks    vectors of columns of one slice; blocks of all slices
# passes, packed           bits of a cell that are counted one after the other; that stand side by side
# slots                    entries of the lists of one pixel and input bit, with room for one array's list
# read_scale               `u = read_scale P - 2 r_k n`
# below, above             over all slices, a read with n ones among its inputs has its u in `-below n .. above n`
# one_reference            whether all slices have the same reference
# steps                    different ADC steps: each has accumulators of its own
# counters                 sets of eight, see `Counted`

ColumnLayout = namedtuple("ColumnLayout", """
    weights array_base pass_stride
    segments segment_start intervals
    digit_start reference step_of_slice
    runs run_start run_columns merged merged_start
    turned counted counted_start counted_columns counter_slices""")
# weights, array_base      words of cells, see `_weight_planes`; where those of [group, array] begin
# pass_stride              words of one pass of an array
# segments, segment_start  `TAP_Y..ROW` of each segment; where those of each array begin
# intervals                `FIRST..SLOT` of each channel interval
# digit_start              first input bit of each digit
# reference                `2 r_k` of each slice, 0 where it is taken off behind the ADC
# step_of_slice            which of the ADC steps each slice has
# runs, run_start          `PAIR..SLICE` of each run; where those of each block begin; run_columns: see `_run_columns`
# merged, merged_start     the same for each [digit, block], runs of slices with one reference and one range; those of no bits
#                          are left out
# turned .. counter_slices  see `Counted`
TAP_Y, TAP_X, INTERVAL, ROW = range(4)  # of a segment: consecutive channels of one tap that an array holds
SEGMENT = 4  # fields of a segment
FIRST, LAST, SLOT = range(3)  # of a channel interval [first, last), whose active rows are listed from `slot` on
BOUNDS = 3  # fields of an interval
PAIR, PAIR_END, SLICE = range(3)  # of a run: vector pairs of one block that belong to one slice (`merged`: one table)
RUN = 3  # fields of a run


# How the reads of a block are counted by value (`histogram`): each value has eight counters, of 64 columns each. Those of a `turned` block
# are its pairs of vectors (`simd.by_bit`), so that slices whose reads go into the same bins are counted together.
# turned                        whether each block is
# counted, counted_start        `KIND, COUNTERS` of each run, a slice that says its bins, and its counters; where those of each block begin
# counted_columns               as `run_columns`, in the block's order
# counter_slices                `[counters, 8]`: the slice that each of the eight counts, or -1
Counted = namedtuple("Counted", "turned counted counted_start counted_columns counter_slices")
KIND, COUNTERS = range(2)  # of a run that is counted
COUNTED = 2  # its fields


def lay_out(layer: MappedLayer, side_by_side: bool = True) -> tuple[ColumnShape, ColumnLayout]:
    """(`ColumnShape`, `ColumnLayout`) of a layer; the bits of a cell may stand `side_by_side` where one block has room for them."""
    spec, groups = layer.spec, layer.geometry.groups
    out, slices = len(layer.w_codes) // groups, len(spec.slice_bits)
    slice_vectors = -(-out // (2 * LANES)) * 2  # vectors come in pairs, and a pair belongs to one slice
    packed = spec.cell_bits if side_by_side and spec.cell_bits * slices * slice_vectors * LANES <= BLOCK else 1
    passes = spec.cell_bits // packed
    blocks = -(-slices * slice_vectors * LANES // BLOCK)

    rows = np.array([stop - start for start, stop in layer.arrays], np.int64)
    pass_stride = (rows + 1) * blocks * LANES
    array_base = np.cumsum(np.concatenate([[0], np.tile(pass_stride * passes, groups)]))

    analog = spec.reference == "analog"
    reference = np.array(layer.reference_twice, np.int64) * analog
    cells = 2 ** np.array(spec.slice_bits, np.int64) - 1
    runs, run_start = _runs(range(slices), slice_vectors, blocks)
    merged, merged_start = _converted_runs(layer, slice_vectors, blocks)
    counted = _counted_runs(runs, run_start, list(zip(reference, spec.slice_bits)), slice_vectors, out)

    of_shape, of_layout = of_rows(layer)
    shape = ColumnShape(
        **of_shape, cell_bits=spec.cell_bits, slice_vectors=slice_vectors, blocks=blocks, passes=passes, packed=packed,
        read_scale=1 + analog, below=int(reference.max()), above=int(((1 + analog) * cells - reference).max()),
        one_reference=len(set(layer.reference_twice)) == 1, counters=len(counted.counter_slices))
    tables = ColumnLayout(
        **of_layout, weights=_weight_planes(layer, rows, pass_stride, array_base, slice_vectors, blocks, packed),
        array_base=array_base[:-1].reshape(groups, -1), pass_stride=pass_stride, reference=reference,
        runs=runs, run_start=run_start, run_columns=_run_columns(runs, run_start, slice_vectors, out),
        merged=merged, merged_start=merged_start, **counted._asdict())
    return shape, tables


def of_rows(layer: MappedLayer) -> tuple[dict, dict]:
    """The fields that say where rows and pixels stand: of `ColumnShape` and `CellShape`, and of `ColumnLayout` and `CellLayout`."""
    spec, geometry = layer.spec, layer.geometry
    intervals, segments = segments_of(layer, layer.group_channels)
    slot, step = np.cumsum([0] + [last - first + TURN for first, last in intervals]), step_of_slice(layer)
    shape = dict(
        out_channels=len(layer.w_codes) // geometry.groups, channels=layer.group_channels, groups=geometry.groups, arrays=len(layer.arrays),
        stride_y=geometry.stride[0], stride_x=geometry.stride[1], pad_top=geometry.padding[0], pad_left=geometry.padding[2],
        reach_y=(layer.kernel[0] - 1) * geometry.dilation[0] + 1, input_bits=spec.a_bits, slots=int(slot[-1] + layer.tallest + TURN),
        digits=len(spec.digit_bits), slices=len(spec.slice_bits), classes=layer.classes, steps=int(step.max()) + 1)
    return shape, dict(
        segments=np.array([segment for parts in segments for segment in parts], np.int64),
        segment_start=np.cumsum([0] + [len(parts) for parts in segments], dtype=np.int64),
        intervals=np.array([(*interval, at) for interval, at in zip(intervals, slot)], np.int64),
        digit_start=np.cumsum([0, *spec.digit_bits], dtype=np.int64), step_of_slice=step)


def step_of_slice(layer: MappedLayer) -> np.ndarray:
    """Which of the ADC steps each slice has, int64."""
    steps = np.zeros(len(layer.spec.slice_bits), np.int64)
    for step, (_, ks) in enumerate(layer.delta_groups if layer.spec.adc_range in ("calibrated", "full") else ()):
        steps[ks] = step
    return steps


def segments_of(layer: MappedLayer, most: int) -> tuple[list, list]:
    """The channel intervals of a layer, of at most so many rows, each once, and the segments of every array."""
    (_, kw), (dy, dx), channels = layer.kernel, layer.geometry.dilation, layer.group_channels
    intervals, segments = {}, []
    for start, stop in layer.arrays:
        parts, row = [], start
        while row < stop:
            tap, first = divmod(row, channels)
            last = min(channels, first + stop - row, first + most)
            interval = intervals.setdefault((first, last), len(intervals))
            parts.append((tap // kw * dy, tap % kw * dx, interval, row - start))
            row += last - first
        segments.append(parts)
    return list(intervals), segments


def _weight_planes(layer, rows, pass_stride, array_base, slice_vectors, blocks, packed):
    """Bits of the cells, 16-bit words [group, array, pass, row + 1, block, lane]; row 0 is all zero.

    Column `(slice k, channel o)` is column `c = 64 ceil(O / 64) k + o`, lane `c % 32` of vector `c // 32`; with all bits
    of a cell in one block, those of bit s stand `s` times the number of vectors further. Columns without a channel repeat
    one that has, so that they move no extreme and never clip alone.
    """
    spec, groups = layer.spec, layer.geometry.groups
    set_threads()
    w_rows = layer.w_rows.cpu().numpy()
    # (pass, block, bit of the word, bit of the code, first channel) of every vector of columns.
    vectors = len(spec.slice_bits) * slice_vectors
    place = np.array([(s // packed, v // 16, v % 16 // 2 + 8 * (v % 2), spec.cell_bits * (w % vectors // slice_vectors) + s,
                       w % slice_vectors * LANES)
                      for s in range(spec.cell_bits) for w in range(vectors if packed > 1 else 16 * blocks)
                      if s < spec.slice_bits[w % vectors // slice_vectors] for v in [w + s % packed * vectors]])
    words = aligned(int(array_base[-1]), np.empty(0, np.uint16))
    words[:] = 0
    first_word = np.concatenate([array_base[g * len(rows) + t] + (np.arange(rows[t]) + 1) * blocks * LANES
                                 for g in range(groups) for t in range(len(rows))]).reshape(groups, -1)
    pass_words = np.tile(np.repeat(pass_stride, rows), groups).reshape(groups, -1)
    _fill_planes(w_rows, place, slice_vectors * LANES, first_word, pass_words, words)
    return words


@njit(cache=True, parallel=True)
def _fill_planes(w_rows, place, padded, first_word, pass_words, words, sources=SOURCES):
    """Set the bits of `words`; place: see `_weight_planes`; padded, channels of all vectors of a slice."""
    groups, rows, out = w_rows.shape
    for row in prange(groups * rows):
        g, r = row // rows, row % rows
        codes = np.empty(padded, np.uint16)
        for first in range(0, padded, out):  # again from the first channel where there are no more
            for o in range(min(out, padded - first)):
                codes[first + o] = w_rows[g, r, o]
        for i in range(len(place)):
            step, block, bit, code_bit, channel = place[i, 0], place[i, 1], place[i, 2], place[i, 3], place[i, 4]
            start = first_word[g, r] + step * pass_words[g, r] + block * LANES
            bits = (load(codes.ctypes.data, channel) >> splat(code_bit)) & splat(1)
            store(words.ctypes.data, start, load(words.ctypes.data, start) | (bits << splat(bit)))
        codes[0] = 0  # keeps the array until here


def _runs(kinds, slice_vectors, blocks):
    """Runs of every block, and where the runs of each block begin: pairs of adjacent slices of one kind."""
    pairs = slice_vectors // 2
    start, runs = [0], []
    for block in range(blocks):
        pair, end = block * 8, min(block * 8 + 8, len(kinds) * pairs)
        while pair < end:
            k, stop = pair // pairs, pair
            while stop < end and kinds[stop // pairs] == kinds[k]:
                stop += 1
            runs.append((pair - block * 8, stop - block * 8, k))
            pair = stop
        start.append(len(runs))
    return np.array(runs, np.int64), np.array(start, np.int64)


def _converted_runs(layer, slice_vectors, blocks):
    """Runs of every digit, class of n and block, slices of one reference and one range together, and where those of each begin."""
    start, runs = [0], []
    for z, j in np.ndindex(len(layer.spec.digit_bits), layer.classes):
        of_slice = [layer.converter(z, k, j) for k in range(len(layer.reference_twice))]
        found, found_start = _runs(list(zip(layer.reference_twice, of_slice)), slice_vectors, blocks)
        for first, end in zip(found_start, found_start[1:]):
            runs += [run for run in found[first:end] if of_slice[run[SLICE]].bits > 0]
            start.append(len(runs))
    return np.array(runs, np.int64).reshape(-1, RUN), np.array(start, np.int64)


def _run_columns(runs, run_start, slice_vectors, out):
    """The columns of each run that belong to a channel: bits of a vector, as the words of `_weight_planes` hold them."""
    columns = np.zeros((len(runs), LANES), np.uint16)
    for block, (first, last) in enumerate(zip(run_start, run_start[1:])):
        for run in range(first, last):
            pair, end, _ = runs[run]
            for v in range(2 * pair, 2 * end):
                channel = (block * 16 + v) % slice_vectors * LANES + np.arange(LANES)
                columns[run, channel < out] |= np.uint16(1 << (v // 2 + 8 * (v % 2)))
    return columns


def _counted_runs(runs, run_start, kinds, slice_vectors, out):
    """`Counted`. Args: kinds, of slices: those of one kind have the same bins."""
    blocks, pairs = len(run_start) - 1, slice_vectors // 2
    alike, alike_start = _runs(kinds, slice_vectors, blocks)
    columns, of_alike = (_run_columns(*each, slice_vectors, out) for each in ((runs, run_start), (alike, alike_start)))
    turned, counted, start, found, counters = [], [], [0], [], {}
    for block in range(blocks):
        apart, together = (slice(*starts[block:block + 2]) for starts in (run_start, alike_start))
        turned.append(len(runs[apart]) > len(alike[together]) + 1)  # to turn its planes takes about as long as to count a run
        if turned[-1]:
            of_pairs = [k if k < len(kinds) else -1 for k in (np.arange(8 * block, 8 * block + 8) // pairs).tolist()]
            counted += [(k, counters.setdefault(tuple(of_pairs), len(counters))) for *_, k in alike[together].tolist()]
            bits = np.unpackbits(of_alike[together].view(np.uint8), axis=1, bitorder="little").reshape(-1, 64, 8)
            found.append(np.packbits(bits.transpose(0, 2, 1).reshape(-1, 512), axis=1, bitorder="little").view(np.uint16))
        else:
            counted += [(k, counters.setdefault((k,) * 8, len(counters))) for *_, k in runs[apart].tolist()]
            found.append(columns[apart])
        start.append(len(counted))
    return Counted(np.array(turned, np.int64), np.array(counted, np.int64), np.array(start, np.int64), np.concatenate(found),
                   np.array(list(counters), np.int64))
