"""CPU engine: positional population counts with carry-save adders, many columns to a vector.

A *column* is one output channel of one slice; a block is 512 columns, one bit each, in one vector of `simd`. A read of
array t, digit z adds, for every input bit that is one, the cells of its row: `P = sum of the active rows` (`count`, a
tree of carry-save adders: about 2.5 instructions a row for 512 columns; inactive rows cost nothing). The sum stands in
bit planes, plane m holding bit m of P; `transpose` turns 8 planes into bytes, 32 columns of 16 bits follow, and the ADC
and shift-add run there in registers, `q = floor(((P << s) + c) M / 2^(16 + f))` (`fixed_point`). Nothing is stored but
the sums of ADC codes of one output pixel.

Where 16 bits do not hold a read or no such (s, c, M, f) gives the ADC's codes for every possible read, the same loop
hands its planes to the formulas of `adc.transfer` one column at a time (`exact`).

The algorithm of the counts: Klarqvist, Mula, Lemire, "Efficient computation of positional population counts using SIMD
instructions", arXiv 1911.02696.
"""

import functools
import logging
from collections import namedtuple

import numba
import numpy as np
import torch
from numba import njit, prange

from .. import adc
from ..bitplanes import decompose
from . import accumulator_dtype
from .reference import integer_convolution
from .simd import (LANES, add_signed, add_unsigned, aligned, bit_of_bytes, load, mulhi, sar, splat, store,
                   trailing_zeros, vmax, vmin)

log = logging.getLogger(__name__)

BLOCK = 512  # columns of a block
STATIC, DYNAMIC, RANGES, HISTOGRAM = range(4)  # what becomes of a read
MAX_PLANES = 32

# A layer as the kernel sees it. Segments are the runs of consecutive channels of one tap that make up an array; a list
# holds the active rows of one channel interval [c0, c1) for one pixel, group and input bit.
Plan = namedtuple("Plan", """weights array_base plane_stride blocks slice_vectors out_channels
    segment_start segment_tap segment_interval segment_row interval_first interval_last interval_slot slots
    tap_y tap_x stride_y stride_x pad_top pad_left
    input_bits digit_start cell_bits dac_bits slices read_scale reference delta_group groups_of_delta
    run_start run_first run_last run_slice merged_start merged_first merged_last merged_slice""")

# The ADC, one entry a slice; (group, array, digit, slice) for `low`, `span` and the forms of a dynamic ADC.
Adc = namedtuple("Adc", "shift offset factor fraction tie clip_low clip_high free_ones low span delta q_min q_max unit")


def unsupported(layer, device):
    return None if device.type == "cpu" else f"it runs on the CPU, the data are on {device}"


def prepare(layer):
    return _Prepared(layer)


def accumulate(prepared, a_codes):
    layer = prepared.layer
    dtype = accumulator_dtype(layer)
    if layer.spec.adc_range == "ideal":
        return integer_convolution(layer, a_codes)[None]
    height, width = layer.geometry.output_size(*a_codes.shape[1:3], layer.kernel)
    plan = prepared.plan
    planes = 1 if layer.spec.adc_range == "dynamic" else plan.groups_of_delta
    out = torch.empty(planes, len(a_codes), height, width, len(layer.w_codes), dtype=dtype)
    if layer.spec.adc_range == "dynamic":
        low, high = prepared.ranges(a_codes, height, width)
        table, exact = prepared.dynamic_adc(low, high)
        constant = (low.astype(np.int64) << prepared.shifts).sum(axis=(1, 2, 3)) << layer.spec.adc_bits
        op = DYNAMIC
    else:
        table, exact, op = prepared.static, prepared.static_exact, STATIC
        constant = np.zeros(layer.geometry.groups, np.int64)
    _run(plan, table, a_codes, height, width, op, exact, constant=constant, out=out.numpy())
    return out


def histogram(prepared, a_codes):
    layer = prepared.layer
    low, high = layer.u_span
    counts = np.zeros((numba.get_num_threads(), len(layer.spec.digit_bits), prepared.plan.slices, high - low + 1),
                      np.int64)
    size = layer.geometry.output_size(*a_codes.shape[1:3], layer.kernel)
    _run(prepared.plan, prepared.static, a_codes, *size, HISTOGRAM, True, counts=counts, u_min=low)
    return torch.from_numpy(counts.sum(axis=0))


# ---- preparation: everything that depends on the weights and the ADC alone ----------------------------------------


class _Prepared:
    def __init__(self, layer):
        spec = layer.spec
        self.layer = layer
        self.plan = _plan(layer)
        self.largest = max(stop - start for start, stop in layer.arrays) * (2 ** max(spec.digit_bits) - 1) * (
            2 ** max(spec.slice_bits) - 1)
        self.narrow = self.largest < 2**15  # a read fits in a signed lane
        self.shifts = (spec.dac_bits * np.arange(len(spec.digit_bits))[:, None]
                       + spec.cell_bits * np.arange(self.plan.slices)).astype(np.int64)
        self.static, self.static_exact = self._static_adc()

    def _static_adc(self):
        layer, slices = self.layer, self.plan.slices
        spec = layer.spec
        table = _empty_adc((1, 1, 1, slices), spec, layer.adc_delta.numpy(), layer.adc_q_min.numpy())
        exact = not self.narrow or accumulator_dtype(layer) != torch.int32
        if spec.adc_range not in ("calibrated", "full") or exact:
            return table, True
        for k in range(slices):
            u = np.arange(layer.u_range(k)[0], layer.u_range(k)[1] + 1)
            codes = adc.transfer(u, spec.unit, table.delta[k], int(table.q_min[k]), spec.adc_bits)
            # Reads beyond the range saturate: clipping them to its ends first changes no code.
            first = int(u[np.flatnonzero(codes == codes[0])[-1]])
            last = int(u[np.flatnonzero(codes == codes[-1])[0]]) if codes[0] != codes[-1] else first
            inside = (u >= first - 1) & (u <= last + 1)
            form = fixed_point(u[inside], codes[inside], spec.unit / table.delta[k], 0)
            if form is None or len(layer.arrays) * np.abs(codes).max() >= 2**15:
                return table, True
            _set_form(table, (0, 0, 0, k), form)
            table.clip_low[k], table.clip_high[k] = first, last
            # With `free_ones` ones or fewer among its inputs a read cannot leave the range.
            r, most = layer.reference_twice[k], 2 ** spec.slice_bits[k] - 1
            below, above = (r, 2 * most - r) if spec.reference == "analog" else (0, most)
            limits = [side // step for side, step in ((1 - first, below), (last + 1, above)) if step]
            table.free_ones[k] = max(0, min(limits))
        return table, False

    def ranges(self, a_codes, height, width):
        """Smallest and largest `u` of each (group, array, digit, slice) in the batch."""
        plan, spec = self.plan, self.layer.spec
        shape = (self.layer.geometry.groups, len(self.layer.arrays), len(spec.digit_bits), plan.slices)
        extremes = np.empty((_items(len(a_codes), height), *shape, 2), np.int64)
        _run(plan, self.static, a_codes, height, width, RANGES, not self.narrow, extremes=extremes)
        return extremes[..., 0].min(axis=0), extremes[..., 1].max(axis=0)

    def dynamic_adc(self, low, high):
        spec, span = self.layer.spec, high - low
        table = _empty_adc(span.shape, spec, self.layer.adc_delta.numpy(), self.layer.adc_q_min.numpy())
        table = table._replace(low=low, span=span)
        largest = int(span.max())
        if (not self.narrow or accumulator_dtype(self.layer) != torch.int32
                or largest * (2**spec.adc_bits - 1) >= 2**16):
            return table, True
        forms = [_dynamic_form(d, spec.adc_bits) for d in range(largest + 1)]
        if any(forms[d] is None for d in np.unique(span)):
            return table, True
        for name, column in zip(("shift", "offset", "factor", "fraction", "tie"), zip(*(f or (0,) * 5 for f in forms))):
            getattr(table, name)[:] = np.array(column)[span]
        return table, False


def _empty_adc(shape, spec, delta, q_min):
    slices = shape[-1]
    forms = [np.zeros(shape, np.int64) for _ in range(5)]
    clips = [np.zeros(slices, np.int64) for _ in range(3)]
    return Adc(*forms, *clips, np.zeros(shape, np.int64), np.zeros(shape, np.int64), delta.copy(), q_min.copy(),
               2**spec.adc_bits - 1, spec.unit)


def _set_form(table, index, form):
    for name, value in zip(("shift", "offset", "factor", "fraction", "tie"), form):
        getattr(table, name)[index] = value


def fixed_point(u, codes, gain, origin):
    """Find 16-bit arithmetic that gives `codes` for every `u`: `y = floor(((u - origin) 2^s + c) M / 2^16)`,
    `q = floor((y + tie) / 2^f)`, tie being bit 0 of `floor(y / 2^f)` where ties go to even, else 0.

    Args: u, all reads that can occur, integers; codes, what the ADC gives for them; gain, codes a unit of `u`.
    Returns: `(s, c, M, f, t)`, or None where none of the candidates gives every code.
    """
    x = u.astype(np.int64) - origin
    reach = int(np.abs(x).max()) + 1 + int(np.ceil(1 / gain))
    shift = 14 - int(reach).bit_length()
    if shift < 0:
        return None
    fraction = int(np.floor(np.log2(32767 / gain))) - 16 + shift
    if fraction < 0:
        shift, fraction = shift - fraction, 0
        if (reach << shift) >= 2**15:
            return None
    fraction = min(fraction, 14)
    factor = gain * 2.0 ** (16 + fraction - shift)
    if not 1 <= factor < 32760:
        return None
    half = 2.0 ** (15 + fraction) / factor  # raises q by one half
    for tie in (0, 1):
        centre = half - (2.0**16 / factor if tie else 0)
        for m in np.unique(np.rint(factor).astype(int) + np.array([0, 1, -1, 2, -2])):
            c = int(round(centre)) + np.array(sorted(range(-8, 9), key=abs))[:, None]
            y = (((x << shift) + c) * m) >> 16
            q = (y + (tie & (y >> fraction))) >> fraction
            good = (q == codes).all(axis=1) & (np.abs((x << shift) + c) < 2**15).all(axis=1)
            if good.any():
                return shift, int(c[good.argmax(), 0]), int(m), fraction, tie
    return None


@functools.lru_cache(maxsize=None)
def _dynamic_form(span, adc_bits):
    """Fixed-point form of the dynamic ADC for reads `u - u_a` in 0..span; the float32 formula is the truth."""
    if span == 0:
        return 0, 0, 0, 0, 0
    x = np.arange(span + 1)
    step = np.float32(span) / np.float32(2**adc_bits)
    codes = np.rint(x.astype(np.float32) / step).astype(np.int64)  # clipped to 2^B - 1 behind the form
    return fixed_point(x, codes, 2**adc_bits / span, 0)


def _plan(layer):
    spec, groups = layer.spec, layer.geometry.groups
    out = len(layer.w_codes) // groups
    channels, slices = layer.group_channels, len(spec.slice_bits)
    slice_vectors = -(-out // (2 * LANES)) * 2  # vectors come in pairs, and a pair belongs to one slice
    blocks = -(-slices * slice_vectors * LANES // BLOCK)
    intervals, segments = {}, []
    for start, stop in layer.arrays:
        parts, row = [], start
        while row < stop:
            tap, first = divmod(row, channels)
            last = min(channels, first + stop - row)
            parts.append((tap, intervals.setdefault((first, last), len(intervals)), row - start))
            row += last - first
        segments.append(parts)
    slot = np.cumsum([0] + [(last - first + 15) // 8 * 8 for first, last in intervals])
    tallest = max(stop - start for start, stop in layer.arrays)
    rows = np.array([stop - start for start, stop in layer.arrays])
    plane_stride = (rows + 1) * blocks * LANES
    array_base = np.cumsum(np.concatenate([[0], np.tile(plane_stride * spec.cell_bits, groups)]))
    kh, kw = layer.kernel
    taps = np.arange(kh * kw)
    # Slices of equal ADC share a run, so that their constants are set once.
    same = dict.fromkeys(zip(layer.adc_delta.tolist(), layer.adc_q_min.tolist(), layer.reference_twice, spec.slice_bits))
    runs, merged = _runs(slices, slice_vectors, blocks), _runs(slices, slice_vectors, blocks, merge=len(same) == 1)
    delta_group = np.zeros(slices, np.int64)
    for g, (_, ks) in enumerate(layer.delta_groups):
        delta_group[ks] = g
    flat = [part for parts in segments for part in parts]
    return Plan(
        _weight_planes(layer, rows, plane_stride, array_base, slice_vectors, blocks), array_base[:-1].reshape(
            groups, -1), plane_stride, blocks, slice_vectors, out,
        np.cumsum([0] + [len(parts) for parts in segments]), *map(np.array, zip(*flat)),
        *map(np.array, zip(*intervals)), slot[:-1], int(slot[-1]) + -(-tallest // 8) * 8 + 8,
        taps // kw * layer.geometry.dilation[0], taps % kw * layer.geometry.dilation[1],
        *layer.geometry.stride, layer.geometry.padding[0], layer.geometry.padding[2],
        spec.a_bits, np.cumsum([0, *spec.digit_bits]), spec.cell_bits, spec.dac_bits, slices,
        2 if spec.reference == "analog" else 1,
        np.array(layer.reference_twice) * (spec.reference == "analog"), delta_group, int(delta_group.max()) + 1,
        *runs, *merged)


def _weight_planes(layer, rows, plane_stride, array_base, slice_vectors, blocks):
    """Bits of the cells, 16-bit words [group, array, bit of the cell, row + 1, block, lane]; row 0 is all zero.

    Column `(slice k, channel o)` is column `c = 64 ceil(O / 64) k + o`; vector `v = c // 32` of block `v // 16` sits in
    bit `v' // 2 + 8 (v' % 2)`, `v' = v % 16`, of the words, lane `c % 32`: the order in which `transpose` and the split
    of bytes give the vectors back. Columns without a channel repeat one that has, so that they move no extreme.
    """
    spec, groups = layer.spec, layer.geometry.groups
    cells = decompose(layer.w_rows.cpu(), spec.w_bits, spec.cell_bits).numpy()  # slices, groups, rows, out
    slices, _, n_rows, out = cells.shape
    padded = np.arange(slice_vectors * LANES) % out
    cells = cells[..., padded].transpose(1, 2, 0, 3).reshape(groups, n_rows, slices * slice_vectors, LANES)
    vectors = np.arange(slices * slice_vectors)
    bit = vectors % 16 // 2 + 8 * (vectors % 2)
    words = aligned(int(array_base[-1]), np.empty(0, np.uint16))
    words[:] = 0
    for s in range(spec.cell_bits):
        packed = np.zeros((groups, n_rows, blocks, LANES), np.uint16)
        for v in vectors:
            packed[:, :, v // 16] |= (((cells[:, :, v] >> s) & 1).astype(np.uint16) << np.uint16(bit[v]))
        for g in range(groups):
            for t, (start, stop) in enumerate(layer.arrays):
                base = array_base[g * len(rows) + t] + s * plane_stride[t]
                words[base + blocks * LANES:base + plane_stride[t]] = packed[g, start:stop].reshape(-1)
    return words


def _runs(slices, slice_vectors, blocks, merge=False):
    """For each block, runs of vector pairs of one slice: start of each block's runs, first pair, last pair, slice."""
    pairs = slice_vectors // 2
    start, first, last, slice_ = [0], [], [], []
    for block in range(blocks):
        pair, end = block * 8, min(block * 8 + 8, slices * pairs)
        while pair < end:
            stop = end if merge else min(end, (pair // pairs + 1) * pairs)
            first.append(pair - block * 8)
            last.append(stop - block * 8)
            slice_.append(pair // pairs)
            pair = stop
        start.append(len(first))
    return tuple(np.array(column, np.int64) for column in (start, first, last, slice_))


# ---- the kernel ----------------------------------------------------------------------------------------------------


def _items(images, height):
    """Work items of one call: bands of output rows where there are fewer images than threads can share."""
    return images * min(height, max(1, 8 * numba.get_num_threads() // max(images, 1)))


def _run(plan, table, a_codes, height, width, op, exact, *, constant=None, out=None, extremes=None, counts=None,
         u_min=0):
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    groups = len(plan.array_base)
    constant = np.zeros(groups, np.int64) if constant is None else constant
    out = np.empty((0, 0, 0, 0, 0), np.int32) if out is None else out
    extremes = np.empty((0, 0, 0, 0, 0, 0), np.int64) if extremes is None else extremes
    counts = np.empty((0, 0, 0, 0), np.int64) if counts is None else counts
    _layer(plan, table, a_codes.numpy(), height, width, _items(len(a_codes), height), op, exact, constant, out, extremes,
           counts, u_min)


@njit(cache=True, parallel=True)
def _layer(plan, table, codes, height, width, items, op, exact, constant, out, extremes, counts, u_min):
    images = len(codes)
    bands = items // max(images, 1)
    for item in prange(items):
        image, band = item // bands, item % bands
        first, last = height * band // bands, height * (band + 1) // bands
        _band(plan, table, codes, image, first, last, width, op, exact, constant, out, extremes, counts, u_min, item)


@njit(cache=True)
def _band(plan, table, codes, image, first, last, width, op, exact, constant, out, extremes, counts, u_min, item):
    """All output pixels of one image in rows first..last - 1."""
    in_height, in_width = codes.shape[1:3]
    groups, arrays = plan.array_base.shape
    digits = len(plan.digit_start) - 1
    vectors = plan.blocks * 16
    channels = codes.shape[3] // groups
    top = max(0, first * plan.stride_y - plan.pad_top)
    bottom = min(in_height, (last - 1) * plan.stride_y - plan.pad_top + plan.tap_y[-1] + 1)
    stride = plan.slots * plan.input_bits * groups  # of a pixel
    pixels = max(0, bottom - top) * in_width
    lists = np.empty(pixels * stride + plan.slots * plan.input_bits, np.uint32)
    ones = np.zeros((pixels * groups * plan.input_bits + 1) * len(plan.interval_first), np.int32)
    _row_lists(plan, codes, image, top, bottom, channels, lists, ones)

    planes = aligned(MAX_PLANES * LANES, plan.weights)
    bytes_ = aligned(16 * LANES, plan.weights)
    sums = aligned(digits * vectors * LANES, plan.weights)
    width32 = plan.slice_vectors * LANES
    acc = aligned(plan.groups_of_delta * width32, np.empty(0, np.int32))
    acc_exact = np.empty(plan.groups_of_delta * width32, np.int64)
    reads = np.empty(LANES, np.int64)
    lows = aligned(arrays * digits * plan.slices * LANES, plan.weights)
    highs = aligned(arrays * digits * plan.slices * LANES, plan.weights)
    thread = numba.get_thread_id() if op == HISTOGRAM else 0
    row_at = np.empty(plan.input_bits, np.int64)
    row_count = np.empty(plan.input_bits, np.int64)

    for g in range(groups):
        if op == RANGES:
            extremes[item, g, :, :, :, 0] = 2**62
            extremes[item, g, :, :, :, 1] = -2**62
            for i in range(arrays * digits * plan.slices):
                store(lows, i * LANES, splat(32767))
                store(highs, i * LANES, splat(-32768))
        for y in range(first, last):
            for x in range(width):
                for i in range(digits * vectors):
                    store(sums, i * LANES, splat(0))
                acc[:] = 0
                acc_exact[:] = 0
                for t in range(arrays):
                    _active_rows(plan, lists, ones, g, groups, t, y, x, top, in_height, in_width, stride, pixels,
                                 row_at, row_count)
                    for z in range(digits):
                        n = 0
                        for i in range(plan.digit_start[z], plan.digit_start[z + 1]):
                            n += row_count[i] << (i - plan.digit_start[z])
                        if n == 0 and op == STATIC:
                            continue  # zero is a code: the read adds nothing
                        largest = n * ((1 << plan.cell_bits) - 1)
                        used = 0
                        while largest >> used:
                            used += 1
                        for block in range(plan.blocks):
                            _read(plan, lists, g, t, z, block, used, row_at, row_count, planes)
                            if exact:
                                for run in range(plan.run_start[block], plan.run_start[block + 1]):
                                    _exact(plan, table, planes, reads, used, n, g, t, z, block, run, op, acc_exact,
                                           extremes, counts, u_min, item, thread)
                            else:
                                _transpose(planes, 0, bytes_, 0)
                                if used > 8:
                                    _transpose(planes, 8 * LANES, bytes_, 8 * LANES)
                                if op == STATIC:
                                    for run in range(plan.merged_start[block], plan.merged_start[block + 1]):
                                        _static(plan, table, bytes_, used, n, z, block, run, sums)
                                elif op == DYNAMIC:
                                    for run in range(plan.run_start[block], plan.run_start[block + 1]):
                                        _dynamic(plan, table, bytes_, used, n, g, t, z, block, run, acc)
                                else:
                                    for run in range(plan.run_start[block], plan.run_start[block + 1]):
                                        _extremes(plan, bytes_, used, n, (t * digits + z) * plan.slices, block, run,
                                                  lows, highs)
                if op == STATIC and not exact:
                    _shift_add(plan, sums, digits, vectors, acc)
                for d in range(len(out)):
                    pixel = out[d, image, y, x]
                    for o in range(plan.out_channels):
                        total = acc_exact[d * width32 + o] if exact else np.int64(acc[d * width32 + o])
                        pixel[g * plan.out_channels + o] = total + constant[g]
        if op == RANGES and not exact:
            for i in range(arrays * digits * plan.slices):
                t, z, k = i // (digits * plan.slices), i // plan.slices % digits, i % plan.slices
                for lane in range(LANES):
                    extremes[item, g, t, z, k, 0] = min(extremes[item, g, t, z, k, 0], np.int16(lows[i * LANES + lane]))
                    extremes[item, g, t, z, k, 1] = max(extremes[item, g, t, z, k, 1], np.int16(highs[i * LANES + lane]))


@njit(cache=True)
def _row_lists(plan, codes, image, top, bottom, channels, lists, ones):
    """For each pixel, group, input bit and channel interval: where the active rows begin in the weights (row + 1 rows
    behind the array's base), padded with row 0 to a multiple of 8; and how many they are."""
    row_size = plan.blocks * LANES
    width = codes.shape[2]
    groups = codes.shape[3] // channels
    intervals = len(plan.interval_first)
    for y in range(top, bottom):
        for x in range(width):
            for g in range(groups):
                pixel = codes[image, y, x]
                for i in range(plan.input_bits):
                    which = (((y - top) * width + x) * groups + g) * plan.input_bits + i
                    for v in range(intervals):
                        first, last = plan.interval_first[v], plan.interval_last[v]
                        at = which * plan.slots + plan.interval_slot[v]
                        n = 0
                        c = first
                        while c + LANES <= last:
                            bits = bit_of_bytes(pixel, g * channels + c, i)
                            while bits:
                                lists[at + n] = (c - first + 1 + trailing_zeros(bits)) * row_size
                                n += 1
                                bits &= bits - np.uint32(1)
                            c += LANES
                        while c < last:
                            if pixel[g * channels + c] >> i & 1:
                                lists[at + n] = (c - first + 1) * row_size
                                n += 1
                            c += 1
                        ones[which * intervals + v] = n
                        for j in range(n, (n + 7) & ~7):
                            lists[at + j] = 0


@njit(cache=True)
def _active_rows(plan, lists, ones, g, groups, t, y, x, top, in_height, in_width, stride, pixels, row_at, row_count):
    """For each input bit: where the list of active rows of array `t` under output pixel (y, x) begins, and its length.

    An array of one segment uses the pixel's list as it is; the lists of several are joined behind all others.
    """
    begin, end = plan.segment_start[t], plan.segment_start[t + 1]
    intervals = len(plan.interval_first)
    for i in range(plan.input_bits):
        row_at[i] = pixels * stride + i * plan.slots
        row_count[i] = 0
    for s in range(begin, end):
        tap = plan.segment_tap[s]
        iy = y * plan.stride_y - plan.pad_top + plan.tap_y[tap]
        ix = x * plan.stride_x - plan.pad_left + plan.tap_x[tap]
        if iy < 0 or iy >= in_height or ix < 0 or ix >= in_width:
            continue
        v = plan.segment_interval[s]
        for i in range(plan.input_bits):
            which = (((iy - top) * in_width + ix) * groups + g) * plan.input_bits + i
            n = ones[which * intervals + v]
            at = which * plan.slots + plan.interval_slot[v]
            if end - begin == 1:
                row_at[i] = at
                row_count[i] = n
            else:
                offset = plan.segment_row[s] * plan.blocks * LANES
                for j in range(n):
                    lists[row_at[i] + row_count[i] + j] = lists[at + j] + offset
                row_count[i] += n
    if end - begin > 1:
        for i in range(plan.input_bits):
            for j in range(row_count[i], (row_count[i] + 7) & ~7):
                lists[row_at[i] + j] = 0


@njit(forceinline=True, cache=True)
def _majority(a, b, c):
    return (a & b) | (c & (a | b))


@njit(cache=True)
def _read(plan, lists, g, t, z, block, used, row_at, row_count, planes):
    """P of one block of columns in bit planes: `P = sum_i sum_s 2^(i + s) (rows active in input bit i) (cell bit s)`.

    `used` planes hold it. Eight rows a turn go through seven carry-save adders (ones, twos, fours, one carry of
    eights), the carry ripples up.
    """
    for m in range(max(used, 8)):
        store(planes, m * LANES, splat(0))
    if used > 8:
        for m in range(used, 16):
            store(planes, m * LANES, splat(0))
    for i in range(plan.digit_start[z], plan.digit_start[z + 1]):
        start, rows = row_at[i], (row_count[i] + 7) & ~7
        if rows == 0:
            continue
        for s in range(plan.cell_bits):
            low = i - plan.digit_start[z] + s
            base = plan.array_base[g, t] + s * plan.plane_stride[t] + block * LANES
            p0 = load(planes, low * LANES)
            p1 = load(planes, (low + 1) * LANES)
            p2 = load(planes, (low + 2) * LANES)
            p3 = load(planes, (low + 3) * LANES)
            p4 = load(planes, (low + 4) * LANES)
            for r in range(start, start + rows, 8):
                x0, x1 = load(plan.weights, base + lists[r]), load(plan.weights, base + lists[r + 1])
                x2, x3 = load(plan.weights, base + lists[r + 2]), load(plan.weights, base + lists[r + 3])
                x4, x5 = load(plan.weights, base + lists[r + 4]), load(plan.weights, base + lists[r + 5])
                x6, x7 = load(plan.weights, base + lists[r + 6]), load(plan.weights, base + lists[r + 7])
                two_a, p0 = _majority(p0, x0, x1), p0 ^ x0 ^ x1
                two_b, p0 = _majority(p0, x2, x3), p0 ^ x2 ^ x3
                two_c, p0 = _majority(p0, x4, x5), p0 ^ x4 ^ x5
                two_d, p0 = _majority(p0, x6, x7), p0 ^ x6 ^ x7
                four_a, p1 = _majority(p1, two_a, two_b), p1 ^ two_a ^ two_b
                four_b, p1 = _majority(p1, two_c, two_d), p1 ^ two_c ^ two_d
                carry, p2 = _majority(p2, four_a, four_b), p2 ^ four_a ^ four_b
                carry, p3 = p3 & carry, p3 ^ carry
                carry, p4 = p4 & carry, p4 ^ carry
                for m in range(low + 5, used):
                    p = load(planes, m * LANES)
                    store(planes, m * LANES, p ^ carry)
                    carry = p & carry
            store(planes, low * LANES, p0)
            store(planes, (low + 1) * LANES, p1)
            store(planes, (low + 2) * LANES, p2)
            store(planes, (low + 3) * LANES, p3)
            store(planes, (low + 4) * LANES, p4)


@njit(forceinline=True, cache=True)
def _swap(a, b, distance, mask):
    """Exchange the bits of `a` above and of `b` below: one step of a bit-matrix transposition."""
    d, low, high = splat(distance), splat(mask), splat(~mask)
    return (a & low) | ((b << d) & high), ((a >> d) & low) | (b & high)


@njit(forceinline=True, cache=True)
def _transpose(planes, source, bytes_, target):
    """8 bit planes to bytes: byte j of vector i becomes the 8 bits that the planes hold at bit i of byte j."""
    p0, p4 = _swap(load(planes, source), load(planes, source + 4 * LANES), 4, 0x0F0F)
    p1, p5 = _swap(load(planes, source + LANES), load(planes, source + 5 * LANES), 4, 0x0F0F)
    p2, p6 = _swap(load(planes, source + 2 * LANES), load(planes, source + 6 * LANES), 4, 0x0F0F)
    p3, p7 = _swap(load(planes, source + 3 * LANES), load(planes, source + 7 * LANES), 4, 0x0F0F)
    p0, p2 = _swap(p0, p2, 2, 0x3333)
    p1, p3 = _swap(p1, p3, 2, 0x3333)
    p4, p6 = _swap(p4, p6, 2, 0x3333)
    p5, p7 = _swap(p5, p7, 2, 0x3333)
    p0, p1 = _swap(p0, p1, 1, 0x5555)
    p2, p3 = _swap(p2, p3, 1, 0x5555)
    p4, p5 = _swap(p4, p5, 1, 0x5555)
    p6, p7 = _swap(p6, p7, 1, 0x5555)
    store(bytes_, target, p0)
    store(bytes_, target + LANES, p1)
    store(bytes_, target + 2 * LANES, p2)
    store(bytes_, target + 3 * LANES, p3)
    store(bytes_, target + 4 * LANES, p4)
    store(bytes_, target + 5 * LANES, p5)
    store(bytes_, target + 6 * LANES, p6)
    store(bytes_, target + 7 * LANES, p7)


@njit(forceinline=True, cache=True)
def _pair(bytes_, pair, used):
    """P of the two vectors of a pair: low bytes and high bytes of one vector, with 16 bits from a second one."""
    b = load(bytes_, pair * LANES)
    even, odd = b & splat(0xFF), b >> splat(8)
    if used > 8:
        b = load(bytes_, (pair + 8) * LANES)
        even, odd = even | (b << splat(8)), odd | (b & splat(0xFF00))
    return even, odd


@njit(forceinline=True, cache=True)
def _code(p, shift, offset, factor, fraction, tie):
    """ADC code of P: `floor((floor((2^s P + c) M / 2^16) + tie) / 2^f)`; see `fixed_point`."""
    y = mulhi((p << shift) + offset, factor)
    if tie:
        y = y + (sar(y, fraction) & splat(1))
    return sar(y, fraction)


@njit(forceinline=True, cache=True)
def _static(plan, table, bytes_, used, n, z, block, run, sums):
    """ADC codes of one run, added to the sums of digit z."""
    k = plan.merged_slice[run]
    a = table.shift[0, 0, 0, k]
    zero = plan.reference[k] * n  # u = read_scale P - 2 r_k n
    shift, offset = splat(a + plan.read_scale - 1), splat(table.offset[0, 0, 0, k] - (zero << a))
    factor, fraction, tie = splat(table.factor[0, 0, 0, k]), splat(table.fraction[0, 0, 0, k]), table.tie[0, 0, 0, k]
    clips = n > table.free_ones[k]
    low = splat((table.clip_low[k] + zero) // plan.read_scale)
    high = splat(-(-(table.clip_high[k] + zero) // plan.read_scale))
    for pair in range(plan.merged_first[run], plan.merged_last[run]):
        even, odd = _pair(bytes_, pair, used)
        if clips:
            even, odd = vmax(vmin(even, high), low), vmax(vmin(odd, high), low)
        at = ((z * plan.blocks + block) * 16 + 2 * pair) * LANES
        store(sums, at, load(sums, at) + _code(even, shift, offset, factor, fraction, tie))
        at += LANES
        store(sums, at, load(sums, at) + _code(odd, shift, offset, factor, fraction, tie))


@njit(forceinline=True, cache=True)
def _dynamic(plan, table, bytes_, used, n, g, t, z, block, run, acc):
    """`q span` of one run, added in place; the constant `2^B u_a` of every read is added at the end."""
    k = plan.run_slice[run]
    a = table.shift[g, t, z, k]
    zero = plan.reference[k] * n + table.low[g, t, z, k]
    shift, offset = splat(a + plan.read_scale - 1), splat(table.offset[g, t, z, k] - (zero << a))
    factor, fraction, tie = splat(table.factor[g, t, z, k]), splat(table.fraction[g, t, z, k]), table.tie[g, t, z, k]
    span, top = splat(table.span[g, t, z, k]), splat(table.q_max)
    place = plan.dac_bits * z + plan.cell_bits * k
    for pair in range(plan.run_first[run], plan.run_last[run]):
        even, odd = _pair(bytes_, pair, used)
        at = (block * 16 + 2 * pair - k * plan.slice_vectors) * LANES
        add_unsigned(acc, at, vmin(_code(even, shift, offset, factor, fraction, tie), top) * span, place)
        add_unsigned(acc, at + LANES, vmin(_code(odd, shift, offset, factor, fraction, tie), top) * span, place)


@njit(forceinline=True, cache=True)
def _extremes(plan, bytes_, used, n, slot, block, run, lows, highs):
    """Smallest and largest `u` of one run, lane by lane."""
    k = plan.run_slice[run]
    low, high = splat(32767), splat(0)
    for pair in range(plan.run_first[run], plan.run_last[run]):
        even, odd = _pair(bytes_, pair, used)
        low, high = vmin(low, vmin(even, odd)), vmax(high, vmax(even, odd))
    scale, zero = splat(plan.read_scale - 1), splat(plan.reference[k] * n)
    at = (slot + k) * LANES
    store(lows, at, vmin(load(lows, at), (low << scale) - zero))
    store(highs, at, vmax(load(highs, at), (high << scale) - zero))


@njit(cache=True)
def _shift_add(plan, sums, digits, vectors, acc):
    """`sum_z sum_k 2^(d z + c k)` of the ADC codes, slices of one step together."""
    for z in range(digits):
        for k in range(plan.slices):
            at = plan.delta_group[k] * plan.slice_vectors * LANES
            for v in range(plan.slice_vectors):
                codes = load(sums, (z * vectors + k * plan.slice_vectors + v) * LANES)
                add_signed(acc, at + v * LANES, codes, plan.dac_bits * z + plan.cell_bits * k)


@njit(cache=True)
def _exact(plan, table, planes, reads, used, n, g, t, z, block, run, op, acc, extremes, counts, u_min, item, thread):
    """One run column by column, whatever P: the formulas of `adc.transfer` and of `engines`, or a count."""
    k = plan.run_slice[run]
    zero = plan.reference[k] * n
    place = plan.dac_bits * z + plan.cell_bits * k
    for v in range(2 * plan.run_first[run], 2 * plan.run_last[run]):
        bit = v // 2 + 8 * (v % 2)
        reads[:] = 0
        for m in range(used):
            for lane in range(LANES):
                reads[lane] += np.int64(planes[m * LANES + lane] >> bit & 1) << m
        o = (block * 16 + v - k * plan.slice_vectors) * LANES
        columns = min(LANES, plan.out_channels - o)
        for lane in range(columns):
            u = plan.read_scale * reads[lane] - zero
            if op == HISTOGRAM:
                counts[thread, z, k, u - u_min] += 1
            elif op == RANGES:
                extremes[item, g, t, z, k, 0] = min(extremes[item, g, t, z, k, 0], u)
                extremes[item, g, t, z, k, 1] = max(extremes[item, g, t, z, k, 1], u)
            elif op == STATIC:
                q = np.rint(u * table.unit / table.delta[k])
                q = min(max(q, table.q_min[k]), table.q_min[k] + table.q_max)
                acc[plan.delta_group[k] * plan.slice_vectors * LANES + o + lane] += np.int64(q) << place
            elif table.span[g, t, z, k] > 0:
                step = np.float32(table.span[g, t, z, k]) / np.float32(table.q_max + 1)
                q = np.rint(np.float32(u - table.low[g, t, z, k]) / step)
                acc[o + lane] += min(np.int64(q), table.q_max) * table.span[g, t, z, k] << place
