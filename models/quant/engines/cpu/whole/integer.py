"""`sum A (2 W - L)` and its like on the CPU as one exact product: what a layer without an ADC, or with one that changes no read,
amounts to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ....arrays.mapping import MappedLayer
from ....kernels import elementwise
from ....kernels.output import ToCodes
from ... import accumulator_dtype
from .products import EXACT, Product, largest_sum, padding


class IntegerConvolution:
    """`sum A (factor W - offset)` of one layer, `sum A (2 W - L)` by default; its weights are laid out once.

    Weights that are no bytes are multiplied as `W - zero`, and the sum of the codes under the kernel is added behind it:
    `sum A (factor W - offset) = factor sum A (W - zero) + (factor zero - offset) sum A`.

    Call with a_codes, uint8 `[N, H, W, in]`; returns integers `[N, H', W', out]`.
    """

    def __init__(self, layer: MappedLayer, factor: int = 2, offset: int | None = None) -> None:
        self.layer, self.geometry, self.largest_code = layer, layer.geometry, 2**layer.spec.a_bits - 1
        self.rows = layer.w_codes[0].numel()
        codes, offset = layer.w_codes.cpu().short(), layer.zero_twice if offset is None else offset
        weight = factor * codes - offset
        bound = largest_sum(weight, self.largest_code)
        self.integers = torch.int32 if bound < 2**31 else torch.int64
        self.dtype = torch.float32 if bound < EXACT else self.integers  # what `sums` gives
        self.unit, self.rest = 1, 0  # see `_with_rest`
        if weight.min() < -128 or weight.max() > 127:
            zero = offset // factor
            zero = zero if zero <= 128 and codes.max() - zero < 128 else 128
            weight, self.unit, self.rest = codes - zero, factor, factor * zero - offset
        self.product = Product(weight.to(torch.int8), self.geometry, self.largest_code, self.integers)

    def __call__(self, a_codes: Tensor) -> Tensor:
        y, dtype = self.sums(a_codes), accumulator_dtype(self.layer)
        return y.view(torch.int32).copy_(y) if (y.dtype, dtype) == (torch.float32, torch.int32) else y.to(dtype)  # in place

    def ways(self, a_codes: Tensor) -> list[str]:
        """The names of the ways that codes take."""
        return self.product.ways(a_codes)

    def scaled(self, a_codes: Tensor, scale: Tensor, offset: Tensor, to_codes: ToCodes | None = None,
               shift: Tensor | None = None) -> Tensor:
        """`float32(sum + shift) scale + offset`, or codes; see `elementwise.scaled`."""
        y, unit = self.product(a_codes), self.unit
        if self.rest:
            y, unit = self._with_rest(y, a_codes), 1
        in_float = y.dtype == torch.float32 and self.integers == torch.int32
        return elementwise.scaled(y if in_float else y.to(self.integers), scale, offset, to_codes, unit, shift)

    def sums(self, a_codes: Tensor) -> Tensor:
        """What a call returns, in `dtype`: float32 where that holds every sum, which saves a pass over memory."""
        return self._with_rest(self.product(a_codes), a_codes).to(self.dtype)

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
        geometry, (around, in_library) = self.geometry, padding(self.geometry)
        channels = a_codes.view(*a_codes.shape[:3], geometry.groups, -1).sum(4, dtype=torch.int32)
        dtype = torch.float32 if self.largest_code * self.rows < EXACT else torch.float64
        ones = torch.ones(geometry.groups, 1, *self.layer.kernel, dtype=dtype)
        x = F.pad(channels, around) if around else channels
        sums = F.conv2d(x.permute(0, 3, 1, 2).to(dtype), ones, None, geometry.stride, in_library, geometry.dilation, geometry.groups)
        return sums.permute(0, 2, 3, 1)
