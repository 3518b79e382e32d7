"""The numbers of a layer for which the Triton kernels are compiled."""

from dataclasses import dataclass

import triton.language as tl


@dataclass(frozen=True)
class Constants:
    """What the kernel is compiled for: all numbers of a layer. (Triton takes one such object as one argument; it would not
    take fields that are tensors.)"""

    acc: tl.dtype  # of the accumulators, int32 or int64
    channels: int  # of one group, and so is out
    groups: int
    out: int
    taps: int
    kernel_w: int
    stride_y: int
    stride_x: int
    dilation_y: int
    dilation_x: int
    span: int  # rows after which arrays begin anew: those of a kernel position, or all
    rows: int  # of a full array
    arrays: int
    slices: int
    digits: int
    classes: int  # of n, that are told apart
    dac_bits: int
    planned: bool  # whether some reads are not converted
    adc_bits: int
    parts: int  # 2 where levels do not fit int8
    vector: int  # rows that lie side by side in memory, wherever an array begins
    block_k: int  # rows of one dot product
    blocks: int  # dot products of an array
    first_bin: int  # `mapping.Bins`
    bins: int
    bin_shift: int
    copies: int  # of the counts
    wide: bool = False  # cells on a grid: whether a read needs 64 bits
