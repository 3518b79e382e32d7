"""Training through the ADC: the forward pass is the simulation, the gradient that of the quantized layer without arrays."""

import copy

import pytest
import torch
from torch import nn

from experiment.inputs import data as datasets
from models.quant import (CrossbarSpec, Device, Qconv2d, Qconv2dDoreFa, QLinear, QLinearDoreFa, calibrate, collect_histograms, correct,
                          crossbar_layers, program, set_engine)
from models.quant.arrays import adc

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")]


def pair(kind, wq, **hardware):
    """A training layer, the same layer on crossbars, and an input."""
    torch.manual_seed(0)
    spec = CrossbarSpec(**hardware)
    if kind != "linear":
        geometry = {"conv": dict(stride=2, padding=1, groups=2), "same": dict(padding="same", dilation=(1, 3), bias=False)}[kind]
        plain = Qconv2d(6, 4, (3, 2), **geometry, alpha_init=0.8, wq=wq)
        crossbar = Qconv2dDoreFa(6, 4, (3, 2), **geometry, spec=spec, alpha_init=0.8, wq=wq)
        x = torch.rand(3, 6, 7, 5) * 1.2 - 0.1
    else:
        plain = QLinear(30, 7, alpha_init=0.8, wq=wq, out_scale=0.25)
        crossbar = QLinearDoreFa(30, 7, spec=spec, alpha_init=0.8, wq=wq, out_scale=0.25)
        x = torch.rand(3, 30) * 1.2 - 0.1
    crossbar.load_state_dict(plain.state_dict(), strict=False)
    calibrate(crossbar, [x])
    return plain.train(), crossbar.train(), x


def gradients(layer, x, upstream, dtype=None):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = layer(x)
    (y.float() * upstream).sum().backward()
    return y.detach(), [x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["conv", "same", "linear"])
def test_a_chip_is_corrected_to_each_batch(kind, dtype):
    """In training, where it is asked for and whichever chip the layer was calibrated on: each channel has the mean and the deviation of
    the layer without arrays, and its gradient. Otherwise it has the correction of that chip."""
    plain, layer, x = pair(kind, "dorefa", adc_bits=8, rows=8)
    x = torch.rand(9, *x.shape[1:])
    upstream = torch.randn_like(plain(x))
    program(layer, Device.preset("techC", time="1d"), 3)
    own, found = gradients(layer, x, upstream, dtype)
    simulated = layer.simulate(x)
    assert torch.equal(own, simulated.to(own.dtype))
    layer.correct_batches = True
    y, corrected = gradients(layer, x, upstream, dtype)
    exact, dims = plain(x).detach(), [dim for dim in range(y.dim()) if dim != 1]
    rounding = {None: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]  # of the output
    for moment in (torch.mean, torch.std):
        torch.testing.assert_close(moment(y.float(), dims), moment(exact, dims), rtol=rounding, atol=rounding)
        assert not torch.allclose(moment(simulated, dims), moment(exact, dims), rtol=rounding, atol=rounding)
    assert all(torch.equal(one, other) for one, other in zip(found, corrected))
    assert torch.equal(layer.eval()(x), simulated)
    assert layer.train()(x[:0]).shape[1:] == y.shape[1:]


@pytest.mark.parametrize("kind", ["conv", "same", "linear"])
def test_parts_that_do_not_train(kind):
    """Frozen weights and inputs without a gradient get none; the output may be changed in place."""
    _, layer, x = pair(kind, "dorefa", adc_bits=3, rows=8)
    torch.relu_(layer(x)).sum().backward()
    weight = layer.weight.grad
    layer.zero_grad()
    layer.weight.requires_grad_(False)
    x.requires_grad_()
    torch.relu_(layer(x)).sum().backward()
    assert weight.abs().sum() > 0 and layer.weight.grad is None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("wq", ["dorefa", "sawb"])
@pytest.mark.parametrize("kind", ["conv", "same", "linear"])
def test_lossless_adc_trains_as_the_quantized_layer(kind, wq, dtype):
    plain, crossbar, x = pair(kind, wq, adc_bits=8, rows=32)
    upstream = torch.randn(plain(x).shape)
    (wanted, expected), (y, found) = gradients(plain, x, upstream, dtype), gradients(crossbar, x, upstream, dtype)
    rtol, atol = (1e-5, 1e-6) if dtype is None else (1e-2, 1e-2)
    torch.testing.assert_close(y.float(), wanted.float(), rtol=rtol, atol=atol)
    assert y.dtype == wanted.dtype
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


@pytest.mark.parametrize("adc_range", ["calibrated", "full", "dynamic"])
@pytest.mark.parametrize("wq", ["dorefa", "sawb"])
@pytest.mark.parametrize("kind", ["conv", "same", "linear"])
def test_coarse_adc_forward_gives_the_simulation_and_backward_passes_it_by(kind, wq, adc_range):
    plain, crossbar, x = pair(kind, wq, adc_bits=2, cell_bits=2, rows=8, adc_range=adc_range)
    upstream = torch.randn(plain(x).shape)
    (software, expected), (y, found) = gradients(plain, x, upstream), gradients(crossbar, x, upstream)
    assert (y - software).abs().max() > 0.01
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():  # in training mode without gradients, and in evaluation
        assert torch.equal(crossbar(x), y) and torch.equal(crossbar.eval()(x), y)


@pytest.mark.parametrize("hardware", [
    dict(reference="digital"), dict(a_bits=8, adc_range="ideal"), dict(a_bits=8, adc_bits=8, rows=32), dict(reference="analog")])
@pytest.mark.parametrize("engine", ["reference", "numba"])
def test_autocast_does_not_round_the_simulation(engine, hardware):
    """Sums of codes are computed in float32 by some engines, which autocast would turn into bfloat16."""
    torch.manual_seed(0)
    spec = CrossbarSpec(**{"adc_bits": 5, "rows": 32} | hardware)
    layer = Qconv2dDoreFa(64, 16, 3, groups=2, spec=spec, alpha_init=0.8).train()
    x = torch.rand(2, 64, 6, 6)
    with set_engine(engine):
        with torch.autocast("cpu", torch.bfloat16):
            if spec.adc_range != "ideal":
                calibrate(layer, [x])
            ranges = layer.adc_delta.tolist()
            found = layer(x)
        if spec.adc_range != "ideal":
            calibrate(layer, [x])
        assert layer.adc_delta.tolist() == ranges
        assert torch.equal(found, layer(x).to(found.dtype))


@pytest.mark.parametrize("fused", [False, True])  # the fused form leaves no trace in the version of a tensor
@pytest.mark.parametrize("wq", ["dorefa", "sawb"])
def test_weights_that_a_step_changed_are_simulated_anew(wq, fused):
    _, layer, x = pair("conv", wq, adc_bits=3, rows=8)
    optimizer = torch.optim.SGD([layer.weight, layer.bias], lr=1.0, fused=fused)

    def fresh():
        other = Qconv2dDoreFa(6, 4, (3, 2), stride=2, padding=1, groups=2, spec=layer.spec, wq=wq)
        other.load_state_dict(layer.state_dict())
        return other.train(layer.training)(x).detach()

    for _ in range(3):
        before = layer(x)
        before.square().sum().backward()
        optimizer.step()
        assert torch.equal(layer.eval()(x), fresh())  # evaluation after a step, then training on
        after = layer.train()(x).detach()
        assert torch.equal(after, fresh()) and not torch.equal(after, before.detach())


def test_a_network_learns_what_its_adc_leaves():
    """Two layers with an ADC of three bits learn to copy a network without one better than they did at first."""
    torch.manual_seed(0)
    spec = CrossbarSpec(adc_bits=3, cell_bits=1, rows=16)
    net = nn.Sequential(QLinearDoreFa(32, 48, spec=spec, alpha_init=1.0), nn.BatchNorm1d(48), nn.ReLU(),
                        QLinearDoreFa(48, 4, spec=spec, alpha_init=3.0))
    x = torch.rand(256, 32)
    calibrate(net, [x])
    twin = copy.deepcopy(net)
    for _, layer in crossbar_layers(twin):
        layer.set_spec(CrossbarSpec(adc_range="ideal"))
    target = twin.train()(x).detach()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses = []
    for step in range(150):
        if step % 10 == 0:
            calibrate(net, [x])
            correct(net, x)
        loss = nn.functional.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.65 * losses[0]


@pytest.mark.parametrize("adc_bits", [3, 4])
@pytest.mark.parametrize("rule", ["mse", "percentile"])
def test_ranges_chosen_on_one_half_of_the_images_serve_the_other_half(rule, adc_bits):
    """Their cost on images they have not seen is close to that of the ranges which those images would have given."""
    torch.manual_seed(0)
    spec = CrossbarSpec(adc_bits=adc_bits, rows=72, cell_bits=2)
    net = nn.Sequential(Qconv2dDoreFa(3, 64, 3, spec=spec, alpha_init=1.5), nn.ReLU(), nn.MaxPool2d(2),
                        Qconv2dDoreFa(64, 8, 3, spec=spec, alpha_init=2.0)).eval()
    data = datasets.load("digits")
    images = datasets.normalize(data.train_x[torch.randperm(len(data.train_x))[:64]], data.mean, data.std)
    halves = [{name: counts.sum(axis=2) for name, counts in collect_histograms(net, [half]).items()} for half in images.split(32)]
    for name, layer in crossbar_layers(net):
        mapped = layer.mapped("ideal")
        ranges, own = (adc.calibrated_ranges(half[name], mapped, rule, "alike") for half in halves)
        for k in range(2):
            reads = adc.Reads(halves[1][name], [k], mapped)
            assert reads.squared_error(*own[k], adc_bits) > 0
            assert reads.squared_error(*ranges[k], adc_bits) < 1.15 * reads.squared_error(*own[k], adc_bits)
