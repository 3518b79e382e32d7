"""Inference on a CPU in which no activation is written to memory as a number: between layers there are codes, a byte each.

Between two quantized layers stand batch norm, ReLU, max pooling and the PACT quantizer of the second one. The first layer
applies all but the pooling to each output when it has summed it (`engines.output`), and the pooling takes codes: they grow
with what they stand for, so the largest code is that of the largest value.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair as pair

from .crossbar import CrossbarLayer
from .engines.output import ToCodes
from .layers import Qconv2d


def run(modules, x):
    """What `nn.Sequential(*modules)(x)` returns, bit for bit, with codes between quantized layers where that is possible.

    It is not where gradients are wanted, in training, and where a module has a hook: then every module is called.
    """
    if not _can_fuse(modules, x):
        for module in modules:
            x = module(x)
        return x
    modules = [part for module in modules for part in (module if isinstance(module, nn.Sequential) else [module])]
    codes = None  # uint8 `[N, H, W, channels]`, in place of x
    position = 0
    while position < len(modules):
        module, *behind = modules[position:]
        position += 1
        to_codes = _to_codes(module, behind, x.device)
        if to_codes is not None:
            position += 2  # batch norm and ReLU
            if isinstance(module, CrossbarLayer):
                codes = module.of_codes(module.a_codes(x) if codes is None else codes, to_codes)
            else:
                codes = module.next_codes(x, to_codes)
        elif codes is None:
            x = module(x)
        elif isinstance(module, CrossbarLayer):
            x, codes = module.of_codes(codes), None
        elif isinstance(module, nn.MaxPool2d):
            codes = max_pool(codes, module)
        else:
            codes = codes.permute(0, 3, 1, 2).flatten(1)[:, None, None]  # the order of an image's values, for a linear layer
    return x


def _can_fuse(modules, x):
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    parts = [part for module in modules for part in module.modules()]
    watched = any(part.training or part._forward_hooks or part._forward_pre_hooks for part in parts)
    return not watched and batch_norm_rounds_once()


def _to_codes(layer, behind, device):
    """How `layer` makes the codes of the next layer on crossbars, or None where it cannot or there is none."""
    if not (isinstance(layer, CrossbarLayer) and layer.gives_codes(device)
            or type(layer) is Qconv2d and layer.sums_exactly() and layer.groups == 1):
        return None
    norm, relu, *others = [*behind, None, None]
    if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) or norm.running_var is None or not isinstance(relu, nn.ReLU):
        return None
    following = next((module for module in others if not isinstance(module, nn.Flatten) and not _pools_codes(module)), None)
    if not isinstance(following, CrossbarLayer):
        return None
    alpha = following.act_quant.act_alpha.detach()
    gain, shift = scale_and_shift(norm)
    return ToCodes(gain.numpy(), shift.numpy(), alpha.numpy()[()], (following.act_quant.levels / alpha).numpy()[()])


def scale_and_shift(norm):
    """`(gain, shift)` of a batch norm in inference, `gain x + shift`, float32 `[channels]`: asked of PyTorch, whose last
    bits they have."""
    ones = torch.ones(1, norm.num_features)
    gain = F.batch_norm(ones, torch.zeros_like(norm.running_mean), norm.running_var, norm.weight, None, False, 0, norm.eps)
    shift = F.batch_norm(0 * ones, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0, norm.eps)
    return gain[0].detach(), shift[0].detach()


@functools.cache
def batch_norm_rounds_once():
    """Whether PyTorch's batch norm is `gain x + shift`, rounded once, as that of `output.next_code`."""
    norm = nn.BatchNorm2d(64).eval()
    numbers = torch.Generator().manual_seed(0)  # not those of a training run
    with torch.no_grad():
        for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            values.copy_(torch.rand(64, generator=numbers) + 0.1)
        gain, shift = (values.view(-1, 1, 1) for values in scale_and_shift(norm))
        x = torch.randn(4, 64, 8, 8, generator=numbers)
        return torch.equal(norm(x), (x.double() * gain.double() + shift.double()).float())


def _pools_codes(module):
    return isinstance(module, nn.MaxPool2d) and not module.ceil_mode and not module.return_indices and module.dilation == 1


def max_pool(codes, pool):
    """Max pooling of codes, uint8 `[N, H, W, channels]`; zeros in the padding are no larger than any code."""
    top, left = pair(pool.padding)
    codes = F.pad(codes, (0, 0, left, left, top, top))
    for dim, taps, step in zip((1, 2), pair(pool.kernel_size), pair(pool.stride)):
        codes = functools.reduce(torch.maximum, codes.unfold(dim, taps, step).unbind(-1))
    return codes
