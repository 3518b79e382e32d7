"""The ADC: its transfer, and the choice of its range (pure functions), apart from each other."""

import numpy as np


def transfer(u, unit, delta, q_min, adc_bits):
    """ADC codes of the read values `v = unit * u`.

    `q = clip(rint(v / delta), q_min, q_min + 2^B - 1)` in float64, ties to even. This formula is the truth; an engine
    may compute a code in another way only after checking it here for every possible `u`.

    Args: u, integer array; unit, 1/2 or 1; delta, step in units of `v`; q_min, lowest code; adc_bits, B.
    Returns: int64 array of the shape of `u`.
    """
    q = np.rint(np.asarray(u, dtype=np.float64) * unit / delta)
    return np.clip(q, q_min, q_min + 2**adc_bits - 1).astype(np.int64)


def is_lossless(layer):
    """Whether the ADC returns every value that a read of this layer can take: `delta q = unit u` for all `u`."""
    spec = layer.spec
    if spec.adc_range not in ("calibrated", "full"):
        return False
    for k, (delta, q_min) in enumerate(zip(layer.adc_delta.tolist(), layer.adc_q_min.tolist())):
        low, high = layer.u_range(k)
        if high - low >= 2**spec.adc_bits:
            return False  # fewer codes than values
        u = np.arange(low, high + 1)
        if not (delta * transfer(u, spec.unit, delta, q_min, spec.adc_bits) == spec.unit * u).all():
            return False
    return True


def covering_range(low, high, unit, adc_bits):
    """Smallest range whose codes reach from `low` to `high` with zero on the grid.

    Of the `2^B` codes, m lie below zero: `delta = max(-low / m, high / (2^B - 1 - m))`, smallest over m, and never
    below `unit`, the spacing of `v`: an ADC with enough codes is then exact. Where one code is left beside zero (B = 1)
    only the side that reaches further can be covered. `delta` is rounded up to 20 binary places: a fraction such as 22/31
    would leave the codes of reads that lie half-way between two levels to the rounding of float64.

    Args: low <= 0 <= high and unit, in units of `v`; adc_bits, B.
    Returns: `(delta, q_min)` with `q_min = -m`.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    codes = 2**adc_bits - 1
    if low == high == 0:
        return unit, 0
    if codes == 1 and low < 0 < high:
        low, high = (low, 0.0) if -low > high else (0.0, high)
    m = np.arange(codes + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.where(m > 0, -low / m, np.inf if low < 0 else 0.0)
        above = np.where(m < codes, high / (codes - m), np.inf if high > 0 else 0.0)
    delta = np.maximum(below, above)
    best = int(delta.argmin())
    return max(float(np.ceil(delta[best] * 2**20) / 2**20), unit), -best


def full_ranges(layer):
    """`(delta, q_min)` of each slice that cover every value its arrays can produce; see `MappedLayer.u_range`."""
    unit = layer.spec.unit
    return [covering_range(unit * low, unit * high, unit, layer.spec.adc_bits)
            for low, high in map(layer.u_range, range(len(layer.reference_twice)))]


def minmax_ranges(histogram, u_min, unit, adc_bits):
    """One range for the whole layer that covers everything seen.

    Args: histogram, counts `[digits, slices, u]`, bin i holding `u = u_min + i`; unit, value of `u = 1`.
    Returns: `(delta, q_min)` of each slice.
    """
    seen = np.flatnonzero(histogram.sum(axis=(0, 1))) + u_min
    low, high = unit * seen.min(initial=0), unit * seen.max(initial=0)
    return [covering_range(low, high, unit, adc_bits)] * histogram.shape[1]


RULES = {"minmax": minmax_ranges}
