"""Networks of any code on crossbars: what is bound, what the numbers are (against float64 and int64 written out here), and traps."""

import copy
import importlib
import io
import itertools
import pickle
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from models.quant import (CrossbarSpec, Device, QLinearDoreFa, Wires, add_weight_noise, calibrate, convert, crossbar_layers, image_numbers,
                          program, set_engine, set_spec)
from models.quant.arrays import adc
from models.quant.arrays.plans import Plan
from models.quant.layers.batches import First
from models.quant.network.cell_files import read_cells, write_cells
from models.quant.arrays.cells import Cells
from models.quant.conversion.binding import Bound
from models.quant.conversion.encodings import ENCODINGS
from models.quant.conversion.layer import ConvertedLayer
from models.quant.conversion.report import ConversionReport
from models.quant.layers.batches import first_tensor
from models.quant.conversion.tracing import SAMPLE, sampled
from models.quant.cost import count
from models.quant.cost.events import events
from models.quant.network.modes import without_adc
from models.quant.measuring.measure import measure
from models.quant.measuring.placing import put
from models.quant.measuring.setting import Setting

pytestmark = pytest.mark.usefixtures("plain_engine")
convert_module = importlib.import_module("models.quant.conversion.convert")  # the package has the function of this name
W8A8 = CrossbarSpec(8, 8, adc_range="ideal")


@pytest.fixture
def plain_engine():
    """Engines are compared elsewhere; here the one that compiles nothing."""
    with set_engine("reference"):
        yield


def seeded(shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Small(nn.Module):
    """A signed image, batch norm behind ReLU, a residual sum in place, a depthwise layer, GELU, a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(F.relu(self.stem(x), inplace=True))
        y = self.depthwise(x)
        y += x
        return self.head(F.gelu(y).mean((2, 3)))


def of(net, name):
    return dict(crossbar_layers(net))[f"{name}.crossbar"]


def expected(layer, x, bias=None):
    """What one converted layer computes without an ADC, in float64 from its weight and scales alone."""
    s_w, s_a, form = layer.weight_quant.scale.double(), layer.act_quant.scale.double(), layer.form
    most = 2 ** (layer.weight_quant.wbit - 1) - 1
    weight = (layer.weight.float() / layer.weight_quant.scale.view(-1, 1, 1, 1)).round().clamp(-most, most).double()
    codes = (form.images(x).double() / s_a).round().clamp(*layer.act_quant.window).permute(0, 3, 1, 2)
    top, bottom, left, right = form.geometry.padding
    total = F.conv2d(F.pad(codes, (left, right, top, bottom)), weight, None, form.geometry.stride, 0, form.geometry.dilation,
                     form.groups).permute(0, 2, 3, 1)
    y = layer.quant_gain.double() * (total * s_w * s_a + (0 if bias is None else bias.double())) + layer.quant_offset.double()
    return form.outputs(y, x)


# ---- arithmetic --------------------------------------------------------------------------------------------------------


MODULES = {
    "linear": (nn.Linear(20, 6), (4, 20)), "tokens": (nn.Linear(20, 6), (2, 3, 5, 20)), "one vector": (nn.Linear(20, 6), (20,)),
    "conv1d": (nn.Conv1d(6, 8, 5, stride=2, padding=2, groups=2), (3, 6, 17)),
    "conv2d": (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), (3, 6, 11, 9)),
    "same rows": (nn.Conv2d(4, 5, (4, 3), padding="same", bias=False), (2, 4, 7, 7)),
    "same columns": (nn.Conv2d(4, 5, (3, 4), padding="same", bias=False), (2, 4, 7, 7)),
    "reflect": (nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "unbatched": (nn.Conv2d(4, 5, 3), (4, 7, 7)),
    "conv3d": (nn.Conv3d(4, 6, (2, 3, 2), stride=(2, 1, 2), padding=(1, 1, 0), dilation=(2, 1, 1), groups=2), (2, 4, 7, 6, 6)),
    "transposed1d": (nn.ConvTranspose1d(6, 4, 4, stride=3, padding=1, output_padding=1, groups=2), (2, 6, 7)),
    "transposed2d": (nn.ConvTranspose2d(6, 4, (3, 2), stride=2, padding=(1, 0), output_padding=1, dilation=(1, 2)), (2, 6, 5, 4)),
    "transposed cut": (nn.ConvTranspose2d(3, 4, 1, padding=1), (2, 3, 5, 4)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("signed", [True, False])
def test_every_kind_of_product(name, signed):
    module, shape = copy.deepcopy(MODULES[name][0]).eval(), MODULES[name][1]
    x = seeded(shape, 1) if signed else seeded(shape, 1).abs()
    images = x[None] if name in ("one vector", "unbatched") else x
    with torch.no_grad():
        wanted = module(x)
        bound = convert(module, None, images)
        assert torch.equal(bound(x), wanted) or torch.allclose(bound(x), wanted, atol=1e-5)
        net = convert(module, W8A8, images, correct="none", first_last_bits=None)
        [(_, layer)] = crossbar_layers(net)
        assert layer.act_quant.signed == signed
        if name != "reflect":  # which pads before the product
            torch.testing.assert_close(net(x), expected(layer, x, module.bias).float(), rtol=1e-5, atol=1e-5)
        assert (net(x) - wanted).square().mean() < 1e-3 * wanted.square().mean()


@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("mapping", ["tap", "im2col"])
def test_a_lossless_adc_changes_nothing_in_any_encoding(reference, mapping):
    x, found = seeded((4, 3, 6, 6)), []
    for inputs in ENCODINGS:
        for adc_range in ("full", "ideal"):
            spec = CrossbarSpec(4, 4, cell_bits=2, adc_bits=12, rows=16, adc_range=adc_range, reference=reference, mapping=mapping)
            net = convert(Small(), spec, x, inputs=inputs, activations="max", first_last_bits=None, correct="none")
            for _, layer in crossbar_layers(net):  # the same codes in all encodings
                if layer.act_quant.signed:
                    layer.act_quant._set(0.5, -7, 7)
                    layer.set_spec(spec)
            found.append(net(x))
    for y in found[1:]:
        assert torch.equal(y, found[0])


@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("rule", ["minmax", "percentile"])
def test_an_adc_of_enough_codes_is_exact_for_ternary_inputs_too(rule, reference):
    """Its steps are whole levels, never part of one, which would have room in its range."""
    model, x = nn.Linear(12, 5), seeded((6, 12))
    spec = CrossbarSpec(4, 4, cell_bits=2, rows=16, adc_bits=5, reference=reference)
    net = convert(model, spec, x, inputs="ternary", first_last_bits=None, correct="none")
    layer = net.crossbar
    calibrate(net, x, rule=rule, correct=None)
    assert (layer.adc_delta >= 1).all() and (layer.adc_delta == 1).any()
    set_spec(net, replace(spec, adc_bits=8))
    calibrate(net, x, rule="minmax", correct=None)
    y = net(x)
    set_spec(net, replace(spec, adc_range="ideal"))
    assert torch.equal(y, net(x))


@pytest.mark.parametrize("weights, reference", [("offset", "analog"), ("offset", "digital"), ("pair", "analog")])
@pytest.mark.parametrize("inputs", ENCODINGS)
def test_what_an_adc_sees_of_signed_inputs(inputs, weights, reference):
    """Every read of every array of a linear layer, in integers, as the encodings' equations say."""
    torch.manual_seed(6)
    model, x = nn.Linear(11, 4), seeded((5, 11), 7)
    spec = CrossbarSpec(4, 4, cell_bits=2, adc_bits=3, rows=4, reference=reference, weights=weights)
    net = convert(model, spec, x, inputs=inputs, first_last_bits=None, correct="none", activations="max")
    [(_, layer)] = crossbar_layers(net)
    slices = len(layer.slice_bits)
    deltas = [1.5, 2.0][:slices]
    layer.set_ranges([(delta, -3) for delta in deltas])
    for name, values in (("quant_gain", [1.1, 0.9, 1.0, 1.2]), ("quant_offset", [0.3, -0.2, 0.0, 0.1]),
                         ("adc_gain", [0.8, 1.3, 1.1, 0.7]), ("adc_offset", [-0.4, 0.2, 0.5, 0.0])):
        setattr(layer, name, torch.tensor(values))
    lo, hi = layer.act_quant.window
    a = (x / layer.act_quant.scale).round().clamp(lo, hi).long()
    w = layer.w_codes()[:, :, 0, 0].T.long() - 7  # signed, -7 .. 7
    phases = {"phases": [(a.clamp_min(0), 1), ((-a).clamp_min(0), -1)], "ternary": [(a, 1)], "twos": [(a % 16, 1)],
              "offset": [(a - lo, 1)]}[inputs]
    total = torch.zeros(5, 4, dtype=torch.float64)
    for codes, sign in phases:
        for z in range(4):
            digit = codes.abs() // 2**z % 2 * codes.sign()
            place = sign * 2**z * (-1 if inputs == "twos" and z == 3 else 1)
            for k in range(slices):
                cells = w.sign() * (w.abs() // 4**k % 4) if weights == "pair" else (w + 7) // 4**k % 4
                level = 0 if weights == "pair" else 7 // 4**k % 4
                for start in range(0, 11, 4):
                    part = digit[:, start:start + 4]
                    p, n = part @ cells[start:start + 4], part.sum(1, keepdim=True)
                    v = (p if reference == "digital" else p - level * n).double()
                    q = (v / deltas[k]).round().clamp(-3, 4)
                    total += place * 4**k * (q * deltas[k] - (level * n if reference == "digital" else 0))
    if inputs == "offset":
        total += lo * w.sum(0)
    expected = total * layer.act_quant.scale.double() * layer.weight_quant.scale.double() + model.bias.double()
    expected = layer.adc_gain * (layer.quant_gain * expected + layer.quant_offset) + layer.adc_offset
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("plan", ["uniform", "significance"])
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("idle", ["convert", "skip"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_each_digit_in_twos_complement_has_the_offsets_of_its_converters_once(reference, idle, bits, plan):
    """Reads without word lines give a converter's offset too, unless they are skipped: the top digit is taken off, and no other."""
    torch.manual_seed(6)
    x = seeded((5, 11), 7) - 2 * (bits == 1)
    spec = CrossbarSpec(4, bits, cell_bits=2, adc_bits=3, rows=4, reference=reference, adc_idle=idle, adc_plan=plan)
    net = convert(nn.Linear(11, 4, bias=False), spec, x, inputs="twos", first_last_bits=None, correct="none")
    program(net, Device("none", "", 0.0, 30.0), 0, adc_offset=2.0)
    [(_, layer)] = crossbar_layers(net)
    lo, hi = layer.act_quant.window
    assert lo == -2 ** (bits - 1)
    ranges = np.array([[0.75 + z + k / 2 for k in range(2)] for z in range(bits)])
    if plan == "uniform":
        ranges[:] = ranges[0]
        layer.set_ranges([(delta, -3) for delta in ranges[0]])
    else:
        layer.set_plan(Plan(np.full((bits, 2), 3), ranges, np.full((bits, 2), -3)))
    a = (x / layer.act_quant.scale).round().clamp(lo, hi).long() % 2**bits
    offsets = layer.chip.readout.offset[:, 0] / 2**8  # [slices, arrays, out]
    total = torch.zeros(5, 4, dtype=torch.float64)
    for z, k, t in itertools.product(range(bits), range(2), range(3)):
        digit = a[:, 4 * t:4 * t + 4] // 2**z % 2
        p = digit @ (layer.w_codes()[:, 4 * t:4 * t + 4, 0, 0].T.long() // 4**k % 4)
        referred = (7 // 4**k % 4) * digit.sum(1, keepdim=True)
        q = ((p - (referred if reference == "analog" else 0) + offsets[k, t]) / ranges[z, k]).double().round().clamp(-3, 4) * ranges[z, k]
        q = torch.where(digit.any(1, keepdim=True) | (idle == "convert"), q, 0.0)
        total += (-1 if z == bits - 1 else 1) * 2**z * 4**k * (q - (referred if reference == "digital" else 0))
    expected = total * layer.act_quant.scale.double() * layer.weight_quant.scale.double()
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inputs", ENCODINGS)
def test_costs_count_what_word_lines_see(inputs):
    x = seeded((5, 11), 7)
    net = convert(nn.Linear(11, 4), CrossbarSpec(4, 4, rows=4), x, inputs=inputs, first_last_bits=None)
    [(name, layer)] = crossbar_layers(net)
    lo, hi = layer.act_quant.window
    a = (x / layer.act_quant.scale).round().clamp(lo, hi).long()
    pulses = {"phases": [a.clamp_min(0), (-a).clamp_min(0)], "ternary": [a.abs()], "twos": [a % 16], "offset": [a - lo]}[inputs]
    expected = [[sum((codes[:, row] // 2**bit % 2).sum().item() for codes in pulses) for row in range(11)]
                for bit in range(layer.spec.a_bits)]
    found = count(net, x).layers[name]
    assert found.ones[:, 0].tolist() == expected and found.pixels == 5 * len(pulses)
    assert found.multiplications == 5 * layer.weight.numel() and found.inputs == 11  # of an image
    assert events(found, layer, 128, 8).buffer_bits == (found.pixels * 11 + 5 * 4) * layer.spec.a_bits


@pytest.mark.parametrize("signed", [False, True])
def test_images_in_any_order_of_memory(signed):
    """Kernels take codes channels last; images come in PyTorch's order, and in others."""
    torch.manual_seed(0)
    x = torch.randn(6, 20, 7, 7) if signed else torch.rand(6, 20, 7, 7)
    net = convert(nn.Sequential(nn.Conv2d(20, 8, 3)), CrossbarSpec(4, 4, adc_bits=3), x, first_last_bits=None)
    expected = net(x)
    for ordered in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        for engine in ("numba", "reference"):
            with set_engine(engine):
                assert torch.equal(net(ordered), expected), engine


def test_correction_gives_the_float_channels_mean_and_deviation():
    x = seeded((32, 3, 6, 6))
    float_net, stats = Small().eval(), []
    net = convert(float_net, CrossbarSpec(3, 3, adc_range="ideal"), x, first_last_bits=None)
    for model, layer in ((float_net, float_net.depthwise), (net, of(net, "depthwise"))):
        hook = layer.register_forward_hook(lambda module, inputs, y: stats.append((y.mean((0, 2, 3)), y.std((0, 2, 3)))))
        with torch.no_grad():
            model(x)
        hook.remove()
    torch.testing.assert_close(stats[0], stats[1], rtol=2e-3, atol=2e-3)


def test_report_says_what_is_measured():
    x = seeded((8, 3, 6, 6))
    net, model = convert(Small(), CrossbarSpec(8, 8, adc_bits=8, rows=4, mapping="im2col"), x), Small().eval()
    report = net.crossbar_report
    multiplications = 8 * (36 * 8 * 27 + 36 * 8 * 9 + 8 * 5)
    assert sum(layer["multiplications"] for layer in report.layers) == multiplications and report.share == 1
    assert [layer["weights"] for layer in report.layers] == [216, 72, 40]
    assert [layer["row_blocks"] for layer in report.layers] == [7, 8 * 3, 2]
    assert report.layers[1]["fill"] == 9 / 3 / 4
    assert convert(nn.Linear(6, 4), W8A8, seeded((8, 6))).crossbar_report.layers[0]["fill"] == 6 / 128
    with torch.no_grad():
        wanted = model(x).double()
        error = (net(x).double() - wanted).square().sum()
        assert report.same_top1["hardware"] == (net(x).argmax(1) == wanted.argmax(1)).double().mean()
    assert report.sqnr_db["hardware"] == pytest.approx(10 * torch.log10(wanted.square().sum() / error).item())
    assert "3 layers with 328 weights on crossbars: 100.0 %" in str(report)
    assert "33 row blocks, 81 % of their rows in use" in str(report)  # (27 / 4 + 24 * 3 / 4 + 2) / 33
    first, second, *answers = str(report).splitlines()
    assert report.text(row_blocks=False).splitlines() == [first, *answers] and report.text(answers=False) == f"{first}\n{second}"
    layers = [{"name": name, "weights": 1, "multiplications": 1, "row_blocks": 1, "fill": 1, "quantization_db": None, "hardware_db": db}
              for name, db in (("exact", None), ("bad", 12.0), ("good", 40.0))]
    report = ConversionReport({}, 0, [], layers=layers, same_top1={"quantized": 1, "hardware": 1}, has_adcs=True,
                              sqnr_db={"quantized": None, "hardware": None})
    assert str(report).endswith("worst layer: bad, exact quantized, 12.0 dB with its ADC")


@pytest.mark.parametrize("spec, ways", [
    (CrossbarSpec(8, 8, adc_range="ideal"), ["convolution of bytes", "matrix product of bytes"]),
    (CrossbarSpec(8, 8, adc_bits=12, rows=4), ["convolution of bytes", "matrix product of bytes"]),  # lossless
    (CrossbarSpec(4, 4, adc_bits=1, rows=100, adc_range="full"), ["output pixels side by side", "bit planes"])])
def test_report_names_the_way_of_each_layer(spec, ways):
    """Of a convolution of eight outputs and of a linear layer; others where the processor lacks an instruction, or is faster by them."""
    pytest.importorskip("numba")
    with set_engine("numba"):
        net = convert(Small(), spec, seeded((8, 3, 6, 6)), first_last_bits=None)
    for layer, way in zip(net.crossbar_report.layers[::2], ways):
        others = ("bit planes",) if spec.adc_bits == 1 else ("convolution of bytes", "float32 convolution")
        assert layer["way"] in {f"numba: {name}" for name in (way, *others)}
        assert f"{layer['way']} (" in str(net.crossbar_report)
    assert {layer["way"] for layer in convert(Small(), spec, seeded((8, 3, 6, 6))).crossbar_report.layers} == {"reference"}


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_classes_of_pixels(conv):
    torch.manual_seed(0)
    size = (32, 1) + (7,) * (conv(1, 1, 1).weight.dim() - 2)
    net, x = nn.Sequential(conv(1, 6, 3), nn.ReLU(), conv(6, 4, 1)), seeded(size)
    converted = convert(net, CrossbarSpec(8, 8, adc_bits=1), x)
    same = (converted(x).argmax(1) == net(x).argmax(1)).double().mean().item()
    assert converted.crossbar_report.same_top1["hardware"] == same < 1


def test_one_number_is_no_class():
    net, x = convert(nn.Linear(8, 1), CrossbarSpec(8, 8, adc_bits=1), seeded((64, 8))), seeded((64, 8))
    assert net.crossbar_report.same_top1 == {} and "classified" not in str(net.crossbar_report)
    with pytest.raises(ValueError, match="outputs .* have one class, so there is nothing to choose; give a metric"):
        measure(net, x, torch.zeros(64, dtype=torch.long), Setting(CrossbarSpec(8, 8, adc_bits=1)))


def test_outputs_that_the_report_compares():
    """Logits of a network that returns more; the classes of each pixel."""
    ids, aux, logits = torch.zeros(2, dtype=torch.long), torch.zeros(2, 3), torch.ones(2, 3)
    for y in (logits, {"aux": aux, "logits": logits}, SimpleNamespace(logits=logits), (ids, logits, aux)):
        assert first_tensor(y) is logits
    model, x = nn.Conv2d(3, 4, 3), seeded((2, 3, 6, 6))
    net = convert(model, CrossbarSpec(2, 2, adc_range="ideal"), x, first_last_bits=None)
    with torch.no_grad():
        assert net.crossbar_report.same_top1["quantized"] == (net(x).argmax(1) == model(x).argmax(1)).double().mean() < 1


@pytest.mark.parametrize("options", [dict(), dict(rounding="gptq"), dict(weight_scale="max", activations="max"), dict(inputs="offset")])
def test_options_keep_the_networks_answers(options):
    x = seeded((16, 3, 6, 6))
    net = convert(Small(), W8A8, x, **options)
    assert net.crossbar_report.sqnr_db["quantized"] > 28


def test_rounding_to_its_inputs_loses_less():
    x = seeded((64, 24)) @ seeded((24, 24), 1)  # correlated
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    errors = []
    for rounding in ("nearest", "gptq"):
        net = convert(model, CrossbarSpec(3, 8, adc_range="ideal"), x, rounding=rounding, first_last_bits=None, correct="none")
        errors.append((net(x) - model(x)).square().mean().item())
    assert errors[1] < 0.7 * errors[0]


def test_rounding_does_not_depend_on_how_a_product_is_written():
    """A matrix that is turned, a kernel of one dimension; and it leaves what cannot be written into one weight."""
    x, w, spec = seeded((16, 6, 9)), seeded((4, 6, 3), 1), CrossbarSpec(3, 8, adc_range="ideal")
    pairs = [(lambda s, x: F.linear(x, s.w), x.mT, w[:, :, 0]), (lambda s, x: x @ s.w, x.mT, w[:, :, 0].T)], [
        (lambda s, x: F.conv1d(x, s.w), x, w), (lambda s, x: F.conv2d(x[..., None], s.w)[..., 0], x, w[..., None])]
    for pair in pairs:
        one, other = (convert(Of(function, w=nn.Parameter(weight.clone())), spec, images, rounding="gptq", first_last_bits=None)(images)
                      for function, images, weight in pair)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for model, images, count_ in ((nn.Conv3d(2, 3, 2), seeded((4, 2, 5, 5, 5)), 1), (nn.ConvTranspose2d(2, 3, 2), seeded((4, 2, 5, 5)), 1),
                                  (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), seeded((3, 5, 8)), 3)):
        notes = convert(model, spec, images, rounding="gptq").crossbar_report.notes
        assert len(notes) == count_ and all("rounded to nearest, as GPTQ's result" in note for note in notes)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_what_corrections_and_the_report_compare_with_is_the_float_network(rounding):
    """Not one whose weights are rounded: each channel has its mean and deviation, and each layer's error is from its product."""
    x = seeded((64, 24)) @ seeded((24, 24), 1)
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    net = convert(model, CrossbarSpec(2, 8, adc_range="ideal"), x, rounding=rounding, first_last_bits=None)
    with torch.no_grad():
        for end in (1, 3):
            wanted, found = model[:end](x), net[:end](x)
            for got, aim in zip(torch.std_mean(found, 0, correction=0), torch.std_mean(wanted, 0, correction=0)):
                assert torch.allclose(got, aim, rtol=1e-3, atol=1e-3)
            assert (found - wanted).square().mean() > 0.01 * wanted.square().mean()  # 2 bits change more than rounding errors
        shown = x[:convert_module.REPORT_IMAGES]
        error = 10 * torch.log10(model[0](shown).square().sum() / (net[0](shown) - model[0](shown)).square().sum())
    assert net.crossbar_report.layers[0]["quantization_db"] == pytest.approx(error.item(), abs=0.01)
    again = [layer.weight.clone() for _, layer in crossbar_layers(net)]  # the report left what was rounded
    assert rounding == "nearest" or all((w / layer.weight_quant.scale.view(-1, 1, 1, 1)).frac().abs().max() < 1e-5 for w, (_, layer) in
                                        zip(again, crossbar_layers(net)))


def test_a_weight_that_is_looked_up_as_well_is_rounded_to_nearest():
    net = Of(lambda s, x: F.linear(x, s.w) + (x * s.w).sum(1, keepdim=True), w=nn.Parameter(seeded((1, 5))))
    assert "rounded to nearest" in "".join(convert(net, W8A8, seeded((7, 5)), rounding="gptq").crossbar_report.notes)


def test_bits_of_layers():
    x = seeded((4, 3, 6, 6))
    net = convert(Small(), CrossbarSpec(4, 3, adc_range="ideal"), x)
    assert [layer["bits"] for layer in net.crossbar_report.layers] == [[8, 8], [4, 3], [8, 8]]
    net = convert(Small(), CrossbarSpec(4, 3, adc_range="ideal"), x, first_last_bits=None, specs={"dep*": CrossbarSpec(5, 6)})
    assert [layer["bits"] for layer in net.crossbar_report.layers] == [[4, 3], [5, 6], [4, 3]]
    net = convert(Small(), CrossbarSpec(4, 3, adc_range="ideal"), x, skip=["stem"])  # it stays the first layer
    assert [layer["bits"] for layer in net.crossbar_report.layers] == [[4, 3], [8, 8]]
    net = convert(Small(), CrossbarSpec(4, 4, cell_bits=4, dac_bits=4, adc_range="ideal"), x, first_last_bits=2)
    assert [layer["bits"] for layer in net.crossbar_report.layers] == [[2, 2], [4, 4], [2, 2]]


def test_several_batches_are_one_set_of_images():
    """Extremes are those of all of them, wherever they stand; the report counts the products of the first."""
    x = torch.cat([3 * seeded((20, 6)), seeded((60, 6), 1)])
    scales = set()
    for images, first in (([x], 80), (x, 64), (x.flip(0), 64), (x.split((20, 60)), 20)):
        net = convert(nn.Linear(6, 4), W8A8, images, activations="max", correct="none")
        scales |= {layer.act_quant.scale.item() for _, layer in crossbar_layers(net)}
        assert net.crossbar_report.layers[0]["multiplications"] == first * 24
    assert len(scales) == 1


@pytest.mark.parametrize("outer", [
    lambda y: y.mT @ y, lambda y: torch.bmm(y.mT, y), lambda y: torch.baddbmm(torch.zeros(3, 4, 4), y.mT, y),
    lambda y: torch.einsum("ntc, ntd -> ncd", y, y), lambda y: torch.einsum("...tc,...td->...dc", y, y),
    lambda y: torch.einsum("ntc->nct", y) @ y, lambda y: torch.stack([torch.einsum("tc,td", each, each) for each in y]),
    lambda y: torch.stack([F.linear(each.T, each.T) for each in y]), lambda y: torch.stack([torch.inner(each.T, each.T) for each in y]),
    lambda y: torch.stack([torch.addmm(torch.ones(4), each.T, each) for each in y]),
    lambda y: torch.stack([torch.mv(each.T, column) for each in y for column in each.T]),
    lambda y: torch.stack([torch.tensordot(each, each, ([0], [0])) for each in y]),
    lambda y: torch.stack([F.conv1d(each.T[:, :, None], each.T[:, :, None]) for each in y]),
    lambda y: torch.stack([F.conv_transpose1d(each.T[:, :, None], each[:, :, None]) for each in y])])
def test_products_of_two_activations_are_counted(outer):
    """[N, 4, 5] by [N, 5, 4] beside the layer's [N, 5, 6] by [6, 4]; what an einsum makes of one tensor is none."""
    report = convert(Of(lambda s, x: outer(s.layer(x)), layer=nn.Linear(6, 4)), W8A8, seeded((3, 5, 6))).crossbar_report
    assert report.between == 3 * 4 * 5 * 4 and report.share == 3 * 5 * 24 / (3 * 5 * 24 + 3 * 4 * 5 * 4)


# ---- traps -------------------------------------------------------------------------------------------------------------


def equal_to_float(model, x, **options):
    """Bound and not quantized, a network gives the float network's answers; quantized to 8 bits nearly."""
    model.eval()
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(convert(model, None, x, **options)(x), wanted, rtol=1e-4, atol=1e-5)
        net = convert(model, W8A8, x, **options)
        assert (net(x) - wanted).square().mean() < 0.01 * wanted.square().mean()
    return net


class Left(nn.Module):
    """Weights on the left of columns, and of a vector, where they are its rows' products."""

    def __init__(self, columns=True):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second, self.last = (nn.Parameter(torch.randn(shape)) for shape in ((12, 8), (6, 12), (5, 6)))
        self.columns = columns

    def forward(self, x):
        if self.columns:
            y = torch.relu(self.first @ x)  # [N, 12, T]
            y = torch.stack([torch.mm(self.second, each) for each in y])
            return torch.stack([self.last.mv(each) for each in y.mean(2)])
        y = torch.relu(F.linear(x.mT, self.first))
        y = torch.stack([F.linear(each, self.second) for each in y])
        return torch.stack([F.linear(each, self.last) for each in y.mean(1)])


@pytest.mark.parametrize("options", [dict(), dict(rounding="gptq"), dict(inputs="offset")])
@pytest.mark.parametrize("images", [1, 3])
def test_weights_on_the_left_are_those_of_linear_layers(options, images):
    x, spec = seeded((images, 8, 5), 7), CrossbarSpec(4, 5, rows=8, adc_bits=4)
    equal_to_float(Left(), x)
    left, right = (convert(Left(columns), spec, x, **options) for columns in (True, False))
    found = [[layer | {"name": ""} for layer in net.crossbar_report.layers] for net in (left, right)]
    assert len(found[0]) == 3 and [layer["multiplications"] for layer in found[0]] == [layer["multiplications"] for layer in found[1]]
    torch.testing.assert_close(left(x), right(x), rtol=1e-4, atol=1e-5)
    assert next(layer for _, layer in crossbar_layers(left))(x[:, :, :0]).shape == (images, 12, 0)


class Beside(nn.Module):
    """Products of a weight with what does not depend on the input, beside its product with the input: they belong to no layer."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(5)
        self.kind, self.first, self.second = kind, nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 6))
        self.register_buffer("far", 50 * torch.randn(8))

    def forward(self, x):
        if self.kind == "norm":
            return F.linear(x, self.first) / (self.first @ self.far).norm()
        if self.kind == "sum":
            return x @ self.first + self.first @ self.far / 50
        return F.linear(x, self.first @ self.second.mm(self.second.t()))


@pytest.mark.parametrize("kind", ["norm", "sum", "factors"])
def test_products_beside_a_layers_own_are_as_they_were(kind):
    x = seeded((16, 8), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = equal_to_float(Beside(kind), x, correct="none")
        net(x)


class Viewed(nn.Module):
    """Outputs of products in other shapes, as memory in PyTorch's order allows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.conv, self.left, self.head = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(4, 8)), nn.Linear(16, 5)

    def forward(self, x):
        y = F.max_pool2d(F.relu(self.conv(x)), 2).view(-1, 8, 4)
        return self.head((self.left @ y).view(len(x), -1))


@pytest.mark.parametrize("view", [
    lambda y: torch.view_as_complex(y.unflatten(3, (-1, 2))).abs().flatten(1), lambda y: y.as_strided((len(y), 96), (96, 1))])
def test_networks_that_depend_on_the_order_of_memory(view):
    net, x = Of(lambda s, x: s.head(view(s.conv(x))), conv=nn.Conv2d(3, 6, 3), head=nn.LazyLinear(4)), seeded((8, 3, 6, 6))
    net(x)
    equal_to_float(net, x)


def test_a_weight_whose_values_move_is_one_weight():
    class Bounded(nn.Conv2d):
        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
            return super().forward(x)

    net = nn.Sequential(Bounded(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    assert convert(net, W8A8, seeded((130, 1, 6, 6))).crossbar_report.share == 1  # three batches


def test_networks_that_view_outputs_in_other_shapes():
    x = seeded((16, 3, 6, 6), 9)
    net = equal_to_float(Viewed(), x)
    assert copy.deepcopy(net)(x).equal(net(x)) and all(layer.contiguous for _, layer in crossbar_layers(net))
    assert not any(layer.contiguous for _, layer in crossbar_layers(convert(Small(), W8A8, x)))


class Functional(nn.Module):
    """Weights that are used in many ways by functions, none by a module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        for name, shape in dict(joined=(12, 8), turned=(4, 6), right=(6, 5), given=(3, 4), standard=(4, 4, 3)).items():
            setattr(self, name, nn.Parameter(torch.randn(*shape)))
        self.gain = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x):
        query, key, value = self.joined.chunk(3)
        x = F.linear(x, query) + F.linear(x, key).tanh() * F.linear(x, value)
        x = x @ self.turned
        x = torch.addmm(torch.ones(5), x, self.right).relu()
        x = torch.matmul(x[:, :4], self.given.T)
        weight = F.batch_norm(self.standard.reshape(1, 4, -1), None, None, weight=(self.gain * 2).view(-1), training=True)
        x = torch.cat([x, x[:, :1]], 1)[:, :, None].expand(-1, -1, 5)
        return F.conv1d(x, weight.reshape_as(self.standard)).flatten(1)


def test_weights_by_functions_parts_and_standardized():
    net = equal_to_float(Functional(), seeded((6, 8)))
    assert len(crossbar_layers(net)) == 7 and net.crossbar_report.unused == []


class Tied(nn.Module):
    """An embedding whose matrix gives the logits, a layer that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.block, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for _ in range(2):
            x = x + F.silu(self.block(x))
        return self.head(x)


def test_tied_embeddings_tokens_and_a_layer_called_twice():
    x = torch.arange(22).view(2, 11) % 11
    net = equal_to_float(Tied(), x)
    assert net.head.weight is net.embedding.weight and isinstance(net.head.weight, Bound)
    for made in (net, convert(Tied(), W8A8, x, correct="none")):
        assert [layer.shared for _, layer in crossbar_layers(made)] == [False, True]
    with torch.no_grad():  # a lookup sees the weight itself
        assert torch.equal(net.embedding(x), net.embedding.weight.detach()[x])


@pytest.mark.parametrize("make", [
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)),
    lambda: nn.utils.weight_norm(nn.Linear(6, 4)), lambda: nn.utils.spectral_norm(nn.Linear(6, 4))])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_norms_of_weights(make):
    torch.manual_seed(3)
    equal_to_float(nn.Sequential(make(), nn.ReLU(), nn.Linear(4, 3)), seeded((5, 6)))


def test_transformer_encoder():
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = equal_to_float(nn.TransformerEncoder(layer, 2), seeded((3, 5, 8)))
    assert len(crossbar_layers(net)) == 2 * 6 and net.crossbar_report.between == 2 * 2 * 3 * 2 * 5 * 5 * 4


def test_all_zero_channels_and_half_precision():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1] = 0
    x = seeded((8, 6))
    net = convert(model, W8A8, x)
    y = net(x)
    assert y.isfinite().all()
    half = convert(copy.deepcopy(model).half(), W8A8, x)
    assert half(x.half()).dtype == torch.float16
    torch.testing.assert_close(half(x.half()).float(), y, rtol=0.05, atol=0.02)


def test_a_network_in_training_mode_stays_as_it_is():
    model = Small().train()
    before = copy.deepcopy(model.state_dict())
    net = convert(model, W8A8, seeded((8, 3, 6, 6)))
    assert model.training and not net.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(parameter, Bound) for parameter in model.parameters())


def test_networks_that_return_classes():
    net = Of(lambda s, x: s.layer(x).argmax(-1), layer=nn.Linear(8, 3))
    assert torch.equal(convert(net, W8A8, seeded((64, 8)))(seeded((2, 8))), net(seeded((2, 8))))


def test_networks_of_sixteen_bits_answer_as_far_as_they_round():
    net = nn.Sequential(*(each for _ in range(6) for each in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()))).bfloat16()
    assert len(crossbar_layers(convert(net, W8A8, seeded((64, 64))))) == 6


def test_in_place_and_twice():
    model = Small()
    assert convert(model, W8A8, seeded((8, 3, 6, 6)), inplace=True) is model
    with pytest.raises(ValueError, match="on crossbars already"):
        convert(model, W8A8, seeded((8, 3, 6, 6)))


def test_copies_pickles_and_state_dicts():
    x = seeded((8, 3, 6, 6))
    spec = CrossbarSpec(4, 4, adc_bits=4, rows=8)
    model = Small()
    model.stem.weight.requires_grad_(False)
    net = convert(model, spec, x)
    wanted = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), wanted)
        assert [name for name, each in other.named_parameters() if not each.requires_grad] == ["stem.weight"]
        with torch.no_grad():
            other.depthwise.weight.mul_(-1)  # a copy's weight is its own
        assert not torch.equal(other(x), wanted) and torch.equal(net(x), wanted)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(type(value) is torch.Tensor for value in state.values()) and "depthwise.weight" in state
    fresh = convert(Small(), spec, 3 * seeded((8, 3, 6, 6), 5) - 1)
    assert not torch.equal(fresh(x), wanted)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), wanted)


def test_changed_weights_are_seen():
    x = seeded((8, 3, 6, 6))
    net = convert(Small(), W8A8, x)
    before = net(x)
    net.head.weight.data[0] = 0
    assert not torch.equal(net(x)[:, 0], before[:, 0]) and torch.equal(net(x)[:, 1:], before[:, 1:])


def test_training_of_quantized_products():
    x = seeded((64, 3, 6, 6)) + 2 * seeded((64, 3, 1, 1), 1)
    labels = x.mean((2, 3)).argmax(1)
    net = convert(Small(), CrossbarSpec(3, 3, adc_range="ideal"), x, qat=True)
    assert net.training
    net.eval()
    with torch.no_grad():
        simulated = net(x)
        layer = of(net, "depthwise")
        layer.train()
        assert torch.is_grad_enabled() is False
    with torch.enable_grad():  # the quantized product of training is that of the arrays without ADC
        for module in net.modules():
            if isinstance(module, ConvertedLayer):
                module.train()
        torch.testing.assert_close(net(x).detach(), simulated, rtol=1e-3, atol=1e-3)
    net.train()
    optimizer, losses = torch.optim.Adam(net.parameters(), 0.02), []
    for _ in range(60):
        loss = F.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and net.stem.weight.grad is not None


def test_devices_and_calibration():
    x = seeded((8, 3, 6, 6))
    net = convert(Small(), CrossbarSpec(4, 4, cell_bits=2, adc_bits=6, rows=8), x)
    ideal = net(x)
    program(net, Device.preset("techA", time="1d"), 1)
    calibrate(net, x)
    one = net(x)
    assert not torch.equal(one, ideal) and (one - ideal).square().mean() < 0.3 * ideal.square().mean()
    program(net, None)
    calibrate(net, x)
    assert torch.equal(net(x), ideal)


@pytest.mark.parametrize("layer, shape", [(nn.Conv2d(3, 4, 3), (6, 3, 6, 6)), (nn.Conv3d(2, 3, 2, padding=(1, 0, 0)), (6, 2, 3, 5, 5))])
def test_noise_is_the_same_in_every_batch(layer, shape):
    x = seeded(shape)
    net = convert(layer, CrossbarSpec(4, 4, cell_bits=1, adc_bits=8, rows=8), x, first_last_bits=None)
    quiet = net(x)
    program(net, Device.preset("techA"), 1, adc_noise=0.3)
    noisy = net(x)
    assert not torch.equal(noisy, quiet)
    parts = []
    for first, part in zip((0, 2), x.split((2, 4))):
        with image_numbers(first):
            parts.append(net(part))
    assert torch.equal(torch.cat(parts), noisy)


@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("inputs", ENCODINGS)
def test_a_chip_without_scatter_gives_what_ideal_cells_give(inputs, reference):
    """A level of off-current for each row is taken away with the reference, before the ADC or behind it. 8 bits see reads of 8 rows as they
    are, and of ternary inputs, whose rows have both signs, nearly."""
    torch.manual_seed(0)
    x, spec = seeded((16, 12)), CrossbarSpec(4, 4, rows=8, adc_range="full", adc_bits=8, reference=reference)
    net = convert(nn.Linear(12, 5), spec, x, inputs=inputs, first_last_bits=None)
    with without_adc(net):
        wanted = net(x)
    torch.testing.assert_close(net(x), wanted, rtol=0, atol=1e-5)
    program(net, Device("mine", "", 60.0, 120.0))
    torch.testing.assert_close(net(x), wanted, rtol=0, atol=0.1 if inputs == "ternary" else 1e-5)


def test_noise_is_another_in_each_phase():
    """Both phases see the same currents; with the same noise what they give would cancel out."""
    layer = nn.Linear(8, 64, bias=False)
    layer.weight.data[:, 4:] = layer.weight.data[:, :4]
    half = seeded((4, 4)).abs()
    x = torch.cat([half, -half], 1)
    net = convert(layer, CrossbarSpec(4, 4, adc_bits=8, adc_range="full"), seeded((8, 8), 1), first_last_bits=None, correct="none")
    program(net, Device("mine", "", 5.0, 65.0), 0, adc_noise=0.5)
    assert (net(x) != 0).any(1).all()
    program(net, Device("mine", "", 5.0, 65.0), 0)
    assert not net(x).any()


@pytest.mark.parametrize("weight", [lambda w: 2 * w, lambda w: w * 2, lambda w: (w - w.mean()) / w.std(), lambda w: 2 * w[:4]])
def test_computed_weights_in_compiled_networks(weight):
    own = nn.Parameter(seeded((8, 8)))
    net = convert(Of(lambda s, x: s.layer(F.linear(x, weight(s.w))), w=own, layer=nn.Linear(len(weight(own)), 3)), W8A8, seeded((16, 8)))
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(net, backend="eager")(seeded((16, 8))), net(seeded((16, 8))))


def test_compiled_networks_and_unused_heads():
    class Heads(Small):
        def __init__(self):
            super().__init__()
            self.aux = nn.Linear(8, 2)

    net = convert(torch.compile(Heads()), W8A8, seeded((8, 3, 6, 6)))
    assert net.crossbar_report.unused == ["aux.weight"] and len(crossbar_layers(net)) == 3


@pytest.mark.parametrize("strict", [False, True])
def test_what_would_be_exported_as_the_float_network_is_refused(strict):
    """An export sees parameters without their binding, so that its graph would have no arrays."""
    x = seeded((4, 6))
    layer = QLinearDoreFa(6, 3, spec=CrossbarSpec(adc_range="ideal")).eval()
    for net in (convert(nn.Linear(6, 3), W8A8, x), layer):
        with pytest.raises(Exception, match="a network on crossbars cannot be exported"):
            torch.export.export(net, (x,), strict=strict)


# ---- errors ------------------------------------------------------------------------------------------------------------


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mix = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return torch.einsum("ni,ij->nj", self.first(x), self.mix)


def test_what_cannot_be_mapped_is_named():
    x = seeded((4, 4))
    with pytest.raises(ValueError, match=r"^mix cannot be put on crossbars: it is an einsum. To keep it digital, give skip=\['mix'\]"):
        convert(Einsum(), W8A8, x)
    for options in (dict(skip=["mix"]), dict(strict=False)):
        net = convert(Einsum(), W8A8, x, **options)
        assert list(net.crossbar_report.digital) == ["mix"] and len(crossbar_layers(net)) == 1 and net.crossbar_report.share == 1 / 2
    scaled = Of(lambda s, x: torch.addmm(s.b, x, s.w, alpha=2), w=nn.Parameter(torch.ones(4, 3)), b=nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match="^w cannot be put on crossbars: it is a scaled addmm"):
        convert(scaled, W8A8, x)


@torch.library.custom_op("torchrram_test::product", mutates_args=())
def library_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.t()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    @torch.jit.script
    def compiled_product(x: torch.Tensor, w: torch.Tensor):
        return torch.relu(x @ w.t())


def filled_with(*parts):
    """Rows `[6, 5]` in a tensor that held zeros."""
    made = torch.zeros(6, 5)
    for place, part in zip(made.split([part.numel() // 5 for part in parts]), parts):
        place[:] = part
    return made


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize(("product", "what"), [
    (lambda x, w: F.linear(x, torch.zeros(6, 5).copy_(w)), "a product with weights that were written into another tensor"),
    (lambda x, w: F.linear(x, 2 * torch.mul(w, 3, out=torch.zeros(6, 5))), "a product with weights that were written into another tensor"),
    (lambda x, w: F.linear(x, filled_with(w[:2], w[2:])), "a product with weights that were written into another tensor"),
    (lambda x, w: F.linear(x, filled_with(*w)), "a product with weights of one dimension"),
    (lambda x, w: torch.mm(x, w.t(), out=torch.empty(len(x), 6)), "a use of mm that is not known"),
    (lambda x, w: F.linear(w, x), "a use of linear that is not known"),
    (lambda x, w: F.conv1d(w[None].mT, x[:, :, None]), "a use of conv1d that is not known"),
    (lambda x, w: torch.ops.aten.linear(x, w), "a use of linear that is not known"),
    (lambda x, w: torch.addmm(torch.zeros(6, 1), w, x.t()), "a scaled addmm"),
    (lambda x, w: torch.addmv(torch.zeros(6), w, x[0]), "an addmv"),
    (lambda x, w: torch.addbmm(torch.zeros(len(x), 6), x[None], w.t()[None]), "a batched product"),
    (lambda x, w: torch.inner(x, w), "an inner product"), (lambda x, w: torch.linalg.vecdot(x[:, None], w), "an inner product"),
    (lambda x, w: torch.tensordot(x, w, ([1], [1])), "a tensordot"), (lambda x, w: torch.kron(x, w), "a Kronecker product"),
    (lambda x, w: torch.linalg.multi_dot([x, w.t(), w]), "a product of several matrices"),
    (lambda x, w: torch.chain_matmul(x, w.t()), "a product of several matrices"),
    (lambda x, w: torch.sparse.mm(x.to_sparse(), w.t()), "a sparse product"), (lambda x, w: torch.cdist(x, w), "a table of distances"),
    (lambda x, w: torch.linalg.solve(w[:5], x.t()), "a solution of equations"),
    (lambda x, w: torch.ops.aten.linear.default(x, w), "a use of linear that is not known"),
    (lambda x, w: torch._addmm_activation(torch.zeros(6), x, w.t()), "a product with an activation in it"),
    (lambda x, w: torch.ops.torchrram_test.product(x, w), "an operator of a library, torchrram_test.product"),
    (lambda x, w: torch.vmap(lambda row: torch.mv(x, row))(w), "a product under torch.vmap"),
    (lambda x, w: torch.vmap(lambda each: F.linear(each, w))(x), "a product under torch.vmap"),
    (lambda x, w: compiled_product(x, w), "a product in code that shows PyTorch no calls (torch.jit, or C++)"),
    (lambda x, w: F.scaled_dot_product_attention(x, w, w), "an attention to weights"),
    (lambda x, w: torch.stack([F.linear(x, w[row]) for row in (x[:1, :2] > 0).long()]), "a product with weights that the input chooses"),
    (lambda x, w: torch.convolution(x[:, :, None], w[:, :, None], None, [1], [0], [1], False, [0], 1), "a convolution by another name")])
def test_no_product_with_a_weight_stays_digital_unsaid(product, what):
    net = Of(lambda s, x: (s.first(x), product(s.first(x), s.w)), first=nn.Linear(5, 5), w=nn.Parameter(seeded((6, 5))))
    with pytest.raises(ValueError, match=f"^w cannot be put on crossbars: it is {re.escape(what)}. To keep it digital"):
        convert(net, W8A8, seeded((7, 5)))
    report = convert(net, W8A8, seeded((7, 5)), skip=["w"]).crossbar_report
    assert report.digital == {"w": "skipped"} and report.digital_multiplications >= 30


@pytest.mark.parametrize("product", [
    lambda x, w: torch.mm(x, w.t(), out=None), lambda x, w: x @ torch.mm(torch.eye(5), w.t(), out=None)], ids=["input", "weights"])
def test_a_product_that_is_written_nowhere_else_is_one(product):
    net = Of(lambda s, x: product(x, s.w), w=nn.Parameter(seeded((6, 5))))
    assert len(crossbar_layers(convert(net, W8A8, seeded((7, 5))))) == 1


@pytest.mark.parametrize("experts", [
    lambda x, w, chosen: torch.cat([F.linear(x[chosen == each], w[each]) for each in chosen.unique()]),
    lambda x, w, chosen: torch.bmm(w[chosen], x[:, :, None]), lambda x, w, chosen: torch.bmm(x[:, None], w[chosen].mT),
    lambda x, w, chosen: torch.bmm(x[:, None], torch.swapaxes(2 * w[chosen], 1, 2)),
    lambda x, w, chosen: w.index_select(0, chosen) @ x[:, :, None],
    lambda x, w, chosen: torch.einsum("ni,noi->no", x, w[chosen])])
def test_experts_that_the_input_chooses_do_not_stay_digital_unsaid(experts):
    """Each example meets one of the weights. A table that is looked up in is no such product, and neither are experts that all run."""
    net = Of(lambda s, x: experts(s.first(x), s.w, (x[:, 0] > 0).long()), first=nn.Linear(5, 5), w=nn.Parameter(seeded((4, 6, 5))))
    with pytest.raises(ValueError, match=r"^w cannot be put on crossbars: it is a product with weights that the input chooses\. "):
        convert(net, W8A8, seeded((7, 5)))
    report = convert(net, W8A8, seeded((7, 5)), skip=["w"]).crossbar_report
    assert report.digital == {"w": "skipped"} and report.digital_multiplications == 7 * 30 and not report.between
    net.function = lambda s, x: sum(F.linear(s.first(x), s.w[each]) for each in range(4))
    assert convert(net, W8A8, seeded((7, 5))).crossbar_report.share == 1
    table = Of(lambda s, x: s.first(s.w[(x[:, 0] > 0).long()]) @ s.w.T, first=nn.Linear(5, 5), w=nn.Parameter(seeded((6, 5))))
    assert convert(table, W8A8, seeded((7, 5))).crossbar_report.share == 1


@torch.library.custom_op("torchrram_test::scaled", mutates_args=())
def library_scaled(size: torch.Tensor, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x * w * size


def test_operators_of_libraries_that_scale_are_no_products():
    scaled, gain = torch.ops.torchrram_test.scaled, nn.Parameter(seeded((1, 5)))
    net = Of(lambda s, x: scaled(s.first(x).mean(), s.gain, x), first=nn.Linear(5, 5), gain=gain)
    assert convert(net, W8A8, seeded((7, 5))).crossbar_report.digital == {}


def test_keys_that_are_learned_are_skipped_by_their_name():
    net = Of(lambda s, x: F.scaled_dot_product_attention(s.q(x), s.k(s.held), s.v(s.held)), q=nn.Linear(5, 5), k=nn.Linear(5, 5),
             v=nn.Linear(5, 5), held=nn.Parameter(seeded((4, 5))))
    with pytest.raises(ValueError, match="^held cannot be put on crossbars: it is an attention to weights"):
        convert(net, W8A8, seeded((7, 5)))
    assert convert(net, W8A8, seeded((7, 5)), skip=["held"]).crossbar_report.digital["held"] == "skipped"


def with_own(function):
    """A network of a layer, and a function of its output and of weights that are no matrices of parameters."""
    net = Of(lambda s, x: function(s.first(x), s), first=nn.Linear(5, 5), v=nn.Parameter(seeded((30,))), w=nn.Parameter(seeded((6, 5))))
    net.register_buffer("kept", seeded((6, 5), 1))
    return net


@pytest.mark.parametrize("product", [
    lambda x, s: F.linear(x, s.v.view(6, 5)), lambda x, s: F.linear(x, torch.stack([s.v[:5]] * 6)), lambda x, s: x @ s.v[:5],
    lambda x, s: torch.mv(x, s.v[:5]), lambda x, s: x @ torch.diag(s.v[:5]),
    lambda x, s: torch.stack([torch.dot(row, s.v[:5]) for row in x]), lambda x, s: torch.zeros(len(x)).addmv_(x, s.v[:5])])
def test_weights_of_one_dimension_are_no_exception(product):
    with pytest.raises(ValueError, match="^v cannot be put on crossbars: it is a product with weights of one dimension"):
        convert(with_own(product), W8A8, seeded((7, 5)))
    report = convert(with_own(product), W8A8, seeded((7, 5)), strict=False).crossbar_report
    assert "v" in report.digital and report.digital_multiplications in (7 * 5, 7 * 5 * 5, 7 * 5 * 6)
    with pytest.raises(ValueError, match="^w cannot be put on crossbars: it is a product with weights of one dimension"):
        convert(with_own(lambda x, s: x @ s.w[0]), W8A8, seeded((7, 5)))


@pytest.mark.parametrize("product", [
    lambda x, s: F.linear(x, s.kept), lambda x, s: x @ s.kept.T, lambda x, s: F.conv1d(x[:, :, None], s.kept[:, :, None] * 2),
    lambda x, s: torch.addmm(s.v[:6], x, s.kept.T), lambda x, s: torch.einsum("nc,dc->nd", x, s.kept)])
def test_products_with_buffers_are_named_and_counted(product):
    net = convert(with_own(product), W8A8, seeded((7, 5)))
    report = net.crossbar_report
    assert report.digital == {"kept": "a product with a buffer"} and report.digital_multiplications == 7 * 30 and not report.between
    assert convert(with_own(product), W8A8, seeded((7, 5)), skip=["kept"]).crossbar_report.digital == {"kept": "skipped"}


@pytest.mark.parametrize("harmless", [
    lambda x, s: F.layer_norm(x, (5,), s.v[:5], s.v[5:10]), lambda x, s: x * s.v[:5] + s.kept[0], lambda x, s: F.linear(x, s.w, s.v[:6])])
def test_scales_and_biases_are_no_products(harmless):
    report = convert(with_own(harmless), W8A8, seeded((7, 5))).crossbar_report
    assert not report.digital and report.share == 1


def test_attention_to_learned_queries_is_between_activations():
    net = with_own(lambda x, s: F.scaled_dot_product_attention(s.v[None, :5], x, x, attn_mask=s.kept[:1, :1]))
    report = convert(net, W8A8, seeded((7, 5))).crossbar_report
    assert not report.digital and report.between == 2 * 7 * 5


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_what_torch_jit_compiled_is_refused():
    net = Of(lambda s, x: s.part(s.first(x)), first=nn.Linear(5, 5), part=torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.ReLU())))
    with pytest.raises(ValueError, match=r"^part cannot be put on crossbars: it is a module compiled by torch.jit.* give skip=\['part'\]"):
        convert(net, W8A8, seeded((7, 5)))
    assert convert(net, W8A8, seeded((7, 5)), skip=["part"]).crossbar_report.digital == {"part": "skipped"}
    with pytest.raises(ValueError, match="^the network is compiled by torch.jit"):
        convert(net.part, W8A8, seeded((7, 5)))


@pytest.mark.parametrize("network", [
    lambda s, x: s.layer(x) + s.layer(s.kept), lambda s, x: s.layer(x) + s.layer(s.learned).sum(0),
    lambda s, x: s.layer(s.learned).mean(0) - s.layer(x), lambda s, x: s.layer(x) @ s.layer(s.learned).T])
def test_what_a_layer_reads_for_every_image_alike_is_an_input_too(network):
    """Prototypes, baselines: far from the images, and on the same arrays."""
    net = Of(network, layer=nn.Linear(8, 8, bias=False), learned=nn.Parameter(40 * seeded((5, 8), 1)))
    net.register_buffer("kept", 40 * seeded((1, 8), 1))
    x = seeded((64, 8))
    converted = convert(net, W8A8, x, correct="none")
    [(_, layer)], report = crossbar_layers(converted), converted.crossbar_report
    assert max(map(abs, layer.act_quant.window)) * layer.act_quant.scale > 30 and not report.digital  # the images alone end at 4
    assert report.layers[0]["multiplications"] in {64 * (64 + rows) for rows in (1, 5)}
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    converted(x)
    assert len(calls) == 2


def test_queries_that_are_learned_are_named_and_not_warned_of():
    def attention(s, x):
        return s.head(s.attention(s.queries[None].expand(len(x), -1, -1), x, x, need_weights=False)[0])

    net = Of(attention, attention=nn.MultiheadAttention(16, 2, batch_first=True), head=nn.Linear(16, 3),
             queries=nn.Parameter(seeded((5, 16))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = convert(net, W8A8, seeded((16, 7, 16)))
        converted(seeded((16, 7, 16)))
    alone = "a product of parameters alone"
    assert converted.crossbar_report.digital == {"queries": alone, "attention.in_proj_weight in part": alone}


def test_pruned_networks_keep_their_masks():
    net = nn.Sequential(nn.Linear(16, 4))
    prune.l1_unstructured(net[0], "weight", 0.5)
    mask, x = net[0].weight_mask, seeded((8, 16))
    codes = convert(net, W8A8, x)[0].weight_orig.layers
    [layer] = codes.values()
    assert torch.equal(layer.w_codes()[:, :, 0, 0] == 127, mask == 0) and int(mask.sum()) == 32


@pytest.mark.parametrize("weight", [
    lambda s: s.kept[:5] @ s.w[:5], lambda s: s.w[:5] + s.kept[:5] @ s.w[:5],
    lambda s: s.w / torch.einsum("i,ij,j->", s.kept[:, 0], s.w, s.kept[0]), lambda s: s.w + 0 * torch.cdist(s.w, s.kept).sum()])
def test_products_of_weights_alone_are_no_surprise(weight):
    net, x = with_own(lambda x, s: F.linear(x, weight(s))), seeded((7, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = convert(net, W8A8, x)
        converted(x)
    assert len(crossbar_layers(converted)) == 2


class Other(nn.Sequential):
    """A weight of its own, beside those of its parts."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4))
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return F.linear(super().forward(x), self.weight)


def test_networks_that_cannot_be_bound():
    x, linear = seeded((4, 4)), nn.Linear(4, 4)
    once = Of(lambda s, x: s.seen.append(1) or (s.l(x) if len(s.seen) == 1 else x), l=linear, seen=[])
    for net, message in ((Other(), "^weight cannot be put on crossbars: it is a parameter of a Other, which should hold layers only"),
                         (Of(lambda s, x: F.dropout(s.l(x)), l=linear), "does it give the same answers at each call"),
                         (once, r"^l was put on crossbars, but the network does not use it there; give skip=\['l'\]")):
        with pytest.raises(ValueError, match=message):
            convert(net, W8A8, x)
    linear.crossbar = "a name that the network has itself"
    net = convert(nn.Sequential(linear), W8A8, x)
    assert net[0].crossbar == linear.crossbar and len(crossbar_layers(net)) == 1


@pytest.mark.parametrize("images, options, message", [
    (torch.zeros(0, 3, 6, 6), {}, "^there are no images to convert with"), ([], {}, "no images"),
    (torch.full((2, 3, 6, 6), float("nan")), {}, "^the images hold numbers that are not finite$"),
    (torch.zeros(2, 4, 6, 6), {}, r"^the network does not run on the images, of shape \[2, 4, 6, 6\]: Given groups=1"),
    (["digits"], {}, "^a batch of the images is a str; give a tensor, or a tuple or a dict with tensors, as the network takes them$"),
    (torch.zeros(2, 3, 6, 6), dict(inputs="sign"), "^inputs is 'sign'; allowed are phases, ternary, twos, offset$"),
    (torch.zeros(2, 3, 6, 6), dict(rounding="up"), "^rounding is 'up'; allowed are nearest, gptq$"),
    (torch.zeros(2, 3, 6, 6), dict(skip=["*"]), "^nothing of this network can be put on crossbars"),
    (torch.zeros(2, 3, 6, 6), dict(specs={"tail": W8A8}), "^specs has 'tail', which fits no layer")])
def test_bad_input(images, options, message):
    with pytest.raises(ValueError, match=message):
        convert(Small(), W8A8, images, **options)


@pytest.mark.parametrize("options, message", [
    (dict(weight_scale={"tail": 1.0}), "^weight_scale has 'tail', which fits no layer on crossbars$"),
    (dict(input_scales={"tail": (1.0, 0, 9)}), "^input_scales has 'tail', which fits no layer on crossbars$"),
    *[(dict(input_scales=value), "^input_scales is .*; a mapping from names or patterns of layers to their values is expected$")
      for value in ((1.0, 0, 255), [("head", (1.0, 0, 255))], {0: (1.0, 0, 255)})],
    *[(dict(weight_scale=value), "^weight_scale is .*; allowed are mse, max, layer, or the scales of some layers by their names$")
      for value in (torch.ones(5), np.ones(5), 0.1, "least")],
    (dict(weight_scale={"head": torch.ones(3)}),
     r"^weight_scale of head: scales have shape \[3\]; one number, or one for each of the 5 output channels, is expected$"),
    (dict(weight_scale={"head": "max"}), "^weight_scale of head: 'max' is given; a number or a tensor is expected$"),
    (dict(input_scales={"head": (1.0, -1, 254)}, inputs="twos"), "256 codes, zero among them, from -128 to 127$"),
    *[(dict(weight_scale={"*": value}), f"^weight_scale of stem: a scale is {said}; positive, finite numbers are expected$")
      for value, said in ((0.0, "0"), (torch.tensor([1.0] * 7 + [float("nan")]), "nan"), (-1, "-1"), (float("inf"), "inf"))],
    *[(dict(input_scales={"head": (value, 0, 255)}), f"^input_scales of head: the scale is {value:g}; a positive, finite number is")
      for value in (0.0, float("nan"), -1, float("inf"))],
    *[(dict(input_scales={"head": (1.0, *codes)}), f"^input_scales of head: codes are {codes[0]} to {codes[1]}; allowed are, with 8 bits, "
       "at most 256 codes, zero among them$") for codes in ((0, 256), (-128, 128), (1, 20), (-9, -1), (0, 0))],
    *[(dict(input_scales={"head": value}), r"^input_scales of head: .* is given; \(scale, lowest code, highest code\) is expected")
      for value in (0.1, (0.1, 255), (0.1, 0, 2.5), "mse")]])
def test_own_codes_that_are_none_of_the_layer(options, message):
    with pytest.raises(ValueError, match=message):
        convert(Small(), W8A8, torch.ones(2, 3, 6, 6), **options)


class Tokens(nn.Module):
    """Masked attention of 7 tokens, first or behind the batch."""

    def __init__(self, first):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.first = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0), first
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(7))

    def forward(self, x):
        return self.layer(x, self.mask) if self.first else self.layer(x.transpose(0, 1), self.mask).transpose(0, 1)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("plan", [{}, dict(adc_plan="significance", adc_bits=2.5, adc_idle="skip")])
def test_tokens_first(rounding, plan):
    """The same scales, ranges, correction and answers as with the batch first; more images than run together, and batches of them."""
    x, options = seeded((72, 7, 16)), dict(rounding=rounding, first_last_bits=None)
    spec = CrossbarSpec(4, 4, **{"adc_bits": 4, **plan})
    wanted = convert(Tokens(False), spec, x, **options)
    for images in (x.transpose(0, 1), [part.transpose(0, 1) for part in x.split(64)]):
        net = convert(Tokens(True), spec, images, batch_dim=1, **options)
        for (_, layer), (_, other) in zip(crossbar_layers(net), crossbar_layers(wanted)):
            for name, value in layer.state_dict().items():
                torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-5, atol=1e-5)
        assert net.crossbar_report.images == 64
        torch.testing.assert_close(net(x.transpose(0, 1)).transpose(0, 1), wanted(x), rtol=1e-4, atol=1e-4)
    before = [layer.adc_gain.clone() for _, layer in crossbar_layers(net)]
    calibrate(net, x.transpose(0, 1), batch_dim=1)
    for gain, (_, layer) in zip(before, crossbar_layers(net)):
        torch.testing.assert_close(gain, layer.adc_gain)


def test_costs_are_those_of_an_image_with_tokens_first_too():
    x, spec = seeded((70, 7, 16)), CrossbarSpec(4, 4, adc_range="full")
    found = [count(convert(Tokens(first), spec, images, batch_dim=dim, correct="none"), images, batch_dim=dim)
             for first, images, dim in ((False, x, 0), (True, x.transpose(0, 1), 1))]
    assert [counts.images for counts in found] == [70, 70]
    one, other = ([layer.pixels for layer in counts.layers.values()] for counts in found)
    assert one == other


def test_the_first_images_are_kept_along_the_dimension_of_the_batch():
    x, first = seeded((2, 9, 3)), First(5, 1)
    assert [part.shape[1] for part in first.of(x.split(3, 1))] == [3, 3, 3] and torch.equal(first.batch(), x[:, :5])


def test_a_dimension_of_the_batch_that_is_none():
    x = seeded((7, 40, 16))
    for dim in (3, -1, None):
        with pytest.raises(ValueError, match=f"^batch_dim is {dim}; allowed are whole numbers from 0 to 2, a dimension of the images$"):
            convert(Tokens(True), W8A8, x, batch_dim=dim)
    with pytest.raises(ValueError, match=r"^the network does not run on the images, of shape \[14, 32, 16\]: .*mask.*give batch_dim\)$"):
        convert(Tokens(True), W8A8, [x[:, :32], x[:, 8:]])


@pytest.mark.parametrize("inputs", ENCODINGS)
def test_own_codes(inputs):
    """A comparison with another tool gives all scales and windows; written out in float64."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), seeded((16, 6))
    s_w, s_a = (torch.tensor([0.003, 0.002, 0.005, 0.0041]), torch.tensor(0.01)), (torch.tensor(0.02), torch.tensor(0.011))
    net = convert(model, W8A8, x, inputs=inputs, correct="none", weight_scale={"0": s_w[0], "*": 0.01},
                  input_scales={"0": (0.02, -100, 90), "2": (np.float32(0.011), np.int64(0), 200)})
    y, windows = x, ((-100, 90), (0, 200))
    for linear, weight_scale, input_scale, window in zip((model[0], model[2]), s_w, s_a, windows):
        a = (y / input_scale).round().clamp(*window).double()
        w = (linear.weight / weight_scale.reshape(-1, 1)).round().clamp(-127, 127).double()
        y = (a @ w.T * input_scale.double() * weight_scale.double() + linear.bias.double()).relu().float()
    torch.testing.assert_close(net(x).relu(), y, rtol=1e-5, atol=1e-6)
    assert [layer.act_quant.window for _, layer in crossbar_layers(net)] == list(windows)


def test_own_codes_of_some_layers_leave_the_others_as_they_are():
    x, usual = seeded((4, 3, 6, 6)), convert(Small(), W8A8, seeded((4, 3, 6, 6)))
    net = convert(Small(), W8A8, x, weight_scale={"stem": 0.01}, input_scales={"head": (0.01, 0, 255)})
    assert (of(net, "stem").weight_quant.scale == 0.01).all() and of(net, "stem").act_quant.scale == of(usual, "stem").act_quant.scale
    assert of(net, "head").act_quant.scale == torch.tensor(0.01) and of(net, "head").act_quant.window == (0, 255)
    assert torch.equal(of(net, "head").weight_quant.scale, of(usual, "head").weight_quant.scale)
    again = copy.deepcopy(usual)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x))


def test_one_weight_scale_for_a_layer():
    """The one of least squared error of all weights together."""
    x = seeded((4, 3, 6, 6))
    layer = of(convert(Small(), CrossbarSpec(4, 4, adc_range="ideal"), x, weight_scale="layer", first_last_bits=None), "stem")
    w, [scale] = layer.weight.double(), layer.weight_quant.scale.unique().double()

    def error(step):
        return (step * (w / step).round().clamp(-7, 7) - w).square().sum()

    assert layer.weight_quant.scale.shape == (8,)
    assert error(scale) <= 1.01 * min(error(w.abs().max() / 7 * factor) for factor in np.linspace(0.3, 1.1, 200))


# ---- what a hostile reader found ---------------------------------------------------------------------------------------


class Of(nn.Module):
    """A module whose forward is a function of itself and the input."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def test_correction_and_what_it_aims_at_are_of_the_same_images():
    """The first images of a long, sorted set are of another kind than the rest."""
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(6, 4))
    x = torch.cat([seeded((256, 6)), 3 * seeded((300, 6), 1) + 5])
    losses = [convert(model, W8A8, x, correct=correct)(x) - model(x) for correct in ("channel", "none")]
    assert losses[0].square().mean() < 2 * losses[1].square().mean()


def test_parts_by_index_tensors_and_weights_that_come_about_alike():
    x = seeded((8, 6))
    net = Of(lambda s, x: F.linear(x, s.w[torch.tensor(0)]) + 2 * F.linear(x, s.w[torch.tensor(1)]), w=nn.Parameter(seeded((2, 4, 6), 1)))
    assert len(crossbar_layers(equal_to_float(net, x))) == 2
    a = (seeded((8, 6), 2) > 0).float()
    net = Of(lambda s, x: F.linear(x, s.w * s.a) + F.linear(x, s.w * s.b), w=nn.Parameter(seeded((8, 6), 1)), a=nn.Parameter(a),
             b=nn.Parameter(1 - a))
    with pytest.raises(ValueError, match="^w cannot be put on crossbars: it is a weight of several products that cannot be told apart"):
        convert(net, W8A8, x)


def test_states_that_replace_parameters_are_bound_again():
    x = seeded((8, 6))
    net = convert(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), CrossbarSpec(4, 4), x)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    state["0.weight"] = -state["0.weight"]
    net.load_state_dict(state, assign=True)
    other = convert(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), CrossbarSpec(4, 4), x)
    other.load_state_dict(state)
    assert isinstance(net[0].weight, Bound) and torch.equal(net(x), other(x))


def test_a_state_with_a_plan_brings_its_digits():
    """Whose number follows from the input codes: of signed ones, from the larger side."""
    spec, found = CrossbarSpec(8, 8, adc_bits=4, adc_plan="significance"), set()
    for low in (-1.0, -2.0, -0.3):
        x = torch.linspace(low, 1, 40)[:, None] * torch.ones(6)
        net = convert(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), spec, x, activations="max")
        other = convert(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), spec, seeded((8, 6)).abs())
        found.add(len(crossbar_layers(net)[0][1].adc_bits_plan))
        other.load_state_dict(net.state_dict())
        assert torch.equal(net(x), other(x))
    assert len(found) > 1


@pytest.mark.parametrize("assign", [False, True])
def test_weights_alone_that_are_loaded_take_the_place_of_cells_and_codes(assign):
    x, spec = seeded((8, 6)), CrossbarSpec(4, 4, adc_range="ideal")
    net = convert(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), spec, x)
    wanted, state = copy.deepcopy(net), {"0.weight": seeded((6, 6), 3)}
    wanted.load_state_dict(state, strict=False)
    program(net, Device.preset("techA"), 1)
    net[1].crossbar.set_codes(net[1].crossbar.w_codes().flip(0))
    net = copy.deepcopy(net)
    net.load_state_dict(state, strict=False, assign=assign)
    assert net[0].crossbar.chip is None and net[1].crossbar.chip is not None  # nothing was loaded into the second
    net.load_state_dict({"1.weight": net[1].weight.detach().clone()}, strict=False, assign=assign)
    assert torch.equal(net(x), wanted(x))


def test_cells_and_ranges_are_those_of_the_weight_as_the_network_computes_it():
    def standardized(w):
        return Of(lambda s, x: F.linear(x, (s.w - s.w.mean()) / s.w.std()), w=nn.Parameter(w))

    x, spec, chip = seeded((8, 6)), CrossbarSpec(4, 4, adc_bits=3), Device.preset("techA")
    other = seeded((4, 6), 3) ** 3
    net, wanted = convert(standardized(seeded((4, 6))), spec, x), convert(standardized(seeded((4, 6))), spec, x)
    net.load_state_dict({"w": other}, strict=False)
    wanted.load_state_dict({"w": other}, strict=False)
    with pytest.raises(ValueError, match="the weight that is made of w is computed anew at each call, and what it is made of has changed"):
        program(net, chip)
    calibrate(net, x)  # its reads are those of the weight of this pass
    wanted(x)
    calibrate(wanted, x)
    assert torch.equal(net(x), wanted(x))
    fresh = convert(standardized(seeded((4, 6))), spec, x)
    fresh.load_state_dict(net.state_dict())  # with the weight that was computed
    for each in (fresh, wanted):
        program(each, chip)
    assert torch.equal(fresh(x), wanted(x))
    wanted.train()(x)
    program(wanted, chip)
    wanted.w.data.neg_()
    with pytest.raises(ValueError, match="run the network on an input in evaluation mode first"):
        program(wanted, chip)


class Masked(nn.Module):
    """A weight with a factor, a mask that is a buffer, and one row whose mask is an attribute and written in place."""

    def __init__(self):
        super().__init__()
        self.first, self.later = nn.Module(), nn.Module()
        self.first.w = nn.Parameter(seeded((4, 6)))
        self.later.register_buffer("mask", torch.ones(4, 6))
        self.row = torch.ones(6)

    def forward(self, x):
        weight = 2 * self.first.w * self.later.mask
        weight[0].mul_(self.row)
        return F.linear(x, weight)


@pytest.mark.parametrize("change", [
    lambda net: net.first.w.data.copy_(-net.first.w.data), lambda net: net.first.w.data.neg_(), lambda net: net.later.mask.neg_(),
    lambda net: setattr(net.later, "mask", -net.later.mask),
    lambda net: np.negative(net.first.w.data.numpy(), out=net.first.w.data.numpy())],
    ids=["copy", "neg", "buffer", "other buffer", "numpy"])
def test_no_chip_is_programmed_to_a_weight_whose_sources_have_changed(change):
    x = seeded((8, 6))
    net = convert(Masked(), CrossbarSpec(4, 4, adc_range="ideal"), x, first_last_bits=None)
    [(_, layer)] = crossbar_layers(net)
    before = layer.w_codes().int()
    change(net)
    with pytest.raises(ValueError, match="the weight that is made of first.w is computed anew at each call, and what it is made of has"):
        program(net, Device.preset("techA"))
    net(x)
    program(net, Device.preset("techA"))
    assert torch.equal(layer.w_codes().int(), 14 - before)  # codes of -w: 2 m - W, m = 2^3 - 1
    net.row.neg_()
    with pytest.raises(ValueError, match="run the network on an input"):
        program(net, Device.preset("techA"))


def test_another_order_of_memory_is_no_change_of_what_a_weight_is_made_of():
    x = seeded((2, 3, 6, 6))
    net = convert(Of(lambda s, x: F.conv2d(x, 2 * s.w), w=nn.Parameter(seeded((4, 3, 3, 3), 1))), W8A8, x)
    copied = copy.deepcopy(net).to(memory_format=torch.channels_last)
    program(copied, Device.preset("techA"))
    copied.w.data.neg_()
    with pytest.raises(ValueError, match="what it is made of has changed"):
        program(copied, Device.preset("techA"))
    program(net, Device.preset("techA"))


def test_a_weight_that_was_loaded_belongs_to_the_rest_of_its_state():
    """Wherever that is loaded, before the layer or behind it; until something changes."""
    x, spec = seeded((8, 6)), CrossbarSpec(4, 4, adc_range="ideal")
    net, fresh = convert(Masked(), spec, x), nn.Sequential(convert(Masked(), spec, x))
    with torch.no_grad():
        net.later.mask[1:3] = 0
        net.first.w.neg_()
    net(x)
    fresh.load_state_dict({f"0.{key}": value for key, value in net.state_dict().items()})
    for each in (net, fresh[0]):
        program(each, Device.preset("techA"))
    assert torch.equal(fresh(x), net(x))
    fresh.load_state_dict(fresh.state_dict())
    fresh[0].later.mask.zero_()
    with pytest.raises(ValueError, match="what it is made of has changed"):
        program(fresh, Device.preset("techA"))


def test_biases_are_no_state_and_copies_work_after_a_pass_with_gradients():
    x = seeded((3, 5, 8))
    net = convert(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1), W8A8, x)
    y = net(x)
    assert torch.equal(copy.deepcopy(net)(x), y)
    assert not any("bias" in key.split(".crossbar")[-1] for key in net.state_dict() if ".crossbar" in key)
    shared = Of(lambda s, x: F.linear(F.linear(x, s.w, s.b), s.w, s.b * 2), w=nn.Parameter(seeded((6, 6))), b=nn.Parameter(seeded((6,), 1)))
    equal_to_float(shared, seeded((8, 6)))


def test_products_that_were_not_seen_are_told():
    net = convert(Of(lambda s, x: F.linear(x, s.w[:, :x.shape[1]]), w=nn.Parameter(seeded((4, 8)))), W8A8, seeded((8, 6)))
    with pytest.warns(RuntimeWarning, match="a product with w that was not seen"):
        net(seeded((2, 5)))


@pytest.mark.parametrize("rows", [16, 17])
def test_parts_of_a_weight_are_told_apart_by_an_index_of_few_numbers(rows):
    """Up to 16, so that a path stays a line; two longer ones of the same length are one way to come to two weights."""
    first = torch.arange(rows)
    net = Of(lambda s, x: F.linear(x, s.w[s.first]) + F.linear(x, s.w[s.second]), w=nn.Parameter(seeded((20, 6))), first=first,
             second=first.flip(0))
    if rows > 16:
        with pytest.raises(ValueError, match="a weight of several products that cannot be told apart"):
            convert(net, W8A8, seeded((8, 6)))
    else:
        assert [name for name, _ in crossbar_layers(convert(net, W8A8, seeded((8, 6))))] == ["crossbar_w_0", "crossbar_w_1"]


@pytest.mark.parametrize("product", [
    lambda s, x: F.conv_transpose2d(x, s.w, stride=2, output_padding=x.shape[2] % 2),  # as of a U-Net, by the size of its input
    lambda s, x: s.w[0, 0, :, :8 - x.shape[2]] @ x[0, 0, :8 - x.shape[2]], lambda s, x: F.conv2d(x, s.w.mT, padding=x.shape[2] % 2),
    lambda s, x: F.conv2d(x, s.w) if x.shape[2] == 4 else torch.einsum("nihw,oikl->no", x, s.w),
    lambda s, x: s.w[0, 0] @ x[0, 0] if x.shape[2] == 4 else torch.bmm(x[0, :, :4, :4], s.w[0])])
def test_a_seen_weight_in_another_product_is_told(product):
    net = convert(Of(product, w=nn.Parameter(seeded((1, 1, 4, 4)))), W8A8, seeded((1, 1, 4, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(seeded((1, 1, 4, 4)))
    with pytest.warns(RuntimeWarning, match="a product with w that was not seen"):
        net(seeded((1, 1, 5, 5)))


def test_products_with_what_is_computed_from_a_weight_are_told_too():
    """Whichever was seen: the weight, or what becomes of it; not products of weights, nor with what follows from the input too."""
    twice = Of(lambda s, x: F.linear(x, s.w if len(x) > 2 else 2 * s.w - s.w.mean()), w=nn.Parameter(seeded((4, 8))))
    for seen, not_seen in ((8, 2), (2, 8)):
        net = convert(twice, W8A8, seeded((seen, 8)))
        with pytest.warns(RuntimeWarning, match="a product with w that was not seen"):
            net(seeded((not_seen, 8)))
    norm = Of(lambda s, x: F.linear(x, s.w) + (2 * s.w @ s.w.abs().T).sum() + (x[:, None] * s.w).sum(-1)
              + F.linear(x, x[:4] * s.w).sum(), w=nn.Parameter(seeded((4, 8))))
    net = convert(norm, W8A8, seeded((8, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(seeded((8, 8)))
        assert all(type(value) is torch.Tensor for value in net.state_dict().values())


def test_parts_of_a_weight_in_another_order_of_memory():
    x = seeded((2, 3, 6, 6))
    net = convert(Of(lambda s, x: F.conv2d(x, s.w[:4]) + F.conv2d(x, s.w[4:]), w=nn.Parameter(seeded((8, 3, 3, 3), 1))), W8A8, x)
    y = net(x)
    torch.testing.assert_close(net.to(memory_format=torch.channels_last)(x), y)
    net.load_state_dict({key: -value if key == "w" else value for key, value in net.state_dict().items()})
    assert not torch.equal(net(x), y)


@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("assign", [False, True])
def test_parts_of_a_weight_in_another_order_of_memory_are_those_of_now(passes, assign):
    x = seeded((2, 3, 6, 6))
    net = convert(Of(lambda s, x: F.conv2d(x, s.w[:4]) + F.conv2d(x, s.w[4:]), w=nn.Parameter(seeded((8, 3, 3, 3), 1))), W8A8, x)
    codes = [layer.w_codes().int() for _, layer in crossbar_layers(net)]
    net.to(memory_format=torch.channels_last)
    for _ in range(passes):
        net(x)
    if assign:
        net.load_state_dict({"w": -net.w.detach()}, strict=False, assign=True)
    else:
        net.w.data.neg_()
    for before, (_, layer) in zip(codes, crossbar_layers(net)):
        assert torch.equal(layer.w_codes().int(), 254 - before)  # 2 m - W, m = 2^7 - 1


def test_a_weight_whose_sign_is_turned_by_a_view():
    x, w = seeded((8, 6)), seeded((4, 6), 1)
    net = convert(Of(lambda s, x: F.linear(x, torch._neg_view(s.w)), w=nn.Parameter(w.clone())), W8A8, x, correct="none")
    wanted = convert(Of(lambda s, x: F.linear(x, s.w), w=nn.Parameter(-w)), W8A8, x, correct="none")
    assert torch.equal(net(x), wanted(x))
    net.w.data.neg_()
    with pytest.raises(ValueError, match="what it is made of has changed"):
        program(net, Device.preset("techA"))


def test_rounding_leaves_embeddings_alone():
    x = torch.arange(22).view(2, 11) % 11
    net = convert(Tied(), CrossbarSpec(3, 8, adc_range="ideal"), x, rounding="gptq", first_last_bits=None)
    assert torch.equal(net.embedding(x), Tied().embedding(x)) and "embedding: rounded to nearest" in str(net.crossbar_report)


def test_names_by_which_layers_are_skipped():
    x = torch.arange(22).view(2, 11) % 11
    for skip in (["head"], ["embedding"], "he*"):
        assert [name for name, _ in crossbar_layers(convert(Tied(), W8A8, x, skip=skip))] == ["block.crossbar"]
    with pytest.raises(ValueError, match=r"^skip has 'nosuch\*', which fits no product with a weight$"):
        convert(Tied(), W8A8, x, skip=["nosuch*"])
    small = Small()
    small.aux = nn.Linear(4, 4)  # a head that serves in training alone is in no product, and may be named all the same
    names = [[name for name, _ in crossbar_layers(convert(small, W8A8, seeded((2, 3, 6, 6)), skip=skip))] for skip in ([], ["aux*"], "aux")]
    assert len(names[0]) == 3 and names[0] == names[1] == names[2]
    for slip in ("stem.bias", "norm*"):
        with pytest.raises(ValueError, match="which fits no product with a weight$"):
            convert(small, W8A8, seeded((2, 3, 6, 6)), skip=[slip])
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = convert(encoder, CrossbarSpec(4, 4), seeded((3, 5, 8)), skip=["linear1"],
                  specs={"self_attn.in_proj_weight.1": CrossbarSpec(5, 5)})
    assert [layer["bits"] for layer in net.crossbar_report.layers] == [[8, 8], [5, 5], [8, 8], [4, 4], [8, 8]]


def test_images_are_left_as_they_were():
    x = seeded((8, 6))
    before = x.clone()
    convert(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)), CrossbarSpec(4, 4), x)
    assert torch.equal(x, before)
    with torch.inference_mode():
        net = convert(nn.Sequential(nn.Linear(6, 3)), CrossbarSpec(4, 4), seeded((8, 6)), qat=True)
    net(x).sum().backward()


def test_types_of_corrections_and_empty_inputs():
    net = convert(nn.Sequential(nn.Linear(6, 6)), W8A8, seeded((8, 6))).bfloat16()
    assert of(net, "0").quant_gain.dtype == torch.float32
    for name, shape in (("tokens", (5, 0, 20)), ("conv3d", (0, 4, 7, 6, 6)), ("transposed2d", (0, 6, 5, 4)), ("conv1d", (0, 6, 17))):
        module = MODULES[name][0]
        assert convert(module, W8A8, seeded(MODULES[name][1]))(torch.zeros(shape)).shape == module(torch.zeros(shape)).shape
    turned = convert(Of(lambda s, x: x @ s.w, w=nn.Parameter(seeded((6, 4)))), W8A8, seeded((8, 6)))
    assert turned(torch.zeros(2, 0, 6)).shape == (2, 0, 4)


def test_the_largest_weight_is_trained_too():
    net = convert(nn.Sequential(nn.Linear(64, 256, bias=False)), W8A8, seeded((8, 64)), qat=True, weight_scale="max", activations="max")
    net(seeded((8, 64))).sum().backward()
    assert (net[0].weight.grad != 0).all()


def test_a_learned_query_is_named():
    net = Of(lambda s, x: s.l(x) + s.p(torch.arange(6.0)), p=nn.Linear(6, 3), l=nn.Linear(6, 3))
    for skip in ([], ["p"]):  # it is digital anyway, and may be named
        report = convert(net, W8A8, seeded((8, 6)), skip=skip).crossbar_report
        assert report.digital == {"p": "a product whose input is the same for every image"}


def test_products_of_parameters_alone_are_named():
    """Such as a learned query that a linear layer turns: no crossbar does it, and it is a product of matrices."""
    net = Of(lambda s, x: s.l(x) + s.p(s.q), q=nn.Parameter(seeded((1, 5))), p=nn.Linear(5, 3), l=nn.Linear(6, 3))
    report = convert(net, W8A8, seeded((8, 6))).crossbar_report
    assert report.digital == {"q": "a product of parameters alone", "p": "a product of parameters alone"} and not report.unused
    assert convert(net, W8A8, seeded((8, 6)), skip=["p"]).crossbar_report.digital == report.digital


@pytest.mark.parametrize("images, message", [
    ([torch.zeros(2, 3, 6, 6), torch.zeros(2, 3, 8, 8)], r"^the images have several sizes \(\[3, 6, 6\], \[3, 8, 8\]\)"),
    (None, "^there are no images to convert with"), (torch.tensor(1.0), "^there are no images to convert with")])
def test_images_of_no_use(images, message):
    with pytest.raises(ValueError, match=message):
        convert(Small(), W8A8, images)


# -- what a trace must not miss


@pytest.mark.parametrize("shape", [(32, 512, 64), (32, 64, 32, 32), (32, 197, 768), (32, 3, 224, 224), (2**17, 8), (7, 5, 3)])
def test_a_sample_has_values_of_every_channel_row_and_column(shape):
    found = sampled(torch.arange(torch.Size(shape).numel())).long()
    assert len(found) == min(SAMPLE, torch.Size(shape).numel()) or 2 * len(found) > SAMPLE
    for size, places in zip(shape, torch.unravel_index(found, shape)):
        assert len(places.unique()) == min(size, len(found))


@pytest.mark.parametrize("layer, shape", [(nn.Linear(64, 16), (32, 512, 64)), (nn.Conv2d(64, 8, 3, padding=1), (32, 64, 32, 32))])
def test_scales_are_not_those_of_the_first_column(layer, shape):
    x = seeded(shape).relu()
    x[..., 0] *= 0.01
    with torch.no_grad():
        wanted, found = layer(x), convert(layer, W8A8, x, correct="none")(x)
    assert (found - wanted).square().sum() < 1e-3 * wanted.square().sum()  # 30 dB; 8-bit scales of all values have 37


class Written(nn.Module):
    """Tensors that follow from nothing are filled with what follows from the input."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head, self.way = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4), way

    def forward(self, x):
        y = torch.zeros(len(x), 16)
        if self.way == "sum":
            for layer in (self.first, self.second):
                y += layer(x)
        elif self.way == "parts":
            y[:, :8], y[:, 8:] = self.first(x)[:, :8], self.second(x)[:, 8:]
        elif self.way == "view":
            y.view(-1, 2, 8)[:, 1].copy_(self.first(x)[:, :8] + self.second(x)[:, 8:])
        else:
            torch.add(self.first(x), self.second(x), out=y)
        return self.head(torch.relu(y))


@pytest.mark.parametrize("way", ["sum", "parts", "view", "out"])
def test_what_is_written_in_place_follows_from_the_input(way):
    x, model = seeded((32, 8)), Written(way)
    net = convert(model, W8A8, x)
    assert len(crossbar_layers(net)) == 3 and not net.crossbar_report.digital
    with torch.no_grad():
        assert F.cosine_similarity(net(x).flatten(), model(x).flatten(), dim=0) > 0.999


@pytest.mark.parametrize("lookup", ["function", "index"])
def test_gptq_leaves_a_weight_that_is_looked_up(lookup):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.middle = nn.Parameter(torch.randn(50, 32)), nn.Linear(32, 32)

        def forward(self, x):
            words = F.embedding(x, self.words) if lookup == "function" else self.words[x]
            return F.linear(torch.tanh(self.middle(words)).mean(1), self.words)

    model = Tied()
    net = convert(model, CrossbarSpec(2, 8, adc_range="ideal"), torch.randint(0, 50, (64, 6)), rounding="gptq", first_last_bits=None)
    assert torch.equal(net.words, model.words) and not torch.equal(net.middle.weight, model.middle.weight)
    assert net.crossbar_report.notes == ["words: rounded to nearest, as GPTQ's result cannot be written into its weight"]


def test_gptq_leaves_a_weight_that_stands_in_two_places():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    net = convert(model, CrossbarSpec(2, 8, adc_range="ideal"), seeded((64, 6)), rounding="gptq", first_last_bits=None)
    assert torch.equal(net[0].weight, model[0].weight) and net.crossbar_report.notes == [
        "0: rounded to nearest, as GPTQ's result cannot be written into its weight"]


def test_a_kernel_that_is_a_turned_view():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(seeded((8, 3, 3, 5)))

        def forward(self, x):
            return F.conv2d(x, self.kernel.transpose(2, 3))

    x, model = seeded((4, 3, 9, 9)), Turned()
    net = convert(model, CrossbarSpec(8, 8, adc_bits=8, adc_range="full"), x)
    with torch.no_grad():
        assert (net(x) - model(x)).square().mean() < 0.01 * model(x).square().mean()
    count(net, x)


def test_twos_complement_has_digits_of_one_bit_whoever_sets_them():
    x, wide = seeded((8, 6)), CrossbarSpec(8, 8, dac_bits=2, adc_range="full", adc_bits=8)
    for give in (lambda: convert(nn.Linear(6, 4), wide, x, inputs="twos"),
                 lambda: convert(nn.Linear(6, 4), W8A8, x, inputs="twos", specs={"*": wide}),
                 lambda: set_spec(convert(nn.Linear(6, 4), W8A8, x, inputs="twos"), wide)):
        with pytest.raises(ValueError, match="^inputs 'twos' needs dac_bits 1, because"):
            give()
    convert(nn.Linear(6, 4), wide, x.abs(), inputs="twos")  # no input is below zero


def test_ternary_inputs_take_two_rows_of_cells_each():
    x, linear = seeded((8, 6)), nn.Linear(6, 4)
    with pytest.raises(ValueError, match="^rows is 576 with inputs 'ternary', and an array of this layer has 513 of them; "
                                         "allowed are at most 512$"):
        convert(nn.Linear(513, 4), CrossbarSpec(8, 8, rows=576), seeded((8, 513)), inputs="ternary")
    net = convert(linear, CrossbarSpec(4, 4, rows=8, adc_range="full"), x, inputs="ternary")
    for options in (dict(wires=Wires("gate", 1.0)), dict(read_noise=np.array([0.0, 0.5]))):
        with pytest.raises(ValueError, match="^inputs 'ternary' have no gate access and no read noise that grows with conductance"):
            program(net, Device.preset("techA"), **options)
        assert crossbar_layers(net)[0][1].chip is None
    program(net, Device.preset("techA"), wires=Wires("gate"), read_noise=0.5)
    net(x)


def test_full_ranges_of_ternary_inputs_hold_the_reads_of_nominal_cells():
    """Of either sign in each row, in the fuller of two arrays; here all cells have twice their levels."""
    spec = CrossbarSpec(4, 4, cell_bits=2, rows=8, adc_bits=4, adc_range="full")
    net = convert(nn.Linear(12, 8), spec, seeded((16, 12)), inputs="ternary", first_last_bits=None)
    [(_, layer)] = crossbar_layers(net)
    ideal = layer.ideal_cells()
    twice = Cells(2 * ideal.values, 2 * ideal.reference, ideal.fraction_bits)
    layer.set_cells(twice, twice)
    size = ((twice.values - twice.reference[..., None]).abs() * twice.unit)[:, 0]
    most = torch.maximum(size[:, :8].sum(1), size[:, 8:].sum(1)).amax(1)
    mapped = layer.mapped()
    low, high = mapped.adc_delta * mapped.adc_q_min, mapped.adc_delta * (mapped.adc_q_min + 15)
    assert (low <= -most).all() and (high >= most).all() and (mapped.adc_delta <= 1.2 * most / 7).all()


@pytest.mark.parametrize("mapping, rows, channels", [("im2col", 576, 27), ("im2col", 1024, 512), ("tap", 1024, 300)])
def test_arrays_of_ternary_inputs_may_be_as_tall_as_their_layer_needs(mapping, rows, channels):
    """Rows that a layer does not use need no room for a second sign: the same as on arrays that it fills."""
    x, model = seeded((8, channels, 1, 2)), nn.Conv2d(channels, 4, (1, 1 + (mapping == "tap")))
    spec = CrossbarSpec(8, 8, mapping=mapping, rows=rows)
    found = [convert(model, each, x, inputs="ternary")(x) for each in (spec, replace(spec, rows=channels))]
    assert torch.equal(*found)


def test_a_macro_whose_reads_have_millions_of_values(monkeypatch):
    """576 rows, pairs of 7-bit cells, 8-bit digits: a bit line holds W itself, and a read is the whole sum of an array."""
    monkeypatch.setattr(adc, "MOST_TERMS", 2**22)
    x, model = seeded((64, 600)), nn.Linear(600, 5, bias=False)
    net = convert(model, CrossbarSpec(8, 8, 7, 8, 576, "im2col", dac_bits=8, weights="pair"), x.split(32), correct="none")
    [(_, layer)] = crossbar_layers(net)
    assert layer.mapped("ideal").bins.shift == 1 and net.crossbar_report.sqnr_db["hardware"] > 30
    a, w = (x / layer.act_quant.scale).round().clamp(*layer.act_quant.window).double(), layer.w_codes()[:, :, 0, 0].double().T - 127
    delta, q_min = layer.adc_delta.item(), layer.adc_q_min.item()
    total = 0
    for sign, codes in ((1, a.clamp_min(0)), (-1, (-a).clamp_min(0))):
        for rows in (slice(576), slice(576, None)):
            total = total + sign * delta * (codes[:, rows] @ w[rows] / delta).round().clamp(q_min, q_min + 255)
    wanted = total * layer.act_quant.scale.double() * layer.weight_quant.scale.double()
    torch.testing.assert_close(net(x), wanted.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", ["offset", "pair"])
def test_cells_and_arrays_are_the_same_in_any_encoding(weights):
    """Both signs of a ternary input drive one word line of one row of cells: no array is longer, nor its wires."""
    x, linear, spec = seeded((16, 12)), nn.Linear(12, 8), CrossbarSpec(4, 4, rows=8, adc_range="full", weights=weights)
    found = []
    for inputs in ENCODINGS:
        net = convert(linear, spec, x, first_last_bits=None, inputs=inputs)
        program(net, Device.preset("techA", time="1d"), 1, wires=Wires(wire_ohm=50.0, row_ohm=50.0))
        [(_, layer)] = crossbar_layers(net)
        assert (net.crossbar_report.layers[0]["row_blocks"], net.crossbar_report.layers[0]["fill"]) == (2, 0.75)
        found.append(layer.chip.cells.values)
    assert all(torch.equal(values, found[0]) for values in found[1:])


@pytest.mark.parametrize("how", ["program", "set_cells", "files"])
@pytest.mark.parametrize("inputs", ENCODINGS)
def test_a_chip_stays_what_it_is_when_the_weight_changes(inputs, how, tmp_path):
    """In training, where it lags behind, what is added for it digitally, too. In evaluation it would answer for another network."""
    x, device = seeded((16, 12)) - 0.5, Device.preset("techA")
    net = convert(nn.Linear(12, 5), CrossbarSpec(4, 4, adc_bits=5, rows=8), x, first_last_bits=None, inputs=inputs, train="adc").eval()
    program(net, device, 1)
    if how == "set_cells":
        cells = net.crossbar.cells()
        program(net, None)
        net.crossbar.set_cells(cells)
    elif how == "files":
        write_cells(tmp_path, net, "techA", 1)
        read_cells(tmp_path, net, "techA", 1)
    wanted = net(x)
    net.weight.data.neg_()
    net.crossbar.set_cells(net.crossbar.cells())
    for each in (net, copy.deepcopy(net)):
        with pytest.raises(ValueError, match="programmed with other weights"):
            each(x)
        assert torch.equal(each.train()(x), wanted)
    program(net.eval(), device, 1)
    assert not torch.equal(net(x), wanted)


@pytest.mark.parametrize("inputs", ENCODINGS)
def test_without_adcs_cells_of_a_chip_count_all_the_same(inputs):
    """In float64 from the cells that the chip has; what an offset adds is taken off by the weights as they should be."""
    x, linear, spec = seeded((16, 12)), nn.Linear(12, 8), CrossbarSpec(4, 4, cell_bits=2, rows=8, adc_range="ideal")
    net = convert(linear, spec, x, first_last_bits=None, correct="none", inputs=inputs)
    quiet = net(x)
    program(net, Device.preset("techA", time="1d"), 1)
    [(_, layer)] = crossbar_layers(net)
    cells = layer.chip.cells
    low, high = (cells.values[:, 0] - cells.reference[:, 0, :, None]).double() * cells.unit
    codes = (x / layer.act_quant.scale).round().clamp(*layer.act_quant.window).double()
    shift = layer.act_quant.window[0] if inputs == "offset" else 0
    weights = layer.w_codes()[:, :, 0, 0].T.double() - 7
    wanted = ((codes - shift) @ (low + 4 * high) + shift * weights.sum(0)) * layer.act_quant.scale * layer.weight_quant.scale + linear.bias
    torch.testing.assert_close(net(x), wanted.float(), rtol=1e-5, atol=1e-5)
    assert (net(x) - quiet).norm() > 0.01 * quiet.norm()


def test_no_correction_is_none():
    net = convert(Small(), CrossbarSpec(4, 4, adc_bits=2, rows=8), seeded((8, 3, 6, 6)), correct="none")
    for _, layer in crossbar_layers(net):
        assert all((gain == 1).all() for gain in (layer.quant_gain, layer.adc_gain))
        assert not any(offset.any() for offset in (layer.quant_offset, layer.adc_offset))


@pytest.mark.parametrize("layer, shape, products", [
    (nn.ConvTranspose2d(2, 4, 3, stride=2), (3, 2, 8, 8), 3 * 2 * 64 * 4 * 9), (nn.Conv3d(2, 4, 3), (3, 2, 6, 8, 8), 3 * 4 * 4 * 36 * 54),
    (nn.Conv2d(2, 4, 3, stride=2, padding=1), (3, 2, 8, 8), 3 * 4 * 16 * 18)])
@pytest.mark.parametrize("inputs", ["phases", "offset"])
def test_costs_count_the_products_and_numbers_of_the_layer(layer, shape, products, inputs):
    """Not the zeros between its pixels or around them, and each plane once."""
    x = seeded(shape)
    net = convert(nn.Sequential(layer), CrossbarSpec(8, 8, adc_range="full", adc_bits=8), x, inputs=inputs)
    [found] = count(net, x).layers.values()
    assert (found.multiplications, found.inputs) == (products, x[0].numel())  # of all images, of one
    assert net.crossbar_report.layers[0]["multiplications"] == products  # of the same images


def test_noise_of_windows_does_not_depend_on_the_batch():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):  # four windows of 2 x 2 pixels beside each other in the batch
            x = x.view(-1, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
            return self.layer(x).reshape(-1, 128)

    x = seeded((6, 4, 4, 8))
    net = convert(Windows(), CrossbarSpec(8, 8, adc_range="full", adc_bits=10), x)
    program(net, Device.preset("neurosim_tsinghua_130nm"), 0, adc_noise=1.0)
    with image_numbers(0, 6):
        whole = net(x)
    parts = []
    for first, size in ((0, 1), (1, 3), (4, 2)):
        with image_numbers(first, size):
            parts.append(net(x[first:first + size]))
    assert torch.equal(torch.cat(parts), whole)
    twice = net(x[:1].expand(2, -1, -1, -1))
    assert not torch.equal(twice[0], twice[1])  # images have noise of their own


def test_noise_is_another_in_each_call_of_a_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return torch.stack([self.layer(x), self.layer(x)], 1)

    x = seeded((6, 8))
    net = convert(Twice(), CrossbarSpec(8, 8, adc_range="full", adc_bits=10), x)
    program(net, Device.preset("neurosim_tsinghua_130nm"), 0, adc_noise=1.0)
    with image_numbers(3):
        whole = net(x)
    assert not torch.equal(whole[:, 0], whole[:, 1])
    for i in range(6):
        with image_numbers(3 + i):
            assert torch.equal(net(x[i:i + 1])[0], whole[i])
    outside = net(x)  # where nothing says which images they are, all calls are the first
    assert torch.equal(outside[:, 0], outside[:, 1])
    own = nn.Sequential(QLinearDoreFa(8, 8, spec=CrossbarSpec(adc_range="full", adc_bits=10), alpha_init=1.0))  # and of layers that
    program(own, Device.preset("neurosim_tsinghua_130nm"), 0, adc_noise=1.0)  # are no module of others
    with image_numbers(0):
        first, second = own(x), own(x)
    with image_numbers(0):
        assert torch.equal(own(x), first) and not torch.equal(first, second)


def test_layers_are_called_as_their_modules_too():
    x = seeded((8, 3, 6, 6))
    for name in ("0", "0.crossbar"):
        net = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), W8A8, x,
                      specs={name: CrossbarSpec(4, 4, adc_range="ideal")}, first_last_bits=None)
        assert [layer.weight_quant.wbit for _, layer in crossbar_layers(net)] == [4, 8]
        setting = Setting(CrossbarSpec(8, 8, adc_bits=4), per_layer={name: {"adc_bits": 6}})
        assert [setting.spec_of(layer).adc_bits for layer, _ in crossbar_layers(net)] == [6, 4]
        put(net, setting)
        assert [layer.spec.adc_bits for _, layer in crossbar_layers(net)] == [6, 4]


def test_the_report_speaks_of_adcs_where_there_are_some():
    x = seeded((8, 3, 6, 6))
    for adc_range in ("ideal", "calibrated"):
        text = str(convert(nn.Conv2d(3, 4, 3), CrossbarSpec(8, 8, adc_bits=3, adc_range=adc_range), x).crossbar_report)
        assert ("with ADCs" in text, "with its ADC" in text) == (adc_range == "calibrated",) * 2 and "quantized: " in text


# ---- what networks do now and then ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [6, 10])
@pytest.mark.parametrize("inputs", ["relu", "signed"])
def test_inputs_of_another_width_are_refused_as_pytorch_does(channels, inputs):
    x = torch.randn(64, 8)
    for module, wrong in ((nn.Linear(8, 5), (2, channels)), (nn.Conv1d(8, 5, 1), (2, channels, 3))):
        images = x if isinstance(module, nn.Linear) else x.unsqueeze(2)
        net = convert(module, CrossbarSpec(4, 4, adc_bits=3), images.relu() if inputs == "relu" else images)
        with pytest.raises(ValueError, match=f"the input has {channels} channels; 8 are expected"):
            net(torch.rand(wrong))


class Weighs(nn.Module):
    """Two layers, of which the first is what a function makes of it."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(8, 8), nn.Linear(8, 4), function
        self.mask, self.lost, self.again = (torch.rand(8, 8) > 0.3).float(), [nn.Linear(8, 8)], (self.first.weight,)

    def forward(self, x):
        return self.last(self.function(self, x).relu())


@pytest.mark.parametrize("function", [
    lambda net, x: F.linear(x, net.first.weight.to(x.dtype), net.first.bias), lambda net, x: F.linear(x, net.first.weight.contiguous()),
    lambda net, x: F.linear(x, net.first.weight.type_as(x)), lambda net, x: F.linear(x, net.first.weight.float().to(x.device)),
    lambda net, x: F.linear(x, net.first.weight.t().contiguous().t()), lambda net, x: F.linear(x, net.first.weight * net.mask),
    lambda net, x: F.linear(net.first(x), net.first.weight.detach())],
    ids=["to", "contiguous", "type_as", "float", "turned", "mask", "detach"])
def test_weights_on_their_way_to_a_product(function):
    """They are on crossbars, their states are plain tensors, and can be loaded behind a pass in inference mode."""
    torch.manual_seed(0)
    net, x = Weighs(function), torch.randn(64, 8)
    made, file = convert(net, W8A8, x), io.BytesIO()
    assert made.crossbar_report.share == 1 and (made(x) - net(x)).abs().max() < 0.03 * net(x).abs().max()
    torch.save(made.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with torch.inference_mode():
        before = made(x)
    made.load_state_dict(state)
    assert torch.equal(made(x), before)


@pytest.mark.parametrize("function, words", [
    (lambda net, x: net.lost[0](x), "unregistered_8x8 cannot be put on crossbars: it is a product with a parameter that no module of the "),
    (lambda net, x: F.linear(net.first(x), net.again[0]), "first was put on crossbars, but the network does not use it there in 1 of 2 ")])
def test_products_that_would_stay_digital_unseen_are_refused(function, words):
    with pytest.raises(ValueError, match=words):
        convert(Weighs(function), W8A8, torch.randn(64, 8))
    if "unregistered" in words:
        made = convert(Weighs(function), W8A8, torch.randn(64, 8), skip=["unregistered_8x8"])
        assert made.crossbar_report.digital["unregistered_8x8"] == "skipped" and made.crossbar_report.share < 0.4


class Experts(nn.Module):
    """Each image goes to one of two layers."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        y, chosen = x.new_zeros(len(x), 4), x[:, 0] > 0
        y[chosen], y[~chosen] = self.one(x[chosen]), self.other(x[~chosen])
        return y


@pytest.mark.parametrize("spec", [W8A8, CrossbarSpec(8, 8, cell_bits=2, adc_bits=8)], ids=["ideal", "adc"])
def test_experts_that_no_image_of_the_correction_goes_to(spec):
    torch.manual_seed(0)
    net, x = Experts(), torch.randn(300, 8)
    x[:, 0] = x[:, 0].abs()
    x[-30:, 0] *= -1
    made = convert(net, spec, x)
    assert (made(x) - net(x)).abs().max() < 0.1
    with pytest.raises(ValueError, match="no image reaches other, so its inputs are not known; give more images, or skip="):
        convert(net, spec, x[:270])


def test_outputs_in_which_nothing_is_found_are_one_line():
    with pytest.raises(ValueError, match="the network returns a tuple, in which no tensor of real numbers can be found"):
        convert(nn.Sequential(nn.Linear(8, 4), Argmax()), W8A8, torch.randn(64, 8))


class Argmax(nn.Module):
    def forward(self, y):
        return (y.argmax(1),)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_copies_know_weights_that_are_computed(copied):
    """A product of a standardized weight is that of its layer in a copy, too."""
    x = seeded((6, 8))
    net = convert(Functional(), CrossbarSpec(2, 2, adc_range="ideal"), x, first_last_bits=None, correct="none")
    assert torch.equal(copied(net)(x), net(x))


def test_the_first_pattern_that_fits_counts():
    specs = {"stem": CrossbarSpec(3, 3, adc_range="ideal"), "*": CrossbarSpec(5, 5, adc_range="ideal")}
    net = convert(Small(), W8A8, seeded((4, 3, 6, 6)), specs=specs)
    assert [layer["bits"] for layer in net.crossbar_report.layers] == [[3, 3], [5, 5], [5, 5]]


def test_scales_of_weights_and_of_inputs_are_chosen_apart():
    x, linear = seeded((64, 16)), nn.Linear(16, 4)
    for weights, inputs in (("max", "mse"), ("mse", "max")):
        net = convert(linear, CrossbarSpec(3, 3, adc_range="ideal"), x, weight_scale=weights, activations=inputs, first_last_bits=None)
        layer = net.crossbar
        covers = torch.equal(layer.weight_quant.scale, linear.weight.detach().abs().amax(1) / 3)
        clips = float(x.abs().max()) > 1.01 * layer.act_quant.scale * max(-layer.act_quant.window[0], layer.act_quant.window[1])
        assert (covers, bool(clips)) == (weights == "max", inputs == "mse")


@pytest.mark.parametrize("options, message", [
    (dict(correct="channels"), "^correct is 'channels'; allowed are channel, none$"),
    (dict(weight_scale="kl"), "^weight_scale is 'kl'; allowed are mse, max, layer, or the scales of some layers by their names$"),
    (dict(activations="kl"), "^activations is 'kl'; allowed are mse, max$")])
def test_options_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        convert(nn.Linear(6, 4), W8A8, seeded((8, 6)), **options)


def test_noise_of_the_digit_that_counts_negative_is_its_own():
    """One slice, two digits: `n_0 - 2 n_1`, of variance 5."""
    x = seeded((200, 8))
    net = convert(nn.Linear(8, 64, bias=False), CrossbarSpec(2, 2, cell_bits=2, adc_bits=12, rows=8, adc_range="full"), x, inputs="twos",
                  first_last_bits=None, correct="none")
    program(net, Device("mine", "", 5.0, 65.0), 0)
    quiet = net(x)
    program(net, Device("mine", "", 5.0, 65.0), 0, adc_noise=1.0)
    noise = (net(x) - quiet) / (net.crossbar.act_quant.scale * net.crossbar.weight_quant.scale)
    assert noise.var().item() == pytest.approx(5, rel=0.1)


def test_hardware_of_more_bits_than_a_layer_has():
    """A layer has cells and digits of no more bits than its weights and inputs, whoever sets the hardware."""
    x, wide = seeded((8, 6)), CrossbarSpec(8, 8, cell_bits=8, dac_bits=8, adc_range="ideal")
    net = convert(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), CrossbarSpec(8, 8, adc_range="ideal"), x,
                  specs={"0": CrossbarSpec(4, 4, adc_range="ideal")})
    set_spec(net, wide)
    layers = [layer for _, layer in crossbar_layers(net)]
    assert [(layer.spec.w_bits, layer.spec.cell_bits) for layer in layers] == [(4, 4), (8, 8)]
    assert [layer.spec.dac_bits for layer in layers] == [layer.act_quant.bits for layer in layers] and layers[0].spec.dac_bits <= 4
    net(x)


@pytest.mark.parametrize("rows, inputs", [(128, "phases"), (3, "phases"), (3, "ternary"), (128, "offset")])
@pytest.mark.parametrize("engine", ["reference", "numba"])
def test_each_kernel_position_of_a_volume_has_arrays_of_its_own(engine, rows, inputs):
    """Reads of every position of a 3-d kernel, and of no more than `rows` channels of it, each a convolution in float64 with all other
    weights zero."""
    torch.manual_seed(0)
    model, x = nn.Conv3d(8, 4, (2, 3, 1), stride=(1, 2, 1), dilation=(2, 1, 1), groups=2, bias=False), seeded((2, 8, 5, 5, 4))
    spec = CrossbarSpec(4, 4, cell_bits=2, adc_bits=3, rows=rows)
    with set_engine(engine):
        net = convert(model, spec, x, inputs=inputs, first_last_bits=None, correct="none", activations="max")
        [(_, layer)] = crossbar_layers(net)
        layer.set_ranges([(1.5, -3), (2.0, -3)])
        found, [counts] = net(x), count(net, x).layers.values()
    a = (x / layer.act_quant.scale).round().clamp(*layer.act_quant.window).double()
    w = (model.weight / layer.weight_quant.scale.view(-1, 1, 1, 1, 1)).round().clamp(-7, 7).double() + 7
    lo = layer.act_quant.window[0]
    passes = {"phases": [(a.clamp_min(0), 1), ((-a).clamp_min(0), -1)], "ternary": [(a, 1)], "offset": [(a - lo, 1)]}[inputs]
    total, arrays, reads = lo * F.conv3d(torch.ones_like(a), w - 7, **how(model)) if inputs == "offset" else 0, 0, 0
    for z, k in itertools.product(range(4), range(2)):
        for place in itertools.product(range(2), range(3), range(1), range(0, 4, rows)):
            mask = torch.zeros_like(w)
            mask[:, place[3]:place[3] + rows, place[0], place[1], place[2]] = 1
            arrays += 2 * (z == k == 0)
            for codes, sign in passes:
                digit = codes.abs() // 2**z % 2 * codes.sign()
                p, n = (F.conv3d(digit, part * mask, **how(model)) for part in (w // 4**k % 4, torch.ones_like(w)))
                q = ((p - 7 // 4**k % 4 * n) / [1.5, 2.0][k]).round().clamp(-3, 4)
                total = total + sign * 2**z * 4**k * [1.5, 2.0][k] * q
                reads += 2 * q[:, 0].numel() * (z == k == 0)
    wanted = total * layer.act_quant.scale.double() * layer.weight_quant.scale.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    assert arrays == 2 * len(layer.arrays) == net.crossbar_report.layers[0]["row_blocks"] == events(counts, layer, 128, 1).arrays
    assert counts.reads["tap", rows, 1][0].sum() == reads


def how(conv):
    return dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups)


def test_an_unbatched_volume():
    module, x = MODULES["conv3d"][0], seeded(MODULES["conv3d"][1], 1)
    net = convert(module, W8A8, x)
    torch.testing.assert_close(net(x[1]), net(x)[1])


def test_noise_of_volumes_with_a_stride_is_the_same_in_every_batch():
    x = seeded((6, 2, 6, 4, 4))
    net = convert(nn.Conv3d(2, 3, 2, stride=(2, 1, 1), padding=(1, 0, 0)), CrossbarSpec(4, 4, adc_bits=8, rows=8), x, first_last_bits=None)
    program(net, Device.preset("techA"), 1, adc_noise=0.3)
    whole, parts = net(x), []
    for first, part in zip((0, 2), x.split((2, 4))):
        with image_numbers(first):
            parts.append(net(part))
    assert torch.equal(torch.cat(parts), whole)


def test_batched_products_of_activations_that_are_added_up_are_counted():
    net = Of(lambda s, x: torch.addbmm(torch.zeros(4, 4), s.layer(x).mT, s.layer(x)), layer=nn.Linear(6, 4))
    assert convert(net, W8A8, seeded((3, 5, 6)), strict=False).crossbar_report.between == 3 * 4 * 5 * 4


def test_multiplications_of_two_activations_are_said_of_one_image():
    report = convert(Of(lambda s, x: (lambda y: y.mT @ y)(s.layer(x)), layer=nn.Linear(6, 4)), W8A8, seeded((3, 5, 6))).crossbar_report
    assert "digital: 80 multiplications of two activations an example" in str(report)


def test_what_the_report_calls_quantized_has_no_adc():
    x, model = seeded((64, 12)), nn.Sequential(nn.Linear(12, 10))
    spec = CrossbarSpec(8, 8, adc_bits=2, rows=8, cell_bits=2)
    report = convert(model, spec, x).crossbar_report
    ideal = convert(model, replace(spec, adc_range="ideal"), x).crossbar_report
    assert report.sqnr_db["quantized"] == pytest.approx(ideal.sqnr_db["quantized"], abs=0.1)
    assert report.sqnr_db["hardware"] < report.sqnr_db["quantized"] - 10
    [layer], [without] = report.layers, ideal.layers
    assert layer["quantization_db"] == pytest.approx(without["quantization_db"], abs=0.1)
    assert layer["hardware_db"] < layer["quantization_db"] - 10


def test_the_report_says_how_inputs_drive_word_lines():
    x = seeded((8, 6))
    net = convert(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), W8A8, x, inputs="ternary")
    assert [layer["inputs"] for layer in net.crossbar_report.layers] == ["ternary", "unsigned"]


def test_many_matrices_that_enter_no_product():
    layers = [{"name": "a", "weights": 1, "multiplications": 1}]
    report = ConversionReport({}, 0, [f"w{i}" for i in range(8)], layers=layers)
    assert str(report).endswith("w4, w5 and 2 more")
    assert str(ConversionReport({}, 0, [f"w{i}" for i in range(6)], layers=layers)).endswith("w4, w5")


def test_products_that_are_skipped_count_in_the_share():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    report = convert(net, W8A8, seeded((8, 6)), skip=["1"]).crossbar_report
    assert report.digital_multiplications == 8 * 18 and report.share == 36 / 54


def test_products_that_are_digital_are_those_of_the_first_batch():
    assert convert(Einsum(), W8A8, seeded((96, 4)), skip=["mix"]).crossbar_report.digital_multiplications == 64 * 16


def test_a_skipped_product_of_a_weight_that_is_on_crossbars_too():
    """It is no surprise, and GPTQ leaves it the weight that it wants."""
    net = Of(lambda s, x: F.linear(x, s.w) + 2 * (x @ s.w.t()), w=nn.Parameter(seeded((6, 6), 1)))
    x = seeded((16, 6))
    made = convert(net, CrossbarSpec(2, 8, adc_range="ideal"), x, skip=["w.1"], rounding="gptq", first_last_bits=None)
    assert len(crossbar_layers(made)) == 1 and torch.equal(made.w.detach(), net.w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(x)


def test_training_mode_without_gradients_reads_the_arrays():
    x = seeded((16, 12))
    net = convert(nn.Linear(12, 5), CrossbarSpec(4, 4, adc_bits=2, rows=8), x, first_last_bits=None)
    wanted = net(x)
    with torch.no_grad():
        assert torch.equal(net.train()(x), wanted)


def test_weights_of_other_codes_without_ranges_leave_no_plan():
    x = torch.linspace(-1, 1, 40)[:, None] * torch.ones(6)
    spec = CrossbarSpec(8, 8, adc_bits=4, adc_plan="significance")
    net, other = (convert(nn.Linear(6, 3), spec, images, activations="max") for images in (x, x.abs()))
    assert len(net.crossbar.adc_bits_plan) != len(other.crossbar.adc_bits_plan)
    state = {key: value for key, value in net.state_dict().items() if "adc_" not in key}
    other.load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match="calibrate"):
        other(x)


def test_layers_are_printed_with_their_product():
    model = nn.Sequential(nn.Conv2d(3, 8, (3, 2), stride=2, padding=(1, 0)), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=2), nn.Flatten(),
                          nn.Linear(8 * 6 * 5, 5))
    net = convert(model, CrossbarSpec(4, 4, rows=128, adc_range="full", adc_bits=5), seeded((4, 3, 8, 6)), first_last_bits=None)
    assert [layer.extra_repr() for _, layer in crossbar_layers(net)] == [
        "conv2d, stride=(2, 2), padding=((1, 1), (0, 0)), weights [8, 3, 3, 2], 1-bit cells in 4 slices, 6 row blocks of up to 3 rows, "
        "5-bit ADC, full",
        "transposed conv2d, groups=2, weights [8, 4, 3, 3], 1-bit cells in 4 slices, 18 row blocks of up to 4 rows, 5-bit ADC, full",
        "linear, weights [5, 240, 1, 1], 1-bit cells in 4 slices, 2 row blocks of up to 128 rows, 5-bit ADC, full"]


def test_batches_with_a_tensor_of_no_numbers_or_of_complex_ones():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, extra):
            return self.linear(x)

    for extra in (torch.zeros(6, 0), torch.zeros(6, 2, dtype=torch.complex64)):
        assert convert(Net(), CrossbarSpec(8, 8), {"x": seeded((6, 4)), "extra": extra}).crossbar_report.images == 6


@pytest.mark.parametrize("act, words", [
    (lambda net: set_spec(net, CrossbarSpec()), "no layers on crossbars: convert"),
    (lambda net: program(net, Device.preset("techA")), "no layers on crossbars: convert"),
    (lambda net: add_weight_noise(net, 0.1), "no layers on crossbars: convert"),
    (lambda net: set_spec(net, {"adc_bits": 4}), "spec is a dict; give a CrossbarSpec"),
    (lambda net: convert(net, {"adc_bits": 4}, seeded((6, 4))), "spec is a dict; give a CrossbarSpec"),
    (lambda net: convert(net, seeded((6, 4)), CrossbarSpec()), "spec is a Tensor; give a CrossbarSpec"),
    (lambda net: convert(net, CrossbarSpec(w_bits=1, cell_bits=1), seeded((6, 4)), first_last_bits=None), "have 2 to 8 bits")])
def test_what_is_forgotten_or_confused_is_said(act, words):
    with pytest.raises(ValueError, match=words):
        act(nn.Sequential(nn.Linear(4, 3)))


def test_a_weight_of_nan_is_named():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    net[1].weight.data[0, 1] = float("nan")
    with pytest.raises(ValueError, match="^1: its weight holds NaN"):
        convert(net, CrossbarSpec(), seeded((6, 4)))
