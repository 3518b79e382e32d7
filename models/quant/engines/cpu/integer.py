"""`sum A (2 W - L)` and its like on the CPU as one exact convolution: what a layer without an ADC, or with one that changes
no read, amounts to.

Codes of 8 bits times weights of 8 bits into 32 where both fit (processors with VNNI or AMX do that several times faster than
float32): by oneDNN's convolution where PyTorch has it, else as a matrix product of patches. Else a float32 convolution while
no sum can reach 2^24, else float64.
"""

from __future__ import annotations

import contextlib

import torch
from torch.nn import functional as F

from ...mapping import MappedLayer
from .. import accumulator_dtype
from ..reference import integer_convolution

PATCH_BYTES = 2**22  # patches of one product: large enough for all threads, small enough for the cache


def patches(x: torch.Tensor, kernel: tuple[int, int], size: tuple[int, int], stride: tuple[int, int],
            dilation: tuple[int, int]) -> torch.Tensor:
    """What each output pixel of a convolution sees of `x`, `[N, H, W, in]` and padded: a view `[N, *size, *kernel, in]`."""
    image, row, pixel, channel = x.stride()
    (sy, sx), (dy, dx) = stride, dilation
    return x.as_strided((len(x), *size, *kernel, x.shape[3]),
                        (image, sy * row, sx * pixel, dy * row, dx * pixel, channel), x.storage_offset())


class _LibraryConvolution:
    """oneDNN's convolution of uint8 codes and int8 weights `[out, in / groups, kh, kw]`, as PyTorch's exported graphs call it.

    It gives float32, exact while no sum reaches 2^24. Both methods raise AttributeError, RuntimeError or TypeError where this
    PyTorch has no such operator, or another one.
    """

    def __init__(self, weight, geometry):
        top, bottom, left, right = geometry.padding
        even = (top, left) == (bottom, right)  # the library pads both sides alike, without a copy
        self.padding = None if even else (0, 0, left, right, top, bottom)
        self.shape = [list(geometry.stride), [top, left] if even else [0, 0], list(geometry.dilation), geometry.groups]
        self.scales = torch.ones(len(weight), dtype=torch.float32)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.weight = torch.ops.onednn.qconv_prepack(weight, self.scales, 1.0, 0, *self.shape)

    def __call__(self, x):
        """x, uint8 `[N, H, W, in]`; returns float32 `[N, H', W', out]`."""
        x = F.pad(x, self.padding) if self.padding else x
        y = torch.ops.onednn.qconv2d_pointwise(x.permute(0, 3, 1, 2), 1.0, 0, self.weight, self.scales, self.zeros, None,
                                               *self.shape, 1.0, 0, torch.float32, "none", [], "")
        return y.permute(0, 2, 3, 1).contiguous()


NO_OPERATOR = AttributeError, RuntimeError, TypeError
_library_is_exact = {}  # for each shape of layer and input, and number of threads: the library chooses its code by them


class IntegerConvolution:
    """`sum A (factor W - offset)` of one layer, `sum A (2 W - L)` by default; its weights are laid out once.

    Call with a_codes, uint8 `[N, H, W, in]`; returns integers `[N, H', W', out]`.
    """

    def __init__(self, layer: MappedLayer, factor: int = 2, offset: int | None = None) -> None:
        self.layer, spec = layer, layer.spec
        offset = layer.zero_twice if offset is None else offset
        largest = max(offset, factor * (2**spec.w_bits - 1) - offset)  # |factor W - offset|
        bound = largest * (2**spec.a_bits - 1) * layer.w_rows.shape[1]
        # Where a processor has no products of bytes that add up in 32 bits, the library adds two of them in 16, which
        # saturate: weights up to 64 keep them exact.
        int8 = spec.a_bits <= 7 and largest <= 64 and torch.backends.mkldnn.is_available()
        self.int8 = int8 and bound < 2**31 and layer.geometry.groups == 1
        self.float32 = bound < 2**24
        if self.int8:
            self.weight = (factor * layer.w_rows[0].int() - offset).to(torch.int8).contiguous()
        elif self.float32:
            weight = factor * layer.w_codes.float() - offset
            self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.library = None
        if int8 and self.float32 and layer.kernel != (1, 1):  # one pixel of input for one of output is a matrix already
            with contextlib.suppress(*NO_OPERATOR):
                self.library = _LibraryConvolution((factor * layer.w_codes.int() - offset).to(torch.int8), layer.geometry)

    def __call__(self, a_codes: torch.Tensor) -> torch.Tensor:
        y = self.sums(a_codes)
        return y.view(torch.int32).copy_(y) if y.dtype == torch.float32 else y  # in place

    def sums(self, a_codes: torch.Tensor) -> torch.Tensor:
        """What a call returns, as float32 where the library computed it: exact, and a pass over memory less."""
        return self.library(a_codes) if self._library_serves(a_codes.shape) else self._by_product(a_codes)

    def _library_serves(self, shape):
        """Whether the library gives exact sums for inputs of this shape; tried once, on random codes.

        oneDNN 3.12 is wrong for outputs one pixel wide with a horizontal stride above 1.
        """
        if self.library is None or not shape[0]:
            return False
        key = shape, self.layer.w_codes.shape, self.layer.geometry, torch.get_num_threads()
        if key not in _library_is_exact:
            numbers = torch.Generator().manual_seed(0)  # not those of a training run
            a_codes = torch.randint(1, 2**self.layer.spec.a_bits, shape, dtype=torch.uint8, generator=numbers)
            ends = slice(None, None, max(1, shape[0] - 1))  # the first and the last image
            wanted = self._by_product(a_codes[ends].contiguous()).float()
            try:
                _library_is_exact[key] = torch.equal(self.library(a_codes)[ends], wanted)
            except NO_OPERATOR:
                _library_is_exact[key] = False
        return _library_is_exact[key]

    def _by_product(self, a_codes):
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
