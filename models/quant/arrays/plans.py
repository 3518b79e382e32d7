"""Bits where they count: how many each kind of read of a layer gets, and its range (pure functions).

A kind of read is a digit z, a slice k and a class j of n, the sum of the digits on the word lines of the array (`CrossbarSpec.classes`).
Its error weighs `4^(d z + c k)` in the output, its bits cost a share of all reads: that of class j among those of digit z.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .adc import GRID, covering_range, errors_of_steps, least_of_table, terms_of_step
from .converter import Converter
from .mapping import MappedLayer
from .transfer import Transfer

STEPS = 256  # steps that are tried first for one kind of read and one number of bits,
BEST = 6  # and the best of them, around which finer ones are tried: all multiples of 1 / GRID,
FINER = 64  # but no more than so many on each side
PARTS, MOST_PARTS = 64, 4096  # of the reads of a digit: prices of bits are counted in them; where there are many classes, in more,
MOST_WORK = 2**30  # but no more than let so many sums find the best bits of a layer
MOST_BYTES = 2**15  # of reads whose ranges are kept: enough for ideal cells; each chip has many more, and others
LEAST_ERROR = 1e-4  # of the error without bits: what a smaller one does to a network is too little to be measured


class Plan(NamedTuple):
    """Bits and range of each kind of read: arrays `[digits, slices]`, with a plan by ones `[digits, slices, classes]`; int64, float64,
    int64. Kinds of 0 bits are not converted, their codes are 0 and their steps have no meaning."""

    bits: np.ndarray
    delta: np.ndarray
    q_min: np.ndarray


@dataclass(frozen=True, eq=False)
class Choices:
    """What each number of bits B = 0 .. adc_max_bits does to each kind of read of a layer: arrays `[digits, slices, classes, B]`.

    Attributes:
        error: of an output: `T 4^(d z + c k) E[e^2]`, e the value of a code less v where the read is of this class and else 0, T the arrays
            that an output sums, whose reads err independently. The mean of an error counts too, although a channel's offset takes it
            away on the whole: it differs from input to input.
        delta, q_min: the range of least error.
        reads: how many there were of each digit and slice for the images that were counted.
        share: float64 `[digits, classes]`, which share of them is of each class and takes bits: 0 of idle ones that are not converted.
        seen: bool `[digits, classes]`, whether there were any.
    """

    error: np.ndarray
    delta: np.ndarray
    q_min: np.ndarray
    reads: int
    share: np.ndarray
    seen: np.ndarray

    @property
    def parts(self) -> int:
        """In how many parts the reads of a digit are counted: a power of two."""
        kinds, options = self.error[..., 0].size, self.error.shape[3]
        parts = MOST_PARTS if self.error.shape[2] > 2 else PARTS
        while parts > PARTS and kinds * options**2 * self.error[:, :, 0, 0].size * parts > MOST_WORK:
            parts //= 2
        return parts

    @functools.cached_property
    def prices(self) -> tuple[np.ndarray, int]:
        """(the price of a bit of each kind of read, int64 `[kinds]`; the unit of it, of which `reads` have `parts`). Rounded up, so that
        no plan goes beyond its mean."""
        parts = np.ceil(self.parts * self.share).astype(np.int64)
        unit = int(np.gcd.reduce(parts, axis=None)) or 1
        return np.repeat(parts[:, None] // unit, self.error.shape[1], axis=1).ravel(), unit

    @functools.cached_property
    def curve(self) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
        """`best_bits` of its kinds."""
        return best_bits(self.error.reshape(-1, self.error.shape[3]), self.prices[0])

    def total(self, mean: float) -> int:
        """The price of bits that are `mean` in the mean over all reads, in its unit, or all that there is to buy."""
        total = int(mean * self.error[:, :, 0, 0].size * self.parts / self.prices[1] + 1e-9)
        return min(total, len(self.curve[0]) - 1)

    def bits(self, total: int) -> np.ndarray:
        """The best bits of each kind for this price, int64 `[digits, slices, classes]`."""
        return self.curve[1](total).astype(np.int64).reshape(self.error.shape[:3])

    def mean(self, bits: np.ndarray) -> float:
        """The mean over all reads of these bits of each kind."""
        return float((self.share[:, None] * bits).sum() / self.error[:, :, 0, 0].size)

    def left(self, bits: np.ndarray) -> float:
        """The error of an output with these bits of each kind."""
        return float(np.take_along_axis(self.error, bits[..., None], axis=3).sum())

    def plan(self, bits: np.ndarray) -> Plan:
        """The plan with these bits of each kind. Reads of a class that no image had are converted as those of the next class that some
        had."""
        bits = bits.copy()
        delta, q_min = (np.take_along_axis(values, bits[..., None], axis=3)[..., 0] for values in (self.delta, self.q_min))
        if bits.shape[2] <= 2:  # n does not matter, but for idle reads
            return Plan(bits[..., -1], delta[..., -1], q_min[..., -1])
        distance = np.abs(np.subtract.outer(np.arange(bits.shape[2]), np.arange(bits.shape[2])))
        for values in (bits, delta, q_min):
            for z, seen in enumerate(self.seen):
                some = np.flatnonzero(seen[1:]) + 1
                if len(some):
                    values[z, :, 1:] = values[z][:, some[distance[1:, some].argmin(axis=1)]]
        return Plan(bits, delta, q_min)


def choices(histogram: np.ndarray, layer: MappedLayer) -> Choices:
    """The errors over bits of a layer's kinds of read, and the ranges that go with them.

    Args: histogram, counts of the reads `[digits, slices, classes, bin]` in `layer.bins`; layer, a `MappedLayer`.
    """
    spec, bins, counts = layer.spec, layer.bins, np.asarray(histogram, dtype=np.float64)
    shape = (*counts.shape[:3], spec.adc_max_bits + 1)
    error, delta, q_min = np.zeros(shape), np.full(shape, max(layer.unit, 1 / GRID)), np.zeros(shape, np.int64)
    of_class = counts[:, 0].sum(axis=2)
    share = of_class / np.maximum(of_class.sum(axis=1, keepdims=True), 1)
    if spec.skips_idle:
        share[:, 0] = 0
    for z, k, j in np.ndindex(*shape[:3]):
        if spec.skips_idle and j == 0:
            continue
        reads = counts[z, k, j] / max(counts[z, k].sum(), 1)
        search = _best_ranges if reads.nbytes <= MOST_BYTES else _best_ranges.__wrapped__
        found = search(reads.tobytes(), bins.first, layer.unit * 2**bins.shift, layer.unit * layer.u_spacing(k), spec.adc_max_bits,
                       spec.converter)
        error[z, k, j], delta[z, k, j], q_min[z, k, j] = zip(*found)
        error[z, k, j] *= len(layer.arrays) * 4.0 ** (spec.dac_bits * z + spec.cell_bits * k)
    return Choices(error, delta, q_min, int(counts[0, 0].sum()), share, of_class > 0)


@functools.lru_cache(maxsize=4096)  # the settings of a study differ in their means of bits, and have the same reads
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
    if issubclass(kind, Transfer):
        return least_of_table(_Shares(v, p, kind), covering[0], bits)
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
    """The reads of one kind as `errors_of_steps` takes them: values, and the share of each, as the weight of their squared errors."""

    v: np.ndarray
    square: np.ndarray
    kind: type[Converter]
    linear: None = None


def _square_errors(reads: _Shares, steps: np.ndarray, bits: int) -> np.ndarray:
    """Mean squared error, `[step, m]`. Args: steps, in units of 1 / GRID; m of the codes lie below zero."""
    codes, parts = 2**bits - 1, []
    for delta in np.array_split(steps[:, None] / GRID, -(-len(steps) * terms_of_step(reads, codes) // 2**20)):
        below, above = (errors_of_steps(reads, sign, delta, codes)[0] for sign in (-1, 1))
        parts.append(below + above[:, ::-1])
    return np.concatenate(parts)


def best_bits(error: np.ndarray, prices: np.ndarray | None = None) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
    """For every price that the bits of a layer's kinds of read may have together, the least error and the bits of each kind.

    Args: error, `[kinds, B]` for B = 0 .. most; prices, of a bit of each kind, int64 `[kinds]`; None, 1 each.
    Returns: `(least, bits)`: least, `[total]` for total = 0 .. most sum(prices), never rising; bits(total), int8 `[kinds]`. Where errors
        are the same the later kinds get fewer bits, and bits that lower no error are not given. Found by dynamic programming, so
        exact for any shape of errors: one code beside zero covers one side of the reads only, so that the first bit may be worth less
        than the second.
    """
    kinds, most = error.shape[0], error.shape[1] - 1
    prices = np.ones(kinds, np.int64) if prices is None else prices
    least, taken = np.zeros(1), []  # as far as the kinds until now can spend anything: what is beyond is like the last
    for of_kind, price in zip(error, prices.tolist()):
        useful = [bits for bits in range(1, most + 1) if of_kind[bits] < of_kind[:bits].min()]
        least = np.pad(least, (0, max(useful, default=0) * price), mode="edge")
        lowest, own = least + of_kind[0], np.zeros(len(least), np.int8)
        for bits in useful:
            spent = bits * price
            tried = least[:len(least) - spent] + of_kind[bits]
            better = tried < lowest[spent:]
            np.copyto(lowest[spent:], tried, where=better)
            np.copyto(own[spent:], bits, where=better)
        least = lowest
        taken.append(own)

    def bits_of(total: int) -> np.ndarray:
        found = np.zeros(kinds, np.int8)
        for kind in reversed(range(kinds)):
            found[kind] = taken[kind][min(total, len(taken[kind]) - 1)]
            total -= int(found[kind]) * int(prices[kind])
        return found

    return np.pad(least, (0, most * int(prices.sum()) + 1 - len(least)), mode="edge"), bits_of


def plan_alone(layer: Choices, adc_bits: float) -> tuple[Plan, float, float]:
    """The plan of a layer whose kinds of read have `adc_bits` in the mean, its error (see `Choices`), and its mean of bits. It has fewer
    bits where its error were else below LEAST_ERROR of that without bits."""
    least = layer.curve[0]
    total = int(np.flatnonzero(least[:layer.total(adc_bits) + 1] >= LEAST_ERROR * least[0])[-1])
    bits = layer.bits(total)
    return layer.plan(bits), float(least[total]), layer.mean(bits)


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


def bits_of(layers: Sequence[Choices], adc_bits: Sequence[float], weights: Sequence[float] | None = None) -> list[np.ndarray]:
    """The bits of a plan for each layer, int64 `[digits, slices, classes]`: `adc_bits` in the mean over its kinds of read, or, with
    `weights`, over all conversions of all layers.

    Args: layers, `choices` of each; adc_bits, the mean of each layer (with weights all the same); weights, what a unit of each
        layer's error does to the output of the network.
    """
    if weights is None:
        totals = [layer.total(mean) for layer, mean in zip(layers, adc_bits)]
    else:
        reads = [layer.reads * layer.prices[1] * (MOST_PARTS // layer.parts) for layer in layers]
        budget = adc_bits[0] * MOST_PARTS * sum(layer.error[:, :, 0, 0].size * layer.reads for layer in layers)
        totals = share_bits([weight * layer.curve[0] for weight, layer in zip(weights, layers)], reads, budget)
    return [layer.bits(total) for layer, total in zip(layers, totals)]
