"""CPU engine: positional population counts with carry-save adders, many columns to a vector.

A *column* is one output channel of one slice; a block is 512 columns, one bit each, in one vector of `simd`. A read of
array t, digit z adds, for every input bit that is one, the cells of its row: `P = sum of the active rows` (`_count`, a
tree of carry-save adders: about 2.5 instructions a row for 512 columns; inactive rows cost nothing). The sum stands in
bit planes, plane m holding bit m of P; `_transpose` turns 8 planes into bytes. Nothing is stored but the sums of ADC
codes of one output pixel. The ADC is the first of these that the read and the machine allow:

- None, where a code is `u` itself unless it is clipped (`_Reads._relative`): the sum of all `u` is an integer
  convolution, and only what clipping takes off is added. Reads of few ones cannot clip and are not even counted; of the
  others `_any_outside` sees on the bit planes that no column does, nearly always.
- A table of bytes (`_code_table`), where one instruction looks up 64 columns.
- 16-bit arithmetic, 32 columns at a time: `q = floor(((P << s) + c) M / 2^(16 + f))` (`fixed_point`).

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
from numba.core import event

from .. import adc, fused_cpu
from . import accumulator_dtype
from .integer_cpu import IntegerConvolution
from .simd import (LANES, add_ones, add_signed, add_unsigned, aligned, any_bit, bit_length, bit_of_bytes, bits_of_float32,
                   has_byte_tables, int64_at, load, lookup, majority, mulhi, put_int64, put_uint32, sar, set_threads, splat,
                   store, trailing_zeros, uint8_at, uint32_at, vmax, vmin)

log = logging.getLogger(__name__)


class _SayCompiling(event.Listener):
    """Tells about the one long wait. Numba reports a compilation only where its cache on disk holds none."""

    def on_start(self, compilation):
        if compilation.data["dispatcher"] is _layer:
            log.warning("compiling the numba kernels for this machine; the result is kept, it takes about half a minute, once")

    def on_end(self, compilation):
        """The first result says it."""


event.register("numba:compile", _SayCompiling())

BLOCK = 512  # columns of a block
STATIC, DYNAMIC, RANGES, HISTOGRAM = range(4)  # what becomes of a read
MAX_PLANES = 32
TURN = 16  # rows that are counted at a time; lists of rows end with so many entries of row 0, all zero
MOST_LEAVES = 2**11  # largest read whose values are counted 512 columns at a time: a vector for each value

# A layer as the kernel sees it: numbers in `Shape`, tables in `Plan`.
Shape = namedtuple("Shape", """blocks slice_vectors out_channels channels groups slots stride_y stride_x pad_top pad_left
    reach_y input_bits cell_bits dac_bits slices read_scale steps passes packed below above one_reference""")
Plan = namedtuple("Plan", """weights array_base plane_stride segments segment_start intervals digit_start
    reference step_of_slice pair_slice runs run_start run_columns merged merged_start""")
TAP_Y, TAP_X, INTERVAL, ROW = range(4)  # of a segment: consecutive channels of one tap that an array holds
FIRST, LAST, SLOT = range(3)  # of a channel interval [first, last), whose active rows are listed from `slot` on
PAIR, PAIR_END, SLICE = range(3)  # of a run: vector pairs of one block that belong to one slice (`merged`: one reference)

# What the hot functions see of `Plan`, `Adc` and the buffers of one work item: addresses (see `simd`), one number.
Addresses = namedtuple("Addresses", """weights lists ones row_at row_count planes bytes sums acc lows highs
    segments segment_start intervals n_intervals pair_slice runs run_columns merged reference step_of_slice forms limits
    codes leaves""")

# The ADC. `forms` is [group, array, digit, slice, field] (1, 1, 1 where static), `limits` [slice, field], `codes` those
# of `_code_table` for each slice, dynamic ones for each span of u; reads with no more than `table_ones` ones take them.
# Static reads with u in `low..high` add nothing: 0..0, but where `relative` what is added is the code less u.
# Dynamic reads without a one among their inputs add `idle`, [group, array, digit]; before the reads of an array are added
# up, those of the arrays before it go where `flush`, [group, array], is set from 16 bits into 32.
Adc = namedtuple("Adc", "forms limits codes table_ones relative low high delta unit q_max idle flush")
SHIFT, OFFSET, FACTOR, FRACTION, TIE, LOW, SPAN = range(7)
FORM = 7  # fields of a form
EVEN, TOWARDS_ZERO = 1, 2  # how a form treats ties; 0 where there are none
CLIP_LOW, CLIP_HIGH, Q_MIN = range(3)
LIMITS = 3  # fields of a slice's limits


def unsupported(layer, device):
    return None if device.type == "cpu" else f"it runs on the CPU, the data are on {device}"


def prepare(layer):
    return _Prepared(layer)


def accumulate(prepared, a_codes):
    return _simulate(prepared, a_codes)


def scaled(prepared, a_codes, values, scale, offset):
    """`engines.scaled` without a pass over memory for it: each output pixel is scaled when its reads are added up."""
    if prepared.layer.spec.adc_range == "ideal":
        acc = prepared.convolution(a_codes)
        return fused_cpu.scale_in_place(acc, scale, offset) if acc.dtype == torch.int32 else acc * scale + offset
    return _simulate(prepared, a_codes, np.array(values), scale.numpy(), offset.numpy()).view(torch.float32)[0]


NONE = np.empty(0, np.float32)


def _simulate(prepared, a_codes, values=np.empty(0), scale=NONE, offset=NONE):
    """Accumulators; with `values` one plane, the bits of what `engines.scaled` returns."""
    layer = prepared.layer
    if layer.spec.adc_range == "ideal":
        return prepared.convolution(a_codes)[None]
    set_threads()  # before anything is sized by their number
    reads = prepared.reads
    height, width = layer.geometry.output_size(*a_codes.shape[1:3], layer.kernel)
    dynamic = layer.spec.adc_range == "dynamic"
    if not dynamic and reads.static.relative:
        out = reads.convolution(a_codes)[None]
    else:
        planes = 1 if dynamic or len(values) else reads.shape.steps
        dtype = torch.int32 if len(values) else accumulator_dtype(layer)
        out = torch.empty(planes, len(a_codes), height, width, len(layer.w_codes), dtype=dtype)
    target = dict(out=out.numpy(), values=values, scale=scale, offset=offset)
    if dynamic:
        low, high = reads.ranges(a_codes, height, width)
        table, exact = reads.dynamic_adc(low, high)
        constant = (low.astype(np.int64) << reads.shifts).sum(axis=(1, 2, 3)) << layer.spec.adc_bits
        _run(reads, table, a_codes, height, width, DYNAMIC, exact, constant=constant, **target)
    else:
        _run(reads, reads.static, a_codes, height, width, STATIC, reads.static_exact, **target)
    return out


def histogram(prepared, a_codes):
    layer, reads = prepared.layer, prepared.counting
    low, high = layer.u_span
    set_threads()
    exact = reads.largest >= MOST_LEAVES
    counts = np.zeros((numba.get_num_threads(), len(layer.spec.digit_bits), reads.shape.slices, high - low + 1,
                       1 if exact else 8), np.int64)
    size = layer.geometry.output_size(*a_codes.shape[1:3], layer.kernel)
    _run(reads, reads.static, a_codes, *size, HISTOGRAM, exact, counts=counts, u_min=low)
    return torch.from_numpy(counts.sum(axis=(0, 4)))


# ---- preparation: everything that depends on the weights and the ADC alone ----------------------------------------


class _Prepared:
    """Made when first asked for: a layer without an ADC needs no bit planes, one with an ADC no integer convolution."""

    def __init__(self, layer):
        self.layer = layer

    @functools.cached_property
    def reads(self):
        return _Reads(self.layer)

    @functools.cached_property
    def counting(self):
        """Reads whose bit planes hold whole values, not the bits of a cell side by side."""
        return self.reads if self.reads.shape.packed == 1 else _Reads(self.layer, side_by_side=False)

    @functools.cached_property
    def convolution(self):
        return IntegerConvolution(self.layer)


class _Reads:
    """The bit planes of a layer's weights and the fixed-point forms of its ADC."""

    def __init__(self, layer, side_by_side=True):
        spec = layer.spec
        self.layer = layer
        self.shape, self.plan = _plan(layer, side_by_side)
        self.largest = max(stop - start for start, stop in layer.arrays) * (2 ** max(spec.digit_bits) - 1) * (
            2 ** max(spec.slice_bits) - 1)
        low, high = layer.u_span
        self.narrow = max(self.largest, -low, high) < 2**15  # P and u fit in a signed lane
        self.shifts = (spec.dac_bits * np.arange(len(spec.digit_bits))[:, None]
                       + spec.cell_bits * np.arange(self.shape.slices)).astype(np.int64)
        self.static, self.static_exact = self._static_adc()

    def _static_adc(self):
        layer, slices = self.layer, self.shape.slices
        spec = layer.spec
        table = _empty_adc((1, 1, 1, slices), layer)
        exact = not self.narrow or accumulator_dtype(layer) != torch.int32
        if spec.adc_range not in ("calibrated", "full") or exact:
            return table, True
        for k in range(slices):
            form = _static_form(*layer.u_range(k), spec.unit, float(table.delta[k]), int(table.limits[k, Q_MIN]),
                                spec.adc_bits)
            if form is None or len(layer.arrays) * form.largest >= 2**15:
                return table, True
            table.forms[0, 0, 0, k, :LOW] = form.form
            table.limits[k, :Q_MIN] = form.clip
        table = self._relative(table)
        if has_byte_tables():
            codes, ones = zip(*(_code_table(layer, k, table.relative) for k in range(slices)))
            table.codes[:] = codes
            table = table._replace(table_ones=min(ones))
        return table, False

    def _relative(self, table):
        """`table`, as one of differences where that is allowed: see the top of this file; makes `self.convolution`."""
        layer, spec = self.layer, self.layer.spec
        if self.shape.steps > 1:
            return table
        taken = 0
        for k in range(self.shape.slices):
            u, q_min = np.arange(layer.u_range(k)[0], layer.u_range(k)[1] + 1), int(layer.adc_q_min[k])
            codes = adc.transfer(u, spec.unit, float(layer.adc_delta[k]), q_min, spec.adc_bits)
            if not np.array_equal(codes, u.clip(q_min, q_min + table.q_max)):
                return table
            taken = max(taken, int(np.abs(codes - u).max()))
        # `u = 2 P - 2 r_k n` adds up to `sum A (2 W - L)`, `u = P` to `sum A W`.
        self.convolution = IntegerConvolution(layer) if spec.reference == "analog" else IntegerConvolution(layer, 1, 0)
        if len(layer.arrays) * taken >= 2**15 or not (self.convolution.int8 or self.convolution.float32):
            return table
        return table._replace(relative=True, low=int(layer.adc_q_min.max()), high=int(layer.adc_q_min.min()) + table.q_max)

    def ranges(self, a_codes, height, width):
        """Smallest and largest `u` of each (group, array, digit, slice) in the batch."""
        shape = (*self.plan.array_base.shape, len(self.layer.spec.digit_bits), self.shape.slices)
        extremes = np.empty((numba.get_num_threads(), *shape, 2), np.int64)
        extremes[..., 0], extremes[..., 1] = 2**62, -2**62
        _run(self, self.static, a_codes, height, width, RANGES, not self.narrow, extremes=extremes)
        return extremes[..., 0].min(axis=0), extremes[..., 1].max(axis=0)

    def dynamic_adc(self, low, high):
        spec, span = self.layer.spec, high - low
        table = _empty_adc(span.shape, self.layer)
        table.forms[..., LOW], table.forms[..., SPAN] = low, span
        table.idle[:] = (_dynamic_codes(-low, span, spec.adc_bits) * span << self.shifts).sum(axis=3)
        largest = int(span.max())
        if (not self.narrow or accumulator_dtype(self.layer) != torch.int32
                or largest * (2**spec.adc_bits - 1) >= 2**16):
            return table, True
        forms = [_dynamic_form(d, spec.adc_bits) for d in range(largest + 1)]
        if any(forms[d] is None for d in np.unique(span)):
            return table, True
        table.forms[..., :LOW] = np.array([form or (0,) * LOW for form in forms])[span]
        step = 2 if spec.reference == "analog" else 1  # of u where P grows by one
        if has_byte_tables() and largest < 2 * CENTRE * step - 1 and spec.adc_bits <= 8:
            codes = aligned((largest + 1) * 256, table.codes).reshape(-1, 2, 128)
            for d in np.unique(span[span > 0]):
                x = step * np.arange(2 * CENTRE) - np.arange(2)[:, None]
                codes[d] = np.roll(_dynamic_codes(x, d, spec.adc_bits), -CENTRE, axis=1).astype(np.uint8).view(np.int8)
            table = table._replace(codes=codes, table_ones=255 // (2**spec.cell_bits - 1))
        table.flush[:] = _flushes(span * table.q_max)
        return table, False


def _empty_adc(shape, layer):
    limits = np.zeros((shape[-1], LIMITS), np.int64)
    limits[:, Q_MIN] = layer.adc_q_min.numpy()
    codes = aligned(shape[-1] * 256, np.empty(0, np.int8)).reshape(-1, 2, 128)
    return Adc(np.zeros((*shape, FORM), np.int64), limits, codes, -1, False, 0, 0, layer.adc_delta.numpy().copy(),
               layer.spec.unit, 2**layer.spec.adc_bits - 1, np.zeros(shape[:3], np.int64), np.zeros(shape[:2], np.bool_))


def _flushes(largest):
    """Before which arrays the sums of reads, each at most `largest` [group, array, digit, slice], would pass 16 bits."""
    flush, total = np.zeros(largest.shape[:2], np.bool_), np.zeros_like(largest[:, 0])
    for t in range(largest.shape[1]):
        total = total + largest[:, t]
        flush[:, t] = total.max(axis=(1, 2)) >= 2**16
        total[flush[:, t]] = largest[flush[:, t], t]
    return flush


CENTRE = 64  # of a table of codes


def _code_table(layer, k, relative):
    """The static ADC of slice `k` as a table of bytes, for the reads that fit: (table, most ones among their inputs).

    Table, int8 `[2, 128]`: entry `[i, j mod 128]`, `-64 <= j < 64`, is the code of `u = 2 j - i` (analog reference: i is
    the lowest bit of `2 r_k n`, `j = P - floor(r_k n)`) or of `u = j + 64` (digital, `j = P - 64`); less u if `relative`.
    A code, but not its difference from u, may hold for all reads with a j beyond too. -1 where the entries are no bytes.
    """
    spec, reference = layer.spec, layer.reference_twice[k]
    analog = spec.reference == "analog"

    def transfer(u):
        return adc.transfer(u, spec.unit, float(layer.adc_delta[k]), int(layer.adc_q_min[k]), spec.adc_bits)

    j = np.arange(-CENTRE, CENTRE)
    u = np.stack([2 * j - i for i in (0, 1)] if analog else [j + CENTRE] * 2)
    entries, ends = transfer(u), transfer(np.array(layer.u_range(k)))
    beyond = not relative and entries[:, 0].max() <= ends[0] and entries[:, -1].min() >= ends[1]
    entries = entries - u * relative
    reach = 2 * CENTRE if beyond else CENTRE  # of j: what a signed byte holds, or the table
    most, n = 2 ** spec.slice_bits[k] - 1, np.arange(257)
    zero = reference * n // 2 if analog else CENTRE
    good = (most * n < 256) & (zero <= reach) & (most * n - zero < reach) & (np.abs(entries * 2 + 1).max() < 256)
    return np.roll(entries, -CENTRE, axis=1), int(good.argmin()) - 1


# form, see `fixed_point`; clip, beyond which codes are the lowest or highest; largest |code|.
StaticForm = namedtuple("StaticForm", "form clip largest")


@functools.lru_cache(maxsize=1024)  # a network that is being trained is prepared at every step, with the same ranges
def _static_form(low, high, unit, delta, q_min, adc_bits):
    """The fixed-point form of a static ADC for reads low..high, or None."""
    u = np.arange(low, high + 1)
    codes = adc.transfer(u, unit, delta, q_min, adc_bits)
    # Beyond [first, last] all codes are the lowest or the highest: reads that 16 bits do not hold are clipped to it
    # first, one step to spare, since P moves u by two.
    first = int(u[np.flatnonzero(codes == codes[0])[-1]])
    last = int(u[np.flatnonzero(codes == codes[-1])[0]]) if codes[0] != codes[-1] else first
    bounds = q_min, q_min + 2**adc_bits - 1
    for domain in ((-240, 240), (first - 1, last + 1)):
        if domain[0] < first and domain[1] > last:
            inside = u[(u >= domain[0]) & (u <= domain[1])]
            form = fixed_point(inside, codes[inside - low], unit / delta, bounds)
            if form:
                return StaticForm(form, (first, last), int(np.abs(codes).max()))
    return None


def fixed_point(u, codes, gain, bounds):
    """Find 16-bit arithmetic that gives `codes` for every `u`: `y = floor((u 2^s + c) M / 2^16)`,
    `q = floor((y + t) / 2^f)`, clipped to `bounds`.

    Reads half-way between two levels may need the last bit t: `floor(y / 2^f) mod 2` sends them to the even code, `y < 0`
    to the one nearer to zero; elsewhere t = 0.

    Args: u, all reads that can occur, integers; codes, what the ADC gives for them; gain, codes a unit of `u`.
    Returns: `(s, c, M, f, kind of t)`, or None where none of the candidates gives every code.
    """
    x = u.astype(np.int64)
    reach = int(np.abs(x).max()) + 1 + int(np.ceil(1 / gain))
    shift = 15 - int(reach).bit_length()
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
    for tie in (0, EVEN, TOWARDS_ZERO):
        centre = half - (2.0**15 / factor if tie else 0)  # half of the last bit: a tie lies within its step
        for m in np.unique(np.rint(factor).astype(int) + np.array([0, 1, -1, 2, -2, 3, -3, 4, -4])):
            c = int(round(centre)) + np.array(sorted(range(-24, 25), key=abs))[:, None]
            q = np.clip(apply_form(x, (shift, c, m, fraction, tie)), *bounds)
            good = (q == codes).all(axis=1) & (np.abs((x << shift) + c) < 2**15).all(axis=1)
            if good.any():
                return shift, int(c[good.argmax(), 0]), int(m), fraction, tie
    return None


def apply_form(u, form):
    """`q` of a form, not clipped."""
    shift, offset, factor, fraction, tie = form
    y = (((u.astype(np.int64) << shift) + offset) * factor) >> 16
    nudge = {0: 0, EVEN: (y >> fraction) & 1, TOWARDS_ZERO: y < 0}[tie]
    return (y + nudge) >> fraction


@functools.lru_cache(maxsize=None)
def _dynamic_form(span, adc_bits):
    """Fixed-point form of the dynamic ADC for reads `u - u_a` in 0..span; the float32 formula is the truth."""
    if span == 0:
        return 0, 0, 0, 0, 0
    x = np.arange(span + 1)
    return fixed_point(x, _dynamic_codes(x, span, adc_bits), 2**adc_bits / span, (0, 2**adc_bits - 1))


def _dynamic_codes(x, span, adc_bits):
    """Codes of the dynamic ADC for `x = u - u_a`, where `span = u_b - u_a`; any code where that is 0."""
    step = np.maximum(span, 1).astype(np.float32) / np.float32(2**adc_bits)
    return np.clip(np.rint(x.astype(np.float32) / step), 0, 2**adc_bits - 1).astype(np.int64)


def _plan(layer, side_by_side):
    spec, groups = layer.spec, layer.geometry.groups
    out = len(layer.w_codes) // groups
    channels, slices = layer.group_channels, len(spec.slice_bits)
    slice_vectors = -(-out // (2 * LANES)) * 2  # vectors come in pairs, and a pair belongs to one slice
    # The bits of a cell are counted one after the other, or side by side where one block has room for all of them.
    packed = spec.cell_bits if side_by_side and spec.cell_bits * slices * slice_vectors * LANES <= BLOCK else 1
    passes = spec.cell_bits // packed
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
    slot = np.cumsum([0] + [last - first + TURN for first, last in intervals])
    tallest = max(stop - start for start, stop in layer.arrays)
    rows = np.array([stop - start for start, stop in layer.arrays])
    plane_stride = (rows + 1) * blocks * LANES
    array_base = np.cumsum(np.concatenate([[0], np.tile(plane_stride * passes, groups)]))
    kh, kw = layer.kernel
    runs = _runs(range(slices), slice_vectors, blocks)
    merged = _runs(layer.reference_twice, slice_vectors, blocks)  # slices of equal reference share a run
    delta_group = np.zeros(slices, np.int64)
    for g, (_, ks) in enumerate(layer.delta_groups if spec.adc_range != "dynamic" else ()):
        delta_group[ks] = g
    def table(rows):
        return np.array(rows, np.int64)

    segment_table = table([(tap // kw * layer.geometry.dilation[0], tap % kw * layer.geometry.dilation[1], v, row)
                           for parts in segments for tap, v, row in parts])
    shape = Shape(blocks, slice_vectors, out, channels, groups, int(slot[-1]) + tallest + TURN,
                  *layer.geometry.stride, layer.geometry.padding[0], layer.geometry.padding[2],
                  (kh - 1) * layer.geometry.dilation[0] + 1, spec.a_bits, spec.cell_bits, spec.dac_bits, slices,
                  2 if spec.reference == "analog" else 1, int(delta_group.max()) + 1, passes, packed, *_reach(layer),
                  len(set(layer.reference_twice)) == 1)
    plan = Plan(_weight_planes(layer, rows, plane_stride, array_base, slice_vectors, blocks, packed),
                array_base[:-1].reshape(groups, -1), plane_stride, segment_table,
                table(np.cumsum([0] + [len(parts) for parts in segments])),
                table([(*interval, at) for interval, at in zip(intervals, slot)]),
                table(np.cumsum([0, *spec.digit_bits])),
                table(layer.reference_twice) * (spec.reference == "analog"), delta_group,
                np.minimum(np.arange(8 * blocks) // (slice_vectors // 2), slices - 1), *runs,
                _run_columns(*runs, slice_vectors, out), *merged)
    return shape, plan


def _reach(layer):
    """(below, above): over all slices, a read with n ones among its inputs has its u in -below n .. above n."""
    analog = layer.spec.reference == "analog"
    cells = [(r if analog else 0, 2**bits - 1) for r, bits in zip(layer.reference_twice, layer.spec.slice_bits)]
    return max(r for r, _ in cells), max((1 + analog) * most - r for r, most in cells)


def _weight_planes(layer, rows, plane_stride, array_base, slice_vectors, blocks, packed):
    """Bits of the cells, 16-bit words [group, array, pass, row + 1, block, lane]; row 0 is all zero.

    Column `(slice k, channel o)` is column `c = 64 ceil(O / 64) k + o`, lane `c % 32` of vector `c // 32`; with all bits
    of a cell in one block, those of bit s stand `s` times the number of vectors further. Vector v of a block sits in bit
    `v // 2 + 8 (v % 2)` of the words: the order in which `_transpose` and the split of bytes give the vectors back.
    Columns without a channel repeat one that has, so that they move no extreme and never clip alone.
    """
    spec, groups = layer.spec, layer.geometry.groups
    set_threads()
    w_rows = layer.w_rows.cpu().numpy()
    # (pass, block, bit of the word, bit of the code, first channel) of every vector of columns.
    vectors = len(spec.slice_bits) * slice_vectors
    place = np.array([(s // packed, v // 16, v % 16 // 2 + 8 * (v % 2), spec.cell_bits * (w % vectors // slice_vectors) + s,
                       w % slice_vectors * LANES)
                      for s in range(spec.cell_bits) for w in range(vectors if packed > 1 else 16 * blocks)
                      if s < spec.slice_bits[w % vectors // slice_vectors] for v in [w + s % packed * vectors]])
    words = aligned(int(array_base[-1]), np.empty(0, np.uint16))
    words[:] = 0
    first_word = np.concatenate([array_base[g * len(rows) + t] + (np.arange(rows[t]) + 1) * blocks * LANES
                                 for g in range(groups) for t in range(len(rows))]).reshape(groups, -1)
    pass_words = np.tile(np.repeat(plane_stride, rows), groups).reshape(groups, -1)
    _fill_planes(w_rows, place, first_word, pass_words, words)
    return words


@njit(cache=True, parallel=True)
def _fill_planes(w_rows, place, first_word, pass_words, words):
    """Set the bits of `words`; place: see `_weight_planes`."""
    groups, rows, out = w_rows.shape
    for row in prange(groups * rows):
        g, r = row // rows, row % rows
        for i in range(len(place)):
            step, block, bit, code_bit, channel = place[i, 0], place[i, 1], place[i, 2], place[i, 3], place[i, 4]
            start = first_word[g, r] + step * pass_words[g, r] + block * LANES
            o = channel % out
            for lane in range(LANES):
                words[start + lane] |= np.uint16((w_rows[g, r, o] >> code_bit & 1) << bit)
                o += 1
                if o == out:
                    o = 0


def _runs(kinds, slice_vectors, blocks):
    """Runs of every block, and where the runs of each block begin: pairs of adjacent slices that have the same kind."""
    pairs = slice_vectors // 2
    start, runs = [0], []
    for block in range(blocks):
        pair, end = block * 8, min(block * 8 + 8, len(kinds) * pairs)
        while pair < end:
            k, stop = pair // pairs, pair
            while stop < end and kinds[stop // pairs] == kinds[k]:
                stop += 1
            runs.append((pair - block * 8, stop - block * 8, k))
            pair = stop
        start.append(len(runs))
    return np.array(runs, np.int64), np.array(start, np.int64)


def _run_columns(runs, run_start, slice_vectors, out):
    """The columns of each run that belong to a channel: bits of a vector, as the words of `_weight_planes` hold them."""
    columns = np.zeros((len(runs), LANES), np.uint16)
    for block, (first, last) in enumerate(zip(run_start, run_start[1:])):
        for run in range(first, last):
            pair, end, k = runs[run]
            for v in range(2 * pair, 2 * end):
                channel = (block * 16 + v - k * slice_vectors) * LANES + np.arange(LANES)
                columns[run, channel < out] |= np.uint16(1 << (v // 2 + 8 * (v % 2)))
    return columns


# ---- the kernel ----------------------------------------------------------------------------------------------------


def _items(images, height):
    """Work items of one call: bands of output rows where there are fewer images than threads can share."""
    return images * min(height, max(1, 8 * numba.get_num_threads() // max(images, 1)))


def _run(reads, table, a_codes, height, width, op, exact, *, constant=None, out=None, values=np.empty(0),
         scale=NONE, offset=NONE, extremes=None, counts=None, u_min=0):
    constant = np.zeros(reads.shape.groups, np.int64) if constant is None else constant
    out = np.empty((0, 0, 0, 0, 0), np.int32) if out is None else out
    extremes = np.empty((0, 0, 0, 0, 0, 0), np.int64) if extremes is None else extremes
    counts = np.empty((0, 0, 0, 0, 0), np.int64) if counts is None else counts
    _layer(reads.shape, reads.plan, table, a_codes.numpy(), height, width, _items(len(a_codes), height), op, exact,
           constant, out, values, scale, offset, extremes, counts, u_min)


@njit(cache=True, parallel=True)
def _layer(shape, plan, table, codes, height, width, items, op, exact, constant, out, values, scale, offset, extremes,
           counts, u_min):
    bands = items // max(len(codes), 1)
    for item in prange(items):
        image, band = item // bands, item % bands
        first, last = height * band // bands, height * (band + 1) // bands
        _band(shape, plan, table, codes, image, first, last, width, op, exact, constant, out, values, scale, offset,
              extremes, counts, u_min)


@njit(cache=True)
def _band(shape, plan, table, codes, image, first, last, width, op, exact, constant, out, values, scale, offset,
          extremes, counts, u_min):
    """All output pixels of one image in rows first..last - 1."""
    array_base, plane_stride, digit_start = plan.array_base, plan.plane_stride, plan.digit_start
    run_start, merged_start = plan.run_start, plan.merged_start
    in_height, in_width = codes.shape[1:3]
    arrays, digits, slices = len(plane_stride), len(digit_start) - 1, shape.slices
    padded = shape.slice_vectors * LANES
    kept = 1  # input rows whose lists are kept, in turns: a power of two not below those that one output row needs
    while kept < shape.reach_y:
        kept *= 2
    joined = kept * in_width * shape.input_bits * shape.slots  # where lists of several segments are joined
    lists = np.empty(joined + shape.input_bits * shape.slots, np.uint32)
    ones = np.empty(kept * in_width * shape.input_bits * len(plan.intervals), np.int64)

    planes, bytes_ = aligned(MAX_PLANES * LANES, plan.weights), aligned(16 * LANES, plan.weights)
    sums = aligned(digits * shape.blocks * BLOCK, plan.weights)
    acc = aligned(shape.steps * padded, np.empty(0, np.int32))
    acc_exact, total = np.empty(shape.steps * padded, np.int64), np.empty(padded)
    lows = aligned(arrays * digits * slices * LANES, np.empty(0, np.int16))
    highs = aligned(arrays * digits * slices * LANES, np.empty(0, np.int16))
    row_at, row_count = np.empty(shape.input_bits, np.int64), np.empty(shape.input_bits, np.int64)
    thread = numba.get_thread_id() if op == HISTOGRAM or op == RANGES else 0
    window = np.empty((arrays, digits, 2), np.int64)
    leaves = aligned(MOST_LEAVES * LANES if op == HISTOGRAM and not exact else 1, plan.weights)

    at = Addresses(
        plan.weights.ctypes.data, lists.ctypes.data, ones.ctypes.data, row_at.ctypes.data, row_count.ctypes.data,
        planes.ctypes.data, bytes_.ctypes.data, sums.ctypes.data, acc.ctypes.data, lows.ctypes.data, highs.ctypes.data,
        plan.segments.ctypes.data, plan.segment_start.ctypes.data, plan.intervals.ctypes.data, len(plan.intervals),
        plan.pair_slice.ctypes.data, plan.runs.ctypes.data, plan.run_columns.ctypes.data, plan.merged.ctypes.data,
        plan.reference.ctypes.data, plan.step_of_slice.ctypes.data, table.forms.ctypes.data, table.limits.ctypes.data,
        table.codes.ctypes.data, leaves.ctypes.data)

    for g in range(shape.groups):
        # Reads with u in their window need not be looked at: those that add nothing, those that move no extreme.
        if op == RANGES:
            _spread_extremes(extremes[thread, g], lows, highs, window)
        elif op == STATIC:
            window[:, :, 0], window[:, :, 1] = table.low, table.high
        else:
            window[:, :, 0], window[:, :, 1] = 1, 0
        relative = op == STATIC and table.relative
        look = shape.packed == 1 and shape.one_reference and not exact and (op == RANGES or relative)
        added = True
        listed = 0
        for y in range(first, last):
            top = max(listed, y * shape.stride_y - shape.pad_top)
            listed = max(listed, min(in_height, y * shape.stride_y - shape.pad_top + shape.reach_y))
            for row in range(top, listed):
                start = (image * in_height + row) * in_width * shape.groups + g
                _row_lists(shape, at, codes.ctypes.data + start * shape.channels, in_width, row & (kept - 1))
            for x in range(width):
                if added:
                    sums[:] = 0
                    acc[:] = 0
                    acc_exact[:] = 0
                added = not relative  # whether anything is added to the sums of this pixel
                idle = 0
                for t in range(arrays):
                    _active_rows(shape, at, t, y, x, kept, in_height, in_width, joined)
                    if op == DYNAMIC and table.flush[g, t]:
                        _shift_add(shape, at, digits, op)
                        sums[:] = 0
                    for z in range(digits):
                        bit, bit_end = digit_start[z], digit_start[z + 1]
                        n = 0
                        for i in range(bit, bit_end):
                            n += int64_at(at.row_count, i) << (i - bit)
                        if op == DYNAMIC and n == 0:
                            idle += table.idle[g, t, z]
                            continue
                        low, high = window[t, z, 0], window[t, z, 1]
                        if low <= -shape.below * n and shape.above * n <= high:
                            continue
                        used = bit_length(n * ((1 << shape.passes) - 1))  # bit planes that a sum can reach
                        for block in range(shape.blocks):
                            _count(shape, at, array_base[g, t] + block * LANES, plane_stride[t], bit, bit_end, used)
                            if exact:
                                _exact(shape, plan, table, planes, used, n, g, t, z, block, op, acc_exact, extremes,
                                       counts, u_min, thread)
                                continue
                            if op == HISTOGRAM:
                                _count_values(shape, at, counts[thread, z].ctypes.data, counts.shape[3], u_min, used, n,
                                              run_start[block], run_start[block + 1])
                                continue
                            if look and not _any_outside(shape, at, used, n, low, high):
                                continue
                            added = True
                            _transpose(at.planes, 0, at.bytes, 0)
                            if used > 8:
                                _transpose(at.planes, 8 * LANES, at.bytes, 8 * LANES)
                            slot = (t * digits + z) * slices
                            if op == STATIC and n <= table.table_ones:
                                for run in range(merged_start[block], merged_start[block + 1]):
                                    _static_table(shape, at, n, z, block, run)
                                continue
                            for run in range(run_start[block], run_start[block + 1]):
                                if op == STATIC:
                                    _static(shape, at, table.relative, table.q_max, used, n, z, block, run)
                                elif op == DYNAMIC:
                                    _dynamic(shape, at, table.q_max, used, n, g * arrays * digits * slices + slot, z, block,
                                             run, n <= table.table_ones)
                                else:
                                    _extremes(shape, at, used, n, slot, run)
                            if op == RANGES:
                                window[t, z] = _narrowest(lows, highs, slot, slices)
                                low, high = window[t, z, 0], window[t, z, 1]
                if (op == STATIC or op == DYNAMIC) and not exact and added:
                    _shift_add(shape, at, digits, op)
                o = g * shape.out_channels
                if len(values):
                    total[:] = 0
                for d in range(max(len(out), len(values))):
                    target = out[min(d, len(out) - 1), image, y, x, o:o + shape.out_channels]
                    found = acc[d * padded:d * padded + shape.out_channels]
                    if exact:
                        found = acc_exact[d * padded:d * padded + shape.out_channels]
                        _finish(found, constant[g] + idle, target, values, d, total)
                    elif relative:
                        if added:
                            target += found
                        _finish(target, constant[g] + idle, target, values, d, total)
                    else:
                        _finish(found, constant[g] + idle, target, values, d, total)
                if len(values):
                    target = out[0, image, y, x, o:o + shape.out_channels]
                    for c in range(shape.out_channels):
                        target[c] = bits_of_float32(np.float32(total[c]) * scale[o + c] + offset[o + c])
        if op == RANGES and not exact:
            _join_extremes(extremes[thread, g], lows, highs)
    _keep_alive(lists, ones, planes, bytes_, sums, acc, lows, highs, row_at, row_count, leaves)


@njit(cache=True)
def _spread_extremes(extremes, lows, highs, window):
    """What one thread knows of a group, [array, digit, slice, 2], to each lane; the window of each array and digit."""
    arrays, digits, slices, _ = extremes.shape
    for t in range(arrays):
        for z in range(digits):
            window[t, z] = extremes[t, z, :, 0].max(), extremes[t, z, :, 1].min()
            for k in range(slices):
                lane = ((t * digits + z) * slices + k) * LANES
                lows[lane:lane + LANES] = min(extremes[t, z, k, 0], 2**15 - 1)
                highs[lane:lane + LANES] = max(extremes[t, z, k, 1], -2**15)


@njit(cache=True)
def _join_extremes(extremes, lows, highs):
    """The extremes of all lanes back to what the thread knows of the group."""
    arrays, digits, slices, _ = extremes.shape
    for t in range(arrays):
        for z in range(digits):
            for k in range(slices):
                lane = ((t * digits + z) * slices + k) * LANES
                extremes[t, z, k, 0] = lows[lane:lane + LANES].min()
                extremes[t, z, k, 1] = highs[lane:lane + LANES].max()


@njit(cache=True)
def _finish(acc, constant, target, values, d, total):
    """Accumulators of one pixel and ADC step to where they are wanted: `target`, or with `values` their scaled sum."""
    if len(values):
        for c in range(len(acc)):
            total[c] += (acc[c] + constant) * values[d]
    else:
        for c in range(len(acc)):
            target[c] = acc[c] + constant


@njit(cache=True)
def _keep_alive(*arrays):
    """Numba frees an array after its last use, and does not see the uses by address."""


@njit(cache=True)
def _row_lists(shape, at, codes, width, row):
    """Lists of one input row, whose codes of one group begin at address `codes`. For each pixel, input bit and channel
    interval: where the active rows stand in the weights (row + 1 rows behind the array's base), and how many they are."""
    row_size = shape.blocks * LANES
    for x in range(width):
        pixel = codes + x * shape.groups * shape.channels
        for i in range(shape.input_bits):
            which = (row * width + x) * shape.input_bits + i
            for v in range(at.n_intervals):
                c, last = int64_at(at.intervals, 3 * v + FIRST), int64_at(at.intervals, 3 * v + LAST)
                begin = end = which * shape.slots + int64_at(at.intervals, 3 * v + SLOT)
                offset = row_size * (1 - c)
                while c + LANES <= last:
                    bits = bit_of_bytes(pixel, c, i)
                    while bits:
                        put_uint32(at.lists, end, (c + trailing_zeros(bits)) * row_size + offset)
                        end += 1
                        bits &= bits - np.uint32(1)
                    c += LANES
                while c < last:
                    if uint8_at(pixel, c) >> i & 1:
                        put_uint32(at.lists, end, c * row_size + offset)
                        end += 1
                    c += 1
                _end_list(at, end)
                put_int64(at.ones, which * at.n_intervals + v, end - begin)


@njit(forceinline=True, cache=True)
def _end_list(at, end):
    """Row 0, all zero, up to a multiple of `TURN` entries: one vector holds as many."""
    store(at.lists, 2 * end, splat(0))


@njit(forceinline=True, cache=True)
def _active_rows(shape, at, t, y, x, kept, in_height, in_width, joined):
    """For each input bit: where the list of active rows of array `t` under output pixel (y, x) begins, and its length.

    An array of one segment uses the pixel's list as it is; the lists of several are joined behind all others.
    """
    begin, end = int64_at(at.segment_start, t), int64_at(at.segment_start, t + 1)
    for i in range(shape.input_bits):
        put_int64(at.row_at, i, joined + i * shape.slots)
        put_int64(at.row_count, i, 0)
    for s in range(begin, end):
        segment = at.segments + 8 * 4 * s
        iy = y * shape.stride_y - shape.pad_top + int64_at(segment, TAP_Y)
        ix = x * shape.stride_x - shape.pad_left + int64_at(segment, TAP_X)
        if iy < 0 or iy >= in_height or ix < 0 or ix >= in_width:
            continue
        v = int64_at(segment, INTERVAL)
        offset = int64_at(segment, ROW) * shape.blocks * LANES
        for i in range(shape.input_bits):
            which = ((iy & (kept - 1)) * in_width + ix) * shape.input_bits + i
            n = int64_at(at.ones, which * at.n_intervals + v)
            source = which * shape.slots + int64_at(at.intervals, 3 * v + SLOT)
            if end - begin == 1:
                put_int64(at.row_at, i, source)
            else:
                target = int64_at(at.row_at, i) + int64_at(at.row_count, i)
                for j in range(n):
                    put_uint32(at.lists, target + j, uint32_at(at.lists, source + j) + offset)
            put_int64(at.row_count, i, int64_at(at.row_count, i) + n)
    if end - begin > 1:
        for i in range(shape.input_bits):
            _end_list(at, int64_at(at.row_at, i) + int64_at(at.row_count, i))


@njit(forceinline=True, cache=True)
def _full_add(x, y, z):
    """(carry, sum) of three bits, in each of 512 columns."""
    return majority(x, y, z), x ^ y ^ z


@njit(forceinline=True, cache=True)
def _row(at, cells, r):
    """The cells of the row that stands in entry `r` of the lists."""
    return load(at.weights, cells + uint32_at(at.lists, r))


@njit(forceinline=True, cache=True)
def _add_rows(at, cells, r, p0, p1, p2, p3):
    """Add the rows of `TURN` entries of the lists, from `r` on, to four bit planes: (carry of sixteens, p0, p1, p2, p3).

    A tree, in which the planes come last: the next turn's additions need not wait for those of this one.
    """
    two_a, a = _full_add(_row(at, cells, r), _row(at, cells, r + 1), _row(at, cells, r + 2))
    two_b, b = _full_add(_row(at, cells, r + 3), _row(at, cells, r + 4), _row(at, cells, r + 5))
    two_c, c = _full_add(_row(at, cells, r + 6), _row(at, cells, r + 7), _row(at, cells, r + 8))
    two_d, d = _full_add(_row(at, cells, r + 9), _row(at, cells, r + 10), _row(at, cells, r + 11))
    two_e, e = _full_add(_row(at, cells, r + 12), _row(at, cells, r + 13), _row(at, cells, r + 14))
    two_f, a = _full_add(a, b, c)
    two_g, b = _full_add(d, e, _row(at, cells, r + 15))
    two_h, p0 = _full_add(a, b, p0)
    four_a, a = _full_add(two_a, two_b, two_c)
    four_b, b = _full_add(two_d, two_e, two_f)
    four_c, a = _full_add(a, b, two_g)
    four_d, p1 = _full_add(a, two_h, p1)
    eight_a, a = _full_add(four_a, four_b, four_c)
    eight_b, p2 = _full_add(a, four_d, p2)
    carry, p3 = _full_add(eight_a, eight_b, p3)
    return carry, p0, p1, p2, p3


@njit(forceinline=True, cache=True)
def _add_few_rows(at, cells, r, p0, p1, p2):
    """As `_add_rows`, for the last `TURN / 2` entries or fewer: (carry of eights, p0, p1, p2)."""
    two_a, a = _full_add(_row(at, cells, r), _row(at, cells, r + 1), _row(at, cells, r + 2))
    two_b, b = _full_add(_row(at, cells, r + 3), _row(at, cells, r + 4), _row(at, cells, r + 5))
    two_c, a = _full_add(a, b, _row(at, cells, r + 6))
    two_d, p0 = _full_add(a, _row(at, cells, r + 7), p0)
    four_a, a = _full_add(two_a, two_b, two_c)
    four_b, p1 = _full_add(a, two_d, p1)
    carry, p2 = _full_add(four_a, four_b, p2)
    return carry, p0, p1, p2


@njit(forceinline=True, cache=True)
def _count(shape, at, base, plane_stride, bit, bit_end, used):
    """P of one block in bit planes: `P = sum_i sum_s 2^(i + s) (cells' bit s of the rows active in input bit i)`.

    `used` planes hold it. Sixteen rows a turn go through fifteen carry-save adders (ones, twos, fours, eights), the last
    eight or fewer through seven, and the carry ripples up. Bits of a cell that stand side by side are added later, in `_pair`.
    """
    single = bit_end - bit == 1 and shape.passes == 1  # planes 0 to 6 then start in registers
    if not single:
        for m in range(7):
            store(at.planes, m * LANES, splat(0))
    store(at.planes, 7 * LANES, splat(0))
    if used > 8:
        for m in range(8, max(used, 16)):
            store(at.planes, m * LANES, splat(0))
    for i in range(bit, bit_end):
        for s in range(shape.passes):
            low = (i - bit + s) * LANES
            cells = base + s * plane_stride
            p0 = p1 = p2 = p3 = p4 = p5 = p6 = splat(0)
            if not single:
                p0, p1, p2 = load(at.planes, low), load(at.planes, low + LANES), load(at.planes, low + 2 * LANES)
                p3, p4, p5 = (load(at.planes, low + 3 * LANES), load(at.planes, low + 4 * LANES),
                              load(at.planes, low + 5 * LANES))
                p6 = load(at.planes, low + 6 * LANES)
            r = int64_at(at.row_at, i)
            end = r + int64_at(at.row_count, i)
            while r < end:
                if end - r > TURN // 2:
                    carry, p0, p1, p2, p3 = _add_rows(at, cells, r, p0, p1, p2, p3)
                else:
                    carry, p0, p1, p2 = _add_few_rows(at, cells, r, p0, p1, p2)
                    carry, p3 = p3 & carry, p3 ^ carry
                r += TURN
                carry, p4 = p4 & carry, p4 ^ carry
                carry, p5 = p5 & carry, p5 ^ carry
                carry, p6 = p6 & carry, p6 ^ carry
                for m in range(low + 7 * LANES, used * LANES, LANES):
                    p = load(at.planes, m)
                    store(at.planes, m, p ^ carry)
                    carry = p & carry
            store(at.planes, low, p0)
            store(at.planes, low + LANES, p1)
            store(at.planes, low + 2 * LANES, p2)
            store(at.planes, low + 3 * LANES, p3)
            store(at.planes, low + 4 * LANES, p4)
            store(at.planes, low + 5 * LANES, p5)
            store(at.planes, low + 6 * LANES, p6)


@njit(forceinline=True, cache=True)
def _any_outside(shape, at, used, n, low, high):
    """Whether u lies outside low..high in any column of a block, seen on its bit planes."""
    zero, most = int64_at(at.reference, 0) * n, (1 << used) - 1
    low = min(max(-(-(low + zero) // shape.read_scale), 0), most + 1)  # smallest and largest P
    high = min((high + zero) // shape.read_scale, most)
    if low > most or high < 0:
        return True
    below = above = splat(0)
    for m in range(used):  # a bit that differs overrules the lower ones
        p = load(at.planes, m * LANES)
        below = majority(below, p ^ splat(-1), splat(-(low >> m & 1)))
        above = majority(above, p, splat((high >> m & 1) - 1))
    return any_bit(below | above)


@njit(cache=True)
def _count_values(shape, at, counts, bins, u_min, used, n, run, run_end):
    """Count the reads of one block by value: leaf p of a tree over the bit planes marks the columns with P = p."""
    most = n * ((1 << shape.cell_bits) - 1)
    store(at.leaves, 0, splat(-1))
    size = 1
    for m in range(used - 1, -1, -1):
        plane = load(at.planes, m * LANES)
        for i in range(size - 1, -1, -1):
            leaf = load(at.leaves, i * LANES)
            one = leaf & plane
            if 2 * i < most >> m:
                store(at.leaves, (2 * i + 1) * LANES, one)
            store(at.leaves, 2 * i * LANES, leaf ^ one)
        size = (most >> m) + 1
    for r in range(run, run_end):
        k = int64_at(at.runs, 3 * r + SLICE)
        columns = load(at.run_columns, r * LANES)
        zero = -int64_at(at.reference, k) * n - u_min
        for p in range(min(size, (bins - 1 - zero) // shape.read_scale + 1)):  # slices of fewer bits end earlier
            add_ones(counts, k * bins + zero + shape.read_scale * p, load(at.leaves, p * LANES) & columns)


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
def _pair(at, pair, used):
    """P of the two vectors of a pair: low bytes and high bytes of one vector, with 16 bits from a second one."""
    b = load(at.bytes, pair * LANES)
    even, odd = b & splat(0xFF), b >> splat(8)
    if used > 8:
        b = load(at.bytes, (pair + 8) * LANES)
        even, odd = even | (b << splat(8)), odd | (b & splat(0xFF00))
    return even, odd


@njit(forceinline=True, cache=True)
def _cells(shape, at, pair, used):
    """P of the two vectors of a pair, the bits of a cell put together: `P = sum_s 2^s P_s`."""
    even, odd = _pair(at, pair, used)
    for s in range(1, shape.packed):
        more_even, more_odd = _pair(at, pair + s * (shape.slices * shape.slice_vectors // 2), used)
        even, odd = even + (more_even << splat(s)), odd + (more_odd << splat(s))
    return even, odd


@njit(forceinline=True, cache=True)
def _small_cells(shape, at, pair):
    """P of the two vectors of a pair as bytes, for P below 256: even lanes' low, odd lanes' high."""
    b = load(at.bytes, pair * LANES)
    for s in range(1, shape.packed):
        b = b + (load(at.bytes, (pair + s * (shape.slices * shape.slice_vectors // 2)) * LANES) << splat(s))
    return b


@njit(forceinline=True, cache=True)
def _code(scaled, offset, factor, fraction, tie):
    """ADC code of P from `2^s P`: `floor((floor((2^s P + c) M / 2^16) + t) / 2^f)`; see `fixed_point`."""
    y = mulhi(scaled + offset, factor)
    if tie == EVEN:
        y = y + (sar(y, fraction) & splat(1))
    elif tie == TOWARDS_ZERO:
        y = y + (y >> splat(15))
    return sar(y, fraction)


@njit(forceinline=True, cache=True)
def _static_table(shape, at, n, z, block, run):
    """ADC codes of a run of slices with one reference, looked up and added to the sums of digit z."""
    zero = int64_at(at.reference, int64_at(at.merged, 3 * run + SLICE)) * n
    centre = splat(0x0101 * (zero >> 1 if shape.read_scale == 2 else CENTRE))
    codes, slices = at.codes + 128 * (zero & 1), at.pair_slice + 8 * 8 * block
    sums = at.sums + 2 * LANES * (z * shape.blocks + block) * 16
    for pair in range(int64_at(at.merged, 3 * run + PAIR), int64_at(at.merged, 3 * run + PAIR_END)):
        q = lookup(codes + 256 * int64_at(slices, pair), _small_cells(shape, at, pair), centre)
        _add(sums, pair, sar(q << splat(8), splat(8)), sar(q, splat(8)))


@njit(forceinline=True, cache=True)
def _static(shape, at, relative, q_max, used, n, z, block, run):
    """ADC codes of one run, less `u` if `relative`, added to the sums of digit z."""
    k = int64_at(at.runs, 3 * run + SLICE)
    form, limits = at.forms + 8 * FORM * k, at.limits + 8 * LIMITS * k
    a, zero = int64_at(form, SHIFT), int64_at(at.reference, k) * n  # u = read_scale P - 2 r_k n
    shift, offset = splat(a + shape.read_scale - 1), splat(int64_at(form, OFFSET) - (zero << a))
    factor, fraction, tie = splat(int64_at(form, FACTOR)), splat(int64_at(form, FRACTION)), int64_at(form, TIE)
    low = splat((int64_at(limits, CLIP_LOW) + zero) // shape.read_scale)
    high = splat(-(-(int64_at(limits, CLIP_HIGH) + zero) // shape.read_scale))
    bottom, top = splat(int64_at(limits, Q_MIN)), splat(int64_at(limits, Q_MIN) + q_max)
    sums = at.sums + 2 * LANES * (z * shape.blocks + block) * 16
    for pair in range(int64_at(at.runs, 3 * run + PAIR), int64_at(at.runs, 3 * run + PAIR_END)):
        even, odd = _cells(shape, at, pair, used)
        q_even = _code(vmax(vmin(even, high), low) << shift, offset, factor, fraction, tie)
        q_odd = _code(vmax(vmin(odd, high), low) << shift, offset, factor, fraction, tie)
        q_even, q_odd = vmax(vmin(q_even, top), bottom), vmax(vmin(q_odd, top), bottom)
        if relative:
            q_even = q_even + splat(zero) - (even << splat(shape.read_scale - 1))
            q_odd = q_odd + splat(zero) - (odd << splat(shape.read_scale - 1))
        _add(sums, pair, q_even, q_odd)


@njit(forceinline=True, cache=True)
def _add(sums, pair, even, odd):
    lane = 2 * pair * LANES
    store(sums, lane, load(sums, lane) + even)
    store(sums, lane + LANES, load(sums, lane + LANES) + odd)


@njit(forceinline=True, cache=True)
def _dynamic(shape, at, q_max, used, n, slot, z, block, run, table):
    """`q span` of one run, added to the sums of digit z; the constant `2^B u_a` of every read is added at the end."""
    k = int64_at(at.runs, 3 * run + SLICE)
    form = at.forms + 8 * FORM * (slot + k)
    zero = int64_at(at.reference, k) * n + int64_at(form, LOW)  # u - u_a = read_scale P - zero
    span, sums = splat(int64_at(form, SPAN)), at.sums + 2 * LANES * (z * shape.blocks + block) * 16
    a = int64_at(form, SHIFT)
    shift, offset = splat(a + shape.read_scale - 1), splat(int64_at(form, OFFSET) - (zero << a))
    factor, fraction, tie = splat(int64_at(form, FACTOR)), splat(int64_at(form, FRACTION)), int64_at(form, TIE)
    codes = at.codes + 256 * int64_at(form, SPAN) + (128 * (zero & 1) if shape.read_scale == 2 else 0)
    centre = splat(0x0101 * ((zero >> (shape.read_scale - 1)) + CENTRE & 0xFF))
    for pair in range(int64_at(at.runs, 3 * run + PAIR), int64_at(at.runs, 3 * run + PAIR_END)):
        if table:
            q = lookup(codes, _small_cells(shape, at, pair), centre)
            q_even, q_odd = q & splat(0xFF), q >> splat(8)
        else:
            even, odd = _cells(shape, at, pair, used)
            q_even = vmin(_code(even << shift, offset, factor, fraction, tie), splat(q_max))
            q_odd = vmin(_code(odd << shift, offset, factor, fraction, tie), splat(q_max))
        _add(sums, pair, q_even * span, q_odd * span)


@njit(forceinline=True, cache=True)
def _extremes(shape, at, used, n, slot, run):
    """Smallest and largest `u` of one run, lane by lane."""
    k = int64_at(at.runs, 3 * run + SLICE)
    low, high = splat(32767), splat(0)
    for pair in range(int64_at(at.runs, 3 * run + PAIR), int64_at(at.runs, 3 * run + PAIR_END)):
        even, odd = _cells(shape, at, pair, used)
        low, high = vmin(low, vmin(even, odd)), vmax(high, vmax(even, odd))
    scale, zero = splat(shape.read_scale - 1), splat(int64_at(at.reference, k) * n)
    lane = (slot + k) * LANES
    store(at.lows, lane, vmin(load(at.lows, lane), (low << scale) - zero))
    store(at.highs, lane, vmax(load(at.highs, lane), (high << scale) - zero))


@njit(cache=True)
def _narrowest(lows, highs, slot, slices):
    """The range of `u` that every slice of one array and digit has seen."""
    low, high = -2**62, 2**62
    for k in range(slices):
        lane = (slot + k) * LANES
        low, high = max(low, lows[lane:lane + LANES].min()), min(high, highs[lane:lane + LANES].max())
    return low, high


@njit(forceinline=True, cache=True)
def _shift_add(shape, at, digits, op):
    """`sum_z sum_k 2^(d z + c k)` of the sums of 16 bits, slices of one step together."""
    for z in range(digits):
        for k in range(shape.slices):
            lane = int64_at(at.step_of_slice, k) * shape.slice_vectors * LANES
            for v in range(shape.slice_vectors):
                total = load(at.sums, (z * shape.blocks * 16 + k * shape.slice_vectors + v) * LANES)
                if op == STATIC:
                    add_signed(at.acc, lane + v * LANES, total, shape.dac_bits * z + shape.cell_bits * k)
                else:
                    add_unsigned(at.acc, lane + v * LANES, total, shape.dac_bits * z + shape.cell_bits * k)


@njit(cache=True)
def _exact(shape, plan, table, planes, used, n, g, t, z, block, op, acc, extremes, counts, u_min, thread):
    """One block column by column, whatever P: the formulas of `adc.transfer` and of `engines`, or a count."""
    reads = np.empty(LANES, np.int64)
    for run in range(plan.run_start[block], plan.run_start[block + 1]):
        k = plan.runs[run, SLICE]
        place = shape.dac_bits * z + shape.cell_bits * k
        for v in range(2 * plan.runs[run, PAIR], 2 * plan.runs[run, PAIR_END]):
            reads[:] = 0
            for s in range(shape.packed):
                w = v + s * shape.slices * shape.slice_vectors
                bit = w // 2 + 8 * (w % 2)
                for m in range(used):
                    for lane in range(LANES):
                        reads[lane] += np.int64(planes[m * LANES + lane] >> bit & 1) << (m + s)
            o = (block * 16 + v - k * shape.slice_vectors) * LANES
            for lane in range(min(LANES, shape.out_channels - o)):
                u = shape.read_scale * reads[lane] - plan.reference[k] * n
                if op == HISTOGRAM:
                    counts[thread, z, k, u - u_min, 0] += 1
                elif op == RANGES:
                    extremes[thread, g, t, z, k, 0] = min(extremes[thread, g, t, z, k, 0], u)
                    extremes[thread, g, t, z, k, 1] = max(extremes[thread, g, t, z, k, 1], u)
                elif op == STATIC:
                    q = np.rint(u * table.unit / table.delta[k])
                    q = min(max(q, table.limits[k, Q_MIN]), table.limits[k, Q_MIN] + table.q_max)
                    acc[plan.step_of_slice[k] * shape.slice_vectors * LANES + o + lane] += np.int64(q) << place
                elif table.forms[g, t, z, k, SPAN] > 0:
                    span = table.forms[g, t, z, k, SPAN]
                    step = np.float32(span) / np.float32(table.q_max + 1)
                    q = np.rint(np.float32(u - table.forms[g, t, z, k, LOW]) / step)
                    acc[o + lane] += min(np.int64(q), table.q_max) * span << place
