"""Sums of reads as products of matrices, in the tiles of AMX: input digits times cells, all rows whether on or off.

A cell X of 16 bits is two signed bytes, `X = m H + L`, and a digit a two unsigned ones, `m a` and a: `sum a X = sum (m a) H + sum a L`,
one sum over twice the rows. m is the power of two with which the largest digit still is a byte.

The digits of the pixels of a strip are rows of bytes (`pack`): for each pixel and digit the `m a` of all rows, then the a.
Cells are tiles of 64 columns: rows of H, then rows of L, 64 rows a step, in the order of `amx`. Rows are filled up with zeros.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import memset, raw_memcpy, voidptr_t
from torch import Tensor

from ....arrays.mapping import MappedLayer
from ....kernels.inner import inlined
from ....kernels.simd import _broadcast, _pointer, int64_at, operation
from ..common.layout import BOUNDS, FIRST, INTERVAL, LAST, ROW, SEGMENT, TAP_X, TAP_Y
from ..vectors.amx import TILE_BYTES, add_products, clear_sums, put_sums
from ..vectors.wide import WIDE

STEP = TILE_BYTES  # rows of one product
SPARSEST = 2  # a layer is run so where filling its arrays up makes them no longer than so many times
FEWEST = 2  # slices: packing digits costs about as much as adding the rows of one
_BYTE, _BYTES = ir.IntType(8), ir.VectorType(ir.IntType(8), STEP)


def scale_bits(layer: MappedLayer) -> int:
    """Of m."""
    return 8 - max(layer.spec.digit_bits)


def fits(layer: MappedLayer, cells: Tensor) -> bool:
    """Whether two bytes hold each cell, the arrays are not mostly zeros that fill them up, and digits that are packed are used for
    `FEWEST` slices."""
    half, largest = 2 ** scale_bits(layer) // 2, 2**7 * 2 ** scale_bits(layer)
    rows = sum(stop - start for start, stop in layer.arrays)
    filled = sum(filled_rows(stop - start) for start, stop in layer.arrays)
    low, high = map(int, cells.aminmax())
    return half > 0 and -largest <= low and high < largest - half and filled <= SPARSEST * rows and len(cells) >= FEWEST


def filled_rows(rows):
    """Rows up to whole steps."""
    return -(-rows // STEP) * STEP


def tiles(cells: np.ndarray, bits: int) -> np.ndarray:
    """The words of cells `[slices, rows, columns]`, columns in whole tiles: int16 `[slices, tile, word]`. Args: bits, of m."""
    slices, rows, columns = cells.shape
    padded = np.zeros((slices, filled_rows(rows), columns), np.int32)
    padded[:, :rows] = cells
    high = (padded + 2**bits // 2) >> bits
    parts = np.stack([high, padded - (high << bits)], axis=1).astype(np.int8)
    parts = parts.reshape(slices, -1, STEP // 4, 4, columns // WIDE, WIDE // 16, 16)  # slice, step, quad, byte, tile, block, column
    return np.ascontiguousarray(parts.transpose(0, 4, 1, 5, 2, 6, 3)).view(np.int16).reshape(slices, columns // WIDE, -1)


@operation(types.void, types.intp, types.intp)
def _clear(b, address, size):
    """Set `size` bytes to 0."""
    memset(b, b.inttoptr(address, voidptr_t), size, 0)


@operation(types.void, types.intp, types.intp, types.intp)
def _copy(b, target, source, size):
    """Copy `size` bytes between addresses."""
    raw_memcpy(b, b.inttoptr(target, voidptr_t), b.inttoptr(source, voidptr_t), size, 1)


@operation(types.void, *[types.intp] * 5)
def _put_digits(b, target, source, first, mask, up):
    """Of 64 bytes at `source` `((byte >> first) & mask) << up`, to `target`."""
    zero = ir.Constant(ir.IntType(64), 0)
    first, mask, up = (_broadcast(b, b.trunc(value, _BYTE), _BYTES) for value in (first, mask, up))
    codes = b.load(_pointer(b, source, zero, _BYTE, STEP), align=1, typ=_BYTES)
    b.store(b.shl(b.and_(b.lshr(codes, first), mask), up), _pointer(b, target, zero, _BYTE, STEP), align=1)


@inlined
def pack(shape, at, source, codes, t, strip):
    """The digits of array `t` under the pixels of a strip to `at.panel`; the codes of the image and group begin at address `codes`."""
    rows = int64_at(at.tile_stride, t) // WIDE
    for x in range(strip.count):
        top = (strip.y + x // strip.width) * shape.stride_y - shape.pad_top
        left = x % strip.width * shape.stride_x - shape.pad_left
        _clear(at.codes_row, rows)
        for s in range(int64_at(at.segment_start, t), int64_at(at.segment_start, t + 1)):
            segment = at.segments + 8 * SEGMENT * s
            iy, ix = top + int64_at(segment, TAP_Y), left + int64_at(segment, TAP_X)
            if 0 <= iy < source.height and 0 <= ix < source.width:
                interval = at.intervals + 8 * BOUNDS * int64_at(segment, INTERVAL)
                first, last = int64_at(interval, FIRST), int64_at(interval, LAST)
                pixel = codes + (iy * source.width + ix) * shape.groups * shape.channels
                _copy(at.codes_row + int64_at(segment, ROW), pixel + first, last - first)
        for z in range(shape.digits):
            first, end = int64_at(at.digit_start, z), int64_at(at.digit_start, z + 1)
            target = at.panel + (x * shape.digits + z) * 2 * rows
            for row in range(0, rows, STEP):
                _put_digits(target + row, at.codes_row + row, first, (1 << (end - first)) - 1, shape.scale_bits)
                _put_digits(target + rows + row, at.codes_row + row, first, (1 << (end - first)) - 1, 0)


@inlined
def multiply(shape, at, weights, t, first, sums):
    """The sums of the 64 columns whose cells of array `t` are at `weights`, of the `TILE_ROWS` reads from `first` on, to `sums`."""
    rows = int64_at(at.tile_stride, t) // WIDE
    digits, stride = at.panel + first * 2 * rows, 2 * rows
    clear_sums()
    for step in range(stride // STEP):
        add_products(digits + step * STEP, stride, weights + step * STEP * WIDE)
    put_sums(sums, 4 * WIDE)
