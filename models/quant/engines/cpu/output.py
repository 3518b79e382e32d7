"""What becomes of a sum of codes: a layer's output, or at once the code that the next layer makes of it.

    y = float32(sum) scale + offset                              the output of the layer
    A = round(clip(gain y + shift, 0, alpha) levels / alpha)     behind batch norm, ReLU and PACT

All of it in float32; `gain y + shift` is rounded once, as PyTorch does it on processors with such an instruction.
"""

from collections import namedtuple

import numpy as np
from numba import njit

from .simd import fused_multiply_add

# gain, shift: float32 `[out]`; alpha, clipping level of the next layer, and factor, `levels / alpha`: float32.
ToCodes = namedtuple("ToCodes", "gain shift alpha factor")
# What kernels take in place of None, for outputs that stay y: Numba wants one type.
NOT_TO_CODES = ToCodes(np.empty(0, np.float32), np.empty(0, np.float32), np.float32(1), np.float32(1))


@njit(forceinline=True)
def scale_sum(total, scale, offset):
    return np.float32(total) * scale + offset


@njit(forceinline=True)
def act_code(x, alpha, factor):
    """`quantizers.act_codes` of one value."""
    return np.uint8(np.int32(np.rint(min(max(x, np.float32(0)), alpha) * factor)))


@njit(forceinline=True)
def next_code(y, channel, to_codes):
    """Code of output y of a channel in the next layer."""
    x = fused_multiply_add(y, to_codes.gain[channel], to_codes.shift[channel])
    return act_code(x, to_codes.alpha, to_codes.factor)
