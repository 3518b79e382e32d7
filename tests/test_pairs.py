"""Weights on pairs of bit lines: every engine against the oracle, against offset cells, and closed forms of what a chip does to them."""

import contextlib
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import interpreter
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladders import solve
from scipy import stats
from strategies import codes
from test_eval import checkpoint, refused, run, scene  # noqa: F401
from torch import nn

import models.quant.engines as engines
from experiment.settings.train_settings import parse as train_parse
from models.quant import (CrossbarSpec, Device, Qconv2dDoreFa, QLinearDoreFa, Wires, calibrate, image_numbers, program, set_engine,
                          without_adc)
from models.quant.network import diagnostics
from models.quant.devices.wires import gate_exact
from models.quant.network.gate_errors import gate_errors
from models.quant.engines import reference as reference_engine
from models.quant.arrays.spec import ADC_RANGES, MAPPINGS

if importlib.util.find_spec("triton"):
    interpreter.load()  # before any test imports it
pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = Device("exact", "here", g_min=2.0, g_max=42.0)
BROAD = Device("broad", "here", g_min=2.0, g_max=42.0, sigma_us=3.0)
SCATTER = 256 * 3.0 / 40  # of a 1-bit cell of BROAD, in units of the grid
GRID = 1 / 12  # variance of a number that is rounded
ROWS = 48
MOST = 1e-5  # probability that a test of a right program fails, were its seed drawn anew


@pytest.fixture(params=["reference", "numba", "triton"], scope="module")
def engine(request):
    name = request.param
    if name != "reference" and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    with interpreter.running() if name == "triton" else contextlib.nullcontext():
        yield interpreter.load() if name == "triton" else engines.load(name)


# ---- ideal pairs -------------------------------------------------------------------------------------------------------


@st.composite
def layers(draw):
    """(a layer on pairs with its ranges, activation codes)."""
    wq = draw(st.sampled_from(["dorefa", "sawb"]))
    w_bits, a_bits = draw(st.integers(1 if wq == "dorefa" else 2, 8)), draw(st.integers(1, 8))
    adc_range, plan = draw(st.sampled_from(ADC_RANGES)), draw(st.sampled_from(["uniform", "significance", "ones"]))
    spec = CrossbarSpec(w_bits, a_bits, draw(st.integers(1, w_bits)), draw(st.integers(1, 8)), draw(st.sampled_from([3, 16, 33, 128])),
                        draw(st.sampled_from(MAPPINGS)), dac_bits=draw(st.integers(1, min(2, a_bits))), adc_range=adc_range, weights="pair")
    if adc_range == "calibrated":
        spec = replace(spec, adc_plan=plan, adc_max_bits=8)
    groups, rng = draw(st.sampled_from([1, 1, 2])), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    channels, out = groups * draw(st.integers(1, 20)), groups * draw(st.integers(1, 6))
    layer = Qconv2dDoreFa(channels, out, draw(st.sampled_from([1, 2, (1, 3)])), draw(st.integers(1, 2)), draw(st.integers(0, 1)),
                          groups=groups, bias=False, spec=spec, wq=wq)
    top = layer.weight_quant.zero_twice
    shape = layer.weight.shape
    layer.set_codes(torch.from_numpy(np.minimum(codes("dense", w_bits, shape, rng), top).astype(np.uint8)))
    if spec.planned:
        shape = layer.adc_delta.shape
        bits = rng.integers(0, 5, shape)
        layer.adc_bits_plan, layer.adc_delta = torch.tensor(bits), torch.tensor(rng.integers(1, 400, shape) / 64)
        layer.adc_q_min = torch.tensor(-rng.integers(0, 2**bits))
    else:
        layer.set_ranges([(float(rng.choice([1.0, 0.75, 3.3])), -int(rng.integers(2**spec.adc_bits))) for _ in layer.slice_bits])
    size = draw(st.integers(2, 3)), draw(st.integers(3, 4))
    return layer, codes(draw(st.sampled_from(["dense", "sparse", "powers"])), a_bits, (draw(st.integers(1, 2)), *size, channels), rng)


@given(case=layers())
@settings(max_examples=60)
def test_every_engine_reads_the_difference_of_two_lines(engine, case):
    layer, a_codes = case
    mapped, spec, device = layer.mapped(), layer.spec, interpreter.DEVICE if engines.name_of(engine) == "triton" else torch.device("cpu")
    if engines.name_of(engine) == "triton" and len(mapped.arrays) * len(spec.digit_bits) * len(mapped.reference_twice) > 40:
        return  # hundreds of small products take Triton's interpreter minutes
    assert engine.unsupported(mapped, device) is None
    found = engine.accumulate(engine.prepare(mapped), torch.from_numpy(a_codes).to(device)).cpu().numpy()
    assert found.dtype == (np.int32 if engines.accumulator_dtype(mapped) == torch.int32 else np.int64)
    zero_twice, w_codes = layer.weight_quant.zero_twice, layer.w_codes().numpy()
    if spec.adc_range == "ideal":
        twice = layer.weight_quant.reference_twice(spec.slice_bits)
        wanted = oracle.integer_convolution(a_codes, w_codes, spec, mapped.geometry, twice)[None]
        assert engines.value(mapped) == [2 - zero_twice % 2]  # of `|2 W - L|`, or of `|W - m|`
        found = found * int(engines.value(mapped)[0])
    else:
        lines = oracle.pair_lines(w_codes, zero_twice, spec.cell_bits)
        assert list(layer.slice_bits) == lines[0]
        wanted = oracle.accumulate(a_codes, w_codes, mapped.spec, mapped.geometry, None, mapped.adc_delta.numpy(), mapped.adc_q_min.numpy(),
                                   mapped.adc_bits_plan if spec.planned else None, pairs=lines)
    assert found.shape == wanted.shape and (found == wanted).all()


@given(case=layers())
@settings(max_examples=40)
def test_every_engine_reads_pairs_that_scatter(engine, case):
    layer, a_codes = case
    ideal = layer.ideal_cells()
    values = ideal.values.numpy() + np.random.default_rng(a_codes.size).integers(-90, 91, ideal.values.shape, np.int32)
    layer.set_cells(replace(ideal, values=torch.from_numpy(values)))
    mapped, device = layer.mapped(), interpreter.DEVICE if engines.name_of(engine) == "triton" else torch.device("cpu")
    if engines.name_of(engine) == "triton" and len(mapped.arrays) * len(layer.spec.digit_bits) * len(values) > 20:
        return
    found = engine.accumulate(engine.prepare(mapped), torch.from_numpy(a_codes).to(device)).cpu().numpy()
    wanted = oracle.accumulate(a_codes, layer.w_codes().numpy(), mapped.spec, mapped.geometry, None, mapped.adc_delta.numpy(),
                               mapped.adc_q_min.numpy(), mapped.adc_bits_plan if layer.spec.planned else None,
                               (values, ideal.reference.numpy(), ideal.fraction_bits))
    assert found.shape == wanted.shape and (found == wanted).all()


def linear(spec, out=3, channels=ROWS, w_codes=None, **options):
    layer = QLinearDoreFa(channels, out, bias=False, spec=replace(spec, weights="pair"), alpha_init=1.0, **options).eval()
    layer.set_codes(torch.full((out, channels, 1, 1), 5, dtype=torch.uint8) if w_codes is None else w_codes)
    return layer


def random_codes(out, top, channels=ROWS, seed=0):
    return torch.randint(top + 1, (out, channels, 1, 1), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("wq, code, plus, minus", [
    ("dorefa", 0, [0, 0, 0, 0], [1, 1, 1, 1]), ("dorefa", 7, [0, 0, 0, 0], [1, 0, 0, 0]), ("dorefa", 10, [1, 0, 1, 0], [0, 0, 0, 0]),
    ("sawb", 7, [0, 0, 0], [0, 0, 0]), ("sawb", 13, [0, 1, 1], [0, 0, 0]), ("sawb", 0, [0, 0, 0], [1, 1, 1])])
def test_digits_of_a_weights_size(wq, code, plus, minus):
    """4 bits on 1-bit cells: |2 W - 15| of DoReFa; |W - 7| of SAWB, whose zero is two cells that are off."""
    layer = linear(CrossbarSpec(), 1, 1, torch.full((1, 1, 1, 1), code, dtype=torch.uint8), wq=wq)
    cells = layer.cells()
    assert (cells.values.flatten() // 256).tolist() == [p - m for p, m in zip(plus, minus)] and not cells.reference.any()


def test_a_code_that_no_quantizer_makes_is_refused():
    layer = linear(CrossbarSpec(), 1, 1, torch.full((1, 1, 1, 1), 15, dtype=torch.uint8), wq="sawb")
    with pytest.raises(ValueError, match="^weight codes reach 15; pairs of cells hold those from 0 to 14$"):
        layer.cells()


@pytest.mark.parametrize("wq", ["dorefa", "sawb"])
@pytest.mark.parametrize("cell_bits", [1, 3, 4])
@pytest.mark.parametrize("adc_range", ADC_RANGES)
def test_a_network_on_pairs(tiny, wq, cell_bits, adc_range):
    """A device without scatter gives what ideal pairs give, to the bit; an ADC that loses nothing, or none, what offset cells give."""
    spec = CrossbarSpec(rows=32, cell_bits=cell_bits, adc_range=adc_range, weights="pair", adc_bits=5)
    model = tiny(spec=spec, wq=wq)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    layers = [layer for layer in model.modules() if isinstance(layer, (Qconv2dDoreFa, QLinearDoreFa))]

    def outputs():
        with torch.no_grad(), set_engine("reference"):
            return model(images)

    with without_adc(model):
        outputs()  # SAWB takes its clipping level from the weights
    if adc_range == "calibrated":
        with set_engine("reference"):
            calibrate(model, images)
    wanted = outputs()
    program(model, Device("exact", "here", g_min=10.0, g_max=30.0), seed=3)
    assert all(torch.equal(layer.chip.cells.values, layer.ideal_cells().values) for layer in layers)
    assert torch.equal(outputs(), wanted)
    program(model, None)
    for layer in layers:
        layer.set_spec(replace(spec, weights="offset", adc_range="ideal"))
    exact = outputs()
    assert torch.equal(wanted, exact) or adc_range != "ideal"
    if adc_range == "full":
        for layer in layers:
            layer.set_spec(replace(spec, adc_bits=12))
        assert torch.equal(outputs(), exact)


def test_ranges_are_those_of_the_arrays_whatever_the_weights():
    """`full`: a pair gives -n (2^b - 1) .. n (2^b - 1); here with steps of 2 * 48 * 3 / 63."""
    layer = linear(CrossbarSpec(cell_bits=2, adc_range="full"))
    mapped = layer.mapped()
    low = mapped.adc_q_min.double() * mapped.adc_delta
    assert (low <= -144 + mapped.adc_delta).all() and ((mapped.adc_q_min + 63) * mapped.adc_delta >= 144).all()
    assert (mapped.adc_delta >= 288 / 63).all() and (mapped.adc_delta < 288 / 62 + 1 / 32).all()


# ---- on a chip -----------------------------------------------------------------------------------------------------------


def reads_of(layer, a_codes):
    """{(z, k): u, int64 `[images, outputs]`} as the reference engine reads the cells. Args: a_codes, uint8 `[images, rows]`."""
    found = {}
    for z, k, u, _ in reference_engine.reads(layer.mapped("ideal"), a_codes.view(len(a_codes), 1, 1, -1)):
        found[z, k] = found.get((z, k), 0) + u[0]
    return found


def inputs(images=1, seed=0):
    """Codes of images on ROWS rows, and the number of ones of each digit."""
    drawn = np.random.default_rng(seed).integers(0, 16, (images, ROWS))
    return torch.from_numpy(drawn.astype(np.uint8)), [(drawn >> z & 1).sum(1) for z in range(4)]


def assert_variance(errors, wanted):
    """The sample variance of independent Gaussian numbers lies within its chi-square interval."""
    free = len(errors) - 1
    low, high = stats.chi2.ppf([MOST / 2, 1 - MOST / 2], free) / free
    assert low < np.var(errors, ddof=1) / wanted < high


@pytest.mark.parametrize("wq, code", [("dorefa", 5), ("sawb", 7)])
def test_variances_of_both_cells_add(wq, code):
    """`2 s^2` for each row that is on, also where the weight is zero and both cells are off; columns have nothing in common."""
    layer = linear(CrossbarSpec(adc_range="ideal"), 3000, w_codes=torch.full((3000, ROWS, 1, 1), code, dtype=torch.uint8), wq=wq)
    a_codes, ones = inputs()
    ideal = reads_of(layer, a_codes)
    program(nn.ModuleList([layer]), BROAD, seed=1)
    for (z, k), u in reads_of(layer, a_codes).items():
        errors = (u - ideal[z, k] * 256).double().numpy()[0]
        wanted = ones[z][0] * (2 * SCATTER**2 + GRID)
        assert abs(errors.mean()) < 5 * math.sqrt(wanted / len(errors))
        assert_variance(errors, wanted)


def test_variance_over_chips_is_that_of_both_lines():
    """Of two columns over 400 chips: each has `2 s^2` for each row that is on, and nothing in common with the other."""
    layer = linear(CrossbarSpec(adc_range="ideal"), 2)
    a_codes, ones = inputs()
    ideal, found = reads_of(layer, a_codes), []
    for seed in range(400):
        program(nn.ModuleList([layer]), BROAD, seed)
        found.append(reads_of(layer, a_codes))
    for (z, k), u in ideal.items():
        errors, wanted = np.array([(chip[z, k] - u * 256)[0].tolist() for chip in found]), ones[z][0] * (2 * SCATTER**2 + GRID)
        assert_variance(errors[:, 0], wanted)
        assert_variance(errors[:, 0] - errors[:, 1], 2 * wanted)


def test_cells_of_pairs_are_draws_of_their_own():
    """Of chips, slices, taps and groups no two go together: correlations within six standard errors (of 41,328)."""
    layer = Qconv2dDoreFa(64, 100, 3, groups=2, bias=False, spec=CrossbarSpec(adc_range="ideal", rows=16, weights="pair"), alpha_init=1.0)
    ideal, errors = layer.ideal_cells().values, []
    for seed in range(4):
        program(nn.ModuleList([layer]), BROAD, seed)
        errors.append((layer.cells().values - ideal).numpy().reshape(4 * 2 * 9, 32 * 50))  # slice, group and tap; row and output
    errors = np.concatenate(errors)
    assert np.abs(np.corrcoef(errors) - np.eye(len(errors))).max() < 6 / math.sqrt(errors.shape[1])


def test_both_lines_have_rows_of_their_own(tmp_path):
    """Of cells that were measured together: those of two that are off differ, and as often in one direction as in the other."""
    (tmp_path / "own.csv").write_text("weight_level,cell0,cell1,cell2\n" + "".join(
        f"{w}," + ",".join(str(10 * (w >> k & 1) + more) for k in (2, 1, 0)) + "\n" for w in range(8) for more in (1, 3)))
    layer = linear(CrossbarSpec(adc_range="ideal"), 20, w_codes=torch.full((20, ROWS, 1, 1), 7, dtype=torch.uint8), wq="sawb")
    program(nn.ModuleList([layer]), Device.read(tmp_path / "own.csv"))
    signs, n = layer.cells().values[0].sign(), 20 * ROWS
    assert all(torch.equal(part, layer.cells().values[0]) for part in layer.cells().values)  # a row is drawn as a whole
    for sign, p in ((1, 1 / 4), (-1, 1 / 4)):
        assert abs(int((signs == sign).sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_mean_of_stuck_cells():
    """`sum a (p_on (x_on - x) + p_off (x_off - x))` of the positive line less that of the negative one, on 2-bit cells."""
    on, off, w_codes = 0.1, 0.2, random_codes(1, 15).repeat(2000, 1, 1, 1)
    layer = linear(CrossbarSpec(cell_bits=2, adc_range="ideal"), 2000, w_codes=w_codes)
    a_codes, _ = inputs()
    ideal = reads_of(layer, a_codes)
    program(nn.ModuleList([layer]), replace(EXACT, stuck_on=on, stuck_off=off), seed=4)
    _, plus, minus = oracle.pair_lines(w_codes[:1].numpy(), 15, 2)
    for (z, k), u in reads_of(layer, a_codes).items():
        a = a_codes[0].numpy() >> z & 1
        error = (u - ideal[z, k] * 256).double().numpy()[0] / 256
        wanted = sum(sign * float(a @ (on * (3.0 - x) - off * x))
                     for sign, x in ((1, plus[k, 0, :, 0, 0]), (-1, minus[k, 0, :, 0, 0])))
        assert abs(error.mean() - wanted) < 5 * error.std() / math.sqrt(len(error))


@pytest.mark.parametrize("joint", [False, True])
def test_a_map_of_stuck_cells_is_of_both_lines_side_by_side(joint, tmp_path):
    device = EXACT
    if joint:
        (tmp_path / "own.csv").write_text("weight_level,cell0,cell1,cell2,cell3\n" + "".join(
            f"{w},{2 + 40 * (w >> 3)},{2 + 40 * (w >> 2 & 1)},{2 + 40 * (w >> 1 & 1)},{2 + 40 * (w & 1)}\n" for w in range(16)))
        device = Device.read(tmp_path / "own.csv")
    layer = linear(CrossbarSpec(), 10)
    network, shape = nn.ModuleList([layer]), (ROWS, 10, 2)
    program(network, device)
    perfect = layer.cells().values
    mask = np.random.default_rng(1).choice([-1, 0, 1], shape, p=[0.1, 0.7, 0.2])
    program(network, replace(device, stuck_mask=mask))
    ideal = perfect.numpy()[:, 0] // 256
    plus, minus = (np.where(at > 0, 1, np.where(at < 0, 0, line)) for at, line in (
        (mask[..., 0], ideal.clip(0)), (mask[..., 1], (-ideal).clip(0))))
    assert np.array_equal(layer.cells().values.numpy()[:, 0], 256 * (plus - minus))
    assert not np.array_equal(plus - minus, ideal)


def test_read_noise_is_that_of_two_cells():
    """`s^2 = 2 c_0 sum a^2 + adc_noise^2`, and every engine draws the same, whatever the batch."""
    layer, (a_codes, ones) = linear(CrossbarSpec(adc_bits=5), 40), inputs(2)
    network, device = nn.Sequential(layer), replace(EXACT, read_noise=2.0)
    x = torch.rand(9, ROWS, generator=torch.Generator().manual_seed(0))
    with set_engine("reference"):
        calibrate(network, x)
    program(network, EXACT)
    still = reads_of(layer, a_codes)
    program(network, device, adc_noise=0.3)
    noisy = reads_of(layer, a_codes.repeat(300, 1))  # each image has draws of its own
    for z, k in ((0, 0), (3, 2)):
        errors = (noisy[z, k].view(-1, *still[z, k].shape) - still[z, k]).double().numpy()
        for image in range(2):
            wanted = 2 * ones[z][image] * (256 * 2.0 / 40) ** 2 + (256 * 0.3) ** 2 + GRID
            assert_variance(errors[:, image].ravel(), wanted)
    with torch.no_grad():
        with set_engine("reference"), image_numbers(5):
            wanted = layer(x)
        with set_engine("numba"):
            found = []
            for i in range(len(x)):
                with image_numbers(5 + i):
                    found.append(layer(x[i:i + 1]))
    assert torch.equal(torch.cat(found), wanted)


def test_noise_that_depends_on_the_level_is_that_of_two_cells():
    """`s^2 = sum a^2 (2 c_0 + c_1 (x+ + x-))`, from what both lines hold: here the digits of the weights' sizes."""
    w_codes, (a_codes, _) = random_codes(10, 15), inputs(2)
    layer, sigma = linear(CrossbarSpec(cell_bits=2, adc_bits=5), 10, w_codes=w_codes), np.linspace(0.5, 4.0, 4)
    device = replace(EXACT, read_noise=sigma)
    program(nn.ModuleList([layer]), EXACT)
    still = reads_of(layer, a_codes)
    program(nn.ModuleList([layer]), device, seed=1)
    noisy = reads_of(layer, a_codes.repeat(500, 1))  # each image has draws of its own
    bits, plus, minus = oracle.pair_lines(w_codes.numpy(), 15, 2)
    for z, k in ((0, 0), (3, 1)):
        c0, c1, _ = device.cell_noise(bits[k])
        levels = (plus + minus)[k, :, :, 0, 0].T  # of the cell that is on; the other one is off
        wanted = 256**2 * ((a_codes.numpy() >> z & 1) @ (2 * c0 + c1 * levels)) + GRID
        errors = (noisy[z, k].view(-1, *still[z, k].shape) - still[z, k]).double().numpy()
        assert np.array_equal(layer.chip.readout.both[k, 0], 256 * levels) and wanted.max() > 1.2 * wanted.min()  # columns differ
        for image, column in np.ndindex(*wanted.shape):
            assert_variance(errors[:, image, column], wanted[image, column])


@pytest.mark.parametrize("spec", [{"adc_bits": 5}, {"cell_bits": 2, "adc_range": "dynamic"}, {"cell_bits": 4, "adc_range": "ideal"},
                                  {"adc_plan": "significance", "adc_bits": 2.5}])
@pytest.mark.parametrize("chip", [{"read_noise": "levels"}, {"wires": Wires("gate", 3.0)},
                                  {"read_noise": "levels", "wires": Wires("gate", 3.0), "adc_gain": 0.02, "adc_noise": 0.2},
                                  {"read_noise": "levels", "wires": Wires(wire_ohm=3.0)}])
def test_engines_agree_on_what_needs_both_lines(spec, chip):
    """To the bit, whatever the batch; columns beyond one tile, arrays of several rows, groups."""
    torch.manual_seed(1)
    spec = CrossbarSpec(rows=64, mapping="im2col", weights="pair", **spec)
    network = nn.Sequential(Qconv2dDoreFa(40, 140, 2, padding=1, groups=2, bias=False, spec=spec, alpha_init=1.0)).eval()
    x, chip = torch.rand(3, 40, 5, 4), dict(chip)
    device = replace(BROAD, g_max=160.0, read_noise=np.linspace(0.5, 4.0, 2**spec.cell_bits) if chip.pop("read_noise", None) else 0.0)
    found = {}
    for name in ("reference", "numba"):
        with set_engine(name), torch.no_grad():
            if spec.adc_range == "calibrated" and not found:
                calibrate(network, x)
            program(network, device, seed=1, **chip)
            if name == "numba":
                assert engines.load(name).unsupported(network[0].mapped(), torch.device("cpu")) is None
            with image_numbers(5):
                found[name] = network(x)
            with image_numbers(7):
                assert torch.equal(network(x[2:]), found[name][2:]) or spec.adc_range == "dynamic"
    program(network, device, seed=1)
    assert torch.equal(found["reference"], found["numba"]) and not torch.equal(network(x), found["numba"])


@pytest.mark.parametrize("off, most, ignoring", [(100, 0.02, 0.04), (3, 0.01, 0.025)])  # a third flows in cells that are off, too
def test_gate_access_of_pairs_within_two_percent_of_the_exact_ladders(off, most, ignoring):
    """128 rows of 6 kOhm cells, 1 Ohm a cell, a quarter of the inputs on: the currents of both lines, each through its ladder."""
    g_max, rows = 1e6 / 6000, 128
    g_min = g_max / off
    layer = linear(CrossbarSpec(rows=rows, cell_bits=2, adc_range="ideal"), 50, rows, w_codes=random_codes(50, 15, rows))
    program(nn.ModuleList([layer]), Device("own", "here", g_min, g_max), wires=Wires("gate", 1.0))
    a_codes = (torch.rand(40, rows, generator=torch.Generator().manual_seed(3)) < 0.25).to(torch.uint8)
    bits, *lines = oracle.pair_lines(layer.w_codes().numpy(), 15, 2)
    for k, b in enumerate(bits):
        step = (g_max - g_min) / (2**b - 1)
        siemens = [1e-6 * (g_min + step * line[k, :, :, 0, 0].T) for line in lines]
        plus, minus = (1e6 * gate_exact(line, a_codes.numpy(), 1.0) / step for line in siemens)
        total = np.sqrt((plus**2 + minus**2).mean())
        u = reads_of(layer, a_codes)[0, k].numpy() / 256
        ignored = 1e6 * (a_codes.numpy() @ (siemens[0] - siemens[1])) / step
        assert np.sqrt(((u - plus + minus) ** 2).mean()) / total < most
        assert np.sqrt(((ignored - plus + minus) ** 2).mean()) / total > ignoring


def test_error_of_gate_access_to_pairs_on_a_networks_own_reads():
    """What `gate_errors` says, from the ladders of both lines of every read, drawn cells included."""
    layer = linear(CrossbarSpec(rows=ROWS, cell_bits=2, adc_range="full"), 12, w_codes=random_codes(12, 15))
    network, device = nn.Sequential(layer), Device("own", "here", 2.0, 160.0, sigma_us=4.0)
    x = torch.rand(2, ROWS, generator=torch.Generator().manual_seed(1))
    program(network, device, seed=2, wires=Wires("gate"))
    straight, both = layer.cells(), layer.chip.readout.both
    assert layer.chip.readout.curve is None and not layer.chip.readout.needs_both
    program(network, device, seed=2, wires=Wires("gate", 2.0))
    a_codes, squares = layer.a_codes(x)[:, 0, 0], np.zeros(3)
    for (z, k), u in reads_of(layer, a_codes).items():
        on, step = (a_codes.numpy() >> z) & 1, 158 / (2 ** layer.slice_bits[k] - 1)
        held = [(both + sign * straight.values)[k, 0].numpy() / 512 for sign in (1, -1)]
        plus, minus = (1e6 * gate_exact(1e-6 * (2 + step * line).clip(0), on, 2.0) / step for line in held)
        exact, plain = 256 * (plus - minus), on @ straight.values[k, 0].numpy()
        squares += 4.0 ** (z + 2 * k) * np.array([np.sum((u.numpy() - exact) ** 2), np.sum((plain - exact) ** 2), np.sum(exact**2)])
    [found] = gate_errors(network, x, device, {"0": straight}, 2.0, {"0": both}).values()
    assert np.allclose(found, np.sqrt(squares[:2] / squares[2]), rtol=1e-6) and found[0] < 0.5 * found[1]


@pytest.mark.parametrize("wires", [Wires(wire_ohm=2.0), Wires(wire_ohm=1.0, row_ohm=2.0, driver_ohm=50.0)])
def test_lines_of_a_pair_lie_side_by_side(wires):
    """Currents by Kirchhoff's laws, the difference of neighbouring lines, against the sums of effective cells."""
    w_codes, (a_codes, _) = random_codes(20, 15), inputs(4)
    layer = linear(CrossbarSpec(rows=ROWS, adc_range="ideal"), 20, w_codes=w_codes)
    program(nn.ModuleList([layer]), EXACT, wires=wires)
    _, plus, minus = oracle.pair_lines(w_codes.numpy(), 15, 1)
    for (z, k), u in reads_of(layer, a_codes).items():
        array = np.empty((ROWS, 40))
        array[:, ::2], array[:, 1::2] = (2 + 40 * line[k, :, :, 0, 0].T for line in (plus, minus))
        current = 1e6 * solve(1e-6 * array, (a_codes.numpy() >> z) & 1, wires.wire_ohm, wires.row_ohm, wires.driver_ohm)
        assert np.abs(u.numpy() / 256 - (current[:, ::2] - current[:, 1::2]) / 40).max() < ROWS * 0.51 / 256


def test_software_of_a_chip_of_pairs(tiny):
    model, images = tiny(spec=CrossbarSpec(rows=32, weights="pair")), torch.rand(2, 3, 32, 32)
    with torch.no_grad(), set_engine("reference"):
        with without_adc(model):
            wanted = model(images)
        calibrate(model, images)
        program(model, BROAD)
        before = model(images)
        with without_adc(model):
            assert torch.equal(model(images), wanted)
        assert torch.equal(model(images), before) and not torch.equal(before, wanted)


@pytest.mark.parametrize("device, given, message", [
    (EXACT, {"reference_cells": "ideal"}, "reference_cells is 'ideal' and weights 'pair'")])
def test_what_pairs_are_not(device, given, message):
    layer = linear(CrossbarSpec())
    with pytest.raises(ValueError, match=message):
        program(nn.ModuleList([layer]), device, **given)
    assert layer.chip is None
    with pytest.raises(ValueError, match="weights is 'pair' with reference 'digital'"):
        CrossbarSpec(weights="pair", reference="digital")


def test_levels_of_pairs_are_their_differences():
    """Of 2-bit cells, all odd in the lowest slice of DoReFa, whose numbers are odd."""
    layer = linear(CrossbarSpec(cell_bits=2), 500, w_codes=random_codes(500, 15))
    program(nn.ModuleList([layer]), BROAD)
    low, high = (slice_["levels"] for slice_ in diagnostics.cell_levels(layer))
    assert [each["level"] for each in low] == list(range(-3, 4)) and [each["cells"] > 0 for each in low] == [True, False] * 3 + [True]
    assert all(each["cells"] > 2000 and abs(each["mean"] - each["level"]) < 0.05 for each in high)
    assert all(abs(each["deviation"] / (2**0.5 * 3 * 3 / 40) - 1) < 0.1 for each in high)


# ---- the programs --------------------------------------------------------------------------------------------------------


def test_eval_of_pairs(run, refused, checkpoint):  # noqa: F811
    """Both in one table, ideal and on a chip; what they leave behind."""
    flags = ["--engine", "reference", "--cell_bits", "2", "--adc_bits", "4", "--limit", "12", "--weights", "offset", "pair"]
    records, _, text = run(checkpoint, *flags, "--also", "--cell_bits 2 --adc_bits 4 --weights pair --device techC", "--save_cells")
    assert [record["weights"] for record in records] == [None, "offset", "pair", "pair"]
    assert "2-bit cells, 4-bit ADC, calibrated, weights pair, techC at " in text
    kept = json.loads(Path("save/adc_ranges.json").read_text())["ranges"]
    assert [entry["weights"] for entry in kept] == ["offset", "pair"] and kept[0]["layers"] != kept[1]["layers"]
    again = run(checkpoint, *flags[:-2], "pair", "--adc_ranges", "save/adc_ranges.json")[0][1]
    assert again["accuracy"] == records[2]["accuracy"] and again["changed_predictions"] == records[2]["changed_predictions"]
    [folder] = Path("prob").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {entry.get("weights") for entry in manifest.values()} == {None, "pair"}
    assert (folder / "bit_levels0_techC_pair_chip0.pt").is_file() and (folder / "bit_levels0_ideal.pt").is_file()
    refused(["--resume", checkpoint, "--weights", "pair", "--reference", "digital"], "--weights is 'pair' with reference 'digital'")


def test_training_on_pairs_is_told_by_a_flag():
    given = ["--dataset", "digits", "--adc_aware", "--weights", "pair", "--w_bits", "4", "--a_bits", "4"]
    assert train_parse(given)[0].spec.weights == "pair"
