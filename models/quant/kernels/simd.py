"""A vector of 32 lanes of 16 bits for Numba kernels.

LLVM splits it into the registers that the machine has (one of AVX-512, two of AVX2, four of Neon), so a kernel written
with it needs no compiler on the user's machine and does not depend on what the automatic vectoriser makes of a loop.
Bit-wise operators see 512 independent bits; arithmetic wraps modulo 2^16; `>>` fills with zeros, `sar` with the sign.
"""

import contextlib
import ctypes
import functools
import operator

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_jitable, register_model

LANES = 32


_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))
_V32 = ir.VectorType(_I32, LANES)


def vector_type(name, element, lanes):
    """(Numba's type, LLVM's) of vectors of so many elements."""
    class Type(types.Type):
        def __init__(self):
            super().__init__(name)

    vector = ir.VectorType(element, lanes)

    @register_model(Type)
    class _Model(models.PrimitiveModel):
        def __init__(self, manager, fe_type):
            super().__init__(manager, fe_type, vector)

    return Type(), vector


vec, _V16 = vector_type("Vec32x16", _I16, LANES)


def operation(result, *arguments):
    """An intrinsic of these types whose code is `build(builder, *values)`, which returns nothing where `result` is `types.void`."""
    def decorate(build):
        def codegen(context, builder, sig, args):
            value = build(builder, *args)
            return context.get_dummy_value() if result == types.void else value

        return intrinsic(functools.wraps(build)(lambda typingctx, *args: (result(*arguments), codegen)))
    return decorate


def _operator(op, build):
    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args, kws):
            return signature(vec, vec, vec) if tuple(args) == (vec, vec) else None

    @lower_builtin(op, vec, vec)
    def _lower(context, builder, sig, args):
        return build(builder, *args)


for _op, _name in {operator.and_: "and_", operator.or_: "or_", operator.xor: "xor", operator.add: "add",
                   operator.sub: "sub", operator.mul: "mul", operator.lshift: "shl", operator.rshift: "lshr"}.items():
    _operator(_op, lambda builder, x, y, name=_name: getattr(builder, name)(x, y))


def _high_product(b, x, y):
    wide = b.mul(b.sext(x, _V32), b.sext(y, _V32))
    return b.trunc(b.ashr(wide, ir.Constant(_V32, [16] * LANES)), _V16)


_of_two = operation(vec, vec, vec)
sar = _of_two(lambda b, x, y: b.ashr(x, y))
vmin = _of_two(lambda b, x, y: b.select(b.icmp_signed("<", x, y), x, y))  # lanes signed
vmax = _of_two(lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y))
mulhi = _of_two(_high_product)  # floor(x y / 2^16), lanes signed


def _broadcast(builder, value, vector):
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count))


@operation(vec, types.int64)
def splat(b, value):
    """All lanes equal to the low 16 bits of an integer."""
    return _broadcast(b, b.trunc(value, _I16), _V16)


def _pointer(builder, address, offset, element, lanes):
    first = builder.gep(builder.inttoptr(address, ir.PointerType(element)), [offset])
    return builder.bitcast(first, ir.PointerType(ir.VectorType(element, lanes) if lanes > 1 else element))


def _reader(element, numba_type):
    return operation(numba_type, types.intp, types.intp)(
        lambda b, address, index: b.load(_pointer(b, address, index, element, 1), typ=element))


# Elements of a contiguous array by its address (why: see `buffers`): `int64_at(address, index)`.
int64_at = _reader(ir.IntType(64), types.int64)
uint64_at = _reader(ir.IntType(64), types.uint64)
uint32_at = _reader(_I32, types.uint32)
int16_at = _reader(_I16, types.int16)
int32_at = _reader(_I32, types.int32)
uint8_at = _reader(_I8, types.uint8)
float32_at = _reader(ir.FloatType(), types.float32)
float64_at = _reader(ir.DoubleType(), types.float64)


def _writer(element, numba_type=types.int64):
    return operation(types.void, types.intp, types.intp, numba_type)(
        lambda b, address, index, value: b.store(b.trunc(value, element), _pointer(b, address, index, element, 1)))


put_int64 = _writer(ir.IntType(64))
put_uint64 = _writer(ir.IntType(64), types.uint64)
put_uint32 = _writer(_I32)  # the low bits of any integer, of one with a sign too, and so for bytes
put_uint8 = _writer(_I8)
put_float32 = _writer(ir.FloatType(), types.float32)
put_float64 = _writer(ir.DoubleType(), types.float64)


def loader(kind, vector):
    """A function for the vector that starts at element `offset` of the array at `address`."""
    return operation(kind, types.intp, types.intp)(lambda b, address, offset: b.load(
        _pointer(b, address, offset, vector.element, vector.count), align=vector.element.width // 8, typ=vector))


def storer(kind, vector):
    """One that writes that vector."""
    return operation(types.void, types.intp, types.intp, kind)(lambda b, address, offset, value: b.store(
        value, _pointer(b, address, offset, vector.element, vector.count), align=vector.element.width // 8))


load, store = loader(vec, _V16), storer(vec, _V16)


def _adder(extend, short=False):
    @operation(types.void, types.intp, types.intp, vec, types.intp)
    def add(b, address, offset, value, factor):
        pointer = _pointer(b, address, offset, _I32, LANES)
        if short:  # LLVM sees that 16 bits times 16 bits is all there is: a multiplication of 32 bits takes 10 cycles
            factor = b.sext(_broadcast(b, b.trunc(factor, _I16), _V16), _V32)
        else:
            factor = _broadcast(b, b.trunc(factor, _I32), _V32)
        term = b.mul(getattr(b, extend)(value, _V32), factor)
        b.store(b.add(b.load(pointer, align=4, typ=_V32), term), pointer, align=4)
    return add


add_signed = _adder("sext")  # int32 at address, element offset + lane: += value[lane] factor
add_signed_short = _adder("sext", short=True)  # the same for factors below 2^15
add_unsigned = _adder("zext")


@operation(types.void, types.intp, types.intp, vec)
def add_ones(b, address, index, value):
    """Add the ones in each 64-bit word of a vector to the eight uint64 counters from element `8 index` at `address`."""
    words = ir.VectorType(ir.IntType(64), 8)
    pointer = _pointer(b, address, b.shl(index, ir.Constant(index.type, 3)), ir.IntType(64), 8)
    count = b.module.declare_intrinsic("llvm.ctpop.v8i64", (), ir.FunctionType(words, [words]))
    ones = b.call(count, [b.bitcast(value, words)])
    b.store(b.add(b.load(pointer, align=8, typ=words), ones), pointer, align=8)


@operation(vec, vec)
def by_bit(b, value):
    """The bits of a vector in another order: its first 64 are bit 0 of its 64 bytes, the next 64 bit 1, and so on."""
    words = ir.VectorType(ir.IntType(64), 8)
    turned = ir.Constant(words, ir.Undefined)
    for i in range(8):
        top = b.bitcast(b.shl(value, ir.Constant(_V16, [7 - i] * LANES)), ir.VectorType(_I8, 64))  # bit i of each byte is its sign
        bits = b.bitcast(b.icmp_signed("<", top, ir.Constant(top.type, [0] * 64)), ir.IntType(64))
        turned = b.insert_element(turned, bits, ir.Constant(_I32, i))
    return b.bitcast(turned, _V16)


@operation(types.boolean, vec)
def any_bit(b, value):
    """Whether any bit of a vector is set."""
    words = ir.VectorType(ir.IntType(64), 8)
    flags = b.icmp_unsigned("!=", b.bitcast(value, words), ir.Constant(words, [0] * 8))
    return b.icmp_unsigned("!=", b.bitcast(flags, _I8), ir.Constant(_I8, 0))


@operation(vec, vec, vec, vec)
def majority(b, x, y, z):
    """The carry of a full adder, `x & y | z & (x | y)`: one VPTERNLOG where the machine has AVX-512."""
    if not llvmlite.binding.get_host_cpu_features().get("avx512f"):
        return b.or_(b.and_(x, y), b.and_(z, b.or_(x, y)))
    lanes = ir.VectorType(_I32, 16)
    function = b.module.declare_intrinsic("llvm.x86.avx512.pternlog.d.512", (), ir.FunctionType(lanes, [lanes, lanes, lanes, _I32]))
    return b.bitcast(b.call(function, [*(b.bitcast(v, lanes) for v in (x, y, z)), ir.Constant(_I32, 0xE8)]), _V16)


@functools.cache
def has_byte_tables() -> bool:
    """Whether the machine looks 64 bytes up in a table of 128 at once (AVX-512 VBMI)."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512vbmi"))


def _saturating(name):
    """An operation on two vectors taken as 64 unsigned bytes each."""
    def build(b, x, y):
        lanes = ir.VectorType(_I8, 2 * LANES)
        function = b.module.declare_intrinsic(f"llvm.{name}.v64i8", (), ir.FunctionType(lanes, [lanes, lanes]))
        return b.bitcast(b.call(function, [b.bitcast(x, lanes), b.bitcast(y, lanes)]), _V16)
    return _of_two(build)


add_bytes_up_to_255 = _saturating("uadd.sat")
sub_bytes_down_to_0 = _saturating("usub.sat")


def _of_two_vectors(b, low, high, index):
    """Lane by lane `table[index modulo its length]`; low and high, the halves of the table, vectors of 512 bits as index is.

    Only where `has_byte_tables()`; elsewhere the result is undefined.
    """
    if not has_byte_tables():
        return ir.Constant(low.type, ir.Undefined)
    kind = {8: "qi", 16: "hi", 32: "d"}[low.type.element.width]
    permute = b.module.declare_intrinsic(f"llvm.x86.avx512.vpermi2var.{kind}.512", (), ir.FunctionType(low.type, [low.type] * 3))
    return b.call(permute, [low, index, high])


@operation(vec, vec, vec, vec)
def lookup(b, low, high, index):
    """`_of_two_vectors` byte by byte."""
    return b.bitcast(_of_two_vectors(b, *(b.bitcast(v, ir.VectorType(_I8, 2 * LANES)) for v in (low, high, index))), _V16)


def bits_of_bytes(lanes, word):
    """A function for bit `bit` of as many bytes from element `offset` of the byte array at `address`, packed into one unsigned integer."""
    @operation(word, types.intp, types.intp, types.intp)
    def packed(b, address, offset, bit):
        vector = ir.VectorType(_I8, lanes)
        mask = _broadcast(b, b.shl(ir.Constant(_I8, 1), b.trunc(bit, _I8)), vector)
        hit = b.and_(b.load(_pointer(b, address, offset, _I8, lanes), align=1, typ=vector), mask)
        return b.bitcast(b.icmp_unsigned("!=", hit, ir.Constant(vector, [0] * lanes)), ir.IntType(lanes))
    return packed


bit_of_bytes = bits_of_bytes(LANES, types.uint32)


def can_compress() -> bool:
    """Whether the machine moves the chosen lanes of a vector together (AVX-512)."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


@operation(types.intp, types.intp, types.intp, types.uint32, types.intp, types.intp)
def put_compressed(b, address, index, bits, first, step):
    """Write `first + step i` for each bit i of a uint32 that is set to the uint32 array at `address`, from element `index`
    on; return how many they are. Up to sixteen elements behind them are overwritten. Only where `can_compress()`.
    """
    if not can_compress():
        return ir.Constant(index.type, ir.Undefined)
    lanes, mask = ir.VectorType(_I32, 16), ir.IntType(16)
    compress = b.module.declare_intrinsic("llvm.x86.avx512.mask.compress.v16i32", (), ir.FunctionType(
        lanes, [lanes, lanes, ir.VectorType(ir.IntType(1), 16)]))
    count = b.module.declare_intrinsic("llvm.ctpop.i16", (), ir.FunctionType(mask, [mask]))
    first, step = (b.trunc(value, _I32) for value in (first, step))
    steps = b.mul(_broadcast(b, step, lanes), ir.Constant(lanes, list(range(16))))
    end = index
    for half in range(2):
        chosen = b.trunc(b.lshr(bits, ir.Constant(_I32, 16 * half)), mask)
        start = b.add(first, b.mul(step, ir.Constant(_I32, 16 * half)))
        values = b.call(compress, [b.add(steps, _broadcast(b, start, lanes)), ir.Constant(lanes, [0] * 16),
                                   b.bitcast(chosen, ir.VectorType(ir.IntType(1), 16))])
        b.store(values, _pointer(b, address, end, _I32, 16), align=4)
        end = b.add(end, b.zext(b.call(count, [chosen]), end.type))
    return b.sub(end, index)


@operation(types.void, types.intp)
def prefetch(b, address):
    """Ask for the cache line at an address, which need not be one that may be read."""
    pointer = b.inttoptr(address, ir.PointerType(_I8))
    ask = b.module.declare_intrinsic("llvm.prefetch", [pointer.type], ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32]))
    b.call(ask, [pointer, *(ir.Constant(_I32, n) for n in (0, 2, 1))])  # to be read, into all caches but the smallest, data


@operation(types.uint32, types.uint32)
def trailing_zeros(b, value):
    """Position of the lowest set bit of a uint32 that is not 0."""
    return b.cttz(value, ir.Constant(ir.IntType(1), 1))


@operation(types.float32, types.uint32)
def float32_from_bits(b, bits):
    """The float32 whose bits are those of a uint32."""
    return b.bitcast(bits, ir.FloatType())


@operation(types.uint32, types.float32)
def bits_of_float32(b, value):
    """The bits of a float32 as a uint32."""
    return b.bitcast(value, _I32)


@operation(types.float32, types.float32, types.float32, types.float32)
def fused_multiply_add(b, x, y, z):
    """`x y + z` of float32, rounded once where the machine has an instruction for that."""
    features = llvmlite.binding.get_host_cpu_features()
    x86_without = "sse2" in features and not features.get("fma")
    return b.fadd(b.fmul(x, y), z) if x86_without else b.fma(x, y, z)


@operation(types.int64, types.int64)
def bit_length(b, value):
    """Number of bits of an integer from 0 up."""
    return b.sub(ir.Constant(ir.IntType(64), 64), b.ctlz(value, ir.Constant(ir.IntType(1), 0)))


@operation(types.int64, types.uint64)
def population(b, value):
    """How many bits of a uint64 are set."""
    return b.ctpop(value)


@register_jitable
def aligned(size, like):
    """An uninitialised array of the type of `like` that starts on a cache line: a vector never straddles two."""
    padded = np.empty(size + 64, like.dtype)
    first = (-padded.ctypes.data % 64) // padded.itemsize
    return padded[first:first + size]


@functools.cache
def _one_level_of_threads() -> None:
    """Take back what Numba asks of OpenMP when it starts its threads, `omp_set_nested`: that threads within threads have threads of their
    own. PyTorch's attention multiplies small matrices within its threads, and took 60 times as long."""
    numba.get_num_threads()  # which starts them
    with contextlib.suppress(ImportError, OSError, AttributeError):  # no OpenMP here, or one that does not know it
        from numba.np.ufunc import omppool
        for user in (omppool, torch._C):  # each may have a library of its own
            ctypes.CDLL(user.__file__).omp_set_max_active_levels(1)


def set_threads() -> None:
    """Give Numba as many threads as PyTorch uses."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    _one_level_of_threads()
    if torch.get_num_threads() != threads:  # Numba's first call sets the number for all users of the same OpenMP library
        torch.set_num_threads(threads)
