"""GPTQ against its definition: rounding column by column, the rest moved to the least of the quadratic form, solved anew each time."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from models.quant.conversion.gptq import gptq
from models.quant.conversion.linear_quantizers import LinearWQ
from models.quant.conversion.tracing import trace

pytestmark = pytest.mark.usefixtures("one_thread")


def correlated(rng, inputs, count=None):
    """A Hessian of inputs that vary in few directions: a spectrum of 1 / i^2."""
    x = rng.normal(size=(count or 3 * inputs, inputs)) / (1 + np.arange(inputs))
    x = x @ np.linalg.qr(rng.normal(size=(inputs, inputs)))[0]
    return torch.from_numpy(x.T @ x)


def fitted(weight, bits):
    quantizer = LinearWQ(bits)
    quantizer.fit(weight)
    return quantizer


def error(rounded, weight, hessian):
    d = (rounded - weight).double()
    return torch.einsum("oi,ij,oj->o", d, hessian, d)


def by_definition(w, hessian, step, m, damp):
    """Codes - m of one channel. After each column the ones behind it are `w_R - H_RR^-1 H_RF d_F` for the deviations d_F so far."""
    inputs = len(w)
    hessian = hessian + damp * np.diag(hessian).mean() * np.eye(inputs)
    deviation = np.zeros(inputs)
    for j in range(inputs):
        now = w[j]
        if j:
            rest = slice(j, inputs)
            now = w[j] - np.linalg.solve(hessian[rest, rest], hessian[rest, :j] @ deviation[:j])[0]
        deviation[j] = np.clip(np.rint(now / step), -m, m) * step - w[j]
    return np.rint((w + deviation) / step)


@pytest.mark.parametrize("inputs, groups", [(7, 1), (150, 1), (9, 4)])
def test_gptq_is_its_definition(inputs, groups):
    """Within a block of columns, across two, and for each group with a Hessian of its own."""
    rng = np.random.default_rng(inputs)
    hessians = torch.stack([correlated(rng, inputs) for _ in range(groups)])
    weight = torch.from_numpy(rng.normal(size=(2 * groups, inputs))).float()
    before, quantizer = weight.clone(), fitted(weight, 4)
    rounded = gptq(weight, hessians if groups > 1 else hessians[0], quantizer, groups=groups, damp=0.02)
    assert rounded.dtype == weight.dtype and torch.equal(weight, before)
    for channel in range(2 * groups):
        step = quantizer.scale[channel].double().item()
        wanted = by_definition(weight[channel].double().numpy(), hessians[channel // 2].numpy(), step, 7, 0.02)
        np.testing.assert_allclose(rounded[channel], wanted * step, rtol=1e-6)
        assert np.array_equal(quantizer.codes(rounded)[channel].numpy() - 7.0, wanted)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_output_error_on_correlated_inputs(bits):
    rng = np.random.default_rng(0)
    hessian, weight = correlated(rng, 64), torch.from_numpy(rng.normal(size=(48, 64))).float()
    quantizer = fitted(weight, bits)
    ours, nearest = (error(rounded, weight, hessian).sum() for rounded in (gptq(weight, hessian, quantizer), quantizer(weight)))
    assert ours < 0.25 * nearest


def test_against_all_roundings():
    """Three columns of 2 bits have 27 roundings: none beats the best of them, and in the mean over channels greed beats nearest."""
    rng = np.random.default_rng(1)
    weight = torch.from_numpy(rng.normal(size=(1000, 3))).float()
    hessian, quantizer = correlated(rng, 3, 40), fitted(weight, 2)
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))
    best = torch.stack([error(code * quantizer.scale[:, None], weight, hessian) for code in every]).min(0).values
    ours, nearest = (error(r, weight, hessian) for r in (gptq(weight, hessian, quantizer, damp=1e-6), quantizer(weight)))
    assert (ours >= best * (1 - 1e-9)).all()
    gain = nearest - ours
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5  # of a mean of 0 that would be one in 30,000


def test_inputs_that_are_independent_or_always_zero_are_rounded_to_nearest():
    rng = np.random.default_rng(2)
    weight, quantizer = torch.from_numpy(rng.normal(size=(5, 8))).float(), LinearWQ(3)
    quantizer.fit(weight)
    nearest = quantizer(weight)
    diagonal = torch.diag(torch.from_numpy(rng.random(8)))
    diagonal[3, 3] = 0
    for hessian in (diagonal, torch.zeros(8, 8, dtype=torch.float64)):
        assert torch.equal(gptq(weight, hessian, quantizer), nearest)
    hessian = correlated(rng, 8)
    hessian[:, 5] = hessian[5] = 0
    assert torch.equal(gptq(weight, hessian, quantizer, damp=0)[:, 5], nearest[:, 5])


@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(5, 4), (4, 7, 5)), (nn.Conv2d(6, 4, 1, stride=2), (4, 6, 5, 6)), (nn.Conv1d(6, 4, 3, stride=2, padding=1), (4, 6, 8)),
    (nn.Conv2d(6, 8, (3, 2), (2, 1), (2, 0), (1, 2), groups=2), (4, 6, 7, 8)), (nn.Conv2d(3, 4, (4, 3), padding="same"), (4, 3, 6, 7))])
def test_the_hessian_of_a_layer_is_that_of_its_pixels(layer, shape):
    """With it a channel's `w H w^T` is the sum of the squares that the layer gives, by PyTorch, over pixels and batches."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        y = layer(x).movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
        [product] = trace(layer, list(x.split((1, 3))), gram=True).products
        weight, groups = layer.weight.flatten(1).double(), len(product.gram)
        for group, hessian, squares in zip(weight.chunk(groups), product.gram, y.double().square().sum(1).chunk(groups)):
            torch.testing.assert_close(torch.einsum("or,rs,os->o", group, hessian, group), squares, rtol=1e-5, atol=0)


def test_what_it_refuses():
    weight, hessian = torch.ones(4, 6), torch.eye(6, dtype=torch.float64)
    quantizer = fitted(weight, 4)
    for wrong in (hessian * float("nan"), -hessian):
        with pytest.raises(ValueError, match="the Hessian holds NaN or infinite numbers, or is no sum of x x"):
            gptq(weight, wrong, quantizer)
