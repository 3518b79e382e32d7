"""models/quant/cost: counts and cell energies against every read and cell, published parts put together, files, bad input.

The oracle of the energies makes each array as a list of its cells' conductances and goes through all reads of all pixels. The
published figures are compositions of published parts: they guard counting and linearity, not the physics.
"""

import contextlib
import copy
import functools
import math
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from models.quant import (
    CrossbarSpec, Qconv2dDoreFa, QLinearDoreFa, calibrate, collect_histograms, convert, crossbar_layers, program, set_engine, set_spec)
from models.quant.arrays.plans import Plan
from models.quant.cost import Band, Technology, adc_fit, count, counting, estimate, scaling
from models.quant.cost.columns import columns, digit_ones
from models.quant.cost.events import events
from models.quant.devices import Device
from models.quant.kernels.ones import Ones
from models.quant.network import diagnostics

pytestmark = pytest.mark.usefixtures("one_thread")
approx = functools.partial(pytest.approx, rel=1e-6, abs=0)  # joules are far below its usual slack of 1e-12
HEADER = "component,value,unit,bits,node_nm,source\n"
PARTS = {"row_on": "0,pJ", "row_bit": "0,pJ", "adc_energy": "0,pJ", "shift_add": "0,pJ", "add": "0,pJ", "buffer": "0,pJ",
         "leakage": "0,mW", "adc_time": "0,ns", "adc_area": "0,um2", "shift_add_area": "0,um2", "row_area": "0,um2",
         "buffer_area": "0,um2", "node": "65,nm", "columns": "64,lines", "columns_per_adc": "1,lines", "read_voltage": "0,V",
         "read_pulse": "0,ns", "cell_area": "48,F2", "g_min": "1,uS", "g_max": "10,uS"}


@pytest.fixture(autouse=True)
def plain_engine():
    """The engine is not the point."""
    with set_engine("reference"):
        yield


@pytest.fixture
def technology(tmp_path):
    """technology(adc_energy="2,pJ", ...): one whose other parts cost nothing; a list of texts gives several sources."""
    def make(**parts):
        lines = []
        for name, values in (PARTS | parts).items():
            for i, value in enumerate([values] if isinstance(values, str) else values):
                value, unit, bits, node = [*value.split(","), "", ""][:4]
                lines.append(f"{name},{value},{unit},{bits},{node},{name} source {i}")
        path = tmp_path / "own.csv"
        path.write_text(HEADER + "\n".join(lines))
        return Technology.load(path)
    return make


def test_files_as_spreadsheets_save_them(technology, tmp_path):
    """With a mark of the byte order, lines of nothing but commas, and two characters at the end of a line."""
    wanted = technology(adc_energy=["2,pJ", "3,pJ"])
    lines = (tmp_path / "own.csv").read_text().splitlines()
    (tmp_path / "own.csv").write_bytes(("\ufeff" + "\r\n".join([*lines, ",,,,,", ""])).encode())
    assert Technology.load(tmp_path / "own.csv") == wanted


def linear(inputs, outputs, spec, ones=True):
    """A linear layer and one image, of ones (code 2^a - 1) or zeros."""
    torch.manual_seed(0)
    layer = QLinearDoreFa(inputs, outputs, spec=spec, alpha_init=1.0).eval()
    return layer, torch.full((1, inputs), float(ones))


def costs(layer, images, technology, **options):
    return estimate(count(layer, images), layer, technology, **options)


# ---- against every read and cell -------------------------------------------------------------------------------------------


def random_layer(rng):
    """A layer of any kind, its input, and the columns of its arrays."""
    w_bits, a_bits = int(rng.integers(2, 9)), int(rng.integers(1, 9))
    spec = CrossbarSpec(
        w_bits=w_bits, a_bits=a_bits, cell_bits=int(rng.integers(1, w_bits + 1)), dac_bits=int(rng.choice([1, min(2, a_bits), a_bits])),
        rows=int(rng.choice([3, 8, 16, 50])), mapping=str(rng.choice(["tap", "im2col"])), reference=str(rng.choice(["analog", "digital"])),
        adc_range="full")
    torch.manual_seed(int(rng.integers(1000)))
    options = {"spec": spec, "alpha_init": 1.0, "wq": str(rng.choice(["dorefa", "sawb"]))}
    images = int(rng.integers(1, 4))
    if rng.random() < 0.25:
        layer = QLinearDoreFa(int(rng.integers(1, 60)), int(rng.integers(1, 9)), **options).eval()
        shape = images, layer.in_features
    else:
        groups = int(rng.choice([1, 1, 2, 3]))
        channels, kernel = groups * int(rng.integers(1, 9)), tuple(map(int, rng.integers(1, 4, 2)))
        out = channels if rng.random() < 0.3 else groups * int(rng.integers(1, 6))  # depthwise where a group has one channel
        layer = Qconv2dDoreFa(channels, out, kernel, tuple(map(int, rng.integers(1, 4, 2))), tuple(map(int, rng.integers(0, 3, 2))),
                              tuple(map(int, rng.integers(1, 3, 2))), groups, **options).eval()
        shape = images, channels, *map(int, rng.integers(5, 9, 2))
    x = torch.rand(shape) * (torch.rand(shape) < rng.choice([0.1, 0.7]))
    return layer, x, int(rng.choice([16, 33, 64]))


def brute_force(layer, x, width, low, high, volt, pulse):
    """What all reads and cells of a layer do, one array after another."""
    spec, quantizer = layer.spec, layer.weight_quant
    with torch.no_grad():
        codes, weights = layer.a_codes(x).numpy(), layer.w_codes().numpy().astype(int)
    twice = quantizer.reference_twice(spec.slice_bits)
    slices = oracle.split(spec.w_bits, spec.cell_bits)
    outputs, group_out = width // len(slices), len(weights) // layer.geometry.groups
    found = {"energy": 0.0, "arrays": 0, "reads": 0, "idle": 0, "line_ones": 0, "line_bits": 0, "cells": 0, "conversions": 0}
    for group, _, lines, on in oracle.word_lines(codes, weights.shape[2:], spec, layer.geometry):
        on = on.reshape(-1, len(lines))
        digits = [on >> shift & 2**bits - 1 for shift, bits in oracle.split(spec.a_bits, spec.dac_bits)]
        found["reads"] += sum(len(digit) for digit in digits)
        found["idle"] += sum(int((digit.sum(1) == 0).sum()) for digit in digits)
        found["conversions"] += sum(len(digit) for digit in digits) * group_out * len(slices)
        for first in range(0, group_out, outputs):
            array = []  # conductances of its bit lines
            for shift, bits in slices:
                step = (high - low) / (2**bits - 1)
                for o in range(group * group_out + first, group * group_out + min(first + outputs, group_out)):
                    cells = np.array([weights[o, channel, ky, kx] >> shift & 2**bits - 1 for ky, kx, channel in lines])
                    array.append(low + step * cells)
                    found["cells"] += len(cells)
                reference = twice[slices.index((shift, bits))] / 2
                if spec.reference == "analog":
                    levels = [reference] if reference % 1 == 0 else [2**bits - 1, 2 * reference - (2**bits - 1)]
                    array += [np.full(len(lines), low + step * level) for level in levels]
            # A digit's pulses add up to its value.
            found["energy"] += sum(volt**2 * pulse * (digit[:, :, None] * np.array(array).T[None]).sum() for digit in digits)
            found["arrays"] += 1
            found["line_ones"] += sum(int((on >> b & 1).sum()) for b in range(spec.a_bits))
            found["line_bits"] += on.size * spec.a_bits
    return found


def test_counts_and_cell_energy_are_those_of_every_read_and_cell(technology):
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(40):
        layer, x, width = random_layer(rng)
        found = technology(columns=f"{width},lines", read_voltage="0.3,V", read_pulse="7,ns", g_min="2,uS", g_max="90,uS")
        report = costs(layer, x, found)
        expected = brute_force(layer, x, width, 2e-6, 90e-6, 0.3, 7e-9)
        done = report.layers[0].events
        energy = report.energy_by_component["cells"].typical * len(x)
        assert math.isclose(energy, expected["energy"], rel_tol=1e-12, abs_tol=1e-30), layer
        assert (done.arrays, done.reads, done.idle_reads, done.line_ones, done.line_bits, done.cells_used,
                done.conversions[6]) == (
            expected["arrays"], expected["reads"], expected["idle"], expected["line_ones"], expected["line_bits"], expected["cells"],
            expected["conversions"]), layer
        layer.set_spec(replace(layer.spec, adc_idle="skip"))
        made = expected["conversions"] - expected["idle"] * expected["conversions"] // expected["reads"]
        assert costs(layer, x, found).layers[0].events.conversions[6] == made
        kinds |= {type(layer).__name__, layer.spec.mapping, layer.spec.reference, type(layer.weight_quant).__name__,
                  layer.spec.dac_bits > 1, layer.geometry.groups > 1}
    assert len(kinds) == 10  # each kind was there


@pytest.mark.parametrize("images", [1, 2, 14, 15, 16, 17, 255, 256, 300])
def test_fields_of_a_word_never_carry_over(images):
    """Sums of bits in two, four and eight bits of a word, full ones too."""
    for codes in (torch.randint(0, 256, (images, 7, 5), dtype=torch.uint8), torch.full((images, 7, 5), 255, dtype=torch.uint8)):
        counter = Ones(7, 5, 8, [0, 2, 5])
        of_segments = counter.add(codes)
        assert counter.sums.tolist() == [(codes >> b & 1).sum(0).tolist() for b in range(8)]
        parts = codes[:, :, :2], codes[:, :, 2:]
        assert of_segments.tolist() == torch.stack([(part[:, None] >> torch.arange(8).view(-1, 1, 1) & 1).sum(3) for part in parts],
                                                   1).tolist()


def network():
    """Three layers with batch norm and ReLU between them, and six images."""
    torch.manual_seed(1)
    spec = CrossbarSpec(adc_range="full", adc_bits=5, rows=16)
    net = nn.Sequential(Qconv2dDoreFa(5, 12, 3, padding=1, spec=spec, alpha_init=1.0), nn.BatchNorm2d(12), nn.ReLU(),
                        Qconv2dDoreFa(12, 8, 3, 2, spec=spec, alpha_init=1.0), nn.ReLU(), nn.Flatten(),
                        QLinearDoreFa(72, 6, spec=spec, alpha_init=1.0)).eval()
    return net, torch.rand(6, 5, 8, 8)


def test_counts_depend_on_no_batch_no_cells_and_are_linear_in_images():
    net, images = network()
    whole = count(net, images)
    set_spec(net, CrossbarSpec(cell_bits=4, adc_bits=8, adc_range="full"))
    parts = count(net, [images[:1], images[1:4], images[4:]] * 2, layouts=[("im2col", 9), ("tap", 16), ("tap", 16, 3)])
    assert (whole.images, parts.images) == (6, 12)
    for name, layer in whole.layers.items():
        other = parts.layers[name]
        assert np.array_equal(2 * layer.ones, other.ones) and 2 * layer.pixels == other.pixels
        assert np.array_equal(2 * layer.reads["tap", 16, 1], other.reads["tap", 16, 1])
    assert all(layer.watch is None for _, layer in net.named_modules() if hasattr(layer, "watch"))


def test_counts_of_both_are_those_of_all_images():
    net, images = network()
    whole, both = count(net, images), count(net, images[:2]) + count(net, images[2:])
    assert both.images == whole.images
    for name, layer in whole.layers.items():
        for field in fields(layer):
            np.testing.assert_equal(getattr(both.layers[name], field.name), getattr(layer, field.name))


def test_counting_rides_on_any_pass(tiny):
    """On the fused pass of a network too, which calls its layers with codes, and on one with ADCs."""
    with set_engine("auto"):
        net = tiny(spec=CrossbarSpec(adc_range="ideal"))
        images = torch.randn(3, 3, 32, 32)
        with torch.inference_mode(), counting(net) as counts:
            net(images)
        hooks = [layer.register_forward_hook(lambda *_: None) for layer in net.modules()]  # a hook stops the fusion
        other = count(net, images)
    assert hooks and counts.images == 3
    assert list(counts.layers) == list(other.layers) and len(counts.layers) == 5
    for name, layer in counts.layers.items():
        assert np.array_equal(layer.ones, other.layers[name].ones)


@pytest.mark.parametrize("weights", ["offset", "pair"])
def test_weights_are_counted_with_the_images_and_anew_where_they_change(weights):
    """So that no estimate takes longer than another: of sums of several processes' counts, and of cells of another kind too."""
    net, images = network()
    counts = count(net, images) + count(net, images)
    set_spec(net, CrossbarSpec(weights=weights, adc_range="full", rows=16))
    layers = [layer for layer in net.modules() if hasattr(layer, "w_codes")]
    for layer in layers:
        layer.w_codes = lambda: pytest.fail("weights were counted anew")
    before = estimate(counts, net, Technology.load("rram_65nm")).energy
    for layer in layers:
        del layer.w_codes
        layer.weight.data[0] *= 0.25
    other = estimate(counts, copy.deepcopy(net), Technology.load("rram_65nm")).energy
    assert estimate(counts, net, Technology.load("rram_65nm")).energy == other != before


def test_weights_are_counted_anew_where_their_steps_change():
    net = convert(nn.Linear(9, 4), CrossbarSpec(4, 4, adc_range="ideal"), torch.randn(8, 9), first_last_bits=None)
    [(_, layer)] = crossbar_layers(net)
    for factor in (1, 2):
        layer.weight_quant.scale.mul_(factor)
        found, codes = digit_ones(layer), layer.w_codes()[:, :, 0, 0]
        assert found[:, 0].tolist() == [(codes >> bit & 1).sum(0).tolist() for bit in range(4)]


def test_layers_add_up_and_no_ones_cost_no_cells():
    net, images = network()
    counts = count(net, images)
    report = estimate(counts, net, Technology.load("rram_65nm"))
    for whole, of in ((report.energy, "energy"), (report.area, "area")):
        total = sum(np.array([np.array(band) for band in getattr(layer, of).values()]).sum(0) for layer in report.layers)
        assert np.allclose(total, whole, rtol=1e-12)
        assert whole.low < whole.typical <= whole.high
    assert np.allclose(report.latency, sum(np.array(layer.latency) for layer in report.layers), rtol=1e-12)
    assert np.allclose(report.tops_per_watt.low, 1e-12 * report.operations / report.energy.high)
    assert report.operations == 2 * (64 * 9 * 5 * 12 + 9 * 9 * 12 * 8 + 72 * 6)
    double = estimate(count(net, images.repeat(2, 1, 1, 1)), net, Technology.load("rram_65nm"))
    assert np.allclose(double.energy, report.energy, rtol=1e-12) and np.allclose(double.area, report.area, rtol=1e-12)
    layer, dark = linear(20, 4, CrossbarSpec(adc_range="full"), ones=False)
    dark = costs(layer, dark, Technology.load("rram_65nm"))
    assert dark.energy_by_component["cells"] == (0, 0, 0) and dark.layers[0].events.idle_reads == dark.layers[0].events.reads
    assert dark.energy_by_component["ADC"].typical > 0


@pytest.mark.parametrize("more, groups, width, row_blocks, arrays", [
    ({}, 1, 128, 9, 18), ({"cell_bits": 4}, 1, 128, 9, 9), ({"weights": "pair"}, 1, 128, 9, 36), ({}, 2, 128, 18, 18),
    ({"rows": 48}, 1, 128, 27, 54), ({"cell_bits": 1}, 1, 30, 9, 9 * 19), ({"mapping": "im2col", "rows": 250}, 1, 300, 5, 5)])
def test_row_blocks_are_what_reports_count_and_arrays_what_costs_count(more, groups, width, row_blocks, arrays, technology):
    """128 outputs of 2 slices are 256 bit lines: two arrays of 128 columns for each of 9 taps. (In 30 columns 7 outputs of 4 slices.)"""
    spec = CrossbarSpec(**{"cell_bits": 2, "adc_range": "full"} | more)
    layer = Qconv2dDoreFa(128, 128, 3, groups=groups, spec=spec, alpha_init=1.0).eval()
    x = torch.zeros(1, 128, 3, 3)
    [found] = diagnostics.report(layer, x, collect_histograms(layer, x))
    assert found["row_blocks"] == row_blocks and f", {row_blocks} row blocks of up to " in layer.extra_repr()
    [cost] = costs(layer, x, technology(columns=f"{width},lines")).layers
    assert cost.events.arrays == arrays


# ---- what hardware does to counts ------------------------------------------------------------------------------------------


def test_a_plan_makes_the_conversions_of_its_bits(technology):
    layer, x = linear(20, 6, CrossbarSpec(w_bits=2, a_bits=2, adc_plan="significance", adc_bits=2.0, rows=16))
    with pytest.raises(ValueError, match="no plan yet"):
        costs(layer, x, technology())
    plan = np.array([[0, 3], [3, 5]])
    layer.set_plan(Plan(bits=plan, delta=np.ones((2, 2)), q_min=np.zeros((2, 2))))
    report = costs(layer, x, technology(adc_energy="2,pJ/bit,1-8", adc_time="3,ns/bit", adc_area="1,um2/bit", columns_per_adc="4,lines"))
    assert report.area_by_component["ADC"].typical == approx(report.layers[0].events.arrays * 16 * 5e-12)  # for the most bits
    assert report.layers[0].events.conversions == {3: 2 * 2 * 6, 5: 2 * 6} and report.layers[0].events.shift_adds == 36
    assert report.energy.typical == approx(2e-12 * (24 * 3 + 12 * 5))
    # 16 ADCs an array, 6 outputs: one conversion in turn for the first digit, and for the second, of 12, one of 4 bits in the mean.
    assert report.latency.typical == approx(3e-9 * (3 + 4))


def test_a_plan_by_ones_makes_the_conversions_of_each_n(technology):
    """Of two arrays, with 16 and 4 rows, and three images: bits by the length of n, and what counting the ones takes."""
    spec = CrossbarSpec(w_bits=2, a_bits=2, adc_plan="ones", adc_bits=2.0, rows=16)
    layer, _ = linear(20, 6, spec)
    x = torch.zeros(3, 20)
    x[0], x[1, :3], x[1, 16:18], x[2, 5] = 1, 1 / 3, 2 / 3, 1  # n of digit 0: 16 and 4; 3 and 0; 1 and 0; of digit 1: 16, 4; 0, 2; 1, 0
    bits = np.array([[[0, 1, 2, 3, 4, 5], [0, 0, 0, 3, 3, 6]], [[0, 0, 2, 4, 4, 7], [0, 0, 0, 0, 8, 8]]])
    layer.set_plan(Plan(bits, np.ones(bits.shape), np.zeros(bits.shape)))
    wanted = Counter()  # by hand: lengths of n 5 and 3; 2 and 0; 1 and 0, and 5 and 3; 0 and 2; 1 and 0
    for z, lengths in enumerate(([5, 3, 2, 0, 1, 0], [5, 3, 0, 2, 1, 0])):
        for length in lengths:
            wanted.update([int(b) for b in bits[z, :, length] if b] * 6)
    parts = {"adc_energy": "2,pJ/bit,1-8", "adc_time": "3,ns/bit", "adc_area": "1,um2/bit", "columns_per_adc": "4,lines",
             "cell_area": "0,F2", "columns": "12,lines"}
    report = costs(layer, x, technology(**parts))
    done = report.layers[0].events
    assert {b: n for b, n in done.conversions.items() if n} == wanted
    assert done.shift_adds == sum(wanted.values()) and done.most_bits == 8
    assert report.energy.typical == approx(2e-12 * sum(b * n for b, n in wanted.items()) / 3)
    # Three ADCs an array take two turns for the 6 outputs of one slice, and four for those of both.
    assert report.latency.typical == approx(3e-9 * sum(2 * b * n / 6 for b, n in wanted.items()) / 6)
    counted = costs(layer, x, technology(**parts, count="7,fJ,,65", count_area="5,um2,,65"))
    # Each image: 20 word lines times two bits; two arrays of 16 rows.
    assert counted.energy_by_component["logic"].typical == approx(40 * 7e-15)
    assert counted.area.typical - report.area.typical == approx(2 * 16 * 5e-12)
    assert set(counted.sources) == set(report.sources) | {"count", "count_area"}
    layer.set_spec(replace(spec, adc_plan="uniform", adc_bits=5, adc_range="full", adc_idle="skip"))
    without = costs(layer, x, technology(**parts, count="7,fJ,,65", count_area="5,um2,,65"))
    assert without.energy_by_component["logic"] == without.area_by_component["logic"] == (0, 0, 0)
    assert not {"count", "count_area"} & {*without.sources}


@pytest.mark.parametrize("name", Technology.presets())
def test_counting_ones_costs_something_in_every_technology(name):
    """A full adder for each word line: an eighth of 0.03 pJ of an 8-bit addition at 45 nm, and the 32nd part of 278 um2 at 40 nm."""
    found = Technology.load(name)
    assert found.of("count")[0].at("count", 45) == approx(0.03e-12 / 8)
    assert found.of("count_area")[0].at("count_area", 40) == approx(278e-12 / 32)


def test_latency_copies_pipeline_and_leakage(technology):
    net, images = network()
    parts = {"read_pulse": "10,ns", "read_setup": "5,ns", "adc_time": "2,ns", "columns": "32,lines", "columns_per_adc": "8,lines",
             "leakage": "3,uW"}
    counts = count(net, images)
    one = estimate(counts, net, technology(**parts))
    # 8 outputs of 4 cells fill an array; its 4 ADCs take 8 turns; 4 digits a pixel.
    expected = [pixels * 4 * (5 + 10 + turns * 2) * 1e-9 for pixels, turns in ((64, 8), (9, 8), (1, 6))]
    assert [layer.latency.typical for layer in one.layers] == approx(expected)
    # 9 taps of 1 array each way, 2 wide; 9; 5 arrays of 16 rows.
    assert [layer.events.arrays for layer in one.layers] == [18, 9, 5] and one.interval == one.latency
    assert one.utilisation == 4 * (12 * 45 + 8 * 108 + 6 * 72) / (32 * 16 * 32)
    assert one.energy.typical == approx(3e-6 * 32 * sum(expected))
    two = estimate(counts, net, technology(**parts, copies="2,", pipelined="1,"))
    halved = sum(expected[:2]) / 2 + expected[2]  # the pixel of the linear layer is one copy's
    assert two.latency.typical == approx(halved) and two.interval.typical == approx(expected[0] / 2)
    assert two.leakage.typical == approx(2 * one.leakage.typical)
    assert two.tops.typical == approx(1e-12 * two.operations / (expected[0] / 2))
    # Which source is the cheapest is a matter of the conversions of all pixels: 2 bits in nearly all of them, 8 in those of the last layer.
    for (_, layer), bits in zip(crossbar_layers(net), (2, 2, 8)):
        layer.set_spec(replace(layer.spec, adc_bits=bits))
    band = estimate(counts, net, technology(columns="32,lines", columns_per_adc="8,lines", adc_time=["3,ns,1-8", "1,ns/bit,1-8"])).latency
    assert band == approx([4e-9 * sum(conversions) for conversions in (
        (64 * 8 * 2, 9 * 8 * 2, 6 * 8), (64 * 8 * 3, 9 * 8 * 3, 6 * 3), (64 * 8 * 3, 9 * 8 * 3, 6 * 3))])
    # A copy for each pixel: of 8, 8 and 6 conversions those of 8 bits count as much. Of 5 bits they make one source the cheapest for all
    # layers, and the other one for the slowest, after which a pipelined network takes its next image.
    for bits, latency, interval in ((8, (66, 66, 80), (24, 24, 48)), (5, (62, 66, 66), (24, 24, 30))):
        layer.set_spec(replace(layer.spec, adc_bits=bits))
        parts |= {"copies": "64,", "pipelined": "1,", "read_pulse": "0,ns", "read_setup": "0,ns", "adc_time": ["3,ns,1-8", "1,ns/bit,1-8"]}
        found = estimate(counts, net, technology(**parts))
        assert found.latency == approx([4e-9 * conversions for conversions in latency])
        assert found.interval == approx([4e-9 * conversions for conversions in interval])
        assert found.energy == approx([found.leakage.typical * seconds for seconds in found.interval])


def test_columns_to_an_adc_of_the_hardware_come_before_those_of_the_technology(technology):
    """8 outputs of 4 cells fill an array of 32 columns; of the last layer there are 6. 16 columns to an ADC are 2 of them and 16 turns."""
    net, images = network()
    parts = {"adc_time": "2,ns", "adc_area": "3,um2", "shift_add_area": "5,um2", "columns": "32,lines", "columns_per_adc": "8,lines"}
    counts, arrays = count(net, images), (18, 9, 5)
    layers = [layer for _, layer in crossbar_layers(net)]
    for shared, adcs, turns in (((None,) * 3, (4, 4, 4), (8, 8, 6)), ((16, 16, 16), (2, 2, 2), (16, 16, 12)),
                                ((None, 5, 32), (4, 7, 1), (8, 5, 24))):
        for layer, m in zip(layers, shared):
            layer.set_spec(replace(layer.spec, columns_per_adc=m))
        found = estimate(counts, net, technology(**parts))
        assert [layer.latency.typical for layer in found.layers] == approx([n * 4 * t * 2e-9 for n, t in zip((64, 9, 1), turns)])
        for part, area in (("ADC", 3e-12), ("logic", 5e-12)):
            assert [layer.area[part].typical for layer in found.layers] == approx([n * m * area for n, m in zip(arrays, adcs)])


def test_the_whole_bill_of_a_grouped_layer(technology):
    """Each part by itself, counted by hand: two groups of 18 rows on arrays of 16, and of three outputs of two slices on five columns."""
    spec = CrossbarSpec(w_bits=2, a_bits=3, cell_bits=1, dac_bits=2, rows=16, adc_bits=5, adc_range="full", mapping="im2col")
    torch.manual_seed(3)
    layer, x = Qconv2dDoreFa(4, 6, 3, 2, 1, groups=2, spec=spec, alpha_init=1.0).eval(), torch.rand(2, 4, 5, 5)
    counts, hardware = count(layer, x), {"columns": "5,lines", "columns_per_adc": "4,lines"}
    arrays, pixels, bits = 2 * 2 * 2, 2 * 9, 3  # groups, tall, wide
    bit_lines = 2 * 2 * (3 * 2 + 2 * 4)  # of outputs, and of references: a slice's mean is that of two lines
    conversions = 2 * pixels * 2 * 2 * 3 * 2  # digits, pixels, groups, tall, outputs, slices
    uses = {"row_on": brute_force(layer, x, 5, 0, 0, 0, 0)["line_ones"], "row_bit": pixels * 36 * bits * 2,
            "column_bit": pixels * bit_lines * bits, "column_pulse": pixels * bit_lines * (3 + 1), "array_bit": pixels * arrays * bits,
            "adc_energy": conversions, "shift_add": conversions, "add": pixels * 6 * 2, "buffer": (pixels * 36 + pixels * 6) * bits}
    for part, times in uses.items():
        report = estimate(counts, layer, technology(**hardware, **{part: "2,pJ"}))
        assert report.energy == approx([2e-12 * times / 2] * 3), part
    places = {"adc_area": arrays * 2, "shift_add_area": arrays * 2, "row_area": arrays * 16, "buffer_area": 4 * 25 * bits}
    cells = arrays * 16 * (5 + 4) * 48 * 65e-9**2
    for part, times in places.items():
        for copies in (1, 3):
            report = estimate(counts, layer, technology(**hardware, **{part: "2,um2", "copies": f"{copies},"}))
            shared = 1 if part == "buffer_area" else copies
            assert report.area == approx([copies * cells + 2e-12 * times * shared] * 3), part
    slow = estimate(counts, layer, technology(**hardware, adc_time="1,ns"))
    assert slow.latency == approx([1e-9 * 9 * 2 * 2] * 3)  # pixels, digits, turns of two ADCs for four bit lines
    assert slow.energy == (0, 0, 0) and slow.tops_per_watt == (math.inf,) * 3


def test_idle_reads_are_skipped_where_hardware_can(technology):
    layer, _ = linear(32, 4, CrossbarSpec(a_bits=2, adc_range="full", rows=16))
    x = torch.cat([torch.full((1, 16), 1 / 3), torch.zeros(1, 16)], 1)  # code 1 on the first array
    parts = {"adc_energy": "1,pJ", "shift_add": "1,pJ"}
    full, skipped = (costs(layer, x, technology(**parts, skip_idle=f"{skip},")) for skip in (0, 1))
    assert full.energy.typical == approx(1e-12 * 2 * (2 * 2 * 4 * 4)) and full.layers[0].events.idle_reads == 3
    assert skipped.energy.typical == approx(full.energy.typical / 4)
    layer.set_spec(CrossbarSpec(a_bits=2, adc_range="full", rows=8))
    with pytest.raises(ValueError, match="counted for tap mapping, 16 rows, dac_bits 1, not for tap mapping, 8 rows, dac_bits 1"):
        estimate(count(layer, x, [("tap", 16)]), layer, technology())


def test_a_digital_reference_takes_additions():
    """Two arrays, two digits: sums of arrays, and then what is taken off each output and, for it, the rows of each read that are on."""
    def adds(reference):
        layer, x = linear(20, 6, CrossbarSpec(w_bits=2, a_bits=2, adc_range="full", rows=16, reference=reference))
        return events(next(iter(count(layer, x).layers.values())), layer, 128, 8).adds

    assert (adds("analog"), adds("digital")) == (6 * 2, 6 * 3 + 2 * 2)


def test_signed_inputs_are_fetched_in_phases_and_outputs_written_once(technology):
    """Eleven codes of 4 bits for each phase, and four outputs."""
    x = torch.randn(5, 11, generator=torch.Generator().manual_seed(7))
    net = convert(nn.Linear(11, 4), CrossbarSpec(4, 4, adc_range="full"), x, inputs="phases", first_last_bits=None)
    assert costs(net, x, technology(buffer="2,pJ")).energy.typical == approx(2e-12 * (2 * 11 + 4) * 4)


def test_pairs_take_two_bit_lines_and_no_reference(technology):
    """|2 W - L| of DoReFa's 2 bits: 3 1 1 3; SAWB's |W - m|: 1 0 1."""
    for wq, levels in (("dorefa", [3, 1, 1, 3]), ("sawb", [1, 0, 1])):
        spec = CrossbarSpec(w_bits=2, a_bits=1, adc_range="full", weights="pair")
        layer = QLinearDoreFa(len(levels), 1, spec=spec, alpha_init=1.0, wq=wq).eval()
        layer.set_codes(torch.arange(len(levels), dtype=torch.uint8).view(1, -1, 1, 1))
        report = costs(layer, torch.ones(1, len(levels)), technology(read_voltage="1,V", read_pulse="1,ns", g_min="1,uS", g_max="10,uS"))
        slices = columns(layer).slice_bits
        cells, on = 2 * len(slices) * len(levels), sum(bin(level).count("1") for level in levels)
        assert columns(layer).of_output == 2 * len(slices) and columns(layer).of_reference == 0
        assert report.energy_by_component["cells"].typical == approx(1e-15 * (cells + 9 * on))
        assert report.layers[0].events.cells_used == cells


def test_levels_are_those_of_the_device(technology):
    layer, x = linear(6, 2, CrossbarSpec(w_bits=4, a_bits=1, cell_bits=2, adc_range="full", reference="digital"))
    device = Device("mine", "", 5.0, 65.0)
    program(layer, device)
    report = costs(layer, x, technology(read_voltage="2,V", read_pulse="1,us"), device=device)
    weights = layer.w_codes().numpy()
    levels = int((weights & 3).sum() + (weights >> 2).sum())
    assert report.energy_by_component["cells"].typical == approx(4e-6 * 1e-6 * (5 * 2 * 12 + 20 * levels))


def test_a_buffer_holds_the_largest_input_of_a_call(technology):
    """A layer that is called three times, for inputs of other sizes, has one buffer; batches and images do not make it larger."""
    spec = CrossbarSpec(w_bits=4, a_bits=3, adc_range="full")
    layer = Qconv2dDoreFa(4, 4, 3, padding=1, spec=spec, alpha_init=1.0).eval()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(self.layer(x[..., :3, :3])) + self.layer(x)[..., :3, :3]

    network, x = Twice(), torch.rand(5, 4, 6, 7)
    with counting(network) as counts:
        network(x[:2])
        network(x[2:])
    report = estimate(counts, network, technology(buffer_area="2,um2", cell_area="0,F2"))
    assert report.area == approx([2e-12 * 4 * 6 * 7 * 3] * 3)


def test_a_range_that_moves_leaves_nothing_to_take_off(technology):
    """Behind the ADC of a digital reference, which is subtracted from each output otherwise; rows that are on are counted either way."""
    adds = []
    for plan in ("significance", "ones"):
        layer, x = linear(6, 2, CrossbarSpec(w_bits=4, a_bits=2, cell_bits=2, adc_bits=2, adc_plan=plan, reference="digital"))
        calibrate(layer, x)
        adds.append(costs(layer, x, technology(add="1,pJ")).layers[0].events.adds)
    assert adds[0] - adds[1] == len(x) * 2 and adds[1] == len(x) * (2 * 1 + 2)  # outputs and arrays; reads of two digits


# ---- technologies ----------------------------------------------------------------------------------------------------------


def test_sources_make_a_band_and_are_named(technology):
    layer, x = linear(4, 1, CrossbarSpec(w_bits=1, a_bits=1, adc_bits=3, adc_range="full"))
    found = technology(adc_energy=["3,pJ,1-8", "0.9,pJ/bit", "0.125,pJ/level", "9,pJ,6", "2,pJ,1-8,130"], add="1,pJ")
    report = costs(layer, x, found)
    scaled = 2 * scaling.energy_factor(130, 65)
    assert np.allclose(report.energy_by_component["ADC"], Band(1e-12 * min(scaled, 1), 3e-12, 4.5e-12))
    assert {part: [origin.text for origin in origins] for part, origins in report.sources.items()} == {
        "adc_energy": ["adc_energy source 4", "adc_energy source 0", "adc_energy source 3"], "add": ["add source 0"] * 3}
    assert np.allclose(report.energy, np.array(report.energy_by_component["ADC"]) + 1e-12)


@pytest.mark.parametrize("part, unit", [("adc_energy", "pJ"), ("adc_area", "um2"), ("adc_time", "ns")])
def test_one_source_makes_the_typical_costs_of_all_bits(part, unit, technology):
    """Where it is for one number of bits those of others are taken from there: by its law, else in proportion to bits."""
    layer, x = linear(4, 1, CrossbarSpec(w_bits=1, a_bits=1, adc_bits=3, adc_range="full"))  # one conversion by one converter
    quantity, size = {"pJ": ("energy", 1e-12), "um2": ("area", 1e-12), "ns": ("latency", 1e-9)}[unit]
    for first, values in ((f"0.9,{unit},6", (0.75, 0.9, 1.05)), (f"0.01,{unit}/level,6", (0.32, 0.64, 1.28)), (f"2,{unit},1-7", (2, 2, 2))):
        found = technology(**{part: [first, f"0.05,{unit}/bit,1-8", f"9,{unit},6-7"]}, cell_area="0,F2", columns="1,lines")
        for bits, value in zip((5, 6, 7), values):
            layer.set_spec(replace(layer.spec, adc_bits=bits))
            band = getattr(costs(layer, x, found), quantity)
            assert band == approx([size * each for each in (0.05 * bits, value, 9 if bits > 5 else value)])
    message = f"own has no {part} for converters of 8 bits; it has 1 to 7 bits by {part} source 0; 1 to 8 bits by {part} source 1; "
    with pytest.raises(ValueError, match=message + f"6 to 7 bits by {part} source 2: the first, which is typical, must cover them"):
        found.for_bits(part, [8])


def test_values_are_told_as_they_were_given_and_at_the_node(technology):
    """By the polynomials of 20 and 32 nm at 0.9 V: energies of 0.20079 and 0.457137, and of 28 nm by the line between their logarithms
    0.36185."""
    found = technology(adc_energy=["0.9,pJ,6,28", "15,fJ/bit,1-8,32", "0.5,pJ"], leakage="2,uW,,28", adc_time="3,ns/bit,,28", node="32,nm")
    texts = [source.value_text(32) for part in ("adc_energy", "leakage", "adc_time") for source in found.of(part)]
    assert texts == ["0.9 pJ for 6 bits at 28 nm, 1.137 pJ at 32 nm", "0.015 pJ/bit", "0.5 pJ", "2 uW at 28 nm, 2.527 uW at 32 nm",
                     "3 ns/bit"]


def test_typical_costs_of_presets_never_fall_with_more_bits():
    for name in Technology.presets():
        found = Technology.load(name)
        for part in ("adc_energy", "adc_area", "adc_time"):
            values = []
            for bits in range(1, 13):
                with contextlib.suppress(ValueError):  # too many for it
                    values.append(found.for_bits(part, [bits])[0].at(part, found.node, bits))
            assert len(values) >= (12 if name.startswith("rram") else 8) and (np.diff(values) >= 0).all()


def test_units_and_values_of_another_node(technology):
    """Energy and leakage are scaled as energy, area as area, times not at all."""
    for units, part in ((dict(fJ=1e-15, pJ=1e-12, nJ=1e-9), "add"), (dict(ps=1e-12, ns=1e-9, us=1e-6), "adc_time"),
                        (dict(um2=1e-12, mm2=1e-6), "row_area"), (dict(nW=1e-9, uW=1e-6, mW=1e-3), "leakage")):
        factor = {"row_area": scaling.area_factor(130, 65), "adc_time": 1}.get(part, scaling.energy_factor(130, 65))
        for unit, size in units.items():
            [own], [other] = (technology(**{part: f"3,{unit},,{node}"}).of(part) for node in ("", 130))
            assert (own.at(part, 65), other.at(part, 65)) == approx((3 * size, 3 * size * factor))
    found = technology(adc_energy="3,pJ", adc_fit="2,GS/s", read_voltage="200,mV")
    assert [source.component for source in found.of("adc_energy")] == ["adc_energy", "adc_fit"]  # the fit is the last
    assert found.of("adc_area")[1].at("adc_area", 65, 6) == adc_fit.area(6, 65, 2e9) and found.read_voltage == 0.2
    none = technology(adc_energy="3,pJ", adc_fit="0,GS/s")
    assert [source.component for source in none.of("adc_energy")] == ["adc_energy"]


def test_scaling_between_nodes():
    assert scaling.energy_factor(45, 45) == scaling.area_factor(28, 28) == 1
    assert scaling.energy_factor(65, 32) * scaling.energy_factor(32, 65) == approx(1)
    # The polynomials at the nominal supplies, by hand; the published area of 32 nm relative to 65 nm.
    assert scaling.energy_factor(130, 65) == approx((3.755 * 1.21 - 4.398 * 1.1 + 1.975) / (7.171 * 1.69 - 6.709 * 1.3 + 2.904))
    table = {130: (6.30129, 6.4), 90: (3.21208, 2.8), 65: (1.68075, 1.5), 45: (0.8612, 1), 32: (0.45714, 0.46), 20: (0.20079, 0.21),
             16: (0.13847, 0.19), 14: (0.09622, 0.17), 10: (0.07024, 0.1), 7: (0.04781, 0.059)}  # fJ, area
    for node, (energy, area) in table.items():
        assert (scaling.energy_factor(45, node), scaling.area_factor(45, node)) == approx((energy / 0.8612, area), rel=2e-4)
    assert scaling.area_factor(65, 32) == approx(0.31, rel=0.02)
    for factor in (scaling.energy_factor, scaling.area_factor):  # linear in logarithms between nodes
        assert factor(90, (90 * 65) ** 0.5) == approx(factor(90, 65) ** 0.5)
    nodes = np.geomspace(130, 7, 50)
    for factor in (scaling.energy_factor, scaling.area_factor):
        assert (np.diff([factor(45, node) for node in nodes]) < 0).all()


@pytest.mark.parametrize("bits, energy, area", [(4, 0.924, 3274), (5, 0.936, 3287), (6, 1.065, 3417), (7, 1.312, 3637), (8, 1.714, 3939),
                                                (9, 2.34, 4324), (10, 3.31, 4796)])
def test_adc_fit(bits, energy, area):
    assert 1e12 * adc_fit.energy(bits, 32, 1e8) == approx(energy, rel=1e-3)
    assert 1e12 * adc_fit.area(bits, 32, 1e8) == approx(area, rel=1e-3)


def test_adc_fit_at_other_rates_and_nodes():
    """Powers of rate and node; a rate costs energy from where the thermal limit ends, 10 dB for 32.5 times the rate (arXiv 2404.06553)."""
    slow, fast, faster = (adc_fit.energy(6, 32, rate) for rate in (1e7, 1e11, 1e12))
    assert slow == adc_fit.energy(6, 32, 1e8) < fast and faster / fast == approx(10 ** (0.28719 * math.log(10)))
    for rate, times in ((1e7, 0.1), (1e12, 10)):
        energies = adc_fit.energy(6, 65, rate) / adc_fit.energy(6, 32, rate * times)
        areas = adc_fit.area(6, 65, rate) / adc_fit.area(6, 32, rate * times)
        wanted = (65 / 32) ** 0.99328 * times**-0.18072 * energies**0.29912
        assert areas == approx(wanted)
    assert adc_fit.energy(6, 65, 1e8) / slow == approx((65 / 32) ** 1.88004)


def test_presets_are_whole_and_cover_the_bits_of_tables():
    for name in Technology.presets():
        found = Technology.load(name)
        found.check_adc(range(1, 9))
        assert found.describe().startswith(name)
        for component, sources in found.sources.items():
            assert all(source.text for source in sources if source.value), component
    assert {"rram_22nm", "rram_32nm", "rram_65nm", "rram_130nm"} <= set(Technology.presets())


def test_own_lines_replace_those_of_the_file_that_is_included(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(f"# A macro\n{HEADER}include,rram_32nm,,,,\ncolumns,256,lines,,,\nadc_energy,700,fJ,1-6,,measured\n")
    found, usual = Technology.load(path), Technology.load("rram_32nm")
    assert (found.name, found.note, found.columns, found.node) == ("mine", "A macro", 256, 32)
    assert [source.value for source in found.sources["adc_energy"]] == [approx(7e-13)]
    assert found.sources["row_on"] == usual.sources["row_on"]
    (tmp_path / "few.csv").write_text(f"{HEADER}columns,64,lines,,,\n")
    path.write_text(f"{HEADER}include,rram_32nm,,,,\ninclude,few.csv,,,,\n")  # the later one wins, of what it has
    found = Technology.load(path)
    assert found.columns == 64 and found.sources == usual.sources


@pytest.mark.parametrize("line, message", [
    ("adc_energy,1,pj,,,x", "own.csv line 3: adc_energy has the unit 'pj'; known are fJ, fJ/bit, fJ/level, pJ,"),
    ("row_on,1,pJ/bit,,,x", "row_on has the unit 'pJ/bit'; known are fJ, pJ, nJ"),
    ("adc_enrgy,1,pJ,,,x", "no component is called 'adc_enrgy'; there are row_on, row_bit,"),
    ("adc_energy,-1,pJ,,,x", "adc_energy is -1; allowed are numbers from 0"),
    ("adc_energy,much,pJ,,,x", "adc_energy is 'much', which is no number"),
    ("adc_energy,nan,pJ,,,x", "adc_energy is nan; allowed are numbers from 0"),
    ("adc_energy,1,pJ,8-4,,x", "bits are '8-4'; a number such as 6"),
    ("adc_energy,1,pJ,,1000,x", "node_nm of adc_energy is 1000; scaling is known from 7 to 130 nm"),
    ("adc_energy,1,pJ,,,", "adc_energy has no source"),
    ("columns,0,lines,,,", "columns is 0; allowed are whole numbers from 1"),
    ("columns,64.5,lines,,,", "columns is 64.5; allowed are whole numbers from 1"),
    ("node,5,nm,,,", "node is 5 nm; scaling is known from 7 to 130 nm"),
    ("pipelined,2,,,,", "pipelined is 2; allowed are 0 and 1"),
    ("g_min,200,uS,,,", "g_min is 200 and g_max 166.667 uS; g_min must be the lower one"),
    ("columns,64,lines,,,\ncolumns,32,lines,,,", "own.csv line 4: columns stands on two lines"),
    ("adc_energy,1,pJ,,,x,y", "line 3 has 7 values, 6 are expected"),
    ("include,nowhere,,,,", "no technology and no file is called 'nowhere'; technologies are isaac_32nm,"),
    ("include,own.csv,,,,", "own.csv includes itself"), ("include,../{folder}/own.csv,,,,", "own.csv includes itself"),
])
def test_a_wrong_line_is_named(line, message, tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(f"{HEADER}include,rram_32nm,,,,\n{line.replace('{folder}', tmp_path.name)}\n")
    with pytest.raises(ValueError) as error:
        Technology.load(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_line_that_csv_cannot_read_is_named(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(f"{HEADER}adc_energy,1,pJ,,,{'x' * 2**18}\n")
    with pytest.raises(ValueError, match=r"own.csv line 2: field larger than field limit"):
        Technology.load(path)


def test_what_is_absent_is_named(tmp_path, technology):
    path = tmp_path / "own.csv"
    lines = [f"{name},{value},,,x" for name, value in PARTS.items()]
    path.write_text(HEADER + "\n".join(line for line in lines if not line.startswith("buffer,")))
    with pytest.raises(ValueError, match="own has no buffer .*: add a line for it"):
        Technology.load(path)
    path.write_text(HEADER + "\n".join(line for line in lines if not line.startswith("node,")))
    with pytest.raises(ValueError, match="own has no node"):
        Technology.load(path)
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="the columns are a,b; component,value"):
        Technology.load(path)
    with pytest.raises(ValueError, match="no technology and no file is called 'rram_3nm'; technologies are"):
        Technology.load("rram_3nm")
    layer, x = linear(4, 1, CrossbarSpec(adc_bits=3, adc_range="full"))
    with pytest.raises(ValueError, match="own has no adc_energy for converters of 3 bits; it has 4 to 8 bits by adc_energy source 0"):
        costs(layer, x, technology(adc_energy="1,pJ,4-8"))
    with pytest.raises(ValueError, match="arrays of 3 columns do not hold one weight of 4 cells"):
        costs(layer, x, technology(columns="3,lines"))
    layer.set_spec(CrossbarSpec(adc_range="ideal"))
    with pytest.raises(ValueError, match="no layer has an ADC"):
        costs(layer, x, technology())
    with pytest.raises(ValueError, match="no images"):
        count(layer, [])
    with pytest.raises(ValueError, match="no layer on crossbars"):
        count(nn.Linear(2, 2), torch.ones(1, 2))


# ---- published parts, put together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("out, bits, per_watt, tops", [
    (3, 1, 43.08, 2.122), (4, 2, 40.33, 1.793), (5, 3, 23.09, 1.165), (6, 4, 15.95, 0.744), (7, 5, 11.03, 0.525), (8, 6, 8.26, 0.418),
    (9, 7, 7.75, 0.344), (10, 8, 6.44, 0.264)])
def test_neurram(out, bits, per_watt, tops):
    """48 cores of 256 x 256 cells in pairs. An input of `in` bits, its sign apart, is applied in one phase of up to 3 bits or in two;
    the second phase's conversion goes on from the first."""
    n = max(1, bits - 1)
    phase = n if n <= 3 else -(-n // 2)
    spec = CrossbarSpec(w_bits=4, cell_bits=4, a_bits=n, dac_bits=phase, rows=128, adc_plan="significance", adc_bits=8.0, adc_max_bits=12)
    layer, x = linear(128, 256, spec)  # 256 word lines of pairs are 128 inputs; 256 columns
    plan = np.array([[out - sum(spec.digit_bits[:z])] for z in range(len(spec.digit_bits))])
    layer.set_plan(Plan(bits=plan, delta=np.ones(plan.shape), q_min=np.zeros(plan.shape)))
    report = costs(layer, x, Technology.load("neurram_130nm"))
    macro = {name: report.energy_by_component[name].typical for name in ("word lines", "bit lines", "ADC")}
    # A pair's two word lines are one input here: they count twice.
    energy = 2 * macro["word lines"] + macro["bit lines"] + macro["ADC"]
    assert report.operations == 65536
    assert 65536 / energy * 1e-12 == approx(per_watt, rel=0.12)
    assert 48 * report.tops.typical == approx(tops, rel=0.07)


@pytest.mark.parametrize("rows, milliwatts", [(128, 77.05), (256, 88.93), (384, 100.23), (512, 111.43)])
def test_yao_28nm(rows, milliwatts, technology):
    layer, x = linear(rows, 64, CrossbarSpec(w_bits=1, a_bits=1, rows=rows, adc_range="full", reference="digital"))
    report = costs(layer, x, technology(node="28,nm", row_bit="2.064,pJ", adc_energy="23.73,pJ", adc_time="23.08,ns"))
    assert 1e3 * report.energy.typical / report.latency.typical == approx(milliwatts, rel=0.005)


@pytest.mark.parametrize("rows, milliwatts", [(64, 67.2), (128, 87.0), (256, 126.6), (512, 195)])
def test_li_28nm(rows, milliwatts, technology):
    spec = CrossbarSpec(w_bits=1, a_bits=1, rows=rows, adc_range="full", weights="pair")  # 1,024 bit lines for 512 converters
    layer, x = linear(rows, 512, spec)
    report = costs(layer, x, technology(node="28,nm", columns="1024,lines", columns_per_adc="2,lines", row_bit="8.532,pJ",
                                        column_bit="0.519,pJ", adc_energy="1.931,pJ", adc_time="30,ns"))
    assert 1e3 * report.energy.typical / report.latency.typical == approx(milliwatts, rel=0.03)


@pytest.mark.parametrize("adc, array, per_watt", [(1.79, 9.7, 401), (3.56, 20.4, 192.3)])
def test_jia_65nm(adc, array, per_watt, technology):
    """2,304 rows meet at one converter. An array here has at most 1,024: three of 768, each with a third of the column's energies."""
    layer, x = linear(2304, 256, CrossbarSpec(w_bits=1, a_bits=1, rows=768, adc_bits=8, adc_range="full", reference="digital"))
    report = costs(layer, x, technology(columns="256,lines", column_bit=f"{array / 3},pJ", adc_energy=f"{adc / 3},pJ",
                                        adc_time="1.35,us"))
    assert report.tops_per_watt.typical == approx(per_watt, rel=0.005)
    assert report.tops.typical == approx(0.874, rel=0.005)


def test_isaac():
    """An IMA is 8 arrays: 1,024 inputs, 32 outputs of 8 bits on 2-bit cells. Its 16-bit operations are four of these."""
    spec = CrossbarSpec(w_bits=8, a_bits=8, cell_bits=2, rows=128, adc_bits=8, adc_range="full", reference="digital")
    layer, x = linear(1024, 32, spec)
    report = costs(layer, x, Technology.load("isaac_32nm"))
    assert report.layers[0].events.arrays == 8 and report.utilisation == 1
    ima = report.energy.typical / report.latency.typical - report.leakage.typical
    assert 1e3 * ima == approx(24.08, rel=0.005)
    chip = 168 * 12 * report.energy.typical / report.latency.typical
    tops = 168 * 12 * report.tops.typical / 4
    assert chip == approx(65.8, rel=0.005) and tops == approx(41.3, rel=0.005)
    assert 1e3 * tops / chip == approx(627, rel=0.005)


def test_utilisation_of_neurosims_first_and_last_layer(technology):
    """VGG8, 8 bits on 2-bit cells, 128 x 128: 27 of 128 rows of the first layer, 40 of 128 columns of the last."""
    spec = CrossbarSpec(w_bits=8, a_bits=8, cell_bits=2, mapping="im2col", adc_range="full")
    first = Qconv2dDoreFa(3, 128, 3, padding=1, spec=spec, alpha_init=1.0).eval()
    found = technology(columns="128,lines")
    assert costs(first, torch.rand(1, 3, 4, 4), found).utilisation == pytest.approx(0.2109, abs=5e-5)
    assert costs(*linear(1024, 10, spec), found).utilisation == pytest.approx(0.3125, abs=5e-5)


def test_converters_of_a_layer_are_as_large_as_its_most_bits(technology):
    spec = CrossbarSpec(w_bits=2, a_bits=2, adc_plan="significance", adc_bits=2.0, rows=16)
    net = nn.Sequential(*(linear(16, 16, spec)[0] for _ in range(2)))
    for layer, bits in zip(net, (3, 6)):
        layer.set_plan(Plan(np.full((2, 2), bits), np.ones((2, 2)), np.zeros((2, 2))))
    report = costs(net, torch.rand(2, 16), technology(adc_area="1,um2/bit", columns_per_adc="4,lines"))
    few, many = (each.area["ADC"].typical / each.events.arrays for each in report.layers)
    assert many / few == approx(2)
