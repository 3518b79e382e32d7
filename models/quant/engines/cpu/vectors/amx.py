"""Products of small matrices of bytes in the tile registers of AMX, for Numba kernels: `C += A B`.

A tile has 16 rows of 64 bytes. A, 16 rows of 64 unsigned bytes; B, 64 rows of 16 signed bytes, four rows side by side, `[16, column, 4]`;
C, 16 x 16 int32. Here are one A and four B at a time, so four C: 64 columns. A product takes 16 cycles, a load 8 if its rows do not
straddle cache lines. Call these only where `can_multiply()`; elsewhere they do nothing.
"""

from __future__ import annotations

import ctypes
import functools
import sys

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types

from ....kernels.simd import aligned, operation

TILE_ROWS, TILE_BYTES = 16, 64
PRODUCTS = 4  # of one A with as many B
_I8, _I64 = ir.IntType(8), ir.IntType(64)
_SUMS, _A, _B = range(PRODUCTS), PRODUCTS, range(PRODUCTS + 1, 8)  # tile registers; three B take turns
_REQUEST, _TILE_DATA = 0x1023, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
_SYSCALL = 158  # arch_prctl


def _has_tiles():
    """Whether the compiler makes such instructions for this machine."""
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("amx-tile") and features.get("amx-int8"))


@functools.cache
def can_multiply() -> bool:
    """Whether this process may use the tiles: Linux lends them to those that ask."""
    if not (_has_tiles() and sys.platform == "linux"):
        return False
    return ctypes.CDLL(None, use_errno=True).syscall(_SYSCALL, _REQUEST, _TILE_DATA) == 0


def configuration() -> np.ndarray:
    """What `configure` reads: all tiles of full size."""
    words = aligned(64, np.empty(0, np.uint8))
    words[:] = 0
    words[0] = 1
    words[16:32:2] = TILE_BYTES
    words[48:56] = TILE_ROWS
    return words


def _instruction(b, name, *operands):
    """Tile registers as ints, addresses as pointers."""
    values = [ir.Constant(_I8, v) if isinstance(v, int) else v for v in operands]
    kind = ir.FunctionType(ir.VoidType(), [v.type for v in values])
    if _has_tiles():
        b.call(b.module.declare_intrinsic(f"llvm.x86.{name}", (), kind), values)


def _pointer(b, address, offset=0):
    return b.inttoptr(b.add(address, ir.Constant(address.type, offset)), ir.PointerType(_I8))


@operation(types.void, types.intp)
def configure(b, address):
    """Take the tiles into use: `configuration` stands at `address`. Each thread does so, and ends with `release`."""
    _instruction(b, "ldtilecfg", _pointer(b, address))


@operation(types.void)
def release(b):
    """Give the tiles back, so that the system need not save them."""
    _instruction(b, "tilerelease")


@operation(types.void)
def clear_sums(b):
    """C = 0, all four."""
    for c in _SUMS:
        _instruction(b, "tilezero", c)


@operation(types.void, *[types.intp] * 3)
def add_products(b, a, a_stride, address):
    """`C_j += A B_j`: rows of A at `a`, every `a_stride` bytes; the four B one after the other."""
    _instruction(b, "tileloadd64", _A, _pointer(b, a), a_stride)
    for j in _SUMS:
        tile = _B[j % len(_B)]
        _instruction(b, "tileloadd64", tile, _pointer(b, address, j * TILE_ROWS * TILE_BYTES), ir.Constant(_I64, TILE_BYTES))
        _instruction(b, "tdpbusd", j, _A, tile)


@operation(types.void, types.intp, types.intp)
def put_sums(b, address, stride):
    """Write the four C side by side: 16 rows of 64 int32, every `stride` bytes."""
    for c in _SUMS:
        _instruction(b, "tilestored64", c, _pointer(b, address, c * TILE_BYTES), stride)
