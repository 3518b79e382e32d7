"""Quantizers: PACT for activations (`AQ`), DoReFa (`WQ`) or SAWB for weights.

Both work on integer codes. A training layer convolves the codes and scales the result once, so bfloat16 loses
nothing: integers up to 256 are exact in its 8-bit significand.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels import elementwise
from .eager import outside_graphs

OFF = 32  # bits that switch a quantizer off


class Quantizer(nn.Module):
    """What quantizers share: bits, 1..8, or 32 for off, kept under the name BITS. Raises: ValueError for others."""

    BITS: str

    def __init__(self, bits: int) -> None:
        super().__init__()
        if type(bits) is not int or bits != OFF and not 1 <= bits <= 8:
            raise ValueError(f"{self.BITS} is {bits!r}; allowed are 1 to 8, and {OFF} for off")
        setattr(self, self.BITS, bits)

    @property
    def on(self) -> bool:
        """Whether it quantizes at all: bits other than 32."""
        return getattr(self, self.BITS) != OFF

    @property
    def levels(self) -> int:
        """2^bits - 1: the largest code of those from 0 up."""
        return 2 ** getattr(self, self.BITS) - 1

    def numbers(self) -> list[Tensor]:
        """The tensors that decide its codes."""
        return [*self.buffers(), *self.parameters()]

    def extra_repr(self) -> str:
        return f"{self.BITS}={getattr(self, self.BITS)}"


class _PactCodes(torch.autograd.Function):
    """`A = round((2^a - 1) clip(x, 0, alpha) / alpha)` with the PACT gradient.

    One Function, because the gradient of `torch.clamp` at its bounds differs between PyTorch releases.
    """

    @staticmethod
    def forward(ctx, x, alpha, levels):
        ctx.save_for_backward(x, alpha)
        ctx.levels = levels
        if elementwise.can_run(x):
            return elementwise.pact_forward(x, alpha.float(), levels)
        return act_codes(x, alpha, levels).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, alpha = ctx.saved_tensors
        if elementwise.can_run(x):
            of_x, of_alpha = elementwise.pact_backward(x, grad, alpha.float(), ctx.levels)
            return of_x, of_alpha.to(alpha.dtype), None
        grad = grad * (ctx.levels / alpha).to(grad.dtype)  # from code units to units of x
        above = x >= alpha.expand(x.shape)  # a single number would be rounded to the precision of x first
        grad_x = grad.masked_fill((x <= 0) | above, 0) if ctx.needs_input_grad[0] else None
        grad_alpha = torch.where(above, grad, 0).sum(dtype=torch.float32).to(alpha.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_alpha, None


class _DoReFaIntegers(torch.autograd.Function):
    """`2 W - L` of `W = round(dorefa_position(tanh x))`, L levels, with the straight-through gradient."""

    @staticmethod
    def forward(ctx, x, levels):
        t = torch.tanh(widened(x))
        largest = largest_size(t)
        ctx.save_for_backward(t, levels / largest)
        ctx.dtype = x.dtype
        if t.dtype == torch.float32 and elementwise.can_run(t):
            return elementwise.dorefa_forward(t, largest, levels).to(x.dtype)
        return dorefa_position(t, largest, levels).round_().mul_(2).sub_(levels).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        t, factor = ctx.saved_tensors
        grad = grad.to(t.dtype)
        if t.dtype == torch.float32 and elementwise.can_run(t):
            return elementwise.dorefa_backward(t, grad, factor).to(ctx.dtype), None
        return (grad * factor * (1 - t * t)).to(ctx.dtype), None


def widened(x: Tensor) -> Tensor:
    """Numbers of 16 bits in float32: a weight gets the code that the same value gets there."""
    return x.float() if x.element_size() < 4 else x


def largest_size(t: Tensor) -> Tensor:
    """`max|t|`, never 0 and so large that its inverse is finite."""
    return torch.linalg.vector_norm(t, float("inf")).clamp_min(max(2.0**-100, torch.finfo(t.dtype).tiny))


def dorefa_position(t: Tensor, largest: Tensor, levels: int) -> Tensor:
    """Where weights with hyperbolic tangent `t` lie on the code axis, before rounding: `levels (t / (2 largest) + 1/2)`.

    The formula that decides a code; `kernels.elementwise` has it in one pass, with the same result.
    """
    return (t / (2 * largest)).add_(0.5).mul_(levels)


def act_codes(x: Tensor, alpha: Tensor, levels: int) -> Tensor:
    """Activation codes `round(clip(x, 0, alpha) levels / alpha)`, 0..levels, in float32; ties to even.

    The formula that decides a code; `kernels.elementwise` has it in one pass, with the same result. The product is taken
    in float32, so a bfloat16 `x` gets the code that the same value gets in float32.
    """
    return torch.clamp(x.float(), alpha.new_zeros(()), alpha).mul_(levels / alpha).round_()


def warn_of_nan(x: Tensor, what: str = "input") -> None:
    """Warn where `x`, the input of a layer or `what` else, holds what is not a number: a code is a number, so that nothing behind it would
    tell.

    One pass over memory, of a sum that such values make one of them; more only where the sum is.
    """
    if x.is_floating_point() and bool(x.sum().isnan()) and bool(x.isnan().any()):
        warnings.warn(f"the {what} of a quantized layer holds NaN, which becomes the code of a number", RuntimeWarning, 2)


class AQ(Quantizer):
    """PACT activation quantizer (Choi et al., arXiv 1805.06085, section 3).

    `A = round((2^a - 1) clip(x, 0, alpha) / alpha)`, `x_q = A alpha / (2^a - 1)`. Gradient to `x` where
    `0 < x < alpha`; to the learned clipping level `alpha`, the sum over `x >= alpha`.

    Args:
        abit: bits a, 1..8; 32 passes `x` through and has no parameter.
        alpha_init: first clipping level, in units of `x`.
    """

    BITS = "abit"

    def __init__(self, abit: int = 4, alpha_init: float = 10.0) -> None:
        super().__init__(abit)
        if self.on:
            if not 0 < alpha_init < float("inf"):
                raise ValueError(f"alpha_init is {alpha_init}; it must be above 0 and finite")
            self.act_alpha = nn.Parameter(torch.tensor(float(alpha_init)))

    @property
    def step(self) -> Tensor:
        """Value of code 1, `alpha / (2^a - 1)`; no gradient, since that of alpha flows through the codes."""
        return self.act_alpha.detach() / self.levels

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set `alpha` to the clipping level of least squared error on the values `x >= 0`, to a hundredth of their maximum.

        For a network trained without quantizers, whose activations say nothing of a clipping level.
        """
        x = x.float().clamp_min(0).flatten()
        largest = x.max()
        if largest == 0:
            return
        candidates = largest * torch.arange(1, 101, device=x.device) / 100
        errors = [(act_codes(x, alpha, self.levels) * (alpha / self.levels) - x).square().sum() for alpha in candidates]
        self.act_alpha.copy_(candidates[torch.stack(errors).argmin()])

    def codes(self, x: Tensor) -> Tensor:
        """Codes of `x` as floating-point integers, with the PACT gradient."""
        return _PactCodes.apply(x, self.act_alpha, self.levels)

    def image_codes(self, x: Tensor) -> Tensor:
        """Codes of an image: rounded to the same grid, at most 2^a - 1, but with no lowest code: an image has negative values.

        The gradient passes where a pixel is below the clipping level, as if nothing were rounded.
        """
        codes = torch.minimum(x, self.act_alpha) / self.step
        return codes + (codes.round() - codes).detach()

    @outside_graphs
    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to its grid, in units of `x`; `x` itself where switched off."""
        return self.codes(x) * self.step if self.on else x


class _WeightQuantizer(Quantizer):
    """What weight quantizers share: `W = round(position)`, `x_q = step (2 W - L)`, straight-through on the rounding.

    A quantizer says where a weight lies on the code axis (`_position`), which level stands for zero
    (`reference_twice`, `zero_twice`: L, twice that level) and what one is worth (`step`).

    Args:
        wbit: bits w, 1..8; 32 passes the weight through.
    """

    BITS = "wbit"

    def __init__(self, wbit: int = 4) -> None:
        super().__init__(wbit)

    def integers(self, x: Tensor) -> Tensor:
        """`2 W - L = x_q / step` as floating-point integers, with the straight-through gradient."""
        position = self._position(widened(x))
        codes = position + (position.round() - position).detach()
        return (2 * codes - self.zero_twice).to(x.dtype)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Weight codes W, uint8, 0..2^w - 1."""
        return self._position(widened(x)).round().to(torch.uint8)

    def unrounded(self, x: Tensor) -> Tensor:
        """What stands for `x_q` in a network that rounds and clips no weight."""
        return x

    @outside_graphs
    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to its grid, in units of `x`; `x` itself where switched off."""
        return self.integers(x) * self.step if self.on else x


class WQ(_WeightQuantizer):
    """DoReFa weight quantizer (Zhou et al., arXiv 1606.06160, section 2.3).

    `t = tanh(x)`, `u = t / (2 max|t|) + 1/2`, `W = round((2^w - 1) u)`, `x_q = (2 W - (2^w - 1)) / (2^w - 1)`.
    The maximum is a constant for the gradient. Zero is not a level.
    """

    @property
    def zero_twice(self) -> int:
        """L, twice the weight level that stands for zero."""
        return self.levels

    @property
    def step(self) -> float:
        """What `2 W - L = 1` is worth, `1 / (2^w - 1)`."""
        return 1 / self.levels

    def integers(self, x: Tensor) -> Tensor:
        """`2 W - (2^w - 1)` as floating-point integers; gradient `(2^w - 1) (1 - t^2) / max|t|`, straight through the rounding."""
        return _DoReFaIntegers.apply(x, self.levels)

    def _position(self, x):
        t = torch.tanh(x)
        return dorefa_position(t, largest_size(t), self.levels)

    def unrounded(self, x: Tensor) -> Tensor:
        """`t / max|t|`."""
        t = torch.tanh(widened(x))
        return t / largest_size(t)

    def scale(self, x: Tensor) -> Tensor:
        """What codes alone do not tell: `max|t|`, which sets how far a step of training moves them."""
        return torch.tanh(x).abs().max().clamp_max(1 - 2**-20)  # its atanh is finite

    def weights(self, codes: Tensor, scale: Tensor) -> Tensor:
        """A weight tensor with these codes and this scale. One of the codes is 0 or 2^w - 1, as in every tensor's."""
        return torch.atanh(scale * (2 * codes.float() / self.levels - 1))

    @staticmethod
    def reference_twice(slice_bits: tuple[int, ...]) -> tuple[int, ...]:
        """`2 r_k` for each slice: twice the level that stands for zero. DoReFa: `r_k = (2^b_k - 1) / 2`."""
        return tuple(2**bits - 1 for bits in slice_bits)


class AroundZero(_WeightQuantizer):
    """Weight quantizers with an exact zero in the middle: codes 0..2 m with `m = 2^(w-1) - 1`, and m stands for zero.

    Args: wbit, 2..8, or 32.
    Raises: ValueError for 1 bit, which leaves no code but zero.
    """

    def __init__(self, wbit: int = 4) -> None:
        super().__init__(wbit)
        if wbit == 1:
            raise ValueError("w_bits is 1; weights with codes around an exact zero, as of a converted network, have 2 to 8 bits")

    @property
    def zero_twice(self) -> int:
        """L, twice the weight level that stands for zero: 2 m."""
        return 2**self.wbit - 2

    def reference_twice(self, slice_bits: tuple[int, ...]) -> tuple[int, ...]:
        """`2 r_k` for each slice: cells that hold the digits of the code m."""
        m, result = self.zero_twice // 2, []
        for bits in slice_bits:
            result.append(2 * (m % 2**bits))
            m >>= bits
        return tuple(result)


class SAWB(AroundZero):
    """Statistics-aware weight binning (Choi et al., "Accurate and Efficient 2-bit Quantized Neural Networks", SysML 2019).

    `clip = c_1 sqrt(mean x^2) - c_2 mean |x|`, close to the clipping level of least squared error for bell-shaped
    weights; `W = round(m clip(x, -clip, clip) / clip) + m` with `m = 2^(w-1) - 1`, `x_q = clip (W - m) / m`: codes
    0..2^w - 2, m is an exact zero. The gradient passes where `|x| < clip`, which is a constant for it.

    The level comes from the weights in training; the last one is kept in the buffer `clip` for inference.

    Args: wbit, 2..8, or 32.
    """

    # (c_1, c_2) for 2^w - 1 levels. 2, 4, 7 and 8 bits: as IBM's FMS Model Optimizer has them (codes 103, 403, 703, 803);
    # 3, 5 and 6: fitted as in the paper's section 3 to the best levels of its six distributions.
    COEFFICIENTS = {2: (2.6, 1.71), 3: (6.92, 6.28), 4: (12.035, 12.03), 5: (17.36, 18.33), 6: (24.03, 26.23),
                    7: (28.24, 30.81), 8: (31.76, 35.04)}

    def __init__(self, wbit: int = 4) -> None:
        super().__init__(wbit)
        if self.on:
            self.register_buffer("clip", torch.zeros(()))

    @property
    def step(self) -> Tensor:
        """What `2 W - L = 1` is worth, `clip / L`; a scalar."""
        return self.clip / self.zero_twice

    def _position(self, x):
        if self.training or self.clip == 0:
            c1, c2 = self.COEFFICIENTS[self.wbit]
            w = x.detach().float()
            clip = c1 * w.square().mean().sqrt() - c2 * w.abs().mean()
            # The formula leaves the range of the weights where they are few or far from bell-shaped.
            self.clip = torch.minimum(clip.abs(), w.abs().max()).clamp_min(1e-30)  # its inverse is finite
        middle = self.zero_twice / 2
        return torch.clamp(x * (middle / self.clip), -middle, middle) + middle

    def scale(self, x: Tensor) -> Tensor:
        """What codes alone do not tell: the kept `clip`."""
        return self.clip

    def weights(self, codes: Tensor, scale: Tensor) -> Tensor:
        """A weight tensor with these codes at this scale."""
        return scale * (2 * codes.float() / self.zero_twice - 1)


WEIGHT_QUANTIZERS = {"dorefa": WQ, "sawb": SAWB}
