"""CPU engine for layers of many small groups, depthwise convolutions above all.

A group of one channel has a word line for each kernel position and few bit lines: lists of active rows and vectors of hundreds of
columns (`kernel`, `cells_kernel`) would be empty but for one entry. Here a vector takes the same column of 64 groups
(`grouped_kernel`), or, where an array has a single word line, what its reads add is looked up for each pair of codes (`lookup`).
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ....arrays.mapping import MappedLayer
from ....kernels.simd import set_threads
from ... import accumulator_dtype
from ..common.buffers import DYNAMIC, HISTOGRAM, RANGES, STATIC
from ..common.histogram import room_for
from ..common.layout import step_of_slice
from ..grid.cells_forms import DELTA, FACTOR, NO_FORMS, Forms, dynamic_forms, static_forms
from ..vectors import lookup
from ..vectors.wide import WIDE
from ..whole.choice import GROUPS, may
from . import grouped_kernel
from .grouped_kernel import NO_RANGES, GroupLayout, Ranges, GroupShape

MANY, FEW = 16, 8  # groups of a layer, and outputs of one group


def serves(layer: MappedLayer) -> bool:
    """Whether the layer is one of many small groups that this kernel can run."""
    groups = layer.geometry.groups
    few = groups >= MANY and len(layer.w_codes) <= FEW * groups
    return may(GROUPS) and few and layer.readout is None and int(layer.row_weights.abs().max()) < 2**15


class Prepared:
    """A layer of many small groups, as `engine` asks for it; parts are made when first needed.

    Args: usual, what makes the convolution of a layer without an ADC.
    """

    def __init__(self, layer: MappedLayer, usual: Any) -> None:
        self.layer, self._usual, self.sums_alone = layer, usual, usual.sums_alone

    @property
    def convolution(self) -> Any:
        """That of the layer without an ADC."""
        return self._usual.convolution

    def way(self, a_codes: Tensor) -> str:
        """See `engine.way`."""
        if self.sums_alone:
            return self._usual.way(a_codes)
        return "groups side by side" if self.layer.spec.adc_range == "dynamic" or self._table is None else "table of pairs of codes"

    @functools.cached_property
    def _layout(self) -> GroupLayout:
        """What of `grouped_kernel.GroupLayout` and `GroupShape` does not depend on the input."""
        layer, spec = self.layer, self.layer.spec
        cells = F.pad(layer.row_weights.cpu().permute(1, 3, 0, 2), (0, 0, 0, 0, 0, 0, 0, -layer.geometry.groups % WIDE))
        cells = cells.unflatten(0, (-1, WIDE)).permute(0, 2, 3, 4, 1).to(torch.int16).contiguous().numpy()
        return GroupLayout(cells, np.zeros(0, np.int64), np.array([0, *(stop for _, stop in layer.arrays)], np.int64),
                    np.cumsum([0, *spec.digit_bits], dtype=np.int64), step_of_slice(layer))

    @functools.cached_property
    def _static(self) -> Forms:
        return static_forms(self.layer)

    @functools.cached_property
    def _table(self):
        """What each pair of codes adds, where the arrays have one row of ideal cells and fixed ranges; else None."""
        return lookup.Table(self.layer) if self.layer.cells is None and self.layer.tallest == 1 else None

    def _input(self, a_codes):
        """Codes as the kernels take them: `[N, H, W, channel of a group, group]`, padded on all sides, groups up to whole vectors."""
        top, bottom, left, right = self.layer.geometry.padding
        groups = self.layer.geometry.groups
        x = a_codes.unflatten(3, (groups, -1)).transpose(3, 4)
        return F.pad(x, (0, -groups % WIDE, 0, 0, left, right, top, bottom)).contiguous().numpy()

    def _run(self, forms, ranges, a_codes, op, **target):
        layer, geometry, x = self.layer, self.layer.geometry, self._input(a_codes)
        taps = lookup.taps(layer)
        layout = self._layout._replace(row_at=taps @ np.array(x.strides[1:4], np.int64))
        blocks, outputs, slices, rows, _ = layout.cells.shape
        shape = GroupShape(
            groups=geometry.groups, blocks=blocks, outputs=outputs, rows=rows, arrays=len(layer.arrays), bits=layer.spec.a_bits,
            digits=len(layer.spec.digit_bits), slices=slices, classes=layer.classes, steps=int(layout.step_of_slice.max()) + 1,
            stride=geometry.stride[0] * x.strides[1], pitch=geometry.stride[1] * x.strides[2],
            chunk=(2**15 - 1) // max(int(np.abs(layout.cells).max()), 1))
        size = geometry.output_size(*a_codes.shape[1:3], layer.kernel)
        grouped_kernel.run(shape, layout, forms, ranges, x, size, op, **target)

    def simulate(self, a_codes: Tensor) -> Tensor:
        """The layer's accumulators, integers `[G, N, H', W', out]`; see `engines`."""
        layer, geometry = self.layer, self.layer.geometry
        if self.sums_alone:
            return self._usual.simulate(a_codes)
        set_threads()
        size = geometry.output_size(*a_codes.shape[1:3], layer.kernel)
        dtype = accumulator_dtype(layer)
        if layer.spec.adc_range != "dynamic" and self._table is not None:
            return torch.from_numpy(self._table.sums(self._input(a_codes), size)).flatten(4)
        out = torch.empty(int(self._layout.step_of_slice.max()) + 1, len(a_codes), *size, geometry.groups,
                          len(layer.w_codes) // geometry.groups, dtype=dtype)
        if layer.spec.adc_range != "dynamic":
            self._run(self._static, NO_RANGES, a_codes, STATIC, out=out.numpy())
            return out.flatten(4)
        forms, ranges = self._dynamic(a_codes)
        self._run(forms, ranges, a_codes, DYNAMIC, out=out.numpy())
        return out.add_(torch.from_numpy(forms.constant).to(dtype)[:, None]).flatten(4)

    def apart(self, a_codes: Tensor) -> Prepared:
        """See `cells.Ways.apart`."""
        return self

    def histogram(self, a_codes: Tensor) -> Tensor:
        """Counts of the read values, int64 `[digits, slices, classes, bin]`; see `engines`."""
        set_threads()
        size = self.layer.geometry.output_size(*a_codes.shape[1:3], self.layer.kernel)
        if self._table is not None:
            return torch.from_numpy(self._table.histogram(self._input(a_codes), size))
        bins = self.layer.bins
        counts = room_for(self.layer, bins)
        self._run(NO_FORMS, NO_RANGES, a_codes, HISTOGRAM, counts=counts, first_bin=bins.first, bin_shift=bins.shift)
        return torch.from_numpy(counts.sum(axis=0))

    def _dynamic(self, a_codes):
        """(`Forms`, `Ranges`) of the smallest and largest u of each group, array, digit and slice in the batch."""
        layer, spec, groups = self.layer, self.layer.spec, self.layer.geometry.groups
        parts = len(layer.arrays), len(spec.digit_bits), len(spec.slice_bits), -(-groups // WIDE)
        extremes = np.empty((numba.get_num_threads(), *parts, 2, WIDE), np.int32)
        extremes[..., 0, :], extremes[..., 1, :] = 2**31 - 1, -2**31
        self._run(NO_FORMS, NO_RANGES, a_codes, RANGES, extremes=extremes)
        low, high = extremes[..., 0, :].min(0), extremes[..., 1, :].max(0)
        low, high = (ends.reshape(*parts[:3], -1).transpose(3, 0, 1, 2).astype(np.int64) for ends in (low, high))
        forms = dynamic_forms(layer, low, high)
        singles, doubles = (form.reshape(*low.shape, -1).transpose(1, 2, 3, 0, 4) for form in (forms.singles, forms.doubles))
        ranges = Ranges(*map(np.ascontiguousarray, (
            -low.transpose(1, 2, 3, 0).astype(np.int32), singles[..., DELTA], doubles[..., FACTOR])))
        return forms._replace(constant=forms.constant[:groups]), ranges
