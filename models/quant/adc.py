"""The ADC: its transfer, and the choice of its range (pure functions), apart from each other."""

import numpy as np

GRID = 2.0**20  # steps are multiples of 1 / GRID: fractions such as 22/31 would leave ties to the rounding of float64


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
    only the side that reaches further can be covered. `delta` is rounded up to a multiple of 1 / GRID.

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
    return max(float(np.ceil(delta[best] * GRID) / GRID), unit), -best


def full_ranges(layer):
    """`(delta, q_min)` of each slice that cover every value its arrays can produce; see `MappedLayer.u_range`."""
    unit = layer.spec.unit
    return [covering_range(unit * low, unit * high, unit, layer.spec.adc_bits)
            for low, high in map(layer.u_range, range(len(layer.reference_twice)))]


class Reads:
    """The read values of some slices, counted, as the rules below see them.

    Attributes:
        v: the values seen, ascending, zero left out (it is always exact).
        count: how often each was seen.
        square, linear: mean over (output, array) of `sum 4^s` and `sum 2^s` over the reads of this value, where
            `2^s = 2^(d z + c k)` is what the shift-add multiplies the read of digit z and slice k with.
        arrays: T, how many arrays an output sums.
        unit: spacing of `v`: all of them are multiples of it.
    """

    def __init__(self, histogram, slices, layer):
        spec = layer.spec
        counts = np.asarray(histogram)[:, slices]  # digits, slices, u
        scale = 2.0 ** (spec.dac_bits * np.arange(len(counts))[:, None] + spec.cell_bits * np.array(slices))[..., None]
        outputs = max(int(counts[0, 0].sum()), 1)  # times arrays: every digit and slice of them is one read
        u = np.arange(counts.shape[2]) + layer.u_span[0]
        seen = (counts.sum(axis=(0, 1)) > 0) & (u != 0)
        spacing = 2 if seen.any() and not (u[seen] % 2).any() else 1  # 2 where the reference column holds whole cells
        self.v, self.unit, self.arrays = spec.unit * u[seen], spec.unit * spacing, len(layer.arrays)
        self.count = counts.sum(axis=(0, 1))[seen]
        self.square = (counts * scale**2).sum(axis=(0, 1))[seen] / outputs
        self.linear = (counts * scale).sum(axis=(0, 1))[seen] / outputs

    def cost(self, delta, q_min, adc_bits):
        """Expected squared error of an output of the layer, divided by T, if its reads err independently:
        `sum square e^2 + T (sum linear e)^2` with `e = delta q - v`. The second term is the bias that the errors leave."""
        e = delta * transfer(self.v, 1.0, delta, q_min, adc_bits) - self.v
        return float(self.square @ e**2 + self.arrays * (self.linear @ e) ** 2)


def minmax(reads, adc_bits):
    """The smallest range that covers everything seen."""
    return covering_range(reads.v.min(initial=0), reads.v.max(initial=0), reads.unit, adc_bits)


PERCENTILE = 99.9


def percentile(reads, adc_bits):
    """The smallest range that covers the middle 99.9 % of the reads that are not zero."""
    if not len(reads.v):
        return reads.unit, 0
    share = np.cumsum(reads.count) / reads.count.sum()
    tail = (1 - PERCENTILE / 100) / 2
    low, high = (reads.v[min(np.searchsorted(share, part), len(reads.v) - 1)] for part in (tail, 1 - tail))
    return covering_range(low, high, reads.unit, adc_bits)


def least_squares(reads, adc_bits):
    """The `(delta, q_min)` of least `Reads.cost`, found exactly (delta a multiple of 1 / GRID).

    With `q_min = -m` fixed, codes change only where `|v| / delta` crosses `j + 1/2` with a code left: j < m below zero,
    `j < 2^B - 1 - m` above. Between two such steps the cost is the parabola `A delta^2 - 2 B delta + C`, whose
    coefficients are sums over the steps taken so far (`d q^2 = 2 j + 1`, `d(q v) = |v|`); on a step itself, ties to even
    take those with odd j. The least over all of these and all m is returned. A delta below the unit of `v` would only
    narrow the range.
    """
    codes, unit, v = 2**adc_bits - 1, reads.unit, reads.v
    covering = minmax(reads, adc_bits)
    if covering[0] == unit:  # enough codes to be exact
        return covering
    size = np.abs(v)
    steps = np.minimum(np.ceil(size / unit - 0.5).astype(np.int64), codes)  # those with delta above the unit
    if steps.sum() * (codes + 1) > 2**31:
        raise ValueError(f"{len(v)} read values and {adc_bits} ADC bits are too many for the rule mse; take minmax or "
                         "percentile")
    which = np.repeat(np.arange(len(v)), steps)
    j = np.arange(len(which)) - np.repeat(np.cumsum(steps) - steps, steps)
    order = np.lexsort([j % 2 == 0, -size[which] / (j + 0.5)])
    which, j = which[order], j[order]
    at, odd, above = size[which] / (j + 0.5), j % 2 == 1, v[which] > 0  # delta of each step, descending
    qq, qv = reads.square[which] * (2 * j + 1), reads.square[which] * size[which]
    lq = reads.linear[which] * np.where(above, 1, -1)
    lv, arrays = reads.linear @ v, reads.arrays
    constant = reads.square @ v**2 + arrays * lv**2
    best = (np.inf,)
    for m in range(codes + 1):
        taken = np.where(above, j < codes - m, j < m)
        # Entry i is the state after i steps, from upper[i] down to lower[i].
        upper = np.append(4 * size.max(), at[taken])
        lower = np.append(upper[1:], unit)
        odd_m, odd_next = np.append(True, odd[taken]), np.append(odd[taken], False)
        sums = [np.append(0.0, np.cumsum(part[taken])) for part in (qq, qv, lq)]
        a, b = sums[0] + arrays * sums[2] ** 2, sums[1] + arrays * sums[2] * lv
        whole = lower < upper  # not between steps of one delta
        inner_low = np.where(lower == unit, unit * GRID, np.floor(lower * GRID) + 1)
        inner_high = np.ceil(upper * GRID) - 1
        inner = np.clip(np.rint(b / np.maximum(a, 1e-300) * GRID), inner_low, inner_high) / GRID
        for delta, allowed in (
                (inner, whole & (inner_low <= inner_high)),
                (upper, odd_m & (whole | ~odd_next) & (upper * GRID % 1 == 0)),  # on a step, its odd codes taken
                (lower, whole & ~odd_next & (lower * GRID % 1 == 0))):  # on the next step, which has no odd code
            cost = np.where(allowed, a * delta**2 - 2 * b * delta + constant, np.inf)
            least = int(cost.argmin())
            if cost[least] < best[0]:
                best = float(cost[least]), float(delta[least]), -m
    return best[1:]


RULES = {"minmax": minmax, "percentile": percentile, "mse": least_squares}
PER = ("layer", "slice")


def calibrated_ranges(histogram, layer, rule="mse", per="slice"):
    """`(delta, q_min)` of each slice by a rule, one range for the whole layer or one for each slice.

    Args: histogram, counts of the reads `[digits, slices, u]`, bin i holding `u = layer.u_span[0] + i`; layer, a
        `MappedLayer`.
    """
    slices = range(len(layer.reference_twice))

    def of(group):
        return RULES[rule](Reads(histogram, group, layer), layer.spec.adc_bits)

    return [of([k]) for k in slices] if per == "slice" else [of(list(slices))] * len(slices)
