"""The ADC of cells on a grid, or of many groups at once, in the forms that vectors take."""

from __future__ import annotations

import functools
from collections import namedtuple

import numpy as np
import torch

from ....arrays.converter import Converter
from ....arrays.mapping import MappedLayer
from ....kernels.inner import inlined
from ....kernels.simd import float32_at, float64_at
from ... import accumulator_dtype
from ...reach import read_range
from ..vectors.wide import code_f32, code_of_quotient_f32, code_of_quotient_f64

# The ADC. `[., digit, slice, class, field]`, `.` being 1 or, with the ranges of a batch, which are of one class, `[group, array]`.
# singles, doubles   `SCALE..FACTOR` as float32 and as float64; all 0 of reads of 0 bits
# divide             the codes are those of a division: a product does not give all of them
# broad              codes and sums need float64 and int64
# low                DYNAMIC: smallest u of each entry, `[., digit, slice]`
# constant           what every output of a group gets besides the codes
Forms = namedtuple("Forms", "singles doubles divide broad low constant")
SCALE, UNIT, DELTA, LOWEST, HIGHEST, FACTOR = range(6)  # q = clip(rint(u SCALE), ..) or clip(rint(u UNIT / DELTA), ..), times FACTOR
FORM = 6
NO_FORMS = Forms(np.zeros((1,) * 5, np.float32), np.zeros((1,) * 5), False, False, np.zeros((1, 1, 1), np.int64), np.zeros(1, np.int64))


def static_forms(layer: MappedLayer) -> Forms:
    """The ADC of a layer whose ranges are fixed."""
    spec = layer.spec
    kinds = len(spec.digit_bits), len(spec.slice_bits), layer.classes
    adcs = {kind: adc for kind in np.ndindex(kinds) if (adc := layer.converter(*kind)).bits}
    forms = np.zeros((1, *kinds, FORM))
    for (z, k, j), adc in adcs.items():
        factor = adc.factor << (spec.dac_bits * z + spec.cell_bits * k)
        forms[0, z, k, j] = layer.unit / adc.delta, layer.unit, adc.delta, adc.q_min, adc.q_max, factor
    singles = forms.astype(np.float32)
    largest = (np.abs(forms[..., [LOWEST, HIGHEST]]).max(-1) * forms[..., FACTOR]).max(-1).sum(1).max()
    spans = [read_range(layer, k) for k in range(len(spec.slice_bits))]
    broad = largest >= 2**24 or max(max(-low, high) for low, high in spans) >= 2**24 or accumulator_dtype(layer) != torch.int32
    divide = False
    if not broad:
        scales = {kind: _scale(*spans[kind[1]], layer.unit, adc) for kind, adc in adcs.items()}
        divide = None in scales.values()
        broad = divide and not all(_divides(*spans[kind[1]], layer.unit, adc) for kind, adc in adcs.items())
        for kind, scale in scales.items() if not divide else ():
            singles[(0, *kind, SCALE)] = scale
    return Forms(singles, forms, divide, broad, np.zeros((1, *kinds[:2]), np.int64), np.zeros(layer.geometry.groups, np.int64))


def no_adc_forms(layer: MappedLayer) -> Forms:
    """Every read as it is, as the code of an ADC with steps of one u; of others what they say of reads of 0 bits."""
    spec = layer.spec
    forms = np.zeros((1, len(spec.digit_bits), len(spec.slice_bits), layer.classes, FORM))
    forms[..., UNIT] = forms[..., DELTA] = 1
    forms[..., LOWEST], forms[..., HIGHEST] = -(2**31), 2**31
    place = spec.dac_bits * np.arange(forms.shape[1])[:, None] + spec.cell_bits * np.arange(forms.shape[2])
    forms[..., FACTOR] = 2.0 ** place[..., None]
    for kind in np.ndindex(forms.shape[1:4]) if spec.adc_range != "ideal" else ():
        forms[(0, *kind, FACTOR)] *= layer.converter(*kind).bits > 0
    return Forms(forms.astype(np.float32), forms, True, True, np.zeros((1, *forms.shape[1:3]), np.int64),
                 np.zeros(layer.geometry.groups, np.int64))


@functools.lru_cache(maxsize=8192)  # digits have the same ranges, and so has a network whenever it is prepared
def _scale(low: int, high: int, unit: float, converter: Converter) -> np.float32 | None:
    """The factor next to `unit / delta` whose product with u, rounded once, gives the ADC's codes for every u, or None."""
    u, codes = converter.around_steps(low, high, unit)
    exact = np.float32(unit / converter.delta)
    for scale in (exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))):
        if np.array_equal(np.rint(u * np.float64(scale)).clip(converter.q_min, converter.q_max), codes):
            return scale
    return None


@functools.lru_cache(maxsize=8192)
def _divides(low: int, high: int, unit: float, converter: Converter) -> bool:
    """Whether a division in float32 gives the ADC's codes for every u."""
    u, codes = converter.around_steps(low, high, unit)
    quotients = u.astype(np.float32) * np.float32(unit) / np.float32(converter.delta)
    return np.array_equal(np.rint(quotients).clip(converter.q_min, converter.q_max), codes)


def dynamic_forms(layer: MappedLayer, low: np.ndarray, high: np.ndarray) -> Forms:
    """The ADC whose ranges are the smallest and largest u of the batch, low and high int64 `[group, array, digit, slice]`."""
    spec, span = layer.spec, high - low
    place = spec.dac_bits * np.arange(low.shape[2])[:, None] + spec.cell_bits * np.arange(low.shape[3])
    forms = np.zeros((*span.shape, 1, FORM))
    forms[..., UNIT], forms[..., HIGHEST] = 1, 2**spec.adc_bits - 1
    forms[..., 0, DELTA] = np.maximum(span, 1).astype(np.float32) / np.float32(2**spec.adc_bits)
    forms[..., 0, FACTOR] = span << place
    flat = forms.reshape(-1, *forms.shape[2:])
    # Contiguous, whatever the ranges are a view of: for each layout Numba would compile the kernel once more.
    return Forms(flat.astype(np.float32), flat, True, True, np.ascontiguousarray(low.reshape(-1, *low.shape[2:])),
                 (low << place).sum(axis=(1, 2, 3)) << spec.adc_bits)


def runs_of_digits(common: np.ndarray, largest: np.ndarray, cell_bits: int) -> np.ndarray | None:
    """The first digits of the runs of digits whose codes' sums 16 bits hold, and the end of the last, int64; None where these do not hold
    the codes of one digit, or what they are worth.

    Args: common, what all that the codes of a slice add is a multiple of, `[slice]`; largest, what one of a digit adds at the most,
        `[digit, slice]`; cell_bits, by which slices are apart.
    """
    largest = largest // common
    if largest.max() >= 2**15 or (common << cell_bits * np.arange(len(common))).max() >= 2**15:
        return None
    parts, most = [0], np.zeros(len(common), np.int64)
    for z, of_digit in enumerate(largest):
        if (most + of_digit).max() >= 2**15:
            parts.append(z)
            most[:] = 0
        most += of_digit
    return np.array([*parts, len(largest)])


@inlined
def factor_of(singles, kind):
    """What the codes of a kind of reads are worth, of `Forms.singles` at an address."""
    return float32_at(singles + 4 * FORM * kind, FACTOR)


@inlined
def code_of(u, singles, kind, divide):
    """The codes of a vector of reads of one kind, in float32, by `Forms.singles` at an address."""
    form = singles + 4 * FORM * kind
    low, high = float32_at(form, LOWEST), float32_at(form, HIGHEST)
    if divide:
        return code_of_quotient_f32(u, float32_at(form, UNIT), float32_at(form, DELTA), low, high)
    return code_f32(u, float32_at(form, SCALE), low, high)


@inlined
def broad_code_of(u, doubles, kind):
    """The same by the formula, in float64."""
    form = doubles + 8 * FORM * kind
    return code_of_quotient_f64(u, float64_at(form, UNIT), float64_at(form, DELTA), float64_at(form, LOWEST), float64_at(form, HIGHEST))
