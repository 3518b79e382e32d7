"""Noise on the weights of a network themselves (`add_weight_noise`), which then lie on no cells: a chip is one draw of it.

A weight code W becomes `W' = W + N(0, s^2)`, and inputs stay the codes that they are. No ADC reads the sums. With the largest weight of the
output channel as unit, `x = |W - L/2| / max|w|` is a weight's size and s is

    a number        the same for all weights
    "pcm"           the error of programming phase-change memory, `s = sigma(180 uS x) / 180 uS`; a weight below 0.6 uS is exactly 0

Source of both: Buechel et al., "Analog Foundation Models", NeurIPS 2025, arXiv 2505.09663, and the numbers of sigma from its code,
github.com/IBM/analog-foundation-models, apply_noise_model.py (30 May 2025): a fit in microsiemens, of one device for each sign of a weight
up to 52.5 uS and of two beyond. Certainty: the authors' own numbers, in all their digits. Other than there, the weights are quantized, the
unit is always that of the whole channel (there also of 512 of its inputs), and the polynomials are not rounded to float16.
"""

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import nn

from ..arrays.cells import Cells, Chip
from ..arrays.mapping import w_rows
from ..arrays.spec import Numbers
from ..layers.crossbar import CrossbarLayer, on_crossbars
from .program import WEIGHTS, check_seed, generator

PCM = "pcm"
NOISE = Numbers(float, f"a share from 0 to 1, or {PCM}", lambda value: 0 <= value <= 1, {PCM: PCM})
LARGEST_US, TWO_DEVICES_US, ZERO_US = 180.0, 52.5, 0.6  # conductance of the largest weight; from where on two devices; below it is none
ONE_DEVICE = Polynomial([2.5797410660159494, 0.22419685954327148, -0.00371581208142707, 2.939751381126213e-05])  # sigma(g), both in uS
TWO_DEVICES = Polynomial([2.110295720240385, 0.2453487119885723, -0.003054993405157235, 1.2329755395573392e-05])


def noisy_weights(weights: np.ndarray, noise: float | str, normals: np.ndarray) -> np.ndarray:
    """Weights with noise, all in units of the largest weight of their channel. Args: normals, a standard normal number for each."""
    if noise != PCM:
        return weights + noise * normals
    g = LARGEST_US * np.abs(weights).clip(max=1)  # what is rounded may be larger than the largest
    sigma = np.where(g > TWO_DEVICES_US, TWO_DEVICES(g), ONE_DEVICE(g)) / LARGEST_US
    return np.where(g < ZERO_US, 0.0, weights + sigma * normals)


def add_weight_noise(model: nn.Module, noise: float | str, seed: int = 0) -> None:
    """Put every crossbar layer of `model` on the chip of this seed: its weights with noise, see the module. The same seed gives the same
    chip on every machine. `program(model, None)` takes the noise away.

    Args: noise, s as a share of the largest weight of each output channel, or "pcm"; seed, of the chip.
    Raises: ValueError for other values, and layers with an ADC or pairs. No layer is changed then.
    """
    if not NOISE.has(noise):
        raise ValueError(f"noise is {noise!r}; allowed is {NOISE.text}")
    check_seed(seed)
    layers = on_crossbars(model)
    for _, layer in layers:
        check_noisy(layer)
    chips = [_chip(layer, noise, generator(seed, name, 0, WEIGHTS)) for name, layer in layers]
    for (_, layer), chip in zip(layers, chips):
        layer.chip = chip


def check_noisy(layer: CrossbarLayer) -> None:
    """Refuse a layer whose weights lie on cells. Raises: ValueError."""
    for name, allowed in (("adc_range", "ideal"), ("weights", "offset")):
        if getattr(layer.spec, name) != allowed:
            raise ValueError(f"{name} is {getattr(layer.spec, name)!r} with noise on the weights, which are on no cells and see no ADC; "
                             f"allowed is {allowed}")


def _chip(layer: CrossbarLayer, noise: float | str, drawing: np.random.Generator) -> Chip:
    """What noise makes of W is in the cells of slice 0, on the grid: without an ADC slices are only added."""
    middle, ideal = layer.weight_quant.zero_twice / 2, layer.ideal_cells()
    codes = layer.w_codes().cpu().numpy() - middle
    largest = _largest_codes(layer)
    weights = np.divide(codes, largest, out=np.zeros_like(codes), where=largest > 0)
    noisy = noisy_weights(weights, noise, drawing.standard_normal(codes.shape)) * largest
    grid = 2.0**ideal.fraction_bits
    change = np.rint(grid * np.where(largest > 0, noisy - codes, 0)).astype(np.int32)
    values = ideal.values.clone()
    values[0] += w_rows(torch.from_numpy(change), layer.geometry.groups).to(values.device)
    sums = 2 * (codes + change / grid).sum((1, 2, 3))
    return Chip(Cells(values, ideal.reference, ideal.fraction_bits), code_sums=torch.from_numpy(sums).to(values.device),
                of=layer.version())


def _largest_codes(layer: CrossbarLayer) -> np.ndarray:
    """The largest size of a weight of each channel, as the network has it before it is rounded, in codes: float64 `[out, 1, 1, 1]`."""
    step = torch.as_tensor(layer.weight_quant.step).detach().cpu().double()  # of 2 W - L
    largest = layer.unquantized_weight().detach().cpu().double().flatten(1).abs().amax(1)
    return (largest / (2 * step)).numpy().reshape(-1, 1, 1, 1)
