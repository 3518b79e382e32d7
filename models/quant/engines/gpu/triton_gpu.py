"""Triton engine: a layer laid out for the kernel on NVIDIA GPUs (`triton_kernel`), and its launch. How reads are converted is in
`triton_conversion`, what they have besides in `triton_readout`.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from ...arrays.mapping import MappedLayer
from ...arrays.readout import first_image
from .. import accumulator_dtype
from ..reach import lacking
from . import triton_conversion, triton_kernel, triton_readout, triton_tile
from .triton_kernel import Constants
from .triton_tile import MAX_ROWS

log = logging.getLogger(__name__)


def unsupported(layer: MappedLayer, device: torch.device) -> str | None:
    """Why this engine cannot run on `device`, or None."""
    reason = lacking(layer) or triton_readout.lacking(layer)
    if reason or _interpreted():
        return reason
    if device.type != "cuda" or torch.version.hip:
        return f"it needs a GPU from NVIDIA, not {torch.version.hip and 'one from AMD' or device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, not {'.'.join(map(str, capability))}"
    return None


class Prepared:
    """All that depends on the weights and the ADC; made once for a layer.

    Attributes:
        mode: what `accumulate` does with a read, see `triton_kernel`; "dynamic" runs "range" before.
    """

    def __init__(self, layer: MappedLayer):
        spec = layer.spec
        self.layer = layer
        self.mode, conversion = triton_conversion.conversion(layer)
        weights = None if layer.cells is None or self.mode != "sum" else _whole_weights(layer)
        if self.mode == "sum":
            # One digit, one slice, arrays of any rows: `sum A (2 W - L)`, or `sum A W` behind a digital reference.
            if spec.adc_range != "ideal":
                log.info("this layer's ADC changes no value: it runs as one integer convolution")
            whole = replace(spec, mapping="im2col", rows=MAX_ROWS, cell_bits=spec.w_bits, dac_bits=spec.a_bits,
                            reference="analog" if spec.adc_range == "ideal" else spec.reference)
            layer = replace(layer, spec=replace(whole, adc_plan="uniform", adc_bits=1), reference_twice=(layer.zero_twice,))
            steps = [[0]]
        elif self.mode in ("dynamic", "as read"):
            steps = [range(len(spec.slice_bits))]
        else:
            steps = [slices for _, slices in layer.delta_groups]
        self.reads = _Reads(layer, steps, accumulator_dtype(self.layer), conversion, self.mode, weights)

    @cached_property
    def every_read(self) -> _Reads:
        """The reads as the hardware makes them, whatever `accumulate` may skip. Noise would take them out of the bins."""
        assert self.layer.readout is None
        return _Reads(self.layer, [range(len(self.layer.reference_twice))], torch.int32)

    def accumulate(self, a_codes: torch.Tensor) -> torch.Tensor:
        """`engines`' accumulators, int32 or int64 `[G, N, H', W', out]`, of codes uint8 `[N, H, W, in]`."""
        reads = self.reads
        out = torch.empty(len(reads.steps), len(a_codes), *reads.output_size(a_codes), len(self.layer.w_codes),
                          dtype=reads.dtype, device=a_codes.device)
        if self.mode == "dynamic":
            L = reads.constants
            dtype = torch.int64 if L.wide else torch.int32
            ranges = torch.empty(2, L.groups, L.arrays, L.digits, L.slices, dtype=dtype, device=a_codes.device)
            ranges[0], ranges[1] = torch.iinfo(dtype).max, torch.iinfo(dtype).min
            reads.run("range", a_codes, ranges)
            reads.run("dynamic", a_codes, out, ranges)
        else:
            reads.run(self.mode, a_codes, out)
        return out

    def histogram(self, a_codes: torch.Tensor) -> torch.Tensor:
        """Counts of the read values, int64 `[digits, slices, classes, bin]`, of codes uint8 `[N, H, W, in]`."""
        L = self.every_read.constants
        counts = torch.zeros(self.every_read.copies, L.slices, L.digits, L.classes, self.layer.bins.count, dtype=torch.int64,
                             device=a_codes.device)
        self.every_read.run("histogram", a_codes, counts)
        return counts.sum(0).transpose(0, 1)


prepare, accumulate, histogram = Prepared, Prepared.accumulate, Prepared.histogram  # see `engines`


class _Reads:
    """The reads of a layer, laid out for the kernel.

    Args: steps, the slices of each ADC step; dtype of the accumulators; conversion, what the ADC needs, a tensor `[slices,
        digits, classes, ...]`; mode, in which codes are added; weights, what a row adds to a read, where that is not the
        layer's.
    """

    def __init__(self, layer, steps, dtype, conversion=None, mode="histogram", weights=None):
        spec, geometry = layer.spec, layer.geometry
        order = [k for step in steps for k in step]
        block_k = min(MAX_ROWS, max(32, triton.next_power_of_2(layer.tallest)))
        rows = _row_index(layer, block_k)
        levels = triton_tile.levels(layer.row_weights if weights is None else weights, order, rows)
        first = torch.tensor([0, *np.cumsum([len(step) for step in steps])], dtype=torch.int32)
        converts = mode in ("static", "table", "exact")
        classes = range(layer.classes) if mode == "histogram" else triton_tile.classes_apart(layer) if converts else [-1]
        weight = torch.tensor([[[_weight(layer, converts, z, k, j) for j in classes] for z in range(len(spec.digit_bits))] for k in order],
                              dtype=dtype)
        self.layer, self.steps, self.dtype = layer, steps, dtype
        self._on_device = {}

        out, channels, kernel_h, kernel_w = layer.w_codes.shape
        taps, digits, ideal, bins, (low, high) = kernel_h * kernel_w, len(spec.digit_bits), layer.cells is None, layer.bins, layer.u_span
        # Programs that count in one bin wait for each other, so there are several of each.
        self.copies = min(16, 2**22 // (weight.numel() * bins.count) + 1)
        self.constants = Constants(
            acc=tl.int64 if dtype == torch.int64 else tl.int32, channels=channels, groups=geometry.groups,
            out=out // geometry.groups, taps=taps, kernel_w=kernel_w, stride_y=geometry.stride[0], stride_x=geometry.stride[1],
            dilation_y=geometry.dilation[0], dilation_x=geometry.dilation[1],
            span=channels // geometry.planes if spec.mapping == "tap" else taps * channels, rows=spec.rows, arrays=len(layer.arrays),
            slices=len(order), digits=digits, classes=len(classes), dac_bits=spec.dac_bits,
            planned=converts and spec.planned, adc_bits=0 if spec.planned else spec.adc_bits, parts=len(levels),
            vector=math.gcd(16, channels, *(start for start, _ in layer.arrays)), block_k=block_k,
            blocks=triton.cdiv(layer.tallest, block_k), ideal=ideal,
            wide=not ideal and (dtype == torch.int64 if mode == "sum" else high - low >= 2**31),  # "dynamic" takes the smallest from each
            table_first=low if mode == "table" else 0, table_size=high - low + 1 if mode == "table" else 0)
        if mode == "histogram":
            conversion = torch.tensor([*bins, self.copies])
        else:
            conversion = weight if conversion is None else conversion[order]
        self._besides = None if layer.readout is None else triton_readout.Besides(layer, order, rows)
        self._tensors = levels, first, weight, conversion, *(self._besides.tables if self._besides else ())

    def output_size(self, a_codes):
        return self.layer.geometry.output_size(*a_codes.shape[1:3], self.layer.kernel)

    def run(self, mode, a_codes, out, conversion=None):
        """Run the kernel in `mode` on codes `[N, H, W, in]`; `conversion`, in place of the layer's."""
        device = a_codes.device
        if device not in self._on_device:
            self._on_device[device] = [tensor.to(device) for tensor in self._tensors]
        levels, first, weight, of_layer, *tables = self._on_device[device]
        height, width = self.output_size(a_codes)
        top, bottom, left, right = self.layer.geometry.padding
        codes = a_codes.contiguous()
        if top + bottom + left + right:
            codes = F.pad(codes, (0, 0, left, right, top, bottom))
        pixels, channels = len(a_codes) * height * width, self.constants.out
        programs = self.layer.geometry.groups * len(self.steps)
        if self._besides:
            block_m, block_n, options = triton_readout.tiling(pixels, channels)
        else:
            block_m, block_n, options = triton_conversion.tiling(mode, pixels, channels, programs, self.constants)
        grid = triton.cdiv(pixels, block_m), triton.cdiv(channels, block_n), programs
        with torch.cuda.device_of(codes):
            triton_kernel.kernel[grid](
                codes, levels, out, of_layer if conversion is None else conversion, first, weight, pixels, height, width, *codes.shape[1:3],
                tuple(tables), first_image(), self._besides.seed if self._besides else 0, L=self.constants,
                R=self._besides.constants if self._besides else None, MODE=mode, BLOCK_M=block_m, BLOCK_N=block_n, **options)


def _whole_weights(layer):
    """What a row of cells on a grid adds to the sum over all slices without an ADC: int64 `[1, groups, rows, out / groups]`."""
    return sum(part.long() << layer.spec.cell_bits * k for k, part in enumerate(layer.cells.weights(analog=True)))[None]


def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1" and not isinstance(triton_kernel.kernel, triton.JITFunction)


def _row_index(layer, block_k):
    """Which row stands where in the arrays, int64 `[arrays x blocks x block_k]`: arrays are filled up to whole blocks with an empty
    row, that after the last."""
    rows = torch.full((len(layer.arrays), triton.cdiv(layer.tallest, block_k) * block_k), layer.arrays[-1][1])
    for index, (start, stop) in zip(rows, layer.arrays):
        index[:stop - start] = torch.arange(start, stop)
    return rows.flatten()


def _weight(layer, converts, z, k, j):
    """What a code of digit `z`, slice `k` and class `j` is worth in the accumulators, 0 where the read is not converted."""
    spec = layer.spec
    if not converts:  # nothing is left out; U has the digit's place, u of cells on a grid has not
        return 1 << spec.cell_bits * k + (0 if layer.cells is None else spec.dac_bits * z)
    converter = layer.converter(z, k, j)
    return (converter.factor << spec.dac_bits * z + spec.cell_bits * k) * (converter.bits > 0)
