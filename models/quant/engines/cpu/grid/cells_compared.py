"""Codes by thresholds: of converters by a table, and of those whose thresholds are their own (`arrays.circuits`).

64 columns are compared with their thresholds, one of all columns after the other, and what a code is worth rises where a read reaches one.
Reads and thresholds are whole numbers, so that this is exact. Only thresholds between the smallest and the largest of the 64 reads come
into question: a table says which, for 2^9 spans of u.
"""

from __future__ import annotations

import itertools
from collections import namedtuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ....arrays.mapping import MappedLayer
from ....kernels.inner import inlined
from ....kernels.simd import _broadcast, _pointer, int32_at, int64_at
from ...reach import read_range
from ..vectors.wide import _I32, _INTS, _SHORTS, WIDE, _operation, added, full_i16, full_i32, ints, shorts, times, widened
from .cells_reads import adds_nothing, kind_of, read, sums_of_cells

MOST_BYTES = 2**31  # of the thresholds of a layer
SPANS = 9  # bits of the number of one

# Of a kind of read: x is u brought between LOW and HIGH, less LOW; SPAN, bits of x within a span; FIRST, where its thresholds begin in
# `thresholds`, and APART, how far those of one block of 64 columns are from the next; CODES and SPANS_AT, where its numbers begin in
# `values` and `rises`, and in `spans`; FACTOR, what values are multiplied by.
LOW, HIGH, SPAN, FIRST, APART, CODES, SPANS_AT, FACTOR = range(8)
FIELDS = 8

# short        whether 16 bits hold x
# kinds        int64 `[digit, slice, class, field]`
# thresholds   of each kind `[group, array, block of columns, threshold, column]`, uint16 or int32, in x
# values       what the codes of a kind are worth, int64; rises: by how much the next one is worth more
# spans        int32 `[span, 2]` of each kind: thresholds that all x of a span have reached, and that none is beyond
Compared = namedtuple("Compared", "short kinds thresholds values rises spans")
NOTHING_COMPARED = Compared(True, *(np.zeros(0, kind) for kind in (np.int64, np.uint8, np.int64, np.int64, np.int32)))


def unfit(layer: MappedLayer) -> str | None:
    """Why a layer whose codes follow from thresholds cannot be run so, or None."""
    spec = layer.spec
    kinds = list(np.ndindex(len(spec.digit_bits), len(spec.slice_bits), layer.classes))
    columns = len(layer.arrays) * layer.geometry.groups * _blocks(layer) * WIDE
    codes = {(k, layer.converter(z, k, j)): layer.converter(z, k, j).q_max for z, k, j in kinds}
    if (size := 4 * columns * sum(codes.values())) > MOST_BYTES and layer.readout is not None:
        return f"the thresholds of its converters take {size / 2**30:.0f} GB, which are too many"
    largest = sum(layer.converter(z, k, j).largest << (spec.dac_bits * z + spec.cell_bits * k) for z, k, j in kinds)
    if largest >= 2**31 or max(high - low for low, high in map(read_range, itertools.repeat(layer), range(len(spec.slice_bits)))) >= 2**31:
        return "codes or reads that 32 bits do not hold"
    return None


def _blocks(layer):
    return -(-len(layer.w_codes) // layer.geometry.groups // WIDE)


def compared_forms(layer: MappedLayer) -> Compared:
    """The thresholds of a layer whose ranges are fixed."""
    spec, shape = layer.spec, (len(layer.spec.digit_bits), len(layer.spec.slice_bits), layer.classes)
    kinds, found = np.zeros((*shape, FIELDS), np.int64), {}
    for z, k, j in np.ndindex(shape):
        converter = layer.converter(z, k, j)
        if converter.bits and (k, converter) not in found:
            found[k, converter] = _in_reads(layer.thresholds(z, k, j), *read_range(layer, k))
        kinds[z, k, j, FACTOR] = converter.factor << (spec.dac_bits * z + spec.cell_bits * k)
    short = all(high - low < 2**16 - 1 for _, low, high in found.values())
    tables, values, spans = [np.zeros(0, np.uint16 if short else np.int32)], [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
    places = {}
    for (k, converter), (x, low, high) in found.items():
        groups, arrays, columns, n = x.shape
        table = np.full((groups, arrays, 1 if columns == 1 else _blocks(layer), WIDE, n), high - low + 1, tables[0].dtype)
        table.reshape(groups, arrays, -1, n)[:, :, :WIDE if x.size == n else columns] = x
        span = max(0, (high - low).bit_length() - SPANS)
        ends = np.arange(2**SPANS + 1) << span
        places[k, converter] = low, high, span, sum(map(len, tables)), n * WIDE * (x.size > n), sum(map(len, values)), sum(map(len, spans))
        tables.append(table.swapaxes(-1, -2).ravel())
        values.append(converter.added(converter.q_min + np.arange(n + 1)) // converter.factor)
        spans.append(np.stack([np.searchsorted(x.max((0, 1, 2)), ends[:-1], "right"),
                               np.searchsorted(x.min((0, 1, 2)), ends[1:] - 1, "right")], axis=1))
    for z, k, j in np.ndindex(shape):
        kinds[z, k, j, :FACTOR] = places.get((k, layer.converter(z, k, j)), 0)
    values = np.concatenate(values)
    return Compared(short, kinds, np.concatenate(tables).view(np.uint8), values, np.diff(values, append=0),
                    np.concatenate(spans).astype(np.int32))


def _in_reads(thresholds, low, high):
    """(thresholds in x, LOW, HIGH) of reads from `low` to `high`: one that none reaches is HIGH - LOW + 1."""
    low, high = max(low, int(min(thresholds.min(), high)) - 1), min(high, int(max(thresholds.max(), low)))
    return (thresholds.clip(low, high + 1) - low).astype(np.int64), low, high


@inlined
def add_compared_codes(shape, at, place, accumulator, op):
    """The codes of all digits of one pixel, times their factors, to its accumulators."""
    total = full_i32(0)
    block = (place.group * shape.arrays + place.t) * ((shape.out_channels + WIDE - 1) // WIDE) + place.column // WIDE
    for z in range(shape.digits):
        if adds_nothing(shape, at, place.x, z, place.k, op):
            continue
        kind = at.kinds + 8 * FIELDS * kind_of(shape, at, place.x, z, place.k)
        u = read(shape, at, place, z, op, sums_of_cells(shape, at, place, z))
        x = _between(u, int64_at(kind, LOW), int64_at(kind, HIGH))
        spans, codes = at.spans + 8 * int64_at(kind, SPANS_AT), int64_at(kind, CODES)
        i = int32_at(spans, 2 * (_least(x) >> int64_at(kind, SPAN)))
        end = int32_at(spans, 2 * (_largest(x) >> int64_at(kind, SPAN)) + 1)
        row = int64_at(kind, FIRST) + block * int64_at(kind, APART)
        if at.short:
            x, value = _halved(x), full_i16(int64_at(at.worths, codes + i))
            while i < end:
                value = _risen_shorts(value, x, at.thresholds, row + i * WIDE, int64_at(at.rises, codes + i))
                i += 1
            worth = widened(value)
        else:
            worth = full_i32(int64_at(at.worths, codes + i))
            while i < end:
                worth = _risen_ints(worth, x, at.thresholds, row + i * WIDE, int64_at(at.rises, codes + i))
                i += 1
        total = added(total, times(worth, int64_at(kind, FACTOR)))
    add_ints_to_int64(at.exact_acc, accumulator, total)


@_operation(ints, ints, types.intp, types.intp)
def _between(b, u, low, high):
    """u brought between two numbers, less the first."""
    low, high = (_broadcast(b, b.trunc(number, _I32), _INTS) for number in (low, high))
    u = b.select(b.icmp_signed(">", u, low), u, low)
    return b.sub(b.select(b.icmp_signed("<", u, high), u, high), low)


def _reduced(name):
    def build(b, x):
        function = b.module.declare_intrinsic(f"llvm.vector.reduce.{name}.v{WIDE}i32", (), ir.FunctionType(_I32, [_INTS]))
        return b.sext(b.call(function, [x]), ir.IntType(64))
    return _operation(types.int64, ints)(build)


_least, _largest = _reduced("smin"), _reduced("smax")
_halved = _operation(shorts, ints)(lambda b, x: b.trunc(x, _SHORTS))


def _risen(kind, vector):
    @intrinsic
    def risen(typingctx, value, x, thresholds, place, rise):
        """`value + rise` where x has reached the thresholds from element `place` of the array at an address, else `value`."""
        def codegen(context, b, sig, args):
            value, x, thresholds, place, rise = args
            reached = b.icmp_unsigned(">=", x, b.load(_pointer(b, thresholds, place, vector.element, WIDE), align=2, typ=vector))
            return b.select(reached, b.add(value, _broadcast(b, b.trunc(rise, vector.element), vector)), value)
        return kind(kind, kind, types.intp, types.intp, types.int64), codegen
    return risen


_risen_shorts, _risen_ints = _risen(shorts, _SHORTS), _risen(ints, _INTS)


@intrinsic
def add_ints_to_int64(typingctx, address, offset, x):
    """Add integers of 32 bits to those from element `offset` of the int64 array at an address."""
    def codegen(context, b, sig, args):
        wide = ir.VectorType(ir.IntType(64), WIDE)
        pointer = _pointer(b, args[0], args[1], wide.element, WIDE)
        b.store(b.add(b.load(pointer, align=8, typ=wide), b.sext(args[2], wide)), pointer, align=8)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, ints), codegen
