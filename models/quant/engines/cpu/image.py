"""The first layer in inference on a CPU: an image, whose pixels are no codes, times weight codes, summed in float64.

The sum is exact there: 24 bits of a pixel, 8 of a code and what tens or thousands of terms add need fewer than 53 bits.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch.nn import functional as F

from ...spec import Geometry
from .cache import SOURCES
from .output import NOT_TO_CODES, ToCodes, next_code, scale_sum
from .simd import set_threads

TERMS = 4  # products that are added to a sum at a time, so that sums are loaded and stored less often


@njit(cache=True, parallel=True)
def _convolution(x, weight, kernel, stride, dilation, scale, offset, to_codes, out, sources=SOURCES):
    """`convolution` of x `[N, H, W, in]`, padded, and weight, float64 `[kh kw in and zeros up to a multiple of TERMS, out]`."""
    images, height, width, channels = out.shape
    depth = x.shape[3]
    for item in prange(images * height):
        image, row = item // height, item % height
        patch, total = np.zeros(len(weight)), np.empty(channels)
        for column in range(width):
            n = 0
            for ky in range(kernel[0]):
                for kx in range(kernel[1]):
                    pixel = x[image, row * stride[0] + ky * dilation[0], column * stride[1] + kx * dilation[1]]
                    for c in range(depth):
                        patch[n] = pixel[c]
                        n += 1
            total[:] = 0
            for k in range(0, len(weight), TERMS):
                p0, p1, p2, p3 = patch[k], patch[k + 1], patch[k + 2], patch[k + 3]
                w0, w1, w2, w3 = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
                for o in range(channels):
                    total[o] += p0 * w0[o] + p1 * w1[o] + (p2 * w2[o] + p3 * w3[o])
            result = out[image, row, column]
            for o in range(channels):
                y = scale_sum(total[o], scale, offset[o])
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
    x = F.pad(x, (left, right, top, bottom)).permute(0, 2, 3, 1).contiguous()
    rows = weight.permute(2, 3, 1, 0).flatten(0, 2).double()
    rows = F.pad(rows, (0, 0, 0, -len(rows) % TERMS)).contiguous()
    out = torch.empty(len(x), *size, len(weight), dtype=torch.float32 if to_codes is None else torch.uint8)
    _convolution(x.numpy(), rows.numpy(), kernel, geometry.stride, geometry.dilation, np.float32(scale), offset.numpy(),
                 to_codes or NOT_TO_CODES, out.numpy())
    return out
