"""The algorithm that older public code uses, as a yardstick for time: a convolution for every read.

For each kernel position, block of 128 input channels, input bit and weight slice one full convolution of the input bits
with the slice's cells at that position, one with the reference column, an ADC over the whole batch, and a shift-add.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules, from any folder

import torch  # noqa: E402
from models.quant import CrossbarSpec  # noqa: E402
from torch.nn import functional as F  # noqa: E402


def convolution(a_codes: torch.Tensor, w_codes: torch.Tensor, spec: CrossbarSpec, padding: int) -> torch.Tensor:
    """`sum A (2 W - L)` with a dynamic ADC; a_codes [N, in, H, W] and w_codes [out, in, kh, kw] as float tensors."""
    total = 0
    kh, kw = w_codes.shape[2:]
    for ky in range(kh):
        for kx in range(kw):
            for first in range(0, a_codes.shape[1], spec.rows):
                block = slice(first, first + spec.rows)
                for z in range(spec.a_bits):
                    bits = (a_codes[:, block] / 2**z).floor() % 2
                    for k, slice_bits in enumerate(spec.slice_bits):
                        cells = torch.zeros_like(w_codes[:, block])
                        position = (w_codes[:, block, ky, kx] / 2 ** (spec.cell_bits * k)).floor() % 2**slice_bits
                        cells[:, :, ky, kx] = position
                        dummy = torch.zeros_like(cells)
                        dummy[:, :, ky, kx] = (2**slice_bits - 1) / 2
                        read = F.conv2d(bits, cells, padding=padding) - F.conv2d(bits, dummy, padding=padding)
                        total = total + 2 ** (z + spec.cell_bits * k) * _adc(read, spec.adc_bits)
    return 2 * total


def _adc(v, adc_bits):
    low, high = v.min(), v.max()
    step = (high - low) / 2**adc_bits
    return ((v - low) / step).round().clamp(0, 2**adc_bits - 1) * step + low
