"""The first layer in inference on a CPU: an image, whose pixels are no codes, times weight codes, summed in float64.

The sum is exact there: 24 bits of a pixel, 8 of a code and what tens or thousands of terms add need fewer than 53 bits.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch.nn import functional as F

from ..arrays.spec import Geometry
from .cache import SOURCES
from .inner import inlined
from .output import NOT_TO_CODES, ToCodes, next_code, scale_sum
from .simd import set_threads

TERMS = 3  # products that are added to a sum at a time, so that sums are loaded and stored less often
PIXELS = 4  # side by side, for which a weight is loaded once


# "contract" lets a product be added in one instruction, without rounding it before. Nothing is rounded here anyway.
@njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, fastmath={"contract"})
def _add_terms(weight, patch, k, total):
    """Add the products of `TERMS` rows of weight to the sums of `PIXELS` pixels, `[pixel, out]`."""
    a, b, c = weight[k], weight[k + 1], weight[k + 2]
    (p0, p1, p2, p3), (q0, q1, q2, q3), (r0, r1, r2, r3) = _four(patch, k), _four(patch, k + 1), _four(patch, k + 2)
    t0, t1, t2, t3 = total[0], total[1], total[2], total[3]
    for o in range(len(a)):
        t0[o] += p0 * a[o] + q0 * b[o] + r0 * c[o]
        t1[o] += p1 * a[o] + q1 * b[o] + r1 * c[o]
        t2[o] += p2 * a[o] + q2 * b[o] + r2 * c[o]
        t3[o] += p3 * a[o] + q3 * b[o] + r3 * c[o]


@inlined
def _four(patch, k):
    """Row k of a patch, float64, as four numbers."""
    return patch[k, 0], patch[k, 1], patch[k, 2], patch[k, 3]


@njit(cache=True, parallel=True)
def _convolution(x, weight, kernel, stride, dilation, scale, offset, to_codes, out, sources=SOURCES):
    """`convolution` of x `[N, H, W, in]`, padded, and weight, float64 `[kh kw in and zeros up to a multiple of TERMS, out]`."""
    images, height, width, channels = out.shape
    depth = x.shape[3]
    for item in prange(images * height):
        image, row = item // height, item % height
        patch, total = np.zeros((len(weight), PIXELS)), np.empty((PIXELS, channels))
        for first in range(0, width, PIXELS):
            count = min(PIXELS, width - first)  # what stands in the patch for the others is of pixels before
            n = 0
            for ky in range(kernel[0]):
                for kx in range(kernel[1]):
                    for c in range(depth):
                        for j in range(count):
                            patch[n, j] = x[image, row * stride[0] + ky * dilation[0],
                                            (first + j) * stride[1] + kx * dilation[1], c]
                        n += 1
            total[:] = 0
            for k in range(0, len(weight), TERMS):
                _add_terms(weight, patch, k, total)
            for j in range(count):
                result = out[image, row, first + j]
                for o in range(channels):
                    y = scale_sum(total[j, o], scale, offset[o])
                    if len(to_codes.gain):
                        result[o] = next_code(y, to_codes.gain[o], to_codes.shift[o], to_codes.alpha, to_codes.factor)
                    else:
                        result[o] = y


def convolution(x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, scale: float, offset: torch.Tensor,
                to_codes: ToCodes | None = None) -> torch.Tensor:
    """`float32(sum of x weight) scale + offset`, or the next layer's codes of it (uint8): `[N, H', W', out]`.

    Args: x, `[N, in, H, W]`; weight, integers in floating point `[out, in, kh, kw]`; geometry, without groups; scale, a
        number; offset, float32 `[out]`; to_codes, `output.ToCodes`.
    Raises: ValueError for an `x` of other channels.
    """
    if x.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"the input has shape {list(x.shape)}; [N, {weight.shape[1]}, H, W] is expected")
    set_threads()
    top, bottom, left, right = geometry.padding
    kernel = tuple(weight.shape[2:])
    size = geometry.output_size(*x.shape[2:], kernel)
    x = x if x.dtype == torch.float64 else x.float()
    x = F.pad(x, (left, right, top, bottom)).permute(0, 2, 3, 1).contiguous().resolve_neg()
    rows = weight.permute(2, 3, 1, 0).flatten(0, 2).double()
    rows = F.pad(rows, (0, 0, 0, -len(rows) % TERMS)).contiguous()
    out = torch.empty(len(x), *size, len(weight), dtype=torch.float32 if to_codes is None else torch.uint8)
    _convolution(x.numpy(), rows.numpy(), kernel, geometry.stride, geometry.dilation, np.float32(scale), offset.numpy(),
                 to_codes or NOT_TO_CODES, out.numpy())
    return out
