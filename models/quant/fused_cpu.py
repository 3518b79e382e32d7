"""The two element-wise steps around a crossbar layer, one pass over memory each, on the CPU.

PyTorch would take four passes for the codes and a slow mixed-type multiplication for the result; both give the same bits.
"""

import numpy as np
import torch
from numba import njit, prange

from .engines.numba_cpu import set_threads

CHUNK = 2**14  # elements of one work item


@njit(cache=True, parallel=True)
def _codes(x, alpha, scale, out):
    for chunk in prange((x.size + CHUNK - 1) // CHUNK):
        for i in range(chunk * CHUNK, min(x.size, (chunk + 1) * CHUNK)):
            out[i] = np.uint8(np.int32(np.rint(min(max(x[i], np.float32(0)), alpha) * scale)))


@njit(cache=True, parallel=True)
def _scale(acc, scale, out):
    for chunk in prange((acc.size + CHUNK - 1) // CHUNK):
        for i in range(chunk * CHUNK, min(acc.size, (chunk + 1) * CHUNK)):
            out[i] = np.float32(acc[i]) * scale


def act_codes(x, alpha, levels):
    """`quantizers.act_codes` as uint8: x, float32 NHWC; alpha, float32 scalar tensor."""
    set_threads()
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.uint8)
    _codes(x.view(-1).numpy(), np.float32(alpha), np.float32(levels / alpha), out.view(-1).numpy())
    return out


def scale_in_place(acc, scale):
    """`acc * scale` in float32, written over the int32 `acc` (contiguous); scale, float32 scalar tensor."""
    set_threads()
    out = acc.view(torch.float32)
    _scale(acc.view(-1).numpy(), np.float32(scale), out.view(-1).numpy())
    return out
