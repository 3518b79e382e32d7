"""Noise on the weights themselves: against products of matrices by hand, its statistics, and the rows of eval.py."""

import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_chips import scene  # noqa: F401
from test_eval import checkpoint, classes, network, refused, run, shown_images  # noqa: F401
from test_eval import scene as small_networks  # noqa: F401
from test_sweeps import trained  # noqa: F401
from torch import nn
from torch.nn import functional as F

import eval as evaluation
from experiment.measure import keys
from experiment.program.cli import UserError
from experiment.report import report
from experiment.report.html_report import _baseline
from experiment.settings.eval_settings import parse_all
from models import quant
from models.quant import (Chips, CrossbarSpec, Device, Qconv2dDoreFa, QLinearDoreFa, Setting, WeightNoise, add_weight_noise,
                          convert, crossbar_layers, measure)
from models.quant.engines.cpu.whole.several import ProductsOfBytes
from models.quant.network.weight_noise import noisy_weights

pytestmark = pytest.mark.usefixtures("one_thread")
W4 = CrossbarSpec(w_bits=4, a_bits=4, cell_bits=4, adc_range="ideal")
W8 = CrossbarSpec(w_bits=8, a_bits=8, cell_bits=8, adc_range="ideal")
LAWS = [0.0, 0.02, 0.3, "pcm"]


def deviation(g):
    """Of phase-change memory at g of 180 uS, as published: two devices above 52.5 uS, one below."""
    if g > 52.5:
        return 2.110295720240385 + g * (0.2453487119885723 + g * (-0.003054993405157235 + g * 1.2329755395573392e-05))
    return 2.5797410660159494 + g * (0.22419685954327148 + g * (-0.00371581208142707 + g * 2.939751381126213e-05))


def expected(weight, quantized, step, law, seed, name, fraction):
    """Weights with noise, float64: drawn by hand, and rounded to `2^-fraction` of a code, of which one is worth `step`, `[out]`."""
    normals = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode()), 0, 5])).standard_normal(tuple(weight.shape))
    found = quantized.clone()
    for place in np.ndindex(*weight.shape):
        largest, own = float(weight[place[0]].abs().max()), float(quantized[place])
        if law == "pcm":
            g = 180 * min(abs(own) / largest, 1)
            noise = -own if g < 0.6 else deviation(g) / 180 * largest * normals[place]
        else:
            noise = law * largest * normals[place]
        code = float(step[place[0]])
        found[place] += round(noise / code * 2**fraction) / 2**fraction * code
    return found


def close(found, wanted):
    assert torch.allclose(found.double(), wanted, rtol=0, atol=3e-6 * float(wanted.abs().max()))


# ---- against the product by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["numba", "reference"])
@pytest.mark.parametrize("law", LAWS)
def test_a_trained_linear_layer_by_hand(law, engine):
    torch.manual_seed(0)
    net = nn.Sequential(QLinearDoreFa(40, 24, spec=W4, out_scale=0.25)).eval()
    layer, x = net[0], 9 * torch.rand(7, 40)
    add_weight_noise(net, law, 3)
    t = torch.tanh(layer.weight.detach().double())
    quantized = (2 * torch.round(15 * (t / (2 * t.abs().max()) + 0.5)) - 15) / 15
    weight = expected(t / t.abs().max(), quantized, torch.full((24,), 2 / 15), law, 3, "0", 8)
    with quant.set_engine(engine):
        close(net(x), 0.25 * F.linear(10 / 15 * torch.round(x.double() * 1.5), weight, layer.bias.detach().double()))


@pytest.mark.parametrize("engine", ["numba", "reference"])
@pytest.mark.parametrize("law", LAWS)
def test_a_trained_convolution_by_hand(law, engine):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), Qconv2dDoreFa(6, 8, 3, stride=2, padding=1, groups=2, spec=W4)).eval()
    layer, x = net[1], 9 * torch.rand(2, 6, 9, 7)
    add_weight_noise(net, law, 11)
    t = torch.tanh(layer.weight.detach().double())
    quantized = (2 * torch.round(15 * (t / (2 * t.abs().max()) + 0.5)) - 15) / 15
    weight = expected(t / t.abs().max(), quantized, torch.full((8,), 2 / 15), law, 11, "1", 8)
    with quant.set_engine(engine):
        close(net(x), F.conv2d(10 / 15 * torch.round(x.double() * 1.5), weight, layer.bias.detach().double(), 2, 1, 1, 2))


@pytest.mark.parametrize("inputs", ["phases", "ternary", "twos", "offset"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_converted_layers_by_hand(kind, law, inputs):
    torch.manual_seed(0)
    shape = {"linear": (16, 5, 12), "convolution": (16, 4, 6, 5)}[kind]
    net, x = nn.Sequential(nn.Linear(12, 10) if kind == "linear" else nn.Conv2d(4, 6, 3, padding=1)), torch.randn(shape)
    made = convert(net, W8, x, inputs=inputs, correct="none")
    [(name, layer)] = crossbar_layers(made)
    add_weight_noise(made, law, 5)
    source, scale = net[0].weight.detach(), layer.weight_quant.scale.double()
    steps = scale.view(-1, *[1] * (source.dim() - 1))
    quantized = torch.round(source / steps.float()).clamp(-127, 127).double() * steps
    as_drawn = expected(source[:, :, None, None] if kind == "linear" else source,
                        quantized[:, :, None, None] if kind == "linear" else quantized, scale, law, 5, name, 4)
    low, high = layer.act_quant.window
    codes = torch.round(x / layer.act_quant.scale).clamp(low, high).double() * layer.act_quant.scale.double()
    bias = net[0].bias.detach().double()
    wanted = F.linear(codes, as_drawn.flatten(1), bias) if kind == "linear" else F.conv2d(codes, as_drawn, bias, padding=1)
    assert low < 0
    close(made(x), wanted)


def test_a_weight_in_several_pieces_has_the_noise_of_one(scene):  # noqa: F811
    """Layers of more bits than the others: the same numbers are drawn, on another grid."""
    torch.manual_seed(0)
    net, x = nn.Sequential(QLinearDoreFa(40, 24, spec=W4, bias=False)).eval(), 9 * torch.rand(7, 40)
    found = []
    for cell_bits in (4, 3, 1):
        quant.set_spec(net, replace(W4, cell_bits=cell_bits))
        add_weight_noise(net, 0.05, 1)
        found.append(net(x))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], (quant.program(net, None), net(x))[1])


@pytest.mark.parametrize("inputs", ["phases", "ternary", "twos", "offset"])
def test_no_noise_is_the_network_without_arrays(inputs):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)), torch.randn(8, 3, 8, 8)
    made = convert(net, W8, x, inputs=inputs)
    wanted = made(x)
    add_weight_noise(made, 0.0, 9)
    assert all(layer.chip for _, layer in crossbar_layers(made)) and torch.equal(made(x), wanted)


@pytest.mark.parametrize("groups, size", [(1, 127), (1, 128), (4, 2**15 - 1), (1, 2**15), (1, 2**20 - 1), (8, 2**20 - 1)])
def test_sums_of_weights_of_any_size_are_exact(groups, size):
    """Of one, two and three bytes, with the ends of each, against integers of 64 bits."""
    torch.manual_seed(0)
    net, codes = Qconv2dDoreFa(8, 16, 3, padding=1, groups=groups, spec=W4), torch.randint(0, 16, (2, 6, 5, 8), dtype=torch.uint8)
    ideal = net.ideal_cells()
    values = torch.randint(-size, size + 1, ideal.values.shape, dtype=torch.int32)
    values[..., 0], values[..., -1] = size, -size
    net.set_cells(quant.Cells(values, torch.zeros_like(ideal.reference), 0))
    sums, engine = ProductsOfBytes(net.mapped()), quant.engines.load("reference")
    assert len(sums.products) == 1 + (size > 127) + (size > 2**15 - 129)
    kernel = values[0].view(groups, 3, 3, 8 // groups, -1).permute(0, 4, 3, 1, 2).reshape(16, -1, 3, 3)
    wanted = F.conv2d(codes.permute(0, 3, 1, 2).double(), kernel.double(), None, 1, 1, 1, groups).permute(0, 2, 3, 1)
    assert torch.equal(sums(codes).double(), wanted) and torch.equal(sums(codes), engine.accumulate(net.mapped(), codes)[0])


# ---- what is drawn -------------------------------------------------------------------------------------------------------


def drawn(layer):
    """The noise of a layer's weights in shares of the largest weight of their channel, float64 `[rows, out]`."""
    change = (layer.cells().values - layer.ideal_cells().values).sum(0)[0].double() / 2**layer.ideal_cells().fraction_bits
    t = torch.tanh(layer.weight.detach().double())
    return change / (7.5 * t.abs().amax(1) / t.abs().max())


def test_statistics_of_gaussian_noise():
    """Four deviations of each statistic of n normal numbers: of the mean s / sqrt n, of the variance s^2 sqrt(2 / n)."""
    torch.manual_seed(0)
    net = nn.Sequential(QLinearDoreFa(1024, 256, spec=W4), QLinearDoreFa(1024, 256, spec=W4))
    net[1].weight.data.copy_(net[0].weight)
    add_weight_noise(net, 0.02, 0)
    first, other = drawn(net[0]), drawn(net[1])
    add_weight_noise(net, 0.02, 1)
    second, n = drawn(net[0]), first.numel()
    for noise in (first, other, second):
        assert abs(noise.mean()) < 4 * 0.02 / n**0.5
        assert abs(noise.var() / 0.02**2 - 1) < 4 * (2 / n) ** 0.5 + 0.0004  # and the grid's, 2^-16 / 12 of codes of 7.5 * 0.02
        assert abs((noise.abs() < 0.02).double().mean() - 0.6826895) < 4 * (0.6827 * 0.3173 / n) ** 0.5
        chi = noise.var(0) / 0.02**2 * 1023  # of each channel, 1023 degrees of freedom: of 256 none is beyond 5 deviations
        assert ((chi - 1023).abs() < 5 * (2 * 1023) ** 0.5).all()
    for one, another in ((first, other), (first, second), (first[:, :128], first[:, 128:])):
        assert abs((one * another).mean() / 0.02**2) < 4 / one.numel() ** 0.5
    add_weight_noise(net, 0.02, 0)
    assert torch.equal(drawn(net[0]), first)


@pytest.mark.parametrize("size, sigma", [(0.0, 0), (0.003, 0), (0.0034, 2.715), (0.1, 5.5828), (0.29, 8.332), (0.3, 8.377), (0.5, 8.436),
                                         (1.0, 19.19)])
def test_the_published_noise_of_phase_change_memory(size, sigma):
    """Deviations in uS of weights of some sizes, worked out by hand. Below 0.6 of 180 uS a weight is exactly zero."""
    normals = np.array([1.0, -2.0])
    for sign in (1, -1):
        found = noisy_weights(np.full(2, sign * size), "pcm", normals)
        if sigma:
            assert 180 * (found - sign * size) == pytest.approx(sigma * normals, rel=2e-3)
        else:
            assert (found == 0).all()


def test_what_is_rounded_up_is_no_larger_than_the_largest():
    found = noisy_weights(np.array([1.5]), "pcm", np.array([1.0]))
    assert found == pytest.approx(1.5 + deviation(180) / 180)


def test_a_channel_of_zeros_has_no_noise():
    net = nn.Sequential(QLinearDoreFa(8, 3, spec=W4))
    net[0].weight.data[1] = 0
    for law in (0.1, "pcm"):
        add_weight_noise(net, law)
        change = (net[0].cells().values - net[0].ideal_cells().values)[0, 0]
        assert not change[:, 1].any() and change[:, 0].any() and change[:, 2].any()


def test_the_largest_weight_is_that_of_codes_in_its_place():
    net = nn.Sequential(QLinearDoreFa(400, 1, spec=W4))
    net[0].set_codes(torch.cat([torch.full((1, 200, 1, 1), 9), torch.full((1, 200, 1, 1), 6)], 1).byte())  # 3/15 and -3/15
    add_weight_noise(net, 0.1)
    change = (net[0].cells().values - net[0].ideal_cells().values).double() / 2**8
    assert abs(change.var() / (1.5 * 0.1) ** 2 - 1) < 4 * (2 / 400) ** 0.5


@pytest.mark.parametrize("spec, noise, seed, words", [
    (replace(W4, adc_range="full"), 0.1, 0, "adc_range is 'full' with noise on the weights"), (W4, "rram", 0, "noise is 'rram'"),
    (replace(W4, weights="pair"), 0.1, 0, "weights is 'pair' with noise on the weights"), (W4, 1.5, 0, "noise is 1.5; allowed is a share"),
    (W4, float("nan"), 0, "noise is nan"), (W4, True, 0, "noise is True"), (W4, 0.1, -1, "seed is -1"), (W4, 0.1, 0.5, "seed is 0.5")])
def test_noise_that_cannot_be_changes_nothing(spec, noise, seed, words):
    net = nn.Sequential(QLinearDoreFa(8, 3, spec=W4), QLinearDoreFa(3, 3, spec=spec))
    with pytest.raises(ValueError, match=re.escape(words)):
        add_weight_noise(net, noise, seed)
    assert not any(layer.chip for layer in net)


# ---- settings ------------------------------------------------------------------------------------------------------------


def test_a_setting_has_each_weight_in_one_piece():
    noisy = Setting(W8, chips=WeightNoise(0.02, chips=3, chip_seed=4))
    assert noisy == Setting(CrossbarSpec(8, 8, adc_bits=3, adc_range="ideal"), chips=WeightNoise(0.02, chips=3, chip_seed=4))
    assert str(noisy) == "noise of 2 % on weights (no cells), no ADC" and noisy.without_cells and not Setting().without_cells
    assert noisy.text(without="weight_noise") == "noise on weights (no cells), no ADC"
    assert [(each.chips.chips, each.chips.chip_seed) for each in noisy.one_by_one] == [(1, 4), (1, 5), (1, 6)]
    assert str(Setting(W8, "conv", chips=WeightNoise("pcm"))) == "PCM noise on weights (no cells), no ADC, conv layers only"


@pytest.mark.parametrize("spec, per_layer, words", [
    (CrossbarSpec(8, 8), (), "adc_range is 'calibrated' with weight_noise, which is on weights without cells and ADCs; allowed is 'ideal'"),
    (replace(W8, cell_bits=2), (), "cell_bits is 2 with weight_noise, which is on weights without cells and ADCs; allowed is 8"),
    (replace(W8, weights="pair"), (), "weights is 'pair'"), (replace(W8, rows=64), (), "rows is 64"),
    (replace(W8, dac_bits=2), (), "dac_bits is"), (replace(W8, reference="digital"), (), "reference is 'digital'"),
    (replace(W8, mapping="im2col"), (), "mapping is 'im2col'"),
    (W8, {"a": {"adc_bits": 3}}, "per_layer is given with weight_noise")])
def test_hardware_of_cells_is_refused(spec, per_layer, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Setting(spec, chips=WeightNoise(0.02), per_layer=per_layer)


@pytest.mark.parametrize("values, words", [
    ({}, "weight_noise is None; allowed is a share from 0 to 1, or pcm"), ({"weight_noise": 2.0}, "weight_noise is 2.0"),
    ({"weight_noise": "rram"}, "weight_noise is 'rram'"), ({"weight_noise": 0.1, "chips": 0}, "chips is 0")])
def test_noise_of_a_setting_that_cannot_be(values, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        WeightNoise(**values)


def test_chips_of_a_measurement_are_networks_with_noise(scene):  # noqa: F811
    net, images, labels, _ = scene
    record = measure(net, images, labels, Setting(CrossbarSpec(adc_range="ideal"), chips=WeightNoise(0.2, chips=3, chip_seed=2)))
    assert record.mean_bits is None and all(layer.chip is None for _, layer in crossbar_layers(net))
    for seed, found in zip((2, 3, 4), record.chip_predictions):
        add_weight_noise(net, 0.2, seed)
        assert torch.equal(found, classes(net, images))
    assert len({*map(tuple, record.chip_predictions.tolist())}) == 3
    right = [100 * float((found == labels).double().mean()) for found in record.chip_predictions]
    assert record.chip_accuracies == pytest.approx(right) and record.accuracy == pytest.approx(sum(right) / 3)
    quant.program(net, None)
    none = measure(net, images, labels, Setting(CrossbarSpec(adc_range="ideal"), chips=WeightNoise(0.0)))
    assert none.changed_predictions == 0 and torch.equal(none.predictions, classes(net, images))


def test_layers_that_are_left_out_have_no_noise(scene):  # noqa: F811
    net, images, labels, _ = scene
    record = measure(net, images, labels, Setting(CrossbarSpec(adc_range="ideal"), "conv", chips=WeightNoise(0.3)))
    add_weight_noise(net, 0.3)
    for layer in net.modules():
        if isinstance(layer, QLinearDoreFa):
            layer.set_cells(None)
    assert torch.equal(record.predictions, classes(net, images))


def test_keys_of_noise():
    noisy = Setting(CrossbarSpec(adc_range="ideal"), chips=WeightNoise(0.02, chips=2))
    assert keys.parts_of(noisy) == ["chips", "weight_noise"]
    assert keys.of_setting(noisy)["chips"] == {"weight_noise": 0.02, "chips": 2, "chip_seed": 0}
    on_device = keys.of_setting(Setting(chips=Chips(device=Device("noisy", "invented", 1.0, 31.0))))["chips"]
    assert "weight_noise" not in on_device  # keys of older points stay


# ---- eval.py -------------------------------------------------------------------------------------------------------------


def test_rows_of_noise_beside_those_of_cells(run, checkpoint):  # noqa: F811
    records, _, text = run(checkpoint, "--cell_bits", "2", "--adc_bits", "4", "--chips", "2", "--chip_seed", "3", "--device", "techA",
                           "--also", "--weight_noise 0 0.2 pcm")
    software, cells, *noisy = records
    table = text[text.index("setting   "):]
    for law in ("noise of 0 %", "noise of 20 %", "PCM noise"):
        assert re.search(rf"^{law} on weights \(no cells\), no ", table, re.M), table
    assert "with a device and noise on the weights: mean, deviation and lowest of 2 chips" in table
    assert software["weight_noise"] is cells["weight_noise"] is None and [row["weight_noise"] for row in noisy] == [0.0, 0.2, "pcm"]
    for row in noisy:
        assert (row["chips"], row["chip_seed"], len(row["chip_accuracies"])) == (2, 3, 2) and row["map"] == "all"
        assert not any(row[name] is not None for name in (
            "cell_bits", "adc_bits", "rows", "adc_range", "weights", "device", "device_time_s", "stuck_on", "read_noise", "adc_noise",
            "wire_ohm", "access", "mean_bits", "calib_on"))
        assert _baseline(row) is None
    assert _baseline(software) == "software"
    none, some, _ = noisy
    assert none["changed_predictions"] == 0 and none["accuracy"] == pytest.approx(software["accuracy"]) and none["accuracy_std"] == 0
    assert re.search(r"^noise of 0 % .* 17.50 +0.00 +17.50 +\+0.00 +0 ", table, re.M)
    assert {path.name for path in Path("prob").glob("*")} == {"vgg7_quant_eval_w4_c2"}


def evaluate(checkpoint, *flags):  # noqa: F811
    return evaluation.main(["--resume", checkpoint, "--ngpu", "0", "--limit", "40", *flags])


def test_noise_alone_its_picture_and_its_points(checkpoint, monkeypatch, capsys):  # noqa: F811
    curves, draw = {}, report.sweep_plot
    monkeypatch.setattr(report, "sweep_plot", lambda found, name, *args: (curves.update({name: found}), draw(found, name, *args)))
    flags = ["--weight_noise", "0.1:0.3:0.1", "pcm", "--chips", "2", "--html"]
    assert evaluate(checkpoint, *flags, "--dry_run") == 0
    assert "to measure  noise of 20 % on weights (no cells), no ADC, chip 0 to 1" in capsys.readouterr().out
    assert evaluate(checkpoint, *flags) == 0
    assert [*curves] == ["weight_noise"]
    [(curve, points)] = curves["weight_noise"].items()
    assert curve == "noise on weights (no cells), no ADC" and [x for x, _ in points] == pytest.approx([0.1, 0.2, 0.3])
    assert Path("save/accuracy_over_weight_noise.png").read_bytes().startswith(b"\x89PNG")
    assert "all settings: no ADC" in capsys.readouterr().out and not [*Path("prob").rglob("*.pt")]  # there are no cells to write
    row = json.loads(Path("save/results.jsonl").read_text().splitlines()[1])
    assert row["n_images"] == 40 and len(list(Path("save/points/chips").glob("*.json"))) == 8
    assert evaluate(checkpoint, *flags, "--adc_range", "ideal") == 0 and "all are measured already" in capsys.readouterr().out
    images, _ = shown_images(40)
    net = evaluation.Bench(*parse_all(["--resume", checkpoint, "--ngpu", "0", "--weight_noise", "0.1"])[0]).net.eval()
    quant.set_spec(net, W4)
    add_weight_noise(net, 0.1, 0)
    changed = int((classes(net, images) != (quant.program(net, None), classes(net, images))[1]).sum())
    assert row["chip_changed_predictions"][0] == changed > 0


def test_a_search_among_shares(trained, capsys):  # noqa: F811
    pytest.importorskip("optuna")
    flags = ["--weight_noise", "0", "0.1", "0.3", "pcm", "--chips", "2", "--search", "3"]
    assert evaluate(trained, *flags, "--objective", "changed") == 0
    assert "none of" not in capsys.readouterr().out and len(Path("save/search.csv").read_text().splitlines()) == 4
    with pytest.raises(UserError, match="has no bits, which needs settings with an ADC"):
        evaluate(trained, *flags)


NETWORK_OF_OTHERS = """
import torch
def made():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
"""


def test_noise_of_a_network_that_is_converted():
    Path("net.py").write_text(NETWORK_OF_OTHERS)
    flags = ["--model", "net.py:made", "--dataset", "digits", "--limit", "30", "--ngpu", "0", "--weight_noise", "0", "0.05", "--chips", "2"]
    assert evaluation.main([*flags, "--save_path", "out"]) == 0
    rows = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert [row["weight_noise"] for row in rows[-2:]] == [0.0, 0.05] and rows[-2]["changed_predictions"] == 0


@pytest.mark.parametrize("flags, words", [
    (["--weight_noise", "2"], "--weight_noise: 2 is not a share from 0 to 1, or pcm"),
    (["--weight_noise", "rram"], "--weight_noise: rram is not a share from 0 to 1, or pcm"),
    (["--weight_noise", "0.1", "--device", "techA"], "--weight_noise 0.1 is on weights without cells, and --device techA is of cells"),
    *[(["--weight_noise", "0.1", f"--{name}", value], f"--{name} is for cells and ADCs, and --weight_noise is on weights without them")
      for name, value in (("cell_bits", "1"), ("adc_bits", "6"), ("rows", "64"), ("weights", "pair"), ("adc_range", "full"),
                          ("dac_bits", "2"), ("per_layer", "features.4:rows=8"))],
    (["--weight_noise", "0.1", "--adc_noise", "1"], "--weight_noise 0.1 is on weights without cells, and --adc_noise 1.0 is of cells"),
    (["--weight_noise", "0.1", "--noise_seed", "1"], "--noise_seed is for the cells of a device"),
    (["--weight_noise", "0.1", "--save_cells"], "--save_cells is for the cells of a device"),
    (["--weight_noise", "0.1", "--calib_on", "chip"], "--calib_on is for"),
    (["--weight_noise", "0.1", "--report"], "--report describes frozen ranges"),
    (["--weight_noise", "0.1", "--planes", "x"], "--planes holds cells, and --weight_noise is on weights without them"),
    (["--also", "--weight_noise 0.1 --rows 8"], "--rows is for cells and ADCs")])
def test_bad_input_is_one_line(flags, words, checkpoint):  # noqa: F811
    with pytest.raises(UserError, match=re.escape(words)) as found:
        parse_all(["--resume", checkpoint, *flags])
    assert "\n" not in str(found.value)
