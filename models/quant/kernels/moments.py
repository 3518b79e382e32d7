"""Mean and deviation of the channels of a tensor on the CPU, in one pass over memory.

PyTorch widens a float32 tensor to float64 first and then takes ten times as long, a sixth of a calibration.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from .cache import SOURCES
from .simd import set_threads

CHUNK = 2**16  # elements of one work item


@njit(cache=True, parallel=True)
def _sums(x, sums, sources=SOURCES):
    """sums, `[chunk, 2, channels]`: of the difference from the first pixel, and of its square."""
    pixels, channels = x.shape
    each = max(1, CHUNK // channels)
    first = x[0].astype(np.float64)
    for chunk in prange(len(sums)):
        for pixel in x[chunk * each:(chunk + 1) * each]:
            for c in range(channels):
                d = np.float64(pixel[c]) - first[c]
                sums[chunk, 0, c] += d
                sums[chunk, 1, c] += d * d


def std_mean(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Deviation (of n) and mean of each channel of `x`, float32 `[pixels, channels]`, contiguous: float64 `[channels]`, of values all
    alike exactly 0. Sums are in a fixed order, whatever the threads."""
    set_threads()
    pixels, channels = x.shape
    values = x.detach().numpy()
    sums = np.zeros((-(-pixels // max(1, CHUNK // channels)), 2, channels))
    _sums(values, sums)
    d, square = sums.sum(0) / pixels
    return torch.from_numpy(np.sqrt(np.maximum(square - d**2, 0))), torch.from_numpy(values[0] + d)
