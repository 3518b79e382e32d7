"""Cells of a chip: every engine that reads them against the oracle, bit for bit; programming a network; closed forms of what
scatter and faults do to a read."""

import contextlib
import copy
import hashlib
import importlib.util
import math
import re
import sys
from dataclasses import replace

import interpreter
import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from strategies import Case, grid_cases, random_cells
from torch import nn
from tqdm import tqdm

import models.quant.engines as engines
from models.quant import (Cells, CrossbarSpec, Device, Qconv2dDoreFa, QLinearDoreFa, Wires, calibrate, check_chip, collect_histograms,
                          crossbar_layers, program, set_engine, set_spec, without_adc)
from models.quant.arrays import mapping
from models.quant.arrays.cells import LARGEST_CELL, fraction_bits
from models.quant.engines import reference as reference_engine
from models.quant.arrays.spec import Geometry

ENGINES_WITH_CELLS = ["reference", "numba", "triton"]
REFUSED = "cells too far from their levels for sums of 16 bits"  # by the CPU engine, of random cells that no device makes
if importlib.util.find_spec("triton"):
    interpreter.load()  # before any test imports it
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def all_engines():
    """Those that are installed, for which a case is drawn and the oracle runs once."""
    here = [name for name in ENGINES_WITH_CELLS if name == "reference" or importlib.util.find_spec(name)]
    with interpreter.running() if "triton" in here else contextlib.nullcontext():
        yield [interpreter.load() if name == "triton" else engines.load(name) for name in here]


def device_of(engine):
    return interpreter.DEVICE if engines.name_of(engine) == "triton" else torch.device("cpu")


def fits(engine, case, most=40):
    """Whether the engine runs these cells; and Triton's interpreter takes long for many dot products."""
    spec, layer = case.spec, case.layer()
    if engines.name_of(engine) == "numba":
        return engine.unsupported(layer, device_of(engine)) != REFUSED
    blocks = sum(-(-(stop - start) // 128) for start, stop in layer.arrays)
    return engines.name_of(engine) != "triton" or interpreter.GPU or (
        2 * blocks * len(spec.digit_bits) * len(spec.slice_bits) * case.geometry.groups * (1 + (spec.dac_bits > 7)) <= most)


def those_that_fit(some_engines, case):
    return [engine for engine in some_engines if fits(engine, case)]


def assert_same(engine, found, wanted):
    assert found.shape == wanted.shape
    differ = np.argwhere(found != wanted)
    assert not len(differ), f"{engine.__name__}: {len(differ)} of {wanted.size} differ, first at {differ[0]}"


def check(some_engines, case):
    layer = case.layer()
    wanted = oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta, case.q_min,
                               case.bits, case.cells)
    for engine in some_engines:
        assert engine.unsupported(layer, device_of(engine)) is None
        found = engine.accumulate(engine.prepare(layer), case.input().to(device_of(engine)))
        assert found.dtype == engines.accumulator_dtype(layer)
        assert_same(engine, found.cpu().numpy(), wanted)


def check_histogram(some_engines, case, most=2**22):
    layer = case.layer()
    assert layer.u_span == oracle.cell_span(case.w_codes.shape, case.spec, case.geometry, case.cells)
    wanted = oracle.histogram(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.cells, most)
    for engine in some_engines:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mapping, "MAX_BINS", most)
            found = engine.histogram(engine.prepare(layer), case.input().to(device_of(engine)))
        assert found.dtype == torch.int64
        assert_same(engine, found.cpu().numpy(), wanted)


@given(case=grid_cases(adc_ranges=["calibrated", "full"]))
@settings(max_examples=100)
def test_static_adc(all_engines, case):
    check(those_that_fit(all_engines, case), case)


@given(case=grid_cases(planned=True))
@settings(max_examples=70)
def test_planned_adc(all_engines, case):
    check(those_that_fit(all_engines, case), case)


@given(case=grid_cases(planned="ones"))
@settings(max_examples=100)
def test_plans_by_ones(all_engines, case):
    check(those_that_fit(all_engines, case), case)


@given(case=grid_cases(adc_ranges=["dynamic"]))
@settings(max_examples=70)
def test_dynamic_adc(all_engines, case):
    check(those_that_fit(all_engines, case), case)


@given(case=grid_cases(adc_ranges=["ideal"]))
@settings(max_examples=70)
def test_ideal(all_engines, case):
    check(those_that_fit(all_engines, case), case)


@given(case=st.one_of(*(grid_cases(bits=(2, 3), rows=[64, 128], **options) for options in (
    {"planned": True}, {"adc_ranges": ["calibrated", "full"]}, {"adc_ranges": ["dynamic"]}))))
@settings(max_examples=100)
def test_several_digits_and_slices_on_triton(all_engines, case):
    """Most layers of the tests above have too many arrays, digits and slices for its interpreter."""
    triton = [engine for engine in all_engines if engines.name_of(engine) == "triton"]
    assume(len(case.spec.digit_bits) > 1 and len(case.spec.slice_bits) > 1 and all(fits(engine, case) for engine in triton))
    check(triton, case)


@given(case=grid_cases(kinds=["near", "levels", "negative", "zeros", "constant"]), most=st.sampled_from([2**22, 2**22, 999, 7]))
@settings(max_examples=60)
def test_histogram(all_engines, case, most):
    low, high = case.layer().u_span
    assume(high - low < 2**19)
    check_histogram(those_that_fit(all_engines, case), case, most)


@given(case=grid_cases(kinds=["near", "levels", "negative", "zeros", "constant"], planned="ones"), idle=st.booleans())
@settings(max_examples=40)
def test_histogram_by_ones(all_engines, case, idle):
    """And of two classes, idle reads and others."""
    case.spec = replace(case.spec, adc_range="ideal", **({"adc_plan": "uniform", "adc_idle": "skip"} if idle else {}))
    low, high = case.layer().u_span
    assume(high - low < 2**16)
    check_histogram(those_that_fit(all_engines, case), case)


@pytest.mark.parametrize("engine", ["reference", "numba"])
def test_a_chip_without_scatter_has_the_counts_of_ideal_cells_in_bins_too(engine):
    """1,024 rows, 4-bit cells, 8-bit digits: 8 million values of u, and a thousand million on the grid of 1/256."""
    torch.manual_seed(0)
    layer = QLinearDoreFa(1024, 5, spec=CrossbarSpec(8, 8, 4, 6, 1024, dac_bits=8), alpha_init=1.0).eval()
    program(layer, Device("even", "here", g_min=2.0, g_max=42.0, sigma_us=0.0))
    assert layer.mapped("ideal").bins.shift > 6 and layer.mapped("ideal", None).bins.shift == 1
    x = torch.rand(50, 1024)
    with set_engine(engine):
        nominal, chip = (collect_histograms(layer, x, on)[""] for on in ("nominal", "chip"))
    assert np.array_equal(nominal, chip) and nominal.sum() == 50 * 5 * 2


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
def test_usual_layer(all_engines, cell_bits, w_bits, adc_range, reference):
    spec = CrossbarSpec(w_bits, 4, cell_bits, 6, 64, reference=reference, adc_range=adc_range)
    check(all_engines, layer_case(spec, kernel=(2, 2), padding=(1, 1, 1, 1)))


@pytest.mark.parametrize("rows", [31, 32, 33, 127, 128, 129, 260, 1024])
@pytest.mark.parametrize("mapping", ["tap", "im2col"])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic"])
def test_rows_around_the_blocks_of_a_dot_product(all_engines, rows, mapping, adc_range):
    """Two kernel positions of one whole array and a small rest, or two whole arrays and a rest of both."""
    spec = CrossbarSpec(4, 4, 4, 5, rows, mapping, dac_bits=4, adc_range=adc_range)
    check(all_engines, layer_case(spec, channels=rows + 7, kernel=(1, 2), size=(2, 4)))


@pytest.mark.parametrize("groups, channels, out", [(2, 66, 6), (5, 15, 20), (8, 8, 8)])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
def test_groups_and_depthwise(all_engines, groups, channels, out, adc_range):
    spec = CrossbarSpec(4, 4, 2, 2, 32, adc_range=adc_range, dac_bits=2)
    case = layer_case(spec, channels, out, kernel=(2, 2), groups=groups, padding=(1, 0, 2, 1), dilation=(1, 2))
    check(all_engines, case)
    check_histogram(all_engines, case)


@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("dac_bits", [1, 8])
def test_cells_at_the_end_of_the_grid(all_engines, adc_range, reference, dac_bits):
    """Reads of up to 2^34, accumulators of 64 bits."""
    spec = CrossbarSpec(8, 8, 8, 8, 100, reference=reference, adc_range=adc_range, dac_bits=dac_bits)
    case = layer_case(spec, channels=150, out=5, kernel=(1, 1), size=(2, 2), images=4)
    rng = np.random.default_rng(1)
    values, line = (rng.integers(-LARGEST_CELL + 1, LARGEST_CELL, part.shape).astype(np.int32) for part in case.cells[:2])
    values[..., 0], line[..., :100], case.a_codes[0] = LARGEST_CELL - 1, 1 - LARGEST_CELL, 255
    case.cells, case.delta = (values, line, 4), [2.0**16 + 0.5]
    assert dac_bits == 1 or max(-case.layer().u_span[0], case.layer().u_span[1]) > 2**31
    refused = [engine.unsupported(case.layer(), device_of(engine)) for engine in all_engines]
    assert refused == [REFUSED if engines.name_of(engine) == "numba" else None for engine in all_engines]
    check([engine for engine, why in zip(all_engines, refused) if why is None], case)


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_ranges_of_the_batch_wider_than_31_bits(all_engines, reference, groups):
    """Reads that 32 bits hold, the largest of which lies further than that above the smallest."""
    spec = CrossbarSpec(8, 8, 8, 8, 1024, reference=reference, adc_range="dynamic", dac_bits=8)
    case = layer_case(spec, 600 * groups, 4 * groups, kernel=(1, 1), size=(1, 1), images=3, groups=groups)
    values, line = np.random.default_rng(1).integers(-8190, 8191, case.cells[0].shape).astype(np.int32), np.zeros_like(case.cells[1])
    values[..., 0], values[..., 1], case.a_codes[0] = 8191, -8191, 255
    case.cells = values, line, 4
    low, high = case.layer().u_span
    assert high < 2**31 < high - low
    check(all_engines, case)


@pytest.mark.parametrize("out", [1, 31, 33, 65, 129])
def test_output_channels_around_vector_boundaries(all_engines, out):
    check(all_engines, layer_case(CrossbarSpec(4, 4, 2, 5, 16), channels=20, out=out, kernel=(2, 1), size=(3, 2), images=1))


def test_accumulators_of_each_adc_step(all_engines):
    case = layer_case(CrossbarSpec(rows=32), size=(3, 3))
    case.delta, case.q_min = [2.0, 0.5, 2.0, 1.3], [-32, -1, -63, 0]
    check(all_engines, case)


def test_ties_go_to_the_even_code(all_engines):
    """One word line whose cells hold odd halves of the step, on either side of zero."""
    halves = np.array([-5, -3, -1, 1, 3, 5], np.int32)
    case = Case(CrossbarSpec(1, 1, 1, 6, 1), Geometry(), np.ones((1, 1, 1, 1), np.uint8), np.ones((6, 1, 1, 1), np.uint8), [0.75],
                [-32], cells=(96 * halves.reshape(1, 1, 1, 6), np.zeros((1, 1, 1), np.int32), 8))
    layer = case.layer()
    for engine in all_engines:
        found = engine.accumulate(engine.prepare(layer), case.input().to(device_of(engine)))
        assert found.flatten().tolist() == [-2, -2, 0, 0, 2, 2]
    check(all_engines, case)


def test_prepared_cells_serve_many_inputs(all_engines):
    case = layer_case(CrossbarSpec(4, 4, 2, 4, 32, dac_bits=2), padding=(1, 1, 1, 1))
    prepared = [engine.prepare(case.layer()) for engine in all_engines]
    for images, size in ((2, (4, 3)), (1, (3, 5)), (4, (1, 3))):
        other = layer_case(case.spec, size=size, images=images, seed=images, padding=(1, 1, 1, 1))
        before = other.a_codes.copy()
        wanted = oracle.accumulate(other.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta, case.q_min,
                                   cells=case.cells)
        for engine, own in zip(all_engines, prepared):
            assert_same(engine, engine.accumulate(own, other.input().to(device_of(engine))).cpu().numpy(), wanted)
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


@pytest.mark.parametrize("weights", ["offset", "pair"])
def test_the_progress_of_programming_ends_with_the_last_slice(weights, monkeypatch, capsys):
    bars = []
    monkeypatch.setattr(sys.modules["models.quant.network.program"], "tqdm", lambda **given: bars.append(tqdm(**given | {
        "delay": 0, "mininterval": 0, "leave": True})) or bars[0])
    model = nn.ModuleDict({"a": linear(CrossbarSpec(weights=weights)), "b": linear(CrossbarSpec(cell_bits=2, weights=weights))})
    program(model, BROAD, seed=3, progress=True)
    assert bars[0].n == bars[0].total == sum(len(layer.slice_bits) for layer in model.values())
    assert "programming chip 3" in capsys.readouterr().err


def test_one_seed_is_one_chip(network):
    model, images = network
    program(model, BROAD, seed=5)
    first, seen = values(model), outputs(model, images)
    program(model, BROAD, seed=6)
    assert all(not torch.equal(first[name], other) for name, other in values(model).items())
    assert not torch.equal(outputs(model, images), seen)
    program(model, BROAD, seed=5)
    assert all(torch.equal(first[name], again) for name, again in values(model).items())
    assert torch.equal(outputs(model, images), seen)


@pytest.mark.parametrize("weights, wanted", [
    ("offset", "425bc53d081b57b2716817f3570eb2283f9890277f984295bafc6b4240c6f619"),
    ("pair", "0994e12d3d2847c8cd0655988b665c0b0a180f6712527b32dcd005684a8db2b4")])
def test_a_seed_means_the_same_chip_for_ever(weights, wanted):
    """Results and files name chips by their seeds: whoever changes what a seed draws gives all of them other names."""
    layer = linear(CrossbarSpec(weights=weights, rows=16), 3)
    device = replace(BROAD, stuck_on=0.05, stuck_off=0.1, read_noise=1.0)
    program(nn.ModuleList([layer]), device, seed=12, adc_noise=0.5, adc_offset=0.5, adc_gain=0.05, noise_seed=4)
    cells, readout = layer.cells(), layer.chip.readout
    parts = cells.values, cells.reference, readout.gain, readout.offset, torch.tensor([readout.seed % 2**62])
    drawn = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    assert drawn == wanted


def linear(spec, out=3, channels=40, codes=None, **options):
    layer = QLinearDoreFa(channels, out, bias=False, spec=spec, alpha_init=1.0, **options).eval()
    layer.set_codes(torch.full((out, channels, 1, 1), 5, dtype=torch.uint8) if codes is None else codes)
    return layer


def test_layers_and_slices_differ_and_do_not_depend_on_others():
    """Layers of the same shape and weights; one of them alone, and beside another in any order, has the same cells."""
    spec = CrossbarSpec(w_bits=4, cell_bits=2, adc_range="full")
    codes = torch.full((3, 40, 1, 1), 5, dtype=torch.uint8)  # both slices hold level 1
    alone, both = nn.ModuleDict({"a": linear(spec, codes=codes)}), nn.ModuleDict({"b": linear(spec, 7), "a": linear(spec, codes=codes)})
    same = nn.ModuleDict({name: linear(spec, codes=codes) for name in "ab"})
    for model in (alone, both, same):
        program(model, BROAD, seed=1)
    assert torch.equal(alone["a"].cells().values, both["a"].cells().values)
    assert torch.equal(alone["a"].cells().reference, both["a"].cells().reference)
    assert not torch.equal(same["a"].cells().values, same["b"].cells().values)
    low, high = alone["a"].cells().values
    assert not torch.equal(low, high)


def test_programming_with_none_gives_ideal_cells_again(network):
    model, images = network
    wanted = outputs(model, images)
    program(model, BROAD)
    assert not torch.equal(outputs(model, images), wanted)
    program(model, None)
    assert all(layer.chip is None for _, layer in crossbar_layers(model))
    assert torch.equal(outputs(model, images), wanted)


def test_a_device_of_too_few_levels_changes_no_layer():
    model = nn.ModuleDict({"a": linear(CrossbarSpec(4, 4, 1)), "b": linear(CrossbarSpec(4, 4, 4))})
    program(model, BROAD)
    before = {name: layer.chip for name, layer in model.items()}
    with pytest.raises(ValueError, match="needs 16"):
        program(model, Device("own", "here", g_min=1.0, g_max=3.0, level_values=(1.0, 2.0, 2.5, 3.0)))
    with pytest.raises(ValueError, match="allowed are device, ideal"):
        program(model, BROAD, reference_cells="none")
    assert all(layer.chip is before[name] for name, layer in model.items())


@pytest.mark.parametrize("spec, chip", [
    ({"reference": "digital"}, {}), ({}, dict(adc_noise=0.5, adc_gain=0.1)), ({}, dict(wires=Wires("gate", 2.0))),
    ({}, dict(wires=Wires(wire_ohm=2.0)))], ids=["digital", "converters", "gate", "wires"])
def test_cells_that_are_replaced_leave_the_rest_of_the_chip(spec, chip):
    """What reads have besides, nominal cells for ranges, and whether arrays decide."""
    layer = linear(CrossbarSpec(cell_bits=2, adc_range="full", rows=32, **spec), 6)
    x = torch.rand(9, 40, generator=torch.Generator().manual_seed(0))
    program(nn.ModuleList([layer]), BROAD, 0, **chip)
    before, wanted = layer.chip, layer(x)
    layer.set_cells(layer.cells())
    assert torch.equal(layer(x), wanted) and layer.chip.of_arrays == before.of_arrays == ("wires" in chip)
    layer.set_cells(layer.cells(), None, None)
    assert (layer.chip.nominal, layer.chip.readout) == (None, None)
    program(nn.ModuleList([layer]), None)
    layer.set_cells(before.cells)
    assert (layer.chip.nominal, layer.chip.readout, layer.chip.of_arrays) == (None, None, False)


def test_cells_of_another_shape_or_type_are_refused():
    layer = linear(CrossbarSpec(4, 4, 2))
    own = layer.ideal_cells()
    assert own.values.shape == (2, 1, 40, 3)
    for wrong in (own.values[:1], own.values[:, :, :39], own.values[..., :2], own.values.expand(2, 2, 40, 3)):
        cells = Cells(wrong.contiguous(), torch.zeros(wrong.shape[:3], dtype=torch.int32), 8)
        for given_cells in ((cells, None), (own, cells)):
            with pytest.raises(ValueError, match="slices, groups, rows, outputs of a group"):
                layer.set_cells(*given_cells)
        assert layer.chip is None
    with pytest.raises(ValueError, match="int32 tensor of 4 dimensions"):
        Cells(own.values.long(), own.reference, 8)
    with pytest.raises(ValueError, match="int32 tensor of 3 dimensions"):
        Cells(own.values, own.reference[0], 8)
    with pytest.raises(ValueError, match="the reference has shape"):
        Cells(own.values, own.reference[:, :, :39], 8)
    with pytest.raises(ValueError, match="below 1048576 is expected"):
        Cells(own.values + LARGEST_CELL, own.reference, 8)
    with pytest.raises(ValueError, match="cells reach 1048576; below"):
        Cells(own.values - own.values - LARGEST_CELL, own.reference, 8)
    for wrong in (-1, 13, 8.0, True):
        with pytest.raises(ValueError, match="whole numbers from 0 to 12"):
            Cells(own.values, own.reference, wrong)


@pytest.mark.parametrize("change, kept", [
    (dict(adc_bits=3), True), (dict(rows=8), True), (dict(mapping="im2col"), True), (dict(dac_bits=2), True),
    (dict(adc_range="dynamic"), True), (dict(adc_plan="significance", adc_bits=2.5), True), (dict(cell_bits=2), False),
    (dict(reference="digital"), False), (dict(weights="pair"), False)])
def test_cells_are_kept_where_the_hardware_of_the_slices_is(change, kept):
    layer = linear(CrossbarSpec())
    program(nn.ModuleList([layer]), BROAD)
    chip = layer.chip
    layer.set_spec(replace(layer.spec, **change))
    assert layer.chip is (chip if kept else None)


@pytest.mark.parametrize("options, change", [
    (dict(wires=Wires(wire_ohm=5.0)), dict(rows=8)), (dict(wires=Wires(wire_ohm=5.0)), dict(mapping="im2col")),
    (dict(wires=Wires("gate", 5.0)), dict(dac_bits=2)), (dict(adc_gain=0.1), dict(rows=8)), (dict(adc_offset=0.1), dict(mapping="im2col"))])
def test_chips_of_other_arrays_are_dropped(options, change):
    """Cells behind wires, and converters, of which each array has its own; gate access, whose rows are on or off."""
    layer = linear(CrossbarSpec())
    program(nn.ModuleList([layer]), BROAD, **options)
    chip = layer.chip
    layer.set_spec(replace(layer.spec, adc_bits=3))
    assert layer.chip is chip
    layer.set_spec(replace(layer.spec, **change))
    assert layer.chip is None


def oracle_output(layer, x):
    """`s_a s_w sum A (2 W - L)` of a linear layer without bias as the oracle reads its cells, float64."""
    mapped, spec, cells = layer.mapped(), layer.spec, layer.cells()
    a_codes = layer.a_codes(x).numpy()
    parts = cells.values.numpy(), cells.reference.numpy(), cells.fraction_bits
    acc = oracle.accumulate(a_codes, mapped.w_codes.numpy(), spec, mapped.geometry, mapped.reference_twice, mapped.adc_delta.numpy(),
                            mapped.adc_q_min.numpy(), cells=parts)
    worth = [2 * 2.0**-parts[2]] if spec.adc_range == "ideal" else [2 * step for step in oracle.steps(mapped.adc_delta)]
    total = sum(plane * each for plane, each in zip(acc, worth))
    if spec.reference == "digital" and spec.adc_range != "ideal":
        shares = np.array([2.0 ** (spec.cell_bits * k) for k in range(len(parts[1]))])
        total = total - 2 * 2.0**-parts[2] * (a_codes.astype(np.float64)[:, 0, 0] @ (shares @ parts[1][:, 0]))[:, None, None, None]
    scale = float(layer.act_quant.act_alpha) / layer.act_quant.levels * float(layer.weight_quant.step)
    return torch.from_numpy(total[:, 0, 0] * scale)


@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("adc_range", ["calibrated", "full", "ideal"])
@pytest.mark.parametrize("device", [EXACT, BROAD], ids=["exact", "broad"])
def test_output_of_a_layer(reference, adc_range, device):
    generator = torch.Generator().manual_seed(0)
    spec = CrossbarSpec(4, 4, 2, 7, 32, reference=reference, adc_range=adc_range)
    layer = linear(spec, 6, codes=torch.randint(16, (6, 40, 1, 1), dtype=torch.uint8, generator=generator))
    x = torch.rand(9, 40, generator=generator)
    program(nn.ModuleList([layer]), device, seed=2)
    if adc_range == "calibrated":
        layer.set_ranges([(1.0, -60 if reference == "analog" else 0), (1.5, -31 if reference == "analog" else 0)])
    with torch.no_grad(), set_engine("reference"):
        torch.testing.assert_close(layer(x).double(), oracle_output(layer, x), rtol=1e-5, atol=1e-5)
        if device is EXACT and adc_range == "ideal":  # an off-current is taken away, by whatever reference
            wanted = layer(x)
            program(nn.ModuleList([layer]), None)
            torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("cell_bits", [1, 2, 8])
def test_cells_without_scatter_behind_a_digital_reference(cell_bits):
    """values = 2^F C + Z, reference = 2^F r_k + Z, Z = rint(2^F G_min / dG); DoReFa's r_k is half of the highest level."""
    w_bits = max(cell_bits, 4)
    codes = (torch.arange(120).view(3, 40, 1, 1) * 7 % 2**w_bits).to(torch.uint8)
    layer = linear(CrossbarSpec(w_bits, 4, cell_bits, reference="digital", adc_range="full"), codes=codes)
    program(nn.ModuleList([layer]), EXACT)
    cells, scale = layer.cells(), 2 ** fraction_bits(cell_bits)
    assert scale == (256 if cell_bits <= 4 else 16)
    for k, bits in enumerate(layer.spec.slice_bits):
        off = round(scale * 2 / (40 / (2**bits - 1)))
        digits = codes[:, :, 0, 0].T.int() // 2 ** (cell_bits * k) % 2**bits
        assert torch.equal(cells.values[k, 0], scale * digits + off)
        assert (cells.reference[k] == scale * (2**bits - 1) // 2 + off).all()
    assert torch.equal(layer.chip.nominal.values, cells.values) and torch.equal(layer.chip.nominal.reference, cells.reference)


def test_sawb_has_whole_reference_cells():
    """The digits of the code that stands for zero, 0111 for 4 bits on 1-bit cells."""
    layer = QLinearDoreFa(40, 3, spec=CrossbarSpec(adc_range="full"), wq="sawb")
    twice = layer.weight_quant.reference_twice(layer.spec.slice_bits)
    program(nn.ModuleList([layer]), EXACT)
    assert twice == (2, 2, 2, 0)
    assert layer.cells().reference[:, 0, 0].tolist() == [128 * each for each in twice]


@pytest.mark.parametrize("reference_cells", ["device", "ideal"])
def test_half_a_level_is_the_mean_of_the_ends(reference_cells):
    """Of a cell of the highest and one of the lowest level, wherever the levels between them lie."""
    layer = linear(CrossbarSpec(cell_bits=2))
    program(nn.ModuleList([layer]), Device("own", "here", 0, 9, level_values=(0, 1, 2, 9)), 0, reference_cells)
    assert (layer.cells().reference == 256 * 3 // 2).all()
    program(nn.ModuleList([layer]), Device.preset("techC", "1d"), 0, reference_cells)  # ideal ones do not drift either
    assert (layer.cells().reference == 256 * 3 // 2).all() == (reference_cells == "ideal")


def test_an_ideal_reference_is_the_level_of_zero_on_uneven_levels_too():
    layer = QLinearDoreFa(40, 3, spec=CrossbarSpec(cell_bits=2, adc_range="full"), wq="sawb")
    assert layer.weight_quant.reference_twice(layer.spec.slice_bits) == (6, 2)  # the digits 3 and 1 of the code 7
    program(nn.ModuleList([layer]), Device("own", "here", 1, 40, level_values=(1, 5, 20, 40)), 0, "ideal")
    assert layer.cells().reference[:, 0, 0].tolist() == [3 * 256, 256]
    program(nn.ModuleList([layer]), Device("own", "here", 1, 40, level_values=(1, 5, 20, 40)))  # a cell of level 1
    assert layer.cells().reference[:, 0, 0].tolist() == [3 * 256, round(256 * 4 / 13)]


def test_cells_that_were_measured_together(tmp_path):
    """One row for each weight, of cells that know the weight's other digit: each weight gets its own."""
    (tmp_path / "own.csv").write_text("weight_level,cell0,cell1\n" + "".join(
        f"{w},{10 * (w // 4) + w % 4 + 1},{30 * (w % 4) + 2 * (w // 4) + 1}\n" for w in range(16)))
    device, codes = Device.read(tmp_path / "own.csv"), torch.arange(120).view(3, 40, 1, 1).remainder(16).to(torch.uint8)
    layer, w = linear(CrossbarSpec(cell_bits=2), codes=codes), codes[:, :, 0, 0].T.numpy().astype(int)
    program(nn.ModuleList([layer]), device)
    g_min, step = device.levels(2)[0], device.step(2)
    for k, g in enumerate((30 * (w % 4) + 2 * (w // 4) + 1, 10 * (w // 4) + w % 4 + 1)):  # the last cell of a row is the lowest
        assert np.array_equal(layer.cells().values[k, 0], np.rint(256 * (g - g_min) / step))
    with pytest.raises(ValueError, match=re.escape("rows of cells with (2, 2) or (3, 1) bits, LSB first, not (2,)")):
        check_chip(linear(CrossbarSpec(w_bits=2, cell_bits=2), codes=codes % 4), device)


# Closed forms. Errors are of `u`, in units of the grid: 256 to a level.

MOST = 1e-5  # probability that a test of a right program fails, were its seed drawn anew


def reads_of(layer, a_codes):
    """{(z, k): u of each output, int64 `[outputs]`} of one image, as the reference engine reads the cells."""
    found = {}
    for z, k, u, _ in reference_engine.reads(layer.mapped("ideal"), a_codes.view(1, 1, 1, -1)):
        found[z, k] = found.get((z, k), 0) + u.flatten()
    return found


def assert_variance(errors, wanted):
    """The sample variance of independent Gaussian numbers lies within its chi-square interval."""
    free = len(errors) - 1
    low, high = stats.chi2.ppf([MOST / 2, 1 - MOST / 2], free) / free
    assert low < np.var(errors, ddof=1) / wanted < high


ROWS = 48
DEVIATION = 256 * 3.0 / 40  # of a 1-bit cell of BROAD
GRID = 1 / 12  # variance of a number that is rounded


def sums(dac_bits, seed=0):
    """Codes of one image on ROWS rows, and for each digit the sum of a^2."""
    codes = np.random.default_rng(seed).integers(0, 16, ROWS)
    digits = [codes // 2**low % 2**dac_bits for low in range(0, 4, dac_bits)]
    return torch.from_numpy(codes.astype(np.uint8)), [int(digit @ digit) for digit in digits]


@pytest.mark.parametrize("dac_bits", [1, 2])
def test_variance_of_columns(dac_bits):
    """`sum a^2 s^2` over the columns of one chip, whose reference is ideal."""
    layer = linear(CrossbarSpec(dac_bits=dac_bits, adc_range="ideal"), 3000, ROWS)
    a_codes, squares = sums(dac_bits)
    ideal = reads_of(layer, a_codes)
    program(nn.ModuleList([layer]), BROAD, seed=1, reference_cells="ideal")
    for (z, k), u in reads_of(layer, a_codes).items():
        errors = (u - ideal[z, k] * 128).double().numpy()
        assert abs(errors.mean()) < 5 * math.sqrt(squares[z] * (DEVIATION**2 + GRID) / len(errors))
        assert_variance(errors, squares[z] * (DEVIATION**2 + GRID))


@pytest.mark.parametrize("wq, share", [("dorefa", 1 / 2), ("sawb", 1)])
@pytest.mark.parametrize("cell_bits", [1, 2])
def test_variance_over_chips_has_the_reference_in_it(wq, share, cell_bits):
    """A half-level reference is the mean of two cells: half the variance of one, that of a whole level; a column adds its own cells'."""
    layer = linear(CrossbarSpec(cell_bits=cell_bits, adc_range="ideal"), 2, ROWS, wq=wq)
    a_codes, squares = sums(1)
    unit, deviation = round(256 * layer.mapped("ideal").unit), DEVIATION * (2**cell_bits - 1)
    ideal, found = reads_of(layer, a_codes), []
    for seed in range(400):
        program(nn.ModuleList([layer]), BROAD, seed)
        found.append(reads_of(layer, a_codes))
    for (z, k), u in ideal.items():
        errors = np.array([(chip[z, k] - u * unit).tolist() for chip in found])
        own, common = deviation**2 + GRID, deviation**2 * share + GRID
        assert_variance(errors[:, 0], squares[z] * (own + common))
        assert_variance(errors[:, 0] - errors[:, 1], squares[z] * 2 * own)  # all columns of an array share its reference


@pytest.mark.parametrize("on, off", [(0.0, 0.1), (0.05, 0.0), (0.1, 0.2)])
def test_mean_of_stuck_cells(on, off):
    """`E[du] = sum a (p_on (x_on - x) + p_off (x_off - x))`, on 2-bit cells."""
    codes = torch.randint(16, (1, ROWS, 1, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layer = linear(CrossbarSpec(cell_bits=2, adc_range="ideal"), 2000, ROWS, codes=codes.repeat(2000, 1, 1, 1))
    a_codes, _ = sums(1)
    ideal = reads_of(layer, a_codes)
    program(nn.ModuleList([layer]), replace(EXACT, stuck_on=on, stuck_off=off), seed=4, reference_cells="ideal")
    for (z, k), u in reads_of(layer, a_codes).items():
        a, x = a_codes.numpy() >> z & 1, codes.flatten().numpy() >> 2 * k & 3
        error = (u - ideal[z, k] * 128).double().numpy() / 256
        wanted = float(a @ (on * (3.0 - x) + off * (0.0 - x)))
        assert abs(error.mean() - wanted) < 5 * error.std() / math.sqrt(len(error))


@pytest.mark.parametrize("wq", ["dorefa", "sawb"])
@pytest.mark.parametrize("device", [Device.preset("techC", "1d"), replace(EXACT, stuck_on=0.05, stuck_off=0.2)], ids=["drift", "faults"])
def test_a_reference_drifts_and_fails_as_its_cells_do(device, wq):
    """In the mean over its rows it is that of its cells: one of the whole level of zero, or one each of the ends."""
    layer = QLinearDoreFa(4000, 2, spec=CrossbarSpec(cell_bits=2, adc_range="ideal", rows=1000), wq=wq)
    program(nn.ModuleList([layer]), device, seed=2)
    g = device.levels(2)
    step, share = (g[3] - g[0]) / 3, device.stuck_on + device.stuck_off
    mean = (device.mean(g) * (1 - share) + device.stuck_on * g[3] + device.stuck_off * g[0] - g[0]) / step
    for k, twice in enumerate(layer.weight_quant.reference_twice((2, 2))):
        wanted = mean[twice // 2] if wq == "sawb" else (mean[0] + mean[3]) / 2
        found = layer.cells().reference[k, 0].double() / 256
        assert abs(float(found.mean()) - wanted) < 5 * float(found.std()) / math.sqrt(len(found)) < 0.1
        assert abs(wanted - twice / 2) > 0.02  # so this says something


def test_cells_of_taps_groups_and_slices_are_draws_of_their_own():
    """No two of them go together: correlations within five standard errors."""
    layer = Qconv2dDoreFa(64, 100, 3, groups=2, bias=False, spec=CrossbarSpec(adc_range="ideal", rows=16), alpha_init=1.0)
    ideal = layer.ideal_cells()
    program(nn.ModuleList([layer]), BROAD, seed=3)
    errors = (layer.cells().values - ideal.values).numpy().reshape(4 * 2 * 9, 32 * 50)  # slice, group and tap; row and output
    found = np.corrcoef(errors) - np.eye(len(errors))
    assert np.abs(found).max() < 5 / math.sqrt(errors.shape[1])
    beside = (layer.cells().reference - ideal.reference).numpy().reshape(4 * 2 * 9, 32)
    assert np.abs(np.corrcoef(beside) - np.eye(len(beside))).max() < 5 / math.sqrt(32)


@pytest.mark.parametrize("mapping", ["tap", "im2col"])
def test_a_map_of_stuck_cells_is_that_of_every_array(mapping):
    """By word line and output, anew where an array is larger than the map; reference columns are not on it."""
    spec = CrossbarSpec(w_bits=2, adc_range="ideal", rows=6, mapping=mapping)
    layer = Qconv2dDoreFa(8, 10, 3, groups=2, bias=False, spec=spec, alpha_init=1.0)
    mask = np.random.default_rng(0).choice([-1, 0, 1], (4, 3))
    program(nn.ModuleList([layer]), replace(EXACT, stuck_mask=mask))
    held, ideal = (cells.values.numpy() // 256 for cells in (layer.cells(), layer.ideal_cells()))
    assert torch.equal(layer.cells().reference, layer.ideal_cells().reference)
    for start, stop in layer.arrays:
        for row, output in np.ndindex(stop - start, 5):
            stuck = mask[row % 4, output % 3]
            wanted = ideal[:, :, start + row, output] if stuck == 0 else int(stuck > 0)
            assert (held[:, :, start + row, output] == wanted).all()


def test_a_map_of_stuck_cells_is_one_of_its_layer():
    """Of pairs it has both lines; it is no map of other arrays, so its chip stays on none."""
    layer = linear(CrossbarSpec(), 4)
    network, mask = nn.ModuleList([layer]), np.zeros((ROWS, 4), np.int8)
    for weights, shape, wanted in (("offset", (ROWS, 4, 2), r"of cells beside a reference \[word line, output\]"),
                                   ("pair", (ROWS, 4), r"of pairs \[word line, output, 2\]"), ("pair", (ROWS, 4, 3), "of pairs")):
        layer.set_spec(CrossbarSpec(weights=weights))
        with pytest.raises(ValueError, match=wanted):
            program(network, replace(EXACT, stuck_mask=np.zeros(shape, np.int8)))
    layer.set_spec(CrossbarSpec())
    program(network, replace(EXACT, stuck_mask=mask))
    layer.set_spec(CrossbarSpec(adc_bits=5))
    assert layer.chip
    layer.set_spec(CrossbarSpec(adc_bits=5, rows=ROWS // 2))
    assert layer.chip is None


@pytest.mark.parametrize("device, seed, message", [("techA", 0, "device is 'techA'; a Device is expected"), (EXACT, -1, "seed is -1"),
                                                   (EXACT, 1.5, "seed is 1.5; allowed are whole numbers"), (EXACT, True, "seed is True")])
def test_what_is_no_chip_is_refused(device, seed, message):
    with pytest.raises(ValueError, match=message):
        program(nn.ModuleList([linear(CrossbarSpec(), 4)]), device, seed)


@pytest.mark.parametrize("code, ratio", [(15, 225 / 85), (5, 25 / 17), (8, 1.0)])
def test_all_digits_of_an_input_see_the_same_error(code, ratio):
    """Against cells that are drawn anew for each digit, `(sum 2^z a_z)^2 / sum 4^z a_z` times the variance."""
    layer = linear(CrossbarSpec(4, 4, 4, adc_range="ideal"), 4000, ROWS)
    a_codes = torch.full((ROWS,), code, dtype=torch.uint8)
    ideal, chips = reads_of(layer, a_codes), []
    for seed in range(4):
        program(nn.ModuleList([layer]), BROAD, seed, reference_cells="ideal")
        chips.append({z: (u - ideal[z, k] * 128).double().numpy() for (z, k), u in reads_of(layer, a_codes).items()})
    static = sum(2.0**z * chips[0][z] for z in range(4))
    anew = sum(2.0**z * chips[z][z] for z in range(4))
    low, high = stats.f.ppf([MOST / 2, 1 - MOST / 2], len(static) - 1, len(anew) - 1)
    assert low * ratio < static.var() / anew.var() < high * ratio


# What else knows of a chip.

def test_ranges_are_chosen_on_the_chip_or_at_design_time(network):
    model, images = network
    nominal = collect_histograms(model, images)
    program(model, EXACT)
    for on in ("nominal", "chip"):
        found = collect_histograms(model, images, on)
        assert all(np.array_equal(found[name], counts) for name, counts in nominal.items())
    program(model, BROAD, seed=1)
    found = collect_histograms(model, images)
    assert all(np.array_equal(found[name], counts) for name, counts in nominal.items())
    found = collect_histograms(model, images, "chip")
    assert all(counts.sum() == nominal[name].sum() for name, counts in found.items())
    assert any(not np.array_equal(counts, nominal[name]) for name, counts in found.items())


@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_counts_on_the_chip_are_those_of_its_reads(reference):
    """In the nearest bin of ideal cells, the outermost for reads beyond; with a digital reference, where an off-current takes reads
    far beyond, each in a bin of its own."""
    spec = CrossbarSpec(4, 4, 2, 4, 32, reference=reference)
    layer, x = linear(spec, 6), torch.rand(9, 40, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(layer)
    program(model, replace(BROAD, stuck_on=0.2), seed=2)
    cells, digital = layer.cells(), reference == "digital"
    mapped = layer.mapped("ideal", cells if digital else None)
    a_codes, (low, high) = layer.a_codes(x).numpy(), mapped.u_span
    wanted = np.zeros((4, 2, 1, high - low + 1), np.int64)
    for _, _, z, k, u in oracle.cell_reads(a_codes, (1, 1), spec, mapped.geometry,
                                           (cells.values.numpy(), cells.reference.numpy(), cells.fraction_bits)):
        nearest = u if digital else np.rint(u / 256 * 2).astype(int)
        np.add.at(wanted[z, k, 0], np.clip(nearest, low, high) - low, 1)
    assert np.array_equal(collect_histograms(model, x, "chip")["0"], wanted)
    calibrate(model, x, on="nominal")
    before = layer.adc_delta.clone(), layer.adc_q_min.clone()
    calibrate(model, x, on="chip")
    assert not (torch.equal(layer.adc_delta, before[0]) and torch.equal(layer.adc_q_min, before[1]))


def test_the_correction_is_measured_on_the_chip(network):
    model, images = network
    before = [layer.adc_gain.clone() for _, layer in crossbar_layers(model)]
    program(model, BROAD, seed=1)
    calibrate(model, images)
    assert any(not torch.equal(layer.adc_gain, gain) for (_, layer), gain in zip(crossbar_layers(model), before))


def test_software_knows_no_chip(network):
    model, images = network
    with without_adc(model):
        wanted = outputs(model, images)
    program(model, BROAD)
    chips, on_chip = [layer.chip for _, layer in crossbar_layers(model)], outputs(model, images)
    with without_adc(model):
        assert torch.equal(outputs(model, images), wanted)
    assert all(layer.chip is chip for (_, layer), chip in zip(crossbar_layers(model), chips))
    assert torch.equal(outputs(model, images), on_chip)


def test_a_copy_has_the_same_chip_and_its_own(network):
    model, images = network
    program(model, BROAD)
    wanted, twin = outputs(model, images), copy.deepcopy(model)
    assert torch.equal(outputs(twin, images), wanted)
    program(model, None)
    assert torch.equal(outputs(twin, images), wanted)
    assert not torch.equal(outputs(model, images), wanted)


def test_a_state_dict_holds_no_chip_and_loading_weights_drops_it(network):
    model, images = network
    wanted, keys = outputs(model, images), set(model.state_dict())
    program(model, BROAD)
    state = model.state_dict()
    assert set(state) == keys
    model.load_state_dict(state)
    assert all(layer.chip is None for _, layer in crossbar_layers(model))
    assert torch.equal(outputs(model, images), wanted)


def test_another_spec_for_the_whole_network_keeps_or_drops_its_chip(network):
    model, _ = network
    program(model, BROAD)
    set_spec(model, CrossbarSpec(rows=16, adc_bits=4))
    assert all(layer.chip is not None for _, layer in crossbar_layers(model))
    set_spec(model, CrossbarSpec(cell_bits=2))
    assert all(layer.chip is None for _, layer in crossbar_layers(model))


@pytest.mark.parametrize("adc_range", ["full", "dynamic", "ideal"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_layer_output_does_not_depend_on_the_engine(all_engines, adc_range, reference):
    for engine in all_engines:
        found = []
        for name in (engines.name_of(engine), "reference"):
            torch.manual_seed(0)
            spec = CrossbarSpec(4, 4, 3, 4, 16, adc_range=adc_range, reference=reference)
            layer = Qconv2dDoreFa(20, 12, 3, stride=2, padding=1, spec=spec, alpha_init=1.0)
            x = torch.rand(2, 20, 5, 5) * 1.2
            program(nn.ModuleList([layer]), BROAD)
            with torch.no_grad(), set_engine(name):
                found.append(layer.to(device_of(engine))(x.to(device_of(engine))))
        assert torch.equal(*found), engines.name_of(engine)


@pytest.mark.parametrize("adc_range", ["full", "calibrated"])
def test_a_range_holds_the_off_current_that_a_digital_reference_leaves(adc_range):
    """With an on/off ratio of 2 every row that is on adds a level; ranges of ideal cells would clip most reads (71 and more)."""
    spec = CrossbarSpec(4, 4, 1, 8, 128, reference="digital", adc_range=adc_range)
    layer, x = linear(spec, 6), torch.rand(64, 40, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(layer)
    with without_adc(model):
        wanted = model(x)
    program(model, Device("own", "here", 10.0, 20.0))
    if adc_range == "calibrated":
        calibrate(model, x)
    assert float((model(x) - wanted).square().mean() / wanted.var()) < 0.05
