"""CPU engine for cells on a grid: a layer's cells laid out in tiles (`cells_layout`) and the passes over them (`cells_kernel`)."""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
import torch
from torch.nn import functional as F

from ...arrays.mapping import Bins, MappedLayer
from .. import accumulator_dtype
from .common.buffers import DYNAMIC, HISTOGRAM, RANGES, STATIC, room_for_results
from .common.histogram import room_for
from .common.layout import step_of_slice
from .dense import Dense
from .grid import cells_kernel, cells_matrix
from .grid.cells_forms import NO_FORMS, Forms, dynamic_forms, no_adc_forms, static_forms
from .grid.cells_kernel import STATIC_BROAD
from .grid.cells_narrow import NOT_NARROW, Narrow, narrow_forms
from .grid.cells_layout import besides, fits, lay_out, padded_columns, weights_of
from .grid.cells_reads import COMPARED, COMPARED_SHORT, COMPARED_TREES, COMPARED_WIDE_TREES, NARROW, PLAIN, SHORT
from .grid.cells_thresholds import NOTHING_COMPARED, Compared, ComparedForms
from .pixels import pixels
from .vectors.amx import TILE_ROWS, can_multiply
from .whole.choice import SHORT_ROWS, TILES, TREES, fastest_for, may
from .whole.several import ProductsOfBytes

__all__ = ["Prepared", "Ways", "fits"]

MOST_IN_A_ROW = 64  # pixels of layers of 1 x 1, where any row will do: of thousands of channels the lists of more lie on too many pages


class Ways:
    """The ways that a layer may go; parts are made when first needed. Subclasses have `convolution`, sums without an ADC, `by_columns`,
    and `columns`, the name of that.

    Args: dtype, of the accumulators, where it is not that of this layer.
    """

    def __init__(self, layer: MappedLayer, dtype: torch.dtype | None = None) -> None:
        self.layer, self.dtype = layer, dtype or accumulator_dtype(layer)

    @property
    def sums_alone(self) -> bool:
        """Whether sums are all that the layer does: it has no ADC, and its reads are nothing but their cells'."""
        return self.layer.spec.adc_range == "ideal" and self.layer.readout is None

    @functools.cached_property
    def _side_by_side(self):
        return pixels.SideBySide(self.layer, self)

    @functools.cached_property
    def _dense(self):
        return Dense(self.layer, self)

    def apart(self, a_codes: torch.Tensor) -> Any:
        """What makes the accumulators without regard to how they are scaled, where that is the way for such an input; else None."""
        return self._dense if self._dense.serves(a_codes) else None

    def way(self, a_codes: torch.Tensor) -> str:
        """See `engine.way`."""
        if self.sums_alone:
            return ", ".join(self.convolution.ways(a_codes))
        way = self.apart(a_codes) or (self._side_by_side if self._side_by_side.serves(a_codes) else None)
        return self.columns(a_codes) if way is None else way.name

    def simulate(self, a_codes: torch.Tensor, **scaling: Any) -> torch.Tensor:
        """Accumulators; with `scaling` (values, scale, offset) `[1, ...]`, the bits of what `engines.scaled` returns; with
        `next_codes` `[0, ...]`, as results are written there."""
        if self.sums_alone:
            return self.convolution(a_codes)[None]
        if not scaling and (way := self.apart(a_codes)):  # `engine.scaled` has asked before
            return way.simulate(a_codes)
        return self.by_reads(a_codes, **scaling)

    def by_reads(self, a_codes: torch.Tensor, **scaling: Any) -> torch.Tensor:
        """`simulate` where reads are made one by one and their codes are scaled where they are added up."""
        if self._side_by_side.serves(a_codes):
            return self._side_by_side.simulate(a_codes, self.dtype, **scaling)
        return self.by_columns(a_codes, **scaling)


class Prepared(Ways):
    """A layer with cells on a grid, as `engine` asks for it."""

    def __init__(self, layer: MappedLayer, dtype: torch.dtype | None = None) -> None:
        super().__init__(layer, dtype)
        self._ways_of_inputs: set[str] = set()  # of thresholds

    @functools.cached_property
    def _by_rows(self):
        return lay_out(self.layer, matrix=False)

    @functools.cached_property
    def _by_matrix(self):
        """The layout of products of matrices, None where the machine or the layer does not fit, or rows are faster: where 16 bits hold the
        reads and steps are whole (VGG7's chips take 0.6 to 0.8 of the time by rows), and where reads are noisy, as the work that noise
        takes overlaps with the additions of rows better than with products (a fifth of the time, where an eighth of the bits are one)."""
        noisy = self.layer.readout is not None and self.layer.readout.noisy
        if not (can_multiply() and may(TILES)) or noisy or self._narrow.fits or self._compares_shorts:
            return None
        return lay_out(self.layer, matrix=True) if all(cells_matrix.fits(self.layer, part) for part in weights_of(self.layer)) else None

    @functools.cached_property
    def _static(self):
        return no_adc_forms(self.layer) if self.layer.spec.adc_range == "ideal" or self.layer.compares else static_forms(self.layer)

    @functools.cached_property
    def _narrow(self) -> Narrow:
        fixed = self.layer.spec.adc_range != "ideal" and not self.layer.compares
        return narrow_forms(self.layer) if fixed and may(SHORT_ROWS) else NOT_NARROW

    @functools.cached_property
    def _compared(self):
        return ComparedForms(self.layer)

    @functools.cached_property
    def _thresholds(self) -> Compared:
        return self._compared.tables()

    @functools.cached_property
    def _trees(self) -> Compared:
        return self._compared.tables(self._compared.levels)

    @property
    def _compares_shorts(self):
        return self.layer.compares and self._compared.narrow

    @property
    def tree_kernel(self) -> int | None:
        """The kernel that compares with trees of thresholds; None where it cannot."""
        if not self.layer.compares or not self._compared.levels:
            return None
        return COMPARED_TREES if self._compares_shorts else COMPARED_WIDE_TREES

    def _comparing_kernel(self, a_codes):
        """The fastest that can, where codes follow from thresholds."""
        trees, others = self.tree_kernel, COMPARED_SHORT if self._compares_shorts else COMPARED
        if trees is None or not may(TREES):
            return others
        ways = {TREES: trees, "one after the other": others}
        tried = {name: functools.partial(self.by_columns, op=op) for name, op in ways.items()}
        facts = trees, self._compared.levels, self._compared.spread, *self._side_by_side.besides
        way = fastest_for(self.layer, a_codes, tried, facts)
        if way is None:
            return trees if "_trees" in self.__dict__ else others
        if not self._ways_of_inputs:
            self.__dict__.pop("_thresholds" if way == TREES else "_trees", None)  # they are large
        self._ways_of_inputs.add(way)
        return ways[way]

    def _static_kernel(self, beside, a_codes):
        """The fastest that can, with fixed ranges."""
        if self.layer.compares:
            return self._comparing_kernel(a_codes)
        plain = not (beside.noisy or beside.curved or beside.gained or beside.moved)
        if self._narrow.fits:
            return NARROW if plain else SHORT
        if self._static.broad:
            return STATIC_BROAD
        return PLAIN if plain else STATIC

    def columns(self, a_codes: torch.Tensor) -> str:
        """By what columns side by side are read."""
        return "sums of rows of cells, or products of matrices"

    @functools.cached_property
    def convolution(self) -> ProductsOfBytes:
        """`sum_t sum_z sum_k 2^(d z + c k) u`, without an ADC."""
        return ProductsOfBytes(self.layer)

    def by_columns(self, a_codes: torch.Tensor, op: int | None = None, **scaling: Any) -> torch.Tensor:
        """The same with columns side by side. Args: op, of the kernel; None: the fastest."""
        layer = self.layer
        dynamic = layer.spec.adc_range == "dynamic"
        forms = dynamic_forms(layer, *self._ranges(a_codes)) if dynamic else self._static
        out = room_for_results(layer, a_codes, int(step_of_slice(layer).max()) + 1, self.dtype, scaling)
        self._run(forms, a_codes, op or (DYNAMIC if dynamic else STATIC), out=out.numpy(), **scaling)
        return out

    def histogram(self, a_codes: torch.Tensor, bins: Bins | None = None) -> torch.Tensor:
        """Counts of the read values in these bins or its own, int64 `[digits, slices, classes, bin]`; see `engines`."""
        bins = bins or self.layer.bins
        counts = room_for(self.layer, bins)
        self._run(NO_FORMS, a_codes, HISTOGRAM, counts=counts, first_bin=bins.first, bin_shift=bins.shift)
        return torch.from_numpy(counts.sum(axis=0))

    def _ranges(self, a_codes):
        """Smallest and largest u of each `[group, array, digit, slice]` in the batch."""
        layer, spec = self.layer, self.layer.spec
        kinds = layer.geometry.groups, len(layer.arrays), len(spec.digit_bits), len(spec.slice_bits)
        extremes = np.empty((numba.get_num_threads(), *kinds, 2, padded_columns(layer)), np.int32)
        extremes[..., 0, :], extremes[..., 1, :] = 2**31 - 1, -2**31
        self._run(NO_FORMS, a_codes, RANGES, extremes=extremes)
        low, high = np.moveaxis(extremes[..., :len(layer.w_codes) // layer.geometry.groups], -2, 0)
        return low.min((0, -1)).astype(np.int64), high.max((0, -1)).astype(np.int64)

    def _run(self, forms: Forms, a_codes, op, **target):
        layer, geometry = self.layer, self.layer.geometry
        size = geometry.output_size(*a_codes.shape[1:3], layer.kernel)
        pixels = len(a_codes) * math.prod(size)
        beside = besides(layer, math.prod(size))
        if op == STATIC:
            op = self._static_kernel(beside, a_codes)
        if layer.kernel == (1, 1) and geometry.stride == (1, 1) and not any(geometry.padding):
            threads = numba.get_num_threads()
            rows = threads * math.ceil(pixels / (threads * MOST_IN_A_ROW))  # as many for each thread
            width = math.ceil(pixels / rows) if rows else 1
            rows, channels = math.ceil(pixels / width), a_codes.shape[3]
            a_codes = F.pad(a_codes.reshape(pixels, channels), (0, 0, 0, rows * width - pixels)).view(rows, 1, width, channels)
            size = 1, width
        fills_tiles = math.prod(size) * len(layer.spec.digit_bits) >= TILE_ROWS // 2
        by_trees = op in (COMPARED_TREES, COMPARED_WIDE_TREES)
        shape, tables = fills_tiles and not by_trees and self._by_matrix or self._by_rows
        narrow = self._narrow if op in (NARROW, SHORT) else NOT_NARROW
        compared = self._trees if by_trees else self._thresholds if op in (COMPARED, COMPARED_SHORT) else NOTHING_COMPARED
        if not beside.idle_is_zero:
            compared = compared._replace(idle=NOTHING_COMPARED.idle)
        beside = beside._replace(idle_is_zero=layer.spec.skips_idle or beside.idle_is_zero and compared.silent)
        cells_kernel.run(shape, tables, forms, narrow, compared, beside, a_codes, size, pixels, op, **target)
