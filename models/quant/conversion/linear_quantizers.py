"""Linear quantizers of layers that were trained in floating point: weights of a step for each output channel (`LinearWQ`),
inputs of one step and a window of codes that may hold negative ones (`InputQuantizer`).

The quotient `x / s` is taken in float32, so that a number gets the same code in every type.
"""

import math
import operator
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..kernels import elementwise
from ..layers.eager import outside_graphs
from ..layers.on_arrays import KeepsTypes
from ..layers.quantizers import AroundZero, Quantizer, warn_of_nan
from . import scales

EDGE = 1e-4  # of a code
SYMMETRIC_COSTS = 1.05  # a symmetric window is taken where its squared error is at most this many times the least


def rounded(x: Tensor, steps: Tensor, low: int, high: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`clip(rint(x / step), low, high)`, the quotient in float32, ties to even. Args: steps, `[1]`, or one for each of x along its first
    dimension; dtype, of the result."""
    dense = _for_kernels(x, steps) if dtype in (torch.float32, torch.bfloat16) else None
    if dense is not None:
        return elementwise.window_forward(dense, steps, low, high, dtype)
    return torch.div(x.float(), _beside(steps, x)).round_().clamp_(low, high).to(dtype)


def straight(x: Tensor, grad: Tensor, steps: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Gradients of the value `step clip(rint(x / step), low, high)`, straight through the rounding: of x, `grad` where
    `low <= x / step <= high`, or so nearly that float32 may have rounded it there (a scale that clips nothing puts the largest number at
    the end); and of each step, `sum grad (rint(x / step) - x / step)` there and `sum grad low`, or high, beyond (Esser et al., arXiv
    1902.08153, equation 3). Args: as `rounded`."""
    if (dense := _for_kernels(x, steps)) is not None:
        return elementwise.window_backward(dense, grad, steps, low, high, EDGE)
    place = x.float() / _beside(steps, x)
    inside = (place >= low - EDGE) & (place <= high + EDGE)
    of_steps = grad * (place.round().clamp_(low, high) - torch.where(inside, place, 0))
    return torch.where(inside, grad, 0).to(x.dtype), of_steps.reshape(len(steps), -1).sum(1)


def _for_kernels(x, steps):
    """x as the kernels of a CPU take it, or None."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    return x if elementwise.can_run(x) and (len(steps) == 1 or x.stride(0) == max(x.stride())) else x.contiguous()


def _beside(steps, x):
    """The steps in a shape that stands beside that of x."""
    return steps.view(-1, *[1] * (x.dim() - 1))


class _Rounded(torch.autograd.Function):
    """`rounded` in the type of x, with the straight-through gradient `1 / step`."""

    @staticmethod
    def forward(ctx, x, steps, low, high):
        ctx.save_for_backward(x, steps)
        ctx.window = low, high
        return rounded(x, steps, low, high).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, steps = ctx.saved_tensors
        return straight(x, grad / _beside(steps, x), steps, *ctx.window)[0], None, None, None


class _OwnScale(KeepsTypes):
    """A module with a buffer `scale`, or a parameter where it is learned, that stays float32 in a network of another type, since codes
    hang on it, and takes the shape of the one that is loaded."""

    EXACT = ("scale",)

    def learn(self, learned: bool) -> None:
        """Make the scale a parameter (Esser et al., arXiv 1902.08153), or a constant."""
        scale = self.scale.detach().clone()
        del self.scale
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def _take_scale(self, scale):
        if not isinstance(self.scale, nn.Parameter):
            self.scale = scale
        elif self.scale.shape == scale.shape:  # an optimizer may have it
            self.scale.data = scale
        else:
            self.scale = nn.Parameter(scale)

    def gradient_of_scale(self, sums: Tensor, count: int) -> Tensor:
        """LSQ's gradient of the scales: `sums`, see `straight`, over `sqrt(count Q)`, Q the largest code and count how many numbers of an
        example, or of a channel of the weight, have the scale (arXiv 1902.08153, section 2.2)."""
        return sums / math.sqrt(count * self.largest)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        stored = state_dict.get(prefix + "scale")
        if stored is not None:
            self._take_scale(torch.empty(stored.shape, dtype=torch.float32, device=self.scale.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LinearWQ(_OwnScale, AroundZero):
    """Linear weights, symmetric around an exact zero, with a step of its own for each output channel.

    `W = clip(rint(x / s_c), -m, m) + m` with `m = 2^(w-1) - 1`, value `s_c (W - m)`; `L = 2 m`. The gradient passes where
    `|x| <= m s_c`; the steps are constants, or learned (`learn`). (The uniform symmetric quantizer of Krishnamoorthi, arXiv 1806.08342,
    section 2.2, with an odd number of levels.)

    Args: wbit, 2..8, or 32 for off.
    Buffer: `scale`, s_c, float32 `[out]`, in units of the weight; empty until `fit`, or until one is loaded.
    """

    def __init__(self, wbit: int = 8) -> None:
        super().__init__(wbit)
        self.register_buffer("scale", torch.empty(0, dtype=torch.float32))

    @property
    def step(self) -> Tensor:
        """What `2 W - L = 1` is worth, `s_c / 2`; float32 `[out]`."""
        return self.scale.detach() / 2

    @property
    def largest(self) -> int:
        """m, codes on each side of zero."""
        return self.zero_twice // 2

    @torch.no_grad()
    def fit(self, weight: Tensor, method: str = "mse") -> None:
        """Set the steps from the weight.

        Args: weight, `[out, ...]`; method, "mse": least squared error in each channel, "layer": in all together, or "max":
            `s_c = max|w| / m`. A channel of zeros has step 1.
        Raises: ValueError for weights that are not finite.
        """
        self._take_scale(scales.of_channels(weight.detach().reshape(len(weight), -1), self.largest, method))

    @torch.no_grad()
    def set_scale(self, scale: Tensor | float, channels: int) -> None:
        """Take these steps. Args: scale, one number or `[out]`; channels, out.

        Raises: ValueError for another shape, or numbers that are not positive and finite.
        """
        try:
            scale = torch.as_tensor(scale, dtype=torch.float32, device=self.scale.device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{scale!r} is given; a number or a tensor is expected") from None
        if scale.shape not in ((), (channels,)):
            raise ValueError(f"scales have shape {list(scale.shape)}; one number, or one for each of the {channels} output channels, is "
                             "expected")
        good = (scale >= scales.SMALLEST) & scale.isfinite()
        if not bool(good.all()):
            raise ValueError(f"a scale is {scale[~good][0].item():g}; positive, finite numbers are expected")
        self._take_scale(scale.expand(channels).clone())

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Weight codes W of x, `[out, ...]`: uint8, 0..2 m.

        Raises: ValueError before `fit`, or for another number of channels.
        """
        return (rounded(x, self.steps_of(x), -self.largest, self.largest) + self.largest).to(torch.uint8)

    def integers(self, x: Tensor) -> Tensor:
        """`2 W - L = x_q / step` in the type of x, `[out, ...]`, with the straight-through gradient; raises as `codes`."""
        return 2 * _Rounded.apply(x, self.steps_of(x), -self.largest, self.largest)

    @outside_graphs
    def forward(self, x: Tensor) -> Tensor:
        """x, `[out, ...]`, rounded to its grid, in its units and type; x itself where switched off."""
        return self.integers(x) * (_beside(self.steps_of(x), x) / 2).to(x.dtype) if self.on else x

    def steps_of(self, x: Tensor) -> Tensor:
        """The steps of a weight, `[out]`. Raises: ValueError for another number of channels."""
        if len(self.scale) != len(x):
            raise ValueError(f"the weight has {len(x)} output channels, its quantizer {len(self.scale)} steps; call fit(weight) "
                             "first")
        return self.scale.detach()


class InputQuantizer(_OwnScale, Quantizer):
    """Inputs of a layer: `A = clip(rint(x / s_a), lo, hi)`, value `s_a A`, with `lo <= 0 <= hi` and `hi - lo <= 2^a - 1`.

    Zero is a code. Inputs that are never negative have `lo = 0`, `hi = 2^a - 1`; others a window that depends on how negative
    codes are applied to word lines (`encoding`):

    - "phases", "ternary": the positive and the negative part of a code are magnitudes; any window, lopsided ones for lopsided
      inputs (GELU, SiLU), but a symmetric one, `-(2^(a-1) - 1) .. 2^(a-1) - 1`, where its squared error is at most 5 % above
      the least: its magnitudes have a bit less, which saves reads.
    - "twos": the top digit counts negative; the window is `-2^(a-1) .. 2^(a-1) - 1`.
    - "offset": word lines get `A - lo`; any window of 2^a codes.

    With 1 bit no window holds codes of both signs: the side of the larger extreme is kept, codes {0, 1} or {-1, 0}, and the
    other one becomes zero. The gradient passes where `lo <= x / s_a <= hi`.

    Args: abit, 1..8, or 32 for off; encoding, see above.
    Buffers: `scale`, s_a, float32; `lo`, `hi`, int64 (as numbers: `window`). Scalars; 1, 0 and 2^a - 1 until `fit`.
    Raises: ValueError for other bits.
    """

    BITS = "abit"
    decay: tuple[float, float] | None = None  # (share of inputs that should clip, how strongly the gradient of a scale is moved there)

    def __init__(self, abit: int = 8, encoding: str = "phases") -> None:
        super().__init__(abit)
        self.encoding = encoding
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("lo", torch.tensor(0))
        self.register_buffer("hi", torch.tensor(self.levels))
        self._window = None

    @property
    def step(self) -> Tensor:
        """Value of code 1."""
        return self.scale.detach()

    @property
    def window(self) -> tuple[int, int]:
        """(lo, hi) as numbers. Read from the buffers once: on a GPU that waits for all that was started there."""
        if self._window is None:
            self._window = int(self.lo), int(self.hi)
        return self._window

    @property
    def largest(self) -> int:
        """The largest code of either sign."""
        lo, hi = self.window
        return max(-lo, hi)

    @property
    def signed(self) -> bool:
        """Whether there are negative codes."""
        return self.window[0] < 0

    @property
    def bits(self) -> int:
        """Bits of what is applied to word lines at a time: of a magnitude where there are two, else a."""
        lo, hi = self.window
        return max(hi, -lo).bit_length() if lo < 0 and self.encoding in ("phases", "ternary") else self.abit

    @torch.no_grad()
    def fit(self, values: Tensor, lowest: float, largest: float, method: str = "mse") -> None:
        """Set step and window from inputs; all zero have step 1 and no negative codes.

        Args:
            values: a sample of them, any shape, in units of the input.
            lowest, largest: extremes of all inputs, also beyond the sample.
            method: "mse": least squared error on the sample, over steps and windows; "max": the least step that clips nothing.
        Raises: ValueError for no inputs, or some that are not finite.
        """
        if not values.numel() or not (math.isfinite(lowest) and math.isfinite(largest) and bool(values.isfinite().all())):
            raise ValueError("the inputs to fit a quantizer to are empty, or hold NaN or infinite numbers; look at the "
                             "calibration images and at the layers before")
        if self.abit == 1:
            lowest, largest = (lowest, 0.0) if -lowest > largest else (0.0, largest)
        if max(-lowest, largest) < scales.SMALLEST:
            self._set(1.0, 0, self.levels)
            return
        best = scales.of_inputs(values, lowest, largest, self._windows(lowest < 0), method)
        half = self.levels // 2
        if best.lo < 0 < half and self.encoding in ("phases", "ternary"):
            symmetric = scales.of_inputs(values, lowest, largest, [(-half, half)], method)
            best = symmetric if symmetric.error <= SYMMETRIC_COSTS * best.error else best
        self._set(best.scale, best.lo, best.hi)

    def set_window(self, window: tuple[float, int, int]) -> None:
        """Take this step and these codes. Args: window, (scale, lowest code, highest code).

        Raises: ValueError for numbers that are none, a step that is not positive and finite, or codes that a bits do not hold.
        """
        try:
            scale, lo, hi = window
            scale, lo, hi = float(scale), operator.index(lo), operator.index(hi)
        except (TypeError, ValueError):
            raise ValueError(f"{window!r} is given; (scale, lowest code, highest code) is expected, a number and two whole ones") from None
        if not scales.SMALLEST <= scale < math.inf:
            raise ValueError(f"the scale is {scale:g}; a positive, finite number is expected")
        half = 2 ** (self.abit - 1)
        lowest, highest = (-half, half - 1) if lo < 0 and self.encoding == "twos" else (-self.levels, self.levels)
        if not (lowest <= lo <= 0 <= hi <= highest and 0 < hi - lo <= self.levels):
            raise ValueError(f"codes are {lo} to {hi}; allowed are, with {self.abit} bits, at most {self.levels + 1} codes, zero among them"
                             + (f", from {lowest} to {highest}" if highest < self.levels else ""))
        self._set(scale, lo, hi)

    def _windows(self, signed):
        if not signed:
            return [(0, self.levels)]
        if self.encoding == "twos":
            return [(-(2 ** (self.abit - 1)), 2 ** (self.abit - 1) - 1)]
        return [(lo, lo + self.levels) for lo in range(-self.levels, 1)]

    def _set(self, scale, lo, hi):
        device = self.scale.device
        self._take_scale(torch.tensor(scale, dtype=torch.float32, device=device))
        self.lo, self.hi = torch.tensor(lo, device=device), torch.tensor(hi, device=device)
        self._window = lo, hi

    @torch.no_grad()
    def codes(self, x: Tensor, sign: int = 1, least: int | None = None, lift: int = 0,
              padding: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Tensor:
        """Codes of x, lo..hi, contiguous: int16, or uint8 where none of these is negative. What is not a number gets some code, with a
        warning.

        Args: x, `[N, H, W, in]`, or of any shape without padding; sign, -1 for those of `-x`, `-hi..-lo`; least, what smaller ones become;
            lift, what is added to each; padding, zeros of x around the images (top, bottom, left, right).
        """
        low, high = sorted(sign * end for end in self.window)
        low = low if least is None else least
        if x.dim() != 4:
            return self.codes(x.reshape(1, 1, -1, 1), sign, least, lift).view(x.shape)
        x = x.float().contiguous()
        if x.device.type == "cpu":
            codes, unknown = elementwise.window_codes(x, sign * self.scale, low, high, lift, padding)
        else:
            top, bottom, left, right = padding
            codes = F.pad(rounded(x, sign * self.scale.view(1), low, high) + lift, (0, 0, left, right, top, bottom), value=lift)
            codes, unknown = codes.to(torch.int16 if low + lift < 0 else torch.uint8), True
        if unknown:
            warn_of_nan(x)
        return codes

    def integers(self, x: Tensor) -> Tensor:
        """Codes of x in the type of x, with the straight-through gradient."""
        return _Rounded.apply(x, self.scale.detach().view(1), *self.window)

    @outside_graphs
    def forward(self, x: Tensor) -> Tensor:
        """x rounded to its grid, in its units and type; x itself where switched off."""
        return self.integers(x) * self.scale.to(x.dtype) if self.on else x

    def decayed(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient of the learned scale, with what brings the share of inputs that clip to that of `decay`."""
        if self.decay is None:
            return gradient
        (share, strength), (lo, hi), scale = self.decay, self.window, self.scale.detach()
        clipped = ((x < (lo - 0.5) * scale) | (x > (hi + 0.5) * scale)).float().mean()
        return gradient + strength * scale * (share - clipped).sign()

    def load_window(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Take the window of a state whose names begin so, where it has one: before the rest is loaded, of which shapes hang on it."""
        for name in ("lo", "hi"):
            if prefix + name in state_dict:
                setattr(self, name, torch.tensor(int(state_dict[prefix + name]), device=self.scale.device))
        self._window = None

    def _load_from_state_dict(self, *args, **kwargs):
        self._window = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        lo, hi = self.window
        return f"{super().extra_repr()}, encoding={self.encoding}, codes {lo}..{hi}"
