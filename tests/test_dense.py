"""Reads as dense products against the oracle, bit for bit, and the choice between ways."""

import functools

import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Case, cases, grid_cases

from models.quant import CrossbarSpec
from models.quant.engines import accumulator_dtype

pytest.importorskip("numba")
from models.quant.engines.cpu import cells, dense, engine  # noqa: E402
from models.quant.engines.cpu.whole import choice
from models.quant.engines.cpu.pixels import pixels
from models.quant.kernels.simd import has_byte_tables  # noqa: E402
from models.quant.arrays.spec import Geometry  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def expected(case):
    return oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta, case.q_min,
                             case.bits, case.cells)


def assume_it_fits(case):
    way = dense.Dense(case.layer(), None)
    assume(way._may_run and way._fits)


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
        assume_it_fits(case)
        check(case)


@given(case=cases(planned=True))
@settings(max_examples=40)
def test_plans(case):
    assume_it_fits(case)
    check(case)


@given(case=grid_cases(adc_ranges=["calibrated", "full"]))
@settings(max_examples=80)
def test_cells_on_a_grid(case):
    assume_it_fits(case)
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


@pytest.mark.parametrize("chip", [False, True])
@pytest.mark.parametrize("chosen, wanted", [
    ({"dense"}, "dense"), ({"by reads", "side by side"}, "side by side"), ({"by reads", "by columns"}, "by columns")])
def test_the_fastest_way_is_taken(monkeypatch, chosen, wanted, chip):
    if wanted == "side by side" and not has_byte_tables():
        wanted = "by columns"  # this machine has no other
    asked, taken = {}, []
    case = large_case(CrossbarSpec(4, 4, 2, 5, 128, dac_bits=2), False)
    case.delta = [7.0, 7.0]
    if chip:
        values = 4 * np.random.default_rng(1).integers(-3, 4, (2, 1, 9 * 128, 16), dtype=np.int32)  # whole levels
        case.cells = values, np.zeros(values.shape[:3], np.int32), 2
    monkeypatch.setattr(choice, "FEWEST", 2 * 81 * 16)
    monkeypatch.setattr(choice, "fastest", lambda key, ways: asked.setdefault(key, (set(ways) & chosen).pop()))
    for kind, name in ((dense.Dense, "dense"), (pixels.SideBySide, "side by side")):
        monkeypatch.setattr(kind, "simulate", functools.partialmethod(
            lambda self, *args, run, name, **options: taken.append(name) or run(self, *args, **options), run=kind.simulate, name=name))
    prepared = cells.Prepared(case.layer()) if chip else engine._Prepared(case.layer())
    for _ in range(2):
        assert (prepared.simulate(case.input()).numpy() == expected(case)).all()
    assert set(taken or ["by columns"]) == {wanted}
    questions = len(asked)
    assert questions == (1 if wanted == "dense" or not has_byte_tables() else 2)  # once each
    assert (prepared.simulate(case.input()[:1]).numpy() == expected(case)[:, :1]).all()
    assert len(asked) == questions  # too few outputs to ask


def test_the_fastest_way_is_tried_once(monkeypatch):
    """After a first call, and others only as long as they are not far behind."""
    monkeypatch.setattr(choice, "_chosen", {})
    took = {"slow": [9, 3, 4, 4, 4], "fast": [8, 4, 5, 2, 6], "far": [1, 7]}
    ways = {name: functools.partial(next, iter(seconds)) for name, seconds in took.items()}
    monkeypatch.setattr(choice, "_seconds", lambda run: run())
    assert choice.fastest("key", ways) == "fast"  # 2 seconds against 4; the first call does not count
    assert choice.fastest("key", {}) == "fast" and choice.fastest("other", {"slow": None}) == "slow"
    assert next(ways["slow"].args[0], None) is None and next(ways["far"].args[0], None) is None
