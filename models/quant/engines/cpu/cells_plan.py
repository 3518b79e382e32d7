"""Cells on a grid as the kernel reads them: tiles of columns, and the ADC in the forms that its vectors take.

A tile is `TILE` columns of one slice. Its rows, 16 bits a cell, lie one after the other, so that the cells of one array and tile
stay in the first-level cache while the pixels of an output row pass.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import torch

from ... import adc
from ...mapping import MappedLayer
from .. import accumulator_dtype
from .layout import TURN, segments_of
from .simd import LANES, aligned

TILE = 2 * LANES  # columns: a row of them is two vectors
UNROLL = 4  # rows that are added at a time

# A layer as the kernel sees it; the names that `rows` and `finish` use mean what they mean in `layout.Shape`.
Shape = namedtuple("Shape", """
    out_channels channels groups arrays stride_y stride_x pad_top pad_left reach_y input_bits blocks slots digits slices steps
    slice_vectors tiles chunk""")
# tiles     of one slice
# chunk     rows whose sum 16 bits hold, a multiple of UNROLL

Plan = namedtuple("Plan", """
    weights array_base tile_stride segments segment_start intervals digit_start step_of_slice""")
# weights      int16, [group, array, slice, tile, row + 1, column]; row 0 is all zero
# array_base   where those of [group, array] begin; tile_stride: elements of one tile of an array

# The ADC. `[., digit, slice, field]`, `.` being 1 or, with the ranges of a batch, `[group, array]`.
# singles, doubles   `SCALE..FACTOR` as float32 and as float64
# divide             the codes are those of a division: a product does not give all of them
# broad              codes and sums need float64 and int64
# low                DYNAMIC: smallest u of each entry
# constant           what every output of a group gets besides the codes
Forms = namedtuple("Forms", "singles doubles divide broad low constant")
SCALE, UNIT, DELTA, LOWEST, HIGHEST, FACTOR = range(6)  # q = clip(rint(u SCALE), ..) or clip(rint(u UNIT / DELTA), ..), times FACTOR
FORM = 6


def plan(layer: MappedLayer) -> tuple[Shape, Plan]:
    """(`Shape`, `Plan`) of a layer with cells on a grid."""
    spec, geometry, groups = layer.spec, layer.geometry, layer.geometry.groups
    out, slices = len(layer.w_codes) // groups, len(spec.slice_bits)
    tiles = -(-out // TILE)
    intervals, segments = segments_of(layer)
    slot = np.cumsum([0] + [last - first + TURN for first, last in intervals])
    rows = np.array([stop - start for start, stop in layer.arrays], np.int64)
    tile_stride = (rows + 1) * TILE
    array_base = np.cumsum(np.concatenate([[0], np.tile(tile_stride * slices * tiles, groups)]))
    cells = layer.cells.weights(spec.reference == "analog").cpu().numpy()
    step_of_slice = np.zeros(slices, np.int64)
    for step, (_, ks) in enumerate(layer.delta_groups if spec.adc_range == "calibrated" or spec.adc_range == "full" else ()):
        step_of_slice[ks] = step
    shape = Shape(
        out_channels=out, channels=layer.group_channels, groups=groups, arrays=len(layer.arrays),
        stride_y=geometry.stride[0], stride_x=geometry.stride[1], pad_top=geometry.padding[0], pad_left=geometry.padding[2],
        reach_y=(layer.kernel[0] - 1) * geometry.dilation[0] + 1, input_bits=spec.a_bits, blocks=TILE // LANES,
        slots=int(slot[-1] + rows.max() + TURN), digits=len(spec.digit_bits), slices=slices, steps=int(step_of_slice.max()) + 1,
        slice_vectors=tiles * TILE // LANES, tiles=tiles, chunk=_chunk(cells))
    return shape, Plan(
        weights=_tiles(cells, layer.arrays, array_base, tile_stride, tiles), array_base=array_base[:-1].reshape(groups, -1),
        tile_stride=tile_stride, segments=np.array([segment for parts in segments for segment in parts], np.int64),
        segment_start=np.cumsum([0] + [len(parts) for parts in segments], dtype=np.int64),
        intervals=np.array([(*interval, at) for interval, at in zip(intervals, slot)], np.int64),
        digit_start=np.cumsum([0, *spec.digit_bits], dtype=np.int64), step_of_slice=step_of_slice)


def fits(layer: MappedLayer) -> bool:
    """Whether 16 bits hold the sum of a few rows, so that the kernel can run the layer."""
    return _chunk(layer.cells.weights(layer.spec.reference == "analog")) > 0


def _chunk(cells):
    largest = max(int(cells.max()), -int(cells.min()), 1)
    return min((2**15 - 1) // largest // UNROLL * UNROLL, 2**15 - UNROLL)


def _tiles(cells, arrays, array_base, tile_stride, tiles):
    """The words of `Plan.weights`. Columns without a channel repeat the first, so that they move no extreme."""
    slices, groups, _, out = cells.shape
    padded = np.concatenate([cells, np.repeat(cells[..., :1], tiles * TILE - out, axis=3)], axis=3).astype(np.int16)
    words = aligned(int(array_base[-1]), np.empty(0, np.int16))
    for g in range(groups):
        for t, (start, stop) in enumerate(arrays):
            part = words[array_base[g * len(arrays) + t]:][:slices * tiles * tile_stride[t]].reshape(slices, tiles, -1, TILE)
            part[:, :, 0] = 0
            part[:, :, 1:] = padded[:, g, start:stop].reshape(slices, stop - start, tiles, TILE).transpose(0, 2, 1, 3)
    return words


def static_forms(layer: MappedLayer) -> Forms:
    """The ADC of a layer whose ranges are fixed."""
    spec = layer.spec
    kinds = list(np.ndindex(len(spec.digit_bits), len(spec.slice_bits)))
    forms = np.zeros((1, len(spec.digit_bits), len(spec.slice_bits), FORM))
    for z, k in kinds:
        delta, q_min, bits = layer.converter(z, k)
        factor = layer.multiplier(z, k) << (spec.dac_bits * z + spec.cell_bits * k)
        forms[0, z, k] = layer.unit / delta, layer.unit, delta, q_min, q_min + 2**bits - 1, factor if bits else 0
    singles = forms.astype(np.float32)
    largest = (np.abs(forms[..., [LOWEST, HIGHEST]]).max(-1) * forms[..., FACTOR]).sum(1).max()
    low, high = layer.u_span
    broad = largest >= 2**24 or max(-low, high) >= 2**24 or accumulator_dtype(layer) != torch.int32
    divide = False
    if not broad:
        divide = not all(_scale(layer, z, k, singles[0, z, k]) for z, k in kinds)
        broad = divide and not all(_divides(layer, z, k, singles[0, z, k]) for z, k in kinds)
    return Forms(singles, forms, divide, broad, np.zeros((1, *forms.shape[1:3]), np.int64),
                 np.zeros(layer.geometry.groups, np.int64))


def _scale(layer, z, k, form):
    """Whether a product gives the ADC's codes for every u; `SCALE` may move by one place."""
    u, codes = _codes(layer, z, k)
    for scale in (form[SCALE], np.nextafter(form[SCALE], np.float32(np.inf)), np.nextafter(form[SCALE], np.float32(0))):
        if np.array_equal(np.rint(u * scale).clip(form[LOWEST], form[HIGHEST]), codes):
            form[SCALE] = scale
            return True
    return False


def _divides(layer, z, k, form):
    u, codes = _codes(layer, z, k)
    return np.array_equal(np.rint(u * form[UNIT] / form[DELTA]).clip(form[LOWEST], form[HIGHEST]), codes)


def _codes(layer, z, k):
    low, high = layer.u_range(k)
    u = np.arange(low, high + 1)
    return u.astype(np.float32), adc.transfer(u, layer.unit, *layer.converter(z, k)).astype(np.float32)


def dynamic_forms(layer: MappedLayer, low: np.ndarray, high: np.ndarray) -> Forms:
    """The ADC whose ranges are the smallest and largest u of the batch, low and high int64 `[group, array, digit, slice]`."""
    spec, span = layer.spec, high - low
    place = spec.dac_bits * np.arange(low.shape[2])[:, None] + spec.cell_bits * np.arange(low.shape[3])
    forms = np.zeros((*span.shape, FORM))
    forms[..., UNIT], forms[..., HIGHEST] = 1, 2**spec.adc_bits - 1
    forms[..., DELTA] = np.maximum(span, 1).astype(np.float32) / np.float32(2**spec.adc_bits)
    forms[..., FACTOR] = span << place
    flat = forms.reshape(-1, *forms.shape[2:])
    return Forms(flat.astype(np.float32), flat, True, True, low.reshape(-1, *low.shape[2:]),
                 (low << place).sum(axis=(1, 2, 3)) << spec.adc_bits)
