"""Reads that 16 bits hold, from the sums of their cells to the sums of their codes: nothing is stored on the way, and only noise and curves
are of 32 bits.

Where the ADC's step is D units of u, a whole number, as calibrated steps are on all but coarse grids, a code is a division by D. With
`w = u - q_0 D + floor(D / 2)`, q_0 the lowest code, w brought between 0 and the middle of the highest code, below 2^16,

    n = floor(w / D) = floor(floor(w M / 2^16) / 2^s),  M = ceil(2^(16 + s) / D),  2^s < D <= 2^(s + 1)

is exact (Granlund and Montgomery, PLDI 1994, section 4), and the code is `q_0 + n`, but for ties, which n rounds up: where D is even, w is
n D and that code is odd, the even one is one less, unless it is below q_0. Where D is a power of two, n is a shift.

Noise and curves leave reads in float32, as RAISED + u. Where D is a power of two, `RAISED + u / D` is one fused product, whose rounding is
the ADC's, and only codes come back to 16 bits.

A read has so few additions that every instruction beside them shows. Sums begin so high that they have no sign: a subtraction that stops
at 0 is the lower limit, too. q_0 is added once for all digits; where D is odd, there are no ties.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from fractions import Fraction

import numpy as np
import torch
from llvmlite import ir
from numba import types

from ....arrays.mapping import MappedLayer
from ....kernels.inner import inlined
from ....kernels.simd import _broadcast, _pointer, int16_at, operation
from ... import accumulator_dtype
from ...reach import read_range
from ..vectors.wide import (_F32, _FLOATS, _I32, _SHORTS, BIAS, RAISED, WIDE, _call, added_shorts, as_shorts, full_i16,
                            raised, shorts)
from .cells_forms import runs_of_digits
from .cells_reads import SHORT, adds_nothing, kind_of, read, with_offsets
from .cells_rows import sum_shorts

_PAIRS, _ONES = ir.VectorType(_I32, WIDE // 2), ir.Constant(_SHORTS, [1] * WIDE)

# Of a read's converter: w is what `u + bias` is above FLOOR, at most HIGHEST; n what `code + BIAS` is above LOWEST, at most SPAN, or of w
# by MAGIC, 0 for a power of two, and PLACES; STEP, D where there may be ties, else 0; ODD, 1 where FIRST, the code that n counts from, is;
# FACTOR, what a code is worth, a multiple of its slice's in `worth`; START, what a sum begins at, so that it ends at `u + bias`. SCALE and
# LIFT, float32: 1 / D and RAISED - RAISED / D.
FLOOR, HIGHEST, LOWEST, SPAN, MAGIC, PLACES, STEP, ODD, FIRST, FACTOR, START, SCALE, LIFT = range(13)
FIELDS = 13
MOST_DOUBLINGS = 7  # of a sum: bits of a digit, but one


# fits    whether 16 bits do
# forms   uint16 `[digit, slice, class, field, 2]`, those of 16 bits twice: vectors are filled with 32 bits from memory, but not with 16,
#         by the load alone
# worth   of the codes of each slice, int64, below 2^15
# parts   the first digit of each run of digits whose codes' sum is below 2^15, and the end of the last, int64
Narrow = namedtuple("Narrow", "fits forms worth parts")
NOT_NARROW = Narrow(False, np.zeros((0, 0, 0, FIELDS, 2), np.uint16), np.zeros(0, np.int64), np.zeros(1, np.int64))


def narrow_forms(layer: MappedLayer) -> Narrow:
    """The ADC of a layer whose ranges are fixed."""
    spec, readout = layer.spec, layer.readout
    if accumulator_dtype(layer) != torch.int32 or readout is not None and (readout.needs_both or readout.depends_on_level):
        return NOT_NARROW
    kinds = len(spec.digit_bits), len(spec.slice_bits), layer.classes
    forms, factors, largest = np.zeros((*kinds, FIELDS, 2), np.uint16), np.zeros(kinds, np.int64), np.zeros(kinds, np.int64)
    form_of = functools.cache(lambda k, converter: _form(*read_range(layer, k), layer.unit, converter, readout is None))
    for z, k, j in np.ndindex(kinds):
        converter = layer.converter(z, k, j)
        if converter.bits:
            form = form_of(k, converter)
            if form is None:
                return NOT_NARROW
            bias, *fields = form
            forms[z, k, j, :FACTOR] = np.array(fields).astype(np.uint16)[:, None]
            forms[z, k, j, START] = bias >> spec.digit_bits[z] - 1
            scale = 1 / round(converter.delta / layer.unit)
            forms[z, k, j, SCALE:] = np.array([[scale], [RAISED - RAISED * scale]], np.float32).view(np.uint16)
            factors[z, k, j] = converter.factor << spec.dac_bits * z
            largest[z, k, j] = factors[z, k, j] * max(-converter.q_min, converter.q_max)
    common = np.maximum(np.gcd.reduce(factors, axis=(0, 2)), 1)
    parts = runs_of_digits(common, largest.max(2), spec.cell_bits)
    if parts is None:
        return NOT_NARROW
    forms[..., FACTOR, :] = (factors // common[:, None])[..., None]
    return Narrow(True, forms, common << spec.cell_bits * np.arange(kinds[1]), parts)


def _form(low, high, unit, converter, plain):
    """The bias and the fields of one converter before FACTOR for u from `low` to `high`, None where 16 bits do not hold these, or the
    codes are others than its own. Args: plain, whether sums become codes at once, so that they may begin anywhere."""
    step = round(converter.delta / unit)
    if not 2 <= step < 2**15 or high - low >= 2 * BIAS:
        return None
    first, last = (int(np.clip(round(Fraction(u, step)), converter.q_min, converter.q_max)) for u in (low, high))
    below, grain = max(-low, step // 2 - first * step, 0), 2**MOST_DOUBLINGS
    bias = -(-below // grain) * grain if plain else BIAS
    floor = bias + first * step - step // 2
    highest = (last - first) * step + step // 2
    if not 0 <= low + bias <= high + bias < 2 * BIAS or not 0 <= floor < 2 * BIAS or highest >= 2 * BIAS:
        return None
    places = (step - 1).bit_length() - 1
    divisor = (0, places + 1) if step & (step - 1) == 0 else (-(-2 ** (16 + places) // step), places)
    form = floor, highest, BIAS + first, last - first, *divisor, 0 if step % 2 else step, first % 2, first
    u = np.arange(low, high + 1)
    return (bias, *form) if np.array_equal(_codes(u + bias, *form), converter.table(low, high, unit)) else None


def _codes(sums, floor, highest, lowest, span, magic, places, step, odd, first):
    w = (sums - floor).clip(0, highest)
    n = (w * magic >> 16 if magic else w) >> places
    return first + (np.maximum(n - (n * step == w) * (n % 2 != odd), 0) if step else n)


def _field(b, form, number):
    pair = b.load(_pointer(b, form, ir.Constant(form.type, number), _I32, 1), typ=_I32)
    return b.bitcast(_broadcast(b, pair, _PAIRS), _SHORTS)


def _less(b, x, y):
    """x - y, down to 0."""
    return b.call(b.module.declare_intrinsic(f"llvm.usub.sat.v{WIDE}i16", (), ir.FunctionType(_SHORTS, [_SHORTS] * 2)), [x, y])


@operation(shorts, shorts, types.intp)
def _above(b, x, fields):
    """What numbers without a sign are above the first of two fields at an address, at most the second."""
    above, most = _less(b, x, _field(b, fields, 0)), _field(b, fields, 1)
    return b.select(b.icmp_unsigned("<", above, most), above, most)


@operation(raised, raised, types.intp)
def _rounded(b, u, form):
    """`rint(u / D)` where D is a power of two: the sum is exact before it is rounded."""
    numbers = (_pointer(b, form, ir.Constant(form.type, number), _F32, 1) for number in (SCALE, LIFT))
    return _call(b, "fma", _FLOATS, u, *(_broadcast(b, b.load(number, typ=_F32), _FLOATS) for number in numbers))


@operation(shorts, shorts, types.intp)
def _quotient(b, w, form):
    """n of w."""
    twice = ir.VectorType(_I32, WIDE)
    product = b.mul(b.zext(w, twice), b.zext(_field(b, form, MAGIC), twice))
    return b.lshr(b.trunc(b.lshr(product, ir.Constant(twice, [16] * WIDE)), _SHORTS), _field(b, form, PLACES))


@operation(shorts, shorts, shorts, types.intp)
def _even_on_ties(b, n, w, form):
    """n of w, or one less where w is a tie and n that of an odd code."""
    return _even(b, n, form, b.icmp_unsigned("==", b.mul(n, _field(b, form, STEP)), w))


@operation(shorts, shorts, types.intp)
def _even_by_shift(b, w, form):
    """The same where the step is a power of two."""
    rest = b.and_(w, b.sub(_field(b, form, STEP), _ONES))
    return _even(b, b.lshr(w, _field(b, form, PLACES)), form, b.icmp_unsigned("==", rest, ir.Constant(_SHORTS, [0] * WIDE)))


def _even(b, n, form, tie):
    of_odd_codes = b.and_(b.xor(n, _field(b, form, ODD)), _ONES)
    return b.select(tie, _less(b, n, of_odd_codes), n)


@operation(shorts, shorts, shorts, types.intp)
def _with_codes(b, total, n, form):
    """`total` and n times its factor."""
    return b.add(total, b.mul(n, _field(b, form, FACTOR)))


@inlined
def narrow_codes_of_digits(shape, at, weights, place, next_place, z, end, op):
    """Sums of the codes of the digits from z up to `end`, times their factors, of both halves."""
    total0 = total1 = full_i16(0)
    first = 0
    while z < end:
        if not adds_nothing(shape, at, place.x, z, place.k, op):
            form = at.forms + 4 * FIELDS * kind_of(shape, at, place.x, z, place.k)
            n0, n1 = _numbers_of_codes(shape, at, weights, place, next_place, z, form, op)
            total0, total1 = _with_codes(total0, n0, form), _with_codes(total1, n1, form)
            first += np.int64(int16_at(form, 2 * FIRST)) * int16_at(form, 2 * FACTOR)
        z += 1
    return added_shorts(total0, full_i16(first)), added_shorts(total1, full_i16(first))


@inlined
def _numbers_of_codes(shape, at, weights, place, next_place, z, form, op):
    """n of the reads of a digit, of both halves."""
    u0, u1 = sum_shorts(shape, at, weights, place.x, z, int16_at(form, 2 * START))
    power_of_two, floats = int16_at(form, 2 * MAGIC) == 0, op == SHORT and (at.noisy or at.curved or at.gained)
    if floats:
        seen0, seen1 = read(shape, at, place, z, op, u0), read(shape, at, next_place, z, op, u1)
        if power_of_two:
            seen0, seen1 = _rounded(seen0, form), _rounded(seen1, form)
        u0, u1 = as_shorts(seen0), as_shorts(seen1)
    elif op == SHORT:
        u0, u1 = with_offsets(shape, at, place, u0), with_offsets(shape, at, next_place, u1)
    if floats and power_of_two:
        return _above(u0, form + 4 * LOWEST), _above(u1, form + 4 * LOWEST)
    w0, w1 = _above(u0, form + 4 * FLOOR), _above(u1, form + 4 * FLOOR)
    if power_of_two:
        return _even_by_shift(w0, form), _even_by_shift(w1, form)
    n0, n1 = _quotient(w0, form), _quotient(w1, form)
    if int16_at(form, 2 * STEP):
        n0, n1 = _even_on_ties(n0, w0, form), _even_on_ties(n1, w1, form)
    return n0, n1
