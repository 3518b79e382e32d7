"""Steps of least squared error for the weights of each channel, on the CPU: all that are tried go over a channel while it is in cache."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .cache import SOURCES
from .simd import set_threads

LANES = 128  # sums of a channel, added up at its end: in one order on every processor


@njit(cache=True, parallel=True)
def _least(weights, m, coarse, fine, steps, sources=SOURCES):
    """See `least_error`."""
    for channel in prange(len(weights)):
        w, sums = weights[channel], np.empty(LANES)
        step, least = steps[channel], np.inf
        for factors in (coarse, fine):
            middle = step
            for factor in factors:
                tried = middle * factor
                sums[:] = 0
                for start in range(0, len(w), LANES):
                    part = w[start:start + LANES]
                    for i in range(len(part)):
                        quotient = part[i] / tried
                        code = np.rint(quotient)
                        code = m if code > m else code
                        code = -m if code < -m else code
                        error = quotient - code
                        sums[i] += error * error
                found = np.sqrt(sums.sum()) * tried
                if found < least:
                    least, step = found, tried
        steps[channel] = step


def least_error(weights: np.ndarray, first: np.ndarray, m: int, coarse: list[float], fine: list[float]) -> np.ndarray:
    """The step s of each channel with the least `sum (s clip(rint(w / s), -m, m) - w)^2`, float32 `[out]`: of `first` times each number of
    `coarse`, then of the best of those times each of `fine`. Of equals the first.

    Args: weights, float32 `[out, n]`, contiguous; first, float32 `[out]`.
    """
    set_threads()
    steps = first.copy()
    _least(weights, np.float32(m), np.array(coarse, np.float32), np.array(fine, np.float32), steps)
    return steps
