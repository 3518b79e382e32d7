"""Cells of a chip: every engine that reads them against the oracle, bit for bit; programming a network; closed forms of what
scatter and faults do to a read."""

import contextlib
import copy
import importlib.util
import math
from dataclasses import replace

import interpreter
import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from scipy import stats
from strategies import Case, grid_cases, random_cells
from torch import nn

import models.quant.engines as engines
from models.quant import (Cells, CrossbarSpec, Device, Qconv2dDoreFa, QLinearDoreFa, calibrate, collect_histograms, crossbar_layers, program,
                          set_engine, set_spec, without_adc)
from models.quant.cells import LARGEST_CELL, fraction_bits
from models.quant.engines import reference as reference_engine
from models.quant.spec import Geometry

ENGINES_WITH_CELLS = ["reference"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=ENGINES_WITH_CELLS, scope="module")
def engine(request):
    name = request.param
    if name != "reference" and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    with interpreter.running() if name == "triton" else contextlib.nullcontext():
        yield interpreter.load() if name == "triton" else engines.load(name)


def device_of(engine):
    return interpreter.DEVICE if engines.name_of(engine) == "triton" else torch.device("cpu")


def fits(engine, case, most=80):
    """Triton's interpreter takes long for many dot products."""
    spec, layer = case.spec, case.layer()
    blocks = sum(-(-(stop - start) // 128) for start, stop in layer.arrays)
    return engines.name_of(engine) != "triton" or interpreter.GPU or (
        2 * blocks * len(spec.digit_bits) * len(spec.slice_bits) * case.geometry.groups * (1 + (spec.dac_bits > 7)) <= most)


def assert_same(found, wanted):
    assert found.shape == wanted.shape
    differ = np.argwhere(found != wanted)
    assert not len(differ), f"{len(differ)} of {wanted.size} differ, first at {differ[0]}"


def check(engine, case):
    layer, device = case.layer(), device_of(engine)
    assert engine.unsupported(layer, device) is None
    found = engine.accumulate(engine.prepare(layer), case.input().to(device))
    assert found.dtype == engines.accumulator_dtype(layer)
    with np.errstate(over="raise"):
        wanted = oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta, case.q_min,
                                   case.bits, case.cells)
    assert_same(found.cpu().numpy(), wanted)


def check_histogram(engine, case):
    layer, device = case.layer(), device_of(engine)
    assert layer.u_span == oracle.cell_span(case.w_codes.shape, case.spec, case.geometry, case.cells)
    found = engine.histogram(engine.prepare(layer), case.input().to(device))
    assert found.dtype == torch.int64
    assert_same(found.cpu().numpy(), oracle.histogram(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice,
                                                      case.cells))


def test_engines_without_cells_say_so():
    layer = layer_case(CrossbarSpec()).layer()
    for name in ("numba", "triton"):
        if name in ENGINES_WITH_CELLS or importlib.util.find_spec(name) is None:
            continue
        assert engines.load(name).unsupported(layer, torch.device("cpu")) == "cells on a grid"


@given(case=grid_cases(adc_ranges=["calibrated", "full"]))
@settings(max_examples=200)
def test_static_adc(engine, case):
    assume(fits(engine, case))
    check(engine, case)


@given(case=grid_cases(planned=True))
@settings(max_examples=100)
def test_planned_adc(engine, case):
    assume(fits(engine, case))
    check(engine, case)


@given(case=grid_cases(adc_ranges=["dynamic"]))
@settings(max_examples=100)
def test_dynamic_adc(engine, case):
    assume(fits(engine, case))
    check(engine, case)


@given(case=grid_cases(adc_ranges=["ideal"]))
@settings(max_examples=100)
def test_ideal(engine, case):
    assume(fits(engine, case))
    check(engine, case)


@given(case=grid_cases(kinds=["near", "levels", "negative", "zeros", "constant"]))
@settings(max_examples=80)
def test_histogram(engine, case):
    low, high = case.layer().u_span
    assume(fits(engine, case) and high - low < 2**19)
    check_histogram(engine, case)


def layer_case(spec, channels=40, out=9, kernel=(3, 3), size=(3, 4), images=2, seed=0, kind="near", **geometry):
    rng = np.random.default_rng(seed)
    a_codes = rng.integers(0, 2**spec.a_bits, (images, *size, channels), dtype=np.uint8)
    a_codes[rng.random(a_codes.shape) < 0.6] = 0
    w_codes = rng.integers(0, 2**spec.w_bits, (out, channels // geometry.get("groups", 1), *kernel), dtype=np.uint8)
    slices = len(spec.slice_bits)
    case = Case(spec, Geometry(**geometry), a_codes, w_codes, [1.0] * slices, [-2 ** (spec.adc_bits - 1)] * slices)
    case.cells = random_cells(kind, case, rng)
    return case


@pytest.mark.parametrize("cell_bits, w_bits", [(1, 4), (2, 4), (3, 4), (4, 4), (5, 5), (6, 8), (7, 7), (8, 8)])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_usual_layer(engine, cell_bits, w_bits, adc_range, reference):
    case = layer_case(CrossbarSpec(w_bits, 4, cell_bits, 6, 64, reference=reference, adc_range=adc_range), padding=(1, 1, 1, 1))
    check(engine, case)


@pytest.mark.parametrize("rows", [31, 32, 33, 127, 128, 129, 260, 1024])
@pytest.mark.parametrize("mapping", ["tap", "im2col"])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic"])
def test_rows_around_the_blocks_of_a_dot_product(engine, rows, mapping, adc_range):
    spec = CrossbarSpec(4, 4, 4, 5, rows, mapping, dac_bits=4, adc_range=adc_range)
    check(engine, layer_case(spec, channels=390, kernel=(1, 3), size=(2, 4)))


@pytest.mark.parametrize("groups, channels, out", [(2, 66, 6), (5, 15, 20), (8, 8, 8)])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
def test_groups_and_depthwise(engine, groups, channels, out, adc_range):
    spec = CrossbarSpec(4, 4, 2, 2, 32, adc_range=adc_range, dac_bits=2)
    case = layer_case(spec, channels, out, kernel=(2, 2), groups=groups, padding=(1, 0, 2, 1), dilation=(1, 2))
    check(engine, case)
    check_histogram(engine, case)


@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("dac_bits", [1, 8])
def test_cells_at_the_end_of_the_grid(engine, adc_range, reference, dac_bits):
    """Reads of up to 2^34, accumulators of 64 bits."""
    spec = CrossbarSpec(8, 8, 8, 8, 100, reference=reference, adc_range=adc_range, dac_bits=dac_bits)
    case = layer_case(spec, channels=150, out=5, kernel=(1, 1), size=(2, 2), images=4)
    rng = np.random.default_rng(1)
    values, line = (rng.integers(-LARGEST_CELL + 1, LARGEST_CELL, part.shape).astype(np.int32) for part in case.cells[:2])
    values[..., 0], line[..., :100], case.a_codes[0] = LARGEST_CELL - 1, 1 - LARGEST_CELL, 255
    case.cells, case.delta = (values, line, 4), [2.0**16 + 0.5]
    assert dac_bits == 1 or max(-case.layer().u_span[0], case.layer().u_span[1]) > 2**31
    check(engine, case)


@pytest.mark.parametrize("out", [1, 31, 33, 65, 129])
def test_output_channels_around_vector_boundaries(engine, out):
    check(engine, layer_case(CrossbarSpec(4, 4, 2, 5, 16), channels=20, out=out, kernel=(2, 1), size=(3, 2), images=1))


def test_accumulators_of_each_adc_step(engine):
    case = layer_case(CrossbarSpec(rows=32), size=(3, 3))
    case.delta, case.q_min = [2.0, 0.5, 2.0, 1.3], [-32, -1, -63, 0]
    check(engine, case)


def test_ties_go_to_the_even_code(engine):
    """One word line whose cells hold odd halves of the step, on either side of zero."""
    halves = np.array([-5, -3, -1, 1, 3, 5], np.int32)
    case = Case(CrossbarSpec(1, 1, 1, 6, 1), Geometry(), np.ones((1, 1, 1, 1), np.uint8), np.ones((6, 1, 1, 1), np.uint8), [0.75],
                [-32], cells=(96 * halves.reshape(1, 1, 1, 6), np.zeros((1, 1, 1), np.int32), 8))
    layer = case.layer()
    found = engine.accumulate(engine.prepare(layer), case.input().to(device_of(engine)))
    assert found.flatten().tolist() == [-2, -2, 0, 0, 2, 2]
    check(engine, case)


def test_prepared_cells_serve_many_inputs(engine):
    case = layer_case(CrossbarSpec(4, 4, 2, 4, 32, dac_bits=2), padding=(1, 1, 1, 1))
    prepared = engine.prepare(case.layer())
    for images, size in ((2, (4, 3)), (1, (3, 5)), (4, (1, 3))):
        other = layer_case(case.spec, size=size, images=images, seed=images, padding=(1, 1, 1, 1))
        before = other.a_codes.copy()
        found = engine.accumulate(prepared, other.input().to(device_of(engine))).cpu().numpy()
        assert_same(found, oracle.accumulate(other.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta,
                                             case.q_min, cells=case.cells))
        assert np.array_equal(other.a_codes, before)


# Programming a network.

EXACT = Device("exact", "here", g_min=2.0, g_max=42.0)
BROAD = Device("broad", "here", g_min=2.0, g_max=42.0, sigma_us=3.0)


@pytest.fixture
def network(tiny):
    """A small VGG with calibrated ADCs, and images."""
    model = tiny(spec=CrossbarSpec(rows=32))
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    calibrate(model, images)
    return model, images


def outputs(model, images):
    with torch.no_grad():
        return model(images)


def values(model):
    return {name: layer.cells().values for name, layer in crossbar_layers(model)}


@pytest.mark.parametrize("on_off", [math.inf, 21, 1.5])
@pytest.mark.parametrize("cell_bits", [1, 3])
@pytest.mark.parametrize("adc_range", ["calibrated", "full", "dynamic", "ideal"])
def test_a_device_without_scatter_gives_ideal_cells(tiny, on_off, cell_bits, adc_range):
    """Bit for bit in the whole network, whatever the off-current: an analog reference takes it away."""
    model = tiny(spec=CrossbarSpec(rows=32, cell_bits=cell_bits, adc_range=adc_range))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    if adc_range == "calibrated":
        calibrate(model, images)
    wanted = outputs(model, images)
    program(model, Device("exact", "here", g_min=0.0 if on_off == math.inf else 30 / on_off, g_max=30.0), seed=3)
    for _, layer in crossbar_layers(model):
        assert torch.equal(layer.chip.cells.values, layer.ideal_cells().values)
        assert torch.equal(layer.chip.cells.reference, layer.ideal_cells().reference)
    assert torch.equal(outputs(model, images), wanted)
