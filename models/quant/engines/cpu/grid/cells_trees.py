"""Codes by thresholds, of 32 reads at a time: the reads of a tile are turned, so that those of one column, which all have one converter,
stand side by side. They go down a tree of its thresholds in registers, as in `pixels_compared`: each level is one look-up and one
comparison. What their codes are worth is turned back, and added up for each pixel.

Reads wait in a buffer until there are 32 whose digits have the same converters, a *run* of digits. Reads and thresholds are whole numbers,
so that this is exact.
"""

from __future__ import annotations

from ....kernels.inner import inlined, inner
from ....kernels.simd import int64_at, put_int64
from ..vectors.picks import SMALL_TREE, TURNED, put_worth_by_large_tree, put_worth_by_small_tree, turn
from ..vectors.wide import (WIDE, add_times_to_int32, added, added_shorts, full_i16, halved, load_ints, load_shorts, put_int16, put_signed,
                            store_ints, times, widened)
from .cells_compared import above_floor, between, is_idle, with_shorts_at_rest, worth_at_rest
from .cells_reads import COMPARED_TREES, adds_nothing, moved, read, sums_of_cells
from .cells_thresholds import APART, FIELDS, FIRST, HIGH, LOW

TILE = 2 * WIDE  # columns
BLOCK = TILE * TURNED  # reads of a buffer


@inlined
def add_reads(shape, at, place, weights, accumulator, op):
    """Put the reads of all digits of one pixel to those that wait. COMPARED_TREES: of a tile whose cells are at `weights`; else those whose
    sums are made. Args: accumulator, of the first column."""
    behind, tile = moved(place, WIDE, place.x, place.sums + WIDE), place.array * shape.tiles + place.column // TILE
    idle0 = idle1 = full_i16(0)
    idle = False
    for z in range(shape.digits):
        if not adds_nothing(shape, at, place.x, z, place.k, op):
            kind = _kind(shape, at, z, place.k)
            if at.idle_is_known and is_idle(shape, at, place, z):
                if op == COMPARED_TREES:
                    idle0, idle1 = with_shorts_at_rest(at, kind, tile, idle0, idle1)
                    idle = True
                else:
                    _add_ints(at.acc, accumulator, worth_at_rest(shape, at, place, kind))
                    if shape.out_channels - place.column > WIDE:
                        _add_ints(at.acc, accumulator + WIDE, worth_at_rest(shape, at, behind, kind))
            elif op == COMPARED_TREES:
                x0, x1 = above_floor(shape, at, weights, place, behind, z, kind)
                _wait(shape, at, tile, place, z, kind, x0, x1, accumulator, op)
            else:
                x0 = x1 = _above_low(shape, at, place, z, kind, op)
                if shape.out_channels - place.column > WIDE:
                    x1 = _above_low(shape, at, behind, z, kind, op)
                _wait(shape, at, tile, place, z, kind, x0, x1, accumulator, op)
        if idle and (z + 1 == shape.digits or int64_at(at.run_of, z + 1) != int64_at(at.run_of, z)):  # 16 bits hold the sum of a run
            add_times_to_int32(at.acc, accumulator, idle0, int64_at(at.worth, place.k))
            add_times_to_int32(at.acc, accumulator + WIDE, idle1, int64_at(at.worth, place.k))
            idle0 = idle1 = full_i16(0)
            idle = False


@inlined
def _kind(shape, at, z, k):
    """The fields of reads with a row that is on."""
    return at.kinds + 8 * FIELDS * ((z * shape.slices + k + 1) * shape.classes - 1)


@inlined
def _above_low(shape, at, place, z, kind, op):
    u = read(shape, at, place, z, op, sums_of_cells(shape, at, place, z))
    return halved(between(u, int64_at(kind, LOW), int64_at(kind, HIGH)))


@inlined
def _wait(shape, at, tile, place, z, kind, x0, x1, accumulator, op):
    """Put a read to those of its run, and convert them when they are enough."""
    run = int64_at(at.run_of, z)
    waiting, rows = int64_at(at.waiting, run), at.read_rows + 2 * BLOCK * run
    put_signed(rows, TILE * waiting, x0)
    put_signed(rows, TILE * waiting + WIDE, x1)
    put_int64(at.read_sums, run * TURNED + waiting, accumulator)
    put_int16(at.read_scale, run * TURNED + waiting, int64_at(at.scales, z * shape.slices + place.k))
    put_int64(at.waiting, run, waiting + 1)
    if waiting + 1 == TURNED:
        convert(shape, at, tile, place.k, z, kind, run, shape.out_channels - place.column, op == COMPARED_TREES)


@inlined
def convert_rest(shape, at, place, op):
    """Convert the reads of a tile that wait still."""
    for z in range(shape.digits):
        run = int64_at(at.run_of, z)
        if int64_at(at.waiting, run):
            kind = _kind(shape, at, z, place.k)
            convert(shape, at, place.array * shape.tiles + place.column // TILE, place.k, z, kind, run,
                    shape.out_channels - place.column, op == COMPARED_TREES)


@inner
def convert(shape, at, tile, k, z, kind, run, columns, paired):
    """Add what the codes of the reads that wait are worth to the accumulators. Args: tile, of all arrays; z, any digit of the run; columns,
    from the first of the tile to the last of the group; paired, whether columns are in the order of paired shorts."""
    rows, count = at.read_rows + 2 * BLOCK * run, TILE if columns > WIDE else WIDE
    tree = at.thresholds + 2 * (int64_at(kind, FIRST) + tile * TILE * int64_at(kind, APART))
    values = at.tree_values + 2 * ((z * shape.slices + k) << at.levels)
    scales = at.read_scale + 2 * TURNED * run
    _turn_tile(rows, 2 * TILE, 2 * TURNED, at.read_columns, 2 * TURNED, 2 * TURNED * TURNED, count)
    for column in range(count):
        reads = at.read_columns + 2 * TURNED * column
        if at.levels == SMALL_TREE:
            put_worth_by_small_tree(reads, tree, values, scales)
        else:
            put_worth_by_large_tree(reads, tree, values, scales)
        tree += 2 * int64_at(kind, APART)
    _turn_tile(at.read_columns, 2 * TURNED, 2 * TURNED * TURNED, rows, 2 * TILE, 2 * TURNED, count)
    i, end, worth = 0, int64_at(at.waiting, run), int64_at(at.worth, k)
    while i < end:
        total0 = total1 = full_i16(0)
        sums = int64_at(at.read_sums, run * TURNED + i)
        while i < end and int64_at(at.read_sums, run * TURNED + i) == sums:
            total0 = added_shorts(total0, load_shorts(rows, TILE * i))
            total1 = added_shorts(total1, load_shorts(rows, TILE * i + WIDE))
            i += 1
        _add(at.acc, sums, total0, worth, paired)
        if count > WIDE:
            _add(at.acc, sums + WIDE, total1, worth, paired)
    put_int64(at.waiting, run, 0)


@inlined
def _add(acc, place, total, worth, paired):
    if paired:
        add_times_to_int32(acc, place, total, worth)
    else:
        _add_ints(acc, place, times(widened(total), worth))


@inlined
def _add_ints(acc, place, x):
    store_ints(acc, place, added(load_ints(acc, place), x))


@inner
def _turn_tile(source, apart, far, target, other, beyond, columns):
    """Turn blocks of 32 x 32 of so many columns, `far` bytes apart and with rows `apart` bytes apart, to such with `beyond` and `other`."""
    for block in range(columns // TURNED):
        turn(source + block * far, apart, target + block * beyond, other)
