"""What becomes of a sum of codes: a layer's output, or at once the code that the next layer makes of it.

    y = float32(sum) scale + offset                              the output of the layer
    A = round(clip(gain y + shift, 0, alpha) levels / alpha)     behind batch norm, ReLU and PACT

All of it in float32; `gain y + shift` is rounded once, as PyTorch does it on processors with such an instruction.
"""

from collections import namedtuple

import numpy as np

from .inner import inlined
from .simd import fused_multiply_add

# gain, shift: float32 `[out]`; alpha, clipping level of the next layer, and factor, `levels / alpha`: float32.
ToCodes = namedtuple("ToCodes", "gain shift alpha factor")
# What kernels take in place of None, for outputs that stay y: Numba wants one type.
NOT_TO_CODES = ToCodes(np.empty(0, np.float32), np.empty(0, np.float32), np.float32(1), np.float32(1))


@inlined
def scale_sum(total, scale, offset):
    """y of one channel: `float32(total) scale + offset`; total, any number; scale, offset, float32."""
    return np.float32(total) * scale + offset


@inlined
def act_code(x, alpha, factor):
    """`quantizers.act_codes` of one value."""
    return np.uint8(np.int32(np.rint(min(max(x, np.float32(0)), alpha) * factor)))


@inlined
def next_code(y, gain, shift, alpha, factor):
    """Code of output y in the next layer; the numbers are those of `ToCodes`, gain and shift of y's channel."""
    return act_code(fused_multiply_add(y, gain, shift), alpha, factor)
