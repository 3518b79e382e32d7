"""Vectors of 64 lanes of 16- and 32-bit integers, float32 and float64, beside the 512 bits of `simd`: what is done with one list of
rows is done with more columns. A quad is four integers of 32 bits. In paired shorts columns i and 32 + i stand side by side, the first in
the lower half of 32 bits: they become vectors of 32 bits, and shorts again, without leaving their lanes.

Every operation is one IEEE operation a lane, so that results are those of NumPy and PyTorch bit for bit.
"""

from __future__ import annotations

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ....kernels.simd import _broadcast, _pointer, _writer, bits_of_bytes, loader, operation, storer, vector_type

WIDE = 64  # lanes
BIAS = 2**15  # what sums of 16 bits begin at, so that they have no sign
UNROLL = 4  # rows that are added at a time
_I16, _I32, _F32, _F64 = ir.IntType(16), ir.IntType(32), ir.FloatType(), ir.DoubleType()


MAGIC = {_F32: 1.5 * 2**23, _F64: 1.5 * 2**52}  # numbers near it are whole: what is added to it is rounded, ties to even
RAISED = MAGIC[_F32] + BIAS


shorts, _SHORTS = vector_type("Vec64xI16", _I16, WIDE)
ints, _INTS = vector_type("Vec64xI32", _I32, WIDE)
floats, _FLOATS = vector_type("Vec64xF32", _F32, WIDE)
raised, _ = vector_type("Raised64xF32", _F32, WIDE)  # RAISED + u, for u of 16 bits: the lower half of its bits is u + BIAS
doubles, _DOUBLES = vector_type("Vec64xF64", _F64, WIDE)
quad, _QUAD = vector_type("Vec4xI32", _I32, 4)


def _call(builder, name, vector, *values):
    suffix = f"v{vector.count}f{32 if vector.element == _F32 else 64}"
    function = builder.module.declare_intrinsic(f"llvm.{name}.{suffix}", (), ir.FunctionType(vector, [vector] * len(values)))
    return builder.call(function, values)


full_i32 = operation(ints, types.intp)(lambda b, value: _broadcast(b, b.trunc(value, _I32), _INTS))  # all lanes that integer
full_i16 = operation(shorts, types.intp)(lambda b, value: _broadcast(b, b.trunc(value, _I16), _SHORTS))
full_quad = operation(quad, types.intp)(lambda b, value: _broadcast(b, b.trunc(value, _I32), _QUAD))
added_quads = operation(quad, quad, quad)(lambda b, x, y: b.add(x, y))
added_shorts = operation(shorts, shorts, shorts)(lambda b, x, y: b.add(x, y))
widened = operation(ints, shorts)(lambda b, x: b.sext(x, _INTS))
widened_unsigned = operation(ints, shorts)(lambda b, x: b.zext(x, _INTS))
halved = operation(shorts, ints)(lambda b, x: b.trunc(x, _SHORTS))
added = operation(ints, ints, ints)(lambda b, x, y: b.add(x, y))
times = operation(ints, ints, types.intp)(lambda b, x, n: b.mul(x, _broadcast(b, b.trunc(n, _I32), _INTS)))
shifted_up = operation(ints, ints, types.intp)(lambda b, x, n: b.shl(x, _broadcast(b, b.trunc(n, _I32), _INTS)))
smaller = operation(ints, ints, ints)(lambda b, x, y: b.select(b.icmp_signed("<", x, y), x, y))
larger = operation(ints, ints, ints)(lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y))


_PAIRS = ir.VectorType(_I32, WIDE // 2)
_SHORT = ir.Constant(_PAIRS, [16] * _PAIRS.count)  # bits of one


def joined(b, parts):
    """Vectors, a power of two of them, one behind the other."""
    while len(parts) > 1:
        both = ir.Constant(ir.VectorType(_I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [b.shuffle_vector(*pair, both) for pair in zip(parts[::2], parts[1::2])]
    return parts[0]


def _halves(b, x):
    """The first and the second half of a vector."""
    lanes = x.type.count // 2
    return [b.shuffle_vector(x, x, ir.Constant(ir.VectorType(_I32, lanes), list(range(first, first + lanes)))) for first in (0, lanes)]


def of_pairs(b, x, low, high):
    """64 lanes of 32 bits of paired shorts: what `low` makes of the bits of a pair for its lower half, and `high` for its upper one."""
    pairs = b.bitcast(x, _PAIRS)
    return joined(b, [low(pairs), high(pairs)])


def _widened_pairs(b, x):
    return of_pairs(b, x, lambda pairs: b.ashr(b.shl(pairs, _SHORT), _SHORT), lambda pairs: b.ashr(pairs, _SHORT))


widened_pairs = operation(ints, shorts)(_widened_pairs)  # as `widened`, of paired shorts


def _has_products_of_pairs():
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bw"))


def _times_pairs(b, x, factor):
    """`widened_pairs`, times a factor of 15 bits: where an instruction adds the two products of a pair, the other number times 0."""
    if not _has_products_of_pairs():
        return b.mul(_widened_pairs(b, x), _broadcast(b, factor, _INTS))
    words, numbers = ir.VectorType(_I16, WIDE // 2), ir.VectorType(_I32, WIDE // 4)
    multiply = b.module.declare_intrinsic("llvm.x86.avx512.pmaddw.d.512", (), ir.FunctionType(numbers, [words, words]))
    factors = [b.bitcast(_broadcast(b, each, numbers), words) for each in (factor, b.shl(factor, ir.Constant(_I32, 16)))]
    return joined(b, [b.call(multiply, [part, each]) for each in factors for part in _halves(b, x)])


load_shorts, load_ints, store_ints = loader(shorts, _SHORTS), loader(ints, _INTS), storer(ints, _INTS)
put_int16 = _writer(_I16)


@operation(types.void, types.intp, types.intp, shorts)
def put_signed(b, address, offset, x):
    """Write shorts without a sign, less 2^15, to the numbers from element `offset` of the int16 array at `address`."""
    b.store(b.xor(x, ir.Constant(_SHORTS, [2**15] * WIDE)), _pointer(b, address, offset, _I16, WIDE), align=2)


@operation(types.void, types.intp, types.intp, shorts, types.intp)
def add_times_to_int32(b, address, offset, x, factor):
    """Add paired shorts, times an integer from 0 to 2^15 - 1, to the integers from element `offset` of the int32 array at `address`."""
    pointer = _pointer(b, address, offset, _I32, WIDE)
    b.store(b.add(b.load(pointer, align=4, typ=_INTS), _times_pairs(b, x, b.trunc(factor, _I32))), pointer, align=4)


@operation(quad, quad, types.intp, types.intp)
def with_quad(b, total, address, offset):
    """`total` and the four numbers from element `offset` of the int32 array at `address`."""
    return b.add(total, b.load(_pointer(b, address, offset, _I32, 4), align=4, typ=_QUAD))


@operation(types.void, types.intp, types.intp, types.intp, quad)
def put_quad(b, address, offset, stride, value):
    """Write a quad to four numbers of the int32 array at `address`, `stride` apart, from element `offset` on."""
    for lane in range(_QUAD.count):
        b.store(b.extract_element(value, ir.Constant(_I32, lane)), _pointer(b, address, offset, _I32, 1), align=4)
        offset = b.add(offset, stride)


def paired(b, x):
    """The lower halves of 64 lanes of 32 bits as paired shorts."""
    low, high = _halves(b, x)
    funnel = b.module.declare_intrinsic(f"llvm.fshl.v{_PAIRS.count}i32", (), ir.FunctionType(_PAIRS, [_PAIRS] * 3))
    return b.bitcast(b.call(funnel, [high, b.shl(low, _SHORT), _SHORT]), _SHORTS)


@operation(shorts, raised)
def as_shorts(b, x):
    """The lower halves of their bits, paired."""
    return paired(b, b.bitcast(x, _INTS))


as_floats = operation(floats, ints)(lambda b, x: b.sitofp(x, _FLOATS))


def as_vector(b, x, vector):
    """Whole numbers, ints or floats of that type already, as a vector of floating-point numbers."""
    return x if x.type == vector else b.sitofp(x, vector)


def _kind(vector, numba_type, element):
    """The operations of one floating-point type: (all lanes a number, code of a product, code by quotient, added product, the same in some
    lanes, add to memory)."""
    scalar = types.float32 if element == _F32 else types.float64

    full = operation(numba_type, scalar)(lambda b, value: _broadcast(b, value, vector))

    @intrinsic
    def code(typingctx, u, scale, low, high):
        """`clip(rint(u scale), low, high)`, ties to even, of the product before it is rounded; scale, low and high, numbers. u, ints
        or whole numbers of this type."""
        def codegen(context, b, sig, args):
            scale, low, high = (_broadcast(b, value, vector) for value in args[1:])
            magic = ir.Constant(vector, [MAGIC[element]] * WIDE)
            near = _call(b, "fma", vector, as_vector(b, args[0], vector), scale, magic)
            return b.fsub(_between(b, near, b.fadd(low, magic), b.fadd(high, magic)), magic)
        return numba_type(u, scalar, scalar, scalar), codegen

    @intrinsic
    def code_of_quotient(typingctx, u, unit, delta, low, high):
        """`clip(rint(u unit / delta), low, high)`, ties to even; the others are numbers, u as above."""
        def codegen(context, b, sig, args):
            unit, delta, low, high = (_broadcast(b, value, vector) for value in args[1:])
            return _clipped(b, b.fdiv(b.fmul(as_vector(b, args[0], vector), unit), delta), low, high, vector)
        return numba_type(u, scalar, scalar, scalar, scalar), codegen

    @operation(numba_type, numba_type, numba_type, scalar)
    def add_product(b, total, x, factor):
        """`total + x factor`; exact wherever it is used."""
        return _call(b, "fma", vector, x, _broadcast(b, factor, vector), total)

    @operation(numba_type, numba_type, numba_type, scalar, types.uint64)
    def add_product_where(b, total, x, factor, lanes):
        """`total + x factor` in the lanes whose bits are set, elsewhere `total`."""
        return b.select(_bits(b, lanes), _call(b, "fma", vector, x, _broadcast(b, factor, vector), total), total)

    wide = ir.IntType(32 if element == _F32 else 64)

    @operation(types.void, types.intp, types.intp, numba_type)
    def add_to(b, address, offset, x):
        """Add whole numbers to the integers (int32, or int64 for float64) from element `offset` of the array at `address`."""
        pointer, term = _pointer(b, address, offset, wide, WIDE), b.fptosi(x, ir.VectorType(wide, WIDE))
        b.store(b.add(b.load(pointer, align=4, typ=term.type), term), pointer, align=4)

    return full, code, code_of_quotient, add_product, add_product_where, add_to


def _bits(b, lanes):
    """Those of a uint64 as a vector."""
    return b.bitcast(lanes, ir.VectorType(ir.IntType(1), WIDE))


def _between(b, x, low, high):
    """One instruction each, as `maxnum` and `minnum`, which look for NaN, are not."""
    x = b.select(b.fcmp_ordered(">", x, low), x, low)
    return b.select(b.fcmp_ordered("<", x, high), x, high)


def _clipped(b, x, low, high, vector):
    return _between(b, _call(b, "rint", vector, x), low, high)


full_f32, code_f32, code_of_quotient_f32, add_product_f32, add_product_f32_where, add_to_int32 = _kind(_FLOATS, floats, _F32)
full_f64, _, code_of_quotient_f64, add_product_f64, add_product_f64_where, add_to_int64 = _kind(_DOUBLES, doubles, _F64)


def _code_f64_of_f32(b, u, delta, high):
    codes = _clipped(b, b.fdiv(b.uitofp(u, _FLOATS), delta), ir.Constant(_FLOATS, [0.0] * WIDE), _broadcast(b, high, _FLOATS), _FLOATS)
    return b.fpext(codes, _DOUBLES)


@operation(doubles, ints, types.float32, types.float32)
def code_f64_of_f32(b, u, delta, high):
    """`clip(rint(u / delta), 0, high)` of float32 numbers, as float64; u, integers without a sign."""
    return _code_f64_of_f32(b, u, _broadcast(b, delta, _FLOATS), high)


bit_of_64_bytes = bits_of_bytes(WIDE, types.uint64)


@operation(shorts, shorts, shorts, types.uint64)
def added_where(b, x, y, lanes):
    """`x + y` in the lanes whose bits are set, elsewhere `x`."""
    return b.select(_bits(b, lanes), b.add(x, y), x)


@operation(doubles, ints, types.intp, types.intp, types.float32)
def code_f64_of_f32_by(b, u, deltas, offset, high):
    """As `code_f64_of_f32`, each lane by its own delta: those from element `offset` of the float32 array at `deltas`."""
    return _code_f64_of_f32(b, u, b.load(_pointer(b, deltas, offset, _F32, WIDE), align=4, typ=_FLOATS), high)


@operation(doubles, doubles, doubles, types.intp, types.intp)
def add_product_by(b, total, x, factors, offset):
    """As `add_product_f64`, each lane times its own factor: those from element `offset` of the float64 array at `factors`."""
    return _call(b, "fma", _DOUBLES, x, b.load(_pointer(b, factors, offset, _F64, WIDE), align=8, typ=_DOUBLES), total)
