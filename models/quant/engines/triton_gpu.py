"""Triton engine: one kernel for NVIDIA GPUs, an implicit matrix product over NHWC codes with the ADC in registers.

The kernel reads as the equations of `mapping.py`. With the *level* `m_k = 2 C_k - 2 r_k` of a cell (analog reference;
`C_k` for a digital one), known when the weights are, a read is one int8 dot product,

    u = 2 P - 2 r_k n = sum_rows a_z m_k        (u = P = sum_rows a_z C_k)

and needs no count n. A digit is not shifted down: `A & mask_z` is `2^(d z) a_z`, so the dot product gives
`U = 2^(d z) u`. One program makes a tile [pixels, output channels] of the accumulators of one group and one ADC step: for
each slice with that step and each array it loads a tile of codes and a tile of levels once, takes the digits in registers,
converts every read in registers and stores once. What is done with a read is the kernel's MODE:

    sum         acc += U                                   "ideal", and an ADC that changes no value of this layer
    static      acc += 2^(d z + c k) clip(rint(u s), ..)   in float32, where `prepare` proved it equal to `adc.transfer`
    table       acc += 2^(d z + c k) table[k, u]           otherwise
    range       smallest and largest U of each (array, digit, slice) of each group: first pass of "dynamic"
    dynamic     acc += 2^(c k) (q (U_b - U_a) + 2^B U_a)   second pass, see `engines`; U's factor is the read's 2^(d z)
    histogram   counts[z, k, u] += 1

Rounding is `x + MAGIC` in float32: from 2^23 to 2^24 floats are the integers, so the addition rounds to the nearest,
ties to even, and the code stands in the low bits of the sum. The kernel adds these bits as they are, times the weight
of the read, and takes MAGIC's share off at the end; integers wrap, so the difference is exact.

Cells on a grid have a kernel of their own, with the same arguments (`triton_cells`).
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from .. import adc
from ..mapping import MappedLayer
from . import accumulator_dtype, triton_cells
from .triton_tile import MAGIC, MAGIC_BITS, MAX_ROWS, corner_of, divide, dot

log = logging.getLogger(__name__)

@triton.jit
def _read(a, m, m_high, z: tl.constexpr, L: tl.constexpr):
    """`U = 2^(d z) sum_rows a_z m` of a block of rows; levels that do not fit int8 come as `m + 16 m_high`."""
    MASK: tl.constexpr = ((1 << L.dac_bits) - 1 << L.dac_bits * z) & 255
    u = dot(a, m, MASK)
    if L.parts == 2:
        u += dot(a, m_high, MASK) * 16
    return u


@triton.jit
def _load(a_ptr, m_ptr, corner, column, row, depth, in_width, L: tl.constexpr):
    """Codes `[pixels, rows]` and levels, twice `[rows, channels]`, of a block of rows.

    Row r is tap r // channels, channel r % channels, and each `L.vector` rows lie side by side in memory. Rows past the end
    of an array have level 0: their codes are read (from the next array, from row 0 after the last) and do not matter.
    """
    row = row % (L.taps * L.channels)
    tap = row // L.channels
    shift = tap // L.kernel_w * L.dilation_y * in_width + tap % L.kernel_w * L.dilation_x
    offset = shift * (L.groups * L.channels) + row % L.channels
    VECTOR: tl.constexpr = L.vector
    offset = tl.max_contiguous(tl.multiple_of(offset, VECTOR), VECTOR)
    a = tl.load(a_ptr + (corner[:, None] + offset[None, :]))
    levels = m_ptr + (column[None, :] + depth[:, None])
    m = tl.load(levels)
    m_high = m
    if L.parts == 2:
        m_high = tl.load(levels + L.slices * L.groups * L.out * L.arrays * L.blocks * L.block_k)
    return a, m, m_high


# What becomes of a read U. Functions that convert one return (its code, what stands in the code's place where it is 0), both
# times the weight of the read: the difference is what counts.


@triton.jit
def _static(u, adc_ptr, weight, kind, z: tl.constexpr, L: tl.constexpr):
    """Fixed ranges in float32."""
    scale = tl.load(adc_ptr + 3 * kind) * (1.0 / (1 << L.dac_bits * z))
    q = tl.clamp(u.to(tl.float32) * scale + MAGIC, tl.load(adc_ptr + 3 * kind + 1), tl.load(adc_ptr + 3 * kind + 2))
    return q.to(tl.int32, bitcast=True) * weight, MAGIC_BITS * weight


@triton.jit
def _table(u, adc_ptr, weight, kind, z: tl.constexpr, L: tl.constexpr):
    """Fixed ranges, looked up."""
    return tl.load(adc_ptr + (kind * L.bins + (u >> L.dac_bits * z) - L.u_low)) * weight


@triton.jit
def _dynamic(u, adc_ptr, weight, read, L: tl.constexpr):
    """Ranges of the batch, smallest and largest U of each read."""
    u_a = tl.load(adc_ptr + read)
    span = tl.load(adc_ptr + (read + L.groups * L.arrays * L.digits * L.slices)) - u_a
    step = tl.maximum(span, 1).to(tl.float32) * (1.0 / (1 << L.adc_bits))  # span 0: q = 0, value U_a
    q = tl.minimum(divide((u - u_a).to(tl.float32), step) + MAGIC, MAGIC + ((1 << L.adc_bits) - 1))
    surplus = (MAGIC_BITS * span.to(L.acc) - (u_a.to(L.acc) << L.adc_bits)) * weight
    return q.to(tl.int32, bitcast=True) * (span.to(L.acc) * weight), surplus


@triton.jit
def _widen(u, out_ptr, read, L: tl.constexpr):
    """Take U into the smallest and largest of its read."""
    tl.atomic_min(out_ptr + read, tl.min(u), sem="relaxed")
    tl.atomic_max(out_ptr + (read + L.groups * L.arrays * L.digits * L.slices), tl.max(u), sem="relaxed")


@triton.jit
def _count(u, own, out_ptr, k, z: tl.constexpr, L: tl.constexpr):
    """Count the reads by value, in one of several copies of the counts."""
    copy = tl.program_id(0) % L.copies
    counts = out_ptr + ((copy * L.digits + z) * L.slices + k).to(tl.int64) * L.bins
    tl.atomic_add(counts + ((u >> L.dac_bits * z) - L.u_low), tl.full(u.shape, 1, tl.int64), mask=own, sem="relaxed")


@triton.jit
def _kernel(a_ptr, m_ptr, out_ptr, adc_ptr, first_ptr, weight_ptr, pixels, height, width, in_height, in_width,
            L: tl.constexpr, MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """See the module. L, the layer's `Constants`. Shapes, with slices in the order of the accumulators:

    a uint8 `[N, in_height, in_width, groups * channels]`, padded; m int8 `[parts, slices, groups, out, arrays,
    blocks * block_k]`; out, accumulators `[steps, pixels, groups * out]`, ranges int32 `[2, groups, arrays, digits,
    slices]` or counts int64 `[copies, digits, slices, bins]`; adc, `(s, MAGIC + q_min, MAGIC + q_max)` float32
    `[slices, digits, 3]`, table int16 `[slices, digits, bins]` or the ranges; first slice of each step int32 `[steps + 1]`;
    weight of a code `[slices, digits]`, 0 for reads that are not converted, which are not made.
    """
    group = tl.program_id(2) % L.groups
    step = tl.program_id(2) // L.groups
    own_pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own_channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = (own_pixel < pixels)[:, None] & (own_channel < L.out)[None, :]
    pixel = tl.minimum(own_pixel, pixels - 1)  # beyond the last it is read again: ranges do not change,
    channel = tl.minimum(own_channel, L.out - 1)  # and nothing else is kept of what is not `own`
    corner = corner_of(pixel, group, height, width, in_height, in_width, L)
    depth = tl.arange(0, L.block_k)
    DIGITS: tl.constexpr = L.digits

    acc = tl.zeros((BLOCK_M, BLOCK_N), L.acc)
    surplus = tl.full((), 0, L.acc)
    for i in range(tl.load(first_ptr + step) * L.arrays, tl.load(first_ptr + step + 1) * L.arrays):
        k = i // L.arrays
        t = i % L.arrays
        row = t // tl.cdiv(L.span, L.rows) * L.span + t % tl.cdiv(L.span, L.rows) * L.rows + depth
        column = ((k * L.groups + group).to(tl.int64) * L.out + channel) * (L.arrays * L.blocks * L.block_k) + (
            t * (L.blocks * L.block_k))
        a, m, m_high = _load(a_ptr, m_ptr, corner, column, row, depth, in_width, L)
        for z in tl.static_range(DIGITS):
            weight = tl.load(weight_ptr + (k * L.digits + z))
            if not L.planned or weight != 0:  # with a plan, reads that are not converted are not made
                u = _read(a, m, m_high, z, L)
                for b in range(1, L.blocks):  # arrays of more than block_k rows
                    a_b, m_b, m_high_b = _load(a_ptr, m_ptr, corner, column, row + b * L.block_k, depth + b * L.block_k,
                                               in_width, L)
                    u += _read(a_b, m_b, m_high_b, z, L)

                read = ((group * L.arrays + t) * L.digits + z) * L.slices + k
                if MODE == "sum":
                    acc += u
                elif MODE == "static":
                    q, zero = _static(u, adc_ptr, weight, k * L.digits + z, z, L)
                    acc += q
                    surplus += zero
                elif MODE == "table":
                    acc += _table(u, adc_ptr, weight, k * L.digits + z, z, L)
                elif MODE == "dynamic":
                    q, zero = _dynamic(u, adc_ptr, weight, read, L)
                    acc += q
                    surplus += zero
                elif MODE == "range":
                    _widen(u, out_ptr, read, L)
                else:
                    _count(u, own, out_ptr, k, z, L)

    if MODE != "range" and MODE != "histogram":
        out = (step.to(tl.int64) * pixels + own_pixel) * (L.groups * L.out) + group * L.out
        tl.store(out_ptr + (out[:, None] + own_channel[None, :]), acc - surplus, mask=own)


@dataclass(frozen=True)
class Constants:
    """What the kernel is compiled for: all numbers of a layer. (Triton takes one such object as one argument; it would not
    take fields that are tensors.)"""

    acc: tl.dtype  # of the accumulators, int32 or int64
    channels: int  # of one group, and so is out
    groups: int
    out: int
    taps: int
    kernel_w: int
    stride_y: int
    stride_x: int
    dilation_y: int
    dilation_x: int
    span: int  # rows after which arrays begin anew: those of a tap, or all
    rows: int  # of a full array
    arrays: int
    slices: int
    digits: int
    dac_bits: int
    planned: bool  # whether some reads are not converted
    adc_bits: int
    parts: int  # 2 where levels do not fit int8
    vector: int  # rows that lie side by side in memory, wherever an array begins
    block_k: int  # rows of one dot product
    blocks: int  # dot products of an array
    u_low: int  # smallest u
    bins: int  # values of u
    copies: int  # of the counts
    wide: bool = False  # cells on a grid: whether a read needs 64 bits


def unsupported(layer: MappedLayer, device: torch.device) -> str | None:
    """Why this engine cannot run on `device`, or None."""
    if layer.readout is not None:
        return "reads with noise, or converters that are not alike"
    if _interpreted():
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"it needs a GPU from NVIDIA, not {torch.version.hip and 'one from AMD' or device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, not {'.'.join(map(str, capability))}"
    return None


def prepare(layer: MappedLayer) -> Prepared:
    """The weights and the ADC of `layer`, laid out for the kernel."""
    return Prepared(layer)


def accumulate(prepared: Prepared, a_codes: torch.Tensor) -> torch.Tensor:
    """Accumulators, int32 or int64 `[G, N, H', W', out]`, of codes uint8 `[N, H, W, in]`; see `engines`."""
    return prepared.accumulate(a_codes)


def histogram(prepared: Prepared, a_codes: torch.Tensor) -> torch.Tensor:
    """Counts of the read values, int64 `[digits, slices, u]`, of codes uint8 `[N, H, W, in]`; see `engines`."""
    return prepared.histogram(a_codes)


class Prepared:
    """All that depends on the weights and the ADC; made once for a layer.

    Attributes:
        mode: what `accumulate` does with a read, see the module, or `triton_cells`; "dynamic" runs "range" before.
    """

    def __init__(self, layer: MappedLayer):
        spec = layer.spec
        self.layer = layer
        self.mode, conversion = _conversion(layer) if layer.cells is None else triton_cells.conversion(layer)
        weights = None if layer.cells is None else triton_cells.row_weights(layer, whole=self.mode == "sum")
        if self.mode == "sum":
            # One digit, one slice, arrays of any rows: `sum A (2 W - L)`, or `sum A W` behind a digital reference.
            if spec.adc_range != "ideal":
                log.info("this layer's ADC changes no value: it runs as one integer convolution")
            whole = replace(spec, mapping="im2col", rows=MAX_ROWS, cell_bits=spec.w_bits, dac_bits=spec.a_bits,
                            reference="analog" if spec.adc_range == "ideal" else spec.reference)
            layer = replace(layer, spec=replace(whole, adc_plan="uniform", adc_bits=1), reference_twice=(layer.zero_twice,))
            steps = [[0]]
        elif self.mode == "dynamic":
            steps = [range(len(spec.slice_bits))]
        else:
            steps = [slices for _, slices in layer.delta_groups]
        self.reads = _Reads(layer, steps, accumulator_dtype(self.layer), conversion, self.mode, weights)

    @cached_property
    def every_read(self) -> _Reads:
        """The reads as the hardware makes them, whatever `accumulate` may skip."""
        weights = None if self.layer.cells is None else triton_cells.row_weights(self.layer)
        return _Reads(self.layer, [range(len(self.layer.reference_twice))], torch.int32, weights=weights)

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
        """Counts of the read values, int64 `[digits, slices, u]`, of codes uint8 `[N, H, W, in]`."""
        L = self.every_read.constants
        low, high = self.layer.u_span
        counts = torch.zeros(self.every_read.copies, L.digits, L.slices, high - low + 1, dtype=torch.int64, device=a_codes.device)
        self.every_read.run("histogram", a_codes, counts)
        return counts.sum(0)


class _Reads:
    """The reads of a layer, laid out for the kernel.

    Args: steps, the slices of each ADC step; dtype of the accumulators; conversion, what the ADC needs, a tensor `[slices,
        digits, ...]`; mode, in which codes are added; weights, what a row of cells on a grid adds to a read (`row_weights`).
    """

    def __init__(self, layer, steps, dtype, conversion=None, mode="histogram", weights=None):
        spec, geometry = layer.spec, layer.geometry
        order = [k for step in steps for k in step]
        block_k = min(MAX_ROWS, max(32, triton.next_power_of_2(layer.tallest)))
        rows = _row_index(layer, block_k)
        levels = _levels(layer, order, rows) if weights is None else triton_cells.levels(weights, order, rows)
        first = torch.tensor([0, *np.cumsum([len(step) for step in steps])], dtype=torch.int32)
        weight = torch.tensor([[_weight(layer, mode, z, k) for z in range(len(spec.digit_bits))] for k in order], dtype=dtype)
        self.layer, self.steps, self.dtype = layer, steps, dtype
        self._on_device = {}

        out, channels, kernel_h, kernel_w = layer.w_codes.shape
        taps, digits, (low, high) = kernel_h * kernel_w, len(spec.digit_bits), layer.u_span
        bins = high - low + 1
        # Programs that count in one bin wait for each other, so there are several of each.
        self.copies = min(16, 2**22 // (digits * len(order) * bins) + 1)
        self.constants = Constants(
            acc=tl.int64 if dtype == torch.int64 else tl.int32, channels=channels, groups=geometry.groups,
            out=out // geometry.groups, taps=taps, kernel_w=kernel_w, stride_y=geometry.stride[0], stride_x=geometry.stride[1],
            dilation_y=geometry.dilation[0], dilation_x=geometry.dilation[1],
            span=channels if spec.mapping == "tap" else taps * channels, rows=spec.rows, arrays=len(layer.arrays),
            slices=len(order), digits=digits, dac_bits=spec.dac_bits,
            planned=mode in ("static", "table", "exact") and spec.planned, adc_bits=0 if spec.planned else spec.adc_bits, parts=len(levels),
            vector=math.gcd(16, channels, *(start for start, _ in layer.arrays)), block_k=block_k,
            blocks=triton.cdiv(layer.tallest, block_k), u_low=low, bins=bins, copies=self.copies)
        conversion = weight if conversion is None else conversion[order]
        if weights is not None:
            self.constants, conversion = triton_cells.constants(self.constants, layer, mode, dtype, conversion)
        self._tensors = levels, first, weight, conversion

    def output_size(self, a_codes):
        return self.layer.geometry.output_size(*a_codes.shape[1:3], self.layer.kernel)

    def run(self, mode, a_codes, out, conversion=None):
        """Run the kernel in `mode` on codes `[N, H, W, in]`; `conversion`, in place of the layer's."""
        device = a_codes.device
        if device not in self._on_device:
            self._on_device[device] = [tensor.to(device) for tensor in self._tensors]
        levels, first, weight, of_layer = self._on_device[device]
        height, width = self.output_size(a_codes)
        top, bottom, left, right = self.layer.geometry.padding
        codes = a_codes.contiguous()
        if top + bottom + left + right:
            codes = F.pad(codes, (0, 0, left, right, top, bottom))
        pixels, channels = len(a_codes) * height * width, self.constants.out
        programs = self.layer.geometry.groups * len(self.steps)
        kernel, size = _kernel, (mode, pixels, channels, programs, self.constants.blocks)
        if self.layer.cells is None:
            block_m, block_n, options = tiling(*size, self.dtype)
        else:
            kernel, (block_m, block_n, options) = triton_cells.kernel, triton_cells.tiling(*size)
        grid = triton.cdiv(pixels, block_m), triton.cdiv(channels, block_n), programs
        with torch.cuda.device_of(codes):
            kernel[grid](codes, levels, out, of_layer if conversion is None else conversion, first, weight, pixels, height,
                         width, *codes.shape[1:3], L=self.constants, MODE=mode, BLOCK_M=block_m, BLOCK_N=block_n, **options)


def tiling(mode: str, pixels: int, channels: int, programs: int, blocks: int,
           dtype: torch.dtype) -> tuple[int, int, dict]:
    """Tile `(pixels, channels)` of one program and the launch options.

    On an H100 a tile of 128 x 64 on 8 warps takes 128 registers a thread, so 16 warps share a multiprocessor and
    convert while others multiply. The division of "dynamic" needs more registers, a lookup goes through shared memory,
    and so do the codes of several blocks: smaller tiles. Tiles also shrink where they would not fill the GPU's 132
    multiprocessors twice.

    Args: pixels and channels of one group; programs, groups times ADC steps; blocks of an array; dtype of accumulators.
    """
    block_n = min(64, max(16, triton.next_power_of_2(channels)))
    large = mode in ("sum", "static", "range") and blocks == 1
    block_m = min(128 if large else 64, max(16, triton.next_power_of_2(pixels)))
    for smaller in ((min(block_m, 64), block_n), (min(block_m, 64), min(block_n, 32))):
        if triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_n) * programs < 2 * 132:
            block_m, block_n = smaller
    options = dict(num_warps=8 if block_m == 128 else 4, num_stages=3 if blocks == 1 else 2,
                   enable_fp_fusion=False, sanitize_overflow=False)
    if dtype == torch.int32:
        options["maxnreg"] = 128 if block_m == 128 else 168
    return block_m, block_n, options


def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1" and not isinstance(_kernel, triton.JITFunction)


def _row_index(layer, block_k):
    """Which row stands where in the arrays, int64 `[arrays x blocks x block_k]`: arrays are filled up to whole blocks with an empty
    row, that after the last."""
    rows = torch.full((len(layer.arrays), triton.cdiv(layer.tallest, block_k) * block_k), layer.arrays[-1][1])
    for index, (start, stop) in zip(rows, layer.arrays):
        index[:stop - start] = torch.arange(start, stop)
    return rows.flatten()


def _levels(layer, order, rows):
    """Levels `m_k` of the slices in `order`, int8 `[parts, slices, groups, out / groups, arrays x blocks x block_k]`; empty rows
    have level 0. Levels that do not fit int8 make two parts. Args: rows, see `_row_index`."""
    spec = layer.spec
    cells = layer.w_rows.transpose(1, 2).to(torch.int16)
    slices = [(cells >> spec.cell_bits * k) & (2 ** spec.slice_bits[k] - 1) for k in order]
    if spec.reference == "analog":
        slices = [2 * cell - layer.reference_twice[k] for k, cell in zip(order, slices)]
    m = F.pad(torch.stack(slices), (0, 1))  # the last row is the empty one
    m = m.index_select(-1, rows.to(m.device))
    fits = bool((m == m.to(torch.int8)).all())
    return torch.stack([m] if fits else [m & 15, m >> 4]).to(torch.int8)


def _conversion(layer):
    """How the kernel converts the reads of `layer`: `(mode, what it needs of each slice and digit or None)`."""
    spec = layer.spec
    slices, digits = range(len(spec.slice_bits)), range(len(spec.digit_bits))
    if spec.adc_range == "dynamic":
        return "dynamic", None
    if spec.adc_range == "ideal" or (not spec.planned and len(layer.delta_groups) == 1
                                     and all(_is_identity(layer, k) for k in slices)):
        return "sum", None
    constants = [[_float32_constants(layer, z, k) for z in digits] for k in slices]
    if not any(None in of_slice for of_slice in constants):
        return "static", torch.tensor(constants, dtype=torch.float32)
    return "table", torch.stack([torch.stack([_code_table(layer, z, k) for z in digits]) for k in slices])


def _weight(layer, mode, z, k):
    """What a code of digit `z` and slice `k` is worth in the accumulators, 0 where the read is not converted."""
    spec = layer.spec
    if mode not in ("static", "table", "exact"):  # nothing is left out; U has the digit's place, u of cells on a grid has not
        return 1 << spec.cell_bits * k + (0 if layer.cells is None else spec.dac_bits * z)
    return (layer.multiplier(z, k) << spec.dac_bits * z + spec.cell_bits * k) * (layer.converter(z, k).bits > 0)


def _codes(layer, z, k, u):
    return adc.transfer(u, layer.spec.unit, *layer.converter(z, k))


def _code_table(layer, z, k):
    """Codes of digit `z` and slice `k` for each u of the layer, int16 `[u]`; made in pieces, as it may have millions of entries."""
    low, high = layer.u_span
    pieces = [np.arange(u, min(u + 2**20, high + 1)) for u in range(low, high + 1, 2**20)]
    return torch.from_numpy(np.concatenate([_codes(layer, z, k, u).astype(np.int16) for u in pieces]))


def _is_identity(layer, k):
    """Whether slice `k`'s ADC gives q = u for every u that it can meet."""
    low, high = layer.u_range(k)
    if high - low >= 2**layer.converter(0, k).bits:
        return False
    u = np.arange(low, high + 1)
    return np.array_equal(_codes(layer, 0, k, u), u)


def _float32_constants(layer, z, k):
    """`(s, MAGIC + q_min, MAGIC + q_max)` with which the kernel's float32 arithmetic is `adc.transfer`; None without.

    Neither falls as u grows. So they agree on all of slice `k`'s range if they agree on a set of points with both ends
    in which the transfer is the same at two neighbours that are not adjacent integers: here all around its steps.
    """
    spec, (low, high), (delta, q_min, bits) = layer.spec, layer.u_range(k), layer.converter(z, k)
    steps = np.floor((q_min + np.arange(2**bits) + 0.5) * delta / spec.unit)
    around = np.clip(np.add.outer([-1, 0, 1, 2], steps), low, high).astype(np.int64)
    u = np.unique([low, high, *around.flat])
    codes = _codes(layer, z, k, u)
    if np.any((np.diff(codes) != 0) & (np.diff(u) > 1)):
        return None
    magic, nearest = np.float32(MAGIC.value), np.float32(spec.unit / delta)
    bounds = magic + np.float32(q_min), magic + np.float32(q_min + 2**bits - 1)
    for s in (nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf))):
        if np.array_equal(np.clip(u.astype(np.float32) * s + magic, *bounds) - magic, codes):
            return float(s), float(bounds[0]), float(bounds[1])
    return None
