"""Linear quantizers of layers that were trained in floating point: weights of a step for each output channel (`LinearWQ`),
inputs of one step and a window of codes that may hold negative ones (`InputQuantizer`).

The quotient `x / s` is taken in float32, so that a number gets the same code in every type.
"""

import math
import operator
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..kernels import elementwise
from ..layers.eager import outside_graphs
from ..layers.on_arrays import KeepsTypes
from ..layers.quantizers import AroundZero, Quantizer, warn_of_nan
from . import scales

EDGE = 1e-4  # of a code
SYMMETRIC_COSTS = 1.05  # a symmetric window is taken where its squared error is at most this many times the least


def _rounded(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """`clip(rint(x / scale), low, high)` in float32, ties to even."""
    return torch.div(x.float(), scale).round_().clamp_(low, high)


class _Rounded(torch.autograd.Function):
    """`_rounded` in the type of x, with the straight-through gradient: `1 / scale` where `low <= x / scale <= high`, or so nearly that
    float32 may have rounded it there: a scale that clips nothing puts the largest number at the end."""

    @staticmethod
    def forward(ctx, x, scale, low, high):
        ctx.save_for_backward(x, scale)
        ctx.window = low, high
        return _rounded(x, scale, low, high).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        low, high = ctx.window
        position = x.float() / scale
        inside = (position >= low - EDGE) & (position <= high + EDGE)
        return torch.where(inside, grad / scale, 0).to(x.dtype), None, None, None


class _OwnScale(KeepsTypes):
    """A module with a buffer `scale` that stays float32 in a network of another type, since codes hang on it, and takes the
    shape of the one that is loaded."""

    EXACT = ("scale",)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        stored = state_dict.get(prefix + "scale")
        if stored is not None:
            self.scale = torch.empty(stored.shape, dtype=torch.float32, device=self.scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LinearWQ(_OwnScale, AroundZero):
    """Linear weights, symmetric around an exact zero, with a step of its own for each output channel.

    `W = clip(rint(x / s_c), -m, m) + m` with `m = 2^(w-1) - 1`, value `s_c (W - m)`; `L = 2 m`. The gradient passes where
    `|x| <= m s_c`; the steps are constants. (The uniform symmetric quantizer of Krishnamoorthi, arXiv 1806.08342,
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
        return self.scale / 2

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
        self.scale = scales.of_channels(weight.detach().reshape(len(weight), -1), self.largest, method)

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
        self.scale = scale.expand(channels).clone()

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Weight codes W of x, `[out, ...]`: uint8, 0..2 m.

        Raises: ValueError before `fit`, or for another number of channels.
        """
        return (_rounded(x, self._beside(x), -self.largest, self.largest) + self.largest).to(torch.uint8)

    def integers(self, x: Tensor) -> Tensor:
        """`2 W - L = x_q / step` in the type of x, `[out, ...]`, with the straight-through gradient; raises as `codes`."""
        return 2 * _Rounded.apply(x, self._beside(x), -self.largest, self.largest)

    @outside_graphs
    def forward(self, x: Tensor) -> Tensor:
        """x, `[out, ...]`, rounded to its grid, in its units and type; x itself where switched off."""
        return self.integers(x) * (self._beside(x) / 2).to(x.dtype) if self.on else x

    def _beside(self, x):
        """The steps in a shape that stands beside that of x."""
        if len(self.scale) != len(x):
            raise ValueError(f"the weight has {len(x)} output channels, its quantizer {len(self.scale)} steps; call fit(weight) "
                             "first")
        return self.scale.view(-1, *[1] * (x.dim() - 1))


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
        return self.scale

    @property
    def window(self) -> tuple[int, int]:
        """(lo, hi) as numbers. Read from the buffers once: on a GPU that waits for all that was started there."""
        if self._window is None:
            self._window = int(self.lo), int(self.hi)
        return self._window

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
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
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
            codes = F.pad(_rounded(x, sign * self.scale, low, high) + lift, (0, 0, left, right, top, bottom), value=lift)
            codes, unknown = codes.to(torch.int16 if low + lift < 0 else torch.uint8), True
        if unknown:
            warn_of_nan(x)
        return codes

    def integers(self, x: Tensor) -> Tensor:
        """Codes of x in the type of x, with the straight-through gradient."""
        return _Rounded.apply(x, self.scale, *self.window)

    @outside_graphs
    def forward(self, x: Tensor) -> Tensor:
        """x rounded to its grid, in its units and type; x itself where switched off."""
        return self.integers(x) * self.scale.to(x.dtype) if self.on else x

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
