"""Vectors of 64 bytes, or of 64 lanes of 16 bits, that are picked from small tables in registers: one instruction looks 64 bytes up in a
table of 64, or 32 lanes of 16 bits in a table of 32 (AVX-512 VBMI and BW).

Call these only where `simd.has_byte_tables()`; elsewhere what is picked is undefined.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ....kernels.simd import _broadcast, _of_two_vectors, has_byte_tables, operation, vector_type
from .wide import _I16, _I32, _INTS, _SHORTS, WIDE, floats, ints, joined, shorts

_I8 = ir.IntType(8)
TABLE = 64  # bytes of a table: 2^6 bytes, or 2^5 numbers of 16 bits
table_bytes, _TABLE = vector_type("Vec64xI8", _I8, 64)
many_bytes, _BYTES = vector_type("Vec256xI8", _I8, 256)
many_shorts, _HALVES = vector_type("Vec128xI16", _I16, 128)
PIXELS = 256  # lanes of bytes: four vectors share the load of a table, and hide the time that one takes
BYTE_ROWS, SHORT_ROWS = 6, 5  # bits of an index


def _at(b, address, vector):
    return b.inttoptr(address, ir.PointerType(vector))


def _picked(b, name, kind, table, index):
    if not has_byte_tables():
        return ir.Constant(kind, ir.Undefined)
    function = b.module.declare_intrinsic(f"llvm.x86.avx512.permvar.{name}.512", (), ir.FunctionType(kind, [kind, kind]))
    return b.call(function, [table, index])


def _in_parts(b, index, lanes, build):
    """`build` of each part of so many lanes of a vector, put together again."""
    return joined(b, [build(b.shuffle_vector(index, index, ir.Constant(ir.VectorType(_I32, lanes), list(range(first, first + lanes)))))
                      for first in range(0, index.type.count, lanes)])


load_table = operation(table_bytes, types.intp)(lambda b, address: b.load(_at(b, address, _TABLE), align=1, typ=_TABLE))  # at an address
ints_of_bytes = operation(ints, types.intp)(lambda b, address: b.zext(b.load(_at(b, address, _TABLE), align=1, typ=_TABLE), _INTS))
load_bytes = operation(many_bytes, types.intp)(lambda b, address: b.load(_at(b, address, _BYTES), align=1, typ=_BYTES))
full_i8 = operation(many_bytes, types.intp)(lambda b, value: _broadcast(b, b.trunc(value, _I8), _BYTES))
added_bytes = operation(many_bytes, many_bytes, many_bytes)(lambda b, x, y: b.add(x, y))
less_bytes = operation(many_bytes, many_bytes, many_bytes)(lambda b, x, y: b.sub(x, y))
larger_bytes = operation(many_bytes, many_bytes, many_bytes)(lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y))
smaller_bytes = operation(many_bytes, many_bytes, many_bytes)(lambda b, x, y: b.select(b.icmp_signed("<", x, y), x, y))
zero_shorts = operation(many_shorts, types.intp)(lambda b, value: ir.Constant(_HALVES, [0] * _HALVES.count))


@operation(many_bytes, table_bytes, many_bytes)
def picked_bytes(b, table, index):
    """`table[index mod 64]` for each byte."""
    return _in_parts(b, index, TABLE, lambda part: _picked(b, "qi", _TABLE, table, part))


@operation(many_bytes, table_bytes, table_bytes, many_bytes)
def picked_of_two(b, low, high, index):
    """`table[index mod 128]` for each byte, of a table in two halves."""
    return _in_parts(b, index, TABLE, lambda part: _of_two_vectors(b, low, high, part))


@operation(many_bytes, types.intp, many_bytes)
def picked_of_four(b, address, index):
    """`table[index mod 256]` for each byte, of the 256 bytes at an address."""
    quarters = [b.load(_at(b, b.add(address, address.type(TABLE * i)), _TABLE), align=1, typ=_TABLE) for i in range(4)]

    def picked(part):
        low, high = (_of_two_vectors(b, *half, part) for half in (quarters[:2], quarters[2:]))
        return b.select(b.icmp_signed("<", part, ir.Constant(_TABLE, [0] * TABLE)), high, low)
    return _in_parts(b, index, TABLE, picked)


def _joined_bytes(b, total, low, high, odd):
    low, high = b.bitcast(low, _HALVES), b.bitcast(high, _HALVES)
    eight, lower, upper = (ir.Constant(_HALVES, [number] * _HALVES.count) for number in (8, 0xFF, 0xFF00))
    whole = b.or_(b.lshr(low, eight), b.and_(high, upper)) if odd else b.or_(b.and_(low, lower), b.shl(high, eight))
    return b.add(total, whole)


# `total + low + 256 high` in 16 bits, of the bytes with even numbers, or with odd ones.
_of_joined = operation(many_shorts, many_shorts, many_bytes, many_bytes)
add_joined_evens = _of_joined(lambda b, total, low, high: _joined_bytes(b, total, low, high, False))
add_joined_odds = _of_joined(lambda b, total, low, high: _joined_bytes(b, total, low, high, True))


def _scaled_bytes(b, total, x, factor, shift):
    halves = b.bitcast(x, _HALVES)
    eight = ir.Constant(_HALVES, [8] * _HALVES.count)
    signed = b.ashr(b.shl(halves, eight) if shift else halves, eight)
    return b.add(total, b.mul(signed, _broadcast(b, b.trunc(factor, _I16), _HALVES)))


# `total + x factor` in 16 bits, of the signed bytes x with even numbers, or with odd ones.
_of_product = operation(many_shorts, many_shorts, many_bytes, types.intp)
add_product_of_evens = _of_product(lambda b, total, x, factor: _scaled_bytes(b, total, x, factor, True))
add_product_of_odds = _of_product(lambda b, total, x, factor: _scaled_bytes(b, total, x, factor, False))


@operation(many_shorts, many_shorts, *[types.intp] * 10)
def codes_of_shorts(b, u, low, high, shift, offset, factor, fraction, even, towards_zero, bottom, top):
    """The codes of reads u, see `fixed_point`: u is brought between `low` and `high`, the code between `bottom` and `top`; `even` and
    `towards_zero` are -1 where ties go there, else 0."""
    lanes, wide = ir.VectorType(_I16, WIDE // 2), ir.VectorType(_I32, WIDE // 2)  # what instructions of 512 bits take
    low, high, shift, offset, factor, fraction, even, towards_zero, bottom, top = (
        _broadcast(b, b.trunc(number, _I16), lanes)
        for number in (low, high, shift, offset, factor, fraction, even, towards_zero, bottom, top))
    one, sign, half = (ir.Constant(kind, [number] * kind.count) for kind, number in ((lanes, 1), (lanes, 15), (wide, 16)))

    def codes(u):
        u = b.add(b.shl(_between(b, u, low, high), shift), offset)
        y = b.trunc(b.ashr(b.mul(b.sext(u, wide), b.sext(factor, wide)), half), lanes)
        y = b.add(y, b.and_(b.and_(b.ashr(y, fraction), one), even))
        y = b.add(y, b.and_(b.lshr(y, sign), towards_zero))
        return _between(b, b.ashr(y, fraction), bottom, top)
    return _in_parts(b, u, lanes.count, codes)


def _between(b, x, low, high):
    x = b.select(b.icmp_signed("<", x, high), x, high)
    return b.select(b.icmp_signed(">", x, low), x, low)


add_product_of_shorts = operation(many_shorts, many_shorts, many_shorts, types.intp)(
    lambda b, total, x, factor: b.add(total, b.mul(x, _broadcast(b, b.trunc(factor, _I16), _HALVES))))


@operation(types.boolean, many_bytes)
def any_byte(b, x):
    """Whether any byte is not 0."""
    some = b.icmp_unsigned("!=", x, ir.Constant(_BYTES, [0] * PIXELS))
    return b.icmp_unsigned("!=", b.bitcast(some, ir.IntType(PIXELS)), ir.Constant(ir.IntType(PIXELS), 0))


@operation(types.void, types.intp, many_bytes)
def store_bytes(b, address, x):
    """Write 256 bytes to an address."""
    b.store(x, _at(b, address, _BYTES), align=1)


@operation(types.void, types.intp, many_shorts, types.intp)
def add_to_sums(b, address, x, factor):
    """Add 128 numbers of 16 bits, times a factor, to the int32 at an address."""
    kind = ir.VectorType(_I32, _HALVES.count)
    pointer, factor = _at(b, address, kind), _broadcast(b, b.trunc(factor, _I32), kind)
    b.store(b.add(b.load(pointer, align=4, typ=kind), b.mul(b.sext(x, kind), factor)), pointer, align=4)


@operation(shorts, types.intp, types.intp)
def picked_shorts(b, table, index):
    """`table[index mod 32]` for 64 bytes at address `index`, of the 32 numbers of 16 bits at address `table`."""
    half = ir.VectorType(_I16, WIDE // 2)
    table = b.load(_at(b, table, half), align=2, typ=half)
    index = b.zext(b.load(_at(b, index, _TABLE), align=1, typ=_TABLE), _SHORTS)
    return _in_parts(b, index, WIDE // 2, lambda part: _picked(b, "hi", half, table, part))


@operation(ints, ints, types.intp, types.intp)
def with_picked_ints(b, total, table, index):
    """`total + table[index mod 32]` for 64 bytes at address `index`, of the 32 numbers of 32 bits at address `table`."""
    half = ir.VectorType(_I32, WIDE // 4)
    low, high = (b.load(_at(b, b.add(table, table.type(place)), half), align=4, typ=half) for place in (0, 4 * half.count))
    index = b.zext(b.load(_at(b, index, _TABLE), align=1, typ=_TABLE), _INTS)
    return b.add(total, _in_parts(b, index, half.count, lambda part: _of_two_vectors(b, low, high, part)))


def _looked_up(b, address, index, entries):
    """`table[index mod entries]` for 32 numbers of 16 bits, of so many at an address: a power of two from 32 on."""
    lanes = ir.VectorType(_I16, WIDE // 2)
    if entries == lanes.count:
        return _picked(b, "hi", lanes, b.load(_at(b, address, lanes), align=2, typ=lanes), index)
    if entries > 2 * lanes.count:
        half = ir.Constant(lanes, [entries // 2] * lanes.count)
        low, high = (_looked_up(b, b.add(address, address.type(place)), index, entries // 2) for place in (0, entries))
        return b.select(b.icmp_unsigned("!=", b.and_(index, half), ir.Constant(lanes, [0] * lanes.count)), high, low)
    low, high = (b.load(_at(b, b.add(address, address.type(place)), lanes), align=2, typ=lanes) for place in (0, entries))
    return _of_two_vectors(b, low, high, index)


SMALL_TREE, LARGE_TREE = 6, 8  # levels


def _down_tree(b, x, tree, values, levels):
    """`values[i - 2^levels]` of 32 numbers x, which go down a tree of 2^levels - 1 thresholds to i: see `pixels_compared`."""
    index = one = ir.Constant(x.type, [1] * x.type.count)
    for level in range(levels):
        entries = max(x.type.count, 2**level)  # the first levels stand side by side
        threshold = _looked_up(b, b.add(tree, tree.type(2 * (entries if 2**level >= entries else 0))), index, entries)
        twice = b.add(index, index)
        index = b.select(b.icmp_signed(">=", x, threshold), b.add(twice, one), twice)
    return _looked_up(b, values, index, 2**levels)


def _by_tree(levels):
    @operation(shorts, shorts, types.intp, types.intp)
    def worth_by_tree(b, x, tree, values):
        """What `_down_tree` gives for 64 numbers x."""
        return _in_parts(b, x, WIDE // 2, lambda part: _down_tree(b, part, tree, values, levels))
    return worth_by_tree


worth_by_small_tree, worth_by_large_tree = _by_tree(SMALL_TREE), _by_tree(LARGE_TREE)
TURNED = WIDE // 2  # lanes of 16 bits of a vector of 512


def _put_by_tree(levels):
    @operation(types.void, *[types.intp] * 4)
    def put_worth_by_tree(b, place, tree, values, scales):
        """In the place of the TURNED numbers at an address what `_down_tree` gives for them, times as many scales."""
        lanes = ir.VectorType(_I16, TURNED)
        x, scales = (b.load(_at(b, address, lanes), align=2, typ=lanes) for address in (place, scales))
        b.store(b.mul(_down_tree(b, x, tree, values, levels), scales), _at(b, place, lanes), align=2)
    return put_worth_by_tree


put_worth_by_small_tree, put_worth_by_large_tree = _put_by_tree(SMALL_TREE), _put_by_tree(LARGE_TREE)


def _interleaved(b, x, y, order):
    """[lanes of 128 bits of x and y whose numbers change by turns, of the first half of each lane; of the second one], or, with an
    order, whole lanes `[x or y, number]` of each."""
    lane = 8  # numbers
    every = range(0, TURNED, lane)
    if order is None:
        masks = [[first + half + i // 2 + i % 2 * TURNED for first in every for i in range(lane)] for half in (0, lane // 2)]
    else:
        masks = [[which * TURNED + lane * number + i for which, number in lanes for i in range(lane)] for lanes in order]
    return [b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, TURNED), mask)) for mask in masks]


def _turned(b, rows):
    """The columns of 32 vectors of 32 numbers as vectors. Of a number's place, row and column, three bits each change sides by three
    interleavings within lanes of 128 bits; the other two, the lane's, by exchanging lanes: each step is one cheap instruction."""
    for _ in range(3):
        rows = [row for first in range(0, TURNED, 8) for i in range(4)
                for row in _interleaved(b, rows[first + i], rows[first + i + 4], None)]
    halves, thirds = [[(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 2), (0, 3), (1, 2), (1, 3)]], [[(0, 0), (0, 2), (1, 0), (1, 2)],
                                                                                            [(0, 1), (0, 3), (1, 1), (1, 3)]]
    found = [None] * TURNED
    for i in range(8):
        (low, high), (low_2, high_2) = (_interleaved(b, rows[i + 8 * first], rows[i + 8 * first + 8], halves) for first in (0, 2))
        found[i], found[i + 8] = _interleaved(b, low, low_2, thirds)
        found[i + 16], found[i + 24] = _interleaved(b, high, high_2, thirds)
    return found


@operation(types.void, *[types.intp] * 4)
def turn(b, source, apart, target, other):
    """Write the columns of TURNED x TURNED numbers of 16 bits as rows: rows are `apart` bytes apart at `source`, `other` at `target`."""
    lanes = ir.VectorType(_I16, TURNED)
    rows = [b.load(_at(b, b.add(source, b.mul(apart, apart.type(i))), lanes), align=2, typ=lanes) for i in range(TURNED)]
    for i, row in enumerate(_turned(b, rows)):
        b.store(row, _at(b, b.add(target, b.mul(other, other.type(i))), lanes), align=2)


@operation(ints, ints, floats, types.intp)
def add_product_of_floats(b, total, x, factor):
    """`total + x factor` of whole numbers x, in 32 bits."""
    return b.add(total, b.mul(b.fptosi(x, _INTS), _broadcast(b, b.trunc(factor, _I32), _INTS)))
