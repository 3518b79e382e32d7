"""Counting what costs follow from: what the arrays have to do for some images (`counts`), and the ones of the weights."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..layers.batches import Batch, batches_of, called
from ..layers.crossbar import crossbar_layers
from ..network import counts
from ..network.counts import Counts, Layout
from ..network.modes import without_adc
from .columns import digit_ones


def count(network: nn.Module, images: Batch | Iterable[Batch], layouts: Iterable[Layout] | None = None, batch_dim: int = 0) -> Counts:
    """Let `images` pass a network without ADCs, and count.

    Args: images, inputs `[N, ...]`, or batches of them; layouts, batch_dim, see `counting`.
    Raises: ValueError for a network without layers on crossbars, or no images.
    """
    with without_adc(network), torch.no_grad(), counting(network, layouts, batch_dim) as found:
        for batch in batches_of(images, batch_dim):
            called(network, batch)
    if not found.images:
        raise ValueError("no images were given: costs are those of an image")
    return found


@contextlib.contextmanager
def counting(network: nn.Module, layouts: Iterable[Layout] | None = None, batch_dim: int = 0) -> Iterator[Counts]:
    """`counts.counting`; the weights are counted too, so that no estimate takes longer than the others."""
    with counts.counting(network, layouts, batch_dim) as found:
        yield found
    for name, layer in crossbar_layers(network):
        if name in found.layers:
            digit_ones(layer)
