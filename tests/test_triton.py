"""The Triton engine against the oracle, bit for bit: without a GPU in Triton's interpreter, on one with more shapes."""

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import interpreter
import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from interpreter import DEVICE, GPU, running
from strategies import Case, by_ones, cases, random_cells, ranges, specs

import models.quant.engines as engines
from models.quant import CrossbarSpec, Qconv2dDoreFa, calibrate, set_engine
from models.quant.arrays import adc, mapping
from models.quant.arrays.converter import Converter
from models.quant.arrays.mapping import MappedLayer, u_range
from models.quant.arrays.spec import Geometry

ROOT = Path(__file__).resolve().parents[1]
with interpreter.chosen():  # Triton itself defines kernels, too
    triton = pytest.importorskip("triton", reason="triton is not installed")
    triton_gpu = interpreter.load()
    from models.quant.engines.gpu import triton_conversion, triton_kernel, triton_tile
    import triton.language as tl

    @triton.jit
    def divide(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < n)
        tl.store(out_ptr + index, triton_tile.divide(x, tl.load(y_ptr)), mask=index < n)

    @triton.jit
    def convert(u_ptr, adc_ptr, out_ptr, n, MODE: tl.constexpr, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        u = tl.load(u_ptr + index, mask=index < n)
        code = triton_kernel._corrected(u, adc_ptr, 0) if MODE == "static" else triton_tile.exact_code(u, adc_ptr, 0)
        tl.store(out_ptr + index, code, mask=index < n)


@pytest.fixture(scope="module", autouse=True)
def in_interpreter():
    with running():
        yield


pytestmark = pytest.mark.usefixtures("one_thread")


def products(case):
    """Dot products of one output tile, which is what a test takes long for."""
    layer = case.layer()
    blocks = sum(-(-(stop - start) // 128) for start, stop in layer.arrays)
    parts = (1 + (case.spec.cell_bits > 6)) * (1 + (case.spec.dac_bits > 4))
    return blocks * parts * len(case.spec.digit_bits) * len(case.spec.slice_bits) * case.geometry.groups


def small(case):
    return GPU or products(case) <= 80


def accumulators(case, mode=None):
    layer = case.layer()
    assert triton_gpu.unsupported(layer, DEVICE) is None
    prepared = triton_gpu.prepare(layer)
    assert mode in (None, prepared.mode)
    found = triton_gpu.accumulate(prepared, case.input().to(DEVICE))
    assert found.dtype == engines.accumulator_dtype(layer)
    return found.cpu().numpy()


def assert_same(found, wanted):
    assert found.shape == wanted.shape
    differ = np.argwhere(found != wanted)
    assert not len(differ), f"{len(differ)} of {wanted.size} differ, first at {differ[0]}"


def check(case, mode=None):
    wanted = oracle.accumulate(case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta,
                               case.q_min, case.bits, case.cells)
    assert_same(accumulators(case, mode), wanted)


def check_histogram(case, most=2**22):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "MAX_BINS", most)
        found = triton_gpu.histogram(triton_gpu.prepare(case.layer()), case.input().to(DEVICE))
    assert found.dtype == torch.int64
    assert_same(found.cpu().numpy(), oracle.histogram(case.a_codes, case.w_codes, case.spec, case.geometry,
                                                      case.reference_twice, case.cells, most))


@given(case=cases(adc_ranges=["calibrated", "full"]).filter(small))
@settings(max_examples=100)
def test_static_adc(case):
    check(case)


@given(case=cases(planned=True).filter(small))
@settings(max_examples=80)
def test_planned_adc(case):
    check(case)


@given(case=cases(adc_ranges=["dynamic"]).filter(small))
@settings(max_examples=50)
def test_dynamic_adc(case):
    check(case, "dynamic")


@given(case=cases(adc_ranges=["ideal"]).filter(small))
@settings(max_examples=60)
def test_ideal(case):
    check(case, "sum")


@given(case=cases(adc_ranges=["calibrated", "ideal", "dynamic"]).filter(small), most=st.sampled_from([2**22, 2**22, 200, 7]))
@settings(max_examples=60)
def test_histogram(case, most):
    low, high = case.layer().u_span
    assume(high - low < 2**20)
    check_histogram(case, most)


def layer_case(spec, channels=40, out=9, kernel=(2, 3), size=(3, 4), images=2, seed=0, **geometry):
    rng = np.random.default_rng(seed)
    a_codes = rng.integers(0, 2**spec.a_bits, (images, *size, channels), dtype=np.uint8)
    a_codes[rng.random(a_codes.shape) < 0.3] = 0
    w_codes = rng.integers(0, 2**spec.w_bits, (out, channels // geometry.get("groups", 1), *kernel), dtype=np.uint8)
    slices = len(spec.slice_bits)
    return Case(spec, Geometry(**geometry), a_codes, w_codes, [1.0] * slices, [-2 ** (spec.adc_bits - 1)] * slices)


@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
@pytest.mark.parametrize("mapping", ["tap", "im2col"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("cell_bits, dac_bits", [(1, 1), (3, 2)])
def test_usual_layer(adc_range, mapping, reference, cell_bits, dac_bits):
    spec = CrossbarSpec(4, 4, cell_bits, 3, 32, mapping, reference, dac_bits, adc_range)
    check(layer_case(spec, padding=(1, 0, 2, 1), stride=(1, 2)))


def planned_case(case, bits, delta, q_min=None):
    """A case with a plan; numbers are broadcast to `[digits, slices]`, a lowest code that is not given is in the middle."""
    spec = replace(case.spec, adc_plan="significance", adc_bits=1, adc_max_bits=12)
    shape = len(spec.digit_bits), len(spec.slice_bits)
    bits, delta = np.broadcast_to(bits, shape), np.broadcast_to(np.asarray(delta, float), shape)
    q_min = -(2**bits // 2) if q_min is None else np.broadcast_to(q_min, shape)
    return replace(case, spec=spec, bits=bits.tolist(), delta=delta.tolist(), q_min=q_min.tolist())


@pytest.mark.parametrize("mode", ["static", "table"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("cell_bits, dac_bits, bits", [(1, 1, [[0, 2, 3, 0], [4, 5, 1, 0], [0] * 4, [0, 5, 6, 8]]),
                                                       (3, 2, [[0, 3], [4, 0]]), (2, 4, [[0, 0]])])
def test_usual_plan(mode, reference, cell_bits, dac_bits, bits, monkeypatch):
    """Kinds of read, whole digits and all slices without bits, steps of their own; in float32 and looked up."""
    if mode == "table":
        monkeypatch.setattr(triton_conversion, "_float32_constants", lambda *args: None)
    spec = CrossbarSpec(4, 4, cell_bits, 3, 32, "tap", reference, dac_bits)
    digits, slices = len(spec.digit_bits), len(spec.slice_bits)
    case = planned_case(layer_case(spec, padding=(1, 0, 2, 1), stride=(1, 2), groups=2, out=10), bits,
                        (70 + np.arange(digits * slices).reshape(digits, slices)) / 64, None if reference == "analog" else 0)
    check(case, mode)
    check_histogram(case)


@pytest.mark.parametrize("mode", ["static", "table"])
@pytest.mark.parametrize("rows", [20, 300])
def test_planned_sums_in_64_bits(mode, rows, monkeypatch):
    """With the code words of float32, which the steps multiply too; arrays of one block and of several."""
    if mode == "table":
        monkeypatch.setattr(triton_conversion, "_float32_constants", lambda *args: None)
    case = layer_case(CrossbarSpec(4, 4, 2, 3, rows, dac_bits=2), channels=310, kernel=(1, 1))
    case = planned_case(case, [[0, 4], [5, 6]], [[2.0**24, 3.5], [2.0**15, 3.25]])
    assert accumulators(case, mode).dtype == np.int64
    check(case, mode)


def check_ones(case, mode=None):
    """Against the reference engine, with counts of the reads of each class, which are those of a layer without an ADC."""
    layer, codes, reference = case.layer(), case.input().to(DEVICE), engines.load("reference")
    assert layer.classes > 2
    assert_same(accumulators(case, mode), reference.accumulate(layer, codes).cpu().numpy())
    layer = replace(layer, spec=replace(layer.spec, adc_range="ideal"))
    found = triton_gpu.histogram(triton_gpu.prepare(layer), codes).cpu()
    assert_same(found.numpy(), reference.histogram(layer, codes).cpu().numpy())


def idle_here_and_there(case):
    """The case with digits of which many are 0, and pixels of which all are, so that every class of n is seen."""
    codes = case.a_codes & np.random.default_rng(1).integers(0, 2**case.spec.a_bits, case.a_codes.shape, dtype=np.uint8)
    codes[:, 0] = 0
    return replace(case, a_codes=codes)


@pytest.mark.parametrize("mode", ["static", "table", "exact"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("mapping, cell_bits, dac_bits", [("tap", 2, 1), ("im2col", 3, 2), ("im2col", 2, 4)])
def test_plans_by_ones(mode, reference, mapping, cell_bits, dac_bits, monkeypatch):
    """Each pixel of a tile has the converter of its own n; arrays that are not full, groups."""
    if mode != "static":
        monkeypatch.setattr(triton_conversion, "_float32_constants", lambda *args: None)
    if mode == "exact":
        monkeypatch.setattr(triton_conversion, "MAX_BINS", 7)
    spec = CrossbarSpec(4, 4, cell_bits, 3, 24, mapping, reference, dac_bits)
    case = idle_here_and_there(layer_case(spec, 80, 10, padding=(1, 0, 2, 1), stride=(1, 2), groups=2, size=(3, 3)))
    for seed in (0, 1):
        check_ones(by_ones(case, seed), mode)


@pytest.mark.parametrize("rows, dac_bits", [(128, 8), (300, 2)])
def test_plans_by_ones_of_arrays_of_several_blocks_and_codes_of_8_bits(rows, dac_bits):
    case = by_ones(idle_here_and_there(layer_case(CrossbarSpec(4, 8, 2, 3, rows, dac_bits=dac_bits), 310, kernel=(1, 1), size=(2, 2))))
    check_ones(case)
    check_ones(with_cells(case))


@pytest.mark.parametrize("mode, steps", [("static", 1), ("exact", 0.7)])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("mapping, dac_bits", [("tap", 1), ("im2col", 2), ("im2col", 4)])
def test_plans_by_ones_on_a_chip(mode, steps, reference, mapping, dac_bits):
    spec = CrossbarSpec(4, 4, 2, 3, 24, mapping, reference, dac_bits)
    case = by_ones(idle_here_and_there(layer_case(spec, 80, 10, padding=(1, 0, 2, 1), stride=(1, 2), groups=2, size=(3, 3))))
    check_ones(replace(with_cells(case), delta=(steps * np.array(case.delta)).tolist()), mode)


@pytest.mark.parametrize("cells", [False, True])
def test_the_step_of_one_class_decides_for_float32(cells):
    """One that float32 does not divide by as float64 does, of reads that have bits: then of all classes alike."""
    case = layer_case(CrossbarSpec(4, 4, 4, 4, 64, dac_bits=4), channels=64, kernel=(1, 1))
    case = with_cells(case) if cells else case
    shape = 1, 1, replace(case, spec=replace(case.spec, adc_plan="ones")).layer().classes
    case = replace(by_ones(case), bits=np.full(shape, 4).tolist(), delta=np.ones(shape).tolist(), q_min=np.full(shape, -8).tolist())
    check_ones(case, "static")
    case.delta[0][0][8] = 0.7 if cells else 7.0
    check_ones(case, "exact" if cells else "table")
    case.bits[0][0][8], case.q_min[0][0][8] = 0, 0
    check_ones(case, "static")


@pytest.mark.parametrize("cells", [False, True])
def test_sums_without_an_adc_on_hardware_with_a_plan_by_ones(cells):
    case = layer_case(CrossbarSpec(4, 4, 2, adc_range="ideal", adc_plan="ones", adc_bits=1))
    check(with_cells(case) if cells else case, "sum")


@pytest.mark.parametrize("cells", [False, True])
def test_counts_of_idle_reads_and_others(cells):
    """The two classes of a layer that skips idle reads; its codes are what they are of one class."""
    case = idle_here_and_there(layer_case(CrossbarSpec(4, 4, 2, 6, 32, adc_idle="skip", dac_bits=2)))
    case = with_cells(case) if cells else case
    case.q_min = [-32, -32]
    check(case)
    layer, codes = case.layer(), case.input()
    found = triton_gpu.histogram(triton_gpu.prepare(layer), codes.to(DEVICE)).cpu()
    assert torch.equal(found, engines.load("reference").histogram(layer, codes)) and found.shape[2] == 2 and found[:, :, 0].any()


@pytest.mark.parametrize("rows", [31, 32, 33, 127, 128, 129, 260, 1024])
@pytest.mark.parametrize("mapping", ["tap", "im2col"])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic"])
def test_rows_around_the_blocks_of_a_dot_product(rows, mapping, adc_range):
    spec = CrossbarSpec(4, 4, 4, 5, rows, mapping, dac_bits=4, adc_range=adc_range)
    check(layer_case(spec, channels=390, kernel=(1, 3), size=(2, 4)))


@pytest.mark.parametrize("groups, channels, out", [(2, 66, 6), (5, 15, 20), (8, 8, 8), (4, 4, 12)])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
def test_groups_and_depthwise(groups, channels, out, adc_range):
    spec = CrossbarSpec(4, 4, 2, 2, 32, adc_range=adc_range, dac_bits=2)
    check(layer_case(spec, channels, out, kernel=(2, 2), groups=groups, padding=(1, 0, 2, 1), dilation=(1, 2)))
    check_histogram(layer_case(spec, channels, out, kernel=(2, 2), groups=groups, padding=(1, 0, 0, 1)))


def more_than_a_tile(tile, adc_range):
    return layer_case(CrossbarSpec(2, 2, 1, 3, 32, adc_range=adc_range), 10, 2 * (tile[1] + 6), kernel=(1, 1), size=(5, tile[0] // 5 + 3),
                      images=1, groups=2)


@pytest.mark.parametrize("tile", [(32, 16), (64, 32), (128, 64)])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
def test_tiles_that_the_layer_does_not_fill(tile, adc_range, monkeypatch):
    """Two tiles of pixels by two of channels in each group: those at the end overhang, and what overhangs is neither stored nor counted."""
    real = triton_conversion.tiling
    monkeypatch.setattr(triton_conversion, "tiling", lambda *args: (*tile, real(*args)[2]))
    case = more_than_a_tile(tile, adc_range)
    check(case)
    if adc_range == "ideal":
        check_histogram(case)


@pytest.mark.parametrize("tile", [(32, 16), (64, 32), (64, 64)])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
def test_tiles_that_a_layer_on_a_chip_does_not_fill(tile, adc_range, monkeypatch):
    real = triton_conversion.tiling
    monkeypatch.setattr(triton_conversion, "tiling", lambda *args: (*tile, real(*args)[2]))
    case = with_cells(more_than_a_tile(tile, adc_range))
    check(case)
    if adc_range == "ideal":
        check_histogram(case)


def with_cells(case, seed=0, kind="near"):
    case.cells = random_cells(kind, case, np.random.default_rng(seed))
    return case


@pytest.mark.parametrize("rows", [64, 300])
@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_cells_in_float32_or_float64_decided_for_the_layer(rows, reference):
    """Steps that are multiples of 1/64 of a level are wholes on the grid; others, and reads beyond 2^24, take float64."""
    case = with_cells(layer_case(CrossbarSpec(4, 4, 1, 4, rows, reference=reference), channels=320, kernel=(1, 1)))
    case.q_min = [-8, -3, 0, -15]
    for delta, mode in (([1.0] * 4, "static"), ([1.0, 7 / 64, 93 / 64, 1.0], "static"), ([1.0, 0.7, 2.0, 0.7], "exact")):
        case.delta = delta
        check(case, mode)
    case.cells = np.full_like(case.cells[0], 2**19), np.zeros_like(case.cells[1]), 8
    case.delta = [1000.0] * 4
    check(case, "exact")


def test_a_plan_whose_reads_without_bits_have_any_step():
    case = with_cells(layer_case(CrossbarSpec(4, 4, 2, 3, 32, dac_bits=2)))
    case = planned_case(case, [[0, 4], [5, 6]], [[0.7, 3.5], [2.0, 3.25]])
    assert triton_conversion.conversion(case.layer())[0] == "static"
    case.delta[0][0] = 0.75  # multiples of 1/64 are what layers allow
    check(case, "static")


@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
def test_another_chip_runs_the_same_code(adc_range):
    """What the kernel is compiled for does not depend on what the cells hold, nor do the counts of their reads."""
    found = []
    for seed in (1, 2):
        prepared = triton_gpu.prepare(with_cells(layer_case(CrossbarSpec(adc_range=adc_range)), seed).layer())
        found.append((prepared.reads.constants, prepared.every_read.constants))
    assert found[0] == found[1]


def test_tiling_fills_the_gpu_or_shrinks():
    constants = triton_gpu.prepare(layer_case(CrossbarSpec()).layer()).reads.constants
    big, small = (triton_conversion.tiling("static", pixels, 512, 1, constants) for pixels in (65536, 64))
    assert big[:2] == (128, 64) and small[:2] == (64, 32)
    for mode in ("sum", "static", "table", "range", "dynamic", "histogram"):
        for pixels in (1, 17, 10**6):
            for channels in (1, 10, 1000):
                m, n, _ = triton_conversion.tiling(mode, pixels, channels, 1, replace(constants, blocks=8, acc=tl.int64))
                assert 16 <= m <= 128 and 16 <= n <= 64 and m & (m - 1) == n & (n - 1) == 0


@pytest.mark.parametrize("mapping", ["tap", "im2col"])
@pytest.mark.parametrize("rows", [4, 16])
def test_planes_of_a_volume(rows, mapping):
    """Each kernel position has arrays of its own in the tap mapping, those one behind the other too."""
    case = layer_case(CrossbarSpec(4, 4, 2, 5, rows, mapping), channels=36, out=6, kernel=(1, 2), size=(3, 3), groups=2, planes=3)
    assert len(case.layer().arrays) == ({4: 12, 16: 6} if mapping == "tap" else {4: 9, 16: 3})[rows]
    check(case)


@pytest.mark.parametrize("bits", [(8, 8, 8, 8), (8, 8, 7, 7), (8, 8, 8, 3), (7, 7, 7, 7), (8, 8, 3, 8), (8, 8, 1, 1)])
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_codes_and_levels_that_do_not_fit_int8(bits, adc_range, reference):
    w_bits, a_bits, cell_bits, dac_bits = bits
    spec = CrossbarSpec(w_bits, a_bits, cell_bits, 8, 128, "im2col", reference, dac_bits, adc_range)
    case = layer_case(spec, channels=150, kernel=(1, 1), size=(2, 2))
    case.a_codes[0], case.w_codes[0], case.w_codes[1] = 255 >> 8 - a_bits, 255 >> 8 - w_bits, 0
    case.delta = [97.3] * len(case.delta)
    check(case)


@pytest.mark.parametrize("adc_range, dtype", [("calibrated", torch.int64), ("dynamic", torch.int64),
                                              ("ideal", torch.int32)])
def test_accumulators_beyond_int32(adc_range, dtype):
    spec = CrossbarSpec(8, 8, 4, 12, 4, dac_bits=4, adc_range=adc_range)
    case = layer_case(spec, channels=48, out=2, kernel=(1, 1), size=(1, 1), images=2)
    case.a_codes[0], case.w_codes[0] = 255, 255
    case.delta, case.q_min = [1e-6, 2e-6], [0, -4095]
    assert engines.accumulator_dtype(case.layer()) == dtype
    check(case)


def test_accumulators_of_each_adc_step():
    """Slices of one step share an accumulator; steps come in the order of the first slice that has them."""
    case = layer_case(CrossbarSpec(rows=32), size=(3, 3))
    case.delta, case.q_min = [2.0, 0.5, 2.0, 1.3], [-32, -1, -63, 0]
    assert accumulators(case).shape[0] == 3
    check(case, "static")


def test_float32_or_a_table_decided_for_the_layer(monkeypatch):
    """A step of 7 makes ties that multiplying with a reciprocal misses; a step of 1 has none. Both ways agree."""
    spec = CrossbarSpec(4, 4, 1, 4, 128)
    case = layer_case(spec, channels=128, kernel=(1, 1))
    check(case, "static")
    case.delta, case.q_min = [7.0] * 4, [-6] * 4
    check(case, "table")
    monkeypatch.setattr(triton_conversion, "_float32_constants", lambda *args: None)
    case.delta, case.q_min = [1.0, 0.7, 2.0, 0.7], [-8, -3, 0, -15]
    check(case, "table")


@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_the_formula_where_a_table_would_have_millions_of_codes(reference):
    """1,024 rows of 8 bits, digits of 8 bits: u has 67 or 133 million values, of which float32 holds not all."""
    case = layer_case(CrossbarSpec(8, 8, 8, 12, 1024, "im2col", reference, 8), channels=1024, out=5, kernel=(1, 1), size=(1, 1))
    case.delta, case.q_min = [4097.3], [-2000]
    check(case, "exact")


@given(spec=specs(["calibrated"]), data=st.data())
@settings(max_examples=300)
def test_float32_arithmetic_equals_the_transfer_everywhere(spec, data):
    """`prepare` compares a few points and argues for the others; here all are compared, and no table is needless."""
    bits, magic = spec.slice_bits[0], np.float32(1.5 * 2**23)
    low, high = u_range(spec, 2**bits - 1, bits, spec.rows * (2 ** max(spec.digit_bits) - 1))
    assume(high - low < 2**17)
    if data.draw(st.booleans()):
        seen = spec.unit * data.draw(st.integers(low, 0)), spec.unit * data.draw(st.integers(0, high))
        delta, q_min = adc.covering_range(*seen, spec.unit, spec.adc_bits)
    else:
        delta, q_min = (values[0] for values in data.draw(ranges(spec)))
    w_codes = torch.zeros(1, spec.rows, 1, 1, dtype=torch.uint8)
    layer = MappedLayer(spec, Geometry(), w_codes, (2**bits - 1,), torch.tensor([delta], dtype=torch.float64),
                        torch.tensor([q_min]))
    constants = triton_conversion._float32_constants(layer, 0, 0)
    u = np.arange(low, high + 1)
    scale = np.float32(constants[0] if constants else spec.unit / delta)
    bounds = magic + np.float32(q_min), magic + np.float32(q_min + 2**spec.adc_bits - 1)
    found = np.clip(u.astype(np.float32) * scale + magic, *bounds).view(np.int32) - 0x4B400000
    wanted = Converter(delta, q_min, spec.adc_bits).encode(u, spec.unit)
    assert np.array_equal(found, wanted) == (constants is not None)


def test_fused_products_of_older_interpreters_are_those_of_newer_ones():
    newer = getattr(triton.runtime.interpreter._interpreter, "fma_fp32", None)
    if newer is None:
        pytest.skip("this interpreter rounds them twice")
    rng = np.random.default_rng(0)
    x, y, z = (np.ldexp(rng.standard_normal(100_000), rng.integers(-30, 30, 100_000)).astype(np.float32) for _ in range(3))
    z[::2] = (-x * y)[::2]  # what is left of a difference
    # Sums so near to the middle of two numbers that float64 has them there: `x y = 2^-24 (1 - 2^-30)`, z with a last bit of one.
    x[1::4], y[1::4] = 1 + 2**-15, np.copysign((1 - 2**-15) * 2**-24, y[1::4])
    z[1::4] = 1 + (2 * rng.integers(0, 2**22, 25_000) + 1) * 2**-23
    assert (interpreter.fused(x, y, z) != (x.astype(np.float64) * y + z).astype(np.float32)).sum() == 25_000
    np.testing.assert_array_equal(interpreter.fused(x, y, z), newer(x, y, z))


@pytest.mark.parametrize("bits", [1, 6, 12])
@pytest.mark.parametrize("span", [1, 3, 7, 93, 128, 1001, 12289, 65535, 2**17 + 1, 99999, 2**24 + 3, 133169151])
def test_division_is_correctly_rounded(span, bits):
    """Of every x up to the span, or of 260,000, by `span / 2^bits`, as the dynamic range divides."""
    x = torch.from_numpy(np.unique(np.linspace(0, span, 2**18).astype(np.int64))).float()
    step = torch.tensor([span], dtype=torch.float32) / 2**bits
    out = torch.empty_like(x, device=DEVICE)
    divide[(triton.cdiv(len(x), 2**14),)](x.to(DEVICE), step.to(DEVICE), out, len(x), BLOCK=2**14)
    assert torch.equal(out.cpu(), x / step)


@pytest.mark.parametrize("bits, q_min", [(1, 0), (1, -1), (6, -31), (8, 0), (12, -4095), (12, -2000)])
@pytest.mark.parametrize("fraction", [8, 4, 0])
def test_codes_of_cells_on_a_grid(bits, q_min, fraction):
    """Of every u that a code or the first ones beyond the range have, and of far ones, in both ways, for awkward steps: halves are
    many where a step is even."""
    rng = np.random.default_rng(bits)
    for delta in [*(rng.integers(1, 64 * 40, 6) / 64), 1.0, 7.0, 1 / 64, 3.0, 0.7, 1e-9, 1e9]:
        unit = 2.0**-fraction
        ends = (q_min - 2) * delta / unit, (q_min + 2**bits + 2) * delta / unit
        low, high = (int(np.clip(end, -2**22, 2**22)) for end in ends)
        u = np.arange(low, high + 1) if high - low < 2**16 else rng.integers(low, high + 1, 2**16)
        codes = np.arange(q_min, q_min + 2**bits)
        halves = np.clip((codes + 0.5) * delta / unit, -2**22, 2**22).astype(np.int64)
        u = np.concatenate([u, halves, halves + 1, halves - 1, [-2**23, -2**22, -1, 0, 1, 2**22, 2**23 - 1]])
        numbers = np.array([unit / delta, delta / unit, q_min, q_min + 2**bits - 1])
        wanted = Converter(delta, q_min, bits).encode(u, unit)
        modes = ["exact"]
        if triton_conversion._exact_in_float32(numbers[1], (-2**23, 2**23)):
            modes.append("static")
        for mode in modes:
            out = torch.empty(len(u), dtype=torch.int32, device=DEVICE)
            constants = torch.from_numpy(numbers if mode == "exact" else numbers.astype(np.float32)).to(DEVICE)
            convert[(triton.cdiv(len(u), 2**14),)](torch.from_numpy(u).int().to(DEVICE), constants, out, len(u), MODE=mode, BLOCK=2**14)
            assert np.array_equal(out.cpu().numpy(), wanted), (mode, delta)


@pytest.mark.parametrize("reference, adc_bits", [("analog", 7), ("digital", 6)])
def test_an_adc_that_changes_no_value_runs_as_one_convolution(reference, adc_bits):
    """32 rows of 1-bit cells: u is -32..32, or 0..32."""
    spec = CrossbarSpec(4, 4, 1, adc_bits, 32, reference=reference)
    case = layer_case(spec, channels=64, padding=(1, 1, 1, 1))
    case.delta = [spec.unit] * 4
    case.q_min = [0 if reference == "digital" else -32] * 4
    check(case, "sum")
    case.spec = replace(spec, adc_bits=adc_bits - 1)
    check(case, "static")
    case.spec, case.q_min = spec, [0, 0, 0, -60]
    check(case, "static")


def test_half_integers_go_to_the_even_code():
    """One word line, 1-bit cells: v is -1/2 or 1/2, and a step of 1 makes both a tie, which goes to 0; 3/2 to 2."""
    for rows, wanted in ((1, [0, 0]), (3, [-2, 2])):
        case = Case(CrossbarSpec(1, 1, 1, 6, rows), Geometry(), np.ones((1, 1, 1, rows), np.uint8),
                    np.repeat(np.array([0, 1], np.uint8), rows).reshape(2, rows, 1, 1), [1.0], [-32])
        assert accumulators(case, "static").ravel().tolist() == wanted


@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic"])
def test_prepared_weights_serve_many_inputs(adc_range):
    case = layer_case(CrossbarSpec(4, 4, 2, 4, 32, adc_range=adc_range, dac_bits=2), padding=(1, 1, 1, 1))
    prepared = triton_gpu.prepare(case.layer())
    for images, size in ((2, (4, 3)), (1, (3, 5)), (4, (1, 3))):
        other = layer_case(case.spec, size=size, images=images, seed=images, padding=(1, 1, 1, 1))
        other.w_codes = case.w_codes
        before = other.a_codes.copy()
        found = triton_gpu.accumulate(prepared, other.input().to(DEVICE)).cpu().numpy()
        assert_same(found, oracle.accumulate(other.a_codes, other.w_codes, other.spec, other.geometry,
                                             other.reference_twice, other.delta, other.q_min))
        assert np.array_equal(other.a_codes, before)


@pytest.mark.parametrize("adc_range", ["full", "dynamic", "ideal"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_layer_output_does_not_depend_on_the_engine(adc_range, reference):
    outputs = []
    for name in ("triton", "reference"):
        torch.manual_seed(0)
        spec = CrossbarSpec(4, 4, 3, 4, 16, adc_range=adc_range, reference=reference)
        layer = Qconv2dDoreFa(20, 12, 3, stride=2, padding=1, spec=spec, alpha_init=1.0)
        x = torch.rand(2, 20, 5, 5) * 1.2
        with torch.no_grad(), set_engine(name):
            outputs.append(layer.to(DEVICE)(x.to(DEVICE)))
    assert torch.equal(*outputs)


def test_calibrated_by_ones_a_layer_gives_the_same_on_both_engines():
    torch.manual_seed(0)
    spec = CrossbarSpec(cell_bits=2, rows=16, adc_plan="ones", adc_bits=1.5)
    layer = Qconv2dDoreFa(20, 12, 3, stride=2, padding=1, spec=spec, alpha_init=1.0)
    x = (torch.rand(2, 20, 5, 5) * 1.2 * (torch.rand(2, 20, 5, 5) < 0.3)).to(DEVICE)
    with torch.no_grad():
        calibrate(layer.to(DEVICE), x, share="layer")
        outputs = []
        for name in ("triton", "reference"):
            with set_engine(name):
                outputs.append(layer(x))
    assert torch.equal(*outputs) and len(layer.adc_bits_plan.unique()) > 2


def test_without_a_gpu_the_engine_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a GPU" in triton_gpu.unsupported(layer_case(CrossbarSpec()).layer(), torch.device("cpu"))


COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models.quant.arrays.cells import Cells
from models.quant.engines.gpu import triton_gpu, triton_kernel
from models.quant.arrays.mapping import MappedLayer
from models.quant.arrays.readout import Readout
from models.quant.arrays.spec import CrossbarSpec, Geometry

names = {torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
         torch.float32: "*fp32", torch.float64: "*fp64"}

def kind(arg):
    return names[arg.dtype] if torch.is_tensor(arg) else "i32" if -2**31 <= arg < 2**31 else "i64"

class Compile:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            kernel = self.kernel
            constants = {name: kwargs.pop(name) for name in list(kwargs) if name in kernel.arg_names}
            types = [tuple(map(kind, arg)) if isinstance(arg, tuple) else kind(arg) for arg in args]
            signature = dict(zip(kernel.arg_names, types)) | dict.fromkeys(constants, "constexpr")
            aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind and kind[0][0] == "*"}
            code = triton.compile(ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", 90, 32), kwargs)
            ptx = code.asm["ptx"]
            print(constants["MODE"], "wgmma" in ptx and "s32.s8.s8" in ptx, "cp.async.cg.shared" in ptx,
                  "fma.rn.f32" in ptx, "div.full" in ptx)
            if not constants["L"].ideal:
                assert code.metadata.shared < 99 * 1024 and "fma.rn.f64" not in ptx
        return launch

triton_kernel.kernel = Compile(triton_kernel.kernel)
codes = torch.zeros(64, 16, 16, 128, dtype=torch.uint8)
w_codes = torch.zeros(128, 128, 3, 3, dtype=torch.uint8)
for adc_range, delta, adc_bits in (("calibrated", 1.0, 6), ("calibrated", 7.0, 4), ("dynamic", 1.0, 6),
                                   ("ideal", 1.0, 6)):
    spec = CrossbarSpec(adc_range=adc_range, adc_bits=adc_bits)
    layer = MappedLayer(spec, Geometry(padding=(1, 1, 1, 1)), w_codes, (1,) * 4, torch.tensor([delta] * 4),
                        torch.tensor([-6] * 4))
    prepared = triton_gpu.prepare(layer)
    triton_gpu.accumulate(prepared, codes)
triton_gpu.histogram(prepared, codes)
bits = torch.tensor([[0, 1, 2, 3]] * 4)
layer = MappedLayer(CrossbarSpec(adc_plan="significance", adc_bits=1.5), Geometry(padding=(1, 1, 1, 1)), w_codes, (1,) * 4,
                    torch.full((4, 4), 1.25), torch.zeros(4, 4, dtype=torch.int64), bits)
triton_gpu.accumulate(triton_gpu.prepare(layer), codes)
cells = Cells(torch.full((4, 1, 1152, 128), 300, dtype=torch.int32), torch.zeros(4, 1, 1152, dtype=torch.int32), 8)
for adc_range, delta in (("calibrated", 1.0), ("calibrated", 1.01), ("dynamic", 1.0), ("ideal", 1.0)):
    layer = MappedLayer(CrossbarSpec(adc_range=adc_range), Geometry(padding=(1, 1, 1, 1)), w_codes, (1,) * 4,
                        torch.tensor([delta] * 4, dtype=torch.float64), torch.tensor([-6] * 4), cells=cells)
    prepared = triton_gpu.prepare(layer)
    triton_gpu.accumulate(prepared, codes)
triton_gpu.histogram(prepared, codes)
readout = Readout(2.0, ((1.0, 0.5, 0.5),) * 4, 2**40, torch.ones(4, 1, 9, 128, dtype=torch.float64), curve=((0.9, -1e-6, 1e-12, 3.0),) * 4)
layer = MappedLayer(CrossbarSpec(), Geometry(padding=(1, 1, 1, 1)), w_codes, (1,) * 4, torch.ones(4, dtype=torch.float64),
                    torch.tensor([-6] * 4), cells=cells, readout=readout)
triton_gpu.accumulate(triton_gpu.prepare(layer), codes)
layer = MappedLayer(CrossbarSpec(8, 8, 8, 12, 1024, "im2col", dac_bits=8), Geometry(padding=(1, 1, 1, 1)), w_codes, (255,),
                    torch.tensor([4097.3], dtype=torch.float64), torch.tensor([-2000]))
triton_gpu.accumulate(triton_gpu.prepare(layer), codes)
bits = (torch.arange(4 * 4 * 9) % 5).view(4, 4, 9)
for delta, *chip in ((1.25, None, None), (7.0, None, None), (1.25, cells, None), (1.01, cells, None), (1.25, cells, readout)):
    layer = MappedLayer(CrossbarSpec(adc_plan="ones", adc_bits=1.5), Geometry(padding=(1, 1, 1, 1)), w_codes, (1,) * 4,
                        torch.full((4, 4, 9), delta, dtype=torch.float64), torch.full((4, 4, 9), -6), bits, *chip)
    triton_gpu.accumulate(triton_gpu.prepare(layer), codes)
    if chip[1] is None:
        triton_gpu.histogram(triton_gpu.prepare(layer), codes)
"""


@pytest.mark.skipif(GPU, reason="every other test compiles the kernel here")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the assembler for GPUs comes with x86-64 wheels")
def test_kernel_compiles_for_hopper():
    """Without a GPU: each mode becomes machine code with int8 products on tensor cores, asynchronous copies and no
    rounding but what is written: products and sums are fused for the division alone, which is not approximate."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    lines, of_millions, of_ones = lines[:14], lines[14], lines[15:]
    mode, products, _, fused, divides = of_millions  # of values of u
    assert (mode, products, fused, divides) == ("exact", "True", "False", "False")
    assert [line[0] for line in lines] == ["static", "table", "range", "dynamic", "sum", "histogram", "static",
                                           "static", "exact", "range", "dynamic", "sum", "histogram", "static"]
    for mode, *found in lines[:6]:
        assert found == ["True", "True", str(mode == "dynamic"), "False"], mode
    for mode, products, _, *found in lines[7:-1]:  # cells on a grid
        assert [products, *found] == ["True", str(mode == "dynamic"), "False"], mode
    products, _, fused, divides = lines[-1][1:]  # noise and curves, which are written with fused products
    assert (products, fused, divides) == ("True", "True", "False")
    products, _, fused, divides = lines[6][1:]  # of a plan: no copies ahead into the branches of reads that are not made
    assert (products, fused, divides) == ("True", "False", "False")
    assert [line[0] for line in of_ones[::2]] == ["static", "table", "static", "exact", "static"]
    for _, products, _, fused, divides in of_ones[:-1]:  # plans by ones
        assert (products, fused, divides) == ("True", "False", "False")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("adc_range", ["calibrated", "full", "dynamic", "ideal"])
@pytest.mark.parametrize("channels, out, side, cell_bits", [(128, 128, 32, 1), (256, 512, 8, 1), (512, 512, 8, 2),
                                                             (64, 64, 17, 3), (72, 40, 9, 4)])
def test_vgg_layers(channels, out, side, cell_bits, adc_range):
    """Against the reference engine; and nothing waits for the GPU once the weights are prepared."""
    spec = CrossbarSpec(cell_bits=cell_bits, adc_range=adc_range)
    case = layer_case(spec, channels, out, (3, 3), (side, side), images=8, padding=(1, 1, 1, 1))
    layer, codes, reference = case.layer(), case.input().to(DEVICE), engines.load("reference")
    prepared = triton_gpu.prepare(layer)
    triton_gpu.accumulate(prepared, codes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = triton_gpu.accumulate(prepared, codes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, reference.accumulate(reference.prepare(layer), codes))
    assert torch.equal(triton_gpu.histogram(prepared, codes).cpu(), reference.histogram(layer, codes).cpu())


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("adc_range", ["calibrated", "full", "dynamic", "ideal"])
@pytest.mark.parametrize("delta", [1.25, 1.3])
@pytest.mark.parametrize("channels, out, side, cell_bits", [(128, 128, 32, 1), (512, 512, 8, 2), (72, 40, 9, 4)])
def test_vgg_layers_on_a_chip(channels, out, side, cell_bits, delta, adc_range):
    spec = CrossbarSpec(cell_bits=cell_bits, adc_range=adc_range)
    case = with_cells(layer_case(spec, channels, out, (3, 3), (side, side), images=8, padding=(1, 1, 1, 1)))
    case.delta = [delta] * len(case.delta)
    layer, codes, reference = case.layer(), case.input().to(DEVICE), engines.load("reference")
    prepared = triton_gpu.prepare(layer)
    assert torch.equal(triton_gpu.accumulate(prepared, codes), reference.accumulate(reference.prepare(layer), codes))
    assert torch.equal(triton_gpu.histogram(prepared, codes).cpu(), reference.histogram(layer, codes).cpu())


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("channels, out, side, cell_bits, dac_bits", [(128, 128, 32, 1, 1), (512, 512, 8, 2, 2), (72, 40, 9, 4, 4)])
def test_vgg_layers_by_ones(channels, out, side, cell_bits, dac_bits, reference, cells):
    spec = CrossbarSpec(cell_bits=cell_bits, dac_bits=dac_bits, reference=reference)
    case = by_ones(idle_here_and_there(layer_case(spec, channels, out, (3, 3), (side, side), images=8, padding=(1, 1, 1, 1))))
    check_ones(with_cells(case) if cells else case)


@pytest.mark.parametrize("capability, runs", [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True)])
def test_which_gpus_run_the_triton_engine(capability, runs, monkeypatch):
    """Compute capability 8.0, an A100, is the first."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert (triton_gpu.unsupported(layer_case(CrossbarSpec()).layer(), torch.device("cuda")) is None) == runs


@pytest.mark.parametrize("mapping", ["tap", "im2col"])
@pytest.mark.parametrize("rows, channels", [(20, 32), (16, 32), (32, 24), (7, 16)])
def test_rows_that_lie_side_by_side_wherever_an_array_begins(rows, channels, mapping):
    """GPUs load as many codes at a time; the interpreter does not look."""
    layer = layer_case(CrossbarSpec(rows=rows, mapping=mapping), channels, kernel=(1, 3)).layer()
    vector = triton_gpu.prepare(layer).reads.constants.vector
    assert channels % vector == 0 and all(start % vector == 0 for start, _ in layer.arrays)
