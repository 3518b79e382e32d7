"""Quantizers: PACT for activations (`AQ`), DoReFa for weights (`WQ`).

Both work on integer codes. A training layer convolves the codes and scales the result once, so bfloat16 loses
nothing: odd integers up to 255 and codes up to 255 are exact in its 8-bit significand.
"""

import torch
from torch import nn

from . import fused_cpu

OFF = 32  # bits that switch a quantizer off


def check_bits(name, bits):
    """Raise ValueError unless `bits` is 1..8, or 32 for off."""
    if type(bits) is not int or bits != OFF and not 1 <= bits <= 8:
        raise ValueError(f"{name} is {bits!r}; allowed are 1 to 8, and {OFF} for off")


class _PactCodes(torch.autograd.Function):
    """`A = round((2^a - 1) clip(x, 0, alpha) / alpha)` with the PACT gradient.

    One Function, because the gradient of `torch.clamp` at its bounds differs between PyTorch releases.
    """

    @staticmethod
    def forward(ctx, x, alpha, levels):
        ctx.save_for_backward(x, alpha)
        ctx.levels = levels
        if fused_cpu.can_run(x):
            return fused_cpu.pact_forward(x, alpha, levels)
        return act_codes(x, alpha, levels).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, alpha = ctx.saved_tensors
        if fused_cpu.can_run(x):
            return *fused_cpu.pact_backward(x, grad, alpha, ctx.levels), None
        grad = grad * (ctx.levels / alpha).to(grad.dtype)  # from code units to units of x
        above = x >= alpha.expand(x.shape)  # a single number would be rounded to the precision of x first
        grad_x = grad_alpha = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.masked_fill((x <= 0) | above, 0)
        if ctx.needs_input_grad[1]:
            grad_alpha = torch.where(above, grad, 0).sum(dtype=torch.float32).to(alpha.dtype)
        return grad_x, grad_alpha, None


def act_codes(x, alpha, levels):
    """Activation codes `round(clip(x, 0, alpha) levels / alpha)`, 0..levels, in float32; ties to even.

    The formula that decides a code; `fused_cpu` has it in one pass, with the same result. The product is taken in
    float32, so a bfloat16 `x` gets the code that the same value gets in float32.
    """
    return torch.clamp(x.float(), alpha.new_zeros(()), alpha).mul_(levels / alpha).round_()


class AQ(nn.Module):
    """PACT activation quantizer (Choi et al., arXiv 1805.06085, section 3).

    `A = round((2^a - 1) clip(x, 0, alpha) / alpha)`, `x_q = A alpha / (2^a - 1)`. Gradient to `x` where
    `0 < x < alpha`; to the learned clipping level `alpha`, the sum over `x >= alpha`.

    Args:
        abit: bits a, 1..8; 32 passes `x` through and has no parameter.
        alpha_init: first clipping level, in units of `x`.
    """

    def __init__(self, abit=4, alpha_init=10.0):
        super().__init__()
        check_bits("abit", abit)
        self.abit = abit
        if self.on:
            if not 0 < alpha_init < float("inf"):
                raise ValueError(f"alpha_init is {alpha_init}; it must be above 0 and finite")
            self.act_alpha = nn.Parameter(torch.tensor(float(alpha_init)))

    @property
    def on(self):
        return self.abit != OFF

    @property
    def levels(self):
        """Largest code, 2^a - 1."""
        return 2**self.abit - 1

    @property
    def step(self):
        """Value of code 1, `alpha / (2^a - 1)`; no gradient, since that of alpha flows through the codes."""
        return self.act_alpha.detach() / self.levels

    def codes(self, x):
        """Codes of `x` as floating-point integers, with the PACT gradient."""
        return _PactCodes.apply(x, self.act_alpha, self.levels)

    def image_codes(self, x):
        """Codes of an image: rounded to the same grid but clamped above only, because it has negative values."""
        codes = torch.minimum(x, self.act_alpha) / self.step
        return codes + (codes.round() - codes).detach()

    def forward(self, x):
        return self.codes(x) * self.step if self.on else x

    def extra_repr(self):
        return f"abit={self.abit}"


class WQ(nn.Module):
    """DoReFa weight quantizer (Zhou et al., arXiv 1606.06160, section 2.3).

    `t = tanh(x)`, `u = t / (2 max|t|) + 1/2`, `W = round((2^w - 1) u)`, `x_q = (2 W - (2^w - 1)) / (2^w - 1)`.
    The gradient is straight-through on the rounding; the maximum is a constant. Zero is not a level.

    Args:
        wbit: bits w, 1..8; 32 passes the weight through.
    """

    def __init__(self, wbit=4):
        super().__init__()
        check_bits("wbit", wbit)
        self.wbit = wbit

    @property
    def on(self):
        return self.wbit != OFF

    @property
    def levels(self):
        """Largest code, 2^w - 1."""
        return 2**self.wbit - 1

    def _position(self, x):
        """`(2^w - 1) u`: where each weight lies on the code axis, before rounding."""
        t = torch.tanh(x)
        largest = t.detach().abs().max().clamp_min(torch.finfo(t.dtype).tiny)
        return self.levels * (t / (2 * largest) + 0.5)

    def integers(self, x):
        """`2 W - (2^w - 1)` = `(2^w - 1) x_q`, odd integers as floats, with the straight-through gradient."""
        position = self._position(x)
        codes = position + (position.round() - position).detach()
        return 2 * codes - self.levels

    @torch.no_grad()
    def codes(self, x):
        """Weight codes W, uint8, 0..2^w - 1."""
        return self._position(x).round().to(torch.uint8)

    @staticmethod
    def reference_twice(slice_bits):
        """`2 r_k` for each slice: twice the level that stands for zero. DoReFa: `r_k = (2^b_k - 1) / 2`."""
        return tuple(2**bits - 1 for bits in slice_bits)

    def forward(self, x):
        return self.integers(x) / self.levels if self.on else x

    def extra_repr(self):
        return f"wbit={self.wbit}"
