"""Reads as dense products against the oracle, bit for bit, and the choice between ways."""

import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Case, cases, grid_cases

from models.quant import CrossbarSpec
from models.quant.engines import accumulator_dtype

pytest.importorskip("numba")
from models.quant.engines.cpu import cells, choice, dense, engine  # noqa: E402
from models.quant.spec import Geometry  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def expected(case):
    return oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta, case.q_min,
                             case.bits, case.cells)


def check(case):
    layer, wanted = case.layer(), expected(case)
    found = dense.Dense(layer, None).simulate(case.input())
    assert found.dtype == accumulator_dtype(layer) and found.shape == wanted.shape
    assert (found.numpy() == wanted).all()


@pytest.fixture(autouse=True, scope="module")
def any_number_of_products():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "MOST", 200)
        yield


@given(case=cases(adc_ranges=["calibrated", "full"]), together=st.sampled_from([1, 2**22]))
@settings(max_examples=100)
def test_ideal_cells(case, together):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "TOGETHER", together)
        assume(dense.Dense(case.layer(), None).fits)
        check(case)


@given(case=cases(planned=True))
@settings(max_examples=40)
def test_plans(case):
    assume(dense.Dense(case.layer(), None).fits)
    check(case)


@given(case=grid_cases(adc_ranges=["calibrated", "full"]))
@settings(max_examples=80)
def test_cells_on_a_grid(case):
    assume(dense.Dense(case.layer(), None).fits)
    check(case)


def large_case(spec, largest, channels=128, kernel=(3, 3)):
    """A layer whose codes and weights are the largest, or random."""
    numbers = np.random.default_rng(0)
    a_codes, w_codes = (numbers.integers(0, 2**bits, shape, dtype=np.uint8) for bits, shape in (
        (spec.a_bits, (2, 9, 9, channels)), (spec.w_bits, (16, channels, *kernel))))
    if largest:
        a_codes[:], w_codes[:] = 2**spec.a_bits - 1, 2**spec.w_bits - 1
    slices = len(spec.slice_bits)
    return Case(spec, Geometry(padding=(1, 1, 1, 1)), a_codes, w_codes, [5003.0] * slices, [-2 ** (spec.adc_bits - 1)] * slices)


@pytest.mark.parametrize("mapping, rows", [("im2col", 576), ("im2col", 1000), ("tap", 100)])
@pytest.mark.parametrize("cell_bits", [7, 8])
@pytest.mark.parametrize("largest", [False, True])
def test_reads_that_float32_does_not_hold(mapping, rows, cell_bits, largest):
    """Digits of 8 bits: 1000 rows give reads beyond 2^24; half-scale references need cells of two bytes."""
    check(large_case(CrossbarSpec(8, 8, cell_bits, 8, rows, mapping, dac_bits=8), largest))


@pytest.mark.parametrize("name, taken", [("dense", True), ("by reads", False)])
@pytest.mark.parametrize("chip", [False, True])
def test_the_faster_way_is_taken(monkeypatch, name, taken, chip):
    asked = []
    monkeypatch.setattr(dense, "fastest", lambda key, ways: asked.append((key, set(ways))) or name)
    case = large_case(CrossbarSpec(8, 8, 8, 8, 128, dac_bits=8), False)
    case.delta = [100.0]
    if chip:
        values = np.random.default_rng(1).integers(-1000, 1000, (1, 1, 9 * 128, 16), dtype=np.int32)
        case.cells = values, np.zeros(values.shape[:3], np.int32), 2
    monkeypatch.setattr(dense, "FEWEST", 2 * 81 * 16)
    prepared = cells.Prepared(case.layer()) if chip else engine._Prepared(case.layer())
    assert isinstance(prepared.apart(case.input()), dense.Dense) == taken
    assert (prepared.simulate(case.input()).numpy() == expected(case)).all()
    assert prepared.apart(case.input()[:1]) is None  # too few outputs to ask
    assert {ways for _, names in asked for ways in [tuple(sorted(names))]} == {("by reads", "dense")}
    assert len({key for key, _ in asked}) == 1


def test_the_fastest_way_is_tried_once(monkeypatch):
    monkeypatch.setattr(choice, "_chosen", {})
    clock, called = iter(np.cumsum([0, 1, 0, 9, 0, 3, 0, 4] + [0, 8, 0, 2, 0, 5, 0, 6])), []
    monkeypatch.setattr(choice.time, "perf_counter", lambda: next(clock))
    ways = {"slow": lambda: called.append("slow"), "fast": lambda: called.append("fast")}
    assert choice.fastest("key", ways) == "fast"  # 2 seconds against 3; the first call of each does not count
    assert called == ["slow"] * 4 + ["fast"] * 4
    assert choice.fastest("key", ways) == "fast" and len(called) == 8
    assert choice.fastest("other", {"slow": ways["slow"]}) == "slow" and len(called) == 8
