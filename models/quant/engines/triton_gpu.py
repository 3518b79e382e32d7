"""Triton engine: one kernel for NVIDIA GPUs, an implicit matrix product over NHWC codes with the ADC in registers.

The kernel reads as the equations of `mapping.py`. With the *level* `m_k = 2 C_k - 2 r_k` of a cell (analog reference;
`C_k` for a digital one), known when the weights are, a read is one int8 dot product,

    u = 2 P - 2 r_k n = sum_rows a_z m_k        (u = P = sum_rows a_z C_k)

and needs no count n. A digit is not shifted down: `A & mask_z` is `2^(d z) a_z`, so the dot product gives
`U = 2^(d z) u`. One program makes a tile [pixels, output channels] of one group and one accumulator plane: for each
slice of the plane and each array it loads a tile of codes and a tile of levels once, takes the digits in registers,
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
"""

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

from .. import adc
from . import accumulator_dtype

log = logging.getLogger(__name__)

MAGIC = tl.constexpr(1.5 * 2**23)
MAGIC_BITS = tl.constexpr(0x4B400000)  # MAGIC as an integer; MAGIC + q is MAGIC_BITS + q
MAX_ROWS = 128  # rows of one dot product


@triton.jit
def _dot(a, m, MASK: tl.constexpr):
    """`sum_rows (a & MASK) m`, int32 `[pixels, channels]`. Codes above 127 do not fit int8: two halves of 4 bits."""
    if MASK < 128:
        total = tl.dot((a & MASK).to(tl.int8), m)
    else:
        total = tl.dot(((a & MASK) >> 4).to(tl.int8), m) * 16
        if MASK % 16 != 0:
            total += tl.dot((a & (MASK % 16)).to(tl.int8), m)
    return total


@triton.jit
def _divide(x, y):
    """`x / y` in float32, correctly rounded, for a scalar y: one reciprocal for all of x.

    Markstein: with 1/y correctly rounded and q within one ulp of x/y, q + (x - q y) / y is x/y correctly rounded. The
    first correction brings q there. (`/` may be approximate on a GPU, and `div_rn` is 20 instructions an element.)
    """
    reciprocal = tl.div_rn(1.0, y)
    q = x * reciprocal
    q = tl.fma(tl.fma(-q, y, x), reciprocal, q)
    return tl.fma(tl.fma(-q, y, x), reciprocal, q)


@triton.jit
def _read(a, m, m_high, z: tl.constexpr, DAC_BITS: tl.constexpr, PARTS: tl.constexpr):
    """`U = 2^(d z) sum_rows a_z m` of a block of rows; levels that do not fit int8 come as `m + 16 m_high`."""
    MASK: tl.constexpr = ((1 << DAC_BITS) - 1 << DAC_BITS * z) & 255
    u = _dot(a, m, MASK)
    if PARTS == 2:
        u += _dot(a, m_high, MASK) * 16
    return u


@triton.jit
def _load(a_ptr, m_ptr, corner, column, row, depth, in_width, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
          TAPS: tl.constexpr, KERNEL_W: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
          PARTS: tl.constexpr, PART_SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """Codes `[pixels, rows]` and levels, twice `[rows, channels]`, of a block of rows.

    Row r is tap r // CHANNELS, channel r % CHANNELS, and each VECTOR rows lie side by side in memory. Rows past the end
    of an array have level 0: their codes are read (from the next array, from row 0 after the last) and do not matter.
    """
    row = row % (TAPS * CHANNELS)
    tap = row // CHANNELS
    shift = tap // KERNEL_W * DILATION_Y * in_width + tap % KERNEL_W * DILATION_X
    offset = tl.max_contiguous(tl.multiple_of(shift * (GROUPS * CHANNELS) + row % CHANNELS, VECTOR), VECTOR)
    a = tl.load(a_ptr + (corner[:, None] + offset[None, :]))
    levels = m_ptr + (column[None, :] + depth[:, None])
    m = tl.load(levels)
    m_high = m
    if PARTS == 2:
        m_high = tl.load(levels + PART_SIZE)
    return a, m, m_high


@triton.jit
def _kernel(a_ptr, m_ptr, out_ptr, adc_ptr, first_ptr, weight_ptr, pixels, height, width, in_height, in_width, u_low,
            MODE: tl.constexpr, ACC: tl.constexpr, ADC_BITS: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr,
            CHANNELS: tl.constexpr, GROUPS: tl.constexpr, OUT: tl.constexpr, TAPS: tl.constexpr,
            KERNEL_W: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, DILATION_Y: tl.constexpr,
            DILATION_X: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, ARRAYS: tl.constexpr,
            SLICES: tl.constexpr, DIGITS: tl.constexpr, DAC_BITS: tl.constexpr, PARTS: tl.constexpr,
            VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
            BLOCKS: tl.constexpr):
    """See the module. Shapes, with slices in the order of the planes:

    a uint8 `[N, in_height, in_width, GROUPS * CHANNELS]`, padded; m int8 `[PARTS, SLICES, GROUPS, OUT, ARRAYS,
    BLOCKS * BLOCK_K]`; out, accumulators `[planes, pixels, GROUPS * OUT]`, ranges int32 `[2, GROUPS, ARRAYS, DIGITS,
    SLICES]` or counts int64 `[COPIES, DIGITS, SLICES, BINS]`; adc, `(s, MAGIC + q_min, MAGIC + q_max)` float32
    `[SLICES, 3]`, table int16 `[SLICES, BINS]` or the ranges; first slice of each plane int32 `[planes + 1]`; weight
    `2^(c k)` `[SLICES]`.
    """
    group = tl.program_id(2) % GROUPS
    plane = tl.program_id(2) // GROUPS
    own_pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own_channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = (own_pixel < pixels)[:, None] & (own_channel < OUT)[None, :]
    pixel = tl.minimum(own_pixel, pixels - 1)  # beyond the last it is read again: ranges do not change,
    channel = tl.minimum(own_channel, OUT - 1)  # and nothing else is kept of what is not `own`

    image = (pixel // (height * width)).to(tl.int64)
    y = pixel // width % height * STRIDE_Y
    x = pixel % width * STRIDE_X
    corner = ((image * in_height + y) * in_width + x) * (GROUPS * CHANNELS) + group * CHANNELS
    depth = tl.arange(0, BLOCK_K)
    PART_SIZE: tl.constexpr = SLICES * GROUPS * OUT * ARRAYS * BLOCKS * BLOCK_K

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    surplus = tl.full((), 0, ACC)
    for i in range(tl.load(first_ptr + plane) * ARRAYS, tl.load(first_ptr + plane + 1) * ARRAYS):
        k = i // ARRAYS
        t = i % ARRAYS
        row = t // tl.cdiv(SPAN, ROWS) * SPAN + t % tl.cdiv(SPAN, ROWS) * ROWS + depth
        column = ((k * GROUPS + group).to(tl.int64) * OUT + channel) * (ARRAYS * BLOCKS * BLOCK_K) + (
            t * (BLOCKS * BLOCK_K))
        weight = tl.load(weight_ptr + k)
        a, m, m_high = _load(a_ptr, m_ptr, corner, column, row, depth, in_width, CHANNELS, GROUPS, TAPS, KERNEL_W,
                             DILATION_Y, DILATION_X, PARTS, PART_SIZE, VECTOR)
        for z in tl.static_range(DIGITS):
            u = _read(a, m, m_high, z, DAC_BITS, PARTS)
            for b in range(1, BLOCKS):  # arrays of more than BLOCK_K rows
                a_b, m_b, m_high_b = _load(a_ptr, m_ptr, corner, column, row + b * BLOCK_K, depth + b * BLOCK_K,
                                           in_width, CHANNELS, GROUPS, TAPS, KERNEL_W, DILATION_Y, DILATION_X, PARTS,
                                           PART_SIZE, VECTOR)
                u += _read(a_b, m_b, m_high_b, z, DAC_BITS, PARTS)

            if MODE == "sum":
                acc += u
            elif MODE == "static":
                scale = tl.load(adc_ptr + 3 * k) * (1.0 / (1 << DAC_BITS * z))
                q = tl.clamp(u.to(tl.float32) * scale + MAGIC, tl.load(adc_ptr + 3 * k + 1),
                             tl.load(adc_ptr + 3 * k + 2))
                acc += q.to(tl.int32, bitcast=True) * (weight << DAC_BITS * z)
                surplus += MAGIC_BITS * (weight << DAC_BITS * z)
            elif MODE == "table":
                q = tl.load(adc_ptr + (k * BINS + (u >> DAC_BITS * z) - u_low))
                acc += q * (weight << DAC_BITS * z)
            elif MODE == "histogram":
                copy = tl.program_id(0) % COPIES
                counts = out_ptr + ((copy * DIGITS + z) * SLICES + k).to(tl.int64) * BINS
                tl.atomic_add(counts + ((u >> DAC_BITS * z) - u_low), tl.full(u.shape, 1, tl.int64), mask=own,
                              sem="relaxed")
            else:
                read = ((group * ARRAYS + t) * DIGITS + z) * SLICES + k
                highest = GROUPS * ARRAYS * DIGITS * SLICES
                if MODE == "range":
                    tl.atomic_min(out_ptr + read, tl.min(u), sem="relaxed")
                    tl.atomic_max(out_ptr + (read + highest), tl.max(u), sem="relaxed")
                else:
                    u_a = tl.load(adc_ptr + read)
                    span = tl.load(adc_ptr + (read + highest)) - u_a
                    step = tl.maximum(span, 1).to(tl.float32) * (1.0 / (1 << ADC_BITS))  # span 0: q = 0, value U_a
                    q = tl.minimum(_divide((u - u_a).to(tl.float32), step) + MAGIC, MAGIC + ((1 << ADC_BITS) - 1))
                    acc += q.to(tl.int32, bitcast=True) * (span.to(ACC) * weight)
                    surplus += (MAGIC_BITS * span.to(ACC) - (u_a.to(ACC) << ADC_BITS)) * weight

    if MODE != "range" and MODE != "histogram":
        out = (plane.to(tl.int64) * pixels + own_pixel) * (GROUPS * OUT) + group * OUT
        tl.store(out_ptr + (out[:, None] + own_channel[None, :]), acc - surplus, mask=own)


def unsupported(layer, device):
    if _interpreted():
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"it needs a GPU from NVIDIA, not {torch.version.hip and 'one from AMD' or device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, not {'.'.join(map(str, capability))}"
    return None


def prepare(layer):
    return Prepared(layer)


def accumulate(prepared, a_codes):
    """Accumulators, int32 or int64 `[G, N, H', W', out]`, of codes uint8 `[N, H, W, in]`; see `engines`."""
    return prepared.accumulate(a_codes)


def histogram(prepared, a_codes):
    """Counts of the read values, int64 `[digits, slices, u]`, of codes uint8 `[N, H, W, in]`; see `engines`."""
    return prepared.histogram(a_codes)


class Prepared:
    """All that depends on the weights and the ADC; made once for a layer."""

    def __init__(self, layer):
        spec = layer.spec
        self.layer = layer
        self.mode, constants = _conversion(layer)
        if self.mode == "sum":
            # One digit, one slice, arrays of any rows: `sum A (2 W - L)`, or `sum A W` behind a digital reference.
            if spec.adc_range != "ideal":
                log.info("this layer's ADC changes no value: it runs as one integer convolution")
            whole = replace(spec, mapping="im2col", rows=MAX_ROWS, cell_bits=spec.w_bits, dac_bits=spec.a_bits,
                            reference="analog" if spec.adc_range == "ideal" else spec.reference)
            layer = replace(layer, spec=whole, reference_twice=(layer.zero_twice,))
            planes = [[0]]
        elif self.mode == "dynamic":
            planes = [range(len(spec.slice_bits))]
        else:
            planes = [slices for _, slices in layer.delta_groups]
        self.reads = _Reads(layer, planes, accumulator_dtype(self.layer), constants)

    @cached_property
    def every_read(self):
        """The reads as the hardware makes them, whatever `accumulate` may skip."""
        return _Reads(self.layer, [range(len(self.layer.reference_twice))], torch.int32)

    def accumulate(self, a_codes):
        reads = self.reads
        out = torch.empty(len(reads.planes), len(a_codes), *reads.output_size(a_codes), len(self.layer.w_codes),
                          dtype=reads.dtype, device=a_codes.device)
        if self.mode == "dynamic":
            ranges = torch.empty(2, *reads.counts, dtype=torch.int32, device=a_codes.device)
            ranges[0], ranges[1] = 2**31 - 1, -(2**31)
            reads.run("range", a_codes, ranges)
            reads.run("dynamic", a_codes, out, ranges)
        else:
            reads.run(self.mode, a_codes, out)
        return out

    def histogram(self, a_codes):
        reads = self.every_read
        _, _, digits, slices = reads.counts
        # Programs that count in one bin wait for each other, so there are several of each.
        copies = min(16, 2**22 // (digits * slices * reads.bins) + 1)
        counts = torch.zeros(copies, digits, slices, reads.bins, dtype=torch.int64, device=a_codes.device)
        reads.run("histogram", a_codes, counts)
        return counts.sum(0)


class _Reads:
    """The reads of a layer, laid out for the kernel.

    Args: planes, slices of each accumulator plane; dtype of the accumulators; constants, what the ADC needs, a tensor
        whose first dimension is the slices.
    """

    def __init__(self, layer, planes, dtype, constants=None):
        spec, geometry = layer.spec, layer.geometry
        out, channels, kernel_h, kernel_w = layer.w_codes.shape
        taps, order = kernel_h * kernel_w, [k for plane in planes for k in plane]
        block_k = min(MAX_ROWS, max(32, triton.next_power_of_2(layer.tallest)))
        self.layer, self.planes, self.dtype = layer, planes, dtype
        self.counts = geometry.groups, len(layer.arrays), len(spec.digit_bits), len(order)
        low, high = layer.u_span
        self.u_low, self.bins = low, high - low + 1
        levels = _levels(layer, order, block_k)
        first = torch.tensor([0, *np.cumsum([len(plane) for plane in planes])], dtype=torch.int32)
        weight = torch.tensor([1 << spec.cell_bits * k for k in order], dtype=dtype)
        self._tensors = levels, first, weight, weight if constants is None else constants[order]
        self._on_device = {}
        self._constants = dict(
            ACC=tl.int64 if dtype == torch.int64 else tl.int32, ADC_BITS=spec.adc_bits, BINS=self.bins,
            CHANNELS=channels, GROUPS=geometry.groups, OUT=out // geometry.groups, TAPS=taps, KERNEL_W=kernel_w,
            STRIDE_Y=geometry.stride[0], STRIDE_X=geometry.stride[1],
            DILATION_Y=geometry.dilation[0], DILATION_X=geometry.dilation[1],
            SPAN=channels if spec.mapping == "tap" else taps * channels, ROWS=spec.rows, ARRAYS=len(layer.arrays),
            SLICES=len(order), DIGITS=len(spec.digit_bits), DAC_BITS=spec.dac_bits, PARTS=len(levels),
            VECTOR=math.gcd(16, channels, *(start for start, _ in layer.arrays)), BLOCK_K=block_k,
            BLOCKS=triton.cdiv(layer.tallest, block_k))

    def output_size(self, a_codes):
        return self.layer.geometry.output_size(*a_codes.shape[1:3], self.layer.kernel)

    def run(self, mode, a_codes, out, constants=None):
        """Run the kernel in `mode` on codes `[N, H, W, in]`; `constants`, in place of the layer's."""
        device = a_codes.device
        if device not in self._on_device:
            self._on_device[device] = [tensor.to(device) for tensor in self._tensors]
        levels, first, weight, adc_constants = self._on_device[device]
        if constants is not None:
            adc_constants = constants
        height, width = self.output_size(a_codes)
        top, bottom, left, right = self.layer.geometry.padding
        codes = a_codes.contiguous()
        if top + bottom + left + right:
            codes = F.pad(codes, (0, 0, left, right, top, bottom))
        pixels, channels = len(a_codes) * height * width, self._constants["OUT"]
        programs = self.layer.geometry.groups * len(self.planes)
        block_m, block_n, options = tiling(mode, pixels, channels, programs, self._constants["BLOCKS"], self.dtype)
        grid = triton.cdiv(pixels, block_m), triton.cdiv(channels, block_n), programs
        with torch.cuda.device_of(codes):
            _kernel[grid](codes, levels, out, adc_constants, first, weight, pixels, height, width, *codes.shape[1:3],
                          self.u_low, MODE=mode, COPIES=len(out) if mode == "histogram" else 1, BLOCK_M=block_m,
                          BLOCK_N=block_n, **self._constants, **options)


def tiling(mode, pixels, channels, programs, blocks, dtype):
    """Tile `(pixels, channels)` of one program and the launch options.

    On an H100 a tile of 128 x 64 on 8 warps takes 128 registers a thread, so 16 warps share a multiprocessor and
    convert while others multiply. The division of "dynamic" needs more registers, a lookup goes through shared memory,
    and so do the codes of several blocks: smaller tiles. Tiles also shrink where they would not fill the GPU's 132
    multiprocessors twice.

    Args: pixels and channels of one group; programs, groups times planes; blocks of an array; dtype of accumulators.
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


def _levels(layer, order, block_k):
    """Levels `m_k` of the slices in `order`, int8 `[parts, slices, groups, out / groups, arrays x blocks x block_k]`.

    Arrays are filled up to whole blocks with rows of level 0. Levels that do not fit int8 make two parts.
    """
    spec, arrays = layer.spec, layer.arrays
    cells = layer.w_rows.transpose(1, 2).to(torch.int16)
    slices = [(cells >> spec.cell_bits * k) & (2 ** spec.slice_bits[k] - 1) for k in order]
    if spec.reference == "analog":
        slices = [2 * cell - layer.reference_twice[k] for k, cell in zip(order, slices)]
    m = F.pad(torch.stack(slices), (0, 1))  # the last row is the empty one
    rows = torch.full((len(arrays), triton.cdiv(layer.tallest, block_k) * block_k), m.shape[-1] - 1)
    for index, (start, stop) in zip(rows, arrays):
        index[:stop - start] = torch.arange(start, stop)
    m = m.index_select(-1, rows.flatten().to(m.device))
    fits = bool((m == m.to(torch.int8)).all())
    return torch.stack([m] if fits else [m & 15, m >> 4]).to(torch.int8)


def _conversion(layer):
    """How the kernel converts the reads of `layer`: `(mode, constants of each slice or None)`."""
    spec = layer.spec
    slices = range(len(spec.slice_bits))
    if spec.adc_range == "dynamic":
        return "dynamic", None
    if spec.adc_range == "ideal" or len(layer.delta_groups) == 1 and all(_is_identity(layer, k) for k in slices):
        return "sum", None
    constants = [_float32_constants(layer, k) for k in slices]
    if None not in constants:
        return "static", torch.tensor(constants, dtype=torch.float32)
    return "table", torch.stack([_table(layer, k) for k in slices])


def _codes(layer, k, u):
    return adc.transfer(u, layer.spec.unit, float(layer.adc_delta[k]), int(layer.adc_q_min[k]), layer.spec.adc_bits)


def _table(layer, k):
    """Codes of slice `k` for each u of the layer, int16 `[u]`; made in pieces, as it may have millions of entries."""
    low, high = layer.u_span
    pieces = [np.arange(u, min(u + 2**20, high + 1)) for u in range(low, high + 1, 2**20)]
    return torch.from_numpy(np.concatenate([_codes(layer, k, u).astype(np.int16) for u in pieces]))


def _is_identity(layer, k):
    """Whether slice `k`'s ADC gives q = u for every u that it can meet."""
    low, high = layer.u_range(k)
    if high - low >= 2**layer.spec.adc_bits:
        return False
    u = np.arange(low, high + 1)
    return np.array_equal(_codes(layer, k, u), u)


def _float32_constants(layer, k):
    """`(s, MAGIC + q_min, MAGIC + q_max)` with which the kernel's float32 arithmetic is `adc.transfer`; None without.

    Neither falls as u grows. So they agree on all of slice `k`'s range if they agree on a set of points with both ends
    in which the transfer is the same at two neighbours that are not adjacent integers: here all around its steps.
    """
    spec, (low, high) = layer.spec, layer.u_range(k)
    delta, q_min = float(layer.adc_delta[k]), int(layer.adc_q_min[k])
    steps = np.floor((q_min + np.arange(2**spec.adc_bits) + 0.5) * delta / spec.unit)
    around = np.clip(np.add.outer([-1, 0, 1, 2], steps), low, high).astype(np.int64)
    u = np.unique([low, high, *around.flat])
    codes = _codes(layer, k, u)
    if np.any((np.diff(codes) != 0) & (np.diff(u) > 1)):
        return None
    magic, nearest = np.float32(MAGIC.value), np.float32(spec.unit / delta)
    bounds = magic + np.float32(q_min), magic + np.float32(q_min + 2**spec.adc_bits - 1)
    for s in (nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf))):
        if np.array_equal(np.clip(u.astype(np.float32) * s + magic, *bounds) - magic, codes):
            return float(s), float(bounds[0]), float(bounds[1])
    return None
