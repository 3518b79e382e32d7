"""The choice of a converter's range (pure functions); what it does with a read is `converter`, and bits for each kind of read `plans`."""

from collections.abc import Sequence

import numpy as np

from .converter import Converter
from .mapping import MappedLayer
from .spec import ADC_GRID
from .transfer import Transfer

# Steps are multiples of 1 / GRID: fractions such as 22/31 would leave ties to the rounding of float64, and codes to more
# bits than fast engines compute with. Finer steps hardly lower an error (tests/test_adc.py says how little).
GRID = float(ADC_GRID)
MANY, MOST_STEPS = 2**15, 2**13  # values from which on errors are sums over codes, not over values; steps that are then tried
MOST_TERMS = 2**30  # errors that a search for the best step adds up: beyond, it takes minutes


def is_lossless(layer: MappedLayer) -> bool:
    """Whether the ADC returns every value that a read of this layer can take."""
    spec = layer.spec
    if spec.adc_range not in ("calibrated", "full") or layer.readout is not None:  # which may take reads beyond those of the cells
        return False
    for k, j in np.ndindex(len(spec.slice_bits), layer.classes):
        low, high = layer.u_range(k, j)
        u = range(low, high + 1, layer.u_spacing(k))
        for converter in {layer.converter(z, k, j) for z in range(len(spec.digit_bits))}:
            if len(u) > 2**converter.bits:
                return False  # fewer codes than values
            v = layer.unit * np.array(u)
            if not (converter.decode(converter.encode(u, layer.unit)) == v).all():
                return False
    return True


def covering_range(low: float, high: float, unit: float, adc_bits: int, kind: type[Converter] = Converter) -> tuple[float, int]:
    """Smallest range whose codes reach from `low` to `high` with zero on the grid.

    Of the `2^B` codes, m lie below zero: `delta = max(-low / m, high / (2^B - 1 - m))`, or the same with the levels of
    another kind, smallest over m, and never below `unit`, the spacing of `v`: an ADC with enough codes is then exact. Where one code
    is left beside zero (B = 1) only the side that reaches further can be covered. `delta` is rounded up to a multiple of 1 / GRID.

    Args: low <= 0 <= high and unit, in units of `v`; adc_bits, B; kind, of converter.
    Returns: `(delta, q_min)` with `q_min = -m`.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if issubclass(kind, Transfer):
        ends = kind(1.0, 0, adc_bits).table[1][[0, -1]]
        delta = max((end / reach for end, reach in zip((low, high), ends) if end * reach > 0), default=unit)
        return max(float(np.ceil(delta * GRID) / GRID), unit), 0
    codes = 2**adc_bits - 1
    if low == high == 0:
        return unit, 0
    if codes == 1 and low < 0 < high:
        low, high = (low, 0.0) if -low > high else (0.0, high)
    m = np.arange(codes + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.where(m > 0, low / kind.level(-m), np.inf if low < 0 else 0.0)
        above = np.where(m < codes, high / kind.level(codes - m), np.inf if high > 0 else 0.0)
    delta = np.maximum(below, above)
    best = int(delta.argmin())
    return max(float(np.ceil(delta[best] * GRID) / GRID), unit), -best


def full_ranges(layer: MappedLayer) -> list[tuple[float, int]]:
    """`(delta, q_min)` of each slice that cover every value its arrays can produce; see `MappedLayer.u_range`."""
    ranges, unit = [], layer.unit
    for k in range(len(layer.reference_twice)):
        low, high = layer.u_range(k)
        ranges.append(covering_range(unit * low, unit * high, unit * layer.u_spacing(k), layer.spec.adc_bits, layer.spec.converter))
    return ranges


class Reads:
    """The read values of some slices, counted, as the rules below see them.

    Attributes:
        v: the values seen, ascending, zero left out where it is always exact.
        count: how often each was seen.
        square, linear: mean over (output, array) of `sum 4^s` and `sum 2^s` over the reads of this value, where
            `2^s = 2^(d z + c k)` is what the shift-add multiplies the read of digit z and slice k with.
        arrays: T, how many arrays an output sums.
        unit: spacing of `v`: all of them are multiples of it.
        kind: of converter.
    """

    def __init__(self, histogram: np.ndarray, slices: Sequence[int], layer: MappedLayer) -> None:
        spec = layer.spec
        counts, u = np.asarray(histogram)[:, slices], layer.bins.values  # digits, slices, bin
        scale = 2.0 ** (spec.dac_bits * np.arange(len(counts))[:, None] + spec.cell_bits * np.array(slices))[..., None]
        outputs = max(int(counts[0, 0].sum()), 1)  # times arrays: every digit and slice of them is one read
        seen = (counts.sum(axis=(0, 1)) > 0) & ((u != 0) | (not spec.converter.exact_zero))
        self.v, self.arrays, self.kind = layer.unit * u[seen], len(layer.arrays), spec.converter
        self.unit = layer.unit * min(map(layer.u_spacing, slices))
        self.count = counts.sum(axis=(0, 1))[seen]
        self.square = (counts * scale**2).sum(axis=(0, 1))[seen] / outputs
        self.linear = (counts * scale).sum(axis=(0, 1))[seen] / outputs

    def squared_error(self, delta: float, q_min: int, adc_bits: int) -> float:
        """What an ADC errs: `sum square e^2 + T (sum linear e)^2` with e the value of the code less v. Zero for an exact ADC.

        The first term is the squared error of an output, divided by T, whose reads err independently; the second is its
        mean error, which arrays add up.
        """
        e = self.errors(delta, q_min, adc_bits)
        return float(self.square @ e**2 + self.arrays * (self.linear @ e) ** 2)

    def errors(self, delta: float, q_min: int, adc_bits: int) -> np.ndarray:
        """What the value of the code of each v is more than v."""
        converter = self.kind(delta, q_min, adc_bits)
        return converter.decode(converter.encode(self.v)) - self.v


def minmax(reads: Reads, adc_bits: int) -> tuple[float, int]:
    """The smallest range that covers everything seen."""
    return covering_range(reads.v.min(initial=0), reads.v.max(initial=0), reads.unit, adc_bits, reads.kind)


PERCENTILE = 99.9


def percentile(reads: Reads, adc_bits: int) -> tuple[float, int]:
    """The smallest range that covers the middle 99.9 % of the reads that are not zero."""
    if not len(reads.v):
        return reads.unit, 0
    share = np.cumsum(reads.count) / reads.count.sum()
    tail = (1 - PERCENTILE / 100) / 2
    low, high = (reads.v[min(np.searchsorted(share, part), len(reads.v) - 1)] for part in (tail, 1 - tail))
    return covering_range(low, high, reads.unit, adc_bits, reads.kind)


def least_squares(reads: Reads, adc_bits: int) -> tuple[float, int]:
    """The `(delta, q_min)` of least `Reads.squared_error` among all q_min and all delta that are multiples of 1 / GRID.

    With a delta above twice the largest `v` all codes are zero. Where so many would take minutes, reads having thousands of
    values, as many of these steps as MOST_TERMS allows are tried, or MOST_STEPS of more than MANY values, up to twice that which clips
    nothing. Ties go to the smaller delta.
    """
    codes, covering = 2**adc_bits - 1, minmax(reads, adc_bits)
    if issubclass(reads.kind, Transfer):
        return least_of_table(reads, covering[0], adc_bits)[1:]
    if reads.squared_error(*covering, adc_bits) == 0:
        return covering
    terms, count = terms_of_step(reads, codes), int(2 * np.abs(reads.v).max() * GRID)
    most = MOST_STEPS if len(reads.v) > MANY else MOST_TERMS // terms
    if count > most:
        some = np.linspace(0, 2 * covering[0] * GRID, most + 1)[1:]
        steps = np.unique(np.ceil(some)) / GRID
    else:
        steps = np.arange(1, count + 1) / GRID
    best = np.inf, *covering
    for delta in np.array_split(steps, min(len(steps), -(-len(steps) * terms // 2**20))):
        below, above = (errors_of_steps(reads, sign, delta[:, None], codes) for sign in (-1, 1))
        # Column m: the lowest code is -m, the highest 2^B - 1 - m.
        error = below[0] + above[0][:, ::-1] + reads.arrays * (above[1][:, ::-1] - below[1]) ** 2
        row, m = np.unravel_index(error.argmin(), error.shape)
        if error[row, m] < best[0]:
            best = error[row, m], float(delta[row]), -int(m)
    return best[1:]


def least_of_table(reads: Reads, covering: float, adc_bits: int) -> tuple[float, float, int]:
    """(least error, delta, 0) of a converter by a table: as `least_squares`, of steps up to twice that which covers all reads. Sums over
    the reads of each code, `level^2 sum 1 - 2 level sum v + sum v^2`, are differences of sums up to each threshold. A read on one has the
    even code, as in `Converter.nearest`."""
    thresholds, values = reads.kind(1.0, 0, adc_bits).table
    parts = [part for part in (reads.square, reads.linear) if part is not None]
    upto = [[np.append(0.0, np.cumsum(part * reads.v**power)) for power in range(3)] for part in parts]
    top, best = int(np.ceil(2 * covering * GRID)), (np.inf, covering, 0)
    for delta in np.unique(np.linspace(1, top, min(top, MOST_STEPS)).round()) / GRID:
        below, beyond = (np.searchsorted(reads.v, delta * thresholds, side) for side in ("left", "right"))
        ends = np.where(np.arange(len(thresholds)) % 2, below, beyond)
        ends = np.concatenate([[0], np.minimum.accumulate(ends[::-1])[::-1], [len(reads.v)]])  # of thresholds that are one the last decides
        level, (ones, sums, squares) = delta * values, (np.diff(sums[ends]) for sums in upto[0])
        error = float((level**2 * ones - 2 * level * sums + squares).sum())
        if len(parts) > 1:
            ones, sums, _ = (np.diff(sums[ends]) for sums in upto[1])
            error += reads.arrays * float((level * ones - sums).sum()) ** 2
        best = min(best, (error, float(delta), 0))
    return best


def terms_of_step(reads, codes):
    """What `errors_of_steps` adds up for one step."""
    return 2 * (codes + 1) if len(reads.v) > MANY else len(reads.v) + codes


def errors_of_steps(reads, sign, delta, codes):
    """`sum square e^2` and, of reads that have it, `sum linear e |v| / v`, over the reads of one sign, `[delta, j]`; j = 0..codes, the
    largest code.

    Reads up to the edge of code j are rounded (a tie goes to j if j is even), those beyond become j: their squared error
    is the parabola `(delta level - |v|)^2`, so sums over the reads up to each value, and from it on, are all that is needed.
    """
    side = reads.v * sign > 0
    size, square, linear = (None if part is None else part[side][::sign] for part in (np.abs(reads.v), reads.square, reads.linear))
    j, kind = np.arange(codes + 1), reads.kind
    level, edge = delta * (sign * kind.level(sign * j)), delta * (kind.edge(j) if sign > 0 else -kind.edge(-1 - j))
    many = len(reads.v) > MANY
    error = None if many else delta * (sign * kind.level(kind.nearest(sign * size / delta))) - size
    rounded = np.empty(edge.shape, np.int64)
    rounded[:, ::2], rounded[:, 1::2] = np.searchsorted(size, edge[:, ::2], "right"), np.searchsorted(size, edge[:, 1::2], "left")

    def up_to(weight, power):  # sum weight e^power
        if not many:
            sums = np.zeros((len(delta), len(size) + 1))
            np.cumsum(weight * error**power, axis=1, out=sums[:, 1:])
            return np.take_along_axis(sums, rounded, axis=1)
        moments = [np.append(0.0, np.cumsum(weight * size**n)) for n in range(power + 1)]  # of the reads that get each code
        own = [np.diff(moment[rounded], axis=1, prepend=0.0) for moment in moments]
        return np.cumsum(level * own[0] - own[1] if power == 1 else level**2 * own[0] - 2 * level * own[1] + own[2], axis=1)

    def beyond(part):
        return np.append(np.cumsum(part[::-1])[::-1], 0.0)[rounded]

    clipped = level**2 * beyond(square) - 2 * level * beyond(square * size) + beyond(square * size**2)
    squares = up_to(square, 2) + clipped
    return squares, None if linear is None else up_to(linear, 1) + level * beyond(linear) - beyond(linear * size)


RULES = {"minmax": minmax, "percentile": percentile, "mse": least_squares}
PER = ("alike", "layer", "slice")


def calibrated_ranges(histogram: np.ndarray, layer: MappedLayer, rule: str, per: str) -> list[tuple[float, int]]:
    """`(delta, q_min)` of each slice by a rule; see `range_groups` for `per`.

    Args: histogram, counts of the reads `[digits, slices, bin]`, of whatever n, in `layer.bins`; layer, a `MappedLayer`.
    """
    ranges = {}
    for group in range_groups(layer, per):
        found = RULES[rule](Reads(histogram, group, layer), layer.spec.adc_bits)
        ranges |= dict.fromkeys(group, found)
    return [ranges[k] for k in range(len(layer.reference_twice))]


def range_groups(layer: MappedLayer, per: str) -> list[list[int]]:
    """Lists of slices that share a range: each alone ("slice"), all of them ("layer"), or those with the same reference.

    Where the ADC sees `v = P - r_k n`, the share of a full cell that the reference is, `r_k / (2^b_k - 1)`, decides on which
    side of zero reads lie: on both for the half cells of DoReFa, the same in all slices; above zero in the highest slice of
    SAWB, whose reference column holds nothing there or little, below zero in the others.
    """
    groups, same = {}, per == "layer" or layer.spec.reference == "digital"
    for k, (bits, reference) in enumerate(zip(layer.spec.slice_bits, layer.reference_twice)):
        groups.setdefault(k if per == "slice" else 0 if same else reference / (2**bits - 1), []).append(k)
    return list(groups.values())
