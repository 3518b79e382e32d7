"""Codes by thresholds (`cells_thresholds`): columns are compared with theirs, one of all columns after the other, and what a code is worth
rises where a read reaches one. Reads and thresholds are whole numbers, so that this is exact.

Where 16 bits do, a read stays in registers from the sums of its cells to its codes, of 128 columns.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ....kernels.inner import inlined
from ....kernels.simd import _broadcast, _pointer, int32_at, int64_at, operation
from ..vectors.wide import (_I32, _INTS, _SHORTS, WIDE, added, added_shorts, as_shorts, full_i16, full_i32, halved,
                            ints, load_ints, load_shorts, shorts, times, widened)
from .cells_reads import SHORT, adds_nothing, kind_of, read, sums_of_cells, with_offsets
from .cells_rows import sum_shorts
from .cells_thresholds import (APART, CODES, FACTOR, FIELDS, FIRST, FLOOR, HIGH, IDLE, IDLE_APART, LOW, RISE, SPAN, SPANS_APART,
                               SPANS_AT, START, TOGETHER)


@inlined
def compared_codes_of_digits(shape, at, weights, place, next_place, z, end, op):
    """Sums of what the codes of the digits from z up to `end` are worth, of both halves."""
    total0 = total1 = full_i16(0)
    block = place.array * shape.tiles + place.column // shape.tile
    while z < end:
        if not adds_nothing(shape, at, place.x, z, place.k, op):
            kind = at.kinds + 8 * FIELDS * kind_of(shape, at, place.x, z, place.k)
            if at.idle_is_known and is_idle(shape, at, place, z):
                total0, total1 = with_shorts_at_rest(at, kind, block, total0, total1)
            else:
                total0, total1 = _with_codes(shape, at, weights, place, next_place, z, kind, block, total0, total1)
        z += 1
    return total0, total1


@inlined
def with_shorts_at_rest(at, kind, block, total0, total1):
    """The sums of both halves, and what the codes of an idle read are worth."""
    idle = int64_at(kind, IDLE) + block * int64_at(kind, IDLE_APART)
    return added_shorts(total0, load_shorts(at.idle, idle)), added_shorts(total1, load_shorts(at.idle, idle + WIDE))


@inlined
def _with_codes(shape, at, weights, place, next_place, z, kind, block, total0, total1):
    """The sums of both halves, and what the codes of digit z are worth."""
    x0, x1 = above_floor(shape, at, weights, place, next_place, z, kind)
    spans = at.spans + 8 * (int64_at(kind, SPANS_AT) + block * int64_at(kind, SPANS_APART))
    span, codes = int64_at(kind, SPAN), int64_at(kind, CODES)
    highest = int64_at(kind, HIGH) - int64_at(kind, LOW)
    i = int32_at(spans, 2 * (min(_least_short(x0, x1), highest) >> span))
    stop = int32_at(spans, 2 * (min(_largest_short(x0, x1), highest) >> span) + 1)
    first = full_i16(int64_at(at.worths, codes + i))
    total0, total1 = added_shorts(total0, first), added_shorts(total1, first)
    row = int64_at(kind, FIRST) + block * int64_at(kind, APART)
    rise = int64_at(kind, RISE)
    if rise:
        return _risen_to(at, total0, total1, x0, x1, row + 2 * WIDE * i, stop - i, codes + i, rise, 1)
    return _risen_to(at, total0, total1, x0, x1, row + 2 * WIDE * i, stop - i, codes + i, rise, 0)


@inlined
def above_floor(shape, at, weights, place, next_place, z, kind):
    """The reads of both halves as x, without a sign."""
    x0, x1 = sum_shorts(shape, at, weights, place.x, z, int64_at(kind, START))
    if at.noisy or at.curved or at.gained:
        x0, x1 = as_shorts(read(shape, at, place, z, SHORT, x0)), as_shorts(read(shape, at, next_place, z, SHORT, x1))
    else:
        x0, x1 = with_offsets(shape, at, place, x0), with_offsets(shape, at, next_place, x1)
    return _above(x0, int64_at(kind, FLOOR)), _above(x1, int64_at(kind, FLOOR))


@inlined
def _risen_to(at, total0, total1, x0, x1, row, count, code, rise, alike):
    """The sums of both halves, and for each of `count` thresholds from element `row` on that x has reached its rise: `rise` where `alike`,
    which the compiler knows, else that from entry `code` on. Some more than these are looked at, which it has not."""
    each = full_i16(rise)
    for i in range(0, count, TOGETHER):
        for more in range(i, i + TOGETHER):
            if alike == 0:
                each = full_i16(int64_at(at.rises, code + more))
            total0 = _risen_shorts(total0, x0, at.thresholds, row + 2 * WIDE * more, each)
            total1 = _risen_shorts(total1, x1, at.thresholds, row + 2 * WIDE * more + WIDE, each)
    return total0, total1


@inlined
def add_compared_codes(shape, at, place, accumulator, op):
    """The codes of all digits of one pixel, times their factors, to its accumulators, of 64 columns."""
    total = full_i32(0)
    for z in range(shape.digits):
        if not adds_nothing(shape, at, place.x, z, place.k, op):
            kind = at.kinds + 8 * FIELDS * kind_of(shape, at, place.x, z, place.k)
            if at.idle_is_known and is_idle(shape, at, place, z):
                total = added(total, worth_at_rest(shape, at, place, kind))
            else:
                worth = _worth_of_codes(shape, at, place, z, kind, _block(shape, place), op)
                total = added(total, times(worth, int64_at(kind, FACTOR)))
    add_ints_to_int64(at.exact_acc, accumulator, total)


@inlined
def _worth_of_codes(shape, at, place, z, kind, block, op):
    """What the codes of digit z are worth."""
    u = read(shape, at, place, z, op, sums_of_cells(shape, at, place, z))
    x = between(u, int64_at(kind, LOW), int64_at(kind, HIGH))
    spans, codes = at.spans + 8 * (int64_at(kind, SPANS_AT) + block * int64_at(kind, SPANS_APART)), int64_at(kind, CODES)
    i = int32_at(spans, 2 * (_least(x) >> int64_at(kind, SPAN)))
    end = int32_at(spans, 2 * (_largest(x) >> int64_at(kind, SPAN)) + 1)
    row = int64_at(kind, FIRST) + block * int64_at(kind, APART)
    if at.short:
        x, value, rise = halved(x), full_i16(int64_at(at.worths, codes + i)), int64_at(kind, RISE)
        evenly = full_i16(rise)
        while rise and i < end:
            value = _risen_shorts(value, x, at.thresholds, row + i * WIDE, evenly)
            i += 1
        while i < end:
            value = _risen_shorts(value, x, at.thresholds, row + i * WIDE, full_i16(int64_at(at.rises, codes + i)))
            i += 1
        return widened(value)
    worth = full_i32(int64_at(at.worths, codes + i))
    while i < end:
        worth = _risen_ints(worth, x, at.thresholds, row + i * WIDE, full_i32(int64_at(at.rises, codes + i)))
        i += 1
    return worth


@inlined
def _block(shape, place):
    """Of 64 columns."""
    return place.array * ((shape.out_channels + WIDE - 1) // WIDE) + place.column // WIDE


@inlined
def worth_at_rest(shape, at, place, kind):
    """What the codes of an idle read of 64 columns are worth."""
    return times(load_ints(at.idle, int64_at(kind, IDLE) + _block(shape, place) * int64_at(kind, IDLE_APART)), int64_at(kind, FACTOR))


@inlined
def is_idle(shape, at, place, z):
    """Whether no row of the array is on."""
    return int32_at(at.pixel_inputs, place.x * shape.digits + z) == 0


@operation(ints, ints, types.intp, types.intp)
def between(b, u, low, high):
    """u brought between two numbers, less the first."""
    low, high = (_broadcast(b, b.trunc(number, _I32), _INTS) for number in (low, high))
    u = b.select(b.icmp_signed(">", u, low), u, low)
    return b.sub(b.select(b.icmp_signed("<", u, high), u, high), low)


@operation(shorts, shorts, types.intp)
def _above(b, x, low):
    """What numbers without a sign are above one, down to 0."""
    function = b.module.declare_intrinsic(f"llvm.usub.sat.v{WIDE}i16", (), ir.FunctionType(_SHORTS, [_SHORTS] * 2))
    return b.call(function, [x, _broadcast(b, b.trunc(low, _SHORTS.element), _SHORTS)])


def _reduced(b, name, x):
    function = b.module.declare_intrinsic(f"llvm.vector.reduce.{name}.v{WIDE}i{x.type.element.width}", (),
                                          ir.FunctionType(x.type.element, [x.type]))
    return b.call(function, [x])


_least = operation(types.int64, ints)(lambda b, x: b.sext(_reduced(b, "smin", x), ir.IntType(64)))
_largest = operation(types.int64, ints)(lambda b, x: b.sext(_reduced(b, "smax", x), ir.IntType(64)))


@operation(types.int64, shorts, shorts)
def _least_short(b, x, y):
    """Of two vectors of numbers without a sign."""
    return b.zext(_reduced(b, "umin", b.select(b.icmp_unsigned("<", x, y), x, y)), ir.IntType(64))


@operation(types.int64, shorts, shorts)
def _largest_short(b, x, y):
    return b.zext(_reduced(b, "umax", b.select(b.icmp_unsigned(">", x, y), x, y)), ir.IntType(64))


def _risen(kind, vector):
    @operation(kind, kind, kind, types.intp, types.intp, kind)
    def risen(b, value, x, thresholds, place, rise):
        """`value + rise` where x has reached the thresholds from element `place` of the array at an address, else `value`."""
        reached = b.icmp_unsigned(">=", x, b.load(_pointer(b, thresholds, place, vector.element, WIDE), align=2, typ=vector))
        return b.select(reached, b.add(value, rise), value)
    return risen


_risen_shorts, _risen_ints = _risen(shorts, _SHORTS), _risen(ints, _INTS)


@operation(types.void, types.intp, types.intp, ints)
def add_ints_to_int64(b, address, offset, x):
    """Add integers of 32 bits to those from element `offset` of the int64 array at an address."""
    wide = ir.VectorType(ir.IntType(64), WIDE)
    pointer = _pointer(b, address, offset, wide.element, WIDE)
    b.store(b.add(b.load(pointer, align=8, typ=wide), b.sext(x, wide)), pointer, align=8)
