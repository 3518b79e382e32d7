"""CPU engine: positional population counts with carry-save adders, many columns to a vector.

A read of array t, digit z adds, for every input bit that is one, the cells of its row: `P = sum of the active rows`, for
512 columns at a time (`layout` says where they stand, `rows` which rows are active, `counts` adds them). A layer goes another way where
that is found to be faster (`choice`; `way` names it): dense products (`dense`), output pixels side by side (`pixels`), what clips alone
(`loud`); depthwise ones always do (`grouped`). The ADC is the first of these that the read and the machine allow:

- None, where a code is `u`, or half of an even one, unless it is clipped (`Adc.relative`): their sum is an integer convolution,
  and only what clipping takes off is added. Reads of few ones cannot clip and are not even counted; of the others
  `counts.any_outside` sees on the bit planes that no column does, nearly always.
- A table of bytes, where one instruction looks up 64 columns.
- 16-bit arithmetic, 32 columns at a time (`fixed_point`).

`converter` prepares these, `codes` applies them. Where 16 bits do not hold a read or the sums of codes, or do not give the
ADC's codes for every possible read, the layer is run as cells on a grid are (`cells`): by sums of rows in place of bit planes.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numba
import numpy as np
import torch

from ...arrays.cells import Cells
from ...arrays.mapping import MappedLayer
from ...arrays.readout import Readout
from ...kernels import elementwise
from ...kernels.output import ToCodes
from ...kernels.simd import set_threads
from ..reach import lacking
from . import cells
from .common.buffers import BY_ONES, DYNAMIC, HISTOGRAM, MOST_LEAVES, RANGES, STATIC, room_for_results
from .common.histogram import of_slices
from .common.layout import lay_out
from .grid.cells_thresholds import unfit
from .groups import grouped
from .pixels import loud
from .planes import kernel
from .planes.converter import dynamic_adc, fits, no_adc, static_adc
from .planes.two_tables import two_tables
from .whole.choice import fastest_for
from .whole.integer import IntegerConvolution


def unsupported(layer: MappedLayer, device: torch.device) -> str | None:
    """Why this engine cannot run on `device`, or None."""
    if layer.cells is not None and not cells.fits(layer):
        return "cells too far from their levels for sums of 16 bits"
    if reason := layer.compares and unfit(layer):
        return reason
    return lacking(layer, compares=True) or (None if device.type == "cpu" else f"it runs on the CPU, the data are on {device}")


def prepare(layer: MappedLayer) -> _AnyPrepared:
    """What does not depend on the input; made when first needed."""
    if layer.compares and layer.cells is None and layer.readout is None:
        return _OfTable(layer)
    if layer.compares:  # by rows of cells, whatever they are
        layer = replace(layer if layer.cells is not None else _on_grid(layer), readout=layer.readout or Readout())
    usual = _Prepared(layer) if layer.cells is None else cells.Prepared(layer)
    return grouped.Prepared(layer, usual) if grouped.serves(layer) else usual


def accumulate(prepared: _AnyPrepared, a_codes: torch.Tensor) -> torch.Tensor:
    """The layer's accumulators, int32 or int64 `[G, N, H', W', out]`, of codes uint8 `[N, H, W, in]`; see `engines`."""
    set_threads()  # here and below, before anything is sized by their number
    return prepared.simulate(a_codes)


def scaled(prepared: _AnyPrepared, a_codes: torch.Tensor, values: list[float], scale: torch.Tensor, offset: torch.Tensor,
           to_codes: ToCodes | None = None, shift: torch.Tensor | None = None) -> torch.Tensor:
    """`engines.scaled` without a pass over memory for it: each output pixel is scaled when its reads are added up. With
    `to_codes` (`output.ToCodes`) it becomes the codes of the next layer there: uint8 `[N, H', W', out]`."""
    set_threads()
    if prepared.sums_alone and prepared.layer.cells is None and values == [1.0]:
        return prepared.convolution.scaled(a_codes, scale, offset, to_codes, shift)
    if way := prepared if prepared.sums_alone else prepared.apart(a_codes):
        return elementwise.scaled_steps(way.simulate(a_codes), values, scale, offset, to_codes)
    scaling = {"values": np.array(values), "scale": scale.numpy(), "offset": offset.numpy()}
    if to_codes is None:
        return prepared.simulate(a_codes, **scaling).view(torch.float32)[0]
    size = prepared.layer.geometry.output_size(*a_codes.shape[1:3], prepared.layer.kernel)
    codes = torch.empty(len(a_codes), *size, len(prepared.layer.w_codes), dtype=torch.uint8)
    prepared.simulate(a_codes, next_codes=codes.numpy(), to_codes=to_codes, **scaling)
    return codes


def way(prepared: _AnyPrepared, a_codes: torch.Tensor) -> str:
    """The name of the way that such an input goes, for people."""
    set_threads()
    return prepared.way(a_codes)


def histogram(prepared: _AnyPrepared, a_codes: torch.Tensor) -> torch.Tensor:
    """Counts of the read values, int64 `[digits, slices, classes, bin]`, of codes uint8 `[N, H, W, in]`; see `engines`."""
    set_threads()
    return prepared.histogram(a_codes)


class _Prepared(cells.Ways):
    """Made when first asked for: a layer without an ADC needs no bit planes, one with an ADC seldom a convolution."""

    @functools.cached_property
    def reads(self):
        return _Reads(self.layer, *self.static)

    @functools.cached_property
    def counting(self):
        """Reads whose bit planes hold whole values, not the bits of a cell side by side."""
        return self.reads if self.reads.shape.packed == 1 else _Reads(self.layer, *self.static, side_by_side=False)

    @functools.cached_property
    def convolution(self):
        return IntegerConvolution(self.layer)

    @functools.cached_property
    def static(self):
        """The ADC and the convolution of fixed ranges (`converter.static_adc`), or (None, None)."""
        fixed = self.layer.spec.adc_range in ("calibrated", "full")
        return fixed and static_adc(self.layer) or (None, None)

    @functools.cached_property
    def loud(self):
        return loud.Loud(self.layer, *self.static, self)

    def apart(self, a_codes):
        return self.loud if self.loud.serves(a_codes) else super().apart(a_codes)

    def columns(self, a_codes):
        if not self.reads.static:
            return "bit planes, ranges of the batch" if self.layer.spec.adc_range == "dynamic" else self.on_grid.columns(a_codes)
        return "integer product and what clips, by bit planes" if self._adc(a_codes).relative else "bit planes"

    @functools.cached_property
    def on_grid(self):
        """The same layer by sums of rows, where 16 bits do not do."""
        return cells.Prepared(_on_grid(self.layer), self.dtype)

    def by_columns(self, a_codes, **scaling):
        """`by_reads` with columns side by side."""
        adc = self._adc(a_codes)
        return self.on_grid.by_columns(a_codes, **scaling) if adc is None else self._by_planes(adc, a_codes, **scaling)

    def _adc(self, a_codes):
        """The ADC of an input, None where 16 bits do not do; of a relative one and that which converts every read the faster one."""
        adc = self.reads.adc(a_codes)
        if adc is None or not adc.relative:
            return adc
        ways = {"what clips": lambda x: self._by_planes(adc, x), "every read": lambda x: self._by_planes(self._of_every_read, x)}
        return self._of_every_read if fastest_for(self.layer, a_codes, ways, self.layer.ranges) == "every read" else adc

    @functools.cached_property
    def _of_every_read(self):
        return static_adc(self.layer, relative=False)[0]

    def _by_planes(self, adc, a_codes, **scaling):
        layer, reads = self.layer, self.reads
        if adc.relative > 0:
            out = reads.convolution.sums(a_codes)[None]
        else:
            out = room_for_results(layer, a_codes, reads.shape.steps, self.dtype, scaling)
        op = DYNAMIC if layer.spec.adc_range == "dynamic" else BY_ONES if layer.by_ones else STATIC
        reads.run(adc, a_codes, op, out=out.numpy(), **scaling)
        return out if out.dtype == torch.int64 else out.view(torch.int32)

    def histogram(self, a_codes):
        """Counts of the read values, int64 `[digits, slices, classes, bin]`."""
        layer, bins = self.layer, self.layer.bins
        if layer.largest_sum >= MOST_LEAVES or bins.shift:
            return self.on_grid.histogram(a_codes, bins)
        reads = self.counting
        kinds = len(layer.spec.digit_bits), reads.shape.counters, layer.classes
        counts = np.zeros((numba.get_num_threads(), *kinds, bins.count, 8), np.int64)
        reads.run(no_adc(layer), a_codes, HISTOGRAM, counts=counts, first_bin=bins.first)
        return torch.from_numpy(of_slices(counts, reads.layout.counter_slices, reads.shape.slices))


class _Reads:
    """The bit planes of a layer's weights and the forms of its ADC; `convolution`: see `static_adc`."""

    def __init__(self, layer, static, convolution, side_by_side=True):
        self.layer, self.static, self.convolution = layer, static, convolution
        self.shape, self.layout = lay_out(layer, side_by_side)

    def adc(self, a_codes):
        """The ADC for these inputs, or None where 16 bits do not do."""
        if self.layer.spec.adc_range != "dynamic":
            return self.static
        return dynamic_adc(self.layer, *self._ranges(a_codes)) if fits(self.layer) else None

    def run(self, table, a_codes, op, **target):
        geometry = self.layer.geometry
        size = geometry.output_size(*a_codes.shape[1:3], self.layer.kernel)
        if (*a_codes.shape[1:3], *self.layer.kernel, *geometry.stride, *geometry.padding) == (1, 1, 1, 1, 1, 1, 0, 0, 0, 0):
            # Images of one pixel, what linear layers have, are the rows of one image: a work item for each would make buffers for each.
            a_codes, size = a_codes.transpose(0, 1), (len(a_codes), 1)
        kernel.run(self.shape, self.layout, table, a_codes, size, op, **target)

    def _ranges(self, a_codes):
        """Smallest and largest `u` of each (group, array, digit, slice) in the batch."""
        shape = (*self.layout.array_base.shape, len(self.layer.spec.digit_bits), self.shape.slices)
        extremes = np.empty((numba.get_num_threads(), *shape, 2), np.int64)
        extremes[..., 0], extremes[..., 1] = 2**62, -2**62
        self.run(no_adc(self.layer), a_codes, RANGES, extremes=extremes)
        return extremes[..., 0].min(axis=0), extremes[..., 1].max(axis=0)


class _OfTable(cells.Prepared):
    """Ideal cells whose converters follow a table: by rows, as cells on a grid, or in two passes over bit planes where these hold it."""

    def __init__(self, layer):
        super().__init__(replace(_on_grid(layer), readout=Readout()))
        self._ideal = layer

    @functools.cached_property
    def _planes(self):
        tables = two_tables(self._ideal)
        return None if tables is None else _Planes(self._ideal, tables)

    def apart(self, a_codes):
        return self._planes or super().apart(a_codes)

    def histogram(self, a_codes):
        return super().histogram(a_codes, self._ideal.bins)


class _Planes:
    """Those two passes. Args: tables, of `two_tables`."""

    name = "bit planes, twice: bytes of a table"

    def __init__(self, layer, tables):
        self.tables, self.reads = tables, _Reads(layer, None, None)

    def simulate(self, a_codes):
        """Accumulators."""
        low, high = (room_for_results(self.reads.layer, a_codes, self.reads.shape.steps, torch.int32, {}) for _ in range(2))
        for adc, out in ((self.tables.low, low), (self.tables.high, high)):
            self.reads.run(adc, a_codes, STATIC, out=out.numpy())
        return low.add_(high, alpha=256).mul_(self.tables.scale).add_(torch.from_numpy(self.tables.constant).int().view(-1, 1, 1, 1, 1))


def _on_grid(layer):
    """A layer whose ideal cells lie on a grid of its u."""
    spec, w_rows, scale = layer.spec, layer.w_rows.int(), round(1 / layer.spec.unit)
    values = torch.stack([scale * ((w_rows >> (spec.cell_bits * k)) & (2**bits - 1)) for k, bits in enumerate(spec.slice_bits)])
    reference = torch.tensor(layer.reference_twice, dtype=torch.int32).view(-1, 1, 1).expand(values.shape[:3]).contiguous()
    return replace(layer, cells=Cells(values, reference, scale - 1))


_AnyPrepared = _Prepared | cells.Prepared | grouped.Prepared
