"""`sum A W` of integer weights of several bytes, such as cells on a grid without an ADC, as exact products of single bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from ....arrays.mapping import MappedLayer
from ... import accumulator_dtype
from .products import Product


class ProductsOfBytes:
    """`sum A W = sum_i 2^(8 i) sum A W_i`, with `W = sum_i 2^(8 i) W_i` and `W_i` from -128 to 127: what `engines` names for the cells of a
    layer without an ADC.

    Call with a_codes, uint8 `[N, H, W, in]`; returns integers `[N, H', W', out]`.
    """

    def __init__(self, layer: MappedLayer) -> None:
        self.dtype, self.products = accumulator_dtype(layer), []
        weight = layer.cell_weights.cpu().long()
        while not self.products or weight.any():
            low = ((weight + 128) & 255) - 128
            self.products.append(Product(low.to(torch.int8), layer.geometry, 2**layer.spec.a_bits - 1))
            weight = (weight - low) >> 8

    def __call__(self, a_codes: Tensor) -> Tensor:
        total = self.products[-1](a_codes).to(self.dtype)
        for product in self.products[-2::-1]:
            total.mul_(256).add_(product(a_codes).to(self.dtype))  # which may wrap, and back
        return total

    def ways(self, a_codes: Tensor) -> list[str]:
        """The names of the ways that codes take."""
        return list(dict.fromkeys(way for product in self.products for way in product.ways(a_codes)))
