"""Linear quantizers of weights and inputs: codes and gradients against formulas in NumPy, steps and windows against trying many."""

import copy
import io

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.quant.conversion import scales
from models.quant.conversion.linear_quantizers import InputQuantizer, LinearWQ

pytestmark = pytest.mark.usefixtures("one_thread")
W_BITS = [2, 3, 4, 8]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through_a_file(module, other):
    """The state of a module, read as checkpoints are, in another one."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


# ---- weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", W_BITS)
def test_weight_codes_values_and_gradient(bits):
    """Every channel with a step of its own; ties to the even code, the ends and what lies beyond them."""
    m, step = 2 ** (bits - 1) - 1, np.array([0.25, 2.0, 0.5])
    position = np.concatenate([np.arange(-2 * m, 2 * m + 1) / 2, [m + 0.49, -m - 0.49, 5 * m, -5 * m]])
    quantizer = LinearWQ(bits)
    quantizer.scale = torch.tensor(step, dtype=torch.float32)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.tensor(step[:, None] * position, dtype=dtype).view(3, -1, 1, 1).requires_grad_()
        exact = x.detach().double().numpy() / step.reshape(3, 1, 1, 1)
        signed = np.clip(np.rint(exact), -m, m)
        codes = quantizer.codes(x)
        assert codes.dtype == torch.uint8 and np.array_equal(codes, signed + m) and codes.max() == 2 * m and codes.min() == 0
        integers = quantizer.integers(x)
        assert integers.dtype == dtype and np.array_equal(integers.detach().double(), 2 * signed)
        weight = torch.linspace(1, 2, x.numel(), dtype=dtype).view(x.shape)
        y = quantizer(x)
        assert y.dtype == dtype and np.array_equal(y.detach().double(), signed * step.reshape(3, 1, 1, 1))
        (y * weight).sum().backward()
        np.testing.assert_allclose(x.grad.double(), np.where(np.abs(exact) <= m, weight.double(), 0), rtol=1e-6)
    assert torch.equal(quantizer.step, quantizer.scale / 2) and quantizer.zero_twice == 2 * m


def squared_error(w, step, m):
    return ((np.clip(np.rint(w / step), -m, m) * step - w) ** 2).sum(-1)


@pytest.mark.parametrize("bits", W_BITS)
def test_steps_of_least_squared_error(bits):
    """Per channel against 1,500 steps tried one by one: few weights and many, bell-shaped, with outliers, of two sizes."""
    m, rng = 2 ** (bits - 1) - 1, np.random.default_rng(0)
    for count in (1, 9, 64, 2000):
        w = rng.normal(size=(6, count))
        w[1] *= 1e-4
        w[2] = rng.standard_t(3, size=count)
        w[3, 0] = 30
        w[4] = np.sign(w[4])
        w[5] *= rng.random(count) < 0.3
        w = w.astype(np.float32)
        quantizer = LinearWQ(bits)
        quantizer.fit(torch.from_numpy(w).view(6, count, 1))
        assert quantizer.scale.shape == (6,) and quantizer.scale.dtype == torch.float32
        w = w.astype(np.float64)
        found = squared_error(w, quantizer.scale.double().numpy()[:, None], m)
        for channel in range(6):
            largest = np.abs(w[channel]).max()
            if largest:
                steps = np.geomspace(largest / m / 100, largest / (m - 0.5), 1500)
                best = min(squared_error(w[channel], step, m) for step in steps)
                assert found[channel] <= 1.02 * best + 1e-9 * largest**2, (count, channel)


def test_steps_that_clip_nothing_and_channels_of_zeros():
    w = normal(5, 4, 3, 3)
    w[2] = 0
    quantizer = LinearWQ(4)
    quantizer.fit(w.half(), "max")
    wanted = w.half().float().abs().amax((1, 2, 3)) / 7
    assert torch.equal(quantizer.scale[[0, 1, 3, 4]], wanted[[0, 1, 3, 4]]) and quantizer.scale[2] == 1
    for method in ("max", "mse"):
        quantizer.fit(w, method)
        assert quantizer.scale[2] == 1 and (quantizer.codes(w)[2] == 7).all() and quantizer(w)[2].abs().max() == 0


@pytest.mark.parametrize("count", [1, 100, 128, 300])
def test_the_step_of_a_channel_is_its_own(count):
    """Whatever channels stand beside it, and however they lie in memory."""
    w = normal(7, count)
    for method in ("max", "mse"):
        whole = scales.of_channels(w, 7, method)
        assert torch.equal(torch.cat([scales.of_channels(channel[None], 7, method) for channel in w]), whole)
        assert torch.equal(scales.of_channels(w.T.contiguous().T, 7, method), whole)


def test_weight_quantizer_is_kept_as_it_is():
    """Through files, copies, and a change of the network's type; into one that has no steps yet, and one with others."""
    w = normal(5, 7)
    quantizer = LinearWQ(4)
    quantizer.fit(w)
    codes, scale = quantizer.codes(w), quantizer.scale.clone()
    fitted = LinearWQ(4)
    fitted.fit(normal(3, 7))
    for other in (copy.deepcopy(quantizer), copy.deepcopy(quantizer).half(), through_a_file(quantizer, LinearWQ(4)),
                  through_a_file(quantizer, fitted)):
        assert torch.equal(other.codes(w), codes) and torch.equal(other.scale, scale) and other.scale.dtype == torch.float32
    assert torch.equal(quantizer.codes(w.double()), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_reference_cells_of_linear_weights_hold_the_digits_of_zero(bits):
    assert LinearWQ(bits).reference_twice((1,) * bits) == (2,) * (bits - 1) + (0,)  # m = 2^(w-1) - 1: all ones but the top
    assert LinearWQ(8).reference_twice((3, 3, 2)) == (14, 14, 2)


def test_what_weight_quantizers_refuse():
    with pytest.raises(ValueError, match="w_bits is 1; weights with codes around an exact zero"):
        LinearWQ(1)
    with pytest.raises(ValueError, match="wbit is 9"):
        LinearWQ(9)
    quantizer = LinearWQ(4)
    with pytest.raises(ValueError, match=r"the weight has 3 output channels, its quantizer 0 steps; call fit\(weight\)"):
        quantizer.codes(normal(3, 4))
    for number in (float("nan"), float("inf")):
        w = normal(3, 4)
        w[1, 2] = number
        with pytest.raises(ValueError, match="the weight holds NaN or infinite numbers"):
            quantizer.fit(w)
    w = normal(3, 4)
    assert LinearWQ(32)(w) is w


# ---- inputs --------------------------------------------------------------------------------------------------------------

DATA = {"relu": lambda x: x.relu(), "gelu": F.gelu, "silu": lambda x: F.silu(2 * x), "normal": lambda x: x + 0.1,
        "negative": lambda x: -x.abs(), "outliers": lambda x: torch.where(x > 2, 12 * x, x)}


def fitted(values, bits, encoding, method="mse"):
    quantizer = InputQuantizer(bits, encoding)
    quantizer.fit(values, values.min().item(), values.max().item(), method)
    return quantizer


def window_quantizer(bits, scale, lo, hi, encoding="phases"):
    quantizer = InputQuantizer(bits, encoding)
    quantizer.load_state_dict({"scale": torch.tensor(scale), "lo": torch.tensor(lo), "hi": torch.tensor(hi)})
    return quantizer


@pytest.mark.parametrize("lo, hi", [(0, 255), (-127, 127), (-3, 12), (-255, 0), (0, 1)])
def test_input_codes_values_and_gradient(lo, hi):
    position = np.concatenate([np.arange(2 * lo - 6, 2 * hi + 7) / 2, [1e4, -1e4]])
    quantizer = window_quantizer(8, 0.25, lo, hi)
    for dtype in (torch.float32, torch.float64, torch.float16):
        x = torch.tensor(0.25 * position, dtype=dtype).requires_grad_()
        wanted = np.clip(np.rint(position), lo, hi)
        codes = quantizer.codes(x)
        assert codes.dtype == (torch.uint8 if lo == 0 else torch.int16) and np.array_equal(codes, wanted)
        assert quantizer.integers(x).dtype == dtype and np.array_equal(quantizer.integers(x).detach(), wanted)
        y = quantizer(x)
        assert y.dtype == dtype and np.array_equal(y.detach(), wanted * 0.25)
        weight = torch.linspace(1, 2, len(x), dtype=dtype)
        (y * weight).sum().backward()
        np.testing.assert_allclose(x.grad, np.where((position >= lo) & (position <= hi), weight, 0), rtol=2e-3)


def test_input_codes_round_the_float32_quotient():
    """Not a product with the inverse, which rounds otherwise near ties; in the order of memory; nothing leaves the window."""
    quantizer = window_quantizer(8, 0.0371, -20, 235)
    ties = (np.arange(-20, 235) + 0.5) * np.float64(np.float32(0.0371))
    x = np.concatenate([np.nextafter(ties.astype(np.float32), np.float32(side)) for side in (-99, 99)] + [ties]).astype(np.float32)
    wanted = np.clip(np.rint(x / np.float32(0.0371)), -20, 235)
    image = torch.from_numpy(x).view(1, 1, 15, -1).expand(2, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    codes = quantizer.codes(image)
    assert np.array_equal(codes[1, 2].flatten(), wanted) and codes.is_contiguous()
    odd = quantizer.codes(torch.tensor([float("nan"), float("inf"), -float("inf")] * 11))
    assert odd.min() == -20 and odd.max() == 235


def least_error(x, windows, steps):
    """The error of the best of all steps and windows, one by one."""
    x = x.double().numpy()
    return min(((np.clip(np.rint(x / step), lo, hi) * step - x) ** 2).mean() for step in steps for lo, hi in windows)


@pytest.mark.parametrize("bits", [2, 4, 5])
@pytest.mark.parametrize("data", DATA)
def test_steps_and_windows_of_least_squared_error(data, bits):
    """Against all windows times 300 steps: no pair is better by more than the distance between steps."""
    x, top, half = DATA[data](normal(600)), 2**bits - 1, 2 ** (bits - 1) - 1
    steps = np.geomspace(x.abs().max().item() / 400, x.abs().max().item() * 1.05, 300)
    lopsided = [(0, top)] if x.min() >= 0 else [(lo, lo + top) for lo in range(-top, 1)]
    windows = {"phases": [*lopsided, (-half, half)], "offset": lopsided, "twos": lopsided if x.min() >= 0 else [(-half - 1, half)]}
    for encoding, allowed in windows.items():
        quantizer = fitted(x, bits, encoding)
        lo, hi = quantizer.window
        assert (lo, hi) in allowed
        error = (quantizer(x) - x).double().square().mean().item()
        best = least_error(x, allowed, steps)
        if encoding == "phases" and (lo, hi) == (-half, half):
            assert error <= 1.07 * best
        else:
            assert error <= 1.02 * best
        if encoding == "phases" and x.min() < 0 and (lo, hi) != (-half, half):
            symmetric = least_error(x, [(-half, half)], steps)
            assert symmetric > 1.03 * error  # it would have been taken


def test_windows_follow_the_data():
    """8 bits of many numbers: bell-shaped ones save a bit a magnitude, lopsided ones do not lose half of their codes."""
    x = normal(200_000)
    bell, gelu, relu = (fitted(DATA[name](x), 8, "phases") for name in ("normal", "gelu", "relu"))
    assert bell.window == (-127, 127) and bell.bits == 7 and bell.signed
    lo, hi = gelu.window
    assert -16 <= lo <= -8 and hi == lo + 255 and gelu.bits == 8
    assert relu.window == (0, 255) and relu.bits == 8 and not relu.signed
    for quantizer, name in ((bell, "normal"), (gelu, "gelu"), (relu, "relu")):
        data = DATA[name](x)
        steps = quantizer.scale.item() * np.linspace(0.8, 1.25, 24)
        best = least_error(data, [quantizer.window], steps)
        assert (quantizer(data) - data).square().mean().item() <= 1.01 * best
    twos, offset = fitted(x, 8, "twos"), fitted(F.gelu(x), 8, "offset")
    assert twos.window == (-128, 127) and twos.bits == offset.bits == 8 and offset.window == gelu.window
    assert fitted(F.gelu(x), 8, "ternary").window == gelu.window


@pytest.mark.parametrize("lowest, largest, encoding, window, scale", [
    (0.0, 5.1, "phases", (0, 15), 5.1 / 15), (-7.0, 7.0, "ternary", (-8, 7), 1.0), (-7.0, 7.0, "twos", (-8, 7), 1.0),
    (-1.0, 14.0, "offset", (-1, 14), 1.0), (-1.0, 14.0, "twos", (-8, 7), 2.0), (-15.0, 0.0, "phases", (-15, 0), 1.0)])
def test_steps_of_inputs_that_clip_nothing(lowest, largest, encoding, window, scale):
    """The extremes count, not the sample; `ternary` at 7: no step holds more with fewer codes, so that the symmetric one is as good."""
    quantizer = InputQuantizer(4, encoding)
    quantizer.fit(torch.linspace(lowest, largest, 50) / 2, lowest, largest, "max")
    assert quantizer.scale.item() == pytest.approx(scale, rel=1e-6)
    assert quantizer.window == ((-7, 7) if encoding == "ternary" else window)


def test_one_bit_and_zeros():
    """1 bit keeps the side of the larger extreme; numbers that are all zero have the codes of unsigned ones."""
    x = normal(1000)
    for encoding in ("phases", "ternary", "twos", "offset"):
        for data, window in ((x.relu() - 0.1, (0, 1)), (0.1 - x.relu(), (-1, 0))):
            for method in ("mse", "max"):
                quantizer = fitted(data, 1, encoding, method)
                assert quantizer.window == window and quantizer.bits == 1 and quantizer.scale > 0.5
        quantizer = fitted(torch.zeros(9), 4, encoding)
        assert quantizer.window == (0, 15) and quantizer.scale == 1 and quantizer(torch.zeros(3)).tolist() == [0, 0, 0]
    late = InputQuantizer(4)
    late.fit(torch.zeros(9), -1.0, 3.0)  # the sample missed them
    assert late.scale >= 0.2 and late.window[1] > 0


def test_input_quantizer_is_kept_as_it_is():
    """The window that was read once is not that of the state that is loaded later."""
    x, source = normal(500), fitted(DATA["gelu"](normal(500)), 4, "phases")
    other = InputQuantizer(4)
    assert other.window == (0, 15) and source.window == (-1, 14)
    for each in (through_a_file(source, other), copy.deepcopy(source), copy.deepcopy(source).half(), copy.deepcopy(source).double()):
        assert each.window == (-1, 14) and each.scale.dtype == torch.float32 and torch.equal(each.codes(x), source.codes(x))
    again = copy.deepcopy(source)
    again.encoding = "twos"
    again.fit(x, x.min().item(), x.max().item())
    assert again.window == (-8, 7) and again.lo == -8 and again.hi == 7 and source.window == (-1, 14) and source.lo == -1


@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_steps_are_float32_whatever_the_default_type(default):
    """Codes hang on their last bits."""
    w, x = normal(5, 7), normal(500)
    weights, inputs = LinearWQ(8), fitted(x, 8, "phases")
    weights.fit(w)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        others = through_a_file(weights, LinearWQ(8)), through_a_file(inputs, InputQuantizer(8)), InputQuantizer(8), LinearWQ(8)
    finally:
        torch.set_default_dtype(before)
    assert all(other.scale.dtype == torch.float32 for other in others)
    assert torch.equal(others[0].codes(w), weights.codes(w)) and torch.equal(others[1].codes(x), inputs.codes(x))


def test_what_input_quantizers_refuse():
    with pytest.raises(ValueError, match="abit is 0; allowed are 1 to 8"):
        InputQuantizer(0)
    quantizer, x = InputQuantizer(4), normal(9)
    for values, lowest in ((x[:0], -1.0), (x / 0, -1.0), (x * float("nan"), -1.0), (x, float("nan"))):
        with pytest.raises(ValueError, match="the inputs to fit a quantizer to are empty, or hold NaN or infinite"):
            quantizer.fit(values, lowest, 1.0)
    assert InputQuantizer(32)(x) is x


def test_steps_of_weights_that_have_no_inverse():
    quantizer, w = LinearWQ(8), torch.full((2, 3), 1e-44)
    quantizer.fit(w)
    assert (quantizer.scale == 1).all() and (quantizer.codes(w) == 127).all()
