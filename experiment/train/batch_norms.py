"""The running statistics of batch norm, taken anew."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import quant


def of(network: nn.Module) -> list[_BatchNorm]:
    """Those that keep statistics."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


@torch.no_grad()
def take_anew(network: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Give every batch norm of a network the mean of its statistics over these batches, on ideal cells and without ADCs.

    Training on chips leaves statistics behind that belong to no chip: those of the last steps, each on a chip of its own. A
    calibration brings the channels of a chip to what they are without arrays, so that is what a batch
    norm behind them has to know. (Taken anew behind a quantized training too: Nagel et al., arXiv 2203.11086.)
    """
    norms = of(network)
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    with quant.without_adc(network):
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # all batches count alike
        for batch in batches:
            network(batch)
    for norm, (momentum, count) in zip(norms, before):
        norm.momentum, norm.num_batches_tracked = momentum, count
