"""What plans of the ADCs' bits are expected to cost a network, told before its images are seen (`say_expected`)."""

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from ..arrays import plans
from ..layers.batches import Batch, output_of
from .counts import Counts, counting
from .modes import without_adc

log = logging.getLogger(__name__)


@torch.no_grad()
def say_expected(model: nn.Module, images: Batch, choices: Mapping[str, plans.Choices], bits: Sequence[np.ndarray],
                 weights: Sequence[float]) -> None:
    """Log what the plans of some layers are expected to leave of the network's output, `10 log10(E[y^2] / sum_l w_l e_l)` dB with y its
    outputs without ADCs and e_l the layers' errors, and what that depends on: how many of the bits on the word lines are one.

    Args: images, a batch of network inputs; choices, bits, weights, see `plans.bits_of`, of the same layers, by name.
    """
    if not log.isEnabledFor(logging.INFO):  # in training, which plans anew and anew
        return
    with without_adc(model), counting(model) as counts:
        signal = output_of(model, images).double().square().mean().item()
    error = sum(weight * layer.left(own) for weight, layer, own in zip(weights, choices.values(), bits))
    reads = [layer.reads * own[..., 0].size for layer, own in zip(choices.values(), bits)]
    mean = sum(count * layer.mean(own) for count, layer, own in zip(reads, choices.values(), bits)) / sum(reads)
    left = f"{10 * math.log10(signal / error):.1f} dB" if error and signal else "no error"
    log.info("plan of %.2f bits in the mean: %s expected at the network's output, signal to error; of the bits on its word lines %s %% are "
             "one, the lowest first", mean, left, ", ".join(f"{100 * share:.0f}" for share in shares_of_ones(counts)))


def shares_of_ones(counts: Counts) -> list[float]:
    """Share of the word lines that are on for each bit of a network's inputs, lowest first: of all rows and output pixels of the layers
    whose inputs have the bit."""
    ones, lines = np.zeros(8), np.zeros(8)
    for layer in counts.layers.values():
        bits, groups, rows = layer.ones.shape
        ones[:bits] += layer.ones.sum((1, 2))
        lines[:bits] += layer.pixels * groups * rows
    return list(ones[lines > 0] / lines[lines > 0])
