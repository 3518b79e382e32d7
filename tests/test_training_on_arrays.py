"""Converted networks in training (`train=`): forward what evaluation gives, bit for bit, gradients those of a straight-through formula."""

import copy
import io
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.quant import (CrossbarSpec, Device, Training, add_weight_noise, calibrate, convert, crossbar_layers, image_numbers, load,
                          program, ranges_of, recalibrate, recalibrate_every, save, set_engine, train_through, without_adc)

DEVICE = Device.preset("techC")


class Product(nn.Module):
    """One product, of a weight that any of PyTorch's functions takes."""

    def __init__(self, weight, call, bias=None):
        super().__init__()
        self.weight, self.call = nn.Parameter(weight), call
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias))

    def forward(self, x):
        return self.call(x, self.weight, self.bias)


def _columns(x, w, b):
    return w @ x


# name: (shape of x, shape of the weight, the product, outputs of the bias, dimension of the weight's outputs)
PRODUCTS = {
    "linear": ((5, 7, 12), (6, 12), F.linear, 6, 0),
    "turned": ((5, 12), (12, 6), lambda x, w, b: torch.addmm(b, x, w), 6, 1),
    "columns": ((3, 12, 4), (6, 12), _columns, None, 0),
    "conv1d": ((3, 4, 9), (6, 4, 3), partial(F.conv1d, padding=1), 6, 0),
    "conv2d": ((3, 4, 6, 6), (6, 4, 3, 3), partial(F.conv2d, stride=2, padding=(1, 0)), 6, 0),
    "one by one": ((3, 4, 6, 6), (6, 4, 1, 1), F.conv2d, 6, 0),
    "same": ((3, 4, 6, 6), (6, 4, 2, 2), partial(F.conv2d, padding="same"), 6, 0),
    "depthwise": ((3, 4, 6, 6), (8, 1, 3, 3), partial(F.conv2d, groups=4, dilation=2, padding=2), 8, 0),
    "conv3d": ((2, 2, 5, 5, 5), (3, 2, 2, 3, 3), partial(F.conv3d, padding=1), 3, 0),
    "transposed": ((2, 4, 5, 5), (4, 3, 3, 3), partial(F.conv_transpose2d, stride=2, padding=1, output_padding=1), 3, 1),
}
SPECS = {
    "uniform": CrossbarSpec(4, 4, cell_bits=2, adc_bits=3),
    "plan": CrossbarSpec(4, 4, cell_bits=1, adc_bits=1.5, adc_plan="ones"),
    "pairs": CrossbarSpec(4, 4, cell_bits=2, adc_bits=4, weights="pair", mapping="im2col", rows=16),
    "digital": CrossbarSpec(4, 4, cell_bits=2, adc_bits=4, reference="digital", rows=16),
}


def make(kind, spec=SPECS["uniform"], train="adc", **options):
    """(the converted product in training mode, the float one, an input)."""
    torch.manual_seed(0)
    shape, weight, call, bias, _ = PRODUCTS[kind]
    net, x = Product(torch.randn(weight), call, bias), torch.randn(shape) + 0.2
    batch = 2 * x  # some inputs clip, and some do not
    return convert(net, spec, torch.cat([x, batch])[:len(x)], first_last_bits=None, train=train, **options), net, x


def quantized(x, step, low, high):
    """`x` on its grid, with a gradient where it is within it."""
    place = x.detach() / step
    inside = (place >= low) & (place <= high)
    return (place.round().clamp(low, high) * step) + torch.where(inside, x - x.detach(), 0)


def expected_gradients(net, converted, x, upstream):
    """Those of input, weight and bias by a formula in float64 that shares no code with the package."""
    [(_, layer)] = crossbar_layers(converted)
    *_, call, _, out = PRODUCTS[next(name for name, each in PRODUCTS.items() if each[2] is net.call)]
    x, weight = (each.detach().double().requires_grad_() for each in (x, net.weight))
    bias = None if net.bias is None else net.bias.detach().double().requires_grad_()
    lo, hi = layer.act_quant.window
    most = 2 ** (layer.weight_quant.wbit - 1) - 1
    steps = layer.weight_quant.scale.double().view([-1 if dim == out else 1 for dim in range(weight.dim())])
    y = call(quantized(x, layer.act_quant.scale.double(), lo, hi), quantized(weight, steps, -most, most), bias)
    dim = layer.channel_dim
    gain = layer.quant_gain.double().view([-1] + [1] * (-1 - dim))
    (y * gain * upstream.double()).sum().backward()
    return [each.grad for each in (x, weight, bias) if each is not None]


@pytest.mark.parametrize("train", ["quantizers", "adc"])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_gradients_are_those_of_a_straight_through_formula(kind, train):
    q, net, x = make(kind, train=train)
    x = x.requires_grad_()
    y = q(x)
    upstream = torch.randn(y.shape)
    y.backward(upstream)
    found = [each.grad for each in (x, q.weight, q.bias) if each is not None]
    for one, other in zip(found, expected_gradients(net, q, x, upstream), strict=True):
        assert (one.double() - other).abs().max() <= 1e-5 * other.abs().max() and other.abs().max() > 0


@pytest.mark.parametrize("inputs", ["phases", "offset", "ternary", "twos"])
@pytest.mark.parametrize("spec", SPECS)
def test_training_mode_gives_what_evaluation_mode_gives(spec, inputs):
    if spec == "digital" and inputs == "ternary":
        inputs = "phases"
    q, _, x = make("conv2d", SPECS[spec], inputs=inputs)
    for engine in ("numba", "reference"):
        with set_engine(engine):
            y = q.train()(x)
            with torch.no_grad():
                assert torch.equal(y, q.eval()(x)) and y.requires_grad


@pytest.mark.parametrize("kind", PRODUCTS)
def test_each_kind_of_product_gives_in_training_what_it_gives_in_evaluation(kind):
    q, _, x = make(kind)
    y = q(x)
    with torch.no_grad():
        assert torch.equal(y, q.eval()(x))
        wanted = q.train()(x)
    assert torch.equal(wanted, y)


def test_training_through_quantizers_is_the_product_of_quantized_numbers():
    q, net, x = make("conv2d", train="quantizers")
    [(_, layer)] = crossbar_layers(q)
    by_hand = F.conv2d(quantized(x, layer.act_quant.scale, *layer.act_quant.window),
                       quantized(net.weight, layer.weight_quant.scale.view(-1, 1, 1, 1), -7, 7), net.bias, 2, (1, 0))
    by_hand = by_hand * layer.quant_gain.view(-1, 1, 1) + layer.quant_offset.view(-1, 1, 1)
    assert torch.allclose(q(x), by_hand, atol=1e-5)


@pytest.mark.parametrize("train", ["quantizers", "adc"])
def test_autocast_rounds_products_of_the_backward_pass_only(train):
    """Codes are whole numbers, which bfloat16 holds, so 16 bits are those of sums."""
    q, _, x = make("conv2d", train=train)
    grads = []
    for enabled in (False, True):
        q.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = q(x)
        y.float().square().sum().backward()
        grads.append((y.detach(), q.weight.grad.clone()))
    (plain, of_plain), (low, of_low) = grads
    assert torch.equal(plain, low) or train == "quantizers" and torch.allclose(plain, low, atol=0.02 * plain.abs().max())
    assert F.cosine_similarity(of_plain.flatten(), of_low.flatten(), dim=0) > 0.9999


def net_and_images():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    return net, torch.randn(32, 3, 6, 6)


def test_a_network_in_training_mode_says_once_that_it_has_no_hardware():
    net, x = net_and_images()
    q = convert(net, CrossbarSpec(8, 8, adc_bits=2), x)
    with pytest.warns(RuntimeWarning, match="through its quantizers only"):
        q.train()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q(x)
        convert(net, CrossbarSpec(8, 8, adc_bits=2), x, qat=True)(x)  # as was asked for
        convert(net, CrossbarSpec(8, 8, adc_range="ideal"), x).train()(x)  # there is nothing else


@pytest.mark.parametrize("skip", [[], ["4"]])
def test_gradients_in_evaluation_mode_say_what_to_do(skip):
    net, x = net_and_images()
    q = convert(net, CrossbarSpec(4, 4), x, skip=skip, train="adc").eval()
    with pytest.raises(RuntimeError, match=r"call network.train\(\)"):
        q(x).sum().backward()
    with torch.no_grad():
        assert not q(x).requires_grad
    q.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in q.parameters())


def test_a_chip_of_other_weights_is_refused_and_ranges_of_other_weights_are_named():
    net, x = net_and_images()
    q = convert(net, CrossbarSpec(4, 4, adc_bits=4), x, first_last_bits=None)
    program(q, DEVICE)
    with torch.no_grad():
        q(x)
        q[4].weight.mul_(1 + 2**-22)  # the same codes: the same network
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            q(x)
        q[4].weight.mul_(-1)
        with pytest.raises(ValueError, match="programmed with other weights"):
            q(x)
        program(q, DEVICE)
        with pytest.warns(RuntimeWarning, match="since ADC ranges"):
            q(x)
        program(q, None)
        with pytest.warns(RuntimeWarning, match="since ADC ranges"):
            copy.deepcopy(q)(x)
        calibrate(q, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            q(x)


def test_loaded_ranges_belong_to_the_weights_that_come_with_them_and_stay_when_weights_come_alone():
    net, x = net_and_images()
    q = convert(net, CrossbarSpec(4, 4, adc_bits=4), x, first_last_bits=None)
    other, state = copy.deepcopy(q), q.state_dict()
    with torch.no_grad():
        other[4].weight.mul_(-1)
        calibrate(other, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(state)
            assert torch.equal(other(x), q(x))
        with pytest.warns(RuntimeWarning, match="since ADC ranges"):
            other.load_state_dict({"4.weight": -state["4.weight"]}, strict=False)
            other(x)


def test_chips_are_drawn_anew_and_noise_is_another_in_each_pass():
    net, x = net_and_images()
    chips = []
    train = Training("chips", lambda network, seed: (chips.append(seed), program(network, DEVICE, seed, read_noise=0.5)), chip_steps=2)
    q = convert(net, CrossbarSpec(4, 4, adc_bits=6), x, first_last_bits=None, train=train)
    assert chips == [0]
    outputs = [q(x) for _ in range(6)]
    assert chips == [0, 1, 2, 3]
    assert not any(torch.equal(one, other) for number, one in enumerate(outputs) for other in outputs[:number])
    with image_numbers(0):
        one = q(x)
    with image_numbers(0):
        assert torch.equal(one, q(x))  # who gives images their numbers has the noise of these
    outputs[-1].sum().backward()
    torch.optim.SGD(q.parameters(), 0.1).step()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(q.eval()(x), q(x)) and chips[-1] == 0  # the one that it is evaluated on, of the weights as they are


def test_the_user_trains_on_noise_of_weights_without_cells():
    net, x = net_and_images()
    train = Training("chips", partial(add_weight_noise, noise=0.05))
    q = convert(net, CrossbarSpec(4, 4, adc_range="ideal"), x, train=train)
    one, other = q(x), q(x)
    assert not torch.equal(one, other)
    other.sum().backward()
    assert q[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("adc_plan", ["uniform", "ones"])
def test_ranges_are_chosen_anew_every_so_many_passes(adc_plan):
    net, x = net_and_images()
    q = convert(net, CrossbarSpec(4, 4, adc_bits=3, adc_plan=adc_plan), x, first_last_bits=None, train="adc")
    recalibrate_every(q, x, 3)
    q[1].eval()

    def ranges():
        return torch.cat([value.double().flatten() for values in ranges_of(q) for value in values if value is not None])

    found = [ranges()]
    for _ in range(4):
        with torch.no_grad():
            q[4].weight.mul_(-1.5)
        fresh = copy.deepcopy(q)
        q(x)
        found.append(ranges())
    assert [torch.equal(one, other) for one, other in zip(found, found[1:])] == [False, True, True, False]
    recalibrate(fresh, x)
    assert all(torch.equal(getattr(fresh[4].crossbar, name), getattr(q[4].crossbar, name)) for name in ("adc_delta", "adc_gain"))


def test_what_does_not_train_through_arrays_is_named():
    net, x = net_and_images()
    net[0].weight.requires_grad_(False)
    with pytest.warns(RuntimeWarning) as said:
        convert(net, CrossbarSpec(4, 4), x, train="adc", skip=["4"])
    assert [str(each.message) for each in said] == ["0.weight do not train, as they are frozen (requires_grad)",
                                                    "4 are digital, and train as they are, without arrays"]


@pytest.mark.parametrize(("train", "said"), [("adcs", "allowed are quantizers, adc, chips"), ("chips", "say which"),
                                             (3, "allowed are quantizers, adc, chips")])
def test_other_ways_are_refused(train, said):
    net, x = net_and_images()
    with pytest.raises(ValueError, match=said):
        convert(net, CrossbarSpec(4, 4), x, train=train)


def test_a_network_that_was_not_converted_is_refused():
    with pytest.raises(ValueError, match="was not converted"):
        train_through(nn.Linear(2, 2), "adc")


def test_a_network_wins_back_what_a_coarse_adc_takes():
    """Ten classes with noise around their centres: 200 steps through ADCs of 3 bits win back more than half of what calibration loses."""
    draws = torch.Generator().manual_seed(7)
    centres = torch.randn(10, 24, generator=draws)

    def data(count):
        labels = torch.randint(10, (count,), generator=draws)
        return centres[labels] + 1.1 * torch.randn(count, 24, generator=draws), labels

    def fit(network, steps, rate):
        optimizer = torch.optim.AdamW(network.parameters(), rate)
        for _ in range(steps):
            x, labels = data(64)
            optimizer.zero_grad()
            F.cross_entropy(network.train()(x), labels).backward()
            optimizer.step()

    def loss(network):
        with torch.no_grad():
            return F.cross_entropy(network.eval()(x), labels).item()

    torch.manual_seed(0)
    (some, _), (x, labels) = data(256), data(4000)
    net = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    fit(net, 300, 3e-3)
    q = convert(net, CrossbarSpec(4, 4, cell_bits=2, adc_bits=3), some, first_last_bits=None, train="adc")
    with without_adc(q):
        software = loss(q)
    untrained = loss(q)
    recalibrate_every(q, some, 20)
    fit(q, 200, 1e-3)
    recalibrate(q, some)
    assert untrained > 1.2 * software and loss(q) < (untrained + software) / 2, (software, untrained, loss(q))


def test_a_copy_and_a_file_keep_the_way():
    net, x = net_and_images()
    q = convert(net, CrossbarSpec(4, 4, adc_bits=2), x, first_last_bits=None, train="adc")
    recalibrate_every(q, x, 100)
    q(x)
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    for other in (copy.deepcopy(q), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), q(x))


# -- scales that are learned, and weights that are clipped


@pytest.mark.parametrize("kind", ["linear", "turned", "conv2d", "transposed"])
def test_gradients_of_learned_scales_are_those_of_lsq(kind):
    """`sum g (rint(v) - v)` inside the window and `sum g lo`, or hi, outside, over `sqrt(N Q)`: float64, by PyTorch's autograd of
    `s (v + (rint(v) - v).detach())`, clipped."""
    q, net, x = make(kind, train=Training("adc", learn_scales=True))
    [(_, layer)] = crossbar_layers(q)
    y = q(x)
    upstream = torch.randn(y.shape)
    y.backward(upstream)

    def learned(x, step, low, high):
        place = x / step
        inside = (place.detach() >= low) & (place.detach() <= high)
        return step * torch.where(inside, place + (place.round() - place).detach(), place.detach().round().clamp(low, high))

    *_, call, _, out = PRODUCTS[kind]
    weight, bias = net.weight.detach().double(), None if net.bias is None else net.bias.detach().double()
    s_a, s_w = (scale.detach().double().requires_grad_() for scale in (layer.act_quant.scale, layer.weight_quant.scale))
    lo, hi = layer.act_quant.window
    beside = s_w.view([-1 if dim == out else 1 for dim in range(weight.dim())])
    z = call(learned(x.double(), s_a, lo, hi), learned(weight, beside, -7, 7), bias)
    (z * layer.quant_gain.double().view([-1] + [1] * (-1 - layer.channel_dim)) * upstream.double()).sum().backward()
    spread = layer.form.images(x)[0].numel()
    for found, wanted, count, most in ((layer.act_quant.scale, s_a, spread, max(-lo, hi)),
                                       (layer.weight_quant.scale, s_w, layer.weight[0].numel(), 7)):
        wanted = wanted.grad / (count * most) ** 0.5
        assert (found.grad.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max() and wanted.abs().max() > 0


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_scales_decay_toward_the_share_of_inputs_that_clip(share):
    net, x = net_and_images()
    q = convert(net, CrossbarSpec(8, 8), x, activations="max", train=Training("quantizers", learn_scales=True, clip_share=share,
                                                                             scale_decay=1.0))
    scale = q[0].crossbar.act_quant.scale
    optimizer = torch.optim.SGD([scale], 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (0 * q(x)).sum().backward()
        optimizer.step()
    lo, hi = q[0].crossbar.act_quant.window
    clipped = ((x < (lo - 0.5) * scale) | (x > (hi + 0.5) * scale)).float().mean().item()
    assert abs(clipped - share) < 0.03


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_weights_are_clipped_to_deviations_of_their_layer_or_channel(kind, per):
    q, net, x = make(kind, train=Training("adc", weight_clip=1.2, weight_clip_per=per))
    q(x).sum().backward()
    torch.optim.SGD(q.parameters(), 1e-9).step()
    q(x)
    out = PRODUCTS[kind][-1]
    dims = [dim for dim in range(net.weight.dim()) if dim != out] if per == "channel" else None
    most = 1.2 * (net.weight.std(dims, correction=0, keepdim=True) if dims else net.weight.std(correction=0))
    assert torch.allclose(q.weight, net.weight.clamp(-most, most), atol=1e-6) and not torch.equal(q.weight, net.weight)


def test_learned_scales_are_saved_loaded_and_stay_float32(tmp_path):
    net, x = net_and_images()
    q = convert(net, CrossbarSpec(4, 4), x, train=Training("adc", learn_scales=True))
    optimizer = torch.optim.SGD(q.parameters(), 0.01)
    q(x).square().sum().backward()
    optimizer.step()
    recalibrate(q.eval(), x)
    save(q, tmp_path / "net.pt")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "net.pt", net)(x), q(x))
    before = q[0].crossbar.act_quant.scale.detach().clone()
    assert torch.equal(q.bfloat16()[0].crossbar.act_quant.scale, before) and isinstance(q[0].crossbar.act_quant.scale, nn.Parameter)
