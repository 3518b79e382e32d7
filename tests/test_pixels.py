"""Output pixels side by side, and layers whose converters only clip: against the oracle, bit for bit."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import cases, grid_cases

from models.quant.engines import accumulator_dtype

pytest.importorskip("numba")
from models.quant.engines.cpu import engine, loud, pixels  # noqa: E402
from models.quant.engines.cpu.simd import has_byte_tables  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(not has_byte_tables(), reason="no tables of bytes here")]
ROWS = [1, 3, 8, 16, 31, 64]


def wanted(case):
    return oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta, case.q_min, case.bits,
                             case.cells)


def check_pixels(case):
    layer = case.layer()
    side_by_side = pixels.SideBySide(layer)
    assume(side_by_side._plan is not None)
    found = side_by_side.simulate(case.input(), accumulator_dtype(layer))
    assert found.dtype == accumulator_dtype(layer) and found.shape == wanted(case).shape
    assert (found.numpy() == wanted(case)).all()


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


@given(case=cases(adc_ranges=["calibrated"], rows=[64]), bits=st.integers(1, 4), lowest=st.integers(1, 8), images=st.integers(1, 9))
@settings(max_examples=120)
def test_converters_that_only_clip(case, bits, lowest, images):
    case.delta, case.q_min = [case.spec.unit] * len(case.delta), [-min(lowest, 2**bits - 1)] * len(case.delta)
    case.spec = type(case.spec)(**{**vars(case.spec), "adc_bits": bits, "dac_bits": 1})
    case.a_codes = case.a_codes.repeat(images, axis=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loud, "MOST_CLIPPED", 2.0)
        patch.setattr(loud, "TOGETHER", 40)  # several work items
        prepared = engine._Prepared(case.layer())
        assume(prepared.clips_alone(case.input()))
        found = prepared.simulate(case.input())
    assert found.dtype == torch.int32 and (found.numpy() == wanted(case)).all()
