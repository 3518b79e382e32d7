"""Noise of reads, converters that are not alike, wires: against brute force, closed forms and exact ladders."""

import importlib
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from ladders import solve
from scipy import stats
from torch import nn

from models.quant import (CrossbarSpec, Device, Qconv2dDoreFa, QLinearDoreFa, Wires, calibrate, image_numbers, keep_effective_cells,
                          program, set_engine)
from models.quant.devices.wires import gate_exact
from models.quant.engines import reference
from models.quant.network.gate_errors import gate_errors
from models.quant.arrays.readout import APART, DEVIATION, NORMAL, SIGNS, column_numbers, curve_at, first_image, fused, noise, read_key

program_module = importlib.import_module("models.quant.network.program")  # the package has the function of this name
ROWS = 64
GRID = 1 / 12 / 256**2  # variance of a number that is rounded to the grid, in levels


def layer(outputs=40, reference="analog", **spec):
    torch.manual_seed(0)
    made = QLinearDoreFa(ROWS, outputs, bias=False, spec=CrossbarSpec(rows=ROWS, reference=reference, **spec), alpha_init=1.0)
    return nn.Sequential(made).eval()


def reads(network, codes):
    """u of every read of the only array, as the converters see it: `{(digit, slice): int64 [image, out]}`."""
    from models.quant.engines import reference
    mapped = network[0].mapped("ideal")
    return {(z, k): u[0] for z, k, u, _ in reference.reads(mapped, codes.view(len(codes), 1, 1, -1))}


def codes_of(images, seed=1, rows=ROWS):
    return torch.randint(0, 16, (images, rows), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_table_is_normal():
    """The exact distribution of the sum of four entries: by convolution."""
    one = np.zeros(255)
    np.add.at(one, np.array(NORMAL) + 127, 1 / 128)
    two = np.convolve(one, one)
    four, x = np.convolve(two, two), np.arange(-508, 509) / DEVIATION
    assert (four * x**2).sum() == pytest.approx(1, abs=1e-12)
    assert (four * x**4).sum() == pytest.approx(3, abs=0.002)
    normal = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    above, below = np.cumsum(four), np.cumsum(four) - four
    assert max(np.abs(above - normal).max(), np.abs(below - normal).max()) < 0.003


def test_noise_moments_and_independence():
    """A million draws: moments, and correlations between columns, reads and images, each within five standard errors: of columns that
    share entries too (16, 32 and 48 apart)."""
    images, counters, columns = 64, 128, 128
    image, counter = (v.reshape(-1) for v in torch.meshgrid(torch.arange(images), torch.arange(counters), indexing="ij"))
    key = read_key(2**63 + 12345, image, counter).view(-1, 1)
    drawn = noise(torch.tensor([1e8]), key, torch.arange(columns).view(1, -1)).double().view(images, counters, columns) / 1e4
    n = drawn.numel()
    assert not noise(torch.tensor([-1e8]), key[:9], torch.arange(columns)).any()  # of cells beyond the level where a falling line ends
    assert abs(float(drawn.mean())) < 5 / n**0.5
    assert abs(float(drawn.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((drawn**4).mean()) - 3) < 5 * (96 / n) ** 0.5 + 0.002
    for a, b in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1]), (drawn[..., 1:], drawn[..., :-1]),
                 *((drawn[:, :, apart:], drawn[:, :, :-apart]) for apart in (16, 32, 48, 64))):
        assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5
        assert abs(float((a**2 * b**2).mean()) - 1) < 5 * (8 / a.numel()) ** 0.5
    counts = np.bincount((drawn * 1e4).round().long().flatten().numpy() + 60_000, minlength=120_001)
    values = np.flatnonzero(counts)
    normal, above = stats.norm.cdf(((values - 60_000) + 0.5) / 1e4), counts.cumsum()[values] / n
    below = stats.norm.cdf((values - 60_000.5) / 1e4)
    assert max(np.abs(above - normal).max(), np.abs(above - counts[values] / n - below).max()) < 0.003
    sharing = drawn.view(images, counters, -1, len(SIGNS), APART)
    assert abs(float(sharing.prod(3).mean())) < 5 / (n / 4) ** 0.5 + 0.001
    assert abs(float((sharing.sum(3) / 2).pow(4).mean()) - 3) < 5 * (96 / (n / 4)) ** 0.5 + 0.004


def test_columns_of_groups_have_words_of_their_own():
    assert column_numbers(3, 70).tolist() == [list(range(start, start + 70)) for start in (0, 128, 256)]
    groups, key = column_numbers(2, 64), read_key(1, torch.zeros(1000, dtype=torch.int64), torch.arange(1000)).view(-1, 1)
    first, second = (noise(torch.tensor([1e8]), key, columns[None]).double() / 1e4 for columns in groups)
    assert abs(float((first * second).mean())) < 5 / first.numel() ** 0.5


def test_fused_rounds_once():
    """Against exact fractions, at and beside the middle of two float32 numbers, where a sum in float64 is rounded to that middle."""
    generator = np.random.default_rng(0)
    x, y = (generator.integers(2**23, 2**24, 400).astype(np.float32) for _ in range(2))
    z = np.ldexp(np.float32(1), 73) + np.ldexp(generator.integers(0, 2**22, 400).astype(np.float32), 51)
    x[:200], y[:200] = np.ldexp(np.float32(1), 24), np.ldexp(np.float32(1), 25)  # their product is a middle: half a step of z
    x[100:200] += 2.0
    y[150:200] *= -1
    x[200:300] *= np.float32(1e-3)
    found = fused(*map(torch.from_numpy, (x, y, z.astype(np.float32)))).numpy()
    for a, b, c, got in zip(x, y, z.astype(np.float32), found):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        near = [np.nextafter(got, np.float32(-np.inf)), got, np.nextafter(got, np.float32(np.inf))]
        away = [abs(Fraction(float(v)) - exact) for v in near]
        assert away[1] == min(away)
        if away.count(away[1]) == 2:
            assert got.view(np.int32) % 2 == 0


def test_a_curve_around_what_flows_already():
    """`c(u + S) - S` of a cubic whose three terms are of one size here."""
    b, u, start = np.array([0.9, -1.5e-3, 1e-6]), np.array([-200.0, 1.0, 150.0, 400.0]), 300.0
    first, second, third, rise = (part.numpy() for part in curve_at((*b, 0.0), torch.tensor(start)))
    wanted = [np.polynomial.Polynomial([0, *b])(each + start) - start for each in u]
    assert u * (first + u * (second + u * third)) + rise == pytest.approx(wanted, abs=1e-3)


def test_noise_beyond_float32_is_left_to_the_reference_engine():
    from models.quant.engines.cpu import engine
    network, x = layer(adc_bits=5), codes_of(2).float() / 15
    calibrate(network, x)
    program(network, Device.preset("techC"), adc_noise=300.0)
    assert engine.unsupported(network[0].mapped("calibrated"), torch.device("cpu")) is None
    program(network, Device.preset("techC"), adc_noise=400.0)
    assert "float32" in engine.unsupported(network[0].mapped("calibrated"), torch.device("cpu"))
    network(x)


@pytest.mark.parametrize("reference, cell_bits", [("analog", 1), ("analog", 3), ("digital", 1)])
def test_read_noise_against_every_cell_drawn(reference, cell_bits):
    """The variance of a column's noise is that of a sum over cells which are each drawn: those of the reference too."""
    device = Device("own", "here", g_min=5.0, g_max=50.0)
    network, codes = layer(8, reference, cell_bits=cell_bits), codes_of(2)
    program(network, device, seed=3)
    still = reads(network, codes)
    per_level = np.linspace(1.0, 4.0, 2**cell_bits)
    program(network, Device("own", "here", g_min=5.0, g_max=50.0, read_noise=per_level), seed=3)
    repeats = 1500
    noisy = reads(network, codes.repeat(repeats, 1))  # each image has draws of its own
    cells, bits = network[0].cells(), network[0].spec.slice_bits
    for z, k in ((0, 0), (3, len(bits) - 1)):
        c0, c1, _ = Device("own", "here", 5.0, 50.0, read_noise=per_level).cell_noise(bits[k])
        errors = (noisy[z, k].view(repeats, *still[z, k].shape) - still[z, k]).numpy()  # [repeat, image, out]
        a = ((codes.numpy() >> z) & 1).astype(float)
        scale = 2.0**cells.fraction_bits
        off = round(scale * 5.0 / (45.0 / (2 ** bits[k] - 1))) if reference == "digital" else 0
        x = (cells.values[k, 0].numpy() - off) / scale
        of_cells = scale**2 * (c0 + c1 * x)
        of_reference = 0.0
        if reference == "analog":  # the mean of a cell of the highest level and one of the lowest
            of_reference = scale**2 * ((c0 + c1 * (2 ** bits[k] - 1)) + c0) / 4
        wanted = a @ (of_cells + of_reference)
        got = errors.var(axis=0)
        assert np.abs(got / wanted - 1).max() < 5 * (2 / repeats) ** 0.5
        assert np.abs(errors.mean(axis=0) / np.sqrt(wanted / repeats)).max() < 5


@pytest.mark.parametrize("dac_bits", [1, 2])
def test_read_noise_against_a_brute_force_of_every_read_of_every_cell(dac_bits):
    """Each cell is read anew, and those of the reference column for each column. Moments agree within five standard errors, distributions
    by Kolmogorov's test; reads of other digits, slices, arrays, columns and images are independent."""
    images, per_level = 4000, np.sqrt(1 + 0.5 * np.arange(4))  # of a variance that is affine in the level
    device = Device("own", "here", 5.0, 50.0, read_noise=per_level)
    torch.manual_seed(0)
    made = QLinearDoreFa(ROWS, 6, bias=False, spec=CrossbarSpec(rows=ROWS // 2, cell_bits=2, dac_bits=dac_bits), alpha_init=1.0)
    network, codes, drawn = nn.Sequential(made).eval(), codes_of(1), np.random.default_rng(7)
    found = {}
    for sigma in (None, per_level):
        program(network, replace(device, read_noise=sigma), seed=3)
        for number, (z, k, u, _) in enumerate(reference.reads(made.mapped("ideal"), codes.repeat(images, 1).view(images, 1, 1, -1))):
            found.setdefault((number // (2 * len(made.spec.digit_bits)), z, k), []).append(u[0].double().numpy() / 256)
    levels, errors, wanted = made.ideal_cells().values[:, 0].numpy() // 256, {}, {}
    for (t, z, k), (still, noisy) in found.items():
        errors[t, z, k] = noisy - still
        rows = slice(*made.arrays[t])
        a = codes[0, rows].numpy() >> dac_bits * z & 2**dac_bits - 1
        sigma = per_level / 15.0  # a level is 15 uS
        brute = np.stack([sum(a[i] * (sigma[levels[k, rows][i, c]] * drawn.standard_normal(images)
                                      - (sigma[3] * drawn.standard_normal(images) + sigma[0] * drawn.standard_normal(images)) / 2)
                              for i in range(len(a))) for c in range(6)], axis=1)
        ours, n = errors[t, z, k], images
        of_reference = (per_level[3] ** 2 + per_level[0] ** 2) / 4
        wanted[t, z, k] = [float(a**2 @ (per_level[levels[k, rows][:, c]] ** 2 + of_reference)) / 15**2 + GRID for c in range(6)]
        assert np.abs(ours.var(0) / brute.var(0) - 1).max() < 5 * (4 / n) ** 0.5
        assert np.abs(ours.mean(0) / np.sqrt(brute.var(0) / n)).max() < 5
        assert np.abs(stats.kurtosis(ours)).max() < 5 * (24 / n) ** 0.5 + 0.01
        assert stats.ks_2samp((ours / brute.std(0)).ravel(), (brute / brute.std(0)).ravel()).pvalue > 1e-4
    every = np.concatenate(list(errors.values()), axis=1).T
    standard = every / np.sqrt(np.array(list(wanted.values())).reshape(-1, 1))
    assert abs(standard.var() - 1) < 5 * (2 / standard.size) ** 0.5
    assert abs(stats.kurtosis(standard.ravel())) < 5 * (24 / standard.size) ** 0.5
    assert np.abs(np.corrcoef(every) - np.eye(len(every))).max() < 5 / images**0.5
    assert max(abs(np.corrcoef(line[1:], line[:-1])[0, 1]) for line in every) < 5 / images**0.5


@pytest.mark.parametrize("wq, reference_cells, share", [("dorefa", "device", 0.5), ("sawb", "device", 1.0), ("dorefa", "ideal", 0.0)])
def test_noise_of_a_reference_is_that_of_its_cells(wq, reference_cells, share):
    """The mean of two, one, or none that is noisy: `s^2 = (1 + m) c_0 n`."""
    torch.manual_seed(0)
    network, codes = nn.Sequential(QLinearDoreFa(ROWS, 2000, spec=CrossbarSpec(rows=ROWS), wq=wq, alpha_init=1.0)).eval(), codes_of(1)
    still, noisy = (program(network, Device("own", "here", 1.0, 10.0, read_noise=noise), 0, reference_cells) or reads(network, codes)
                    for noise in (None, 1.0))
    for (z, k), u in noisy.items():
        variance = (u - still[z, k]).double().var() / ((codes >> z) & 1).sum() / (256 / 9) ** 2
        assert abs(float(variance) / (1 + share) - 1) < 5 * (2 / 2000) ** 0.5


def test_noise_does_not_depend_on_batch_engine_or_order():
    network, x = layer(adc_bits=5), codes_of(33).float() / 15
    calibrate(network, x)
    program(network, Device.preset("techC"), seed=1, read_noise=0.5, adc_noise=0.3, adc_offset=0.2, adc_gain=0.02, noise_seed=7)
    with torch.no_grad():
        with image_numbers(100):
            whole = network(x)
        one_by_one = []
        for i in reversed(range(len(x))):
            with image_numbers(100 + i):
                one_by_one.append(network(x[i:i + 1]))
        with set_engine("reference"), image_numbers(100):
            by_reference = network(x)
        with image_numbers(101):
            others = network(x)
        program(network, Device.preset("techC"), seed=1, read_noise=0.5, adc_noise=0.3, adc_offset=0.2, adc_gain=0.02, noise_seed=8)
        with image_numbers(100):
            other_seed = network(x)
    assert first_image() == 0  # behind the blocks
    assert torch.equal(whole, torch.cat(one_by_one[::-1])) and torch.equal(whole, by_reference)
    assert not torch.equal(whole, others) and not torch.equal(whole, other_seed)


def test_a_key_means_the_same_noise_for_ever():
    """As chips are, see `test_cells`; on every engine, as all draw the same."""
    key = read_key(2**63 + 12345, torch.tensor([0, 7]), torch.tensor([0, 123456])).view(-1, 1)
    assert noise(torch.tensor([1e8]), key, torch.arange(0, 96, 19)[None]).tolist() == [
        [14491, -3596, -18828, 13539, 23588, 2221], [21684, 7616, -13434, -6241, 6981, -952]]


@pytest.mark.parametrize("weights", ["offset", "pair"])
@pytest.mark.parametrize("images, size", [(5, (3, 4)), (1, (40, 2))])
def test_noise_does_not_depend_on_the_number_of_threads(weights, images, size):
    """Several images, and a tall one whose rows the threads share."""
    torch.manual_seed(0)
    spec = CrossbarSpec(rows=32, mapping="im2col", adc_bits=5, weights=weights)
    network = nn.Sequential(Qconv2dDoreFa(20, 9, 2, padding=1, bias=False, spec=spec, alpha_init=1.0)).eval()
    x, found, threads = torch.rand(images, 20, *size), [], torch.get_num_threads()
    calibrate(network, x)
    program(network, Device("own", "here", 1.0, 10.0, sigma_us=0.5, read_noise=np.array([0.4, 0.9])), adc_noise=0.2, adc_gain=0.02,
            adc_offset=0.1)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with set_engine("numba"), torch.no_grad():
                found.append(network(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_each_layer_of_each_chip_has_noise_of_its_own():
    network, seeds = nn.Sequential(*layer(), *layer()), set()
    for chip in range(3):
        program(network, Device("own", "here", 1.0, 10.0, read_noise=0.5), chip)
        seeds |= {each.chip.readout.seed for each in network}
    assert len(seeds) == 6


def test_each_slice_has_draws_of_its_own():
    network = layer(400)
    program(network, Device("own", "here", 1.0, 10.0, sigma_us=1.0), adc_offset=0.5, adc_gain=0.03)
    chip = network[0].chip
    of_columns = [(chip.cells.values - network[0].ideal_cells().values)[0, 0, 0], chip.readout.gain[0, 0, 0], chip.readout.offset[0, 0, 0]]
    assert torch.corrcoef(torch.stack(of_columns).double()).triu(1).abs().max() < 5 / 400**0.5  # nor has a cell to do with its converter
    for part in (chip.cells.values, chip.cells.reference, chip.readout.gain, chip.readout.offset):
        assert not any(torch.equal(part[0], other) for other in part[1:])


@pytest.mark.parametrize("spec", [dict(dac_bits=2, adc_bits=5), dict(dac_bits=3, adc_range="ideal"), dict(adc_range="ideal"),
                                  dict(adc_range="dynamic")])
def test_noise_of_digits_of_several_bits_and_without_an_adc(spec):
    """The fast engine draws what the reference engine draws, in arrays of several segments too: `c_0 sum a^2`."""
    torch.manual_seed(0)
    spec = CrossbarSpec(rows=32, mapping="im2col", **spec)
    network = nn.Sequential(Qconv2dDoreFa(20, 9, 2, padding=1, bias=False, spec=spec, alpha_init=1.0)).eval()
    x = torch.rand(3, 20, 3, 4)
    device = Device("own", "here", 1.0, 10.0, sigma_us=0.5, read_noise=0.7)
    found = {}
    for name in ("reference", "numba"):
        with set_engine(name), torch.no_grad():
            if spec.adc_range == "calibrated" and not found:
                calibrate(network, x)
            program(network, device, seed=1, adc_noise=0.2, adc_gain=0.02, adc_offset=0.1)
            with image_numbers(5):
                found[name] = network(x)
    program(network, device, seed=1)
    assert torch.equal(found["reference"], found["numba"]) and not torch.equal(network(x), found["numba"])


def test_converters_are_drawn_once_and_have_their_deviations():
    network = layer(2000)
    program(network, Device("own", "here", 1.0, 10.0), seed=5, adc_offset=0.5, adc_gain=0.03)
    readout = network[0].chip.readout
    n = readout.gain.numel()
    assert readout.gain.shape == readout.offset.shape == (4, 1, 1, 2000) and not readout.noisy
    assert abs(float(readout.gain.std()) / 0.03 - 1) < 5 / (2 * n) ** 0.5
    assert abs(float(readout.offset.double().std()) / (0.5 * 256) - 1) < 5 / (2 * n) ** 0.5
    program(network, Device("own", "here", 1.0, 10.0), seed=6, adc_offset=0.5, adc_gain=0.03)
    assert not ((network[0].chip.readout.gain == readout.gain) | (network[0].chip.readout.offset == readout.offset)).all(3).any()
    several = Qconv2dDoreFa(8, 4000, 3, groups=2, bias=False, spec=CrossbarSpec(rows=4), alpha_init=1.0)  # arrays and groups
    program(nn.ModuleList([several]), Device("own", "here", 1.0, 10.0), seed=5, adc_offset=0.5, adc_gain=0.03)
    drawn = several.chip.readout
    own = np.concatenate([part.double().numpy().reshape(4 * 2 * 9, 2000) for part in (drawn.gain, drawn.offset)])
    assert np.abs(np.corrcoef(own) - np.eye(len(own))).max() < 6 / 2000**0.5  # the largest of 10,296
    program(network, Device("own", "here", 1.0, 10.0), seed=5, adc_offset=0.5, adc_gain=0.03)
    codes = codes_of(1)
    first, again = reads(network, codes), reads(network, codes)
    assert all(torch.equal(first[key], again[key]) for key in first)
    program(network, Device("own", "here", 1.0, 10.0), seed=5)
    for (z, k), u in reads(network, codes).items():
        wanted = np.rint(u[0].numpy() * readout.gain[k, 0, 0].numpy()) + readout.offset[k, 0, 0].numpy()
        assert np.array_equal(first[z, k][0].numpy(), wanted)


@pytest.mark.parametrize("wires", [Wires(wire_ohm=2.0), Wires(driver_ohm=50.0), Wires(wire_ohm=1.0, row_ohm=20.0, driver_ohm=500.0)])
def test_voltage_access_is_exact_for_all_inputs(wires, monkeypatch):
    """Currents of arrays of 8 outputs by Kirchhoff's laws, the reference columns in front of the data, against the sums of effective
    cells; the reference of the first outputs stands for all."""
    monkeypatch.setattr(program_module, "COLUMNS", 8)
    g_min, g_max = 5.0, 100.0
    network, codes = layer(20), codes_of(6)
    program(network, Device("own", "here", g_min, g_max), wires=wires)
    ideal = network[0].ideal_cells()
    for (z, k), u in reads(network, codes).items():
        a = ((codes.numpy() >> z) & 1).astype(float)
        cells = g_min + (g_max - g_min) * ideal.values[k, 0].numpy() / 256
        arrays = [np.concatenate([np.full((ROWS, 1), (g_min + g_max) / 2), cells[:, i:i + 8]], axis=1) for i in (0, 8, 16)]
        current = [1e6 * solve(1e-6 * array, a, wires.wire_ohm, wires.row_ohm, wires.driver_ohm) for array in arrays]
        wanted = (np.concatenate([part[:, 1:] for part in current], axis=1) - current[0][:, :1]) / (g_max - g_min)
        assert np.abs(u.numpy() / 256 - wanted).max() < ROWS * 1.01 / 256  # a row rounds its cell and its reference to the grid


@pytest.mark.parametrize("mapping", ["tap", "im2col"])
@pytest.mark.parametrize("wires", [Wires(wire_ohm=3.0), Wires(wire_ohm=1.0, row_ohm=5.0)])
def test_every_array_has_wires_of_its_own(wires, mapping):
    """A grouped convolution of several arrays: the currents of each by Kirchhoff's laws, of an array of its rows alone."""
    g_min, g_max = 5.0, 100.0
    torch.manual_seed(0)
    made = Qconv2dDoreFa(40, 12, 3, groups=2, bias=False, spec=CrossbarSpec(rows=16, mapping=mapping), alpha_init=1.0)
    program(nn.ModuleList([made]), Device("own", "here", g_min, g_max), wires=wires)
    held, ideal, drawn = made.cells(), made.ideal_cells(), np.random.default_rng(0)
    sizes = {stop - start for start, stop in made.arrays}
    assert len(made.arrays) > 9 and len(sizes) == 2
    for start, stop in made.arrays:
        a = drawn.integers(0, 2, (5, stop - start)).astype(float)
        for k, g in np.ndindex(4, 2):
            cells = g_min + (g_max - g_min) * ideal.values[k, g, start:stop].numpy() / 256
            array = 1e-6 * np.concatenate([np.full((stop - start, 1), (g_min + g_max) / 2), cells], axis=1)
            current = 1e6 * solve(array, a, wires.wire_ohm, wires.row_ohm) / (g_max - g_min)
            seen = np.concatenate([held.reference[k, g, start:stop, None], held.values[k, g, start:stop]], axis=1) / 256
            found = a @ (seen + g_min / (g_max - g_min))
            assert np.abs(found - current).max() < len(cells) * 0.51 / 256


def test_a_digital_reference_is_no_column_of_the_array():
    """Where word lines resist, each column loads them: those of the array alone."""
    g_min, g_max, wires = 5.0, 100.0, Wires(wire_ohm=1.0, row_ohm=20.0, driver_ohm=500.0)
    network, codes = layer(20, "digital"), codes_of(6)
    program(network, Device("own", "here", g_min, g_max), wires=wires)
    ideal = network[0].ideal_cells()
    for (z, k), u in reads(network, codes).items():
        a = ((codes.numpy() >> z) & 1).astype(float)
        array = 1e-6 * (g_min + (g_max - g_min) * ideal.values[k, 0].numpy() / 256)
        wanted = 1e6 * solve(array, a, wires.wire_ohm, wires.row_ohm, wires.driver_ohm) / (g_max - g_min)
        missing = a.sum(1, keepdims=True) * (g_min / (g_max - g_min) - round(256 * g_min / (g_max - g_min)) / 256)
        assert np.abs(u.numpy() / 256 - (wanted - missing)).max() < ROWS * 0.51 / 256


@pytest.mark.parametrize("share, most", [(0.02, 0.03), (0.05, 0.02), (0.1, 0.02), (0.25, 0.02), (0.29, 0.02), (0.5, 0.025)])
def test_gate_access_within_two_percent_of_the_exact_ladder(share, most):
    """128 rows of 6 kOhm cells, 1 Ohm a cell, few to many of the inputs on (`a <= 0.4`: up to 0.29), the reference column taken off, of
    the data column's current. Where it matters, what the ADC sees is much closer to that of the ladders than without wires."""
    g_max, rows = 1e6 / 6000, 128
    torch.manual_seed(0)
    network = nn.Sequential(QLinearDoreFa(rows, 50, bias=False, spec=CrossbarSpec(rows=rows), alpha_init=1.0)).eval()
    device = Device("own", "here", g_max / 100, g_max)
    program(network, device, wires=Wires("gate", 1.0))
    generator = torch.Generator().manual_seed(3)
    codes = (torch.rand(200, rows, generator=generator) < share).to(torch.uint8)
    ideal, scale = network[0].ideal_cells(), (g_max - g_max / 100)
    for k in range(4):
        u = reads(network, codes)[0, k].numpy() / 256
        cells = g_max / 100 + scale * ideal.values[k, 0].numpy() / 256
        array = np.concatenate([np.full((rows, 1), (g_max + g_max / 100) / 2), cells], axis=1)
        exact = 1e6 * gate_exact(1e-6 * array, codes.numpy(), 1.0)
        data = exact[:, 1:] / scale
        wanted = data - exact[:, :1] / scale
        assert np.sqrt(((u - wanted) ** 2).mean() / (data**2).mean()) < most
        straight = codes.numpy().astype(float) @ array / scale
        assert share < 0.1 or np.sqrt(((straight[:, 1:] - data) ** 2).mean() / (data**2).mean()) > 0.05
        without = straight[:, 1:] - straight[:, :1] - wanted  # what the ADC would see if no wire resisted
        assert share < 0.05 or ((u - wanted) ** 2).mean() < 0.36 * (without**2).mean()


@pytest.mark.parametrize("nothing", [0, 1])
def test_arrays_that_conduct_nothing_leave_the_curve_to_the_others(nothing):
    lines, arrays = np.random.default_rng(0).choice([0.0, 160.0], (1, 192, 20)), [(0, 128), (128, 192)]
    lines[:, slice(*arrays[nothing])] = 0
    errors = []
    found, curve = program_module._behind_a_curve(lines, arrays, 1.0, np.random.default_rng(1), errors)
    on = np.random.default_rng(2).random((40, 192)) < 0.2
    (start, stop), s = arrays[1 - nothing], 1e-6 * (on @ found[0])
    exact = gate_exact(1e-6 * lines[0, start:stop], on[:, start:stop], 1.0)
    assert np.sqrt((((s * (curve[0] + s * (curve[1] + s * curve[2]))) - exact) ** 2).mean() / (exact**2).mean()) < 0.015
    assert 0 < max(errors) < 0.015 and not found[:, slice(*arrays[nothing])].any()


def test_the_curve_of_gate_access_is_that_of_the_fullest_array():
    codes, curves = torch.randint(0, 16, (9, 100, 1, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), []
    for rows in (ROWS, 100):
        network = nn.Sequential(QLinearDoreFa(rows, 9, bias=False, spec=CrossbarSpec(rows=ROWS), alpha_init=1.0))
        network[0].set_codes(codes[:, :rows])
        program(network, Device("own", "here", 2.0, 160.0), wires=Wires("gate", 3.0))
        curves.append(network[0].chip.readout.curve)
    assert curves[0] == curves[1]


@pytest.mark.parametrize("weights", ["offset", "pair"])
def test_effective_cells_are_kept_on_disk(weights, tmp_path, monkeypatch):
    """Solved once for the same conductances and wires, whatever the programming; a damaged file is solved again."""
    solved, real = [], program_module.effective
    monkeypatch.setattr(program_module, "effective", lambda *args: (solved.append(1), real(*args))[1])
    network, device, wires = layer(9, weights=weights), Device("own", "here", 5.0, 100.0, sigma_us=2.0), Wires(wire_ohm=1.0, row_ohm=2.0)

    def chip(seed=0, wires=wires, **more):
        program(network, device, seed, wires=wires, **more)
        return network[0].cells()

    wanted = chip()
    assert solved and not list(tmp_path.iterdir())
    for work, damage, other in ((True, False, {}), (False, False, {}), (False, False, {"adc_noise": 0.1}), (True, False, {"seed": 1}),
                                (True, False, {"wires": Wires(wire_ohm=1.0, row_ohm=2.5)}), (True, True, {}), (False, False, {})):
        if damage:
            for path in tmp_path.iterdir():
                path.write_bytes(path.read_bytes()[:-8])
        solved.clear()
        with keep_effective_cells(tmp_path):
            found = chip(**other)
        same = torch.equal(found.values, wanted.values) and torch.equal(found.reference, wanted.reference)
        assert bool(solved) == work and same == (not {"seed", "wires"} & other.keys())
    assert len(list(tmp_path.glob("effective_*.npy"))) == 3 * 4  # of four slices
    solved.clear()
    with monkeypatch.context() as edited, keep_effective_cells(tmp_path):
        edited.setattr(program_module.sources, "digest", lambda *_: "of other code")
        program_module._code.cache_clear()
        chip()
        program_module._code.cache_clear()
    assert solved and len(list(tmp_path.glob("effective_*.npy"))) == 4 * 4
    solved.clear()
    with keep_effective_cells(tmp_path / "no"):
        chip(wires=Wires(wire_ohm=1.0))
    assert solved and not (tmp_path / "no").exists()  # bit lines alone are solved sooner than read
    chip()
    assert not (tmp_path / "no").exists()  # behind the block nothing is kept


@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_error_of_gate_access_on_the_networks_own_reads(reference):
    """What `gate_errors` says, from the ladders of all reads that the reference engine makes, columns and inputs in other loops."""
    from models.quant.engines import reference as reference_engine
    g_min, g_max, rows = 2.0, 160.0, 180  # of two arrays
    torch.manual_seed(0)
    network = nn.Sequential(QLinearDoreFa(rows, 20, bias=False, spec=CrossbarSpec(cell_bits=2, rows=100, reference=reference,
                                                                                 adc_range="full"), alpha_init=1.0)).eval()
    device, x = Device("own", "here", g_min, g_max, sigma_us=4.0), torch.rand(2, rows) * (torch.rand(2, rows) < 0.5)
    program(network, device, seed=2)
    straight = network[0].cells()
    program(network, device, seed=2, wires=Wires("gate", 2.0))
    scale, step, squares = 256, (g_max - g_min) / 3, np.zeros(3)
    off = round(scale * g_min / step) if reference == "digital" else 0
    a_codes, mapped = network[0].a_codes(x), network[0].mapped("ideal")
    for i, (z, k, [u], _) in enumerate(reference_engine.reads(mapped, a_codes)):
        array = slice(*mapped.arrays[i // 8])  # four digits, two slices
        on = (a_codes[:, 0, 0, array].numpy() >> z) & 1
        for column in range(20):
            held = [straight.values[k, 0, array, column]] + ([straight.reference[k, 0, array]] if reference == "analog" else [])
            lines = np.stack([g_min + step * (part.numpy() - off) / scale for part in held], axis=1).clip(0)
            current = 1e6 * gate_exact(1e-6 * lines, on, 2.0) / step * scale
            exact = current[:, 0] - current[:, 1] if reference == "analog" else current[:, 0] - on.sum(1) * (scale * g_min / step - off)
            plain = on @ (held[0] - (held[1] if reference == "analog" else 0)).numpy()
            off_by = (u[:, column].numpy() - exact, plain - exact, exact)
            squares += 4.0 ** (z + 2 * k) * np.array([np.sum(each**2) for each in off_by])
    wanted = np.sqrt(squares[:2] / squares[2])
    [found] = gate_errors(network, x, device, {"0": straight}, 2.0).values()
    assert np.allclose(found, wanted, rtol=1e-6) and found[0] < 0.5 * found[1]
    assert gate_errors(network, torch.zeros(2, rows), device, {"0": straight}, 2.0) == {"0": (0.0, 0.0)}


@pytest.mark.parametrize("arguments, message", [
    ({"adc_noise": -1.0}, "adc_noise is -1.0"),
    ({"adc_offset": 1e7}, "adc_offset is 10000000.0; allowed are numbers from 0 to 1e"), ({"adc_gain": math.nan}, "adc_gain is nan"),
    ({"read_noise": -0.1}, "read_noise"), ({"reference_cells": "none"}, "reference_cells is 'none'")])
def test_bad_values_change_nothing(arguments, message):
    network = layer()
    with pytest.raises(ValueError, match=message):
        program(network, Device.preset("techC"), **arguments)
    assert network[0].chip is None


def test_gate_access_wants_rows_that_are_on_or_off():
    with pytest.raises(ValueError, match="dac_bits 1"):
        program(layer(dac_bits=2), Device.preset("techC"), wires=Wires("gate", 1.0))
