"""Reads with noise, curves and converters that are not alike: both fast engines against the reference engine, bit for bit."""

from dataclasses import replace

import interpreter
import numpy as np
import pytest
import torch
from interpreter import DEVICE, running
from numba import njit
from strategies import by_ones, random_cells
from test_triton import assert_same, idle_here_and_there, layer_case, planned_case

from models.quant import CrossbarSpec, Readout, image_numbers
from models.quant.engines import reference
from models.quant.engines.cpu import engine as cpu
from models.quant.engines.cpu.vectors import wide, wide_noise
from models.quant.arrays.readout import COLUMN_KEY, DEVIATION, noise

with interpreter.chosen():
    triton_gpu = interpreter.load()


@pytest.fixture(scope="module", autouse=True)
def in_interpreter():
    with running():
        yield


pytestmark = pytest.mark.usefixtures("one_thread")

NOISE = Readout(base=900.1, cell_noise=((40.3, 0.0, 0.5),) * 4, seed=5)  # numbers that float32 does not have
LEVELS = Readout(cell_noise=((400.0, 1.5, 0.5), (300.0, 2.5, 1.0), (200.0, 0.5, 0.0), (0.0, 3.0, 0.5)), seed=2**64 - 7)
CURVE = Readout(curve=((0.98, -1e-6, 2e-12, 20.0), (0.97, -2e-6, 1e-12, 10.0), (0.99, -1e-6, 0.0, 0.0), (0.96, -1e-6, 3e-12, 5.0)))
READOUTS = {"noise": NOISE, "levels": LEVELS, "curve": CURVE, "all": replace(LEVELS, base=50.0, curve=CURVE.curve)}


def on_chip(case, readout, pair=False, seed=0):
    """The layer of `case` on cells drawn at random, with this readout of as many slices as it has, and with converters if it is noisy
    and curved."""
    rng = np.random.default_rng(seed)
    case.cells = random_cells("near", case, rng)
    layer = case.layer()
    slices = len(layer.spec.slice_bits)
    readout = replace(readout, cell_noise=readout.cell_noise and readout.cell_noise[:slices],
                      curve=readout.curve and readout.curve[:slices])
    if readout.curve and readout.noisy:
        shape = slices, layer.geometry.groups, len(layer.arrays), len(layer.w_codes) // layer.geometry.groups
        readout = replace(readout, gain=torch.from_numpy(rng.normal(1, 0.02, shape)),
                          offset=torch.from_numpy(rng.integers(-300, 300, shape)).int())
    if pair:
        values = torch.from_numpy(rng.integers(-700, 700, layer.cells.values.shape)).int()
        layer = replace(layer, cells=replace(layer.cells, values=values, reference=torch.zeros_like(layer.cells.reference)))
        readout = replace(readout, both=values.abs() + torch.from_numpy(rng.integers(0, 500, values.shape)).int())
    return replace(layer, readout=readout)


def check(layer, a_codes, mode=None, first=0):
    with image_numbers(first):
        wanted = reference.accumulate(layer, a_codes)
        for engine, device in (triton_gpu, DEVICE), (cpu, torch.device("cpu")):
            assert engine.unsupported(layer, device) is None
            prepared = engine.prepare(layer)
            assert engine is cpu or mode in (None, prepared.mode)
            found = engine.accumulate(prepared, a_codes.to(device)).cpu()
            assert found.dtype == wanted.dtype
            assert_same(found.numpy(), wanted.numpy())


@pytest.mark.parametrize("pair", [False, True], ids=["", "pair"])
@pytest.mark.parametrize("kind", READOUTS)
@pytest.mark.parametrize("adc_range", ["calibrated", "dynamic", "ideal"])
def test_every_kind(adc_range, kind, pair):
    """Each kind, of pairs or not, with digits of 1, 2 and 4 bits, one for each kind of range."""
    dac_bits = (1, 2, 4)[(["calibrated", "dynamic", "ideal"].index(adc_range) + list(READOUTS).index(kind) + 2 * pair) % 3]
    case = layer_case(CrossbarSpec(4, 4, 2, 5, 32, dac_bits=dac_bits, adc_range=adc_range, weights="pair" if pair else "offset"),
                      20, 18, kernel=(1, 2), size=(3, 3), padding=(1, 0, 2, 1), stride=(1, 2))
    case.delta = [1.0, 3.25]
    layer = on_chip(case, READOUTS[kind], pair)
    assert not pair or layer.readout.needs_both == (kind != "noise")
    check(layer, case.input(), first=11)


@pytest.mark.parametrize("kind", READOUTS)
@pytest.mark.parametrize("dac_bits, mapping", [(1, "tap"), (3, "im2col")])
def test_digital_reference_and_groups(kind, dac_bits, mapping):
    """Three slices, two digits, columns beyond one tile."""
    spec = CrossbarSpec(3, dac_bits + 1, 1, 6, 128, mapping, "digital", dac_bits)
    case = layer_case(spec, 20, 150, kernel=(1, 1), size=(2, 2), groups=2)
    case.q_min = [0] * 3
    check(on_chip(case, READOUTS[kind]), case.input())


@pytest.mark.parametrize("dac_bits", [1, 4])
def test_arrays_of_several_blocks_and_plans(dac_bits):
    """Rows beyond one dot product; steps in which 64-bit floats are needed; slices in the order of their steps; reads of 0 bits."""
    case = layer_case(CrossbarSpec(4, 4, 2, 5, 300, dac_bits=dac_bits), 310, 9, kernel=(1, 1), size=(1, 2))
    for delta, mode in (([0.7, 2.3], "exact"), ([1.0, 2.0], "static")):
        case.delta = delta
        check(on_chip(case, READOUTS["all"]), case.input(), mode)
    digits = len(case.spec.digit_bits)
    case = planned_case(case, [[0, 5], [4, 6], [3, 0], [1, 8]][:digits], [[0.75, 3.5]] * digits)
    check(on_chip(case, READOUTS["all"]), case.input())


@pytest.mark.parametrize("kind, pair, reference_column, dac_bits", [
    ("noise", False, "analog", 1), ("noise", True, "analog", 4), ("levels", False, "digital", 2), ("levels", True, "analog", 1),
    ("curve", False, "analog", 4), ("curve", True, "analog", 2), ("all", False, "digital", 1), ("all", True, "analog", 2)])
def test_plans_by_ones(kind, pair, reference_column, dac_bits):
    """The class is that of the digits, whatever noise and curves make of the read; idle reads are 0."""
    case = layer_case(CrossbarSpec(4, 4, 2, 5, 24, "im2col", reference_column, dac_bits, weights="pair" if pair else "offset"),
                      20, 18, kernel=(1, 2), size=(3, 3), padding=(1, 0, 2, 1), groups=1 if pair else 2)
    case = by_ones(idle_here_and_there(case), seed=dac_bits)
    check(on_chip(case, READOUTS[kind], pair), case.input(), first=11)


@pytest.mark.parametrize("steps, mode", [(0.7, "exact"), (1, "static")])
def test_plans_by_ones_of_arrays_of_several_blocks(steps, mode):
    case = by_ones(idle_here_and_there(layer_case(CrossbarSpec(4, 4, 2, 5, 300, dac_bits=2), 310, 9, kernel=(1, 1), size=(2, 2))))
    case.delta = (steps * np.array(case.delta)).tolist()
    check(on_chip(case, READOUTS["all"]), case.input(), mode)


def test_reads_without_an_adc_on_hardware_with_a_plan_by_ones():
    """Idle ones are 0 there too, and n does not matter otherwise."""
    spec = CrossbarSpec(4, 4, 2, 1, 24, adc_range="ideal", adc_plan="ones")
    case = idle_here_and_there(layer_case(spec, 20, 18, kernel=(1, 1), size=(2, 2)))
    check(on_chip(case, READOUTS["all"]), case.input(), "as read")


def test_digits_whose_squares_8_bits_do_not_hold():
    case = layer_case(CrossbarSpec(4, 8, 2, 8, 32, dac_bits=5), 40, 18, kernel=(1, 1), size=(2, 2))
    case.delta = [3.0, 7.0]
    for pair in (False, True):
        check(on_chip(case, READOUTS["all"], pair), case.input())


def test_slices_are_known_by_their_number_not_by_their_step():
    """Slices 0 and 2 share a step, so the kernel makes them one after the other; noise, curve and converters are those of each."""
    case = layer_case(CrossbarSpec(rows=32), kernel=(1, 1), size=(2, 2))
    case.delta, case.q_min = [2.0, 0.5, 2.0, 1.25], [-32, -1, -32, 0]
    check(on_chip(case, READOUTS["all"]), case.input())


def test_an_image_sees_its_noise_in_any_batch():
    case = layer_case(CrossbarSpec(), images=4, kernel=(1, 1), size=(2, 2))
    prepared = triton_gpu.prepare(on_chip(case, NOISE))
    whole = triton_gpu.accumulate(prepared, case.input().to(DEVICE))
    for first, stop in ((0, 1), (1, 4)):
        with image_numbers(first):
            assert torch.equal(triton_gpu.accumulate(prepared, case.input()[first:stop].to(DEVICE)), whole[:, first:stop])


def test_another_chip_runs_the_same_code():
    """What the kernel is compiled for does not depend on the numbers that differ from chip to chip."""
    found = []
    for seed in (1, 2):
        case = layer_case(CrossbarSpec())
        prepared = triton_gpu.prepare(on_chip(case, replace(READOUTS["all"], seed=seed), seed=seed))
        found.append((prepared.reads.constants, prepared.reads._besides.constants))
    assert found[0] == found[1]


def refused(layer, word=""):
    """Whether both engines refuse it, with that word."""
    reasons = [triton_gpu.unsupported(layer, DEVICE), cpu.unsupported(layer, torch.device("cpu"))]
    assert (reasons[0] is None) == (reasons[1] is None)
    return all(reason and word in reason for reason in reasons)


def test_numbers_of_a_readout_are_float64():
    """A base and c_0 whose sum over many rows float32 rounds otherwise."""
    case = layer_case(CrossbarSpec(4, 4, 2, 5, 32, adc_range="ideal"), 20, 18, kernel=(1, 1), size=(24, 24))
    check(on_chip(case, Readout(base=88969115.72963953, cell_noise=((95269507.4678388, 0.0, 0.0),) * 2, seed=3)), case.input())


@pytest.mark.parametrize("adc_range", ["calibrated", "ideal"])
def test_halves_are_rounded_before_an_offset_is_added(adc_range):
    """Else an odd offset would move the even number that they go to."""
    case = layer_case(CrossbarSpec(4, 4, 2, 12, 32, adc_range=adc_range), 20, 18, kernel=(1, 1), size=(2, 2))
    case.delta = [1 / 256] * 2
    gain, offset = torch.full((2, 1, 1, 18), 1.5, dtype=torch.float64), torch.ones((2, 1, 1, 18), dtype=torch.int32)
    check(on_chip(case, Readout(gain=gain, offset=offset)), case.input())


def test_ranges_of_the_batch_wider_than_31_bits():
    case = layer_case(CrossbarSpec(8, 8, 8, 8, 1024, adc_range="dynamic", dac_bits=8), 600, 4, kernel=(1, 1), size=(1, 1), images=3)
    case.a_codes[0] = 255
    layer = on_chip(case, Readout(gain=torch.tensor([[[[1.1, 0.9, 1.0, 1.2]]]], dtype=torch.float64)))
    values = layer.cells.values.clone()
    values[..., 0], values[..., 1] = 8000, -8000
    check(replace(layer, cells=replace(layer.cells, values=values, reference=torch.zeros_like(layer.cells.reference))), case.input())


def test_what_float32_or_32_bits_do_not_hold_is_refused():
    layer = on_chip(layer_case(CrossbarSpec()), replace(NOISE, base=1e10))
    assert refused(layer, "float32")
    layer = on_chip(layer_case(CrossbarSpec(4, 8, 2, 5, dac_bits=7)), replace(LEVELS, cell_noise=((1.0, 1e-4, 1.0),) * 2))
    assert refused(layer, "32 bits")
    assert not refused(replace(layer, readout=replace(NOISE, cell_noise=((1.0, 0.0, 1.0),) * 2)))
    assert not refused(replace(layer, readout=None))
    layer = on_chip(layer_case(CrossbarSpec(8, 8, 4, 5, 1024, "im2col", "digital", 8), 120), Readout(gain=torch.full((2, 1, 2, 9), 300.0)))
    assert refused(replace(layer, cells=replace(layer.cells, values=layer.cells.values.clamp_min(500))), "32 bits")
    case = layer_case(CrossbarSpec(4, 4, 2, 5, dac_bits=4), 128, kernel=(1, 1))
    for readout, more in ((replace(CURVE, curve=CURVE.curve[:2]), 9000), (Readout(cell_noise=((1.0, 1e-4, 1.0),) * 2), 40000)):
        layer = on_chip(case, readout, pair=True)
        assert not refused(layer)
        assert refused(replace(layer, readout=replace(layer.readout, both=layer.readout.both + more)))


def test_normal_numbers_where_no_instruction_adds_products_of_bytes(monkeypatch):
    monkeypatch.setattr(wide_noise, "sums_bytes", lambda: False)

    @njit
    def run(keys, low, high, out):
        u = wide_noise.with_noise(wide.full_i32(7), keys.ctypes.data, 0, low, high, np.float32(1), np.float32(0))
        wide.store_ints(out.ctypes.data, 0, u)

    keys, out = (np.arange(16) * COLUMN_KEY & 0xFFFFFFFF).astype(np.uint32), np.empty(64, np.int32)
    for key in np.random.default_rng(0).integers(0, 2**63, 20):
        high = int(key) >> 32
        run(keys, int(key) & 0xFFFFFFFF, high ^ high >> 13, out)
        wanted = noise(torch.tensor(DEVIATION**2), torch.tensor(key), torch.arange(64))
        assert np.array_equal(out - 7, wanted.numpy()) and len(np.unique(out)) > 20


@pytest.mark.parametrize("has", [True, False])
def test_paired_shorts_times_a_factor(monkeypatch, has):
    """With the instruction for it, where the machine has that, and without."""
    has = has and wide._has_products_of_pairs()
    monkeypatch.setattr(wide, "_has_products_of_pairs", lambda: has)

    @njit
    def run(terms, factor, out):
        wide.add_times_to_int32(out.ctypes.data, 0, wide.load_shorts(terms.ctypes.data, 0), factor)

    rng = np.random.default_rng(0)
    for factor in (0, 1, 48, 2**15 - 1):
        terms, out = rng.integers(-2**15, 2**15, 64).astype(np.int16), rng.integers(-2**20, 2**20, 64).astype(np.int32)
        terms[:4] = -2**15, 2**15 - 1, 0, -1
        wanted = out + factor * terms.reshape(32, 2).T.ravel().astype(np.int64)
        run(terms, factor, out)
        assert np.array_equal(out, wanted)


def test_what_a_digital_reference_takes_off_beyond_32_bits():
    """Without an ADC, of cells that are all 0."""
    case = layer_case(CrossbarSpec(4, 4, 4, 5, 512, reference="digital", dac_bits=4, adc_range="ideal"), 300, 2, kernel=(1, 1), size=(1, 1),
                      images=1)
    case.a_codes[:] = 15
    case.cells = np.zeros((1, 1, 300, 2), np.int32), np.full((1, 1, 300), 2**19, np.int32), 8
    found = reference.accumulate(case.layer(), case.input())
    assert found.dtype == torch.int64 and (found == -300 * 15 * 2**19).all()


def test_dynamic_reads_that_gains_take_beyond_32_bits():
    case = layer_case(CrossbarSpec(1, 1, 1, 1, 512, adc_range="dynamic"), 300, 2, kernel=(1, 1), size=(1, 1), images=1)
    case.a_codes[:] = 1
    case.cells = np.full((1, 1, 300, 2), 2**19, np.int32), np.zeros((1, 1, 300), np.int32), 8
    layer = replace(case.layer(), readout=Readout(gain=torch.full((1, 1, 1, 2), 20.0, dtype=torch.float64)))
    found = reference.accumulate(layer, case.input())
    assert found.dtype == torch.int64 and (found == 2 * 20 * 300 * 2**19).all()


def test_noise_whose_variance_would_be_below_zero_is_none():
    case = layer_case(CrossbarSpec(4, 4, 2, 5, 32, adc_range="ideal"), 20, 18, kernel=(1, 1), size=(2, 2))
    layer = on_chip(case, replace(LEVELS, cell_noise=((10.0, -1.5, 0.5),) * 2))
    with running():
        found = triton_gpu.accumulate(triton_gpu.prepare(layer), case.input().to(DEVICE)).cpu()
    assert torch.equal(found, reference.accumulate(layer, case.input()))
