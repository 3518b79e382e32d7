"""Every engine against the oracle, bit for bit; the choice between engines."""

import functools
import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Case, by_ones, cases

import models.quant.engines as engines
from models.quant import CrossbarSpec, Qconv2dDoreFa, QLinearDoreFa, set_engine
from models.quant.arrays import mapping
from models.quant.arrays.converter import Converter
from models.quant.engines.cpu import engine as cpu_engine
from models.quant.engines.cpu.whole import choice, integer, products
from models.quant.engines.cpu.planes import converter
from models.quant.engines.cpu.common import histogram
from models.quant.arrays.spec import Geometry

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
# The Triton engine has a test file of its own.
NAMES = ["reference", "numba"]


class All:
    """All engines as one, for which a case is drawn and the oracle runs once: each must find the same."""

    def __init__(self):
        self.engines = {name: engines.load(name) for name in NAMES}

    def unsupported(self, layer, device):
        return next(filter(None, (engine.unsupported(layer, device) for engine in self.engines.values())), None)

    def prepare(self, layer):
        return {name: engine.prepare(layer) for name, engine in self.engines.items()}

    def accumulate(self, prepared, a_codes):
        return self._same("accumulate", prepared, a_codes)

    def histogram(self, prepared, a_codes):
        return self._same("histogram", prepared, a_codes)

    def scaled(self, prepared, a_codes, *arguments, shift=None):
        found = {name: engines.scaled(engine, prepared[name], a_codes, *arguments, shift) for name, engine in self.engines.items()}
        return self._one_of(found)

    def _same(self, call, prepared, *arguments):
        return self._one_of({name: getattr(engine, call)(prepared[name], *arguments) for name, engine in self.engines.items()})

    @staticmethod
    def _one_of(found):
        first = found[NAMES[0]]
        for name, other in found.items():
            assert other.dtype == first.dtype and torch.equal(other, first), f"{name} and {NAMES[0]} differ"
        return first


@pytest.fixture(scope="module")
def engine():
    return All()


def expected(case):
    return oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta,
                             case.q_min, case.bits)


def accumulators(engine, case):
    layer = case.layer()
    assert engine.unsupported(layer, CPU) is None
    found = engine.accumulate(engine.prepare(layer), case.input())
    assert found.dtype == engines.accumulator_dtype(layer)
    return found.numpy()


def assert_same(found, wanted):
    assert found.shape == wanted.shape
    differ = np.argwhere(found != wanted)
    assert not len(differ), f"{len(differ)} of {wanted.size} differ, first at {differ[0]}"


def check(engine, case):
    assert_same(accumulators(engine, case), expected(case))


@given(case=cases(adc_ranges=["calibrated", "full"]))
@settings(max_examples=200)
def test_static_adc(engine, case):
    check(engine, case)


@given(case=cases(planned=True))
@settings(max_examples=200)
def test_planned_adc(engine, case):
    check(engine, case)


@given(case=cases(planned="ones"))
@settings(max_examples=100)
def test_plans_by_ones(engine, case):
    check(engine, case)


@pytest.mark.parametrize("arrays, step, bits", [(40, 64, 6), (40, 67, 6), (3, 2000, 4)])
def test_sums_by_ones_around_16_bits(arrays, step, bits):
    """What codes are worth is added up in 16 bits for as many arrays as these hold."""
    case = layer_case(CrossbarSpec(1, 2, 1, 6, 64), channels=64 * arrays, out=3, kernel=(1, 1), size=(1, 3), images=1)
    case.a_codes[:, :, 1:], case.w_codes[0], case.w_codes[1] = 3, 1, 0
    case = by_ones(case, 1, bits, (step, 1))
    numba_engine, reads = numba_reads(case)
    assert reads.static.flush.any() == (arrays > 3)
    check(numba_engine, case)


@given(case=cases(planned=True))
@settings(max_examples=100)
def test_planned_adc_without_byte_tables(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, "has_byte_tables", lambda: False)
        numba_engine, reads = numba_reads(case)
        assert reads.static is None or (reads.static.table_ones == -1).all()
        check(numba_engine, case)


@given(case=cases(adc_ranges=["dynamic"]))
@settings(max_examples=200)
def test_dynamic_adc(engine, case):
    check(engine, case)


@given(case=cases(adc_ranges=["ideal"]))
@settings(max_examples=100)
def test_ideal(engine, case):
    check(engine, case)


@given(case=cases(adc_ranges=["full"]))
@settings(max_examples=100)
def test_lossless_reads_add_up_to_the_integer_convolution(engine, case):
    """Through the ADC read by read: a unit step and a code for each value that a read can have change nothing."""
    low, high = case.layer().u_span
    unit, bits = case.spec.unit, (high - low).bit_length()
    assume(bits <= 12)
    case.spec = replace(case.spec, adc_bits=bits)
    case.delta, case.q_min = [unit] * len(case.delta), [low] * len(case.delta)
    sums = accumulators(engine, case)[0] * 2 * unit
    if case.spec.reference == "digital":
        ones = np.ones_like(case.w_codes)
        sums -= sum(r << case.spec.cell_bits * k for k, r in enumerate(case.reference_twice)) * oracle.integer_convolution(
            case.a_codes, ones, case.spec, case.geometry, [1] + [0] * (len(case.delta) - 1))
    wanted = oracle.integer_convolution(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice)
    assert_same(sums, wanted)


def check_histogram(engine, case, most=2**22):
    """Args: most, bins of a histogram."""
    layer = case.layer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "MAX_BINS", most)
        found = engine.histogram(engine.prepare(layer), case.input())
    assert found.dtype == torch.int64
    assert layer.u_span == oracle.u_span(case.w_codes, case.spec, case.reference_twice)
    wanted = oracle.histogram(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, most=most)
    assert_same(found.cpu().numpy(), wanted)


@given(case=cases(adc_ranges=["calibrated", "ideal", "dynamic"]), most=st.sampled_from([2**22, 2**22, 200, 7]))
@settings(max_examples=100)
def test_histogram(engine, case, most):
    low, high = case.layer().u_span
    assume(high - low < 2**20)
    check_histogram(engine, case, most)


@given(case=cases(adc_ranges=["ideal"]), changes=st.sampled_from([{"adc_idle": "skip"}, {"adc_plan": "ones"}]))
@settings(max_examples=60)
def test_histogram_by_classes(engine, case, changes):
    low, high = case.layer().u_span
    assume(high - low < 2**16)
    check_histogram(engine, replace(case, spec=replace(case.spec, **changes)))


def layer_case(spec, channels=70, out=33, kernel=(3, 3), size=(6, 5), images=2, seed=0, **geometry):
    rng = np.random.default_rng(seed)
    groups = geometry.get("groups", 1)
    a_codes = rng.integers(0, 2**spec.a_bits, (images, *size, channels), dtype=np.uint8)
    a_codes[rng.random(a_codes.shape) < 0.6] = 0
    w_codes = rng.integers(0, 2**spec.w_bits, (out, channels // groups, *kernel), dtype=np.uint8)
    slices = len(spec.slice_bits)
    return Case(spec, Geometry(**geometry), a_codes, w_codes, [1.0] * slices, [-2 ** (spec.adc_bits - 1)] * slices)


@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("w_bits, cell_bits", [(8, 1), (8, 3), (4, 1)])
@pytest.mark.parametrize("out", [1, 64, 65, 130, 200, 260, 600])
def test_histogram_of_slices_side_by_side(engine, out, w_bits, cell_bits, reference):
    """Slices of which a block of columns holds several, parts of some, or one alone; of several references, and of fewer bits."""
    spec = CrossbarSpec(w_bits, 2, cell_bits, 6, 32, "im2col", reference, 1, "ideal")
    case = layer_case(spec, channels=6, out=out, size=(3, 4), images=1)
    for zero_code in (None, 2 ** (w_bits - 1) - 1, 2 ** (w_bits - 1) - 2):
        check_histogram(engine, replace(case, zero_code=zero_code))


@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
@pytest.mark.parametrize("mapping", ["tap", "im2col"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("cell_bits", [1, 2, 3, 4])
def test_usual_layer(engine, adc_range, mapping, reference, cell_bits):
    spec = CrossbarSpec(4, 4, cell_bits, 6, 64, mapping, reference, 1, adc_range)
    check(engine, layer_case(spec, padding=(1, 1, 1, 1)))


@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65, 127, 128, 129, 256, 1000, 1024])
@pytest.mark.parametrize("mapping", ["tap", "im2col"])
def test_rows_around_word_boundaries(engine, rows, mapping):
    spec = CrossbarSpec(4, 4, 2, 5, rows, mapping)
    check(engine, layer_case(spec, channels=min(130, 10 * rows), out=9, size=(4, 4), images=1))


@pytest.mark.parametrize("out", [1, 2, 31, 32, 33, 63, 65, 127, 128, 129, 257, 513, 1030])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic"])
@pytest.mark.parametrize("cell_bits", [1, 3])
def test_output_channels_around_vector_boundaries(engine, out, adc_range, cell_bits):
    spec = CrossbarSpec(4, 4, cell_bits, 5, 16, adc_range=adc_range)
    check(engine, layer_case(spec, channels=20, out=out, kernel=(2, 1), size=(3, 2), images=1))


@pytest.mark.parametrize("groups, channels, out", [(2, 130, 6), (5, 15, 20), (16, 16, 16), (16, 16, 48)])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic"])
@pytest.mark.parametrize("mapping", ["tap", "im2col"])
def test_groups_and_depthwise(engine, groups, channels, out, adc_range, mapping):
    spec = CrossbarSpec(rows=32, adc_bits=4, adc_range=adc_range, mapping=mapping)
    case = layer_case(spec, channels, out, groups=groups, padding=(1, 0, 2, 1), stride=(2, 1))
    check(engine, case)
    for most in (2**22, 9):
        check_histogram(engine, case, most)


@pytest.mark.parametrize("mapping", ["tap", "im2col"])
@pytest.mark.parametrize("rows", [4, 16])
def test_planes_of_a_volume(engine, rows, mapping):
    """Each kernel position has arrays of its own in the tap mapping, those one behind the other too."""
    case = layer_case(CrossbarSpec(4, 4, 2, 5, rows, mapping), channels=36, out=6, kernel=(1, 2), size=(3, 3), groups=2, planes=3)
    assert len(case.layer().arrays) == ({4: 12, 16: 6} if mapping == "tap" else {4: 9, 16: 3})[rows]
    check(engine, case)


@pytest.mark.parametrize("images", [1, 2, 5, 9])
def test_images_do_not_mix(engine, images):
    case = layer_case(CrossbarSpec(rows=32), images=images)
    whole = accumulators(engine, case)
    for index in range(images):
        one = replace(case, a_codes=case.a_codes[index:index + 1])
        assert_same(accumulators(engine, one), whole[:, index:index + 1])


@pytest.mark.parametrize("code", [0, 1, 8, 15])
@pytest.mark.parametrize("weight", [0, 15])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
def test_constant_codes(engine, code, weight, adc_range):
    case = layer_case(CrossbarSpec(adc_range=adc_range), padding=(1, 1, 1, 1))
    case.a_codes[:] = code
    case.w_codes[:] = weight
    check(engine, case)


@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_the_largest_sum_is_that_of_weights_of_one_sign(sign):
    weight = np.random.default_rng(0).integers(-128, 128, (5, 600, 3, 3))
    weight = np.where(np.sign(weight) == -sign, weight // 4, weight).clip(-128, 127)
    rows = weight.reshape(5, -1)
    largest = max(rows.clip(min=0).sum(1).max(), -rows.clip(max=0).sum(1).min())
    assert 255 * largest > products.EXACT
    assert products.largest_sum(torch.from_numpy(weight.astype(np.int8)), 255) == 255 * largest


@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
def test_no_overflow_at_the_largest_sums(engine, adc_range, reference):
    """8-bit cells and digits on 1024 rows, everything at its largest, with two outputs of opposite sign."""
    spec = CrossbarSpec(8, 8, 8, 12, 1024, "im2col", reference, 8, adc_range)
    case = layer_case(spec, channels=2048, out=2, kernel=(3, 1), size=(3, 1), images=2)
    case.a_codes[0], case.w_codes[0], case.w_codes[1] = 255, 255, 0
    for delta in (0.5, 16257.3):
        case.delta = [delta]
        check(engine, case)


@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("rows, cell_bits, dac_bits", [
    (255, 7, 1), (257, 7, 1), (258, 7, 1), (259, 7, 1), (128, 1, 8), (129, 1, 8), (520, 3, 3), (521, 6, 1),
    (1024, 5, 1), (1024, 4, 2), (36, 5, 5), (33, 5, 5)])
def test_reads_around_16_bits(engine, rows, cell_bits, dac_bits, reference, adc_range):
    """Reads up to rows (2^d - 1) (2^b - 1), a little below and above 2^15 and 2^16: nowhere do they wrap around."""
    spec = CrossbarSpec(cell_bits, dac_bits, cell_bits, 6, rows, "tap", reference, dac_bits, adc_range)
    largest = rows * (2**dac_bits - 1) * (2**cell_bits - 1)
    case = layer_case(spec, channels=rows, out=3, kernel=(1, 1), size=(3, 2), images=1)
    case.a_codes[:, 0], case.w_codes[0], case.w_codes[1] = 2**dac_bits - 1, 2**cell_bits - 1, 0
    for delta, q_min in ((largest / 64, -32 if reference == "analog" else 0), (3.0, -32), (largest / 10, -5)):
        case.delta, case.q_min = [delta], [q_min]
        check(engine, case)


@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("rows, cell_bits, dac_bits", [
    (254, 1, 1), (256, 1, 1), (260, 1, 1), (300, 1, 1), (510, 1, 1), (86, 2, 1), (120, 2, 1), (37, 3, 1), (60, 3, 2),
    (2, 1, 8), (18, 1, 4), (2, 7, 2)])
def test_large_reads_that_differ_little(engine, rows, cell_bits, dac_bits, reference, adc_range):
    """Nearly all inputs and cells at their largest: reads beyond 2^8 within a span far below it."""
    spec = CrossbarSpec(cell_bits, dac_bits, cell_bits, 5, rows, "tap", reference, dac_bits, adc_range)
    case = layer_case(spec, channels=rows, out=70, kernel=(1, 1), size=(3, 2), images=1)
    rng = np.random.default_rng(0)
    for codes in (case.a_codes, case.w_codes):
        few = rng.random(codes.shape) < 0.03
        codes[:] = np.where(few, codes, codes.max())
    for delta, q_min in ((0.5, -16), (rows * (2**dac_bits - 1) * (2**cell_bits - 1) / 31, 0), (7.0, -1)):
        case.delta, case.q_min = [delta], [q_min]
        check(engine, case)


@pytest.mark.parametrize("arrays, adc_bits", [(520, 6), (521, 6), (128, 8), (129, 8), (130, 8), (1056, 5), (1058, 5)])
@pytest.mark.parametrize("weight", [0, 1])
def test_sums_of_codes_around_16_bits(engine, arrays, adc_bits, weight):
    """Arrays of one row, each at its largest or smallest code: their sum passes 2^15."""
    last = 2**adc_bits - 1
    spec = CrossbarSpec(1, 1, 1, adc_bits, 1)
    case = layer_case(spec, channels=arrays, out=2, kernel=(1, 1), size=(1, 2), images=1)
    case.a_codes[:], case.w_codes[:] = 1, weight
    for q_min in (0, -last, -(last // 2)):
        case.delta, case.q_min = [0.5 / last], [q_min]
        check(engine, case)


@pytest.mark.parametrize("chosen", ["what clips", "every read"])
@pytest.mark.parametrize("cell_bits, reference", [(1, "analog"), (2, "analog"), (2, "digital")])
def test_both_ways_of_converters_that_only_clip(monkeypatch, chosen, cell_bits, reference):
    """Unit steps, of which a random read passes some: by what clipping takes off, and by converting every read."""
    tried = []
    monkeypatch.setattr(cpu_engine, "fastest_for", lambda layer, codes, ways, facts: tried.append(facts) or chosen)
    spec = CrossbarSpec(4, 4, cell_bits, 3, 32, reference=reference)
    case = layer_case(spec, channels=40, out=9, kernel=(3, 3), size=(5, 5), images=2)
    case.delta, case.q_min = [spec.unit] * len(case.delta), [-4 if reference == "analog" else 0] * len(case.delta)
    prepared = cpu_engine._Prepared(case.layer())
    assert_same(prepared.by_columns(case.input()).numpy(), expected(case))
    assert tried and (prepared._adc(case.input()).relative == 0) == (chosen == "every read")


@pytest.mark.parametrize("rows, relative", [(64, True), (65, False)])
def test_what_clipping_takes_off_around_16_bits(rows, relative):
    """Two reads of 255 rows less their codes, 15: 32,610 are taken off, or 33,120."""
    spec = CrossbarSpec(1, 8, 1, 4, rows, reference="digital", dac_bits=8)
    case = layer_case(spec, channels=2 * rows, out=2, kernel=(1, 1), size=(1, 2), images=1)
    case.a_codes[:], case.w_codes[0], case.w_codes[1], case.delta, case.q_min = 255, 1, 0, [1.0], [0]
    numba_engine, reads = numba_reads(case)
    assert bool(reads.static and reads.static.relative) == relative
    check(numba_engine, case)


@pytest.mark.parametrize("arrays", [64, 65, 66, 131, 200])
@pytest.mark.parametrize("groups", [1, 2])
def test_dynamic_sums_around_16_bits(engine, arrays, groups):
    """A read of one output has the largest code, 63, of the largest range, 16: with 66 arrays they pass 16 bits."""
    spec = CrossbarSpec(2, 2, 1, 6, 8, adc_range="dynamic")
    rng = np.random.default_rng(arrays)
    a_codes = rng.integers(0, 4, (3, 1, 1, 8 * arrays * groups), dtype=np.uint8)
    a_codes[0], a_codes[1, ..., ::3] = 3, 0
    a_codes[2, ..., :8 * (arrays // 2)] = 0  # reads without a one
    w_codes = rng.integers(0, 4, (4 * groups, 8 * arrays, 1, 1), dtype=np.uint8)
    w_codes[0::4], w_codes[1::4] = 3, 0
    check(engine, Case(spec, Geometry(groups=groups), a_codes, w_codes, [1.0] * 2, [0] * 2))


def test_dynamic_sums_of_exactly_16_bits(engine):
    """64 arrays of 1024 rows, 1-bit ADC: each read of the first output adds its range, 1024, and all of them 2^16."""
    spec = CrossbarSpec(1, 1, 1, 1, 1024, reference="digital", adc_range="dynamic")
    case = layer_case(spec, channels=64 * 1024, out=2, kernel=(1, 1), size=(1, 1), images=1)
    case.a_codes[:], case.w_codes[0], case.w_codes[1] = 1, 1, 0
    check(engine, case)


@pytest.mark.parametrize("arrays", [8, 9])
@pytest.mark.parametrize("q_min", [0, -4095])
def test_codes_fill_int32_and_go_beyond(engine, arrays, q_min):
    """Every code clipped at +-4095: 8 arrays reach 2,130 million of 2,147, and 9 need int64."""
    spec = CrossbarSpec(8, 8, 1, 12, 4, "tap", "analog")
    case = layer_case(spec, channels=4 * arrays, out=1, kernel=(1, 1), size=(1, 1), images=1)
    case.a_codes[:], case.w_codes[:] = 255, 0 if q_min else 255
    case.delta, case.q_min = [1e-6] * 8, [q_min] * 8
    assert accumulators(engine, case).item() == (-1 if q_min else 1) * arrays * 255 * 255 * 4095


def test_ideal_sums_beyond_int32(engine):
    """The bound of an ideal sum has nothing to do with the bits of the ADC that is not there."""
    spec = CrossbarSpec(8, 8, 8, 1, 1024, adc_range="ideal")
    case = layer_case(spec, channels=40000, out=2, kernel=(1, 1), size=(1, 1), images=1)
    case.a_codes[:], case.w_codes[0], case.w_codes[1] = 255, 255, 0
    assert accumulators(engine, case).ravel().tolist() == [40000 * 255 * 255, -40000 * 255 * 255]


def planned_case(case, bits, delta, q_min=None, adc_max_bits=12):
    """A case with a plan; numbers are broadcast to `[digits, slices]`, a lowest code that is not given is in the middle."""
    spec = replace(case.spec, adc_plan="significance", adc_bits=1, adc_max_bits=adc_max_bits)
    shape = len(spec.digit_bits), len(spec.slice_bits)
    bits, delta = np.broadcast_to(bits, shape), np.broadcast_to(np.asarray(delta, float), shape)
    q_min = -(2**bits // 2) if q_min is None else np.broadcast_to(q_min, shape)
    return replace(case, spec=spec, bits=bits.tolist(), delta=delta.tolist(), q_min=q_min.tolist())


BITS = np.array([[0, 0, 0, 2], [0, 1, 3, 4], [0, 2, 4, 5], [0, 0, 0, 0]])


@pytest.mark.parametrize("mapping", ["tap", "im2col"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("cell_bits, dac_bits", [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_usual_plan(engine, mapping, reference, cell_bits, dac_bits):
    """A slice and a digit without bits; every kind of read has a step of its own. In the 16 bits that are fast."""
    spec = CrossbarSpec(4, 4, cell_bits, 6, 64, mapping, reference, dac_bits)
    case = layer_case(spec, padding=(1, 1, 1, 1), out=66)
    digits, slices = len(spec.digit_bits), len(spec.slice_bits)
    bits = BITS[4 - digits:, -slices:] if digits > 1 else BITS[2:3, -slices:]
    case = planned_case(case, bits, (70 + np.arange(digits * slices).reshape(digits, slices)) / 64,
                        None if reference == "analog" else 0)
    check(engine, case)
    assert numba_reads(case)[1].static is not None
    assert accumulators(engine, case).any()


@pytest.mark.parametrize("bits", [0, 1, 6])
def test_plan_of_the_same_bits_everywhere(engine, bits):
    """With one step and one lowest code it is the ADC of a layer without a plan; without bits nothing is added."""
    plain = layer_case(CrossbarSpec(rows=32, adc_bits=max(bits, 1)), padding=(1, 1, 1, 1))
    plain.delta = [1.25] * 4
    case = planned_case(plain, bits, 1.25, -(2**bits // 2))
    assert_same(accumulators(engine, case), expected(plain) * (80 if bits else 0))
    assert engines.value(case.layer()) == [1 / 32] and case.layer().delta_groups == [(1 / 64, [0, 1, 2, 3])]
    check(engine, case)


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("w_bits, cell_bits, bits", [
    (4, 1, [[5, 0, 4, 5], [0, 3, 3, 3]]), (4, 2, [[0, 4], [5, 5]]), (3, 2, [[0, 0], [5, 1]]), (3, 3, [[2], [5]])])
def test_planned_codes_from_byte_tables_and_from_formulas(monkeypatch, tables, reference, w_bits, cell_bits, bits):
    """All numbers of ones from 0 to 280; kinds without bits do not keep the others from their tables."""
    case = dense_case(CrossbarSpec(w_bits, 2, cell_bits, 5, 280, "tap", reference), range(281))
    case.a_codes[0, 0, ::2, 1::2] = 1  # digits of different counts
    case = planned_case(case, bits, [[45 / 64], [69 / 64]], None if reference == "analog" else 0)
    if tables and not converter.has_byte_tables():
        pytest.skip("this machine has no byte tables")
    if not tables:
        monkeypatch.setattr(converter, "has_byte_tables", lambda: False)
    numba_engine, reads = numba_reads(case)
    assert reads.static is not None
    for ones, of_digit in zip(reads.static.table_ones, bits):
        assert (0 < ones < 280) == (tables and any(of_digit))
    check(numba_engine, case)


@pytest.mark.parametrize("arrays, adc_bits", [(520, 6), (521, 6), (128, 8), (129, 8), (130, 8)])
@pytest.mark.parametrize("weight", [0, 1])
def test_planned_sums_of_codes_around_16_bits(engine, arrays, adc_bits, weight):
    """As without a plan: codes are added in 16 bits before they are multiplied by their steps."""
    case = layer_case(CrossbarSpec(1, 2, 1, 6, 1), channels=arrays, out=2, kernel=(1, 1), size=(1, 2), images=1)
    case.a_codes[:], case.w_codes[:] = 3, weight
    last = 2**adc_bits - 1
    for q_min in (0, -last):
        check(engine, planned_case(case, [[adc_bits], [0]], [[1 / 64], [5.0]], [[q_min], [0]]))


@pytest.mark.parametrize("delta, bits", [(2.0**17, 3), (2.0**30, 1), (2.0**20, 0)])
def test_planned_sums_in_64_bits(engine, delta, bits):
    """Steps far beyond what 32 bits hold, of reads that reach their codes; of kinds without bits they matter to none."""
    spec = CrossbarSpec(8, 8, 8, 6, 1024, "im2col", "analog", 8)
    case = layer_case(spec, channels=2048, out=2, kernel=(3, 1), size=(3, 1), images=2)
    case.a_codes[0], case.w_codes[0], case.w_codes[1] = 255, 255, 0
    case = planned_case(case, bits, delta)
    assert accumulators(engine, case).dtype == np.int64
    check(engine, case)


@pytest.mark.parametrize("rows, cell_bits, dac_bits", [(257, 7, 1), (259, 7, 1), (129, 1, 8), (36, 5, 5), (1024, 4, 2)])
def test_planned_reads_around_16_bits(engine, rows, cell_bits, dac_bits):
    spec = CrossbarSpec(cell_bits, dac_bits, cell_bits, 6, rows, dac_bits=dac_bits)
    case = layer_case(spec, channels=rows, out=3, kernel=(1, 1), size=(3, 2), images=1)
    case.a_codes[:, 0], case.w_codes[0], case.w_codes[1] = 2**dac_bits - 1, 2**cell_bits - 1, 0
    for bits, delta in ((6, 100.5), (4, 3.0), (0, 1.0)):
        check(engine, planned_case(case, bits, delta))


@pytest.mark.parametrize("out", [31, 65, 129, 257, 513])
def test_planned_slices_that_share_blocks_or_fill_several(engine, out):
    """Blocks of 512 columns in which all slices, some of them or none have bits."""
    case = layer_case(CrossbarSpec(4, 4, 1, 5, 16), channels=20, out=out, kernel=(2, 1), size=(3, 2), images=1)
    check(engine, planned_case(case, BITS, 1.5))


@pytest.mark.parametrize("groups, channels, out", [(2, 130, 6), (16, 16, 48)])
def test_planned_groups_and_depthwise(engine, groups, channels, out):
    case = layer_case(CrossbarSpec(rows=32), channels, out, groups=groups, padding=(1, 0, 2, 1), stride=(2, 1))
    check(engine, planned_case(case, BITS, 0.75))


@pytest.mark.parametrize("kind", ["calibrated", "ideal"])
def test_planned_histogram(engine, kind):
    """All reads are counted, those that are not converted too."""
    case = planned_case(layer_case(CrossbarSpec(rows=32)), BITS, 1.5)
    case.spec = replace(case.spec, adc_range=kind, adc_bits=1.5)
    if kind == "ideal":  # as a layer gives it
        case.delta, case.q_min, case.bits = [0.0] * 4, [0] * 4, None
    wanted = oracle.histogram(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice)
    assert_same(engine.histogram(engine.prepare(case.layer()), case.input()).numpy(), wanted)


def test_half_integers_go_to_the_even_code(engine):
    """One word line, 1-bit cells: v is -1/2 or 1/2, and a step of 1 makes both a tie, which goes to 0."""
    spec = CrossbarSpec(1, 1, 1, 6, 1)
    case = Case(spec, Geometry(), np.ones((1, 1, 1, 1), np.uint8), np.array([0, 1], np.uint8).reshape(2, 1, 1, 1),
                [1.0], [-32])
    assert accumulators(engine, case).ravel().tolist() == [0, 0]
    case.spec, case.a_codes, case.w_codes = (
        replace(spec, rows=3), np.ones((1, 1, 1, 3), np.uint8), np.ones((1, 3, 1, 1), np.uint8))
    assert accumulators(engine, case).ravel().tolist() == [2]  # v = 3/2


def test_accumulators_of_each_adc_step(engine):
    """Slices of one step share an accumulator; steps come in the order of the first slice that has them."""
    case = layer_case(CrossbarSpec(rows=32), size=(3, 3))
    case.delta, case.q_min = [2.0, 0.5, 2.0, 1.3], [-32, -1, -63, 0]
    assert case.layer().delta_groups == [(2.0, [0, 2]), (0.5, [1]), (1.3, [3])]
    assert accumulators(engine, case).shape[0] == 3
    assert engines.value(case.layer()) == [4.0, 1.0, 2.6]
    check(engine, case)


def test_accumulators_of_each_adc_step_in_64_bits(engine):
    case = layer_case(CrossbarSpec(8, 8, 4, 12, 4), channels=36, out=3, kernel=(1, 1), size=(3, 3))
    case.delta = [1.0, 0.7]
    found = accumulators(engine, case)
    assert found.dtype == np.int64 and len(found) == 2
    assert_same(found, expected(case))


def test_prepared_weights_serve_many_inputs(engine):
    """Batches of other sizes and heights on one preparation, an input that is not contiguous in memory before."""
    case = layer_case(CrossbarSpec(rows=32), padding=(1, 1, 1, 1))
    prepared = engine.prepare(case.layer())
    for images, size in ((2, (6, 5)), (1, (3, 9)), (4, (7, 3))):
        other = layer_case(case.spec, size=size, images=images, seed=images, padding=(1, 1, 1, 1))
        other.w_codes = case.w_codes
        before = other.a_codes.copy()
        assert_same(engine.accumulate(prepared, other.input()).numpy(), expected(other))
        assert np.array_equal(other.a_codes, before)


def run_layer(name, spec, seed=0):
    torch.manual_seed(seed)
    layer = Qconv2dDoreFa(20, 12, 3, stride=2, padding=1, spec=spec, alpha_init=1.0)
    with torch.no_grad(), set_engine(name):
        return layer(torch.rand(3, 20, 7, 7) * 1.2)


@pytest.mark.parametrize("adc_range", ["full", "dynamic", "ideal"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("name", NAMES)
def test_layer_output_does_not_depend_on_the_engine(name, adc_range, reference):
    spec = CrossbarSpec(4, 4, 3, 4, 16, adc_range=adc_range, reference=reference)
    assert torch.equal(run_layer(name, spec), run_layer("reference", spec))
    assert torch.equal(run_layer("auto", spec), run_layer("reference", spec))


def test_set_engine_as_a_call_and_as_a_context(monkeypatch):
    used = []
    real = engines.choose
    monkeypatch.setattr(engines, "choose", lambda name, *rest: used.append(name) or real(name, *rest))
    layer = QLinearDoreFa(4, 2, spec=CrossbarSpec(adc_range="full"))
    run = lambda: layer(torch.ones(1, 4))
    run()
    with set_engine("reference"):
        run()
    run()
    set_engine("reference")
    run()
    with pytest.raises(RuntimeError), set_engine("auto"):
        run()
        raise RuntimeError
    run()
    assert used == ["auto", "reference", "auto", "reference", "auto", "reference"]


def test_weights_are_prepared_once(monkeypatch):
    """No weight work for each batch, nor for another scale of the same cells; but again when weights, ranges or codes change."""
    reference = engines.load("reference")
    count = []
    monkeypatch.setattr(reference, "prepare", lambda layer: count.append(1) or layer)
    set_engine("reference")
    layer = QLinearDoreFa(6, 3, spec=CrossbarSpec(adc_range="calibrated"), alpha_init=1.0)
    layer.set_ranges([(1.0, -32)] * 4)
    x = torch.rand(2, 6)
    changes = [lambda: layer.weight.mul_(torch.linspace(-1, 1, 6)), lambda: layer.act_quant.act_alpha.mul_(2),
               lambda: layer.set_ranges([(2.0, -32)] * 4), lambda: layer.set_codes(layer.w_codes() ^ 15)]
    with torch.no_grad():
        before = layer(x)
        for number, change in zip((1, 2, 2, 3), changes):
            assert torch.equal(layer(x), before) and len(count) == number
            change()
            after = layer(x)
            assert not torch.equal(after, before)
            before = after
        assert len(count) == 4


def test_unknown_engine_lists_the_known_ones():
    for call in (lambda: set_engine("cuda"), lambda: engines.load("cuda"),
                 lambda: engines.choose("cuda", layer_case(CrossbarSpec()).layer(), CPU)):
        with pytest.raises(engines.EngineError, match="'cuda'.*auto, reference, numba, triton"):
            call()
    assert run_layer("auto", CrossbarSpec(adc_range="full")) is not None


def test_auto_falls_back_and_says_why(monkeypatch):
    def missing(name):
        if name == "numba":
            raise engines.EngineError("engine numba cannot run: no library")
        return real(name)
    real = engines.load
    monkeypatch.setattr(engines, "load", missing)
    module, reason = engines.choose("auto", layer_case(CrossbarSpec()).layer(), CPU)
    assert module.__name__.endswith("reference") and "no library" in reason


def test_auto_takes_a_new_engine_for_its_line_in_the_table(monkeypatch):
    refusal, reference = [], engines.load("reference")
    fast = types.ModuleType("of_somebody_else")
    fast.unsupported = lambda layer, device: refusal[0] if refusal else None
    fast.prepare, fast.accumulate, fast.histogram = reference.prepare, reference.accumulate, reference.histogram
    monkeypatch.setitem(sys.modules, fast.__name__, fast)
    monkeypatch.setattr(engines, "ENGINES", engines.ENGINES | {"fast": engines.Engine(fast.__name__, "cpu")})
    layer = layer_case(CrossbarSpec()).layer()
    assert engines.choose("auto", layer, CPU) == (fast, "fastest for this device")
    assert engines.name_of(fast) == "fast" and engines.load("fast") is fast
    refusal.append("no such rows")
    module, reason = engines.choose("auto", layer, CPU)
    assert engines.name_of(module) == "numba" and reason.endswith("(fast: no such rows)")
    assert engines.choose("auto", layer, torch.device("meta"))[0] is reference  # which is no CPU


def test_number_of_threads_may_change_between_calls(engine):
    """Up and down, with one tall image whose rows the threads share."""
    cases = {kind: layer_case(CrossbarSpec(rows=16, adc_range=kind), channels=9, out=5, size=(40, 2), images=1,
                              kernel=(1, 1)) for kind in ("dynamic", "calibrated")}
    case = cases["calibrated"]
    counts = oracle.histogram(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice)
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            for each in cases.values():
                check(engine, each)
            assert_same(engine.histogram(engine.prepare(case.layer()), case.input()).numpy(), counts)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("delta", [4097.3, 4096.0])
def test_reads_of_millions_of_values(engine, reference, delta):
    case = layer_case(CrossbarSpec(8, 8, 8, 12, 1024, "im2col", reference, 8), channels=1024, out=5, kernel=(1, 1), size=(1, 1))
    case.delta, case.q_min = [delta], [-2000]
    check(engine, case)


def test_threads_that_count_share_a_gigabyte():
    """Each counts for itself; the next call has all of them again."""
    layer = layer_case(CrossbarSpec(8, 8, 4, 6, 128, dac_bits=4)).layer()  # 2 digits, 2 slices
    try:
        torch.set_num_threads(2)
        for count, threads in ((2**24, 2), (2**24 + 1, 1), (2**28, 1), (1, 2)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(histogram.np, "zeros", lambda shape, dtype: shape)
                assert histogram.room_for(layer, mapping.Bins(0, count, 0)) == (threads, 2, 2, 1, count)
    finally:
        torch.set_num_threads(1)


FORKS = """if True:
    import json, os, sys, torch
    for line in sys.stdin:
        if not os.fork():
            code, folder, environment, *files = json.loads(line)
            for number, file in enumerate(files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            sys.exit(exec(code, {}))
        print(os.wait()[1], flush=True)
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """fresh(code, folder, without, variables...): a new process that runs code in a folder, with these variables of the environment and
    without those that begin so. It has imported torch, and nothing else: it is forked from one that did, as that takes seconds."""
    with subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        def fresh(code, folder=ROOT, without="none", **variables):
            files = [str(tmp_path_factory.mktemp("fresh") / name) for name in ("out", "err")]
            environment = {name: value for name, value in os.environ.items() if not name.startswith(without)} | variables
            print(json.dumps([code, str(folder), environment, *files]), file=process.stdin, flush=True)
            status = os.waitstatus_to_exitcode(int(process.stdout.readline()))
            return subprocess.CompletedProcess(code, status, *(Path(file).read_text() for file in files))

        yield fresh


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_run_in_a_child_of_a_process_in_which_they_ran(threads, fresh):
    """In a worker of a DataLoader, in a child and in a thread of its child: the same bits, and none is ended or waits for ever."""
    done = fresh("""
import os, signal, threading, torch
from models.quant import CrossbarSpec, Qconv2dDoreFa, calibrate
signal.alarm(120)
torch.set_num_threads(THREADS)
torch.manual_seed(0)
layer, x = Qconv2dDoreFa(8, 16, 3, spec=CrossbarSpec()).eval(), torch.rand(4, 8, 9, 9)
calibrate(layer, x)
expected = layer(x).detach()

class Outputs(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, number):
        return layer(x).detach()

def child(run):
    if not (pid := os.fork()):
        run()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

def show():
    print(torch.equal(layer(x), expected), flush=True)

[found] = torch.utils.data.DataLoader(Outputs(), batch_size=None, num_workers=1, multiprocessing_context="fork")
print(torch.equal(found, expected), flush=True)
child(lambda: (show(), child(lambda: (thread := threading.Thread(target=show), thread.start(), thread.join()))))
show()
""".replace("THREADS", str(threads)))
    assert done.stdout.split() == ["True", "True", "True", "0", "0", "True"], done.stderr


@pytest.mark.parametrize("threads", [1, 2])
def test_pytorch_keeps_its_number_of_threads(threads, fresh):
    """Numba's first parallel call may set the number for all users of one OpenMP library; a fresh process sees it."""
    program = (f"import torch, models.quant as q\n"
               f"torch.set_num_threads({threads})\n"
               "q.set_engine('numba')\n"
               "q.QLinearDoreFa(4, 2, spec=q.CrossbarSpec(adc_range='full', adc_bits=2))(torch.ones(1, 4))\n"
               "print(torch.get_num_threads())")
    done = fresh(program)
    assert done.returncode == 0 and done.stdout.strip() == str(threads), done.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else True, reason="one core has nothing to share")
def test_threads_that_openmp_binds_to_cores_are_used():
    """It binds the first thread when it is loaded, to one core, and Numba counts the cores that this may use."""
    program = ("import torch, models.quant.kernels.simd as simd, numba\n"
               "torch.set_num_threads(2)\n"
               "simd.set_threads()\n"
               "print(numba.get_num_threads())")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "NUMBA_NUM"))}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment | {"OMP_PROC_BIND": "true", "OMP_NUM_THREADS": "2"},
                          capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr


def test_forced_triton_without_a_gpu_says_why(fresh):
    """In a process of its own: other tests may have switched Triton's interpreter on."""
    program = ("import torch, models.quant as q\n"
               "layer = q.QLinearDoreFa(4, 2, spec=q.CrossbarSpec(adc_range='full'))\n"
               "q.set_engine('triton')\n"
               "layer(torch.ones(1, 4))\n")
    done = fresh(program, without="TRITON_INTERPRET", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "EngineError: engine triton cannot run" in last and len(last) > 60, last


def numba_reads(case):
    """The numba engine, and what it prepared for a layer."""
    numba_engine = engines.load("numba")
    return numba_engine, numba_engine.prepare(case.layer()).reads


def dense_case(spec, ones, seed=0, out=70, **changes):
    """A 1x1 layer of one array; pixel i drives `ones[i]` rows at full scale, beside them outputs of equal cells."""
    case = layer_case(spec, channels=spec.rows, out=out, kernel=(1, 1), size=(1, len(ones)), images=1, seed=seed)
    case.a_codes[:] = 0
    for pixel, n in enumerate(ones):
        case.a_codes[0, 0, pixel, :n] = 2**spec.a_bits - 1
    case.w_codes[0], case.w_codes[1] = 2**spec.w_bits - 1, 0
    return replace(case, **changes)


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("w_bits, cell_bits, delta", [(4, 1, 0.7), (4, 2, 0.8), (3, 2, 1.1), (2, 1, 4.0), (3, 3, 1.3)])
def test_codes_from_byte_tables_and_from_formulas(monkeypatch, tables, adc_range, reference, w_bits, cell_bits, delta):
    """All numbers of ones from 0 to 280: on both sides of where the reads no longer fit in the tables."""
    spec = CrossbarSpec(w_bits, 2, cell_bits, 5, 280, "tap", reference, 1, adc_range)
    case = dense_case(spec, range(281))
    slices = len(spec.slice_bits)
    case.delta = [delta + 0.01 * k for k in range(slices)]
    case.q_min = [-16 - k if reference == "analog" else 0 for k in range(slices)]
    numba_engine, _ = numba_reads(case)
    if tables and not converter.has_byte_tables():
        pytest.skip("this machine has no byte tables")
    if not tables:
        monkeypatch.setattr(converter, "has_byte_tables", lambda: False)
    _, reads = numba_reads(case)
    if adc_range == "calibrated":
        assert (0 < reads.static.table_ones[0] < 280) == tables
    check(numba_engine, case)


@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("cell_bits", [1, 2, 4])
@pytest.mark.parametrize("adc_bits", [4, 5, 6, 7, 8])
def test_byte_tables_have_the_codes_of_every_read(reference, cell_bits, adc_bits):
    """All reads that may take the table, for steps that put the end of the ADC on both sides of the end of the table."""
    spec = CrossbarSpec(4, 4, cell_bits, adc_bits, 280, reference=reference)
    most, tried, case = 2**cell_bits - 1, 0, dense_case(spec, [1], out=2)
    for delta in np.union1d(np.arange(32, 385, 5), np.arange(32, 385, 32)) / 64:
        for q_min in (0, 1 - 2 ** (adc_bits - 1), -(2 ** (adc_bits - 1))):
            case.delta, case.q_min = [delta] * len(case.delta), [q_min] * len(case.delta)
            layer = case.layer()
            table, ones = converter.code_table(layer, 0, 0, 0, False)
            n = np.arange(1, ones + 1)[:, None]
            p = np.minimum(np.arange(most * max(ones, 1) + 1), most * n)
            zero = layer.reference_twice[0] * n if reference == "analog" else np.full_like(n, 2 * converter.CENTRE)
            u = 2 * p - zero if reference == "analog" else p
            up = converter.LAST_CENTRE - zero // 2
            assert p.max(initial=0) < 256 and (up >= 0).all() and (up < 256).all()
            found = table[zero % 2, np.maximum(np.minimum(p + up, 255) - 128, 0)]
            assert (found == Converter(delta, q_min, adc_bits).encode(u, spec.unit)).all(), (delta, q_min)
            tried += u.size
    assert tried


@pytest.mark.parametrize("w_bits, cell_bits", [(4, 1), (4, 2)])
def test_byte_tables_beside_a_reference_of_whole_cells(w_bits, cell_bits):
    """r_k n then passes the largest centre that a table of bytes can have, 192, one by one with 1-bit cells."""
    case = dense_case(CrossbarSpec(w_bits, 1, cell_bits, 5, 210), range(211))
    case.zero_code = 7
    case.delta, case.q_min = [2.0] * len(case.delta), [-16] * len(case.delta)
    check(engines.load("numba"), case)


@pytest.mark.parametrize("delta, q_min, adc_bits", [(1.0, -64, 7), (2.0, -31, 6), (2.046875, -32, 6)])
def test_reads_beyond_the_byte_tables(engine, delta, q_min, adc_bits):
    """Large reads of both parities, of which one reaches the last code at the end of the table and the other behind it."""
    case = layer_case(CrossbarSpec(4, 4, 2, adc_bits, 128), channels=64, out=40)
    case.w_codes[::2] |= 12
    case.w_codes[1::2] &= 3
    case.a_codes[:, ::2] |= 1
    case.a_codes[:, 1::2] |= 2
    case.delta, case.q_min = [delta] * 2, [q_min] * 2
    check(engine, case)


@pytest.mark.parametrize("rows", [360, 1024])
def test_dynamic_reads_below_a_reference_of_whole_cells(engine, rows):
    """P fits in 16 bits, `u = 2 P - 2 r n` does not: SAWB's reference column holds up to 2^b - 1, DoReFa's half of it."""
    case = layer_case(CrossbarSpec(4, 3, 2, 6, rows, "tap", "analog", 3, "dynamic"), channels=rows, out=4, kernel=(1, 1))
    case.zero_code = 7
    case.a_codes[0], case.w_codes[0] = 7, 0
    check(engine, case)


def test_kernels_are_compiled_again_when_a_file_that_they_use_changes(tmp_path, fresh):
    """Numba's cache on disk knows a function's own file only. Here: a helper of `simd` for a kernel of `elementwise`."""
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    code = """if True:
        import torch
        from models.quant.kernels import elementwise
        x = torch.tensor([1.0, 2.0]).bfloat16()
        hits = elementwise._pact_forward.stats.cache_hits
        print(elementwise.pact_forward(x, torch.tensor(3.0), 3).tolist(), sum(hits.values()))
    """
    of_a_type = "elementwise.scaled(torch.ones(1, 1, 1, 1, dtype=torch.int32), x[:1].float(), x[:1].float())"

    def run(more=""):
        done = fresh(f"{code}    {more}", tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert run() == "[1.0, 2.0] 0\n"
    assert run() == "[1.0, 2.0] 1\n"  # kept on disk, and not beside the sources, where they would outlive these
    assert not [*(tmp_path / "models").rglob("*.nb[ic]")] and len([*(tmp_path / "cache" / "torchrram").iterdir()]) == 1
    simd = tmp_path / "models/quant/kernels/simd.py"
    text = simd.read_text()
    line = "return b.bitcast(bits, ir.FloatType())"
    assert line in text
    simd.write_text(text.replace(line, "return ir.Constant(ir.FloatType(), 3.0)"))
    assert run(of_a_type) == "[3.0, 3.0] 0\n"
    for file in (tmp_path / "models").rglob("*.py"):  # what is kept has a type that is there no longer
        file.write_text(file.read_text().replace("ToCodes", "OtherCodes"))
    assert run(of_a_type) == "[3.0, 3.0] 0\n"
    assert len([*(tmp_path / "cache" / "torchrram").iterdir()]) == 3


def test_what_kernels_close_over_is_the_same_in_every_process():
    """It is part of their key in Numba's cache, pickled: of a compiled function that has a number of its own in each process, so that the
    kernel would be compiled in each."""
    from models.quant.engines.cpu.grid import cells_kernel
    from models.quant.engines.cpu.groups import grouped_kernel
    from models.quant.engines.cpu.planes import kernel
    from models.quant.engines.cpu.pixels import pixels_kernel
    for one in [one for room in (kernel, cells_kernel, grouped_kernel, pixels_kernel) for one in room._kernels.values()]:
        closed_over = [cell.cell_contents for cell in one.compiled.py_func.__closure__]
        assert closed_over and all(type(value) in (int, bool) for value in closed_over), one


def test_kernels_run_where_numba_may_write_nowhere(tmp_path, fresh):
    """A read-only installation, no home. A superuser may write anywhere: so a file stands where each folder would be made."""
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [path for path in (tmp_path / "models").rglob("*") if path.is_dir()]:
        (folder / "__pycache__").touch()
    code = """if True:
        import os, pathlib, stat, torch
        from models.quant.kernels import elementwise
        folder = os.environ["NUMBA_CACHE_DIR"]
        print(folder, oct(stat.S_IMODE(os.stat(folder).st_mode)))
        print(elementwise.pact_forward(torch.tensor([1.0, 2.0]), torch.tensor(3.0), 3).tolist())
        from models.quant.kernels import cache
        print(len(list(cache.FOLDER.rglob("*.nbi"))), cache._user_folder() == pathlib.Path(folder) in cache.FOLDER.parents)
    """
    nowhere = str(tmp_path / "models/vgg.py")  # no folder can be made below a file
    done = fresh(code, tmp_path, without="NUMBA_", HOME=nowhere, XDG_CACHE_HOME=nowhere, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    folder, mode, *rest = done.stdout.split()
    assert mode == "0o700" and rest == ["[1.0,", "2.0]", "1", "True"]
    assert Path(folder).parent == tmp_path and not Path(folder).exists()  # gone with the process
    assert done.stderr.count("NUMBA_CACHE_DIR") == 1


@pytest.mark.parametrize("instructions", ["AVX2", "ALL"])
def test_integer_convolution_without_products_of_bytes(instructions, fresh):
    """Largest sums of 5, 6, 7 and 8 bits of weights on a processor whose sums of two products of bytes saturate: beyond 64, which 6
    bits stay below, the library must be found out."""
    code = """if True:
        import torch
        from models.quant import CrossbarSpec, Qconv2dDoreFa
        from models.quant.engines.cpu.whole.integer import IntegerConvolution
        for bits in (5, 6, 7, 8):
            spec = CrossbarSpec(w_bits=bits, a_bits=8, adc_range="ideal")
            for factor, offset, size in ((2, None, 1), (1, 0, 1), (2, None, 2), (1, 0, 2)):
                layer = Qconv2dDoreFa(64, 32, size, bias=False, spec=spec)
                layer.set_codes(torch.full((32, 64, size, size), 2**bits - 1, dtype=torch.uint8))
                convolution = IntegerConvolution(layer.mapped(), factor, offset)
                wanted, codes = 64 * size**2 * 255 * (2**bits - 1), torch.full((2, 8, 8, 64), 255, dtype=torch.uint8)
                assert (convolution(codes) == wanted).all(), (bits, factor)
                print(bits, not any("float" in way for way in convolution.product.ways(codes)))
    """
    done = fresh(code, ONEDNN_MAX_CPU_ISA=instructions)
    assert done.returncode == 0, done.stderr[-2000:]
    served = done.stdout.split()[1::2]
    assert set(served[:8]) == {str(torch.backends.mkldnn.is_available())}
    if instructions == "AVX2" and "True" in served:
        assert set(served[8:]) == {"False"}


@pytest.mark.parametrize("library", ["as it is", "missing", "other", "wrong"])
@pytest.mark.parametrize("geometry", [
    {}, {"padding": (1, 0, 2, 1)}, {"stride": (2, 1), "dilation": (1, 2)}, {"groups": 5}, {"stride": (1, 4)},
    {"kernel": (1, 1)}, {"kernel": (1, 1), "stride": (2, 1)}])
def test_integer_convolution_whatever_the_library_does(monkeypatch, library, geometry):
    """An operator that is not there, or wrong, changes nothing. Stride 4 leaves one column, where oneDNN 3.12 is wrong."""
    right = {way: way.__call__ for way in (products._Matrix, products._Convolution)}

    def wrong(self, x):
        return right[type(self)](self, x) + 1

    def other(self, x):
        raise TypeError("other arguments")

    def missing(*args):
        raise AttributeError("no such operator")

    monkeypatch.setattr(products, "_choose", functools.cache(products._choose.__wrapped__))  # it knows the right library's shapes
    monkeypatch.setattr(choice, "_chosen", {})
    for way in right if library != "as it is" else ():
        monkeypatch.setattr(way, *{"missing": ("__init__", missing), "other": ("__call__", other), "wrong": ("__call__", wrong)}[library])
    case = layer_case(CrossbarSpec(4, 4, 1, 6, adc_range="ideal"), out=35, **geometry)
    convolution = integer.IntegerConvolution(case.layer())
    wanted = oracle.integer_convolution(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice)
    assert not convolution(0 * case.input()).any()  # says nothing about the library
    for _ in range(2):
        found = convolution(case.input())
        assert found.dtype == torch.int32 and found.is_contiguous()
        assert_same(found.numpy(), wanted)
    assert convolution(case.input()[:0]).shape == (0, *found.shape[1:])
    if library != "as it is":
        assert all(name.startswith("float") for name in convolution.product.ways(case.input()))


@pytest.mark.parametrize("reference, whole", [("analog", False), ("analog", True), ("digital", False)])
@pytest.mark.parametrize("w_bits, cell_bits, dac_bits, adc_bits", [(4, 1, 1, 6), (4, 1, 2, 6), (3, 2, 1, 6), (2, 2, 1, 8),
                                                                   (2, 1, 1, 4), (4, 1, 1, 3)])
def test_unit_steps_are_a_convolution_but_for_clipping(reference, whole, w_bits, cell_bits, dac_bits, adc_bits):
    """Reads of every number of ones, so that the first that can clip, the first that does and all beyond are there; with reference
    columns of whole cells, whose reads are whole levels: on both sides of zero, above in some slices and below in others."""
    spec = CrossbarSpec(w_bits, 2, cell_bits, adc_bits, 200, "tap", reference, dac_bits)
    step, slices = 1 + whole, len(spec.slice_bits)
    for zero_code in ([2 ** (w_bits - 1) - 1, 2 ** (w_bits - 1), 0, 1] if whole else [None]):
        case = dense_case(spec, range(201), zero_code=zero_code)
        case.delta = [step * spec.unit] * slices
        for lowest in (-(2 ** (adc_bits - 1)), 0, 1 - 2**adc_bits):
            case.q_min = [max(lowest, 1 - 2**adc_bits) if k % 2 or not whole else 1 - 2**adc_bits - lowest for k in range(slices)]
            numba_engine, reads = numba_reads(case)
            assert reads.static.relative == step
            check(numba_engine, case)


def test_unit_steps_where_float32_does_not_hold_the_convolution():
    spec = CrossbarSpec(8, 8, 1, 4, 64)
    case = layer_case(spec, channels=300, out=66, kernel=(1, 1))
    case.a_codes[0], case.w_codes[0], case.w_codes[1], case.delta = 255, 255, 0, [spec.unit] * 8
    numba_engine, reads = numba_reads(case)
    assert reads.static.relative and reads.convolution.dtype == torch.int32
    check(numba_engine, case)


def test_whole_reference_cells_limit_only_their_side():
    """Reads of slices whose reference column is full lie below zero, those of the others above: few ones cannot clip either."""
    case = dense_case(CrossbarSpec(adc_bits=6), range(129), zero_code=7, delta=[1.0] * 4, q_min=[-63, -63, -63, 0])
    numba_engine, reads = numba_reads(case)
    assert reads.static.quiet.tolist() == [[-126, 126]] * len(case.spec.digit_bits)
    check(numba_engine, case)


@pytest.mark.parametrize("mapping", ["tap", "im2col"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("step, zero_code", [(0.0, None), (1e-6, None), (0.0, 7)])
def test_unit_steps_in_a_usual_layer(mapping, groups, reference, step, zero_code):
    """Padding, strides, groups, arrays of several taps, limits of their own for each slice; a step hardly off the unit."""
    spec = CrossbarSpec(4, 4, 1, 4, 100, mapping, reference)
    case = layer_case(spec, channels=130, out=66, size=(5, 6), padding=(1, 0, 1, 2), stride=(2, 1), groups=groups)
    case = replace(case, zero_code=zero_code)
    whole = zero_code is not None and reference == "analog"
    case.delta, case.q_min = [(1 + whole) * spec.unit + step] * 4, [-8, -7, -9, -8]
    numba_engine, reads = numba_reads(case)
    assert reads.static.relative == 1 + whole
    assert (accumulators(numba_engine, case) != reads.convolution(case.input()).numpy()).any()  # reads do clip
    check(numba_engine, case)


@pytest.mark.parametrize("delta, q_min, adc_bits", [([1.0] * 4, [-32] * 4, 6), ([0.5, 0.5, 0.5, 0.6], [-32] * 4, 6)])
def test_other_steps_are_no_convolution(delta, q_min, adc_bits):
    case = dense_case(CrossbarSpec(adc_bits=adc_bits), range(0, 129, 8), delta=delta, q_min=q_min)
    numba_engine, reads = numba_reads(case)
    assert not reads.static.relative
    check(numba_engine, case)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("w_bits, cell_bits", [(4, 1), (4, 2), (3, 2), (1, 1)])
def test_ranges_of_reads_that_grow_or_shrink(order, reference, w_bits, cell_bits):
    """Extremes that each pixel moves a little, or none after the first does: skipped are only reads that move none."""
    spec = CrossbarSpec(w_bits, 3, cell_bits, 5, 150, "tap", reference, 1, "dynamic")
    case = dense_case(spec, range(151)[::order])
    case.w_codes[0], case.w_codes[1] = case.w_codes[2], case.w_codes[3]
    check(engines.load("numba"), case)
    images = replace(case, a_codes=np.moveaxis(case.a_codes, 2, 0).copy())  # a work item for each
    check(engines.load("numba"), images)


@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
@pytest.mark.parametrize("delta", [[0.5] * 4, [1.0, 0.7, 1.0, 2.0]])
@pytest.mark.parametrize("geometry", [dict(padding=(1, 1, 1, 1)), dict(channels=12, out=9, groups=3)])
def test_scaled_sums(engine, adc_range, delta, geometry):
    """In one pass or several: the sum over the ADC steps in float64, rounded once, times and plus its channel's numbers."""
    case = layer_case(CrossbarSpec(rows=32, adc_range=adc_range), **geometry)
    case.delta = delta
    layer = case.layer()
    scale, offset = (torch.randn(len(layer.w_codes), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    values = engines.value(layer)
    found = engines.scaled(engine, engine.prepare(layer), case.input(), values, scale, offset)
    total = sum(acc.astype(np.float64) * value for acc, value in zip(expected(case), values))
    assert found.dtype == torch.float32
    assert_same(found.numpy(), total.astype(np.float32) * scale.numpy() + offset.numpy())


@pytest.mark.parametrize("values", [[1.0], [1 / 128]])
def test_scaled_sums_without_an_adc(engine, values):
    case = layer_case(CrossbarSpec(rows=32, adc_range="ideal"), padding=(1, 1, 1, 1))
    layer = case.layer()
    scale, offset = (torch.randn(len(layer.w_codes), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    found = engines.scaled(engine, engine.prepare(layer), case.input(), values, scale, offset)
    total = expected(case)[0] * np.float64(values[0])
    assert_same(found.numpy(), total.astype(np.float32) * scale.numpy() + offset.numpy())


@pytest.mark.parametrize("w_bits, a_bits, channels", [(4, 4, 8), (8, 8, 8), (8, 8, 400)])  # 2 W - 255 is no byte; sums beyond 2^24
def test_scaled_sums_with_a_shift(engine, w_bits, a_bits, channels):
    """What an input offset adds is an integer for each channel, added before the sum is rounded to float32."""
    case = layer_case(CrossbarSpec(w_bits, a_bits, adc_range="ideal"), channels, padding=(1, 1, 1, 1))
    if channels == 400:
        case.a_codes[:], case.w_codes[:, ::2] = 255, 255
    layer = case.layer()
    scale, offset = (torch.randn(len(layer.w_codes), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    shift = torch.randint(-2**24, 2**24, (len(layer.w_codes),), generator=torch.Generator().manual_seed(2))
    found = engines.scaled(engine, engine.prepare(layer), case.input(), [1.0], scale, offset, shift)
    total = expected(case)[0].astype(np.int64) + shift.numpy()
    assert_same(found.numpy(), total.astype(np.float32) * scale.numpy() + offset.numpy())


@pytest.mark.parametrize("delta", [1.5, 2.0**20])  # sums in 32 and in 64 bits
@pytest.mark.parametrize("values", [[1.0], [1 / 32]])
def test_scaled_sums_of_a_plan(engine, delta, values):
    case = planned_case(layer_case(CrossbarSpec(rows=32), padding=(1, 1, 1, 1)), BITS, np.where(BITS == 5, delta, 1.25))
    layer = case.layer()
    scale, offset = (torch.randn(len(layer.w_codes), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    found = engines.scaled(engine, engine.prepare(layer), case.input(), values, scale, offset)
    total = expected(case)[0] * np.float64(values[0])
    assert_same(found.numpy(), total.astype(np.float32) * scale.numpy() + offset.numpy())


@pytest.mark.parametrize("w_bits, groups, channels", [(4, 3, 15), (8, 2, 60), (8, 12, 12)])
@pytest.mark.parametrize("factor, offset", [(2, None), (1, 0), (2, 254), (3, 5)])
@pytest.mark.parametrize("exact", [2**16, 2**24])
def test_integer_convolution_in_parts(monkeypatch, w_bits, groups, channels, factor, offset, exact):
    """Weights that are no bytes, and sums so large that the channels are cut into parts; 2^16 stands for a large layer."""
    for module in (integer, products):
        monkeypatch.setattr(module, "EXACT", exact)
    case = layer_case(CrossbarSpec(w_bits, 8), channels, out=24, images=3, padding=(1, 0, 2, 1), stride=(2, 1), dilation=(1, 2),
                      groups=groups)
    case.w_codes[0, :], case.a_codes[0] = 2**w_bits - 1, 255
    convolution = integer.IntegerConvolution(case.layer(), factor, offset)
    found = convolution(case.input())
    assert exact == 2**24 or w_bits == 4 or channels == groups or len(convolution.product.parts) > 1
    whole = oracle.integer_convolution(case.a_codes, case.w_codes, case.spec, case.geometry, [0] * 9)  # sum A 2 W
    ones = oracle.integer_convolution(case.a_codes, np.ones_like(case.w_codes), case.spec, case.geometry, [0] * 9) // 2
    assert_same(found.numpy(), factor * whole // 2 - (case.layer().zero_twice if offset is None else offset) * ones)


@pytest.mark.parametrize("width", [5, 6, 7])
def test_integer_convolution_of_one_bit_where_the_library_is_wrong(width):
    """Outputs one pixel wide, stride 2: what it reads there is chance, and so is whether a trial finds it out."""
    case = layer_case(CrossbarSpec(8, 1, adc_range="ideal"), channels=1, out=8, kernel=(1, 5), size=(3, width), stride=(1, 2))
    for reference in (None, 127):
        case.zero_code = reference
        check(engines.load("numba"), case)
        assert width == 7 or integer.IntegerConvolution(case.layer()).product.ways(case.input()) == ["float64 convolution"]
