"""Layers of many small groups on the CPU, bit for bit as the reference engine computes them."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import ACTIVATIONS, CELLS, KERNELS, WEIGHTS, Case, by_ones, codes, geometries, plans, random_cells, ranges, specs

from models.quant import CrossbarSpec, engines
from models.quant.engines.cpu.groups import grouped
from models.quant.kernels.output import ToCodes
from models.quant.arrays.spec import Geometry

pytestmark = pytest.mark.usefixtures("one_thread")
REFERENCE, NUMBA = engines.load("reference"), engines.load("numba")


@st.composite
def cases(draw, adc_ranges=("calibrated",), planned=False, on_grid=None):
    """A layer of 16 and more groups of one channel, or of a few, and one output or a few; arrays of one row among them. Args: planned, the
    adc_plan, or whether it is "significance"."""
    adc_plan = {False: "uniform", True: "significance"}.get(planned, planned)
    spec = draw(specs(list(adc_ranges), rows=[1, 4, 16, 128], adc_plan=adc_plan))
    kernel, groups = draw(st.sampled_from(KERNELS)), draw(st.sampled_from([16, 17, 63, 64, 65, 130]))
    channels, outputs = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 2, 8]))
    geometry = draw(geometries(kernel, groups))
    size = [max(1, d * (k - 1) + 1 - sum(geometry.padding[2 * i:2 * i + 2]) + draw(st.integers(0, 3)))
            for i, (d, k) in enumerate(zip(geometry.dilation, kernel))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    a_codes = codes(draw(st.sampled_from(ACTIVATIONS)), spec.a_bits, (draw(st.integers(1, 2)), *size, channels * groups), rng)
    w_codes = codes(draw(st.sampled_from(WEIGHTS)), spec.w_bits, (outputs * groups, channels, *kernel), rng)
    delta, q_min, bits = draw(plans(spec, kernel, channels)) if planned else (*draw(ranges(spec)), None)
    case = Case(spec, geometry, a_codes, w_codes, delta, q_min, bits, draw(st.sampled_from([None, 2 ** (spec.w_bits - 1) - 1])))
    if draw(st.booleans()) if on_grid is None else on_grid:
        case.cells = random_cells(draw(st.sampled_from(CELLS)), case, rng)
    return case


def prepared(layer):
    found = NUMBA.prepare(layer)
    assert isinstance(found, grouped.Prepared)
    return found


def check(case):
    layer = case.layer()
    assume(grouped.serves(layer))  # cells of 16 bits
    found, wanted = NUMBA.accumulate(prepared(layer), case.input()), REFERENCE.accumulate(layer, case.input())
    assert found.dtype == wanted.dtype == engines.accumulator_dtype(layer)
    assert torch.equal(found, wanted)


@given(case=cases(("calibrated", "full")))
@settings(max_examples=60)
def test_fixed_ranges(case):
    check(case)


@given(case=cases(planned=True))
@settings(max_examples=40)
def test_plans(case):
    check(case)


@given(case=cases(planned="ones"))
@settings(max_examples=80)
def test_plans_by_ones(case):
    check(case)


@given(case=cases(("dynamic",)))
@settings(max_examples=25)
def test_ranges_of_the_batch(case):
    check(case)


@given(case=cases(("calibrated", "ideal")), classes=st.sampled_from(["one", "idle", "ones"]))
@settings(max_examples=60)
def test_histogram(case, classes):
    """Of all reads, of idle ones and others, and by ones."""
    changes = {"one": {}, "idle": {"adc_idle": "skip"}, "ones": {"adc_plan": "ones", "adc_range": "ideal"}}[classes]
    layer = replace(case, spec=replace(case.spec, **changes)).layer()
    low, high = layer.u_span
    assume(grouped.serves(layer) and high - low < 2**18 // layer.classes)
    assert torch.equal(NUMBA.histogram(prepared(layer), case.input()), REFERENCE.histogram(layer, case.input()))


def depthwise(groups=40, mapping="tap", **options):
    rng = np.random.default_rng(0)
    a_codes, w_codes = rng.integers(0, 16, (2, 5, 6, groups), dtype=np.uint8), rng.integers(0, 16, (groups, 1, 3, 3), dtype=np.uint8)
    return Case(CrossbarSpec(4, 4, 1, 2, mapping=mapping, **options), Geometry((2, 1), (1, 1, 1, 1), (1, 1), groups), a_codes, w_codes,
                [0.4] * 4, [-2] * 4)


@pytest.mark.parametrize("stride, dilation", [((1, 1), (1, 1)), ((2, 1), (1, 2)), ((1, 2), (2, 2)), ((2, 2), (1, 1))])
@pytest.mark.parametrize("channels, outputs", [(1, 1), (2, 3)])
def test_histogram_of_windows_that_move_to_the_right(stride, dilation, channels, outputs):
    rng = np.random.default_rng(1)
    a_codes = rng.integers(0, 16, (2, 9, 19, 40 * channels), dtype=np.uint8)
    w_codes = rng.integers(0, 16, (40 * outputs, channels, 3, 5), dtype=np.uint8)
    case = Case(CrossbarSpec(4, 4, 1, 2, rows=1), Geometry(stride, (1, 1, 2, 2), dilation, 40), a_codes, w_codes, [0.4] * 4, [-2] * 4)
    layer = case.layer()
    assert grouped.serves(layer) and layer.tallest == 1
    assert torch.equal(NUMBA.histogram(prepared(layer), case.input()), REFERENCE.histogram(layer, case.input()))


@pytest.mark.parametrize("mapping", ["tap", "im2col"])
@pytest.mark.parametrize("delta", [[0.4] * 4, [0.4, 0.5, 0.4, 0.3]])
def test_outputs_and_codes_of_the_next_layer_are_those_of_the_usual_kernel(monkeypatch, mapping, delta):
    case = replace(depthwise(mapping=mapping), delta=delta)
    layer, numbers = case.layer(), torch.Generator().manual_seed(0)
    scale, offset, gain, shift = (torch.randn(40, generator=numbers) for _ in range(4))
    to_codes = ToCodes(gain.numpy(), shift.numpy(), np.float32(9.0), np.float32(15 / 9))
    values, results = engines.value(layer), []
    for many in (16, 41):
        monkeypatch.setattr(grouped, "MANY", many)
        found = NUMBA.prepare(layer)
        assert isinstance(found, grouped.Prepared) == (many == 16)
        results.append([NUMBA.scaled(found, case.input(), values, scale, offset, target) for target in (None, to_codes)])
    (y, codes_of_y), (usual, usual_codes) = results
    assert torch.equal(y, usual) and torch.equal(codes_of_y, usual_codes) and codes_of_y.unique().numel() > 8  # not all zero


@pytest.mark.parametrize("adc_idle, dac_bits", [("skip", 1), ("convert", 2), ("convert", 4)])
@pytest.mark.parametrize("most, steps, broad", [(4, (16, 48, 64), False), (12, (16, 48, 4096), True)])
def test_every_lane_has_a_class_of_its_own(adc_idle, dac_bits, most, steps, broad):
    """By the count of its own nine taps: under one output pixel all classes occur. Sums that float32 holds, and others."""
    case = depthwise(130, "im2col", rows=16, dac_bits=dac_bits)
    case.a_codes[:] = np.random.default_rng(1).integers(0, 1 + np.arange(130) % 16, case.a_codes.shape)
    if adc_idle == "skip":
        case = replace(case, spec=replace(case.spec, adc_idle="skip"))
    else:
        case = by_ones(case, 0, most, steps)
        assert prepared(case.layer())._static.broad == broad
    wanted = oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta, case.q_min,
                               case.bits)
    assert np.array_equal(NUMBA.accumulate(prepared(case.layer()), case.input()).numpy(), wanted) and len(np.unique(wanted)) > 20


@pytest.mark.parametrize("cell", [4096, -4096])
def test_parts_of_sums_of_rows_that_16_bits_hold(cell):
    """Nine rows, of which eight are 2^15."""
    case = depthwise(mapping="im2col")
    case.cells = np.full((4, 40, 9, 1), cell, np.int32), np.zeros((4, 40, 9), np.int32), 8
    case.a_codes[:] = 15
    layer = case.layer()
    assert torch.equal(NUMBA.accumulate(prepared(layer), case.input()), REFERENCE.accumulate(layer, case.input()))


@pytest.mark.parametrize("code, q_min", [(255, 0), (0, -4095)])
def test_sums_of_single_rows_beyond_32_bits(code, q_min):
    """Nine of them whose reads are all clipped at the same end."""
    case = Case(CrossbarSpec(8, 8, 1, 12, 1), Geometry(groups=16), np.full((1, 3, 3, 16), 255, np.uint8),
                np.full((16, 1, 3, 3), code, np.uint8), [1e-6] * 8, [q_min] * 8)
    found = NUMBA.accumulate(prepared(case.layer()), case.input())
    assert found.dtype == torch.int64 and (found == (9 if code else -9) * 255 * 255 * 4095).all()


@pytest.mark.parametrize("groups, outputs, serves", [(16, 8, True), (15, 1, False), (16, 9, False)])
def test_which_layers_are_many_small_groups(groups, outputs, serves):
    case = depthwise(groups)
    case.w_codes = case.w_codes.repeat(outputs, axis=0)
    assert isinstance(NUMBA.prepare(case.layer()), grouped.Prepared) == serves
