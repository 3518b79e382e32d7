"""Reference engine: the equations of `mapping.py` and `converter.py` in plain PyTorch, any device, short enough to check."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..arrays.readout import column_numbers, curve_at, first_image, fused, noise, read_key
from . import accumulator_dtype

if TYPE_CHECKING:
    from ..arrays.mapping import MappedLayer


def unsupported(layer: MappedLayer, device: torch.device) -> str | None:
    """It runs every layer on every device."""


def prepare(layer: MappedLayer) -> MappedLayer:
    """There is nothing to prepare."""
    return layer


def accumulate(layer: MappedLayer, a_codes: Tensor) -> Tensor:
    """The accumulators of the contract (`engines`)."""
    spec = layer.spec
    if spec.adc_range == "ideal" and layer.readout is None:
        return integer_convolution(layer, a_codes)[None]
    slices = {k: g for g, (_, ks) in enumerate(layer.delta_groups) for k in ks}
    if spec.adc_range in ("dynamic", "ideal"):
        slices = dict.fromkeys(slices, 0)
    acc = None
    for number, (z, k, u, j) in enumerate(reads(layer, a_codes)):
        if acc is None:
            acc = torch.zeros(max(slices.values()) + 1, *u.shape, dtype=torch.int64, device=u.device)
        if spec.adc_range == "ideal":
            value = u
        else:
            t = number // (len(spec.digit_bits) * len(spec.slice_bits))
            value = _dynamic(u, spec.adc_bits) if spec.adc_range == "dynamic" else _static(u, layer, z, k, j, t)
        acc[slices[k]] += value << (spec.dac_bits * z + spec.cell_bits * k)
    return _image(layer, acc, a_codes).to(accumulator_dtype(layer))


def histogram(layer: MappedLayer, a_codes: Tensor) -> Tensor:
    """The counts of the contract (`engines`)."""
    spec, bins = layer.spec, layer.bins
    counts = torch.zeros(len(spec.digit_bits), len(spec.slice_bits), layer.classes, bins.count, dtype=torch.int64)
    for z, k, u, j in reads(layer, a_codes):
        index = (bins.index(u) + bins.count * j).flatten()
        counts[z, k] += torch.bincount(index, minlength=counts[z, k].numel()).cpu().view(layer.classes, -1)
    return counts


def reads(layer: MappedLayer, a_codes: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Every read of a layer: yields (z, k, u, j), `u` int64 `[groups, pixels, out / groups]`, array after array, and the classes of their
    n, int64 `[groups, pixels, 1]`.

    Sums of at most 1024 x 255 x 255, or of cells on a grid below 2^20, are exact in float64.
    """
    spec = layer.spec
    a_rows = input_rows(layer, a_codes)
    cells = _cells(layer, a_codes.device)
    for t, (start, stop) in enumerate(layer.arrays):
        for z, digit_bits in enumerate(spec.digit_bits):
            a = ((a_rows[:, :, start:stop] >> (spec.dac_bits * z)) & (2**digit_bits - 1)).double()
            n = a.sum(2, keepdim=True)
            j = layer.class_of(n)
            for k, (values, reference) in enumerate(cells):
                u = a @ values[:, start:stop]
                if spec.reference == "analog":
                    u = u - a @ reference[:, start:stop]
                if layer.readout is not None:
                    u = _read_out(layer, u, a, values[:, start:stop], reference[:, start:stop], (t, z, k), j, len(a_codes))
                    if spec.skips_idle:
                        u = u * (n > 0)
                yield z, k, u.long(), j


def _read_out(layer, u, a, values, reference, place, j, images):
    """`u` as the converters of a chip see it, with noise, gain and offset: `readout.Readout`."""
    readout, (t, z, k) = layer.readout, place
    groups, pixels, out = u.shape
    error, both = 0, None
    if readout.needs_both:
        both = readout.both[k, :, slice(*layer.arrays[t])].to(u.device).double()
    if readout.noisy:
        c0, c1, m = readout.cell_noise[k] if readout.cell_noise else (0.0, 0.0, 0.0)
        ones = (a**2).sum(2, keepdim=True)
        twice = 2 * (a**2 @ values) + 2 * m * (a**2 @ reference) if both is None else 2 * (a**2 @ both)
        base = layer.base_noise[z, k].to(u.device)[j]
        variance = (base + c0 * (1 + m) * ones).float() + torch.tensor(c1 / 2).float() * twice.float()
        pixel = torch.arange(pixels, device=u.device)
        image, pixel = pixel // max(pixels // max(images, 1), 1) + first_image(), pixel % max(pixels // max(images, 1), 1)
        counter = ((pixel * len(layer.arrays) + t) * len(layer.spec.digit_bits) + z) * len(layer.spec.slice_bits) + k
        key = read_key(readout.seed, image, counter).view(1, -1, 1)
        error = noise(variance, key, column_numbers(groups, out).to(u.device)[:, None]).double()
    if readout.curve is not None:
        if both is not None:
            u = between_curves(readout.curve[k], u, a, both)
        else:
            u = through_curve(readout.curve[k], u, a, reference if layer.spec.reference == "analog" else None)
    u = u + error
    if readout.gain is not None:
        u = (u * readout.gain[k, :, t, None].to(u.device)).round()
    return u if readout.offset is None else u + readout.offset[k, :, t, None].to(u.device)


def through_curve(curve: tuple[float, ...], u: Tensor, a: Tensor, reference: Tensor | None) -> Tensor:
    """`f(u)` of `readout.Readout.curve`, for one slice. Args: u `[..., pixels, out]`, a `[..., pixels, rows]`, reference `[..., rows, 1]`,
    None where it is digital; all float64."""
    current = curve[3] * a.sum(-1, keepdim=True)
    start = (current if reference is None else a @ reference + current).float()
    change, rise = _change(curve, u, start)
    return (change if reference is not None else change + rise.round()).round()


def between_curves(curve: tuple[float, ...], u: Tensor, a: Tensor, both: Tensor) -> Tensor:
    """`f(u)` of `readout.Readout.curve` for one slice of pairs. Args: u `[..., pixels, out]`, a `[..., pixels, rows]`, both
    `[..., rows, out]`; all float64."""
    current = curve[3] * a.sum(-1, keepdim=True)
    return _change(curve, u, (a @ both - u).float() * 0.5 + current.float())[0].round()


def _change(curve, u, start):
    """(`c(u + S) - c(S)`, `c(S) - S`) for S = start, float32."""
    first, second, third, rise = curve_at(curve, start)
    u = u.float()
    slope = fused(u, fused(u, third, second), first)
    return u.double() * slope.double(), rise


def _cells(layer, device):
    """For each slice what its cells add to `u`, float64 `[groups, rows, out / groups]`, and their reference, `[groups, rows, 1]`."""
    if layer.cells is not None:
        return [(values.to(device).double(), reference.to(device).double()[..., None])
                for values, reference in zip(layer.cells.values, layer.cells.reference)]
    spec, w_rows = layer.spec, layer.w_rows.to(device)
    scale = round(1 / spec.unit)
    bits = [((w_rows >> (spec.cell_bits * k)) & (2**size - 1)).double() for k, size in enumerate(spec.slice_bits)]
    return [(scale * c, torch.full_like(c[..., :1], twice)) for c, twice in zip(bits, layer.reference_twice)]


def _static(u, layer, z, k, j, t):
    """What the ADC codes of reads of these classes, of array t, add."""
    total = torch.zeros_like(u)
    for each in range(layer.classes):
        converter = layer.converter(z, k, each)
        added = _compared(u, layer, z, k, each, t) if layer.compares else converter.added(converter.encode(u, layer.unit))
        total += added * (j == each)
    return total


def _compared(u, layer, z, k, j, t):
    """The same by the thresholds that reads have reached."""
    thresholds = layer.kept_thresholds(z, k, j)
    thresholds = thresholds[:, min(t, thresholds.shape[1] - 1), None].to(u.device)
    converter = layer.converter(z, k, j)
    added = converter.added(np.arange(converter.q_min, converter.q_max + 1)).tolist()
    value = torch.full_like(u, added[0])
    for i, (low, high) in enumerate(itertools.pairwise(added)):
        value += (high - low) * (u >= thresholds[..., i])
    return value


def _dynamic(u, adc_bits):
    """Value of each read in units of 2^-B u, range from the batch; one (t, z, k) of each group."""
    lb = u.amin((1, 2), keepdim=True)
    span = u.amax((1, 2), keepdim=True) - lb
    step = span.float() / 2**adc_bits
    q = ((u - lb).float() / step).round().clamp(0, 2**adc_bits - 1)
    value = q.nan_to_num().long() * span + lb * 2**adc_bits
    return torch.where(span == 0, u * 2**adc_bits, value)


def integer_convolution(layer: MappedLayer, a_codes: Tensor) -> Tensor:
    """`sum A (2 W - L)` as integers `[N, H', W', out]`, or the sum that `engines` names for cells on a grid: one float64
    convolution, exact because the sums are small."""
    weight = (2 * layer.w_codes.to(a_codes.device).double() - layer.zero_twice if layer.cells is None
              else layer.cell_weights.to(a_codes.device))
    top, bottom, left, right = layer.geometry.padding
    x = F.pad(a_codes.permute(0, 3, 1, 2).double(), (left, right, top, bottom))
    y = F.conv2d(x, weight, None, layer.geometry.stride, 0, layer.geometry.dilation, layer.geometry.groups)
    return y.permute(0, 2, 3, 1).round().to(accumulator_dtype(layer)).contiguous()


def input_rows(layer: MappedLayer, a_codes: Tensor) -> Tensor:
    """Input codes, int64 `[groups, pixels, rows]`, rows in (tap, channel) order, pixels in (image, y, x) order."""
    top, bottom, left, right = layer.geometry.padding
    x = F.pad(a_codes.permute(0, 3, 1, 2).double(), (left, right, top, bottom))
    patches = F.unfold(x, layer.kernel, layer.geometry.dilation, 0, layer.geometry.stride).long()
    groups, taps = layer.geometry.groups, layer.kernel[0] * layer.kernel[1]
    patches = patches.view(len(x), groups, layer.group_channels, taps, patches.shape[2])  # N, groups, channels, taps, pixels
    return patches.permute(1, 0, 4, 3, 2).reshape(groups, -1, taps * layer.group_channels)


def _image(layer, acc, a_codes):
    """`[G, groups, pixels, out / groups]` to `[G, N, H', W', out]`."""
    n, height, width, _ = a_codes.shape
    size = layer.geometry.output_size(height, width, layer.kernel)
    acc = acc.view(len(acc), layer.geometry.groups, n, *size, -1)
    return acc.permute(0, 2, 3, 4, 1, 5).reshape(len(acc), n, *size, -1)
