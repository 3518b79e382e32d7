"""`sum A (2 W - L)` and its like on the CPU as one exact matrix product: what a layer without an ADC, or with one that
changes no read, amounts to.

Patches of int8 codes times int8 weights into int32 where both fit (processors with VNNI or AMX do that several times
faster than float32), else a float32 convolution while no sum can reach 2^24, else float64.
"""

import torch
from torch.nn import functional as F

from . import accumulator_dtype
from .reference import integer_convolution

PATCH_BYTES = 2**22  # patches of one product: large enough for all threads, small enough for the cache


def patches(x, kernel, size, stride, dilation):
    """What each output pixel of a convolution sees of `x`, `[N, H, W, in]` and padded: a view `[N, *size, *kernel, in]`."""
    image, row, pixel, channel = x.stride()
    (sy, sx), (dy, dx) = stride, dilation
    return x.as_strided((len(x), *size, *kernel, x.shape[3]),
                        (image, sy * row, sx * pixel, dy * row, dx * pixel, channel), x.storage_offset())


class IntegerConvolution:
    """`sum A (factor W - offset)` of one layer, `sum A (2 W - L)` by default; its weights are laid out once.

    Call with a_codes, uint8 `[N, H, W, in]`; returns integers `[N, H', W', out]`.
    """

    def __init__(self, layer, factor=2, offset=None):
        self.layer, spec = layer, layer.spec
        offset = layer.zero_twice if offset is None else offset
        largest = max(offset, factor * (2**spec.w_bits - 1) - offset)  # |factor W - offset|
        bound = largest * (2**spec.a_bits - 1) * layer.w_rows.shape[1]
        # Where a processor has no products of bytes that add up in 32 bits, the library adds two of them in 16, which
        # saturate: weights up to 64 keep them exact.
        self.int8 = (spec.a_bits <= 7 and largest <= 64 and layer.geometry.groups == 1
                     and bound < 2**31 and torch.backends.mkldnn.is_available())
        self.float32 = bound < 2**24
        if self.int8:
            self.weight = (factor * layer.w_rows[0].int() - offset).to(torch.int8).contiguous()
        elif self.float32:
            weight = factor * layer.w_codes.float() - offset
            self.weight = weight.contiguous(memory_format=torch.channels_last)

    def __call__(self, a_codes):
        if not (self.int8 or self.float32):
            return integer_convolution(self.layer, a_codes)
        geometry = self.layer.geometry
        top, bottom, left, right = geometry.padding
        if self.int8:
            x = F.pad(a_codes.view(torch.int8), (0, 0, left, right, top, bottom))
            size = geometry.output_size(*a_codes.shape[1:3], self.layer.kernel)
            images = max(1, PATCH_BYTES // max(size[0] * size[1] * len(self.weight), 1))
            out = torch.empty(len(x), *size, self.weight.shape[1], dtype=torch.int32)
            for part, target in zip(x.split(images), out.split(images)):
                rows = patches(part, self.layer.kernel, size, geometry.stride, geometry.dilation)
                rows = rows.reshape(-1, len(self.weight)).contiguous()  # rows that overlap in memory are no matrix for it
                torch._int_mm(rows, self.weight, out=target.view(-1, self.weight.shape[1]))
            return out
        x = F.pad(a_codes.permute(0, 3, 1, 2).float(), (left, right, top, bottom))
        y = F.conv2d(x, self.weight, None, geometry.stride, 0, geometry.dilation, geometry.groups)
        return y.permute(0, 2, 3, 1).to(accumulator_dtype(self.layer)).contiguous()
