"""Exact sums of products of uint8 codes and integer weights, each shape by the fastest way that this processor and library have.

Codes of 8 bits times weights of 8 bits into 32 where the library (oneDNN) does that exactly for a layer of this shape; processors
with VNNI or AMX are several times faster at it than at float32. Else a float32 convolution. Either gives float32, which is exact
while no sum reaches 2^24: where weights are so large or so many that one could, the input channels are cut into parts, whose sums
are added as integers.

Which way is exact, and of these the fastest, is found out by trying, once for a shape: the same layer takes sixty times as long by
one way as by another on one kind of processor, and the other way round on the next.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ....arrays.spec import Geometry
from .choice import PRODUCTS, fastest, may

EXACT = 2**24  # float32 holds every integer below
SAFE = 64  # up to there two products of weights and codes of 8 bits fit in 16 bits, in which some processors add them
FEW = 8  # outputs of a group: with fewer, float32 may be as fast as bytes


class _Matrix:
    """oneDNN's matrix product of uint8 codes and int8 weights `[out, in, 1, 1]`, as PyTorch's exported graphs call it: a kernel of one
    pixel has a row for each output pixel.

    It gives float32, exact while no sum reaches 2^24. Making it and calling it raise AttributeError, RuntimeError or TypeError where
    this PyTorch has no such operator, or another one; the same holds of `_Convolution`.
    """

    name = "matrix product of bytes"

    def __init__(self, weight, geometry):
        self.stride = geometry.stride
        self.scales = torch.ones(len(weight), dtype=torch.float32)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.weight = torch.ops.onednn.qlinear_prepack(weight.flatten(1), None)

    def __call__(self, x):
        """x, uint8 `[N, H, W, in]`; returns float32 `[N, H', W', out]`."""
        x = x[:, ::self.stride[0], ::self.stride[1]]
        y = torch.ops.onednn.qlinear_pointwise(x.flatten(0, 2), 1.0, 0, self.weight, self.scales, self.zeros, None, 1.0, 0,
                                               torch.float32, "none", [], "")
        return y.view(*x.shape[:3], -1)


class _Convolution:
    """oneDNN's convolution of uint8 codes and int8 weights `[out, in / groups, kh, kw]`; see `_Matrix`."""

    name = "convolution of bytes"

    def __init__(self, weight, geometry):
        self.padding, in_library = padding(geometry)
        self.shape = [list(geometry.stride), in_library, list(geometry.dilation), geometry.groups]
        self.scales = torch.ones(len(weight), dtype=torch.float32)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.weight = torch.ops.onednn.qconv_prepack(weight, self.scales, 1.0, 0, *self.shape)

    def __call__(self, x):
        x = F.pad(x, self.padding) if self.padding else x
        y = torch.ops.onednn.qconv2d_pointwise(x.permute(0, 3, 1, 2), 1.0, 0, self.weight, self.scales, self.zeros, None,
                                               *self.shape, 1.0, 0, torch.float32, "none", [], "")
        return y.permute(0, 2, 3, 1).contiguous()


class _Floats:
    """The same in float32, with integer weights of any size."""

    name, dtype = "float32 convolution", torch.float32

    def __init__(self, weight, geometry):
        self.weight, self.geometry = weight.to(self.dtype).contiguous(memory_format=torch.channels_last), geometry
        self.padding, self.in_library = padding(geometry)

    def __call__(self, x):
        x = F.pad(x, self.padding) if self.padding else x
        y = F.conv2d(x.permute(0, 3, 1, 2).to(self.dtype), self.weight, None, self.geometry.stride, self.in_library,
                     self.geometry.dilation, self.geometry.groups)
        return y.permute(0, 2, 3, 1).contiguous()


class _Doubles(_Floats):
    """The same in float64."""

    name, dtype = "float64 convolution", torch.float64


def padding(geometry: Geometry) -> tuple[tuple[int, ...] | None, list[int]]:
    """(what `F.pad` takes for NHWC, or None; what is left to the library): it pads both sides alike, without a copy."""
    top, bottom, left, right = geometry.padding
    return (None, [top, left]) if (top, left) == (bottom, right) else ((0, 0, left, right, top, bottom), [0, 0])


NO_OPERATOR = AttributeError, RuntimeError, TypeError


def _ways(weight_shape, geometry):
    """What is tried for weights int8 of this shape."""
    if geometry.groups > 1 and weight_shape[0] // geometry.groups < FEW:
        return _Convolution, _Floats
    pixel = tuple(weight_shape[2:]) == (1, 1) and geometry.groups == 1 and not any(geometry.padding)
    return (_Matrix, _Convolution) if pixel else (_Convolution,)


@functools.cache
def _choose(*key):
    """The fastest way whose sums are exact, for shapes of codes and weights and so many threads, by which the library chooses its code;
    codes up to `largest_code`, weights beyond SAFE or not. Tried on numbers half of which are the largest.

    Where a processor has no products of bytes that add up in 32 bits, oneDNN adds two of them in 16, which saturate.
    """
    shape, weight_shape, geometry, largest_code, saturates, _ = key
    numbers = torch.Generator().manual_seed(0)  # not those of a training run
    low, high = (-128, 127) if saturates else (-SAFE, SAFE)
    # Bytes from the first: numbers of more would be the most memory that the network ever takes.
    a_codes = torch.randint(0, largest_code + 1, shape, generator=numbers, dtype=torch.uint8)
    trial = torch.randint(low, high + 1, weight_shape, generator=numbers, dtype=torch.int8)
    a_codes.masked_fill_(_half(shape, numbers), largest_code)
    largest = _half(weight_shape, numbers)
    trial.masked_fill_(largest & (trial < 0), low).masked_fill_(largest & (trial > 0), high)
    some = slice(None, None, max(1, shape[0] - 1))  # the first and the last image
    usual = _Floats if largest_sum(trial, largest_code) < EXACT else _Doubles
    wanted = usual(trial, geometry)(a_codes[some]).float()
    exact = {}
    for way in _ways(weight_shape, geometry):
        try:
            run = way(trial, geometry)
            if torch.equal(run(a_codes)[some], wanted):
                exact[way] = run
        except NO_OPERATOR:
            continue
    if not exact:
        return _Floats
    return next(way for way in exact if way.name == fastest(key, {way.name: lambda run=run: run(a_codes) for way, run in exact.items()}))


def _half(shape, numbers):
    """A mask of about half of the elements."""
    return torch.randint(0, 2, shape, generator=numbers, dtype=torch.uint8).view(torch.bool)


class _Part:
    """The products of some of the input channels of each group, whose sums stay below EXACT; every way is made once."""

    def __init__(self, weight, geometry, largest_code):
        self.weight, self.geometry, self.largest_code, self._made = weight, geometry, largest_code, {}
        self._saturates = weight.dtype == torch.int8 and max(-int(weight.min()), int(weight.max())) > SAFE

    def __call__(self, x):
        way = self.way(x)
        if way not in self._made:
            self._made[way] = way(self.weight, self.geometry)
        return self._made[way](x)

    def way(self, x):
        shape, kernel = x.shape, self.weight.shape
        if self.weight.dtype != torch.int8 or not len(x) or not may(PRODUCTS):
            return _Floats
        if self.geometry.stride[1] > 1 and self.geometry.output_size(*shape[1:3], kernel[2:])[1] == 1:
            # oneDNN 3.12 is wrong, in float32 too: outputs one pixel wide with a horizontal stride above 1. It reads memory there that
            # it has not written, so that a trial may not find it out.
            return _Doubles
        return _choose(shape, kernel, self.geometry, self.largest_code, self._saturates, torch.get_num_threads())


def largest_sum(weight: Tensor, largest_code: int) -> int:
    """No |sum| of an output channel is larger: all codes are at their largest where weights have one sign, and 0 elsewhere."""
    low, high = (int(end) for end in weight.aminmax())
    bound = largest_code * max(-low, high) * weight[0].numel()
    if bound < EXACT:  # which is all that is asked
        return bound
    weight = weight.flatten(1).double()  # a fifteenth of the time of integers, and exact
    of_one_sign = (weight.sum(1).abs() + torch.linalg.vector_norm(weight, 1, dim=1)) / 2  # the larger of both
    return largest_code * int(of_one_sign.max())


class Product:
    """`sum A W` of integer weights `[out, in / groups, kh, kw]`: int8, which may go by the library, or int32.

    Args: largest_code, of the input; integers, the type in which parts are added.
    """

    def __init__(self, weight: Tensor, geometry: Geometry, largest_code: int, integers: torch.dtype = torch.int64) -> None:
        count = 1
        while count < weight.shape[1] and any(largest_sum(part, largest_code) >= EXACT for part in weight.chunk(count, dim=1)):
            count *= 2
        self.parts = [_Part(part.contiguous(), geometry, largest_code) for part in weight.chunk(count, dim=1)]
        self.geometry, self.integers = geometry, integers

    def __call__(self, x: Tensor) -> Tensor:
        """Sums `[N, H', W', out]` of x, uint8 `[N, H, W, in]`: float32 of one part, integers of several."""
        sums = [part(codes) for part, codes in zip(self.parts, self._inputs(x))]
        return sums[0] if len(sums) == 1 else sum(each.to(self.integers) for each in sums)

    def ways(self, x: Tensor) -> list[str]:
        """The names of the ways that x takes, one for each part."""
        return [part.way(codes).name for part, codes in zip(self.parts, self._inputs(x))]

    def _inputs(self, x):
        if len(self.parts) == 1:
            return [x]
        grouped = x.view(*x.shape[:3], self.geometry.groups, -1)
        return [part.flatten(3) for part in grouped.split([part.weight.shape[1] for part in self.parts], dim=4)]
