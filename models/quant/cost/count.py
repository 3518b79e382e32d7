"""Counting what costs follow from: what the arrays have to do for some images (`counts`), and the ones of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .. import counts
from ..counts import Counts, Layout
from ..crossbar import crossbar_layers
from ..modes import without_adc
from .columns import digit_ones

BATCH = 64  # images at a time where they come as one tensor


def count(network: nn.Module, images: Tensor | Iterable[Tensor], layouts: Iterable[Layout] | None = None) -> Counts:
    """Let `images` pass a network without ADCs, and count.

    Args: images, inputs `[N, ...]`, or batches of them; layouts, see `counting`.
    Raises: ValueError for a network without layers on crossbars, or no images.
    """
    batches = images.split(BATCH) if isinstance(images, Tensor) else images
    with without_adc(network), torch.no_grad(), counting(network, layouts) as found:
        for batch in batches:
            network(batch)
    if not found.images:
        raise ValueError("no images were given: costs are those of an image")
    return found


@contextlib.contextmanager
def counting(network: nn.Module, layouts: Iterable[Layout] | None = None) -> Iterator[Counts]:
    """`counts.counting`; the weights are counted too, so that no estimate takes longer than the others."""
    with counts.counting(network, layouts) as found:
        yield found
    for name, layer in crossbar_layers(network):
        if name in found.layers:
            digit_ones(layer)
