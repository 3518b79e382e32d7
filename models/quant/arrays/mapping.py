"""How a layer's codes lie on crossbars (`MappedLayer`).

An *array* holds at most `rows` word lines. Rows are numbered in (tap, channel) order, where a tap is one kernel
position; an array is a contiguous range of them (`array_bounds`). Here it has the bit lines of all outputs: it is a row
block, and only costs ask how many arrays side by side hold them. A weight code is stored in slices of `cell_bits`
bits, `W = sum_k 2^(c k) C_k`; an input code is applied in digits of `dac_bits` bits, `A = sum_z 2^(d z) a_z`.

For array t, digit z and slice k a *read* gives `P = sum_rows a_z C_k`; with `n = sum_rows a_z` the ADC digitises
`v = P - r_k n` (analog reference) or `v = P` (digital reference). Engines work on the integer `u`:
`u = 2 P - (2 r_k) n`, `v = u / 2` (analog), or `u = v = P` (digital). Cells that are not ideal have integers of their own on a
grid of `2^-F` levels (`cells`), and `v = 2^-F u`.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cells import Cells
from .circuits import first_reached
from .converter import Converter
from .readout import Readout
from .spec import ADC_GRID, CrossbarSpec, Geometry

MAX_BINS = 2**22  # of one histogram: more would take gigabytes


class Bins(NamedTuple):
    """How the values of u are counted: bin i holds the `2^shift` values around `u = 2^shift (first + i)`, each value having one of its
    own where MAX_BINS are enough for them."""

    first: int
    count: int
    shift: int

    @classmethod
    def of(cls, low: int, high: int) -> Bins:
        """The narrowest bins of all values from `low` to `high` that are no more than MAX_BINS."""
        shift = 0
        while (bins := cls(_bin(low, shift), _bin(high, shift) - _bin(low, shift) + 1, shift)).count > MAX_BINS:
            shift += 1
        return bins

    def index(self, u: Any) -> Any:
        """The bin of each u, integers or an array or tensor of them."""
        return _bin(u, self.shift) - self.first

    @property
    def values(self) -> np.ndarray:
        """The u that each bin stands for, int64."""
        return np.arange(self.first, self.first + self.count) << self.shift


def _bin(u, shift):
    return u + (1 << shift >> 1) >> shift


def array_bounds(mapping: str, taps: int, channels: int, rows: int, planes: int = 1) -> list[tuple[int, int]]:
    """Arrays of one group as (first, last + 1) rows, rows in (tap, channel) order.

    "tap" cuts the channels of each kernel position, one of the `planes` of a tap, every `rows`; "im2col" cuts all rows every `rows`. No
    row is ever dropped.
    """
    size = channels // planes if mapping == "tap" else taps * channels
    spans = [(first, first + size) for first in range(0, taps * channels, size)]
    return [(start, min(start + rows, stop)) for first, stop in spans for start in range(first, stop, rows)]


@dataclass(frozen=True, eq=False)
class MappedLayer:
    """Everything an engine needs to know of a layer besides its input.

    Attributes:
        spec: the hardware; of pairs with the bits that cells hold (`pair.on_cells`).
        geometry: stride, padding, dilation, groups.
        w_codes: weight codes, uint8 `[out, in / groups, kh, kw]`.
        reference_twice: `2 r_k` of each slice, integers; 0 of pairs.
        adc_delta: ADC step of each slice in units of `v`, float64 `[slices]` (unused by "dynamic" and "ideal"); of each digit and
            slice, `[digits, slices]`, where the spec has a plan, and of each class of n, `[digits, slices, classes]`, with one by ones.
        adc_q_min: lowest ADC code, int64 of the same shape.
        adc_bits_plan: bits of each kind of read, int64 of that shape; None without a plan.
        cells: what the cells hold on one chip; None: ideal cells, those of the weight codes. Engines run pairs with cells only.
        readout: noise, converters and curve of that chip's reads; None: none of them.
        worth: what `v = 1` of digit 0 and slice 0 is worth in `sum A (2 W - L)`: 2, or 1 of some pairs (`pair.worth`).
    """

    spec: CrossbarSpec
    geometry: Geometry
    w_codes: Tensor
    reference_twice: tuple[int, ...]
    adc_delta: Tensor
    adc_q_min: Tensor
    adc_bits_plan: Tensor | None = None
    cells: Cells | None = None
    readout: Readout | None = None
    worth: int = 2

    @functools.cached_property
    def in_levels(self) -> MappedLayer:
        """The same layer with cells on a grid of whole levels, where all of its cells are whole levels; else itself. Its v are the same."""
        if self.cells is None or self.cells.fraction_bits == 0:
            return self
        parts, bits = (self.cells.values, self.cells.reference), self.cells.fraction_bits
        if any(bool((part & (2**bits - 1)).any()) for part in parts):
            return self
        return replace(self, cells=Cells(*(part >> bits for part in parts), 0))

    @property
    def unit(self) -> float:
        """Value of `u = 1` in units of `v`."""
        return self.spec.unit if self.cells is None else self.cells.unit

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        return tuple(self.w_codes.shape[2:])

    @property
    def group_channels(self) -> int:
        """Input channels of one group."""
        return self.w_codes.shape[1]

    @functools.cached_property
    def arrays(self) -> list[tuple[int, int]]:
        """`array_bounds` of one group."""
        kh, kw = self.kernel
        return array_bounds(self.spec.mapping, kh * kw, self.group_channels, self.spec.rows, self.geometry.planes)

    @functools.cached_property
    def tallest(self) -> int:
        """Rows of the fullest array."""
        return max(stop - start for start, stop in self.arrays)

    @property
    def w_rows(self) -> Tensor:
        """Weight codes as `[groups, rows, out / groups]`, rows in (tap, channel) order."""
        return w_rows(self.w_codes, self.geometry.groups)

    @functools.cached_property
    def w_totals(self) -> Tensor:
        """`sum W` of each output channel, int64 `[out]`."""
        return self.w_codes.sum((1, 2, 3), dtype=torch.int64)

    @property
    def row_weights(self) -> Tensor:
        """What a row that is on adds to u, times its digit: int32 `[slices, groups, rows, out / groups]`."""
        if self.cells is not None:
            return self.cells.weights(self.spec.reference == "analog")
        return torch.stack([self.slice_weights(k) for k in range(len(self.spec.slice_bits))])

    def slice_weights(self, k: int) -> Tensor:
        """`row_weights` of slice `k`, int32 `[groups, rows, out / groups]`: those of all slices take much memory in large layers."""
        spec, analog = self.spec, self.spec.reference == "analog"
        if self.cells is not None:
            return self.cells.weights(analog)[k]
        levels = (self.w_rows >> (spec.cell_bits * k)) & (2 ** spec.slice_bits[k] - 1)
        return levels.int().mul_(round(1 / spec.unit)).sub_(self.reference_twice[k] if analog else 0)

    @property
    def cell_weights(self) -> Tensor:
        """`sum_k 2^(c k) (values - reference)` of cells on a grid as a kernel, float64 `[out, in / groups, kh, kw]`."""
        total = sum(2.0 ** (self.spec.cell_bits * k) * part.double() for k, part in enumerate(self.cells.weights(analog=True)))
        groups, kh, kw = self.geometry.groups, *self.kernel
        return total.view(groups, kh, kw, self.group_channels, -1).permute(0, 4, 3, 1, 2).reshape(self.w_codes.shape)

    @property
    def zero_twice(self) -> int:
        """L, twice the weight level that stands for zero: `sum_k 2^(c k) 2 r_k`."""
        return sum(r << (self.spec.cell_bits * k) for k, r in enumerate(self.reference_twice))

    @functools.cached_property
    def classes(self) -> int:
        """How many classes of n its reads have; see `CrossbarSpec.classes`."""
        return self.spec.classes(self.tallest)

    @property
    def by_ones(self) -> bool:
        """Whether converters differ with n beyond idle reads and others: not by ones either where an array has but one word line."""
        return self.classes > 2

    def class_of(self, n: Tensor) -> Tensor:
        """The class of reads whose digits have these sums, int64."""
        return torch.frexp(n.double())[1].long().clamp(max=self.classes - 1)

    def most_ones(self, j: int) -> int:
        """The largest n of class j."""
        most = self.tallest * (2 ** max(self.spec.digit_bits) - 1)
        return most if j in (-1, self.classes - 1) else min(most, 2**j - 1)

    def u_range(self, k: int, j: int = -1) -> tuple[int, int]:
        """Smallest and largest `u` that slice `k` can produce with an n of class j or a smaller one, of a full array, or of the cells as
        they are, whatever n above 0 is."""
        if self.cells is not None:
            return self._cell_ranges[k] if self.most_ones(j) else (0, 0)
        return u_range(self.spec, self.reference_twice[k], self.spec.slice_bits[k], self.most_ones(j))

    @functools.cached_property
    def _cell_ranges(self):
        return self.cells.u_range(self.spec.reference == "analog", self.arrays, 2 ** max(self.spec.digit_bits) - 1)

    @property
    def largest_sum(self) -> int:
        """Largest P that any slice of a full array can produce."""
        return self.tallest * (2 ** max(self.spec.digit_bits) - 1) * (2 ** max(self.spec.slice_bits) - 1)

    def u_spacing(self, k: int) -> int:
        """Distance between the values of `u` that slice `k` can produce: `2 P - (2 r_k) n` is even if 2 r_k is, where the
        reference column holds whole cells."""
        return 2 if self.cells is None and self.spec.unit == 0.5 and self.reference_twice[k] % 2 == 0 else 1

    @property
    def u_span(self) -> tuple[int, int]:
        """Smallest and largest `u` over all slices."""
        lows, highs = zip(*(self.u_range(k) for k in range(len(self.reference_twice))))
        return min(lows), max(highs)

    @property
    def bins(self) -> Bins:
        """Those of a histogram of its reads."""
        return Bins.of(*self.u_span)

    def converter(self, z: int, k: int, j: int = -1) -> Converter:
        """The ADC of the reads of digit `z`, slice `k` and class `j` of n, the last one if none is given. With a plan its `factor` is
        `64 delta`, an integer, so that codes of all steps add up exactly."""
        return self._converters[z][k][j]

    @functools.cached_property
    def ranges(self) -> tuple:
        """Steps and lowest codes of all converters, to be compared."""
        return tuple(self.adc_delta.flatten().tolist()), tuple(self.adc_q_min.flatten().tolist())

    @functools.cached_property
    def _converters(self):
        """Those of each digit, slice and class of n: what is stored is the same for all digits or classes that it does not name."""
        spec, shape = self.spec, (len(self.spec.digit_bits), len(self.reference_twice), self.classes)
        bits = self.adc_bits_plan if spec.planned else torch.full_like(self.adc_q_min, spec.adc_bits)
        delta, q_min, bits = (values.reshape(*[1] * (values.dim() < 2), *values.shape, *[1] * (values.dim() < 3)).expand(shape).tolist()
                              for values in (self.adc_delta, self.adc_q_min, bits))
        found = [[[spec.converter(*each, round(ADC_GRID * each[0]) if spec.planned else 1) for each in zip(*kinds)]
                  for kinds in zip(*of_digit)] for of_digit in zip(delta, q_min, bits)]
        if spec.skips_idle:
            for of_slice in itertools.chain(*found):
                of_slice[0] = replace(of_slice[0], q_min=0, bits=0)
        return found

    @property
    def compares(self) -> bool:
        """Whether codes follow from `thresholds`, as there is no formula of them."""
        moved = self.readout is not None and self.readout.circuits is not None and self.readout.circuits.moved
        return self.spec.adc_range in ("calibrated", "full") and (moved or self.spec.adc_transfer is not None)

    def thresholds(self, z: int, k: int, j: int = -1) -> np.ndarray:
        """The smallest u that reaches each threshold of the converters of such reads: whole numbers in float64 that do not fall,
        `[groups, arrays, out / groups, thresholds]`, or `[1, 1, 1, thresholds]` where all are alike."""
        converter, spec = self.converter(z, k, j), self.spec
        if self.readout is None or self.readout.circuits is None or not self.readout.circuits.moved:
            return first_reached(converter, self.unit)[None, None, None]
        bits, circuits = spec.adc_max_bits if spec.planned else spec.adc_bits, self.readout.circuits
        found = first_reached(converter, self.unit, circuits.deviations(k, bits), bits)
        return found.repeat(circuits.columns, axis=2)[:, :, :len(self.w_codes) // self.geometry.groups]

    def kept_thresholds(self, z: int, k: int, j: int = -1) -> Tensor:
        """`thresholds`, which are made once."""
        key = k, self.converter(z, k, j)
        if key not in self._kept:
            self._kept[key] = torch.from_numpy(self.thresholds(z, k, j).copy())
        return self._kept[key]

    @functools.cached_property
    def _kept(self):
        return {}

    @functools.cached_property
    def base_noise(self) -> Tensor:
        """`Readout.base` with the noise of the converters' comparators, float64 `[digits, slices, classes]`."""
        kinds = len(self.spec.digit_bits), len(self.reference_twice), self.classes
        base = torch.full(kinds, self.readout.base, dtype=torch.float64)
        if self.readout.circuits is not None and self.spec.adc_range in ("calibrated", "full"):
            for kind in np.ndindex(kinds):
                base[kind] += (self.readout.circuits.noise * self.converter(*kind).delta / self.unit) ** 2
        return base

    @property
    def delta_groups(self) -> list[tuple[float, list[int]]]:
        """Slices by what 1 of their accumulators is worth in `v`, `[(worth, [k, ...]), ...]`: those of one worth are added before they are
        scaled."""
        groups = {}
        for k in range(len(self.reference_twice)):
            groups.setdefault(self.converter(0, k).worth, []).append(k)
        return list(groups.items())


def w_rows(w_codes: Tensor, groups: int) -> Tensor:
    """Weight codes `[out, in / groups, kh, kw]` as `[groups, rows, out / groups]`, rows in (tap, channel) order."""
    out, channels, kh, kw = w_codes.shape
    return w_codes.reshape(groups, out // groups, channels, kh * kw).permute(0, 3, 2, 1).reshape(
        groups, kh * kw * channels, out // groups)


def u_range(spec: CrossbarSpec, reference_twice: int, bits: int, ones: int) -> tuple[int, int]:
    """Range of `u` for digits whose sum is at most `ones`, with every cell in 0..2^b_k - 1."""
    cell = 2**bits - 1
    if spec.weights == "pair":
        return -cell * ones, cell * ones
    if spec.reference == "digital":
        return 0, cell * ones
    return -reference_twice * ones, (2 * cell - reference_twice) * ones
