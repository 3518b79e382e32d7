"""How weights move: the schedule of the rates, the optimizer, and what holds weights and clipping levels back."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from models.quant import crossbar_layers
from models.quant.conversion.layer import ConvertedLayer

from ..settings.train_flags import TrainSettings
from ..start.starting import learned_scales, quantized_layers, used_alphas


def schedule_factor(kind: str, step: int, steps: int, epoch_steps: int, schedule: Sequence[int] = (),
                    gammas: Sequence[float] = ()) -> float:
    """What every parameter group's starting rate is multiplied by at `step`, 0 .. steps - 1; `epoch_steps`, those of an epoch."""
    if kind == "step":
        epoch = step // epoch_steps
        return math.prod(gamma for start, gamma in zip(schedule, gammas, strict=True) if epoch >= start)
    if kind == "cosine":
        return (1 + math.cos(math.pi * step / steps)) / 2
    peak = max(1, steps // 4)  # triangular: rises over `peak` steps, then falls; never quite 0, so every step counts
    return (step + 1) / peak if step < peak else (steps - step) / (steps - peak)


@torch.no_grad()
def clip_weights(net: nn.Module, factor: float) -> None:
    """Clip the weights of every layer to `factor` times their root mean square, of a converted one their standard deviation."""
    for layer in quantized_layers(net).values():
        bound = factor * torch.linalg.vector_norm(layer.weight) / layer.weight.numel() ** 0.5
        layer.weight.clamp_(-bound, bound)
    for _, layer in crossbar_layers(net):
        if isinstance(layer, ConvertedLayer):
            layer.clip_weight(factor, of_channel=False)


def settle(net: nn.Module, settings: TrainSettings) -> None:
    """What weights and scales need after a step, before they are used or kept."""
    if settings.weight_clip:
        clip_weights(net, settings.weight_clip)
    if settings.learn_scales:
        net.crossbar_passes.settle(net)


def build_optimizer(net: nn.Module, settings: TrainSettings) -> torch.optim.SGD:
    """SGD in groups: weights, and where there are some clipping levels and learned scales. The schedule multiplies each group's own
    "initial_lr"."""
    alphas, scales = list(used_alphas(net).values()), list(learned_scales(net).values())
    levels = {id(getattr(layer.act_quant, "act_alpha", None)) for layer in quantized_layers(net).values()}  # unused ones too
    levels |= {id(scale) for scale in scales}
    weights = [p for p in net.parameters() if id(p) not in levels]
    groups = [{"params": weights, "lr": settings.lr, "initial_lr": settings.lr, "weight_decay": settings.wd}]
    if alphas:
        groups.append({"params": alphas, "lr": settings.alpha_lr, "initial_lr": settings.alpha_lr,
                       "weight_decay": settings.alpha_wd})
    if scales:
        groups.append({"params": scales, "lr": settings.lr, "initial_lr": settings.lr, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0, fused=True)


def alpha_penalty(net: nn.Module, a_lambda: float) -> torch.Tensor:
    """a_lambda times the sum of alpha^2: the penalty that --clp adds to the loss."""
    return a_lambda * sum(alpha.square() for alpha in used_alphas(net).values())
