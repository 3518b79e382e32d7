"""Vectors of 64 lanes of 16- and 32-bit integers, float32 and float64, beside the 512 bits of `simd`: what is done with one list of
rows is done with more columns. A quad is four integers of 32 bits. In paired shorts columns i and 32 + i stand side by side, the first in
the lower half of 32 bits: they become vectors of 32 bits, and shorts again, without leaving their lanes.

Every operation is one IEEE operation a lane, so that results are those of NumPy and PyTorch bit for bit.
"""

from __future__ import annotations

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from ....kernels.simd import _broadcast, _pointer, _writer

WIDE = 64  # lanes
BIAS = 2**15  # what sums of 16 bits begin at, so that they have no sign
UNROLL = 4  # rows that are added at a time
_I16, _I32, _F32, _F64 = ir.IntType(16), ir.IntType(32), ir.FloatType(), ir.DoubleType()


MAGIC = {_F32: 1.5 * 2**23, _F64: 1.5 * 2**52}  # numbers near it are whole: what is added to it is rounded, ties to even
RAISED = MAGIC[_F32] + BIAS


def _vector_type(name, element, lanes=WIDE):
    class Type(types.Type):
        def __init__(self):
            super().__init__(name)

    vector = ir.VectorType(element, lanes)

    @register_model(Type)
    class _Model(models.PrimitiveModel):
        def __init__(self, manager, fe_type):
            super().__init__(manager, fe_type, vector)

    return Type(), vector


shorts, _SHORTS = _vector_type("Vec64xI16", _I16)
ints, _INTS = _vector_type("Vec64xI32", _I32)
floats, _FLOATS = _vector_type("Vec64xF32", _F32)
raised, _ = _vector_type("Raised64xF32", _F32)  # RAISED + u, for u of 16 bits: the lower half of its bits is u + BIAS
doubles, _DOUBLES = _vector_type("Vec64xF64", _F64)
quad, _QUAD = _vector_type("Vec4xI32", _I32, 4)


def _operation(result, *arguments):
    """An intrinsic of these types whose code is `build(builder, *values)`."""
    def decorate(build):
        def codegen(context, builder, sig, args):
            return build(builder, *args)

        if len(arguments) == 1:
            @intrinsic
            def call(typingctx, a):
                return result(*arguments), codegen
        elif len(arguments) == 2:
            @intrinsic
            def call(typingctx, a, b):
                return result(*arguments), codegen
        else:
            @intrinsic
            def call(typingctx, a, b, c):
                return result(*arguments), codegen
        return call
    return decorate


def _call(builder, name, vector, *values):
    suffix = f"v{vector.count}f{32 if vector.element == _F32 else 64}"
    function = builder.module.declare_intrinsic(f"llvm.{name}.{suffix}", (), ir.FunctionType(vector, [vector] * len(values)))
    return builder.call(function, values)


full_i32 = _operation(ints, types.intp)(lambda b, value: _broadcast(b, b.trunc(value, _I32), _INTS))  # all lanes that integer
full_i16 = _operation(shorts, types.intp)(lambda b, value: _broadcast(b, b.trunc(value, _I16), _SHORTS))
full_quad = _operation(quad, types.intp)(lambda b, value: _broadcast(b, b.trunc(value, _I32), _QUAD))
added_quads = _operation(quad, quad, quad)(lambda b, x, y: b.add(x, y))
added_shorts = _operation(shorts, shorts, shorts)(lambda b, x, y: b.add(x, y))
widened = _operation(ints, shorts)(lambda b, x: b.sext(x, _INTS))
widened_unsigned = _operation(ints, shorts)(lambda b, x: b.zext(x, _INTS))
halved = _operation(shorts, ints)(lambda b, x: b.trunc(x, _SHORTS))
added = _operation(ints, ints, ints)(lambda b, x, y: b.add(x, y))
times = _operation(ints, ints, types.intp)(lambda b, x, n: b.mul(x, _broadcast(b, b.trunc(n, _I32), _INTS)))
shifted_up = _operation(ints, ints, types.intp)(lambda b, x, n: b.shl(x, _broadcast(b, b.trunc(n, _I32), _INTS)))
smaller = _operation(ints, ints, ints)(lambda b, x, y: b.select(b.icmp_signed("<", x, y), x, y))
larger = _operation(ints, ints, ints)(lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y))


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


widened_pairs = _operation(ints, shorts)(_widened_pairs)  # as `widened`, of paired shorts


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


@intrinsic
def load_shorts(typingctx, address, offset):
    """The vector that starts at element `offset` of the int16 array at `address`."""
    def codegen(context, b, sig, args):
        return b.load(_pointer(b, *args, _I16, WIDE), align=2, typ=_SHORTS)
    return shorts(types.intp, types.intp), codegen


put_int16 = _writer(_I16)


@intrinsic
def put_signed(typingctx, address, offset, x):
    """Write shorts without a sign, less 2^15, to the numbers from element `offset` of the int16 array at `address`."""
    def codegen(context, b, sig, args):
        x = b.xor(args[2], ir.Constant(_SHORTS, [2**15] * WIDE))
        b.store(x, _pointer(b, args[0], args[1], _I16, WIDE), align=2)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, shorts), codegen


@intrinsic
def load_ints(typingctx, address, offset):
    """The vector that starts at element `offset` of the int32 array at `address`."""
    def codegen(context, b, sig, args):
        return b.load(_pointer(b, *args, _I32, WIDE), align=4, typ=_INTS)
    return ints(types.intp, types.intp), codegen


@intrinsic
def add_times_to_int32(typingctx, address, offset, x, factor):
    """Add paired shorts, times an integer from 0 to 2^15 - 1, to the integers from element `offset` of the int32 array at `address`."""
    def codegen(context, b, sig, args):
        pointer, factor = _pointer(b, args[0], args[1], _I32, WIDE), b.trunc(args[3], _I32)
        b.store(b.add(b.load(pointer, align=4, typ=_INTS), _times_pairs(b, args[2], factor)), pointer, align=4)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, shorts, types.intp), codegen


@intrinsic
def with_quad(typingctx, total, address, offset):
    """`total` and the four numbers from element `offset` of the int32 array at `address`."""
    def codegen(context, b, sig, args):
        return b.add(args[0], b.load(_pointer(b, *args[1:], _I32, 4), align=4, typ=_QUAD))
    return quad(quad, types.intp, types.intp), codegen


@intrinsic
def put_quad(typingctx, address, offset, stride, value):
    """Write a quad to four numbers of the int32 array at `address`, `stride` apart, from element `offset` on."""
    def codegen(context, b, sig, args):
        address, offset, stride, value = args
        for lane in range(_QUAD.count):
            b.store(b.extract_element(value, ir.Constant(_I32, lane)), _pointer(b, address, offset, _I32, 1), align=4)
            offset = b.add(offset, stride)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, types.intp, quad), codegen


@intrinsic
def store_ints(typingctx, address, offset, value):
    """Write the vector that starts at element `offset` of the int32 array at `address`."""
    def codegen(context, b, sig, args):
        b.store(args[2], _pointer(b, args[0], args[1], _I32, WIDE), align=4)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, ints), codegen


def paired(b, x):
    """The lower halves of 64 lanes of 32 bits as paired shorts."""
    low, high = _halves(b, x)
    funnel = b.module.declare_intrinsic(f"llvm.fshl.v{_PAIRS.count}i32", (), ir.FunctionType(_PAIRS, [_PAIRS] * 3))
    return b.bitcast(b.call(funnel, [high, b.shl(low, _SHORT), _SHORT]), _SHORTS)


@_operation(shorts, raised)
def as_shorts(b, x):
    """The lower halves of their bits, paired."""
    return paired(b, b.bitcast(x, _INTS))


as_floats = _operation(floats, ints)(lambda b, x: b.sitofp(x, _FLOATS))


def as_vector(b, x, vector):
    """Whole numbers, ints or floats of that type already, as a vector of floating-point numbers."""
    return x if x.type == vector else b.sitofp(x, vector)


def _kind(vector, numba_type, element):
    """The operations of one floating-point type: (all lanes a number, code of a product, code by quotient, added product, the same in some
    lanes, add to memory)."""
    scalar = types.float32 if element == _F32 else types.float64

    @intrinsic
    def full(typingctx, value):
        """All lanes that number."""
        return numba_type(scalar), lambda context, b, sig, args: _broadcast(b, args[0], vector)

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

    @intrinsic
    def add_product(typingctx, total, x, factor):
        """`total + x factor`; exact wherever it is used."""
        def codegen(context, b, sig, args):
            return _call(b, "fma", vector, args[1], _broadcast(b, args[2], vector), args[0])
        return numba_type(numba_type, numba_type, scalar), codegen

    @intrinsic
    def add_product_where(typingctx, total, x, factor, lanes):
        """`total + x factor` in the lanes whose bits are set, elsewhere `total`."""
        def codegen(context, b, sig, args):
            sums = _call(b, "fma", vector, args[1], _broadcast(b, args[2], vector), args[0])
            return b.select(_bits(b, args[3]), sums, args[0])
        return numba_type(numba_type, numba_type, scalar, types.uint64), codegen

    wide = ir.IntType(32 if element == _F32 else 64)

    @intrinsic
    def add_to(typingctx, address, offset, x):
        """Add whole numbers to the integers (int32, or int64 for float64) from element `offset` of the array at `address`."""
        def codegen(context, b, sig, args):
            pointer = _pointer(b, args[0], args[1], wide, WIDE)
            term = b.fptosi(args[2], ir.VectorType(wide, WIDE))
            b.store(b.add(b.load(pointer, align=4, typ=term.type), term), pointer, align=4)
            return context.get_dummy_value()
        return types.void(types.intp, types.intp, numba_type), codegen

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


@intrinsic
def code_f64_of_f32(typingctx, u, delta, high):
    """`clip(rint(u / delta), 0, high)` of float32 numbers, as float64; u, integers without a sign."""
    def codegen(context, b, sig, args):
        delta, high = (_broadcast(b, value, _FLOATS) for value in args[1:])
        quotient = b.fdiv(b.uitofp(args[0], _FLOATS), delta)
        return b.fpext(_clipped(b, quotient, ir.Constant(_FLOATS, [0.0] * WIDE), high, _FLOATS), _DOUBLES)
    return doubles(ints, types.float32, types.float32), codegen


@intrinsic
def bit_of_64_bytes(typingctx, address, offset, bit):
    """Bit `bit` of the 64 bytes from element `offset` of the byte array at `address`, packed into one uint64."""
    def codegen(context, b, sig, args):
        byte, vector = ir.IntType(8), ir.VectorType(ir.IntType(8), WIDE)
        mask = _broadcast(b, b.shl(ir.Constant(byte, 1), b.trunc(args[2], byte)), vector)
        hit = b.and_(b.load(_pointer(b, args[0], args[1], byte, WIDE), align=1, typ=vector), mask)
        return b.bitcast(b.icmp_unsigned("!=", hit, ir.Constant(vector, [0] * WIDE)), ir.IntType(64))
    return types.uint64(types.intp, types.intp, types.intp), codegen


@_operation(shorts, shorts, shorts, types.uint64)
def added_where(b, x, y, lanes):
    """`x + y` in the lanes whose bits are set, elsewhere `x`."""
    return b.select(_bits(b, lanes), b.add(x, y), x)


@intrinsic
def code_f64_of_f32_by(typingctx, u, deltas, offset, high):
    """As `code_f64_of_f32`, each lane by its own delta: those from element `offset` of the float32 array at `deltas`."""
    def codegen(context, b, sig, args):
        delta = b.load(_pointer(b, args[1], args[2], _F32, WIDE), align=4, typ=_FLOATS)
        quotient = b.fdiv(b.uitofp(args[0], _FLOATS), delta)
        codes = _clipped(b, quotient, ir.Constant(_FLOATS, [0.0] * WIDE), _broadcast(b, args[3], _FLOATS), _FLOATS)
        return b.fpext(codes, _DOUBLES)
    return doubles(ints, types.intp, types.intp, types.float32), codegen


@intrinsic
def add_product_by(typingctx, total, x, factors, offset):
    """As `add_product_f64`, each lane times its own factor: those from element `offset` of the float64 array at `factors`."""
    def codegen(context, b, sig, args):
        factor = b.load(_pointer(b, args[2], args[3], _F64, WIDE), align=8, typ=_DOUBLES)
        return _call(b, "fma", _DOUBLES, args[1], factor, args[0])
    return doubles(doubles, doubles, types.intp, types.intp), codegen
