"""The loop over a layer whose cells lie on a grid, tile by tile: sums of cells (`cells_rows`, `cells_matrix`), what reads have besides
(`cells_reads`), codes.

Threads take images or bands of rows. For a strip of output rows: arrays, slices, tiles of columns, pixels, digits. The cells of one
array and tile stay in the first-level cache while the pixels pass; the sums of a few pixels are kept there until they are converted,
the codes of all digits of a pixel are added in registers, and what is stored is their sum.
"""

from __future__ import annotations

from collections import namedtuple

import numba
import numpy as np
import torch

from ....kernels.cache import SOURCES
from ....kernels.inner import inlined, inner
from ....kernels.output import ToCodes
from ....kernels.simd import LANES, aligned, float32_at, float64_at, int32_at, int64_at, prefetch, put_int64
from ..common.buffers import DYNAMIC, HISTOGRAM, RANGES, STATIC, addresses, keep_alive, of_thread, target_of
from ..common.finish import Pixel, finish_pixel
from ..common.histogram import bin_of
from ..common.rows import Source, active_rows, list_rows_under, rows_to_keep
from ..vectors.amx import TILE_ROWS, configure, release
from ..vectors.loop import Kernel, bands_of, loaded
from ..vectors.picks import TURNED
from ..vectors.wide import (RAISED, WIDE, add_product_f32, add_product_f64, add_times_to_int32, add_to_int32, add_to_int64, added,
                            as_floats, code_f64_of_f32, full_f32, full_f64, full_i32, larger, load_ints, smaller, store_ints)
from ..vectors.wide_noise import ROUNDER
from .cells_compared import add_compared_codes, compared_codes_of_digits
from .cells_forms import DELTA, FACTOR, FORM, HIGHEST, Forms, broad_code_of, code_of, factor_of
from .cells_matrix import multiply, pack
from .cells_narrow import Narrow, narrow_codes_of_digits
from .cells_layout import Besides, CellLayout, CellShape
from .cells_reads import (COMPARED, COMPARED_SHORT, COMPARED_TREES, COMPARED_WIDE_TREES, NARROW, PLAIN, SHARED, SHORT, Place, add_curves,
                          add_inputs, add_noise, add_references, add_squares, adds_nothing, kind_of, moved, number_reads, read,
                          sums_of_cells)
from .cells_rows import add_rows, add_squared_rows
from .cells_thresholds import Compared
from .cells_trees import BLOCK, add_reads, convert_rest

STATIC_BROAD = 4  # STATIC with codes in float64 and sums in int64

STRIP = 128  # pixels that use a tile of cells while it is in the cache, or those of one row if they are more
LINE = 64  # bytes that the cache takes at a time
FEWEST = 8  # pixels for which a tile is fetched whole: fewer have most rows off

# Output pixels that are worked on together: the first `count` from row y on, `width` in a row; start, the number of the first.
Strip = namedtuple("Strip", "y width start count")

# Arrays of one work item.
# pixel_row_at, pixel_row_count   of each pixel of a strip and input bit, where its active rows are listed, and how many they are
# pixel_reference                 int32 `[slice, read]`, a read being a pixel and digit: sums of the reference cells of one array
# pixel_inputs                    int32 `[read]`: n, the sum of the digits of one array
# pixel_shared                    `[field, read]`, `cells_reads.SHARED` numbers of each, of one array and slice
# read_keys                       64 bits `[2, read]`: key of the image, and number of the first read
# pixel_squares                   sum of the squares of the digits under each pixel, of one array; drive: digit of each of its rows
# codes_row, panel                see `cells_matrix.pack`; sums: of a turn, int32 `[pixel, digit, column of a tile]`, u and perhaps B
# row_of_reads                    u of 64 columns
# waiting .. turned               of `cells_trees`. waiting: reads of each run that wait; of each of them read_scale, what its values are
#                                 multiplied by, int16, and read_sums, the first accumulator; turned: x, int16 `[TILE, TURNED]` and
#                                 `[run, TURNED, TILE]`
Buffers = namedtuple("Buffers", """
    lists ones pixel_row_at pixel_row_count pixel_reference pixel_inputs pixel_squares pixel_shared read_keys drive
    codes_row panel sums acc exact_acc step total row_of_reads waiting read_scale read_sums turned""")

# What else `buffers.addresses` are made of.
# n_intervals, n_parts   of `CellLayout` and of `parts`
# exact                  whether sums are int64; what else `finish` asks for is 0
# rounder                of curves: what they are rounded by the addition of
# worth, parts           of `Narrow` or `Compared`
# reads                  of one strip up to whole vectors: from one slice or field of what reads share to the next
# extremes, counts       of this thread: int32 `[group, array, digit, slice, 2, column]`, and as in `buffers.Target`
# read_columns, read_rows   the two parts of `Buffers.turned`
CellNumbers = namedtuple("CellNumbers", """n_intervals exact relative idle_is_known rounder worth parts n_parts reads extremes counts
    read_columns read_rows""")


def run(shape: CellShape, layout: CellLayout, forms: Forms, narrow: Narrow, compared: Compared, besides: Besides,
        a_codes: torch.Tensor, size: tuple[int, int], pixels: int, op: int, **target: np.ndarray | int | ToCodes) -> None:
    """Do `op` with every read of a layer, as `kernel.run`; one of `_kernels`.

    Args: a_codes, uint8 `[N, H, W, in]`; size, `(H', W')`; pixels, how many of the N H' W' output pixels there are.
    """
    bands = bands_of(len(a_codes), size[0])
    _kernels[op](len(a_codes) * bands, shape, layout, forms, narrow, compared, besides, target_of(**target), a_codes.numpy(), *size, pixels,
                 bands)


def _kernel(op):
    """The kernel for one `op`, see `kernel`. Its items are bands of output rows, done a strip of some rows at a time."""
    def layer(arguments, item, sources=SOURCES):
        shape, layout, forms, narrow, compared, besides, target, codes, height, width, pixels, bands = loaded(arguments)
        image, band = item // bands, item % bands
        first, last = height * band // bands, height * (band + 1) // bands
        lines = min(last - first, max(1, STRIP // width))
        source = Source(codes.shape[1], codes.shape[2], rows_to_keep(shape, lines))
        if shape.matrix:
            configure(layout.configuration.ctypes.data)
        buffers = _new_buffers(shape, source.kept * source.width, len(layout.intervals), lines * width, op)
        at = _addresses(layout, forms, narrow, compared, besides, target, buffers, numba.get_thread_id(), op)
        for group in range(shape.groups):
            group_codes = codes.ctypes.data + (image * source.height * source.width * shape.groups + group) * shape.channels
            listed = 0
            for y in range(first, last, lines):
                end = min(last, y + lines)
                for line in range(y, end):
                    listed = list_rows_under(shape, at, source, group_codes, line, listed)
                start = (image * height + y) * width
                count = min((end - y) * width, pixels - start)
                if op != RANGES and op != HISTOGRAM:
                    buffers.acc[:] = 0
                    buffers.exact_acc[:] = 0
                _reads_of_strip(shape, at, source, besides, group, group_codes, Strip(y, width, start, count), op)
                if op != RANGES and op != HISTOGRAM:
                    for x in range(count):
                        channel = group * shape.out_channels
                        place = (start + x) * shape.groups * shape.out_channels + channel
                        sums = x * shape.steps * shape.slice_vectors * LANES
                        finish_pixel(shape, at, Pixel(place, channel, int64_at(at.constant, group), True, sums))
        if shape.matrix:
            release()
        keep_alive(buffers)

    return Kernel(layer, f"cells_layer_{op}")


@inlined
def _reads_of_strip(shape, at, source, besides, group, codes, strip, op):
    """Do `op` with all reads of a strip; the codes of the image and group begin at address `codes`."""
    count = strip.count
    if at.noisy:
        number_reads(shape, at, besides, strip)
    for t in range(shape.arrays):
        for x in range(count):
            first = 8 * x * shape.input_bits
            active_rows(shape, at, source, t, strip.y + x // strip.width, x % strip.width, x, at.pixel_row_at + first,
                        at.pixel_row_count + first)
        if shape.matrix:
            pack(shape, at, source, codes, t, strip)
        array = group * shape.arrays + t
        add_inputs(shape, at, count)
        if at.noisy:
            add_squares(shape, at, count)
        if besides.referred:
            add_references(shape, at, group, t, count)
        for k in range(shape.slices):
            if at.curved:
                add_curves(shape, at, k, count)
            if at.noisy:
                add_noise(shape, at, count, t, k, op)
            for tile in range(shape.tiles):
                words = int64_at(at.array_base, array) + (k * shape.tiles + tile) * int64_at(at.tile_stride, t)
                for first in range(0, count, shape.turn):
                    end = min(count, first + shape.turn)
                    _prefetch(shape, at, words, int64_at(at.tile_stride, t), first, end, count)
                    if op == NARROW or op == SHORT or op == COMPARED_SHORT:
                        _reads_in_registers(shape, at, Place(group, t, array, k, tile * shape.tile, 0, 0), words, first, end, op)
                    elif op == COMPARED_TREES:
                        for x in range(first, end):
                            place = Place(group, t, array, k, tile * shape.tile, x, 0)
                            add_reads(shape, at, place, at.weights + 2 * words, _accumulator(shape, at, place), op)
                    else:
                        _sum_cells(shape, at, t, k, words, first, end, op)
                        _use_sums(shape, at, Place(group, t, array, k, tile * shape.tile, 0, 0), first, end, op)
                if op == COMPARED_TREES or op == COMPARED_WIDE_TREES:
                    convert_rest(shape, at, Place(group, t, array, k, tile * shape.tile, 0, 0), op)


@inlined
def _reads_in_registers(shape, at, place, words, first, end, op):
    """Do `op` with the reads of a tile, whose cells begin at element `words`, at the pixels `first` to `end` of a strip: the codes of all
    digits, times what they are worth, to the accumulators of both halves."""
    weights, worth = at.weights + 2 * words, int64_at(at.worth, place.k)
    for x in range(first, end):
        at_pixel = moved(place, 0, x, 0)
        behind, accumulator = moved(at_pixel, WIDE, x, 0), _accumulator(shape, at, at_pixel)
        for part in range(at.n_parts):
            z, last = int64_at(at.parts, part), int64_at(at.parts, part + 1)
            if op == COMPARED_SHORT:
                total0, total1 = compared_codes_of_digits(shape, at, weights, at_pixel, behind, z, last, op)
            else:
                total0, total1 = narrow_codes_of_digits(shape, at, weights, at_pixel, behind, z, last, op)
            add_times_to_int32(at.acc, accumulator, total0, worth)
            add_times_to_int32(at.acc, accumulator + WIDE, total1, worth)


@inlined
def _sum_cells(shape, at, t, k, words, first, end, op):
    """The sums of those reads, of array t and slice k, to `at.sums`."""
    for part in range(shape.sums):
        weights, sums = at.weights + 2 * (part * shape.words + words), at.sums + 4 * part * TILE_ROWS * shape.tile
        if shape.matrix:
            multiply(shape, at, weights, t, first * shape.digits, sums)
        else:
            add_rows(shape, at, weights, k, first, end, sums, op)
    if shape.squared:
        weights = at.weights + 2 * ((shape.sums - 1) * shape.words + words)
        add_squared_rows(shape, at, weights, k, first, end, at.sums + 4 * shape.sums * TILE_ROWS * shape.tile, op)


@inlined
def _use_sums(shape, at, tile, first, end, op):
    """Do `op` with the reads whose sums those are; tile, the `Place` of its first columns."""
    for x in range(first, end):
        if op == COMPARED_WIDE_TREES:
            place = moved(tile, 0, x, (x - first) * shape.digits * shape.tile)
            add_reads(shape, at, place, 0, _accumulator(shape, at, place), op)
            continue
        for half in range(0, min(shape.tile, shape.out_channels - tile.column), WIDE):
            place = moved(tile, half, x, (x - first) * shape.digits * shape.tile + half)
            if op == RANGES:
                _keep_extremes(shape, at, place, op)
            elif op == HISTOGRAM:
                _count_values(shape, at, place, op)
            elif op == STATIC or op == PLAIN:
                _add_codes(shape, at, place, op)
            elif op == COMPARED:
                add_compared_codes(shape, at, place, _accumulator(shape, at, place), op)
            else:
                _add_broad_codes(shape, at, place, op)


@inlined
def _prefetch(shape, at, words, stride, first, end, count):
    """Ask for the cells of the next tile, which stand behind those of this one at element `words`: rows are on in no order that the
    processor foresees. Pixels `first` to `end` ask for their share of them."""
    if count < FEWEST:
        return
    for part in range(shape.sums):
        cells = at.weights + 2 * (part * shape.words + words + stride)
        for line in range(2 * stride * first // count // LINE, 2 * stride * end // count // LINE):
            prefetch(cells + line * LINE)


@inlined
def _accumulator(shape, at, place):
    """The first accumulator of 64 columns of a pixel."""
    step = int64_at(at.step_of_slice, place.k)
    return (place.x * shape.steps + step) * shape.slice_vectors * LANES + place.column


@inlined
def _add_codes(shape, at, place, op):
    """STATIC and PLAIN: ADC codes of all digits of one pixel, times their factors, to its accumulators; float32 holds them exactly."""
    total = full_f32(np.float32(0))
    for z in range(shape.digits):
        if adds_nothing(shape, at, place.x, z, place.k, op):
            continue
        kind, u = kind_of(shape, at, place.x, z, place.k), as_floats(sums_of_cells(shape, at, place, z))
        if op != PLAIN:
            u = read(shape, at, place, z, op, u)
        total = add_product_f32(total, code_of(u, at.singles, kind, at.divide), factor_of(at.singles, kind))
    add_to_int32(at.acc, _accumulator(shape, at, place), total)


@inlined
def _add_broad_codes(shape, at, place, op):
    """STATIC_BROAD and DYNAMIC: the same in float64, by the formula."""
    total = full_f64(0.0)
    for z in range(shape.digits):
        if adds_nothing(shape, at, place.x, z, place.k, op):
            continue
        entry = _entry(shape, place, z) if op == DYNAMIC else kind_of(shape, at, place.x, z, place.k)
        u = read(shape, at, place, z, op, sums_of_cells(shape, at, place, z))
        if op == DYNAMIC:
            start, single = full_i32(-int64_at(at.low, entry)), at.singles + 4 * FORM * entry
            q = code_f64_of_f32(added(u, start), float32_at(single, DELTA), float32_at(single, HIGHEST))
        else:
            q = broad_code_of(u, at.doubles, entry)
        total = add_product_f64(total, q, float64_at(at.doubles + 8 * FORM * entry, FACTOR))
    add_to_int64(at.exact_acc, _accumulator(shape, at, place), total)


@inlined
def _entry(shape, place, z):
    """That of a read in tables `[group, array, digit, slice]`."""
    return (place.array * shape.digits + z) * shape.slices + place.k


@inlined
def _keep_extremes(shape, at, place, op):
    """Smallest and largest u of 64 columns, of each digit, into `extremes`, int32."""
    columns = shape.slice_vectors * LANES
    for z in range(shape.digits):
        u = read(shape, at, place, z, op, sums_of_cells(shape, at, place, z))
        low = 2 * columns * _entry(shape, place, z) + place.column
        high = low + columns
        store_ints(at.extremes, low, smaller(load_ints(at.extremes, low), u))
        store_ints(at.extremes, high, larger(load_ints(at.extremes, high), u))


@inlined
def _count_values(shape, at, place, op):
    """One more for each u of 64 columns, of each digit, in the counts of its kind and bin, int64."""
    columns = min(WIDE, shape.out_channels - place.column)
    for z in range(shape.digits):
        u = read(shape, at, place, z, op, sums_of_cells(shape, at, place, z))
        store_ints(at.row_of_reads, 0, u)
        start = kind_of(shape, at, place.x, z, place.k) * at.bins - at.first_bin
        for c in range(columns):
            one = start + bin_of(int32_at(at.row_of_reads, c), at.bin_shift)
            put_int64(at.counts, one, int64_at(at.counts, one) + 1)


@inner
def _new_buffers(shape, pixels, n_intervals, width, op):
    """`Buffers` for lists of so many input pixels and so many channel intervals, and a strip of so many pixels."""
    places = pixels * shape.input_bits
    reads = (width * shape.digits + WIDE - 1) // WIDE * WIDE  # up to whole vectors
    sums = width * shape.steps * shape.slice_vectors * LANES
    broad = op == STATIC_BROAD or op == DYNAMIC or op == COMPARED
    narrow_sums, broad_sums = 0 if broad else sums, sums if broad else 0
    runs, blocks = (shape.digits, shape.digits + 1) if op == COMPARED_TREES or op == COMPARED_WIDE_TREES else (0, 0)
    return Buffers(
        lists=np.empty((places + width * shape.input_bits) * shape.slots, np.uint32), ones=np.empty(places * n_intervals, np.int64),
        pixel_row_at=np.empty(width * shape.input_bits, np.int64), pixel_row_count=np.empty(width * shape.input_bits, np.int64),
        pixel_reference=np.zeros(reads * shape.reference_slices * (1 + shape.squared), np.int32), pixel_inputs=np.zeros(reads, np.int32),
        pixel_squares=np.empty(width * shape.digits, np.int64), pixel_shared=np.empty(reads * SHARED, np.float32),
        read_keys=np.zeros(2 * reads, np.int64),
        drive=np.zeros(shape.reference_rows + 1, np.int64),
        codes_row=np.empty(shape.panel_row, np.uint8),
        panel=aligned((width * shape.digits + TILE_ROWS) * 2 * shape.panel_row, np.empty(0, np.uint8)),
        sums=aligned((shape.sums + shape.squared) * TILE_ROWS * shape.tile, np.empty(0, np.int32)),
        acc=aligned(narrow_sums, np.empty(0, np.int32)), exact_acc=np.empty(broad_sums, np.int64),
        step=np.empty(shape.slice_vectors * LANES, np.int64), total=np.empty(shape.slice_vectors * LANES),
        row_of_reads=np.empty(WIDE, np.int32),
        waiting=np.zeros(runs, np.int64), read_scale=np.zeros(runs * TURNED, np.int16), read_sums=np.zeros(runs * TURNED, np.int64),
        turned=aligned(blocks * BLOCK, np.empty(0, np.int16)))


@inner
def _addresses(layout, forms, narrow, compared, besides, target, buffers, thread, op):
    """`buffers.addresses` for one `op`."""
    exact = op == STATIC_BROAD or op == DYNAMIC or op == COMPARED
    compares = op == COMPARED_SHORT or op == COMPARED_TREES or op == COMPARED_WIDE_TREES
    rounder = np.float32(RAISED if op == SHORT or op == COMPARED_SHORT or op == COMPARED_TREES else ROUNDER)
    parts, worth = compared.parts if compares else narrow.parts, compared.worth if compares else narrow.worth
    columns = buffers.turned.ctypes.data
    numbers = CellNumbers(
        n_intervals=len(layout.intervals), exact=exact, relative=0, idle_is_known=len(compared.idle) > 0, rounder=rounder, worth=worth,
        parts=parts, n_parts=len(parts) - 1, reads=buffers.pixel_inputs.size, extremes=of_thread(target.extremes, thread),
        counts=of_thread(target.counts, thread), read_columns=columns, read_rows=columns + 2 * BLOCK)
    return addresses((layout, forms, narrow, compared, besides, target, buffers, numbers))


_kernels = {op: _kernel(op) for op in (STATIC, DYNAMIC, RANGES, HISTOGRAM, STATIC_BROAD, PLAIN, SHORT, NARROW, COMPARED, COMPARED_SHORT,
                                     COMPARED_TREES, COMPARED_WIDE_TREES)}
