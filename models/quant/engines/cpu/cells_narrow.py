"""Reads that 16 bits hold, from the sums of their cells to the sums of their codes: nothing is widened or stored on the way.

Where the ADC's step is D units of u, a whole number, as calibrated steps are on all but coarse grids, a code is a division by D. With
`w = clip(u) - q_0 D + floor(D / 2)`, q_0 the highest even code from which on no w is negative, and w below 2^15,

    n = floor(w / D) = floor(floor(w M / 2^16) / 2^s),  M = ceil(2^(16 + s) / D),  2^s < D <= 2^(s + 1)

is exact (Granlund and Montgomery, PLDI 1994, section 4), and the code is `q_0 + n`, but for ties, which n rounds up: where D is even, w is
n D and n is odd, the even code is one less.
"""

from __future__ import annotations

import functools
from collections import namedtuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ... import adc
from ...mapping import MappedLayer
from .. import accumulator_dtype
from ..reach import read_range
from .cells_reads import is_idle
from .cells_rows import sum_shorts
from .inner import inlined
from .simd import _broadcast, _pointer, int16_at, int64_at
from .wide import _I16, _SHORTS, WIDE, add_times_to_int32, full_i16, shorts

# Of a read's converter, int16: clip u to LOWEST .. HIGHEST; w = u - BASE; n by MAGIC (its bits are unsigned) and PLACES; TIES, 1 where
# there are ties; codes from FIRST on; what a code is worth, a multiple of its slice's in `worth`.
LOWEST, HIGHEST, BASE, MAGIC, PLACES, STEP, TIES, FIRST, FACTOR = range(9)
FIELDS = 9


# fits    whether 16 bits do
# forms   int16 `[digit, slice, field]`
# worth   of the codes of each slice, int64
Narrow = namedtuple("Narrow", "fits forms worth")
NOT_NARROW = Narrow(False, np.zeros((0, 0, FIELDS), np.int16), np.zeros(0, np.int64))


def narrow_forms(layer: MappedLayer) -> Narrow:
    """The ADC of a layer whose ranges are fixed."""
    spec = layer.spec
    if layer.readout is not None or accumulator_dtype(layer) != torch.int32:
        return NOT_NARROW
    digits, slices = len(spec.digit_bits), len(spec.slice_bits)
    forms, factors = np.zeros((digits, slices, FIELDS), np.int16), np.zeros((digits, slices), np.int64)
    most = np.zeros(slices, np.int64)
    form_of = functools.cache(lambda k, *converter: _form(*read_range(layer, k), layer.unit, *converter))
    for z, k in np.ndindex(digits, slices):
        delta, q_min, bits = layer.converter(z, k)
        if bits:
            form = form_of(k, delta, q_min, bits)
            if form is None:
                return NOT_NARROW
            forms[z, k, :FACTOR] = form
            factors[z, k] = layer.multiplier(z, k) << spec.dac_bits * z
            most[k] += factors[z, k] * max(-q_min, q_min + 2**bits - 1)
    worth = np.maximum(np.gcd.reduce(factors, axis=0), 1)
    if (most // worth).max() >= 2**15:
        return NOT_NARROW
    forms[..., FACTOR] = factors // worth
    return Narrow(True, forms, worth << spec.cell_bits * np.arange(slices))


def _form(low, high, unit, delta, q_min, bits):
    """The fields of one converter before FACTOR for u from `low` to `high`, None where the codes are others than `adc.transfer` gives."""
    step = round(delta / unit)
    if not 2 <= step < 2**15 or low < -2**15 or high >= 2**15:
        return None
    lowest, highest = max(low, q_min * step), min(high, (q_min + 2**bits - 1) * step)
    first = lowest // (2 * step) * 2
    base = first * step - step // 2
    if lowest > highest or highest - base >= 2**15 or base < -2**15:
        return None
    places = (step - 1).bit_length() - 1
    form = lowest, highest, base, -(-2 ** (16 + places) // step), places, step, 1 - step % 2, first
    u = np.arange(low, high + 1)
    if not np.array_equal(_codes(u, *form), adc.transfer(u, unit, delta, q_min, bits)):
        return None
    return np.array(form).astype(np.uint16).view(np.int16)


def _codes(u, lowest, highest, base, magic, places, step, ties, first):
    w = u.clip(lowest, highest) - base
    n = w * magic >> 16 + places
    return first + n - (n & ties) * (n * step == w)


@intrinsic
def _with_code(typingctx, total, u, form):
    """`total` and the codes of u, times their factor; form, the address of a converter's `FIELDS` fields."""
    def codegen(context, b, sig, args):
        total, u, form = args
        lowest, highest, base, magic, places, step, ties, first, factor = (
            _broadcast(b, b.load(_pointer(b, form, ir.Constant(form.type, field), _I16, 1), typ=_I16), _SHORTS) for field in range(FIELDS))
        u = b.select(b.icmp_signed(">", u, lowest), u, lowest)
        w = b.sub(b.select(b.icmp_signed("<", u, highest), u, highest), base)
        twice = ir.VectorType(ir.IntType(32), WIDE)
        product = b.lshr(b.mul(b.zext(w, twice), b.zext(magic, twice)), ir.Constant(twice, [16] * WIDE))
        n = b.lshr(b.trunc(product, _SHORTS), places)
        tie = b.select(b.icmp_signed("==", b.mul(n, step), w), b.and_(n, ties), ir.Constant(_SHORTS, [0] * WIDE))
        return b.add(total, b.mul(b.add(b.sub(n, tie), first), factor))
    return shorts(shorts, shorts, types.intp), codegen


@inlined
def add_narrow_codes(shape, at, weights, k, x, accumulator):
    """The codes of all digits of a pixel, times what they are worth, to the accumulators of a tile whose cells are at `weights`."""
    total0 = total1 = full_i16(0)
    for z in range(shape.digits):
        form = at.narrow + 2 * FIELDS * (z * shape.slices + k)
        if int16_at(form, FACTOR) == 0 or is_idle(shape, at, x, z):
            continue
        u0, u1 = sum_shorts(shape, at, weights, x, z)
        total0, total1 = _with_code(total0, u0, form), _with_code(total1, u1, form)
    worth = int64_at(at.worth, k)
    add_times_to_int32(at.acc, accumulator, total0, worth)
    add_times_to_int32(at.acc, accumulator + WIDE, total1, worth)
