"""`sum A (2 W - L)` and its like on the CPU as one exact convolution: what a layer without an ADC, or with one that changes
no read, amounts to.

Codes of 8 bits times weights of 8 bits into 32 where the library (oneDNN) does that exactly for a layer of this shape; processors
with VNNI or AMX are several times faster at it than at float32. Else a float32 convolution. Either gives float32, which is exact
while no sum reaches 2^24: where weights are so large or so many that one could, the input channels are cut into parts, whose sums
are added as integers.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F

from ...mapping import MappedLayer
from .. import accumulator_dtype

EXACT = 2**24  # float32 holds every integer below
SAFE = 64  # up to there two products of weights and codes of 8 bits fit in 16 bits, in which some processors add them
FEW = 8  # outputs of a group: with fewer, products of vectors are no matrix product, and float32 is as fast


class _LibraryConvolution:
    """oneDNN's convolution of uint8 codes and int8 weights `[out, in / groups, kh, kw]`, as PyTorch's exported graphs call it.

    It gives float32, exact while no sum reaches 2^24. Both methods raise AttributeError, RuntimeError or TypeError where this
    PyTorch has no such operator, or another one.
    """

    def __init__(self, weight, geometry):
        self.padding, in_library = _padding(geometry)
        self.shape = [list(geometry.stride), in_library, list(geometry.dilation), geometry.groups]
        self.one_row = tuple(weight.shape[2:]) == tuple(geometry.stride) == (1, 1) and not any(geometry.padding)
        self.scales = torch.ones(len(weight), dtype=torch.float32)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.weight = torch.ops.onednn.qconv_prepack(weight, self.scales, 1.0, 0, *self.shape)

    def __call__(self, x):
        """x, uint8 `[N, H, W, in]`; returns float32 `[N, H', W', out]`."""
        if self.one_row:  # as many images of one pixel, what a linear layer has, take the library up to eighteen times as long
            return self._convolution(x.reshape(1, 1, -1, x.shape[3])).view(*x.shape[:3], -1)
        return self._convolution(F.pad(x, self.padding) if self.padding else x)

    def _convolution(self, x):
        y = torch.ops.onednn.qconv2d_pointwise(x.permute(0, 3, 1, 2), 1.0, 0, self.weight, self.scales, self.zeros, None,
                                               *self.shape, 1.0, 0, torch.float32, "none", [], "")
        return y.permute(0, 2, 3, 1).contiguous()


class _FloatConvolution:
    """The same in float32, or in another type, with integer weights of any size."""

    def __init__(self, weight, geometry, dtype=torch.float32):
        self.weight, self.geometry = weight.to(dtype).contiguous(memory_format=torch.channels_last), geometry
        self.padding, self.in_library = _padding(geometry)

    def __call__(self, x):
        x = F.pad(x, self.padding) if self.padding else x
        y = F.conv2d(x.permute(0, 3, 1, 2).to(self.weight.dtype), self.weight, None, self.geometry.stride, self.in_library,
                     self.geometry.dilation, self.geometry.groups)
        return y.permute(0, 2, 3, 1).contiguous()


def _padding(geometry):
    """(what `F.pad` takes for NHWC, or None; what is left to the library): it pads both sides alike, without a copy."""
    top, bottom, left, right = geometry.padding
    return (None, [top, left]) if (top, left) == (bottom, right) else ((0, 0, left, right, top, bottom), [0, 0])


NO_OPERATOR = AttributeError, RuntimeError, TypeError
_library_is_exact = {}  # for each shape of layer and input, and number of threads: the library chooses its code by them


def _library_serves(shape, weight_shape, geometry, largest_code, saturates):
    """Whether the library gives exact sums for codes and weights of these shapes, codes up to `largest_code` and weights beyond SAFE
    or not; tried once, on numbers half of which are the largest.

    Where a processor has no products of bytes that add up in 32 bits, oneDNN adds two of them in 16, which saturate.
    """
    key = shape, weight_shape, geometry, torch.get_num_threads(), largest_code, saturates
    if key not in _library_is_exact:
        numbers = torch.Generator().manual_seed(0)  # not those of a training run
        low, high = (-128, 127) if saturates else (-SAFE, SAFE)
        a_codes = torch.randint(0, largest_code + 1, shape, generator=numbers)
        trial = torch.randint(low, high + 1, weight_shape, generator=numbers)
        a_codes[torch.rand(shape, generator=numbers) < 0.5] = largest_code
        trial = torch.where(torch.rand(weight_shape, generator=numbers) < 0.5, trial, torch.where(trial < 0, low, high))
        trial, a_codes = trial.to(torch.int8), a_codes.to(torch.uint8)
        ends = slice(None, None, max(1, shape[0] - 1))  # the first and the last image
        try:
            found = _LibraryConvolution(trial, geometry)(a_codes)[ends]
            _library_is_exact[key] = torch.equal(found, _FloatConvolution(trial, geometry, torch.float64)(a_codes[ends]).float())
        except NO_OPERATOR:
            _library_is_exact[key] = False
    return _library_is_exact[key]


def _largest_sum(weight, largest_code):
    """No |sum| of an output channel is larger: all codes are at their largest where weights have one sign, and 0 elsewhere."""
    low, high = (int(end) for end in weight.aminmax())
    bound = largest_code * max(-low, high) * weight[0].numel()
    if bound < EXACT:  # which is all that is asked
        return bound
    weight = weight.flatten(1).int()
    return largest_code * max(int(weight.clamp(min=0).sum(1).max()), -int(weight.clamp(max=0).sum(1).min()))


class _Parts:
    """A convolution with integer weights as exact ones of parts of the input channels of each group.

    Args: kind, `_LibraryConvolution` or `_FloatConvolution`; weight, `[out, in / groups, kh, kw]`; largest_code, of the input;
        integers, the type in which parts are added.
    """

    def __init__(self, kind, weight, geometry, largest_code, integers):
        count = 1
        while count < weight.shape[1] and any(_largest_sum(part, largest_code) >= EXACT for part in weight.chunk(count, dim=1)):
            count *= 2
        parts = [part.contiguous() for part in weight.chunk(count, dim=1)]
        self.shapes, self.convolutions = [part.shape for part in parts], [kind(part, geometry) for part in parts]
        self.geometry, self.largest_code, self.integers = geometry, largest_code, integers
        self.saturates = weight.dtype == torch.int8 and max(-int(weight.min()), int(weight.max())) > SAFE

    def __call__(self, x):
        """Sums `[N, H', W', out]`: float32 of one part, integers of several."""
        parts = [convolution(codes) for convolution, codes in zip(self.convolutions, self._inputs(x))]
        return parts[0] if len(parts) == 1 else sum(part.to(self.integers) for part in parts)

    def _inputs(self, x):
        if len(self.shapes) == 1:
            return [x]
        grouped = x.view(*x.shape[:3], self.geometry.groups, -1)
        return [part.flatten(3) for part in grouped.split([shape[1] for shape in self.shapes], dim=4)]

    def served_by_library(self, x):
        """Whether the library computes all parts exactly."""
        return all(_library_serves(codes.shape, shape, self.geometry, self.largest_code, self.saturates)
                   for codes, shape in zip(self._inputs(x), self.shapes))


class IntegerConvolution:
    """`sum A (factor W - offset)` of one layer, `sum A (2 W - L)` by default; its weights are laid out once.

    Weights that are no bytes go to the library as `W - zero`, and the sum of the codes under the kernel is added behind it:
    `sum A (factor W - offset) = factor sum A (W - zero) + (factor zero - offset) sum A`.

    Call with a_codes, uint8 `[N, H, W, in]`; returns integers `[N, H', W', out]`.
    """

    def __init__(self, layer: MappedLayer, factor: int = 2, offset: int | None = None) -> None:
        self.layer, self.geometry, self.largest_code = layer, layer.geometry, 2**layer.spec.a_bits - 1
        self.rows = layer.w_codes[0].numel()
        self.factor, self.offset = factor, layer.zero_twice if offset is None else offset
        bound = _largest_sum(self._weights(), self.largest_code)
        self.integers = torch.int32 if bound < 2**31 else torch.int64
        self.dtype = torch.float32 if bound < EXACT else self.integers  # what `sums` gives
        self.unit, self.rest, self.library, self._floats = 1, 0, None, None
        if self.geometry.groups == 1 or len(layer.w_codes) // self.geometry.groups >= FEW:
            with contextlib.suppress(*NO_OPERATOR):
                self.library = _Parts(_LibraryConvolution, self._bytes(), self.geometry, self.largest_code, self.integers)

    def _weights(self):
        return self.factor * self.layer.w_codes.cpu().int() - self.offset

    def _bytes(self):
        """What the library takes for weights, int8; sets `unit` and `rest`, see `_with_rest`."""
        weight = self._weights()
        if weight.min() < -128 or weight.max() > 127:
            codes, zero = self.layer.w_codes.cpu().int(), self.offset // self.factor
            zero = zero if zero <= 128 and codes.max() - zero < 128 else 128
            weight, self.unit, self.rest = codes - zero, self.factor, self.factor * zero - self.offset
        return weight.to(torch.int8)

    def __call__(self, a_codes: Tensor) -> Tensor:
        y, dtype = self.sums(a_codes), accumulator_dtype(self.layer)
        return y.view(torch.int32).copy_(y) if (y.dtype, dtype) == (torch.float32, torch.int32) else y.to(dtype)  # in place

    def sums(self, a_codes: Tensor) -> Tensor:
        """What a call returns, in `dtype`: float32 where that holds every sum, which saves a pass over memory."""
        if self.serves(a_codes):
            return self._with_rest(self.library(a_codes), a_codes).to(self.dtype)
        if self._misread(a_codes):
            return _FloatConvolution(self._weights(), self.geometry, torch.float64)(a_codes).to(self.dtype)
        if self._floats is None:
            self._floats = _Parts(_FloatConvolution, self._weights(), self.geometry, self.largest_code, self.integers)
        return self._floats(a_codes).to(self.dtype)

    def serves(self, a_codes: Tensor) -> bool:
        """Whether the library computes the sums of such codes."""
        return (self.library is not None and len(a_codes) > 0 and not self._misread(a_codes)
                and self.library.served_by_library(a_codes))

    def _misread(self, a_codes):
        """Whether oneDNN 3.12 is wrong, in float32 too: outputs one pixel wide with a horizontal stride above 1. It reads memory there
        that it has not written, so that a trial may not find it out."""
        return self.geometry.stride[1] > 1 and self.geometry.output_size(*a_codes.shape[1:3], self.layer.kernel)[1] == 1

    def _with_rest(self, y, a_codes):
        """`unit y + rest sum A`, in place where it can be."""
        in_float = self.dtype == torch.float32 and abs(self.rest) * self.largest_code * self.rows < EXACT
        y = y if in_float else y.to(self.integers)  # which may wrap, and back
        if not self.rest:
            return y if self.unit == 1 else y.mul_(self.unit)
        grouped = y.view(*y.shape[:3], self.geometry.groups, -1)
        total = self.rest * self._code_sums(a_codes).to(y.dtype)
        torch.add(total[..., None], grouped, alpha=self.unit, out=grouped)
        return y

    def _code_sums(self, a_codes):
        """`sum A` under the kernel, for each group: float `[N, H', W', groups]`."""
        geometry, (padding, in_library) = self.geometry, _padding(self.geometry)
        channels = a_codes.view(*a_codes.shape[:3], geometry.groups, -1).sum(4, dtype=torch.int32)
        dtype = torch.float32 if self.largest_code * self.rows < EXACT else torch.float64
        ones = torch.ones(geometry.groups, 1, *self.layer.kernel, dtype=dtype)
        x = F.pad(channels, padding) if padding else channels
        sums = F.conv2d(x.permute(0, 3, 1, 2).to(dtype), ones, None, geometry.stride, in_library, geometry.dilation, geometry.groups)
        return sums.permute(0, 2, 3, 1)
