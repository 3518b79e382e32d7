"""The choice of a converter's range (pure functions); what it does with a read is `converter`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .converter import Converter
from .spec import ADC_GRID

if TYPE_CHECKING:
    from .mapping import MappedLayer

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
    for k in range(len(spec.slice_bits)):
        low, high = layer.u_range(k)
        u = range(low, high + 1, layer.u_spacing(k))
        for converter in {layer.converter(z, k) for z in range(len(spec.digit_bits))}:
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
        v: the values seen, ascending, zero left out (it is always exact).
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
        seen = (counts.sum(axis=(0, 1)) > 0) & (u != 0)
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
    if reads.squared_error(*covering, adc_bits) == 0:
        return covering
    terms, count = _terms(reads, codes), int(2 * np.abs(reads.v).max() * GRID)
    most = MOST_STEPS if len(reads.v) > MANY else MOST_TERMS // terms
    if count > most:
        some = np.linspace(0, 2 * covering[0] * GRID, most + 1)[1:]
        steps = np.unique(np.ceil(some)) / GRID
    else:
        steps = np.arange(1, count + 1) / GRID
    best = np.inf, *covering
    for delta in np.array_split(steps, min(len(steps), -(-len(steps) * terms // 2**20))):
        below, above = (_errors(reads, sign, delta[:, None], codes) for sign in (-1, 1))
        # Column m: the lowest code is -m, the highest 2^B - 1 - m.
        error = below[0] + above[0][:, ::-1] + reads.arrays * (above[1][:, ::-1] - below[1]) ** 2
        row, m = np.unravel_index(error.argmin(), error.shape)
        if error[row, m] < best[0]:
            best = error[row, m], float(delta[row]), -int(m)
    return best[1:]


def _terms(reads, codes):
    """What `_errors` adds up for one step."""
    return 2 * (codes + 1) if len(reads.v) > MANY else len(reads.v) + codes


def _errors(reads, sign, delta, codes):
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

    Args: histogram, counts of the reads `[digits, slices, bin]` in `layer.bins`; layer, a `MappedLayer`.
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
    bits = layer.spec.slice_bits
    if per == "slice":
        return [[k] for k in range(len(bits))]
    groups = {}
    for k, reference in enumerate(layer.reference_twice):
        same = per == "layer" or layer.spec.reference == "digital"
        groups.setdefault(0 if same else reference / (2 ** bits[k] - 1), []).append(k)
    return list(groups.values())


# ---- bits where they count -------------------------------------------------------------------------------------------

STEPS = 256  # steps that are tried first for one kind of read and one number of bits,
BEST = 6  # and the best of them, around which finer ones are tried: all multiples of 1 / GRID,
FINER = 64  # but no more than so many on each side
PARTS = 64  # of the reads of a kind: the price of a bit is counted in them
MOST_BYTES = 2**15  # of reads whose ranges are kept: enough for ideal cells; each chip has many more, and others
LEAST_ERROR = 1e-4  # of the error without bits: what a smaller one does to a network is too little to be measured


class Plan(NamedTuple):
    """Bits and range of each kind of read: arrays `[digits, slices]`, int64, float64, int64. Kinds of 0 bits are not converted,
    their codes are 0 and their steps have no meaning."""

    bits: np.ndarray
    delta: np.ndarray
    q_min: np.ndarray


class Choices(NamedTuple):
    """What each number of bits B = 0 .. adc_max_bits does to each kind of read of a layer: arrays `[digits, slices, B]`.

    error, of an output: `T 4^(d z + c k) E[e^2]`, e the value of a code less v, T the arrays that an output sums, whose reads err
    independently. The mean of an error counts too, although a channel's offset takes it away on the whole: it differs from input to input.
    delta, q_min: the range of least error.
    reads: how many there were of each kind for the images that were counted.
    busy: float64 `[digits]`, which share of them takes bits: all, or with adc_idle "skip" those that are not idle.
    """

    error: np.ndarray
    delta: np.ndarray
    q_min: np.ndarray
    reads: int
    busy: np.ndarray

    @property
    def prices(self) -> tuple[np.ndarray, int]:
        """(the price of a bit of each kind of read, int64 `[kinds]`; the unit of it, of which `reads` have PARTS). Rounded up, so that no
        plan goes beyond its mean; a digit has one if any of its reads was seen, though none of those that `busy` is of."""
        parts = np.maximum(np.ceil(PARTS * self.busy).astype(np.int64), (self.error[..., 0] > 0).any(axis=1))
        unit = int(np.gcd.reduce(parts)) or 1
        return np.repeat(parts // unit, self.error.shape[1]), unit


def choices(histogram: np.ndarray, layer: MappedLayer, busy: np.ndarray | None = None) -> Choices:
    """The errors over bits of a layer's kinds of read, and the ranges that go with them.

    Args: histogram, layer, see `calibrated_ranges`; busy, share of the reads of each digit that are not idle, `[digits]`, where idle
        reads are not converted.
    """
    spec, bins, counts = layer.spec, layer.bins, np.asarray(histogram, dtype=np.float64)
    shape = (*counts.shape[:2], spec.adc_max_bits + 1)
    error, delta, q_min = np.zeros(shape), np.full(shape, layer.unit), np.zeros(shape, np.int64)
    for z, k in np.ndindex(*shape[:2]):
        place = spec.dac_bits * z + spec.cell_bits * k
        share = counts[z, k] / max(counts[z, k].sum(), 1)
        search = _best_ranges if share.nbytes <= MOST_BYTES else _best_ranges.__wrapped__
        found = search(share.tobytes(), bins.first, layer.unit * 2**bins.shift, layer.unit * layer.u_spacing(k), spec.adc_max_bits,
                       spec.converter)
        error[z, k], delta[z, k], q_min[z, k] = zip(*found)
        error[z, k] *= len(layer.arrays) * 4.0**place
    reads = int(counts[0, 0].sum())
    return Choices(error, delta, q_min, reads, np.ones(shape[0]) if busy is None else busy)


@functools.lru_cache(maxsize=2048)  # the settings of a study differ in their means of bits, and have the same reads
def _best_ranges(share: bytes, first: int, width: float, spacing: float, most: int,
                 kind: type[Converter]) -> list[tuple[float, float, int]]:
    """`_best_range` with 0 .. most bits; share, the bytes of what it is called with."""
    return [_best_range(np.frombuffer(share), first, width, spacing, bits, kind) for bits in range(most + 1)]


def _best_range(share: np.ndarray, first: int, width: float, spacing: float, bits: int,
                kind: type[Converter] = Converter) -> tuple[float, float, int]:
    """`(mean squared error, delta, q_min)` of the best range: of all q_min and, as far as the search sees, of all
    steps that are multiples of 1 / GRID up to twice that which covers all reads.

    Args: share of the reads in each bin, around `v = width (first + i)`; spacing of v, which cells of a chip may have finer than steps are.
    """
    seen, spacing = np.flatnonzero(share), max(spacing, 1 / GRID)
    if not len(seen):
        return 0.0, spacing, 0
    v, p = width * (seen + first), share[seen]
    if bits == 0:
        return float(p @ v**2), spacing, 0
    covering = covering_range(v[0], v[-1], spacing, bits, kind)
    converter = kind(*covering, bits)
    if np.array_equal(converter.decode(converter.encode(v)), v):
        return 0.0, *covering
    reads = _Shares(v[v != 0], p[v != 0], kind)
    top, whole = int(np.ceil(2 * covering[0] * GRID)), int(spacing * GRID)
    apart, wholes_apart = -(-top // STEPS), whole * -(-top // (whole * STEPS))
    # Multiples of the spacing leave many reads exact: the error has narrow dips there.
    rough = np.unique([*range(apart, top + 1, apart), *range(whole, top + 1, wholes_apart), round(covering[0] * GRID)])
    least = _square_errors(reads, rough, bits).min(axis=1)
    best = rough[np.argsort(least, kind="stable")[:BEST]]
    around = np.linspace(-apart, apart, 2 * min(apart, FINER) + 1).round().astype(np.int64)
    fine = np.unique(np.add.outer(best, around).clip(1, top))
    square = _square_errors(reads, fine, bits)
    i, m = np.unravel_index(square.argmin(), square.shape)
    delta, q_min = float(fine[i] / GRID), -int(m)
    converter = kind(delta, q_min, bits)
    return float(p @ (converter.decode(converter.encode(v)) - v) ** 2), delta, q_min


class _Shares(NamedTuple):
    """The reads of one kind as `_errors` takes them: values, and the share of each, as the weight of their squared errors."""

    v: np.ndarray
    square: np.ndarray
    kind: type[Converter]
    linear: None = None


def _square_errors(reads: _Shares, steps: np.ndarray, bits: int) -> np.ndarray:
    """Mean squared error, `[step, m]`. Args: steps, in units of 1 / GRID; m of the codes lie below zero."""
    codes, parts = 2**bits - 1, []
    for delta in np.array_split(steps[:, None] / GRID, -(-len(steps) * _terms(reads, codes) // 2**20)):
        below, above = (_errors(reads, sign, delta, codes)[0] for sign in (-1, 1))
        parts.append(below + above[:, ::-1])
    return np.concatenate(parts)


def best_bits(error: np.ndarray, prices: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """For every price that the bits of a layer's kinds of read may have together, the least error and the bits of each kind.

    Args: error, `[kinds, B]` for B = 0 .. most; prices, of a bit of each kind, int64 `[kinds]`; None, 1 each.
    Returns: `(least, bits)`: least, `[total]` for total = 0 .. most sum(prices), never rising; bits, int8 `[total, kinds]`. Where
        errors are the same the later kinds get fewer bits, and bits that lower no error are not given. Found by dynamic
        programming, so exact for any shape of errors: one code beside zero covers one side of the reads only, so that the first
        bit may be worth less than the second.
    """
    kinds, most = error.shape[0], error.shape[1] - 1
    prices = np.ones(kinds, np.int64) if prices is None else prices
    total = most * int(prices.sum())
    least, taken = np.zeros(total + 1), np.zeros((kinds, total + 1), np.int8)
    for kind in range(kinds):
        tried = np.full((most + 1, total + 1), np.inf)
        for bits in range(most + 1):
            spent = bits * prices[kind]
            tried[bits, spent:] = least[:total + 1 - spent] + error[kind, bits]
        taken[kind] = tried.argmin(axis=0)
        least = tried.min(axis=0)
    bits, left = np.zeros((total + 1, kinds), np.int8), np.arange(total + 1)
    for kind in reversed(range(kinds)):
        given = taken[kind, left]
        bits[:, kind] = given
        left = left - given.astype(np.int64) * prices[kind]  # NumPy 1 would multiply in 8 bits
    return least, bits


def plan_alone(layer: Choices, adc_bits: float) -> tuple[Plan, float]:
    """The plan of a layer whose kinds of read have `adc_bits` in the mean, and its error (see `Choices`). It has fewer bits where
    its error were else below LEAST_ERROR of that without bits."""
    least, bits = _best_bits(layer)
    total = _whole_mean(layer, adc_bits)
    total = int(np.flatnonzero(least[:total + 1] >= LEAST_ERROR * least[0])[-1])
    return _plan(layer, bits[total].reshape(layer.error.shape[:2])), float(least[total])


def _best_bits(layer: Choices) -> tuple[np.ndarray, np.ndarray]:
    return best_bits(layer.error.reshape(-1, layer.error.shape[2]), layer.prices[0])


def _whole_mean(layer: Choices, adc_bits: float) -> int:
    """The price of bits that are `adc_bits` in the mean over the reads of a layer, in its unit."""
    return int(adc_bits * layer.error[..., 0].size * PARTS / layer.prices[1] + 1e-9)


def share_bits(least: Sequence[np.ndarray], reads: Sequence[int], budget: float) -> list[int]:
    """How many bits each of several layers gets: those go where a bit of a conversion lowers the error most.

    Args: least, for each layer the errors of `best_bits`, weighed so that they may be compared; reads, conversions of one kind of
        read of each layer, which is the price of one bit more; budget, bits of all conversions together.
    Returns: the total of each layer. Steps are those of the lower convex hull of error over bits, in the order of their slope, ties
        in the order of the layers; the last one is made as far as the budget goes. So a larger budget never has a larger error.
    """
    totals, steps = [0] * len(least), []
    budget = int(budget * (1 + 1e-12) + 1e-6)  # a mean times billions of reads may come out a little below a whole number
    for layer, errors in enumerate(least):
        hull, slope = _lower_hull(errors), np.inf
        for a, b in zip(hull, hull[1:]):  # slopes that float64 cannot tell apart must not bring a later step before an earlier one
            slope = min(slope, (errors[a] - errors[b]) / ((b - a) * max(reads[layer], 1)))
            steps.append((-slope, layer, b))
    for _, layer, total in sorted(steps):
        fits = min(total - totals[layer], budget // max(reads[layer], 1))
        budget -= fits * reads[layer]
        totals[layer] += fits
        if totals[layer] < total:
            break
    return totals


def _lower_hull(values: np.ndarray) -> list[int]:
    """Corners of the lower convex hull of a sequence that never rises, from 0 on, as far as it falls."""
    last = int(np.flatnonzero(values == values.min())[0])
    corners = [0]
    while corners[-1] < last:
        at = corners[-1]
        slopes = (values[at + 1:last + 1] - values[at]) / np.arange(1, last + 1 - at)
        corners.append(at + 1 + int(np.flatnonzero(slopes == slopes.min())[-1]))
    return corners


def plans(layers: Sequence[Choices], adc_bits: Sequence[float], weights: Sequence[float] | None = None) -> list[Plan]:
    """A plan for each layer: bits that are `adc_bits` in the mean over its kinds of read, or, with `weights`, over all conversions
    of all layers.

    Args: layers, `choices` of each; adc_bits, the mean of each layer (with weights all the same); weights, what a unit of each
        layer's error does to the output of the network.
    """
    curves = [_best_bits(layer) for layer in layers]
    if weights is None:
        totals = [min(_whole_mean(layer, mean), len(least) - 1) for layer, mean, (least, _) in zip(layers, adc_bits, curves)]
    else:
        reads = [layer.reads * layer.prices[1] for layer in layers]
        budget = adc_bits[0] * PARTS * sum(layer.error[..., 0].size * layer.reads for layer in layers)
        totals = share_bits([weight * least for weight, (least, _) in zip(weights, curves)], reads, budget)
    return [_plan(layer, bits[total].reshape(layer.error.shape[:2]))
            for layer, (_, bits), total in zip(layers, curves, totals)]


def _plan(layer: Choices, bits: np.ndarray) -> Plan:
    delta, q_min = (np.take_along_axis(values, bits[..., None], axis=2)[..., 0] for values in (layer.delta, layer.q_min))
    return Plan(bits.astype(np.int64), delta, q_min)
