"""Steps of linear quantizers on given numbers: those of least squared error, or those that clip nothing.

Pure functions: weights have a step for each output channel (`of_channels`), inputs one step and a window of codes
(`of_inputs`).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.steps import least_error, window_errors

METHODS = ("mse", "max")
WEIGHT_METHODS = (*METHODS, "layer")
SMALLEST = 2.0**-100  # numbers that are all below are zero: a step whose inverse is infinite is none
COARSE = 32  # steps that are tried first, from the smallest that may be best to the largest
GROUPS = 2**14  # of neighbours among the numbers of a sample, each as its mean: 64 for a step of 8 bits


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
    x = np.sort(values.detach().flatten().double().cpu().numpy())
    starts = np.arange(0, len(x), max(1, len(x) // GROUPS))
    share = np.diff(starts, append=len(x)) / len(x)
    x = np.add.reduceat(x, starts) / (share * len(x))

    def least(steps):  # of equals the first
        errors = window_errors(x, share, steps, lo, hi)
        step, window = np.unravel_index(errors.argmin(), errors.shape)
        return Window(float(errors[step, window]), float(steps[step]), int(lo[window]), int(hi[window]))

    coarse = least(cover * 2 ** (np.arange(0, -51, -1) / 5))
    return min(coarse, least(coarse.scale * 2 ** (np.arange(-7, 8) / 40)))
