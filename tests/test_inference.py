"""Inference with codes between the layers, against the same modules called one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import images, tiny  # noqa: F401  (a fixture)
from torch import nn
from torch.nn import functional as F

from models.quant import (CrossbarSpec, Qconv2d, Qconv2dDoreFa, QLinearDoreFa, calibrate, correct, crossbar_layers, inference,
                          set_engine)
from models.quant.quantizers import act_codes

pytestmark = pytest.mark.usefixtures("one_thread")
MODULES = "features.0", "features.1", "features.2", "features", "classifier.0", "classifier"


def one_by_one(model, x):
    """Outputs of every module's own forward method."""
    for module in (*model.features, nn.Flatten(), *model.classifier):
        x = module(x)
    return x


def count_calls(monkeypatch, *names):
    """{name: calls} of functions of `inference` from here on."""
    calls = dict.fromkeys(names, 0)
    for name in names:
        def counting(*args, name=name, function=getattr(inference, name)):
            calls[name] += 1
            return function(*args)
        monkeypatch.setattr(inference, name, counting)
    return calls


@pytest.mark.parametrize("wq, reference, adc_range, map", [
    (wq, reference, adc_range, map) for wq, reference, adc_range, map in itertools.product(
        ("dorefa", "sawb"), ("analog", "digital"), ("calibrated", "full", "dynamic", "ideal"), ("all", "conv"))
    if (wq == "dorefa") + (reference == "analog") + (map == "all") >= 2])
def test_outputs_are_those_of_the_modules(tiny, wq, reference, adc_range, map):
    model = tiny(wq=wq, map=map, spec=CrossbarSpec(cell_bits=2, adc_bits=4, rows=16, adc_range=adc_range, reference=reference))
    numbers = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):  # slopes of both signs
            nn.init.normal_(module.weight, generator=numbers)
            nn.init.normal_(module.bias, generator=numbers)
    x = images(3)
    with torch.no_grad():
        if adc_range == "calibrated":
            calibrate(model, [x])
            correct(model, x)
        found = model(x)
        assert torch.equal(found, one_by_one(model, x))
    assert len(found.unique()) > 10  # images and classes differ


def test_a_layer_with_a_bias_and_an_output_scale(monkeypatch):
    torch.manual_seed(0)
    spec = CrossbarSpec(adc_range="ideal")
    model = nn.Sequential(
        Qconv2d(3, 5, 3, padding=1, image=True), nn.BatchNorm2d(5), nn.ReLU(),
        Qconv2dDoreFa(5, 6, 3, spec=spec), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(),
        QLinearDoreFa(6 * 7 * 7, 8, spec=spec, out_scale=0.3), nn.BatchNorm1d(8), nn.ReLU(),
        QLinearDoreFa(8, 4, spec=spec, out_scale=0.1)).eval()
    calls = count_calls(monkeypatch, "max_pool")
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(inference.run([model], x), nn.Sequential.forward(model, x))
    assert calls == {"max_pool": 1}


def test_what_is_no_chain_of_codes_runs_as_it_is():
    """No batch norm, no ReLU, no statistics, a pooling that returns pairs of tensors: all between layers on arrays."""
    torch.manual_seed(0)
    spec = CrossbarSpec(adc_range="ideal")

    def conv():
        return Qconv2dDoreFa(6, 6, 3, padding=1, spec=spec)

    model = nn.Sequential(
        conv(), nn.ReLU(), conv(), nn.BatchNorm2d(6), conv(), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(), conv(),
        nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), conv(), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
        conv(), nn.BatchNorm2d(6), nn.ReLU()).eval()
    x = torch.randn(2, 6, 10, 10)
    with torch.no_grad():
        assert torch.equal(inference.run([model], x), nn.Sequential.forward(model, x))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_what_they_would(tiny, name, register, monkeypatch):
    model, x, seen = tiny(spec=CrossbarSpec(adc_range="ideal")), images(2), []
    calls = count_calls(monkeypatch, "_to_codes")
    with torch.no_grad():
        wanted = model(x)
        assert calls["_to_codes"] > 5
        calls["_to_codes"] = 0
        handle = getattr(model.get_submodule(name), register)(lambda module, *tensors: seen.append(tensors))
        assert torch.equal(model(x), wanted) and calls["_to_codes"] == 0
        handle.remove()
        model(x)
    assert len(seen) == 1 and calls["_to_codes"] > 5
    assert all(tensor.dtype == torch.float32 for tensor in (seen[0][0][0], seen[0][-1] if len(seen[0]) > 1 else x))


def test_a_change_of_the_network_counts_at_once(tiny):
    """Nothing of a batch norm or a clipping level is kept from call to call."""
    model, x = tiny(spec=CrossbarSpec(adc_range="ideal")), images(2)
    with torch.no_grad():
        before = model(x)
        model.features[1].bias.add_(0.2)
        after = model(x)
        assert not torch.equal(after, before) and torch.equal(after, one_by_one(model, x))
        crossbar_layers(model)[1][1].act_quant.act_alpha.mul_(0.7)
        assert not torch.equal(model(x), after) and torch.equal(model(x), one_by_one(model, x))


def test_gradients_and_training_go_through_the_modules(tiny, monkeypatch):
    model, x = tiny(spec=None), images(4).requires_grad_()
    calls = count_calls(monkeypatch, "_to_codes")
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0 and model.features[0].weight.grad.abs().sum() > 0
    with torch.no_grad():
        model.train()
        model(x)
    assert calls == {"_to_codes": 0}


def test_other_engines_get_the_modules(tiny, monkeypatch):
    model, x = tiny(spec=CrossbarSpec(adc_range="full", rows=64)), images(1)
    calls = count_calls(monkeypatch, "max_pool")
    with torch.no_grad():
        with set_engine("reference"):
            wanted = model(x)
        assert calls == {"max_pool": 0}
        assert torch.equal(model(x), wanted) and calls == {"max_pool": 3}


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_max_pooling_of_codes(size, kernel, stride, padding):
    pool = nn.MaxPool2d(kernel, stride, min(padding, kernel // 2))
    if min(size) + 2 * pool.padding < kernel:
        return
    codes = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    found = inference.max_pool(codes.permute(0, 2, 3, 1).contiguous(), pool)
    assert torch.equal(found.permute(0, 3, 1, 2), pool(codes.float()).byte())


def test_next_codes_are_those_of_batch_norm_and_pact():
    """At many values around every threshold."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(64).eval()
    with torch.no_grad():
        for values in (norm.running_mean, norm.weight, norm.bias):
            values.normal_()
        norm.running_var.uniform_(0.1, 2)
        layer = Qconv2d(1, 64, 1, image=True, bias=True, wbit=2).eval()  # output: a pixel times a number for each channel
        following = Qconv2dDoreFa(64, 1, 1, alpha_init=1.3)
        x = torch.randn(200, 1, 30, 30)
        to_codes = inference._to_codes(layer, [norm, nn.ReLU(), following], x.device)
        wanted = act_codes(F.relu(norm(layer(x))), following.act_quant.act_alpha, 15)
        assert torch.equal(layer.next_codes(x, to_codes).permute(0, 3, 1, 2).float(), wanted)
    assert set(wanted.unique().tolist()) == set(range(16))


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.tuples(st.integers(1, 4), st.integers(1, 4)),
       st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(0, 2), st.integers(0, 2)),
       st.tuples(st.integers(1, 2), st.integers(1, 2)), st.integers(1, 8), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=80, deadline=None)
def test_first_layer_in_float64(images, channels, out, kernel, stride, padding, dilation, wbit, dtype):
    """Every geometry, against PyTorch's float64 convolution, whose sum is exact too."""
    layer = Qconv2d(channels, out, kernel, stride, padding, dilation, image=True, wbit=wbit).eval()
    x = torch.randn(images, channels, 11, 12).to(dtype)
    with torch.no_grad():
        sums = F.conv2d(x.double(), layer.weight_quant.integers(layer.weight).double(), None, stride, padding, dilation)
        wanted = sums.float() * layer.weight_quant.step + layer.bias.view(-1, 1, 1)
        assert torch.equal(layer(x), wanted)
    with_gradient = layer(x.requires_grad_())  # the other way to the same sums
    assert torch.equal(with_gradient, wanted) and with_gradient.requires_grad
