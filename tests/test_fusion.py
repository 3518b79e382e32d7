"""Inference with codes between the layers, against the same modules called one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import images
from torch import nn
from torch.nn import functional as F

from models.quant import CrossbarSpec, Qconv2d, Qconv2dDoreFa, QLinearDoreFa, calibrate, correct, crossbar_layers, set_engine
from models.quant.layers import fusion
from models.quant.kernels import elementwise
from models.quant.layers.quantizers import act_codes

needs_one_rounding = pytest.mark.skipif(not fusion.batch_norm_rounds_once(), reason="PyTorch's batch norm rounds twice here")
IDEAL = CrossbarSpec(adc_range="ideal")


def one_by_one(model, x):
    """What the modules' own forward methods give."""
    for module in (*model.features, nn.Flatten(), *model.classifier):
        x = module(x)
    return x


@pytest.fixture
def fused(monkeypatch):
    """A list of the layers that made codes of the next one, for each call of `fusion.run` from here on."""
    layers, function = [], fusion._to_codes

    def noting(layer, *others):
        to_codes = function(layer, *others)
        if to_codes is not None:
            layers.append(layer)
        return to_codes

    monkeypatch.setattr(fusion, "_to_codes", noting)
    return layers


@needs_one_rounding
@pytest.mark.parametrize("wq, reference, adc_range, placed", [
    (wq, reference, adc_range, placed) for wq, reference, adc_range, placed in itertools.product(
        ("dorefa", "sawb"), ("analog", "digital"), ("calibrated", "full", "dynamic", "ideal"), ("all", "conv"))
    if (wq == "dorefa") + (reference == "analog") + (placed == "all") >= 2])
def test_outputs_are_those_of_the_modules(tiny, fused, wq, reference, adc_range, placed):
    """On all threads. Where a reference is subtracted behind the ADC, which is done in float64, there is no way for codes."""
    spec = CrossbarSpec(cell_bits=2, adc_bits=4, rows=16, adc_range=adc_range, reference=reference)
    model = tiny(wq=wq, crossbar_layers=placed, spec=spec)
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
        fused.clear()
        found = model(x)
        assert torch.equal(found, one_by_one(model, x))
    assert len(found.unique()) > 10  # images and classes differ
    behind = reference == "digital" and adc_range != "ideal"
    assert len(fused) == (0 if behind else {"all": 5, "conv": 3}[placed])  # of six layers; the last has no next


@needs_one_rounding
def test_biases_an_output_scale_and_other_pooling(fused):
    torch.manual_seed(0)
    model = nn.Sequential(
        Qconv2d(3, 5, 3, padding=1, image=True), nn.BatchNorm2d(5), nn.ReLU(),
        Qconv2dDoreFa(5, 6, 3, spec=IDEAL), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(),
        QLinearDoreFa(6 * 7 * 7, 8, spec=IDEAL, out_scale=0.3), nn.BatchNorm1d(8), nn.ReLU(),
        QLinearDoreFa(8, 4, spec=IDEAL, out_scale=0.1)).eval()
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(fusion.run([model], x), model(x))
    assert fused == [model[0], model[3], model[8]]


class _OwnForward(nn.ReLU):
    def forward(self, x):
        return x.abs()


def _sequences():
    """Modules between two layers on arrays which codes do not pass."""
    norm = nn.BatchNorm2d(6)
    yield [nn.ReLU()]
    yield [norm]
    yield [nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU()]
    yield [norm, nn.ReLU(), nn.AvgPool2d(2)]
    yield [norm, nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
    yield [norm, nn.ReLU(), nn.MaxPool2d(2, dilation=2)]
    yield [norm, nn.ReLU(), nn.Flatten(0, 1), nn.Unflatten(0, (2, 6))]
    yield [norm, _OwnForward()]
    replaced = nn.ReLU()
    replaced.forward = torch.abs
    yield [norm, replaced]


@pytest.mark.parametrize("between", list(_sequences()), ids=str)
def test_other_sequences_are_called(fused, between):
    torch.manual_seed(0)
    model = nn.Sequential(*[Qconv2dDoreFa(6, 6, 3, padding=1, spec=IDEAL), *between,
                            Qconv2dDoreFa(6, 6, 3, padding=1, spec=IDEAL)]).eval()
    x = torch.randn(2, 6, 9, 9)
    with torch.no_grad():
        assert torch.equal(fusion.run([model], x), model(x))
    assert not fused


@pytest.mark.parametrize("modules", [
    [Qconv2dDoreFa(3, 8, 3, spec=IDEAL), nn.BatchNorm2d(4), nn.ReLU(), Qconv2dDoreFa(8, 8, 3, spec=IDEAL)],
    [Qconv2dDoreFa(3, 8, 3, spec=IDEAL), nn.BatchNorm2d(8), nn.ReLU(), QLinearDoreFa(8, 8, spec=IDEAL)],
    [Qconv2dDoreFa(3, 8, 3, spec=IDEAL), nn.BatchNorm2d(8), nn.ReLU(), Qconv2dDoreFa(9, 8, 3, spec=IDEAL)],
    [Qconv2d(5, 8, 3, image=True), nn.BatchNorm2d(8), nn.ReLU(), Qconv2dDoreFa(8, 8, 3, spec=IDEAL)],
    [Qconv2d(2, 8, 3, image=True)]], ids=["batch norm", "linear", "channels", "image's channels", "the first layer alone"])
def test_layers_that_do_not_fit_are_refused(modules):
    """No kernel reads or writes beyond its arrays."""
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        fusion.run([nn.Sequential(*modules).eval()], torch.rand(2, 3, 8, 8))


@needs_one_rounding
@pytest.mark.parametrize("name", ["features.0", "features.1", "features.2", "features", "classifier.0", "classifier"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_what_they_would(tiny, fused, name, register):
    model, x, seen = tiny(spec=IDEAL), images(2), []
    with torch.no_grad():
        wanted = model(x)
        assert len(fused) == 5
        handle = getattr(model.get_submodule(name), register)(lambda module, *tensors: seen.append(tensors))
        assert torch.equal(model(x), wanted) and len(fused) == 5
        handle.remove()
        model(x)
    assert len(seen) == 1 and len(fused) == 10
    for tensors in seen[0]:
        assert (tensors[0] if isinstance(tensors, tuple) else tensors).dtype == torch.float32


@needs_one_rounding
def test_hooks_of_all_modules_count_too(tiny, fused):
    model, seen = tiny(spec=IDEAL), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            model(images(1))
    finally:
        handle.remove()
    assert not fused and model.features[2] in seen


@needs_one_rounding
def test_a_change_of_the_network_counts_at_once(tiny, fused):
    """Nothing of a batch norm or a clipping level is kept from call to call."""
    model, x = tiny(spec=IDEAL), images(2)
    with torch.no_grad():
        before = model(x)
        model.features[1].bias.add_(0.2)
        after = model(x)
        assert not torch.equal(after, before) and torch.equal(after, one_by_one(model, x))
        crossbar_layers(model)[1][1].act_quant.act_alpha.mul_(0.7)
        assert not torch.equal(model(x), after) and torch.equal(model(x), one_by_one(model, x))
    assert len(fused) == 20


@pytest.mark.parametrize("of_network, of_image", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_mixed_types_are_what_they_are_without_codes(tiny, fused, of_network, of_image):
    model, x = tiny(spec=IDEAL).to(of_network), images(2).to(of_image)
    with torch.no_grad():
        try:
            wanted = one_by_one(model, x)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                model(x)
        else:
            assert torch.equal(model(x), wanted)
    assert not fused


def test_gradients_and_training_go_through_the_modules(tiny, fused):
    model, x = tiny(spec=None), images(4).requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0 and model.features[0].weight.grad.abs().sum() > 0
    model = tiny(spec=IDEAL).train()
    with torch.no_grad():
        model(images(2))
    assert not fused


@needs_one_rounding
def test_other_engines_get_the_modules(tiny, fused):
    """So the reference engine checks batch norm, PACT and pooling too."""
    model, x = tiny(spec=CrossbarSpec(adc_range="full", rows=64)), images(1)
    with torch.no_grad():
        with set_engine("reference"):
            wanted = model(x)
        assert not fused
        assert torch.equal(model(x), wanted) and len(fused) == 5


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 4), st.integers(1, 4)),
       st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(0, 2), st.integers(0, 2)))
@settings(max_examples=60)
def test_max_pooling_of_codes(size, kernel, stride, padding):
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel))
    if any(s + 2 * p < k for s, p, k in zip(size, padding, kernel)):
        return
    pool = nn.MaxPool2d(kernel, stride, padding)
    codes = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    found = fusion.max_pool(codes.permute(0, 2, 3, 1).contiguous(), pool)
    assert torch.equal(found.permute(0, 3, 1, 2), pool(codes.float()).byte()) and found.is_contiguous()


@needs_one_rounding
def test_next_codes_around_every_threshold():
    """Outputs y for which `gain y + shift` lies within some roundings of where a code ends: each rounding counts."""
    torch.manual_seed(0)
    channels, levels, alpha = 64, 15, 1.3
    norm = nn.BatchNorm2d(channels).eval()
    with torch.no_grad():
        for values in (norm.running_mean, norm.weight, norm.bias):
            values.normal_()
        norm.running_var.uniform_(0.1, 2)
        layers = [Qconv2dDoreFa(channels, channels, 1, spec=IDEAL, alpha_init=alpha) for _ in range(2)]
        to_codes = fusion._to_codes(layers[0], [norm, nn.ReLU(), layers[1]], torch.device("cpu"))
        gain, shift = (values.double() for values in fusion.scale_and_shift(norm))
        ends = (torch.arange(levels).double() + 0.5) * alpha / levels
        y = ((ends[:, None] - shift) / gain).float()
        y = torch.cat([y + k * (torch.nextafter(y, y + 1) - y) for k in range(-8, 9)])  # [17 levels, channels]
        wanted = act_codes(F.relu(norm(y[:, :, None, None])), layers[1].act_quant.act_alpha, levels)[:, :, 0, 0]
        zeros, ones = torch.zeros(1, 1, 1, channels, dtype=torch.int32), torch.ones(channels)
        found = torch.stack([elementwise.scaled(zeros, ones, row.contiguous(), to_codes)[0, 0, 0] for row in y])
        twice = act_codes(F.relu(y * gain.float() + shift.float()), layers[1].act_quant.act_alpha, levels)
    assert torch.equal(found.float(), wanted)
    assert not torch.equal(twice, wanted)  # so a product that is rounded for itself would be seen


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.tuples(st.integers(1, 4), st.integers(1, 4)),
       st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(0, 2), st.integers(0, 2)),
       st.tuples(st.integers(1, 2), st.integers(1, 2)), st.integers(1, 8), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=80)
def test_first_layer_in_float64(images, channels, out, kernel, stride, padding, dilation, wbit, dtype):
    """Every geometry, against PyTorch's float64 convolution, whose sum is exact too."""
    layer = Qconv2d(channels, out, kernel, stride, padding, dilation, image=True, wbit=wbit).eval()
    x = torch.randn(images, channels, 11, 12, dtype=dtype).mul(2**30).round() / 2**30  # sums in float64 stay exact
    with torch.no_grad():
        sums = F.conv2d(x.double(), layer.weight_quant.integers(layer.weight).double(), None, stride, padding, dilation)
        wanted = sums.float() * layer.weight_quant.step + layer.bias.view(-1, 1, 1)
        assert torch.equal(layer(x), wanted)
    with_gradient = layer(x.requires_grad_())  # the other way to the same sums
    assert torch.equal(with_gradient, wanted) and with_gradient.requires_grad


def fusible(**options):
    torch.manual_seed(0)
    return nn.Sequential(Qconv2d(3, 6, 3, padding=1, image=True, **options), nn.BatchNorm2d(6), nn.ReLU(),
                         Qconv2dDoreFa(6, 6, 3, spec=IDEAL), nn.BatchNorm2d(6), nn.ReLU(), Qconv2dDoreFa(6, 6, 3, spec=IDEAL)).eval()


def test_groups_of_a_first_layer():
    model, x = fusible(groups=3), torch.randn(2, 3, 9, 9)
    with torch.no_grad(), set_engine("auto"):
        assert torch.equal(fusion.run([model], x), model(x))


def test_hooks_before_all_modules_see_each():
    model, seen = fusible(), []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: seen.append(module))
    try:
        with torch.no_grad(), set_engine("auto"):
            fusion.run([model], torch.randn(2, 3, 9, 9))
    finally:
        handle.remove()
    assert all(module in seen for module in model)
