"""The ADC's transfer and the choice of its range."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.quant import CrossbarSpec, Qconv2dDoreFa, calibrate, set_engine, without_adc
from models.quant.arrays import adc
from models.quant.arrays.converter import Converter


@given(unit=st.sampled_from([0.5, 1.0]), adc_bits=st.integers(1, 12), share=st.floats(0, 1),
       delta=st.sampled_from([0.5, 1.0, 2.0, 4.0, 0.25, 1e-9, 1e9, 3.0, 1.25]) | st.floats(0.01, 100))
def test_transfer_is_the_formula(unit, adc_bits, share, delta):
    """In exact rational arithmetic."""
    q_min = -round(share * (2**adc_bits - 1))
    u = np.concatenate([np.arange(-300, 301), [-(2**26), -65025 * 1024, 2**26, 65025 * 1024]])
    step = Fraction(unit) / Fraction(float(delta))
    exact = [int(x) * step for x in u]  # Python's round takes ties to even
    wanted = [min(max(round(q), q_min), q_min + 2**adc_bits - 1) for q in exact]
    # The quotient is rounded once, to float64: only a quotient next to a tie, not on it, could become one.
    from_tie = [abs(q % 1 - Fraction(1, 2)) for q in exact]
    sure = np.array([not distance or float(distance) > 1e-9 for distance in from_tie])
    found = Converter(delta, q_min, adc_bits).encode(u, unit)
    assert found.dtype == np.int64
    assert np.array_equal(found[sure], np.array(wanted)[sure])


def test_ties_go_to_even():
    """v = -5/2 ... 5/2 in halves, step 1: each half-integer to the even neighbour, so their mean stays 0."""
    assert Converter(1.0, -32, 6).encode(np.arange(-5, 6), 0.5).tolist() == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2]


def test_codes_end_at_the_range():
    codes = Converter(1.0, -20, 6).encode(np.arange(-100, 101), 0.5)
    assert codes.min() == -20 and codes.max() == 43
    assert Converter(1.0, 0, 2).encode([-9, 0, 9]).tolist() == [0, 0, 3]
    assert Converter(1.0, -3, 2).encode([-9, 0, 9]).tolist() == [-3, 0, 0]


@given(delta=st.floats(1e-3, 1e3), adc_bits=st.integers(1, 12), share=st.floats(0, 1))
def test_zero_is_a_code_and_codes_rise_with_the_read(delta, adc_bits, share):
    codes = Converter(delta, -round(share * (2**adc_bits - 1)), adc_bits).encode(np.arange(-200, 201), 0.5)
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
    assert np.array_equal(Converter(delta, q_min, adc_bits).encode(u, unit), free)  # nothing clips
    assert np.abs(free * delta - u * unit).max() <= delta / 2 * (1 + 1e-9)
    if delta > unit:
        less = delta - 2**-6  # a step may be rounded up to a binary fraction
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
        assert layer.adc_delta.tolist() == pytest.approx([steps] * len(spec.slice_bits), abs=1 / 64)


def test_full_range_follows_the_bits_of_each_slice_and_the_fullest_array():
    spec = CrossbarSpec(cell_bits=3, adc_bits=4, rows=64, adc_range="full")
    layer = Qconv2dDoreFa(100, 4, 1, spec=spec).mapped()  # arrays of 64 and 36 rows, a 3-bit and a 1-bit slice
    assert layer.adc_delta.tolist() == pytest.approx([64 * 3.5 / 7, 64 * 0.5 / 7], abs=1 / 64)
    layer = Qconv2dDoreFa(36, 4, 1, spec=spec).mapped()
    assert layer.adc_delta.tolist() == pytest.approx([36 * 3.5 / 7, 36 * 0.5 / 7], abs=1 / 64)


def mapped(adc_bits, cell_bits=1, rows=20, channels=20, wq="dorefa", **options):
    """A layer of one slice for each bit and four digits; with DoReFa its reads reach from -rows to rows."""
    spec = CrossbarSpec(cell_bits=cell_bits, adc_bits=adc_bits, rows=rows, **options)
    return Qconv2dDoreFa(channels, 4, 1, spec=spec, wq=wq).mapped("ideal")


def test_minmax_takes_the_extremes_of_all_digits_and_slices():
    layer = mapped(3)
    counts = np.zeros((4, 4, 41), np.int64)  # u = -20 .. 20
    counts[0, 0, 20] = 1000
    counts[1, 2, 7] = 1  # u = -13
    counts[0, 1, 29] = 1  # u = 9
    ranges = adc.calibrated_ranges(counts, layer, "minmax", "layer")
    assert len(ranges) == 4 and len(set(ranges)) == 1
    assert ranges[0] == adc.covering_range(-6.5, 4.5, 0.5, 3)
    assert ranges[0] == (pytest.approx(6.5 / 4), -4)
    assert adc.calibrated_ranges(np.zeros((4, 4, 41)), layer, "minmax", "layer") == [(0.5, 0)] * 4
    each = adc.calibrated_ranges(counts, layer, "minmax", "slice")
    assert each == [(0.5, 0), (pytest.approx(4.5 / 7, abs=1 / 64), 0), (pytest.approx(6.5 / 7, abs=1 / 64), -7), (0.5, 0)]


@pytest.mark.parametrize("wq, w_bits, cell_bits, reference, wanted", [
    ("dorefa", 4, 1, "analog", [[0, 1, 2, 3]]), ("dorefa", 4, 3, "analog", [[0, 1]]),
    ("sawb", 4, 1, "analog", [[0, 1, 2], [3]]), ("sawb", 4, 2, "analog", [[0], [1]]), ("sawb", 3, 1, "analog", [[0, 1], [2]]),
    ("sawb", 4, 4, "analog", [[0]]), ("sawb", 4, 1, "digital", [[0, 1, 2, 3]])])
def test_slices_whose_reference_is_filled_alike_share_a_range(wq, w_bits, cell_bits, reference, wanted):
    """The zero code of SAWB is 0111 with 4 bits, 011 with 3; DoReFa's half cells are half of each."""
    layer = Qconv2dDoreFa(8, 8, 1, wq=wq, spec=CrossbarSpec(w_bits, 4, cell_bits, 3, 8, reference=reference)).mapped("ideal")
    assert adc.range_groups(layer, "alike") == wanted
    slices = list(range(len(layer.reference_twice)))
    assert adc.range_groups(layer, "layer") == [slices] and adc.range_groups(layer, "slice") == [[k] for k in slices]


@pytest.mark.parametrize("cell_bits", [1, 2])
def test_ranges_of_sawb_lie_where_its_reads_lie(cell_bits):
    """Reads of the highest slice lie above zero, nearly all, those of the others below: one range for all wastes its codes."""
    torch.manual_seed(0)
    layer = Qconv2dDoreFa(64, 64, 3, wq="sawb", spec=CrossbarSpec(4, 4, cell_bits, 3, 64))
    images = torch.rand(4, 64, 8, 8) * (torch.rand(4, 64, 8, 8) < 0.4)
    errors = {}
    with set_engine("reference"), without_adc(layer):
        exact = layer(images)
    for per in adc.PER:
        with set_engine("reference"):
            calibrate(layer, [images], per=per, correct=None)
            errors[per] = (layer(images) - exact).square().mean().item()
        if per == "alike":
            assert (layer.adc_q_min[:-1] <= -6).all() and layer.adc_q_min[-1] >= 1 - cell_bits
    assert errors["alike"] < 0.5 * errors["layer"] and errors["alike"] < 1.2 * errors["slice"], errors


def test_percentile_leaves_out_the_outer_thousandth():
    """Half a thousandth on each side: of 20,000 reads, 9 may be clipped at each end, 11 may not. Zeros, of which there
    are millions, do not dilute them."""
    for low, high, wanted in ((9, 9, (-2, 2)), (11, 9, (-9, 2)), (9, 11, (-2, 9.5)), (80, 80, (-9, 9.5))):
        counts = np.zeros((4, 4, 41), np.int64)
        counts[:, 0, 20] = 10**6
        counts[0, 0, [2, 16, 24, 39]] = low, 10000 - low, 10000 - high, high  # v = -9, -2, 2, 9.5
        ranges = adc.calibrated_ranges(counts, mapped(2), "percentile", "layer")
        assert ranges == [adc.covering_range(*wanted, 0.5, 2)] * 4, (low, high)


def test_spacing_of_reads_that_are_whole_numbers():
    """Where the reference column holds whole cells, every read is a whole number, and a step of 1 is exact with half as many
    codes. Elsewhere reads that happen to be whole numbers say nothing of those to come."""
    sawb = mapped(4, wq="sawb")
    counts = np.zeros((4, 4, sawb.u_span[1] - sawb.u_span[0] + 1), np.int64)
    middle = -sawb.u_span[0]
    counts[:, 0, middle - 10:middle + 11:2] = 5  # v = -5 .. 5
    for rule in adc.RULES:
        assert adc.calibrated_ranges(counts, sawb, rule, "slice")[0][0] == 1
    digital = mapped(6, reference="digital")
    counts = np.zeros((4, 4, 21), np.int64)
    counts[:, :, :5:2] = 5  # P = 0, 2, 4 of 0 .. 20
    for rule in adc.RULES:
        assert adc.calibrated_ranges(counts, digital, rule, "alike")[0][0] == 1


@st.composite
def histograms(draw):
    """Few bell-shaped reads, in four digits of four slices; every digit and slice counts equally many."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    u = np.arange(-20, 21)
    shape = np.exp(-0.5 * ((u - rng.normal(0, 2)) / rng.uniform(0.5, 9)) ** 2)
    return np.array([[rng.multinomial(draw(st.sampled_from([3, 40, 1000])), shape / shape.sum()) for _ in range(4)]
                     for _ in range(4)])


def cost(counts, layer, delta, q_min, adc_bits):
    """Expected squared error of an output divided by the arrays, from its definition, in plain loops."""
    total, bias = 0.0, 0.0
    reads = counts[0, 0].sum()
    for z, k, i in np.argwhere(counts):
        v = (i - 20) / 2
        q = min(max(round(Fraction(v) / Fraction(delta)), q_min), q_min + 2**adc_bits - 1)
        error = (delta * q - v) * counts[z, k, i] / reads
        total += 4.0 ** (z + k) * (delta * q - v) ** 2 * counts[z, k, i] / reads
        bias += 2.0 ** (z + k) * error
    return total + len(layer.arrays) * bias**2


@settings(max_examples=15, deadline=None)
@given(counts=histograms(), adc_bits=st.integers(1, 4), arrays=st.sampled_from([1, 9]))
def test_mse_is_no_worse_than_any_range_of_a_fine_grid(counts, adc_bits, arrays):
    counts = np.array([[counts[z, k] if counts[z, k].sum() == counts[0, 0].sum() else counts[0, 0] for k in range(4)]
                       for z in range(4)])  # as many reads in every digit and slice
    layer = mapped(adc_bits, channels=20 * arrays)
    (delta, q_min), = set(adc.calibrated_ranges(counts, layer, "mse", "layer"))
    assert delta * 64 % 1 == 0 and -(2**adc_bits) < q_min <= 0
    found = cost(counts, layer, delta, q_min, adc_bits)
    reads = adc.Reads(counts, [0, 1, 2, 3], layer)
    assert reads.squared_error(delta, q_min, adc_bits) == pytest.approx(found, abs=1e-9)
    grid = np.arange(1, 11 * 64) / 64
    best = min(reads.squared_error(step, -m, adc_bits) for step in grid for m in range(2**adc_bits))
    assert found <= best * (1 + 1e-9) + 1e-9


def test_mse_of_a_hand_made_histogram():
    """Three codes beside zero: v = +-1 as often as can be, and one rare 3. The far read is worth a bit of clipping."""
    counts = np.zeros((4, 4, 41), np.int64)
    counts[0, 0, [18, 22]] = 1000, 1000
    layer = mapped(2)
    assert adc.calibrated_ranges(counts, layer, "mse", "slice")[0][0] == 1  # exact
    counts[0, 0, 26] = 1
    delta, q_min = adc.calibrated_ranges(counts, layer, "mse", "slice")[0]
    assert delta == pytest.approx(1, abs=0.01) and q_min == -1  # codes -1 .. 2: 3 becomes 2
    counts[0, 0, 26] = 10**6
    delta, q_min = adc.calibrated_ranges(counts, layer, "mse", "slice")[0]
    assert delta * (q_min + 3) == pytest.approx(3, abs=0.01)


def test_mse_with_one_bit_takes_the_side_that_matters():
    """1000 reads of -1/2 and one of +1/2: the codes are -1 and 0, not 0 and 1."""
    counts = np.zeros((4, 4, 41), np.int64)
    counts[0, 0, [19, 21]] = 1000, 1
    (delta, q_min) = adc.calibrated_ranges(counts, mapped(1), "mse", "slice")[0]
    assert (delta, q_min) == (0.5, -1)


def test_full_range_of_whole_reads_needs_half_as_many_codes():
    """SAWB's reference column holds whole cells, so 128 rows of 1-bit cells give 257 values of even u: 129 codes."""
    layer = Qconv2dDoreFa(128, 4, 1, spec=CrossbarSpec(cell_bits=1, adc_bits=8, adc_range="full"), wq="sawb").mapped()
    assert layer.adc_delta.tolist() == [1.0] * 4
    assert adc.is_lossless(layer)


@pytest.mark.parametrize("rows, exact", [(15, True), (16, False)])
def test_lossless_with_as_many_codes_as_values(rows, exact):
    """15 rows of 1-bit cells give the sums 0 .. 15, which 4 bits hold."""
    spec = CrossbarSpec(adc_bits=4, rows=rows, reference="digital", adc_range="full")
    assert adc.is_lossless(Qconv2dDoreFa(rows, 4, 1, spec=spec).mapped()) == exact


@pytest.mark.parametrize("adc_bits", [2, 3, 4])
@pytest.mark.parametrize("width", [2, 5, 9])
def test_finer_steps_hardly_lower_the_cost(width, adc_bits):
    """Steps of 1/256, for bell-shaped reads."""
    u = np.arange(-20, 21)
    counts = np.rint(1e5 * np.exp(-0.5 * ((u - 0.3) / width) ** 2)).astype(np.int64) * np.ones((4, 4, 1), np.int64)
    layer = mapped(adc_bits)
    delta, q_min = adc.calibrated_ranges(counts, layer, "mse", "layer")[0]
    reads = adc.Reads(counts, [0, 1, 2, 3], layer)
    steps = np.arange(64, 10 * 256)[:, None] / 256
    errors = (steps * Converter(steps, -m, adc_bits).encode(reads.v) - reads.v for m in range(2**adc_bits))
    best = min((e**2 @ reads.square + reads.arrays * (e @ reads.linear) ** 2).min() for e in errors)  # the costs of all steps at once
    assert reads.squared_error(delta, q_min, adc_bits) <= 1.01 * best + 1e-9


@pytest.mark.parametrize("adc_bits", [1, 3, 8])
def test_errors_of_very_many_read_values_are_sums_over_codes(monkeypatch, adc_bits):
    """Those over values, of the same reads: with every lowest code, steps of which many leave ties, and clipping on both sides."""
    numbers = np.random.default_rng(0)
    layer = mapped(adc_bits)
    low, high = layer.u_span
    reads = adc.Reads(numbers.integers(0, 1000, (4, 4, high - low + 1)), [0, 1, 2, 3], layer)
    steps = np.array([1 / 64, 0.5, 1, 1.25, 3, 7.5, 40])[:, None]
    e = np.array([[delta * Converter(delta, -m, adc_bits).encode(reads.v) - reads.v for m in range(2**adc_bits)] for delta in steps[:, 0]])
    monkeypatch.setattr(adc, "MANY", 0)
    below, above = (adc.errors_of_steps(reads, sign, steps, 2**adc_bits - 1) for sign in (-1, 1))
    np.testing.assert_allclose(below[0] + above[0][:, ::-1], e**2 @ reads.square, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(above[1][:, ::-1] - below[1], e @ reads.linear, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("adc_bits", [1, 4, 12])
def test_mse_of_very_many_read_values_takes_coarser_steps(adc_bits):
    """115,201 values. Steps a percent apart around the one that was found are not clearly better."""
    layer = mapped(adc_bits, cell_bits=4, rows=512, channels=512, dac_bits=4)
    u = np.arange(layer.u_span[0], layer.u_span[1] + 1)
    counts = np.rint(1e6 * np.exp(-0.5 * (u / 10000) ** 2)).astype(np.int64)[None, None]
    (delta, q_min), = adc.calibrated_ranges(counts, layer, "mse", "slice")
    assert delta * 64 % 1 == 0
    reads = adc.Reads(counts, [0], layer)
    found = reads.squared_error(delta, q_min, adc_bits)
    middle = 2 ** (adc_bits - 1)
    others = [(delta * (1 + i / 200), m) for i in range(-20, 21, 2) for m in {q_min, -middle, 1 - middle}]
    assert found <= 1.01 * min(reads.squared_error(*other, adc_bits) for other in others)


def test_the_percentile_is_one_of_reads_not_of_what_they_count():
    """Five of 20,005 are cut off, though they are those of the highest digit and slice."""
    counts = np.zeros((4, 4, 41), np.int64)  # u = -20 .. 20
    counts[0, 0, [16, 24]], counts[3, 3, 39] = 10_000, 5
    assert adc.calibrated_ranges(counts, mapped(2), "percentile", "layer") == [adc.covering_range(-2, 2, 0.5, 2)] * 4
