"""Steps of linear quantizers on given numbers: those of least squared error, or those that clip nothing.

Pure functions: weights have a step for each output channel (`of_channels`), inputs one step and a window of codes
(`of_inputs`).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.steps import least_error

METHODS = ("mse", "max")
WEIGHT_METHODS = (*METHODS, "layer")
SMALLEST = 2.0**-100  # numbers that are all below are zero: a step whose inverse is infinite is none
COARSE = 32  # steps that are tried first, from the smallest that may be best to the largest


# ---- weights -------------------------------------------------------------------------------------------------------------


def of_channels(weight: Tensor, m: int, method: str) -> Tensor:
    """The step s of each channel for codes -m..m, float32 `[out]`; 1 where all weights are zero.

    Args: weight, `[out, n]`; method, "max": `s = max|w| / m`, or "mse": least `sum (s clip(rint(w / s), -m, m) - w)^2`; "layer": that of
        all channels together.
    Raises: ValueError for weights that are not finite.
    """
    if method == "layer":
        return of_channels(weight.reshape(1, -1), m, "mse").repeat(len(weight))
    w = weight.float()
    largest = torch.linalg.vector_norm(w, float("inf"), dim=1)
    if not largest.isfinite().all():
        raise ValueError("the weight holds NaN or infinite numbers, for which there is no step; look how it was trained or loaded")
    zero = largest < SMALLEST
    cover = torch.where(zero, 1.0, largest / m)
    return cover if method == "max" else torch.where(zero, cover, _of_least_error(w, cover, m))


def _of_least_error(w, cover, m):
    """A coarse grid of steps, then a fine one around the best of it."""
    # Bounds: a step s < cover clips the largest weight, an error of at least (m cover - m s)^2, and the step `cover` has at
    # most n (cover / 2)^2. Above, the largest weight would lose the code m.
    low, high = max(1 - w.shape[1] ** 0.5 / (2 * m), 1 / 64), m / (m - 0.5)
    ratio = (high / low) ** (1 / (COARSE - 1))
    coarse, fine = [1.0, *(low * ratio**i for i in range(COARSE))], [ratio ** (sign * i / 6) for i in range(1, 6) for sign in (1, -1)]
    return torch.from_numpy(least_error(w.detach().cpu().contiguous().numpy(), cover.cpu().numpy(), m, coarse, fine)).to(w.device)


# ---- inputs --------------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Codes lo..hi of a step: `clip(rint(x / scale), lo, hi)`; error, to compare windows that were found in the same way."""

    error: float
    scale: float
    lo: int
    hi: int


def of_inputs(values: Tensor, lowest: float, largest: float, windows: list[tuple[int, int]], method: str) -> Window:
    """The best of some windows (lo, hi), with its step.

    Args: values, a sample; lowest, largest, extremes of all; windows, of which one holds numbers of the signs of these; method, "max": the
        least step with which a window holds both, or "mse": least squared error on the sample, over steps for all windows at once.
    """
    lo, hi = np.array(windows).T
    with np.errstate(divide="ignore"):
        above = np.divide(max(largest, 0), hi) if largest > 0 else np.zeros(len(hi))
        below = np.divide(max(-lowest, 0), -lo) if lowest < 0 else np.zeros(len(lo))
    covers = np.maximum(above, below)
    best = int(covers.argmin())
    cover = float(covers[best])
    if method == "max":
        return Window(cover**2, cover, int(lo[best]), int(hi[best]))
    errors = _InputErrors(values)
    coarse = errors.least([cover * 2 ** (-i / 5) for i in range(51)], lo, hi)
    return min(coarse, errors.least([coarse.scale * 2 ** (i / 40) for i in range(-7, 8)], lo, hi))


class _InputErrors:
    """Mean squared errors of many windows at a time: sums over sorted numbers, from which those that a window clips or rounds
    are differences."""

    GROUPS = 2**14  # of neighbours, each as its mean: 64 for a step of 8 bits

    def __init__(self, values):
        x = np.sort(values.detach().flatten().double().cpu().numpy())
        starts = np.arange(0, len(x), max(1, len(x) // self.GROUPS))
        self.share = np.diff(starts, append=len(x)) / len(x)
        self.x = np.add.reduceat(x, starts) / (self.share * len(x))
        self.moments = [_running(self.share * self.x**power) for power in range(3)]

    def least(self, steps, lo, hi):
        """The `Window` of least error, of those and these steps; the first of equals."""
        errors = np.stack([self.of(step, lo, hi) for step in steps])
        step, window = np.unravel_index(errors.argmin(), errors.shape)
        return Window(float(errors[step, window]), float(steps[step]), int(lo[window]), int(hi[window]))

    def of(self, step, lo, hi):
        """The error of each window (lo, hi), arrays, at one step."""
        rounding = _running(self.share * (np.rint(self.x / step) * step - self.x) ** 2)
        first, last = np.searchsorted(self.x, lo * step), np.searchsorted(self.x, hi * step, side="right")
        clipped = self._distance(0, first, lo * step) + self._distance(last, len(self.x), hi * step)
        return np.maximum(clipped, 0) + rounding[last] - rounding[first]

    def _distance(self, first, last, bound):
        """`sum share (x - bound)^2` of the numbers from `first` to before `last`."""
        ones, x, squares = (moment[last] - moment[first] for moment in self.moments)
        return squares - 2 * bound * x + bound**2 * ones


def _running(values):
    """Sums of the first 0, 1, 2, ... values."""
    return np.concatenate([[0.0], np.cumsum(values)])
