"""Codes, values and gradients of both quantizers, and the training layers, against formulas written out in NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from models.quant import AQ, SAWB, WQ, CrossbarSpec, Qconv2d, QLinear, QLinearDoreFa
from models.quant.kernels import elementwise
from models.quant.layers.quantizers import WEIGHT_QUANTIZERS, act_codes

pytestmark = pytest.mark.usefixtures("one_thread")
BITS = [1, 2, 3, 4, 5, 6, 7, 8]


def inputs(alpha, count=1000, seed=0):
    """Values below 0, inside and above alpha, and the two bounds themselves."""
    x = np.random.default_rng(seed).uniform(-0.5 * alpha, 1.5 * alpha, count).astype(np.float32)
    x[:6] = [0.0, -0.0, alpha, -alpha, np.nextafter(np.float32(alpha), np.float32(0)), 3 * alpha]
    return x


# ---- PACT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 1.0, 6.0, 10.0])
@pytest.mark.parametrize("bits", BITS)
def test_pact_codes_and_values(bits, alpha):
    x, top = inputs(alpha), 2**bits - 1
    quantizer = AQ(bits, alpha)
    codes = quantizer.codes(torch.from_numpy(x)).detach().numpy()
    exact = top * np.clip(x.astype(np.float64), 0, np.float32(alpha)) / np.float32(alpha)
    # float32 may round the other way only where the exact position is a tie but for its last digits
    sure = np.abs(exact - np.floor(exact) - 0.5) > 1e-4
    assert np.array_equal(codes[sure], np.rint(exact)[sure]) and sure.mean() > 0.99
    assert np.abs(codes - exact).max() <= 0.5001
    assert codes.min() == 0 and codes.max() == top and np.array_equal(codes, np.rint(codes))
    assert codes[2] == codes[5] == top and codes[0] == codes[1] == codes[3] == 0
    np.testing.assert_allclose(quantizer(torch.from_numpy(x)).detach(), codes * (alpha / top), rtol=1e-6)


def test_pact_ties_go_to_the_even_code():
    """alpha = 15 at 4 bits: the code is the rounded value, so k + 1/2 is a tie."""
    halves = torch.arange(15.0) + 0.5
    assert AQ(4, 15.0).codes(halves).tolist() == [0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 6.0, 10.0])
@pytest.mark.parametrize("bits", BITS)
def test_pact_gradient(bits, alpha, dtype):
    """To x where 0 < x < alpha, 0 at both bounds; to alpha the sum over x >= alpha, alpha itself included."""
    x = torch.from_numpy(inputs(alpha)).to(dtype)
    weight = torch.from_numpy(np.random.default_rng(1).normal(size=len(x))).float()
    quantizer = AQ(bits, alpha)
    x.requires_grad_()
    (quantizer(x) * weight).sum().backward()
    value = x.detach().double().numpy()
    assert (value == alpha).any() and (value == 0).any()
    inside, above = (value > 0) & (value < alpha), value >= alpha
    tolerance = dict(rtol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2)
    np.testing.assert_allclose(x.grad.float().numpy(), np.where(inside, weight.numpy(), 0), **tolerance)
    assert (x.grad.float().numpy()[~inside] == 0).all()
    each = 1e-6 if dtype == torch.float32 else 2**-8  # a gradient of type bfloat16 is rounded before it is summed
    np.testing.assert_allclose(quantizer.act_alpha.grad, weight.numpy()[above].sum(), rtol=1e-5,
                               atol=each * np.abs(weight.numpy()[above]).sum())
    assert quantizer.act_alpha.grad.dtype == torch.float32 and x.grad.dtype == dtype


@pytest.mark.parametrize("position, to_x, to_alpha", [
    (-1.0, 0, 0), (0.0, 0, 0), (1e-20, 1, 0), (0.5, 1, 0), (1 - 2**-24, 1, 0), (1.0, 0, 1),
    (1 + 2**-23, 0, 1), (9.0, 0, 1)])
def test_pact_gradient_at_single_points(position, to_x, to_alpha):
    x = torch.tensor([position * 4.0], requires_grad=True)
    quantizer = AQ(4, 4.0)
    quantizer(x).sum().backward()
    assert x.grad.item() == pytest.approx(to_x, rel=1e-6)
    assert quantizer.act_alpha.grad.item() == pytest.approx(to_alpha, rel=1e-6)


def test_pact_gradient_compares_with_alpha_itself():
    """10.01 rounds to 10 in bfloat16, and yet the input 10 lies below it."""
    x = torch.tensor([10.0], dtype=torch.bfloat16, requires_grad=True)
    quantizer = AQ(4, 10.01)
    quantizer(x).sum().backward()
    assert x.grad.item() == pytest.approx(1, rel=1e-2) and quantizer.act_alpha.grad.item() == 0


def test_pact_gradient_sums_in_float32():
    """A bfloat16 sum of 3,000 ones stops at 256."""
    x = torch.full((3000,), 7.0, dtype=torch.bfloat16, requires_grad=True)
    quantizer = AQ(4, 6.0)
    quantizer(x).sum().backward()
    assert quantizer.act_alpha.grad.item() == pytest.approx(3000, rel=1e-2)


def test_bfloat16_input_gets_the_code_of_its_value():
    x = torch.linspace(-1, 11, 4001).bfloat16()
    quantizer = AQ(8, 9.3)
    assert torch.equal(quantizer.codes(x).float(), quantizer.codes(x.float()))


LAYOUTS = {
    "contiguous": lambda x: x.clone(), "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "part": lambda x: torch.cat([x, x], 3)[..., :x.shape[3]], "offset": lambda x: torch.cat([x[:1], x])[1:],
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "expanded": lambda x: x[:, :1].expand(x.shape), "one pixel": lambda x: x[:, :, :1, :1],
    "empty": lambda x: x[:0], "row": lambda x: x[0, 0, 0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pact_in_every_memory_layout(layout, dtype):
    """More elements than one piece of work; gradients that arrive in the layout of x, in another, and as one number."""
    x = torch.from_numpy(inputs(1.0, 3 * 20 * 33 * 17)).view(3, 20, 33, 17)
    x = LAYOUTS[layout](x.to(dtype))
    weight = torch.linspace(-1, 1, x.numel()).view(x.shape)
    value = x.double()
    position = value.clamp(0, 1) * 15
    for gradient in (weight.to(dtype), weight.to(dtype).transpose(0, -1).contiguous().transpose(0, -1), None):
        quantizer, leaf = AQ(4, 1.0), x.detach().requires_grad_()
        codes = quantizer.codes(leaf)
        assert codes.shape == x.shape and (codes.double() - position).abs().le(0.5001).all()
        assert torch.equal(codes.double(), codes.double().round())
        codes.backward(torch.ones(()).to(codes.dtype).expand(x.shape) if gradient is None else gradient.to(codes.dtype))
        g = 15 * (torch.ones_like(value) if gradient is None else gradient.double())
        tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
        inside = (value > 0) & (value < 1)
        torch.testing.assert_close(leaf.grad.double(), torch.where(inside, g, 0), **tolerance)
        above = g[value >= 1]
        each = 1e-2 if dtype == torch.bfloat16 else 1e-5
        assert quantizer.act_alpha.grad.item() == pytest.approx(float(above.sum()), abs=each * float(above.abs().sum()))


@pytest.mark.parametrize("bits", BITS)
def test_training_and_inference_take_the_same_codes(bits):
    """Ties and their neighbours in float32 included: `x` runs through every half code of several alpha."""
    top = 2**bits - 1
    for alpha in (0.7, 1.0, 3.3, 10.01):
        ties = ((np.arange(top) + 0.5) * alpha / top).astype(np.float32)
        x = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(99)), inputs(alpha)])
        x = torch.from_numpy(x)[:, None]
        layer = QLinearDoreFa(1, 1, spec=CrossbarSpec(a_bits=bits), alpha_init=alpha)
        quantizer = AQ(bits, alpha)
        codes = quantizer.codes(x).detach()
        assert torch.equal(codes, act_codes(x, quantizer.act_alpha.detach(), top))
        assert torch.equal(layer.a_codes(x).flatten().float(), codes.flatten())
        assert torch.equal(layer.a_codes(x.double()).flatten().float(), codes.flatten())


def test_image_is_clamped_above_only():
    quantizer = AQ(4, 3.0)
    x = torch.tensor([-2.0, -0.09, 0.0, 0.31, 2.9, 3.5], requires_grad=True)
    codes = quantizer.image_codes(x)
    assert codes.tolist() == [-10, 0, 0, 2, 14, 15]
    codes.sum().backward()
    np.testing.assert_allclose(x.grad, [5, 5, 5, 5, 5, 0], rtol=1e-6)
    assert quantizer.act_alpha.grad.item() == pytest.approx(5)


# ---- DoReFa ----------------------------------------------------------------------------------------------------------


def dorefa(x, bits):
    """Position on the code axis before rounding, float64."""
    t = np.tanh(x.astype(np.float64))
    return (2**bits - 1) * (t / (2 * np.abs(t).max()) + 0.5)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("bits", BITS)
def test_dorefa_codes_and_values(bits, scale):
    x = np.random.default_rng(0).normal(scale=scale, size=(16, 8, 3, 3)).astype(np.float32)
    x.flat[np.argmax(np.abs(x))] = np.abs(x).max()  # the largest is positive
    x.flat[:2] = 0, -np.abs(x).max()
    top, position = 2**bits - 1, dorefa(x, bits)
    codes = WQ(bits).codes(torch.from_numpy(x))
    assert codes.dtype == torch.uint8 and codes.min() == 0 and codes.max() == top
    sure = np.abs(position - np.floor(position) - 0.5) > 1e-3
    assert np.array_equal(codes.numpy()[sure], np.rint(position)[sure]) and sure.mean() > 0.98
    integers = WQ(bits).integers(torch.from_numpy(x))
    assert torch.equal(integers, 2 * codes.float() - top)
    np.testing.assert_allclose(WQ(bits)(torch.from_numpy(x)), integers.numpy() / top, rtol=1e-6)


def test_dorefa_has_no_zero_level():
    levels = np.unique(WQ(4)(torch.linspace(-1, 1, 999)).numpy())
    np.testing.assert_allclose(levels, np.arange(-15, 16, 2) / 15, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_dorefa_gradient(bits):
    """`dy/dx = (1 - tanh(x)^2) / max|tanh|`: rounding is straight-through, the maximum a constant."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=500).astype(np.float32))
    x[0], x[1], x[2] = 0.0, 4.0, -4.0  # 0, and both ends of the range
    weight = torch.linspace(-2, 3, 500)
    x.requires_grad_()
    (WQ(bits)(x) * weight).sum().backward()
    t = np.tanh(x.detach().double().numpy())
    np.testing.assert_allclose(x.grad, weight.numpy() * (1 - t**2) / np.abs(t).max(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scale, bits", [(1e-3, 4), (0.1, 1), (0.1, 4), (0.1, 8), (5.0, 4)])
def test_dorefa_in_one_pass_is_the_formula(scale, bits, memory_format, monkeypatch):
    """The CPU's own loops give what PyTorch's operations give: every code, and the gradient to the last bits."""
    shape = 80, 65, 3, 3  # several work items
    x = (scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(memory_format=memory_format)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))  # another order of memory than x's
    found = []
    for can_run in (elementwise.can_run, lambda x: False):
        monkeypatch.setattr(elementwise, "can_run", can_run)
        leaf = x.clone().requires_grad_()
        y = WQ(bits).integers(leaf)
        y.backward(grad)
        found.append((y.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [elementwise.CHUNK + 1, 3 * elementwise.CHUNK - 7])
def test_all_work_items_of_an_input_are_done(size):
    """Whole ones and the rest, which is short or nearly whole."""
    numbers = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(size, generator=numbers)
    codes, unknown = elementwise.act_codes(x, torch.tensor(3.0), 15)
    assert torch.equal(codes, (x.clamp(0, 3) * 5).round().byte()) and not unknown
    assert torch.equal(elementwise.window_codes(x.view(1, 1, -1, 1), torch.tensor(0.25), -9, 12)[0].flatten(),
                       (x / 0.25).round().clamp(-9, 12).short())
    sums = torch.randint(-2**20, 2**20, (1, 1, size, 3), generator=numbers, dtype=torch.int32)
    scale, offset = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([1.0, -3.0, 0.5])
    assert torch.equal(elementwise.scaled(sums.clone(), scale, offset), sums * scale + offset)
    shift = torch.tensor([5, -2**30, 0])
    for acc in (sums.clone(), sums.float(), sums.long()):
        assert torch.equal(elementwise.scaled(acc, scale, offset, None, 2, shift), (2 * sums + shift) * scale + offset)


@pytest.mark.parametrize("lift, padding, dtype",
                         [(0, (0, 0, 0, 0), torch.int16), (9, (2, 0, 1, 3), torch.uint8), (0, (1, 1, 0, 0), torch.int16)])
def test_codes_of_a_window_in_one_pass(lift, padding, dtype):
    """As PyTorch makes them step by step, with zeros around the images; whatever is not a number is found wherever it is."""
    x = 4 * torch.randn(3, 5, 7, 2, generator=torch.Generator().manual_seed(0))
    top, bottom, left, right = padding
    for scale in (0.25, -0.3):
        codes, unknown = elementwise.window_codes(x, torch.tensor(scale), -9, 12, lift, padding)
        wanted = F.pad((x / scale).round().clamp(-9, 12) + lift, (0, 0, left, right, top, bottom), value=lift)
        assert codes.dtype == dtype and torch.equal(codes, wanted.to(dtype)) and not unknown
    for place in ((0, 0, 0, 0), (2, 4, 6, 1)):
        y = x.clone()
        y[place] = float("nan")
        assert elementwise.window_codes(y, torch.tensor(0.25), -9, 12, lift, padding)[1]
        assert elementwise.act_codes(y, torch.tensor(3.0), 15)[1]


@pytest.mark.parametrize("bits", BITS)
def test_dorefa_of_constant_weights(bits):
    """All zero has no scale, and yet codes in range and a finite gradient."""
    x = torch.zeros(7, requires_grad=True)
    y = WQ(bits)(x)
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all() and WQ(bits).codes(x.detach()).max() <= 2**bits - 1
    assert WQ(bits).codes(torch.full((3,), 0.2)).tolist() == [2**bits - 1] * 3


@pytest.mark.parametrize("cell_bits", BITS)
def test_reference_shares_add_up_to_the_level_of_zero(cell_bits):
    for w_bits in range(cell_bits, 9):
        bits = [min(cell_bits, w_bits - low) for low in range(0, w_bits, cell_bits)]
        shares = WQ.reference_twice(bits)
        assert sum(share << (cell_bits * k) for k, share in enumerate(shares)) == 2**w_bits - 1


# ---- SAWB ------------------------------------------------------------------------------------------------------------

SAWB_BITS = BITS[1:]


@pytest.mark.parametrize("scale", [1e-3, 0.1, 5.0])
@pytest.mark.parametrize("bits", SAWB_BITS)
def test_sawb_codes_and_values(bits, scale):
    """`clip = c_1 rms - c_2 mean |x|`, codes `round(m clamp(x / clip, -1, 1)) + m`, values `clip (W - m) / m`."""
    x = np.random.default_rng(0).normal(scale=scale, size=(16, 8, 3, 3)).astype(np.float32)
    x.flat[:2] = 0, 20 * scale
    quantizer, m = SAWB(bits), 2 ** (bits - 1) - 1
    codes = quantizer.codes(torch.from_numpy(x))
    c1, c2 = SAWB.COEFFICIENTS[bits]
    exact = x.astype(np.float64)
    clip = min(c1 * np.sqrt((exact**2).mean()) - c2 * np.abs(exact).mean(), np.abs(exact).max())
    assert quantizer.clip.item() == pytest.approx(clip, rel=1e-4)
    position = m * np.clip(exact / clip, -1, 1) + m
    sure = np.abs(position - np.floor(position) - 0.5) > 1e-3 * m
    assert codes.dtype == torch.uint8 and codes.min() >= 0 and codes.max() == 2 * m
    assert np.array_equal(codes.numpy()[sure], np.rint(position)[sure]) and sure.mean() > 0.7
    assert codes.flatten()[0] == m  # zero is a level
    np.testing.assert_allclose(quantizer(torch.from_numpy(x)), (codes.numpy().astype(float) - m) * clip / m, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("bits", SAWB_BITS)
def test_sawb_clips_where_the_error_of_bell_shaped_weights_is_least(bits):
    """Tried out on a grid, for normal and Laplace weights: the formula costs at most a fifth more than the best level."""
    rng, m = np.random.default_rng(0), 2 ** (bits - 1) - 1
    for x in (rng.normal(size=40000), rng.laplace(size=40000)):
        quantizer = SAWB(bits)
        quantizer.codes(torch.from_numpy(x).float())

        def error(clip):
            return ((np.rint(np.clip(x / clip, -1, 1) * m) * clip / m - x) ** 2).mean()

        best = min(error(clip) for clip in np.linspace(0.5, 12, 231))
        assert error(quantizer.clip.item()) < 1.2 * best


@pytest.mark.parametrize("bits", SAWB_BITS)
def test_sawb_gradient(bits):
    """1 inside the clipping level, which is a constant, and 0 beyond."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=500).astype(np.float32))
    weight = torch.linspace(-2, 3, 500)
    x.requires_grad_()
    quantizer = SAWB(bits)
    (quantizer(x) * weight).sum().backward()
    inside = x.detach().abs() < quantizer.clip
    assert 0 < (~inside).sum() < 150
    np.testing.assert_allclose(x.grad, weight * inside, rtol=1e-5, atol=1e-6)


def test_sawb_keeps_the_level_of_training_for_inference():
    """Planes and packed files hold codes of the level that was trained; other weights do not move it."""
    quantizer = SAWB(4)
    quantizer.codes(torch.randn(100))
    clip = quantizer.clip.clone()
    quantizer.eval().codes(10 * torch.randn(100))
    assert quantizer.clip == clip
    copy = SAWB(4).eval()
    copy.load_state_dict(quantizer.state_dict())
    assert copy.clip == clip
    np.testing.assert_allclose(copy.weights(torch.arange(15), copy.scale(None)), (np.arange(15) - 7) * clip.item() / 7, rtol=1e-6)


@pytest.mark.parametrize("x", [torch.zeros(7), torch.full((3,), 0.2), torch.tensor([0.0] * 99 + [1.0])])
def test_sawb_of_weights_without_a_bell_shape(x):
    quantizer = SAWB(4)
    codes = quantizer.codes(x)
    assert torch.isfinite(quantizer(x)).all() and codes.max() <= 14 and (codes[x == 0] == 7).all()
    assert 0 < quantizer.clip <= max(x.max().item(), 1e-30)


def test_sawb_needs_two_bits():
    with pytest.raises(ValueError, match="w_bits is 1; weights with codes around an exact zero"):
        SAWB(1)


@pytest.mark.parametrize("cell_bits", BITS)
def test_sawb_reference_cells_hold_the_digits_of_the_zero_code(cell_bits):
    for w_bits in range(max(2, cell_bits), 9):
        bits = [min(cell_bits, w_bits - low) for low in range(0, w_bits, cell_bits)]
        shares = SAWB(w_bits).reference_twice(bits)
        assert all(share % 2 == 0 and share // 2 < 2**b for share, b in zip(shares, bits, strict=True))
        assert sum(share // 2 << (cell_bits * k) for k, share in enumerate(shares)) == 2 ** (w_bits - 1) - 1


# ---- both ------------------------------------------------------------------------------------------------------------


def test_32_bits_switch_a_quantizer_off():
    x = torch.randn(5, requires_grad=True)
    assert AQ(32)(x) is x and WQ(32)(x) is x
    assert not list(AQ(32).parameters())


@pytest.mark.parametrize("quantizer, name", [(AQ, "abit"), (WQ, "wbit")])
@pytest.mark.parametrize("bits", [0, -1, 9, 16, 33, 4.5, 4.0, True, "4", None])
def test_bits_out_of_range(quantizer, name, bits):
    with pytest.raises(ValueError, match=f"{name} is {bits!r}; allowed are 1 to 8, and 32"):
        quantizer(bits)


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match="alpha_init"):
        AQ(4, alpha)


@given(wbit=st.sampled_from(BITS + [32]), abit=st.sampled_from(BITS + [32]), bias=st.booleans(),
       seed=st.integers(0, 99))
def test_layers_are_operations_on_quantized_values(wbit, abit, bias, seed):
    """`y = op(A alpha / (2^a - 1), (2 W - (2^w - 1)) / (2^w - 1)) + bias`."""
    torch.manual_seed(seed)
    alpha = 0.8
    options = dict(bias=bias, wbit=wbit, abit=abit, alpha_init=alpha)
    conv = Qconv2d(6, 4, (3, 1), stride=(2, 1), padding=(1, 0), groups=2, **options)
    linear = QLinear(6, 4, out_scale=0.25, **options)

    def value(x, layer):
        x, weight = x.double(), layer.weight.detach()
        if abit < 32:
            x = AQ(abit, alpha).codes(x).double() * alpha / (2**abit - 1)
        if wbit < 32:
            weight = (2 * WQ(wbit).codes(weight).double() - (2**wbit - 1)) / (2**wbit - 1)
        return x, weight.double(), layer.bias.detach().double() if bias else None

    x = torch.rand(3, 6, 5, 4) * 1.2
    wanted = F.conv2d(*value(x, conv), stride=(2, 1), padding=(1, 0), groups=2)
    torch.testing.assert_close(conv(x).double(), wanted, rtol=1e-5, atol=1e-5)
    x = torch.rand(3, 6) * 1.2
    torch.testing.assert_close(linear(x).double(), 0.25 * F.linear(*value(x, linear)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", SAWB_BITS)
def test_layers_with_sawb_are_operations_on_quantized_values(bits):
    torch.manual_seed(bits)
    conv = Qconv2d(6, 4, 3, padding=1, wbit=bits, wq="sawb", alpha_init=0.8)
    x = torch.rand(3, 6, 5, 4)
    quantizer = SAWB(bits)
    weight = quantizer(conv.weight.detach())
    wanted = F.conv2d(AQ(4, 0.8)(x), weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), wanted, rtol=1e-5, atol=1e-6)


def test_unknown_weight_quantizer_lists_the_known_ones():
    with pytest.raises(ValueError, match="no weight quantizer is named 'lsq'; known are dorefa, sawb"):
        QLinear(4, 4, wq="lsq")


def test_first_clipping_level_of_least_squared_error():
    """Against a grid of its own: no level among 1000 has a smaller error but for the distance between candidates."""
    x = torch.from_numpy(np.random.default_rng(0).gamma(1.0, size=5000).astype(np.float32)) - 0.5
    for bits in (2, 4, 8):
        quantizer = AQ(bits, 99.0)
        quantizer.fit(x)

        def error(alpha):
            positive = x.clamp_min(0).numpy().astype(np.float64)
            return ((np.rint(np.minimum(positive / alpha, 1) * (2**bits - 1)) * alpha / (2**bits - 1) - positive) ** 2).mean()

        best = min(error(alpha) for alpha in np.linspace(0.01, 1, 1000) * x.max().item())
        assert error(quantizer.act_alpha.item()) < 1.03 * best
    quantizer.fit(torch.full((9,), -1.0))  # nothing to fit to
    assert quantizer.act_alpha.item() > 0


def test_gradient_of_a_layer():
    """All three gradients of one layer: of a linear operation on values whose gradients are known."""
    torch.manual_seed(0)
    layer = QLinear(5, 3, alpha_init=1.0, out_scale=0.5)
    x = torch.tensor([[-1.0, 0.3, 0.7, 1.0, 2.0]], requires_grad=True)
    grad = torch.tensor([[1.0, -2.0, 0.5]])
    (layer(x) * grad).sum().backward()
    w_q = layer.weight_quant(layer.weight).detach()
    back = 0.5 * (grad @ w_q)[0]
    np.testing.assert_allclose(x.grad[0], back * torch.tensor([0, 1, 1, 0, 0]), rtol=1e-5)
    np.testing.assert_allclose(layer.act_quant.act_alpha.grad, back[3] + back[4], rtol=1e-5)
    t = torch.tanh(layer.weight.detach())
    x_q = layer.act_quant(x.detach()).detach()
    np.testing.assert_allclose(layer.weight.grad, 0.5 * grad.T @ x_q * (1 - t**2) / t.abs().max(), rtol=1e-4)
    np.testing.assert_allclose(layer.bias.grad, 0.5 * grad[0], rtol=1e-6)


def test_image_layer():
    """The picture passes unquantized, or on the grid of the activations with its negative values."""
    torch.manual_seed(0)
    plain = Qconv2d(3, 4, 3, padding=1, bias=False, image=True, alpha_init=2.0)
    rounded = Qconv2d(3, 4, 3, padding=1, bias=False, image=True, quantize_image=True, alpha_init=2.0)
    rounded.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 6, 6)
    weight = plain.weight_quant(plain.weight)
    torch.testing.assert_close(plain(x), F.conv2d(x, weight, padding=1))
    grid = (torch.clamp(x, max=2.0) * 7.5).round() / 7.5
    torch.testing.assert_close(rounded(x), F.conv2d(grid, weight, padding=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.eval()(x), F.conv2d(x, weight, padding=1))


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@pytest.mark.parametrize("kernel, options", [
    (3, {"padding": 1}), (3, {"stride": 2}), ((3, 2), {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}), (1, {}),
    (4, {}), (3, {"padding": "same"}), ((4, 2), {"padding": "same"}), (3, {"groups": 3})])
def test_image_layer_in_evaluation_is_the_float64_convolution(kernel, options):
    """For any number of images: rounded once, then scaled."""
    torch.manual_seed(0)
    layer = Qconv2d(3, 6, kernel, bias=False, image=True, **options).eval()
    x = torch.randn(5, 3, 9, 8)
    weight = layer.weight_quant.integers(layer.weight).double()
    sums = F.conv2d(x.double(), weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    with torch.no_grad():
        for images in (5, 2, 1):
            assert torch.equal(layer(x[:images]), sums[:images].float() * layer.weight_quant.step)


def test_a_clipping_level_is_fitted_up_to_the_maximum():
    quantizer = AQ(8, 10.0)
    quantizer.fit(torch.arange(256) * 3 / 255)  # each of its codes once: exact at the maximum
    assert quantizer.act_alpha.item() == 3


def test_weights_of_codes_are_numbers_however_large_the_weights_were():
    """tanh of 100 is 1, whose atanh is infinite."""
    quantizer = WQ(4)
    x = torch.tensor([[100.0, -0.2, 0.4], [-100.0, 0, 0.1]])
    weights = quantizer.weights(quantizer.codes(x), quantizer.scale(x))
    assert weights.isfinite().all() and torch.equal(quantizer.codes(weights), quantizer.codes(x))


@pytest.mark.parametrize("wq", ["dorefa", "sawb"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_16_bits_have_the_codes_of_the_same_values_in_float32(wq, dtype, bits):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    quantizer, other = (WEIGHT_QUANTIZERS[wq](bits) for _ in range(2))
    found, wanted = quantizer.integers(x), other.integers(wide)
    assert found.dtype == dtype and torch.equal(found.float(), wanted)
    assert torch.equal(quantizer.codes(x), other.codes(wide))
    found.sum().backward()
    wanted.sum().backward()
    assert x.grad.dtype == dtype and torch.equal(x.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (8, 32), (32, 8)], ids=str)
def test_sums_of_codes_beyond_float16(bits):
    """By autocast and by type: two of the operands' roundings to 11 bits, and one of the sum."""
    torch.manual_seed(0)
    options = {"wbit": bits[0], "abit": bits[1], "alpha_init": 2.0}
    for layer, x in ((Qconv2d(128, 8, 3, **options), torch.rand(2, 128, 5, 5) * 2), (QLinear(2000, 8, **options), torch.rand(3, 2000) * 2)):
        y = layer(x)
        gradient, = torch.autograd.grad(y.square().mean(), layer.weight)
        with torch.autocast("cpu", torch.float16):
            found = layer(x)
        torch.testing.assert_close(found, y, rtol=1.5 * 2**-10, atol=2e-3 * y.std().item())
        assert (torch.autograd.grad(found.float().square().mean(), layer.weight)[0] - gradient).norm() < 2e-3 * gradient.norm()
        exact = layer.half().float()(x.half().float())  # of the same rounded weights
        assert (layer.half()(x.half()) - exact).abs().max() < 0.05 * exact.std()


@pytest.mark.parametrize("bits", range(5, 9))
def test_sawb_of_weights_of_one_size(bits):
    """The formula gives a level below zero for them."""
    x = 0.1 * torch.tensor([1.0, -1.0] * 20)
    torch.testing.assert_close(SAWB(bits)(x), x, rtol=0.05, atol=0)


def test_gradients_of_a_clipping_level_in_float16():
    x = torch.full((100_000,), 7.0, dtype=torch.float16, requires_grad=True)
    quantizer = AQ(4, 6.0)
    quantizer.codes(x).backward(torch.full_like(x, 0.4))
    assert quantizer.act_alpha.grad.item() == pytest.approx(1e5, rel=1e-2)
    x = torch.tensor([10.0], dtype=torch.float16, requires_grad=True)  # below the level, which float16 would round to 10
    quantizer = AQ(4, 10.001)
    quantizer(x).sum().backward()
    assert x.grad.item() == pytest.approx(1, rel=1e-2) and quantizer.act_alpha.grad.item() == 0
