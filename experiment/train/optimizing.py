"""How weights move: the schedule of the rates, the optimizer, and what holds weights and clipping levels back."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..settings.train_flags import TrainSettings
from ..start.starting import quantized_layers, used_alphas


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
    """Clip the weights of every layer to `factor` times their root mean square."""
    for layer in quantized_layers(net).values():
        bound = factor * torch.linalg.vector_norm(layer.weight) / layer.weight.numel() ** 0.5
        layer.weight.clamp_(-bound, bound)


def build_optimizer(net: nn.Module, settings: TrainSettings) -> torch.optim.SGD:
    """SGD in two groups; the schedule multiplies each group's own "initial_lr"."""
    alphas = list(used_alphas(net).values())
    levels = {id(getattr(layer.act_quant, "act_alpha", None)) for layer in quantized_layers(net).values()}  # unused ones too
    weights = [p for p in net.parameters() if id(p) not in levels]
    groups = [{"params": weights, "lr": settings.lr, "initial_lr": settings.lr, "weight_decay": settings.wd}]
    if alphas:
        groups.append({"params": alphas, "lr": settings.alpha_lr, "initial_lr": settings.alpha_lr,
                       "weight_decay": settings.alpha_wd})
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0, fused=True)


def alpha_penalty(net: nn.Module, a_lambda: float) -> torch.Tensor:
    """a_lambda times the sum of alpha^2: the penalty that --clp adds to the loss."""
    return a_lambda * sum(alpha.square() for alpha in used_alphas(net).values())
