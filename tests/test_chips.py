"""Chips: a network measured on cells of a device, from Python and by the flags of eval.py."""

import json
import os
import re
import shutil
import statistics
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cells import linear, oracle_output
from test_eval import CROSSBARS, FAST, SMALL, checkpoint, classes, network, refused, results, run, shown_images  # noqa: F401
from test_eval import scene as small_networks  # noqa: F401

import eval as evaluation
import models
from experiment.inputs import data as datasets
from experiment.settings import chips as chip_flags
from experiment.measure import chip_files, keys
from experiment.report import chip_report, report, says
from experiment.settings import eval_settings
from experiment.settings.chips import DeviceSettings, chips_of
from experiment.program.cli import UserError
from models import quant, vgg
from models.quant import Calibration, CrossbarSpec, Device, Wires
from models.quant.network import diagnostics
from models.quant.devices import presets
from models.quant.network.gate_errors import gate_errors
from models.quant.arrays.readout import first_image
from models.quant.devices.times import show_time
from models.quant.measuring import chips as measured_chips
from models.quant.measuring.chips import Chips
from models.quant.measuring.measure import Cache, Record, measure, of_chips
from models.quant.measuring.placing import check_chips, place, program
from models.quant.measuring.setting import Setting

pytestmark = pytest.mark.usefixtures("one_thread")
NOISY = Device("noisy", "invented", 1.0, 31.0, sigma_us=4.0)  # 0.4 levels of 2-bit cells
PERFECT = Device("perfect", "invented", 3.0, 40.0)


@pytest.fixture
def scene(monkeypatch):
    """A network on crossbars, images and labels, and images for calibration."""
    monkeypatch.setitem(vgg.CONFIGS, "vgg7", SMALL["vgg7"])
    net = models.create("vgg7_quant_eval", alpha_init=2.0)
    net.load_state_dict(network().state_dict(), strict=False)
    images, labels = shown_images(24)
    return net.eval(), images, labels, shown_images(359)[0][200:216]


def setting(device=NOISY, layers="all", on="nominal", spec=(), **options):
    chips = None if device is None else Chips(device=device, **options)
    return Setting(CrossbarSpec(**{"cell_bits": 2, "adc_bits": 4, "rows": 16, **dict(spec)}), layers, Calibration(on=on), chips)


def measured(scene, *args, **options):
    net, images, labels, calibration = scene
    given = {name: options.pop(name) for name in ("cache", "software", "batch_size") if name in options}
    return measure(net, images, labels, setting(*args, **options), calibration=calibration, engine="numba", **given)


# ---- measuring ---------------------------------------------------------------------------------------------------------


def test_part_of_the_images_has_the_noise_of_its_numbers(scene):
    """Two blocks, of which the second says where it begins, are as one; without that it would see the noise of the first."""
    net, images, _, calibration = scene
    raw = torch.randint(256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(24).long()
    noisy = setting(adc_noise=3.0, chips=1)

    def seen(first, last, number):
        batches = datasets.Batches(raw[first:last], (0.5,) * 3, (0.25,) * 3, 8, number)
        return measure(net, batches, labels[first:last], noisy, calibration=calibration, engine="numba").chip_predictions[0]

    whole = seen(0, 24, 0)
    assert torch.equal(torch.cat([seen(0, 10, 0), seen(10, 24, 10)]), whole)
    assert not torch.equal(seen(10, 24, 0), whole[10:])
    keys_of = [keys.of_images(datasets.Batches(raw, (0.5,) * 3, (0.25,) * 3, 8, number), labels) for number in (0, 10)]
    assert keys_of[0] != keys_of[1]


def test_chips_scatter_besides_what_their_device_has():
    chips = Chips(device=Device("a", "b", 0.0, 100.0, sigma_percent=4.0), sigma=3.0)
    assert chips.drawn.sigma_percent == 5 and replace(chips, sigma=0.0).drawn.sigma_percent == 4


@pytest.mark.parametrize("cell_bits, ratio, engine", [(1, 2.0, "reference"), (2, 2.0, "numba"), (2, 11.0, "numba"), (4, 1.25, "reference")])
def test_an_on_off_ratio_against_the_oracle(cell_bits, ratio, engine):
    """`G_min / dG = (2^b - 1) / (r - 1)` levels are added to each cell, which a digital reference takes off behind the ADC."""
    spec = CrossbarSpec(4, 4, cell_bits, 8, 32, reference="digital", adc_range="full")
    layer, x = linear(spec, 6), torch.rand(9, 40, generator=torch.Generator().manual_seed(0))
    chips = Chips(device=Device.preset("ideal"), on_off=ratio)
    chips.check(layer)
    chips.program(torch.nn.Sequential(layer), 0)
    held, fraction = layer.w_codes()[:, :, 0, 0].T, 2**(8 if cell_bits <= 4 else 12 - cell_bits)
    for k, bits in enumerate(layer.slice_bits):
        off = round(fraction * (2**bits - 1) / (ratio - 1))
        assert torch.equal(layer.cells().values[k, 0], fraction * (held >> cell_bits * k & 2**bits - 1).int() + off)
    with quant.set_engine(engine), torch.no_grad():
        assert torch.allclose(layer(x), oracle_output(layer, x).float(), rtol=1e-6, atol=1e-6)


def test_an_on_off_ratio_of_ideal_cells_costs_only_what_the_reference_leaves(scene):
    """An analog reference and pairs take the off-current out, bit for bit; a digital one does not, and a small range has more scatter."""
    for spec in ({}, {"weights": "pair"}):
        ideal = measured(scene, None, spec=spec)
        assert torch.equal(measured(scene, Device.preset("ideal"), on_off=2.0, spec=spec).predictions, ideal.predictions)
    spec, own = {"reference": "digital"}, Device("own", "here", 50.0, 100.0)
    wide, narrow = (measured(scene, Device.preset("ideal"), on_off=ratio, spec=spec) for ratio in (1e6, 2.0))
    assert torch.equal(wide.predictions, measured(scene, None, spec=spec).predictions)
    assert torch.equal(narrow.predictions, measured(scene, own, spec=spec).predictions)
    assert not torch.equal(narrow.predictions, wide.predictions)
    scattered = Device("wide", "here", 0.0, 100.0, sigma_us=3.0)
    assert Chips(device=scattered, on_off=2.0).drawn.reach(2) == pytest.approx(3 + 6 * 3 / (50 / 3))


def test_engines_are_chosen_for_cells_with_their_off_current(scene):
    """3 levels of 2-bit cells at a ratio of 2."""
    one = setting(Device.preset("ideal"), spec={"reference": "digital"}, on_off=2.0)
    place(scene[0], one)
    check_chips(scene[0], one)
    for _, layer in quant.crossbar_layers(scene[0]):
        assert torch.equal(layer.cells().values, layer.ideal_cells().values + 3 * 256)


def test_an_on_off_ratio_decides_a_result_and_older_results_have_none():
    usual, narrow = (Setting(chips=Chips(device=Device.preset("ideal"), on_off=ratio, sigma=1.0)) for ratio in (None, 10.0))
    assert "on_off" not in keys.of_setting(usual)["chips"] and keys.of_setting(narrow) != keys.of_setting(usual)


@pytest.mark.parametrize("spec", [{}, {"adc_range": "full"}, {"adc_range": "ideal", "adc_bits": 1}, {"cell_bits": 3}])
def test_a_device_without_scatter_gives_what_ideal_cells_give(scene, spec):
    ideal, found = measured(scene, None, spec=spec), measured(scene, PERFECT, spec=spec)
    assert torch.equal(found.predictions, ideal.predictions) and found.accuracy == ideal.accuracy
    assert (ideal.chip_predictions, ideal.chip_accuracies, ideal.accuracy_std, ideal.accuracy_lowest) == (None,) * 4
    assert found.chip_accuracies == (found.accuracy,) and found.chip_changes == (found.changed_predictions,)
    assert found.accuracy_std is None and found.accuracy_lowest == found.accuracy


def test_each_chip_is_corrected_on_its_own_cells_behind_ranges_of_nominal_ones(scene):
    net, images, labels, calibration = scene
    record = measured(scene, chips=3, chip_seed=5)
    software = classes(network(), images)
    place(net, setting())
    quant.calibrate(net, calibration, correct=None)  # on ideal cells
    expected = []
    with quant.set_engine("numba"):
        for seed in (5, 6, 7):
            quant.program(net, NOISY, seed)
            quant.correct(net, calibration)
            expected.append(classes(net, images))
    assert torch.equal(record.chip_predictions, torch.stack(expected)) and torch.equal(record.predictions, expected[0])
    accuracies = [100 * int((found == labels).sum()) / len(labels) for found in expected]
    assert record.chip_accuracies == pytest.approx(accuracies) and record.accuracy == pytest.approx(statistics.mean(accuracies))
    assert record.accuracy_std == pytest.approx(statistics.stdev(accuracies)) and record.accuracy_lowest == min(accuracies)
    assert record.chip_changes == tuple(int((found != software).sum()) for found in expected)
    assert record.changed_predictions == round(statistics.mean(record.chip_changes)) > 0
    assert len({tuple(found.tolist()) for found in expected}) > 1  # so this says something
    assert record.images_per_s == pytest.approx(3 * 24 / record.seconds)


def test_chips_put_together_took_the_time_of_all(scene):
    """And changed as many predictions of a float network in the mean."""
    found = [replace(measured(scene, chip_seed=seed), float_changes=seed) for seed in (5, 7)]
    both = of_chips(setting(chips=2, chip_seed=5), found)
    assert both.seconds == found[0].seconds + found[1].seconds and both.float_changes == 6


@pytest.mark.parametrize("spec", [{}, {"reference": "digital", "rows": 4}])  # whose off-current is in the bins of the chip's own reads
def test_ranges_of_the_chip(scene, spec):
    net, images, _, calibration = scene
    record = measured(scene, on="chip", chips=2, spec=spec)
    place(net, setting(spec=spec))
    with quant.set_engine("numba"):
        for seed, found in enumerate(record.chip_predictions):
            quant.program(net, NOISY, seed)
            quant.calibrate(net, calibration, on="chip")
            assert torch.equal(found, classes(net, images))


def test_afterwards_cells_are_ideal_again(scene):
    net, images, labels, calibration = scene
    measured(scene)
    assert all(layer.chip is None for _, layer in quant.crossbar_layers(net))
    with pytest.raises(ValueError, match="24 examples have 23"):
        measure(net, images, labels[:23], setting(), calibration=calibration, engine="numba")
    with pytest.raises(ValueError, match="not calibrated"):
        measure(net, images, labels, setting(spec={"rows": 8}), engine="numba")
    assert all(layer.chip is None for _, layer in quant.crossbar_layers(net))


def test_the_software_has_no_chip_and_neither_has_a_setting_without_device(scene):
    net, images, labels, calibration = scene
    before = measured(scene, None)
    quant.program(net, NOISY, 0)
    assert torch.equal(measure(net, images, labels, None, engine="numba").predictions, classes(network(), images))
    quant.program(net, NOISY, 0)
    assert torch.equal(measured(scene, None).predictions, before.predictions)


def test_reads_are_counted_once_for_all_chips_and_devices(scene, monkeypatch):
    counted, collect = [], quant.collect_histograms
    monkeypatch.setattr(quant.network.calibration, "collect_histograms",
                        lambda *args, **more: (counted.append(1), collect(*args, **more))[1])
    cache = Cache()
    measured(scene, None, cache=cache)
    first = measured(scene, chips=2, cache=cache)
    measured(scene, PERFECT, cache=cache)
    assert len(counted) == 1
    assert torch.equal(first.chip_predictions, measured(scene, chips=2).chip_predictions)
    counted.clear()
    measured(scene, chips=2, on="chip", cache=cache)  # each chip's own
    measured(scene, spec={"reference": "digital"}, cache=cache)  # with the off-current of this device, and of that
    measured(scene, PERFECT, spec={"reference": "digital"}, cache=cache)
    measured(scene, PERFECT, spec={"reference": "digital"}, cache=cache, chips=2)
    assert len(counted) == 4


def test_layers_that_are_not_on_crossbars_have_ideal_cells(scene, monkeypatch):
    net, seen = scene[0], []
    monkeypatch.setattr(quant.network.calibration, "correct", lambda *args, real=quant.correct: (
        seen.append([name for name, layer in quant.crossbar_layers(net) if layer.chip]), real(*args))[1])
    measured(scene, layers="conv")
    measured(scene)
    assert seen == [["features.4", "features.8"], CROSSBARS]


def test_batches_know_the_number_of_their_first_image(scene):
    net, seen = scene[0], []
    hook = net.register_forward_hook(lambda net, inputs, _: seen.append((first_image(), len(inputs[0]))))
    measured(scene, batch_size=10, spec={"adc_range": "full"})
    hook.remove()
    assert [each for each in seen if each[1] > 1][-3:] == [(0, 10), (10, 10), (20, 4)]  # beside passes of one image


def test_what_flags_say_is_handed_to_the_programming(scene, monkeypatch):
    given = []
    monkeypatch.setattr(measured_chips, "program", lambda model, device, *args, **more: given.append((args, more)))
    net = scene[0]
    usual = {"read_noise": None, "adc_noise": 0.0, "adc_offset": 0.0, "adc_gain": 0.0, "adc_inl": 0.0, "adc_dnl": 0.0,
             "adc_mismatch": 0.0, "comparator_noise": 0.0, "wires": None, "noise_seed": 0, "progress": False}
    Chips(device=NOISY).program(net, 3)
    Chips(device=NOISY, read_noise=0.5, adc_noise=0.1, adc_offset=0.2, adc_gain=0.3, wire_ohm=2.0, noise_seed=7,
          reference_cells="ideal").program(net, 4)
    Chips(device=NOISY, wire_ohm=2.0, row_ohm=3.0, driver_ohm=4.0).program(net, 0)
    Chips(device=NOISY, wire_ohm=2.0, access="gate").program(net, 0)
    Chips(device=NOISY, read_noise=0.0, access="gate").program(net, 0)
    Chips(device=Device.preset("pcm"), read_noise="device").program(net, 0, progress=True)
    assert given == [((3, "device"), usual), ((4, "ideal"), usual | {
        "read_noise": 0.5, "adc_noise": 0.1, "adc_offset": 0.2, "adc_gain": 0.3, "wires": Wires(wire_ohm=2.0), "noise_seed": 7}),
        ((0, "device"), usual | {"wires": Wires("voltage", 2.0, 3.0, 4.0)}), ((0, "device"), usual | {"wires": Wires("gate", 2.0)}),
        ((0, "device"), usual | {"read_noise": 0.0}), ((0, "device"), usual | {"progress": True})]
    assert Chips(device=Device.preset("pcm"), read_noise="device").drawn.read_noise == "device"
    given.clear()  # and to what refuses chips before any is programmed
    monkeypatch.setattr(measured_chips, "check_chip", lambda layer, device, *args: given.append((device.read_noise, *args)))
    Chips(device=NOISY, read_noise=0.5, wire_ohm=2.0, reference_cells="ideal").check(net.features[4])
    assert given == [(0.5, Wires(wire_ohm=2.0), "ideal")]


@pytest.mark.parametrize("flags", [{"read_noise": 2.0, "adc_noise": 0.5, "adc_offset": 0.5, "adc_gain": 0.05},
                                   {"access": "gate", "wire_ohm": 20.0}, {"wire_ohm": 20.0, "row_ohm": 10.0}])
def test_noise_and_wires_do_something_and_do_not_depend_on_the_batch(scene, flags):
    records = [measured(scene, batch_size=size, **more) for size, more in ((10, flags), (7, flags), (10, {}))]
    assert torch.equal(records[0].predictions, records[1].predictions)
    assert not torch.equal(records[0].predictions, records[2].predictions)


def test_chips_are_equal_if_their_numbers_are():
    a, b = (chips_of({"device": "techA", "device_time": 3600.0, "chips": 2}) for _ in range(2))
    assert a == b and hash(a) == hash(b) and Setting(chips=a) == Setting(chips=b)
    others = [{"device_time": 0.0}, {"chips": 3}, {"device": "techB"}, {"stuck_on": 0.1}, {"read_noise": 0.1}, {"wire_ohm": 1.0},
              {"chip_seed": 1}, {"noise_seed": 1}, {"adc_noise": 0.1}, {"adc_offset": 0.1}, {"adc_gain": 0.1}, {"access": "gate"},
              {"row_ohm": 1.0}, {"driver_ohm": 1.0}, {"reference_cells": "ideal"}, {"sigma": 1.0}]
    assert all(chips_of({"device": "techA", "device_time": 3600.0, "chips": 2} | other) != a for other in others)
    assert chips_of({"device": "techA"}) == chips_of({"device": "techA", "device_time": 0.0})
    one, other = (Chips(device=replace(NOISY, stuck_mask=mask)) for mask in ([0, 1], [1, 0]))
    assert one != other and one == replace(one)
    plain = Chips(device=Device.preset("pcm"))
    for changes, taken_back in (({"sigma": 5.0}, {"sigma": 0.0}), ({"read_noise": "device"}, {"read_noise": None})):
        assert replace(replace(plain, **changes), **taken_back) == plain != replace(plain, **changes)
    with pytest.raises(ValueError, match="^device is 'techA'; a Device is expected"):
        Chips(device="techA")
    assert chips_of({}) is None and chips_of({"device": None, "chips": 1}) is None


@pytest.mark.parametrize("flag, value", [("sigma", 3.0), ("stuck_on", 0.1), ("stuck_off", 0.1), ("read_noise", 1.0), ("adc_noise", 1.0),
                                         ("adc_offset", 1.0), ("adc_gain", 0.1), ("wire_ohm", 1.0), ("row_ohm", 1.0), ("driver_ohm", 1.0)])
def test_what_cells_have_without_a_device_is_that_of_ideal_ones(flag, value):
    assert chips_of({flag: value, "chips": 3}) == chips_of({"device": "ideal", flag: value, "chips": 3})
    assert chips_of({flag: 0}) is None
    found = eval_settings.all_settings({flag: [0.0, value]}, 4, 4, of_chips={"chips": 3})
    assert [each.chips and each.chips.chips for each in found] == [None, 3]


def test_results_without_a_younger_flag_have_the_keys_that_they_had():
    """Digests of a device, and values of chips, as they were before there was sigma."""
    chips = chips_of({"device": "techA"})
    assert "sigma" not in keys.of_chips(chips) and keys.of_chips(chips_of({"device": "techA", "sigma": 2.0}))["sigma"] == 2
    device = chips.device
    values = {item.name: getattr(device, item.name) for item in fields(Device) if item.name not in (*keys.NAMES, "sigma_percent")}
    assert keys.digest(device) == keys.digest({"": "Device"} | values) != keys.digest(replace(device, sigma_percent=2.0))


@pytest.mark.parametrize("weights", ["offset", "pair"])
@pytest.mark.parametrize("cell_bits", [1, 2, 4])
@pytest.mark.parametrize("name", ["ideal", "techA"])
def test_cells_scatter_by_sigma(scene, name, cell_bits, weights):
    """Sigma per cent of the range, which is 2^b - 1 levels of a cell of b bits, besides what the device has; pairs have it twice. The
    deviation of n Gaussian cells is within 5 / sqrt(2 n)."""
    net = scene[0]
    quant.set_spec(net, CrossbarSpec(cell_bits=cell_bits, weights=weights))
    device = Device.preset(name)
    _, layer = max(quant.crossbar_layers(net), key=lambda each: each[1].weight.numel())
    ideal, bits = layer.ideal_cells(), layer.slice_bits
    Chips(device=device, sigma=5.0).program(net, 3)
    scale, compared = 2**ideal.fraction_bits, 0
    for k, b in enumerate(bits):
        wanted = ideal.values[k].numpy() / scale
        drawn, extra = layer.chip.cells.values[k].numpy() / scale, 0.05 * (2**b - 1)
        for level in np.unique(wanted):
            at = drawn[wanted == level]
            cells = [max(int(level), 0)] if weights == "offset" else [max(int(level), 0), max(int(-level), 0)]
            g = device.levels(b)[cells]
            mean = (device.mean(g) - g) / device.step(b)
            sigma = np.sqrt(sum((device.sigma(g) / device.step(b))**2 + extra**2) + 1 / 12 / scale**2)
            if at.size > 50:
                compared += 1
                assert abs(at.std() / sigma - 1) < 5 / np.sqrt(2 * at.size), (level, at.std(), sigma)
                assert abs(at.mean() - level - mean @ [1, -1][:len(g)]) < 5 * sigma / np.sqrt(at.size)
    assert compared >= 2 * len(bits)


@pytest.mark.parametrize("one, other", [({"read_noise": 0.0}, {}), ({"access": "gate"}, {}), ({"access": "gate", "wire_ohm": 0.0}, {})])
def test_what_changes_nothing_is_in_no_key(one, other):
    made = [Setting(chips=chips_of({"device": "techA"} | values)) for values in (one, other)]
    assert keys.of_setting(made[0]) == keys.of_setting(made[1])
    assert keys.of_setting(made[0]) != keys.of_setting(Setting(chips=chips_of({"device": "techA", "access": "gate", "wire_ohm": 1.0})))


def test_ideal_references_are_in_the_keys_of_reads_that_have_one():
    own, ideal = (chips_of({"device": "techA", "reference_cells": name}) for name in ("device", "ideal"))
    for reference in ("analog", "digital"):
        spec = CrossbarSpec(reference=reference)
        assert (keys.of_setting(Setting(spec, chips=own)) == keys.of_setting(Setting(spec, chips=ideal))) == (reference == "digital")
    mixed = Setting(CrossbarSpec(reference="digital"), chips=ideal, per_layer={"a": {"reference": "analog"}})
    assert keys.of_setting(mixed) != keys.of_setting(replace(mixed, chips=own))


def test_bakes_make_one_curve_over_the_temperature():
    """Each has a time of its own, which nobody asked for."""
    baked = [chips_of({"device": "techA", "device_temp": temp}) for temp in (100.0, 140.0, 180.0)]
    assert len({chips.device.time for chips in baked}) == 3 and {chips.text("device_temp") for chips in baked} == {"techA"}
    times = [chips_of({"device": "winbond_asu_2bit", "device_temp": 85.0, "device_time": time}) for time in (20.0, 3600.0)]
    assert [chips.text("device_temp") for chips in times] == ["winbond_asu_2bit", "winbond_asu_2bit at 1h"]


def test_cells_of_a_chip_beside_others_are_refused(scene):
    model, images, labels, calibration = scene
    chip = {name: quant.arrays.cells.Chip(layer.ideal_cells()) for name, layer in quant.crossbar_layers(model)}
    for cells, chips, message in ((chip, Chips(device=NOISY), "the cells are those of a chip, and the setting has chips too"),
                                  (dict([*chip.items()][1:]), None, f"no cells are given for layer {next(iter(chip))}")):
        with pytest.raises(ValueError, match=message):
            measure(model, images, labels, Setting(chips=chips), calibration=calibration, cells=cells)


def test_cells_that_the_grid_does_not_hold_are_refused_before_any_work(refused, checkpoint):  # noqa: F811
    Path("close.csv").write_text("level,conductance_uS,std_uS\n0,10,3\n1,10.001,3\n")
    refused(["--resume", checkpoint, "--device", "close.csv", "--dry_run"],
            "close: cells of 1 bits lie up to 1.8e+04 levels from the lowest one, a level being 0.001 uS; the grid holds 4096")


@pytest.mark.parametrize("values, text", [
    ({"device": "techA"}, "techA at 0s"),
    ({"device": "techA", "device_time": 86400.0}, "techA at 1d"),
    ({"device": "techA", "device_temp": 100.0}, "techA at 7165s and 100 C"),
    ({"device": "neurram_chip", "stuck_on": 0.01, "adc_noise": 0.5, "wire_ohm": 1.0},
     "neurram_chip, stuck_on 0.01, adc_noise 0.5, wire_ohm 1 ohm"),
    ({"on_off": 10.0}, "ideal, on_off 10"),
    ({"sigma": 2.5}, "ideal, sigma 2.5 %"), ({"device": "techA", "sigma": 1.0}, "techA at 0s, sigma 1 %"),
    ({"device": "milo_irps21", "read_noise": 0.2, "reference_cells": "ideal"},
     "milo_irps21, read_noise 0.2 uS, reference_cells ideal"),
])
def test_what_tables_call_them(values, text):
    assert str(chips_of(values)) == text


def test_times_as_people_say_them():
    assert [show_time(t) for t in (0, 0.01, 1, 90, 5400, 3600, 172800, 1e5)] == ["0s", "0.01s", "1s", "90s", "90min", "1h", "2d", "100000s"]


# ---- eval.py -----------------------------------------------------------------------------------------------------------

FLAGS = ["--engine", "numba", "--cell_bits", "2", "--adc_bits", "4", "--limit", "12"]


def test_table_and_results_of_chips(run, checkpoint):  # noqa: F811
    records, predictions, text = run(checkpoint, *FLAGS, "--device", "techC_cells", "--device_time", "0", "100000s",
                                     "--chips", "3", "--chip_seed", "4", "--also", "--cell_bits 2 --adc_bits 4 --rows 16")
    software, early, late, ideal = records
    titles = ["software", *(f"techC_cells at {t}" for t in ("0s", "100000s")), "ideal cells"]
    assert "\nall settings: 2-bit cells, 4-bit ADC, calibrated, rows 16\nsetting   " in text
    table = text[text.index("setting   "):].splitlines()
    assert table[0].split() == ["setting", "accuracy", "%", "deviation", "lowest", "to", "software", "changed", "images/s"]
    for line, title, record in zip(table[2:6], titles, records):
        lowest = [] if record["accuracy_std"] is None else [f"{record[name]:.2f}" for name in ("accuracy_std", "accuracy_lowest")]
        assert line.startswith(title + " ") and line.removeprefix(title).split()[:1 + len(lowest)] == [f"{record['accuracy']:.2f}", *lowest]
    changes = [record["chip_changed_predictions"] for record in (early, late)]
    of_images = [f"{100 * statistics.fmean(max(1, k) for k in of_each)**0.5 / 12:.2f}" for of_each in changes]
    assert "with a device: mean, deviation and lowest of 3 chips" in table and (
        "the choice of images, which all chips share, adds a standard deviation of "
        f"{' to '.join(dict.fromkeys(sorted(of_images, key=float)))} to a difference") in " ".join(table)
    for record in (software, ideal):
        assert not any(record[name] is not None for name in (
            "device", "device_time_s", "device_temp_C", "chips", "chip_seed", "noise_seed", "accuracy_std", "accuracy_lowest",
            "chip_accuracies", "chip_changed_predictions", "stuck_on", "read_noise", "adc_noise", "wire_ohm", "calib_on"))
    for record, time in ((early, 0.0), (late, 1e5)):
        expected = {"device": "techC_cells", "device_time_s": time, "device_temp_C": 25.0, "chips": 3, "chip_seed": 4, "noise_seed": 0,
                    "stuck_on": 0.0, "stuck_off": 0.0, "read_noise": None, "adc_noise": 0.0, "adc_offset": 0.0, "adc_gain": 0.0,
                    "wire_ohm": 0.0, "reference_cells": "device", "calib_on": "nominal", "adc_correct": "channel"}
        assert record.items() >= expected.items()
        assert record["accuracy"] == pytest.approx(statistics.mean(record["chip_accuracies"]))
        assert record["accuracy_lowest"] == min(record["chip_accuracies"]) and len(record["chip_changed_predictions"]) == 3
        assert record["images_per_s"] == pytest.approx(3 * record["n_images"] / record["seconds"])
    ranges = json.loads(Path("save/adc_ranges.json").read_text())["ranges"]
    assert len(ranges) == 1  # a chip's correction is of no use to another
    again = run(checkpoint, *FLAGS, "--device", "techC_cells", "--chip_seed", "5")[0][1]
    assert again["accuracy"] == early["chip_accuracies"][1]


BY_HAND = {  # flags of a chip: of what device, with what, on what hardware it is programmed
    "": ({}, {}, {}), "--device_time 100000": ({"time": 1e5}, {}, {}), "--device_temp 220": ({"temp": 220.0}, {}, {}),
    "--stuck_on 0.2": ({"stuck_on": 0.2}, {}, {}), "--stuck_off 0.4": ({"stuck_off": 0.4}, {}, {}),
    "--read_noise 30": ({}, {"read_noise": 30.0}, {}), "--adc_noise 1": ({}, {"adc_noise": 1.0}, {}),
    "--adc_offset 1": ({}, {"adc_offset": 1.0}, {}), "--adc_gain 0.2": ({}, {"adc_gain": 0.2}, {}),
    "--wire_ohm 200": ({}, {"wires": Wires(wire_ohm=200.0)}, {}), "--row_ohm 200": ({}, {"wires": Wires(row_ohm=200.0)}, {}),
    "--driver_ohm 2000": ({}, {"wires": Wires(driver_ohm=2000.0)}, {}),
    "--wire_ohm 200 --access gate": ({}, {"wires": Wires("gate", 200.0)}, {}),
    "--device_time 100000 --reference_cells ideal": ({"time": 1e5}, {"reference_cells": "ideal"}, {}),
    "--weights pair": ({}, {}, {"weights": "pair"}), "--on_off 2": ({"g_min": 236.25 / 2}, {}, {}),
    "--on_off 2 --reference digital": ({"g_min": 236.25 / 2}, {}, {"reference": "digital"})}


def test_every_flag_of_a_chip_against_networks_programmed_by_hand(run, checkpoint, scene):  # noqa: F811
    net, images = scene[0], shown_images(40)[0]
    usual = "--cell_bits 2 --adc_bits 8 --adc_range full --rows 16 --device techA"
    also = [part for flags in BY_HAND if flags for part in ("--also", f"{usual} {flags}")]
    _, (_, *predictions, _), _ = run(checkpoint, "--engine", "numba", *usual.split(), *also, "--also", "--cell_bits 2 --adc_bits 8")
    found = dict(zip(BY_HAND, predictions, strict=True))
    with quant.set_engine("numba"):
        for flags, (of_device, programmed, of_spec) in BY_HAND.items():
            quant.set_spec(net, CrossbarSpec(cell_bits=2, adc_bits=8, adc_range="full", rows=16, **of_spec))
            quant.program(net, Device.preset("techA", **of_device), 0, **programmed)
            assert torch.equal(found[flags], classes(net, images)), flags
    groups = {}
    for flags, classes_found in found.items():
        groups.setdefault(tuple(classes_found.tolist()), []).append(flags)
    assert len(groups) == len(BY_HAND), groups  # so that each of them says something
    _, (_, quiet, *_), _ = run(checkpoint, "--engine", "numba", *usual.split(), "--adc_noise", "1", "--noise_seed", "7")
    assert not torch.equal(quiet, found["--adc_noise 1"])


def test_own_measurements(run, checkpoint):  # noqa: F811
    Path("mine.csv").write_text("level,conductance_uS,std_uS\n0,1,0.2\n1,10,1\n2,20,1\n3,30,2\n")
    records, _, text = run(checkpoint, *FLAGS, "--device", "mine.csv", "--stuck_off", "0", "0.5")
    assert [(r["device"], r["stuck_off"]) for r in records[1:]] == [("mine", 0.0), ("mine", 0.5)]
    table = text.split("all settings: ")[-1]
    assert "rows 16, mine" in table.splitlines()[0] and "\nstuck_off 0.5 " in table
    assert records[1]["changed_predictions"] != records[2]["changed_predictions"]


def test_what_devices_are_called():
    files = ["x/a.csv", "y/a.csv", "b.csv", "y/b.txt", "techA.csv"]
    names = chip_flags.names_of([*files, "techA"])
    assert names == dict(zip(files, ["x/a.csv", "y/a.csv", f"{Path.cwd().name}/b.csv", "y/b.txt", f"{Path.cwd().name}/techA.csv"])) | {
        "techA": "techA"}
    assert chip_flags.names_of(["x/a.csv", "./x/a.csv", "y/b.csv"]) == {"x/a.csv": "a", "./x/a.csv": "a", "y/b.csv": "b"}
    assert chip_flags.names_of(["x/mine/level{W}_raw.npy", "y/level3_raw.npy"]) == {
        "x/mine/level{W}_raw.npy": "mine", "y/level3_raw.npy": "y"}


def test_folders_are_called_by_their_whole_name(tmp_path):
    for name in ("raw_0.5V", "raw_0.8V"):
        (tmp_path / name).mkdir()
    assert [*chip_flags.names_of([f"{tmp_path}/raw_0.5V", f"{tmp_path}/raw_0.8V/level{{W}}_raw.npy"]).values()] == ["raw_0.5V", "raw_0.8V"]


def test_a_folder_of_samples_by_any_of_its_names(tmp_path):
    for w in range(16):
        first = np.array([1.0 + 10 * (w >> bit & 1) for bit in (3, 2, 1, 0)])
        np.save(tmp_path / f"level{w}_raw.npy", 1e-6 * np.array([first, first + 0.01]))
    for name in ("", "/level{W}_raw.npy", "/level0_raw.npy"):
        found = chips_of({"device": f"{tmp_path}{name}"})
        assert found.device.level_values == pytest.approx((1.005, 11.005)) and found.name == tmp_path.name
    for name in ("", "none/level{W}_raw.npy"):
        with pytest.raises(UserError, match="^--device " + re.escape(name) + f": there is no preset and no file {name!r}; presets are"):
            chips_of({"device": name})


def test_on_off_ratios_in_a_table(run, checkpoint):  # noqa: F811
    """Rows, a picture, costs of the cells that there are, and the remark where the ratio makes no difference."""
    Path("own.py").write_text("from models.quant import Device\n\n\ndef half():\n    return Device('half', 'here', 50.0, 100.0)\n")
    flags = [*FLAGS, "--rows", "16", "--cost", "rram_32nm", "--reference"]
    records, _, text = run(checkpoint, *flags, "analog", "digital", "--on_off", "2", "50", "--also",
                           f"{' '.join(FLAGS[2:6])} --rows 16 --reference digital --device own.py:half")
    assert [(r["reference"], r["on_off"]) for r in records[1:]] == [
        ("analog", 2), ("analog", 50), ("digital", 2), ("digital", 50), ("digital", None)]
    assert records[1]["accuracy"] == records[2]["accuracy"] and records[3]["accuracy"] == records[5]["accuracy"]
    assert records[3]["energy_uJ"] == records[5]["energy_uJ"] > records[4]["energy_uJ"]
    assert "on/off ratio: an analog reference and pairs take the off-current out" in text
    assert Path("save/accuracy_over_on_off.png").exists()
    assert "on/off ratio" not in run(checkpoint, *flags, "digital", "--on_off", "2")[2]


@pytest.mark.parametrize("flags, said", [
    (["--smallest", "on_off=2:4:1"], True), (["--smallest", "on_off=2:4:1", "--reference", "digital"], False),
    (["--smallest", "adc_bits=2:4:1", "--on_off", "3"], True), (["--smallest", "adc_bits=2:4:1"], False)])
def test_the_remark_on_on_off_ratios_of_limits(flags, said, checkpoint):  # noqa: F811
    of, _ = eval_settings.parse(["--resume", checkpoint, "--at_least", "accuracy=9", *flags])
    assert bool(says.on_off(of)) == said


def test_files_of_one_name_are_two_devices(run, checkpoint, caplog):  # noqa: F811
    for folder, sigma in (("a", 0.05), ("b", 9)):
        Path(folder).mkdir()
        Path(folder, "cells.csv").write_text("level,conductance_uS,std_uS\n" + "".join(f"{i},{1 + 10 * i},{sigma}\n" for i in range(4)))
    records, _, _ = run(checkpoint, *FLAGS, "--device", "a/cells.csv", "b/cells.csv", "--stuck_off", "0", "0.5", "--save_cells")
    both = [(f"{folder}/cells.csv", share) for folder in "ab" for share in (0, 0.5)]
    assert [(r["device"], r["stuck_off"]) for r in records[1:]] == both
    found = [torch.load(f"prob/vgg7_quant_eval_w4_c2/bit_levels0_{name}_cells.csv_chip0.pt")["values"] for name in "ab"]
    assert not torch.equal(*found)
    pictures = {path.name for path in Path("save").glob("accuracy_over_*.png")}
    assert pictures == {"accuracy_over_stuck_off.png"}
    before = Path("prob/vgg7_quant_eval_w4_c2/bit_levels0_cells_chip0.pt")
    for folder in "ab":  # one by one both are called by their stem, and the cells are those of the last one
        run(checkpoint, *FLAGS, "--device", f"{folder}/cells.csv", "--save_cells")
        assert ("held cells of another device called cells, and hold those of this one now" in caplog.text) == (folder == "b")
        assert torch.equal(torch.load(before)["values"], found["ab".index(folder)])


def test_a_seed_of_noise_counts_where_there_is_noise():
    def found(**options):
        return keys.of_chips(Chips(device=Device.preset("techA"), **options))

    assert found(noise_seed=1) == found() and found(noise_seed=1, adc_gain=0.1) == found(adc_gain=0.1)
    assert all(found(noise_seed=1, **{name: 0.1}) != found(**{name: 0.1}) for name in ("read_noise", "adc_noise"))
    own = Device.preset("techA", read_noise=0.1)
    assert keys.of_chips(Chips(device=own, noise_seed=1)) != keys.of_chips(Chips(device=own))


@pytest.mark.parametrize("name, time", [("pcm", "20s"), ("winbond_asu_2bit", "20s"), ("techA", "0")])
def test_the_first_time_is_one_whether_it_is_given_or_not(name, time):
    given, not_given = (keys.of_chips(Chips(device=Device.preset(name, time=each))) for each in (time, None))
    assert given == not_given


def test_cells_far_beyond_their_levels_are_one_line(run, checkpoint):  # noqa: F811
    """One measured cell of 2,000 lies 4,200 levels away, which six standard deviations do not show."""
    Path("mine.csv").write_text("level,conductance_uS\n0,1\n1,1.01\n2,1.02\n" + "3,1.03\n" * 1999 + "3,141.03\n")
    with pytest.raises(UserError, match="^2-bit cells, 4-bit ADC, calibrated, rows 16, mine: values of cells reach "):
        run(checkpoint, *FLAGS, "--device", "mine.csv")


def test_a_list_of_devices_needs_no_checkpoint(capsys):
    with pytest.raises(SystemExit) as ended:
        evaluation.main(["--device", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code and [line.split(":")[0] for line in lines] == presets()


@pytest.mark.parametrize("flags, words", [
    (["--device", "techX"], ["--device techX: there is no preset and no file 'techX'; presets are cmo_hfox, ", "techA"]),
    (["--device", "techA", "--device_time", "1y"], ["--device_time: 1y is not seconds, or a number with ms, s, min, h, d or w"]),
    (["--device", "techA", "--device_time", "3w"], ["--device techA: techA at 25 C has no data at 1.8144e+06 s; nearest: 100000 s"]),
    (["--device", "neurram_chip", "--device_time", "1h"], ["--device neurram_chip: neurram_chip has no data over time"]),
    (["--device", "techA", "--device_temp", "50"], ["--device techA: ", "50 C"]),
    (["--device", "techA", "--stuck_on", "1.5"], ["--stuck_on: 1.5 is not a probability from 0 to 1"]),
    (["--device", "techA", "--stuck_off", "nan"], ["--stuck_off: nan is not a probability"]),
    (["--device", "techA", "--stuck_on", "0.6", "--stuck_off", "0.6"], ["--device techA: stuck_on 0.6 and stuck_off 0.6 sum above 1"]),
    (["--device", "techA", "--chips", "0"], ["--chips: 0 is not a whole number from 1 up"]),
    (["--device", "winbond_asu_1bit", "--cell_bits", "2"], ["winbond_asu_1bit has 2 levels, a cell of 2 bits needs 4"]),
    (["--device", "techA", "--read_noise", "device"], ["--device techA: "]),
    (["--device", "techA", "--read_noise", "some"], ["--read_noise: some is not device, or a number of uS from 0 up"]),
    (["--device", "techA", "--wire_ohm", "33nm"], ["--wire_ohm: 33nm is not a number from 0 up, or one of 130nm, 90nm, "]),
    (["--device", "techA", "--access", "gate", "--row_ohm", "1"], ["--row_ohm is 1.0 with access 'gate'"]),
    (["--device", "techA", "--access", "gate", "--wire_ohm", "1", "--dac_bits", "2"], ["access is 'gate' with dac_bits 2"]),
    (["--device", "techA", "--weights", "pair", "--reference_cells", "ideal"], ["reference_cells is 'ideal' and weights 'pair'"]),
    (["--device", "techA", "--adc_ranges", "x.json"], ["--adc_ranges are for ideal cells"]),
    (["--device", "techA", "--engine", "cuda"], ["no engine is named 'cuda'"]),
    (["--device_time", "1h"], ["--device_time is for the cells of a device: add --device NAME, or see --device list"]),
    (["--device_time", "1h", "--sigma", "2"], ["--device_time is for the cells of a device"]),
    (["--read_noise", "device"], ["--device ideal: ideal has no read noise of its own; give read_noise in uS"]),
    (["--sigma", "-1"], ["--sigma: -1 is not a number from 0 up"]),
    (["--on_off", "1:3:1"], ["--on_off: 1:3:1 is not a span"]), (["--on_off", "1"], ["--on_off: 1 is not a number above 1"]),
    (["--on_off", "inf"], ["--on_off: inf is not a number above 1"]),
    (["--device", "techA", "--on_off", "100"], ["--on_off 100: techA has no data at 2.3625 uS; it covers 3.75 to 236.25 uS"]),
    (["--device", "winbond_asu_2bit", "--on_off", "9"], ["--on_off 9: winbond_asu_2bit has 4 levels of its own, from 0.75 to 136.65 uS"]),
    (["--device", "own.csv", "--on_off", "9"], ["--on_off 9: own has 2 levels of its own, from 1 to 10 uS, and so its own ratio; leave"]),
    (["--on_off", "1.00000001", "--reference", "digital"], ["ideal: cells of 1 bits lie up to 1e+08 levels from 0 uS"]),
    (["--sigma", "1e5"], ["ideal: cells of 1 bits lie up to 6e+03 levels from the lowest one"]),
    *[([f"--{name}", value], [f"--{name} is for the cells of a device: add --device NAME"]) for name, value in (
        ("access", "gate"), ("chips", "2"), ("chip_seed", "1"), ("noise_seed", "1"), ("calib_on", "chip"), ("reference_cells", "ideal"))],
    (["--sigma", "0", "--chips", "2"], ["--chips is for the cells of a device"]),
    (["--save_cells"], ["--save_cells is for the cells of a device"]),
    (["--also", "--device_time 1h"], ["--device_time is for the cells of a device"]),
    (["--device", "mine.csv"], ["--device mine.csv: there is no preset and no file 'mine.csv'"]),
    (["--device", "bad.csv"], ["--device bad.csv: bad.csv, line 1: columns a,b"]),
    (["--device", "bytes.csv"], ["--device bytes.csv: "]),
    (["--device", "empty"], ["--device empty: "]),
])
def test_bad_input_of_devices_is_one_line(flags, words, refused, checkpoint):  # noqa: F811
    Path("bad.csv").write_text("a,b\n1,2\n")
    Path("own.csv").write_text("level,conductance_uS,std_uS\n0,1,0.1\n1,10,1\n")
    Path("bytes.csv").write_bytes(bytes(range(256)))
    Path("empty").mkdir()
    refused(["--resume", checkpoint, *flags], *words)


def test_flags_are_the_fields(monkeypatch):
    values = eval_settings.flags.parse(eval_settings.build_parser(), [
        "--device", "techA", "techB", "--device_time", "1h", "10s", "--read_noise", "device", "0.5", "--chips", "4", "--calib_on", "chip",
        "--wire_ohm", "1", "32nm", "--device_temp", "-40", "25", "--on_off", "2:3:0.5"])
    assert values == {"device": ["techA", "techB"], "device_time": [3600.0, 10.0], "read_noise": ["device", 0.5], "chips": 4,
                      "on_off": [2.0, 2.5, 3.0], "calib_on": "chip", "wire_ohm": [1.0, 1.3], "device_temp": [-40.0, 25.0]}
    made = DeviceSettings(device="techA", device_time=3600.0, stuck_on=0.25).made()
    assert (made.time, made.stuck_on, np.isfinite(made.sigma(100.0))) == (3600.0, 0.25, True)
    without = DeviceSettings(device="stuck_at_chen", stuck_on=0.0).made()  # faults of a preset that are said to be none
    assert (without.stuck_on, without.stuck_off) == (0.0, 0.0175)
    assert set(chip_flags.OF_ROW) | set(chip_flags.OF_RUN) == {*chip_flags.OF_DEVICE, *chip_flags.CHIPS_OR_NOISE}


def test_equal_settings_of_a_device_are_one(tmp_path):
    rows = {"device": ["techA"], "device_time": [None, 0.0, 10.0], "adc_range": ["ideal", "calibrated"], "adc_bits": [4, 6]}
    found = eval_settings.all_settings(rows, 4, 4)
    assert [(s.chips.device.time, s.spec.adc_range, s.spec.adc_bits) for s in found] == [
        (t, *adc) for t in (0.0, 10.0) for adc in (("ideal", 1), ("calibrated", 4), ("calibrated", 6))]


# ---- pictures and the report -------------------------------------------------------------------------------------------


def png(path):
    return Path(path).read_bytes().startswith(b"\x89PNG")


def test_pictures_over_what_is_swept(run, checkpoint, monkeypatch):  # noqa: F811
    drawn, draw = {}, report.sweep_plot
    monkeypatch.setattr(report, "sweep_plot", lambda curves, name, *args: (drawn.update({name: curves}), draw(curves, name, *args)))
    records, _, text = run(checkpoint, *FLAGS, "--adc_range", "full", "--device", "techB", "--device_time", "0", "10s", "1h",
                           "--stuck_on", "0", "0.1", "--chips", "2", drawn=True)
    assert list(drawn) == ["device_time", "stuck_on"]
    assert {curve: [value for value, _ in points] for curve, points in drawn["device_time"].items()} == {
        f"2-bit cells, 4-bit ADC, full, rows 16, techB{stuck}": [0.0, 10.0, 3600.0] for stuck in ("", ", stuck_on 0.1")}
    assert len(drawn["stuck_on"]) == 3 and len(records) == 7
    for name in drawn:
        assert png(f"save/accuracy_over_{name}.png") and f"plot: save/accuracy_over_{name}.png" in text.replace(f"{Path.cwd()}/", "")
    assert not Path("save/accuracy_over_adc_bits.png").exists()


def test_ideal_cells_begin_the_curve_over_sigma(run, checkpoint, monkeypatch):  # noqa: F811
    drawn = {}
    monkeypatch.setattr(report, "sweep_plot", lambda curves, name, *args: drawn.update({name: curves}))
    run(checkpoint, *FLAGS, "--adc_range", "full", "--sigma", "0", "5", "10", "--chips", "2", drawn=True)
    assert {curve: [value for value, _ in points] for curve, points in drawn.pop("sigma").items()} == {
        "2-bit cells, 4-bit ADC, full, rows 16, ideal": [0.0, 5.0, 10.0]} and not drawn


@pytest.mark.parametrize("times, label", [([0, 1, 3600, 86400, 100000], "programming"), ([*range(1, 12), 100000], "programming"),
                                          ([*range(1, 13), 100000], "programming (s)"), ([0, 3600, 86400], "programming")])
def test_times_of_an_axis_can_be_read(times, label, tmp_path, monkeypatch):
    """No name of a time lies on another, and where there are too many for names the unit is there."""
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, *_, **__: drawn.append(figure))
    chips = [Chips(device=Device.preset("techA", time=time)) for time in times]
    report.plots([Record(Setting(chips=each), torch.zeros(9), 90, 91, 1, 1, None, mean_bits=6) for each in chips], "title", tmp_path)
    axes, = drawn[0].axes
    drawn[0].savefig(tmp_path / "picture.png")
    assert axes.get_xlabel().endswith(label)
    boxes = [tick.get_window_extent() for tick in axes.get_xticklabels() if tick.get_text()]
    turned = len(times) > 6  # such names slant, and are as far apart as lines of text
    assert all(b.x1 - a.x1 > 12 if turned else b.x0 > a.x1 for a, b in zip(boxes, boxes[1:])) and len(boxes) >= min(4, len(times))


@pytest.mark.parametrize("count", [4, 19])
def test_reports_of_many_layers_can_be_read(count, tmp_path, monkeypatch):
    """Names of layers are turned where they would lie on one another; no two layers of a panel have one color."""
    drawn = []
    monkeypatch.setattr(chip_report, "save", lambda figure, *_, **__: drawn.append(figure))
    names = [f"stages.{i}.conv1" for i in range(count)]
    levels = [{"level": x, "cells": 9, "histogram": [4, 5]} for x in (0, 1)]
    shares = dict.fromkeys(diagnostics.SOURCES, 0.2)
    losses = [{"layer": name, "shares": shares, **dict.fromkeys(("adc", "cells", "both", "chip"), 20.0)} for name in names]
    chip_report.plot(tmp_path / "picture.png", "title", "a", [{"slice": 0, "bits": 1, "edges": [-1, 0, 1], "levels": levels}], losses,
                     None, CrossbarSpec())
    drawn[0].savefig(tmp_path / "picture.png")
    boxes = [tick.get_window_extent() for tick in drawn[0].axes[-1].get_xticklabels()]
    assert len(boxes) == count and all(b.x0 > a.x1 for a, b in zip(boxes, boxes[1:])) and min(box.y0 for box in boxes) >= 0

    axes = drawn[0].add_subplot()
    report._sqnr_panel(axes, [{"layer": name, "sqnr_over_adc_bits": {4: 20 + i, 5: 30}} for i, name in enumerate(names)], 4)
    assert len({tuple(np.ravel(line.get_color())) for line in axes.lines[:count]}) == count
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        *(names if count == 4 else [names[0], names[-1]]), "this setting"]


def test_what_has_no_axis_is_no_picture(run, checkpoint):  # noqa: F811
    run(checkpoint, *FLAGS, "--adc_range", "full", "--device", "techB", "techC", "--reference_cells", "device", "ideal")
    assert not list(Path("save").glob("*.png"))


def test_the_report_of_a_chip(run, checkpoint, monkeypatch):  # noqa: F811
    programmed, program = [], quant.program
    for module in (quant, measured_chips):
        monkeypatch.setattr(module, "program", lambda model, device, *args, **more: (
            programmed.append(args[:1] if device else None), program(model, device, *args, **more))[1])
    records, _, text = run(checkpoint, *FLAGS, "--device", "rram_wan", "--chips", "2", "--chip_seed", "3", "--report", drawn=True)
    assert [seeds for seeds in programmed if seeds] == [(3,), (4,), (3,)] and programmed[-1] is None
    [path] = Path("save").glob("report_*.json")
    assert path.name.startswith("report_c2_b4_") and png(path.with_suffix(".png"))
    assert f'{path.name},"2-bit cells, 4-bit ADC, calibrated, rows 16, rram_wan at 1s, chip 3"\n' in Path("save/reports.csv").read_text()
    content = json.loads(path.read_text())
    assert (content["setting"], content["chip_seed"]) == ("2-bit cells, 4-bit ADC, calibrated, rows 16, rram_wan at 1s", 3)
    assert content["title"] == f"vgg7_quant on digits: {content['setting']}, chip 3"
    assert [entry["layer"] for entry in content["losses"]] == CROSSBARS
    assert content["cells"]["layer"] == "classifier.0" and [s["bits"] for s in content["cells"]["slices"]] == [2, 2]
    table = text[text.index("layer "):].splitlines()
    assert table[0].split() == "layer scatter off by > 1/2 ADC alone dB cells alone dB both dB".split()
    assert [line.split()[0] for line in table[2:6]] == CROSSBARS
    second = next(i for i, line in enumerate(table) if i and line.startswith("layer "))
    assert table[second].split() == "layer all errors dB quantization scatter ADC".split()
    for line, entry in zip(table[second + 2:second + 6], content["losses"]):
        shares = [entry["shares"][source] for source in ("quantization", "scatter", "adc")]
        assert line.split() == [entry["layer"], f"{entry['all']:.1f}", *(f"{share:.1%}" for share in shares)]
        assert sum(shares) == pytest.approx(1) and min(map(abs, shares)) > 0


def test_a_report_is_of_what_was_measured(scene, tmp_path, monkeypatch):
    """Ranges that no calibration chose have no correction, layers without an ADC no panel; cells without any error are drawn too."""
    net, images, _, calibration = scene
    seen, losses = [], diagnostics.losses
    monkeypatch.setattr(diagnostics, "losses", lambda net, images, on, _: (seen.append(on), losses(net, images, on))[1])
    for made, plot in ((setting(), lambda *_: None), (setting(PERFECT, "conv", spec={"adc_range": "full"}), chip_report.plot)):
        monkeypatch.setattr(chip_report, "plot", plot)
        chip_report.write(tmp_path / "report", net, made, "title", images[:4], [calibration], Cache(), engine="numba")
    content = json.loads((tmp_path / "report.json").read_text())
    assert seen == [True, False] and content["cells"]["layer"] == "features.8" and content["losses"][0]["cells"] is None
    assert png(tmp_path / "report.png")


@pytest.mark.parametrize("weights", ["offset", "pair"])
def test_gate_access_to_the_last_rows_of_a_layer(weights):
    """In an array that is filled in part: as in a layer that has no other, whose line is loaded as much."""
    device = quant.Device("own", "here", 8.0, 166.0)
    spec = CrossbarSpec(w_bits=1, a_bits=1, adc_range="ideal", weights=weights)
    torch.manual_seed(0)
    layer, alone = (quant.QLinearDoreFa(rows, 40, bias=False, alpha_init=1.0, spec=spec).eval() for rows in (140, 12))
    alone.set_codes(layer.w_codes()[:, 128:])
    x = (torch.rand(200, 12) < 0.5).float()
    whole = torch.cat([torch.zeros(200, 128), x], 1)
    ideal = layer(whole)
    for each in (layer, alone):
        quant.program(each, device, wires=quant.Wires("gate", 1.0))
    found, wanted = layer(whole), alone(x) * layer.out_scale / alone.out_scale
    assert (found - wanted).square().mean() < 0.04**2 * ideal.square().mean()  # differences of currents that are 2 % off at most


def test_errors_of_gate_access_of_single_layers():
    """Layers on pairs and layers on offset cells in one report are off as far as where all are alike."""
    spec, found = CrossbarSpec(rows=64, cell_bits=2, adc_range="full"), {}
    x = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    for name, more in (("offset", {}), ("pair", {"weights": "pair"}), ("mixed", {})):
        torch.manual_seed(0)
        layers = (quant.Qconv2dDoreFa(channels, 8, 3, bias=False, spec=spec, alpha_init=1.0) for channels in (4, 8))
        net = torch.nn.Sequential(*layers).eval()
        made = Setting(replace(spec, **more), chips=Chips(device=quant.Device("own", "here", 2.0, 160.0), access="gate", wire_ohm=2.0),
                       per_layer={"1": {"weights": "pair"}} if name == "mixed" else {})
        place(net, made)
        program(net, made, 0)
        found[name] = [{"layer": each} for each in "01"]
        straight, both = chip_report._without_wires(net, made, 0)
        chip_report._add_gate_errors(found[name], gate_errors(net, x, made.chips.device, straight, 2.0, both))
    assert found["mixed"] == [found["offset"][0], found["pair"][1]]
    assert all(0 < each["gate_error"] < each["without_wires_error"] for each in found["pair"])


@pytest.mark.parametrize("inputs", ["phases", "offset"])
def test_errors_of_gate_access_of_a_converted_network(inputs):
    torch.manual_seed(0)
    x, device, wires = torch.randn(4, 8, 6, 6), Device.preset("neurosim_intel_22nm"), Wires("gate", 5.0)
    net = quant.convert(torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)),
                        CrossbarSpec(4, 4, adc_bits=6), x, inputs=inputs, first_last_bits=None)
    quant.program(net, device, 0)
    straight = {name: layer.cells() for name, layer in quant.crossbar_layers(net)}
    quant.program(net, device, 0, wires=wires)
    for with_curve, without in gate_errors(net, x, device, straight, 5.0).values():
        assert 0 < with_curve < without < 0.5


@pytest.mark.parametrize("pattern", ["first group", "fitted groups"])
def test_a_row_without_conductance_in_some_groups_keeps_it_in_the_others(pattern):
    """With hardly any resistance gate access changes hardly anything."""
    spec = CrossbarSpec(4, 4, cell_bits=1, mapping="im2col", adc_range="ideal")
    layer = quant.Qconv2dDoreFa(16, 16, 3, groups=16, spec=spec, wq="sawb").eval()
    with torch.no_grad():  # the highest bit is 0 of weights below zero, and so is its reference: 0 uS
        layer.weight[:1 if pattern == "first group" else 9, 0, 1] = -layer.weight.abs().max()
        layer.weight[9:, 0, 1] = layer.weight.abs().max()
    device = Device("own", "here", 0.0, 25.0)
    quant.program(layer, device, 0)
    wanted = layer.cells().values
    quant.program(layer, device, 0, wires=Wires("gate", 1e-3))
    assert (layer.cells().values - wanted).abs().max() <= 1  # of the grid


def on_a_chip(net, device, seed=0):
    place(net, setting())
    quant.calibrate(net, shown_images(359)[0][200:216])
    quant.program(net, device, seed)


@pytest.mark.parametrize("adc_range", ["calibrated", "full"])
def test_losses_behind_a_digital_reference(scene, adc_range):
    """Without scatter the ADC alone loses what it loses on the chip: its range, a full one too, holds the off-current."""
    net, images, _, calibration = scene
    place(net, setting(spec={"reference": "digital", "adc_range": adc_range}))
    quant.program(net, Device("leaky", "invented", 10.0, 40.0), 0)
    if adc_range == "calibrated":
        quant.calibrate(net, calibration)
    for entry in diagnostics.losses(net, images):
        assert entry["adc"] == entry["both"] == entry["chip"] and entry["cells"] is None
        assert entry["scatter"] == entry["far"] == 0


def test_losses_of_a_perfect_chip_are_those_of_the_adc(scene):
    net, images, *_ = scene
    with quant.set_engine("numba"):
        on_a_chip(net, PERFECT)
        for entry in diagnostics.losses(net, images):
            assert (entry["cells"], entry["scatter"], entry["far"]) == (None, 0.0, 0.0) or entry["cells"] > 100
            assert entry["adc"] == entry["both"] == entry["chip"] < 60


def test_losses_with_scatter(scene):
    net, images, *_ = scene
    with quant.set_engine("numba"):
        on_a_chip(net, NOISY)
        chips = [layer.chip.cells for _, layer in quant.crossbar_layers(net)]
        found, plain = diagnostics.losses(net, images), diagnostics.losses(net, images, corrected=False)
        assert [layer.chip.cells for _, layer in quant.crossbar_layers(net)] == chips
    for entry, other in zip(found, plain):
        assert entry["both"] < min(entry["adc"], entry["cells"]) + 0.5 and entry["chip"] == entry["both"] > 0
        assert entry["scatter"] == pytest.approx(0.4, rel=0.1) and entry["far"] == pytest.approx(0.211, abs=0.03)
        assert other["cells"] <= entry["cells"] + 0.1


def test_losses_have_the_noise_of_reads_in_them(scene):
    net, images, *_ = scene
    with quant.set_engine("numba"):
        on_a_chip(net, NOISY)
        quant.program(net, NOISY, 0, adc_noise=2.0)
        assert all(entry["chip"] < entry["both"] - 1 for entry in diagnostics.losses(net, images))


def test_losses_do_not_depend_on_the_correction_of_the_chip(scene):
    """The ADC on nominal cells is the same whatever chip its layers were corrected for."""
    net, images, *_ = scene
    with quant.set_engine("numba"):
        on_a_chip(net, NOISY)
        plain = diagnostics.losses(net, images)
        for _, layer in quant.crossbar_layers(net):
            layer.set_correction(0.3 * torch.ones_like(layer.adc_gain), torch.full_like(layer.adc_offset, 2.0))
        assert diagnostics.losses(net, images) == plain
        assert all(bool((layer.adc_gain == 0.3).all() and (layer.adc_offset == 2).all()) for _, layer in quant.crossbar_layers(net))


WITHOUT = {"quantization", "adc"}  # a device's cells, what its reads have besides


@pytest.mark.parametrize("device, more, sources", [
    (PERFECT, {}, WITHOUT), (NOISY, {}, WITHOUT | {"scatter"}), (PERFECT, {"adc_noise": 1.0}, WITHOUT | {"noise"}),
    (PERFECT, {"wires": Wires(wire_ohm=200.0)}, WITHOUT | {"wires"}), (PERFECT, {"wires": Wires("gate", 200.0)}, WITHOUT | {"wires"}),
    (NOISY, {"wires": Wires("gate", 200.0), "adc_gain": 0.1}, {*diagnostics.SOURCES})])
def test_shares_of_errors_are_of_what_is_there(scene, device, more, sources):
    net, images, *_ = scene
    with quant.set_engine("numba"):
        on_a_chip(net, device)
        straight = {name: layer.cells() for name, layer in quant.crossbar_layers(net)}
        quant.program(net, device, 0, **more)
        for entry in diagnostics.losses(net, images, straight=straight if "wires" in more else {}):
            assert {source for source, share in entry["shares"].items() if abs(share) > 1e-9} == sources
            assert sum(entry["shares"].values()) == pytest.approx(1) and entry["all"] < entry["chip"]


def test_shares_of_errors_against_layers_by_hand(scene):
    """Of the quantization that of PyTorch's own convolution of what is not rounded; of the cells what they add to it."""
    net, images, *_ = scene
    layer = net.features[8]
    inputs, wanted = diagnostics.ideal_pass(net, [("features.8", layer)], images)
    x, software = inputs["features.8"], wanted["features.8"]
    t = torch.tanh(layer.weight.detach())
    exact = torch.nn.functional.conv2d(x.relu(), t / t.abs().max(), None, layer.stride, layer.padding)
    assert torch.allclose(layer.unquantized(x), exact, rtol=1e-4, atol=1e-5) and (x > layer.act_quant.act_alpha).any()
    of_rounding = (exact - software).double().square().sum()
    with quant.set_engine("numba"):
        on_a_chip(net, NOISY)
        [entry] = [each for each in diagnostics.losses(net, images, corrected=False) if each["layer"] == "features.8"]
        spec = layer.spec
        layer.set_spec(replace(spec, adc_range="ideal"))  # the cells stay
        cells = layer.simulate(x)
        of_cells = (cells - software).double().square().sum()
    assert entry["cells"] == pytest.approx(float(10 * torch.log10(software.double().square().sum() / of_cells)), abs=1e-6)
    added = (cells - exact).double().square().sum() - of_rounding
    assert entry["shares"]["scatter"] / entry["shares"]["quantization"] == pytest.approx(float(added / of_rounding), rel=1e-3)


def test_shares_of_noise_and_wires_by_hand(scene):
    """Of noise `sum over arrays, digits and slices of 4^(z + c k) (s^2 + 1/12 of a step squared)` for each output; what wires do is the
    same without it."""
    net, images, *_ = scene
    layer, s, shares = net.features[8], 1.5, {}
    with quant.set_engine("numba"):
        on_a_chip(net, PERFECT)
        straight = {name: each.cells() for name, each in quant.crossbar_layers(net)}
        for wires in (None, Wires("gate", 200.0)):
            for noise in (0.0, s):
                quant.program(net, PERFECT, adc_noise=noise, wires=wires)
                found = diagnostics.losses(net, images, False, straight if wires else {})
                shares[wires, noise] = next(entry["shares"] for entry in found if entry["layer"] == "features.8")
        inputs, wanted = diagnostics.ideal_pass(net, [("features.8", layer)], images)
    of_rounding = float((layer.unquantized(inputs["features.8"]) - wanted["features.8"]).double().square().sum())
    step = 2 * layer.act_quant.act_alpha.item() / 15 * float(layer.weight_quant.step) * layer.out_scale  # of v in the output
    reads = len(layer.arrays) * sum(4.0 ** (z + 2 * k) for z in range(4) for k in range(2)) * wanted["features.8"].numel()
    found = shares[None, s]["noise"] / shares[None, s]["quantization"] * of_rounding
    assert found / (step**2 * reads * (s**2 + 1 / 12 / 256**2)) == pytest.approx(1, abs=5 * (2 / wanted["features.8"].numel()) ** 0.5)
    of_wires = [shares[Wires("gate", 200.0), noise]["wires"] / shares[Wires("gate", 200.0), noise]["quantization"] for noise in (0.0, s)]
    assert of_wires[0] == pytest.approx(of_wires[1]) and of_wires[0] > 1e-3


@pytest.mark.parametrize("inputs", ["phases", "offset"])
def test_shares_of_errors_of_a_converted_network(inputs):
    """Unquantized is what the network itself computes."""
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(200, 6)), torch.randn(9, 3, 5, 5)
    made = quant.convert(net, CrossbarSpec(w_bits=4, a_bits=4, cell_bits=2, adc_bits=6), x, inputs=inputs)
    quant.calibrate(made, x)
    quant.program(made, NOISY)
    layers = quant.crossbar_layers(made)
    seen, _ = diagnostics.ideal_pass(made, layers, x)
    for (name, layer), module in zip(layers, (net[0], net[2]), strict=True):
        assert torch.allclose(layer.unquantized(seen[name]), module(seen[name]), atol=1e-5)
    for entry in diagnostics.losses(made, x):
        assert {source for source, share in entry["shares"].items() if abs(share) > 1e-9} == WITHOUT | {"scatter"}


def test_levels_of_cells(scene):
    net, *_ = scene
    on_a_chip(net, NOISY, 1)
    layer = net.features[8]
    slices = diagnostics.cell_levels(layer)
    for k, entry in enumerate(slices):
        assert sum(each["cells"] for each in entry["levels"]) == layer.weight.numel()
        assert all(sum(each["histogram"]) == each["cells"] for each in entry["levels"])
        for each in entry["levels"]:
            own = layer.cells().values[k][layer.ideal_cells().values[k] == 256 * each["level"]] / 256
            assert each["cells"] == len(own)
            if len(own) > 100:
                assert each["mean"] == pytest.approx(each["level"], abs=0.15) and each["deviation"] == pytest.approx(0.4, abs=0.08)


# ---- cells as files ----------------------------------------------------------------------------------------------------


def cells_of(net):
    return [(layer.cells().values.clone(), layer.cells().reference.clone()) for _, layer in quant.crossbar_layers(net)]


def same(a, b):
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other))


def test_files_of_cells_are_those_that_are_there_now(tmp_path):
    torch.manual_seed(0)
    layer = quant.Qconv2dDoreFa(6, 8, 3, spec=CrossbarSpec(adc_range="full", adc_bits=12, rows=16)).eval()
    device, net = Device("own", "here", 5.0, 100.0, sigma_us=1.0), torch.nn.Sequential(layer)
    for wires in (None, Wires("voltage", 50.0)):
        quant.program(net, device, 0, wires=wires)
        held = layer.cells().values
        assert quant.write_cells(tmp_path, net, "own", 0) == 1 and quant.write_cells(tmp_path, net, "own", 0) == 0
        quant.read_cells(tmp_path, net, "own", 0)
        assert torch.equal(layer.cells().values, held) and layer.chip.of_arrays == (wires is not None)
    quant.program(net, device, 0, wires=Wires("gate", 1.0))
    quant.write_cells(tmp_path, net, "own", 0)
    with pytest.raises(ValueError, match="holds cells of gate access"):
        quant.read_cells(tmp_path, net, "own", 0)


def test_cells_that_are_written_can_be_read(scene, tmp_path):
    net, images, *_ = scene
    place(net, setting())
    quant.program(net, NOISY, 3)
    expected = cells_of(net)
    assert quant.write_cells(tmp_path, net, "noisy", 3) == 4 and quant.write_cells(tmp_path, net, "noisy", 3) == 0
    content = torch.load(tmp_path / "bit_levels1_noisy_chip3.pt")
    assert set(content) == {"values", "reference", "fraction_bits"} and torch.equal(content["values"], expected[1][0])
    quant.program(net, None)
    quant.read_cells(tmp_path, net, "noisy", 3)
    assert same(cells_of(net), expected)
    quant.PlaneStore(tmp_path.parent, "x", 4, 2).write([])  # other folders do not matter
    content["values"] += 1  # somebody edits them
    torch.save(content, tmp_path / "bit_levels1_noisy_chip3.pt")
    quant.read_cells(tmp_path, net, "noisy", 3)
    assert torch.equal(net.features[8].cells().values, expected[1][0] + 1)
    torch.save(content | {"fraction_bits": 4}, tmp_path / "bit_levels1_noisy_chip3.pt")
    with pytest.raises(ValueError, match=r"noisy_chip3.pt has cells .* on a grid of 4 bits; features.8 needs .* and 8$"):
        quant.read_cells(tmp_path, net, "noisy", 3)


def test_planes_and_chips_share_a_manifest(scene, tmp_path):
    net, *_ = scene
    place(net, setting())
    store = quant.PlaneStore(tmp_path, "net", 4, 2)
    codes = [(name, layer.w_codes()) for name, layer in quant.crossbar_layers(net)]
    assert store.write(codes) == 4
    quant.program(net, NOISY, 0)
    assert quant.write_cells(store.folder, net, "noisy", 0) == 4
    assert store.write(codes) == 0 and quant.write_cells(store.folder, net, "noisy", 0) == 0
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert len(manifest) == 8
    entry = manifest["bit_levels1_noisy_chip0.pt"]
    assert (entry["layer"], entry["device"], entry["seed"], entry["shape"]) == ("features.8", "noisy", 0, [2, 1, 216, 40])


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.unlink(), "does not exist"),
    (lambda path: path.write_bytes(path.read_bytes()[:500]), "cannot be read"),
    (lambda path: torch.save(torch.zeros(3), path), "holds no dict of values, reference, fraction_bits"),
    (lambda path: torch.save({"values": 1, "reference": 2, "fraction_bits": 8}, path), "values of cells are int"),
    (lambda path: torch.save({"values": torch.zeros(2, 1, 3, 4, dtype=torch.int32), "fraction_bits": 8,
                              "reference": torch.zeros(2, 1, 3, dtype=torch.int32)}, path), "has cells of shape [2, 1, 3, 4]"),
])
def test_cells_that_cannot_be_read_change_nothing(damage, words, scene, tmp_path):
    net, *_ = scene
    place(net, setting())
    quant.program(net, NOISY, 0)
    quant.write_cells(tmp_path, net, "noisy", 0)
    quant.program(net, NOISY, 1)
    before, path = cells_of(net), tmp_path / "bit_levels2_noisy_chip0.pt"
    damage(path)
    with pytest.raises(ValueError) as error:
        quant.read_cells(tmp_path, net, "noisy", 0)
    assert str(path) in str(error.value) and words in str(error.value) and same(cells_of(net), before)


def test_cells_of_other_weights_are_refused_and_written_anew(scene, tmp_path):
    net, *_ = scene
    place(net, setting())
    quant.program(net, NOISY, 0)
    quant.write_cells(tmp_path, net, "noisy", 0)
    net.features[4].weight.data.neg_()
    with pytest.raises(ValueError, match="bit_levels0_noisy_chip0.pt holds cells of other weights than those of features.4"):
        quant.read_cells(tmp_path, net, "noisy", 0)
    assert quant.write_cells(tmp_path, net, "noisy", 0) == 4 and quant.write_cells(tmp_path, net, "noisy", 0, {"rows": 8}) == 4


def test_what_a_manifest_says_of_cells_is_checked(scene, tmp_path):
    """Entries of old manifests, which name neither, are of an analog reference and offset cells."""
    net, *_ = scene
    place(net, setting())
    quant.program(net, NOISY, 0)
    quant.write_cells(tmp_path, net, "noisy", 0)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    old = {name: {key: value for key, value in entry.items() if key not in ("reference", "weights")} for name, entry in manifest.items()}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    quant.read_cells(tmp_path, net, "noisy", 0)
    for key, own, words in (("reference", "digital", "reference analog"), ("weights", "pair", "weights offset")):
        place(net, setting(spec={key: own}))
        with pytest.raises(ValueError, match=f"noisy_chip0.pt holds cells of {words}"):
            quant.read_cells(tmp_path, net, "noisy", 0)
    place(net, setting())
    (tmp_path / "manifest.json").write_text(json.dumps({name: entry | {"access": "gate"} for name, entry in manifest.items()}))
    with pytest.raises(ValueError, match="noisy_chip0.pt holds cells of gate access"):
        quant.read_cells(tmp_path, net, "noisy", 0)


@pytest.mark.parametrize("change", [{"rows": 8}, {"mapping": "im2col"}])
def test_cells_behind_wires_are_those_of_their_arrays(change, scene, tmp_path):
    net, *_ = scene
    place(net, setting())
    quant.program(net, NOISY, 0, wires=Wires(wire_ohm=1.0))
    quant.write_cells(tmp_path, net, "noisy", 0, {"rows": 16, "mapping": "tap", "access": "voltage"})
    quant.read_cells(tmp_path, net, "noisy", 0)
    assert all(layer.chip.of_arrays for _, layer in quant.crossbar_layers(net))
    place(net, setting(spec=change))
    with pytest.raises(ValueError, match=f"holds cells of {next(iter(change))} "):
        quant.read_cells(tmp_path, net, "noisy", 0)


def test_saving_the_cells_of_an_evaluation(run, checkpoint):  # noqa: F811
    flags = [*FLAGS, "--adc_range", "full", "--device", "techB", "--device_time", "0", "1h", "--chips", "2", "--save_cells"]
    _, _, text = run(checkpoint, *flags)
    folder = Path("prob/vgg7_quant_eval_w4_c2")
    names = {f"bit_levels{i}_{device}_chip{seed}.pt" for i in range(4) for device in ("techB", "techB_1h") for seed in (0, 1)}
    assert {path.name for path in folder.glob("*_chip*")} == names and names < json.loads((folder / "manifest.json").read_text()).keys()
    assert text.count(f"written to {folder}") == 3
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "cells of" not in run(checkpoint, *flags)[2]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    net = models.create("vgg7_quant_eval", alpha_init=2.0)
    net.load_state_dict(network().state_dict(), strict=False)
    place(net, setting())
    quant.read_cells(folder, net, "techB_1h", 1)
    found = cells_of(net)
    quant.program(net, Device.preset("techB", time="1h"), 1)
    assert same(found, cells_of(net))


def test_chips_of_several_commands_and_arrays_lie_side_by_side(run, checkpoint):  # noqa: F811
    """Arrays of other sizes behind wires have files of their own; what reads have besides makes no other cells."""
    flags = [*FLAGS, "--adc_range", "full", "--device", "techB", "--save_cells"]
    run(checkpoint, *flags, "--wire_ohm", "2", "--rows", "8", "16")
    known = json.loads(Path("prob/vgg7_quant_eval_w4_c2/manifest.json").read_text())
    assert {name: entry["rows"] for name, entry in known.items() if name.startswith("bit_levels0_t")} == {
        f"bit_levels0_techB_wire_ohm2ohm_rows{rows}_chip0.pt": rows for rows in (8, 16)}
    assert "cells of" in run(checkpoint, *flags)[2] and "cells of" not in run(checkpoint, *flags, "--adc_noise", "0.3")[2]


def test_a_shard_saves_the_chips_that_it_measures(run, checkpoint):  # noqa: F811
    run(checkpoint, *FLAGS, "--adc_range", "full", "--device", "techB", "--chips", "4", "--shard", "1/2", "--save_cells")
    assert {path.name[-4] for path in Path("prob/vgg7_quant_eval_w4_c2").glob("bit_levels0_techB_*")} == {"0", "1"}


def test_two_programs_lose_no_entry_of_a_manifest(scene, tmp_path):
    net, *_ = scene
    place(net, setting())
    children = []
    for part in range(2):
        if not (child := os.fork()):
            try:
                for seed in range(part, 12, 2):
                    quant.program(net, NOISY, seed)
                    quant.write_cells(tmp_path, net, "noisy", seed)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    files = {path.name for path in tmp_path.glob("*.pt")}
    assert len(files) == 48 and json.loads((tmp_path / "manifest.json").read_text()).keys() == files


@pytest.mark.parametrize("weights", ["offset", "pair"])
def test_a_report_of_gate_access_where_a_layer_has_no_adc(run, checkpoint, weights):  # noqa: F811
    gate = ["--device", "techC", "--access", "gate", "--wire_ohm", "20", "--weights", weights, "--report"]
    _, _, text = run(checkpoint, *FLAGS, *gate, "--per_layer", "features.8:adc_range=ideal")
    assert "curve, no wires off by: root" in text and "features.8 " not in text.split("scatter")[1]


def test_no_layer_has_an_adc_to_report_on(run, checkpoint):  # noqa: F811
    _, _, text = run(checkpoint, *FLAGS, "--per_layer", "*:adc_range=ideal", "--report", "--cost", "rram_32nm")
    assert "picture" not in text and not Path("save/cost.json").exists()


def test_what_a_setting_needs_of_the_code():
    wired = Setting(chips=Chips(device=NOISY, wire_ohm=1.0))
    assert keys.parts_of(setting(None)) == [] and keys.parts_of(setting(None), stored_chip=True) == keys.parts_of(setting()) == ["chips"]
    assert keys.parts_of(wired) == ["chips", "wires"] and {*keys.of_code(*keys.parts_of(wired))} == {"measuring", "chips", "wires"}


def test_numbers_of_numpy_have_the_keys_of_pythons():
    chips = Chips(device=NOISY, chip_seed=np.int64(3), adc_noise=np.float64(0.5))
    assert keys.key_of(keys.of_chips(chips)) == keys.key_of(keys.of_chips(Chips(device=NOISY, chip_seed=3, adc_noise=0.5)))


def test_cells_are_saved_once_whatever_their_reads_are(scene, tmp_path, caplog):
    net, *_ = scene
    for read_noise, written in ((None, 4), ("device", 0), (0.1, 0)):
        made = Setting(setting().spec, chips=Chips(device=Device.preset("cmo_hfox", time="1h"), read_noise=read_noise))
        place(net, made)
        assert chip_files.save_cells(net, made, tmp_path) == written and not caplog.records


def test_other_cells_of_the_same_name_are_written(tmp_path):
    """The reference's alone too; chips of seeds of several digits are found."""
    layer = quant.QLinearDoreFa(20, 3, bias=False, spec=CrossbarSpec(adc_range="full"), alpha_init=1.0)
    net = torch.nn.ModuleList([layer])
    quant.program(net, NOISY, 7)
    assert [quant.write_cells(tmp_path, net, "own", 7) for _ in range(2)] == [1, 0]
    quant.program(net, NOISY, 8)
    assert quant.write_cells(tmp_path, net, "own", 7) == 1
    layer.set_cells(replace(layer.cells(), reference=layer.cells().reference + 1))
    assert [quant.write_cells(tmp_path, net, "own", seed) for seed in (7, 12)] == [1, 1]
    assert quant.chips_in(tmp_path) == [("own", 12), ("own", 7)]


def test_cells_of_another_arithmetic_are_written_anew(scene, tmp_path, monkeypatch):
    net = scene[0]
    place(net, setting())
    assert [chip_files.save_cells(net, setting(), tmp_path) for _ in range(2)] == [4, 0]
    other = keys.digests() | {"chips": "of other code"}
    monkeypatch.setattr(keys, "digests", lambda: other)
    assert chip_files.save_cells(net, setting(), tmp_path) == 4


def test_a_folder_of_cells_must_fit_every_row(run, refused, checkpoint):  # noqa: F811
    run(checkpoint, "--cell_bits", "2", "--adc_bits", "4", "--limit", "4", "--device", "techC", "--save_cells")
    Path("mine").mkdir()
    folder = Path("prob/vgg7_quant_eval_w4_c2")
    for path in (*folder.glob("*_chip0.pt"), folder / "manifest.json"):
        shutil.copy(path, "mine")
    refused(["--resume", checkpoint, *FAST, "--cell_bits", "2", "--reference", "digital", "analog", "--planes", "mine"], "holds cells of ")


def test_files_of_names_that_differ_in_small_things_have_reports_of_their_own(run, checkpoint):  # noqa: F811
    for name, sigma in (("Mine", 0.5), ("mine", 0.1)):
        Path(f"{name}.csv").write_text(f"level,conductance_uS,std_uS\n0,1,{sigma}\n1,10,{sigma}\n")
    run(checkpoint, "--engine", "numba", "--adc_bits", "4", "--limit", "4", "--device", "Mine.csv", "mine.csv", "--report")
    found = [json.loads(path.read_text())["setting"] for path in Path("save").glob("report_*.json")]
    assert sorted(text.split()[-1] for text in found) == ["Mine", "mine"]


def test_saved_cells_say_which_hardware_they_are_of(scene, tmp_path):
    net, *_ = scene
    for spec, options, label in (({"reference": "digital"}, {}, "noisy_digital"), ({"weights": "pair"}, {}, "noisy_pair"),
                                 ({}, {"wire_ohm": 2.0, "access": "gate"}, "noisy_wire_ohm2ohm_accessgate_rows16")):
        made = setting(spec=spec, **options)
        place(net, made)
        assert chip_files.save_cells(net, made, tmp_path) == 4 and chip_files.save_cells(net, made, tmp_path) == 0
        entry = json.loads((tmp_path / "manifest.json").read_text())[f"bit_levels3_{label}_chip0.pt"]
        assert [entry.get(key) for key in ("rows", "mapping", "access")] == ([16, "tap", "gate"] if options else [None] * 3)
    with pytest.raises(ValueError, match="holds cells of gate access"):
        quant.read_cells(tmp_path, net, label, 0)


def test_files_hold_all_layers_whatever_a_setting_leaves_out(run, checkpoint):  # noqa: F811
    run(checkpoint, *FLAGS, "--adc_range", "full", "--device", "techB", "--save_cells", "--crossbar_layers", "conv")
    path = Path("prob/vgg7_quant_eval_w4_c2/bit_levels3_techB_chip0.pt")
    before = path.stat().st_mtime_ns
    assert (torch.load(path)["values"] % 256 != 0).any()
    run(checkpoint, *FLAGS, "--adc_range", "full", "--device", "techB", "--save_cells")
    assert path.stat().st_mtime_ns == before


def test_layers_that_a_setting_leaves_out_are_saved_on_its_hardware(run, checkpoint):  # noqa: F811
    """So that the files can be read again, and say the arrays that their cells are of."""
    flags = [*FLAGS, "--adc_range", "full", "--reference", "digital", "--rows", "8"]
    chip = ["--device", "techB", "--wire_ohm", "2", "--save_cells"]
    [_, saved], (_, wanted), _ = run(checkpoint, *flags, *chip, "--crossbar_layers", "conv")
    folder, mine = Path("prob/vgg7_quant_eval_w4_c2"), Path("mine")
    mine.mkdir()
    for path in (*folder.glob("*_chip0.pt"), folder / "manifest.json"):
        Path(mine, path.name).write_bytes(path.read_bytes())
    [_, record], (_, found), _ = run(checkpoint, *flags, "--planes", "mine", "--crossbar_layers", "conv")
    assert torch.equal(found, wanted) and record["accuracy"] == saved["accuracy"]
    [_, saved], (_, wanted), _ = run(checkpoint, *flags, *chip, "--prob_path", "other")
    [_, record], (_, found), _ = run(checkpoint, *flags, "--planes", "mine")
    assert torch.equal(found, wanted) and record["accuracy"] == saved["accuracy"]


@pytest.mark.parametrize("values, words", [
    ({"chips": 0}, "chips is 0; allowed is a whole number from 1 up"), ({"chip_seed": -1}, "chip_seed is -1; allowed is a whole"),
    ({"noise_seed": 1.5}, "noise_seed is 1.5"), ({"adc_noise": 1e7}, r"adc_noise is 10000000.0; allowed is a number from 0 to 1e\+06"),
    ({"adc_gain": True}, "adc_gain is True; allowed is a number from 0 to"), ({"row_ohm": float("nan")}, "row_ohm is nan"),
    ({"wire_ohm": "32nm"}, "wire_ohm is '32nm'; allowed is a number from 0 up, or one of 130nm"),
    ({"read_noise": "none"}, "read_noise is 'none'; allowed is device"),
    ({"reference_cells": "none"}, "reference_cells is 'none'; allowed are device, ideal")])
def test_chips_that_cannot_be(values, words):
    with pytest.raises(ValueError, match=words):
        Chips(device=NOISY, **values)


def test_what_files_call_them():
    values = [{"device": "techA"}, {"device": "techA", "device_time": 3600.0, "stuck_on": 0.01, "adc_noise": 1.0},
              {"device": "techA", "device_temp": 100.0}, {"device": "neurram_chip", "reference_cells": "ideal"}]
    assert [chips_of(each).label() for each in values] == [
        "techA", "techA_1h_stuck_on0.01", "techA_100C", "neurram_chip_reference_cellsideal"]


@pytest.mark.parametrize("more", [["--weights", "pair"], ["--reference", "digital"]])
def test_a_network_on_the_cells_in_a_folder(run, refused, checkpoint, more, caplog):  # noqa: F811
    """The chip that wrote them, to the bit, with the ranges of its nominal cells; edited cells are another chip; what does not fit is
    one line."""
    flags = [*FLAGS, *more]
    [_, chip], (_, wanted), _ = run(checkpoint, *flags, "--device", "techC", "--device_time", "1d", "--chip_seed", "3", "--save_cells")
    folder = Path("prob/vgg7_quant_eval_w4_c2")
    refused(["--resume", checkpoint, *flags, "--planes", "mine"], "mine/bit_levels0_ideal.pt does not exist" if "digital" in more else
            "mine holds no cells of a chip")
    Path("mine").mkdir()
    for path in (*folder.glob("*_chip3.pt"), folder / "manifest.json"):
        Path("mine", path.name).write_bytes(path.read_bytes())
    kept = Path("save/adc_ranges.json").read_text() if Path("save/adc_ranges.json").exists() else None
    [_, record], (_, found), text = run(checkpoint, *flags, "--planes", "mine", "--report")
    assert torch.equal(found, wanted) and record["accuracy"] == chip["accuracy"]
    [report_] = (path for path in Path("save").glob("report_*.json") if "cells of mine" in path.read_text())
    assert json.loads(report_.read_text())["title"].endswith(", cells of mine")
    assert record["planes"] == "mine" and record["device"] is None and "cells from mine" in text and "cells alone dB" in text
    assert (Path("save/adc_ranges.json").read_text() if kept else None) == kept
    for path in Path("mine").glob("bit_levels*.pt"):
        cells = torch.load(path)
        torch.save(cells | {"values": cells["values"].flip(3)}, path)
    assert not torch.equal(run(checkpoint, *flags, "--planes", "mine")[1][1], wanted)
    weights = "offset" if "pair" in more else "pair"
    refused(["--resume", checkpoint, *FLAGS, "--weights", weights, "--planes", "mine"], "chip3.pt holds cells of ", " hardware has ")
    refused(["--resume", checkpoint, *flags, "--cell_bits", "1", "--planes", "mine"], "holds cells of cell_bits 2, and the hardware has 1")
    refused(["--resume", checkpoint, *flags, "--planes", "mine", "--device", "techC"], "mine holds the cells of a chip, and --device draws")
    if "pair" not in more:
        run(checkpoint, *flags, "--planes", str(folder))
        assert f"{folder} holds bit-planes, which are taken, and the cells of chips too, which are not" in caplog.text
    manifest = Path("mine/manifest.json").read_text()
    Path("mine/manifest.json").write_text(manifest[:-9])
    refused(["--resume", checkpoint, *flags, "--planes", "mine"], "mine/manifest.json cannot be read: ")
    Path("mine/manifest.json").unlink()
    run(checkpoint, *flags, "--planes", "mine")
    assert "no manifest.json in mine says of which weights and hardware the cells of techC_1d_" in caplog.text
    Path("mine", next(Path("mine").glob("bit_levels0_*")).name.replace("chip3", "chip4")).write_bytes(b"")
    refused(["--resume", checkpoint, *flags, "--planes", "mine"], "mine holds the cells of 2 chips; keep those of one: techC_1d")


def test_a_report_of_gate_access_says_how_far_its_curve_is_off(run, checkpoint):  # noqa: F811
    _, _, text = run(checkpoint, *FLAGS, "--device", "techC", "--access", "gate", "--wire_ohm", "2", "--report")
    assert "curve, no wires off by: root mean square error" in text
    [path] = Path("save").glob("report_*.json")
    for layer in json.loads(path.read_text())["losses"]:
        assert 0 < layer["gate_error"] < 0.03 and layer["gate_error"] < layer["without_wires_error"]
