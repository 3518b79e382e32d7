"""The ADC in the forms that the kernel takes: 16-bit arithmetic, tables of bytes, limits. Each gives exactly the codes of
`Converter.encode`, or of the dynamic formula of `engines`, checked on every read that can occur, or is not used.
"""

from __future__ import annotations

import functools
from collections import namedtuple

import numpy as np
import torch

from ....arrays.converter import Converter
from ....arrays.mapping import MappedLayer
from ....kernels.simd import aligned, has_byte_tables
from ... import accumulator_dtype
from ..whole.choice import RELATIVE, TABLES, may
from ..whole.integer import IntegerConvolution
from .fixed_point import fixed_point

# A kind is a digit and a class of n.
# forms         numbers of the 16-bit arithmetic, `[group, array, kind, slice, field]` (1, 1 where ranges are fixed)
# limits        `[kind, slice, field]`
# codes         tables of bytes, int8 `[., 2, 128]`: `code_table` of each kind and slice, or those of each span of u where
#               dynamic
# table_ones    reads with no more ones among their inputs take the tables, `[kind]`
# relative      s = 1, 2: what is added is the code less u / s; the sum of all u / s is an integer convolution. 0: it is the code
# quiet         reads with a u from the first to the second add nothing, `[kind, 2]`
# q_max         dynamic: highest code
# factors       what a code is worth in the accumulators, `[digit, slice]`: `2^(d z + c k)`, times `64 delta` with a plan; by ones times the
#               greatest divisor that all `64 delta` have in common, of which a code then is worth SPAN
# idle          dynamic: what a read without a one among its inputs adds, `[group, array, digit]`
# flush         dynamic and by ones: before which arrays sums move from 16 bits into 32, `[group, array]`
# constant      what every output of a group gets besides
Adc = namedtuple("Adc", "forms limits codes table_ones relative quiet q_max factors idle flush constant")
# Of a form: those of `fixed_point`; dynamic: u_a; what codes are multiplied by: dynamic, u_b - u_a; by ones, parts of `64 delta`.
SHIFT, OFFSET, FACTOR, FRACTION, TIE, LOW, SPAN = range(7)
FORM = 7  # fields of a form
CLIP_LOW, CLIP_HIGH, Q_MIN, Q_MAX = range(4)  # the u beyond which all codes are the lowest or highest; these codes
LIMITS = 4  # fields of the limits of a kind and slice
ALL = -2**40, 2**40  # a range of u that holds every read
CENTRE = 64  # of a table of codes
LAST_CENTRE = 192  # `P - centre + LAST_CENTRE` must not be negative


def _without_forms(layer, shape):
    """An ADC with room for forms of this `shape`."""
    groups, arrays, digits, slices = shape
    kinds = digits * layer.classes
    limits, forms = np.zeros((kinds, slices, LIMITS), np.int64), np.zeros((groups, arrays, kinds, slices, FORM), np.int64)
    factors = np.ones((digits, slices), np.int64)
    if layer.spec.adc_range != "dynamic":
        worth = np.zeros((kinds, slices), np.int64)
        for kind, k in np.ndindex(kinds, slices):
            converter = layer.converter(kind // layer.classes, k, kind % layer.classes)
            limits[kind, k, Q_MIN:] = converter.q_min, converter.q_max
            worth[kind, k] = converter.factor if converter.bits else 0
        factors = worth[layer.classes - 1::layer.classes] if not layer.by_ones else np.full_like(factors, np.gcd.reduce(worth, axis=None))
        forms[..., SPAN] = worth // np.maximum(np.repeat(factors, layer.classes, axis=0), 1)
    place = layer.spec.dac_bits * np.arange(digits)[:, None] + layer.spec.cell_bits * np.arange(slices)
    dynamic, factors = layer.spec.adc_range == "dynamic", factors << place
    codes = aligned(kinds * slices * 256, np.empty(0, np.int8)).reshape(-1, 2, 128)
    return Adc(
        forms=forms, limits=limits, codes=codes,
        table_ones=np.full(kinds, -1, np.int64), relative=0, quiet=np.zeros((kinds, 2), np.int64),
        q_max=2**layer.spec.adc_bits - 1 if dynamic else 0, factors=factors,
        idle=np.zeros(shape[:3], np.int64), flush=np.zeros((groups, arrays), np.bool_),
        constant=np.zeros(layer.geometry.groups, np.int64))


def fits(layer: MappedLayer) -> bool:
    """Whether every P and u fits in a signed lane of 16 bits."""
    low, high = layer.u_span
    return max(layer.largest_sum, -low, high) < 2**15


# ---- ranges that are fixed ------------------------------------------------------------------------------------------

# form, see `fixed_point`; clip, beyond which codes are the lowest or highest; largest |code|; silent, between which codes are 0, or
# an end of `ALL` where no read lies beyond.
StaticForm = namedtuple("StaticForm", "form clip largest silent")


def no_adc(layer: MappedLayer) -> Adc:
    """What passes over the reads take that convert none."""
    return _without_forms(layer, (1, 1, len(layer.spec.digit_bits), len(layer.spec.slice_bits)))


def static_adc(layer: MappedLayer, relative: bool = True) -> tuple[Adc, IntegerConvolution | None] | None:
    """The ADC of a layer whose ranges are fixed ("calibrated", "full"). Args: relative, whether it may be a relative one.

    Returns: the ADC and, where it is `relative`, the integer convolution that is the sum of all u / s; None where 16 bits do not
        hold a read or the sums of codes, or do not give the ADC's codes for every possible read.
    """
    spec, table = layer.spec, no_adc(layer)
    if not fits(layer) or accumulator_dtype(layer) != torch.int32:
        return None
    silent, largest = np.zeros((*table.limits.shape[:2], 2), np.int64), np.zeros(table.limits.shape[:2], np.int64)
    for kind, k in np.ndindex(*largest.shape):
        z, j = divmod(kind, layer.classes)
        form = static_form(*layer.u_range(k, j), spec.unit, layer.converter(z, k, j))
        if form is None:
            return None
        table.forms[0, 0, kind, k, :LOW] = form.form
        table.limits[kind, k, :Q_MIN] = form.clip
        silent[kind, k], largest[kind, k] = form.silent, form.largest * table.forms[0, 0, kind, k, SPAN]
    table.quiet[:, 0], table.quiet[:, 1] = silent[..., 0].max(axis=1), silent[..., 1].min(axis=1)
    if layer.by_ones:
        shape = layer.geometry.groups, len(layer.arrays), len(spec.digit_bits), len(spec.slice_bits)
        flush = _flushes(np.broadcast_to(largest.reshape(shape[2], layer.classes, -1).max(axis=1), shape), 2**15)
        table = table._replace(flush=flush)
    if largest.max() * (1 if layer.by_ones else len(layer.arrays)) >= 2**15:
        return None
    table, convolution = _relative(layer, table) if relative else (table, None)
    if has_byte_tables() and may(TABLES):
        for kind in range(len(largest)):
            z, j = divmod(kind, layer.classes)
            ones = []
            for k in range(len(spec.slice_bits)):
                table.codes[kind * len(spec.slice_bits) + k], most = code_table(layer, z, k, j, table.relative)
                ones += [most] if layer.converter(z, k, j).bits else []
            table.table_ones[kind] = min(ones, default=-1)
    return table, convolution


@functools.lru_cache(maxsize=1024)  # a network that is being trained is prepared at every step, with the same ranges
def static_form(low: int, high: int, unit: float, converter: Converter) -> StaticForm | None:
    """The fixed-point form of a static ADC for reads low..high, or None."""
    u, codes = np.arange(low, high + 1), converter.table(low, high, unit)
    silent = or_beyond(u[codes == 0], low, high)  # one range, which has the read 0
    if converter.bits == 0:
        return StaticForm((0,) * LOW, (0, 0), 0, silent)
    # Beyond [first, last] all codes are the lowest or the highest: reads that 16 bits do not hold are clipped to it
    # first, one step to spare, since P moves u by two.
    first = int(u[np.flatnonzero(codes == codes[0])[-1]])
    last = int(u[np.flatnonzero(codes == codes[-1])[0]]) if codes[0] != codes[-1] else first
    inside = u[(u >= first - 1) & (u <= last + 1)]
    form = fixed_point(inside, codes[inside - low], unit / converter.delta, (converter.q_min, converter.q_max))
    return StaticForm(form, (first, last), int(np.abs(codes).max()), silent) if form else None


def or_beyond(part: np.ndarray, low: int, high: int) -> tuple[int, int]:
    """The ends of a part of the reads low..high; an end of `ALL` where no read lies beyond, so that it limits no other slice."""
    return ALL[0] if part[0] == low else int(part[0]), ALL[1] if part[-1] == high else int(part[-1])


def _relative(layer, table):
    """(`table`, None); where all codes are u, or the half of an even u, unless they are clipped, (`table` as a `relative` one, the
    sum of all u / s)."""
    spec, slices = layer.spec, range(len(layer.spec.slice_bits))
    if len(layer.delta_groups) > 1 or spec.planned or not may(RELATIVE):
        return table, None
    s, taken, exact = min(map(layer.u_spacing, slices)), 0, []
    for k in slices:
        (low, high), converter = layer.u_range(k), layer.converter(0, k)
        u = np.arange(low, high + 1, s)  # from an even one on where they are even
        codes = converter.encode(u, spec.unit)
        if not np.array_equal(codes, (u // s).clip(converter.q_min, converter.q_max)):
            return table, None
        taken = max(taken, int(np.abs(codes - u // s).max()))
        exact.append(or_beyond(u[codes == u // s], low, high))
    # `u = 2 P - 2 r_k n` adds up to `sum A (2 W - L)`, its half to `sum A (W - L / 2)`, `u = P` to `sum A W`.
    analog = spec.reference == "analog"
    convolution = IntegerConvolution(layer, 2 // s, layer.zero_twice // s) if analog else IntegerConvolution(layer, 1, 0)
    if len(layer.arrays) * taken >= 2**15 or convolution.dtype == torch.int64:
        return table, None
    table.quiet[:, 0], table.quiet[:, 1] = np.max(exact, axis=0)[0], np.min(exact, axis=0)[1]
    return table._replace(relative=s), convolution


def code_table(layer: MappedLayer, z: int, k: int, j: int, relative: int) -> tuple[np.ndarray, int]:
    """The static ADC of digit `z`, slice `k` and class `j` as a table of bytes, for the reads that fit: (table, most ones among their
    inputs).

    Table, int8 `[2, 128]`: entry `[i, j + 64]`, `-64 <= j < 64`, is the code of `u = 2 j - i` (analog reference: i is
    the lowest bit of `2 r_k n`, `j = P - floor(r_k n)`) or of `u = j + 64` (digital, `j = P - 64`); less u / s if `relative`.
    A code, but not its difference from u / s, may hold for all reads with a j beyond too. -1 where the entries are no bytes.
    """
    spec = layer.spec
    return _code_table(layer.u_range(k, j), spec.unit, layer.converter(z, k, j), layer.reference_twice[k], spec.reference == "analog",
                       2 ** spec.slice_bits[k] - 1, relative)


@functools.lru_cache(maxsize=1024)  # as `_static_form`; digits often share the ranges of a slice, too
def _code_table(u_range, unit, converter, reference, analog, most, relative):
    u = reads_of_table(analog)
    entries, ends = converter.encode(u, unit), converter.encode(np.array(u_range), unit)
    beyond = not relative and entries[:, 0].max() <= ends[0] and entries[:, -1].min() >= ends[1]
    entries = entries - u // relative if relative else entries
    return entries, most_ones_of_table(beyond, reference, analog, most) if np.abs(entries * 2 + 1).max() < 256 else -1


def reads_of_table(analog: bool) -> np.ndarray:
    """The u of the entries of a `code_table`."""
    j = np.arange(-CENTRE, CENTRE)
    return np.stack([2 * j - i for i in (0, 1)] if analog else [j + CENTRE] * 2)


def most_ones_of_table(beyond: bool, reference: int, analog: bool, most: int) -> int:
    """Most ones among the inputs of reads that such a table holds. Args: beyond, whether its ends hold for all reads beyond them;
    reference, `2 r_k`; most, the largest cell."""
    n = np.arange(257)
    zero = reference * n // 2 if analog else CENTRE + 0 * n
    inside = zero <= LAST_CENTRE if beyond else (zero <= CENTRE) & (most * n - zero < CENTRE)
    return int(((most * n < 256) & inside).argmin()) - 1


# ---- ranges of the batch --------------------------------------------------------------------------------------------


def dynamic_adc(layer: MappedLayer, low: np.ndarray, high: np.ndarray) -> Adc | None:
    """The ADC whose ranges are the smallest and largest u of the batch, low and high int64 `[group, array, digit, slice]`; None
    where 16 bits do not do, as in `static_adc`."""
    spec, span = layer.spec, high - low
    place = spec.dac_bits * np.arange(low.shape[2])[:, None] + spec.cell_bits * np.arange(low.shape[3])  # of a read
    table = _without_forms(layer, span.shape)
    table.forms[..., LOW], table.forms[..., SPAN] = low, span
    table.idle[:] = (_dynamic_codes(-low, span, spec.adc_bits) * span << place).sum(axis=3)
    table.constant[:] = (low << place).sum(axis=(1, 2, 3)) << spec.adc_bits
    widest = int(span.max())
    if not fits(layer) or accumulator_dtype(layer) != torch.int32 or widest * table.q_max >= 2**16:
        return None
    spans, which = np.unique(span, return_inverse=True)
    forms = [_dynamic_form(int(d), spec.adc_bits) for d in spans]
    if None in forms:
        return None
    table.forms[..., :LOW] = np.array(forms)[which.reshape(span.shape)]
    step = 2 if spec.reference == "analog" else 1  # of u where P grows by one
    if has_byte_tables() and widest < 2 * CENTRE * step - 1 and spec.adc_bits <= 8:
        codes = aligned((widest + 1) * 256, table.codes).reshape(-1, 2, 128)
        for d in spans[spans > 0]:
            x = step * np.arange(2 * CENTRE) - np.arange(2)[:, None]
            codes[d] = _dynamic_codes(x, d, spec.adc_bits).astype(np.uint8).view(np.int8)
        table = table._replace(codes=codes)
        table.table_ones[:] = 255 // (2**spec.cell_bits - 1)
    table.flush[:] = _flushes(span * table.q_max, 2**16)
    return table


@functools.cache
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


def _flushes(largest, room):
    """Before which arrays the sums of reads, each at most `largest` [group, array, digit, slice], would pass what there is room for."""
    flush, total = np.zeros(largest.shape[:2], np.bool_), np.zeros_like(largest[:, 0])
    for t in range(largest.shape[1]):
        total = total + largest[:, t]
        flush[:, t] = total.max(axis=(1, 2)) >= room
        total[flush[:, t]] = largest[flush[:, t], t]
    return flush
