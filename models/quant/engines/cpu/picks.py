"""Vectors of 64 bytes, or of 64 lanes of 16 bits, that are picked from small tables in registers: one instruction looks 64 bytes up in a
table of 64, or 32 lanes of 16 bits in a table of 32 (AVX-512 VBMI and BW).

Call these only where `simd.has_byte_tables()`; elsewhere what is picked is undefined.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .simd import _broadcast, has_byte_tables
from .wide import _F32, _FLOATS, _I16, _I32, _INTS, _SHORTS, MAGIC, WIDE, _between, _call, _operation, _vector_type, floats, ints, shorts

_I8 = ir.IntType(8)
many_bytes, _BYTES = _vector_type("Vec64xI8", _I8)
TABLE = 64  # bytes of a table: 2^6 bytes, or 2^5 numbers of 16 bits
BYTE_ROWS, SHORT_ROWS = 6, 5  # bits of an index


def _at(b, address, vector):
    return b.inttoptr(address, ir.PointerType(vector))


def _picked(b, name, kind, table, index):
    if not has_byte_tables():
        return ir.Constant(kind, ir.Undefined)
    function = b.module.declare_intrinsic(f"llvm.x86.avx512.permvar.{name}.512", (), ir.FunctionType(kind, [kind, kind]))
    return b.call(function, [table, index])


@intrinsic
def load_bytes(typingctx, address):
    """The 64 bytes at an address."""
    return many_bytes(types.intp), lambda context, b, sig, args: b.load(_at(b, args[0], _BYTES), align=1, typ=_BYTES)


full_i8 = _operation(many_bytes, types.intp)(lambda b, value: _broadcast(b, b.trunc(value, _I8), _BYTES))
added_bytes = _operation(many_bytes, many_bytes, many_bytes)(lambda b, x, y: b.add(x, y))
larger_bytes = _operation(many_bytes, many_bytes, many_bytes)(lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y))
smaller_bytes = _operation(many_bytes, many_bytes, many_bytes)(lambda b, x, y: b.select(b.icmp_signed("<", x, y), x, y))


@_operation(many_bytes, many_bytes, many_bytes)
def picked_bytes(b, table, index):
    """`table[index mod 64]` for each byte."""
    return _picked(b, "qi", _BYTES, table, index)


@_operation(many_bytes, many_bytes, many_bytes, many_bytes)
def picked_of_two(b, low, high, index):
    """`table[index mod 128]` for each byte, of a table in two halves."""
    if not has_byte_tables():
        return ir.Constant(_BYTES, ir.Undefined)
    permute = b.module.declare_intrinsic("llvm.x86.avx512.vpermi2var.qi.512", (), ir.FunctionType(_BYTES, [_BYTES] * 3))
    return b.call(permute, [low, index, high])


@intrinsic
def picked_shorts(typingctx, table, index):
    """`table[index mod 32]` for 64 bytes at address `index`, of the 32 numbers of 16 bits at address `table`."""
    def codegen(context, b, sig, args):
        half = ir.VectorType(_I16, WIDE // 2)
        table = b.load(_at(b, args[0], half), align=2, typ=half)
        index = b.zext(b.load(_at(b, args[1], _BYTES), align=1, typ=_BYTES), _SHORTS)
        halves = [_picked(b, "hi", half, table, b.shuffle_vector(index, index, ir.Constant(ir.VectorType(_I32, WIDE // 2), lanes)))
                  for lanes in (list(range(WIDE // 2)), list(range(WIDE // 2, WIDE)))]
        return b.shuffle_vector(*halves, ir.Constant(ir.VectorType(_I32, WIDE), list(range(WIDE))))
    return shorts(types.intp, types.intp), codegen


@intrinsic
def add_product_of_bytes(typingctx, total, x, factor):
    """`total + x factor` of signed bytes x, in 32 bits."""
    def codegen(context, b, sig, args):
        total, x, factor = args
        return b.add(total, b.mul(b.sext(x, _INTS), _broadcast(b, b.trunc(factor, _I32), _INTS)))
    return ints(ints, many_bytes, types.intp), codegen


@intrinsic
def add_product_of_floats(typingctx, total, x, factor):
    """`total + x factor` of whole numbers x, in 32 bits."""
    def codegen(context, b, sig, args):
        total, x, factor = args
        return b.add(total, b.mul(b.fptosi(x, _INTS), _broadcast(b, b.trunc(factor, _I32), _INTS)))
    return ints(ints, floats, types.intp), codegen
