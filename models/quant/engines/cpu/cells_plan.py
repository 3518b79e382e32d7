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
from ...readout import COLUMN_KEY, DEVIATION, NORMAL, first_image
from .. import accumulator_dtype
from .layout import TURN, segments_of
from .simd import LANES, aligned
from .wide import WIDE

TILE = 2 * WIDE  # columns: a row of them is two vectors
UNROLL = 4  # rows that are added at a time

# A layer as the kernel sees it; the names that `rows` and `finish` use mean what they mean in `layout.Shape`.
Shape = namedtuple("Shape", """
    out_channels channels groups arrays stride_y stride_x pad_top pad_left reach_y input_bits blocks slots digits slices steps
    slice_vectors tiles chunk reference_rows""")
# tiles     of one slice
# chunk     rows whose sum 16 bits hold, a multiple of UNROLL
# reference_rows   of one slice and group in `Besides.reference`

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


# What reads have besides, see `readout.Readout`; empty arrays where there is nothing.
# keys        of each column, int32 `[group, column]`, columns up to whole tiles
# noise       `(c_0 (1 + m), c_1 / 2, 2 m + 2 (analog) or 2 m (digital))` of each slice, float64 `[slice, 3]`
# reference   of the noise: int32 `[slice, group, row + 1]`, rows of all arrays, those of each behind a 0
# curve       `Readout.curve`, float64 `[slice, 4]`
# gain, offset   float64 and int32 `[slice, group, array, column]`
# base, seed, first_image, pixels   see there; pixels of one image
Besides = namedtuple("Besides", """noisy changed curved analog keys noise curve reference reference_base gain offset base seed
    first_image pixels""")


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
        slice_vectors=tiles * TILE // LANES, tiles=tiles, chunk=_chunk(cells),
        reference_rows=cells.shape[2] + len(layer.arrays))
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
    """The words of `Plan.weights`."""
    slices, groups = cells.shape[:2]
    padded = _padded(cells, tiles * TILE).astype(np.int16)
    words = aligned(int(array_base[-1]), np.empty(0, np.int16))
    for g in range(groups):
        for t, (start, stop) in enumerate(arrays):
            part = words[array_base[g * len(arrays) + t]:][:slices * tiles * tile_stride[t]].reshape(slices, tiles, -1, TILE)
            part[:, :, 0] = 0
            part[:, :, 1:] = padded[:, g, start:stop].reshape(slices, stop - start, tiles, TILE).transpose(0, 2, 1, 3)
    return words


def _padded(columns, count):
    """Columns up to `count`, those without a channel repeating the first, so that they move no extreme."""
    return np.concatenate([columns, np.repeat(columns[..., :1], count - columns.shape[-1], axis=-1)], axis=-1)


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
    low, high = np.array([_read_range(layer, k) for k in range(len(spec.slice_bits))]).T
    low, high = int(low.min()), int(high.max())
    broad = largest >= 2**24 or max(-low, high) >= 2**24 or accumulator_dtype(layer) != torch.int32
    divide = False
    if not broad:
        divide = not all(_scale(layer, z, k, singles[0, z, k]) for z, k in kinds)
        broad = divide and not all(_divides(layer, z, k, singles[0, z, k]) for z, k in kinds)
    return Forms(singles, forms, divide, broad, np.zeros((1, *forms.shape[1:3]), np.int64),
                 np.zeros(layer.geometry.groups, np.int64))


def no_adc_forms(layer: MappedLayer) -> Forms:
    """Every read as it is, as the code of an ADC with steps of one u."""
    spec = layer.spec
    forms = np.zeros((1, len(spec.digit_bits), len(spec.slice_bits), FORM))
    forms[..., UNIT] = forms[..., DELTA] = 1
    forms[..., LOWEST], forms[..., HIGHEST] = -(2**31), 2**31
    place = spec.dac_bits * np.arange(forms.shape[1])[:, None] + spec.cell_bits * np.arange(forms.shape[2])
    forms[..., FACTOR] = 2.0**place
    return Forms(forms.astype(np.float32), forms, True, True, np.zeros((1, *forms.shape[1:3]), np.int64),
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


def _read_range(layer, k):
    """Smallest and largest u of slice `k` that a converter can see: a sum of four entries of the noise's table is bounded too."""
    (low, high), readout = layer.u_range(k), layer.readout
    if readout is None:
        return low, high
    if readout.curve is not None:  # bit lines that load themselves carry less, and never more than cells without wires
        low, high = 2 * low, 2 * high
    if readout.noisy:
        c0, c1, m = readout.cell_noise[k] if readout.cell_noise else (0.0, 0.0, 0.0)
        most = layer.tallest * (2 ** max(layer.spec.digit_bits) - 1) ** 2
        cell = max(int(layer.cells.values[k].abs().max()), int(layer.cells.reference[k].abs().max()))
        reach = int(4 * max(NORMAL) / DEVIATION * (readout.base + most * (1 + m) * (abs(c0) + abs(c1) * cell)) ** 0.5) + 2
        low, high = low - reach, high + reach
    gain = 1.0 if readout.gain is None else max(1.0, float(readout.gain.max()))
    offset = 0 if readout.offset is None else int(readout.offset.abs().max())
    return int(low * gain) - 1 - offset, int(high * gain) + 1 + offset


def _codes(layer, z, k):
    low, high = _read_range(layer, k)
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


def besides(layer: MappedLayer, pixels: int) -> Besides:
    """What the reads of a layer have besides their cells, for images of so many output pixels."""
    readout, spec, groups = layer.readout, layer.spec, layer.geometry.groups
    out = len(layer.w_codes) // groups
    padded = -(-out // TILE) * TILE
    arrays, slices = layer.arrays, len(spec.slice_bits)
    table = np.zeros((slices, 3))
    reference = np.zeros((slices, groups, layer.w_rows.shape[1] + len(arrays)), np.int32)
    starts = np.array([start + t for t, (start, _) in enumerate(arrays)], np.int64)
    keys = np.zeros((groups, padded), np.int64)
    keys[:] = np.arange(groups)[:, None] * out  # columns without a channel repeat the first in all
    keys[:, :out] += np.arange(out)
    if readout is None:
        return Besides(False, False, False, False, keys.astype(np.int32), table, np.zeros((slices, 4)), reference, starts,
                       np.zeros(0), np.zeros(0, np.int32), 0.0, 0, 0, pixels)
    for k, (c0, c1, m) in enumerate(readout.cell_noise or ()):
        table[k] = c0 * (1 + m), c1 / 2, 2 * m + 2 * (spec.reference == "analog")
    rows = layer.cells.reference.cpu().numpy()
    for t, (start, stop) in enumerate(arrays):
        reference[:, :, starts[t] + 1:starts[t] + 1 + stop - start] = rows[:, :, start:stop]
    gain, offset = np.ones((slices, groups, len(arrays), padded)), np.zeros((slices, groups, len(arrays), padded), np.int32)
    if readout.gain is not None:
        gain[:] = _padded(readout.gain.cpu().numpy(), padded)
    if readout.offset is not None:
        offset[:] = _padded(readout.offset.cpu().numpy(), padded)
    changed = readout.gain is not None or readout.offset is not None
    keys = (keys * COLUMN_KEY & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    seed = np.array([readout.seed & (2**64 - 1)], np.uint64).view(np.int64)[0]
    curve = np.array(readout.curve or np.zeros((slices, 4)), np.float64)
    return Besides(readout.noisy, changed, readout.curve is not None, spec.reference == "analog", keys, table, curve, reference,
                   starts, gain, offset, float(readout.base), int(seed), first_image(), pixels)
