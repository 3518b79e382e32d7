"""Weights on pairs of bit lines (`CrossbarSpec(weights="pair")`): what the two cells of each weight and slice hold.

L is twice the code that stands for zero. Where it is odd (DoReFa), no weight is zero, and a pair holds the w bits of `|2 W - L|`; where
it is even, L = 2 m (SAWB, linear quantizers), the w - 1 bits of `|W - m|`. They are cut into slices of c bits like a code. The digits
lie on the positive bit line of the pair where the number is positive and on the negative one where it is negative; the other cell is
off, and so are both of a zero weight. With X+ and X- what the two cells of a slice hold, in levels,

    v = sum over rows of a_z (X+ - X-)        sum A (2 W - L) = worth * sum over arrays, z, k of 2^(d z + c k) v

worth being 1 for odd L and 2 for even L. There is no reference column: what both cells have in common cancels.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .spec import CrossbarSpec


def worth(zero_twice: int) -> int:
    """What `v` is worth in `2 W - L`, see the module."""
    return 1 if zero_twice % 2 else 2


def on_cells(spec: CrossbarSpec, zero_twice: int) -> CrossbarSpec:
    """The hardware as its cells see it: the bits that they hold, w or w - 1, in place of the weight's."""
    bits = (zero_twice // worth(zero_twice)).bit_length()
    return replace(spec, w_bits=bits, cell_bits=min(spec.cell_bits, bits))


def signed_digits(w_codes: Tensor, zero_twice: int, spec: CrossbarSpec) -> Tensor:
    """`X+ - X-` of each slice, int32 `[slices, *w_codes.shape]`. Args: spec, that of `on_cells`.

    Raises: ValueError for codes beyond `L`, which no quantizer makes: their number has one bit more.
    """
    if w_codes.numel() and int(w_codes.max()) > zero_twice:
        raise ValueError(f"weight codes reach {int(w_codes.max())}; pairs of cells hold those from 0 to {zero_twice}")
    signed = (2 * w_codes.int() - zero_twice) // worth(zero_twice)
    size, sign = signed.abs(), signed.sign()
    return torch.stack([((size >> (spec.cell_bits * k)) & (2**bits - 1)) * sign for k, bits in enumerate(spec.slice_bits)])
