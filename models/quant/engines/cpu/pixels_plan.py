"""Output pixels side by side: what of a layer the kernel (`pixels_kernel`) reads, and which layers it can run.

A lane of a vector is an output pixel, so that vectors are full however few columns a layer has. What up to six rows of one column add to
u depends on as many input bits: it is looked up in a table of 2^6 bytes, or of 2^5 numbers of 16 bits where bytes do not hold u.

    u = sum over sets of rows  table[set, column][input bits of the rows]

Input bits that belong to a set are one byte a pixel, in *planes*: of one input bit, channel interval and phase, all pixels of the padded
input in the order of memory, from one row to the next without a gap. A tap is then nothing but a distance. With a stride s an input
has s x s phases, `[y mod s, x mod s]`, each a plane with a pixel for each output pixel.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import numpy as np

from ... import adc
from ...mapping import MappedLayer
from .cells_forms import HIGHEST, LOWEST, static_forms
from .cells_plan import step_of_slice
from .picks import BYTE_ROWS, SHORT_ROWS, TABLE
from .simd import LANES, aligned

WINDOW = 128  # codes of a table of bytes

# A layer as the kernel sees it; the names that `finish` uses mean what they mean in `layout.Shape`.
Shape = namedtuple("Shape", """
    narrow divide out_channels channels groups arrays digits slices steps slice_vectors input_bits intervals sets
    stride_y stride_x pad_top pad_left clip together""")
# narrow     whether u and codes are bytes; else u has 16 bits and codes are float32, of a quotient where `divide`
# intervals  channel intervals, of as many rows as a set has; sets: of one column
# clip       whether u must be brought into the window of a table of codes first
# together   arrays whose codes a byte can add up

# tables         int8 `[group, out, slice, set, 64]`, or int16 `[.., 32]`
# set_start      first set of each array, and the end of the last
# first, size    channels of each interval
# plane          interval of each set; down, right: of its tap, in input pixels
# digit_start    first input bit of each digit
# step_of_slice  which of the ADC steps each slice has
# codes          narrow: int8 `[digit, slice, 128]`, entry `u mod 128`
# ends           narrow: the window of u, int64 `[digit, slice, 2]`
# forms          else: `cells_forms.Forms.singles`
# factors        what a code is worth, int64 `[digit, slice]`; 0 without a conversion
Plan = namedtuple("Plan", "tables set_start first size plane down right digit_start step_of_slice codes ends forms factors")


@dataclass(frozen=True)
class Sets:
    """Sets of rows of one tap: `rows` of the layer, range of `interval`, tap (down, right), and the first of each array."""

    rows: list[tuple[int, int]]
    interval: list[int]
    taps: list[tuple[int, int]]
    start: list[int]
    intervals: list[tuple[int, int]]


def sets_of(layer: MappedLayer, most: int) -> Sets:
    """The arrays of a layer cut into sets of at most `most` rows, which lie in one tap."""
    (_, kw), (dy, dx), channels = layer.kernel, layer.geometry.dilation, layer.group_channels
    rows, interval, taps, start, intervals = [], [], [], [0], {}
    for first, stop in layer.arrays:
        row = first
        while row < stop:
            tap, channel = divmod(row, channels)
            end = min(row + most, stop, (tap + 1) * channels)
            rows.append((row, end))
            interval.append(intervals.setdefault((channel, channel + end - row), len(intervals)))
            taps.append((tap // kw * dy, tap % kw * dx))
            row = end
        start.append(len(rows))
    return Sets(rows, interval, taps, start, list(intervals))


def row_weights(layer: MappedLayer) -> np.ndarray:
    """What a row that is on adds to u, int32 `[slices, groups, rows, out / groups]`."""
    spec, analog = layer.spec, layer.spec.reference == "analog"
    if layer.cells is not None:
        return layer.cells.weights(analog).cpu().numpy()
    w_rows, scale = layer.w_rows.cpu().numpy().astype(np.int32), round(1 / spec.unit)
    return np.stack([scale * ((w_rows >> (spec.cell_bits * k)) & (2**bits - 1)) - (reference if analog else 0)
                     for k, (bits, reference) in enumerate(zip(spec.slice_bits, layer.reference_twice))])


def _narrow_codes(layer):
    """(`Plan.codes`, `Plan.ends`, whether u is clipped, largest |code|) where bytes hold u and codes, else None."""
    low, high = layer.u_span
    if low < -128 or high > 127:
        return None
    kinds = len(layer.spec.digit_bits), len(layer.spec.slice_bits)
    tables, ends, largest = np.zeros((*kinds, WINDOW), np.int8), np.zeros((*kinds, 2), np.int64), 1
    u = np.arange(low, high + 1)
    for z, k in np.ndindex(kinds):
        codes = adc.transfer(u, layer.unit, *layer.converter(z, k))
        first, last = low, high
        if len(u) > WINDOW:  # beyond these all codes are alike
            first = int(u[np.flatnonzero(codes == codes[0])[-1]])
            last = max(first, int(u[np.flatnonzero(codes == codes[-1])[0]]))
        if last - first >= WINDOW or np.abs(codes).max() > 127:
            return None
        tables[z, k, np.arange(first, last + 1) % WINDOW] = codes[first - low:last + 1 - low]
        ends[z, k], largest = (first, last), max(largest, int(np.abs(codes).max()))
    return tables, ends, len(u) > WINDOW, largest


def plan(layer: MappedLayer) -> tuple[Shape, Plan] | None:
    """(`Shape`, `Plan`) of a layer with fixed ranges, None where neither form holds its reads or gives its codes."""
    spec, geometry, groups = layer.spec, layer.geometry, layer.geometry.groups
    forms, narrow = static_forms(layer), None if layer.cells is not None else _narrow_codes(layer)
    low, high = layer.u_span
    if forms.broad or low < -2**15 or high >= 2**15:
        return None
    tables, ends, clip, largest = narrow or (np.zeros(0, np.int8), np.zeros(0, np.int64), False, 1)
    most = SHORT_ROWS if narrow is None else BYTE_ROWS
    sets, out, step = sets_of(layer, most), len(layer.w_codes) // groups, step_of_slice(layer)
    places = [(z, k) for z in range(len(spec.digit_bits)) for k in range(len(spec.slice_bits))]
    factors = [layer.multiplier(z, k) << (spec.dac_bits * z + spec.cell_bits * k) if layer.converter(z, k).bits else 0 for z, k in places]
    if len(layer.arrays) * np.abs(forms.singles[..., [LOWEST, HIGHEST]]).max() >= 2**24:
        return None
    intervals = np.array(sets.intervals, np.int64)
    shape = Shape(
        narrow=narrow is not None, divide=bool(forms.divide), out_channels=out, channels=layer.group_channels, groups=groups,
        arrays=len(layer.arrays), digits=len(spec.digit_bits), slices=len(spec.slice_bits), steps=int(step.max()) + 1,
        slice_vectors=-(-out // LANES), input_bits=spec.a_bits, intervals=len(intervals), sets=len(sets.rows),
        stride_y=geometry.stride[0], stride_x=geometry.stride[1], pad_top=geometry.padding[0], pad_left=geometry.padding[2],
        clip=clip, together=127 // largest)
    down, right = np.array(sets.taps, np.int64).T
    return shape, Plan(
        tables=_tables(row_weights(layer), sets, most, np.int8 if narrow else np.int16),
        set_start=np.array(sets.start, np.int64), first=intervals[:, 0].copy(), size=intervals[:, 1] - intervals[:, 0],
        plane=np.array(sets.interval, np.int64), down=down.copy(), right=right.copy(),
        digit_start=np.cumsum([0, *spec.digit_bits], dtype=np.int64), step_of_slice=step, codes=tables, ends=ends,
        forms=forms.singles[0], factors=np.array(factors, np.int64))


def _tables(weights, sets, most, dtype):
    """What each set of rows adds for each pattern of its input bits, `[group, out, slice, set, pattern]`."""
    slices, groups, _, out = weights.shape
    padded = np.zeros((slices, groups, len(sets.rows), most, out), np.int32)
    for number, (first, end) in enumerate(sets.rows):
        padded[:, :, number, :end - first] = weights[:, :, first:end]
    tables = aligned(groups * out * slices * len(sets.rows) * TABLE // np.dtype(dtype).itemsize, np.empty(0, dtype))
    tables = tables.reshape(groups, out, slices, len(sets.rows), 2**most)
    tables[..., 0] = 0
    for bit in range(most):  # of patterns with this bit as the highest: those without it, and what its row adds
        tables[..., 2**bit:2 ** (bit + 1)] = tables[..., :2**bit] + padded[:, :, :, bit].transpose(1, 3, 0, 2)[..., None]
    return tables
