"""What the errors of a layer's reads come to in its outputs. Histograms say how large each is, not how they add up."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from . import adc, channels
from .crossbar import CrossbarLayer
from .modes import without_adc

OUTPUTS = 2**14  # of a channel: enough for its variance
IMAGES = 32  # fewer do not tell how the outputs of a linear layer, one for each image, vary
LEAST = 3e-3  # of a layer's error without any bits: an error that is smaller adds up as the next larger one of its kind


@torch.no_grad()
def measured(model: nn.Module, layers: Sequence[tuple[str, CrossbarLayer]], choices: Mapping[str, adc.Choices],
             images: Tensor) -> dict[str, adc.Choices]:
    """`choices` with what each kind of read (digit z, slice k) does to the layer's outputs with each number of bits B.

    `adc.choices` counts `T E[(delta q - v)^2]`, as if T arrays erred independently and around 0. They do not: neighbouring arrays see
    the same activity, the cells of a channel lean to one side, and a converter of one bit sees one side of the reads. And the mean of
    a channel's error is taken away by its correction. So here each layer computes its own inputs, those of the network without ADCs,
    from the reads of one kind alone, as others are not converted; an error is the mean over the channels of

        Var(y[z, k, B] - y[z, k, most bits]),

    in the layer's own unit: multiplied so that all measured errors together are what was counted. That of sums of several kinds,
    whose errors have little in common (VGG7: the sum of a plan is within a third of the sum of its kinds), is not measured.

    Args: layers, with their names, whose specs have a plan; images, a batch of training inputs, of which the first IMAGES count; with
        fewer the result is `choices`. Cells are ideal ones.
    """
    if len(images) < IMAGES:
        return dict(choices)
    specs = {name: layer.spec for name, layer in layers}
    with without_adc(model):
        inputs = _inputs(model, layers, images)
        found = {}
        for name, layer in layers:
            layer.set_spec(specs[name])
            with layer.codes_kept():
                found[name] = _measured(layer, choices[name], inputs[name])
            layer.set_spec(replace(specs[name], adc_range="ideal"))
    return found


def _inputs(model, layers, images):
    """`{layer name: what enters it at its first call}`, of as many images as it needs."""
    inputs = {}

    def see(layer, given, y, name):  # returns nothing, which leaves the output as it is
        inputs.setdefault(name, _enough(given[0], layer, y))

    with contextlib.ExitStack() as stack:
        for name, layer in layers:
            stack.callback(layer.register_forward_hook(partial(see, name=name)).remove)
        model(images[:IMAGES])
    return inputs


def _enough(x, layer, y):
    """The first of a batch, that make OUTPUTS outputs of a channel."""
    if layer.channel_dim % y.dim() == 0 or len(x) != len(y):  # not a batch
        return x
    return x[:-(-OUTPUTS * len(y) * len(layer.adc_gain) // max(y.numel(), 1))]


def _measured(layer, counted, x):
    error, most = counted.error, counted.error.shape[2] - 1
    found, least = np.full(error.shape, np.nan), LEAST * error[..., 0].sum()
    for z, k in np.argwhere(error[..., 0] > least):
        def outputs(bits, z=z, k=k):
            of_kind = np.zeros(error.shape[:2], np.int64)
            of_kind[z, k] = bits
            layer.set_plan(adc.plan_of(counted, of_kind))
            return layer(x)

        expected = outputs(most)
        for bits in range(most):
            if error[z, k, bits] < least:
                break
            found[z, k, bits] = channels.std_mean(outputs(bits) - expected, layer.channel_dim)[0].square().mean().item()
    known = ~np.isnan(found)
    if not found[known].any():
        return counted
    times = found * (error[known].sum() / found[known].sum()) / np.where(error > 0, error, 1)
    times[..., 0][~known[..., 0]] = 1
    for bits in range(1, most + 1):
        times[..., bits] = np.where(known[..., bits], times[..., bits], times[..., bits - 1])
    return counted._replace(error=error * np.maximum(times, LEAST))  # a kind whose reads are seen has an error without bits
