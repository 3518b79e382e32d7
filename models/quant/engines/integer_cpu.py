"""`sum A (2 W - L)` on the CPU as one exact matrix product: what a layer without an ADC, or with one that changes no
read, amounts to.

Patches of int8 codes times int8 weights into int32 where both fit (processors with VNNI or AMX do that several times
faster than float32), else a float32 convolution while no sum can reach 2^24, else float64.
"""

import torch
from torch.nn import functional as F

from . import accumulator_dtype
from .reference import integer_convolution

PATCH_BYTES = 2**25  # patches of one product: large enough for the processor, small beside the activations


class IntegerConvolution:
    """The convolution of one layer; its weights are laid out once.

    Call with a_codes, uint8 `[N, H, W, in]`; returns integers `[N, H', W', out]`.
    """

    def __init__(self, layer):
        self.layer, spec = layer, layer.spec
        offset = layer.zero_twice
        largest = max(offset, 2 * (2**spec.w_bits - 1) - offset)  # |2 W - L|
        bound = largest * (2**spec.a_bits - 1) * layer.w_rows.shape[1]
        self.int8 = (spec.a_bits <= 7 and largest < 128 and layer.geometry.groups == 1
                     and accumulator_dtype(layer) == torch.int32 and torch.backends.mkldnn.is_available())
        self.float32 = bound < 2**24
        if self.int8:
            self.weight = (2 * layer.w_rows[0].int() - offset).to(torch.int8).contiguous()
        elif self.float32:
            weight = 2 * layer.w_codes.float() - offset
            self.weight = weight.contiguous(memory_format=torch.channels_last)

    def __call__(self, a_codes):
        if not (self.int8 or self.float32):
            return integer_convolution(self.layer, a_codes)
        geometry = self.layer.geometry
        top, bottom, left, right = geometry.padding
        if self.int8:
            x = F.pad(a_codes.view(torch.int8), (0, 0, left, right, top, bottom))
            patch = x[0].numel() * self.layer.kernel[0] * self.layer.kernel[1]
            return torch.cat([self._product(part) for part in x.split(max(1, PATCH_BYTES // max(patch, 1)))])
        x = F.pad(a_codes.permute(0, 3, 1, 2).float(), (left, right, top, bottom))
        y = F.conv2d(x, self.weight, None, geometry.stride, 0, geometry.dilation, geometry.groups)
        return y.permute(0, 2, 3, 1).to(accumulator_dtype(self.layer)).contiguous()

    def _product(self, x):
        """x: padded int8 codes `[N, H, W, in]`. Rows of a patch are in (tap, channel) order, as those of the weights."""
        n, height, width, channels = x.shape
        (kh, kw), (sy, sx), (dy, dx) = self.layer.kernel, self.layer.geometry.stride, self.layer.geometry.dilation
        size = (height - dy * (kh - 1) - 1) // sy + 1, (width - dx * (kw - 1) - 1) // sx + 1
        image, row, pixel, _ = x.stride()
        patches = x.as_strided((n, *size, kh, kw, channels), (image, sy * row, sx * pixel, dy * row, dx * pixel, 1))
        rows = patches.reshape(-1, kh * kw * channels).contiguous()  # rows that overlap in memory are no matrix for it
        return torch._int_mm(rows, self.weight).view(n, *size, -1)
