"""Output pixels side by side, and layers whose converters only clip: against the oracle, bit for bit."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Case, by_ones, cases, grid_cases
from test_engines import dense_case

from models.quant import CrossbarSpec, Readout, image_numbers
from models.quant.arrays.circuits import Circuits
from models.quant.engines import accumulator_dtype, reference
from models.quant.engines.reach import too_far

pytest.importorskip("numba")
from models.quant.engines.cpu import engine  # noqa: E402
from models.quant.engines.cpu.pixels import loud, pixels
from models.quant.engines.cpu.pixels.pixels_layout import BY_ONES, NARROW, TALL  # noqa: E402
from models.quant.kernels.simd import has_byte_tables  # noqa: E402
from models.quant.arrays.spec import Geometry  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(not has_byte_tables(), reason="no tables of bytes here")]
ROWS = [1, 3, 8, 16, 31, 64, 100, 1024]


def wanted(case):
    return oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta, case.q_min, case.bits,
                             case.cells)


def check_pixels(case):
    side_by_side = pixels.SideBySide(case.layer(), None)
    assume(side_by_side._layout is not None)
    compare(side_by_side, case)


def compare(side_by_side, case):
    dtype, expected = accumulator_dtype(side_by_side.layer), wanted(case)
    found = side_by_side.simulate(case.input(), dtype)
    assert found.dtype == dtype and found.shape == expected.shape
    assert (found.numpy() == expected).all()


@given(case=cases(adc_ranges=["calibrated"], rows=ROWS), size=st.tuples(st.integers(17, 24), st.integers(17, 24)), images=st.integers(1, 3),
       block=st.sampled_from([256, 512]))
@settings(max_examples=30)
def test_inputs_of_several_blocks(case, size, images, block):
    """Whose borders lie anywhere in an image."""
    numbers = np.random.default_rng(size[0])
    case.a_codes = numbers.integers(0, 2**case.spec.a_bits, (images, *size, case.a_codes.shape[3]), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "PLANES", block * 8)
        check_pixels(case)


@given(case=cases(adc_ranges=["calibrated", "full"], rows=ROWS))
@settings(max_examples=80)
def test_ideal_cells(case):
    check_pixels(case)


@given(case=cases(planned=True, rows=ROWS))
@settings(max_examples=50)
def test_planned_adc(case):
    check_pixels(case)


@given(case=grid_cases(adc_ranges=["calibrated"], rows=ROWS))
@settings(max_examples=50)
def test_cells_on_a_grid(case):
    check_pixels(case)


NOISE = {"of cells": (0.0, ((900.5, 0.0, 1.0), (0.0, 0.0, 0.5), (40.3, 0.0, 0.0), (7.0, 0.0, 0.5)) * 2), "of the ADC": (90.1, None),
         "both": (30.7, ((60.3, 0.0, 0.5),) * 8), "none": (0.0, None)}


CURVES = ((0.98, -1e-6, 2e-12, 20.0), (0.97, -2e-6, 1e-12, 10.0), (0.99, -1e-6, 0.0, 0.0), (0.96, -1e-6, 3e-12, 5.0)) * 2


@given(case=grid_cases(adc_ranges=["calibrated", "full"], rows=ROWS), noise=st.sampled_from([*NOISE]), curved=st.booleans(),
       converters=st.sampled_from(["", "gain", "offset", "both"]), moved=st.booleans(), pair=st.booleans(),
       first=st.sampled_from([0, 11, 2**40]), seed=st.integers(0, 2**64 - 1), large=st.booleans())
@settings(max_examples=160)
def test_what_reads_have_besides(case, noise, curved, converters, moved, pair, first, seed, large):
    """Noise that depends on n alone, curves, gains, offsets and moved thresholds, of pairs too: as the reference engine, whatever lanes
    are beside the image. Args: large, whether images lie in several blocks, whose borders lie anywhere."""
    rng = np.random.default_rng(seed)
    if large:
        case.a_codes = rng.integers(0, 2**case.spec.a_bits, (3, 17, 19, case.a_codes.shape[3]), dtype=np.uint8)
    layer = on_pairs(case.layer()) if pair else case.layer()
    shape = len(layer.spec.slice_bits), layer.geometry.groups, len(layer.arrays), len(layer.w_codes) // layer.geometry.groups
    gain = torch.from_numpy(rng.normal(1, 0.05, shape)) if converters in ("gain", "both") else None
    offset = torch.from_numpy(rng.integers(-300, 301, shape)).int() if converters in ("offset", "both") else None
    base, cell_noise = NOISE[noise]
    layer = replace(layer, readout=Readout(base, cell_noise and cell_noise[:shape[0]], seed, gain, offset,
                                           CURVES[:shape[0]] if curved else None, both_of(layer, rng),
                                           circuits_of(layer, seed) if moved else None))
    side_by_side = pixels.SideBySide(layer, None)
    assume(too_far(layer) is None and side_by_side._may_read_out and side_by_side._layout is not None)
    with image_numbers(first), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "PLANES", 256 * 8)
        found, wanted = side_by_side.simulate(case.input(), accumulator_dtype(layer)), reference.accumulate(layer, case.input())
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def on_pairs(layer):
    """The same values as differences of two lines."""
    spec = replace(layer.spec, weights="pair", reference="analog", adc_plan="uniform")
    cells = replace(layer.cells, reference=torch.zeros_like(layer.cells.reference))
    return replace(layer, spec=spec, reference_twice=(0,) * len(layer.reference_twice), cells=cells)


def both_of(layer, rng):
    """What the lines of a pair hold together, a little less than nothing at times."""
    if layer.spec.weights != "pair":
        return None
    size = layer.cells.values.abs()
    return (size + 2 * torch.from_numpy(rng.integers(-3, 2 * int(size.max()) + 1, size.shape))).int()


def circuits_of(layer, seed):
    shape = layer.geometry.groups, len(layer.arrays), len(layer.w_codes) // layer.geometry.groups
    return Circuits(0.5, 0.3, 0.02, 0.2, shape, 1, lambda k, bits: np.random.default_rng([seed, k, bits]))


def extreme_case(spec, channels, delta, q_min, zero_code=None):
    """Every weight code has a column of its own; all inputs are at their largest, or none, or some."""
    out = 2**spec.w_bits
    a_codes = np.random.default_rng(0).integers(0, 2**spec.a_bits, (4, 1, 1, channels), dtype=np.uint8)
    a_codes[0], a_codes[1] = 2**spec.a_bits - 1, 0
    w_codes = np.broadcast_to(np.arange(out, dtype=np.uint8).reshape(out, 1, 1, 1), (out, channels, 1, 1)).copy()
    return Case(spec, Geometry(), a_codes, w_codes, [delta] * len(spec.slice_bits), [q_min] * len(spec.slice_bits), None, zero_code)


@pytest.mark.parametrize("case, form", [
    (extreme_case(CrossbarSpec(1, 8, 1, 7, 64, reference="digital"), 128, 1.0, 0), NARROW),
    (extreme_case(CrossbarSpec(1, 8, 1, 7, 64, reference="digital"), 129, 1.0, 0), TALL),
    (extreme_case(CrossbarSpec(2, 1, 1, 6, 63), 63, 1.0, -32, 1), NARROW),
    (extreme_case(CrossbarSpec(2, 1, 1, 6, 64), 64, 1.0, -32, 1), TALL),
    (extreme_case(CrossbarSpec(1, 1, 1, 7, 63, reference="digital"), 126, 1.0, 0), NARROW),
    (extreme_case(CrossbarSpec(1, 1, 1, 8, 63, reference="digital"), 63, 0.5, 0), NARROW),
    (extreme_case(CrossbarSpec(1, 1, 1, 8, 64, reference="digital"), 64, 0.5, 0), TALL),
], ids=["codes of 15 bits", "of 16", "reads up to 126", "up to 128", "tables of 64 codes", "codes up to 126", "up to 128"])
def test_what_bytes_and_16_bits_hold(case, form):
    side_by_side = pixels.SideBySide(case.layer(), None)
    assert side_by_side._layout[0].form == form
    compare(side_by_side, case)


@pytest.mark.parametrize("last, fits", [(3, True), (4, False), (-4, True), (-5, False)])
def test_reads_at_the_ends_of_16_bits(last, fits):
    case = extreme_case(CrossbarSpec(1, 1, 1, 6, 8, reference="digital"), 5, 3.0, -32)
    weights = np.array([8191] * 4 + [abs(last)], np.int32).reshape(1, 1, 5, 1) * np.sign(last) * np.array([1, 0])
    case.cells = weights.astype(np.int32), np.zeros((1, 1, 5), np.int32), 8
    side_by_side = pixels.SideBySide(case.layer(), None)
    assert (side_by_side._layout is not None) == fits
    if fits:
        compare(side_by_side, case)


def test_codes_of_quotients():
    """With a step of which no factor gives the codes of u halfway between two."""
    case = extreme_case(CrossbarSpec(1, 1, 1, 6, 8, reference="digital"), 6, 3.0, -32)
    case.a_codes = (np.arange(64)[:, None] >> np.arange(6) & 1).astype(np.uint8).reshape(64, 1, 1, 6)
    weights = 384 * 2 ** np.arange(6).reshape(1, 1, 6, 1) * np.array([1, -1])
    case.cells = weights.astype(np.int32), np.zeros((1, 1, 6), np.int32), 8
    side_by_side = pixels.SideBySide(case.layer(), None)
    assert side_by_side._layout[0].divide
    compare(side_by_side, case)


@pytest.mark.parametrize("rows", [41, 64])
def test_more_channels_than_a_vector_holds(rows):
    """Sets of rows lie in either vector or across both, and do not follow each other in the order of their channels."""
    numbers = np.random.default_rng(0)
    case = extreme_case(CrossbarSpec(2, 2, 1, 4, rows, "im2col"), 70, 1.25, -8)
    case.a_codes = numbers.integers(0, 4, (2, 9, 8, 70), dtype=np.uint8)
    case.w_codes = numbers.integers(0, 4, (5, 70, 1, 2), dtype=np.uint8)
    compare(pixels.SideBySide(case.layer(), None), case)


def test_prepared_for_many_inputs():
    """What is kept of one size of input is not taken for another, be it only of more images."""
    case = extreme_case(CrossbarSpec(2, 2, 1, 4, 16), 5, 1.25, -8)
    case.geometry = Geometry((2, 1), (1, 0, 0, 1))
    side_by_side = pixels.SideBySide(case.layer(), None)
    numbers = np.random.default_rng(0)
    for images, *size in ((3, 9, 8), (5, 9, 8), (2, 9, 8), (3, 8, 9), (3, 9, 8)):
        case.a_codes = numbers.integers(0, 4, (images, *size, 5), dtype=np.uint8)
        compare(side_by_side, case)


@given(case=cases(adc_ranges=["calibrated"], rows=[64]), bits=st.integers(1, 4), lowest=st.integers(1, 8), images=st.integers(1, 9))
@settings(max_examples=120)
def test_converters_that_only_clip(case, bits, lowest, images):
    case.delta, case.q_min = [case.spec.unit] * len(case.delta), [-min(lowest, 2**bits - 1)] * len(case.delta)
    case.spec = type(case.spec)(**{**vars(case.spec), "adc_bits": bits, "dac_bits": 1})
    case.a_codes = case.a_codes.repeat(images, axis=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loud.choice, "fastest_for", lambda *_: "loud")
        patch.setattr(loud, "TOGETHER", 40)  # several work items
        prepared = engine._Prepared(case.layer())
        assume(prepared.apart(case.input()) is prepared.loud)
        found = prepared.simulate(case.input())
    assert found.dtype == torch.int32 and (found.numpy() == wanted(case)).all()


@pytest.mark.parametrize("channels", [63, 64])
def test_converters_that_only_clip_reads_at_the_ends_of_bytes(monkeypatch, channels):
    """Of up to 126, or of 128, which a byte does not hold."""
    monkeypatch.setattr(loud.choice, "fastest_for", lambda *_: "loud")
    case = extreme_case(CrossbarSpec(2, 1, 1, 4, 64), channels, 1.0, -8, zero_code=1)
    prepared = engine._Prepared(case.layer())
    assert (prepared.apart(case.input()) is prepared.loud) == (channels == 63)
    assert (prepared.simulate(case.input()).numpy() == wanted(case)).all()


@given(case=cases(planned="ones", rows=[1, 3, 8, 16, 31, 64, 100]))
@settings(max_examples=60)
def test_plans_by_ones(case):
    assume(case.layer().classes > 2)
    check_pixels(case)


@given(case=grid_cases(kinds=["levels", "negative", "zeros", "constant"], planned="ones"))
@settings(max_examples=30)
def test_plans_by_ones_of_cells(case):
    assume(case.layer().classes > 2)
    check_pixels(case)


@pytest.mark.parametrize("rows, most, served", [(31, 3, True), (63, 8, True), (64, 4, True), (120, 3, True), (128, 3, False)])
def test_what_tables_of_all_classes_hold(rows, most, served):
    """All u of arrays of 63 rows; of more rows those between which codes differ."""
    case = by_ones(dense_case(CrossbarSpec(2, 1, 1, 4, rows), range(rows + 1)), 0, most, (16, 24, 32))
    side_by_side = pixels.SideBySide(case.layer(), None)
    assert (side_by_side._layout is not None) == served
    if served:
        assert side_by_side._layout[0].form == BY_ONES and side_by_side._layout[0].clip == (rows > 63)
        compare(side_by_side, case)
