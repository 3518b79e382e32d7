"""Layers on crossbars: against plain integer convolutions, against the older public algorithm, and calibration."""

import copy
import io
import tracemalloc
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import specs
from torch import nn
from torch.nn import functional as F

from models.quant import (ADC_BUFFERS, CrossbarSpec, Device, Qconv2d, Qconv2dDoreFa, QLinear, QLinearDoreFa, calibrate, collect_histograms,
                          correct, crossbar_layers, program, set_engine, set_spec, without_adc)
from models.quant.arrays import adc, mapping, plans
from models.quant.network import diagnostics
from models.quant.arrays.converter import Converter

pytestmark = pytest.mark.usefixtures("one_thread")


def input_codes(x, layer):
    """Activation codes of an input: the formula in float32."""
    alpha, top = layer.act_quant.act_alpha.detach(), 2**layer.spec.a_bits - 1
    return torch.round(torch.clamp(x, 0, alpha) * (top / alpha))


def weight_codes(layer):
    """Weight codes of a layer: the formula."""
    t = torch.tanh(layer.weight.detach())
    return torch.round((2**layer.spec.w_bits - 1) * (t / (2 * t.abs().max()) + 0.5))


def plain(x, layer, **geometry):
    """What a layer without an ADC gives: one convolution of integers in float64, then its scale and bias."""
    a, top = input_codes(x, layer).double(), 2**layer.spec.w_bits - 1
    w = 2 * weight_codes(layer).double() - top
    sums = F.conv2d(a, w, **geometry) if w.dim() == 4 else F.linear(a, w)
    scale = layer.act_quant.act_alpha.detach().double() / (2**layer.spec.a_bits - 1) / top * layer.out_scale
    y = sums.float() * scale.float()
    if layer.bias is not None:
        y = y + layer.bias.detach().view(-1, *[1] * (y.dim() - 2)) * layer.out_scale
    return y


def lossless_bits(spec, channels, taps):
    """ADC bits that hold every value of a read: with the unit as its step the ADC changes nothing."""
    rows = min(spec.rows, channels if spec.mapping == "tap" else channels * taps)
    widest = rows * (2 ** max(spec.digit_bits) - 1) * (2 ** max(spec.slice_bits) - 1)
    values = 2 * widest + 1 if spec.reference == "analog" else widest + 1
    return (values - 1).bit_length()


@st.composite
def convolutions(draw):
    """(spec, constructor arguments, input size) with an ADC just wide enough to be lossless."""
    spec = draw(specs(adc_ranges=["full"], rows=[1, 3, 4, 7, 16, 25, 32, 50, 128]))
    kernel = draw(st.sampled_from([1, 3, 5, (1, 3), (3, 1), (2, 2), (4, 3)]))
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    groups = draw(st.sampled_from([1, 1, 2, 3, "depthwise"]))
    channels = draw(st.integers(1, 30))
    groups = channels if groups == "depthwise" else groups
    stride = draw(st.sampled_from([1, 2, (2, 1), (1, 3)]))
    dilation = draw(st.sampled_from([1, 2, (1, 2)]))
    padding = draw(st.sampled_from([0, 1, 2, (1, 0), (0, 2), "same", "valid"]))
    padding = "valid" if padding == "same" and stride != 1 else padding
    channels = groups * -(-channels // groups)
    spec = replace(spec, adc_bits=1)
    bits = lossless_bits(spec, channels // groups, kh * kw)
    assume(bits <= 12)
    arguments = dict(in_channels=channels, out_channels=groups * draw(st.integers(1, 3)), kernel_size=kernel,
                     stride=stride, padding=padding, dilation=dilation, groups=groups, bias=draw(st.booleans()))
    dh, dw = (dilation, dilation) if isinstance(dilation, int) else dilation
    size = (dh * (kh - 1) + draw(st.integers(1, 5)), dw * (kw - 1) + draw(st.integers(1, 5)))
    return replace(spec, adc_bits=bits), arguments, size


@given(drawn=convolutions(), seed=st.integers(0, 2**31))
@settings(max_examples=300)
def test_lossless_convolution_is_the_integer_convolution(drawn, seed):
    """`ideal`, and `full` with one code for each value a read can have, equal one plain convolution bit for bit."""
    spec, arguments, size = drawn
    torch.manual_seed(seed)
    layer = Qconv2dDoreFa(**arguments, spec=spec, alpha_init=0.9)
    x = torch.rand(2, arguments["in_channels"], *size) * 1.3 - 0.2
    wanted = plain(x, layer, **{name: arguments[name] for name in ("stride", "padding", "dilation", "groups")})
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)
        layer.set_spec(replace(spec, adc_range="ideal", adc_bits=1))
        assert torch.equal(layer(x), wanted)


@given(spec=specs(adc_ranges=["full"], rows=[1, 7, 64, 100, 128, 300]), features=st.integers(1, 400),
       bias=st.booleans(), seed=st.integers(0, 2**31))
def test_lossless_linear_layer_is_the_integer_product(spec, features, bias, seed):
    bits = lossless_bits(spec, features, 1)
    assume(bits <= 12)
    torch.manual_seed(seed)
    layer = QLinearDoreFa(features, 5, bias=bias, spec=replace(spec, adc_bits=bits), alpha_init=0.9, out_scale=0.3)
    x = torch.rand(3, features) * 1.3 - 0.2
    wanted = plain(x, layer)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)
        layer.set_spec(replace(spec, adc_range="ideal"))
        assert torch.equal(layer(x), wanted)


def test_one_bit_less_is_not_lossless():
    """The lossless width above is the narrowest, so those tests do meet the ends of the range."""
    torch.manual_seed(0)
    for reference in ("analog", "digital"):
        spec = CrossbarSpec(rows=16, reference=reference, adc_range="full")
        bits = lossless_bits(spec, 16, 1)
        layer = QLinearDoreFa(16, 50, spec=replace(spec, adc_bits=bits - 1), alpha_init=1.0)
        x = torch.rand(20, 16) + 0.5
        with torch.no_grad():
            assert not torch.equal(layer(x), plain(x, layer))


@pytest.mark.parametrize("adc_range", ["calibrated", "full", "dynamic"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("dac_bits", [1, 3])
def test_layer_output_is_the_scaled_sum_of_the_oracle(reference, adc_range, dac_bits):
    """A coarse ADC with different steps in its slices: `y = s_a s_w 2 sum_k delta_k sum q` less the reference."""
    torch.manual_seed(0)
    spec = CrossbarSpec(4, 4, 3, 4, 16, reference=reference, adc_range=adc_range, dac_bits=dac_bits)
    layer = Qconv2dDoreFa(20, 6, 3, padding=1, spec=spec, alpha_init=1.0)
    layer.set_ranges([(2.3, -6 if reference == "analog" else 0), (0.9, -7 if reference == "analog" else 0)])
    mapped = layer.mapped()
    x = torch.rand(2, 20, 5, 4) * 1.2
    a = input_codes(x, layer).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    w = weight_codes(layer).numpy().astype(np.uint8)
    acc = oracle.accumulate(a, w, spec, mapped.geometry, [7, 1], mapped.adc_delta.tolist(), mapped.adc_q_min.tolist())
    if adc_range == "dynamic":
        unit = 0.5 if reference == "analog" else 1.0
        total = acc[0] * 2 * unit / 2**spec.adc_bits
    else:
        total = sum(plane * 2 * step for plane, step in zip(acc, oracle.steps(mapped.adc_delta.tolist())))
    if reference == "digital":
        total = total - 15 * oracle.integer_convolution(a, np.ones_like(w), spec, mapped.geometry, [1, 0])
    wanted = total * (1.0 / 15 / 15) + layer.bias.detach().numpy()
    with torch.no_grad():
        found = layer(x).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(found - plain(x, layer, padding=1).permute(0, 2, 3, 1).numpy()).max() > 1e-3  # the ADC is coarse


# ---- the older public algorithm --------------------------------------------------------------------------------------


def older_adc(v, adc_bits):
    lb, ub = v.min(), v.max()
    if lb == ub:
        return v
    step = (ub - lb) / 2**adc_bits
    return torch.clamp(torch.round((v - lb) / step), 0, 2**adc_bits - 1) * step + lb


def older_convolution(x, layer, stride=1, padding=0, dilation=1):
    """The algorithm of the original public code, in float32 as there.

    For each kernel position, block of 128 input channels and input bit: for each weight slice one convolution with the
    cells of that position and block alone, less one with an ideal reference column of cells at half scale; the ADC;
    shift and add.
    """
    spec, a, w = layer.spec, input_codes(x, layer), weight_codes(layer)
    w = w.view(*w.shape[:2], *(w.shape[2:] or (1, 1)))
    a = a.view(*a.shape[:2], *(a.shape[2:] or (1, 1)))
    conv = lambda bits, cells: F.conv2d(bits, cells, None, stride, padding, dilation)
    output = 0
    for i in range(w.shape[2]):
        for j in range(w.shape[3]):
            for first in range(0, w.shape[1], 128):
                mask = torch.zeros_like(w)
                mask[:, first:first + 128, i, j] = 1
                left = a.clone()
                for z in range(spec.a_bits):
                    bit, left = left % 2, torch.floor(left / 2)
                    rest, total = w.clone(), 0
                    for k in range(-(-spec.w_bits // spec.cell_bits)):
                        levels = 2 ** min(spec.cell_bits, spec.w_bits - spec.cell_bits * k)
                        cells, rest = rest % levels, torch.floor(rest / levels)
                        v = conv(bit, cells * mask) - conv(bit, (levels - 1) / 2 * mask)
                        total = total + older_adc(v, spec.adc_bits) * 2 ** (spec.cell_bits * k)
                    output = output + total * 2**z
    scale = layer.act_quant.act_alpha.detach() / (2**spec.a_bits - 1) * 2 / (2**spec.w_bits - 1)
    return output * scale + layer.bias.detach().view(-1, 1, 1)


@pytest.mark.parametrize("w_bits, a_bits, cell_bits, adc_bits", [
    (4, 4, 1, 6), (4, 4, 2, 6), (4, 4, 4, 5), (4, 4, 3, 6), (2, 3, 1, 4), (8, 8, 4, 6), (1, 1, 1, 3), (5, 2, 2, 8)])
@pytest.mark.parametrize("arguments", [
    dict(in_channels=150, kernel_size=3, padding=1), dict(in_channels=20, kernel_size=(1, 3), stride=2, dilation=2)])
def test_dynamic_convolution_equals_the_older_algorithm(w_bits, a_bits, cell_bits, adc_bits, arguments):
    torch.manual_seed(w_bits + 10 * cell_bits)
    spec = CrossbarSpec(w_bits, a_bits, cell_bits, adc_bits, adc_range="dynamic")
    layer = Qconv2dDoreFa(**arguments, out_channels=7, spec=spec, alpha_init=1.0)
    x = torch.relu(torch.randn(3, arguments["in_channels"], 6, 7)) * 0.7
    geometry = {name: arguments[name] for name in ("stride", "padding", "dilation") if name in arguments}
    with torch.no_grad():
        wanted = older_convolution(x, layer, **geometry)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        exact = plain(x, layer, **geometry)
        if (w_bits, cell_bits) != (1, 1):
            assert (wanted - exact).abs().max() > 1e-3 * exact.abs().max()  # the ADC did something


@pytest.mark.parametrize("cell_bits, adc_bits", [(1, 6), (2, 5), (3, 4)])
def test_dynamic_linear_layer_equals_the_older_algorithm(cell_bits, adc_bits):
    torch.manual_seed(cell_bits)
    spec = CrossbarSpec(cell_bits=cell_bits, adc_bits=adc_bits, adc_range="dynamic")
    layer = QLinearDoreFa(300, 20, spec=spec, alpha_init=1.0)
    x = torch.relu(torch.randn(9, 300))
    with torch.no_grad():
        wanted = older_convolution(x, layer).flatten(1)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_dynamic_range_of_equal_reads():
    """Where all reads of the batch are equal, they pass as they are."""
    layer = QLinearDoreFa(10, 1, spec=CrossbarSpec(adc_range="dynamic", adc_bits=1), alpha_init=1.0)
    x = torch.rand(1, 10)
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x, layer))


# ---- calibration -----------------------------------------------------------------------------------------------------


def network(spec, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Qconv2dDoreFa(6, 20, 3, padding=1, spec=spec, alpha_init=1.5), nn.BatchNorm2d(20), nn.ReLU(),
                         nn.Flatten(), QLinearDoreFa(20 * 16, 4, spec=spec, alpha_init=1.0)).eval()


def images(count=3, seed=0):
    return torch.rand(count, 6, 4, 4, generator=torch.Generator().manual_seed(seed)) * 1.5


@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("adc_bits", [2, 4, 6])
@pytest.mark.parametrize("cell_bits", [1, 3])
def test_after_minmax_nothing_clips_and_nothing_smaller_covers(reference, adc_bits, cell_bits):
    spec = CrossbarSpec(cell_bits=cell_bits, adc_bits=adc_bits, rows=32, reference=reference)
    model = network(spec)
    batches = [images(2, 1), images(3, 2)]
    histograms = calibrate(model, batches, "minmax", "layer")
    assert set(histograms) == {"0", "4"} == {name for name, _ in crossbar_layers(model)}
    unit = 0.5 if reference == "analog" else 1.0
    for name, layer in crossbar_layers(model):
        assert layer.adc_delta.dtype == torch.float64 and layer.adc_q_min.dtype == torch.int64
        assert layer.adc_delta.shape == layer.adc_q_min.shape == (len(spec.slice_bits),)
        (delta,), (q_min,) = set(layer.adc_delta.tolist()), set(layer.adc_q_min.tolist())
        u_min, _ = layer.mapped().u_span
        seen = np.flatnonzero(histograms[name].sum((0, 1))) + u_min
        assert len(seen) > 2
        v, top = seen * unit, q_min + 2**adc_bits - 1
        q = np.rint(v / delta)
        assert q_min <= q.min() and q.max() <= top and q_min <= 0 <= top
        assert delta * q_min <= v.min() + 1e-9 and v.max() <= delta * top + 1e-9
        if delta > unit:
            for other in range(1 - 2**adc_bits, 1):
                less = delta - 2**-6  # a step may be rounded up to a binary fraction
                assert less * other > v.min() or less * (other + 2**adc_bits - 1) < v.max()


def test_calibration_counts_reads_without_any_adc():
    """The second layer sees what an ideal first layer gives, whatever the first layer's ADC does; counts add up."""
    spec = CrossbarSpec(adc_bits=1, rows=8, cell_bits=2)
    model, batches = network(spec), [images(2, 1), images(3, 2)]
    first, second = (layer for _, layer in crossbar_layers(model))
    histograms = collect_histograms(model, batches)
    x = torch.cat(batches)
    with torch.no_grad():
        hidden = model[3](model[2](model[1](plain(x, first, padding=1))))
    for layer, inputs, found in ((first, x, histograms["0"]), (second, hidden[:, :, None, None], histograms["4"])):
        a = input_codes(inputs, layer).permute(0, 2, 3, 1).numpy().astype(np.uint8)
        w = weight_codes(layer).view(len(layer.weight), -1, *layer.mapped("ideal").kernel).numpy().astype(np.uint8)
        wanted = oracle.histogram(a, w, spec, layer.mapped("ideal").geometry, [3, 3])
        assert np.array_equal(found, wanted)
    arrays, pixels = 9 * 1, 5 * 16
    assert histograms["0"].sum() == arrays * pixels * 20 * 4 * 2


def test_calibration_leaves_everything_else_alone():
    model = network(CrossbarSpec(rows=32)).train()
    state = copy.deepcopy(model.state_dict())
    calibrate(model, [images()], correct=None)
    assert model.training and all(module.training for module in model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) or name.endswith(("adc_delta", "adc_q_min")), name
    assert all(layer.spec == CrossbarSpec(rows=32) for _, layer in crossbar_layers(model))
    assert not any(layer._forward_pre_hooks for _, layer in crossbar_layers(model))


def test_network_survives_a_failing_calibration():
    model = network(CrossbarSpec(rows=32)).train()
    calibrate(model, [images()])
    before = [(layer.spec, layer.adc_delta.tolist(), layer.adc_q_min.tolist()) for _, layer in crossbar_layers(model)]

    def failing():
        yield images()
        raise RuntimeError("disk unplugged")

    with pytest.raises(RuntimeError, match="unplugged"):
        calibrate(model, failing())
    with pytest.raises(ValueError, match="no images"):
        calibrate(model, [])
    assert before == [(layer.spec, layer.adc_delta.tolist(), layer.adc_q_min.tolist())
                      for _, layer in crossbar_layers(model)]
    assert model.training and not any(layer._forward_pre_hooks for _, layer in crossbar_layers(model))


def test_histograms_serve_several_adcs():
    """`histograms=` gives what a calibration from images gives, without images."""
    model = network(CrossbarSpec(rows=32))
    histograms = collect_histograms(model, [images()])
    for adc_bits in (3, 5):
        set_spec(model, CrossbarSpec(rows=32, adc_bits=adc_bits))
        calibrate(model, None, histograms=histograms)
        again = [layer.adc_delta.tolist() for _, layer in crossbar_layers(model)]
        calibrate(model, [images()])
        assert again == [layer.adc_delta.tolist() for _, layer in crossbar_layers(model)]


# ---- correction of the outputs -----------------------------------------------------------------------------------------


def outputs(model, x):
    """{name: output of the crossbar layer, float64 [out, values]} of the network in evaluation mode."""
    found = {}
    hooks = [layer.register_forward_hook(lambda layer, _, y, name=name: found.__setitem__(
        name, y.double().transpose(0, 1).flatten(1).numpy())) for name, layer in crossbar_layers(model)]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("cell_bits", [1, 3])
def test_corrected_channels_have_the_mean_and_deviation_without_adc(reference, cell_bits):
    """In the corrected network itself, layer behind layer; and what is written into a file gives the same outputs."""
    spec, x = CrossbarSpec(cell_bits=cell_bits, adc_bits=2, rows=32, reference=reference), images(40, 5)
    model = network(spec).train()
    calibrate(model, [x], correct=None)
    raw = outputs(model, x)
    with without_adc(model):
        wanted = outputs(model, x)
    model.train()
    kept = correct(model, x)
    assert model.training and not any(layer._forward_hooks for _, layer in crossbar_layers(model))
    found = outputs(model, x)
    for name, y in wanted.items():
        np.testing.assert_allclose(found[name].mean(1), y.mean(1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[name].std(1), y.std(1), rtol=1e-4)
        np.testing.assert_allclose(kept[name][0], y.std(1), rtol=1e-9)
        np.testing.assert_allclose(kept[name][1], y.mean(1), rtol=1e-9, atol=1e-12)
        assert np.abs(raw[name].std(1) / y.std(1) - 1).max() > 0.01  # there was something to correct
    first, layer = next(iter(wanted)), crossbar_layers(model)[0][1]
    gain, offset = (values.double().numpy()[:, None] for values in (layer.adc_gain, layer.adc_offset))
    np.testing.assert_allclose(found[first], gain * raw[first] + offset, rtol=1e-5, atol=1e-5)
    other = network(spec)
    other.load_state_dict(model.state_dict())
    assert all(np.array_equal(y, found[name]) for name, y in outputs(other, x).items())


def test_a_lossless_adc_needs_no_correction():
    spec = CrossbarSpec(adc_bits=6, rows=16)
    model = network(spec)
    for _, layer in crossbar_layers(model):
        layer.set_ranges([(0.5, -32)] * 4)
    correct(model, images())
    for _, layer in crossbar_layers(model):
        assert (layer.adc_gain == 1).all() and (layer.adc_offset == 0).all()


def test_a_correction_counts_for_calibrated_ranges_alone():
    """Loaded into a layer without an ADC it changes nothing; ranges that come without one drop it."""
    model, x = network(CrossbarSpec(adc_bits=2, rows=32)), images(20)
    calibrate(model, [x], correct=None)
    with without_adc(model):
        wanted = outputs(model, x)
    plain = copy.deepcopy(model.state_dict())
    correct(model, x)
    other = network(CrossbarSpec(adc_bits=2, rows=32, adc_range="ideal"))
    other.load_state_dict(model.state_dict())
    assert all(np.array_equal(y, wanted[name]) for name, y in outputs(other, x).items())
    with pytest.raises(ValueError, match="no layer of this network has an ADC"):
        correct(other, x)
    with pytest.raises(ValueError, match="belongs to calibrated ranges, not to adc_range 'full'"):
        correct(network(CrossbarSpec(adc_bits=2, rows=32, adc_range="full")), x)
    model.load_state_dict({key: value for key, value in plain.items() if not key.endswith(("gain", "offset"))}, strict=False)
    assert all((layer.adc_gain == 1).all() and (layer.adc_offset == 0).all() for _, layer in crossbar_layers(model))


@pytest.mark.parametrize("engine", ["reference", "numba"])
@pytest.mark.parametrize("bias", [False, True])
def test_gain_and_offset_of_a_layer_are_taken_behind_everything_else(engine, bias):
    torch.manual_seed(0)
    layer = QLinearDoreFa(40, 7, bias, spec=CrossbarSpec(adc_bits=3, rows=16), out_scale=0.3)
    conv = Qconv2dDoreFa(8, 6, 3, groups=2, bias=bias, spec=CrossbarSpec(adc_bits=3, rows=16))
    for module, x in ((layer, torch.rand(5, 40) * 10), (conv, torch.rand(2, 8, 5, 5) * 10)):
        calibrate(module, [x], correct=None)
        gain, offset = torch.rand(len(module.weight)) + 0.5, torch.randn(len(module.weight))
        with set_engine(engine), torch.no_grad():
            y = module(x)
            module.set_correction(gain, offset)
            shape = -1, *[1] * (y.dim() - 2)
            torch.testing.assert_close(module(x), gain.view(shape) * y + offset.view(shape), rtol=1e-5, atol=1e-5)
            assert torch.equal(module.double()(x.double()).float(), module.float()(x))
            assert module.half().adc_gain.dtype == torch.float32 and torch.equal(module.adc_gain, gain)
            assert torch.isfinite(module(x.half())).all()
            module.float()


def test_a_correction_that_makes_no_sense_is_refused():
    model = network(CrossbarSpec(adc_bits=2, rows=32))
    calibrate(model, [images()])
    with pytest.raises(ValueError, match="no images to correct with"):
        correct(model, images()[:0])
    layer = crossbar_layers(model)[0][1]
    correct(model, images(), {name: (100 * std, mean) for name, (std, mean) in correct(model, images()).items()})
    assert all((layer.adc_gain == 2).all() for _, layer in crossbar_layers(model))  # more would be noise
    with pytest.raises(ValueError, match="not a finite number"):
        layer.set_correction(torch.ones(20), torch.full((20,), float("nan")))


def test_a_channel_that_the_adc_makes_constant_keeps_its_mean():
    model = network(CrossbarSpec(adc_bits=1, rows=32))
    for _, layer in crossbar_layers(model):
        layer.set_ranges([(1e6, 0)] * 4)
    with without_adc(model):
        wanted = outputs(model, images())
    correct(model, images())
    for name, y in outputs(model, images()).items():
        assert np.isfinite(y).all()
        np.testing.assert_allclose(y.mean(1), wanted[name].mean(1), rtol=1e-4, atol=1e-5)


def test_a_correction_is_made_anew_or_from_kept_moments_and_belongs_to_its_ranges():
    x = images(20)
    model = network(CrossbarSpec(adc_bits=3, rows=32))
    calibrate(model, [x])
    wanted = correct(model, x)
    layers = [layer for _, layer in crossbar_layers(model)]
    first = [layer.adc_gain for layer in layers]
    assert correct(model, x, wanted) is wanted
    assert all(torch.equal(layer.adc_gain, gain) for layer, gain in zip(layers, first))
    with without_adc(model):
        assert all((layer.adc_gain == 1).all() for layer in layers)
    assert all(torch.equal(layer.adc_gain, gain) for layer, gain in zip(layers, first))
    calibrate(model, [x], correct=None)
    assert all((layer.adc_gain == 1).all() and (layer.adc_offset == 0).all() for layer in layers)
    with pytest.raises(ValueError, match=r"shape \[3\] is given for 20 channels"):
        layers[0].set_correction(torch.ones(3), torch.zeros(3))
    gain, offset = torch.full((20,), 1.5), torch.full((20,), 0.25)
    layers[0].set_correction(gain, offset)
    gain[0] = offset[0] = 7  # tensors that were handed over stay their owner's
    assert (layers[0].adc_gain == 1.5).all() and (layers[0].adc_offset == 0.25).all()


def test_unknown_rule_lists_the_known_ones():
    with pytest.raises(ValueError, match="^rule is 'best'; allowed are minmax, percentile, mse$"):
        calibrate(network(CrossbarSpec()), [images()], rule="best")


def test_uncalibrated_layer_says_what_to_do():
    model = network(CrossbarSpec())
    with pytest.raises(ValueError, match="not calibrated; call calibrate"):
        model(images())
    calibrate(model, [images()])
    model(images())
    set_spec(model, CrossbarSpec(adc_bits=5))
    with pytest.raises(ValueError, match="not calibrated"):
        model(images())


@pytest.mark.parametrize("ranges", [[(1.0, 1)], [(1.0, -64)], [(float("inf"), 0)], [(float("nan"), 0)], [(-1.0, 0)]])
def test_ranges_that_no_adc_has_are_refused(ranges):
    layer = QLinearDoreFa(4, 2, spec=CrossbarSpec(cell_bits=4))
    layer.set_ranges(ranges)
    with pytest.raises(ValueError, match="ADC range"):
        layer(torch.rand(1, 4))


def test_ranges_of_more_adc_bits_are_refused():
    """-32..31 loaded into 4 bits would be the codes -32..-17, without zero."""
    layer = QLinearDoreFa(4, 2, spec=CrossbarSpec(cell_bits=4))
    layer.set_ranges([(1.0, -32)])
    other = QLinearDoreFa(4, 2, spec=CrossbarSpec(cell_bits=4, adc_bits=4))
    other.load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match="not of an ADC of 4 bits"):
        other(torch.rand(1, 4))


# ---- state -----------------------------------------------------------------------------------------------------------


def test_ranges_are_saved_and_restored():
    spec = CrossbarSpec(rows=32, adc_bits=3)
    model = network(spec)
    calibrate(model, [images()])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = network(spec, seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(images(5)), model(images(5)))
    for (_, a), (_, b) in zip(crossbar_layers(model), crossbar_layers(other)):
        assert torch.equal(a.adc_delta, b.adc_delta) and torch.equal(a.adc_q_min, b.adc_q_min)
        assert b.adc_delta.dtype == torch.float64 and b.adc_q_min.dtype == torch.int64


def test_ranges_keep_their_precision():
    """A step of another type would move ties."""
    layer = QLinearDoreFa(6, 3, spec=CrossbarSpec(cell_bits=4))
    layer.set_ranges([(0.1, -5)])
    for change in (layer.float, layer.bfloat16, layer.double, lambda: layer.to("cpu", torch.float16)):
        assert change() is layer and layer.adc_delta.dtype == torch.float64 and layer.adc_delta.item() == 0.1
        assert layer.state_dict()["adc_delta"].item() == 0.1


def test_ranges_of_other_slices_are_refused():
    """A checkpoint with 4 slices does not fit a layer with 2."""
    model = network(CrossbarSpec(cell_bits=1))
    calibrate(model, [images()])
    with pytest.raises(RuntimeError, match="adc_delta"):
        network(CrossbarSpec(cell_bits=2)).load_state_dict(model.state_dict())


def test_new_spec_drops_ranges_and_refuses_other_bits():
    model = network(CrossbarSpec())
    calibrate(model, [images()])
    set_spec(model, CrossbarSpec(cell_bits=3))
    for _, layer in crossbar_layers(model):
        assert layer.adc_delta.tolist() == [0, 0] and layer.adc_q_min.tolist() == [0, 0]
    with pytest.raises(ValueError, match="5-bit weights and 4-bit activations, the layer 4 and 4"):
        set_spec(model, CrossbarSpec(w_bits=5))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: torch.load(saved(layer), weights_only=False)])
def test_layer_that_has_run_can_be_copied_and_pickled(copied):
    layer = QLinearDoreFa(6, 3, spec=CrossbarSpec(adc_range="full"), alpha_init=1.0)
    x = torch.rand(2, 6)
    with torch.no_grad():
        before = layer(x)
        other = copied(layer)
        assert torch.equal(other(x), before)
        other.weight.neg_()
        assert not torch.equal(other(x), before) and torch.equal(layer(x), before)


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("replace_weight", [
    lambda layer, new: setattr(layer, "weight", nn.Parameter(new)),
    lambda layer, new: setattr(layer.weight, "data", new),
    lambda layer, new: layer.weight.detach().copy_(new),
    lambda layer, new: nn.utils.vector_to_parameters(new.flatten(), [layer.weight]),
])
def test_a_replaced_weight_is_the_one_that_counts(replace_weight):
    spec = CrossbarSpec(adc_range="full")
    layers = [Qconv2dDoreFa(8, 6, 3, spec=spec).eval() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = 4 * torch.rand(2, 8, 6, 6)
    old = layers[0](x)
    new = torch.randn(layers[0].weight.shape)
    for layer in layers:
        replace_weight(layer, new.clone())
    assert torch.equal(layers[0](x), layers[1](x)) and not torch.equal(layers[0](x), old)


def test_training_mode_without_gradients_sees_the_last_step_of_a_fused_optimizer():
    layer = Qconv2dDoreFa(8, 6, 3, bias=False, spec=CrossbarSpec(adc_range="full")).train()
    x = 4 * torch.rand(2, 8, 6, 6)
    with torch.no_grad():
        old = layer(x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0, fused=True)
    layer(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(layer(x), old)


def test_a_state_in_half_precision_leaves_the_steps_in_float64():
    layer = Qconv2dDoreFa(8, 6, 3, spec=CrossbarSpec(cell_bits=2)).eval()
    layer.set_ranges([(0.5, -8), (1.25, -32)])
    x = 4 * torch.rand(2, 8, 6, 6)
    wanted = layer(x)
    state = layer.state_dict()
    layer.load_state_dict({key: value.half() if key.startswith("adc") and value.is_floating_point() else value
                           for key, value in state.items()})
    assert layer.adc_delta.dtype == torch.float64 and torch.equal(layer(x), wanted)


def test_codes_take_the_place_of_the_weight():
    layer = QLinearDoreFa(3, 2, bias=False, spec=CrossbarSpec(adc_range="ideal"), alpha_init=15.0)
    codes = torch.tensor([[0, 7, 15], [8, 8, 8]], dtype=torch.uint8)[:, :, None, None]
    layer.set_codes(codes)
    assert torch.equal(layer.w_codes(), codes)
    with torch.no_grad():
        found = layer(torch.tensor([[1.0, 2, 3]]))
    torch.testing.assert_close(found, torch.tensor([[-15 - 2 + 45, 1 + 2 + 3]]) / 15)
    layer.load_state_dict(layer.state_dict())  # the weight counts again
    assert torch.equal(layer.w_codes().flatten(1).float(), weight_codes(layer))
    for wrong, message in ((codes + 1, "up to 16"), (codes.float(), "float32"), (codes[:1], "shape")):
        with pytest.raises(ValueError, match=message):
            layer.set_codes(wrong)


# ---- other properties ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adc_range", ["calibrated", "full", "ideal"])
@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_output_does_not_depend_on_the_batch(adc_range, reference):
    model = network(CrossbarSpec(rows=20, adc_bits=4, adc_range=adc_range, reference=reference))
    if adc_range == "calibrated":
        calibrate(model, [images()])
    x = images(7)
    with torch.no_grad():
        whole = model(x)
        for size in (1, 3):
            parts = torch.cat([model(x[start:start + size]) for start in range(0, 7, size)])
            assert torch.equal(parts, whole)


def test_dynamic_does_depend_on_the_batch():
    model = network(CrossbarSpec(rows=20, adc_bits=3, adc_range="dynamic"))
    x = images(7)
    with torch.no_grad():
        assert not torch.equal(model(x[:1]), model(x)[:1])


@pytest.mark.parametrize("w_bits, a_bits", [(4, 4), (1, 1), (8, 8), (2, 5)])
def test_ideal_layer_is_the_training_layer(w_bits, a_bits):
    """Same parameters, same numbers to float32 accuracy."""
    spec = CrossbarSpec(w_bits, a_bits, adc_range="ideal")
    bits = dict(wbit=w_bits, abit=a_bits)
    pairs = [(Qconv2d(9, 8, 3, 2, 1, groups=1, **bits), Qconv2dDoreFa(9, 8, 3, 2, 1, spec=spec), (2, 9, 6, 5)),
             (QLinear(40, 8, out_scale=0.2, **bits), QLinearDoreFa(40, 8, spec=spec, out_scale=0.2), (2, 40))]
    for training, inference, shape in pairs:
        missing, unexpected = inference.load_state_dict(training.state_dict(), strict=False)
        assert set(missing) == set(ADC_BUFFERS) - {"adc_bits_plan"} and not unexpected
        x = torch.rand(shape) * 12 - 1
        with torch.no_grad():
            torch.testing.assert_close(inference(x), training(x), rtol=1e-5, atol=1e-4)


def test_input_in_any_memory_format_and_type():
    layer = Qconv2dDoreFa(5, 4, 3, spec=CrossbarSpec(adc_range="full"), alpha_init=1.0)
    x = torch.rand(2, 5, 6, 7).bfloat16()
    with torch.no_grad():
        wanted = layer(x.float())
        assert wanted.dtype == torch.float32
        assert torch.equal(layer(x.float().contiguous(memory_format=torch.channels_last)), wanted)
        for dtype in (torch.bfloat16, torch.double):
            assert layer(x.to(dtype)).dtype == dtype and torch.equal(layer(x.to(dtype)), wanted.to(dtype))


def test_as_many_bins_as_a_histogram_may_have():
    """2^22: of one value each, then of two around each even one, of four, ..., the least that do."""
    for low, high, wanted in [(0, 2**22 - 1, (0, 2**22, 0)), (-1, 2**22 - 2, (-1, 2**22, 0)), (-1, 2**22 - 1, (0, 2**21 + 1, 1)),
                              (-2**22, 2**22 - 2, (-2**21, 2**22, 1)), (-2**22, 2**22 - 1, (-2**20, 2**21 + 1, 2)),
                              (-66846720, 66846720, (-2088960, 4177921, 5))]:
        assert mapping.Bins.of(low, high) == wanted
    bins = mapping.Bins(-2, 5, 2)
    assert bins.values.tolist() == [-8, -4, 0, 4, 8]
    assert [bins.index(u) for u in range(-10, 10)] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4


def test_threads_count_in_a_gigabyte(monkeypatch):
    """As many as there is room for, as each has counts of its own; one wherever there is none."""
    numba, histogram = pytest.importorskip("numba"), pytest.importorskip("models.quant.engines.cpu.common.histogram")
    monkeypatch.setattr(histogram, "set_threads", lambda: None)
    threads = []
    monkeypatch.setattr(numba, "set_num_threads", threads.append)
    monkeypatch.setattr(numba, "get_num_threads", lambda: threads[-1] if threads else 6)
    layer = QLinearDoreFa(5, 3, spec=CrossbarSpec(4, 4, 2, 5), alpha_init=1.0).mapped("ideal")
    for most, wanted in ((3, 3), (2, 2), (0, 1), (100, 6)):
        threads.clear()
        monkeypatch.setattr(histogram, "MOST_COUNTS", most * 4 * 2 * 7)
        assert histogram.room_for(layer, mapping.Bins(0, 7, 0)).shape == (wanted, 4, 2, 1, 7)


@pytest.fixture(scope="module")
def wide():
    """A layer of 1,024 rows, 8-bit cells and digits, and of its reads: the counts, the bins that are not empty, how many are in each."""
    torch.manual_seed(0)
    layer = QLinearDoreFa(1024, 6, spec=CrossbarSpec(8, 8, 8, 6, 1024, dac_bits=8), alpha_init=1.0).eval()
    with torch.no_grad():
        layer.weight.normal_()
    x = torch.rand(300, 1024)
    u = (input_codes(x, layer).double() @ (2 * weight_codes(layer).double() - 255).T).numpy()
    return layer, x, u, *np.unique(np.floor(u / 32 + 0.5).astype(int), return_counts=True)


@pytest.mark.parametrize("engine", ["reference", "numba"])
def test_reads_of_millions_of_values_are_counted_in_bins(wide, engine):
    """`u` has 133 million values, -1024 x 255 x 255 to as many above zero: bins of 32 are the smallest of which 2^22 hold them."""
    layer, x, _, bins, counts = wide
    with set_engine(engine):
        found = collect_histograms(layer, x)[""]
    assert found.shape == (1, 1, 1, 2 * round(1024 * 255 * 255 / 32) + 1)
    [[[found]]] = found
    assert np.flatnonzero(found).tolist() == (bins + 2080800).tolist()
    assert found[found > 0].tolist() == counts.tolist()


def test_ranges_and_plans_of_reads_of_millions_of_values(wide, monkeypatch):
    """Of the middles of the bins; in little memory, where all steps up to the largest read would take gigabytes."""
    monkeypatch.setattr(adc, "MOST_TERMS", 2**25)
    layer, x, _, bins, counts = wide
    histograms, v, share = collect_histograms(layer, x), 16.0 * bins, counts / counts.sum()
    layer.set_spec(replace(layer.spec, adc_bits=2))
    calibrate(layer, None, "minmax", histograms=histograms)
    most, least = v.max(), v.min()
    tried = [(max(-least / m if m else 0, most / (3 - m) if m < 3 else np.inf), -m) for m in range(4) if m or least >= 0]
    delta, q_min = min(tried)
    assert (layer.adc_delta.item(), layer.adc_q_min.item()) == (np.ceil(64 * delta) / 64, q_min)

    def error(delta, q_min, bits):
        return share @ (delta * np.clip(np.rint(v / delta), q_min, q_min + 2**bits - 1) - v) ** 2

    tracemalloc.start()
    calibrate(layer, None, histograms=histograms)
    assert tracemalloc.get_traced_memory()[1] < 2**29
    tracemalloc.stop()
    found = error(layer.adc_delta.item(), layer.adc_q_min.item(), 2)
    assert found <= 1.001 * min(error(step, q_min, 2) for step in delta * np.linspace(0.3, 1.1, 81) for q_min in range(-3, 1))
    layer.set_spec(replace(layer.spec, adc_plan="significance", adc_bits=3))
    calibrate(layer, None, histograms=histograms, share="layer")
    choices = plans.choices(histograms[""], layer.mapped())
    np.testing.assert_allclose(choices.error[0, 0, 0, 0], share @ v**2)
    np.testing.assert_allclose(choices.error[0, 0, 0, 3], error(layer.adc_delta.item(), layer.adc_q_min.item(), 3))
    assert layer.adc_bits_plan.tolist() == [[3]] and choices.error[0, 0, 0, 3] < found / 2


def test_reference_adc_and_table_agree():
    """What `Converter.encode` gives is what a layer applies: a single word line and a single read."""
    for delta, q_min in ((1.0, -3), (0.5, 0), (0.3, -1)):
        layer = QLinearDoreFa(1, 2, bias=False, spec=CrossbarSpec(1, 1, 1, 2), alpha_init=1.0)
        layer.set_codes(torch.tensor([0, 1], dtype=torch.uint8).view(2, 1, 1, 1))
        layer.set_ranges([(delta, q_min)])
        with torch.no_grad(), set_engine("reference"):
            found = layer(torch.ones(1, 1))
        np.testing.assert_allclose(found[0], 2 * delta * Converter(delta, q_min, 2).encode([-1, 1], 0.5), rtol=1e-6)


# -- what reads have besides, without an ADC; layers that are called again


@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("engine", ["reference", "numba"])
def test_noise_without_an_adc_leaves_the_sums_that_noise_is_added_to(reference, engine):
    torch.manual_seed(0)
    layer = Qconv2dDoreFa(16, 8, 3, padding=1, spec=CrossbarSpec(reference=reference, adc_range="ideal")).eval()
    x = torch.rand(4, 16, 6, 6) * 8
    with set_engine(engine):
        wanted = layer(x)
        program(layer, Device.preset("neurosim_tsinghua_130nm"), adc_noise=0.01)
        assert (layer(x) - wanted).norm() < 0.02 * wanted.norm()


def test_what_reads_have_besides_may_take_them_beyond_a_converter_that_holds_all_cells():
    """Such a layer is not one integer convolution."""
    torch.manual_seed(0)
    layer = Qconv2dDoreFa(4, 4, 3, padding=1, groups=4, spec=CrossbarSpec(6, 4, 6, 12, reference="digital", adc_range="full"), wq="sawb")
    x = torch.rand(4, 4, 6, 6) * 8
    wanted = layer.eval()(x)
    assert adc.is_lossless(layer.mapped())
    program(layer, Device.preset("neurosim_tsinghua_130nm"), adc_offset=0.5)
    assert not adc.is_lossless(layer.mapped())
    assert (layer(x) - wanted).norm() < 0.05 * wanted.norm()


def test_a_layer_that_is_called_again_is_corrected_for_all_its_calls():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = Qconv2dDoreFa(16, 16, 3, padding=1, spec=CrossbarSpec(adc_bits=4), alpha_init=4.0)
            self.norm = nn.BatchNorm2d(16)

        def forward(self, x):
            for _ in range(3):
                x = torch.relu(self.norm(self.layer(x=x)))
            return x

    x, off = torch.rand(16, 16, 6, 6) * 4, {}
    for how in ("none", "channel"):
        net = Again().eval()
        with without_adc(net):
            wanted = net(x)
        calibrate(net, x, correct=how)
        off[how] = ((net(x) - wanted).norm() / wanted.norm()).item()
    assert off["channel"] < 1.1 * off["none"] < 0.3


def test_weights_of_other_layers_leave_a_chip_where_it_is():
    net = nn.Sequential(Qconv2dDoreFa(4, 4, 3, spec=CrossbarSpec(adc_range="full")), nn.Linear(3, 3)).eval()
    program(net, Device.preset("techA"))
    net.load_state_dict({"1.bias": torch.zeros(3)}, strict=False)
    assert net[0].chip
    net.load_state_dict({"0.weight": torch.zeros_like(net[0].weight)}, strict=False)
    assert not net[0].chip


def test_an_empty_batch_among_those_of_a_calibration():
    x = torch.rand(4, 4, 6, 6)
    with set_engine("reference"):
        net = Qconv2dDoreFa(4, 6, 3).eval()
        found = [calibrate(net, images) for images in ([x], [x, x[:0]])]
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_the_report_of_an_adc_is_not_that_of_a_chip():
    net, x = nn.Sequential(Qconv2dDoreFa(4, 6, 3)).eval(), torch.rand(4, 4, 6, 6)
    program(net, Device.preset("techA"))
    histograms = calibrate(net, x)
    with pytest.raises(ValueError, match="^this network is on a chip"):
        diagnostics.report(net, x, histograms)


@pytest.mark.parametrize("geometry", [{"kernel_size": (3, 1), "padding": (2, 0)}, {"kernel_size": 3, "dilation": 2},
                                      {"kernel_size": 3, "stride": 2, "groups": 2, "padding": 1},
                                      {"kernel_size": 3, "dilation": (1, 2), "padding": "same"}])
@pytest.mark.parametrize("on_chip", [False, True])
def test_what_a_digital_reference_takes_off(geometry, on_chip, monkeypatch):
    """Behind an ADC whose codes are exact, and is asked all the same, the convolution of the weights, whatever its geometry."""
    monkeypatch.setattr(adc, "is_lossless", lambda layer: False)
    torch.manual_seed(0)
    spec = CrossbarSpec(4, 4, 2, 12, 16, reference="digital", adc_range="full")
    layer, x = Qconv2dDoreFa(4, 6, bias=False, alpha_init=1.0, spec=spec, **geometry).eval(), torch.rand(2, 4, 7, 8)
    if on_chip:
        layer.set_cells(layer.ideal_cells())
    codes, weights = layer.a_codes(x).permute(0, 3, 1, 2).double(), 2 * layer.w_codes().double() - 15
    wanted = F.conv2d(codes, weights, None, layer.stride, layer.padding, layer.dilation, layer.groups) / 15**2
    with torch.no_grad():
        assert torch.allclose(layer(x).double(), wanted, atol=1e-4)


def test_ranges_that_cover_all_are_those_of_nominal_cells():
    layer = QLinearDoreFa(40, 3, bias=False, spec=CrossbarSpec(adc_range="full", adc_bits=5), alpha_init=1.0)
    wanted = layer.mapped().adc_delta
    program(nn.ModuleList([layer]), Device("own", "here", 2.0, 42.0, sigma_us=9.0))
    assert torch.equal(layer.mapped().adc_delta, wanted)


def test_unquantized_inputs_below_zero_are_zero():
    layer, x = QLinearDoreFa(20, 6, bias=False, spec=CrossbarSpec(), alpha_init=1.0).eval(), torch.randn(5, 20)
    assert torch.equal(layer.unquantized(x), layer.unquantized(x.clamp_min(0))) and (x < 0).any()


def test_files_without_a_correction_take_that_of_the_layer_away():
    layer = QLinearDoreFa(20, 6, spec=CrossbarSpec(), alpha_init=1.0)
    state = {name: value for name, value in layer.state_dict().items() if name not in ("adc_gain", "adc_offset")}
    layer.set_correction(torch.full((6,), 0.5), torch.ones(6))
    layer.load_state_dict(state, strict=False)
    assert layer.adc_gain.eq(1).all() and not layer.adc_offset.any()


def test_layers_are_printed_with_their_shape_cells_arrays_and_adc():
    conv = Qconv2dDoreFa(64, 128, 3, padding=1, spec=CrossbarSpec(cell_bits=2, adc_bits=5, mapping="im2col"))
    assert conv.extra_repr() == ("64, 128, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), 2-bit cells in 2 slices, "
                                 "5 row blocks of up to 128 rows, 5-bit ADC, calibrated, without ranges as yet")  # 576 rows in all
    calibrate(conv, torch.rand(2, 64, 4, 4))
    assert repr(conv).splitlines()[1].endswith("5-bit ADC, calibrated")
    linear = QLinearDoreFa(100, 10, spec=CrossbarSpec(weights="pair", cell_bits=3, adc_range="full", adc_bits=7))
    text = "in_features=100, out_features=10, bias=True, pairs of 3-bit cells in 2 slices, a row block of 100 rows, 7-bit ADC, full"
    assert linear.extra_repr() == text
    program(linear, Device.preset("techA"))
    assert linear.extra_repr() == f"{text}, on a chip"
    linear.set_spec(CrossbarSpec(cell_bits=4, adc_range="ideal"))
    assert linear.extra_repr() == "in_features=100, out_features=10, bias=True, 4-bit cells in 1 slice, a row block of 100 rows, no ADC"
