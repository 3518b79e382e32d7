"""What quantizers of some steps err, on the CPU: all steps that are tried go over the numbers while these are in cache."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .cache import SOURCES
from .simd import set_threads

LANES = 128  # sums of a step, added up at its end: in one order on every processor


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


@njit(cache=True, parallel=True)
def _window_errors(x, share, steps, lo, hi, errors, sources=SOURCES):
    """See `window_errors`."""
    for i in prange(len(steps)):
        step, codes, sums = steps[i], np.empty(LANES), np.zeros((len(lo), LANES))
        for start in range(0, len(x), LANES):
            part, of_part = x[start:start + LANES], share[start:start + LANES]
            for j in range(len(part)):
                codes[j] = np.rint(part[j] / step)
            for window in range(len(lo)):
                low, high, total = lo[window], hi[window], sums[window]
                for j in range(len(part)):
                    code = high if codes[j] > high else codes[j]
                    code = low if code < low else code
                    error = code * step - part[j]
                    total[j] += of_part[j] * (error * error)
        for window in range(len(lo)):
            errors[i, window] = sums[window].sum()


def window_errors(x: np.ndarray, share: np.ndarray, steps: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """`sum share (s clip(rint(x / s), lo, hi) - x)^2`, float64 `[steps, windows]`. Args: x, share, float64 `[n]`; steps, float64; lo, hi,
    of each window."""
    set_threads()
    errors = np.empty((len(steps), len(lo)))
    _window_errors(x, share, steps, lo.astype(np.float64), hi.astype(np.float64), errors)
    return errors
