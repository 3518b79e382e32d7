"""What a chip does to reads beside its cells, on 64 columns at a time: `readout` bit for bit."""

from __future__ import annotations

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ...readout import DEVIATION, GOLDEN, MIX_1, MIX_2, MIX_3, MIX_4, NORMAL
from .simd import _broadcast, _pointer, has_byte_tables
from .wide import _DOUBLES, _F64, _FLOATS, _I32, _INTS, WIDE, _call, ints

UNIT = np.float32(1 / DEVIATION)
_HALF, _BYTES, _WORDS = ir.VectorType(_I32, 16), ir.VectorType(ir.IntType(8), 64), ir.VectorType(ir.IntType(16), 32)


@njit(forceinline=True)
def _mix(x):
    x = x + types.uint64(GOLDEN)
    x = (x ^ (x >> types.uint64(30))) * types.uint64(MIX_3)
    x = (x ^ (x >> types.uint64(27))) * types.uint64(MIX_4)
    return x ^ (x >> types.uint64(31))


@njit(forceinline=True)
def read_key(seed, image, counter):
    """`readout.read_key` as a uint64."""
    golden = types.uint64(GOLDEN)
    return _mix(_mix(types.uint64(image) * golden + types.uint64(seed)) + types.uint64(counter) * golden)


def _lanes(value):
    return ir.Constant(_INTS, [value & 0xFFFFFFFF] * WIDE)


def _table_sums(b, x):
    """The sum of the four entries of NORMAL that the bytes of each lane name."""
    if has_byte_tables():
        return _table_sums_of_bytes(b, x)
    table = ir.GlobalVariable(b.module, ir.ArrayType(_I32, len(NORMAL)), b.module.get_unique_name("normal"))
    table.global_constant, table.linkage = True, "internal"
    table.initializer = ir.Constant(table.type.pointee, [v & 0xFFFFFFFF for v in NORMAL])
    total = _lanes(0)
    for shift in (0, 8, 16, 24):
        index, entries = b.and_(b.lshr(x, _lanes(shift)), _lanes(127)), ir.Constant(_INTS, ir.Undefined)
        for lane in range(WIDE):
            place = ir.Constant(_I32, lane)
            entry = b.load(b.gep(table, [ir.Constant(_I32, 0), b.extract_element(index, place)]), typ=_I32)
            entries = b.insert_element(entries, entry, place)
        total = b.add(total, entries)
    return total


def _table_sums_of_bytes(b, x):
    def function(name, result, *arguments):
        return b.module.declare_intrinsic(name, (), ir.FunctionType(result, arguments))

    low, high = (ir.Constant(_BYTES, [v & 0xFF for v in NORMAL[first:first + 64]]) for first in (0, 64))
    lookup = function("llvm.x86.avx512.vpermi2var.qi.512", _BYTES, _BYTES, _BYTES, _BYTES)
    pairs = function("llvm.x86.avx512.pmaddubs.w.512", _WORDS, _BYTES, _BYTES)
    fours = function("llvm.x86.avx512.pmaddw.d.512", _HALF, _WORDS, _WORDS)
    parts = []
    for first in range(0, WIDE, 16):
        entries = b.call(lookup, [low, b.bitcast(_part(b, x, first), _BYTES), high])
        sums = b.call(pairs, [ir.Constant(_BYTES, [1] * 64), entries])
        parts.append(b.call(fours, [sums, ir.Constant(_WORDS, [1] * 32)]))
    return _joined(b, parts)


def _all_lanes(b, value):
    return _broadcast(b, b.trunc(value, _I32), _INTS)


def _normals(b, keys, offset, low, high):
    """Sums of four entries of NORMAL for the columns whose keys stand there, of one read."""
    x = b.add(b.load(_pointer(b, keys, offset, _I32, WIDE), align=4, typ=_INTS), _all_lanes(b, low))
    x = b.mul(b.xor(x, b.lshr(x, _lanes(16))), _lanes(MIX_1))
    moved = b.xor(high, b.lshr(b.and_(high, ir.Constant(high.type, 2**32 - 1)), ir.Constant(high.type, 13)))
    x = b.mul(b.xor(b.xor(x, b.lshr(x, _lanes(13))), _all_lanes(b, moved)), _lanes(MIX_2))  # x ^ high, xor that without its last 13 bits
    return _table_sums(b, b.xor(x, b.lshr(x, _lanes(16))))


def _times(b, total, deviation):
    return _rounded(b, b.fmul(b.sitofp(total, _FLOATS), deviation))


def _rounded(b, x):
    """`rint` of float32 as integers: one instruction where the machine has AVX-512."""
    if not llvmlite.binding.get_host_cpu_features().get("avx512f"):
        return b.fptosi(_call(b, "rint", _FLOATS, x), _INTS)
    ints, floats = ir.VectorType(_I32, 16), ir.VectorType(ir.FloatType(), 16)
    mask, mode = ir.Constant(ir.IntType(16), -1), ir.Constant(_I32, 4)  # all lanes; the mode that the processor is in: to the nearest
    convert = b.module.declare_intrinsic(
        "llvm.x86.avx512.mask.cvtps2dq.512", (), ir.FunctionType(ints, [floats, ints, mask.type, mode.type]))
    parts = [b.call(convert, [_part(b, x, first), ir.Constant(ints, [0] * 16), mask, mode]) for first in range(0, WIDE, 16)]
    return _joined(b, parts)


def _part(b, x, first):
    """Sixteen lanes of a vector."""
    return b.shuffle_vector(x, x, ir.Constant(_HALF, list(range(first, first + 16))))


def _joined(b, parts):
    while len(parts) > 1:
        both = ir.Constant(ir.VectorType(_I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [b.shuffle_vector(*pair, both) for pair in zip(parts[::2], parts[1::2])]
    return parts[0]


@intrinsic
def noise(typingctx, u, keys, offset, low, high, at_zero, slope, reference):
    """`readout.noise` of reads of variance `at_zero + slope (2 u + reference)`.

    Args: keys and offset, where the columns' keys stand (int32); low and high, the halves of the reads' key.
    """
    def codegen(context, b, sig, args):
        u, keys, offset, low, high, at_zero, slope, reference = args
        twice = b.sitofp(b.add(b.add(u, u), _all_lanes(b, reference)), _FLOATS)
        variance = b.fadd(_broadcast(b, at_zero, _FLOATS), b.fmul(_broadcast(b, slope, _FLOATS), twice))
        zeros, unit = (ir.Constant(_FLOATS, [value] * WIDE) for value in (0.0, float(UNIT)))
        deviation = b.fmul(_call(b, "sqrt", _FLOATS, _call(b, "maxnum", _FLOATS, variance, zeros)), unit)
        return _times(b, _normals(b, keys, offset, low, high), deviation)
    return ints(ints, types.intp, types.intp, types.int64, types.int64, types.float32, types.float32, types.intp), codegen


@intrinsic
def noise_of_one_variance(typingctx, keys, offset, low, high, deviation):
    """The same where all columns have one variance; deviation, its root over `DEVIATION`: a root takes longer than all the rest."""
    def codegen(context, b, sig, args):
        return _times(b, _normals(b, *args[:4]), _broadcast(b, args[4], _FLOATS))
    return ints(types.intp, types.intp, types.int64, types.int64, types.float32), codegen


@intrinsic
def curved(typingctx, u, start, b0, b1, b2, taken):
    """`rint(c(u + start) - taken)` with `c(S) = S (b_0 + S (b_1 + S b_2))`, in float32."""
    def codegen(context, b, sig, args):
        start, b0, b1, b2, taken = (_broadcast(b, value, _FLOATS) for value in args[1:])
        total = b.fadd(b.sitofp(args[0], _FLOATS), start)
        inner = b.fadd(b0, b.fmul(total, b.fadd(b1, b.fmul(total, b2))))
        return _rounded(b, b.fsub(b.fmul(total, inner), taken))
    return ints(ints, *[types.float32] * 5), codegen


@intrinsic
def converted_by(typingctx, u, gains, offsets, place):
    """`rint(u gain) + offset` with the gains (float64) and offsets (int32) from element `place` of the arrays at two addresses."""
    def codegen(context, b, sig, args):
        u, gains, offsets, place = args
        gain = b.load(_pointer(b, gains, place, _F64, WIDE), align=8, typ=_DOUBLES)
        offset = b.load(_pointer(b, offsets, place, _I32, WIDE), align=4, typ=_INTS)
        scaled = _call(b, "rint", _DOUBLES, b.fmul(b.sitofp(u, _DOUBLES), gain))
        return b.add(b.fptosi(scaled, _INTS), offset)
    return ints(ints, types.intp, types.intp, types.intp), codegen
