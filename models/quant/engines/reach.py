"""How far reads reach with what they have besides (`readout.Readout`), and whether 32 bits hold it."""

from __future__ import annotations

from ..mapping import MappedLayer
from ..readout import DEVIATION, NORMAL

MOST = 1024  # deviations over `DEVIATION` are below, and reads below 2^22: 1.5 2^23 and their products are then exact in float32


def read_range(layer: MappedLayer, k: int) -> tuple[int, int]:
    """Smallest and largest u of slice `k` that a converter can see: a sum of four entries of the noise's table is bounded too."""
    (low, high), readout = layer.u_range(k), layer.readout
    if readout is None:
        return low, high
    if readout.curve is not None:  # bit lines that load themselves carry less, and never more than cells without wires
        low, high = 2 * low, 2 * high
    if readout.noisy:
        reach = int(4 * max(NORMAL) / DEVIATION * _deviation(layer, k)) + 2
        low, high = low - reach, high + reach
    gain = 1.0 if readout.gain is None else max(1.0, float(readout.gain.max()))
    offset = 0 if readout.offset is None else int(readout.offset.abs().max())
    return int(low * gain) - 1 - offset, int(high * gain) + 1 + offset


def too_far(layer: MappedLayer) -> str | None:
    """Why curves and noise of the reads cannot be done in 32 bits, or None: float32 has what they make of reads and rounds it when
    1.5 2^23 is added, and int32 what the noise of a pair's two lines is of, `2 sum a^2 X`."""
    readout = layer.readout
    if readout is None or not (readout.noisy or readout.curve):
        return None
    slices = range(len(layer.spec.slice_bits))
    farthest = max(max(-low, high) for low, high in (read_range(layer, k) for k in slices))
    if farthest >= 2**22 or max(_deviation(layer, k) for k in slices) >= MOST * DEVIATION:
        return "curves or noise of reads that float32 does not hold"
    largest = max(int(part.abs().max()) for part in (layer.cells.values, layer.cells.reference))
    sums = 4 * layer.tallest * (2 ** max(layer.spec.digit_bits) - 1) ** 2 * largest
    return "noise or curves of reads whose cells' sums 32 bits do not hold" if sums >= 2**31 else None


def _deviation(layer, k):
    """Of the noise of slice `k`, at most."""
    readout = layer.readout
    c0, c1, m = readout.cell_noise[k] if readout.cell_noise else (0.0, 0.0, 0.0)
    most = layer.tallest * (2 ** max(layer.spec.digit_bits) - 1) ** 2
    parts = [layer.cells.values, layer.cells.reference, *([readout.both] if readout.needs_both else [])]
    cell = max(int(part[k].abs().max()) for part in parts)
    return (readout.base + most * (1 + m) * (abs(c0) + abs(c1) * cell)) ** 0.5
