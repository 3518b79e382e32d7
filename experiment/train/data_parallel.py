"""Training on several processes: each has a part of every batch, and all have the gradient of the whole of it.

Gradients are added up by `DistributedDataParallel`. Batch norm takes its statistics over all processes: PyTorch's `SyncBatchNorm`
works on GPUs alone, and its type is not that of the layers which checkpoints, evaluation and the fused inference know. So the layers
stay what they are and only compute otherwise while a batch passes.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..program import distributed
from ..program.cli import UserError
from ..start.starting import quantized_layers, used_alphas


def shared(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """What computes the output of `net` in training for this process's part of a batch, so that each process gets, by `backward`, the
    mean of all processes' gradients. Where there is one process it is `net` itself.

    All processes then have the weights and buffers of process 0.
    Raises: UserError for a network with batch norm that has a `forward` of its own.
    """
    if distributed.world() == 1:
        return net
    for name, norm in net.named_modules():
        if isinstance(norm, _BatchNorm) and not isinstance(norm, nn.SyncBatchNorm) and not _is_plain(norm):
            raise UserError(f"{name} is a {type(norm).__name__}, whose statistics would be those of a part of each batch: train this "
                            "network in one process")
    distributed.same_weights(net)
    # From here on what batch norm and ADCs have as buffers stays the same in all.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases have another name for the first option
        parallel = DistributedDataParallel(net, broadcast_buffers=False, find_unused_parameters=_may_have_unused(net))

    def forward(x: Tensor) -> Tensor:
        with synchronised(net):
            return parallel(x)

    return forward


def _may_have_unused(net: nn.Module) -> bool:
    """Whether some parameters may have no part in the output: a first layer's clipping level, and what networks of others keep."""
    levels = [name for name, _ in net.named_parameters() if name.endswith("act_alpha")]
    return not quantized_layers(net) or len(levels) > len(used_alphas(net))


def _is_plain(norm: nn.Module) -> bool:
    return isinstance(norm, _BatchNorm) and type(norm).forward is _BatchNorm.forward


@contextlib.contextmanager
def synchronised(net: nn.Module) -> Iterator[None]:
    """Within the block the batch norms of a network that are in training take mean and variance over the images of all processes."""
    norms = [module for module in net.modules() if _is_plain(module) and module.training]
    for norm in norms:
        norm.forward = functools.partial(_batch_norm, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _batch_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """`norm(x)` in training, running statistics included; see `torch.nn.BatchNorm2d`."""
    norm._check_input_dim(x)
    y, mean, var, count = _Normalized.apply(x, norm.weight, norm.bias, norm.eps)
    if norm.track_running_stats:
        norm.num_batches_tracked.add_(1)
        share = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
        norm.running_mean.lerp_(mean.to(norm.running_mean), share)
        norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var), share)
    return y


class _Normalized(torch.autograd.Function):
    """`y = w (x - m) / sqrt(v + eps) + b` with the mean m and the variance v of each channel over the x of all processes (Ioffe and
    Szegedy, arXiv 1502.03167, algorithm 1). With `u = (x - m) / sqrt(v + eps)` and the gradient g of y, of N values in a channel,
    that of x is `w / sqrt(v + eps) (g - sum g / N - u sum(g u) / N)`, the sums over all processes; those of w and b, `sum(g u)` and
    `sum g`, are of the own x, since the processes' gradients of parameters are added up later.

    Shapes: x and y `[N, C, ...]`, w and b `[C]` or None. Returns: (y, m, v, N), m and v in float64.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        wide = _wide(x)
        count = x.numel() // x.shape[1]
        var, mean = (values.double() for values in torch.var_mean(wide, _over_channels(wide), correction=0))
        sums = distributed.summed(torch.stack([count * mean, count * (var + mean.square()), torch.full_like(mean, count)]))
        count = sums[2, :1]
        mean, square = sums[:2] / count
        var = (square - mean.square()).clamp_min(0)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean.to(wide.dtype), var.to(wide.dtype), weight, bias, False, 0.0, eps), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, weight, mean, inverse, count = ctx.saved_tensors
        wide, along = _wide(grad), (-1, *[1] * (x.dim() - 2))
        u = (_wide(x) - mean.to(wide.dtype).view(along)) * inverse.to(wide.dtype).view(along)
        own = torch.stack([wide.sum(_over_channels(wide)), (wide * u).sum(_over_channels(wide))])
        of_all = (distributed.summed(own.to(torch.float64, copy=True)) / count).to(wide.dtype)
        factor = inverse.to(wide.dtype) if weight is None else inverse.to(wide.dtype) * weight
        of_x = factor.view(along) * (wide - of_all[0].view(along) - u * of_all[1].view(along))
        of_weight, of_bias = (None, None) if weight is None else (own[1].to(weight.dtype), own[0].to(weight.dtype))
        return of_x.to(x.dtype), of_weight, of_bias, None


def _wide(x):
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _over_channels(x):
    return [dim for dim in range(x.dim()) if dim != 1]
