"""Reads as dense products: the way of layers whose digits or cells have several bits, as analog inputs have, or whose reads are few.

All reads of array t and digit z are one exact product of bytes (`products`), the columns of all slices side by side:

    u[pixel, slice, out] = sum over the rows of the array of a_z (what a row adds to u)

The kernel of array t is the smallest that has all of its rows, zeros in place of those of other arrays. Each u is converted by the ADC's
formula itself, in float64, and its code is added to the layer's accumulators. Cells of more than one byte, as on a grid, are two columns
of bytes, `u = 256 u_high + u_low`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor
from torch.nn import functional as F

from ...arrays.mapping import MappedLayer
from ...arrays.spec import Geometry
from ...kernels.cache import SOURCES
from ...kernels.simd import set_threads
from .. import accumulator_dtype
from .common.layout import step_of_slice
from .whole.choice import DENSE, fastest_for, may
from .whole.products import Product

TOGETHER = 2**22  # reads that are held at a time, about
MOST = 16  # products of bytes in place of one: of more, reads by active rows or by look-up are faster, whatever the layer
CHUNK = 2**13  # reads of one work item
LEAST, LARGEST = -127 * 256 - 128, 127 * 256 + 127  # that two bytes hold, of which the upper one is no -128
UNIT, DELTA, LOWEST, HIGHEST, FACTOR = range(5)  # of a converter: q = clip(rint(u UNIT / DELTA), LOWEST, HIGHEST) FACTOR


class Dense:
    """One layer, as it is run where `serves`; parts are made when first needed.

    Args: other, with `by_reads`, the way that it may take the place of.
    """

    name = DENSE

    def __init__(self, layer: MappedLayer, other: Any) -> None:
        self.layer, self._other = layer, other

    def serves(self, a_codes: Tensor) -> bool:
        """Whether this is the faster way for such an input, or can be gone at all."""
        if not self._may_run:
            return False
        ways = {"dense": lambda x: self.simulate(x) if self._fits else self._other.by_reads(x), "by reads": self._other.by_reads}
        if fastest_for(self.layer, a_codes, ways) == "dense" and self._fits:
            return True
        self.__dict__.pop("_weights", None)  # what a trial has left
        self.__dict__.pop("_arrays", None)
        return False

    @property
    def _may_run(self):
        """Whether reads are nothing but their cells', and products are not too many: what takes no time to find out, as it is asked for
        every weight of a network in training."""
        layer, spec = self.layer, self.layer.spec
        return (may(self.name) and spec.adc_range in ("calibrated", "full") and layer.readout is None and layer.geometry.groups == 1
                and not layer.by_ones
                and len(spec.slice_bits) * len(spec.digit_bits) <= MOST)

    @functools.cached_property
    def _fits(self):
        """Whether two bytes hold what each row adds to u, and products are not too many then."""
        return self._weights is not None and len(self._weights) * len(self.layer.spec.digit_bits) <= MOST

    @functools.cached_property
    def _unit(self):
        """The largest number that divides what every row adds to u: cells of a grid may hold whole levels."""
        divisors = [int(np.gcd.reduce(part.cpu().abs().numpy(), axis=None)) for part in self._of_slices()]
        return max(1, math.gcd(*divisors))

    def _of_slices(self):
        """What a row of each slice adds to u, int32 `[rows, out]`, made one after the other."""
        return (self.layer.slice_weights(k)[0] for k in range(len(self.layer.spec.slice_bits)))

    @functools.cached_property
    def _weights(self):
        """What each row adds to `u / _unit`, as one byte or as two, of 256 and of 1: int8 `[slices bytes, rows, out]`; None where two do
        not hold it."""
        units = []
        for part in self._of_slices():
            part = part.cpu() // self._unit
            if part.min() < LEAST or part.max() > LARGEST:
                return None
            units.append(part.to(torch.int16))
        if max(int(part.abs().max()) for part in units) < 128:
            return torch.stack([part.to(torch.int8) for part in units])
        weights = torch.stack(units)
        low = (weights + 128) % 256 - 128
        return torch.stack([(weights - low) // 256, low], 1).flatten(0, 1).to(torch.int8)

    @functools.cached_property
    def _arrays(self):
        """Of each array: (`Product`, the first row and column of its kernel in the layer's, its channels)."""
        layer, (_, width), channels = self.layer, self.layer.kernel, self.layer.group_channels
        geometry, drive = Geometry(layer.geometry.stride, (0,) * 4, layer.geometry.dilation), 2 ** max(layer.spec.digit_bits) - 1
        found = []
        for start, stop in layer.arrays:
            (top, left), (bottom, right) = divmod(start // channels, width), divmod((stop - 1) // channels, width)
            left, right = (left, right) if top == bottom else (0, width - 1)
            of = slice(start % channels, (stop - 1) % channels + 1) if (top, left) == (bottom, right) else slice(0, channels)
            first, end = (top * width + left) * channels, (bottom * width + right + 1) * channels  # rows of all these taps
            part = F.pad(self._weights[:, start:stop], (0, 0, start - first, end - stop))
            part = part.view(len(part), bottom - top + 1, right - left + 1, channels, -1)
            kernel = part[:, :, :, of].permute(0, 4, 3, 1, 2).flatten(0, 1).contiguous()
            found.append((Product(kernel, geometry, drive, torch.int32), top, left, of))
        return found

    @functools.cached_property
    def _converters(self):
        """`UNIT..FACTOR` of each digit and slice, float64."""
        layer, spec = self.layer, self.layer.spec
        table = np.zeros((len(spec.digit_bits), len(spec.slice_bits), 5))
        for z, k in np.ndindex(*table.shape[:2]):
            adc = layer.converter(z, k)
            factor = adc.factor << (spec.dac_bits * z + spec.cell_bits * k) if adc.bits else 0
            table[z, k] = self._unit * layer.unit, adc.delta, adc.q_min, adc.q_max, factor
        return table

    def simulate(self, a_codes: Tensor) -> Tensor:
        """The layer's accumulators, integers `[G, N, H', W', out]`; see `engines`."""
        set_threads()
        layer, steps = self.layer, step_of_slice(self.layer)
        size = layer.geometry.output_size(*a_codes.shape[1:3], layer.kernel)
        out = torch.zeros(int(steps.max()) + 1, len(a_codes), *size, len(layer.w_codes), dtype=accumulator_dtype(layer))
        images = max(1, TOGETHER // (math.prod(size) * len(self._weights) * len(layer.w_codes)))
        top, bottom, left, right = layer.geometry.padding
        for first in range(0, len(a_codes), images):
            codes = a_codes[first:first + images]
            self._add(F.pad(codes, (0, 0, left, right, top, bottom)) if any(layer.geometry.padding) else codes, size, steps,
                      out[:, first:first + images])
        return out

    def _add(self, codes, size, steps, out):
        """Add the codes of all reads of some images, `[N, H, W, in]` with their padding, to `out`."""
        spec, (down, right), (dy, dx) = self.layer.spec, self.layer.geometry.stride, self.layer.geometry.dilation
        target = out.view(len(out), -1, out.shape[4]).numpy()
        for z, bits in enumerate(spec.digit_bits):
            digits = (codes >> spec.dac_bits * z) & (2**bits - 1) if len(spec.digit_bits) > 1 else codes
            for product, top, left, channels in self._arrays:
                kernel = product.parts[0].weight.shape[2:]
                height, width = down * (size[0] - 1) + dy * (kernel[0] - 1) + 1, right * (size[1] - 1) + dx * (kernel[1] - 1) + 1
                u = product(digits[:, dy * top:dy * top + height, dx * left:dx * left + width, channels].contiguous())
                u = u.view(target.shape[1], len(spec.slice_bits), -1, target.shape[2])
                _convert(u.numpy(), self._converters[z], steps, target)


@njit(cache=True, parallel=True)
def _convert(u, converters, steps, out, sources=SOURCES):
    """Add the codes of u `[pixel, slice, byte, out]` to out `[step, pixel, out]`."""
    pixels, slices, parts, columns = u.shape
    together = max(1, CHUNK // (slices * columns))
    for chunk in prange((pixels + together - 1) // together):
        for pixel in range(chunk * together, min(pixels, (chunk + 1) * together)):
            for k in range(slices):
                unit, delta, lowest, highest, factor = converters[k]
                target, low = out[steps[k], pixel], u[pixel, k, parts - 1]
                if parts == 2:
                    high = u[pixel, k, 0]
                    for c in range(columns):
                        q = np.rint((np.float64(256) * high[c] + low[c]) * unit / delta)
                        target[c] += np.int64(min(max(q, lowest), highest) * factor)
                else:
                    for c in range(columns):
                        q = np.rint(low[c] * unit / delta)
                        target[c] += np.int64(min(max(q, lowest), highest) * factor)
