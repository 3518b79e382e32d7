"""What engines that compute in 32 bits, by formulas of their own, lack: other converters than theirs, and room for reads that reach far
with what they have besides (`readout.Readout`)."""

from __future__ import annotations

import math

from ..arrays.converter import Converter
from ..arrays.mapping import MappedLayer
from ..arrays.readout import DEVIATION, NORMAL

MOST = 1024  # deviations over `DEVIATION` are below, and reads below 2^22: 1.5 2^23 and their products are then exact in float32


def read_range(layer: MappedLayer, k: int) -> tuple[int, int]:
    """Smallest and largest u of slice `k` that a converter can see: a sum of four entries of the noise's table is bounded too."""
    (low, high), readout = layer.u_range(k), layer.readout
    if readout is None:
        return low, high
    if readout.curve is not None:
        slope, shift = _bends(layer, k)
        low, high = math.floor(slope * low - shift) - 1, math.ceil(slope * high + shift) + 1
    if readout.noisy:
        reach = int(4 * max(NORMAL) / DEVIATION * _deviation(layer, k)) + 2
        low, high = low - reach, high + reach
    gain = 1.0 if readout.gain is None else max(1.0, float(readout.gain.max()))
    offset = 0 if readout.offset is None else int(readout.offset.abs().max())
    return int(low * gain) - 1 - offset, int(high * gain) + 1 + offset


def lacking(layer: MappedLayer, compares: bool = False) -> str | None:
    """Why such an engine cannot run a layer, or None. Args: compares, whether it can where codes follow from thresholds."""
    kind = layer.spec.converter
    if layer.compares and not compares:
        return "it has linear converters only, and no thresholds"
    if kind is not Converter and layer.spec.adc_range != "ideal" and not layer.compares:
        return f"it has linear converters only, not {kind.__name__}"
    return too_far(layer)


def too_far(layer: MappedLayer) -> str | None:
    """Why 32 bits do not hold what the reads of a layer have besides, or None.

    int32 must have u and, where noise depends on the level, the sum that it is of, `2 sum a^2 (X + m R)` or `2 sum a^2 B`; for curves
    float32 `sum a B` of pairs, and int32 `sum a R`. What noise and curves make of reads is rounded in float32, by adding 1.5 2^23.
    """
    readout = layer.readout
    if readout is None:
        return None
    slices, digit = range(len(layer.spec.slice_bits)), 2 ** max(layer.spec.digit_bits) - 1
    farthest = max(max(-low, high) for low, high in (read_range(layer, k) for k in slices))
    if farthest >= 2**31:
        return "reads with gains, offsets or noise that 32 bits do not hold"
    if not (readout.noisy or readout.curve):
        return None
    if farthest >= 2**22 or max(_deviation(layer, k) for k in slices) >= MOST * DEVIATION:
        return "curves or noise of reads that float32 does not hold"
    cell, reference = _largest_cells(layer)
    of_levels = [m for _, c1, m in readout.cell_noise or () if c1]
    too_large = bool(of_levels) and 2 * layer.tallest * digit**2 * (cell + max(of_levels) * reference) >= 2**31
    if readout.curve:
        largest, most = (cell, 2**24) if readout.needs_both else (reference, 2**31)
        too_large = too_large or layer.tallest * digit * largest >= most
    return "noise or curves of reads whose cells' sums 32 bits do not hold" if too_large else None


def _bends(layer, k):
    """(slope, shift): what the curve of slice `k` makes of u is at most slope times u, and shift more: the largest slope at any current of
    a bit line, never 2, as lines that load themselves carry less, and what the line of cells at zero loses where a digital reference
    takes it to lose nothing."""
    b0, b1, b2, current = layer.readout.curve[k]
    cells = layer.readout.both if layer.readout.needs_both else layer.cells.values
    ends = [0, *(int(end) for part in (cells, layer.cells.reference) for end in part[k].aminmax())]
    most = layer.tallest * (2 ** max(layer.spec.digit_bits) - 1)
    currents = [most * min(0.0, current + min(ends)), most * max(0.0, current + max(ends))]
    turn = -b1 / (3 * b2) if b2 else 0.0
    currents += [turn] if currents[0] < turn < currents[1] else []
    slope, zero = min(2.0, max(abs(b0 + s * (2 * b1 + s * 3 * b2)) for s in currents)), most * abs(current)
    shift = zero * (abs(b0 - 1) + abs(b1) * zero + abs(b2) * zero**2)
    return slope, 0.0 if layer.spec.reference == "analog" else shift


def _largest_cells(layer):
    """(X, R): the largest cell, of pairs what both lines hold together, and the largest reference cell."""
    values = layer.readout.both if layer.readout.needs_both else layer.cells.values
    return int(values.abs().max()), 0 if layer.readout.needs_both else int(layer.cells.reference.abs().max())


def _deviation(layer, k):
    """Of the noise of slice `k`, at most."""
    readout = layer.readout
    c0, c1, m = readout.cell_noise[k] if readout.cell_noise else (0.0, 0.0, 0.0)
    most = layer.tallest * (2 ** max(layer.spec.digit_bits) - 1) ** 2
    parts = [layer.cells.values, layer.cells.reference, *([readout.both] if readout.needs_both else [])]
    cell = max(int(part[k].abs().max()) for part in parts)
    return (float(layer.base_noise[:, k].max()) + most * (1 + m) * (abs(c0) + abs(c1) * cell)) ** 0.5
