"""What a chip does to reads beside its cells, on 64 columns at a time: `readout` bit for bit."""

from __future__ import annotations

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ....arrays.readout import APART, DEVIATION, GOLDEN, MIX_1, MIX_2, MIX_3, MIX_4, NORMAL, SHARING, SIGNS, STEPS
from ....kernels.inner import inlined
from ....kernels.simd import _broadcast, _of_two_vectors, _pointer, has_byte_tables, operation
from .wide import (_DOUBLES, _F32, _F64, _FLOATS, _I32, _INTS, MAGIC, RAISED, WIDE, _call, as_vector, floats, ints, joined, of_pairs,
                   paired, raised, shorts)

STEP = np.float32(1 / STEPS)  # of the deviations of reads, over `DEVIATION`
IN_STEPS = np.float32(STEPS / DEVIATION)
ROUNDER = np.float32(MAGIC[_F32])
_PART, _BYTES = ir.VectorType(_I32, APART), ir.VectorType(ir.IntType(8), 4 * APART)
_MAGIC_BITS = 0x4B400000  # of float32 MAGIC: MAGIC + n has these + n
assert SHARING == WIDE and WIDE == APART * len(SIGNS)


@inlined
def mixed(key, number):
    """A uint64 for a uint64 and a number: `readout.read_key` is `mixed(mixed(seed, image), counter)`."""
    x = types.uint64(number) * types.uint64(GOLDEN) + types.uint64(key)
    x = x + types.uint64(GOLDEN)
    x = (x ^ (x >> types.uint64(30))) * types.uint64(MIX_3)
    x = (x ^ (x >> types.uint64(27))) * types.uint64(MIX_4)
    return x ^ (x >> types.uint64(31))


def _all(vector, value):
    return ir.Constant(vector, [value if vector.element == _F32 else value & (1 << vector.element.width) - 1] * vector.count)


def _signed_sums(b, x):
    """MAGIC plus the sums of the four entries of NORMAL that the bytes of each of 16 lanes name, in float32: with the first signs, in
    16 lanes, with the second, ..."""
    parts = _sums_of_bytes(b, x) if sums_bytes() else _sums_of_lanes(b, x)
    return b.bitcast(joined(b, parts), _FLOATS)


def sums_bytes() -> bool:
    """Whether the processor looks bytes up and adds four products of them."""
    return has_byte_tables() and bool(llvmlite.binding.get_host_cpu_features().get("avx512vnni"))


def _sums_of_bytes(b, x):
    """Unsigned bytes times signs: a table of entries + 128, which cancels where the signs do."""
    entries = _entries(b, x)
    return [_dot_product(b, _all(_PART, _MAGIC_BITS - 128 * sum(signs)), entries, _all(_PART, _packed(signs))) for signs in SIGNS]


def _entries(b, x):
    """Those of NORMAL that the bytes of each of 16 lanes name, + 128."""
    low, high = (ir.Constant(_BYTES, [v + 128 for v in NORMAL[first:first + 64]]) for first in (0, 64))
    return b.bitcast(_of_two_vectors(b, low, high, b.bitcast(x, _BYTES)), _PART)


def _dot_product(b, start, entries, signs):
    """`start` and the sum of the four bytes of each lane, times their signs."""
    add = b.module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", (), ir.FunctionType(_PART, [_PART] * 3))
    return b.call(add, [start, entries, signs])


def _packed(signs):
    return sum((sign & 0xFF) << 8 * i for i, sign in enumerate(signs))


# Of the columns with each of `SIGNS`: the signs, a byte each, and what the sum of four entries + 128 begins at, int32 `[signs, 2]`.
SIGNED = np.array([[_packed(signs), _MAGIC_BITS - 128 * sum(signs)] for signs in SIGNS], np.uint32).view(np.int32)


def _sums_of_lanes(b, x):
    table = ir.GlobalVariable(b.module, ir.ArrayType(_I32, len(NORMAL)), b.module.get_unique_name("normal"))
    table.global_constant, table.linkage = True, "internal"
    table.initializer = ir.Constant(table.type.pointee, [v & 0xFFFFFFFF for v in NORMAL])
    sums = [_all(_PART, _MAGIC_BITS)] * len(SIGNS)
    for i in range(4):
        index, entries = b.and_(b.lshr(x, _all(_PART, 8 * i)), _all(_PART, 127)), ir.Constant(_PART, ir.Undefined)
        for lane in range(APART):
            place = ir.Constant(_I32, lane)
            entry = b.load(b.gep(table, [ir.Constant(_I32, 0), b.extract_element(index, place)]), typ=_I32)
            entries = b.insert_element(entries, entry, place)
        sums = [b.add(total, entries) if signs[i] > 0 else b.sub(total, entries) for total, signs in zip(sums, SIGNS)]
    return sums


def _every_lane(b, value, vector=_INTS):
    return _broadcast(b, value if vector.element == _F32 else b.trunc(value, _I32), vector)


def _normals(b, keys, offset, low, high):
    """`_signed_sums` for 64 columns, whose keys (`readout.noise`: of word) stand from there on, of one read; low, high: of `put_keys`."""
    keys = b.load(_pointer(b, keys, offset, _I32, APART), align=4, typ=_PART)
    return _signed_sums(b, _hashed(b, b.add(keys, _every_lane(b, low, _PART)), _every_lane(b, high, _PART)))


def _hashed(b, x, high):
    x = b.mul(b.xor(x, b.lshr(x, _all(_PART, 16))), _all(_PART, MIX_1))
    x = b.mul(b.xor(b.xor(x, b.lshr(x, _all(_PART, 13))), high), _all(_PART, MIX_2))
    return b.xor(x, b.lshr(x, _all(_PART, 16)))


_KEYS = ir.VectorType(ir.IntType(64), WIDE)


@operation(types.void, types.intp, types.intp, types.int64, types.intp, types.intp)
def put_keys(b, images, counters, number, low, high):
    """Of 64 reads what noise takes of their keys, `mixed(image key, counter + number)`: the lower halves to the int32 at address `low`, and
    of the upper ones h `h ^ h >> 13` to those at `high`: x ^ h, xor that without its last 13 bits, is x ^ x >> 13 ^ this. Args: images,
    counters: where those of each read stand, 64 bits each."""
    x = b.mul(b.add(_at(b, counters, _KEYS), _broadcast(b, number, _KEYS)), _all(_KEYS, GOLDEN))
    x = b.add(b.add(x, _at(b, images, _KEYS)), _all(_KEYS, GOLDEN))
    x = b.mul(b.xor(x, b.lshr(x, _all(_KEYS, 30))), _all(_KEYS, MIX_3))
    x = b.mul(b.xor(x, b.lshr(x, _all(_KEYS, 27))), _all(_KEYS, MIX_4))
    x = b.xor(x, b.lshr(x, _all(_KEYS, 31)))
    upper = b.lshr(x, _all(_KEYS, 32))
    for part, address in ((x, low), (b.xor(upper, b.lshr(upper, _all(_KEYS, 13))), high)):
        b.store(b.trunc(part, _INTS), _pointer(b, address, ir.Constant(address.type, 0), _I32, WIDE), align=4)


def _value(b, u, kind):
    """Floats of whole numbers of any kind: ints, floats, raised ones, or paired shorts u + BIAS."""
    if kind == shorts:
        u, kind = _raised(b, u), raised
    return b.fsub(u, _all(_FLOATS, RAISED)) if kind == raised else as_vector(b, u, _FLOATS)


def _raised(b, u):
    """Paired shorts u + BIAS as raised numbers."""
    def high(pairs):  # the bits of MAGIC above the upper half: one instruction where the processor has it
        funnel = b.module.declare_intrinsic(f"llvm.fshl.v{pairs.type.count}i32", (), ir.FunctionType(pairs.type, [pairs.type] * 3))
        return b.call(funnel, [_all(pairs.type, _MAGIC_BITS >> 16), pairs, _all(pairs.type, 16)])

    def low(pairs):
        return b.or_(b.and_(pairs, _all(pairs.type, 0xFFFF)), _all(pairs.type, _MAGIC_BITS))

    return b.bitcast(of_pairs(b, u, low, high), _FLOATS)


@intrinsic
def lifted(typingctx, u):
    """Shorts as raised numbers, others as they are."""
    if u != shorts:
        return u(u), lambda context, b, sig, args: args[0]
    return raised(u), lambda context, b, sig, args: _raised(b, args[0])


def _lifted(kind):
    return raised if kind == shorts else kind


def _rounder(kind):
    """What numbers of this kind are rounded by the addition of."""
    return _all(_FLOATS, RAISED if kind == raised else MAGIC[_F32])


def _whole(b, near, kind):
    """The whole number n of `_rounder + n`, as that kind."""
    if kind == raised:
        return near
    return b.fsub(near, _all(_FLOATS, MAGIC[_F32])) if kind == floats else b.sub(b.bitcast(near, _INTS), _all(_INTS, _MAGIC_BITS))


def _plus(b, u, near, kind):
    """`u + n` of `MAGIC + n`, of the kind of u."""
    return b.add(u, _whole(b, near, kind)) if kind == ints else b.fadd(u, b.fsub(near, _all(_FLOATS, MAGIC[_F32])))


@intrinsic
def with_noise(typingctx, u, keys, offset, low, high, deviation, lift):
    """`u + readout.noise` of reads whose columns have one variance. u, ints, whole floats or raised ones, as in all of these.

    Args: keys and offset, where the keys of the columns' words stand (int32); low and high, of the read's key, by
        `put_keys`; deviation, over `DEVIATION`; lift, `MAGIC - MAGIC deviation`.
    """
    def codegen(context, b, sig, args):
        u, keys, offset, low, high, deviation, lift = args
        deviation, lift = (_every_lane(b, value, _FLOATS) for value in (deviation, lift))
        return _plus(b, u, _call(b, "fma", _FLOATS, _normals(b, keys, offset, low, high), deviation, lift), sig.return_type)
    return u(u, types.intp, types.intp, types.int64, types.int64, types.float32, types.float32), codegen


def _field(b, reads, apart, number, first, kind):
    """Of fields of 32 bits, `apart` elements from one to the next, the one of this number, from its element `first` on."""
    place = b.add(b.mul(ir.Constant(apart.type, number), apart), ir.Constant(apart.type, first))
    return b.load(_pointer(b, reads, place, kind.element, kind.count), align=4, typ=kind)


@operation(ints, ints, *[types.intp] * 2, *[types.int64] * 3)
def with_noise_of_reads(b, u, reads, apart, key, signs, start):
    """The same of 64 reads of one column, ints; only where `sums_bytes()`. Args: reads, where their low, high, deviation and lift stand, 32
    bits each, `apart` elements from one field to the next; key, of the column's word; signs and start, `SIGNED`."""
    if not sums_bytes():
        return u
    key, signs, start = (_every_lane(b, value, _PART) for value in (key, signs, start))
    lows, highs = ([_field(b, reads, apart, number, first, _PART) for first in range(0, WIDE, APART)] for number in range(2))
    sums = [_dot_product(b, start, _entries(b, _hashed(b, b.add(key, low), high)), signs) for low, high in zip(lows, highs)]
    deviation, lift = (_field(b, reads, apart, number, 0, _FLOATS) for number in (2, 3))
    return _plus(b, u, _call(b, "fma", _FLOATS, b.bitcast(joined(b, sums), _FLOATS), deviation, lift), ints)


@operation(ints, ints, types.intp, types.intp, types.float32)
def curved_reads(b, u, reads, apart, third):
    """As `curved`, of 64 reads of one column, ints, whose first, second and rise stand from address `reads` on, as above."""
    first, second, rise = (_field(b, reads, apart, number, 0, _FLOATS) for number in range(3))
    u = b.sitofp(u, _FLOATS)
    slope = _call(b, "fma", _FLOATS, u, _call(b, "fma", _FLOATS, u, _every_lane(b, third, _FLOATS), second), first)
    return _whole(b, _call(b, "fma", _FLOATS, u, slope, rise), ints)


@operation(ints, ints, types.float64, types.int64)
def converted_alike(b, u, gain, offset):
    """`rint(u gain) + offset` of reads of one converter, ints."""
    product = b.fmul(b.sitofp(u, _DOUBLES), _broadcast(b, gain, _DOUBLES))
    return b.add(b.fptosi(_call(b, "rint", _DOUBLES, product), _INTS), _every_lane(b, offset))


@intrinsic
def with_noise_of_levels(typingctx, u, sums, keys, offset, low, high, at_zero, slope, reference):
    """The same where columns differ: of variance `at_zero + slope (2 sums + reference)`; sums, ints: of the cells' values, or of
    those less their reference, each times the square of its digit."""
    def codegen(context, b, sig, args):
        u, sums, keys, offset, low, high, at_zero, slope, reference = args
        magic, step, steps = (_all(_FLOATS, float(value)) for value in (ROUNDER, STEP, IN_STEPS))
        twice = b.sitofp(b.add(b.add(sums, sums), _every_lane(b, reference)), _FLOATS)
        variance = b.fadd(_every_lane(b, at_zero, _FLOATS), b.fmul(_every_lane(b, slope, _FLOATS), twice))
        root = _call(b, "sqrt", _FLOATS, _call(b, "maxnum", _FLOATS, variance, _all(_FLOATS, 0.0)))
        deviation = b.fmul(_call(b, "rint", _FLOATS, b.fmul(root, steps)), step)
        normals = b.fsub(_normals(b, keys, offset, low, high), magic)
        return _plus(b, u, _call(b, "fma", _FLOATS, normals, deviation, magic), sig.return_type)
    return u(u, sums, types.intp, types.intp, types.int64, types.int64, types.float32, types.float32, types.intp), codegen


@intrinsic
def curved(typingctx, u, first, second, third, rise):
    """`rint(u (first + u (second + u third)) + rise)`; each product is rounded with what is added to it. rise, a whole number and MAGIC,
    or RAISED where that is what becomes of u."""
    def codegen(context, b, sig, args):
        first, second, third, rise = (_every_lane(b, value, _FLOATS) for value in args[1:])
        u = _value(b, args[0], sig.args[0])
        slope = _call(b, "fma", _FLOATS, u, _call(b, "fma", _FLOATS, u, third, second), first)
        return _whole(b, _call(b, "fma", _FLOATS, u, slope, rise), sig.return_type)
    return _lifted(u)(u, *[types.float32] * 4), codegen


def _currents(b, inputs, current):
    """Of 64 reads, float64: `current` times the sums of their inputs, int32 at an address."""
    return b.fmul(_broadcast(b, current, _DOUBLES), b.sitofp(_at(b, inputs, _INTS), _DOUBLES))


def _at(b, address, vector):
    return b.load(_pointer(b, address, ir.Constant(address.type, 0), vector.element, WIDE), align=4, typ=vector)


def _put(b, value, address):
    b.store(value, _pointer(b, address, ir.Constant(address.type, 0), _F32, WIDE), align=4)


@operation(types.void, types.intp, types.float64, types.intp)
def put_currents(b, inputs, current, out):
    """Of 64 reads `_currents` to the float32 numbers at address `out`."""
    _put(b, b.fptrunc(_currents(b, inputs, current), _FLOATS), out)


@operation(types.void, types.intp, types.intp, types.float64, *[types.float32] * 3, types.boolean, types.float32, *[types.intp] * 3)
def put_curves(b, inputs, references, current, b0, b1, b2, analog, rounder, first, second, rise):
    """Of 64 reads what `curved` takes, by `readout.curve_at`, to the float32 numbers at the last three addresses. inputs, as above;
    references, int32 at an address, the sums of their reference cells, which are part of S where `analog`, and then nothing rises but
    by `rounder`."""
    b0, b1, b2, rounder = (_every_lane(b, value, _FLOATS) for value in (b0, b1, b2, rounder))
    analog = _broadcast(b, analog, ir.VectorType(analog.type, WIDE))
    current = _currents(b, inputs, current)
    start = b.fadd(current, b.sitofp(_at(b, references, _INTS), _DOUBLES))
    start = b.fptrunc(b.select(analog, start, current), _FLOATS)
    bent = b.fmul(start, b.fmul(_all(_FLOATS, 3.0), b2))
    _put(b, b.fadd(b0, b.fmul(start, b.fadd(b.fmul(_all(_FLOATS, 2.0), b1), bent))), first)
    _put(b, b.fadd(b1, bent), second)
    whole = b.fadd(b0, b.fmul(start, b.fadd(b1, b.fmul(start, b2))))
    risen = _call(b, "rint", _FLOATS, b.fsub(b.fmul(start, whole), start))
    _put(b, b.fadd(rounder, b.select(analog, _all(_FLOATS, 0.0), risen)), rise)


@intrinsic
def between_curves(typingctx, u, both, current, b0, b1, b2):
    """`rint(c(S+) - c(S-))` of `readout.Readout.curve`, of pairs whose lines carry `S- = (both - u) / 2 + current` and `S+ = S- + u`, in
    the steps of `readout.curve_at`. both, ints."""
    def codegen(context, b, sig, args):
        return _between(b, _value(b, args[0], sig.args[0]), args[1], _every_lane(b, args[2], _FLOATS), args[3:], sig.return_type)
    return _lifted(u)(u, both, *[types.float32] * 4), codegen


def _between(b, u, both, current, curve, kind):
    b0, b1, b2 = (_every_lane(b, value, _FLOATS) for value in curve)
    start = b.fadd(b.fmul(b.fsub(as_vector(b, both, _FLOATS), u), _all(_FLOATS, 0.5)), current)
    bent = b.fmul(start, b.fmul(b2, _all(_FLOATS, 3.0)))
    first = b.fadd(b0, b.fmul(start, b.fadd(b.fmul(b1, _all(_FLOATS, 2.0)), bent)))
    slope = _call(b, "fma", _FLOATS, u, _call(b, "fma", _FLOATS, u, b2, b.fadd(b1, bent)), first)
    return _whole(b, _call(b, "fma", _FLOATS, u, slope, _rounder(kind)), kind)


@operation(ints, ints, ints, types.intp, *[types.float32] * 3)
def between_curves_of_reads(b, u, both, currents, b0, b1, b2):
    """The same of 64 reads of one column, ints, each with its current, float32 from that address on."""
    return _between(b, as_vector(b, u, _FLOATS), both, _at(b, currents, _FLOATS), (b0, b1, b2), ints)


@intrinsic
def moved_by(typingctx, u, offsets, place):
    """`u + offset` with the offsets (int32) from element `place` of the array at an address; shorts, modulo 2^16."""
    def codegen(context, b, sig, args):
        u, kind = args[0], sig.return_type
        offset = b.load(_pointer(b, *args[1:], _I32, WIDE), align=4, typ=_INTS)
        if kind == shorts:
            return b.add(u, paired(b, offset))
        return b.add(u, offset) if kind == ints else b.fadd(u, b.sitofp(offset, _FLOATS))
    return u(u, types.intp, types.intp), codegen


@intrinsic
def converted_by(typingctx, u, gains, offsets, place):
    """`rint(u gain) + offset` with the gains (float64) and offsets (int32) from element `place` of the arrays at two addresses."""
    def codegen(context, b, sig, args):
        u, gains, offsets, place = args
        gain = b.load(_pointer(b, gains, place, _F64, WIDE), align=8, typ=_DOUBLES)
        offset = b.load(_pointer(b, offsets, place, _I32, WIDE), align=4, typ=_INTS)
        kind = sig.return_type
        exact = b.sitofp(u, _DOUBLES) if kind == ints else b.fpext(_value(b, u, kind), _DOUBLES)
        changed = b.fadd(_call(b, "rint", _DOUBLES, b.fmul(exact, gain)), b.sitofp(offset, _DOUBLES))
        if kind == ints:
            return b.fptosi(changed, _INTS)
        changed = b.fptrunc(changed, _FLOATS)
        return b.fadd(changed, _rounder(kind)) if kind == raised else changed
    return u(u, types.intp, types.intp, types.intp), codegen
