"""Inference on a CPU with codes, a byte each, for activations between the layers.

Between two quantized layers stand batch norm, ReLU, max pooling and the PACT quantizer of the second one. The first layer
applies all but the pooling to each output when it has summed it (`kernels.output`), and the pooling takes codes: they grow
with what they stand for, so the largest code is that of the largest value.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair as pair

from ..kernels.output import ToCodes
from .crossbar import Qconv2dDoreFa, QLinearDoreFa
from .eager import outside_graphs
from .layers import Qconv2d


@outside_graphs
def run(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What `nn.Sequential(*modules)(x)` returns, for finite `x` bit for bit, with codes between the layers where possible.

    It is not where gradients are wanted, in training, where any module has a hook, and in other types than float32: then
    every module is called.
    """
    if not _can_fuse(modules, x):
        for module in modules:
            x = module(x)
        return x
    modules = [part for module in modules for part in (module if _is(module, nn.Sequential) else [module])]
    codes = None  # uint8 `[N, H, W, channels]`, in place of x
    position = 0
    while position < len(modules):
        module, *behind = modules[position:]
        position += 1
        to_codes = _to_codes(module, behind, x.device)
        if to_codes is not None:
            position += 2  # batch norm and ReLU
            if _on_crossbars(module):
                codes = module.of_codes(module.a_codes(x) if codes is None else codes, to_codes)
            else:
                codes = module.next_codes(x, to_codes)
        elif codes is None:
            x = module(x)
        elif _on_crossbars(module):
            x, codes = module.of_codes(codes), None
        elif _is(module, nn.MaxPool2d):
            codes = max_pool(codes, module)
        else:
            codes = codes.permute(0, 3, 1, 2).flatten(1)[:, None, None]  # the order of an image's values, for a linear layer
    return x


def _can_fuse(modules, x):
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    parts = [part for module in modules for part in module.modules()]
    hooks = torch.nn.modules.module
    watched = (hooks._global_forward_hooks or hooks._global_forward_pre_hooks
               or any(part.training or part._forward_hooks or part._forward_pre_hooks for part in parts))
    return not watched and batch_norm_rounds_once()


def _is(module, *kinds):
    """Whether a module is exactly one of these: what is derived from one, or has a `forward` of its own, is called."""
    return type(module) in kinds and "forward" not in vars(module)


def _on_crossbars(module):
    return _is(module, Qconv2dDoreFa, QLinearDoreFa)


def _to_codes(layer, behind, device):
    """How `layer` makes the codes of the next layer on crossbars, or None where it cannot or there is none."""
    norm, relu, *others = [*behind, None, None]
    if not (_is(norm, nn.BatchNorm1d, nn.BatchNorm2d) and norm.running_var is not None and _is(relu, nn.ReLU)):
        return None
    following, flat = _next_layer(others, _is(layer, QLinearDoreFa))
    if following is None or isinstance(following, nn.Linear) != flat:
        return None
    if _is(layer, Qconv2d):
        able = layer.sums_exactly() and layer.groups == 1 and following.gives_codes(device)
    else:
        able = _on_crossbars(layer) and layer.gives_codes(device)
    alpha = following.act_quant.act_alpha.detach()
    if not able or norm.num_features != len(layer.weight) or {norm.running_var.dtype, alpha.dtype} != {torch.float32}:
        return None
    gain, shift = scale_and_shift(norm)
    return ToCodes(gain.numpy(), shift.numpy(), alpha.numpy()[()], (following.act_quant.levels / alpha).numpy()[()])


def _next_layer(modules, flat):
    """(the layer on crossbars behind modules that take codes, whether its input is flat), or (None, whatever)."""
    for module in modules:
        if _on_crossbars(module):
            return module, flat
        if _is(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            flat = True
        elif flat or not _pools_codes(module):
            break
    return None, flat


def scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """`(gain, shift)` of a batch norm in inference, `gain x + shift`, float32 `[channels]`: asked of PyTorch, whose last
    bits they have."""
    ones = torch.ones(1, norm.num_features, dtype=norm.running_var.dtype)
    gain = F.batch_norm(ones, torch.zeros_like(norm.running_mean), norm.running_var, norm.weight, None, False, 0, norm.eps)
    shift = F.batch_norm(0 * ones, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0, norm.eps)
    return gain[0].detach(), shift[0].detach()


@functools.cache
def batch_norm_rounds_once() -> bool:
    """Whether PyTorch's batch norm is `gain x + shift`, rounded once, as that of `output.next_code`."""
    norm = nn.BatchNorm2d(64, dtype=torch.float32).eval()
    numbers = torch.Generator().manual_seed(0)  # not those of a training run
    with torch.no_grad():
        for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            values.copy_(torch.rand(64, generator=numbers, dtype=torch.float32) + 0.1)
        gain, shift = (values.view(-1, 1, 1) for values in scale_and_shift(norm))
        x = torch.randn(4, 64, 8, 8, generator=numbers, dtype=torch.float32)
        return torch.equal(norm(x), (x.double() * gain.double() + shift.double()).float())


def _pools_codes(module):
    return (_is(module, nn.MaxPool2d) and not module.ceil_mode and not module.return_indices
            and pair(module.dilation) == (1, 1))


def max_pool(codes: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """Max pooling of codes, uint8 `[N, H, W, channels]`, contiguous; zeros in the padding are no larger than any code."""
    top, left = pair(pool.padding)
    if top or left:
        codes = F.pad(codes, (0, 0, left, left, top, top))
    for dim, taps, step in zip((1, 2), pair(pool.kernel_size), pair(pool.stride)):
        codes = functools.reduce(torch.maximum, codes.unfold(dim, taps, step).unbind(-1))
    return codes.contiguous()
