"""Cells on a grid as the kernel reads them, and what reads have besides.

A tile is 128 columns of one slice, whose rows, 16 bits a cell, lie one after the other, so that the cells of one array and tile
stay in the first-level cache while the pixels of an output row pass; or, for products of matrices, the 64 columns of `cells_matrix`.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....arrays.mapping import MappedLayer
from ....arrays.readout import APART, COLUMN_KEY, SHARING, SIGNS, column_numbers, first_image, signed
from ....kernels.simd import LANES, aligned
from ..common.layout import of_rows
from ..vectors.amx import TILE_ROWS, configuration
from ..vectors.wide import UNROLL, WIDE
from . import cells_matrix
from .cells_reads import TOGETHER

# A layer as the kernel sees it; the names that `rows` and `finish` use mean what they mean in `layout.ColumnShape`.
CellShape = namedtuple("CellShape", """
    out_channels channels groups arrays stride_y stride_x pad_top pad_left reach_y input_bits blocks slots digits slices classes steps
    slice_vectors matrix tile tile_bits tiles sums squared words turn chunk scale_bits panel_row reference_rows
    reference_slices reference_shift""")
# classes   of n, see `MappedLayer.classes`
# matrix    whether reads are products of matrices (`cells_matrix`), or sums of rows (`cells_rows`)
# tile      columns of one, 2 to the power of tile_bits; tiles: of one slice
# sums      how many are made of each read: u, and of pairs, where `Readout.needs_both`, B; words: elements of the cells of one of them
# squared   whether one more is made, of a^2 and the cells of the last: noise of levels needs it where digits have several bits
# turn      pixels that are read one tile at a time
# chunk     rows whose sum 16 bits hold, a multiple of UNROLL
# scale_bits, panel_row   of `cells_matrix`: of m; rows of the largest array, 0 if there are none
# reference_rows, reference_slices   of one group in `Besides.reference`; shift: bits from where a row of a tile stands to where its
#                                    reference cells do

CellLayout = namedtuple("CellLayout", """
    weights array_base tile_stride segments segment_start intervals digit_start step_of_slice configuration""")
# weights      int16, [sum, group, array, slice, tile, row + 1, column], row 0 all zero, in the order of paired shorts (`wide`); or
#              [.., tile, word] of `cells_matrix.tiles`
# array_base   where those of [group, array] begin; tile_stride: elements of one tile of an array
# configuration   of `amx`

# What reads have besides, see `readout.Readout`; empty arrays where there is nothing.
# keys        of the words of the noise, int32 `[group, word]`, of columns up to whole tiles
# noise       `(c_0 (1 + m), c_1 / 2, 2 m + 2 (analog) or 2 m (digital))` of each slice, float64 `[slice, 3]`
# referred    whether reads need the sums of their reference cells
# reference   int32 `[group, row + 1, slice]`, rows of all arrays, those of each behind a 0; slices up to `reference_slices`
# curve       the first three numbers of `Readout.curve`, float32 `[slice, 3]`; current: the last, float64 `[slice]`
# gains, offsets   float64 and int32 `[slice, group, array, column]`
# gained, moved   whether any gain is not 1, any offset not 0
# base     `MappedLayer.base_noise`
# seed, first_image, pixels   see there; pixels of one image
# idle_is_zero   whether reads that no row is on for are 0
Besides = namedtuple("Besides", """noisy gained moved idle_is_zero curved referred analog keys noise curve current reference reference_base
    gains offsets base seed first_image pixels""")


def lay_out(layer: MappedLayer, matrix: bool) -> tuple[CellShape, CellLayout]:
    """(`CellShape`, `CellLayout`) of a layer with cells on a grid."""
    groups, slices = layer.geometry.groups, len(layer.spec.slice_bits)
    tile = WIDE if matrix else 2 * WIDE
    tiles = -(-(len(layer.w_codes) // groups) // tile)
    rows = np.array([stop - start for start, stop in layer.arrays], np.int64)
    filled = cells_matrix.filled_rows(rows)
    tile_stride = (filled if matrix else rows + 1) * tile
    array_base = np.cumsum(np.concatenate([[0], np.tile(tile_stride * slices * tiles, groups)]))
    parts = weights_of(layer)
    squared = layer.readout is not None and layer.readout.depends_on_level and max(layer.spec.digit_bits) > 1
    of_shape, of_layout = of_rows(layer)
    shape = CellShape(
        **of_shape, blocks=tile // LANES, slice_vectors=padded_columns(layer) // LANES, matrix=matrix, tile=tile,
        tile_bits=tile.bit_length() - 1, tiles=tiles, sums=len(parts), squared=squared, words=int(array_base[-1]),
        turn=max(1, TILE_ROWS // len(layer.spec.digit_bits)), chunk=min(map(_chunk, parts)), scale_bits=cells_matrix.scale_bits(layer),
        panel_row=int(filled.max()) if matrix else 0, reference_rows=parts[0].shape[2] + len(layer.arrays),
        reference_slices=_reference_slices(slices), reference_shift=tile.bit_length() - _reference_slices(slices).bit_length())
    words = aligned(shape.sums * shape.words, np.empty(0, np.int16))
    for own, cells in zip(words.reshape(shape.sums, -1), parts):
        missing = tiles * tile - cells.shape[3]
        padded = F.pad(cells, (0, missing)) if missing else cells  # columns without a channel are zeros
        for place, (g, t) in enumerate(np.ndindex(groups, len(rows))):
            array = padded[:, g, slice(*layer.arrays[t])]
            room = own[array_base[place]:array_base[place + 1]]
            if matrix:
                room[:] = cells_matrix.tiles(array.numpy(), shape.scale_bits).ravel()
            else:
                _put_rows(array, torch.from_numpy(room.view(np.int32)).view(slices, tiles, -1, tile // 2))
    return shape, CellLayout(**of_layout, weights=words, array_base=array_base[:-1].reshape(groups, -1), tile_stride=tile_stride,
                             configuration=configuration())


def padded_columns(layer: MappedLayer) -> int:
    """Columns of a slice and group up to a multiple of 128."""
    return -(-len(layer.w_codes) // layer.geometry.groups // (2 * WIDE)) * 2 * WIDE


def weights_of(layer: MappedLayer) -> list[Tensor]:
    """What a row adds to each of the sums of a read, `CellShape.sums`: int32 `[slices, groups, rows, out / groups]`."""
    weights = [layer.row_weights]
    if layer.readout is not None and layer.readout.needs_both:
        weights.append(layer.readout.both)
    return [part.cpu() for part in weights]


def fits(layer: MappedLayer) -> bool:
    """Whether 16 bits hold the sum of a few rows, so that the kernel can run the layer; 32 hold that of 1024 then."""
    return min(map(_chunk, weights_of(layer))) > 0


def _chunk(cells):
    low, high = cells.aminmax()
    largest = max(int(high), -int(low), 1)
    return min((2**15 - 1) // largest // UNROLL * UNROLL, 2**15 - UNROLL)


def _put_rows(cells, room):
    """Cells `[slices, rows, columns]` as paired shorts, each pair one number, into `[slices, tile, row + 1, column // 2]`."""
    room[:, :, 0] = 0
    low, high = cells.unflatten(2, (room.shape[1], -1, 2, WIDE // 2)).unbind(4)
    room[:, :, 1:] = ((low & 0xFFFF) | (high << 16)).flatten(3).transpose(1, 2)


def _reference_slices(slices):
    """A power of two, and whole quads."""
    return max(TOGETHER, 1 << (slices - 1).bit_length())


def besides(layer: MappedLayer, pixels: int) -> Besides:
    """What the reads of a layer have besides their cells, for images of so many output pixels."""
    readout, spec, groups = layer.readout, layer.spec, layer.geometry.groups
    out, padded = len(layer.w_codes) // groups, padded_columns(layer)
    arrays, slices = layer.arrays, len(spec.slice_bits)
    table = np.zeros((slices, 3))
    reference = np.zeros((groups, layer.w_rows.shape[1] + len(arrays), _reference_slices(slices)), np.int32)
    starts = np.array([start + t for t, (start, _) in enumerate(arrays)], np.int64)
    keys = np.zeros((groups, padded // len(SIGNS)), np.int32)
    if readout is None:
        return Besides(False, False, False, True, False, False, False, keys, table, np.zeros((slices, 3), np.float32), np.zeros(slices),
                       reference, starts, np.zeros((0,) * 4), np.zeros((0,) * 4, np.int32), np.zeros((0,) * 3), 0, 0, pixels)
    words = column_numbers(groups, out)[:, :1].numpy() // SHARING * APART + np.arange(padded // len(SIGNS))
    keys[:] = (words * COLUMN_KEY & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    for k, (c0, c1, m) in enumerate(readout.cell_noise or ()):
        table[k] = c0 * (1 + m), c1 / 2, 2 * m + 2 * (spec.reference == "analog")
    rows = layer.cells.reference.cpu().numpy().transpose(1, 2, 0)
    for t, (start, stop) in enumerate(arrays):
        reference[:, starts[t] + 1:starts[t] + 1 + stop - start, :slices] = rows[:, start:stop]
    gain, offset = gains_and_offsets(layer, padded)
    referred = not readout.needs_both and (readout.curve is not None or bool(table[:, 1].any()))
    base = layer.base_noise.numpy()
    gained, moved = bool((gain != 1).any()), bool(offset.any())
    idle_is_zero = spec.skips_idle or not (moved or base.any())
    return Besides(readout.noisy, gained, moved, idle_is_zero, readout.curve is not None, referred, spec.reference == "analog", keys, table,
                   *curve_and_current(layer), reference, starts, gain, offset, base, signed(readout.seed), first_image(), pixels)


def gains_and_offsets(layer: MappedLayer, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """`Besides.gains` and `offsets`, each of so many columns, those without a channel of ones and zeros."""
    groups, shape = layer.geometry.groups, (len(layer.spec.slice_bits), layer.geometry.groups, len(layer.arrays), columns)
    gain, offset, out = np.ones(shape), np.zeros(shape, np.int32), len(layer.w_codes) // groups
    for found, given in ((gain, layer.readout.gain), (offset, layer.readout.offset)):
        if given is not None:
            found[..., :out] = given.cpu().numpy()
    return gain, offset


def curve_and_current(layer: MappedLayer) -> tuple[np.ndarray, np.ndarray]:
    """`Besides.curve` and `current`."""
    curve = np.array(layer.readout.curve or np.zeros((len(layer.spec.slice_bits), 4)))
    return curve[:, :3].astype(np.float32), curve[:, 3].copy()
