"""The ADC's transfer and the choice of its range."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.quant import CrossbarSpec, Qconv2dDoreFa, adc


def code(u, unit, delta, q_min, adc_bits):
    """The formula in exact rational arithmetic; Python's round takes ties to even."""
    q = round(Fraction(int(u)) * Fraction(unit) / Fraction(float(delta)))
    return min(max(q, q_min), q_min + 2**adc_bits - 1)


@given(unit=st.sampled_from([0.5, 1.0]), adc_bits=st.integers(1, 12), share=st.floats(0, 1),
       delta=st.sampled_from([0.5, 1.0, 2.0, 4.0, 0.25, 1e-9, 1e9, 3.0, 1.25]) | st.floats(0.01, 100))
def test_transfer_is_the_formula(unit, adc_bits, share, delta):
    q_min = -round(share * (2**adc_bits - 1))
    u = np.concatenate([np.arange(-300, 301), [-(2**26), -65025 * 1024, 2**26, 65025 * 1024]])
    exact = [Fraction(int(x)) * Fraction(unit) / Fraction(float(delta)) for x in u]
    wanted = [code(x, unit, delta, q_min, adc_bits) for x in u]
    # The quotient is rounded once, to float64: only a quotient next to a tie, not on it, could become one.
    sure = np.array([abs(x % 1 - Fraction(1, 2)) > 1e-9 or x % 1 == Fraction(1, 2) for x in exact])
    found = adc.transfer(u, unit, delta, q_min, adc_bits)
    assert found.dtype == np.int64
    assert np.array_equal(found[sure], np.array(wanted)[sure])


def test_ties_go_to_even():
    """v = -5/2 ... 5/2 in halves, step 1: each half-integer to the even neighbour, so their mean stays 0."""
    assert adc.transfer(np.arange(-5, 6), 0.5, 1.0, -32, 6).tolist() == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2]


def test_codes_end_at_the_range():
    codes = adc.transfer(np.arange(-100, 101), 0.5, 1.0, -20, 6)
    assert codes.min() == -20 and codes.max() == 43
    assert adc.transfer([-9, 0, 9], 1.0, 1.0, 0, 2).tolist() == [0, 0, 3]
    assert adc.transfer([-9, 0, 9], 1.0, 1.0, -3, 2).tolist() == [-3, 0, 0]


@given(delta=st.floats(1e-3, 1e3), adc_bits=st.integers(1, 12), share=st.floats(0, 1))
def test_zero_is_a_code_and_codes_rise_with_the_read(delta, adc_bits, share):
    codes = adc.transfer(np.arange(-200, 201), 0.5, delta, -round(share * (2**adc_bits - 1)), adc_bits)
    assert codes[200] == 0 and (np.diff(codes) >= 0).all()


def covers(low, high, delta, q_min, adc_bits):
    """Whether `low` and `high` lie between the lowest and the highest level, to float64 accuracy."""
    top = q_min + 2**adc_bits - 1
    return delta * q_min <= low + 1e-9 * delta and high <= delta * top + 1e-9 * delta


@given(low=st.integers(-600, 0), high=st.integers(0, 600), unit=st.sampled_from([0.5, 1.0]), adc_bits=st.integers(1, 8))
def test_range_covers_and_no_smaller_one_does(low, high, unit, adc_bits):
    low, high = low * unit, high * unit
    delta, q_min = adc.covering_range(low, high, unit, adc_bits)
    last = 2**adc_bits - 1
    assert -last <= q_min <= 0 and delta >= unit
    if adc_bits == 1 and low < 0 < high:  # one code beside zero: only the side that reaches further
        assert (delta, q_min) == ((-low, -1) if -low > high else (high, 0))
        return
    assert covers(low, high, delta, q_min, adc_bits)
    u = np.arange(round(low / unit), round(high / unit) + 1)
    free = np.rint(u * unit / delta)
    assert np.array_equal(adc.transfer(u, unit, delta, q_min, adc_bits), free)  # nothing clips
    assert np.abs(free * delta - u * unit).max() <= delta / 2 * (1 + 1e-9)
    if delta > unit:
        less = delta - 2**-19  # a step may be rounded up to a binary fraction
        assert not any(covers(low, high, less, other, adc_bits) for other in range(-last, 1))
    else:
        assert np.array_equal(free * unit, u * unit)  # lossless


def test_range_of_nothing():
    assert adc.covering_range(0, 0, 0.5, 6) == (0.5, 0)


@pytest.mark.parametrize("cell_bits, bits", [(1, 8), (2, 9), (4, 11)])
def test_full_range_of_128_rows(cell_bits, bits):
    """Reads of a digital reference reach 128 (2^c - 1): exact with as many codes, coarser with fewer."""
    for adc_bits, exact in ((bits, True), (bits - 1, False)):
        spec = CrossbarSpec(cell_bits=cell_bits, adc_bits=adc_bits, reference="digital", adc_range="full")
        layer = Qconv2dDoreFa(200, 4, 3, spec=spec).mapped()
        assert (layer.adc_q_min == 0).all()
        top = 128 * (2**cell_bits - 1)
        steps = (1.0 if exact else top / (2**adc_bits - 1))
        assert layer.adc_delta.tolist() == pytest.approx([steps] * len(spec.slice_bits), abs=2e-6)


def test_full_range_follows_the_bits_of_each_slice_and_the_fullest_array():
    spec = CrossbarSpec(cell_bits=3, adc_bits=4, rows=64, adc_range="full")
    layer = Qconv2dDoreFa(100, 4, 1, spec=spec).mapped()  # arrays of 64 and 36 rows, a 3-bit and a 1-bit slice
    assert layer.adc_delta.tolist() == pytest.approx([64 * 3.5 / 7, 64 * 0.5 / 7], abs=2e-6)
    layer = Qconv2dDoreFa(36, 4, 1, spec=spec).mapped()
    assert layer.adc_delta.tolist() == pytest.approx([36 * 3.5 / 7, 36 * 0.5 / 7], abs=2e-6)


def test_minmax_takes_the_extremes_of_all_digits_and_slices():
    counts = np.zeros((2, 3, 41), np.int64)  # u = -20 .. 20
    counts[0, 0, 20] = 1000
    counts[1, 2, 7] = 1  # u = -13
    counts[0, 1, 29] = 1  # u = 9
    ranges = adc.minmax_ranges(counts, -20, 0.5, 3)
    assert len(ranges) == 3 and len(set(ranges)) == 1
    assert ranges[0] == adc.covering_range(-6.5, 4.5, 0.5, 3)
    assert ranges[0] == (pytest.approx(6.5 / 4), -4)
    assert adc.minmax_ranges(np.zeros((1, 2, 5)), -2, 1.0, 3) == [(1.0, 0)] * 2
